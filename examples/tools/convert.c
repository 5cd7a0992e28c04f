/* convert.c - look into a model file, and make a smaller one of it
   cc -O3 -o convert examples/tools/convert.c -lm -pthread
   ./convert IN                 what is in a file: configuration, tasks, tensors, bytes
   ./convert IN OUT --int8      a quarter of the bytes, for inference: matrices as integers of 8
   bits
   ./convert IN OUT --task T [--rows TSV [--drop-below SHARE]] [--score TSV]   one task alone; may
   go with --int8
                                --rows train.tsv: without the experts of each layer that got none of
                                its tokens, or fewer than SHARE --score dev.tsv: what that costs,
                                the task's metrics before and after
   ./predict takes the result as it takes any model. Options: --tensors lists every tensor,
   --threads N, --isa NAME. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#include "../../moe.h"
#include "scores.h"

enum { BATCH = 32, FIELDS = 16 };

static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "convert: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
}

static const char *
    about; /* the file whose bytes are being read, if any: sentences about it begin with its name */

static void show(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, about ? "convert: %s: %s\n" : "convert: %s%s\n", about ? about : "", sentence);
}

typedef struct options {
  const char *in, *out, *task, *rows, *score, *isa_name;
  double drop;
  int int8, tensors, threads;
  moe_isa isa;
} options;

static double number(const char *what, const char *text, double low, double high) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end) die("%s: \"%s\" is no number", what, text);
  if (!(v >= low && v <= high)) die("%s: %s is not within %g .. %g", what, text, low, high);
  return v;
}

/* A character's place: a whole number. */
static int32_t offset(const char *text) {
  double v = number("an offset", text, 0, 1e9);
  if (v != (double)(int32_t)v) die("offset %s is no whole number", text);
  return (int32_t)v;
}

static options parse(int argc, char **argv) {
  options o = {NULL, NULL, NULL, NULL, NULL, "auto", 0, 0, 0, 1, MOE_ISA_AUTO};
  int i;
  for (i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--int8"))
      o.int8 = 1;
    else if (!strcmp(argv[i], "--task") && i + 1 < argc)
      o.task = argv[++i];
    else if (!strcmp(argv[i], "--rows") && i + 1 < argc)
      o.rows = argv[++i];
    else if (!strcmp(argv[i], "--score") && i + 1 < argc)
      o.score = argv[++i];
    else if (!strcmp(argv[i], "--drop-below") && i + 1 < argc)
      o.drop = number("--drop-below", argv[++i], 0, 1);
    else if (!strcmp(argv[i], "--tensors"))
      o.tensors = 1;
    else if (!strcmp(argv[i], "--threads") && i + 1 < argc)
      o.threads = (int)number("--threads", argv[++i], 1, 256);
    else if (!strcmp(argv[i], "--isa") && i + 1 < argc)
      o.isa = moe_isa_from_name(o.isa_name = argv[++i]);
    else if (argv[i][0] == '-')
      die("unknown option %s, or a value is missing", argv[i]);
    else if (!o.in)
      o.in = argv[i];
    else if (!o.out)
      o.out = argv[i];
    else
      die("%s: a third file", argv[i]);
  }
  if (!o.in)
    die("usage: convert IN [OUT [--int8] [--task T [--rows TSV [--drop-below SHARE]] [--score "
        "TSV]]] [--tensors] [--threads N] "
        "[--isa auto|avx512|avx2|neon|scalar]");
  if (o.out && !o.int8 && !o.task)
    die("what should become of %s? --int8 makes a smaller copy, --task takes one task", o.in);
  if (o.task && !o.out) die("--task wants a second file, to write to");
  if (o.drop > 0 && !o.rows) die("--drop-below wants --rows TSV, whose tokens are counted");
  if ((o.rows || o.score) && !o.task) die("--rows and --score are of one task: --task T");
  if (o.int8 && !o.out) die("--int8 wants a second file, to write to");
  if (o.out && !strcmp(o.in, o.out))
    die("the model would be replaced by its copy: give OUT another name");
  return o;
}

/* Bytes of the tensors of a type, and how many there are. */
static double tensor_bytes(const moe_model *model, moe_type type, int *count) {
  double bytes = 0;
  int32_t i;
  *count = 0;
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    moe_model_tensor(model, i, &t);
    if (t.type != type) continue;
    bytes += (double)t.count * (type == MOE_TYPE_I8 ? 1 : 4);
    ++*count;
  }
  return bytes;
}

static void print_tasks(const moe_model *model) {
  static const char *const kind[] = {"classification", "regression", "ranking", "span"};
  int32_t t, i;
  printf("tasks %d\n", (int)moe_model_tasks(model));
  for (t = 0; t < moe_model_tasks(model); ++t) {
    const moe_task *task = moe_model_task(model, t);
    printf("  %-24s %s of %s", task->name, kind[task->kind], task->pair ? "two texts" : "one text");
    if (task->kind == MOE_KIND_REGRESSION)
      printf(", %g to %g", (double)task->low, (double)task->high);
    else {
      printf(", %d classes:", (int)task->classes);
      for (i = 0; i < task->classes && i < 8; ++i) printf(" %s", task->label[i]);
      if (i < task->classes) printf(" ...");
    }
    if (task->max_len) printf(", at most %d tokens", (int)task->max_len);
    printf("\n");
  }
}

static void print_model(const moe_model *model, double file_bytes, int tensors) {
  static const char *const router[] = {"dense", "a gate for all tasks", "a gate for each task",
                                       "tasks choose blocks", "gates of task vectors"};
  const moe_config *c = moe_model_config(model);
  size_t vocab = 0;
  int floats, integers;
  double float_bytes = tensor_bytes(model, MOE_TYPE_F32, &floats),
         int_bytes = tensor_bytes(model, MOE_TYPE_I8, &integers);
  int32_t i;
  int k;
  moe_model_vocab(model, &vocab);
  printf("layers %d, hidden %d, ffn %d, heads %d, eps %g\n", (int)c->layers, (int)c->hidden,
         (int)c->ffn, (int)c->heads, (double)c->eps);
  if (c->feature_dim)
    printf("features %d", (int)c->feature_dim);
  else
    printf("vocab %d (%s)", (int)c->vocab, c->cased ? "cased" : "uncased");
  printf(", positions %d, segments %d, inputs of at most %d tokens, cut %s\n", (int)c->positions,
         (int)c->segments, (int)c->max_len,
         c->truncate == MOE_TRUNCATE_LONGEST ? "at the longer text" : "on the right");
  printf("router: %s, %s %d, top-k %d%s%s\n", router[c->router],
         c->unit == MOE_UNIT_BLOCK ? "blocks" : "experts", (int)c->experts, (int)c->top_k,
         c->gate_scale_n ? ", gate scale N/k" : "", c->renormalize ? ", renormalised" : "");
  if (c->pruned) {
    printf("experts that are there, layer by layer:");
    for (i = 0; i < c->layers * c->experts; ++i) {
      if (i % c->experts == 0) printf("%s", i ? " | " : " ");
      if (!c->pruned[i]) printf(" %d", (int)(i % c->experts));
    }
    printf("\n");
  }
  print_tasks(model);
  printf("parameters %lu\n", (unsigned long)moe_model_parameters(model));
  printf("floats   %12.0f bytes in %d tensors\n", float_bytes, floats);
  if (integers) printf("int8     %12.0f bytes in %d tensors\n", int_bytes, integers);
  printf("words    %12.0f bytes of vocabulary\n", (double)vocab);
  printf("file     %12.0f bytes\n", file_bytes);
  for (i = 0; tensors && i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    moe_model_tensor(model, i, &t);
    printf("  %s %s (", t.type == MOE_TYPE_I8 ? "I8 " : "F32", t.name);
    for (k = 0; k < t.dims; ++k) printf(k ? ", %d" : "%d", (int)t.shape[k]);
    printf(")\n");
  }
}

/* Norm of what quantisation adds to the matrices, relative to theirs; the library did the same to
   them. */
static double weight_error(moe_model *model, const moe_model *small, const moe_env *env) {
  double error = 0, norm = 0;
  int32_t i, j, k;
  for (i = 0; i < moe_model_tensors(small); ++i) {
    moe_tensor t, from;
    const float *w;
    int8_t *q;
    float *scale;
    moe_model_tensor(small, i, &t);
    if (t.type != MOE_TYPE_I8) continue;
    moe_model_tensor(model, moe_model_find_tensor(model, t.name), &from);
    w = moe_model_weights(model) + from.offset;
    q = (int8_t *)malloc(t.count);
    scale = (float *)malloc((size_t)t.shape[0] * sizeof *scale);
    if (!q || !scale) die("out of memory");
    moe_quantize(q, scale, w, t.shape[0], t.shape[1], env);
    for (j = 0; j < t.shape[0]; ++j)
      for (k = 0; k < t.shape[1]; ++k) {
        size_t at = (size_t)j * (size_t)t.shape[1] + (size_t)k;
        double d = (double)scale[j] * q[at] - (double)w[at];
        error += d * d;
        norm += (double)w[at] * (double)w[at];
      }
    free(q);
    free(scale);
  }
  return norm > 0 ? sqrt(error / norm) : 0;
}

static moe_model *load(const char *path, double *bytes, const moe_env *env) {
  moe_model *model;
  void *file;
  size_t size;
  if (moe_file_read(&file, &size, path, env)) exit(1);
  about = path;
  if (moe_model_read(&model, file, size, env)) exit(1);
  about = NULL;
  moe_free(file);
  *bytes = (double)size;
  return model;
}

/* A file as for training: its rows, cut at the tabs, and where in a row things stand (-1: nowhere).
 */
typedef struct table {
  char *text;
  int n, label, a, b, group, span[4];
  char *(*row)[FIELDS];
} table;

/* Cuts a line at its tabs; returns the number of fields. */
static int split(char *line, char **field) {
  int n = 0;
  for (;; *line++ = 0) {
    if (n < FIELDS) field[n] = line;
    ++n;
    line = strchr(line, '\t');
    if (!line) return n;
  }
}

static int column(char **name, int n, const char *wanted, const char *path) {
  int i;
  for (i = 0; i < n && strcmp(name[i], wanted); ++i) continue;
  if (i == n) die("%s: the first line names no column \"%s\"", path, wanted);
  return i;
}

static table read_table(const char *path, const moe_task *task, int labels, const moe_env *env) {
  static const char *const span_name[] = {"start1", "end1", "start2", "end2"};
  table t = {NULL, 0, -1, 0, -1, -1, {-1, -1, -1, -1}, NULL};
  char *name[FIELDS], *line, *next;
  int fields = 0, room = 0, number_of_line = 0, i;
  size_t bytes;
  void *file;
  if (moe_file_read(&file, &bytes, path, env)) exit(1);
  t.text = (char *)file;
  if (strlen(t.text) != bytes) die("%s: a zero byte", path);
  line = strncmp(t.text, "\xef\xbb\xbf", 3)
             ? t.text
             : t.text + 3; /* the mark that some editors put before UTF-8 */
  for (; *line; line = next) {
    size_t length = strcspn(line, "\n");
    int got;
    next = line + length + (line[length] != 0);
    line[length - (length && line[length - 1] == '\r')] = 0;
    line[length] = 0;
    if (t.n == room)
      t.row =
          (char *(*)[FIELDS])answers_grow(t.row, (size_t)(room = 2 * room + 1024), sizeof *t.row);
    got = split(line, number_of_line++ ? t.row[t.n++] : name);
    if (number_of_line == 1) fields = got;
    if (got != fields || got > FIELDS)
      die("%s, line %d: %d columns, expected %d (at most %d)", path, number_of_line, got, fields,
          FIELDS);
  }
  if (!t.n) die("%s holds no rows", path);
  t.a = column(name, fields, "sentence1", path);
  if (task->pair) t.b = column(name, fields, "sentence2", path);
  if (!labels) return t;
  t.label = column(name, fields, "label", path);
  if (task->kind == MOE_KIND_RANKING) t.group = column(name, fields, "group", path);
  for (i = 0; i < 4 && task->kind == MOE_KIND_SPAN; ++i)
    t.span[i] = column(name, fields, span_name[i], path);
  return t;
}

static void free_table(table *t) {
  free(t->row);
  moe_free(t->text);
}

/* What a model answers to the rows of a table. */
static answers ask(const moe_model *model, const options *o, const moe_env *env) {
  static float scores[BATCH * MOE_MAX_CLASSES];
  answers r = {0, 0, NULL, NULL, NULL, NULL, NULL};
  int32_t t = moe_model_find_task(model, o->task), span[4 * BATCH];
  const moe_task *task = moe_model_task(model, t);
  table rows = read_table(o->score, task, 1, env);
  moe_predictor *predictor;
  const char *a[BATCH], *b[BATCH];
  int best[BATCH], at, n, i, j, regression = task->kind == MOE_KIND_REGRESSION;
  if (moe_predictor_create(&predictor, model, BATCH, env)) exit(1);
  for (at = 0; at < rows.n; at += n) {
    n = rows.n - at < BATCH ? rows.n - at : BATCH;
    for (i = 0; i < n; ++i) {
      char **field = rows.row[at + i];
      a[i] = field[rows.a];
      b[i] = rows.b < 0 ? NULL : field[rows.b];
      for (j = 0; j < 4 && rows.span[0] >= 0; ++j) span[4 * i + j] = offset(field[rows.span[j]]);
    }
    if (moe_predict_spans(predictor, t, a, b, rows.span[0] < 0 ? NULL : span, n, scores, best))
      exit(1);
    for (i = 0; i < n; ++i) {
      char **field = rows.row[at + i];
      double low = regression ? (double)task->low : 0,
             high = regression ? (double)task->high : task->classes - 1;
      answers_keep(&r, task, (float)number("a label", field[rows.label], low, high),
                   rows.group < 0 ? "" : field[rows.group],
                   scores + i * moe_model_max_classes(model), best[i]);
    }
  }
  moe_predictor_free(predictor);
  free_table(&rows);
  return r;
}

static void print_scores(const moe_task *task, const answers *before, const answers *after) {
  const char *name = answers_metrics(task);
  for (;;) {
    int defined[2], length = (int)strcspn(name, ",");
    double was = answers_metric(before, task, name, &defined[0]),
           is = answers_metric(after, task, name, &defined[1]);
    printf("%-8.*s %12.6f before, %.6f after, over %lu rows%s\n", length, name, was, is,
           (unsigned long)after->n, defined[0] && defined[1] ? "" : " (undefined)");
    name += length;
    if (!*name++) return;
  }
}

/* Adds up how often each expert was chosen: sums of one task. */
static void count_routes(moe_route_sums *sums, const moe_model *model, int32_t task,
                         const table *rows, const moe_env *env) {
  const moe_config *c = moe_model_config(model);
  int32_t own = moe_model_task(model, task)->max_len,
          longest = own && own < c->max_len ? own : c->max_len;
  moe_limits limits = {longest, 1, 0, 0};
  moe_context *context;
  moe_tokenizer *tokenizer;
  moe_tokens tokens;
  moe_batch batch;
  int32_t start[2] = {0, 0}, span[4] = {0, 1, 0, 1};
  int i;
  size_t bytes, vocab_bytes;
  const char *vocab = moe_model_vocab(model, &vocab_bytes);
  float *scores = (float *)answers_grow(NULL, (size_t)moe_model_max_classes(model), sizeof *scores);
  unsigned char *raw;
  if (!vocab) die("the model holds no vocabulary");
  if (moe_tokenizer_size(vocab, vocab_bytes, &bytes, env) ||
      moe_context_create(&context, model, &limits, env))
    exit(1);
  raw = (unsigned char *)answers_grow(NULL, bytes + 64, 1);
  if (moe_tokenizer_init(&tokenizer, raw + (64 - ((size_t)raw & 63)), bytes, vocab, vocab_bytes,
                         c->cased, env))
    exit(1);
  memset(&tokens, 0, sizeof tokens);
  tokens.capacity = c->max_len;
  tokens.ids = (int32_t *)answers_grow(NULL, (size_t)c->max_len, sizeof *tokens.ids);
  tokens.segments = (uint8_t *)answers_grow(NULL, (size_t)c->max_len, 1);
  memset(&batch, 0, sizeof batch);
  batch.S = 1;
  batch.seq_start = start;
  batch.ids = tokens.ids;
  batch.segments = tokens.segments;
  batch.task = &task;
  batch.span = span; /* routes do not depend on it */
  for (i = 0; i < rows->n; ++i) {
    const char *a = rows->row[i][rows->a], *b = rows->b < 0 ? NULL : rows->row[i][rows->b];
    moe_text text = moe_text_of(a, b);
    if (moe_encode(tokenizer, &tokens, &text, longest, c->truncate, env)) exit(1);
    start[1] = tokens.count;
    if (moe_forward(context, scores, &batch, env) || moe_route_count(sums, context, &batch, env))
      exit(1);
  }
  free(raw);
  free(scores);
  free(tokens.ids);
  free(tokens.segments);
  moe_context_free(context);
}

/* The experts to be left out: those with no tokens or fewer than the share, but for the k most
   used. */
static void choose(unsigned char *drop, const int64_t *chosen, const moe_config *c, double share) {
  int32_t l, e, j;
  memset(drop, 1, (size_t)c->layers * (size_t)c->experts);
  for (l = 0; l < c->layers; ++l, chosen += c->experts, drop += c->experts) {
    double sum = 0;
    for (e = 0; e < c->experts; ++e) sum += (double)chosen[e];
    for (e = 0; e < c->experts; ++e) drop[e] = chosen[e] == 0 || (double)chosen[e] < share * sum;
    for (j = 0; j < c->top_k; ++j) {
      int32_t best = -1, kept = 0;
      for (e = 0; e < c->experts; ++e) kept += !drop[e];
      for (e = 0; e < c->experts; ++e)
        if (drop[e] && (best < 0 || chosen[e] > chosen[best]) &&
            !(c->pruned && c->pruned[l * c->experts + e]))
          best = e;
      if (kept < c->top_k && best >= 0) drop[best] = 0;
    }
  }
}

/* The model with one task alone; with --rows without the experts that it hardly uses. */
static moe_model *take_task(const moe_model *model, const options *o, const moe_env *env) {
  const moe_config *c = moe_model_config(model);
  int32_t task = moe_model_find_task(model, o->task);
  size_t cells = (size_t)c->layers * (size_t)c->experts,
         all = (size_t)moe_model_tasks(model) * cells;
  moe_model *out;
  moe_route_sums sums = {NULL, NULL, NULL, NULL};
  unsigned char *drop = NULL;
  table rows;
  if (o->rows) {
    if (c->router == MOE_ROUTER_DENSE || c->unit == MOE_UNIT_BLOCK)
      die("%s has no experts behind gates that could be left out", o->in);
    rows = read_table(o->rows, moe_model_task(model, task), 0, env);
    sums.tokens = (int64_t *)calloc((size_t)moe_model_tasks(model), sizeof *sums.tokens);
    sums.chosen = (int64_t *)calloc(all, sizeof *sums.chosen);
    drop = (unsigned char *)malloc(cells);
    if (!sums.tokens || !sums.chosen || !drop) die("out of memory");
    count_routes(&sums, model, task, &rows, env);
    choose(drop, sums.chosen + (size_t)task * cells, c, o->drop);
    free_table(&rows);
  }
  if (moe_model_extract(&out, model, &task, 1, drop, env)) exit(1);
  free(sums.tokens);
  free(sums.chosen);
  free(drop);
  return out;
}

int main(int argc, char **argv) {
  options o = parse(argc, argv);
  moe_env env;
  moe_pool *pool = NULL;
  moe_model *model;
  double before, after, error = 0;
  answers was = {0, 0, NULL, NULL, NULL, NULL, NULL}, is = was;
  if (o.isa == MOE_ISA_COUNT || moe_env_init(&env, o.isa))
    die("this machine has no instruction set \"%s\"", o.isa_name);
  env.log = show;
  if (o.threads > 1 && moe_pool_create(&pool, o.threads, &env)) return 1;
  model = load(o.in, &before, &env);
  if (o.task && moe_model_find_task(model, o.task) < 0) die("%s has no task \"%s\"", o.in, o.task);
  if (o.score) was = ask(model, &o, &env);
  if (o.task) {
    moe_model *alone = take_task(model, &o, &env);
    moe_model_free(model);
    model = alone;
  }
  if (o.int8) {
    moe_model *small;
    if (moe_model_quantize(&small, model, &env)) return 1;
    error = weight_error(model, small, &env);
    moe_model_free(model);
    model = small;
  }
  if (o.out) {
    if (moe_model_save(model, o.out, &env)) return 1;
    moe_model_free(model);
    model = load(o.out, &after, &env); /* what is printed is what stands in the file */
    print_model(model, after, o.tensors);
    if (o.int8) printf("error    %12.5f of the norm of the matrices\n", error);
    printf("saved    %12.0f bytes of %.0f (%.1f %%)%s\n", before - after, before,
           100 * (before - after) / before,
           o.score ? "" : "; what it costs in scores: ./predict FILE TASK --score, for both");
  } else
    print_model(model, before, o.tensors);
  if (o.score) {
    is = ask(model, &o, &env);
    print_scores(moe_model_task(model, moe_model_find_task(model, o.task)), &was, &is);
  }
  answers_free(&was);
  answers_free(&is);
  moe_model_free(model);
  moe_pool_free(pool);
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  return 0;
}
