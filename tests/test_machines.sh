#!/bin/sh
# Other machines from this one, by cross compilers and emulators: 64-bit ARM (NEON against plain C),
# 32-bit ARM, RISC-V (vectors too), POWER, a big-endian machine, Windows; another C library, musl.
# Each ends with a short training run whose model file must be the native one, byte for byte. What
# is not installed is skipped by name; Debian's packages: gcc-aarch64-linux-gnu
# gcc-arm-linux-gnueabihf gcc-riscv64-linux-gnu gcc-powerpc64le-linux-gnu gcc-s390x-linux-gnu
# gcc-mingw-w64-x86-64 g++-mingw-w64-x86-64 musl-tools qemu-user wine64; vectors: clang-19 lld-19.
. ./lib.sh
# static: what a test does not use is not compiled
dialect="-D_POSIX_C_SOURCE=200809L -I. -I.. -DMOE_STATIC"
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wdouble-promotion -Werror"
mkdir "$tmp/build" # where the part files writes

# missing NAMES WHAT: is the program there? If not, each of the names is skipped
missing() {
  for w in $2; do
    have "$w" && continue
    for n in $1; do skip test_machines_$n "there is no $w here"; done
    return 0
  done
  return 1
}

# tests MACHINE COMPILER PROGRAM:PART,...: parts of test programs, in one program for the machine
tests() {
  exe=$tmp/tests_$1.exe cc=$2
  shift 2
  join "$@" > "$tmp/joined.c"
  rm -f "$tmp/unbuilt"
  # of the helpers some are for other parts
  $cc $dialect $warnings -Wno-unused-function -Wno-unused-variable -O1 -o "$exe" \
    "$tmp/joined.c" -lm -pthread > "$tmp/unbuilt" 2>&1
}

# check NAME RUNNER TESTS: some parts or tests of the program that `tests` has built
check() {
  name=test_machines_$1 runner=$2
  shift 2
  if [ ! -e "$exe" ]; then fail $name "$(head -n 5 "$tmp/unbuilt")"; return; fi
  (cd "$tmp" && $runner "$exe" "$@") > "$tmp/log" 2>&1
  if grep -q '^[1-9][0-9]* passed, 0 failed' "$tmp/log"; then ok $name
  else fail $name "$(grep -v '^  ok' "$tmp/log" | head -n 6)"; fi
}

# a training run of three tiny tasks, of odd sizes
data=$tmp/data from=../examples/data
mkdir "$data"
cp $from/vocab.txt "$data"
grep -E '^(name|snips_intents|intent_match|query_wellformedness)	' $from/tasks.tsv \
  > "$data/tasks.tsv"
for t in snips_intents intent_match query_wellformedness; do
  mkdir "$data/$t"
  head -n 60 $from/$t/train.tsv > "$data/$t/train.tsv"
  head -n 31 $from/$t/dev.tsv > "$data/$t/dev.tsv"
done
small="--data data --from-scratch --systems tag --top-k 2 --layers 2 --hidden 36 --heads 2 --ffn 50"
small="$small --experts 3 --max-len 40 --batch 12 --steps 6 --lr 2e-3 --threads 2"
native=
if program train && (cd "$tmp" && ./train $small --save native.safetensors > log 2>&1); then
  native=1
else
  fail test_machines_native_training "$(tail -n 3 "$tmp/log")"
fi

# trains NAME RUNNER PROGRAM OPTIONS
trains() {
  name=test_machines_$1 runner=$2 exe=$3
  shift 3
  if [ -z "$native" ] || [ ! -x "$exe" ]; then fail $name "$(head -n 5 "$tmp/log")"; return; fi
  rm -f "$tmp/there.safetensors"
  (cd "$tmp" && $runner "$exe" $small "$@" --save there.safetensors) > "$tmp/log" 2>&1
  if cmp -s "$tmp/native.safetensors" "$tmp/there.safetensors"; then ok $name
  else fail $name "$(tail -n 3 "$tmp/log")"; fi
}

# ---- 64-bit ARM ----
tags="simd gemm lowp linear ops experts route optimizer"
names=$(for t in $tags attention trains_to_the_same_bits has_no_avx2; do echo arm_$t; done)
if ! missing "$names" "aarch64-linux-gnu-gcc qemu-aarch64"; then
  arm="aarch64-linux-gnu-gcc -std=c99 -static"
  tests arm "$arm" kernels:simd,gemm,lowp ops:linear,ops,attention,experts,route train:optimizer
  for t in $tags; do check arm_$t qemu-aarch64 $t; done
  # the others take minutes
  check arm_attention qemu-aarch64 test_attention_agrees_with_pytorch \
    test_attention_does_not_overflow
  $arm $dialect -O1 -o "$tmp/train_arm" ../examples/train.c -lm -pthread > "$tmp/log" 2>&1
  trains arm_trains_to_the_same_bits qemu-aarch64 "$tmp/train_arm" --isa neon
  if qemu-aarch64 "$tmp/train_arm" --isa avx2 > "$tmp/log" 2>&1 ||
      ! grep -q 'has no avx2' "$tmp/log"; then
    fail test_machines_arm_has_no_avx2 "$(tail -n 2 "$tmp/log")"
  else ok test_machines_arm_has_no_avx2; fi
fi

# ---- pointers of 32 bits; a processor of which nothing is known; a C library that gives threads
# little stack ----
while read -r target compiler emulator; do
  sizes= more=
  [ "$target" = arm32 ] && sizes="arm32_attention arm32_experts" more=ops:attention,experts
  missing "${target}_gemm ${target}_files $sizes ${target}_trains_to_the_same_bits" \
    "$compiler $emulator" && continue
  headers= # those of Linux, which musl's compiler comes without
  [ "$target" = musl ] &&
    headers="-idirafter /usr/include -idirafter /usr/include/$(${CC:-cc} -dumpmachine)"
  tests $target "$compiler -std=c99 -static $headers" kernels:gemm files:files $more
  # the other tests of gemm take long without vectors
  check ${target}_gemm "$emulator" test_gemm_packs_into_panels_of_16 \
    test_gemm_random_shapes_equal_the_definition
  check ${target}_files "$emulator" files
  if [ "$sizes" ]; then # sizes that overflow where size_t has 32 bits
    check arm32_attention "$emulator" test_attention_of_65536_tokens_is_cut_into_tiles
    check arm32_experts "$emulator" test_experts_scratch_says_when_it_is_too_much
  fi
  $compiler -std=c99 -static $dialect -O1 -o "$tmp/train_$target" ../examples/train.c -lm -pthread \
    > "$tmp/log" 2>&1
  trains ${target}_trains_to_the_same_bits "$emulator" "$tmp/train_$target"
done << end
arm32 arm-linux-gnueabihf-gcc qemu-arm
riscv riscv64-linux-gnu-gcc qemu-riscv64
ppc64le powerpc64le-linux-gnu-gcc qemu-ppc64le
musl musl-gcc
end

# ---- RISC-V vectors, of 128 and 256 bits: gcc 14 or clang 17 have their intrinsics ----
tags="simd lowp linear ops experts"
names=$(for t in $tags gemm attention longer_registers trains_to_the_same_bits; do echo rvv_$t
done)
if ! missing "$names" "qemu-riscv64 riscv64-linux-gnu-gcc"; then # gcc's: the C library too
  rvv= vectors="qemu-riscv64 -cpu rv64,v=true,vext_spec=v1.0"
  for c in riscv64-linux-gnu-gcc "${CLANG:-clang}" clang-22 clang-19 clang-17; do
    target=
    case $c in *clang*) target="--target=riscv64-linux-gnu -fuse-ld=lld" ;; esac
    if [ -z "$rvv" ] && have "$c" && echo __riscv_v_intrinsic |
        $c $target -march=rv64gcv -E -P - 2> "$tmp/log" |
        awk '{ found = $1 + 0 >= 11000 } END { exit !found }'; then
      rvv="$c $target -march=rv64gcv -std=c99 -static"
    fi
  done
  if [ -z "$rvv" ]; then
    for n in $names; do skip test_machines_$n "no compiler here has intrinsics of its vectors"; done
  else
    tests rvv "$rvv" kernels:simd,gemm,lowp ops:linear,ops,attention,experts
    for t in $tags; do check rvv_$t "$vectors,vlen=128" $t; done
    check rvv_gemm "$vectors,vlen=128" test_gemm_packs_into_panels_of_16 \
      test_gemm_random_shapes_equal_the_definition
    check rvv_attention "$vectors,vlen=128" test_attention_agrees_with_pytorch \
      test_attention_does_not_overflow
    check rvv_longer_registers "$vectors,vlen=256" simd linear
    $rvv $dialect -O1 -o "$tmp/train_rvv" ../examples/train.c -lm -pthread > "$tmp/log" 2>&1
    trains rvv_trains_to_the_same_bits "$vectors,vlen=128" "$tmp/train_rvv" --isa rvv
  fi
fi

# ---- the high byte first: the order of bytes in files, plain C ----
if ! missing "big_endian_json big_endian_files big_endian_lowp big_endian_trains_to_the_same_bits" \
    "s390x-linux-gnu-gcc qemu-s390x"; then
  # gnu99: with c99 gcc computes floats in double on this machine
  big="s390x-linux-gnu-gcc -std=gnu99 -static"
  tests big "$big" kernels:lowp files:files,json
  check big_endian_json qemu-s390x json
  check big_endian_files qemu-s390x files
  check big_endian_lowp qemu-s390x lowp
  $big $dialect -O1 -o "$tmp/train_big" ../examples/train.c -lm -pthread > "$tmp/log" 2>&1
  trains big_endian_trains_to_the_same_bits qemu-s390x "$tmp/train_big"
fi

# ---- Windows ----
printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' > "$tmp/unit.c"
if ! missing windows_compiles_c99 x86_64-w64-mingw32-gcc; then
  if x86_64-w64-mingw32-gcc -std=c99 $warnings -O0 -I.. -c -o "$tmp/unit.o" "$tmp/unit.c" \
      > "$tmp/log" 2>&1; then ok test_machines_windows_compiles_c99
  else fail test_machines_windows_compiles_c99 "$(head -n 5 "$tmp/log")"; fi
fi
if ! missing windows_compiles_cxx11 x86_64-w64-mingw32-g++; then
  if x86_64-w64-mingw32-g++ -std=c++11 -x c++ $warnings -O0 -I.. -c -o "$tmp/unit.o" "$tmp/unit.c" \
      > "$tmp/log" 2>&1; then ok test_machines_windows_compiles_cxx11
  else fail test_machines_windows_compiles_cxx11 "$(head -n 5 "$tmp/log")"; fi
fi
if ! missing windows_links x86_64-w64-mingw32-gcc; then
  if x86_64-w64-mingw32-gcc -std=c99 $dialect -O1 -static -o "$tmp/train_windows.exe" \
      ../examples/train.c -lm -pthread > "$tmp/log" 2>&1; then ok test_machines_windows_links
  else fail test_machines_windows_links "$(head -n 5 "$tmp/log")"; fi
fi
# Paths with \, also into a folder with a dot; config.json is that beside the weights, never one of
# the current folder; no file is left behind; the byte 0x1A is a character like any other.
windows_paths_and_input() {
  tiny="--data data --tasks intent_match --systems dense --steps 2 --batch 4 --threads 1"
  tiny="$tiny --resamples 0 --max-len 24"
  mkdir "$tmp/hub" "$tmp/out.dir"
  cp $from/vocab.txt "$tmp/hub"
  echo '{"model_type": "bert", "num_attention_heads": 2, "hidden_size": 16}' \
    > "$tmp/hub/config.json"
  echo '{"model_type": "bert", "num_attention_heads": 4}' > "$tmp/config.json"
  (cd "$tmp" && ./train $tiny --from-scratch --layers 1 --hidden 16 --ffn 32 --heads 2 \
    --save hub/model.safetensors && ./train $tiny --init hub/model.safetensors --save here &&
    $wine ./train_windows.exe $tiny --init 'hub\model.safetensors' --save 'out.dir\there' \
      --json 'out.dir\there.json') > "$tmp/log" 2>&1
  if cmp -s "$tmp/here" "$tmp/out.dir/there" && [ -s "$tmp/out.dir/there.json" ]; then
    ok test_machines_windows_takes_backslashes
  else fail test_machines_windows_takes_backslashes "$(tail -n 3 "$tmp/log")"; fi
  (cd "$tmp" && $wine ./train_windows.exe $tiny --from-scratch --layers 1 --hidden 16 --ffn 32 \
    --heads 2 --seeds 1,2 --save 'out.dir\model' --checkpoint 'out.dir\state') > "$tmp/log" 2>&1
  left=$(ls "$tmp/out.dir" | tr '\n' ' ')
  if [ "$left" = "model-dense-1 model-dense-2 state-dense-1 state-dense-2 state.results \
there there.json " ]; then ok test_machines_windows_leaves_what_it_should
  else fail test_machines_windows_leaves_what_it_should "$left $(tail -n 3 "$tmp/log")"; fi
  rm "$tmp/config.json"
  for p in tokenize predict; do
    x86_64-w64-mingw32-gcc -std=c99 $dialect -O1 -static -o "$tmp/$p.exe" ../examples/tools/$p.c \
      -lm -pthread > "$tmp/log" 2>&1 && program $p ||
      fail test_machines_windows_links_$p "$(head -n 5 "$tmp/log")"
  done
  printf 'la film\nle\032 bon\nla\n' > "$tmp/z.txt"
  printf 'label\tsentence1\tsentence2\n0\tla \032 film\ta\n1\tle bon\tb\n' > "$tmp/z.tsv"
  (cd "$tmp" && ./tokenize hub/vocab.txt < z.txt && ./predict here intent_match --score < z.tsv) \
    > "$tmp/want" 2>&1
  (cd "$tmp" && $wine ./tokenize.exe 'hub\vocab.txt' < z.txt &&
    $wine ./predict.exe here intent_match --score < z.tsv) 2>&1 | tr -d '\r' > "$tmp/said"
  if cmp -s "$tmp/want" "$tmp/said" && grep -q '^n 2' "$tmp/said"; then
    ok test_machines_windows_reads_the_byte_0x1a
  else fail test_machines_windows_reads_the_byte_0x1a "$(cat "$tmp/said")"; fi
}

wine=wine64
[ ! -x /usr/lib/wine/wine64 ] || wine=/usr/lib/wine/wine64 # Debian keeps it there
if ! missing "windows_gemm windows_files windows_trains_to_the_same_bits \
    windows_takes_backslashes windows_leaves_what_it_should windows_reads_the_byte_0x1a" \
    "x86_64-w64-mingw32-gcc $wine"; then
  export WINEDEBUG=-all WINEPREFIX="$tmp/wine"
  tests windows "x86_64-w64-mingw32-gcc -std=c99 -static" kernels:gemm files:files
  check windows_gemm $wine gemm
  check windows_files $wine files
  trains windows_trains_to_the_same_bits $wine "$tmp/train_windows.exe"
  windows_paths_and_input
  # that of our own prefix, which still writes there
  for s in wineserver /usr/lib/wine/wineserver; do
    if have $s; then $s -k; $s -w; fi 2> /dev/null
  done
fi
finish
