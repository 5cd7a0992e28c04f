/* bench_ops.c - single ops of moe.h, and the limits of the machine that they are held against.
     cc -O2 -o bench_ops bench/bench_ops.c -lm -pthread
     ./bench_ops                     serves (bench.h): the word is NAME or NAME:n:k:m
     ./bench_ops --probe 1,2         one JSON line: peak GFLOP/s of fused multiply-adds, and GB/s of
   reading an array of the size of MiniLM's weights and of copying one of the size of a hidden
   layer, with so many threads at once
     ./bench_ops --now               answers each line, a number of threads, with the peak in
   GFLOP/s of this moment, and the GB/s at which the slowest thread reads its first-level cache, in
   about a millisecond
     ./bench_ops --units             one JSON line: which instruction sets and units this processor
   has, 1 or 0 Names with sizes: packed (weights packed), plain, dx, dw, each y (m,n) = x (m,k) W^T
   and its gradients. Names without: the layers of MiniLM for 32 sequences of 128 tokens. */
#include "bench.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

enum { S = 32, LENGTH = 128, M = S * LENGTH, H = 384, F = 1536, A = 12, N = 4, V = 30522 };

typedef enum op {
  OP_PACKED,
  OP_PLAIN,
  OP_DX,
  OP_DW,
  OP_GELU,
  OP_GELU_BACK,
  OP_NORM,
  OP_NORM_BACK,
  OP_DROPOUT,
  OP_EMBED,
  OP_EMBED_BACK,
  OP_ATTENTION,
  OP_ATTENTION_BACK,
  OP_ROUTE,
  OP_ROUTE_BACK,
  OP_EXPERTS,
  OP_EXPERTS_BACK,
  OP_ADAM,
  OP_PACK,
  OPS
} op;
static const char *const op_name[OPS] = {
    "packed",     "plain",   "dx",           "dw",         "gelu",      "gelu_back",      "norm",
    "norm_back",  "dropout", "embed",        "embed_back", "attention", "attention_back", "route",
    "route_back", "experts", "experts_back", "adam",       "pack"};

typedef struct work {
  moe_env env;
  moe_pool *pool;
  op what;
  int n, k, m;
  int64_t step;
  float *a, *b, *c, *d, *e, *f, *scratch; /* arrays of `most` floats with random numbers */
  int32_t start[S + 1], gate_of[S], ids[M], expert[M], order[M], first[N + 1];
  moe_mat w[2 * N];
  float *panels[2 * N], *rows[2 * N], *grads[2 * N], *bias[2 * N], *dbias[2 * N];
  moe_routes routes;
} work;

static float *floats(size_t n, float scale) {
  static uint64_t seed = 1;
  float *x = (float *)aligned_alloc(64, (n * sizeof *x + 127) / 64 * 64);
  size_t i;
  if (!x) exit(1);
  for (i = 0; i < n; ++i) { /* random: products of zeros run faster */
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    x[i] = ((float)(seed >> 40) / 8388608.0f - 1.0f) * scale;
  }
  return x;
}

/* ---- limits ---- */

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f"))) static float probe_avx512(int64_t rounds, const float *x) {
  __m512 c[12], a = _mm512_set1_ps(0.5f), b = _mm512_loadu_ps(x);
  int i;
  for (i = 0; i < 12; ++i) c[i] = _mm512_set1_ps(x[i]);
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (i = 0; i < 12; ++i) c[i] = _mm512_fmadd_ps(a, c[i], b);
  }
  for (i = 1; i < 12; ++i) c[0] = _mm512_add_ps(c[0], c[i]);
  return _mm512_reduce_add_ps(c[0]);
}
__attribute__((target("avx2,fma"))) static float probe_avx2(int64_t rounds, const float *x) {
  __m256 c[12], a = _mm256_set1_ps(0.5f), b = _mm256_loadu_ps(x);
  float out[8];
  int i;
  for (i = 0; i < 12; ++i) c[i] = _mm256_set1_ps(x[i]);
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (i = 0; i < 12; ++i) c[i] = _mm256_fmadd_ps(a, c[i], b);
  }
  for (i = 1; i < 12; ++i) c[0] = _mm256_add_ps(c[0], c[i]);
  _mm256_storeu_ps(out, c[0]);
  return out[0];
}
__attribute__((target("avx512f"))) static float probe_read_avx512(const float *x, size_t n) {
  __m512 sum[8];
  size_t i;
  int j;
  for (j = 0; j < 8; ++j) sum[j] = _mm512_setzero_ps();
  for (i = 0; i + 128 <= n; i += 128) {
#pragma GCC unroll 8
    for (j = 0; j < 8; ++j) sum[j] = _mm512_add_ps(sum[j], _mm512_loadu_ps(x + i + 16 * (size_t)j));
  }
  for (j = 1; j < 8; ++j) sum[0] = _mm512_add_ps(sum[0], sum[j]);
  return _mm512_reduce_add_ps(sum[0]);
}
__attribute__((target("avx2,fma"))) static float probe_read_avx2(const float *x, size_t n) {
  __m256 sum[8];
  float out[8];
  size_t i;
  int j;
  for (j = 0; j < 8; ++j) sum[j] = _mm256_setzero_ps();
  for (i = 0; i + 64 <= n; i += 64) {
#pragma GCC unroll 8
    for (j = 0; j < 8; ++j) sum[j] = _mm256_add_ps(sum[j], _mm256_loadu_ps(x + i + 8 * (size_t)j));
  }
  for (j = 1; j < 8; ++j) sum[0] = _mm256_add_ps(sum[0], sum[j]);
  _mm256_storeu_ps(out, sum[0]);
  return out[0];
}
#endif
static float probe_plain(int64_t rounds, const float *x) {
  float c[12];
  int i;
  for (i = 0; i < 12; ++i) c[i] = x[i];
  for (; rounds > 0; --rounds)
    for (i = 0; i < 12; ++i) c[i] = 0.5f * c[i] + x[0];
  for (i = 1; i < 12; ++i) c[0] += c[i];
  return c[0];
}

static float probe_read_plain(const float *x, size_t n) {
  float sum[16] = {0};
  size_t i;
  int j;
  for (i = 0; i + 16 <= n; i += 16)
    for (j = 0; j < 16; ++j) sum[j] += x[i + (size_t)j];
  for (j = 1; j < 16; ++j) sum[0] += sum[j];
  return sum[0];
}

/* What each thread of a probe does, and how long it took. */
typedef enum probe_kind { PROBE_PEAK, PROBE_READ, PROBE_COPY, PROBE_CACHE } probe_kind;
typedef struct probe {
  probe_kind kind;
  int threads, arrived; /* all begin together: a thread that has to be woken first would leave its
                           part to the others */
  float (*run)(int64_t rounds, const float *x);
  float (*read)(const float *x, size_t n);
  float *x, *y;
} probe;
typedef struct probe_thread {
  probe *p;
  int index;
  double seconds;
  float sink;
} probe_thread;
enum { PROBE_ROUNDS = 100000, PROBE_CACHED = 4096, PROBE_CACHE_ROUNDS = 2000, PROBE_THREADS = 64 };
static const size_t probe_floats[] = {0, (size_t)6 * (4 * H * H + 2 * H * F), (size_t)M *F, 0};

static void *probe_thread_main(void *arg) {
  probe_thread *t = (probe_thread *)arg;
  probe *p = t->p;
  size_t n = probe_floats[p->kind] / (size_t)p->threads, at = (size_t)t->index * n;
  double begin;
  int i;
  bench_pin_self(t->index);
  __atomic_add_fetch(&p->arrived, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&p->arrived, __ATOMIC_SEQ_CST) < p->threads) {
  }
  begin = bench_now();
  if (p->kind == PROBE_PEAK)
    t->sink = p->run(PROBE_ROUNDS, p->x);
  else if (p->kind == PROBE_READ)
    t->sink = p->read(p->x + at, n);
  else if (p->kind == PROBE_CACHE)
    for (i = 0; i < PROBE_CACHE_ROUNDS; ++i) t->sink += p->read(p->x, PROBE_CACHED);
  else
    memcpy(p->y + at, p->x + at, n * sizeof *p->x);
  t->seconds = bench_now() - begin;
  return NULL;
}

/* Seconds of the slowest thread, the best of several short runs. */
static double probe_seconds(probe *p, int runs) {
  probe_thread thread[PROBE_THREADS];
  pthread_t id[PROBE_THREADS];
  double best = 0;
  int i, run;
  for (run = 0; run < runs; ++run) {
    double slowest = 0;
    p->arrived = 0;
    for (i = 0; i < p->threads; ++i) {
      thread[i].p = p;
      thread[i].index = i;
      if (pthread_create(&id[i], NULL, probe_thread_main, &thread[i]) != 0) exit(1);
    }
    for (i = 0; i < p->threads; ++i) {
      pthread_join(id[i], NULL);
      if (thread[i].seconds > slowest) slowest = thread[i].seconds;
    }
    if (run == 0 || slowest < best) best = slowest;
  }
  return best;
}

/* Makes a probe ready. Returns how many floats are in a vector. */
static int probe_init(probe *p, const moe_env *env) {
  int lanes = 1;
  bench_unpin();
  p->run = probe_plain;
  p->read = probe_read_plain;
#if defined(__x86_64__) && defined(__GNUC__)
  if (env->isa == MOE_ISA_AVX512) p->run = probe_avx512, p->read = probe_read_avx512, lanes = 16;
  if (env->isa == MOE_ISA_AVX2) p->run = probe_avx2, p->read = probe_read_avx2, lanes = 8;
#else
  (void)env;
#endif
  p->x = floats(probe_floats[PROBE_READ], 0.01f);
  return lanes;
}

static double probe_peak(probe *p, int lanes, int runs) {
  p->kind = PROBE_PEAK;
  return 24e-9 * lanes * PROBE_ROUNDS * p->threads / probe_seconds(p, runs);
}

/* One JSON line: {"isa": ..., "1": {"peak_gflops": ..., "read_gbytes": ..., "copy_gbytes": ...},
   "2": ...} */
static int limits(const char *counts, const moe_env *env) {
  enum { RUNS = 60 };
  probe p;
  int lanes = probe_init(&p, env), used;
  p.y = floats(probe_floats[PROBE_COPY], 0.01f);
  printf("{\"isa\": \"%s\"", moe_isa_name(env->isa));
  for (; sscanf(counts, "%d%n", &p.threads, &used) == 1 && p.threads >= 1 &&
         p.threads <= PROBE_THREADS;
       counts += used + (counts[used] == ',')) {
    printf(", \"%d\": {\"peak_gflops\": %.2f", p.threads, probe_peak(&p, lanes, RUNS));
    p.kind = PROBE_READ;
    printf(", \"read_gbytes\": %.2f",
           4e-9 * (double)probe_floats[PROBE_READ] / probe_seconds(&p, RUNS));
    p.kind = PROBE_COPY;
    printf(", \"copy_gbytes\": %.2f}",
           8e-9 * (double)probe_floats[PROBE_COPY] / probe_seconds(&p, RUNS));
  }
  return printf("}\n") < 0;
}

static int peaks_of_now(const moe_env *env) {
  char line[32];
  probe p;
  int lanes = probe_init(&p, env);
  while (fgets(line, sizeof line, stdin)) {
    p.threads = atoi(line);
    if (p.threads < 1 || p.threads > PROBE_THREADS) return 1;
    printf("%.2f", probe_peak(&p, lanes, 2));
    p.kind = PROBE_CACHE;
    printf(" %.2f\n", 4e-9 * PROBE_CACHED * PROBE_CACHE_ROUNDS / probe_seconds(&p, 2));
    fflush(stdout);
  }
  return 0;
}

/* ---- ops ---- */

static void prepare(work *w) {
  size_t most = (size_t)M * 3072; /* 4096 x 3072: the largest product */
  int i;
  w->a = floats(most, 1.0f), w->b = floats(most, 1.0f), w->c = floats(most, 1.0f);
  w->d = floats(most, 0.02f), w->e = floats(most, 1.0f), w->f = floats(most, 1.0f);
  w->scratch = floats(
      moe_experts_scratch(M, 1, H, F, 1) + moe_attention_scratch(LENGTH, H, A, 1, &w->env), 1.0f);
  for (i = 0; i <= S; ++i) w->start[i] = i * LENGTH;
  for (i = 0; i < S; ++i) w->gate_of[i] = i % 8;
  for (i = 0; i < M; ++i) w->ids[i] = (int32_t)(moe_key(5, (uint64_t)i, 0, 0, 0) % V);
  for (i = 0; i < 2 * N; ++i) {
    int rows = i < N ? F : H, cols = i < N ? H : F;
    w->rows[i] = floats((size_t)F * H, 0.02f);
    w->grads[i] = floats((size_t)F * H, 0.02f);
    w->panels[i] = floats(moe_pack_floats(rows, cols), 1.0f);
    w->bias[i] = floats(F, 0.02f);
    w->dbias[i] = floats(F, 0.02f);
    moe_pack(w->panels[i], w->rows[i], rows, cols, &w->env);
    w->w[i] = moe_mat_panels(w->panels[i], rows, cols);
  }
  w->routes.M = M;
  w->routes.N = N;
  w->routes.k = 1;
  w->routes.expert = w->expert;
  w->routes.weight = floats(M, 1.0f);
  w->routes.prob = floats((size_t)M * N, 1.0f);
  w->routes.order = w->order;
  w->routes.start = w->first;
}

static void product(work *w) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.y = w->b, op.x = w->a, op.b = w->bias[0], op.M = w->m, op.dy = w->c;
  op.w = w->what == OP_PACKED ? moe_mat_panels(w->f, w->n, w->k) : moe_mat_rows(w->d, w->n, w->k);
  if (w->what == OP_DX) op.dx = w->b;
  if (w->what == OP_DW) op.dw = w->e;
  if (w->what == OP_DX || w->what == OP_DW)
    moe_linear_backward(&op, &w->env);
  else
    moe_linear_forward(&op, &w->env);
}

static void expert_layer(work *w) {
  moe_route_op gate;
  moe_experts_op op;
  moe_route_op_init(&gate);
  gate.routes = &w->routes, gate.logits = w->e, gate.x = w->a, gate.gates = w->d;
  gate.gate_of = w->gate_of, gate.seq_start = w->start, gate.S = S, gate.H = H, gate.G = 8;
  gate.dx = w->b, gate.dgates = w->c, gate.dlogits = w->e + (size_t)M * N, gate.dweight = w->f;
  moe_experts_op_init(&op);
  op.y = w->b, op.pre = w->c, op.e = w->e, op.x = w->a, op.routes = &w->routes;
  op.in = w->w, op.out = w->w + N, op.N = N, op.H = H, op.F = F, op.scratch = w->scratch;
  op.b_in = (const float *const *)w->bias, op.b_out = (const float *const *)(w->bias + N);
  op.dx = w->b, op.dweight = w->routes.prob, op.dy = w->f;
  op.d_in = w->grads, op.d_b_in = w->dbias, op.d_out = w->grads + N, op.d_b_out = w->dbias + N;
  op.w_in = (const float *const *)w->rows, op.w_out = (const float *const *)(w->rows + N);
  switch (w->what) {
    case OP_ROUTE: moe_route_forward(&gate, &w->env); break;
    case OP_ROUTE_BACK: moe_route_backward(&gate, &w->env); break;
    case OP_EXPERTS: moe_experts_forward(&op, &w->env); break;
    default: moe_experts_backward(&op, &w->env); break;
  }
}

/* LayerNorm, embeddings, attention, Adam; 0 where it is none of them. */
static int other_op(work *w) {
  moe_layernorm_op norm;
  moe_embed_op embed;
  moe_attention_op attention;
  moe_adam_op adam;
  moe_layernorm_op_init(&norm);
  norm.y = w->b, norm.mean = w->e, norm.rstd = w->e + M, norm.x = w->a, norm.M = M, norm.H = H;
  norm.gamma = w->bias[0], norm.beta = w->bias[1], norm.dx = w->b, norm.dy = w->c;
  norm.dgamma = w->dbias[0], norm.dbeta = w->dbias[1];
  moe_embed_op_init(&embed);
  embed.x = w->b, embed.ids = w->ids, embed.word = w->f, embed.position = w->d;
  embed.seq_start = w->start, embed.S = S, embed.M = M, embed.H = H;
  embed.dword = w->f, embed.dposition = w->d, embed.dx = w->a;
  moe_attention_op_init(&attention);
  attention.y = w->b, attention.stats = w->e, attention.qkv = w->a, attention.scratch = w->scratch;
  attention.seq_start = w->start, attention.S = S, attention.M = M, attention.H = H;
  attention.A = A, attention.dqkv = w->f, attention.dy = w->c;
  moe_adam_op_init(&adam);
  adam.w = w->a, adam.g = w->b, adam.m = w->c, adam.v = w->d, adam.count = 10000000;
  adam.lr = 1e-5f;
  switch (w->what) {
    case OP_NORM: moe_layernorm_forward(&norm, &w->env); break;
    case OP_NORM_BACK: moe_layernorm_backward(&norm, &w->env); break;
    case OP_EMBED: moe_embed_forward(&embed, &w->env); break;
    case OP_EMBED_BACK: moe_embed_backward(&embed, &w->env); break;
    case OP_ATTENTION: moe_attention_forward(&attention, &w->env); break;
    case OP_ATTENTION_BACK: moe_attention_backward(&attention, &w->env); break;
    case OP_ADAM: adam.t = ++w->step, moe_adam_step(&adam, &w->env); break;
    default: return 0;
  }
  return 1;
}

static int once(void *arg) {
  work *w = (work *)arg;
  const size_t wide = (size_t)M * F, narrow = (size_t)M * H;
  switch (w->what) {
    case OP_PACKED:
    case OP_PLAIN:
    case OP_DX:
    case OP_DW: product(w); break;
    case OP_GELU: moe_gelu_forward(w->b, w->a, wide, &w->env); break;
    case OP_GELU_BACK: moe_gelu_backward(w->b, w->c, w->a, wide, &w->env); break;
    case OP_DROPOUT: moe_dropout(w->b, w->a, narrow, 0.1f, 7, &w->env); break;
    case OP_PACK: moe_pack(w->panels[0], w->rows[0], F, H, &w->env); break;
    default:
      if (!other_op(w)) expert_layer(w);
      break;
  }
  return 0;
}

/* What an op reads of another's results. */
static int choose(void *arg, const char *word, int threads) {
  work *w = (work *)arg;
  char name[32];
  size_t i, n = (size_t)M * 3072;
  int got = sscanf(word, "%31[a-z_]:%d:%d:%d", name, &w->n, &w->k, &w->m);
  op what = OP_PACKED;
  if (bench_threads(&w->pool, threads, &w->env)) return 1;
  while (what < OPS && strcmp(name, op_name[what]) != 0) what = (op)(what + 1);
  if (what == OPS || (what <= OP_DW && (got != 4 || w->n > 3072 || w->k > 3072 || w->m > M)))
    return 1;
  if (what <= OP_DW)
    n = (size_t)w->n * (size_t)(w->k > w->m ? w->k : w->m); /* no more than is read */
  for (i = 0; i < n; ++i) { /* gradients have grown, moments shall not be negative */
    w->c[i] = (float)(i % 17) * 0.06f - 0.5f;
    w->d[i] = what == OP_ADAM ? 1e-4f : (float)(i % 13) * 0.003f - 0.018f;
    w->f[i] = (float)(i % 19) * 0.05f - 0.45f;
  }
  w->what = what;
  if (what == OP_PACKED) moe_pack(w->f, w->d, w->n, w->k, &w->env);
  if (what == OP_NORM_BACK) w->what = OP_NORM, once(w);
  if (what == OP_ATTENTION_BACK) w->what = OP_ATTENTION, once(w);
  if (what >= OP_ROUTE && what <= OP_EXPERTS_BACK) w->what = OP_ROUTE, once(w);
  if (what == OP_EXPERTS_BACK) w->what = OP_EXPERTS, once(w);
  w->what = what;
  return once(w);
}

/* What moe.h has kernels for, as its own detection finds it on this machine. */
static int units(void) {
  static const struct {
    const char *name;
    uint32_t bit;
  } unit[] = {{"NEON dot product", MOE_CPU_NEON_DOT}, {"AVX-VNNI", MOE_CPU_AVX_VNNI},
              {"AVX512-VNNI", MOE_CPU_AVX512_VNNI},   {"AVX512-BF16", MOE_CPU_AVX512_BF16},
              {"AMX-BF16", MOE_CPU_AMX_BF16},         {"AMX-INT8", MOE_CPU_AMX_INT8}};
  moe_env env;
  size_t i;
  moe_env_init(&env, MOE_ISA_AUTO);
  (void)moe_env_use_amx(&env);
  printf("{\"scalar\": 1, \"AVX2 + FMA\": %d, \"AVX-512\": %d, \"NEON\": %d",
         moe_isa_available(MOE_ISA_AVX2), moe_isa_available(MOE_ISA_AVX512),
         moe_isa_available(MOE_ISA_NEON));
  for (i = 0; i < sizeof unit / sizeof unit[0]; ++i)
    printf(", \"%s\": %d", unit[i].name, (env.cpu_flags & unit[i].bit) != 0);
  return printf("}\n") < 0;
}

int main(int argc, char **argv) {
  static work w;
  bench_server server = {&w, once, choose, NULL};
  int status;
  if (argc == 2 && !strcmp(argv[1], "--units")) return units();
  if (moe_env_init(&w.env, MOE_ISA_AUTO) != MOE_OK) return 1;
  w.env.log = bench_log;
  w.env.log_user = argv[0];
  if (argc == 3 && !strcmp(argv[1], "--probe")) return limits(argv[2], &w.env);
  if (argc == 2 && !strcmp(argv[1], "--now")) return peaks_of_now(&w.env);
  if (bench_threads(&w.pool, 1, &w.env)) return 1;
  prepare(&w);
  printf("{\"program\": \"moe.h\", \"isa\": \"%s\"}\n", moe_isa_name(w.env.isa));
  status = bench_serve(&server);
  moe_pool_free(w.pool);
  return status;
}
