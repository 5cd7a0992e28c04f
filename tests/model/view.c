/* A model as constants of a program (moe_view), and what a small build leaves out. */

/* The scores of a model whose weights stay where a view points to. */
static moe_status view_scores(float *scores, const moe_view *view, const moe_batch *batch,
                              const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_model *model = NULL;
  moe_context *context = NULL;
  size_t bytes = 0;
  void *block, *raw;
  moe_status status = moe_model_view_size(view, &bytes, env);
  if (status) return status;
  block = models_block(&raw, bytes);
  status = moe_model_view(&model, view, block, bytes, env);
  if (!status) status = moe_context_create(&context, model, &limits, env);
  if (!status) status = moe_forward(context, scores, batch, env);
  moe_context_free(context);
  free(raw);
  return status;
}

/* A view gives the bits of its model, fp32 and int8, pruned experts included. */
static void test_view_gives_the_bits_of_the_model(void) {
  static models_batch batch;
  static float want[MODELS_S * MODELS_WIDTH], got[MODELS_S * MODELS_WIDTH];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  static const uint8_t pruned[6] = {0, 1, 0, 0, 0, 0};
  moe_task tasks[MODELS_TASKS];
  int round;
  models_tasks(tasks);
  for (round = 0; round < 4; ++round) {
    moe_model *model, *small = NULL;
    moe_context *context;
    moe_view view;
    config.pruned = round & 2 ? pruned : NULL;
    model = models_create(&config, tasks, MODELS_TASKS, &env);
    CHECK(model, "no model");
    models_random_batch(&batch, model, 9, 12, 7);
    if (round & 1) CHECK(!moe_model_quantize(&small, model, &env), "%s", said);
    CHECK(!moe_context_create(&context, small ? small : model, &limits, &env), "%s", said);
    memset(want, 0, sizeof want);
    memset(got, 1, sizeof got);
    CHECK(!moe_forward(context, want, &batch.b, &env), "%s", said);
    CHECK(!moe_view_of(&view, small ? small : model, &env), "%s", said);
    CHECK((view.int8 != NULL) == (round & 1), "int8");
    CHECK(!view_scores(got, &view, &batch.b, &env), "%s", said);
    CHECK(!memcmp(want, got, (size_t)(batch.b.S * moe_model_max_classes(model)) * sizeof *want),
          "other bits");
    moe_context_free(context);
    moe_model_free(small);
    moe_model_free(model);
  }
}

/* Whatever is wrong with a view ends in a sentence. */
static void test_view_says_what_is_wrong(void) {
  static models_batch batch;
  static float scores[MODELS_S * MODELS_WIDTH];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  moe_view good, bad;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  CHECK(model, "no model");
  models_random_batch(&batch, model, 9, 12, 7);
  CHECK(!moe_view_of(&good, model, &env), "%s", said);
  bad = good, bad.version += 100;
  CHECK(view_scores(scores, &bad, &batch.b, &env) == MOE_E_FORMAT, "version");
  CHECK(strstr(said, "version"), "%s", said);
  bad = good, bad.version = (int32_t)0xc8000000; /* 200 in the other byte order */
  CHECK(view_scores(scores, &bad, &batch.b, &env) == MOE_E_FORMAT, "byte order");
  CHECK(strstr(said, "convert the model again"), "%s", said);
  bad = good, bad.count -= 1;
  CHECK(view_scores(scores, &bad, &batch.b, &env) == MOE_E_FORMAT, "cut short");
  CHECK(strstr(said, "floats"), "%s", said);
  bad = good, bad.floats = (const float *)(const void *)((const char *)good.floats + 1);
  CHECK(view_scores(scores, &bad, &batch.b, &env) == MOE_E_ARGUMENT, "misaligned");
  CHECK(strstr(said, "multiple of 4"), "%s", said);
  bad = good, bad.config.hidden += 1;
  CHECK(view_scores(scores, &bad, &batch.b, &env) != MOE_OK, "another configuration");
  bad = good, bad.T = 0;
  CHECK(view_scores(scores, &bad, &batch.b, &env) == MOE_E_ARGUMENT, "no tasks");
  moe_model_free(model);
}

/* The block of a context fits its own model; a larger model refuses it. */
static void test_view_contexts_are_of_one_model(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 3, 2);
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_task tasks[MODELS_TASKS];
  moe_model *small, *large;
  moe_context *context = NULL;
  size_t bytes = 0;
  void *block, *raw;
  models_tasks(tasks);
  small = models_create(&config, tasks, MODELS_TASKS, &env);
  config.hidden *= 2;
  large = models_create(&config, tasks, MODELS_TASKS, &env);
  CHECK(small && large && !moe_context_size(small, &limits, &bytes, &env), "%s", said);
  block = models_block(&raw, bytes);
  CHECK(moe_context_init(&context, block, bytes, large, &limits, &env) == MOE_E_MEMORY &&
            !context && strstr(said, "the block of a context has"),
        "%s", said);
  CHECK(!moe_context_init(&context, block, bytes, small, &limits, &env), "%s", said);
  moe_context_free(context);
  free(raw);
  moe_model_free(large);
  moe_model_free(small);
}

static void run_view(void) {
  RUN(test_view_gives_the_bits_of_the_model);
  RUN(test_view_contexts_are_of_one_model);
  RUN(test_view_says_what_is_wrong);
}
