/* Batches of bytes: they drive every number of one, odd values among them; each array has exactly
   the length that the batch says. */

enum { BATCH_FEATURES = 5, BATCH_MOST = 4096 };

static struct {
  const uint8_t *at;
  size_t left;
} batch_bytes;

static uint32_t batch_byte(void) {
  if (!batch_bytes.left) return 0;
  --batch_bytes.left;
  return *batch_bytes.at++;
}

/* Mostly a number below `usual`. */
static int32_t batch_number(int32_t usual) {
  uint32_t k = batch_byte() % 24;
  if (k == 0) return INT32_MIN;
  if (k == 1) return INT32_MAX;
  if (k == 2) return -1;
  if (k == 3) return (int32_t)(batch_byte() | batch_byte() << 8 | batch_byte() << 24);
  if (k < 6) return usual + (int32_t)k - 4;
  return (int32_t)(batch_byte() % (uint32_t)usual);
}

static float batch_float(void) {
  static const float odd[] = {0,      1,     2,      -1,  0.5f,          1e30f,
                              -1e30f, 3e38f, 1e-45f, 256, 2147483648.0f, -0.0f};
  uint32_t k = batch_byte() % 16;
  return k < 12    ? odd[k]
         : k == 12 ? (float)strtod("nan", NULL)
         : k == 13 ? (float)strtod("inf", NULL)
                   : (float)batch_byte() / 16;
}

static void *batch_array(size_t n, size_t size) { return malloc(n ? n * size : 1); }

/* A batch, its arrays in `array`; 0: too long for this target. */
static int batch_make(moe_batch *b, void *array[8], int k, uint32_t flags) {
  int32_t S = (int32_t)(batch_byte() % 6), M, i, *start, *ids, *task, *span;
  int64_t *index;
  float *features, *label;
  uint8_t *segments;
  size_t n;
  array[0] = start = (int32_t *)batch_array((size_t)S + 1, sizeof *start);
  for (start[0] = 0, i = 0; i <= S; ++i) {
    uint32_t w = batch_byte();
    if (w < 12)
      start[i] = batch_number(30);
    else if (i)
      start[i] = (int32_t)((uint32_t)start[i - 1] + w % 10 + (w % 10 == 0));
  }
  if ((M = start[S]) > BATCH_MOST) return 0;
  n = M < 0 ? 0 : (size_t)M;
  array[1] = ids = (int32_t *)batch_array(n, sizeof *ids);
  array[2] = features = (float *)batch_array(n * BATCH_FEATURES, sizeof *features);
  array[3] = segments = (uint8_t *)batch_array(n, 1);
  array[4] = task = (int32_t *)batch_array((size_t)S, sizeof *task);
  array[5] = span = (int32_t *)batch_array(4 * (size_t)S, sizeof *span);
  array[6] = index = (int64_t *)batch_array((size_t)S, sizeof *index);
  array[7] = label = (float *)batch_array((size_t)S, sizeof *label);
  for (i = 0; (size_t)i < n; ++i) {
    uint32_t w = batch_byte();
    ids[i] = w < 3 ? batch_number(30) : (int32_t)(w % 30);
    segments[i] = (uint8_t)(w < 4 ? w : w & 1);
  }
  for (i = 0; (size_t)i < n * BATCH_FEATURES; ++i)
    features[i] = batch_byte() < 3 ? batch_float() : 0.25f;
  for (i = 0; i < S; ++i) {
    task[i] = batch_number(FUZZ_TASKS);
    index[i] = (int64_t)batch_number(100) * batch_number(100000);
    label[i] = batch_float();
  }
  for (i = 0; i < 4 * S; ++i)
    span[i] = batch_byte() < 8 ? batch_number(9) : i & 1 ? 1 + (int32_t)(batch_byte() % 3) : 0;
  memset(b, 0, sizeof *b);
  b->S = flags & 128 ? -S : S, b->seq_start = start, b->task = task;
  if (flags & 1 ? k == 6 : k != 6 || flags & 64) b->ids = ids;
  if (flags & 1 ? k != 6 : k == 6) b->features = features;
  if (flags & 4) b->segments = segments;
  if (flags & 8) b->span = span;
  if (flags & 16) b->index = index;
  if (flags & 32) b->label = label;
  return 1;
}

/* ---- a model for each router, with features, with blocks ---- */

enum { BATCH_MODELS = 8 };

static struct {
  moe_model *model[BATCH_MODELS];
  moe_context *context[BATCH_MODELS];
  moe_trainer *trainer[BATCH_MODELS];
} batch;

static moe_config batch_config(int k) {
  static const moe_router router[BATCH_MODELS] = {
      MOE_ROUTER_DENSE,      MOE_ROUTER_SHARED,     MOE_ROUTER_TASK, MOE_ROUTER_EMBEDDING,
      MOE_ROUTER_TASK_LEVEL, MOE_ROUTER_TASK_LEVEL, MOE_ROUTER_TASK, MOE_ROUTER_DENSE};
  moe_config c;
  moe_config_init(&c);
  c.layers = 2, c.hidden = 12, c.ffn = 20, c.heads = 3;
  c.vocab = 30, c.positions = c.max_len = 9;
  c.router = router[k];
  c.experts = k ? 3 : 1;
  c.top_k = k == 1 ? 3 : k == 2 || k == 3 || k == 6 ? 2 : 1;
  if (k == 3) c.rank = 3;
  if (k == 4 || k == 5 || k == 7) c.unit = MOE_UNIT_BLOCK;
  if (k == 4 || k == 5) c.task_dim = 5;
  if (k == 5) c.selection = MOE_SELECT_GUMBEL;
  if (k == 6) c.vocab = 0, c.feature_dim = BATCH_FEATURES;
  return c;
}

static void batch_begin(const moe_env *env) {
  moe_limits limits = {24, 4, 0, 0}, training = {24, 4, 1, 0};
  moe_task task[FUZZ_TASKS];
  moe_train_config t;
  int k;
  fuzz_tasks(task);
  for (k = 0; k < BATCH_MODELS; ++k) {
    moe_config c = batch_config(k);
    moe_train_config_init(&t);
    t.steps = 100000000000, t.lr = 1e-6f, t.warmup = 0;
    if (k == 1 || k == 2 || k == 3) t.balance = t.z_loss = 0.01f, t.jitter = 0.1f;
    OUGHT(!TRY(moe_model_create(&batch.model[k], &c, task, FUZZ_TASKS, 1, env)));
    OUGHT(!TRY(moe_trainer_create(&batch.trainer[k], batch.model[k], &training, &t, env)));
    OUGHT(!TRY(moe_context_create(&batch.context[k], batch.model[k], &limits, env)));
  }
}
