#!/bin/sh
# Data as people have it: each file below holds the rows of a plain TSV file in another form, and a
# model trained on it must have the same bits; what is no such file gets a sentence.
. ./lib.sh
program train || { fail test_data_compiles; finish; }
ok test_data_compiles
vocab=../examples/data/vocab.txt
head="name\tinput\tkind\tlabels\tmetric"

# begin NAME LINE: a folder with one task t
begin() {
  at=$tmp/$1
  rm -rf "$at"
  mkdir -p "$at/t"
  cp $vocab "$at/vocab.txt"
  printf "$head$3\n$2\n" > "$at/tasks.tsv"
}
# model FOLDER OPTIONS: trains two steps; the model goes to FOLDER.safetensors
model() {
  folder=$1
  shift
  "$tmp/train" --data "$tmp/$folder" --systems dense --from-scratch --layers 1 --hidden 16 \
    --ffn 32 --heads 2 --steps 2 --batch 4 --threads 1 --resamples 0 --order file \
    --save "$tmp/$folder.safetensors" "$@" > "$tmp/out" 2> "$tmp/err"
}
# same NAME FOLDER OPTIONS: as the model of `plain`
same() {
  name=test_data_$1
  rm -f "$tmp/$2.safetensors"
  shift
  if model "$@" && cmp -s "$tmp/$1.safetensors" "$plain"; then ok "$name"
  else fail "$name" "$(cat "$tmp/err")"; fi
}
# refused NAME PATTERN FOLDER OPTIONS
refused() {
  name=test_data_$1 pattern=$2
  shift 2
  if model "$@"; then fail "$name" "it did not fail"
  elif grep -q -e "$pattern" "$tmp/err" && [ "$(wc -l < "$tmp/err")" = 1 ]; then ok "$name"
  else fail "$name" "$(cat "$tmp/err")"; fi
}
plain_model() { # FOLDER
  plain=$tmp/$1.safetensors
  model "$1" || fail "test_data_plain_$1" "$(cat "$tmp/err")"
}

# ---- one text ----
one='t\tsingle\tclassification\t0=bad,1=good\taccuracy'
begin plain "$one"
printf 'label\tsentence1\n1\ta good; film, "really"\n0\ta bad film\n1\tcafé\n0\tbad\n' \
  | tee "$at/t/train.tsv" > "$at/t/dev.tsv"
plain_model plain

begin names "$one"
printf '%b\n' 'label\tsentence1' 'good\ta good; film, "really"' ' bad \ta bad film' \
  '1 \tcafé' ' 0\tbad' '' '' | tee "$at/t/train.tsv" > "$at/t/dev.tsv"
same takes_names_of_labels_blanks_and_empty_lines_at_the_end names

begin columns "$one\tclass\ttext" "\tlabel_column\tsentence1_column"
printf '%b\n' 'id\ttext\tclass\tmore' '1\ta good; film, "really"\t1\t' \
  '2\ta bad film\t0\tx' '3\tcafé\t1\t' '4\tbad\t0\t' | tee "$at/t/train.tsv" > "$at/t/dev.tsv"
same takes_columns_by_their_own_names columns

begin numbers "$one\t@2\t@4" "\tlabel_column\tsentence1_column"
printf 'x\t1\t*\ta good; film, "really"\nx\t0\t*\ta bad film\nx\t1\t\tcafé\nx\t0\t\tbad\n' \
  | tee "$at/t/train.tsv" > "$at/t/dev.tsv"
same takes_files_without_names_of_columns numbers

begin comma "$one"
printf '%b' 'sentence1,label\r\n"a good; film, ""really""",1\r\na bad film,0\r\n' \
  'café,good\r\n"bad","bad"' | tee "$at/t/train.csv" > "$at/t/dev.csv"
same takes_csv comma

begin semicolon "$one"
printf '%b\n' '\0357\0273\0277"label";"sentence1"' '1;"a good; film, ""really"""' \
  '0;a bad film' '1;café' '0;bad' '' | tee "$at/t/train.csv" > "$at/t/validation.csv"
same takes_csv_with_semicolons_and_a_byte_order_mark semicolon

begin object "$one\tanswer.is\tquestion.text" "\tlabel_column\tsentence1_column"
cat > "$at/t/train.jsonl" << 'end'
{"answer": {"is": true, "by": null}, "question": {"text": "a good; film, \"really\"", "n": [1, {}]}}
{"question": {"text": "a bad film"}, "answer": {"is": 0}}
{"answer": {"is": "good"}, "question": {"text": "caf\u00e9"}}

{"answer": {"is": false}, "question": {"text": "bad"}}
end
cp "$at/t/train.jsonl" "$at/t/val.jsonl"
same takes_jsonl object

begin wide "$one"
if command -v iconv > "$tmp/log"; then
  for f in train dev; do
    { printf '\377\376'; iconv -f UTF-8 -t UTF-16LE "$tmp/plain/t/$f.tsv"; } > "$at/t/$f.tsv"
  done
  same takes_utf16 wide
  for f in train dev; do
    { printf '\376\377'; iconv -f UTF-8 -t UTF-16BE "$tmp/plain/t/$f.tsv"; } > "$at/t/$f.tsv"
  done
  same takes_utf16_of_the_other_order wide
else
  skip test_data_takes_utf16 "there is no iconv here"
fi

begin joined "$one\tlabel\ta + b" "\tlabel_column\tsentence1_column"
printf 'label\ta\tb\n1\ta good;\tfilm, "really"\n0\ta bad\tfilm\n1\tcafé\t\n0\tbad\t\n' \
  | tee "$at/t/train.tsv" > "$at/t/dev.tsv"
same joins_columns joined

# ---- --split: a lone file, class by class, by the seed ----
begin lone "$one"
rm -r "$at/t"
awk 'BEGIN { OFS = "\t"; print "label", "sentence1"
  for (i = 0; i < 100; ++i) print i % 10 == 0, "film " i }' > "$at/t.tsv"
# count_of LABEL: in the dev set, by the answers that are saved
split() { model lone --split 0.2 "$@" --predictions "$tmp/answers.tsv"; }
count_of() { awk -F '\t' -v l="$1" '$4 == l' "$tmp/answers.tsv" | wc -l | tr -d ' '; }
if split && [ "$(count_of 0)/$(count_of 1)" = 18/2 ]; then ok test_data_split_keeps_the_classes
else fail test_data_split_keeps_the_classes "$(count_of 0)/$(count_of 1) $(cat "$tmp/err")"; fi
cut -f 1-4 "$tmp/answers.tsv" > "$tmp/first"
split && cut -f 1-4 "$tmp/answers.tsv" > "$tmp/second"
split --split-seed 2 && cut -f 1-4 "$tmp/answers.tsv" > "$tmp/third"
if cmp -s "$tmp/first" "$tmp/second" && ! cmp -s "$tmp/first" "$tmp/third"; then
  ok test_data_split_follows_its_seed
else fail test_data_split_follows_its_seed; fi
refused split_is_offered 'lone/t/dev.tsv (or .csv, .jsonl); --split 0.1' lone

# ---- the official folders of GLUE and SuperGLUE, in small ----
glue=$tmp/glue
rows() { # FILE: the rows of standard input twice, the second time as dev
  mkdir -p "$(dirname "$glue/$1")"
  cat > "$glue/$1"
}
both() { rows "$1/train.tsv"; cp "$glue/$1/train.tsv" "$glue/$1/dev.tsv"; }
p='a film\tfine'
mkdir -p "$glue"
cp $vocab "$glue"
printf 'gj04\t1\t\tOur friends fine.\ngj04\t0\t*\tThe bad "film.\n' | both CoLA
printf 'sentence\tlabel\na fine film\t1\nbad\t0\n' | both SST-2
printf "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\t$p\n0\t7\t9\t$p\n" | both MRPC
printf "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n" \
  > "$tmp/sts"
printf "0\tmain\tMSR\t2012\t1\tnone\tnone\t$p\t5.000\n1\tmain\tMSR\t2012\t4\tx\ty\t$p\t0.4\n" \
  | cat "$tmp/sts" - | both STS-B
printf "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\t$p\t0\n4\t5\t6\t$p\t1\n" \
  | both QQP
m='index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse'
m="$m\tsentence2_parse\tsentence1\tsentence2\tlabel1"
q='1\t1c\tfiction\t( a film )\t( fine )\t(ROOT a)\t(ROOT b)'
printf "$m\tgold_label\n0\t$q\t$p\tneutral\tneutral\n1\t$q\t$p\tcontradiction\tentailment\n" \
  | rows MNLI/train.tsv
for set in matched mismatched; do
  n='neutral\tneutral'
  printf "$m\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n0\t$q\t$p\t$n\t$n\t$n\n" \
    | rows MNLI/dev_$set.tsv
done
printf "index\tquestion\tsentence\tlabel\n0\t$p\tentailment\n1\t$p\tnot_entailment\n" | both QNLI
printf "index\tsentence1\tsentence2\tlabel\n0\t$p\tnot_entailment\n1\t$p\tentailment\n" | both RTE
table_of() { # NAME TASKS FOLDER LIST
  if model "$3" --task-list ../examples/data/$4 --batch 16 && grep -q "$2" "$tmp/out"; then ok "$1"
  else fail "$1" "$(cat "$tmp/err") $(head -n 4 "$tmp/out")"; fi
}
table_of test_data_reads_glue_as_downloaded 'train/dev rows  *2/2  *2/2  *2/2  *2/2  *2/2  *2/2' \
  glue glue.tsv

glue=$tmp/super
mkdir "$glue"
cp $vocab "$glue"
lines() { rows "$1/train.jsonl"; cp "$glue/$1/train.jsonl" "$glue/$1/val.jsonl"; }
lines BoolQ << 'end'
{"question": "is it a film", "passage": "Film -- it is a film", "idx": 0, "label": true}
{"question": "is it bad", "passage": "Film -- it is fine", "idx": 1, "label": false}
end
lines CB << 'end'
{"premise": "a film", "hypothesis": "fine", "label": "entailment", "idx": 0}
{"premise": "a film", "hypothesis": "bad", "label": "contradiction", "idx": 1}
end
lines COPA << 'end'
{"premise": "A film.", "choice1": "fine", "choice2": "bad", "question": "cause", "label": 1}
{"premise": "My film.", "choice1": "fine", "choice2": "bad", "question": "effect", "label": 0}
end
tr -d '\n' << 'end' | lines MultiRC
{"idx": 0, "passage": {"text": "a film", "questions": [
  {"question": "is it", "answers": [{"text": "yes", "idx": 0, "label": 1},
    {"text": "no", "idx": 1, "label": 0}], "idx": 0},
  {"question": "was it", "answers": [{"text": "no", "idx": 2, "label": 1}], "idx": 1}]}}
end
lines RTE << 'end'
{"premise": "a film", "hypothesis": "fine", "label": "not_entailment", "idx": 0}
{"premise": "a film", "hypothesis": "bad", "label": "entailment", "idx": 1}
end
w='"word": "film", "sentence1": "a film", "sentence2": "the film"'
w="$w, \"start1\": 2, \"start2\": 4, \"end1\": 6, \"end2\": 8, \"version\": 1.1"
printf '{%s, "label": %s}\n' "$w" false "$w" true | lines WiC
table_of test_data_reads_superglue_as_downloaded \
  'train/dev rows  *2/2  *2/2  *4/4  *3/3  *2/2  *2/2' \
  super superglue.tsv

# ---- class weights: the loss of the first step is PyTorch's CrossEntropyLoss(weight=...), from the
# logits of the same rows before it (the rate is as good as 0) ----
begin weighted 't\tsingle\tclassification\t0=a,1=b,2=c\taccuracy\t1,0.5,3' '\tclass_weights'
printf 'label\tsentence1\n0\ta film\n2\tbad music\n2\tgood\n1\tplay\n0\tfind\n1\tx y\n' \
  | tee "$at/t/train.tsv" > "$at/t/dev.tsv"
weighted() { # OPTIONS
  "$tmp/train" --data "$tmp/weighted" --systems dense --from-scratch --layers 1 --hidden 16 \
    --ffn 32 --heads 2 --steps 1 --batch 6 --lr 1e-9 --dropout 0 --threads 1 --resamples 0 \
    --log "$tmp/log.csv" --predictions "$tmp/p.tsv" "$@" > "$tmp/out" 2> "$tmp/err"
}
# the loss that is logged, and that of the weights $1, of CrossEntropyLoss's mean
losses() {
  awk -F '[,\t]' -v w="$1" 'BEGIN { split(w, weight, " ") }
    FNR == 2 && NR == 2 { loss = $3 }
    NR > FNR && FNR > 1 {
      split($6, x, " ")
      sum += weight[$4 + 1]
      all += weight[$4 + 1] * (log(exp(x[1]) + exp(x[2]) + exp(x[3])) - x[$4 + 1])
    }
    END { want = all / sum / log(3); d = loss - want
      print (d < 2e-6 && d > -2e-6), loss, want }' \
    "$tmp/log.csv" "$tmp/p.tsv"
}
weighted
said=$(losses '1 0.5 3')
if [ "${said%% *}" = 1 ]; then ok test_data_class_weights_are_those_of_cross_entropy_loss
else fail test_data_class_weights_are_those_of_cross_entropy_loss "$said $(cat "$tmp/err")"; fi
weighted --micro-batch 24
said=$(losses '1 0.5 3')
if [ "${said%% *}" = 1 ]; then ok test_data_class_weights_of_micro_batches
else fail test_data_class_weights_of_micro_batches "$said"; fi
weighted --checkpoint "$tmp/weighted.ck"
sed -i.old 's/1,0.5,3/1,1,1/' "$at/tasks.tsv"
weighted --resume "$tmp/weighted.ck"
if grep -q 'class_weights there t:1,0.5,3, here t:1,1,1' "$tmp/err"; then
  ok test_data_class_weights_that_differ_are_told
else fail test_data_class_weights_that_differ_are_told "$(cat "$tmp/err")"; fi
sed 's/1,0.5,3/balanced/' "$at/tasks.tsv.old" > "$at/tasks.tsv"
printf '0\tmore\n0\tand more\n0\tand so on\n' >> "$at/t/train.tsv"
cp "$at/t/train.tsv" "$at/t/dev.tsv"
weighted --batch 9
said=$(losses '0.6 1.5 1.5')
if [ "${said%% *}" = 1 ]; then ok test_data_class_weights_balance
else fail test_data_class_weights_balance "$said $(cat "$tmp/err")"; fi

# ---- without any vocabulary ----
begin learned "$one"
cp "$tmp/plain/t/"* "$at/t"
rm "$at/vocab.txt"
if model learned && grep -q 'no .*learned/vocab.txt: a vocabulary of [0-9]* words was learned' \
    "$tmp/out"; then ok test_data_learns_a_vocabulary_where_there_is_none
else fail test_data_learns_a_vocabulary_where_there_is_none "$(cat "$tmp/out" "$tmp/err")"; fi

# ---- what it is not ----
begin wrong "$one"
cp "$tmp/plain/t/"* "$at/t"
# bad NAME PATTERN FORMAT [FILE]: what printf makes of FORMAT is train.tsv, or FILE in its place
bad() {
  printf "$3" > "$tmp/wrong/t/${4:-train.tsv}"
  refused "$1" "$2" wrong
  rm "$tmp/wrong/t/${4:-train.tsv}"
}
rm "$tmp/wrong/t/train.tsv"
bad names_latin1 'train.tsv:2: byte 0xe9 is not UTF-8.*iconv' \
  'label\tsentence1\n0\tcaf\351 bad\n'
bad names_gzip 'train.tsv: the file is compressed with gzip.*gunzip' \
  '\037\213\010\000abc'
bad names_spreadsheets 'train.tsv: the file is a zip archive or a spreadsheet' \
  'PK\003\004abc'
bad names_parquet 'train.tsv: the file is Parquet' \
  'PAR1abc'
bad names_csv_called_tsv 'no tab in the first line.*\.csv' \
  'label,sentence1\n0,a\n'
bad names_the_columns_that_are_there \
  'there is no column "label", but Label, Text; tasks.tsv may say.*label_column' \
  'Label\tText\n0\ta\n'
bad names_the_labels 'label "nice" is none of 0=bad, 1=good' \
  'label\tsentence1\nnice\ta\n'
bad sees_an_empty_line_between 'train.tsv:3: 1 column, expected 2' \
  'label\tsentence1\n0\ta\n\n1\tb\n'
bad sees_half_a_utf16 'UTF-16 of an odd number of bytes' \
  '\377\376a'
bad sees_a_zero_byte 'train.tsv:2: a zero byte' \
  'label\tsentence1\n0\ta\000b\n'
bad sees_an_open_quote 'train.csv:2: a quoted field that begins here has no closing quote' \
  'label,sentence1\n0,"a\n1,b\n' train.csv
bad sees_a_quote_inside 'train.csv:2: field 2: a quote' \
  'label,sentence1\n0,"a"b\n' train.csv
bad names_a_json_array 'train.jsonl:1: a JSON array.*jq' \
  '[{"label": 0}]\n' train.jsonl
bad names_the_members 'train.jsonl:1: there is no "sentence1" here, but label, text' \
  '{"label": 0, "text": "a"}\n' train.jsonl
bad sees_broken_json 'train.jsonl:1: a string has no' \
  '{"label": 0, "sentence1": "a}\n' train.jsonl
bad sees_null 'there is no "label" here' \
  '{"label": null, "sentence1": "a"}\n' train.jsonl
bad sees_a_member_twice 'two members are called "label"' \
  '{"label": 0, "label": 1, "sentence1": "a"}\n' train.jsonl
printf '{"label": 0, "sentence1": "a"}\n' > "$tmp/wrong/t/train.jsonl"
bad sees_two_files 'both .*train.csv and .*train.jsonl' \
  'label,sentence1\n0,a\n' train.csv
finish
