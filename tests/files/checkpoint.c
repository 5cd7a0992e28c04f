/* Checkpoints: training goes on with the very bits, and a file that does not fit changes nothing.
 */

enum { TASKS = 3, STEPS = 12, BATCH = 6 };

static float (*schedule)(void *user, int64_t t);
static void *schedule_user;
static float last_norm;           /* of the gradient, of the last step of any run */
static const moe_share *share_of; /* of the next run, which then does not clip */

/* A whole run: model, trainer, sampler. */
typedef struct run {
  moe_model *model;
  moe_trainer *trainer;
  moe_sampler sampler;
  int64_t rows[TASKS], used[TASKS];
} run;

typedef struct variant {
  uint64_t seed;
  int32_t ffn, max_len, classes;
  moe_router router;
  const char *name, *label;
  float high;
  int64_t rows;
  float tau;
} variant;

static const variant usual = {1, 12, 16, 3, MOE_ROUTER_TASK, "first", "yes", 5, 17, 2};

static int start_run(run *r, const variant *v, const moe_env *env) {
  const char *label[4];
  moe_config config;
  moe_task task[TASKS];
  moe_train_config train;
  moe_sampler_config sampling;
  moe_limits limits;
  memset(r, 0, sizeof *r);
  label[0] = v->label, label[1] = "no", label[2] = "maybe", label[3] = "rather";
  moe_config_init(&config);
  config.layers = 2;
  config.hidden = 8;
  config.ffn = v->ffn;
  config.heads = 2;
  config.vocab = 20;
  config.positions = 16;
  config.max_len = v->max_len;
  config.router = v->router;
  config.experts = 3;
  memset(task, 0, sizeof task);
  snprintf(task[0].name, sizeof task[0].name, "%s", v->name);
  task[0].classes = v->classes;
  task[0].label = label;
  snprintf(task[1].name, sizeof task[1].name, "second");
  task[1].kind = MOE_KIND_REGRESSION;
  task[1].classes = 1;
  task[1].high = v->high;
  snprintf(task[2].name, sizeof task[2].name, "third");
  task[2].classes = 2;
  moe_train_config_init(&train);
  train.lr = 1e-2f;
  train.steps = STEPS;
  train.warmup = 0.25f;
  train.weight_decay = 0.01f;
  train.clip_norm = share_of ? 0 : 1;
  train.share = share_of && share_of->count ? share_of : NULL;
  train.dropout = 0.1f;
  train.balance = 0.01f;
  train.jitter = 0.01f;
  train.seed = 9;
  memset(&limits, 0, sizeof limits);
  train.lr_schedule = schedule;
  train.lr_user = schedule_user;
  limits.tokens = 128;
  limits.sequences = BATCH;
  limits.training = 1;
  memset(&sampling, 0, sizeof sampling);
  sampling.sampling = MOE_SAMPLING_TEMPERATURE;
  sampling.tau = v->tau;
  sampling.seed = UINT64_MAX - 3;
  sampling.draws = STEPS * BATCH;
  r->rows[0] = v->rows, r->rows[1] = 5, r->rows[2] = 40;
  if (moe_model_create(&r->model, &config, task, TASKS, v->seed, env)) return 0;
  if (moe_model_pack(r->model, NULL, env) ||
      moe_trainer_create(&r->trainer, r->model, &limits, &train, env))
    return 0;
  return !moe_sampler_init(&r->sampler, &sampling, r->rows, r->used, TASKS, env);
}

static void end_run(run *r) {
  moe_trainer_free(r->trainer);
  moe_model_free(r->model);
}

/* One step on rows that are made from their numbers. */
static int step_run(run *r, float *loss, const moe_env *env) {
  int32_t ids[BATCH * 16], start[BATCH + 1], task[BATCH], s, i;
  float label[BATCH];
  moe_batch batch;
  start[0] = 0;
  for (s = 0; s < BATCH; ++s) {
    int64_t row;
    uint64_t state;
    int32_t length;
    moe_sampler_next(&r->sampler, &task[s], &row);
    state = (uint64_t)(task[s] * 1000 + row) * 77;
    length = 3 + (int32_t)(row % 9);
    for (i = 0; i < length; ++i)
      test_random(&state), ids[start[s] + i] = (int32_t)(state >> 40) % 20;
    start[s + 1] = start[s] + length;
    label[s] = (float)(row % 2);
  }
  memset(&batch, 0, sizeof batch);
  batch.S = BATCH;
  batch.seq_start = start;
  batch.ids = ids;
  batch.task = task;
  batch.label = label;
  return !moe_trainer_accumulate(r->trainer, &batch, 0, loss, NULL, env) &&
         !moe_trainer_step(r->trainer, &last_norm, env);
}

/* ---- two processes that divide the weights, played by two runs in turn ---- */

static double share_squares[2];
static const float *share_moments[2]; /* of the second share: m, v */
static int share_fetched, share_gathered;

static double share_sum(void *user, double mine) {
  const moe_share *share = (const moe_share *)user;
  share_squares[share->first > 0] = mine;
  return mine;
}

static void share_weights(void *user, float *weights, size_t n) {
  (void)user, (void)weights, (void)n;
  ++share_fetched;
}

/* The second run comes first, since it only gives. */
static void share_gather(void *user, const float *mine, float *all, size_t n) {
  const moe_share *share = (const moe_share *)user;
  int which = share_gathered++ % 2;
  if (!all) {
    share_moments[which] = mine;
    return;
  }
  memcpy(all, mine, share->count * sizeof *all);
  memcpy(all + share->count, share_moments[which], (n - share->count) * sizeof *all);
}

/* Starts both on n weights, cut at `at`. */
static int start_shares(run r[2], moe_share share[2], size_t at, size_t n, const moe_env *env) {
  int i, ok = 1;
  for (i = 0; i < 2; ++i) {
    share[i].first = i ? at : 0;
    share[i].count = i ? n - at : at;
    share[i].user = &share[i];
    share[i].sum = share_sum;
    share[i].weights = share_weights;
    share[i].moments = share_gather;
    share_of = &share[i];
    ok &= start_run(&r[i], &usual, env);
  }
  share_of = NULL;
  return ok;
}

/* A step of each, after which both have all weights. */
static int step_shares(run r[2], const moe_share share[2], const moe_env *env) {
  float loss, *w[2];
  int i, ok = 1;
  for (i = 0; i < 2; ++i) ok &= step_run(&r[i], &loss, env), w[i] = moe_model_weights(r[i].model);
  memcpy(w[1], w[0], share[0].count * sizeof(float));
  memcpy(w[0] + share[1].first, w[1] + share[1].first, share[1].count * sizeof(float));
  for (i = 0; i < 2; ++i) ok &= !moe_model_pack(r[i].model, NULL, env);
  return ok;
}

static void test_checkpoint_of_shares_is_that_of_one_process(void) {
  static const moe_share none = {0, 0, NULL, NULL, NULL, NULL};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_share share[2], other[2];
  run whole, part[2], later[2];
  models_file one, two;
  moe_writer to_one = models_writer(&one), to_two = models_writer(&two);
  size_t n, bytes;
  double norm;
  float loss;
  int i;
  share_of = &none;
  CHECK(start_run(&whole, &usual, &env), "%s", said);
  n = moe_model_parameters(whole.model), bytes = n * sizeof(float);
  CHECK(start_shares(part, share, 1003, n, &env), "%s", said);
  for (i = 0; i < 4; ++i)
    CHECK(step_run(&whole, &loss, &env) && step_shares(part, share, &env), "%s", said);
  CHECK(!memcmp(moe_model_weights(whole.model), moe_model_weights(part[0].model), bytes),
        "other weights");
  CHECK(share_fetched == 8, "%d", share_fetched);
  CHECK(!moe_checkpoint_write(whole.trainer, &whole.sampler, "note", &to_one, &env), "%s", said);
  CHECK(!moe_checkpoint_write(part[1].trainer, NULL, NULL, NULL, &env), "%s", said);
  CHECK(!moe_checkpoint_write(part[0].trainer, &part[0].sampler, "note", &to_two, &env), "%s",
        said);
  CHECK(share_gathered == 4 && one.used == two.used && !memcmp(one.data, two.data, one.used),
        "other files: %d", share_gathered);
  /* another division goes on from there */
  CHECK(start_shares(later, other, n - 40, n, &env), "%s", said);
  for (i = 0; i < 2; ++i)
    CHECK(!moe_checkpoint_read(later[i].trainer, &later[i].sampler, two.data, two.used, &env), "%s",
          said);
  CHECK(step_run(&whole, &loss, &env), "%s", said);
  norm = (double)last_norm;
  CHECK(step_shares(later, other, &env), "%s", said);
  CHECK(!memcmp(moe_model_weights(whole.model), moe_model_weights(later[1].model), bytes),
        "other weights");
  CHECK_NEAR(sqrt(share_squares[0] + share_squares[1]), norm, 1e-6);
  for (i = 0; i < 2; ++i) end_run(&part[i]), end_run(&later[i]);
  share[0].first = n, share[0].count = 1;
  share_of = &share[0];
  CHECK(!start_run(&part[0], &usual, &env) && strstr(said, "its share is 1 weights from"), "%s",
        said);
  share_of = NULL;
  moe_model_free(part[0].model);
  end_run(&whole);
  free(one.data), free(two.data);
}

static void test_checkpoint_resumes_with_the_same_bits(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  run whole, later;
  variant other = usual;
  float losses[STEPS], loss;
  models_file s, again;
  moe_writer writer = models_writer(&s);
  int i;
  CHECK(start_run(&whole, &usual, &env), "%s", said);
  for (i = 0; i < STEPS; ++i) {
    if (i == 5)
      CHECK(moe_checkpoint_write(whole.trainer, &whole.sampler, "note", &writer, &env) == MOE_OK,
            "%s", said);
    CHECK(step_run(&whole, &losses[i], &env), "step %d: %s", i, said);
  }
  other.seed = 2;
  CHECK(start_run(&later, &other, &env), "%s", said);
  CHECK(step_run(&later, &loss, &env), "%s", said); /* something to be overwritten */
  CHECK(moe_checkpoint_read(later.trainer, &later.sampler, s.data, s.used, &env) == MOE_OK, "%s",
        said);
  CHECK(moe_trainer_steps_done(later.trainer) == 5 && later.sampler.drawn == 5 * BATCH,
        "step and draws");
  writer = models_writer(&again);
  CHECK(moe_checkpoint_write(later.trainer, &later.sampler, "note", &writer, &env) == MOE_OK, "%s",
        said);
  CHECK(again.used == s.used && !memcmp(again.data, s.data, s.used),
        "written again it is the same file");
  for (i = 5; i < STEPS; ++i) {
    CHECK(step_run(&later, &loss, &env), "step %d: %s", i, said);
    CHECK(!memcmp(&loss, &losses[i], sizeof loss), "loss of step %d: %.9g, not %.9g", i,
          (double)loss, (double)losses[i]);
  }
  CHECK(!memcmp(moe_model_weights(later.model), moe_model_weights(whole.model),
                moe_model_parameters(whole.model) * sizeof(float)),
        "weights");
  CHECK(!said[0], "%s", said);
  end_run(&whole);
  end_run(&later);
  free(s.data);
  free(again.data);
}

static float falling(void *user, int64_t t) { return *(float *)user / (float)t; }

/* With a rate that was set (kept in the file), and with a function of the step (set again by the
   caller). */
static void test_checkpoint_keeps_rates_of_the_callers(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  float rate = 3e-2f, loss;
  int set, i;
  for (set = 0; set < 2; ++set) {
    run whole, later;
    models_file s;
    moe_writer writer = models_writer(&s);
    schedule = set ? NULL : falling;
    schedule_user = &rate;
    CHECK(start_run(&whole, &usual, &env) && start_run(&later, &usual, &env), "%s", said);
    if (set) CHECK(!moe_trainer_set_lr(whole.trainer, 0.1f / 3, &env), "%s", said);
    for (i = 0; i < STEPS; ++i) {
      if (i == 5)
        CHECK(!moe_checkpoint_write(whole.trainer, &whole.sampler, NULL, &writer, &env), "%s",
              said);
      CHECK(step_run(&whole, &loss, &env), "step %d: %s", i, said);
    }
    CHECK(!moe_checkpoint_read(later.trainer, &later.sampler, s.data, s.used, &env), "%s", said);
    CHECK(moe_trainer_lr(later.trainer) == (set ? 0.1f / 3 : rate / 6), "%g",
          (double)moe_trainer_lr(later.trainer));
    for (i = 5; i < STEPS; ++i) CHECK(step_run(&later, &loss, &env), "step %d: %s", i, said);
    CHECK(!memcmp(moe_model_weights(later.model), moe_model_weights(whole.model),
                  moe_model_parameters(whole.model) * sizeof(float)),
          "weights");
    /* a file without a rate takes a set one away */
    free(s.data);
    writer = models_writer(&s);
    CHECK(!moe_trainer_set_lr(whole.trainer, -1, &env) &&
              !moe_checkpoint_write(whole.trainer, NULL, NULL, &writer, &env) &&
              !moe_trainer_set_lr(later.trainer, 0.5f, &env) &&
              !moe_checkpoint_read(later.trainer, NULL, s.data, s.used, &env),
          "%s", said);
    CHECK(moe_trainer_lr(later.trainer) == moe_trainer_lr(whole.trainer), "none is set");
    free(s.data);
    end_run(&whole);
    end_run(&later);
  }
  schedule = NULL;
}

static void test_checkpoint_is_a_model_too(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  models_file s;
  moe_writer writer = models_writer(&s);
  moe_model *model = NULL;
  size_t bytes;
  unsigned char *block, *block_base, *file, *file_base;
  float loss;
  CHECK(start_run(&r, &usual, &env) && step_run(&r, &loss, &env), "%s", said);
  CHECK(moe_model_set_vocab(r.model, "[UNK]\n[CLS]\n[SEP]\n", 18, &env) == MOE_OK, "%s", said);
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, NULL, &writer, &env) == MOE_OK, "%s", said);
  CHECK(moe_model_read(&model, s.data, s.used, &env) == MOE_OK, "%s", said);
  CHECK(!memcmp(moe_model_weights(model), moe_model_weights(r.model),
                moe_model_parameters(model) * sizeof(float)),
        "weights");
  moe_model_free(model);
  CHECK(moe_model_open_size(s.data, s.used, &bytes, &env) == MOE_OK, "%s", said);
  block_base = (unsigned char *)malloc(bytes + 64);
  block = block_base + (64 - (uintptr_t)block_base % 64) % 64;
  file_base = (unsigned char *)malloc(s.used + 64);
  file = file_base + (64 - (uintptr_t)file_base % 64) % 64;
  memcpy(file, s.data, s.used);
  CHECK(moe_model_open(&model, file, s.used, block, bytes, &env) == MOE_OK, "%s", said);
  CHECK(!strcmp(moe_model_task(model, 0)->label[0], "yes"), "label");
  moe_model_free(model);
  free(block_base);
  free(file_base);
  end_run(&r);
  free(s.data);
}

/* Reads a checkpoint that must be refused, into a run that must not change. */
static void checkpoint_refused(run *r, moe_sampler *sampler, const void *file, size_t n,
                               const char *says) {
  moe_env env = models_env(MOE_ISA_AUTO);
  models_file before, after;
  moe_writer writer = models_writer(&before);
  CHECK(!moe_checkpoint_write(r->trainer, &r->sampler, NULL, &writer, &env), "%s", said);
  CHECK(moe_checkpoint_read(r->trainer, sampler, file, n, &env) == MOE_E_FORMAT &&
            strstr(said, says),
        "expected '%s', said '%s'", says, said);
  writer = models_writer(&after);
  CHECK(!moe_checkpoint_write(r->trainer, &r->sampler, NULL, &writer, &env), "%s", said);
  CHECK(before.used == after.used && !memcmp(before.data, after.data, before.used),
        "the trainer has changed");
  free(before.data);
  free(after.data);
}

static void test_checkpoint_names_what_differs(void) {
  static const variant others[] = {{1, 13, 16, 3, MOE_ROUTER_TASK, "first", "yes", 5, 17, 2},
                                   {1, 12, 15, 3, MOE_ROUTER_TASK, "first", "yes", 5, 17, 2},
                                   {1, 12, 16, 4, MOE_ROUTER_TASK, "first", "yes", 5, 17, 2},
                                   {1, 12, 16, 3, MOE_ROUTER_SHARED, "first", "yes", 5, 17, 2},
                                   {1, 12, 16, 3, MOE_ROUTER_TASK, "fist", "yes", 5, 17, 2},
                                   {1, 12, 16, 3, MOE_ROUTER_TASK, "first", "yep", 5, 17, 2},
                                   {1, 12, 16, 3, MOE_ROUTER_TASK, "first", "yes", 4, 17, 2},
                                   {1, 12, 16, 3, MOE_ROUTER_TASK, "first", "yes", 5, 18, 2},
                                   {1, 12, 16, 3, MOE_ROUTER_TASK, "first", "yes", 5, 17, 2.5f}};
  static const char *const says[] = {
      "configuration has ffn 12, the model has 13",
      "configuration has max_len 16, the model has 15",
      "task 0: 'first' of the checkpoint and 'first' of the model differ: number of classes",
      "router task, the model has shared",
      "'fist' of the model differ: name",
      "label names",
      "'second' of the model differ: range",
      "the number of rows of a task differs",
      "the sampler's settings"};
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  size_t i;
  float loss;
  models_file s;
  moe_writer writer = models_writer(&s);
  CHECK(start_run(&r, &usual, &env) && step_run(&r, &loss, &env), "%s", said);
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, NULL, &writer, &env) == MOE_OK, "%s", said);
  end_run(&r);
  for (i = 0; i < sizeof others / sizeof *others; ++i) {
    CHECK(start_run(&r, &others[i], &env), "%s", said);
    checkpoint_refused(&r, &r.sampler, s.data, s.used, says[i]);
    CHECK_STATE();
    end_run(&r);
  }
  CHECK(start_run(&r, &usual, &env) && step_run(&r, &loss, &env), "%s", said);
  free(s.data);
  writer = models_writer(&s);
  CHECK(moe_model_write(r.model, &writer, &env) == MOE_OK, "%s", said);
  checkpoint_refused(&r, &r.sampler, s.data, s.used, "not a checkpoint");
  free(s.data);
  writer = models_writer(&s);
  CHECK(moe_checkpoint_write(r.trainer, NULL, NULL, &writer, &env) == MOE_OK, "%s", said);
  checkpoint_refused(&r, &r.sampler, s.data, s.used, "without a sampler");
  CHECK(moe_checkpoint_read(r.trainer, NULL, s.data, s.used, &env) == MOE_OK, "%s", said);
  free(s.data);
  end_run(&r);
}

/* Without memory for its checks a checkpoint is refused, not read unchecked. */
static void test_checkpoint_reading_takes_no_failed_allocation(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  models_file s;
  moe_writer writer = models_writer(&s);
  int n, done = 0, blocks;
  CHECK(start_run(&r, &usual, &env), "%s", said);
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, NULL, &writer, &env) == MOE_OK, "%s", said);
  blocks = blocks_in_use;
  for (n = 0; n < 20 && !done; ++n) {
    moe_status status;
    said[0] = 0;
    fail_at = allocations + n;
    status = moe_checkpoint_read(r.trainer, &r.sampler, s.data, s.used, &env);
    done = allocations <= fail_at;
    fail_at = -1;
    CHECK(status == (done ? MOE_OK : MOE_E_MEMORY) && done == !said[0] && blocks_in_use == blocks,
          "allocation %d: status %d, '%s'", n, (int)status, said);
  }
  CHECK(done && n > 1, "%d allocations", n - 1);
  free(s.data);
  end_run(&r);
}

/* What `variant` does not have: how texts are cut, draws of one task in a row. */
static void test_checkpoint_names_another_cut_and_other_runs(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  models_file s, again;
  moe_writer writer = models_writer(&s);
  CHECK(start_run(&r, &usual, &env), "%s", said);
  r.sampler.config.run = 3;
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, NULL, &writer, &env) == MOE_OK, "%s", said);
  CHECK(moe_checkpoint_read(r.trainer, &r.sampler, s.data, s.used, &env) == MOE_OK, "%s", said);
  writer = models_writer(&again);
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, NULL, &writer, &env) == MOE_OK, "%s", said);
  CHECK(again.used == s.used && !memcmp(again.data, s.data, s.used), "written again");
  free(again.data);
  r.sampler.config.run = 4;
  checkpoint_refused(&r, &r.sampler, s.data, s.used, "the sampler's settings");
  CHECK_STATE();
  r.sampler.config.run = 3;
  ((moe_config *)moe_model_config(r.model))->truncate = MOE_TRUNCATE_RIGHT;
  checkpoint_refused(&r, &r.sampler, s.data, s.used,
                     "configuration has truncate longest, the model has right");
  free(s.data);
  end_run(&r);
}

static void test_checkpoint_damaged_changes_nothing(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  models_file s;
  moe_writer writer = models_writer(&s);
  float loss;
  uint64_t state = 3;
  size_t data, i;
  int round, taken = 0;
  CHECK(start_run(&r, &usual, &env) && step_run(&r, &loss, &env), "%s", said);
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, "a note", &writer, &env) == MOE_OK, "%s", said);
  CHECK(step_run(&r, &loss, &env), "%s", said);
  data = 8 + ((size_t)s.data[0] | (size_t)s.data[1] << 8 | (size_t)s.data[2] << 16);
  for (i = 0; i < s.used; i += i < data ? 211 : 1733) {
    unsigned char *copy = (unsigned char *)malloc(i + 1);
    memcpy(copy, s.data, i);
    checkpoint_refused(&r, &r.sampler, copy, i, "");
    free(copy);
    CHECK_STATE();
  }
  for (round = 0; round < 1000; ++round) {
    unsigned char *copy = (unsigned char *)malloc(s.used);
    memcpy(copy, s.data, s.used);
    test_random(&state);
    i = (size_t)(state >> 33) % data;
    copy[i] = (unsigned char)(state >> 20);
    said[0] = 0;
    if (moe_checkpoint_read(r.trainer, &r.sampler, copy, s.used, &env))
      CHECK(said[0], "a sentence");
    else
      ++taken;
    free(copy);
  }
  printf("        %d of %d damaged checkpoints were still sound\n", taken, round);
  CHECK(taken < 200, "%d", taken);
  end_run(&r);
  free(s.data);
}

static void test_checkpoint_with_impossible_numbers_is_refused(void) {
  static const unsigned char minus_one[4] = {0, 0, 0x80, 0xbf};
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  models_file s;
  moe_writer writer = models_writer(&s);
  float loss;
  int64_t drawn, used;
  CHECK(start_run(&r, &usual, &env) && step_run(&r, &loss, &env), "%s", said);
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, NULL, &writer, &env) == MOE_OK, "%s", said);
  memcpy(s.data + s.used - 4, minus_one, 4); /* the second moment of the last weight */
  checkpoint_refused(&r, &r.sampler, s.data, s.used, "is below 0");
  free(s.data);
  drawn = r.sampler.drawn, used = r.used[0];
  r.sampler.drawn = INT64_MAX; /* the next row would be one more */
  writer = models_writer(&s);
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, NULL, &writer, &env) == MOE_OK, "%s", said);
  r.sampler.drawn = drawn;
  checkpoint_refused(&r, &r.sampler, s.data, s.used, "moe.checkpoint: ");
  free(s.data);
  r.used[0] = INT64_MAX;
  writer = models_writer(&s);
  CHECK(moe_checkpoint_write(r.trainer, &r.sampler, NULL, &writer, &env) == MOE_OK, "%s", said);
  r.used[0] = used;
  checkpoint_refused(&r, &r.sampler, s.data, s.used, "moe.checkpoint: ");
  free(s.data);
  end_run(&r);
}

/* A copy of a file with the first `from` in its header replaced. */
static void edited(unsigned char **out, size_t *bytes, const models_file *s, const char *from,
                   const char *to) {
  size_t header = (size_t)s->data[0] | (size_t)s->data[1] << 8 | (size_t)s->data[2] << 16, at, k;
  size_t a = strlen(from), b = strlen(to), longer;
  unsigned char *copy = (unsigned char *)malloc(s->used + b + 8), *end;
  *out = copy;
  *bytes = 0;
  for (at = 8; at + a <= 8 + header && memcmp(s->data + at, from, a); ++at) continue;
  CHECK(at + a <= 8 + header, "no %s in the header", from);
  longer = header - a + b;
  memcpy(copy, s->data, at);
  memcpy(copy + at, to, b);
  end = copy + at + b;
  memcpy(end, s->data + at + a, 8 + header - at - a);
  end += 8 + header - at - a;
  while (longer % 8) *end++ = ' ', ++longer;
  memcpy(end, s->data + 8 + header, s->used - 8 - header);
  for (k = 0; k < 8; ++k) copy[k] = (unsigned char)(longer >> 8 * k & 255);
  *bytes = s->used - header + longer;
}

static void test_checkpoint_with_a_member_twice_is_refused(void) {
  static const struct {
    const char *from, *to, *says;
  } edits[] = {
      {"{\\\"step\\\":", "{\\\"step\\\":1,\\\"step\\\":", "a member is listed twice"},
      {"{\\\"step\\\":", "{\\\"lr\\\":1,\\\"lr\\\":1,\\\"step\\\":", "a member is listed twice"},
      {"{\\\"step\\\":", "{\\\"note\\\":\\\"x\\\",\\\"step\\\":", "a member is listed twice"},
      {"{\\\"step\\\":", "{\\\"sampler\\\":{},\\\"step\\\":", "of the sampler is missing"},
      {"{\\\"step\\\":1,", "{", "step is missing"},
      {"{\\\"step\\\":", "{\\\"stop\\\":1,\\\"step\\\":", "unknown member"},
      {"{\\\"step\\\":", "{\\\"lr\\\":-1,\\\"step\\\":", "lr is out of range, expected 0 to 1e30"},
      {"{\\\"sampling\\\":", "{\\\"tau\\\":2,\\\"sampling\\\":", "sampler is listed twice"},
      {"{\\\"sampling\\\":", "{\\\"drawn\\\":6,\\\"sampling\\\":", "sampler is listed twice"},
      {"{\\\"sampling\\\":", "{\\\"used\\\":[1,2,3],\\\"sampling\\\":", "sampler is listed twice"},
      {"{\\\"sampling\\\":", "{\\\"runs\\\":1,\\\"sampling\\\":", "unknown member of the sampler"},
      {"\\\"drawn\\\":6,", "", "a member of the sampler is missing"}};
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  models_file s;
  moe_writer writer = models_writer(&s);
  float loss;
  size_t i, bytes = 0;
  unsigned char *copy;
  CHECK(start_run(&r, &usual, &env) && step_run(&r, &loss, &env), "%s", said);
  CHECK(!moe_checkpoint_write(r.trainer, &r.sampler, "n", &writer, &env), "%s", said);
  edited(&copy, &bytes, &s, "{\\\"step\\\":", "{\\\"lr\\\":0.25,\\\"step\\\":");
  CHECK(!moe_checkpoint_read(r.trainer, &r.sampler, copy, bytes, &env) &&
            moe_trainer_lr(r.trainer) == 0.25f,
        "%s", said);
  free(copy);
  for (i = 0; i < sizeof edits / sizeof *edits; ++i) {
    edited(&copy, &bytes, &s, edits[i].from, edits[i].to);
    if (bytes) checkpoint_refused(&r, &r.sampler, copy, bytes, edits[i].says);
    free(copy);
    CHECK_STATE();
  }
  free(s.data);
  end_run(&r);
}

/* After a training that diverged, the last good checkpoint is worth more than the newest. */
static void test_checkpoint_that_cannot_be_read_is_not_written(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  float loss, kept;
  int i;
  CHECK(start_run(&r, &usual, &env) && step_run(&r, &loss, &env), "%s", said);
  CHECK(moe_checkpoint_save(r.trainer, &r.sampler, NULL, "build/checkpoint_nan", &env) == MOE_OK,
        "%s", said);
  kept = moe_model_weights(r.model)[3];
  for (i = 0; i < 2; ++i) {
    moe_model_weights(r.model)[3] = i ? INFINITY : NAN;
    said[0] = 0;
    CHECK(moe_checkpoint_save(r.trainer, &r.sampler, NULL, "build/checkpoint_nan", &env) ==
              MOE_E_NONFINITE,
          "%s", said);
    CHECK(strstr(said, "tensor ") && strstr(said, "element 3 is ") &&
              strstr(said, "nothing is written"),
          "%s", said);
  }
  moe_model_weights(r.model)[3] = kept;
  CHECK(moe_checkpoint_load(r.trainer, &r.sampler, "build/checkpoint_nan", &env) == MOE_OK,
        "the old one: %s", said);
  CHECK(step_run(&r, &loss, &env), "and on it goes: %s", said);
  remove("build/checkpoint_nan");
  end_run(&r);
}

static void test_checkpoint_note_comes_back(void) {
  static const char note[] = "--lr 1e-3 \"quoted\" \\ \n\t \xc3\xa9 \xff end";
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  models_file s;
  moe_writer writer = models_writer(&s);
  char text[100];
  size_t length = 99;
  CHECK(start_run(&r, &usual, &env), "%s", said);
  CHECK(moe_checkpoint_write(r.trainer, NULL, note, &writer, &env) == MOE_OK, "%s", said);
  CHECK(moe_checkpoint_note(NULL, 0, &length, s.data, s.used, &env) == MOE_OK &&
            length == sizeof note - 1,
        "%zu", length);
  CHECK(moe_checkpoint_note(text, sizeof text, &length, s.data, s.used, &env) == MOE_OK &&
            !strcmp(text, note),
        "%s", text);
  CHECK(moe_checkpoint_note(text, 5, &length, s.data, s.used, &env) == MOE_OK &&
            !strcmp(text, "--lr") && length == sizeof note - 1,
        "%s", text);
  free(s.data);
  writer = models_writer(&s);
  CHECK(moe_checkpoint_write(r.trainer, NULL, NULL, &writer, &env) == MOE_OK, "%s", said);
  CHECK(moe_checkpoint_note(text, sizeof text, &length, s.data, s.used, &env) == MOE_OK &&
            length == 0 && !*text,
        "none");
  free(s.data);
  end_run(&r);
}

static void test_checkpoint_survives_kill_9(void) {
#ifdef HAVE_POSIX
  const char *path = "build/checkpoint_kill";
  moe_env env = models_env(MOE_ISA_AUTO);
  run r;
  float loss;
  int round, whole = 0;
  struct timespec pause_ = {0, 0};
  CHECK(start_run(&r, &usual, &env), "%s", said);
  CHECK(step_run(&r, &loss, &env) &&
            moe_checkpoint_save(r.trainer, &r.sampler, NULL, path, &env) == MOE_OK,
        "%s", said);
  for (round = 0; round < 12; ++round) {
    pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (!child)
      for (;;)
        if (moe_checkpoint_save(r.trainer, &r.sampler, NULL, path, &env)) _exit(1);
    pause_.tv_nsec = 500000 * (round + 1);
    nanosleep(&pause_, NULL);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    whole += moe_checkpoint_load(r.trainer, &r.sampler, path, &env) == MOE_OK;
  }
  CHECK(whole == round, "%d of %d: %s", whole, round, said);
  remove(path);
  remove("build/checkpoint_kill.tmp");
  end_run(&r);
#else
  SKIP("no kill here");
#endif
}

static void run_checkpoint(void) {
  RUN(test_checkpoint_resumes_with_the_same_bits);
  RUN(test_checkpoint_of_shares_is_that_of_one_process);
  RUN(test_checkpoint_keeps_rates_of_the_callers);
  RUN(test_checkpoint_is_a_model_too);
  RUN(test_checkpoint_names_what_differs);
  RUN(test_checkpoint_reading_takes_no_failed_allocation);
  RUN(test_checkpoint_names_another_cut_and_other_runs);
  RUN(test_checkpoint_damaged_changes_nothing);
  RUN(test_checkpoint_with_impossible_numbers_is_refused);
  RUN(test_checkpoint_with_a_member_twice_is_refused);
  RUN(test_checkpoint_that_cannot_be_read_is_not_written);
  RUN(test_checkpoint_note_comes_back);
  RUN(test_checkpoint_survives_kill_9);
}
