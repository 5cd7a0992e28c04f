/* Blocks as experts and task-level routing [TL]: against PyTorch and differences, bit for bit in
   every company, files, wrong input. */
#include "golden/level.h"

enum { LEVEL_LAYERS = 2, BLOCKS = 3, ROUTES = MODELS_TASKS * LEVEL_LAYERS * BLOCKS };

static models_batch level_batch, level_other;
static float level_out[MODELS_S * MOE_MAX_CLASSES], level_out2[MODELS_S * MOE_MAX_CLASSES];

static moe_config level_config(moe_router router, moe_selection selection, int32_t blocks) {
  moe_config c = models_config(router, blocks, 1);
  c.unit = MOE_UNIT_BLOCK;
  c.selection = selection;
  c.task_dim = 7;
  return c;
}

/* A model with the tasks of models.h; router and vectors large enough to tell the tasks apart. */
static moe_model *level_model(const moe_config *c, const moe_env *env) {
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  int32_t i;
  models_tasks(tasks);
  model = models_create(c, tasks, MODELS_TASKS, env);
  for (i = 0; model && i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    moe_model_tensor(model, i, &t);
    if (t.dims == 2 && (!strncmp(t.name, "router.", 7) || !strncmp(t.name, "tasks.", 6)))
      golden_fill(moe_model_weights(model) + t.offset, t.count, t.name, 1.0f);
  }
  return model;
}

/* No dropout, one temperature for all steps. */
static moe_train_config level_training(void) {
  moe_train_config t;
  moe_train_config_init(&t);
  t.lr = 1e-2f;
  t.steps = 10;
  t.dropout = 0;
  t.tau_start = t.tau_end = 0.7f;
  t.seed = 5;
  return t;
}

static moe_trainer *level_trainer(moe_model *model, const moe_train_config *t, const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_trainer *trainer = NULL;
  if (model) moe_trainer_create(&trainer, model, &limits, t, env);
  return trainer;
}

static int level_scores(float *out, const moe_model *model, const models_batch *b,
                        const moe_task_router *level, const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context;
  moe_status status = moe_context_create(&context, model, &limits, env);
  if (status) return (int)status;
  if (level) status = moe_context_task_router(context, level, env);
  if (!status) status = moe_forward(context, out, &b->b, env);
  moe_context_free(context);
  return (int)status;
}

static size_t score_bytes(const moe_model *model, const models_batch *b) {
  return (size_t)b->b.S * (size_t)moe_model_max_classes(model) * sizeof(float);
}

/* ---- PyTorch's numbers ---- */

static moe_model *golden_model(moe_selection selection, const moe_env *env) {
  static const char *const name[] = {"two", "three", "real"};
  moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, selection, BLOCKS);
  moe_task tasks[3];
  moe_model *model = NULL;
  int32_t i;
  memset(tasks, 0, sizeof tasks);
  for (i = 0; i < 3; ++i) {
    snprintf(tasks[i].name, sizeof tasks[i].name, "%s", name[i]);
    tasks[i].kind = i == 2 ? MOE_KIND_REGRESSION : MOE_KIND_CLASSIFICATION;
    tasks[i].classes = i == 2 ? 1 : 2 + i;
  }
  tasks[2].low = -5, tasks[2].high = 5;
  c.hidden = 16, c.heads = 2, c.ffn = 32, c.positions = c.max_len = 12, c.task_dim = 8,
  c.temperature = 0.3f;
  if (moe_model_create(&model, &c, tasks, 3, 1, env)) return NULL;
  models_fill(model, 0);
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    moe_model_tensor(model, i, &t);
    if (t.dims == 2 && (!strncmp(t.name, "router.", 7) || !strncmp(t.name, "tasks.", 6)))
      golden_fill(moe_model_weights(model) + t.offset, t.count, t.name, 1.0f);
  }
  return model;
}

static void golden_batch(const moe_model *model) {
  int32_t s, i, S = (int32_t)(sizeof level_task / sizeof *level_task);
  memset(&level_batch, 0, sizeof level_batch);
  for (s = 0; s < S; ++s) {
    level_batch.start[s + 1] = level_starts[s + 1];
    level_batch.task[s] = level_task[s];
    level_batch.label[s] = (float)level_label[s];
    level_batch.index[s] = s;
  }
  for (i = 0; i < level_batch.start[S]; ++i) {
    level_batch.ids[i] = level_ids[i];
    level_batch.segments[i] = (uint8_t)level_segments[i];
  }
  models_connect(&level_batch, moe_model_config(model), S);
}

static void check_golden(moe_selection selection, const double *want_scores,
                         const double *want_losses, const golden_number *norms,
                         const golden_number *probes, size_t count) {
  static float probe[4096], losses[MODELS_S];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = golden_model(selection, &env);
  moe_train_config t = level_training();
  moe_trainer *trainer = level_trainer(model, &t, &env);
  size_t i, j;
  int32_t s;
  CHECK(trainer, "%s", said);
  CHECK(MOE__SITE_GUMBEL == 8, "make_level.py draws the noise of another site");
  golden_batch(model);
  CHECK(level_scores(level_out, model, &level_batch, NULL, &env) == MOE_OK, "%s", said);
  for (s = 0; s < 3 * level_batch.b.S; ++s) CHECK_NEAR(level_out[s], want_scores[s], 2e-5);
  CHECK(moe_trainer_accumulate(trainer, &level_batch.b, 0, NULL, losses, &env) == MOE_OK, "%s",
        said);
  for (s = 0; s < level_batch.b.S; ++s) CHECK_NEAR(losses[s], want_losses[s], 1e-4);
  CHECK(count == (size_t)moe_model_tensors(model), "%d tensors, PyTorch has %zu",
        (int)moe_model_tensors(model), count);
  for (i = 0; i < count; ++i) {
    moe_tensor tensor;
    const float *g;
    double norm, sum = 0;
    int32_t index = moe_model_find_tensor(model, norms[i].name);
    CHECK(index >= 0, "no tensor %s", norms[i].name);
    moe_model_tensor(model, index, &tensor);
    g = moe_trainer_gradients(trainer) + tensor.offset;
    golden_fill(probe, tensor.count, tensor.name, 1.0f);
    for (j = 0; j < tensor.count; ++j) sum += (double)g[j] * (double)probe[j];
    norm = moe_gradient_norm(g, tensor.count, &env);
    CHECK(fabs(norm - norms[i].value) <= 2e-5 * norms[i].value + 1e-6, "%s: norm %g, PyTorch %g",
          tensor.name, norm, norms[i].value);
    CHECK(fabs(sum - probes[i].value) <= 5e-5 * norms[i].value + 1e-6, "%s: sum %g, PyTorch %g",
          tensor.name, sum, probes[i].value);
  }
  moe_trainer_free(trainer);
  moe_model_free(model);
}

#define GOLDEN(name)                                                                               \
  level_##name##_scores, level_##name##_losses, level_##name##_norms, level_##name##_probes,       \
      sizeof level_##name##_norms / sizeof *level_##name##_norms
static void test_level_softmax_equals_pytorch(void) {
  check_golden(MOE_SELECT_SOFTMAX, GOLDEN(softmax));
}
static void test_level_gumbel_equals_pytorch(void) {
  check_golden(MOE_SELECT_GUMBEL, GOLDEN(gumbel));
}
static void test_level_straight_through_equals_pytorch(void) {
  check_golden(MOE_SELECT_STRAIGHT, GOLDEN(straight));
}

/* ---- differences ---- */

/* Straight-through has no differences to compare with: its gradient is not that of its loss. */
static void test_level_gradients_equal_differences(void) {
  static float routes[ROUTES], dscores[ROUTES];
  moe_env env = models_env(MOE_ISA_AUTO);
  int variant, i;
  for (variant = 0; variant < 4;
       ++variant) { /* softmax, Gumbel, fixed routes of one or two blocks, scores from outside */
    moe_config c = level_config(variant < 2 ? MOE_ROUTER_TASK_LEVEL : MOE_ROUTER_DENSE,
                                variant == 1 ? MOE_SELECT_GUMBEL : MOE_SELECT_SOFTMAX, BLOCKS);
    moe_model *model = level_model(&c, &env);
    moe_train_config t = level_training();
    moe_trainer *trainer = level_trainer(model, &t, &env);
    moe_task_router level = {NULL, NULL, NULL, NULL};
    float error = 1;
    CHECK(trainer, "%s", said);
    models_random_batch(&level_batch, model, 9, 7, 3);
    for (i = 0; i < ROUTES; ++i)
      routes[i] = variant == 3 ? 0.3f * (float)(i % 7) - 1
                               : (float)((i / 3 + i % 3) % 4 < 2) * 0.5f + (float)(i % 3 == 0);
    if (variant == 2) level.routes = routes;
    if (variant == 3) level.scores = routes, level.dscores = dscores;
    if (variant > 1)
      CHECK(moe_context_task_router(moe_trainer_context(trainer), &level, &env) == MOE_OK, "%s",
            said);
    CHECK(moe_gradcheck(trainer, &level_batch.b, moe_model_tensors(model), &error, &env) == MOE_OK,
          "%s", said);
    CHECK(error < 5e-3f, "variant %d: %g", variant, (double)error);
    moe_trainer_free(trainer);
    moe_model_free(model);
  }
}

/* The gradient of a caller's scores is what the model's own router would get: its last bias adds up
   those of the tasks. */
static void test_level_gives_back_the_gradients_of_scores(void) {
  static const moe_selection selection[] = {MOE_SELECT_SOFTMAX, MOE_SELECT_GUMBEL,
                                            MOE_SELECT_STRAIGHT};
  static float z[ROUTES], dz[ROUTES];
  moe_env env = models_env(MOE_ISA_AUTO);
  float pre[64], act[64], loss[2] = {0, 0};
  int variant, i, l, k;
  for (variant = 0; variant < 3; ++variant) {
    moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, selection[variant], BLOCKS);
    moe_model *model = level_model(&c, &env);
    moe_train_config t = level_training();
    moe_trainer *trainer = level_trainer(model, &t, &env);
    moe_task_router level = {NULL, NULL, NULL, NULL};
    float bias[LEVEL_LAYERS * BLOCKS];
    CHECK(trainer, "%s", said);
    models_random_batch(&level_batch, model, 20, 5, 4);
    memset(dz, 0, sizeof dz);
    level.scores = z;
    level.dscores = dz;
    for (i = 0; i < MODELS_TASKS; ++i)
      for (l = 0; l < LEVEL_LAYERS; ++l)
        moe__task_router_scores(z + (i * LEVEL_LAYERS + l) * BLOCKS, pre, act, model, i, l, &env);
    CHECK(moe_trainer_accumulate(trainer, &level_batch.b, 0, &loss[0], NULL, &env) == MOE_OK, "%s",
          said);
    for (i = 0; i < LEVEL_LAYERS * BLOCKS; ++i)
      bias[i] = moe_trainer_gradients(
          trainer)[moe__at(model, MOE__ROUTER_OUT_B, i / BLOCKS, 0) + (size_t)(i % BLOCKS)];
    moe_context_task_router(moe_trainer_context(trainer), &level, &env);
    CHECK(moe_trainer_accumulate(trainer, &level_batch.b, 0, &loss[1], NULL, &env) == MOE_OK, "%s",
          said);
    CHECK(!memcmp(&loss[0], &loss[1], sizeof loss[0]), "loss %g, with scores from outside %g",
          (double)loss[0], (double)loss[1]);
    for (i = 0; i < LEVEL_LAYERS * BLOCKS; ++i) {
      float sum = 0;
      for (k = 0; k < MODELS_TASKS; ++k) sum += dz[k * LEVEL_LAYERS * BLOCKS + i];
      CHECK_NEAR(sum, bias[i], 1e-5 * (1 + fabs((double)bias[i])));
    }
    moe_trainer_free(trainer);
    moe_model_free(model);
  }
}

/* Noise given by the caller: that of the trainer's seed gives the same loss and gradients, bit for
   bit; other noise does not. */
static void test_level_takes_gumbel_noise_from_outside(void) {
  static float noise[MODELS_S * LEVEL_LAYERS * BLOCKS], g[2][24000];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, MOE_SELECT_GUMBEL, BLOCKS);
  moe_model *model = level_model(&c, &env);
  moe_train_config t = level_training();
  moe_trainer *trainer = level_trainer(model, &t, &env);
  moe_task_router level = {NULL, NULL, NULL, NULL};
  float loss[3] = {0, 0, 0};
  size_t n, bytes;
  int32_t i, s, l;
  CHECK(trainer, "%s", said);
  n = moe_model_parameters(model);
  CHECK(n <= 24000, "%zu parameters", n);
  bytes = n * sizeof(float);
  models_random_batch(&level_batch, model, 11, 7, 5);
  for (s = 0; s < 11; ++s)
    for (l = 0; l < LEVEL_LAYERS; ++l)
      for (i = 0; i < BLOCKS; ++i) {
        uint64_t key =
            moe_key(t.seed, 0, (uint64_t)level_batch.index[s], (uint32_t)l, MOE__SITE_GUMBEL);
        noise[(s * LEVEL_LAYERS + l) * BLOCKS + i] =
            (float)-moe__log_double(-moe__log_double(moe__uniform(key, (uint64_t)i)));
      }
  CHECK(!moe_trainer_accumulate(trainer, &level_batch.b, 0, &loss[0], NULL, &env), "%s", said);
  memcpy(g[0], moe_trainer_gradients(trainer), bytes);
  memset(moe_trainer_gradients(trainer), 0, bytes);
  level.gumbel = noise;
  CHECK(!moe_context_task_router(moe_trainer_context(trainer), &level, &env), "%s", said);
  CHECK(!moe_trainer_accumulate(trainer, &level_batch.b, 0, &loss[1], NULL, &env), "%s", said);
  memcpy(g[1], moe_trainer_gradients(trainer), bytes);
  CHECK(!memcmp(&loss[0], &loss[1], sizeof *loss) && !memcmp(g[0], g[1], bytes),
        "loss %.9g with drawn noise, %.9g with the same noise given", (double)loss[0],
        (double)loss[1]);
  for (i = 0; i < 11 * LEVEL_LAYERS * BLOCKS; ++i) noise[i] = (float)(i % 5);
  CHECK(!moe_trainer_accumulate(trainer, &level_batch.b, 0, &loss[2], NULL, &env), "%s", said);
  CHECK(memcmp(&loss[0], &loss[2], sizeof *loss), "noise changes nothing");
  noise[(3 * LEVEL_LAYERS + 1) * BLOCKS + 2] = INFINITY;
  CHECK(moe_trainer_accumulate(trainer, &level_batch.b, 0, NULL, NULL, &env) == MOE_E_ARGUMENT &&
            strstr(said, "sequence 3, layer 1, block 2"),
        "%s", said);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

/* ---- bits ---- */

static void test_level_of_one_block_is_the_dense_model(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config dense = models_config(MOE_ROUTER_DENSE, 1, 1),
             block = level_config(MOE_ROUTER_DENSE, MOE_SELECT_SOFTMAX, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *a = NULL, *b = NULL;
  moe_trainer *ta, *tb;
  moe_train_config t = level_training();
  size_t n, i;
  int step;
  t.dropout = 0.1f;
  models_tasks(tasks);
  CHECK(!moe_model_create(&a, &dense, tasks, MODELS_TASKS, 3, &env) &&
            !moe_model_create(&b, &block, tasks, MODELS_TASKS, 3, &env),
        "%s", said);
  n = moe_model_parameters(a);
  CHECK(n == moe_model_parameters(b) &&
            !memcmp(moe_model_weights(a), moe_model_weights(b), n * sizeof(float)),
        "fresh weights differ");
  ta = level_trainer(a, &t, &env);
  tb = level_trainer(b, &t, &env);
  CHECK(ta && tb, "%s", said);
  for (step = 0; step < 3; ++step) {
    float la = 0, lb = 1;
    models_random_batch(&level_batch, a, 12, 9, (uint64_t)step);
    CHECK(!moe_trainer_accumulate(ta, &level_batch.b, 0, &la, NULL, &env) &&
              !moe_trainer_accumulate(tb, &level_batch.b, 0, &lb, NULL, &env),
          "%s", said);
    CHECK(!memcmp(&la, &lb, sizeof la), "step %d: loss %.9g, dense %.9g", step, (double)lb,
          (double)la);
    for (i = 0; i < n; ++i) {
      float x = moe_trainer_gradients(ta)[i], y = moe_trainer_gradients(tb)[i];
      CHECK(!(x < y || x > y), "step %d: gradient %zu is %.9g, dense %.9g", step, i, (double)y,
            (double)x);
    }
    CHECK(!moe_trainer_step(ta, NULL, &env) && !moe_trainer_step(tb, NULL, &env), "%s", said);
  }
  CHECK(!memcmp(moe_model_weights(a), moe_model_weights(b), n * sizeof(float)),
        "trained weights differ");
  CHECK(!level_scores(level_out, a, &level_batch, NULL, &env) &&
            !level_scores(level_out2, b, &level_batch, NULL, &env),
        "%s", said);
  CHECK(!memcmp(level_out, level_out2, score_bytes(a, &level_batch)), "scores differ");
  moe_trainer_free(ta), moe_trainer_free(tb);
  moe_model_free(a), moe_model_free(b);
}

/* The block that straight-through training takes, computed alone; blocks that are not chosen hold
   NaN meanwhile, so none of them is computed. */
/* One sequence of one word span for each task: noise is drawn for each sequence, fixed routes are
   for tasks. */
static void one_sequence_a_task(const moe_model *model) {
  int32_t s;
  models_random_batch(&level_batch, model, MODELS_TASKS, 9, 8);
  for (s = 0; s < MODELS_TASKS; ++s) {
    level_batch.task[s] = s;
    level_batch.label[s] = 1;
    level_batch.span[4 * s] = level_batch.span[4 * s + 2] = 0;
    level_batch.span[4 * s + 1] = level_batch.span[4 * s + 3] = 1;
  }
}

/* NaN in every block but block 1 of layer 0 and block 2 of layer 1. */
static void spoil_other_blocks(moe_model *model, const moe_env *env) {
  moe_tensor tensor;
  int32_t i;
  size_t j;
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_model_tensor(model, i, &tensor);
    if (!strstr(tensor.name, ".blocks.") || strstr(tensor.name, "0.blocks.1.") ||
        strstr(tensor.name, "1.blocks.2."))
      continue;
    for (j = 0; j < tensor.count; ++j) moe_model_weights(model)[tensor.offset + j] = NAN;
  }
  moe_model_pack(model, NULL, env);
}

static void test_level_inference_computes_the_chosen_blocks_only(void) {
  static float routes[ROUTES], hidden[MODELS_M * 20];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, MOE_SELECT_STRAIGHT, BLOCKS);
  moe_model *model = level_model(&c, &env);
  moe_train_config t = level_training();
  moe_trainer *trainer = level_trainer(model, &t, &env);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context;
  moe_task_router level = {NULL, NULL, NULL, NULL};
  moe_routes r;
  size_t bytes;
  int32_t l, s, i;
  CHECK(trainer, "%s", said);
  one_sequence_a_task(model);
  CHECK(moe_trainer_accumulate(trainer, &level_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s", said);
  bytes = (size_t)level_batch.start[MODELS_TASKS] * 20 * sizeof(float);
  memcpy(hidden, moe_context_hidden(moe_trainer_context(trainer)), bytes);
  memset(routes, 0, sizeof routes);
  for (l = 0; l < LEVEL_LAYERS; ++l) {
    moe_context_routes(moe_trainer_context(trainer), l, &r);
    CHECK(r.N == BLOCKS && r.k == 1 && r.M == level_batch.start[MODELS_TASKS] &&
              r.start[BLOCKS] == r.M,
          "routes of layer %d", (int)l);
    for (s = 0; s < MODELS_TASKS; ++s)
      routes[(s * LEVEL_LAYERS + l) * BLOCKS + r.expert[level_batch.start[s]]] = 1;
  }
  level.routes = routes;
  CHECK(moe_context_create(&context, model, &limits, &env) == MOE_OK, "%s", said);
  CHECK(moe_context_task_router(context, &level, &env) == MOE_OK &&
            moe_forward(context, level_out, &level_batch.b, &env) == MOE_OK,
        "%s", said);
  CHECK(!memcmp(hidden, moe_context_hidden(context), bytes), "hidden states differ");
  for (s = 0; s < MODELS_TASKS; ++s) /* every task at block 1 of layer 0 and block 2 of layer 1 */
    for (i = 0; i < LEVEL_LAYERS * BLOCKS; ++i)
      routes[s * LEVEL_LAYERS * BLOCKS + i] = (float)(i == 1 || i == 5);
  CHECK(moe_forward(context, level_out, &level_batch.b, &env) == MOE_OK, "%s", said);
  spoil_other_blocks(model, &env);
  CHECK(moe_forward(context, level_out2, &level_batch.b, &env) == MOE_OK, "%s", said);
  CHECK(!memcmp(level_out, level_out2, score_bytes(model, &level_batch)),
        "a block that is not chosen was computed");
  CHECK(moe_context_task_router(moe_trainer_context(trainer), &level, &env) == MOE_OK, "%s", said);
  moe__trainer_clear(trainer);
  CHECK(moe_trainer_accumulate(trainer, &level_batch.b, 0, NULL, NULL, &env) == MOE_OK,
        "training computes a block that is not chosen: %s", said);
  CHECK(moe__finite(
            moe_gradient_norm(moe_trainer_gradients(trainer), moe_model_parameters(model), &env)),
        "its gradient is not finite");
  moe_context_free(context);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

/* Hash of the weights after three steps, each of one batch (each: 0) or of micro-batches of `each`
   sequences. */
static uint64_t run_hash(moe_isa isa, int32_t threads, int each, moe_selection selection) {
  moe_env env = models_env(isa);
  moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, selection, BLOCKS);
  moe_model *model = level_model(&c, &env);
  moe_train_config t = level_training();
  moe_trainer *trainer;
  moe_pool *pool = NULL;
  uint64_t hash;
  int step;
  if (threads > 1 && moe_pool_create_exact(&pool, threads, &env)) return 0;
  t.dropout = 0.1f;
  trainer = level_trainer(model, &t, &env);
  if (!trainer) return 1;
  for (step = 0; step < 3; ++step) {
    moe_status status = MOE_OK;
    int32_t s;
    models_random_batch(&level_batch, model, 16, 11, (uint64_t)step + 20);
    if (!each) status = moe_trainer_accumulate(trainer, &level_batch.b, 0, NULL, NULL, &env);
    for (s = 0; each && s < 16 && !status; ++s) {
      if (s % each == 0) memset(&level_other, 0, sizeof level_other);
      models_append(&level_other, &level_batch, s, &c);
      if ((s + 1) % each == 0)
        status = moe_trainer_accumulate(trainer, &level_other.b, 16, NULL, NULL, &env);
    }
    if (!status) status = moe_trainer_step(trainer, NULL, &env);
    if (status) return (uint64_t)step + 2;
  }
  hash = models_hash(moe_model_weights(model), moe_model_parameters(model) * sizeof(float));
  moe_trainer_free(trainer);
  moe_model_free(model);
  moe_pool_free(pool);
  return hash;
}

static void test_level_bits_depend_on_no_thread_no_isa_no_batch(void) {
  static const moe_isa isa[] = {MOE_ISA_SCALAR, MOE_ISA_NEON, MOE_ISA_AVX2, MOE_ISA_AVX512};
  int selection, i;
  for (selection = 0; selection < 3; ++selection) {
    uint64_t want = run_hash(MOE_ISA_AUTO, 1, 0, (moe_selection)selection);
    CHECK(want > 10, "%s", said);
    CHECK(run_hash(MOE_ISA_AUTO, 3, 0, (moe_selection)selection) == want,
          "threads change bits, selection %d", selection);
    for (i = 1; i <= 8; i += 7)
      CHECK(run_hash(MOE_ISA_AUTO, 1, i, (moe_selection)selection) == want,
            "micro-batches of %d change bits, selection %d", i, selection);
    for (i = 0; i < (int)(sizeof isa / sizeof isa[0]); ++i)
      if (moe_isa_available(isa[i]))
        CHECK(run_hash(isa[i], 1, 0, (moe_selection)selection) == want, "%s changes bits",
              moe_isa_name(isa[i]));
  }
}

static void test_level_scores_depend_on_no_other_sequence(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int selection;
  int32_t s;
  for (selection = 0; selection < 3; ++selection) {
    moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, (moe_selection)selection, BLOCKS);
    moe_model *model = level_model(&c, &env);
    size_t row;
    CHECK(model, "%s", said);
    row = (size_t)moe_model_max_classes(model);
    models_random_batch(&level_batch, model, 12, 11, 31);
    CHECK(level_scores(level_out, model, &level_batch, NULL, &env) == MOE_OK, "%s", said);
    for (s = 0; s < 12; ++s) {
      memset(&level_other, 0, sizeof level_other);
      models_append(&level_other, &level_batch, s, &c);
      CHECK(level_scores(level_out2, model, &level_other, NULL, &env) == MOE_OK, "%s", said);
      CHECK(!memcmp(level_out2, level_out + (size_t)s * row, row * sizeof(float)),
            "sequence %d alone", (int)s);
    }
    moe_model_free(model);
  }
}

/* ---- routes, temperature, learning rates ---- */

static void test_level_routes_are_those_of_inference(void) {
  static float routes[ROUTES], blend[ROUTES];
  moe_env env = models_env(MOE_ISA_AUTO);
  int selection, i;
  for (selection = 0; selection < 3; ++selection) {
    moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, (moe_selection)selection, BLOCKS);
    moe_model *model = level_model(&c, &env);
    moe_task_router level = {NULL, NULL, NULL, NULL};
    CHECK(model, "%s", said);
    models_random_batch(&level_batch, model, 12, 11, 32);
    CHECK(moe_task_router_routes(routes, model, selection ? 0 : c.temperature, &env) == MOE_OK,
          "%s", said);
    level.routes = routes;
    CHECK(!level_scores(level_out, model, &level_batch, NULL, &env) &&
              !level_scores(level_out2, model, &level_batch, &level, &env),
          "%s", said);
    CHECK(!memcmp(level_out, level_out2, score_bytes(model, &level_batch)), "selection %d",
          selection);
    moe_model_free(model);
  }
  moe_task_router_blend(blend, routes, 0, ROUTES / BLOCKS, BLOCKS);
  for (i = 0; i < ROUTES; ++i) CHECK_NEAR(blend[i], 1.0 / BLOCKS, 1e-7);
  moe_task_router_blend(blend, routes, 1, ROUTES / BLOCKS, BLOCKS);
  CHECK(!memcmp(blend, routes, sizeof routes), "the whole way from the average");
}

static void test_level_temperature_is_at_most_a_million(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c;
  moe_config_init(&c);
  c.layers = 1, c.hidden = 8, c.ffn = 8, c.heads = 2, c.vocab = 10, c.positions = c.max_len = 8;
  c.router = MOE_ROUTER_TASK_LEVEL, c.unit = MOE_UNIT_BLOCK, c.experts = 2, c.task_dim = 3;
  c.temperature = 1e6f;
  CHECK(moe_config_check(&c, &env) == MOE_OK, "%s", said);
  c.temperature = 1000001;
  CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT, "1,000,001");
}

static void test_level_temperature_falls(void) {
  moe_train_config t;
  moe_train_config_init(&t);
  t.steps = 101;
  CHECK_NEAR(moe_train_tau(&t, 0), 2, 1e-6);
  CHECK_NEAR(moe_train_tau(&t, 50), sqrt(0.2), 1e-5);
  CHECK_NEAR(moe_train_tau(&t, 100), 0.1, 1e-6);
  t.tau_rate = 0.0003f;
  CHECK_NEAR(moe_train_tau(&t, 1000), 2 * exp(-0.3), 1e-5);
  CHECK_NEAR(moe_train_tau(&t, 100000), 0.1, 1e-7);
  t.tau_rate = 1e-9f;
  CHECK_NEAR(moe_train_tau(&t, 1000000000), 2 * exp(-1.0), 1e-5);
  t.tau_rate = 1e30f;
  CHECK_NEAR(moe_train_tau(&t, 0), 2, 1e-6);
  CHECK_NEAR(moe_train_tau(&t, 1), 0.1, 1e-7);
}

static void test_level_router_learns_at_its_own_rate(void) {
  static const moe_param_group groups[] = {
      {"encoder", 0, 1}, {"router.", 10, 1}, {"tasks.vectors", 0, 1}};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, MOE_SELECT_SOFTMAX, BLOCKS);
  moe_model *model = level_model(&c, &env);
  moe_train_config t = level_training();
  moe_trainer *trainer;
  float *before;
  int32_t i;
  t.groups = groups;
  t.n_groups = 3;
  t.warmup = 0;
  t.lr = 1e-3f;
  trainer = level_trainer(model, &t, &env);
  CHECK(trainer, "%s", said);
  before = (float *)malloc(moe_model_parameters(model) * sizeof(float));
  memcpy(before, moe_model_weights(model), moe_model_parameters(model) * sizeof(float));
  models_random_batch(&level_batch, model, 20, 11, 33);
  CHECK(!moe_trainer_accumulate(trainer, &level_batch.b, 0, NULL, NULL, &env) &&
            !moe_trainer_step(trainer, NULL, &env),
        "%s", said);
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor tensor;
    double most = 0, want;
    size_t j;
    moe_model_tensor(model, i, &tensor);
    for (j = tensor.offset; j < tensor.offset + tensor.count; ++j)
      most = fmax(most, fabs((double)moe_model_weights(model)[j] - (double)before[j]));
    want = !strncmp(tensor.name, "router.", 7)       ? 1e-2
           : !strncmp(tensor.name, "heads.", 6)      ? 1e-3
           : strncmp(tensor.name, "embeddings.", 11) ? 0
                                                     : 1e-3;
    CHECK(most <= want * 1.001 + 1e-12 && most >= want * 0.9, "%s moved by %g, its rate is %g",
          tensor.name, most, want); /* Adam's first step */
  }
  free(before);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

/* ---- files ---- */

static void test_level_files_give_back_the_model(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int variant;
  for (variant = 0; variant < 4; ++variant) {
    moe_config c = level_config(variant < 3 ? MOE_ROUTER_TASK_LEVEL : MOE_ROUTER_DENSE,
                                (moe_selection)(variant % 3), BLOCKS);
    moe_model *model, *back = NULL;
    const moe_config *read;
    models_file s;
    c.temperature = 0.37f;
    model = level_model(&c, &env);
    CHECK(model && (s = models_written(model, &env)).used, "%s", said);
    CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_OK, "%s", said);
    read = moe_model_config(back);
    CHECK(read->unit == c.unit && read->router == c.router && read->selection == c.selection &&
              read->task_dim == c.task_dim &&
              !(read->temperature < c.temperature || read->temperature > c.temperature),
          "the configuration differs");
    models_random_batch(&level_batch, model, 12, 11, 41);
    CHECK(!level_scores(level_out, model, &level_batch, NULL, &env) &&
              !level_scores(level_out2, back, &level_batch, NULL, &env),
          "%s", said);
    CHECK(!memcmp(level_out, level_out2, score_bytes(model, &level_batch)), "scores differ");
    free(s.data);
    moe_model_free(model);
    moe_model_free(back);
  }
}

/* A checkpoint goes on as if nothing had happened, and not with another selection. */
static void test_level_checkpoints_go_on(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, MOE_SELECT_GUMBEL, BLOCKS),
             wrong = level_config(MOE_ROUTER_TASK_LEVEL, MOE_SELECT_SOFTMAX, BLOCKS);
  moe_model *a = level_model(&c, &env), *b = level_model(&c, &env), *w = level_model(&wrong, &env);
  moe_train_config t = level_training();
  moe_trainer *ta = level_trainer(a, &t, &env), *tb = level_trainer(b, &t, &env),
              *tw = level_trainer(w, &t, &env);
  models_file s;
  moe_writer writer = models_writer(&s);
  CHECK(ta && tb && tw, "%s", said);
  models_random_batch(&level_batch, a, 12, 9, 51);
  CHECK(!moe_trainer_accumulate(ta, &level_batch.b, 0, NULL, NULL, &env) &&
            !moe_trainer_step(ta, NULL, &env),
        "%s", said);
  CHECK(!moe_checkpoint_write(ta, NULL, NULL, &writer, &env) &&
            !moe_checkpoint_read(tb, NULL, s.data, s.used, &env),
        "%s", said);
  CHECK(moe_checkpoint_read(tw, NULL, s.data, s.used, &env) == MOE_E_FORMAT &&
            strstr(said, "gumbel"),
        "%s", said);
  CHECK(!moe_trainer_accumulate(ta, &level_batch.b, 0, NULL, NULL, &env) &&
            !moe_trainer_step(ta, NULL, &env),
        "%s", said);
  CHECK(!moe_trainer_accumulate(tb, &level_batch.b, 0, NULL, NULL, &env) &&
            !moe_trainer_step(tb, NULL, &env),
        "%s", said);
  CHECK(
      !memcmp(moe_model_weights(a), moe_model_weights(b), moe_model_parameters(a) * sizeof(float)),
      "weights differ");
  free(s.data);
  moe_trainer_free(ta), moe_trainer_free(tb), moe_trainer_free(tw);
  moe_model_free(a), moe_model_free(b), moe_model_free(w);
}

/* A dense model is a BERT file: its blocks are copied, and every route through equal blocks
   computes the dense model. */
static void test_level_import_copies_every_block(void) {
  static float routes[ROUTES];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config dense = models_config(MOE_ROUTER_DENSE, 1, 1),
             c = level_config(MOE_ROUTER_TASK_LEVEL, MOE_SELECT_SOFTMAX, BLOCKS);
  moe_task tasks[MODELS_TASKS];
  moe_import_options noise = {1e-3f, 3};
  moe_task_router level = {routes, NULL, NULL, NULL};
  moe_model *a, *b = level_model(&c, &env);
  moe_tensor head;
  models_file s;
  int32_t i;
  models_tasks(tasks);
  a = models_create(&dense, tasks, MODELS_TASKS, &env);
  CHECK(a && b && (s = models_written(a, &env)).used, "%s", said);
  CHECK(moe_model_import(b, s.data, s.used, NULL, &env) == MOE_OK, "%s", said);
  head = models_tensor(a, "heads.two.weight");
  CHECK(head.offset == a->head[0], "heads come last");
  memcpy(moe_model_weights(b) + b->head[0], moe_model_weights(a) + a->head[0],
         (moe_model_parameters(a) - a->head[0]) * sizeof(float));
  for (i = 0; i < ROUTES; ++i)
    routes[i] = (float)(i % BLOCKS == (i / BLOCKS * 2 + i / BLOCKS / 2) % BLOCKS);
  models_random_batch(&level_batch, a, 12, 11, 61);
  CHECK(!level_scores(level_out, a, &level_batch, NULL, &env) &&
            !level_scores(level_out2, b, &level_batch, &level, &env),
        "%s", said);
  CHECK(!memcmp(level_out, level_out2, score_bytes(a, &level_batch)),
        "one block of each layer is not the dense model");
  CHECK(moe_model_import(b, s.data, s.used, &noise, &env) == MOE_OK, "%s", said);
  CHECK(memcmp(b->weights + moe__at(b, MOE__QUERY_W, 0, 0),
               b->weights + moe__at(b, MOE__QUERY_W, 1, 0),
               b->plan.in[MOE__FLOATS_ALL].unit[MOE__IN_LAYER] * sizeof(float)),
        "no noise");
  free(s.data);
  moe_model_free(a);
  moe_model_free(b);
}

/* A disabled block is as good as absent: NaN in it changes nothing; the rest of the weights sum to
   1. Tasks come and go with their vectors. */
static void test_level_blocks_are_disabled_and_tasks_taken(void) {
  static const uint8_t disabled[LEVEL_LAYERS * BLOCKS] = {0, 1, 0, 1, 0, 0};
  static const int32_t keep[] = {4, 1, 0, 3, 2};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  int variant;
  for (variant = 0; variant < 4; ++variant) {
    moe_config c = level_config(variant < 3 ? MOE_ROUTER_TASK_LEVEL : MOE_ROUTER_DENSE,
                                (moe_selection)(variant % 3), BLOCKS);
    moe_model *model = level_model(&c, &env), *part = NULL;
    moe_context *context;
    moe_routes r;
    int32_t i, s;
    size_t j;
    CHECK(model && !moe_context_create(&context, model, &limits, &env), "%s", said);
    models_random_batch(&level_batch, model, 12, 11, 81);
    CHECK(!moe_forward(context, level_out2, &level_batch.b, &env), "%s", said);
    CHECK(!moe_model_extract(&part, model, keep, MODELS_TASKS, NULL, &env), "%s", said);
    memcpy(&level_other, &level_batch, sizeof level_batch);
    models_connect(&level_other, &c, 12);
    for (s = 0; s < 12; ++s)
      for (i = 0; i < MODELS_TASKS; ++i)
        if (keep[i] == level_batch.task[s]) level_other.task[s] = i;
    CHECK(!level_scores(level_out, part, &level_other, NULL, &env), "%s", said);
    CHECK(!memcmp(level_out, level_out2, score_bytes(model, &level_batch)),
          "tasks in another order score otherwise");
    for (i = 0; i < moe_model_tensors(model); ++i) {
      moe_tensor tensor;
      moe_model_tensor(model, i, &tensor);
      if (strstr(tensor.name, "0.blocks.1.") || strstr(tensor.name, "1.blocks.0."))
        for (j = 0; j < tensor.count; ++j) moe_model_weights(model)[tensor.offset + j] = NAN;
    }
    moe_context_mask(context, disabled);
    CHECK(!moe_forward(context, level_out, &level_batch.b, &env), "%s", said);
    for (j = 0; j < score_bytes(model, &level_batch) / sizeof(float); ++j)
      CHECK(moe__is_finite(level_out[j]), "a disabled block was computed");
    moe_context_routes(context, 0, &r);
    CHECK(!(r.prob[1] < 0 || r.prob[1] > 0), "weight of a disabled block");
    CHECK_NEAR(r.prob[0] + r.prob[2], 1, 1e-6);
    moe_context_free(context);
    moe_model_free(model);
    moe_model_free(part);
  }
}

/* Fixed routes do not look at disabled blocks; under scores from outside no disabled block is
   taken, however low the others score. */
static void test_level_disabled_blocks_meet_routes_and_scores_from_outside(void) {
  static const uint8_t all[LEVEL_LAYERS * BLOCKS] = {1, 1, 1, 1, 1, 1},
                                          first[LEVEL_LAYERS * BLOCKS] = {1, 0, 0, 1, 0, 0};
  static float given[ROUTES];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_task_router routes = {given, NULL, NULL, NULL}, outside = {NULL, given, NULL, NULL};
  int selection, i;
  for (selection = 0; selection < 3; ++selection) {
    moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, (moe_selection)selection, BLOCKS);
    moe_model *model = level_model(&c, &env);
    moe_context *context;
    moe_routes r;
    CHECK(model && !moe_context_create(&context, model, &limits, &env), "%s", said);
    models_random_batch(&level_batch, model, 6, 11, 82);
    for (i = 0; i < ROUTES; ++i) given[i] = 0.5f;
    CHECK(!moe_context_task_router(context, &routes, &env) &&
              !moe_forward(context, level_out, &level_batch.b, &env),
          "%s", said);
    moe_context_mask(context, all);
    CHECK(!moe_forward(context, level_out2, &level_batch.b, &env), "%s", said);
    CHECK(!memcmp(level_out, level_out2, score_bytes(model, &level_batch)),
          "fixed routes, blocks disabled");
    moe_context_mask(context, first);
    for (i = 0; i < ROUTES; ++i) given[i] = i % BLOCKS == 1 ? -3.4028234e38f : -3.3e38f;
    CHECK(!moe_context_task_router(context, &outside, &env) &&
              !moe_forward(context, level_out, &level_batch.b, &env),
          "%s", said);
    moe_context_routes(context, 1, &r);
    CHECK(r.expert[0] == 2 && r.weight[0] >= 1, "selection %d: block %d of weight %g", selection,
          (int)r.expert[0], (double)r.weight[0]);
    moe_context_free(context);
    moe_model_free(model);
  }
}

/* A router that is no number must not look like a choice. */
static void test_level_nan_in_a_router_reaches_the_scores(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int selection;
  for (selection = 0; selection < 3; ++selection) {
    moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, (moe_selection)selection, BLOCKS);
    moe_model *model = level_model(&c, &env);
    moe_tensor t;
    size_t i;
    CHECK(model, "%s", said);
    t = models_tensor(model, "router.1.1.bias");
    moe_model_weights(model)[t.offset + 1] = NAN;
    models_random_batch(&level_batch, model, 6, 11, 83);
    CHECK(!level_scores(level_out, model, &level_batch, NULL, &env), "%s", said);
    for (i = 0; i < 6; ++i)
      CHECK(isnan(level_out[i * (size_t)moe_model_max_classes(model)]),
            "selection %d, sequence %zu", selection, i);
    moe_model_free(model);
  }
}

/* ---- wrong input ---- */

static void test_level_wrong_configurations_have_a_sentence(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config good = level_config(MOE_ROUTER_TASK_LEVEL, MOE_SELECT_SOFTMAX, BLOCKS), c;
  moe_train_config t = level_training();
  moe_model *model = level_model(&good, &env);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_trainer *trainer = NULL;
  int i;
  CHECK(model, "%s", said);
#define WRONG(change, word)                                                                        \
  do {                                                                                             \
    c = good;                                                                                      \
    change;                                                                                        \
    said[0] = 0;                                                                                   \
    CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT && strstr(said, word), "%s: %s", #change,   \
          said);                                                                                   \
  } while (0)
  WRONG(c.experts = 1, "expected at least 2");
  WRONG(c.temperature = 0, "temperature");
  WRONG(c.temperature = NAN, "temperature");
  WRONG(c.task_dim = 0, "task_dim");
  WRONG(c.unit = MOE_UNIT_FFN, "unit");
  WRONG(c.unit = (moe_unit)2, "unit");
  WRONG(c.selection = (moe_selection)3, "selection");
  WRONG(c.router = MOE_ROUTER_TASK, "router is task");
  WRONG(c.temperature = 0, "temperature is 0");
  WRONG(c.temperature = -1, "temperature is -1");
  WRONG(c.temperature = NAN, "temperature is nan");
  WRONG(c.task_dim = 0, "task_dim");
  WRONG(c.top_k = 2, "top_k");
  WRONG((c.layers = 1024, c.experts = 8), "blocks");
#undef WRONG
  for (i = 0; i < 3; ++i) {
    moe_train_config bad = t;
    if (i == 0) bad.tau_end = 0;
    if (i == 1) bad.tau_start = 0.01f;
    if (i == 2) bad.tau_rate = -1;
    said[0] = 0;
    CHECK(moe_trainer_create(&trainer, model, &limits, &bad, &env) == MOE_E_ARGUMENT &&
              strstr(said, "tau_end"),
          "%s", said);
  }
  moe_model_free(model);
}

static void test_level_wrong_input_has_a_sentence(void) {
  static float routes[ROUTES + 1]; /* the last one must not be read */
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = level_config(MOE_ROUTER_TASK_LEVEL, MOE_SELECT_SOFTMAX, BLOCKS);
  moe_task_router level = {routes, NULL, NULL, NULL}, outside = {NULL, routes, NULL, NULL};
  moe_model *model = level_model(&c, &env), *gates;
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context;
  int i;
  memset(routes, 0, sizeof routes);
  routes[ROUTES] = NAN;
  CHECK(model, "%s", said);
  CHECK(!moe_context_create(&context, model, &limits, &env), "%s", said);
  models_random_batch(&level_batch, model, 4, 5, 71);
  CHECK(!moe_context_task_router(context, &level, &env), "%s", said);
  CHECK(moe_forward(context, level_out, &level_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "only zero weights in layer 0"),
        "%s", said);
  for (i = 0; i < ROUTES; ++i) routes[i] = i / BLOCKS != 1;
  CHECK(moe_forward(context, level_out, &level_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "only zero weights in layer 1"),
        "%s", said);
  for (i = 0; i < ROUTES; ++i) routes[i] = 1;
  CHECK(!moe_forward(context, level_out, &level_batch.b, &env), "%s", said);
  CHECK(!moe_context_task_router(context, &outside, &env) &&
            !moe_forward(context, level_out, &level_batch.b, &env) &&
            !moe_context_task_router(context, &level, &env),
        "%s", said);
  routes[8] = -1;
  CHECK(moe_forward(context, level_out, &level_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "block 2 has weight -1"),
        "%s", said);
  routes[8] = NAN;
  CHECK(moe_forward(context, level_out, &level_batch.b, &env) == MOE_E_ARGUMENT, "NaN is accepted");
  routes[8] = 2e6f;
  CHECK(moe_forward(context, level_out, &level_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "expected 0 to 1e6"),
        "%s", said);
  routes[8] = NAN;
  CHECK(!moe_context_task_router(context, &outside, &env) &&
            moe_forward(context, level_out, &level_batch.b, &env) == MOE_E_ARGUMENT,
        "NaN as a score");
  CHECK(!moe_context_task_router(context, NULL, &env) &&
            !moe_forward(context, level_out, &level_batch.b, &env),
        "%s", said);
  CHECK(moe_task_router_routes(routes, model, -1, &env) == MOE_E_ARGUMENT, "temperature -1");
  moe_context_free(context);
  c = models_config(MOE_ROUTER_TASK, 3, 1);
  gates = level_model(&c, &env);
  CHECK(gates && !moe_context_create(&context, gates, &limits, &env), "%s", said);
  CHECK(moe_context_task_router(context, &level, &env) == MOE_E_ARGUMENT &&
            moe_task_router_routes(routes, gates, 1, &env) == MOE_E_ARGUMENT,
        "gates");
  moe_context_free(context);
  moe_model_free(gates);
  moe_model_free(model);
}

static void run_level(void) {
  RUN(test_level_softmax_equals_pytorch);
  RUN(test_level_gumbel_equals_pytorch);
  RUN(test_level_straight_through_equals_pytorch);
  RUN(test_level_gradients_equal_differences);
  RUN(test_level_gives_back_the_gradients_of_scores);
  RUN(test_level_takes_gumbel_noise_from_outside);
  RUN(test_level_of_one_block_is_the_dense_model);
  RUN(test_level_inference_computes_the_chosen_blocks_only);
  RUN(test_level_bits_depend_on_no_thread_no_isa_no_batch);
  RUN(test_level_scores_depend_on_no_other_sequence);
  RUN(test_level_routes_are_those_of_inference);
  RUN(test_level_temperature_is_at_most_a_million);
  RUN(test_level_temperature_falls);
  RUN(test_level_router_learns_at_its_own_rate);
  RUN(test_level_files_give_back_the_model);
  RUN(test_level_checkpoints_go_on);
  RUN(test_level_import_copies_every_block);
  RUN(test_level_blocks_are_disabled_and_tasks_taken);
  RUN(test_level_disabled_blocks_meet_routes_and_scores_from_outside);
  RUN(test_level_nan_in_a_router_reaches_the_scores);
  RUN(test_level_wrong_configurations_have_a_sentence);
  RUN(test_level_wrong_input_has_a_sentence);
}
