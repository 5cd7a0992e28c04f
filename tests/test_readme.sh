#!/bin/sh
# What README.md promises about the code: the paper map, the whole program, the commands.
. ./lib.sh
sed -n '/^| paper |/,/^$/p' ../README.md | sed 1,2d | sed '/^$/d' > "$tmp/map"
[ -s "$tmp/map" ] && ok test_readme_has_a_paper_map || fail test_readme_has_a_paper_map
bad=
while IFS='|' read -r _ paper tag fn _; do
  tag=$(echo $tag) fn=$(echo $fn)
  grep -q "^/\* ---- .* ---- $tag\$" ../moe.h || grep -q "^/\* ---- .* ---- $tag *\*/" ../moe.h ||
    bad="$bad [$paper: no section $tag]"
  grep -q "^MOE_API .*[ *]$fn(" ../moe.h || bad="$bad [$paper: no function $fn]"
done < "$tmp/map"
if [ -z "$bad" ]; then ok test_readme_paper_map_names_what_exists
else fail test_readme_paper_map_names_what_exists "$bad"; fi

# the program of the README is the one of the header's first page, and compiles as C and as C++
sed -n '/^```c$/,/^```$/p' ../README.md | sed '1d;$d' > "$tmp/ask.c"
sed -n '/EXAMPLE: a trained/,/^$/p' ../moe.h | sed 1d | sed 's/^     //' |
  grep -v '^ *$' > "$tmp/header.c"
grep -v '^ *$' "$tmp/ask.c" > "$tmp/readme.c"
if cmp -s "$tmp/header.c" "$tmp/readme.c"; then
  ok test_readme_program_is_the_header_s
else
  fail test_readme_program_is_the_header_s "$(diff "$tmp/header.c" "$tmp/readme.c" | head -n 5)"
fi
if cc -std=c99 -O1 -I.. -o "$tmp/ask" "$tmp/ask.c" -lm -pthread; then
  ok test_readme_program_compiles
else
  fail test_readme_program_compiles
fi
if have g++; then
  cp "$tmp/ask.c" "$tmp/ask.cpp"
  if g++ -std=c++11 -O1 -I.. -o "$tmp/askpp" "$tmp/ask.cpp" -lm -pthread; then
    ok test_readme_program_compiles_as_cpp
  else
    fail test_readme_program_compiles_as_cpp
  fi
else skip test_readme_program_compiles_as_cpp "there is no g++ here"; fi

# and it runs: tasks with labels and a regression, which has none
if program train && "$tmp/train" --data ../examples/data --tasks pros_cons,query_wellformedness \
    --systems tag --layers 1 --hidden 16 --ffn 16 --steps 2 --threads 1 \
   --save "$tmp/model.safetensors" > "$tmp/log" 2>&1; then
  said=$("$tmp/ask" "$tmp/model.safetensors" pros_cons 'a fine thing'
    "$tmp/ask" "$tmp/model.safetensors" query_wellformedness 'who is it ?')
  case $said in
    pros\ 0.*value\ *|cons\ 0.*value\ *) ok test_readme_program_answers ;;
    *) fail test_readme_program_answers "$said" ;;
  esac
  if "$tmp/ask" "$tmp/model.safetensors" no_such_task x || "$tmp/ask" "$tmp/none" pros_cons x; then
    fail test_readme_program_ends_with_1
  else
    ok test_readme_program_ends_with_1
  fi
else fail test_readme_program_answers "$(tail -n 3 "$tmp/log")"; fi

# the options that the README names are in --help
grep -o -- '--[a-z][a-z-]*' ../README.md | sort -u | while read -r o; do
  grep -q -- "$o" ../examples/*.c ../examples/tools/* || echo "$o"
done > "$tmp/missing"
if [ ! -s "$tmp/missing" ]; then ok test_readme_options_exist
else fail test_readme_options_exist "$(tr '\n' ' ' < "$tmp/missing")"; fi
finish
