/* Products with bf16 operands: every set of kernels against the definition to the bit, AMX by its
   own definition, on the hardware or with its instructions emulated (amx.h); and whole models. */

enum { BF16_ROOM = 96 * 1024 };

static float bf16_weights[BF16_ROOM], bf16_x[BF16_ROOM], bf16_bias[1024], bf16_y[BF16_ROOM],
    bf16_pre[BF16_ROOM], bf16_wanted[BF16_ROOM], begun[BF16_ROOM], packed_fp32[BF16_ROOM],
    sums[1024], all_sums[1024];
static unsigned char bf16_panels[4 * BF16_ROOM];

static uint32_t bf16_drawn;
static uint32_t bf16_random32(void) { return moe__hash32(11, ++bf16_drawn); }
static float bf16_random_float(void) {
  return (float)(int32_t)bf16_random32() * (1.0f / 2147483648.0f);
}

/* Every set of kernels that can run here, as an environment of one thread; returns 0 behind the
   last one. */
enum { PLAIN, AVX2, FMA, DOT, MIXED, AMX, SETS };
static const char *const set_name[] = {"plain C",   "plain C for avx2",         "avx512",
                                       "vdpbf16ps", "vdpbf16ps for a few rows", "amx"};
static int bf16_amx_real, bf16_amx_here;

static int bf16_kernels_env(int which, moe_env *env) {
  static const moe_isa isa[SETS] = {MOE_ISA_SCALAR, MOE_ISA_AVX2,   MOE_ISA_AVX512,
                                    MOE_ISA_AVX512, MOE_ISA_AVX512, MOE_ISA_AVX512};
  for (; which < SETS; ++which) {
    if (moe_env_init(env, isa[which])) continue;
    if ((which == DOT || which == MIXED) && !(env->cpu_flags & MOE_CPU_AVX512_BF16)) continue;
    if (which == AMX && !bf16_amx_here) continue;
    if (which == MIXED)
      env->cpu_flags = MOE_CPU_AVX512_BF16 | MOE_CPU_SLOW_BF16;
    else
      env->cpu_flags = which == DOT   ? (uint32_t)MOE_CPU_AVX512_BF16
                       : which == AMX ? (uint32_t)MOE_CPU_AMX_BF16
                                      : 0u;
    env->precision = MOE_TYPE_BF16;
    return which + 1;
  }
  return 0;
}

/* ---- the definitions ---- */

static float flushed(float a) {
  return moe__bits(a) & 0x7f800000u ? a : moe__floats(moe__bits(a) & 0x80000000u);
}
static float rounded(float a) { return moe__floats(moe__bf16_round(a)); }

/* start + sum over p of a[p a_step] b[p b_step] */
static float define_chain(float sum, const float *a, size_t a_step, const float *b, size_t b_step,
                          size_t k) {
  size_t p;
  for (p = 0; p < k; p += 2) {
    sum = moe__bf16_fma(p + 1 < k ? rounded(a[(p + 1) * a_step]) : 0,
                        p + 1 < k ? rounded(b[(p + 1) * b_step]) : 0, sum);
    sum = moe__bf16_fma(rounded(a[p * a_step]), rounded(b[p * b_step]), sum);
  }
  return sum;
}

static float define_amx(float sum, const float *a, size_t a_step, const float *b, size_t b_step,
                        size_t k) {
  size_t p, end;
  for (p = 0; p < k;) {
    float half[2] = {0, 0};
    for (end = p + 32; p < end; ++p)
      half[p % 2] = moe__bf16_fma(p < k ? rounded(a[p * a_step]) : 0,
                                  p < k ? rounded(b[p * b_step]) : 0, half[p % 2]);
    sum = moe__bf16_fma(1, flushed(moe__bf16_fma(1, half[0], half[1])), sum);
  }
  return sum;
}

static float bf16_define(int set, float sum, const float *a, size_t a_step, const float *b,
                         size_t b_step, size_t k) {
  return set == AMX ? define_amx(sum, a, a_step, b, b_step, k)
                    : define_chain(sum, a, a_step, b, b_step, k);
}

/* Same bits, or both no number. */
static int bf16_same(const float *a, const float *b, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i)
    if (moe__bits(a[i]) != moe__bits(b[i]) && !(isnan(a[i]) && isnan(b[i]))) return 0;
  return 1;
}

/* How far a sum of k products may be from the sum in double: two roundings of 2^-8 each, and fp32
   sums. */
static int within(float got, double start, const float *a, const float *b, size_t b_step,
                  size_t k) {
  double sum = start, size = fabs(start);
  size_t p;
  for (p = 0; p < k; ++p) {
    sum += (double)a[p] * (double)b[p * b_step];
    size += fabs((double)a[p] * (double)b[p * b_step]);
  }
  return fabs((double)got - sum) <= size * (2.02 / 256 + (double)(k + 8) * 1.2e-7);
}

static void draw(float *to, size_t n) {
  while (n-- > 0) *to++ = bf16_random_float();
}

/* ---- rounding, steps ---- */

static void test_bf16_rounds_to_nearest_even(void) {
  static const uint32_t pair[][2] = {{0, 0},
                                     {0x80000000u, 0x80000000u},
                                     {0x3f800000u, 0x3f800000u},
                                     {0x3f808000u, 0x3f800000u},
                                     {0x3f818000u, 0x3f820000u},
                                     {0x3f808001u, 0x3f810000u},
                                     {0x3f807fffu, 0x3f800000u},
                                     {0xbf818000u, 0xbf820000u},
                                     {0x7f7fffffu, 0x7f800000u},
                                     {0x7f800000u, 0x7f800000u},
                                     {0xff800000u, 0xff800000u},
                                     {0x7f800001u, 0x7fc00000u},
                                     {0xffffffffu, 0xffff0000u},
                                     {0x007fffffu, 0},
                                     {0x807fffffu, 0x80000000u},
                                     {0x00800000u, 0x00800000u},
                                     {0x00000001u, 0},
                                     {0x3fffffffu, 0x40000000u}};
  size_t n = sizeof pair / sizeof *pair, i;
  moe_env env;
  int which;
  for (i = 0; i < n; ++i)
    CHECK(moe__bf16_round(moe__floats(pair[i][0])) == pair[i][1], "%08x: %08x",
          (unsigned)pair[i][0], (unsigned)moe__bf16_round(moe__floats(pair[i][0])));
  for (i = 0; i < BF16_ROOM; ++i)
    bf16_x[i] = moe__floats(i < n   ? pair[i][0]
                            : i % 3 ? bf16_random32()
                                    : bf16_random32() & 0x80ffffffu);
#ifdef MOE__X86
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    const moe__bf16_kernels *kernels = moe__bf16_pick(&env, 16);
    uint32_t *to = (uint32_t *)(void *)bf16_panels;
    size_t length;
    if (!kernels) continue; /* plain C copies nothing */
    kernels->floats(to, BF16_ROOM, bf16_x, 0, 1, BF16_ROOM);
    for (i = 0; i < BF16_ROOM; ++i)
      CHECK(to[i] == moe__bf16_round(bf16_x[i]), "%s: %08x", set_name[which - 1],
            (unsigned)moe__bits(bf16_x[i]));
    for (length = 0; length < 70; ++length) {
      memset(to, 0x55, 200);
      kernels->along(to, BF16_ROOM, bf16_x + length, 0, 1, length);
      for (i = 0; i < (length + 31) / 32 * 32; ++i)
        CHECK((i % 2 ? to[i / 2] & 0xffff0000u : to[i / 2] << 16) ==
                  (i < length ? moe__bf16_round(bf16_x[length + i]) : 0),
              "%s: pairs of %d", set_name[which - 1], (int)length);
      CHECK(to[(length + 31) / 32 * 16] == 0x55555555u, "written behind the end");
    }
  }
#else
  (void)env, (void)which;
#endif
}

/* Panels of weights, and of the same weights turned round: the same bytes by every set of kernels,
   and where they should be. */
static void test_bf16_packs_the_same_panels(void) {
  static const int32_t sizes[][2] = {{1, 1}, {16, 32}, {17, 33}, {40, 7}, {31, 64}, {5, 130}};
  uint32_t *got = (uint32_t *)(void *)bf16_panels;
  moe_env env;
  size_t i;
  int which, back;
  for (i = 0; i < sizeof sizes / sizeof *sizes; ++i)
    for (back = 0; back < 2; ++back)
      for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
        int32_t rows = sizes[i][0], cols = sizes[i][1], n = back ? cols : rows,
                k = back ? rows : cols, j, t;
        size_t words = moe_pack_bf16_bytes(n, k) / 4;
        draw(bf16_weights, (size_t)rows * (size_t)cols);
        memset(got, 0x55, 4 * words + 4);
        if (back)
          moe__pack_bf16_back(got, bf16_weights, rows, cols, &env);
        else
          moe_pack_bf16(got, bf16_weights, rows, cols, &env);
        for (j = 0; j < (n + 15) / 16 * 16; ++j)
          for (t = 0; t < (k + 1) / 2; ++t) {
            const float *w = bf16_weights + (back ? 2 * t * cols + j : j * cols + 2 * t);
            uint32_t first = j < n ? moe__bf16_round(w[0]) : 0u;
            uint32_t second = j < n && 2 * t + 1 < k ? moe__bf16_round(w[back ? cols : 1]) : 0u;
            CHECK(got[(j / 16 * ((k + 1) / 2) + t) * 16 + j % 16] == (first >> 16 | second),
                  "%s: output %d, pair %d of %d x %d", set_name[which - 1], (int)j, (int)t,
                  (int)rows, (int)cols);
          }
        CHECK(got[words] == 0x55555555u, "written behind the end");
      }
}

static void test_bf16_steps_equal_the_processor(void) {
  moe_env env;
  int which, i;
  long round;
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    if (which - 1 == AMX) continue; /* is tested as a whole product */
    for (round = 0; round < 20000;
         ++round) { /* also around the denormals, where it matters what is flushed when */
      uint32_t b[16], a[2], mask = round % 3 ? 0x87ffffffu : 0xffffffffu,
                            fewer = round % 3 == 1 ? 0x20000000u : 0u;
      float start[16], c[16], x[2];
      moe__gemm g; /* one row times one step of one panel */
      memset(&g, 0, sizeof g);
      for (i = 0; i < 16; ++i) {
        b[i] = ((bf16_random32() & mask) | fewer) & 0xffff0000u;
        b[i] |= ((bf16_random32() & mask) | fewer) >> 16;
        start[i] = moe__floats(bf16_random32() & (round % 3 ? 0x83ffffffu : mask));
        if (!(b[i] & 0x7f800000u))
          b[i] &= 0x8000ffffu; /* operands have been rounded: no denormals */
        if (!(b[i] & 0x7f80u)) b[i] &= 0xffff8000u;
      }
      for (i = 0; i < 2; ++i) {
        a[i] = moe__bf16_round(moe__floats((bf16_random32() & mask) | fewer));
        x[i] = moe__floats(a[i]);
      }
      g.m = 1;
      g.n = 16;
      g.k = 2;
      g.a = x;
      g.a_row = 2;
      g.a_col = 1;
      g.b = (const float *)(const void *)b;
      g.b_layout = MOE__B_PAIRS;
      g.c = c;
      g.c_row = 16;
      g.bias = start;
      moe__gemm_run(&g, 1, &env);
      for (i = 0; i < 16; ++i) {
        float want = moe__bf16_fma(moe__floats(a[1]), moe__floats(b[i] & 0xffff0000u), start[i]);
        want = moe__bf16_fma(moe__floats(a[0]), moe__floats(b[i] << 16), want);
        CHECK(bf16_same(&want, &c[i], 1),
              "%s: (%08x %08x) (%08x) + %08x = %08x, by definition %08x", set_name[which - 1],
              (unsigned)a[0], (unsigned)a[1], (unsigned)b[i], (unsigned)moe__bits(start[i]),
              (unsigned)moe__bits(c[i]), (unsigned)moe__bits(want));
      }
    }
  }
}

/* ---- products ---- */

/* A forward product by every set of kernels and from every layout. */
static void check_forward(int32_t m, int32_t n, int32_t k, int strange) {
  moe_env env;
  int which, layout;
  int32_t i, j;
  size_t count = (size_t)m * (size_t)n;
  const float *b = n % 2 ? bf16_bias : NULL;
  draw(bf16_weights, (size_t)n * (size_t)k);
  draw(bf16_x, (size_t)m * (size_t)k);
  draw(bf16_bias, (size_t)n);
  if (strange) /* denormals, infinities, no numbers */
    for (i = 0; i < n * k; ++i) {
      if (i % 7 == 3) bf16_weights[i] = moe__floats(bf16_random32());
      if (i % 11 == 5 && i < m * k) bf16_x[i] = moe__floats(bf16_random32() & 0x81ffffffu);
    }
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    int set = which - 1;
    for (i = 0; i < m; ++i)
      for (j = 0; j < n; ++j) {
        bf16_wanted[i * n + j] =
            bf16_define(set, b ? b[j] : 0, bf16_x + i * k, 1, bf16_weights + j * k, 1, (size_t)k);
        if (!strange)
          CHECK(within(bf16_wanted[i * n + j], b ? (double)b[j] : 0, bf16_x + i * k,
                       bf16_weights + j * k, 1, (size_t)k),
                "far from the sum in double");
      }
    CHECK(moe_pack_bf16_bytes(n, k) < sizeof bf16_panels && moe_pack_floats(n, k) <= BF16_ROOM,
          "room");
    memset(bf16_panels, 0x7f, sizeof bf16_panels);
    moe_pack_bf16(bf16_panels, bf16_weights, n, k, &env);
    CHECK(bf16_panels[moe_pack_bf16_bytes(n, k)] == 0x7f, "packed behind the end");
    moe_pack(packed_fp32, bf16_weights, n, k, &env);
    for (layout = 0; layout < 3; ++layout) {
      moe_mat mat = layout == 0   ? moe_mat_panels_bf16(bf16_panels, n, k)
                    : layout == 1 ? moe_mat_rows(bf16_weights, n, k)
                                  : moe_mat_panels(packed_fp32, n, k);
      memset(bf16_y, 0x7f, sizeof(float) * (count + 1));
      linear_forward(bf16_y, bf16_x, &mat, b, m, &env);
      CHECK(bf16_same(bf16_y, bf16_wanted, count), "%d x %d x %d, %s, layout %d", (int)m, (int)n,
            (int)k, set_name[set], layout);
      CHECK(moe__bits(bf16_y[count]) == 0x7f7f7f7fu, "%d x %d x %d: written behind the end", (int)m,
            (int)n, (int)k);
      if (layout || strange) continue;
      linear_gelu_forward(bf16_y, bf16_pre, bf16_x, &mat, b, m, &env);
      CHECK(bf16_same(bf16_pre, bf16_wanted, count), "%d x %d x %d, %s: before GELU", (int)m,
            (int)n, (int)k, set_name[set]);
      moe_gelu_forward(bf16_pre, bf16_wanted, count, &env);
      CHECK(bf16_same(bf16_y, bf16_pre, count), "%d x %d x %d, %s: GELU", (int)m, (int)n, (int)k,
            set_name[set]);
    }
#ifdef MOE__AMX
    CHECK(!amx.configured, "tiles were not released");
#endif
  }
}

static void test_bf16_forward_equals_the_definition(void) {
  static const int32_t n[] = {1, 2, 3, 4, 7, 15, 16, 17, 33, 48, 49, 64, 65, 97},
                       k[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 64, 67};
  int32_t m;
  size_t i;
  for (m = 1; m <= 34; ++m) {
    check_forward(m, n[(size_t)m % 14], k[(size_t)(m * 5) % 13], 0);
    CHECK_STATE();
  }
  for (i = 0; i < 14 * 13; i += 3) {
    check_forward((int32_t)(i % 5) + 1, n[i % 14], k[i / 14], 0);
    CHECK_STATE();
  }
  check_forward(5, 20, 2001, 0); /* several blocks of k */
  CHECK_STATE();
  check_forward(3, 30, 1000, 0);
  CHECK_STATE();
  check_forward(100, 17, 35, 0); /* several tiles of rows */
  CHECK_STATE();
  check_forward(1, 200, 129, 0);
}

static void test_bf16_takes_strange_numbers(void) {
  int round;
  for (round = 0; round < 6; ++round) {
    check_forward(round * 5 + 1, 35, 41 + round, 1);
    CHECK_STATE();
  }
}

/* dx += dy W, dw += dy^T x, db += sums of dy: W (n, k), x (m, k), dy (m, n) */
static void check_backward(int32_t m, int32_t n, int32_t k) {
  static float dy[BF16_ROOM], dx[BF16_ROOM], dw[BF16_ROOM], want_dx[BF16_ROOM], want_dw[BF16_ROOM];
  moe_env env, fp32;
  moe_mat mat = moe_mat_rows(bf16_weights, n, k);
  int which;
  int32_t i, j;
  draw(bf16_weights, (size_t)n * (size_t)k);
  draw(bf16_x, (size_t)m * (size_t)k);
  draw(dy, (size_t)m * (size_t)n);
  draw(begun, BF16_ROOM);
  moe_env_init(&fp32, MOE_ISA_AUTO);
  memset(all_sums, 0, sizeof all_sums);
  linear_backward(NULL, NULL, all_sums, dy, bf16_x, &mat, m, &fp32);
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    int set = which - 1;
    for (i = 0; i < m; ++i)
      for (j = 0; j < k; ++j) {
        want_dx[i * k + j] = bf16_define(set, begun[i * k + j], dy + i * n, 1, bf16_weights + j,
                                         (size_t)k, (size_t)n);
        CHECK(within(want_dx[i * k + j], (double)begun[i * k + j], dy + i * n, bf16_weights + j,
                     (size_t)k, (size_t)n),
              "dx is far from the sum in double");
      }
    for (i = 0; i < n; ++i)
      for (j = 0; j < k; ++j)
        want_dw[i * k + j] =
            bf16_define(set, begun[i * k + j], dy + i, (size_t)n, bf16_x + j, (size_t)k, (size_t)m);
    memcpy(dx, begun, sizeof dx);
    memcpy(dw, begun, sizeof dw);
    memset(sums, 0, sizeof sums);
    linear_backward(dx, dw, sums, dy, bf16_x, &mat, m, &env);
    CHECK(bf16_same(dx, want_dx, (size_t)m * (size_t)k) && bf16_same(dx + m * k, begun + m * k, 8),
          "dx: %d x %d x %d, %s", (int)m, (int)n, (int)k, set_name[set]);
    CHECK(bf16_same(dw, want_dw, (size_t)n * (size_t)k) && bf16_same(dw + n * k, begun + n * k, 8),
          "dw: %d x %d x %d, %s", (int)m, (int)n, (int)k, set_name[set]);
    CHECK(bf16_same(sums, all_sums, (size_t)n), "db is a sum in fp32: %d x %d, %s", (int)m, (int)n,
          set_name[set]);
    memset(sums, 0, sizeof sums);
    linear_backward(NULL, NULL, sums, dy, bf16_x, &mat, m, &env);
    CHECK(bf16_same(sums, all_sums, (size_t)n), "db alone");
  }
}

static void test_bf16_gradients_equal_the_definition(void) {
  static const int32_t size[][3] = {
      {1, 1, 1},      {2, 3, 5},      {3, 17, 16},  {16, 16, 16}, {17, 33, 20},
      {31, 20, 49},   {33, 48, 50},   {40, 37, 20}, {97, 18, 35}, {100, 15, 3},
      {5, 130, 17},   {200, 5, 34},   {3, 300, 9},  {330, 3, 2},  {20, 100, 70},
      {1100, 20, 17}, {515, 150, 18}, {2, 1000, 20}}; /* the last ones: more than a chunk of k */
  size_t i;
  for (i = 0; i < sizeof size / sizeof *size; ++i) {
    check_backward(size[i][0], size[i][1], size[i][2]);
    CHECK_STATE();
  }
}

static void test_bf16_empty_products(void) {
  moe_env env;
  int which;
  bf16_bias[0] = 0.5f;
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    moe_mat mat = moe_mat_panels_bf16(bf16_panels, 1, 0);
    CHECK(moe_pack_bf16_bytes(1, 0) == 0 && moe_pack_bf16_bytes(0, 5) == 0, "bytes of nothing");
    moe_pack_bf16(bf16_panels, bf16_weights, 1, 0, &env);
    bf16_y[0] = 7;
    linear_forward(bf16_y, bf16_x, &mat, bf16_bias, 0, &env);
    CHECK_NEAR(bf16_y[0], 7, 0);
    linear_forward(bf16_y, bf16_x, &mat, bf16_bias, 1, &env);
    CHECK_NEAR(bf16_y[0], 0.5, 0);
    mat = moe_mat_rows(bf16_weights, 1, 0);
    linear_forward(bf16_y, bf16_x, &mat, NULL, 1, &env);
    CHECK_NEAR(bf16_y[0], 0, 0);
    linear_backward(bf16_y, bf16_y, NULL, bf16_x, bf16_x, &mat, 3, &env);
    mat = moe_mat_rows(bf16_weights, 3, 2);
    linear_backward(bf16_y, bf16_y, sums, bf16_x, bf16_x, &mat, 0, &env);
    CHECK_NEAR(bf16_y[0], 0, 0);
  }
}

/* Experts of different numbers of rows, forward and backward. */
static uint64_t experts_hash(const moe_env *env, int32_t M) {
  enum { N = 3, K = 2, H = 24, F = 39, MOST = 70 };
  static float w[2 * N * F * H], d[2 * N * F * H], b[N * F], inner[MOST * K * F], e[MOST * K * H],
      out[MOST * H], dx[MOST * H], dweight[MOST * K];
  static float weight[MOST * K], prob[MOST * N];
  static int32_t expert[MOST * K], order[MOST * K], start[N + 1];
  float *scratch = (float *)malloc(sizeof(float) * moe_experts_scratch(M, K, H, F, 1));
  const float *in[N], *outs[N], *biases[N];
  float *d_in[N], *d_out[N];
  moe_mat in_mat[N], out_mat[N];
  moe_experts_op op;
  moe_routes r;
  uint64_t hash;
  int32_t i, j, at = 0;
  bf16_drawn = 500;
  draw(w, sizeof w / sizeof *w);
  draw(b, sizeof b / sizeof *b);
  draw(bf16_x, (size_t)M * H);
  draw(weight, (size_t)M * K);
  memset(d, 0, sizeof d);
  memset(dx, 0, sizeof dx);
  memset(&r, 0, sizeof r);
  r.M = M;
  r.N = N;
  r.k = K;
  r.expert = expert;
  r.weight = weight;
  r.prob = prob;
  r.start = start;
  r.order = order;
  for (i = 0; i < M * K; ++i) expert[i] = i % 2 ? 2 : i % 7 ? 0 : 1;
  for (i = 0; i < N; ++i) {
    start[i] = at;
    for (j = 0; j < M * K; ++j)
      if (expert[j] == i) order[at++] = j;
    in[i] = w + (size_t)i * F * H;
    outs[i] = w + (size_t)(N + i) * F * H;
    d_in[i] = d + (size_t)i * F * H;
    d_out[i] = d + (size_t)(N + i) * F * H;
    biases[i] = b + i * F;
    in_mat[i] = moe_mat_rows(in[i], F, H);
    out_mat[i] = moe_mat_rows(outs[i], H, F);
  }
  start[N] = at;
  moe_experts_op_init(&op);
  op.y = out, op.pre = inner, op.e = e, op.x = bf16_x, op.routes = &r;
  op.in = in_mat, op.out = out_mat, op.b_in = biases, op.b_out = biases;
  op.N = N, op.H = H, op.F = F, op.scratch = scratch;
  op.dx = dx, op.dweight = dweight, op.d_in = d_in, op.d_out = d_out, op.dy = out;
  op.w_in = in, op.w_out = outs;
  (void)moe_experts_forward(&op, env);
  (void)moe_experts_backward(&op, env);
  free(scratch);
  hash = models_hash(out, sizeof(float) * (size_t)(M * H)) ^
         models_hash(dx, sizeof(float) * (size_t)(M * H)) * 3;
  return M == MOST ? hash ^ models_hash(d, sizeof d) * 5 : models_hash(out, sizeof(float) * 3 * H);
}

static void test_bf16_bits_do_not_depend_on_threads(void) {
  static const int32_t threads[] = {2, 3, 8};
  moe_env env;
  int which;
  size_t i;
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    uint64_t one = experts_hash(&env, 70);
    float *serial = bf16_wanted;
    const int32_t m = 40, n = 150, k = 90;
    moe_mat mat = moe_mat_rows(bf16_weights, n, k);
    bf16_drawn = 900;
    draw(bf16_weights, (size_t)n * (size_t)k);
    draw(bf16_x, (size_t)m * (size_t)k);
    linear_forward(serial, bf16_x, &mat, NULL, m, &env);
    for (i = 0; i < 3; ++i) {
      moe_env e = env;
      moe_pool *pool = NULL;
      CHECK(!moe_pool_create_exact(&pool, threads[i], &e), "pool");
      moe_pack_bf16(bf16_panels, bf16_weights, n, k, &e);
      mat = moe_mat_panels_bf16(bf16_panels, n, k);
      linear_forward(bf16_y, bf16_x, &mat, NULL, m, &e);
      CHECK(bf16_same(bf16_y, serial, (size_t)(m * n)), "%s, %d threads: forward",
            set_name[which - 1], threads[i]);
      CHECK(experts_hash(&e, 70) == one, "%s, %d threads: experts", set_name[which - 1],
            threads[i]);
      bf16_drawn = 900;
      draw(bf16_weights, (size_t)n * (size_t)k);
      draw(bf16_x, (size_t)m * (size_t)k);
      moe_pool_free(pool);
    }
  }
}

/* A gradient of so many tokens and weights that it is cut into chunks and parts. */
static void test_bf16_gradients_do_not_depend_on_threads(void) {
  static float dy[BF16_ROOM], one[BF16_ROOM], dw[BF16_ROOM];
  const int32_t m = 600, n = 150, k = 97;
  moe_mat mat = moe_mat_rows(bf16_weights, n, k);
  moe_env env;
  int which;
  draw(dy, (size_t)m * (size_t)n);
  draw(bf16_x, (size_t)m * (size_t)k);
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    moe_pool *pool = NULL;
    memset(one, 0, sizeof one);
    memset(dw, 0, sizeof dw);
    memset(all_sums, 0, sizeof all_sums);
    memset(sums, 0, sizeof sums);
    linear_backward(NULL, one, all_sums, dy, bf16_x, &mat, m, &env);
    CHECK(!moe_pool_create(&pool, 3, &env), "pool");
    linear_backward(NULL, dw, sums, dy, bf16_x, &mat, m, &env);
    CHECK(bf16_same(dw, one, (size_t)(n * k)) && bf16_same(sums, all_sums, (size_t)n), "%s",
          set_name[which - 1]);
    moe_pool_free(pool);
  }
}

static void test_bf16_rows_do_not_depend_on_the_others(void) {
  moe_env env;
  int which;
  int32_t i;
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    const int32_t m = 37, n = 70, k = 90;
    moe_mat mat = moe_mat_panels_bf16(bf16_panels, n, k);
    draw(bf16_weights, (size_t)n * (size_t)k);
    draw(bf16_x, (size_t)m * (size_t)k);
    moe_pack_bf16(bf16_panels, bf16_weights, n, k, &env);
    linear_forward(bf16_wanted, bf16_x, &mat, NULL, m, &env);
    for (i = 0; i < m; i += i % 5 + 1) {
      linear_forward(bf16_y, bf16_x + i * k, &mat, NULL, moe__min(i % 5 + 1, m - i), &env);
      CHECK(bf16_same(bf16_y, bf16_wanted + i * n, (size_t)(n * moe__min(i % 5 + 1, m - i))),
            "%s: row %d", set_name[which - 1], (int)i);
    }
  }
}

/* ---- what is asked for ---- */

static void test_bf16_precision_is_granted_or_explained(void) {
  moe_env env;
  int isa;
  for (isa = MOE_ISA_SCALAR; isa < MOE_ISA_COUNT; ++isa) {
    moe_status status;
    int has;
    if (!moe_isa_available((moe_isa)isa)) continue;
    env = models_env((moe_isa)isa);
    CHECK(env.precision == MOE_TYPE_F32, "fp32 unless asked for");
    status = moe_env_set_precision(&env, MOE_TYPE_BF16);
    has = isa == MOE_ISA_AVX512 && ((env.cpu_flags & MOE_CPU_AVX512_BF16) || bf16_amx_real);
    CHECK(status == (has ? MOE_OK : MOE_E_UNSUPPORTED), "%s: %s", moe_isa_name((moe_isa)isa),
          moe_status_text(status));
    CHECK(env.precision == (has ? MOE_TYPE_BF16 : MOE_TYPE_F32), "%s: precision",
          moe_isa_name((moe_isa)isa));
    CHECK(has || strstr(said, "stay fp32"), "%s", said);
    CHECK(!(env.cpu_flags & MOE_CPU_AMX_BF16) || bf16_amx_real, "AMX is used without leave");
    CHECK(moe_env_set_precision(&env, MOE_TYPE_I8) == MOE_E_ARGUMENT && strstr(said, "int8"), "%s",
          said);
    CHECK(moe_env_set_precision(&env, MOE_TYPE_F32) == MOE_OK && env.precision == MOE_TYPE_F32,
          "back");
    env.cpu_flags &= ~(uint32_t)MOE_CPU_AVX512_BF16;
    if (!bf16_amx_real)
      CHECK(moe_env_set_precision(&env, MOE_TYPE_BF16) == MOE_E_UNSUPPORTED,
            "a feature that was forgone");
  }
}

/* A system that refuses AMX to this process. The rest is as if there were no AMX. */
static void test_bf16_goes_on_where_the_system_refuses_amx(void) {
#ifdef MOE__AMX
  int status = 0;
  pid_t child;
  fflush(stdout);
  child = fork();
  if (!child) {
    long refused;
    moe_env env;
    moe_status got;
    if (!amx_refuse()) _exit(2);
    __asm__ volatile("syscall"
                     : "=a"(refused)
                     : "0"(158L), "D"(0x1023L), "S"(18L)
                     : "rcx", "r11", "memory");
    if (refused != -1) _exit(3);
    moe_env_init(&env, MOE_ISA_AUTO);
    got = moe_env_set_precision(&env, MOE_TYPE_BF16);
    if (env.cpu_flags & MOE_CPU_AMX_BF16) _exit(4);
    if (got != (env.cpu_flags & MOE_CPU_AVX512_BF16 ? MOE_OK : MOE_E_UNSUPPORTED)) _exit(5);
    _exit(env.precision == (got ? MOE_TYPE_F32 : MOE_TYPE_BF16) ? 0 : 6);
  }
  CHECK(child > 0 && waitpid(child, &status, 0) == child, "no child");
  if (WIFEXITED(status) && WEXITSTATUS(status) == 2) SKIP("this system filters no system calls");
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d",
        WIFEXITED(status) ? WEXITSTATUS(status) : -1);
#else
  SKIP("no Linux on x86-64");
#endif
}

static void test_bf16_leaves_the_processor_as_it_was(void) {
#ifdef MOE__X86
  moe_env env;
  int which;
  unsigned before = _mm_getcsr();
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    experts_hash(&env, 20);
    CHECK((_mm_getcsr() & ~0x3fu) == (before & ~0x3fu), "%s: rounding and flushing are others now",
          set_name[which - 1]);
  }
#else
  SKIP("no such register here");
#endif
}

static void test_bf16_amx_runs(void) {
  moe_env env;
  if (!bf16_amx_here) SKIP("no AMX, and no AVX512-BF16 (or no Linux on x86-64) to emulate it");
  bf16_kernels_env(AMX, &env);
  experts_hash(&env, 20);
  printf("        %s\n", bf16_amx_real
                             ? "on the hardware"
                             : "instructions emulated: this processor or system has no AMX");
#ifdef MOE__AMX
  CHECK(bf16_amx_real || amx_count > 100, "only %d instructions were emulated", amx_count);
#endif
}

/* ---- models ---- */

static models_batch bf16_batch;
static moe_task bf16_tasks[MODELS_TASKS];

/* Scores of a batch, as a hash. */
static uint64_t scores_hash(const moe_model *model, const moe_env *env) {
  static float scores[MODELS_S * 8];
  moe_context *context = NULL;
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  uint64_t hash = 0;
  memset(scores, 0, sizeof scores);
  if (!moe_context_create(&context, model, &limits, env) &&
      !moe_forward(context, scores, &bf16_batch.b, env))
    hash = models_hash(scores, sizeof scores);
  moe_context_free(context);
  return hash;
}

/* Packed or not, in which precision ever: the bits are those of env.precision. */
static void test_bf16_models_have_bits_whatever_is_packed(void) {
  moe_env fp32 = models_env(MOE_ISA_AUTO), env;
  int which, odd;
  models_tasks(bf16_tasks);
  for (odd = 0; odd < 2; ++odd) {
    moe_config c = models_config(MOE_ROUTER_TASK, 3, 2);
    moe_model *model;
    uint64_t plain, in_fp32, scalar = 0;
    void *raw, *block;
    if (!odd) c.hidden = 32, c.ffn = 48;
    model = models_create(&c, bf16_tasks, MODELS_TASKS, &fp32);
    CHECK(model, "%s", said);
    models_random_batch(&bf16_batch, model, 7, 9, 3);
    CHECK(odd || moe_model_pack_size_bf16(model) * 2 == moe_model_pack_size(model),
          "half the bytes");
    in_fp32 = scores_hash(model, &fp32);
    for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
      plain = scores_hash(model, &env);
      CHECK(plain && plain != in_fp32, "%s: bf16 has bits of its own", set_name[which - 1]);
      if (which - 1 == PLAIN) scalar = plain;
      CHECK(which - 1 == AMX || plain == scalar, "%s: other bits than plain C",
            set_name[which - 1]);
      CHECK(!moe_model_pack(model, NULL, &fp32) && scores_hash(model, &env) == plain,
            "%s: packed for fp32", set_name[which - 1]);
      CHECK(!moe_model_pack(model, NULL, &env) && scores_hash(model, &env) == plain,
            "%s: packed for bf16", set_name[which - 1]);
      CHECK(scores_hash(model, &fp32) == in_fp32, "fp32 with weights packed for bf16");
      block = models_block(
          &raw,
          moe_model_pack_size_bf16(model)); /* of exactly this size: the sanitizers watch its end */
      CHECK(!moe_model_pack(model, block, &env) && scores_hash(model, &env) == plain,
            "%s: packed into a block", set_name[which - 1]);
      CHECK(!moe_model_pack(model, NULL, &fp32) && scores_hash(model, &fp32) == in_fp32,
            "fp32 again");
      free(raw);
      moe_model_free(model);
      model = models_create(&c, bf16_tasks, MODELS_TASKS, &fp32);
    }
    moe_model_free(model);
  }
}

static void test_bf16_heads_stay_fp32(void) {
  moe_env fp32 = models_env(MOE_ISA_AUTO), env;
  moe_config c = models_config(MOE_ROUTER_SHARED, 2, 1);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  static float scores[MODELS_S * 8], again[8];
  int which;
  models_tasks(bf16_tasks);
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    moe_model *model = models_create(&c, bf16_tasks, 2, &fp32);
    moe_context *context = NULL;
    int32_t s, t;
    models_random_batch(&bf16_batch, model, 5, 9, 4);
    CHECK(model && !moe_context_create(&context, model, &limits, &env) &&
              !moe_forward(context, scores, &bf16_batch.b, &env),
          "%s", said);
    for (s = 0; s < 5; ++s) {
      moe_mat mat;
      t = bf16_batch.task[s];
      mat = moe_mat_rows(model->weights + model->head[t], bf16_tasks[t].classes, c.hidden);
      linear_forward(
          again, moe_context_hidden(context) + (size_t)bf16_batch.start[s] * (size_t)c.hidden, &mat,
          model->weights + model->head[t] + bf16_tasks[t].classes * c.hidden, 1, &fp32);
      CHECK(bf16_same(again, scores + s * moe_model_max_classes(model),
                      (size_t)bf16_tasks[t].classes),
            "%s: sequence %d", set_name[which - 1], (int)s);
    }
    moe_context_free(context);
    moe_model_free(model);
  }
}

static void test_bf16_leaves_int8_models_alone(void) {
  moe_env fp32 = models_env(MOE_ISA_AUTO), env = fp32;
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_model *model, *small = NULL;
  models_tasks(bf16_tasks);
  model = models_create(&c, bf16_tasks, MODELS_TASKS, &fp32);
  env.precision = MOE_TYPE_BF16;
  CHECK(model && !moe_model_quantize(&small, model, &env), "%s", said);
  models_random_batch(&bf16_batch, model, 7, 9, 3);
  CHECK(moe_model_pack_size(small) == moe_model_pack_size_bf16(small), "bytes");
  CHECK(scores_hash(small, &env) == scores_hash(small, &fp32), "other bits");
  moe_model_free(small);
  moe_model_free(model);
}

static uint64_t routes_hash(const moe_context *context, int32_t layers) {
  uint64_t hash = 0;
  int32_t l;
  for (l = 0; l < layers; ++l) {
    moe_routes routes;
    if (moe_context_routes(context, l, &routes)) return 0;
    hash = hash * 31 +
           models_hash(routes.expert, (size_t)(routes.M * routes.k) * sizeof *routes.expert);
  }
  return hash;
}

/* Losses of some steps on changing batches, and a hash of the routes of each (or NULL); returns a
   hash of the weights after them, 0 when something failed. */
static uint64_t bf16_train(double *losses, uint64_t *routes, int steps, moe_router router,
                           const moe_env *env) {
  moe_config c = models_config(router, router == MOE_ROUTER_DENSE ? 1 : 3, 1);
  moe_train_config config;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_model *model;
  moe_trainer *trainer = NULL;
  uint64_t hash = 0;
  int step;
  moe_train_config_init(&config);
  config.steps = 100;
  config.lr = 5e-4f;
  config.dropout = 0.1f;
  models_tasks(bf16_tasks);
  model = models_create(&c, bf16_tasks, MODELS_TASKS, env);
  if (model && !moe_trainer_create(&trainer, model, &limits, &config, env)) {
    for (step = 0; step < steps; ++step) {
      float loss = 0;
      models_random_batch(&bf16_batch, model, 12, 12, 50 + (uint64_t)step % 2);
      if (moe_trainer_accumulate(trainer, &bf16_batch.b, 0, &loss, NULL, env) ||
          moe_trainer_step(trainer, NULL, env))
        break;
      losses[step] = (double)loss;
      if (routes) routes[step] = routes_hash(moe_trainer_context(trainer), c.layers);
    }
    if (step == steps)
      hash = models_hash(moe_model_weights(model), moe_model_parameters(model) * sizeof(float));
  }
  moe_trainer_free(trainer);
  moe_model_free(model);
  return hash;
}

static void test_bf16_training_follows_fp32(void) {
  static const moe_router router[] = {MOE_ROUTER_DENSE, MOE_ROUTER_TASK};
  double want[20], got[20], worst = 0;
  uint64_t want_routes[20], routes[20];
  moe_env fp32 = models_env(MOE_ISA_AUTO), env;
  int which, i, step;
  for (i = 0; i < 2; ++i) {
    uint64_t plain = 0, hash;
    CHECK(bf16_train(want, want_routes, 20, router[i], &fp32), "%s", said);
    for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
      int steps = which - 1 == AMX && !bf16_amx_real ? 4 : 20,
          distant = 0; /* a gate at a tie may send a token elsewhere: a step's loss differs */
      hash = bf16_train(got, routes, steps, router[i], &env);
      CHECK(hash, "%s: %s", set_name[which - 1], said);
      if (which - 1 == PLAIN) plain = hash;
      CHECK(which - 1 == AMX || hash == plain, "%s: other weights than with plain C",
            set_name[which - 1]);
      for (step = 0; step < steps; ++step) {
        double error = fabs(got[step] - want[step]) / want[step];
        if (error > worst) worst = error;
        CHECK(error < (routes[step] == want_routes[step] ? 0.05 : 0.15),
              "%s, step %d: loss %.5f, fp32 %.5f", set_name[which - 1], step + 1, got[step],
              want[step]);
        distant += error >= 0.05;
      }
      CHECK(distant <= 1, "%s: the losses of %d steps are not those of fp32", set_name[which - 1],
            distant);
    }
    CHECK(want[19] < want[1] && want[18] < want[0], "nothing was learnt");
  }
  printf("        worst loss: %.1e from fp32's\n", worst);
}

static void test_bf16_training_does_not_depend_on_threads(void) {
  static const int32_t threads[] = {2, 3};
  double losses[4];
  moe_env env;
  int which;
  size_t i;
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    int steps = which - 1 == AMX && !bf16_amx_real ? 2 : 4;
    uint64_t want = bf16_train(losses, NULL, steps, MOE_ROUTER_TASK, &env);
    CHECK(want, "%s", set_name[which - 1]);
    for (i = 0; i < 2; ++i) {
      moe_env e = env;
      moe_pool *pool = NULL;
      CHECK(!moe_pool_create_exact(&pool, threads[i], &e), "pool");
      CHECK(bf16_train(losses, NULL, steps, MOE_ROUTER_TASK, &e) == want,
            "%s, %d threads: other bits", set_name[which - 1], threads[i]);
      moe_pool_free(pool);
    }
  }
}

/* Gradients of inputs by weights packed for them, or packed on the way: the same bits, and they
   follow an update. */
static void test_bf16_gradients_have_bits_whatever_is_packed(void) {
  moe_env fp32 = models_env(MOE_ISA_AUTO), env;
  int which, router;
  models_tasks(bf16_tasks);
  for (router = 0; router < 2; ++router)
    for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
      moe_config c = models_config(router ? MOE_ROUTER_TASK : MOE_ROUTER_DENSE, router ? 3 : 1, 1);
      moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
      moe_train_config config;
      moe_model *model;
      moe_trainer *trainer = NULL;
      uint64_t hash;
      size_t bytes;
      if (which - 1 == AVX2 || which - 1 == MIXED) continue;
      c.hidden = 32;
      c.ffn = 48;
      moe_train_config_init(&config);
      config.steps = 2;
      model = models_create(&c, bf16_tasks, MODELS_TASKS, &env);
      CHECK(model && !moe_trainer_create(&trainer, model, &limits, &config, &env) && model->back,
            "%s", said);
      models_random_batch(&bf16_batch, model, 5, 9, 9);
      bytes = moe_model_parameters(model) * sizeof(float);
      CHECK(!moe_trainer_accumulate(trainer, &bf16_batch.b, 0, NULL, NULL, &env) &&
                !moe_trainer_step(trainer, NULL, &env) && model->back,
            "%s", said);
      CHECK(!moe_trainer_accumulate(trainer, &bf16_batch.b, 0, NULL, NULL, &env), "%s", said);
      hash = models_hash(moe_trainer_gradients(trainer), bytes);
      memset(moe_trainer_gradients(trainer), 0, bytes);
      CHECK(!moe_model_pack(model, NULL, &fp32) && !model->back, "%s", said);
      CHECK(!moe_trainer_accumulate(trainer, &bf16_batch.b, 0, NULL, NULL, &env), "%s", said);
      CHECK(models_hash(moe_trainer_gradients(trainer), bytes) == hash, "%s, router %d: other bits",
            set_name[which - 1], router);
      moe_trainer_free(trainer);
      moe_model_free(model);
    }
}

static void test_bf16_gradients_are_near_those_of_fp32(void) {
  moe_env fp32 = models_env(MOE_ISA_AUTO), env;
  moe_config c = models_config(MOE_ROUTER_DENSE, 1, 1);
  moe_train_config config;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_model *model;
  moe_trainer *trainer = NULL;
  double worst = 0;
  float *want, error = 1;
  size_t i, n;
  int which, t;
  models_tasks(bf16_tasks);
  moe_train_config_init(&config);
  config.steps = 1;
  config.dropout = 0;
  model = models_create(&c, bf16_tasks, MODELS_TASKS, &fp32);
  CHECK(model && !moe_trainer_create(&trainer, model, &limits, &config, &fp32), "%s", said);
  models_random_batch(&bf16_batch, model, 10, 12, 9);
  n = moe_model_parameters(model);
  want = (float *)malloc(n * sizeof *want);
  CHECK(want && !moe_trainer_accumulate(trainer, &bf16_batch.b, 0, NULL, NULL, &fp32), "%s", said);
  memcpy(want, moe_trainer_gradients(trainer), n * sizeof *want);
  for (which = 0; (which = bf16_kernels_env(which, &env)) != 0;) {
    memset(moe_trainer_gradients(trainer), 0, n * sizeof *want);
    CHECK(!moe_trainer_accumulate(trainer, &bf16_batch.b, 0, NULL, NULL, &env), "%s", said);
    for (t = 0; t < moe_model_tensors(model); ++t) {
      moe_tensor tensor;
      double distant = 0, size = 0;
      moe_model_tensor(model, t, &tensor);
      if (strstr(tensor.name, "key.bias"))
        continue; /* softmax takes it out: its gradient is rounding, and nothing else */
      for (i = tensor.offset; i < tensor.offset + tensor.count; ++i) {
        double d = (double)moe_trainer_gradients(trainer)[i] - (double)want[i];
        distant += d * d;
        size += (double)want[i] * (double)want[i];
      }
      if (size > 0 && sqrt(distant / size) > worst) worst = sqrt(distant / size);
      CHECK(distant <= size * 0.03 * 0.03, "%s: %s is %.3f of its norm from fp32",
            set_name[which - 1], tensor.name, sqrt(distant / size));
    }
  }
  memset(moe_trainer_gradients(trainer), 0, n * sizeof *want);
  bf16_kernels_env(PLAIN, &env);
  CHECK(!moe_gradcheck(trainer, &bf16_batch.b, 40, &error, &env) && error < 5e-3f,
        "gradcheck is of fp32 always: %g", (double)error);
  printf("        worst gradient of a tensor: %.1e of its norm from fp32's\n", worst);
  free(want);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

static void run_bf16(void) {
  moe_env env;
  amx_count = 0;
  bf16_amx_real = (moe__amx_allowed() & MOE_CPU_AMX_BF16) != 0;
  moe_env_init(&env, MOE_ISA_AUTO);
  bf16_amx_here = bf16_amx_real || ((env.cpu_flags & MOE_CPU_AVX512_BF16) &&
                                    amx_install()); /* AMX's kernels round by the former */
  RUN(test_bf16_rounds_to_nearest_even);
  RUN(test_bf16_packs_the_same_panels);
  RUN(test_bf16_steps_equal_the_processor);
  RUN(test_bf16_forward_equals_the_definition);
  RUN(test_bf16_takes_strange_numbers);
  RUN(test_bf16_gradients_equal_the_definition);
  RUN(test_bf16_empty_products);
  RUN(test_bf16_bits_do_not_depend_on_threads);
  RUN(test_bf16_gradients_do_not_depend_on_threads);
  RUN(test_bf16_rows_do_not_depend_on_the_others);
  RUN(test_bf16_precision_is_granted_or_explained);
  RUN(test_bf16_goes_on_where_the_system_refuses_amx);
  RUN(test_bf16_leaves_the_processor_as_it_was);
  RUN(test_bf16_amx_runs);
  RUN(test_bf16_models_have_bits_whatever_is_packed);
  RUN(test_bf16_heads_stay_fp32);
  RUN(test_bf16_leaves_int8_models_alone);
  RUN(test_bf16_training_follows_fp32);
  RUN(test_bf16_training_does_not_depend_on_threads);
  RUN(test_bf16_gradients_have_bits_whatever_is_packed);
  RUN(test_bf16_gradients_are_near_those_of_fp32);
}
