/* bench_start.c - a cold process: maps a model file, answers for one sequence of 16 tokens, and
   ends.
     cc -O2 -o bench_start bench/bench_start.c -lm -pthread
     ./bench_start --write dense|tag FILE     a model of MiniLM's size with random weights
     ./bench_start FILE                       the answer; run.py times the process and reads its
   peak memory */
#include "bench.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TASKS = 8, TOKENS = 16 };
#define NEED(call)                                                                                 \
  do {                                                                                             \
    if ((call) != MOE_OK) return 1;                                                                \
  } while (0)

static int write_model(const char *system, const char *path, const moe_env *env) {
  moe_task tasks[TASKS];
  moe_config config;
  moe_model *model;
  int i;
  moe_config_init(&config);
  config.router = !strcmp(system, "dense") ? MOE_ROUTER_DENSE : MOE_ROUTER_TASK;
  if (config.router == MOE_ROUTER_DENSE) config.experts = config.top_k = 1;
  memset(tasks, 0, sizeof tasks);
  for (i = 0; i < TASKS; ++i) {
    snprintf(tasks[i].name, sizeof tasks[i].name, "task%d", i);
    tasks[i].kind = MOE_KIND_CLASSIFICATION;
    tasks[i].classes = 2;
    strcpy(tasks[i].metrics, "accuracy");
  }
  NEED(moe_model_create(&model, &config, tasks, TASKS, 1, env));
  NEED(moe_model_save(model, path, env));
  moe_model_free(model);
  return 0;
}

static int answer(const char *path, const moe_env *env) {
  int32_t ids[TOKENS], start[2] = {0, TOKENS}, task = 0, i;
  float scores[2];
  struct stat size;
  size_t bytes;
  void *file, *block;
  moe_model *model;
  moe_context *context;
  moe_limits limits;
  moe_batch b;
  int fd = open(path, O_RDONLY);
  if (fd < 0 || fstat(fd, &size) != 0)
    return fprintf(stderr, "bench_start: cannot open %s\n", path), 1;
  file = mmap(NULL, (size_t)size.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (file == MAP_FAILED) return fprintf(stderr, "bench_start: cannot map %s\n", path), 1;
  NEED(moe_model_open_size(file, (size_t)size.st_size, &bytes, env));
  block = aligned_alloc(64, (bytes + 63) / 64 * 64);
  NEED(moe_model_open(&model, file, (size_t)size.st_size, block, bytes, env));
  for (i = 0; i < TOKENS; ++i) ids[i] = 1000 + 7 * i;
  memset(&b, 0, sizeof b);
  b.S = 1;
  b.seq_start = start;
  b.ids = ids;
  b.task = &task;
  memset(&limits, 0, sizeof limits);
  limits.tokens = TOKENS;
  limits.sequences = 1;
  limits.training = 0;
  NEED(moe_context_create(&context, model, &limits, env));
  NEED(moe_forward(context, scores, &b, env));
  printf("%.6f\n", (double)scores[0]);
  moe_context_free(context);
  moe_model_free(model);
  free(block);
  return 0;
}

int main(int argc, char **argv) {
  moe_env env;
  if (moe_env_init(&env, MOE_ISA_AUTO) != MOE_OK) return 1;
  env.log = bench_log;
  env.log_user = argv[0];
  if (argc == 4 && !strcmp(argv[1], "--write")) return write_model(argv[2], argv[3], &env);
  if (argc != 2)
    return fprintf(stderr, "usage: %s FILE, or %s --write dense|tag FILE\n", argv[0], argv[0]), 1;
  return answer(argv[1], &env);
}
