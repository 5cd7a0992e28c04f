/* Options and sizes that slots refuse, with a status and before they launch anything. */
#ifndef CASES_REFUSED_H
#define CASES_REFUSED_H

static void refused(Case &c, const char *what, moe_status status) {
  if (status != MOE_E_ARGUMENT && status != MOE_E_UNSUPPORTED)
    c.fail(std::string(what) + " is not refused");
}

static void refused_rows(Case &c) {
  moe_layernorm_op norm;
  moe_dropout_op dropout;
  moe_attention_op attention;
  moe_layernorm_op_init(&norm), moe_dropout_op_init(&dropout), moe_attention_op_init(&attention);
  norm.eps = 0;
  refused(c, "layernorm: eps 0", cases_gpu.layernorm(&cases_gpu, &cases_env, &norm, 0));
  norm.eps = 1e-5f, norm.dropout = 1;
  refused(c, "layernorm: dropout 1", cases_gpu.layernorm(&cases_gpu, &cases_env, &norm, 0));
  norm.dropout = 0, norm.M = -1;
  refused(c, "layernorm: M -1", cases_gpu.layernorm(&cases_gpu, &cases_env, &norm, 0));
  dropout.dropout = -0.1f;
  refused(c, "dropout -0.1", cases_gpu.dropout(&cases_gpu, &cases_env, &dropout));
  attention.A = 1, attention.H = 129, attention.M = attention.S = 1, attention.longest = 1;
  refused(c, "attention: heads of 129", cases_gpu.attention(&cases_gpu, &cases_env, &attention, 0));
  attention.A = 3, attention.H = 64;
  refused(c, "attention: 3 heads of 64",
          cases_gpu.attention(&cases_gpu, &cases_env, &attention, 0));
}

static void refused_route(Case &c) {
  static const int sizes[][2] = {{0, 1}, {257, 1}, {4, 0}, {4, 5}};
  moe_routes routes;
  moe_route_op route;
  moe_linear_op linear;
  memset(&routes, 0, sizeof routes);
  moe_route_op_init(&route), moe_linear_op_init(&linear);
  route.routes = &routes, route.H = 4, route.G = 1;
  for (const int *size : sizes) {
    routes.N = size[0], routes.k = size[1];
    refused(c, "route: N or k", cases_gpu.route(&cases_gpu, &cases_env, &route, 0));
  }
  routes.N = 4, routes.k = 2, route.options.scale = 0;
  refused(c, "route: scale 0", cases_gpu.route(&cases_gpu, &cases_env, &route, 0));
  linear.M = -1;
  refused(c, "linear: M -1", cases_gpu.linear(&cases_gpu, &cases_env, &linear, 0));
  linear.M = 1, linear.w.rows = 1, linear.w.cols = 1, linear.w.type = MOE_TYPE_I8;
  refused(c, "linear: int8", cases_gpu.linear(&cases_gpu, &cases_env, &linear, 0));
}

static void case_refused(Case &c) {
  moe_adam_op adam;
  if (c.number) return;
  cases_env.log = nullptr;
  refused_rows(c);
  refused_route(c);
  moe_adam_op_init(&adam);
  adam.t = 0;
  refused(c, "adam: step 0", cases_gpu.adam(&cases_gpu, &cases_env, &adam, 1));
  adam.t = 1, adam.beta1 = 1;
  refused(c, "adam: beta1 1", cases_gpu.adam(&cases_gpu, &cases_env, &adam, 1));
  adam.beta1 = 0.9f, adam.beta2 = 1.25f;
  refused(c, "adam: beta2 1.25", cases_gpu.adam(&cases_gpu, &cases_env, &adam, 1));
  cases_env.log = cases_log;
}
#endif
