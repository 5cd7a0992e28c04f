/* Options and sizes that slots refuse: a status, a sentence, and nothing is launched. */
#ifndef CASES_REFUSED_H
#define CASES_REFUSED_H

static std::string refused_said;
static void refused_log(void *, moe_status, const char *sentence) { refused_said += sentence; }

/* The call just made must have failed with a sentence that holds `says`. */
static void refused(Case &c, const char *says, moe_status status) {
  if ((status != MOE_E_ARGUMENT && status != MOE_E_UNSUPPORTED) ||
      refused_said.find(says) == std::string::npos)
    c.fail(std::string(says) + ": not refused, or \"" + refused_said + "\"");
  refused_said.clear();
}
#define REFUSED(says, name, ...)                                                                   \
  refused(c, says, cases_gpu.name(&cases_gpu, &cases_env, __VA_ARGS__))

static void refused_rows(Case &c) {
  moe_layernorm_op norm;
  moe_dropout_op dropout;
  moe_attention_op attention;
  moe_layernorm_op_init(&norm), moe_dropout_op_init(&dropout), moe_attention_op_init(&attention);
  norm.eps = 0;
  REFUSED("eps", layernorm, &norm, 0);
  norm.eps = 1e-5f, norm.dropout = 1;
  REFUSED("dropout is 1", layernorm, &norm, 0);
  norm.dropout = 0;
  if (cases_gpu.layernorm(&cases_gpu, &cases_env, &norm, 1)) c.fail("layernorm refuses no rows");
  norm.M = -1;
  REFUSED("M is -1", layernorm, &norm, 0);
  norm.M = 0, norm.S = -1;
  REFUSED("S is -1", layernorm, &norm, 0);
  norm.S = 0, norm.H = -1;
  REFUSED("H is -1", layernorm, &norm, 0);
  dropout.dropout = -0.1f;
  REFUSED("dropout is -0.1", dropout, &dropout);
  attention.A = 2, attention.H = 258, attention.M = attention.S = 1, attention.longest = 1;
  REFUSED("heads have 129 numbers", attention, &attention, 0);
  attention.A = 3, attention.H = 64;
  REFUSED("A is 3, expected a divisor of H, 64", attention, &attention, 0);
  attention.A = 0;
  REFUSED("A is 0", attention, &attention, 0);
  attention.A = 4;
  REFUSED("stats is NULL", attention, &attention, 1);
  attention.A = 65536, attention.H = 65536;
  REFUSED("too many blocks", attention, &attention, 0);
  attention.A = 1, attention.H = 64, attention.S = 1 << 30, attention.longest = 129;
  REFUSED("of up to 129 tokens", attention, &attention, 0);
  attention.longest = 1, attention.dropout = 1;
  REFUSED("dropout is 1", attention, &attention, 0);
}

static void refused_route(Case &c) {
  static const int sizes[][2] = {{0, 1}, {257, 1}, {4, 0}, {4, 5}};
  moe_routes routes;
  moe_route_op route;
  memset(&routes, 0, sizeof routes);
  moe_route_op_init(&route);
  route.routes = &routes, route.H = 4, route.G = 1;
  for (const int *size : sizes) {
    routes.N = size[0], routes.k = size[1];
    REFUSED("expected 1 <= k <= N", route, &route, 0);
  }
  routes.N = 4, routes.k = 2, route.options.scale = 0;
  REFUSED("scale is 0", route, &route, 0);
  route.options.scale = 1, routes.M = 1 << 30;
  REFUSED("M is", route, &route, 0);
}

static void refused_linear(Case &c) {
  moe_linear_op linear;
  moe_linear_op_init(&linear);
  linear.M = -1, linear.w.rows = linear.w.cols = 1;
  REFUSED("M is -1", linear, &linear, 0);
  linear.M = 1, linear.w.rows = 0;
  REFUSED("w is (0, 1)", linear, &linear, 0);
  linear.w.rows = 1, linear.w.cols = 0;
  REFUSED("w is (1, 0)", linear, &linear, 0);
  linear.w.cols = 1, linear.w.type = MOE_TYPE_I8;
  REFUSED("w is int8", linear, &linear, 0);
  linear.w.type = MOE_TYPE_F32, linear.w.layout = MOE_LAYOUT_PANELS;
  REFUSED("or packed", linear, &linear, 0);
}

static void refused_experts(Case &c) {
  static float number[2];
  static const struct {
    int M, k, N, of, H, F;
    const char *says;
  } row[] = {{1, 1, 3, 2, 1, 1, "N 2"},       {1, 1, 0, 0, 1, 1, "N 0"},
             {1, 0, 2, 2, 1, 1, "k 0"},       {1, 1, 2, 2, 0, 1, "H 0"},
             {1, 1, 2, 2, 1, 0, "F 0"},       {-1, 1, 2, 2, 1, 1, "M is -1"},
             {1 << 30, 2, 2, 2, 1, 1, "k 2"}, {1, 1, 257, 257, 1, 1, "N 257"}};
  moe_experts_op op;
  moe_routes routes;
  moe_mat mats[2];
  for (const auto &r : row) {
    memset(&routes, 0, sizeof routes);
    moe_experts_op_init(&op);
    routes.M = r.M, routes.k = r.k, routes.N = r.N;
    op.routes = &routes, op.N = r.of, op.H = r.H, op.F = r.F;
    REFUSED(r.says, experts, &op, 0);
  }
  routes.M = routes.k = 1, routes.N = op.N = 2, op.H = op.F = 1;
  op.in = op.out = mats, mats[0] = mats[1] = moe_mat_rows(number, 1, 1);
  REFUSED("pre or e is NULL", experts, &op, 1);
  op.pre = op.dweight = number;
  REFUSED("pre or e is NULL", experts, &op, 1);
  mats[1].type = MOE_TYPE_I8;
  REFUSED("weights of expert 1", experts, &op, 0);
  mats[1].type = MOE_TYPE_F32, mats[1].layout = MOE_LAYOUT_PANELS;
  REFUSED("weights of expert 1", experts, &op, 0);
  op.routes = nullptr, op.N = 2, op.M = 1;
  REFUSED("N 2", experts, &op, 0);
}

static void case_refused(Case &c) {
  moe_adam_op adam;
  if (c.number) return;
  cases_env.log = refused_log;
  refused_rows(c);
  refused_route(c);
  refused_linear(c);
  refused_experts(c);
  moe_adam_op_init(&adam);
  adam.t = 0;
  REFUSED("t is 0", adam, &adam, 1);
  adam.t = 1, adam.beta1 = 1;
  REFUSED("beta1 1", adam, &adam, 1);
  adam.beta1 = 0.9f, adam.beta2 = 1.25f;
  REFUSED("beta2 1.25", adam, &adam, 1);
  cases_env.log = cases_log;
}
#endif
