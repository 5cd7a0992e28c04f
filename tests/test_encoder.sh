#!/bin/sh
# Tokenizers as they are published, beside weights: the model must have the bits of the one made
# with vocab.txt; what moe.h's tokenizer does not do is refused by name.
. ./lib.sh
program train || { fail test_encoder_compiles; finish; }
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
tokenizer_json "$bert, \"strip_accents\": false, \"lowercase\": true}" WordPiece
refused test_encoder_refuses_accents_that_stay 'strip_accents is false where text is lower-cased'
tokenizer_json '{"type": "BertNormalizer", "handle_chinese_chars": false}' WordPiece
refused test_encoder_refuses_ideographs_that_stay_together 'tokenize_chinese_chars is false'
head -c 300 "$hub/tokenizer.json" > "$tmp/cut.json"
refused test_encoder_sees_json_that_is_cut 'cut.json: byte [0-9]*: ' --vocab "$tmp/cut.json"
rm "$hub/tokenizer.json"

cp $vocab "$hub"
said() { printf '%s' "$1" > "$hub/tokenizer_config.json"; }
said '{
  "do_lower_case"
    : true, "strip_accents": null, "tokenizer_class": "BertTokenizerFast", "added_tokens_decoder":
  {"0": {"content": "[PAD]", "special": true}, "99": {"content": "[unused98]"}}, "x": [1, {}]}'
from_hub "$tmp/config"
same test_encoder_reads_tokenizer_config_json "$tmp/config"
if [ "$(grep -c 'added token' "$tmp/err")" = 0 ]; then ok test_encoder_knows_the_usual_tokens
else fail test_encoder_knows_the_usual_tokens "$(cat "$tmp/err")"; fi
said '{"do_lower_case": false}'
from_hub "$tmp/config"
if cmp -s "$tmp/config" "$tmp/too"; then ok test_encoder_config_says_whether_capitals_count
else fail test_encoder_config_says_whether_capitals_count "$(cat "$tmp/err")"; fi
said '{"added_tokens_decoder": {"20": {"content": "[E1]", "special": true}}}'
from_hub "$tmp/config"
if grep -q 'the added token "\[E1\]" is cut like any other text' "$tmp/err"; then
  ok test_encoder_tells_of_added_tokens
else fail test_encoder_tells_of_added_tokens "$(cat "$tmp/err")"; fi
said '{"tokenizer_class": "BertJapaneseTokenizer"}'
refused test_encoder_names_another_class 'tokenizer_class is BertJapaneseTokenizer, expected'
said '{"do_lower_case": true, "strip_accents": false}'
refused test_encoder_config_refuses_accents_that_stay 'config.json: strip_accents is false'
said '{"do_lower_case": tru'
refused test_encoder_sees_a_damaged_config 'tokenizer_config.json: byte [0-9]*: '
finish
