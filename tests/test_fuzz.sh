#!/bin/sh
# libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer on the targets of fuzz.c, each for
# FUZZ_SECONDS, FUZZ_JOBS at a time (`make fuzz SECONDS=600`; FUZZ_TARGETS="json text" takes some).
# They begin with fuzz/seeds. What they find on the way goes to FUZZ_CORPUS, if that is set, and
# serves the next time; an input that ends a target goes to build/findings.
. ./lib.sh
build=${BUILD:-build}
all="batch checkpoint data import json model results routes shards text tokenizer"
targets=${FUZZ_TARGETS:-$all}
corpus=${FUZZ_CORPUS:-$tmp/corpus}
cat > "$tmp/empty.c" <<'END'
int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n);
int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return (void)d, n > 1 << 30; }
END
if ! have clang || ! clang -fsanitize=fuzzer,address,undefined -o "$tmp/empty" "$tmp/empty.c" \
    > "$tmp/log" 2>&1 || ! "$tmp/empty" -runs=1 > "$tmp/log" 2>&1; then
  for t in $targets; do skip test_fuzz_$t "there is no clang with libFuzzer here"; done
  finish
fi
if ! ${MAKE:-make} -s "$build/fuzz" > "$tmp/log" 2>&1; then
  fail test_fuzz_compiles "$(head -n 5 "$tmp/log")"; finish
fi

# one TARGET: what it says goes to its log
one() {
  mkdir -p "$corpus/$1" "$build/findings"
  FUZZ=$1 "$build/fuzz" -max_total_time="${FUZZ_SECONDS:-5}" -max_len=16384 -timeout=60 \
    -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="$build/findings/$1-" \
    "$corpus/$1" fuzz/seeds/$1 > "$tmp/$1.log" 2>&1
  echo $? > "$tmp/$1.status"
}
lane() { for t in $targets; do mkdir "$tmp/taken-$t" 2> /dev/null && one $t; done; }
job=1
while [ $job -lt "${FUZZ_JOBS:-1}" ]; do
  lane &
  job=$((job + 1))
done
lane
wait
for t in $targets; do
  n=$(sed -n 's/^stat::number_of_executed_units: *//p' "$tmp/$t.log")
  if [ "$(cat "$tmp/$t.status")" = 0 ]; then ok "test_fuzz_$t"; echo "        ${n:-0} inputs"
  else fail test_fuzz_$t "$(grep -v '^#[0-9]' "$tmp/$t.log" |
    grep -m 12 '^fuzz/\|ERROR\|runtime error\|   #[0-9]\|Test unit written')"; fi
done
finish
