/* Model files: read and opened; then whatever can be done with a model that was accepted. */
#include "model_use.h"

static void model_use(moe_model *m, const moe_env *env) {
  const moe_config *c = moe_model_config(m);
  int32_t T = moe_model_tasks(m), i;
  moe_tensor x;
  OUGHT(T >= 0 && T <= MOE_MAX_TASKS && moe_model_max_classes(m) <= MOE_MAX_CLASSES);
  OUGHT(!TRY(moe_config_check(c, env)));
  for (i = 0; i < moe_model_tensors(m); ++i) {
    OUGHT(!moe_model_tensor(m, i, &x));
    OUGHT(moe_model_find_tensor(m, x.name) == i);
  }
  for (i = 0; i < T; ++i) OUGHT(moe_model_find_task(m, moe_model_task(m, i)->name) == i);
  if ((double)c->hidden * c->ffn * c->layers * (T ? T : 1) * c->experts > 3e7) return;
  model_pass(m, env);
  model_ask(m, env);
  model_derive(m, env);
}

static void fuzz_model(const uint8_t *d, size_t n) {
  moe_env env = fuzz_env();
  size_t file_bytes, bytes = 0, before = fuzz_live;
  unsigned char *file = fuzz_file(d, n, &file_bytes);
  moe_model *m = NULL;
  void *block = NULL;
  fuzz_peak = fuzz_live;
  if (!TRY(moe_model_read(&m, file, file_bytes, &env))) {
    OUGHT(fuzz_peak - before <= 200 * (file_bytes + 65536));
    model_use(m, &env);
  }
  moe_model_free(m);
  m = NULL;
  if (!TRY(moe_model_open_size(file, file_bytes, &bytes, &env))) {
    OUGHT(bytes <= 200 * (file_bytes + 65536));
    OUGHT(!posix_memalign(&block, 64, bytes));
    if (!TRY(moe_model_open(&m, file, file_bytes, block, bytes, &env))) model_use(m, &env);
  }
  moe_model_free(m);
  free(block), free(file);
}
