#!/bin/sh
# predict.c on a model that train.c has saved: the same metrics, one line out for one line in, and
# what it says to bad input.
. ./lib.sh
data=../examples/data tasks=query_wellformedness,intent_match,snips_intents
for p in train predict; do program $p || { fail test_predict_compiles; finish; }; done
ok test_predict_compiles
model=$tmp/model.safetensors
if ! "$tmp/train" --tasks $tasks --data $data --from-scratch --systems tag --layers 1 --hidden 32 \
    --ffn 64 --heads 2 --steps 30 --threads 1 --max-len 24 \
     --save "$model" --json "$tmp/run.json" > "$tmp/log" 2>&1; then fail test_predict_has_a_model \
     "$(tail -n 3 "$tmp/log")"; finish; fi
predict() { "$tmp/predict" "$model" "$@"; }

for t in query_wellformedness intent_match snips_intents; do
  trained=$(tr '{' '\n' < "$tmp/run.json" |
    sed -n "s/.*\"name\": \"$t\".*\"value\": \([-0-9.e]*\), \"n\": \([0-9]*\).*/\1 \2/p" |
    head -n 1)
  predict $t --score < $data/$t/dev.tsv > "$tmp/score" 2>&1
  said=$(awk 'NR == 1 { v = $2 } $1 == "n" { n = $2 } END { print v, n }' "$tmp/score")
  if [ -n "$trained" ] && [ "$(echo "$trained $said" |
      awk '{ d = $1 - $3; print (d < 1e-6 && d > -1e-6 && $2 == $4) }')" = 1 ]
  then ok test_predict_scores_${t}_as_training_did
  else fail test_predict_scores_${t}_as_training_did "training: $trained, predict: $said"; fi
done

# lines: order, count, columns, probabilities; whatever the threads, the instruction set and the
# company
tail -n +2 $data/snips_intents/dev.tsv | cut -f 2 | head -n 37 > "$tmp/lines"
predict snips_intents < "$tmp/lines" > "$tmp/all"
if [ "$(wc -l < "$tmp/all")" -eq 37 ] && ! grep -qv '^[A-Za-z]*	[01]\.[0-9]\{6\}$' "$tmp/all"; then
  ok test_predict_answers_line_by_line
else
  fail test_predict_answers_line_by_line "$(head -n 2 "$tmp/all")"
fi
while IFS= read -r line; do printf '%s\n' "$line" | predict snips_intents;
    done < "$tmp/lines" > "$tmp/single"
if cmp -s "$tmp/all" "$tmp/single"; then ok test_predict_alone_is_the_same
else fail test_predict_alone_is_the_same; fi
predict snips_intents --threads 3 --isa scalar < "$tmp/lines" > "$tmp/other"
if cmp -s "$tmp/all" "$tmp/other"; then ok test_predict_threads_and_scalar_are_the_same
else fail test_predict_threads_and_scalar_are_the_same; fi
predict snips_intents --profile < "$tmp/lines" > "$tmp/other" 2> "$tmp/err"
if cmp -s "$tmp/all" "$tmp/other" && grep -q '^ *[0-9.]* *[0-9.]* *[0-9]*  experts$' "$tmp/err" &&
    grep -q '^ 100\.0 .*  all$' "$tmp/err"
then ok test_predict_profile_tells_where_the_time_went
else fail test_predict_profile_tells_where_the_time_went "$(head -n 3 "$tmp/err")"; fi
predict snips_intents --precision bf16 --threads 2 < "$tmp/lines" 2> "$tmp/err" |
  cut -f 1 > "$tmp/other"
# a close call may turn out otherwise
said=$(cut -f 1 "$tmp/all" | paste - "$tmp/other" | awk '$1 != $2' | wc -l)
if [ "$(wc -l < "$tmp/other")" -eq 37 ] && [ "$said" -le 2 ]; then
  ok test_predict_in_bf16_says_the_same
else
  fail test_predict_in_bf16_says_the_same "$said other labels: $(cat "$tmp/err")"
fi
tail -n +2 $data/intent_match/dev.tsv | cut -f 2,3 | head -n 5 > "$tmp/pairs"
if [ "$(predict intent_match < "$tmp/pairs" | wc -l)" -eq 5 ]; then ok test_predict_takes_pairs
else fail test_predict_takes_pairs; fi
# ---- other forms of an answer ----
head -n 3 "$tmp/lines" | predict snips_intents --top 2 > "$tmp/top"
head -n 3 "$tmp/all" > "$tmp/best"
if cut -f 1,2 "$tmp/top" | cmp -s - "$tmp/best" &&
    [ "$(awk -F '\t' 'NF == 4 && $2 >= $4' "$tmp/top" | wc -l)" -eq 3 ]; then
  ok test_predict_top_begins_with_the_answer
else fail test_predict_top_begins_with_the_answer "$(cat "$tmp/top")"; fi
head -n 3 "$tmp/lines" | predict snips_intents --scores > "$tmp/scores"
if [ "$(awk -F '\t' '{ s = 0; m = 0
    for (i = 2; i <= NF; ++i) { s += $i; if ($i > m) m = $i }
    if (NF == 8 && s > 0.99999 && s < 1.00001) print $1 "\t" sprintf("%.6f", m) }' "$tmp/scores" |
    cmp - "$tmp/best" 2>&1)" = "" ]; then ok test_predict_scores_are_all_probabilities
else fail test_predict_scores_are_all_probabilities "$(cat "$tmp/scores")"; fi
if have python3; then
  head -n 3 "$tmp/lines" | predict snips_intents --json --top 2 | python3 -c '
import json, sys
for line in sys.stdin:
    x = json.loads(line)
    s = list(x["scores"].items())
    assert len(s) == 2 and s[0] == (x["label"], x["score"]) and s[0][1] >= s[1][1]
    print("%s\t%.6f" % s[0])' > "$tmp/json" 2>&1
  if cmp -s "$tmp/json" "$tmp/best"; then ok test_predict_json_says_the_same
  else fail test_predict_json_says_the_same "$(cat "$tmp/json")"; fi
else skip test_predict_json_says_the_same "there is no python3 here"; fi
head -n 2 "$tmp/lines" | predict snips_intents --embed mean > "$tmp/mean"
head -n 2 "$tmp/lines" | predict snips_intents --embed cls > "$tmp/cls"
if [ "$(awk -F '\t' '{ print NF }' "$tmp/mean" "$tmp/cls" | uniq -c | tr -s ' ')" = ' 4 32' ] &&
    ! cmp -s "$tmp/mean" "$tmp/cls"; then ok test_predict_embed_gives_vectors
else fail test_predict_embed_gives_vectors "$(cut -c 1-60 "$tmp/mean")"; fi
predict snips_intents --report < $data/snips_intents/dev.tsv > "$tmp/report"
# rows of the table of confusions sum to the rows of a label, its diagonal over n is the accuracy
said=$(awk '/^accuracy/ { a = $2 } /^n / { n = $2 } /^ *[0-9]+=/ && NF == 5 { rows += $2 }
  /^is/ { t = 1; next }
  t && /^ *[0-9]+=/ { right += $(2 + k++); for (i = 2; i <= NF; ++i) all += $i }
  END { d = right / n - a; print (rows == n), (all == n), (d * d < 1e-12) }' "$tmp/report")
if [ "$said" = "1 1 1" ]; then ok test_predict_report_adds_up
else fail test_predict_report_adds_up "$said: $(cat "$tmp/report")"; fi
# a program that waits for each answer before it asks again
mkfifo "$tmp/ask" "$tmp/answer"
predict snips_intents < "$tmp/ask" > "$tmp/answer" &
exec 3> "$tmp/ask" 4< "$tmp/answer"
i=0
while [ $i -lt 3 ] && IFS= read -r line; do
  printf '%s\n' "$line" >&3
  timeout 60 head -n 1 <&4
  i=$((i + 1))
done < "$tmp/lines" > "$tmp/talk"
exec 3>&- 4<&-
wait
if cmp -s "$tmp/talk" "$tmp/best"; then ok test_predict_answers_before_the_next_line
else fail test_predict_answers_before_the_next_line "$(cat "$tmp/talk")"; fi
printf 'no newline at the end' | predict query_wellformedness > "$tmp/one"
if grep -q '^-\{0,1\}[0-9]*\.[0-9]\{6\}$' "$tmp/one"; then ok test_predict_prints_a_regression
else fail test_predict_prints_a_regression "$(cat "$tmp/one")"; fi
printf '\n\r\n\377\376\n' | predict snips_intents > "$tmp/odd"
if [ "$(wc -l < "$tmp/odd")" -eq 3 ] && [ -z "$(predict snips_intents < /dev/null)" ]; then
  ok test_predict_takes_empty_and_broken_lines
else
  fail test_predict_takes_empty_and_broken_lines
fi

# bad input: exit status 1, a sentence, nothing on standard output
refuses() { # NAME PATTERN INPUT ARGUMENTS
  name=$1 pattern=$2; printf "$3" > "$tmp/in"; shift 3
  "$tmp/predict" "$@" < "$tmp/in" > "$tmp/out" 2> "$tmp/err"
  status=$?
  if [ $status -eq 1 ] && grep -q -- "$pattern" "$tmp/err" && [ ! -s "$tmp/out" ]; then
    ok test_predict_refuses_$name
  else
    fail test_predict_refuses_$name "status $status: $(cat "$tmp/err")"
  fi
}
refuses no_arguments 'usage' ''
refuses a_missing_model 'nothing.safetensors: cannot be opened' '' \
  "$tmp/nothing.safetensors" snips_intents
refuses a_foreign_file 'test_predict.sh: the first 8 bytes give a header of' '' test_predict.sh \
  snips_intents
refuses an_unknown_task 'has no task "mrpc", but query_wellformedness intent_match snips_intents' \
  '' "$model" mrpc
refuses an_unknown_option 'unknown option --sore' '' "$model" snips_intents --sore
refuses an_unknown_instruction_set '--isa is auto|avx512|avx2|sse2|neon|rvv|scalar, not "sse"' '' \
  "$model" snips_intents --isa sse
refuses a_bad_number '--threads takes a whole number from 1 to 256, not "two"' '' "$model" \
  snips_intents --threads two
refuses too_few_columns 'stdin:2: 1 column, expected 2: task intent_match takes two texts' \
  'a\tb\nalone\n' "$model" intent_match
refuses too_many_columns 'stdin:1: 2 columns, expected 1' 'a\tb\n' "$model" snips_intents
refuses a_header_without_label 'stdin:1: there is no column "label"' 'a\tsentence1\n' \
  "$model" snips_intents --score
refuses an_empty_file 'stdin: the file is empty' '' "$model" snips_intents --score
refuses a_file_without_rows 'stdin: there are no rows' 'label\tsentence1\n' "$model" snips_intents \
  --score
refuses a_label_that_is_none 'stdin:3: label "x" is none of 0=AddToPlaylist' \
  'label\tsentence1\n1\ta\nx\tb\n' \
  "$model" snips_intents --score
refuses a_label_out_of_range 'stdin:2: label 7 is not one of 0 .. 6' 'label\tsentence1\n7\ta\n' \
  "$model" snips_intents --score
refuses a_label_between_classes 'stdin:2: label 1.5 is not one of 0 .. 6' \
  'label\tsentence1\n1.5\ta\n' "$model" snips_intents --score
# a model without tasks gives embeddings
refuses a_model_without_tasks 'has no tasks: it gives embeddings only' 'a\n' \
  fuzz/seeds/model/no_tasks any
if [ "$(echo a | "$tmp/predict" fuzz/seeds/model/no_tasks any --embed cls | wc -w)" -gt 1 ]; then
  ok test_predict_embeds_without_tasks
else fail test_predict_embeds_without_tasks; fi
refuses a_zero_byte 'stdin:1: a zero byte' 'a\000b\n' "$model" snips_intents
if [ -c /dev/full ]; then
  "$tmp/predict" "$model" snips_intents < "$tmp/lines" > /dev/full 2> "$tmp/err"
  if [ $? -eq 1 ] && grep -q 'cannot be written' "$tmp/err"; then
    ok test_predict_reports_a_full_disk
  else
    fail test_predict_reports_a_full_disk
  fi
else skip test_predict_reports_a_full_disk "there is no /dev/full here"; fi
finish
