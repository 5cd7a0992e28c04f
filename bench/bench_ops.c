/* bench_ops.c - single ops of moe.h, and the limits of the machine that they are held against.
     cc -O2 -o bench_ops bench/bench_ops.c -lm -pthread
     ./bench_ops [--threads N]       serves (bench.h): the word is NAME or NAME:n:k:m
     ./bench_ops --units             one JSON line: which instruction sets and units this processor has, 1 or 0
   First line: peak GFLOP/s of fused multiply-adds and GB/s of reading and writing large arrays, all threads together.
   Names with sizes: packed (weights packed), plain, dx, dw, each y (m,n) = x (m,k) W^T and its gradients. Names without: the layers of MiniLM
   for 32 sequences of 128 tokens. */
#include "bench.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

enum { S = 32, LENGTH = 128, M = S * LENGTH, H = 384, F = 1536, A = 12, N = 4, V = 30522 };

typedef enum op {
  OP_PACKED, OP_PLAIN, OP_DX, OP_DW, OP_GELU, OP_GELU_BACK, OP_NORM, OP_NORM_BACK, OP_DROPOUT, OP_EMBED, OP_EMBED_BACK, OP_ATTENTION,
  OP_ATTENTION_BACK, OP_ROUTE, OP_ROUTE_BACK, OP_EXPERTS, OP_EXPERTS_BACK, OP_ADAM, OP_PACK, OPS
} op;
static const char *const op_name[OPS] = {
  "packed", "plain", "dx", "dw", "gelu", "gelu_back", "norm", "norm_back", "dropout", "embed", "embed_back", "attention",
  "attention_back", "route", "route_back", "experts", "experts_back", "adam", "pack"};

typedef struct work {
  moe_env env;
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

typedef struct probe {
  float (*run)(int64_t rounds, const float *x);
  int64_t rounds;
  float *x, *y;
  size_t n; /* floats of a thread's part of x and y */
} probe;
static volatile float sink;

static void probe_flops(void *arg, int32_t i) {
  probe *p = (probe *)arg;
  (void)i;
  sink = p->run(p->rounds, p->x);
}
static void probe_copy(void *arg, int32_t i) {
  probe *p = (probe *)arg;
  memcpy(p->y + (size_t)i * p->n, p->x + (size_t)i * p->n, p->n * sizeof *p->x);
}

/* The best of several short runs. */
static double best_rate(const moe_env *env, void (*body)(void *, int32_t), probe *p, double amount) {
  double best = 0;
  int i, j;
  for (i = 0; i < 10; ++i) {
    double t = bench_now();
    if (env->parallel_for) env->parallel_for(env->parallel_user, env->threads, body, p);
    else for (j = 0; j < env->threads; ++j) body(p, j);
    t = amount * env->threads / (bench_now() - t) * 1e-9;
    if (t > best) best = t;
  }
  return best;
}

static void limits(double *gflops, double *gbytes, const moe_env *env) {
  probe p;
  int lanes = 1;
  size_t total = (size_t)1 << 26; /* 256 MB */
  p.run = probe_plain;
  p.rounds = 400000;
#if defined(__x86_64__) && defined(__GNUC__)
  if (env->isa == MOE_ISA_AVX512) p.run = probe_avx512, lanes = 16;
  if (env->isa == MOE_ISA_AVX2) p.run = probe_avx2, lanes = 8;
#endif
  p.x = floats(total, 0.01f);
  p.y = floats(total, 0.01f);
  p.n = total / (size_t)env->threads;
  *gflops = best_rate(env, probe_flops, &p, 24.0 * lanes * (double)p.rounds);
  *gbytes = best_rate(env, probe_copy, &p, 8.0 * (double)p.n);
  free(p.x);
  free(p.y);
}

/* ---- ops ---- */

static void prepare(work *w) {
  size_t most = (size_t)M * 3072; /* 4096 x 3072: the largest product */
  int i;
  w->a = floats(most, 1.0f), w->b = floats(most, 1.0f), w->c = floats(most, 1.0f);
  w->d = floats(most, 0.02f), w->e = floats(most, 1.0f), w->f = floats(most, 1.0f);
  w->scratch = floats(moe_experts_scratch(M, 1, H, F, 1) + moe_attention_scratch(LENGTH, H, A, 1, &w->env), 1.0f);
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
  moe_mat plain = moe_mat_rows(w->d, w->n, w->k), packed = moe_mat_panels(w->f, w->n, w->k);
  switch (w->what) {
    case OP_PACKED: moe_linear_forward(w->b, w->a, &packed, w->bias[0], w->m, &w->env); break;
    case OP_PLAIN: moe_linear_forward(w->b, w->a, &plain, w->bias[0], w->m, &w->env); break;
    case OP_DX: moe_linear_backward(w->b, NULL, NULL, w->c, NULL, &plain, w->m, &w->env); break;
    default: moe_linear_backward(NULL, w->e, NULL, w->c, w->a, &plain, w->m, &w->env); break;
  }
}

static void expert_layer(work *w) {
  moe_experts ex;
  moe_route_options ro;
  memset(&ex, 0, sizeof ex);
  memset(&ro, 0, sizeof ro);
  ro.scale = 1.0f;
  ex.N = N, ex.H = H, ex.F = F;
  ex.in = w->w, ex.out = w->w + N;
  ex.b_in = (const float *const *)w->bias;
  ex.b_out = (const float *const *)(w->bias + N);
  switch (w->what) {
    case OP_ROUTE: moe_route_forward(&w->routes, w->e, NULL, w->a, w->d, w->gate_of, w->start, S, H, &ro, &w->env); break;
    case OP_ROUTE_BACK:
      moe_route_backward(w->b, w->c, w->e + (size_t)M * N, w->f, 0.0f, &w->routes, w->e, w->a, w->d, w->gate_of, w->start, S, H, &ro, &w->env);
      break;
    case OP_EXPERTS: moe_experts_forward(w->b, w->c, w->e, w->a, &w->routes, &ex, w->scratch, &w->env); break;
    default:
      moe_experts_backward(w->b, w->routes.prob, w->grads, w->dbias, w->grads + N, w->dbias + N, w->f, w->a, w->c, w->e, &w->routes,
                           (const float *const *)w->rows, (const float *const *)(w->rows + N), H, F, w->scratch, &w->env);
      break;
  }
}

static int once(void *arg) {
  work *w = (work *)arg;
  const size_t wide = (size_t)M * F, narrow = (size_t)M * H;
  switch (w->what) {
    case OP_PACKED: case OP_PLAIN: case OP_DX: case OP_DW: product(w); break;
    case OP_GELU: moe_gelu_forward(w->b, w->a, wide, &w->env); break;
    case OP_GELU_BACK: moe_gelu_backward(w->b, w->c, w->a, wide, &w->env); break;
    case OP_NORM: moe_norm_forward(w->b, w->e, w->e + M, w->a, w->bias[0], w->bias[1], 1e-12f, M, H, &w->env); break;
    case OP_NORM_BACK: moe_norm_backward(w->b, w->dbias[0], w->dbias[1], w->c, w->a, w->e, w->e + M, w->bias[0], M, H, &w->env); break;
    case OP_DROPOUT: moe_dropout(w->b, w->a, narrow, 0.1f, 7, &w->env); break;
    case OP_EMBED: moe_embed_forward(w->b, w->ids, NULL, w->start, S, w->f, w->d, NULL, H, &w->env); break;
    case OP_EMBED_BACK: moe_embed_backward(w->f, w->d, NULL, w->a, w->ids, NULL, w->start, S, H, &w->env); break;
    case OP_ATTENTION: moe_attention_forward(w->b, w->e, w->a, w->start, S, H, A, 0.0f, NULL, w->scratch, &w->env); break;
    case OP_ATTENTION_BACK:
      moe_attention_backward(w->f, w->c, w->b, w->e, w->a, w->start, S, H, A, 0.0f, NULL, w->scratch, &w->env);
      break;
    case OP_ADAM:
      moe_adam_step(w->a, w->b, w->c, w->d, (size_t)10000000, ++w->step, 1e-5f, 0.0f, 1.0f, 0.9f, 0.999f, 1e-8f, &w->env);
      break;
    case OP_PACK: moe_pack(w->panels[0], w->rows[0], F, H, &w->env); break;
    default: expert_layer(w); break;
  }
  return 0;
}

/* What an op reads of another's results. */
static int choose(void *arg, const char *word) {
  work *w = (work *)arg;
  char name[32];
  size_t i, n = (size_t)M * 3072;
  int got = sscanf(word, "%31[a-z_]:%d:%d:%d", name, &w->n, &w->k, &w->m);
  op what = OP_PACKED;
  while (what < OPS && strcmp(name, op_name[what]) != 0) what = (op)(what + 1);
  if (what == OPS || (what <= OP_DW && (got != 4 || w->n > 3072 || w->k > 3072 || w->m > M))) return 1;
  if (what <= OP_DW) n = (size_t)w->n * (size_t)(w->k > w->m ? w->k : w->m); /* no more than is read */
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
  static const struct { const char *name; uint32_t bit; } unit[] = {
    {"NEON dot product", MOE_FEATURE_NEON_DOT}, {"AVX-VNNI", MOE_FEATURE_AVX_VNNI}, {"AVX512-VNNI", MOE_FEATURE_AVX512_VNNI},
    {"AVX512-BF16", MOE_FEATURE_AVX512_BF16}, {"AMX-BF16", MOE_FEATURE_AMX_BF16}, {"AMX-INT8", MOE_FEATURE_AMX_INT8}};
  moe_env env;
  size_t i;
  moe_env_init(&env, MOE_ISA_AUTO);
  (void)moe_env_use_amx(&env);
  printf("{\"scalar\": 1, \"AVX2 + FMA\": %d, \"AVX-512\": %d, \"NEON\": %d", moe_isa_available(MOE_ISA_AVX2), moe_isa_available(MOE_ISA_AVX512),
         moe_isa_available(MOE_ISA_NEON));
  for (i = 0; i < sizeof unit / sizeof unit[0]; ++i) printf(", \"%s\": %d", unit[i].name, (env.features & unit[i].bit) != 0);
  return printf("}\n") < 0;
}

int main(int argc, char **argv) {
  static work w;
  moe_pool *pool;
  double gflops, gbytes;
  int threads = argc == 3 && !strcmp(argv[1], "--threads") ? atoi(argv[2]) : 1, status;
  if (argc == 2 && !strcmp(argv[1], "--units")) return units();
  if (moe_env_init(&w.env, MOE_ISA_AUTO) != MOE_OK) return 1;
  w.env.log = bench_log;
  w.env.log_user = argv[0];
  if (moe_pool_create(&pool, threads, &w.env) != MOE_OK) return 1;
  bench_pin(threads);
  limits(&gflops, &gbytes, &w.env);
  prepare(&w);
  printf("{\"program\": \"moe.h\", \"isa\": \"%s\", \"threads\": %d, \"peak_gflops\": %.1f, \"copy_gbytes\": %.1f}\n", moe_isa_name(w.env.isa), threads,
         gflops, gbytes);
  status = bench_serve(once, choose, &w);
  moe_pool_free(pool);
  return status;
}
