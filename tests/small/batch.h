/* For wasm.c and ../../bench/fma.c, which say how much it is (S sequences of LENGTH rows of DIM
   features): a batch for two tasks of two classes, the configuration of a model for it, and
   checksums. */
static float x[S * LENGTH * DIM], label[S];
static int32_t start[S + 1], of[S];

static void make_batch(moe_batch *batch, moe_task tasks[2], moe_config *config) {
  int i;
  memset(batch, 0, sizeof *batch);
  memset(tasks, 0, 2 * sizeof *tasks);
  for (i = 0; i < S * LENGTH * DIM; ++i) x[i] = (float)(i * 37 % 101) / 50 - 1;
  for (i = 0; i < S; ++i)
    label[i] = (float)(i % 2), of[i] = i / 2 % 2, start[i + 1] = (i + 1) * LENGTH;
  tasks[0].name[0] = 'a', tasks[1].name[0] = 'b', tasks[0].classes = tasks[1].classes = 2;
  batch->S = S, batch->seq_start = start, batch->features = x, batch->task = of;
  batch->label = label;
  moe_config_init(config);
  config->layers = 2, config->vocab = 0, config->feature_dim = DIM;
  config->positions = config->max_len = LENGTH;
}

static uint32_t sum_of(const float *p, size_t n) { /* FNV-1a over words */
  uint32_t sum = 2166136261u;
  for (; n > 0; --n) sum = (sum ^ moe__bits(*p++)) * 16777619u;
  return sum;
}
