/* Batches of any numbers, on models with every router, with features, with blocks. */
#include "batch_make.h"

/* Routes and masks of the caller's. */
static void batch_choose(int k, moe_batch *b, int32_t *force, uint8_t *mask) {
  const moe_config *c = moe_model_config(batch.model[k]);
  int32_t M = b->S < 0 ? 0 : b->seq_start[b->S], i, n = M < 0 ? 0 : c->layers * M * c->top_k;
  moe_context *training = moe_trainer_context(batch.trainer[k]);
  for (i = 0; i < n; ++i) {
    uint32_t w = batch_byte();
    force[i] = w < 3 ? batch_number(3) : (i % c->top_k + (int32_t)w) % c->experts;
  }
  for (i = 0; i < c->layers * c->experts; ++i) mask[i] = batch_byte() % 4 == 0;
  if (n > 0 && batch_byte() & 1) {
    moe_context_force(batch.context[k], force);
    moe_context_force(training, force);
  }
  if (batch_byte() % 3 == 0) moe_context_mask(batch.context[k], mask);
}

static void batch_run(int k, const moe_batch *b, const moe_env *env) {
  int32_t S = b->S < 0 ? -b->S : b->S, C = moe_model_max_classes(batch.model[k]), i;
  float *scores = (float *)batch_array((size_t)(S * C), sizeof *scores), loss = 0;
  float *losses = (float *)batch_array((size_t)S, sizeof *losses);
  moe_status good = TRY(moe_batch_check(batch.model[k], b, 0, env)), done;
  done = TRY(moe_forward(batch.context[k], scores, b, env));
  if (good) OUGHT(done);
  for (i = 0; i < S * C && !done; ++i) OUGHT(scores[i] - scores[i] == 0);
  good = TRY(moe_batch_check(batch.model[k], b, 1, env));
  done = TRY(
      moe_trainer_accumulate(batch.trainer[k], b, (int32_t)(batch_byte() % 6), &loss, losses, env));
  if (good) OUGHT(done);
  if (!done && batch_byte() % 8 == 0) TRY(moe_trainer_step(batch.trainer[k], NULL, env));
  free(scores), free(losses);
}

static void fuzz_batch(const uint8_t *d, size_t n) {
  moe_env env = fuzz_env();
  moe_batch b;
  void *array[8] = {NULL};
  int32_t *force = (int32_t *)malloc(2 * BATCH_MOST * 3 * sizeof *force);
  uint8_t mask[2 * 3];
  int k, i;
  batch_bytes.at = d;
  batch_bytes.left = n;
  k = (int)(batch_byte() % BATCH_MODELS);
  if (batch_make(&b, array, k, batch_byte())) {
    batch_choose(k, &b, force, mask);
    batch_run(k, &b, &env);
    moe_context_force(batch.context[k], NULL);
    moe_context_force(moe_trainer_context(batch.trainer[k]), NULL);
    moe_context_mask(batch.context[k], NULL);
  }
  for (i = 0; i < 8; ++i) free(array[i]);
  free(force);
}
