/* One model that is not being trained, shared by threads: each has its own env, context, predictor
   and, some, a pool; meanwhile others quantise, extract, write and look up. test_sanitizers.sh runs
   this under ThreadSanitizer, and the part `race` too, a race on purpose, which must be found. */
#ifdef HAVE_POSIX
enum { THREADS = 4, THREADS_ROUNDS = 3, THREADS_MODELS = 4, THREADS_SCORES = 64 };

/* What all threads read. */
static struct {
  moe_model *model[THREADS_MODELS];
  moe_batch batch;
  float scores[THREADS_MODELS][THREADS_SCORES], text[THREADS_MODELS][8];
} shared;

static const int32_t threads_start[] = {0, 5, 9, 16}, threads_task[] = {0, 2, 1};
static const char threads_text[] = "a b \xc3\xa9 a, b";

static moe_status threads_scores(float *scores, const moe_model *model, const moe_env *env) {
  moe_limits limits = {16, 3, 0, 0};
  moe_context *context;
  moe_status status = moe_context_create(&context, model, &limits, env);
  if (status) return status;
  status = moe_forward(context, scores, &shared.batch, env);
  if (!status) status = moe_forward(context, scores, &shared.batch, env);
  moe_context_free(context);
  return status;
}

static moe_status threads_predict(float *score, const moe_model *model, const moe_env *env) {
  moe_predictor *predictor;
  int best;
  moe_status status = moe_predictor_create(&predictor, model, 1, env);
  if (status) return status;
  status = moe_predict_text(predictor, 0, threads_text, NULL, score, &best);
  moe_predictor_free(predictor);
  return status;
}

/* Copies of a model, as other threads use it. 1: all worked. */
static int threads_copy(const moe_model *model, int k, const moe_env *env) {
  static const int32_t task[] = {2, 0};
  moe_model *small = NULL, *low = NULL;
  models_file file = models_written(model, env);
  int good = file.used > 0;
  free(file.data);
  if (k != 1) good &= !moe_model_extract(&small, model, task, 2, NULL, env);
  if (k != 1) good &= !moe_model_quantize(&low, model, env);
  moe_model_free(small);
  moe_model_free(low);
  return good && moe_model_find_task(model, "rank") == 2 &&
         moe_model_find_tensor(model, "embeddings.LayerNorm.bias") >= 0;
}

/* NULL, or what went wrong. */
static void *threads_work(void *number) {
  int me = *(const int *)number, round, k;
  float scores[THREADS_SCORES], text[8];
  moe_pool *pool = NULL;
  moe_env env;
  moe_env_init(&env, me == 3 ? MOE_ISA_SCALAR : MOE_ISA_AUTO);
  if (me == 1 && moe_pool_create_exact(&pool, 2, &env)) return (void *)"pool";
  for (round = 0; round < THREADS_ROUNDS; ++round)
    for (k = 0; k < THREADS_MODELS; ++k) {
      const moe_model *model = shared.model[(k + me) % THREADS_MODELS];
      int which = (k + me) % THREADS_MODELS;
      if (threads_scores(scores, model, &env)) return (void *)"forward";
      if (memcmp(scores, shared.scores[which],
                 3 * sizeof(float) * (size_t)moe_model_max_classes(model)))
        return (void *)"other bits";
      if (threads_predict(text, model, &env)) return (void *)"predict";
      if (memcmp(text, shared.text[which], 6 * sizeof(float))) return (void *)"other answers";
      if (me >= 2 && !threads_copy(model, which, &env)) return (void *)"copies";
    }
  moe_pool_free(pool);
  return NULL;
}

/* Starts and joins the threads; NULL, or the first complaint. */
static const char *threads_run(void *(*work)(void *)) {
  static const int number[THREADS] = {0, 1, 2, 3};
  pthread_t thread[THREADS];
  const char *wrong = NULL;
  void *one;
  int i, n = 0;
  for (; n < THREADS; ++n)
    if (pthread_create(&thread[n], NULL, work, (void *)(uintptr_t)&number[n])) break;
  for (i = 0; i < n; ++i) {
    pthread_join(thread[i], &one);
    if (one) wrong = (const char *)one;
  }
  return n < THREADS ? "no thread" : wrong;
}

/* fp32, int8, one opened in place, and the dense one. */
static void test_threads_share_a_model(void) {
  static int32_t ids[16];
  moe_env env = models_env(MOE_ISA_AUTO);
  models_file file;
  void *raw, *block;
  size_t bytes;
  const char *wrong;
  int i;
  for (i = 0; i < 16; ++i) ids[i] = (i * 3 + 1) % 7;
  memset(&shared.batch, 0, sizeof shared.batch);
  shared.batch.S = 3;
  shared.batch.seq_start = threads_start;
  shared.batch.ids = ids;
  shared.batch.task = threads_task;
  shared.model[0] = small_model(MOE_ROUTER_TASK, &env);
  CHECK(!moe_model_quantize(&shared.model[1], shared.model[0], &env), "%s", said);
  file = models_written(shared.model[0], &env);
  CHECK(file.used && !moe_model_open_size(file.data, file.used, &bytes, &env), "%s", said);
  block = models_block(&raw, bytes);
  CHECK(!moe_model_open(&shared.model[2], file.data, file.used, block, bytes, &env), "%s", said);
  shared.model[3] = small_model(MOE_ROUTER_DENSE, &env);
  for (i = 0; i < THREADS_MODELS; ++i)
    CHECK(!threads_scores(shared.scores[i], shared.model[i], &env) &&
              !threads_predict(shared.text[i], shared.model[i], &env),
          "%s", said);
  wrong = threads_run(threads_work);
  CHECK(!wrong, "%s", wrong);
  for (i = 0; i < THREADS_MODELS; ++i)
    if (i != 2) moe_model_free(shared.model[i]);
  free(raw);
  free(file.data);
}

static void threads_count(void *arg, int32_t index) { ((int *)arg)[index] += 1; }

/* An env for programs that do not know the struct: it owns its threads, and a refusal leaves
   nothing behind. */
static void test_threads_of_an_env_from_the_heap(void) {
  static const int32_t wrong[] = {-1, 0, 257};
  moe_env env = models_env(MOE_ISA_AUTO), *own = NULL;
  int cells[100] = {0}, blocks = blocks_in_use, i, n, done = 0;
  CHECK(!moe_env_create(&own, MOE_ISA_SCALAR, 1, models_log, &env), "%s", said);
  CHECK(own->isa == MOE_ISA_SCALAR && own->threads == 1 && own->log == models_log &&
            own->log_user == &env && !own->parallel_for,
        "one thread needs no pool");
  moe_env_free(own);
  own = NULL;
  for (i = 0; i < 3; ++i)
    CHECK(moe_env_create(&own, MOE_ISA_AUTO, wrong[i], models_log, NULL) == MOE_E_ARGUMENT &&
              strstr(said, "threads, expected 1 to 256"),
          "%d threads: %s", (int)wrong[i], said);
  CHECK(moe_env_create(&own, (moe_isa)MOE_ISA_COUNT, 1, models_log, NULL) == MOE_E_UNSUPPORTED &&
            strstr(said, "cannot run"),
        "%s", said);
  for (n = 0; n < 10 && !done; ++n) {
    moe_status status;
    fail_at = allocations + n;
    status = moe_env_create(&own, MOE_ISA_AUTO, 256, models_log, NULL);
    fail_at = -1;
    done = status == MOE_OK;
    CHECK(done || (status == MOE_E_MEMORY && !own && blocks_in_use == blocks),
          "allocation %d: status %d, %d blocks left", n, (int)status, blocks_in_use - blocks);
  }
  CHECK(done && n == 3, "%d allocations", n - 1);
  CHECK(own->threads == moe_processors() && own->parallel_for, "%d threads", (int)own->threads);
  own->parallel_for(own->parallel_user, 100, threads_count, cells);
  for (i = 0; i < 100; ++i) CHECK(cells[i] == 1, "cell %d", i);
  moe_env_free(own);
  moe_env_free(NULL);
  CHECK(blocks_in_use == blocks, "%d blocks left", blocks_in_use - blocks);
}

/* What nobody may do: thread 0 changes weights that the others read. */
static void *threads_disturb(void *number) {
  float scores[THREADS_SCORES];
  moe_env env;
  int round;
  moe_env_init(&env, MOE_ISA_SCALAR);
  for (round = 0; round < 20; ++round) {
    if (*(const int *)number == 0)
      moe_model_weights(shared.model[0])[round] += 1;
    else if (threads_scores(scores, shared.model[0], &env))
      return (void *)"forward";
  }
  return NULL;
}

static void test_race_is_found_by_thread_sanitizer(void) {
  static int32_t ids[16];
  moe_env env = models_env(MOE_ISA_SCALAR);
  const char *wrong;
  memset(&shared.batch, 0, sizeof shared.batch);
  shared.batch.S = 3;
  shared.batch.seq_start = threads_start;
  shared.batch.ids = ids;
  shared.batch.task = threads_task;
  shared.model[0] = small_model(MOE_ROUTER_TASK, &env);
  CHECK(shared.model[0], "%s", said);
  wrong = threads_run(threads_disturb);
  CHECK(!wrong, "%s", wrong);
  moe_model_free(shared.model[0]);
}

static void run_threads(void) {
  RUN(test_threads_share_a_model);
  RUN(test_threads_of_an_env_from_the_heap);
}
static void run_race(void) { RUN(test_race_is_found_by_thread_sanitizer); }
#else
static void test_threads_need_posix(void) { SKIP("no POSIX threads here"); }
static void run_threads(void) { RUN(test_threads_need_posix); }
static void run_race(void) { RUN(test_threads_need_posix); }
#endif
