/* Copy moe.h, this file and embedded_model.h. cc -O2 -I. -o embedded examples/embedded.c -lm
   Tells from 24 readings of three sensors what is wrong with a machine and how fast it turns, as on
   a microcontroller (README.md: how to build for one): no malloc, no files, no threads. The model
   is a constant. It was made by
     cc -O2 -I. -DLAYERS=1 -DHIDDEN=16 -o sensors examples/sensors.c -lm -pthread && ./sensors
     ./convert sensors.safetensors --int8 --c-array machine > embedded_model.h */
#include <stdio.h>
#define MOE_SMALL    /* leaves out what needs an operating system */
#define MOE_NO_TRAIN /* and gradients */
#define MOE_IMPLEMENTATION
#include "moe.h"
#ifndef MODEL
#define MODEL "embedded_model.h"
#endif
#include MODEL

enum { FAULT, SPEED, LENGTH = 24, SENSORS = 3 };

/* blocks begin at a multiple of 64 */
static unsigned char model_block[machine_MODEL_BYTES] __attribute__((aligned(64)));
static unsigned char context_block[machine_CONTEXT_BYTES] __attribute__((aligned(64)));

/* Replace this by your sensors. Thousandths, recorded from a machine with an imbalance. */
static void measure(float *reading) {
  static const int16_t recorded[LENGTH * SENSORS] = {
      -767, 399, -73,  -851, 408, -71, 380,  422, -64,  921, 338, 142, 506, 341, 51,
      -716, 393, 115,  -843, 423, 122, 50,   272, 120,  942, 344, 187, 750, 279, -54,
      -418, 363, -51,  -983, 429, -1,  -179, 399, -103, 851, 405, 140, 893, 406, 101,
      -160, 433, -132, -959, 436, 154, -603, 393, 176,  692, 370, -79, 917, 321, 59,
      158,  342, -79,  -962, 397, 47,  -816, 293, 77,   262, 273, 81};
  int i;
  for (i = 0; i < LENGTH * SENSORS; ++i) reading[i] = (float)recorded[i] / 1000;
}

int main(void) {
  static const int32_t start[] = {0, LENGTH};
  static float reading[LENGTH * SENSORS], score[MOE_MAX_CLASSES], answer;
  const moe_limits limits = {LENGTH, 1, 0, 0};
  moe_env env;
  moe_model *model;
  moe_context *context;
  moe_batch batch;
  int32_t task;
  moe_env_init(&env, MOE_ISA_AUTO);
  if (moe_model_view(&model, &machine, model_block, sizeof model_block, &env)) return 1;
  if (moe_context_init(&context, context_block, sizeof context_block, model, &limits, &env))
    return 1;
  measure(reading);
  memset(&batch, 0, sizeof batch);
  batch.S = 1, batch.seq_start = start, batch.features = reading, batch.task = &task;
  for (task = FAULT; task <= SPEED; ++task) {
    const moe_task *t = moe_model_task(model, task);
    if (moe_forward(context, score, &batch, &env)) return 1;
    moe_answers(&answer, t, score, moe_model_max_classes(model), 1, NULL, NULL, &env);
    if (t->label)
      printf("%s: %s\n", t->name, t->label[(int)answer]);
    else
      printf("%s: %d/100\n", t->name, (int)(100 * answer + 0.5f));
  }
  return 0;
}
