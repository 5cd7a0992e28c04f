/* run(isa, what): a model in WebAssembly, for node; the same file on this machine prints all of it.
   what 0 to 3: three training steps (bits of the weights), a forward pass in fp32, in int8, lanes
   of fused sums that are wrong; 4: letter `isa` of the name of the instruction set. */
#define main fma_main
#include "fma.c"
#ifdef __wasm__
#define EXPORT __attribute__((export_name("run")))
#else
#define EXPORT
#endif
enum { S = 8, LENGTH = 12, DIM = 5 };
#include "batch.h"

EXPORT uint32_t run(int isa, int what) {
  moe_limits limits = {S * LENGTH, S, what == 0, 0};
  moe_env env;
  moe_config config;
  moe_task tasks[2];
  moe_train_config train;
  moe_batch batch;
  moe_model *model, *small;
  moe_trainer *trainer;
  moe_context *context;
  float loss, norm, score[S * 2];
  int i;
  if (what == 3) return (uint32_t)wrong_lanes();
  if (what == 4) return (unsigned char)moe_isa_name(MOE_ISA_V128)[isa];
  if (moe_env_init(&env, (moe_isa)isa)) return 1;
  make_batch(&batch, tasks, &config);
  config.hidden = 36, config.ffn = 50, config.heads = 2;
  moe_train_config_init(&train);
  train.lr = 1e-2f, train.steps = 3;
  if (moe_model_create(&model, &config, tasks, 2, 1, &env)) return 2;
  if (what == 0) {
    if (moe_trainer_create(&trainer, model, &limits, &train, &env)) return 3;
    for (i = 0; i < 3; ++i) {
      if (moe_trainer_accumulate(trainer, &batch, 0, &loss, NULL, &env)) return 4;
      if (moe_trainer_step(trainer, &norm, &env)) return 5;
    }
    return sum_of(moe_model_weights(model), moe_model_parameters(model));
  }
  if (what == 2) {
    if (moe_model_quantize(&small, model, &env)) return 6;
    model = small;
  }
  if (moe_context_create(&context, model, &limits, &env)) return 7;
  if (moe_forward(context, score, &batch, &env)) return 8;
  return sum_of(score, S * 2);
}
#ifndef __wasm__
#undef main
int main(void) {
  uint32_t a = run(MOE_ISA_SCALAR, 0), b = run(MOE_ISA_SCALAR, 1), c = run(MOE_ISA_SCALAR, 2);
  return printf("%u %u %u\n", (unsigned)a, (unsigned)b, (unsigned)c) < 0;
}
#endif
