/* Random cases of linear layers and experts. */
#ifndef CASES_PRODUCTS_H
#define CASES_PRODUCTS_H

/* A size: often odd, sometimes a multiple of a tile, now and then larger than one. */
static int product_size(Case &c) {
  static const int edges[] = {15, 17, 63, 64, 65, 127, 128, 129};
  int kind = c.pick(0, 10);
  if (kind == 10) return edges[c.pick(0, 7)];
  if (kind < 5) return c.pick(1, 40);
  if (kind < 8) return 16 * c.pick(1, 4);
  return c.pick(41, 150);
}

static void case_linear(Case &c) {
  int M = c.number % 10 == 3 ? 1 : product_size(c), rows = product_size(c), cols = product_size(c);
  if (c.number % 25 == 7) M = 0;
  if (c.number % 25 == 8) /* sums over the rows are cut in pieces */
    M = c.pick(513, 1100), rows = c.pick(1, 40), cols = c.pick(1, 40);
  if (c.number % 25 == 13) M = 600, rows = 1, cols = 256; /* sums, of which 256 are a block */
  if (c.number % 25 == 14) M = 1, rows = 3, cols = 257;
  size_t x_n = (size_t)M * (size_t)cols, y_n = (size_t)M * (size_t)rows;
  size_t w_n = (size_t)rows * (size_t)cols;
  bool act = c.chance(40), overwrite = c.chance(50);
  auto x = c.input("x", x_n), w = c.input("w", w_n, 0.5f), b = c.input("b", rows, 1, c.chance(70));
  auto y = c.output("y", y_n, !act || c.chance(60)), a = c.output("act", y_n, act);
  auto dy = c.input("dy", y_n), dx = c.gradient("dx", x_n, c.chance(85));
  auto dw = c.gradient("dw", w_n, c.chance(85)), db = c.gradient("db", rows, c.chance(85));
  c.tolerance = cases_mode.tolerance;
  c.expect(db, NEAR, cases_mode.arch >= 80 ? 1e-5 : 1e-2); /* from 80 on dy is not rounded for it */
  c.send();
  for (int pass = 0; pass < 3; ++pass) /* forward twice: it adds to no gradient */
    for (int side = CPU, back = pass == 2; side < SIDES; ++side) {
      moe_linear_op op;
      moe_linear_op_init(&op);
      op.y = y.at(side), op.act = a.at(side), op.x = x.at(side), op.b = b.at(side), op.M = M;
      op.w = moe_mat_rows(w.at(side), rows, cols);
      op.dx = dx.at(side), op.dw = dw.at(side), op.db = db.at(side), op.dy = dy.at(side);
      op.overwrite = overwrite;
      c.status(CASES_RUN(c, side, linear, op, back), side);
    }
  c.compare();
}

struct ExpertsCase {
  int M, N, k, H, F;
  bool routed;
  Array<float> x, y, pre, e, dx, dweight, dy, weight, prob, scratch;
  Array<int32_t> expert, order, start;
  std::vector<Array<float>> w[2], b[2], dw[2], db[2]; /* in, out */
};

/* Routes as a gate would give them: k different experts for each token, few or all of them used. */
static void experts_routes(Case &c, ExpertsCase &e) {
  size_t slots = (size_t)(e.M * e.k);
  int used = c.chance(40) ? e.k + c.pick(0, e.N - e.k) / 2 : e.N;
  e.expert = c.array<int32_t>("expert", slots, SAME, e.routed);
  e.order = c.array<int32_t>("order", slots, SAME, e.routed);
  e.start = c.array<int32_t>("start", (size_t)e.N + 1, SAME, e.routed);
  e.weight = c.input("weight", slots, 1, e.routed);
  e.prob = c.input("prob", (size_t)(e.M * e.N), 1, e.routed);
  if (!e.routed) return;
  if (e.N == 1 && slots && c.number % 28 != 15) { /* constant weights, or all but one */
    for (size_t slot = 0; slot < slots; ++slot) e.weight[slot] = 1;
    if (c.number % 28 == 1) e.weight[(size_t)c.pick(0, (int)slots - 1)] = 0.5f;
    if (c.number % 28 == 22) e.weight[(size_t)c.pick(0, (int)slots - 1)] = 1.5f;
  }
  for (int m = 0; m < e.M; ++m) {
    int first = c.pick(0, used - 1);
    for (int j = 0; j < e.k; ++j) e.expert[(size_t)(m * e.k + j)] = e.N - 1 - (first + j) % used;
  }
  for (int m = 0; m < e.M && c.number % 50 == 14; ++m) /* a tile that is just full */
    e.expert[(size_t)m] = m >= 128;
  int at = 0;
  for (int i = 0; i < e.N; ++i) {
    e.start[(size_t)i] = at;
    for (size_t slot = 0; slot < slots; ++slot)
      if (e.expert[slot] == i) e.order[(size_t)at++] = (int32_t)slot;
  }
  e.start[(size_t)e.N] = at;
}

static void experts_make(Case &c, ExpertsCase &e) {
  static const int experts[] = {4, 1, 2, 8, 3, 16, 5};
  e.M = c.number % 10 == 3 ? 1 : c.number % 25 == 7 ? 0 : product_size(c);
  e.N = experts[c.number % 7], e.routed = e.N > 1 || c.number < 28 || c.chance(50);
  e.k = c.number % 3 && e.N > 1 ? c.pick(1, e.N < 3 ? e.N : 3) : 1;
  e.H = product_size(c), e.F = product_size(c);
  if (c.number % 50 == 13) e.N = 256, e.k = 1, e.M = 5, e.H = 3, e.F = 4; /* the most */
  if (c.number % 50 == 14) e.N = 2, e.k = 1, e.M = 200, e.H = 3, e.F = 4;
  if (c.number % 50 == 15) e.N = 3, e.k = 1, e.M = 1560, e.H = 2, e.F = 3; /* cut in pieces */
  if (c.number % 50 == 12) /* blocks that are just full */
    e.N = 16, e.k = 2, e.M = 257, e.H = 129, e.F = 5;
  if (e.N > 1) e.routed = true;
  size_t H = (size_t)e.H, F = (size_t)e.F, slots = (size_t)(e.M * e.k), n = (size_t)e.M * H;
  experts_routes(c, e);
  e.x = c.input("x", n), e.dy = c.input("dy", n), e.y = c.output("y", n);
  e.pre = c.output("pre", slots * F), e.e = c.output("e", slots * H);
  if (e.N == 1) c.expect(e.e, ANY_VALUE); /* not used with one expert */
  e.dx = c.gradient("dx", n, c.chance(85)), e.dweight = c.output("dweight", slots, c.chance(85));
  for (int i = 0; i < e.N; ++i)
    for (int o = 0; o < 2; ++o) {
      size_t outputs = o ? H : F;
      e.w[o].push_back(c.input(o ? "w_out" : "w_in", H * F, 0.5f));
      e.b[o].push_back(c.input(o ? "b_out" : "b_in", outputs, 1, c.number % 4 != 2));
      e.dw[o].push_back(c.gradient(o ? "d_out" : "d_in", H * F, c.number % 5 != 4));
      e.db[o].push_back(c.gradient(o ? "d_b_out" : "d_b_in", outputs, c.number % 6 != 5));
    }
  e.scratch = c.array<float>("scratch", moe_experts_scratch(e.M, e.k, e.H, e.F, 1), ANY_VALUE);
}

struct ExpertsPointers { /* the arrays of pointers of one side */
  std::vector<moe_mat> w[2];
  std::vector<const float *> b[2], rows[2];
  std::vector<float *> dw[2], db[2];
};

static void experts_pointers(const ExpertsCase &e, int side, ExpertsPointers &p) {
  for (size_t o = 0; o < 2; ++o)
    for (size_t i = 0; i < (size_t)e.N; ++i) {
      p.w[o].push_back(o ? moe_mat_rows(e.w[o][i].at(side), e.H, e.F)
                         : moe_mat_rows(e.w[o][i].at(side), e.F, e.H));
      p.rows[o].push_back(e.w[o][i].at(side)), p.b[o].push_back(e.b[o][i].at(side));
      p.dw[o].push_back(e.dw[o][i].at(side)), p.db[o].push_back(e.db[o][i].at(side));
    }
}

static void case_experts(Case &c) {
  ExpertsCase e;
  experts_make(c, e);
  c.tolerance = cases_mode.precision == MOE_TYPE_BF16 ? 1e-2 : cases_mode.tolerance;
  c.send();
  for (int back = 0; back < 2; ++back)
    for (int side = CPU; side < SIDES; ++side) {
      ExpertsPointers p;
      moe_routes routes = {e.M,
                           e.N,
                           e.k,
                           e.expert.at(side),
                           e.weight.at(side),
                           e.prob.at(side),
                           e.order.at(side),
                           e.start.at(side)};
      moe_experts_op op;
      experts_pointers(e, side, p);
      moe_experts_op_init(&op);
      op.y = e.y.at(side), op.pre = e.pre.at(side), op.e = e.e.at(side), op.x = e.x.at(side);
      op.routes = e.routed ? &routes : nullptr, op.M = e.M, op.N = e.N, op.H = e.H, op.F = e.F;
      op.in = p.w[0].data(), op.out = p.w[1].data();
      op.b_in = c.number % 8 == 2 ? nullptr : p.b[0].data(), op.b_out = p.b[1].data();
      op.scratch = e.scratch.at(side), op.dx = e.dx.at(side), op.dweight = e.dweight.at(side);
      op.d_in = p.dw[0].data(), op.d_out = p.dw[1].data(), op.d_b_in = p.db[0].data();
      op.d_b_out = c.number % 12 == 5 ? nullptr : p.db[1].data();
      op.dy = e.dy.at(side), op.w_in = p.rows[0].data(), op.w_out = p.rows[1].data();
      c.status(CASES_RUN(c, side, experts, op, back), side);
    }
  c.compare();
}
#endif
