#!/bin/sh
# What people get wrong: each ends with status 1 and one sentence that names file, line or tensor,
# and leaves nothing half-written behind.
. ./lib.sh
for p in train predict tokenize; do program $p || { fail test_badinput_compiles; finish; }; done

# how most tasks.tsv below begin, and a row that is right
columns='name\tinput\tkind\tlabels\tmetric' row='good\tsingle\tclassification\t0=a,1=b\taccuracy'

# a tiny folder of two tasks, and a model of it
data=$tmp/data
mkdir "$data" "$data/good" "$data/score" "$tmp/left"
printf '[PAD]\n[UNK]\n[CLS]\n[SEP]\nfine\nbad\nfilm\na\n' > "$data/vocab.txt"
printf '%b\n' "$columns\trows\tmax_len\thard" \
  'good\tsingle\tclassification\t0=no,1=yes\taccuracy\t8\t\t0' \
  'score\tpair\tregression\t0..5\tpearson\t8\t\t0' > "$data/tasks.tsv"
printf 'label\tsentence1\n0\ta bad film\n1\ta fine film\n0\tbad\n1\tfine\n' |
  tee "$data/good/train.tsv" > "$data/good/dev.tsv"
printf 'label\tsentence1\tsentence2\n0.5\ta film\tbad\n4\ta film\ta film\n5\tfine\tfine\n' |
  tee "$data/score/train.tsv" > "$data/score/dev.tsv"
run="--systems tag --experts 2 --max-len 12 --batch 4 --threads 1"
small="--layers 1 --hidden 8 --heads 2 --ffn 16 --from-scratch"
"$tmp/train" --data "$data" $run $small --steps 2 --save "$tmp/model.safetensors" \
  --checkpoint "$tmp/state.safetensors" > "$tmp/out" 2> "$tmp/err" ||
  { fail test_badinput_has_a_model "$(cat "$tmp/err")"; finish; }

# NAME PATTERN COMMAND...: status 1, the sentence, no temporary file and nothing at $tmp/left
refuse() {
  name=test_badinput_$1 pattern=$2
  shift 2
  "$@" < "${input:-/dev/null}" > "$tmp/out" 2> "$tmp/err"
  status=$?
  left=$(find "$tmp" -name '*.tmp' -o -path "$tmp/left/*")
  if [ $status -ne 1 ]; then fail $name "status $status: $(cat "$tmp/err")"
  elif [ -n "$left" ]; then fail $name "left behind: $left"; rm -f $left
  elif ! grep -q -e "$pattern" "$tmp/err"; then fail $name \
      "\"$pattern\" is not in: $(cat "$tmp/err")"
  elif [ "$(grep -c . "$tmp/err")" -gt 3 ]; then fail $name "too many words: $(cat "$tmp/err")"
  else ok $name; fi
}
train() { "$tmp/train" --data "$data" $run $small --steps 2 --save "$tmp/left/model.safetensors" \
  --json "$tmp/left/run.json" "$@"; }
train_long() { "$tmp/train" --data "$data" $run $small --save "$tmp/left/model.safetensors" \
  --json "$tmp/left/run.json" "$@"; }
predict() { "$tmp/predict" "$@"; }
"$tmp/train" --data "$data" --tasks good $run $small --steps 2 --save "$tmp/one.safetensors" \
  > "$tmp/out" 2> "$tmp/err"
# NAME PATTERN FILE TEXT: train with that file of the folder replaced (TEXT as printf takes it; "-":
# the file is missing)
changed() {
  rm -rf "$tmp/changed"
  cp -r "$data" "$tmp/changed"
  if [ "$4" = - ]; then rm "$tmp/changed/$3"; else printf "$4" > "$tmp/changed/$3"; fi
  refuse "$1" "$2" train --data "$tmp/changed"
}
# what editors and spreadsheets leave behind is no mistake: a mark before the UTF-8, CRLF, labels
# with blanks and accents
odd() { # NAME FILE TEXT
  rm -rf "$tmp/changed"
  cp -r "$data" "$tmp/changed"
  printf "$3" > "$tmp/changed/$2"
  if "$tmp/train" --data "$tmp/changed" $run $small --steps 2 > "$tmp/out" 2> "$tmp/err"; then
    ok test_badinput_takes_$1
  else
    fail test_badinput_takes_$1 "$(cat "$tmp/err")"
  fi
}
odd a_mark_before_the_tasks tasks.tsv "\357\273\277$columns\n$row\n"
odd a_mark_before_the_rows good/train.tsv '\357\273\277label\tsentence1\n0\ta\n1\tfine\n'
odd crlf good/train.tsv 'label\tsentence1\r\n0\ta\r\n1\tfine\r\n'
odd blank_lines_among_the_tasks tasks.tsv "$columns\n\n$row\n\n"
odd labels_with_blanks_and_accents tasks.tsv \
  "$columns"'\ngood\tsingle\tclassification\t0=tr\303\250s bon,1="so so" \\\\\taccuracy\n'
odd quotes_as_text good/train.tsv 'label\tsentence1\n0\t"a film\n1\t"fine" ""\n'
odd one_class_in_dev good/dev.tsv 'label\tsentence1\n0\ta\n0\tfine\n'
odd one_row_in_dev good/dev.tsv 'label\tsentence1\n0\ta\n'
odd a_range_beyond_256 tasks.tsv "$columns\nscore\tpair\tregression\t-1e29..1e29\tpearson\n"

if "$tmp/train" --data "$data" $run $small --steps 1 --batch 700 --micro-batch 20 \
    > "$tmp/out" 2> "$tmp/err"; then ok \
    test_badinput_takes_a_batch_beyond_the_tokens_of_a_micro_batch
else fail test_badinput_takes_a_batch_beyond_the_tokens_of_a_micro_batch "$(cat "$tmp/err")"; fi

# ---- options ----
refuse unknown_option 'unknown option --fast' train --fast 1
refuse option_without_dashes '"fast" is not an option' train fast
refuse option_without_value '--lr needs a value' train --lr
refuse number_that_is_none '--lr takes a number .*, not "abc"' train --lr abc
refuse number_with_a_tail '--batch takes a whole number .*, not "4x"' train --batch 4x
refuse number_out_of_range '--batch takes a whole number from 1 .*, not "0"' train --batch 0
refuse number_beyond_all_range '--threads takes .*, not "99999999999999999999999"' train \
  --threads 99999999999999999999999
refuse number_nan '--dropout takes a number .*, not "nan"' train --dropout nan
refuse dropout_of_one '--dropout takes .*, not "1"' train --dropout 1
refuse system_unknown '"gshard" is not one of single, dense, switch, tag' train \
  --systems dense,gshard
refuse system_twice 'dense with seed 1 is listed twice' train --systems dense,dense
refuse seed_that_is_none '--seeds takes .*, not "x"' train --seeds 1,x
refuse isa_unknown '--isa is auto.*"sse"' train --isa sse
refuse sampling_unknown '--sampling is natural.*"fair"' train --sampling fair
refuse sampling_bad_temperature '--sampling temperature:T takes .*"0"' train \
  --sampling temperature:0
refuse order_unknown '--order is shuffle|file, not "random"' train --order random
refuse grid_without_warm_ups '--grid takes a number from 0 to 1, not ""' train --fine-tune 1 \
  --grid 1e-3: --save "$tmp/left/model.safetensors"
refuse from_a_file_that_is_not_there "^train: $tmp/none.safetensors: cannot be opened" train \
  --from "$tmp/none.safetensors"
refuse steps_of_none '--steps takes a whole number from 1 .*, not "0"' train --steps 0
refuse epochs_of_none '--epochs takes a whole number from 1 .*, not "0"' train --epochs 0
refuse max_len_without_room '--max-len takes a whole number from 3 .*, not "2"' train --max-len 2
refuse tokens_beyond_all_steps '--tokens .* are .* steps, 1000000000 are the most' train_long \
  --tokens 1e15
refuse gate_of_no_task '"MRPC" is neither random nor mean nor a task of' "$tmp/train" \
  --data "$data" --from "$tmp/one.safetensors" --adapt score --gate-from MRPC
refuse epochs_and_steps 'give --epochs or --steps' train --epochs 2
refuse top_k_beyond_experts '--top-k 3 is more than --experts 2' train --top-k 3
refuse heads_that_do_not_divide 'heads' train --heads 3
refuse order_file_with_other_sampling 'order' train --order file --sampling uniform

# ---- the folder and its files ----
refuse folder_missing "cannot open $tmp/none/tasks.tsv: No such file" train --data "$tmp/none"
refuse folder_is_a_file 'cannot open .*tasks.tsv' train --data "$data/vocab.txt"
refuse task_unknown "there is no task \"MRPC\" in $data/tasks.tsv" train --tasks good,MRPC
refuse task_asked_twice '--tasks names good twice' train --tasks good,good
changed task_defined_twice 'tasks.tsv:3: task good is listed twice' tasks.tsv \
  "$columns\n$row\n$row\n"
changed tasks_empty 'tasks.tsv: the file is empty' tasks.tsv ''
changed tasks_without_tasks 'tasks.tsv: there are no tasks' tasks.tsv \
  "$columns\n"
changed tasks_without_a_column 'tasks.tsv:1: there is no column "metric"' tasks.tsv \
  'name\tinput\tkind\tlabels\ngood\tsingle\tclassification\t0=a,1=b\n'
changed tasks_short_line 'tasks.tsv:2: 2 columns, expected 5' tasks.tsv \
  "$columns\ngood\tsingle\n"
changed task_kind 'tasks.tsv:2: kind "class" is not one of' tasks.tsv \
  "$columns\ngood\tsingle\tclass\t0=a,1=b\taccuracy\n"
changed task_input 'tasks.tsv:2: input "two" is neither' tasks.tsv \
  "$columns\ngood\ttwo\tclassification\t0=a,1=b\taccuracy\n"
changed task_metric "metrics 'bleu', expected accuracy" tasks.tsv \
  "$columns\ngood\tsingle\tclassification\t0=a,1=b\tbleu\n"
changed task_without_metric 'tasks.tsv:2: metrics have 1 to' tasks.tsv \
  "$columns\ngood\tsingle\tclassification\t0=a,1=b\t\n"
changed task_one_label 'tasks.tsv:2: a task needs at least two labels' tasks.tsv \
  "$columns\ngood\tsingle\tclassification\t0=a\taccuracy\n"
changed task_labels_out_of_order 'tasks.tsv:2: label 1 should read 1=NAME, not "2=b"' tasks.tsv \
  "$columns\ngood\tsingle\tclassification\t0=a,2=b\taccuracy\n"
changed task_range_missing 'tasks.tsv:2: labels of a regression are a range' tasks.tsv \
  "$columns\ngood\tsingle\tregression\t0=a,1=b\tpearson\n"
changed task_range_backwards 'tasks.tsv:2: the range of labels "5..0" is empty' tasks.tsv \
  "$columns\ngood\tsingle\tregression\t5..0\tpearson\n"
changed task_rows 'tasks.tsv:2: rows "many" is not a number' tasks.tsv \
  "$columns\trows\n$row\tmany\n"
changed task_rows_huge 'tasks.tsv:2: rows "1e25" is not a whole number' tasks.tsv \
  "$columns\trows\n$row\t1e25\n"
changed task_name_of_another_folder 'tasks.tsv:2: task "../good": a name has letters, digits' \
  tasks.tsv "$columns\n../$row\n"
changed task_metric_of_classes_for_a_regression \
  "task 'score': metrics 'accuracy', expected pearson or spearman" tasks.tsv \
  "$columns\nscore\tpair\tregression\t0..5000\taccuracy\n"
changed task_rows_negative 'tasks.tsv:2: rows is -4, expected at least 0' tasks.tsv \
  "$columns\trows\n$row\t-4\n"
changed task_max_len_negative 'tasks.tsv:2: max_len is -4' tasks.tsv \
  "$columns\tmax_len\n$row\t-4\n"
changed task_max_len_of_a_pair 'tasks.tsv:2: max_len is 2, the special tokens alone are 3' \
  tasks.tsv "$columns\tmax_len\nscore\tpair\tregression\t0..5\tpearson\t2\n"
changed task_range_not_finite 'tasks.tsv:2: highest label "1e400" is not a number' tasks.tsv \
  "$columns\nscore\tpair\tregression\t0..1e400\tpearson\n"
changed task_max_len 'max_len\|longest\|max_len 1' tasks.tsv \
  "$columns\tmax_len\n$row\t1\n"
changed task_name_too_long 'tasks.tsv:2: a task.s name has 1 to 63 bytes' tasks.tsv \
  "$columns\n$(printf '%091d' 0 | tr 0 a)\tsingle\tclassification\t0=a,1=b\taccuracy\n"

changed train_missing 'task good has no file .*good/train.tsv' good/train.tsv -
changed dev_missing 'task good has no file .*good/dev.tsv' good/dev.tsv -
changed train_empty 'good/train.tsv: the file is empty' good/train.tsv ''
changed train_without_rows 'good/train.tsv: there are no rows' good/train.tsv 'label\tsentence1\n'
changed dev_without_rows 'good/dev.tsv: there are no rows' good/dev.tsv 'label\tsentence1\n'
changed train_without_column 'good/train.tsv:1: there is no column "sentence1"' good/train.tsv \
  'label\ttext\n0\ta\n'
changed pair_without_second_text 'score/train.tsv:1: there is no column "sentence2"' \
  score/train.tsv 'label\tsentence1\n0\ta\n'
changed two_columns_of_a_name 'good/train.tsv:1: two columns are called "label"' good/train.tsv \
  'label\tsentence1\tlabel\n0\ta\t1\n'
changed too_few_columns 'good/train.tsv:3: 1 column, expected 2' good/train.tsv \
  'label\tsentence1\n0\ta\nbad\n'
changed too_many_columns 'good/train.tsv:3: more than the 2 columns' good/train.tsv \
  'label\tsentence1\n0\ta\n0\ta\tb\n'
changed blank_line 'good/train.tsv:3: 1 column, expected 2' good/train.tsv \
  'label\tsentence1\n0\ta\n\n1\tb\n'
changed label_no_number 'good/train.tsv:2: label "often" is none of 0=' good/train.tsv \
  'label\tsentence1\noften\ta\n'
changed label_empty 'good/train.tsv:2: label "" is not a number' good/train.tsv \
  'label\tsentence1\n\ta\n'
changed label_nan 'good/train.tsv:2: label "nan" is not a number' good/train.tsv \
  'label\tsentence1\nnan\ta\n'
changed label_too_large 'good/train.tsv:3: label 2 is not one of 0 .. 1' good/train.tsv \
  'label\tsentence1\n0\tb\n2\ta\n'
changed label_negative 'good/dev.tsv:2: label -1 is not one of 0 .. 1' good/dev.tsv \
  'label\tsentence1\n-1\ta\n'
changed label_huge 'good/dev.tsv:2: label 1e20 is not one of 0 .. 1' good/dev.tsv \
  'label\tsentence1\n1e20\ta\n'
changed label_between 'good/dev.tsv:2: label 0.5 is not one of 0 .. 1' good/dev.tsv \
  'label\tsentence1\n0.5\ta\n'
changed label_outside_the_range 'score/dev.tsv:2: label 5.5 is outside 0..5' score/dev.tsv \
  'label\tsentence1\tsentence2\n5.5\ta\tb\n'
changed label_infinite 'score/train.tsv:2: label "inf" is not a number' score/train.tsv \
  'label\tsentence1\tsentence2\ninf\ta\tb\n'
changed label_beyond_double 'score/train.tsv:2: label "1e400" is not a number' score/train.tsv \
  'label\tsentence1\tsentence2\n1e400\ta\tb\n'
changed bytes_that_control_a_terminal 'score/train.tsv:2: label "1?\[31m" is not a number$' \
  score/train.tsv 'label\tsentence1\tsentence2\n1\033[31m\ta\tb\n'
changed zero_byte 'good/train.tsv:3: a zero byte' good/train.tsv \
  'label\tsentence1\n0\ta\n0\ta\000b\n'
rm -rf "$tmp/changed"
cp -r "$data" "$tmp/changed"
rm "$tmp/changed/good/train.tsv"
mkdir "$tmp/changed/good/train.tsv"
refuse train_is_a_folder 'good/train.tsv' train --data "$tmp/changed"

rm -rf "$tmp/changed"
cp -r "$data" "$tmp/changed"
ln -s dev_2.tsv "$tmp/changed/good/dev_2.tsv"
refuse optional_rows_that_cannot_be_opened 'cannot open .*good/dev_2.tsv' train \
  --data "$tmp/changed"
cp "$tmp/one.safetensors" "$tmp/changed"
ln -s config.json "$tmp/changed/config.json"
refuse config_that_cannot_be_opened 'cannot open .*changed/config.json' train \
  --init "$tmp/changed/one.safetensors" --vocab "$data/vocab.txt" --heads 2

# ---- vocabulary ----
changed vocab_empty 'vocab.txt' vocab.txt ''
changed vocab_without_cls 'vocab.txt.*\[CLS\]' vocab.txt '[PAD]\n[UNK]\n[SEP]\na\n'
changed vocab_without_unk 'vocab.txt.*\[UNK\]' vocab.txt '[PAD]\n[CLS]\n[SEP]\na\n'
refuse vocab_is_a_folder "$tmp/data: a folder" train --vocab "$data"
printf '[PAD]\n[UNK]\n[SEP]\na\n' > "$tmp/bad.txt"
refuse tokenize_without_cls "none of its 4 lines is \[CLS\]" "$tmp/tokenize" "$tmp/bad.txt"
refuse tokenize_folder "$tmp/data: a folder" "$tmp/tokenize" "$data"

# ---- training that cannot go well ----
refuse exploding_rate 'training stopped in step [0-9]* .*smaller --lr\|training stopped in step' \
  train --lr 1e6 --clip 1e30 --steps 400
refuse seen_twice_in_hold_out '--hold-out .* leaves task' train --hold-out 0.0001

# ---- files of weights: --init, --resume and the model of predict ----
printf '' > "$tmp/empty.safetensors"
head -c 3000 "$tmp/model.safetensors" > "$tmp/short.safetensors"
head -c 5 "$tmp/model.safetensors" > "$tmp/five.safetensors"
{ cat "$tmp/model.safetensors"; printf 'abcd'; } > "$tmp/long.safetensors"
printf '\377\377\377\377\377\377\377\177{}' > "$tmp/boast.safetensors"
printf 'PK\003\004 this is a zip archive, as PyTorch writes them, and none of safetensors' \
  > "$tmp/zip.safetensors"
# a safetensors file from its header: 8 bytes of length, the header, COUNT zero bytes
container() { # FILE HEADER COUNT
  length=$(printf '%s' "$2" | wc -c)
  { printf "$(printf '\\%03o\\%03o\\0\\0\\0\\0\\0\\0' $((length % 256)) $((length / 256)))";
    printf '%s' "$2"; head -c "$3" /dev/zero; } > "$1"
}
# the least encoder: vocabulary 8, 4 positions, hidden 2, inner 4, one layer; EDIT is a sed script
# upon the header's lines
cat > "$tmp/tensors" << 'LIST'
embeddings.word_embeddings.weight 8x2 16
embeddings.position_embeddings.weight 16x2 32
embeddings.token_type_embeddings.weight 2x2 4
embeddings.LayerNorm.weight 2 2
embeddings.LayerNorm.bias 2 2
encoder.layer.0.attention.self.query.weight 2x2 4
encoder.layer.0.attention.self.query.bias 2 2
encoder.layer.0.attention.self.key.weight 2x2 4
encoder.layer.0.attention.self.key.bias 2 2
encoder.layer.0.attention.self.value.weight 2x2 4
encoder.layer.0.attention.self.value.bias 2 2
encoder.layer.0.attention.output.dense.weight 2x2 4
encoder.layer.0.attention.output.dense.bias 2 2
encoder.layer.0.attention.output.LayerNorm.weight 2 2
encoder.layer.0.attention.output.LayerNorm.bias 2 2
encoder.layer.0.intermediate.dense.weight 4x2 8
encoder.layer.0.intermediate.dense.bias 4 4
encoder.layer.0.output.dense.weight 2x4 8
encoder.layer.0.output.dense.bias 2 2
encoder.layer.0.output.LayerNorm.weight 2 2
encoder.layer.0.output.LayerNorm.bias 2 2
LIST
encoder() { # FILE EDIT
  sed "$2" "$tmp/tensors" | awk '{
      n = split($2, d, "x"); s = d[1]; for (i = 2; i <= n; ++i) s = s "," d[i]
      type = $4 ? $4 : "F32"; to = at + $3 * (type == "I64" ? 8 : 4)
      printf "%s\"%s\": {\"dtype\": \"%s\", ", NR == 1 ? "{" : ", ", $1, type
      printf "\"shape\": [%s], \"data_offsets\": [%d, %d]}", s, at, to
      at = to }
    END { print "}"; print at > "/dev/stderr" }' > "$tmp/header" 2> "$tmp/count"
  container "$1" "$(cat "$tmp/header")" "$(cat "$tmp/count")"
}
mkdir "$tmp/hub"
encoder "$tmp/hub/good.safetensors" ''
init() { (small=; train --vocab "$data/vocab.txt" --eps 1e-12 --init "$@"); }
if "$tmp/train" --data "$data" --init "$tmp/hub/good.safetensors" --vocab "$data/vocab.txt" \
    --heads 1 --steps 1 --threads 1 --systems dense > "$tmp/out" 2> "$tmp/err"
then ok test_badinput_has_an_encoder; else fail test_badinput_has_an_encoder "$(cat "$tmp/err")"; fi
refuse init_without_heads 'good.safetensors: there is no config.json beside it: give --heads' init \
  "$tmp/hub/good.safetensors"
refuse init_without_vocab '--init needs --vocab' train --init "$tmp/hub/good.safetensors" --heads 1
refuse init_heads_that_do_not_divide 'heads' init "$tmp/hub/good.safetensors" --heads 3
refuse init_max_len_beyond_the_positions '--max-len 17 is more than the 16 positions' init \
  "$tmp/hub/good.safetensors" --heads 1 --max-len 17
printf '[UNK]\n[CLS]\n[SEP]\na\nb\nc\nd\ne\nf\n' > "$tmp/nine.txt"
refuse init_vocab_too_long 'nine.txt has 9 words, but .*good.safetensors has room for 8' train \
  --init "$tmp/hub/good.safetensors" --vocab "$tmp/nine.txt" --heads 1
broken() { # NAME PATTERN EDIT
  encoder "$tmp/hub/bad.safetensors" "$3"
  refuse "init_$1" "$2" init "$tmp/hub/bad.safetensors" --heads 1
}
# an encoder of one kind of segment cannot tell the two texts of a pair from each other
encoder "$tmp/hub/one.safetensors" 's/\(token_type_embeddings.weight\) 2x2 4/\1 1x2 2/'
refuse init_pair_with_one_kind_of_segment \
  'takes pairs of texts, but the encoder knows one kind' init "$tmp/hub/one.safetensors" --heads 1
mkdir "$tmp/said"
cp "$tmp/hub/good.safetensors" "$tmp/said"
printf '{"num_attention_heads": 1, "num_hidden_layers": 3}' > "$tmp/said/config.json"
refuse init_config_json_of_another_model 'num_hidden_layers is 3, but the weights have 1' init \
  "$tmp/said/good.safetensors"
printf '{"num_attention_heads": "1"}' > "$tmp/said/config.json"
refuse init_config_json_with_a_number_as_text \
  'config.json: num_attention_heads is no number, but a text in quotes' init \
  "$tmp/said/good.safetensors"
key=encoder.layer.0.attention.self.key.weight
broken wrong_shape "bad.safetensors: tensor $key: expected .* (2, 2), found F32 of (4, 1)" \
  's/self.key.weight 2x2/self.key.weight 4x1/'
broken wrong_dtype 'bad.safetensors.*self.key.bias.*I64' \
  's/self.key.bias 2 2/self.key.bias 2 2 I64/'
broken missing_tensor 'bad.safetensors.*encoder.layer.0.output.dense.bias' \
  '/layer.0.output.dense.bias/d'
broken missing_words 'bad.safetensors.*word_embeddings' '/word_embeddings/d'
broken foreign_tensors 'bad.safetensors' '/./s/^[a-z]*/wholly_other/'
container "$tmp/hub/none.safetensors" '{}' 0
refuse init_without_tensors 'none.safetensors' init "$tmp/hub/none.safetensors" --heads 1
container "$tmp/hub/json.safetensors" \
  '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}' 4
refuse init_broken_json 'json.safetensors' init "$tmp/hub/json.safetensors" --heads 1
container "$tmp/hub/overlap.safetensors" \
  '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
  "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}' 12
refuse init_overlapping_tensors 'overlap.safetensors' init "$tmp/hub/overlap.safetensors" --heads 1
refuse_model() { printf '{"num_attention_heads": 1, %s}' "$2" > "$tmp/hub/config.json";
  refuse "init_of_$1" "good.safetensors: config.json: $3" init "$tmp/hub/good.safetensors"; }
refuse_model roberta '"model_type": "roberta"' 'model_type is "roberta", expected "bert"'
refuse_model decoder '"is_decoder": true' 'is_decoder is true'
refuse_model relative_positions '"position_embedding_type": "relative_key"' \
  'position_embedding_type is "relative_key"'
refuse_model gelu_new '"hidden_act": "gelu_new"' 'hidden_act is "gelu_new"'
for config in 'no json at all' '{"num_attention_heads": "two"}' '{"num_attention_heads": 3}' \
  '{"num_attention_heads": 1, "hidden_act": "relu"}' ''; do
  printf '%s' "$config" > "$tmp/hub/config.json"
  refuse "init_config_$(printf '%s' "${config:-empty}" | tr -dc 'a-z0-9_')" 'config.json\|heads' \
    init "$tmp/hub/good.safetensors"
done
rm "$tmp/hub/config.json"

for f in missing empty five short long boast zip; do
  refuse init_$f "$f.safetensors" init "$tmp/$f.safetensors" --heads 1
  refuse resume_$f "$f.safetensors" train --resume "$tmp/$f.safetensors"
  input=$tmp/nine.txt
  refuse predict_$f "$f.safetensors" predict "$tmp/$f.safetensors" good
  input=
done
printf '{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}' \
  > "$tmp/index.json"
index='a JSON text, such as the index of weights in several files'
refuse init_index_of_parts "index.json: not a safetensors file .* but $index" \
  init "$tmp/index.json" --heads 1
refuse init_archive_of_pytorch \
  'zip.safetensors: not a safetensors file .* but a zip archive, such as PyTorch' \
  init "$tmp/zip.safetensors" --heads 1
refuse init_is_a_folder "$tmp/hub: a folder" init "$tmp/hub" --heads 1
refuse predict_folder "$tmp/hub: a folder" predict "$tmp/hub" good
refuse predict_device '/dev/zero: a device' predict /dev/zero good
refuse predict_encoder_without_tasks 'good.safetensors' predict "$tmp/hub/good.safetensors" good
refuse resume_model_without_state 'model.safetensors' train --resume "$tmp/model.safetensors"
refuse resume_other_options 'state.safetensors was made with other options' train \
  --resume "$tmp/state.safetensors" --lr 0.5
refuse resume_other_sizes 'state.safetensors' train --resume "$tmp/state.safetensors" --hidden 16
refuse resume_of_one_from_nowhere "cannot open $tmp/none.safetensors: No such file" train \
  --resume "$tmp/none.safetensors"
# of several systems some may not have begun, which is no mistake; but it is said
"$tmp/train" --data "$data" $run $small --steps 1 --systems tag,dense \
  --resume "$tmp/none.safetensors" > "$tmp/out" 2> "$tmp/err"
if [ $? -eq 0 ] && [ "$(grep -c 'there is no .*/none-.*.safetensors: MT-.* starts anew' \
    "$tmp/err")" -eq 2 ]; then ok test_badinput_resume_says_what_begins_anew
else fail test_badinput_resume_says_what_begins_anew "$(cat "$tmp/err")"; fi
# each tensor's header entry spoiled: the file is refused with its name, and nothing crashes
crashed=
for word in F32 shape data_offsets dtype embeddings moe.config moe.tasks hidden experts labels; do
  LC_ALL=C sed "s/$word/$(printf '%s' "$word" | tr 'A-Za-z' 'N-ZA-Mn-za-m')/" \
    "$tmp/model.safetensors" > "$tmp/spoiled.safetensors"
  cmp -s "$tmp/spoiled.safetensors" "$tmp/model.safetensors" && crashed="$crashed $word(not there)"
  echo 'a film' | "$tmp/predict" "$tmp/spoiled.safetensors" good > "$tmp/out" 2> "$tmp/err"
  [ $? -eq 1 ] && grep -q 'spoiled.safetensors' "$tmp/err" ||
    crashed="$crashed $word: $(cat "$tmp/err")"
done
if [ -z "$crashed" ]; then ok test_badinput_predict_spoiled_headers
else fail test_badinput_predict_spoiled_headers "$crashed"; fi

# ---- files that cannot be written: the old one stays as it is ----
refuse save_into_no_folder 'no/such/model.safetensors' train --save "$tmp/no/such/model.safetensors"
refuse save_over_a_folder 'hub cannot be written: Is a directory' train --save "$tmp/hub"
refuse json_into_no_folder 'no/such/run.json cannot be written: No such file' train \
  --json "$tmp/no/such/run.json"
refuse predictions_into_no_folder 'no/such/p.tsv cannot be written: No such file' train \
  --predictions "$tmp/no/such/p.tsv"
refuse checkpoint_into_no_folder 'no/such/c.safetensors' train \
  --checkpoint "$tmp/no/such/c.safetensors"
if [ -c /dev/full ]; then
  for o in save json checkpoint predictions; do
    refuse ${o}_to_a_full_device '/dev/full: writing failed after .*No space left' train \
      --save /dev/null --$o /dev/full
    [ -c /dev/full ] || fail test_badinput_${o}_leaves_the_device
  done
  if train --save /dev/null --json /dev/null > /dev/full 2> "$tmp/err" ||
      ! grep -q 'standard output cannot be written' "$tmp/err"
  then fail test_badinput_table_to_a_full_device "$(cat "$tmp/err")"
  else ok test_badinput_table_to_a_full_device; fi
else skip test_badinput_full_device "there is no /dev/full here"; fi
# a limit upon the size of files, with its signal ignored, is a disk that fills up in the middle
cp "$tmp/model.safetensors" "$tmp/old.safetensors"
limited() { (trap '' XFSZ; ulimit -f 4; "$@"); }
if [ "$(wc -c < "$tmp/model.safetensors")" -gt 8192 ]; then
  refuse save_to_a_full_disk \
    'old.safetensors.tmp: writing failed after [0-9]* bytes: File too large' \
    limited train --json /dev/null --save "$tmp/old.safetensors"
  if cmp -s "$tmp/model.safetensors" "$tmp/old.safetensors"; then
    ok test_badinput_full_disk_keeps_the_old_model
  else
    fail test_badinput_full_disk_keeps_the_old_model
  fi
  cp "$tmp/state.safetensors" "$tmp/old.safetensors"
  refuse checkpoint_to_a_full_disk 'old.safetensors.tmp: writing failed' limited train \
    --json /dev/null --checkpoint "$tmp/old.safetensors"
  if cmp -s "$tmp/state.safetensors" "$tmp/old.safetensors"; then
    ok test_badinput_full_disk_keeps_the_old_checkpoint
  else
    fail test_badinput_full_disk_keeps_the_old_checkpoint
  fi
  printf 'old predictions\n' > "$tmp/old.tsv"
  awk 'BEGIN { print "label\tsentence1"; for (i = 0; i < 400; ++i) print i % 2 "\ta film" }' \
    > "$data/good/dev.tsv"
  refuse predictions_to_a_full_disk 'writing failed\|temporary file' limited train --tasks good \
    --json /dev/null --save /dev/null --predictions "$tmp/old.tsv"
  if [ "$(cat "$tmp/old.tsv")" = 'old predictions' ]; then
    ok test_badinput_full_disk_keeps_the_old_predictions
  else
    fail test_badinput_full_disk_keeps_the_old_predictions
  fi
else fail test_badinput_full_disk "the model is too small for this test"; fi
finish
