/* engine.c - what the page asks of moe.h: a small model on points of the plane, and a model of the
   bundled text tasks that does what `./train --from-scratch` does. The page calls these functions
   from a worker (worker.js); tests/web.c calls them from a native program and expects the same
   bits.

   Functions return 0, or a status of moe.h: then web_said() has the sentence. Arrays are shared
   with JavaScript, which asks for their addresses. */
#include <stdlib.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#include "moe.h"

#ifdef __wasm__
#define WEB_API __attribute__((visibility("default"), used))
#else
#define WEB_API
#endif

static moe_env env;
static char said[256];

static void keep_sentence(void *user, moe_status status, const char *sentence) {
  size_t n = strlen(sentence);
  (void)user, (void)status;
  if (n >= sizeof said) n = sizeof said - 1;
  memcpy(said, sentence, n);
  said[n] = 0;
}

WEB_API const char *web_said(void) { return said; }
WEB_API void *web_alloc(size_t bytes) { return malloc(bytes); }
WEB_API void web_free(void *p) { free(p); }
WEB_API const char *web_isa(void) { return moe_isa_name(env.isa); }
WEB_API void web_begin(void) {
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = keep_sentence;
  said[0] = 0;
}

static moe_status failed(const char *sentence) {
  keep_sentence(NULL, MOE_E_ARGUMENT, sentence);
  return MOE_E_ARGUMENT;
}

/* ---- the plane ---- */

enum {
  POINTS = 400,  /* of the training set, shared by the tasks */
  TASKS = 3,     /* two, and a third that joins later or learns with them */
  WIDTH = 6,     /* H */
  INNER = 4,     /* F: so few that one expert cannot do everything */
  BATCH = 48,    /* sequences of a step */
  GRID = 64 * 64 /* points of a map at most */
};

/* What JavaScript fills: points, and for each task their classes (-1: not a point of this task). */
static float plane_points[POINTS * 2], plane_labels[TASKS * POINTS];
/* What it reads: a map, and the numbers of one point. */
static int32_t map_expert[GRID];
static float map_weight[GRID], map_score[GRID];
static struct {
  float input[WIDTH];                    /* x, what gate and experts read */
  float logit[16], prob[16], weight[16]; /* Eq. 3, 4, 5; weight 0: not chosen */
  float output[16 * WIDTH];              /* E_i(x), Eq. 1 */
  float gate[16 * WIDTH];                /* W_{g,t}, a row for each expert */
  float hidden[WIDTH], score[2];         /* after the layer; Eq. 7 */
} probe;

static struct {
  moe_model *model;
  moe_trainer *trainer;
  moe_context *context; /* for maps */
  moe_sampler sampler;
  int64_t rows[TASKS], used[TASKS];
  int32_t row[TASKS][POINTS]; /* points that a task trains on */
  int32_t T, only;            /* only: the third task trains alone, -1: all train */
  float lr, loss;
  uint64_t seed;
} plane;

static float constant_rate(void *user, int64_t t) {
  (void)t;
  return *(const float *)user;
}

static void plane_close(void) {
  moe_context_free(plane.context);
  moe_trainer_free(plane.trainer);
  moe_model_free(plane.model);
  plane.context = NULL, plane.trainer = NULL, plane.model = NULL;
}

/* Trainer, sampler and context of the model. With `only` >= 0 that task learns its gate and its
   head and nothing else: experts and the other tasks stay what they are. */
static moe_status plane_open(int32_t only) {
  static moe_param_group group[3];
  moe_limits training = {BATCH, BATCH, 1, 0}, maps = {GRID, GRID, 0, 1};
  moe_train_config config;
  moe_sampler_config sampling;
  int32_t t, i;
  moe_status status;
  plane.T = moe_model_tasks(plane.model);
  plane.only = only;
  for (t = 0; t < plane.T; ++t)
    for (plane.rows[t] = i = 0; i < POINTS; ++i)
      if (plane_labels[t * POINTS + i] >= 0 && (only < 0 || t == only))
        plane.row[t][plane.rows[t]++] = i;
  moe_train_config_init(&config);
  config.steps = 1000000000;
  config.lr_schedule = constant_rate;
  config.lr_user = &plane.lr;
  config.dropout = 0;
  config.seed = plane.seed;
  group[0].match = "", group[0].lr_scale = 0;
  group[1].match = ".gate.C.", group[2].match = "heads.C.";
  group[1].lr_scale = group[2].lr_scale = 1;
  config.groups = group;
  config.n_groups = only < 0 ? 0 : 3;
  memset(&sampling, 0, sizeof sampling);
  sampling.sampling = MOE_SAMPLING_UNIFORM;
  sampling.seed = plane.seed;
  sampling.tau = 1;
  status = moe_sampler_init(&plane.sampler, &sampling, plane.rows, plane.used, plane.T, &env);
  if (!status) status = moe_trainer_create(&plane.trainer, plane.model, &training, &config, &env);
  if (!status) status = moe_context_create(&plane.context, plane.model, &maps, &env);
  return status;
}

static moe_task plane_task(int32_t t) {
  moe_task task;
  memset(&task, 0, sizeof task);
  task.name[0] = (char)('A' + t);
  task.classes = 2;
  return task;
}

/* A new model of T tasks. router: moe_router. */
WEB_API moe_status plane_reset(int router, int experts, int top_k, int scale_n, float lr, int seed,
                               int T) {
  moe_task tasks[TASKS];
  moe_config config;
  moe_status status;
  int t;
  plane_close();
  if (T < 1 || T > TASKS) return failed("the plane has one to three tasks");
  if (experts > 16) return failed("the plane has at most 16 experts");
  for (t = 0; t < T; ++t) tasks[t] = plane_task(t);
  moe_config_init(&config);
  config.layers = 1, config.hidden = WIDTH, config.ffn = INNER, config.heads = 2;
  config.vocab = 0, config.feature_dim = 2, config.positions = config.max_len = 1;
  config.router = (moe_router)router;
  config.experts = router == MOE_ROUTER_DENSE ? 1 : experts;
  config.top_k = router == MOE_ROUTER_DENSE ? 1 : top_k;
  config.gate_scale_n = router != MOE_ROUTER_DENSE && scale_n;
  plane.lr = lr;
  plane.seed = (uint64_t)seed;
  status = moe_model_create(&plane.model, &config, tasks, T, plane.seed, &env);
  return status ? status : plane_open(-1);
}

/* A third task joins a trained model: its gate is a copy of that of task gate_from, their mean (-2)
   or random (-1). Then it trains alone, its gate and its head. */
WEB_API moe_status plane_adapt(int gate_from) {
  moe_task task = plane_task(2);
  moe_model *out;
  moe_status status;
  if (!plane.model || plane.T != 2) return failed("a third task joins a model of two");
  status = moe_model_adapt(&out, plane.model, &task, gate_from, plane.seed, &env);
  if (status) return status;
  plane_close();
  plane.model = out;
  return plane_open(2);
}

WEB_API void plane_set_rate(float lr) { plane.lr = lr; }

/* One step on BATCH sequences, each of a task and a point drawn by the sampler. */
static moe_status plane_step(void) {
  static float features[BATCH * 2], label[BATCH];
  static int32_t start[BATCH + 1], task[BATCH];
  moe_batch batch;
  int32_t s, t;
  int64_t r;
  moe_status status;
  memset(&batch, 0, sizeof batch);
  for (s = 0; s < BATCH; ++s) {
    moe_sampler_next(&plane.sampler, &t, &r);
    r = plane.row[t][r];
    memcpy(features + 2 * s, plane_points + 2 * r, 2 * sizeof *features);
    label[s] = plane_labels[t * POINTS + r];
    task[s] = t;
    start[s + 1] = s + 1;
  }
  batch.S = BATCH, batch.seq_start = start, batch.features = features;
  batch.task = task, batch.label = label;
  status = moe_trainer_accumulate(plane.trainer, &batch, 0, &plane.loss, NULL, &env);
  return status ? status : moe_trainer_step(plane.trainer, NULL, &env);
}

WEB_API moe_status plane_steps(int n) {
  moe_status status = plane.trainer ? MOE_OK : failed("there is no model yet");
  while (n-- > 0 && !status) status = plane_step();
  return status;
}

WEB_API float plane_loss(void) { return plane.loss; }
WEB_API int plane_steps_done(void) { return (int)moe_trainer_steps_done(plane.trainer); }
WEB_API int plane_tasks(void) { return plane.T; }
WEB_API int plane_parameters(void) { return (int)moe_model_parameters(plane.model); }
WEB_API float *plane_weights(void) { return moe_model_weights(plane.model); }
WEB_API void *plane_array(int which) {
  void *const array[] = {plane_points, plane_labels, map_expert, map_weight, map_score, &probe};
  return array[which];
}

/* The n points as sequences of task t through the model. expert >= 0: all go to that one. */
static moe_status plane_run(const float *points, int n, int t, int expert, float *scores) {
  static int32_t start[GRID + 1], task[GRID], forced[GRID * 16];
  const moe_config *c = moe_model_config(plane.model);
  moe_batch batch;
  moe_status status;
  int i, j;
  for (i = 0; i < n; ++i) {
    start[i + 1] = i + 1;
    task[i] = t;
    for (j = 0; j < c->top_k; ++j) /* that one first; its fellows of top-k follow */
      forced[i * c->top_k + j] = expert < 0 ? 0 : (expert + j) % c->experts;
  }
  memset(&batch, 0, sizeof batch);
  batch.S = n, batch.seq_start = start, batch.features = points, batch.task = task;
  moe_context_force(plane.context, expert < 0 ? NULL : forced);
  status = moe_forward(plane.context, scores, &batch, &env);
  moe_context_force(plane.context, NULL);
  return status;
}

/* A map of side x side points from -1 to 1, from the top left: expert, g*, and the score of class 1
   less that of class 0 of task t; expert >= 0: if every point went to that one. */
WEB_API moe_status plane_map(int t, int side, int expert) {
  static float points[GRID * 2], scores[GRID * 2];
  moe_routes routes;
  moe_status status;
  int i, n = side * side;
  if (!plane.model || t < 0 || t >= plane.T) return failed("the model has no such task");
  if (side < 1 || n > GRID) return failed("a map has at most 64 x 64 points");
  for (i = 0; i < n; ++i) {
    points[2 * i] = ((float)(i % side) + 0.5f) * 2 / (float)side - 1;
    points[2 * i + 1] = 1 - ((float)(i / side) + 0.5f) * 2 / (float)side;
  }
  status = plane_run(points, n, t, expert, scores);
  if (!status) status = moe_context_routes(plane.context, 0, &routes);
  for (i = 0; i < n && !status; ++i) {
    map_expert[i] = routes.expert[i * routes.k];
    map_weight[i] = routes.N > 1 ? routes.prob[i * routes.N + map_expert[i]] : 1;
    map_score[i] = scores[2 * i + 1] - scores[2 * i];
  }
  return status;
}

/* Share of the n points at `points` whose class of task t is `label`: moe_forward in one batch. */
WEB_API double plane_accuracy(int t, const float *points, const float *label, int n) {
  static float scores[GRID * 2];
  int i, right = 0;
  if (!plane.context || n < 1 || n > GRID || plane_run(points, n, t, -1, scores)) return 0;
  for (i = 0; i < n; ++i) right += (scores[2 * i + 1] > scores[2 * i]) == (label[i] > 0);
  return (double)right / n;
}

static const float *tensor(const char *name, int expert) {
  char full[128];
  moe_tensor t;
  size_t n = strlen(name);
  char *at;
  memcpy(full, name, n + 1);
  at = strstr(full, "experts.0");
  if (at) at[8] = (char)('0' + expert); /* at most 9 experts have their place in a probe */
  if (moe_model_tensor(plane.model, moe_model_find_tensor(plane.model, full), &t)) return NULL;
  return moe_model_weights(plane.model) + t.offset;
}

static void linear(float *y, const float *x, const char *weight, const char *bias, int from,
                   int to) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.y = y, op.x = x, op.M = 1;
  op.w = moe_mat_rows(tensor(weight, 0), to, from);
  op.b = tensor(bias, 0);
  moe_linear_forward(&op, &env);
}

static void norm(float *y, const float *x, const float *delta, const char *gamma,
                 const char *beta) {
  moe_layernorm_op op;
  moe_layernorm_op_init(&op);
  op.y = y, op.x = x, op.delta = delta;
  op.gamma = tensor(gamma, 0), op.beta = tensor(beta, 0);
  op.M = 1, op.H = WIDTH;
  moe_layernorm_forward(&op, &env);
}

/* x of Eq. 1 to 6 for a point: what one token alone becomes on its way to gate and experts. Its
   attention is to itself, so that the softmax is 1 and the value passes. */
static void plane_input(float *x, const float *point) {
  const float *position, *segment;
  float v[WIDTH], y[WIDTH];
  int i;
  linear(x, point, "embeddings.features.weight", "embeddings.features.bias", 2, WIDTH);
  position = tensor("embeddings.position_embeddings.weight", 0);
  segment = tensor("embeddings.token_type_embeddings.weight", 0);
  for (i = 0; i < WIDTH; ++i) x[i] = x[i] + position[i] + segment[i];
  norm(x, x, NULL, "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias");
  linear(v, x, "encoder.layer.0.attention.self.value.weight",
         "encoder.layer.0.attention.self.value.bias", WIDTH, WIDTH);
  linear(y, v, "encoder.layer.0.attention.output.dense.weight",
         "encoder.layer.0.attention.output.dense.bias", WIDTH, WIDTH);
  norm(x, x, y, "encoder.layer.0.attention.output.LayerNorm.weight",
       "encoder.layer.0.attention.output.LayerNorm.bias");
}

static void expert_output(float *y, const float *x, int expert) {
  float inner[INNER];
  moe_linear_op op;
  int dense = moe_model_config(plane.model)->experts == 1;
  moe_linear_op_init(&op);
  op.act = inner, op.x = x, op.M = 1;
  op.w = moe_mat_rows(tensor(dense ? "encoder.layer.0.intermediate.dense.weight"
                                   : "encoder.layer.0.experts.0.intermediate.dense.weight",
                             expert),
                      INNER, WIDTH);
  op.b = tensor(dense ? "encoder.layer.0.intermediate.dense.bias"
                      : "encoder.layer.0.experts.0.intermediate.dense.bias",
                expert);
  moe_linear_forward(&op, &env);
  op.act = NULL, op.y = y, op.x = inner;
  op.w = moe_mat_rows(tensor(dense ? "encoder.layer.0.output.dense.weight"
                                   : "encoder.layer.0.experts.0.output.dense.weight",
                             expert),
                      WIDTH, INNER);
  op.b = tensor(dense ? "encoder.layer.0.output.dense.bias"
                      : "encoder.layer.0.experts.0.output.dense.bias",
                expert);
  moe_linear_forward(&op, &env);
}

static const char *gate_name(int t) {
  static char name[] = "encoder.layer.0.gate.A.weight";
  name[21] = (char)('A' + t);
  return moe_model_config(plane.model)->router == MOE_ROUTER_SHARED ? "encoder.layer.0.gate.weight"
                                                                    : name;
}

/* The numbers of the equations for task t at (x, y), into `probe`. */
WEB_API moe_status plane_probe(int t, float x, float y) {
  float point[2];
  const float *logits;
  moe_routes routes;
  moe_status status;
  int i;
  point[0] = x, point[1] = y;
  memset(&probe, 0, sizeof probe);
  status = plane_run(point, 1, t, -1, probe.score);
  if (!status) status = moe_context_routes(plane.context, 0, &routes);
  if (status) return status;
  memcpy(probe.hidden, moe_context_hidden(plane.context), sizeof probe.hidden);
  logits = moe_context_gate_logits(plane.context, 0);
  if (logits) {
    memcpy(probe.logit, logits, (size_t)routes.N * sizeof(float));
    memcpy(probe.prob, routes.prob, (size_t)routes.N * sizeof(float));
    memcpy(probe.gate, tensor(gate_name(t), 0), (size_t)(routes.N * WIDTH) * sizeof(float));
  } else
    probe.prob[0] = 1;
  for (i = 0; i < routes.k; ++i) probe.weight[routes.expert[i]] = routes.weight[i];
  plane_input(probe.input, point);
  for (i = 0; i < routes.N; ++i) expert_output(probe.output + i * WIDTH, probe.input, i);
  return MOE_OK;
}

/* ---- the text ----
   What examples/train.c does with --from-scratch, one system and one seed: the same rows in the
   same order, the same model, the same steps, hence the same bits. */

enum { TEXTS = 9, LABEL_BYTES = 1024, MICRO_BATCH = 4096, SCORE_ROWS = 256, PIECES = 16384 };

typedef struct text_rows {
  int n, room, tokens, token_room;
  int32_t *ids, *start; /* row i: ids[start[i]] to ids[start[i + 1] - 1] */
  uint8_t *segments;
  float *label;
} text_rows;

static struct {
  moe_task task[TEXTS];
  const char *label[TEXTS][32];
  char labels[TEXTS][LABEL_BYTES];
  text_rows rows[TEXTS][2]; /* train, dev */
  int T;
  char *vocab;
  moe_tokenizer *tokenizer;
  moe_model *model;
  moe_trainer *trainer;
  moe_context *context; /* for dev rows and questions */
  moe_sampler sampler;
  int64_t n_rows[TEXTS], used[TEXTS];
  moe_train_config config;
  int batch;
  float loss;
  float *scores; /* of the first `scored` dev rows of one task, (scored, max_classes) */
  int scored;
} text;

/* What a question leaves for JavaScript. */
static int32_t ask_ids[PIECES], ask_count, ask_all;
static float *ask_scores; /* (T, max_classes): probabilities, or the value */
static int32_t *ask_expert;
static float *ask_prob; /* (L, T, M, N) */

/* Forgets tasks and rows; the vocabulary, one word a line, is copied. */
WEB_API moe_status text_open(const char *vocab, int bytes) {
  int t, set;
  for (t = 0; t < text.T; ++t)
    for (set = 0; set < 2; ++set) {
      text_rows *r = &text.rows[t][set];
      free(r->ids), free(r->start), free(r->segments), free(r->label);
      memset(r, 0, sizeof *r);
    }
  text.T = 0;
  moe_tokenizer_free(text.tokenizer);
  text.tokenizer = NULL;
  free(text.vocab);
  text.vocab = (char *)malloc((size_t)bytes + 1);
  if (!text.vocab) return failed("out of memory");
  memcpy(text.vocab, vocab, (size_t)bytes);
  return moe_tokenizer_create(&text.tokenizer, text.vocab, (size_t)bytes, 0, &env);
}

/* Appends a task; labels: C names, one a line, or NULL: a regression from low to high. */
WEB_API moe_status text_add_task(const char *name, const char *labels, int pair, float low,
                                 float high, int max_len) {
  moe_task *task = &text.task[text.T];
  char *at = text.labels[text.T];
  if (text.T == TEXTS) return failed("there is room for nine tasks");
  if (strlen(name) >= MOE_NAME_BYTES || (labels && strlen(labels) >= LABEL_BYTES))
    return failed("the name of a task or its labels are too long");
  memset(task, 0, sizeof *task);
  memcpy(task->name, name, strlen(name) + 1);
  task->pair = pair;
  task->max_len = max_len;
  task->kind = labels ? MOE_KIND_CLASSIFICATION : MOE_KIND_REGRESSION;
  task->classes = 1, task->low = low, task->high = high;
  if (labels) {
    task->low = task->high = 0;
    task->label = text.label[text.T];
    memcpy(at, labels, strlen(labels) + 1);
    for (task->classes = 0; *at && task->classes < 32; ++task->classes) {
      size_t n = strcspn(at, "\n");
      text.label[text.T][task->classes] = at;
      at += n + (at[n] != 0);
      if (at[-1] == '\n') at[-1] = 0;
    }
  }
  ++text.T;
  return MOE_OK;
}

static moe_status grow(void *at, size_t old_bytes, size_t bytes) {
  void **p = (void **)at, *out = malloc(bytes);
  if (!out) return failed("out of memory");
  if (*p) memcpy(out, *p, old_bytes);
  free(*p);
  *p = out;
  return MOE_OK;
}

/* Appends a row to set 0 (train) or 1 (dev) of a task; b NULL: one text. */
WEB_API moe_status text_add_row(int t, int set, float label, const char *a, const char *b) {
  text_rows *r = &text.rows[t][set];
  moe_text words = moe_text_of(a, b);
  moe_status status;
  int longest = text.task[t].max_len ? text.task[t].max_len : 128;
  moe_tokens out;
  if (r->n + 1 >= r->room) {
    size_t n = (size_t)r->room, more = 2 * n + 256;
    if (grow(&r->start, n * 4, more * 4) || grow(&r->label, n * 4, more * 4)) return MOE_E_MEMORY;
    if (!n) r->start[0] = 0;
    r->room = (int)more;
  }
  if (r->tokens + longest > r->token_room) {
    size_t n = (size_t)r->token_room, more = 2 * n + 8192;
    if (grow(&r->ids, n * 4, more * 4) || grow(&r->segments, n, more)) return MOE_E_MEMORY;
    r->token_room = (int)more;
  }
  memset(&out, 0, sizeof out);
  out.ids = r->ids + r->tokens, out.segments = r->segments + r->tokens, out.capacity = longest;
  status = moe_encode(text.tokenizer, &out, &words, longest, MOE_TRUNCATE_LONGEST, &env);
  if (status) return status;
  r->label[r->n++] = label;
  r->start[r->n] = r->tokens += out.count;
  return MOE_OK;
}

static void text_close(void) {
  moe_context_free(text.context);
  moe_trainer_free(text.trainer);
  moe_model_free(text.model);
  free(text.scores), free(ask_scores), free(ask_expert), free(ask_prob);
  text.context = NULL, text.trainer = NULL, text.model = NULL;
  text.scores = ask_scores = ask_prob = NULL, ask_expert = NULL;
}

static moe_status text_memory(void) {
  const moe_config *c = moe_model_config(text.model);
  size_t classes = (size_t)moe_model_max_classes(text.model), T = (size_t)text.T, most = 1;
  size_t routes = (size_t)c->layers * T * (size_t)c->max_len;
  int t;
  for (t = 0; t < text.T; ++t)
    if (most < (size_t)text.rows[t][1].n) most = (size_t)text.rows[t][1].n;
  text.scores = (float *)malloc(most * (classes + 1) * sizeof(float));
  ask_scores = (float *)malloc(T * classes * sizeof(float));
  ask_expert = (int32_t *)malloc(routes * sizeof(int32_t));
  ask_prob = (float *)malloc(routes * (size_t)c->experts * sizeof(float));
  if (!text.scores || !ask_scores || !ask_expert || !ask_prob) return failed("out of memory");
  return MOE_OK;
}

/* A new model and its trainer, as ./train with these options makes them. */
WEB_API moe_status text_start(int router, int experts, int layers, int hidden, int ffn, float lr,
                              int steps, int seed) {
  moe_limits limits = {MICRO_BATCH, 32, 1, 0}, asked = {MICRO_BATCH, SCORE_ROWS, 0, 1};
  moe_sampler_config sampling;
  moe_config config;
  moe_status status;
  int t;
  text_close();
  moe_config_init(&config);
  config.layers = layers, config.hidden = hidden, config.ffn = ffn, config.heads = 4;
  config.vocab = moe_tokenizer_words(text.tokenizer);
  config.positions = config.max_len = 128, config.segments = 2;
  config.router = (moe_router)router;
  config.experts = router == MOE_ROUTER_DENSE ? 1 : experts;
  config.top_k = 1;
  config.gate_scale_n = router != MOE_ROUTER_DENSE;
  status = moe_model_create(&text.model, &config, text.task, text.T, (uint64_t)seed, &env);
  if (status) return status;
  moe_train_config_init(&text.config);
  text.config.lr = lr;
  text.config.steps = steps;
  text.config.seed = (uint64_t)seed;
  text.batch = 32;
  memset(&sampling, 0, sizeof sampling);
  sampling.seed = (uint64_t)seed;
  sampling.tau = 1;
  sampling.draws = (int64_t)steps * text.batch;
  for (t = 0; t < text.T; ++t) text.n_rows[t] = text.rows[t][0].n;
  status = moe_sampler_init(&text.sampler, &sampling, text.n_rows, text.used, text.T, &env);
  if (!status) status = moe_trainer_create(&text.trainer, text.model, &limits, &text.config, &env);
  if (!status) status = moe_context_create(&text.context, text.model, &asked, &env);
  return status ? status : text_memory();
}

/* A batch that is being filled. */
static struct {
  int32_t ids[MICRO_BATCH], start[SCORE_ROWS + 1], task[SCORE_ROWS], tokens;
  uint8_t segments[MICRO_BATCH];
  float label[SCORE_ROWS];
  int64_t index[SCORE_ROWS];
  moe_batch batch;
} filling;

static void clear_batch(void) {
  memset(&filling.batch, 0, sizeof filling.batch);
  filling.batch.seq_start = filling.start, filling.batch.ids = filling.ids;
  filling.batch.segments = filling.segments, filling.batch.task = filling.task;
  filling.batch.label = filling.label, filling.batch.index = filling.index;
  filling.tokens = 0;
}

static int row_length(const text_rows *r, int64_t i) { return r->start[i + 1] - r->start[i]; }

static void add_row(const text_rows *r, int64_t i, int32_t task, int64_t index) {
  int32_t s = filling.batch.S, n = row_length(r, i);
  memcpy(filling.ids + filling.tokens, r->ids + r->start[i], (size_t)n * sizeof(int32_t));
  memcpy(filling.segments + filling.tokens, r->segments + r->start[i], (size_t)n);
  filling.task[s] = task, filling.label[s] = r->label[i], filling.index[s] = index;
  filling.start[s + 1] = filling.tokens += n;
  ++filling.batch.S;
}

/* One step of the optimizer, as train_step of tools/training.h: 32 rows in micro-batches. */
WEB_API moe_status text_step(void) {
  float sum = 0, loss = 0;
  moe_status status = MOE_OK;
  int i;
  if (!text.trainer) return failed("there is no model yet");
  clear_batch();
  for (i = 0; i <= text.batch && !status; ++i) {
    const text_rows *r = NULL;
    int32_t task = 0;
    int64_t row = 0;
    if (i < text.batch) {
      moe_sampler_next(&text.sampler, &task, &row);
      r = &text.rows[task][0];
    }
    if (filling.batch.S && (!r || filling.tokens + row_length(r, row) > MICRO_BATCH)) {
      status = moe_trainer_accumulate(text.trainer, &filling.batch, text.batch, &loss, NULL, &env);
      sum += loss;
      clear_batch();
    }
    if (r) add_row(r, row, task, i);
  }
  text.loss = sum;
  return status ? status : moe_trainer_step(text.trainer, NULL, &env);
}

/* Scores the first `most` dev rows of a task (0: all), as score_rows of tools/score.h. */
WEB_API moe_status text_dev(int t, int most) {
  const text_rows *r = &text.rows[t][1];
  int n = most && most < r->n ? most : r->n;
  int stride = moe_model_max_classes(text.model), i = 0;
  moe_status status = MOE_OK;
  while (i < n && !status) {
    float *to = text.scores + i * stride;
    clear_batch();
    do add_row(r, i, t, i);
    while (++i < n && filling.batch.S < SCORE_ROWS &&
           filling.tokens + row_length(r, i) <= MICRO_BATCH);
    status = moe_forward(text.context, to, &filling.batch, &env);
  }
  text.scored = n;
  return status;
}

/* The task's metric over the scores of text_dev: accuracy, or Spearman's correlation. */
WEB_API double text_metric(int t) {
  const text_rows *r = &text.rows[t][1];
  const moe_task *task = &text.task[t];
  int stride = moe_model_max_classes(text.model), defined;
  float *answer = text.scores + text.scored * stride,
        *scratch = (float *)malloc((size_t)text.scored * 8);
  double value = 0;
  if (scratch && !moe_answers(answer, task, text.scores, stride, text.scored, NULL, NULL, &env))
    value = moe_metric(task->classes > 1 ? "accuracy" : "spearman", task, answer, r->label,
                       (size_t)text.scored, scratch, &defined);
  free(scratch);
  return value;
}

/* Every task's gates route the same text: (L, T, M, N) probabilities, (L, T, M) experts, scores. */
WEB_API moe_status text_ask(const char *a, const char *b) {
  const moe_config *c;
  moe_text words = moe_text_of(a, b && *b ? b : NULL);
  static uint8_t segments[PIECES];
  moe_tokens out;
  moe_routes routes;
  int t, l, i, stride, longest = 64;
  moe_status status;
  if (!text.model) return failed("there is no model yet");
  c = moe_model_config(text.model);
  memset(&out, 0, sizeof out);
  out.ids = ask_ids, out.segments = segments, out.capacity = PIECES;
  status = moe_encode(text.tokenizer, &out, &words, PIECES, MOE_TRUNCATE_LONGEST, &env);
  ask_all = out.count;
  if (!status) status = moe_encode(text.tokenizer, &out, &words, longest, c->truncate, &env);
  if (status) return status;
  ask_count = out.count;
  clear_batch();
  for (t = 0; t < text.T; ++t) {
    memcpy(filling.ids + filling.tokens, ask_ids, (size_t)ask_count * sizeof(int32_t));
    memcpy(filling.segments + filling.tokens, segments, (size_t)ask_count);
    filling.task[t] = t, filling.index[t] = t;
    filling.start[t + 1] = filling.tokens += ask_count;
    ++filling.batch.S;
  }
  status = moe_forward(text.context, ask_scores, &filling.batch, &env);
  for (l = 0; l < c->layers && !status; ++l) {
    status = moe_context_routes(text.context, l, &routes);
    if (status) return status;
    for (i = 0; i < routes.M; ++i) ask_expert[l * routes.M + i] = routes.expert[i * routes.k];
    for (i = 0; i < routes.M * routes.N; ++i)
      ask_prob[l * routes.M * routes.N + i] = routes.N > 1 ? routes.prob[i] : 1;
  }
  stride = moe_model_max_classes(text.model);
  for (t = 0; t < text.T; ++t)
    if (text.task[t].classes > 1)
      moe_softmax(ask_scores + t * stride, ask_scores + t * stride, text.task[t].classes);
  return status;
}

WEB_API float text_loss(void) { return text.loss; }
WEB_API int text_steps_done(void) { return (int)moe_trainer_steps_done(text.trainer); }
WEB_API int text_stride(void) { return moe_model_max_classes(text.model); }
WEB_API int text_parameters(void) { return (int)moe_model_parameters(text.model); }
WEB_API int text_pieces(int all) { return all ? ask_all : ask_count; }
WEB_API void *text_array(int which) {
  void *const array[] = {text.scores, ask_ids, ask_scores, ask_expert, ask_prob};
  return array[which];
}
