#!/bin/sh
# examples/tools/tasklevel.c: every system, router, grid and unseen task; what is saved says the
# same; killed and resumed; what it says when something is wrong.
. ./lib.sh
program tasklevel && program predict || { fail test_tasklevel_compiles; finish; }
ok test_tasklevel_compiles
data=../examples/data
tl() {
  "$tmp/tasklevel" --data $data --tasks pros_cons,query_wellformedness --layers 2 --hidden 16 \
    --rows 64 --threads 2 --lr 3e-3 "$@"
}
has() { # NAME FILE PATTERN...
  name=$1 file=$2 missing=
  shift 2
  for pattern; do grep -q -- "$pattern" "$file" || missing="$missing [$pattern]"; done
  [ -z "$missing" ] && ok "$name" || fail "$name" "$missing in: $(tail -n 12 "$file")"
}

if tl --steps 40 --csv "$tmp/csv" --json "$tmp/json" > "$tmp/out" 2> "$tmp/err"; then
  ok test_tasklevel_runs
else
  fail test_tasklevel_runs "$(cat "$tmp/err")"
fi
has test_tasklevel_trains_every_system "$tmp/out" '^multi  ' '^random1  ' '^random2  ' \
  '^average  ' '^softmax  ' '^gumbel  ' '^straight  '
# three blocks of a row sum to 1, and at the end the largest is larger than at the start
if awk -F, 'NR == 1 { next }
    { sum += $11; if ($11 > most) most = $11 }
    NR % 3 == 1 {
      if (sum < 0.9999 || sum > 1.0001) bad = 1
      if ($6 == 0) first += most
      if ($6 == 40) last += most
      rows++
      sum = most = 0
    }
    END { exit !(rows == 60 && !bad && last > first + 1) }' "$tmp/csv"
then ok test_tasklevel_routes_become_discrete
else fail test_tasklevel_routes_become_discrete "$(tail -n 4 "$tmp/csv")"; fi
# what is printed of the largest weights follows from the CSV
want=$(awk -F, '$2 == "gumbel" && $6 == 0 { if ($11 > m[$8, $9]) m[$8, $9] = $11 }
  END { for (k in m) { s += m[k]; ++n } printf "%.0f", 100 * s / n }' "$tmp/csv")
said=$(sed -n 's/^  after   0 %.* largest weight of a block is \([0-9]*\) .*/\1/p' "$tmp/out" |
  sed -n 2p)
[ -n "$said" ] && [ "$want" = "$said" ] && ok test_tasklevel_prints_what_the_csv_has ||
  fail test_tasklevel_prints_what_the_csv_has "CSV $want, printed $said"
runs=$(grep -c '"system":' "$tmp/json")
if [ "$runs" = 7 ]; then ok test_tasklevel_writes_results
else fail test_tasklevel_writes_results "$runs runs in the JSON"; fi

for options in --homogeneous --two-stage '--vectors text --freeze' '--vectors fisher' \
  '--router lstm' '--router transformer' '--router lstm --vectors text'; do
  name=test_tasklevel_takes_$(echo "$options" | tr -cd 'a-z ' | tr ' ' _)
  if tl --steps 6 --systems straight $options > "$tmp/out" 2> "$tmp/err" &&
      grep -q '^straight' "$tmp/out"; then ok "$name"
  else fail "$name" "$(cat "$tmp/err")"; fi
done
mkdir "$tmp/told" && cp -r $data/pros_cons $data/query_wellformedness $data/vocab.txt "$tmp/told/"
awk -F '\t' -v OFS='\t' 'NR == 1 { print $0, "description" }
  $1 == "pros_cons" { print $0, "is it praise or blame ?" }
  $1 == "query_wellformedness" { print $0, "how well is the question asked ?" }' $data/tasks.tsv \
  > "$tmp/told/tasks.tsv"
if tl --data "$tmp/told" --steps 4 --systems softmax --vectors description \
    > "$tmp/out" 2> "$tmp/err"; then ok test_tasklevel_takes_descriptions
else fail test_tasklevel_takes_descriptions "$(cat "$tmp/err")"; fi

# [TL] 4: selection x batching x learning-rate ratio, in one command; every line has its number of
# runs
if tl --steps 6 --systems multi,softmax,gumbel,straight --grid 1,10 --two-stage --seeds 1,2 \
    --json "$tmp/json" > "$tmp/out" 2> "$tmp/err" &&
   [ "$(grep -c '"system":' "$tmp/json")" = 52 ] &&
   [ "$(grep -c '| .*|.*[0-9]$' "$tmp/out")" = 26 ]; then ok test_tasklevel_grid_has_every_line
else fail test_tasklevel_grid_has_every_line \
  "$(grep -c '"system":' "$tmp/json") runs: $(cat "$tmp/err")"; fi
has test_tasklevel_grid_names_its_lines "$tmp/out" '^multi, one task  ' \
  '^gumbel, any tasks, x1, stage 1 ' '^straight, one task, x10, stage 2 '

# a task never seen: a score for each number of rows; with 0 rows the head is another task's
cp -r $data/sentence_polarity $data/subjectivity "$tmp/told/"
printf 'name\tinput\tkind\tlabels\tmetric\n' > "$tmp/told/tasks.tsv"
for t in pros_cons sentence_polarity subjectivity; do
  printf '%s\tsingle\tclassification\t0=bad,1=good\taccuracy\n' $t
done >> "$tmp/told/tasks.tsv"
for router in mlp lstm transformer; do
  for learns in vector all; do
    if "$tmp/tasklevel" --data "$tmp/told" --layers 2 --hidden 16 --rows 64 --threads 2 --steps 10 \
        --adapt-steps 5 --systems multi,random2,average,straight --router $router --vectors text \
        --learns $learns --unseen sentence_polarity --shots 0,4,300 --json "$tmp/json" \
        > "$tmp/out" 2> "$tmp/err" &&
        [ "$(tr '{' '\n' < "$tmp/json" | grep -c '"name": "sentence_polarity", "rows"')" = 12 ]
    then ok test_tasklevel_adapts_${learns}_with_$router
    else fail test_tasklevel_adapts_${learns}_with_$router "$(cat "$tmp/err")"; fi
  done
done
# from frozen blocks a vector and a head learn some of a new task, all together all of it
mkdir "$tmp/word" "$tmp/word/seen" "$tmp/word/new" && cp $data/vocab.txt "$tmp/word/"
printf 'name\tinput\tkind\tlabels\tmetric\n' > "$tmp/word/tasks.tsv"
printf '%s\tsingle\tclassification\t%s\taccuracy\n' seen 0=a,1=b also 0=a,1=b new 0=a,1=b,2=c \
  >> "$tmp/word/tasks.tsv"
awk 'BEGIN {
  print "label\tsentence1"
  for (i = 0; i < 120; ++i) print i % 2 "\t" (i % 2 ? "music" : "weather") " book" i % 7
}' > "$tmp/word/seen/train.tsv"
awk 'BEGIN {
  split("play restaurant weather", word, " ")
  print "label\tsentence1"
  for (i = 0; i < 120; ++i) print i % 3 "\t" word[i % 3 + 1] " it"
}' > "$tmp/word/new/train.tsv"
cp "$tmp/word/seen/train.tsv" "$tmp/word/seen/dev.tsv"
cp "$tmp/word/new/train.tsv" "$tmp/word/new/dev.tsv"
cp -r "$tmp/word/seen" "$tmp/word/also"
for learns in vector all; do
  "$tmp/tasklevel" --data "$tmp/word" --layers 1 --hidden 32 --threads 2 --steps 60 --lr 3e-3 \
    --systems softmax --router lstm --unseen new --shots 0,90 --adapt-steps 150 \
    --learns $learns --json "$tmp/json" > "$tmp/out" 2> "$tmp/err"
  value=$(sed -n 's/.*"rows": 90, "metric": "accuracy", "value": \([0-9.]*\),.*/\1/p' "$tmp/json")
  if awk -v v="$value" -v low=$([ $learns = all ] && echo 0.9 || echo 0.6) \
      'BEGIN { exit !(v > low) }' && grep -q ' - ' "$tmp/out"
  then ok test_tasklevel_learns_an_unseen_task_by_$learns
  else fail test_tasklevel_learns_an_unseen_task_by_$learns "$value: $(cat "$tmp/err")"; fi
done

# a saved model says what the table says, whatever chose its routes
tl --steps 30 --systems multi,random2,average,straight --save "$tmp/s.safetensors" \
  --json "$tmp/json" > "$tmp/out" 2>&1
tl --steps 30 --systems gumbel --router lstm --save "$tmp/s-lstm-1.safetensors" \
  --json "$tmp/json-lstm" > "$tmp/out" 2>&1
tl --steps 30 --systems softmax --router transformer \
  --two-stage --save "$tmp/s-transformer-1.safetensors" \
  --json "$tmp/json-transformer" > "$tmp/out" 2>&1
for system in multi random2 average straight lstm transformer; do
  json=$tmp/json
  [ -f "$tmp/json-$system" ] && json=$tmp/json-$system
  of=
  [ "$json" != "$tmp/json" ] || of=$system
  table=$(sed -n "/\"system\": \"$of/,/\"small\"/p" "$json" |
    sed -n 's/.*"query_wellformedness", "metric": "spearman", "value": \([-0-9.]*\).*/\1/p' |
    tail -n 1)
  "$tmp/predict" "$tmp/s-$system-1.safetensors" query_wellformedness \
    --score < $data/query_wellformedness/dev.tsv > "$tmp/out" 2> "$tmp/err"
  scored=$(awk '$1 == "spearman" { print $2 }' "$tmp/out")
  if [ -n "$scored" ] && echo "$table $scored" |
      awk '{ d = $1 - $2; exit !(NF == 2 && d < 2e-4 && d > -2e-4) }'
  then ok test_tasklevel_saves_$system
  else fail test_tasklevel_saves_$system "table $table, predict $scored: $(cat "$tmp/err")"; fi
done

# stopped and resumed again and again, in both stages: the same results
long="--data $data --tasks pros_cons,query_wellformedness --layers 2 --hidden 16 --rows 64
      --threads 2 --lr 3e-3 --steps 24 --systems random1,gumbel --router lstm --two-stage
      --unseen subjectivity --shots 5 --adapt-steps 3 --vectors text"
results() { # without what differs: the names of files and the time
  grep -v '"options":' "$1" | sed 's/"\(seconds\|tokens_per_second\)": [0-9.]*//g'
}
"$tmp/tasklevel" $long --json "$tmp/whole.json" --csv "$tmp/whole.csv" > "$tmp/out" 2> "$tmp/err"
files() {
  ls -l --time-style=full-iso "$tmp"/state* 2> /dev/null | grep -v '\.tmp\|\.lock' | cksum
}
state=$tmp/state.safetensors stops=0 status=130
while [ $stops -lt 40 ]; do
  from=
  ! ls "$tmp"/state* > /dev/null 2>&1 || from="--resume $state"
  before=$(files)
  "$tmp/tasklevel" $long --json "$tmp/parts.json" --csv "$tmp/parts.csv" --checkpoint "$state" \
    --every 3 $from > "$tmp/out" 2> "$tmp/err" &
  pid=$!
  while kill -0 $pid 2> /dev/null && [ "$(files)" = "$before" ]; do sleep 0.02; done
  if [ $((stops % 2)) = 0 ]; then kill -9 $pid 2> /dev/null; else kill -TERM $pid 2> /dev/null; fi
  wait $pid 2> /dev/null
  status=$?
  if [ $status -ne 143 ] && [ $status -ne 137 ]; then break; fi
  stops=$((stops + 1))
done
if [ $status -eq 0 ] && [ $stops -gt 3 ] &&
    [ "$(results "$tmp/whole.json")" = "$(results "$tmp/parts.json")" ] &&
    cmp -s "$tmp/whole.csv" "$tmp/parts.csv"
then
  ok test_tasklevel_killed_and_resumed_gives_the_same
else
  results "$tmp/whole.json" > "$tmp/a" && results "$tmp/parts.json" > "$tmp/b"
  fail test_tasklevel_killed_and_resumed_gives_the_same \
      "status $status after $stops stops: $(cat "$tmp/err"; diff "$tmp/a" "$tmp/b" | head -n 5)"
fi

refused() { # NAME SENTENCE OPTIONS...
  name=$1 sentence=$2
  shift 2
  tl "$@" > "$tmp/out" 2> "$tmp/err"
  status=$?
  if [ $status -eq 1 ] && grep -q -- "$sentence" "$tmp/err"; then ok "$name"
  else fail "$name" "status $status: $(cat "$tmp/err")"; fi
}
refused test_tasklevel_wants_two_blocks_to_choose_from 'experts is 1, expected at least 2' \
  --blocks 1 \
  --systems softmax
refused test_tasklevel_names_the_unknown_option 'unknown option --block;' --block 3
refused test_tasklevel_names_the_missing_value '--lr needs a value' --lr
refused test_tasklevel_wants_a_number 'not "x"' --steps x
refused test_tasklevel_wants_known_vectors '--vectors is random|text|description|fisher' --vectors \
  none
refused test_tasklevel_wants_known_systems '"dense" is none of' --systems dense
refused test_tasklevel_wants_known_routers '--router is mlp|lstm|transformer' --router gru
refused test_tasklevel_wants_a_vocabulary '--init needs --vocab' --init "$tmp/none"
refused test_tasklevel_wants_descriptions 'should have a column description' --vectors description
refused test_tasklevel_wants_an_unseen_task_that_exists 'there is no task "mrpc"' --unseen mrpc
refused test_tasklevel_wants_an_unseen_task_unseen 'is in --tasks, too' --unseen pros_cons
refused test_tasklevel_wants_enough_rows 'has 618 training rows, not 5000' --unseen subjectivity \
  --shots 5000
refused test_tasklevel_wants_a_head_that_fits 'has other labels than' --unseen subjectivity \
  --head-from query_wellformedness
refused test_tasklevel_wants_text_vectors_for_all 'goes with --vectors text' --unseen subjectivity \
  --vector-from text
refused test_tasklevel_resumes_with_the_same_options_only 'made with other options' \
  --resume "$state"
refused test_tasklevel_wants_a_state 'not a safetensors file' --systems softmax --resume \
  test_tasklevel.sh
refused test_tasklevel_wants_a_folder_to_write_to \
  'no/such/x: No such file\|cannot be written: No such file' --json "$tmp/no/such/x"
refused test_tasklevel_wants_a_batch_that_is_one '--batch takes a whole number from 1 to 65536' \
  --batch 100000
refused test_tasklevel_wants_a_size_that_is_one '--hidden takes a whole number' --hidden 1000000000
refused test_tasklevel_wants_positions_that_are_some '--max-len takes a whole number' --batch 1 \
  --max-len 100000000
cp -r "$tmp/told" "$tmp/zero" && cp $data/tasks.tsv "$tmp/zero"
printf 'label\tsentence1\n1\tfine\n0\ta\000b\n1\tfine\n' > "$tmp/zero/pros_cons/train.tsv"
refused test_tasklevel_sees_a_zero_byte 'pros_cons/train.tsv:3: a zero byte' \
  --data "$tmp/zero"
spoiled() { # NAME SENTENCE ROW OF tasks.tsv
  printf 'name\tinput\tkind\tlabels\tmetric\n%b\n' "$3" > "$tmp/zero/tasks.tsv"
  refused test_tasklevel_sees_$1 "$2" --data "$tmp/zero" --tasks pros_cons
}
spoiled an_unknown_input 'input "solo" is neither single nor pair' \
  'pros_cons\tsolo\tclassification\t0=a,1=b\taccuracy'
spoiled a_label_out_of_turn 'label 1 should read 1=NAME, not "2=b"' \
  'pros_cons\tsingle\tclassification\t0=a,2=b\taccuracy'
spoiled too_few_labels 'a task needs at least two labels, "0=a" names 1' \
  'pros_cons\tsingle\tclassification\t0=a\taccuracy'
spoiled a_range_of_words 'lowest label "x" is not a number' \
  'pros_cons\tsingle\tregression\tx..y\tpearson'
spoiled a_range_without_an_end 'highest label "y" is not a number' \
  'pros_cons\tsingle\tregression\t0..y\tpearson'
spoiled a_range_upside_down 'the range of labels "5..0" is empty' \
  'pros_cons\tsingle\tregression\t5..0\tpearson'
spoiled a_column_too_many_in_tasks 'more than the 5 columns of the first line' \
  'pros_cons\tsingle\tclassification\t0=a,1=b\taccuracy\tx'
cp $data/tasks.tsv "$tmp/zero"
printf 'label\tsentence1\n1\tfine\n0\t"one\ttwo"\n1\tfine\n' > "$tmp/zero/pros_cons/train.tsv"
refused test_tasklevel_sees_a_column_too_many 'pros_cons/train.tsv:3: more than the 2 columns' \
  --data "$tmp/zero"
if [ -c /dev/full ]; then
  refused test_tasklevel_says_that_a_disk_is_full '/dev/full: writing failed' --steps 1 \
    --systems softmax --json /dev/full
else skip test_tasklevel_says_that_a_disk_is_full "there is no /dev/full here"; fi
if [ ! -c /dev/full ]; then
  skip test_tasklevel_says_that_its_table_is_lost "there is no /dev/full here"
elif "$tmp/tasklevel" --data "$tmp/told" --steps 1 --systems multi > /dev/full 2> "$tmp/log" ||
    ! grep -q 'standard output cannot be written' "$tmp/log"; then
  fail test_tasklevel_says_that_its_table_is_lost "$(tail -n 3 "$tmp/log")"
else ok test_tasklevel_says_that_its_table_is_lost; fi
"$tmp/tasklevel" --help > "$tmp/help"
undocumented=$(grep -o '"--[a-z-]*"' ../examples/tools/tasklevel.c | tr -d '"' | sort -u |
  grep -v -x -e --seed -e --help | while read -r o; do
    grep -q -- "$o" "$tmp/help" || echo "$o"
  done)
if [ -z "$undocumented" ]; then ok test_tasklevel_help_lists_every_option
else fail test_tasklevel_help_lists_every_option "$undocumented"; fi
finish
