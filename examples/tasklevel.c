/* tasklevel.c - whole transformer blocks as experts, chosen by the task: the systems of "Task-level Mixture-of-Experts" [TL], side by side
     cc -O3 -o tasklevel examples/tasklevel.c -lm -pthread
     ./tasklevel [--data DIR] [--tasks A,B] [--systems multi,random1,random2,average,softmax,gumbel,straight] [--blocks 3] [--seed 1]
                 [--epochs 4 | --steps N] [--batch 16] [--lr 1e-3] [--router-rate 10] [--homogeneous] [--two-stage] [--rows N a task]
                 [--vectors random|text|fisher] [--freeze] [--init MODEL.safetensors --vocab FILE --heads N] [--layers 3 --hidden 64]
                 [--max-len 64] [--threads N] [--json FILE] [--csv FILE: routes over training]
   Data as for train.c, single texts or pairs, classification or regression. multi: one block a layer, shared by all tasks; random1, random2:
   every task takes one or two blocks of each layer, drawn once; average: the mean of all blocks; the others learn their routes.
   --router-rate: how much faster router and task vectors learn than the model. --two-stage: routes are learned first, then the experts anew,
   from their first weights, under routes that go from the average to the learned ones. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#define MOE_IMPLEMENTATION
#include "../moe.h"

enum { MOST_TASKS = 64, FIELDS = 16, SYSTEMS = 7, LOOKS = 5 };
static const char *const system_name[SYSTEMS] = {"multi", "random1", "random2", "average", "softmax", "gumbel", "straight"};

typedef struct rows {
  int32_t n;
  int32_t *start, *ids; /* row i has the tokens start[i] .. start[i+1] - 1 */
  uint8_t *segments;
  float *label;
} rows;

static struct {
  const char *data, *tasks, *systems, *vectors, *init, *vocab, *json, *csv;
  double lr, router_rate;
  int blocks, seed, epochs, steps, batch, homogeneous, two_stage, freeze, heads, layers, hidden, max_len, threads, rows;
} opt = {"examples/data", NULL, "multi,random1,random2,average,softmax,gumbel,straight", "random", NULL, NULL, NULL, NULL, 0, 10,
         3, 1, 4, 0, 16, 0, 0, 0, 0, 3, 64, 64, 0, 0};

static moe_env env;
static moe_task task[MOST_TASKS];
static rows train[MOST_TASKS], dev[MOST_TASKS];
static int64_t train_rows[MOST_TASKS];
static int T;
static moe_config base; /* sizes */
static void *init_file, *vocab_file;
static size_t init_bytes, vocab_bytes;
static double result[SYSTEMS][MOST_TASKS], seconds[SYSTEMS];
static int was_run[SYSTEMS];
static FILE *csv;

static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "tasklevel: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
}

static void show(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "tasklevel: %s\n", sentence);
}

/* The library has said why. */
static void need(moe_status status) {
  if (status) exit(1);
}

static void *take(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size);
  if (!p) die("out of memory");
  return p;
}

/* ---- data ---- */

/* The next line of a text that is cut up; its fields. Returns their number, 0 at the end. */
static int next_row(char **at, char *field[FIELDS]) {
  char *line = *at, *end;
  int n = 0;
  if (!*line) return 0;
  end = line + strcspn(line, "\n");
  *at = *end ? end + 1 : end;
  *end = 0;
  if (end > line && end[-1] == '\r') end[-1] = 0;
  for (;;) {
    if (n < FIELDS) field[n++] = line;
    line = strchr(line, '\t');
    if (!line) return n;
    *line++ = 0;
  }
}

static int column(char **name, int n, const char *wanted) {
  int i;
  for (i = 0; i < n && strcmp(name[i], wanted); ++i) continue;
  return i < n ? i : -1;
}

/* Reads and encodes TASK/FILE.tsv. */
static void read_rows(rows *r, const moe_task *t, const char *file, int most, const moe_tokenizer *tokenizer) {
  char path[1024], *text, *at, *field[FIELDS];
  void *data;
  size_t bytes, lines = 1, i;
  int n, label, a, b, line = 1;
  snprintf(path, sizeof path, "%s/%s/%s.tsv", opt.data, t->name, file);
  need(moe_file_read(&data, &bytes, path, &env));
  text = at = (char *)data;
  for (i = 0; i < bytes; ++i) lines += text[i] == '\n';
  r->start = (int32_t *)take(lines + 1, sizeof *r->start);
  r->ids = (int32_t *)take(lines * (size_t)opt.max_len, sizeof *r->ids);
  r->segments = (uint8_t *)take(lines * (size_t)opt.max_len, 1);
  r->label = (float *)take(lines, sizeof *r->label);
  n = next_row(&at, field);
  label = column(field, n, "label"), a = column(field, n, "sentence1"), b = column(field, n, "sentence2");
  if (label < 0 || a < 0 || (t->pair && b < 0)) die("%s: the first line must name label, sentence1 and, of a pair, sentence2", path);
  while ((!most || r->n < most) && (n = next_row(&at, field)) > 0) {
    moe_tokens out;
    char *end;
    ++line;
    if (n <= label || n <= a || (t->pair && n <= b)) die("%s, line %d: a field is missing", path, line);
    r->label[r->n] = (float)strtod(field[label], &end);
    if (end == field[label] || *end) die("%s, line %d: label \"%s\" is no number", path, line, field[label]);
    out.ids = r->ids + r->start[r->n];
    out.segments = r->segments + r->start[r->n];
    out.begin = out.end = NULL;
    out.capacity = opt.max_len;
    need(moe_encode(tokenizer, field[a], strlen(field[a]), t->pair ? field[b] : NULL, t->pair ? strlen(field[b]) : 0, opt.max_len,
                    MOE_TRUNCATE_LONGEST, &out, &env));
    r->start[r->n + 1] = r->start[r->n] + out.count;
    ++r->n;
  }
  moe_free(data);
}

/* A list "A,B" has the name, or is NULL. */
static int listed(const char *list, const char *name) {
  size_t length = strlen(name);
  for (; list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
    if (!strncmp(list, name, length) && (!list[length] || list[length] == ',')) return 1;
  return 0;
}

static void read_tasks(void) {
  char path[1024], *at, *name[FIELDS], *field[FIELDS];
  void *data, *block;
  size_t bytes;
  moe_tokenizer *tokenizer;
  int columns, at_name, at_input, at_kind, at_labels, at_metric, t;
  snprintf(path, sizeof path, "%s/vocab.txt", opt.data);
  need(moe_file_read(&vocab_file, &vocab_bytes, opt.vocab ? opt.vocab : path, &env));
  need(moe_tokenizer_size((const char *)vocab_file, vocab_bytes, &bytes, &env));
  block = take(bytes + 64, 1);
  need(moe_tokenizer_init(&tokenizer, (void *)(((uintptr_t)block + 63) & ~(uintptr_t)63), bytes, (const char *)vocab_file, vocab_bytes, 0, &env));
  base.vocab = moe_tokenizer_words(tokenizer);
  snprintf(path, sizeof path, "%s/tasks.tsv", opt.data);
  need(moe_file_read(&data, &bytes, path, &env));
  at = (char *)data;
  columns = next_row(&at, name);
  at_name = column(name, columns, "name"), at_input = column(name, columns, "input"), at_kind = column(name, columns, "kind");
  at_labels = column(name, columns, "labels"), at_metric = column(name, columns, "metric");
  if (at_name < 0 || at_input < 0 || at_kind < 0 || at_labels < 0 || at_metric < 0) die("%s: a column is missing", path);
  while (next_row(&at, field) == columns) {
    moe_task *to = &task[T];
    const char *comma;
    if (opt.tasks && !listed(opt.tasks, field[at_name])) continue;
    if (strcmp(field[at_kind], "classification") && strcmp(field[at_kind], "regression")) {
      fprintf(stderr, "tasklevel: task %s is of kind %s, which train.c knows; left out\n", field[at_name], field[at_kind]);
      continue;
    }
    if (T == MOST_TASKS) die("more than %d tasks", MOST_TASKS);
    snprintf(to->name, sizeof to->name, "%s", field[at_name]);
    snprintf(to->metrics, sizeof to->metrics, "%s", field[at_metric]);
    to->pair = !strcmp(field[at_input], "pair");
    to->classes = 1;
    if (!strcmp(field[at_kind], "regression")) {
      const char *dots = strstr(field[at_labels], "..");
      if (!dots) die("task %s: the range \"%s\" is not A..B", to->name, field[at_labels]);
      to->kind = MOE_KIND_REGRESSION;
      to->low = (float)atof(field[at_labels]);
      to->high = (float)atof(dots + 2);
    } else
      for (comma = field[at_labels]; (comma = strchr(comma, ',')) != NULL; ++comma) ++to->classes;
    ++T;
  }
  if (!T) die("no task to train");
  for (t = 0; t < T; ++t) {
    read_rows(&train[t], &task[t], "train", opt.rows, tokenizer);
    read_rows(&dev[t], &task[t], "dev", 0, tokenizer);
    train_rows[t] = train[t].n;
  }
  moe_free(data);
  free(block);
}

/* ---- batches ---- */

typedef struct pack {
  moe_batch b;
  int32_t *start, *ids, *task;
  uint8_t *segments;
  float *label;
} pack;

static pack pack_make(void) {
  pack p;
  size_t S = (size_t)opt.batch, M = S * (size_t)opt.max_len;
  memset(&p, 0, sizeof p);
  p.b.seq_start = p.start = (int32_t *)take(S + 1, sizeof *p.start);
  p.b.ids = p.ids = (int32_t *)take(M, sizeof *p.ids);
  p.b.segments = p.segments = (uint8_t *)take(M, 1);
  p.b.task = p.task = (int32_t *)take(S, sizeof *p.task);
  p.b.label = p.label = (float *)take(S, sizeof *p.label);
  return p;
}

static void pack_add(pack *p, int t, const rows *r, int64_t row) {
  int32_t S = p->b.S++, at = p->start[S], length = r->start[row + 1] - r->start[row];
  memcpy(p->ids + at, r->ids + r->start[row], (size_t)length * sizeof *p->ids);
  memcpy(p->segments + at, r->segments + r->start[row], (size_t)length);
  p->start[S + 1] = at + length;
  p->task[S] = t;
  p->label[S] = r->label[row];
}

/* The task's first metric on its dev rows. */
static double evaluate(moe_context *context, int t, int32_t width, pack *p) {
  const rows *r = &dev[t];
  size_t n = (size_t)r->n;
  float *value = (float *)take(n, sizeof *value), *scratch = (float *)take(2 * n, sizeof *scratch);
  float *scores = (float *)take((size_t)opt.batch * (size_t)width, sizeof *scores);
  int32_t *best = (int32_t *)take(n, sizeof *best), *label = (int32_t *)take(n, sizeof *label), row = 0, s, c;
  double metric;
  while (row < r->n) {
    int32_t first = row;
    for (p->b.S = 0; p->b.S < opt.batch && row < r->n; ++row) pack_add(p, t, r, row);
    need(moe_forward(context, scores, &p->b, &env));
    for (s = 0; s < p->b.S; ++s) {
      const float *score = scores + (size_t)s * (size_t)width;
      value[first + s] = score[0];
      label[first + s] = (int32_t)r->label[first + s];
      for (c = 1; c < task[t].classes; ++c)
        if (score[c] > score[best[first + s]]) best[first + s] = c;
    }
  }
  if (!strncmp(task[t].metrics, "spearman", 8)) metric = moe_metric_spearman(value, r->label, n, scratch, NULL);
  else if (!strncmp(task[t].metrics, "pearson", 7)) metric = moe_metric_pearson(value, r->label, n, NULL);
  else if (!strncmp(task[t].metrics, "matthews", 8)) metric = moe_metric_matthews(best, label, n, task[t].classes, NULL);
  else if (!strncmp(task[t].metrics, "f1", 2)) metric = moe_metric_f1(best, label, n, NULL);
  else metric = moe_metric_accuracy(best, label, n, NULL);
  free(value), free(scratch), free(scores), free(best), free(label);
  return metric;
}

/* ---- task vectors ---- */

/* Every column gets mean 0 and deviation 1 over the tasks: what they have in common does not tell them apart. */
static void standardize(float *v, int32_t width) {
  int t;
  int32_t i;
  for (i = 0; i < width; ++i) {
    double sum = 0, square = 0, deviation;
    for (t = 0; t < T; ++t) sum += (double)v[t * width + i];
    for (t = 0; t < T; ++t) square += ((double)v[t * width + i] - sum / T) * ((double)v[t * width + i] - sum / T);
    deviation = sqrt(square / T) + 1e-12;
    for (t = 0; t < T; ++t) v[t * width + i] = (float)(((double)v[t * width + i] - sum / T) / deviation);
  }
}

/* Vectors from outside, of width H: text is the mean of the encoder's output over training sentences of the task; fisher the logarithm of the
   mean squared gradients (the diagonal of the empirical Fisher information) of the bias behind the last layer's feed-forward network. */
static void set_vectors(moe_model *model, moe_trainer *trainer, pack *p) {
  const moe_config *c = moe_model_config(model);
  int32_t H = c->hidden, i, k, n, s;
  float *scores = (float *)take((size_t)opt.batch * (size_t)moe_model_max_classes(model), sizeof *scores), *vectors;
  moe_tensor at, from;
  char name[96];
  int t, fisher = !strcmp(opt.vectors, "fisher");
  snprintf(name, sizeof name, "encoder.layer.%d.blocks.0.output.dense.bias", (int)c->layers - 1);
  need(moe_model_tensor(model, moe_model_find_tensor(model, "tasks.vectors"), &at));
  need(moe_model_tensor(model, moe_model_find_tensor(model, name), &from));
  vectors = moe_model_weights(model) + at.offset;
  memset(vectors, 0, at.count * sizeof *vectors);
  for (t = 0; t < T; ++t) {
    float *v = vectors + t * H;
    n = train[t].n < 64 ? train[t].n : 64;
    for (s = 0; s < n; ++s) {
      p->b.S = 0;
      pack_add(p, t, &train[t], s);
      if (fisher) {
        float *g = moe_trainer_gradients(trainer);
        need(moe_accumulate(trainer, &p->b, 0, NULL, NULL, &env));
        for (i = 0; i < H; ++i) v[i] += g[from.offset + (size_t)i] * g[from.offset + (size_t)i] / (float)n;
        memset(g, 0, moe_model_parameters(model) * sizeof *g);
      } else {
        const float *hidden = moe_context_hidden(moe_trainer_context(trainer));
        need(moe_forward(moe_trainer_context(trainer), scores, &p->b, &env));
        for (k = 0; k < p->start[1]; ++k)
          for (i = 0; i < H; ++i) v[i] += hidden[k * H + i] / (float)(p->start[1] * n);
      }
    }
    for (i = 0; i < H && fisher; ++i) v[i] = logf(v[i] + 1e-20f);
  }
  standardize(vectors, H);
  free(scores);
}

/* ---- systems ---- */

/* Routes that are drawn once: `count` of the blocks for each task and layer, of equal weight. */
static void draw_routes(float *routes, int count) {
  int t, l, i, taken;
  for (t = 0; t < T; ++t)
    for (l = 0; l < base.layers; ++l, routes += opt.blocks)
      for (i = taken = 0; i < opt.blocks; ++i) { /* each with the chance that makes all choices alike */
        int left = opt.blocks - i, chosen = moe_key((uint64_t)opt.seed, 0, (uint64_t)t, (uint32_t)l, (uint32_t)i) % (uint64_t)left <
                                            (uint64_t)(count - taken);
        taken += chosen;
        routes[i] = chosen ? 1.0f / (float)count : 0.0f;
      }
}

static moe_model *make_model(moe_router router, moe_selection selection, int blocks) {
  moe_config c = base;
  moe_model *model;
  moe_import_options noise = {1e-8f, 1};
  c.unit = MOE_UNIT_BLOCK;
  c.router = router;
  c.selection = selection;
  c.experts = blocks;
  if (strcmp(opt.vectors, "random")) c.vector = c.hidden;
  need(moe_model_create(&model, &c, task, T, (uint64_t)opt.seed, &env));
  if (init_file) need(moe_model_import(model, init_file, init_bytes, &noise, &env));
  else if (blocks > 1) { /* from scratch too, the blocks of a layer start as copies of one, as in the paper */
    int32_t i;
    for (i = 0; i < moe_model_tensors(model); ++i) {
      moe_tensor t, first;
      char name[128], *at;
      need(moe_model_tensor(model, i, &t));
      at = strstr(strcpy(name, t.name), ".blocks.");
      if (!at || at[8] == '0') continue;
      at[8] = '0';
      memmove(at + 9, strchr(at + 9, '.'), strlen(strchr(at + 9, '.')) + 1);
      need(moe_model_tensor(model, moe_model_find_tensor(model, name), &first));
      memcpy(moe_model_weights(model) + t.offset, moe_model_weights(model) + first.offset, t.count * sizeof(float));
    }
  }
  return model;
}

/* Of each task and layer the block of the largest probability, and that in percent. */
static void look_at_routes(const char *system, const moe_model *model, int64_t step, int64_t steps, float tau) {
  int m = opt.blocks, t, l, i;
  float *routes = (float *)take((size_t)(T * base.layers * m), sizeof *routes);
  double most = 0;
  need(moe_level_routes(routes, model, tau, &env));
  printf("  after %3.0f %% of the steps, temperature %.2f\n", 100.0 * (double)step / (double)steps, (double)tau);
  for (t = 0; t < T; ++t) {
    printf("    %-24s", task[t].name);
    for (l = 0; l < base.layers; ++l) {
      const float *p = routes + (t * base.layers + l) * m;
      int best = 0;
      for (i = 1; i < m; ++i)
        if (p[i] > p[best]) best = i;
      printf("  %c %3.0f", 'A' + best % 26, 100 * (double)p[best]);
      most += (double)p[best];
      for (i = 0; i < m && csv; ++i)
        fprintf(csv, "%s,%lld,%g,%s,%d,%d,%g\n", system, (long long)step, (double)tau, task[t].name, l, i, (double)p[i]);
    }
    printf("\n");
  }
  printf("    mean of the largest: %.0f %%\n", 100 * most / (T * base.layers));
  free(routes);
}

/* Trains a model to the end. routes: fixed ones, or NULL; with `blend` they come in from the average over the first half. Leaves the metrics. */
static void train_model(int system, moe_model *model, const float *routes, int blend, double *metric) {
  const moe_group groups[] = {{"router.", (float)opt.router_rate, 1}, {"tasks.vectors", opt.freeze ? 0.0f : (float)opt.router_rate, 1}};
  size_t choices = (size_t)(T * base.layers * opt.blocks);
  float *given = routes ? (float *)take(choices, sizeof *given) : NULL;
  moe_limits limits;
  moe_train_config c;
  moe_trainer *trainer;
  moe_sampler_config sc;
  moe_sampler sampler;
  moe_level level = {NULL, NULL, NULL};
  int64_t used[MOST_TASKS], step, row, total = 0, look = 0;
  pack p = pack_make();
  int t;
  int32_t drawn;
  limits.tokens = opt.batch * opt.max_len;
  limits.sequences = opt.batch;
  limits.training = 1;
  for (t = 0; t < T; ++t) total += train_rows[t];
  moe_train_config_init(&c);
  c.rate = (float)opt.lr;
  c.steps = opt.steps ? opt.steps : (total * opt.epochs + opt.batch - 1) / opt.batch;
  c.decay = 0.01f;
  c.seed = (uint64_t)opt.seed;
  c.groups = groups;
  c.n_groups = 2;
  memset(&sc, 0, sizeof sc);
  sc.seed = (uint64_t)opt.seed;
  if (opt.homogeneous) sc.run = opt.batch;
  need(moe_trainer_create(&trainer, model, &limits, &c, &env));
  need(moe_sampler_init(&sampler, &sc, train_rows, used, T, &env));
  if (moe_model_config(model)->router == MOE_ROUTER_LEVEL && strcmp(opt.vectors, "random")) set_vectors(model, trainer, &p);
  level.routes = given;
  if (given) memcpy(given, routes, choices * sizeof *given);
  if (given) need(moe_context_level(moe_trainer_context(trainer), &level, &env));
  for (step = 0; step < c.steps; ++step) {
    float share = 2 * (float)step / (float)c.steps;
    if (blend) moe_level_blend(given, routes, share < 1 ? share : 1, choices / (size_t)opt.blocks, opt.blocks);
    if (moe_model_config(model)->router == MOE_ROUTER_LEVEL && step == look * c.steps / (LOOKS - 1)) {
      look_at_routes(system_name[system], model, step, c.steps, moe_train_tau(&c, step));
      ++look;
    }
    for (p.b.S = 0; p.b.S < opt.batch;) {
      moe_sample(&sampler, &drawn, &row);
      pack_add(&p, drawn, &train[drawn], row);
    }
    need(moe_accumulate(trainer, &p.b, 0, NULL, NULL, &env));
    need(moe_update(trainer, NULL, &env));
  }
  if (moe_model_config(model)->router == MOE_ROUTER_LEVEL)
    look_at_routes(system_name[system], model, step, c.steps, moe_train_tau(&c, step));
  for (t = 0; t < T; ++t) metric[t] = evaluate(moe_trainer_context(trainer), t, moe_model_max_classes(model), &p);
  moe_trainer_free(trainer);
  free(given), free(p.start), free(p.ids), free(p.task), free(p.segments), free(p.label);
}

static void run_system(int system) {
  float *routes = (float *)take((size_t)(T * base.layers * opt.blocks), sizeof *routes);
  int learned = system >= 4;
  clock_t begin = clock();
  moe_model *model = make_model(learned ? MOE_ROUTER_LEVEL : MOE_ROUTER_DENSE, (moe_selection)(learned ? system - 4 : 0), system ? opt.blocks : 1);
  if (learned) printf("\n%s: block and its probability in percent, layer by layer\n", system_name[system]);
  if (system == 1 || system == 2) draw_routes(routes, system);
  train_model(system, model, system == 1 || system == 2 ? routes : NULL, 0, result[system]);
  if (learned && opt.two_stage) {
    need(moe_level_routes(routes, model, system == 4 ? moe_model_config(model)->temperature : 0, &env));
    moe_model_free(model);
    model = make_model(MOE_ROUTER_DENSE, MOE_SELECT_SOFTMAX, opt.blocks);
    train_model(system, model, routes, 1, result[system]);
  }
  seconds[system] = (double)(clock() - begin) / CLOCKS_PER_SEC;
  was_run[system] = 1;
  moe_model_free(model);
  free(routes);
}

/* ---- output ---- */

static void print_table(void) {
  int s, t;
  printf("\n%-24s", "100 x metric on dev");
  for (s = 0; s < SYSTEMS; ++s)
    if (was_run[s]) printf(" %9s", system_name[s]);
  for (t = 0; t <= T; ++t) {
    printf("\n%-24s", t < T ? task[t].name : "mean");
    for (s = 0; s < SYSTEMS; ++s) {
      double sum = 0;
      int i;
      for (i = 0; i < T; ++i) sum += result[s][i];
      if (was_run[s]) printf(" %9.1f", 100 * (t < T ? result[s][t] : sum / T));
    }
  }
  printf("\n%-24s", "seconds of processor");
  for (s = 0; s < SYSTEMS; ++s)
    if (was_run[s]) printf(" %9.0f", seconds[s]);
  printf("\n");
}

static void write_json(void) {
  FILE *f = fopen(opt.json, "w");
  int s, t, first = 1;
  if (!f) die("%s cannot be written", opt.json);
  fprintf(f, "{\"seed\":%d,\"blocks\":%d,\"lr\":%g,\"router_rate\":%g,\"homogeneous\":%d,\"two_stage\":%d,\"freeze\":%d,\"vectors\":\"%s\",\"runs\":[",
          opt.seed, opt.blocks, opt.lr, opt.router_rate, opt.homogeneous, opt.two_stage, opt.freeze, opt.vectors);
  for (s = 0; s < SYSTEMS; ++s) {
    if (!was_run[s]) continue;
    fprintf(f, "%s\n{\"system\":\"%s\",\"seconds\":%.1f,\"tasks\":[", first ? "" : ",", system_name[s], seconds[s]);
    for (t = 0; t < T; ++t)
      fprintf(f, "%s{\"name\":\"%s\",\"metric\":\"%.*s\",\"value\":%.6f,\"n\":%d}", t ? "," : "", task[t].name,
              (int)strcspn(task[t].metrics, ","), task[t].metrics, result[s][t], (int)dev[t].n);
    fprintf(f, "]}");
    first = 0;
  }
  fprintf(f, "\n]}\n");
  if (fclose(f)) die("%s cannot be written", opt.json);
}

static void parse(int argc, char **argv) {
  const struct {
    const char *name, **text;
    int *flag, *number, low;
    double *real;
  } options[] = {{"--data", &opt.data, NULL, NULL, 0, NULL}, {"--tasks", &opt.tasks, NULL, NULL, 0, NULL},
                 {"--systems", &opt.systems, NULL, NULL, 0, NULL}, {"--vectors", &opt.vectors, NULL, NULL, 0, NULL},
                 {"--init", &opt.init, NULL, NULL, 0, NULL}, {"--vocab", &opt.vocab, NULL, NULL, 0, NULL},
                 {"--json", &opt.json, NULL, NULL, 0, NULL}, {"--csv", &opt.csv, NULL, NULL, 0, NULL},
                 {"--homogeneous", NULL, &opt.homogeneous, NULL, 0, NULL}, {"--two-stage", NULL, &opt.two_stage, NULL, 0, NULL},
                 {"--freeze", NULL, &opt.freeze, NULL, 0, NULL}, {"--blocks", NULL, NULL, &opt.blocks, 1, NULL},
                 {"--seed", NULL, NULL, &opt.seed, 0, NULL}, {"--epochs", NULL, NULL, &opt.epochs, 1, NULL},
                 {"--steps", NULL, NULL, &opt.steps, 1, NULL}, {"--batch", NULL, NULL, &opt.batch, 1, NULL},
                 {"--heads", NULL, NULL, &opt.heads, 1, NULL}, {"--layers", NULL, NULL, &opt.layers, 1, NULL},
                 {"--hidden", NULL, NULL, &opt.hidden, 1, NULL}, {"--max-len", NULL, NULL, &opt.max_len, 3, NULL},
                 {"--threads", NULL, NULL, &opt.threads, 1, NULL}, {"--rows", NULL, NULL, &opt.rows, 1, NULL},
                 {"--lr", NULL, NULL, NULL, 0, &opt.lr}, {"--router-rate", NULL, NULL, NULL, 0, &opt.router_rate}};
  size_t n = sizeof options / sizeof *options, k;
  int i;
  for (i = 1; i < argc; ++i) {
    for (k = 0; k < n && strcmp(argv[i], options[k].name); ++k) continue;
    if (k == n) die("unknown option %s; the first lines of tasklevel.c name them all", argv[i]);
    if (options[k].flag) {
      *options[k].flag = 1;
      continue;
    }
    if (++i == argc) die("%s needs a value", argv[i - 1]);
    if (options[k].text) *options[k].text = argv[i];
    else {
      char *end;
      double v = strtod(argv[i], &end);
      if (end == argv[i] || *end || !(v >= options[k].low && v <= 1e9)) die("%s: \"%s\" is no number from %d", argv[i - 1], argv[i], options[k].low);
      if (options[k].number) *options[k].number = (int)v;
      else *options[k].real = v;
    }
  }
  if (strcmp(opt.vectors, "random") && strcmp(opt.vectors, "text") && strcmp(opt.vectors, "fisher")) die("--vectors is random, text or fisher");
  if (opt.lr <= 0) opt.lr = opt.init ? 5e-5 : 1e-3;
  if (opt.init && (!opt.vocab || !opt.heads)) die("--init needs --vocab and --heads");
  if (listed(opt.systems, "random2") && opt.blocks < 2) die("random2 takes two blocks, --blocks is %d", opt.blocks);
}

int main(int argc, char **argv) {
  moe_pool *pool;
  int s, known = 0;
  parse(argc, argv);
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = show;
  need(moe_pool_create(&pool, opt.threads ? opt.threads : moe_processors(), &env));
  moe_config_init(&base);
  base.layers = opt.layers;
  base.hidden = opt.hidden;
  base.ffn = 4 * opt.hidden;
  base.heads = opt.heads ? opt.heads : 4;
  base.positions = base.max_len = opt.max_len;
  read_tasks();
  if (opt.init) {
    need(moe_file_read(&init_file, &init_bytes, opt.init, &env));
    need(moe_import_sizes(&base, init_file, init_bytes, &env));
  }
  if (opt.csv && !(csv = fopen(opt.csv, "w"))) die("%s cannot be written", opt.csv);
  if (csv) fprintf(csv, "system,step,temperature,task,layer,block,probability\n");
  for (s = 0; s < SYSTEMS; ++s)
    if (listed(opt.systems, system_name[s])) {
      run_system(s);
      ++known;
      if (opt.json) write_json(); /* finished parts are kept */
    }
  if (!known) die("--systems names none of multi random1 random2 average softmax gumbel straight");
  print_table();
  if (csv && fclose(csv)) die("%s cannot be written", opt.csv);
  moe_pool_free(pool);
  return 0;
}
