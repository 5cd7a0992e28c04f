/* bench_step.c - a training step or inference of MiniLM's size (6 x 384, 12 heads, ffn 1536):
   seconds, tokens per second, peak memory.
     cc -O2 -o bench_step bench/bench_step.c -lm -pthread
     ./bench_step train|infer [--system dense|switch|tag] [--batch 32] [--length 128] [--real]
     [--threads 1] [--isa auto]
                  [--precision fp32|bf16] [--experts 4] [--top-k 1] [--tasks 8] [--seconds 5]
                  [--serve] [--no-update] [--layers 6 --hidden 384 --ffn 1536 --heads 12]
   --precision int8: inference with a quantised model. One JSON line on standard output;
   --no-update: forward and backward only. --real: sequence i has 8 + (length - 8) u^2 tokens, as in
   bench/pytorch_step.py. --serve: see bench.h; the word is BATCHxLENGTH or MODE:BATCHxLENGTH, MODE
   infer, train or pass (as --no-update). The answer tells what the call cannot do without: the
   operations of its products and of attention, and the bytes of the weights that it multiplies
   with, each once. */
#include "bench.h"

typedef struct options {
  const char *system, *isa, *precision;
  int training, batch, length, real, threads, tasks, serve, no_update;
  double seconds;
  moe_config config;
} options;

typedef struct job {
  moe_env env;
  moe_pool *pool;
  moe_model *model;
  moe_trainer *trainer;
  moe_context *context;
  moe_batch batch;
  float *scores;
  int32_t tokens;
  int packed; /* whether the model is: by setup, or by the trainer */
  options o;
} job;

#define NEED(call)                                                                                 \
  do {                                                                                             \
    if ((call) != MOE_OK) return 1;                                                                \
  } while (0)

/* An option without a value: 1 if it is one. */
static int parse_flag(options *o, const char *name) {
  if (!strcmp(name, "infer"))
    o->training = 0;
  else if (!strcmp(name, "--real"))
    o->real = 1;
  else if (!strcmp(name, "--serve"))
    o->serve = 1;
  else if (!strcmp(name, "--no-update"))
    o->no_update = 1;
  else
    return !strcmp(name, "train");
  return 1;
}

/* One with a value: 1 if it is one. */
static int parse_value(options *o, const char *name, const char *v) {
  if (!strcmp(name, "--system"))
    o->system = v;
  else if (!strcmp(name, "--isa"))
    o->isa = v;
  else if (!strcmp(name, "--precision"))
    o->precision = v;
  else if (!strcmp(name, "--batch"))
    o->batch = atoi(v);
  else if (!strcmp(name, "--length"))
    o->length = atoi(v);
  else if (!strcmp(name, "--threads"))
    o->threads = atoi(v);
  else if (!strcmp(name, "--experts"))
    o->config.experts = atoi(v);
  else if (!strcmp(name, "--top-k"))
    o->config.top_k = atoi(v);
  else if (!strcmp(name, "--tasks"))
    o->tasks = atoi(v);
  else if (!strcmp(name, "--seconds"))
    o->seconds = atof(v);
  else if (!strcmp(name, "--layers"))
    o->config.layers = atoi(v);
  else if (!strcmp(name, "--hidden"))
    o->config.hidden = atoi(v);
  else if (!strcmp(name, "--ffn"))
    o->config.ffn = atoi(v);
  else if (!strcmp(name, "--heads"))
    o->config.heads = atoi(v);
  else
    return 0;
  return 1;
}

static int parse(options *o, int argc, char **argv) {
  int i;
  moe_config_init(&o->config);
  o->system = "tag";
  o->isa = "auto";
  o->precision = "fp32";
  o->training = 1;
  o->batch = 32;
  o->length = 128;
  o->threads = 1;
  o->tasks = 8;
  o->seconds = 5;
  for (i = 1; i < argc; ++i) {
    if (parse_flag(o, argv[i])) continue;
    if (!parse_value(o, argv[i], i + 1 < argc ? argv[i + 1] : "0"))
      return fprintf(stderr, "bench_step: unknown option %s\n", argv[i]), 1;
    ++i;
  }
  if (o->batch < 1 || o->length < 1 || o->tasks < 1)
    return fprintf(stderr, "bench_step: --batch, --length and --tasks are 1 or more\n"), 1;
  o->config.router = !strcmp(o->system, "dense")    ? MOE_ROUTER_DENSE
                     : !strcmp(o->system, "switch") ? MOE_ROUTER_SHARED
                                                    : MOE_ROUTER_TASK;
  if (o->config.router == MOE_ROUTER_DENSE) o->config.experts = o->config.top_k = 1;
  return 0;
}

/* The batch: sequences of `length` tokens, or of the lengths of bench/pytorch_step.py; tasks in
   turn. Returns the number of tokens, 0 where memory is short. */
static int32_t make_batch(moe_batch *b, const options *o) {
  size_t most = (size_t)o->batch * (size_t)(o->length < 8 ? 8 : o->length);
  int32_t *ids = (int32_t *)calloc(most, sizeof *ids);
  int32_t *start = (int32_t *)calloc((size_t)o->batch + 1, sizeof *start);
  int32_t *task = (int32_t *)calloc((size_t)o->batch, sizeof *task);
  float *label = (float *)calloc((size_t)o->batch, sizeof *label);
  float *u = (float *)calloc((size_t)o->batch, sizeof *u);
  int i, j, n;
  if (!ids || !start || !task || !label || !u) return 0;
  golden_fill(u, (size_t)o->batch, "bench.lengths", 1.0f);
  for (i = 0; i < o->batch; ++i) {
    double x = ((double)u[i] + 1) / 2;
    n = o->real ? 8 + (int)((o->length - 8) * x * x) : o->length;
    for (j = 0; j < n; ++j) {
      ids[start[i] + j] =
          (int32_t)(moe_key(5, (uint64_t)i, (uint64_t)j, 0, 0) % (uint64_t)o->config.vocab);
    }
    start[i + 1] = start[i] + n;
    task[i] = i % o->tasks;
    label[i] = (float)(i & 1);
  }
  free(u);
  memset(b, 0, sizeof *b);
  b->S = o->batch;
  b->seq_start = start;
  b->ids = ids;
  b->task = task;
  b->label = label;
  return start[o->batch];
}

static int make_model(job *w) {
  const options *o = &w->o;
  moe_task *tasks = (moe_task *)calloc((size_t)o->tasks, sizeof *tasks);
  int i;
  if (tasks == NULL) return 1;
  for (i = 0; i < o->tasks; ++i) {
    snprintf(tasks[i].name, sizeof tasks[i].name, "task%d", i);
    tasks[i].kind = MOE_KIND_CLASSIFICATION;
    tasks[i].classes = 2;
    strcpy(tasks[i].metrics, "accuracy");
  }
  NEED(moe_model_create(&w->model, &o->config, tasks, o->tasks, 1, &w->env));
  free(tasks);
  if (!strcmp(o->precision, "int8")) {
    moe_model *fp32 = w->model;
    NEED(moe_model_quantize(&w->model, fp32, &w->env));
    moe_model_free(fp32);
  }
  return 0;
}

/* The batch, and a trainer or a context for it; the ones before go. */
static int setup(job *w) {
  const options *o = &w->o;
  moe_limits limits;
  moe_train_config tc;
  free((void *)(uintptr_t)w->batch.seq_start);
  free((void *)(uintptr_t)w->batch.ids);
  free((void *)(uintptr_t)w->batch.task);
  free((void *)(uintptr_t)w->batch.label);
  free(w->scores);
  moe_trainer_free(w->trainer);
  moe_context_free(w->context);
  w->trainer = NULL;
  w->context = NULL;
  w->scores = (float *)calloc((size_t)o->batch * 2, sizeof *w->scores);
  memset(&limits, 0, sizeof limits);
  limits.tokens = w->tokens = make_batch(&w->batch, o);
  limits.sequences = o->batch;
  limits.training = o->training;
  if (w->scores == NULL || w->tokens == 0) return 1;
  if (!o->training) {
    if (!w->packed) NEED(moe_model_pack(w->model, NULL, &w->env));
    w->packed = 1;
    NEED(moe_context_create(&w->context, w->model, &limits, &w->env));
    return 0;
  }
  moe_train_config_init(&tc);
  tc.steps = 1000000;
  NEED(moe_trainer_create(&w->trainer, w->model, &limits, &tc, &w->env));
  w->packed = 1;
  return 0;
}

static int once(void *arg) {
  job *w = (job *)arg;
  if (w->trainer == NULL) return moe_forward(w->context, w->scores, &w->batch, &w->env) != MOE_OK;
  NEED(moe_trainer_accumulate(w->trainer, &w->batch, 0, NULL, NULL, &w->env));
  return !w->o.no_update && moe_trainer_step(w->trainer, NULL, &w->env) != MOE_OK;
}

/* Another mode, batch or number of threads for the same model; the first call touches the memory.
 */
static int choose(void *arg, const char *word, int threads) {
  job *w = (job *)arg;
  options *o = &w->o;
  char mode[8];
  const char *shape = strchr(word, ':');
  if (sscanf(shape ? shape + 1 : word, "%dx%d", &o->batch, &o->length) != 2 || o->batch < 1 ||
      o->length < 1)
    return 1;
  if (shape) {
    if (sscanf(word, "%7[a-z]:", mode) != 1) return 1;
    o->training = strcmp(mode, "infer") != 0;
    o->no_update = !strcmp(mode, "pass");
    if (o->training && !o->no_update && strcmp(mode, "train") != 0) return 1;
  }
  o->threads = threads;
  return bench_threads(&w->pool, threads, &w->env) || setup(w) || once(w);
}

/* Operations: two for each multiplication and addition of the products with weights and of
   attention; backward has two products for each one of forward. Bytes: the weights of those
   products once, of the experts that have tokens. */
static void count(void *arg, double *operations, double *bytes, int *tokens) {
  const job *w = (const job *)arg;
  const moe_config *c = &w->o.config;
  const double H = c->hidden, F = c->ffn, M = w->tokens, S = w->batch.S;
  const double byte = !strcmp(w->o.precision, "int8")     ? 1
                      : w->env.precision == MOE_TYPE_BF16 ? 2
                                                          : 4;
  double squares = 0, layer, experts = w->context ? 0 : (double)c->layers * c->top_k;
  int32_t i, l;
  for (i = 0; i < w->batch.S; ++i) {
    double length = w->batch.seq_start[i + 1] - w->batch.seq_start[i];
    squares += length * length;
  }
  layer = 2 * M * (4 * H * H + 2 * H * F * c->top_k) + 4 * squares * H;
  if (c->router != MOE_ROUTER_DENSE) layer += 2 * M * H * c->experts;
  for (l = 0; l < c->layers; ++l) {
    moe_routes r;
    if (w->context == NULL || moe_context_routes(w->context, l, &r) != MOE_OK) continue;
    for (i = 0; i < r.N; ++i) experts += r.start[i + 1] > r.start[i];
  }
  *operations = (w->o.training ? 3 : 1) * (c->layers * layer + 2 * S * H * 2);
  *bytes = byte * (c->layers * 4 * H * H + experts * 2 * H * F);
  *tokens = (int)w->tokens;
}

int main(int argc, char **argv) {
  static job w;
  options *o = &w.o;
  bench_server server = {&w, once, choose, count};
  double begin = bench_now(), ready, median, minimum;
  int calls = 0, status = 0;
  if (parse(o, argc, argv)) return 1;
  if (moe_env_init(&w.env, moe_isa_from_name(o->isa)) != MOE_OK)
    return fprintf(stderr, "bench_step: no %s here\n", o->isa), 1;
  w.env.log = bench_log;
  w.env.log_user = argv[0];
  if (!strcmp(o->precision, "bf16") && moe_env_set_precision(&w.env, MOE_TYPE_BF16)) return 1;
  if (!strcmp(o->precision, "int8")) (void)moe_env_use_amx(&w.env);
  if (bench_threads(&w.pool, moe_processors(), &w.env) || make_model(&w))
    return 1; /* nothing is measured yet */
  if (bench_threads(&w.pool, o->threads, &w.env) || setup(&w)) return 1;
  ready = bench_now() - begin;
  if (!o->serve && once(&w)) return 1; /* the first call touches the memory */
  printf("{\"program\": \"moe.h\", \"mode\": \"%s\", \"system\": \"%s\", \"batch\": %d, "
         "\"length\": %d, \"real\": %d, \"tokens\": %d, "
         "\"threads\": %d, \"isa\": \"%s\", \"precision\": \"%s\", \"experts\": %d, \"tasks\": %d, "
         "\"setup_seconds\": %.3f",
         o->training ? "train" : "infer", o->system, o->batch, o->length, o->real, (int)w.tokens,
         o->threads, moe_isa_name(w.env.isa),
         w.env.precision == MOE_TYPE_F32      ? "fp32"
         : w.env.cpu_flags & MOE_CPU_AMX_BF16 ? "bf16 on AMX"
                                              : "bf16",
         (int)o->config.experts, o->tasks, ready);
  if (o->serve) {
    printf("}\n");
    status = bench_serve(&server);
  } else {
    calls = bench_repeat(&median, &minimum, o->seconds, once, &w);
    if (calls == 0) return 1;
    printf(", \"calls\": %d, \"seconds_median\": %.6f, \"seconds_min\": %.6f, "
           "\"tokens_per_second\": %.1f, \"peak_mb\": %.1f}\n",
           calls, median, minimum, w.tokens / median, bench_peak_mb());
  }
  moe_trainer_free(w.trainer);
  moe_context_free(w.context);
  moe_model_free(w.model);
  moe_pool_free(w.pool);
  return status;
}
