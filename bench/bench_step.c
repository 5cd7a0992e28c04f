/* bench_step.c - a training step or inference of MiniLM's size (6 x 384, 12 heads, ffn 1536): seconds, tokens per second, peak memory.
     cc -O2 -o bench_step bench/bench_step.c -lm -pthread
     ./bench_step train|infer [--system dense|switch|tag] [--batch 32] [--length 128] [--real] [--threads 1] [--isa auto]
                  [--precision fp32|bf16] [--experts 4] [--top-k 1] [--tasks 8] [--seconds 5] [--serve] [--no-update] [--layers 6 --hidden 384 --ffn 1536 --heads 12]
   --precision int8: inference with a quantised model. One JSON line on standard output; --serve: see bench.h, for inference the word BATCHxLENGTH
   chooses another batch; --no-update: forward and backward only. --real: sequence i has 8 + (length - 8) u^2 tokens, as in
   bench/pytorch_step.py. */
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
  options o;
} job;

#define NEED(call) do { if ((call) != MOE_OK) return 1; } while (0)

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
    const char *name = argv[i], *v = i + 1 < argc ? argv[i + 1] : "0";
    if (!strcmp(name, "train")) continue;
    if (!strcmp(name, "infer")) { o->training = 0; continue; }
    if (!strcmp(name, "--real")) { o->real = 1; continue; }
    if (!strcmp(name, "--serve")) { o->serve = 1; continue; }
    if (!strcmp(name, "--no-update")) { o->no_update = 1; continue; }
    ++i;
    if (!strcmp(name, "--system")) o->system = v;
    else if (!strcmp(name, "--isa")) o->isa = v;
    else if (!strcmp(name, "--precision")) o->precision = v;
    else if (!strcmp(name, "--batch")) o->batch = atoi(v);
    else if (!strcmp(name, "--length")) o->length = atoi(v);
    else if (!strcmp(name, "--threads")) o->threads = atoi(v);
    else if (!strcmp(name, "--experts")) o->config.experts = atoi(v);
    else if (!strcmp(name, "--top-k")) o->config.top_k = atoi(v);
    else if (!strcmp(name, "--tasks")) o->tasks = atoi(v);
    else if (!strcmp(name, "--seconds")) o->seconds = atof(v);
    else if (!strcmp(name, "--layers")) o->config.layers = atoi(v);
    else if (!strcmp(name, "--hidden")) o->config.hidden = atoi(v);
    else if (!strcmp(name, "--ffn")) o->config.ffn = atoi(v);
    else if (!strcmp(name, "--heads")) o->config.heads = atoi(v);
    else return fprintf(stderr, "bench_step: unknown option %s\n", name), 1;
  }
  if (o->batch < 1 || o->length < 1 || o->tasks < 1) return fprintf(stderr, "bench_step: --batch, --length and --tasks are 1 or more\n"), 1;
  o->config.router = !strcmp(o->system, "dense") ? MOE_ROUTER_DENSE : !strcmp(o->system, "switch") ? MOE_ROUTER_SHARED : MOE_ROUTER_TASK;
  if (o->config.router == MOE_ROUTER_DENSE) o->config.experts = o->config.top_k = 1;
  return 0;
}

/* The batch: sequences of `length` tokens, or of the lengths of bench/pytorch_step.py; tasks in turn. Returns the number of tokens, 0 where
   memory is short. */
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
      ids[start[i] + j] = (int32_t)(moe_key(5, (uint64_t)i, (uint64_t)j, 0, 0) % (uint64_t)o->config.vocab);
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

/* Context and scores for a batch of inference. */
static int setup_inference(job *w, int32_t tokens) {
  moe_limits limits;
  limits.tokens = tokens;
  limits.sequences = w->o.batch;
  limits.training = 0;
  free(w->scores);
  w->scores = (float *)calloc((size_t)w->o.batch * 2, sizeof *w->scores);
  moe_context_free(w->context);
  w->context = NULL;
  NEED(moe_context_create(&w->context, w->model, &limits, &w->env));
  return w->scores == NULL;
}

static int setup(job *w, int32_t tokens) {
  const options *o = &w->o;
  moe_limits limits;
  moe_train_config tc;
  moe_task *tasks = (moe_task *)calloc((size_t)o->tasks, sizeof *tasks);
  int i;
  NEED(moe_pool_create(&w->pool, o->threads, &w->env));
  bench_pin(o->threads);
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
  if (!o->training) {
    NEED(moe_model_pack(w->model, NULL, &w->env));
    return setup_inference(w, tokens);
  }
  limits.tokens = tokens;
  limits.sequences = o->batch;
  limits.training = 1;
  moe_train_config_init(&tc);
  tc.steps = 1000000;
  NEED(moe_trainer_create(&w->trainer, w->model, &limits, &tc, &w->env));
  return 0;
}

static int once(void *arg) {
  job *w = (job *)arg;
  if (w->trainer == NULL) return moe_forward(w->context, w->scores, &w->batch, &w->env) != MOE_OK;
  NEED(moe_accumulate(w->trainer, &w->batch, 0, NULL, NULL, &w->env));
  return !w->o.no_update && moe_update(w->trainer, NULL, &w->env) != MOE_OK;
}

/* Another batch for the same model: the word is BATCHxLENGTH. Inference only. */
static int choose(void *arg, const char *word) {
  job *w = (job *)arg;
  int32_t tokens;
  if (w->trainer != NULL || sscanf(word, "%dx%d", &w->o.batch, &w->o.length) != 2 || w->o.batch < 1 || w->o.length < 1) return 1;
  free((void *)(uintptr_t)w->batch.seq_start);
  free((void *)(uintptr_t)w->batch.ids);
  free((void *)(uintptr_t)w->batch.task);
  free((void *)(uintptr_t)w->batch.label);
  tokens = make_batch(&w->batch, &w->o);
  return tokens == 0 || setup_inference(w, tokens) || once(w);
}

int main(int argc, char **argv) {
  static job w;
  options *o = &w.o;
  int32_t tokens;
  double begin = bench_now(), ready, median, minimum;
  int calls = 0, status = 0;
  if (parse(o, argc, argv)) return 1;
  if (moe_env_init(&w.env, moe_isa_from_name(o->isa)) != MOE_OK) return fprintf(stderr, "bench_step: no %s here\n", o->isa), 1;
  w.env.log = bench_log;
  w.env.log_user = argv[0];
  if (!strcmp(o->precision, "bf16") && moe_env_set_precision(&w.env, MOE_TYPE_BF16)) return 1;
  if (!strcmp(o->precision, "int8")) (void)moe_env_use_amx(&w.env);
  tokens = make_batch(&w.batch, o);
  if (tokens == 0 || setup(&w, tokens)) return 1;
  ready = bench_now() - begin;
  if (once(&w)) return 1; /* the first call touches the memory */
  printf("{\"program\": \"moe.h\", \"mode\": \"%s\", \"system\": \"%s\", \"batch\": %d, \"length\": %d, \"real\": %d, \"tokens\": %d, "
         "\"threads\": %d, \"isa\": \"%s\", \"precision\": \"%s\", \"experts\": %d, \"tasks\": %d, \"setup_seconds\": %.3f",
         o->training ? "train" : "infer", o->system, o->batch, o->length, o->real, (int)tokens, o->threads, moe_isa_name(w.env.isa),
         w.env.precision == MOE_TYPE_F32 ? "fp32" : w.env.features & MOE_FEATURE_AMX_BF16 ? "bf16 on AMX" : "bf16", (int)o->config.experts, o->tasks, ready);
  if (o->serve) {
    printf("}\n");
    status = bench_serve(once, choose, &w);
  } else {
    calls = bench_repeat(&median, &minimum, o->seconds, once, &w);
    if (calls == 0) return 1;
    printf(", \"calls\": %d, \"seconds_median\": %.6f, \"seconds_min\": %.6f, \"tokens_per_second\": %.1f, \"peak_mb\": %.1f}\n", calls, median,
           minimum, tokens / median, bench_peak_mb());
  }
  moe_trainer_free(w.trainer);
  moe_context_free(w.context);
  moe_model_free(w.model);
  moe_pool_free(w.pool);
  return status;
}
