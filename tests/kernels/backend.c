/* Products by another library: values and gradients against double precision, what stays built in,
   threads, a whole model. Built with -DMOE_USE_BLIS (test_blis.sh) the library is BLIS; else it is
   a plain loop. */

static int calls; /* of loop_sgemm, counted where there is one thread */
static void loop_sgemm(void *user, const moe_sgemm *g) {
  int32_t i, j, p;
  if (user) ++*(int *)user;
  for (i = 0; i < g->m; ++i)
    for (j = 0; j < g->n; ++j) {
      float *at = &g->c[(size_t)i * g->c_row + (size_t)j], sum = g->accumulate ? *at : 0;
      for (p = g->k - 1; p >= 0; --p)
        sum += g->a[(size_t)i * g->a_row + (size_t)p * g->a_col] *
               g->b[(size_t)p * g->b_row + (size_t)j * g->b_col];
      *at = sum; /* from the last to the first, so that the bits are not those of the built-in
                    kernels */
    }
}
static moe_backend loop, counting;
static void backend_tables(void) {
  moe_backend_init(&loop);
  loop.name = "loop";
  loop.sgemm = loop_sgemm;
  counting = loop;
  counting.name = "counting";
  counting.user = &calls;
}

static moe_env with_library(moe_isa isa) {
  moe_env env = models_env(isa);
#ifdef MOE_USE_BLIS
  moe_blis_use(&env, 1);
#else
  env.backend = &loop;
#endif
  return env;
}

static moe_env without(moe_isa isa) {
  moe_env env = models_env(isa);
  env.backend = NULL;
  return env;
}

/* All products of a linear layer of one size, with and without a library. */
typedef struct layer {
  int32_t M, rows, cols;
  float *x, *w, *b, *dy, *panels;    /* in */
  float *y, *pre, *g, *dx, *dw, *db; /* out: gradients begin with values */
} layer;

static layer layer_make(int32_t M, int32_t rows, int32_t cols, const moe_env *env) {
  uint64_t seed = 7;
  size_t in = (size_t)(M * cols), out = (size_t)(M * rows), weights = (size_t)(rows * cols);
  layer l;
  l.M = M;
  l.rows = rows;
  l.cols = cols;
  l.x = test_floats(in, &seed), l.w = test_floats(weights, &seed),
  l.b = test_floats((size_t)rows, &seed), l.dy = test_floats(out, &seed);
  l.panels = test_floats(moe_pack_floats(rows, cols), &seed);
  l.y = test_floats(out, &seed), l.pre = test_floats(out, &seed), l.g = test_floats(out, &seed);
  l.dx = test_floats(in, &seed), l.dw = test_floats(weights, &seed),
  l.db = test_floats((size_t)rows, &seed);
  moe_pack(l.panels, l.w, rows, cols, env);
  return l;
}

static void layer_free(layer *l) {
  free(l->x), free(l->w), free(l->b), free(l->dy), free(l->panels), free(l->y), free(l->pre),
      free(l->g), free(l->dx), free(l->dw), free(l->db);
}

static void layer_run(layer *l, const moe_env *env) {
  moe_mat mat = moe_mat_rows(l->w, l->rows, l->cols);
  linear_forward(l->y, l->x, &mat, NULL, l->M, env);
  linear_gelu_forward(l->g, l->pre, l->x, &mat, l->b, l->M, env);
  linear_backward(l->dx, l->dw, l->db, l->dy, l->x, &mat, l->M, env);
}

static int layer_equal(const layer *a, const layer *b) {
  size_t in = (size_t)(a->M * a->cols) * sizeof(float),
         out = (size_t)(a->M * a->rows) * sizeof(float);
  return !memcmp(a->y, b->y, out) && !memcmp(a->pre, b->pre, out) && !memcmp(a->g, b->g, out) &&
         !memcmp(a->dx, b->dx, in) &&
         !memcmp(a->dw, b->dw, (size_t)(a->rows * a->cols) * sizeof(float)) &&
         !memcmp(a->db, b->db, (size_t)a->rows * sizeof(float));
}

/* Sizes that are a multiple of nothing, more than one part of a product, and one of each kind. */
static const int32_t sizes[][3] = {{129, 131, 67}, {33, 517, 301}, {301, 47, 113}, {8, 300, 200},
                                   {517, 101, 37}, {64, 384, 96},  {600, 16, 301}};
enum { SIZES = sizeof sizes / sizeof sizes[0] };

static void within_tolerance(const float *values, int32_t m, int32_t n, int32_t k,
                             double (*element)(const layer *l, int32_t i, int32_t j),
                             const layer *l, const char *what) {
  int32_t i, j;
  for (i = 0; i < m; ++i)
    for (j = 0; j < n; ++j) {
      double expected = element(l, i, j), found = (double)values[(size_t)i * (size_t)n + (size_t)j];
      CHECK(fabs(expected - found) <= 3e-7 * (k + 4),
            "%s of %d x %d x %d at %d, %d: %.9g against %.9g", what, l->M, l->rows, l->cols, i, j,
            found, expected);
    }
}

static double at_y(const layer *l, int32_t i, int32_t j) {
  double sum = 0;
  int32_t p;
  for (p = 0; p < l->cols; ++p)
    sum += (double)l->x[i * l->cols + p] * (double)l->w[j * l->cols + p];
  return sum;
}
static double at_pre(const layer *l, int32_t i, int32_t j) {
  return at_y(l, i, j) + (double)l->b[j];
}
static double at_gelu(const layer *l, int32_t i, int32_t j) {
  double x = at_pre(l, i, j);
  return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440));
}
static float *before; /* the gradient that was there before */
static double at_dx(const layer *l, int32_t i, int32_t j) {
  double sum = (double)before[i * l->cols + j];
  int32_t p;
  for (p = 0; p < l->rows; ++p)
    sum += (double)l->dy[i * l->rows + p] * (double)l->w[p * l->cols + j];
  return sum;
}
static double at_dw(const layer *l, int32_t i, int32_t j) {
  double sum = (double)before[i * l->cols + j];
  int32_t p;
  for (p = 0; p < l->M; ++p) sum += (double)l->dy[p * l->rows + i] * (double)l->x[p * l->cols + j];
  return sum;
}
static double at_db(const layer *l, int32_t i, int32_t j) {
  double sum = (double)before[j];
  int32_t p;
  (void)i;
  for (p = 0; p < l->M; ++p) sum += (double)l->dy[p * l->rows + j];
  return sum;
}

static void test_backend_products_match_double(void) {
  moe_env env = with_library(MOE_ISA_AUTO);
  int q;
  for (q = 0; q < SIZES; ++q) {
    layer l = layer_make(sizes[q][0], sizes[q][1], sizes[q][2], &env),
          was = layer_make(sizes[q][0], sizes[q][1], sizes[q][2], &env);
    layer_run(&l, &env);
    within_tolerance(l.y, l.M, l.rows, l.cols, at_y, &l, "y");
    within_tolerance(l.pre, l.M, l.rows, l.cols, at_pre, &l, "y with bias");
    within_tolerance(l.g, l.M, l.rows, l.cols, at_gelu, &l, "GELU");
    before = was.dx, within_tolerance(l.dx, l.M, l.cols, l.rows, at_dx, &l, "dx");
    before = was.dw, within_tolerance(l.dw, l.rows, l.cols, l.M, at_dw, &l, "dw");
    before = was.db, within_tolerance(l.db, 1, l.rows, l.M, at_db, &l, "db");
    layer_free(&l), layer_free(&was);
    CHECK_STATE();
  }
}

static void test_backend_gets_what_is_large_and_nothing_else(void) {
  moe_env env = without(MOE_ISA_AUTO), plain = env;
  static const int32_t small[][3] = {
      {0, 300, 200}, {1, 300, 900}, {7, 300, 200}, {300, 5, 200}, {40, 40, 40}};
  int q;
  env.backend = &counting;
  for (q = 0; q < (int)(sizeof small / sizeof small[0]); ++q) {
    layer a = layer_make(small[q][0], small[q][1], small[q][2], &env),
          b = layer_make(small[q][0], small[q][1], small[q][2], &env);
    calls = 0;
    layer_run(&a, &env);
    layer_run(&b, &plain);
    CHECK(calls == 0, "%d calls for %d x %d x %d", calls, small[q][0], small[q][1], small[q][2]);
    CHECK(layer_equal(&a, &b), "%d x %d x %d", small[q][0], small[q][1], small[q][2]);
    layer_free(&a), layer_free(&b);
  }
  for (q = 0; q < SIZES; ++q) {
    layer a = layer_make(sizes[q][0], sizes[q][1], sizes[q][2], &env),
          b = layer_make(sizes[q][0], sizes[q][1], sizes[q][2], &env);
    moe_mat mat = moe_mat_panels(a.panels, a.rows, a.cols);
    calls = 0;
    linear_forward(a.y, a.x, &mat, a.b, a.M, &env);
    linear_forward(b.y, b.x, &mat, b.b, b.M, &plain);
    CHECK(calls == 0 && !memcmp(a.y, b.y, (size_t)(a.M * a.rows) * sizeof(float)),
          "panels: %d calls", calls);
    mat = moe_mat_rows(a.w, a.rows, a.cols);
    linear_forward(a.y, a.x, &mat, a.b, a.M, &env);
    CHECK(calls > 0, "%d x %d x %d forward", a.M, a.rows, a.cols);
    mat = moe_mat_rows(a.w, 15, a.cols);
    calls = 0;
    linear_forward(a.y, a.x, &mat, NULL, a.M, &env);
    CHECK(calls == 0, "%d x 15 x %d forward: %d calls", a.M, a.cols, calls);
    layer_run(&a, &env);
    CHECK(calls >= 4, "%d calls for %d x %d x %d", calls, a.M, a.rows, a.cols);
    layer_free(&a), layer_free(&b);
  }
}

static int32_t takes_none(void *user, int32_t m, int32_t n, int32_t k, int32_t packed) {
  (void)user, (void)m, (void)n, (void)k, (void)packed;
  return 0;
}

static void test_backend_may_decline_or_be_of_another_abi(void) {
  moe_backend backend[3];
  moe_env env = without(MOE_ISA_AUTO), plain = env;
  int i;
  for (i = 0; i < 3; ++i) backend[i] = counting;
  backend[0].takes = takes_none;
  backend[1].abi = MOE_BACKEND_ABI + 1;
  backend[2].sgemm = NULL;
  for (i = 0; i < 3; ++i) {
    layer a = layer_make(129, 131, 67, &env), b = layer_make(129, 131, 67, &env);
    env.backend = &backend[i];
    calls = 0;
    layer_run(&a, &env);
    layer_run(&b, &plain);
    CHECK(calls == 0 && layer_equal(&a, &b), "backend %d: %d calls", i, calls);
    CHECK(!strcmp(moe_backend_name(&env), i ? "built-in" : "counting"), "%s",
          moe_backend_name(&env));
    layer_free(&a), layer_free(&b);
  }
  CHECK(!strcmp(moe_backend_name(&plain), "built-in"), "%s", moe_backend_name(&plain));
}

static void test_backend_threads_change_no_bit(void) {
  moe_env one = with_library(MOE_ISA_AUTO), three = with_library(MOE_ISA_AUTO);
  moe_pool *pool = NULL;
  int q;
  CHECK(moe_pool_create_exact(&pool, 3, &three) == MOE_OK, "%s", said);
  for (q = 0; q < SIZES; ++q) {
    layer a = layer_make(sizes[q][0], sizes[q][1], sizes[q][2], &one),
          b = layer_make(sizes[q][0], sizes[q][1], sizes[q][2], &one);
    layer_run(&a, &one);
    layer_run(&b, &three);
    CHECK(layer_equal(&a, &b), "%d x %d x %d", a.M, a.rows, a.cols);
    layer_free(&a), layer_free(&b);
  }
  moe_pool_free(pool);
}

static models_batch backend_batch;

/* Losses of a few steps, and the scores after them. */
static void backend_train(float *losses, float *backend_scores, int steps, moe_router router,
                          const moe_env *env) {
  moe_task tasks[MODELS_TASKS];
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_config config = models_config(router, router == MOE_ROUTER_DENSE ? 1 : 3, 1);
  moe_train_config training;
  moe_model *model;
  moe_trainer *trainer = NULL;
  moe_context *context = NULL;
  int i;
  config.hidden = 68;
  config.ffn = 131;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, env);
  CHECK(model, "%s", said);
  moe_train_config_init(&training);
  training.lr = 1e-3f;
  training.steps = 20;
  CHECK(moe_trainer_create(&trainer, model, &limits, &training, env) == MOE_OK, "%s", said);
  models_random_batch(&backend_batch, model, 36, 19, 3);
  for (i = 0; i < steps; ++i) {
    CHECK(moe_trainer_accumulate(trainer, &backend_batch.b, 0, &losses[i], NULL, env) == MOE_OK,
          "%s", said);
    CHECK(moe_trainer_step(trainer, NULL, env) == MOE_OK, "%s", said);
  }
  limits.training = 0;
  CHECK(moe_context_create(&context, model, &limits, env) == MOE_OK, "%s", said);
  CHECK(moe_forward(context, backend_scores, &backend_batch.b, env) == MOE_OK, "%s", said);
  moe_context_free(context);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

enum { STEPS = 4, SCORES = MODELS_S * 3 };
static float losses[2][STEPS], backend_scores[2][SCORES];

static void test_backend_trains_a_model_like_the_built_in_kernels(void) {
  static const moe_router routers[] = {MOE_ROUTER_DENSE, MOE_ROUTER_TASK};
  int r, i;
  for (r = 0; r < 2; ++r) {
    moe_env library = with_library(MOE_ISA_AUTO), plain = without(MOE_ISA_AUTO);
    int different = 0;
    memset(backend_scores, 0, sizeof backend_scores);
    backend_train(losses[0], backend_scores[0], STEPS, routers[r], &plain);
    backend_train(losses[1], backend_scores[1], STEPS, routers[r], &library);
    CHECK_STATE();
    for (i = 0; i < STEPS; ++i) CHECK_NEAR(losses[1][i], losses[0][i], 2e-4);
    for (i = 0; i < SCORES; ++i) {
      CHECK_NEAR(backend_scores[1][i], backend_scores[0][i], 5e-3);
      different |= backend_scores[0][i] < backend_scores[1][i] ||
                   backend_scores[0][i] > backend_scores[1][i];
    }
    CHECK(different, "the same bits: the library was not used");
  }
}

static void test_backend_runs_a_packed_model(void) {
  moe_env library = with_library(MOE_ISA_AUTO), plain = without(MOE_ISA_AUTO), counted = plain;
  int i;
  counted.backend = &counting;
  memset(backend_scores, 0, sizeof backend_scores);
  calls = 0;
  backend_train(losses[0], backend_scores[0], 0, MOE_ROUTER_TASK, &counted);
  CHECK(calls >= 8, "%d calls",
        calls); /* attention and experts of two layers, though the model is packed */
  backend_train(losses[0], backend_scores[0], 0, MOE_ROUTER_TASK, &plain);
  backend_train(losses[1], backend_scores[1], 0, MOE_ROUTER_TASK, &library);
  CHECK_STATE();
  for (i = 0; i < SCORES; ++i) CHECK_NEAR(backend_scores[1][i], backend_scores[0][i], 2e-4);
}

static int32_t most_rows; /* of packed weights (131, 68) */
static int32_t takes_unpacked(void *user, int32_t m, int32_t n, int32_t k, int32_t packed) {
  (void)user;
  if (packed && n == 131 && k == 68 && m > most_rows) most_rows = m;
  return !packed;
}

/* `takes` is told whether weights are packed, which a library may then refuse, and how many rows
   each of three experts can expect. */
static void test_backend_may_leave_packed_weights(void) {
  moe_env plain = without(MOE_ISA_AUTO), counted = plain;
  moe_backend backend = counting;
  backend.takes = takes_unpacked;
  counted.backend = &backend;
  memset(backend_scores, 0, sizeof backend_scores);
  calls = 0;
  backend_train(losses[0], backend_scores[0], 0, MOE_ROUTER_TASK, &counted);
  backend_train(losses[1], backend_scores[1], 0, MOE_ROUTER_TASK, &plain);
  CHECK_STATE();
  CHECK(!calls, "%d calls", calls);
  CHECK(most_rows == backend_batch.start[36] / 3, "%d rows of %d tokens", (int)most_rows,
        (int)backend_batch.start[36]);
  CHECK(!memcmp(backend_scores[0], backend_scores[1], sizeof backend_scores[0]), "other scores");
}

#ifdef MOE_USE_BLIS
/* What moe_env_init connects follows from the kernels that BLIS says it has; the built-in ones stay
   where they are better, bit for bit. */
static void test_backend_blis_is_connected_where_it_is_better(void) {
  moe_env env;
  int generic = !strcmp(moe_blis_kernels(), "generic"), named;
  moe_env_init(&env, MOE_ISA_SCALAR);
  CHECK(!strcmp(moe_backend_name(&env), generic ? "built-in" : "blis"), "scalar, kernels %s: %s",
        moe_blis_kernels(), moe_backend_name(&env));
  named = !strcmp(moe_blis_kernels(), "haswell") || !strncmp(moe_blis_kernels(), "zen", 3);
  if (!moe_env_init(&env, MOE_ISA_AVX2) && env.backend) {
    CHECK(named, "avx2, kernels %s: %s", moe_blis_kernels(), moe_backend_name(&env));
    CHECK(env.backend->takes(NULL, 32, 384, 384, 0) && !env.backend->takes(NULL, 32, 384, 384, 1),
          "few tokens");
    CHECK(env.backend->takes(NULL, 1536, 384, 32, 0), "gradient of a weight, few tokens");
    CHECK(!env.backend->takes(NULL, 1536, 384, 512, 0) ==
              !!strncmp(moe_blis_kernels(), "haswell", 7),
          "gradient of a weight, many tokens");
  }
  if (!moe_env_init(&env, MOE_ISA_AVX512))
    CHECK(!env.backend, "avx512: %s", moe_backend_name(&env));
  CHECK(moe_blis_use(&env, 1) == MOE_OK && !strcmp(moe_backend_name(&env), "blis"), "%s",
        moe_backend_name(&env));
}

/* Whatever BLIS was told, it starts no threads: those of this process are counted. */
static void test_backend_blis_starts_no_threads(void) {
  moe_env env = with_library(MOE_ISA_AUTO);
  layer l = layer_make(600, 700, 500, &env);
  char line[256];
  int threads = 0;
  FILE *f;
  bli_thread_set_num_threads(4);
  layer_run(&l, &env);
  layer_free(&l);
  f = fopen("/proc/self/status", "r");
  if (!f) SKIP("no /proc here");
  while (fgets(line, sizeof line, f))
    if (!strncmp(line, "Threads:", 8)) threads = atoi(line + 8);
  fclose(f);
  if (getenv("MOE_TEST_THREADS"))
    threads -= atoi(getenv("MOE_TEST_THREADS")) - 1; /* of a program that has loaded this one */
  CHECK(threads == 1, "%d threads", threads);
}

/* For test_blis.sh: --kernels prints the name of the kernels, --generic the number of the generic
   ones for BLIS_ARCH_TYPE. 1 if it was one of these. */
static int backend_asked(const char *option) {
  int id;
  if (!strcmp(option, "--kernels")) return printf("%s\n", moe_blis_kernels()), 1;
  if (strcmp(option, "--generic")) return 0;
  for (id = 0; id < 64 && strcmp(bli_arch_string(id), "generic"); ++id) continue;
  return printf("%d\n", id), 1;
}
#endif

static void run_backend(void) {
  backend_tables();
#ifdef MOE_USE_BLIS
  printf("        BLIS %s, kernels %s\n", bli_info_get_version_str(), moe_blis_kernels());
  RUN(test_backend_blis_starts_no_threads); /* first: nothing else may have started any */
  RUN(test_backend_blis_is_connected_where_it_is_better);
#endif
  RUN(test_backend_products_match_double);
  RUN(test_backend_gets_what_is_large_and_nothing_else);
  RUN(test_backend_may_decline_or_be_of_another_abi);
  RUN(test_backend_threads_change_no_bit);
  RUN(test_backend_trains_a_model_like_the_built_in_kernels);
  RUN(test_backend_runs_a_packed_model);
  RUN(test_backend_may_leave_packed_weights);
}
