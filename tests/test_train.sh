#!/bin/sh
# examples/train.c as a program: the same bits whatever runs it, killed and resumed, its files and
# its table. Three tiny tasks, odd sizes.
. ./lib.sh
for p in train predict; do program $p || { fail test_train_compiles; finish; }; done
ok test_train_compiles

# a pair task, a regression and a classification with a second dev set, cut from the bundled ones
data=$tmp/data from=../examples/data
mkdir "$data"
cp $from/vocab.txt "$data"
grep -E '^(name|snips_intents|intent_match|query_wellformedness)	' $from/tasks.tsv \
  > "$data/tasks.tsv"
for t in snips_intents intent_match query_wellformedness; do
  mkdir "$data/$t"
  rows=120
  [ $t = intent_match ] && rows=50
  head -n $rows $from/$t/train.tsv > "$data/$t/train.tsv"
  head -n 61 $from/$t/dev.tsv > "$data/$t/dev.tsv"
done
{ head -n 1 $from/snips_intents/dev.tsv; tail -n 40 $from/snips_intents/dev.tsv;
  } > "$data/snips_intents/dev_2.tsv"

tiny="--data $data --layers 2 --hidden 36 --heads 2 --ffn 50 --experts 3 --max-len 40 --batch 12"
tiny="$tiny --steps 14 --lr 2e-3"
small="$tiny --from-scratch"
train() { "$tmp/train" $small "$@" > "$tmp/out" 2> "$tmp/err"; }
sum() { [ ! -e "$1" ] || cksum < "$1"; }
same() { # NAME FILE FILE
  if [ -s "$2" ] && cmp -s "$2" "$3"; then ok "$1"
  else fail "$1" "$(sum "$2") and $(sum "$3"): $(tail -n 2 "$tmp/err")"; fi
}
says() { # NAME FILE PATTERN
  if grep -q -e "$3" "$2"; then ok "$1"; else fail "$1" "no \"$3\" in: $(tail -n 4 "$2")"; fi
}

# ---- one definition of every result ----
one="--systems tag --top-k 2 --threads 2"
if train $one --save "$tmp/base.safetensors" --json "$tmp/base.json"; then ok test_train_runs
else fail test_train_runs "$(cat "$tmp/err")"; finish; fi
cp "$tmp/err" "$tmp/base.err"
cp "$tmp/out" "$tmp/base.out"
for isa in avx512 avx2 neon scalar; do
  name=test_train_has_the_same_bits_with_$isa
  if train $one --isa $isa --save "$tmp/isa.safetensors"; then same $name "$tmp/base.safetensors" \
      "$tmp/isa.safetensors"
  elif grep -q 'has no' "$tmp/err"; then
    if [ $isa = neon ] && [ "$(uname -m)" = x86_64 ]; then ok test_train_says_that_there_is_no_neon
    else skip $name "this machine has no $isa"; fi
  else fail $name "$(cat "$tmp/err")"; fi
  rm -f "$tmp/isa.safetensors"
done
# ---- bf16: bits of its own, the same for any number of threads; a machine without the units says
# so and goes on in fp32 ----
train $one --precision bf16 --threads 1 --save "$tmp/bf16.safetensors" &&
  train $one --precision bf16 --threads 3 --save "$tmp/bf16b.safetensors"
same test_train_in_bf16_has_the_same_bits_with_any_threads "$tmp/bf16.safetensors" \
  "$tmp/bf16b.safetensors"
if grep -q 'stay fp32' "$tmp/err"; then same test_train_without_bf16_units_goes_on_in_fp32 \
    "$tmp/base.safetensors" "$tmp/bf16.safetensors"
elif cmp -s "$tmp/base.safetensors" "$tmp/bf16.safetensors"; then fail test_train_in_bf16_says_so \
    "the bits are those of fp32"
else says test_train_in_bf16_says_so "$tmp/out" ', bf16'; fi
train $one --precision bf16 --isa scalar --save "$tmp/bf16.safetensors"
says test_train_in_bf16_on_scalar_says_fp32 "$tmp/err" 'stay fp32'
same test_train_in_bf16_on_scalar_is_fp32 "$tmp/base.safetensors" "$tmp/bf16.safetensors"
if train $one --precision fp16; then fail test_train_knows_two_precisions
else says test_train_knows_two_precisions "$tmp/err" 'fp32|bf16'; fi
rm -f "$tmp"/bf16*.safetensors
for n in 1 3 8; do
  train $one --threads $n --save "$tmp/threads.safetensors"
  same test_train_has_the_same_bits_with_${n}_threads "$tmp/base.safetensors" \
    "$tmp/threads.safetensors"
done
for n in 40 100 100000; do # the longest input alone; several micro-batches; one
  train $one --micro-batch $n --save "$tmp/micro.safetensors"
  same test_train_has_the_same_bits_with_micro_batches_of_$n "$tmp/base.safetensors" \
    "$tmp/micro.safetensors"
  said=$(sed 's/.*\(loss [0-9.]*\).*/\1/' "$tmp/err")
  if [ "$said" = "$(sed 's/.*\(loss [0-9.]*\).*/\1/' "$tmp/base.err")" ]; then ok \
      test_train_has_the_same_loss_with_micro_batches_of_$n
  else fail test_train_has_the_same_loss_with_micro_batches_of_$n "$said"; fi
done
compiled() { # COMPILER OPTIONS
  name=test_train_has_the_same_bits_by_$(echo "$*" | tr ' =' __) c=$1
  shift
  if ! have $c; then skip $name "there is no $c here"; return; fi
  if ! $c "$@" -o "$tmp/other" ../examples/train.c -lm -pthread 2> "$tmp/err"; then
    fail $name "$(head -n 5 "$tmp/err")"; return
  fi
  "$tmp/other" $small $one --save "$tmp/compiler.safetensors" > /dev/null 2> "$tmp/err"
  same $name "$tmp/base.safetensors" "$tmp/compiler.safetensors"
}
compiled gcc -O3 -march=native
compiled clang -O2 -march=native
train $one --seeds 2 --save "$tmp/seed.safetensors"
if cmp -s "$tmp/base.safetensors" "$tmp/seed.safetensors"; then fail test_train_seeds_differ
else ok test_train_seeds_differ; fi

# ---- killed at any moment and resumed ---- enough steps for several kills; --hold-out keeps the
# best epoch's weights, which must survive as well
long="--systems tag --threads 2 --steps 150 --hold-out 0.2"
train $long --save "$tmp/whole.safetensors" || fail test_train_holds_out "$(cat "$tmp/err")"
start() { "$tmp/train" $small $long --checkpoint "$tmp/state.safetensors" --every 1 \
  --save "$tmp/resumed.safetensors" "$@" > /dev/null 2> "$tmp/err" & }
kills=0 resume=
while [ $kills -lt 3 ]; do
  before=$(sum "$tmp/state.safetensors")
  start $resume
  pid=$!
  while kill -0 $pid 2> /dev/null && [ "$(sum "$tmp/state.safetensors")" = "$before" ]; do
    sleep 0.02
  done
  sleep 0.1
  kill -9 $pid 2> /dev/null
  wait $pid 2> /dev/null
  [ $? -eq 137 ] || break
  kills=$((kills + 1)) resume="--resume $tmp/state.safetensors"
done
if [ $kills -eq 3 ]; then ok test_train_is_killed_three_times
else fail test_train_is_killed_three_times "$kills times: $(cat "$tmp/err")"; fi
# a second run on the checkpoint of one that is still running is refused, and costs it nothing
rm -f "$tmp/state.safetensors.lock" # of the one that was killed
start $resume
pid=$!
i=0
until [ -e "$tmp/state.safetensors.lock" ] || [ $i -ge 200 ]; do i=$((i + 1)); sleep 0.02; done
if "$tmp/train" $small $long --checkpoint "$tmp/state.safetensors" > /dev/null 2> "$tmp/second"
then fail test_train_refuses_a_second_run_on_a_checkpoint "it ran"
else says test_train_refuses_a_second_run_on_a_checkpoint "$tmp/second" \
  'state.safetensors: another program works on it; if none does, remove .*safetensors.lock'; fi
wait $pid
if [ -e "$tmp/state.safetensors.lock" ]; then fail test_train_gives_its_lock_back
else ok test_train_gives_its_lock_back; fi
says test_train_goes_on_from_its_checkpoint \
  "$tmp/err" 'going on from .*state.safetensors at step [1-9]'
same test_train_killed_and_resumed_has_the_same_bits "$tmp/whole.safetensors" \
  "$tmp/resumed.safetensors"
rm -f "$tmp/resumed.safetensors"
start $resume # from its last step: nothing is left to train, and the model is the same
wait $!
same test_train_resumed_at_the_end_has_the_same_bits "$tmp/whole.safetensors" \
  "$tmp/resumed.safetensors"

# Ctrl-C: the step ends, the state is written, and the line that it prints goes on; a folder with a
# blank in its name
mkdir "$tmp/a b"
rm -f "$tmp/resumed.safetensors"
"$tmp/train" $small $long --checkpoint "$tmp/a b/state.safetensors" --every 5 \
  --save "$tmp/resumed.safetensors" > /dev/null 2> "$tmp/err" &
pid=$!
tries=0
# it is training
until [ -e "$tmp/a b/state.safetensors" ] || [ $tries -ge 500 ]; do
  sleep 0.02; tries=$((tries + 1))
done
kill -INT $pid
wait $pid
status=$?
if [ $status -eq 130 ] && [ ! -e "$tmp/resumed.safetensors" ]; then
  ok test_train_interrupted_ends_with_130
else
  fail test_train_interrupted_ends_with_130 "status $status: $(cat "$tmp/err")"
fi
says test_train_interrupted_says_where_the_state_is \
  "$tmp/err" 'interrupted after step [0-9]*; the state is in .*a b/state.safetensors'
command=$(grep -e ' --resume ' "$tmp/err")
eval "$command" > /dev/null 2> "$tmp/err"
same test_train_goes_on_with_the_line_that_it_printed "$tmp/whole.safetensors" \
  "$tmp/resumed.safetensors"
train $long --resume "$tmp/a b/state.safetensors" --lr 1e-3
if [ $? -eq 1 ] && grep -q 'made with other options' "$tmp/err"; then
  ok test_train_resumes_with_the_same_options_only
else
  fail test_train_resumes_with_the_same_options_only "$(cat "$tmp/err")"
fi
# finished, then with another vocabulary of as many words
cp -r "$data" "$tmp/words"
train $one --data "$tmp/words" --checkpoint "$tmp/words.safetensors"
sed 's/^music$/musik/' "$data/vocab.txt" > "$tmp/words/vocab.txt"
if train $one --data "$tmp/words" --resume "$tmp/words.safetensors"; then
  fail test_train_resumes_with_the_same_vocabulary_only "it did not fail"
elif grep -q 'made with other options: words there' "$tmp/err"; then
  ok test_train_resumes_with_the_same_vocabulary_only
else fail test_train_resumes_with_the_same_vocabulary_only "$(tail -n 2 "$tmp/err")"; fi

# ---- several runs, and what they leave ----
several="--systems single,dense,switch,tag --seeds 1,2 --threads 2 --steps 6"
train $several --save "$tmp/m.safetensors" --checkpoint "$tmp/c.safetensors" \
  --json "$tmp/several.json" || fail test_train_runs_all_systems "$(cat "$tmp/err")"
cp "$tmp/out" "$tmp/several.out"
missing=
for f in m c; do
  for seed in 1 2; do
    for s in dense-$seed switch-$seed tag-$seed single-$seed-snips_intents \
      single-$seed-intent_match single-$seed-query_wellformedness; do
      [ -s "$tmp/$f-$s.safetensors" ] || missing="$missing $f-$s"
    done
  done
done
if [ -z "$missing" ]; then ok test_train_names_the_files_of_several_runs
else fail test_train_names_the_files_of_several_runs "missing:$missing"; fi
train --systems switch --seeds 2 --threads 1 --steps 6 --save "$tmp/alone.safetensors"
same test_train_runs_do_not_depend_on_each_other "$tmp/m-switch-2.safetensors" \
  "$tmp/alone.safetensors"
if ls "$tmp"/*.tmp > /dev/null 2>&1; then
  fail test_train_leaves_no_temporary_file "$(ls "$tmp"/*.tmp)"
else
  ok test_train_leaves_no_temporary_file
fi
says test_train_prints_mean_and_deviation "$tmp/several.out" '^MT-TaG .*[0-9]+-[0-9]'
says test_train_prints_a_row_per_system "$tmp/several.out" '^Single-Task '
says test_train_prints_the_experts_of_each_task "$tmp/several.out" 'Experts chosen by MT-TaG'

# ---- without --from-scratch: a dense parent first, then all go on from it for as many steps ----
parents="$tiny --threads 2 --steps 20 --parent 0.7 --seeds 1,2"
run() { "$tmp/train" $parents "$@" > "$tmp/out" 2> "$tmp/err"; }
if run --systems single,dense,tag --save "$tmp/p.safetensors" --json "$tmp/p.json"
then ok test_train_has_a_parent
else fail test_train_has_a_parent "$(cat "$tmp/err")"; fi
field() { # SYSTEM FIELD FILE
  sed -n "/\"system\": \"$1\", \"seed\": 1,/,/\"small\"/s/.*\"$2\": \([-0-9.e]*\).*/\1/p" "$3"
}
said="$(for s in parent dense tag; do field $s steps "$tmp/p.json"; done | tr '\n' ' ')"
if [ "$said" = "14 6 6 " ] && grep -q '^Dense parent .*+-' "$tmp/out"
then ok test_train_parent_and_systems_share_the_steps
else fail test_train_parent_and_systems_share_the_steps "$said"; fi
if grep -q ' - Dense parent\|^Dense parent - ' \
    "$tmp/out"; then fail test_train_parent_is_not_compared
else ok test_train_parent_is_not_compared; fi
run --seeds 2 --systems tag --save "$tmp/alone.safetensors"
same test_train_goes_on_from_the_parent_of_its_seed "$tmp/p-tag-2.safetensors" \
  "$tmp/alone.safetensors"
run --seeds 1 --systems single --tasks snips_intents --save "$tmp/alone.safetensors"
"$tmp/train" $small --threads 2 --steps 20 --systems single --tasks snips_intents \
  --save "$tmp/single.safetensors" > "$tmp/out" 2> "$tmp/err"
same test_train_single_has_no_parent "$tmp/single.safetensors" "$tmp/alone.safetensors"
run --seeds 1 --steps 60 --parent 0.98 --lr 1e-2 --experts 1 --systems dense,switch \
  --json "$tmp/start.json"
if [ -n "$(field dense value "$tmp/start.json")" ] &&
   [ "$(field dense value "$tmp/start.json")" = "$(field switch value "$tmp/start.json")" ]
then ok test_train_one_expert_goes_on_as_dense
else fail test_train_one_expert_goes_on_as_dense "$(cat "$tmp/start.json")"; fi

# killed in the parent, and in what goes on from it
only="--seeds 2 --systems tag --hold-out 0.2"
state() { cat "$tmp"/q*.safetensors 2> /dev/null | cksum; }
resume= kills=0
while [ $kills -lt 20 ]; do
  "$tmp/train" $parents $only --checkpoint "$tmp/q.safetensors" --every 1 \
    --save "$tmp/model.safetensors" $resume > /dev/null 2> "$tmp/err" &
  pid=$! before=$(state) tries=0
  while kill -0 $pid 2> /dev/null &&
        { [ "$(state)" = "$before" ] || [ $tries -lt $((kills % 3)) ]; }; do
    sleep 0.01
    tries=$((tries + 1))
  done
  kill -9 $pid 2> /dev/null
  wait $pid 2> /dev/null
  [ $? -eq 137 ] || break
  kills=$((kills + 1)) resume="--resume $tmp/q.safetensors"
done
run $only --save "$tmp/whole.safetensors"
name=test_train_killed_in_parent_and_child_has_the_same_bits
if [ $kills -ge 2 ]; then same $name "$tmp/whole.safetensors" "$tmp/model.safetensors"
else fail $name "killed $kills times: $(cat "$tmp/err")"; fi
# interrupted in the child, without a checkpoint asked for: the parent is left, too, and the line
# that is printed goes on
only="--seeds 2 --systems dense,tag --hold-out 0.2 --steps 400"
mkdir "$tmp/here"
(
  cd "$tmp/here" || exit
  "$tmp/train" $parents $only --save m.safetensors > out 2> err &
  pid=$! tries=0
  until [ -e m-dense-2.safetensors ] || [ $tries -ge 4000 ]; do
    sleep 0.01
    tries=$((tries + 1))
  done
  kill -TERM $pid
  wait $pid
  echo $? > status
  eval "$(grep -e ' --resume ' err)" > out 2> err
  "$tmp/train" $parents $only --save whole.safetensors > out 2> err2
)
name=test_train_interrupted_in_the_child_goes_on
if [ "$(cat "$tmp/here/status")" = 143 ] && ! grep -q 'Dense parent' "$tmp/here/err" &&
   [ -s "$tmp/here/checkpoint-parent-2.safetensors.best" ]
then same $name "$tmp/here/whole-tag-2.safetensors" "$tmp/here/m-tag-2.safetensors"
else fail $name "$(cat "$tmp/here/status" "$tmp/here/err")"; fi

# a machine may read the JSON, with a Python or without
python=${MOE_PYTHON:-python3}
if have "$python"; then
  said=$("$python" - "$tmp/several.json" "$tmp/base.json" 2>&1 << 'PY'
import json, sys
several, base = (json.load(open(p)) for p in sys.argv[1:])
systems = ("single", "dense", "switch", "tag")
expected = [(s, k) for s in systems for k in (1, 2)]
assert [(r["system"], r["seed"]) for r in several["runs"]] == expected
for r in several["runs"] + base["runs"]:
    assert [(t["name"], t["metric"], t["n"]) for t in r["tasks"]] == [
        ("snips_intents", "accuracy", 100), ("intent_match", "accuracy", 60),
        ("query_wellformedness", "spearman", 60)], r
    assert all(-1 <= t["value"] <= 1 for t in r["tasks"])
    assert r["seconds"] > 0 and r["tokens_per_second"] > 0 and r["parameters"] > 1000
    mean = sum(t["value"] for t in r["tasks"]) / 3
    assert abs(r["all"] - mean) < 1e-8 and abs(r["small"] - mean) < 1e-8
assert base["runs"][0]["steps"] == 14 and "--top-k" in base["options"] and base["threads"] == 2
PY
  )
  [ -z "$said" ] && ok test_train_writes_json || fail test_train_writes_json "$said"
else skip test_train_writes_json "there is no python3 here"; fi

# what training printed is what predict --score prints
value() { tr '{' '\n' < "$1" | sed -n "s/.*\"name\": \"$2\".*\"value\": \([-0-9.e]*\).*/\1/p" |
  head -n 1; }
train $one --tasks intent_match,query_wellformedness --save "$tmp/score.safetensors" \
  --json "$tmp/score.json"
for t in intent_match query_wellformedness; do
  trained=$(value "$tmp/score.json" $t)
  scored=$("$tmp/predict" "$tmp/score.safetensors" $t --score < "$data/$t/dev.tsv" |
    awk 'NR == 1 { print $2 }')
  if [ -n "$scored" ] && [ "$(printf %.6f "$trained")" = \
      "$(printf %.6f "$scored")" ]; then ok test_train_metric_of_${t}_is_that_of_predict
  else fail test_train_metric_of_${t}_is_that_of_predict "train $trained, predict $scored"; fi
done

# ---- data ----
for s in natural uniform temperature:3 uniform-natural; do
  if train $one --sampling $s --save "$tmp/sampling.safetensors"; then ok test_train_samples_$s
  else fail test_train_samples_$s "$(cat "$tmp/err")"; fi
  sum "$tmp/sampling.safetensors" >> "$tmp/sampling"
done
if [ "$(sort -u "$tmp/sampling" | wc -l)" -eq 4 ]; then ok test_train_samplings_differ
else fail test_train_samplings_differ "$(cat "$tmp/sampling")"; fi
for o in shuffle file; do
  train $one --order $o --save "$tmp/order-$o.safetensors" ||
    fail test_train_orders_by_$o "$(cat "$tmp/err")"
done
same test_train_shuffles_by_default "$tmp/base.safetensors" "$tmp/order-shuffle.safetensors"
if cmp -s "$tmp/order-file.safetensors" "$tmp/base.safetensors"; then
  fail test_train_takes_the_order_of_the_file
else
  ok test_train_takes_the_order_of_the_file
fi
for o in "--top-k 1" "--renormalize --top-k 2" "--gate-scale paper" "--balance 0.01" \
  "--z-loss 0.001" "--jitter 0.1" "--truncate right --max-len 9" \
         "--decay 0.01" "--clip 0.01" "--warmup 0" "--warmup 1" "--dropout 0" "--experts 1" \
         "--experts 3 --top-k 3" "--cased" "--layers 1 --heads 1" "--batch 1 --steps 3"; do
  name=test_train_takes$(echo "$o" | tr -d ' ' | tr -- - _)
  if train --systems tag --threads 1 $o --save "$tmp/option.safetensors" &&
      ! cmp -s "$tmp/base.safetensors" "$tmp/option.safetensors"; then ok $name
  else fail $name "$(cat "$tmp/err")"; fi
done

# --dedup: two of snips' training rows stand in another task's dev set, one of them with other
# capitals and marks; its own dev set does not count
cp -r "$data" "$tmp/twice"
head -n 3 "$data/intent_match/dev.tsv" > "$tmp/pair"
{ cat "$data/snips_intents/train.tsv";
  printf '1\tHow? is the -weather-\n2\tplay it AGAIN, Sam\n3\t';
  sed -n 3p "$data/snips_intents/dev.tsv" | cut -f 2; } > "$tmp/twice/snips_intents/train.tsv"
{ cat "$data/query_wellformedness/dev.tsv";
  printf '0.5\thow is the weather ?\n1\tPlay it again, Sam.\n';
  } > "$tmp/twice/query_wellformedness/dev.tsv"
train $one --data "$tmp/twice" --dedup
says test_train_dedup_counts "$tmp/out" \
  '^snips_intents: 2 training rows occur in another task.s dev set and are left out'
says test_train_dedup_leaves_them_out "$tmp/out" ' 120/100 *49/60 *119/62'

# other line ends, no end at all, and a byte that is no UTF-8 are no reason to stop
cp -r "$data" "$tmp/ends"
for f in tasks.tsv vocab.txt intent_match/train.tsv snips_intents/dev.tsv; do
  sed 's/$/\r/' "$data/$f" > "$tmp/ends/$f"
done
printf '%s' "$(cat "$data/query_wellformedness/train.tsv")" \
  > "$tmp/ends/query_wellformedness/train.tsv"
train $one --data "$tmp/ends" --save "$tmp/ends.safetensors"
train $one --json "$tmp/plain.json"
train $one --data "$tmp/ends" --json "$tmp/ends.json"
if [ -n "$(value "$tmp/plain.json" intent_match)" ] &&
    [ "$(tr '{' '\n' < "$tmp/plain.json" | grep '"metric"')" = \
    "$(tr '{' '\n' < "$tmp/ends.json" | grep '"metric"')" ]
then ok test_train_takes_crlf_and_no_last_newline
else fail test_train_takes_crlf_and_no_last_newline "$(cat "$tmp/err")"; fi
cp -r "$data" "$tmp/bytes"
printf '1\t\n' >> "$tmp/bytes/snips_intents/train.tsv"
if train $one --data "$tmp/bytes"; then ok test_train_takes_empty_texts
else fail test_train_takes_empty_texts "$(cat "$tmp/err")"; fi

"$tmp/train" --help > "$tmp/help" 2>&1
undocumented=
for o in $(grep -oh '"--[a-z-]*"' ../examples/train.c ../examples/tools/cli.h \
    ../examples/tools/data.h ../examples/tools/training.h | tr -d '"' | grep -v -e --help); do
  grep -q -e "$o" "$tmp/help" || undocumented="$undocumented $o"
done
if [ -z "$undocumented" ]; then ok test_train_help_lists_every_option
else fail test_train_help_lists_every_option $undocumented; fi
finish
