/* Kinds of tasks: their names, and one more than the library has, added by one row of its table and
   one function (MOE__KINDS_MORE in model.c). */

enum { KINDS_ABSOLUTE = MOE_KIND_SPAN + 1, KINDS_TASKS = MODELS_TASKS + 1 };

/* The kind of the row: a score with |score - label| as its loss. */
static float kinds_absolute_loss(float *dscore, float *row, float label, int32_t classes,
                                 int32_t batch_size) {
  (void)classes;
  if (dscore) return dscore[0] = (row[0] > 0 ? 1.0f : -1.0f) / (float)batch_size, 0.0f;
  row[0] -= label;
  return fabsf(row[0]);
}

static void test_kinds_names_lead_back(void) {
  static const char *const name[] = {"classification", "regression", "ranking", "span", "absolute"};
  int k;
  moe_kind kind = MOE_KIND_SPAN;
  moe_router router = MOE_ROUTER_TASK;
  moe_truncate truncate = MOE_TRUNCATE_RIGHT;
  for (k = 0; k < 5; ++k)
    CHECK(!strcmp(moe_kind_name((moe_kind)k), name[k]) && moe_kind_from_name(&kind, name[k]) &&
              (int)kind == k,
          "%s", name[k]);
  CHECK(!moe_kind_name((moe_kind)5) && !moe_kind_name((moe_kind)-1), "names of no kind");
  kind = MOE_KIND_SPAN;
  CHECK(!moe_kind_from_name(&kind, "spam") && kind == MOE_KIND_SPAN, "a kind that is unknown");
  CHECK(!moe_kind_from_name(&kind, "") && !moe_kind_from_name(&kind, "Span"), "other spellings");
  for (k = 0; k < 5; ++k)
    CHECK(moe_router_from_name(&router, moe_router_name((moe_router)k)) && (int)router == k,
          "router %d", k);
  CHECK(!moe_router_name((moe_router)5) && !moe_router_name((moe_router)-1) &&
            !moe_router_from_name(&router, "gate"),
        "routers that are unknown");
  for (k = 0; k < 2; ++k)
    CHECK(moe_truncate_from_name(&truncate, moe_truncate_name((moe_truncate)k)) &&
              (int)truncate == k,
          "truncation %d", k);
  CHECK(!moe_truncate_name((moe_truncate)2) && !moe_truncate_from_name(&truncate, "left"),
        "truncations that are unknown");
}

static void kinds_tasks(moe_task tasks[KINDS_TASKS]) {
  models_tasks(tasks);
  memset(&tasks[MODELS_TASKS], 0, sizeof *tasks);
  snprintf(tasks[MODELS_TASKS].name, sizeof tasks->name, "far");
  snprintf(tasks[MODELS_TASKS].metrics, sizeof tasks->metrics, "pearson");
  tasks[MODELS_TASKS].kind = (moe_kind)KINDS_ABSOLUTE;
  tasks[MODELS_TASKS].classes = 1;
  tasks[MODELS_TASKS].high = 5;
}

/* Whether the losses of the new task are |score - label|. */
static int kinds_losses_are_absolute(const float *losses, const float *scores, int32_t classes) {
  int32_t s, found = 0;
  for (s = 0; s < model_batch.b.S; ++s) {
    if (model_batch.task[s] != MODELS_TASKS) continue;
    ++found;
    if (losses[s] < fabsf(scores[s * classes] - model_batch.label[s]) ||
        losses[s] > fabsf(scores[s * classes] - model_batch.label[s]))
      return 0;
  }
  return found > 2;
}

static void test_kinds_take_a_new_one_as_one_row(void) {
  static float losses[MODELS_S], scores[MODELS_S * 3];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 3, 1);
  moe_train_config tc;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_task tasks[KINDS_TASKS];
  moe_model *model, *back = NULL;
  moe_trainer *trainer = NULL;
  models_file file;
  float loss = 0, first = 0, error = 1, answer;
  int i;
  kinds_tasks(tasks);
  model = models_create(&c, tasks, KINDS_TASKS, &env);
  CHECK(model, "%s", said);
  models_random_batch(&model_batch, model, 30, 19, 12);
  for (i = 0; i < 30; ++i)
    if (model_batch.task[i] == MODELS_TASKS) model_batch.label[i] = 0.5f + (float)(i % 5);
  moe_train_config_init(&tc);
  tc.steps = 20, tc.lr = 3e-3f, tc.dropout = 0;
  CHECK(!moe_trainer_create(&trainer, model, &limits, &tc, &env), "%s", said);
  CHECK(!moe_gradcheck(trainer, &model_batch.b, 40, &error, &env) && error < 2e-2f, "%g: %s",
        (double)error, said);
  for (i = 0; i < 20; ++i) {
    CHECK(!model_forward(model, &model_batch.b, scores, model_hidden[0], &env), "%s", said);
    CHECK(!moe_trainer_accumulate(trainer, &model_batch.b, 0, &loss, losses, &env), "%s", said);
    CHECK(kinds_losses_are_absolute(losses, scores, 3), "step %d", i);
    if (i == 0) first = loss;
    CHECK(!moe_trainer_step(trainer, NULL, &env), "%s", said);
  }
  CHECK(loss < 0.7f * first, "the loss fell from %g to %g", (double)first, (double)loss);
  file = models_written(model, &env);
  CHECK(file.used && !moe_model_read(&back, file.data, file.used, &env), "%s", said);
  CHECK((int)moe_model_task(back, MODELS_TASKS)->kind == KINDS_ABSOLUTE, "its kind in the file");
  scores[0] = 3.5f;
  CHECK(!moe_answers(&answer, &tasks[MODELS_TASKS], scores, 3, 1, NULL, NULL, &env) &&
            answer > 3.4f && answer < 3.6f,
        "its answer is %g", (double)answer);
  model_batch.label[0] = 6;
  model_batch.task[0] = MODELS_TASKS;
  CHECK(moe_batch_check(model, &model_batch.b, 1, &env) == MOE_E_ARGUMENT, "a label out of range");
  tasks[MODELS_TASKS].classes = 2;
  CHECK(moe_model_create(&back, &c, tasks, KINDS_TASKS, 1, &env) == MOE_E_ARGUMENT &&
            strstr(said, "task 'far': classes is 2, expected 1 for kind absolute"),
        "%s", said);
  free(file.data);
  moe_model_free(back);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

static void run_kinds(void) {
  RUN(test_kinds_names_lead_back);
  RUN(test_kinds_take_a_new_one_as_one_row);
}
