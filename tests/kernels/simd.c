/* The vector kernels against their scalar definition, bit by bit, on every instruction set of this
   machine; the elementary functions against the C library in long double. */

#define BLOCK 4096

static int simd_same(float a, float b) {
  return (a != a && b != b) || moe__bits(a) == moe__bits(b);
}

/* The functions by number: exp as the kernels of rows have it, log in plain C alone. */
enum { FUNCTIONS = 2 };
static const char *const function_name[FUNCTIONS] = {"exp", "log"};
static float function(int which, float x) { return which == 0 ? moe__expf(x) : moe__logf(x); }
static long double reference(int which, float x) {
  return which == 0 ? expl((long double)x) : logl((long double)x);
}

static void test_simd_exp_has_the_same_bits_everywhere(void) {
  static float x[BLOCK], got[BLOCK];
  uint64_t u = 0;
  while (u < 0x100000000u) {
    size_t i, s;
    for (i = 0; i < BLOCK; ++i, u += 10007)
      x[i] = moe__floats((uint32_t)u); /* every exponent, both signs, NaN */
    for (s = 0; s < ISAS; ++s) {
      if (!moe_isa_available(isas[s])) continue;
      MOE__V_PICK(isas[s], rows)->exp(got, x, BLOCK);
      for (i = 0; i < BLOCK; ++i)
        CHECK(simd_same(moe__expf(x[i]), got[i]), "exp(%a) is %a in plain C and %a in %s",
              (double)x[i], (double)moe__expf(x[i]), (double)got[i], moe_isa_name(isas[s]));
    }
  }
}

/* |y - f(x)| in units of the last place of f(x) */
static double ulps(float y, long double exact) {
  int e;
  long double unit;
  frexpl(exact, &e);
  unit = ldexpl(1.0L, e - 24);
  if (unit < 1.401298464324817e-45L) unit = 1.401298464324817e-45L;
  return (double)(fabsl((long double)y - exact) / unit);
}

static void test_simd_functions_are_accurate(void) {
  static const double limit[FUNCTIONS] = {0.87, 0.82}; /* seen over all floats: 0.86, 0.80 */
  int which;
  for (which = 0; which < FUNCTIONS; ++which) {
    double worst = 0.0;
    float at = 0.0f;
    uint64_t u;
    for (u = 0; u < 0x100000000u; u += 16301) {
      float x = moe__floats((uint32_t)u), y = function(which, x);
      long double exact = reference(which, x);
      if (exact != exact || fabsl(exact) > 3.4028234e38L) {
        CHECK(simd_same(y, (float)exact) || exact == exact, "%s(%a) is %a", function_name[which],
              (double)x, (double)y);
        continue;
      }
      if (ulps(y, exact) > worst) worst = ulps(y, exact), at = x;
    }
    CHECK(worst <= limit[which], "%s is off by %.3f units in the last place at %a",
          function_name[which], worst, (double)at);
  }
}

static void test_simd_functions_handle_special_values(void) {
  const float inf = moe__floats(0x7f800000u), nan = moe__floats(0x7fc00000u),
              tiny = moe__floats(1u);
  const float x[] = {0.0f, -0.0f, inf, -inf, nan, tiny, -tiny, 1.0f, -1.0f, 89.0f, -200.0f};
  const float want[FUNCTIONS][11] = {
      {1.0f, 1.0f, inf, 0.0f, nan, 1.0f, 1.0f, 2.7182817f, 0.36787945f, inf, 0.0f},
      {-inf, -inf, inf, nan, nan, -103.27893f, nan, 0.0f, nan, 4.4886365f, nan}};
  int which, i;
  for (which = 0; which < FUNCTIONS; ++which)
    for (i = 0; i < 11; ++i) {
      float y = function(which, x[i]);
      CHECK(simd_same(y, want[which][i]), "%s(%g) is %.9g, not %.9g", function_name[which],
            (double)x[i], (double)y, (double)want[which][i]);
    }
}

static void test_simd_row_kernels_have_the_same_bits_for_every_length(void) {
  uint64_t seed = 1;
  size_t n, i, s;
  for (n = 0; n < 130; ++n) {
    float *x = (float *)malloc(4 * n + 1), *y = (float *)malloc(4 * n + 1),
          *z = (float *)malloc(4 * n + 1); /* exact: no read beyond */
    float sum, dot;
    for (i = 0; i < n; ++i) x[i] = test_random(&seed) * 1e3f, y[i] = test_random(&seed);
    sum = moe__scalar_row_sum(x, n);
    dot = moe__scalar_row_dot(x, y, n);
    for (s = 1; s < ISAS; ++s) {
      const moe__row_kernels *k = MOE__V_PICK(isas[s], rows);
      if (!moe_isa_available(isas[s])) continue;
      CHECK(simd_same(sum, k->sum(x, n)) && simd_same(dot, k->dot(x, y, n)), "n %d %s", (int)n,
            moe_isa_name(isas[s]));
      k->exp(z, y, n);
      for (i = 0; i < n; ++i)
        CHECK(simd_same(z[i], moe__expf(y[i])), "exp, n %d i %d", (int)n, (int)i);
    }
    free(x);
    free(y);
    free(z);
  }
}

/* Every primitive of the vectors, by number: y = op(a, b, c) on 16 lanes. */
enum { PRIMITIVES = 29 };
static float flag(int m, float a, float b) { return m ? a : b; }

static void scalar_primitive(float *y, const float *a, const float *b, const float *c, int op) {
  int i;
  for (i = 0; i < 16; ++i) {
    uint32_t u = moe__bits(a[i]), v = moe__bits(b[i]), r = 0;
    float lane[16], f = 0.0f;
    int is_int = op >= 14 && op < 25, j, w;
    memcpy(lane, a, sizeof lane);
    switch (op) {
      case 0: f = a[i] + b[i]; break;
      case 1: f = a[i] - b[i]; break;
      case 2: f = a[i] * b[i]; break;
      case 3: f = a[i] / b[i]; break;
      case 4: f = sqrtf(a[i]); break;
      case 5: f = moe__fmaf(a[i], b[i], c[i]); break;
      case 6: f = moe__fmaf(-a[i], b[i], c[i]); break;
      case 7: f = moe__maxf(a[i], b[i]); break;
      case 8: f = moe__minf(a[i], b[i]); break;
      case 9: f = moe__floats(u & 0x7fffffffu); break;
      case 10: f = flag(a[i] < b[i], a[i], c[i]); break;
      case 11: f = moe__tree16(lane); break;
      case 12:
        for (w = 8; w; w /= 2)
          for (j = 0; j < w; ++j) lane[j] = moe__maxf(lane[j], lane[j + w]);
        f = lane[0];
        break;
      case 13: f = (float)(int32_t)u; break;
      case 14: r = u + v; break;
      case 15: r = u - v; break;
      case 16: r = u * v; break;
      case 17: r = u & v; break;
      case 18: r = u ^ v; break;
      case 19: r = u << 13; break;
      case 20: r = u >> 9; break;
      case 21: r = (u >> 9) | (u >> 31 ? 0xff800000u : 0u); break;
      case 22: r = u < v ? u : v; break;
      case 23: r = 77u + (uint32_t)i; break;
      case 24: r = 0xdeadbeefu; break;
      case 25: f = i < 5 ? a[i] : 0.0f; break;
      case 26: f = i < 11 ? a[i] : y[i]; break;
      case 27: f = i < 0 ? a[i] : y[i]; break;
      default: f = a[i];
    }
    y[i] = is_int ? moe__floats(r) : f;
  }
}

#define PRIMITIVE_KERNELS(S, T)                                                                    \
  T static void S##_primitive(float *y, const float *pa, const float *pb, const float *pc,         \
                              int op) {                                                            \
    S##_f a = S##_load(pa), b = S##_load(pb), c = S##_load(pc), f = S##_set(0.0f);                 \
    S##_i u = S##_iload(pa), v = S##_bits(b), r = S##_iset(0);                                     \
    int is_int = op >= 14 && op < 25;                                                              \
    switch (op) {                                                                                  \
      case 0: f = S##_add(a, b); break;                                                            \
      case 1: f = S##_sub(a, b); break;                                                            \
      case 2: f = S##_mul(a, b); break;                                                            \
      case 3: f = S##_div(a, b); break;                                                            \
      case 4: f = S##_sqrt(a); break;                                                              \
      case 5: f = S##_fma(a, b, c); break;                                                         \
      case 6: f = S##_fnma(a, b, c); break;                                                        \
      case 7: f = S##_max(a, b); break;                                                            \
      case 8: f = S##_min(a, b); break;                                                            \
      case 9: f = S##_abs(a); break;                                                               \
      case 10: f = S##_sel(S##_lt(a, b), a, c); break;                                             \
      case 11: f = S##_set(S##_sum(a)); break;                                                     \
      case 12: f = S##_set(S##_max16(a)); break;                                                   \
      case 13: f = S##_cvt(u); break;                                                              \
      case 14: r = S##_iadd(u, v); break;                                                          \
      case 15: r = S##_isub(u, v); break;                                                          \
      case 16: r = S##_imul(u, v); break;                                                          \
      case 17: r = S##_iand(u, v); break;                                                          \
      case 18: r = S##_ixor(u, v); break;                                                          \
      case 19: r = S##_ishl(u, 13); break;                                                         \
      case 20: r = S##_ishr(u, 9); break;                                                          \
      case 21: r = S##_isar(u, 9); break;                                                          \
      case 22: r = S##_bits(S##_sel(S##_ult(u, v), a, b)); break;                                  \
      case 23: r = S##_iiota(77u); break;                                                          \
      case 24: r = S##_iset(0xdeadbeefu); break;                                                   \
      case 25: f = S##_loadn(pa, 5); break;                                                        \
      case 26: S##_storen(y, a, 11); return;                                                       \
      case 27: S##_storen(y, a, 0); return;                                                        \
      default: S##_storen(y, a, 16); return;                                                       \
    }                                                                                              \
    S##_store(y, is_int ? S##_floats(r) : f);                                                      \
  }                                                                                                \
  static void (*const S##_primitives)(float *, const float *, const float *, const float *, int) = \
      S##_primitive;
MOE__V_STAMP(PRIMITIVE_KERNELS)
static void (*const moe__scalar_primitives)(float *, const float *, const float *, const float *,
                                            int) = scalar_primitive;

static void test_simd_primitives_do_what_the_scalar_code_does(void) {
  uint64_t seed = 7;
  int round, i, s, op;
  for (round = 0; round < 2000; ++round) {
    float a[16], b[16], c[16], want[16], got[16];
    for (i = 0; i < 16; ++i) {
      a[i] = test_random(&seed), b[i] = test_random(&seed), c[i] = test_random(&seed);
      if (round & 1)
        a[i] = floorf(a[i] * 4.0f), b[i] = floorf(b[i] * 4.0f),
        c[i] = floorf(c[i] * 4.0f);                                   /* equal values, zeros */
      if (round % 8 == 7) a[i] = moe__floats((uint32_t)(seed >> 13)); /* anything, NaN too */
    }
    for (op = 0; op < PRIMITIVES; ++op)
      for (s = 1; s < ISAS; ++s) {
        if (!moe_isa_available(isas[s])) continue;
        for (i = 0; i < 16; ++i) want[i] = got[i] = (float)i;
        scalar_primitive(want, a, b, c, op);
        (*MOE__V_PICK(isas[s], primitives))(got, a, b, c, op);
        for (i = 0; i < 16; ++i)
          CHECK(simd_same(want[i], got[i]), "primitive %d on %s, lane %d: %a, not %a", op,
                moe_isa_name(isas[s]), i, (double)got[i], (double)want[i]);
      }
  }
}

static uint32_t random_bits(uint64_t *s) {
  *s ^= *s << 13;
  *s ^= *s >> 7;
  *s ^= *s << 17;
  return (uint32_t)(*s >> 16);
}

static void test_simd_fma_rounds_once(void) {
  uint64_t seed = 88172645463325252u;
  int32_t round;
  for (round = 0; round < 1000000; ++round) {
    float a = moe__floats(random_bits(&seed)), b = moe__floats(random_bits(&seed)), c, got, want;
    uint32_t u = random_bits(&seed);
    if (round & 1)
      u = moe__bits(-(a * b)) + (u & 7) - 3; /* nearly all cancels */
    else if (round & 2)                      /* an exponent near that of the product */
      u = (u & 0x807fffffu) |
          ((((moe__bits(a) >> 23) + (moe__bits(b) >> 23) - 127 + (u >> 24) % 60 - 30) & 255) << 23);
    c = moe__floats(u);
    got = moe__fmaf(a, b, c);
    want = (float)fmaf(a, b, c);
    CHECK(simd_same(got, want), "fma(%a, %a, %a) is %a, not %a", (double)a, (double)b, (double)c,
          (double)got, (double)want);
  }
}

static void run_simd(void) {
  RUN(test_simd_primitives_do_what_the_scalar_code_does);
  RUN(test_simd_fma_rounds_once);
  RUN(test_simd_exp_has_the_same_bits_everywhere);
  RUN(test_simd_functions_are_accurate);
  RUN(test_simd_functions_handle_special_values);
  RUN(test_simd_row_kernels_have_the_same_bits_for_every_length);
}
