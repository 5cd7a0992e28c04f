/* routes.c - which task's tokens go to which experts: a report of a trained model
   cc -O3 -o routes examples/tools/routes.c -lm -pthread
   ./routes MODEL [--data DIR] [--checkpoints A,B,C | --history FILE] [--text] [--csv FILE] [--html
   FILE] Runs DIR/TASK/dev.tsv of every task through the model and reports shares of the experts,
   likeness of the tasks, experts hardly used, what each expert is worth (the metrics without it),
   and what the routes have to do with features of the tasks; with --checkpoints, or the --csv of
   tasklevel.c as --history, how the routes came about. As text (default), as CSV, and as one HTML
   page with everything in it. --help lists the options. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#include "../../moe.h"

enum { BATCH = 32, FIELDS = 16, FEATURES = 7, NAME = 64 };

static const char help[] =
    "routes MODEL [options]: which task's tokens go to which experts\n"
    "  --data DIR             folder with TASK/dev.tsv (and train.tsv, whose rows are counted)   "
    "(examples/data)\n"
    "  --checkpoints A,B,C    models or checkpoints saved while MODEL was trained, oldest first: "
    "routes over time\n"
    "  --history FILE         the routes that tasklevel --csv looked at during the training of "
    "MODEL; --run N of several\n"
    "  --text                 print the report                                    (unless --csv or "
    "--html is given)\n"
    "  --csv FILE             all numbers: what,model,task,layer,expert,other,value\n"
    "  --html FILE            one page with pictures, nothing else to load\n"
    "  --rows N               rows of each dev.tsv, 0 = all                                      "
    "(200)\n"
    "  --hardly PERCENT       an expert with a smaller share of a task's tokens counts as hardly "
    "used (1)\n"
    "  --tau A,B,C            task-level models: temperature of each checkpoint and of MODEL       "
    "   (the model's)\n"
    "  --threads N  --isa auto|avx512|avx2|neon|scalar\n";

static struct {
  const char *model, *data, *checkpoints, *csv, *html, *isa, *tau, *history;
  int text, rows, threads, run;
  double hardly; /* a share, from 0 to 1 */
} opt = {NULL, "examples/data", NULL, NULL, NULL, "auto", NULL, NULL, 0, 200, 1, 0, 0.01};

static moe_env env;
static const char *file_name; /* what is being read, for messages */
static long line_number;

static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "routes: ");
  if (file_name) fprintf(stderr, "%s: ", file_name);
  if (line_number) fprintf(stderr, "line %ld: ", line_number);
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
}

static void say(void *user, moe_status status, const char *sentence) {
  (void)user;
  (void)status;
  fprintf(stderr, "routes: ");
  if (file_name && line_number) fprintf(stderr, "%s: line %ld: ", file_name, line_number);
  fprintf(stderr, "%s\n", sentence);
}

/* What failed has been said by the log. */
static void need(moe_status status) {
  if (status) exit(1);
}

static void *take(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size);
  if (!p) die("out of memory (%zu bytes)", count * size);
  return p;
}

static double number(const char *what, const char *text, double low, double high) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end) die("%s \"%s\" is no number", what, text);
  if (!(v >= low && v <= high)) die("%s %s is not within %g .. %g", what, text, low, high);
  return v;
}

/* A character's place: a whole number. */
static int32_t offset(const char *text) {
  double v = number("offset", text, 0, 1e9);
  if (v != (double)(int32_t)v) die("offset %s is no whole number", text);
  return (int32_t)v;
}

static void options(int argc, char **argv) {
  int i;
  for (i = 1; i < argc; ++i) {
    const char *o = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
    if (!strcmp(o, "--help") || !strcmp(o, "-h")) {
      fputs(help, stdout);
      exit(0);
    }
    if (!strcmp(o, "--text")) {
      opt.text = 1;
      continue;
    }
    if (strncmp(o, "--", 2)) {
      if (opt.model)
        die("two models, \"%s\" and \"%s\"; earlier ones go behind --checkpoints", opt.model, o);
      opt.model = o;
      continue;
    }
    if (!v) die("%s needs a value", o);
    ++i;
    if (!strcmp(o, "--data"))
      opt.data = v;
    else if (!strcmp(o, "--checkpoints"))
      opt.checkpoints = v;
    else if (!strcmp(o, "--history"))
      opt.history = v;
    else if (!strcmp(o, "--run"))
      opt.run = (int)number(o, v, 1, 1e6);
    else if (!strcmp(o, "--csv"))
      opt.csv = v;
    else if (!strcmp(o, "--html"))
      opt.html = v;
    else if (!strcmp(o, "--rows"))
      opt.rows = (int)number(o, v, 0, 1e9);
    else if (!strcmp(o, "--hardly"))
      opt.hardly = number(o, v, 0, 100) / 100;
    else if (!strcmp(o, "--threads"))
      opt.threads = (int)number(o, v, 1, 256);
    else if (!strcmp(o, "--isa"))
      opt.isa = v;
    else if (!strcmp(o, "--tau"))
      opt.tau = v;
    else
      die("unknown option %s; --help lists them", o);
  }
  if (!opt.model) die("which model? routes MODEL [options]; --help lists them");
  if (!opt.csv && !opt.html) opt.text = 1;
}

/* ---- rows of the dev sets ---- */

typedef struct row {
  const char *a, *b, *group;
  float label;
  int32_t span[4];
} row;

typedef struct rows {
  char *text; /* the file, cut into strings */
  row *row;
  size_t n;
  double train; /* rows of train.tsv, 0 where there is none */
} rows;

static rows *data; /* (T) */

static int split(char *line, char **field) {
  int n = 0;
  for (;; *line++ = 0) {
    if (n < FIELDS) field[n] = line;
    ++n;
    line = strchr(line, '\t');
    if (!line) return n;
  }
}

static int column(char **name, int n, const char *wanted) {
  int i;
  for (i = 0; i < n && strcmp(name[i], wanted); ++i) continue;
  if (i == n) die("the header has no column \"%s\"", wanted);
  return i;
}

/* The line at *next, cut at its end; NULL when there is none. */
static char *next_line(char **next) {
  char *line = *next, *end;
  if (!*line) return NULL;
  ++line_number;
  end = line + strcspn(line, "\n");
  *next = *end ? end + 1 : end;
  *end = 0;
  if (end > line && end[-1] == '\r') end[-1] = 0;
  return line;
}

static double count_rows(const char *path) {
  moe_env quiet = env;
  void *bytes;
  size_t n, i;
  double lines = 0;
  quiet.log = NULL;
  if (moe_file_read(&bytes, &n, path, &quiet)) return 0;
  for (i = 0; i < n; ++i) lines += ((char *)bytes)[i] == '\n';
  if (n && ((char *)bytes)[n - 1] != '\n') ++lines;
  moe_free(bytes);
  return lines > 0 ? lines - 1 : 0;
}

static void read_rows(rows *r, const moe_task *task) {
  static char path[4096];
  static const char *const span_name[] = {"start1", "end1", "start2", "end2"};
  char *next, *line, *field[FIELDS];
  int fields, label, a, b = -1, group = -1, span[4] = {-1, -1, -1, -1}, i;
  size_t bytes, room = 0;
  void *file;
  if (strlen(opt.data) + strlen(task->name) + 16 > sizeof path)
    die("--data: the name of the folder is too long");
  sprintf(path, "%s/%s/train.tsv", opt.data, task->name);
  r->train = count_rows(path);
  sprintf(path, "%s/%s/dev.tsv", opt.data, task->name);
  need(moe_file_read(&file, &bytes, path, &env));
  file_name = path;
  if (memchr(file, 0, bytes)) die("a zero byte");
  next = r->text = (char *)file;
  if (!strncmp(next, "\xef\xbb\xbf", 3))
    next += 3; /* the mark that some editors put before UTF-8 */
  line = next_line(&next);
  if (!line) die("the file is empty; its first line should name the columns");
  fields = split(line, field);
  if (fields > FIELDS) die("%d columns, %d are the most", fields, FIELDS);
  label = column(field, fields, "label");
  a = column(field, fields, "sentence1");
  if (task->pair) b = column(field, fields, "sentence2");
  if (task->kind == MOE_KIND_RANKING) group = column(field, fields, "group");
  for (i = 0; i < 4 && task->kind == MOE_KIND_SPAN; ++i)
    span[i] = column(field, fields, span_name[i]);
  while ((!opt.rows || r->n < (size_t)opt.rows) && (line = next_line(&next)) != NULL) {
    row *it;
    int got = split(line, field);
    if (got != fields) die("%d columns, the header has %d", got, fields);
    if (r->n == room) {
      r->row = (row *)realloc(r->row, (room = 2 * room + 64) * sizeof *r->row);
      if (!r->row) die("out of memory");
    }
    it = &r->row[r->n++];
    it->a = field[a];
    it->b = b < 0 ? NULL : field[b];
    it->group = group < 0 ? "" : field[group];
    for (i = 0; i < 4 && span[0] >= 0; ++i) it->span[i] = offset(field[span[i]]);
    if (task->kind == MOE_KIND_REGRESSION)
      it->label = (float)number("label", field[label], (double)task->low, (double)task->high);
    else
      it->label = (float)number("label", field[label], 0, task->classes - 1);
    if (task->kind != MOE_KIND_REGRESSION && it->label != (float)(int)it->label)
      die("label %s is no whole number", field[label]);
  }
  if (!r->n) die("no rows");
  file_name = NULL;
  line_number = 0;
}

/* ---- a model at work ---- */

static int T, L, N; /* tasks, layers, experts of the model */
static int blocks;  /* whether the experts are whole blocks that a task chooses [TL] */
static const moe_task *tasks[MOE_MAX_TASKS];

/* A model, what runs it, and room for a batch. */
typedef struct worker {
  moe_model *model;
  moe_tokenizer *tokenizer;
  void *tokenizer_block;
  moe_context *context;
  moe_batch batch;
  int32_t longest, *ids, *begin, *end, *seq_start, *task, *span;
  uint8_t *segments;
  float *scores;
} worker;

static size_t at(int t, int l, int i) {
  return ((size_t)t * (size_t)L + (size_t)l) * (size_t)N + (size_t)i;
}

static int32_t longest_of(const moe_model *model, int t) {
  int32_t own = moe_model_task(model, t)->max_len, all = moe_model_config(model)->max_len;
  return own && own < all ? own : all;
}

static void open_worker(worker *w, const char *path) {
  const moe_config *config;
  moe_limits limits;
  const char *vocab;
  size_t bytes, vocab_bytes, tokens;
  int t;
  memset(w, 0, sizeof *w);
  need(moe_model_load(&w->model, path, &env));
  config = moe_model_config(w->model);
  vocab = moe_model_vocab(w->model, &vocab_bytes);
  file_name = path;
  if (!vocab) die("the model holds no vocabulary, so texts are nothing to it");
  if (config->experts < 2) die("the model is dense: with one expert there is nothing to report");
  need(moe_tokenizer_size(vocab, vocab_bytes, &bytes, &env));
  w->tokenizer_block = take(bytes + 64, 1);
  need(moe_tokenizer_init(&w->tokenizer,
                          (char *)w->tokenizer_block + (64 - (uintptr_t)w->tokenizer_block % 64),
                          bytes, vocab, vocab_bytes, config->cased, &env));
  if (moe_tokenizer_words(w->tokenizer) > config->vocab)
    die("the vocabulary has %d words, the model has %d embeddings",
        (int)moe_tokenizer_words(w->tokenizer), (int)config->vocab);
  for (t = 0; t < moe_model_tasks(w->model); ++t)
    if (longest_of(w->model, t) > w->longest) w->longest = longest_of(w->model, t);
  memset(&limits, 0, sizeof limits);
  limits.tokens = BATCH * w->longest;
  limits.sequences = BATCH;
  limits.training = 0;
  need(moe_context_create(&w->context, w->model, &limits, &env));
  tokens = (size_t)limits.tokens;
  w->ids = (int32_t *)take(tokens, sizeof *w->ids);
  w->begin = (int32_t *)take(tokens, sizeof *w->begin);
  w->end = (int32_t *)take(tokens, sizeof *w->end);
  w->segments = (uint8_t *)take(tokens, 1);
  w->seq_start = (int32_t *)take(BATCH + 1, sizeof *w->seq_start);
  w->task = (int32_t *)take(BATCH, sizeof *w->task);
  w->span = (int32_t *)take(4 * BATCH, sizeof *w->span);
  w->scores = (float *)take(BATCH * (size_t)moe_model_max_classes(w->model), sizeof *w->scores);
  w->batch.seq_start = w->seq_start;
  w->batch.ids = w->ids;
  w->batch.segments = config->segments > 1 ? w->segments : NULL;
  w->batch.task = w->task;
  file_name = NULL;
}

static void close_worker(worker *w) {
  moe_context_free(w->context);
  moe_model_free(w->model);
  free(w->tokenizer_block);
  free(w->ids);
  free(w->begin);
  free(w->end);
  free(w->segments);
  free(w->seq_start);
  free(w->task);
  free(w->span);
  free(w->scores);
}

/* Puts the rows from `first` on into the batch. */
static void fill_batch(worker *w, int t, size_t first) {
  const moe_task *task = moe_model_task(w->model, t);
  const rows *r = &data[t];
  int32_t n = 0;
  for (; n < BATCH && first + (size_t)n < r->n; ++n) {
    const row *it = &r->row[first + (size_t)n];
    moe_text text = moe_text_of(it->a, it->b);
    moe_tokens tokens;
    size_t place = (size_t)w->seq_start[n];
    tokens.ids = w->ids + place;
    tokens.segments = w->segments + place;
    tokens.begin = w->begin + place;
    tokens.end = w->end + place;
    tokens.capacity = w->longest;
    need(moe_encode(w->tokenizer, &tokens, &text, longest_of(w->model, t),
                    moe_model_config(w->model)->truncate, &env));
    if (task->kind == MOE_KIND_SPAN) {
      need(moe_tokens_span(w->span + 4 * n, &tokens, 0, it->span[0], it->span[1], &env));
      need(moe_tokens_span(w->span + 4 * n + 2, &tokens, task->pair, it->span[2], it->span[3],
                           &env));
    }
    w->task[n] = t;
    w->seq_start[n + 1] = w->seq_start[n] + tokens.count;
  }
  w->batch.S = n;
  w->batch.span = task->kind == MOE_KIND_SPAN ? w->span : NULL;
}

/* Of the rows of a group, the one with the largest score of class 1 is the answer. */
static double ranking_accuracy(const rows *r, const float *value) {
  size_t i, j, groups = 0, right = 0;
  for (i = 0; i < r->n; ++i) {
    size_t best = i;
    for (j = 0; j < i && strcmp(r->row[i].group, r->row[j].group); ++j) continue;
    if (j < i) continue; /* its group has been counted */
    for (j = i + 1; j < r->n; ++j)
      if (value[j] > value[best] && !strcmp(r->row[i].group, r->row[j].group)) best = j;
    ++groups;
    right += r->row[best].label > 0;
  }
  return (double)right / (double)groups;
}

static const char *metric_name(const moe_task *task) {
  static char name[MOE_NAME_BYTES];
  strcpy(name, task->metrics[0]                    ? task->metrics
               : task->kind == MOE_KIND_REGRESSION ? "pearson"
                                                   : "accuracy");
  name[strcspn(name, ",")] = 0;
  return name;
}

/* The task's first metric over its rows; routes are added to *sums unless it is NULL. */
static double evaluate(worker *w, int t, moe_route_sums *sums) {
  const moe_task *task = moe_model_task(w->model, t);
  const rows *r = &data[t];
  const char *metric = metric_name(task);
  int32_t *predicted = (int32_t *)take(r->n, sizeof *predicted),
          *label = (int32_t *)take(r->n, sizeof *label);
  float *value = (float *)take(r->n, sizeof *value), *truth = (float *)take(r->n, sizeof *truth),
        *scratch;
  size_t i, first;
  double v;
  int32_t s, c;
  for (first = 0; first < r->n; first += BATCH) {
    fill_batch(w, t, first);
    need(moe_forward(w->context, w->scores, &w->batch, &env));
    if (sums) need(moe_route_count(sums, w->context, &w->batch, &env));
    for (s = 0; s < w->batch.S; ++s) {
      const float *score = w->scores + s * moe_model_max_classes(w->model);
      i = first + (size_t)s;
      for (c = 1; c < task->classes; ++c)
        if (score[c] > score[predicted[i]]) predicted[i] = c;
      label[i] = (int32_t)r->row[i].label;
      truth[i] = r->row[i].label;
      value[i] = task->kind == MOE_KIND_REGRESSION ? score[0] : score[1] - score[0];
    }
  }
  scratch = (float *)take(2 * r->n, sizeof *scratch);
  if (!strcmp(metric, "accuracy") && task->kind == MOE_KIND_RANKING)
    v = ranking_accuracy(r, value);
  else if (!strcmp(metric, "accuracy"))
    v = moe_metric_accuracy(predicted, label, r->n, NULL);
  else if (!strcmp(metric, "f1"))
    v = moe_metric_f1(predicted, label, r->n, NULL);
  else if (!strcmp(metric, "macro_f1"))
    v = moe_metric_macro_f1(predicted, label, r->n, task->classes, NULL);
  else if (!strcmp(metric, "matthews"))
    v = moe_metric_matthews(predicted, label, r->n, task->classes, NULL);
  else if (!strcmp(metric, "pearson"))
    v = moe_metric_pearson(value, truth, r->n, NULL);
  else
    v = moe_metric_spearman(value, truth, r->n, scratch, NULL);
  free(predicted);
  free(label);
  free(value);
  free(truth);
  free(scratch);
  return v;
}

/* ---- what is found out ---- */

/* The routes of a model, a moment in its training. */
typedef struct moment {
  char name[NAME];
  double *share; /* (T, L, N) of a task's choices in a layer; they sum to 1 */
  double
      *gate; /* (T, L, N) mean probability of an expert where it was chosen; 0 where it never was */
  double *decided; /* (L) mean probability of the experts that are chosen, over the tokens of a
                      task, then over the tasks */
  double tau;      /* temperature of a task-level router then; 0: none, or not known */
} moment;

static moment *moments;          /* the checkpoints, and the model itself last */
static int n_moments, n_history; /* so many of them were looked at by tasklevel.c, and come first */
static double *metric;           /* (T) */
static double
    *without; /* (L, N, T) the metric without an expert; NULL where no expert can be spared */
static double *feature; /* (T, FEATURES) */
static const char *const feature_name[FEATURES] = {
    "pair", "regression", "classes", "length", "length_sd", "variety", "log10_train_rows"};
static double *overlap;     /* (T, T) */
static double *r_of, *p_of; /* (FEATURES, L, N); r 2: not defined */

static const moment *last_moment(void) { return &moments[n_moments - 1]; }

/* File name without folder and ending; what would need quoting in CSV or HTML becomes an
   underscore. */
static void short_name(char *name, const char *path) {
  const char *slash = strrchr(path, '/');
  size_t n;
  snprintf(name, NAME, "%s", slash ? slash + 1 : path);
  n = strlen(name);
  if (n > 12 && !strcmp(name + n - 12, ".safetensors")) name[n - 12] = 0;
  for (; *name; ++name)
    if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_+.", *name))
      *name = '_';
}

/* The temperature at which the routes of moment number `index` are shown: of the list behind --tau,
   or the model's own. */
static double temperature_of(const moe_config *config, int index) {
  const char *at_comma = opt.tau;
  char text[32];
  double tau;
  size_t n;
  if (!opt.tau) return (double)config->temperature;
  for (; index > 0 && at_comma; --index) {
    at_comma = strchr(at_comma, ',');
    if (at_comma) ++at_comma;
  }
  if (!at_comma)
    die("--tau %s: a temperature for each checkpoint and for the model, please", opt.tau);
  n = strcspn(at_comma, ",");
  if (n >= sizeof text) die("--tau %s: that is too long for a number", opt.tau);
  memcpy(text, at_comma, n);
  text[n] = 0;
  tau = number("--tau", text, 0, 1e6);
  if (!(tau > 0)) die("--tau: a temperature must be above 0");
  return tau;
}

/* How decided a task-level router is: its largest weight, mean over the tasks. */
static void decide(moment *m) {
  int t, l, i;
  for (t = 0; t < T; ++t)
    for (l = 0; l < L; ++l) {
      double most = 0;
      for (i = 0; i < N; ++i) most = fmax(most, m->share[at(t, l, i)]);
      m->decided[l] += most / T;
    }
}

static void open_moment(moment *m) {
  m->gate = (double *)take(at(T, 0, 0), sizeof *m->gate);
  m->share = (double *)take(at(T, 0, 0), sizeof *m->share);
  m->decided = (double *)take((size_t)L, sizeof *m->decided);
}

/* Blocks as experts: a route is the weight that the router gives to each block, the same for all
   tokens of a task. */
static void observe_blocks(moment *m, const worker *w, const double *prob, const int64_t *tokens) {
  const moe_config *config = moe_model_config(w->model);
  float *routes = (float *)take(at(T, 0, 0), sizeof *routes);
  size_t c;
  if (config->router == MOE_ROUTER_TASK_LEVEL) {
    m->tau = temperature_of(config, n_moments - 1 - n_history);
    need(moe_task_router_routes(routes, w->model, (float)m->tau, &env));
  }
  for (c = 0; c < at(T, 0, 0); ++c)
    m->share[c] = m->gate[c] = config->router == MOE_ROUTER_TASK_LEVEL
                                   ? (double)routes[c]
                                   : prob[c] / (double)tokens[c / at(1, 0, 0)];
  decide(m);
  free(routes);
}

/* Runs all tasks; fills m, and values (T) with the metrics. */
static void observe(moment *m, worker *w, const char *path, double *values) {
  moe_route_sums sums;
  double k = (double)moe_model_config(w->model)->top_k;
  int t, l, i;
  short_name(m->name, path);
  sums.tokens = (int64_t *)take((size_t)T, sizeof *sums.tokens);
  sums.chosen = (int64_t *)take(at(T, 0, 0), sizeof *sums.chosen);
  sums.prob = (double *)take(at(T, 0, 0), sizeof *sums.prob);
  open_moment(m);
  sums.gate = m->gate;
  for (t = 0; t < T; ++t) values[t] = evaluate(w, t, &sums);
  if (blocks) observe_blocks(m, w, sums.prob, sums.tokens);
  for (t = 0; t < T && !blocks; ++t)
    for (l = 0; l < L; ++l)
      for (i = 0; i < N; ++i) {
        size_t c = at(t, l, i);
        double choices = k * (double)sums.tokens[t];
        m->share[c] = (double)sums.chosen[c] / choices;
        m->decided[l] += m->gate[c] / choices / T;
        if (sums.chosen[c]) m->gate[c] /= (double)sums.chosen[c];
      }
  free(sums.tokens);
  free(sums.chosen);
  free(sums.prob);
}

/* A checkpoint must be of the same model, or its routes cannot be compared. */
static void check_same(const worker *w, const char *path) {
  const moe_config *config = moe_model_config(w->model);
  int t;
  file_name = path;
  if (moe_model_tasks(w->model) != T)
    die("%d tasks, %s has %d", (int)moe_model_tasks(w->model), opt.model, T);
  for (t = 0; t < T; ++t)
    if (strcmp(moe_model_task(w->model, t)->name, tasks[t]->name))
      die("task %d is %s, in %s it is %s", t + 1, moe_model_task(w->model, t)->name, opt.model,
          tasks[t]->name);
  if (blocks != (config->unit == MOE_UNIT_BLOCK))
    die("its experts are of another kind than those of %s", opt.model);
  if (config->layers != L || config->experts != N)
    die("%d layers of %d experts, %s has %d of %d", (int)config->layers, (int)config->experts,
        opt.model, L, N);
  file_name = NULL;
}

static void observe_checkpoints(void) {
  char *list, *path, *next;
  double *values = (double *)take((size_t)T, sizeof *values);
  if (!opt.checkpoints) {
    free(values);
    return;
  }
  list = strcpy((char *)take(strlen(opt.checkpoints) + 1, 1), opt.checkpoints);
  for (path = list; path; path = next) {
    worker w;
    next = strchr(path, ',');
    if (next) *next++ = 0;
    if (!*path) die("--checkpoints: an empty name in the list");
    open_worker(&w, path);
    check_same(&w, path);
    ++n_moments;
    observe(&moments[n_moments - 1], &w, path, values);
    close_worker(&w);
  }
  free(list);
  free(values);
}

static int comma_split(char *line, char **field) {
  int n = 0;
  for (;; *line++ = 0) {
    if (n < FIELDS) field[n] = line;
    ++n;
    line = strchr(line, ',');
    if (!line) return n;
  }
}

/* The moments that tasklevel --csv has written: a row for each probability, moment after moment. */
static void read_history(void) {
  static const char *const wanted[] = {"run",   "step",  "temperature", "task",
                                       "layer", "block", "probability"};
  char *next, *line, *field[FIELDS];
  int where[7], fields, k, run = 0;
  double step = -1;
  size_t bytes, seen = 0, i, rows_of = 0;
  void *file;
  if (!opt.history) {
    moments = (moment *)take(2 + (opt.checkpoints ? strlen(opt.checkpoints) : 0), sizeof *moments);
    return;
  }
  if (!blocks) die("--history is for models whose experts are blocks");
  need(moe_file_read(&file, &bytes, opt.history, &env));
  for (i = 0; i < bytes; ++i) rows_of += ((char *)file)[i] == '\n';
  moments = (moment *)take(
      3 + rows_of / at(T, 0, 0) + (opt.checkpoints ? strlen(opt.checkpoints) : 0), sizeof *moments);
  file_name = opt.history;
  next = (char *)file;
  line = next_line(&next);
  fields = line ? comma_split(line, field) : 0;
  if (fields < 7 || fields > FIELDS) die("these are not the columns of tasklevel --csv");
  for (k = 0; k < 7; ++k) where[k] = column(field, fields, wanted[k]);
  while ((line = next_line(&next)) != NULL) {
    moment *m;
    int t, l, b, of;
    if (comma_split(line, field) != fields) die("another number of columns than the header");
    of = (int)number("run", field[where[0]], 1, 1e6);
    if (opt.run && of != opt.run) continue;
    if (run && of != run) die("runs %d and %d stand here: --run chooses one", run, of);
    run = of;
    if (number("step", field[where[1]], 0, 1e15) > step) { /* a new moment */
      if (seen % at(T, 0, 0)) die("the moment before is not complete");
      step = number("step", field[where[1]], 0, 1e15);
      m = &moments[n_moments++];
      open_moment(m);
      snprintf(m->name, NAME, "step_%.0f", step);
      m->tau = number("temperature", field[where[2]], 1e-9, 1e9);
    }
    m = &moments[n_moments - 1];
    for (t = 0; t < T && strcmp(tasks[t]->name, field[where[3]]); ++t) continue;
    if (t == T) die("the model has no task %s", field[where[3]]);
    l = (int)number("layer", field[where[4]], 1, L) - 1,
    b = (int)number("block", field[where[5]], 1, N) - 1;
    m->share[at(t, l, b)] = m->gate[at(t, l, b)] = number("probability", field[where[6]], 0, 1);
    ++seen;
  }
  if (!n_moments) die("no row is there%s", opt.run ? " of that run" : "");
  if (seen != (size_t)n_moments * at(T, 0, 0))
    die("%lu rows are there, %d moments of this model have %lu", (unsigned long)seen, n_moments,
        (unsigned long)((size_t)n_moments * at(T, 0, 0)));
  for (k = 0; k < n_moments; ++k) decide(&moments[k]);
  n_history = n_moments;
  file_name = NULL;
  line_number = 0;
  moe_free(file);
}

/* Whether layer l can do without expert i: it is there, and with it more than a token needs. */
static int can_spare(const moe_config *config, int l, int i) {
  int there = 0, e;
  for (e = 0; e < N; ++e) there += !config->pruned || !config->pruned[l * N + e];
  return there > config->top_k && !(config->pruned && config->pruned[l * N + i]);
}

/* The metrics of every task without each expert in turn; unchanged for one that is absent or cannot
   be spared. */
static void observe_without(worker *w) {
  const moe_config *config = moe_model_config(w->model);
  uint8_t *off = (uint8_t *)take((size_t)L * (size_t)N, 1);
  int t, l, i;
  if (N - 1 >= config->top_k) {
    without = (double *)take((size_t)L * (size_t)N * (size_t)T, sizeof *without);
    moe_context_mask(w->context, off);
    for (l = 0; l < L; ++l)
      for (i = 0; i < N; ++i) {
        off[l * N + i] = (uint8_t)can_spare(config, l, i);
        for (t = 0; t < T; ++t)
          without[(l * N + i) * T + t] = off[l * N + i] ? evaluate(w, t, NULL) : metric[t];
        off[l * N + i] = 0;
      }
    moe_context_mask(w->context, NULL);
  }
  free(off);
}

/* Features of a task that a person could write down: of its form, and of its texts. */
static void find_features(worker *w, int t) {
  const moe_task *task = tasks[t];
  double *f = feature + t * FEATURES, sum = 0, square = 0, different = 0;
  uint8_t *seen = (uint8_t *)take((size_t)moe_model_config(w->model)->vocab, 1);
  size_t first;
  int32_t s, i;
  for (first = 0; first < data[t].n; first += BATCH) {
    fill_batch(w, t, first);
    for (s = 0; s < w->batch.S; ++s) {
      double length = w->seq_start[s + 1] - w->seq_start[s];
      sum += length;
      square += length * length;
    }
    for (i = 0; i < w->seq_start[w->batch.S]; ++i) {
      different += !seen[w->ids[i]];
      seen[w->ids[i]] = 1;
    }
  }
  free(seen);
  f[0] = task->pair;
  f[1] = task->kind == MOE_KIND_REGRESSION;
  f[2] = task->classes;
  f[3] = sum / (double)data[t].n;
  f[4] = sqrt(fmax(0, square / (double)data[t].n - f[3] * f[3]));
  f[5] = different / sum;
  f[6] = data[t].train > 0 ? log10(data[t].train) : 0;
}

/* Continued fraction of the incomplete beta function, by Lentz's method. */
static double beta_fraction(double x, double a, double b) {
  double c = 1, d = 1 - (a + b) * x / (a + 1), h;
  int m;
  if (fabs(d) < 1e-300) d = 1e-300;
  d = 1 / d;
  for (h = d, m = 1; m < 500; ++m) {
    int half;
    double change = 1;
    for (half = 0; half < 2; ++half) {
      double numerator = half ? -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
                              : m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
      d = 1 + numerator * d;
      if (fabs(d) < 1e-300) d = 1e-300;
      c = 1 + numerator / c;
      if (fabs(c) < 1e-300) c = 1e-300;
      d = 1 / d;
      change = c * d;
      h *= change;
    }
    if (fabs(change - 1) < 1e-15) break;
  }
  return h;
}

/* I_x(a, b), the regularised incomplete beta function, 0 <= x <= 1. */
static double beta(double x, double a, double b) {
  double front;
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x));
  if (x < (a + 1) / (a + b + 2)) return front * beta_fraction(x, a, b) / a;
  return 1 - front * beta_fraction(1 - x, b, a) / b;
}

/* Pearson's r over the tasks, and its two-sided p-value by the t distribution with T - 2 degrees of
   freedom: p = I_{1-r^2}((T-2)/2, 1/2). r = 2 where one side is constant or there are too few
   tasks. */
static void correlate(double *r, double *p, const double *x, size_t stride_x, const double *y,
                      size_t stride_y) {
  double mx = 0, my = 0, xy = 0, xx = 0, yy = 0;
  int t, vary_x = 0, vary_y = 0;
  for (t = 0; t < T; ++t) {
    mx += x[(size_t)t * stride_x] / T;
    my += y[(size_t)t * stride_y] / T;
    vary_x |= x[(size_t)t * stride_x] != x[0];
    vary_y |= y[(size_t)t * stride_y] != y[0];
  }
  for (t = 0; t < T; ++t) {
    double dx = x[(size_t)t * stride_x] - mx, dy = y[(size_t)t * stride_y] - my;
    xy += dx * dy;
    xx += dx * dx;
    yy += dy * dy;
  }
  *r = 2;
  *p = 1;
  if (T < 3 || !vary_x || !vary_y || !(xx > 0 && yy > 0)) return;
  *r = fmax(-1, fmin(1, xy / sqrt(xx * yy)));
  *p = beta(1 - *r * *r, (T - 2) / 2.0, 0.5);
}

/* Share of the choices that two tasks would have in common: 1 = the same routes, 0 = no expert
   shared; mean over the layers. */
static double overlap_of(const double *share, int t, int u) {
  double sum = 0;
  int l, i;
  for (l = 0; l < L; ++l)
    for (i = 0; i < N; ++i) sum += fmin(share[at(t, l, i)], share[at(u, l, i)]) / L;
  return sum;
}

/* Average-linkage clustering of the tasks by 1 - overlap. Nodes 0 .. T-1 are the tasks, T + m is
   join m. */
typedef struct node {
  int left, right, size, first; /* first: its leftmost task */
  double height, y;
} node;
static node *tree;
static int *leaf; /* (T) the tasks in the order of the tree */

static void leaves(int n, int *count) {
  if (n < T) {
    leaf[(*count)++] = n;
    return;
  }
  leaves(tree[n].left, count);
  leaves(tree[n].right, count);
}

static void cluster(void) {
  size_t room = 2 * (size_t)T;
  double *d = (double *)take(room * room, sizeof *d);
  int *alive = (int *)take(room, sizeof *alive), i, j, n, count = 0;
  tree = (node *)take(room, sizeof *tree);
  leaf = (int *)take((size_t)T, sizeof *leaf);
  for (i = 0; i < T; ++i) {
    tree[i].size = alive[i] = 1;
    tree[i].first = i;
    for (j = 0; j < T; ++j) d[(size_t)i * room + (size_t)j] = 1 - overlap[i * T + j];
  }
  for (n = T; n < 2 * T - 1; ++n) {
    int a = -1, b = -1;
    for (i = 0; i < n; ++i)
      for (j = i + 1; j < n; ++j)
        if (alive[i] && alive[j] &&
            (a < 0 || d[(size_t)i * room + (size_t)j] < d[(size_t)a * room + (size_t)b]))
          a = i, b = j;
    if (tree[a].first > tree[b].first) i = a, a = b, b = i;
    tree[n].left = a;
    tree[n].right = b;
    tree[n].first = tree[a].first;
    tree[n].size = tree[a].size + tree[b].size;
    tree[n].height = fmax(0, d[(size_t)a * room + (size_t)b]);
    alive[a] = alive[b] = 0;
    alive[n] = 1;
    for (i = 0; i < n; ++i) /* the mean over all pairs of tasks */
      d[(size_t)i * room + (size_t)n] = d[(size_t)n * room + (size_t)i] =
          (d[(size_t)i * room + (size_t)a] * tree[a].size +
           d[(size_t)i * room + (size_t)b] * tree[b].size) /
          tree[n].size;
  }
  leaves(2 * T - 2, &count);
  free(d);
  free(alive);
}

static void analyse(void) {
  const double *share = last_moment()->share;
  int t, u, f, l, i;
  overlap = (double *)take((size_t)T * (size_t)T, sizeof *overlap);
  for (t = 0; t < T; ++t)
    for (u = 0; u < T; ++u) overlap[t * T + u] = overlap_of(share, t, u);
  cluster();
  r_of = (double *)take(FEATURES * at(1, 0, 0), sizeof *r_of);
  p_of = (double *)take(FEATURES * at(1, 0, 0), sizeof *p_of);
  for (f = 0; f < FEATURES; ++f)
    for (l = 0; l < L; ++l)
      for (i = 0; i < N; ++i) {
        size_t c = (size_t)f * at(1, 0, 0) + at(0, l, i);
        correlate(&r_of[c], &p_of[c], feature + f, FEATURES, share + at(0, l, i), at(1, 0, 0));
      }
}

static double change_of(int t, int l, int i) {
  return 100 * (without[(l * N + i) * T + t] - metric[t]);
}

/* How many tasks send at least opt.hardly of their tokens to an expert; *most is the task that
   sends the largest share. */
static int users(int l, int i, int *most) {
  const double *share = last_moment()->share;
  int t, n = 0;
  for (*most = t = 0; t < T; ++t) {
    n += share[at(t, l, i)] >= opt.hardly;
    if (share[at(t, l, i)] > share[at(*most, l, i)]) *most = t;
  }
  return n;
}

/* ---- one way to write a number, for CSV and HTML alike ---- */

/* A cell of the report: what,model,task,layer,expert,other,value. Layers and experts count from 1;
   0 and "" leave a field empty. */
typedef struct cell {
  const char *what, *model, *task;
  int layer, expert;
  const char *other;
  double value;
} cell;

static cell make_cell(const char *what, const char *model, const char *task, int layer, int expert,
                      const char *other, double value) {
  cell c;
  c.what = what;
  c.model = model;
  c.task = task;
  c.layer = layer;
  c.expert = expert;
  c.other = other;
  c.value = value;
  return c;
}

static void write_csv(FILE *f, const cell *c) {
  fprintf(f, "%s,%s,%s,", c->what, c->model, c->task);
  if (c->layer) fprintf(f, "%d", c->layer);
  fprintf(f, ",");
  if (c->expert) fprintf(f, "%d", c->expert);
  fprintf(f, ",%s,%.6g\n", c->other, c->value);
}

/* What a pointer over the place says: the fields that are there, and the number as in the CSV. */
static void write_tip(FILE *f, const cell *c) {
  fprintf(f, "<title>%s", c->what);
  if (*c->model) fprintf(f, " %s", c->model);
  if (*c->task) fprintf(f, " %s", c->task);
  if (c->layer) fprintf(f, " layer %d", c->layer);
  if (c->expert) fprintf(f, " expert %d", c->expert);
  if (*c->other) fprintf(f, " %s", c->other);
  fprintf(f, ": %.6g</title>", c->value);
}

static cell share_cell(int t, int l, int i) {
  return make_cell("share", "", tasks[t]->name, l + 1, i + 1, "",
                   last_moment()->share[at(t, l, i)]);
}
static cell time_cell(const moment *m, int t, int l, int i) {
  return make_cell("share_over_time", m->name, tasks[t]->name, l + 1, i + 1, "",
                   m->share[at(t, l, i)]);
}
static cell decided_cell(const moment *m, int l) {
  return make_cell("decided", m->name, "", l + 1, 0, "", m->decided[l]);
}
static cell tau_cell(const moment *m) {
  return make_cell("temperature", m->name, "", 0, 0, "", m->tau);
}
static cell overlap_cell(int t, int u) {
  return make_cell("overlap", "", tasks[t]->name, 0, 0, tasks[u]->name, overlap[t * T + u]);
}
static cell join_cell(int n) {
  return make_cell("join", "", tasks[tree[tree[n].left].first]->name, 0, 0,
                   tasks[tree[tree[n].right].first]->name, tree[n].height);
}
static cell metric_cell(int t) {
  return make_cell("metric", "", tasks[t]->name, 0, 0, metric_name(tasks[t]), metric[t]);
}
static cell change_cell(int t, int l, int i) {
  return make_cell("change_without", "", tasks[t]->name, l + 1, i + 1, "points",
                   change_of(t, l, i));
}
static cell feature_cell(int t, int f) {
  return make_cell("feature", "", tasks[t]->name, 0, 0, feature_name[f], feature[t * FEATURES + f]);
}
static cell r_cell(int f, int l, int i) {
  return make_cell("pearson", "", "", l + 1, i + 1, feature_name[f],
                   r_of[(size_t)f * at(1, 0, 0) + at(0, l, i)]);
}
static cell p_cell(int f, int l, int i) {
  return make_cell("p_value", "", "", l + 1, i + 1, feature_name[f],
                   p_of[(size_t)f * at(1, 0, 0) + at(0, l, i)]);
}
static cell users_cell(int l, int i) {
  int most;
  return make_cell("users", "", "", l + 1, i + 1, "", users(l, i, &most));
}

static void put(FILE *f, cell c) { write_csv(f, &c); }

static void report_csv(FILE *f) {
  int t, u, l, i, m, k;
  fprintf(f, "what,model,task,layer,expert,other,value\n");
  for (t = 0; t < T; ++t) put(f, metric_cell(t));
  for (t = 0; t < T; ++t)
    put(f, make_cell("rows", "", tasks[t]->name, 0, 0, "", (double)data[t].n));
  for (t = 0; t < T; ++t)
    for (k = 0; k < FEATURES; ++k) put(f, feature_cell(t, k));
  for (t = 0; t < T; ++t)
    for (l = 0; l < L; ++l)
      for (i = 0; i < N; ++i) {
        put(f, share_cell(t, l, i));
        put(f, make_cell("gate", "", tasks[t]->name, l + 1, i + 1, "",
                         last_moment()->gate[at(t, l, i)]));
        if (without) put(f, change_cell(t, l, i));
      }
  for (t = 0; t < T; ++t)
    for (u = 0; u < T; ++u) put(f, overlap_cell(t, u));
  for (k = T; k < 2 * T - 1; ++k) put(f, join_cell(k));
  for (m = 0; m < n_moments && n_history; ++m) put(f, tau_cell(&moments[m]));
  for (m = 0; m < n_moments; ++m)
    for (l = 0; l < L; ++l) {
      put(f, decided_cell(&moments[m], l));
      for (t = 0; t < T; ++t)
        for (i = 0; i < N; ++i) put(f, time_cell(&moments[m], t, l, i));
    }
  for (l = 0; l < L; ++l)
    for (i = 0; i < N; ++i) {
      put(f, users_cell(l, i));
      for (k = 0; k < FEATURES; ++k)
        if (r_cell(k, l, i).value <= 1) {
          put(f, r_cell(k, l, i));
          put(f, p_cell(k, l, i));
        }
    }
}

/* ---- what stands out: sentences for text and HTML ---- */

/* Correlations that are defined, and those with p < 0.01. */
static int count_correlations(int *marked) {
  int f, l, i, n = 0;
  for (*marked = f = 0; f < FEATURES; ++f)
    for (l = 0; l < L; ++l)
      for (i = 0; i < N; ++i) {
        n += r_cell(f, l, i).value <= 1;
        *marked += r_cell(f, l, i).value <= 1 && p_cell(f, l, i).value < 0.01;
      }
  return n;
}

static void summary(FILE *f, const char *before, const char *after) {
  int t, u, l, i, a = 0, b = 0, c = 0, d = 0, most, idle = 0, hardly = 0, marked,
                  tests = count_correlations(&marked);
  int worst[3] = {0, 0, 0};
  for (t = 0; t < T; ++t)
    for (u = 0; u < t; ++u) {
      if (a == b || overlap[t * T + u] > overlap[a * T + b]) a = t, b = u;
      if (c == d || overlap[t * T + u] < overlap[c * T + d]) c = t, d = u;
    }
  for (l = 0; l < L; ++l)
    for (i = 0; i < N; ++i) {
      idle += users(l, i, &most) == 0;
      for (t = 0; t < T; ++t) {
        hardly += last_moment()->share[at(t, l, i)] < opt.hardly;
        if (without && change_of(t, l, i) < change_of(worst[0], worst[1], worst[2]))
          worst[0] = t, worst[1] = l, worst[2] = i;
      }
    }
  if (T > 1) {
    fprintf(f, "%s%s and %s go the most alike ways: %.0f %% of their choices agree.%s", before,
            tasks[b]->name, tasks[a]->name, 100 * overlap[a * T + b], after);
    if (T > 2)
      fprintf(f, "%s%s and %s go the most different ways: %.0f %%.%s", before, tasks[d]->name,
              tasks[c]->name, 100 * overlap[c * T + d], after);
  }
  fprintf(f,
          "%s%d of the %d experts (%d layers of %d) %s hardly used by every task; %d of %d gate "
          "entries stay under %g %%.%s",
          before, idle, L * N, L, N, idle == 1 ? "is" : "are", hardly, T * L * N, 100 * opt.hardly,
          after);
  if (without && change_of(worst[0], worst[1], worst[2]) < 0)
    fprintf(f,
            "%sThe expert that is missed most is number %d of layer %d: %s changes by %+.1f points "
            "without it.%s",
            before, worst[2] + 1, worst[1] + 1, tasks[worst[0]]->name,
            change_of(worst[0], worst[1], worst[2]), after);
  if (tests)
    fprintf(f,
            "%s%d of %d correlations with features of the tasks have p below 0.01; chance alone "
            "would give about %.1f.%s",
            before, marked, tests, tests / 100.0, after);
}

/* ---- for the terminal ---- */

static void grid_header(FILE *f, const char *title, int l) {
  int i;
  fprintf(f, "\n%s, layer %d\n%-24s", title, l + 1, "");
  for (i = 0; i < N; ++i) fprintf(f, " %6s%-2d", "expert ", i + 1);
  fprintf(f, "\n");
}

static void report_text(FILE *f) {
  int t, u, l, i, k, m, most, n;
  fprintf(f, "Routes of %s: %d tasks, %d layers, %d experts\n\n", last_moment()->name, T, L, N);
  summary(f, "- ", "\n");
  fprintf(f, "\n%-24s %-10s %7s %6s %6s %6s\n", "task", "metric", "value", "rows", "length",
          "texts");
  for (t = 0; t < T; ++t)
    fprintf(f, "%-24s %-10s %7.3f %6lu %6.1f %6d\n", tasks[t]->name, metric_name(tasks[t]),
            metric[t], (unsigned long)data[t].n, feature[t * FEATURES + 3], 1 + tasks[t]->pair);
  for (l = 0; l < L; ++l) {
    grid_header(f,
                blocks ? "Weight of a block for a task in percent"
                       : "Share of a task's tokens in percent",
                l);
    for (t = 0; t < T; ++t) {
      fprintf(f, "%-24s", tasks[leaf[t]]->name);
      for (i = 0; i < N; ++i) fprintf(f, " %8.1f", 100 * share_cell(leaf[t], l, i).value);
      fprintf(f, "\n");
    }
  }
  fprintf(f, "\nChoices that two tasks have in common, percent (order of the dendrogram)\n");
  for (t = 0; t < T; ++t) {
    fprintf(f, "%3d %-20s", t + 1, tasks[leaf[t]]->name);
    for (u = 0; u < T; ++u) fprintf(f, " %4.0f", 100 * overlap[leaf[t] * T + leaf[u]]);
    fprintf(f, "\n");
  }
  for (n = T; n < 2 * T - 1; ++n)
    fprintf(f, "  joined at %3.0f %%: %s (%d) and %s (%d)\n", 100 * (1 - tree[n].height),
            tasks[tree[tree[n].left].first]->name, tree[tree[n].left].size,
            tasks[tree[tree[n].right].first]->name, tree[tree[n].right].size);
  for (m = 0; m < n_moments && n_moments > 1; ++m) {
    double same = 0;
    for (t = 0; t < T; ++t)
      for (l = 0; l < L; ++l)
        for (i = 0; i < N; ++i)
          same += fmin(moments[m].share[at(t, l, i)], last_moment()->share[at(t, l, i)]) / (T * L);
    if (!m)
      fprintf(f,
              "\n%-24s mean probability of the chosen expert by layer; choices that agree with the "
              "last model's\n",
              "Routes over time");
    fprintf(f, "%-24s", moments[m].name);
    for (l = 0; l < L; ++l) fprintf(f, " %5.3f", moments[m].decided[l]);
    fprintf(f, "   %3.0f %%\n", 100 * same);
  }
  fprintf(f, "\nHardly used: experts under %g %% for all tasks but at most one\n",
          100 * opt.hardly);
  for (l = 0; l < L; ++l)
    for (i = 0; i < N; ++i) {
      n = users(l, i, &most);
      if (n < 2)
        fprintf(f, "  layer %d expert %d: %d task%s, largest share %.1f %% (%s)\n", l + 1, i + 1, n,
                n == 1 ? "" : "s", 100 * share_cell(most, l, i).value, tasks[most]->name);
    }
  for (l = 0; l < L && without; ++l) {
    grid_header(f, "Change of the metric in points without an expert", l);
    for (t = 0; t < T; ++t) {
      fprintf(f, "%-24s", tasks[leaf[t]]->name);
      for (i = 0; i < N; ++i) fprintf(f, " %+8.1f", change_of(leaf[t], l, i));
      fprintf(f, "\n");
    }
  }
  if (!without) fprintf(f, "\nNo expert can be disabled: each token needs all of them.\n");
  fprintf(f, "\nFeatures of the tasks and shares of the experts, Pearson's r over the tasks; p < "
             "0.01 alone\n");
  for (k = 0; k < FEATURES; ++k)
    for (l = 0; l < L; ++l)
      for (i = 0; i < N; ++i)
        if (r_cell(k, l, i).value <= 1 && p_cell(k, l, i).value < 0.01)
          fprintf(f, "  %-18s layer %d expert %d  r = %+.3f  p = %.2g\n", feature_name[k], l + 1,
                  i + 1, r_cell(k, l, i).value, p_cell(k, l, i).value);
  if (T < 3) fprintf(f, "  none: %d tasks are too few\n", T);
}

/* ---- the page ---- */

static const char page_style[] =
    ":root{color-scheme:light "
    "dark;--paper:#fff;--ink:#1b1f24;--soft:#5c6570;--line:#d9dee3;--card:#f6f7f9;--heat:#0b4f94;--"
    "on-heat:#fff;"
    "--down:#b4510a;--on-down:#fff;--on-half:#1b1f24}\n"
    "@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e8eaed;--soft:#a3abb4;--line:#"
    "343a41;--card:#1c2024;--heat:#7cc0f5;"
    "--on-heat:#0a1520;--down:#f2a35e;--on-down:#1d0f02;--on-half:#0a1520}}\n"
    "*{box-sizing:border-box}body{margin:0 auto;max-width:1100px;padding:1.2rem 1rem "
    "4rem;background:var(--paper);color:var(--ink);"
    "font:16px/1.5 system-ui,-apple-system,\"Segoe UI\",Roboto,\"Helvetica "
    "Neue\",Arial,sans-serif}\n"
    "h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0}h2{font-size:1.15rem;margin:2.6rem 0 "
    ".2rem}p{margin:.3rem 0 .8rem;max-width:44rem}"
    ".soft,figcaption{color:var(--soft)}ul.glance{background:var(--card);border:1px solid "
    "var(--line);border-radius:8px;margin:1rem 0;"
    "padding:.8rem 1rem .8rem 2rem;max-width:48rem}\n"
    ".panels{display:flex;flex-wrap:wrap;gap:1rem "
    "1.6rem;align-items:flex-start}figure{margin:0;overflow-x:auto;max-width:100%}"
    "figcaption{font-size:.85rem;font-weight:600;margin:.2rem 0}svg{display:block}"
    "svg text{font:12px system-ui,-apple-system,\"Segoe "
    "UI\",Roboto,Arial,sans-serif;fill:var(--ink)}svg .s{fill:var(--soft)}"
    "svg .m{text-anchor:middle}svg .e{text-anchor:end}\n"
    ".c{fill:var(--card)}.h{fill:var(--heat)}.d{fill:var(--down)}svg .oh{fill:var(--on-heat)}svg "
    ".od{fill:var(--on-down)}svg .of{fill:var(--on-half)}"
    ".k{fill:none;stroke:var(--ink);stroke-width:2}.t{fill:none;stroke:var(--soft);stroke-width:1."
    "5}.g{stroke:var(--line);stroke-width:1}"
    ".b{stroke:var(--paper);stroke-width:.5}.l{fill:none;stroke-width:2.5}.o{fill:var(--soft)}\n"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:"
    "tabular-nums}"
    "td,th{padding:.25rem .7rem .25rem 0;border-bottom:1px solid "
    "var(--line);text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child,td.w,th.w{text-align:left}th{color:var(--soft);font-weight:600}"
    ".key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem;margin:.4rem 0}.key "
    "span{display:inline-flex;align-items:center;gap:.4rem}"
    ".key svg{flex:none}\n";

/* Colours of experts and layers that people with any colour vision can tell apart (Okabe and Ito);
   the key names them as well. */
static const char *colour(int i) {
  static const char *const list[] = {"#0072b2", "#e69f00", "#009e73", "#cc79a7",
                                     "#56b4e9", "#d55e00", "#b8a800", "#8a8a8a"};
  return list[i % 8];
}

enum { LABEL = 158, HIGH = 26 }; /* width of the names beside a picture, height of a row */

static int cell_width(int columns) { return columns > 8 ? 34 : 46; }

static void row_name(FILE *f, const char *name, int y) {
  if (strlen(name) > 23)
    fprintf(f, "<text class=\"e\" x=\"%d\" y=\"%d\"><title>%s</title>%.21s..</text>", LABEL - 8, y,
            name, name);
  else
    fprintf(f, "<text class=\"e\" x=\"%d\" y=\"%d\">%s</text>", LABEL - 8, y, name);
}

/* Opens a figure with a picture of that size. */
static void open_figure(FILE *f, const char *caption, int layer, int width, int height) {
  fprintf(f, "<figure><figcaption>%s", caption);
  if (layer) fprintf(f, "%slayer %d", *caption ? ", " : "", layer);
  fprintf(f,
          "</figcaption><svg width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" role=\"img\" "
          "aria-label=\"%s",
          width, height, width, height, caption);
  if (layer) fprintf(f, " layer %d", layer);
  fprintf(f, "\">\n");
}

static void close_figure(FILE *f) { fprintf(f, "</svg></figure>\n"); }

/* A square of a heat map: `depth` from -1 to 1 is how deep its colour is, negative ones in the
   second colour. */
static void square(FILE *f, int x, int y, int width, double depth, const char *text, int marked,
                   const cell *c, const cell *second) {
  const char *ink = depth < -0.7         ? " od"
                    : depth > 0.7        ? " oh"
                    : fabs(depth) > 0.52 ? " of"
                                         : ""; /* what can be read on that depth */
  int high = HIGH - 2, wide = width - 2;
  fprintf(f, "<g>");
  if (!second) write_tip(f, c);
  fprintf(f, "<rect class=\"c\" x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" rx=\"2\"/>", x, y,
          wide, high);
  fprintf(f,
          "<rect class=\"%s\" x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" rx=\"2\" "
          "fill-opacity=\"%.3f\">",
          depth < 0 ? "d" : "h", x, y, wide, high, fmin(1, fabs(depth)));
  if (second) write_tip(f, second);
  fprintf(f, "</rect>");
  if (marked)
    fprintf(f, "<rect class=\"k\" x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" rx=\"2\"/>", x + 1,
            y + 1, wide - 2, high - 2);
  fprintf(f, "<text class=\"m%s\" x=\"%d\" y=\"%d\">", ink, x + wide / 2, y + high / 2 + 4);
  if (second) write_tip(f, c);
  fprintf(f, "%s</text></g>\n", text);
}

static void expert_header(FILE *f) {
  int i, width = cell_width(N);
  fprintf(f, "<text class=\"e s\" x=\"%d\" y=\"14\">expert</text>", LABEL - 8);
  for (i = 0; i < N; ++i)
    fprintf(f, "<text class=\"m s\" x=\"%d\" y=\"14\">%d</text>", LABEL + i * width + width / 2 - 1,
            i + 1);
  fprintf(f, "\n");
}

static void page_shares(FILE *f) {
  int t, l, i, width = cell_width(N);
  char text[32];
  fprintf(f,
          "<h2>Where the tokens go</h2><p>%s, in percent. A row sums to 100. The tasks stand in "
          "the order of the dendrogram below.</p>"
          "<div class=\"panels\">\n",
          blocks ? "The experts are whole blocks: the weight that a block of a layer has for a task"
                 : "Share of a task's tokens that an expert of a layer gets");
  for (l = 0; l < L; ++l) {
    open_figure(f, "Shares", l + 1, LABEL + N * width, 22 + T * HIGH);
    expert_header(f);
    for (t = 0; t < T; ++t) {
      row_name(f, tasks[leaf[t]]->name, 22 + t * HIGH + 16);
      for (i = 0; i < N; ++i) {
        cell c = share_cell(leaf[t], l, i);
        sprintf(text, c.value < opt.hardly ? "&#183;" : "%.0f", 100 * c.value);
        square(f, LABEL + i * width, 22 + t * HIGH, width, c.value, text, 0, &c, NULL);
      }
    }
    close_figure(f);
  }
  fprintf(f, "</div><p class=\"soft\">&#183; stands for less than %g %%.</p>\n", 100 * opt.hardly);
}

static void page_likeness(FILE *f) {
  int t, u, n, width = 34, most = 160,
               left = LABEL + 18; /* left of the matrix: the tasks have numbers there */
  double top = tree[2 * T - 2].height > 0 ? tree[2 * T - 2].height : 1;
  char text[32];
  if (T < 2) return;
  fprintf(f, "<h2>Which tasks go alike ways</h2><p>Percent of the choices of expert that two tasks "
             "have in common, mean over the layers; the tree joins "
             "the most alike tasks first (average linkage).</p><div class=\"panels\">\n");
  open_figure(f, "Tree of the tasks", 0, LABEL + most + 24, 22 + T * HIGH + 20);
  for (t = 0; t < T; ++t) {
    row_name(f, tasks[leaf[t]]->name, 22 + t * HIGH + 16);
    tree[leaf[t]].y = 22 + t * HIGH + 12;
  }
  for (n = 0; n <= 4; ++n) {
    double x = LABEL + most * n / 4.0;
    fprintf(f,
            "<line class=\"g\" x1=\"%.1f\" x2=\"%.1f\" y1=\"20\" y2=\"%d\"/><text class=\"m s\" "
            "x=\"%.1f\" y=\"%d\">%.0f%s</text>",
            x, x, 22 + T * HIGH, x, 22 + T * HIGH + 14, 100 * (1 - top * n / 4), n ? "" : " %");
  }
  for (n = T; n < 2 * T - 1; ++n) {
    const node *a = &tree[tree[n].left], *b = &tree[tree[n].right];
    double x = LABEL + most * tree[n].height / top;
    cell c = join_cell(n);
    tree[n].y = (a->y + b->y) / 2;
    fprintf(f, "<path class=\"t\" d=\"M%.1f %.1fH%.1fV%.1fH%.1f\">", LABEL + most * a->height / top,
            a->y, x, b->y, LABEL + most * b->height / top);
    write_tip(f, &c);
    fprintf(f, "</path>\n");
  }
  close_figure(f);
  open_figure(f, "Choices in common, percent", 0, left + T * width, 22 + T * HIGH);
  for (t = 0; t < T; ++t) {
    fprintf(f, "<text class=\"m s\" x=\"%d\" y=\"14\">%d</text>", left + t * width + width / 2 - 1,
            t + 1);
    row_name(f, tasks[leaf[t]]->name, 22 + t * HIGH + 16);
    fprintf(f, "<text class=\"e s\" x=\"%d\" y=\"%d\">%d</text>", left - 6, 22 + t * HIGH + 16,
            t + 1);
    for (u = 0; u < T; ++u) {
      cell c = overlap_cell(leaf[t], leaf[u]);
      sprintf(text, "%.0f", 100 * c.value);
      square(f, left + u * width, 22 + t * HIGH, width, c.value * c.value, text, 0, &c, NULL);
    }
  }
  close_figure(f);
  fprintf(f, "</div>\n");
}

static void key(FILE *f, const char *what, int n) {
  int i;
  fprintf(f, "<div class=\"key\">");
  for (i = 0; i < n; ++i)
    fprintf(f,
            "<span><svg width=\"14\" height=\"14\"><rect width=\"14\" height=\"14\" rx=\"2\" "
            "fill=\"%s\"/></svg>%s %d</span>",
            colour(i), what, i + 1);
  fprintf(f, "</div>\n");
}

/* The x of moment m in a picture of that width. */
static double time_x(int m, double width) {
  return n_moments > 1 ? width * m / (n_moments - 1) : 0;
}

enum { PLOT_WIDE = 280, PLOT_HIGH = 170, PLOT_LEFT = 40 };

/* The lines and numbers of a picture over time, from low to top. */
static void plot_frame(FILE *f, const char *caption, double low, double top) {
  int m;
  open_figure(f, caption, 0, PLOT_LEFT + PLOT_WIDE + 20, PLOT_HIGH + 50);
  for (m = 0; m <= 4; ++m) {
    double v = low + (top - low) * m / 4, y = 12 + PLOT_HIGH * (1 - m / 4.0);
    fprintf(f,
            "<line class=\"g\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/><text class=\"e s\" "
            "x=\"%d\" y=\"%.1f\">%.2f</text>",
            PLOT_LEFT, PLOT_LEFT + PLOT_WIDE, y, y, PLOT_LEFT - 6, y + 4, v);
  }
  fprintf(f,
          "<text class=\"s\" x=\"%d\" y=\"%d\">%s</text><text class=\"e s\" x=\"%d\" "
          "y=\"%d\">%s</text>\n",
          PLOT_LEFT, PLOT_HIGH + 32, moments[0].name, PLOT_LEFT + PLOT_WIDE, PLOT_HIGH + 48,
          last_moment()->name);
}

/* The temperature of a task-level router as it fell. */
static void page_temperature(FILE *f) {
  double top = 0;
  int m;
  if (!n_history) return;
  for (m = 0; m < n_moments; ++m) top = fmax(top, moments[m].tau);
  plot_frame(f, "Temperature of the router", 0, top);
  fprintf(f, "<polyline class=\"l t\" points=\"");
  for (m = 0; m < n_moments; ++m)
    fprintf(f, "%.1f,%.1f ", PLOT_LEFT + time_x(m, PLOT_WIDE),
            12 + PLOT_HIGH * (1 - moments[m].tau / top));
  fprintf(f, "\"/>\n");
  for (m = 0; m < n_moments; ++m) {
    cell c = tau_cell(&moments[m]);
    fprintf(f, "<circle class=\"o\" cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\">",
            PLOT_LEFT + time_x(m, PLOT_WIDE), 12 + PLOT_HIGH * (1 - c.value / top));
    write_tip(f, &c);
    fprintf(f, "</circle>\n");
  }
  close_figure(f);
}

static void page_decided(FILE *f) {
  int l, m, width = PLOT_WIDE, high = PLOT_HIGH, left = PLOT_LEFT;
  double low = 1.0 / N, top = low, step = (1 - low) / 4;
  for (m = 0; m < n_moments; ++m)
    for (l = 0; l < L; ++l)
      while (top < moments[m].decided[l]) top += step;
  if (!(top > low)) top += step;
  if (blocks)
    fprintf(f,
            "<p>How discrete the routes are: largest weight of a block, mean over the tasks; 1/%d "
            "= %.2f means that all blocks weigh the same, "
            "1 that a task has chosen one. The picture's scale ends at %.2f.</p>\n",
            N, low, top);
  else
    fprintf(f,
            "<p>How decided the gates are: mean probability of the experts that are chosen; 1/N = "
            "%.2f means that all are the same to a gate, 1 that "
            "it is certain. The picture's scale ends at %.2f.</p>\n",
            low, top);
  key(f, "layer", L);
  fprintf(f, "<div class=\"panels\">\n");
  plot_frame(f, blocks ? "Largest weight of a block" : "Probability of the chosen experts", low,
             top);
  for (l = 0; l < L; ++l) {
    fprintf(f, "<polyline class=\"l\" stroke=\"%s\"%s points=\"", colour(l),
            l % 2 ? " stroke-dasharray=\"7 4\"" : "");
    for (m = 0; m < n_moments; ++m)
      fprintf(f, "%.1f,%.1f ", left + time_x(m, width),
              12 + high * (1 - (moments[m].decided[l] - low) / (top - low)));
    fprintf(f, "\"/>\n");
    for (m = 0; m < n_moments; ++m) {
      cell c = decided_cell(&moments[m], l);
      fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\">", left + time_x(m, width),
              12 + high * (1 - (c.value - low) / (top - low)), colour(l));
      write_tip(f, &c);
      fprintf(f, "</circle>\n");
    }
  }
  close_figure(f);
  page_temperature(f);
  fprintf(f, "</div>\n");
}

static void page_time(FILE *f) {
  int t, l, i, m, width = 180;
  double bar = (double)width / n_moments;
  if (n_moments < 2) return;
  fprintf(f,
          "<h2>How the routes came about</h2><p>%d moments of the training, from left to right: ",
          n_moments);
  for (m = 0; m < n_moments; ++m)
    if (n_moments < 9 || m < 3 || m > n_moments - 3)
      fprintf(f, "%s%s", m ? ", " : "", moments[m].name);
    else if (m == 3)
      fprintf(f, ", ...");
  fprintf(f, ".</p>\n");
  page_decided(f);
  fprintf(f, "<p>Shares of the experts in each task, one column a moment.</p>\n");
  key(f, "expert", N);
  fprintf(f, "<div class=\"panels\">\n");
  for (l = 0; l < L; ++l) {
    open_figure(f, "Shares over time", l + 1, LABEL + width + 4, 6 + T * (HIGH + 8));
    for (t = 0; t < T; ++t) {
      int y = 4 + t * (HIGH + 8);
      row_name(f, tasks[leaf[t]]->name, y + 19);
      for (m = 0; m < n_moments; ++m) {
        double up = 0;
        for (i = 0; i < N; ++i) {
          cell c = time_cell(&moments[m], leaf[t], l, i);
          fprintf(
              f,
              "<rect class=\"b\" fill=\"%s\" x=\"%.1f\" y=\"%.2f\" width=\"%.1f\" height=\"%.2f\">",
              colour(i), LABEL + m * bar, y + 30 * up, bar, 30 * c.value);
          write_tip(f, &c);
          fprintf(f, "</rect>");
          up += c.value;
        }
        fprintf(f, "\n");
      }
    }
    close_figure(f);
  }
  fprintf(f, "</div>\n");
}

static void page_hardly(FILE *f) {
  int l, i, most;
  fprintf(f,
          "<h2>Experts and who uses them</h2><p>Tasks that send an expert at least %g %% of their "
          "tokens, and the task that sends it the largest share. "
          "An expert with 0 or 1 tasks is a candidate for leaving out.</p><div "
          "class=\"scroll\"><table><tr><th>expert</th><th>tasks</th>"
          "<th>largest share</th><th class=\"w\">task</th></tr>\n",
          100 * opt.hardly);
  for (l = 0; l < L; ++l)
    for (i = 0; i < N; ++i) {
      cell c = users_cell(l, i);
      int n = users(l, i, &most);
      fprintf(f,
              "<tr><td>layer %d, expert %d</td><td>%.6g%s</td><td>%.1f %%</td><td "
              "class=\"w\">%s</td></tr>\n",
              l + 1, i + 1, c.value,
              n == 0   ? " (hardly used)"
              : n == 1 ? " (one task's own)"
                       : "",
              100 * share_cell(most, l, i).value, tasks[most]->name);
    }
  fprintf(f, "</table></div>\n");
}

static void page_without(FILE *f) {
  int t, l, i, width = cell_width(N);
  double full = 1;
  char text[32];
  fprintf(f, "<h2>What an expert is worth</h2>");
  if (!without) {
    fprintf(f, "<p>No expert can be disabled: each token needs all of them.</p>\n");
    return;
  }
  for (t = 0; t < T; ++t)
    for (l = 0; l < L; ++l)
      for (i = 0; i < N; ++i) full = fmax(full, fabs(change_of(t, l, i)));
  fprintf(f, "<p>Change of a task's metric, in points of 100, when one expert is disabled and the "
             "gates choose among the others. Orange and minus: worse; "
             "blue and plus: better.</p><div class=\"panels\">\n");
  for (l = 0; l < L; ++l) {
    open_figure(f, "Change without the expert", l + 1, LABEL + N * width, 22 + T * HIGH);
    expert_header(f);
    for (t = 0; t < T; ++t) {
      row_name(f, tasks[leaf[t]]->name, 22 + t * HIGH + 16);
      for (i = 0; i < N; ++i) {
        cell c = change_cell(leaf[t], l, i);
        sprintf(text,
                fabs(c.value) < 0.05   ? "0"
                : fabs(c.value) < 9.95 ? "%+.1f"
                                       : "%+.0f",
                c.value);
        square(f, LABEL + i * width, 22 + t * HIGH, width, c.value / full, text, 0, &c, NULL);
      }
    }
    close_figure(f);
  }
  fprintf(f, "</div>\n");
}

static void page_features(FILE *f) {
  int k, l, i, width = cell_width(N), marked, tests = count_correlations(&marked);
  char text[32];
  fprintf(f,
          "<h2>Do the routes follow features of the tasks?</h2><p>Pearson's r between a feature "
          "and the share of an expert, over the %d tasks. Framed: "
          "p &lt; 0.01 (t distribution, two-sided, each test for itself). Of %d tests about %.1f "
          "would be framed by chance; %d %s.</p>",
          T, tests, tests / 100.0, marked, marked == 1 ? "is" : "are");
  if (T < 3) {
    fprintf(f, "<p>%d tasks are too few for that.</p>\n", T);
    return;
  }
  fprintf(f, "<div class=\"panels\">\n");
  for (l = 0; l < L; ++l) {
    open_figure(f, "Pearson's r", l + 1, LABEL + N * width, 22 + FEATURES * HIGH);
    expert_header(f);
    for (k = 0; k < FEATURES; ++k) {
      row_name(f, feature_name[k], 22 + k * HIGH + 16);
      for (i = 0; i < N; ++i) {
        cell r = r_cell(k, l, i), p = p_cell(k, l, i);
        if (r.value > 1) {
          fprintf(f, "<text class=\"m s\" x=\"%d\" y=\"%d\">&#8211;</text>\n",
                  LABEL + i * width + width / 2 - 1, 22 + k * HIGH + 16);
          continue;
        }
        sprintf(text, "%+.2f", r.value);
        square(f, LABEL + i * width, 22 + k * HIGH, width, r.value * fabs(r.value), text,
               p.value < 0.01, &r, &p);
      }
    }
    close_figure(f);
  }
  fprintf(f, "</div><p class=\"soft\">&#8211;: not defined, one side is constant. Features: pair "
             "(two texts), regression, classes, mean and standard deviation "
             "of the length in tokens, variety (different tokens / tokens), log10 of the training "
             "rows.</p>\n");
}

static void report_html(FILE *f) {
  int t, k;
  fprintf(f,
          "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta "
          "name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
          "<title>Routes of %s</title><style>\n%s</style></head><body>\n",
          last_moment()->name, page_style);
  fprintf(f,
          "<h1>Routes of %s</h1><p class=\"soft\">%d tasks, %d layers of %d experts. Hold the "
          "pointer over a square for its number as it stands in the "
          "CSV file.</p><ul class=\"glance\">\n",
          last_moment()->name, T, L, N);
  summary(f, "<li>", "</li>\n");
  fprintf(f, "</ul><h2>The tasks</h2><div class=\"scroll\"><table><tr><th>task</th><th "
             "class=\"w\">metric</th><th>value</th><th>dev rows</th>");
  for (k = 0; k < FEATURES; ++k) fprintf(f, "<th>%s</th>", feature_name[k]);
  fprintf(f, "</tr>\n");
  for (t = 0; t < T; ++t) {
    fprintf(f, "<tr><td>%s</td><td class=\"w\">%s</td><td>%.6g</td><td>%lu</td>", tasks[t]->name,
            metric_name(tasks[t]), metric[t], (unsigned long)data[t].n);
    for (k = 0; k < FEATURES; ++k) fprintf(f, "<td>%.4g</td>", feature[t * FEATURES + k]);
    fprintf(f, "</tr>\n");
  }
  fprintf(f, "</table></div>\n");
  page_shares(f);
  page_likeness(f);
  page_time(f);
  page_hardly(f);
  page_without(f);
  page_features(f);
  fprintf(f, "</body></html>\n");
}

/* A file of bytes: what was printed into a temporary one. */
static moe_status copy_file(void *user, const moe_writer *writer, const moe_env *e) {
  char block[4096];
  size_t n;
  FILE *f = (FILE *)user;
  (void)e;
  rewind(f);
  while ((n = fread(block, 1, sizeof block, f)) > 0)
    if (writer->write(writer->user, block, n)) return MOE_E_IO;
  return ferror(f) ? MOE_E_IO : MOE_OK;
}

/* The old file stays as it is until the new one is whole. */
static void write_file(const char *path, void (*report)(FILE *)) {
  FILE *f = tmpfile();
  if (!f) die("a temporary file cannot be written");
  report(f);
  if (fflush(f) || ferror(f)) die("a temporary file cannot be written");
  need(moe_file_replace(path, copy_file, f, &env));
  fclose(f);
}

int main(int argc, char **argv) {
  moe_pool *pool = NULL;
  moe_isa isa;
  worker w;
  int t;
  options(argc, argv);
  isa = moe_isa_from_name(opt.isa);
  if (isa == MOE_ISA_COUNT || moe_env_init(&env, isa))
    die("this machine has no instruction set \"%s\"", opt.isa);
  env.log = say;
  if (opt.threads > 1) need(moe_pool_create(&pool, opt.threads, &env));
  open_worker(&w, opt.model);
  T = (int)moe_model_tasks(w.model);
  L = (int)moe_model_config(w.model)->layers;
  N = (int)moe_model_config(w.model)->experts;
  blocks = moe_model_config(w.model)->unit == MOE_UNIT_BLOCK;
  data = (rows *)take((size_t)T, sizeof *data);
  metric = (double *)take((size_t)T, sizeof *metric);
  feature = (double *)take((size_t)T * FEATURES, sizeof *feature);
  for (t = 0; t < T; ++t) {
    tasks[t] = moe_model_task(w.model, t);
    read_rows(&data[t], tasks[t]);
    find_features(&w, t);
  }
  read_history();
  observe_checkpoints();
  ++n_moments;
  observe(&moments[n_moments - 1], &w, opt.model, metric);
  observe_without(&w);
  analyse();
  if (opt.csv) write_file(opt.csv, report_csv);
  if (opt.html) write_file(opt.html, report_html);
  if (opt.text) report_text(stdout);
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  for (t = 0; t < T; ++t) {
    moe_free(data[t].text);
    free(data[t].row);
  }
  close_worker(&w);
  moe_pool_free(pool);
  return 0;
}
