#!/bin/sh
# Ranking, span and grouped tasks in train.c: the table's numbers follow from the saved predictions,
# counted here by awk and, where it is installed, by scikit-learn (MOE_PYTHON); and what train says
# to groups and offsets that cannot be.
. ./lib.sh
for p in train predict convert; do program $p || { fail test_kinds_compile; finish; }; done
data=$tmp/data
mkdir -p "$data/choose" "$data/sense" "$data/answer" "$data/once"
cp ../examples/data/vocab.txt "$data/vocab.txt"
{
  printf 'name\tinput\tkind\tlabels\tmetric\trows\n'
  printf 'choose\tpair\tranking\t0=wrong,1=right\taccuracy\t400\n'
  printf 'sense\tpair\tspan\t0=no,1=yes\taccuracy\t400\n'
  printf 'answer\tpair\tclassification\t0=wrong,1=right\tf1\t20000\n'
  printf 'once\tsingle\tclassification\t0=no,1=yes\tmatthews\t90\n'
} > "$data/tasks.tsv"
# Rows of made-up sentences; `choose` has groups of two and three whose rows do not always stand
# together, `sense` has words that end inside a piece and two sentences with characters of several
# bytes.
make_rows() { # SEED ROWS
  awk -v seed="$1" -v rows="$2" -v dir="$data" -v part="$3" 'BEGIN {
    srand(seed)
    n = split("music weather table book play find song good great terrible the movie " \
              "restaurant play rain", w, " ")
    OFS = "\t"
    f = dir "/choose/" part ".tsv"
    print "label", "sentence1", "sentence2", "group" > f
    for (g = 0; g < rows / 2; ++g) {
      k = 2 + g % 2
      right = int(rand() * k)
      for (i = 0; i < k; ++i) {
        a = "what " w[1 + int(rand() * n)]
        b = (i == right ? "good " : "bad ") w[1 + int(rand() * n)]
        line[g, i] = (i == right) OFS a OFS b OFS "q-" g
      }
    }
    for (g = 0; g < rows / 2; g += 2)
      for (i = 0; i < 3; ++i) {
        if (i < 2) print line[g, i] > f
        if (g + 1 < rows / 2) print line[g + 1, i] > f
      }
    f = dir "/sense/" part ".tsv"
    print "label", "sentence1", "sentence2", "start1", "end1", "start2", "end2", "word" > f
    for (i = 0; i < rows; ++i) {
      y = rand() < 0.5
      a = w[1 + int(rand() * n)]
      b = y ? a : w[1 + int(rand() * n)]
      c = i % 50 == 7 ? "caf\303\251 na\303\257ve " : "some "
      m = i % 50 == 7 ? 11 : 5
      print y, c a " here", "there " b, m, m + length(a) - (i % 9 == 0), 6, 6 + length(b), a > f
    }
    f = dir "/answer/" part ".tsv"
    print "label", "sentence1", "sentence2", "group" > f
    for (i = 0; i < rows; ++i) {
      y = rand() < 0.4
      a = "find " w[1 + int(rand() * n)]
      print y + 0, a, (y ? "great " : "terrible ") w[1 + int(rand() * n)], int(i / 3) > f
    }
    f = dir "/once/" part ".tsv"
    print "label", "sentence1" > f
    for (i = 0; i < rows; ++i) print (part == "dev" ? 0 : i % 2), "play " w[1 + int(rand() * n)] > f
  }' < /dev/null
}
make_rows 1 240 train
make_rows 2 120 dev
train() { "$tmp/train" --data "$data" --from-scratch --systems tag --layers 1 --hidden 32 --ffn 64 \
  --heads 2 --max-len 24 --threads 1 --steps 40 "$@"; }
model=$tmp/model.safetensors
if train --json "$tmp/run.json" --predictions "$tmp/said.tsv" --save "$model" > "$tmp/log" 2>&1
then
  ok test_kinds_train_together
else
  fail test_kinds_train_together "$(tail -n 3 "$tmp/log")"; finish
fi
value() { tr '{' '\n' < "$tmp/run.json" |
  sed -n "s/.*\"name\": \"$1\".*\"value\": \([-0-9.e]*\), \"n\".*/\1/p"; }
same() { # NAME TABLE COUNTED
  if [ "$(echo "$2 $3" | awk '{ d = $1 - $2; print (NF == 2 && d < 1e-6 && d > -1e-6) }')" = 1 ]
  then ok "$1"
  else fail "$1" "table: $2, counted: $3"; fi
}

# choose: of each group the row with the largest second score; the groups come from dev.tsv, not
# from train
awk -F '\t' 'NR == FNR { group[FNR] = $4; next }
  $1 == "choose" {
    split($6, v, " ")
    g = group[$3]
    if (!(g in best) || v[2] > best[g]) { best[g] = v[2]; hit[g] = $4; row[g] = $3 }
    p[$3] = $5
  }
  END {
    for (g in best) { ++n; right += hit[g]; if (p[row[g]] != 1) bad = 1 }
    print (bad ? "predictions differ" : right / n)
  }' "$data/choose/dev.tsv" "$tmp/said.tsv" > "$tmp/counted"
same test_kinds_ranking_accuracy "$(value choose)" "$(cat "$tmp/counted")"
awk -F '\t' '$1 == "sense" {
    split($6, v, " ")
    ++n
    right += (v[2] > v[1]) == $4
    if ((v[2] > v[1]) != $5) bad = 1
  }
  END { print (bad ? "predictions differ" : right / n) }' "$tmp/said.tsv" > "$tmp/counted"
same test_kinds_span_accuracy "$(value sense)" "$(cat "$tmp/counted")"
awk -F '\t' '$1 == "answer" { tp += $4 && $5; fp += !$4 && $5; fn += $4 && !$5 }
  END { print 2 * tp / (2 * tp + fp + fn) }' OFMT=%.9g "$tmp/said.tsv" > "$tmp/counted"
same test_kinds_f1a "$(value answer)" "$(cat "$tmp/counted")"
# the other programs follow the same rules: rankings by groups, spans, F1
for t in choose sense answer; do
  "$tmp/predict" "$model" $t --score < "$data/$t/dev.tsv" > "$tmp/said" 2>&1
  same test_kinds_predict_scores_$t "$(value $t)" "$(awk 'NR == 1 { print $2 }' "$tmp/said")"
  "$tmp/convert" "$model" "$tmp/one" --task $t --score "$data/$t/dev.tsv" > "$tmp/said" 2>&1
  before=$(sed -n 's/^.* \([-0-9.]*\) before, .*/\1/p' "$tmp/said" | head -n 1)
  same test_kinds_convert_scores_$t "$(value $t)" "$before"
done
if grep -q '"name": "once".*"defined": false'  "$tmp/run.json" &&
    grep -q '^MT-TaG.* 0.0?' "$tmp/log" && grep -q '^?: the metric has no value' "$tmp/log"
then ok test_kinds_mark_an_undefined_metric
else fail test_kinds_mark_an_undefined_metric "$(grep '^MT-TaG' "$tmp/log")"; fi

python=${MOE_PYTHON:-python3}
if "$python" -c 'import sklearn' 2> /dev/null; then
  cat > "$tmp/check.py" <<'PY'
import csv, sys
from sklearn.metrics import accuracy_score, f1_score
table = lambda path: list(csv.DictReader(open(path), delimiter="\t", quoting=csv.QUOTE_NONE))
rows = table(sys.argv[1])
dev = table(sys.argv[2] + "/choose/dev.tsv")
of = lambda name: [r for r in rows if r["task"] == name]
groups = {}
for r in of("choose"):
    group = groups.setdefault(dev[int(r["line"]) - 2]["group"], [])
    group.append((float(r["scores"].split()[1]), int(r["label"])))
chosen = [max(range(len(g)), key=lambda i: g[i][0]) for g in groups.values()]
right = [[label for _, label in g].index(1) for g in groups.values()]
label = lambda name: [int(r["label"]) for r in of(name)]
said = lambda name: [int(r["prediction"]) for r in of(name)]
print("choose %.9f" % accuracy_score(right, chosen))
print("sense %.9f" % accuracy_score(label("sense"), said("sense")))
print("answer %.9f" % f1_score(label("answer"), said("answer")))
PY
  if "$python" "$tmp/check.py" "$tmp/said.tsv" "$data" > "$tmp/python" 2> "$tmp/err"; then
    for t in choose sense answer; do
      same test_kinds_${t}_as_scikit_learn "$(value $t)" "$(sed -n "s/^$t //p" "$tmp/python")"
    done
  else fail test_kinds_scikit_learn_runs "$(tail -n 2 "$tmp/err")"; fi
else
  skip test_kinds_as_scikit_learn "$python with the package scikit-learn is not here"
fi

# bad input
refuses() { # NAME PATTERN TASK HEADER ROWS
  mkdir -p "$tmp/bad/$3"
  cp "$data/vocab.txt" "$tmp/bad/"
  { head -n 1 "$data/tasks.tsv"; grep "^$3	" "$data/tasks.tsv"; } > "$tmp/bad/tasks.tsv"
  cp "$data/$3/train.tsv" "$tmp/bad/$3/"
  printf "$4\n$5" > "$tmp/bad/$3/dev.tsv"
  "$tmp/train" --data "$tmp/bad" --from-scratch --systems tag --layers 1 --hidden 32 --ffn 64 \
    --heads 2 --max-len 24 --threads 1 --steps 1 > "$tmp/out" 2> "$tmp/err"
  status=$?
  if [ $status -eq 1 ] && grep -q -- "$2" "$tmp/err"; then ok test_kinds_refuse_$1
  else fail test_kinds_refuse_$1 "status $status: $(cat "$tmp/err")"; fi
}
h='label\tsentence1\tsentence2\tgroup'
refuses a_group_without_answer 'dev.tsv:2: the group that begins here has 0 choices with label 1' \
  choose "$h" '0\ta\tb\tq1\n0\ta\tc\tq1\n'
refuses a_group_with_two_answers \
  'dev.tsv:3: the group that begins here has 2 choices with label 1' choose "$h" \
  '1\ta\tb\tq1\n1\ta\tb\tq2\n0\ta\tc\tq1\n1\ta\tc\tq2\n'
refuses a_group_of_one 'dev.tsv:2: the group of this row has no other choice' choose \
  "$h" '1\ta\tb\tq1\n'
refuses a_ranking_without_groups 'there is no column "group"' choose 'label\tsentence1\tsentence2' \
  '1\ta\tb\n'
h='label\tsentence1\tsentence2\tstart1\tend1\tstart2\tend2'
refuses a_word_outside \
  'dev.tsv:2: characters 5 to 9 of sentence1, which has 8 characters, are not a word' sense "$h" \
  '1\tsome car\tcar\t5\t9\t0\t3\n'
refuses a_word_before_the_sentence 'dev.tsv:2: characters -1 to 3 of sentence1' sense \
  "$h" '1\tsome car\tcar\t-1\t3\t0\t3\n'
refuses an_empty_word 'dev.tsv:2: characters 2 to 2 of sentence2' sense \
  "$h" '1\tsome car\tcar\t0\t3\t2\t2\n'
refuses a_word_beyond_the_characters_of_utf_8 \
  'characters 5 to 9 of sentence1, which has 8 characters' sense "$h" \
  '1\t\303\251t\303\251 fini\tcar\t5\t9\t0\t3\n'
refuses a_half_offset 'dev.tsv:2: start "0.5" is not a whole number' sense \
  "$h" '1\tsome car\tcar\t0.5\t3\t2\t2\n'
long='a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a car'
refuses a_word_that_was_cut 'dev.tsv:2: the word at characters 64 to 67 of sentence1 was cut off' \
  sense "$h" "1\t$long\tcar\t64\t67\t0\t3\n"
finish
