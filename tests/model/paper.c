/* What the papers say in one sentence and no other test says in one: see paper.md, which lists
   every requirement with its tests. */

static models_batch paper_batch;
static float paper_scores[MODELS_S * MOE_MAX_CLASSES], paper_scores2[MODELS_S * MOE_MAX_CLASSES];

/* [TaG] 4.3, 4.4, A.3 and Table 8; what A.3.2 found harmful is off. */
static void test_paper_defaults_are_the_papers(void) {
  moe_config c;
  moe_train_config t;
  moe_config_init(&c);
  moe_train_config_init(&t);
  CHECK(c.layers == 6 && c.hidden == 384 && c.ffn == 1536 && c.heads == 12, "MiniLM is %d x %d",
        (int)c.layers, (int)c.hidden);
  CHECK(c.router == MOE_ROUTER_TASK && c.experts == 4 && c.top_k == 1, "%d experts, top-%d",
        (int)c.experts, (int)c.top_k);
  CHECK(!c.gate_scale_n && !c.renormalize && c.unit == MOE_UNIT_FFN && !c.cased,
        "departures are off");
  CHECK_NEAR(c.eps, 1e-12, 1e-19);
  CHECK_NEAR(t.beta1, 0.9, 1e-7);
  CHECK_NEAR(t.beta2, 0.999, 1e-7);
  CHECK_NEAR(t.eps, 1e-8, 1e-15);
  CHECK_NEAR(t.clip_norm, 1, 0);
  CHECK_NEAR(t.dropout, 0.1, 1e-8);
  CHECK_NEAR(t.warmup, 0.1, 1e-8);
  CHECK_NEAR(t.balance + t.z_loss + t.jitter + t.weight_decay, 0, 0);
  CHECK_NEAR(t.tau_start, 2, 0);
  CHECK_NEAR(t.tau_end, 0.1, 1e-8);
}

/* Experts in every layer, a gate for every task, each of the shape the paper gives. */
static void test_paper_every_layer_has_experts_and_a_gate_for_every_task(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 4, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  moe_tensor t;
  char name[1024];
  int l, i;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  CHECK(model, "%s", said);
  for (l = 0; l < c.layers; ++l) {
    for (i = 0; i < 4; ++i) {
      snprintf(name, sizeof name, "encoder.layer.%d.experts.%d.intermediate.dense.weight", l, i);
      CHECK(!moe_model_tensor(model, moe_model_find_tensor(model, name), &t) &&
                t.shape[0] == c.ffn && t.shape[1] == c.hidden,
            "%s", name);
    }
    for (i = 0; i < MODELS_TASKS; ++i) {
      snprintf(name, sizeof name, "encoder.layer.%d.gate.%s.weight", l, tasks[i].name);
      CHECK(!moe_model_tensor(model, moe_model_find_tensor(model, name), &t) && t.shape[0] == 4 &&
                t.shape[1] == c.hidden,
            "%s", name);
    }
  }
  moe_model_free(model);
}

static int paper_forward(float *out, const moe_model *model, moe_context **context,
                         const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  return moe_context_create(context, model, &limits, env) ||
         moe_forward(*context, out, &paper_batch.b, env);
}

/* Eq. 2: with k = N the layer is the sum of all experts, each times its gate. Here by the words of
   the paper, in double. */
static void test_paper_top_n_is_the_full_mixture(void) {
  enum { M = 7, H = 6, F = 9, N = 3 };
  static const int32_t starts[] = {0, 3, M}, gate_of[] = {1, 0};
  static float x[M * H], gates[2 * N * H], in[N][F * H], out[N][H * F], b_in[N][F], b_out[N][H],
      y[M * H], logits[M * N], scratch[8192];
  int32_t expert[M * N], order[M * N], start[N + 1], s, t, i, j, p;
  float weight[M * N], prob[M * N];
  const float *in_b[N], *out_b[N];
  moe_mat in_w[N], out_w[N];
  moe_routes r;
  moe_route_op route;
  moe_experts_op e;
  moe_env env = models_env(MOE_ISA_AUTO);
  r.M = M, r.N = r.k = N, r.expert = expert, r.weight = weight, r.prob = prob, r.order = order,
  r.start = start;
  golden_fill(x, M * H, "x", 1);
  golden_fill(gates, 2 * N * H, "gates", 1);
  for (i = 0; i < N; ++i) {
    golden_fill(in[i], F * H, i ? i > 1 ? "in 2" : "in 1" : "in 0", 1);
    golden_fill(out[i], H * F, i ? i > 1 ? "out 2" : "out 1" : "out 0", 1);
    golden_fill(b_in[i], F, "b in", 1);
    golden_fill(b_out[i], H, "b out", 1);
    in_w[i] = moe_mat_rows(in[i], F, H);
    out_w[i] = moe_mat_rows(out[i], H, F);
    in_b[i] = b_in[i], out_b[i] = b_out[i];
  }
  moe_route_op_init(&route);
  route.routes = &r, route.logits = logits, route.x = x, route.gates = gates;
  route.gate_of = gate_of, route.seq_start = starts, route.S = 2, route.H = H, route.G = 2;
  moe_experts_op_init(&e);
  e.y = y, e.x = x, e.routes = &r, e.in = in_w, e.out = out_w, e.b_in = in_b, e.b_out = out_b;
  e.N = N, e.H = H, e.F = F, e.scratch = scratch;
  CHECK(moe_experts_scratch(M, N, H, F, 0) <= 8192, "scratch");
  CHECK(!moe_route_forward(&route, &env) && !moe_experts_forward(&e, &env), "fails");
  for (s = 0; s < 2; ++s)
    for (t = starts[s]; t < starts[s + 1]; ++t) {
      double z[N], sum = 0, want[H] = {0};
      for (i = 0; i < N; ++i) {
        for (z[i] = 0, p = 0; p < H; ++p)
          z[i] += (double)x[t * H + p] * (double)gates[(gate_of[s] * N + i) * H + p]; /* Eq. 3 */
        sum += exp(z[i]);
      }
      for (i = 0; i < N; ++i)
        for (j = 0; j < F; ++j) {
          double a = (double)b_in[i][j];
          for (p = 0; p < H; ++p) a += (double)in[i][j * H + p] * (double)x[t * H + p];
          a *= 0.5 * (1 + erf(a / sqrt(2.0))); /* Eq. 1 */
          for (p = 0; p < H; ++p)
            want[p] +=
                exp(z[i]) / sum *
                ((double)out[i][p * F + j] * a + (j ? 0 : (double)b_out[i][p])); /* Eq. 2, 4 */
        }
      for (p = 0; p < H; ++p) CHECK_NEAR(y[t * H + p], want[p], 1e-5);
    }
}

/* [TaG] 4.2: with one task MT-TaG is MT-Switch. */
static void test_paper_one_task_makes_the_task_gate_the_shared_one(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *own, *shared;
  moe_context *a = NULL, *b = NULL;
  moe_tensor from, to;
  char name[1024];
  int32_t l;
  models_tasks(tasks);
  own = models_create(&c, tasks, 1, &env);
  c.router = MOE_ROUTER_SHARED;
  shared = models_create(&c, tasks, 1, &env);
  CHECK(own && shared, "%s", said);
  for (l = 0; l < c.layers; ++l) {
    snprintf(name, sizeof name, "encoder.layer.%d.gate.%s.weight", (int)l, tasks[0].name);
    CHECK(!moe_model_tensor(own, moe_model_find_tensor(own, name), &from), "%s", name);
    snprintf(name, sizeof name, "encoder.layer.%d.gate.weight", (int)l);
    CHECK(!moe_model_tensor(shared, moe_model_find_tensor(shared, name), &to), "%s", name);
    memcpy(moe_model_weights(shared) + to.offset, moe_model_weights(own) + from.offset,
           from.count * sizeof(float));
  }
  CHECK(moe_model_parameters(own) == moe_model_parameters(shared), "parameters");
  models_random_batch(&paper_batch, own, 12, 9, 1);
  CHECK(!paper_forward(paper_scores, own, &a, &env) &&
            !paper_forward(paper_scores2, shared, &b, &env),
        "%s", said);
  CHECK(!memcmp(paper_scores, paper_scores2, 12 * 2 * sizeof(float)), "the scores differ");
  moe_context_free(a), moe_context_free(b);
  moe_model_free(own), moe_model_free(shared);
}

/* Eq. 7, 8 and A.3.1: heads read [CLS], those of spans [CLS], word 1 and word 2 side by side, a
   word being the mean of its tokens. */
static void test_paper_heads_read_cls_and_spans(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  moe_context *context = NULL;
  int32_t s, i, j, k, p, spans = 0, width;
  models_tasks(tasks);
  model = models_create(&c, tasks, MODELS_TASKS, &env);
  CHECK(model, "%s", said);
  width = moe_model_max_classes(model);
  models_random_batch(&paper_batch, model, 30, 9, 2);
  CHECK(!paper_forward(paper_scores, model, &context, &env), "%s", said);
  for (s = 0; s < 30; ++s) {
    const moe_task *task = &tasks[paper_batch.task[s]];
    const float *hidden = moe_context_hidden(context) + paper_batch.start[s] * c.hidden;
    int32_t span = task->kind == MOE_KIND_SPAN, parts = span ? 3 : 1;
    double read[60] = {0};
    moe_tensor w, b;
    char name[1024];
    spans += span;
    for (j = 0; j < c.hidden; ++j) read[j] = (double)hidden[j];
    for (k = 0; k < 2 && span; ++k) {
      int32_t from = paper_batch.span[4 * s + 2 * k], to = paper_batch.span[4 * s + 2 * k + 1];
      for (p = from; p < to; ++p)
        for (j = 0; j < c.hidden; ++j)
          read[(k + 1) * c.hidden + j] += (double)hidden[p * c.hidden + j] / (to - from);
    }
    snprintf(name, sizeof name, "heads.%s.weight", task->name);
    CHECK(!moe_model_tensor(model, moe_model_find_tensor(model, name), &w), "%s", name);
    snprintf(name, sizeof name, "heads.%s.bias", task->name);
    CHECK(!moe_model_tensor(model, moe_model_find_tensor(model, name), &b), "%s", name);
    CHECK(w.shape[0] == task->classes && w.shape[1] == parts * c.hidden, "%s: %d x %d", name,
          (int)w.shape[0], (int)w.shape[1]);
    for (i = 0; i < task->classes; ++i) {
      double want = (double)moe_model_weights(model)[b.offset + (size_t)i];
      for (j = 0; j < parts * c.hidden; ++j)
        want += (double)moe_model_weights(model)[w.offset + (size_t)(i * parts * c.hidden + j)] *
                read[j];
      CHECK_NEAR(paper_scores[s * width + i], want, 1e-5 * (1 + fabs(want)));
    }
  }
  CHECK(spans > 2, "%d spans", (int)spans);
  moe_context_free(context);
  moe_model_free(model);
}

/* [TaG] 3.3: divided by log C, a guess costs 1 whatever the number of classes; squared errors stay
   what they are. */
static void test_paper_a_guess_costs_1_with_any_number_of_classes(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config config;
  moe_task tasks[4];
  moe_model *model;
  moe_trainer *trainer = NULL;
  float loss, losses[16];
  double sum = 0;
  int32_t s, i;
  memset(tasks, 0, sizeof tasks);
  for (i = 0; i < 4; ++i) {
    snprintf(tasks[i].name, sizeof tasks[i].name, "t%d", (int)i);
    tasks[i].classes = i == 3 ? 1 : i == 2 ? 150 : 2 + i;
  }
  tasks[3].kind = MOE_KIND_REGRESSION;
  tasks[3].high = 5;
  moe_train_config_init(&config);
  config.steps = 1;
  model = models_create(&c, tasks, 4, &env);
  CHECK(model, "%s", said);
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    moe_model_tensor(model, i, &t);
    if (!strncmp(t.name, "heads.", 6))
      memset(moe_model_weights(model) + t.offset, 0, t.count * sizeof(float));
  }
  CHECK(!moe_trainer_create(&trainer, model, &limits, &config, &env), "%s", said);
  models_random_batch(&paper_batch, model, 16, 9, 3);
  for (s = 0; s < 16; ++s) {
    paper_batch.task[s] = s % 4;
    paper_batch.label[s] = s % 4 == 3 ? 3 : (float)(s % 2);
  }
  CHECK(!moe_trainer_accumulate(trainer, &paper_batch.b, 0, &loss, losses, &env), "%s", said);
  for (s = 0; s < 16; ++s) {
    CHECK_NEAR(losses[s], s % 4 == 3 ? 9.0 : 1.0, 1e-6);
    sum += (double)losses[s] / 16;
  }
  CHECK_NEAR(loss, sum, 1e-6);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

static void run_paper(void) {
  RUN(test_paper_defaults_are_the_papers);
  RUN(test_paper_every_layer_has_experts_and_a_gate_for_every_task);
  RUN(test_paper_top_n_is_the_full_mixture);
  RUN(test_paper_one_task_makes_the_task_gate_the_shared_one);
  RUN(test_paper_heads_read_cls_and_spans);
  RUN(test_paper_a_guess_costs_1_with_any_number_of_classes);
}
