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
printf '[UNK]\n[SEP]\n' > "$tmp/bad"
refused test_tokenize_needs_a_vocabulary 'usage: tokenize VOCAB'
refused test_tokenize_names_the_missing_file "$tmp/none" "$tmp/none"
refused test_tokenize_names_the_missing_word 'none of its 2 lines is \[CLS\]' "$tmp/bad"
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
