/* bench_cuda.c - moe.h on an NVIDIA GPU: expert FFNs, training steps, inference, as JSON lines.
     cc -O2 -o bench_cuda bench/bench_cuda.c -ldl -lm -pthread && ./bench_cuda [--tiny] [CACHE]
   --tiny: sizes that show only that everything works. CACHE: a file for the compiled kernels. */
#include "bench.h"
#define MOE_CUDA_IMPLEMENTATION
#include "../moe_cuda.h"

#define NEED(call)                                                                                 \
  do {                                                                                             \
    if (call) return 1;                                                                            \
  } while (0)

enum { EXPERTS = 4 };
static int tiny;
static moe_env env;
static moe_backend gpu;
static const char *mode; /* fp32, tf32, bf16 */

/* ---- expert FFNs: M tokens, one expert each ---- */

typedef struct ffn {
  int32_t M, H, F;
  void *memory; /* x, dx, y, dy (M H), e (M H), pre (M F), scratch; weights, then their gradients */
  void *lists;  /* expert, order (M), start */
  moe_routes routes;
  moe_mat in[EXPERTS], out[EXPERTS];
  const float *b_in[EXPERTS], *b_out[EXPERTS];
  float *d_in[EXPERTS], *d_out[EXPERTS], *d_b_in[EXPERTS], *d_b_out[EXPERTS];
  moe_experts_op op;
} ffn;

static float *cut(float **at, size_t n) {
  float *p = *at;
  *at += (n + 63) / 64 * 64;
  return p;
}

/* Places everything from `at` on; returns the floats. */
static size_t place(ffn *f, float *at) {
  size_t MH = (size_t)f->M * (size_t)f->H, MF = (size_t)f->M * (size_t)f->F;
  size_t HF = (size_t)f->H * (size_t)f->F;
  float *base = at;
  moe_experts_op *op = &f->op;
  int i;
  op->x = cut(&at, MH), op->dx = cut(&at, MH), op->y = cut(&at, MH), op->dy = cut(&at, MH);
  op->e = cut(&at, MH), op->pre = cut(&at, MF);
  op->dweight = cut(&at, (size_t)f->M), f->routes.weight = cut(&at, (size_t)f->M);
  f->routes.prob = cut(&at, (size_t)f->M * EXPERTS);
  op->scratch = cut(&at, moe_experts_scratch(f->M, 1, f->H, f->F, 1));
  for (i = 0; i < EXPERTS; ++i) {
    f->in[i] = moe_mat_rows(cut(&at, HF), f->F, f->H);
    f->out[i] = moe_mat_rows(cut(&at, HF), f->H, f->F);
    f->b_in[i] = cut(&at, (size_t)f->F), f->b_out[i] = cut(&at, (size_t)f->H);
    f->d_in[i] = cut(&at, HF), f->d_out[i] = cut(&at, HF);
    f->d_b_in[i] = cut(&at, (size_t)f->F), f->d_b_out[i] = cut(&at, (size_t)f->H);
  }
  return (size_t)(at - base);
}

/* Routes: token i to expert i mod 4, all in one block of ids. */
static int make_routes(ffn *f) {
  size_t M = (size_t)f->M;
  int32_t *list = (int32_t *)calloc(2 * M + EXPERTS + 1, sizeof *list), i, e, at = 0;
  int32_t *order = list + M, *start = list + 2 * M;
  if (!list) return 1;
  for (i = 0; i < f->M; ++i) list[i] = i % EXPERTS;
  for (e = 0; e < EXPERTS; ++e) {
    start[e] = at;
    for (i = e; i < f->M; i += EXPERTS) order[at++] = i;
  }
  start[EXPERTS] = at;
  NEED(gpu.alloc(&gpu, &env, &f->lists, (2 * M + EXPERTS + 1) * sizeof *list));
  NEED(gpu.upload(&gpu, &env, f->lists, list, (2 * M + EXPERTS + 1) * sizeof *list));
  free(list);
  f->routes.expert = (int32_t *)f->lists;
  f->routes.order = f->routes.expert + M, f->routes.start = f->routes.order + M;
  return 0;
}

static int make_ffn(ffn *f, int32_t M, int32_t H, int32_t F) {
  uint64_t state = 7;
  float *host;
  size_t n, i;
  memset(f, 0, sizeof *f);
  f->M = M, f->H = H, f->F = F;
  f->routes.M = M, f->routes.N = EXPERTS, f->routes.k = 1;
  n = place(f, NULL);
  host = (float *)malloc(n * sizeof *host);
  if (!host) return 1;
  for (i = 0; i < n; ++i) { /* random: zeros would be faster */
    state = state * 6364136223846793005u + 1442695040888963407u;
    host[i] = ((float)(state >> 40) / 8388608.0f - 1) / 16;
  }
  NEED(gpu.alloc(&gpu, &env, &f->memory, n * sizeof *host));
  NEED(gpu.upload(&gpu, &env, f->memory, host, n * sizeof *host));
  free(host);
  NEED(make_routes(f));
  place(f, (float *)f->memory);
  f->op.routes = &f->routes, f->op.N = EXPERTS, f->op.H = H, f->op.F = F;
  f->op.in = f->in, f->op.out = f->out, f->op.b_in = f->b_in, f->op.b_out = f->b_out;
  f->op.d_in = f->d_in, f->op.d_out = f->d_out;
  f->op.d_b_in = f->d_b_in, f->op.d_b_out = f->d_b_out;
  return 0;
}

/* Seconds of a call: the best of five rounds, each of as many calls as take about 50 ms. */
static int time_ffn(ffn *f, int back, double *best) {
  int calls = 1, round, i;
  *best = 1e9;
  for (round = -2; round < (tiny ? 1 : 5); ++round) {
    double t;
    NEED(gpu.sync(&gpu, &env));
    t = bench_now();
    for (i = 0; i < calls; ++i) {
      NEED(gpu.experts(&gpu, &env, &f->op, 0));
      if (back) NEED(gpu.experts(&gpu, &env, &f->op, 1));
    }
    NEED(gpu.sync(&gpu, &env));
    t = (bench_now() - t) / calls;
    if (round < 0) calls = tiny ? 1 : 1 + (int)(0.05 / (t > 1e-6 ? t : 1e-6));
    if (round >= 0 && t < *best) *best = t;
  }
  return 0;
}

static int bench_ffn(int32_t M, int32_t H, int32_t F) {
  ffn f;
  int back;
  NEED(make_ffn(&f, M, H, F));
  for (back = 0; back < 2; ++back) {
    double seconds, flop = (back ? 3 : 1) * 4.0 * M * H * F;
    NEED(time_ffn(&f, back, &seconds));
    printf("{\"what\": \"experts\", \"precision\": \"%s\", \"M\": %d, \"H\": %d, \"F\": %d, "
           "\"backward\": %d, \"seconds\": %.3e, \"tflops\": %.3f}\n",
           mode, (int)M, (int)H, (int)F, back, seconds, flop / seconds * 1e-12);
    fflush(stdout);
  }
  gpu.release(&gpu, f.memory), gpu.release(&gpu, f.lists);
  return 0;
}

/* ---- whole models: MT-TaG, four experts, eight tasks ---- */

typedef struct batch_of {
  moe_batch b;
  int32_t *ids, *start, *task;
  float *label;
} batch_of;

static int make_batch(batch_of *b, int32_t S, int32_t length, int32_t vocab) {
  int32_t i;
  memset(b, 0, sizeof *b);
  b->ids = (int32_t *)calloc((size_t)S * (size_t)length, sizeof *b->ids);
  b->start = (int32_t *)calloc((size_t)S + 1, sizeof *b->start);
  b->task = (int32_t *)calloc((size_t)S, sizeof *b->task);
  b->label = (float *)calloc((size_t)S, sizeof *b->label);
  if (!b->ids || !b->start || !b->task || !b->label) return 1;
  for (i = 0; i < S * length; ++i) b->ids[i] = (int32_t)((int64_t)i * 7919 % vocab);
  for (i = 0; i < S; ++i)
    b->start[i + 1] = (i + 1) * length, b->task[i] = i % 8, b->label[i] = (float)(i & 1);
  b->b.S = S, b->b.seq_start = b->start, b->b.ids = b->ids, b->b.task = b->task;
  b->b.label = b->label;
  return 0;
}

static int call(moe_trainer *t, batch_of *b, int training, float *scores) {
  if (!training) return moe_forward(moe_trainer_context(t), scores, &b->b, &env) != MOE_OK;
  NEED(moe_trainer_accumulate(t, &b->b, 0, NULL, NULL, &env));
  return moe_trainer_step(t, NULL, &env) != MOE_OK;
}

static int bench_model(const char *name, int32_t layers, int32_t hidden, int32_t heads) {
  int32_t S = tiny ? 4 : 32, length = tiny ? 8 : 128;
  moe_limits limits = {S * length, S, 1, 0};
  moe_task tasks[8];
  moe_config config;
  moe_train_config how;
  moe_model *model;
  moe_trainer *trainer;
  batch_of b;
  float *scores = (float *)calloc((size_t)S * MOE_MAX_CLASSES, sizeof *scores);
  int i, training;
  memset(tasks, 0, sizeof tasks);
  for (i = 0; i < 8; ++i) snprintf(tasks[i].name, 20, "task%d", i), tasks[i].classes = 2;
  moe_config_init(&config);
  config.layers = layers, config.hidden = hidden, config.ffn = 4 * hidden, config.heads = heads;
  if (tiny) config.vocab = 100;
  moe_train_config_init(&how);
  how.lr = 1e-5f, how.steps = 1000000, how.clip_norm = 1;
  NEED(moe_model_create(&model, &config, tasks, 8, 1, &env));
  NEED(moe_trainer_create(&trainer, model, &limits, &how, &env));
  NEED(!scores || make_batch(&b, S, length, config.vocab));
  for (training = 0; training < 2; ++training) {
    double best = 1e9, all = 0;
    for (i = -2; i < (tiny ? 1 : 60) && all < 4; ++i) {
      double t = bench_now();
      NEED(call(trainer, &b, training, scores));
      NEED(gpu.sync(&gpu, &env));
      t = bench_now() - t;
      if (i >= 0) all += t;
      if (i >= 0 && t < best) best = t;
    }
    printf("{\"what\": \"%s\", \"model\": \"%s\", \"precision\": \"%s\", \"tokens\": %d, "
           "\"seconds\": %.3e, \"tokens_per_second\": %.0f}\n",
           training ? "training step" : "inference", name, mode, (int)(S * length), best,
           S * length / best);
    fflush(stdout);
  }
  free(b.ids), free(b.start), free(b.task), free(b.label), free(scores);
  moe_trainer_free(trainer);
  moe_model_free(model);
  return 0;
}

static int bench_all(void) {
  moe_cuda_counts counts;
  void *stream;
  NEED(gpu.open(&gpu, &env, &stream));
  env.stream = stream;
  if (tiny)
    NEED(bench_ffn(64, 32, 64));
  else
    NEED(bench_ffn(4096, 384, 1536) || bench_ffn(4096, 768, 3072) || bench_ffn(4096, 1024, 4096));
  env.stream = NULL;
  gpu.close(&gpu, stream);
  if (tiny)
    NEED(bench_model("tiny", 1, 32, 2));
  else
    NEED(bench_model("MiniLM", 6, 384, 12) || bench_model("BERT base", 12, 768, 12));
  moe_cuda_count(&gpu, &counts);
  printf("{\"what\": \"makers\", \"precision\": \"%s\", \"own\": %lld, \"cublas\": %lld}\n", mode,
         (long long)counts.own, (long long)counts.cublas);
  return 0;
}

int main(int argc, char **argv) {
  static const char *const modes[] = {"fp32", "tf32", "bf16"};
  moe_cuda_options options;
  int i;
  moe_cuda_options_init(&options);
  for (i = 1; i < argc; ++i)
    if (!strcmp(argv[i], "--tiny"))
      tiny = 1;
    else
      options.cache = argv[i];
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = bench_log;
  env.log_user = (void *)(uintptr_t) "bench_cuda";
  for (i = 0; i < 3; ++i) {
    moe_cuda_counts counts;
    int failed;
    mode = modes[i];
    options.tf32 = i == 1;
    env.backend = NULL;
    env.precision = MOE_TYPE_F32;
    if (moe_cuda_open(&gpu, &options, &env)) return 1;
    env.backend = &gpu;
    if (i == 2) env.precision = MOE_TYPE_BF16;
    moe_cuda_count(&gpu, &counts);
    printf("{\"what\": \"device\", \"precision\": \"%s\", \"name\": \"%s\", \"arch\": %d}\n", mode,
           gpu.name, (int)counts.arch);
    failed = counts.arch >= 80 || i == 0 ? bench_all() : 0;
    if (moe_cuda_close(&gpu) || failed) return 1;
  }
  return 0;
}
