#!/bin/sh
# What moe.h says of the stack (STACK on its top), as stack.sh counts it, and what MOE_NO_ macros
# leave out. KB are 1024 bytes.
. ./lib.sh
gcc_there=1
echo 'int x;' > "$tmp/x.c"
have gcc && gcc -fcallgraph-info=su -c -o "$tmp/x.o" "$tmp/x.c" 2> "$tmp/log" || gcc_there=
[ "$gcc_there" ] && targets=host || targets=
have arm-none-eabi-gcc && targets="$targets m4 m7"
TARGETS=$targets CC=gcc sh ./stack.sh > "$tmp/table" 2>&1

# at_most NAME TARGET BUILD COLUMN KB: 3 largest frame, 5 deepest chain of forward or a training
# step, 7 of any function
at_most() {
  case " $targets " in
    *" $2 "*) ;;
    *) skip "$1" "there is no compiler for $2 here that tells of calls"; return ;;
  esac
  found=$(awk -v t="$2" -v b="$3" -v c="$4" '$1 == t && $2 == b {print $c, $(c + 1)}' "$tmp/table")
  bytes=${found%% *}
  if [ "${bytes:-0}" -gt 0 ] && [ "$bytes" -le $(($5 * 1024)) ]; then ok "$1"
  else fail "$1" "$found, at most $5 KB expected; $(grep "^$2 skipped" "$tmp/table")"; fi
}
for target in m4 m7; do
  at_most test_stack_${target}_no_frame_above_2_KB $target inference 3 2
  at_most test_stack_${target}_no_frame_above_2_KB_in_training $target training 3 2
  at_most test_stack_${target}_forward $target inference 5 5
  at_most test_stack_${target}_anything_of_inference $target inference 7 6
  at_most test_stack_${target}_training_step $target training 5 6
  at_most test_stack_${target}_anything_of_training $target training 7 7
done
at_most test_stack_here_without_simd host training 7 12
at_most test_stack_here_without_bf16 host simd-no-bf16 7 86
at_most test_stack_here_inference host simd-inference 7 192
at_most test_stack_here_training host simd-training 7 192
odd=$(grep -E '^ *(recursion|unbounded)' "$tmp/table")
if [ -z "$targets" ]; then skip test_stack_has_an_end "no compiler here tells of calls"
elif [ -z "$odd" ]; then ok test_stack_has_an_end
else fail test_stack_has_an_end $odd; fi

# the count is no less than what a run takes: a thread's stack is painted, and the thread leaves
# what it does not need
cat > "$tmp/paint.c" << 'END'
#define MOE_IMPLEMENTATION
#include "moe.h"
#include <pthread.h>
#include <stdio.h>
enum { BYTES = 1 << 20 };
static unsigned char *stack;
static moe_env env;
static moe_context *context;
static moe_trainer *trainer;
static moe_batch batch;
static float scores[64];
static void *nothing(void *arg) { return arg; }
static void *forward(void *arg) { return moe_forward(context, scores, &batch, &env) ? NULL : arg; }
static void *step(void *arg) {
  float loss, norm;
  if (moe_trainer_accumulate(trainer, &batch, batch.S, &loss, NULL, &env)) return NULL;
  return moe_trainer_step(trainer, &norm, &env) ? NULL : arg;
}
static size_t used_by(void *(*fn)(void *)) {
  pthread_attr_t attr;
  pthread_t thread;
  void *result = NULL;
  size_t left = 0;
  memset(stack, 0xa5, BYTES);
  pthread_attr_init(&attr);
  pthread_attr_setstack(&attr, stack, BYTES);
  if (pthread_create(&thread, &attr, fn, &env)) return 0;
  if (pthread_join(thread, &result) || !result) return 0;
  while (left < BYTES && stack[left] == 0xa5) ++left;
  return BYTES - left;
}
int main(void) {
  static int32_t ids[60], seq_start[5] = {0, 9, 20, 40, 60}, task[4] = {0, 1, 0, 1};
  static float label[4] = {0, 1, 1, 0};
  moe_task tasks[2];
  moe_config config;
  moe_limits limits = {60, 4, 0, 0};
  moe_train_config train;
  moe_model *model;
  size_t none;
  int i;
  moe_env_init(&env, MOE_ISA_AUTO);
  moe_config_init(&config);
  config.vocab = 40, config.hidden = 64, config.layers = 2, config.heads = 4, config.ffn = 96;
  config.max_len = 32, config.experts = 4;
  memset(tasks, 0, sizeof tasks);
  for (i = 0; i < 2; ++i) {
    tasks[i].name[0] = (char)('a' + i);
    tasks[i].kind = MOE_KIND_CLASSIFICATION;
    tasks[i].classes = 2;
  }
  for (i = 0; i < 60; ++i) ids[i] = 2 + i % 30;
  batch.S = 4, batch.seq_start = seq_start, batch.ids = ids, batch.task = task;
  batch.label = label;
  stack = (unsigned char *)malloc(BYTES + 4096);
  if (!stack) return 1;
  stack += 4096 - (uintptr_t)stack % 4096;
  if (moe_model_create(&model, &config, tasks, 2, 1, &env)) return 1;
  if (moe_context_create(&context, model, &limits, &env)) return 1;
  moe_train_config_init(&train);
  train.steps = 10;
  if (moe_trainer_create(&trainer, model, &limits, &train, &env)) return 1;
  none = used_by(nothing);
  printf("%zu %zu\n", used_by(forward) - none, used_by(step) - none);
  return 0;
}
END
# painted NAME BUILD MACROS
painted() {
  if [ -z "$gcc_there" ]; then skip "$1" "gcc does not tell of calls here"; return; fi
  counted=$(awk -v b="$2" '$1 == "host" && $2 == b {print $5}' "$tmp/table")
  if ! gcc -std=c99 -D_POSIX_C_SOURCE=200809L -O2 $3 -I.. -o "$tmp/paint" "$tmp/paint.c" \
    -lm -pthread > "$tmp/log" 2>&1; then
    fail "$1" "$(head -n 5 "$tmp/log")"
    return
  fi
  set -- "$1" "$counted" $("$tmp/paint")
  if [ "${3:-0}" -gt 1000 ] && [ "${4:-0}" -gt 1000 ] && [ "$3" -le "$2" ] && [ "$4" -le "$2" ]
  then ok "$1"
  else fail "$1" "counted $2, taken: forward $3, a training step $4"; fi
}
painted test_stack_a_run_takes_no_more_without_simd training \
  "-DMOE_NO_SIMD -DMOE_NO_THREADS -DMOE_NO_TEXT"
painted test_stack_a_run_takes_no_more simd-training ""

# what the macros leave out of an object for a Cortex-M4
if ! have arm-none-eabi-gcc; then
  skip test_stack_macros_leave_out "there is no arm-none-eabi-gcc here"
else
  printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' > "$tmp/moe.c"
  without="-DMOE_NO_SIMD -DMOE_NO_STDIO -DMOE_NO_THREADS"
  without="$without -DMOE_NO_TRAIN -DMOE_NO_TEXT -DMOE_NO_BF16"
  arm-none-eabi-gcc -std=c99 -Os -mthumb -mcpu=cortex-m4 $without -I.. -c -o "$tmp/moe.o" \
    "$tmp/moe.c" > "$tmp/log" 2>&1
  names='backward|gradient|adam|trainer|sampler|checkpoint|pla.*bf16|pack_bf16|wordp|tokeniz'
  there=$(arm-none-eabi-nm "$tmp/moe.o" | awk '{print $NF}' | grep -iE \
    "$names|predict_(text|span|embed)|embed_text")
  if [ -s "$tmp/moe.o" ] && [ -z "$there" ]; then ok test_stack_macros_leave_out
  else fail test_stack_macros_leave_out $there "$(head -n 3 "$tmp/log")"; fi
fi
finish
