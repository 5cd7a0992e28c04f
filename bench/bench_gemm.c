/* Speed of the matrix products of moe.h beside the peak of this processor, probed in the same run.

     cc -O2 -o bench_gemm bench/bench_gemm.c -lm -pthread && ./bench_gemm [--threads N] [--isa avx512|avx2|scalar] [--kind K] [--m M]
                                                                          [--seconds S] [--quick]

   Each line: kind, n, k, m, GFLOP/s (the median of 15 rounds), its share of the peak, and the spread: lower quartile, best round, peak. Kinds:
   packed (weights packed beforehand), plain (weights as in a file), gelu (packed, with GELU), dx (gradient of the input), dw (gradient of
   weights and bias over m tokens). pytorch_gemm.py prints the same for oneDNN. */
#define _POSIX_C_SOURCE 200809L
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdlib.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Fused multiply-adds with nothing in their way: 12 chains of vectors, which must differ, or the compiler keeps one. */
static float different[16];
#ifdef MOE__X86
#define BEGIN(S, i) c##i = S##_add(S##_load(different), S##_set((float)i))
#define STEP(S, i) c##i = S##_fma(a, c##i, b);
#define PROBE(S, T)                                                                                                           \
  T static float S##_probe(int64_t rounds) {                                                                                  \
    S##_f a = S##_set(0.5f), b = S##_set(1.0f), BEGIN(S, 0), BEGIN(S, 1), BEGIN(S, 2), BEGIN(S, 3), BEGIN(S, 4), BEGIN(S, 5); \
    S##_f BEGIN(S, 6), BEGIN(S, 7), BEGIN(S, 8), BEGIN(S, 9), BEGIN(S, 10), BEGIN(S, 11);                                     \
    for (; rounds > 0; --rounds) {                                                                                            \
      STEP(S, 0) STEP(S, 1) STEP(S, 2) STEP(S, 3) STEP(S, 4) STEP(S, 5)                                                       \
      STEP(S, 6) STEP(S, 7) STEP(S, 8) STEP(S, 9) STEP(S, 10) STEP(S, 11)                                                     \
    }                                                                                                                         \
    c0 = S##_add(S##_add(S##_add(c0, c1), S##_add(c2, c3)), S##_add(S##_add(c4, c5), S##_add(c6, c7)));                       \
    return S##_sum(S##_add(c0, S##_add(S##_add(c8, c9), S##_add(c10, c11))));                                                 \
  }                                                                                                                           \
  static float (*const S##_probes)(int64_t) = S##_probe;
MOE__V_STAMP(PROBE)
#endif
static float scalar_probe(int64_t rounds) {
  float sum[12] = {0}, total = 0.0f;
  int i;
  for (; rounds > 0; --rounds)
    for (i = 0; i < 12; ++i) sum[i] = moe__fmaf(0.5f, sum[i], 1.0f);
  for (i = 0; i < 12; ++i) total += sum[i];
  return total;
}
static float (*const moe__scalar_probes)(int64_t) = scalar_probe;

static volatile float sink;

typedef struct probe_work {
  moe_isa isa;
  int64_t rounds;
} probe_work;

static void probe_tile(void *arg, int32_t tile, int32_t slot) {
  const probe_work *work = (const probe_work *)arg;
  (void)tile, (void)slot;
  sink = (*MOE__V_PICK(work->isa, probes))(work->rounds);
}

/* GFLOP/s of all threads together, the best of a few milliseconds each */
static double peak(const moe_env *env) {
  probe_work work;
  double best = 0;
  int i;
  work.isa = env->isa;
  work.rounds = env->isa == MOE_ISA_SCALAR ? 20000 : 300000;
  for (i = 0; i < 8; ++i) {
    double t = now(), flops;
    moe__parallel(env, env->threads, probe_tile, &work);
    t = now() - t;
    flops = 2.0 * 12 * (env->isa == MOE_ISA_SCALAR ? 1 : 16) * (double)work.rounds * env->threads / t;
    if (flops > best) best = flops;
  }
  return best * 1e-9;
}

typedef enum kind { PACKED, PLAIN, GELU, DX, DW, KINDS } kind;
static const char *const kind_name[KINDS] = {"packed", "plain", "gelu", "dx", "dw"};

static int compare_doubles(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

static float *floats(size_t n) {
  static uint64_t seed = 1;
  float *x; /* on cache lines, as the library's own arrays: vectors that touch two lines cost a tenth */
  size_t i;
  if (posix_memalign((void **)&x, 64, (n + 16) * sizeof *x)) exit(1);
  for (i = 0; i < n; ++i) { /* random: zeros run faster */
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    x[i] = (float)(seed >> 40) / 8388608.0f - 1.0f;
  }
  return x;
}

static void measure(kind what, int n, int k, int m, double seconds, const moe_env *env) {
  enum { ROUNDS = 15 };
  float *x = floats((size_t)m * (size_t)k), *y = floats((size_t)m * (size_t)n), *w = floats((size_t)n * (size_t)k);
  float *pre = floats((size_t)m * (size_t)n), *b = floats((size_t)n), *panels = floats(moe_pack_floats(n, k));
  moe_mat plain = moe_mat_rows(w, n, k), packed = moe_mat_panels(panels, n, k);
  double rate[ROUNDS], top = 0, t, flops = 2.0 * m * n * k;
  int round, i, times = 1;
  moe_pack(panels, w, n, k, env);
  for (round = -1; round < ROUNDS; ++round) {
    t = now();
    for (i = 0; i < times; ++i) switch (what) {
        case PACKED: moe_linear_forward(y, x, &packed, b, m, env); break;
        case PLAIN: moe_linear_forward(y, x, &plain, b, m, env); break;
        case GELU: moe_linear_gelu_forward(y, pre, x, &packed, b, m, env); break;
        case DX: moe_linear_backward(x, NULL, NULL, y, NULL, &plain, m, env); break;
        default: moe_linear_backward(NULL, w, b, y, x, &plain, m, env); break;
      }
    t = now() - t;
    if (round < 0) {
      times = 1 + (int)(seconds / ROUNDS / t);
      if (times > 100000) times = 100000;
      if (what >= DX) memset(x, 0, 4), memset(w, 0, 4);
    } else rate[round] = flops * times / t * 1e-9;
    if (round % 5 == 0) {
      double p = peak(env);
      if (p > top) top = p;
    }
  }
  qsort(rate, ROUNDS, sizeof *rate, compare_doubles);
  printf("%-6s %5d %5d %5d  %7.1f  %5.1f %%  (%.1f .. %.1f of %.1f)\n", kind_name[what], n, k, m, rate[ROUNDS / 2],
         100.0 * rate[ROUNDS / 2] / top, rate[ROUNDS / 4], rate[ROUNDS - 1], top);
  fflush(stdout);
  free(x), free(y), free(w), free(pre), free(b), free(panels);
}

int main(int argc, char **argv) {
  static const int shapes[][2] = {{1152, 384}, {384, 384}, {1536, 384}, {384, 1536}, {3072, 768}, {768, 3072}, {500, 333}};
  static const int ms[] = {1, 2, 4, 8, 16, 32, 128, 512, 1024, 4096};
  moe_env env;
  moe_pool *pool = NULL;
  double seconds = 0.15;
  int threads = 1, i, quick = 0, only = -1, size, m, one_m = 0;
  size_t what;
  for (i = 0; i < 16; ++i) different[i] = 0.01f * (float)(i + argc);
  moe_env_init(&env, MOE_ISA_AUTO);
  for (i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--quick")) quick = 1;
    else if (i + 1 >= argc) return fprintf(stderr, "%s needs a value\n", argv[i]), 1;
    else if (!strcmp(argv[i], "--threads")) threads = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--seconds")) seconds = atof(argv[++i]);
    else if (!strcmp(argv[i], "--m")) one_m = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--kind")) {
      for (++i, only = 0; only < KINDS && strcmp(argv[i], kind_name[only]); ++only) {}
    } else if (!strcmp(argv[i], "--isa")) {
      if (moe_env_init(&env, moe_isa_from_name(argv[++i]))) return fprintf(stderr, "this machine has no %s\n", argv[i]), 1;
    } else return fprintf(stderr, "unknown option %s\n", argv[i]), 1;
  }
  if (threads > 1 && moe_pool_create(&pool, threads, &env)) return fprintf(stderr, "no pool of %d threads\n", threads), 1;
  printf("# %s, %d threads, peak %.1f GFLOP/s\n# kind      n     k     m  GFLOP/s  of peak\n", moe_isa_name(env.isa), threads, peak(&env));
  for (what = 0; what < KINDS; ++what)
    for (size = 0; size < (quick ? 4 : 7); ++size)
      for (m = 0; m < 10; ++m) {
        if (only >= 0 && (int)what != only) continue;
        if (one_m && ms[m] != one_m) continue;
        measure((kind)what, shapes[size][0], shapes[size][1], ms[m], seconds, &env);
      }
  moe_pool_free(pool);
  return 0;
}
