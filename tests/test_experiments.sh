#!/bin/sh
# examples/tools/experiments.sh: every experiment of the list in a tiny size, killed and resumed, in
# parts, its budgets, its tables, and what it says to bad input.
. ./lib.sh
for p in train tasklevel routes; do program $p || { fail test_experiments_compiles; finish; }; done
script=../examples/tools/experiments.sh
# the programs, behind a name that notes who was called; its process can be killed
mkdir "$tmp/bin"
for p in train tasklevel routes; do
  printf '#!/bin/sh\necho $$ > "%s/pid"\necho "%s $*" >> "%s/calls"\nexec "%s" "$@"\n' "$tmp" $p \
    "$tmp" "$tmp/$p" > "$tmp/bin/$p"
  chmod +x "$tmp/bin/$p"
done
MOE_BIN=$tmp/bin
export MOE_BIN

# two folders: bundled tasks, cut short, under their own names and under names of GLUE
from=../examples/data
mkdir "$tmp/own" "$tmp/glue"
cp $from/vocab.txt "$tmp/own"
cp $from/vocab.txt "$tmp/glue"
head -n 1 $from/tasks.tsv | tee "$tmp/own/tasks.tsv" > "$tmp/glue/tasks.tsv"
cut_task() { # FOLDER NAME OF
  mkdir "$tmp/$1/$2"
  head -n 60 $from/$3/train.tsv > "$tmp/$1/$2/train.tsv"
  { head -n 1 $from/$3/dev.tsv; tail -n 40 $from/$3/dev.tsv; } > "$tmp/$1/$2/dev.tsv"
  grep "^$3	" $from/tasks.tsv | sed "s/^$3	/$2	/" >> "$tmp/$1/tasks.tsv"
}
for t in snips_intents pros_cons query_wellformedness clinc_domains; do cut_task own $t $t; done
cut_task glue RTE intent_match
cut_task glue CoLA comparative_sentences
cut_task glue SST-2 pros_cons
cut_task glue MNLI intent_match
cut_task glue CB intent_match
cut_task glue YelpPolarity sentence_polarity
small="--layers 1 --hidden 16 --heads 2"
x() { # NAME OUT OPTIONS...
  name=$1 place=$2
  shift 2
  sh $script "$name" --data "$tmp/own" --out "$tmp/$place" --threads 1 "$@" \
    > "$tmp/out" 2> "$tmp/err"
}
says() { # NAME PATTERN...
  name=$1 missing=
  shift
  for pattern; do grep -q -e "$pattern" "$tmp/out" || missing="$missing [$pattern]"; done
  if [ -z "$missing" ]; then ok "$name"
  else fail "$name" "no$missing in: $(tail -n 12 "$tmp/out" "$tmp/err")"; fi
}

# ---- the list ----
names=$(sh $script --list | cut -d ' ' -f 1)
missing=
for n in table1 table2 table3 table4 table5 table6 table7 table8 table10 table11 section4 section5 \
  section6; do
  sh $script --list | grep -q "^$n  *\[T[aL]" || missing="$missing $n"
done
if [ -z "$missing" ] && [ "$(echo "$names" | wc -l)" -eq 13 ]; then ok test_experiments_lists_all
else fail test_experiments_lists_all "$missing"; fi

# ---- its own choice of tasks, rows, length ----
x table1 choice --tasks pros_cons,snips_intents --seeds 1 --budget 9 --dry-run -- --fine-tune 7 \
  --fine-epoch 3
says test_experiments_takes_tasks_and_lengths ' --tasks pros_cons,snips_intents --steps 9 ' \
  ' --fine-tune 7 --fine-epoch 3 '
grep -q -e '--fine-tune 4' "$tmp/out" &&
  fail test_experiments_asks_one_length "$(cat "$tmp/out")" || ok test_experiments_asks_one_length
x table6 choice --tasks pros_cons,snips_intents --rows 7,20 --seeds 1 --budget 9 --dry-run
says test_experiments_takes_rows ' --adapt clinc_domains --rows 7,20 '
x table1 choice --tasks pros_cons,nothing && fail test_experiments_refuses_an_unknown_task ||
  ok test_experiments_refuses_an_unknown_task

# ---- every one of them runs ----
for n in $names; do
  if x $n all --seeds 1 --budget 4 -- $small; then ok test_experiments_runs_$n
  else fail test_experiments_runs_$n "$(tail -n 5 "$tmp/out" "$tmp/err")"; fi
  cp "$tmp/out" "$tmp/$n.out"
done
cp "$tmp/calls" "$tmp/first_calls"
shows() { # NAME PATTERN...
  cp "$tmp/$1.out" "$tmp/out"
  n=$1
  shift
  says test_experiments_${n}_has_its_table "$@"
}
number='[0-9.-]*'
shows table1 "^Single tuned  *$number" '^Dense tuned ' '^Switch tuned ' '^TaG tuned ' \
  '^TaG tuned - Switch tuned .*\[.*\] [0-9]*%'
shows table2 '^clinc_domains, never seen, joins (MT-TaG with the gates of snips_intents)' \
  ' [0-9]* rows  *[0-9]* rows$' "^Single-Task  *$number" '^MT-TaG  *[0-9]' \
  '^stand-in: clinc_domains for SciTail' '^stand-in: nothing for IMDB'
shows table3 '^without: MT-Dense  *[0-9]' '^with all: MT-TaG  *[0-9]'
shows table4 '^1x64: Single-Task  *[0-9]' '^4x256: MT-TaG  *[0-9]'
shows table5 '^stand-in: none for IMDB' '^TaG tuned '
shows table6 '^random  *[0-9]' '^mean  *[0-9]' '^query_wellformedness  *[0-9]' \
  '^snips_intents  *[0-9]'
shows table7 '^uniform MT-TaG  *[0-9]' '^natural MT-TaG  *[0-9]' '^uniform-natural MT-TaG  *[0-9]'
shows table8 '^2 experts MT-TaG  *[0-9]' '^6 experts MT-TaG  *[0-9]'
shows table10 '^without query_wellformedness' '^with all tasks' '^TaG tuned '
shows table11 '^1x64' '^4x256' '^TaG tuned '
shows section4 '^straight, one task, x10, stage 2  *[0-9]' \
  '^MLP router, random vectors, learned  *[0-9]' '^instead: transformer  *[0-9]' \
  '^instead: freeze  *[0-9]'
shows section5 '^clinc_domains, never seen, joins' ' 4 rows  *16 rows$' \
  '^random2  *[0-9].* [0-9.]*$' '^straight  *[0-9]'
shows section6 '^No correlations with features: 4 tasks are too few' 'routes.html'
if [ -s "$tmp/all/section6/routes.html" ] && [ -s "$tmp/all/section6/history.csv" ]; then
  ok test_experiments_section6_leaves_files
else
  fail test_experiments_section6_leaves_files
fi
# table 10 and 11 are tables 3 and 4 again: nothing was trained for them
again=$(grep -c -e '--seeds 1 --tidy' "$tmp/first_calls")
if [ "$again" -eq 24 ]; then ok test_experiments_trains_nothing_twice
else fail test_experiments_trains_nothing_twice "$again calls"; fi
: > "$tmp/calls"
x table1 all --seeds 1 --budget 4 -- $small
if ! grep -v -e --report "$tmp/calls" | grep -q . &&
    [ "$(grep tuned "$tmp/out")" = "$(grep tuned "$tmp/table1.out")" ]; then
  ok test_experiments_finished_is_not_run_again
else
  fail test_experiments_finished_is_not_run_again "$(cat "$tmp/calls")"
fi
if ls "$tmp"/all/*/*/*.ckpt > /dev/null 2>&1; then
  fail test_experiments_leaves_no_state "$(ls "$tmp"/all/*/*/*.ckpt)"
else
  ok test_experiments_leaves_no_state
fi

# a number of the summary is that of the runs: the mean of the two seeds, times 100
x table8 seeds --seeds 1,2 --budget 3 -- $small
said=$(awk '$1 == 4 && $2 == "experts" && $3 == "MT-TaG" { sub(/\+-.*/, "", $5); print $5 }' \
  "$tmp/out")
want=$(tr '}' '\n' < "$tmp/seeds/table8/experts-4.json" |
  awk '/"tag-tuned"/ { on = 1 }
    /"all":/ { if (on) { sub(/.*"all": /, ""); s += $1; n++ } on = 0 }
    END { printf "%.1f", 100 * s / n }')
if [ -n "$said" ] && [ "$said" = "$want" ]; then ok test_experiments_summary_is_the_mean
else fail test_experiments_summary_is_the_mean "$said, not $want"; fi

# ---- tasks of the paper are taken where they are there ----
sh $script table2 --data "$tmp/glue" --out "$tmp/g" --seeds 1 --dry-run > "$tmp/out" 2> "$tmp/err"
says test_experiments_takes_the_paper_s_gates '--adapt CB .*--gate-from MNLI' \
  '--adapt YelpPolarity .*--gate-from SST-2' '--systems tag .*--tasks RTE,CoLA,SST-2,MNLI '
sh $script table10 --data "$tmp/glue" --out "$tmp/g" --seeds 1 --dry-run > "$tmp/out" 2> "$tmp/err"
says test_experiments_cleans_glue '--tasks RTE,MNLI ' '--tasks RTE,CoLA,SST-2,MNLI '
sh $script table6 --data "$tmp/glue" --out "$tmp/g" --seeds 7 --dry-run > "$tmp/out" 2> "$tmp/err"
says test_experiments_tries_the_paper_s_gates \
  '--adapt CB .*--seeds 7 --gate-from random,mean,SST-2,CoLA,MNLI,RTE '
if [ ! -e "$tmp/g/table6/calibration.json" ] && [ -z "$(find "$tmp/g" -name result.json)" ]; then
  ok test_experiments_dry_run_runs_nothing
else
  fail test_experiments_dry_run_runs_nothing
fi

# ---- killed at any moment and resumed: the same table ----
kill_options="--seeds 1 --budget 40"
x table8 whole $kill_options -- $small || fail test_experiments_runs_whole "$(cat "$tmp/err")"
grep -e 'experts MT-TaG' -e ' tuned' "$tmp/out" | sed 's/| *[0-9]* *[0-9.]*$//' > "$tmp/whole.out"
state() {
  find "$tmp/killed" -name 'state*' ! -name '*.tmp' ! -name '*.lock' \
    -exec ls -l --time-style=full-iso {} + 2> /dev/null | cksum
}
kills=0 status=137
while [ $status -eq 137 ]; do
  rm -f "$tmp/pid"
  before=$(state)
  sh $script table8 --data "$tmp/own" --out "$tmp/killed" --threads 1 $kill_options -- $small \
    --every 3 > "$tmp/out" 2> "$tmp/err" &
  pid=$!
  tries=0
  while kill -0 $pid 2> /dev/null && { [ $kills -ge 8 ] || [ ! -e "$tmp/pid" ] ||
      [ "$(state)" = "$before" ] || [ $tries -lt $((kills % 4 * 10)) ]; }; do
    sleep 0.03
    tries=$((tries + 1))
  done
  kill -9 $pid 2> /dev/null
  wait $pid 2> /dev/null
  status=$?
  [ $status -eq 137 ] || break
  child=$(cat "$tmp/pid")
  kill -9 "$child" 2> /dev/null
  while kill -0 "$child" 2> /dev/null; do sleep 0.02; done
  kills=$((kills + 1))
done
if [ $kills -ge 1 ] && [ $status -eq 0 ]; then ok test_experiments_is_killed
else fail test_experiments_is_killed "$kills times, status $status: $(tail -n 5 "$tmp/err")"; fi
grep -e 'experts MT-TaG' -e ' tuned' "$tmp/out" | sed 's/| *[0-9]* *[0-9.]*$//' > "$tmp/resumed.out"
if [ -s "$tmp/whole.out" ] && cmp -s "$tmp/whole.out" "$tmp/resumed.out"; then
  ok test_experiments_killed_and_resumed_is_the_same
else
  fail test_experiments_killed_and_resumed_is_the_same "$(diff "$tmp/whole.out" "$tmp/resumed.out")"
fi

# ---- in parts; what is not finished is said ----
x table8 parts --seeds 1 --budget 4 --part 1/2 -- $small
says test_experiments_does_a_part '^1 pieces of the work are not finished' \
  '^2 experts MT-TaG  *[0-9]' '^experts-4: nothing is finished yet'
x table8 parts --seeds 1 --budget 4 --report -- $small
says test_experiments_reports '^1 pieces of the work are not finished'
x table8 parts --seeds 1 --budget 4 --part 2/2 -- $small
cp "$tmp/out" "$tmp/parts.out"
says test_experiments_parts_make_a_whole '^4 experts MT-TaG  *[0-9]' '^6 experts MT-TaG  *[0-9]'

# ---- budgets ----
for b in 20000tokens 0.02Mtokens 0.05min; do
  if x table7 budget-$b --seeds 1 --budget $b --dry-run -- $small &&
      x table7 budget-$b --seeds 1 --budget $b -- $small &&
      grep -q "^$b: first stages of [1-9][0-9]* steps" "$tmp/out"; then
    ok test_experiments_takes_a_budget_of_$b
  else
    fail test_experiments_takes_a_budget_of_$b "$(tail -n 4 "$tmp/out" "$tmp/err")"
  fi
done
if [ "$(cat "$tmp/budget-20000tokens/table7/steps")" = \
    "$(cat "$tmp/budget-0.02Mtokens/table7/steps")" ]; then
  ok test_experiments_tokens_are_tokens
else
  fail test_experiments_tokens_are_tokens
fi

# ---- it compiles what it needs ----
unset MOE_BIN
if CFLAGS=-O0 x table6 compiled --seeds 1 --budget 2 -- $small && [ -x "$tmp/compiled/train" ] &&
    grep -q '^mean  *[0-9]' "$tmp/out"; then ok test_experiments_compiles_its_programs
else fail test_experiments_compiles_its_programs "$(cat "$tmp/err")"; fi
MOE_BIN=$tmp/bin
export MOE_BIN

# ---- bad input ----
refuses() { # NAME PATTERN ARGUMENTS...
  name=test_experiments_refuses_$1 pattern=$2
  shift 2
  sh $script "$@" > "$tmp/out" 2> "$tmp/err"
  status=$?
  if [ $status -eq 1 ] && grep -q -e "$pattern" "$tmp/err"; then ok $name
  else fail $name "status $status: $(cat "$tmp/err")"; fi
}
refuses an_unknown_name 'there is no experiment "table9"; --list' table9
refuses part_of_a_name 'there is no experiment "table"; --list' table
refuses two_names 'two names, table1 and table2' table1 table2
refuses an_unknown_option 'unknown option --fast' table1 --fast
refuses a_missing_value '--budget needs a value' table1 --budget
refuses a_bad_budget '--budget is a number of steps.*"soon"' table1 --budget soon
refuses a_bad_part '--part is I/N.*"3/2"' table1 --part 3/2
refuses bad_seeds '--seeds is a list of numbers' table1 --seeds one
refuses no_data 'there is no .*none/tasks.tsv' table1 --data "$tmp/none"
refuses no_weights '--init: there is no none.safetensors' table1 --init none.safetensors
refuses several_weights 'only table4 and table11' table1 \
  --init "$tmp/own/vocab.txt,$tmp/own/vocab.txt"
refuses other_options 'was begun with other options' table8 --data "$tmp/own" --out "$tmp/parts" \
  --seeds 1 --budget 5 --threads 1 -- $small
refuses what_train_refuses 'ended with status 1; the command was' table8 --data "$tmp/own" \
  --out "$tmp/bad" --seeds 1 --budget 5 -- --heads 3 --hidden 16
if [ ! -e "$tmp/bad/table8/experts-2-tag-1/command" ]; then
  ok test_experiments_forgets_what_never_began
else
  fail test_experiments_forgets_what_never_began
fi
finish
