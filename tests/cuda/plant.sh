#!/bin/sh
# Plants faults in moe_cuda.h (plant.py) and runs the tests of kernels and of the host side with
# each of them: sh cuda/plant.sh [FAULTS] [SEED] [SECTION...], in tests/. It takes an hour and is no
# test. The last lines say how many were caught and list the others; all are in
# build/cuda/plants.txt.
count=${1:-400} seed=${2:-1}
[ $# -lt 2 ] || shift
[ $# -lt 1 ] || shift
out=build/cuda
planted=$out/planted.h
with="-DPLANTED -DKERNELS_HEADER=\"../$planted\""
cc=${CC:-cc} cxx=${CXX:-c++}
mkdir -p $out build/cuda_host
rm -f $planted.without

# a fault that does not compile is replaced by another one
for turn in 1 2 3 4 5 6 7 8; do
  python3 cuda/plant.py ../moe_cuda.h $planted "$count" "$seed" "$@" || exit 1
  $cxx -std=c++17 -fsyntax-only -fmax-errors=0 -w -Icuda $with \
    cuda/kernels.cpp 2> $out/planted.log && break
  [ $turn -lt 8 ] || { echo "faults do not compile: $out/planted.log"; exit 1; }
  grep -oE 'planted.h:[0-9]+:[0-9]+: +(error|required|note: in expansion)' $out/planted.log |
    cut -d: -f2 | awk '{ print $1 - 1 }' | sort -un >> $planted.without
done

# kernels NAME FLAGS
kernels() {
  name=$1
  shift
  $cxx -std=c++17 -O1 -w -rdynamic -Icuda $with "$@" -o $out/$name cuda/kernels.cpp $out/moe.o \
    -lm -ldl -pthread
}
$cc -std=c99 -D_POSIX_C_SOURCE=200809L -O1 -x c -DMOE_IMPLEMENTATION -c ../moe.h -o $out/moe.o &&
  kernels kernels_planted &&
  kernels kernels_planted_asan -fsanitize=address -fsanitize-sections=cuda_shared || exit 1
sed 's/MOE__CUDA_ALIGN = 16/MOE__CUDA_ALIGN = 256/; s/MOE__CUDA_SCRATCH = 1 /&<< 20 /' $planted \
  > $out/planted_host.h # its scratch is as it is
{
  sed "s|\"../../moe_cuda.h\"|\"$out/planted_host.h\"|; s|\"../\(.*\)\"|\"cuda/../\1\"|" cuda/host.c
  echo 'int plant_on = getenv("MOE_PLANT") ? atoi(getenv("MOE_PLANT")) : 0;'
  echo 'unsigned char plant_seen[PLANT_MOST];'
} > $out/host_planted.c
$cxx -std=c++17 -O1 -fpermissive -w -fsanitize=address -Icuda -I. -DHOST_LINKED \
  -o $out/host_planted -x c++ $out/host_planted.c -x none $out/moe.o -lm -ldl -pthread &&
  $cxx -std=c++17 -O1 -fPIC -shared -fvisibility=hidden -w -o build/cuda_host/double.so \
    cuda/double.cpp -pthread || exit 1

# kernels and slots by the emulator; what it does not see, under AddressSanitizer, by the
# interpreter (the host's part only, since the kernels that it runs have no faults, and where
# tests/test_cuda.sh has left the PTX) and by the double
hosts=$(awk -F'\t' '$2 ~ /_(driver|compile|memory|table)$/ { print $1 }' $planted.txt)
others=$(awk -F'\t' '$2 !~ /_(driver|compile|memory|table)$/ { print $1 }' $planted.txt)
# shellcheck disable=SC2086
{
  $out/kernels_planted plants 2 $hosts
  $out/kernels_planted plants 30 $others
} | grep -v '^  ok' > $out/plants.log
left() { # the numbers of those that are not caught so far, of host code where $1 is given
  awk -F'\t' -v where="$1" 'FNR == NR {
      split($0, w, " ")
      if (w[2] == "caught") caught[w[1]] = 1
      next
    }
    !caught[$1] && (where == "" || $3 == where) { print $1 }' $out/plants.log $planted.txt
}
# shellcheck disable=SC2046
[ -z "$(left)" ] || $out/kernels_planted_asan plants 30 $(left) | grep -v '^  ok' >> $out/plants.log
for n in $(left host); do
  [ -e $out/kernels_80.ptx ] || break
  (ulimit -t 60; MOE_PLANT=$n $out/kernels_planted $out/kernels_80.ptx 12) > $out/host.log 2>&1 ||
    echo "$n caught ptx"
done >> $out/plants.log
for n in $(left); do
  for part in open memory test_whole_measures_both_makers_once test_whole_products_by_cublas \
      test_faults_memory_runs_out test_faults_measuring_fails test_faults_every_function_fails \
      test_whole_saves_and_predicts_as_the_cpu; do
    rm -rf build/cuda_host/double.so.cache*
    (ulimit -t 60; MOE_PLANT=$n timeout 600 $out/host_planted build/cuda_host/double.so $part) \
      > $out/host.log 2>&1 || { echo "$n caught $part"; break; }
  done
done >> $out/plants.log

awk -F'\t' 'FNR == NR {
    split($0, w, " ")
    if (how[w[1]] !~ /^caught/) how[w[1]] = w[2] " " w[3]
    next
  }
  { print $1 "\t" how[$1] "\t" $2 "\t" $3 "\t" $4 "\t" $5 "\t" $6 "\t" $7 }' \
  $out/plants.log $planted.txt > $out/plants.txt
grep -v '	caught' $out/plants.txt
echo "$(grep -c '	caught' $out/plants.txt) of $(($(wc -l < $out/plants.txt))) faults are caught"
