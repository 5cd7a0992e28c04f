/* bench_scale.c - a training step that several ranks share, and where its time goes: MiniLM's size
   (6 x 384, 12 heads, ffn 1536), MT-TaG with 4 experts and 8 tasks, 32 sequences of 128 tokens.
     mpicc -O2 -o bench_scale bench/bench_scale.c -lm -pthread
     mpirun -n 2 ./bench_scale [--threads 1] [--shard 1] [--overlap 1] [--seconds 10] [--layers 6]
                               [--hidden 384] [--ffn 1536] [--heads 12] [--experts 4] [--batch 32]
                               [--length 128]
   Rank 0 prints a JSON line: medians, over the steps, of the whole step, of forward and backward,
   of the exchange of gradients and of the update (with --shard that of the weights is part of it;
   with --overlap the exchange is what is left of it after backward).
 */
#include "bench.h"
#define TRAIN_MPI
#include "../examples/tools/ranks.h"

enum { TASKS = 8, WORDS = 30522, STEPS = 512 };

static moe_env env;
static moe_profile times_of_ops;
static moe_config config;
static int threads = 1, batch_size = 32, length = 128;
static double seconds = 10;

/* Of what MPI cannot do. */
static inline void say(const char *sentence) { fprintf(stderr, "bench_scale: %s\n", sentence); }

static void need(int failed) {
  if (failed) MPI_Abort(MPI_COMM_WORLD, 1); /* the log has said why */
}

static void parse(int argc, char **argv) {
  const struct {
    const char *name;
    int32_t *at;
  } whole[] = {{"--threads", &threads},       {"--shard", &sharding}, {"--batch", &batch_size},
               {"--overlap", &overlapping},   {"--length", &length},  {"--layers", &config.layers},
               {"--hidden", &config.hidden},  {"--ffn", &config.ffn}, {"--heads", &config.heads},
               {"--experts", &config.experts}};
  size_t k;
  int i;
  for (i = 1; i + 1 < argc; i += 2) {
    for (k = 0; k < sizeof whole / sizeof *whole && strcmp(argv[i], whole[k].name); ++k) continue;
    if (k < sizeof whole / sizeof *whole)
      *whole[k].at = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--seconds"))
      seconds = atof(argv[i + 1]);
    else
      break;
  }
  if (i == argc && batch_size > 0 && length > 0) return;
  if (!my_rank) fprintf(stderr, "bench_scale: what is \"%s\"? See its first lines.\n", argv[i]);
  need(1);
}

static moe_model *make_model(void) {
  static moe_task tasks[TASKS];
  moe_model *model;
  int t;
  for (t = 0; t < TASKS; ++t) {
    snprintf(tasks[t].name, sizeof tasks[t].name, "task%d", t);
    tasks[t].classes = 2;
  }
  config.positions = config.max_len = length;
  need(moe_model_create(&model, &config, tasks, TASKS, 1, &env));
  return model;
}

/* This rank's sequences of the batch. */
static moe_batch make_batch(void) {
  size_t all = (size_t)batch_size * (size_t)length;
  int32_t *ids = (int32_t *)calloc(all, sizeof *ids), s, i;
  int32_t *start = (int32_t *)calloc((size_t)batch_size + 1, sizeof *start);
  int32_t *task = (int32_t *)calloc((size_t)batch_size, sizeof *task);
  int64_t *place = (int64_t *)calloc((size_t)batch_size, sizeof *place);
  float *label = (float *)calloc((size_t)batch_size, sizeof *label);
  moe_batch b;
  need(!ids || !start || !task || !place || !label);
  memset(&b, 0, sizeof b);
  for (s = my_rank; s < batch_size; s += ranks, ++b.S) {
    start[b.S + 1] = start[b.S] + length;
    for (i = 0; i < length; ++i)
      ids[start[b.S] + i] = (int32_t)(moe_key(5, (uint64_t)s, (uint64_t)i, 0, 0) % WORDS);
    task[b.S] = s % TASKS;
    label[b.S] = (float)(s & 1);
    place[b.S] = s;
  }
  b.seq_start = start, b.ids = ids, b.task = task, b.label = label, b.index = place;
  return b;
}

enum { STEP, PASSES, EXCHANGE, UPDATE, TIMES };

static void step(moe_trainer *trainer, const moe_batch *b, size_t n, double t[TIMES]) {
  double at[4];
  float loss;
  at[0] = bench_now();
  if (overlapping) begin_overlap(moe_trainer_gradients(trainer));
  if (b->S || overlapping) need(moe_trainer_accumulate(trainer, b, batch_size, &loss, NULL, &env));
  at[1] = bench_now();
  if (ranks > 1) add_gradients(moe_trainer_gradients(trainer), n);
  at[2] = bench_now();
  need(moe_trainer_step(trainer, NULL, &env));
  at[3] = bench_now();
  t[STEP] = at[3] - at[0], t[PASSES] = at[1] - at[0];
  t[EXCHANGE] = at[2] - at[1], t[UPDATE] = at[3] - at[2];
}

static double median(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, bench_by_value);
  return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

int main(int argc, char **argv) {
  static double times[TIMES][STEPS];
  double t[TIMES], begin;
  moe_train_config train;
  moe_limits limits = {0, 0, 1, 0};
  moe_pool *pool = NULL;
  moe_model *model;
  moe_trainer *trainer;
  moe_batch b;
  size_t n;
  int i, steps = 0;
  begin_ranks(&argc, &argv);
  moe_config_init(&config);
  config.layers = 6, config.hidden = 384, config.ffn = 1536, config.heads = 12;
  parse(argc, argv);
  need(moe_env_init(&env, MOE_ISA_AUTO));
  env.log = bench_log, env.log_user = argv[0];
  overlap_ops(&env, &times_of_ops);
  if (threads > 1) need(moe_pool_create(&pool, threads, &env));
  model = make_model();
  n = moe_model_parameters(model);
  b = make_batch();
  limits.tokens = batch_size * length, limits.sequences = batch_size;
  moe_train_config_init(&train);
  train.steps = 1 << 20;
  divide_training(&train, n);
  need(moe_trainer_create(&trainer, model, &limits, &train, &env));
  step(trainer, &b, n, t); /* touches the memory */
  for (begin = bench_now(); steps < STEPS && !highest(bench_now() - begin > seconds); ++steps) {
    step(trainer, &b, n, t);
    for (i = 0; i < TIMES; ++i) times[i][steps] = t[i];
  }
  printf("{\"ranks\": %d, \"threads\": %d, \"shard\": %d, \"overlap\": %d, \"parameters\": %.0f, "
         "\"tokens\": %d, "
         "\"steps\": %d, \"step\": %.6f, \"passes\": %.6f, \"exchange\": %.6f, \"update\": %.6f, "
         "\"peak_mb\": %.1f}\n",
         ranks, threads, sharding, overlapping, (double)n, batch_size * length, steps,
         median(times[STEP], steps), median(times[PASSES], steps), median(times[EXCHANGE], steps),
         median(times[UPDATE], steps), bench_peak_mb());
  all_end = 1;
  return 0;
}
