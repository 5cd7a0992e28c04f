#!/bin/sh
# moe_cuda.h without a GPU: its kernels compiled by NVRTC for every architecture (compile.c), run
# against the CPU's ops by an emulator and, as compiled PTX, by an interpreter (kernels.cpp), and
# its host side on a double of the driver (host.c). All in some ten minutes; a sample as a part of
# `make all`.
#   MOE_NVRTC      NVRTC's library; else that of $MOE_PYTHON's packages, or of /usr/local/cuda
#   MOE_CUDA_CASES random shapes of each op, 200; with fewer there are three architectures and no
#                  thread sanitizer
. ./lib.sh
out=${BUILD:-build}/cuda
cases=${MOE_CUDA_CASES:-200}
mkdir -p "$out"
CC=${CC:-cc} CXX=${CXX:-c++}
warn="-Wall -Wextra -Wno-unknown-pragmas -Werror"

nvrtc=$MOE_NVRTC
package=$("${MOE_PYTHON:-python3}" -c 'import nvidia.cuda_nvrtc as n; print(n.__path__[0])' \
  2> /dev/null)
for found in "$package"/lib/libnvrtc.so.12 /usr/local/cuda/lib64/libnvrtc.so.1[1-9]; do
  [ -n "$nvrtc" ] || [ ! -e "$found" ] || nvrtc=$found
done

# add NAME: a test program's log, its tests counted; it must end with its numbers
add() {
  line=$(grep '^[0-9]* passed, [0-9]* failed, [0-9]* skipped$' "$tmp/$1.log" | tail -n 1)
  grep -v '^[0-9]* passed, [0-9]* failed' "$tmp/$1.log" | sed "/^  ok/s/cuda_/cuda_${2:-}/"
  if [ -z "$line" ]; then
    fail "cuda_$1" "it ended before its summary"
    return
  fi
  passed=$((passed + ${line%% *})) line=${line#*, }
  failed=$((failed + ${line%% *})) line=${line#*, }
  skipped=$((skipped + ${line%% *}))
}

# kernels NAME FLAGS: the test program of kernels, with moe.h in C
kernels() {
  name=$1
  shift
  # shellcheck disable=SC2086
  $CXX -std=c++17 -O1 -g1 $warn -rdynamic -DKERNELS_HEADER="\"$PWD/$out/exact.h\"" "$@" \
    -o "$out/$name" cuda/kernels.cpp "$out/moe.o" -lm -ldl -pthread \
    > "$tmp/$name.build" 2>&1 || { head -n 20 "$tmp/$name.build"; false; }
}

# broken NAME SED: PTX that was damaged must not pass
broken() {
  sed "$2" "$out/kernels_80.ptx" > "$tmp/broken.ptx"
  if cmp -s "$out/kernels_80.ptx" "$tmp/broken.ptx"; then fail "cuda_ptx_$1" "nothing to damage"
  elif "$out/kernels" "$tmp/broken.ptx" 12 linear > "$tmp/log" 2>&1; then
    fail "cuda_ptx_$1" "nobody notices"
  else ok "cuda_ptx_$1_is_noticed"; fi
}

if ! $CC -std=c99 -D_POSIX_C_SOURCE=200809L -O1 -x c -DMOE_IMPLEMENTATION -c ../moe.h \
    -o "$out/moe.o" > "$tmp/log" 2>&1; then
  fail cuda_moe_h "$(head -n 5 "$tmp/log")"
  finish
fi

# ---- with NVRTC ----
compile=
if [ -z "$nvrtc" ]; then
  skip cuda_compile "NVRTC is not found (pip install nvidia-cuda-nvrtc-cu12)"
elif ! $CC -std=c99 -D_DEFAULT_SOURCE -O1 $warn -Wno-unused-function -o "$out/compile" \
    cuda/compile.c "$out/moe.o" -lm -ldl -pthread > "$tmp/log" 2>&1; then
  fail cuda_compile "$(head -n 5 "$tmp/log")"
elif ! "$out/compile" "$nvrtc" "$out" ptx > "$tmp/log" 2>&1; then
  fail cuda_ptx "$(head -n 5 "$tmp/log")"
else
  compile=1
  few=
  [ "$cases" -ge 200 ] || few=few
  "$out/compile" "$nvrtc" "$out" $few > "$tmp/compile.log" 2>&1 &
fi

# ---- kernels by the emulator and by the interpreter ----
# scratch in pieces of exact size, so that each access beyond one is seen
sed 's|#include "moe.h"|#include "../../../moe.h"|; s/MOE__CUDA_ALIGN = 256/MOE__CUDA_ALIGN = 16/
  s/MOE__CUDA_SCRATCH = 1 << 20/MOE__CUDA_SCRATCH = 1/' \
  ../moe_cuda.h > "$out/exact.h"
grep -q 'MOE__CUDA_SCRATCH = 1 ' "$out/exact.h" || fail cuda_exact_scratch "the pattern is gone"
if ! have "$CXX" || ! echo 'int main() {}' | $CXX -std=c++17 -x c++ -o "$tmp/a" - 2> /dev/null; then
  skip cuda_kernels "there is no C++17 compiler"
elif ! kernels kernels; then fail cuda_kernels "it does not compile"
else
  "$out/kernels" emulator "$cases" > "$tmp/emulator.log" 2>&1
  add emulator emulator_
  if [ -n "$compile" ]; then
    for ptx in "$out"/kernels_70.ptx "$out"/kernels_75.ptx "$out"/kernels_80.ptx; do
      [ -e "$ptx" ] || continue
      "$out/kernels" "$ptx" "$cases" > "$tmp/ptx.log" 2>&1
      add ptx ptx_
    done
    broken without_barriers 's/bar\.sync.*;/mov.u32 %r1, %r1;/'
    broken without_waits 's/\(cp\.async\.wait_group[ \t]*\)1/\12/'
  fi
  if ! kernels kernels_asan -fsanitize=address,undefined -fno-sanitize-recover=undefined \
      -fsanitize-sections=cuda_shared; then
    skip cuda_kernels_asan "this compiler has no -fsanitize-sections"
  else
    "$out/kernels_asan" emulator $((cases / 8 + 1)) > "$tmp/asan.log" 2>&1
    add asan asan_
  fi
  if [ "$cases" -lt 200 ]; then
    skip cuda_kernels_tsan "it takes minutes: make -C tests cuda"
  elif ! kernels kernels_tsan -fsanitize=thread -DEMULATOR_THREADS; then
    skip cuda_kernels_tsan "this compiler has no -fsanitize=thread"
  else
    "$out/kernels_tsan" emulator $((cases / 200)) > "$tmp/tsan.log" 2>&1
    add tsan tsan_
  fi
fi

# ---- the results of NVRTC; nvcc ----
if [ -n "$compile" ]; then
  wait
  add compile
  if ! have nvcc; then skip cuda_nvcc "there is no nvcc here"
  elif "$out/compile" source 90 > "$tmp/kernels.cu" &&
      nvcc -arch=sm_90 -cubin -std=c++11 -Werror all-warnings -o "$tmp/a" "$tmp/kernels.cu" \
        > "$tmp/log" 2>&1; then
    ok cuda_nvcc_sm_90
  else fail cuda_nvcc_sm_90 "$(head -n 10 "$tmp/log")"; fi
fi
finish
