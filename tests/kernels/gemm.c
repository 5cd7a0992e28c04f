/* Matrix products against their definition, bit by bit: every instruction set of this machine,
   layouts, strides, blocks of k, edges, threads. */

/* The definition: one chain of fused multiply-adds for each element, or 16 lanes and a tree. */
static void definition(float *c, const moe__gemm *g, const float *w_rows) {
  int32_t i, j, p;
  for (i = 0; i < g->m; ++i)
    for (j = 0; j < g->n; ++j) {
      float *out = &c[(size_t)i * g->c_row + (size_t)j], lane[16] = {0};
      float sum = g->accumulate ? *out : g->bias ? g->bias[j] : 0.0f;
      for (p = 0; p < g->k; ++p) {
        float a = g->a[(size_t)i * g->a_row + (size_t)p * g->a_col];
        float b = g->b_layout == MOE__B_ROWS ? g->b[(size_t)p * g->b_row + (size_t)j]
                                             : w_rows[(size_t)j * (size_t)g->k + (size_t)p];
        sum = moe__fmaf(a, b, sum);
        lane[p % 16] = moe__fmaf(a, b, lane[p % 16]);
      }
      if (g->narrow) {
        sum = moe__tree16(lane);
        if (g->bias) sum = sum + g->bias[j];
      }
      *out = sum;
    }
}

/* One random product of the given shape on every instruction set. */
static void compare(int32_t m, int32_t n, int32_t k, moe__b_layout layout, int as_weight,
                    int accumulate, int transposed, int extra, uint64_t *seed) {
  size_t pad = (size_t)extra, um = (size_t)m, un = (size_t)n, uk = (size_t)k,
         a_ld = (transposed ? um : uk) + pad, c_ld = un + pad;
  size_t b_ld = layout == MOE__B_ROWS ? un + pad : uk, c_count = um ? (um - 1) * c_ld + un : 0, i;
  size_t b_count = layout == MOE__B_ROWS ? (uk ? (uk - 1) * b_ld + un : 0) : un * uk;
  size_t a_count = transposed ? (uk ? (uk - 1) * a_ld + um : 0) : (um ? (um - 1) * a_ld + uk : 0);
  float *a = test_floats(a_count, seed), *b = test_floats(b_count, seed),
        *bias = test_floats(un, seed);
  float *begin = test_floats(c_count, seed), *want = test_floats(c_count, seed),
        *got = test_floats(c_count, seed);
  float *panels = test_floats(moe_pack_floats(n, k), seed), *gelu = test_floats(c_count, seed);
  float *sum_begin = test_floats(um, seed), *sum_want = test_floats(um, seed),
        *sum_got = test_floats(um, seed);
  moe_env env;
  moe__gemm g;
  int32_t i_row, p;
  int s, sums = transposed && accumulate;
  memset(&g, 0, sizeof g);
  g.m = m, g.n = n, g.k = k;
  g.a = a, g.a_row = transposed ? 1 : a_ld, g.a_col = transposed ? a_ld : 1;
  g.b = b, g.b_row = b_ld, g.b_layout = layout;
  g.narrow = as_weight && n < 16;
  g.accumulate = accumulate;
  g.c_row = c_ld;
  g.bias = accumulate || extra == 2 ? NULL : bias;
  memcpy(want, begin, c_count * sizeof *want);
  definition(want, &g, b);
  for (i_row = 0; i_row < m; ++i_row)
    for (sum_want[i_row] = sum_begin[i_row], p = 0; p < k; ++p)
      sum_want[i_row] += a[(size_t)i_row * g.a_row + (size_t)p * g.a_col];
  for (s = 0; s < ISAS; ++s) {
    if (moe_env_init(&env, isas[s])) continue;
    if (layout == MOE__B_PANELS) {
      memset(panels, 255, moe_pack_floats(n, k) * sizeof *panels);
      moe_pack(panels, b, n, k, &env);
      g.b = panels;
    }
    memcpy(got, begin, c_count * sizeof *got);
    g.c = got;
    g.gelu = accumulate ? NULL : gelu;
    if (um) memcpy(sum_got, sum_begin, um * sizeof *sum_got);
    g.a_sum = sums ? sum_got : NULL;
    moe__gemm_run(&g, 1, &env);
    CHECK(!sums || um == 0 || !memcmp(sum_got, sum_want, um * sizeof *sum_got),
          "%s: sums of A, m %d n %d k %d", moe_isa_name(isas[s]), (int)m, (int)n, (int)k);
    CHECK(c_count == 0 || !memcmp(got, want, c_count * sizeof *got),
          "%s: m %d n %d k %d layout %d weight %d accumulate %d A^T %d", moe_isa_name(isas[s]),
          (int)m, (int)n, (int)k, (int)layout, as_weight, accumulate, transposed);
    if (!accumulate)
      for (i = 0; i < um * un; ++i) {
        size_t at = i / un * c_ld + i % un;
        float y = moe__geluf(want[at], NULL);
        CHECK(moe__bits(y) == moe__bits(gelu[at]), "%s: GELU, m %d n %d k %d",
              moe_isa_name(isas[s]), (int)m, (int)n, (int)k);
      }
  }
  free(a), free(b), free(bias), free(begin), free(want), free(got), free(panels), free(gelu);
  free(sum_begin), free(sum_want), free(sum_got);
}

static void test_gemm_small_shapes_equal_the_definition(void) {
  static const int32_t ks[] = {0, 1, 2, 7, 8, 9, 16, 33};
  uint64_t seed = 3;
  int32_t m, n;
  for (m = 0; m <= 10; ++m)
    for (n = 0; n <= 100; n += n < 20 ? 1 : 7) {
      int32_t k = ks[(m + n) % 8];
      int variant = (int)(m * 101 + n);
      compare(m, n, k, MOE__B_PANELS, 1, 0, 0, variant % 3, &seed);
      compare(m, n, k, MOE__B_COLS, 1, 0, 0, variant % 3, &seed);
      compare(m, n, k, MOE__B_COLS, 0, variant & 1, 0, variant % 3, &seed);
      compare(m, n, k, MOE__B_ROWS, 0, variant >> 1 & 1, variant & 1, variant % 3, &seed);
      CHECK_STATE();
    }
}

static void test_gemm_blocks_and_tiles_equal_the_definition(void) {
  static const int32_t shapes[][3] = {{193, 97, 5},   {17, 112, 257}, {5, 96, 513},   {2, 200, 600},
                                      {201, 16, 300}, {3, 15, 515},   {1, 385, 259},  {400, 33, 3},
                                      {9, 48, 1030},  {41, 96, 800},  {25, 1024, 130}};
  uint64_t seed = 5;
  size_t i;
  for (i = 0; i < sizeof shapes / sizeof shapes[0]; ++i) {
    const int32_t *s = shapes[i];
    compare(s[0], s[1], s[2], MOE__B_PANELS, 1, 0, 0, 0, &seed);
    compare(s[0], s[1], s[2], MOE__B_COLS, 1, 0, 0, 1, &seed);
    compare(s[0], s[1], s[2], MOE__B_PANELS, 0, 1, 0, 0, &seed);
    compare(s[0], s[1], s[2], MOE__B_ROWS, 0, 1, 0, 0, &seed);
    compare(s[0], s[1], s[2], MOE__B_ROWS, 0, 1, 1, 3, &seed);
    CHECK_STATE();
  }
}

/* Several tiles each way, several blocks of k, an edge of less than a panel, rows on cache lines
   and not. */
static void test_gemm_weight_gradients_equal_the_definition(void) {
  static const int32_t shapes[][3] = {{200, 784, 133}, {140, 829, 65}, {8, 48, 200},
                                      {77, 61, 16},    {21, 96, 0},    {801, 64, 70},
                                      {27, 1633, 129}, {523, 49, 257}};
  uint64_t seed = 17;
  size_t i;
  for (i = 0; i < sizeof shapes / sizeof shapes[0]; ++i) {
    const int32_t *s = shapes[i];
    compare(s[0], s[1], s[2], MOE__B_ROWS, 0, 1, 1, 0, &seed);
    compare(s[0], s[1], s[2], MOE__B_ROWS, 0, 1, 1, 3, &seed);
    CHECK_STATE();
  }
}

static void test_gemm_random_shapes_equal_the_definition(void) {
  static const moe__b_layout layouts[3] = {MOE__B_PANELS, MOE__B_ROWS, MOE__B_COLS};
  uint64_t seed = 11;
  int round;
  for (round = 0; round < 400; ++round) {
    int32_t m = 1 + (int32_t)(fabsf(test_random(&seed)) * 40.0f),
            n = 1 + (int32_t)(fabsf(test_random(&seed)) * 120.0f);
    int32_t k = (int32_t)(fabsf(test_random(&seed)) * 70.0f);
    moe__b_layout layout = layouts[round % 3];
    int weight = layout != MOE__B_ROWS && round & 4, transposed = !weight && round & 8;
    compare(m, n, k, layout, weight, !weight && round & 16, transposed, round % 5, &seed);
    CHECK_STATE();
  }
}

static void test_gemm_packs_into_panels_of_16(void) {
  static const int32_t shapes[][2] = {{16, 8}, {1, 1}, {17, 3}, {40, 21}, {5, 64}, {0, 4}, {3, 0}};
  uint64_t seed = 2;
  size_t i, s;
  for (i = 0; i < sizeof shapes / sizeof shapes[0]; ++i) {
    int32_t rows = shapes[i][0], cols = shapes[i][1], j, p;
    float *w = test_floats((size_t)rows * (size_t)cols, &seed),
          *panels = test_floats(moe_pack_floats(rows, cols), &seed);
    CHECK(moe_pack_floats(rows, cols) == (size_t)((rows + 15) / 16 * 16) * (size_t)cols,
          "size of %d x %d", (int)rows, (int)cols);
    for (s = 0; s < ISAS; ++s) {
      moe_env env;
      if (moe_env_init(&env, isas[s])) continue;
      moe_pack(panels, w, rows, cols, &env);
      for (j = 0; j < (rows + 15) / 16 * 16; ++j)
        for (p = 0; p < cols; ++p) {
          float want = j < rows ? w[j * cols + p] : 0.0f,
                got = panels[(j / 16 * cols + p) * 16 + j % 16];
          CHECK(moe__bits(want) == moe__bits(got), "%s: (%d, %d) of %d x %d", moe_isa_name(isas[s]),
                (int)j, (int)p, (int)rows, (int)cols);
        }
    }
    free(w), free(panels);
  }
}

static void test_gemm_lists_give_the_same_bits_for_any_number_of_threads(void) {
#ifdef MOE_NO_THREADS
  SKIP("built without threads");
#else
  enum { COUNT = 5, N = 200, K = 150 };
  static const int32_t ms[COUNT] = {300, 0, 1, 77, 130}; /* like experts, one of them empty */
  static const int32_t threads[] = {1, 2, 3, 8};
  uint64_t seed = 21;
  float *a = test_floats(600 * K, &seed), *b = test_floats(COUNT * N * K, &seed),
        *first = test_floats(600 * N, &seed);
  float *c = test_floats(600 * N, &seed);
  size_t t, i;
  for (t = 0; t < sizeof threads / sizeof threads[0]; ++t) {
    moe_env env;
    moe_pool *pool;
    moe__gemm list[COUNT];
    size_t row = 0;
    moe_env_init(&env, MOE_ISA_AUTO);
    CHECK(!moe_pool_create_exact(&pool, threads[t], &env), "%d threads", (int)threads[t]);
    memset(list, 0, sizeof list);
    memset(c, 0, 600 * N * sizeof *c);
    for (i = 0; i < COUNT; ++i) {
      list[i].m = ms[i], list[i].n = N, list[i].k = K;
      list[i].a = a + row * K, list[i].a_row = K, list[i].a_col = 1;
      list[i].b = b + i * N * K, list[i].b_row = N, list[i].b_layout = MOE__B_ROWS;
      list[i].c = c + row * N, list[i].c_row = N;
      row += (size_t)ms[i];
    }
    moe__gemm_run(list, COUNT, &env);
    if (t == 0) memcpy(first, c, 600 * N * sizeof *c);
    CHECK(!memcmp(first, c, 600 * N * sizeof *c), "%d threads", (int)threads[t]);
    memset(c, 0, 600 * N * sizeof *c);
    for (i = 0; i < COUNT; ++i) moe__gemm_run(&list[i], 1, &env);
    CHECK(!memcmp(first, c, 600 * N * sizeof *c), "one product at a time");
    moe_pool_free(pool);
  }
  free(a), free(b), free(first), free(c);
#endif
}

/* Panels of rows and of columns by every instruction set, for all widths that a block may have. */
static void test_gemm_kernels_pack_every_width(void) {
  enum { K = 5, LD = 53 };
  uint64_t seed = 12;
  float *src = test_floats(LD * LD, &seed), got[48 * K], want[48 * K];
  moe_env env;
  size_t width, p, j;
  int s;
  for (s = 0; s < ISAS; ++s) {
    const moe__gemm_kernels *kernels;
    if (moe_env_init(&env, isas[s])) continue;
    kernels = MOE__V_PICK(env.isa, gemms);
    for (width = 1; width <= 48; ++width) {
      size_t padded = (width + 15) / 16 * 16;
      memset(want, 0, sizeof want);
      memset(got, 0xff, sizeof got);
      for (p = 0; p < K; ++p)
        for (j = 0; j < width; ++j) want[j / 16 * 16 * K + p * 16 + j % 16] = src[p * LD + j];
      kernels->pack_rows(got, src, LD, width, K);
      CHECK(!memcmp(got, want, padded * K * sizeof *got), "rows: %s, width %zu",
            moe_isa_name(env.isa), width);
      if (width > 16) continue;
      memset(want, 0, sizeof want);
      for (p = 0; p < K; ++p)
        for (j = 0; j < width; ++j) want[p * 16 + j] = src[j * LD + p];
      kernels->pack_cols(got, src, LD, width, K);
      CHECK(!memcmp(got, want, 16 * K * sizeof *got), "columns: %s, width %zu",
            moe_isa_name(env.isa), width);
    }
  }
  free(src);
}

static void run_gemm(void) {
  RUN(test_gemm_kernels_pack_every_width);
  RUN(test_gemm_packs_into_panels_of_16);
  RUN(test_gemm_small_shapes_equal_the_definition);
  RUN(test_gemm_weight_gradients_equal_the_definition);
  RUN(test_gemm_random_shapes_equal_the_definition);
  RUN(test_gemm_blocks_and_tiles_equal_the_definition);
  RUN(test_gemm_lists_give_the_same_bits_for_any_number_of_threads);
}
