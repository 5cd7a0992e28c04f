#!/bin/sh
# routes.c on models that train.c has saved: text, CSV and HTML agree with each other and with what
# can be worked out by other means.
. ./lib.sh
data=../examples/data # with eight tasks, the fewest whose correlations are reported
tasks=query_wellformedness,intent_match,snips_intents,pros_cons,comparative_sentences
tasks=$tasks,sentence_polarity,subjectivity,clinc_domains
CC=${CC:-cc}
for p in train routes; do program $p || { fail test_routes_compiles; finish; }; done
ok test_routes_compiles
small="--data $data --layers 2 --hidden 32 --ffn 64 --heads 2 --threads 1 --from-scratch"
small="$small --max-len 24"
make_model() { "$tmp/train" $small "$@" > "$tmp/log" 2>&1 ||
  { fail test_routes_has_a_model "$(tail -n 3 "$tmp/log")"; finish; }; }
make_model --tasks $tasks --systems tag --experts 3 --steps 15 --save "$tmp/early.safetensors"
make_model --tasks $tasks --systems tag --experts 3 --steps 60 --save "$tmp/late.safetensors" \
  --checkpoint "$tmp/state.safetensors" --every 60
make_model --tasks pros_cons,intent_match --systems tag --experts 3 --top-k 3 --steps 5 \
  --save "$tmp/two.safetensors"
make_model --tasks $tasks --systems dense --steps 2 --save "$tmp/dense.safetensors"
run() { "$tmp/routes" --data $data "$@"; }

moments=$tmp/early.safetensors,$tmp/state.safetensors
if run "$tmp/late.safetensors" --rows 50 --checkpoints "$moments" --text --csv "$tmp/r.csv" \
    --html "$tmp/r.html" > "$tmp/text" 2> "$tmp/err" && [ ! -s "$tmp/err" ]; then
  ok test_routes_makes_all_three
else
  fail test_routes_makes_all_three "$(cat "$tmp/err")"
  finish
fi
csv=$tmp/r.csv html=$tmp/r.html
bad=$(awk -F, 'NF != 7' "$csv" | head -n 3)
if [ -z "$bad" ]; then ok test_routes_csv_has_seven_columns
else fail test_routes_csv_has_seven_columns "$bad"; fi

# shares of a task in a layer sum to 1
sums() { # CSV COUNT
  awk -F, -v n="$2" '$1 ~ /^share/ { s[$1 $2 "," $3 "," $4] += $7 }
    END {
      for (k in s) {
        ++c
        if (s[k] < 0.99999 || s[k] > 1.00001) print k, s[k]
      }
      if (c != n) print c " sums"
    }' "$1"
}
bad=$(sums "$csv" 64) # 8 tasks x 2 layers, of the model and of three moments
[ -z "$bad" ] && ok test_routes_shares_sum_to_one || fail test_routes_shares_sum_to_one "$bad"
bad=$(awk -F, '$1 == "share" { s[$3 $4 $5] = $7 }
  $1 == "share_over_time" && $2 != "early" && s[$3 $4 $5] != $7' "$csv")
if [ -z "$bad" ]; then ok test_routes_checkpoint_and_model_are_the_same
else fail test_routes_checkpoint_and_model_are_the_same "$bad"; fi

# every number of the pictures is the CSV's, and none is missing
tips() { # CSV HTML: the numbers of both, to $tmp/a and $tmp/b
  awk -F, 'NR > 1 && $1 != "gate" {
    k = $1
    if ($2 != "") k = k " " $2
    if ($3 != "") k = k " " $3
    if ($4 != "") k = k " layer " $4
    if ($5 != "") k = k " expert " $5
    if ($6 != "") k = k " " $6
    print k ": " $7
  }' "$1" | sort > "$tmp/a"
  sed 's/ title="/\n title="/g' "$2" | sed -n 's/^ title="\([^"]*: [^"]*\)".*/\1/p' |
    sort > "$tmp/b"
}
tips "$csv" "$html"
if [ "$(wc -l < "$tmp/a")" -gt 200 ] &&
    cmp -s "$tmp/a" "$tmp/b"; then ok test_routes_html_shows_the_csv_s_numbers
else fail test_routes_html_shows_the_csv_s_numbers "$(diff "$tmp/a" "$tmp/b" | head -n 5)"; fi
bad=$(sed 's/ title="/\n title="/g' "$html" |
  sed -n 's/^ title="share [^:]*: \([0-9.e-]*\)">\([0-9.]*\)<\/td>.*/\1 \2/p' |
  awk '{ ++n; d = 100 * $1 - $2; if (d > 0.0501 || d < -0.0501) print }
    END { if (n < 10) print n " cells" }')
if [ -z "$bad" ]; then ok test_routes_squares_show_their_numbers
else fail test_routes_squares_show_their_numbers "$bad"; fi
bad=$(awk -F, '$1 == "metric" { print "metric " $3 " " $6 ": " $7 "\"" }' "$csv" |
while IFS= read -r m; do grep -qF "$m" "$html" || echo "$m"; done)
if [ -z "$bad" ]; then ok test_routes_html_shows_the_metrics
else fail test_routes_html_shows_the_metrics "$bad"; fi
bad=$(awk -F, '$1 == "share" && $3 == "pros_cons" && $4 == 2 { printf " %8.1f", 100 * $7 }' "$csv")
if grep -qF "pros_cons               $bad" "$tmp/text"; then
  ok test_routes_text_shows_the_csv_s_numbers
else
  fail test_routes_text_shows_the_csv_s_numbers "$bad"
fi

# the page loads nothing and runs nothing
if ! grep -qiE '<script|<link|<img|src=|href=|url\(|@import|https?:' "$html" &&
    grep -q 'prefers-color-scheme:dark' "$html" && grep -q 'name="viewport"' "$html"
then
  ok test_routes_html_stands_alone
else
  fail test_routes_html_stands_alone \
    "$(grep -oiE '<script|<link|<img|src=|href=|url\(|@import|https?:' "$html" | head -n 3)"
fi
if have xmllint; then
  sed -e 's/<!DOCTYPE html>//' -e 's/<meta \([^>]*\)>/<meta \1\/>/g' "$html" > "$tmp/x.xml"
  if xmllint --noout "$tmp/x.xml" 2> "$tmp/err"; then ok test_routes_html_is_well_formed
  else fail test_routes_html_is_well_formed "$(head -n 3 "$tmp/err")"; fi
else skip test_routes_html_is_well_formed "there is no xmllint here"; fi
# on a phone wide tables scroll, with a shadow where there is more; the page itself does not
cat > "$tmp/phone.py" << 'end'
import sys
sys.path.insert(0, sys.argv[2])
from browser import Browser
with Browser() as b:
    b.open(sys.argv[1], width=360, height=740, dark=False)
    print(b.value("""
      const wide = [...document.querySelectorAll("div")].filter(d => d.scrollWidth > d.clientWidth)
      const shadow = d => getComputedStyle(d).backgroundAttachment
      return [document.documentElement.scrollWidth <= innerWidth, wide.length > 0,
              wide.every(d => shadow(d) == "local, local, scroll, scroll")].join(" ")"""))
end
if have python3 && python3 -c 'import sys; sys.path.insert(0, "."); import browser
sys.exit(not browser.find())' 2> "$tmp/err"; then
  said=$(python3 "$tmp/phone.py" "$html" . 2>&1)
  if [ "$said" = "true true true" ]; then ok test_routes_html_scrolls_on_a_phone
  else fail test_routes_html_scrolls_on_a_phone "$said"; fi
else skip test_routes_html_scrolls_on_a_phone "there is no Chromium here"; fi

# statistics by other means: overlap from the shares; Pearson's r; with eight tasks
# p = 1 - |r| (1 + q / 2 + 3 q^2 / 8), where q = 1 - r^2
bad=$(awk -F, '$1 == "share" { s[$3, $4, $5] = $7 }
  $1 == "overlap" {
    v = 0
    for (l = 1; l < 3; ++l)
      for (i = 1; i < 4; ++i) {
        a = s[$3, l, i]
        b = s[$6, l, i]
        v += (a < b ? a : b) / 2
      }
    ++n
    if (v - $7 > 2e-5 || $7 - v > 2e-5) print
  }
  END { if (n != 64) print n " overlaps" }' "$csv")
[ -z "$bad" ] && ok test_routes_overlap_is_right || fail test_routes_overlap_is_right "$bad"
bad=$(awk -F, '$1 == "share" { s[$3, $4, $5] = $7; t[$3] }
  $1 == "feature" { f[$3, $6] = $7 }
  $1 == "pearson" {
    x = y = xx = yy = xy = 0
    for (k in t) {
      a = f[k, $6]
      b = s[k, $4, $5]
      x += a; y += b; xx += a * a; yy += b * b; xy += a * b
    }
    r = (xy - x * y / 8) / sqrt((xx - x * x / 8) * (yy - y * y / 8))
    ++n
    if (r - $7 > 1e-3 || $7 - r > 1e-3) print $0, r
  }
  END { if (n < 20) print n " correlations" }' "$csv")
[ -z "$bad" ] && ok test_routes_pearson_is_right || fail test_routes_pearson_is_right "$bad"
bad=$(awk -F, '$1 == "pearson" { r = $7 < 0 ? -$7 : $7; next }
  $1 == "p_value" {
    ++n
    q = 1 - r * r
    p = 1 - r * (1 + q / 2 + 3 * q * q / 8)
    if (p - $7 > 2e-5 || $7 - p > 2e-5) print $0, p
  }
  END { if (n < 20) print n " p-values" }' "$csv")
[ -z "$bad" ] && ok test_routes_p_values_are_right || fail test_routes_p_values_are_right "$bad"
if grep -q "r over 8 tasks" "$tmp/text" && grep -q "r over 8 tasks" "$html" &&
    [ "$(grep -c '<path d="M.*<title>join' "$html")" -eq 7 ] && grep -q '<polyline' "$html"
then ok test_routes_says_how_many_points_and_draws
else fail test_routes_says_how_many_points_and_draws "$(grep 'r over' "$tmp/text")"; fi
# the feature that needs train.tsv is left out where a task has none
mkdir "$tmp/seven"
for t in $(echo $tasks | tr , ' '); do
  mkdir "$tmp/seven/$t" && cp $data/$t/*.tsv "$tmp/seven/$t/"
done
rm "$tmp/seven/pros_cons/train.tsv"
if "$tmp/routes" "$tmp/late.safetensors" --data "$tmp/seven" --rows 5 --csv "$tmp/p.csv" &&
   ! grep -q log10 "$tmp/p.csv" && grep -q 'p_value.*length,' "$tmp/p.csv"
then ok test_routes_takes_a_task_without_training_rows
else fail test_routes_takes_a_task_without_training_rows "$(grep log10 "$tmp/p.csv")"; fi

# several threads, plain C: the same numbers
run "$tmp/late.safetensors" --rows 50 --checkpoints "$moments" --threads 3 --isa scalar \
  --csv "$tmp/s.csv"
if cmp -s "$csv" "$tmp/s.csv"; then ok test_routes_threads_and_scalar_are_the_same
else fail test_routes_threads_and_scalar_are_the_same; fi
# --rows keeps the questions of a ranking whole
mkdir -p "$tmp/rank/pick" && cp $data/vocab.txt "$tmp/rank/" && cp -r $data/pros_cons "$tmp/rank/"
{
  printf 'label\tsentence1\tsentence2\tgroup\n'
  for q in 1 2 3 4 5 6; do
    printf '0\tthe man %s\tgood\tq%s\n0\tthe dog\tbad\tq%s\n1\tthe cat\tfine\tq%s\n' $q $q $q $q
  done
} | tee "$tmp/rank/pick/dev.tsv" > "$tmp/rank/pick/train.tsv"
printf '%s\t%s\t%s\t%s\t%s\n' name input kind labels metric \
  pick pair ranking 0=no,1=yes accuracy \
  pros_cons single classification 0=con,1=pro accuracy > "$tmp/rank/tasks.tsv"
make_model --data "$tmp/rank" --systems tag --experts 3 --steps 3 --save "$tmp/rank.safetensors"
got=
for n in 0 3 4 7 18; do
  got="$got $("$tmp/routes" "$tmp/rank.safetensors" --data "$tmp/rank" --rows $n \
    --csv "$tmp/k.csv" && awk -F, '$1 == "rows" && $3 == "pick" { print $7 }' "$tmp/k.csv")"
done
if [ "$got" = ' 18 3 6 9 18' ]; then ok test_routes_keeps_questions_whole
else fail test_routes_keeps_questions_whole "$got"; fi
# two tasks, and experts that cannot be spared
if run "$tmp/two.safetensors" --rows 20 --text --csv "$tmp/t.csv" --html "$tmp/t.html" \
    > "$tmp/text" && grep -q 'No expert can be disabled' "$tmp/text" &&
   grep -q 'are too few' "$tmp/t.html" && ! grep -q pearson, "$tmp/t.csv" &&
   [ -z "$(sums "$tmp/t.csv" 8)" ] && ! grep -q nan "$tmp/t.csv" "$tmp/t.html"
then
  ok test_routes_takes_two_tasks_and_top_n
else
  fail test_routes_takes_two_tasks_and_top_n \
      "$(sums "$tmp/t.csv" 8) $(grep nan "$tmp/t.csv" | head -n 2)"
fi

# blocks as experts: the router's weights, at the temperatures asked for
cat > "$tmp/blocks.c" << 'END'
#include <stdio.h>
#define MOE_IMPLEMENTATION
#include "moe.h"
/* FROM TO: an untrained model of blocks with the tasks and words of another model */
int main(int argc, char **argv) {
  moe_env env;
  moe_model *from, *to;
  moe_config config;
  moe_task tasks[8];
  moe_tensor tensor;
  const char *vocab;
  size_t bytes, j;
  int i;
  if (argc != 3 || moe_env_init(&env, MOE_ISA_AUTO)) return 1;
  if (moe_model_load(&from, argv[1], &env)) return 1;
  config = *moe_model_config(from);
  config.unit = MOE_UNIT_BLOCK;
  config.router = MOE_ROUTER_TASK_LEVEL;
  config.selection = MOE_SELECT_SOFTMAX;
  config.gate_scale_n = 0;
  for (i = 0; i < 8; ++i) tasks[i] = *moe_model_task(from, i);
  vocab = moe_model_vocab(from, &bytes);
  if (moe_model_create(&to, &config, tasks, 8, 3, &env)) return 1;
  if (moe_model_set_vocab(to, vocab, bytes, &env)) return 1;
  for (i = 0; i < moe_model_tensors(to); ++i)
    if (!moe_model_tensor(to, i, &tensor) &&
        (strstr(tensor.name, "router") || strstr(tensor.name, "vectors")))
      for (j = 0; j < tensor.count; ++j) moe_model_weights(to)[tensor.offset + j] *= 20;
  return moe_model_save(to, argv[2], &env) != MOE_OK;
}
END
if $CC -std=c99 -D_POSIX_C_SOURCE=200809L -O0 -I.. -o "$tmp/blocks" \
    "$tmp/blocks.c" -lm -pthread && "$tmp/blocks" "$tmp/late.safetensors" "$tmp/b.safetensors" &&
   cp "$tmp/b.safetensors" "$tmp/a.safetensors" &&
   run "$tmp/b.safetensors" --rows 10 --checkpoints "$tmp/a.safetensors" --tau 100000,0.01 \
   --text --csv "$tmp/b.csv" --html "$tmp/b.html" > "$tmp/text" &&
   [ -z "$(sums "$tmp/b.csv" 48)" ] && grep -q 'Weight of a block' "$tmp/text" &&
   awk -F, '$1 == "decided" { v[++n] = $7 }
     END { exit !(n == 4 && v[1] < 0.4 && v[2] < 0.4 && v[3] > 0.8 && v[4] > 0.8) }' "$tmp/b.csv"
then ok test_routes_takes_blocks_and_temperatures
else fail test_routes_takes_blocks_and_temperatures "$(grep decided "$tmp/b.csv")"; fi

# the routes that tasklevel looked at during training: the same numbers, and a temperature that
# falls
if program tasklevel && "$tmp/tasklevel" --data $data --tasks pros_cons,intent_match,snips_intents \
    --systems straight,gumbel --layers 2 --hidden 16 --rows 64 --steps 30 --threads 1 \
     --looks 11 --csv "$tmp/looks.csv" --save "$tmp/level.safetensors" > "$tmp/log" 2>&1 &&
   run "$tmp/level-straight-1.safetensors" --rows 20 --history "$tmp/looks.csv" --run 2 \
   --text --csv "$tmp/h.csv" --html "$tmp/h.html" > "$tmp/text" 2> "$tmp/err"
then ok test_routes_takes_a_history
else fail test_routes_takes_a_history "$(tail -n 3 "$tmp/log" "$tmp/err")"; fi
bad=$(awk -F, 'NR == FNR { if ($1 == 2) p["step_" $6, $8, $9, $10] = $11; next }
  $1 == "share_over_time" && $2 ~ /^step/ { ++n; if (p[$2, $3, $4, $5] != $7) print }
  END { if (n != 11 * 18) print n " shares" }' "$tmp/looks.csv" "$tmp/h.csv" | head -n 3)
if [ -z "$bad" ]; then ok test_routes_history_is_tasklevel_s
else fail test_routes_history_is_tasklevel_s "$bad"; fi
if awk -F, '$1 == "temperature" {
    if (n++ && $7 > last + 1e-6) bad = 1
    if (n == 1) first = $7
    last = $7
  }
  $1 == "decided" && $2 == "step_0" { early += $7 }
  $1 == "decided" && $2 == "step_30" { late += $7 }
  END {
    exit !(n == 12 && !bad && first == 2 && last < 0.11 && late > early + 0.5)
  }' "$tmp/h.csv"
then
  ok test_routes_become_discrete_as_the_temperature_falls
else
  fail test_routes_become_discrete_as_the_temperature_falls "$(grep temperature "$tmp/h.csv")"
fi
tips "$tmp/h.csv" "$tmp/h.html"
if [ "$(wc -l < "$tmp/a")" -gt 200 ] && cmp -s "$tmp/a" "$tmp/b" &&
    grep -q '<th>temperature<' "$tmp/h.html"; then
  ok test_routes_html_of_a_history_shows_the_csv_s_numbers
else
  fail test_routes_html_of_a_history_shows_the_csv_s_numbers "$(diff "$tmp/a" "$tmp/b" |
    head -n 5)"
fi

# bad input: exit status 1, a sentence, nothing on standard output
refuses() { # NAME PATTERN ARGUMENTS
  name=$1 pattern=$2; shift 2
  "$tmp/routes" "$@" > "$tmp/out" 2> "$tmp/err"
  status=$?
  if [ $status -eq 1 ] && grep -q -- "$pattern" "$tmp/err" && [ ! -s "$tmp/out" ]; then
    ok test_routes_refuses_$name
  else
    fail test_routes_refuses_$name "status $status: $(cat "$tmp/err")"
  fi
}
mkdir "$tmp/none" "$tmp/bad" && cp -r $data/intent_match "$tmp/bad/" &&
  mkdir "$tmp/bad/pros_cons" &&
  printf 'label\tsentence1\n1\tfine\n2\twhat\n' > "$tmp/bad/pros_cons/dev.tsv"
refuses no_model 'usage: routes MODEL'
refuses two_models '"b" is not an option' a b
refuses an_unknown_option 'unknown option --cvs' m --cvs x
refuses a_missing_value '--csv needs a value' m --csv
refuses a_missing_model 'cannot be opened' "$tmp/nothing.safetensors"
refuses a_foreign_file 'test_routes.sh' test_routes.sh
refuses a_dense_model 'the model is dense' "$tmp/dense.safetensors" --data $data
refuses a_folder_without_data 'dev.tsv' "$tmp/two.safetensors" --data "$tmp/none"
mkdir "$tmp/seven/pros_cons/train.tsv"
refuses training_rows_that_cannot_be_read 'train.tsv: cannot be read' "$tmp/late.safetensors" \
  --data "$tmp/seven" --rows 5
refuses a_label_out_of_range 'pros_cons/dev.tsv:3: label 2 is not one of 0 .. 1' \
  "$tmp/two.safetensors" --data "$tmp/bad"
refuses a_checkpoint_of_another_model 'two.safetensors: 2 tasks, .* has 8' "$tmp/late.safetensors" \
  --data $data --checkpoints "$tmp/two.safetensors"
refuses too_few_temperatures 'a temperature for each' "$tmp/b.safetensors" --data $data --rows 5 \
  --checkpoints "$tmp/b.safetensors" --tau 2
refuses a_temperature_of_0 'tau takes a number from 1e-09' "$tmp/b.safetensors" --data $data \
  --rows 5 --tau 0
refuses an_empty_name_in_the_list 'an empty name' "$tmp/late.safetensors" --data $data \
  --checkpoints ",$tmp/early.safetensors"
refuses a_history_of_several_runs 'there are runs 1 and 2' "$tmp/level-straight-1.safetensors" \
  --data $data --rows 5 --history "$tmp/looks.csv"
refuses a_history_of_other_tasks 'the moment before is not complete' "$tmp/b.safetensors" \
  --data $data --rows 5 --history "$tmp/looks.csv" --run 1
refuses a_history_of_no_run 'there is no row of that run' "$tmp/level-straight-1.safetensors" \
  --data $data --rows 5 --history "$tmp/looks.csv" --run 3
head -n 30 "$tmp/looks.csv" > "$tmp/cut.csv"
refuses a_history_cut_short '29 rows, a moment of this model has 18' \
  "$tmp/level-straight-1.safetensors" --data $data \
  --rows 5 --history "$tmp/cut.csv"
{ head -n 20 "$tmp/looks.csv"; echo 2,straight,0; } > "$tmp/cut.csv"
refuses a_history_with_a_short_row 'cut.csv:21: 3 columns, expected 11' \
  "$tmp/level-straight-1.safetensors" --data $data --rows 5 --history "$tmp/cut.csv"
refuses a_history_of_experts 'experts are blocks' "$tmp/late.safetensors" --data $data \
  --history "$tmp/looks.csv"
refuses a_history_that_is_none 'not the columns of tasklevel' "$tmp/level-straight-1.safetensors" \
  --data $data --rows 5 --history test_routes.sh
# a model whose vocabulary has more words than embeddings: the word list is the last tensor
python=${MOE_PYTHON:-python3}
if have "$python"; then
  "$python" - "$tmp/two.safetensors" "$tmp/words.safetensors" << 'EOF'
import json, struct, sys
data = open(sys.argv[1], "rb").read()
n = struct.unpack("<Q", data[:8])[0]
head = json.loads(data[8:8 + n])
words = head["tokenizer.vocab"]
assert words["data_offsets"][1] == len(data) - 8 - n
more = b"".join(b"word%d\n" % i for i in range(100000)) + b"the\nto\nand\n"
words["shape"][0] += len(more)
words["data_offsets"][1] += len(more)
text = json.dumps(head).encode()
open(sys.argv[2], "wb").write(struct.pack("<Q", len(text)) + text + data[8 + n:] + more)
EOF
  refuses a_vocabulary_beyond_the_embeddings 'words, the model has' "$tmp/words.safetensors" \
    --data $data
else skip test_routes_refuses_a_vocabulary_beyond_the_embeddings "there is no Python"; fi
refuses a_folder_that_is_not_there 'cannot be written' "$tmp/two.safetensors" --rows 5 \
  --data $data --csv "$tmp/no/such/file.csv"
finish
