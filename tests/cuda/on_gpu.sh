#!/bin/sh
# For somebody who has an NVIDIA GPU for a short while: sh tests/cuda/on_gpu.sh [FOLDER]
# Tests first, then measurements, in at most eight minutes and with nobody at hand. Everything goes
# into FOLDER (gpu-CARD): what the card is, one log for each step, the page of bench/cuda.py, and
# summary.txt, which has one line for each step. It needs a driver, NVRTC, cc and c++; it uses
# compute-sanitizer, cuBLAS and PyTorch where they are.
cd "$(dirname "$0")/../.." || exit 1
root=$PWD began=$(date +%s)
card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1 |
  tr -c 'A-Za-z0-9\n' '-')
out=${1:-gpu-${card:-unknown}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
CC=${CC:-cc} CXX=${CXX:-c++}
export MOE_CUDA_CACHE="$out/kernels.cache"
: > "$out/summary.txt"

# step NAME SECONDS COMMAND...: runs it where time is left; its log and one line of summary.txt
step() {
  name=$1 most=$2
  shift 2
  left=$((480 - $(date +%s) + began))
  [ "$most" -le "$left" ] || most=$left
  if [ "$most" -lt 5 ]; then
    echo "$name: no time left" | tee -a "$out/summary.txt"
    return 1
  fi
  at=$(date +%s)
  timeout "$most" "$@" > "$out/$name.log" 2>&1
  status=$?
  last=$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-120)
  echo "$name: status $status, $(($(date +%s) - at)) s: $last" | tee -a "$out/summary.txt"
  return $status
}

nvidia-smi -q > "$out/card.txt" 2>&1
{
  nvidia-smi | head -n 15
  uname -srm
  $CC --version | head -n 1
  git log -1 --format=%H 2> /dev/null
} > "$out/machine.txt" 2>&1

# ---- what is compiled ----
flags="-D_POSIX_C_SOURCE=200809L -O1 -w -I$root"
step build_moe 150 $CC -std=c99 $flags -x c -DMOE_IMPLEMENTATION -c moe.h -o "$out/moe.o" &
step build_kernels_o 90 $CXX -std=c++17 $flags -DKERNELS_GPU -c tests/cuda/kernels.cpp \
  -o "$out/kernels.o"
wait
link="-ldl -lm -pthread"
step build_kernels 20 $CXX -o "$out/kernels" "$out/kernels.o" "$out/moe.o" $link
step build_host 30 $CC -std=c99 $flags -DHOST_LINKED -o "$out/host" tests/cuda/host.c "$out/moe.o" \
  $link
step build_bench 30 $CC $flags -DBENCH_LINKED -o "$out/bench_cuda" bench/bench_cuda.c "$out/moe.o" \
  $link

# ---- tests; the first one compiles the kernels into the cache file ----
step kernels 150 "$out/kernels" gpu 40
step whole_models 60 sh -c "cd tests && '$out/host' gpu"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null |
  tail -n 1)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck synccheck initcheck; do
    step "sanitizer_$tool" 40 "$sanitizer" --tool $tool --error-exitcode 9 "$out/kernels" gpu 2
  done
else echo "sanitizer: there is no compute-sanitizer" | tee -a "$out/summary.txt"; fi

# ---- measurements ----
cp "$out/kernels.cache" "$out/bench_cuda.kernels" 2> /dev/null
step bench 200 python3 bench/cuda.py "$out/bench_cuda" --out "$out"
rm -f "$out"/kernels "$out"/host "$out"/bench_cuda "$out"/*.o "$out"/*.kernels \
  "$out/kernels.cache"
echo "all: $(($(date +%s) - began)) s, in $out"
