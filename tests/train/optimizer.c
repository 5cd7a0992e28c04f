/* Schedule, norm, Adam, groups of parameters, and the checks of a training configuration. */

static moe_train_config optimizer_config_of(int64_t steps) {
  moe_train_config c;
  moe_train_config_init(&c);
  c.steps = steps;
  return c;
}

static void test_optimizer_rate_warms_up_and_decays(void) {
  static const float warmups[] = {0, 0.1f, 0.2f, 0.29f, 0.7f, 1, 0.003f};
  static const int64_t steps[] = {1, 7, 100, 1000, 30000};
  int i, j;
  int64_t t;
  for (i = 0; i < 7; ++i)
    for (j = 0; j < 5; ++j) {
      moe_train_config c = optimizer_config_of(steps[j]);
      int64_t T = steps[j], thousandths = (int64_t)((double)warmups[i] * 1000 + 0.5),
              W = thousandths * T / 1000;
      c.lr = 2;
      c.warmup = warmups[i];
      for (t = 1; t <= T; ++t) {
        double want =
            t <= W ? 2.0 * (double)t / (double)W : 2.0 * (double)(T - t + 1) / (double)(T - W);
        CHECK_NEAR(moe_train_lr(&c, t), want, 2e-7);
        CHECK(moe_train_lr(&c, t) > 0, "step %d of %d is wasted", (int)t, (int)T);
      }
      CHECK_NEAR(moe_train_lr(&c, T + 1), 0, 0);
      CHECK_NEAR(moe_train_lr(&c, 0), 0, 0);
    }
}

/* The definition, by which its bits are the same everywhere: blocks of a tile in order, tiles of a
   part, then the parts. */
static double norm_by_definition(const float *g, size_t n) {
  const moe__row_kernels *kernels = MOE__V_PICK(MOE_ISA_SCALAR, rows);
  int32_t tiles = (int32_t)((n + MOE__ADAM_TILE - 1) / MOE__ADAM_TILE), part, tile;
  double sum = 0;
  for (part = 0; part < MOE__NORM_PARTS; ++part) {
    double of_part = 0;
    for (tile = (int32_t)((int64_t)tiles * part / MOE__NORM_PARTS);
         tile < (int32_t)((int64_t)tiles * (part + 1) / MOE__NORM_PARTS); ++tile) {
      size_t at = (size_t)tile * MOE__ADAM_TILE, end = at + MOE__ADAM_TILE;
      for (end = end < n ? end : n; at < end; at += MOE__NORM_BLOCK)
        of_part += (double)kernels->dot(
            g + at, g + at, end - at < MOE__NORM_BLOCK ? end - at : (size_t)MOE__NORM_BLOCK);
    }
    sum += of_part;
  }
  return sqrt(sum);
}

static void test_optimizer_norm_is_the_norm(void) {
  enum { N = 300007 };
  float *g = (float *)malloc(N * sizeof *g);
  static const size_t sizes[] = {0, 1, 15, 17, 4096, 4097, 16384, 16385, 100000, N};
  uint64_t state = 3;
  size_t i, j;
  for (i = 0; i < N; ++i) g[i] = test_random(&state) * (i % 3 ? 1 : 100);
  for (j = 0; j < sizeof sizes / sizeof *sizes; ++j) {
    double sum = 0, first = norm_by_definition(g, sizes[j]);
    int k, threads;
    for (i = 0; i < sizes[j]; ++i) sum += (double)g[i] * (double)g[i];
    for (k = 0; k < ISAS; ++k) {
      moe_env env;
      if (moe_env_init(&env, isas[k])) continue;
      for (threads = 1; threads <= 8; threads = threads == 3 ? 8 : threads + 1) {
        moe_pool *pool;
        double norm;
        CHECK(moe_pool_create_exact(&pool, threads, &env) == MOE_OK, "pool");
        norm = moe_gradient_norm(g, sizes[j], &env);
        moe_pool_free(pool);
        CHECK_NEAR(norm, sqrt(sum), 1e-6 * sqrt(sum));
        CHECK(!memcmp(&norm, &first, sizeof norm), "n %d isa %s threads %d: %.17g against %.17g",
              (int)sizes[j], moe_isa_name(isas[k]), threads, norm, first);
        if (threads == 8) break;
      }
    }
  }
  free(g);
}

static void test_optimizer_norm_tells_bad_gradients(void) {
  static float g[20000];
  static const size_t places[] = {0, 5, 4097, 16390, 19999};
  moe_env env;
  size_t i;
  int k;
  for (k = 0; k < ISAS; ++k)
    for (i = 0; i < 5; ++i) {
      if (moe_env_init(&env, isas[k])) continue;
      g[places[i]] = INFINITY;
      CHECK(!moe__finite(moe_gradient_norm(g, 20000, &env)), "infinity at %d", (int)places[i]);
      g[places[i]] = NAN;
      CHECK(!moe__finite(moe_gradient_norm(g, 20000, &env)), "NaN at %d", (int)places[i]);
      g[places[i]] = -1e20f;
      CHECK(!moe__finite(moe_gradient_norm(g, 20000, &env)), "1e20 at %d", (int)places[i]);
      g[places[i]] = 0;
      CHECK(moe__finite(moe_gradient_norm(g, 20000, &env)), "zeros");
    }
}

static void test_optimizer_clips_to_the_norm(void) {
  CHECK_NEAR(moe__clip_factor(4, 1), 1 / (4 + 1e-6), 1e-8);
  CHECK_NEAR(moe__clip_factor(0.5, 1), 1, 0);
  CHECK_NEAR(moe__clip_factor(4, 0), 1, 0);
  CHECK_NEAR(moe__clip_factor(0, 1), 1, 0);
  CHECK_NEAR(moe__clip_factor(1, 1), 1 / (1 + 1e-6), 1e-7);
}

static moe_adam_op adam_of(float *w, float *g, float *m, float *v, size_t count, int64_t t) {
  moe_adam_op op;
  moe_adam_op_init(&op);
  op.w = w;
  op.g = g;
  op.m = m;
  op.v = v;
  op.count = count;
  op.t = t;
  return op;
}

/* The formula of the header in double: 50 steps, some gradients zero, some tiny. */
static void adam_against_double(float decay, float beta2) {
  enum { N = 37, STEPS = 50 };
  float w[N], g[N], m[N], v[N];
  double rw[N], rm[N], rv[N], worst = 0, b2 = beta2 < 0.9995f ? 0.999 : 0.9999;
  uint64_t state = 9;
  moe_adam_op op;
  moe_env env;
  int t, i;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (i = 0; i < N; ++i) {
    w[i] = test_random(&state);
    rw[i] = (double)w[i];
    m[i] = v[i] = 0;
    rm[i] = rv[i] = 0;
  }
  for (t = 1; t <= STEPS; ++t) {
    const float factor = 0.75f, rate = 1e-3f;
    for (i = 0; i < N; ++i) {
      double d;
      g[i] = i % 5 == 4 ? 0 : test_random(&state) * (i % 7 ? 1 : 1e-6f);
      d = (double)g[i] * (double)factor;
      rm[i] = 0.9 * rm[i] + 0.1 * d;
      rv[i] = b2 * rv[i] + (1 - b2) * d * d;
      rw[i] -= (double)rate * (double)decay * rw[i];
      rw[i] -= (double)rate * (rm[i] / (1 - pow(0.9, t))) /
               (sqrt(rv[i] / (1 - pow(b2, t))) + (double)1e-8f);
    }
    op = adam_of(w, g, m, v, N, t);
    op.lr = rate;
    op.weight_decay = decay;
    op.factor = factor;
    op.beta2 = beta2;
    CHECK(!moe_adam_step(&op, &env), "status");
    for (i = 0; i < N; ++i) {
      CHECK_NEAR(g[i], 0, 0);
      if (fabs((double)w[i] - rw[i]) > worst) worst = fabs((double)w[i] - rw[i]);
    }
  }
  CHECK(worst < 3e-6, "weights differ by %g", worst);
  for (i = 0; i < N; ++i) CHECK_NEAR(m[i], rm[i], 1e-6 * fabs(rm[i]) + 1e-12);
  for (i = 0; i < N; ++i) CHECK_NEAR(v[i], rv[i], 2e-6 * rv[i] + 1e-18);
}

static void test_optimizer_adam_equals_its_formula(void) {
  adam_against_double(0, 0.999f);
  CHECK_STATE();
  adam_against_double(0.1f, 0.999f);
  CHECK_STATE();
  adam_against_double(0, 0.9999f);
}

static void test_optimizer_adam_has_the_same_bits_everywhere(void) {
  enum { N = 70003 };
  float *a = (float *)malloc(4 * N * sizeof *a), *b = (float *)malloc(4 * N * sizeof *b),
        *start = (float *)malloc(4 * N * sizeof *a);
  uint64_t state = 5;
  moe_adam_op op;
  size_t i;
  int k, threads, have = 0;
  for (i = 0; i < 4 * N; ++i) start[i] = test_random(&state) * (i % 11 ? 1 : 1e-18f);
  for (i = 3 * N; i < 4 * N; ++i) start[i] = start[i] * start[i]; /* v is not negative */
  for (i = 0; i < N; i += 97) start[N + i] = 0;
  for (k = 0; k < ISAS; ++k) {
    moe_env env;
    if (moe_env_init(&env, isas[k])) continue;
    for (threads = 1; threads <= 8; threads = threads == 3 ? 8 : threads + 1) {
      moe_pool *pool;
      CHECK(moe_pool_create_exact(&pool, threads, &env) == MOE_OK, "pool");
      memcpy(b, start, 4 * N * sizeof *b);
      op = adam_of(b, b + N, b + 2 * N, b + 3 * N, N, 3);
      op.lr = 1e-2f;
      op.weight_decay = 0.01f;
      op.factor = 0.3f;
      CHECK(!moe_adam_step(&op, &env), "status");
      moe_pool_free(pool);
      if (!have++) memcpy(a, b, 4 * N * sizeof *b);
      CHECK(!memcmp(a, b, 4 * N * sizeof *b), "isa %s, %d threads", moe_isa_name(isas[k]), threads);
      if (threads == 8) break;
    }
  }
  free(a);
  free(b);
  free(start);
}

static void test_optimizer_moments_never_become_denormal(void) {
  float w[3] = {1, 1, 1}, g[3] = {1e-4f, 1e-15f, 0}, m[3] = {0}, v[3] = {0}, before;
  moe_adam_op op;
  moe_env env;
  int t;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (t = 1; t <= 2000; ++t) {
    int i;
    before = w[0];
    op = adam_of(w, g, m, v, 3, t);
    op.lr = 1e-3f;
    op.beta2 = 0.99f;
    CHECK(!moe_adam_step(&op, &env), "status");
    for (i = 0; i < 3; ++i) {
      CHECK(m[i] == 0 || m[i] > 1.18e-38f, "step %d: m %g", t, (double)m[i]);
      CHECK(v[i] == 0 || v[i] > 1.18e-38f, "step %d: v %g", t, (double)v[i]);
    }
  }
  CHECK(w[0] == before, "still moving");
}

static moe_tensor tensor_of(const char *name, int32_t dims, size_t offset, size_t count) {
  moe_tensor t;
  memset(&t, 0, sizeof t);
  strcpy(t.name, name);
  t.dims = dims;
  t.offset = offset;
  t.count = count;
  return t;
}

static void test_optimizer_groups_change_rate_and_decay(void) {
  static const moe_param_group groups[3] = {
      {"gate", 10, 0}, {"layer.0", 0, 1}, {"layer.0.gate", 2, 3}};
  moe_train_config c = optimizer_config_of(10);
  moe_tensor tensors[6];
  moe__span spans[6];
  int32_t n = 0, i;
  float w[60], g[60], m[60] = {0}, v[60] = {0};
  moe_env env;
  moe_adam_op all;
  double sum = 0;
  moe_env_init(&env, MOE_ISA_AUTO);
  tensors[0] = tensor_of("embeddings.word.weight", 2, 0, 10);
  tensors[1] = tensor_of("layer.0.query.weight", 2, 10, 10);
  tensors[2] = tensor_of("layer.0.query.bias", 1, 20, 10);
  tensors[3] = tensor_of("layer.0.gate.weight", 2, 30, 10);
  tensors[4] = tensor_of("layer.1.gate.weight", 2, 40, 10);
  tensors[5] = tensor_of("layer.1.norm.bias", 1, 50, 10);
  c.weight_decay = 0.5f;
  c.groups = groups;
  c.n_groups = 3;
  for (i = 0; i < 6; ++i) n = moe__spans_add(spans, n, &tensors[i], &c);
  CHECK(n == 6, "%d spans", (int)n);
  CHECK(spans[1].lr_scale == 0 && spans[2].lr_scale == 0 && spans[3].lr_scale == 2 &&
            spans[4].lr_scale == 10,
        "rates");
  CHECK(spans[0].weight_decay == 0.5f && spans[3].weight_decay == 1.5f &&
            spans[4].weight_decay == 0 && spans[5].weight_decay == 0,
        "decays");
  for (i = 0; i < 60; ++i) w[i] = 1, g[i] = (float)(i + 1);
  for (i = 0; i < 60; ++i) sum += i / 10 == 1 || i / 10 == 2 ? 0 : (i + 1.0) * (i + 1.0);
  CHECK_NEAR(moe__spans_norm(g, spans, n, &env), sqrt(sum), 1e-4);
  all = adam_of(w, g, m, v, 60, 1);
  all.lr = 1e-2f;
  moe__spans_adam(&all, spans, n, &env);
  for (i = 0; i < 60; ++i) {
    static const double want[6] = {1 - 1e-2 * 0.5 - 1e-2, 1,       1,
                                   1 - 2e-2 * 1.5 - 2e-2, 1 - 0.1, 1 - 1e-2};
    CHECK_NEAR(w[i], want[i / 10], 1e-6);
    CHECK_NEAR(g[i], 0, 0);
  }
  c.n_groups = 0;
  c.weight_decay = 0;
  for (n = i = 0; i < 6; ++i) n = moe__spans_add(spans, n, &tensors[i], &c);
  CHECK(n == 1 && spans[0].count == 60, "%d spans where one would do", (int)n);
}

/* One op of Adam is one span: the same bits with a factor of the rate, and cleared gradients alone
   with factor 0. */
static void test_optimizer_adam_of_a_span_is_that_of_the_op(void) {
  enum { N = 40 };
  float a[4][N], b[4][N];
  uint64_t state = 8;
  moe_env env;
  moe_adam_op op;
  moe__span span;
  int i;
  env.log = count_sentence;
  for (i = 0; i < N; ++i) {
    a[0][i] = test_random(&state), a[1][i] = test_random(&state), a[2][i] = test_random(&state);
    a[3][i] = a[2][i] * a[2][i];
  }
  memcpy(b, a, sizeof b);
  span.offset = 10, span.count = 20, span.tile = 0, span.lr_scale = 3, span.weight_decay = 0.1f;
  op = adam_of(a[0], a[1], a[2], a[3], N, 4);
  op.lr = 1e-2f;
  moe__spans_adam(&op, &span, 1, &env);
  op = adam_of(b[0] + 10, b[1] + 10, b[2] + 10, b[3] + 10, 20, 4);
  op.lr = 1e-2f;
  op.lr_scale = 3;
  op.weight_decay = 0.1f;
  CHECK(!moe_adam_step(&op, &env) && !memcmp(a, b, sizeof a), "the same bits");
  op.lr_scale = 0;
  for (i = 0; i < 20; ++i) op.g[i] = 1;
  CHECK(!moe_adam_step(&op, &env) && !memcmp(a, b, sizeof a), "only gradients are cleared");
  op.t = sentences = 0;
  CHECK(moe_adam_step(&op, &env) == MOE_E_ARGUMENT && sentences == 1, "step 0");
  op.t = 1, op.beta2 = 1;
  CHECK(moe_adam_step(&op, &env) == MOE_E_ARGUMENT && sentences == 2, "beta2 1");
  op.beta2 = 0.999f, op.beta1 = NAN;
  CHECK(moe_adam_step(&op, &env) == MOE_E_ARGUMENT && sentences == 3, "beta1 NaN");
  sentences = 0;
}

static void test_optimizer_refuses_bad_configurations(void) {
  static const moe_param_group no_name = {NULL, 1, 1}, bad_rate = {"x", -1, 1},
                               bad_decay = {"x", 1, NAN};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_train_config c = optimizer_config_of(10);
  int wrong = 0;
  env.log = count_sentence;
  CHECK(moe__train_config_check(&c, &env) == MOE_OK, "defaults");
#define BAD(change)                                                                                \
  do {                                                                                             \
    c = optimizer_config_of(10);                                                                   \
    change;                                                                                        \
    ++wrong;                                                                                       \
    CHECK(moe__train_config_check(&c, &env) == MOE_E_ARGUMENT, "accepted: %s", #change);           \
    CHECK(sentences == wrong, "no sentence: %s", #change);                                         \
  } while (0)
  BAD(c.lr = 0);
  BAD(c.lr = NAN);
  BAD(c.lr = INFINITY);
  BAD(c.warmup = -0.1f);
  BAD(c.warmup = 1.1f);
  BAD(c.steps = 0);
  BAD(c.beta1 = 1);
  BAD(c.beta2 = -1);
  BAD(c.eps = 0);
  BAD(c.weight_decay = -1);
  BAD(c.clip_norm = NAN);
  BAD(c.dropout = 1);
  BAD(c.balance = -1);
  BAD(c.z_loss = INFINITY);
  BAD(c.jitter = 1);
  BAD(c.n_groups = 1);
  BAD(c.n_groups = -1);
  BAD((c.n_groups = 1, c.groups = &no_name));
  BAD((c.n_groups = 1, c.groups = &bad_rate));
  BAD((c.n_groups = 1, c.groups = &bad_decay));
}

static void run_optimizer(void) {
  RUN(test_optimizer_rate_warms_up_and_decays);
  RUN(test_optimizer_norm_is_the_norm);
  RUN(test_optimizer_norm_tells_bad_gradients);
  RUN(test_optimizer_clips_to_the_norm);
  RUN(test_optimizer_adam_equals_its_formula);
  RUN(test_optimizer_adam_has_the_same_bits_everywhere);
  RUN(test_optimizer_moments_never_become_denormal);
  RUN(test_optimizer_groups_change_rate_and_decay);
  RUN(test_optimizer_adam_of_a_span_is_that_of_the_op);
  RUN(test_optimizer_refuses_bad_configurations);
}
