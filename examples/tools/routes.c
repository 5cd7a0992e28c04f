/* routes.c - which task's tokens go to which experts: a report of a trained model
     cc -O3 -o routes examples/tools/routes.c -lm -pthread
     ./routes MODEL [--text] [--csv FILE] [--html FILE]

   Runs DIR/TASK/dev.tsv of every task through the model. Whatever is found out becomes a fact, a
   line of the CSV; text and HTML show the same facts as grids. From top to bottom: options, models
   at work, statistics, facts, sentences, text, HTML, main. */
#define MOE_IMPLEMENTATION
#include "score.h"

enum { FEATURES = 7, POINTS = 8 }; /* POINTS: tasks that a correlation needs at least */

static struct {
  const char *model, *checkpoints, *history, *tau, *csv, *html;
  int run, text, rows;
  double hardly; /* percent */
} opt;

static const option routes_options[] = {
    PLACE("MODEL", opt.model, "a trained model"),
    STRING("--data", "DIR", data.folder, "examples/data",
           "folder with TASK/dev.tsv (and train.tsv, whose rows are counted)"),
    STRING("--task-list", "FILE", data.list, NULL,
           "what columns are called, in place of tasks.tsv in that folder"),
    WHOLE("--rows", opt.rows, 0, 1000000000, "200",
          "rows of each dev.tsv, 0: all; the last questions of a ranking stay whole"),

    STRING("--checkpoints", "A,B,C", opt.checkpoints, NULL,
           "models or checkpoints saved while MODEL was trained, oldest first: routes over time"),
    STRING("--history", "FILE", opt.history, NULL,
           "routes that tasklevel --csv looked at while it trained MODEL"),
    WHOLE("--run", opt.run, 1, 1000000, NULL, "of the runs in --history this one"),
    STRING("--tau", "A,B,C", opt.tau, NULL,
           "task-level models: temperature of each checkpoint and of MODEL [the model's]"),
    REAL("--hardly", "PERCENT", opt.hardly, 0, 100, "1",
         "an expert with a smaller share of a task's tokens counts as hardly used"),
    FLAG("--text", opt.text, "print the report [without --csv and --html]"),
    STRING("--csv", "FILE", opt.csv, NULL, "all facts: what,model,task,layer,expert,other,value"),
    STRING("--html", "FILE", opt.html, NULL, "one page that loads nothing else"),
    END_OF_OPTIONS};
static const option *const all_options[] = {routes_options, machine_options, NULL};

/* ---- models at work ---- */

/* The routes of a model, a moment in its training. */
typedef struct moment {
  const char *name;
  double *share; /* (T, L, N) of a task's choices in a layer; they sum to 1 */
  double *gate;  /* (T, L, N) mean probability of an expert where it was chosen, else 0 */
  double tau;    /* temperature of a task-level router, 0: none, or not known */
} moment;

static int T, L, N, blocks;            /* blocks: experts are whole blocks that a task chooses */
static const moe_task *const *task_of; /* (T) */
static rows *dev;                      /* (T) */
static moment *moments;                /* history, checkpoints, and the model itself last */
static int n_moments, n_history;
static double *metric;   /* (T) */
static double *without;  /* (L, N, T) the metric without an expert; NULL: none can be spared */
static double *feature;  /* (T, FEATURES) */
static double *train_of; /* (T) rows of train.tsv, 0 where there is none */
static int n_features = FEATURES; /* the last one is left out where a task has no train.tsv */

static const moment *now; /* the model itself */
static double largest_change = 1;

static size_t at(int t, int l, int i) { return (size_t)((t * L + l) * N + i); }

static double *numbers(size_t n) { return (double *)lasting(n, sizeof(double)); }

static moment *new_moment(const char *name) {
  moment *m;
  moments = (moment *)grow(moments, (size_t)n_moments + 1, sizeof *moments);
  m = &moments[n_moments++];
  m->name = name;
  m->share = numbers(at(T, 0, 0));
  m->gate = numbers(at(T, 0, 0));
  m->tau = 0;
  return m;
}

/* File name without folder and ending; what CSV or HTML would have to quote becomes _. */
static const char *short_name(const char *path) {
  char *name = printed("%s", file_name(path)), *s = strstr(name, ".safetensors");
  if (s && !s[12]) *s = 0;
  for (s = name; *s; ++s)
    if (strchr(",\"'<>& \t", *s) || (unsigned char)*s >= 128) *s = '_';
  return name;
}

/* How decided the routes of a layer are, mean over the tasks: the probability of the experts that
   are chosen, or the largest weight of a block. */
static double decided(const moment *m, int l) {
  double sum = 0;
  int t, i;
  for (t = 0; t < T; ++t) {
    double chosen = 0, largest = 0;
    for (i = 0; i < N; ++i) {
      chosen += m->share[at(t, l, i)] * m->gate[at(t, l, i)];
      largest = fmax(largest, m->share[at(t, l, i)]);
    }
    sum += (blocks ? largest : chosen) / T;
  }
  return sum;
}

/* Blocks as experts: a route is the weight of each block, the same for all tokens of a task. */
static void observe_blocks(moment *m, const moe_model *model, const moe_route_sums *sums) {
  const moe_config *c = moe_model_config(model);
  int learned = c->router == MOE_ROUTER_TASK_LEVEL, index = n_moments - 1 - n_history;
  float *routes = (float *)take(at(T, 0, 0), sizeof *routes);
  list tau = split(opt.tau ? opt.tau : printed("%g", (double)c->temperature), ',');
  size_t k;
  if (learned) {
    if (opt.tau && index >= tau.n)
      die("--tau %s: give a temperature for each checkpoint and for the model", opt.tau);
    m->tau = number("--tau", tau.at[opt.tau ? index : 0], 1e-9, 1e6);
    need(moe_task_router_routes(routes, model, (float)m->tau, &env));
  }
  for (k = 0; k < at(T, 0, 0); ++k)
    m->share[k] = m->gate[k] =
        learned ? (double)routes[k] : sums->prob[k] / (double)sums->tokens[k / at(1, 0, 0)];
  free(routes);
}

/* A task's metric; routes are added to sums unless that is NULL. */
static double score(const moe_model *model, moe_context *context, int t, moe_route_sums *sums) {
  answers a = score_rows(context, model, &dev[t], t, sums);
  double v = metric_of(task_of[t], 0, a.answer, a.label, a.n, NULL);
  free_answers(&a);
  return v;
}

/* Runs all tasks; the metrics go to values (T). */
static void observe(const char *path, const moe_model *model, moe_context *context,
                    double *values) {
  moment *m = new_moment(short_name(path));
  moe_route_sums sums;
  size_t c;
  int t;

  sums.tokens = (int64_t *)take((size_t)T, sizeof *sums.tokens);
  sums.chosen = (int64_t *)take(at(T, 0, 0), sizeof *sums.chosen);
  sums.prob = (double *)take(at(T, 0, 0), sizeof *sums.prob);
  sums.gate = m->gate;
  for (t = 0; t < T; ++t) values[t] = score(model, context, t, &sums);
  for (c = 0; c < at(T, 0, 0); ++c) {
    m->share[c] = (double)sums.chosen[c] / moe_model_config(model)->top_k /
                  (double)sums.tokens[c / at(1, 0, 0)];
    if (sums.chosen[c]) m->gate[c] /= (double)sums.chosen[c];
  }
  if (blocks) observe_blocks(m, model, &sums);
  free(sums.tokens), free(sums.chosen), free(sums.prob);
}

/* A checkpoint must be of the same model, or its routes cannot be compared. */
static void check_same(const moe_model *model, const char *path) {
  const moe_config *c = moe_model_config(model);
  int t;
  read_from(path, 0);
  if (moe_model_tasks(model) != T)
    die("%d tasks, %s has %d", (int)moe_model_tasks(model), opt.model, T);
  for (t = 0; t < T; ++t)
    if (strcmp(moe_model_task(model, t)->name, task_of[t]->name))
      die("task %d is %s, in %s it is %s", t + 1, moe_model_task(model, t)->name, opt.model,
          task_of[t]->name);
  if (c->layers != L || c->experts != N || blocks != (c->unit == MOE_UNIT_BLOCK))
    die("%d layers of %d experts, %s has %d of %d, or other kinds of them", (int)c->layers,
        (int)c->experts, opt.model, L, N);
  read_from(NULL, 0);
}

static void observe_checkpoints(void) {
  list paths = split(opt.checkpoints, ',');
  double *values = numbers((size_t)T);
  moe_model *model;
  moe_context *context;
  int i;
  for (i = 0; i < paths.n; ++i) {
    if (!*paths.at[i]) die("--checkpoints: an empty name in the list");
    need(moe_model_load(&model, paths.at[i], &env));
    check_same(model, paths.at[i]);
    context = make_context(model);
    observe(paths.at[i], model, context, values);
    moe_context_free(context);
    moe_model_free(model);
  }
}

/* What tasklevel --csv has written: a row for each probability, moment after moment. */
static void read_history(const moe_model *model) {
  static const char *const wanted[] = {"run",   "step",  "temperature", "task",
                                       "layer", "block", "probability"};
  int where[7], k, t, l, b, of, run = 0;
  const char *value[7];
  double step = -1, at_step;
  size_t seen = 0, all = at(T, 0, 0);
  table f;
  if (!blocks) die("--history is for models whose experts are blocks");
  open_table_of(&f, opt.history, TABLE_CSV, 0);
  for (k = 0; k < 7; ++k)
    if ((where[k] = column(&f, wanted[k], 0)) < 0)
      die("these are not the columns of tasklevel --csv");
  while (next_row(&f)) {
    for (k = 0; k < 7; ++k) value[k] = field(&f, where[k]);
    of = whole("run", value[0], 1, 1e6);
    if (opt.run && of != opt.run) continue;
    if (run && of != run) die("there are runs %d and %d: choose one with --run", run, of);
    run = of;
    at_step = number("step", value[1], 0, 1e15);
    if (at_step > step) {
      if (seen % all) die("the moment before is not complete");
      new_moment(printed("step_%.0f", step = at_step))->tau =
          number("temperature", value[2], 1e-9, 1e9);
    }
    t = moe_model_find_task(model, value[3]);
    if (t < 0) die("the model has no task \"%s\"", value[3]);
    l = whole("layer", value[4], 1, L) - 1;
    b = whole("block", value[5], 1, N) - 1;
    moments[n_moments - 1].share[at(t, l, b)] = moments[n_moments - 1].gate[at(t, l, b)] =
        number("probability", value[6], 0, 1);
    ++seen;
  }
  read_from(opt.history, 0);
  if (!seen) die("there is no row%s", opt.run ? " of that run" : "");
  if (seen % all) die("%zu rows, a moment of this model has %zu", seen, all);
  close_table(&f);
  n_history = n_moments;
}

/* The metrics of every task without each expert in turn; unchanged for one that is not there or
   cannot be spared. */
static void observe_without(const moe_model *model, moe_context *context) {
  const moe_config *c = moe_model_config(model);
  uint8_t *off = (uint8_t *)take((size_t)(L * N), 1);
  int t, l, i, e, there;
  if (N <= c->top_k) return;
  without = numbers((size_t)(L * N * T));
  moe_context_mask(context, off);
  for (l = 0; l < L; ++l)
    for (i = 0; i < N; ++i) {
      for (e = there = 0; e < N; ++e) there += !c->pruned || !c->pruned[l * N + e];
      off[l * N + i] = there > c->top_k && !(c->pruned && c->pruned[l * N + i]);
      for (t = 0; t < T; ++t)
        without[(l * N + i) * T + t] = off[l * N + i] ? score(model, context, t, NULL) : metric[t];
      off[l * N + i] = 0;
    }
  moe_context_mask(context, NULL);
  free(off);
}

/* Features of a task that a person could write down: of its form, and of its texts. */
static const char *const feature_name[FEATURES] = {
    "pair", "regression", "classes", "length", "length_sd", "variety", "log10_train_rows"};

static void find_features(int t, int32_t vocab) {
  double *f = feature + t * FEATURES, square = 0, different = 0, n = (double)dev[t].n;
  uint8_t *seen = (uint8_t *)take((size_t)vocab, 1);
  int64_t i;
  for (i = 0; i < dev[t].n; ++i)
    square += (double)row_length(&dev[t], i) * (double)row_length(&dev[t], i);
  for (i = 0; i < dev[t].tokens; ++i) {
    different += !seen[dev[t].ids[i]];
    seen[dev[t].ids[i]] = 1;
  }
  free(seen);
  f[0] = task_of[t]->pair;
  f[1] = task_of[t]->kind == MOE_KIND_REGRESSION;
  f[2] = task_of[t]->classes;
  f[3] = (double)dev[t].tokens / n;
  f[4] = sqrt(fmax(0, square / n - f[3] * f[3]));
  f[5] = different / (double)dev[t].tokens;
  f[6] = train_of[t] > 0 ? log10(train_of[t]) : 0;
  if (!(train_of[t] > 0)) n_features = FEATURES - 1;
}

/* ---- statistics ---- */

/* The integral of cos^n from a to pi/2. */
static double cosines(int n, double a) {
  if (n < 2) return n ? 1 - sin(a) : 1.5707963267948966 - a;
  return ((n - 1) * cosines(n - 2, a) - pow(cos(a), n - 1) * sin(a)) / n;
}

/* Pearson's r over the tasks of feature f and the share of an expert, and its two-sided p-value by
   the t distribution with T - 2 degrees of freedom, where r = sin a: the integral of cos^(T-3) from
   a on as a share of all of it. 0: not defined. */
static int correlate(double *r, double *p, int f, int l, int i) {
  double mx = 0, my = 0, xy = 0, xx = 0, yy = 0;
  int t, vary_x = 0, vary_y = 0;
  for (t = 0; t < T; ++t) {
    mx += feature[t * FEATURES + f] / T;
    my += now->share[at(t, l, i)] / T;
    vary_x |= feature[t * FEATURES + f] != feature[f];
    vary_y |= now->share[at(t, l, i)] != now->share[at(0, l, i)];
  }
  for (t = 0; t < T; ++t) {
    double dx = feature[t * FEATURES + f] - mx, dy = now->share[at(t, l, i)] - my;
    xy += dx * dy;
    xx += dx * dx;
    yy += dy * dy;
  }
  if (T < POINTS || !vary_x || !vary_y || !(xx > 0 && yy > 0)) return 0;
  *r = fmax(-1, fmin(1, xy / sqrt(xx * yy)));
  *p = fmax(0, cosines(T - 3, asin(fabs(*r))) / cosines(T - 3, 0));
  return 1;
}

/* Share of the choices that two tasks have in common, mean over the layers. */
static double overlap(const double *a, const double *b) {
  double sum = 0;
  int i;
  for (i = 0; i < L * N; ++i) sum += fmin(a[i], b[i]) / L;
  return sum;
}

static double overlap_of(int t, int u) {
  return overlap(now->share + at(t, 0, 0), now->share + at(u, 0, 0));
}

/* ---- facts ---- */

/* Grids of facts; from OVER_TIME on there is one for each layer. */
enum { TASKS, OVERLAP, JOINS, DECIDED, USERS, OVER_TIME, SHARES, CHANGES, CORRELATIONS, GRIDS };

/* A fact: layers and experts count from 1; 0 and "" leave a field empty. */
typedef struct fact {
  int grid;
  const char *what, *model, *task, *other;
  int layer, expert;
  double value;
} fact;

static fact *facts;
static int n_facts;

static void add(int grid, const char *what, const char *model, const char *task, const char *other,
                int layer, int expert, double value) {
  fact f = {grid, what, model, task, other, layer, expert, value};
  facts = (fact *)grow(facts, (size_t)n_facts + 1, sizeof *facts);
  facts[n_facts++] = f;
}

/* Average-linkage clustering of the tasks by 1 - overlap: joins as facts, and the tasks in the
   order of the tree. */
static int *leaf; /* (T) */

static void add_joins(void) {
  int *next = (int *)take(3 * (size_t)T, sizeof *next), *last = next + T, *gone = last + T;
  int n, a, b, i, j; /* a group is its first task, and the others by `next`, -1 at the end */
  leaf = (int *)lasting((size_t)T, sizeof *leaf);
  for (i = 0; i < T; ++i) next[i] = -1, last[i] = i;
  for (n = T; n > 1; --n) {
    double best = 2;
    int near = 0, far = 0;
    for (a = 0; a < T; ++a)
      for (b = a + 1; b < T && !gone[a]; ++b) {
        double sum = 0, pairs = 0;
        for (i = a; i >= 0 && !gone[b]; i = next[i])
          for (j = b; j >= 0; j = next[j], ++pairs) sum += 1 - overlap_of(i, j);
        if (pairs > 0 && sum / pairs < best) best = sum / pairs, near = a, far = b;
      }
    add(JOINS, "join", "", task_of[near]->name, task_of[far]->name, 0, 0, fmax(0, best));
    next[last[near]] = far, last[near] = last[far], gone[far] = 1;
  }
  for (i = 0, n = 0; i >= 0; i = next[i]) leaf[n++] = i;
  free(next);
}

static double change_of(int t, int l, int i) {
  return 100 * (without[(l * N + i) * T + t] - metric[t]);
}

/* How many tasks do not hardly use an expert; *most is the one that sends the largest share. */
static int users(int l, int i, int *most) {
  int t, n = 0;
  for (*most = t = 0; t < T; ++t) {
    n += now->share[at(t, l, i)] >= opt.hardly / 100;
    if (now->share[at(t, l, i)] > now->share[at(*most, l, i)]) *most = t;
  }
  return n;
}

static void add_tasks(void) {
  char name[MOE_NAME_BYTES];
  int k, t, f;
  for (k = 0; k < T; ++k) {
    const char *task = task_of[t = leaf[k]]->name;
    moe_metric_name(name, task_of[t], 0);
    add(TASKS, "metric", "", task, printed("%s", name), 0, 0, metric[t]);
    add(TASKS, "rows", "", task, "", 0, 0, (double)dev[t].n);
    for (f = 0; f < n_features; ++f)
      add(TASKS, "feature", "", task, feature_name[f], 0, 0, feature[t * FEATURES + f]);
  }
}

static void add_times(void) {
  int m, t, u, l, i;
  for (t = 0; t < T; ++t)
    for (u = 0; u < T; ++u)
      add(OVERLAP, "overlap", "", task_of[leaf[t]]->name, task_of[leaf[u]]->name, 0, 0,
          overlap_of(leaf[t], leaf[u]));
  for (m = 0; m < n_moments; ++m) {
    const moment *x = &moments[m];
    double same = 0;
    for (l = 0; l < L; ++l) add(DECIDED, "decided", x->name, "", "", l + 1, 0, decided(x, l));
    for (t = 0; t < T; ++t) same += overlap(x->share + at(t, 0, 0), now->share + at(t, 0, 0)) / T;
    add(DECIDED, "agreement", x->name, "", "", 0, 0, same);
    if (n_history) add(DECIDED, "temperature", x->name, "", "", 0, 0, x->tau);
  }
  for (l = 0; l < L; ++l)
    for (t = 0; t < T; ++t)
      for (m = 0; m < n_moments; ++m)
        for (i = 0; i < N; ++i)
          add(OVER_TIME, "share_over_time", moments[m].name, task_of[leaf[t]]->name, "", l + 1,
              i + 1, moments[m].share[at(leaf[t], l, i)]);
}

static void add_experts(int l) {
  double r, p;
  int k, t, i, most;
  for (i = 0; i < N; ++i) add(USERS, "users", "", "", "", l + 1, i + 1, users(l, i, &most));
  for (k = 0; k < T; ++k)
    for (i = 0; i < N; ++i) {
      const char *task = task_of[t = leaf[k]]->name;
      add(SHARES, "share", "", task, "", l + 1, i + 1, now->share[at(t, l, i)]);
      add(GRIDS, "gate", "", task, "", l + 1, i + 1, now->gate[at(t, l, i)]);
      if (!without) continue;
      add(CHANGES, "change_without", "", task, "points", l + 1, i + 1, change_of(t, l, i));
      largest_change = fmax(largest_change, fabs(change_of(t, l, i)));
    }
  for (k = 0; k < n_features; ++k)
    for (i = 0; i < N; ++i) {
      if (!correlate(&r, &p, k, l, i)) continue;
      add(CORRELATIONS, "pearson", "", "", feature_name[k], l + 1, i + 1, r);
      add(CORRELATIONS, "p_value", "", "", feature_name[k], l + 1, i + 1, p);
    }
}

static void put_csv(text *to) {
  const fact *f;
  put(to, "what,model,task,layer,expert,other,value\n");
  for (f = facts; f < facts + n_facts; ++f) {
    put(to, "%s,%s,%s,", f->what, f->model, f->task);
    put(to, f->layer ? "%d," : ",", f->layer);
    put(to, f->expert ? "%d," : ",", f->expert);
    put(to, "%s,%.6g\n", f->other, f->value);
  }
}

static int marked(const fact *f) { return !strcmp(f->what, "pearson") && f[1].value < 0.01; }

/* What a pointer over the place says: the fields that are there, and the number as in the CSV. */
static void put_tip(text *to, const fact *f) {
  put(to, "%s", f->what);
  if (*f->model) put(to, " %s", f->model);
  if (*f->task) put(to, " %s", f->task);
  if (f->layer) put(to, " layer %d", f->layer);
  if (f->expert) put(to, " expert %d", f->expert);
  if (*f->other) put(to, " %s", f->other);
  put(to, ": %.6g", f->value);
}

/* ---- the report, as text or as a page ---- */

static const fact *most_of(const char *what, double sign) {
  const fact *f, *best = NULL;
  for (f = facts; f < facts + n_facts; ++f)
    if (!strcmp(f->what, what) && strcmp(f->task, f->other) &&
        (!best || sign * f->value > sign * best->value))
      best = f;
  return best;
}

/* What stands out. */
static void put_summary(text *to, const char *before, const char *after) {
  const fact *near = most_of("overlap", 1), *far = most_of("overlap", -1), *f;
  const fact *worst = most_of("change_without", -1);
  int idle = 0, hardly = 0, tests = 0, marks = 0;
  for (f = facts; f < facts + n_facts; ++f) {
    idle += f->grid == USERS && f->value < 1;
    hardly += f->grid == SHARES && f->value < opt.hardly / 100;
    tests += *f->what == 'p' && f->grid == CORRELATIONS;
    marks += marked(f);
  }
  if (T > 1)
    put(to, "%s%s and %s take the most similar routes: %.0f %% of their choices agree.%s", before,
        near->task, near->other, 100 * near->value, after);
  if (T > 2)
    put(to, "%s%s and %s take the most different routes: %.0f %%.%s", before, far->task, far->other,
        100 * far->value, after);
  put(to, "%s%d of the %d experts hardly used by any task; %d of %d shares below %g %%.%s", before,
      idle, L * N, hardly, T * L * N, opt.hardly, after);
  if (worst && worst->value < 0)
    put(to, "%sMissed most: expert %d of layer %d; without it %s changes by %+.1f points.%s",
        before, worst->expert, worst->layer, worst->task, worst->value, after);
  if (tests)
    put(to, "%s%d of %d correlations with features have p below 0.01, by chance about %.1f.%s",
        before, marks, tests / 2, tests / 200.0, after);
}

/* Grids: their titles, how numbers are shown, and how deep their colour is: 1 like the number, 2
   like its square, 3 like the largest change. */
static const struct {
  const char *title, *format;
  int percent, depth;
} grids[GRIDS] = {
    {"The tasks", "%.4g", 0, 0},
    {"Choices that two tasks have in common, percent", "%.0f", 1, 2},
    {"Tasks that join, the most similar first", "", 0, 0},
    {"How decided the routes are, and how far they agree with the last", "%.3f", 0, 0},
    {"Number of tasks that use an expert", "%.0f", 0, 0},
    {"Shares over time", "", 0, 0},

    {"Share of a task's tokens, percent", "%.1f", 1, 1},
    {"Change of the metric in points without an expert", "%+.1f", 0, 3},
    {"Pearson's r over %d tasks between a feature and the share of an expert", "%+.2f", 0, 2}};

static const char *row_of(const fact *f) {
  return f->grid == USERS ? printed("layer %d", f->layer)

         : f->grid == DECIDED      ? f->model
         : f->grid == CORRELATIONS ? f->other
                                   : f->task;
}

static const char *column_of(const fact *f) {
  return f->expert                      ? printed("expert %d", f->expert)
         : f->layer                     ? printed("layer %d", f->layer)
         : *f->other && *f->what != 'm' ? f->other
                                        : f->what;
}

static int same_row(const fact *a, const fact *b) {
  return a->grid == b->grid && !strcmp(row_of(a), row_of(b)) &&
         (a->grid < OVER_TIME || a->layer == b->layer);
}

static void put_cell(text *to, const fact *f, int html) {
  double v = f->value, depth = grids[f->grid].depth ? v : 0;
  char cell[32];
  snprintf(cell, sizeof cell, grids[f->grid].format, grids[f->grid].percent ? 100 * v : v);
  if (marked(f)) strcat(cell, "*");
  if (!html) put(to, " %8s", cell);
  if (!html) return;
  if (grids[f->grid].depth == 2) depth *= fabs(v);
  if (grids[f->grid].depth == 3) depth /= largest_change;
  put(to, "<td class=\"%s%s\" style=\"--a:%.3f\" title=\"", depth < 0 ? "d" : "h",
      fabs(depth) > 0.52 ? " o" : "", fmin(1, fabs(depth)));
  put_tip(to, f);
  if (f->grid == CORRELATIONS) { /* p_value follows */
    put(to, "\"><span title=\"");
    put_tip(to, f + 1);
    put(to, "\">%s</span></td>", cell);
  } else
    put(to, "\">%s</td>", cell);
}

/* The names of the columns, above the row that begins with f. */
static void put_head(text *to, const fact *f, int html) {
  const fact *g;
  int i;
  put(to, html ? "<table><tr><th>%s</th>" : "%-24s",
      f->grid < OVER_TIME ? "" : printed("layer %d", f->layer));
  for (g = f, i = 1; f->expert ? i <= N : g < facts + n_facts && same_row(f, g); ++g, ++i)
    put(to, html ? "<th>%s</th>" : " %8.8s", f->expert ? printed("expert %d", i) : column_of(g));
  put(to, html ? "</tr>\n" : "\n");
}

/* A grid, row by row; one for each layer from OVER_TIME on. */
static void put_grid(text *to, int html, int grid, const char *about) {
  const fact *f, *before = NULL;
  int column = 0;
  put(to, html ? "<h2>%s</h2><p>%s</p><div>\n" : "\n%s\n%s\n",
      blocks && grid == SHARES ? "Weight of a block for a task, percent"
                               : printed(grids[grid].title, T),
      about);

  for (f = facts; f < facts + n_facts; ++f) {
    int first = !before || (grid >= OVER_TIME && f->layer != before->layer);
    if (f->grid != grid || !strcmp(f->what, "p_value")) continue;
    if (before && !same_row(before, f)) put(to, html ? "</tr>\n" : "\n");
    if (before && first && html) put(to, "</table>\n");
    if (first) put_head(to, f, html);
    if (!before || !same_row(before, f)) {
      put(to, html ? "<tr><th>%s</th>" : "%-24s", row_of(f));
      column = 1;
    }
    for (; f->expert && column < f->expert; ++column) /* not defined */
      put(to, html ? "<td>-</td>" : " %8s", "-");
    put_cell(to, f, html);
    ++column;
    before = f;
  }
  put(to, !html ? "\n" : before ? "</tr></table></div>\n" : "</div>\n");
}

static void put_lists(text *to, int html, int grid) {
  const fact *f;
  int l, i, n, most;
  if (html) put(to, "<ul>\n");
  for (f = facts; f < facts + n_facts && grid == JOINS; ++f) {
    if (f->grid != JOINS) continue;
    put(to, html ? "<li title=\"" : "  ");
    if (html) put_tip(to, f), put(to, "\">");
    put(to, "%.0f %%: the group of %s joins that of %s\n", 100 * (1 - f->value), f->other, f->task);
    if (html) put(to, "</li>");
  }
  for (l = 0; l < L && grid == USERS; ++l)
    for (i = 0; i < N; ++i)
      if ((n = users(l, i, &most)) < 2)
        put(to, "%slayer %d expert %d: %d task%s, largest share %.1f %% (%s)%s\n",
            html ? "<li>" : "  ", l + 1, i + 1, n, n ? "" : "s", 100 * now->share[at(most, l, i)],
            task_of[most]->name, html ? "</li>" : "");
  if (html) put(to, "</ul>\n");
}

/* Colours of experts and layers for people with any colour vision (Okabe and Ito). */
static const char *colour(int expert) {
  static const char *const list_of[] = {"#0072b2", "#e69f00", "#009e73", "#cc79a7",
                                        "#56b4e9", "#d55e00", "#b8a800", "#8a8a8a"};
  return list_of[(expert - 1) % 8];
}

/* The tree of the tasks: a join goes from the ends of two groups to the right, to 1 - overlap. */
static void put_tree(text *to) {
  double *x = numbers(2 * (size_t)T), *y = x + T, top = 0;
  const fact *f;
  int t, a, b;
  put(to, "<svg width=\"370\" height=\"%d\" role=\"img\" aria-label=\"tree of the tasks\">\n",
      22 * T + 8);
  for (t = 0; t < T; ++t) {
    x[t] = 190;
    y[t] = 22 * t + 14;
    put(to, "<text x=\"0\" y=\"%.0f\">%.26s</text>", y[t] + 4, task_of[leaf[t]]->name);
  }
  for (f = facts; f < facts + n_facts; ++f)
    if (f->grid == JOINS) top = fmax(top, f->value);
  for (f = facts; f < facts + n_facts; ++f) {
    double right = 190 + (top > 0 ? 170 * f->value / top : 0);
    if (f->grid != JOINS) continue;
    for (a = 0; strcmp(task_of[leaf[a]]->name, f->task);) ++a;
    for (b = 0; strcmp(task_of[leaf[b]]->name, f->other);) ++b;
    put(to, "<path d=\"M%.1f %.1fH%.1fV%.1fH%.1f\"><title>", x[a], y[a], right, y[b], x[b]);
    put_tip(to, f);
    put(to, "</title></path>\n");
    x[a] = right;
    y[a] = (y[a] + y[b]) / 2;
  }
  put(to, "</svg>\n");
}

/* A picture of what the moments are: each layer's decidedness, or the temperature. */
static void put_curves(text *to, const char *what) {
  double top = 0, right = n_moments - 1;
  const fact *f;
  int l, m;
  for (f = facts; f < facts + n_facts; ++f)
    if (f->grid == DECIDED && !strcmp(f->what, what)) top = fmax(top, f->value);
  if (!(top > 0)) return;
  put(to, "<figure><figcaption>%s, 0 to %.3g</figcaption>", what, top);
  put(to,
      "<svg width=\"300\" height=\"130\" role=\"img\" aria-label=\"%s\">"
      "<path d=\"M5 5V125H295\"/>",
      what);
  for (l = 0; l <= L; ++l) {
    for (m = 0, f = facts; f < facts + n_facts; ++f)
      if (f->grid == DECIDED && !strcmp(f->what, what) && f->layer == l) {
        if (!m) put(to, "<polyline style=\"stroke:%s\" points=\"", colour(l ? l : 8));
        put(to, " %.1f,%.1f", 5 + 290 * m / right, 125 - 120 * f->value / top);
        ++m;
      }
    if (m) put(to, "\"/>");
  }
  put(to, "</svg></figure>\n");
}

/* Shares of the experts in each task, a column for each moment. */
static void put_times(text *to) {
  const fact *f, *before = NULL;
  int i;
  put(to, "<p>Shares of the experts in each task, a column for each of %d moments, oldest first:",
      n_moments);
  for (i = 1; i <= N; ++i) put(to, " <b style=\"color:%s\">expert %d</b>", colour(i), i);
  put(to, "</p><div>\n");
  for (f = facts; f < facts + n_facts; ++f) {
    if (f->grid != OVER_TIME) continue;
    if (!before || before->layer != f->layer)
      put(to, "%s<table><caption>layer %d</caption>", before ? "</tr></table>\n" : "", f->layer);
    if (!before || !same_row(before, f))
      put(to, "%s<tr><th>%s</th>", before && before->layer == f->layer ? "</tr>\n" : "", f->task);
    if (f->expert == 1) put(to, "<td class=\"b\">");
    put(to, "<i style=\"height:%.2frem;background:%s\" title=\"", 1.6 * f->value,
        colour(f->expert));
    put_tip(to, f);
    put(to, "\"></i>%s", f->expert == N ? "</td>" : "");
    before = f;
  }
  put(to, "</tr></table></div>\n");
}

/* How the routes came about, in colours. */
static void put_pictures(text *to) {
  int l;
  put(to, "<p>By layer:");
  for (l = 1; l <= L; ++l) put(to, " <b style=\"color:%s\">layer %d</b>", colour(l), l);
  put(to, "</p><div>\n");
  put_curves(to, "decided");
  put_curves(to, "temperature");
  put(to, "</div>\n");
  put_times(to);
}

static void put_report(text *to, int html) {
  put_grid(to, html, TASKS,
           "Features: two texts (pair), regression, classes, mean and standard deviation of the "
           "length in tokens, variety (different tokens / tokens), log10 of the training rows.");
  put_grid(to, html, SHARES, "A row sums to 100. Tasks are in the order in which they join below.");
  put_grid(to, html, OVERLAP,
           "Mean over the layers. Below, the most similar groups join first (average linkage).");
  if (html && T > 1) put_tree(to);
  put_lists(to, html, JOINS);

  if (n_moments > 1)
    put_grid(to, html, DECIDED,
             blocks
                 ? "Largest weight of a block, mean over the tasks: 1/N when all weigh the same, "
                   "1 when a task has chosen one."
                 : "Mean probability of the chosen experts: 1/N when a gate does not distinguish "
                   "them, 1 when it is certain.");
  if (n_moments > 1 && html) put_pictures(to);

  put_grid(to, html, USERS,
           printed("Tasks that send an expert at least %g %% of their tokens. Hardly used, and "
                   "candidates for leaving out:",
                   opt.hardly));
  put_lists(to, html, USERS);
  put_grid(to, html, CHANGES,
           without ? "When the expert is disabled and the gates choose among the others."
                   : "No expert can be disabled: each token needs all of them.");
  put_grid(to, html, CORRELATIONS,
           T < POINTS
               ? printed("No correlations with features: %d tasks are too few, %d are needed.", T,
                         POINTS)
               : "*: p below 0.01 (t distribution, two-sided, each test for itself); -: one side "
                 "is constant.");
}

static void put_text(text *to) {
  put(to, "Routes of %s: %d tasks, %d layers, %d experts\n\n", now->name, T, L, N);
  put_summary(to, "- ", "\n");
  put_report(to, 0);
}

/* Colours of large numbers (blue) and of negative ones (orange), by day and by night. What is wider
   than the page scrolls, with a shadow at the edge behind which there is more. */
static const char page_style[] =
    ":root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--heat:11,79,148;--down:180,81,10;"
    "--on:#fff;--edge:#1b1f2455}\n@media(prefers-color-scheme:dark){:root{--paper:#14171a;"
    "--ink:#e8eaed;--heat:124,192,245;--down:242,163,94;--on:#0a1520;--edge:#e8eaed66}}\nbody{"
    "margin:0 auto;max-width:1100px;"
    "padding:1rem;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}"
    "p,li{max-width:46rem}div{display:flex;flex-wrap:wrap;gap:1rem 1.6rem;overflow-x:auto;"
    "padding-bottom:.3rem;scrollbar-width:thin;background:"
    "linear-gradient(90deg,var(--paper) 50%,transparent) 0 0/1.6rem 100% no-repeat local,"
    "linear-gradient(270deg,var(--paper) 50%,transparent) 100% 0/1.6rem 100% no-repeat local,"
    "linear-gradient(90deg,var(--edge),transparent) 0 0/.8rem 100% no-repeat,"
    "linear-gradient(270deg,var(--edge),transparent) 100% 0/.8rem 100% no-repeat}\n"
    "table{border-spacing:2px;font-size:.85rem;font-variant-numeric:tabular-nums}"
    "th{font-weight:600;text-align:left}td{padding:.2rem .4rem;text-align:right}"
    "td.h{background:rgba(var(--heat),var(--a))}td.d{background:rgba(var(--down),var(--a))}"
    "td.o{color:var(--on)}"
    "svg text{font:12px system-ui,sans-serif;fill:var(--ink)}svg path,svg polyline{fill:none;"
    "stroke:var(--ink);stroke-width:1.5}td.b{padding:0;height:1.6rem;min-width:1.4rem}"
    "td.b i{display:block}figure{margin:0}\n";

static void put_html(text *to) {
  put(to,
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width,initial-scale=1\"><title>Routes of %s</title><style>\n%s"
      "</style></head><body>\n<h1>Routes of %s</h1><p>%d tasks, %d layers of %d experts. Hold "
      "the pointer over a number to see it as the CSV file has it.</p><ul>\n",
      now->name, page_style, now->name, T, L, N);
  put_summary(to, "<li>", "</li>\n");
  put(to, "</ul>\n");
  put_report(to, 1);
  put(to, "</body></html>\n");
}

/* ---- main ---- */

static void write_report(const char *path, void (*report)(text *)) {
  text to = {NULL, 0, 0};
  report(&to);
  if (path)
    save_text(&to, path);
  else
    fputs(to.data, stdout);
  free(to.data);
}

/* The groups of the first opt.rows rows, whole. */
static rows first_groups(rows *all) {
  unsigned char *keep = (unsigned char *)take((size_t)all->groups, 1);
  rows some;
  int64_t i;
  for (i = 0; i < all->n && i < opt.rows; ++i) keep[all->row[i].group] = 1;
  some = copy_rows(all, keep, 1);
  free(keep);
  free_rows(all);
  return some;
}

/* The rows of the dev file, and the number of those to train on. */
static void read_task_files(const encoder *e, int t) {
  const char *name = task_of[t]->name, *path = find_file(name, DEV_FILES);
  int ranking = task_of[t]->kind == MOE_KIND_RANKING, at = find_task(tasks, n_tasks, name);
  const columns *as = at < 0 ? NULL : &tasks[at].as;
  table f;
  if (!path) die("task %s has no file %s/%s/dev.tsv (or .csv, .jsonl)", name, data.folder, name);
  read_rows(&dev[t], task_of[t], as, e, path, 0, ranking ? 0 : opt.rows);
  if (ranking && opt.rows) dev[t] = first_groups(&dev[t]);
  if (!(path = find_file(name, "train"))) return;
  open_table(&f, path, 0);
  column(&f, as ? as->label : usual_columns.label, 1);
  while (next_row(&f)) ++train_of[t];
  close_table(&f);
}

int main(int argc, char **argv) {
  moe_model *model;
  moe_context *context;
  const moe_task **of;
  encoder e;
  int t, l;
  begin_program("routes", argc, argv);
  read_options("MODEL [options]\nWhich task's tokens go to which experts: shares, similar tasks, "
               "experts hardly used, what each expert is worth (the metrics without it), and what "
               "the routes have to do with features of the tasks. For example:\n"
               "./routes model.safetensors --data my_tasks --html routes.html",
               all_options);
  if (!opt.model) die("usage: routes MODEL [options]; --help lists the options");
  if (!opt.csv && !opt.html) opt.text = 1;
  check_writable("--csv", opt.csv);
  check_writable("--html", opt.html);
  open_machine(1);
  need(moe_model_load(&model, opt.model, &env));
  encoder_of_model(&e, model, opt.model);
  T = (int)moe_model_tasks(model);
  L = (int)moe_model_config(model)->layers;
  N = (int)moe_model_config(model)->experts;
  blocks = moe_model_config(model)->unit == MOE_UNIT_BLOCK;
  if (!T) die("%s has no tasks", opt.model);
  if (N < 2) die("%s: the model is dense: with one expert there is nothing to report", opt.model);
  dev = (rows *)lasting((size_t)T, sizeof *dev);
  metric = numbers((size_t)T);
  train_of = numbers((size_t)T);
  feature = numbers((size_t)(T * FEATURES));
  task_of = of = (const moe_task **)lasting((size_t)T, sizeof *of);
  if (data.list || exists(printed("%s/tasks.tsv", data.folder))) read_tasks(NULL);
  for (t = 0; t < T; ++t) {
    of[t] = moe_model_task(model, t);
    read_task_files(&e, t);
    find_features(t, e.config.vocab);
  }
  if (opt.history) read_history(model);
  if (opt.checkpoints) observe_checkpoints();
  context = make_context(model);
  observe(opt.model, model, context, metric);
  now = &moments[n_moments - 1];
  observe_without(model, context);
  add_joins();
  add_tasks();
  for (l = 0; l < L; ++l) add_experts(l);
  add_times();
  if (opt.csv) write_report(opt.csv, put_csv);
  if (opt.html) write_report(opt.html, put_html);
  if (opt.text) write_report(NULL, put_text);
  moe_context_free(context);
  moe_tokenizer_free(e.tokenizer);
  moe_model_free(model);
  return end_program(stderr);
}
