#!/bin/sh
# examples/tasklevel.c: every system trains, routes become discrete, what it writes, and what it says when something is wrong.
. ./lib.sh
if ! "${CC:-cc}" -std=c99 -D_POSIX_C_SOURCE=200809L -O1 -I.. -o "$tmp/tasklevel" ../examples/tasklevel.c -lm -pthread 2> "$tmp/err"; then
  fail test_tasklevel_compiles "$(head -n 5 "$tmp/err")"
  finish
fi
ok test_tasklevel_compiles
tl() { "$tmp/tasklevel" --data ../examples/data --tasks pros_cons,query_wellformedness --layers 2 --hidden 16 --rows 64 --threads 2 "$@"; }

if tl --steps 40 --csv "$tmp/csv" --json "$tmp/json" > "$tmp/out" 2> "$tmp/err" &&
   grep -q '^100 x metric on dev *multi *random1 *random2 *average *softmax *gumbel *straight$' "$tmp/out" && grep -q '^mean ' "$tmp/out"
then ok test_tasklevel_trains_every_system; else fail test_tasklevel_trains_every_system "$(tail -n 3 "$tmp/out" "$tmp/err")"; fi
# three blocks of a row sum to 1, and at the end the largest is larger than at the start
if awk -F, 'NR > 1 { sum += $7; if ($7 > most) most = $7; if (NR % 3 == 1) { if (sum < 0.9999 || sum > 1.0001) bad = 1
              if ($2 == 0) first += most; if ($2 == 40) last += most; rows++; sum = most = 0 } }
            END { exit !(rows == 60 && !bad && last > first + 1) }' "$tmp/csv"
then ok test_tasklevel_routes_become_discrete; else fail test_tasklevel_routes_become_discrete "$(tail -n 4 "$tmp/csv")"; fi
runs=$(grep -c '"system":' "$tmp/json")
[ "$runs" = 7 ] && ok test_tasklevel_writes_results || fail test_tasklevel_writes_results "$runs runs in the JSON"

for options in --homogeneous --two-stage '--vectors text --freeze' '--vectors fisher'; do
  name=test_tasklevel_takes_$(echo "$options" | tr -cd 'a-z ' | tr ' ' _)
  if tl --steps 6 --systems straight $options > "$tmp/out" 2> "$tmp/err" && grep -q '^mean ' "$tmp/out"; then ok "$name"
  else fail "$name" "$(cat "$tmp/err")"; fi
done

refused() { # NAME SENTENCE OPTIONS...
  name=$1 sentence=$2
  shift 2
  tl "$@" > "$tmp/out" 2> "$tmp/err"
  status=$?
  if [ $status -eq 1 ] && grep -q -- "$sentence" "$tmp/err"; then ok "$name"; else fail "$name" "status $status: $(cat "$tmp/err")"; fi
}
refused test_tasklevel_wants_two_blocks_to_choose_from 'nothing to choose from below 2' --blocks 1 --systems softmax
refused test_tasklevel_names_the_unknown_option 'unknown option --block;' --block 3
refused test_tasklevel_names_the_missing_value '--lr needs a value' --lr
refused test_tasklevel_wants_a_number '"x" is no number' --steps x
refused test_tasklevel_wants_known_vectors 'random, text or fisher' --vectors none
refused test_tasklevel_wants_known_systems 'names none of' --systems dense
refused test_tasklevel_wants_a_vocabulary '--vocab and --heads' --init "$tmp/none"
finish
