#!/bin/sh
# The tests and the programs under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and
# valgrind. A finding ends a program. MOE_SANITIZE: programs and parts to take instead of those
# below ("kernels:gemm,simd").
. ./lib.sh
CC=${CC:-cc}
# static: what no test calls is not compiled
flags="-std=c99 -D_POSIX_C_SOURCE=200809L -O1 -g1 -DMOE_STATIC"
address="-fsanitize=address,undefined -fno-sanitize-recover=all"
export ASAN_OPTIONS=abort_on_error=0:detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS=halt_on_error=1

# a sanitizer that does not link, or not run, is absent
works() {
  echo 'int main(void) { return 0; }' > "$tmp/w.c"
  $CC $1 -o "$tmp/w" "$tmp/w.c" > /dev/null 2>&1 && "$tmp/w" > /dev/null 2>&1
}

# KIND FLAGS PROGRAM:PART,...: parts of test programs, in one program; a test for each
c_tests() {
  kind=$1 flag=$2
  shift 2
  join "$@" > "$tmp/joined.c"
  parts=$(sed -n 's/^  PART(\(.*\));$/\1/p' "$tmp/joined.c")
  if ! $CC $flags $flag -I. -o "$tmp/test" "$tmp/joined.c" -lm -pthread > "$tmp/log" 2>&1; then
    for part in $parts; do fail test_sanitizers_${kind}_$part "$(head -n 5 "$tmp/log")"; done
    return
  fi
  for part in $parts; do
    if "$tmp/test" $part > "$tmp/log" 2>&1; then ok test_sanitizers_${kind}_$part
    else fail test_sanitizers_${kind}_$part "$(grep -v '^  ok' "$tmp/log" | head -n 15)"; fi
  done
}
# KIND NAME WRAPPER COMMAND: a program must end as it should, without a word from the sanitizer
clean() {
  name=test_sanitizers_$1_$2
  shift 2
  if "$@" > "$tmp/log" 2>&1; then ok $name
  else fail $name "status $?: $(tail -n 15 "$tmp/log")"; fi
}

mkdir -p build # where C tests put files
data=$tmp/data
mkdir "$data"
cp ../examples/data/vocab.txt "$data"
grep -E '^(name|intent_match|query_wellformedness)	' ../examples/data/tasks.tsv > "$data/tasks.tsv"
for t in intent_match query_wellformedness; do
  mkdir "$data/$t"
  for f in train dev; do head -n 21 ../examples/data/$t/$f.tsv > "$data/$t/$f.tsv"; done
done
tiny="--data $data --layers 2 --hidden 20 --heads 2 --ffn 36 --experts 3 --max-len 20"
tiny="$tiny --batch 6 --steps 3"

if works "$address"; then
  c_tests address "$address" ${MOE_SANITIZE:-files:files,import,checkpoint,json \
    ops:route,experts,guard text:text,metrics train:sampler model:-model,-kinds,limits}
  if $CC $flags $address -o "$tmp/train" ../examples/train.c -lm -pthread > "$tmp/log" 2>&1; then
    for isa in scalar auto; do
      clean address train_$isa "$tmp/train" $tiny --systems dense,tag --top-k 2 --isa $isa \
        --threads 2 --hold-out 0.3 --dedup \
        --save "$tmp/m.safetensors" --checkpoint "$tmp/c.safetensors" --json "$tmp/run.json"
    done
    clean address train_resumed "$tmp/train" $tiny --systems dense,tag --top-k 2 --hold-out 0.3 \
      --dedup --resume "$tmp/c.safetensors"
  else fail test_sanitizers_address_train "$(head -n 5 "$tmp/log")"; fi
else
  skip test_sanitizers_address "$CC has no AddressSanitizer and UndefinedBehaviorSanitizer here"
fi

if works -fsanitize=thread; then
  c_tests thread -fsanitize=thread kernels:base files:-files,checkpoint,threads,race
  # that it is at work: a race on purpose, in the program that was just built
  if "$tmp/test" race > "$tmp/log" 2>&1; then
    fail test_sanitizers_thread_finds_a_race "nothing was found"
  elif grep -q 'WARNING: ThreadSanitizer: data race' "$tmp/log"; then
    ok test_sanitizers_thread_finds_a_race
  else fail test_sanitizers_thread_finds_a_race "$(tail -n 5 "$tmp/log")"; fi
  if $CC $flags -fsanitize=thread -o "$tmp/train" ../examples/train.c -lm -pthread \
      > "$tmp/log" 2>&1; then
    clean thread train "$tmp/train" $tiny --systems switch --threads 3
  else fail test_sanitizers_thread_train "$(head -n 5 "$tmp/log")"; fi
else skip test_sanitizers_thread "$CC has no ThreadSanitizer here"; fi

# valgrind sees reads of memory that was never written, which no sanitizer of gcc does; it does not
# know AVX-512
if have valgrind; then
  for p in train predict; do program $p || fail test_sanitizers_valgrind; done
  v="valgrind -q --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite"
  isa=avx2
  "$tmp/train" --isa avx2 --data none > /dev/null 2> "$tmp/log"
  grep -q 'has no avx2' "$tmp/log" && isa=scalar
  clean valgrind train $v "$tmp/train" $tiny --systems tag --isa $isa --threads 2 --steps 2 \
    --save "$tmp/v.safetensors" --checkpoint "$tmp/w.safetensors"
  clean valgrind predict $v "$tmp/predict" "$tmp/v.safetensors" intent_match --isa $isa \
    --score < "$data/intent_match/dev.tsv"
else skip test_sanitizers_valgrind "there is no valgrind here"; fi
finish
