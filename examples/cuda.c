/* Copy moe.h, moe_cuda.h and this. cc -O2 -I. -o cuda examples/cuda.c -ldl -lm -pthread && ./cuda
   Trains on an NVIDIA GPU: two tasks on points of a plane, as in the example at the top of moe.h.
   Nothing of CUDA is needed to compile. Without a driver, a GPU or NVRTC it says in one sentence
   what is missing, and the CPU trains. */
#include <stdio.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#define MOE_CUDA_IMPLEMENTATION
#include "moe_cuda.h"

enum { T = 2, S = 256, D = 2, STEPS = 300 }; /* tasks, points, numbers of a point */
static float x[S * D], label[S], score[S * MOE_MAX_CLASSES];
static int32_t start[S + 1], task[S];

static void say(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "%s\n", sentence);
}

static void make_points(void) {
  int i;
  for (i = 0; i < S; ++i) {
    x[2 * i] = (float)(i % 16) / 8 - 0.9f;
    x[2 * i + 1] = (float)(i / 16) / 8 - 0.9f;
    task[i] = i % T;
    start[i + 1] = i + 1; /* a sequence of one token */
    label[i] = (task[i] ? x[2 * i] * x[2 * i + 1] > 0 : x[2 * i + 1] > 0) ? 1.0f : 0.0f;
  }
}

static int train(const moe_env *env) {
  moe_limits limits = {S, S, 1, 0};
  moe_config config;
  moe_train_config how;
  moe_task tasks[T];
  moe_batch batch;
  moe_model *model;
  moe_trainer *trainer;
  float loss = 0;
  int i, step, right = 0;
  memset(tasks, 0, sizeof tasks);
  memset(&batch, 0, sizeof batch);
  strcpy(tasks[0].name, "upper"), tasks[0].classes = 2; /* is the point above the middle? */
  strcpy(tasks[1].name, "cross"), tasks[1].classes = 2; /* are both signs the same? */
  batch.S = S, batch.seq_start = start, batch.features = x, batch.task = task, batch.label = label;
  moe_config_init(&config);
  config.layers = 2, config.hidden = 16, config.ffn = 32, config.heads = 1, config.vocab = 0;
  config.feature_dim = D, config.positions = config.max_len = 1;
  if (moe_model_create(&model, &config, tasks, T, 1, env)) return 1;
  moe_train_config_init(&how);
  how.lr = 1e-2f, how.steps = STEPS;
  if (moe_trainer_create(&trainer, model, &limits, &how, env)) return 1;
  for (step = 0; step < STEPS; ++step) { /* ids go up, losses come down: the rest stays there */
    if (moe_trainer_accumulate(trainer, &batch, 0, &loss, NULL, env)) return 1;
    if (moe_trainer_step(trainer, NULL, env)) return 1;
  }
  if (moe_forward(moe_trainer_context(trainer), score, &batch, env)) return 1;
  for (i = 0; i < S; ++i) right += (score[2 * i + 1] > score[2 * i]) == (label[i] > 0);
  printf("loss %.6f, %d of %d points right\n", (double)loss, right, S);
  moe_trainer_free(trainer);
  moe_model_free(model);
  return 0;
}

int main(void) {
  moe_backend cuda;
  moe_env env;
  int status, there;
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = say;
  there = !moe_cuda_open(&cuda, NULL, &env);
  if (there) env.backend = &cuda;
  fprintf(stderr, "on %s\n", there ? moe_backend_name(&env) : "the CPU");
  make_points();
  status = train(&env);
  if (there) moe_cuda_close(&cuda);
  return status;
}
