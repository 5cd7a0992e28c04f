/* Copy moe.h and this file. cc -O2 -I. -o sensors examples/sensors.c -lm -pthread && ./sensors
   Trains one model for two tasks on sensor readings, without any text: which fault a machine has
   (three classes) and how fast it turns (a number). The readings are simulated; read your own in
   place of `measure`. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#include "moe.h"

enum { FAULT, SPEED, TASKS };
#ifndef LAYERS /* -DLAYERS=1 -DHIDDEN=8: small enough for any microcontroller (embedded.c) */
enum { LAYERS = 2, HIDDEN = 32 };
#endif
enum { SENSORS = 3, LENGTH = 24, BATCH = 32, STEPS = 600 };
static const char *const faults[] = {"none", "imbalance", "bearing"};
static const moe_task tasks[TASKS] = {
    /* name, kind, pair, classes, low, high, metrics, max_len, labels */
    {"fault", MOE_KIND_CLASSIFICATION, 0, 3, 0, 0, "accuracy", 0, faults},
    {"speed", MOE_KIND_REGRESSION, 0, 1, 0.5f, 1.5f, "pearson", 0, NULL}};

static moe_env env;

static void say(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "%s\n", sentence);
}

static void need(moe_status status) {
  if (status != MOE_OK) exit(1); /* the log has said why */
}

/* A random number from -1 to 1 for each seed and place. */
static float noise(uint64_t seed, int machine, int place) {
  return (float)(moe_key(seed, 0, (uint64_t)machine, (uint32_t)place, 0) >> 40) / 8388608.0f - 1;
}

/* LENGTH readings of three sensors of a machine: vibration, temperature, sound. */
static void measure(float *reading, int fault, float speed, uint64_t seed, int machine) {
  int i;
  for (i = 0; i < LENGTH; ++i, reading += SENSORS) {
    float angle = speed * (float)i + 3 * noise(seed, machine, 0);
    reading[0] = (fault == 1 ? 1.0f : 0.3f) * sinf(angle) + 0.1f * noise(seed, machine, 3 * i + 1);
    reading[1] = 0.3f * speed + 0.1f * noise(seed, machine, 3 * i + 2);
    reading[2] = (fault == 2 ? 1.0f : 0.2f) * noise(seed, machine, 3 * i + 3);
  }
}

/* Every second machine is asked for its fault, the others for their speed. */
static moe_batch make_batch(uint64_t seed) {
  static float readings[BATCH * LENGTH * SENSORS], label[BATCH];
  static int32_t start[BATCH + 1], task[BATCH];
  moe_batch batch;
  int s;
  for (s = 0; s < BATCH; ++s) {
    int fault = (int)(moe_key(seed, 1, (uint64_t)s, 0, 0) % 3);
    float speed = 1 + 0.5f * noise(seed, s, 99);
    measure(readings + s * LENGTH * SENSORS, fault, speed, seed, s);
    task[s] = s % TASKS;
    label[s] = task[s] == FAULT ? (float)fault : speed;
    start[s + 1] = start[s] + LENGTH; /* sequences may differ in length */
  }
  memset(&batch, 0, sizeof batch);
  batch.S = BATCH, batch.seq_start = start;
  batch.features = readings, batch.task = task, batch.label = label;

  return batch;
}

static moe_model *make_model(void) {
  moe_config config;
  moe_model *model;
  moe_config_init(&config);
  config.layers = LAYERS, config.hidden = HIDDEN, config.ffn = 2 * HIDDEN, config.heads = 4;
  config.vocab = 0, config.feature_dim = SENSORS; /* numbers in place of words */
  config.positions = config.max_len = LENGTH;
  need(moe_model_create(&model, &config, tasks, TASKS, 1, &env));
  return model;
}

/* Machines that training has not seen. */
static void test(const moe_model *model, moe_context *context) {
  static float score[BATCH * MOE_MAX_CLASSES], answer[BATCH];
  moe_batch batch = make_batch(1000000);
  int stride = moe_model_max_classes(model), s, right = 0;
  float apart = 0;
  need(moe_forward(context, score, &batch, &env));
  for (s = 0; s < BATCH; ++s) {
    const moe_task *task = &tasks[batch.task[s]];
    need(moe_answers(&answer[s], task, score + s * stride, stride, 1, NULL, NULL, &env));

    if (batch.task[s] == FAULT)
      right += answer[s] == batch.label[s];
    else
      apart += fabsf(answer[s] - batch.label[s]) / (BATCH / 2);
  }
  printf("fault: %d of %d right; speed: %.2f off on average\n", right, BATCH / 2, (double)apart);
}

int main(void) {
  moe_limits limits = {BATCH * LENGTH, BATCH, 1, 0}; /* tokens, sequences; training */
  moe_train_config config;
  moe_model *model;
  moe_trainer *trainer;
  float loss;
  int step;
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = say;
  model = make_model();
  moe_train_config_init(&config);
  config.lr = 3e-3f, config.steps = STEPS;

  need(moe_trainer_create(&trainer, model, &limits, &config, &env));
  for (step = 1; step <= STEPS; ++step) {
    moe_batch batch = make_batch((uint64_t)step);
    need(moe_trainer_accumulate(trainer, &batch, 0, &loss, NULL, &env));
    need(moe_trainer_step(trainer, NULL, &env));
    if (step % 200 == 0) printf("step %d  loss %.3f\n", step, (double)loss);
  }
  test(model, moe_trainer_context(trainer));
  need(moe_model_save(model, "sensors.safetensors", &env));
  moe_trainer_free(trainer);
  moe_model_free(model);
  return 0;
}
