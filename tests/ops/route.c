/* Gates, top-k, dispatch and their gradients against a reference in double. */

enum { MAX_M = 300, ROUTE_MAX_N = 24, MAX_H = 2100, MAX_G = 100, MAX_S = 100 };

/* One case: sizes, inputs and results. */
typedef struct route_fixture {
  int32_t M, N, k, H, G, S;
  int32_t seq_start[MAX_S + 1], gate_of[MAX_S];
  uint64_t keys[MAX_S];
  float *x, *gates, *logits, *dlogits, *dx, *dgates, *dweight;
  moe_routes routes;
  moe_route_options options;
  moe_env env;
} route_fixture;

static float *route_floats(size_t n) { return (float *)calloc(n ? n : 1, sizeof(float)); }
static int32_t *ints(size_t n) { return (int32_t *)calloc(n ? n : 1, sizeof(int32_t)); }

static void route_fixture_free(route_fixture *f) {
  free(f->x), free(f->gates), free(f->logits), free(f->dlogits), free(f->dx), free(f->dgates),
      free(f->dweight);
  free(f->routes.expert), free(f->routes.weight), free(f->routes.prob), free(f->routes.order),
      free(f->routes.start);
}

/* S sequences of different lengths, gates taken in turn with steps of 7, random x, gates and
   dweight. */
static void route_fixture_make(route_fixture *f, int32_t M, int32_t N, int32_t k, int32_t H,
                               int32_t G, int32_t S) {
  uint64_t state = (uint64_t)(M * 131 + N * 17 + k * 7 + H);
  size_t m = (size_t)M, n = (size_t)N, h = (size_t)H, i;
  int32_t s;
  memset(f, 0, sizeof *f);
  f->M = M, f->N = N, f->k = k, f->H = H, f->G = G, f->S = S;
  for (s = 0; s <= S; ++s) f->seq_start[s] = s == S ? M : s ? M * s / S + (s % 2 && M / S > 2) : 0;
  for (s = 0; s < S; ++s) f->gate_of[s] = s * 7 % G, f->keys[s] = moe_key(1, 2, (uint64_t)s, 3, 4);
  f->x = route_floats(m * h), f->gates = route_floats((size_t)G * n * h),
  f->logits = route_floats(m * n), f->dlogits = route_floats(m * n);
  f->dx = route_floats(m * h), f->dgates = route_floats((size_t)G * n * h),
  f->dweight = route_floats(m * (size_t)k);
  for (i = 0; i < m * h; ++i) f->x[i] = test_random(&state);
  for (i = 0; i < (size_t)G * n * h; ++i) f->gates[i] = test_random(&state) * 2 / sqrtf((float)H);
  for (i = 0; i < m * (size_t)k; ++i) f->dweight[i] = test_random(&state);
  f->routes.M = M, f->routes.N = N, f->routes.k = k;
  f->routes.expert = ints(m * (size_t)k), f->routes.weight = route_floats(m * (size_t)k),
  f->routes.prob = route_floats(m * n);
  f->routes.order = ints(m * (size_t)k), f->routes.start = ints(n + 1);
  f->options.scale = 1;
  moe_env_init(&f->env, MOE_ISA_AUTO);
}

/* The op on the fixture's arrays. */
static moe_route_op route(route_fixture *f) {
  moe_route_op op;
  moe_route_op_init(&op);
  op.routes = &f->routes, op.logits = f->logits, op.x = f->x, op.gates = f->gates;
  op.gate_of = f->gate_of, op.seq_start = f->seq_start, op.S = f->S, op.H = f->H, op.G = f->G;
  op.options = f->options;
  op.dx = f->dx, op.dgates = f->dgates, op.dlogits = f->dlogits, op.dweight = f->dweight;
  return op;
}

static float route_forward(route_fixture *f) {
  float loss = -1;
  moe_route_op op = route(f);
  op.loss = &loss;
  return moe_route_forward(&op, &f->env) ? -2 : loss;
}

static void route_backward(route_fixture *f, float loss_scale) {
  moe_route_op op = route(f);
  op.loss_scale = loss_scale;
  CHECK(!moe_route_backward(&op, &f->env), "backward fails");
}

static double noise(const route_fixture *f, int32_t s, int32_t t, int32_t h) {
  uint32_t place = (uint32_t)((t - f->seq_start[s]) * f->H + h);
  if (!f->options.keys || !(f->options.jitter > 0)) return 1;
  return 1 + (double)f->options.jitter * ((moe__hash32(f->keys[s], place) >> 8) / 8388608.0 - 1);
}

/* The reference: probabilities (M, N) of double inputs, and the logs of the sums. */
static void reference_prob(double *prob, double *log_sum, const route_fixture *f, const double *x,
                           const double *gates) {
  int32_t s, t, i, h;
  for (s = 0; s < f->S; ++s)
    for (t = f->seq_start[s]; t < f->seq_start[s + 1]; ++t) {
      double most = -1e300, sum = 0, *p = prob + t * f->N;
      for (i = 0; i < f->N; ++i) {
        p[i] = 0;
        for (h = 0; h < f->H; ++h)
          p[i] +=
              x[t * f->H + h] * noise(f, s, t, h) * gates[(f->gate_of[s] * f->N + i) * f->H + h];
        if (p[i] > most) most = p[i];
      }
      for (i = 0; i < f->N; ++i) sum += exp(p[i] - most);
      log_sum[t] = most + log(sum);
      for (i = 0; i < f->N; ++i) p[i] = exp(p[i] - log_sum[t]);
    }
}

static void reference_weight(double *w, const route_fixture *f, const double *prob, int32_t t) {
  double sum = 0;
  int32_t j;
  for (j = 0; j < f->k; ++j) sum += prob[t * f->N + f->routes.expert[t * f->k + j]];
  for (j = 0; j < f->k; ++j) {
    w[j] = prob[t * f->N + f->routes.expert[t * f->k + j]];
    w[j] = f->options.renormalize ? w[j] / sum : w[j] * (double)f->options.scale;
  }
}

static double reference_loss(const route_fixture *f, const double *prob, const double *log_sum) {
  double balance = 0, z = 0;
  int32_t i, t, j;
  for (i = 0; i < f->N; ++i) {
    double share = 0, mean = 0;
    for (t = 0; t < f->M; ++t) {
      for (j = 0; j < f->k; ++j) share += f->routes.expert[t * f->k + j] == i;
      mean += prob[t * f->N + i];
    }
    balance += share / (f->M * f->k) * mean / f->M;
  }
  for (t = 0; t < f->M; ++t) z += log_sum[t] * log_sum[t] / f->M;
  return (double)f->options.balance * f->N * balance + (double)f->options.z_loss * z;
}

/* What the gradients belong to: sum of weight dweight, plus 3 times the losses. The experts stay
   those of the routes. */
static double reference_total(const route_fixture *f, const double *x, const double *gates) {
  static double prob[MAX_M * ROUTE_MAX_N], log_sum[MAX_M];
  double w[ROUTE_MAX_N], total;
  int32_t t, j;
  reference_prob(prob, log_sum, f, x, gates);
  total = 3 * reference_loss(f, prob, log_sum);
  for (t = 0; t < f->M; ++t) {
    reference_weight(w, f, prob, t);
    for (j = 0; j < f->k; ++j) total += w[j] * (double)f->dweight[t * f->k + j];
  }
  return total;
}

static void check_forward(route_fixture *f) {
  static double prob[MAX_M * ROUTE_MAX_N], log_sum[MAX_M];
  size_t nx = (size_t)(f->M * f->H), ng = (size_t)(f->G * f->N * f->H), i;
  double *x = (double *)malloc(nx * sizeof *x), *gates = (double *)malloc(ng * sizeof *gates),
         w[ROUTE_MAX_N];
  float loss = route_forward(f);
  int32_t t, j;
  for (i = 0; i < nx; ++i) x[i] = (double)f->x[i];
  for (i = 0; i < ng; ++i) gates[i] = (double)f->gates[i];
  reference_prob(prob, log_sum, f, x, gates);
  free(x), free(gates);
  for (t = 0; t < f->M * f->N; ++t) CHECK_NEAR(f->routes.prob[t], prob[t], 1e-6);
  for (t = 0; t < f->M; ++t) {
    reference_weight(w, f, prob, t);
    for (j = 0; j < f->k; ++j) {
      int32_t e = f->routes.expert[t * f->k + j], o, rank = 0;
      CHECK_NEAR(f->routes.weight[t * f->k + j], w[j], 2e-6 * (double)f->N);
      if (f->options.forced) continue;
      for (o = 0; o < f->N; ++o) { /* rank among the logits, ties by index */
        float a = f->logits[t * f->N + o], b = f->logits[t * f->N + e];
        rank += a > b || (!(a < b) && o < e);
      }
      CHECK(rank == j, "token %d choice %d: expert %d has rank %d", (int)t, (int)j, (int)e,
            (int)rank);
    }
  }
  CHECK_NEAR(loss, f->M ? reference_loss(f, prob, log_sum) : 0, 1e-5 * (1 + fabs((double)loss)));
}

static void check_dispatch(const route_fixture *f) {
  const moe_routes *r = &f->routes;
  int32_t i, at, slots = f->M * f->k;
  CHECK(r->start[0] == 0 && r->start[f->N] == slots, "start %d to %d", (int)r->start[0],
        (int)r->start[f->N]);
  for (i = 0; i < f->N; ++i)
    for (at = r->start[i]; at < r->start[i + 1]; ++at) {
      CHECK(r->order[at] >= 0 && r->order[at] < slots && r->expert[r->order[at]] == i,
            "slot %d is not of expert %d", (int)r->order[at], (int)i);
      CHECK(at == r->start[i] || r->order[at] > r->order[at - 1], "expert %d: out of order",
            (int)i);
    }
}

static void test_route_forward_equals_the_formulas(void) {
  static const int32_t sizes[][6] = {/* M N k H G S */ {1, 2, 1, 1, 1, 1},
                                     {9, 4, 1, 6, 3, 3},
                                     {64, 4, 2, 48, 1, 2},
                                     {65, 3, 3, 33, 2, 5},
                                     {200, 4, 1, 384, 8, 11},
                                     {130, 24, 5, 100, 4, 4},
                                     {100, 4, 1, 20, 100, 100},
                                     {0, 4, 1, 8, 1, 0}};
  size_t c;
  int kind;
  for (c = 0; c < sizeof sizes / sizeof *sizes; ++c)
    for (kind = 0; kind < 5; ++kind) {
      route_fixture f;
      route_fixture_make(&f, sizes[c][0], sizes[c][1], sizes[c][2], sizes[c][3], sizes[c][4],
                         sizes[c][5]);
      if (kind == 1) f.options.scale = (float)f.N / (float)f.k;
      if (kind == 2) f.options.renormalize = 1;
      if (kind == 3) f.options.balance = 0.5f, f.options.z_loss = 0.25f;
      if (kind == 4) f.options.jitter = 0.3f, f.options.keys = f.keys;
      check_forward(&f);
      if (!test_state) check_dispatch(&f);
      route_fixture_free(&f);
      CHECK_STATE();
    }
}

/* |gradient - numeric| / |numeric| over some elements of an array of doubles `at`, of which total()
   is a function. */
static double gradient_error(const route_fixture *f, const float *gradient, size_t n, double *at,
                             const double *x, const double *gates) {
  double error = 0, norm = 1e-12;
  size_t i, step = n / 150 + 1;
  for (i = 0; i < n; i += step) {
    double old = at[i], up, numeric;
    at[i] = old + 1e-4;
    up = reference_total(f, x, gates);
    at[i] = old - 1e-4;
    numeric = (up - reference_total(f, x, gates)) / 2e-4;
    at[i] = old;
    error += (numeric - (double)gradient[i]) * (numeric - (double)gradient[i]);
    norm += numeric * numeric;
  }
  return sqrt(error / norm);
}

static void check_gradients(route_fixture *f, const char *what) {
  size_t nx = (size_t)(f->M * f->H), ng = (size_t)(f->G * f->N * f->H), i;
  double *x = (double *)malloc(nx * sizeof *x), *gates = (double *)malloc(ng * sizeof *gates), ex,
         eg;
  route_forward(f);
  route_backward(f, 3);
  for (i = 0; i < nx; ++i) x[i] = (double)f->x[i];
  for (i = 0; i < ng; ++i) gates[i] = (double)f->gates[i];
  ex = gradient_error(f, f->dx, nx, x, x, gates);
  eg = gradient_error(f, f->dgates, ng, gates, x, gates);
  free(x), free(gates);
  CHECK(ex < 5e-6, "%s: dx off by %g", what, ex);
  CHECK(eg < 5e-6, "%s: dgates off by %g", what, eg);
}

static void test_route_gradients_equal_differences(void) {
  static const int32_t ks[] = {1, 2, 4};
  static const char *const names[] = {"paper", "scaled", "renormalised", "balance",
                                      "z",     "jitter", "all",          "forced"};
  int kind, j;
  for (kind = 0; kind < 8; ++kind)
    for (j = 0; j < 3; ++j) {
      route_fixture f;
      static int32_t forced[MAX_M * 4];
      route_fixture_make(&f, 23, 4, ks[j], 37, 3, 5);
      if (kind == 1) f.options.scale = 4.0f / (float)f.k;
      if ((kind == 2 || kind == 6) && f.k > 1) f.options.renormalize = 1;
      if (kind == 3 || kind == 6) f.options.balance = 0.5f;
      if (kind == 4 || kind == 6) f.options.z_loss = 0.25f;
      if (kind == 5 || kind == 6) f.options.jitter = 0.4f, f.options.keys = f.keys;
      if (kind == 7) {
        int32_t i;
        for (i = 0; i < f.M * f.k; ++i) forced[i] = (i / f.k * 3 + i % f.k) % 4;
        f.options.forced = forced;
      }
      check_gradients(&f, names[kind]);
      route_fixture_free(&f);
      CHECK_STATE();
    }
}

static void test_route_gradients_of_long_rows_with_jitter(void) {
  route_fixture f;
  route_fixture_make(&f, 3, 3, 1, 2100, 2, 2);
  f.options.jitter = 0.1f, f.options.keys = f.keys;
  check_forward(&f);
  if (!test_state) check_gradients(&f, "H 2100");
  route_fixture_free(&f);
}

static void test_route_renormalised_top_1_has_weight_1_and_no_gradient(void) {
  route_fixture f;
  int32_t i;
  route_fixture_make(&f, 20, 4, 1, 16, 2, 3);
  f.options.renormalize = 1;
  route_forward(&f);
  route_backward(&f, 1);
  for (i = 0; i < 20; ++i) CHECK(f.routes.weight[i] == 1, "weight %g", (double)f.routes.weight[i]);
  for (i = 0; i < 20 * 16; ++i) CHECK(f.dx[i] == 0, "dx %g", (double)f.dx[i]);
  route_fixture_free(&f);
}

static void test_route_ties_go_to_the_lowest_index(void) {
  route_fixture f;
  int32_t t, j, h;
  route_fixture_make(&f, 10, 6, 3, 19, 1, 2);
  for (j = 1; j < 6; ++j)
    for (h = 0; h < 19; ++h) f.gates[j * 19 + h] = f.gates[h]; /* all alike */
  route_forward(&f);
  for (t = 0; t < 10; ++t)
    for (j = 0; j < 3; ++j)
      CHECK(f.routes.expert[t * 3 + j] == j, "token %d choice %d: expert %d", (int)t, (int)j,
            (int)f.routes.expert[t * 3 + j]);
  check_dispatch(&f);
  route_fixture_free(&f);
}

/* The experts that one token with these 3 logits goes to, as decimal digits: 20 is expert 2, then
   expert 0. */
static int choices(const float *logits, const uint8_t *pruned, int32_t k, int32_t renormalize) {
  static const int32_t at[2] = {0, 1}, gate_of[1] = {0};
  float x = 1, out[3], weight[3], prob[3];
  int32_t expert[3], order[3], start[4];
  int number = 0;
  moe_routes r;
  moe_route_op op;
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  r.M = 1, r.N = 3, r.k = k;
  r.expert = expert, r.weight = weight, r.prob = prob, r.order = order, r.start = start;
  moe_route_op_init(&op);
  op.routes = &r, op.logits = out, op.x = &x, op.gates = logits, op.gate_of = gate_of;
  op.seq_start = at, op.S = 1, op.H = 1, op.G = 1;
  op.options.pruned = pruned, op.options.renormalize = renormalize;
  if (moe_route_forward(&op, &env)) return -1;
  for (k = 0; k < r.k; ++k) number = 10 * number + expert[k];
  return number;
}

static void test_route_compares_logits_where_probabilities_are_equal(void) {
  static const float far[3] = {120, -5, 0}, near[3] = {0, 1e-9f, -1e-9f}, even[3] = {1, 2, 2};
  static const uint8_t pruned[3] = {1, 0, 0};
  CHECK(choices(far, NULL, 3, 0) == 21, "%d", choices(far, NULL, 3, 0)); /* 0, 2, 1 */
  CHECK(choices(far, pruned, 1, 1) == 2, "%d", choices(far, pruned, 1, 1));
  CHECK(choices(far, pruned, 2, 1) == 21, "%d", choices(far, pruned, 2, 1));
  CHECK(choices(near, NULL, 3, 0) == 102, "%d", choices(near, NULL, 3, 0));
  CHECK(choices(even, NULL, 3, 0) == 120, "%d", choices(even, NULL, 3, 0));
}

static void test_route_refuses_sizes_and_options_out_of_range(void) {
  static const uint8_t two[4] = {0, 1, 1, 0}, one[4] = {1, 0, 0, 0};
  route_fixture f;
  moe_route_op op;
  route_fixture_make(&f, 6, 4, 2, 8, 1, 2);
  op = route(&f);
  CHECK(!moe_route_forward(&op, &f.env), "the op itself");
  f.routes.k = 5;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "k above N");
  f.routes.k = 0;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "k = 0");
  f.routes.k = 2, f.routes.N = MOE_MAX_EXPERTS + 1;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "too many experts");
  f.env.log = models_log;
  f.routes.N = 0;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT && strstr(said, "N is 0"), "%s", said);
  f.routes.N = MOE_MAX_EXPERTS;
  op.H = 0; /* no gate is read */
  CHECK(!moe__routes_check("route", &f.routes, &f.env), "the most experts: %s", said);
  op.H = 8;
  f.routes.N = 4, f.routes.M = 5;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "sequences of more tokens");
  f.routes.M = INT32_MAX / 2 + 1;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "slots that do not fit 32 bits");
  f.routes.M = 6, op.options.scale = 0;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "scale 0");
  op.options.renormalize = 1;
  CHECK(!moe_route_forward(&op, &f.env), "which renormalised weights do not use");
  op.options.masked = two;
  CHECK(!moe_route_forward(&op, &f.env), "two of four masked");
  op.options.pruned = one;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "one expert left for two choices");
  CHECK(moe_route_backward(&op, &f.env) == MOE_E_ARGUMENT, "backward checks as well");
  route_fixture_free(&f);
}

static void test_route_refuses_gates_and_experts_that_do_not_exist(void) {
  static const int32_t twice[12] = {0, 1, 3, 2, 1, 0, 2, 3, 0, 1, 4, 2};
  static const int32_t falling[3] = {0, 7, 6}, late[3] = {1, 3, 6};
  route_fixture f;
  moe_route_op op;
  route_fixture_make(&f, 6, 4, 2, 8, 2, 2);
  op = route(&f);
  CHECK(!moe_route_forward(&op, &f.env), "the op itself");
  op.G = 1;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "gate 1 of 1");
  op.G = 2, f.gate_of[0] = -1;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "gate -1");
  f.gate_of[0] = 0, op.options.forced = twice;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "expert 4 of 4");
  op.options.forced = NULL, op.seq_start = falling;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "a sequence of -1 tokens");
  op.seq_start = late;
  CHECK(moe_route_forward(&op, &f.env) == MOE_E_ARGUMENT, "rows of no sequence");
  route_fixture_free(&f);
}

static void test_route_one_expert_is_dense(void) {
  route_fixture f;
  moe_route_op op;
  float loss = 1;
  int32_t t;
  route_fixture_make(&f, 70, 1, 1, 16, 2, 3);
  f.options.balance = f.options.z_loss = 1;
  op = route(&f);
  op.loss = &loss, op.logits = NULL, op.gates = NULL, op.gate_of = NULL;
  CHECK(!moe_route_forward(&op, &f.env) && loss == 0, "a loss of %g", (double)loss);
  op.x = NULL, op.dx = op.dgates = op.dlogits = NULL, op.dweight = NULL;
  CHECK(!moe_route_forward(&op, &f.env) && !moe_route_backward(&op, &f.env), "nothing is read");
  CHECK(route_forward(&f) == 0, "a loss");
  route_backward(&f, 1);
  for (t = 0; t < 70; ++t) {
    CHECK(f.routes.prob[t] == 1 && f.routes.weight[t] == 1 && f.routes.expert[t] == 0 &&
              f.routes.order[t] == t,
          "token %d", (int)t);
    CHECK(f.dx[t * 16] == 0, "dx");
  }
  for (t = 0; t < 2 * 16; ++t) CHECK(f.dgates[t] == 0, "dgates");
  CHECK(f.routes.start[0] == 0 && f.routes.start[1] == 70, "start");
  route_fixture_free(&f);
}

static void test_route_balanced_tokens_cost_the_coefficient(void) {
  route_fixture f;
  int32_t t, i;
  route_fixture_make(&f, 12, 4, 1, 4, 1, 1);
  memset(f.gates, 0, 16 * sizeof *f.gates);
  for (t = 0; t < 12; ++t)
    for (i = 0; i < 4; ++i) f.x[t * 4 + i] = t % 4 == i;
  for (i = 0; i < 4; ++i) f.gates[i * 4 + i] = 1; /* token t prefers expert t mod 4 */
  f.options.balance = 0.01f;
  CHECK_NEAR(route_forward(&f), 0.01, 1e-8);
  for (t = 0; t < 12; ++t) f.x[t * 4 + t % 4] = 0, f.x[t * 4] = 5; /* all prefer expert 0 */
  CHECK(route_forward(&f) > 0.035f, "collapse costs little");
  route_fixture_free(&f);
}

static void test_route_forced_experts_are_taken(void) {
  route_fixture f;
  static int32_t forced[80];
  int32_t i;
  route_fixture_make(&f, 40, 5, 2, 10, 2, 4);
  for (i = 0; i < 80; ++i) forced[i] = i % 2 ? 4 : i / 2 % 4;
  f.options.forced = forced;
  check_forward(&f);
  if (!test_state) check_dispatch(&f);
  CHECK(!memcmp(f.routes.expert, forced, sizeof forced), "other experts");
  f.options.renormalize = 1; /* a forced expert without any probability must not divide by zero */
  for (i = 0; i < 50; ++i) f.gates[4 * 10 + i % 10] = -1e30f, f.gates[5 * 10 + i] = 0;
  for (i = 0; i < 400; ++i) f.x[i] = 1;
  for (i = 0; i < 80; ++i) forced[i] = 4;
  route_forward(&f);
  route_backward(&f, 1);
  for (i = 0; i < 80; ++i) CHECK(f.routes.weight[i] <= 1, "weight %g", (double)f.routes.weight[i]);
  for (i = 0; i < 400; ++i) CHECK(f.dx[i] * 0 == 0, "dx %g", (double)f.dx[i]);
  route_fixture_free(&f);
}

/* Probabilities of 1e-17 down to 1e-41, whose reciprocal is no float: the gradient of renormalised
   weights is that of a softmax over the forced experts alone. */
static void test_route_forced_experts_of_hardly_any_probability_have_gradients(void) {
  static const float logit[] = {-40, -44, -50, -80, -93};
  static int32_t forced[2] = {1, 2};
  int i;
  for (i = 0; i < 5; ++i) {
    route_fixture f;
    double w;
    route_fixture_make(&f, 1, 3, 2, 1, 1, 1);
    f.options.forced = forced, f.options.renormalize = 1;
    f.x[0] = 1;
    f.gates[0] = 0, f.gates[1] = logit[i], f.gates[2] = logit[i] - 1;
    f.dweight[0] = 0.5f, f.dweight[1] = -6;
    route_forward(&f);
    route_backward(&f, 1);
    w = 1 / (1 + exp(-1));
    CHECK_NEAR(f.routes.weight[0], w, 1e-3);
    CHECK_NEAR(f.dlogits[0], 0, 1e-6);
    CHECK_NEAR(f.dlogits[1], w * (1 - w) * 6.5, 1e-3);
    CHECK_NEAR(f.dlogits[2], -w * (1 - w) * 6.5, 1e-3);
    route_fixture_free(&f);
    CHECK_STATE();
  }
}

/* Probabilities that are exactly 0 cannot be renormalised: the choices share the weight. */
static void test_route_forced_experts_of_no_probability_share_the_weight(void) {
  static int32_t forced[2] = {1, 2};
  route_fixture f;
  route_fixture_make(&f, 1, 3, 2, 1, 1, 1);
  f.options.forced = forced, f.options.renormalize = 1;
  f.x[0] = 1;
  f.gates[0] = 0, f.gates[1] = -300, f.gates[2] = -310;
  f.dweight[0] = 0.5f, f.dweight[1] = -6;
  route_forward(&f);
  CHECK(f.routes.prob[1] <= 0 && f.routes.prob[2] <= 0, "%g", (double)f.routes.prob[1]);
  CHECK_NEAR(f.routes.weight[0], 0.5, 0);
  CHECK_NEAR(f.routes.weight[1], 0.5, 0);
  route_backward(&f, 1);
  CHECK(isfinite(f.dlogits[0]) && isfinite(f.dlogits[1]) && isfinite(f.dlogits[2]), "gradients");
  route_fixture_free(&f);
}

static void test_route_survives_numbers_that_are_none(void) {
  static const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f};
  int i;
  for (i = 0; i < 4; ++i) {
    route_fixture f;
    route_fixture_make(&f, 66, 4, 2, 24, 2, 3);
    f.x[30 * 24 + 5] = bad[i];
    f.gates[3] = bad[i];
    route_forward(&f);
    check_dispatch(&f);
    route_fixture_free(&f);
    CHECK_STATE();
  }
}

static void test_route_jitter_is_noise_around_1(void) {
  static float y[100000], x[100000];
  double mean = 0, square = 0;
  int i;
  for (i = 0; i < 100000; ++i) x[i] = 1;
  moe__route_jitter(y, x, 100000, 77, 0, 0.25f);
  for (i = 0; i < 100000; ++i) {
    CHECK(y[i] >= 0.75f && y[i] <= 1.25f, "%g", (double)y[i]);
    mean += (double)y[i] - 1;
    square += ((double)y[i] - 1) * ((double)y[i] - 1);
  }
  CHECK_NEAR(mean / 100000, 0, 0.002);
  CHECK_NEAR(square / 100000, 0.25 * 0.25 / 3, 0.0005);
}

static void test_route_jitter_off_changes_nothing(void) {
  route_fixture f, g;
  route_fixture_make(&f, 40, 4, 2, 50, 2, 3);
  route_fixture_make(&g, 40, 4, 2, 50, 2, 3);
  g.options.keys = g.keys; /* keys, but no jitter */
  route_forward(&f);
  route_forward(&g);
  CHECK(!memcmp(f.logits, g.logits, 160 * sizeof(float)), "keys alone changed the logits");
  g.options.jitter = 0.1f;
  route_forward(&g);
  CHECK(memcmp(f.logits, g.logits, 160 * sizeof(float)), "jitter did nothing");
  route_fixture_free(&f);
  route_fixture_free(&g);
}

static void route_compare(const route_fixture *a, const route_fixture *b, const char *what) {
  size_t M = (size_t)a->M, N = (size_t)a->N, H = (size_t)a->H, k = (size_t)a->k;
  CHECK(!memcmp(a->logits, b->logits, M * N * 4), "%s: logits", what);
  CHECK(!memcmp(a->routes.prob, b->routes.prob, M * N * 4), "%s: prob", what);
  CHECK(!memcmp(a->routes.weight, b->routes.weight, M * k * 4), "%s: weight", what);
  CHECK(!memcmp(a->routes.order, b->routes.order, M * k * 4), "%s: order", what);
  CHECK(!memcmp(a->dx, b->dx, M * H * 4), "%s: dx", what);
  CHECK(!memcmp(a->dgates, b->dgates, (size_t)a->G * N * H * 4), "%s: dgates", what);
}

static void test_route_has_the_same_bits_everywhere(void) {
  int jitter, i, threads, have;
  for (jitter = 0; jitter < 2; ++jitter) {
    route_fixture first;
    have = 0;
    for (i = 0; i < ISAS; ++i)
      for (threads = 1; threads <= 8; threads = threads == 3 ? 8 : threads + 1) {
        route_fixture f;
        moe_pool *pool;
        route_fixture_make(&f, 290, 4, 2, 203, 3, 9);
        f.options.balance = 0.1f, f.options.z_loss = 0.2f;
        if (jitter) f.options.jitter = 0.2f, f.options.keys = f.keys;
        if (moe_env_init(&f.env, isas[i])) {
          route_fixture_free(&f);
          break;
        }
        CHECK(moe_pool_create_exact(&pool, threads, &f.env) == MOE_OK, "pool");
        route_forward(&f);
        route_backward(&f, 0.5f);
        moe_pool_free(pool);
        if (!have++) {
          first = f;
          continue;
        }
        route_compare(&first, &f, moe_isa_name(isas[i]));
        route_fixture_free(&f);
        CHECK_STATE();
        if (threads == 8) break;
      }
    route_fixture_free(&first);
  }
}

/* Sequences one by one, gradients of the gates accumulated: the bits of the whole batch. */
static void test_route_does_not_depend_on_the_batch(void) {
  route_fixture whole, part;
  int32_t s;
  route_fixture_make(&whole, 100, 4, 2, 45, 3, 6);
  route_fixture_make(&part, 100, 4, 2, 45, 3, 6);
  whole.options.jitter = part.options.jitter = 0.2f;
  whole.options.keys = whole.keys;
  route_forward(&whole);
  route_backward(&whole, 1);
  for (s = 0; s < 6; ++s) {
    int32_t start = part.seq_start[s], local[2] = {0, 0}, order[200], first[5];
    moe_routes r = part.routes;
    moe_route_op op;
    local[1] = part.seq_start[s + 1] - start;
    r.M = local[1];
    r.expert += start * 2;
    r.weight += start * 2;
    r.prob += start * 4;
    r.order = order;
    r.start = first;
    part.options.keys = part.keys + s;
    op = route(&part);
    op.routes = &r, op.seq_start = local, op.S = 1;
    op.logits += start * 4, op.x += start * 45, op.gate_of += s;
    op.dx += start * 45, op.dweight += start * 2;
    CHECK(!moe_route_forward(&op, &part.env) && !moe_route_backward(&op, &part.env), "fails");
  }
  memcpy(part.routes.order, whole.routes.order, 200 * sizeof(int32_t));
  route_compare(&whole, &part, "sequence by sequence");
  route_fixture_free(&whole);
  route_fixture_free(&part);
}

static void run_route(void) {
  RUN(test_route_forward_equals_the_formulas);
  RUN(test_route_gradients_equal_differences);
  RUN(test_route_gradients_of_long_rows_with_jitter);
  RUN(test_route_renormalised_top_1_has_weight_1_and_no_gradient);
  RUN(test_route_ties_go_to_the_lowest_index);
  RUN(test_route_compares_logits_where_probabilities_are_equal);
  RUN(test_route_refuses_sizes_and_options_out_of_range);
  RUN(test_route_refuses_gates_and_experts_that_do_not_exist);
  RUN(test_route_one_expert_is_dense);
  RUN(test_route_balanced_tokens_cost_the_coefficient);
  RUN(test_route_forced_experts_are_taken);
  RUN(test_route_forced_experts_of_hardly_any_probability_have_gradients);
  RUN(test_route_forced_experts_of_no_probability_share_the_weight);
  RUN(test_route_survives_numbers_that_are_none);
  RUN(test_route_jitter_is_noise_around_1);
  RUN(test_route_jitter_off_changes_nothing);
  RUN(test_route_has_the_same_bits_everywhere);
  RUN(test_route_does_not_depend_on_the_batch);
}
