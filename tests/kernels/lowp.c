/* Products with weights of 8 bits: every kernel against sums in 64 bits (those of AMX on the
   hardware or with its instructions emulated, amx.h), the bounds of quantisation, and int8 models.
   */

enum { LOWP_ROOM = 64 * 1024 };

static int8_t lowp_weights[LOWP_ROOM], original[LOWP_ROOM];
static float scales[1024], lowp_bias[1024], lowp_x[LOWP_ROOM], lowp_y[LOWP_ROOM],
    lowp_wanted[LOWP_ROOM], source[LOWP_ROOM], lowp_pre[LOWP_ROOM];
static unsigned char lowp_panels[17 * LOWP_ROOM];

static uint32_t lowp_drawn;
static uint32_t lowp_random32(void) { return moe__hash32(7, ++lowp_drawn); }
static float lowp_random_float(void) {
  return (float)(int32_t)lowp_random32() * (1.0f / 2147483648.0f);
}

/* Every set of kernels that can run here, as an environment; returns 0 behind the last one. The
   last but one has AMX for any number of rows, the last one only where it is to be chosen. */
static int lowp_amx_real, lowp_amx_here;

static int lowp_kernels_env(int which, moe_env *env) {
  static const moe_isa isa[] = {MOE_ISA_SCALAR, MOE_ISA_V128,   MOE_ISA_AVX2, MOE_ISA_AVX2,
                                MOE_ISA_AVX512, MOE_ISA_AVX512, MOE_ISA_NEON, MOE_ISA_NEON,
                                MOE_ISA_AVX512, MOE_ISA_AVX512};
  static const uint32_t feature[] = {0,
                                     0,
                                     0,
                                     MOE_CPU_AVX_VNNI,
                                     0,
                                     MOE_CPU_AVX512_VNNI,
                                     0,
                                     MOE_CPU_NEON_DOT,
                                     MOE_CPU_AMX_INT8,
                                     MOE_CPU_AMX_INT8 | MOE_CPU_AVX512_VNNI};
  for (; which < (int)(sizeof isa / sizeof isa[0]); ++which) {
    if (moe_env_init(env, isa[which])) continue;
    if (lowp_amx_here) env->cpu_flags |= MOE_CPU_AMX_INT8;
    if ((env->cpu_flags & feature[which]) != feature[which]) continue;
    env->cpu_flags = feature[which];
    return which + 1;
  }
  return 0;
}

/* The definition, in plain words: the integers of a row and its scale. */
static float integers(int32_t *q, const float *row, int32_t k) {
  float most = 0;
  int32_t p;
  for (p = 0; p < k; ++p)
    if (fabsf(row[p]) > most) most = fabsf(row[p]);
  for (p = 0; p < k; ++p) q[p] = most < 1e-36f ? 0 : (int32_t)nearbyintf(row[p] * (127.0f / most));
  return most < 1e-36f ? 0 : most / 127.0f;
}

static void lowp_define(float *out, int32_t m, int32_t n, int32_t k, int with_bias) {
  static int32_t q[LOWP_ROOM];
  int32_t i, j, p;
  for (i = 0; i < m; ++i) {
    float scale = integers(q, lowp_x + i * k, k);
    for (j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (p = 0; p < k; ++p) sum += (int64_t)q[p] * lowp_weights[j * k + p];
      out[i * n + j] = moe__fmaf((float)sum, scale * scales[j], with_bias ? lowp_bias[j] : 0.0f);
    }
  }
}

/* A product by all kernels, rows and panels, against the definition. extreme: only -128, -127 and
   127. */
static void check_product(int32_t m, int32_t n, int32_t k, int extreme) {
  moe_env env;
  int which, layout;
  int32_t i;
  for (i = 0; i < n * k; ++i) {
    lowp_weights[i] = (int8_t)(int32_t)(lowp_random32() % 256u - 128u);
    if (extreme) lowp_weights[i] = (int8_t)(extreme == 1 ? -128 : lowp_random32() % 3 ? -127 : 127);
  }
  for (i = 0; i < m * k; ++i)
    lowp_x[i] = extreme == 1 ? (i / k % 2 ? -3.5f : 3.5f)
                : extreme    ? (lowp_random32() & 1 ? 1.0f : -1.0f)
                             : lowp_random_float();
  for (i = 0; i < n; ++i)
    scales[i] = 0.001f * lowp_random_float(), lowp_bias[i] = lowp_random_float();
  lowp_define(lowp_wanted, m, n, k, n % 2);
  for (which = 0; (which = lowp_kernels_env(which, &env)) != 0;) {
    CHECK(moe_pack_int8_bytes(n, k) <= sizeof lowp_panels, "panels of %d x %d", (int)n, (int)k);
    moe_pack_int8(lowp_panels, lowp_weights, n, k, &env);
    for (layout = 0; layout < 2; ++layout) {
      moe_mat mat = layout ? moe_mat_panels_int8(lowp_panels, scales, n, k)
                           : moe_mat_rows_int8(lowp_weights, scales, n, k);
      memset(lowp_y, 0x7f, sizeof(float) * (size_t)(m * n + 1));
      linear_forward(lowp_y, lowp_x, &mat, n % 2 ? lowp_bias : NULL, m, &env);
      CHECK(!memcmp(lowp_y, lowp_wanted, sizeof(float) * (size_t)(m * n)),
            "%d x %d x %d, %s with features %u, %s", (int)m, (int)n, (int)k, moe_isa_name(env.isa),
            (unsigned)env.cpu_flags, layout ? "panels" : "rows");
      CHECK(moe__bits(lowp_y[m * n]) == 0x7f7f7f7fu, "%d x %d x %d: written behind the end", (int)m,
            (int)n, (int)k);
#ifdef MOE__AMX
      CHECK(!amx.configured, "tiles were not released");
#endif
    }
  }
}

static void test_lowp_kernels_equal_the_definition(void) {
  static const int32_t n[] = {1, 2, 3, 4, 7, 15, 16, 17, 33, 48, 49, 64, 95, 130},
                       k[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 64, 67, 129, 384};
  int32_t m;
  size_t i;
  for (m = 1; m <= 33; ++m) {
    check_product(m, n[(size_t)m % 14], k[(size_t)(m * 5) % 13], 0);
    CHECK_STATE();
    check_product(m, n[(size_t)(m * 3) % 14], k[(size_t)m % 13], 0);
    CHECK_STATE();
  }
  for (i = 0; i < 14 * 13; ++i) {
    check_product((int32_t)(i % 11) + 1, n[i % 14], k[i / 14], 0);
    CHECK_STATE();
  }
  check_product(70, 50, 100, 0);
  check_product(3, 1, 20000, 0); /* rows so long that few are quantised at a time */
  check_product(5, 20, 3001, 0);
  check_product(2, 70, 900, 0); /* in plain C: several chunks of a row, blocks of outputs */
  check_product(3, 65, 512, 0);
  check_product(2, 66, 513, 0);
}

/* What becomes of the last step of k, of rows and of columns on tiles, which want k of 61 or more.
 */
static void test_lowp_tiles_equal_the_definition(void) {
  static const int32_t n[] = {1, 16, 17, 33, 48, 50, 64, 65, 97},
                       k[] = {60, 61, 64, 65, 99, 120, 128, 131, 192};
  int32_t m;
  for (m = 1; m <= 45; ++m) {
    check_product(m, n[m % 9], k[m * 4 % 9], 0);
    CHECK_STATE();
    check_product(m % 5 + 1, n[m * 2 % 9], k[m / 5 % 9], 0);
    CHECK_STATE();
  }
  check_product(34, 20, 1800, 0); /* rows so long that 32 of them have no room, */
  CHECK_STATE();
  check_product(17, 10, 3700, 0);
  CHECK_STATE();
  check_product(5, 5, 12000, 0); /* then 16, */
  CHECK_STATE();
  check_product(3, 2, 21000, 0); /* then 3 */
  CHECK_STATE();
  if (!lowp_amx_here)
    SKIP("no AMX, and no AVX-512 (or no Linux on x86-64) to emulate it: other kernels only");
  printf("        AMX %s\n",
         lowp_amx_real ? "on the hardware"
                       : "with its instructions emulated: this processor or system has none");
#ifdef MOE__AMX
  CHECK(lowp_amx_real || amx_count > 1000, "only %d instructions were emulated", amx_count);
#endif
}

/* Tiles where they take fewer cycles than VNNI, as counted in moe__int8_tiles_pay. */
static void test_lowp_tiles_are_for_three_rows_and_more(void) {
#ifdef MOE__AMX
  moe_env env;
  int32_t m;
  if (!lowp_amx_here || lowp_amx_real)
    SKIP("instructions are counted where they are emulated only");
  if (!lowp_kernels_env(9, &env)) SKIP("no AVX512-VNNI");
  for (m = 1; m <= 35; ++m) {
    moe_mat mat = moe_mat_panels_int8(lowp_panels, scales, 16, 128);
    int before = amx_count;
    memset(lowp_x, 0, sizeof(float) * (size_t)m * 128);
    linear_forward(lowp_y, lowp_x, &mat, NULL, m, &env);
    CHECK((amx_count > before) == (m > 2), "%d rows: %d instructions of AMX", (int)m,
          amx_count - before);
  }
#else
  SKIP("no AMX kernels in this build");
#endif
}

/* What a program can ask for never ends in an instruction that this machine lacks: whatever
   instruction set is named, whether the system grants AMX or refuses it. */
static void test_lowp_never_traps(void) {
#ifdef MOE__AMX
  int refused;
  for (refused = 0; refused < 2; ++refused) {
    int status = 0;
    pid_t child;
    fflush(stdout);
    child = fork();
    if (!child) {
      int isa;
      signal(SIGILL, SIG_DFL); /* no emulation */
      if (refused && !amx_refuse()) _exit(2);
      for (isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; ++isa) {
        moe_env env;
        moe_mat mat = moe_mat_panels_int8(lowp_panels, scales, 33, 130);
        int32_t granted, i;
        (void)moe_env_init(&env, (moe_isa)isa);
        granted = moe_env_use_amx(&env);
        if (granted && (refused || env.isa != MOE_ISA_AVX512)) _exit(3);
        if (granted != ((env.cpu_flags & (MOE_CPU_AMX_INT8 | MOE_CPU_AMX_BF16)) != 0)) _exit(4);
        for (i = 0; i < 33 * 130; ++i) lowp_weights[i] = (int8_t)(i % 251 - 125);
        for (i = 0; i < 33; ++i) scales[i] = 0.5f;
        for (i = 0; i < 40 * 130; ++i) lowp_x[i] = (float)(i % 17);
        lowp_define(lowp_wanted, 40, 33, 130, 0);
        moe_pack_int8(lowp_panels, lowp_weights, 33, 130, &env);
        linear_forward(lowp_y, lowp_x, &mat, NULL, 40, &env);
        if (memcmp(lowp_y, lowp_wanted, sizeof(float) * 40 * 33)) _exit(5);
      }
      _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child, "no child");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 2) SKIP("this system filters no system calls");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d",
          WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
  }
#else
  SKIP("no Linux on x86-64");
#endif
}

static void test_lowp_nothing_saturates(void) {
  int extreme;
  for (extreme = 1; extreme <= 2; ++extreme) {
    check_product(2, 17, 3000, extreme);
    CHECK_STATE();
    check_product(9, 16, 1536, extreme);
    CHECK_STATE();
    check_product(1, 1, LOWP_ROOM - 16, extreme); /* sums of 2^30 */
    CHECK_STATE();
  }
}

static void test_lowp_empty_products(void) {
  moe_env env;
  moe_mat mat;
  int which;
  scales[0] = lowp_bias[0] = 0.5f;
  for (which = 0; (which = lowp_kernels_env(which, &env)) != 0;) {
    moe_pack_int8(lowp_panels, lowp_weights, 1, 0, &env);
    mat = moe_mat_panels_int8(lowp_panels, scales, 1, 0);
    lowp_y[0] = 7;
    linear_forward(lowp_y, lowp_x, &mat, lowp_bias, 0, &env);
    CHECK(moe__bits(lowp_y[0]) == moe__bits(7.0f), "no rows, yet written");
    linear_forward(lowp_y, lowp_x, &mat, lowp_bias, 1, &env);
    CHECK(moe__bits(lowp_y[0]) == moe__bits(0.5f), "no columns: %g", (double)lowp_y[0]);
  }
}

static void test_lowp_integers_are_near(void) {
  moe_env env;
  int which;
  int32_t rows = 7, cols = 203, i, j;
  for (i = 0; i < rows * cols; ++i)
    source[i] = lowp_random_float() * (float)(1 << (i / cols * 3)) * 0.01f;
  for (j = 0; j < cols; ++j) source[3 * cols + j] = 0;      /* a row of zeros, */
  for (j = 0; j < cols; ++j) source[4 * cols + j] = 1e-40f; /* one below all that counts, */
  source[5 * cols + 202] = -1000; /* and one with its largest at the end */
  for (which = 0; (which = lowp_kernels_env(which, &env)) != 0;) {
    moe_quantize(lowp_weights, scales, source, rows, cols, &env);
    if (which == 1) memcpy(original, lowp_weights, (size_t)(rows * cols));
    CHECK(!memcmp(original, lowp_weights, (size_t)(rows * cols)), "%s differs from scalar",
          moe_isa_name(env.isa));
    for (i = 0; i < rows; ++i)
      for (j = 0; j < cols; ++j) {
        int32_t q = lowp_weights[i * cols + j];
        CHECK(q >= -127 && q <= 127, "%d", (int)q);
        CHECK(fabsf((float)q * scales[i] - source[i * cols + j]) <= 0.50001f * scales[i] + 1e-36f,
              "row %d: %g is %d times %g", (int)i, (double)source[i * cols + j], (int)q,
              (double)scales[i]);
      }
    CHECK(lowp_weights[5 * cols + 202] == -127 && !(scales[3] > 0) && !(scales[4] > 0), "extremes");
  }
}

static void test_lowp_rounds_ties_to_even(void) {
  static const float row[] = {127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f, 3.49f, 0, -127};
  static const int8_t expected[] = {127, 0, 2, 2, 0, -2, -2, 126, 3, 0, -127};
  moe_env env;
  int which;
  for (which = 0; (which = lowp_kernels_env(which, &env)) != 0;) {
    moe_quantize(lowp_weights, scales, row, 1, 11, &env);
    CHECK(!memcmp(lowp_weights, expected, 11) && moe__bits(scales[0]) == moe__bits(1.0f), "%s",
          moe_isa_name(env.isa));
  }
}

static void test_lowp_non_finite_rows_give_nan(void) {
  moe_env env;
  moe_mat mat;
  int which, i;
  memset(lowp_weights, 1, 20 * 40);
  for (i = 0; i < 20; ++i) scales[i] = 1;
  for (which = 0; (which = lowp_kernels_env(which, &env)) != 0;) {
    for (i = 0; i < 3 * 40; ++i) lowp_x[i] = 1;
    lowp_x[39] = moe__floats(0x7f800000u);
    lowp_x[40] = moe__floats(0x7fc00000u);
    moe_pack_int8(lowp_panels, lowp_weights, 20, 40, &env);
    mat = moe_mat_panels_int8(lowp_panels, scales, 20, 40);
    linear_forward(lowp_y, lowp_x, &mat, NULL, 3, &env);
    for (i = 0; i < 40; ++i)
      CHECK(lowp_y[i] != lowp_y[i], "output %d of a row that is not finite: %g", i,
            (double)lowp_y[i]);
    for (; i < 60; ++i) CHECK_NEAR(lowp_y[i], 40, 1e-4);
  }
}

/* Rows without a scale: their integers are 0, wherever in a vector the odd element is. */
static void test_lowp_rows_without_a_scale_have_integers_of_0(void) {
  static const uint32_t bits[] = {0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7fc00055u,
                                  0xffc00033u, 0x80000000u, 0x03000000u};
  moe_env env;
  int which, cols = 37, v, p;
  for (which = 0; (which = lowp_kernels_env(which, &env)) != 0;)
    for (v = 0; v < 7 * cols; ++v) {
      int finite = v / cols > 4;
      for (p = 0; p < cols; ++p) source[p] = finite ? 0.0f : (float)p;
      source[v % cols] = moe__floats(bits[v / cols]);
      memset(lowp_weights, 0x55, (size_t)cols + 1);
      scales[0] = 1;
      moe_quantize(lowp_weights, scales, source, 1, cols, &env);
      CHECK(finite ? scales[0] == 0 : scales[0] != scales[0], "%s: scale %g of %08x",
            moe_isa_name(env.isa), (double)scales[0], (unsigned)bits[v / cols]);
      for (p = 0; p < cols; ++p)
        CHECK(!lowp_weights[p], "%s: %08x at %d: integer %d is %d", moe_isa_name(env.isa),
              (unsigned)bits[v / cols], v % cols, p, lowp_weights[p]);
      CHECK(lowp_weights[cols] == 0x55, "written behind the end");
    }
}

static void test_lowp_products_are_near_fp32(void) {
  moe_env env;
  moe_mat exact, mat;
  int32_t m = 6, n = 40, k = 384, i;
  double error = 0, norm = 0;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (i = 0; i < n * k; ++i)
    source[i] = lowp_random_float() + lowp_random_float() + lowp_random_float();
  for (i = 0; i < m * k; ++i)
    lowp_x[i] = lowp_random_float() + lowp_random_float() + lowp_random_float();
  moe_quantize(lowp_weights, scales, source, n, k, &env);
  moe_pack_int8(lowp_panels, lowp_weights, n, k, &env);
  exact = moe_mat_rows(source, n, k);
  mat = moe_mat_panels_int8(lowp_panels, scales, n, k);
  linear_forward(lowp_wanted, lowp_x, &exact, NULL, m, &env);
  linear_forward(lowp_y, lowp_x, &mat, NULL, m, &env);
  for (i = 0; i < m * n; ++i) {
    error +=
        ((double)lowp_y[i] - (double)lowp_wanted[i]) * ((double)lowp_y[i] - (double)lowp_wanted[i]);
    norm += (double)lowp_wanted[i] * (double)lowp_wanted[i];
  }
  CHECK(sqrt(error / norm) < 0.015, "relative error %g", sqrt(error / norm));
}

static void test_lowp_gelu_and_threads_change_no_bit(void) {
  moe_env env, pooled;
  moe_mat mat;
  int32_t m = 67, n = 100, k = 300, i;
  int which;
  for (i = 0; i < n * k; ++i) lowp_weights[i] = (int8_t)(int32_t)(lowp_random32() % 255u - 127u);
  for (i = 0; i < m * k; ++i) lowp_x[i] = lowp_random_float();
  for (i = 0; i < n; ++i) scales[i] = 0.001f, lowp_bias[i] = lowp_random_float();
  for (which = 0; (which = lowp_kernels_env(which, &env)) != 0;) {
    moe_pool *pool = NULL;
    pooled = env;
    CHECK(moe_pool_create_exact(&pool, 3, &pooled) == MOE_OK, "no pool");
    moe_pack_int8(lowp_panels, lowp_weights, n, k, &env);
    mat = moe_mat_panels_int8(lowp_panels, scales, n, k);
    linear_forward(lowp_wanted, lowp_x, &mat, lowp_bias, m, &env);
    linear_gelu_forward(lowp_y, lowp_pre, lowp_x, &mat, lowp_bias, m, &pooled);
    CHECK(!memcmp(lowp_pre, lowp_wanted, sizeof(float) * (size_t)(m * n)), "kernels %d: threads",
          which);
    moe_gelu_forward(lowp_wanted, lowp_wanted, (size_t)(m * n), &env);
    CHECK(!memcmp(lowp_y, lowp_wanted, sizeof(float) * (size_t)(m * n)), "kernels %d: GELU", which);
    linear_gelu_forward(lowp_y, NULL, lowp_x, &mat, lowp_bias, m, &env);
    CHECK(!memcmp(lowp_y, lowp_wanted, sizeof(float) * (size_t)(m * n)),
          "kernels %d: GELU in place", which);
    moe_pool_free(pool);
  }
}

static models_batch lowp_batch;
enum { HIDDEN_ROOM = 800 * 40 };
static float hidden[2][HIDDEN_ROOM], lowp_scores[2][40 * 8];

/* Hidden states and scores of a model, one thread or three; forced: (L, M, k) or NULL. Returns the
   number of tokens, 0: failed. */
static int32_t run_model(int to, const moe_model *model, const int32_t *forced, int threads,
                         moe_env env) {
  moe_limits limits = {0, 0, 0, 0};
  moe_context *context = NULL;
  moe_pool *pool = NULL;
  int32_t M = lowp_batch.b.seq_start[lowp_batch.b.S], ok;
  limits.tokens = M;
  limits.sequences = lowp_batch.b.S;
  if (threads > 1 && moe_pool_create_exact(&pool, threads, &env)) return 0;
  ok = !moe_context_create(&context, model, &limits, &env);
  if (ok) {
    moe_context_force(context, forced);
    ok = !moe_forward(context, lowp_scores[to], &lowp_batch.b, &env);
    memcpy(hidden[to], moe_context_hidden(context),
           sizeof(float) * (size_t)(M * moe_model_config(model)->hidden));
  }
  moe_context_free(context);
  moe_pool_free(pool);
  return ok ? M : 0;
}

static size_t same_states(const moe_model *model, int32_t M) {
  return !memcmp(hidden[0], hidden[1],
                 sizeof(float) * (size_t)(M * moe_model_config(model)->hidden)) &&
         !memcmp(lowp_scores[0], lowp_scores[1],
                 sizeof(float) * (size_t)(lowp_batch.b.S * moe_model_max_classes(model)));
}

/* A model of floats and its int8 twin; variant: the router, with 3 added feature inputs; 6 and 7:
   blocks as experts, 8: gates made of task vectors. 1 and 7 are larger. */
static int twins(moe_model **model, moe_model **small, int variant, const moe_env *env) {
  static moe_task tasks[MODELS_TASKS];
  moe_router router = (moe_router)(variant % 3);
  moe_config c =
      models_config(router, router == MOE_ROUTER_DENSE ? 1 : 3, router == MOE_ROUTER_TASK ? 2 : 1);
  if (variant == 8)
    c = models_config(MOE_ROUTER_EMBEDDING, 3, 1);
  else if (variant > 5) {
    c = models_config(variant == 6 ? MOE_ROUTER_TASK_LEVEL : MOE_ROUTER_DENSE, 2, 1);
    c.unit = MOE_UNIT_BLOCK;
  } else if (variant > 2)
    c.feature_dim = MODELS_WIDTH, c.vocab = 0;
  if (variant == 1 || variant == 7) c.hidden = 64, c.ffn = 76; /* enough for tiles of AMX */
  models_tasks(tasks);
  *small = NULL;
  *model = models_create(&c, tasks, MODELS_TASKS, env);
  if (!*model) return 0;
  models_random_batch(&lowp_batch, *model, 9, 12, (uint64_t)variant + 3);
  return !moe_model_set_vocab(*model, "a\nb\n", 4, env) && !moe_model_quantize(small, *model, env);
}

static void test_lowp_model_is_near_its_parent(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int variant;
  for (variant = 0; variant < 9; ++variant) {
    static int32_t forced[2 * 800 * 2];
    moe_model *model, *small;
    double error = 0, norm = 0;
    int32_t M, i, count = variant % 3 == 2 ? 2 : 1;
    for (i = 0; i < 2 * 800 * 2; ++i)
      forced[i] = count == 2 ? (i % 2 ? 2 : 1)
                             : i % 3; /* a token that changes its expert is no rounding error */
    CHECK(twins(&model, &small, variant, &env), "%s", said);
    CHECK(moe_model_type(model) == MOE_TYPE_F32 && moe_model_type(small) == MOE_TYPE_I8, "types");
    M = run_model(0, model, variant < 6 || variant == 8 ? forced : NULL, 1, env);
    CHECK(M && run_model(1, small, variant < 6 || variant == 8 ? forced : NULL, 1, env), "%s",
          said);
    for (i = 0; i < M * 20; ++i) {
      error += pow((double)hidden[0][i] - (double)hidden[1][i], 2);
      norm += pow((double)hidden[0][i], 2);
    }
    CHECK(error > 0 && sqrt(error / norm) < 0.04, "variant %d: relative error %g", variant,
          sqrt(error / norm));
    moe_model_free(small);
    moe_model_free(model);
  }
}

static void test_lowp_model_has_the_same_bits_everywhere(void) {
  moe_env env = models_env(MOE_ISA_SCALAR), other;
  int variant, which;
  for (variant = 0; variant < 9; ++variant) {
    moe_model *model, *small;
    int32_t M;
    CHECK(twins(&model, &small, variant, &env), "%s", said);
    M = run_model(0, small, NULL, 1, env);
    CHECK(M, "%s", said);
    for (which = 0; (which = lowp_kernels_env(which, &other)) != 0;) {
      moe_model *again = NULL;
      other.log = models_log;
      CHECK(run_model(1, small, NULL, 1, other) && same_states(small, M), "variant %d, kernels %d",
            variant, which);
      CHECK(run_model(1, small, NULL, 3, other) && same_states(small, M),
            "variant %d, kernels %d, threads", variant, which);
      CHECK(!moe_model_quantize(&again, model, &other), "%s", said);
      CHECK(run_model(1, again, NULL, 1, other) && same_states(small, M),
            "variant %d, quantised by kernels %d", variant, which);
      moe_model_free(again);
    }
    moe_model_free(small);
    moe_model_free(model);
  }
}

static void test_lowp_model_survives_a_file(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int variant;
  for (variant = 0; variant < 9; ++variant) {
    moe_model *model, *small, *read = NULL, *opened = NULL;
    models_file file, again, big;
    size_t bytes = 0, vocab;
    void *block, *mapped;
    int32_t M;
    CHECK(twins(&model, &small, variant, &env), "%s", said);
    M = run_model(0, small, NULL, 1, env);
    file = models_written(small, &env);
    big = models_written(model, &env);
    CHECK(file.used && file.used < big.used, "%zu bytes, %zu in floats", file.used, big.used);
    CHECK(!moe_model_read(&read, file.data, file.used, &env), "%s", said);
    CHECK(moe_model_type(read) == MOE_TYPE_I8 && moe_model_vocab(read, &vocab) && vocab == 4,
          "what was read");
    CHECK(M && run_model(1, read, NULL, 1, env) && same_states(small, M),
          "other bits after reading");
    again = models_written(read, &env);
    CHECK(again.used == file.used && !memcmp(again.data, file.data, file.used),
          "written again, it is another file");
    CHECK(!moe_model_open_size(file.data, file.used, &bytes, &env), "%s", said);
    block = moe__alloc(bytes);
    mapped = moe__alloc(file.used);
    memcpy(mapped, file.data, file.used);
    if (moe__little_endian()) {
      CHECK(!moe_model_open(&opened, mapped, file.used, block, bytes, &env), "%s", said);
      CHECK(run_model(1, opened, NULL, 1, env) && same_states(small, M), "other bits in place");
      CHECK(!moe_model_pack(opened, NULL, &env) && run_model(1, opened, NULL, 1, env) &&
                same_states(small, M),
            "other bits, packed in place");
      moe_model_free(opened);
    } else
      CHECK(moe_model_open(&opened, mapped, file.used, block, bytes, &env) == MOE_E_UNSUPPORTED,
            "opened, the wrong way round");
    moe__release(block);
    moe__release(mapped);
    free(file.data), free(again.data), free(big.data);
    moe_model_free(read);
    moe_model_free(small);
    moe_model_free(model);
  }
}

static void test_lowp_model_table_of_tensors(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int variant;
  for (variant = 0; variant < 9; ++variant) {
    moe_model *model, *small;
    moe_tensor t, original_tensor;
    size_t floats = 0, bytes = 0, scale_count = 0;
    int32_t i, scale;
    char name[160];
    CHECK(twins(&model, &small, variant, &env), "%s", said);
    for (i = 0; i < moe_model_tensors(small); ++i) {
      CHECK(!moe_model_tensor(small, i, &t), "tensor %d", (int)i);
      CHECK(moe_model_find_tensor(small, t.name) == i, "%s is not found", t.name);
      CHECK(t.offset == (t.type == MOE_TYPE_I8 ? bytes : floats), "%s at %zu", t.name, t.offset);
      if (t.type != MOE_TYPE_I8) {
        floats += t.count;
        CHECK(!bytes, "floats come first");
        continue;
      }
      bytes += t.count;
      CHECK(!moe_model_tensor(model, moe_model_find_tensor(model, t.name), &original_tensor), "%s",
            t.name);
      CHECK(t.dims == 2 && t.shape[0] == original_tensor.shape[0] &&
                t.shape[1] == original_tensor.shape[1],
            "%s: shape", t.name);
      snprintf(name, sizeof name, "%s.scale", t.name);
      scale = moe_model_find_tensor(small, name);
      CHECK(scale >= 0 && !moe_model_tensor(small, scale, &t) && t.dims == 1 &&
                t.shape[0] == original_tensor.shape[0],
            "%s", name);
      scale_count += t.count;
    }
    CHECK(moe_model_parameters(small) == moe_model_parameters(model) &&
              floats + bytes - scale_count == moe_model_parameters(model),
          "parameters");
    CHECK((moe_model_find_tensor(small, "encoder.layer.0.attention.self.query.weight") >= 0) ==
              (variant < 6 || variant == 8),
          "query");
    CHECK(moe_model_find_tensor(small, "heads.two.weight.scale") == -1, "heads stay floats");
    moe_model_free(small);
    moe_model_free(model);
  }
}

static void test_lowp_model_refuses_what_it_cannot(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_train_config train;
  moe_limits limits = {100, 10, 1, 0};
  moe_model *model, *small, *twice = NULL;
  moe_trainer *trainer = NULL;
  moe_context *context = NULL;
  size_t bytes = 0;
  int32_t first = 0;
  CHECK(twins(&model, &small, 2, &env), "%s", said);
  moe_train_config_init(&train);
  train.steps = 10;
  CHECK(moe_trainer_create(&trainer, small, &limits, &train, &env) == MOE_E_UNSUPPORTED && !trainer,
        "trained");
  CHECK(strstr(said, "int8") != NULL, "%s", said);
  CHECK(moe_trainer_size(small, &limits, &train, &bytes, &env) == MOE_E_UNSUPPORTED && !bytes,
        "sized");
  CHECK(moe_context_create(&context, small, &limits, &env) == MOE_E_UNSUPPORTED && !context,
        "a context for training");
  CHECK(moe_model_quantize(&twice, small, &env) == MOE_E_UNSUPPORTED && !twice, "quantised twice");
  CHECK(moe_model_extract(&twice, small, &first, 1, NULL, &env) == MOE_E_UNSUPPORTED && !twice,
        "a task taken out");
  CHECK(moe_model_adapt(&twice, small, moe_model_task(small, 0), 0, 1, &env) == MOE_E_UNSUPPORTED &&
            !twice,
        "a task taken in");
  CHECK(!moe_model_weights(small), "weights that could be changed");
  moe_model_weights(model)[7] = moe__floats(0x7fc00000u);
  CHECK(moe_model_quantize(&twice, model, &env) == MOE_E_NONFINITE && !twice, "NaN");
  CHECK(strstr(said, "word_embeddings") != NULL, "%s", said);
  moe_model_free(small);
  moe_model_free(model);
}

/* Puts `to` in place of the first `from` (equally long) in a copy of the file, reads that, and
   expects damage. */
static int damaged(const models_file *file, const char *from, const char *to, const moe_env *env) {
  unsigned char *copy = (unsigned char *)malloc(file->used), *at = copy;
  moe_model *model = NULL;
  moe_status status;
  size_t length = strlen(from);
  memcpy(copy, file->data, file->used);
  while (at + length < copy + file->used && memcmp(at, from, length)) ++at;
  memcpy(at, to, length);
  status = moe_model_read(&model, copy, file->used, env);
  free(copy);
  moe_model_free(model);
  return status == MOE_E_FORMAT;
}

static void test_lowp_damaged_files_are_found(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model, *small, *read = NULL;
  models_file file;
  size_t cut, header;
  moe_tensor t;
  static const unsigned char nan[4] = {0, 0, 0xc0, 0x7f}; /* files have the low byte first */
  CHECK(twins(&model, &small, 2, &env), "%s", said);
  file = models_written(small, &env);
  CHECK(damaged(&file, "query.weight.scale", "query.weight.scalf", &env),
        "a scale of another name");
  CHECK(
      damaged(&file, "1.attention.self.key.weight\",\"", "1.attention.self.kay.weight\",\"",
              &env) ||
          damaged(&file, "1.attention.self.key.weight\":", "1.attention.self.kay.weight\":", &env),
      "a matrix of another name");
  CHECK(damaged(&file, "\"I8\",\"shape\":[50,20]", "\"U8\",\"shape\":[50,20]", &env),
        "another type");
  CHECK(damaged(&file, "\"I8\",\"shape\":[50,20]", "\"I8\",\"shape\":[20,50]", &env),
        "another shape");
  for (cut = 1; cut < file.used; cut += cut < 3000 ? 97 : 1009) {
    CHECK(moe_model_read(&read, file.data, file.used - cut, &env) == MOE_E_FORMAT && !read,
          "%zu bytes less", cut);
  }
  header = (size_t)file.data[0] | (size_t)file.data[1] << 8 | (size_t)file.data[2] << 16;
  CHECK(!moe_model_tensor(
            small,
            moe_model_find_tensor(small, "encoder.layer.1.attention.output.dense.weight.scale"),
            &t),
        "no scale");
  memcpy(file.data + 8 + header + 4 * (t.offset + 3), nan, 4);
  CHECK(moe_model_read(&read, file.data, file.used, &env) == MOE_E_FORMAT && !read,
        "a scale that is NaN");
  CHECK(strstr(said, "dense.weight.scale") != NULL, "%s", said);
  free(file.data);
  moe_model_free(small);
  moe_model_free(model);
}

static void run_lowp(void) {
  amx_count = 0;
  lowp_amx_real = (moe__amx_allowed() & MOE_CPU_AMX_INT8) != 0;
  lowp_amx_here = lowp_amx_real || amx_install();
  RUN(test_lowp_kernels_equal_the_definition);
  RUN(test_lowp_tiles_equal_the_definition);
  RUN(test_lowp_tiles_are_for_three_rows_and_more);
  RUN(test_lowp_never_traps);
  RUN(test_lowp_nothing_saturates);
  RUN(test_lowp_empty_products);
  RUN(test_lowp_integers_are_near);
  RUN(test_lowp_rounds_ties_to_even);
  RUN(test_lowp_non_finite_rows_give_nan);
  RUN(test_lowp_rows_without_a_scale_have_integers_of_0);
  RUN(test_lowp_products_are_near_fp32);
  RUN(test_lowp_gelu_and_threads_change_no_bit);
  RUN(test_lowp_model_is_near_its_parent);
  RUN(test_lowp_model_has_the_same_bits_everywhere);
  RUN(test_lowp_model_survives_a_file);
  RUN(test_lowp_model_table_of_tensors);
  RUN(test_lowp_model_refuses_what_it_cannot);
  RUN(test_lowp_damaged_files_are_found);
}
