#!/bin/sh
# Tokenizers as they are published, beside weights: the model must have the bits of the one made
# with vocab.txt; what moe.h's tokenizer does not do is refused by name.
. ./lib.sh
for p in train tokenize predict convert; do
  program $p || { fail test_encoder_compiles; finish; }
done
ok test_encoder_compiles
vocab=../examples/data/vocab.txt
run="--data ../examples/data --tasks pros_cons --systems dense --steps 2 --batch 4 --threads 1"
run="$run --resamples 0 --max-len 24"
hub=$tmp/hub
mkdir "$hub"
"$tmp/train" $run --from-scratch --layers 1 --hidden 16 --ffn 32 --heads 2 \
  --save "$hub/model.safetensors" > "$tmp/out" 2> "$tmp/err" || {
  fail test_encoder_has_weights "$(cat "$tmp/err")"
  finish
}
cat > "$hub/config.json" << 'end'
{"model_type": "bert", "num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 1,
 "intermediate_size": 32, "vocab_size": 4000, "max_position_embeddings": 128}
end
# train from the weights; the model goes to FILE
from_hub() { # FILE OPTIONS
  file=$1
  shift
  rm -f "$file"
  "$tmp/train" $run --init "$hub/model.safetensors" --save "$file" "$@" > "$tmp/out" 2> "$tmp/err"
}
same() { # NAME FILE
  if cmp -s "$tmp/plain" "$2"; then ok "$1"; else fail "$1" "$(cat "$tmp/err")"; fi
}
refused() { # NAME PATTERN OPTIONS
  name=$1 pattern=$2
  shift 2
  if from_hub "$tmp/no" "$@"; then fail "$name" "it did not fail"
  elif grep -q -e "$pattern" "$tmp/err"; then ok "$name"
  else fail "$name" "$(cat "$tmp/err")"; fi
}
refused test_encoder_without_a_vocabulary 'no vocab.txt and no tokenizer.json beside it'
from_hub "$tmp/plain" --vocab $vocab || fail test_encoder_takes_a_vocabulary "$(cat "$tmp/err")"
cp $vocab "$hub"
from_hub "$tmp/beside"
same test_encoder_finds_vocab_txt_beside_the_weights "$tmp/beside"
rm "$hub/vocab.txt"

# tokenizer_json NORMALIZER KIND: of the bundled vocabulary, its members in an order of their own
tokenizer_json() {
  {
    printf '{"version": "1.0", "truncation": null, "added_tokens": [{"id": 1, "content": "[UNK]",'
    printf ' "special": true}], "normalizer": %s,\n' "$1"
    printf '"pre_tokenizer": {"type": "BertPreTokenizer"},\n'
    printf ' "model": {"type": "%s", "unk_token": "[UNK]", "vocab": {' "$2"
    sed 's/[\\"]/\\&/g' $vocab | awk '{ line[NR] = $0 }
      END { for (i = NR; i > 0; --i) printf "\"%s\": %d%s", line[i], i - 1, (i > 1 ? ",\n" : "") }'
    printf '}, "continuing_subword_prefix": "##"}}\n'
  } > "$hub/tokenizer.json"
}
bert='{"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true'
tokenizer_json "$bert, \"strip_accents\": null, \"lowercase\": true}" WordPiece
from_hub "$tmp/json"
same test_encoder_reads_tokenizer_json "$tmp/json"
from_hub "$tmp/json" --vocab "$hub/tokenizer.json"
same test_encoder_takes_tokenizer_json_as_vocab "$tmp/json"
tokenizer_json "$bert, \"lowercase\": false}" WordPiece
from_hub "$tmp/cased" --vocab "$hub/tokenizer.json"
from_hub "$tmp/too" --vocab $vocab --cased
if cmp -s "$tmp/cased" "$tmp/too" && ! cmp -s "$tmp/cased" "$tmp/plain"; then
  ok test_encoder_tokenizer_json_says_whether_capitals_count
else fail test_encoder_tokenizer_json_says_whether_capitals_count "$(cat "$tmp/err")"; fi
tokenizer_json "$bert}" BPE
refused test_encoder_names_another_kind 'tokenizer.json: the tokenizer is of kind BPE, expected'
tokenizer_json '{"type": "NFC"}' WordPiece
refused test_encoder_names_another_normalizer 'the normalizer is NFC, expected BertNormalizer'
tokenizer_json '{"type": "BertNormalizer", "clean_text": false}' WordPiece
refused test_encoder_refuses_control_characters 'clean_text is false'
tokenizer_json "$bert}" WordPiece
head -c 300 "$hub/tokenizer.json" > "$tmp/cut.json"
refused test_encoder_sees_json_that_is_cut 'cut.json: byte [0-9]*: ' --vocab "$tmp/cut.json"
rm "$hub/tokenizer.json"

cp $vocab "$hub"
said() { printf '%s' "$1" > "$hub/tokenizer_config.json"; }
said '{
  "do_lower_case"
    : true, "strip_accents": null, "tokenizer_class": "BertTokenizerFast", "added_tokens_decoder":
  {"0": {"content": "[PAD]", "special": true}}, "cls_token": {"content": "[CLS]"}, "x": [1, {}]}'
from_hub "$tmp/config"
same test_encoder_reads_tokenizer_config_json "$tmp/config"
said '{"do_lower_case": false}'
from_hub "$tmp/config"
if cmp -s "$tmp/config" "$tmp/too"; then ok test_encoder_config_says_whether_capitals_count
else fail test_encoder_config_says_whether_capitals_count "$(cat "$tmp/err")"; fi
said '{"tokenizer_class": "BertJapaneseTokenizer"}'
refused test_encoder_names_another_class 'tokenizer_class is BertJapaneseTokenizer, expected'
said '{"do_lower_case": tru'
refused test_encoder_sees_a_damaged_config 'tokenizer_config.json: byte [0-9]*: '
said '{"do_lower_case": true, "strip_accents": false, "tokenize_chinese_chars": false}'
from_hub "$tmp/config"
if grep -aq 'cased\\\\":6,' "$tmp/config" || grep -aq 'cased\\":6,' "$tmp/config"; then
  ok test_encoder_keeps_the_settings_in_the_model
else fail test_encoder_keeps_the_settings_in_the_model "$(cat "$tmp/err")"; fi

# ---- ids: the files of a folder, one beside another (as transformers 5 reads them) ----
few=$tmp/few
mkdir "$few"
printf '%s\n' '[PAD]' '[UNK]' '[CLS]' '[SEP]' '[MASK]' été ete 中 国 中国 '##x' '[unused0]' \
  > "$few/vocab.txt"
ids() { # NAME EXPECTED TEXT: of the files in `few`
  said=$(echo "$3" | "$tmp/tokenize" "$few/vocab.txt" 2>&1)
  if [ "$said" = "2 $2 3" ]; then ok "$1"; else fail "$1" "$said"; fi
}
wrong() { # NAME PATTERN
  if said=$(echo a | "$tmp/tokenize" "${3:-$few/vocab.txt}" 2>&1); then fail "$1" "$said"
  elif echo "$said" | grep -q -e "$2"; then ok "$1"
  else fail "$1" "$said"; fi
}
setting() { printf '%s' "$2" > "$few/$1"; }
none() { rm -f "$few"/*.json; }
t='[E1] été 中国'
ids test_encoder_ids_as_usual '1 1 1 6 7 8' "$t"
setting tokenizer_config.json '{"strip_accents": false}'
ids test_encoder_ids_with_accents '1 1 1 5 7 8' "$t"
setting tokenizer_config.json '{"do_lower_case": false}'
ids test_encoder_ids_of_cased_text '5 1 1' 'été ÉTÉ Ete'
setting tokenizer_config.json '{"do_lower_case": false, "strip_accents": true}'
ids test_encoder_ids_of_cased_text_without_accents '6 1 6' 'été ÉTÉ ete'
setting tokenizer_config.json '{"tokenize_chinese_chars": false}'
ids test_encoder_ids_of_whole_ideographs '1 1 1 6 9 7 1' "$t 中 a国"
e1='{"content": "[E1]", "special": true}'
setting tokenizer_config.json "{\"added_tokens_decoder\": {\"12\": $e1}}"
ids test_encoder_ids_of_added_tokens '12 6 7 8 1 1 1' "$t[e1]"
setting tokenizer_config.json '{"added_tokens_decoder": {"11": {"content": "[unused0]"}}}'
ids test_encoder_ids_of_added_words '11 1 1 1' '[Unused0] [E1]'
none
setting special_tokens_map.json '{"unk_token": "[UNK]", "additional_special_tokens": ["[E1]"]}'
ids test_encoder_ids_of_special_tokens '12 6 7 8 1 1 1' "$t[e1]"
none
setting added_tokens.json '{"[E1]": 12, "x y": 13}'
ids test_encoder_ids_of_added_tokens_json '12 6 7 8 12 13' "$t[e1]X Y"

# the model file keeps them: out of it comes a folder with the same
cp "$few"/vocab.txt "$few"/added_tokens.json "$hub"
echo '{"added_tokens_decoder": {"14": {"content": "xa", "single_word": true}}}' \
  > "$hub/tokenizer_config.json"
if from_hub "$tmp/few.safetensors" &&
    "$tmp/convert" "$tmp/few.safetensors" --hf "$tmp/again" > "$tmp/out" 2> "$tmp/err"; then
  few=$tmp/again
  ids test_encoder_ids_come_back_from_the_model '12 6 7 8 12 13 14 1' "$t[e1]X Y xa xab"
  few=$tmp/few
else fail test_encoder_ids_come_back_from_the_model "$(cat "$tmp/err")"; fi
rm "$hub/added_tokens.json"

# ---- weights in several files, in F64, beside a dtype that nobody knows ----
rm -f "$hub"/*_config.json
cp $vocab "$hub"
if have python3; then
  cat > "$tmp/split.py" << 'end'
import array, json, struct, sys
folder = sys.argv[1]
data = open(folder + "/model.safetensors", "rb").read()
n = struct.unpack("<Q", data[:8])[0]
head = json.loads(data[8:8 + n])
head.pop("__metadata__", None)
parts, index = [[{}, b""], [{}, b""]], {}
for i, (name, t) in enumerate(head.items()):
    begin, end = t["data_offsets"]
    body = data[8 + n + begin:8 + n + end]
    if "key" in name:
        body = array.array("d", array.array("f", body)).tobytes()
        t["dtype"] = "F64"
    part = parts[i % 2]
    t["data_offsets"] = [len(part[1]), len(part[1]) + len(body)]
    part[0][name], part[1] = t, part[1] + body
    index[name] = "model-0000%d-of-00002.safetensors" % (i % 2 + 1)
parts[0][0]["other.scale"] = {"dtype": "F4", "shape": [7],
                              "data_offsets": [len(parts[0][1]), len(parts[0][1]) + 4]}
parts[0][1] += b"abcd"
index["other.scale"] = "model-00001-of-00002.safetensors"
for i, (header, body) in enumerate(parts):
    header = json.dumps(header).encode()
    with open(folder + "/model-0000%d-of-00002.safetensors" % (i + 1), "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header + body)
json.dump({"metadata": {"total_size": 1}, "weight_map": index},
          open(folder + "/model.safetensors.index.json", "w"))
end
  if python3 "$tmp/split.py" "$hub" 2> "$tmp/err"; then
    index=$hub/model.safetensors.index.json
    parts() { # FILE: the model that is trained from the index
      "$tmp/train" $run --init "$index" --save "$1" > "$tmp/out" 2> "$tmp/err"
    }
    parts "$tmp/parts"
    same test_encoder_reads_weights_in_several_files "$tmp/parts"
    refused_parts() { # NAME PATTERN
      if parts "$tmp/no"; then fail "$1" "it did not fail"
      elif grep -q -e "$2" "$tmp/err"; then ok "$1"; else fail "$1" "$(cat "$tmp/err")"; fi
    }
    mv "$hub/model.safetensors" "$tmp/whole"
    refused test_encoder_names_the_index 'there is no .*, but .*index.json, which names its parts'
    mv "$tmp/whole" "$hub/model.safetensors"
    cp "$index" "$tmp/index"
    sed 's/model-00002/model-00003/' "$tmp/index" > "$index"
    refused_parts test_encoder_names_the_part_that_is_missing \
      'model-00003-of-00002.safetensors: cannot be opened: No such file'
    sed 's/"other.scale"/"x": "model-00001-of-00002.safetensors", &/' "$tmp/index" > "$index"
    refused_parts test_encoder_counts_the_tensors_of_each_part \
      'model-00001-of.*tensors, but the index names .* are these files of one model'
    sed 's/"model-00001/"..\/model-00001/' "$tmp/index" > "$index"
    refused_parts test_encoder_takes_no_parts_from_elsewhere 'is not a file beside it'
    printf '{"weight_map": {"a": 1}}' > "$index"
    refused_parts test_encoder_sees_a_damaged_index 'index.json: byte [0-9]*: expected a string'
    printf '{"metadata": {}}' > "$index"
    refused_parts test_encoder_sees_an_index_without_a_map 'there is no weight_map'
  else fail test_encoder_reads_weights_in_several_files "$(cat "$tmp/err")"; fi
else skip test_encoder_reads_weights_in_several_files "there is no python3 here"; fi

setting added_tokens.json '{"[E1]": 12'
wrong test_encoder_sees_damaged_added_tokens 'added_tokens.json: byte [0-9]*: '
none
setting tokenizer_config.json "{\"added_tokens_decoder\": {\"5\": $e1}}"
wrong test_encoder_refuses_the_number_of_a_word '"\[E1\]" has number 5, but word 5 of .* is "été"'
setting tokenizer_config.json "{\"added_tokens_decoder\": {\"20\": $e1}}"
wrong test_encoder_refuses_a_number_too_far '"\[E1\]" has number 20, but the next one is 12'
setting tokenizer_config.json \
  '{"added_tokens_decoder": {"12": {"content": "a", "single_word": true}}}'
ids test_encoder_ids_of_single_words '12 1 1 12 1 12' 'a xa aé a-a'
setting tokenizer_config.json '{"unk_token": {"content": "<unk>"}}'
wrong test_encoder_refuses_other_special_tokens \
  'config.json: unk_token is "<unk>", expected \[UNK\]'
setting tokenizer_config.json '{"do_lower_case": true}'
setting tokenizer.json '{"normalizer": {"type": "BertNormalizer", "lowercase": false}}'
wrong test_encoder_refuses_files_that_differ \
  '(lowercase) is false, but true in .*tokenizer_config.json' "$few/tokenizer.json"
finish
