/* The table of where the time goes: a clock that counts its readings makes it exact. */

static double readings; /* each reading is a second later than the one before */
static double counting_clock(void *user) {
  (void)user;
  return readings++;
}

static models_batch profile_batch;
static moe_task profile_tasks[MODELS_TASKS];

typedef struct pair {
  moe_model *model;
  moe_trainer *trainer;
} pair;

static pair make(moe_unit unit, const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_config config =
      models_config(unit == MOE_UNIT_BLOCK ? MOE_ROUTER_TASK_LEVEL : MOE_ROUTER_TASK, 3,
                    unit == MOE_UNIT_BLOCK ? 1 : 2);
  moe_train_config training;
  pair p = {NULL, NULL};
  config.unit = unit;
  models_tasks(profile_tasks);
  p.model = models_create(&config, profile_tasks, MODELS_TASKS, env);
  moe_train_config_init(&training);
  training.steps = 10;
  if (p.model && moe_trainer_create(&p.trainer, p.model, &limits, &training, env)) p.trainer = NULL;
  if (p.model) models_random_batch(&profile_batch, p.model, 12, 19, 5);
  return p;
}

static void drop(pair *p) {
  moe_trainer_free(p->trainer);
  moe_model_free(p->model);
}

static double sum_of(const moe_profile *profile) {
  double sum = 0;
  int i;
  for (i = 0; i < MOE_PROFILE_COUNT; ++i) sum += profile->seconds[i];
  return sum;
}

/* Passes in two layers of a model with gates: every reading but the first of a call ends a section,
   and takes one second. */
static void test_profile_sections_add_up_to_the_whole(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_profile profile;
  pair p = make(MOE_UNIT_FFN, &env);
  static const int64_t expected[MOE_PROFILE_COUNT] = {0, 1, 4, 2, 4, 2, 2, 1, 1,
                                                      1, 2, 2, 4, 2, 4, 1, 1, 1};
  int i;
  CHECK(p.trainer, "%s", said);
  moe_profile_init(&profile, counting_clock, NULL);
  env.profile = &profile;
  readings = 0;
  CHECK(moe_trainer_accumulate(p.trainer, &profile_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
        said);
  CHECK(moe_trainer_step(p.trainer, NULL, &env) == MOE_OK, "%s", said);
  for (i = 0; i < MOE_PROFILE_COUNT; ++i) {
    const char *name = moe_profile_text((moe_profile_section)i);
    CHECK(profile.times[i] == expected[i], "%s: %d times", name, (int)profile.times[i]);
    CHECK_NEAR(profile.seconds[i], (double)profile.times[i], 0);
  }
  CHECK_NEAR(sum_of(&profile), readings - 2, 0);
  drop(&p);
}

static void test_profile_knows_blocks_as_experts(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_profile profile;
  pair p = make(MOE_UNIT_BLOCK, &env);
  CHECK(p.trainer, "%s", said);
  moe_profile_init(&profile, counting_clock, NULL);
  env.profile = &profile;
  readings = 0;
  CHECK(moe_trainer_accumulate(p.trainer, &profile_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
        said);
  CHECK_NEAR(sum_of(&profile), readings - 1, 0);
  CHECK(profile.times[MOE_PROFILE_EXPERTS] == 6 && profile.times[MOE_PROFILE_GATES] > 6,
        "%d experts, %d gates", (int)profile.times[MOE_PROFILE_EXPERTS],
        (int)profile.times[MOE_PROFILE_GATES]);
  drop(&p);
}

/* Weights after two steps are the same bits with the table and without, for any number of threads.
 */
static void test_profile_changes_no_bit(void) {
  uint64_t hash[3];
  int i, step;
  for (i = 0; i < 3; ++i) {
    moe_env env = models_env(MOE_ISA_AUTO);
    moe_profile profile;
    moe_pool *pool = NULL;
    pair p;
    moe_profile_init(&profile, NULL, NULL);
    if (i > 0) env.profile = &profile;
    if (i == 2) CHECK(moe_pool_create_exact(&pool, 3, &env) == MOE_OK, "%s", said);
    p = make(MOE_UNIT_FFN, &env);
    CHECK(p.trainer, "%s", said);
    for (step = 0; step < 2; ++step) {
      CHECK(moe_trainer_accumulate(p.trainer, &profile_batch.b, 0, NULL, NULL, &env) == MOE_OK,
            "%s", said);
      CHECK(moe_trainer_step(p.trainer, NULL, &env) == MOE_OK, "%s", said);
    }
    hash[i] =
        models_hash(moe_model_weights(p.model), moe_model_parameters(p.model) * sizeof(float));
    drop(&p);
    moe_pool_free(pool);
  }
  CHECK(hash[0] == hash[1] && hash[0] == hash[2], "other weights");
}

/* The built-in clock goes forward, and the sections are no longer than the calls around them. */
static void test_profile_has_a_clock(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_profile profile;
  pair p = make(MOE_UNIT_FFN, &env);
  double began, passed, sum;
  int i;
  CHECK(p.trainer, "%s", said);
  moe_profile_init(&profile, NULL, NULL);
  env.profile = &profile;
  began = profile.clock(NULL);
  for (i = 0; i < 3; ++i)
    CHECK(moe_trainer_accumulate(p.trainer, &profile_batch.b, 0, NULL, NULL, &env) == MOE_OK, "%s",
          said);
  passed = profile.clock(NULL) - began;
  sum = sum_of(&profile);
  CHECK(sum > 0 && sum <= passed + 1e-6 && passed < 60, "%g s in sections, %g s in all", sum,
        passed);
  drop(&p);
}

static void test_profile_writes_a_table(void) {
  moe_profile profile;
  char text[2048], part[64], *lines[8], *at;
  size_t length, n = 0;
  moe_profile_init(&profile, NULL, NULL);
  length = moe_profile_write(text, sizeof text, &profile);
  CHECK(length == strlen(text) && strstr(text, "section\n") && strstr(text, " all\n"), "%s", text);
  profile.seconds[MOE_PROFILE_EXPERTS] = 0.75, profile.times[MOE_PROFILE_EXPERTS] = 12;
  profile.seconds[MOE_PROFILE_HEADS] = 0.00005, profile.times[MOE_PROFILE_HEADS] = 1;
  profile.seconds[MOE_PROFILE_PACKING] = 0.24995, profile.times[MOE_PROFILE_PACKING] = 1234567;
  length = moe_profile_write(text, sizeof text, &profile);
  CHECK(length == strlen(text), "%d bytes, %d written", (int)length, (int)strlen(text));
  CHECK(moe_profile_write(part, sizeof part, &profile) == length &&
            strlen(part) == sizeof part - 1 && !strncmp(part, text, sizeof part - 1),
        "cut: %s", part);
  for (n = 1; n <= 40; ++n) { /* within the head and just behind it */
    memset(part, '@', sizeof part);
    CHECK(moe_profile_write(part, n, &profile) == length && strlen(part) == n - 1 &&
              !strncmp(part, text, n - 1) && part[n] == '@',
          "%d bytes: %s", (int)n, part);
  }
  n = 0;
  CHECK(moe_profile_write(NULL, 0, &profile) == length, "without room");
  for (at = strtok(text, "\n"); at && n < 8; at = strtok(NULL, "\n")) lines[n++] = at;
  CHECK(n == 5, "%d lines", (int)n);
  CHECK(!strcmp(lines[1], "  75.0       750.0       12  experts"), "%s", lines[1]);
  CHECK(!strcmp(lines[2], "  25.0       250.0  1234567  packing of weights"), "%s", lines[2]);
  CHECK(!strcmp(lines[3], "   0.0         0.1        1  heads"), "%s", lines[3]);
  CHECK(!strcmp(lines[4], " 100.0      1000.0  1234580  all"), "%s", lines[4]);
  CHECK(!strcmp(moe_profile_text(MOE_PROFILE_COUNT), "unknown"), "%s",
        moe_profile_text(MOE_PROFILE_COUNT));
}

static void run_profile(void) {
  RUN(test_profile_sections_add_up_to_the_whole);
  RUN(test_profile_knows_blocks_as_experts);
  RUN(test_profile_changes_no_bit);
  RUN(test_profile_has_a_clock);
  RUN(test_profile_writes_a_table);
}
