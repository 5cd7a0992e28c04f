#!/bin/sh
# What README.md promises about the code: the paper map, the whole program, the commands.
. ./lib.sh
sed -n '/^| paper |/,/^$/p' paper.md | sed 1,2d | sed '/^$/d' > "$tmp/map"
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

# the programs of README.md are those of examples/: ask.c whole, train_text.c in part
sed -n '/^```c$/,/^```$/p' ../README.md > "$tmp/programs"
awk '/^```c$/ { n++; next } n == 1 && !/^```$/' "$tmp/programs" | grep -v '/\* \.\.\.' |
  grep -v '^ *$' > "$tmp/excerpt"
awk '/^```c$/ { n++; next } n == 2 && !/^```$/' "$tmp/programs" > "$tmp/ask.c"
if [ -s "$tmp/excerpt" ] && ! grep -vxFf ../examples/train_text.c "$tmp/excerpt" > "$tmp/log"; then
  ok test_readme_trains_as_train_text_does
else
  fail test_readme_trains_as_train_text_does "$(head -n 3 "$tmp/log")"
fi
sed '1,/\*\/$/d' ../examples/ask.c > "$tmp/example.c"
if [ -s "$tmp/ask.c" ] && cmp -s "$tmp/ask.c" "$tmp/example.c"; then ok test_readme_asks_as_ask_does
else fail test_readme_asks_as_ask_does "$(diff "$tmp/ask.c" "$tmp/example.c" | head -n 5)"; fi
cc -std=c99 -O1 -I.. -o "$tmp/ask" "$tmp/ask.c" -lm -pthread || fail test_readme_program_compiles

# the header's first page has a program that trains, in C and in C++
sed -n '/^   EXAMPLE/,/^   WHAT IT COMPUTES/p' ../moe.h | sed '1d;$d' | sed 's/^     //' \
  > "$tmp/first.c"
cp "$tmp/first.c" "$tmp/first.cpp"
if cc -std=c99 -O1 -I.. -o "$tmp/first" "$tmp/first.c" -lm -pthread &&
   "$tmp/first" | grep -q '256 of 256 points right'; then
  ok test_readme_program_of_the_header_learns
else fail test_readme_program_of_the_header_learns; fi
if have g++; then
  if g++ -std=c++11 -O1 -I.. -o "$tmp/firstpp" "$tmp/first.cpp" -lm -pthread &&
     "$tmp/firstpp" | cmp -s - /dev/fd/3 3<<END
$("$tmp/first")
END
  then ok test_readme_program_of_the_header_is_cpp_too
  else fail test_readme_program_of_the_header_is_cpp_too; fi
else skip test_readme_program_of_the_header_is_cpp_too "there is no g++ here"; fi

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
