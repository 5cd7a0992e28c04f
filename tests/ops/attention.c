/* Self-attention: against PyTorch, against an independent reference in double and its finite
   differences, and bit for bit between instruction sets, numbers of threads and neighbours in the
   batch. */
#include "golden/ops.h"

typedef struct shape {
  int32_t S, H, A;
  float p;
  int32_t starts[8];
} shape;
static const shape shapes[] = {
    {1, 1, 1, 0.0f, {0, 1}},
    {3, 12, 3, 0.0f, {0, 4, 5, 10}},
    {3, 12, 3, 0.3f, {0, 4, 5, 10}},
    {4, 21, 3, 0.1f, {0, 17, 17, 50, 52}}, /* D = 7; an empty sequence */
    {2, 64, 2, 0.0f, {0, 8, 16}},
    {6, 96, 12, 0.1f, {0, 8, 16, 17, 24, 55, 63}},
    {1, 64, 2, 0.1f, {0, 128}},
    {2, 100, 1, 0.2f, {0, 65, 130}},
    {1, 128, 1, 0.0f, {0, 40}},
    {2, 32, 2, 0.1f, {0, 530, 531}}, /* more than one tile of queries */
};
enum { SHAPES = sizeof shapes / sizeof shapes[0], MOST = 540 * 96 };
static const uint64_t attention_keys[8] = {0x123456789abcdefu, 22, 33, 44, 55, 66, 77, 88};

static float attention_qkv[3 * MOST], attention_y[MOST], attention_dy[MOST], attention_stats[MOST],
    attention_dqkv[3 * MOST];

/* The op on the arrays above. */
static moe_attention_op attention(const int32_t *seq_start, int32_t S, int32_t H, int32_t A,
                                  float *scratch) {
  moe_attention_op op;
  moe_attention_op_init(&op);
  op.y = attention_y, op.stats = attention_stats, op.qkv = attention_qkv, op.scratch = scratch;
  op.seq_start = seq_start, op.S = S, op.M = seq_start[S], op.H = H, op.A = A;
  op.dqkv = attention_dqkv, op.dy = attention_dy;
  return op;
}

/* Runs forward and backward of a shape on dirty memory; dqkv begins with small numbers. */
static void run_shape(const shape *s, const moe_env *env) {
  int32_t M = s->starts[s->S], longest = 1, i;
  size_t floats, n = (size_t)(M * s->H);
  float *scratch;
  moe_attention_op op;
  for (i = 0; i < s->S; ++i)
    if (s->starts[i + 1] - s->starts[i] > longest) longest = s->starts[i + 1] - s->starts[i];
  fill(attention_qkv, 3 * n, 1, 1.5f);
  fill(attention_dy, n, 2, 1.0f);
  fill(attention_dqkv, 3 * n, 3, 1e-3f);
  dirty(attention_y, n);
  dirty(attention_stats, (size_t)(M * s->A * 2));
  floats = moe_attention_scratch(longest, s->H, s->A, 0, env);
  scratch = (float *)malloc(floats * sizeof(float));
  dirty(scratch, floats);
  op = attention(s->starts, s->S, s->H, s->A, scratch);
  op.dropout = s->p, op.keys = attention_keys;
  CHECK(!moe_attention_forward(&op, env), "forward fails");
  free(scratch);
  floats = moe_attention_scratch(longest, s->H, s->A, 1, env);
  scratch = (float *)malloc(floats * sizeof(float));
  dirty(scratch, floats);
  op.scratch = scratch;
  CHECK(!moe_attention_backward(&op, env), "backward fails");
  free(scratch);
}

/* Output of one query in one head, straight from the formula; returns its product with dy. */
static double attention_reference(double *out, const double *x, const shape *s, int32_t sequence,
                                  int32_t a, int32_t query, const float *dy_row) {
  int32_t begin = s->starts[sequence], length = s->starts[sequence + 1] - begin, H = s->H,
          D = H / s->A, j, d;
  static double p[9000];
  double max = -1e300, sum = 0, loss = 0;
  for (j = 0; j < length; ++j) {
    const double *q = x + (size_t)(begin + query) * 3 * (size_t)H + a * D,
                 *k = x + (size_t)(begin + j) * 3 * (size_t)H + H + a * D;
    p[j] = 0;
    for (d = 0; d < D; ++d) p[j] += q[d] * k[d];
    p[j] /= sqrt((double)D);
    if (p[j] > max) max = p[j];
  }
  for (j = 0; j < length; ++j) sum += p[j] = exp(p[j] - max);
  for (d = 0; d < D; ++d) out[d] = 0;
  for (j = 0; j < length; ++j) {
    double w = p[j] / sum;
    if (s->p > 0) {
      double u =
          moe__hash32(attention_keys[sequence], (uint32_t)((a * length + query) * length + j)) /
          4294967296.0;
      w = u < (double)s->p ? 0 : w / (1 - (double)s->p);
    }
    for (d = 0; d < D; ++d)
      out[d] += w * x[(size_t)(begin + j) * 3 * (size_t)H + (size_t)(2 * H + a * D + d)];
  }
  for (d = 0; d < D; ++d) loss += out[d] * (double)dy_row[d];
  return loss;
}

/* Loss of one head of one sequence. */
static double head_loss(const double *x, const shape *s, int32_t sequence, int32_t a) {
  double out[128], loss = 0;
  int32_t i, D = s->H / s->A;
  for (i = s->starts[sequence]; i < s->starts[sequence + 1]; ++i)
    loss += attention_reference(out, x, s, sequence, a, i - s->starts[sequence],
                                attention_dy + (size_t)i * (size_t)s->H + a * D);
  return loss;
}

static void test_attention_matches_the_formula_in_double(void) {
  static double x[3 * MOST];
  moe_env env;
  int n;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (n = 0; n < SHAPES; ++n) {
    const shape *s = &shapes[n];
    int32_t M = s->starts[s->S], D = s->H / s->A, q, a, i, d, step = 1 + M * 3 * s->H / 60;
    double out[128];
    run_shape(s, &env);
    for (i = 0; i < 3 * M * s->H; ++i) x[i] = (double)attention_qkv[i];
    for (q = 0; q < s->S; ++q)
      for (a = 0; a < s->A; ++a)
        for (i = s->starts[q]; i < s->starts[q + 1]; ++i) {
          attention_reference(out, x, s, q, a, i - s->starts[q], attention_dy);
          for (d = 0; d < D; ++d) CHECK_NEAR(attention_y[i * s->H + a * D + d], out[d], 3e-6);
        }
    for (i = 0; i < 3 * M * s->H; i += step) {
      int32_t row = i / (3 * s->H), column = i % s->H;
      double kept = x[i], up, down, h = 1e-5, start;
      uint64_t state = 3;
      for (d = 0; d < i; ++d) test_random(&state);
      start = (double)(test_random(&state) * 1e-3f);
      for (q = 0; s->starts[q + 1] <= row; ++q) {
      }
      x[i] = kept + h, up = head_loss(x, s, q, column / D);
      x[i] = kept - h, down = head_loss(x, s, q, column / D);
      x[i] = kept;
      CHECK_NEAR(attention_dqkv[i], (up - down) / (2 * h) + start, 2e-5);
    }
  }
}

static void test_attention_has_the_same_bits_everywhere(void) {
  static float kept_y[MOST], kept_stats[MOST], kept_dqkv[3 * MOST];
  int n;
  size_t i, t;
  for (n = 0; n < SHAPES; ++n) {
    const shape *s = &shapes[n];
    size_t M = (size_t)s->starts[s->S], H = (size_t)s->H, A = (size_t)s->A;
    int first = 1;
    for (i = 0; i < ISAS; ++i)
      for (t = 0; t < 4 && moe_isa_available(isas[i]); ++t) {
        moe_env env;
        moe_pool *pool;
        if (thread_counts[t] == 3 && M * H > 10000) continue;
        moe_env_init(&env, isas[i]);
        CHECK(moe_pool_create_exact(&pool, thread_counts[t], &env) == MOE_OK, "no pool");
        run_shape(s, &env);
        moe_pool_free(pool);
        if (first) {
          memcpy(kept_y, attention_y, sizeof attention_y);
          memcpy(kept_stats, attention_stats, sizeof attention_stats);
          memcpy(kept_dqkv, attention_dqkv, sizeof attention_dqkv);
        }
        first = 0;
        CHECK(!memcmp(kept_y, attention_y, M * H * 4), "y of shape %d, %s, %d threads", n,
              moe_isa_name(isas[i]), (int)thread_counts[t]);
        CHECK(!memcmp(kept_stats, attention_stats, M * A * 8), "stats of shape %d, %s", n,
              moe_isa_name(isas[i]));
        CHECK(!memcmp(kept_dqkv, attention_dqkv, M * H * 12), "dqkv of shape %d, %s, %d threads", n,
              moe_isa_name(isas[i]), (int)thread_counts[t]);
      }
  }
}

static void test_attention_of_a_sequence_ignores_its_neighbours(void) {
  static float y1[MOST], stats1[MOST], dqkv1[3 * MOST];
  const shape *s = &shapes[5];
  moe_env env;
  int32_t q;
  moe_env_init(&env, MOE_ISA_AUTO);
  run_shape(s, &env);
  for (q = 0; q < s->S; ++q) {
    int32_t at = s->starts[q], alone[2];
    size_t M = (size_t)(s->starts[q + 1] - at), H = (size_t)s->H, A = (size_t)s->A;
    float *scratch =
        (float *)malloc(moe_attention_scratch((int32_t)M, s->H, s->A, 1, &env) * sizeof(float));
    moe_attention_op op;
    alone[0] = 0;
    alone[1] = (int32_t)M;
    fill(dqkv1, 3 * MOST, 3, 1e-3f); /* what run_shape began with */
    memmove(dqkv1, dqkv1 + at * 3 * s->H, M * H * 12);
    op = attention(alone, 1, s->H, s->A, scratch);
    op.dropout = s->p, op.keys = attention_keys + q;
    op.y = y1, op.stats = stats1, op.qkv = attention_qkv + at * 3 * s->H;
    op.dqkv = dqkv1, op.dy = attention_dy + at * s->H;
    CHECK(!moe_attention_forward(&op, &env) && !moe_attention_backward(&op, &env), "fails");
    free(scratch);
    CHECK(!memcmp(y1, attention_y + at * s->H, M * H * 4), "y of sequence %d", (int)q);
    CHECK(!memcmp(stats1, attention_stats + at * s->A * 2, M * A * 8), "stats of sequence %d",
          (int)q);
    CHECK(!memcmp(dqkv1, attention_dqkv + at * 3 * s->H, M * H * 12), "dqkv of sequence %d",
          (int)q);
  }
}

static void test_attention_agrees_with_pytorch(void) {
  static const int32_t at[4] = {0, 4, 5, 10};
  static float part[120];
  static const char *const name[3] = {"attention.q", "attention.k", "attention.v"};
  const double *want[3];
  double error, norm;
  float *scratch;
  moe_attention_op op;
  moe_env env;
  int i, j;
  want[0] = golden_attention_dq, want[1] = golden_attention_dk, want[2] = golden_attention_dv;
  moe_env_init(&env, MOE_ISA_AUTO);
  scratch = (float *)malloc(moe_attention_scratch(5, 12, 3, 1, &env) * sizeof(float));
  for (j = 0; j < 3; ++j) {
    golden_fill(part, 120, name[j], j < 2 ? 2.0f : 1.0f);
    for (i = 0; i < 120; ++i) attention_qkv[i / 12 * 36 + j * 12 + i % 12] = part[i];
  }
  golden_fill(attention_dy, 120, "attention.dy", 1);
  memset(attention_dqkv, 0, sizeof attention_dqkv);
  op = attention(at, 3, 12, 3, scratch);
  CHECK(!moe_attention_forward(&op, &env) && !moe_attention_backward(&op, &env), "fails");
  free(scratch);
  for (i = 0; i < 120; ++i) CHECK_NEAR(attention_y[i], golden_attention_y[i], 1e-6);
  for (j = 0; j < 3; ++j) {
    for (error = norm = 0, i = 0; i < 120; ++i) {
      double d = (double)attention_dqkv[i / 12 * 36 + j * 12 + i % 12] - want[j][i];
      error += d * d, norm += want[j][i] * want[j][i];
    }
    CHECK(sqrt(error / norm) < 2e-6, "gradient %d: %g", j, sqrt(error / norm));
  }
}

static void test_attention_does_not_overflow(void) {
  const shape s = {1, 32, 1, 0.0f, {0, 20}};
  moe_env env;
  float *scratch;
  moe_attention_op op;
  int i;
  moe_env_init(&env, MOE_ISA_AUTO);
  scratch = (float *)malloc(moe_attention_scratch(20, 32, 1, 1, &env) * sizeof(float));
  fill(attention_qkv, 20 * 96, 1, 1000.0f);
  fill(attention_dy, 20 * 32, 2, 1.0f);
  memset(attention_dqkv, 0, sizeof attention_dqkv);
  op = attention(s.starts, 1, 32, 1, scratch);
  CHECK(!moe_attention_forward(&op, &env) && !moe_attention_backward(&op, &env), "fails");
  for (i = 0; i < 20 * 32; ++i)
    CHECK(fabs((double)attention_y[i]) <= 1000.1, "y[%d] = %g", i, (double)attention_y[i]);
  for (i = 0; i < 20 * 96; ++i)
    CHECK(fabs((double)attention_dqkv[i]) < 1e7, "dqkv[%d] = %g", i, (double)attention_dqkv[i]);
  attention_qkv[40 * 3] = NAN; /* must stay visible */
  CHECK(!moe_attention_forward(&op, &env), "forward fails");
  CHECK(attention_y[40] != attention_y[40], "a NaN has vanished");
  free(scratch);
}

static void test_attention_of_8192_tokens(void) {
  static const int32_t at[2] = {0, 8192};
  const shape s = {1, 8, 1, 0.1f, {0, 8192}};
  double *x = (double *)malloc(8192 * 24 * sizeof(double)), out[8];
  float *big = (float *)malloc(8192 * 24 * sizeof(float)),
        *z = (float *)malloc(8192 * 8 * sizeof(float)), *scratch;
  moe_attention_op op;
  moe_env env;
  int32_t i, d;
  moe_env_init(&env, MOE_ISA_AUTO);
  scratch = (float *)malloc(moe_attention_scratch(8192, 8, 1, 0, &env) * sizeof(float));
  fill(big, 8192 * 24, 1, 1.5f);
  for (i = 0; i < 8192 * 24; ++i) x[i] = (double)big[i];
  op = attention(at, 1, 8, 1, scratch);
  op.y = z, op.stats = NULL, op.qkv = big, op.dropout = 0.1f, op.keys = attention_keys;
  CHECK(!moe_attention_forward(&op, &env), "forward fails");
  for (i = 0; i < 8192; i += 511) {
    attention_reference(out, x, &s, 0, 0, i, attention_dy);
    for (d = 0; d < 8; ++d) CHECK_NEAR(z[i * 8 + d], out[d], 1e-6);
  }
  free(x), free(big), free(z), free(scratch);
}

/* Counts bodies and runs none: nothing of the arrays is read. */
static void count_only(void *user, int32_t count, void (*body)(void *arg, int32_t index),
                       void *arg) {
  (void)body, (void)arg;
  *(int32_t *)user = count;
}

static void test_attention_of_65536_tokens_is_cut_into_tiles(
    void) { /* the square of which is 0 in a size_t of 32 bits */
  static const int32_t at[2] = {0, 65536};
  moe_attention_op op = attention(at, 1, 16, 2, attention_stats);
  moe_env env;
  int32_t count = 0;
  moe_env_init(&env, MOE_ISA_AUTO);
  env.threads = 64;
  env.parallel_for = count_only;
  env.parallel_user = &count;
  op.stats = NULL;
  CHECK(!moe_attention_forward(&op, &env), "forward fails");
  CHECK(count == 64, "%d threads have work", (int)count);
}

static void test_attention_overwrites_dqkv_if_asked(void) {
  static float added[3 * 540 * 96];
  const shape *s = &shapes[5];
  size_t floats, n = (size_t)(s->starts[s->S] * s->H * 3);
  moe_attention_op op;
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  run_shape(s, &env);
  floats = moe_attention_scratch(31, s->H, s->A, 1, &env);
  op = attention(s->starts, s->S, s->H, s->A, (float *)malloc(floats * sizeof(float)));
  op.dropout = s->p, op.keys = attention_keys;
  op.dqkv = added;
  memset(added, 0, sizeof added);
  CHECK(!moe_attention_backward(&op, &env), "fails");
  op.dqkv = attention_dqkv, op.overwrite = 1;
  dirty(attention_dqkv, n);
  CHECK(!moe_attention_backward(&op, &env), "fails");
  free(op.scratch);
  CHECK(!memcmp(added, attention_dqkv, n * sizeof(float)), "other bits than from 0");
}

static void test_attention_refuses_sizes_and_options_out_of_range(void) {
  static const int32_t at[3] = {0, 2, 7};
  moe_attention_op op = attention(at, 2, 12, 3, NULL);
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  op.scratch = (float *)malloc(moe_attention_scratch(5, 12, 3, 1, &env) * sizeof(float));
  fill(attention_qkv, 7 * 36, 1, 1.0f);
  CHECK(!moe_attention_forward(&op, &env), "the op itself");
  op.A = 5;
  CHECK(moe_attention_forward(&op, &env) == MOE_E_ARGUMENT, "5 heads of 12 columns");
  op.A = 0;
  CHECK(moe_attention_forward(&op, &env) == MOE_E_ARGUMENT, "no heads");
  op.A = 3, op.longest = 4;
  CHECK(moe_attention_forward(&op, &env) == MOE_E_ARGUMENT, "a longer sequence");
  op.longest = 5;
  CHECK(!moe_attention_forward(&op, &env), "the longest sequence");
  op.M = 8;
  CHECK(moe_attention_forward(&op, &env) == MOE_E_ARGUMENT, "more tokens than sequences have");
  op.M = 7, op.dropout = 1;
  CHECK(moe_attention_forward(&op, &env) == MOE_E_ARGUMENT, "dropout of everything");
  op.dropout = 0, op.stats = NULL;
  CHECK(moe_attention_backward(&op, &env) == MOE_E_ARGUMENT, "backward without attention_stats");
  free(op.scratch);
}

static void run_attention(void) {
  RUN(test_attention_matches_the_formula_in_double);
  RUN(test_attention_has_the_same_bits_everywhere);
  RUN(test_attention_of_a_sequence_ignores_its_neighbours);
  RUN(test_attention_agrees_with_pytorch);
  RUN(test_attention_does_not_overflow);
  RUN(test_attention_of_8192_tokens);
  RUN(test_attention_of_65536_tokens_is_cut_into_tiles);
  RUN(test_attention_overwrites_dqkv_if_asked);
  RUN(test_attention_refuses_sizes_and_options_out_of_range);
}
