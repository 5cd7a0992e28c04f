/* scores.h - the metrics of a task over answers to rows with labels, for predict.c and convert.c
     #include "moe.h"
     #include "scores.h"
     answers r = {0, 0, NULL, NULL, NULL, NULL, NULL};
     answers_keep(&r, task, label, group, scores, best);   for each row, with what moe_predict_text
   has said v = answers_metric(&r, task, "f1", &defined);         answers_metrics(task) names the
   task's own The functions end the program when there is no memory. */
#ifndef SCORES_H_INCLUDED
#define SCORES_H_INCLUDED
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct answers {
  size_t n, room;
  int32_t *predicted, *label;
  float *value, *truth; /* value: of a regression, or the probability of class 1 */
  char **group;         /* of a ranking */
} answers;

static void *answers_grow(void *p, size_t count, size_t size) {
  p = realloc(p, count * size);
  if (!p && count) fprintf(stderr, "out of memory\n"), exit(1);
  return p;
}

static void answers_keep(answers *r, const moe_task *task, float truth, const char *group,
                         const float *score, int best) {
  if (r->n == r->room) {
    r->room = 2 * r->room + 1024;
    r->predicted = (int32_t *)answers_grow(r->predicted, r->room, sizeof *r->predicted);
    r->label = (int32_t *)answers_grow(r->label, r->room, sizeof *r->label);
    r->value = (float *)answers_grow(r->value, r->room, sizeof *r->value);
    r->truth = (float *)answers_grow(r->truth, r->room, sizeof *r->truth);
    r->group = (char **)answers_grow(r->group, r->room, sizeof *r->group);
  }
  r->predicted[r->n] = best;
  r->label[r->n] = (int32_t)truth;
  r->value[r->n] = score[task->kind != MOE_KIND_REGRESSION];
  r->truth[r->n] = truth;
  r->group[r->n++] = strcpy((char *)answers_grow(NULL, strlen(group) + 1, 1), group);
}

static void answers_free(answers *r) {
  size_t i;
  for (i = 0; i < r->n; ++i) free(r->group[i]);
  free(r->group);
  free(r->predicted);
  free(r->label);
  free(r->value);
  free(r->truth);
}

/* Accuracy of a ranking: of the rows of a group, the one with the largest score of class 1 is the
   answer. */
static double answers_ranking(const answers *r) {
  size_t i, j, groups = 0, right = 0;
  for (i = 0; i < r->n; ++i) {
    size_t best = i;
    for (j = 0; j < i && strcmp(r->group[i], r->group[j]); ++j) continue;
    if (j < i) continue; /* its group has been counted */
    for (j = i + 1; j < r->n; ++j)
      if (r->value[j] > r->value[best] && !strcmp(r->group[i], r->group[j])) best = j;
    ++groups;
    right += r->label[best] == 1;
  }
  return (double)right / (double)groups;
}

/* The metrics of a task, separated by commas. */
static const char *answers_metrics(const moe_task *task) {
  if (task->metrics[0]) return task->metrics;
  return task->kind == MOE_KIND_REGRESSION ? "pearson,spearman" : "accuracy";
}

/* One of them, up to a comma or its end; *defined as in moe_metric_accuracy. */
static double answers_metric(const answers *r, const moe_task *task, const char *name,
                             int *defined) {
  size_t length = strcspn(name, ",");
  float *scratch;
  double v;
#define ANSWERS_IS(word) (length == strlen(word) && !memcmp(name, word, length))
  *defined = 1;
  if (ANSWERS_IS("accuracy") && task->kind == MOE_KIND_RANKING) return answers_ranking(r);
  if (ANSWERS_IS("accuracy")) return moe_metric_accuracy(r->predicted, r->label, r->n, defined);
  if (ANSWERS_IS("f1")) return moe_metric_f1(r->predicted, r->label, r->n, defined);
  if (ANSWERS_IS("macro_f1"))
    return moe_metric_macro_f1(r->predicted, r->label, r->n, task->classes, defined);
  if (ANSWERS_IS("matthews"))
    return moe_metric_matthews(r->predicted, r->label, r->n, task->classes, defined);
  if (ANSWERS_IS("pearson")) return moe_metric_pearson(r->value, r->truth, r->n, defined);
#undef ANSWERS_IS
  scratch = (float *)answers_grow(NULL, 2 * r->n, sizeof *scratch);
  v = moe_metric_spearman(r->value, r->truth, r->n, scratch, defined);
  free(scratch);
  return v;
}
#endif
