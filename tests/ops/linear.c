/* Linear layers and GELU: values and gradients against double precision, the same bits on every
   instruction set, for any number of threads and for any cut into micro-batches. */

static double gelu_double(double x) { return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440)); }

/* The layer in double: y (M, rows) */
static double layer_double(const float *x, const float *w, const float *b, int cols, int i, int j) {
  double sum = b ? (double)b[j] : 0.0;
  int p;
  for (p = 0; p < cols; ++p) sum += (double)x[i * cols + p] * (double)w[j * cols + p];
  return sum;
}

static void test_linear_forward_matches_double_for_packed_and_plain_weights(void) {
  static const int shapes[][3] = {{1, 1, 1},   {5, 3, 20},   {7, 15, 40},
                                  {3, 16, 33}, {20, 37, 64}, {9, 100, 300}};
  uint64_t seed = 1;
  size_t q, s;
  for (q = 0; q < sizeof shapes / sizeof shapes[0]; ++q) {
    int M = shapes[q][0], rows = shapes[q][1], cols = shapes[q][2], i, j;
    size_t count = (size_t)(M * rows);
    float *x = test_floats((size_t)(M * cols), &seed),
          *w = test_floats((size_t)(rows * cols), &seed);
    float *b = test_floats((size_t)rows, &seed), *y = test_floats(count, &seed),
          *pre = test_floats(count, &seed);
    float *packed = test_floats(count, &seed), *first = test_floats(count, &seed);
    float *panels = test_floats(moe_pack_floats(rows, cols), &seed);
    for (s = 0; s < ISAS; ++s) {
      moe_env env;
      moe_mat plain = moe_mat_rows(w, rows, cols), mat = moe_mat_panels(panels, rows, cols);
      if (moe_env_init(&env, isas[s])) continue;
      moe_pack(panels, w, rows, cols, &env);
      linear_forward(y, x, &plain, b, M, &env);
      linear_forward(packed, x, &mat, b, M, &env);
      CHECK(!memcmp(y, packed, count * sizeof *y), "%d x %d x %d packed", M, rows, cols);
      for (i = 0; i < M; ++i)
        for (j = 0; j < rows; ++j)
          CHECK_NEAR(y[i * rows + j], layer_double(x, w, b, cols, i, j), 3e-7 * (cols + 2));
      if (s == 0) memcpy(first, y, count * sizeof *y);
      CHECK(!memcmp(y, first, count * sizeof *y), "%d x %d x %d on %s", M, rows, cols,
            moe_isa_name(isas[s]));
      linear_forward(packed, x, &mat, NULL, M, &env);
      for (j = 0; j < rows; ++j)
        CHECK_NEAR(packed[j], layer_double(x, w, NULL, cols, 0, j), 3e-7 * (cols + 2));
      /* with GELU: the same as one after the other */
      moe_gelu_forward(first, y, count, &env);
      linear_gelu_forward(packed, pre, x, &mat, b, M, &env);
      CHECK(!memcmp(packed, first, count * sizeof *y) && !memcmp(pre, y, count * sizeof *y),
            "%d x %d x %d with GELU", M, rows, cols);
      linear_gelu_forward(packed, NULL, x, &plain, b, M, &env);
      CHECK(!memcmp(packed, first, count * sizeof *y), "%d x %d x %d with GELU in place", M, rows,
            cols);
      memcpy(first, y, count * sizeof *y);
    }
    free(x), free(w), free(b), free(y), free(pre), free(packed), free(first), free(panels);
  }
}

/* Gradients of sum(dy y) are linear in each input, so that finite differences are exact but for
   rounding: the derivative is written down in double instead. */
static void test_linear_backward_matches_double_and_accumulates(void) {
  static const int shapes[][3] = {{1, 1, 1},   {5, 3, 20},   {7, 15, 40},
                                  {33, 16, 5}, {20, 37, 64}, {300, 20, 50}};
  uint64_t seed = 4;
  size_t q, s;
  for (q = 0; q < sizeof shapes / sizeof shapes[0]; ++q) {
    int M = shapes[q][0], rows = shapes[q][1], cols = shapes[q][2], i, j, p;
    float *x = test_floats((size_t)(M * cols), &seed),
          *w = test_floats((size_t)(rows * cols), &seed);
    float *dy = test_floats((size_t)(M * rows), &seed),
          *dx = test_floats((size_t)(M * cols), &seed);
    float *dw = test_floats((size_t)(rows * cols), &seed), *db = test_floats((size_t)rows, &seed);
    float *keep = test_floats((size_t)(M * cols + rows * cols + rows), &seed);
    for (s = 0; s < ISAS; ++s) {
      moe_env env;
      moe_mat mat = moe_mat_rows(w, rows, cols);
      if (moe_env_init(&env, isas[s])) continue;
      for (i = 0; i < M * cols; ++i) dx[i] = 1.0f;
      for (i = 0; i < rows * cols; ++i) dw[i] = 2.0f;
      for (i = 0; i < rows; ++i) db[i] = 3.0f;
      linear_backward(dx, dw, db, dy, x, &mat, M, &env);
      for (i = 0; i < M; ++i)
        for (p = 0; p < cols; ++p) {
          double sum = 1.0;
          for (j = 0; j < rows; ++j) sum += (double)dy[i * rows + j] * (double)w[j * cols + p];
          CHECK_NEAR(dx[i * cols + p], sum, 3e-7 * (rows + 4));
        }
      for (j = 0; j < rows; ++j) {
        double bias = 3.0;
        for (i = 0; i < M; ++i) bias += (double)dy[i * rows + j];
        CHECK_NEAR(db[j], bias, 3e-7 * (M + 4));
        for (p = 0; p < cols; ++p) {
          double sum = 2.0;
          for (i = 0; i < M; ++i) sum += (double)dy[i * rows + j] * (double)x[i * cols + p];
          CHECK_NEAR(dw[j * cols + p], sum, 3e-7 * (M + 4));
        }
      }
      if (s == 0) {
        memcpy(keep, dx, (size_t)(M * cols) * sizeof *dx);
        memcpy(keep + M * cols, dw, (size_t)(rows * cols) * sizeof *dw);
        memcpy(keep + M * cols + rows * cols, db, (size_t)rows * sizeof *db);
      }
      CHECK(!memcmp(keep, dx, (size_t)(M * cols) * sizeof *dx) &&
                !memcmp(keep + M * cols, dw, (size_t)(rows * cols) * sizeof *dw) &&
                !memcmp(keep + M * cols + rows * cols, db, (size_t)rows * sizeof *db),
            "%d x %d x %d on %s", M, rows, cols, moe_isa_name(isas[s]));
    }
    free(x), free(w), free(dy), free(dx), free(dw), free(db), free(keep);
  }
}

static void test_linear_backward_of_micro_batches_gives_the_bits_of_one_batch(void) {
  enum { M = 700, ROWS = 40, COLS = 50 };
  uint64_t seed = 6;
  float *x = test_floats(M * COLS, &seed), *w = test_floats(ROWS * COLS, &seed),
        *dy = test_floats(M * ROWS, &seed);
  float *dw = test_floats(ROWS * COLS, &seed), *db = test_floats(ROWS, &seed);
  float *dw2 = test_floats(ROWS * COLS, &seed), *db2 = test_floats(ROWS, &seed);
  moe_mat mat = moe_mat_rows(w, ROWS, COLS);
  moe_env env;
  int at = 0, part = 1;
  moe_env_init(&env, MOE_ISA_AUTO);
  memcpy(dw2, dw, ROWS * COLS * sizeof *dw);
  memcpy(db2, db, ROWS * sizeof *db);
  linear_backward(NULL, dw, db, dy, x, &mat, M, &env);
  for (; at < M; at += part, part = part * 3 % 101) {
    if (part > M - at) part = M - at;
    linear_backward(NULL, dw2, NULL, dy + at * ROWS, x + at * COLS, &mat, part, &env);
    linear_backward(NULL, NULL, db2, dy + at * ROWS, x + at * COLS, &mat, part, &env);
  }
  CHECK(!memcmp(dw, dw2, ROWS * COLS * sizeof *dw), "dw");
  CHECK(!memcmp(db, db2, ROWS * sizeof *db), "db");
  free(x), free(w), free(dy), free(dw), free(db), free(dw2), free(db2);
}

static void test_linear_rows_do_not_depend_on_their_company(void) {
  enum { M = 40, ROWS = 50, COLS = 300 };
  uint64_t seed = 8;
  float *x = test_floats(M * COLS, &seed), *w = test_floats(ROWS * COLS, &seed),
        *b = test_floats(ROWS, &seed);
  float *all = test_floats(M * ROWS, &seed), *some = test_floats(M * ROWS, &seed);
  int rows, first, count;
  for (rows = 5; rows <= ROWS; rows += 45) { /* 16-lane sums, then chains */
    moe_mat mat = moe_mat_rows(w, rows, COLS);
    moe_env env;
    moe_env_init(&env, MOE_ISA_AUTO);
    linear_forward(all, x, &mat, b, M, &env);
    for (count = 1; count <= 12; ++count)
      for (first = 0; first + count <= M; first += 7) {
        linear_forward(some, x + first * COLS, &mat, b, count, &env);
        CHECK(!memcmp(some, all + first * rows, (size_t)(count * rows) * sizeof *all),
              "rows %d from %d on, %d outputs", count, first, rows);
      }
  }
  free(x), free(w), free(b), free(all), free(some);
}

static void test_linear_nothing_to_do_is_fine(void) {
  float x[4] = {1, 2, 3, 4}, w[4] = {1, 2, 3, 4}, b[2] = {5, 6}, y[4] = {9, 9, 9, 9};
  moe_mat mat = moe_mat_rows(w, 2, 2), none = moe_mat_rows(w, 0, 2), empty = moe_mat_rows(w, 2, 0);
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  linear_forward(y, x, &mat, b, 0, &env);
  linear_forward(y, x, &none, b, 2, &env);
  linear_backward(NULL, NULL, NULL, x, x, &mat, 2, &env);
  linear_backward(y, w, b, x, x, &mat, 0, &env);
  CHECK(y[0] == 9.0f && w[0] == 1.0f && b[0] == 5.0f, "touched");
  moe_gelu_forward(y, x, 0, &env);
  CHECK(y[0] == 9.0f, "touched");
  linear_forward(y, x, &empty, b, 2, &env); /* no inputs: the bias */
  CHECK(y[0] == 5.0f && y[1] == 6.0f && y[2] == 5.0f && y[3] == 6.0f, "%g %g %g %g", (double)y[0],
        (double)y[1], (double)y[2], (double)y[3]);
}

static void test_gelu_forward_and_backward_match_double(void) {
  enum { N = 60003 };
  uint64_t seed = 12;
  float *x = test_floats(N, &seed), *y = test_floats(N, &seed), *dy = test_floats(N, &seed),
        *dx = test_floats(N, &seed);
  float *first = test_floats(2 * N, &seed);
  double worst = 0.0, worst_slope = 0.0;
  int s, i;
  for (i = 0; i < N; ++i) x[i] = (float)(i - N / 2) * 0.0005f + x[i] * 1e-4f;
  x[0] = 30.0f, x[1] = -30.0f, x[2] = 1e30f, x[3] = -1e30f, x[4] = 0.0f,
  x[5] = moe__floats(0x7f800000u), x[6] = -x[5], x[7] = 1e-30f;
  for (s = 0; s < ISAS; ++s) {
    moe_env env;
    if (moe_env_init(&env, isas[s])) continue;
    moe_gelu_forward(y, x, N, &env);
    for (i = 0; i < N; ++i) dx[i] = 0.0f, dy[i] = 1.0f;
    moe_gelu_backward(dx, dy, x, N, &env);
    if (s == 0) memcpy(first, y, N * sizeof *y), memcpy(first + N, dx, N * sizeof *y);
    CHECK(!memcmp(first, y, N * sizeof *y) && !memcmp(first + N, dx, N * sizeof *y), "%s",
          moe_isa_name(isas[s]));
  }
  CHECK(y[5] == x[5] && dx[5] == 1.0f && fabsf(y[6]) < 1e-20f && fabsf(dx[6]) < 1e-20f,
        "infinity: %g %g %g %g", (double)y[5], (double)dx[5], (double)y[6], (double)dx[6]);
  CHECK(y[2] == 1e30f && fabsf(y[3]) < 1e-20f && y[4] == 0.0f && y[7] == 5e-31f, "%g %g %g %g",
        (double)y[2], (double)y[3], (double)y[4], (double)y[7]);
  for (i = 8; i < N; ++i) {
    double v = (double)x[i],
           error = fabs((double)y[i] - gelu_double(v)) / (fabs(v) > 1.0 ? fabs(v) : 1.0);
    double slope = 0.5 * (1.0 + erf(v * 0.70710678118654752440)) +
                   v * exp(-0.5 * v * v) * 0.39894228040143267794;
    if (error > worst) worst = error;
    if (fabs((double)dx[i] - slope) > worst_slope) worst_slope = fabs((double)dx[i] - slope);
  }
  CHECK(worst < 1.1e-7 && worst_slope < 1.3e-7, "errors %.3g and %.3g", worst, worst_slope);
  for (i = 0; i < N; ++i) dx[i] = 0.25f, dy[i] = 3.0f;
  {
    moe_env env;
    moe_env_init(&env, MOE_ISA_AUTO);
    moe_gelu_backward(dx, dy, x, N, &env);
  }
  for (i = 0; i < N; ++i)
    CHECK_NEAR(dx[i], 0.25 + 3.0 * (double)first[N + i], 2e-6); /* accumulates */
  free(x), free(y), free(dy), free(dx), free(first);
}

static void test_linear_gives_the_same_bits_for_any_number_of_threads(void) {
#ifdef MOE_NO_THREADS
  SKIP("built without threads");
#else
  enum { M = 210, ROWS = 230, COLS = 100 };
  static const int32_t threads[] = {1, 2, 3, 8};
  uint64_t seed = 31;
  float *x = test_floats(M * COLS, &seed), *w = test_floats(ROWS * COLS, &seed),
        *b = test_floats(ROWS, &seed);
  size_t count = M * ROWS * 2 + M * COLS + ROWS * COLS + ROWS, t;
  float *out = test_floats(count, &seed), *first = test_floats(count, &seed);
  for (t = 0; t < 4; ++t) {
    float *y = out, *pre = y + M * ROWS, *dx = pre + M * ROWS, *dw = dx + M * COLS,
          *db = dw + ROWS * COLS;
    moe_mat mat = moe_mat_rows(w, ROWS, COLS);
    moe_env env;
    moe_pool *pool;
    moe_env_init(&env, MOE_ISA_AUTO);
    CHECK(!moe_pool_create_exact(&pool, threads[t], &env), "%d threads", (int)threads[t]);
    memset(out, 0, count * sizeof *out);
    linear_gelu_forward(y, pre, x, &mat, b, M, &env);
    linear_backward(dx, dw, db, y, x, &mat, M, &env);
    moe_gelu_backward(pre, y, y, M * ROWS, &env);
    if (t == 0) memcpy(first, out, count * sizeof *out);
    CHECK(!memcmp(first, out, count * sizeof *out), "%d threads", (int)threads[t]);
    moe_pool_free(pool);
  }
  free(x), free(w), free(b), free(out), free(first);
#endif
}

static void test_linear_refuses_what_it_cannot_do(void) {
  static float panels[64], y[4], x[4];
  moe_linear_op op;
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  moe_linear_op_init(&op);
  CHECK(!moe_linear_forward(&op, &env) && !moe_linear_backward(&op, &env), "all sizes 0");
  op.x = x, op.w = moe_mat_panels(panels, 4, 2), op.M = 1;
  CHECK(moe_linear_forward(&op, &env) == MOE_E_ARGUMENT, "no output");
  op.y = y;
  CHECK(!moe_linear_forward(&op, &env), "panels");
  op.dx = x, op.dy = y;
  CHECK(moe_linear_backward(&op, &env) == MOE_E_ARGUMENT, "dx of packed weights");
  op.w = moe_mat_rows(panels, 4, 2), op.M = -1;
  CHECK(moe_linear_backward(&op, &env) == MOE_E_ARGUMENT, "M below 0");
  op.w = moe_mat_rows_int8((const int8_t *)panels, x, 1, MOE_INT8_COLS + 1), op.M = 1;
  CHECK(moe_linear_forward(&op, &env) == MOE_E_ARGUMENT, "more columns than int8 takes");
}

static void test_linear_overwrites_dx_if_asked(void) {
  float w[6], dy[4] = {1, -2, 0.5f, 3}, added[6] = {0}, written[6];
  uint64_t state = 3;
  moe_linear_op op;
  moe_env env;
  int i;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (i = 0; i < 6; ++i) w[i] = test_random(&state), written[i] = NAN;
  moe_linear_op_init(&op);
  op.w = moe_mat_rows(w, 2, 3), op.M = 2, op.dy = dy, op.dx = added;
  CHECK(!moe_linear_backward(&op, &env), "fails");
  op.dx = written, op.overwrite = 1;
  CHECK(!moe_linear_backward(&op, &env), "fails");
  CHECK(!memcmp(added, written, sizeof added), "other bits than from 0");
}

static void run_linear(void) {
  RUN(test_linear_forward_matches_double_for_packed_and_plain_weights);
  RUN(test_linear_backward_matches_double_and_accumulates);
  RUN(test_linear_backward_of_micro_batches_gives_the_bits_of_one_batch);
  RUN(test_linear_rows_do_not_depend_on_their_company);
  RUN(test_linear_nothing_to_do_is_fine);
  RUN(test_gelu_forward_and_backward_match_double);
  RUN(test_linear_gives_the_same_bits_for_any_number_of_threads);
  RUN(test_linear_refuses_what_it_cannot_do);
  RUN(test_linear_overwrites_dx_if_asked);
}
