/* The published all-MiniLM-L6-v2: hidden states against Hugging Face transformers, a fine-tuning
   run against PyTorch. Needs the weights, the vocabulary and MRPC of the working data; skips
   without them. */
#include "golden/bert.h"
#include "golden/embed.h"
#include "golden/mrpc.h"

enum { S_MOST = 32, M_MOST = 32 * 128 };
static int32_t ids[M_MOST], start[S_MOST + 1], task[S_MOST];
static uint8_t segments[M_MOST];
static float minilm_label[S_MOST], scores[2 * S_MOST];
static moe_batch batch;

/* MiniLM as a model of one task, with N copies of each FFN; NULL when the file is not there. */
static moe_model *minilm(moe_router router, int32_t experts, const moe_env *env) {
  const char *path = test_shared("models/all-MiniLM-L6-v2/model.safetensors");
  moe_config c;
  moe_task t;
  moe_model *model = NULL;
  void *file = NULL;
  size_t bytes = 0;
  said[0] = 0;
  if (!path) return NULL;
  if (moe_file_read(&file, &bytes, path, env)) return NULL;
  moe_config_init(&c);
  c.router = router;
  c.experts = experts;
  c.gate_scale_n = experts > 1;
  memset(&t, 0, sizeof t);
  snprintf(t.name, sizeof t.name, "MRPC");
  t.pair = 1;
  t.classes = 2;
  if (moe_import_sizes(&c, file, bytes, env) || moe_model_create(&model, &c, &t, 1, 1, env) ||
      moe_model_import(model, file, bytes, NULL, env) || moe_model_pack(model, NULL, env)) {
    moe_model_free(model);
    model = NULL;
  }
  moe_free(file);
  return model;
}

static void begin(void) {
  memset(&batch, 0, sizeof batch);
  memset(task, 0, sizeof task);
  batch.seq_start = start;
  batch.ids = ids;
  batch.segments = segments;
  batch.task = task;
  batch.label = minilm_label;
}

static void add(const int *some_ids, const int *some_segments, int32_t n) {
  int32_t i, at = start[batch.S];
  for (i = 0; i < n; ++i) ids[at + i] = some_ids[i], segments[at + i] = (uint8_t)some_segments[i];
  start[++batch.S] = at + n;
}

static double worst;
static void compare(const float *x, const double *want, size_t n, const char *what, int sequence) {
  size_t i;
  for (i = 0; i < n; ++i) {
    double error = fabs((double)x[i] - want[i]);
    if (error > worst) worst = error;
    CHECK(error <= 2e-5, "%s of sequence %d, element %zu: %.8g, transformers %.8g", what, sequence,
          i, (double)x[i], want[i]);
  }
}

static void compare_samples(const float *rows, int32_t tokens, const double *want, int sequence) {
  size_t k, n = (size_t)tokens * 384;
  for (k = 0; k < 64; ++k) {
    compare(rows + k * 997 % n, want + k, 1, "sample", sequence);
    CHECK_STATE();
  }
}

static void check_hidden(moe_model *model, const moe_env *env) {
  static const double *const cls[] = {bert_0_cls, bert_1_cls, bert_2_cls, bert_3_cls, bert_4_cls};
  static const double *const last[] = {NULL, bert_1_last, bert_2_last, NULL, NULL};
  static const double *const samples[] = {bert_0_samples, bert_1_samples, bert_2_samples,
                                          bert_3_samples, bert_4_samples};
  moe_limits limits = {M_MOST, S_MOST, 0, 0};
  moe_context *context = NULL;
  int s;
  CHECK(moe_context_create(&context, model, &limits, env) == MOE_OK, "%s", said);
  begin();
  add(bert_0_ids, bert_0_segments, 12);
  add(bert_1_ids, bert_1_segments, 29);
  add(bert_2_ids, bert_2_segments, 128);
  add(bert_3_ids, bert_3_segments, 1);
  add(bert_4_ids, bert_4_segments, 3);
  CHECK(moe_forward(context, scores, &batch, env) == MOE_OK, "%s", said);
  for (s = 0; s < 5; ++s) {
    const float *rows = moe_context_hidden(context) + (size_t)start[s] * 384;
    compare(rows, cls[s], 384, "[CLS]", s);
    CHECK_STATE();
    if (last[s])
      compare(rows + (size_t)(start[s + 1] - start[s] - 1) * 384, last[s], 384, "last row", s);
    CHECK_STATE();
    compare_samples(rows, start[s + 1] - start[s], samples[s], s);
    CHECK_STATE();
  }
  moe_context_free(context);
}

static void test_minilm_hidden_states_match_transformers(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = minilm(MOE_ROUTER_DENSE, 1, &env);
  if (!model && !said[0]) SKIP("no models/all-MiniLM-L6-v2 in the working data");
  CHECK(model, "%s", said);
  check_hidden(model, &env);
  CHECK_STATE();
  printf("        worst hidden state: off by %.1e\n", worst);
  moe_model_free(model);
}

/* Four copies of each FFN and gates near zero: with gate scale N / k the sparse model starts as its
   dense parent, up to what the gates weigh. */
static void test_minilm_upcycled_with_scale_n_starts_as_its_parent(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = minilm(MOE_ROUTER_TASK, 4, &env);
  int32_t l;
  if (!model && !said[0]) SKIP("no models/all-MiniLM-L6-v2 in the working data");
  CHECK(model, "%s", said);
  for (l = 0; l < 6; ++l) /* gates of zero: g* N is 1 */
    memset(model->writable + moe__at(model, MOE__GATES, l, 0), 0, 4 * 384 * sizeof(float));
  check_hidden(model, &env);
  moe_model_free(model);
}

/* Texts 0 and 1 of golden/embed.h. The second is a pair. */
static void test_minilm_embeds_as_sentence_transformers(void) {
  static const char *const a[] = {"The quick brown fox jumps over the lazy dog .",
                                  "Is the earth round?"};
  static const char *const b[] = {
      NULL,
      "Na\xc3\xafve caf\xc3\xa9-goers' views: 42% say \xe2\x80\x9cno\xe2\x80\x9d, unbelievably!"};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = minilm(MOE_ROUTER_DENSE, 1, &env);
  moe_predictor *p = NULL;
  const char *path;
  void *vocab = NULL;
  size_t bytes = 0;
  float out[2 * 384];
  if (!model && !said[0]) SKIP("no models/all-MiniLM-L6-v2 in the working data");
  CHECK(model, "%s", said);
  path = test_shared("data/vocab/bert-base-uncased-vocab.txt");
  if (!path) SKIP("no data/vocab in the working data");
  CHECK(!moe_file_read(&vocab, &bytes, path, &env) &&
            !moe_model_set_vocab(model, (const char *)vocab, bytes, &env) &&
            !moe_predictor_create(&p, model, 2, &env),
        "%s", said);
  moe_free(vocab);
  worst = 0;
  CHECK(!moe_predict_embed(p, 0, MOE_POOLING_MEAN, a, b, 2, out), "%s", said);
  compare(out, embed_0_mean, 384, "mean", 0);
  compare(out + 384, embed_1_mean, 384, "mean", 1);
  CHECK_STATE();
  CHECK(!moe_predict_embed(p, 0, MOE_POOLING_CLS, a, b, 2, out), "%s", said);
  compare(out, bert_0_cls, 384, "[CLS]", 0);
  compare(out + 384, bert_1_cls, 384, "[CLS]", 1);
  CHECK_STATE();
  printf("        worst embedding: off by %.1e\n", worst);
  moe_predictor_free(p);
  moe_model_free(model);
}

/* Reads the next row of a train.tsv (label, two texts) into the batch. Returns 0 at the end or on
   an error. */
static int next_row(FILE *f, const moe_tokenizer *tokenizer, const moe_env *env) {
  static char line[8192];
  char *a, *b;
  moe_text text;
  moe_tokens tokens;
  int32_t at = start[batch.S];
  if (!fgets(line, sizeof line, f)) return 0;
  line[strcspn(line, "\n")] = 0;
  a = strchr(line, '\t');
  if (!a) return 0;
  b = strchr(++a, '\t');
  if (!b) return 0;
  *b++ = 0;
  memset(&tokens, 0, sizeof tokens);
  tokens.ids = ids + at;
  tokens.segments = segments + at;
  tokens.capacity = M_MOST - at;
  text = moe_text_of(a, b);
  if (moe_encode(tokenizer, &tokens, &text, 128, MOE_TRUNCATE_LONGEST, env)) return 0;
  minilm_label[batch.S] = (float)(line[0] - '0');
  start[++batch.S] = at + tokens.count;
  return 1;
}

static void mrpc_steps(moe_model *model, const moe_tokenizer *tokenizer, FILE *f,
                       const moe_env *env) {
  moe_limits limits = {M_MOST, S_MOST, 1, 0};
  moe_train_config config;
  moe_trainer *trainer = NULL;
  moe_tensor t;
  double worst_loss = 0;
  int step;
  moe_train_config_init(&config);
  config.lr = 5e-5f;
  config.steps = 60;
  config.dropout = 0;
  t = models_tensor(model, "heads.MRPC.weight");
  golden_fill(moe_model_weights(model) + t.offset, t.count, "heads.MRPC.weight", 0.03125f);
  CHECK(moe_trainer_create(&trainer, model, &limits, &config, env) == MOE_OK, "%s", said);
  for (step = 0; step < 60; ++step) {
    float loss = 0, norm = 0;
    double error;
    begin();
    while (batch.S < 32)
      CHECK(next_row(f, tokenizer, env), "row %d: %s", 32 * step + batch.S, said);
    CHECK(start[32] == mrpc_tokens[step], "step %d: %d tokens, PyTorch %d", step + 1,
          (int)start[32], mrpc_tokens[step]);
    CHECK(moe_trainer_accumulate(trainer, &batch, 0, &loss, NULL, env) == MOE_OK, "%s", said);
    CHECK(moe_trainer_step(trainer, &norm, env) == MOE_OK, "%s", said);
    error = fabs((double)loss - mrpc_losses_double[step]);
    if (error > worst_loss) worst_loss = error;
    CHECK(error <= 1e-4, "step %d: loss %.8g, PyTorch %.8g", step + 1, (double)loss,
          mrpc_losses_double[step]);
    CHECK(fabs((double)norm - mrpc_norms[step]) <= 1e-3 * mrpc_norms[step],
          "step %d: norm %.8g, PyTorch %.8g", step + 1, (double)norm, mrpc_norms[step]);
  }
  printf("        worst loss of 60 steps: off by %.1e\n", worst_loss);
  moe_trainer_free(trainer);
}

static void test_minilm_60_steps_on_mrpc_match_pytorch(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_pool *pool = NULL;
  moe_model *model = minilm(MOE_ROUTER_DENSE, 1, &env);
  moe_tokenizer *tokenizer = NULL;
  const char *path;
  void *vocab = NULL, *raw, *block;
  size_t bytes = 0, need = 0;
  char line[256];
  FILE *f;
  if (!model && !said[0]) SKIP("no models/all-MiniLM-L6-v2 in the working data");
  CHECK(model, "%s", said);
  path = test_shared("data/vocab/bert-base-uncased-vocab.txt");
  if (!path) SKIP("no data/vocab in the working data");
  CHECK(moe_file_read(&vocab, &bytes, path, &env) == MOE_OK, "%s", said);
  CHECK(moe_tokenizer_size((const char *)vocab, bytes, &need, &env) == MOE_OK, "%s", said);
  block = models_block(&raw, need);
  CHECK(moe_tokenizer_init(&tokenizer, block, need, (const char *)vocab, bytes, 0, &env) == MOE_OK,
        "%s", said);
  path = test_shared("data/glue/MRPC/train.tsv");
  if (!path) SKIP("no data/glue/MRPC in the working data");
  f = fopen(path, "rb");
  CHECK(f && fgets(line, sizeof line, f), "cannot read %s", path);
  CHECK(moe_pool_create(&pool, moe_processors(), &env) == MOE_OK, "%s", said);
  mrpc_steps(model, tokenizer, f, &env);
  moe_pool_free(pool);
  fclose(f);
  free(raw);
  moe_free(vocab);
  moe_model_free(model);
}

static void run_minilm(void) {
  RUN(test_minilm_hidden_states_match_transformers);
  RUN(test_minilm_upcycled_with_scale_n_starts_as_its_parent);
  RUN(test_minilm_embeds_as_sentence_transformers);
  RUN(test_minilm_60_steps_on_mrpc_match_pytorch);
}
