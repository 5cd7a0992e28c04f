/* A model without tasks, an encoder for embeddings: what it can, and what it refuses. */

/* The hidden states of a batch; 0 after a failure. */
static int no_tasks_hidden(float *hidden, const moe_model *model, const moe_batch *batch,
                           const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_context *context;
  float nothing;
  size_t floats = (size_t)batch->seq_start[batch->S] * (size_t)moe_model_config(model)->hidden;
  if (moe_context_create(&context, model, &limits, env)) return 0;
  if (moe_forward(context, moe_model_tasks(model) ? hidden : &nothing, batch, env)) return 0;
  memcpy(hidden, moe_context_hidden(context), floats * sizeof(float));
  moe_context_free(context);
  return 1;
}

/* The states do not change when tasks are taken away, the file keeps them, and a task can come
   back. */
static void test_no_tasks_has_the_same_states(void) {
  static float before[MODELS_M * 20], after[MODELS_M * 20];
  static const moe_router router[] = {MOE_ROUTER_DENSE, MOE_ROUTER_SHARED};
  static models_batch batch;
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  int r;
  models_tasks(tasks);
  for (r = 0; r < 2; ++r) {
    moe_config config = models_config(router[r], r ? 3 : 1, 1);
    moe_model *model = models_create(&config, tasks, MODELS_TASKS, &env), *bare = NULL,
              *back = NULL, *more = NULL, *small = NULL;
    models_file file;
    size_t bytes;
    CHECK(model, "%s", said);
    models_random_batch(&batch, model, 12, 19, 3);
    CHECK(no_tasks_hidden(before, model, &batch.b, &env), "%s", said);
    CHECK(!moe_model_extract(&bare, model, NULL, 0, NULL, &env), "%s", said);
    CHECK(moe_model_tasks(bare) == 0 && moe_model_max_classes(bare) == 0 &&
              !moe_model_task(bare, 0) && moe_model_find_task(bare, "two") == -1 &&
              moe_model_find_tensor(bare, "heads.two.bias") == -1,
          "tasks are left");
    batch.b.task = NULL;
    batch.b.span = NULL;
    memset(after, 0, sizeof after);
    CHECK(no_tasks_hidden(after, bare, &batch.b, &env), "%s", said);
    CHECK(!memcmp(before, after, sizeof after), "router %d: other bits", r);
    file = models_written(bare, &env);
    CHECK(file.used && !moe_model_read(&back, file.data, file.used, &env), "%s", said);
    CHECK(!moe_model_open_size(file.data, file.used, &bytes, &env) && bytes < 65536, "%s", said);
    CHECK(moe_model_parameters(bare) == moe_model_parameters(back) &&
              !memcmp(moe_model_weights(bare), moe_model_weights(back),
                      moe_model_parameters(bare) * sizeof(float)),
          "the file has other weights");
    CHECK(!moe_model_adapt(&more, back, &tasks[1], MOE_GATE_RANDOM, 1, &env), "%s", said);
    CHECK(moe_model_tasks(more) == 1 && moe_model_max_classes(more) == 3, "a task comes back");
    CHECK(!moe_model_quantize(&small, bare, &env), "%s", said);
    CHECK(no_tasks_hidden(after, small, &batch.b, &env), "%s", said);
    free(file.data);
    moe_model_free(small);
    moe_model_free(more);
    moe_model_free(back);
    moe_model_free(bare);
    moe_model_free(model);
  }
}

static void test_no_tasks_refuses(void) {
  static models_batch batch;
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config train;
  moe_model *model = NULL;
  moe_trainer *trainer = NULL;
  moe_context *context = NULL;
  moe_route_sums sums;
  moe_view view;
  float nothing;
  CHECK(moe_model_create(&model, &config, NULL, 0, 1, &env) == MOE_E_ARGUMENT && !model &&
            strstr(said, "0 tasks: expected router dense or shared"),
        "%s", said);
  CHECK(moe_model_create(&model, &config, NULL, -1, 1, &env) == MOE_E_ARGUMENT &&
            strstr(said, "-1 tasks, expected 0 to 4096"),
        "%s", said);
  config = models_config(MOE_ROUTER_DENSE, 2, 1);
  config.unit = MOE_UNIT_BLOCK;
  CHECK(moe_model_create(&model, &config, NULL, 0, 1, &env) == MOE_E_ARGUMENT, "%s", said);
  config = models_config(MOE_ROUTER_SHARED, 3, 1);
  CHECK(!moe_model_create(&model, &config, NULL, 0, 1, &env), "%s", said);
  moe_train_config_init(&train);
  train.steps = 1;
  CHECK(moe_trainer_create(&trainer, model, &limits, &train, &env) == MOE_E_ARGUMENT && !trainer &&
            strstr(said, "the model has no tasks to learn"),
        "%s", said);
  memset(&batch, 0, sizeof batch);
  batch.start[1] = 1;
  models_connect(&batch, &config, 1);
  batch.b.task = NULL;
  limits.training = 0;
  CHECK(!moe_context_create(&context, model, &limits, &env), "%s", said);
  CHECK(!moe_forward(context, &nothing, &batch.b, &env), "%s", said);
  memset(&sums, 0, sizeof sums);
  CHECK(moe_route_count(&sums, context, &batch.b, &env) == MOE_E_ARGUMENT &&
            strstr(said, "counting routes: the model has no tasks"),
        "%s", said);
  batch.ids[0] = 50;
  CHECK(moe_forward(context, &nothing, &batch.b, &env) == MOE_E_ARGUMENT && strstr(said, "id 50"),
        "%s", said);
  CHECK(!moe_view_of(&view, model, &env) && view.T == 0, "%s", said);
  moe_context_free(context);
  moe_model_free(model);
}

static void run_no_tasks(void) {
  RUN(test_no_tasks_has_the_same_states);
  RUN(test_no_tasks_refuses);
}
