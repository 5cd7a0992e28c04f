/* train.c - trains Single-Task, MT-Dense, MT-Switch and MT-TaG on a folder of tasks and prints a
   table like Table 1 of the MT-TaG paper.

     cc -O3 -o train examples/train.c -lm -pthread
     ./train                      the bundled tasks, four systems
     ./train --help               the options

   A folder of tasks holds tasks.tsv and, for each task, TASK/train.tsv and TASK/dev.tsv: README.md
   shows how to make your own. From top to bottom: options, tasks and rows, the starting point,
   evaluation, what is finished, one training, the first stage, the second stage, systems compared,
   what is shown, tasks that join, main. */
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#define MOE_IMPLEMENTATION
#include "../moe.h"

#include <errno.h>
#include <signal.h>
#include <time.h>
#ifdef _WIN32
#include <io.h>
#define isatty _isatty
#define fileno _fileno
#endif

/* ---- options ---- */

/* TUNED + system: after the second stage. */
enum { SINGLE, DENSE, SWITCH, TAG, EMBED, SYSTEMS, TUNED = SYSTEMS, LINES = 2 * SYSTEMS };
static const char *const system_name[LINES] = {
    "single",       "dense",       "switch",       "tag",       "embed",
    "single-tuned", "dense-tuned", "switch-tuned", "tag-tuned", "embed-tuned"};
static const char *const system_title[LINES] = {
    "Single-Task",  "MT-Dense",    "MT-Switch",    "MT-TaG",    "MT-Embed",
    "Single tuned", "Dense tuned", "Switch tuned", "TaG tuned", "Embed tuned"};

static struct {
  const char *data, *tasks, *init, *vocab, *systems, *save, *checkpoint, *resume, *json,
      *predictions, *isa, *precision, *seeds, *sampling, *order, *truncate;
  const char *gate_scale, *from, *adapt, *gate_from, *few, *grid;
  int max_len, layers, hidden, ffn, heads, cased, experts, top_k, batch, micro_batch, threads,
      dedup, renormalize, rank;
  int fine_tune, fine_batch, fine_epoch, patience, epochs, steps, every, keep, tidy, report,
      resamples, hold_most, profile;
  double hold_out, eps, noise, rate, warmup, decay, clip, dropout, balance, z_loss, jitter,
      gate_rate, tokens;
} opt; /* zero, but for: */

static void default_options(void) {
  opt.systems = "single,dense,switch,tag";
  opt.isa = "auto";
  opt.precision = "fp32";
  opt.seeds = "1";
  opt.sampling = "natural";
  opt.order = "shuffle";
  opt.truncate = "longest";
  opt.gate_scale = "n";
  opt.gate_from = "random";
  opt.layers = 2;
  opt.hidden = 128;
  opt.ffn = 512;
  opt.experts = 4;
  opt.top_k = 1;
  opt.rank = 8;
  opt.batch = opt.fine_batch = 32;
  opt.patience = 3;
  opt.micro_batch = 4096;
  opt.warmup = opt.dropout = 0.1;
  opt.clip = opt.gate_rate = 1;
  opt.every = 500;
  opt.resamples = 1000;
}

/* One of text, number and real is where the value goes; a number without an argument is a switch.
   "a|b": one of these words. */
typedef struct option {
  const char *name, *argument;
  const char **text;
  int *number;
  double *real;
  double low, high;
  const char *help; /* a line, or several */
} option;

#define OPTION_TEXT(name, argument, to, help)                                                      \
  { name, argument, &opt.to, NULL, NULL, 0, 0, help }
#define OPTION_NUMBER(name, to, low, high, help)                                                   \
  { name, "N", NULL, &opt.to, NULL, low, high, help }
#define OPTION_REAL(name, argument, to, low, high, help)                                           \
  { name, argument, NULL, NULL, &opt.to, low, high, help }
#define OPTION_SWITCH(name, to, help)                                                              \
  { name, NULL, NULL, &opt.to, NULL, 0, 0, help }
#define OPTION_GROUP(name)                                                                         \
  { name, NULL, NULL, NULL, NULL, 0, 0, NULL }

static const option options[] = {
    OPTION_GROUP("data"),
    OPTION_TEXT("--data", "DIR", data,
                "folder with tasks.tsv and TASK/train.tsv, TASK/dev.tsv [examples/data]\n"
                "a second dev set, dev_2.tsv or dev_mm.tsv, makes the metric the mean of both"),
    OPTION_TEXT("--tasks", "A,B,C", tasks, "these tasks, in this order [all of tasks.tsv]"),
    OPTION_NUMBER("--max-len", max_len, 3, 1 << 20,
                  "longest input in tokens [128, or what the positions allow]"),
    OPTION_TEXT("--truncate", "longest|right", truncate,
                "what to cut from a longer input [longest]"),
    OPTION_REAL("--hold-out", "FRACTION", hold_out, 0, 0.9,
                "part of train that chooses the best epoch; 0: the last [0]"),
    OPTION_NUMBER("--hold-most", hold_most, 1, 1000000000,
                  "but about N rows of a task at most [no limit]"),
    OPTION_SWITCH("--dedup", dedup,
                  "drop training rows whose text stands in another task's dev set"),
    OPTION_GROUP("model"),
    OPTION_TEXT(
        "--init", "FILE", init,
        "start from a published BERT-like encoder (safetensors); config.json beside it is read"),
    OPTION_TEXT("--vocab", "FILE", vocab, "its WordPiece vocabulary [vocab.txt of --data]"),
    OPTION_SWITCH("--cased", cased, "do not lower-case the text [tokenizer_config.json decides]"),
    OPTION_NUMBER("--heads", heads, 1, 1024, "attention heads, where there is no config.json [4]"),
    OPTION_REAL("--eps", "E", eps, 1e-30, 1, "LayerNorm epsilon, likewise [1e-12]"),
    OPTION_NUMBER("--layers", layers, 1, 1000, "without --init: from scratch [2]"),
    OPTION_NUMBER("--hidden", hidden, 1, 65536, "[128]"),
    OPTION_NUMBER("--ffn", ffn, 1, 1 << 20, "[512]"),
    OPTION_TEXT("--systems", "LIST", systems, "of single,dense,switch,tag,embed [the first four]"),
    OPTION_NUMBER("--rank", rank, 1, 4096,
                  "length of the task vectors that embed makes its gates of [8]"),
    OPTION_NUMBER("--experts", experts, 1, MOE_MAX_EXPERTS, "experts in a layer [4]"),
    OPTION_NUMBER("--top-k", top_k, 1, MOE_MAX_EXPERTS, "experts of a token [1]"),
    OPTION_TEXT("--gate-scale", "paper|n", gate_scale,
                "weight of an expert: g* (the paper) or g* N/k [n: a sparse model then starts\n"
                "as its dense parent; with the paper's g* every FFN starts at a quarter]"),
    OPTION_SWITCH("--renormalize", renormalize, "top-k weights sum to 1 (with --gate-scale paper)"),
    OPTION_REAL("--noise", "S", noise, 0, 10, "standard deviation of noise on copied experts [0]"),
    OPTION_GROUP("training"),
    OPTION_NUMBER("--epochs", epochs, 1, 1000000,
                  "length; Single-Task gets a task's share of the steps [3 with --init, else 8]"),
    OPTION_NUMBER("--steps", steps, 1, 1000000000, "length in steps"),
    OPTION_REAL("--tokens", "N", tokens, 1, 1e15, "length in tokens, about"),
    OPTION_NUMBER("--batch", batch, 1, 65536, "sequences of a step [32]"),
    OPTION_NUMBER("--micro-batch", micro_batch, 1, 1 << 24,
                  "most tokens at once; more memory, not other results (but with --balance,\n"
                  "whose loss is taken of what is at hand) [4096]"),
    OPTION_REAL("--lr", "R", rate, 1e-12, 1e6, "peak learning rate [5e-5 with --init, else 1e-3]"),
    OPTION_REAL("--warmup", "F", warmup, 0, 1, "fraction of the steps to reach it [0.1]"),
    OPTION_REAL("--gate-lr", "F", gate_rate, 0, 1e6,
                "factor of the learning rate for gates and task vectors [1]"),
    OPTION_REAL("--decay", "D", decay, 0, 1e6, "weight decay [0]"),
    OPTION_REAL("--clip", "C", clip, 0, 1e30, "largest gradient norm [1]"),
    OPTION_REAL("--dropout", "P", dropout, 0, 0.99, "[0.1]"),
    OPTION_TEXT("--seeds", "1,2,3", seeds,
                "a run for each; the table then shows mean and deviation [1]"),
    OPTION_TEXT("--sampling", "HOW", sampling,
                "natural, uniform, temperature:T or uniform-natural [natural]"),
    OPTION_TEXT("--order", "shuffle|file", order, "[shuffle]"),
    OPTION_REAL("--balance", "A", balance, 0, 1e6,
                "load-balance loss; this and the next two the paper argues against [0]"),
    OPTION_REAL("--z-loss", "A", z_loss, 0, 1e6, "router z-loss [0]"),
    OPTION_REAL("--jitter", "A", jitter, 0, 0.99, "noise on what the gates read [0]"),
    OPTION_GROUP("second stage"),
    OPTION_NUMBER(
        "--fine-tune", fine_tune, 1, 100000,
        "so many epochs at most for each task alone, after the first stage (Single-Task,\n"
        "which has no other: more of them, by the task's share of the first stage);\n"
        "keeps the best, chosen on dev.tsv or, as it should be, on --hold-out rows"),
    OPTION_NUMBER("--fine-batch", fine_batch, 1, 65536, "its batch [32]"),
    OPTION_NUMBER("--fine-epoch", fine_epoch, 1, 1000000000,
                  "an epoch of it ends after N steps at the latest [all rows]"),
    OPTION_NUMBER("--patience", patience, 1, 100000, "ends after N epochs that are no better [3]"),
    OPTION_TEXT("--grid", "RATES[:WARMUPS]", grid,
                "tries every pair, 2e-5,5e-5:0.1,0.2 say, keeps the best [--lr and --warmup]"),
    OPTION_TEXT("--from", "MODEL", from, "a trained model instead of the first stage"),
    OPTION_TEXT("--adapt", "TASK", adapt,
                "a task that the model of --from does not know joins it; without --from:\n"
                "the Single-Task model that it has to beat"),
    OPTION_TEXT("--gate-from", "LIST", gate_from,
                "where its gates come from: random, mean or a task [random]"),
    OPTION_TEXT("--rows", "LIST", few,
                "its training rows, 100 or 10% say, drawn anew for each seed [100%]"),
    OPTION_GROUP("machine"),
    OPTION_NUMBER("--threads", threads, 1, 256, "[all processors]"),
    OPTION_TEXT("--isa", "auto|avx512|avx2|neon|scalar", isa, "[auto]"),
    OPTION_TEXT("--precision", "fp32|bf16", precision,
                "bf16: products of the layers with operands of 8 bits of precision, weights and "
                "sums fp32;\n"
                "needs AMX or AVX512-BF16, else goes on in fp32 [fp32]"),
    OPTION_SWITCH("--profile", profile, "say at the end where the time went"),
    OPTION_GROUP("files"),
    OPTION_TEXT("--save", "FILE", save,
                "the trained model; with several runs FILE gets -SYSTEM-SEED"),
    OPTION_TEXT("--checkpoint", "FILE", checkpoint,
                "state to go on from; names as with --save; what is finished is in FILE.results"),
    OPTION_NUMBER("--every", every, 1, 1000000000,
                  "steps from one checkpoint to the next; the last step has one too [500]"),
    OPTION_TEXT("--resume", "FILE", resume,
                "go on from there, bit for bit; give the same options again"),
    OPTION_NUMBER(
        "--keep", keep, 1, 1000,
        "keep the model at N steps of the first stage, as CHECKPOINT-stepSTEP, for routes"),
    OPTION_SWITCH("--tidy", tidy, "remove the checkpoint of a run when its results are kept"),
    OPTION_SWITCH("--report", report, "train nothing, show what --resume has finished"),
    OPTION_TEXT("--json", "FILE", json, "all results"),
    OPTION_TEXT("--predictions", "FILE", predictions,
                "what the model says of each dev row; names as with --save"),
    {"--resamples", "N", NULL, &opt.resamples, NULL, 0, 100000,
     "of the dev rows, to compare systems by; 0: none [1000]"}};

enum { OPTIONS = sizeof options / sizeof *options };

static void print_help(void) {
  int i;
  printf("usage: train [options]; defaults in brackets\n");
  for (i = 0; i < OPTIONS; ++i) {
    const option *o = &options[i];
    const char *line = o->help;
    char left[64];
    if (!o->help) {
      printf("\n%s\n", o->name);
      continue;
    }
    snprintf(left, sizeof left, "%s %s", o->name, o->argument ? o->argument : "");
    for (; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
      printf("  %-26s %.*s\n", left, (int)strcspn(line, "\n"), line);
      left[0] = 0;
    }
  }
}

static void die(const char *format, ...) MOE__PRINTF(1, 2);
static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "train: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
}

/* The file that bytes in memory came from: the library does not know it. */
static const char *about;

static void show(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "train: %s%s%s\n", about ? about : "", about ? ": " : "", sentence);
}

/* For calls of the library: the log has said what was wrong. */
static void need(moe_status status) {
  if (status) exit(1);
}

static void *take(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size);
  if (!p) die("out of memory (%zu bytes)", count * size);
  return p;
}

static void *grow(void *p, size_t count, size_t size) {
  p = realloc(p, (count ? count : 1) * size);
  if (!p) die("out of memory (%zu bytes)", count * size);
  return p;
}

/* Memory that is wanted to the end. */
static struct lasting_block { struct lasting_block *next; } * lasting_blocks;

static void *lasting(size_t count, size_t size) {
  struct lasting_block *b = (struct lasting_block *)take(count * size + 64, 1);
  b->next = lasting_blocks;
  lasting_blocks = b;
  return (char *)b + 64;
}

static void free_lasting(void) {
  while (lasting_blocks) {
    struct lasting_block *next = lasting_blocks->next;
    free(lasting_blocks);
    lasting_blocks = next;
  }
}

static double number(const char *name, const char *text, double low, double high) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end || !(v >= low && v <= high))
    die("%s takes a number from %g to %g, not \"%s\"", name, low, high, text);
  return v;
}

static int whole(const char *name, const char *text, double low, double high) {
  char *end;
  long long v = strtoll(text, &end, 10);
  if (end == text || *end || (double)v < low || (double)v > high)
    die("%s takes a whole number from %.0f to %.0f, not \"%s\"", name, low, high, text);
  return (int)v;
}

/* `word` is one of "a|b|c". */
static int is_one_of(const char *list, const char *word) {
  size_t n = strlen(word);
  for (; list; list = strchr(list, '|') ? strchr(list, '|') + 1 : NULL)
    if (!strncmp(list, word, n) && (!list[n] || list[n] == '|')) return 1;
  return 0;
}

static void read_options(int argc, char **argv) {
  int i, k;
  default_options();
  for (i = 1; i < argc; ++i) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    const option *o = options;
    if (!strcmp(name, "--help") || !strcmp(name, "-h")) {
      print_help();
      exit(0);
    }
    if (strncmp(name, "--", 2)) die("\"%s\" is no option; --help lists them", name);
    for (k = 0; k < OPTIONS && strcmp(options[k].name, name); ++k) continue;
    if (k == OPTIONS) die("unknown option %s; --help lists them", name);
    o = &options[k];
    if (!o->argument) {
      *o->number = 1;
      continue;
    }
    if (!value) die("%s needs a value; --help lists them", name);
    ++i;
    if (strchr(o->argument, '|') && !is_one_of(o->argument, value))
      die("%s is %s, not \"%s\"", name, o->argument, value);
    if (o->text)
      *o->text = value;
    else if (o->number)
      *o->number = whole(name, value, o->low, o->high);
    else
      *o->real = number(name, value, o->low, o->high);
  }
}

/* What does not go together, and defaults that depend on other options. */
static void check_options(void) {
  if (opt.from && opt.init)
    die("--from goes on from a trained model, --init starts anew: give one of them");
  if (opt.few && !opt.adapt) die("--rows is for --adapt");
  if ((opt.from || opt.adapt) && !opt.fine_tune) opt.fine_tune = 10;
  if (opt.grid && !opt.fine_tune)
    die("--grid tries rates and warm-ups in the second stage: give --fine-tune too");
  if ((opt.epochs != 0) + (opt.steps != 0) + (opt.tokens > 0) > 1)
    die("give --epochs or --steps or --tokens, not two of them");
  if (opt.keep && !opt.checkpoint) die("--keep makes its names of that of --checkpoint: give both");
  if (opt.report && !opt.resume) die("--report shows what --resume FILE has finished: give both");
  if (opt.renormalize && !strcmp(opt.gate_scale, "n")) opt.gate_scale = "paper";
  if (opt.top_k > opt.experts) die("--top-k %d is more than --experts %d", opt.top_k, opt.experts);
  if (!opt.epochs && !opt.steps && !(opt.tokens > 0)) opt.epochs = opt.init ? 3 : 8;
  if (!(opt.rate > 0)) opt.rate = opt.init || opt.from ? 5e-5 : 1e-3;
  if (!opt.data) opt.data = "examples/data";
}

/* Splits "a,b,c" in place into at most `most` parts; most + 1: there are more. */
static int split(char *text, char mark, char **parts, int most) {
  int n = 0;
  for (;;) {
    char *end = strchr(text, mark);
    if (n == most) return n + 1;
    parts[n++] = text;
    if (!end) return n;
    *end = 0;
    text = end + 1;
  }
}

static char *copy_text(const char *s) {
  size_t n = strlen(s) + 1;
  return (char *)memcpy(lasting(n, 1), s, n);
}

/* ---- tasks and rows ---- */

typedef struct row {
  int64_t start; /* of its tokens, which end where those of the next row start */
  float label;
  int32_t line;    /* in the file, from 1 */
  int32_t span[4]; /* for span tasks */
  uint64_t group;  /* hash of the question's name, for ranking */
  uint64_t hash;   /* of the letters and digits of the text */
} row;

typedef struct rows {
  int64_t n, tokens, room, token_room;
  row *row; /* (n+1) */
  int32_t *ids;
  uint8_t *segments;
} rows;

typedef struct task_data {
  moe_task task;
  int64_t official; /* column `rows`: decides "small" */
  int hard;
  rows train, held, dev[2];
  int n_dev;
} task_data;

static task_data *tasks;
static int n_tasks;
static moe_config config;
static char *vocab;
static size_t vocab_bytes;
static moe_tokenizer *tokenizer;
static moe_env env;

static void free_rows(rows *r) {
  free(r->row);
  free(r->ids);
  free(r->segments);
  memset(r, 0, sizeof *r);
}

/* Appends a row; its start is set here. */
static void rows_add(rows *r, const row *what, const int32_t *ids, const uint8_t *segments,
                     int64_t length) {
  if (r->n == r->room) {
    r->room = 2 * r->room + 256;
    r->row = (row *)grow(r->row, (size_t)r->room + 1, sizeof *r->row);
  }
  if (r->tokens + length > r->token_room) {
    r->token_room = 2 * r->token_room + 8192 + length;
    r->ids = (int32_t *)grow(r->ids, (size_t)r->token_room, sizeof *r->ids);
    r->segments = (uint8_t *)grow(r->segments, (size_t)r->token_room, 1);
  }
  memcpy(r->ids + r->tokens, ids, (size_t)length * sizeof *r->ids);
  memcpy(r->segments + r->tokens, segments, (size_t)length);
  r->row[r->n] = *what;
  r->row[r->n++].start = r->tokens;
  r->tokens += length;
  r->row[r->n].start = r->tokens;
}

/* Rows with keep[i] != 0 go to `kept`, the others to `rest` (or away). */
static void part_rows(rows *kept, rows *rest, const rows *r, const unsigned char *keep) {
  int64_t i;
  memset(kept, 0, sizeof *kept);
  if (rest) memset(rest, 0, sizeof *rest);
  for (i = 0; i < r->n; ++i) {
    const row *x = &r->row[i];
    if (keep[i] || rest)
      rows_add(keep[i] ? kept : rest, x, r->ids + x->start, r->segments + x->start,
               x[1].start - x->start);
  }
}

typedef struct tsv {
  const char *path;
  char *text, *next, *end;
  int line, columns;
  char *column[16]; /* names, from the header line */
} tsv;

static char *tsv_line(tsv *f) {
  char *line = f->next, *end;
  if (line >= f->end) return NULL;
  end = (char *)memchr(line, '\n', (size_t)(f->end - line));
  if (!end) end = f->end;
  f->next = end + 1;
  if (end > line && end[-1] == '\r') --end;
  *end = 0;
  if (strlen(line) != (size_t)(end - line)) die("%s:%d: a zero byte", f->path, f->line + 1);
  ++f->line;
  return line;
}

static int tsv_open(tsv *f, const char *path, int optional) {
  void *data;
  size_t bytes;
  FILE *probe = fopen(path, "rb");
  char *line;
  memset(f, 0, sizeof *f);
  if (!probe && optional) return 0;
  if (!probe) die("cannot open %s: %s", path, strerror(errno));
  fclose(probe);
  need(moe_file_read(&data, &bytes, path, &env));
  f->path = path;
  f->text = (char *)take(bytes + 2, 1);
  memcpy(f->text, data, bytes);
  moe_free(data);
  f->next = f->text;
  f->end = f->text + bytes;
  if (!strncmp(f->text, "\xef\xbb\xbf", 3))
    f->next += 3; /* the mark that some editors put before UTF-8 */
  line = tsv_line(f);
  if (!line) die("%s is empty; its first line should name the columns", path);
  f->columns = split(line, '\t', f->column, 16);
  if (f->columns > 16) die("%s:1: more than 16 columns", path);
  return 1;
}

static int tsv_column(const tsv *f, const char *name, int must) {
  int i, at = -1;
  for (i = f->columns; i-- > 0;)
    if (!strcmp(f->column[i], name)) {
      if (at >= 0) die("%s:1: two columns are called \"%s\"", f->path, name);
      at = i;
    }
  if (at < 0 && must) die("%s:1: there is no column \"%s\"", f->path, name);
  return at;
}

static void tsv_fields(tsv *f, char *line, char **field) {
  int n = split(line, '\t', field, f->columns);
  if (n < f->columns)
    die("%s:%d: %d column%s, expected %d", f->path, f->line, n, n == 1 ? "" : "s", f->columns);
  if (n > f->columns)
    die("%s:%d: more than the %d columns of the first line", f->path, f->line, f->columns);
}

static float field_number(const tsv *f, const char *name, const char *text) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end || !(v > -1e30 && v < 1e30))
    die("%s:%d: %s \"%s\" is no number", f->path, f->line, name, text);
  return (float)v;
}

static int field_whole(const tsv *f, const char *name, const char *text) {
  float v = field_number(f, name, text);
  if (!(v >= -1e9f && v <= 1e9f) || v != (float)(int)v)
    die("%s:%d: %s \"%s\" is no whole number", f->path, f->line, name, text);
  return (int)v;
}

/* labels: "0=no,1=yes" or "0..5" */
static void read_labels(const tsv *f, task_data *t, char *text) {
  char *part[MOE_MAX_CLASSES];
  const char **names;
  int i, n;
  char *dots = strstr(text, "..");
  if (t->task.kind == MOE_KIND_REGRESSION) {
    if (!dots)
      die("%s:%d: labels of a regression are a range such as 0..5, not \"%s\"", f->path, f->line,
          text);
    *dots = 0;
    t->task.low = field_number(f, "lowest label", text);
    t->task.high = field_number(f, "highest label", dots + 2);
    t->task.classes = 1;
    return;
  }
  n = split(text, ',', part, MOE_MAX_CLASSES);
  if (n > MOE_MAX_CLASSES) die("%s:%d: more than %d labels", f->path, f->line, MOE_MAX_CLASSES);
  if (n < 2)
    die("%s:%d: a task needs at least two labels, \"%s\" names %d", f->path, f->line, text, n);
  names = (const char **)lasting((size_t)n, sizeof *names);
  for (i = 0; i < n; ++i) {
    char *name = strchr(part[i], '=');
    char index[16];
    snprintf(index, sizeof index, "%d", i);
    if (!name || (size_t)(name - part[i]) != strlen(index) ||
        memcmp(part[i], index, strlen(index)) || !name[1])
      die("%s:%d: label %d should read %d=NAME, not \"%s\"", f->path, f->line, i, i, part[i]);
    names[i] = copy_text(name + 1);
  }
  t->task.classes = n;
  t->task.label = names;
}

static void read_task(const tsv *f, char **field, task_data *t) {
  static const char *const kinds[] = {"classification", "regression", "ranking", "span"};
  int rows_at = tsv_column(f, "rows", 0), max_at = tsv_column(f, "max_len", 0),
      hard_at = tsv_column(f, "hard", 0), k;
  const char *name = field[tsv_column(f, "name", 1)], *kind = field[tsv_column(f, "kind", 1)];
  const char *input = field[tsv_column(f, "input", 1)], *metric = field[tsv_column(f, "metric", 1)];
  memset(t, 0, sizeof *t);
  if (strlen(name) >= sizeof t->task.name || !*name)
    die("%s:%d: a task's name has 1 to 63 bytes", f->path, f->line);
  if (name[strspn(
          name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+")]) /* it names a
                                                                                    folder, files
                                                                                    and tensors */
    die("%s:%d: task \"%s\": a name has letters, digits, -, _ and + only", f->path, f->line, name);
  strcpy(t->task.name, name);
  for (k = 0; k < 4 && strcmp(kind, kinds[k]); ++k) continue;
  if (k == 4)
    die("%s:%d: kind \"%s\" is none of classification, regression, ranking, span", f->path, f->line,
        kind);
  t->task.kind = (moe_kind)k;
  if (strcmp(input, "single") && strcmp(input, "pair"))
    die("%s:%d: input \"%s\" is neither single nor pair", f->path, f->line, input);
  t->task.pair = !strcmp(input, "pair");
  if (!*metric || strlen(metric) >= sizeof t->task.metrics)
    die("%s:%d: metrics have 1 to %d bytes", f->path, f->line, MOE_NAME_BYTES - 1);
  strcpy(t->task.metrics, metric);
  read_labels(f, t, field[tsv_column(f, "labels", 1)]);
  if (rows_at >= 0 && *field[rows_at]) t->official = field_whole(f, "rows", field[rows_at]);
  if (t->official < 0) die("%s:%d: rows are %s", f->path, f->line, field[rows_at]);
  if (max_at >= 0 && *field[max_at]) t->task.max_len = field_whole(f, "max_len", field[max_at]);
  if (t->task.max_len && t->task.max_len < 2 + t->task.pair)
    die("%s:%d: max_len is %d, the special tokens alone are %d", f->path, f->line,
        (int)t->task.max_len, 2 + (int)t->task.pair);
  if (hard_at >= 0) t->hard = field_whole(f, "hard", field[hard_at]);
}

static void read_tasks(void) {
  char path[1024], *wanted[512], *field[16], *line;
  int n_wanted = 0, i, j;
  tsv f;
  task_data *all = NULL;
  int n = 0;
  snprintf(path, sizeof path, "%s/tasks.tsv", opt.data);
  tsv_open(&f, path, 0);
  while ((line = tsv_line(&f)) != NULL) {
    if (!*line) continue;
    tsv_fields(&f, line, field);
    all = (task_data *)grow(all, (size_t)n + 1, sizeof *all);
    read_task(&f, field, &all[n]);
    for (i = 0; i < n; ++i)
      if (!strcmp(all[i].task.name, all[n].task.name))
        die("%s:%d: task %s stands there twice", path, f.line, all[n].task.name);
    ++n;
  }
  free(f.text);
  if (!n) die("%s names no task", path);
  if (opt.adapt)
    n_wanted = split(copy_text(opt.adapt), ',', wanted, 1);
  else if (opt.tasks)
    n_wanted = split(copy_text(opt.tasks), ',', wanted, 512);
  if (opt.adapt && n_wanted > 1) die("--adapt takes one task");
  if (n_wanted > 512) die("--tasks: more than 512");
  n_tasks = n_wanted ? 0 : n;
  tasks = (task_data *)lasting((size_t)(n_wanted ? n_wanted : n), sizeof *tasks);
  if (!n_wanted) memcpy(tasks, all, (size_t)n * sizeof *tasks);
  for (i = 0; i < n_wanted; ++i) {
    for (j = 0; j < i; ++j)
      if (!strcmp(wanted[i], wanted[j])) die("--tasks names %s twice", wanted[i]);
    for (j = 0; j < n && strcmp(all[j].task.name, wanted[i]); ++j) continue;
    if (j == n) die("there is no task \"%s\" in %s", wanted[i], path);
    tasks[n_tasks++] = all[j];
  }
  free(all);
}

/* Letters and digits alone, in lower case: two texts with the same hash are the same text for
   --dedup. Other than ASCII counts as it is. */
static uint64_t text_hash(const char *a, const char *b) {
  uint64_t h = 0xcbf29ce484222325u;
  int pass;
  for (pass = 0; pass < 2; ++pass) {
    const unsigned char *s = (const unsigned char *)(pass ? b : a);
    for (; s && *s; ++s) {
      unsigned c = *s;
      if (c >= 'A' && c <= 'Z') c += 32;
      if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c >= 128)
        h = (h ^ c) * 0x100000001b3u;
    }
    if (!pass) h = (h ^ 1) * 0x100000001b3u;
  }
  return h;
}

/* A name as it stands, every byte of it: "a-1" and "a1" are two questions. */
static uint64_t name_hash(const char *s) {
  uint64_t h = 0xcbf29ce484222325u;
  for (; *s; ++s) h = (h ^ (unsigned char)*s) * 0x100000001b3u;
  return h;
}

static int code_points(const char *s) {
  int n = 0;
  for (; *s; ++s) n += ((unsigned char)*s & 0xc0) != 0x80;
  return n;
}

/* The tokens that overlap code points [from, to) of sentence 1 or 2 (`text` 0 or 1): a word may
   begin or end inside a piece. */
static void find_span(const tsv *f, const moe_tokens *tokens, int text, const char *sentence,
                      int from, int to, int32_t *span) {
  moe_env quiet = env;
  int length = code_points(sentence);
  quiet.log = NULL;
  if (from < 0 || to > length || from >= to)
    die("%s:%d: characters %d to %d of sentence%d, which has %d characters, are no word", f->path,
        f->line, from, to, text + 1, length);
  if (moe_tokens_span(span, tokens, text, from, to, &quiet) != MOE_OK)
    die("%s:%d: the word at characters %d to %d of sentence%d was cut off with the end of the "
        "text; try a larger --max-len",
        f->path, f->line, from, to, text + 1);
}

/* Rows by their group, in file order within one. */
static const rows *sorted_rows;

static int by_group(const void *a, const void *b) {
  int64_t i = *(const int64_t *)a, j = *(const int64_t *)b;
  uint64_t x = sorted_rows->row[i].group, y = sorted_rows->row[j].group;
  return x < y ? -1 : x > y ? 1 : i < j ? -1 : i > j;
}

/* Numbers of the rows so that the rows of a group follow each other, and where each group begins:
   (n+1) of both. Rows without groups, in any task but a ranking, are groups of one. Returns the
   number of groups. */
static int64_t rows_by_group(int64_t **order_out, int64_t **begin_out, const rows *r,
                             const moe_task *t) {
  int64_t *order = (int64_t *)take((size_t)r->n + 1, sizeof *order),
          *begin = (int64_t *)take((size_t)r->n + 1, sizeof *begin), i, n = 0;
  int ranking = t->kind == MOE_KIND_RANKING;
  for (i = 0; i < r->n; ++i) order[i] = i;
  sorted_rows = r;
  if (ranking) qsort(order, (size_t)r->n, sizeof *order, by_group);
  for (i = 0; i < r->n; ++i)
    if (!i || !ranking || r->row[order[i]].group != r->row[order[i - 1]].group) begin[n++] = i;
  begin[n] = r->n;
  *order_out = order;
  *begin_out = begin;
  return n;
}

/* Of the choices of a question exactly one is right. */
static void check_groups(const rows *r, const moe_task *t, const char *path) {
  int64_t *order, *begin, n = rows_by_group(&order, &begin, r, t), g, i;
  for (g = 0; g < n; ++g) {
    int right = 0;
    for (i = begin[g]; i < begin[g + 1]; ++i) right += r->row[order[i]].label > 0;
    if (right != 1)
      die("%s:%d: the group that begins here has %d choices with label 1, it must be one", path,
          r->row[order[begin[g]]].line, right);
    if (begin[g + 1] == begin[g] + 1)
      die("%s:%d: the group of this row has no other choice", path, r->row[order[begin[g]]].line);
  }
  free(order);
  free(begin);
}

static float read_label(const tsv *f, const task_data *t, const char *text) {
  float label = field_number(f, "label", text);
  if (t->task.kind == MOE_KIND_REGRESSION) {
    if (label < t->task.low || label > t->task.high)
      die("%s:%d: label %s is outside %g..%g", f->path, f->line, text, (double)t->task.low,
          (double)t->task.high);
  } else if (!(label >= 0 && label < (float)t->task.classes) || label < (float)(int)label ||
             label > (float)(int)label)
    die("%s:%d: label %s is none of 0 .. %d", f->path, f->line, text, t->task.classes - 1);
  return label;
}

static void tokens_make(moe_tokens *out, int max_len) {
  memset(out, 0, sizeof *out);
  out->capacity = max_len;
  out->ids = (int32_t *)take((size_t)max_len, sizeof(int32_t));
  out->segments = (uint8_t *)take((size_t)max_len, 1);
  out->begin = (int32_t *)take((size_t)max_len, sizeof(int32_t));
  out->end = (int32_t *)take((size_t)max_len, sizeof(int32_t));
}

static void tokens_free(moe_tokens *out) {
  free(out->ids);
  free(out->segments);
  free(out->begin);
  free(out->end);
}

static int read_rows(rows *r, const task_data *t, const char *path, int optional) {
  static const char *const span_column[4] = {"start1", "end1", "start2", "end2"};
  tsv f;
  char *line, *field[16];
  int max_len =
      t->task.max_len && t->task.max_len < config.max_len ? t->task.max_len : config.max_len;
  int label_at, a_at, b_at = -1, group_at = -1, span_at[4] = {-1, -1, -1, -1}, i;
  moe_tokens out;
  memset(r, 0, sizeof *r);
  if (!tsv_open(&f, path, optional)) return 0;
  label_at = tsv_column(&f, "label", 1);
  a_at = tsv_column(&f, "sentence1", 1);
  if (t->task.pair) b_at = tsv_column(&f, "sentence2", 1);
  if (t->task.kind == MOE_KIND_RANKING) group_at = tsv_column(&f, "group", 1);
  for (i = 0; i < 4 && t->task.kind == MOE_KIND_SPAN; ++i)
    span_at[i] = tsv_column(&f, span_column[i], 1);
  tokens_make(&out, max_len);
  while ((line = tsv_line(&f)) != NULL) {
    const char *a, *b;
    moe_text text;
    row x;
    memset(&x, 0, sizeof x);
    tsv_fields(&f, line, field);
    a = field[a_at];
    b = b_at >= 0 ? field[b_at] : NULL;
    x.label = read_label(&f, t, field[label_at]);
    x.hash = text_hash(a, b);
    x.group = group_at >= 0 ? name_hash(field[group_at]) : 0;
    x.line = f.line;
    text = moe_text_of(a, b);
    need(moe_encode(tokenizer, &out, &text, max_len, config.truncate, &env));
    for (i = 0; i < 2 && t->task.kind == MOE_KIND_SPAN; ++i)
      find_span(&f, &out, b ? i : 0, i && b ? b : a,
                field_whole(&f, "start", field[span_at[2 * i]]),
                field_whole(&f, "end", field[span_at[2 * i + 1]]), x.span + 2 * i);
    rows_add(r, &x, out.ids, out.segments, out.count);
  }
  if (!r->n) die("%s holds no rows", path);
  if (t->task.kind == MOE_KIND_RANKING) check_groups(r, &t->task, path);
  tokens_free(&out);
  free(f.text);
  return 1;
}

static int by_hash(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

/* A question that loses one choice loses all. */
static void keep_groups_whole(const rows *r, const moe_task *t, unsigned char *keep) {
  int64_t *order, *begin, n = rows_by_group(&order, &begin, r, t), g, i;
  for (g = 0; g < n; ++g) {
    unsigned char all = 1;
    for (i = begin[g]; i < begin[g + 1]; ++i) all &= keep[order[i]];
    for (i = begin[g]; i < begin[g + 1]; ++i) keep[order[i]] = all;
  }
  free(order);
  free(begin);
}

/* Marks the rows whose text stands in `dev`. */
static void mark_overlaps(unsigned char *keep, const rows *r, const rows *dev) {
  uint64_t *set = (uint64_t *)take((size_t)dev->n, sizeof *set);
  int64_t i;
  for (i = 0; i < dev->n; ++i) set[i] = dev->row[i].hash;
  qsort(set, (size_t)dev->n, sizeof *set, by_hash);
  for (i = 0; i < r->n; ++i)
    if (bsearch(&r->row[i].hash, set, (size_t)dev->n, sizeof *set, by_hash)) keep[i] = 0;
  free(set);
}

/* --dedup: a training row that stands in another task's dev set would make that task's score
   dishonest. */
static void remove_overlaps(void) {
  int t, o, d;
  for (t = 0; t < n_tasks; ++t) {
    rows all = tasks[t].train, *r = &tasks[t].train;
    unsigned char *keep = (unsigned char *)take((size_t)all.n, 1);
    memset(keep, 1, (size_t)all.n);
    for (o = 0; o < n_tasks; ++o)
      for (d = 0; d < tasks[o].n_dev && o != t; ++d) mark_overlaps(keep, &all, &tasks[o].dev[d]);
    keep_groups_whole(&all, &tasks[t].task, keep);
    part_rows(r, NULL, &all, keep);
    free(keep);
    if (r->n < all.n)
      printf("%s: %lld training rows stand in another task's dev set and are left out\n",
             tasks[t].task.name, (long long)(all.n - r->n));
    if (!r->n) die("%s has no training row left", tasks[t].task.name);
    free_rows(&all);
  }
}

static void hold_out_rows(void) {
  int t;
  int64_t i;
  for (t = 0; t < n_tasks; ++t) {
    rows all = tasks[t].train;
    unsigned char *keep = (unsigned char *)take((size_t)all.n, 1);
    double share = opt.hold_out;
    if (opt.hold_most && share * (double)all.n > opt.hold_most)
      share = opt.hold_most / (double)all.n;
    for (i = 0; i < all.n; ++i) { /* the rows of a ranking's group stay together */
      uint64_t of = tasks[t].task.kind == MOE_KIND_RANKING ? all.row[i].group : (uint64_t)i;
      keep[i] = (double)(moe_key(1, 0, of, (uint32_t)t, 77) >> 11) / 9007199254740992.0 >= share;
    }
    part_rows(&tasks[t].train, &tasks[t].held, &all, keep);
    free_rows(&all);
    free(keep);
    if (!tasks[t].train.n || !tasks[t].held.n)
      die("--hold-out %g leaves task %s without rows on one side", opt.hold_out,
          tasks[t].task.name);
  }
}

static int read_part(rows *r, const task_data *d, const char *file, int optional) {
  char path[1024];
  snprintf(path, sizeof path, "%s/%s/%s.tsv", opt.data, d->task.name, file);
  return read_rows(r, d, path, optional);
}

static void read_data(void) {
  double n = 0, tokens = 0;
  int t;
  for (t = 0; t < n_tasks; ++t) {
    task_data *d = &tasks[t];
    read_part(&d->train, d, "train", 0);
    read_part(&d->dev[0], d, "dev", 0);
    d->n_dev = 1 + (read_part(&d->dev[1], d, "dev_2", 1) || read_part(&d->dev[1], d, "dev_mm", 1));
    if (!d->official) d->official = d->train.n;
  }
  if (opt.dedup) remove_overlaps();
  if (opt.hold_out > 0) hold_out_rows();
  for (t = 0; t < n_tasks; ++t)
    n += (double)tasks[t].train.n, tokens += (double)tasks[t].train.tokens;
  if (!(opt.tokens > 0)) return;
  tokens = ceil(opt.tokens / (tokens / n * opt.batch));
  if (tokens > 1e9)
    die("--tokens %.0f are %.0f steps, 1000000000 are the most", opt.tokens, tokens);
  opt.steps = (int)tokens;
}

static void free_data(void) {
  int t;
  for (t = 0; t < n_tasks; ++t) {
    free_rows(&tasks[t].train);
    free_rows(&tasks[t].held);
    free_rows(&tasks[t].dev[0]);
    free_rows(&tasks[t].dev[1]);
  }
}

/* ---- the starting point ---- */

static void *init_file;
static size_t init_bytes;

/* A file beside --init, or NULL. */
static char *beside(const char *name, size_t *bytes) {
  char path[1024];
  const char *slash = strrchr(opt.init, '/');
  int n = slash ? (int)(slash - opt.init) + 1 : 0;
  FILE *f;
  void *data;
  snprintf(path, sizeof path, "%.*s%s", n, opt.init, name);
  f = fopen(path, "rb");
  if (!f) return NULL;
  fclose(f);
  need(moe_file_read(&data, bytes, path, &env));
  return (char *)data;
}

static void read_init(void) {
  size_t bytes;
  char *json, *lower;
  need(moe_file_read(&init_file, &init_bytes, opt.init, &env));
  about = opt.init;
  json = beside("config.json", &bytes);
  if (json)
    need(moe_import_config_json(&config, json, bytes,
                                &env)); /* first: it knows best what kind of encoder that is */
  need(moe_import_sizes(&config, init_file, init_bytes, &env));
  if (json)
    moe_free(json);
  else if (!opt.heads)
    die("there is no config.json beside %s: give --heads (and --eps, 1e-12 in BERT)", opt.init);
  about = NULL;
  json = beside("tokenizer_config.json", &bytes);
  lower = json ? strstr(json, "\"do_lower_case\"") : NULL;
  if (lower) {
    lower += 15;
    while (*lower == ' ' || *lower == ':' || *lower == '\n' || *lower == '\t') ++lower;
    if (!strncmp(lower, "false", 5)) config.cased = 1;
  }
  moe_free(json);
}

static moe_model *from_model;

/* --from: configuration, vocabulary and tasks are the model's. */
static void read_from(void) {
  int t, at;
  need(moe_model_load(&from_model, opt.from, &env)); /* its sentences name the file */
  config = *moe_model_config(from_model);
  opt.experts = config.experts;
  for (t = 0; t < n_tasks; ++t) {
    const moe_task *old, *task = &tasks[t].task;
    at = moe_model_find_task(from_model, task->name);
    if (opt.adapt && at >= 0)
      die("%s knows the task %s already: leave --adapt away to fine-tune it", opt.from, task->name);
    if (opt.adapt) continue;
    if (at < 0)
      die("%s does not know the task %s: --tasks chooses others, --adapt lets it join", opt.from,
          task->name);
    old = moe_model_task(from_model, at);
    if (old->kind != task->kind || old->classes != task->classes)
      die("%s knows the task %s with %d outputs; tasks.tsv has another kind or number of labels",
          opt.from, task->name, (int)old->classes);
  }
}

static void make_tokenizer(void) {
  void *block;
  size_t bytes;
  need(moe_tokenizer_size(vocab, vocab_bytes, &bytes, &env));
  block = lasting(bytes + 64, 1);
  need(moe_tokenizer_init(&tokenizer, (char *)block + (64 - ((size_t)block & 63)), bytes, vocab,
                          vocab_bytes, config.cased, &env));
}

static void read_vocab(void) {
  char path[1024];
  void *data;
  size_t i;
  int32_t words = 0;
  if (from_model) { /* what it was trained with, and nothing else */
    const char *text = moe_model_vocab(from_model, &vocab_bytes);
    if (!text) die("%s holds no vocabulary", opt.from);
    vocab = (char *)memcpy(lasting(vocab_bytes + 1, 1), text, vocab_bytes);
    make_tokenizer();
    return;
  }
  if (opt.vocab)
    snprintf(path, sizeof path, "%s", opt.vocab);
  else
    snprintf(path, sizeof path, "%s/vocab.txt", opt.data);
  if (!opt.vocab && opt.init)
    die("--init needs --vocab, the vocabulary that the encoder was trained with");
  need(moe_file_read(&data, &vocab_bytes, path, &env));
  vocab = (char *)memcpy(lasting(vocab_bytes + 1, 1), data, vocab_bytes);
  moe_free(data);
  about = path;
  make_tokenizer();
  about = NULL;
  for (i = 0; i < vocab_bytes; ++i) words += vocab[i] == '\n' || i + 1 == vocab_bytes;
  if (!opt.init)
    config.vocab = words;
  else if (words > config.vocab)
    die("%s has %d words, but %s has room for %d", path, (int)words, opt.init, (int)config.vocab);
}

static void make_config(void) {
  moe_config_init(&config);
  if (opt.from) {
    read_from();
    if (opt.max_len > config.positions)
      die("--max-len %d is more than the %d positions of the encoder", opt.max_len,
          config.positions);
    if (opt.max_len) config.max_len = opt.max_len;
    read_vocab();
    return;
  }
  if (opt.init)
    read_init();
  else {
    config.layers = opt.layers;
    config.hidden = opt.hidden;
    config.ffn = opt.ffn;
    config.heads = opt.heads ? opt.heads : 4;
    config.positions = opt.max_len > 128 ? opt.max_len : 128;
    config.segments = 2;
  }
  if (opt.heads) config.heads = opt.heads;
  if (opt.eps > 0) config.eps = (float)opt.eps;
  if (opt.cased) config.cased = 1;
  config.max_len = opt.max_len ? opt.max_len : config.positions < 128 ? config.positions : 128;
  if (config.max_len > config.positions)
    die("--max-len %d is more than the %d positions of the encoder", config.max_len,
        config.positions);
  config.truncate = !strcmp(opt.truncate, "right") ? MOE_TRUNCATE_RIGHT : MOE_TRUNCATE_LONGEST;
  read_vocab();
}

/* ---- evaluation ---- */

#define EVAL_TOKENS 4096
#define EVAL_ROWS 256

typedef struct scores {
  float *value; /* (n, stride) */
  int32_t stride;
} scores;

/* Rows of one or several tasks as a batch. */
typedef struct batch_buffer {
  moe_batch batch;
  int32_t *ids, *start, *task, *span;
  uint8_t *segments;
  float *label;
  int64_t *index;
  int32_t tokens;
} batch_buffer;

static void batch_make(batch_buffer *b, int32_t tokens, int32_t sequences) {
  memset(b, 0, sizeof *b);
  b->batch.ids = b->ids = (int32_t *)take((size_t)tokens, sizeof *b->ids);
  b->batch.segments = b->segments = (uint8_t *)take((size_t)tokens, 1);
  b->batch.seq_start = b->start = (int32_t *)take((size_t)sequences + 1, sizeof *b->start);
  b->batch.task = b->task = (int32_t *)take((size_t)sequences, sizeof *b->task);
  b->batch.span = b->span = (int32_t *)take((size_t)sequences * 4, sizeof *b->span);
  b->batch.label = b->label = (float *)take((size_t)sequences, sizeof *b->label);
  b->batch.index = b->index = (int64_t *)take((size_t)sequences, sizeof *b->index);
}

static void batch_free(batch_buffer *b) {
  free(b->ids);
  free(b->segments);
  free(b->start);
  free(b->task);
  free(b->span);
  free(b->label);
  free(b->index);
}

static void batch_clear(batch_buffer *b) {
  b->batch.S = 0;
  b->tokens = 0;
  b->start[0] = 0;
}

static void batch_add(batch_buffer *b, const rows *r, int64_t row_number, int32_t task,
                      int64_t index) {
  const row *x = &r->row[row_number];
  int32_t length = (int32_t)(x[1].start - x->start), s = b->batch.S;
  memcpy(b->ids + b->tokens, r->ids + x->start, (size_t)length * sizeof *b->ids);
  memcpy(b->segments + b->tokens, r->segments + x->start, (size_t)length);
  memcpy(b->span + 4 * s, x->span, sizeof x->span);
  b->tokens += length;
  b->task[s] = task;
  b->label[s] = x->label;
  b->index[s] = index;
  b->start[s + 1] = b->tokens;
  ++b->batch.S;
}

static moe_context *make_context(const moe_model *model) {
  moe_limits limits = {EVAL_TOKENS, EVAL_ROWS, 0, 0};
  moe_context *context;
  if (limits.tokens < config.max_len) limits.tokens = config.max_len;
  need(moe_context_create(&context, model, &limits, &env));
  return context;
}

/* Adds the experts that a batch has chosen to routes (L, N). */
static void count_routes(int64_t *routes, const moe_context *context, const moe_batch *batch) {
  int32_t l, i;
  for (l = 0; l < config.layers; ++l) {
    moe_routes of;
    if (moe_context_routes(context, l, &of) != MOE_OK) return;
    for (i = 0; i < batch->seq_start[batch->S] * of.k; ++i)
      ++routes[(int64_t)l * of.N + of.expert[i]];
  }
}

static void score_rows(scores *out, int64_t *routes, moe_context *context, const moe_model *model,
                       const rows *r, int32_t model_task) {
  batch_buffer b;
  int64_t i = 0;
  out->stride = moe_model_max_classes(model);
  out->value = (float *)take((size_t)r->n * (size_t)out->stride, sizeof(float));
  batch_make(&b, EVAL_TOKENS > config.max_len ? EVAL_TOKENS : config.max_len, EVAL_ROWS);
  while (i < r->n) {
    int64_t first = i;
    batch_clear(&b);
    do batch_add(&b, r, i, model_task, i), ++i;
    while (i < r->n && b.batch.S < EVAL_ROWS &&
           b.tokens + (r->row[i + 1].start - r->row[i].start) <= EVAL_TOKENS);
    need(moe_forward(context, out->value + first * out->stride, &b.batch, &env));
    if (routes) count_routes(routes, context, &b.batch);
  }
  batch_free(&b);
}

/* What is said of each row: a class; in a ranking 1 for the choice of a group with the largest
   logit of class 1 (the first of equals), else 0; in a regression the value. */
static void read_answers(float *answer, const moe_task *t, const rows *r, const scores *s) {
  int64_t i, g, n, *order, *begin;
  int32_t c;
  if (t->kind == MOE_KIND_RANKING) {
    n = rows_by_group(&order, &begin, r, t);
    for (g = 0; g < n; ++g) {
      int64_t best = order[begin[g]];
      for (i = begin[g]; i < begin[g + 1]; ++i) {
        answer[order[i]] = 0;
        if (s->value[order[i] * s->stride + 1] > s->value[best * s->stride + 1]) best = order[i];
      }
      answer[best] = 1;
    }
    free(order);
    free(begin);
    return;
  }
  for (i = 0; i < r->n; ++i) {
    const float *v = s->value + i * s->stride;
    int32_t best = 0;
    for (c = 1; c < t->classes; ++c)
      if (v[c] > v[best]) best = c;
    answer[i] = t->kind == MOE_KIND_REGRESSION ? v[0] : (float)best;
  }
}

/* The first of a task's metrics is the one that counts. */
static void metric_name(char *name, const moe_task *t) {
  strcpy(name, t->metrics);
  if (strchr(name, ',')) *strchr(name, ',') = 0;
}

/* Accuracy over the groups of a ranking: each has one row that is right, and one that is chosen. */
static double ranking_accuracy(const int32_t *answer, const int32_t *label, size_t n) {
  size_t i;
  int64_t groups = 0, right = 0;
  for (i = 0; i < n; ++i) {
    groups += answer[i];
    right += answer[i] && label[i] == 1;
  }
  return groups ? (double)right / (double)groups : 0;
}

/* Value of that metric for n answers; *defined becomes 0 where it has none (one class only, say):
   it then counts as 0. */
static double metric(const moe_task *t, const float *answer, const float *label, size_t n,
                     int *defined) {
  int32_t *a = (int32_t *)take(2 * n, sizeof *a), *b = a + n;
  float *scratch = (float *)take(2 * n, sizeof *scratch);
  char name[MOE_NAME_BYTES];
  double v = 0;
  size_t i;
  int ok = 1;
  metric_name(name, t);
  for (i = 0; i < n && t->kind != MOE_KIND_REGRESSION; ++i) {
    a[i] = (int32_t)answer[i];
    b[i] = (int32_t)label[i];
  }
  if (t->kind == MOE_KIND_RANKING && !strcmp(name, "accuracy"))
    v = ranking_accuracy(a, b, n);
  else if (!strcmp(name, "accuracy"))
    v = moe_metric_accuracy(a, b, n, &ok);
  else if (!strcmp(name, "f1"))
    v = moe_metric_f1(a, b, n, &ok);
  else if (!strcmp(name, "macro_f1"))
    v = moe_metric_macro_f1(a, b, n, t->classes, &ok);
  else if (!strcmp(name, "matthews"))
    v = moe_metric_matthews(a, b, n, t->classes, &ok);
  else if (!strcmp(name, "pearson"))
    v = moe_metric_pearson(answer, label, n, &ok);
  else if (!strcmp(name, "spearman"))
    v = moe_metric_spearman(answer, label, n, scratch, &ok);
  else
    die("task %s: there is no metric \"%s\"", t->name, name);
  if (!ok) *defined = 0;
  free(a);
  free(scratch);
  return v;
}

static FILE *prediction_file; /* where evaluate writes the predictions, or NULL */

/* A line for each dev row: task, set (1: dev.tsv, 2: the second one), line of the file, label,
   prediction, scores. */
static void write_predictions(const task_data *t, int set, const rows *r, const scores *s,
                              const float *answer) {
  int64_t i;
  int32_t c;
  for (i = 0; i < r->n; ++i) {
    const float *v = s->value + i * s->stride;
    fprintf(prediction_file, "%s\t%d\t%d\t%.9g\t%.9g\t", t->task.name, set + 1, r->row[i].line,
            (double)r->row[i].label, (double)answer[i]);
    for (c = 0; c < t->task.classes; ++c)
      fprintf(prediction_file, "%s%.9g", c ? " " : "", (double)v[c]);
    fprintf(prediction_file, "\n");
  }
}

static float *labels_of(const rows *r) {
  float *label = (float *)take((size_t)r->n, sizeof *label);
  int64_t i;
  for (i = 0; i < r->n; ++i) label[i] = r->row[i].label;
  return label;
}

/* Where the outcome of an evaluation goes, beside the metric: all may be NULL. */
typedef struct outcome {
  float *answer;   /* of all rows, set after set */
  int64_t *routes; /* (L,N), added to */
  int *defined;
} outcome;

/* Mean of the metric of task t over n_sets sets of rows. */
static double evaluate(moe_context *context, const moe_model *model, const rows *r, int n_sets,
                       int32_t model_task, int t, const outcome *out) {
  double sum = 0;
  int d, ok = 1;
  int64_t at = 0;
  for (d = 0; d < n_sets; ++d) {
    float *label = labels_of(&r[d]), *answer = (float *)take((size_t)r[d].n, sizeof *answer);
    scores s;
    score_rows(&s, out ? out->routes : NULL, context, model, &r[d], model_task);
    read_answers(answer, &tasks[t].task, &r[d], &s);
    sum += metric(&tasks[t].task, answer, label, (size_t)r[d].n, &ok);
    if (out && prediction_file) write_predictions(&tasks[t], d, &r[d], &s, answer);
    if (out && out->answer) memcpy(out->answer + at, answer, (size_t)r[d].n * sizeof *answer);
    at += r[d].n;
    free(label);
    free(answer);
    free(s.value);
  }
  if (out && out->defined) *out->defined = ok;
  return sum / n_sets;
}

/* What the same answer to every row scores (the most frequent class; for F1, class 1; in a ranking
   any choice), and the standard error of such a score: a table's yardstick. 0 for correlations. */
static double chance(const task_data *t, double *error) {
  int64_t count[2][MOE_MAX_CLASSES], i, best = 0, n;
  char name[MOE_NAME_BYTES];
  double value = 0, square = 0;
  int d, c, correlation;
  metric_name(name, &t->task);
  correlation = !strcmp(name, "matthews") || !strcmp(name, "pearson") || !strcmp(name, "spearman");
  memset(count, 0, sizeof count);
  for (d = 0; d < t->n_dev && !correlation; ++d)
    for (i = 0; i < t->dev[d].n; ++i) ++count[d][(int)t->dev[d].row[i].label];
  for (c = 1; c < t->task.classes; ++c)
    if (count[0][c] + count[1][c] > count[0][best] + count[1][best]) best = c;
  if (!strcmp(name, "f1") || t->task.kind == MOE_KIND_RANKING)
    best = 1; /* in a ranking that is groups by rows */
  for (d = 0; d < t->n_dev; ++d) {
    double p, v, slope = 1;
    n = t->dev[d].n;
    p = v = (double)count[d][best] / (double)n;
    if (t->task.kind == MOE_KIND_RANKING) n = count[d][1];
    if (strstr(name, "f1")) {
      double share = !strcmp(name, "f1") ? 1 : 1.0 / t->task.classes;
      v = share * 2 * p / (1 + p);
      slope = share * 2 / ((1 + p) * (1 + p));
    }
    value += v / t->n_dev;
    square +=
        correlation ? 1.0 / (double)(n > 1 ? n - 1 : 1) : slope * slope * p * (1 - p) / (double)n;
  }
  *error = sqrt(square) / t->n_dev;
  return value;
}

/* ---- what is finished ---- */

/* A finished piece of the work: one task of a run of the first stage, or one pair of --grid in the
   second stage. Of a run that trains tasks together the first task's part has the costs, the others
   have none. */
typedef struct part {
  char *name;
  int task;
  double value, score; /* the metric on dev, and what the epoch was chosen by */
  double tokens, seconds, steps, parameters;
  int defined;     /* 0: the metric has no value, and counts as 0 */
  int64_t *routes; /* (L,N) tokens of dev that each expert got, or NULL */
  float *answer;   /* of each dev row, set after set */
} part;

typedef struct result {
  int system, seed;
  const part **part; /* (T); NULL: not finished */
  double tokens, seconds, steps, parameters;
} result;

static result *results;
static int n_results, n_runs, given_argc;
static char **given_argv;
static part **finished;
static int n_finished;

static int64_t dev_rows(const task_data *t) {
  return t->dev[0].n + (t->n_dev > 1 ? t->dev[1].n : 0);
}

static uint64_t fold(uint64_t h, uint64_t v) { return (h ^ v) * 0x100000001b3u ^ (h >> 29); }

static uint64_t fold_bytes(uint64_t h, const void *data, size_t bytes) {
  size_t i;
  for (i = 0; i + 8 <= bytes; i += 8) {
    uint64_t word;
    memcpy(&word, (const char *)data + i, 8);
    h = fold(h, word);
  }
  return h;
}

/* Of every row that is trained on or asked, and of the weights that training begins with. */
static uint64_t data_fingerprint(void) {
  uint64_t h = fold_bytes(1, init_file, init_bytes);
  int64_t k;
  int t, part_number;
  for (t = 0; t < n_tasks; ++t)
    for (part_number = 0; part_number < 4; ++part_number) {
      const task_data *d = &tasks[t];
      const rows *r = part_number == 0   ? &d->train
                      : part_number == 1 ? &d->held
                                         : &d->dev[part_number - 2];
      h = fold(h, (uint64_t)r->n);
      for (k = 0; k < r->n; ++k)
        h = fold(fold(h, r->row[k].hash), (uint64_t)(int64_t)(r->row[k].label * 1000));
    }
  if (from_model && moe_model_weights(from_model))
    h = fold_bytes(h, moe_model_weights(from_model),
                   moe_model_parameters(from_model) * sizeof(float));
  return h;
}

/* The bits of bf16 on AMX are its own. */
static const char *precision_name(void) {
  if (env.precision != MOE_TYPE_BF16) return "fp32";
  return env.cpu_flags & MOE_CPU_AMX_BF16 ? "bf16 on AMX" : "bf16";
}

/* All options that have a say in the results, but for those that name a part: systems, seeds,
   --grid, --gate-from and --rows. */
static const char *options_text(void) {
  static char *text;
  size_t room = 4096 + 96 * (size_t)n_tasks, at;
  int t;
  if (text) return text;
  text = (char *)lasting(room, 1);
  at = (size_t)snprintf(
      text, room,
      "epochs=%d steps=%d batch=%d lr=%.9g warmup=%.9g decay=%.9g clip=%.9g dropout=%.9g "
      "sampling=%s order=%s balance=%.9g z_loss=%.9g jitter=%.9g "
      "max_len=%d truncate=%s hold_out=%.9g gate_lr=%.9g layers=%d hidden=%d ffn=%d heads=%d "
      "eps=%.9g cased=%d vocab=%d rank=%d experts=%d top_k=%d "
      "gate_scale=%s renormalize=%d noise=%.9g fine_tune=%d fine_batch=%d fine_epoch=%d "
      "patience=%d adapt=%.64s "
      "data=%016llx tasks=",
      opt.epochs, opt.steps, opt.batch, opt.rate, opt.warmup, opt.decay, opt.clip, opt.dropout,
      opt.sampling, opt.order, opt.balance, opt.z_loss, opt.jitter, config.max_len, opt.truncate,
      opt.hold_out, opt.gate_rate, config.layers, config.hidden, config.ffn, config.heads,
      (double)config.eps, config.cased, config.vocab, opt.rank, opt.experts, opt.top_k,
      opt.gate_scale, opt.renormalize, opt.noise, opt.fine_tune, opt.fine_batch, opt.fine_epoch,
      opt.patience, opt.adapt ? opt.adapt : "", (unsigned long long)data_fingerprint());
  for (t = 0; t < n_tasks && at < room; ++t)
    at += (size_t)snprintf(text + at, room - at, "%s:%lld,", tasks[t].task.name,
                           (long long)tasks[t].train.n);
  if (env.precision == MOE_TYPE_BF16 && at < room)
    snprintf(text + at, room - at, " precision=%s", precision_name());
  return text;
}

static part *find_part(const char *name) {
  int i;
  for (i = 0; i < n_finished; ++i)
    if (!strcmp(finished[i]->name, name)) return finished[i];
  return NULL;
}

static void part_path(char *path, size_t size, const char *checkpoint) {
  snprintf(path, size, "%s.results", checkpoint);
}

static void free_part(part *p) {
  free(p->name);
  free(p->routes);
  free(p->answer);
  free(p);
}

static part *new_part(const char *name, int t) {
  part *p = (part *)take(1, sizeof *p);
  p->name = (char *)memcpy(take(strlen(name) + 1, 1), name, strlen(name));
  p->task = t;
  p->answer = (float *)take((size_t)dev_rows(&tasks[t]), sizeof *p->answer);
  p->defined = 1;
  return p;
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

static void write_file(const char *path, void (*print)(FILE *f)) {
  FILE *f = tmpfile();
  if (!f) die("cannot write a temporary file: %s", strerror(errno));
  print(f);
  if (fflush(f) || ferror(f)) die("cannot write a temporary file: %s", strerror(errno));
  need(moe_file_replace(path, copy_file, f, &env));
  fclose(f);
}

/* A line of the options, then a line for each part. */
static void print_parts(FILE *f) {
  int i, k;
  int64_t j;
  fprintf(f, "options\t%s\n", options_text());
  for (i = 0; i < n_finished; ++i) {
    const part *p = finished[i];
    fprintf(f, "%s\t%d\t%.17g\t%.17g\t%d\t%.17g\t%.3f\t%.17g\t%.17g\t", p->name, p->task, p->value,
            p->score, p->defined, p->tokens, p->seconds, p->steps, p->parameters);
    for (k = 0; p->routes && k < config.layers * opt.experts; ++k)
      fprintf(f, "%s%lld", k ? " " : "", (long long)p->routes[k]);
    fputc('\t', f);
    for (j = 0; j < dev_rows(&tasks[p->task]); ++j)
      fprintf(f, "%s%.9g", j ? " " : "", (double)p->answer[j]);
    fputc('\n', f);
  }
}

static void write_parts(const char *checkpoint) {
  char path[1056];
  part_path(path, sizeof path, checkpoint);
  write_file(path, print_parts);
}

/* A part joins those that are finished, unless it was done again for its model. */
static void join_part(part *p) {
  if (find_part(p->name)) {
    free_part(p);
    return;
  }
  finished = (part **)grow(finished, (size_t)n_finished + 1, sizeof *finished);
  finished[n_finished++] = p;
}

/* Numbers with blanks between them; dies unless there are n. */
static void read_numbers(const tsv *f, char *text, int64_t n, int64_t *whole_to, float *to) {
  int64_t i;
  for (i = 0; i < n; ++i) {
    char *end;
    double v = strtod(text, &end);
    if (end == text || (whole_to && !(v >= 0 && v < 9e15))) break;
    if (to)
      to[i] = (float)v;
    else
      whole_to[i] = (int64_t)v;
    text = end;
  }
  if (i < n || *text)
    die("%s:%d: expected %lld numbers in a field, there are %s", f->path, f->line, (long long)n,
        i < n ? "fewer or others" : "more");
}

/* What an earlier process has finished; nothing, where there is no such file. */
static void read_parts(const char *checkpoint) {
  char path[1056], *line, *field[11];
  tsv f;
  part_path(path, sizeof path, checkpoint);
  if (!tsv_open(&f, path, 1)) return;
  if (f.columns != 2 || strcmp(f.column[0], "options"))
    die("%s:1: this is no file of results", path);
  if (strcmp(f.column[1], options_text()))
    die("%s was made with other options:\n  there %s\n  here  %s", checkpoint, f.column[1],
        options_text());
  f.columns = 11;
  while ((line = tsv_line(&f)) != NULL) {
    part *p;
    int task;
    int64_t j;
    if (!strncmp(line, "options\t", 8)) { /* several files, one behind the other */
      if (strcmp(line + 8, options_text()))
        die("%s:%d: made with other options than the first line", path, f.line);
      continue;
    }
    tsv_fields(&f, line, field);
    task = field_whole(&f, "task", field[1]);
    if (task < 0 || task >= n_tasks) die("%s:%d: there is no task %d", path, f.line, task);
    p = new_part(field[0], task);
    p->value = strtod(field[2], NULL);
    p->score = strtod(field[3], NULL);
    p->defined = field_whole(&f, "defined", field[4]);
    p->tokens = strtod(field[5], NULL);
    p->seconds = strtod(field[6], NULL);
    p->steps = strtod(field[7], NULL);
    p->parameters = strtod(field[8], NULL);
    if (*field[9]) {
      p->routes = (int64_t *)take((size_t)config.layers * (size_t)opt.experts, sizeof *p->routes);
      read_numbers(&f, field[9], (int64_t)config.layers * opt.experts, p->routes, NULL);
    }
    read_numbers(&f, field[10], dev_rows(&tasks[task]), NULL, p->answer);
    for (j = 0; j < dev_rows(&tasks[task]) && tasks[task].task.kind != MOE_KIND_REGRESSION; ++j)
      if (!(p->answer[j] >= 0 && p->answer[j] < (float)tasks[task].task.classes))
        die("%s:%d: an answer is no class of the task", path, f.line);
    join_part(p);
  }
  free(f.text);
  if (n_finished)
    fprintf(stderr, "%d finished part%s in %s\n", n_finished, n_finished == 1 ? "" : "s", path);
}

static int exists(const char *path) {
  FILE *f = fopen(path, "rb");
  if (f) fclose(f);
  return f != NULL;
}

/* FILE-SUFFIX with the ending kept. */
static void with_suffix(char *out, size_t size, const char *file, const char *suffix) {
  const char *dot = strrchr(file, '.'), *slash = strrchr(file, '/');
  int stem = (int)(dot && (!slash || dot > slash) ? dot - file : (long)strlen(file)), n;
  n = snprintf(out, size, "%.*s-%s%s", stem, file, suffix, file + stem);
  if (n < 0 || (size_t)n >= size) die("the name %s is too long", file);
}

/* FILE, or with several runs FILE-SYSTEM-SEED with the ending kept; a run of one task adds the
   task. */
static void run_path(char *out, size_t size, const char *file, int system, int seed,
                     const char *task) {
  char suffix[128];
  snprintf(suffix, sizeof suffix, "%s-%d%s%.63s", system_name[system], seed, task ? "-" : "",
           task ? task : "");
  if (n_runs > 1 || (task && n_tasks > 1))
    with_suffix(out, size, file, suffix);
  else if (snprintf(out, size, "%s", file) >= (int)size)
    die("the name %s is too long", file);
}

/* 1 where the file of this option, asked for, is missing: then a part is done again although its
   results are there. */
static int file_missing(const char *option_value, int system, int seed, const char *task) {
  char path[1024];
  if (!option_value || opt.report) return 0;
  run_path(path, sizeof path, option_value, system, seed, task);
  return !exists(path);
}

static const char *checkpoint_name(void) {
  return opt.checkpoint ? opt.checkpoint : "checkpoint.safetensors";
}

/* ---- one training ---- */

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
  (void)signal_number;
  interrupted = 1;
}

static double now(void) {
#if defined(CLOCK_MONOTONIC)
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
  return (double)clock() / CLOCKS_PER_SEC;
#endif
}

/* A training of one model: what it is given, then how it went. */
typedef struct job {
  const char *name;  /* of the part, or of the run: a checkpoint of another is not gone on from */
  const char *title; /* shown */
  char path[1024];   /* the checkpoint, written with --checkpoint or when interrupted */
  char from[1024];   /* the one to go on from; "": from the start */
  const moe_model *keeper; /* the second stage: the first stage's model, to be kept in keep_path
                              when interrupted */
  char keep_path[1056];
  const int *which; /* (n) tasks of the table */
  int n, second, seed, batch, choose, patience,
      keep; /* choose: keep the best epoch; keep: models on the way */
  int64_t steps, epoch;
  double rate, warmup;
  moe_trainer *trainer;
  moe_sampler sampler;
  int64_t *n_rows, *used; /* (n) */
  float *best;            /* weights of the best epoch so far, NULL: none has ended */
  int64_t best_step;
  double score, tokens, seconds, first_tokens; /* tokens of earlier processes */
  int best_unsaved;
} job;

typedef struct progress {
  double began, last;
  int64_t first;
  float loss;
  int moving;
} progress;

static void show_progress(progress *p, const job *j, int64_t step, int end) {
  double t = now(), seconds = t - p->began;
  int64_t left = (int64_t)(seconds / (double)(step - p->first + (step == p->first)) *
                           (double)(j->steps - step));
  if (!end && p->moving && t - p->last < 0.2) return;
  if (!end && !p->moving && t - p->last < 30) return;
  p->last = t;
  fprintf(stderr, "%s%-34s step %lld/%lld  loss %.4f  %.0f tokens/s  %lld:%02lld left %s",
          p->moving ? "\r" : "", j->title, (long long)step, (long long)j->steps, (double)p->loss,
          (j->tokens - j->first_tokens) / (seconds > 0 ? seconds : 1), (long long)(left / 60),
          (long long)(left % 60), p->moving && !end ? "  " : "\n");
}

static void set_sampling(moe_sampler_config *c, int seed, int64_t draws) {
  memset(c, 0, sizeof *c);
  c->seed = (uint64_t)seed;
  c->draws = draws;
  c->tau = 1;
  c->in_order = !strcmp(opt.order, "file");
  if (!strcmp(opt.sampling, "natural"))
    c->sampling = MOE_SAMPLING_NATURAL;
  else if (!strcmp(opt.sampling, "uniform"))
    c->sampling = MOE_SAMPLING_UNIFORM;
  else if (!strcmp(opt.sampling, "uniform-natural"))
    c->sampling = MOE_SAMPLING_UNIFORM_NATURAL;
  else if (!strncmp(opt.sampling, "temperature:", 12)) {
    c->sampling = MOE_SAMPLING_TEMPERATURE;
    c->tau = (float)number("--sampling temperature:T", opt.sampling + 12, 1e-3, 1e6);
  } else
    die("--sampling is natural, uniform, temperature:T or uniform-natural, not \"%s\"",
        opt.sampling);
}

static void set_training(moe_train_config *tc, const job *j) {
  static moe_param_group gates[2] = {{".gate.", 1, 1}, {"tasks.vectors", 1, 1}};
  moe_train_config_init(tc);
  tc->lr = (float)j->rate;
  tc->warmup = (float)j->warmup;
  tc->steps = j->steps;
  tc->weight_decay = (float)opt.decay;
  tc->clip_norm = (float)opt.clip;
  tc->dropout = (float)opt.dropout;
  tc->balance = (float)opt.balance;
  tc->z_loss = (float)opt.z_loss;
  tc->jitter = (float)opt.jitter;
  tc->seed = (uint64_t)j->seed;
  gates[0].lr_scale = gates[1].lr_scale = (float)opt.gate_rate;
  tc->groups = gates;
  tc->n_groups = opt.gate_rate < 1 || opt.gate_rate > 1 ? 2 : 0;
}

/* One optimizer step: draws a super-batch and runs it in micro-batches. */
static float train_step(job *j, batch_buffer *b, int32_t room) {
  float sum = 0, loss;
  int i;
  batch_clear(b);
  for (i = 0; i <= j->batch; ++i) {
    int32_t task = 0;
    int64_t drawn = 0, length = 0;
    const rows *r = NULL;
    if (i < j->batch) {
      moe_sampler_next(&j->sampler, &task, &drawn);
      r = &tasks[j->which[task]].train;
      length = r->row[drawn + 1].start - r->row[drawn].start;
    }
    if (b->batch.S && (i == j->batch || b->tokens + length > room)) {
      moe_status status =
          moe_trainer_accumulate(j->trainer, &b->batch, j->batch, &loss, NULL, &env);
      if (status != MOE_OK)
        die("training stopped in step %lld (%s); try a smaller --lr",
            (long long)moe_trainer_steps_done(j->trainer) + 1, moe_status_text(status));
      sum += loss;
      j->tokens += b->tokens;
      batch_clear(b);
    }
    if (r) batch_add(b, r, drawn, task, i);
  }
  if (moe_trainer_step(j->trainer, NULL, &env) != MOE_OK)
    die("training stopped in step %lld; try a smaller --lr",
        (long long)moe_trainer_steps_done(j->trainer) + 1);
  return sum;
}

/* The note of a checkpoint has three lines: whose it is, the options, and how far it has come. */
static char *make_note(const job *j) {
  size_t room = strlen(j->name) + strlen(options_text()) + 256;
  char *note = (char *)take(room, 1);
  snprintf(note, room, "%s\n%s\nbest %.17g at %lld, tokens %.0f", j->name, options_text(), j->score,
           (long long)j->best_step, j->tokens);
  return note;
}

static void best_path(char *path, size_t size, const char *checkpoint) {
  snprintf(path, size, "%s.best", checkpoint);
}

/* The best epoch's weights are kept beside the checkpoint, written before it: killed between the
   two, that file is ahead, but the epoch that it is of comes again and takes its place with the
   same weights. */
static void best_load(job *j, const moe_model *model) {
  char path[1056];
  size_t count = moe_model_parameters(model);
  moe_model *old;
  if (!j->best_step) return;
  best_path(path, sizeof path, j->from);
  need(moe_model_load(&old, path, &env));
  if (moe_model_parameters(old) != count)
    die("%s has %zu parameters; expected %zu", path, moe_model_parameters(old), count);
  j->best =
      (float *)memcpy(take(count, sizeof(float)), moe_model_weights(old), count * sizeof(float));
  j->best_unsaved = 1;
  moe_model_free(old);
}

static void best_save(job *j, moe_model *model) {
  char path[1056];
  size_t count = moe_model_parameters(model), i;
  float *now_there = moe_model_weights(model);
  int pass;
  best_path(path, sizeof path, j->path);
  if (!j->best) remove(path); /* of another run */
  if (!j->best_unsaved) return;
  for (pass = 0; pass < 2; ++pass) {
    for (i = 0; i < count; ++i) {
      float w = now_there[i];
      now_there[i] = j->best[i];
      j->best[i] = w;
    }
    if (!pass) need(moe_model_save(model, path, &env));
  }
  j->best_unsaved = 0;
}

/* Goes on from a checkpoint, if there is one of this job. */
static void go_on(job *j, moe_model *model) {
  char *old, *line[3], *mine, *my_line[3];
  void *data;
  size_t bytes, length;
  int lines;
  if (!*j->from) return;
  if (!exists(j->from)) { /* of several runs some have not begun */
    if (!n_finished && !strcmp(j->from, opt.resume))
      die("cannot open %s: %s", j->from, strerror(errno));
    if (!j->second) fprintf(stderr, "there is no %s: %s begins anew\n", j->from, j->title);
    return;
  }
  need(moe_file_read(&data, &bytes, j->from, &env));
  about = j->from;
  need(moe_checkpoint_note(NULL, 0, &length, data, bytes, &env));
  old = (char *)take(length + 1, 1);
  need(moe_checkpoint_note(old, length + 1, &length, data, bytes, &env));
  mine = make_note(j);
  split(mine, '\n', my_line, 3);
  lines = split(old, '\n', line, 3);
  if (lines != 3 || strcmp(line[0], my_line[0]) || strcmp(line[1], my_line[1])) {
    if (!j->second || lines != 3 || !strcmp(line[0], my_line[0]))
      die("%s was made with other options:\n  there %s, %s\n  here  %s, %s", j->from, line[0],
          lines == 3 ? line[1] : "no note of this program", my_line[0], my_line[1]);
  } else {
    long long at;
    need(moe_checkpoint_read(j->trainer, &j->sampler, data, bytes, &env));
    if (sscanf(line[2], "best %lf at %lld, tokens %lf", &j->score, &at, &j->first_tokens) != 3)
      die("%s has a damaged note", j->from);
    j->best_step = at;
    j->tokens = j->first_tokens;
    fprintf(stderr, "going on from %s at step %lld\n", j->from,
            (long long)moe_trainer_steps_done(j->trainer));
    best_load(j, model);
  }
  about = NULL;
  moe_free(data);
  free(old);
  free(mine);
}

/* One argument as a shell reads it again. */
static void print_argument(FILE *f, const char *s) {
  if (*s && strspn(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-+=:,./@%") ==
                strlen(s)) {
    fprintf(f, " %s", s);
    return;
  }
  fputs(" '", f);
  for (; *s; ++s) {
    if (*s == '\'')
      fputs("'\\''", f);
    else
      fputc(*s, f);
  }
  fputc('\'', f);
}

static void write_state(job *j, moe_model *model) {
  char *note = make_note(j);
  if (j->choose) best_save(j, model);
  need(moe_checkpoint_save(j->trainer, &j->sampler, note, j->path, &env));
  free(note);
}

/* After Ctrl-C: says where the state is and how to go on. */
static void stop_here(job *j, moe_model *model) {
  int i;
  write_state(j, model);
  if (n_finished) write_parts(checkpoint_name());
  if (j->keeper && (!opt.checkpoint || !exists(j->keep_path)))
    need(moe_model_save(j->keeper, j->keep_path, &env));
  fprintf(stderr, "\ninterrupted after step %lld; the state is in %s. To go on:\n ",
          (long long)moe_trainer_steps_done(j->trainer), j->path);
  for (i = 0; i < given_argc; ++i) {
    if (!strcmp(given_argv[i], "--resume")) {
      ++i;
      continue;
    }
    print_argument(stderr, given_argv[i]);
  }
  fputs(" --resume", stderr);
  print_argument(stderr, checkpoint_name());
  fputc('\n', stderr);
  exit(130);
}

/* Mean of the tasks' metrics on the rows that choose the epoch: held out of train, or else dev. */
static double choosing_score(const job *j, moe_context *context, const moe_model *model) {
  double sum = 0;
  int i;
  for (i = 0; i < j->n; ++i) {
    const task_data *d = &tasks[j->which[i]];
    sum += evaluate(context, model, opt.hold_out > 0 ? &d->held : d->dev,
                    opt.hold_out > 0 ? 1 : d->n_dev, i, j->which[i], NULL);
  }
  return sum / j->n;
}

/* Takes the weights if they score better than what is kept. */
static void best_offer(job *j, moe_context *context, moe_model *model) {
  double score = choosing_score(j, context, model);
  size_t count = moe_model_parameters(model);
  if (j->best && !(score > j->score)) return;
  if (!j->best) j->best = (float *)take(count, sizeof(float));
  memcpy(j->best, moe_model_weights(model), count * sizeof(float));
  j->score = score;
  j->best_step = moe_trainer_steps_done(j->trainer);
  j->best_unsaved = 1;
}

/* --keep: the model on its way, for a picture of how routes develop. */
static void keep_model(const job *j, const moe_model *model, int64_t step) {
  char path[1056], suffix[32];
  int64_t k;
  for (k = 1; k <= j->keep; ++k)
    if (step == (j->steps * k + j->keep - 1) / j->keep) {
      snprintf(suffix, sizeof suffix, "step%lld", (long long)step);
      with_suffix(path, sizeof path, j->path, suffix);
      need(moe_model_save(model, path, &env));
      return;
    }
}

static void train_loop(job *j, moe_model *model, moe_context *context, batch_buffer *b,
                       int32_t room) {
  progress p;
  p.moving = isatty(fileno(stderr));
  p.began = p.last = now();
  p.first = moe_trainer_steps_done(j->trainer);
  p.loss = 0;
  while (moe_trainer_steps_done(j->trainer) < j->steps) {
    int64_t step = moe_trainer_steps_done(j->trainer);
    int end;
    if (j->best && (step - j->best_step) / j->epoch >= j->patience) break;
    p.loss = train_step(j, b, room);
    ++step;
    end = step == j->steps;
    if (j->choose && (step % j->epoch == 0 || end)) best_offer(j, context, model);
    end |= j->best && (step - j->best_step) / j->epoch >= j->patience;
    show_progress(&p, j, step, end);
    if (j->keep) keep_model(j, model, step);
    if (interrupted) stop_here(j, model);
    if (opt.checkpoint && (step % opt.every == 0 || (end && !j->second))) write_state(j, model);
  }
  j->seconds = now() - p.began;
  /* of a run that went on: as if the steps before had been as fast */
  if (j->tokens > j->first_tokens) j->seconds *= j->tokens / (j->tokens - j->first_tokens);
}

/* Trains the model to the end, or to its best epoch. */
static void train_model(job *j, moe_model *model) {
  moe_train_config tc;
  moe_limits limits;
  moe_sampler_config sc;
  moe_context *context = j->choose ? make_context(model) : NULL;
  batch_buffer b;
  int i;
  int32_t room = opt.micro_batch > config.max_len ? opt.micro_batch : config.max_len;
  if ((int64_t)j->batch * config.max_len < room) room = j->batch * config.max_len;
  j->n_rows = (int64_t *)take((size_t)j->n, sizeof *j->n_rows);
  j->used = (int64_t *)take((size_t)j->n, sizeof *j->used);
  for (i = 0; i < j->n; ++i) j->n_rows[i] = tasks[j->which[i]].train.n;
  memset(&limits, 0, sizeof limits);
  limits.tokens = room;
  limits.sequences = j->batch < room ? j->batch : room;
  limits.training = 1;
  set_training(&tc, j);
  need(moe_trainer_create(&j->trainer, model, &limits, &tc, &env));
  set_sampling(&sc, j->seed, j->steps * j->batch);
  need(moe_sampler_init(&j->sampler, &sc, j->n_rows, j->used, j->n, &env));
  go_on(j, model);
  batch_make(&b, room, limits.sequences);
  train_loop(j, model, context, &b, room);
  moe_trainer_free(j->trainer);
  if (j->best) {
    memcpy(moe_model_weights(model), j->best, moe_model_parameters(model) * sizeof(float));
    need(moe_model_pack(model, NULL, &env));
    free(j->best);
  }
  moe_context_free(context);
  batch_free(&b);
  free(j->n_rows);
  free(j->used);
}

/* ---- the first stage ---- */

static moe_model *make_model(int system, int seed, const int *which, int n) {
  moe_task *list = (moe_task *)take((size_t)n, sizeof *list);
  moe_import_options import;
  moe_config c = config;
  moe_model *model;
  int i;
  for (i = 0; i < n; ++i) list[i] = tasks[which[i]].task;
  if (system >= SWITCH) {
    c.router = system == TAG     ? MOE_ROUTER_TASK
               : system == EMBED ? MOE_ROUTER_EMBEDDING
                                 : MOE_ROUTER_SHARED;
    c.rank = opt.rank;
    c.experts = opt.experts;
    c.top_k = opt.top_k;
    c.gate_scale_n = !strcmp(opt.gate_scale, "n");
    c.renormalize = opt.renormalize;
  } else {
    c.router = MOE_ROUTER_DENSE;
    c.experts = c.top_k = 1;
    c.gate_scale_n = c.renormalize = 0;
  }
  need(moe_model_create(&model, &c, list, n, (uint64_t)seed, &env));
  need(moe_model_set_vocab(model, vocab, vocab_bytes, &env));
  if (opt.init) {
    import.noise = (float)opt.noise;
    import.seed = (uint64_t)seed;
    about = opt.init;
    need(moe_model_import(model, init_file, init_bytes, &import, &env));
    about = NULL;
  }
  free(list);
  return model;
}

static moe_model *first_stage; /* what the second stage goes on from */

static char prediction_path[1024];

static void open_predictions(int system, int seed, const char *suffix) {
  if (!opt.predictions) return;
  run_path(prediction_path, sizeof prediction_path, opt.predictions, system, seed, suffix);
  prediction_file = tmpfile();
  if (!prediction_file) die("cannot write a temporary file: %s", strerror(errno));
  fprintf(prediction_file, "task\tset\tline\tlabel\tprediction\tscores\n");
}

static void close_predictions(void) {
  if (!prediction_file) return;
  if (fflush(prediction_file) || ferror(prediction_file))
    die("cannot write a temporary file: %s", strerror(errno));
  need(moe_file_replace(prediction_path, copy_file, prediction_file, &env));
  fclose(prediction_file);
  prediction_file = NULL;
}

/* The vectors that MT-Embed has learned, a line for each task. */
static void print_vectors(moe_model *model, int seed) {
  moe_tensor t;
  int i, j;
  moe_model_tensor(model, moe_model_find_tensor(model, "tasks.vectors"), &t);
  printf("\nTask vectors of MT-Embed (seed %d)\n", seed);
  for (i = 0; i < t.shape[0]; ++i) {
    printf("%-15.15s", moe_model_task(model, i)->name);
    for (j = 0; j < t.shape[1]; ++j)
      printf(" %8.4f", (double)moe_model_weights(model)[t.offset + (size_t)(i * t.shape[1] + j)]);
    printf("\n");
  }
}

static void part_name(char *name, size_t size, int system, int seed, int t) {
  snprintf(name, size, "%s %d %s", system_name[system], seed, tasks[t].task.name);
}

/* The model is asked about the dev rows of task t. */
static part *evaluate_part(const char *name, moe_context *context, const moe_model *model,
                           int32_t model_task, int t, int routes) {
  part *p = new_part(name, t);
  outcome out;
  if (routes && moe_model_config(model)->experts > 1)
    p->routes = (int64_t *)take((size_t)config.layers * (size_t)opt.experts, sizeof *p->routes);
  out.answer = p->answer;
  out.routes = p->routes;
  out.defined = &p->defined;
  p->value = evaluate(context, model, tasks[t].dev, tasks[t].n_dev, model_task, t, &out);
  return p;
}

static void add_cost(part *p, const job *j, const moe_model *model) {
  p->score = j->score;
  p->tokens = j->tokens;
  p->seconds = j->seconds;
  p->steps = (double)(j->second ? j->best_step : j->steps);
  p->parameters = (double)moe_model_parameters(model);
}

static int64_t steps_for(int64_t n_rows, int64_t of_rows) {
  int64_t steps = opt.epochs ? (n_rows * opt.epochs + opt.batch - 1) / opt.batch
                             : (opt.steps * n_rows + of_rows - 1) / of_rows;
  return steps < 1 ? 1 : steps;
}

static void remove_checkpoint(const char *path) {
  char best[1056];
  best_path(best, sizeof best, path);
  remove(path);
  remove(best);
}

/* Trains one model on n tasks and keeps the parts of those tasks. The model is the caller's. */
static moe_model *train_run(int system, int seed, const int *which, int n, const char *alone) {
  moe_model *model = make_model(system, seed, which, n);
  moe_context *context;
  job j;
  part **done;
  char name[160], title[160], path[1024];
  int64_t rows_here = 0, rows_all = 0;
  int i;
  memset(&j, 0, sizeof j);
  part_name(name, sizeof name, system, seed, which[0]);
  if (!alone) snprintf(name, sizeof name, "%s %d", system_name[system], seed);
  snprintf(title, sizeof title, "%s%s%.40s seed %d", system_title[system], alone ? " " : "",
           alone ? alone : "", seed);
  for (i = 0; i < n; ++i) rows_here += tasks[which[i]].train.n;
  for (i = 0; i < n_tasks; ++i) rows_all += tasks[i].train.n;
  j.name = name;
  j.title = title;
  j.which = which;
  j.n = n;
  j.seed = seed;
  j.batch = opt.batch;
  j.steps = steps_for(rows_here, rows_all);
  j.epoch = (rows_here + opt.batch - 1) / opt.batch;
  j.choose = opt.hold_out > 0;
  j.patience = 2147483647;
  j.rate = opt.rate;
  j.warmup = opt.warmup;
  j.keep = opt.keep;
  run_path(j.path, sizeof j.path, checkpoint_name(), system, seed, alone);
  if (opt.resume) run_path(j.from, sizeof j.from, opt.resume, system, seed, alone);
  train_model(&j, model);
  context = make_context(model);
  open_predictions(system, seed, alone);
  done = (part **)take((size_t)n, sizeof *done);
  for (i = 0; i < n; ++i) {
    part_name(name, sizeof name, system, seed, which[i]);
    done[i] = evaluate_part(name, context, model, i, which[i], 1);
  }
  close_predictions();
  if (opt.save) {
    run_path(path, sizeof path, opt.save, system, seed, alone);
    need(moe_model_save(model, path, &env));
  }
  add_cost(done[0], &j, model);
  for (i = 0; i < n; ++i) join_part(done[i]);
  if (opt.checkpoint) write_parts(opt.checkpoint);
  free(done);
  moe_context_free(context);
  if (system == EMBED) print_vectors(model, seed);
  if (opt.tidy && opt.checkpoint && !opt.fine_tune) remove_checkpoint(j.path);
  return model;
}

static const part *result_part(const result *r, int t) {
  char name[160];
  part_name(name, sizeof name, r->system, r->seed, t);
  return find_part(name);
}

static void add_part(result *r, const part *p) {
  r->tokens += p->tokens;
  r->seconds += p->seconds;
  r->steps += p->steps;
  r->parameters += p->parameters;
}

/* The first stage of one system and seed, or what is missing of it. */
static void run_first(result *r) {
  int *all = (int *)take((size_t)n_tasks, sizeof *all), t,
      missing = file_missing(opt.save, r->system, r->seed, NULL) ||
                file_missing(opt.predictions, r->system, r->seed, NULL);
  for (t = 0; t < n_tasks; ++t) {
    const char *name = tasks[t].task.name;
    all[t] = t;
    r->part[t] = result_part(r, t);
    if (r->system == SINGLE && !opt.report &&
        (!r->part[t] || file_missing(opt.save, SINGLE, r->seed, name) ||
         file_missing(opt.predictions, SINGLE, r->seed, name)))
      moe_model_free(train_run(SINGLE, r->seed, &t, 1, name));
    missing |= !r->part[t];
    r->part[t] = result_part(r, t);
  }
  if (missing && r->system != SINGLE && !opt.report)
    first_stage = train_run(r->system, r->seed, all, n_tasks, NULL);
  for (t = 0; t < n_tasks; ++t) {
    r->part[t] = result_part(r, t);
    if (r->part[t]) add_part(r, r->part[t]);
  }
  free(all);
}

/* The model that the second stage of this system and seed begins with: just trained, or that of an
   earlier process, or trained again. */
static const moe_model *first_model(const result *r) {
  char path[1024], best[1056];
  int *all, t;
  if (from_model) return from_model;
  if (first_stage) return first_stage;
  if (opt.resume) {
    run_path(path, sizeof path, opt.resume, r->system - TUNED, r->seed, NULL);
    best_path(best, sizeof best, path);
    if (exists(opt.hold_out > 0 ? best : path)) {
      need(moe_model_load(&first_stage, opt.hold_out > 0 ? best : path, &env));
      return first_stage;
    }
  }
  all = (int *)take((size_t)n_tasks, sizeof *all);
  for (t = 0; t < n_tasks; ++t) all[t] = t;
  first_stage = train_run(r->system - TUNED, r->seed, all, n_tasks, NULL);
  free(all);
  return first_stage;
}

/* ---- the second stage ---- */

/* Where a second stage begins: a model of one task, made when a part is missing. */
typedef struct beginning {
  const result *run; /* tuning a task of it, or */
  int32_t gate;      /* --adapt */
  int seed, task;
  moe_model *model;
} beginning;

static const moe_model *begin_with(beginning *b) {
  const moe_model *whole_model;
  moe_model *more = NULL;
  int32_t at;
  if (b->model) return b->model;
  if (b->run ? b->run->system == TUNED + SINGLE : !from_model)
    return b->model = make_model(SINGLE, b->seed, &b->task, 1);
  if (b->run) {
    whole_model = first_model(b->run);
    at = moe_model_find_task(whole_model, tasks[b->task].task.name);
  } else {
    need(
        moe_model_adapt(&more, from_model, &tasks[b->task].task, b->gate, (uint64_t)b->seed, &env));
    whole_model = more;
    at = moe_model_tasks(from_model);
  }
  need(moe_model_extract(&b->model, whole_model, &at, 1, NULL, &env));
  moe_model_free(more);
  return b->model;
}

/* Epochs of the second stage at most. Single-Task has no other: it gets what the others train on
   its task in both stages together. */
static int64_t second_epochs(const beginning *b, int64_t epoch) {
  int64_t all = 0, first;
  int t;
  if (!b->run || b->run->system != TUNED + SINGLE) return opt.fine_tune;
  for (t = 0; t < n_tasks; ++t) all += tasks[t].train.n;
  first = steps_for(tasks[b->task].train.n, all) * opt.batch;
  return opt.fine_tune + (first + epoch * opt.fine_batch - 1) / (epoch * opt.fine_batch);
}

/* Trains a copy of a model of one task on that task's rows; keeps the best epoch, ends after
   --patience epochs that are no better [TaG] 4.5, A.3.2. */
static moe_model *tune_once(job *j, beginning *b) {
  static const int32_t alone;
  moe_model *model;
  int64_t epoch = (tasks[b->task].train.n + opt.fine_batch - 1) / opt.fine_batch;
  need(moe_model_extract(&model, begin_with(b), &alone, 1, NULL, &env));
  if (opt.fine_epoch && opt.fine_epoch < epoch) epoch = opt.fine_epoch;
  j->which = &b->task;
  j->n = j->second = j->choose = 1;
  j->seed = b->seed;
  j->batch = opt.fine_batch;
  j->patience = opt.patience;
  j->epoch = epoch;
  j->steps = epoch * second_epochs(b, epoch);
  with_suffix(j->path, sizeof j->path, checkpoint_name(), "tuning");
  if (opt.resume) with_suffix(j->from, sizeof j->from, opt.resume, "tuning");
  if (b->run && first_stage) {
    j->keeper = first_stage;
    run_path(j->keep_path, sizeof j->path, checkpoint_name(), b->run->system - TUNED, b->seed,
             NULL);
    if (opt.hold_out > 0) strcat(j->keep_path, ".best");
  }
  train_model(j, model);
  return model;
}

/* The pairs of --grid, or --lr and --warmup alone. */
typedef struct grid {
  char *rate[64], *warmup[64];
  int rates, warmups;
} grid;

static grid read_grid(void) {
  static char lr[32], warmup[32];
  grid g;
  char *half[2];
  int i;
  memset(&g, 0, sizeof g);
  g.rates = g.warmups = 1;
  snprintf(lr, sizeof lr, "%.9g", opt.rate);
  snprintf(warmup, sizeof warmup, "%.9g", opt.warmup);
  g.rate[0] = lr;
  g.warmup[0] = warmup;
  if (!opt.grid) return g;
  i = split(copy_text(opt.grid), ':', half, 2);
  if (i > 2) die("--grid is RATES or RATES:WARMUPS, not \"%s\"", opt.grid);
  g.rates = split(half[0], ',', g.rate, 64);
  if (i == 2) g.warmups = split(half[1], ',', g.warmup, 64);
  if (g.rates > 64 || g.warmups > 64) die("--grid: more than 64 values");
  for (i = 0; i < g.rates; ++i) number("--grid", g.rate[i], 1e-12, 1e6);
  for (i = 0; i < g.warmups; ++i) number("--grid", g.warmup[i], 0, 1);
  return g;
}

/* Tries the whole grid for one task; the best by its score. `prefix` names the parts, their costs
   go to r, `save` is the file for the best model, or NULL. NULL with --report, where a part is
   missing. */
static const part *tune(result *r, const char *prefix, const char *title, beginning *b,
                        const char *save) {
  const grid g = read_grid();
  const part *best = NULL;
  int i, k, again = save && !opt.report && !exists(save), missing = 0;
  for (i = 0; i < g.rates; ++i)
    for (k = 0; k < g.warmups; ++k) {
      char name[256];
      part *p;
      snprintf(name, sizeof name, "%s %s %s", prefix, g.rate[i], g.warmup[k]);
      p = find_part(name);
      missing |= !p;
      if ((!p || again) && !opt.report) {
        moe_model *model;
        moe_context *context;
        part *old = p;
        job j;
        memset(&j, 0, sizeof j);
        j.name = name;
        j.title = title;
        j.rate = number("--grid", g.rate[i], 1e-12, 1e6);
        j.warmup = number("--grid", g.warmup[k], 0, 1);
        model = tune_once(&j, b);
        context = make_context(model);
        p = evaluate_part(name, context, model, 0, b->task, 0);
        add_cost(p, &j, model);
        moe_context_free(context);
        if (save && (!best || p->score > best->score)) need(moe_model_save(model, save, &env));
        moe_model_free(model);
        join_part(p);
        if (old) p = old;
        if (opt.checkpoint) write_parts(opt.checkpoint);
        if (opt.checkpoint) remove_checkpoint(j.path);
      }
      if (!p) continue;
      if (opt.grid)
        printf("%s: rate %s, warm-up %s: %.4f to choose by, %.4f on dev\n", title, g.rate[i],
               g.warmup[k], p->score, p->value);
      r->tokens += p->tokens;
      r->seconds += p->seconds;
      if (!best || p->score > best->score) best = p;
    }
  if (best) {
    r->steps += best->steps;
    r->parameters += best->parameters;
  }
  moe_model_free(b->model);
  b->model = NULL;
  return missing && opt.report ? NULL : best;
}

/* Fine-tunes every task of the table, each by itself. */
static void run_second(result *r) {
  char path[1024], title[160], name[160];
  int t;
  for (t = 0; t < n_tasks; ++t) {
    beginning b;
    memset(&b, 0, sizeof b);
    b.run = r;
    b.task = t;
    b.seed = r->seed;
    snprintf(title, sizeof title, "%s %.40s seed %d", system_title[r->system], tasks[t].task.name,
             r->seed);
    part_name(name, sizeof name, r->system, r->seed, t);
    if (opt.save) run_path(path, sizeof path, opt.save, r->system, r->seed, tasks[t].task.name);
    r->part[t] = tune(r, name, title, &b, opt.save ? path : NULL);
  }
  moe_model_free(first_stage);
  first_stage = NULL;
  if (opt.tidy && opt.checkpoint && !opt.from && r->system != TUNED + SINGLE) {
    run_path(path, sizeof path, opt.checkpoint, r->system - TUNED, r->seed, NULL);
    remove_checkpoint(path);
  }
}

/* ---- systems compared ---- */

/* What one system, with all its seeds, has answered. */
typedef struct line {
  const char *name, *title;
  const part **part; /* (T, seeds), NULL where it is missing */
} line;

/* A - B: the difference of a metric, its 95 % interval, and the share of the resamples in which A
   is better. */
typedef struct difference {
  double value, low, high, better;
  int known;
} difference;

typedef struct comparison {
  const line *a, *b;
  difference *of; /* (T+1): tasks, and the mean over all */
} comparison;

static comparison *comparisons;
static int n_comparisons;

/* Metrics of every line on the dev set and on the resamples of it, mean over the seeds; out (lines,
   resamples + 1). The rows of a resample (of a ranking: the questions) are the same for all lines:
   the comparison is paired. */
static void resample(double *out, const line *lines, int n_lines, int seeds, int t) {
  const task_data *d = &tasks[t];
  int set, i, k, r, defined;
  int64_t at = 0, g, j;
  memset(out, 0, (size_t)n_lines * (size_t)(opt.resamples + 1) * sizeof *out);
  for (set = 0; set < d->n_dev; at += d->dev[set++].n) {
    int64_t *order, *begin, n = rows_by_group(&order, &begin, &d->dev[set], &d->task), largest = 1;
    float *label = labels_of(&d->dev[set]), *some_labels, *some;
    int64_t *index;
    for (g = 0; g < n; ++g)
      if (begin[g + 1] - begin[g] > largest) largest = begin[g + 1] - begin[g];
    index = (int64_t *)take((size_t)(n * largest), sizeof *index);
    some = (float *)take((size_t)(n * largest), sizeof *some);
    some_labels = (float *)take((size_t)(n * largest), sizeof *some_labels);
    for (r = 0; r <= opt.resamples; ++r) {
      int64_t rows_drawn = 0;
      for (g = 0; g < n; ++g) {
        int64_t drawn =
            r ? (int64_t)(moe_key(1, (uint64_t)r, (uint64_t)g, (uint32_t)set, 79) % (uint64_t)n)
              : g;
        for (j = begin[drawn]; j < begin[drawn + 1]; ++j) index[rows_drawn++] = order[j];
      }
      for (j = 0; j < rows_drawn; ++j) some_labels[j] = label[index[j]];
      for (i = 0; i < n_lines; ++i) {
        double sum = 0;
        int found = 0;
        for (k = 0; k < seeds; ++k) {
          const part *p = lines[i].part[t * seeds + k];
          if (!p) continue;
          for (j = 0; j < rows_drawn; ++j) some[j] = p->answer[at + index[j]];
          sum += metric(&d->task, some, some_labels, (size_t)rows_drawn, &defined);
          ++found;
        }
        if (found) out[i * (opt.resamples + 1) + r] += sum / found / d->n_dev;
      }
    }
    free(order);
    free(begin);
    free(label);
    free(index);
    free(some);
    free(some_labels);
  }
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

/* From the metrics of two lines on the same resamples. */
static difference difference_of(const double *a, const double *b) {
  int R = opt.resamples, r;
  double *d = (double *)take((size_t)R, sizeof *d), better = 0;
  difference out;
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

static int line_has(const line *l, int t, int seeds) {
  int k;
  for (k = 0; k < seeds; ++k)
    if (l->part[t * seeds + k]) return 1;
  return 0;
}

/* Every pair of lines, the later one first; added to the comparisons. */
static void compare(const line *lines, int n_lines, int seeds) {
  size_t stride = (size_t)opt.resamples + 1, i;
  double *task = (double *)take((size_t)n_lines * stride, sizeof *task),
         *all = (double *)take((size_t)n_lines * stride, sizeof *all);
  int first = n_comparisons, a, b, t, c, whole_table = 1;
  if (!opt.resamples || n_lines < 2) n_lines = 0;
  for (a = 1; a < n_lines; ++a)
    for (b = 0; b < a; ++b) {
      comparison *to;
      comparisons = (comparison *)grow(comparisons, (size_t)n_comparisons + 1, sizeof *comparisons);
      to = &comparisons[n_comparisons++];
      to->a = &lines[a];
      to->b = &lines[b];
      to->of = (difference *)take((size_t)n_tasks + 1, sizeof *to->of);
    }
  for (t = 0; t < n_tasks && n_lines; ++t) {
    resample(task, lines, n_lines, seeds, t);
    for (i = 0; i < (size_t)n_lines * stride; ++i) all[i] += task[i] / n_tasks;
    for (c = first; c < n_comparisons; ++c)
      if (line_has(comparisons[c].a, t, seeds) && line_has(comparisons[c].b, t, seeds))
        comparisons[c].of[t] = difference_of(task + (size_t)(comparisons[c].a - lines) * stride,
                                             task + (size_t)(comparisons[c].b - lines) * stride);
  }
  for (c = first; c < n_comparisons; ++c) {
    for (t = 0, whole_table = 1; t < n_tasks; ++t) whole_table &= comparisons[c].of[t].known;
    if (whole_table)
      comparisons[c].of[n_tasks] = difference_of(all + (size_t)(comparisons[c].a - lines) * stride,
                                                 all + (size_t)(comparisons[c].b - lines) * stride);
  }
  free(task);
  free(all);
}

static void print_comparisons(void) {
  int c, t;
  if (!n_comparisons) return;
  printf("\nDifferences x 100, and in how many of %d resamples of the dev rows the first is "
         "better\n%-27s",
         opt.resamples, "");
  for (t = 0; t < n_tasks; ++t) printf(" %10.9s", tasks[t].task.name);
  printf(" |  all, with its 95 %% interval\n");
  for (c = 0; c < n_comparisons; ++c) {
    char title[64];
    snprintf(title, sizeof title, "%.25s - %.25s", comparisons[c].a->title,
             comparisons[c].b->title);
    printf("%-27s", title);
    for (t = 0; t <= n_tasks; ++t) {
      const difference *d = &comparisons[c].of[t];
      char text[64];
      if (!d->known)
        snprintf(text, sizeof text, "-");
      else if (t < n_tasks)
        snprintf(text, sizeof text, "%+.1f %3.0f%%", 100 * d->value, 100 * d->better);
      else
        snprintf(text, sizeof text, "%+.1f [%+.1f, %+.1f] %.0f%%", 100 * d->value, 100 * d->low,
                 100 * d->high, 100 * d->better);
      if (t < n_tasks)
        printf(" %10s", text);
      else
        printf(" |  %s\n", text);
    }
  }
  printf("The interval is that of other dev rows, the runs being what they are; the mean over the "
         "seeds is what is compared.\n");
}

/* ---- what is shown ---- */

/* The metric of a task; t = n_tasks: the average "small", t = n_tasks + 1: that of all tasks. 0
   where a part is missing, or no task small. */
static int result_value(double *value, const result *r, int t) {
  double sum = 0;
  int i, n = 0;
  for (i = 0; i < n_tasks; ++i) {
    if (t < n_tasks ? i != t : t == n_tasks && tasks[i].official > 10000) continue;
    if (!r->part[i]) return 0;
    sum += r->part[i]->value;
    ++n;
  }
  *value = n ? sum / n : 0;
  return n > 0;
}

/* Mean over the seeds that have one; *n of them. */
static double mean_of(int system, int t, double *deviation, double *most, int *n) {
  double sum = 0, square = 0, v;
  int i;
  *n = 0;
  *deviation = 0;
  *most = -2;
  for (i = 0; i < n_results; ++i) {
    if (results[i].system != system || !result_value(&v, &results[i], t)) continue;
    sum += v;
    square += v * v;
    if (v > *most) *most = v;
    ++*n;
  }
  if (!*n) return 0;
  sum /= *n;
  square = square / *n - sum * sum;
  if (*n > 1 && square > 0) *deviation = sqrt(square * *n / (*n - 1));
  return sum;
}

/* n 0: nothing to show; 1: no deviation. */
static void print_cell(double v, double deviation, int n, int undefined, int width) {
  char text[64];
  if (!n)
    snprintf(text, sizeof text, "-");
  else if (n > 1)
    snprintf(text, sizeof text, "%.1f+-%.1f", 100 * v, 100 * deviation);
  else
    snprintf(text, sizeof text, "%.1f", 100 * v);
  printf(" %*s%s", width - undefined, text, undefined ? "?" : "");
}

/* A system's row; 1 when a metric in it has no value. */
static int print_system(int s, int width) {
  double d, most, seconds = 0, parameters = 0;
  int t, i, n, bad, any_bad = 0, runs = 0, seeds = 0;
  for (i = 0; i < n_results; ++i)
    if (results[i].system == s)
      seconds += results[i].seconds, parameters = results[i].parameters, ++runs;
  if (!runs) return 0;
  printf("%-13s", system_title[s]);
  for (t = 0; t < n_tasks + 2; ++t) {
    double v = mean_of(s, t, &d, &most, &n);
    for (i = bad = 0; i < n_results && t < n_tasks; ++i)
      bad |= results[i].system == s && results[i].part[t] && !results[i].part[t]->defined;
    any_bad |= bad;
    if (n > seeds) seeds = n;
    if (t == n_tasks) printf(" |");
    print_cell(v, d, n, bad, width);
  }
  printf(" | %11.0f %8.1f\n", parameters, seconds / runs);
  if (s < TUNED || seeds < 2) return any_bad;
  printf("%-13s", "  maximum"); /* of the seeds, as the paper reports */
  for (t = 0; t < n_tasks + 2; ++t) {
    mean_of(s, t, &d, &most, &n);
    if (t == n_tasks) printf(" |");
    print_cell(most, 0, n > 0, 0, width);
  }
  printf(" |\n");
  return any_bad;
}

static void print_table(void) {
  int s, t, width = 10, any_bad = 0, hard = 0, several = 0;
  for (t = 1; t < n_results; ++t) several |= results[t].seed != results[0].seed;
  printf("\n%-13s", "");
  for (t = 0; t < n_tasks; ++t)
    printf(" %*.*s%s", width - tasks[t].hard, width - 1, tasks[t].task.name,
           tasks[t].hard ? "*" : "");
  printf(" | %*s %*s | %11s %8s\n%-13s", width, "small", width, "all", "parameters", "seconds",
         "metric x 100");
  for (t = 0; t < n_tasks; ++t) {
    char name[MOE_NAME_BYTES];
    metric_name(name, &tasks[t].task);
    printf(" %*.*s", width, width - 1, name);
  }
  printf(" |\n%-13s", "train/dev rows");
  for (t = 0; t < n_tasks; ++t) {
    char text[48];
    snprintf(text, sizeof text, "%lld/%lld", (long long)tasks[t].train.n,
             (long long)dev_rows(&tasks[t]));
    printf(" %*s", width - (t == 0), text);
  }
  printf(" |\n%-13s", "chance + 2 se");
  for (t = 0; t < n_tasks; ++t) {
    double error, v = chance(&tasks[t], &error);
    print_cell(v + 2 * error, 0, 1, 0, width);
    hard |= tasks[t].hard;
  }
  printf(" |\n");
  for (s = 0; s < LINES; ++s) any_bad |= print_system(s, width);
  printf("small: mean over tasks with at most 10,000 training rows; all: over all tasks%s.\n",
         several ? "; mean+-standard deviation over the seeds" : "");
  printf("chance + 2 se: one answer to every row (the most frequent class, for F1 class 1; 0 for "
         "correlations) plus two standard errors%s.\n",
         hard ? "; *: declared hard" : "");
  if (any_bad)
    printf("?: the metric has no value (one class is all that is right or predicted, or the values "
           "are constant) and counts as 0.\n");
}

/* The systems of one stage, compared. */
static void compare_systems(int first) {
  line *lines = (line *)lasting(SYSTEMS, sizeof *lines);
  int s, i, t, k, n = 0, seeds = 0, runs;
  for (i = 0; i < n_results; ++i) seeds += results[i].system == results[0].system;
  for (s = first; s < first + SYSTEMS; ++s) {
    for (i = runs = 0; i < n_results; ++i) runs += results[i].system == s;
    if (!runs) continue;
    lines[n].name = system_name[s];
    lines[n].title = system_title[s];
    lines[n].part = (const part **)lasting((size_t)(n_tasks * seeds), sizeof *lines[n].part);
    for (i = k = 0; i < n_results && k < seeds; ++i)
      if (results[i].system == s) {
        for (t = 0; t < n_tasks; ++t) lines[n].part[t * seeds + k] = results[i].part[t];
        ++k;
      }
    ++n;
  }
  compare(lines, n, seeds);
}

/* Shares of the experts, as whole percents, a row for each task and a group of columns for each
   layer. */
static void print_routes(const result *r) {
  int t, l, e;
  printf("\nExperts chosen by %s (seed %d), %% of each task's dev tokens, by layer\n%-15s",
         system_title[r->system], r->seed, "");
  for (l = 0; l < config.layers; ++l) printf("  %-*d", 4 * opt.experts, l + 1);
  printf("\n");
  for (t = 0; t < n_tasks; ++t) {
    printf("%-15.15s", tasks[t].task.name);
    for (l = 0; l < config.layers; ++l) {
      const int64_t *c = r->part[t]->routes + (int64_t)l * opt.experts;
      int64_t sum = 0;
      for (e = 0; e < opt.experts; ++e) sum += c[e];
      printf(" ");
      for (e = 0; e < opt.experts; ++e)
        printf(" %3d", sum ? (int)((100 * c[e] + sum / 2) / sum) : 0);
      printf(" ");
    }
    printf("\n");
  }
}

/* Of the last system of the first seed that has experts. */
static void print_last_routes(void) {
  int i, t;
  for (i = n_results - 1; i >= 0; --i) {
    for (t = 0; t < n_tasks && results[i].part[t] && results[i].part[t]->routes; ++t) continue;
    if (t < n_tasks || results[i].seed != results[0].seed) continue;
    print_routes(&results[i]);
    return;
  }
}

static void json_text(FILE *f, const char *s) {
  fputc('"', f);
  for (; *s; ++s) {
    if (*s == '"' || *s == '\\')
      fprintf(f, "\\%c", *s);
    else if ((unsigned char)*s < 32)
      fprintf(f, "\\u%04x", (unsigned)(unsigned char)*s);
    else
      fputc(*s, f);
  }
  fputc('"', f);
}

static void json_tasks(FILE *f, const result *r) {
  int t, first = 1;
  double v;
  for (t = 0; t < n_tasks; ++t) {
    char name[MOE_NAME_BYTES];
    if (!r->part[t]) continue;
    metric_name(name, &tasks[t].task);
    fprintf(f, "%s\n    {\"name\": ", first ? "" : ",");
    json_text(f, tasks[t].task.name);
    fprintf(f, ", \"metric\": \"%s\", \"value\": %.9g, \"n\": %lld, \"rows\": %lld%s}", name,
            r->part[t]->value, (long long)dev_rows(&tasks[t]), (long long)tasks[t].official,
            r->part[t]->defined ? "" : ", \"defined\": false");
    first = 0;
  }
  fprintf(f, "],\n   \"small\": ");
  if (result_value(&v, r, n_tasks))
    fprintf(f, "%.9g, \"all\": ", v);
  else
    fprintf(f, "null, \"all\": ");
  if (result_value(&v, r, n_tasks + 1))
    fprintf(f, "%.9g}", v);
  else
    fprintf(f, "null}");
}

static void json_differences(FILE *f, const comparison *c) {
  int t, first = 1;
  fprintf(f, "\n  {\"a\": \"%s\", \"b\": \"%s\", \"differences\": [", c->a->name, c->b->name);
  for (t = 0; t <= n_tasks; ++t) {
    const difference *d = &c->of[t];
    if (!d->known) continue;
    fprintf(f, "%s\n    {\"name\": ", first ? "" : ",");
    json_text(f, t < n_tasks ? tasks[t].task.name : "all");
    fprintf(f, ", \"difference\": %.9g, \"low\": %.9g, \"high\": %.9g, \"better\": %.9g}", d->value,
            d->low, d->high, d->better);
    first = 0;
  }
  fprintf(f, "]}");
}

static void print_json(FILE *f) {
  int i, first = 1;
  fprintf(f, "{\"options\": [");
  for (i = 1; i < given_argc; ++i) {
    if (i > 1) fprintf(f, ", ");
    json_text(f, given_argv[i]);
  }
  fprintf(f, "],\n \"isa\": \"%s\", \"precision\": \"%s\", \"threads\": %d,\n \"runs\": [",
          moe_isa_name(env.isa), precision_name(), (int)env.threads);
  for (i = 0; i < n_results; ++i) {
    const result *r = &results[i];
    int t;
    for (t = 0; t < n_tasks && !r->part[t]; ++t) continue;
    if (t == n_tasks) continue;
    fprintf(f,
            "%s\n  {\"system\": \"%s\", \"seed\": %d, \"parameters\": %.0f, \"seconds\": %.3f, "
            "\"tokens\": %.0f,\n   \"tokens_per_second\": %.1f, \"steps\": %.0f, \"tasks\": [",
            first ? "" : ",", system_name[r->system], r->seed, r->parameters, r->seconds, r->tokens,
            r->tokens / (r->seconds > 0 ? r->seconds : 1), r->steps);
    json_tasks(f, r);
    first = 0;
  }
  fprintf(f, "\n ]");
  for (i = 0; i < n_comparisons; ++i) {
    fputs(i ? "," : ",\n \"comparisons\": [", f);
    json_differences(f, &comparisons[i]);
  }
  fprintf(f, "%s}\n", n_comparisons ? "\n ]" : "");
}

static void show_results(void) {
  print_table();
  compare_systems(0);
  compare_systems(TUNED);
  print_comparisons();
  if (opt.json) write_file(opt.json, print_json);
  print_last_routes();
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

/* ---- tasks that join a model ---- */

/* What --gate-from names: a task of the model, or one of moe_model_adapt's words. */
static int32_t gate_number(const char *name) {
  int32_t t = from_model ? moe_model_find_task(from_model, name) : -1;
  if (t >= 0) return t;
  if (!strcmp(name, "random")) return MOE_GATE_RANDOM;
  if (!strcmp(name, "mean") && from_model) return MOE_GATE_MEAN;
  if (!from_model)
    die("--gate-from: without --from there is no model to take the gates of \"%s\" from", name);
  die("--gate-from: \"%s\" is neither random nor mean nor a task of %s", name, opt.from);
  return 0;
}

/* "100" or "10%" of n rows. */
static int64_t few_rows(const char *text, int64_t n) {
  char *end;
  double v = strtod(text, &end);
  if (end != text && !strcmp(end, "%"))
    v = ceil(v / 100 * (double)n);
  else if (*end || end == text)
    v = 0;
  if (!(v >= 1 && v <= (double)n))
    die("--rows: \"%s\" is neither a number from 1 to %lld nor a share such as 10%%", text,
        (long long)n);
  return (int64_t)v;
}

/* The training rows of a few-shot run: `wanted` of them, drawn by the seed; a ranking's questions
   stay whole. The groups are shuffled (Fisher and Yates), then taken from the front. */
static void draw_rows(rows *drawn, const rows *all, const moe_task *t, int64_t wanted, int seed) {
  unsigned char *keep = (unsigned char *)take((size_t)all->n, 1);
  int64_t *order, *begin, n = rows_by_group(&order, &begin, all, t),
                          *turn = (int64_t *)take((size_t)n, sizeof *turn), i, j, kept = 0;
  for (i = 0; i < n; ++i) turn[i] = i;
  for (i = 0; i < n && kept < wanted; ++i) {
    int64_t other =
                i + (int64_t)(moe_key((uint64_t)seed, 0, (uint64_t)i, 0, 78) % (uint64_t)(n - i)),
            g = turn[other];
    turn[other] = turn[i];
    for (j = begin[g]; j < begin[g + 1]; ++j) keep[order[j]] = 1, ++kept;
  }
  part_rows(drawn, NULL, all, keep);
  free(order);
  free(begin);
  free(turn);
  free(keep);
}

/* A line of the table, and of --json. */
static void adapt_line(const char *gate, int64_t n, const result *r, int seeds, FILE *json,
                       int first) {
  double sum = 0, square = 0, best = -2, deviation, seconds = 0;
  char text[64];
  int i, found = 0;
  for (i = 0; i < seeds; ++i) {
    double v = r[i].part[0] ? r[i].part[0]->value : 0;
    if (!r[i].part[0]) continue;
    sum += v;
    square += v * v;
    if (v > best) best = v;
    seconds += r[i].seconds;
    ++found;
  }
  if (!found) {
    printf("%-16.16s %8lld %8s %12s %8s\n", gate, (long long)n, "-", "-", "-");
    return;
  }
  square = square - sum * sum / found;
  deviation = found > 1 && square > 0 ? sqrt(square / (found - 1)) : 0;
  snprintf(text, sizeof text, "%.1f+-%.1f", 100 * sum / found, 100 * deviation);
  printf("%-16.16s %8lld %8.1f %12s %8.1f\n", gate, (long long)n, 100 * best, text,
         seconds / found);
  fflush(stdout);
  if (!json) return;
  fprintf(json, "%s\n  {\"gate\": ", first ? "" : ",");
  json_text(json, gate);
  fprintf(json,
          ", \"rows\": %lld, \"maximum\": %.9g, \"mean\": %.9g, \"deviation\": %.9g, \"seeds\": [",
          (long long)n, best, sum / found, deviation);
  for (i = found = 0; i < seeds; ++i)
    if (r[i].part[0])
      fprintf(json, "%s{\"seed\": %d, \"value\": %.9g, \"steps\": %.0f}", found++ ? ", " : "",
              r[i].seed, r[i].part[0]->value, r[i].steps);
  fprintf(json, "]}");
}

/* One gate, one number of rows, one seed. */
static void adapt_once(result *r, const char *gate, int64_t wanted, const rows *all, int several) {
  char name[256], title[96], path[1056], suffix[96];
  beginning b;
  memset(&b, 0, sizeof b);
  b.gate = gate_number(gate);
  b.seed = r->seed;
  snprintf(name, sizeof name, "adapt %d %s %.63s %lld", r->seed, tasks[0].task.name, gate,
           (long long)wanted);
  snprintf(title, sizeof title, "%.30s, %lld rows, seed %d", gate, (long long)wanted, r->seed);
  snprintf(suffix, sizeof suffix, "%.40s-%lld-%d", gate, (long long)wanted, r->seed);
  if (opt.save && several)
    with_suffix(path, sizeof path, opt.save, suffix);
  else if (opt.save)
    snprintf(path, sizeof path, "%s", opt.save);
  draw_rows(&tasks[0].train, all, &tasks[0].task, wanted, r->seed);
  r->part[0] = tune(r, name, title, &b, opt.save ? path : NULL);
  free_rows(&tasks[0].train);
}

/* The gates, or numbers of rows, of one line of the table each, compared: paired, on the dev rows.
 */
static void compare_gates(char **gate, int gates, result *r, int seeds) {
  line *lines = (line *)lasting((size_t)gates, sizeof *lines);
  int i, k;
  for (i = 0; i < gates; ++i) {
    lines[i].name = lines[i].title = gate[i];
    lines[i].part = (const part **)lasting((size_t)seeds, sizeof *lines[i].part);
    for (k = 0; k < seeds; ++k) lines[i].part[k] = r[i * seeds + k].part[0];
  }
  compare(lines, gates, seeds);
}

/* --adapt: a task that the model does not know, from each gate, on each number of rows, with each
   seed [TaG] Tables 2 and 6. */
static void run_adapt(const int *seed, int seeds) {
  char *gate[64], *few[64];
  int gates = split(copy_text(opt.gate_from), ',', gate, 64), sizes = 1, i, j, k;
  rows all = tasks[0].train;
  FILE *json = opt.json ? tmpfile() : NULL;
  few[0] = copy_text("100%");
  if (opt.few) sizes = split(copy_text(opt.few), ',', few, 64);
  if (gates > 64 || sizes > 64) die("--gate-from and --rows: more than 64");
  for (i = 0; i < gates; ++i)
    gate_number(gate[i]); /* what is wrong is better known before the first run */
  for (i = 0; i < sizes; ++i) few_rows(few[i], all.n);
  if (json) fprintf(json, "{\"adapt\": \"%s\", \"runs\": [", tasks[0].task.name);
  printf("\n%-16s %8s %8s %12s %8s\n", from_model ? "gates from" : "Single-Task", "rows", "maximum",
         "mean", "seconds");
  memset(&tasks[0].train, 0, sizeof tasks[0].train);
  for (i = 0; i < sizes; ++i) {
    int64_t wanted = few_rows(few[i], all.n);
    result *r = (result *)lasting((size_t)(gates * seeds), sizeof *r);
    for (j = 0; j < gates; ++j) {
      for (k = 0; k < seeds; ++k) {
        result *one = &r[j * seeds + k];
        one->seed = seed[k];
        one->part = (const part **)lasting(1, sizeof *one->part);
        adapt_once(one, gate[j], wanted, &all, sizes * gates * seeds > 1);
      }
      adapt_line(gate[j], wanted, r + j * seeds, seeds, json, i == 0 && j == 0);
    }
    compare_gates(gate, gates, r, seeds);
  }
  tasks[0].train = all;
  print_comparisons();
  if (!json) return;
  fprintf(json, "\n ]}\n");
  fflush(json);
  need(moe_file_replace(opt.json, copy_file, json, &env));
  fclose(json);
}

/* ---- main ---- */

/* The runs that were asked for, in the order of the table's making; with --from only second stages.
 */
static void make_results(const int *seed, int seeds) {
  static const int system_of[] = {DENSE, SWITCH, TAG, DENSE, EMBED};
  char *list[SYSTEMS + 1];
  int n_systems = split(copy_text(opt.systems), ',', list, SYSTEMS), i, j, k;
  if (n_systems > SYSTEMS) die("--systems: more than there are");
  if (from_model) n_systems = 1;
  results = (result *)lasting(2 * (size_t)(n_systems * seeds), sizeof *results);
  for (i = 0; i < n_systems; ++i)
    for (j = 0; j < seeds; ++j) {
      result *r = &results[n_results++];
      r->seed = seed[j];
      if (from_model) {
        r->system = TUNED + system_of[config.router];
        continue;
      }
      for (r->system = 0; r->system < SYSTEMS && strcmp(system_name[r->system], list[i]);
           ++r->system)
        continue;
      if (r->system == SYSTEMS)
        die("--systems: \"%s\" is none of single, dense, switch, tag, embed", list[i]);
      for (k = 0; k < n_results - 1; ++k)
        if (results[k].system % TUNED == r->system && results[k].seed == r->seed)
          die("%s with seed %d stands there twice", list[i], r->seed);
      if (!opt.fine_tune) continue;
      if (r->system != SINGLE)
        results[n_results++] = *r; /* Single-Task has the second stage alone */
      results[n_results - 1].system += TUNED;
    }
  n_runs = n_results; /* of one run --save FILE has that very name */
}

static void run_all(void) {
  int i, all = n_results;
  if (from_model && moe_model_config(from_model)->unit == MOE_UNIT_BLOCK)
    die("%s has blocks as experts, which the second stage does not know", opt.from);
  for (i = 0; i < all; ++i)
    results[i].part = (const part **)lasting((size_t)n_tasks, sizeof *results[i].part);
  for (n_results = 1; n_results <= all; ++n_results) {
    result *r = &results[n_results - 1];
    if (r->system >= TUNED)
      run_second(r);
    else {
      run_first(r);
      if (n_results == all || results[n_results].system < TUNED) {
        moe_model_free(first_stage);
        first_stage = NULL;
      }
    }
    if (opt.json)
      write_file(opt.json, print_json); /* what is finished is kept, whatever happens to the rest */
  }
  n_results = all;
  show_results();
}

static void free_everything(void) {
  int i;
  for (i = 0; i < n_finished; ++i) free_part(finished[i]);
  free(finished);
  for (i = 0; i < n_comparisons; ++i) free(comparisons[i].of);
  free(comparisons);
  moe_model_free(from_model);
  moe_free(init_file);
  free_data();
  free_lasting();
}

int main(int argc, char **argv) {
  char *seed_text[1000], table[2048];
  int seed[1000], seeds, i;
  moe_pool *pool = NULL;
  moe_profile profile;
  moe_isa isa;
  given_argc = argc;
  given_argv = argv;
  read_options(argc, argv);
  check_options();
  isa = moe_isa_from_name(opt.isa);
  if (moe_env_init(&env, isa) != MOE_OK)
    die("this machine or this build has no %s; --isa auto takes the best there is", opt.isa);
  env.log = show;
  if (!strcmp(opt.precision, "bf16"))
    moe_env_set_precision(&env, MOE_TYPE_BF16); /* or a sentence, and fp32 */
  moe_profile_init(&profile, NULL, NULL);
  if (opt.profile) env.profile = &profile;
  need(moe_pool_create(&pool, opt.threads ? opt.threads : moe_processors(), &env));
  seeds = split(copy_text(opt.seeds), ',', seed_text, 1000);
  if (seeds > 1000) die("--seeds: more than 1000");
  for (i = 0; i < seeds; ++i) seed[i] = whole("--seeds", seed_text[i], 0, 2147483647);
  read_grid(); /* what is wrong in it is better known now */
  check_writable("--save", opt.save);
  check_writable("--checkpoint", opt.checkpoint);
  check_writable("--json", opt.json);
  check_writable("--predictions", opt.predictions);
  read_tasks();
  make_config();
  if (!opt.adapt) make_results(seed, seeds);
  read_data();
  options_text(); /* of all rows: --adapt will change those it trains on */
  printf("%d task%s, %d layers x %d, %s, %d threads, %s%s%s\n", n_tasks, n_tasks == 1 ? "" : "s",
         (int)config.layers, (int)config.hidden,
         opt.from   ? opt.from
         : opt.init ? opt.init
                    : "from scratch",
         (int)env.threads, moe_isa_name(env.isa), env.precision == MOE_TYPE_BF16 ? ", " : "",
         env.precision == MOE_TYPE_BF16 ? precision_name() : "");
  fflush(stdout);
  if (opt.resume) read_parts(opt.resume);
  signal(SIGINT, on_interrupt);
  signal(SIGTERM, on_interrupt);
  if (opt.adapt)
    run_adapt(seed, seeds);
  else
    run_all();
  moe_profile_write(table, sizeof table, &profile);
  if (opt.profile) fputs(table, stdout);
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  free_everything();
  moe_pool_free(pool);
  return 0;
}
