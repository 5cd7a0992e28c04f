/* score.h - what a model answers to rows, the metrics of a task over them, the yardstick of chance,
   and differences between systems on rows drawn anew (bootstrap) */
#ifndef TOOLS_SCORE_H
#define TOOLS_SCORE_H
#include "data.h"

enum { SCORE_TOKENS = 4096, SCORE_ROWS = 256 }; /* of a batch, unless one input is longer */

static inline int32_t score_room(const moe_model *model) {
  int32_t longest = moe_model_config(model)->max_len;
  return longest > SCORE_TOKENS ? longest : SCORE_TOKENS;
}

/* A context that score_rows can use. */
static inline moe_context *make_context(const moe_model *model) {
  moe_limits limits;
  moe_context *context;
  memset(&limits, 0, sizeof limits);
  limits.tokens = score_room(model);
  limits.sequences = SCORE_ROWS;
  need(moe_context_create(&context, model, &limits, &env));
  return context;
}

typedef struct answers {
  int64_t n;
  int32_t stride;
  float *logits; /* (n, stride), one block with the others */
  float *answer; /* (n) as moe_answers has them */
  float *label;  /* (n) */
} answers;

static inline void free_answers(answers *a) { free(a->logits); }

static inline float *labels_of(float *label, const rows *r) {
  int64_t i;
  for (i = 0; i < r->n; ++i) label[i] = r->row[i].label;
  return label;
}

/* Runs the rows, of the model's task number t, through it; routes are added to sums unless that is
   NULL. Ranks take batches in turn. To be freed. */
static inline answers score_rows(moe_context *context, const moe_model *model, const rows *r,
                                 int32_t t, moe_route_sums *sums) {
  static batch_buffer b;
  static int32_t capacity;
  answers a;
  int32_t room = score_room(model), *group = (int32_t *)take(2 * (size_t)r->n, sizeof *group);
  int64_t i = 0, batches = 0;
  size_t n = (size_t)r->n;
  if (capacity < room) b = make_batch(capacity = room, SCORE_ROWS);
  a.n = r->n;
  a.stride = moe_model_max_classes(model);
  a.logits = (float *)take(n * ((size_t)a.stride + 2), sizeof(float));
  a.answer = a.logits + n * (size_t)a.stride;
  a.label = labels_of(a.answer + n, r);
  while (i < r->n) {
    float *to = a.logits + i * a.stride;
    clear_batch(&b);
    do {
      group[i] = r->row[i].group;
      add_row(&b, r, i, t, i);
    } while (++i < r->n && b.batch.S < SCORE_ROWS && b.tokens + row_length(r, i) <= room);
    if (!sums && batches++ % ranks != my_rank) continue;
    need(moe_forward(context, to, &b.batch, &env));
    if (sums) need(moe_route_count(sums, context, &b.batch, &env));
  }
  if (!sums) add_floats(a.logits, n * (size_t)a.stride);
  need(moe_answers(a.answer, moe_model_task(model, t), a.logits, a.stride, (int32_t)r->n, group,
                   group + n, &env));
  free(group);
  return a;
}

/* Number of the model's task of that name. */
static inline int32_t find_model_task(const moe_model *model, const char *name, const char *path) {
  int32_t t = moe_model_find_task(model, name), i;
  text names = {NULL, 0, 0};
  if (!moe_model_tasks(model)) die("%s has no tasks: it gives embeddings only", path);
  for (i = 0; i < moe_model_tasks(model); ++i) put(&names, " %s", moe_model_task(model, i)->name);
  if (t < 0) die("%s has no task \"%s\", but%s", path, name, names.data);
  free(names.data);
  return t;
}

/* Number `index` of a task's metrics over n answers; 0 is the one that counts. *defined (may be
   NULL) becomes 0 where it has no value. */
static inline double metric_of(const moe_task *t, int index, const float *answer,
                               const float *label, int64_t n, int *defined) {
  float *scratch = (float *)take(2 * (size_t)n, sizeof *scratch);
  char name[MOE_NAME_BYTES];
  double v;
  int ok = 1;
  moe_metric_name(name, t, index);
  v = moe_metric(name, t, answer, label, (size_t)n, scratch, &ok);
  if (!ok && defined) *defined = 0;
  free(scratch);
  return v;
}

/* A line for each row: task, set (1: dev.tsv, 2: the second one), line of the file, label, answer,
   logits. */
static inline void write_answers(text *to, const moe_task *t, int set, const rows *r,
                                 const answers *a) {
  int64_t i;
  int32_t c;
  for (i = 0; i < r->n; ++i) {
    put(to, "%s\t%d\t%d\t%.9g\t%.9g\t", t->name, set, r->row[i].line, (double)a->label[i],
        (double)a->answer[i]);
    for (c = 0; c < t->classes; ++c)
      put(to, "%s%.9g", c ? " " : "", (double)a->logits[i * a->stride + c]);
    put(to, "\n");
  }
}

/* What the same answer to every row scores (the most frequent class; for F1, class 1; in a ranking
   any choice), and the standard error of such a score: a table's yardstick. 0 for correlations. */
static inline double chance(const task_data *t, double *error) {
  int64_t count[2][MOE_MAX_CLASSES] = {{0}, {0}}, i, best = 0;
  char name[MOE_NAME_BYTES];
  double value = 0, square = 0;
  int d, c, classes = t->task.classes, ranking = t->task.kind == MOE_KIND_RANKING, f1;
  moe_metric_name(name, &t->task, 0);
  f1 = !strcmp(name, "f1") ? 1 : !strcmp(name, "macro_f1") ? classes : 0;
  *error = 0;
  for (d = 0; d < t->n_dev; ++d)
    for (i = 0; i < t->dev[d].n; ++i) ++count[d][(int)t->dev[d].row[i].label % MOE_MAX_CLASSES];
  for (c = 1; c < classes; ++c)
    if (count[0][c] + count[1][c] > count[0][best] + count[1][best]) best = c;
  if (f1 == 1 || ranking) best = 1; /* in a ranking that is groups by rows */
  for (d = 0; d < t->n_dev; ++d) {
    double n = (double)t->dev[d].n, p = (double)count[d][best] / n, v = p, slope = 1;
    if (f1) {
      v = 2 * p / (1 + p) / f1;
      slope = 2 / ((1 + p) * (1 + p)) / f1;
    }
    if (ranking) n = (double)t->dev[d].groups;
    if (!f1 && strcmp(name, "accuracy")) { /* a correlation */
      v = 0;
      square += 1 / (n > 1 ? n - 1 : 1);
    } else
      square += slope * slope * p * (1 - p) / n;
    value += v / t->n_dev;
  }
  *error = sqrt(square) / t->n_dev;
  return value;
}

/* Mean metric over k sets of answers (each to all dev rows) on the dev rows of task t and on R
   resamples of them: out (R+1) is added to. The rows of a resample (in a ranking: the questions)
   are the same for all callers, so that comparisons are paired. */
static inline void resample(double *out, const task_data *t, const float *const *answer, int k,
                            int R) {
  int set, i, r;
  int64_t at = 0, g, j;
  for (set = 0; set < t->n_dev; at += t->dev[set++].n) {
    const rows *dev = &t->dev[set];
    groups q = group_rows(dev);
    int64_t largest = 1, n;
    float *label, *some;
    for (g = 0; g < q.n; ++g)
      if (q.begin[g + 1] - q.begin[g] > largest) largest = q.begin[g + 1] - q.begin[g];
    some = (float *)take((size_t)(q.n * largest), (size_t)(k + 1) * sizeof *some);
    label = some + q.n * largest * k;
    for (r = 0; r <= R; ++r) {
      for (n = g = 0; g < q.n; ++g) {
        uint64_t random = moe_key(1, (uint64_t)r, (uint64_t)g, (uint32_t)set, 79);
        int64_t drawn = r ? (int64_t)(random % (uint64_t)q.n) : g;
        for (j = q.begin[drawn]; j < q.begin[drawn + 1]; ++j, ++n) {
          label[n] = dev->row[q.row[j]].label;
          for (i = 0; i < k; ++i) some[q.n * largest * i + n] = answer[i][at + q.row[j]];
        }
      }
      for (i = 0; i < k; ++i)
        out[r] += metric_of(&t->task, 0, some + q.n * largest * i, label, n, NULL) / k / t->n_dev;
    }
    free(q.begin);
    free(some);
  }
}

/* A - B: the difference of a metric, its 95 % interval, and the share of the resamples in which A
   is better. */
typedef struct difference {
  double value, low, high, better;
  int known;
} difference;

static inline int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

/* From the metrics of two systems on the same R resamples. */
static inline difference difference_of(const double *a, const double *b, int R) {
  double *d = (double *)take((size_t)R, sizeof *d), better = 0;
  difference out;
  int r;
  for (r = 0; r < R; ++r) {
    d[r] = a[r + 1] - b[r + 1];
    better += d[r] > 0 ? 1 : d[r] < 0 ? 0 : 0.5;
  }
  qsort(d, (size_t)R, sizeof *d, by_value);
  out.value = a[0] - b[0];
  out.low = d[(int)(0.025 * R)];
  out.high = d[(int)(0.975 * R)];
  out.better = better / R;
  out.known = 1;
  free(d);
  return out;
}
#endif
