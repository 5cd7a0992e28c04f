/* Gates made of task vectors: they do what task gates of the same values do, and their gradients
   are those of the task gates, taken through W_{g,t} = sum_j z_{t,j} B_j in double. */

enum { RANK = 3, N = 4, H = 20 };

static moe_config embedding_config(void) {
  moe_config c = models_config(MOE_ROUTER_EMBEDDING, N, 2);
  c.rank = RANK;
  return c;
}

static size_t embedding_offset(const moe_model *model, const char *name) {
  moe_tensor t;
  t = models_tensor(model, name);
  return t.offset;
}

/* The same network with a gate of each task; its gates have the values that the vectors give. */
static moe_model *embedding_twin(moe_model *model, const moe_task *tasks, const moe_env *env) {
  moe_config config = *moe_model_config(model);
  moe_model *twin = NULL;
  const float *z = moe_model_weights(model) + embedding_offset(model, "tasks.vectors");
  int32_t i, t, l, k, j;
  moe_tensor a, b;
  config.router = MOE_ROUTER_TASK;
  if (moe_model_create(&twin, &config, tasks, MODELS_TASKS, 1, env)) return NULL;
  for (i = 0; i < moe_model_tensors(twin); ++i) {
    moe_model_tensor(twin, i, &a);
    if (moe_model_find_tensor(model, a.name) < 0) continue;
    b = models_tensor(model, a.name);
    memcpy(moe_model_weights(twin) + a.offset, moe_model_weights(model) + b.offset,
           a.count * sizeof(float));
  }
  for (l = 0; l < config.layers; ++l)
    for (t = 0; t < MODELS_TASKS; ++t) {
      char name[128];
      const float *basis;
      float *gate;
      snprintf(name, sizeof name, "encoder.layer.%d.gate.basis", (int)l);
      basis = moe_model_weights(model) + embedding_offset(model, name);
      snprintf(name, sizeof name, "encoder.layer.%d.gate.%.60s.weight", (int)l, tasks[t].name);
      gate = moe_model_weights(twin) + embedding_offset(twin, name);
      for (k = 0; k < N * H; ++k) gate[k] = z[t * RANK] * basis[k];
      for (j = 1; j < RANK; ++j)
        for (k = 0; k < N * H; ++k)
          gate[k] =
              (float)fma((double)z[t * RANK + j], (double)basis[j * N * H + k], (double)gate[k]);
    }
  return twin;
}

/* Both networks: the same scores, the same loss; gradients of the basis and the vectors against
   those of the twin's gates. */
/* The gradients of the vectors and of the basis, `g`, against sums over those of the twin's task
   gates, `d`. */
static void check_vectors(moe_model *model, const float *g, const moe_model *twin, const float *d,
                          const moe_task *tasks) {
  double worst = 0, norm = 0;
  size_t at = embedding_offset(model, "tasks.vectors");
  int32_t l, t, j, k;
  for (t = 0; t < MODELS_TASKS; ++t)
    for (j = 0; j < RANK; ++j) {
      double sum = 0, found = (double)g[at + (size_t)(t * RANK + j)];
      for (l = 0; l < moe_model_config(model)->layers; ++l) {
        char name[128];
        const float *basis, *of_task;
        snprintf(name, sizeof name, "encoder.layer.%d.gate.basis", (int)l);
        basis = moe_model_weights(model) + embedding_offset(model, name) + j * N * H;
        snprintf(name, sizeof name, "encoder.layer.%d.gate.%.60s.weight", (int)l, tasks[t].name);
        of_task = d + embedding_offset(twin, name);
        for (k = 0; k < N * H; ++k) sum += (double)of_task[k] * (double)basis[k];
      }
      if (fabs(sum - found) > worst) worst = fabs(sum - found);
      norm += sum * sum;
      if (t == 3)
        CHECK(!(found < 0) && !(found > 0), "a task that is not there has the gradient %g", found);
    }
  CHECK(norm > 0 && worst < 1e-5 * sqrt(norm), "vectors: error %g, norm %g", worst, sqrt(norm));
}

static void check_basis(moe_model *model, const float *g, const moe_model *twin, const float *d,
                        const moe_task *tasks) {
  const float *z = moe_model_weights(model) + embedding_offset(model, "tasks.vectors");
  double worst = 0, norm = 0;
  int32_t l, t, k;
  for (l = 0; l < moe_model_config(model)->layers; ++l)
    for (k = 0; k < RANK * N * H; ++k) {
      char name[128];
      double sum = 0, found;
      snprintf(name, sizeof name, "encoder.layer.%d.gate.basis", (int)l);
      found = (double)g[embedding_offset(model, name) + (size_t)k];
      for (t = 0; t < MODELS_TASKS; ++t) {
        snprintf(name, sizeof name, "encoder.layer.%d.gate.%.60s.weight", (int)l, tasks[t].name);
        sum += (double)z[t * RANK + k / (N * H)] *
               (double)d[embedding_offset(twin, name) + (size_t)(k % (N * H))];
      }
      if (fabs(sum - found) > worst) worst = fabs(sum - found);
      norm += sum * sum;
    }
  CHECK(norm > 0 && worst < 1e-5 * sqrt(norm), "basis: error %g, norm %g", worst, sqrt(norm));
}

static void test_embedding_is_task_gates_of_low_rank(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_config config = embedding_config();
  moe_train_config tc;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_model *model, *twin;
  moe_trainer *trainer[2];
  models_batch batch;
  const float *g[2];
  float loss[2];
  int32_t k;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  twin = embedding_twin(model, tasks, &env);
  models_random_batch(&batch, model, 16, 19, 4);
  for (k = 0; k < 16; ++k)
    if (batch.task[k] == 3) batch.task[k] = 0; /* task 3 is not in the batch */
  for (k = 0; k < 16; ++k) batch.label[k] = batch.task[k] == 2 ? batch.label[k] : (float)(k % 2);
  moe_train_config_init(&tc);
  tc.steps = 10;
  tc.dropout = 0.1f;
  CHECK(!moe_trainer_create(&trainer[0], model, &limits, &tc, &env) &&
            !moe_trainer_create(&trainer[1], twin, &limits, &tc, &env),
        "%s", said);
  for (k = 0; k < 2; ++k) {
    CHECK(!moe_trainer_accumulate(trainer[k], &batch.b, 0, &loss[k], NULL, &env), "%s", said);
    g[k] = moe_trainer_gradients(trainer[k]);
  }
  CHECK(!memcmp(&loss[0], &loss[1], sizeof *loss), "loss %.9g against %.9g", (double)loss[0],
        (double)loss[1]);
  check_vectors(model, g[0], twin, g[1], tasks);
  CHECK_STATE();
  check_basis(model, g[0], twin, g[1], tasks);
  CHECK_STATE();
  for (k = 0; k < 2; ++k) moe_trainer_free(trainer[k]);
  moe_model_free(model);
  moe_model_free(twin);
}

/* What a batch leaves behind for its tasks must not reach the next batch, which has others: the
   gradients are those of a trainer that never saw the first one. */
static void test_embedding_tasks_outside_the_batch_have_no_gradient(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_config config = embedding_config();
  moe_train_config tc;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_model *model;
  moe_trainer *used = NULL, *fresh = NULL;
  models_batch all, few;
  const float *g;
  float loss;
  size_t at;
  int32_t s, k;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  at = embedding_offset(model, "tasks.vectors");
  models_random_batch(&all, model, 24, 12, 8);
  memset(&few, 0, sizeof few);
  for (s = 0; s < 24; ++s) /* tasks 1 and 4 alone */
    if (all.task[s] == 1 || all.task[s] == 4) models_append(&few, &all, s, &config);
  CHECK(few.b.S > 1 && few.b.S < 20, "%d sequences", (int)few.b.S);
  moe_train_config_init(&tc);
  tc.steps = 10;
  CHECK(!moe_trainer_create(&used, model, &limits, &tc, &env) &&
            !moe_trainer_create(&fresh, model, &limits, &tc, &env),
        "%s", said);
  CHECK(!moe_trainer_accumulate(used, &all.b, 0, &loss, NULL, &env), "%s", said);
  moe__trainer_clear(used);
  CHECK(!moe_trainer_accumulate(used, &few.b, 0, &loss, NULL, &env) &&
            !moe_trainer_accumulate(fresh, &few.b, 0, &loss, NULL, &env),
        "%s", said);
  g = moe_trainer_gradients(used);
  for (k = 0; k < MODELS_TASKS * RANK; ++k) {
    float found = g[at + (size_t)k];
    if (k / RANK == 1 || k / RANK == 4)
      CHECK(found < 0 || found > 0, "task %d, which is there, has no gradient", (int)(k / RANK));
    else
      CHECK(!(found < 0) && !(found > 0), "task %d has %g", (int)(k / RANK), (double)found);
  }
  CHECK(!memcmp(g, moe_trainer_gradients(fresh), moe_model_parameters(model) * sizeof *g),
        "something is left from the batch before");
  moe_trainer_free(used);
  moe_trainer_free(fresh);
  moe_model_free(model);
}

static void test_embedding_gradients_are_differences(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_config config = embedding_config();
  moe_train_config tc;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_model *model;
  moe_trainer *trainer = NULL;
  models_batch batch;
  float error = 1;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  models_random_batch(&batch, model, 12, 10, 5);
  moe_train_config_init(&tc);
  tc.steps = 10;
  tc.dropout = 0;
  CHECK(!moe_trainer_create(&trainer, model, &limits, &tc, &env), "%s", said);
  CHECK(!moe_gradcheck(trainer, &batch.b, 200, &error, &env), "%s", said);
  CHECK(error < 5e-3f, "error %g", (double)error);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

static int embedding_grow(void *user, const void *data, size_t bytes) {
  char **at = (char **)user;
  memcpy(*at, data, bytes);
  *at += bytes;
  return 0;
}

static void test_embedding_files_and_sizes(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS], extra;
  moe_config config = embedding_config(), gates = config;
  moe_model *model, *plain, *again = NULL, *more = NULL;
  moe_tensor t;
  moe_writer writer;
  char *file, *at;
  const float *z;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  gates.router = MOE_ROUTER_TASK;
  plain = models_create(&gates, tasks, MODELS_TASKS, &env);
  CHECK(moe_model_parameters(plain) - 2 * MODELS_TASKS * N * H ==
            moe_model_parameters(model) - (MODELS_TASKS * RANK + 2 * RANK * N * H),
        "count");
  CHECK(!moe_model_tensor(model, moe_model_find_tensor(model, "encoder.layer.1.gate.basis"), &t),
        "no basis");
  CHECK(t.dims == 3 && t.shape[0] == RANK && t.shape[1] == N && t.shape[2] == H,
        "shape of the basis");
  at = file = (char *)malloc(4 * moe_model_parameters(model) + 100000);
  writer.write = embedding_grow;
  writer.user = &at;
  CHECK(file && !moe_model_write(model, &writer, &env), "%s", said);
  CHECK(!moe_model_read(&again, file, (size_t)(at - file), &env), "%s", said);
  CHECK(moe_model_config(again)->rank == RANK &&
            moe_model_config(again)->router == MOE_ROUTER_EMBEDDING,
        "configuration");
  CHECK(!memcmp(moe_model_weights(again), moe_model_weights(model),
                moe_model_parameters(model) * sizeof(float)),
        "weights");
  extra = tasks[0];
  snprintf(extra.name, sizeof extra.name, "more");
  CHECK(!moe_model_adapt(&more, model, &extra, 1, 5, &env), "%s", said);
  z = moe_model_weights(more) + embedding_offset(more, "tasks.vectors");
  CHECK(!memcmp(z, moe_model_weights(model) + embedding_offset(model, "tasks.vectors"),
                MODELS_TASKS * RANK * sizeof *z),
        "old vectors");
  CHECK(!memcmp(z + MODELS_TASKS * RANK, z + RANK, RANK * sizeof *z),
        "the new task does not start from task 1's vector");
  config.rank = 0;
  CHECK(moe_config_check(&config, &env) == MOE_E_ARGUMENT && strstr(said, "rank is 0"), "%s", said);
  free(file);
  moe_model_free(more);
  moe_model_free(again);
  moe_model_free(plain);
  moe_model_free(model);
}

/* Without another task to start from, a new task's vector is drawn from the seed. */
static void test_embedding_new_vectors_follow_from_the_seed(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS], extra;
  moe_config config = embedding_config();
  moe_model *model, *more[3] = {NULL, NULL, NULL};
  const float *z[3];
  size_t at = MODELS_TASKS * RANK;
  int i;
  models_tasks(tasks);
  extra = tasks[0];
  strcpy(extra.name, "more");
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  for (i = 0; i < 3; ++i) {
    CHECK(!moe_model_adapt(&more[i], model, &extra, MOE_GATE_RANDOM, i ? 6 : 5, &env), "%s", said);
    z[i] = moe_model_weights(more[i]) + embedding_offset(more[i], "tasks.vectors");
  }
  for (i = 0; i < RANK; ++i)
    CHECK(memcmp(z[0] + at + i, z[1] + at + i, sizeof **z) && fabsf(z[1][at + (size_t)i]) > 0 &&
              fabsf(z[1][at + (size_t)i]) < 10 && !memcmp(z[1] + at + i, z[2] + at + i, sizeof **z),
          "element %d: %g, %g, %g", i, (double)z[0][at + (size_t)i], (double)z[1][at + (size_t)i],
          (double)z[2][at + (size_t)i]);
  for (i = 0; i < 3; ++i) moe_model_free(more[i]);
  moe_model_free(model);
}

/* The threads, the instruction set and the rest of the batch change no bit. */
static void test_embedding_bits(void) {
  static float score[2][MODELS_S * 3];
  moe_env env = models_env(MOE_ISA_AUTO), scalar = models_env(MOE_ISA_SCALAR);
  moe_task tasks[MODELS_TASKS];
  moe_config config = embedding_config();
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_model *model;
  moe_context *context = NULL;
  models_batch batch, one;
  int32_t s;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  models_random_batch(&batch, model, 10, 19, 6);
  CHECK(!moe_context_create(&context, model, &limits, &env), "%s", said);
  CHECK(!moe_forward(context, score[0], &batch.b, &env) &&
            !moe_forward(context, score[1], &batch.b, &scalar),
        "%s", said);
  CHECK(!memcmp(score[0], score[1], 10 * 3 * sizeof(float)), "scalar differs");
  for (s = 0; s < 10; ++s) {
    memset(&one, 0, sizeof one);
    models_append(&one, &batch, s, &config);
    CHECK(!moe_forward(context, score[1], &one.b, &env), "%s", said);
    CHECK(!memcmp(score[0] + 3 * s, score[1], 3 * sizeof(float)), "sequence %d alone differs",
          (int)s);
  }
  moe_context_free(context);
  moe_model_free(model);
}

/* A name that looks like a gate's must not change how a head starts. */
static void test_embedding_head_of_a_task_called_gate_is_a_head(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  moe_config config = embedding_config();
  moe_model *model = NULL;
  moe_tensor t;
  double square = 0;
  size_t i;
  config.hidden = 200;
  models_tasks(tasks);
  strcpy(tasks[1].name, "gate");
  CHECK(!moe_model_create(&model, &config, tasks, MODELS_TASKS, 5, &env), "%s", said);
  t = models_tensor(model, "heads.gate.weight");
  for (i = 0; i < t.count; ++i) square += pow((double)moe_model_weights(model)[t.offset + i], 2);
  CHECK_NEAR(sqrt(square / (double)t.count), 0.02, 3e-3);
  moe_model_free(model);
}

static void run_embedding(void) {
  RUN(test_embedding_is_task_gates_of_low_rank);
  RUN(test_embedding_tasks_outside_the_batch_have_no_gradient);
  RUN(test_embedding_gradients_are_differences);
  RUN(test_embedding_files_and_sizes);
  RUN(test_embedding_new_vectors_follow_from_the_seed);
  RUN(test_embedding_bits);
  RUN(test_embedding_head_of_a_task_called_gate_is_a_head);
}
