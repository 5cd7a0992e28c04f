/* bench_step.c - tokens per second and peak memory of a training step or of inference, one JSON line on standard output.
     cc -O2 -o bench_step bench/bench_step.c -lm -pthread
     ./bench_step train|infer [--system dense|switch|tag] [--batch 32] [--length 128] [--real] [--threads 1] [--isa auto]
                  [--experts 4] [--tasks 8] [--repeat 7] [--layers 6 --hidden 384 --ffn 1536 --heads 12]
   MiniLM's size unless said. --real: lengths spread between 8 and --length as in short-text tasks, the same batch in every run. */
#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE
#endif
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <sys/resource.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

static void show(void *user, moe_status status, const char *sentence) {
  (void)user;
  (void)status;
  fprintf(stderr, "bench_step: %s\n", sentence);
}

#define NEED(call) do { if ((call) != MOE_OK) return 1; } while (0)

int main(int argc, char **argv) {
  int training = 1, batch = 32, length = 128, real = 0, threads = 1, n_tasks = 8, repeat = 7, i, j;
  const char *system = "tag", *isa = "auto";
  moe_config config;
  moe_train_config tc;
  moe_limits limits;
  moe_env env;
  moe_pool *pool;
  moe_model *model;
  moe_trainer *trainer = NULL;
  moe_context *context = NULL;
  moe_batch b;
  moe_task *tasks;
  int32_t *ids, *start, *task, tokens = 0;
  float *label, *scores;
  double times[1000], setup = now();
  struct rusage usage;
  moe_config_init(&config);
  for (i = 1; i < argc; ++i) {
    const char *v = i + 1 < argc ? argv[i + 1] : "0";
    if (!strcmp(argv[i], "train")) continue;
    if (!strcmp(argv[i], "infer")) { training = 0; continue; }
    if (!strcmp(argv[i], "--real")) { real = 1; continue; }
    ++i;
    if (!strcmp(argv[i - 1], "--system")) system = v;
    else if (!strcmp(argv[i - 1], "--isa")) isa = v;
    else if (!strcmp(argv[i - 1], "--batch")) batch = atoi(v);
    else if (!strcmp(argv[i - 1], "--length")) length = atoi(v);
    else if (!strcmp(argv[i - 1], "--threads")) threads = atoi(v);
    else if (!strcmp(argv[i - 1], "--experts")) config.experts = atoi(v);
    else if (!strcmp(argv[i - 1], "--tasks")) n_tasks = atoi(v);
    else if (!strcmp(argv[i - 1], "--repeat")) repeat = atoi(v);
    else if (!strcmp(argv[i - 1], "--layers")) config.layers = atoi(v);
    else if (!strcmp(argv[i - 1], "--hidden")) config.hidden = atoi(v);
    else if (!strcmp(argv[i - 1], "--ffn")) config.ffn = atoi(v);
    else if (!strcmp(argv[i - 1], "--heads")) config.heads = atoi(v);
    else return fprintf(stderr, "bench_step: unknown option %s\n", argv[i - 1]), 1;
  }
  if (moe_env_init(&env, moe_isa_from_name(isa)) != MOE_OK) return fprintf(stderr, "bench_step: no %s here\n", isa), 1;
  env.log = show;
  NEED(moe_pool_create(&pool, threads, &env));
  config.router = !strcmp(system, "dense") ? MOE_ROUTER_DENSE : !strcmp(system, "switch") ? MOE_ROUTER_SHARED : MOE_ROUTER_TASK;
  if (config.router == MOE_ROUTER_DENSE) config.experts = config.top_k = 1;
  tasks = (moe_task *)calloc((size_t)n_tasks, sizeof *tasks);
  for (i = 0; i < n_tasks; ++i) {
    snprintf(tasks[i].name, sizeof tasks[i].name, "task%d", i);
    tasks[i].kind = MOE_KIND_CLASSIFICATION;
    tasks[i].classes = 2;
    strcpy(tasks[i].metrics, "accuracy");
  }
  NEED(moe_model_create(&model, &config, tasks, n_tasks, 1, &env));
  ids = (int32_t *)calloc((size_t)batch * (size_t)length, sizeof *ids);
  start = (int32_t *)calloc((size_t)batch + 1, sizeof *start);
  task = (int32_t *)calloc((size_t)batch, sizeof *task);
  label = (float *)calloc((size_t)batch, sizeof *label);
  for (i = 0; i < batch; ++i) {
    uint64_t key = moe_key(9, 0, (uint64_t)i, 0, 0);
    int n = real ? 8 + (int)((double)(length - 8) * pow((double)(key % 1000) / 1000, 2)) : length;
    for (j = 0; j < n; ++j) ids[tokens + j] = (int32_t)(moe_key(5, (uint64_t)i, (uint64_t)j, 0, 0) % (uint64_t)config.vocab);
    tokens += n;
    start[i + 1] = tokens;
    task[i] = i % n_tasks;
    label[i] = (float)(i & 1);
  }
  memset(&b, 0, sizeof b);
  b.S = batch;
  b.seq_start = start;
  b.ids = ids;
  b.task = task;
  b.label = label;
  limits.tokens = tokens;
  limits.sequences = batch;
  limits.training = training;
  scores = (float *)calloc((size_t)batch * 2, sizeof *scores);
  if (training) {
    moe_train_config_init(&tc);
    tc.steps = 1000000;
    NEED(moe_trainer_create(&trainer, model, &limits, &tc, &env));
  } else {
    NEED(moe_model_pack(model, NULL, &env));
    NEED(moe_context_create(&context, model, &limits, &env));
  }
  setup = now() - setup;
  if (repeat > 1000) repeat = 1000;
  for (i = -1; i < repeat; ++i) { /* the first run warms up */
    double t = now();
    int inner = training || tokens > 2000 ? 1 : 4000 / (tokens + 1) + 1;
    for (j = 0; j < inner; ++j) {
      if (training) {
        NEED(moe_accumulate(trainer, &b, 0, NULL, NULL, &env));
        NEED(moe_update(trainer, NULL, &env));
      } else NEED(moe_forward(context, scores, &b, &env));
    }
    if (i >= 0) times[i] = (now() - t) / inner;
  }
  qsort(times, (size_t)repeat, sizeof *times, by_value);
  getrusage(RUSAGE_SELF, &usage);
  printf("{\"program\": \"moe.h\", \"mode\": \"%s\", \"system\": \"%s\", \"batch\": %d, \"length\": %d, \"real\": %d, \"tokens\": %d, \"threads\": %d, \"isa\": \"%s\", "
         "\"experts\": %d, \"tasks\": %d, \"seconds_median\": %.6f, \"seconds_min\": %.6f, \"seconds_max\": %.6f, \"tokens_per_second\": %.1f, "
         "\"setup_seconds\": %.3f, \"peak_mb\": %.1f}\n",
         training ? "train" : "infer", system, batch, length, real, (int)tokens, threads, moe_isa_name(env.isa), (int)config.experts, n_tasks, times[repeat / 2],
         times[0], times[repeat - 1], tokens / times[repeat / 2], setup, (double)usage.ru_maxrss / 1024);
  moe_trainer_free(trainer);
  moe_context_free(context);
  moe_model_free(model);
  moe_pool_free(pool);
  return 0;
}
