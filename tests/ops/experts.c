/* The MoE layer: gate and experts together against PyTorch, experts against a reference in double,
   dense and empty experts. */
#include "golden/ops.h"

enum { EXPERTS_MAX_N = 70 };

/* A layer with everything it needs. Weights of all experts in one array each. */
typedef struct experts_fixture {
  int32_t M, N, k, H, F;
  float *x, *dy, *w1, *b1, *w2, *b2, *panels;
  float *y, *pre, *e, *scratch;
  float *dx, *dweight, *dw1, *db1, *dw2, *db2;
  const float *w_in[EXPERTS_MAX_N], *w_out[EXPERTS_MAX_N], *b_in[EXPERTS_MAX_N],
      *b_out[EXPERTS_MAX_N];
  float *d_in[EXPERTS_MAX_N], *d_out[EXPERTS_MAX_N], *d_b_in[EXPERTS_MAX_N],
      *d_b_out[EXPERTS_MAX_N];
  moe_mat in[EXPERTS_MAX_N], out[EXPERTS_MAX_N];
  moe_routes routes;
  moe_env env;
} experts_fixture;

/* Exactly n floats, so that a sanitizer sees the first one too many; not zero, since memory is
   dirty in life. */
static float *experts_floats(size_t n) {
  float *p = (float *)malloc((n ? n : 1) * sizeof *p);
  size_t i;
  for (i = 0; i < n; ++i) p[i] = NAN;
  return p;
}

static float *zeros(size_t n) { return (float *)calloc(n ? n : 1, sizeof(float)); }

static float *randoms(size_t n, float scale, uint64_t *state) {
  float *p = experts_floats(n);
  size_t i;
  for (i = 0; i < n; ++i) p[i] = test_random(state) * scale;
  return p;
}

static void experts_fixture_free(experts_fixture *f) {
  free(f->x), free(f->dy), free(f->w1), free(f->b1), free(f->w2), free(f->b2), free(f->panels);
  free(f->y), free(f->pre), free(f->e), free(f->scratch);
  free(f->dx), free(f->dweight), free(f->dw1), free(f->db1), free(f->dw2), free(f->db2);
  free(f->routes.expert), free(f->routes.weight), free(f->routes.prob), free(f->routes.order),
      free(f->routes.start);
}

static void clear_gradients(experts_fixture *f) {
  size_t M = (size_t)f->M, N = (size_t)f->N, H = (size_t)f->H, F = (size_t)f->F;
  memset(f->dx, 0, M * H * sizeof(float));
  memset(f->dw1, 0, N * F * H * sizeof(float));
  memset(f->db1, 0, N * F * sizeof(float));
  memset(f->dw2, 0, N * F * H * sizeof(float));
  memset(f->db2, 0, N * H * sizeof(float));
}

/* Random weights and routes; expert `empty` (if any) gets no token. packed: forward reads panels.
 */
static void experts_fixture_make(experts_fixture *f, int32_t M, int32_t N, int32_t k, int32_t H,
                                 int32_t F, int32_t empty, int packed) {
  size_t m = (size_t)M, n = (size_t)N, h = (size_t)H, w = (size_t)F, i, one, two;
  uint64_t state = (uint64_t)(M * 131 + N * 17 + k * 7 + H);
  int32_t t, j;
  memset(f, 0, sizeof *f);
  moe_env_init(&f->env, MOE_ISA_AUTO);
  f->M = M, f->N = N, f->k = k, f->H = H, f->F = F;
  f->x = randoms(m * h, 1, &state), f->dy = randoms(m * h, 1, &state);
  f->w1 = randoms(n * w * h, 1, &state), f->b1 = randoms(n * w, 1, &state);
  f->w2 = randoms(n * w * h, 1, &state), f->b2 = randoms(n * h, 1, &state);
  f->y = experts_floats(m * h), f->pre = experts_floats(m * (size_t)k * w),
  f->e = experts_floats(m * (size_t)k * h);
  f->scratch = experts_floats(moe_experts_scratch(M, k, H, F, 1));
  f->dx = zeros(m * h), f->dweight = experts_floats(m * (size_t)k);
  f->dw1 = zeros(n * w * h), f->db1 = zeros(n * w), f->dw2 = zeros(n * w * h),
  f->db2 = zeros(n * h);
  one = moe_pack_floats(F, H), two = moe_pack_floats(H, F);
  f->panels = experts_floats(n * (one + two));
  for (i = 0; i < n; ++i) {
    f->w_in[i] = f->w1 + i * w * h, f->w_out[i] = f->w2 + i * w * h, f->b_in[i] = f->b1 + i * w,
    f->b_out[i] = f->b2 + i * h;
    f->d_in[i] = f->dw1 + i * w * h, f->d_out[i] = f->dw2 + i * w * h,
    f->d_b_in[i] = f->db1 + i * w, f->d_b_out[i] = f->db2 + i * h;
    f->in[i] = moe_mat_rows(f->w_in[i], F, H);
    f->out[i] = moe_mat_rows(f->w_out[i], H, F);
    if (!packed) continue;
    moe_pack(f->panels + i * (one + two), f->w_in[i], F, H, &f->env);
    moe_pack(f->panels + i * (one + two) + one, f->w_out[i], H, F, &f->env);
    f->in[i] = moe_mat_panels(f->panels + i * (one + two), F, H);
    f->out[i] = moe_mat_panels(f->panels + i * (one + two) + one, H, F);
  }
  f->routes.M = M, f->routes.N = N, f->routes.k = k;
  f->routes.expert = (int32_t *)malloc((m * (size_t)k + 1) * sizeof(int32_t));
  f->routes.order = (int32_t *)malloc((m * (size_t)k + 1) * sizeof(int32_t));
  f->routes.start = (int32_t *)malloc((n + 1) * sizeof(int32_t));
  f->routes.weight = experts_floats(m * (size_t)k), f->routes.prob = experts_floats(m * n);
  for (t = 0; t < M; ++t) {
    int32_t at = (int32_t)((test_random(&state) + 1) * 1000);
    for (j = 0; j < k; ++j) {
      if (at++ % N == empty) ++at;
      f->routes.expert[t * k + j] = (at - 1) % N;
      f->routes.weight[t * k + j] = N == 1 ? 1 : 0.1f + 0.2f * (test_random(&state) + 1);
    }
  }
  moe__route_dispatch(&f->routes);
}

/* The op on the fixture's arrays. */
static moe_experts_op experts(experts_fixture *f) {
  moe_experts_op op;
  moe_experts_op_init(&op);
  op.y = f->y, op.pre = f->pre, op.e = f->e, op.x = f->x, op.routes = &f->routes;
  op.in = f->in, op.out = f->out, op.b_in = f->b_in, op.b_out = f->b_out;
  op.N = f->N, op.H = f->H, op.F = f->F, op.scratch = f->scratch;
  op.dx = f->dx, op.dweight = f->dweight, op.dy = f->dy, op.w_in = f->w_in, op.w_out = f->w_out;
  op.d_in = f->d_in, op.d_b_in = f->d_b_in, op.d_out = f->d_out, op.d_b_out = f->d_b_out;
  return op;
}

static void experts_forward(experts_fixture *f) {
  moe_experts_op op = experts(f);
  CHECK(!moe_experts_forward(&op, &f->env), "forward fails");
}

static void experts_backward(experts_fixture *f) {
  moe_experts_op op = experts(f);
  CHECK(!moe_experts_backward(&op, &f->env), "backward fails");
}

/* Norm of the error over the norm of what is right. */
static double distance(const float *a, const double *b, size_t n) {
  double error = 0, norm = 1e-30;
  size_t i;
  for (i = 0; i < n; ++i) {
    error += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return error > 0 ? sqrt(error / norm) : error * 0; /* NaN stays */
}

/* ---- PyTorch's numbers ---- */

typedef struct golden_case {
  const char *name;
  int tasks, k, renormalize, losses, empty;
  float scale;
  const int *experts;
  const double *y, *weights, *loss, *dx, *dgate, *dw1, *db1, *dw2, *db2;
} golden_case;

#define GOLDEN(name, tasks, k, scale, renormalize, empty)                                          \
  {                                                                                                \
#name, tasks, k, renormalize, 0, empty, scale, golden_moe_##name##_experts,                    \
        golden_moe_##name##_y, golden_moe_##name##_weights, NULL, golden_moe_##name##_dx,          \
        golden_moe_##name##_dgate, golden_moe_##name##_dw1, golden_moe_##name##_db1,               \
        golden_moe_##name##_dw2, golden_moe_##name##_db2                                           \
  }
#define GOLDEN_LOSS(name, tasks, k)                                                                \
  {                                                                                                \
#name, tasks, k, 0, 1, 0, 1, golden_moe_##name##_experts, golden_moe_##name##_y,               \
        golden_moe_##name##_weights, golden_moe_##name##_loss, golden_moe_##name##_dx,             \
        golden_moe_##name##_dgate, golden_moe_##name##_dw1, golden_moe_##name##_db1,               \
        golden_moe_##name##_dw2, golden_moe_##name##_db2                                           \
  }
static const golden_case goldens[] = {GOLDEN(shared_top1, 1, 1, 1, 0, 0),
                                      GOLDEN(task_top1, 3, 1, 1, 0, 0),
                                      GOLDEN(task_top2, 3, 2, 1, 0, 0),
                                      GOLDEN(task_top2_n, 3, 2, 2, 0, 0),
                                      GOLDEN(task_top2_renormalised, 3, 2, 1, 1, 0),
                                      GOLDEN(task_all, 3, 4, 1, 0, 0),
                                      GOLDEN_LOSS(shared_top1_losses, 1, 1),
                                      GOLDEN_LOSS(task_top2_losses, 3, 2),
                                      GOLDEN(task_top1_empty, 3, 1, 1, 0, 1)};

#define CHECK_DISTANCE(a, b, n)                                                                    \
  CHECK(distance(a, b, (size_t)(n)) < 2e-6, "%s: %s off by %g", c->name, #a,                       \
        distance(a, b, (size_t)(n)))

static void check_golden(experts_fixture *f, const golden_case *c) {
  static const int32_t seq_start[5] = {0, 3, 4, 5, 9}, one_gate[4] = {0, 0, 0, 0},
                       gate_of[4] = {0, 2, 2, 1};
  float gates[72], dgates[72] = {0}, logits[36], dlogits[36], loss = -1;
  moe_route_op route;
  int t;
  moe_route_op_init(&route);
  route.routes = &f->routes, route.logits = logits, route.loss = &loss, route.x = f->x;
  route.gates = gates, route.gate_of = c->tasks == 1 ? one_gate : gate_of;
  route.seq_start = seq_start, route.S = 4, route.H = 6, route.G = c->tasks;
  route.dx = f->dx, route.dgates = dgates, route.dlogits = dlogits, route.dweight = f->dweight;
  route.options.scale = c->scale;
  route.options.renormalize = c->renormalize;
  if (c->losses) route.options.balance = 0.5f, route.options.z_loss = 0.25f;
  golden_fill(f->x, 54, "moe9.x", 2), golden_fill(f->dy, 54, "moe9.dy", 1),
      golden_fill(gates, (size_t)c->tasks * 24, "moe9.gate", 1);
  golden_fill(f->w1, 120, "moe9.w1", 0.5f), golden_fill(f->b1, 20, "moe9.b1", 0.5f);
  golden_fill(f->w2, 120, "moe9.w2", 0.5f), golden_fill(f->b2, 24, "moe9.b2", 0.5f);
  if (c->empty) {
    for (t = 0; t < 9; ++t) f->x[t * 6] = 1;
    for (t = 0; t < 3; ++t) gates[t * 24 + 12] = -16;
  }
  CHECK(!moe_route_forward(&route, &f->env), "%s: routes fail", c->name);
  experts_forward(f);
  experts_backward(f);
  CHECK(!moe_route_backward(&route, &f->env), "%s: routes fail", c->name);
  for (t = 0; t < 9 * c->k; ++t)
    CHECK(f->routes.expert[t] == c->experts[t], "%s: choice %d is expert %d, not %d", c->name, t,
          (int)f->routes.expert[t], c->experts[t]);
  CHECK_DISTANCE(f->routes.weight, c->weights, 9 * c->k);
  CHECK_DISTANCE(f->y, c->y, 54);
  CHECK_NEAR(loss, c->loss ? *c->loss : 0, 1e-6);
  CHECK_DISTANCE(f->dx, c->dx, 54);
  CHECK_DISTANCE(dgates, c->dgate, c->tasks * 24);
  CHECK_DISTANCE(f->dw1, c->dw1, 120);
  CHECK_DISTANCE(f->db1, c->db1, 20);
  CHECK_DISTANCE(f->dw2, c->dw2, 120);
  CHECK_DISTANCE(f->db2, c->db2, 24);
}

static void test_experts_layer_equals_pytorch(void) {
  size_t i;
  for (i = 0; i < sizeof goldens / sizeof *goldens; ++i) {
    experts_fixture f;
    experts_fixture_make(&f, 9, 4, goldens[i].k, 6, 5, -1, 0);
    check_golden(&f, &goldens[i]);
    experts_fixture_free(&f);
    CHECK_STATE();
  }
}

/* ---- a reference in double ---- */

/* Sum over tokens of y dy, y = sum over the choices of weight (W_out GELU(W_in x + b_in) + b_out);
   everything in double. */
typedef struct experts_reference {
  double *x, *weight, *w1, *b1, *w2, *b2;
} experts_reference;

static double total(const experts_fixture *f, const experts_reference *r, double *y_out) {
  double sum = 0;
  int32_t t, j, p, h;
  for (t = 0; t < f->M; ++t)
    for (j = 0; j < f->k; ++j) {
      int32_t i = f->routes.expert[t * f->k + j];
      double weight = r->weight[t * f->k + j], a[64];
      for (p = 0; p < f->F; ++p) {
        double v = r->b1[i * f->F + p];
        for (h = 0; h < f->H; ++h) v += r->w1[(i * f->F + p) * f->H + h] * r->x[t * f->H + h];
        a[p] = v * 0.5 * (1 + erf(v * 0.70710678118654752440));
      }
      for (h = 0; h < f->H; ++h) {
        double v = r->b2[i * f->H + h];
        for (p = 0; p < f->F; ++p) v += r->w2[(i * f->H + h) * f->F + p] * a[p];
        sum += weight * v * (double)f->dy[t * f->H + h];
        if (y_out) y_out[t * f->H + h] += weight * v;
      }
    }
  return sum;
}

static double *doubles(const float *x, size_t n) {
  double *d = (double *)malloc((n ? n : 1) * sizeof *d);
  size_t i;
  for (i = 0; i < n; ++i) d[i] = (double)x[i];
  return d;
}

static double difference_error(const experts_fixture *f, const experts_reference *r,
                               const float *gradient, double *at, size_t n) {
  double error = 0, norm = 1e-12;
  size_t i, step = n / 60 + 1;
  for (i = 0; i < n; i += step) {
    double old = at[i], up, numeric;
    at[i] = old + 1e-4;
    up = total(f, r, NULL);
    at[i] = old - 1e-4;
    numeric = (up - total(f, r, NULL)) / 2e-4;
    at[i] = old;
    error += (numeric - (double)gradient[i]) * (numeric - (double)gradient[i]);
    norm += numeric * numeric;
  }
  return sqrt(error / norm);
}

#define CHECK_DIFFERENCE(gradient, at, n)                                                          \
  do {                                                                                             \
    double wrong = difference_error(f, &r, gradient, at, n);                                       \
    CHECK(wrong < 5e-6, "M %d N %d k %d H %d F %d: %s off by %g", (int)f->M, (int)f->N, (int)f->k, \
          (int)f->H, (int)f->F, #gradient, wrong);                                                 \
  } while (0)

static void check_reference(experts_fixture *f) {
  size_t M = (size_t)f->M, N = (size_t)f->N, H = (size_t)f->H, F = (size_t)f->F, k = (size_t)f->k;
  experts_reference r;
  double *y = (double *)calloc(M * H + 1, sizeof *y), off;
  r.x = doubles(f->x, M * H), r.weight = doubles(f->routes.weight, M * k);
  r.w1 = doubles(f->w1, N * F * H), r.b1 = doubles(f->b1, N * F), r.w2 = doubles(f->w2, N * F * H),
  r.b2 = doubles(f->b2, N * H);
  experts_forward(f);
  experts_backward(f);
  total(f, &r, y);
  off = distance(f->y, y, M * H);
  free(y);
  CHECK(off < 2e-6, "y off by %g", off);
  CHECK_DIFFERENCE(f->dx, r.x, M * H);
  if (f->N > 1) CHECK_DIFFERENCE(f->dweight, r.weight, M * k);
  CHECK_DIFFERENCE(f->dw1, r.w1, N * F * H);
  CHECK_DIFFERENCE(f->db1, r.b1, N * F);
  CHECK_DIFFERENCE(f->dw2, r.w2, N * F * H);
  CHECK_DIFFERENCE(f->db2, r.b2, N * H);
  free(r.x), free(r.weight), free(r.w1), free(r.b1), free(r.w2), free(r.b2);
}

static void test_experts_equal_a_reference_and_differences(void) {
  static const int32_t sizes[][6] = {/* M N k H F empty */ {1, 2, 1, 1, 1, -1},
                                     {5, 1, 1, 7, 9, -1},
                                     {21, 4, 1, 12, 20, 2},
                                     {18, 4, 2, 17, 33, 0},
                                     {10, 3, 3, 16, 16, -1},
                                     {70, 5, 2, 6, 10, 4},
                                     {30, 70, 40, 3, 5, -1}};
  size_t i;
  int packed;
  for (i = 0; i < sizeof sizes / sizeof *sizes; ++i)
    for (packed = 0; packed < 2; ++packed) {
      experts_fixture f;
      experts_fixture_make(&f, sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], sizes[i][4],
                           sizes[i][5], packed);
      check_reference(&f);
      experts_fixture_free(&f);
      CHECK_STATE();
    }
}

/* ---- claims ---- */

static void test_experts_one_expert_is_the_dense_ffn_bit_for_bit(void) {
  experts_fixture f;
  float *a, *pre, *y, *da, *dpre, *dx, *dw1, *db1, *dw2, *db2;
  moe_mat in, out;
  int routes;
  experts_fixture_make(&f, 37, 1, 1, 40, 100, -1, 0);
  a = experts_floats(3700), pre = experts_floats(3700), y = experts_floats(37 * 40),
  da = zeros(3700), dpre = zeros(3700), dx = zeros(37 * 40);
  dw1 = zeros(4000), db1 = zeros(100), dw2 = zeros(4000), db2 = zeros(40);
  in = moe_mat_rows(f.w1, 100, 40), out = moe_mat_rows(f.w2, 40, 100);
  linear_gelu_forward(a, pre, f.x, &in, f.b1, 37, &f.env);
  linear_forward(y, a, &out, f.b2, 37, &f.env);
  linear_backward(da, dw2, db2, f.dy, a, &out, 37, &f.env);
  moe_gelu_backward(dpre, da, pre, 3700, &f.env);
  linear_backward(dx, dw1, db1, dpre, f.x, &in, 37, &f.env);
  free(f.e), f.e = NULL;                    /* not needed */
  for (routes = 1; routes >= 0; --routes) { /* nor are the routes */
    moe_experts_op op = experts(&f);
    if (!routes) op.routes = NULL, op.M = 37;
    memset(f.y, 0x11, 37 * 40 * 4), memset(f.dx, 0, 37 * 40 * 4), memset(f.dweight, 0x11, 37 * 4);
    memset(f.dw1, 0, 16000), memset(f.db1, 0, 400), memset(f.dw2, 0, 16000);
    memset(f.db2, 0, 160);
    CHECK(!moe_experts_forward(&op, &f.env) && !moe_experts_backward(&op, &f.env), "%d", routes);
    CHECK(!memcmp(f.y, y, 37 * 40 * 4), "y");
    CHECK(!memcmp(f.pre, pre, 3700 * 4), "pre");
    CHECK(!memcmp(f.dx, dx, 37 * 40 * 4), "dx");
    CHECK(!memcmp(f.dw1, dw1, 16000) && !memcmp(f.db1, db1, 400) && !memcmp(f.dw2, dw2, 16000) &&
              !memcmp(f.db2, db2, 160),
          "weights");
    CHECK(f.dweight[0] == 0 && f.dweight[36] == 0, "dweight");
  }
  free(a), free(pre), free(y), free(da), free(dpre), free(dx), free(dw1), free(db1), free(dw2),
      free(db2);
  experts_fixture_free(&f);
}

/* Experts that are copies of one another, weights of 1: the dense layer again, gathered and brought
   back. */
static void test_experts_equal_experts_are_dense(void) {
  experts_fixture sparse, dense;
  size_t i;
  experts_fixture_make(&dense, 50, 1, 1, 24, 48, -1, 0);
  experts_fixture_make(&sparse, 50, 4, 1, 24, 48, -1, 1);
  for (i = 0; i < 4; ++i) {
    memcpy(sparse.w1 + i * 1152, dense.w1, 1152 * 4), memcpy(sparse.b1 + i * 48, dense.b1, 48 * 4);
    memcpy(sparse.w2 + i * 1152, dense.w2, 1152 * 4), memcpy(sparse.b2 + i * 24, dense.b2, 24 * 4);
    sparse.in[i] = moe_mat_rows(sparse.w_in[i], 48, 24),
    sparse.out[i] = moe_mat_rows(sparse.w_out[i], 24, 48);
  }
  memcpy(sparse.x, dense.x, 50 * 24 * 4), memcpy(sparse.dy, dense.dy, 50 * 24 * 4);
  for (i = 0; i < 50; ++i) sparse.routes.weight[i] = 1;
  experts_forward(&sparse), experts_forward(&dense);
  experts_backward(&sparse), experts_backward(&dense);
  CHECK(!memcmp(sparse.y, dense.y, 50 * 24 * 4), "y");
  CHECK(!memcmp(sparse.dx, dense.dx, 50 * 24 * 4), "dx");
  for (i = 0; i < 1152; ++i) {
    float sum = sparse.dw1[i] + sparse.dw1[1152 + i] + sparse.dw1[2304 + i] + sparse.dw1[3456 + i];
    CHECK_NEAR(sum, dense.dw1[i], 2e-5 + 1e-5 * fabs((double)sum));
  }
  experts_fixture_free(&sparse);
  experts_fixture_free(&dense);
}

static void test_experts_one_expert_with_another_weight(void) {
  experts_fixture f, g;
  int i;
  experts_fixture_make(&f, 20, 1, 1, 20, 30, -1, 0);
  experts_fixture_make(&g, 20, 1, 1, 20, 30, -1, 0);
  for (i = 0; i < 20; ++i) g.routes.weight[i] = 0.5f;
  experts_forward(&f), experts_forward(&g);
  experts_backward(&f), experts_backward(&g);
  for (i = 0; i < 400; ++i)
    CHECK(g.y[i] == 0.5f * f.y[i], "%g against half of %g", (double)g.y[i], (double)f.y[i]);
  for (i = 0; i < 400; ++i) CHECK_NEAR(g.dx[i], 0.5f * f.dx[i], 1e-6);
  CHECK(g.dweight[0] < 0 || g.dweight[0] > 0, "dweight");
  experts_fixture_free(&f);
  experts_fixture_free(&g);
}

static void test_experts_without_tokens_stay_untouched(void) {
  experts_fixture f;
  size_t i;
  experts_fixture_make(&f, 30, 4, 2, 12, 20, 2, 0);
  f.in[2].data = f.out[2].data = NULL; /* not even read */
  f.b_in[2] = f.b_out[2] = f.w_in[2] = f.w_out[2] = NULL;
  experts_forward(&f);
  experts_backward(&f);
  for (i = 0; i < 240; ++i)
    CHECK(f.d_in[2][i] == 0 && f.d_out[2][i] == 0, "gradient of an expert without tokens");
  for (i = 0; i < 360; ++i) CHECK(f.y[i] * 0 == 0 && f.dx[i] * 0 == 0, "not a number");
  experts_fixture_free(&f);
}

static void test_experts_no_tokens_at_all(void) {
  experts_fixture f;
  experts_fixture_make(&f, 0, 4, 2, 12, 20, -1, 0);
  experts_forward(&f);
  experts_backward(&f);
  experts_fixture_free(&f);
}

/* Without hidden units the output of an expert is its bias. */
static void test_experts_of_no_units_give_their_biases(void) {
  experts_fixture f;
  int32_t t, j;
  experts_fixture_make(&f, 10, 3, 2, 6, 0, -1, 0);
  experts_forward(&f);
  CHECK_STATE();
  experts_backward(&f);
  CHECK_STATE();
  for (t = 0; t < 10; ++t)
    for (j = 0; j < 6; ++j) {
      const int32_t *expert = f.routes.expert + 2 * t;
      const float *weight = f.routes.weight + 2 * t;
      CHECK_NEAR(f.y[6 * t + j],
                 weight[0] * f.b_out[expert[0]][j] + weight[1] * f.b_out[expert[1]][j], 1e-6);
      CHECK(f.dx[6 * t + j] == 0, "a gradient of x: %g", (double)f.dx[6 * t + j]);
    }
  experts_fixture_free(&f);
}

static void test_experts_gradients_accumulate_and_may_be_left_out(void) {
  experts_fixture f, g;
  moe_experts_op op;
  size_t i;
  experts_fixture_make(&f, 25, 3, 2, 9, 14, -1, 0);
  experts_fixture_make(&g, 25, 3, 2, 9, 14, -1, 0);
  experts_forward(&f), experts_forward(&g);
  experts_backward(&f);
  experts_backward(&g), experts_backward(&g);
  for (i = 0; i < 25 * 9; ++i) CHECK_NEAR(g.dx[i], 2 * f.dx[i], 1e-5);
  for (i = 0; i < 3 * 14 * 9; ++i) CHECK_NEAR(g.dw1[i], 2 * f.dw1[i], 2e-5);
  clear_gradients(&g);
  g.d_in[1] = NULL; /* a frozen expert's matrix */
  op = experts(&g);
  op.dx = op.dweight = NULL, op.d_b_in = op.d_out = NULL;
  op.w_in = op.w_out = NULL; /* those of forward are in rows layout */
  CHECK(!moe_experts_backward(&op, &g.env), "backward fails");
  CHECK(!memcmp(g.dw1, f.dw1, 126 * 4) && !memcmp(g.db2, f.db2, 27 * 4),
        "what is computed is the same");
  for (i = 0; i < 126; ++i)
    CHECK(g.dw1[126 + i] == 0 && g.dw2[i] == 0, "what is not computed stays");
  experts_fixture_free(&f);
  experts_fixture_free(&g);
}

static void test_experts_inference_equals_training(void) {
  experts_fixture f;
  float *y = experts_floats(33 * 20),
        *scratch = experts_floats(moe_experts_scratch(33, 2, 20, 50, 0));
  moe_experts_op op;
  experts_fixture_make(&f, 33, 4, 2, 20, 50, -1, 1);
  experts_forward(&f);
  op = experts(&f);
  op.y = y, op.pre = op.e = NULL, op.scratch = scratch;
  CHECK(!moe_experts_forward(&op, &f.env), "forward fails");
  CHECK(!memcmp(y, f.y, 33 * 20 * 4), "other bits without pre and e");
  free(y), free(scratch);
  experts_fixture_free(&f);
}

static void experts_compare(const experts_fixture *a, const experts_fixture *b, const char *what,
                            int threads) {
  size_t M = (size_t)a->M, N = (size_t)a->N, H = (size_t)a->H, F = (size_t)a->F, k = (size_t)a->k;
  CHECK(!memcmp(a->y, b->y, M * H * 4), "%s, %d threads: y", what, threads);
  CHECK(!memcmp(a->dx, b->dx, M * H * 4), "%s, %d threads: dx", what, threads);
  CHECK(!memcmp(a->dweight, b->dweight, M * k * 4), "%s, %d threads: dweight", what, threads);
  CHECK(!memcmp(a->dw1, b->dw1, N * H * F * 4), "%s, %d threads: d_in", what, threads);
  CHECK(!memcmp(a->db1, b->db1, N * F * 4), "%s, %d threads: d_b_in", what, threads);
  CHECK(!memcmp(a->dw2, b->dw2, N * H * F * 4), "%s, %d threads: d_out", what, threads);
  CHECK(!memcmp(a->db2, b->db2, N * H * 4), "%s, %d threads: d_b_out", what, threads);
}

static void test_experts_have_the_same_bits_everywhere(void) {
  static const int32_t sizes[][5] = {/* M N k H F */ {300, 4, 1, 48, 100},
                                     {150, 4, 2, 33, 77},
                                     {100, 1, 1, 40, 65},
                                     {40, 6, 6, 15, 31},
                                     {820, 4, 1, 20, 30},
                                     {600, 1, 1, 16, 35}}; /* shares of rows for 2 and 3 threads */
  size_t c;
  for (c = 0; c < sizeof sizes / sizeof *sizes; ++c) {
    experts_fixture first;
    int i, threads, have = 0;
    for (i = 0; i < ISAS; ++i)
      for (threads = 1; threads <= 8; threads = threads == 3 ? 8 : threads + 1) {
        experts_fixture f;
        moe_pool *pool;
        experts_fixture_make(&f, sizes[c][0], sizes[c][1], sizes[c][2], sizes[c][3], sizes[c][4],
                             -1, threads % 2);
        if (moe_env_init(&f.env, isas[i])) {
          experts_fixture_free(&f);
          break;
        }
        CHECK(moe_pool_create_exact(&pool, threads, &f.env) == MOE_OK, "pool");
        experts_forward(&f);
        experts_backward(&f);
        moe_pool_free(pool);
        if (!have++) {
          first = f;
          continue;
        }
        experts_compare(&first, &f, moe_isa_name(isas[i]), threads);
        experts_fixture_free(&f);
        CHECK_STATE();
        if (threads == 8) break;
      }
    experts_fixture_free(&first);
  }
}

/* Tokens in two micro-batches, gradients accumulated: the bits of one batch. */
static void test_experts_do_not_depend_on_the_batch(void) {
  experts_fixture whole, part;
  int half;
  experts_fixture_make(&whole, 90, 4, 2, 21, 35, -1, 0);
  experts_fixture_make(&part, 90, 4, 2, 21, 35, -1, 0);
  experts_forward(&whole);
  experts_backward(&whole);
  for (half = 0; half < 2; ++half) {
    int32_t first = half * 41, order[180], start[5];
    moe_routes r = part.routes;
    moe_experts_op op = experts(&part);
    r.M = half ? 49 : 41;
    r.expert += first * 2, r.weight += first * 2, r.prob += first * 4;
    r.order = order, r.start = start;
    moe__route_dispatch(&r);
    op.routes = &r, op.x += first * 21, op.y += first * 21;
    op.dx += first * 21, op.dweight += first * 2, op.dy += first * 21;
    CHECK(!moe_experts_forward(&op, &part.env) && !moe_experts_backward(&op, &part.env), "fails");
  }
  experts_compare(&whole, &part, "two micro-batches", 1);
  experts_fixture_free(&whole);
  experts_fixture_free(&part);
}

static void test_experts_scratch_says_when_it_is_too_much(void) {
  CHECK(moe_experts_scratch(10, 2, 3, 5, 0) == 20 * (1 + 6 + 5), "%u",
        (unsigned)moe_experts_scratch(10, 2, 3, 5, 0));
  CHECK(moe_experts_scratch(INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, 1) == SIZE_MAX,
        "an overflow goes unseen");
  CHECK(sizeof(size_t) > 4 || moe_experts_scratch(1, 1, INT32_MAX, INT32_MAX, 1) == SIZE_MAX,
        "one of 32 bits goes unseen");
}

static void test_experts_refuse_what_they_cannot_do(void) {
  static const int8_t q = 1;
  static const float scale = 1;
  experts_fixture f;
  int i;
  moe_experts_op op;
  experts_fixture_make(&f, 10, 3, 2, 6, 5, -1, 1);
  op = experts(&f);
  CHECK(!moe_experts_forward(&op, &f.env) && !moe_experts_backward(&op, &f.env), "the op itself");
  op.w_in = NULL;
  CHECK(moe_experts_backward(&op, &f.env) == MOE_E_ARGUMENT, "backward through packed weights");
  op = experts(&f), op.N = 4;
  CHECK(moe_experts_forward(&op, &f.env) == MOE_E_ARGUMENT, "other experts than the routes have");
  op = experts(&f), op.F = -1;
  CHECK(moe_experts_forward(&op, &f.env) == MOE_E_ARGUMENT, "F below 0");
  op = experts(&f), op.F = 4;
  CHECK(moe_experts_forward(&op, &f.env) == MOE_E_ARGUMENT, "weights of another shape");
  op = experts(&f), op.e = NULL;
  CHECK(moe_experts_backward(&op, &f.env) == MOE_E_ARGUMENT, "dweight without e");
  op = experts(&f), op.pre = NULL;
  CHECK(moe_experts_backward(&op, &f.env) == MOE_E_ARGUMENT, "backward without pre");
  op = experts(&f), f.in[f.routes.expert[0]] = moe_mat_rows(NULL, 5, 6);
  CHECK(moe_experts_forward(&op, &f.env) == MOE_E_ARGUMENT, "an expert without weights");
  op.H = MOE_INT8_COLS + 1;
  for (i = 0; i < 3; ++i) {
    f.in[i] = moe_mat_rows_int8(&q, &scale, 5, MOE_INT8_COLS + 1);
    f.out[i] = moe_mat_rows(f.w_out[i], MOE_INT8_COLS + 1, 5);
  }
  CHECK(moe_experts_forward(&op, &f.env) == MOE_E_ARGUMENT, "int8 rows of more than 65536");
  experts_fixture_free(&f);
}

static void test_experts_work_without_biases(void) {
  experts_fixture f, g;
  moe_experts_op op;
  experts_fixture_make(&f, 30, 3, 2, 6, 5, -1, 0);
  experts_fixture_make(&g, 30, 3, 2, 6, 5, -1, 0);
  memset(f.b1, 0, 15 * sizeof(float)), memset(f.b2, 0, 18 * sizeof(float));
  experts_forward(&f), experts_backward(&f);
  op = experts(&g);
  op.b_in = op.b_out = NULL;
  CHECK(!moe_experts_forward(&op, &g.env) && !moe_experts_backward(&op, &g.env), "fails");
  CHECK(!memcmp(f.y, g.y, 180 * sizeof(float)) && !memcmp(f.dx, g.dx, 180 * sizeof(float)),
        "other bits than with biases of 0");
  experts_fixture_free(&f);
  experts_fixture_free(&g);
}

static void run_experts(void) {
  RUN(test_experts_layer_equals_pytorch);
  RUN(test_experts_equal_a_reference_and_differences);
  RUN(test_experts_one_expert_is_the_dense_ffn_bit_for_bit);
  RUN(test_experts_equal_experts_are_dense);
  RUN(test_experts_one_expert_with_another_weight);
  RUN(test_experts_without_tokens_stay_untouched);
  RUN(test_experts_no_tokens_at_all);
  RUN(test_experts_of_no_units_give_their_biases);
  RUN(test_experts_gradients_accumulate_and_may_be_left_out);
  RUN(test_experts_inference_equals_training);
  RUN(test_experts_have_the_same_bits_everywhere);
  RUN(test_experts_do_not_depend_on_the_batch);
  RUN(test_experts_scratch_says_when_it_is_too_much);
  RUN(test_experts_refuse_what_they_cannot_do);
  RUN(test_experts_work_without_biases);
}
