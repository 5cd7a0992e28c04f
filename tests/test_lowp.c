/* Products with weights of 8 bits: every kernel against sums in 64 bits; the bounds of quantisation. */
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

enum { ROOM = 64 * 1024 };

static int8_t weights[ROOM], original[ROOM];
static float scales[1024], bias[1024], x[ROOM], y[ROOM], wanted[ROOM], source[ROOM], pre[ROOM];
static unsigned char panels[17 * ROOM];

static uint32_t drawn;
static uint32_t random32(void) { return moe__hash32(7, ++drawn); }
static float random_float(void) { return (float)(int32_t)random32() * (1.0f / 2147483648.0f); }

/* Every set of kernels that this machine has, as an environment; returns 0 behind the last one. */
static int kernels_env(int which, moe_env *env) {
  static const moe_isa isa[] = {MOE_ISA_SCALAR, MOE_ISA_AVX2, MOE_ISA_AVX2, MOE_ISA_AVX512, MOE_ISA_AVX512, MOE_ISA_NEON};
  static const uint32_t feature[] = {0, 0, MOE_FEATURE_AVX_VNNI, 0, MOE_FEATURE_AVX512_VNNI, 0};
  for (; which < 6; ++which) {
    if (moe_env_init(env, isa[which])) continue;
    if ((env->features & feature[which]) != feature[which]) continue;
    env->features = feature[which];
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

static void define(float *out, int32_t m, int32_t n, int32_t k, int with_bias) {
  static int32_t q[ROOM];
  int32_t i, j, p;
  for (i = 0; i < m; ++i) {
    float scale = integers(q, x + i * k, k);
    for (j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (p = 0; p < k; ++p) sum += (int64_t)q[p] * weights[j * k + p];
      out[i * n + j] = moe__fmaf((float)sum, scale * scales[j], with_bias ? bias[j] : 0.0f);
    }
  }
}

/* A product by all kernels, rows and panels, against the definition. extreme: only -128, -127 and 127. */
static void check_product(int32_t m, int32_t n, int32_t k, int extreme) {
  moe_env env;
  int which, layout;
  int32_t i;
  for (i = 0; i < n * k; ++i) {
    weights[i] = (int8_t)(int32_t)(random32() % 256u - 128u);
    if (extreme) weights[i] = (int8_t)(extreme == 1 ? -128 : random32() % 3 ? -127 : 127);
  }
  for (i = 0; i < m * k; ++i) x[i] = extreme == 1 ? (i / k % 2 ? -3.5f : 3.5f) : extreme ? (random32() & 1 ? 1.0f : -1.0f) : random_float();
  for (i = 0; i < n; ++i) scales[i] = 0.001f * random_float(), bias[i] = random_float();
  define(wanted, m, n, k, n % 2);
  for (which = 0; (which = kernels_env(which, &env)) != 0;) {
    CHECK(moe_pack_int8_bytes(n, k) <= sizeof panels, "panels of %d x %d", (int)n, (int)k);
    moe_pack_int8(panels, weights, n, k, &env);
    for (layout = 0; layout < 2; ++layout) {
      moe_mat mat = layout ? moe_mat_panels_int8(panels, scales, n, k) : moe_mat_rows_int8(weights, scales, n, k);
      memset(y, 0x7f, sizeof(float) * (size_t)(m * n + 1));
      moe_linear_forward(y, x, &mat, n % 2 ? bias : NULL, m, &env);
      CHECK(!memcmp(y, wanted, sizeof(float) * (size_t)(m * n)), "%d x %d x %d, %s with features %u, %s", (int)m, (int)n, (int)k,
            moe_isa_name(env.isa), (unsigned)env.features, layout ? "panels" : "rows");
      CHECK(moe__bits(y[m * n]) == 0x7f7f7f7fu, "%d x %d x %d: written behind the end", (int)m, (int)n, (int)k);
    }
  }
}

static void test_lowp_kernels_equal_the_definition(void) {
  static const int32_t n[] = {1, 2, 3, 4, 7, 15, 16, 17, 33, 48, 49, 64, 95, 130}, k[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 64, 67, 129, 384};
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
}

static void test_lowp_nothing_saturates(void) {
  int extreme;
  for (extreme = 1; extreme <= 2; ++extreme) {
    check_product(2, 17, 3000, extreme);
    CHECK_STATE();
    check_product(9, 16, 1536, extreme);
    CHECK_STATE();
    check_product(1, 1, ROOM - 16, extreme); /* sums of 2^30 */
    CHECK_STATE();
  }
}

static void test_lowp_empty_products(void) {
  moe_env env;
  moe_mat mat;
  int which;
  scales[0] = bias[0] = 0.5f;
  for (which = 0; (which = kernels_env(which, &env)) != 0;) {
    moe_pack_int8(panels, weights, 1, 0, &env);
    mat = moe_mat_panels_int8(panels, scales, 1, 0);
    y[0] = 7;
    moe_linear_forward(y, x, &mat, bias, 0, &env);
    CHECK(moe__bits(y[0]) == moe__bits(7.0f), "no rows, yet written");
    moe_linear_forward(y, x, &mat, bias, 1, &env);
    CHECK(moe__bits(y[0]) == moe__bits(0.5f), "no columns: %g", (double)y[0]);
  }
}

static void test_lowp_integers_are_near(void) {
  moe_env env;
  int which;
  int32_t rows = 7, cols = 203, i, j;
  for (i = 0; i < rows * cols; ++i) source[i] = random_float() * (float)(1 << (i / cols * 3)) * 0.01f;
  for (j = 0; j < cols; ++j) source[3 * cols + j] = 0; /* a row of zeros, */
  for (j = 0; j < cols; ++j) source[4 * cols + j] = 1e-40f; /* one below all that counts, */
  source[5 * cols + 202] = -1000;                           /* and one with its largest at the end */
  for (which = 0; (which = kernels_env(which, &env)) != 0;) {
    moe_quantize(weights, scales, source, rows, cols, &env);
    if (which == 1) memcpy(original, weights, (size_t)(rows * cols));
    CHECK(!memcmp(original, weights, (size_t)(rows * cols)), "%s differs from scalar", moe_isa_name(env.isa));
    for (i = 0; i < rows; ++i)
      for (j = 0; j < cols; ++j) {
        int32_t q = weights[i * cols + j];
        CHECK(q >= -127 && q <= 127, "%d", (int)q);
        CHECK(fabsf((float)q * scales[i] - source[i * cols + j]) <= 0.50001f * scales[i] + 1e-36f, "row %d: %g is %d times %g", (int)i,
              (double)source[i * cols + j], (int)q, (double)scales[i]);
      }
    CHECK(weights[5 * cols + 202] == -127 && !(scales[3] > 0) && !(scales[4] > 0), "extremes");
  }
}

static void test_lowp_rounds_ties_to_even(void) {
  static const float row[] = {127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f, 3.49f, 0, -127};
  static const int8_t expected[] = {127, 0, 2, 2, 0, -2, -2, 126, 3, 0, -127};
  moe_env env;
  int which;
  for (which = 0; (which = kernels_env(which, &env)) != 0;) {
    moe_quantize(weights, scales, row, 1, 11, &env);
    CHECK(!memcmp(weights, expected, 11) && moe__bits(scales[0]) == moe__bits(1.0f), "%s", moe_isa_name(env.isa));
  }
}

static void test_lowp_non_finite_rows_give_nan(void) {
  moe_env env;
  moe_mat mat;
  int which, i;
  memset(weights, 1, 20 * 40);
  for (i = 0; i < 20; ++i) scales[i] = 1;
  for (which = 0; (which = kernels_env(which, &env)) != 0;) {
    for (i = 0; i < 3 * 40; ++i) x[i] = 1;
    x[39] = moe__floats(0x7f800000u);
    x[40] = moe__floats(0x7fc00000u);
    moe_pack_int8(panels, weights, 20, 40, &env);
    mat = moe_mat_panels_int8(panels, scales, 20, 40);
    moe_linear_forward(y, x, &mat, NULL, 3, &env);
    for (i = 0; i < 40; ++i) CHECK(y[i] != y[i], "output %d of a row that is not finite: %g", i, (double)y[i]);
    for (; i < 60; ++i) CHECK_NEAR(y[i], 40, 1e-4);
  }
}

static void test_lowp_products_are_near_fp32(void) {
  moe_env env;
  moe_mat exact, mat;
  int32_t m = 6, n = 40, k = 384, i;
  double error = 0, norm = 0;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (i = 0; i < n * k; ++i) source[i] = random_float() + random_float() + random_float();
  for (i = 0; i < m * k; ++i) x[i] = random_float() + random_float() + random_float();
  moe_quantize(weights, scales, source, n, k, &env);
  moe_pack_int8(panels, weights, n, k, &env);
  exact = moe_mat_rows(source, n, k);
  mat = moe_mat_panels_int8(panels, scales, n, k);
  moe_linear_forward(wanted, x, &exact, NULL, m, &env);
  moe_linear_forward(y, x, &mat, NULL, m, &env);
  for (i = 0; i < m * n; ++i) {
    error += ((double)y[i] - (double)wanted[i]) * ((double)y[i] - (double)wanted[i]);
    norm += (double)wanted[i] * (double)wanted[i];
  }
  CHECK(sqrt(error / norm) < 0.015, "relative error %g", sqrt(error / norm));
}

static void test_lowp_gelu_and_threads_change_no_bit(void) {
  moe_env env, pooled;
  moe_pool *pool = NULL;
  moe_mat mat;
  int32_t m = 67, n = 100, k = 300, i;
  moe_env_init(&env, MOE_ISA_AUTO);
  pooled = env;
  CHECK(moe_pool_create(&pool, 3, &pooled) == MOE_OK, "no pool");
  for (i = 0; i < n * k; ++i) weights[i] = (int8_t)(int32_t)(random32() % 255u - 127u);
  for (i = 0; i < m * k; ++i) x[i] = random_float();
  for (i = 0; i < n; ++i) scales[i] = 0.001f, bias[i] = random_float();
  moe_pack_int8(panels, weights, n, k, &env);
  mat = moe_mat_panels_int8(panels, scales, n, k);
  moe_linear_forward(wanted, x, &mat, bias, m, &env);
  moe_linear_gelu_forward(y, pre, x, &mat, bias, m, &pooled);
  CHECK(!memcmp(pre, wanted, sizeof(float) * (size_t)(m * n)), "threads");
  moe_gelu_forward(wanted, wanted, (size_t)(m * n), &env);
  CHECK(!memcmp(y, wanted, sizeof(float) * (size_t)(m * n)), "GELU");
  moe_linear_gelu_forward(y, NULL, x, &mat, bias, m, &env);
  CHECK(!memcmp(y, wanted, sizeof(float) * (size_t)(m * n)), "GELU in place");
  moe_pool_free(pool);
}

int main(int argc, char **argv) {
  test_begin(argc, argv);
  RUN(test_lowp_kernels_equal_the_definition);
  RUN(test_lowp_nothing_saturates);
  RUN(test_lowp_empty_products);
  RUN(test_lowp_integers_are_near);
  RUN(test_lowp_rounds_ties_to_even);
  RUN(test_lowp_non_finite_rows_give_nan);
  RUN(test_lowp_products_are_near_fp32);
  RUN(test_lowp_gelu_and_threads_change_no_bit);
  return test_end();
}
