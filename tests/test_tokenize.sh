#!/bin/sh
# examples/tools/tokenize.c: what it prints, and what it says when something is wrong.
. ./lib.sh
program tokenize || { fail test_tokenize_compiles; finish; }
ok test_tokenize_compiles
printf '[UNK]\n[CLS]\n[SEP]\nhello\nwor\n##ld\n,\na\nb\nc\nd' > "$tmp/vocab"

same() { # NAME INPUT EXPECTED OPTIONS...
  name=$1 input=$2 expected=$3
  shift 3
  printf "$input" | "$tmp/tokenize" "$tmp/vocab" "$@" > "$tmp/out" 2> "$tmp/err"
  printf "$expected" > "$tmp/expected"
  if cmp -s "$tmp/out" "$tmp/expected"; then ok "$name"
  else fail "$name" "$(cat "$tmp/out" "$tmp/err")"; fi
}
same test_tokenize_prints_a_line_for_each_line 'Hello, world\n\nw\303\262rld x' \
  '1 3 6 4 5 2\n1 2\n1 4 5 0 2\n'
same test_tokenize_takes_a_tab_for_a_pair 'a b\tc\n' '1 7 8 2 9 2\n'
same test_tokenize_keeps_capitals_when_cased 'Hello hello\n' '1 0 3 2\n' --cased
same test_tokenize_cuts_the_longer_text 'a b c d\ta b\n' '[CLS] a b [SEP] a b [SEP]\n' \
  --words --max-len 7
same test_tokenize_cuts_on_the_right 'a b c d\ta b\n' '[CLS] a b c d [SEP] [SEP]\n' \
  --words --max-len 7 --truncate right
same test_tokenize_takes_zero_bytes_and_damaged_utf8 'he\0llo\377\n' '1 3 2\n'

refused() { # NAME SENTENCE OPTIONS...
  name=$1 sentence=$2
  shift 2
  echo 'a	b' | "$tmp/tokenize" "$@" > "$tmp/out" 2> "$tmp/err"
  status=$?
  if [ $status -eq 1 ] && grep -q -- "$sentence" "$tmp/err" && [ ! -s "$tmp/out" ]; then ok "$name"
  else fail "$name" "status $status: $(cat "$tmp/out" "$tmp/err")"; fi
}
# ---- --learn: the pieces of Hugging Face's trainer, found again by tokenize ----
tail -q -n +2 ../examples/data/*/train.tsv | cut -f 2- > "$tmp/texts"
"$tmp/tokenize" --learn 4000 < "$tmp/texts" > "$tmp/learned" 2> "$tmp/err"
if [ "$(sort -u "$tmp/learned" | wc -l)" -eq 4000 ] && grep -q '^##ing$' "$tmp/learned" &&
    [ "$(head -n 5 "$tmp/learned" | tr '\n' ' ')" = '[PAD] [UNK] [CLS] [SEP] [MASK] ' ]; then
  ok test_tokenize_learns_as_many_words_as_asked_for
else fail test_tokenize_learns_as_many_words_as_asked_for "$(cat "$tmp/err")"; fi
"$tmp/tokenize" "$tmp/learned" < "$tmp/texts" | tr ' ' '\n' | grep -cx 1 > "$tmp/unknown"
if [ "$(cat "$tmp/unknown")" = 0 ]; then ok test_tokenize_knows_each_word_that_it_learned_from
else fail test_tokenize_knows_each_word_that_it_learned_from "$(cat "$tmp/unknown") unknown"; fi
printf 'aaaa aaaa ab ab abab\n' | "$tmp/tokenize" --learn 16 > "$tmp/few"
if [ "$(tail -n +6 "$tmp/few" | tr '\n' ' ')" = 'a b ##a ##b ##aa ab aaa aaaa ' ]
then ok test_tokenize_joins_the_most_frequent_pairs
else fail test_tokenize_joins_the_most_frequent_pairs "$(tr '\n' ' ' < "$tmp/few")"; fi
python=${MOE_PYTHON:-python3}
if "$python" -c 'import tokenizers' 2> "$tmp/log"; then
  "$python" - "$tmp/texts" > "$tmp/theirs" << 'end'
import sys
from tokenizers import BertWordPieceTokenizer
t = BertWordPieceTokenizer(lowercase=True)
t.train([sys.argv[1]], vocab_size=4000, min_frequency=2, show_progress=False)
print("\n".join(t.get_vocab()))
end
  sort "$tmp/theirs" > "$tmp/a"
  sort "$tmp/learned" > "$tmp/b"
  same=$(comm -12 "$tmp/a" "$tmp/b" | wc -l)
  echo "        $same of 4000 words are those of the package tokenizers"
  if [ "$same" -ge 3960 ]; then ok test_tokenize_learns_what_tokenizers_does
  else fail test_tokenize_learns_what_tokenizers_does "$same of 4000"; fi
else skip test_tokenize_learns_what_tokenizers_does "python3 has no package tokenizers here"; fi
# ---- each setting, as tokenizer.json, beside tokenizers itself: golden/settings.py ----
if "$python" -c 'import tokenizers' 2> "$tmp/log"; then
  if "$python" golden/settings.py --live "$tmp/tokenize" > "$tmp/out" 2> "$tmp/err"; then
    ok test_tokenize_gives_the_ids_of_tokenizers_in_every_setting
    echo "        $(grep -c ' 0 of 1000 differ' "$tmp/out") settings of 1000 texts"
  else
    fail test_tokenize_gives_the_ids_of_tokenizers_in_every_setting \
      "$(grep -v ' 0 of' "$tmp/out") $(tail -n 1 "$tmp/err")"
  fi
else
  skip test_tokenize_gives_the_ids_of_tokenizers_in_every_setting "there is no package tokenizers"
fi
printf '[UNK]\n[SEP]\n' > "$tmp/bad"
refused test_tokenize_needs_a_vocabulary 'usage: tokenize VOCAB'
refused test_tokenize_names_the_missing_file "$tmp/none" "$tmp/none"
refused test_tokenize_names_the_missing_word 'none of its 2 lines is \[CLS\]' "$tmp/bad"
mkdir "$tmp/many"
cp "$tmp/vocab" "$tmp/many/vocab.txt"
awk 'BEGIN { printf "{"; for (i = 0; i < 4097; ++i) printf "%s\"[t%d]\": %d", i ? "," : "", i, i
  print "}" }' > "$tmp/many/added_tokens.json"
refused test_tokenize_takes_4096_added_tokens_at_most 'more than 4096 added tokens' \
  "$tmp/many/vocab.txt"
refused test_tokenize_names_the_unknown_option 'unknown option --lower' "$tmp/vocab" --lower
refused test_tokenize_wants_a_number 'not "12x"' "$tmp/vocab" --max-len 12x
refused test_tokenize_wants_a_number_after_max_len '--max-len needs a value' "$tmp/vocab" --max-len
refused test_tokenize_wants_room_for_the_special_tokens 'max_len is 2' "$tmp/vocab" --max-len 2
if [ -w /dev/full ]; then
  echo a | "$tmp/tokenize" "$tmp/vocab" > /dev/full 2> "$tmp/err"
  if [ $? -eq 1 ] && grep -q 'standard output cannot be written' "$tmp/err"; then
    ok test_tokenize_tells_when_the_disk_is_full
  else
    fail test_tokenize_tells_when_the_disk_is_full
  fi
else skip test_tokenize_tells_when_the_disk_is_full "there is no /dev/full here"; fi
finish
