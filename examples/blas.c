/* Copy moe.h and this file. cc -O2 -I. -o blas examples/blas.c -lblis -lm -pthread && ./blas
   (or -lopenblas, -lcblas: whatever has cblas.h and cblas_sgemm)
   Matrix products of moe.h through a BLAS of your choice: ten lines connect it. Multiplies the same
   matrices with the built-in kernels and with the library, and prints how far the results are apart
   and how long both took. Let the library use one thread (BLIS_NUM_THREADS=1,
   OPENBLAS_NUM_THREADS=1): env.parallel_for spreads the work. For BLIS itself there is also
   MOE_USE_BLIS, see moe.h. */
#define _POSIX_C_SOURCE 200809L
#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#define MOE_IMPLEMENTATION
#include "moe.h"

static void blas_sgemm(void *user, const moe_sgemm *p) {
  (void)user;
  cblas_sgemm(CblasRowMajor, p->a_col == 1 ? CblasNoTrans : CblasTrans,
              p->b_col == 1 ? CblasNoTrans : CblasTrans, p->m, p->n, p->k, 1.0f, p->a,
              (int)(p->a_col == 1 ? p->a_row : p->a_col), p->b,
              (int)(p->b_col == 1 ? p->b_row : p->b_col), p->accumulate ? 1.0f : 0.0f, p->c,
              (int)p->c_row);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(void) {
  enum { M = 128, ROWS = 1536, COLS = 384, ROUNDS = 20 };
  float *x = (float *)malloc(M * COLS * sizeof *x), *w = (float *)malloc(ROWS * COLS * sizeof *w);
  float *y[2];
  double best[2] = {1e9, 1e9}, apart = 0;
  moe_backend blas;
  moe_env env;
  int i, side;
  y[0] = (float *)malloc(M * ROWS * sizeof **y);
  y[1] = (float *)malloc(M * ROWS * sizeof **y);
  if (!x || !w || !y[0] || !y[1] || moe_env_init(&env, MOE_ISA_AUTO)) return 1;
  moe_backend_init(&blas);
  blas.name = "cblas";
  blas.sgemm = blas_sgemm;
  for (i = 0; i < M * COLS; ++i) x[i] = (float)(i % 1009) / 1009 - 0.5f;
  for (i = 0; i < ROWS * COLS; ++i) w[i] = (float)(i % 1013) / 1013 - 0.5f;
  for (side = 0; side < 2; ++side) {
    moe_linear_op op;
    moe_linear_op_init(&op);
    op.y = y[side];
    op.x = x;
    op.w = moe_mat_rows(w, ROWS, COLS);
    op.M = M;
    env.backend = side ? &blas : NULL;
    for (i = 0; i < ROUNDS; ++i) {
      double t = now();
      if (moe_linear_forward(&op, &env)) return 1;
      t = now() - t;
      if (t < best[side]) best[side] = t;
    }
    printf("%-8s %.0f us\n", moe_backend_name(&env), 1e6 * best[side]);
  }
  for (i = 0; i < M * ROWS; ++i) apart = fmax(apart, fabs((double)y[0][i] - (double)y[1][i]));
  printf("largest difference %.1e\n", apart);
  free(x), free(w), free(y[0]), free(y[1]);
  return apart < 1e-3 ? 0 : 1;
}
