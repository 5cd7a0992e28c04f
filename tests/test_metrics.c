/* Metrics against scikit-learn and scipy (golden/metrics.py), and where they are undefined. */
#include "../moe.h"
#include "test.h"
#include "golden/metrics.h"

enum { MOST = 8192 };
static int32_t predicted[MOST], label[MOST];
static float x[MOST], y[MOST], scratch[2 * MOST];

static int32_t draw(uint64_t *state, int n) {
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
      label[k] = draw(&state, 1 + draw(&state, classes));
      predicted[k] = draw(&state, 8) < golden_classes[i].agree ? label[k] : draw(&state, classes);
    }
    value = moe_metric_accuracy(predicted, label, n, &is_defined);
    check_value("accuracy", i, value, is_defined, golden_classes[i].accuracy);
    CHECK_STATE();
    value = moe_metric_f1(predicted, label, n, &is_defined);
    check_value("F1", i, value, is_defined, golden_classes[i].f1);
    CHECK_STATE();
    value = moe_metric_macro_f1(predicted, label, n, classes, &is_defined);
    check_value("macro F1", i, value, is_defined, golden_classes[i].macro_f1);
    CHECK_STATE();
    value = moe_metric_matthews(predicted, label, n, classes, &is_defined);
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
      int32_t level = draw(&state, golden_values[i].levels);
      y[k] = (float)level / 64.0f - 1.0f;
      x[k] = (float)(level - 64 + draw(&state, golden_values[i].noise)) / 64.0f + 1000.0f;
    }
    value = moe_metric_pearson(x, y, n, &is_defined);
    check_value("Pearson", i, value, is_defined, golden_values[i].pearson);
    CHECK_STATE();
    value = moe_metric_spearman(x, y, n, scratch, &is_defined);
    check_value("Spearman", i, value, is_defined, golden_values[i].spearman);
    CHECK_STATE();
  }
}

static void test_metrics_say_when_they_are_undefined(void) {
  static const float some[4] = {1, 2, 3, 4}, constant[4] = {0.1f, 0.1f, 0.1f, 0.1f};
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

int main(int argc, char **argv) {
  test_begin(argc, argv);
  RUN(test_metrics_of_classes_are_those_of_scikit_learn);
  RUN(test_metrics_of_values_are_those_of_scipy);
  RUN(test_metrics_say_when_they_are_undefined);
  RUN(test_metrics_count_a_foreign_number_as_wrong);
  return test_end();
}
