/* moe_model_adapt and moe_model_extract: what stays has the same bits, what is new comes from where
   it should. */

static moe_task adapt_tasks[MODELS_TASKS], adapt_extra;

static void adapt_begin(void) {
  models_tasks(adapt_tasks);
  adapt_extra = adapt_tasks[1];
  snprintf(adapt_extra.name, sizeof adapt_extra.name, "more");
}

/* Scores of a batch; task numbers go through `map` where it is given. */
static void adapt_scores(float *scores, const moe_model *model, const models_batch *batch,
                         const int32_t *map) {
  models_batch b = *batch;
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context = NULL;
  int32_t s;
  models_connect(&b, moe_model_config(model), batch->b.S);
  for (s = 0; s < b.b.S && map; ++s) b.task[s] = map[b.task[s]];
  CHECK(!moe_context_create(&context, model, &limits, &env), "%s", said);
  CHECK(!moe_forward(context, scores, &b.b, &env), "%s", said);
  moe_context_free(context);
}

static const float *adapt_tensor(moe_model *model, const char *name, size_t *count) {
  moe_tensor t;
  int32_t i = moe_model_find_tensor(model, name);
  if (i < 0 || moe_model_tensor(model, i, &t)) return NULL;
  *count = t.count;
  return moe_model_weights(model) + t.offset;
}

static void test_adapt_keeps_the_others(void) {
  static float before[MODELS_S * 8], after[MODELS_S * 8];
  static const moe_router router[] = {MOE_ROUTER_DENSE, MOE_ROUTER_SHARED, MOE_ROUTER_TASK,
                                      MOE_ROUTER_EMBEDDING};
  int r;
  for (r = 0; r < 4; ++r) {
    moe_env env = models_env(MOE_ISA_AUTO);
    moe_config config = models_config(router[r], r ? 3 : 1, 1);
    moe_model *model = models_create(&config, adapt_tasks, MODELS_TASKS, &env), *more = NULL;
    models_batch batch;
    models_random_batch(&batch, model, 12, 19, 3);
    adapt_scores(before, model, &batch, NULL);
    CHECK(!moe_model_adapt(&more, model, &adapt_extra, MOE_GATE_RANDOM, 7, &env), "%s", said);
    CHECK(moe_model_tasks(more) == MODELS_TASKS + 1 &&
              moe_model_find_task(more, "more") == MODELS_TASKS,
          "the task is not there");
    CHECK(!strcmp(moe_model_task(more, MODELS_TASKS)->label[1], "green"),
          "its labels are not there");
    adapt_scores(after, more, &batch, NULL);
    CHECK_STATE();
    CHECK(!memcmp(before, after, 12 * 3 * sizeof *before), "router %d: scores have changed", r);
    moe_model_free(more);
    moe_model_free(model);
  }
}

static void test_adapt_takes_a_gate(void) {
  static const char *const name[] = {"encoder.layer.0.gate.%s.weight",
                                     "encoder.layer.1.gate.%s.weight"};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_model *model = models_create(&config, adapt_tasks, MODELS_TASKS, &env), *more = NULL;
  int32_t from, l;
  for (from = MOE_GATE_MEAN; from < MODELS_TASKS; ++from) {
    CHECK(!moe_model_adapt(&more, model, &adapt_extra, from, 7, &env), "%s", said);
    for (l = 0; l < 2; ++l) {
      char full[128];
      const float *old[MODELS_TASKS], *gate;
      size_t count = 0, i;
      int t;
      for (t = 0; t < MODELS_TASKS; ++t) {
        snprintf(full, sizeof full, name[l], adapt_tasks[t].name);
        old[t] = adapt_tensor(model, full, &count);
      }
      snprintf(full, sizeof full, name[l], "more");
      gate = adapt_tensor(more, full, &count);
      CHECK(gate && count == 60, "there is no gate");
      for (i = 0; i < count; ++i) {
        double mean = 0;
        for (t = 0; t < MODELS_TASKS; ++t) mean += (double)old[t][i] / MODELS_TASKS;
        if (from >= 0)
          CHECK(!memcmp(&gate[i], &old[from][i], sizeof(float)), "layer %d, from %d: %g", (int)l,
                (int)from, (double)gate[i]);
        if (from == MOE_GATE_MEAN) CHECK_NEAR(gate[i], mean, 1e-6);
        if (from == MOE_GATE_RANDOM)
          CHECK(fabsf(gate[i]) < 0.006f, "%g is no draw of N(0, 0.001)", (double)gate[i]);
      }
    }
    moe_model_free(more);
  }
  moe_model_free(model);
}

static void test_adapt_refuses(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_SHARED, 3, 1);
  moe_model *model = models_create(&config, adapt_tasks, MODELS_TASKS, &env), *none = NULL;
  CHECK(moe_model_adapt(&none, model, &adapt_tasks[0], MOE_GATE_RANDOM, 1, &env) ==
                MOE_E_ARGUMENT &&
            strstr(said, "'two' is listed twice"),
        "%s", said);
  CHECK(moe_model_adapt(&none, model, &adapt_extra, 0, 1, &env) == MOE_E_ARGUMENT &&
            strstr(said, "one gate for all tasks"),
        "%s", said);
  CHECK(moe_model_adapt(&none, model, &adapt_extra, MOE_GATE_MEAN, 1, &env) == MOE_E_ARGUMENT, "%s",
        said);
  CHECK(moe_model_adapt(&none, model, &adapt_extra, MODELS_TASKS, 1, &env) == MOE_E_ARGUMENT &&
            strstr(said, "gate_from is 5, expected -2 to 4"),
        "%s", said);
  moe_model_free(model);
  config = models_config(MOE_ROUTER_DENSE, 1, 1);
  model = models_create(&config, adapt_tasks, MODELS_TASKS, &env);
  CHECK(moe_model_adapt(&none, model, &adapt_extra, 1, 1, &env) == MOE_E_ARGUMENT &&
            strstr(said, "no gates"),
        "%s", said);
  CHECK(!none, "something came out");
  moe_model_free(model);
}

static void test_adapt_extracts_tasks(void) {
  static float before[MODELS_S * 8], after[MODELS_S * 8];
  static const moe_router router[] = {MOE_ROUTER_DENSE, MOE_ROUTER_SHARED, MOE_ROUTER_TASK,
                                      MOE_ROUTER_EMBEDDING};
  static const int32_t keep[] = {4, 1}, map[] = {-1, 1, -1, -1, 0};
  int r, s, c;
  for (r = 0; r < 4; ++r) {
    moe_env env = models_env(MOE_ISA_AUTO);
    moe_config config = models_config(router[r], r ? 3 : 1, 1);
    moe_model *model = models_create(&config, adapt_tasks, MODELS_TASKS, &env), *less = NULL;
    models_batch batch;
    models_random_batch(&batch, model, 12, 19, 3);
    for (s = 0; s < 12; ++s) batch.task[s] = s % 2 ? 1 : 4;
    adapt_scores(before, model, &batch, NULL);
    CHECK(!moe_model_extract(&less, model, keep, 2, NULL, &env), "%s", said);
    adapt_scores(after, less, &batch, map);
    CHECK_STATE();
    for (s = 0; s < 12; ++s)
      for (c = 0; c < (s % 2 ? 3 : 2); ++c)
        CHECK(!memcmp(before + 3 * s + c, after + 3 * s + c, sizeof(float)),
              "router %d, sequence %d", r, s);
    CHECK(moe_model_parameters(less) < moe_model_parameters(model), "nothing is saved");
    moe_model_free(less);
    moe_model_free(model);
  }
}

static void test_adapt_extract_refuses(void) {
  static const int32_t twice[] = {1, 1}, far_[] = {0, 5};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_model *model = models_create(&config, adapt_tasks, MODELS_TASKS, &env), *none = NULL;
  CHECK(moe_model_extract(&none, model, twice, 2, NULL, &env) == MOE_E_ARGUMENT &&
            strstr(said, "is listed twice"),
        "%s", said);
  CHECK(moe_model_extract(&none, model, far_, 2, NULL, &env) == MOE_E_ARGUMENT &&
            strstr(said, "task 5"),
        "%s", said);
  CHECK(moe_model_extract(&none, model, twice, 0, NULL, &env) == MOE_E_ARGUMENT, "%s", said);
  CHECK(!none, "something came out");
  moe_model_free(model);
}

static void run_adapt(void) {
  adapt_begin();
  RUN(test_adapt_keeps_the_others);
  RUN(test_adapt_takes_a_gate);
  RUN(test_adapt_refuses);
  RUN(test_adapt_extracts_tasks);
  RUN(test_adapt_extract_refuses);
}
