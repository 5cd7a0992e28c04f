#!/bin/sh
# paper.md: a row for each requirement of the papers, and what a row names exists and is run by its
# command.
. ./lib.sh
grep '^| [0-9]' paper.md > "$tmp/rows"
missing=$(awk -F'|' '{ seen[$2 + 0]++ } END {
  for (i = 1; i <= 47; ++i) if (seen[i] != 1) printf " %d", i
}' "$tmp/rows")
if [ -z "$missing" ]; then ok test_paper_has_every_requirement_once
else fail test_paper_has_every_requirement_once "not there once:$missing"; fi

# A name stands in backticks. `tests` are in the files of the command: RUN(name) in C, the name or
# its beginning in a script.
quoted() { grep -o '`[^`]*`' | tr -d '`'; }
program_of() { # TEST FILES: whether one of the files has it
  name=$1; shift
  case $name in
    *\*) grep -q -- "\b${name%\*}" "$@" ;;
    # t: choose, sense, answer
    test_kinds_*_as_scikit_learn) grep -q 'test_kinds_${t}_as_scikit_learn' "$@" ;;
    *) grep -q -e "RUN($name)" "$@" ||
      grep -qw -- "$name" $(printf '%s\n' "$@" | grep '\.sh$') /dev/null ;;
  esac
}
: > "$tmp/bad"
while IFS='|' read -r _ number what where tests command verdict _; do
  number=$(echo $number)
  for name in $(echo "$where" | quoted); do
    case $name in
      '>>'*) grep -q "^/\* ---- .* ---- $name\( \|$\)" ../moe.h ;;
      --*) grep -q -e "\"$name\"\|  $name " ../examples/*.c ../examples/tools/*.[ch] ;;
      */*) [ -f "../$name" ] ;;
      moe_*) grep -q "^MOE_API .*[ *]$name(\|^} $name;" ../moe.h ;;
      *) false ;;
    esac || echo "$number: no $name" >> "$tmp/bad"
  done
  run=$(echo "$command" | quoted) files=
  case $run in
    "make -C tests "*) ;;
    *) echo "$number: the command is \"$run\"" >> "$tmp/bad" ;;
  esac
  for name in ${run#make -C tests }; do
    of_name=$(ls $name/*.c ./*/$name.c test_$name.sh 2> /dev/null) # a program, a part, a script
    if [ -n "$of_name" ]; then files="$files $of_name"
    else echo "$number: no tests for $name" >> "$tmp/bad"; fi
  done
  for name in $(echo "$tests" | quoted); do
    program_of "$name" $files || echo "$number: no $name in$files" >> "$tmp/bad"
  done
  case $verdict in
    ' ✓'*)
      [ -n "$(echo "$tests" | quoted)" ] || echo "$number: nothing proves it" >> "$tmp/bad" ;;
    ' gap: '?*) ;;
    *) echo "$number: neither a tick nor a gap" >> "$tmp/bad" ;;
  esac
  [ -n "$(echo "$where" | quoted)" ] && [ ${#what} -gt 10 ] ||
    echo "$number: what, and where?" >> "$tmp/bad"
done < "$tmp/rows"
if [ ! -s "$tmp/bad" ]; then ok test_paper_names_what_exists
else fail test_paper_names_what_exists "$(cat "$tmp/bad")"; fi
finish
