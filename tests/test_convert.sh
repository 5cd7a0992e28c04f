#!/bin/sh
# convert.c on a model that train.c has saved: what it prints, how much smaller and how good the
# int8 model is, and what it refuses.
. ./lib.sh
data=../examples/data tasks=intent_match,snips_intents
CC=${CC:-cc}
for p in train predict convert; do program $p || { fail test_convert_compiles; finish; }; done
ok test_convert_compiles
model=$tmp/model.safetensors small=$tmp/small.safetensors
if ! "$tmp/train" --tasks $tasks --data $data --from-scratch --systems tag --layers 1 --hidden 64 \
    --ffn 128 --heads 2 --steps 60 --threads 1 --max-len 24 \
     --save "$model" > "$tmp/log" 2>&1; then fail test_convert_has_a_model \
     "$(tail -n 3 "$tmp/log")"; finish; fi

"$tmp/convert" "$model" > "$tmp/what"
bytes=$(wc -c < "$model" | tr -d ' ')
if grep -q "^layers 1, hidden 64, ffn 128" "$tmp/what" &&
    grep -q "^  snips_intents .* 7 classes: AddToPlaylist" "$tmp/what" &&
   grep -q "^file *$bytes bytes" "$tmp/what"; then ok test_convert_tells_what_is_in_a_file;
   else fail test_convert_tells_what_is_in_a_file "$(cat "$tmp/what")"; fi

if "$tmp/convert" "$model" "$small" --int8 --tensors > "$tmp/what"; then ok test_convert_quantises
else fail test_convert_quantises; finish; fi
now=$(wc -c < "$small" | tr -d ' ')
if [ $((now * 10)) -lt $((bytes * 4)) ] &&
    grep -q "^saved *$((bytes - now)) bytes of $bytes" "$tmp/what" &&
   grep -q "I8  encoder.layer.0.attention.self.query.weight (64, 64)" "$tmp/what"; then ok \
   test_convert_saves_bytes;
   else fail test_convert_saves_bytes "$bytes, then $now: $(tail -n 3 "$tmp/what")"; fi

# scores within 3 points of the parent's, the same lines on every instruction set
score() { "$tmp/predict" "$1" snips_intents --score < $data/snips_intents/dev.tsv |
  awk '$1 == "accuracy" { print $2 }'; }
a=$(score "$model") b=$(score "$small")
if echo "$a $b" | awk '{ d = $1 - $2; exit !($2 > 0 && d < 0.03 && d > -0.03) }'; then
  ok test_convert_keeps_the_accuracy
else
  fail test_convert_keeps_the_accuracy "$a, then $b"
fi
tail -n +2 $data/snips_intents/dev.tsv | cut -f 2 | head -n 37 > "$tmp/lines"
"$tmp/predict" "$small" snips_intents < "$tmp/lines" > "$tmp/all"
"$tmp/predict" "$small" snips_intents --isa scalar --threads 3 < "$tmp/lines" > "$tmp/other"
if [ "$(wc -l < "$tmp/all")" -eq 37 ] && cmp -s "$tmp/all" "$tmp/other"; then
  ok test_convert_scalar_and_threads_are_the_same
else
  fail test_convert_scalar_and_threads_are_the_same
fi

refuses() { # NAME PATTERN ARGUMENTS
  name=$1 pattern=$2; shift 2
  if "$tmp/convert" "$@" > "$tmp/stdout" 2> "$tmp/stderr"; then fail "$name" "it did not fail"
  elif grep -q "$pattern" "$tmp/stderr" && [ ! -s "$tmp/stdout" ]; then ok "$name"
  else fail "$name" "$(cat "$tmp/stderr")"; fi
}
refuses test_convert_wants_a_file "usage" --tensors
refuses test_convert_wants_a_purpose "int8" "$model" "$tmp/x"
refuses test_convert_wants_a_place "second file" "$model" --int8
refuses test_convert_spares_its_input "another name" "$model" "$model" --int8
refuses test_convert_refuses_a_second_time "already int8" "$small" "$tmp/x" --int8
head -c 1000 "$small" > "$tmp/cut"
refuses test_convert_refuses_damage "convert: $tmp/cut: .*truncated" "$tmp/cut"
if "$tmp/train" --tasks $tasks --data $data --from-scratch --systems tag --layers 1 --hidden 64 \
    --ffn 128 --heads 2 --steps 1 --threads 1 --max-len 24 \
     --init "$small" --vocab $data/vocab.txt > "$tmp/log" 2>&1; then fail \
     test_convert_int8_cannot_be_trained; else ok test_convert_int8_cannot_be_trained; fi

# one task alone: the same scores without the other; without the experts that it hardly uses nearly
# the same, in fewer bytes
rows=$data/snips_intents/train.tsv
if "$tmp/convert" "$model" "$tmp/one" --task snips_intents > "$tmp/what" &&
    grep -q '^tasks 1$' "$tmp/what"; then
  ok test_convert_takes_a_task
else
  fail test_convert_takes_a_task "$(cat "$tmp/what")"
fi
"$tmp/predict" "$model" snips_intents < "$tmp/lines" > "$tmp/all"
"$tmp/predict" "$tmp/one" snips_intents < "$tmp/lines" > "$tmp/other"
if cmp -s "$tmp/all" "$tmp/other"; then ok test_convert_a_task_alone_is_the_same
else fail test_convert_a_task_alone_is_the_same; fi
"$tmp/convert" "$model" "$tmp/few" --task snips_intents --drop-below 0.3 --rows $rows \
  --score $data/snips_intents/dev.tsv > "$tmp/what" 2>&1
a=$(score "$model") b=$(score "$tmp/few")
gone=$(sed -n 's/^experts that are there, layer by layer: //p' "$tmp/what" | awk '{ print 4 - NF }')
expert=$((4 * (2 * 64 * 128 + 64 + 128))) saved=$(($(wc -c < "$tmp/one") - $(wc -c < "$tmp/few")))
if [ "${gone:-0}" -gt 0 ] && [ "$saved" -gt $((gone * (expert - 1))) ] &&
    [ "$saved" -lt $((gone * (expert + 2000))) ] &&
    echo "$a $b" | awk '{ d = $1 - $2; exit !(d < 0.1 && d > -0.1) }'
then
  ok test_convert_leaves_experts_out
else
  fail test_convert_leaves_experts_out \
    "$gone of 4 experts, $saved bytes, accuracy $a, then $b: $(head -n 5 "$tmp/what")"
fi
if grep -q "^accuracy *$a before, $b after, over " "$tmp/what"; then
  ok test_convert_scores_before_and_after
else
  fail test_convert_scores_before_and_after "$a, $b: $(tail -n 1 "$tmp/what")"
fi
if "$tmp/convert" "$model" "$tmp/none" --task snips_intents --rows $rows --int8 > "$tmp/what" &&
    [ -s "$tmp/none" ]; then
  ok test_convert_all_at_once
else
  fail test_convert_all_at_once
fi
refuses test_convert_wants_a_known_task 'has no task "mrpc"' "$model" "$tmp/x" --task mrpc
refuses test_convert_wants_rows_to_count "needs --rows" "$model" "$tmp/x" --task snips_intents \
  --drop-below 0.1
refuses test_convert_wants_a_task "of one task" "$model" "$tmp/x" --int8 --score $rows
refuses test_convert_wants_columns "no column" "$model" "$tmp/x" --task snips_intents \
  --rows "$tmp/lines"
printf 'label\tsentence1\n' > "$tmp/header.tsv"
refuses test_convert_wants_a_row_at_least 'header.tsv: there are no rows' "$model" "$tmp/x" --task \
  snips_intents \
  --rows "$tmp/header.tsv"
refuses test_convert_wants_both_texts_of_a_pair 'no column "sentence2"' "$model" "$tmp/x" \
  --task intent_match --rows $rows
printf 'label\tsentence1\n0\ta\000b\n' > "$tmp/zero.tsv"
refuses test_convert_sees_a_zero_byte 'a zero byte' "$model" "$tmp/x" --task snips_intents \
  --rows "$tmp/zero.tsv"
refuses test_convert_wants_a_number_of_threads \
  'threads takes a whole number from 1 to 256, not "4x"' "$model" --threads 4x
head -n 40 $rows > "$tmp/lf.tsv"
awk 'BEGIN { printf "\357\273\277" } { printf "%s\r\n", $0 }' "$tmp/lf.tsv" > "$tmp/crlf.tsv"
"$tmp/convert" "$model" "$tmp/a" --task snips_intents --drop-below 0.3 --rows "$tmp/lf.tsv" \
  > "$tmp/what" 2>&1
if "$tmp/convert" "$model" "$tmp/b" --task snips_intents --drop-below 0.3 --rows "$tmp/crlf.tsv" \
    > "$tmp/what" 2>&1 && cmp -s "$tmp/a" "$tmp/b"
then ok test_convert_takes_what_editors_leave
else fail test_convert_takes_what_editors_leave "$(head -n 3 "$tmp/what")"; fi
refuses test_convert_wants_a_share 'drop-below takes a number from 0 to 1' "$model" "$tmp/x" \
  --task snips_intents --rows $rows \
  --drop-below 2
finish
