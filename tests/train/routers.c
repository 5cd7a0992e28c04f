/* examples/tools/routers.h: the LSTM and the Transformer router against PyTorch and differences,
   alone and in front of a model. */
#include "../examples/tools/routers.h"
#include "golden/routers.h"

enum { T = 3, L = 4, M = 3, V = 8, CHOICES = T * L * M };

static models_batch routers_batch;

/* Weights by the names of the tensors, as golden/routers.h says. */
static task_router *golden_router(router_kind kind, const moe_env *env) {
  task_router *r = router_create(kind, T, L, M, V, 1, env);
  int32_t k;
  size_t i;
  for (k = 0; r && k < r->n_tensors; ++k) {
    const router_tensor *t = &r->tensor[k];
    golden_fill(r->w + t->offset, t->count, t->name, k <= R_LAYERS ? 1.0f : 0.25f);
    for (i = 0; i < t->count && !strncmp(t->name, "norm", 4) && strstr(t->name, "weight"); ++i)
      r->w[t->offset + i] += 1;
  }
  return r;
}

static void check_golden(router_kind kind, const double *scores, const golden_number *norms,
                         const golden_number *probes, int32_t count) {
  static float probe[4 * ROUTER_E * ROUTER_F];
  moe_env env = models_env(MOE_ISA_AUTO);
  task_router *r = golden_router(kind, &env);
  int32_t i, k;
  CHECK(r && r->n_tensors == count, "%d tensors", (int)count);
  router_forward(r, &env);
  for (i = 0; i < CHOICES; ++i) CHECK_NEAR(r->scores[i], scores[i], 2e-6);
  golden_fill(r->dscores, CHOICES, "probe", 1);
  router_backward(r, &env);
  for (k = 0; k < count; ++k) {
    const router_tensor *t = &r->tensor[k];
    double norm = 0, sum = 0;
    size_t j;
    CHECK(!strcmp(t->name, norms[k].name), "%s against %s", t->name, norms[k].name);
    golden_fill(probe, t->count, t->name, 1);
    for (j = 0; j < t->count; ++j) {
      norm += (double)r->dw[t->offset + j] * (double)r->dw[t->offset + j];
      sum += (double)r->dw[t->offset + j] * (double)probe[j];
    }
    norm = sqrt(norm);
    CHECK(fabs(norm - norms[k].value) < 1e-5 * (1 + norm), "%s: norm %.9g, PyTorch %.9g", t->name,
          norm, norms[k].value);
    CHECK(fabs(sum - probes[k].value) < 1e-5 * (1 + norm), "%s: probe %.9g, PyTorch %.9g", t->name,
          sum, probes[k].value);
  }
  for (i = 0; i < CHOICES; ++i) CHECK_NEAR(r->dscores[i], 0, 0);
  router_free(r);
}

static void test_routers_lstm_equals_pytorch(void) {
  check_golden(ROUTER_LSTM, routers_lstm_scores, routers_lstm_norms, routers_lstm_probes,
               ROUTER_LSTM_TENSORS);
}

static void test_routers_transformer_equals_pytorch(void) {
  check_golden(ROUTER_TRANSFORMER, routers_transformer_scores, routers_transformer_norms,
               routers_transformer_probes, ROUTER_TENSORS);
}

static double probe_of(task_router *r, const moe_env *env) {
  static float probe[CHOICES];
  double sum = 0;
  int32_t i;
  golden_fill(probe, CHOICES, "probe", 1);
  router_forward(r, env);
  for (i = 0; i < CHOICES; ++i) sum += (double)probe[i] * (double)r->scores[i];
  return sum;
}

/* (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h for the largest gradient of each tensor and two
   others. */
static void test_routers_gradients_equal_differences(void) {
  static const float shift[] = {1, -1, 2, -2};
  moe_env env = models_env(MOE_ISA_AUTO);
  int kind, k, pick, i;
  for (kind = 0; kind < 2; ++kind) {
    task_router *r = golden_router((router_kind)kind, &env);
    CHECK(r, "memory");
    router_forward(r, &env);
    golden_fill(r->dscores, CHOICES, "probe", 1);
    router_backward(r, &env);
    for (k = 0; k < r->n_tensors; ++k)
      for (pick = 0; pick < 3; ++pick) {
        const router_tensor *t = &r->tensor[k];
        size_t at = (size_t)pick * t->count / 3, j;
        float *w = r->w + t->offset, keep;
        double f[4], slope, norm = 0;
        for (j = 0; j < t->count; ++j) {
          norm += (double)r->dw[t->offset + j] * (double)r->dw[t->offset + j];
          if (!pick && fabsf(r->dw[t->offset + j]) > fabsf(r->dw[t->offset + at])) at = j;
        }
        keep = w[at];
        for (i = 0; i < 4; ++i) {
          w[at] = keep + shift[i] / 64;
          f[i] = probe_of(r, &env);
        }
        w[at] = keep;
        slope = (8 * (f[0] - f[1]) - (f[2] - f[3])) / 12 * 64;
        CHECK(fabs(slope - (double)r->dw[t->offset + at]) < 2e-3 * (0.05 + sqrt(norm)),
              "%s[%d]: %g, by differences %g", t->name, (int)at, (double)r->dw[t->offset + at],
              slope);
      }
    router_free(r);
  }
}

static moe_config level_config(void) {
  moe_config c = models_config(MOE_ROUTER_TASK_LEVEL, M, 1);
  c.unit = MOE_UNIT_BLOCK;
  c.selection = MOE_SELECT_SOFTMAX;
  return c;
}

/* Through the whole model: the slope of its loss by a number in the router is what router_backward
   says. */
static void test_routers_carry_the_gradient_of_a_model(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = level_config();
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_task tasks[MODELS_TASKS];
  moe_train_config config;
  int kind, k, i;
  moe_train_config_init(&config);
  config.steps = 1;
  config.dropout = 0;
  models_tasks(tasks);
  for (kind = 0; kind < 2; ++kind) {
    moe_model *model = models_create(&c, tasks, MODELS_TASKS, &env);
    moe_trainer *trainer = NULL;
    task_router *r = router_create((router_kind)kind, MODELS_TASKS, c.layers, M, V, 3, &env);
    moe_task_router level = {NULL, NULL, NULL, NULL};
    CHECK(model && r && !moe_trainer_create(&trainer, model, &limits, &config, &env), "%s", said);
    models_random_batch(&routers_batch, model, 24, 6, 5);
    level.scores = r->scores;
    level.dscores = r->dscores;
    CHECK(!moe_context_task_router(moe_trainer_context(trainer), &level, &env), "%s", said);
    router_forward(r, &env);
    CHECK(!moe_trainer_accumulate(trainer, &routers_batch.b, 0, NULL, NULL, &env), "%s", said);
    router_backward(r, &env);
    for (k = 0; k < r->n_tensors; ++k) {
      const router_tensor *t = &r->tensor[k];
      size_t at = 0, j;
      float keep, loss[2];
      double slope;
      for (j = 0; j < t->count; ++j)
        if (fabsf(r->dw[t->offset + j]) > fabsf(r->dw[t->offset + at])) at = j;
      keep = r->w[t->offset + at];
      for (i = 0; i < 2; ++i) {
        r->w[t->offset + at] = keep + (i ? -0.02f : 0.02f);
        router_forward(r, &env);
        CHECK(!moe_trainer_accumulate(trainer, &routers_batch.b, 0, &loss[i], NULL, &env), "%s",
              said);
      }
      r->w[t->offset + at] = keep;
      slope = ((double)loss[0] - (double)loss[1]) / 0.04;
      CHECK(fabs(slope - (double)r->dw[t->offset + at]) < 2e-3 + 0.03 * fabs(slope),
            "%s[%d]: %g, by differences %g", t->name, (int)at, (double)r->dw[t->offset + at],
            slope);
    }
    router_free(r);
    moe_trainer_free(trainer);
    moe_model_free(model);
  }
}

/* Every task is to take another block in every layer: the routers learn it, and a frozen part
   stays. */
static void test_routers_learn_routes(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int kind, step, i;
  for (kind = 0; kind < 2; ++kind) {
    task_router *r = router_create((router_kind)kind, T, L, M, V, 7, &env);
    float vector, prob[M], keep;
    CHECK(r, "memory");
    vector = r->w[0];
    for (step = 0; step < 150; ++step) {
      router_forward(r, &env);
      for (i = 0; i < T * L; ++i) {
        moe_cross_entropy_forward(prob, r->scores + i * M, (i / L + i % L) % M, M);
        moe_cross_entropy_backward(r->dscores + i * M, prob, (i / L + i % L) % M, 1, M);
      }
      router_backward(r, &env);
      CHECK(!router_update(r, step < 75 ? 0 : 1e-2f, 1e-2f, 0.01f, 1, &env), "step %d", step);
      if (step == 74) CHECK_NEAR(r->w[0], vector, 0);
    }
    CHECK(fabsf(r->w[0] - vector) > 0, "the vectors learn when they may");
    router_forward(r, &env);
    for (i = 0; i < T * L; ++i) {
      moe_cross_entropy_forward(prob, r->scores + i * M, 0, M);
      CHECK(prob[(i / L + i % L) % M] > 0.9f, "task %d layer %d: %g", i / L, i % L,
            (double)prob[(i / L + i % L) % M]);
    }
    keep = r->w[r->n - 1];
    r->dw[3] = NAN;
    CHECK(router_update(r, 1e-2f, 1e-2f, 0, 1, &env) == -1 && r->dw[3] == 0, "NaN");
    CHECK_NEAR(r->w[r->n - 1], keep, 0);
    router_free(r);
  }
}

/* A task's scores do not depend on how many others there are. */
static void test_routers_tasks_do_not_know_each_other(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int kind, i;
  for (kind = 0; kind < 2; ++kind) {
    task_router *all = golden_router((router_kind)kind, &env),
                *one = router_create((router_kind)kind, 1, L, M, V, 1, &env);
    CHECK(all && one, "memory");
    memcpy(one->w, all->w + 2 * V, V * sizeof(float));
    memcpy(one->w + V, all->w + T * V, (one->n - V) * sizeof(float));
    router_forward(all, &env);
    router_forward(one, &env);
    for (i = 0; i < L * M; ++i) CHECK_NEAR(one->scores[i], all->scores[2 * L * M + i], 1e-6);
    router_free(all);
    router_free(one);
  }
}

static void run_routers(void) {
  RUN(test_routers_lstm_equals_pytorch);
  RUN(test_routers_transformer_equals_pytorch);
  RUN(test_routers_gradients_equal_differences);
  RUN(test_routers_carry_the_gradient_of_a_model);
  RUN(test_routers_learn_routes);
  RUN(test_routers_tasks_do_not_know_each_other);
}
