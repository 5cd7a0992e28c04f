/* fma.c - one small mixture of experts, for fma.sh: a forward pass and training steps, by the
   instruction set of argv[1], here, under qemu or in WebAssembly.
     fma ISA               name of the set, milliseconds of a forward pass and of a training step,
                           bits of scores and of the weights after three steps
     fma ISA STEPS PASSES  the same work without a clock, to count instructions: no numbers but bits
*/
#define MOE_NO_STDIO
#define MOE_NO_THREADS
#define MOE_NO_TEXT
#define MOE_NO_BF16
#define MOE_IMPLEMENTATION
#include "../moe.h"
#ifdef __wasm__
#define EXPORT(name) __attribute__((export_name(name)))
#else
#define EXPORT(name)
#include <stdio.h>
#include <time.h>
#endif

enum { S = 4, LENGTH = 16, DIM = 8 };
#include "../tests/small/batch.h"
static float score[2 * S];
static moe_env env;
static moe_batch batch;
static moe_model *model;
static moe_trainer *trainer;

/* two layers of four experts, 64 tokens: 25 million products and sums in a forward pass */
EXPORT("begin") int begin(int isa) {
  moe_limits limits = {S * LENGTH, S, 1, 0};
  moe_config config;
  moe_train_config train;
  moe_task tasks[2];
  if (moe_env_init(&env, (moe_isa)isa)) return 1;
  make_batch(&batch, tasks, &config);
  config.hidden = 128, config.ffn = 512, config.heads = 4;
  moe_train_config_init(&train);
  train.lr = 1e-3f, train.steps = 1000;
  if (moe_model_create(&model, &config, tasks, 2, 1, &env)) return 2;
  return moe_trainer_create(&trainer, model, &limits, &train, &env) ? 3 : 0;
}

EXPORT("steps") int steps(int n) {
  float loss;
  for (; n > 0; --n)
    if (moe_trainer_accumulate(trainer, &batch, 0, &loss, NULL, &env) ||
        moe_trainer_step(trainer, NULL, &env))
      return 1;
  return 0;
}

EXPORT("passes") int passes(int n) {
  for (; n > 0; --n)
    if (moe_forward(moe_trainer_context(trainer), score, &batch, &env)) return 1;
  return 0;
}

EXPORT("bits") uint32_t bits(int weights) {
  return weights ? sum_of(moe_model_weights(model), moe_model_parameters(model))
                 : sum_of(score, 2 * S);
}

EXPORT("name") int name(int isa, int letter) {
  return (unsigned char)moe_isa_name((moe_isa)isa)[letter];
}

#ifndef __wasm__
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}
/* the best of a second, five at least */
static double best(int (*work)(int)) {
  double least = 1e30, from = now(), t;
  int round;
  for (round = 0; round < 5 || now() - from < 1000; ++round) {
    t = now();
    if (work(1)) return -1;
    t = now() - t;
    if (t < least) least = t;
  }
  return least;
}

int main(int argc, char **argv) {
  moe_isa isa = moe_isa_from_name(argc > 1 ? argv[1] : "auto");
  uint32_t scores, weights;
  double forward, training;
  if (begin((int)isa)) return printf("there is no %s here\n", argv[1]), 1;
  if (argc == 4) {
    if (steps(atoi(argv[2])) || passes(atoi(argv[3]))) return 1;
    return printf("%08x %08x\n", (unsigned)bits(0), (unsigned)bits(1)) < 0;
  }
  if (steps(3) || passes(1)) return 1;
  scores = bits(0), weights = bits(1);
  forward = best(passes), training = best(steps);
  return printf("%.3f %.3f %08x %08x %s\n", forward, training, (unsigned)scores, (unsigned)weights,
                moe_isa_name(env.isa)) < 0;
}
#endif
