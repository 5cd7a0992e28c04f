#!/bin/sh
# Ten more inputs as people bring them: what is right, or the one sentence that says what is wrong,
# where, and what to do, before the first step of a training.
. ./lib.sh
for p in train tokenize; do program $p || { fail test_arrivals_compile; finish; }; done
ok test_arrivals_compile
head='name\tinput\tkind\tlabels\tmetric'
at=$tmp/data
# given LINE ROWS [FILE]: a folder with one task t, its train and dev files
given() {
  rm -rf "$at"
  mkdir -p "$at/t"
  cp ../examples/data/vocab.txt "$at"
  printf "$head\n$1\n" > "$at/tasks.tsv"
  printf "$2" | tee "$at/t/train.${3:-tsv}" > "$at/t/dev.${3:-tsv}"
}
run() {
  "$tmp/train" --data "$at" --systems dense --from-scratch --layers 1 --hidden 16 --ffn 32 \
    --heads 2 --steps 2 --batch 4 --threads 1 --resamples 0 --order file \
    --save "$tmp/model" "$@" > "$tmp/out" 2> "$tmp/err"
}
# says NAME PATTERN OPTIONS: one sentence, and no step was made
says() {
  name=test_arrivals_$1 pattern=$2
  shift 2
  rm -f "$tmp/model"
  if run "$@"; then fail "$name" "it did not fail"
  elif [ -e "$tmp/model" ] || grep -q 'step ' "$tmp/err"; then fail "$name" "it has trained"
  elif grep -q -e "$pattern" "$tmp/err" && [ "$(wc -l < "$tmp/err")" = 1 ]; then ok "$name"
  else fail "$name" "$(cat "$tmp/err")"; fi
}
# takes NAME OPTIONS: the model of the plain file
takes() {
  name=test_arrivals_$1
  shift
  rm -f "$tmp/model"
  if run "$@" && cmp -s "$tmp/model" "$tmp/plain"; then ok "$name"
  else fail "$name" "$(cat "$tmp/err")"; fi
}
two='t\tsingle\tclassification\t0=no,1=yes\taccuracy'
given "$two" 'label\tsentence1\n0\ta film\n1\tgood, "really"\n0\tbad\n1\tfine\n'
run && mv "$tmp/model" "$tmp/plain"

# 1 a spreadsheet's CSV: blanks behind the commas of the first line, quotes, \r\n
given "$two" 'label, sentence1\r\n0,a film\r\n1,"good, ""really"""\r\n0,bad\r\n1,fine\r\n' csv
takes blanks_in_the_first_line
# 2 labels in another case than tasks.tsv has them
given "$two" 'label\tsentence1\nNo\ta film\nYes\tfine\n'
says labels_in_another_case 'train.tsv:2: label "No" is none of 0=no, 1=yes'
# 3 numbers with a decimal comma
given 't\tsingle\tregression\t0..5\tpearson' 'label;sentence1\n3,5;a film\n1,0;fine\n' csv
says decimal_commas 'train.csv:2: label "3,5" is not a number'
# 4 labels that begin with 1
given 't\tsingle\tclassification\t1=no,2=yes\taccuracy' 'label\tsentence1\n1\ta\n2\tb\n'
says labels_from_1 'tasks.tsv:2: label 0 should read 0=NAME, not "1=no"'
# 5 a metric by its name elsewhere
given 't\tsingle\tclassification\t0=no,1=yes\tacc' 'label\tsentence1\n1\ta\n0\tb\n'
says an_unknown_metric 'tasks.tsv:2: .*acc.*expected accuracy'
# 6 UTF-16 without its mark
given "$two" 'l\000a\000b\000e\000l\000\t\000s\000\n\000'
says utf16_without_a_mark 'train.tsv:1: a zero byte'
# 7 one JSON document in a file that is called .json
given "$two" '[{"label": 0, "sentence1": "a"}]\n' json
says json_documents 'train.json is there: make it an object a line, train.jsonl'
# 8 weights of PyTorch
given "$two" 'label\tsentence1\n1\ta\n0\tb\n'
mkdir "$tmp/hub"
printf 'PK\003\004abcdefgh' > "$tmp/hub/pytorch_model.bin"
says weights_of_pytorch \
  'pytorch_model.bin: not a safetensors file .* a zip archive, such as PyTorch' \
  --init "$tmp/hub/pytorch_model.bin" --vocab "$at/vocab.txt" --heads 2
# 9 a folder that is not there
says a_folder_that_is_not_there 'no/where/model cannot be written: No such file' \
  --save "$tmp/no/where/model"
# 10 a tokenizer of another kind, and one whose special tokens have other names
printf '{"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}' > "$tmp/hub/tokenizer.json"
says a_tokenizer_of_another_kind 'tokenizer.json: the tokenizer is of kind Unigram, expected' \
  --vocab "$tmp/hub/tokenizer.json"
finish
