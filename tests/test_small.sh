#!/bin/sh
# Microcontrollers: the limits of small.sh's tables, the same bits as here, exact sums, warnings of
# arm-none-eabi-gcc, and what convert --c-array writes and refuses.
. ./lib.sh
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wdouble-promotion -Werror"
printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' > "$tmp/one.c"
lacks= # what is missing here
have arm-none-eabi-gcc || lacks="there is no arm-none-eabi-gcc here"
[ "$lacks" ] || arm-none-eabi-gcc --specs=picolibc.specs -x c -fsyntax-only - < /dev/null \
  2> /dev/null || lacks="there is no picolibc for arm-none-eabi-gcc here"

for macros in "" "-DMOE_SMALL" "-DMOE_SMALL -DMOE_NO_TRAIN -DMOE_NO_INT8"; do
  name=test_small_no_warnings$(echo "$macros" | sed 's/ *-DMOE_/_/g')
  if [ "$lacks" ]; then skip "$name" "$lacks"
  elif arm-none-eabi-gcc -std=c99 -O1 -mthumb -mcpu=cortex-m0plus --specs=picolibc.specs \
    -DMOE_NO_STDIO -DMOE_NO_THREADS $warn $macros -I.. -c -o "$tmp/one.o" "$tmp/one.c" \
    > "$tmp/log" 2>&1; then ok "$name"
  else fail "$name" "$(head -n 4 "$tmp/log")"; fi
done
if [ "$lacks" ]; then skip test_small_no_atomics "$lacks"
elif arm-none-eabi-nm -u "$tmp/one.o" | grep -q '__atomic\|__sync'; then fail test_small_no_atomics
else ok test_small_no_atomics; fi

# the example on this machine and on boards
if cc -std=c99 -Wall -Wextra -O1 -I.. -o "$tmp/embedded" ../examples/embedded.c -lm \
    > "$tmp/log" 2>&1 &&
    [ "$("$tmp/embedded" | tr '\n' ' ')" = "fault: imbalance speed: 131/100 " ]
then ok test_small_example_here
else fail test_small_example_here "$(head -n 4 "$tmp/log")"; fi
boards="m0 m4 m7 m55"
[ "$lacks" ] || have qemu-system-arm || lacks="there is no qemu-system-arm here"
if [ "$lacks" ]; then
  for b in $boards; do
    skip test_small_example_on_$b "$lacks"
    skip test_small_bits_on_$b "$lacks"
    skip test_small_limits_on_$b "$lacks"
  done
else
  sh small.sh example > "$tmp/examples" 2>&1
  sh small.sh boards > "$tmp/boards" 2>&1
  for b in $boards; do
    if grep -q "^$b .* same$" "$tmp/examples"; then ok test_small_example_on_$b
    else fail test_small_example_on_$b "$(cat "$tmp/examples")"; fi
    if [ "$(grep -c "^$b .* equal$" "$tmp/boards")" -eq 3 ]; then ok test_small_bits_on_$b
    else fail test_small_bits_on_$b "$(cat "$tmp/boards")"; fi
    # flash 256 KB and RAM 64 KB, stack included; a trainer of 140 KB, stack 5 and 6 KB
    if awk -v b=$b '
      $1 == b && $2 != "training" && $3 <= 262144 && $4 + $5 <= 65536 && $5 <= 5120 {++good}
      $1 == b && $2 == "training" && $6 <= 143360 && $5 <= 6144 {++good}
      END {exit good != 3}' "$tmp/boards"; then ok test_small_limits_on_$b
    else fail test_small_limits_on_$b "$(cat "$tmp/boards")"; fi
  done
fi

# what the macros save of a linked program
if arm-none-eabi-gcc --specs=picolibc.specs -x c -fsyntax-only - < /dev/null 2> /dev/null; then
  sh small.sh macros > "$tmp/macros" 2>&1
  if awk 'NR == 1 {exit !($1 > 0 && $1 <= 46080)}' "$tmp/macros"; then ok test_small_code_45_KB
  else fail test_small_code_45_KB "$(cat "$tmp/macros")"; fi
  if [ "$(grep -c 'saved by' "$tmp/macros")" -eq 6 ] && awk '
    /SENTENCES alone/ {exit !($1 > 5000)}' "$tmp/macros"; then ok test_small_macros_save
  else fail test_small_macros_save "$(cat "$tmp/macros")"; fi
else
  skip test_small_code_45_KB "there is no arm-none-eabi-gcc with picolibc here"
  skip test_small_macros_save "there is no arm-none-eabi-gcc with picolibc here"
fi

# a fused multiply-add without the instruction: sums in double, and with integers alone
for d in "" -D__SOFTFP__; do
  name=test_small_fma_is_exact
  [ "$d" ] && name=${name}_with_integers
  if ${CC:-cc} -std=c99 -O1 -w $d -DMOE_NO_SIMD -DMOE_STATIC -I.. -o "$tmp/fma" small/fma.c -lm \
    -pthread > "$tmp/log" 2>&1 && "$tmp/fma" > "$tmp/log"; then ok $name
  else fail $name "$(tail -n 4 "$tmp/log")"; fi
done

# in place of a sentence the line that failed
cat > "$tmp/line.c" << 'END'
#define MOE_IMPLEMENTATION
#include "moe.h"
#include <stdio.h>
static void say(void *user, moe_status status, const char *sentence) {
  (void)user;
  printf("%d %s\n", (int)status, sentence);
}
int main(void) {
  moe_env env;
  moe_config config;
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = say;
  moe_config_init(&config);
  config.layers = 0;
  return moe_config_check(&config, &env) != MOE_E_ARGUMENT;
}
END
if ${CC:-cc} -std=c99 -O1 -w -DMOE_NO_SENTENCES -I.. -o "$tmp/line" "$tmp/line.c" -lm -pthread \
    > "$tmp/log" 2>&1 && "$tmp/line" > "$tmp/log" &&
    grep -q '^[1-9][0-9]* moe\.h:[0-9]*$' "$tmp/log"
then ok test_small_says_the_line_that_failed
else fail test_small_says_the_line_that_failed "$(cat "$tmp/log")"; fi
finish
