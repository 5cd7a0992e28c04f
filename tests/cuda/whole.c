/* Whole models on the double: training, files, prediction, several at once. */

enum { WHOLE_S = 6, WHOLE_LONGEST = 9, WHOLE_M = WHOLE_S * WHOLE_LONGEST };

static moe_config whole_config(moe_router router, int32_t top_k) {
  moe_config c = models_config(router, router == MOE_ROUTER_DENSE ? 1 : 4, top_k);
  c.hidden = 32;
  c.heads = 2;
  return c;
}

static moe_train_config whole_train(void) {
  moe_train_config t;
  moe_train_config_init(&t);
  t.lr = 1e-3f;
  t.steps = 1000;
  t.weight_decay = 0.01f;
  t.clip_norm = 1;
  t.dropout = 0.1f;
  t.balance = 0.01f;
  t.z_loss = 0.001f;
  t.jitter = 0.01f;
  return t;
}

static moe_model *whole_model(moe_router router, int32_t top_k, const moe_env *env) {
  moe_task tasks[MODELS_TASKS];
  moe_config config = whole_config(router, top_k);
  moe_env cpu = *env;
  cpu.backend = NULL;
  models_tasks(tasks);
  return models_create(&config, tasks, MODELS_TASKS, &cpu);
}

/* A trainer with its model. */
typedef struct whole_side {
  moe_env env;
  moe_model *model;
  moe_trainer *trainer;
  float loss;
} whole_side;

static moe_status whole_begin(whole_side *side, moe_router router, int32_t top_k) {
  moe_limits limits = {WHOLE_M, WHOLE_S, 1, 0};
  moe_train_config config = whole_train();
  side->model = whole_model(router, top_k, &side->env);
  side->trainer = NULL;
  return moe_trainer_create(&side->trainer, side->model, &limits, &config, &side->env);
}

static void whole_end(whole_side *side) {
  moe_trainer_free(side->trainer);
  moe_model_free(side->model);
}

/* Step number n: two micro-batches. */
static moe_status whole_step(whole_side *side, int n) {
  models_batch batch[2];
  float loss[2];
  moe_status status = MOE_OK;
  int i;
  for (i = 0; i < 2 && !status; ++i) {
    models_random_batch(&batch[i], side->model, WHOLE_S, WHOLE_LONGEST, (uint64_t)(2 * n + i));
    status =
        moe_trainer_accumulate(side->trainer, &batch[i].b, 2 * WHOLE_S, &loss[i], NULL, &side->env);
  }
  side->loss = loss[0] + loss[1];
  return status ? status : moe_trainer_step(side->trainer, NULL, &side->env);
}

static uint64_t whole_hash(whole_side *side) {
  return models_hash(moe_model_weights(side->model),
                     moe_model_parameters(side->model) * sizeof(float));
}

/* How far apart two arrays are, by the norm of the first. */
static double whole_apart(const float *a, const float *b, size_t n) {
  double d = 0, norm = 0;
  size_t i;
  for (i = 0; i < n; ++i) {
    d += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    norm += (double)a[i] * (double)a[i];
  }
  return sqrt(d / (norm > 0 ? norm : 1));
}

/* Losses of both, step by step: near as long as the routes are the same. 50 steps, or a sample like
   that of test_cuda.sh. */
static void whole_compare(moe_router router, int32_t top_k, const moe_cuda_options *options) {
  const char *cases = getenv("MOE_CUDA_CASES");
  int n, steps = cases && atoi(cases) < 200 ? 15 : 50;
  whole_side cpu, gpu;
  moe_backend b;
  double worst = 0, apart;
  double_reset();
  cpu.env = gpu.env = host_env();
  CHECK(!moe_cuda_open(&b, options, &gpu.env), "%s", said);
  gpu.env.backend = &b;
  CHECK(!whole_begin(&cpu, router, top_k) && !whole_begin(&gpu, router, top_k), "%s", said);
  for (n = 0; n < steps; ++n) {
    CHECK(!whole_step(&cpu, n) && !whole_step(&gpu, n), "step %d: %s", n, said);
    if (fabs((double)cpu.loss - (double)gpu.loss) > worst)
      worst = fabs((double)cpu.loss - (double)gpu.loss);
  }
  apart = whole_apart(moe_model_weights(cpu.model), moe_model_weights(gpu.model),
                      moe_model_parameters(cpu.model));
  printf("        router %d, top %d: losses %.1e apart, last %.4f, weights %.1e\n", (int)router,
         (int)top_k, worst, (double)gpu.loss, apart);
  CHECK(worst <= 1e-4, "%g", worst);
  CHECK(apart <= 1e-3, "%g", apart);
  whole_end(&cpu), whole_end(&gpu);
  CHECK(!moe_cuda_close(&b), "left");
  HOST_IS_CLEAN();
}

static void test_whole_training_follows_the_cpu(void) {
  moe_cuda_options options = host_options();
  whole_compare(MOE_ROUTER_TASK, 1, &options);
  CHECK_STATE();
  whole_compare(MOE_ROUTER_SHARED, 2, &options);
  CHECK_STATE();
  whole_compare(MOE_ROUTER_DENSE, 1, &options);
}

/* Trains n steps; 1: all went well. */
static int whole_fit(whole_side *side, int from, int to) {
  for (; from < to; ++from)
    if (whole_step(side, from)) return 0;
  return 1;
}

/* Two runs, and one that goes on from a checkpoint, have the same bits. */
static void test_whole_runs_again_and_resumed_with_the_same_bits(void) {
  static const moe_cuda_maker makers[] = {MOE_CUDA_MAKER_OWN, MOE_CUDA_MAKER_CUBLAS};
  int m, run;
  for (m = 0; m < (double_path ? 2 : 1); ++m) {
    moe_cuda_options options = host_options();
    uint64_t hash[3];
    double_reset();
    options.maker = makers[m];
    options.cublas = double_path;
    for (run = 0; run < 3; ++run) {
      whole_side side;
      models_file file;
      moe_writer writer = models_writer(&file);
      moe_backend b;
      side.env = host_env();
      CHECK(!moe_cuda_open(&b, &options, &side.env), "%s", said);
      side.env.backend = &b;
      CHECK(!whole_begin(&side, MOE_ROUTER_TASK, 1) && whole_fit(&side, 0, 3), "%s", said);
      if (run == 2) {
        CHECK(!moe_checkpoint_write(side.trainer, NULL, NULL, &writer, &side.env), "%s", said);
        whole_end(&side);
        CHECK(!whole_begin(&side, MOE_ROUTER_TASK, 1), "%s", said);
        CHECK(!moe_checkpoint_read(side.trainer, NULL, file.data, file.used, &side.env), "%s",
              said);
        free(file.data);
      }
      CHECK(whole_fit(&side, 3, 6), "%s", said);
      hash[run] = whole_hash(&side);
      whole_end(&side);
      CHECK(!moe_cuda_close(&b), "left");
      HOST_IS_CLEAN();
    }
    CHECK(hash[0] == hash[1], "maker %d: two runs", (int)makers[m]);
    CHECK(hash[0] == hash[2], "maker %d: resumed", (int)makers[m]);
  }
}

/* What was trained on the card, saved and read again, answers alike on both. */
static void test_whole_saves_and_predicts_as_the_cpu(void) {
  static models_batch batch;
  static float scores[2][WHOLE_S * MOE_MAX_CLASSES];
  moe_cuda_options options = host_options();
  moe_limits limits = {WHOLE_M, WHOLE_S, 0, 0};
  moe_backend b;
  whole_side side;
  models_file file;
  int i;
  double_reset();
  side.env = host_env();
  CHECK(!moe_cuda_open(&b, &options, &side.env), "%s", said);
  side.env.backend = &b;
  CHECK(!whole_begin(&side, MOE_ROUTER_TASK, 2) && whole_fit(&side, 0, 3), "%s", said);
  file = models_written(side.model, &side.env);
  CHECK(file.used, "%s", said);
  whole_end(&side);
  memset(scores, 0, sizeof scores);
  for (i = 0; i < 2; ++i) {
    moe_env env = host_env();
    moe_model *model = NULL;
    moe_context *context = NULL;
    if (i) env.backend = &b;
    CHECK(!moe_model_read(&model, file.data, file.used, &env), "%s", said);
    CHECK(!moe_context_create(&context, model, &limits, &env), "%s", said);
    models_random_batch(&batch, model, WHOLE_S, WHOLE_LONGEST, 99);
    CHECK(!moe_forward(context, scores[i], &batch.b, &env), "%s", said);
    moe_context_free(context);
    moe_model_free(model);
  }
  free(file.data);
  CHECK(whole_apart(scores[0], scores[1], WHOLE_S * MOE_MAX_CLASSES) < 1e-4, "%g",
        whole_apart(scores[0], scores[1], WHOLE_S * MOE_MAX_CLASSES));
  CHECK(!moe_cuda_close(&b), "left");
  HOST_IS_CLEAN();
}

/* cuBLAS, or whoever is faster: by the double's clock a product of cuBLAS is half a launch. */
static void test_whole_products_by_cublas(void) {
  moe_cuda_options options = host_options();
  moe_cuda_counts counts;
  int maker;
  for (maker = 0; maker < 3; ++maker) {
    whole_side cpu, gpu;
    moe_backend b;
    int n;
    double_reset();
    options.maker = (moe_cuda_maker)maker;
    options.cublas = double_path;
    cpu.env = gpu.env = host_env();
    if (moe_cuda_open(&b, &options, &gpu.env)) {
      CHECK(!double_path && maker == MOE_CUDA_MAKER_CUBLAS && strstr(said, "cuBLAS"), "%s", said);
      SKIP("%s", said);
    }
    gpu.env.backend = &b;
    CHECK(!whole_begin(&cpu, MOE_ROUTER_TASK, 1) && !whole_begin(&gpu, MOE_ROUTER_TASK, 1), "%s",
          said);
    for (n = 0; n < 3; ++n) {
      CHECK(!whole_step(&cpu, n) && !whole_step(&gpu, n), "%s", said);
      CHECK_NEAR(cpu.loss, gpu.loss, 1e-4);
    }
    moe_cuda_count(&b, &counts);
    if (maker == MOE_CUDA_MAKER_OWN)
      CHECK(!counts.cublas && counts.own > 0, "%ld products of cuBLAS", (long)counts.cublas);
    else /* a real GPU may find cuBLAS slower */
      CHECK(counts.cublas > 0 || (!double_path && maker == MOE_CUDA_MAKER_AUTO),
            "maker %d: %ld products of our own, %ld of cuBLAS", maker, (long)counts.own,
            (long)counts.cublas);
    whole_end(&cpu), whole_end(&gpu);
    CHECK(!moe_cuda_close(&b), "left");
    HOST_IS_CLEAN();
  }
}

static long whole_called(const char *name) {
  int i;
  for (i = 0; i < control->names; ++i)
    if (!strcmp(control->called[i], name)) return control->times[i];
  return 0;
}

/* What is measured when a context is created: full, quarter and sixteenth batches of both widths,
   each product four times by each maker; and again only what was not. */
static void test_whole_measures_both_makers_once(void) {
  moe_cuda_options options = host_options();
  int training, i, again;
  if (!double_path) SKIP("%s", "a double counts the calls");
  options.maker = MOE_CUDA_MAKER_AUTO;
  options.cublas = double_path;
  for (training = 0; training < 2; ++training) {
    moe_limits limits = {WHOLE_M, WHOLE_S, training, 0};
    int kinds = training ? 3 : 1;
    moe_env env = host_env();
    moe_model *model;
    moe_backend b;
    const moe__cuda *cuda;
    double_reset();
    CHECK(!moe_cuda_open(&b, &options, &env), "%s", said);
    env.backend = &b;
    model = whole_model(MOE_ROUTER_TASK, 1, &env);
    cuda = (const moe__cuda *)b.user;
    for (again = 0; again < 2; ++again) {
      moe_config config = whole_config(MOE_ROUTER_TASK, 1);
      CHECK(b.supports(&b, &env, &config, &limits), "%s", said);
      CHECK(whole_called("cublasGemmEx") == 24 * kinds, "%ld calls of cuBLAS",
            whole_called("cublasGemmEx"));
      CHECK(whole_called("cuEventRecord") == 96 * kinds && cuda->choices == 6 * kinds, "%d choices",
            (int)cuda->choices);
    }
    for (i = 0; i < cuda->choices; ++i) {
      const moe__cuda_choice *c = &cuda->choice[i];
      int round = i / (2 * kinds);
      CHECK(c->form == i / 2 % kinds &&
                c->m == (round == 0   ? 54
                         : round == 1 ? 13
                                      : 3) &&
                c->n == (i % 2 ? 32 : 96) && c->k == 32 && !c->bf16 && c->blas == 1,
            "choice %d: form %d, m %d, n %d, k %d, blas %d", i, (int)c->form, (int)c->m, (int)c->n,
            (int)c->k, (int)c->blas);
    }
    moe_model_free(model);
    CHECK(!moe_cuda_close(&b), "left");
    HOST_IS_CLEAN();
  }
}

/* A run of a few steps in a thread of its own; or on a stream. */
typedef struct whole_alone {
  whole_side side;
  uint64_t hash;
} whole_alone;

static void *whole_alone_run(void *arg) {
  whole_alone *run = (whole_alone *)arg;
  run->hash = 0;
  if (!whole_begin(&run->side, MOE_ROUTER_TASK, 1) && whole_fit(&run->side, 0, 2))
    run->hash = whole_hash(&run->side);
  whole_end(&run->side);
  return NULL;
}

static void whole_alone_begin(whole_alone *run, moe_backend *b) {
  memset(run, 0, sizeof *run);
  moe_env_init(&run->side.env, MOE_ISA_AUTO); /* no log: threads would share it */
  run->side.env.backend = b;
}

/* Models and contexts of several threads on one backend: the bits of one alone. */
static void test_whole_runs_in_several_threads(void) {
  enum { THREADS = 3 };
  moe_cuda_options options = host_options();
  moe_env env = host_env();
  moe_backend b;
  whole_alone run[THREADS + 1];
  pthread_t thread[THREADS];
  int i;
  double_reset();
  CHECK(!moe_cuda_open(&b, &options, &env), "%s", said);
  for (i = 0; i <= THREADS; ++i) whole_alone_begin(&run[i], &b);
  whole_alone_run(&run[THREADS]);
  for (i = 0; i < THREADS; ++i)
    CHECK(!pthread_create(&thread[i], NULL, whole_alone_run, &run[i]), "no thread");
  for (i = 0; i < THREADS; ++i) pthread_join(thread[i], NULL);
  for (i = 0; i < THREADS; ++i)
    CHECK(run[i].hash && run[i].hash == run[THREADS].hash, "thread %d", i);
  CHECK(!moe_cuda_close(&b), "left");
  HOST_IS_CLEAN();
}

/* On a stream and in a context of the caller's, which stay the caller's. */
static void test_whole_runs_on_a_stream_of_the_callers(void) {
  moe_cuda_options options = host_options();
  moe_env env = host_env();
  moe_backend b[2];
  whole_alone run[2];
  const moe__cuda *cuda;
  void *context = NULL;
  int i;
  double_reset();
  for (i = 0; i < 2; ++i) {
    CHECK(!moe_cuda_open(&b[i], &options, &env), "%s", said);
    whole_alone_begin(&run[i], &b[i]);
    whole_alone_run(&run[i]);
    cuda = (const moe__cuda *)b[0].user;
    if (i) break;
    options.context = cuda->context;
    cuda->driver.cuCtxPushCurrent_v2(cuda->context);
    CHECK(!cuda->driver.cuStreamCreate(&options.stream, 0), "no stream");
    cuda->driver.cuCtxPopCurrent_v2(&context);
  }
  CHECK(run[0].hash && run[0].hash == run[1].hash, "other bits");
  CHECK(((const moe__cuda *)b[1].user)->own->stream == options.stream, "another stream");
  CHECK(!moe_cuda_close(&b[1]), "left");
  cuda->driver.cuCtxPushCurrent_v2(cuda->context);
  CHECK(!cuda->driver.cuStreamSynchronize(options.stream), "the caller's stream is gone");
  CHECK(!cuda->driver.cuStreamDestroy_v2(options.stream), "the caller's stream is gone");
  cuda->driver.cuCtxPopCurrent_v2(&context);
  CHECK(!moe_cuda_close(&b[0]), "left");
  HOST_IS_CLEAN();
}

static void run_whole(void) {
  RUN(test_whole_training_follows_the_cpu);
  RUN(test_whole_runs_again_and_resumed_with_the_same_bits);
  RUN(test_whole_saves_and_predicts_as_the_cpu);
  RUN(test_whole_products_by_cublas);
  RUN(test_whole_measures_both_makers_once);
  RUN(test_whole_runs_in_several_threads);
  RUN(test_whole_runs_on_a_stream_of_the_callers);
}
