/* Which row of which task comes next: shares, epochs, resuming, refusals. */

static moe_sampler_config sampler_config_of(moe_sampling sampling) {
  moe_sampler_config c;
  memset(&c, 0, sizeof c);
  c.sampling = sampling;
  c.tau = 2;
  c.seed = 11;
  c.draws = 4000;
  return c;
}

static void test_sampler_natural_takes_every_row_once_an_epoch(void) {
  static const int64_t rows[5] = {7, 0, 1, 100, 29};
  static unsigned char seen[5][100];
  moe_sampler_config c = sampler_config_of(MOE_SAMPLING_NATURAL);
  moe_sampler s;
  int64_t used[5], row;
  int32_t task, first[137][2];
  int epoch, i, same = 0, neighbours = 0;
  CHECK(moe_sampler_init(&s, &c, rows, used, 5, NULL) == MOE_OK, "init");
  for (epoch = 0; epoch < 4; ++epoch) {
    memset(seen, 0, sizeof seen);
    for (i = 0; i < 137; ++i) {
      moe_sampler_next(&s, &task, &row);
      CHECK(task >= 0 && task < 5 && row >= 0 && row < rows[task], "task %d row %d", (int)task,
            (int)row);
      CHECK(!seen[task][row], "task %d row %d twice in epoch %d", (int)task, (int)row, epoch);
      seen[task][row] = 1;
      if (epoch && first[i][0] == task && first[i][1] == (int32_t)row) ++same;
      if (i && first[i - 1][0] == task && first[i - 1][1] + 1 == (int32_t)row) ++neighbours;
      first[i][0] = task;
      first[i][1] = (int32_t)row;
    }
    for (i = 0; i < 5; ++i)
      CHECK(used[i] == rows[i] * (epoch + 1), "task %d: %d rows used", i, (int)used[i]);
  }
  CHECK(same < 20, "%d of 411 rows at the place of the epoch before: not shuffled anew", same);
  CHECK(neighbours < 30, "%d rows follow the row before them: not shuffled", neighbours);
  CHECK(s.drawn == 4 * 137, "drawn %d", (int)s.drawn);
}

static void test_sampler_in_order_is_file_order(void) {
  static const int64_t rows[4] = {3, 0, 2, 4};
  moe_sampler_config c = sampler_config_of(MOE_SAMPLING_NATURAL);
  moe_sampler s;
  int64_t used[4], row, j;
  int32_t task, t;
  int epoch;
  c.in_order = 1;
  CHECK(moe_sampler_init(&s, &c, rows, used, 4, NULL) == MOE_OK, "init");
  for (epoch = 0; epoch < 2; ++epoch)
    for (t = 0; t < 4; ++t)
      for (j = 0; j < rows[t]; ++j) {
        moe_sampler_next(&s, &task, &row);
        CHECK(task == t && row == j, "task %d row %d, not %d %d", (int)task, (int)row, (int)t,
              (int)j);
      }
}

/* Draws n rows and compares the counts with the shares p, five deviations apart at most. */
static void check_shares(moe_sampler *s, const double *p, int n) {
  int64_t before[8], row;
  int32_t task, t;
  int i;
  memcpy(before, s->used, (size_t)s->T * sizeof *before);
  for (i = 0; i < n; ++i) moe_sampler_next(s, &task, &row);
  for (t = 0; t < s->T; ++t) {
    double count = (double)(s->used[t] - before[t]), spread = sqrt(n * p[t] * (1 - p[t]));
    CHECK(fabs(count - n * p[t]) <= 5 * spread, "task %d drawn %g times, expected %g +- %g", (int)t,
          count, n * p[t], spread);
  }
}

static void test_sampler_uniform_draws_tasks_alike(void) {
  static const int64_t rows[5] = {10, 1000, 0, 1, 300};
  static const double p[5] = {0.25, 0.25, 0, 0.25, 0.25};
  moe_sampler_config c = sampler_config_of(MOE_SAMPLING_UNIFORM);
  moe_sampler s;
  int64_t used[5];
  CHECK(moe_sampler_init(&s, &c, rows, used, 5, NULL) == MOE_OK, "init");
  check_shares(&s, p, 40000);
}

static void test_sampler_temperature_draws_by_the_root_of_the_rows(void) {
  static const int64_t rows[4] = {1, 0, 10000, 250};
  static const float taus[4] = {0.5f, 1, 2, 100};
  int i, t;
  for (i = 0; i < 4; ++i) {
    moe_sampler_config c = sampler_config_of(MOE_SAMPLING_TEMPERATURE);
    moe_sampler s;
    double p[4], sum = 0;
    int64_t used[4];
    c.tau = taus[i];
    for (t = 0; t < 4; ++t) sum += p[t] = rows[t] ? pow((double)rows[t], 1 / (double)taus[i]) : 0;
    for (t = 0; t < 4; ++t) p[t] /= sum;
    CHECK(moe_sampler_init(&s, &c, rows, used, 4, NULL) == MOE_OK, "init");
    check_shares(&s, p, 40000);
    CHECK_STATE();
  }
}

static void test_sampler_draws_the_rows_of_a_task_in_epochs(void) {
  static const int64_t rows[3] = {13, 50, 1};
  static unsigned char seen[3][50];
  int64_t used[3], row;
  int32_t task;
  int i;
  moe_sampler_config c = sampler_config_of(MOE_SAMPLING_UNIFORM);
  moe_sampler s;
  CHECK(moe_sampler_init(&s, &c, rows, used, 3, NULL) == MOE_OK, "init");
  memset(seen, 0, sizeof seen);
  for (i = 0; i < 3000; ++i) {
    moe_sampler_next(&s, &task, &row);
    CHECK(row >= 0 && row < rows[task] && !seen[task][row], "task %d row %d", (int)task, (int)row);
    seen[task][row] = 1;
    if (used[task] % rows[task] == 0) memset(seen[task], 0, sizeof seen[task]);
  }
}

static void test_sampler_goes_from_uniform_to_natural(void) {
  static const int64_t rows[2] = {10, 1990};
  static const double half[2] = {0.5, 0.5};
  moe_sampler_config c = sampler_config_of(MOE_SAMPLING_UNIFORM_NATURAL);
  moe_sampler s;
  int64_t used[2], row, before[2];
  int32_t task;
  int i;
  CHECK(moe_sampler_init(&s, &c, rows, used, 2, NULL) == MOE_OK, "init");
  check_shares(&s, half, 2000);
  CHECK_STATE();
  memcpy(before, used, sizeof before);
  for (i = 0; i < 2000; ++i) moe_sampler_next(&s, &task, &row);
  CHECK(used[0] - before[0] == 10 && used[1] - before[1] == 1990, "natural half: %d and %d rows",
        (int)(used[0] - before[0]), (int)(used[1] - before[1]));
}

static void test_sampler_goes_on_from_a_copy(void) {
  static const int64_t rows[6] = {5, 90, 0, 17, 400, 1};
  int kind, i;
  for (kind = 0; kind < 5; ++kind) {
    moe_sampler_config c = sampler_config_of(kind == 4 ? MOE_SAMPLING_NATURAL : (moe_sampling)kind);
    moe_sampler a, b;
    int64_t used_a[6], used_b[6], row_a, row_b;
    int32_t task_a, task_b;
    c.in_order = kind == 4;
    CHECK(moe_sampler_init(&a, &c, rows, used_a, 6, NULL) == MOE_OK, "init");
    CHECK(moe_sampler_init(&b, &c, rows, used_b, 6, NULL) == MOE_OK, "init");
    for (i = 0; i < 1700; ++i) moe_sampler_next(&a, &task_a, &row_a);
    b.drawn = a.drawn; /* all that a checkpoint holds */
    memcpy(used_b, used_a, sizeof used_b);
    for (i = 0; i < 1700; ++i) {
      moe_sampler_next(&a, &task_a, &row_a);
      moe_sampler_next(&b, &task_b, &row_b);
      CHECK(task_a == task_b && row_a == row_b, "kind %d draw %d: %d %d against %d %d", kind, i,
            (int)task_a, (int)row_a, (int)task_b, (int)row_b);
    }
  }
}

static void test_sampler_seeds_differ(void) {
  static const int64_t rows[2] = {500, 500};
  int kind, i, same;
  for (kind = 0; kind < 4; ++kind) {
    moe_sampler_config c = sampler_config_of((moe_sampling)kind);
    moe_sampler a, b;
    int64_t used_a[2], used_b[2], row_a, row_b;
    int32_t task_a, task_b;
    CHECK(moe_sampler_init(&a, &c, rows, used_a, 2, NULL) == MOE_OK, "init");
    c.seed = 12;
    CHECK(moe_sampler_init(&b, &c, rows, used_b, 2, NULL) == MOE_OK, "init");
    for (i = same = 0; i < 500; ++i) {
      moe_sampler_next(&a, &task_a, &row_a);
      moe_sampler_next(&b, &task_b, &row_b);
      same += row_a == row_b;
    }
    CHECK(same < 10, "kind %d: %d of 500 rows alike", kind, same);
  }
}

static void test_sampler_takes_one_task_of_one_row(void) {
  static const int64_t rows[1] = {1};
  int kind, i;
  for (kind = 0; kind < 4; ++kind) {
    moe_sampler_config c = sampler_config_of((moe_sampling)kind);
    moe_sampler s;
    int64_t used[1], row = -1;
    int32_t task = -1;
    c.draws = 6;
    CHECK(moe_sampler_init(&s, &c, rows, used, 1, NULL) == MOE_OK, "init");
    for (i = 0; i < 10; ++i) {
      moe_sampler_next(&s, &task, &row);
      CHECK(task == 0 && row == 0, "task %d row %d", (int)task, (int)row);
    }
    CHECK(used[0] == 10, "used %d", (int)used[0]);
  }
}

static void test_sampler_takes_4096_tasks(void) {
  static int64_t rows[MOE_MAX_TASKS + 1], used[MOE_MAX_TASKS + 1], row;
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_sampler_config c = sampler_config_of(MOE_SAMPLING_NATURAL);
  moe_sampler s;
  int32_t i, task;
  for (i = 0; i <= MOE_MAX_TASKS; ++i) rows[i] = 1;
  CHECK(moe_sampler_init(&s, &c, rows, used, MOE_MAX_TASKS, &env) == MOE_OK, "4,096 tasks");
  moe_sampler_next(&s, &task, &row);
  CHECK(task >= 0 && task < MOE_MAX_TASKS && row == 0, "task %d, row %d", (int)task, (int)row);
  env.log = count_sentence;
  CHECK(moe_sampler_init(&s, &c, rows, used, MOE_MAX_TASKS + 1, &env) == MOE_E_ARGUMENT, "4,097");
}

static void test_sampler_refuses_bad_arguments(void) {
  static const int64_t rows[2] = {1, 2}, none[2] = {0, 0}, negative[2] = {5, -1},
                       huge[2] = {INT64_MAX, 1};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_sampler s, untouched;
  moe_sampler_config c = sampler_config_of(MOE_SAMPLING_NATURAL), bad;
  int64_t used[2] = {77, 77};
  env.log = count_sentence;
  memset(&s, 90, sizeof s);
  untouched = s;
  CHECK(moe_sampler_init(&s, &c, none, used, 2, &env) == MOE_E_ARGUMENT, "no rows");
  CHECK(moe_sampler_init(&s, &c, negative, used, 2, &env) == MOE_E_ARGUMENT, "negative rows");
  CHECK(moe_sampler_init(&s, &c, huge, used, 2, &env) == MOE_E_ARGUMENT, "the sum overflows");
  CHECK(moe_sampler_init(&s, &c, rows, used, 0, &env) == MOE_E_ARGUMENT, "no tasks");
  bad = sampler_config_of(MOE_SAMPLING_TEMPERATURE);
  bad.tau = 0;
  CHECK(moe_sampler_init(&s, &bad, rows, used, 2, &env) == MOE_E_ARGUMENT, "temperature 0");
  bad = sampler_config_of(MOE_SAMPLING_UNIFORM);
  bad.in_order = 1;
  CHECK(moe_sampler_init(&s, &bad, rows, used, 2, &env) == MOE_E_ARGUMENT, "in order and uniform");
  bad = sampler_config_of(MOE_SAMPLING_UNIFORM_NATURAL);
  bad.draws = 0;
  CHECK(moe_sampler_init(&s, &bad, rows, used, 2, &env) == MOE_E_ARGUMENT, "draws unknown");
  bad = sampler_config_of((moe_sampling)9);
  CHECK(moe_sampler_init(&s, &bad, rows, used, 2, &env) == MOE_E_ARGUMENT, "sampling 9");
  bad = sampler_config_of(MOE_SAMPLING_NATURAL);
  bad.run = -1;
  CHECK(moe_sampler_init(&s, &bad, rows, used, 2, &env) == MOE_E_ARGUMENT, "runs of -1");
  bad.run = 4;
  bad.in_order = 1;
  CHECK(moe_sampler_init(&s, &bad, rows, used, 2, &env) == MOE_E_ARGUMENT,
        "in order and homogeneous");
  CHECK(sentences == 10, "%d sentences", sentences);
  CHECK(!memcmp(&s, &untouched, sizeof s) && used[0] == 77, "a failure changed the state");
}

/* Runs of 8 draws of one task: by the sizes of the tasks, alike, or first alike; the rows of a task
   in epochs of its own. */
static void test_sampler_homogeneous_batches_have_one_task(void) {
  static const int64_t rows[3] = {300, 0, 100};
  static const double share[3] = {0.75, 0.5, 0.625}; /* of task 0 */
  static const moe_sampling kind[3] = {MOE_SAMPLING_NATURAL, MOE_SAMPLING_UNIFORM,
                                       MOE_SAMPLING_UNIFORM_NATURAL};
  moe_sampler s, copy;
  int64_t used[3], kept[3], row, again;
  int32_t task, other, first = 0;
  int k, i;
  for (k = 0; k < 3; ++k) {
    moe_sampler_config c = sampler_config_of(kind[k]);
    static unsigned char seen[300];
    double runs = 0, of_0 = 0;
    c.run = 8;
    c.draws = 16000;
    CHECK(moe_sampler_init(&s, &c, rows, used, 3, NULL) == MOE_OK, "init");
    memset(seen, 0, sizeof seen);
    for (i = 0; i < 16000; ++i) {
      if (i == 4004) { /* in the middle of a run */
        copy = s;
        memcpy(kept, used, sizeof used);
        copy.used = kept;
      }
      moe_sampler_next(&s, &task, &row);
      if (i >= 4004 && i < 5000) {
        moe_sampler_next(&copy, &other, &again);
        CHECK(other == task && again == row, "a copy goes on otherwise at draw %d", i);
      }
      if (i % 8 == 0) first = task, runs += 1, of_0 += task == 0;
      CHECK(task == first && task != 1 && row >= 0 && row < rows[task], "draw %d: task %d row %d",
            i, (int)task, (int)row);
      if (task == 0 && used[0] <= 300) {
        CHECK(!seen[row], "row %d twice in the first epoch", (int)row);
        seen[row] = 1;
      }
    }
    CHECK(fabs(of_0 / runs - share[k]) < 5 * sqrt(0.25 / runs), "kind %d: %g of the runs, not %g",
          k, of_0 / runs, share[k]);
  }
}

static void run_sampler(void) {
  RUN(test_sampler_natural_takes_every_row_once_an_epoch);
  RUN(test_sampler_in_order_is_file_order);
  RUN(test_sampler_uniform_draws_tasks_alike);
  RUN(test_sampler_temperature_draws_by_the_root_of_the_rows);
  RUN(test_sampler_draws_the_rows_of_a_task_in_epochs);
  RUN(test_sampler_goes_from_uniform_to_natural);
  RUN(test_sampler_goes_on_from_a_copy);
  RUN(test_sampler_seeds_differ);
  RUN(test_sampler_takes_one_task_of_one_row);
  RUN(test_sampler_homogeneous_batches_have_one_task);
  RUN(test_sampler_refuses_bad_arguments);
  RUN(test_sampler_takes_4096_tasks);
}
