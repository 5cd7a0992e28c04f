#!/bin/sh
# moe_cuda.h without a GPU: it compiles with nothing of CUDA, says what is missing, and its host
# side runs on a double of driver, NVRTC and cuBLAS (cuda/double.cpp), whose kernels are emulated.
. ./lib.sh
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wdouble-promotion -Werror"
cc=${CC:-cc}

# ---- what the compiler says, alone ----
printf '#define MOE_CUDA_IMPLEMENTATION\n#include "moe_cuda.h"\n' > "$tmp/one.c"
printf '#include "moe_cuda.h"\nmoe_cuda_options o;\n' > "$tmp/api.c"
printf '#define MOE_IMPLEMENTATION\n#define MOE_STATIC\n' > "$tmp/both.c"
cat "$tmp/one.c" >> "$tmp/both.c"
printf 'int main(void) { return 0; }\n' >> "$tmp/both.c"
for compiler in gcc clang; do
  for language in c99 c11 c++11 c++20; do
    name=test_cuda_compiles_with_${compiler}_as_$language x=c run=$compiler
    case $language in c++*) x=c++ ;; esac
    if ! have $run; then skip $name "there is no $run here"; continue; fi
    if (for f in one api; do
      $run -std=$language $warn -I.. -O0 -c -x $x -o /dev/null "$tmp/$f.c" || exit 1
      $run -std=$language $warn -DMOE_NO_TRAIN -I.. -O0 -c -x $x -o /dev/null "$tmp/$f.c" || exit 1
    done) > "$tmp/log" 2>&1; then ok $name
    else fail $name "$(grep -m 3 -E 'error|warning' "$tmp/log")"; fi
  done
done
grep -i -n cuda ../moe.h | grep -v -e 'moe_cuda\.h and every file' -e '"cuda:0 (...)"' > "$tmp/log"
if [ -s "$tmp/log" ]; then fail test_cuda_is_unknown_to_moe_h "$(head -n 3 "$tmp/log")"
else ok test_cuda_is_unknown_to_moe_h; fi

# ---- a machine with no driver: one sentence, and the CPU's results ----
if [ -e /dev/nvidiactl ]; then
  skip test_cuda_example_without_a_driver "this machine has a driver"
elif $cc -std=c99 -O1 $warn -I.. -o "$tmp/cuda" ../examples/cuda.c -ldl -lm -pthread \
    > "$tmp/log" 2>&1 && "$tmp/cuda" > "$tmp/out" 2> "$tmp/said" &&
    sed 's/moe_cuda_open(&cuda, NULL, &env)/1/' ../examples/cuda.c > "$tmp/cpu.c" &&
    $cc -std=c99 -O1 -I.. -o "$tmp/cpu" "$tmp/cpu.c" -ldl -lm -pthread &&
    "$tmp/cpu" > "$tmp/want" 2> /dev/null && cmp -s "$tmp/out" "$tmp/want" &&
    [ "$(grep -c 'install the NVIDIA driver' "$tmp/said")" = 1 ]; then
  ok test_cuda_example_without_a_driver
else
  fail test_cuda_example_without_a_driver \
    "$(head -n 3 "$tmp/log"; cat "$tmp/said" "$tmp/out" 2> /dev/null)"
fi

# ---- train and predict: compiled with -DTOOL_CUDA and -ldl ----
few="--data ../examples/data --tasks balanced_copa,subjectivity --systems tag --layers 1
  --hidden 32 --heads 2 --ffn 32 --steps 4 --batch 8 --from-scratch --threads 1 --max-len 12"
tools=
if $cc -std=c99 -O1 -DTOOL_CUDA $warn -o "$tmp/gpu_train" ../examples/train.c -ldl -lm -pthread \
    > "$tmp/log" 2>&1 && $cc -std=c99 -O1 -DTOOL_CUDA $warn -o "$tmp/predict" \
    ../examples/tools/predict.c -ldl -lm -pthread >> "$tmp/log" 2>&1; then
  tools=1
  ok test_cuda_train_and_predict_compile
  table() { "$tmp/gpu_train" $few "$@" 2> "$tmp/said" | sed 's/ [0-9.]*$//'; } # without the seconds
  table --save "$tmp/cpu.safetensors" > "$tmp/want"
  if [ -e /dev/nvidiactl ]; then
    skip test_cuda_train_without_a_driver "this machine has a driver"
  elif table --device cuda | cmp -s - "$tmp/want" &&
      [ "$(grep -c 'install the NVIDIA driver' "$tmp/said")" = 1 ] &&
      table --device auto | cmp -s - "$tmp/want" && ! grep -q -i cuda "$tmp/said"; then
    ok test_cuda_train_without_a_driver
  else fail test_cuda_train_without_a_driver "$(head -n 3 "$tmp/said")"; fi
  "$tmp/gpu_train" $few --device gpu > "$tmp/out" 2>&1
  if [ $? = 1 ] && grep -q 'cpu, cuda, cuda:N or auto' "$tmp/out"; then
    ok test_cuda_train_knows_its_devices
  else fail test_cuda_train_knows_its_devices "$(head -n 3 "$tmp/out")"; fi
else fail test_cuda_train_and_predict_compile "$(grep -m 5 -E 'error|warning' "$tmp/log")"; fi
program train > /dev/null && "$tmp/train" --device cuda > "$tmp/out" 2>&1
if grep -q 'cc -DTOOL_CUDA' "$tmp/out"; then ok test_cuda_train_says_how_to_compile_it
else fail test_cuda_train_says_how_to_compile_it "$(head -n 3 "$tmp/out")"; fi

# ---- the host side on the double ----
out=${BUILD:-build}/cuda_host
mkdir -p "$out"
if ! have "${CXX:-c++}"; then
  skip test_cuda_double "there is no C++ compiler"
elif ! "${CXX:-c++}" -std=c++17 -O1 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror \
    -Wno-unused-function -Wno-unused-variable -Wno-unknown-pragmas -o "$out/double.so" \
    cuda/double.cpp -pthread > "$tmp/log" 2>&1; then
  fail test_cuda_double "$(grep -m 5 -E 'error|warning' "$tmp/log")"
elif ! $cc -std=c99 -D_POSIX_C_SOURCE=200809L -O1 $warn -o "$out/host" cuda/host.c -ldl -lm \
    -pthread > "$tmp/log" 2>&1; then
  fail test_cuda_host "$(grep -m 5 -E 'error|warning' "$tmp/log")"
else
  "$out/host" "$out/double.so" > "$tmp/host.log" 2>&1
  grep -v '^[0-9]* passed, [0-9]* failed' "$tmp/host.log"
  line=$(grep '^[0-9]* passed, [0-9]* failed, [0-9]* skipped$' "$tmp/host.log" | tail -n 1)
  if [ -z "$line" ]; then fail test_cuda_host "it ended before its summary"
  else
    passed=$((passed + ${line%% *})) line=${line#*, }
    failed=$((failed + ${line%% *})) line=${line#*, }
    skipped=$((skipped + ${line%% *}))
  fi
fi

# ---- train and predict on the double, as on a machine with a driver ----
mkdir "$tmp/lib"
here=$(cd "$out" && pwd)
ln -s "$here/double.so" "$tmp/lib/libcuda.so.1"
for major in 11.2 12 13 14; do ln -s "$here/double.so" "$tmp/lib/libnvrtc.so.$major"; done
if [ -z "$tools" ] || [ ! -e "$out/double.so" ]; then
  skip test_cuda_train_and_predict_on_the_double "something above failed"
else
  printf 'a b\tc d\nThe film was good\tIt was bad\n' > "$tmp/in"
  "$tmp/predict" "$tmp/cpu.safetensors" balanced_copa < "$tmp/in" > "$tmp/want"
  if LD_LIBRARY_PATH=$tmp/lib "$tmp/gpu_train" $few --device cuda --kernels "$tmp/kernels" \
      --save "$tmp/gpu.safetensors" > "$tmp/table" 2> "$tmp/log" &&
      LD_LIBRARY_PATH=$tmp/lib "$tmp/predict" "$tmp/gpu.safetensors" balanced_copa --device cuda \
      < "$tmp/in" > "$tmp/out" 2>> "$tmp/log" && grep -q 'cuda:0 (Double 0, sm_80' "$tmp/table" &&
      [ -s "$tmp/kernels" ] && paste "$tmp/want" "$tmp/out" | awk '{
        d = $2 - $4
        if ($1 != $3 || d > 1e-4 || d < -1e-4) exit 1
      } END { exit NR != 2 }'; then
    ok test_cuda_train_and_predict_on_the_double
  else
    fail test_cuda_train_and_predict_on_the_double \
      "$(head -n 5 "$tmp/log"; paste "$tmp/want" "$tmp/out")"
  fi
fi
finish
