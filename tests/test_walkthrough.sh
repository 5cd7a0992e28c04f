#!/bin/sh
# walkthrough.c: it compiles as C and C++, its numbers are those worked out by hand and it would
# notice if not.
. ./lib.sh
CC=${CC:-cc}
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror"
if ! $CC -std=c99 -O1 $warn -I.. -o "$tmp/walkthrough" ../examples/walkthrough.c -lm -pthread; then
  fail test_walkthrough_compiles; finish
fi
ok test_walkthrough_compiles
if have g++; then
  if g++ -x c++ -std=c++11 -O0 -Wall -Wextra -Werror -I.. -o "$tmp/plus" ../examples/walkthrough.c \
      -lm -pthread
  then ok test_walkthrough_compiles_as_cpp; else fail test_walkthrough_compiles_as_cpp; fi
else skip test_walkthrough_compiles_as_cpp "there is no g++ here"; fi
if "$tmp/walkthrough" > "$tmp/out" && tail -n 1 "$tmp/out" | grep -q '^Every number is' &&
    ! grep -q WRONG "$tmp/out"
then ok test_walkthrough_agrees_with_the_hand
else fail test_walkthrough_agrees_with_the_hand "$(grep WRONG "$tmp/out")"; fi
if [ ! -c /dev/full ]; then skip test_walkthrough_says_when_nobody_reads_it \
    "there is no /dev/full here"
elif "$tmp/walkthrough" > /dev/full; then fail test_walkthrough_says_when_nobody_reads_it
else ok test_walkthrough_says_when_nobody_reads_it; fi
missing=
for i in 1 2 3 4 5 6; do grep -q "Eq. $i:" "$tmp/out" || missing="$missing $i"; done
if [ -z "$missing" ]; then ok test_walkthrough_names_equations_1_to_6
else fail test_walkthrough_names_equations_1_to_6 "missing:$missing"; fi
# a wrong gate, expert or input is noticed
notices() { # NAME SED-EXPRESSION
  sed -e "$2" ../examples/walkthrough.c > "$tmp/wrong.c"
  $CC -std=c99 -O0 -I.. -o "$tmp/wrong" "$tmp/wrong.c" -lm -pthread && "$tmp/wrong" > "$tmp/out"
  if [ $? -eq 1 ] && grep -q WRONG "$tmp/out"; then ok test_walkthrough_notices_$1
  else fail test_walkthrough_notices_$1; fi
}
notices a_wrong_gate 's/= (float)ln3;/= 0.99f * (float)ln3;/'
notices a_wrong_expert 's/{{1, -1}, {1, 1}}/{{1, -1}, {1, 1.01f}}/'
notices a_wrong_input 's/{{1, 2}, {1, 2}}/{{1, 2}, {1, 2.01f}}/'
finish
