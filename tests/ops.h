/* What the tests of operations share. */
#ifndef OPS_H
#define OPS_H

static const int32_t thread_counts[] = {1, 2, 3, 8};

/* Calls body(env) for every instruction set of this machine and 1, 2, 3 and 8 threads; `first`
   marks the call that the others are compared with. */
TEST_UNUSED static void each_env(void (*body)(const moe_env *env, int first)) {
  size_t i, t;
  int first = 1;
  for (i = 0; i < ISAS; ++i)
    for (t = 0; t < 4 && moe_isa_available(isas[i]); ++t) {
      moe_env env;
      moe_pool *pool = NULL;
      moe_env_init(&env, isas[i]);
      CHECK(moe_pool_create_exact(&pool, thread_counts[t], &env) == MOE_OK, "no pool");
      body(&env, first);
      moe_pool_free(pool);
      CHECK_STATE();
      first = 0;
    }
}

TEST_UNUSED static void fill(float *x, size_t n, uint64_t seed, float scale) {
  uint64_t state = seed;
  size_t i;
  for (i = 0; i < n; ++i) x[i] = test_random(&state) * scale;
}

TEST_UNUSED static void dirty(float *x, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) x[i] = i % 3 ? NAN : 1e30f;
}

/* Ops by arguments, for tests that call them often. A status that is not MOE_OK ends the test. */
TEST_UNUSED static void linear_forward(float *y, const float *x, const moe_mat *w, const float *b,
                                       int32_t M, const moe_env *env) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.y = y, op.x = x, op.w = *w, op.b = b, op.M = M;
  CHECK(!moe_linear_forward(&op, env), "linear forward fails");
}

TEST_UNUSED static void linear_gelu_forward(float *act, float *y, const float *x, const moe_mat *w,
                                            const float *b, int32_t M, const moe_env *env) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.y = y, op.act = act, op.x = x, op.w = *w, op.b = b, op.M = M;
  CHECK(!moe_linear_forward(&op, env), "linear forward fails");
}

TEST_UNUSED static void linear_backward(float *dx, float *dw, float *db, const float *dy,
                                        const float *x, const moe_mat *w, int32_t M,
                                        const moe_env *env) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.x = x, op.w = *w, op.M = M;
  op.dx = dx, op.dw = dw, op.db = db, op.dy = dy;
  CHECK(!moe_linear_backward(&op, env), "linear backward fails");
}
#endif
