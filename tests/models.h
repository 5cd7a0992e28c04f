/* What the tests of model and trainer share: small models of any shape, batches made from a number,
   bits compared. Include it after moe.h and test.h. */
#ifndef MODELS_H
#define MODELS_H
#include "golden/golden.h"

/* The last sentence that the library logged, and how many there were. */
static char said[65536];
static int sentences;
static void models_log(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  snprintf(said, sizeof said, "%s", sentence);
  ++sentences;
}

/* Counts the sentences that refuse an argument and say why. */
TEST_UNUSED static void count_sentence(void *user, moe_status status, const char *sentence) {
  (void)user;
  if (status == MOE_E_ARGUMENT && strlen(sentence) > 20) ++sentences;
}

/* Every instruction set that a kernel exists for. */
TEST_UNUSED static const moe_isa isas[] = {MOE_ISA_SCALAR, MOE_ISA_V128, MOE_ISA_NEON, MOE_ISA_AVX2,
                                           MOE_ISA_AVX512};
enum { ISAS = sizeof isas / sizeof isas[0] };

/* An environment of one thread that keeps the last sentence. */
TEST_UNUSED static moe_env models_env(moe_isa isa) {
  moe_env env;
  moe_env_init(&env, isa);
  env.log = models_log;
  said[0] = 0;
  sentences = 0;
  return env;
}

/* Odd sizes on purpose: nothing is a multiple of a vector. */
TEST_UNUSED static moe_config models_config(moe_router router, int32_t experts, int32_t top_k) {
  moe_config c;
  moe_config_init(&c);
  c.layers = 2;
  c.hidden = 20;
  c.ffn = 37;
  c.heads = 4;
  c.vocab = 50;
  c.positions = 19;
  c.max_len = 19;
  c.router = router;
  c.experts = experts;
  c.top_k = top_k;
  return c;
}

enum { MODELS_TASKS = 5 };

/* One task of each kind, and a second classification. */
TEST_UNUSED static void models_tasks(moe_task tasks[MODELS_TASKS]) {
  static const char *const color[] = {"red", "green", "blue"};
  static const char *const name[] = {"two", "three", "real", "rank-ing", "span_+1"};
  static const moe_kind kind[] = {MOE_KIND_CLASSIFICATION, MOE_KIND_CLASSIFICATION,
                                  MOE_KIND_REGRESSION, MOE_KIND_RANKING, MOE_KIND_SPAN};
  int i;
  memset(tasks, 0, MODELS_TASKS * sizeof *tasks);
  for (i = 0; i < MODELS_TASKS; ++i) {
    snprintf(tasks[i].name, sizeof tasks[i].name, "%s", name[i]);
    tasks[i].kind = kind[i];
    tasks[i].classes = i == 2 ? 1 : i == 1 ? 3 : 2;
    snprintf(tasks[i].metrics, sizeof tasks[i].metrics, "%s",
             i == 2 ? "spearman,pearson" : "accuracy,f1");
  }
  tasks[1].label = color;
  tasks[2].high = 5;
}

/* Weights large enough that every part of the network matters, by the names of the tensors as
   golden/tiny.h says. With `share`, expert 0 has the values of a dense model's FFN. */
TEST_UNUSED static void models_fill(moe_model *model, int share) {
  int32_t i;
  moe_tensor t;
  for (i = 0; i < moe_model_tensors(model); ++i) {
    size_t j, length;
    float *w;
    char name[128], *skip;
    moe_model_tensor(model, i, &t);
    w = moe_model_weights(model) + t.offset;
    snprintf(name, sizeof name, "%s", t.name);
    skip = strstr(name, "experts.0.");
    if (skip && share) memmove(skip, skip + 10, strlen(skip + 10) + 1);
    length = strlen(name);
    golden_fill(w, t.count, name,
                t.dims == 1                                          ? 0.25f
                : strstr(name, "gate") || strstr(name, "embeddings") ? 1.0f
                                                                     : 0.5f);
    if (length > 16 && !strcmp(name + length - 16, "LayerNorm.weight"))
      for (j = 0; j < t.count; ++j) w[j] += 1;
  }
}

/* The tensor of a name; its count is 0 where there is none. */
TEST_UNUSED static moe_tensor models_tensor(const moe_model *model, const char *name) {
  moe_tensor t;
  if (moe_model_tensor(model, moe_model_find_tensor(model, name), &t)) memset(&t, 0, sizeof t);
  return t;
}

TEST_UNUSED static moe_model *models_create(const moe_config *config, const moe_task *tasks,
                                            int32_t T, const moe_env *env) {
  moe_model *model = NULL;
  if (moe_model_create(&model, config, tasks, T, 1, env)) return NULL;
  models_fill(model, 1);
  return model;
}

enum { MODELS_S = 40, MODELS_M = 800, MODELS_WIDTH = 8 };

/* A batch with room for its arrays. */
typedef struct models_batch {
  moe_batch b;
  int32_t start[MODELS_S + 1], ids[MODELS_M], task[MODELS_S], span[4 * MODELS_S];
  uint8_t segments[MODELS_M];
  float label[MODELS_S], features[MODELS_M * MODELS_WIDTH];
  int64_t index[MODELS_S];
} models_batch;

static int32_t models_draw(uint64_t *state, int32_t n) {
  int32_t r = (int32_t)((test_random(state) + 1) * 0.5f * (float)n);
  return r < n ? r : n - 1;
}

/* Connects the pointers of a batch whose arrays are filled. */
static void models_connect(models_batch *m, const moe_config *config, int32_t S) {
  memset(&m->b, 0, sizeof m->b);
  m->b.S = S;
  m->b.seq_start = m->start;
  if (config->feature_dim)
    m->b.features = m->features;
  else
    m->b.ids = m->ids;
  m->b.segments = m->segments;
  m->b.task = m->task;
  m->b.label = m->label;
  m->b.span = m->span;
  m->b.index = m->index;
}

/* S sequences of 1 to `longest` tokens of random tasks of the model. */
TEST_UNUSED static void models_random_batch(models_batch *m, const moe_model *model, int32_t S,
                                            int32_t longest, uint64_t seed) {
  const moe_config *config = moe_model_config(model);
  uint64_t state = seed * 77 + 5;
  int32_t s, i;
  memset(m, 0, sizeof *m);
  for (s = 0; s < S; ++s) {
    const moe_task *task;
    int32_t length = 1 + models_draw(&state, longest), *span = m->span + 4 * s;
    m->task[s] = models_draw(&state, moe_model_tasks(model));
    m->index[s] = s;
    m->start[s + 1] = m->start[s] + length;
    task = moe_model_task(model, m->task[s]);
    m->label[s] = task->kind == MOE_KIND_REGRESSION ? 5 * (test_random(&state) + 1) / 2
                                                    : (float)models_draw(&state, task->classes);
    span[0] = models_draw(&state, length);
    span[1] = span[0] + 1 + models_draw(&state, length - span[0]);
    span[2] = models_draw(&state, length);
    span[3] = span[2] + 1 + models_draw(&state, length - span[2]);
    for (i = m->start[s]; i < m->start[s + 1]; ++i) {
      m->ids[i] = models_draw(&state, config->vocab ? config->vocab : 1);
      m->segments[i] = (uint8_t)models_draw(&state, config->segments);
    }
  }
  for (i = 0; i < m->start[S] * config->feature_dim; ++i) m->features[i] = test_random(&state);
  models_connect(m, config, S);
}

/* Sequence s of a batch, appended to another one of the same model. */
TEST_UNUSED static void models_append(models_batch *to, const models_batch *from, int32_t s,
                                      const moe_config *config) {
  int32_t S = to->b.S, at = to->start[S], length = from->start[s + 1] - from->start[s];
  memcpy(to->ids + at, from->ids + from->start[s], (size_t)length * sizeof *to->ids);
  memcpy(to->segments + at, from->segments + from->start[s], (size_t)length);
  memcpy(to->features + at * config->feature_dim,
         from->features + from->start[s] * config->feature_dim,
         (size_t)(length * config->feature_dim) * sizeof *to->features);
  memcpy(to->span + 4 * S, from->span + 4 * s, 4 * sizeof *to->span);
  to->task[S] = from->task[s];
  to->label[S] = from->label[s];
  to->index[S] = from->index[s];
  to->start[S + 1] = at + length;
  models_connect(to, config, S + 1);
}

/* FNV-1a of bytes, for comparing runs. */
TEST_UNUSED static uint64_t models_hash(const void *data, size_t bytes) {
  const unsigned char *p = (const unsigned char *)data;
  uint64_t h = 0xcbf29ce484222325u;
  size_t i;
  for (i = 0; i < bytes; ++i) h = (h ^ p[i]) * 0x100000001b3u;
  return h;
}

/* A file in memory, written by the library; `data` is to be freed. Writing fails after `limit`
   bytes.
 */
typedef struct models_file {
  unsigned char *data;
  size_t used, capacity, limit;
} models_file;

TEST_UNUSED static int models_write(void *user, const void *data, size_t bytes) {
  models_file *file = (models_file *)user;
  if (bytes > file->limit - file->used) return 1;
  if (file->used + bytes > file->capacity || !file->data) {
    file->capacity = 2 * (file->used + bytes) + 1;
    file->data = (unsigned char *)realloc(file->data, file->capacity);
    if (!file->data) return 1;
  }
  memcpy(file->data + file->used, data, bytes);
  file->used += bytes;
  return 0;
}

/* Writes into an empty file. */
TEST_UNUSED static moe_writer models_writer(models_file *file) {
  moe_writer writer;
  memset(file, 0, sizeof *file);
  file->limit = (size_t)-1;
  writer.write = models_write;
  writer.user = file;
  return writer;
}

/* The file of a model; `used` is 0 where it could not be written. */
TEST_UNUSED static models_file models_written(const moe_model *model, const moe_env *env) {
  models_file file;
  moe_writer writer = models_writer(&file);
  if (moe_model_write(model, &writer, env)) file.used = 0;
  return file;
}

/* A block of the heap that starts at a multiple of 64; *raw is to be freed. */
TEST_UNUSED static void *models_block(void **raw, size_t bytes) {
  *raw = malloc(bytes + 63);
  return *raw ? (void *)(((uintptr_t)*raw + 63) & ~(uintptr_t)63) : NULL;
}
#endif
