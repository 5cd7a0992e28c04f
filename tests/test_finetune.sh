#!/bin/sh
# The second stage of train.c: fine-tuning after a first stage or from a model, the grid, a task that joins; and what it says to bad input.
. ./lib.sh
CC=${CC:-cc}
if ! $CC -std=c99 -D_POSIX_C_SOURCE=200809L -O2 -o "$tmp/train" ../examples/train.c -lm -pthread; then fail test_finetune_compiles; finish; fi
data=../examples/data
train() { "$tmp/train" --data $data --max-len 24 --threads 1 "$@" > "$tmp/out" 2> "$tmp/err"; }
value() { tr '{' '\n' < "$1" | sed -n "s/.*\"name\": \"$2\".*\"value\": \([-0-9.e]*\), \"n\".*/\1/p" | sed -n "$3p"; }
small="--layers 1 --hidden 32 --ffn 64 --heads 2"

if train $small --tasks query_wellformedness,snips_intents --systems tag,embed --rank 3 --gate-lr 5 --steps 60 --lr 3e-3 --fine-tune 4 --hold-out 0.2 --seeds 1,2 \
   --save "$tmp/m.safetensors" --json "$tmp/run.json"; then ok test_finetune_runs; else fail test_finetune_runs "$(tail -n 3 "$tmp/err")"; finish; fi
if [ "$(grep -c '"system": "tag-tuned"' "$tmp/run.json")" -eq 2 ] && grep -q '^TaG tuned .*+-' "$tmp/out" && grep -q '^  maximum' "$tmp/out"
then ok test_finetune_shows_both_stages; else fail test_finetune_shows_both_stages "$(grep TaG "$tmp/out")"; fi
if [ "$(awk '/^Task vectors/ { getline; if (NF == 4) ++n } END { print n }' "$tmp/out")" = 2 ]; then ok test_finetune_writes_the_task_vectors; else fail test_finetune_writes_the_task_vectors; fi
files=$(ls "$tmp" | grep -c '^m-.*safetensors')
if [ "$files" -eq 12 ]; then ok test_finetune_saves_a_model_of_each_task; else fail test_finetune_saves_a_model_of_each_task "$files files"; fi

# the second stage of a saved model is that of the run that made it
train --tasks query_wellformedness,snips_intents --from "$tmp/m-tag-2.safetensors" --seeds 2 --gate-lr 5 --lr 3e-3 --fine-tune 4 --hold-out 0.2 --json "$tmp/from.json"
a=$(value "$tmp/run.json" snips_intents 4) b=$(value "$tmp/from.json" snips_intents 1)
if [ -n "$a" ] && [ "$a" = "$b" ]; then ok test_finetune_from_a_file_is_the_same; else fail test_finetune_from_a_file_is_the_same "$a against $b: $(cat "$tmp/err")"; fi
train --tasks snips_intents --from "$tmp/m-embed-1.safetensors" --grid 1e-3,3e-3:0.1,0.3 --fine-tune 1 --json "$tmp/grid.json"
best=$(sed -n 's/.*: \([0-9.]*\) to choose by.*/\1/p' "$tmp/out" | sort -n | tail -n 1)
if [ "$(grep -c 'to choose by' "$tmp/out")" -eq 4 ] && [ "$(value "$tmp/grid.json" snips_intents 1 | awk -v b="$best" '{ d = $1 - b; print (d < 1e-4 && d > -1e-4) }')" = 1 ]
then ok test_finetune_grid_keeps_the_best; else fail test_finetune_grid_keeps_the_best "$(cat "$tmp/err" "$tmp/out")"; fi

# a task that joins: a line for each gate and number of rows; it learns; the same again gives the same
adapt="--from $tmp/m-tag-1.safetensors --adapt clinc_domains --gate-from snips_intents,random,mean --rows 40,100% --fine-tune 12 --lr 1e-2"
train $adapt --json "$tmp/a.json" --save "$tmp/joined.safetensors"
if [ "$(grep -c '+-' "$tmp/out")" -eq 6 ] && [ "$(awk '$1 == "mean" && $2 > 40 { print ($3 > 20) }' "$tmp/out")" = 1 ]; then ok test_finetune_a_task_joins_and_learns; else fail test_finetune_a_task_joins_and_learns "$(cat "$tmp/err" "$tmp/out")"; fi
train $adapt --json "$tmp/b.json"
if [ -s "$tmp/a.json" ] && cmp -s "$tmp/a.json" "$tmp/b.json"; then ok test_finetune_again_is_the_same; else fail test_finetune_again_is_the_same; fi
if [ -s "$tmp/joined-mean-40-1.safetensors" ]; then ok test_finetune_saves_what_joined; else fail test_finetune_saves_what_joined "$(ls "$tmp")"; fi
train --from "$tmp/m-tag-1.safetensors" --adapt balanced_copa --rows 21 --fine-tune 1
if grep -q '^random *21 ' "$tmp/out"; then ok test_finetune_keeps_questions_whole; else fail test_finetune_keeps_questions_whole "$(cat "$tmp/err")"; fi

refuses() { # NAME PATTERN OPTIONS
  name=$1 pattern=$2; shift 2
  train "$@"
  status=$?
  if [ $status -eq 1 ] && grep -q -- "$pattern" "$tmp/err"; then ok test_finetune_refuses_$name; else fail test_finetune_refuses_$name "status $status: $(cat "$tmp/err")"; fi
}
m="--from $tmp/m-tag-1.safetensors"
refuses a_known_task 'knows the task snips_intents already' $m --adapt snips_intents
refuses an_unknown_task 'does not know the task clinc_domains: --tasks chooses others' $m --tasks clinc_domains
refuses a_gate_of_no_task '"mrpc" is neither random nor mean nor a task of' $m --adapt clinc_domains --gate-from random,mrpc
refuses no_rows '"0" is neither a number from 1 to' $m --adapt clinc_domains --rows 0
refuses too_many_rows '"200%" is neither' $m --adapt clinc_domains --rows 200%
refuses adapt_without_a_model '\--adapt needs --from' --adapt clinc_domains
refuses a_grid_without_a_stage '\--grid tries rates and warm-ups in the second stage' --grid 1e-3
refuses a_bad_grid '\--grid takes a number' $m --tasks snips_intents --grid 1e-3,fast
refuses a_foreign_file 'test_finetune.sh' --from test_finetune.sh --adapt clinc_domains
train $small --tasks snips_intents,query_wellformedness --systems switch --steps 2 --save "$tmp/shared.safetensors"
refuses a_gate_of_a_shared_router 'one gate for all tasks' --from "$tmp/shared.safetensors" --adapt clinc_domains --gate-from mean
finish
