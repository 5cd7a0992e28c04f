/* The backward pass and the trainer: against PyTorch, against differences, bit for bit in every
   company. */
#include "golden/tiny.h"

static models_batch trainer_batch, part;
static moe_task trainer_tasks[MODELS_TASKS];

static moe_train_config plain(void) {
  moe_train_config config;
  moe_train_config_init(&config);
  config.lr = 1e-3f;
  config.steps = 20;
  config.dropout = 0;
  return config;
}

/* A model with its trainer. */
typedef struct pair {
  moe_model *model;
  moe_trainer *trainer;
} pair;

static pair make(const moe_config *c, const moe_train_config *config, const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  pair p = {NULL, NULL};
  models_tasks(trainer_tasks);
  p.model = models_create(c, trainer_tasks, MODELS_TASKS, env);
  if (p.model && moe_trainer_create(&p.trainer, p.model, &limits, config, env)) p.trainer = NULL;
  return p;
}

static void drop(pair *p) {
  moe_trainer_free(p->trainer);
  moe_model_free(p->model);
}

/* ---- PyTorch's numbers ---- */

/* The model of golden/tiny.h and a trainer for it. */
static pair tiny(moe_router router, int32_t top_k, int scale_n, const moe_train_config *config,
                 const moe_env *env) {
  static const char *const name[] = {"two", "three", "real"};
  moe_config c = models_config(router, router == MOE_ROUTER_DENSE ? 1 : 3, top_k);
  moe_limits limits = {36, 6, 1, 0};
  pair p = {NULL, NULL};
  int i;
  c.hidden = 16;
  c.heads = 2;
  c.ffn = 32;
  c.positions = c.max_len = 12;
  c.gate_scale_n = scale_n;
  memset(trainer_tasks, 0, sizeof trainer_tasks);
  for (i = 0; i < 3; ++i) {
    snprintf(trainer_tasks[i].name, sizeof trainer_tasks[i].name, "%s", name[i]);
    trainer_tasks[i].kind = i == 2 ? MOE_KIND_REGRESSION : MOE_KIND_CLASSIFICATION;
    trainer_tasks[i].classes = i == 2 ? 1 : 2 + i;
    trainer_tasks[i].high = 5;
  }
  if (moe_model_create(&p.model, &c, trainer_tasks, 3, 1, env)) return p;
  models_fill(p.model, 0);
  if (moe_trainer_create(&p.trainer, p.model, &limits, config, env)) p.trainer = NULL;
  return p;
}

/* Sequences first .. first + S - 1 of golden arrays. */
static void golden_batch(const moe_model *model, const int *starts, const int *ids,
                         const int *segments, const int *task, const double *label, int32_t first,
                         int32_t S) {
  int32_t s, i;
  memset(&trainer_batch, 0, sizeof trainer_batch);
  for (s = 0; s < S; ++s) {
    trainer_batch.start[s + 1] = starts[first + s + 1] - starts[first];
    trainer_batch.task[s] = task[first + s];
    trainer_batch.label[s] = (float)label[first + s];
    trainer_batch.index[s] = s;
  }
  for (i = 0; i < trainer_batch.start[S]; ++i) {
    trainer_batch.ids[i] = ids[starts[first] + i];
    trainer_batch.segments[i] = (uint8_t)segments[starts[first] + i];
  }
  models_connect(&trainer_batch, moe_model_config(model), S);
}

static const float *gradient(pair *p, const char *name, size_t *count) {
  moe_tensor t;
  if (moe_model_tensor(p->model, moe_model_find_tensor(p->model, name), &t)) return NULL;
  *count = t.count;
  return moe_trainer_gradients(p->trainer) + t.offset;
}

static double norm_of(const float *x, size_t n) {
  double sum = 0;
  size_t i;
  for (i = 0; i < n; ++i) sum += (double)x[i] * (double)x[i];
  return sqrt(sum);
}

static double worst_gradient;

static void check_gradient_norms(pair *p, const golden_number *want, size_t n) {
  size_t i, count = 0;
  for (i = 0; i < n; ++i) {
    const float *g = gradient(p, want[i].name, &count);
    CHECK(g, "no tensor %s", want[i].name);
    CHECK(fabs(norm_of(g, count) - want[i].value) <= 1e-5 * want[i].value + 1e-7,
          "%s: %g, PyTorch %g", want[i].name, norm_of(g, count), want[i].value);
  }
}

static void check_gradients(pair *p, const golden_tensor *want, size_t n) {
  size_t i, j, count = 0;
  for (i = 0; i < n; ++i) {
    const float *g = gradient(p, want[i].name, &count);
    double error = 0, norm = 0;
    CHECK(g && count == want[i].count, "no tensor %s of this size", want[i].name);
    for (j = 0; j < count; ++j) {
      error += ((double)g[j] - want[i].values[j]) * ((double)g[j] - want[i].values[j]);
      norm += want[i].values[j] * want[i].values[j];
    }
    error =
        sqrt(error) / (sqrt(norm) + 1e-2); /* the floor is for key biases, whose gradient is zero */
    if (error > worst_gradient) worst_gradient = error;
    CHECK(error <= 1e-5, "%s: relative error %g of norm %g", want[i].name, error, sqrt(norm));
  }
}

static void test_trainer_gradients_match_pytorch(void) {
  static const double *const losses[] = {tiny_dense_losses, tiny_switch_losses, tiny_tag_losses};
  static const double *const loss[] = {tiny_dense_loss, tiny_switch_loss, tiny_tag_loss};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_train_config config = plain();
  int router, i;
  for (router = 0; router < 3; ++router) {
    pair p = tiny((moe_router)router, 1, 0, &config, &env);
    float total = 0, each[6];
    CHECK(p.trainer, "%s", said);
    golden_batch(p.model, tiny_batch_starts, tiny_batch_ids, tiny_batch_segments, tiny_batch_task,
                 tiny_batch_label, 0, 6);
    CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, &total, each, &env) == MOE_OK,
          "%s", said);
    for (i = 0; i < 6; ++i) CHECK_NEAR(each[i], losses[router][i], 3e-6);
    CHECK_NEAR(total, loss[router][0], 2e-6);
    if (router == 0)
      check_gradient_norms(&p, tiny_dense_grad_norms,
                           sizeof tiny_dense_grad_norms / sizeof *tiny_dense_grad_norms);
    if (router == 1)
      check_gradient_norms(&p, tiny_switch_grad_norms,
                           sizeof tiny_switch_grad_norms / sizeof *tiny_switch_grad_norms);
    if (router == 2)
      check_gradients(&p, tiny_tag_grads, sizeof tiny_tag_grads / sizeof *tiny_tag_grads);
    CHECK_STATE();
    drop(&p);
  }
  printf("        worst gradient of a tensor: relative error %.1e\n", worst_gradient);
}

static void run_curve(const char *name, moe_router router, int32_t top_k, int scale_n, float decay,
                      float balance, float z_loss, const double *losses, const double *norms,
                      const golden_number *final_norms, size_t n_final) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_train_config config = plain();
  pair p;
  int step;
  size_t i;
  config.balance = balance;
  config.z_loss = z_loss;
  p = tiny(router, top_k, scale_n, &config, &env);
  CHECK(p.trainer, "%s", said);
  CHECK(moe_model_pack(p.model, NULL, &env) == MOE_OK, "%s", said);
  for (i = 0; i < (size_t)p.trainer->n_spans; ++i)
    p.trainer->spans[i].weight_decay = decay; /* on every tensor, as PyTorch's run */
  for (step = 0; step < 20; ++step) {
    float loss = 0, norm = 0;
    golden_batch(p.model, tiny_steps_starts, tiny_steps_ids, tiny_steps_segments, tiny_steps_task,
                 tiny_steps_label, 4 * step, 4);
    CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, &loss, NULL, &env) == MOE_OK, "%s",
          said);
    CHECK(moe_trainer_step(p.trainer, &norm, &env) == MOE_OK, "%s", said);
    CHECK(fabs((double)loss - losses[step]) <= 2e-5 * (1 + losses[step]),
          "%s step %d: loss %.8g, PyTorch %.8g", name, step + 1, (double)loss, losses[step]);
    CHECK(fabs((double)norm - norms[step]) <= 1e-4 * norms[step],
          "%s step %d: norm %.8g, PyTorch %.8g", name, step + 1, (double)norm, norms[step]);
  }
  for (i = 0; i < n_final; ++i) {
    moe_tensor t;
    double norm;
    CHECK(moe_model_tensor(p.model, moe_model_find_tensor(p.model, final_norms[i].name), &t) ==
              MOE_OK,
          "no tensor %s", final_norms[i].name);
    norm = norm_of(moe_model_weights(p.model) + t.offset, t.count);
    CHECK(fabs(norm - final_norms[i].value) <= 2e-5 * (1 + final_norms[i].value),
          "%s: %g, PyTorch %g", t.name, norm, final_norms[i].value);
  }
  drop(&p);
}

static void test_trainer_20_steps_match_pytorch(void) {
  run_curve("tag", MOE_ROUTER_TASK, 1, 0, 0, 0, 0, tiny_steps_tag_losses, tiny_steps_tag_norms,
            tiny_steps_tag_final_norms,
            sizeof tiny_steps_tag_final_norms / sizeof *tiny_steps_tag_final_norms);
  CHECK_STATE();
  run_curve("tag, decay 0.1", MOE_ROUTER_TASK, 1, 0, 0.1f, 0, 0, tiny_steps_tag_decay_losses,
            tiny_steps_tag_decay_norms, NULL, 0);
  CHECK_STATE();
  run_curve("tag, scale N/k", MOE_ROUTER_TASK, 1, 1, 0, 0, 0, tiny_steps_tag_n_losses,
            tiny_steps_tag_n_norms, NULL, 0);
  CHECK_STATE();
  run_curve("tag, top-2, auxiliary losses", MOE_ROUTER_TASK, 2, 0, 0, 0.1f, 0.01f,
            tiny_steps_tag_top2_losses, tiny_steps_tag_top2_norms, NULL, 0);
  CHECK_STATE();
  run_curve("switch", MOE_ROUTER_SHARED, 1, 0, 0, 0, 0, tiny_steps_switch_losses,
            tiny_steps_switch_norms, NULL, 0);
  CHECK_STATE();
  run_curve("dense", MOE_ROUTER_DENSE, 1, 0, 0, 0, 0, tiny_steps_dense_losses,
            tiny_steps_dense_norms, NULL, 0);
}

/* ---- differences ---- */

static const float some_weights[MODELS_S] = {0.5f, 2, 0, 1, 3, 0.25f, 1, 1, 4, 0.125f, 1, 2};

static void test_trainer_gradients_match_differences(void) {
  static const struct {
    moe_router router;
    int32_t experts, top_k;
    int features, renormalize, scale_n;
    float dropout, balance, z_loss, jitter;
  } v[] = {{MOE_ROUTER_DENSE, 1, 1, 0, 0, 0, 0, 0, 0, 0},
           {MOE_ROUTER_SHARED, 3, 1, 0, 0, 1, 0, 0, 0, 0},
           {MOE_ROUTER_TASK, 3, 1, 0, 0, 0, 0, 0, 0, 0},
           {MOE_ROUTER_TASK, 4, 2, 0, 1, 0, 0, 0, 0, 0},
           {MOE_ROUTER_TASK, 3, 3, 0, 0, 0, 0, 0.3f, 0.1f, 0},
           {MOE_ROUTER_TASK, 3, 2, 1, 0, 0, 0, 0, 0, 0},
           {MOE_ROUTER_TASK, 3, 1, 0, 0, 0, 0.3f, 0, 0, 0.2f},
           {MOE_ROUTER_DENSE, 1, 1, 1, 0, 0, 0.2f, 0, 0, 0}};
  moe_env env = models_env(MOE_ISA_AUTO);
  size_t i;
  for (i = 0; i < sizeof v / sizeof *v; ++i) {
    moe_config c = models_config(v[i].router, v[i].experts, v[i].top_k);
    moe_train_config config = plain();
    float error = 1;
    pair p;
    size_t bytes;
    uint64_t before;
    config.dropout = v[i].dropout;
    config.balance = v[i].balance;
    config.z_loss = v[i].z_loss;
    config.jitter = v[i].jitter;
    c.renormalize = v[i].renormalize;
    c.gate_scale_n = v[i].scale_n;
    if (v[i].features) c.feature_dim = 5, c.vocab = 0;
    p = make(&c, &config, &env);
    CHECK(p.trainer, "%s", said);
    CHECK(moe_model_pack(p.model, NULL, &env) == MOE_OK, "%s", said);
    bytes = moe_model_parameters(p.model) * sizeof(float);
    before = models_hash(moe_model_weights(p.model), bytes);
    models_random_batch(&trainer_batch, p.model, 12, 9, 20 + i);
    trainer_batch.b.weight = i % 2 ? some_weights : NULL;
    error = 7;
    CHECK(moe_gradcheck(p.trainer, &trainer_batch.b, 0, &error, &env) == MOE_E_ARGUMENT &&
              error == 7,
          "none checked is none right");
    CHECK(moe_gradcheck(p.trainer, &trainer_batch.b, 3 * moe_model_tensors(p.model), &error,
                        &env) == MOE_OK,
          "%s", said);
    CHECK(error < 0.01f, "variant %zu: error %g", i, (double)error);
    CHECK(models_hash(moe_model_weights(p.model), bytes) == before, "weights are as before");
    drop(&p);
  }
  trainer_batch.b.weight = NULL;
}

/* torch.nn.CrossEntropyLoss(weight=[1, 0.5, 3]) of four rows and its gradient; the weight of a row
   is that of its class, times the rows over the sum of all. */
static void test_trainer_weights_are_those_of_cross_entropy_loss(void) {
  static const float x[12] = {0.5f,  -1.0f, 0.25f, 1.5f,   0.25f, -0.75f,
                              -0.5f, 0.0f,  2.0f,  0.125f, 1.0f,  -1.0f},
                     w[12] = {1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0}, label[4] = {0, 2, 2, 1},
                     weight[4] = {4 / 7.5f, 12 / 7.5f, 12 / 7.5f, 2 / 7.5f};
  static const float want[12] = {-0.0667f, 0.0149f, 0.0519f,  0.2874f, 0.0823f,  -0.3697f,
                                 0.0270f,  0.0445f, -0.0714f, 0.0179f, -0.0237f, 0.0058f};
  static const int32_t start[5] = {0, 1, 2, 3, 4}, task[4] = {0, 0, 0, 0};
  static const size_t head[1] = {0};
  float scores[12], losses[4], dx[12], scratch[18], mean = 0;
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_heads_op op;
  moe_task one;
  int i;
  memset(&one, 0, sizeof one);
  one.classes = 3;
  moe_heads_op_init(&op);
  op.scores = scores, op.losses = losses, op.hidden = x, op.w = w, op.head = head;
  op.tasks = &one, op.task = task, op.label = label, op.seq_start = start, op.weight = weight;
  op.S = op.M = 4, op.H = 3, op.T = 1, op.max_classes = 3, op.scratch = scratch;
  op.dhidden = dx, op.batch_size = 4, op.overwrite = 1;
  CHECK(!moe_heads_forward(&op, &env) && !moe_heads_backward(&op, &env), "%s", said);
  for (i = 0; i < 4; ++i) mean += losses[i] / 4;
  CHECK_NEAR(mean * logf(3), 1.232822410174184, 1e-6);
  for (i = 0; i < 12; ++i) CHECK_NEAR(dx[i] * logf(3), (double)want[i], 6e-5);
}

static void test_trainer_gradcheck_finds_a_wrong_gradient(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  pair p = make(&c, &config, &env);
  double worst = 0, whole;
  models_random_batch(&trainer_batch, p.model, 12, 9, 40);
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
        said);
  whole = moe_gradient_norm(p.trainer->g, p.model->plan.total, &env);
  p.trainer->g[moe__at(p.model, MOE__WORD, 0, 0) + (size_t)(trainer_batch.ids[0] * c.hidden)] +=
      (float)(0.1 * whole);
  CHECK(moe__check_gradient(p.trainer, &trainer_batch.b,
                            moe__at(p.model, MOE__WORD, 0, 0) +
                                (size_t)(trainer_batch.ids[0] * c.hidden),
                            whole, &worst, &env) == MOE_OK,
        "%s", said);
  CHECK(worst > 0.09 && worst < 0.11, "error %g", worst);
  drop(&p);
}

/* The error that moe_gradcheck finds when one gradient of tensor i is wrong by half of the norm
   that errors are relative to; *expected: the error that it should find. */
static double gradcheck_finds(pair *p, int32_t i, int32_t samples, int nan, double *expected,
                              const moe_env *env) {
  moe_trainer *t = p->trainer;
  float *panels = p->model->panels, *g;
  int32_t *routes = NULL;
  double whole, norm, wrong, worst = 0;
  moe_tensor tensor;
  size_t k;
  moe__trainer_clear(t);
  if (moe_trainer_accumulate(t, &trainer_batch.b, 0, NULL, NULL, env) ||
      moe__check_routes(&routes, t->context, env) || moe_model_tensor(p->model, i, &tensor))
    return -1;
  for (g = t->g + tensor.offset, k = 1; k < tensor.count; ++k) /* its largest one */
    if (fabsf(t->g[tensor.offset + k]) > fabsf(*g)) g = &t->g[tensor.offset + k];
  whole = moe_gradient_norm(t->g, p->model->plan.total, env);
  norm = moe_gradient_norm(t->g + tensor.offset, tensor.count, env);
  wrong = norm > 0.01 * whole ? norm / 2 : 0.005 * whole;
  *g += nan ? NAN : *g < 0 ? (float)-wrong : (float)wrong;
  whole = 0.01 * moe_gradient_norm(t->g, p->model->plan.total, env);
  norm = moe_gradient_norm(t->g + tensor.offset, tensor.count, env);
  *expected = wrong / (norm > whole ? norm : whole);
  t->context->forced = routes;
  p->model->panels = NULL;
  if (moe__check_samples(t, &trainer_batch.b, samples, &worst, env)) worst = -1;
  t->context->forced = NULL;
  p->model->panels = panels;
  moe__release(routes);
  return worst;
}

/* An error is relative to the norm of its tensor, or to a hundredth of the norm of all if that is
   larger; NaN stays the worst. Few samples are spread over all tensors. */
static void test_trainer_gradcheck_tells_the_worst_error(void) {
  static const float nothing[12] = {0};
  float error = 7;
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  pair p = make(&c, &config, &env);
  int32_t n = moe_model_tensors(p.model), i;
  double worst, expected;
  models_random_batch(&trainer_batch, p.model, 12, 9, 40);
  for (i = 0; i < n; i += 5) {
    worst = gradcheck_finds(&p, i, n, 0, &expected, &env);
    CHECK(expected > 0.2 && fabs(worst - expected) < 0.02, "tensor %d: error %g, not %g", (int)i,
          worst, expected);
  }
  worst = gradcheck_finds(&p, 0, n, 1, &expected, &env);
  CHECK(worst != worst, "NaN: error %g", worst);
  for (i = 0; i < 3; ++i) {
    worst = gradcheck_finds(&p, i * n / 3, 3, 0, &expected, &env);
    CHECK(fabs(worst - expected) < 0.02, "sample %d of 3: error %g, not %g", (int)i, worst,
          expected);
  }
  worst = gradcheck_finds(&p, 1, 3, 0, &expected, &env);
  CHECK(worst >= 0 && worst < 0.02, "tensor 1 is not among 3 samples: error %g", worst);
  trainer_batch.b.weight = nothing;
  CHECK(!moe_gradcheck(p.trainer, &trainer_batch.b, n, &error, &env) && error == 0,
        "all is 0, the error too: %g", (double)error);
  drop(&p);
}

/* ---- bits ---- */

/* Hash of the weights after some steps on changing batches; `parts` micro-batches a step. */
static uint64_t train(const moe_config *c, const moe_train_config *config, int packed,
                      int32_t parts, const moe_env *env) {
  pair p = make(c, config, env);
  uint64_t hash = 0;
  int step;
  int32_t i, s;
  if (packed && moe_model_pack(p.model, NULL, env)) return 0;
  for (step = 0; step < 4; ++step) {
    models_random_batch(&trainer_batch, p.model, 24, 19, 50 + (uint64_t)step);
    for (i = 0; i < parts; ++i) {
      part.b.S = 0;
      for (s = 24 * i / parts; s < 24 * (i + 1) / parts; ++s)
        models_append(&part, &trainer_batch, s, c);
      if (moe_trainer_accumulate(p.trainer, &part.b, 24, NULL, NULL, env)) return 0;
    }
    if (moe_trainer_step(p.trainer, NULL, env)) return 0;
  }
  hash = models_hash(moe_model_weights(p.model), moe_model_parameters(p.model) * sizeof(float));
  drop(&p);
  return hash;
}

static void check_bits(int router) {
  static const int32_t threads[] = {1, 2, 3, 8};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config((moe_router)router, router ? 3 : 1, router ? 2 : 1);
  moe_train_config config = plain();
  uint64_t want;
  int isa;
  size_t i;
  config.dropout = 0.1f;
  config.jitter = router ? 0.1f : 0;
  config.balance = router ? 0.1f : 0;
  want = train(&c, &config, 0, 1, &env);
  CHECK(want, "%s", said);
  CHECK(train(&c, &config, 1, 1, &env) == want, "packed");
  for (isa = MOE_ISA_SCALAR; isa < MOE_ISA_COUNT; ++isa) {
    if (!moe_isa_available((moe_isa)isa)) continue;
    for (i = 0; i < sizeof threads / sizeof *threads; ++i) {
      moe_env e = models_env((moe_isa)isa);
      moe_pool *pool = NULL;
      uint64_t got;
      CHECK(moe_pool_create_exact(&pool, threads[i], &e) == MOE_OK, "%s", said);
      got = train(&c, &config, 1, 1, &e);
      moe_pool_free(pool);
      CHECK(got == want, "%s, %d threads: other bits", moe_isa_name((moe_isa)isa), threads[i]);
    }
  }
}

/* 240 tokens are two pieces or more. */
static void test_trainer_bits_do_not_depend_on_threads_isa_or_packing(void) {
  check_bits(MOE_ROUTER_TASK);
  check_bits(MOE_ROUTER_DENSE);
}

static void test_trainer_bits_do_not_depend_on_micro_batches(void) {
  static const int32_t parts[] = {2, 3, 5, 24};
  moe_env env = models_env(MOE_ISA_AUTO);
  int router;
  size_t i;
  for (router = 0; router < 3; ++router) {
    moe_config c = models_config((moe_router)router, router ? 3 : 1, router ? 2 : 1);
    moe_train_config config = plain();
    uint64_t want;
    config.dropout = 0.1f;
    config.jitter = router ? 0.1f : 0;
    want = train(&c, &config, 1, 1, &env);
    CHECK(want, "%s", said);
    for (i = 0; i < sizeof parts / sizeof *parts; ++i)
      CHECK(train(&c, &config, 1, parts[i], &env) == want,
            "router %d, %d micro-batches: other bits", router, parts[i]);
  }
}

/* With dropout, too: a sequence's random numbers go by its number in the whole batch. */
static void test_trainer_losses_do_not_depend_on_company(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  float together[MODELS_S], alone;
  pair p;
  int32_t s;
  config.dropout = 0.3f;
  config.jitter = 0.2f;
  p = make(&c, &config, &env);
  models_random_batch(&trainer_batch, p.model, 30, 19, 60);
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, together, &env) == MOE_OK,
        "%s", said);
  for (s = 0; s < 30; ++s) {
    part.b.S = 0;
    models_append(&part, &trainer_batch, s, &c);
    CHECK(moe_trainer_accumulate(p.trainer, &part.b, 30, NULL, &alone, &env) == MOE_OK, "%s", said);
    CHECK(!memcmp(&alone, &together[s], sizeof alone), "sequence %d: %g and %g", s, (double)alone,
          (double)together[s]);
  }
  drop(&p);
}

static void test_trainer_with_one_expert_equals_the_dense_one(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_train_config config = plain();
  pair p[3];
  int router, step;
  int32_t i;
  moe_tensor t, u;
  config.dropout = 0.1f;
  config.clip_norm = 0; /* the norm is summed by places in the flat array, and those differ */
  for (router = 0; router < 3; ++router) {
    moe_config c = models_config((moe_router)router, 1, 1);
    p[router] = make(&c, &config, &env);
    for (step = 0; step < 4; ++step) {
      models_random_batch(&trainer_batch, p[router].model, 20, 19, 70 + (uint64_t)step);
      CHECK(moe_trainer_accumulate(p[router].trainer, &trainer_batch.b, 0, NULL, NULL, &env) ==
                MOE_OK,
            "%s", said);
      CHECK(moe_trainer_step(p[router].trainer, NULL, &env) == MOE_OK, "%s", said);
    }
  }
  for (router = 1; router < 3; ++router)
    for (i = 0; i < moe_model_tensors(p[router].model); ++i) {
      char name[128], *skip;
      moe_model_tensor(p[router].model, i, &t);
      if (strstr(t.name, ".gate.")) continue;
      snprintf(name, sizeof name, "%s", t.name);
      skip = strstr(name, "experts.0.");
      if (skip) memmove(skip, skip + 10, strlen(skip + 10) + 1);
      CHECK(moe_model_tensor(p[0].model, moe_model_find_tensor(p[0].model, name), &u) == MOE_OK,
            "no tensor %s", name);
      CHECK(!memcmp(moe_model_weights(p[router].model) + t.offset,
                    moe_model_weights(p[0].model) + u.offset, t.count * sizeof(float)),
            "router %d: %s has other bits", router, t.name);
    }
  for (router = 0; router < 3; ++router) drop(&p[router]);
}

static void test_trainer_ignores_dirty_memory(void) {
  static const int dirt[] = {0, 0xff, 0x7f};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_train_config config = plain();
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  uint64_t hash[3];
  size_t bytes = 0;
  void *raw, *block;
  int i, step;
  config.dropout = 0.1f;
  models_tasks(trainer_tasks);
  for (i = 0; i < 3; ++i) {
    moe_model *model = models_create(&c, trainer_tasks, MODELS_TASKS, &env);
    moe_trainer *trainer = NULL;
    CHECK(moe_trainer_size(model, &limits, &config, &bytes, &env) == MOE_OK, "%s", said);
    block = models_block(&raw, bytes);
    memset(block, dirt[i], bytes);
    CHECK(moe_trainer_init(&trainer, block, bytes - 1, model, &limits, &config, &env) ==
                  MOE_E_MEMORY &&
              !trainer,
          "a byte less");
    CHECK(moe_trainer_init(&trainer, block, bytes, model, &limits, &config, &env) == MOE_OK, "%s",
          said);
    for (step = 0; step < 3; ++step) {
      models_random_batch(&trainer_batch, model, 20, 19, 80 + (uint64_t)step);
      CHECK(moe_trainer_accumulate(trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
            said);
      CHECK(moe_trainer_step(trainer, NULL, &env) == MOE_OK, "%s", said);
    }
    hash[i] = models_hash(moe_model_weights(model), moe_model_parameters(model) * sizeof(float));
    CHECK(hash[i] == hash[0], "filled with %d", dirt[i]);
    moe_trainer_free(trainer);
    free(raw);
    moe_model_free(model);
  }
}

/* ---- what may go wrong ---- */

/* The pass of the weights as they are is finite; one with a weight of a head changed by h is not.
   */
static void test_trainer_gradcheck_refuses_a_pass_that_is_not_finite(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  pair p = make(&c, &config, &env);
  size_t n = moe_model_parameters(p.model), i;
  const float *panels = p.model->panels;
  moe_tensor t;
  float error = 7;
  uint64_t before;
  int in_use;
  models_random_batch(&trainer_batch, p.model, 12, 9, 44);
  for (i = 0; i < 12; ++i) trainer_batch.task[i] = 2, trainer_batch.label[i] = 1;
  t = models_tensor(p.model, "heads.real.weight");
  memset(moe_model_weights(p.model) + t.offset, 0, t.count * sizeof(float));
  t = models_tensor(p.model, "encoder.layer.1.output.LayerNorm.weight");
  for (i = 0; i < t.count; ++i) moe_model_weights(p.model)[t.offset + i] = 1e23f;
  before = models_hash(moe_model_weights(p.model), n * sizeof(float));
  in_use = blocks_in_use;
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
        said);
  CHECK(moe_gradcheck(p.trainer, &trainer_batch.b, moe_model_tensors(p.model), &error, &env) ==
                MOE_E_NONFINITE &&
            strstr(said, "is not finite"),
        "%s", said);
  CHECK(error >= 7 && error <= 7, "the result is untouched");
  CHECK(models_hash(moe_model_weights(p.model), n * sizeof(float)) == before, "weights");
  for (i = 0; i < n; ++i)
    CHECK(p.trainer->g[i] >= 0 && p.trainer->g[i] <= 0, "gradient %zu is not cleared", i);
  CHECK(p.model->panels == panels && !p.trainer->context->forced && blocks_in_use == in_use,
        "routes, panels and memory are as before");
  drop(&p);
}

static void test_trainer_refuses_a_loss_that_is_not_finite(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  pair p = make(&c, &config, &env);
  size_t n = moe_model_parameters(p.model), i;
  float loss = 7, each[MODELS_S] = {7};
  moe_tensor t;
  uint64_t before;
  models_random_batch(&trainer_batch, p.model, 12, 9, 90);
  trainer_batch.task[3] = 2;
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
        said);
  t = models_tensor(p.model, "heads.real.bias");
  moe_model_weights(p.model)[t.offset] = 1e30f;
  before = models_hash(moe_model_weights(p.model), n * sizeof(float));
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, &loss, each, &env) ==
                MOE_E_NONFINITE &&
            strstr(said, "real"),
        "%s", said);
  CHECK(loss >= 7 && loss <= 7 && each[0] >= 7 && each[0] <= 7, "results are untouched");
  for (i = 0; i < n; ++i)
    CHECK(p.trainer->g[i] >= 0 && p.trainer->g[i] <= 0, "gradient %zu is not cleared", i);
  CHECK(models_hash(moe_model_weights(p.model), n * sizeof(float)) == before &&
            moe_trainer_steps_done(p.trainer) == 0,
        "weights are untouched");
  drop(&p);
}

static void test_trainer_refuses_a_gradient_that_is_not_finite(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  pair p = make(&c, &config, &env);
  size_t n = moe_model_parameters(p.model), i;
  uint64_t before[3];
  float norm = 7;
  models_random_batch(&trainer_batch, p.model, 12, 9, 91);
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK &&
            moe_trainer_step(p.trainer, NULL, &env) == MOE_OK,
        "%s", said);
  before[0] = models_hash(p.trainer->m, n * sizeof(float));
  before[1] = models_hash(p.trainer->v, n * sizeof(float));
  before[2] = models_hash(p.model->weights, n * sizeof(float));
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
        said);
  moe_trainer_gradients(p.trainer)[n - 1] = NAN;
  CHECK(moe_trainer_step(p.trainer, &norm, &env) == MOE_E_NONFINITE && strstr(said, "step 2"), "%s",
        said);
  CHECK(norm >= 7 && norm <= 7 && moe_trainer_steps_done(p.trainer) == 1, "results are untouched");
  CHECK(before[0] == models_hash(p.trainer->m, n * sizeof(float)) &&
            before[1] == models_hash(p.trainer->v, n * sizeof(float)),
        "moments");
  CHECK(before[2] == models_hash(p.model->weights, n * sizeof(float)), "weights");
  for (i = 0; i < n; ++i)
    CHECK(p.trainer->g[i] >= 0 && p.trainer->g[i] <= 0, "gradient %zu is not cleared", i);
  drop(&p);
}

static void test_trainer_ends_with_its_schedule(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_DENSE, 1, 1);
  moe_train_config config = plain();
  pair p;
  int step;
  config.steps = 3;
  p = make(&c, &config, &env);
  models_random_batch(&trainer_batch, p.model, 12, 9, 92);
  for (step = 0; step < 4; ++step) {
    CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
          said);
    CHECK(moe_trainer_step(p.trainer, NULL, &env) == (step < 3 ? MOE_OK : MOE_E_ARGUMENT),
          "step %d: %s", step + 1, said);
  }
  CHECK(moe_trainer_steps_done(p.trainer) == 3 && strstr(said, "3 steps"), "%s", said);
  drop(&p);
}

static float halved(void *user, int64_t t) {
  ++*(int *)user;
  return t == 4 ? -1.0f : t == 5 ? NAN : 1e-2f / (float)(1 << t);
}

/* The rate of a step comes from moe_trainer_set_lr, else lr_schedule, else lr and warmup; the same
   rates give the same bits. */
static void test_trainer_takes_rates_of_the_callers(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  pair p[2];
  int step, k, asked = 0;
  uint64_t before;
  size_t bytes;
  config.steps = 9;
  p[0] = make(&c, &config, &env);
  CHECK(moe_trainer_lr(p[0].trainer) == moe_train_lr(&config, 1), "the schedule's rate");
  config.lr_schedule = halved;
  config.lr_user = &asked;
  p[1] = make(&c, &config, &env);
  bytes = moe_model_parameters(p[0].model) * sizeof(float);
  for (step = 1; step <= 3; ++step) {
    CHECK(!moe_trainer_set_lr(p[0].trainer, 1e-2f / (float)(1 << step), &env), "%s", said);
    CHECK(moe_trainer_lr(p[0].trainer) == moe_trainer_lr(p[1].trainer), "step %d", step);
    for (k = 0; k < 2; ++k) {
      models_random_batch(&trainer_batch, p[k].model, 12, 9, 90 + (uint64_t)step);
      CHECK(!moe_trainer_accumulate(p[k].trainer, &trainer_batch.b, 0, NULL, NULL, &env) &&
                !moe_trainer_step(p[k].trainer, NULL, &env),
            "%s", said);
    }
    CHECK(!memcmp(p[0].model->weights, p[1].model->weights, bytes), "step %d", step);
  }
  CHECK(asked > 3, "the function is asked");
  /* rates that are no rates */
  before = models_hash(p[1].model->weights, bytes);
  models_random_batch(&trainer_batch, p[1].model, 12, 9, 95);
  CHECK(!moe_trainer_accumulate(p[1].trainer, &trainer_batch.b, 0, NULL, NULL, &env), "%s", said);
  CHECK(moe_trainer_step(p[1].trainer, NULL, &env) == MOE_E_ARGUMENT &&
            strstr(said, "step 4: lr_schedule returned -1"),
        "%s", said);
  CHECK(moe_trainer_steps_done(p[1].trainer) == 3 &&
            before == models_hash(p[1].model->weights, bytes),
        "nothing is changed");
  CHECK(!moe_trainer_set_lr(p[1].trainer, 0, &env) && moe_trainer_lr(p[1].trainer) == 0,
        "rate 0: %s", said);
  CHECK(!moe_trainer_step(p[1].trainer, NULL, &env) &&
            before == models_hash(p[1].model->weights, bytes),
        "a step at rate 0: %s", said);
  CHECK(!moe_trainer_set_lr(p[1].trainer, -1, &env), "%s", said);
  CHECK(moe_trainer_step(p[1].trainer, NULL, &env) == MOE_E_ARGUMENT &&
            strstr(said, "returned nan"),
        "%s", said);
  CHECK(moe_trainer_set_lr(p[1].trainer, NAN, &env) == MOE_E_ARGUMENT &&
            moe_trainer_set_lr(p[1].trainer, INFINITY, &env) == MOE_E_ARGUMENT,
        "%s", said);
  /* the schedule again */
  CHECK(!moe_trainer_set_lr(p[0].trainer, -0.5f, &env), "%s", said);
  config.lr_schedule = NULL;
  CHECK(moe_trainer_lr(p[0].trainer) == moe_train_lr(&config, 4), "the schedule's rate of step 4");
  drop(&p[0]);
  drop(&p[1]);
}

static void test_trainer_checks_what_it_is_given(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain(), bad = config;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  pair p = make(&c, &config, &env);
  moe_trainer *trainer = NULL;
  moe_model *in_place = NULL;
  size_t bytes = 0;
  void *raw, *block;
  bad.dropout = 1;
  CHECK(moe_trainer_create(&trainer, p.model, &limits, &bad, &env) == MOE_E_ARGUMENT && !trainer &&
            strstr(said, "dropout"),
        "%s", said);
  limits.tokens = 0;
  CHECK(moe_trainer_create(&trainer, p.model, &limits, &config, &env) == MOE_E_ARGUMENT && !trainer,
        "%s", said);
  limits.tokens = MODELS_M;
  models_random_batch(&trainer_batch, p.model, 12, 9, 93);
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 11, NULL, NULL, &env) ==
                MOE_E_ARGUMENT &&
            strstr(said, "11"),
        "%s", said);
  trainer_batch.b.label = NULL;
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) ==
                MOE_E_ARGUMENT &&
            strstr(said, "label"),
        "%s", said);
  /* weights that stay in the bytes of a file */
  models_tasks(trainer_tasks);
  CHECK(moe__model_bytes(&bytes, &c, trainer_tasks, MODELS_TASKS, 0, 1, &env) == MOE_OK, "%s",
        said);
  block = models_block(&raw, bytes);
  CHECK(moe__model_place(&in_place, block, bytes, &c, trainer_tasks, MODELS_TASKS, 0,
                         p.model->weights, &env) == MOE_OK,
        "%s", said);
  CHECK(!moe_model_weights(in_place), "no pointer to write through");
  CHECK(moe_trainer_create(&trainer, in_place, &limits, &config, &env) == MOE_E_ARGUMENT &&
            !trainer && strstr(said, "trained"),
        "%s", said);
  moe_model_free(in_place);
  free(raw);
  drop(&p);
}

static void test_trainer_takes_an_empty_batch_and_size_1(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 1, 1);
  moe_train_config config = plain();
  moe_batch none;
  float loss = 7;
  int step;
  pair p;
  c.layers = c.hidden = c.ffn = c.heads = c.vocab = c.positions = c.max_len = c.segments = 1;
  memset(&none, 0, sizeof none);
  p = make(&c, &config, &env);
  CHECK(p.trainer, "%s", said);
  CHECK(moe_trainer_accumulate(p.trainer, &none, 0, &loss, NULL, &env) == MOE_OK && loss >= 0 &&
            loss <= 0,
        "%s", said);
  CHECK(moe_trainer_step(p.trainer, NULL, &env) == MOE_OK, "%s", said);
  for (step = 0; step < 3; ++step) {
    models_random_batch(&trainer_batch, p.model, 9, 1, 94);
    CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, &loss, NULL, &env) == MOE_OK &&
              moe__is_finite(loss),
          "%s", said);
    CHECK(moe_trainer_step(p.trainer, NULL, &env) == MOE_OK, "%s", said);
  }
  drop(&p);
}

static void test_trainer_freezes_and_speeds_up_groups(void) {
  static const moe_param_group groups[] = {
      {"embeddings", 0, 1}, {"gate", 10, 0}, {"word_embeddings", 1, 1}};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  pair p;
  float *before;
  int32_t i;
  config.groups = groups;
  config.n_groups = 3;
  config.warmup = 0;
  p = make(&c, &config, &env);
  before = (float *)malloc(moe_model_parameters(p.model) * sizeof(float));
  memcpy(before, p.model->weights, moe_model_parameters(p.model) * sizeof(float));
  models_random_batch(&trainer_batch, p.model, 30, 19, 95);
  CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK &&
            moe_trainer_step(p.trainer, NULL, &env) == MOE_OK,
        "%s", said);
  for (i = 0; i < moe_model_tensors(p.model); ++i) {
    moe_tensor t;
    double most = 0, want;
    size_t j;
    moe_model_tensor(p.model, i, &t);
    for (j = t.offset; j < t.offset + t.count; ++j) {
      double moved = fabs((double)p.model->weights[j] - (double)before[j]);
      if (moved > most) most = moved;
    }
    want = strstr(t.name, "gate")                                     ? 1e-2
           : strstr(t.name, "embeddings") && !strstr(t.name, "word_") ? 0
                                                                      : 1e-3;
    if (strstr(t.name, "key.bias")) continue;
    CHECK(fabs(most - want) <= 0.02 * want, "%s moved by %g", t.name, most);
  }
  free(before);
  drop(&p);
}

/* Forward, backward and update allocate nothing; whatever allocation fails, there is a status, a
   sentence and no leak. */
static void test_trainer_allocates_nothing_after_creation(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_train_config config = plain();
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context = NULL;
  moe_pool *pool = NULL;
  pair p;
  float scores[3 * MODELS_S];
  int step, before, blocks = blocks_in_use;
  config.dropout = 0.1f;
  CHECK(moe_pool_create_exact(&pool, 2, &env) == MOE_OK, "%s", said);
  p = make(&c, &config, &env);
  CHECK(p.trainer && moe_model_pack(p.model, NULL, &env) == MOE_OK, "%s", said);
  CHECK(moe_context_create(&context, p.model, &limits, &env) == MOE_OK, "%s", said);
  models_random_batch(&trainer_batch, p.model, 30, 19, 96);
  before = allocations;
  for (step = 0; step < 3; ++step) {
    CHECK(moe_forward(context, scores, &trainer_batch.b, &env) == MOE_OK, "%s", said);
    CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
          said);
    CHECK(moe_trainer_step(p.trainer, NULL, &env) == MOE_OK, "%s", said);
  }
  CHECK(allocations == before, "%d allocations", allocations - before);
  moe_context_free(context);
  drop(&p);
  moe_pool_free(pool);
  CHECK(blocks_in_use == blocks, "%d blocks are left", blocks_in_use - blocks);
}

static void test_trainer_survives_every_failed_allocation(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  int n, blocks = blocks_in_use, failed = 0;
  models_tasks(trainer_tasks);
  for (n = 0; n < 6; ++n) {
    moe_model *model = NULL;
    moe_trainer *trainer = NULL;
    float error;
    moe_status status;
    fail_at = allocations + n;
    said[0] = 0;
    status = moe_model_create(&model, &c, trainer_tasks, MODELS_TASKS, 1, &env);
    if (!status) status = moe_model_set_vocab(model, "abc", 3, &env);
    if (!status) status = moe_model_pack(model, NULL, &env);
    if (!status) status = moe_trainer_create(&trainer, model, &limits, &config, &env);
    if (!status) {
      models_random_batch(&trainer_batch, model, 2, 3, 97);
      status = moe_gradcheck(trainer, &trainer_batch.b, 2, &error, &env);
    }
    fail_at = -1;
    CHECK(status == (n < 5 ? MOE_E_MEMORY : MOE_OK), "allocation %d: status %d", n, (int)status);
    CHECK(!status == !said[0], "allocation %d: '%s'", n, said);
    failed += status != MOE_OK;
    moe_trainer_free(trainer);
    moe_model_free(model);
    CHECK(blocks_in_use == blocks, "allocation %d: %d blocks are left", n, blocks_in_use - blocks);
  }
  CHECK(failed == 5, "%d allocations failed", failed);
}

/* The same of a context, of models made from a model, and of a packed copy of the other precision.
 */
static void test_trainer_copies_of_a_model_survive_every_failed_allocation(void) {
  static const int32_t keep[] = {3, 0};
  static const uint8_t off[2][3] = {{0, 1, 0}, {1, 0, 0}};
  moe_env env = models_env(MOE_ISA_AUTO), bf16 = env;
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_task more;
  moe_model *model;
  int n, done = 0, failed = 0, blocks = blocks_in_use, kept;
  bf16.precision = MOE_TYPE_BF16;
  c.hidden = c.ffn = 16;
  models_tasks(trainer_tasks);
  more = trainer_tasks[0];
  strcpy(more.name, "more");
  model = models_create(&c, trainer_tasks, MODELS_TASKS, &env);
  CHECK(model && !moe_model_set_vocab(model, "abc", 3, &env) && !moe_model_pack(model, NULL, &env),
        "%s", said);
  kept = blocks_in_use;
  for (n = 0; n < 40 && !done; ++n) {
    moe_model *copy[3] = {NULL, NULL, NULL};
    moe_context *context = NULL;
    moe_status status;
    int i;
    fail_at = allocations + n;
    said[0] = 0;
    status = moe_context_create(&context, model, &limits, &env);
    if (!status) status = moe_model_quantize(&copy[0], model, &env);
    if (!status) status = moe_model_adapt(&copy[1], model, &more, 1, 7, &env);
    if (!status) status = moe_model_extract(&copy[2], model, keep, 2, off[0], &env);
    if (!status) status = moe_model_pack(copy[2], NULL, &bf16);
    if (!status) status = moe__model_pack_back(copy[2], &bf16);
    if (!status) status = moe_model_pack(copy[2], NULL, &env);
    fail_at = -1;
    done = status == MOE_OK;
    failed += !done;
    CHECK(done || status == MOE_E_MEMORY, "allocation %d: status %d", n, (int)status);
    CHECK(done == !said[0], "allocation %d: '%s'", n, said);
    if (copy[2]) {
      moe_context *other = NULL;
      float scores[3 * MODELS_S];
      models_random_batch(&trainer_batch, copy[2], 5, 9, 98);
      CHECK(!moe_context_create(&other, copy[2], &limits, &env) &&
                !moe_forward(other, scores, &trainer_batch.b, &env),
            "%s", said);
      moe_context_free(other);
    }
    moe_context_free(context);
    for (i = 0; i < 3; ++i) moe_model_free(copy[i]);
    CHECK(blocks_in_use == kept, "allocation %d: %d blocks are left", n, blocks_in_use - kept);
  }
  CHECK(done && failed >= 10, "%d allocations failed", failed);
  moe_model_free(model);
  CHECK(blocks_in_use == blocks, "%d blocks are left", blocks_in_use - blocks);
}

/* What the cut into micro-batches changes: losses that are means over the tokens of a micro-batch,
   and the last bits of gates made of task vectors; nothing else. */
/* Reading and writing files: out of memory is a status and a sentence, and the files stay. */
static void test_trainer_files_survive_every_failed_allocation(void) {
  const char *path = "build/alloc_model", *checkpoint = "build/alloc_checkpoint";
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config config = plain();
  pair p = make(&c, &config, &env);
  void *before, *after;
  size_t bytes, again;
  int n, done = 0, kept;
  CHECK(!moe_model_set_vocab(p.model, "abc", 3, &env) && !moe_model_save(p.model, path, &env) &&
            !moe_checkpoint_save(p.trainer, NULL, "note", checkpoint, &env) &&
            !moe_file_read(&before, &bytes, path, &env),
        "%s", said);
  kept = blocks_in_use;
  for (n = 0; n < 80 && !done; ++n) {
    moe_model *model = NULL;
    moe_lock *lock = NULL;
    moe_status status;
    char note[8] = "";
    size_t length;
    fail_at = allocations + n;
    said[0] = 0;
    after = NULL;
    status = moe_file_read(&after, &again, path, &env);
    if (!status) status = moe_checkpoint_note(note, sizeof note, &length, after, again, &env);
    if (status == MOE_E_FORMAT && strstr(said, "not a checkpoint")) status = MOE_OK, said[0] = 0;
    moe_free(after);
    if (!status) status = moe_model_load(&model, path, &env);
    if (!status) status = moe_model_save(model, path, &env);
    if (!status) status = moe_checkpoint_load(p.trainer, NULL, checkpoint, &env);
    if (!status) status = moe_checkpoint_save(p.trainer, NULL, "note", checkpoint, &env);
    if (!status) status = moe_file_lock(&lock, checkpoint, &env);
    moe_file_unlock(lock);
    moe_model_free(model);
    done = status == MOE_OK && allocations <= fail_at; /* loading has another way without one */
    fail_at = -1;
    CHECK(status == MOE_OK || status == MOE_E_MEMORY, "allocation %d: status %d, %s", n,
          (int)status, said);
    CHECK((status == MOE_OK) == !said[0], "allocation %d: '%s'", n, said);
    CHECK(blocks_in_use == kept, "allocation %d: %d blocks are left", n, blocks_in_use - kept);
    CHECK(!moe_file_read(&after, &again, path, &env) && bytes == again &&
              !memcmp(before, after, bytes),
          "allocation %d: the file", n);
    moe_free(after);
  }
  CHECK(done && n > 10, "%d allocations", n);
  moe_free(before);
  drop(&p);
  remove(path);
  remove(checkpoint);
}

static void test_trainer_micro_batches_change_what_the_header_says(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int what;
  for (what = 0; what < 3; ++what) {
    moe_config c = models_config(what == 2 ? MOE_ROUTER_EMBEDDING : MOE_ROUTER_TASK, 3, 1);
    moe_train_config config = plain();
    pair p[2];
    size_t i, n;
    double worst_error = 0, least = 1e9;
    int k, s;
    config.balance = what == 0 ? 0.1f : 0;
    config.z_loss = what == 1 ? 0.1f : 0;
    for (k = 0; k < 2; ++k) {
      p[k] = make(&c, &config, &env);
      models_random_batch(&trainer_batch, p[k].model, 24, 19, 50);
      for (s = 0; s < 24; s += k ? 8 : 24) {
        int32_t j;
        part.b.S = 0;
        for (j = s; j < s + (k ? 8 : 24); ++j) models_append(&part, &trainer_batch, j, &c);
        CHECK(!moe_trainer_accumulate(p[k].trainer, &part.b, 24, NULL, NULL, &env), "%s", said);
      }
    }
    n = moe_model_parameters(p[0].model);
    for (i = 0; i < n; ++i) {
      double error = fabs((double)p[0].trainer->g[i] - (double)p[1].trainer->g[i]);
      if (error > worst_error) worst_error = error;
    }
    for (k = 0; k < moe_model_tensors(p[0].model) && what == 2; ++k) {
      moe_tensor t;
      moe_model_tensor(p[0].model, k, &t);
      if (strstr(t.name, ".gate.") || !strcmp(t.name, "tasks.vectors")) continue;
      CHECK(!memcmp(p[0].trainer->g + t.offset, p[1].trainer->g + t.offset, 4 * t.count),
            "%s differs", t.name);
    }
    least = what == 2 ? 1e-12 : 1e-5;
    CHECK(worst_error > least && worst_error < (what == 2 ? 1e-6 : 1e-1), "%d: differ by %g", what,
          worst_error);
    drop(&p[0]);
    drop(&p[1]);
  }
}

static void test_trainer_learns(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int router, step;
  for (router = 0; router < 3; ++router) {
    moe_config c = models_config((moe_router)router, router ? 3 : 1, 1);
    moe_train_config config = plain();
    float first = 0, last = 0;
    pair p;
    config.steps = 60;
    config.lr = 3e-3f;
    p = make(&c, &config, &env);
    models_random_batch(&trainer_batch, p.model, 30, 19, 98);
    for (step = 0; step < 60; ++step) {
      CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, step ? &last : &first, NULL,
                                   &env) == MOE_OK,
            "%s", said);
      CHECK(moe_trainer_step(p.trainer, NULL, &env) == MOE_OK, "%s", said);
    }
    CHECK(last < 0.3f * first, "router %d: loss from %g to %g", router, (double)first,
          (double)last);
    drop(&p);
  }
}

/* What ready was called with: the ranges in their order, and copies of the gradients then. */
typedef struct told {
  moe_trainer *trainer;
  float *seen;
  unsigned char *times;
  size_t first[8], count[8], total;
  int ranges;
} told;

static void tell(void *user, size_t first, size_t count) {
  told *t = (told *)user;
  size_t i;
  CHECK(t->ranges < 8 && first <= t->total && count <= t->total - first, "range %d: %zu from %zu",
        t->ranges, count, first);
  t->first[t->ranges] = first;
  t->count[t->ranges++] = count;
  for (i = first; i < first + count; ++i) {
    t->seen[i] = moe_trainer_gradients(t->trainer)[i];
    ++t->times[i];
  }
}

static void test_trainer_says_once_which_gradients_are_ready(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int router;
  for (router = MOE_ROUTER_DENSE; router <= MOE_ROUTER_TASK_LEVEL; ++router) {
    moe_config c = models_config((moe_router)router, router ? 3 : 1, 1);
    moe_train_config config = plain();
    moe_batch none;
    told t, empty;
    size_t i, bad = 0;
    pair p;
    if (router == MOE_ROUTER_TASK_LEVEL) c.unit = MOE_UNIT_BLOCK, c.selection = MOE_SELECT_SOFTMAX;
    memset(&none, 0, sizeof none);
    memset(&t, 0, sizeof t);
    config.ready = tell, config.ready_user = &t;
    p = make(&c, &config, &env);
    CHECK(p.trainer, "router %d: %s", router, said);
    t.total = moe_model_parameters(p.model);
    t.trainer = p.trainer;
    t.seen = (float *)calloc(t.total, sizeof *t.seen);
    t.times = (unsigned char *)calloc(t.total, 1);
    CHECK(t.seen && t.times, "no memory");
    CHECK(moe_trainer_accumulate(p.trainer, &none, 1, NULL, NULL, &env) == MOE_OK, "%s", said);
    empty = t;
    t.ranges = 0;
    memset(t.times, 0, t.total);
    models_random_batch(&trainer_batch, p.model, 30, 19, 99);
    CHECK(moe_trainer_accumulate(p.trainer, &trainer_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
          said);
    for (i = 0; i < t.total; ++i)
      bad += t.times[i] != 1 || memcmp(&t.seen[i], moe_trainer_gradients(p.trainer) + i, 4) != 0;
    CHECK(!bad, "router %d: %zu of %zu gradients not told once, or changed later", router, bad,
          t.total);
    CHECK(t.ranges == 4 && t.first[1] < t.first[0] && t.first[2] == 0, "%d ranges", t.ranges);
    CHECK(t.ranges == empty.ranges && !memcmp(t.first, empty.first, sizeof t.first) &&
              !memcmp(t.count, empty.count, sizeof t.count),
          "router %d: other ranges of an empty batch", router);
    free(t.seen), free(t.times);
    drop(&p);
  }
}

static void run_trainer(void) {
  RUN(test_trainer_gradients_match_pytorch);
  RUN(test_trainer_20_steps_match_pytorch);
  RUN(test_trainer_gradients_match_differences);
  RUN(test_trainer_weights_are_those_of_cross_entropy_loss);
  RUN(test_trainer_gradcheck_finds_a_wrong_gradient);
  RUN(test_trainer_gradcheck_tells_the_worst_error);
  RUN(test_trainer_gradcheck_refuses_a_pass_that_is_not_finite);
  RUN(test_trainer_bits_do_not_depend_on_threads_isa_or_packing);
  RUN(test_trainer_bits_do_not_depend_on_micro_batches);
  RUN(test_trainer_losses_do_not_depend_on_company);
  RUN(test_trainer_with_one_expert_equals_the_dense_one);
  RUN(test_trainer_ignores_dirty_memory);
  RUN(test_trainer_refuses_a_loss_that_is_not_finite);
  RUN(test_trainer_refuses_a_gradient_that_is_not_finite);
  RUN(test_trainer_ends_with_its_schedule);
  RUN(test_trainer_takes_rates_of_the_callers);
  RUN(test_trainer_checks_what_it_is_given);
  RUN(test_trainer_takes_an_empty_batch_and_size_1);
  RUN(test_trainer_freezes_and_speeds_up_groups);
  RUN(test_trainer_allocates_nothing_after_creation);
  RUN(test_trainer_survives_every_failed_allocation);
  RUN(test_trainer_copies_of_a_model_survive_every_failed_allocation);
  RUN(test_trainer_files_survive_every_failed_allocation);
  RUN(test_trainer_micro_batches_change_what_the_header_says);
  RUN(test_trainer_learns);
  RUN(test_trainer_says_once_which_gradients_are_ready);
}
