/* Models some of whose experts are absent (moe_config.absent): what tokens that lose none see has
   the same bits, in every pass, precision, file and on every machine; the bytes are fewer by what
   the experts have; damaged lists end in a sentence. */

enum { EXTRACT_LAYERS = 2, EXPERTS = 4, CELLS = EXTRACT_LAYERS * EXPERTS, WIDTH = 3 };

/* Experts that no token chooses: rows of the gates that repeat a lower one (ties go to the lowest
   number). Layer 0 uses expert 0, or with two for a token 0 and 1; layer 1 uses 0 and 2, or with
   two for a token 0, 1 and 2. */
static const uint8_t unused[2][CELLS] = {{0, 1, 1, 1, 0, 1, 0, 1}, {0, 0, 1, 1, 0, 0, 0, 1}};
static const uint8_t some[CELLS] = {1, 0, 0, 1, 0, 1, 1, 0}; /* used ones among them */

static moe_task extract_tasks[MODELS_TASKS];
static moe_model *whole, *extract_less;
static models_batch extract_batch;

static moe_model *full(moe_router router, int32_t k, int variant, const moe_env *env) {
  moe_config c = models_config(router, EXPERTS, k);
  moe_model *model;
  moe_tensor t;
  int32_t i, j, e;
  c.gate_scale_n = variant == 1;
  c.renormalize = variant == 2;
  c.rank = 3;
  models_tasks(extract_tasks);
  model = models_create(&c, extract_tasks, MODELS_TASKS, env);
  for (i = 0; model && i < moe_model_tensors(model); ++i) {
    size_t width = (size_t)c.hidden;
    float *w;
    moe_model_tensor(model, i, &t);
    if (!strstr(t.name, ".gate.")) continue;
    w = moe_model_weights(model) + t.offset;
    for (j = 0; j < (t.dims == 3 ? t.shape[0] : 1); ++j)
      for (e = 0; e < EXPERTS; ++e) {
        int32_t twin = strstr(t.name, "layer.0.") ? 0 : k == 2 ? e > 0 : e / 2 * 2;
        memmove(w + (size_t)(j * EXPERTS + e) * width, w + (size_t)(j * EXPERTS + twin) * width,
                width * sizeof *w);
      }
  }
  if (model) moe_model_pack(model, NULL, env);
  return model;
}

/* The model and its copy without `drop`, of tasks 0 and 1 in that order, and a batch of them. */
static int twins(moe_router router, int32_t k, int variant, const uint8_t *drop,
                 const moe_env *env) {
  static const int32_t keep[] = {0, 1};
  int s;
  extract_less = NULL;
  whole = full(router, k, variant, env);
  if (!whole || moe_model_extract(&extract_less, whole, keep, 2, drop, env)) return 0;
  models_random_batch(&extract_batch, whole, 12, 19, (uint64_t)variant + 3);
  for (s = 0; s < 12; ++s) {
    extract_batch.task[s] = s % 2;
    extract_batch.label[s] = (float)(s % 2);
  }
  return 1;
}

static void twins_free(void) {
  moe_model_free(whole);
  moe_model_free(extract_less);
}

/* Scores, hidden states behind them; routes of every layer too. */
typedef struct outcome {
  float scores[12 * WIDTH], hidden[12 * 19 * 20], prob[EXTRACT_LAYERS][12 * 19 * EXPERTS];
  int32_t expert[EXTRACT_LAYERS][12 * 19 * 2];
} outcome;

static outcome seen[2];

static int run(outcome *out, const moe_model *model, const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context = NULL;
  int32_t l, M = extract_batch.start[12];
  int good;
  memset(out, 0, sizeof *out);
  if (moe_context_create(&context, model, &limits, env)) return 0;
  good = !moe_forward(context, out->scores, &extract_batch.b, env);
  memcpy(out->hidden, moe_context_hidden(context), (size_t)M * 20 * sizeof(float));
  for (l = 0; l < EXTRACT_LAYERS && good; ++l) {
    moe_routes r;
    moe_context_routes(context, l, &r);
    memcpy(out->prob[l], r.prob, (size_t)(M * r.N) * sizeof(float));
    memcpy(out->expert[l], r.expert, (size_t)(M * r.k) * sizeof(int32_t));
  }
  moe_context_free(context);
  return good;
}

static int same(const moe_model *a, const moe_model *b, const moe_env *env) {
  return run(&seen[0], a, env) && run(&seen[1], b, env) &&
         !memcmp(&seen[0], &seen[1], sizeof seen[0]);
}

static size_t data_bytes(const models_file *file) {
  return file->used - 8 -
         ((size_t)file->data[0] | (size_t)file->data[1] << 8 | (size_t)file->data[2] << 16);
}

static void test_extract_without_unused_experts_changes_no_bit(void) {
  static const moe_router router[] = {MOE_ROUTER_SHARED, MOE_ROUTER_TASK, MOE_ROUTER_EMBEDDING};
  int r, k, variant;
  for (r = 0; r < 3; ++r)
    for (k = 1; k <= 2; ++k)
      for (variant = 0; variant < 3; ++variant) {
        moe_env env = models_env(MOE_ISA_AUTO);
        CHECK(twins(router[r], k, variant, unused[k - 1], &env), "%s", said);
        CHECK(same(whole, extract_less, &env), "router %d, k %d, variant %d: other bits", r, k,
              variant);
        CHECK(moe_model_config(extract_less)->experts == EXPERTS &&
                  !memcmp(moe_model_config(extract_less)->pruned, unused[k - 1], CELLS),
              "configuration");
        CHECK(moe_model_find_tensor(extract_less, "encoder.layer.1.experts.3.output.dense.bias") ==
                  -1,
              "it is still there");
        twins_free();
      }
}

static void test_extract_saves_what_the_experts_have(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  size_t expert = 2 * 20 * 37 + 20 + 37, heads = 20 + 1 + 2 * (20 + 1) + 2 * (60 + 1),
         gates = EXTRACT_LAYERS * 3 * EXPERTS * 20, bytes[2];
  static const int32_t keep[] = {0, 1};
  moe_model *alone = NULL;
  models_file before, after;
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, unused[0], &env), "%s", said);
  CHECK(moe_model_parameters(whole) - moe_model_parameters(extract_less) ==
            5 * expert + heads + gates,
        "parameters");
  CHECK(!moe_model_extract(&alone, whole, keep, 2, NULL, &env), "%s", said);
  before = models_written(alone, &env), after = models_written(extract_less, &env);
  CHECK(data_bytes(&before) - data_bytes(&after) == 4 * 5 * expert, "%zu bytes, then %zu",
        before.used, after.used);
  CHECK(!moe_model_size(moe_model_config(alone), extract_tasks, 2, &bytes[0], &env) &&
            !moe_model_size(moe_model_config(extract_less), extract_tasks, 2, &bytes[1], &env),
        "sizes");
  CHECK(bytes[0] - bytes[1] > 4 * 5 * expert - 256 && bytes[0] > bytes[1],
        "the block has %zu bytes, then %zu", bytes[0], bytes[1]);
  CHECK(moe_model_pack_size(alone) - moe_model_pack_size(extract_less) ==
            4 * 5 * (moe_pack_floats(37, 20) + moe_pack_floats(20, 37)),
        "packed");
  free(before.data), free(after.data);
  moe_model_free(alone);
  twins_free();
}

static void test_extract_table_of_tensors(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int quantized;
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, some, &env), "%s", said);
  for (quantized = 0; quantized < 2; ++quantized) {
    moe_model *small = NULL, *of = extract_less;
    size_t place[2] = {0, 0};
    int32_t i, experts = 0;
    if (quantized) CHECK(!moe_model_quantize(&small, extract_less, &env), "%s", said);
    if (quantized) of = small;
    for (i = 0; i < moe_model_tensors(of); ++i) {
      moe_tensor t;
      int bytes, l, e;
      const char *at;
      CHECK(!moe_model_tensor(of, i, &t), "tensor %d", (int)i);
      CHECK(moe_model_find_tensor(of, t.name) == i, "%s is not found", t.name);
      bytes = t.type == MOE_TYPE_I8;
      CHECK(t.offset == place[bytes], "%s at %zu instead of %zu", t.name, t.offset, place[bytes]);
      place[bytes] += t.count;
      at = strstr(t.name, ".experts.");
      if (!at) continue;
      ++experts;
      l = t.name[14] - '0', e = at[9] - '0';
      CHECK(!some[l * EXPERTS + e], "%s is there", t.name);
    }
    CHECK(experts == 4 * (4 + 2 * quantized), "%d tensors of experts", (int)experts);
    moe_model_free(small);
  }
  twins_free();
}

static void test_extract_survives_a_file(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int quantized, few;
  for (quantized = 0; quantized < 2; ++quantized)
    for (few = 0; few < 2; ++few) {
      moe_model *small = NULL, *read = NULL, *opened = NULL, *of;
      models_file file, again;
      void *raw_block, *raw_file, *block, *mapped;
      size_t bytes = 0;
      CHECK(twins(few ? MOE_ROUTER_EMBEDDING : MOE_ROUTER_TASK, 1, 1, few ? some : unused[0], &env),
            "%s", said);
      if (quantized) CHECK(!moe_model_quantize(&small, extract_less, &env), "%s", said);
      of = quantized ? small : extract_less;
      file = models_written(of, &env);
      CHECK(file.used && !moe_model_read(&read, file.data, file.used, &env), "%s", said);
      CHECK(same(of, read, &env), "other bits after reading");
      CHECK(!memcmp(moe_model_config(read)->pruned, few ? some : unused[0], CELLS),
            "other experts are absent");
      again = models_written(read, &env);
      CHECK(again.used == file.used && !memcmp(again.data, file.data, file.used),
            "written again, it is another file");
      CHECK(!moe_model_open_size(file.data, file.used, &bytes, &env), "%s", said);
      block = models_block(&raw_block, bytes), mapped = models_block(&raw_file, file.used);
      memcpy(mapped, file.data, file.used);
      if (moe_model_open(&opened, mapped, file.used, block, bytes, &env) !=
          MOE_E_UNSUPPORTED) { /* the high byte first */
        CHECK(opened, "%s", said);
        CHECK(same(of, opened, &env), "other bits in place");
        CHECK(!moe_model_pack(opened, NULL, &env) && same(of, opened, &env),
              "other bits, packed in place");
      }
      moe_model_free(opened);
      free(raw_block), free(raw_file), free(file.data), free(again.data);
      moe_model_free(read);
      moe_model_free(small);
      twins_free();
    }
}

static void test_extract_int8_without_unused_experts_changes_no_bit(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *a = NULL, *b = NULL;
  models_file before, after;
  CHECK(twins(MOE_ROUTER_TASK, 1, 1, unused[0], &env), "%s", said);
  CHECK(!moe_model_quantize(&a, whole, &env) && !moe_model_quantize(&b, extract_less, &env), "%s",
        said);
  CHECK(run(&seen[0], a, &env) && run(&seen[1], b, &env), "%s", said);
  if (!memcmp(seen[0].expert, seen[1].expert, sizeof seen[0].expert))
    CHECK(!memcmp(&seen[0], &seen[1], sizeof seen[0]), "other bits");
  CHECK(!memcmp(seen[0].expert, seen[1].expert, sizeof seen[0].expert), "other routes");
  before = models_written(a, &env), after = models_written(b, &env);
  CHECK(before.used > after.used + 5 * 2 * 20 * 37, "%zu bytes, then %zu", before.used, after.used);
  free(before.data), free(after.data);
  moe_model_free(a);
  moe_model_free(b);
  twins_free();
}

static void test_extract_has_the_same_bits_everywhere(void) {
  moe_env env = models_env(MOE_ISA_SCALAR);
  int isa;
  CHECK(twins(MOE_ROUTER_TASK, 2, 0, some, &env), "%s", said);
  CHECK(run(&seen[0], extract_less, &env), "%s", said);
  for (isa = MOE_ISA_SCALAR; isa < MOE_ISA_COUNT; ++isa) {
    moe_env other;
    moe_pool *pool = NULL;
    moe_model *again = NULL;
    static const int32_t keep[] = {0, 1};
    if (!moe_isa_available((moe_isa)isa)) continue;
    moe_env_init(&other, (moe_isa)isa);
    other.log = models_log;
    CHECK(!moe_pool_create_exact(&pool, 3, &other), "%s", said);
    CHECK(!moe_model_extract(&again, whole, keep, 2, some, &other), "%s", said);
    CHECK(run(&seen[1], again, &other) && !memcmp(&seen[0], &seen[1], sizeof seen[0]),
          "%s: other bits", moe_isa_name((moe_isa)isa));
    moe_model_free(again);
    moe_pool_free(pool);
  }
  twins_free();
}

static void test_extract_in_bf16_changes_no_bit(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  env.precision = MOE_TYPE_BF16;
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, unused[0], &env), "%s", said);
  CHECK(moe_model_pack_size_bf16(extract_less) < moe_model_pack_size_bf16(whole) &&
            same(whole, extract_less, &env),
        "other bits");
  twins_free();
}

static void test_extract_the_best_of_the_others_stands_in(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int32_t t, e, M;
  int moved = 0;
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, some, &env), "%s", said);
  CHECK(run(&seen[0], whole, &env) && run(&seen[1], extract_less, &env), "%s", said);
  M = extract_batch.start[12];
  CHECK(!memcmp(seen[0].prob[0], seen[1].prob[0], sizeof seen[0].prob[0]),
        "probabilities of the first layer");
  for (t = 0; t < M; ++t) {
    int32_t best = -1, l;
    for (l = 0; l < EXTRACT_LAYERS; ++l) {
      const float *p = seen[1].prob[l] + t * EXPERTS;
      for (best = -1, e = 0; e < EXPERTS; ++e)
        if (!some[l * EXPERTS + e] && (best < 0 || p[e] > p[best])) best = e;
      CHECK(seen[1].expert[l][t] == best,
            "layer %d, token %d goes to %d, the best that is there is %d", (int)l, (int)t,
            (int)seen[1].expert[l][t], (int)best);
    }
    moved += seen[0].expert[0][t] != seen[1].expert[0][t];
  }
  CHECK(moved > 0 && memcmp(seen[0].scores, seen[1].scores, sizeof seen[0].scores),
        "nothing has moved");
  twins_free();
}

static void test_extract_again_and_adapt(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  static const uint8_t none[CELLS], first[CELLS] = {0, 1, 1, 0, 0, 0, 0, 0},
                                    second[CELLS] = {0, 0, 1, 1, 0, 1, 0, 1};
  static const int32_t keep[] = {0, 1};
  moe_model *a = NULL, *b = NULL, *more = NULL;
  moe_task extra;
  models_file one, two;
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, unused[0], &env), "%s", said);
  CHECK(!moe_model_extract(&a, whole, keep, 2, first, &env) &&
            !moe_model_extract(&b, a, keep, 2, second, &env),
        "%s", said);
  one = models_written(b, &env), two = models_written(extract_less, &env);
  CHECK(one.used == two.used && !memcmp(one.data, two.data, one.used),
        "in two steps it is another model");
  free(one.data), free(two.data);
  extra = extract_tasks[1];
  snprintf(extra.name, sizeof extra.name, "more");
  CHECK(!moe_model_adapt(&more, extract_less, &extra, 1, 5, &env), "%s", said);
  CHECK(same(extract_less, more, &env), "other bits with one task more");
  moe_model_free(a);
  moe_model_free(b);
  moe_model_free(more);
  a = b = NULL;
  CHECK(!moe_model_extract(&a, whole, keep, 2, none, &env) && !moe_model_config(a)->pruned,
        "nothing is absent, and yet there is a list");
  CHECK(!moe_model_extract(&b, whole, keep, 2, NULL, &env), "%s", said);
  one = models_written(a, &env), two = models_written(b, &env);
  CHECK(one.used == two.used && !memcmp(one.data, two.data, one.used),
        "with nothing dropped it is another file");
  free(one.data), free(two.data);
  moe_model_free(a);
  moe_model_free(b);
  twins_free();
}

static void test_extract_in_a_block_of_the_callers(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, EXPERTS, 1);
  uint8_t mine[CELLS];
  size_t bytes = 0, i, offset;
  moe_model *model = NULL, *all = NULL;
  moe_tensor t;
  void *raw, *block;
  models_tasks(extract_tasks);
  CHECK(!moe_model_create(&all, &c, extract_tasks, MODELS_TASKS, 3, &env), "%s", said);
  memcpy(mine, some, CELLS);
  c.pruned = mine;
  CHECK(!moe_model_size(&c, extract_tasks, MODELS_TASKS, &bytes, &env), "%s", said);
  block = models_block(&raw, bytes);
  CHECK(moe_model_init(&model, block, bytes - 1, &c, extract_tasks, MODELS_TASKS, 3, &env) ==
            MOE_E_MEMORY,
        "a byte less is enough");
  CHECK(!moe_model_init(&model, block, bytes, &c, extract_tasks, MODELS_TASKS, 3, &env), "%s",
        said);
  memset(mine, 1, CELLS);
  CHECK(!memcmp(moe_model_config(model)->pruned, some, CELLS), "the list is the caller's");
  for (i = 0; i < (size_t)moe_model_tensors(model); ++i) { /* same names, same first values */
    moe_model_tensor(model, (int32_t)i, &t);
    offset = t.offset;
    CHECK(!moe_model_tensor(all, moe_model_find_tensor(all, t.name), &t), "%s", t.name);
    CHECK(!memcmp(moe_model_weights(model) + offset, moe_model_weights(all) + t.offset,
                  t.count * sizeof(float)),
          "%s", t.name);
  }
  free(raw);
  moe_model_free(all);
}

static moe_trainer *train(moe_model *model, int steps, const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config config;
  moe_trainer *trainer = NULL;
  moe_train_config_init(&config);
  config.steps = 20;
  config.lr = 1e-3f;
  config.balance = 0.01f;
  config.seed = 4;
  config.clip_norm = 0;
  if (moe_trainer_create(&trainer, model, &limits, &config, env)) return NULL;
  while (steps-- > 0)
    if (moe_trainer_accumulate(trainer, &extract_batch.b, 0, NULL, NULL, env) ||
        moe_trainer_step(trainer, NULL, env))
      return NULL;
  return trainer;
}

/* Training goes on as it would have with experts that no token sees. */
static void test_extract_trains(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_trainer *a, *b;
  moe_tensor t, u;
  int32_t i;
  float error = 1;
  CHECK(twins(MOE_ROUTER_TASK, 2, 1, unused[1], &env), "%s", said);
  a = train(whole, 0, &env), b = train(extract_less, 0, &env);
  CHECK(a && b, "%s", said);
  CHECK(!moe_trainer_accumulate(a, &extract_batch.b, 0, NULL, NULL, &env) &&
            !moe_trainer_accumulate(b, &extract_batch.b, 0, NULL, NULL, &env),
        "%s", said);
  for (i = 0; i < moe_model_tensors(extract_less); ++i) {
    moe_model_tensor(extract_less, i, &t);
    CHECK(!moe_model_tensor(whole, moe_model_find_tensor(whole, t.name), &u), "%s", t.name);
    CHECK(!memcmp(moe_trainer_gradients(b) + t.offset, moe_trainer_gradients(a) + u.offset,
                  t.count * sizeof(float)),
          "gradient of %s", t.name);
  }
  moe_trainer_free(a);
  moe_trainer_free(b);
  twins_free();
  CHECK(twins(MOE_ROUTER_EMBEDDING, 1, 1, some, &env), "%s", said);
  b = train(extract_less, 3, &env);
  CHECK(b, "%s", said);
  CHECK(!moe_gradcheck(b, &extract_batch.b, 200, &error, &env) && error < 5e-3f,
        "gradients are off by %g", (double)error);
  moe_trainer_free(b);
  twins_free();
}

static void test_extract_checkpoints(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_trainer *a, *b;
  moe_model *twin = NULL, *all = NULL;
  models_file m;
  moe_writer writer = models_writer(&m);
  static const int32_t keep[] = {0, 1};
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, some, &env), "%s", said);
  CHECK(!moe_model_extract(&twin, whole, keep, 2, some, &env) &&
            !moe_model_extract(&all, whole, keep, 2, NULL, &env),
        "%s", said);
  a = train(extract_less, 3, &env), b = train(twin, 0, &env);
  CHECK(a && b && !moe_checkpoint_write(a, NULL, NULL, &writer, &env), "%s", said);
  CHECK(!moe_checkpoint_read(b, NULL, m.data, m.used, &env), "%s", said);
  CHECK(!moe_trainer_accumulate(a, &extract_batch.b, 0, NULL, NULL, &env) &&
            !moe_trainer_step(a, NULL, &env),
        "%s", said);
  CHECK(!moe_trainer_accumulate(b, &extract_batch.b, 0, NULL, NULL, &env) &&
            !moe_trainer_step(b, NULL, &env),
        "%s", said);
  CHECK(!memcmp(moe_model_weights(extract_less), moe_model_weights(twin),
                moe_model_parameters(extract_less) * sizeof(float)),
        "it went on elsewhere");
  moe_trainer_free(b);
  b = train(all, 0, &env);
  CHECK(b && moe_checkpoint_read(b, NULL, m.data, m.used, &env) == MOE_E_FORMAT &&
            strstr(said, "pruned experts"),
        "%s", said);
  moe_trainer_free(a);
  moe_trainer_free(b);
  free(m.data);
  moe_model_free(twin);
  moe_model_free(all);
  twins_free();
}

static void test_extract_refuses(void) {
  static const uint8_t layer[CELLS] = {0, 0, 0, 0, 1, 1, 1, 1};
  static const int32_t keep[] = {0, 1};
  static uint8_t disabled[CELLS] = {0, 1, 0, 0, 0, 0, 0, 0};
  static int32_t forced[EXTRACT_LAYERS * 12 * 19];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context = NULL;
  moe_model *none = NULL, *dense;
  moe_config c;
  static float scores[12 * WIDTH];
  CHECK(twins(MOE_ROUTER_TASK, 2, 0, some, &env), "%s", said);
  CHECK(moe_model_extract(&none, whole, keep, 2, layer, &env) == MOE_E_ARGUMENT &&
            strstr(said, "layer 1 keeps 0 of 4"),
        "%s", said);
  CHECK(moe_model_extract(&none, whole, keep, 2, unused[0], &env) == MOE_E_ARGUMENT &&
            strstr(said, "at least top_k (2)"),
        "%s", said);
  CHECK(moe_model_import(extract_less, "x", 1, NULL, &env) == MOE_E_UNSUPPORTED &&
            strstr(said, "pruned"),
        "%s", said);
  CHECK(!moe_context_create(&context, extract_less, &limits, &env), "%s", said);
  moe_context_mask(context, disabled);
  CHECK(moe_forward(context, scores, &extract_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "keeps 1 of 4"),
        "%s", said);
  moe_context_free(context);
  twins_free();
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, some, &env), "%s", said);
  CHECK(!moe_context_create(&context, extract_less, &limits, &env), "%s", said);
  moe_context_force(context, forced);
  CHECK(moe_forward(context, scores, &extract_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "expert 0, which is pruned"),
        "%s", said);
  moe_context_free(context);
  twins_free();
  c = models_config(MOE_ROUTER_DENSE, 1, 1);
  dense = models_create(&c, extract_tasks, MODELS_TASKS, &env);
  CHECK(moe_model_extract(&none, dense, keep, 2, layer, &env) == MOE_E_ARGUMENT &&
            strstr(said, "a model without gates"),
        "%s", said);
  moe_model_free(dense);
  c.pruned = disabled;
  CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT && strstr(said, "a model without gates"), "%s",
        said);
  c = models_config(MOE_ROUTER_TASK_LEVEL, 4, 1);
  c.unit = MOE_UNIT_BLOCK;
  c.pruned = disabled;
  CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT && !none, "blocks that are absent");
}

/* Reads and opens a copy of the file with `to` in place of `from`, equally long. 1 where both say
   that it is damaged. */
static int damaged(const models_file *file, const char *from, const char *to, const char *says,
                   const moe_env *env) {
  unsigned char *at;
  void *raw, *raw_block = NULL, *block;
  unsigned char *copy = (unsigned char *)models_block(&raw, file->used);
  moe_model *model = NULL;
  size_t length = strlen(from), bytes = 0;
  int good;
  memcpy(copy, file->data, file->used);
  for (at = copy; at + length < copy + file->used && memcmp(at, from, length);) ++at;
  memcpy(at, to, length);
  said[0] = 0;
  good = moe_model_read(&model, copy, file->used, env) == MOE_E_FORMAT && strstr(said, says);
  if (!moe_model_open_size(copy, file->used, &bytes, env)) {
    block = models_block(&raw_block, bytes);
    good &= moe_model_open(&model, copy, file->used, block, bytes, env) != MOE_OK;
  }
  free(raw);
  free(raw_block);
  return good && !model;
}

static void test_extract_damaged_lists_are_found(void) {
  static const char list[] = "[[1,2,3],[1,3]]";
  static const char *const bad[][2] = {{"[[0,1,2,3],[3]]", "layer 0 keeps 0 of 4"},
                                       {"[[1,2,3],[3,1]]", "out of range"},
                                       {"[[1,2,3],[1,1]]", "out of range"},
                                       {"[[1,2,3],[1,4]]", "out of range"},
                                       {"[[1,2,3],[-1 ]]", "out of range"},
                                       {"[[1,2,3],[1.5]]", "expected an integer"},
                                       {"[[1,2,3]      ]", "fewer layers"},
                                       {"[             ]", "fewer layers"},
                                       {"[[1,2],[3],[1]]", "more layers"},
                                       {"[[1,2,3],[1,2]]", "experts.2."},
                                       {"[[2,3  ],[1,3]]", "needs"},
                                       {"[1,2,3,  [1,3]]", "array"},
                                       {"{             }", "array"},
                                       {"[[1,2,3],[1,3] ", "comma"},
                                       {"[[1,2,3],[\\\"]] ", ""},
                                       {"           null", "array"}};
  moe_env env = models_env(MOE_ISA_AUTO);
  models_file file;
  size_t i;
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, unused[0], &env), "%s", said);
  file = models_written(extract_less, &env);
  for (i = 0; i < sizeof bad / sizeof *bad; ++i)
    CHECK(strlen(bad[i][0]) == sizeof list - 1, "%s has another length", bad[i][0]);
  for (i = 0; i < sizeof bad / sizeof *bad; ++i)
    CHECK(damaged(&file, list, bad[i][0], bad[i][1], &env), "%s: %s", bad[i][0], said);
  CHECK(damaged(&file, "\\\"absent\\\"", "\\\"abzent\\\"", "unknown member", &env), "%s", said);
  CHECK(damaged(&file, "\\\"experts\\\":4", "\\\"experts\\\":3", "out of range", &env), "%s", said);
  CHECK(damaged(&file, "\\\"experts\\\":4", "\\\"experts\\\":0", "experts", &env), "%s", said);
  CHECK(damaged(&file, "\\\"layers\\\":2", "\\\"layers\\\":9", "fewer", &env), "%s", said);
  CHECK(damaged(&file, "\\\"layers\\\":2", "\\\"layers\\\":0", "layers", &env), "%s", said);
  free(file.data);
  twins_free();
}

/* Whatever byte of the header changes: a status, or a model that can be used. */
static void test_extract_any_damage_ends_in_a_status(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  models_file file;
  unsigned char *begin;
  size_t i;
  int j, refused = 0;
  CHECK(twins(MOE_ROUTER_TASK, 1, 0, some, &env), "%s", said);
  file = models_written(extract_less, &env);
  for (begin = file.data; memcmp(begin, "absent", 6);) ++begin;
  for (i = 0; i < 40; ++i)
    for (j = 0; j < 20; ++j) {
      static const char put[] = "[],0123456789-e.\"\\{}";
      unsigned char old = begin[i];
      moe_model *model = NULL;
      begin[i] = (unsigned char)put[j];
      if (moe_model_read(&model, file.data, file.used, &env))
        ++refused;
      else
        CHECK(run(&seen[0], model, &env) || said[0], "it cannot be run");
      moe_model_free(model);
      begin[i] = old;
    }
  CHECK(refused > 500, "%d of 800 were found", refused);
  free(file.data);
  twins_free();
}

static void run_extract(void) {
  RUN(test_extract_without_unused_experts_changes_no_bit);
  RUN(test_extract_saves_what_the_experts_have);
  RUN(test_extract_table_of_tensors);
  RUN(test_extract_survives_a_file);
  RUN(test_extract_int8_without_unused_experts_changes_no_bit);
  RUN(test_extract_has_the_same_bits_everywhere);
  RUN(test_extract_in_bf16_changes_no_bit);
  RUN(test_extract_the_best_of_the_others_stands_in);
  RUN(test_extract_again_and_adapt);
  RUN(test_extract_in_a_block_of_the_callers);
  RUN(test_extract_trains);
  RUN(test_extract_checkpoints);
  RUN(test_extract_refuses);
  RUN(test_extract_damaged_lists_are_found);
  RUN(test_extract_any_damage_ends_in_a_status);
}
