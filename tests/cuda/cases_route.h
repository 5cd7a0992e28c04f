/* Random cases of gates, heads, the norm of the gradients and Adam. */
#ifndef CASES_ROUTE_H
#define CASES_ROUTE_H

/* Experts that tokens must take: k different ones each, none of them pruned. */
static void fill_forced(Case &c, const Array<int32_t> &forced, const Array<uint8_t> &pruned, int M,
                        int N, int k) {
  for (int m = 0; m < M; ++m) {
    int next = c.pick(0, N - 1);
    for (int j = 0; j < k; ++j, ++next) {
      while (pruned.index >= 0 && pruned[(size_t)(next % N)]) ++next;
      forced[(size_t)(m * k + j)] = next % N;
    }
  }
}

struct RouteCase {
  Sequences s;
  int N, k, H, G;
  moe_route_options options;
  Array<float> x, gates, logits, loss, weight, prob, dx, dgates, dlogits, dweight;
  Array<int32_t> gate_of, expert, order, start, forced;
  Array<uint8_t> masked, pruned;
  Array<uint64_t> keys;
};

static void route_options(Case &c, RouteCase &r) {
  moe_route_options_init(&r.options);
  r.options.scale = c.chance(50) ? 1.0f : (float)r.N / (float)r.k;
  r.options.renormalize = c.chance(30);
  r.options.balance = c.chance(50) ? 0.01f : 0;
  r.options.z_loss = c.chance(50) ? 0.02f : 0;
  r.options.jitter = c.chance(40) ? 0.1f : 0;
  r.keys = cases_keys(c, r.s.S, r.options.jitter > 0);
  int left = r.N - r.k; /* experts that may be missing */
  r.masked = c.array<uint8_t>("masked", (size_t)r.N, SAME, r.N > 1 && c.chance(30));
  r.pruned = c.array<uint8_t>("pruned", (size_t)r.N, SAME, r.N > 1 && c.chance(30));
  for (int i = 0; i < r.N; ++i) {
    bool take = left > 0 && c.chance(30);
    if (r.masked.index >= 0) r.masked[(size_t)i] = take, left -= take, take = false;
    if (r.pruned.index >= 0) r.pruned[(size_t)i] = take, left -= take;
  }
  bool dead = r.N > 1 && c.number % 8 == 5; /* forced experts have probability 0: see route_make */
  if (dead) r.options.renormalize = 1, r.options.z_loss = 0.02f;
  r.forced =
      c.array<int32_t>("forced", (size_t)(r.s.M * r.k), SAME, dead || (r.N > 1 && c.chance(25)));
  if (r.forced.index >= 0) fill_forced(c, r.forced, r.pruned, r.s.M, r.N, r.k);
}

static void route_make(Case &c, RouteCase &r) {
  static const int experts[] = {1, 2, 4, 8, 3, 16, 17, 40, 4, 5};
  r.s = cases_sequences(c, 6, c.number % 8 == 7 ? 90 : 12);
  r.N = c.number % 20 == 19 ? 256 : experts[c.number % 10];
  r.k = c.number % 3 ? c.pick(1, r.N < 4 ? r.N : 4) : 1;
  r.H = c.number % 12 == 11 ? c.pick(1000, 1100) : c.pick(1, 80);
  r.G = c.pick(1, 3);
  size_t M = (size_t)r.s.M, N = (size_t)r.N, H = (size_t)r.H, k = (size_t)r.k;
  bool wide = r.N > 1;
  r.x = c.input("x", M * H, 1, wide);
  r.gates = c.input("gates", (size_t)r.G * N * H, 1, wide);
  if (wide && c.chance(25)) { /* equal logits: the lowest index comes first */
    for (size_t i = 0; i < M * H; ++i) r.x[i] = roundf(r.x[i]);
    for (size_t i = 0; i < (size_t)r.G * N * H; ++i) r.gates[i] = roundf(r.gates[i]);
  }
  r.gate_of = c.array<int32_t>("gate_of", (size_t)r.s.S, SAME, wide);
  for (int i = 0; i < r.s.S && wide; ++i) r.gate_of[(size_t)i] = c.pick(0, r.G - 1);
  route_options(c, r);
  if (c.number % 16 == 9) r.x[0] = 3e38f, r.gates[0] = 100; /* a logit that is infinite */
  if (c.number % 8 == 5 && wide)
    for (size_t i = 0; i < (size_t)r.G * N * H; ++i) r.gates[i] *= 1e4f;
  r.logits = c.array<float>("logits", M * N, wide ? NEAR : ANY_VALUE);
  r.loss = c.output("loss", 1, c.chance(80));
  r.expert = c.array<int32_t>("expert", M * k, SAME);
  r.weight = c.output("weight", M * k), r.prob = c.output("prob", M * N);
  r.order = c.array<int32_t>("order", M * k, SAME);
  r.start = c.array<int32_t>("start", N + 1, SAME);
  r.dx = c.gradient("dx", M * H, c.chance(85));
  c.expect(r.dx, NEAR, 4e-5); /* differences of weights that are nearly equal */
  r.dgates = c.gradient("dgates", (size_t)r.G * N * H, c.chance(85));
  r.dlogits = c.array<float>("dlogits", M * N, NEAR);
  /* where gates are sure, what is left of 1 - p is the rounding of p */
  c.expect(r.dlogits, wide ? NEAR : ANY_VALUE, 0, 1e-6);
  r.dweight = c.input("dweight", M * k);
}

static void case_route(Case &c) {
  RouteCase r;
  route_make(c, r);
  c.send();
  for (int back = 0; back < 2; ++back)
    for (int side = CPU; side < SIDES; ++side) {
      moe_route_op op;
      moe_routes routes = {r.s.M,
                           r.N,
                           r.k,
                           r.expert.at(side),
                           r.weight.at(side),
                           r.prob.at(side),
                           r.order.at(side),
                           r.start.at(side)};
      moe_route_op_init(&op);
      op.routes = &routes, op.logits = r.logits.at(side), op.loss = r.loss.at(side);
      op.x = r.x.at(side), op.gates = r.gates.at(side), op.gate_of = r.gate_of.at(side);
      op.seq_start = r.s.start.at(side), op.S = r.s.S, op.H = r.H, op.G = r.G;
      op.options = r.options, op.options.keys = r.keys.at(side);
      op.options.forced = r.forced.at(side), op.options.masked = r.masked.at(side);
      op.options.pruned = r.pruned.at(side);
      op.dx = r.dx.at(side), op.dgates = r.dgates.at(side), op.dlogits = r.dlogits.at(side);
      op.dweight = r.dweight.at(side), op.loss_scale = 0.5f;
      c.status(CASES_RUN(c, side, route, op, back), side);
    }
  c.compare();
}

struct HeadsCase {
  Sequences s;
  int H, T, classes;
  std::vector<moe_task> tasks;
  std::vector<size_t> head;
  size_t weights;
  Array<int32_t> task, span;
  Array<float> label, hidden, w, scores, losses, dhidden, dw, scratch;
  Array<uint64_t> keys;
};

static void heads_tasks(Case &c, HeadsCase &h) {
  static const moe_kind kinds[] = {MOE_KIND_CLASSIFICATION, MOE_KIND_REGRESSION, MOE_KIND_RANKING,
                                   MOE_KIND_SPAN};
  h.weights = 0, h.classes = 1;
  for (int t = 0; t < h.T; ++t) {
    moe_task task;
    memset(&task, 0, sizeof task);
    task.kind = kinds[(c.number + t) % 4];
    task.classes = task.kind == MOE_KIND_REGRESSION ? 1
                   : c.number % 10 == 9             ? 40 - t
                                                    : c.pick(2, 5);
    if (task.kind == MOE_KIND_RANKING) task.classes = 2;
    h.classes = task.classes > h.classes ? task.classes : h.classes;
    h.tasks.push_back(task);
    h.head.push_back(h.weights);
    h.weights += (size_t)(task.classes * (h.H * (task.kind == MOE_KIND_SPAN ? 3 : 1) + 1));
  }
  h.classes += c.number % 2;
}

static void heads_make(Case &c, HeadsCase &h) {
  h.s = cases_sequences(c, 12, 9);
  h.H = c.pick(1, 70), h.T = c.pick(1, 5);
  heads_tasks(c, h);
  size_t S = (size_t)h.s.S, n = (size_t)h.s.M * (size_t)h.H;
  h.task = c.array<int32_t>("task", S, SAME), h.span = c.array<int32_t>("span", 4 * S, SAME);
  h.label = c.array<float>("label", S, SAME);
  for (size_t i = 0; i < S; ++i) {
    int t = h.task[i] = c.pick(0, h.T - 1), length = h.s.start[i + 1] - h.s.start[i];
    h.label[i] = h.tasks[(size_t)t].kind == MOE_KIND_REGRESSION
                     ? c.uniform()
                     : (float)c.pick(0, h.tasks[(size_t)t].classes - 1);
    for (size_t j = 0; j < 4; j += 2) {
      h.span[4 * i + j] = c.pick(0, length - 1);
      h.span[4 * i + j + 1] = c.pick(h.span[4 * i + j] + 1, length);
    }
  }
  h.keys = cases_keys(c, h.s.S, c.chance(60));
  h.hidden = c.input("hidden", n);
  h.w = c.input("w", h.weights, c.number % 6 == 5 ? 40 : 1); /* exp of a score is infinite */
  h.scores = c.output("scores", S * (size_t)h.classes), h.losses = c.output("losses", S);
  h.dhidden = c.gradient("dhidden", n, c.chance(90)),
  h.dw = c.gradient("dw", h.weights, c.chance(90));
  h.scratch = c.array<float>("scratch", moe_heads_scratch(h.H), ANY_VALUE);
}

static void case_heads(Case &c) {
  HeadsCase h;
  heads_make(c, h);
  bool overwrite = c.chance(50), weighted = c.chance(50);
  Array<float> weight = c.array<float>("weight", (size_t)h.s.S, SAME);
  for (int i = 0; i < h.s.S; ++i) weight[(size_t)i] = c.chance(20) ? 0 : 3 * c.uniform();
  c.send();
  for (int back = 0; back < 2; ++back)
    for (int side = CPU; side < SIDES; ++side) {
      moe_heads_op op;
      moe_heads_op_init(&op);
      op.scores = h.scores.at(side), op.losses = h.losses.at(side), op.hidden = h.hidden.at(side);
      op.w = h.w.at(side), op.head = h.head.data(), op.tasks = h.tasks.data();
      op.task = h.task.at(side), op.label = h.label.at(side), op.span = h.span.at(side);
      op.seq_start = h.s.start.at(side), op.dropout = 0.2f, op.keys = h.keys.at(side);
      op.S = h.s.S, op.M = h.s.M, op.H = h.H, op.T = h.T, op.max_classes = h.classes;
      op.scratch = h.scratch.at(side), op.dhidden = h.dhidden.at(side), op.dw = h.dw.at(side);
      op.batch_size = h.s.S + c.number % 3, op.overwrite = overwrite;
      op.weight = weighted ? weight.at(side) : nullptr;
      c.status(CASES_RUN(c, side, heads, op, back), side);
    }
  c.compare();
}

/* The norm of several spans and a step of Adam on them; some are frozen, some empty. */
static void case_adam(Case &c) {
  int n = c.number % 12 == 7 ? 400 : c.pick(1, 5); /* 400: more tiles than a block has threads */
  std::vector<moe_adam_op> spans[SIDES];
  std::vector<Array<float>> arrays;
  for (int i = 0; i < n; ++i) {
    size_t count = (size_t)c.pick(c.number % 4 ? 1 : 0, c.number % 6 == 5 ? 9000 : 300);
    if (c.number % 5 == 3 || n > 5) count = (size_t)i % 6;
    moe_adam_op op;
    moe_adam_op_init(&op);
    op.count = count, op.t = c.pick(1, 50), op.lr = 1e-2f,
    op.weight_decay = c.chance(50) ? 0.1f : 0;
    op.lr_scale = c.chance(20) ? 0 : 1 + c.uniform(), op.factor = 0.5f;
    op.eps = c.chance(50) ? 1e-8f : 0.1f;
    for (int j = 0; j < 4; ++j) arrays.push_back(c.gradient(j == 1 ? "g" : "w, m or v", count));
    for (size_t e = 0; e < count; ++e) {
      arrays.back()[e] *= arrays.back()[e]; /* v: at least 0 */
      if (e % 16 == 7) {                    /* moments that have died out */
        arrays[arrays.size() - 3][e] = 0;
        arrays[arrays.size() - 2][e] = 9e-31f, arrays.back()[e] = 9e-38f;
      }
    }
    spans[CPU].push_back(op), spans[GPU].push_back(op);
  }
  c.send();
  for (int side = CPU; side < SIDES; ++side)
    for (int i = 0; i < n; ++i) {
      moe_adam_op &op = spans[side][(size_t)i];
      op.w = arrays[4 * (size_t)i].at(side), op.g = arrays[4 * (size_t)i + 1].at(side);
      op.m = arrays[4 * (size_t)i + 2].at(side), op.v = arrays[4 * (size_t)i + 3].at(side);
    }
  double sum = 0, norm = -1;
  for (const moe_adam_op &op : spans[CPU]) {
    double one = op.lr_scale == 0 ? 0 : moe_gradient_norm(op.g, op.count, &cases_cpu);
    sum += one * one;
  }
  c.dirty_scratch();
  c.status(cases_gpu.grad_norm(&cases_gpu, &cases_env, &norm, spans[GPU].data(), n), GPU);
  if (!(fabs(norm - sqrt(sum)) <= 1e-5 * sqrt(sum))) c.fail("grad_norm: another norm");
  for (const moe_adam_op &op : spans[CPU]) c.status(moe_adam_step(&op, &cases_cpu), CPU);
  c.dirty_scratch();
  c.status(cases_gpu.adam(&cases_gpu, &cases_env, spans[GPU].data(), n), GPU);
  c.compare();
  for (const Block &b : c.blocks) { /* what is 0 by the CPU: a moment that has died out */
    std::vector<float> gpu(b.cpu.size() / sizeof(float));
    const float *cpu = (const float *)(const void *)b.cpu.data();
    if (b.cpu.size() && cases_gpu.download(&cases_gpu, &cases_env, gpu.data(), b.gpu, b.cpu.size()))
      c.fail("download fails");
    for (size_t e = 0; e < gpu.size(); ++e)
      if (cpu[e] == 0 && gpu[e] != 0) c.fail("adam: " + b.name + " is not 0");
  }
}
#endif
