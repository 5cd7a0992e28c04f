/* A model of the shape of a board's example, with random weights: model.c FILE LAYERS HIDDEN FFN
   TASKS TOKENS FEATURES [int8] */
#include <stdio.h>
#define MOE_IMPLEMENTATION
#include "moe.h"
int main(int argc, char **argv) {
  static const char *const yes_no[] = {"no", "yes"};
  moe_env env;
  moe_config config;
  moe_task task[8];
  moe_model *model;
  int t, n = argc > 5 ? atoi(argv[5]) : 0;
  size_t i;
  if (argc != 8 || n < 1 || n > 8) return 1;
  moe_env_init(&env, MOE_ISA_AUTO);
  moe_config_init(&config);
  config.layers = atoi(argv[2]), config.hidden = atoi(argv[3]), config.ffn = atoi(argv[4]);
  config.heads = 2, config.vocab = 0;
  config.positions = config.max_len = atoi(argv[6]), config.feature_dim = atoi(argv[7]);
  memset(task, 0, sizeof task);
  for (t = 0; t < n; ++t) {
    task[t].name[0] = (char)('a' + t);
    task[t].classes = t % 2 ? 1 : 2;
    task[t].kind = t % 2 ? MOE_KIND_REGRESSION : MOE_KIND_CLASSIFICATION;
    task[t].high = 1;
    if (t == 0) task[t].label = yes_no;
  }
  if (moe_model_create(&model, &config, task, n, 1, &env)) return 1;
  for (i = 0; i < moe_model_parameters(model); ++i) /* so that every part matters */
    moe_model_weights(model)[i] *= moe_model_weights(model)[i] < 0.5f ? 8.0f : 1.0f;
  return moe_model_save(model, argv[1], &env) != MOE_OK;
}
