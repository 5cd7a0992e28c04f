/* Metrics against scikit-learn and scipy (golden/metrics.py), and where they are undefined. */
#include "golden/metrics.h"

enum { MOST = 8192 };
static int32_t predicted[MOST], metrics_label[MOST];
static float metrics_x[MOST], metrics_y[MOST], scratch[2 * MOST];

static int32_t metrics_draw(uint64_t *state, int n) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (int32_t)((*state >> 33) % (uint32_t)n);
}

/* The value that golden/metrics.py names, or undefined and 0. */
static void check_value(const char *name, int i, double value, int is_defined, double expected) {
  CHECK(is_defined == !(expected != expected), "%s of case %d: defined %d", name, i, is_defined);
  if (expected != expected)
    CHECK(value == 0, "%s of case %d: %.17g instead of 0", name, i, value);
  else
    CHECK(fabs(value - expected) <= 1e-12, "%s of case %d: %.17g instead of %.17g", name, i, value,
          expected);
}

static void test_metrics_of_classes_are_those_of_scikit_learn(void) {
  int i, k, is_defined;
  double value;
  for (i = 0; i < (int)(sizeof golden_classes / sizeof *golden_classes); ++i) {
    uint64_t state = (uint64_t)golden_classes[i].seed;
    size_t n = (size_t)golden_classes[i].n;
    int classes = golden_classes[i].classes;
    for (k = 0; k < golden_classes[i].n; ++k) {
      metrics_label[k] = metrics_draw(&state, 1 + metrics_draw(&state, classes));
      predicted[k] = metrics_draw(&state, 8) < golden_classes[i].agree
                         ? metrics_label[k]
                         : metrics_draw(&state, classes);
    }
    value = moe_metric_accuracy(predicted, metrics_label, n, &is_defined);
    check_value("accuracy", i, value, is_defined, golden_classes[i].accuracy);
    CHECK_STATE();
    value = moe_metric_f1(predicted, metrics_label, n, &is_defined);
    check_value("F1", i, value, is_defined, golden_classes[i].f1);
    CHECK_STATE();
    value = moe_metric_macro_f1(predicted, metrics_label, n, classes, &is_defined);
    check_value("macro F1", i, value, is_defined, golden_classes[i].macro_f1);
    CHECK_STATE();
    value = moe_metric_matthews(predicted, metrics_label, n, classes, &is_defined);
    check_value("Matthews", i, value, is_defined, golden_classes[i].matthews);
    CHECK_STATE();
  }
}

static void test_metrics_of_values_are_those_of_scipy(void) {
  int i, k, is_defined;
  double value;
  for (i = 0; i < (int)(sizeof golden_values / sizeof *golden_values); ++i) {
    uint64_t state = (uint64_t)golden_values[i].seed;
    size_t n = (size_t)golden_values[i].n;
    for (k = 0; k < golden_values[i].n; ++k) {
      int32_t level = metrics_draw(&state, golden_values[i].levels);
      metrics_y[k] = (float)level / 64.0f - 1.0f;
      metrics_x[k] =
          (float)(level - 64 + metrics_draw(&state, golden_values[i].noise)) / 64.0f + 1000.0f;
    }
    value = moe_metric_pearson(metrics_x, metrics_y, n, &is_defined);
    check_value("Pearson", i, value, is_defined, golden_values[i].pearson);
    CHECK_STATE();
    value = moe_metric_spearman(metrics_x, metrics_y, n, scratch, &is_defined);
    check_value("Spearman", i, value, is_defined, golden_values[i].spearman);
    CHECK_STATE();
  }
}

static void test_metrics_say_when_they_are_undefined(void) {
  static const float some[4] = {1, 2, 3, 4}, constant[4] = {0.1f, 0.1f, 0.1f, 0.1f};
  static const float last_as_first[4] = {1, 2, 3, 1};
  static const int32_t zeros[4] = {0, 0, 0, 0}, mixed[4] = {0, 1, 0, 1};
  float bad[4] = {1, 2, NAN, 4}, infinite[4] = {1, 2, INFINITY, 3};
  int d = 7;
  CHECK(moe_metric_accuracy(zeros, mixed, 0, &d) == 0 && d == 0, "no rows");
  CHECK(moe_metric_macro_f1(zeros, mixed, 0, 2, &d) == 0 && d == 0, "no rows");
  CHECK(moe_metric_pearson(some, some, 0, &d) == 0 && d == 0, "no rows");
  CHECK(moe_metric_spearman(some, some, 0, scratch, &d) == 0 && d == 0, "no rows");
  CHECK(moe_metric_spearman(some, some, 1, scratch, &d) == 0 && d == 0, "one row");
  CHECK(moe_metric_pearson(some, some, 1, &d) == 0 && d == 0, "one row");
  CHECK(moe_metric_f1(zeros, zeros, 4, &d) == 0 && d == 0, "no row of class 1");
  CHECK(moe_metric_matthews(zeros, mixed, 4, 2, &d) == 0 && d == 0, "one class predicted");
  CHECK(moe_metric_matthews(mixed, zeros, 4, 2, &d) == 0 && d == 0, "one class right");
  CHECK(moe_metric_pearson(constant, some, 4, &d) == 0 && d == 0, "constant");
  CHECK(moe_metric_spearman(some, constant, 4, scratch, &d) == 0 && d == 0, "constant");
  CHECK_NEAR(moe_metric_pearson(last_as_first, last_as_first, 4, &d), 1, 1e-12);
  CHECK(d == 1, "it varies");
  CHECK(moe_metric_pearson(bad, some, 4, &d) == 0 && d == 0, "not a number");
  CHECK(moe_metric_spearman(some, bad, 4, scratch, &d) == 0 && d == 0, "not a number");
  CHECK(moe_metric_pearson(infinite, some, 4, &d) == 0 && d == 0, "infinite");
  CHECK_NEAR(moe_metric_spearman(infinite, some, 4, scratch, &d), 0.8,
             1e-12); /* an infinity has a rank */
  CHECK(d == 1, "an infinity has a rank");
  CHECK(moe_metric_f1(mixed, mixed, 4, NULL) == 1, "defined may be NULL");
}

static void test_metrics_count_a_foreign_number_as_wrong(void) {
  static const int32_t p[6] = {0, 1, -1, 2, 99, 1}, t[6] = {0, 1, 1, 2, 2, 0};
  CHECK_NEAR(moe_metric_accuracy(p, t, 6, NULL), 0.5, 0);
  CHECK_NEAR(moe_metric_f1(p, t, 6, NULL), 0.5, 1e-15);
  CHECK_NEAR(moe_metric_macro_f1(p, t, 6, 3, NULL), (2.0 / 3 + 0.5 + 2.0 / 3) / 3, 1e-15);
}

/* Logits (5, 2) and (-5, 1): the first has the larger logit of class 1, the second the larger
   probability and the larger difference. */
static void test_metrics_rank_by_the_logit_of_class_1(void) {
  static const float two[4] = {5, 2, -5, 1}, ties[6] = {0, 1, 9, 3, -9, 3};
  CHECK(moe_rank_best(two, 2, 2) == 0, "the largest logit, not the largest probability");
  CHECK(moe_rank_best(ties, 2, 3) == 1, "the first of equals");
  CHECK(moe_rank_best(ties, 2, 0) == -1, "no choice");
  CHECK(moe_rank_best(ties, 4, 2) == 1, "rows of 4 floats");
}

static void test_metrics_answer_rows_of_every_kind(void) {
  /* rows of groups 2 and 0, mixed; row 5 ties with row 1 */
  static const float logits[7 * 3] = {5, 2, 9, -5, 1, 9, 0, 7, 9, -3, 2,
                                      9, 0, 6, 9,  9, 1, 9, 4, 0, 9};
  static const int32_t group[7] = {2, 0, 0, 2, 0, 5, 5}, far[7] = {2, 0, 7, 2, 0, 5, 5};
  static const float ranked[7] = {1, 0, 1, 0, 0, 1, 0}, classes[7] = {0, 1, 1, 1, 1, 0, 0};
  static const int32_t expected[7] = {2, -1, 0, -1, -1, 5, -1};
  float answer[7];
  int32_t winner[7];
  int i;
  moe_task task;
  moe_env env;
  moe_env_init(&env, MOE_ISA_SCALAR);
  env.log = models_log;
  memset(&task, 0, sizeof task);
  task.kind = MOE_KIND_RANKING;
  task.classes = 2;
  CHECK(!moe_answers(answer, &task, logits, 3, 7, group, winner, &env), "%s", said);
  for (i = 0; i < 7; ++i)
    CHECK(answer[i] == ranked[i] && winner[i] == expected[i], "row %d: %g, winner %d", i,
          (double)answer[i], (int)winner[i]);
  CHECK(moe_answers(answer, &task, logits, 3, 7, far, winner, &env) == MOE_E_ARGUMENT &&
            strstr(said, "row 2: group 7, expected 0 to 6"),
        "%s", said);
  CHECK(moe_answers(answer, &task, logits, 3, 7, NULL, winner, &env) == MOE_E_ARGUMENT, "%s", said);
  CHECK(moe_answers(answer, &task, logits, 3, 7, group, NULL, &env) == MOE_E_ARGUMENT, "%s", said);
  task.kind = MOE_KIND_CLASSIFICATION;
  CHECK(!moe_answers(answer, &task, logits, 3, 7, NULL, NULL, &env), "%s", said);
  CHECK(!memcmp(answer, classes, sizeof classes), "the largest logit of two classes");
  task.classes = 3;
  CHECK(!moe_answers(answer, &task, logits, 3, 7, NULL, NULL, &env), "%s", said);
  CHECK(answer[5] == 0 && answer[0] == 2, "the lowest of equals");
  task.kind = MOE_KIND_REGRESSION;
  task.classes = 1;
  CHECK(!moe_answers(answer, &task, logits, 3, 7, NULL, NULL, &env), "%s", said);
  CHECK(answer[1] == -5 && answer[6] == 4, "the value of a regression");
}

static void test_metrics_by_name_are_those_of_the_functions(void) {
  static const float a[8] = {0, 1, 2, 1, 0, 2, 2, 1}, t[8] = {0, 1, 1, 1, 2, 2, 0, 0};
  int32_t ai[8], ti[8];
  char name[MOE_NAME_BYTES];
  float room[16];
  int i, d = 7;
  moe_task task;
  memset(&task, 0, sizeof task);
  task.classes = 3;
  for (i = 0; i < 8; ++i) ai[i] = (int32_t)a[i], ti[i] = (int32_t)t[i];
  CHECK(moe_metric("accuracy", &task, a, t, 8, NULL, &d) == moe_metric_accuracy(ai, ti, 8, NULL) &&
            d == 1,
        "accuracy");
  CHECK(moe_metric("f1", &task, a, t, 8, NULL, &d) == moe_metric_f1(ai, ti, 8, NULL), "F1");
  CHECK(moe_metric("macro_f1", &task, a, t, 8, NULL, &d) == moe_metric_macro_f1(ai, ti, 8, 3, NULL),
        "macro F1");
  CHECK(moe_metric("matthews", &task, a, t, 8, NULL, &d) == moe_metric_matthews(ai, ti, 8, 3, NULL),
        "Matthews");
  CHECK(moe_metric("pearson", &task, a, t, 8, NULL, &d) == moe_metric_pearson(a, t, 8, NULL),
        "Pearson");
  CHECK(moe_metric("spearman", &task, a, t, 8, room, &d) ==
            moe_metric_spearman(a, t, 8, scratch, NULL),
        "Spearman");
  CHECK(moe_metric("spearman", &task, a, t, 8, NULL, &d) == 0 && d == 0, "no room for ranks");
  d = 1;
  CHECK(d == 1 && moe_metric("accurate", &task, a, t, 8, NULL, &d) == 0 && d == 0, "unknown");
  CHECK(moe_metric_name(name, &task, 0) && !strcmp(name, "accuracy"), "default: %s", name);
  CHECK(!moe_metric_name(name, &task, 1), "one metric alone");
  task.kind = MOE_KIND_REGRESSION;
  CHECK(moe_metric("accuracy", &task, a, t, 8, NULL, &d) == 0 && d == 0, "not of a regression");
  CHECK(moe_metric_name(name, &task, 1) && !strcmp(name, "spearman"), "default: %s", name);
  strcpy(task.metrics, "matthews,accuracy,f1");
  CHECK(moe_metric_name(name, &task, 0) && !strcmp(name, "matthews"), "%s", name);
  CHECK(moe_metric_name(name, &task, 2) && !strcmp(name, "f1"), "%s", name);
  CHECK(!moe_metric_name(name, &task, 3), "three metrics");
}

static void test_metrics_of_rankings_count_groups(void) {
  /* groups of rows 0 1, 2 3 4, 5 6: the first and the last are right */
  static const float answer[7] = {1, 0, 0, 1, 0, 0, 1}, right[7] = {1, 0, 0, 0, 1, 0, 1};
  moe_task task;
  int d = 7;
  memset(&task, 0, sizeof task);
  task.kind = MOE_KIND_RANKING;
  task.classes = 2;
  CHECK_NEAR(moe_metric_ranking(answer, right, 7, &d), 2.0 / 3, 1e-15);
  CHECK(d == 1, "it varies");
  CHECK_NEAR(moe_metric("accuracy", &task, answer, right, 7, NULL, NULL), 2.0 / 3, 1e-15);
  CHECK(moe_metric_ranking(answer, right, 0, &d) == 0 && d == 0, "no rows");
}

static void test_metrics_average_small_and_all_tasks(void) {
  static const double value[4] = {0.5, 0.25, 1, 0.125};
  static const int64_t rows[4] = {10000, 10001, 3, 400000};
  int d = 7;
  CHECK_NEAR(moe_metric_average(value, rows, MOE_SMALL_ROWS, 4, &d), 0.75, 1e-15);
  CHECK(d == 1, "two tasks are small");
  CHECK_NEAR(moe_metric_average(value, NULL, 0, 4, &d), 1.875 / 4, 1e-15);
  CHECK(moe_metric_average(value, rows, 2, 4, &d) == 0 && d == 0, "no task is small");
}

static void run_metrics(void) {
  RUN(test_metrics_of_classes_are_those_of_scikit_learn);
  RUN(test_metrics_of_values_are_those_of_scipy);
  RUN(test_metrics_say_when_they_are_undefined);
  RUN(test_metrics_count_a_foreign_number_as_wrong);
  RUN(test_metrics_rank_by_the_logit_of_class_1);
  RUN(test_metrics_answer_rows_of_every_kind);
  RUN(test_metrics_by_name_are_those_of_the_functions);
  RUN(test_metrics_of_rankings_count_groups);
  RUN(test_metrics_average_small_and_all_tasks);
}
