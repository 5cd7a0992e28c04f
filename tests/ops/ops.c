/* LayerNorm, dropout, embeddings and cross-entropy: against PyTorch, against an independent
   reference in double and its finite differences, and bit for bit between instruction sets, numbers
   of threads, micro-batches and neighbours. */
#include "golden/ops.h"

static int close_to(const float *got, const double *want, size_t n, double tolerance) {
  double error = 0, norm = 0;
  size_t i;
  for (i = 0; i < n; ++i) {
    if (got[i] != got[i]) return 0;
    error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return sqrt(error) <= tolerance * (sqrt(norm) + 1e-6);
}

/* ---- LayerNorm ---- */

static double norm_reference(double *y, const double *x, const double *gamma, const double *beta,
                             double eps, int n, const float *dy) {
  double mean = 0, var = 0, loss = 0;
  int i;
  for (i = 0; i < n; ++i) mean += x[i] / n;
  for (i = 0; i < n; ++i) var += (x[i] - mean) * (x[i] - mean) / n;
  for (i = 0; i < n; ++i) {
    y[i] = (x[i] - mean) / sqrt(var + eps) * gamma[i] + beta[i];
    if (dy) loss += y[i] * (double)dy[i];
  }
  return loss;
}

#define NORM_MAX (70 * 400)
static float ops_nx[NORM_MAX], ops_ny[NORM_MAX], ops_ndy[NORM_MAX], ops_ndx[NORM_MAX], ngamma[400],
    nbeta[400], ndgamma[400], ndbeta[400];
static float nmean[70], nrstd[70], nsum[NORM_MAX], ndelta[NORM_MAX], nddelta[NORM_MAX];
static const int32_t norm_shapes[][2] = {{1, 1},  {1, 7},  {2, 16},   {3, 17},   {4, 32},
                                         {5, 48}, {7, 33}, {70, 100}, {70, 384}, {69, 385}};
enum { NORM_SHAPES = sizeof norm_shapes / sizeof norm_shapes[0] };

static void norm_inputs(int32_t M, int32_t H) {
  int32_t i;
  fill(ops_nx, (size_t)(M * H), 1, 1);
  fill(ops_ndy, (size_t)(M * H), 2, 1);
  fill(ngamma, (size_t)H, 3, 1);
  fill(nbeta, (size_t)H, 4, 1);
  for (i = 0; i < M * H; ++i) ops_nx[i] = ops_nx[i] * 3 + 1;
}

/* The op on the arrays above. */
static moe_layernorm_op norm(float eps, int32_t M, int32_t H) {
  moe_layernorm_op op;
  moe_layernorm_op_init(&op);
  op.y = ops_ny, op.mean = nmean, op.rstd = nrstd, op.x = ops_nx, op.gamma = ngamma,
  op.beta = nbeta;
  op.eps = eps, op.M = M, op.H = H;
  op.dx = ops_ndx, op.dgamma = ndgamma, op.dbeta = ndbeta, op.dy = ops_ndy;
  return op;
}

static void test_ops_norm_matches_the_definition_in_double(void) {
  static double x[400], gamma[400], beta[400], y[400], y2[400];
  moe_env env;
  int s;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (s = 0; s < NORM_SHAPES; ++s) {
    int32_t M = norm_shapes[s][0], H = norm_shapes[s][1], r, i;
    double step = 1e-5;
    moe_layernorm_op op = norm(1e-5f, M, H);
    norm_inputs(M, H);
    dirty(ops_ny, NORM_MAX);
    CHECK(!moe_layernorm_forward(&op, &env), "forward fails");
    memset(ops_ndx, 0, sizeof ops_ndx);
    memset(ndgamma, 0, sizeof ndgamma);
    memset(ndbeta, 0, sizeof ndbeta);
    CHECK(!moe_layernorm_backward(&op, &env), "backward fails");
    for (i = 0; i < H; ++i) gamma[i] = (double)ngamma[i], beta[i] = (double)nbeta[i];
    for (r = 0; r < M; ++r) {
      for (i = 0; i < H; ++i) x[i] = (double)ops_nx[r * H + i];
      norm_reference(y, x, gamma, beta, 1e-5, H, NULL);
      for (i = 0; i < H; ++i) CHECK_NEAR(ops_ny[r * H + i], y[i], 2e-6 * (1 + fabs(y[i])));
      for (i = 0; i < H; i += 1 + H / 9) {
        double up, down, kept = x[i];
        x[i] = kept + step, up = norm_reference(y2, x, gamma, beta, 1e-5, H, ops_ndy + r * H);
        x[i] = kept - step, down = norm_reference(y2, x, gamma, beta, 1e-5, H, ops_ndy + r * H);
        x[i] = kept;
        CHECK_NEAR(ops_ndx[r * H + i], (up - down) / (2 * step), 1e-5);
      }
    }
    for (i = 0; i < H; i += 1 + H / 9) {
      double up = 0, down = 0, sum = 0, kept = gamma[i];
      int32_t j;
      for (r = 0; r < M; ++r) {
        for (j = 0; j < H; ++j) x[j] = (double)ops_nx[r * H + j];
        gamma[i] = kept + step, up += norm_reference(y2, x, gamma, beta, 1e-5, H, ops_ndy + r * H);
        gamma[i] = kept - step,
        down += norm_reference(y2, x, gamma, beta, 1e-5, H, ops_ndy + r * H);
        gamma[i] = kept;
        sum += (double)ops_ndy[r * H + i];
      }
      CHECK_NEAR(ndgamma[i], (up - down) / (2 * step), 5e-5);
      CHECK_NEAR(ndbeta[i], sum, 1e-5);
    }
  }
}

static float ops_kept_y[NORM_SHAPES][NORM_MAX], kept_dx[NORM_SHAPES][NORM_MAX],
    kept_dgamma[NORM_SHAPES][400], kept_dbeta[NORM_SHAPES][400];

static void norm_bits(const moe_env *env, int first) {
  int s;
  for (s = 0; s < NORM_SHAPES; ++s) {
    int32_t M = norm_shapes[s][0], H = norm_shapes[s][1];
    size_t bytes = (size_t)(M * H) * sizeof(float), row = (size_t)H * sizeof(float);
    moe_layernorm_op op = norm(1e-12f, M, H);
    norm_inputs(M, H);
    dirty(ops_ny, NORM_MAX);
    CHECK(!moe_layernorm_forward(&op, env), "forward fails");
    fill(ops_ndx, NORM_MAX, 8, 1);
    fill(ndgamma, 400, 9, 1);
    fill(ndbeta, 400, 10, 1);
    CHECK(!moe_layernorm_backward(&op, env), "backward fails");
    if (first) {
      memcpy(ops_kept_y[s], ops_ny, bytes);
      memcpy(kept_dx[s], ops_ndx, bytes);
      memcpy(kept_dgamma[s], ndgamma, row);
      memcpy(kept_dbeta[s], ndbeta, row);
    }
    CHECK(!memcmp(ops_kept_y[s], ops_ny, bytes), "y of %d x %d, %s, %d threads", (int)M, (int)H,
          moe_isa_name(env->isa), (int)env->threads);
    CHECK(!memcmp(kept_dx[s], ops_ndx, bytes), "dx of %d x %d, %s", (int)M, (int)H,
          moe_isa_name(env->isa));
    CHECK(!memcmp(kept_dgamma[s], ndgamma, row), "dgamma of %d x %d, %s", (int)M, (int)H,
          moe_isa_name(env->isa));
    CHECK(!memcmp(kept_dbeta[s], ndbeta, row), "dbeta of %d x %d, %s", (int)M, (int)H,
          moe_isa_name(env->isa));
    op.y = ops_nx, op.mean = op.rstd = NULL; /* in place */
    CHECK(!moe_layernorm_forward(&op, env), "forward fails");
    CHECK(!memcmp(ops_kept_y[s], ops_nx, bytes), "in place %d x %d, %s", (int)M, (int)H,
          moe_isa_name(env->isa));
  }
}

static void test_ops_norm_has_the_same_bits_everywhere(void) { each_env(norm_bits); }

static void test_ops_norm_gradients_do_not_depend_on_micro_batches(void) {
  int32_t M = 70, H = 100, cut;
  moe_layernorm_op op = norm(1e-12f, M, H);
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  norm_inputs(M, H);
  CHECK(!moe_layernorm_forward(&op, &env), "forward fails");
  for (cut = 0; cut <= M; cut += 23) {
    fill(ndgamma, 400, 9, 1);
    fill(ndbeta, 400, 10, 1);
    op = norm(1e-12f, cut, H);
    op.dx = NULL;
    CHECK(!moe_layernorm_backward(&op, &env), "backward fails");
    op.M = M - cut;
    op.dy += cut * H, op.x += cut * H, op.mean += cut, op.rstd += cut;
    CHECK(!moe_layernorm_backward(&op, &env), "backward fails");
    if (!cut)
      memcpy(kept_dgamma[0], ndgamma, sizeof ndgamma), memcpy(kept_dbeta[0], ndbeta, sizeof ndbeta);
    CHECK(!memcmp(kept_dgamma[0], ndgamma, sizeof ndgamma), "dgamma, cut at %d", (int)cut);
    CHECK(!memcmp(kept_dbeta[0], ndbeta, sizeof ndbeta), "dbeta, cut at %d", (int)cut);
  }
}

static void golden_norm(const char *name, int32_t M, int32_t H, float x_scale, float eps,
                        const double *y, const double *dx, const double *dw, const double *db) {
  char key[64];
  moe_layernorm_op op = norm(eps, M, H);
  moe_env env;
  int32_t i;
  moe_env_init(&env, MOE_ISA_AUTO);
  snprintf(key, sizeof key, "%s.x", name), golden_fill(ops_nx, (size_t)(M * H), key, x_scale);
  snprintf(key, sizeof key, "%s.w", name), golden_fill(ngamma, (size_t)H, key, 0.5f);
  snprintf(key, sizeof key, "%s.b", name), golden_fill(nbeta, (size_t)H, key, 0.5f);
  snprintf(key, sizeof key, "%s.dy", name), golden_fill(ops_ndy, (size_t)(M * H), key, 1.0f);
  for (i = 0; i < H; ++i) ngamma[i] += 1;
  memset(ops_ndx, 0, sizeof ops_ndx), memset(ndgamma, 0, sizeof ndgamma),
      memset(ndbeta, 0, sizeof ndbeta);
  CHECK(!moe_layernorm_forward(&op, &env) && !moe_layernorm_backward(&op, &env), "fails");
  CHECK(close_to(ops_ny, y, (size_t)(M * H), 1e-6), "y of %s", name);
  CHECK(close_to(ops_ndx, dx, (size_t)(M * H), 2e-6), "dx of %s", name);
  CHECK(close_to(ndgamma, dw, (size_t)H, 1e-6), "dgamma of %s", name);
  CHECK(close_to(ndbeta, db, (size_t)H, 1e-6), "dbeta of %s", name);
}

static void test_ops_norm_agrees_with_pytorch(void) {
  golden_norm("norm", 4, 19, 2.0f, 1e-12f, golden_norm_y, golden_norm_dx, golden_norm_dw,
              golden_norm_db);
  CHECK_STATE();
  golden_norm("norm_wide", 2, 48, 2.0f, 1e-12f, golden_norm_wide_y, golden_norm_wide_dx,
              golden_norm_wide_dw, golden_norm_wide_db);
  CHECK_STATE();
  golden_norm("norm_eps", 3, 8, 0.0078125f, 1e-5f, golden_norm_eps_y, golden_norm_eps_dx,
              golden_norm_eps_dw, golden_norm_eps_db);
}

static void test_ops_norm_of_equal_numbers_is_beta(void) {
  moe_layernorm_op op = norm(1e-12f, 1, 50);
  moe_env env;
  int32_t i;
  moe_env_init(&env, MOE_ISA_AUTO);
  norm_inputs(1, 50);
  for (i = 0; i < 50; ++i) ops_nx[i] = 0.5f;
  CHECK(!moe_layernorm_forward(&op, &env), "forward fails");
  for (i = 0; i < 50; ++i) CHECK(ops_ny[i] == nbeta[i], "column %d", (int)i);
}

/* ---- dropout ---- */

static void test_ops_dropout_has_its_probability_and_keeps_the_mean(void) {
  enum { N = 1 << 18 };
  static float x[N], y[N];
  const float rates[] = {0.0f, 0.1f, 0.5f, 0.9f};
  moe_env env;
  int i, j;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (i = 0; i < N; ++i) x[i] = 1;
  for (j = 0; j < 4; ++j) {
    double p = (double)rates[j], n = N, fallen = 0, pairs = 0, sum = 0;
    moe_dropout(y, x, N, rates[j], moe_key(1, 2, 3, 4, (uint32_t)j), &env);
    for (i = 0; i < N; ++i) {
      CHECK(y[i] == 0 || fabs((double)y[i] * (1 - p) - 1) < 1e-6, "%g", (double)y[i]);
      fallen += y[i] == 0;
      pairs += i && y[i] == 0 && y[i - 1] == 0;
      sum += (double)y[i];
    }
    CHECK_NEAR(fallen / n, p, 4.5 * sqrt(p * (1 - p) / n));
    CHECK_NEAR(pairs / n, p * p,
               6 * sqrt(p * p * (1 - p * p) / n) + 1e-12); /* neighbours are independent */
    CHECK_NEAR(sum / n, 1, 5 * sqrt(p / (1 - p) / n) + 1e-7);
  }
}

static float drop_x[100003], drop_y[100003], drop_kept[100003];

static void dropout_bits(const moe_env *env, int first) {
  size_t n = 100003;
  fill(drop_x, n, 5, 1);
  dirty(drop_y, n);
  moe_dropout(drop_y, drop_x, n, 0.3f, 77, env);
  if (first) memcpy(drop_kept, drop_y, sizeof drop_y);
  CHECK(!memcmp(drop_kept, drop_y, sizeof drop_y), "%s, %d threads", moe_isa_name(env->isa),
        (int)env->threads);
  moe_dropout(drop_x, drop_x, 50, 0.3f, 77, env); /* in place, and a part of the whole */
  CHECK(!memcmp(drop_kept, drop_x, 50 * sizeof(float)), "in place, %s", moe_isa_name(env->isa));
}

static void test_ops_dropout_has_the_same_bits_everywhere(void) { each_env(dropout_bits); }

/* ---- residual + dropout + LayerNorm ---- */

static const int32_t starts[] = {0, 3, 4, 30, 30, 61, 70}; /* one sequence is empty */
enum { SEQUENCES = 6 };
static const uint64_t ops_keys[SEQUENCES] = {11, 22, 33, 44, 55, 0xfedcba9876543210u};

/* sum = x + dropout(delta) on the arrays above, and its LayerNorm. */
static moe_layernorm_op residual(int32_t M, int32_t H, float p, const uint64_t *k) {
  moe_layernorm_op op = norm(1e-12f, M, H);
  op.delta = ndelta, op.sum = nsum, op.dropout = p, op.keys = k;
  op.seq_start = starts, op.S = SEQUENCES;
  op.ddelta = nddelta, op.overwrite = 1;
  return op;
}

static void residual_bits(const moe_env *env, int first) {
  static float want_sum[NORM_MAX], want_y[NORM_MAX];
  int32_t M = 70, H = 100;
  size_t bytes = (size_t)(M * H) * sizeof(float);
  float p = 0.2f;
  int turn, i;
  (void)first;
  for (turn = 0; turn < 2; ++turn) {
    const uint64_t *k = turn ? ops_keys : NULL;
    moe_layernorm_op op = norm(1e-12f, M, H);
    norm_inputs(M, H);
    fill(ndelta, (size_t)(M * H), 6, 1);
    for (i = 0; i < SEQUENCES; ++i)
      moe_dropout(want_sum + starts[i] * H, ndelta + starts[i] * H,
                  (size_t)((starts[i + 1] - starts[i]) * H), k ? p : 0, ops_keys[i], env);
    for (i = 0; i < M * H; ++i) want_sum[i] = ops_nx[i] + want_sum[i];
    op.y = want_y, op.x = want_sum;
    CHECK(!moe_layernorm_forward(&op, env), "forward fails");
    dirty(nsum, NORM_MAX);
    dirty(ops_ny, NORM_MAX);
    op = residual(M, H, p, k);
    CHECK(!moe_layernorm_forward(&op, env), "forward fails");
    CHECK(!memcmp(nsum, want_sum, bytes) && !memcmp(ops_ny, want_y, bytes), "forward, %s, turn %d",
          moe_isa_name(env->isa), turn);
    dirty(ops_ny, NORM_MAX);
    op.sum = op.mean = op.rstd = NULL;
    CHECK(!moe_layernorm_forward(&op, env), "forward fails");
    CHECK(!memcmp(ops_ny, want_y, bytes), "forward without sum, %s", moe_isa_name(env->isa));
  }
}

static void residual_back_bits(const moe_env *env, int first) {
  static float want_dx[NORM_MAX], want_ddelta[NORM_MAX], dgamma[400], dbeta[400];
  int32_t M = 70, H = 100, i;
  size_t n = (size_t)(M * H);
  float p = 0.2f;
  moe_layernorm_op op = norm(1e-12f, M, H);
  moe_dropout_op drop;
  (void)first;
  norm_inputs(M, H);
  CHECK(!moe_layernorm_forward(&op, env), "forward fails");
  memset(want_dx, 0, sizeof want_dx);
  fill(dgamma, 400, 1, 1), memcpy(ndgamma, dgamma, sizeof dgamma);
  fill(dbeta, 400, 2, 1), memcpy(ndbeta, dbeta, sizeof dbeta);
  op.dx = want_dx, op.dgamma = dgamma, op.dbeta = dbeta;
  CHECK(!moe_layernorm_backward(&op, env), "backward fails");
  for (i = 0; i < SEQUENCES; ++i)
    moe_dropout(want_ddelta + starts[i] * H, want_dx + starts[i] * H,
                (size_t)((starts[i + 1] - starts[i]) * H), p, ops_keys[i], env);
  dirty(ops_ndx, NORM_MAX);
  dirty(nddelta, NORM_MAX);
  op = residual(M, H, p, ops_keys);
  op.sum = ops_nx;
  CHECK(!moe_layernorm_backward(&op, env), "backward fails");
  for (i = 0; i < (int32_t)n; ++i)
    CHECK(ops_ndx[i] == want_dx[i] && nddelta[i] == want_ddelta[i], "element %d, %s", (int)i,
          moe_isa_name(env->isa));
  CHECK(!memcmp(dgamma, ndgamma, sizeof dgamma) && !memcmp(dbeta, ndbeta, sizeof dbeta), "%s",
        moe_isa_name(env->isa));
  op.overwrite = 0; /* dx accumulates */
  memset(ops_ndx, 0, sizeof ops_ndx);
  dirty(nddelta, NORM_MAX);
  CHECK(!moe_layernorm_backward(&op, env), "backward fails");
  for (i = 0; i < (int32_t)n; ++i)
    CHECK(ops_ndx[i] == want_dx[i] && nddelta[i] == want_ddelta[i], "element %d, accumulated, %s",
          (int)i, moe_isa_name(env->isa));
  op.overwrite = 1;
  op.dx = ops_ndy; /* in the place of dy */
  fill(ndgamma, 400, 1, 1), fill(ndbeta, 400, 2, 1);
  CHECK(!moe_layernorm_backward(&op, env), "backward fails");
  CHECK(!memcmp(ops_ndx, ops_ndy, n * sizeof(float)) && !memcmp(dgamma, ndgamma, sizeof dgamma),
        "in place, %s", moe_isa_name(env->isa));
  moe_dropout_op_init(&drop);
  drop.y = ops_ndy, drop.x = ops_ndx, drop.dropout = p, drop.keys = ops_keys;
  drop.seq_start = starts, drop.S = SEQUENCES, drop.M = M, drop.H = H;
  CHECK(!moe_dropout_forward(&drop, env), "dropout fails");
  CHECK(!memcmp(nddelta, ops_ndy, n * sizeof(float)), "dropout of rows, %s",
        moe_isa_name(env->isa));
}

static void test_ops_residual_norm_is_the_ops_in_a_row(void) { each_env(residual_bits); }
static void test_ops_residual_norm_backward_is_the_ops_in_a_row(void) {
  each_env(residual_back_bits);
}

static void test_ops_residual_norm_of_a_sequence_ignores_its_neighbours(void) {
  static const int32_t alone[2] = {0, 31};
  int32_t H = 100;
  moe_layernorm_op op = residual(70, H, 0.2f, ops_keys);
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  norm_inputs(70, H);
  fill(ndelta, (size_t)(70 * H), 6, 1);
  op.sum = NULL;
  CHECK(!moe_layernorm_forward(&op, &env), "forward fails");
  op.y = nsum, op.x += 30 * H, op.delta += 30 * H, op.keys += 4;
  op.seq_start = alone, op.S = 1, op.M = 31;
  CHECK(!moe_layernorm_forward(&op, &env), "forward fails");
  CHECK(!memcmp(ops_ny + 30 * H, nsum, (size_t)(31 * H) * sizeof(float)), "bits differ");
}

/* ---- embeddings ---- */

static void test_ops_embeddings_agree_with_pytorch(void) {
  static const int32_t at[3] = {0, 4, 7};
  static float word[72], position[48], segment[16], w[8], b[8], dy[56], x[56], y[56], mean[7],
      rstd[7], dx[56];
  static float dword[72], dposition[48], dsegment[16], dw[8], db[8];
  int32_t ids[7];
  uint8_t segments[7];
  moe_embed_op embed;
  moe_layernorm_op op;
  moe_env env;
  int i;
  moe_env_init(&env, MOE_ISA_AUTO);
  golden_fill(word, 72, "embed.word", 1), golden_fill(position, 48, "embed.position", 1),
      golden_fill(segment, 16, "embed.segment", 1);
  golden_fill(w, 8, "embed.norm_w", 0.5f), golden_fill(b, 8, "embed.norm_b", 0.5f),
      golden_fill(dy, 56, "embed.dy", 1);
  for (i = 0; i < 8; ++i) w[i] += 1;
  for (i = 0; i < 7; ++i)
    ids[i] = golden_embed_ids[i], segments[i] = (uint8_t)golden_embed_segments[i];
  moe_embed_op_init(&embed);
  embed.x = x, embed.ids = ids, embed.segments = segments, embed.word = word;
  embed.position = position, embed.segment = segment, embed.seq_start = at;
  embed.S = 2, embed.M = 7, embed.H = 8, embed.dx = dx;
  embed.dword = dword, embed.dposition = dposition, embed.dsegment = dsegment;
  op = norm(1e-12f, 7, 8);
  op.y = y, op.mean = mean, op.rstd = rstd, op.x = x, op.gamma = w, op.beta = b;
  op.dx = dx, op.dgamma = dw, op.dbeta = db, op.dy = dy;
  CHECK(!moe_embed_forward(&embed, &env) && !moe_layernorm_forward(&op, &env), "forward fails");
  CHECK(!moe_layernorm_backward(&op, &env) && !moe_embed_backward(&embed, &env), "backward fails");
  CHECK(close_to(y, golden_embed_y, 56, 1e-6), "y");
  CHECK(close_to(dword, golden_embed_dword, 72, 2e-6), "dword");
  CHECK(close_to(dposition, golden_embed_dposition, 48, 2e-6), "dposition");
  CHECK(close_to(dsegment, golden_embed_dsegment, 16, 2e-6), "dsegment");
  CHECK(close_to(dw, golden_embed_dnorm_w, 8, 1e-6) && close_to(db, golden_embed_dnorm_b, 8, 1e-6),
        "norm");
}

static float word_table[20 * 100], position_table[40 * 100], segment_table[200];
static float dword_table[20 * 100], dposition_table[40 * 100], dsegment_table[200];

static void embed_bits(const moe_env *env, int first) {
  static float want[NORM_MAX], dword[20 * 100], dposition[40 * 100], dsegment[200];
  int32_t ids[70], H = 100, s, r, c;
  uint8_t segments[70];
  moe_embed_op op;
  (void)first;
  fill(word_table, 2000, 1, 1), fill(position_table, 4000, 2, 1), fill(segment_table, 200, 3, 1),
      fill(ops_ndy, 7000, 4, 1);
  fill(dword, 2000, 5, 1), fill(dposition, 4000, 6, 1), fill(dsegment, 200, 7, 1);
  memcpy(dword_table, dword, sizeof dword), memcpy(dposition_table, dposition, sizeof dposition);
  memcpy(dsegment_table, dsegment, sizeof dsegment);
  for (r = 0; r < 70; ++r) ids[r] = r * r % 20, segments[r] = (uint8_t)(r / 3 % 2);
  for (s = 0; s < SEQUENCES; ++s)
    for (r = starts[s]; r < starts[s + 1]; ++r)
      for (c = 0; c < H; ++c) {
        int32_t i = ids[r] * H + c, j = (r - starts[s]) * H + c, k = segments[r] * H + c;
        want[r * H + c] = word_table[i] + position_table[j] + segment_table[k];
        dword[i] += ops_ndy[r * H + c], dposition[j] += ops_ndy[r * H + c],
            dsegment[k] += ops_ndy[r * H + c];
      }
  dirty(ops_ny, NORM_MAX);
  moe_embed_op_init(&op);
  op.x = ops_ny, op.ids = ids, op.segments = segments, op.word = word_table;
  op.position = position_table, op.segment = segment_table;
  op.seq_start = starts, op.S = SEQUENCES, op.M = 70, op.H = H;
  op.dword = dword_table, op.dposition = dposition_table, op.dsegment = dsegment_table;
  op.dx = ops_ndy;
  CHECK(!moe_embed_forward(&op, env), "forward fails");
  CHECK(!memcmp(ops_ny, want, 7000 * sizeof(float)), "forward, %s", moe_isa_name(env->isa));
  CHECK(!moe_embed_backward(&op, env), "backward fails");
  CHECK(!memcmp(dword, dword_table, sizeof dword), "words, %s, %d threads", moe_isa_name(env->isa),
        (int)env->threads);
  CHECK(!memcmp(dposition, dposition_table, sizeof dposition), "positions, %s",
        moe_isa_name(env->isa));
  CHECK(!memcmp(dsegment, dsegment_table, sizeof dsegment), "segments, %s", moe_isa_name(env->isa));
  op.segments = NULL, op.segment = NULL;
  CHECK(!moe_embed_forward(&op, env), "forward fails");
  for (c = 0; c < H; ++c) CHECK(ops_ny[c] == word_table[c] + position_table[c], "without segments");
  for (r = 0; r < 7000; ++r) ops_ny[r] = word_table[ids[r / H] * H + r % H];
  op.segments = segments, op.segment = segment_table;
  op.word = NULL, op.ids = NULL; /* what stands for the word is there already */
  CHECK(!moe_embed_forward(&op, env), "forward fails");
  CHECK(!memcmp(ops_ny, want, 7000 * sizeof(float)), "places only, %s", moe_isa_name(env->isa));
}

static void test_ops_embeddings_are_exact_sums_in_the_order_of_the_tokens(void) {
  each_env(embed_bits);
}

/* ---- cross-entropy ---- */

static void golden_ce(const char *name, int C, float scale, const int *label, const double *y,
                      const double *dscores) {
  float logits[20], dy[4], prob[5], gradient[20] = {0}, loss[4];
  char key[64];
  int r;
  snprintf(key, sizeof key, "%s.scores", name), golden_fill(logits, (size_t)(4 * C), key, scale);
  snprintf(key, sizeof key, "%s.dy", name), golden_fill(dy, 4, key, 1);
  for (r = 0; r < 4; ++r) {
    float unit = (float)(1 / log((double)C)); /* these cases are divided by log C */
    loss[r] = moe_cross_entropy_forward(prob, logits + r * C, label[r], C) * unit;
    CHECK_NEAR(loss[r], y[r], 2e-6 * (1 + fabs(y[r])));
    moe_cross_entropy_backward(gradient + r * C, prob, label[r], dy[r] * unit, C);
  }
  CHECK(close_to(gradient, dscores, (size_t)(4 * C), 2e-6), "gradient of %s", name);
}

static void test_ops_cross_entropy_agrees_with_pytorch(void) {
  const int by2[] = {0, 1, 0, 1}, by3[] = {0, 1, 2, 0}, by5[] = {0, 1, 2, 3};
  golden_ce("ce2", 2, 8, by2, golden_ce2_y, golden_ce2_dscores);
  CHECK_STATE();
  golden_ce("ce3", 3, 8, by3, golden_ce3_y, golden_ce3_dscores);
  CHECK_STATE();
  golden_ce("ce5", 5, 8, by5, golden_ce5_y, golden_ce5_dscores);
  CHECK_STATE();
  golden_ce("ce_large", 3, 512, by3, golden_ce_large_y, golden_ce_large_dscores);
}

static void test_ops_cross_entropy_for_any_number_of_classes(void) {
  static float logits[300], prob[300], alone[300];
  const int sizes[] = {1, 2, 16, 17, 150, 256};
  int s, i;
  for (s = 0; s < 6; ++s) {
    int C = sizes[s], label = C / 2;
    double sum = 0, total = 0;
    float loss;
    fill(logits, 300, (uint64_t)s, 1);
    for (i = 0; i < C; ++i) sum += exp((double)logits[i]);
    loss = moe_cross_entropy_forward(prob, logits, label, C);
    CHECK_NEAR(loss, log(sum) - (double)logits[label], 1e-6);
    CHECK(loss == moe_cross_entropy_forward(NULL, logits, label, C), "without probabilities");
    moe_softmax(alone, logits, C);
    CHECK(!memcmp(prob, alone, (size_t)C * sizeof *prob), "moe_softmax");
    for (i = 0; i < C; ++i) {
      CHECK_NEAR(prob[i], exp((double)logits[i]) / sum, 1e-6);
      total += (double)prob[i];
    }
    CHECK_NEAR(total, 1, 1e-6);
    CHECK(loss == moe_cross_entropy_forward(logits, logits, label, C) &&
              !memcmp(logits, prob, (size_t)C * 4),
          "in place");
  }
  logits[0] = 1, logits[1] = NAN, logits[2] = 0;
  CHECK(moe_cross_entropy_forward(NULL, logits, 0, 3) !=
            moe_cross_entropy_forward(NULL, logits, 0, 3),
        "NaN must stay visible");
}

/* ---- wrong sizes and options ---- */

static void test_ops_refuse_sizes_and_options_out_of_range(void) {
  moe_layernorm_op n = residual(70, 100, 0.2f, ops_keys);
  moe_dropout_op d;
  moe_embed_op e;
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  norm_inputs(70, 100);
  fill(ndelta, 7000, 6, 1);
  CHECK(!moe_layernorm_forward(&n, &env) && !moe_layernorm_backward(&n, &env), "the op itself");
  n.M = 69;
  CHECK(moe_layernorm_forward(&n, &env) == MOE_E_ARGUMENT, "sequences of more rows");
  n.keys = NULL;
  CHECK(!moe_layernorm_forward(&n, &env), "which matter to dropout alone");
  n.M = -1;
  CHECK(moe_layernorm_forward(&n, &env) == MOE_E_ARGUMENT, "M below 0");
  n = residual(70, 100, 1, ops_keys);
  CHECK(moe_layernorm_forward(&n, &env) == MOE_E_ARGUMENT, "dropout of everything");
  n.dropout = NAN;
  CHECK(moe_layernorm_forward(&n, &env) == MOE_E_ARGUMENT, "dropout is no number");
  n = norm(0, 70, 100);
  CHECK(moe_layernorm_forward(&n, &env) == MOE_E_ARGUMENT, "eps 0");
  n = norm(1e-5f, 70, 100);
  n.mean = NULL;
  CHECK(moe_layernorm_forward(&n, &env) == MOE_E_ARGUMENT, "rstd without mean");
  n.rstd = NULL;
  CHECK(moe_layernorm_backward(&n, &env) == MOE_E_ARGUMENT, "backward without both");
  moe_dropout_op_init(&d);
  d.x = ops_nx, d.y = ops_ny, d.seq_start = starts, d.S = SEQUENCES, d.M = 70, d.H = 100;
  CHECK(!moe_dropout_forward(&d, &env) && !memcmp(ops_nx, ops_ny, 28000), "no ops_keys: a copy");
  d.dropout = -0.1f;
  CHECK(moe_dropout_forward(&d, &env) == MOE_E_ARGUMENT, "dropout below 0");
  moe_embed_op_init(&e);
  CHECK(!moe_embed_forward(&e, &env), "all sizes 0");
  e.x = ops_nx, e.seq_start = starts, e.S = SEQUENCES, e.M = 71, e.H = 100;
  CHECK(moe_embed_forward(&e, &env) == MOE_E_ARGUMENT, "more rows than sequences have");
  e.M = 70, e.S = -1;
  CHECK(moe_embed_forward(&e, &env) == MOE_E_ARGUMENT, "S below 0");
}

static void run_ops(void) {
  RUN(test_ops_norm_matches_the_definition_in_double);
  RUN(test_ops_norm_has_the_same_bits_everywhere);
  RUN(test_ops_norm_gradients_do_not_depend_on_micro_batches);
  RUN(test_ops_norm_agrees_with_pytorch);
  RUN(test_ops_norm_of_equal_numbers_is_beta);
  RUN(test_ops_dropout_has_its_probability_and_keeps_the_mean);
  RUN(test_ops_dropout_has_the_same_bits_everywhere);
  RUN(test_ops_residual_norm_is_the_ops_in_a_row);
  RUN(test_ops_residual_norm_backward_is_the_ops_in_a_row);
  RUN(test_ops_residual_norm_of_a_sequence_ignores_its_neighbours);
  RUN(test_ops_embeddings_agree_with_pytorch);
  RUN(test_ops_embeddings_are_exact_sums_in_the_order_of_the_tokens);
  RUN(test_ops_cross_entropy_agrees_with_pytorch);
  RUN(test_ops_cross_entropy_for_any_number_of_classes);
  RUN(test_ops_refuse_sizes_and_options_out_of_range);
}
