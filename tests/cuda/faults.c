/* Every function of the driver, of NVRTC and of cuBLAS failing, memory running out, and the card
   lost while it trains. */

enum { FAULTS_STEPS = 2, FAULTS_S = 2, FAULTS_LONGEST = 4 };

/* One run: opens the card, trains with every step mirrored, frees everything, and then takes a step
   on the CPU with the weights that are left. */
typedef struct faults_run {
  moe_status status, on_cpu;       /* of the run; of the step afterwards */
  int done, named;                 /* steps; the step that the sentence names, -1: none */
  uint64_t host[FAULTS_STEPS + 1]; /* weights after each step */
  uint64_t left;                   /* in the end */
} faults_run;

static moe_model *faults_model(const moe_env *env) {
  moe_task tasks[MODELS_TASKS];
  moe_config config = models_config(MOE_ROUTER_TASK, 2, 1);
  config.layers = 1;
  config.hidden = 16;
  config.ffn = 16;
  config.heads = 1;
  models_tasks(tasks);
  return models_create(&config, tasks, MODELS_TASKS, env);
}

static moe_status faults_step(moe_trainer *t, const moe_model *model, const moe_env *env) {
  static models_batch batch;
  moe_status status;
  models_random_batch(&batch, model, FAULTS_S, FAULTS_LONGEST, 3);
  status = moe_trainer_accumulate(t, &batch.b, 0, NULL, NULL, env);
  return status ? status : moe_trainer_step(t, NULL, env);
}

static void faults_train(faults_run *run, moe_model *model, const moe_env *env) {
  moe_limits limits = {FAULTS_S * FAULTS_LONGEST, FAULTS_S, 1, 0};
  moe_train_config config = whole_train();
  size_t bytes = moe_model_parameters(model) * sizeof(float);
  moe_trainer *t = NULL;
  const char *says;
  run->host[0] = models_hash(moe_model_weights(model), bytes);
  run->status = moe_trainer_create(&t, model, &limits, &config, env);
  while (!run->status && run->done < FAULTS_STEPS) {
    run->status = faults_step(t, model, env);
    run->done = (int)moe_trainer_steps_done(t);
    if (!run->status) run->host[run->done] = models_hash(moe_model_weights(model), bytes);
  }
  says = strstr(said, "after step ");
  if (says) run->named = atoi(says + 11);
  moe_trainer_free(t);
}

static void faults_go(faults_run *run, moe_cuda_maker maker) {
  moe_cuda_options options = host_options();
  moe_limits limits = {FAULTS_S * FAULTS_LONGEST, FAULTS_S, 1, 0};
  moe_train_config config = whole_train();
  moe_env cpu = host_env(), env = cpu;
  moe_backend b;
  moe_model *model;
  moe_trainer *t = NULL;
  memset(run, 0, sizeof *run);
  run->named = -1;
  options.maker = maker;
  options.cublas = double_path;
  options.mirror = 1;
  model = faults_model(&cpu);
  memset(&b, 0, sizeof b);
  run->status = moe_cuda_open(&b, &options, &env);
  if (!run->status) {
    env.backend = &b;
    faults_train(run, model, &env);
  }
  run->left = models_hash(moe_model_weights(model), moe_model_parameters(model) * sizeof(float));
  run->on_cpu = moe_trainer_create(&t, model, &limits, &config, &cpu);
  if (!run->on_cpu) run->on_cpu = faults_step(t, model, &cpu);
  moe_trainer_free(t);
  moe_model_free(model);
  if (moe_cuda_close(&b)) run->on_cpu = MOE_E_ARGUMENT;
}

/* What must hold however it fails: nothing is left or called wrongly, the host has the weights of
   the last mirrored step, which the sentence names, and the CPU trains on. */
static void faults_check(const faults_run *run, const faults_run *right, const char *what) {
  int step = run->named >= 0 ? run->named : run->status ? 0 : FAULTS_STEPS;
  HOST_IS_CLEAN();
  CHECK(!run->status || said[0], "%s: no sentence", what);
  CHECK(!run->on_cpu, "%s: on the CPU: %s", what, said);
  CHECK(run->left == right->host[step], "%s: not the weights after step %d: %s", what, step, said);
  CHECK(run->named < 0 || run->named == run->done || run->named == run->done - 1,
        "%s: %d steps are done, step %d is named", what, run->done, run->named);
}

/* What the functions of a good run are, and how often each is called. */
static double_control faults_good;

/* Call number `at` of a function fails. */
static void faults_one(const faults_run *right, const char *name, long at, int error, int late) {
  faults_run run;
  char what[200];
  double_reset();
  snprintf(control->name, sizeof control->name, "%s", name);
  control->fail_at = at, control->error = error, control->late = late;
  faults_go(&run, MOE_CUDA_MAKER_CUBLAS);
  snprintf(what, sizeof what, "%s, call %ld, error %d%s", name, at, error, late ? ", late" : "");
  CHECK(!control->fail_at, "%s: never called", what);
  faults_check(&run, right, what);
}

static void test_faults_every_function_fails(void) {
  static const int errors[] = {719, 1, 700, 2};
  faults_run right;
  int i, tried = 0, functions = 0;
  double_reset();
  faults_go(&right, MOE_CUDA_MAKER_CUBLAS);
  CHECK(!right.status && right.done == FAULTS_STEPS && right.left == right.host[FAULTS_STEPS], "%s",
        said);
  HOST_IS_CLEAN();
  faults_good = *control;
  for (i = 0; i < faults_good.names; ++i) {
    const char *name = faults_good.called[i];
    long times = faults_good.times[i], at;
    int driver = !strncmp(name, "cu", 2) && strncmp(name, "cublas", 6) != 0;
    for (at = 1; at <= times; ++at, ++tried) {
      faults_one(&right, name, at, driver ? errors[at % 4] : 6, 0);
      CHECK_STATE();
    }
    for (at = 0; at < 6 && driver; ++at, ++tried) { /* the other way round; and noticed later */
      long call = 1 + at * (times - 1) / 5;
      faults_one(&right, name, call, errors[(call + 2) % 4], !strcmp(name, "cuLaunchKernel"));
      CHECK_STATE();
    }
    ++functions;
    printf("        %-30s %4ld calls\n", name, times);
  }
  printf("        %d functions, %ld calls, %d runs with one failure\n", functions,
         faults_good.calls, tried);
}

/* Less and less memory. */
static void test_faults_memory_runs_out(void) {
  faults_run right, run;
  size_t most;
  int i, failed = 0;
  char what[60];
  double_reset();
  faults_go(&right, MOE_CUDA_MAKER_OWN);
  CHECK(!right.status, "%s", said);
  most = control->most;
  for (i = 0; i <= 12; ++i) {
    double_reset();
    control->memory = most * (size_t)i / 12;
    faults_go(&run, MOE_CUDA_MAKER_OWN);
    snprintf(what, sizeof what, "%zu bytes of memory", most * (size_t)i / 12);
    CHECK(!run.status == (i == 12) &&
              (!run.status || run.status == MOE_E_MEMORY || run.done > 0 || strstr(said, "memory")),
          "%s: status %d: %s", what, (int)run.status, said);
    faults_check(&run, &right, what);
    CHECK_STATE();
    failed += run.status != MOE_OK;
  }
  CHECK(failed == 12, "%d", failed);
}

/* While makers are measured: our own kernels serve, and nothing else happens. */
static void test_faults_measuring_fails(void) {
  static const char *const names[] = {"cuEventCreate", "cuEventRecord", "cuEventSynchronize",
                                      "cuEventElapsedTime", "cuEventDestroy_v2"};
  size_t i;
  for (i = 0; i < sizeof names / sizeof *names; ++i) {
    faults_run run;
    double_reset();
    snprintf(control->name, sizeof control->name, "%s", names[i]);
    control->fail_at = 2, control->error = 1;
    faults_go(&run, MOE_CUDA_MAKER_AUTO);
    CHECK(!control->fail_at && !run.status && run.done == FAULTS_STEPS, "%s: %s", names[i], said);
    HOST_IS_CLEAN();
  }
}

static void run_faults(void) {
  RUN(test_faults_every_function_fails);
  RUN(test_faults_memory_runs_out);
  RUN(test_faults_measuring_fails);
}
