/* Copy moe.h and this file. cc -O2 -I. -o ask examples/ask.c -lm -pthread
   ./ask MODEL TASK SENTENCE      a model file, one of its tasks: prints label and probability */
#include <stdio.h>
#define MOE_IMPLEMENTATION
#include "moe.h"
static void say(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "%s\n", sentence);
}
int main(int argc, char **argv) {
  moe_env env;
  moe_model *model;
  moe_predictor *p;
  const char *const *label;
  float score[MOE_MAX_CLASSES];
  int task, best;
  if (argc != 4) return printf("usage: %s MODEL TASK SENTENCE\n", argv[0]), 1;
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = say;
  if (moe_model_map(&model, argv[1], &env)) return 1;
  task = moe_model_find_task(model, argv[2]);
  if (task < 0) return fprintf(stderr, "%s: no task of that name\n", argv[2]), 1;
  if (moe_predictor_create(&p, model, 1, &env)) return 1;
  if (moe_predict_text(p, task, argv[3], NULL, score, &best)) return 1;
  label = moe_model_task(model, task)->label;
  printf("%s %.3f\n", label ? label[best] : "value", (double)score[best]);
  moe_predictor_free(p);
  moe_model_free(model);
  return fflush(stdout) ? perror("stdout"), 1 : 0;
}
