/* Text in, label out. */

static const char predictor_vocab[] =
    "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\nbank\nriver\nmoney\n##s\n##ing\n,\n.\n";
enum { ONE, PAIR, RATE, SPAN, SPANS, TASKS };

static moe_model *small_model(int32_t segments, const moe_env *env) {
  static const char *const names[] = {"one", "pair", "rate", "span", "spans"};
  moe_config config;
  moe_task task[TASKS];
  moe_model *model = NULL;
  int i;
  moe_config_init(&config);
  config.layers = 2;
  config.hidden = 16;
  config.ffn = 24;
  config.heads = 2;
  config.vocab = 12;
  config.positions = 24;
  config.max_len = 20;
  config.segments = segments;
  memset(task, 0, sizeof task);
  for (i = 0; i < TASKS; ++i)
    snprintf(task[i].name, sizeof task[i].name, "%s", names[i]), task[i].classes = 2;
  task[ONE].classes = 5;
  task[ONE].max_len = 6;
  task[PAIR].pair = task[SPANS].pair = 1;
  task[RATE].kind = MOE_KIND_REGRESSION;
  task[RATE].classes = 1;
  task[RATE].high = 5;
  task[SPAN].kind = task[SPANS].kind = MOE_KIND_SPAN;
  if (moe_model_create(&model, &config, task, TASKS, 11, env)) return NULL;
  if (moe_model_set_vocab(model, predictor_vocab, sizeof predictor_vocab - 1, env))
    return moe_model_free(model), (moe_model *)NULL;
  return model;
}

static void test_predictor_gives_probabilities(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(2, &env);
  moe_predictor *p;
  float score[MOE_MAX_CLASSES], sum = 0;
  int best = -1, c;
  CHECK(model && !moe_predictor_create(&p, model, 4, &env), "%s", said);
  score[5] = 99;
  CHECK(moe_predict_text(p, ONE, "The banks, the river.", NULL, score, &best) == MOE_OK, "%s",
        said);
  for (c = 0; c < 5; ++c) {
    CHECK(score[c] > 0 && score[c] < 1 && score[c] <= score[best], "score %d is %g", c,
          (double)score[c]);
    sum += score[c];
  }
  CHECK_NEAR(sum, 1, 1e-6);
  CHECK(score[5] == 99, "no score more than classes");
  CHECK(moe_predict_text(p, RATE, "money", NULL, score, NULL) == MOE_OK && score[1] != 99 &&
            isfinite(score[0]),
        "%s", said);
  CHECK(moe_predict_text(p, PAIR, "money", "", score, &best) == MOE_OK, "%s", said);
  moe_predictor_free(p);
  moe_model_free(model);
}

static void test_predictor_gives_logits(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(2, &env);
  moe_predictor *p;
  float score[5], logit[5], prob[5], equal[5] = {0, 0, 0, 0, 0};
  int best[2] = {-1, -1};
  moe_tensor w, b;
  CHECK(model && !moe_predictor_create(&p, model, 4, &env), "%s", said);
  CHECK(!moe_predict_text(p, ONE, "the bank", NULL, score, &best[0]), "%s", said);
  moe_predictor_set_output(p, MOE_OUTPUT_LOGITS);
  CHECK(!moe_predict_text(p, ONE, "the bank", NULL, logit, &best[1]), "%s", said);
  moe_softmax(prob, logit, 5);
  CHECK(best[0] == best[1] && !memcmp(prob, score, sizeof score) &&
            memcmp(logit, score, sizeof score),
        "probabilities are the softmax of the logits");
  moe_predictor_set_output(p, MOE_OUTPUT_PROBABILITIES);
  CHECK(!moe_predict_text(p, ONE, "the bank", NULL, logit, NULL) &&
            !memcmp(logit, score, sizeof score),
        "probabilities again");
  /* a head of zeros with two equal biases: the lower class is the best */
  w = models_tensor(model, "heads.one.weight");
  b = models_tensor(model, "heads.one.bias");
  memset(moe_model_weights(model) + w.offset, 0, w.count * sizeof(float));
  equal[2] = equal[4] = 1;
  memcpy(moe_model_weights(model) + b.offset, equal, sizeof equal);
  CHECK(!moe_predict_text(p, ONE, "the bank", NULL, score, &best[0]) && best[0] == 2 &&
            score[2] == score[4],
        "the lowest of equals, not %d", best[0]);
  moe_predictor_free(p);
  moe_model_free(model);
}

/* The mean and the first row of what the pass of the same ids leaves, whatever the kind of task and
   whatever else is in the batch; one text or two. */
static void test_predictor_embeds_texts(void) {
  enum { H = 16 };
  static const char *const a[3] = {"the bank", "money", "rivers, rivers, rivers. the river"};
  static const char *const b[3] = {NULL, "the river", NULL};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(2, &env);
  moe_predictor *p;
  moe_tensor t;
  float mean[3 * H], cls[3 * H], alone[H];
  int task, i, j;
  const char *none = NULL;
  CHECK(model && !moe_predictor_create(&p, model, 3, &env), "%s", said);
  for (task = 0; task < TASKS; ++task) {
    const float *rows;
    CHECK(!moe_predict_embed(p, task, MOE_POOLING_MEAN, a, b, 3, mean), "%s", said);
    rows = moe_context_hidden(p->context);
    for (i = 0; i < 3; ++i)
      for (j = 0; j < H; ++j) {
        double sum = 0;
        int k, first = p->seq_start[i], end = p->seq_start[i + 1];
        for (k = first; k < end; ++k) sum += (double)rows[k * H + j];
        CHECK_NEAR(mean[i * H + j], sum / (end - first), 1e-7);
      }
    CHECK(p->seq_start[2] - p->seq_start[1] == 6, "[CLS] money [SEP] the river [SEP]");
    CHECK(p->seq_start[3] - p->seq_start[2] == (task == ONE ? 6 : 13), "cut to the task's length");
    CHECK(!moe_predict_embed(p, task, MOE_POOLING_CLS, a, b, 3, cls), "%s", said);
    for (i = 0; i < 3; ++i) {
      rows = moe_context_hidden(p->context) + p->seq_start[i] * H;
      CHECK(!memcmp(cls + i * H, rows, H * sizeof(float)), "task %d, text %d", task, i);
    }
    for (i = 0; i < 3; ++i) {
      CHECK(!moe_predict_embed(p, task, MOE_POOLING_MEAN, a + i, b + i, 1, alone), "%s", said);
      CHECK(!memcmp(alone, mean + i * H, sizeof alone), "whatever else is in the batch");
    }
  }
  CHECK(!moe_predict_embed(p, 0, MOE_POOLING_MEAN, a, NULL, 0, alone), "no texts: %s", said);
  CHECK(!moe_predict_embed(p, TASKS - 1, MOE_POOLING_MEAN, a, NULL, 1, alone) &&
            !memcmp(alone, mean, sizeof alone),
        "b may be NULL: %s", said);
  CHECK(moe_predict_embed(p, TASKS, MOE_POOLING_MEAN, a, b, 1, alone) == MOE_E_ARGUMENT, "%s",
        said);
  CHECK(moe_predict_embed(p, 0, MOE_POOLING_MEAN, a, b, 4, alone) == MOE_E_ARGUMENT, "%s", said);
  CHECK(moe_predict_embed(p, 0, (moe_pooling)2, a, b, 1, alone) == MOE_E_ARGUMENT &&
            strstr(said, "pooling"),
        "%s", said);
  CHECK(moe_predict_embed(p, 0, MOE_POOLING_MEAN, &none, NULL, 1, alone) == MOE_E_ARGUMENT, "%s",
        said);
  t = models_tensor(model, "embeddings.LayerNorm.bias");
  moe_model_weights(model)[t.offset] = NAN;
  CHECK(moe_predict_embed(p, 0, MOE_POOLING_CLS, a, b, 3, cls) == MOE_E_NONFINITE, "%s", said);
  moe_predictor_free(p);
  moe_model_free(model);
}

static void test_predictor_ignores_company_and_allocates_nothing(void) {
  static const char *const text[] = {"the bank", "money", "", "rivers, rivers, rivers. the river",
                                     "\xff\xfe unknown"};
  const char *a[5], *b[5];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(2, &env);
  moe_predictor *p;
  float all[5 * 5], alone[5];
  int best[5], one, i, task, before;
  size_t bytes = 0;
  unsigned char *base, *block;
  CHECK(model && !moe_predictor_size(model, 5, &bytes, &env), "%s", said);
  base = (unsigned char *)malloc(bytes + 64);
  block = base + (64 - (uintptr_t)base % 64) % 64;
  CHECK(moe_predictor_init(&p, block, bytes - 1, model, 5, &env) == MOE_E_MEMORY, "a byte less");
  memset(block, 0xa5, bytes);
  CHECK(moe_predictor_init(&p, block, bytes, model, 5, &env) == MOE_OK, "%s", said);
  before = allocations;
  for (task = ONE; task <= RATE; ++task) {
    int32_t classes = moe_model_task(model, task)->classes;
    for (i = 0; i < 5; ++i) a[i] = text[i], b[i] = task == PAIR ? text[4 - i] : NULL;
    CHECK(moe_predict_texts(p, task, a, b, 5, all, best) == MOE_OK, "%s", said);
    for (i = 0; i < 5; ++i) {
      CHECK(moe_predict_text(p, task, a[i], b[i], alone, &one) == MOE_OK, "%s", said);
      CHECK(one == best[i] && !memcmp(alone, all + 5 * i, (size_t)classes * sizeof(float)),
            "task %d, text %d", task, i);
    }
  }
  CHECK(allocations == before, "%d allocations", allocations - before);
  moe_predictor_free(p);
  free(base);
  moe_model_free(model);
}

static void test_predictor_runs_a_model_in_place(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(2, &env), *opened, *read;
  moe_predictor *p, *q, *r;
  float x[8], y[8], z[8];
  models_file file;
  void *data, *raw, *block, *raw_block;
  size_t bytes;
  int before;
  CHECK(model && (file = models_written(model, &env)).used &&
            (data = models_block(&raw, file.used)) != NULL,
        "%s", said);
  memcpy(data, file.data, file.used);
  CHECK(!moe_model_open_size(data, file.used, &bytes, &env), "%s", said);
  block = models_block(&raw_block, bytes);
  before = allocations;
  CHECK(!moe_model_open(&opened, data, file.used, block, bytes, &env), "%s", said);
  CHECK(allocations == before, "opening allocates nothing");
  CHECK(!moe_model_read(&read, data, file.used, &env), "%s", said);
  CHECK(!moe_predictor_create(&p, model, 1, &env) && !moe_predictor_create(&q, opened, 1, &env) &&
            !moe_predictor_create(&r, read, 1, &env),
        "%s", said);
  CHECK(!moe_predict_text(p, PAIR, "the bank", "money", x, NULL) &&
            !moe_predict_text(q, PAIR, "the bank", "money", y, NULL) &&
            !moe_predict_text(r, PAIR, "the bank", "money", z, NULL),
        "%s", said);
  CHECK(!memcmp(x, y, 2 * sizeof *x) && !memcmp(x, z, 2 * sizeof *x),
        "made, opened in place, read and packed: the same bits");
  moe_predictor_free(p);
  moe_predictor_free(q);
  moe_predictor_free(r);
  moe_model_free(model);
  moe_model_free(opened);
  moe_model_free(read);
  free(raw);
  free(raw_block);
  free(file.data);
}

static void test_predictor_finds_spans_of_characters(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(2, &env);
  moe_predictor *p;
  moe_tokens tokens;
  int32_t ids[16], begin[16], end[16], span[2], chars[4] = {4, 9, 0, 5};
  uint8_t segments[16];
  float scores[2 * 5], moved[2 * 5];
  const char *a = "the banks", *b = "money banks";
  moe_text text = moe_text_of(a, b);
  memset(&tokens, 0, sizeof tokens);
  tokens.ids = ids;
  tokens.segments = segments;
  tokens.begin = begin;
  tokens.end = end;
  tokens.capacity = 16;
  CHECK(model && !moe_predictor_create(&p, model, 2, &env), "%s", said);
  CHECK(!moe_encode(p->tokenizer, &tokens, &text, 16, MOE_TRUNCATE_LONGEST, &env) &&
            tokens.count == 9,
        "%s", said);
  /* [CLS] the bank ##s [SEP] money bank ##s [SEP] */
  CHECK(!moe_tokens_span(span, &tokens, 0, 4, 9, &env) && span[0] == 2 && span[1] == 4, "%d %d",
        (int)span[0], (int)span[1]);
  CHECK(!moe_tokens_span(span, &tokens, 0, 8, 9, &env) && span[0] == 3 && span[1] == 4, "%d %d",
        (int)span[0], (int)span[1]);
  CHECK(!moe_tokens_span(span, &tokens, 1, 0, 7, &env) && span[0] == 5 && span[1] == 7, "%d %d",
        (int)span[0], (int)span[1]);
  CHECK(moe_tokens_span(span, &tokens, 0, 9, 12, &env) == MOE_E_ARGUMENT &&
            strstr(said, "characters 9 to 12"),
        "%s", said);
  CHECK(moe_tokens_span(span, &tokens, 0, 3, 4, &env) == MOE_E_ARGUMENT, "a blank");
  CHECK(moe_predict_spans(p, SPANS, &a, &b, chars, 1, scores, NULL) == MOE_OK, "%s", said);
  chars[2] = 6, chars[3] = 11;
  CHECK(moe_predict_spans(p, SPANS, &a, &b, chars, 1, moved, NULL) == MOE_OK &&
            memcmp(scores, moved, sizeof *moved),
        "another word, another score");
  chars[2] = 60, chars[3] = 66;
  CHECK(moe_predict_spans(p, SPANS, &a, &b, chars, 1, moved, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "text 2"),
        "%s", said);
  moe_predictor_free(p);
  moe_model_free(model);
}

/* One text in place of many; a model without tasks gives the same states. */
static void test_predictor_embeds_without_tasks(void) {
  enum { H = 16 };
  static const char *const a[] = {"the bank"}, *const b[] = {"money, money, money"};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config;
  moe_task task;
  moe_model *model = NULL, *bare = NULL;
  moe_predictor *p, *q;
  float many[H], one[H], score;
  CHECK((model = small_model(2, &env)) != NULL, "%s", said);
  config = *moe_model_config(model);
  config.router = MOE_ROUTER_SHARED;
  task = *moe_model_task(model, PAIR);
  moe_model_free(model);
  CHECK(!moe_model_create(&model, &config, &task, 1, 3, &env) &&
            !moe_model_set_vocab(model, predictor_vocab, sizeof predictor_vocab - 1, &env),
        "%s", said);
  CHECK(!moe_model_extract(&bare, model, NULL, 0, NULL, &env), "%s", said);
  CHECK(!moe_predictor_create(&p, model, 1, &env) && !moe_predictor_create(&q, bare, 1, &env), "%s",
        said);
  CHECK(!moe_predict_embed(p, 0, MOE_POOLING_MEAN, a, b, 1, many), "%s", said);
  CHECK(!moe_embed_text(p, 0, MOE_POOLING_MEAN, a[0], b[0], one), "%s", said);
  CHECK(!memcmp(many, one, sizeof one), "one text");
  CHECK(!moe_embed_text(q, 0, MOE_POOLING_MEAN, a[0], b[0], one), "%s", said);
  CHECK(!memcmp(many, one, sizeof one), "without tasks");
  CHECK(!moe_embed_text(q, 7, MOE_POOLING_CLS, a[0], NULL, one), "the task does not matter: %s",
        said);
  CHECK(moe_embed_text(q, 0, MOE_POOLING_CLS, NULL, NULL, one) == MOE_E_ARGUMENT &&
            strstr(said, "text 0 is NULL"),
        "%s", said);
  CHECK(moe_predict_text(q, 0, a[0], NULL, &score, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "no tasks: it gives embeddings, not answers"),
        "%s", said);
  moe_predictor_free(p);
  moe_predictor_free(q);
  moe_model_free(bare);
  moe_model_free(model);
}

/* A model that reads vectors of three numbers, nine at most. */
enum { VALUE, FOUR, SPAN_OF_NUMBERS, WIDTH = 3, LONGEST = 9 };
static moe_model *features_model(const moe_env *env) {
  moe_config config = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task task[3];
  moe_model *model = NULL;
  config.vocab = 0, config.feature_dim = WIDTH, config.max_len = LONGEST;
  memset(task, 0, sizeof task);
  snprintf(task[0].name, sizeof task[0].name, "value"), task[0].kind = MOE_KIND_REGRESSION;
  task[0].classes = 1, task[0].high = 1;
  snprintf(task[1].name, sizeof task[1].name, "four"), task[1].classes = 4;
  snprintf(task[2].name, sizeof task[2].name, "span"), task[2].kind = MOE_KIND_SPAN;
  task[2].classes = 2;
  if (moe_model_create(&model, &config, task, 3, 1, env)) return NULL;
  models_fill(model, 1);
  return model;
}

/* Numbers in place of texts: what moe_forward and moe_softmax give. */
static void test_predictor_reads_features(void) {
  enum { N = 4 };
  static const int32_t lengths[N] = {5, 1, 9, 2}, start[N + 1] = {0, 5, 6, 15, 17},
                       tasks[N] = {FOUR, FOUR, FOUR, FOUR};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = features_model(&env);
  moe_context *context;
  moe_limits limits = {N * LONGEST, N, 0, 0};
  moe_predictor *p;
  moe_batch batch;
  uint64_t seed = 5;
  float x[17 * WIDTH], want[N * 4], got[N * 4], first[4];
  int best[N], i, c, before;
  CHECK(model, "%s", said);
  for (i = 0; i < 17 * WIDTH; ++i) x[i] = test_random(&seed);
  memset(&batch, 0, sizeof batch);
  batch.S = N, batch.seq_start = start, batch.features = x, batch.task = tasks;
  CHECK(!moe_context_create(&context, model, &limits, &env) &&
            !moe_forward(context, want, &batch, &env) && !moe_predictor_create(&p, model, N, &env),
        "%s", said);
  before = allocations;
  moe_predictor_set_output(p, MOE_OUTPUT_LOGITS);
  CHECK(!moe_predict_features(p, FOUR, x, lengths, N, got, best), "%s", said);
  CHECK(!memcmp(want, got, sizeof got), "the logits of moe_forward");
  moe_predictor_set_output(p, MOE_OUTPUT_PROBABILITIES);
  CHECK(!moe_predict_features(p, FOUR, x, lengths, N, got, best), "%s", said);
  CHECK(allocations == before, "memory was allocated");
  for (i = 0; i < N; ++i) {
    for (c = 0; c < 4; ++c) CHECK(want[4 * i + c] <= want[4 * i + best[i]], "row %d", i);
    moe_softmax(want + 4 * i, want + 4 * i, 4);
  }
  CHECK(!memcmp(want, got, sizeof got), "their softmax");
  CHECK(!moe_predict_features(p, FOUR, x, NULL, N, got, NULL), "%s", said);
  CHECK(!moe_predict_features(p, FOUR, x, NULL, 1, first, NULL) &&
            !memcmp(first, got, 4 * sizeof *first),
        "one vector each, whatever else is in the batch");
  CHECK(!moe_predict_features(p, VALUE, x, NULL, 1, got, best) && best[0] == 0, "%s", said);
  moe_predictor_free(p);
  moe_context_free(context);
  moe_model_free(model);
}

static void test_predictor_says_what_is_wrong_with_features(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = features_model(&env), *reads = small_model(2, &env);
  moe_predictor *p, *q;
  float x[16 * WIDTH] = {0}, got[4] = {9};
  int32_t lengths[] = {5, 10};
  CHECK(model && reads && !moe_predictor_create(&p, model, 2, &env) &&
            !moe_predictor_create(&q, reads, 1, &env),
        "%s", said);
  CHECK(moe_predict_features(p, FOUR, x, lengths, 2, got, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "input 1 has 10 vectors, task 'four' takes 1 to 9"),
        "%s", said);
  lengths[1] = 0;
  CHECK(moe_predict_features(p, FOUR, x, lengths, 2, got, NULL) == MOE_E_ARGUMENT, "%s", said);
  CHECK(moe_predict_features(p, FOUR, x, NULL, 3, got, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "3 inputs at once"),
        "%s", said);
  CHECK(moe_predict_features(p, 3, x, NULL, 1, got, NULL) == MOE_E_ARGUMENT, "%s", said);
  CHECK(moe_predict_features(p, SPAN_OF_NUMBERS, x, NULL, 1, got, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "needs spans"),
        "%s", said);
  CHECK(moe_predict_features(p, FOUR, NULL, NULL, 1, got, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "expected features"),
        "%s", said);
  x[1] = NAN;
  CHECK(moe_predict_features(p, FOUR, x, NULL, 1, got, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "feature 1 of token 0"),
        "%s", said);
  CHECK(moe_predict_text(p, FOUR, "money", NULL, got, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "reads features: use moe_predict_features"),
        "%s", said);
  CHECK(moe_predict_features(q, ONE, x, NULL, 1, got, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "reads texts: use moe_predict_texts"),
        "%s", said);
  CHECK(got[0] == 9, "a score was written");
  moe_predictor_free(p);
  moe_predictor_free(q);
  moe_model_free(reads);
  moe_model_free(model);
}

static void test_predictor_says_what_is_wrong(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(2, &env);
  moe_predictor *p = NULL;
  float scores[3 * 5];
  const char *a[3] = {"the", "the", "the"}, *none = NULL;
  int32_t chars[4] = {0, 3, 0, 3};
  int blocks;
  CHECK(model, "%s", said);
  CHECK(moe_predictor_create(&p, model, 0, &env) == MOE_E_ARGUMENT && !p, "%s", said);
  CHECK(!moe_predictor_create(&p, model, 2, &env), "%s", said);
  CHECK(moe_predict_texts(p, ONE, a, NULL, 3, scores, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "3 inputs at once"),
        "%s", said);
  CHECK(moe_predict_texts(p, TASKS, a, NULL, 1, scores, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "task is 5"),
        "%s", said);
  CHECK(moe_predict_texts(p, -1, a, NULL, 1, scores, NULL) == MOE_E_ARGUMENT, "%s", said);
  CHECK(moe_predict_texts(p, ONE, &none, NULL, 1, scores, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "text 0 is NULL"),
        "%s", said);
  CHECK(moe_predict_texts(p, PAIR, a, NULL, 1, scores, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "'pair' takes two texts"),
        "%s", said);
  CHECK(moe_predict_texts(p, ONE, a, a, 1, scores, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "'one' takes one text"),
        "%s", said);
  CHECK(moe_predict_texts(p, SPAN, a, NULL, 1, scores, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "moe_predict_spans"),
        "%s", said);
  CHECK(moe_predict_spans(p, ONE, a, NULL, chars, 1, scores, NULL) == MOE_E_ARGUMENT &&
            strstr(said, "takes no spans"),
        "%s", said);
  CHECK(moe_predict_spans(p, SPAN, a, NULL, chars, 1, scores, NULL) == MOE_OK, "%s", said);
  CHECK(moe_predict_texts(p, ONE, a, NULL, 0, scores, NULL) == MOE_OK, "nothing to do");
  moe_predictor_free(p);
  CHECK(
      !moe_model_set_vocab(model, "[UNK]\n[CLS]\n[SEP]\n1\n2\n3\n4\n5\n6\n7\n8\n9\n0\n", 38, &env),
      "%s", said);
  blocks = blocks_in_use;
  CHECK(moe_predictor_create(&p, model, 1, &env) == MOE_E_FORMAT &&
            strstr(said, "13 words, expected at most 12"),
        "%s", said);
  CHECK(blocks_in_use == blocks, "%d blocks are left", blocks_in_use - blocks);
  CHECK(!moe_model_set_vocab(model, "[UNK]\n[SEP]\n", 12, &env), "%s", said);
  CHECK(moe_predictor_create(&p, model, 1, &env) == MOE_E_FORMAT && strstr(said, "[CLS]"), "%s",
        said);
  moe_model_free(model);
  model = small_model(1, &env);
  CHECK(model && !moe_predictor_create(&p, model, 1, &env), "%s", said);
  CHECK(moe_predict_texts(p, PAIR, a, a, 1, scores, NULL) == MOE_OK,
        "one kind of segments will do for a pair: %s", said);
  moe_predictor_free(p);
  moe_model_free(model);
}

static void test_predictor_survives_every_failed_allocation(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(1, &env);
  moe_predictor *p = NULL;
  int n, done = 0, blocks = blocks_in_use;
  CHECK(model, "%s", said);
  for (n = 0; n < 10 && !done; ++n) {
    moe_status status;
    said[0] = 0;
    fail_at = allocations + n;
    status = moe_predictor_create(&p, model, 2, &env);
    fail_at = -1;
    done = status == MOE_OK;
    CHECK(done || (status == MOE_E_MEMORY && strstr(said, "no memory") && !p &&
                   blocks_in_use == blocks),
          "allocation %d: status %d, '%s'", n, (int)status, said);
  }
  CHECK(done && n > 1, "%d allocations", n - 1);
  moe_predictor_free(p);
  CHECK(blocks_in_use == blocks, "%d blocks are left", blocks_in_use - blocks);
  moe_model_free(model);
}

/* A label that comes of NaN is none. */
static void test_predictor_refuses_scores_that_are_no_numbers(void) {
  static const char *const a[] = {"money", "the bank"};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(2, &env);
  moe_predictor *p;
  moe_tensor t;
  float score[MOE_MAX_CLASSES];
  int best[2] = {9, 9};
  CHECK(model && !moe_predictor_create(&p, model, 2, &env), "%s", said);
  t = models_tensor(model, "heads.one.bias");
  moe_model_weights(model)[t.offset + 3] = NAN;
  score[0] = 99;
  CHECK(moe_predict_text(p, ONE, "money", NULL, score, best) == MOE_E_NONFINITE, "%s", said);
  CHECK(strstr(said, "input 0: score 3 of task 'one' is not finite") && score[0] == 99 &&
            best[0] == 9,
        "%s", said);
  CHECK(moe_predict_texts(p, ONE, a, NULL, 2, score, best) == MOE_E_NONFINITE && score[0] == 99 &&
            best[0] == 9 && best[1] == 9,
        "%s", said);
  CHECK(moe_predict_text(p, RATE, "money", NULL, score, best) == MOE_OK && isfinite(score[0]),
        "the other tasks are well: %s", said);
  t = models_tensor(model, "heads.rate.bias");
  moe_model_weights(model)[t.offset] = INFINITY;
  score[0] = 99;
  CHECK(moe_predict_text(p, RATE, "money", NULL, score, NULL) == MOE_E_NONFINITE && score[0] == 99,
        "%s", said);
  moe_predictor_free(p);
  moe_model_free(model);
}

static void run_predictor(void) {
  RUN(test_predictor_gives_probabilities);
  RUN(test_predictor_gives_logits);
  RUN(test_predictor_embeds_texts);
  RUN(test_predictor_embeds_without_tasks);
  RUN(test_predictor_reads_features);
  RUN(test_predictor_says_what_is_wrong_with_features);
  RUN(test_predictor_ignores_company_and_allocates_nothing);
  RUN(test_predictor_runs_a_model_in_place);
  RUN(test_predictor_finds_spans_of_characters);
  RUN(test_predictor_survives_every_failed_allocation);
  RUN(test_predictor_refuses_scores_that_are_no_numbers);
  RUN(test_predictor_says_what_is_wrong);
}
