/* bench_blis.c - what BLIS is better at than the kernels of moe.h: the measurement behind
   moe__blis_best (>>backend).
     cc -O2 -DMOE_USE_BLIS -o bench_blis bench/bench_blis.c -lblis -lm -pthread
     ./bench_blis KERNELS [OP [FEWEST MOST]]     kernels of BLIS: haswell, zen3 (beside the AVX2
   kernels of moe.h), skx (beside AVX-512); scalar: those that BLIS chooses, beside the plain C of
   moe.h, which is slow OP: packed (moe.h's panels, BLIS with rows), rows, dx, dw; FEWEST .. MOST
   tokens, 8 .. 512. One thread, least time of a few calls, the two in turn, so that it needs no
   idle machine. A figure is the time of moe.h / that of BLIS, above 1 where BLIS is faster: least,
   geometric mean and largest over the weights of MiniLM and BERT-base. At the end: what the choice
   of moe.h costs beside the best one. */
#include "bench.h"

enum { MOST = 512, WIDE = 3072, ROUNDS = 3, CALLS = 2 }; /* calls beside the one that warms up */
typedef enum op { PACKED, PLAIN, DX, DW, OPS } op;
static const char *const op_name[OPS] = {"packed", "rows", "dx", "dw"};
static const int shape[][2] = {{384, 384}, {1536, 384}, {384, 1536},
                               {768, 768}, {3072, 768}, {768, 3072}};
static const int tokens[] = {8, 16, 32, 48, 64, 96, 128, 256, MOST};
enum { SHAPES = sizeof shape / sizeof shape[0], SIZES = sizeof tokens / sizeof tokens[0] };

typedef struct work {
  float *x, *y, *w, *dw, *panels;
} work;

static float *floats(size_t n) {
  float *p = (float *)aligned_alloc(64, (n * sizeof *p + 127) / 64 * 64);
  size_t i;
  if (!p) exit(1);
  for (i = 0; i < n; ++i) p[i] = (float)(i * 2654435761u % 1024) / 1024.0f - 0.5f;
  return p;
}

static void call(work *w, op what, int m, int n, int k, const moe_env *env) {
  moe_linear_op linear;
  moe_linear_op_init(&linear);
  linear.y = w->y, linear.x = w->x, linear.M = m, linear.dy = w->y;
  linear.w =
      what == PACKED && !env->backend ? moe_mat_panels(w->panels, n, k) : moe_mat_rows(w->w, n, k);
  if (what == DX) linear.dx = w->x;
  if (what == DW) linear.dw = w->dw;
  if (what == PACKED || what == PLAIN)
    moe_linear_forward(&linear, env);
  else
    moe_linear_backward(&linear, env);
}

/* The least seconds of a call. */
static double least(work *w, op what, int m, int n, int k, const moe_env *env) {
  double last, t, best = 1e9;
  int calls;
  call(w, what, m, n, k, env);
  last = bench_now();
  for (calls = 0; calls < CALLS; ++calls) {
    call(w, what, m, n, k, env);
    t = bench_now();
    if (t - last < best) best = t - last;
    last = t;
  }
  return best;
}

/* Measures an op with m tokens on all shapes; adds to total[0] the time of moe.h's choice, to
   total[1] that of the better one, both over the time of the kernels of moe.h, and to total[2] how
   many they were. */
static void row(work *w, op what, int m, const moe_backend *choice, const moe_env *own,
                const moe_env *blis, double total[3]) {
  double low = 1e9, high = 0, product = 0;
  int s, r, taken = 0;
  for (s = 0; s < SHAPES; ++s) {
    int n = shape[s][0], k = shape[s][1];
    double a = 1e9, b = 1e9;
    for (r = 0; r < ROUNDS; ++r) {
      double t = least(w, what, m, n, k, own);
      if (t < a) a = t;
      t = least(w, what, m, n, k, blis);
      if (t < b) b = t;
    }
    if (choice != NULL && choice->takes == NULL)
      taken = 1;
    else if (choice != NULL) /* the sizes of the product as moe.h asks about them */
      taken = what == DW   ? choice->takes(NULL, n, k, m, 0)
              : what == DX ? choice->takes(NULL, m, k, n, 0)
                           : choice->takes(NULL, m, n, k, what == PACKED);
    total[0] += taken ? b / a : 1;
    total[1] += b < a ? b / a : 1;
    total[2] += 1;
    a /= b;
    if (a < low) low = a;
    if (a > high) high = a;
    product += log(a);
  }
  printf("| %-6s | %4d | %5.2f | %5.2f | %5.2f | %-5s |\n", op_name[what], m, low,
         exp(product / SHAPES), high, taken ? "BLIS" : "moe.h");
}

int main(int argc, char **argv) {
  static work w;
  const char *kernels = argc > 1 ? argv[1] : "haswell";
  moe_env own, blis;
  const moe_backend *choice;
  double total[3] = {0, 0, 0};
  char number[16];
  int scalar = !strcmp(kernels, "scalar"), fewest = argc > 3 ? atoi(argv[3]) : 0,
      most = argc > 4 ? atoi(argv[4]) : MOST, id, i, what;
  if (scalar) kernels = moe_blis_kernels();
  for (id = 0;
       strcmp(bli_arch_string(id), kernels) != 0 && strcmp(bli_arch_string(id), "generic") != 0;
       ++id)
    continue; /* the last one */
  snprintf(number, sizeof number, "%d", id);
  if (strcmp(bli_arch_string(id), kernels) != 0 || setenv("BLIS_ARCH_TYPE", number, 1) != 0)
    return fprintf(stderr, "bench_blis: this BLIS has no kernels called %s\n", kernels), 1;
  if (strcmp(moe_blis_kernels(), kernels) != 0)
    return fprintf(stderr, "bench_blis: BLIS chose %s, not %s\n", moe_blis_kernels(), kernels), 1;
  if (moe_env_init(&own, scalar                   ? MOE_ISA_SCALAR
                         : strcmp(kernels, "skx") ? MOE_ISA_AVX2
                                                  : MOE_ISA_AVX512) != MOE_OK)
    return printf("%s: this machine cannot run the kernels of moe.h beside it\n", kernels), 0;
  choice = own.backend; /* what moe.h takes these kernels for, NULL: nothing */
  own.backend = NULL;
  blis = own;
  if (moe_blis_use(&blis, 1) != MOE_OK) return 1;
  w.x = floats((size_t)MOST * WIDE), w.y = floats((size_t)MOST * WIDE),
  w.w = floats((size_t)WIDE * WIDE);
  w.dw = floats((size_t)WIDE * WIDE), w.panels = floats((size_t)WIDE * (WIDE + 64));
  printf("BLIS %s, kernels %s, beside the %s kernels of moe.h, one thread\n\n",
         bli_info_get_version_str(), kernels, moe_isa_name(own.isa));
  printf("| op     |    m | least |  mean |  most | taken "
         "|\n|--------|------|-------|-------|-------|-------|\n");
  for (what = PACKED; what < OPS; ++what) {
    if (argc > 2 && strcmp(argv[2], op_name[what]) != 0) continue;
    for (i = 0; i < SIZES; ++i)
      if (tokens[i] >= fewest && tokens[i] <= most)
        row(&w, (op)what, tokens[i], choice, &own, &blis, total);
  }
  if (choice != NULL && total[2] > 0)
    printf("\nmoe.h's choice takes %.3f of the time of its own kernels, the better of both each "
           "time %.3f\n\n",
           total[0] / total[2], total[1] / total[2]);
  return 0;
}
