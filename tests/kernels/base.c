/* Statuses, sentences, random numbers, the pool of threads. */

static void test_base_formats_sentences(void) {
  char text[128];
  moe__format(text, sizeof text, "%s %d %u %lld %zu %g %g %g %g %%", "a", -7, 7u, -1234567890123LL,
              (size_t)9, 0.5, 1e-7, 123456789.0, 100.0);
  CHECK(!strcmp(text, "a -7 7 -1234567890123 9 0.5 1e-7 1.23457e8 100 %"), "%s", text);
  moe__format(text, 4, "%s", "abcdef");
  CHECK(!strcmp(text, "abc"), "%s", text);
}

/* Every instruction set by the name that it has, and no other name. */
static void test_base_knows_instruction_sets_by_name(void) {
  int i;
  for (i = 0; i < MOE_ISA_COUNT; ++i)
    CHECK(moe_isa_from_name(moe_isa_name((moe_isa)i)) == (moe_isa)i, "%s",
          moe_isa_name((moe_isa)i));
  CHECK(moe_isa_from_name("avx") == MOE_ISA_COUNT, "avx");
}

/* Numbers at the edges of their types and of six digits; then every text cut at every length. */
static void test_base_formats_every_number(void) {
  static const struct {
    double value;
    const char *text;
  } some[] = {{0, "0"},
              {-0.5, "-0.5"},
              {1, "1"},
              {10, "10"},
              {0.1, "0.1"},
              {0.0001, "0.0001"},
              {0.00001, "1e-5"},
              {0.00012345, "0.00012345"},
              {99999.5, "99999.5"},
              {100000, "100000"},
              {999999, "999999"},
              {1000000, "1e6"},
              {999999.4, "999999"},
              {999999.6, "1e6"},
              {123456, "123456"},
              {1234567, "1.23457e6"},
              {-1e30, "-1e30"},
              {3.4028235e38, "3.40282e38"},
              {1e-38, "1e-38"},
              {2.5, "2.5"},
              {1e300, "1e300"},
              {0.02, "0.02"},
              {12.0625, "12.0625"},
              {HUGE_VAL, "inf"},
              {-HUGE_VAL, "-inf"}};
  char text[200], cut[200];
  size_t i, n;
  for (i = 0; i < sizeof some / sizeof *some; ++i) {
    moe__format(text, sizeof text, "%g", some[i].value);
    CHECK(!strcmp(text, some[i].text), "%.9g is '%s'", some[i].value, text);
  }
  moe__format(text, sizeof text, "%g", (double)NAN);
  CHECK(!strcmp(text, "nan"), "%s", text);
  moe__format(text, sizeof text, "%d %d %u %u %lld %lld %llu %c%c %s|", INT32_MIN, INT32_MAX, 0u,
              UINT32_MAX, (long long)INT64_MIN, (long long)INT64_MAX,
              (unsigned long long)UINT64_MAX, 'x', '%', "");
  CHECK(!strcmp(text, "-2147483648 2147483647 0 4294967295 -9223372036854775808 "
                      "9223372036854775807 18446744073709551615 x% |"),
        "%s", text);
  moe__format(text, sizeof text, "%zu %lu %ld %zu", SIZE_MAX, (unsigned long)LONG_MAX,
              (long)LONG_MIN, (size_t)0);
  snprintf(cut, sizeof cut, "%zu %lu %ld 0", SIZE_MAX, (unsigned long)LONG_MAX, (long)LONG_MIN);
  CHECK(!strcmp(text, cut), "%s, not %s", text, cut);
  for (n = 1; n < 60; ++n) {
    memset(cut, '#', sizeof cut);
    moe__format(text, sizeof text, "%s %d %llu %g %c%% %g", "abc", -12345, 9876543210ull, -0.03125,
                'q', 1e-10);
    moe__format(cut, n, "%s %d %llu %g %c%% %g", "abc", -12345, 9876543210ull, -0.03125, 'q',
                1e-10);
    CHECK(strlen(cut) == (strlen(text) < n ? strlen(text) : n - 1) &&
              !strncmp(cut, text, strlen(cut)) && cut[n] == '#',
          "%zu bytes: '%s'", n, cut);
  }
}

static void keep_sentence(void *user, moe_status status, const char *sentence) {
  (void)status;
  strcpy((char *)user, sentence);
}

static void test_base_sentences_hold_nothing_that_a_terminal_obeys(void) {
  char kept[600];
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = keep_sentence;
  env.log_user = kept;
  moe__fail(&env, MOE_E_FORMAT, "label '%s'",
            "a\x1b[2Jb\n\x7f \xc2\x9b"
            "31m \x9b \xc3\xa9 \xc2\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \xe2\x82\xac\x9b");
  CHECK(!strcmp(kept, "label 'a?[2Jb?? \xc2?31m ? \xc3\xa9 \xc2\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 "
                      "\xe2\x82\xac?'"),
        "%s", kept);
}

static void test_random_permutation_hits_every_row_once(void) {
  static unsigned char seen[1000];
  uint64_t n, i;
  for (n = 1; n <= 1000; n = n * 3 + 1) {
    memset(seen, 0, sizeof seen);
    for (i = 0; i < n; ++i) {
      uint64_t j = moe__permute(42, i, n);
      CHECK(j < n && !seen[j], "n %d: row %d twice or outside", (int)n, (int)j);
      seen[j] = 1;
    }
  }
}

static void test_random_normal_has_mean_0_and_deviation_1(void) {
  double sum = 0, square = 0;
  int i, n = 200000;
  for (i = 0; i < n; ++i) {
    double v = (double)moe__normal(7, (uint64_t)i);
    sum += v;
    square += v * v;
  }
  CHECK_NEAR(sum / n, 0, 0.01);
  CHECK_NEAR(square / n, 1, 0.02);
  for (i = 1; i < 1000; ++i)
    CHECK_NEAR(moe__log_double(i / 1000.0), log(i / 1000.0), 2e-15 * (1 - log(i / 1000.0)));
}

static void add_tile(void *arg, int32_t tile, int32_t slot) {
  int32_t *cells = (int32_t *)arg;
  (void)slot;
  cells[tile] += tile + 1;
}

static void test_parallel_runs_every_tile_once(void) {
  static int32_t cells[5000];
  int32_t threads, round, i;
  for (threads = 1; threads <= 8; threads = threads < 3 ? threads + 1 : 8) {
    moe_env env;
    moe_pool *pool;
    moe_env_init(&env, MOE_ISA_AUTO);
    CHECK(moe_pool_create_exact(&pool, threads, &env) == MOE_OK, "threads %d", (int)threads);
    memset(cells, 0, sizeof cells);
    for (round = 0; round < 50; ++round)
      moe__parallel(&env, 100 * (round % 50 + 1), add_tile, cells);
    for (i = 0; i < 5000; ++i)
      CHECK(cells[i] == (i + 1) * (50 - i / 100), "cell %d is %d", (int)i, (int)cells[i]);
    moe_pool_free(pool);
    if (threads == 8) break;
  }
}

/* Tile 0 and tile 1 wait for each other: the pool's own thread cannot run both. */
static void meet(void *arg, int32_t tile, int32_t slot) {
  volatile int32_t *here = (volatile int32_t *)arg;
  double until = moe__seconds(NULL) + 20;
  (void)slot;
  MOE__STORE(&here[tile], 1);
  while (!MOE__LOAD(&here[1 - tile]) && moe__seconds(NULL) < until) continue;
  if (!MOE__LOAD(&here[1 - tile])) here[2] = 1;
}

static void test_parallel_helpers_take_part(void) {
  int32_t here[3] = {0, 0, 0};
  moe_env env;
  moe_pool *pool;
  moe_env_init(&env, MOE_ISA_AUTO);
  CHECK(moe_pool_create_exact(&pool, 2, &env) == MOE_OK && env.threads == 2, "a pool");
  moe__parallel(&env, 2, meet, here);
  CHECK(!here[2], "one thread runs both tiles");
  moe_pool_free(pool);
}

/* A sleeping helper is woken. */
static void test_parallel_wakes_helpers(void) {
  int32_t here[3] = {0, 0, 0};
  double until = moe__seconds(NULL) + 60;
  moe_env env;
  moe_pool *pool;
  moe_env_init(&env, MOE_ISA_AUTO);
  CHECK(moe_pool_create_exact(&pool, 2, &env) == MOE_OK, "a pool");
  while (!MOE__LOAD(&pool->sleeping) && moe__seconds(NULL) < until) MOE__YIELD();
  CHECK(MOE__LOAD(&pool->sleeping) == 1, "the helper never sleeps");
  moe__parallel(&env, 2, meet, here);
  CHECK(!here[2], "one thread runs both tiles");
  moe_pool_free(pool);
}

static void test_parallel_pool_has_1_to_256_threads(void) {
  static const int32_t wrong[] = {-1, 0, 257, INT32_MAX};
  static int32_t cells[1000];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_pool *pool = NULL;
  int i;
  for (i = 0; i < 4; ++i)
    CHECK(moe_pool_create_exact(&pool, wrong[i], &env) == MOE_E_ARGUMENT && !pool &&
              strstr(said, "1 to 256 threads"),
          "%d: %s", (int)wrong[i], said);
  CHECK(moe_pool_create_exact(&pool, 256, &env) == MOE_OK && env.threads == 256, "%s", said);
  moe__parallel(&env, 1000, add_tile, cells);
  for (i = 0; i < 1000; ++i) CHECK(cells[i] == i + 1, "cell %d is %d", i, (int)cells[i]);
  moe_pool_free(pool);
}

/* A pool runs no more threads than there are processors, and says how many; none where their number
   is out of range. */
static void test_parallel_pool_has_no_more_threads_than_processors(void) {
  static int32_t cells[100];
  static const int32_t asked[] = {1, 2, 3, 64, 256}, wrong[] = {-1, 0, 257};
  int32_t processors = moe_processors(), i, j;
  CHECK(processors >= 1 && processors <= 256, "%d processors", (int)processors);
  for (i = 0; i < 5; ++i) {
    moe_env env;
    moe_pool *pool = NULL;
    moe_env_init(&env, MOE_ISA_AUTO);
    CHECK(moe_pool_create(&pool, asked[i], &env) == MOE_OK, "threads %d", (int)asked[i]);
    CHECK(env.threads == (asked[i] < processors ? asked[i] : processors), "%d threads of %d",
          (int)env.threads, (int)asked[i]);
    memset(cells, 0, sizeof cells);
    moe__parallel(&env, 100, add_tile, cells);
    for (j = 0; j < 100; ++j) CHECK(cells[j] == j + 1, "cell %d is %d", (int)j, (int)cells[j]);
    moe_pool_free(pool);
  }
  for (i = 0; i < 3; ++i) {
    moe_env env;
    moe_pool *pool = NULL;
    moe_env_init(&env, MOE_ISA_AUTO);
    CHECK(moe_pool_create(&pool, wrong[i], &env) == MOE_E_ARGUMENT && !pool && env.threads == 1,
          "%d threads", (int)wrong[i]);
  }
}

#if defined(__linux__)
/* On one processor: as many as it may use, and threads that are there already get each other's work
   done in little time. */
static void test_parallel_pool_knows_its_affinity(void) {
  static int32_t cells[100];
  cpu_set_t all, one;
  moe_env env;
  moe_pool *pool, *small;
  size_t cpu = 0;
  int32_t round, i;
  double began, alone, shared;
  CHECK(!sched_getaffinity(0, sizeof all, &all), "affinity");
  CHECK(moe_processors() == CPU_COUNT(&all), "%d processors, not %d", (int)moe_processors(),
        CPU_COUNT(&all));
  while (!CPU_ISSET(cpu, &all)) ++cpu;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  CHECK(!sched_setaffinity(0, sizeof one, &one), "affinity");
  CHECK(moe_processors() == 1, "%d processors", (int)moe_processors());
  moe_env_init(&env, MOE_ISA_AUTO);
  CHECK(moe_pool_create(&small, 4, &env) == MOE_OK && env.threads == 1, "%d threads",
        (int)env.threads);
  moe_pool_free(small);
  CHECK(moe_pool_create_exact(&pool, 4, &env) == MOE_OK && env.threads == 4, "%d threads",
        (int)env.threads); /* they inherit it */
  memset(cells, 0, sizeof cells);
  began = moe__seconds(NULL);
  for (round = 0; round < 20000; ++round)
    for (i = 0; i < 100; ++i) add_tile(cells, i, 0);
  alone = moe__seconds(NULL) - began;
  memset(cells, 0, sizeof cells);
  began = moe__seconds(NULL);
  for (round = 0; round < 20000; ++round) moe__parallel(&env, 100, add_tile, cells);
  shared = moe__seconds(NULL) - began;
  for (i = 0; i < 100; ++i)
    CHECK(cells[i] == 20000 * (i + 1), "cell %d is %d", (int)i, (int)cells[i]);
  CHECK(shared < alone + 5, "%g s, %g s alone", shared,
        alone); /* at full speed a helper would wait for a millisecond, 20000 times */
  moe_pool_free(pool);
  CHECK(!sched_setaffinity(0, sizeof all, &all), "affinity");
}
#endif

/* Asked for kernels that this machine cannot run: a status, and an environment that can. */
static void test_base_forced_isa_that_is_missing_is_refused(void) {
  moe_isa best, isa;
  moe_env env;
  int missing = 0, i;
  CHECK(moe_env_init(&env, MOE_ISA_AUTO) == MOE_OK, "auto");
  best = env.isa;
  for (i = -1; i <= MOE_ISA_COUNT; ++i) {
    isa = (moe_isa)i;
    memset(&env, 0xa5, sizeof env);
    if (moe_isa_available(isa)) {
      CHECK(moe_env_init(&env, isa) == MOE_OK && env.isa == (i == MOE_ISA_AUTO ? best : isa), "%s",
            moe_isa_name(isa));
      continue;
    }
    ++missing;
    CHECK(moe_env_init(&env, isa) == MOE_E_UNSUPPORTED && env.isa == best && env.threads == 1 &&
              !env.log,
          "%s", moe_isa_name(isa));
  }
  CHECK(missing >= 3, "no machine has NEON and AVX2: %d are missing",
        missing); /* and the numbers that name none */
}

/* Whether this compiler makes one sum of a*b + c, which would change bits. */
static void test_base_knows_whether_sums_are_contracted(void) {
  volatile float x[2] = {1.000244140625f, -1}; /* the product ends in a bit that rounding takes */
  moe_env env;
  int fuses = moe__fuses(x);
#ifdef MOE__X86
  if (moe_isa_available(MOE_ISA_AVX2)) fuses |= moe__fuses_in_kernels(x);
#endif
  moe_env_init(&env, MOE_ISA_AUTO);
  CHECK(!(env.cpu_flags & MOE_CPU_CONTRACTED) == !fuses, "flags %x", (unsigned)env.cpu_flags);
}

/* A binding compares these sizes with those of its own structs. */
static void test_base_tells_the_size_of_each_struct(void) {
#define SIZED(type)                                                                                \
  { #type, sizeof(type) }
  static const struct {
    const char *name;
    size_t bytes;
  } types[] = {SIZED(moe_env),
               SIZED(moe_profile),
               SIZED(moe_backend),
               SIZED(moe_mat),
               SIZED(moe_routes),
               SIZED(moe_route_options),
               SIZED(moe_config),
               SIZED(moe_task),
               SIZED(moe_batch),
               SIZED(moe_tensor),
               SIZED(moe_writer),
               SIZED(moe_view),
               SIZED(moe_limits),
               SIZED(moe_import_options),
               SIZED(moe_route_sums),
               SIZED(moe_task_router),
               SIZED(moe_share),
               SIZED(moe_param_group),
               SIZED(moe_train_config),
               SIZED(moe_sampler_config),
               SIZED(moe_sampler),
               SIZED(moe_tokens),
               SIZED(moe_text),
               {"moe_no", 0},
               {"", 0},
               {"moe_env ", 0}};
  size_t i;
  for (i = 0; i < sizeof types / sizeof *types; ++i)
    CHECK(moe_abi(types[i].name) == types[i].bytes, "%s: %zu bytes, not %zu", types[i].name,
          moe_abi(types[i].name), types[i].bytes);
  CHECK(moe_abi(NULL) == MOE_VERSION, "version %zu", moe_abi(NULL));
}

static void run_base(void) {
  RUN(test_base_tells_the_size_of_each_struct);
  RUN(test_base_knows_whether_sums_are_contracted);
  RUN(test_base_knows_instruction_sets_by_name);
  RUN(test_base_formats_sentences);
  RUN(test_base_formats_every_number);
  RUN(test_base_sentences_hold_nothing_that_a_terminal_obeys);
  RUN(test_random_permutation_hits_every_row_once);
  RUN(test_random_normal_has_mean_0_and_deviation_1);
  RUN(test_parallel_runs_every_tile_once);
  RUN(test_parallel_helpers_take_part);
  RUN(test_parallel_wakes_helpers);
  RUN(test_parallel_pool_has_1_to_256_threads);
  RUN(test_parallel_pool_has_no_more_threads_than_processors);
#if defined(__linux__)
  RUN(test_parallel_pool_knows_its_affinity);
#endif
  RUN(test_base_forced_isa_that_is_missing_is_refused);
}
