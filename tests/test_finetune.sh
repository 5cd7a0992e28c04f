#!/bin/sh
# The second stage of train.c: fine-tuning after a first stage or from a model, the grid, a task
# that joins; and what it says to bad input.
. ./lib.sh
program train || { fail test_finetune_compiles; finish; }
data=../examples/data
train() { "$tmp/train" --data $data --max-len 24 --threads 1 "$@" > "$tmp/out" 2> "$tmp/err"; }
value() {
  tr '{' '\n' < "$1" |
    sed -n "s/.*\"name\": \"$2\".*\"value\": \([-0-9.e]*\), \"n\".*/\1/p" | sed -n "$3p"
}
small="--layers 1 --hidden 32 --ffn 64 --heads 2 --from-scratch"

if train $small --tasks query_wellformedness,snips_intents --systems tag,embed --rank 3 \
    --gate-lr 5 --steps 60 --lr 3e-3 --fine-tune 4 --hold-out 0.2 --seeds 1,2 \
   --save "$tmp/m.safetensors" --json "$tmp/run.json"; then ok test_finetune_runs;
   else fail test_finetune_runs "$(tail -n 3 "$tmp/err")"; finish; fi
if [ "$(grep -c '"system": "tag-tuned"' "$tmp/run.json")" -eq 2 ] &&
    grep -q '^TaG tuned .*+-' "$tmp/out" && grep -q '^  maximum' "$tmp/out"
then ok test_finetune_shows_both_stages
else fail test_finetune_shows_both_stages "$(grep TaG "$tmp/out")"; fi
if [ "$(awk '/^Task vectors/ { getline; if (NF == 4) ++n } END { print n }' "$tmp/out")" = 2 ]; then
  ok test_finetune_writes_the_task_vectors
else
  fail test_finetune_writes_the_task_vectors
fi
files=$(ls "$tmp" | grep -c '^m-.*safetensors')
if [ "$files" -eq 12 ]; then ok test_finetune_saves_a_model_of_each_task
else fail test_finetune_saves_a_model_of_each_task "$files files"; fi

# the second stage of a saved model is that of the run that made it
train --tasks query_wellformedness,snips_intents --from "$tmp/m-tag-2.safetensors" --seeds 2 \
  --gate-lr 5 --lr 3e-3 --fine-tune 4 --hold-out 0.2 --json "$tmp/from.json"
a=$(value "$tmp/run.json" snips_intents 4) b=$(value "$tmp/from.json" snips_intents 1)
if [ -n "$a" ] && [ "$a" = "$b" ]; then ok test_finetune_from_a_file_is_the_same
else fail test_finetune_from_a_file_is_the_same "$a against $b: $(cat "$tmp/err")"; fi
train --tasks snips_intents --from "$tmp/m-embed-1.safetensors" --grid 1e-3,3e-3:0.1,0.3 \
  --fine-tune 1 --json "$tmp/grid.json"
best=$(sed -n 's/.*: \([0-9.]*\) to choose by.*/\1/p' "$tmp/out" | sort -n | tail -n 1)
if [ "$(grep -c 'to choose by' "$tmp/out")" -eq 4 ] &&
    [ "$(value "$tmp/grid.json" snips_intents 1 |
    awk -v b="$best" '{ d = $1 - b; print (d < 1e-4 && d > -1e-4) }')" = 1 ]
then ok test_finetune_grid_keeps_the_best
else fail test_finetune_grid_keeps_the_best "$(cat "$tmp/err" "$tmp/out")"; fi

# a task that joins: a line for each gate and number of rows; it learns; the same again gives the
# same
adapt="--from $tmp/m-tag-1.safetensors --adapt clinc_domains --gate-from snips_intents,random,mean"
adapt="$adapt --rows 40,100% --fine-tune 12 --lr 1e-2"
train $adapt --json "$tmp/a.json" --save "$tmp/joined.safetensors"
if [ "$(grep -c '+-' "$tmp/out")" -eq 6 ] &&
    [ "$(awk '$1 == "mean" && $2 > 40 { print ($3 > 20) }' "$tmp/out")" = 1 ]; then
  ok test_finetune_a_task_joins_and_learns
else
  fail test_finetune_a_task_joins_and_learns "$(cat "$tmp/err" "$tmp/out")"
fi
train $adapt --json "$tmp/b.json"
if [ -s "$tmp/a.json" ] && cmp -s "$tmp/a.json" "$tmp/b.json"; then
  ok test_finetune_again_is_the_same
else
  fail test_finetune_again_is_the_same
fi
if [ -s "$tmp/joined-mean-40-1.safetensors" ]; then ok test_finetune_saves_what_joined
else fail test_finetune_saves_what_joined "$(ls "$tmp")"; fi
train --from "$tmp/m-tag-1.safetensors" --adapt balanced_copa --rows 21 --fine-tune 1
if grep -q '^random *21 ' "$tmp/out"; then ok test_finetune_keeps_questions_whole
else fail test_finetune_keeps_questions_whole "$(cat "$tmp/err")"; fi

# without a model to join: the Single-Task model on the same rows
train $small --adapt clinc_domains --rows 40 --fine-tune 1
if grep -q '^random *40 ' "$tmp/out" && grep -q '^Single-Task  *rows' "$tmp/out"; then
  ok test_finetune_single_task_on_few_rows
else
  fail test_finetune_single_task_on_few_rows "$(cat "$tmp/err" "$tmp/out")"
fi

# ---- both stages killed at any moment and resumed: the same models, the same table, and no part
# twice ----
both="$small --tasks query_wellformedness,snips_intents --systems single,tag --steps 24 --lr 3e-3"
both="$both --fine-tune 2 --fine-epoch 9 --grid 3e-3,1e-2 --hold-out 0.2"
train $both --save "$tmp/w.safetensors" || fail test_finetune_runs_both_stages "$(cat "$tmp/err")"
sed '/parameters/,$!d; s/ *[0-9.]*$//' "$tmp/out" > "$tmp/whole.out"
kills=0 resume= before=none
while [ $kills -lt 60 ]; do
  "$tmp/train" --data $data --max-len 24 --threads 1 $both --checkpoint "$tmp/k.safetensors" \
    --every 2 --save "$tmp/r.safetensors" $resume > "$tmp/out" 2> "$tmp/err" &
  pid=$!
  state() { ls -lt --time-style=full-iso "$tmp"/k*.safetensors "$tmp"/k*.results 2> /dev/null |
    cksum; }
  before=$(state) tries=0
  while kill -0 $pid 2> /dev/null && { [ "$(state)" = "$before" ] ||
      [ $tries -lt $((kills % 5 * 8)) ]; }; do
    sleep 0.02; tries=$((tries + 1))
  done
  kill -9 $pid 2> /dev/null
  wait $pid 2> /dev/null
  [ $? -eq 137 ] || break
  kills=$((kills + 1))
  [ ! -e "$tmp/k.safetensors.results" ] && [ ! -e "$tmp/k-tuning.safetensors" ] ||
    resume="--resume $tmp/k.safetensors"
done
if [ $kills -ge 1 ] && [ $kills -lt 60 ]; then ok test_finetune_is_killed
else fail test_finetune_is_killed "$kills times: $(cat "$tmp/err")"; fi
bad=
for f in single-tuned-1-query_wellformedness single-tuned-1-snips_intents tag-1 \
  tag-tuned-1-query_wellformedness tag-tuned-1-snips_intents; do
  cmp -s "$tmp/w-$f.safetensors" "$tmp/r-$f.safetensors" || bad="$bad $f"
done
if [ -z "$bad" ]; then ok test_finetune_killed_and_resumed_has_the_same_bits
else fail test_finetune_killed_and_resumed_has_the_same_bits "differ:$bad"; fi
sed '/parameters/,$!d; s/ *[0-9.]*$//' "$tmp/out" > "$tmp/resumed.out"
if cmp -s "$tmp/whole.out" "$tmp/resumed.out"; then
  ok test_finetune_killed_and_resumed_has_the_same_table
else
  fail test_finetune_killed_and_resumed_has_the_same_table \
    "$(diff "$tmp/whole.out" "$tmp/resumed.out")"
fi
twice=$(cut -f 1 "$tmp/k.safetensors.results" | sort | uniq -d)
if [ -z "$twice" ] && [ "$(wc -l < "$tmp/k.safetensors.results")" -eq 11 ]; then
  ok test_finetune_keeps_each_part_once
else
  fail test_finetune_keeps_each_part_once "$twice"
fi
if [ ! -e "$tmp/k-tuning.safetensors" ]; then ok test_finetune_removes_the_state_of_finished_parts
else fail test_finetune_removes_the_state_of_finished_parts; fi

# what is finished is shown without training; several files behind each other are one; other options
# are not mixed
train $both --resume "$tmp/k.safetensors" --report
if cmp -s "$tmp/whole.out" - << END
$(sed '/parameters/,$!d; s/ *[0-9.]*$//' "$tmp/out")
END
then ok test_finetune_reports; else fail test_finetune_reports "$(cat "$tmp/err" "$tmp/out")"; fi
{ head -n 1 "$tmp/k.safetensors.results"; grep '^single' "$tmp/k.safetensors.results";
  head -n 1 "$tmp/k.safetensors.results"; } > "$tmp/half.safetensors.results"
train $both --resume "$tmp/half.safetensors" --report
if grep -q '^TaG tuned  *-  *- ' "$tmp/out" && grep -q '^Single tuned  *[0-9]' "$tmp/out"; then
  ok test_finetune_reports_what_is_missing
else
  fail test_finetune_reports_what_is_missing "$(cat "$tmp/err" "$tmp/out")"
fi

# Ctrl-C in the second stage, with no checkpoint asked for: the line that it prints goes on
mkdir "$tmp/here"
cp "$tmp/train" "$tmp/here"
(
  cd "$tmp/here" || exit
  again=0 status=0
  # a fast machine may be through before the signal comes
  while [ $status -ne 130 ] && [ $again -lt 5 ]; do
    rm -f s*.safetensors
    ./train --data "$OLDPWD/$data" --max-len 24 --threads 1 $both --save s.safetensors \
      > out 2> err &
    pid=$! tries=0
    until [ -e s-tag-1.safetensors ] || [ $tries -ge 4000 ]; do
      sleep 0.01; tries=$((tries + 1))
    done
    kill -INT $pid
    wait $pid
    status=$? again=$((again + 1))
  done
  echo $status > status
  eval "$(grep -e ' --resume ' err)" > out 2> err
)
if [ "$(cat "$tmp/here/status")" = 130 ] &&
    cmp -s "$tmp/w-tag-tuned-1-snips_intents.safetensors" \
    "$tmp/here/s-tag-tuned-1-snips_intents.safetensors"
then ok test_finetune_interrupted_goes_on
else fail test_finetune_interrupted_goes_on "$(cat "$tmp/here/status" "$tmp/here/err")"; fi

# --adapt is resumable as well; --tidy leaves no state; --keep leaves models on the way
train $adapt --checkpoint "$tmp/ad.safetensors" --json "$tmp/ad.json"
head -n 3 "$tmp/ad.safetensors.results" > "$tmp/ad2.safetensors.results"
train $adapt --resume "$tmp/ad2.safetensors" --json "$tmp/ad2.json"
if cmp -s "$tmp/ad.json" "$tmp/ad2.json" && cmp -s "$tmp/ad.json" "$tmp/a.json" &&
    [ "$(grep -c 'rows, seed 1' "$tmp/err")" -eq 4 ]
then ok test_finetune_adapt_goes_on; else fail test_finetune_adapt_goes_on "$(cat "$tmp/err")"; fi
train $small --tasks snips_intents --systems tag --steps 20 --fine-tune 1 \
  --checkpoint "$tmp/tidy.safetensors" --tidy --keep 4
models=$(for step in 10 15 20 5; do echo tidy-tag-1-step$step.safetensors; done)
if [ "$(ls "$tmp" | grep '^tidy')" = "$models
tidy.safetensors.results" ]
then ok test_finetune_is_tidy_and_keeps_models
else fail test_finetune_is_tidy_and_keeps_models "$(ls "$tmp" | grep '^tidy')"; fi

# ---- numbers that can be worked out by hand ---- the comparison: the shares and the interval that
# the same resampling gives elsewhere are between bounds; equal systems do not differ
train $small --tasks snips_intents --systems dense,switch --experts 1 --gate-scale paper --steps 3 \
  --fine-tune 1 --json "$tmp/equal.json"
if grep -q '^MT-Switch - MT-Dense *+0.0  50% |  +0.0 \[+0.0, +0.0\] 50%' "$tmp/out"; then
  ok test_finetune_equal_systems_do_not_differ
else
  fail test_finetune_equal_systems_do_not_differ "$(grep -e ' - ' "$tmp/out")"
fi
train $small --tasks query_wellformedness,snips_intents --systems dense,tag --steps 30 --lr 3e-3 \
  --json "$tmp/pairs.json" --predictions "$tmp/p.tsv" --resamples 2000
# two standard errors of the mean difference of right answers, from the predictions
said=$(paste "$tmp/p-dense-1.tsv" "$tmp/p-tag-1.tsv" |
  awk -F'\t' '$1 == "snips_intents" { d = ($10 == $11) - ($4 == $5); n++; s += d; q += d * d }
    END { m = s / n; print m, sqrt((q / n - m * m) / n) }')
number='\([-0-9.e]*\)'
if tr '{' '\n' < "$tmp/pairs.json" |
    sed -n 's/.*"snips_intents", "difference": '$number', "low": '$number', "high": '$number',.*/'\
'\1 \2 \3/p' |
    awk -v said="$said" '{
      split(said, a, " ")
      e = ($3 - $2) / (2 * 1.96)
      print ($1 - a[1])^2 < 1e-12 && (e - a[2])^2 < (0.15 * a[2] + 1e-9)^2
    }' | grep -q 1
then
  ok test_finetune_interval_is_that_of_the_standard_error
else
  fail test_finetune_interval_is_that_of_the_standard_error "$said; $(grep snips "$tmp/pairs.json")"
fi
# --hold-most: about 100 of the 1050 rows are held out, not half of them
train $small --tasks snips_intents --systems dense --steps 1 --hold-out 0.5 --hold-most 100
n=$(awk '/^train/ { split($3, a, "/"); print a[1] }' "$tmp/out")
if [ "$n" -gt 920 ] && [ "$n" -lt 980 ]; then ok test_finetune_holds_no_more_out
else fail test_finetune_holds_no_more_out "$n rows are left: $(cat "$tmp/err")"; fi
# chance: F1 of "always 1" where a third is 1; no task small
mkdir "$tmp/f" "$tmp/f/t"
cp $data/vocab.txt "$tmp/f"
printf 'name\tinput\tkind\tlabels\tmetric\trows\nt\tsingle\tclassification\t0=a,1=b\tf1\t20000\n' \
  > "$tmp/f/tasks.tsv"
printf 'label\tsentence1\n0\ta\n0\tb\n1\tc\n' | tee "$tmp/f/t/train.tsv" > "$tmp/f/t/dev.tsv"
train $small --data "$tmp/f" --systems dense --steps 1 --json "$tmp/f.json"
# p = 1/3: F1 = 2 p / (1 + p) = 0.5, error 2 / (1 + p)^2 sqrt(p (1 - p) / 3) = 0.306
if grep -q '^chance + 2 se *111.2 |' "$tmp/out"; then ok test_finetune_chance_of_f1
else fail test_finetune_chance_of_f1 "$(grep chance "$tmp/out")"; fi
if grep -q '^MT-Dense .* | *- ' "$tmp/out" && grep -q '"small": null' "$tmp/f.json"; then
  ok test_finetune_no_task_is_small
else
  fail test_finetune_no_task_is_small "$(grep MT-Dense "$tmp/out")"
fi

refuses() { # NAME PATTERN OPTIONS
  name=$1 pattern=$2; shift 2
  train "$@"
  status=$?
  if [ $status -eq 1 ] && grep -q -- "$pattern" "$tmp/err"; then ok test_finetune_refuses_$name
  else fail test_finetune_refuses_$name "status $status: $(cat "$tmp/err")"; fi
}
m="--from $tmp/m-tag-1.safetensors"
refuses a_known_task 'knows the task snips_intents already' $m --adapt snips_intents
refuses an_unknown_task 'does not know the task clinc_domains: --tasks chooses others' $m \
  --tasks clinc_domains
refuses a_gate_of_no_task '"mrpc" is neither random nor mean nor a task of' $m \
  --adapt clinc_domains --gate-from random,mrpc
refuses no_rows '"0" is neither a number from 1 to' $m --adapt clinc_domains --rows 0
refuses too_many_rows '"200%" is neither' $m --adapt clinc_domains --rows 200%
refuses a_gate_without_a_model 'without --from there is no model to take the gates of "mean" from' \
  --adapt clinc_domains --gate-from random,mean
refuses a_grid_without_a_stage '\--grid tries rates and warm-ups in the second stage' --grid 1e-3
refuses a_bad_grid '\--grid takes a number' $m --tasks snips_intents --grid 1e-3,fast
refuses results_of_other_options 'k.safetensors was made with other options' $both \
  --resume "$tmp/k.safetensors" --dropout 0.2
tab=$(printf '\t')
sed "s/ [-0-9.e]*\($tab[^$tab]*\)\$/\1/" "$tmp/k.safetensors.results" \
  > "$tmp/short.safetensors.results"
head -n 1 "$tmp/k.safetensors.results" | cat - "$tmp/short.safetensors.results" |
  sed 2d > "$tmp/x" && mv "$tmp/x" "$tmp/short.safetensors.results"
refuses damaged_results 'short.safetensors.results:2: expected 300 numbers' $both \
  --resume "$tmp/short.safetensors"
refuses a_report_of_nothing '--report shows what --resume' $both --report
refuses keep_without_a_name '--keep makes its names' $both --keep 2
refuses a_foreign_file 'test_finetune.sh' --from test_finetune.sh --adapt clinc_domains
train $small --tasks snips_intents,query_wellformedness --systems switch --steps 2 \
  --save "$tmp/shared.safetensors"
refuses a_gate_of_a_shared_router 'one gate for all tasks' --from "$tmp/shared.safetensors" \
  --adapt clinc_domains --gate-from mean
finish
