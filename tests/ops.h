/* Ops by arguments, for tests that call them often. A status that is not MOE_OK ends the test. */
#ifndef OPS_H
#define OPS_H

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
