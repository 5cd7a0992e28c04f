/* predict.c - a trained model from the shell
   cc -O3 -o predict examples/tools/predict.c -lm -pthread
   ./predict MODEL TASK < lines.tsv         a text a line, or two with a tab between:
   label<TAB>probability for each, in that order
   ./predict MODEL TASK --score < dev.tsv   a file as for training (header line, column label): the
   metrics of the task A task of kind span takes start1 end1 start2 end2, in characters, behind its
   texts. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#include "../../moe.h"
#include "scores.h"

enum { BATCH = 32, FIELDS = 16 };

static int line_number;

static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "predict: ");
  if (line_number) fprintf(stderr, "line %d: ", line_number);
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
}

static void show(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "predict: %s\n", sentence);
}

static void *grow(void *p, size_t count, size_t size) {
  p = realloc(p, (count ? count : 1) * size);
  if (!p) die("out of memory (%zu bytes)", count * size);
  return p;
}

/* The next line of standard input, to be freed, without its end; NULL when there is none. */
static char *read_line(void) {
  size_t used = 0, room = 0;
  char *line = NULL;
  int c = getchar();
  if (c == EOF) return NULL;
  ++line_number;
  for (; c != EOF && c != '\n'; c = getchar()) {
    if (!c) die("a zero byte");
    if (used + 2 > room) line = (char *)grow(line, room = 2 * room + 256, 1);
    line[used++] = (char)c;
  }
  if (!line) line = (char *)grow(line, 1, 1);
  if (used && line[used - 1] == '\r') --used;
  line[used] = 0;
  return line;
}

/* Cuts a line at its tabs; returns the number of fields, of which the first FIELDS are stored. */
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

/* Where in a line things stand; -1: nowhere. */
typedef struct layout {
  int fields, label, a, b, group, span[4];
} layout;

static layout find_columns(const moe_task *task, int score) {
  static const char *const span_name[] = {"start1", "end1", "start2", "end2"};
  layout at = {0, -1, 0, -1, -1, {-1, -1, -1, -1}};
  int i, spans = task->kind == MOE_KIND_SPAN;
  char *line, *name[FIELDS];
  if (!score) {
    if (task->pair) at.b = 1;
    at.fields = 1 + task->pair + 4 * spans;
    for (i = 0; i < 4 && spans; ++i) at.span[i] = 1 + task->pair + i;
    return at;
  }
  line = read_line();
  if (!line) die("the input is empty; its first line should name the columns");
  at.fields = split(strncmp(line, "\xef\xbb\xbf", 3) ? line : line + 3,
                    name); /* the mark that some editors put before UTF-8 */
  if (at.fields > FIELDS) die("%d columns, %d are the most", at.fields, FIELDS);
  at.label = column(name, at.fields, "label");
  at.a = column(name, at.fields, "sentence1");
  if (task->pair) at.b = column(name, at.fields, "sentence2");
  if (task->kind == MOE_KIND_RANKING) at.group = column(name, at.fields, "group");
  for (i = 0; i < 4 && spans; ++i) at.span[i] = column(name, at.fields, span_name[i]);
  free(line);
  return at;
}

static void print_metrics(const answers *r, const moe_task *task) {
  const char *name = answers_metrics(task);
  for (;;) {
    int defined, length = (int)strcspn(name, ",");
    double v = answers_metric(r, task, name, &defined);
    printf("%.*s %.6f%s\n", length, name, v, defined ? "" : " (undefined)");
    name += length;
    if (!*name++) break;
  }
  printf("n %lu\n", (unsigned long)r->n);
}

/* Reads up to BATCH lines, predicts, and prints or keeps; returns 0 at the end of the input. */
static int do_batch(moe_predictor *p, const moe_model *model, int32_t t, const layout *at,
                    answers *r) {
  static float scores[BATCH * MOE_MAX_CLASSES];
  const moe_task *task = moe_model_task(model, t);
  char *line[BATCH], *field[FIELDS];
  const char *a[BATCH], *b[BATCH], *group[BATCH];
  int32_t span[4 * BATCH];
  float truth[BATCH];
  int best[BATCH], n, i;
  for (n = 0; n < BATCH && (line[n] = read_line()) != NULL; ++n) {
    int got = split(line[n], field);
    if (got != at->fields) {
      const char *takes = task->pair ? "two texts" : "one text";
      die("%d column%s, expected %d: task %s takes %s", got, got == 1 ? "" : "s", at->fields,
          task->name, takes);
    }
    a[n] = field[at->a];
    b[n] = at->b < 0 ? NULL : field[at->b];
    group[n] = at->group < 0 ? "" : field[at->group];
    for (i = 0; i < 4 && at->span[0] >= 0; ++i) span[4 * n + i] = offset(field[at->span[i]]);
    if (at->label < 0) continue;
    if (task->kind == MOE_KIND_REGRESSION) {
      truth[n] = (float)number("label", field[at->label], (double)task->low, (double)task->high);
      continue;
    }
    truth[n] = (float)number("label", field[at->label], 0, task->classes - 1);
    if (truth[n] != (float)(int)truth[n]) die("label %s is no whole number", field[at->label]);
  }
  if (moe_predict_spans(p, t, a, b, at->span[0] < 0 ? NULL : span, n, scores, best)) exit(1);
  for (i = 0; i < n; ++i) {
    const float *row = scores + i * moe_model_max_classes(model);
    if (at->label >= 0)
      answers_keep(r, task, truth[i], group[i], row, best[i]);
    else if (task->kind == MOE_KIND_REGRESSION)
      printf("%.6f\n", (double)row[0]);
    else
      printf("%s\t%.6f\n", task->label[best[i]], (double)row[best[i]]);
    free(line[i]);
  }
  return n == BATCH;
}

int main(int argc, char **argv) {
  moe_env env;
  moe_model *model;
  moe_predictor *predictor;
  moe_pool *pool = NULL;
  layout at;
  answers kept = {0, 0, NULL, NULL, NULL, NULL, NULL};
  moe_profile profile;
  char table[2048];
  int score = 0, threads = 1, bf16 = 0, profiled = 0, i;
  int32_t task;
  moe_isa isa = MOE_ISA_AUTO;
  const char *isa_name = "auto";
  if (argc < 3)
    die("usage: predict MODEL TASK [--score] [--threads N] [--isa auto|avx512|avx2|neon|scalar]\n"
        "               [--precision fp32|bf16] [--profile] < tsv");
  for (i = 3; i < argc; ++i) {
    if (!strcmp(argv[i], "--score"))
      score = 1;
    else if (!strcmp(argv[i], "--profile"))
      profiled = 1;
    else if (!strcmp(argv[i], "--threads") && i + 1 < argc)
      threads = (int)number("--threads", argv[++i], 1, 256);
    else if (!strcmp(argv[i], "--isa") && i + 1 < argc)
      isa = moe_isa_from_name(isa_name = argv[++i]);
    else if (!strcmp(argv[i], "--precision") && i + 1 < argc) {
      bf16 = !strcmp(argv[++i], "bf16");
      if (!bf16 && strcmp(argv[i], "fp32")) die("--precision is fp32 or bf16, not \"%s\"", argv[i]);
    } else
      die("unknown option %s, or a value is missing", argv[i]);
  }
  if (isa == MOE_ISA_COUNT || moe_env_init(&env, isa))
    die("this machine has no instruction set \"%s\"", isa_name);
  env.log = show;
  if (bf16) moe_env_set_precision(&env, MOE_TYPE_BF16); /* or a sentence, and fp32 */
  (void)moe_env_use_amx(&env);                          /* a model of 8 bits is quicker with it */
  moe_profile_init(&profile, NULL, NULL);
  if (profiled) env.profile = &profile;
  if (threads > 1 && moe_pool_create(&pool, threads, &env)) return 1;
  if (moe_model_load(&model, argv[1], &env)) return 1;
  task = moe_model_find_task(model, argv[2]);
  if (task < 0) {
    fprintf(stderr, "predict: %s has no task \"%s\", but", argv[1], argv[2]);
    for (i = 0; i < moe_model_tasks(model); ++i)
      fprintf(stderr, " %s", moe_model_task(model, i)->name);
    fprintf(stderr, "\n");
    return 1;
  }
  if (moe_predictor_create(&predictor, model, BATCH, &env)) return 1;
  at = find_columns(moe_model_task(model, task), score);
  while (do_batch(predictor, model, task, &at, &kept)) continue;
  if (ferror(stdin)) die("standard input cannot be read");
  line_number = 0;
  if (score && !kept.n) die("the input holds no rows");
  if (score) print_metrics(&kept, moe_model_task(model, task));
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  moe_profile_write(table, sizeof table, &profile);
  if (profiled) fputs(table, stderr);
  answers_free(&kept);
  moe_predictor_free(predictor);
  moe_model_free(model);
  moe_pool_free(pool);
  return 0;
}
