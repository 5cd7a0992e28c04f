/* Configuration, tasks, the table of tensors, the batch check, the forward pass. */
#include "golden/tiny.h"

static models_batch model_batch, model_other;

/* Parameters without heads. */
static size_t count(int32_t layers, int32_t hidden, moe_router router, int32_t experts) {
  static moe_task tasks[8];
  moe_config c;
  moe__plan plan;
  int t;
  moe_config_init(&c);
  c.layers = layers;
  c.hidden = hidden;
  c.ffn = 4 * hidden;
  c.heads = hidden / 32;
  c.router = router;
  c.experts = experts;
  for (t = 0; t < 8; ++t) {
    snprintf(tasks[t].name, sizeof tasks[t].name, "t%d", t);
    tasks[t].classes = 2;
  }
  if (moe_config_check(&c, NULL) || moe__plan_make(&plan, &c, tasks, 8, 0, NULL)) return 0;
  return plan.in[MOE__FLOATS_ALL].heads;
}

static void test_model_counts_the_papers_parameters(void) {
  size_t dense = count(6, 384, MOE_ROUTER_DENSE, 1), one_gate = count(6, 384, MOE_ROUTER_TASK, 1);
  CHECK(dense == 22565376, "MiniLM dense: %zu", dense);
  CHECK(4 * (one_gate - dense) == 73728, "gates: %zu", 4 * (one_gate - dense));
  CHECK(count(6, 384, MOE_ROUTER_TASK, 4) - dense - 73728 == 21268224, "added experts");
  CHECK(count(6, 384, MOE_ROUTER_TASK, 4) == 43907328, "MiniLM: %zu",
        count(6, 384, MOE_ROUTER_TASK, 4));
  CHECK(count(12, 768, MOE_ROUTER_TASK, 4) == 279194112, "BERT-base: %zu",
        count(12, 768, MOE_ROUTER_TASK, 4));
  CHECK(count(24, 1024, MOE_ROUTER_TASK, 4) == 939227136, "BERT-large: %zu",
        count(24, 1024, MOE_ROUTER_TASK, 4));
}

static void test_model_table_of_tensors_has_no_gap(void) {
  char longer[1000] = "heads.";
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  int variant;
  memset(longer + 6, 'x', 900);
  strcat(longer, ".weight");
  models_tasks(tasks);
  for (variant = 0; variant < 6; ++variant) {
    moe_router router = (moe_router)(variant % 3);
    moe_config c = models_config(router, router == MOE_ROUTER_DENSE ? 1 : 3, 1);
    moe_model *model;
    moe_tensor t;
    size_t at = 0;
    int32_t i;
    if (variant > 2) c.feature_dim = 7, c.vocab = 0;
    model = models_create(&c, tasks, MODELS_TASKS, &env);
    CHECK(model, "%s", said);
    for (i = 0; i < moe_model_tensors(model); ++i) {
      CHECK(moe_model_tensor(model, i, &t) == MOE_OK, "tensor %d", (int)i);
      CHECK(t.offset == at, "%s at %zu, not %zu", t.name, t.offset, at);
      CHECK(t.count == (size_t)t.shape[0] * (size_t)(t.dims == 2 ? t.shape[1] : 1), "%s: count",
            t.name);
      CHECK(moe_model_find_tensor(model, t.name) == i, "%s is not found", t.name);
      at += t.count;
    }
    CHECK(at == moe_model_parameters(model), "%zu of %zu", at, moe_model_parameters(model));
    CHECK(moe_model_tensor(model, i, &t) == MOE_E_ARGUMENT &&
              moe_model_tensor(model, -1, &t) == MOE_E_ARGUMENT,
          "index out of range");
    CHECK(moe_model_find_tensor(model, "encoder.layer.99999999999.x") == -1 &&
              moe_model_find_tensor(model, "") == -1 &&
              moe_model_find_tensor(model, "heads.two") == -1 &&
              moe_model_find_tensor(model, longer) == -1,
          "unknown name");
    moe_model_free(model);
  }
}

/* A name is looked up in this model, whatever another one was asked for before. */
static void test_model_names_of_two_models_in_turn(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config sparse = models_config(MOE_ROUTER_TASK, 3, 1),
             plain = models_config(MOE_ROUTER_DENSE, 1, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *many, *one;
  moe_tensor t;
  int32_t i;
  models_tasks(tasks);
  many = models_create(&sparse, tasks, MODELS_TASKS, &env);
  one = models_create(&plain, tasks, MODELS_TASKS, &env);
  CHECK(many && one, "%s", said);
  for (i = 0; i < moe_model_tensors(one); ++i) {
    int32_t other, here;
    CHECK(!moe_model_tensor(one, i, &t), "tensor %d", (int)i);
    other = moe_model_find_tensor(many, "encoder.layer.1.experts.2.output.dense.bias");
    here = moe_model_find_tensor(one, t.name);
    CHECK(other > 0 && here == i, "%s is number %d, not %d", t.name, (int)here, (int)i);
  }
  moe_model_free(many);
  moe_model_free(one);
}

static void test_model_tensors_bear_the_names_of_the_hub(void) {
  enum { ALL = -1, SPARSE = -2 };
  static const struct {
    const char *name;
    int32_t router, rows, cols;
  } want[] = {
      {"embeddings.word_embeddings.weight", ALL, 50, 20},
      {"embeddings.position_embeddings.weight", ALL, 19, 20},
      {"embeddings.token_type_embeddings.weight", ALL, 2, 20},
      {"embeddings.LayerNorm.bias", ALL, 20, 0},
      {"encoder.layer.1.attention.self.query.weight", ALL, 20, 20},
      {"encoder.layer.0.attention.self.value.bias", ALL, 20, 0},
      {"encoder.layer.1.attention.output.dense.weight", ALL, 20, 20},
      {"encoder.layer.1.attention.output.LayerNorm.weight", ALL, 20, 0},
      {"encoder.layer.1.output.LayerNorm.weight", ALL, 20, 0},
      {"heads.three.weight", ALL, 3, 20},
      {"heads.real.bias", ALL, 1, 0},
      {"heads.span_+1.weight", ALL, 2, 60},
      {"encoder.layer.1.intermediate.dense.weight", MOE_ROUTER_DENSE, 37, 20},
      {"encoder.layer.1.output.dense.bias", MOE_ROUTER_DENSE, 20, 0},
      {"encoder.layer.1.gate.weight", MOE_ROUTER_SHARED, 3, 20},
      {"encoder.layer.0.experts.2.output.dense.weight", SPARSE, 20, 37},
      {"encoder.layer.1.gate.rank-ing.weight", MOE_ROUTER_TASK, 3, 20},
      {"encoder.layer.0.experts.2.intermediate.dense.bias", SPARSE, 37, 0},
  };
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  int router;
  size_t i;
  models_tasks(tasks);
  for (router = 0; router < 3; ++router) {
    moe_config c = models_config((moe_router)router, router ? 3 : 1, 1);
    moe_model *model = models_create(&c, tasks, MODELS_TASKS, &env);
    CHECK(model, "%s", said);
    for (i = 0; i < sizeof want / sizeof *want; ++i) {
      moe_tensor t;
      int32_t index = moe_model_find_tensor(model, want[i].name);
      CHECK((index >= 0) == (want[i].router == ALL || want[i].router == router ||
                             (want[i].router == SPARSE && router != MOE_ROUTER_DENSE)),
            "%s in router %d", want[i].name, router);
      if (index < 0) continue;
      moe_model_tensor(model, index, &t);
      CHECK(t.shape[0] == want[i].rows && (t.dims == 2 ? t.shape[1] : 0) == want[i].cols,
            "shape of %s", t.name);
    }
    moe_model_free(model);
  }
}

static void test_model_config_names_the_field_that_is_wrong(void) {
#define FIELD(field, value, word)                                                                  \
  { offsetof(moe_config, field), value, word }
  static const struct {
    size_t offset;
    int32_t value;
    const char *word;
  } bad[] = {FIELD(layers, 0, "layers"),
             FIELD(layers, 1025, "layers"),
             FIELD(hidden, 0, "hidden"),
             FIELD(hidden, -20, "hidden"),
             FIELD(ffn, 0, "ffn"),
             FIELD(heads, 0, "heads"),
             FIELD(heads, 21, "heads"),
             FIELD(heads, 3, "multiple"),
             FIELD(vocab, 0, "vocab"),
             FIELD(vocab, 1 << 30, "vocab"),
             FIELD(positions, 0, "positions"),
             FIELD(segments, 0, "segments"),
             FIELD(segments, 257, "segments"),
             FIELD(feature_dim, -1, "feature_dim"),
             FIELD(feature_dim, 3, "vocab"),
             FIELD(router, 3, "router"),
             FIELD(router, -1, "router"),
             FIELD(router, MOE_ROUTER_DENSE, "dense"),
             FIELD(experts, 0, "experts"),
             FIELD(experts, MOE_MAX_EXPERTS + 1, "experts"),
             FIELD(top_k, 0, "top_k"),
             FIELD(top_k, 4, "top_k"),
             FIELD(gate_scale_n, 2, "gate_scale_n"),
             FIELD(renormalize, -1, "renormalize"),
             FIELD(max_len, 0, "max_len"),
             FIELD(max_len, 20, "max_len"),
             FIELD(truncate, 2, "truncate"),
             FIELD(cased, 16, "cased")};
#undef FIELD
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config good = models_config(MOE_ROUTER_TASK, 3, 1), c;
  size_t i;
  CHECK(moe_config_check(&good, &env) == MOE_OK, "%s", said);
  for (i = 0; i < sizeof bad / sizeof *bad; ++i) {
    c = good;
    memcpy((char *)&c + bad[i].offset, &bad[i].value, sizeof bad[i].value);
    said[0] = 0;
    CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT, "%s %d is accepted", bad[i].word,
          (int)bad[i].value);
    CHECK(strstr(said, bad[i].word), "%s: %s", bad[i].word, said);
    CHECK(moe_config_check(&c, NULL) == MOE_E_ARGUMENT, "without a log");
  }
}

static void test_model_config_refuses_odd_eps_and_two_scales(void) {
  static const float eps[] = {0, -1, 1, NAN, INFINITY};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config good = models_config(MOE_ROUTER_TASK, 3, 1), c;
  size_t i;
  for (i = 0; i < sizeof eps / sizeof *eps; ++i) {
    c = good;
    c.eps = eps[i];
    CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT && strstr(said, "eps"), "eps %g: %s",
          (double)eps[i], said);
  }
  c = good;
  c.gate_scale_n = c.renormalize = 1;
  CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT && strstr(said, "are both 1"), "%s", said);
  moe_config_init(&c);
  CHECK(moe_config_check(&c, &env) == MOE_OK, "the defaults: %s", said);
}

static moe_status try_tasks(const moe_task *tasks, int32_t T, moe_env *env) {
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  size_t bytes = 0;
  moe_status status;
  said[0] = 0;
  status = moe_model_size(&c, tasks, T, &bytes, env);
  return status == MOE_OK || bytes == 0 ? status
                                        : MOE_STATUS_COUNT; /* results stay untouched on failure */
}

static void test_model_tasks_are_checked_one_by_one(void) {
  static const char *const twice[] = {"a", "b", "a"}, *const empty[] = {"a", "", "c"};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task t[MODELS_TASKS];
#define BAD(change, word)                                                                          \
  do {                                                                                             \
    models_tasks(t);                                                                               \
    change;                                                                                        \
    CHECK(try_tasks(t, MODELS_TASKS, &env) == MOE_E_ARGUMENT, "accepted: %s", #change);            \
    CHECK(strstr(said, word), "'%s' does not say '%s'", said, word);                               \
  } while (0)
  models_tasks(t);
  CHECK(try_tasks(t, MODELS_TASKS, &env) == MOE_OK, "%s", said);
  CHECK(try_tasks(t, 0, &env) == MOE_E_ARGUMENT && strstr(said, "tasks"), "no task: %s", said);
  CHECK(try_tasks(t, MOE_MAX_TASKS + 1, &env) == MOE_E_ARGUMENT, "too many tasks");
  BAD(t[1].name[0] = 0, "its name is empty");
  BAD(memset(t[1].name, 'x', MOE_NAME_BYTES), "longer");
  BAD(t[1].name[1] = '.', "letters");
  BAD(t[1].name[1] = ' ', "letters");
  BAD(memcpy(t[1].name, t[4].name, MOE_NAME_BYTES), "twice");
  BAD(t[1].kind = (moe_kind)7, "kind");
  BAD(t[1].kind = (moe_kind)-1, "kind");
  BAD(t[1].pair = 2, "pair");
  BAD(t[1].classes = 1, "classes");
  BAD(t[1].classes = MOE_MAX_CLASSES + 1, "classes");
  BAD(t[3].classes = 3, "ranking");
  BAD(t[2].classes = 2, "regression");
  BAD(t[2].high = t[2].low, "expected low below high");
  BAD(t[2].high = NAN, "expected low below high");
  BAD(t[2].high = INFINITY, "expected low below high");
  BAD(t[1].max_len = 20, "max_len");
  BAD(t[1].max_len = -1, "max_len");
  BAD(memset(t[1].metrics, 'x', MOE_NAME_BYTES), "metrics");
  BAD(strcpy(t[1].metrics, "accuracy,speed"), "speed");
  BAD(strcpy(t[2].metrics, "pearson,f1"), "for kind regression");
  BAD(t[1].label = twice, "twice");
  BAD(t[1].label = empty, "label 1");
#undef BAD
}

/* The first and the last letter of each range, and their neighbours in ASCII. */
static void test_model_task_names_have_all_letters_and_digits(void) {
  static const char good[] = "aAzZ09", bad[] = "`{@[/:.,*^ \x7f\x80";
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task t[MODELS_TASKS];
  moe_config c = models_config(MOE_ROUTER_TASK, 2, 1);
  moe_model *model = NULL;
  int i;
  models_tasks(t);
  strcpy(t[1].name, good);
  CHECK(moe_model_create(&model, &c, t, MODELS_TASKS, 1, &env) == MOE_OK, "%s", said);
  CHECK(moe_model_find_task(model, good) == 1 &&
            models_tensor(model, "encoder.layer.1.gate.aAzZ09.weight").count == 40,
        "it is found by name");
  moe_model_free(model);
  for (i = 0; good[i]; ++i) {
    sprintf(t[1].name, "%c", good[i]);
    CHECK(try_tasks(t, MODELS_TASKS, &env) == MOE_OK, "'%c': %s", good[i], said);
  }
  for (i = 0; bad[i]; ++i) {
    sprintf(t[1].name, "x%c", bad[i]);
    CHECK(try_tasks(t, MODELS_TASKS, &env) == MOE_E_ARGUMENT && strstr(said, "letters, digits"),
          "'%c' is accepted", bad[i]);
  }
}

/* One past the last is refused, and the last is not. */
static void test_model_tensors_end_with_the_last(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_config c = models_config(MOE_ROUTER_TASK, 2, 1);
  moe_model *model = NULL;
  moe_tensor t, same;
  int32_t n, i;
  models_tasks(tasks);
  CHECK(moe_model_create(&model, &c, tasks, MODELS_TASKS, 1, &env) == MOE_OK, "%s", said);
  n = moe_model_tensors(model);
  memset(&t, 7, sizeof t);
  same = t;
  CHECK(moe_model_tensor(model, n, &t) == MOE_E_ARGUMENT && !memcmp(&t, &same, sizeof t), "past");
  CHECK(moe_model_tensor(model, -1, &t) == MOE_E_ARGUMENT && !memcmp(&t, &same, sizeof t), "-1");
  for (i = 0; i < n; ++i) {
    CHECK(moe_model_tensor(model, i, &t) == MOE_OK, "tensor %d", (int)i);
    CHECK(moe_model_find_tensor(model, t.name) == i, "%s", t.name);
  }
  CHECK(!strcmp(t.name, "heads.span_+1.bias") && t.offset + t.count == moe_model_parameters(model),
        "the last is %s", t.name);
  moe_model_free(model);
}

static void test_model_copies_tasks_and_labels(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_SHARED, 2, 1);
  moe_task tasks[MODELS_TASKS];
  char red[8] = "red";
  const char *label[3];
  moe_model *model = NULL;
  models_tasks(tasks);
  label[0] = red;
  label[1] = "green";
  label[2] = "blue";
  tasks[1].label = label;
  CHECK(moe_model_create(&model, &c, tasks, MODELS_TASKS, 1, &env) == MOE_OK, "%s", said);
  red[0] = 'x';
  label[1] = NULL;
  memset(tasks, 0, sizeof tasks);
  CHECK(!strcmp(moe_model_task(model, 1)->name, "three") &&
            !strcmp(moe_model_task(model, 1)->label[0], "red") &&
            !strcmp(moe_model_task(model, 1)->label[1], "green"),
        "copies");
  CHECK(!strcmp(moe_model_task(model, 0)->label[1], "1"), "without names, labels are numbers");
  CHECK(!moe_model_task(model, 2)->label, "a regression has no labels");
  CHECK(moe_model_find_task(model, "real") == 2 && moe_model_find_task(model, "rea") == -1, "find");
  CHECK(!moe_model_task(model, -1) && !moe_model_task(model, MODELS_TASKS), "task out of range");
  CHECK(moe_model_tasks(model) == MODELS_TASKS && moe_model_max_classes(model) == 3 &&
            moe_model_config(model)->hidden == 20,
        "accessors");
  moe_model_free(model);
  moe_model_free(NULL);
}

static void test_model_keeps_a_copy_of_the_vocabulary(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_DENSE, 1, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model = NULL;
  char text[] = "[CLS]\n[SEP]\n";
  size_t bytes = 7;
  models_tasks(tasks);
  CHECK(moe_model_create(&model, &c, tasks, 1, 1, &env) == MOE_OK, "%s", said);
  CHECK(!moe_model_vocab(model, &bytes) && bytes == 0, "none yet");
  CHECK(moe_model_set_vocab(model, "x", 1, &env) == MOE_OK, "first");
  CHECK(moe_model_set_vocab(model, text, sizeof text - 1, &env) == MOE_OK, "second");
  text[0] = 'x';
  CHECK(!memcmp(moe_model_vocab(model, &bytes), "[CLS]\n[SEP]\n", 12) && bytes == 12, "copy");
  moe_model_free(model);
}

/* Mean and deviation of a tensor. */
static void moments(moe_model *model, const char *name, double *mean, double *sd) {
  moe_tensor t;
  size_t i;
  double sum = 0, square = 0;
  t = models_tensor(model, name);
  for (i = 0; i < t.count; ++i) {
    double x = (double)moe_model_weights(model)[t.offset + i];
    sum += x;
    square += x * x;
  }
  *mean = sum / (double)t.count;
  *sd = sqrt(square / (double)t.count - *mean * *mean);
}

static void test_model_starts_with_the_papers_values(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1), d;
  moe_task tasks[MODELS_TASKS];
  moe_model *a = NULL, *b = NULL, *dense = NULL;
  moe_tensor ta, td;
  double mean, sd;
  c.hidden = 64;
  c.ffn = 200;
  models_tasks(tasks);
  CHECK(moe_model_create(&a, &c, tasks, MODELS_TASKS, 5, &env) == MOE_OK, "%s", said);
  moments(a, "embeddings.word_embeddings.weight", &mean, &sd);
  CHECK(fabs(mean) < 1e-3 && fabs(sd - 0.02) < 1e-3, "embeddings %g %g", mean, sd);
  moments(a, "encoder.layer.1.experts.2.output.dense.weight", &mean, &sd);
  CHECK(fabs(mean) < 1e-3 && fabs(sd - 0.02) < 1e-3, "experts %g %g", mean, sd);
  moments(a, "encoder.layer.1.gate.real.weight", &mean, &sd);
  CHECK(fabs(mean) < 3e-4 && fabs(sd - 0.001) < 2e-4, "gates %g %g", mean, sd);
  moments(a, "encoder.layer.1.output.LayerNorm.weight", &mean, &sd);
  CHECK(mean >= 1 && mean <= 1 && sd <= 0, "LayerNorm %g %g", mean, sd);
  moments(a, "encoder.layer.1.experts.2.output.dense.bias", &mean, &sd);
  CHECK(mean <= 0 && mean >= 0 && sd <= 0, "bias %g %g", mean, sd);
  CHECK(moe_model_create(&b, &c, tasks, MODELS_TASKS, 5, &env) == MOE_OK, "%s", said);
  CHECK(!memcmp(a->weights, b->weights, a->plan.total * sizeof(float)), "same seed, same bits");
  moe_model_free(b);
  CHECK(moe_model_create(&b, &c, tasks, MODELS_TASKS, 6, &env) == MOE_OK, "%s", said);
  CHECK(memcmp(a->weights, b->weights, 100 * sizeof(float)), "another seed, other bits");
  d = c;
  d.router = MOE_ROUTER_DENSE;
  d.experts = 1;
  CHECK(moe_model_create(&dense, &d, tasks, 1, 5, &env) == MOE_OK, "%s", said);
  ta = models_tensor(a, "encoder.layer.1.experts.0.output.dense.weight");
  td = models_tensor(dense, "encoder.layer.1.output.dense.weight");
  CHECK(!memcmp(a->weights + ta.offset, dense->weights + td.offset, ta.count * sizeof(float)),
        "expert 0 starts as the dense FFN");
  ta = models_tensor(a, "encoder.layer.1.experts.1.output.dense.weight");
  CHECK(memcmp(a->weights + ta.offset, dense->weights + td.offset, ta.count * sizeof(float)),
        "expert 1 does not");
  moe_model_free(a);
  moe_model_free(b);
  moe_model_free(dense);
}

/* The models of the two tests below: every router. */
enum { STARTS = 6 };
static moe_config start_config(int k) {
  static const moe_router router[STARTS] = {MOE_ROUTER_DENSE,      MOE_ROUTER_SHARED,
                                            MOE_ROUTER_TASK,       MOE_ROUTER_EMBEDDING,
                                            MOE_ROUTER_TASK_LEVEL, MOE_ROUTER_TASK_LEVEL};
  moe_config c = models_config(router[k], k ? 3 : 1, 1);
  if (k == 3) c.rank = 2;
  if (k < 4) return c;
  c.unit = MOE_UNIT_BLOCK;
  c.selection = MOE_SELECT_GUMBEL;
  c.task_dim = 7;
  if (k == 5) c.vocab = 0, c.feature_dim = 7;
  return c;
}

/* Weights of v0.1 from seed 7, as hashes: the same seed gives the same model in all versions. */
static void test_model_starts_with_the_weights_of_v01(void) {
  static const uint64_t golden[STARTS] = {0x44d4b0279816459cu, 0xaa649a434af4dfa8u,
                                          0x0b3dc7e57b740c7fu, 0x97f9ad621149639eu,
                                          0x6b276040f4c65ca6u, 0x4363ef59a481d193u};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  int k;
  models_tasks(tasks);
  for (k = 0; k < STARTS; ++k) {
    moe_config c = start_config(k);
    moe_model *model = NULL;
    uint64_t h = 0xcbf29ce484222325u;
    size_t i;
    CHECK(moe_model_create(&model, &c, tasks, MODELS_TASKS, 7, &env) == MOE_OK, "%s", said);
    for (i = 0; i < moe_model_parameters(model); ++i) {
      uint32_t bits;
      memcpy(&bits, moe_model_weights(model) + i, sizeof bits);
      h = (h ^ bits) * 0x100000001b3u;
    }
    CHECK(h == golden[k], "model %d: %08x%08x", k, (unsigned)(h >> 32), (unsigned)h);
    moe_model_free(model);
  }
}

/* The deviation of every matrix, by what the header says of its kind. */
static void test_model_spreads_of_every_router(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  int k;
  models_tasks(tasks);
  for (k = 0; k < STARTS; ++k) {
    moe_config c = start_config(k);
    moe_model *model = NULL;
    int32_t i;
    c.hidden = 64;
    c.experts = k ? 16 : 1;
    if (k == 3) c.rank = 9;
    if (k >= 4) c.task_dim = 48;
    CHECK(moe_model_create(&model, &c, tasks, MODELS_TASKS, 7, &env) == MOE_OK, "%s", said);
    for (i = 0; i < moe_model_tensors(model); ++i) {
      moe_tensor t;
      double mean, sd, want = 0.02;
      moe_model_tensor(model, i, &t);
      moments(model, t.name, &mean, &sd);
      if (t.dims == 1) {
        double one = strstr(t.name, "LayerNorm.weight") ? 1 : 0;
        CHECK(mean >= one && mean <= one && sd <= 0, "%s: %g, %g", t.name, mean, sd);
        continue;
      }
      if (strstr(t.name, ".gate.")) want = 0.001;
      if (strstr(t.name, "gate.basis")) want = sqrt(0.001 / 3);
      if (!strcmp(t.name, "tasks.vectors")) want = k == 3 ? sqrt(0.001 / 3) : 1;
      if (!strncmp(t.name, "router.", 7)) want = 1 / sqrt(3.0 * (double)t.shape[1]);
      /* five deviations of an estimate from that many numbers */
      CHECK(fabs(sd / want - 1) < 5 / sqrt(2.0 * (double)t.count), "model %d, %s: %g, expected %g",
            k, t.name, sd, want);
      CHECK(fabs(mean) < 5 * want / sqrt((double)t.count), "model %d, %s: mean %g", k, t.name,
            mean);
    }
    moe_model_free(model);
  }
}

/* A name that looks like another tensor's must not change how a head starts. */
static void test_model_head_of_a_task_called_gate_is_a_head(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model = NULL;
  double mean, sd;
  c.hidden = 200;
  models_tasks(tasks);
  strcpy(tasks[1].name, "gate");
  CHECK(moe_model_create(&model, &c, tasks, MODELS_TASKS, 5, &env) == MOE_OK, "%s", said);
  moments(model, "heads.gate.weight", &mean, &sd);
  CHECK(fabs(mean) < 3e-3 && fabs(sd - 0.02) < 3e-3, "head %g %g", mean, sd);
  moments(model, "encoder.layer.0.gate.gate.weight", &mean, &sd);
  CHECK(fabs(mean) < 2e-4 && fabs(sd - 0.001) < 2e-4, "gate %g %g", mean, sd);
  moe_model_free(model);
}

static void test_model_sizes_are_exact(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_task tasks[MODELS_TASKS];
  moe_model *model = NULL;
  moe_context *context = NULL;
  moe_limits limits = {100, 10, 0, 0};
  size_t need, bytes;
  void *raw, *block;
  char number[32];
  models_tasks(tasks);
  CHECK(moe_model_size(&c, tasks, MODELS_TASKS, &need, &env) == MOE_OK, "%s", said);
  block = models_block(&raw, need + 64);
  CHECK(moe_model_init(&model, block, need - 1, &c, tasks, MODELS_TASKS, 1, &env) == MOE_E_MEMORY &&
            !model,
        "a byte less");
  snprintf(number, sizeof number, "%zu", need - 1);
  CHECK(strstr(said, number), "%s", said);
  snprintf(number, sizeof number, "%zu", need);
  CHECK(strstr(said, number), "%s", said);
  CHECK(moe_model_init(&model, (char *)block + 4, need, &c, tasks, MODELS_TASKS, 1, &env) ==
                MOE_E_ARGUMENT &&
            !model,
        "misaligned");
  memset(block, 0x5a, need + 64);
  CHECK(moe_model_init(&model, block, need, &c, tasks, MODELS_TASKS, 1, &env) == MOE_OK, "%s",
        said);
  for (bytes = need; bytes < need + 64; ++bytes)
    CHECK(((unsigned char *)block)[bytes] == 0x5a, "byte %zu after the block", bytes - need);
  CHECK(((unsigned char *)block)[need - 1] != 0x5a, "the last byte is used");
  CHECK(moe_context_size(model, &limits, &bytes, &env) == MOE_OK, "%s", said);
  {
    void *raw2, *block2 = models_block(&raw2, bytes);
    CHECK(moe_context_init(&context, block2, bytes - 1, model, &limits, &env) == MOE_E_MEMORY &&
              !context,
          "a byte less");
    CHECK(moe_context_init(&context, block2, bytes, model, &limits, &env) == MOE_OK, "%s", said);
    moe_context_free(context);
    free(raw2);
  }
  limits.tokens = 0;
  CHECK(moe_context_size(model, &limits, &bytes, &env) == MOE_E_ARGUMENT && strstr(said, "tokens"),
        "%s", said);
  limits.tokens = 9;
  CHECK(moe_context_size(model, &limits, &bytes, &env) == MOE_E_ARGUMENT &&
            strstr(said, "sequences"),
        "%s", said);
  limits.tokens = INT32_MAX;
  CHECK(moe_context_size(model, &limits, &bytes, &env) == MOE_E_ARGUMENT,
        "tokens times k must fit");
  limits.tokens = 100;
  limits.keep_layers = 2;
  CHECK(moe_context_size(model, &limits, &bytes, &env) == MOE_E_ARGUMENT &&
            strstr(said, "keep_layers"),
        "%s", said);
  moe_model_free(model);
  free(raw);
}

/* Scores and hidden states of `b`, into arrays of the caller; returns 0 on success. */
static int model_forward(const moe_model *model, const moe_batch *b, float *scores, float *hidden,
                         const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context = NULL;
  moe_status status = moe_context_create(&context, model, &limits, env);
  if (!status) status = moe_forward(context, scores, b, env);
  if (!status && hidden && b->S)
    memcpy(hidden, moe_context_hidden(context),
           (size_t)b->seq_start[b->S] * (size_t)moe_model_config(model)->hidden * sizeof(float));
  moe_context_free(context);
  return (int)status;
}

static float model_scores[3][MODELS_S * 8], model_hidden[3][MODELS_M * 64];

static void test_model_scores_do_not_depend_on_company_or_order(void) {
  static const int32_t experts[] = {1, 3, 3}, top_k[] = {1, 1, 2};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  int32_t v, s;
  models_tasks(tasks);
  for (v = 0; v < 3; ++v) {
    moe_config c = models_config((moe_router)v, experts[v], top_k[v]);
    moe_model *model = models_create(&c, tasks, MODELS_TASKS, &env);
    size_t row = (size_t)moe_model_max_classes(model);
    models_random_batch(&model_batch, model, 30, 19, 1);
    CHECK(!model_forward(model, &model_batch.b, model_scores[0], model_hidden[0], &env), "%s",
          said);
    for (s = 0; s < 30; ++s) { /* alone */
      model_other.b.S = 0;
      models_append(&model_other, &model_batch, s, &c);
      CHECK(!model_forward(model, &model_other.b, model_scores[1], model_hidden[1], &env), "%s",
            said);
      CHECK(!memcmp(model_scores[1], model_scores[0] + (size_t)s * row, row * sizeof(float)),
            "router %d: sequence %d alone", v, s);
      CHECK(!memcmp(model_hidden[1], model_hidden[0] + model_batch.start[s] * c.hidden,
                    (size_t)((model_batch.start[s + 1] - model_batch.start[s]) * c.hidden) *
                        sizeof(float)),
            "router %d: hidden states of sequence %d alone", v, s);
    }
    model_other.b.S = 0;
    for (s = 30; s-- > 0;) models_append(&model_other, &model_batch, s, &c); /* backwards */
    CHECK(!model_forward(model, &model_other.b, model_scores[1], NULL, &env), "%s", said);
    for (s = 0; s < 30; ++s)
      CHECK(!memcmp(model_scores[1] + (size_t)(29 - s) * row, model_scores[0] + (size_t)s * row,
                    row * sizeof(float)),
            "router %d: order, sequence %d", v, s);
    moe_model_free(model);
  }
}

/* Scores and hidden states of S sequences of up to `longest` tokens, with every number of threads,
   instruction set, packed or not. */
static void check_bits(moe_config c, int32_t S, int32_t longest) {
  static const int32_t threads[] = {1, 2, 3, 8};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  size_t i;
  int isa, packed;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  models_random_batch(&model_batch, model, S, longest, 2);
  CHECK(!model_forward(model, &model_batch.b, model_scores[0], model_hidden[0], &env), "%s", said);
  for (packed = 0; packed < 2; ++packed) {
    if (packed) CHECK(moe_model_pack(model, NULL, &env) == MOE_OK, "%s", said);
    for (isa = MOE_ISA_SCALAR; isa < MOE_ISA_COUNT; ++isa) {
      if (!moe_isa_available((moe_isa)isa)) continue;
      for (i = 0; i < sizeof threads / sizeof *threads; ++i) {
        moe_env e = models_env((moe_isa)isa);
        moe_pool *pool = NULL;
        CHECK(moe_pool_create_exact(&pool, threads[i], &e) == MOE_OK, "%s", said);
        CHECK(!model_forward(model, &model_batch.b, model_scores[1], model_hidden[1], &e), "%s",
              said);
        moe_pool_free(pool);
        CHECK(!memcmp(model_scores[0], model_scores[1], (size_t)(3 * S) * sizeof(float)),
              "%s, %d threads, packed %d: scores", moe_isa_name((moe_isa)isa), threads[i], packed);
        CHECK(!memcmp(model_hidden[0], model_hidden[1],
                      (size_t)(model_batch.start[S] * c.hidden) * sizeof(float)),
              "%s, %d threads, packed %d: hidden", moe_isa_name((moe_isa)isa), threads[i], packed);
      }
    }
  }
  moe_model_free(model);
}

/* Enough tokens for several pieces; a dense model's pass all its layers, those of one with gates
   meet before each gate. */
static void test_model_bits_do_not_depend_on_threads_isa_or_packing(void) {
  check_bits(models_config(MOE_ROUTER_TASK, 3, 2), 40, 19);
  check_bits(models_config(MOE_ROUTER_DENSE, 1, 1), 40, 19);
}

/* One sequence, and a few of very different lengths: threads take shares of rows, which begin and
   end within sequences. */
static void test_model_bits_of_long_sequences_do_not_depend_on_threads(void) {
  moe_config dense = models_config(MOE_ROUTER_DENSE, 1, 1),
             tag = models_config(MOE_ROUTER_TASK, 3, 1);
  dense.positions = dense.max_len = tag.positions = tag.max_len = 300;
  check_bits(dense, 1, 300);
  check_bits(dense, 3, 260);
  check_bits(tag, 1, 300);
  check_bits(tag, 5, 150);
}

static void test_model_packs_into_a_block_or_the_heap(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  void *raw, *block;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  block = models_block(&raw, moe_model_pack_size(model));
  CHECK(moe_model_pack(model, (char *)block + 4, &env) == MOE_E_ARGUMENT, "misaligned");
  CHECK(moe_model_pack(model, NULL, &env) == MOE_OK && moe_model_pack(model, NULL, &env) == MOE_OK,
        "heap, twice");
  CHECK(moe_model_pack(model, block, &env) == MOE_OK && model->panels == (float *)block, "block");
  CHECK(moe_model_pack(model, NULL, &env) == MOE_OK && model->panels != (float *)block,
        "heap again");
  moe_model_free(model);
  free(raw);
}

static void test_model_ignores_dirty_memory(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_model *model;
  size_t bytes = 0;
  void *raw, *block;
  int i, training;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  models_random_batch(&model_batch, model, 12, 19, 3);
  for (training = 0; training < 2; ++training) {
    limits.training = training;
    CHECK(moe_context_size(model, &limits, &bytes, &env) == MOE_OK, "%s", said);
    block = models_block(&raw, bytes);
    for (i = 0; i < 3; ++i) {
      static const int dirt[] = {0, 0xff, 0x7f};
      moe_context *context = NULL;
      memset(block, dirt[i], bytes);
      CHECK(moe_context_init(&context, block, bytes, model, &limits, &env) == MOE_OK, "%s", said);
      memset(model_scores[i], dirt[i], sizeof model_scores[i]);
      CHECK(moe_forward(context, model_scores[i], &model_batch.b, &env) == MOE_OK, "%s", said);
      CHECK(!memcmp(model_scores[i], model_scores[0], 12 * 3 * sizeof(float)), "filled with %d",
            dirt[i]);
    }
    free(raw);
  }
  moe_model_free(model);
}

static void test_model_runs_at_size_1_and_at_odd_sizes(void) {
  static const int32_t shape[][8] = {/* L H F A V P N k */
                                     {1, 1, 1, 1, 1, 1, 1, 1},
                                     {1, 1, 1, 1, 1, 1, 3, 2},
                                     {3, 7, 3, 7, 2, 2, 5, 3},
                                     {2, 33, 17, 3, 9, 19, 4, 4},
                                     {1, 16, 64, 1, 50, 5, 256, 1}};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  size_t i;
  models_tasks(tasks);
  for (i = 0; i < sizeof shape / sizeof *shape; ++i) {
    moe_config c = models_config(MOE_ROUTER_TASK, shape[i][6], shape[i][7]);
    moe_model *model;
    int32_t s, j;
    c.layers = shape[i][0];
    c.hidden = shape[i][1];
    c.ffn = shape[i][2];
    c.heads = shape[i][3];
    c.vocab = shape[i][4];
    c.positions = c.max_len = shape[i][5];
    model = models_create(&c, tasks, MODELS_TASKS, &env);
    CHECK(model, "%s", said);
    models_random_batch(&model_batch, model, 9, c.positions, 4);
    CHECK(!model_forward(model, &model_batch.b, model_scores[0], NULL, &env), "%s", said);
    for (s = 0; s < 9; ++s)
      for (j = 0; j < 3; ++j) {
        float x = model_scores[0][3 * s + j];
        CHECK(moe__is_finite(x), "shape %zu: score %d of sequence %d", i, j, s);
        CHECK(j < moe_model_task(model, model_batch.task[s])->classes || (x >= 0 && x <= 0),
              "shape %zu: the rest of a row is zero", i);
      }
    moe_model_free(model);
  }
}

static void test_model_takes_a_hundred_tasks(void) {
  static moe_task many[100];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_model *model;
  int32_t t;
  memset(many, 0, sizeof many);
  for (t = 0; t < 100; ++t) {
    snprintf(many[t].name, sizeof many[t].name, "task%d", (int)t);
    many[t].classes = 2 + t % 7;
  }
  model = models_create(&c, many, 100, &env);
  CHECK(model, "%s", said);
  models_random_batch(&model_batch, model, 40, 19, 5);
  CHECK(!model_forward(model, &model_batch.b, model_scores[0], NULL, &env), "%s", said);
  /* the gate of a task matters to its own sequences only */
  {
    moe_tensor tensor;
    char name[128];
    int32_t s;
    snprintf(name, sizeof name, "encoder.layer.0.gate.task%d.weight", (int)model_batch.task[7]);
    tensor = models_tensor(model, name);
    for (t = 0; t < (int32_t)tensor.count; ++t)
      moe_model_weights(model)[tensor.offset + (size_t)t] *= -1;
    CHECK(!model_forward(model, &model_batch.b, model_scores[1], NULL, &env), "%s", said);
    for (s = 0; s < 40; ++s)
      CHECK(!memcmp(model_scores[0] + 8 * s, model_scores[1] + 8 * s, 8 * sizeof(float)) ==
                (model_batch.task[s] != model_batch.task[7]),
            "sequence %d", s);
  }
  moe_model_free(model);
}

static void test_model_takes_an_empty_batch(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  moe_batch none;
  memset(&none, 0, sizeof none);
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  model_scores[0][0] = 7;
  CHECK(!model_forward(model, &none, model_scores[0], NULL, &env), "%s", said);
  CHECK(model_scores[0][0] >= 7 && model_scores[0][0] <= 7, "scores are untouched");
  moe_model_free(model);
}

static void test_model_reads_features(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1), d;
  moe_task tasks[MODELS_TASKS];
  moe_model *ids, *features;
  moe_tensor from, to;
  int32_t i, j;
  models_tasks(tasks);
  c.vocab = MODELS_WIDTH;
  d = c;
  d.vocab = 0;
  d.feature_dim = MODELS_WIDTH;
  ids = models_create(&c, tasks, MODELS_TASKS, &env);
  features = models_create(&d, tasks, MODELS_TASKS, &env);
  CHECK(ids && features, "%s", said);
  models_random_batch(&model_batch, ids, 20, 19, 6);
  /* a feature vector with a single 1 picks a column of the input layer: the same as a word of the
     vocabulary */
  memcpy(&model_other, &model_batch, sizeof model_other);
  memset(model_other.features, 0, sizeof model_other.features);
  for (i = 0; i < model_batch.start[20]; ++i)
    model_other.features[i * MODELS_WIDTH + model_batch.ids[i]] = 1;
  models_connect(&model_other, &d, 20);
  from = models_tensor(ids, "embeddings.word_embeddings.weight");
  to = models_tensor(features, "embeddings.features.weight");
  for (i = 0; i < c.hidden; ++i)
    for (j = 0; j < MODELS_WIDTH; ++j)
      moe_model_weights(features)[to.offset + (size_t)(i * MODELS_WIDTH + j)] =
          moe_model_weights(ids)[from.offset + (size_t)(j * c.hidden + i)];
  to = models_tensor(features, "embeddings.features.bias");
  memset(moe_model_weights(features) + to.offset, 0, to.count * sizeof(float));
  CHECK(!model_forward(ids, &model_batch.b, model_scores[0], model_hidden[0], &env), "%s", said);
  CHECK(!model_forward(features, &model_other.b, model_scores[1], model_hidden[1], &env), "%s",
        said);
  CHECK(!memcmp(model_scores[0], model_scores[1], 20 * 3 * sizeof(float)), "scores");
  models_random_batch(&model_other, features, 20, 19, 7);
  CHECK(!model_forward(features, &model_other.b, model_scores[0], model_hidden[0], &env), "%s",
        said);
  moe_model_free(ids);
  moe_model_free(features);
}

static void test_model_with_one_expert_equals_the_dense_one(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_config c = models_config(MOE_ROUTER_DENSE, 1, 1);
  moe_model *model;
  int router;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  models_random_batch(&model_batch, model, 20, 19, 8);
  CHECK(!model_forward(model, &model_batch.b, model_scores[0], model_hidden[0], &env), "%s", said);
  moe_model_free(model);
  for (router = MOE_ROUTER_SHARED; router <= MOE_ROUTER_TASK; ++router) {
    c.router = (moe_router)router;
    model = models_create(&c, tasks, MODELS_TASKS, &env);
    CHECK(!model_forward(model, &model_batch.b, model_scores[1], model_hidden[1], &env), "%s",
          said);
    CHECK(!memcmp(model_scores[0], model_scores[1], 20 * 3 * sizeof(float)), "scores, router %d",
          router);
    CHECK(!memcmp(model_hidden[0], model_hidden[1],
                  (size_t)(model_batch.start[20] * c.hidden) * sizeof(float)),
          "hidden, router %d", router);
    moe_model_free(model);
  }
}

/* With weight 1 (top-1 renormalised, or gate scale n with a gate of zeros) equal experts are the
   dense model. */
static void test_model_with_equal_experts_equals_the_dense_one(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_config c = models_config(MOE_ROUTER_DENSE, 1, 1);
  moe_model *model;
  int way;
  int32_t l, i;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  models_random_batch(&model_batch, model, 20, 19, 9);
  CHECK(!model_forward(model, &model_batch.b, model_scores[0], model_hidden[0], &env), "%s", said);
  moe_model_free(model);
  c.router = MOE_ROUTER_TASK;
  c.experts = 4;
  for (way = 0; way < 2; ++way) {
    c.renormalize = way == 0;
    c.gate_scale_n = way == 1;
    model = models_create(&c, tasks, MODELS_TASKS, &env);
    for (l = 0; l < c.layers; ++l) {
      float *w = moe_model_weights(model);
      for (i = 1; i < c.experts; ++i)
        memcpy(w + moe__at(model, MOE__IN_W, l, i), w + moe__at(model, MOE__IN_W, l, 0),
               model->plan.in[MOE__FLOATS_ALL].unit[MOE__IN_EXPERT] * sizeof(float));
      if (way)
        memset(w + moe__at(model, MOE__GATE_TASK, l, 0), 0,
               (size_t)(MODELS_TASKS * c.experts * c.hidden) * sizeof(float));
    }
    CHECK(!model_forward(model, &model_batch.b, model_scores[1], model_hidden[1], &env), "%s",
          said);
    CHECK(!memcmp(model_scores[0], model_scores[1], 20 * 3 * sizeof(float)), "scores, way %d", way);
    CHECK(!memcmp(model_hidden[0], model_hidden[1],
                  (size_t)(model_batch.start[20] * c.hidden) * sizeof(float)),
          "hidden, way %d", way);
    moe_model_free(model);
  }
}

static void test_model_batch_check_says_what_is_wrong(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  static models_batch good;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  models_random_batch(&good, model, 10, 19, 10);
  good.task[3] = 1, good.label[3] = 2;
  good.task[4] = 2;
  good.task[5] = 4, good.label[5] = 1;
  models_connect(&good, &c, 10);
  CHECK(moe_batch_check(model, &good.b, 1, &env) == MOE_OK, "%s", said);
#define BAD(change, word, labels)                                                                  \
  do {                                                                                             \
    model_batch = good;                                                                            \
    models_connect(&model_batch, &c, 10);                                                          \
    change;                                                                                        \
    said[0] = 0;                                                                                   \
    CHECK(moe_batch_check(model, &model_batch.b, 1, &env) == MOE_E_ARGUMENT, "accepted: %s",       \
          #change);                                                                                \
    CHECK(strstr(said, word), "'%s' does not say '%s'", said, word);                               \
    CHECK((moe_batch_check(model, &model_batch.b, 0, &env) == MOE_OK) == labels,                   \
          "without labels: %s", #change);                                                          \
    memset(model_scores[0], 0x11, sizeof model_scores[0]);                                         \
    CHECK(labels || (model_forward(model, &model_batch.b, model_scores[0], NULL, &env) &&          \
                     model_scores[0][0] < 1e-20f),                                                 \
          "forward: %s", #change);                                                                 \
  } while (0)
  BAD(model_batch.b.S = -1, "-1", 0);
  BAD(model_batch.b.seq_start = NULL, "seq_start", 0);
  BAD(model_batch.b.task = NULL, "task", 0);
  BAD(model_batch.b.ids = NULL, "ids", 0);
  BAD(model_batch.b.features = model_batch.features, "feature", 0);
  BAD(model_batch.b.label = NULL, "label", 1);
  BAD(model_batch.b.span = NULL, "span", 0);
  BAD(model_batch.start[0] = 1, "seq_start[0] is 1", 0);
  BAD(model_batch.start[3] = model_batch.start[2], "sequence 2", 0);
  BAD(model_batch.start[3] = model_batch.start[2] - 1, "sequence 2", 0);
  BAD(model_batch.start[3] = model_batch.start[2] + 20, "20 tokens", 0);
  BAD(model_batch.start[10] = INT32_MIN, "sequence 9", 0);
  BAD(model_batch.task[3] = -1, "task -1", 0);
  BAD(model_batch.task[3] = MODELS_TASKS, "task 5", 0);
  BAD(model_batch.ids[model_batch.start[3]] = -1, "token 0 of sequence 3", 0);
  BAD(model_batch.ids[model_batch.start[3]] = 50, "50 words", 0);
  BAD(model_batch.segments[model_batch.start[3]] = 2, "segment 2", 0);
  BAD(model_batch.label[3] = 3, "a class from 0 to 2", 1);
  BAD(model_batch.label[3] = -1, "a class from 0 to 2", 1);
  BAD(model_batch.label[3] = 0.5f, "a class from 0 to 2", 1);
  BAD(model_batch.label[3] = NAN, "finite", 1);
  BAD(model_batch.label[4] = INFINITY, "finite", 1);
  BAD(model_batch.label[4] = 5.5f, "sequence 4 is 5.5, task 'real' expects 0 to 5", 1);
  BAD(model_batch.label[4] = -0.25f, "expects 0 to 5", 1);
  BAD(model_batch.span[20] = -1, "span 1 of sequence 5", 0);
  BAD(model_batch.span[21] = model_batch.span[20], "span 1", 0);
  BAD(model_batch.span[23] = 20, "span 2", 0);
#undef BAD
  moe_model_free(model);
}

static void test_model_batch_check_looks_at_weights(void) {
  static const float wrong[] = {-1, -1e-30f, NAN, INFINITY};
  float weight[4] = {1, 0, 2, 1e30f};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 2, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  int i;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  CHECK(model, "%s", said);
  models_random_batch(&model_batch, model, 4, 5, 6);
  model_batch.b.weight = weight;
  CHECK(!moe_batch_check(model, &model_batch.b, 1, &env), "%s", said);
  for (i = 0; i < 4; ++i) {
    weight[3] = wrong[i];
    CHECK(moe_batch_check(model, &model_batch.b, 1, &env) == MOE_E_ARGUMENT &&
              strstr(said, "sequence 3"),
          "weight %g: %s", (double)wrong[i], said);
  }
  moe_model_free(model);
}

static void test_model_batch_check_looks_at_features(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  c.vocab = 0;
  c.feature_dim = 3;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  models_random_batch(&model_batch, model, 4, 19, 11);
  CHECK(moe_batch_check(model, &model_batch.b, 1, &env) == MOE_OK, "%s", said);
  model_batch.features[3 * model_batch.start[1] + 2] = NAN;
  CHECK(moe_batch_check(model, &model_batch.b, 1, &env) == MOE_E_ARGUMENT &&
            strstr(said, "feature 2 of token 0 of sequence 1"),
        "%s", said);
  model_batch.b.ids = model_batch.ids;
  CHECK(moe_batch_check(model, &model_batch.b, 1, &env) == MOE_E_ARGUMENT, "ids and features");
  moe_model_free(model);
}

/* A batch with a few numbers overwritten is either refused with a sentence, or computed without
   harm (run it with sanitizers). */
static void test_model_survives_damaged_batches(void) {
  static models_batch good;
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_task tasks[MODELS_TASKS];
  moe_limits limits = {200, 20, 0, 0};
  moe_context *context = NULL;
  moe_model *model;
  uint64_t state = 15;
  int round, refused = 0, computed = 0;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  CHECK(moe_context_create(&context, model, &limits, &env) == MOE_OK, "%s", said);
  models_random_batch(&good, model, 20, 10, 15);
  for (round = 0; round < 3000; ++round) {
    int damage = 1 + models_draw(&state, 3);
    model_batch = good;
    models_connect(&model_batch, &c, 20);
    while (damage-- > 0) {
      int32_t value = (int32_t)((uint32_t)models_draw(&state, 1 << 16) << models_draw(&state, 17)) -
                      models_draw(&state, 3);
      int32_t s = models_draw(&state, 20), t = models_draw(&state, good.start[20]);
      if (models_draw(&state, 2)) value = models_draw(&state, 60) - 2;
      switch (models_draw(&state, 6)) {
        case 0: model_batch.start[s + 1] = value; break;
        case 1: model_batch.ids[t] = value; break;
        case 2: model_batch.segments[t] = (uint8_t)value; break;
        case 3: model_batch.task[s] = value; break;
        case 4: model_batch.span[4 * s + models_draw(&state, 4)] = value; break;
        default: model_batch.b.S = value < 20 ? value : 20; break;
      }
    }
    said[0] = 0;
    if (moe_forward(context, model_scores[0], &model_batch.b, &env)) {
      CHECK(said[0], "round %d: no sentence", round);
      ++refused;
    } else
      ++computed;
  }
  CHECK(refused > 500 && computed > 100, "%d refused, %d computed", refused, computed);
  moe_context_free(context);
  moe_model_free(model);
}

static void test_model_context_refuses_what_does_not_fit(void) {
  moe_env env = models_env(MOE_ISA_AUTO), more;
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_limits limits = {30, 3, 0, 0};
  moe_context *context = NULL;
  moe_model *model;
  moe_routes routes;
  size_t bytes;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  CHECK(moe_context_create(&context, model, &limits, &env) == MOE_OK, "%s", said);
  models_random_batch(&model_batch, model, 4, 3, 12);
  CHECK(moe_forward(context, model_scores[0], &model_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "made for at most 3"),
        "%s", said);
  models_random_batch(&model_batch, model, 3, 1, 12);
  CHECK(moe_forward(context, model_scores[0], &model_batch.b, &env) == MOE_OK, "%s", said);
  model_batch.start[1] = 11;
  model_batch.start[2] = 22;
  model_batch.start[3] = 31;
  model_batch.b.span = NULL;
  model_batch.task[0] = model_batch.task[1] = model_batch.task[2] = 0;
  CHECK(moe_forward(context, model_scores[0], &model_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "made for at most 30"),
        "%s", said);
  model_batch.start[3] = 30;
  CHECK(moe_forward(context, model_scores[0], &model_batch.b, &env) == MOE_OK, "%s", said);
  more = env;
  more.threads = 8;
  CHECK(moe_forward(context, model_scores[0], &model_batch.b, &more) == MOE_E_ARGUMENT &&
            strstr(said, "threads"),
        "%s", said);
  CHECK(moe_context_routes(context, 2, &routes) == MOE_E_ARGUMENT &&
            moe_context_routes(context, -1, &routes) == MOE_E_ARGUMENT,
        "layer");
  limits.tokens = (INT32_MAX - MOE__EXPERTS_TILE) / 4 +
                  1; /* the end of the last tile of 4 experts a token would be above INT32_MAX */
  moe_model_free(model);
  c.experts = c.top_k = 4;
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  CHECK(moe_context_size(model, &limits, &bytes, &env) == MOE_E_ARGUMENT && strstr(said, "tokens"),
        "%s", said);
  moe_context_free(context);
  moe_context_free(NULL);
  moe_model_free(model);
}

static void test_model_routes_can_be_read_and_forced(void) {
  static int32_t forced[2 * MODELS_M * 2];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_task tasks[MODELS_TASKS];
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context = NULL;
  moe_model *model;
  moe_routes r;
  int32_t M, l, i;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  CHECK(moe_context_create(&context, model, &limits, &env) == MOE_OK, "%s", said);
  models_random_batch(&model_batch, model, 20, 19, 13);
  M = model_batch.start[20];
  CHECK(moe_forward(context, model_scores[0], &model_batch.b, &env) == MOE_OK, "%s", said);
  for (l = 0; l < 2; ++l) {
    CHECK(moe_context_routes(context, l, &r) == MOE_OK && r.M == M && r.N == 3 && r.k == 2 &&
              r.start[3] == 2 * M,
          "layer %d", l);
    memcpy(forced + l * M * 2, r.expert, (size_t)(2 * M) * sizeof *forced);
    for (i = 0; i < M; ++i)
      CHECK(r.expert[2 * i] != r.expert[2 * i + 1] && r.weight[2 * i] >= r.weight[2 * i + 1],
            "token %d", i);
  }
  moe_context_force(context, forced);
  CHECK(moe_forward(context, model_scores[1], &model_batch.b, &env) == MOE_OK, "%s", said);
  CHECK(!memcmp(model_scores[0], model_scores[1], 20 * 3 * sizeof(float)),
        "its own routes forced change nothing");
  for (i = 0; i < 2 * M; ++i) forced[2 * i] = 1, forced[2 * i + 1] = 2; /* expert 0 stays empty */
  CHECK(moe_forward(context, model_scores[1], &model_batch.b, &env) == MOE_OK, "%s", said);
  CHECK(memcmp(model_scores[0], model_scores[1], 20 * 3 * sizeof(float)), "other routes matter");
  moe_context_routes(context, 1, &r);
  CHECK(r.start[1] == 0 && r.start[2] == M, "expert 0 is empty");
  forced[2 * M + 6] = 3;
  CHECK(moe_forward(context, model_scores[1], &model_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "token 3 of layer 1"),
        "%s", said);
  forced[2 * M + 6] = 2;
  CHECK(moe_forward(context, model_scores[1], &model_batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "twice"),
        "%s", said);
  moe_context_force(context, NULL);
  CHECK(moe_forward(context, model_scores[1], &model_batch.b, &env) == MOE_OK, "%s", said);
  CHECK(!memcmp(model_scores[0], model_scores[1], 20 * 3 * sizeof(float)),
        "the gates decide again");
  moe_context_free(context);
  moe_model_free(model);
}

typedef struct sharer {
  moe_context *context[4];
  float scores[4][MODELS_S * 3];
  moe_env env;
  moe_status status[4];
} sharer;

static void sharer_body(void *arg, int32_t i) {
  sharer *all = (sharer *)arg;
  int pass;
  for (pass = 0; pass < 5 && !all->status[i]; ++pass)
    all->status[i] = moe_forward(all->context[i], all->scores[i], &model_batch.b, &all->env);
}

/* Contexts whose limits are the batch's own numbers, round ones too: arrays that touch each other
   must not overlap. */
static void contexts_compare(const moe_model *model, int32_t S, const moe_env *env) {
  moe_limits limits = {0, S, 0, 0}, most = {MODELS_M, MODELS_S, 0, 0};
  int32_t stride = moe_model_max_classes(model), l;
  moe_context *exact = NULL, *wide = NULL;
  size_t bytes, k;
  void *raw, *block;
  limits.tokens = model_batch.start[S];
  CHECK(!moe_context_size(model, &limits, &bytes, env), "%s", said);
  block = models_block(&raw, bytes + 64);
  memset(block, 0x5a, bytes + 64);
  CHECK(!moe_context_init(&exact, block, bytes, model, &limits, env) &&
            !moe_context_create(&wide, model, &most, env),
        "%s", said);
  CHECK(!moe_forward(exact, model_scores[0], &model_batch.b, env) &&
            !moe_forward(wide, model_scores[1], &model_batch.b, env),
        "%s", said);
  CHECK(!memcmp(model_scores[0], model_scores[1], (size_t)(S * stride) * sizeof(float)), "S %d",
        (int)S);
  for (l = 0; l < moe_model_config(model)->layers; ++l) {
    moe_routes a, b;
    CHECK(!moe_context_routes(exact, l, &a) && !moe_context_routes(wide, l, &b), "routes");
    CHECK(!memcmp(a.start, b.start, (size_t)(a.N + 1) * sizeof *a.start) &&
              !memcmp(a.order, b.order, (size_t)(a.M * a.k) * sizeof *a.order) &&
              !memcmp(a.expert, b.expert, (size_t)(a.M * a.k) * sizeof *a.expert) &&
              !memcmp(a.weight, b.weight, (size_t)(a.M * a.k) * sizeof *a.weight),
          "routes of layer %d, S %d", (int)l, (int)S);
  }
  for (k = bytes; k < bytes + 64; ++k)
    CHECK(((unsigned char *)block)[k] == 0x5a, "byte %zu after the block", k - bytes);
  moe_context_free(exact);
  moe_context_free(wide);
  free(raw);
}

static void test_model_contexts_of_the_exact_size(void) {
  static const int32_t S[] = {1, 2, 15, 16, 17, 32};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  int k, i;
  models_tasks(tasks);
  for (k = 0; k < STARTS; ++k) {
    moe_config c = start_config(k);
    moe_model *model = models_create(&c, tasks, MODELS_TASKS, &env);
    for (i = 0; i < 6; ++i) {
      models_random_batch(&model_batch, model, S[i], 8, 70 + (uint64_t)i);
      contexts_compare(model, S[i], &env);
      if (test_state) printf("        model %d\n", k);
      CHECK_STATE();
    }
    moe_model_free(model);
  }
}

/* Threads with a context each share one model. */
static void test_model_is_shared_by_threads(void) {
  static const moe_router router[] = {MOE_ROUTER_TASK, MOE_ROUTER_EMBEDDING, MOE_ROUTER_TASK_LEVEL};
  static sharer all;
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_task tasks[MODELS_TASKS];
  moe_pool *pool = NULL;
  int i, r;
  models_tasks(tasks);
  CHECK(!moe_pool_create_exact(&pool, 4, &env), "%s", said);
  for (r = 0; r < 3; ++r) {
    moe_config c = models_config(router[r], 3, 1);
    moe_model *model;
    if (r == 2) c.unit = MOE_UNIT_BLOCK;
    all.env = models_env(MOE_ISA_AUTO);
    model = models_create(&c, tasks, MODELS_TASKS, &all.env);
    CHECK(model, "%s", said);
    models_random_batch(&model_batch, model, 20, 9, 91);
    CHECK(!model_forward(model, &model_batch.b, model_scores[0], NULL, &all.env), "%s", said);
    for (i = 0; i < 4; ++i)
      CHECK(!moe_context_create(&all.context[i], model, &limits, &all.env), "%s", said);
    env.parallel_for(env.parallel_user, 4, sharer_body, &all);
    for (i = 0; i < 4; ++i) {
      CHECK(!all.status[i] && !memcmp(all.scores[i], model_scores[0], 20 * 3 * sizeof(float)),
            "router %d, thread %d", r, i);
      moe_context_free(all.context[i]);
    }
    moe_model_free(model);
  }
  moe_pool_free(pool);
}

/* Before the first pass, and after one of no sequences, the routes are those of no token. */
static void test_model_routes_of_no_token_are_empty(void) {
  static const moe_router router[] = {MOE_ROUTER_DENSE, MOE_ROUTER_TASK, MOE_ROUTER_TASK_LEVEL};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_task tasks[MODELS_TASKS];
  moe_batch none;
  int i, pass;
  int32_t l, n;
  memset(&none, 0, sizeof none);
  models_tasks(tasks);
  for (i = 0; i < 3; ++i) {
    moe_config c = models_config(router[i], i ? 3 : 1, 1);
    moe_model *model;
    moe_context *context;
    void *raw, *block;
    size_t bytes;
    if (i == 2) c.unit = MOE_UNIT_BLOCK;
    model = models_create(&c, tasks, MODELS_TASKS, &env);
    CHECK(model && !moe_context_size(model, &limits, &bytes, &env), "%s", said);
    block = models_block(&raw, bytes);
    memset(block, 0x5a, bytes);
    CHECK(!moe_context_init(&context, block, bytes, model, &limits, &env), "%s", said);
    for (pass = 0; pass < 2; ++pass) {
      for (l = 0; l < c.layers; ++l) {
        moe_routes r;
        CHECK(!moe_context_routes(context, l, &r) && r.M == 0, "router %d, pass %d: %d tokens", i,
              pass, (int)r.M);
        for (n = 0; n <= r.N; ++n)
          CHECK(r.start[n] == 0, "router %d, pass %d: expert %d starts at %d", i, pass, (int)n,
                (int)r.start[n]);
      }
      models_random_batch(&model_batch, model, 9, 9, 21);
      CHECK(!moe_forward(context, model_scores[0], &model_batch.b, &env) &&
                !moe_forward(context, model_scores[0], &none, &env),
            "%s", said);
    }
    moe_model_free(model);
    free(raw);
  }
}

/* What two passes of model_batch give, where the context shows the last one. */
typedef struct counts {
  int64_t tokens[MODELS_TASKS], chosen[MODELS_TASKS][2][3];
  double gate[MODELS_TASKS][2][3], prob[MODELS_TASKS][2][3];
} counts;

static void check_counts(const counts *got, const moe_routes *r, int32_t l, int32_t t, int32_t i) {
  int32_t s, token, n = 0;
  double g = 0, p = 0;
  for (s = 0; s < model_batch.b.S; ++s)
    for (token = model_batch.b.seq_start[s];
         model_batch.b.task[s] == t && token < model_batch.b.seq_start[s + 1]; ++token) {
      int chose = r->expert[2 * token] == i || r->expert[2 * token + 1] == i;
      n += chose;
      g += chose ? (double)r->prob[3 * token + i] : 0;
      p += (double)r->prob[3 * token + i];
    }
  CHECK(got->chosen[t][l][i] == 2 * n, "task %d layer %d expert %d: %d, not %d", (int)t, (int)l,
        (int)i, (int)got->chosen[t][l][i], 2 * (int)n);
  CHECK_NEAR(got->gate[t][l][i], 2 * g, 1e-9);
  CHECK_NEAR(got->prob[t][l][i], 2 * p, 1e-9);
}

static void test_model_routes_are_counted(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  moe_context *context;
  moe_route_sums sums;
  static counts got;
  double sum;
  int32_t l, i, t, pass, seen;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  CHECK(model && !moe_context_create(&context, model, &limits, &env), "%s", said);
  models_random_batch(&model_batch, model, 20, 19, 6);
  memset(&sums, 0, sizeof sums);
  memset(&got, 0, sizeof got);
  sums.tokens = got.tokens, sums.chosen = &got.chosen[0][0][0];
  sums.gate = &got.gate[0][0][0], sums.prob = &got.prob[0][0][0];
  for (pass = 0; pass < 2; ++pass) {
    CHECK(!moe_forward(context, model_scores[0], &model_batch.b, &env), "%s", said);
    CHECK(!moe_route_count(&sums, context, &model_batch.b, &env), "%s", said);
  }
  for (l = 0; l < 2; ++l) { /* by hand, from what the context shows of its last pass */
    moe_routes r;
    moe_context_routes(context, l, &r);
    for (t = 0; t < MODELS_TASKS; ++t)
      for (i = 0; i < 3; ++i) {
        check_counts(&got, &r, l, t, i);
        CHECK_STATE();
      }
  }
  for (seen = 0, t = 0; t < MODELS_TASKS; ++t)
    for (seen += (int32_t)got.tokens[t], l = 0; l < 2; ++l) {
      int64_t(*chosen)[3] = got.chosen[t];
      CHECK(chosen[l][0] + chosen[l][1] + chosen[l][2] == 2 * got.tokens[t], "k choices a token");
      sum = got.prob[t][l][0] + got.prob[t][l][1] + got.prob[t][l][2];
      CHECK(fabs(sum - (double)got.tokens[t]) < 1e-3, "probabilities sum to the tokens: %g, %d",
            sum, (int)got.tokens[t]);
    }
  CHECK(seen == 2 * model_batch.b.seq_start[model_batch.b.S], "every token is counted");
  sums.gate = sums.prob = NULL;
  CHECK(!moe_route_count(&sums, context, &model_batch.b, &env),
        "without the sums of probabilities");
  --model_batch.b.S;
  CHECK(moe_route_count(&sums, context, &model_batch.b, &env) == MOE_E_ARGUMENT, "another batch");
  CHECK(strstr(said, "the last pass had"), "%s", said);
  ++model_batch.b.S;
  for (t = 0; t < 2; ++t) { /* no tokens; as many in all, but not as they can have been passed */
    model_batch.start[3] = t ? 1 << 30 : model_batch.start[2];
    CHECK(moe_route_count(&sums, context, &model_batch.b, &env) == MOE_E_ARGUMENT &&
              strstr(said, "sequence 2 "),
          "%s", said);
  }
  for (seen = 0, t = 0; t < MODELS_TASKS; ++t) seen += (int32_t)got.tokens[t];
  CHECK(seen == 3 * model_batch.start[20], "nothing was counted");
  moe_context_free(context);
  moe_model_free(model);
}

static void test_model_does_without_disabled_experts(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 2), two = models_config(MOE_ROUTER_TASK, 2, 2);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_task tasks[MODELS_TASKS];
  moe_model *model, *small;
  moe_context *context, *other_context;
  moe_tensor to, from;
  uint8_t off[2][3] = {{0, 0, 1}, {0, 0, 1}};
  int32_t l, i;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  small = models_create(&two, tasks, MODELS_TASKS,
                        &env); /* the same model, made without the last expert */
  CHECK(model && small, "%s", said);
  CHECK(!moe_context_create(&context, model, &limits, &env) &&
            !moe_context_create(&other_context, small, &limits, &env),
        "%s", said);
  for (i = 0; i < moe_model_tensors(small); ++i) { /* gates (N, H): their first two rows */
    moe_model_tensor(small, i, &to);
    from = models_tensor(model, to.name);
    memcpy(moe_model_weights(small) + to.offset, moe_model_weights(model) + from.offset,
           to.count * sizeof(float));
  }
  models_random_batch(&model_batch, model, 20, 19, 6);
  CHECK(!moe_forward(other_context, model_scores[0], &model_batch.b, &env), "%s", said);
  moe_context_mask(context, off[0]);
  CHECK(!moe_forward(context, model_scores[1], &model_batch.b, &env), "%s", said);
  for (l = 0; l < 2; ++l) {
    moe_routes r;
    moe_context_routes(context, l, &r);
    CHECK(r.start[2] == r.start[3], "no token reaches a disabled expert");
  }
  CHECK(!memcmp(model_scores[0], model_scores[1], 20 * 3 * sizeof(float)),
        "the same bits as the model that never had it");
  off[1][0] = 1;
  CHECK(moe_forward(context, model_scores[1], &model_batch.b, &env) == MOE_E_ARGUMENT,
        "one expert left, two needed");
  CHECK(!strcmp(said, "masked experts: layer 1 keeps 1 of 3 experts, expected at least top_k (2)"),
        "%s", said);
  moe_context_mask(context, NULL);
  CHECK(!moe_forward(context, model_scores[1], &model_batch.b, &env), "%s", said);
  CHECK(memcmp(model_scores[0], model_scores[1], 20 * 3 * sizeof(float)),
        "and all take part again");
  moe_context_free(context);
  moe_context_free(other_context);
  moe_model_free(model);
  moe_model_free(small);
}

/* moe_forward does not look at weights: NaN goes to the scores, and nowhere else. */
static void test_model_with_nan_weights_gives_nan_scores(void) {
  static const moe_router router[] = {MOE_ROUTER_DENSE, MOE_ROUTER_SHARED, MOE_ROUTER_TASK,
                                      MOE_ROUTER_EMBEDDING, MOE_ROUTER_TASK_LEVEL};
  static const float bad[] = {NAN, INFINITY, -INFINITY};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  size_t i, k, n;
  int32_t l, s, j, top;
  models_tasks(tasks);
  for (i = 0; i < 5; ++i)
    for (k = 0; k < 6; ++k) {
      int block = router[i] == MOE_ROUTER_TASK_LEVEL;
      moe_config c = models_config(router[i], i ? 4 : 1, i && !block && k > 2 ? 4 : 1);
      moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
      moe_model *model;
      moe_context *context = NULL;
      float *out = model_scores[0], *w;
      moe_routes routes;
      c.unit = block ? MOE_UNIT_BLOCK : MOE_UNIT_FFN;
      c.selection = block && k > 2 ? MOE_SELECT_GUMBEL : MOE_SELECT_SOFTMAX;
      model = models_create(&c, tasks, MODELS_TASKS, &env);
      CHECK(model, "%s", said);
      if (!model) continue;
      w = moe_model_weights(model);
      for (n = 0; n < moe_model_parameters(model); ++n) w[n] = bad[k % 3];
      CHECK(!moe_model_pack(model, NULL, &env) &&
                !moe_context_create(&context, model, &limits, &env),
            "%s", said);
      models_random_batch(&model_batch, model, 12, 9, k);
      out[12 * 3] = 7;
      CHECK(moe_forward(context, out, &model_batch.b, &env) == MOE_OK, "%s", said);
      for (s = 0; s < 12; ++s)
        for (j = 0; j < moe_model_task(model, model_batch.task[s])->classes; ++j)
          CHECK(!isfinite(out[3 * s + j]), "router %zu, sequence %d", i, (int)s);
      CHECK(out[12 * 3] == 7, "a score behind the last");
      for (l = 0; l < c.layers; ++l) {
        CHECK(!moe_context_routes(context, l, &routes), "%d", (int)l);
        for (top = 0; top < routes.M * routes.k; ++top)
          CHECK(routes.expert[top] >= 0 && routes.expert[top] < routes.N, "expert %d",
                (int)routes.expert[top]);
        if (!block)
          CHECK(routes.start[0] == 0 && routes.start[routes.N] == routes.M * routes.k,
                "every token has its experts");
      }
      moe_context_free(context);
      moe_model_free(model);
    }
}

enum { LAYERS_KEPT = 3 };

/* Hidden states and gate logits of every layer: the last states are those of moe_context_hidden, no
   score changes by keeping them, and the softmax of the logits is what the gate went by. */
/* The gates' logits of every layer, kept in context 1 alone, make the probabilities. */
static void check_logits(moe_context *const context[2], int32_t layers, int has_gates) {
  int32_t l, i, t;
  for (l = 0; l < layers; ++l) {
    const float *z = moe_context_gate_logits(context[1], l);
    moe_routes r;
    CHECK(!z == !has_gates && !moe_context_gate_logits(context[0], l), "layer %d: logits", l);
    CHECK(!moe_context_routes(context[1], l, &r), "layer %d", l);
    for (t = 0; z && t < r.M; ++t) {
      double sum = 0, most = (double)z[t * 3 + r.expert[t]];
      for (i = 0; i < 3; ++i) sum += exp((double)z[t * 3 + i] - most);
      CHECK_NEAR(r.prob[t * 3 + r.expert[t]], 1 / sum, 1e-6);
    }
  }
  CHECK(!moe_context_gate_logits(context[1], -1) && !moe_context_gate_logits(context[1], layers),
        "there are no such layers");
}

/* A gate has no logits for one expert, and has them from two on. */
static void test_model_gives_logits_from_two_experts_on(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_limits limits = {MODELS_M, MODELS_S, 0, 1};
  float out[MODELS_S * 8];
  int32_t experts;
  models_tasks(tasks);
  for (experts = 1; experts < 3; ++experts) {
    moe_config c = models_config(MOE_ROUTER_TASK, experts, 1);
    moe_model *model = models_create(&c, tasks, MODELS_TASKS, &env);
    moe_context *context = NULL;
    const float *z;
    moe_routes r;
    int32_t t;
    CHECK(model && !moe_context_create(&context, model, &limits, &env), "%s", said);
    models_random_batch(&model_batch, model, 12, 9, 3);
    CHECK(!moe_forward(context, out, &model_batch.b, &env), "%s", said);
    z = moe_context_gate_logits(context, 1);
    CHECK(!z == (experts == 1) && !moe_context_routes(context, 1, &r), "%d experts", (int)experts);
    for (t = 0; z && t < r.M; ++t)
      CHECK_NEAR(r.prob[2 * t], 1 / (1 + exp((double)z[2 * t + 1] - (double)z[2 * t])), 1e-6);
    moe_context_free(context);
    moe_model_free(model);
  }
}

static void test_model_keeps_the_states_of_every_layer(void) {
  static float kept[2][(LAYERS_KEPT + 1) * MODELS_M * 20], out[2][MODELS_S * 8];
  static const moe_router routers[] = {MOE_ROUTER_DENSE, MOE_ROUTER_TASK, MOE_ROUTER_TASK_LEVEL};
  int32_t v, l, threads, i;
  for (v = 0; v < 3; ++v)
    for (threads = 1; threads <= 3; threads += 2) {
      moe_env env = models_env(MOE_ISA_AUTO);
      moe_config c = models_config(routers[v], v ? 3 : 1, 1);
      moe_task tasks[MODELS_TASKS];
      moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
      moe_context *context[2] = {NULL, NULL};
      moe_pool *pool = NULL;
      moe_model *model;
      size_t row, states;
      c.unit = v == 2 ? MOE_UNIT_BLOCK : MOE_UNIT_FFN;
      c.layers = LAYERS_KEPT;
      models_tasks(tasks);
      model = models_create(&c, tasks, MODELS_TASKS, &env);
      CHECK(model && !moe_pool_create_exact(&pool, threads, &env), "%s", said);
      models_random_batch(&model_batch, model, 30, 19, 1);
      row = (size_t)model_batch.start[30] * (size_t)c.hidden;
      for (i = 0; i < 2; ++i) {
        limits.keep_layers = i;
        CHECK(!moe_context_create(&context[i], model, &limits, &env), "%s", said);
        CHECK(!moe_forward(context[i], out[i], &model_batch.b, &env), "%s", said);
      }
      states = 30 * (size_t)moe_model_max_classes(model);
      CHECK(!memcmp(out[0], out[1], states * sizeof(float)), "router %d: scores", v);
      for (l = -1; l < c.layers; ++l) {
        const float *x = moe_context_layer(context[1], l);
        CHECK(x, "router %d: layer %d is not there", v, l);
        memcpy(kept[threads / 2] + (size_t)(l + 1) * row, x, row * sizeof(float));
        CHECK(l == c.layers - 1 || !moe_context_layer(context[0], l), "layer %d was not asked for",
              l);
      }
      CHECK(!memcmp(kept[threads / 2] + (size_t)c.layers * row, moe_context_hidden(context[0]),
                    row * sizeof(float)) &&
                moe_context_layer(context[0], c.layers - 1) == moe_context_hidden(context[0]),
            "router %d: the last layer's are the final states", v);
      CHECK(!moe_context_layer(context[1], -2) && !moe_context_layer(context[1], c.layers),
            "there are no such layers");
      check_logits(context, c.layers, v == 1);
      CHECK_STATE();
      moe_context_free(context[0]), moe_context_free(context[1]);
      moe_pool_free(pool);
      moe_model_free(model);
      if (threads == 3)
        CHECK(!memcmp(kept[0], kept[1], (size_t)(LAYERS_KEPT + 1) * row * sizeof(float)),
              "router %d: states with 3 threads", v);
    }
}

static void test_model_dense_routes_lead_to_expert_0(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_DENSE, 1, 1);
  moe_task tasks[MODELS_TASKS];
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context = NULL;
  moe_model *model;
  moe_routes r;
  int32_t i;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  CHECK(moe_context_create(&context, model, &limits, &env) == MOE_OK, "%s", said);
  models_random_batch(&model_batch, model, 20, 19, 14);
  CHECK(moe_forward(context, model_scores[0], &model_batch.b, &env) == MOE_OK, "%s", said);
  for (i = 0; i < 2; ++i)
    CHECK(moe_context_routes(context, i, &r) == MOE_OK && r.M == model_batch.start[20] &&
              r.k == 1 && r.N == 1 && r.start[0] == 0 && r.start[1] == r.M,
          "shape of layer %d", (int)i);
  for (i = 0; i < r.M; ++i)
    CHECK(r.expert[i] == 0 && r.order[i] == i && r.weight[i] >= 1 && r.prob[i] <= 1, "token %d", i);
  moe_context_free(context);
  moe_model_free(model);
}

/* The model of golden/tiny.h. */
static moe_model *tiny_model(moe_router router, const moe_env *env) {
  static const char *const name[] = {"two", "three", "real"};
  moe_config c = models_config(router, router == MOE_ROUTER_DENSE ? 1 : 3, 1);
  moe_task tasks[3];
  moe_model *model = NULL;
  int i;
  c.hidden = 16;
  c.heads = 2;
  c.ffn = 32;
  c.positions = c.max_len = 12;
  memset(tasks, 0, sizeof tasks);
  for (i = 0; i < 3; ++i) {
    snprintf(tasks[i].name, sizeof tasks[i].name, "%s", name[i]);
    tasks[i].kind = i == 2 ? MOE_KIND_REGRESSION : MOE_KIND_CLASSIFICATION;
    tasks[i].classes = i == 2 ? 1 : 2 + i;
    tasks[i].high = 5;
  }
  if (moe_model_create(&model, &c, tasks, 3, 1, env)) return NULL;
  models_fill(model, 0);
  return model;
}

static void test_model_matches_pytorch(void) {
  static const struct {
    const double *scores, *hidden;
    const int *experts;
  } want[] = {{tiny_dense_scores, NULL, NULL},
              {tiny_switch_scores, NULL, tiny_switch_experts},
              {tiny_tag_scores, tiny_tag_hidden, tiny_tag_experts}};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_limits limits = {36, 6, 0, 0};
  int router;
  for (router = 0; router < 3; ++router) {
    moe_model *model = tiny_model((moe_router)router, &env);
    moe_context *context = NULL;
    int32_t i, j, at = 0, l;
    double error = 0, norm = 0;
    CHECK(model && moe_context_create(&context, model, &limits, &env) == MOE_OK, "%s", said);
    memset(&model_batch, 0, sizeof model_batch);
    for (i = 0; i < 36; ++i)
      model_batch.ids[i] = tiny_batch_ids[i],
      model_batch.segments[i] = (uint8_t)tiny_batch_segments[i];
    for (i = 0; i < 6; ++i) {
      model_batch.start[i + 1] = tiny_batch_starts[i + 1];
      model_batch.task[i] = tiny_batch_task[i];
      model_batch.index[i] = i;
    }
    models_connect(&model_batch, moe_model_config(model), 6);
    CHECK(moe_forward(context, model_scores[0], &model_batch.b, &env) == MOE_OK, "%s", said);
    for (i = 0; i < 6; ++i)
      for (j = 0; j < moe_model_task(model, model_batch.task[i])->classes; ++j)
        CHECK_NEAR(model_scores[0][3 * i + j], want[router].scores[at++], 1e-5);
    for (l = 0; l < 2 && want[router].experts; ++l) {
      moe_routes r;
      moe_context_routes(context, l, &r);
      for (i = 0; i < 36; ++i)
        CHECK(r.expert[i] == want[router].experts[l * 36 + i], "layer %d token %d", l, i);
    }
    for (i = 0; i < 36 * 16 && want[router].hidden; ++i) {
      double d = (double)moe_context_hidden(context)[i] - want[router].hidden[i];
      error += d * d;
      norm += want[router].hidden[i] * want[router].hidden[i];
    }
    CHECK(error <= 1e-12 * norm, "hidden states: relative error %g", sqrt(error / norm));
    moe_context_free(context);
    moe_model_free(model);
  }
}

/* Lengths that go up and down: nothing is read behind the end of what the last one promises. Under
   AddressSanitizer the arrays of the heap say so. */
static void test_model_reads_no_token_before_all_lengths_are_right(void) {
  static const int32_t start[] = {0, 9, 3}, task[2] = {0, 0};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 2, 1);
  moe_task tasks[MODELS_TASKS];
  moe_batch batch;
  moe_model *model;
  int32_t *ids = (int32_t *)calloc(3, sizeof *ids);
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  memset(&batch, 0, sizeof batch);
  batch.S = 2, batch.seq_start = start, batch.task = task, batch.ids = ids;
  CHECK(model && ids && moe_batch_check(model, &batch, 0, &env) == MOE_E_ARGUMENT &&
            strstr(said, "sequence 1 has -6 tokens"),
        "%s", said);
  free(ids);
  moe_model_free(model);
}

static void run_model(void) {
  RUN(test_model_reads_no_token_before_all_lengths_are_right);
  RUN(test_model_counts_the_papers_parameters);
  RUN(test_model_table_of_tensors_has_no_gap);
  RUN(test_model_names_of_two_models_in_turn);
  RUN(test_model_tensors_bear_the_names_of_the_hub);
  RUN(test_model_config_names_the_field_that_is_wrong);
  RUN(test_model_config_refuses_odd_eps_and_two_scales);
  RUN(test_model_tasks_are_checked_one_by_one);
  RUN(test_model_task_names_have_all_letters_and_digits);
  RUN(test_model_tensors_end_with_the_last);
  RUN(test_model_copies_tasks_and_labels);
  RUN(test_model_keeps_a_copy_of_the_vocabulary);
  RUN(test_model_starts_with_the_papers_values);
  RUN(test_model_starts_with_the_weights_of_v01);
  RUN(test_model_spreads_of_every_router);
  RUN(test_model_head_of_a_task_called_gate_is_a_head);
  RUN(test_model_sizes_are_exact);
  RUN(test_model_packs_into_a_block_or_the_heap);
  RUN(test_model_batch_check_says_what_is_wrong);
  RUN(test_model_batch_check_looks_at_weights);
  RUN(test_model_batch_check_looks_at_features);
  RUN(test_model_matches_pytorch);
  RUN(test_model_scores_do_not_depend_on_company_or_order);
  RUN(test_model_bits_do_not_depend_on_threads_isa_or_packing);
  RUN(test_model_bits_of_long_sequences_do_not_depend_on_threads);
  RUN(test_model_ignores_dirty_memory);
  RUN(test_model_runs_at_size_1_and_at_odd_sizes);
  RUN(test_model_takes_a_hundred_tasks);
  RUN(test_model_takes_an_empty_batch);
  RUN(test_model_reads_features);
  RUN(test_model_with_one_expert_equals_the_dense_one);
  RUN(test_model_with_equal_experts_equals_the_dense_one);
  RUN(test_model_survives_damaged_batches);
  RUN(test_model_context_refuses_what_does_not_fit);
  RUN(test_model_routes_can_be_read_and_forced);
  RUN(test_model_contexts_of_the_exact_size);
  RUN(test_model_is_shared_by_threads);
  RUN(test_model_routes_of_no_token_are_empty);
  RUN(test_model_routes_are_counted);
  RUN(test_model_does_without_disabled_experts);
  RUN(test_model_with_nan_weights_gives_nan_scores);
  RUN(test_model_gives_logits_from_two_experts_on);
  RUN(test_model_keeps_the_states_of_every_layer);
  RUN(test_model_dense_routes_lead_to_expert_0);
}
