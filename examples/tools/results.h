/* results.h - what is finished (FILE.results), the table of systems, their differences, the JSON

   A program fills `lines` (the systems, in the order of the table) and `results` (runs of a line
   with a seed); run by run it joins parts, one for each task, and shows what there is. */
#ifndef TOOLS_RESULTS_H
#define TOOLS_RESULTS_H
#include "score.h"

/* ---- what is finished ---- */

/* A finished piece of the work: one task of a run, or one training of a second stage. Of a run that
   trains tasks together the first task's part has the costs, the others have none. */
typedef struct part {
  const char *name;
  int task, defined;   /* defined 0: the metric has no value, and counts as 0 */
  int place;           /* of join_parts */
  double value, score; /* the metric on dev, and what the epoch was chosen by */
  double tokens, seconds, steps, parameters;
  int64_t *routes;  /* (L,N) tokens of dev that each expert got, or NULL */
  float *answer;    /* of each dev row, set after set */
  const char *more; /* of the program's own: a text without tabs, "" for none */
} part;

static part **finished;
static int n_finished, route_layers, route_experts; /* L and N */
static const char *options_here;                    /* what decides results, "lr=0.001 ..." */

static inline uint64_t fold(uint64_t h, uint64_t v) { return (h ^ v) * 0x100000001b3u ^ (h >> 29); }

static inline uint64_t fold_bytes(uint64_t h, const void *bytes, size_t n) {
  uint64_t word;
  size_t i;
  for (i = 0; i + 8 <= n; i += 8) {
    memcpy(&word, (const char *)bytes + i, 8);
    h = fold(h, word);
  }
  return h;
}

/* Of every row that is trained on or asked, and of the weights that training begins with. */
static inline uint64_t data_fingerprint(const encoder *e, moe_model *from) {
  uint64_t h = fold_bytes(1, e->file, e->file_bytes);
  int64_t k;
  int t, p;
  for (t = 0; t < n_tasks; ++t)
    for (p = 0; p < 4; ++p) {
      const task_data *d = &tasks[t];
      const rows *r = p == 0 ? &d->train : p == 1 ? &d->held : &d->dev[p - 2];
      h = fold(h, (uint64_t)r->n);
      for (k = 0; k < r->n; ++k)
        h = fold(fold(h, r->row[k].hash), (uint64_t)(int64_t)(r->row[k].label * 1000));
    }
  if (from && moe_model_weights(from))
    h = fold_bytes(h, moe_model_weights(from), moe_model_parameters(from) * sizeof(float));
  return h;
}

/* Of every byte of the vocabulary. */
static inline uint64_t vocab_fingerprint(const encoder *e) {
  uint64_t h = 0xcbf29ce484222325u;
  size_t i;
  for (i = 0; i < e->vocab_bytes; ++i) h = (h ^ (unsigned char)e->vocab[i]) * 0x100000001b3u;
  return h;
}

/* Sets options_here: "lr=0.001 ..." of the options in the list "lr gate-lr ...", then the encoder,
   the rows, the weights and the precision. */
static inline void note_options(const option *const *tables, const char *names, const encoder *e,
                                moe_model *from) {
  list name = split(names, ' ');
  text to = {NULL, 0, 0};
  int i, k;
  for (i = 0; i < name.n; ++i) {
    const option *o = find_option(tables, printed("--%s", name.at[i]), 0);
    char *s = name.at[i];
    while ((s = strchr(s, '-')) != NULL) *s = '_';
    put(&to, "%s=", name.at[i]);
    if (o->string)
      put(&to, "%s ", *o->string ? *o->string : "");
    else
      put(&to, "%.9g ", o->whole ? *o->whole : *o->real);
  }
  put(&to, "vocab=%d precision=%s data=%016llx words=%016llx tasks=", (int)e->config.vocab,
      strcmp(precision_name(), "fp32") ? precision_name() : "0",
      (unsigned long long)data_fingerprint(e, from), (unsigned long long)vocab_fingerprint(e));
  for (i = 0; i < n_tasks; ++i)
    put(&to, "%s:%lld,", tasks[i].task.name, (long long)tasks[i].train.n);
  put(&to, " class_weights=");
  for (i = k = 0; i < n_tasks; ++i)
    if (tasks[i].weights) put(&to, "%s%s:%s", k++ ? ";" : "", tasks[i].task.name, tasks[i].weights);
  if (!k) put(&to, "0");
  options_here = to.data;
}

/* Dies, naming each difference, unless the options in a file are those here. One that the file does
   not know was off, but for `words`, which older files do not have. */
static inline void check_same_options(const char *file, const char *there) {
  list here = split(options_here, ' '), other = split(there, ' ');
  text differences = {NULL, 0, 0};
  int i, k;
  for (i = 0; i < here.n; ++i) {
    size_t n = strcspn(here.at[i], "=") + 1;
    for (k = 0; k < other.n && strncmp(other.at[k], here.at[i], n); ++k) continue;
    if (k == other.n && !strncmp(here.at[i], "words=", n)) continue;
    if (strcmp(here.at[i] + n, k < other.n ? other.at[k] + n : "0"))
      put(&differences, "%s %.*s there %.40s, here %.40s", differences.bytes ? ";" : "", (int)n - 1,
          here.at[i], k < other.n ? other.at[k] + n : "0", here.at[i] + n);
  }
  read_from(NULL, 0);
  if (differences.bytes) die("%s was made with other options:%s", file, differences.data);
}

static inline part *find_part(const char *name) {
  int i;
  for (i = 0; i < n_finished; ++i)
    if (!strcmp(finished[i]->name, name)) return finished[i];
  return NULL;
}

static inline int64_t *new_routes(void) {
  return (int64_t *)lasting((size_t)route_layers * (size_t)route_experts, sizeof(int64_t));
}

static inline part *new_part(const char *name, int t) {
  part *p = (part *)lasting(1, sizeof *p);
  p->name = printed("%s", name);
  p->task = t;
  p->answer = (float *)lasting((size_t)dev_rows(&tasks[t]), sizeof *p->answer);
  p->defined = 1;
  p->more = "";
  return p;
}

/* A part joins those that are finished, unless it was done again for its model. */
static inline void join_part(part *p) {
  if (find_part(p->name)) return;
  finished = (part **)grow(finished, (size_t)n_finished + 1, sizeof *finished);
  finished[n_finished++] = p;
}

static inline int by_name(const void *a, const void *b) {
  const part *p = *(part *const *)a, *q = *(part *const *)b;
  int order = strcmp(p->name, q->name);
  return order ? order : p->place - q->place;
}

/* Joins many parts; of those with one name the first. Sorted, since a file may have any number. */
static inline void join_parts(part **p, int n) {
  int all = n_finished + n, i;
  part **sorted = (part **)take((size_t)all, sizeof *sorted);
  finished = (part **)grow(finished, (size_t)all + 1, sizeof *finished);
  if (n) memcpy(finished + n_finished, p, (size_t)n * sizeof *p);
  for (i = 0; i < all; ++i) (sorted[i] = finished[i])->place = i;
  qsort(sorted, (size_t)all, sizeof *sorted, by_name);
  for (i = all - 1; i > 0; --i)
    if (!strcmp(sorted[i]->name, sorted[i - 1]->name)) finished[sorted[i]->place] = NULL;
  for (n_finished = i = 0; i < all; ++i)
    if (finished[i]) finished[n_finished++] = finished[i];
  free(sorted);
}

/* FILE.results: a line of the options, then a line for each part. */
static inline void write_parts(const char *file) {
  text t = {NULL, 0, 0};
  int i, k;
  int64_t j;
  put(&t, "options\t%s\n", options_here);
  for (i = 0; i < n_finished; ++i) {
    const part *p = finished[i];
    put(&t, "%s\t%d\t%.17g\t%.17g\t%d\t%.17g\t%.3f\t%.17g\t%.17g\t", p->name, p->task, p->value,
        p->score, p->defined, p->tokens, p->seconds, p->steps, p->parameters);
    for (k = 0; p->routes && k < route_layers * route_experts; ++k)
      put(&t, "%s%lld", k ? " " : "", (long long)p->routes[k]);
    for (j = 0; j < dev_rows(&tasks[p->task]); ++j)
      put(&t, "%s%.9g", j ? " " : "\t", (double)p->answer[j]);
    put(&t, "\t%s\n", p->more);
  }
  save_text(&t, printed("%s.results", file));
}

/* n numbers with blanks between them, all below `limit`, to whole_to or to `to`. */
static inline void read_numbers(char *field, int64_t n, int64_t *whole_to, float *to) {
  int64_t i;
  for (i = 0; i < n; ++i) {
    char *end;
    double v = strtod(field, &end);
    if (end == field || (whole_to && !(v >= 0 && v < 9e15))) break;
    if (whole_to)
      whole_to[i] = (int64_t)v;
    else
      to[i] = (float)v;
    field = end;
  }
  if (i < n || *field)
    die("expected %lld numbers in a field, there are %s", (long long)n,
        i < n ? "fewer or others" : "more");
}

static inline part *read_part_line(char **field) {
  int t = field_whole("task", field[1]);
  const moe_task *task;
  int64_t j;
  part *p;
  if (t < 0 || t >= n_tasks) die("there is no task %d", t);
  task = &tasks[t].task;
  p = new_part(field[0], t);
  p->value = strtod(field[2], NULL);
  p->score = strtod(field[3], NULL);
  p->defined = field_whole("defined", field[4]);
  p->tokens = strtod(field[5], NULL), p->seconds = strtod(field[6], NULL);
  p->steps = strtod(field[7], NULL), p->parameters = strtod(field[8], NULL);
  if (*field[9])
    read_numbers(field[9], (int64_t)route_layers * route_experts, p->routes = new_routes(), NULL);
  read_numbers(field[10], dev_rows(&tasks[t]), NULL, p->answer);
  p->more = printed("%s", field[11]);

  for (j = 0; j < dev_rows(&tasks[t]) && task->kind != MOE_KIND_REGRESSION; ++j)
    if (!(p->answer[j] >= 0 && p->answer[j] < (float)task->classes))
      die("an answer is not a class of the task");
  return p;
}

/* What earlier processes have finished; nothing, where there is no FILE.results. Several such files
   may follow each other in one. */
static inline void read_parts(const char *file) {
  const char *path = printed("%s.results", file);
  part **p = NULL;
  int n, n_parts = 0;
  table f;
  if (!open_table_of(&f, path, TABLE_TSV, 1)) return;
  if (f.name.n != 2 || strcmp(f.name.at[0], "options")) die("this is not a file of results");
  for (n = f.fields; n; n = read_record(&f)) {
    if (n == 2 && !strcmp(f.field[0], "options")) {
      check_same_options(file, f.field[1]);
      continue;
    }
    if (n != 12) die("%d columns, expected 12", n);
    p = (part **)grow(p, (size_t)n_parts + 1, sizeof *p);
    p[n_parts++] = read_part_line(f.field);
  }
  close_table(&f);
  join_parts(p, n_parts);
  free(p);
  if (n_finished)
    fprintf(stderr, "%d finished part%s in %s\n", n_finished, n_finished == 1 ? "" : "s", path);
}

/* ---- systems ---- */

/* A row of the table. Lines of one stage are compared with each other (-1: with none); those of
   stage 1 show the maximum over the seeds too. */
typedef struct line {
  const char *name, *title;
  int stage;
} line;

typedef struct result {
  int line, seed;
  const struct part **part; /* (T); NULL: not finished */
  double tokens, seconds, steps, parameters;
} result;

static const line *lines;
static result *results;
static int n_lines, n_results, title_width = 14;

/* The metric of a task; t = n_tasks: the average "small", t = n_tasks + 1: that of all tasks. 0
   where a part is missing, or no task is small. */
static inline int result_value(double *value, const result *r, int t) {
  double sum = 0;
  int i, n = 0;
  for (i = 0; i < n_tasks; ++i) {
    if (t < n_tasks ? i != t : t == n_tasks && tasks[i].official > MOE_SMALL_ROWS) continue;
    if (!r->part[i]) return 0;
    sum += r->part[i]->value;
    ++n;
  }
  *value = n ? sum / n : 0;
  return n > 0;
}

/* 1: every task is small, so that both averages are one. */
static inline int all_small(void) {
  int i = 0;
  while (i < n_tasks && tasks[i].official <= MOE_SMALL_ROWS) ++i;
  return i == n_tasks;
}

/* The runs of line s: mean over the seeds of column t, as result_value has it, and what else a
   table shows of them. */
typedef struct summary {
  double mean, deviation, most, seconds, parameters;
  int runs, n, undefined; /* runs in all; with a value; without one */
} summary;

static inline summary summarize(int s, int t) {
  summary of = {0, 0, -2, 0, 0, 0, 0, 0};
  const result *r;
  double v, square = 0;
  for (r = results; r < results + n_results; ++r) {
    if (r->line != s) continue;
    ++of.runs;
    of.seconds += r->seconds;
    of.parameters = r->parameters;
    if (!result_value(&v, r, t)) continue;
    ++of.n;
    of.mean += v;
    square += v * v;
    of.most = v > of.most ? v : of.most;
    of.undefined |= t < n_tasks && !r->part[t]->defined;
  }
  if (of.n) of.mean /= of.n;
  square -= of.n * of.mean * of.mean;
  if (of.n > 1 && square > 0) of.deviation = sqrt(square / (of.n - 1));
  return of;
}

/* ---- differences ---- */

typedef struct comparison {
  const line *a, *b;
  difference *of; /* (T+1): tasks, and the mean over all */
} comparison;

static comparison *comparisons;
static int n_comparisons, resamples;

/* Metrics of line s, all its seeds, on the dev rows of task t and on their resamples, added to out;
   0: there are no answers. */
static inline int add_resamples(double *out, int s, int t) {
  const float **answer = (const float **)take((size_t)n_results + 1, sizeof *answer);
  int i, n = 0;
  for (i = 0; i < n_results; ++i)
    if (results[i].line == s && results[i].part[t]) answer[n++] = results[i].part[t]->answer;
  if (n) resample(out, &tasks[t], answer, n, resamples);
  free(answer);
  return n > 0;
}

/* Every pair of lines of one stage, the later one first; added to the comparisons. */
static inline void compare_lines(int stage) {
  size_t stride = (size_t)resamples + 1, k;
  double *all = (double *)take((size_t)n_lines, stride * sizeof *all), *task;
  int *known = (int *)take(2 * (size_t)n_lines, sizeof *known), *has = known + n_lines;
  int first = n_comparisons, a, b, t, c;
  for (a = 1; a < n_lines && resamples; ++a)
    for (b = 0; b < a; ++b) {
      comparison *to;
      if (lines[a].stage != stage || lines[b].stage != stage) continue;
      if (!summarize(a, 0).runs || !summarize(b, 0).runs) continue;
      comparisons = (comparison *)grow(comparisons, (size_t)n_comparisons + 1, sizeof *comparisons);
      to = &comparisons[n_comparisons++];
      to->a = &lines[a], to->b = &lines[b];
      to->of = (difference *)lasting((size_t)n_tasks + 1, sizeof *to->of);
    }
  task = (double *)take((size_t)n_lines, stride * sizeof *task);
  for (t = 0; t <= n_tasks && n_comparisons > first; ++t) {
    const double *of = t < n_tasks ? task : all;
    memset(task, 0, (size_t)n_lines * stride * sizeof *task);
    for (a = 0; a < n_lines; ++a) {
      if (lines[a].stage != stage) continue;
      if (t == n_tasks)
        has[a] = known[a] == n_tasks;
      else
        known[a] += has[a] = add_resamples(task + (size_t)a * stride, a, t);
    }
    for (k = 0; k < (size_t)n_lines * stride; ++k) all[k] += task[k] / n_tasks;
    for (c = first; c < n_comparisons; ++c) {
      int x = (int)(comparisons[c].a - lines), y = (int)(comparisons[c].b - lines);
      if (has[x] && has[y])
        comparisons[c].of[t] =
            difference_of(of + (size_t)x * stride, of + (size_t)y * stride, resamples);
    }
  }
  free(task), free(all), free(known);
}

static inline void print_comparisons(void) {
  int c, t, clear = 0, known = 0, several;
  text whole_table = {NULL, 0, 0};
  if (!n_comparisons) return;
  printf("\n");
  print_sentence("Differences x 100, and in how many of %d resamples of the dev rows the first is "
                 "better",
                 resamples);
  put(&whole_table, "%-27s", "");
  for (t = 0; t < n_tasks; ++t) put(&whole_table, " %10.9s", tasks[t].task.name);
  put(&whole_table, " |  all, with its 95 %% interval\n");
  for (c = 0; c < n_comparisons; ++c) {
    const difference *d = comparisons[c].of;
    put(&whole_table, "%-27s",
        printed("%.25s - %.25s", comparisons[c].a->title, comparisons[c].b->title));
    for (t = 0; t < n_tasks; ++t, ++d)
      put(&whole_table, " %10s",
          d->known ? printed("%+.1f %3.0f%%", 100 * d->value, 100 * d->better) : "-");
    put(&whole_table, " |  %s\n",
        !d->known ? "-"
                  : printed("%+.1f [%+.1f, %+.1f] %.0f%%", 100 * d->value, 100 * d->low,
                            100 * d->high, 100 * d->better));
    known += d->known;
    clear += d->known && (d->low > 0 || d->high < 0);
  }
  print_blocks(&whole_table, 27, 11);
  free(whole_table.data);
  for (t = several = 0; t < n_results; ++t) several |= results[t].seed != results[0].seed;
  print_sentence("The interval is that of other dev rows for the same models; %s.",
                 several ? "seeds are averaged first"
                         : "other seeds differ as well: try --seeds 1,2,3");
  if (known && !clear)
    print_sentence(
        "No difference in column all is larger than chance on these dev rows: every interval "
        "contains 0.");
  if (clear)
    print_sentence(
        "Larger than chance on these dev rows: %d of the %d differences in column all, those "
        "whose interval does not contain 0.",
        clear, known);
}

/* ---- the table ---- */

/* n 0: nothing to show; 1: no deviation. */
static inline void put_cell(text *to, double v, double deviation, int n, int undefined) {
  const char *cell = n > 1 ? printed("%.1f+-%.1f", 100 * v, 100 * deviation)
                     : n   ? printed("%.1f", 100 * v)
                           : "-";
  put(to, " %*s%s", 10 - undefined, cell, undefined ? "?" : "");
}

/* Row s of the table, and with several seeds in a second stage their maxima, as the paper reports;
   1 when a metric in it has no value. */
static inline int put_line(text *to, int s) {
  int t, any_undefined = 0, seeds = 0, pass;
  for (pass = 0; pass < 2; ++pass) {
    summary of = summarize(s, 0);
    if (!of.runs || (pass && (lines[s].stage != 1 || seeds < 2))) break;
    put(to, "%-*s", title_width, pass ? "  maximum" : lines[s].title);
    for (t = 0; t < n_tasks + 2; ++t) {
      of = summarize(s, t);
      any_undefined |= of.undefined;
      if (of.n > seeds) seeds = of.n;
      if (t == n_tasks) put(to, " |");
      if (t == n_tasks && all_small()) continue;
      put_cell(to, pass ? of.most : of.mean, of.deviation, pass ? of.n > 0 : of.n,
               of.undefined && !pass);
    }
    put(to, pass ? " |\n" : " | %11.0f %8.1f\n", of.parameters, of.seconds / of.runs);
  }
  return any_undefined;
}

static inline void print_table(void) {
  int s, t, any_undefined = 0, hard = 0, several = 0;
  char name[MOE_NAME_BYTES];
  text whole_table = {NULL, 0, 0};
  double error;
  for (t = 1; t < n_results; ++t) several |= results[t].seed != results[0].seed;
  put(&whole_table, "%-*s", title_width, "");
  for (t = 0; t < n_tasks; ++t) {
    put(&whole_table, " %*.9s%s", 10 - tasks[t].hard, tasks[t].task.name, tasks[t].hard ? "*" : "");
    hard |= tasks[t].hard;
  }
  put(&whole_table, " |%s |  parameters  seconds\n%-*s",
      all_small() ? "  small=all" : "      small        all", title_width, "metric x 100");
  for (t = 0; t < n_tasks; ++t) {
    moe_metric_name(name, &tasks[t].task, 0);
    put(&whole_table, " %10.9s", name);
  }
  put(&whole_table, " |\n%-*s", title_width, "train/dev rows");
  for (t = 0; t < n_tasks; ++t)
    put(&whole_table, " %10s",
        printed("%lld/%lld", (long long)tasks[t].train.n, (long long)dev_rows(&tasks[t])));
  put(&whole_table, " |\n%-*s", title_width, "chance + 2 se");
  for (t = 0; t < n_tasks; ++t) {
    double v = chance(&tasks[t], &error);
    put_cell(&whole_table, v + 2 * error, 0, 1, 0);
  }
  put(&whole_table, " |\n");
  for (s = 0; s < n_lines; ++s) any_undefined |= put_line(&whole_table, s);
  printf("\n");
  print_blocks(&whole_table, title_width, 11);
  free(whole_table.data);
  print_sentence(all_small()
                     ? "small=all: mean over all tasks, which have at most 10,000 training rows%s."
                     : "small: mean over tasks with at most 10,000 training rows; all: over all "
                       "tasks%s.",
                 several ? "; mean+-standard deviation over the seeds" : "");
  print_sentence(
      "chance + 2 se: one answer to every row (the most frequent class, for F1 class 1; 0 for "
      "correlations) plus two standard errors%s.",
      hard ? "; *: declared hard" : "");
  if (any_undefined)
    print_sentence(
        "?: the metric has no value (only one class is right or predicted, or the values are "
        "constant) and counts as 0.");
}

/* Of the last line of the first seed that has experts: their shares, as whole percents, a row for
   each task and a group of columns for each layer. */
static inline void print_routes(void) {
  const result *r = results + n_results;
  text whole_table = {NULL, 0, 0};
  int t = 0, l, e;
  while (t < n_tasks && r-- > results)
    for (t = 0; t < n_tasks && r->part[t] && r->part[t]->routes && r->seed == results->seed; ++t)
      continue;
  if (t < n_tasks) return;
  printf("\nExperts chosen by %s (seed %d), %% of each task's dev tokens, by layer\n",
         lines[r->line].title, r->seed);
  put(&whole_table, "%-15s", "");
  for (l = 0; l < route_layers; ++l) put(&whole_table, "  %-*d", 4 * route_experts, l + 1);
  for (t = 0; t < n_tasks; ++t) {
    put(&whole_table, "\n%-15.15s", tasks[t].task.name);
    for (l = 0; l < route_layers; ++l) {
      const int64_t *c = r->part[t]->routes + (int64_t)l * route_experts;
      int64_t sum = 0;
      for (e = 0; e < route_experts; ++e) sum += c[e];
      for (e = 0; e < route_experts; ++e)
        put(&whole_table, "%s %3d", e ? "" : " ", sum ? (int)((100 * c[e] + sum / 2) / sum) : 0);
      put(&whole_table, " ");
    }
  }
  put(&whole_table, "\n");
  print_blocks(&whole_table, 15, 4 * route_experts + 2);
  free(whole_table.data);
}

/* ---- JSON ---- */

static inline void json_result(text *j, const result *r) {
  char name[MOE_NAME_BYTES];
  double v = 0;
  int t;
  put_json(j, "\n  {'system': '%s', 'seed': %d, 'parameters': %.0f, 'seconds': %.3f, ",
           lines[r->line].name, r->seed, r->parameters, r->seconds);
  put_json(j, "'tokens': %.0f,\n   'tokens_per_second': %.1f, 'steps': %.0f, 'tasks': [", r->tokens,
           r->tokens / (r->seconds > 0 ? r->seconds : 1), r->steps);
  for (t = 0; t < n_tasks; ++t) {
    moe_metric_name(name, &tasks[t].task, 0);
    put_json(j, "%s\n    {'name': '%s', 'metric': '%s', 'value': %.9g, 'n': %lld, 'rows': %lld",
             t ? "," : "", tasks[t].task.name, name, r->part[t]->value,
             (long long)dev_rows(&tasks[t]), (long long)tasks[t].official);
    put_json(j, r->part[t]->defined ? "}" : ", 'defined': false}");
  }
  put_json(j, "],\n   'small': %s", result_value(&v, r, n_tasks) ? printed("%.9g", v) : "null");
  result_value(&v, r, n_tasks + 1);
  put_json(j, ", 'all': %.9g", v);
}

static inline void json_comparison(text *j, const comparison *c) {
  const char *comma = "";
  int t;
  put_json(j, "\n  {'a': '%s', 'b': '%s', 'differences': [", c->a->name, c->b->name);
  for (t = 0; t <= n_tasks; ++t) {
    const difference *d = &c->of[t];
    if (!d->known) continue;
    put_json(j, "%s\n    {'name': '%s', 'difference': %.9g, 'low': %.9g, 'high': %.9g, ", comma,
             t < n_tasks ? tasks[t].task.name : "all", d->value, d->low, d->high);
    put_json(j, "'better': %.9g}", d->better);
    comma = ",";
  }
  put(j, "]}");
}

/* All results that are whole; `more` (or NULL) adds fields to each. */
static inline void write_json(const char *path, void (*more)(text *j, const result *r)) {
  text j = {NULL, 0, 0};
  const char *comma = "";
  int i, t;
  put_json(&j, "{'options': [");
  for (i = 1; i < program.argc; ++i) {
    put(&j, i > 1 ? ", " : "");
    put_quoted(&j, program.argv[i]);
  }
  put_json(&j, "],\n 'isa': '%s', 'precision': '%s', 'threads': %d,\n 'runs': [",
           moe_isa_name(env.isa), precision_name(), (int)env.threads);
  for (i = 0; i < n_results; ++i) {
    for (t = 0; t < n_tasks && results[i].part[t]; ++t) continue;
    if (t < n_tasks) continue;
    put(&j, "%s", comma);
    json_result(&j, &results[i]);
    if (more) more(&j, &results[i]);
    put(&j, "}");
    comma = ",";
  }
  put(&j, "\n ]");
  for (i = 0; i < n_comparisons; ++i) {
    put_json(&j, i ? "," : ",\n 'comparisons': [");
    json_comparison(&j, &comparisons[i]);
  }
  put(&j, "%s}\n", n_comparisons ? "\n ]" : "");
  save_text(&j, path);
}
#endif
