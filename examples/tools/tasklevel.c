/* tasklevel.c - whole transformer blocks as experts, chosen by the task: the systems of "Task-level
   Mixture-of-Experts" [TL], side by side

     cc -O3 -o tasklevel examples/tools/tasklevel.c -lm -pthread
     ./tasklevel                  the bundled tasks, seven systems, one table
     ./tasklevel --help           the options

   Data as for train.c, single texts or pairs, classification or regression. The systems: multi, one
   block a layer for all tasks; random1 and random2, every task takes one or two blocks of each
   layer, drawn once; average, the mean of all blocks; softmax, gumbel and straight learn their
   routes. The routers beside the MLP of moe.h are in routers.h. */
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include <math.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#define MOE_IMPLEMENTATION
#include "../../moe.h"
#include "routers.h"

enum { MOST_TASKS = 64, FIELDS = 32, SYSTEMS = 7, MOST_LIST = 16 };
enum { MULTI, RANDOM1, RANDOM2, AVERAGE, SOFTMAX }; /* from SOFTMAX on the routes are learned */
static const char *const system_name[SYSTEMS] = {"multi",   "random1", "random2", "average",
                                                 "softmax", "gumbel",  "straight"};

/* ---- options ---- */

static const char help[] =
    "usage: tasklevel [options]\n\n"
    "data\n"
    "  --data DIR                folder with tasks.tsv and TASK/train.tsv, TASK/dev.tsv   "
    "(examples/data)\n"
    "  --tasks A,B,C             these tasks                                              (all of "
    "tasks.tsv)\n"
    "  --rows N                  training rows of a task, the first ones                  (all)\n"
    "  --max-len N               longest input in tokens                                  (64, "
    "with --init 128)\n\n"
    "model\n"
    "  --init FILE.safetensors   start from a published BERT-like encoder; config.json beside it "
    "is read\n"
    "  --vocab FILE              its WordPiece vocabulary                                 "
    "(vocab.txt of --data)\n"
    "  --heads N  --eps E        where there is no config.json                            (4, "
    "1e-12)\n"
    "  --cased                   do not lower-case the text\n"
    "  --layers N  --hidden N    from scratch                                             (3 64)\n"
    "  --blocks M                blocks of a layer                                        (3)\n"
    "  --systems LIST            of multi,random1,random2,average,softmax,gumbel,straight (all)\n"
    "  --router mlp|lstm|transformer   from the vector of a task to scores of the blocks  (mlp)\n"
    "  --vectors random|text|description|fisher   the vectors of the tasks: random; the mean of "
    "the encoder's output over training\n"
    "                            sentences, or over the column description of tasks.tsv; from "
    "Fisher information (random)\n"
    "  --freeze                  the vectors do not learn\n\n"
    "training\n"
    "  --epochs N | --steps N    length of a stage                                        (4 "
    "epochs)\n"
    "  --batch N  --homogeneous  sequences of a step; all of one task                     (16, of "
    "any tasks)\n"
    "  --lr R  --router-rate F   learning rate; how much faster router and vectors learn  (1e-3, "
    "with --init 5e-5; 10)\n"
    "  --warmup F  --decay D  --clip C  --dropout P                                       (0.1 "
    "0.01 1 0.1)\n"
    "  --two-stage               then the experts anew from their first weights, under routes that "
    "go from the average to the learned ones;\n"
    "                            both stages get a line\n"
    "  --grid RATES              each system with batches of any tasks and of one task, and with "
    "each of these router rates, 1,10 say\n"
    "  --seeds 1,2,3             a run for each; the table then shows mean and deviation  (1)\n\n"
    "a task never seen\n"
    "  --unseen TASK             left out of the training; then it joins the trained model of each "
    "line\n"
    "  --shots LIST              on so many of its training rows; 0: none at all          "
    "(0,16,64)\n"
    "  --learns vector|all       what its rows teach: its vector and head, or everything  "
    "(vector)\n"
    "  --adapt-steps N  --adapt-lr R   how long, how fast                                 (100; "
    "1e-2, for all the rate of --lr)\n"
    "  --vector-from random|mean|text|TASK   its vector at first                          (text "
    "where --vectors is, else mean)\n"
    "  --head-from TASK          its head at first; with 0 rows by itself a task with the same "
    "labels, where there is one\n\n"
    "machine\n"
    "  --threads N  --isa auto|avx512|avx2|neon|scalar                                    (all "
    "processors, auto)\n"
    "  --precision fp32|bf16     bf16 where this machine has it, as train.c               "
    "(fp32)\n\n"
    "files\n"
    "  --save FILE               the trained model with its routes; with several lines FILE gets "
    "their names\n"
    "  --checkpoint FILE  --every STEPS   state to go on from                             (every "
    "500 steps)\n"
    "  --resume FILE             go on from there, bit for bit; give the same options again\n"
    "  --json FILE               all results, written after each line\n"
    "  --csv FILE  --looks N     the routes N times during training, for routes --history (5)\n";

static struct {
  const char *data, *tasks, *systems, *router, *vectors, *init, *vocab, *json, *csv, *save,
      *checkpoint, *resume, *isa, *seeds, *grid;
  const char *precision, *unseen, *shots, *learns, *vector_from, *head_from;
  double lr, router_rate, adapt_lr, eps, warmup, decay, clip, dropout;
  int blocks, epochs, steps, batch, homogeneous, two_stage, freeze, heads, layers, hidden, max_len,
      threads, rows, cased, looks, every, adapt_steps;
} opt; /* zero, but for: */

static void default_options(void) {
  opt.data = "examples/data";
  opt.systems = "multi,random1,random2,average,softmax,gumbel,straight";
  opt.router = "mlp";
  opt.vectors = "random";
  opt.isa = "auto";
  opt.precision = "fp32";
  opt.seeds = "1";
  opt.shots = "0,16,64";
  opt.learns = "vector";
  opt.router_rate = 10;
  opt.warmup = opt.dropout = 0.1;
  opt.decay = 0.01;
  opt.clip = 1;
  opt.blocks = opt.layers = 3;
  opt.hidden = 64;
  opt.epochs = 4;
  opt.batch = 16;
  opt.looks = 5;
  opt.every = 500;
  opt.adapt_steps = 100;
}

static moe_env env;
static volatile sig_atomic_t interrupted;

static void interrupt(int signal_number) {
  (void)signal_number;
  interrupted = 1;
}

static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "tasklevel: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
}

static const char *about; /* the file that bytes in memory came from */

static void show(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "tasklevel: %s%s%s\n", about ? about : "", about ? ": " : "", sentence);
}

/* The library has said why. */
static void need(moe_status status) {
  if (status) exit(1);
}

static void *take(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size);
  if (!p) die("out of memory (%zu bytes)", count * size);
  return p;
}

static double number(const char *what, const char *text, double low) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || (*end && *end != ',') || !(v >= low && v <= 1e9))
    die("%s: \"%s\" is no number from %g", what, text, low);
  return v;
}

/* The numbers of a list "1,2,3". */
static int number_list(double *out, const char *what, const char *text, double low) {
  int n = 0;
  for (;; ++text) {
    if (n == MOST_LIST) die("%s: more than %d numbers", what, MOST_LIST);
    out[n++] = number(what, text, low);
    text = strchr(text, ',');
    if (!text) return n;
  }
}

/* A list "A,B" has the name. */
static int listed(const char *list, const char *name) {
  size_t length = strlen(name);
  for (; list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
    if (!strncmp(list, name, length) && (!list[length] || list[length] == ',')) return 1;
  return 0;
}

static int one_of(const char *list, const char *name) {
  return !strchr(name, ',') && listed(list, name);
}

static void check_options(void) {
  const char *s;
  if (!one_of("mlp,lstm,transformer", opt.router))
    die("--router is mlp, lstm or transformer, not \"%s\"", opt.router);
  if (!one_of("random,text,description,fisher", opt.vectors))
    die("--vectors is random, text, description or fisher, not \"%s\"", opt.vectors);
  if (!one_of("fp32,bf16", opt.precision))
    die("--precision is fp32 or bf16, not \"%s\"", opt.precision);
  if (!one_of("vector,all", opt.learns)) die("--learns is vector or all, not \"%s\"", opt.learns);
  if (!opt.vector_from) opt.vector_from = one_of("text,description", opt.vectors) ? "text" : "mean";
  if (opt.unseen && !strcmp(opt.vector_from, "text") && !one_of("text,description", opt.vectors))
    die("--vector-from text goes with --vectors text or description, which the other tasks have "
        "then, too");
  if (opt.unseen && listed(opt.tasks, opt.unseen))
    die("--unseen %s stands in --tasks too", opt.unseen);
  if (opt.lr <= 0) opt.lr = opt.init ? 5e-5 : 1e-3;
  if (opt.adapt_lr <= 0) opt.adapt_lr = strcmp(opt.learns, "all") ? 1e-2 : opt.lr;
  if (!opt.max_len) opt.max_len = opt.init ? 128 : 64;
  if ((double)opt.batch * opt.max_len > 2147483647.0)
    die("--batch %d of --max-len %d: too many tokens at once", opt.batch, opt.max_len);
  if (opt.init && !opt.vocab)
    die("--init needs --vocab, the vocabulary that the encoder was trained with");
  if (opt.looks < 2)
    die("--looks: %d, the routes are looked at before and after, so 2 or more times", opt.looks);
  if (listed(opt.systems, "random2") && opt.blocks < 2)
    die("random2 takes two blocks, --blocks is %d", opt.blocks);
  for (s = opt.systems; s; s = strchr(s, ',') ? strchr(s, ',') + 1 : NULL) {
    int i;
    size_t n = strcspn(s, ",");
    for (i = 0; i < SYSTEMS && (strlen(system_name[i]) != n || strncmp(s, system_name[i], n)); ++i)
      continue;
    if (i == SYSTEMS)
      die("--systems: \"%.*s\" is none of multi random1 random2 average softmax gumbel straight",
          (int)n, s);
  }
}

static void parse(int argc, char **argv) {
  const struct {
    const char *name, **text;
    int *whole, low;
    double *real;
  } options[] = {{"--data", &opt.data, NULL, 0, NULL},
                 {"--tasks", &opt.tasks, NULL, 0, NULL},
                 {"--systems", &opt.systems, NULL, 0, NULL},
                 {"--router", &opt.router, NULL, 0, NULL},
                 {"--vectors", &opt.vectors, NULL, 0, NULL},
                 {"--init", &opt.init, NULL, 0, NULL},
                 {"--vocab", &opt.vocab, NULL, 0, NULL},
                 {"--json", &opt.json, NULL, 0, NULL},
                 {"--csv", &opt.csv, NULL, 0, NULL},
                 {"--save", &opt.save, NULL, 0, NULL},
                 {"--checkpoint", &opt.checkpoint, NULL, 0, NULL},
                 {"--resume", &opt.resume, NULL, 0, NULL},
                 {"--isa", &opt.isa, NULL, 0, NULL},
                 {"--precision", &opt.precision, NULL, 0, NULL},
                 {"--seeds", &opt.seeds, NULL, 0, NULL},
                 {"--seed", &opt.seeds, NULL, 0, NULL},
                 {"--grid", &opt.grid, NULL, 0, NULL},
                 {"--unseen", &opt.unseen, NULL, 0, NULL},
                 {"--shots", &opt.shots, NULL, 0, NULL},
                 {"--learns", &opt.learns, NULL, 0, NULL},
                 {"--head-from", &opt.head_from, NULL, 0, NULL},
                 {"--vector-from", &opt.vector_from, NULL, 0, NULL},
                 {"--blocks", NULL, &opt.blocks, 1, NULL},
                 {"--epochs", NULL, &opt.epochs, 1, NULL},
                 {"--steps", NULL, &opt.steps, 1, NULL},
                 {"--batch", NULL, &opt.batch, 1, NULL},
                 {"--heads", NULL, &opt.heads, 1, NULL},
                 {"--layers", NULL, &opt.layers, 1, NULL},
                 {"--hidden", NULL, &opt.hidden, 1, NULL},
                 {"--max-len", NULL, &opt.max_len, 3, NULL},
                 {"--threads", NULL, &opt.threads, 1, NULL},
                 {"--rows", NULL, &opt.rows, 1, NULL},
                 {"--looks", NULL, &opt.looks, 1, NULL},
                 {"--every", NULL, &opt.every, 1, NULL},
                 {"--adapt-steps", NULL, &opt.adapt_steps, 1, NULL},
                 {"--lr", NULL, NULL, 0, &opt.lr},
                 {"--router-rate", NULL, NULL, 0, &opt.router_rate},
                 {"--adapt-lr", NULL, NULL, 0, &opt.adapt_lr},
                 {"--eps", NULL, NULL, 0, &opt.eps},
                 {"--warmup", NULL, NULL, 0, &opt.warmup},
                 {"--decay", NULL, NULL, 0, &opt.decay},
                 {"--clip", NULL, NULL, 0, &opt.clip},
                 {"--dropout", NULL, NULL, 0, &opt.dropout},
                 {"--homogeneous", NULL, &opt.homogeneous, -1, NULL},
                 {"--two-stage", NULL, &opt.two_stage, -1, NULL},
                 {"--freeze", NULL, &opt.freeze, -1, NULL},
                 {"--cased", NULL, &opt.cased, -1, NULL}};
  size_t n = sizeof options / sizeof *options, k;
  int i;
  for (i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
      fputs(help, stdout);
      exit(0);
    }
    for (k = 0; k < n && strcmp(argv[i], options[k].name); ++k) continue;
    if (k == n) die("unknown option %s; --help lists them", argv[i]);
    if (options[k].low < 0) {
      *options[k].whole = 1;
      continue;
    }
    if (++i == argc) die("%s needs a value", argv[i - 1]);
    if (options[k].text)
      *options[k].text = argv[i];
    else {
      double v = number(argv[i - 1], argv[i], options[k].low);
      if (strchr(argv[i], ',')) die("%s takes one number", argv[i - 1]);
      if (options[k].whole && v != floor(v))
        die("%s: \"%s\" is no whole number", argv[i - 1], argv[i]);
      if (options[k].whole)
        *options[k].whole = (int)v;
      else
        *options[k].real = v;
    }
  }
  check_options();
}

/* ---- data ---- */

typedef struct rows {
  int32_t n;
  int32_t *start, *ids; /* row i has the tokens start[i] .. start[i+1] - 1 */
  uint8_t *segments;
  float *label;
} rows;

/* The unseen task stands behind the others, at place T. */
static moe_task task[MOST_TASKS + 1];
static char labels[MOST_TASKS + 1][4096]; /* as tasks.tsv has them */
static rows train[MOST_TASKS + 1], dev[MOST_TASKS + 1], dev2[MOST_TASKS + 1],
    about_task[MOST_TASKS + 1];
static int64_t train_rows[MOST_TASKS];
static int T;
static moe_config base; /* sizes */
static void *init_file;
static char *vocab;
static size_t init_bytes, vocab_bytes;
static moe_tokenizer *tokenizer;

/* A whole file as text, which is cut up and goes with *data. */
static char *read_text(void **data, size_t *bytes, const char *path) {
  const char *zero, *at;
  int line = 1;
  need(moe_file_read(data, bytes, path, &env));
  at = (const char *)*data;
  zero = (const char *)memchr(at, 0, *bytes);
  for (; zero && at < zero; ++at) line += *at == '\n';
  if (zero) die("%s, line %d: a zero byte", path, line);
  return (char *)*data + (strncmp((char *)*data, "\xef\xbb\xbf", 3)
                              ? 0
                              : 3); /* the mark that some editors put before UTF-8 */
}

/* The next line of a text that is cut up; its fields, the first FIELDS of them. Returns their
   number, 0 at the end. */
static int next_row(char **at, char *field[FIELDS]) {
  char *line = *at, *end;
  int n = 0;
  if (!*line) return 0;
  end = line + strcspn(line, "\n");
  *at = *end ? end + 1 : end;
  *end = 0;
  if (end > line && end[-1] == '\r') end[-1] = 0;
  for (;; ++n) {
    if (n < FIELDS) field[n] = line;
    line = strchr(line, '\t');
    if (!line) return n + 1;
    *line++ = 0;
  }
}

static int column(char **name, int n, const char *wanted) {
  int i;
  for (i = 0; i < n && strcmp(name[i], wanted); ++i) continue;
  return i < n ? i : -1;
}

static int32_t longest(const moe_task *t) {
  return t->max_len && t->max_len < opt.max_len ? t->max_len : opt.max_len;
}

static void make_room(rows *r, size_t lines) {
  r->start = (int32_t *)take(lines + 1, sizeof *r->start);
  r->ids = (int32_t *)take(lines * (size_t)opt.max_len, sizeof *r->ids);
  r->segments = (uint8_t *)take(lines * (size_t)opt.max_len, 1);
  r->label = (float *)take(lines, sizeof *r->label);
}

static void add_row(rows *r, const moe_task *t, const char *a, const char *b) {
  moe_text text = moe_text_of(a, b);
  moe_tokens out;
  out.ids = r->ids + r->start[r->n];
  out.segments = r->segments + r->start[r->n];
  out.begin = out.end = NULL;
  out.capacity = opt.max_len;
  need(moe_encode(tokenizer, &out, &text, longest(t), MOE_TRUNCATE_LONGEST, &env));
  r->start[r->n + 1] = r->start[r->n] + out.count;
  ++r->n;
}

/* Reads and encodes TASK/FILE.tsv, at most `most` rows; a file that need not be there may be
   missing. */
static void read_rows(rows *r, const moe_task *t, const char *file, int most, int may_be_missing) {
  char path[1024], *text, *at, *field[FIELDS], *end;
  void *data;
  size_t bytes, lines = 1, i;
  int n, columns, label, a, b, line = 1;
  FILE *f;
  snprintf(path, sizeof path, "%s/%s/%s.tsv", opt.data, t->name, file);
  if (may_be_missing) {
    f = fopen(path, "rb");
    if (!f) return;
    fclose(f);
  }
  text = at = read_text(&data, &bytes, path);
  for (i = 0; text[i]; ++i) lines += text[i] == '\n';
  make_room(r, most && (size_t)most < lines ? (size_t)most : lines);
  columns = next_row(&at, field);
  if (columns > FIELDS) die("%s: %d columns, %d are the most", path, columns, FIELDS);
  label = column(field, columns, "label"), a = column(field, columns, "sentence1"),
  b = column(field, columns, "sentence2");
  if (label < 0 || a < 0 || (t->pair && b < 0))
    die("%s: the first line must name label, sentence1 and, of a pair, sentence2", path);
  while ((!most || r->n < most) && (n = next_row(&at, field)) > 0) {
    double v;
    ++line;
    if (n != columns)
      die("%s, line %d: %d column%s, expected %d", path, line, n, n == 1 ? "" : "s", columns);
    v = strtod(field[label], &end);
    if (end == field[label] || *end)
      die("%s, line %d: label \"%s\" is no number", path, line, field[label]);
    if (t->kind == MOE_KIND_CLASSIFICATION ? !(v >= 0 && v < t->classes && v == floor(v))
                                           : !(v >= (double)t->low && v <= (double)t->high))
      die("%s, line %d: label %s is outside of the labels %s", path, line, field[label],
          labels[t - task]);
    r->label[r->n] = (float)v;
    about = path;
    add_row(r, t, field[a], t->pair ? field[b] : NULL);
    about = NULL;
  }
  if (!r->n) die("%s has no rows", path);
  moe_free(data);
}

/* Kind, classes and their names from the column labels, "0=no,1=yes" or "0..5". */
static void read_labels(moe_task *t, const char *kind, const char *text) {
  char *s, *at, *end, first[16]; /* "0=" */
  const char **name;
  snprintf(labels[t - task], sizeof *labels, "%s", text);
  t->classes = 1;
  if (!strcmp(kind, "regression")) {
    const char *dots = strstr(text, "..");
    if (!dots) die("task %s: the range \"%s\" is not A..B", t->name, text);
    s = strcpy((char *)take(strlen(text) + 1, 1), text);
    s[dots - text] = 0; /* "0." of "0..5" would be a number too */
    t->kind = MOE_KIND_REGRESSION;
    t->low = (float)strtod(s, &end);
    if (end == s || *end) die("task %s: the range \"%s\" begins with no number", t->name, text);
    t->high = (float)strtod(dots + 2, &end);
    if (end == dots + 2 || *end)
      die("task %s: the range \"%s\" ends with no number", t->name, text);
    if (!(t->low < t->high)) die("task %s: the range \"%s\" holds nothing", t->name, text);
    free(s);
    return;
  }
  s = strcpy((char *)take(strlen(text) + 1, 1), text);
  for (at = s; (at = strchr(at, ',')) != NULL; ++at) ++t->classes;
  name = (const char **)take((size_t)t->classes, sizeof *name);
  t->classes = 0;
  for (at = strtok(s, ","); at; at = strtok(NULL, ",")) {
    int bytes = snprintf(first, sizeof first, "%d=", (int)t->classes);
    if (strncmp(at, first, (size_t)bytes))
      die("task %s: label %d should read %sNAME, not \"%s\"", t->name, (int)t->classes, first, at);
    name[t->classes++] = at + bytes;
  }
  if (t->classes < 2)
    die("task %s: it needs at least two labels, \"%s\" names %d", t->name, text, (int)t->classes);
  t->label = name;
}

static void read_task(moe_task *t, char **field, const int *at) {
  if (strlen(field[at[0]]) >= sizeof t->name || strlen(field[at[4]]) >= sizeof t->metrics)
    die("tasks.tsv: task %s: its name and the list of its metrics have at most %d bytes",
        field[at[0]], MOE_NAME_BYTES - 1);
  snprintf(t->name, sizeof t->name, "%s", field[at[0]]);
  t->pair = !strcmp(field[at[1]], "pair");
  if (!t->pair && strcmp(field[at[1]], "single"))
    die("task %s: input \"%s\" is neither single nor pair", t->name, field[at[1]]);
  read_labels(t, field[at[2]], field[at[3]]);
  snprintf(t->metrics, sizeof t->metrics, "%s", field[at[4]]);
  if (at[5] >= 0 && *field[at[5]])
    t->max_len = (int32_t)number("max_len in tasks.tsv", field[at[5]], 0);
  if (strcmp(opt.vectors, "description")) return;
  if (at[6] < 0 || !*field[at[6]])
    die("--vectors description: task %s has none, tasks.tsv should have a column description",
        t->name);
  make_room(&about_task[t - task], 1);
  add_row(&about_task[t - task], t, field[at[6]], NULL);
}

static void read_tasks(void) {
  static const char *const wanted[7] = {"name",   "input",   "kind",       "labels",
                                        "metric", "max_len", "description"};
  char path[1024], *at, *name[FIELDS], *field[FIELDS];
  void *data;
  size_t bytes;
  moe_task unseen;
  rows text;
  char unseen_labels[sizeof *labels];
  int columns, where[7], i, t, found = 0;
  snprintf(path, sizeof path, "%s/tasks.tsv", opt.data);
  at = read_text(&data, &bytes, path);
  columns = next_row(&at, name);
  if (columns > FIELDS) die("%s: %d columns, %d are the most", path, columns, FIELDS);
  for (i = 0; i < 7; ++i) where[i] = column(name, columns, wanted[i]);
  for (i = 0; i < 5; ++i)
    if (where[i] < 0) die("%s: the column %s is missing", path, wanted[i]);
  while ((i = next_row(&at, field)) > 0) {
    int is_unseen;
    if (i == 1 && !*field[0]) continue;
    if (i != columns) die("%s: a line has %d columns, the first one %d", path, i, columns);
    is_unseen = opt.unseen && !strcmp(field[where[0]], opt.unseen);
    if (!is_unseen && opt.tasks && !listed(opt.tasks, field[where[0]])) continue;
    if (strcmp(field[where[2]], "classification") && strcmp(field[where[2]], "regression")) {
      fprintf(stderr, "tasklevel: task %s is of kind %s, which train.c knows; left out\n",
              field[where[0]], field[where[2]]);
      continue;
    }
    if (T == MOST_TASKS) die("more than %d tasks", MOST_TASKS);
    memset(&task[T], 0, sizeof task[T]);
    read_task(&task[T], field, where);
    if (is_unseen) {
      found = 1;
      unseen = task[T], text = about_task[T];
      memcpy(unseen_labels, labels[T], sizeof unseen_labels);
    } else
      ++T;
  }
  if (opt.unseen && !found)
    die("--unseen: %s has no task %s that could be trained here", path, opt.unseen);
  if (found) {
    task[T] = unseen, about_task[T] = text;
    memcpy(labels[T], unseen_labels, sizeof unseen_labels);
  }
  if (!T) die("no task to train");
  for (t = 0; t < T + found; ++t) {
    read_rows(&train[t], &task[t], "train", t < T ? opt.rows : 0, 0);
    read_rows(&dev[t], &task[t], "dev", 0, 0);
    read_rows(&dev2[t], &task[t], "dev_2", 0, 1);
    if (t < T) train_rows[t] = train[t].n;
  }
  moe_free(data);
}

/* A file beside --init, or NULL. */
static char *beside(const char *name, size_t *bytes) {
  char path[1024];
  const char *slash = strrchr(opt.init, '/');
  void *data;
  FILE *f;
  snprintf(path, sizeof path, "%.*s%s", slash ? (int)(slash - opt.init) + 1 : 0, opt.init, name);
  f = fopen(path, "rb");
  if (!f) return NULL;
  fclose(f);
  need(moe_file_read(&data, bytes, path, &env));
  return (char *)data;
}

static void read_init(void) {
  size_t bytes;
  char *json = beside("config.json", &bytes), *lower;
  need(moe_file_read(&init_file, &init_bytes, opt.init, &env));
  about = opt.init;
  if (json)
    need(moe_import_config_json(&base, json, bytes,
                                &env)); /* first: it knows best what kind of encoder that is */
  need(moe_import_sizes(&base, init_file, init_bytes, &env));
  if (!json && !opt.heads)
    die("there is no config.json beside %s: give --heads (and --eps, 1e-12 in BERT)", opt.init);
  about = NULL;
  moe_free(json);
  json = beside("tokenizer_config.json", &bytes);
  lower = json ? strstr(json, "\"do_lower_case\"") : NULL;
  if (lower) base.cased = !strncmp(lower + 15 + strspn(lower + 15, " :\n\t"), "false", 5);
  moe_free(json);
}

static void make_config(void) {
  char path[1024];
  void *data, *block;
  size_t bytes;
  moe_config_init(&base);
  if (opt.init)
    read_init();
  else {
    base.layers = opt.layers;
    base.hidden = opt.hidden;
    base.ffn = opt.hidden > 65536 ? opt.hidden : 4 * opt.hidden; /* that is too large anyway */
    base.heads = 4;
    base.positions = opt.max_len;
  }
  if (opt.heads) base.heads = opt.heads;
  if (opt.eps > 0) base.eps = (float)opt.eps;
  if (opt.cased) base.cased = 1;
  if (opt.max_len > base.positions)
    die("--max-len %d is more than the %d positions of the encoder", opt.max_len,
        (int)base.positions);
  base.max_len = opt.max_len;
  snprintf(path, sizeof path, "%s/vocab.txt", opt.data);
  if (opt.vocab) snprintf(path, sizeof path, "%s", opt.vocab);
  need(moe_file_read(&data, &vocab_bytes, path, &env));
  vocab = (char *)data;
  about = path;
  need(moe_tokenizer_size(vocab, vocab_bytes, &bytes, &env));
  block = take(bytes + 64, 1);
  need(moe_tokenizer_init(&tokenizer, (char *)block + (64 - (uintptr_t)block % 64), bytes, vocab,
                          vocab_bytes, base.cased, &env));
  about = NULL;
  if (!opt.init)
    base.vocab = moe_tokenizer_words(tokenizer);
  else if (moe_tokenizer_words(tokenizer) > base.vocab)
    die("%s has %d words, but %s has room for %d", path, (int)moe_tokenizer_words(tokenizer),
        opt.init, (int)base.vocab);
  need(moe_config_check(&base, &env));
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

static void pack_free(pack *p) {
  free(p->start), free(p->ids), free(p->task), free(p->segments), free(p->label);
}

static void pack_add(pack *p, int t, const rows *r, int64_t row) {
  int32_t S = p->b.S++, at = p->start[S], length = r->start[row + 1] - r->start[row];
  memcpy(p->ids + at, r->ids + r->start[row], (size_t)length * sizeof *p->ids);
  memcpy(p->segments + at, r->segments + r->start[row], (size_t)length);
  p->start[S + 1] = at + length;
  p->task[S] = t;
  p->label[S] = r->label[row];
}

/* The task's first metric on one of its dev sets. */
static double evaluate_rows(moe_context *context, int t, const rows *r, int32_t width, pack *p) {
  size_t n = (size_t)r->n;
  float *value = (float *)take(n, sizeof *value), *scratch = (float *)take(2 * n, sizeof *scratch);
  float *scores = (float *)take((size_t)opt.batch * (size_t)width, sizeof *scores);
  int32_t *best = (int32_t *)take(n, sizeof *best), *label = (int32_t *)take(n, sizeof *label),
          row = 0, s, c;
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
  if (!strncmp(task[t].metrics, "spearman", 8))
    metric = moe_metric_spearman(value, r->label, n, scratch, NULL);
  else if (!strncmp(task[t].metrics, "pearson", 7))
    metric = moe_metric_pearson(value, r->label, n, NULL);
  else if (!strncmp(task[t].metrics, "matthews", 8))
    metric = moe_metric_matthews(best, label, n, task[t].classes, NULL);
  else if (!strncmp(task[t].metrics, "macro_f1", 8))
    metric = moe_metric_macro_f1(best, label, n, task[t].classes, NULL);
  else if (!strncmp(task[t].metrics, "f1", 2))
    metric = moe_metric_f1(best, label, n, NULL);
  else
    metric = moe_metric_accuracy(best, label, n, NULL);
  free(value), free(scratch), free(scores), free(best), free(label);
  return metric;
}

/* With a second dev set the mean of both. */
static double evaluate(moe_context *context, int t, int32_t width, pack *p) {
  double first = evaluate_rows(context, t, &dev[t], width, p);
  return dev2[t].n ? (first + evaluate_rows(context, t, &dev2[t], width, p)) / 2 : first;
}

/* ---- what is run ---- */

/* A line of the table, for one seed. */
typedef struct run {
  int system, homogeneous, seed, stages;
  double rate;    /* of the router */
  double seconds; /* of processor */
  double metric[MOST_TASKS], unseen[MOST_LIST];
  int n_looks;
  int64_t step[1000]; /* when the routes were looked at, in the first stage */
  double tau[1000];
  float *routes; /* (n_looks, T, L, m) */
} run;

static run *runs; /* what is done */
static int n_runs;
static run now; /* what is being done */
static double shots[MOST_LIST];
static int n_shots;

static size_t choices(void) { return (size_t)T * (size_t)base.layers * (size_t)opt.blocks; }

static void keep_run(void) {
  runs = (run *)realloc(runs, ((size_t)n_runs + 1) * sizeof *runs);
  if (!runs) die("out of memory");
  runs[n_runs++] = now;
}

static double mean_metric(const run *r) {
  double sum = 0;
  int t;
  for (t = 0; t < T; ++t) sum += r->metric[t] / T;
  return sum;
}

/* ---- models ---- */

static float *tensor_of(moe_model *model, const char *name, moe_tensor *out) {
  moe_tensor local;
  if (!out) out = &local;
  need(moe_model_tensor(model, moe_model_find_tensor(model, name), out));
  return moe_model_weights(model) + out->offset;
}

/* Routes that are drawn once: `count` of the blocks for each of n tasks and layer, of equal weight.
 */
static void draw_routes(float *routes, int n, int count, int seed) {
  int t, l, i, taken;
  for (t = 0; t < n; ++t)
    for (l = 0; l < base.layers; ++l, routes += opt.blocks)
      for (i = taken = 0; i < opt.blocks;
           ++i) { /* each with the chance that makes all choices alike */
        int left = opt.blocks - i,
            chosen =
                moe_key((uint64_t)seed, 0, (uint64_t)t, (uint32_t)l, (uint32_t)i) % (uint64_t)left <
                (uint64_t)(count - taken);
        taken += chosen;
        routes[i] = chosen ? 1.0f / (float)count : 0.0f;
      }
}

static int is_learned(int system) { return system >= SOFTMAX; }
static int is_outside(int system) { return is_learned(system) && strcmp(opt.router, "mlp") != 0; }
static int has_vectors(void) { return strcmp(opt.vectors, "random") != 0; }

static moe_model *make_model(int system, int seed) {
  moe_config c = base;
  moe_model *model;
  moe_import_options noise = {1e-8f, 1};
  int32_t i;
  c.unit = MOE_UNIT_BLOCK;
  c.router = is_learned(system) ? MOE_ROUTER_TASK_LEVEL : MOE_ROUTER_DENSE;
  c.selection = (moe_selection)(is_learned(system) ? system - SOFTMAX : 0);
  c.experts = system == MULTI ? 1 : opt.blocks;
  if (has_vectors()) c.task_dim = c.hidden;
  need(moe_model_create(&model, &c, task, T, (uint64_t)seed, &env));
  need(moe_model_set_vocab(model, vocab, vocab_bytes, &env));
  about = opt.init;
  if (init_file) need(moe_model_import(model, init_file, init_bytes, &noise, &env));
  about = NULL;
  for (i = 0; i < moe_model_tensors(model) && !init_file;
       ++i) { /* from scratch too, the blocks of a layer start as copies of one [TL] 2 */
    moe_tensor t;
    char name[128], *at;
    need(moe_model_tensor(model, i, &t));
    at = strstr(strcpy(name, t.name), ".blocks.");
    if (!at || at[8] == '0') continue;
    at[8] = '0';
    memmove(at + 9, strchr(at + 9, '.'), strlen(strchr(at + 9, '.')) + 1);
    memcpy(moe_model_weights(model) + t.offset, tensor_of(model, name, NULL),
           t.count * sizeof(float));
  }
  return model;
}

static task_router *make_router(const moe_model *model, int n, int seed) {
  task_router *r =
      router_create(strcmp(opt.router, "lstm") ? ROUTER_TRANSFORMER : ROUTER_LSTM, n, base.layers,
                    opt.blocks, moe_model_config(model)->task_dim, (uint64_t)seed, &env);
  if (!r) die("out of memory");
  return r;
}

/* Every column gets mean 0 and deviation 1 over the tasks that are trained: what they have in
   common does not tell them apart. */
static void standardize(float *v, int n, int32_t width) {
  int t;
  int32_t i;
  for (i = 0; i < width; ++i) {
    double sum = 0, square = 0, deviation;
    for (t = 0; t < T; ++t) sum += (double)v[t * width + i];
    for (t = 0; t < T; ++t)
      square += ((double)v[t * width + i] - sum / T) * ((double)v[t * width + i] - sum / T);
    deviation = sqrt(square / T) + 1e-6;
    for (t = 0; t < n; ++t)
      v[t * width + i] = (float)(((double)v[t * width + i] - sum / T) / deviation);
  }
}

/* Vectors (T, H) from outside, and behind them the unseen task's: text is the mean of the encoder's
   output, before any training, over sentences of the task or over its description; fisher the
   logarithm of the mean squared gradients (the diagonal of the empirical Fisher information) of the
   bias behind the last layer's feed-forward network; the unseen task, which has no head to ask,
   gets the mean. */
static float *make_vectors(moe_model *model, moe_trainer *trainer, pack *p) {
  int32_t H = base.hidden, i, k, n, s;
  int t, fisher = !strcmp(opt.vectors, "fisher"), all = T + (opt.unseen && !fisher);
  float *scores =
      (float *)take((size_t)opt.batch * (size_t)moe_model_max_classes(model), sizeof *scores);
  float *vectors = (float *)take((size_t)(T + 1) * (size_t)H, sizeof *vectors);
  moe_tensor from;
  char name[96];
  snprintf(name, sizeof name, "encoder.layer.%d.blocks.0.output.dense.bias", (int)base.layers - 1);
  tensor_of(model, name, &from);
  for (t = 0; t < all; ++t) {
    const rows *r = about_task[t].n ? &about_task[t] : &train[t];
    float *v = vectors + t * H;
    n = r->n < 64 ? r->n : 64;
    for (s = 0; s < n; ++s) {
      p->b.S = 0;
      pack_add(p, t < T ? t : 0, r, s); /* the encoder does not know of tasks yet */
      if (fisher) {
        float *g = moe_trainer_gradients(trainer);
        need(moe_trainer_accumulate(trainer, &p->b, 0, NULL, NULL, &env));
        for (i = 0; i < H; ++i)
          v[i] += g[from.offset + (size_t)i] * g[from.offset + (size_t)i] / (float)n;
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
  standardize(vectors, all, H);
  free(scores);
  return vectors;
}

/* ---- training ---- */

/* What a pass of the trainer takes its routes from. */
typedef struct routing {
  const float *target; /* (T, L, m) fixed routes, or NULL */
  float *given;        /* the same on their way there from the average */
  task_router *router; /* one of routers.h, or NULL: the model's own */
  moe_task_router level;
} routing;

static void connect_routing(routing *r, const float *target, task_router *router,
                            moe_context *context) {
  memset(r, 0, sizeof *r);
  r->target = target;
  r->router = router;
  if (target) {
    r->given = (float *)take(choices(), sizeof *r->given);
    memcpy(r->given, target, choices() * sizeof *r->given);
    r->level.routes = r->given;
  } else if (router) {
    r->level.scores = router->scores;
    r->level.dscores = router->dscores;
    router_forward(router, &env);
  } else
    return;
  need(moe_context_task_router(context, &r->level, &env));
}

/* The routes of the router in charge at a temperature, or with tau 0 the largest. */
static void learned_routes(float *routes, const moe_model *model, const task_router *router,
                           float tau) {
  int row, i, m = opt.blocks;
  if (!router) {
    need(moe_task_router_routes(routes, model, tau, &env));
    return;
  }
  for (row = 0; row < T * base.layers; ++row, routes += m) {
    const float *z = router->scores + row * m;
    int best = 0;
    for (i = 1; i < m; ++i)
      if (z[i] > z[best]) best = i;
    for (i = 0; i < m; ++i) routes[i] = tau > 0 ? (z[i] - z[best]) / tau : i == best ? 1.0f : 0.0f;
    if (tau > 0) moe_cross_entropy_forward(routes, routes, 0, m);
  }
}

/* Keeps the routes of this moment, and prints how discrete they are. */
static void look_at_routes(const moe_model *model, const task_router *router, int64_t step,
                           int64_t steps, float tau) {
  int m = opt.blocks, n = T * base.layers, row, i, t, l;
  float *routes;
  double most = 0;
  if (now.n_looks == 1000) return;
  now.routes =
      (float *)realloc(now.routes, ((size_t)now.n_looks + 1) * choices() * sizeof *now.routes);
  if (!now.routes) die("out of memory");
  routes = now.routes + (size_t)now.n_looks * choices();
  learned_routes(routes, model, router, tau);
  now.step[now.n_looks] = step;
  now.tau[now.n_looks++] = (double)tau;
  for (row = 0; row < n; ++row) {
    float largest = 0;
    for (i = 0; i < m; ++i) largest = routes[row * m + i] > largest ? routes[row * m + i] : largest;
    most += (double)largest / n;
  }
  printf("  after %3.0f %% of the steps, temperature %.2f: the largest weight of a block is %.0f "
         "%% in the mean\n",
         100.0 * (double)step / (double)steps, (double)tau, 100 * most);
  for (t = 0; t < T && step == steps; ++t) {
    printf("    %-24s", task[t].name);
    for (l = 0; l < base.layers; ++l) {
      const float *p = routes + (t * base.layers + l) * m;
      int best = 0;
      for (i = 1; i < m; ++i)
        if (p[i] > p[best]) best = i;
      printf("  %c %3.0f", 'A' + best % 26, 100 * (double)p[best]);
    }
    printf("\n");
  }
  fflush(stdout);
}

static void save_state(const moe_trainer *trainer, const moe_sampler *sampler, const routing *r,
                       double seconds);
static void load_state(moe_trainer *trainer, moe_sampler *sampler, routing *r);

static double processor_seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

/* After Ctrl-C, or a plain kill; step -1: while an unseen task joined. */
static void stop_here(int64_t step) {
  fprintf(stderr, "\ntasklevel: interrupted");
  if (step >= 0) fprintf(stderr, " after step %lld", (long long)step);
  fprintf(stderr, "; ");
  if (opt.checkpoint)
    fprintf(stderr, "the state is in %s: the same command with --resume %s goes on\n",
            opt.checkpoint, opt.checkpoint);
  else
    fprintf(stderr, "without --checkpoint this line of the table is lost\n");
  exit(130);
}

static void train_config(moe_train_config *c, moe_param_group groups[2], int seed) {
  int64_t total = 0;
  int t;
  for (t = 0; t < T; ++t) total += train_rows[t];
  moe_train_config_init(c);
  c->lr = (float)opt.lr;
  c->steps = opt.steps ? opt.steps : (total * opt.epochs + opt.batch - 1) / opt.batch;
  c->warmup = (float)opt.warmup;
  c->weight_decay = (float)opt.decay;
  c->clip_norm = (float)opt.clip;
  c->dropout = (float)opt.dropout;
  c->seed = (uint64_t)seed;
  groups[0].match = "router.";
  groups[1].match = "tasks.vectors";
  groups[0].lr_scale = groups[1].lr_scale = (float)now.rate;
  groups[0].decay_scale = groups[1].decay_scale = 1;
  c->groups = groups;
  c->n_groups = 2;
}

/* One step of a batch that is packed. */
static void train_step(moe_trainer *trainer, const moe_train_config *c, routing *r, pack *p,
                       float vector_factor, float router_factor) {
  float rate = moe_train_lr(c, moe_trainer_steps_done(trainer) + 1);
  need(moe_trainer_accumulate(trainer, &p->b, 0, NULL, NULL, &env));
  need(moe_trainer_step(trainer, NULL, &env));
  if (!r->router) return;
  router_backward(r->router, &env);
  if (router_update(r->router, vector_factor * rate, router_factor * rate, c->weight_decay,
                    c->clip_norm, &env))
    die("a gradient of the router is no finite number");
  router_forward(r->router, &env);
}

/* Copies the router and the vectors of the first stage into the model of the second. */
static void copy_router(moe_model *to, moe_model *from) {
  int32_t i;
  for (i = 0; i < moe_model_tensors(to); ++i) {
    moe_tensor t;
    need(moe_model_tensor(to, i, &t));
    if (!strncmp(t.name, "router.", 7) || !strcmp(t.name, "tasks.vectors"))
      memcpy(moe_model_weights(to) + t.offset, tensor_of(from, t.name, NULL),
             t.count * sizeof(float));
  }
}

/* Trains to the end and leaves the metrics in `now`. stage 1: `target` are routes that are drawn,
   or NULL; stage 2: they are the learned ones, and come in from the average over the first half.
   first: the model of stage 1, NULL where the state of stage 2 comes from a checkpoint. The unseen
   task's vector comes back, or NULL where vectors are random. */
static float *train_stage(int stage, moe_model *model, moe_model *first, task_router *router,
                          float *target, int resume) {
  moe_param_group groups[2];
  moe_limits limits;
  moe_train_config c;
  moe_trainer *trainer;
  moe_sampler_config sc;
  moe_sampler sampler;
  int64_t used[MOST_TASKS], step, row;
  pack p = pack_make();
  routing r;
  float *vectors = NULL, freeze = opt.freeze ? 0.0f : 1.0f;
  double begin = processor_seconds() - now.seconds;
  int t, learns = is_learned(now.system) && stage == 1;
  int32_t drawn;
  memset(&limits, 0, sizeof limits);
  limits.tokens = opt.batch * opt.max_len;
  limits.sequences = opt.batch;
  limits.training = 1;
  train_config(&c, groups, now.seed);
  groups[1].lr_scale *= freeze;
  if (stage == 2 || router)
    groups[0].lr_scale = groups[1].lr_scale = 0; /* the model's own router waits */
  memset(&sc, 0, sizeof sc);
  sc.seed = (uint64_t)now.seed;
  if (now.homogeneous) sc.run = opt.batch;
  need(moe_trainer_create(&trainer, model, &limits, &c, &env));
  need(moe_sampler_init(&sampler, &sc, train_rows, used, T, &env));
  if (is_learned(now.system) && has_vectors()) {
    vectors = make_vectors(model, trainer, &p);
    memcpy(tensor_of(model, "tasks.vectors", NULL), vectors,
           (size_t)(T * base.hidden) * sizeof *vectors);
    if (router && stage == 1)
      memcpy(router->w, vectors, (size_t)(T * base.hidden) * sizeof *vectors);
  }
  if (first) copy_router(model, first);
  connect_routing(&r, target, target ? NULL : router, moe_trainer_context(trainer));
  if (stage == 2) r.router = router; /* takes no part, but is saved */
  if (resume) {
    load_state(trainer, &sampler, &r);
    if (target) memcpy(r.given, target, choices() * sizeof *r.given);
    begin = processor_seconds() - now.seconds;
  }
  if (stage == 2) r.router = NULL;
  for (step = moe_trainer_steps_done(trainer); step < c.steps; ++step) {
    float share = 2 * (float)step / (float)c.steps;
    if (stage == 2)
      moe_task_router_blend(r.given, target, share < 1 ? share : 1, choices() / (size_t)opt.blocks,
                            opt.blocks);
    if (learns && step >= now.n_looks * c.steps / (opt.looks - 1))
      look_at_routes(model, router, step, c.steps, moe_train_tau(&c, step));
    for (p.b.S = 0; p.b.S < opt.batch;) {
      moe_sampler_next(&sampler, &drawn, &row);
      pack_add(&p, drawn, &train[drawn], row);
    }
    train_step(trainer, &c, &r, &p, (float)now.rate * freeze, (float)now.rate);
    if (opt.checkpoint && (interrupted || (step + 1) % opt.every == 0 || step + 1 == c.steps)) {
      routing all = r;
      all.router = router;
      save_state(trainer, &sampler, &all, processor_seconds() - begin);
    }
    if (interrupted) stop_here(step + 1);
  }
  if (learns) look_at_routes(model, router, step, c.steps, moe_train_tau(&c, step));
  if (target) memcpy(r.given, target, choices() * sizeof *r.given);
  for (t = 0; t < T; ++t)
    now.metric[t] = evaluate(moe_trainer_context(trainer), t, moe_model_max_classes(model), &p);
  now.seconds = processor_seconds() - begin;
  moe_trainer_free(trainer);
  free(r.given);
  pack_free(&p);
  return vectors;
}

/* ---- a task never seen [TL] 5 ---- */

static int find_task(const char *what, const char *name) {
  int t;
  for (t = 0; t < T && strcmp(task[t].name, name); ++t) continue;
  if (t == T) die("%s: there is no task \"%s\" among those that are trained", what, name);
  return t;
}

/* The task whose head the unseen one takes over; -1: none. */
static int head_donor(int n) {
  int t;
  if (opt.head_from) {
    t = find_task("--head-from", opt.head_from);
    if (task[t].kind != task[T].kind || task[t].classes != task[T].classes)
      die("--head-from: %s has other labels than %s", task[t].name, task[T].name);
    return t;
  }
  for (t = 0; t < T && n == 0; ++t)
    if (task[t].kind == task[T].kind && !strcmp(labels[t], labels[T])) return t;
  return -1;
}

/* A router with one task more; its vector is a copy, a mean, the one from outside, or as it is. */
static task_router *router_with_task(const task_router *from, const moe_model *model, int gate,
                                     const float *vector) {
  task_router *r = make_router(model, T + 1, now.seed);
  float *to = r->w + T * r->V;
  int t, i;
  memcpy(r->w, from->w, (size_t)(T * r->V) * sizeof *r->w);
  memcpy(r->w + (T + 1) * r->V, from->w + T * r->V, (from->n - (size_t)(T * r->V)) * sizeof *r->w);
  if (vector)
    memcpy(to, vector, (size_t)r->V * sizeof *to);
  else if (gate >= 0)
    memcpy(to, from->w + gate * r->V, (size_t)r->V * sizeof *to);
  for (i = 0; i < r->V && !vector && gate == MOE_GATE_MEAN; ++i)
    for (to[i] = 0, t = 0; t < T; ++t) to[i] += from->w[t * r->V + i] / (float)T;
  return r;
}

/* The model with the unseen task in it, its vector and its head as they begin. */
static moe_model *join(moe_model *model, int gate, const float *vector, int donor) {
  static const char *const part[] = {"weight", "bias"};
  int level = moe_model_config(model)->router == MOE_ROUTER_TASK_LEVEL, i;
  moe_model *more;
  need(moe_model_adapt(&more, model, &task[T], level ? gate : MOE_GATE_RANDOM, (uint64_t)now.seed,
                       &env));
  if (level && vector)
    memcpy(tensor_of(more, "tasks.vectors", NULL) + T * base.hidden, vector,
           (size_t)base.hidden * sizeof *vector);
  for (i = 0; i < 2 && donor >= 0; ++i) {
    char from[256], to[256];
    moe_tensor t;
    float *w;
    snprintf(from, sizeof from, "heads.%.63s.%s", task[donor].name, part[i]);
    snprintf(to, sizeof to, "heads.%.63s.%s", task[T].name, part[i]);
    w = tensor_of(more, to, &t);
    memcpy(w, tensor_of(more, from, NULL), t.count * sizeof *w);
  }
  return more;
}

/* `n` of the unseen task's training rows, other ones for each seed. */
static int32_t *pick_rows(int n) {
  int32_t *row = (int32_t *)take((size_t)train[T].n, sizeof *row), i;
  for (i = 0; i < train[T].n; ++i) row[i] = i;
  for (i = 0; i < n; ++i) {
    int32_t j = i + (int32_t)(moe_key((uint64_t)now.seed, 1, (uint64_t)i, 0, 98) %
                              (uint64_t)(train[T].n - i)),
            keep = row[i];
    row[i] = row[j];
    row[j] = keep;
  }
  return row;
}

/* The unseen task's metric after `n` rows of it. Blocks, router and all other tasks stay as they
   are unless --learns all. */
static double adapt(moe_model *model, const task_router *router, const float *vector, int n) {
  int donor = head_donor(n), everything = !strcmp(opt.learns, "all"), batch, i;
  int from_text = !strcmp(opt.vector_from, "text");
  int gate = from_text || !strcmp(opt.vector_from, "random") ? MOE_GATE_RANDOM
             : !strcmp(opt.vector_from, "mean")              ? MOE_GATE_MEAN
                                                : find_task("--vector-from", opt.vector_from);
  char head[128];
  moe_param_group groups[3];
  moe_limits limits;
  moe_train_config c;
  moe_model *more;
  moe_trainer *trainer;
  moe_sampler_config sc;
  moe_sampler sampler;
  routing r;
  pack p;
  int32_t *rows_of, drawn;
  int64_t used, count, row;
  float *routes = NULL;
  double metric;
  if (n == 0 && donor < 0) return (double)NAN;
  more = join(model, gate, from_text ? vector : NULL, donor);
  snprintf(head, sizeof head, "heads.%s.", task[T].name);
  train_config(&c, groups, now.seed);
  if (!everything) { /* all is frozen but what follows */
    groups[0].match = "";
    groups[0].lr_scale = 0;
    groups[1].lr_scale = 1;
  }
  groups[1].decay_scale = 0;
  groups[2].match = head;
  groups[2].lr_scale = groups[2].decay_scale = 1;
  c.n_groups = 3;
  c.lr = (float)opt.adapt_lr;
  c.steps = opt.adapt_steps;
  memset(&limits, 0, sizeof limits);
  limits.tokens = opt.batch * opt.max_len;
  limits.sequences = opt.batch;
  limits.training = 1;
  need(moe_trainer_create(&trainer, more, &limits, &c, &env));
  memset(&r, 0, sizeof r);
  if (router) {
    r.router = router_with_task(router, more, gate, from_text ? vector : NULL);
    r.level.scores = r.router->scores, r.level.dscores = r.router->dscores;
    router_forward(r.router, &env);
  }
  if (now.system == RANDOM1 || now.system == RANDOM2) {
    routes = (float *)take((size_t)((T + 1) * base.layers * opt.blocks), sizeof *routes);
    draw_routes(routes, T + 1, now.system, now.seed);
    r.level.routes = routes;
  }
  if (router || routes) need(moe_context_task_router(moe_trainer_context(trainer), &r.level, &env));
  p = pack_make();
  rows_of = pick_rows(n);
  batch = n < opt.batch ? n : opt.batch;
  count = n ? n : 1;
  memset(&sc, 0, sizeof sc);
  sc.seed = (uint64_t)now.seed;
  need(moe_sampler_init(&sampler, &sc, &count, &used, 1, &env));
  for (i = 0; i < opt.adapt_steps && n && !interrupted; ++i) {
    for (p.b.S = 0; p.b.S < batch;) {
      moe_sampler_next(&sampler, &drawn, &row);
      pack_add(&p, T, &train[T], rows_of[row]);
    }
    train_step(trainer, &c, &r, &p, groups[1].lr_scale, groups[0].lr_scale);
  }
  metric = evaluate(moe_trainer_context(trainer), T, moe_model_max_classes(more), &p);
  moe_trainer_free(trainer);
  moe_model_free(more);
  router_free(r.router);
  pack_free(&p);
  free(rows_of), free(routes);
  return metric;
}

static void adapt_all(moe_model *model, const task_router *router, const float *vector) {
  int k;
  for (k = 0; k < n_shots && opt.unseen; ++k)
    now.unseen[k] = adapt(model, router, vector, (int)shots[k]);
}

/* ---- saving ---- */

/* A model file knows of the MLP router only. Any table of scores z (T, L, m) is one, though:
   vectors that are 6 at the task's place and 0 elsewhere, a first matrix that passes them on, and a
   second one of z / GELU(6). */
static moe_model *model_with_table(moe_model *from, const float *z, moe_selection selection) {
  moe_config c = *moe_model_config(from);
  moe_model *to;
  float six = 6, gelu, *w;
  int32_t i, l, t;
  c.router = MOE_ROUTER_TASK_LEVEL;
  c.selection = selection;
  c.task_dim = MOST_TASKS; /* as many as the router has inner units */
  moe_gelu_forward(&gelu, &six, 1, &env);
  need(moe_model_create(&to, &c, task, T, 1, &env));
  need(moe_model_set_vocab(to, vocab, vocab_bytes, &env));
  for (i = 0; i < moe_model_tensors(to); ++i) {
    moe_tensor tensor;
    need(moe_model_tensor(to, i, &tensor));
    w = moe_model_weights(to) + tensor.offset;
    if (!strncmp(tensor.name, "router.", 7) || !strcmp(tensor.name, "tasks.vectors"))
      memset(w, 0, tensor.count * sizeof *w);
    else
      memcpy(w, tensor_of(from, tensor.name, NULL), tensor.count * sizeof *w);
  }
  w = tensor_of(to, "tasks.vectors", NULL);
  for (t = 0; t < T; ++t) w[t * MOST_TASKS + t] = six;
  for (l = 0; l < base.layers; ++l) {
    char name[64];
    snprintf(name, sizeof name, "router.%d.0.weight", (int)l);
    w = tensor_of(to, name, NULL);
    for (i = 0; i < MOST_TASKS; ++i) w[i * MOST_TASKS + i] = 1;
    snprintf(name, sizeof name, "router.%d.1.weight", (int)l);
    w = tensor_of(to, name, NULL);
    for (i = 0; i < opt.blocks; ++i)
      for (t = 0; t < T; ++t)
        w[i * MOST_TASKS + t] = z[(t * base.layers + l) * opt.blocks + i] / gelu;
  }
  return to;
}

static double grid_rate[MOST_LIST], seed_list[MOST_LIST];
static int n_rates, n_seeds, n_cells;

static void save_model(moe_model *model, const task_router *router, const float *drawn) {
  const char *dot = strrchr(opt.save, '.'), *slash = strrchr(opt.save, '/');
  int stem = (int)(dot && (!slash || dot > slash) ? dot - opt.save : (long)strlen(opt.save));
  char path[1024], grid[64] = "";
  moe_model *table = NULL;
  size_t i;
  if (opt.grid) snprintf(grid, sizeof grid, "-%s-%g", now.homogeneous ? "one" : "any", now.rate);
  if (n_cells == 1)
    snprintf(path, sizeof path, "%s", opt.save);
  else
    snprintf(path, sizeof path, "%.*s-%s%s-%d%s", stem, opt.save, system_name[now.system], grid,
             now.seed, opt.save + stem);
  if (drawn) { /* softmax at the temperature of inference gives them back */
    float *z = (float *)take(choices(), sizeof *z);
    for (i = 0; i < choices(); ++i) z[i] = drawn[i] > 0 ? 0 : -100;
    table = model_with_table(model, z, MOE_SELECT_SOFTMAX);
    free(z);
  } else if (router)
    table = model_with_table(model, router->scores, moe_model_config(model)->selection);
  need(moe_model_save(table ? table : model, path, &env));
  moe_model_free(table);
}

/* ---- state: a checkpoint whose note holds what stands outside the model ---- */

typedef struct text {
  char *p;
  size_t n, room;
} text;

static void put(text *t, const char *format, ...) {
  va_list args;
  if (t->room - t->n < 8192) {
    t->room = 2 * t->room + 16384;
    t->p = (char *)realloc(t->p, t->room);
    if (!t->p) die("out of memory");
  }
  va_start(args, format);
  t->n += (size_t)vsnprintf(t->p + t->n, 8192, format, args);
  va_end(args);
}

static int cell_at, stage_at; /* what is being trained */
static struct {
  int cell, stage; /* where to go on; stage 0: nowhere */
  void *file;
  size_t bytes;
  char *note, *at; /* what is read next */
} state;

/* Everything that decides results; states of other options are refused. */
static void put_options(text *t) {
  int i;
  put(t,
      "systems=%s router=%s vectors=%s seeds=%s grid=%s unseen=%s shots=%s learns=%s "
      "vector_from=%s head_from=%s init=%s ",
      opt.systems, opt.router, opt.vectors, opt.seeds, opt.grid ? opt.grid : "",
      opt.unseen ? opt.unseen : "", opt.shots, opt.learns, opt.vector_from,
      opt.head_from ? opt.head_from : "", opt.init ? "file" : "");
  put(t,
      "lr=%.9g router_rate=%.9g adapt_lr=%.9g warmup=%.9g decay=%.9g clip=%.9g dropout=%.9g "
      "blocks=%d epochs=%d steps=%d batch=%d homogeneous=%d ",
      opt.lr, opt.router_rate, opt.adapt_lr, opt.warmup, opt.decay, opt.clip, opt.dropout,
      opt.blocks, opt.epochs, opt.steps, opt.batch, opt.homogeneous);
  put(t, "two_stage=%d freeze=%d layers=%d hidden=%d max_len=%d looks=%d adapt_steps=%d tasks=",
      opt.two_stage, opt.freeze, (int)base.layers, (int)base.hidden, opt.max_len, opt.looks,
      opt.adapt_steps);
  for (i = 0; i < T; ++i) put(t, "%s:%d,", task[i].name, (int)train[i].n);
  put(t, "%s\n", env.precision == MOE_TYPE_BF16 ? " precision=bf16" : "");
}

static void put_run(text *t, const run *r) {
  int i;
  size_t j;
  put(t, "%d %d %d %d %.17g %.17g %d\n", r->system, r->homogeneous, r->seed, r->stages, r->rate,
      r->seconds, r->n_looks);
  for (i = 0; i < T; ++i) put(t, "%.17g ", r->metric[i]);
  for (i = 0; i < n_shots; ++i) put(t, "%.17g ", isnan(r->unseen[i]) ? -9.0 : r->unseen[i]);
  for (i = 0; i < r->n_looks; ++i) put(t, "%lld %.17g ", (long long)r->step[i], r->tau[i]);
  for (j = 0; j < (size_t)r->n_looks * choices(); ++j) put(t, "%.9g ", (double)r->routes[j]);
  put(t, "\n");
}

static void put_floats(text *t, const float *w, size_t n) {
  size_t i;
  uint32_t bits;
  for (i = 0; i < n; ++i) {
    memcpy(&bits, w + i, 4);
    put(t, "%08x", (unsigned)bits);
  }
  put(t, "\n");
}

static void save_state(const moe_trainer *trainer, const moe_sampler *sampler, const routing *r,
                       double seconds) {
  text t = {NULL, 0, 0};
  int i;
  now.seconds = seconds;
  put_options(&t);
  put(&t, "%d %d %d\n", cell_at, stage_at, n_runs);
  for (i = 0; i < n_runs; ++i) put_run(&t, &runs[i]);
  put_run(&t, &now);
  if (stage_at == 2) put_floats(&t, r->target, choices());
  if (r->router) put(&t, "%lld\n", (long long)r->router->step);
  if (r->router)
    put_floats(&t, r->router->w, 4 * r->router->n); /* weights, gradients (zeros), moments */
  need(moe_checkpoint_save(trainer, sampler, t.p, opt.checkpoint, &env));
  free(t.p);
}

static double next_number(void) {
  char *end;
  double v = strtod(state.at, &end);
  if (end == state.at) die("%s: its note is damaged", opt.resume);
  state.at = end;
  return v;
}

static void next_floats(float *w, size_t n) {
  size_t i;
  int d;
  state.at += strspn(state.at, " \n");
  if (strlen(state.at) < 8 * n) die("%s: its note is damaged", opt.resume);
  for (i = 0; i < n; ++i) {
    uint32_t bits = 0;
    for (d = 0; d < 8; ++d, ++state.at)
      bits = bits << 4 | (uint32_t)(*state.at <= '9' ? *state.at - '0' : *state.at - 'a' + 10);
    memcpy(w + i, &bits, 4);
  }
}

static void next_run(run *r) {
  int i;
  size_t j;
  memset(r, 0, sizeof *r);
  r->system = (int)next_number(), r->homogeneous = (int)next_number(), r->seed = (int)next_number(),
  r->stages = (int)next_number();
  r->rate = next_number(), r->seconds = next_number(), r->n_looks = (int)next_number();
  if (r->n_looks < 0 || r->n_looks > 1000) die("%s: its note is damaged", opt.resume);
  for (i = 0; i < T; ++i) r->metric[i] = next_number();
  for (i = 0; i < n_shots; ++i) {
    r->unseen[i] = next_number();
    if (r->unseen[i] < -2) r->unseen[i] = (double)NAN;
  }
  for (i = 0; i < r->n_looks; ++i) r->step[i] = (int64_t)next_number(), r->tau[i] = next_number();
  if (r->n_looks) r->routes = (float *)take((size_t)r->n_looks * choices(), sizeof *r->routes);
  for (j = 0; j < (size_t)r->n_looks * choices(); ++j) r->routes[j] = (float)next_number();
}

/* --resume: what is done comes back at once, the rest when its turn has come. */
static void open_state(void) {
  text t = {NULL, 0, 0};
  size_t length;
  int i, done;
  need(moe_file_read(&state.file, &state.bytes, opt.resume, &env));
  about = opt.resume;
  need(moe_checkpoint_note(NULL, 0, &length, state.file, state.bytes, &env));
  state.note = (char *)take(length + 1, 1);
  need(moe_checkpoint_note(state.note, length + 1, &length, state.file, state.bytes, &env));
  about = NULL;
  put_options(&t);
  if (strncmp(state.note, t.p, t.n))
    die("%s was made with other options:\n  there %.*s\n  here  %s", opt.resume,
        (int)strcspn(state.note, "\n"), state.note, t.p);
  state.at = state.note + t.n;
  free(t.p);
  state.cell = (int)next_number();
  state.stage = (int)next_number();
  done = (int)next_number();
  for (i = 0; i < done; ++i) {
    next_run(&now);
    keep_run();
  }
  next_run(&now);
}

static void load_state(moe_trainer *trainer, moe_sampler *sampler, routing *r) {
  about = opt.resume;
  need(moe_checkpoint_read(trainer, sampler, state.file, state.bytes, &env));
  about = NULL;
  if (r->router) {
    r->router->step = (int64_t)next_number();
    next_floats(r->router->w, 4 * r->router->n);
    router_forward(r->router, &env);
  }
  fprintf(stderr, "tasklevel: going on from %s, %s, stage %d, step %lld\n", opt.resume,
          system_name[now.system], state.stage, (long long)moe_trainer_steps_done(trainer));
  moe_free(state.file);
  free(state.note);
  memset(&state, 0, sizeof state);
}

/* ---- output ---- */

/* "straight x10 one task 2 stages": what tells lines apart, and no more. */
static void line_name(char *out, size_t size, const run *r) {
  size_t n = (size_t)snprintf(out, size, "%s", system_name[r->system]);
  if (opt.grid)
    n += (size_t)snprintf(out + n, size - n, ", %s", r->homogeneous ? "one task" : "any tasks");
  if (opt.grid && is_learned(r->system)) n += (size_t)snprintf(out + n, size - n, ", x%g", r->rate);
  if (opt.two_stage && is_learned(r->system)) snprintf(out + n, size - n, ", stage %d", r->stages);
}

static int same_line(const run *a, const run *b) {
  return a->system == b->system && a->homogeneous == b->homogeneous && a->stages == b->stages &&
         a->rate == b->rate;
}

static void print_table(void) {
  int i, j, t, k, width = 24;
  char name[128];
  for (i = 0; i < n_runs; ++i) {
    line_name(name, sizeof name, &runs[i]);
    if ((int)strlen(name) > width) width = (int)strlen(name);
  }
  printf("\n%-*s", width, "100 x metric on dev");
  for (t = 0; t < T; ++t) printf(" %9.9s", task[t].name);
  printf(" |      mean%s |", n_seeds > 1 ? "   +-" : "");
  for (k = 0; k < n_shots && opt.unseen; ++k)
    printf(" %5g row%s", shots[k], shots[k] == 1 ? " " : "s");
  printf("%s  seconds\n", opt.unseen ? " |" : "");
  for (i = 0; i < n_runs; ++i) {
    double sum[MOST_TASKS] = {0}, unseen[MOST_LIST] = {0}, mean = 0, square = 0, time = 0, n = 0;
    for (j = 0; j < i && !same_line(&runs[i], &runs[j]); ++j) continue;
    if (j < i) continue; /* stands there already */
    for (j = i; j < n_runs; ++j) {
      if (!same_line(&runs[i], &runs[j])) continue;
      ++n;
      for (t = 0; t < T; ++t) sum[t] += runs[j].metric[t];
      for (k = 0; k < n_shots; ++k) unseen[k] += runs[j].unseen[k];
      mean += mean_metric(&runs[j]);
      square += mean_metric(&runs[j]) * mean_metric(&runs[j]);
      time += runs[j].seconds;
    }
    line_name(name, sizeof name, &runs[i]);
    printf("%-*s", width, name);
    for (t = 0; t < T; ++t) printf(" %9.1f", 100 * sum[t] / n);
    printf(" | %9.1f", 100 * mean / n);
    if (n_seeds > 1)
      printf(" %4.1f", n > 1 ? 100 * sqrt(fmax(0, (square - mean * mean / n) / (n - 1))) : 0);
    printf(" |");
    for (k = 0; k < n_shots && opt.unseen; ++k)
      if (isnan(unseen[k]))
        printf(" %10s", "-");
      else
        printf(" %10.1f", 100 * unseen[k] / n);
    printf("%s %8.0f\n", opt.unseen ? " |" : "", time / n);
  }
  if (opt.unseen)
    printf("rows: of %s, which was left out of the training; %s\n", opt.unseen,
           strcmp(opt.learns, "all") ? "its vector and head learn, nothing else"
                                     : "everything learns");
}

static void write_tasks(FILE *f, const run *r) {
  int t, k, first = 1;
  for (t = 0; t < T; ++t)
    fprintf(f, "%s{\"name\": \"%s\", \"metric\": \"%.*s\", \"value\": %.6f, \"n\": %d}",
            t ? ", " : "", task[t].name, (int)strcspn(task[t].metrics, ","), task[t].metrics,
            r->metric[t], (int)(dev[t].n + dev2[t].n));
  fprintf(f, "], \"all\": %.6f", mean_metric(r));
  if (!opt.unseen) return;
  fprintf(f, ", \"unseen\": [");
  for (k = 0; k < n_shots; ++k) {
    if (isnan(r->unseen[k])) continue;
    fprintf(f,
            "%s{\"name\": \"%s\", \"rows\": %g, \"metric\": \"%.*s\", \"value\": %.6f, \"n\": %d}",
            first ? "" : ", ", task[T].name, shots[k], (int)strcspn(task[T].metrics, ","),
            task[T].metrics, r->unseen[k], (int)(dev[T].n + dev2[T].n));
    first = 0;
  }
  fprintf(f, "]");
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
static void write_file(const char *path, void (*print)(FILE *f)) {
  FILE *f = tmpfile();
  if (!f) die("a temporary file cannot be written");
  print(f);
  if (fflush(f) || ferror(f)) die("a temporary file cannot be written");
  need(moe_file_replace(path, copy_file, f, &env));
  fclose(f);
}

static void print_json(FILE *f) {
  int i, k, row, b, m = opt.blocks, n = T * base.layers;
  fprintf(f,
          "{\"options\": {\"router\": \"%s\", \"blocks\": %d, \"lr\": %g, \"vectors\": \"%s\", "
          "\"freeze\": %d, \"batch\": %d, \"steps\": %d, "
          "\"epochs\": %d, \"learns\": \"%s\", \"vector_from\": \"%s\"},\n\"runs\": [",
          opt.router, opt.blocks, opt.lr, opt.vectors, opt.freeze, opt.batch, opt.steps, opt.epochs,
          opt.learns, opt.vector_from);
  for (i = 0; i < n_runs; ++i) {
    const run *r = &runs[i];
    fprintf(f,
            "%s\n{\"system\": \"%s\", \"seed\": %d, \"batching\": \"%s\", \"router_rate\": %g, "
            "\"stage\": %d, \"seconds\": %.1f, \"tasks\": [",
            i ? "," : "", system_name[r->system], r->seed,
            r->homogeneous ? "homogeneous" : "heterogeneous", r->rate, r->stages, r->seconds);
    write_tasks(f, r);
    fprintf(f, ", \"routes\": [");
    for (k = 0; k < r->n_looks; ++k) {
      double most = 0;
      for (row = 0; row < n; ++row) {
        const float *p = r->routes + ((size_t)k * (size_t)n + (size_t)row) * (size_t)m;
        float largest = 0;
        for (b = 0; b < m; ++b) largest = p[b] > largest ? p[b] : largest;
        most += (double)largest / n;
      }
      fprintf(f, "%s{\"step\": %lld, \"temperature\": %.4g, \"largest\": %.6f}", k ? ", " : "",
              (long long)r->step[k], r->tau[k], most);
    }
    fprintf(f, "]}");
  }
  fprintf(f, "\n]}\n");
}

static void print_csv(FILE *f) {
  int i, k, t, l, b;
  fprintf(f,
          "run,system,batching,router_rate,seed,step,temperature,task,layer,block,probability\n");
  for (i = 0; i < n_runs; ++i) {
    const float *p = runs[i].routes;
    for (k = 0; k < runs[i].n_looks; ++k)
      for (t = 0; t < T; ++t)
        for (l = 0; l < base.layers; ++l)
          for (b = 0; b < opt.blocks; ++b, ++p)
            fprintf(
                f, "%d,%s,%s,%g,%d,%lld,%.6g,%s,%d,%d,%.6g\n", i + 1, system_name[runs[i].system],
                runs[i].homogeneous ? "homogeneous" : "heterogeneous", runs[i].rate, runs[i].seed,
                (long long)runs[i].step[k], runs[i].tau[k], task[t].name, l + 1, b + 1, (double)*p);
  }
}

/* ---- one line of the table after the other ---- */

static void finish_run(moe_model *model, const task_router *router, const float *vector,
                       const float *drawn, int last) {
  char name[128];
  int k;
  now.stages = stage_at;
  for (k = 0; k < n_shots; ++k)
    now.unseen[k] = (double)NAN; /* not measured after a first stage that has a second one */
  if (last) adapt_all(model, router, vector);
  if (interrupted) stop_here(-1);
  if (last && opt.save) save_model(model, router, drawn);
  line_name(name, sizeof name, &now);
  printf("%s, seed %d: mean %.1f after %.0f s\n", name, now.seed, 100 * mean_metric(&now),
         now.seconds);
  fflush(stdout);
  keep_run();
  if (opt.json) write_file(opt.json, print_json); /* finished parts are kept */
  if (opt.csv) write_file(opt.csv, print_csv);
}

static void run_cell(void) {
  float *routes = (float *)take(choices(), sizeof *routes), *vector = NULL;
  int learned = is_learned(now.system), drawn = now.system == RANDOM1 || now.system == RANDOM2,
      two = learned && opt.two_stage;
  int resume = state.stage;
  moe_model *model = make_model(now.system, now.seed), *first = NULL;
  task_router *router = is_outside(now.system) ? make_router(model, T, now.seed) : NULL;
  if (drawn) draw_routes(routes, T, now.system, now.seed);
  if (resume != 2) {
    stage_at = 1;
    vector = train_stage(1, model, NULL, router, drawn ? routes : NULL, resume);
    finish_run(model, router, vector ? vector + T * base.hidden : NULL, drawn ? routes : NULL,
               !two);
    if (two) {
      learned_routes(routes, model, router,
                     now.system == SOFTMAX ? moe_model_config(model)->temperature : 0);
      first = model;
      model = make_model(now.system, now.seed);
    }
  } else
    next_floats(routes, choices());
  if (two) {
    stage_at = 2;
    free(vector);
    if (resume != 2) {
      now.seconds = 0;
      now.n_looks = 0; /* the first line has them */
      now.routes = NULL;
    }
    vector = train_stage(2, model, first, router, routes, resume == 2);
    finish_run(model, router, vector ? vector + T * base.hidden : NULL, NULL, 1);
  }
  moe_model_free(first);
  moe_model_free(model);
  router_free(router);
  free(routes), free(vector);
}

static void run_all(void) {
  int s, h, k, seed, cell = 0, count;
  for (count = 0; count < 2; ++count) /* first to know how many there are */
    for (n_cells = count ? n_cells : 0, seed = 0; seed < n_seeds; ++seed)
      for (s = 0; s < SYSTEMS; ++s)
        for (h = 0; h < 2; ++h)
          for (k = 0; k < n_rates; ++k) {
            if (!listed(opt.systems, system_name[s]) || (!opt.grid && h != opt.homogeneous) ||
                (k && !is_learned(s)))
              continue;
            if (!count) {
              ++n_cells;
              continue;
            }
            cell_at = cell++;
            if (state.stage && cell_at < state.cell) continue;
            if (!state.stage) {
              memset(&now, 0, sizeof now);
              now.system = s;
              now.homogeneous = h;
              now.seed = (int)seed_list[seed];
              now.rate = grid_rate[k];
            }
            run_cell();
          }
}

/* A name that cannot be written is better known before the training than after it. */
static void check_writable(const char *name, const char *path) {
  char temporary[1056];
  FILE *f = path ? fopen(path, "rb+") : NULL;
  if (!path) return;
  if (!f) { /* a new file, most likely: moe_file_replace will begin with this name */
    int folder = errno == EISDIR;
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    f = folder ? NULL : fopen(temporary, "wb");
    if (!f) die("%s: %s cannot be written: %s", name, path, strerror(errno));
    remove(temporary);
  }
  fclose(f);
}

int main(int argc, char **argv) {
  moe_pool *pool;
  moe_isa isa;
  default_options();
  parse(argc, argv);
  isa = moe_isa_from_name(opt.isa);
  if (isa == MOE_ISA_COUNT || moe_env_init(&env, isa))
    die("this machine has no instruction set \"%s\"", opt.isa);
  env.log = show;
  if (!strcmp(opt.precision, "bf16"))
    moe_env_set_precision(&env, MOE_TYPE_BF16); /* or a sentence, and fp32 */
  need(moe_pool_create(&pool, opt.threads ? opt.threads : moe_processors(), &env));
  n_seeds = number_list(seed_list, "--seeds", opt.seeds, 0);
  n_shots = opt.unseen ? number_list(shots, "--shots", opt.shots, 0) : 0;
  if (opt.grid)
    n_rates = number_list(grid_rate, "--grid", opt.grid, 0);
  else
    grid_rate[0] = opt.router_rate, n_rates = 1;
  check_writable("--save", opt.save);
  check_writable("--checkpoint", opt.checkpoint);
  check_writable("--json", opt.json);
  check_writable("--csv", opt.csv);
  make_config();
  read_tasks();
  if (opt.unseen) {
    int k, donor = head_donor(0);
    if (!listed("random,mean,text", opt.vector_from)) find_task("--vector-from", opt.vector_from);
    for (k = 0; k < n_shots; ++k) {
      if (shots[k] > train[T].n)
        die("--shots: %s has %d training rows, not %g", opt.unseen, (int)train[T].n, shots[k]);
      if (shots[k] == 0 && donor < 0)
        fprintf(stderr,
                "tasklevel: no task has the labels of %s, so with 0 rows it has no head; "
                "--head-from can name one\n",
                opt.unseen);
    }
  }
  signal(SIGINT, interrupt);
  signal(SIGTERM, interrupt);
  if (opt.resume) open_state();
  run_all();
  print_table();
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  moe_pool_free(pool);
  return 0;
}
