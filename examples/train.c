/* train.c - trains Single-Task, MT-Dense, MT-Switch and MT-TaG on a folder of tasks and prints a table like Table 1 of the MT-TaG paper.

     cc -O3 -o train examples/train.c -lm -pthread
     ./train                      the bundled tasks, four systems
     ./train --help               the options

   A folder of tasks holds tasks.tsv and, for each task, TASK/train.tsv and TASK/dev.tsv: README.md shows how to make your own. */
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
static const char *const system_name[LINES] = {"single", "dense", "switch", "tag", "embed",
                                               "single-tuned", "dense-tuned", "switch-tuned", "tag-tuned", "embed-tuned"};
static const char *const system_title[LINES] = {"Single-Task", "MT-Dense", "MT-Switch", "MT-TaG", "MT-Embed",
                                                "Single tuned", "Dense tuned", "Switch tuned", "TaG tuned", "Embed tuned"};

static struct {
  const char *data, *tasks, *init, *vocab, *systems, *save, *checkpoint, *resume, *json, *predictions, *isa, *seeds, *sampling, *order, *truncate;
  const char *gate_scale, *from, *adapt, *gate_from, *few, *grid;
  int max_len, layers, hidden, ffn, heads, cased, experts, top_k, batch, micro_batch, threads, dedup, renormalize, rank;
  int fine_tune, fine_batch, patience;
  int64_t epochs, steps, every;
  double hold_out, eps, noise, rate, warmup, decay, clip, dropout, balance, z_loss, jitter, gate_rate;
} opt; /* zero, but for: */

static void default_options(void) {
  opt.systems = "single,dense,switch,tag";
  opt.isa = "auto";
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
}

static const char *const help_text =
  "usage: train [options]\n\n"
  "data\n"
  "  --data DIR               folder with tasks.tsv and TASK/train.tsv, TASK/dev.tsv   (examples/data)\n"
  "  --tasks A,B,C            these tasks, in this order                               (all of tasks.tsv)\n"
  "  --max-len N              longest input in tokens                                  (128, or what the positions allow)\n"
  "  --truncate longest|right what to cut from a longer input                          (longest)\n"
  "  --hold-out FRACTION      part of train that chooses the best epoch; 0: the last   (0)\n"
  "  --dedup                  drop training rows whose text stands in another task's dev set\n\n"
  "model\n"
  "  --init FILE.safetensors  start from a published BERT-like encoder; config.json beside it is read\n"
  "  --vocab FILE             its WordPiece vocabulary                                 (vocab.txt of --data)\n"
  "  --heads N --eps E        attention heads and LayerNorm epsilon, where there is no config.json\n"
  "  --cased                  do not lower-case the text                               (tokenizer_config.json decides)\n"
  "  --layers N --hidden N --ffn N --heads N   from scratch                            (2 128 512 4)\n"
  "  --systems LIST           of single,dense,switch,tag,embed                         (the first four)\n"
  "  --rank R                 length of the task vectors that embed makes its gates of (8)\n"
  "  --experts N --top-k K    experts in a layer, experts of a token                   (4 1)\n"
  "  --gate-scale paper|n     weight of an expert: g* (the paper) or g* N/k            (n: a sparse model then starts\n"
  "                           as its dense parent; with the paper's g* every FFN starts at a quarter)\n"
  "  --renormalize            top-k weights sum to 1 (with --gate-scale paper)\n"
  "  --noise S                standard deviation of noise on copied experts            (0)\n\n"
  "training\n"
  "  --epochs N | --steps N   length; Single-Task gets a task's share of the steps     (3 epochs with --init, else 8)\n"
  "  --batch N                sequences of a step                                      (32)\n"
  "  --micro-batch TOKENS     most tokens at once; more memory, not other results      (4096)\n"
  "  --lr R --warmup F        peak learning rate, fraction of steps to reach it        (5e-5 with --init, else 1e-3; 0.1)\n"
  "  --gate-lr F              factor of the learning rate for gates and task vectors   (1)\n"
  "  --decay D --clip C       weight decay, largest gradient norm                      (0 1)\n"
  "  --dropout P              (0.1)\n"
  "  --seeds 1,2,3            a run for each; the table then shows mean and deviation  (1)\n"
  "  --sampling natural|uniform|temperature:T|uniform-natural                          (natural)\n"
  "  --order shuffle|file     (shuffle)\n"
  "  --balance A --z-loss A --jitter A   options the paper argues against              (0 0 0)\n\n"
  "second stage\n"
  "  --fine-tune EPOCHS       then trains each task alone, at most so long, and keeps its best epoch, chosen on dev.tsv\n"
  "                           or, as it should be, on --hold-out rows; an epoch is at least 1 step\n"
  "  --fine-batch N           its batch                                                (32)\n"
  "  --patience N             ends after N epochs that are no better                   (3)\n"
  "  --grid RATES[:WARMUPS]   tries every pair, 2e-5,5e-5:0.1,0.2 say, keeps the best  (--lr and --warmup)\n"
  "  --from MODEL             a trained model instead of the first stage\n"
  "  --adapt TASK             with --from: a task that the model does not know\n"
  "  --gate-from LIST         where its gates come from: random, mean or a task        (random)\n"
  "  --rows LIST              training rows, 100 or 10% say, drawn anew for each seed  (100%)\n\n"
  "machine\n"
  "  --threads N              (all processors)\n"
  "  --isa auto|avx512|avx2|neon|scalar                                                (auto)\n\n"
  "files\n"
  "  --save FILE              the trained model; with several runs FILE gets -SYSTEM-SEED\n"
  "  --checkpoint FILE --every STEPS   state to go on from; names as with --save       (every 500 steps and at the end)\n"
  "  --resume FILE            go on from there, bit for bit; give the same options again\n"
  "  --json FILE              all results\n"
  "  --predictions FILE       what the model says of each dev row; names as with --save\n";

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
  (void)user;
  (void)status;
  fprintf(stderr, "train: %s%s%s\n", about ? about : "", about ? ": " : "", sentence);
}

/* For calls of the library: the log has said what was wrong. */
static void need(moe_status status) {
  if (status != MOE_OK) exit(1);
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

static double number(const char *option, const char *text, double low, double high) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end || !(v >= low && v <= high)) die("%s takes a number from %g to %g, not \"%s\"", option, low, high, text);
  return v;
}

static int64_t whole(const char *option, const char *text, int64_t low, int64_t high) {
  char *end;
  long long v = strtoll(text, &end, 10);
  if (end == text || *end || v < low || v > high)
    die("%s takes a whole number from %lld to %lld, not \"%s\"", option, (long long)low, (long long)high, text);
  return v;
}

static const char *one_of(const char *option, const char *text, const char *a, const char *b) {
  if (strcmp(text, a) && strcmp(text, b)) die("%s is %s or %s, not \"%s\"", option, a, b, text);
  return text;
}

static void read_options(int argc, char **argv) {
  int i;
  default_options();
  for (i = 1; i < argc; ++i) {
    const char *o = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
    if (!strcmp(o, "--help") || !strcmp(o, "-h")) {
      fputs(help_text, stdout);
      exit(0);
    }
    if (!strcmp(o, "--dedup")) { opt.dedup = 1; continue; }
    if (!strcmp(o, "--cased")) { opt.cased = 1; continue; }
    if (!strcmp(o, "--renormalize")) { opt.renormalize = 1; continue; }
    if (strncmp(o, "--", 2)) die("\"%s\" is no option; --help lists them", o);
    if (!v) die("%s needs a value, or is no option; --help lists them", o);
    ++i;
    if (!strcmp(o, "--data")) opt.data = v;
    else if (!strcmp(o, "--tasks")) opt.tasks = v;
    else if (!strcmp(o, "--max-len")) opt.max_len = (int)whole(o, v, 3, 1 << 20);
    else if (!strcmp(o, "--truncate")) opt.truncate = one_of(o, v, "longest", "right");
    else if (!strcmp(o, "--hold-out")) opt.hold_out = number(o, v, 0, 0.9);
    else if (!strcmp(o, "--init")) opt.init = v;
    else if (!strcmp(o, "--vocab")) opt.vocab = v;
    else if (!strcmp(o, "--heads")) opt.heads = (int)whole(o, v, 1, 1024);
    else if (!strcmp(o, "--eps")) opt.eps = number(o, v, 1e-30, 1);
    else if (!strcmp(o, "--layers")) opt.layers = (int)whole(o, v, 1, 1000);
    else if (!strcmp(o, "--hidden")) opt.hidden = (int)whole(o, v, 1, 65536);
    else if (!strcmp(o, "--ffn")) opt.ffn = (int)whole(o, v, 1, 1 << 20);
    else if (!strcmp(o, "--systems")) opt.systems = v;
    else if (!strcmp(o, "--experts")) opt.experts = (int)whole(o, v, 1, MOE_MAX_EXPERTS);
    else if (!strcmp(o, "--top-k")) opt.top_k = (int)whole(o, v, 1, MOE_MAX_EXPERTS);
    else if (!strcmp(o, "--gate-scale")) opt.gate_scale = one_of(o, v, "paper", "n");
    else if (!strcmp(o, "--noise")) opt.noise = number(o, v, 0, 10);
    else if (!strcmp(o, "--epochs")) opt.epochs = whole(o, v, 1, 1000000);
    else if (!strcmp(o, "--steps")) opt.steps = whole(o, v, 1, 1000000000);
    else if (!strcmp(o, "--batch")) opt.batch = (int)whole(o, v, 1, 65536);
    else if (!strcmp(o, "--micro-batch")) opt.micro_batch = (int)whole(o, v, 1, 1 << 24);
    else if (!strcmp(o, "--lr")) opt.rate = number(o, v, 1e-12, 1e6);
    else if (!strcmp(o, "--warmup")) opt.warmup = number(o, v, 0, 1);
    else if (!strcmp(o, "--decay")) opt.decay = number(o, v, 0, 1e6);
    else if (!strcmp(o, "--clip")) opt.clip = number(o, v, 0, 1e30);
    else if (!strcmp(o, "--dropout")) opt.dropout = number(o, v, 0, 0.99);
    else if (!strcmp(o, "--seeds")) opt.seeds = v;
    else if (!strcmp(o, "--sampling")) opt.sampling = v;
    else if (!strcmp(o, "--order")) opt.order = one_of(o, v, "shuffle", "file");
    else if (!strcmp(o, "--balance")) opt.balance = number(o, v, 0, 1e6);
    else if (!strcmp(o, "--z-loss")) opt.z_loss = number(o, v, 0, 1e6);
    else if (!strcmp(o, "--jitter")) opt.jitter = number(o, v, 0, 0.99);
    else if (!strcmp(o, "--rank")) opt.rank = (int)whole(o, v, 1, 4096);
    else if (!strcmp(o, "--gate-lr")) opt.gate_rate = number(o, v, 0, 1e6);
    else if (!strcmp(o, "--fine-tune")) opt.fine_tune = (int)whole(o, v, 1, 100000);
    else if (!strcmp(o, "--fine-batch")) opt.fine_batch = (int)whole(o, v, 1, 65536);
    else if (!strcmp(o, "--patience")) opt.patience = (int)whole(o, v, 1, 100000);
    else if (!strcmp(o, "--grid")) opt.grid = v;
    else if (!strcmp(o, "--from")) opt.from = v;
    else if (!strcmp(o, "--adapt")) opt.adapt = v;
    else if (!strcmp(o, "--gate-from")) opt.gate_from = v;
    else if (!strcmp(o, "--rows")) opt.few = v;
    else if (!strcmp(o, "--threads")) opt.threads = (int)whole(o, v, 1, 256);
    else if (!strcmp(o, "--isa")) opt.isa = v;
    else if (!strcmp(o, "--save")) opt.save = v;
    else if (!strcmp(o, "--checkpoint")) opt.checkpoint = v;
    else if (!strcmp(o, "--every")) opt.every = whole(o, v, 1, 1000000000);
    else if (!strcmp(o, "--resume")) opt.resume = v;
    else if (!strcmp(o, "--json")) opt.json = v;
    else if (!strcmp(o, "--predictions")) opt.predictions = v;
    else die("unknown option %s; --help lists them", o);
  }
  if (opt.from && opt.init) die("--from goes on from a trained model, --init starts anew: give one of them");
  if (opt.adapt && !opt.from) die("--adapt needs --from, a model that %s can join", opt.adapt);
  if (opt.from && (opt.checkpoint || opt.resume)) die("with --from there is no first stage that --checkpoint or --resume could be for");
  if (opt.few && !opt.adapt) die("--rows is for --adapt");
  if (opt.from && !opt.fine_tune) opt.fine_tune = 10;
  if (opt.grid && !opt.fine_tune) die("--grid tries rates and warm-ups in the second stage: give --fine-tune too");
  if (opt.epochs && opt.steps) die("give --epochs or --steps, not both");
  if (opt.renormalize && !strcmp(opt.gate_scale, "n")) opt.gate_scale = "paper";
  if (opt.top_k > opt.experts) die("--top-k %d is more than --experts %d", opt.top_k, opt.experts);
  if (!opt.epochs && !opt.steps) opt.epochs = opt.init ? 3 : 8;
  if (opt.rate == 0) opt.rate = opt.init || opt.from ? 5e-5 : 1e-3;
  if (!opt.data) opt.data = "examples/data";
  if (!opt.every) opt.every = 500;
}

/* Splits "a,b,c" in place into at most `most` parts. */
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
  return (char *)memcpy(take(n, 1), s, n);
}

/* ---- tasks and rows ---- */

typedef struct rows {
  int64_t n, tokens;
  int64_t *start;    /* (n+1) */
  int32_t *ids;
  uint8_t *segments;
  float *label;
  uint64_t *group;   /* hash of the question's name, for ranking */
  int32_t *line;     /* in the file, from 1 */
  int32_t *span;     /* (n,4), for span tasks */
  uint64_t *hash;    /* of the letters and digits of the text */
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
  line = tsv_line(f);
  if (!line) die("%s is empty; its first line should name the columns", path);
  f->columns = split(line, '\t', f->column, 16);
  if (f->columns > 16) die("%s:1: more than 16 columns", path);
  return 1;
}

static int tsv_column(const tsv *f, const char *name, int must) {
  int i;
  for (i = 0; i < f->columns; ++i)
    if (!strcmp(f->column[i], name)) return i;
  if (must) die("%s:1: there is no column \"%s\"", f->path, name);
  return -1;
}

static void tsv_fields(tsv *f, char *line, char **field) {
  int n = split(line, '\t', field, f->columns);
  if (n < f->columns) die("%s:%d: %d column%s, expected %d", f->path, f->line, n, n == 1 ? "" : "s", f->columns);
  if (n > f->columns) die("%s:%d: more than the %d columns of the first line", f->path, f->line, f->columns);
}

static float field_number(const tsv *f, const char *name, const char *text) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end || !(v > -1e30 && v < 1e30)) die("%s:%d: %s \"%s\" is no number", f->path, f->line, name, text);
  return (float)v;
}

static int field_whole(const tsv *f, const char *name, const char *text) {
  float v = field_number(f, name, text);
  if (!(v >= -1e9f && v <= 1e9f) || v != (float)(int)v) die("%s:%d: %s \"%s\" is no whole number", f->path, f->line, name, text);
  return (int)v;
}

/* labels: "0=no,1=yes" or "0..5" */
static void read_labels(const tsv *f, task_data *t, char *text) {
  char *part[MOE_MAX_CLASSES];
  const char **names;
  int i, n;
  char *dots = strstr(text, "..");
  if (t->task.kind == MOE_KIND_REGRESSION) {
    if (!dots) die("%s:%d: labels of a regression are a range such as 0..5, not \"%s\"", f->path, f->line, text);
    *dots = 0;
    t->task.low = field_number(f, "lowest label", text);
    t->task.high = field_number(f, "highest label", dots + 2);
    t->task.classes = 1;
    return;
  }
  n = split(text, ',', part, MOE_MAX_CLASSES);
  if (n > MOE_MAX_CLASSES) die("%s:%d: more than %d labels", f->path, f->line, MOE_MAX_CLASSES);
  if (n < 2) die("%s:%d: a task needs at least two labels, \"%s\" names %d", f->path, f->line, text, n);
  names = (const char **)take((size_t)n, sizeof *names);
  for (i = 0; i < n; ++i) {
    char *name = strchr(part[i], '=');
    char index[16];
    snprintf(index, sizeof index, "%d", i);
    if (!name || (size_t)(name - part[i]) != strlen(index) || memcmp(part[i], index, strlen(index)) || !name[1])
      die("%s:%d: label %d should read %d=NAME, not \"%s\"", f->path, f->line, i, i, part[i]);
    names[i] = copy_text(name + 1);
  }
  t->task.classes = n;
  t->task.label = names;
}

static void read_task(const tsv *f, char **field, task_data *t) {
  static const char *const kinds[] = {"classification", "regression", "ranking", "span"};
  int rows_at = tsv_column(f, "rows", 0), max_at = tsv_column(f, "max_len", 0), hard_at = tsv_column(f, "hard", 0), k;
  const char *name = field[tsv_column(f, "name", 1)], *kind = field[tsv_column(f, "kind", 1)];
  const char *input = field[tsv_column(f, "input", 1)], *metric = field[tsv_column(f, "metric", 1)];
  memset(t, 0, sizeof *t);
  if (strlen(name) >= sizeof t->task.name || !*name) die("%s:%d: a task's name has 1 to 63 bytes", f->path, f->line);
  strcpy(t->task.name, name);
  for (k = 0; k < 4 && strcmp(kind, kinds[k]); ++k) continue;
  if (k == 4) die("%s:%d: kind \"%s\" is none of classification, regression, ranking, span", f->path, f->line, kind);
  t->task.kind = (moe_kind)k;
  if (strcmp(input, "single") && strcmp(input, "pair")) die("%s:%d: input \"%s\" is neither single nor pair", f->path, f->line, input);
  t->task.pair = !strcmp(input, "pair");
  if (!*metric || strlen(metric) >= sizeof t->task.metrics) die("%s:%d: metrics have 1 to %d bytes", f->path, f->line, MOE_NAME_BYTES - 1);
  strcpy(t->task.metrics, metric);
  read_labels(f, t, field[tsv_column(f, "labels", 1)]);
  if (rows_at >= 0) t->official = field_whole(f, "rows", field[rows_at]);
  if (max_at >= 0 && *field[max_at]) t->task.max_len = field_whole(f, "max_len", field[max_at]);
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
      if (!strcmp(all[i].task.name, all[n].task.name)) die("%s:%d: task %s stands there twice", path, f.line, all[n].task.name);
    ++n;
  }
  free(f.text);
  if (!n) die("%s names no task", path);
  if (opt.adapt) n_wanted = split(copy_text(opt.adapt), ',', wanted, 1);
  else if (opt.tasks) n_wanted = split(copy_text(opt.tasks), ',', wanted, 512);
  if (opt.adapt && n_wanted > 1) die("--adapt takes one task");
  if (n_wanted > 512) die("--tasks: more than 512");
  if (!n_wanted) {
    tasks = all;
    n_tasks = n;
    return;
  }
  tasks = (task_data *)take((size_t)n_wanted, sizeof *tasks);
  for (i = 0; i < n_wanted; ++i) {
    for (j = 0; j < i; ++j)
      if (!strcmp(wanted[i], wanted[j])) die("--tasks names %s twice", wanted[i]);
    for (j = 0; j < n && strcmp(all[j].task.name, wanted[i]); ++j) continue;
    if (j == n) die("there is no task \"%s\" in %s", wanted[i], path);
    tasks[n_tasks++] = all[j];
  }
}

/* Letters and digits alone, in lower case: two texts with the same hash are the same text for --dedup. Other than ASCII counts as it is. */
static uint64_t text_hash(const char *a, const char *b) {
  uint64_t h = 0xcbf29ce484222325u;
  int pass;
  for (pass = 0; pass < 2; ++pass) {
    const unsigned char *s = (const unsigned char *)(pass ? b : a);
    for (; s && *s; ++s) {
      unsigned c = *s;
      if (c >= 'A' && c <= 'Z') c += 32;
      if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c >= 128) h = (h ^ c) * 0x100000001b3u;
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

/* The tokens that overlap code points [from, to) of sentence 1 or 2 (`text` 0 or 1): a word may begin or end inside a piece. */
static void find_span(const tsv *f, const moe_tokens *tokens, int text, const char *sentence, int from, int to, int32_t *span) {
  moe_env quiet = env;
  int length = code_points(sentence);
  quiet.log = NULL;
  if (from < 0 || to > length || from >= to)
    die("%s:%d: characters %d to %d of sentence%d, which has %d characters, are no word", f->path, f->line, from, to, text + 1, length);
  if (moe_tokens_span(span, tokens, text, from, to, &quiet) != MOE_OK)
    die("%s:%d: the word at characters %d to %d of sentence%d was cut off with the end of the text; try a larger --max-len", f->path,
        f->line, from, to, text + 1);
}

/* Rows by their group, in file order within one. */
static const rows *sorted_rows;

static int by_group(const void *a, const void *b) {
  int64_t i = *(const int64_t *)a, j = *(const int64_t *)b;
  uint64_t x = sorted_rows->group[i], y = sorted_rows->group[j];
  return x < y ? -1 : x > y ? 1 : i < j ? -1 : i > j;
}

static int64_t *rows_by_group(const rows *r) {
  int64_t *order = (int64_t *)take((size_t)r->n, sizeof *order), i;
  for (i = 0; i < r->n; ++i) order[i] = i;
  sorted_rows = r;
  qsort(order, (size_t)r->n, sizeof *order, by_group);
  return order;
}

/* Of the choices of a question exactly one is right. */
static void check_groups(const rows *r, const char *path) {
  int64_t *order = rows_by_group(r), i, end;
  for (i = 0; i < r->n; i = end) {
    int right = 0;
    for (end = i; end < r->n && r->group[order[end]] == r->group[order[i]]; ++end) right += r->label[order[end]] == 1;
    if (right != 1)
      die("%s:%d: the group that begins here has %d choices with label 1, it must be one", path, r->line[order[i]], right);
    if (end == i + 1) die("%s:%d: the group of this row has no other choice", path, r->line[order[i]]);
  }
  free(order);
}

static int read_rows(rows *r, const task_data *t, const char *path, int optional) {
  tsv f;
  char *line, *field[16];
  int max_len = t->task.max_len && t->task.max_len < config.max_len ? t->task.max_len : config.max_len;
  int label_at, a_at, b_at = -1, group_at = -1, span_at[4] = {-1, -1, -1, -1}, i;
  int64_t room = 0, token_room = 0;
  moe_tokens out;
  memset(r, 0, sizeof *r);
  if (!tsv_open(&f, path, optional)) return 0;
  label_at = tsv_column(&f, "label", 1);
  a_at = tsv_column(&f, "sentence1", 1);
  if (t->task.pair) b_at = tsv_column(&f, "sentence2", 1);
  if (t->task.kind == MOE_KIND_RANKING) group_at = tsv_column(&f, "group", 1);
  if (t->task.kind == MOE_KIND_SPAN) {
    span_at[0] = tsv_column(&f, "start1", 1);
    span_at[1] = tsv_column(&f, "end1", 1);
    span_at[2] = tsv_column(&f, "start2", 1);
    span_at[3] = tsv_column(&f, "end2", 1);
  }
  memset(&out, 0, sizeof out);
  out.capacity = max_len;
  out.ids = (int32_t *)take((size_t)max_len, sizeof(int32_t));
  out.segments = (uint8_t *)take((size_t)max_len, 1);
  out.begin = (int32_t *)take((size_t)max_len, sizeof(int32_t));
  out.end = (int32_t *)take((size_t)max_len, sizeof(int32_t));
  while ((line = tsv_line(&f)) != NULL) {
    const char *a, *b;
    float label;
    tsv_fields(&f, line, field);
    a = field[a_at];
    b = b_at >= 0 ? field[b_at] : NULL;
    label = field_number(&f, "label", field[label_at]);
    if (t->task.kind == MOE_KIND_REGRESSION) {
      if (label < t->task.low || label > t->task.high)
        die("%s:%d: label %s is outside %g..%g", path, f.line, field[label_at], (double)t->task.low, (double)t->task.high);
    } else if (!(label >= 0 && label < (float)t->task.classes) || label != (float)(int)label)
      die("%s:%d: label %s is none of 0 .. %d", path, f.line, field[label_at], t->task.classes - 1);
    need(moe_encode(tokenizer, a, strlen(a), b, b ? strlen(b) : 0, max_len, config.truncate, &out, &env));
    if (r->n == room) {
      room = room ? 2 * room : 1024;
      r->start = (int64_t *)grow(r->start, (size_t)room + 1, sizeof *r->start);
      r->label = (float *)grow(r->label, (size_t)room, sizeof *r->label);
      r->hash = (uint64_t *)grow(r->hash, (size_t)room, sizeof *r->hash);
      r->group = (uint64_t *)grow(r->group, (size_t)room, sizeof *r->group);
      r->line = (int32_t *)grow(r->line, (size_t)room, sizeof *r->line);
      r->span = (int32_t *)grow(r->span, (size_t)room * 4, sizeof *r->span);
    }
    if (r->tokens + out.count > token_room) {
      token_room = 2 * token_room + 65536 + out.count;
      r->ids = (int32_t *)grow(r->ids, (size_t)token_room, sizeof *r->ids);
      r->segments = (uint8_t *)grow(r->segments, (size_t)token_room, 1);
    }
    memcpy(r->ids + r->tokens, out.ids, (size_t)out.count * sizeof *r->ids);
    memcpy(r->segments + r->tokens, out.segments, (size_t)out.count);
    r->start[r->n] = r->tokens;
    r->label[r->n] = label;
    r->hash[r->n] = text_hash(a, b);
    r->group[r->n] = group_at >= 0 ? name_hash(field[group_at]) : 0;
    r->line[r->n] = f.line;
    memset(r->span + 4 * r->n, 0, 4 * sizeof *r->span);
    if (t->task.kind == MOE_KIND_SPAN)
      for (i = 0; i < 2; ++i)
        find_span(&f, &out, b ? i : 0, i && b ? b : a, field_whole(&f, "start", field[span_at[2 * i]]),
                  field_whole(&f, "end", field[span_at[2 * i + 1]]), r->span + 4 * r->n + 2 * i);
    r->tokens += out.count;
    ++r->n;
  }
  if (!r->n) die("%s holds no rows", path);
  r->start[r->n] = r->tokens;
  if (t->task.kind == MOE_KIND_RANKING) check_groups(r, path);
  free(out.ids);
  free(out.segments);
  free(out.begin);
  free(out.end);
  free(f.text);
  return 1;
}

static void free_rows(rows *r) {
  free(r->line);
  free(r->start);
  free(r->ids);
  free(r->segments);
  free(r->label);
  free(r->group);
  free(r->span);
  free(r->hash);
}

/* Keeps the rows with keep[i] != 0, the others go to `rest` (or away). */
static void part_rows(rows *r, rows *rest, const unsigned char *keep) {
  rows kept;
  int side;
  int64_t i;
  memset(&kept, 0, sizeof kept);
  for (side = 0; side < 2; ++side) {
    rows *to = side ? rest : &kept;
    if (!to) continue;
    to->start = (int64_t *)take((size_t)r->n + 1, sizeof *to->start);
    to->ids = (int32_t *)take((size_t)r->tokens, sizeof *to->ids);
    to->segments = (uint8_t *)take((size_t)r->tokens, 1);
    to->label = (float *)take((size_t)r->n, sizeof *to->label);
    to->group = (uint64_t *)take((size_t)r->n, sizeof *to->group);
    to->line = (int32_t *)take((size_t)r->n, sizeof *to->line);
    to->span = (int32_t *)take((size_t)r->n * 4, sizeof *to->span);
    to->hash = (uint64_t *)take((size_t)r->n, sizeof *to->hash);
    to->n = to->tokens = 0;
    for (i = 0; i < r->n; ++i) {
      size_t length = (size_t)(r->start[i + 1] - r->start[i]);
      if ((keep[i] != 0) == side) continue;
      memcpy(to->ids + to->tokens, r->ids + r->start[i], length * sizeof *to->ids);
      memcpy(to->segments + to->tokens, r->segments + r->start[i], length);
      to->label[to->n] = r->label[i];
      to->group[to->n] = r->group[i];
      to->line[to->n] = r->line[i];
      memcpy(to->span + 4 * to->n, r->span + 4 * i, 4 * sizeof *to->span);
      to->hash[to->n] = r->hash[i];
      to->start[to->n++] = to->tokens;
      to->tokens += (int64_t)length;
    }
    to->start[to->n] = to->tokens;
  }
  *r = kept;
}

static int by_hash(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

/* A question that loses one choice loses all. */
static void keep_groups_whole(const rows *r, unsigned char *keep) {
  int64_t *order = rows_by_group(r), i, j, end;
  for (i = 0; i < r->n; i = end) {
    unsigned char all = 1;
    for (end = i; end < r->n && r->group[order[end]] == r->group[order[i]]; ++end) all &= keep[order[end]];
    for (j = i; j < end; ++j) keep[order[j]] = all;
  }
  free(order);
}

/* --dedup: a training row that stands in another task's dev set would make that task's score dishonest. */
static void remove_overlaps(void) {
  int t, o, d;
  int64_t i;
  for (t = 0; t < n_tasks; ++t) {
    rows *r = &tasks[t].train, whole = *r;
    unsigned char *keep = (unsigned char *)take((size_t)r->n, 1);
    int64_t before = r->n;
    memset(keep, 1, (size_t)r->n);
    for (o = 0; o < n_tasks; ++o)
      for (d = 0; d < tasks[o].n_dev && o != t; ++d) {
        const rows *dev = &tasks[o].dev[d];
        uint64_t *set = (uint64_t *)take((size_t)dev->n, sizeof *set);
        memcpy(set, dev->hash, (size_t)dev->n * sizeof *set);
        qsort(set, (size_t)dev->n, sizeof *set, by_hash);
        for (i = 0; i < r->n; ++i)
          if (bsearch(&r->hash[i], set, (size_t)dev->n, sizeof *set, by_hash)) keep[i] = 0;
        free(set);
      }
    if (tasks[t].task.kind == MOE_KIND_RANKING) keep_groups_whole(r, keep);
    part_rows(r, NULL, keep);
    free_rows(&whole);
    free(keep);
    if (r->n < before) printf("%s: %lld training rows stand in another task's dev set and are left out\n", tasks[t].task.name, (long long)(before - r->n));
    if (!r->n) die("%s has no training row left", tasks[t].task.name);
  }
}

static void hold_out_rows(void) {
  int t;
  int64_t i;
  for (t = 0; t < n_tasks; ++t) {
    rows *r = &tasks[t].train, whole = *r;
    unsigned char *keep = (unsigned char *)take((size_t)r->n, 1);
    for (i = 0; i < r->n; ++i) { /* the rows of a ranking's group stay together */
      uint64_t of = tasks[t].task.kind == MOE_KIND_RANKING ? r->group[i] : (uint64_t)i;
      keep[i] = (double)(moe_key(1, 0, of, (uint32_t)t, 77) >> 11) / 9007199254740992.0 >= opt.hold_out;
    }
    part_rows(r, &tasks[t].held, keep);
    free_rows(&whole);
    free(keep);
    if (!r->n || !tasks[t].held.n) die("--hold-out %g leaves task %s without rows on one side", opt.hold_out, tasks[t].task.name);
  }
}

static void read_data(void) {
  char path[1024];
  int t;
  for (t = 0; t < n_tasks; ++t) {
    task_data *d = &tasks[t];
    snprintf(path, sizeof path, "%s/%s/train.tsv", opt.data, d->task.name);
    read_rows(&d->train, d, path, 0);
    snprintf(path, sizeof path, "%s/%s/dev.tsv", opt.data, d->task.name);
    read_rows(&d->dev[0], d, path, 0);
    d->n_dev = 1;
    snprintf(path, sizeof path, "%s/%s/dev_2.tsv", opt.data, d->task.name);
    if (read_rows(&d->dev[1], d, path, 1)) d->n_dev = 2;
    snprintf(path, sizeof path, "%s/%s/dev_mm.tsv", opt.data, d->task.name);
    if (d->n_dev == 1 && read_rows(&d->dev[1], d, path, 1)) d->n_dev = 2;
    if (!d->official) d->official = d->train.n;
  }
  if (opt.dedup) remove_overlaps();
  if (opt.hold_out > 0) hold_out_rows();
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
  need(moe_import_sizes(&config, init_file, init_bytes, &env));
  json = beside("config.json", &bytes);
  if (json) {
    need(moe_import_config_json(&config, json, bytes, &env));
    moe_free(json);
  } else if (!opt.heads) die("there is no config.json beside %s: give --heads (and --eps, 1e-12 in BERT)", opt.init);
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
  about = opt.from;
  need(moe_model_load(&from_model, opt.from, &env));
  about = NULL;
  config = *moe_model_config(from_model);
  opt.experts = config.experts;
  for (t = 0; t < n_tasks; ++t) {
    const moe_task *old, *task = &tasks[t].task;
    at = moe_model_find_task(from_model, task->name);
    if (opt.adapt && at >= 0) die("%s knows the task %s already: leave --adapt away to fine-tune it", opt.from, task->name);
    if (opt.adapt) continue;
    if (at < 0) die("%s does not know the task %s: --tasks chooses others, --adapt lets it join", opt.from, task->name);
    old = moe_model_task(from_model, at);
    if (old->kind != task->kind || old->classes != task->classes)
      die("%s knows the task %s with %d outputs; tasks.tsv has another kind or number of labels", opt.from, task->name, (int)old->classes);
  }
}

static void make_tokenizer(void) {
  void *block;
  size_t bytes;
  need(moe_tokenizer_size(vocab, vocab_bytes, &bytes, &env));
  block = take(bytes + 64, 1);
  need(moe_tokenizer_init(&tokenizer, (char *)block + (64 - ((size_t)block & 63)), bytes, vocab, vocab_bytes, config.cased, &env));
}

static void read_vocab(void) {
  char path[1024];
  void *data;
  size_t i;
  int32_t words = 0;
  if (from_model) { /* what it was trained with, and nothing else */
    const char *text = moe_model_vocab(from_model, &vocab_bytes);
    if (!text) die("%s holds no vocabulary", opt.from);
    vocab = (char *)take(vocab_bytes + 1, 1);
    memcpy(vocab, text, vocab_bytes);
    make_tokenizer();
    return;
  }
  if (opt.vocab) snprintf(path, sizeof path, "%s", opt.vocab);
  else snprintf(path, sizeof path, "%s/vocab.txt", opt.data);
  if (!opt.vocab && opt.init) die("--init needs --vocab, the vocabulary that the encoder was trained with");
  need(moe_file_read(&data, &vocab_bytes, path, &env));
  vocab = (char *)data;
  about = path;
  make_tokenizer();
  about = NULL;
  for (i = 0; i < vocab_bytes; ++i) words += vocab[i] == '\n' || i + 1 == vocab_bytes;
  if (!opt.init) config.vocab = words;
  else if (words > config.vocab) die("%s has %d words, but %s has room for %d", path, (int)words, opt.init, (int)config.vocab);
}

static void make_config(void) {
  moe_config_init(&config);
  if (opt.from) {
    read_from();
    if (opt.max_len > config.positions) die("--max-len %d is more than the %d positions of the encoder", opt.max_len, config.positions);
    if (opt.max_len) config.max_len = opt.max_len;
    read_vocab();
    return;
  }
  if (opt.init) read_init();
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
  if (config.max_len > config.positions) die("--max-len %d is more than the %d positions of the encoder", config.max_len, config.positions);
  config.truncate = !strcmp(opt.truncate, "right") ? MOE_TRUNCATE_RIGHT : MOE_TRUNCATE_LONGEST;
  read_vocab();
}

/* ---- evaluation ---- */

#define EVAL_TOKENS 4096
#define EVAL_ROWS 256

typedef struct scores {
  float *value;       /* (n, stride) */
  int32_t stride;
} scores;

static int64_t *route_count; /* (T, L, N) of the run being evaluated, or NULL */

static void count_routes(const moe_context *context, const moe_batch *batch, int task_shown) {
  int32_t l, s, i;
  for (l = 0; l < config.layers; ++l) {
    moe_routes routes;
    if (moe_context_routes(context, l, &routes) != MOE_OK) return;
    for (s = 0; s < batch->S; ++s)
      for (i = batch->seq_start[s] * routes.k; i < batch->seq_start[s + 1] * routes.k; ++i)
        ++route_count[((int64_t)task_shown * config.layers + l) * routes.N + routes.expert[i]];
  }
}

/* Fills a batch with the given rows of one or several tasks. */
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

static void batch_add(batch_buffer *b, const rows *r, int64_t row, int32_t task, int64_t index) {
  int32_t length = (int32_t)(r->start[row + 1] - r->start[row]), s = b->batch.S;
  memcpy(b->ids + b->tokens, r->ids + r->start[row], (size_t)length * sizeof *b->ids);
  memcpy(b->segments + b->tokens, r->segments + r->start[row], (size_t)length);
  memcpy(b->span + 4 * s, r->span + 4 * row, 4 * sizeof *b->span);
  b->tokens += length;
  b->task[s] = task;
  b->label[s] = r->label[row];
  b->index[s] = index;
  b->start[s + 1] = b->tokens;
  ++b->batch.S;
}

static void score_rows(scores *out, moe_context *context, const moe_model *model, const rows *r, int32_t model_task, int task_shown) {
  batch_buffer b;
  int64_t row = 0;
  out->stride = moe_model_max_classes(model);
  out->value = (float *)take((size_t)r->n * (size_t)out->stride, sizeof(float));
  batch_make(&b, EVAL_TOKENS > config.max_len ? EVAL_TOKENS : config.max_len, EVAL_ROWS);
  while (row < r->n) {
    int64_t first = row;
    batch_clear(&b);
    do batch_add(&b, r, row, model_task, row), ++row;
    while (row < r->n && b.batch.S < EVAL_ROWS && b.tokens + (r->start[row + 1] - r->start[row]) <= EVAL_TOKENS);
    need(moe_forward(context, out->value + first * out->stride, &b.batch, &env));
    if (route_count) count_routes(context, &b.batch, task_shown);
  }
  batch_free(&b);
}

/* What is predicted of each row: a class; in a ranking 1 for the choice of a group with the largest logit of class 1 (the first of
   equals), else 0; in a regression 0. */
static int32_t *predictions(const moe_task *t, const rows *r, const scores *s) {
  int32_t *predicted = (int32_t *)take((size_t)r->n, sizeof *predicted), c;
  int64_t i, end, *order;
  if (t->kind == MOE_KIND_RANKING) {
    order = rows_by_group(r);
    for (i = 0; i < r->n; i = end) {
      int64_t best = order[i];
      for (end = i; end < r->n && r->group[order[end]] == r->group[order[i]]; ++end)
        if (s->value[order[end] * s->stride + 1] > s->value[best * s->stride + 1]) best = order[end];
      predicted[best] = 1;
    }
    free(order);
    return predicted;
  }
  for (i = 0; i < r->n; ++i)
    for (c = 1; c < t->classes; ++c)
      if (s->value[i * s->stride + c] > s->value[i * s->stride + predicted[i]]) predicted[i] = c;
  return predicted;
}

/* Accuracy over the groups of a ranking: each has one right row, and one that is chosen. */
static double ranking_accuracy(const int32_t *predicted, const int32_t *label, size_t n) {
  size_t i;
  int64_t groups = 0, right = 0;
  for (i = 0; i < n; ++i) {
    groups += predicted[i];
    right += predicted[i] && label[i] == 1;
  }
  return (double)right / (double)groups;
}

/* The first of a task's metrics is the one that counts. */
static void metric_name(char *name, const moe_task *t) {
  strcpy(name, t->metrics);
  if (strchr(name, ',')) *strchr(name, ',') = 0;
}

/* Value of that metric; *defined becomes 0 where it has none (one class only, say): it then counts as 0. */
static double metric(const moe_task *t, const rows *r, const scores *s, int *defined) {
  size_t n = (size_t)r->n, i;
  int32_t *predicted = predictions(t, r, s), *label = (int32_t *)take(n, sizeof *label);
  float *value = (float *)take(n, sizeof *value);
  float *scratch = (float *)take(n, 2 * sizeof *scratch);
  char name[MOE_NAME_BYTES];
  double v = 0;
  int ok = 1;
  metric_name(name, t);
  for (i = 0; i < n; ++i) {
    value[i] = s->value[i * (size_t)s->stride];
    label[i] = (int32_t)r->label[i];
  }
  if (t->kind == MOE_KIND_RANKING && !strcmp(name, "accuracy")) v = ranking_accuracy(predicted, label, n);
  else if (!strcmp(name, "accuracy")) v = moe_metric_accuracy(predicted, label, n, &ok);
  else if (!strcmp(name, "f1")) v = moe_metric_f1(predicted, label, n, &ok);
  else if (!strcmp(name, "macro_f1")) v = moe_metric_macro_f1(predicted, label, n, t->classes, &ok);
  else if (!strcmp(name, "matthews")) v = moe_metric_matthews(predicted, label, n, t->classes, &ok);
  else if (!strcmp(name, "pearson")) v = moe_metric_pearson(value, r->label, n, &ok);
  else if (!strcmp(name, "spearman")) v = moe_metric_spearman(value, r->label, n, scratch, &ok);
  else die("task %s: there is no metric \"%s\"", t->name, name);
  if (!ok) *defined = 0;
  free(predicted);
  free(label);
  free(value);
  free(scratch);
  return v;
}

static FILE *prediction_file; /* where evaluate writes the predictions, or NULL */

/* A line for each dev row: task, set (1: dev.tsv, 2: the second one), line of the file, label, prediction, scores. */
static void write_predictions(const task_data *t, int set, const rows *r, const scores *s) {
  int32_t *predicted = predictions(&t->task, r, s), c;
  int64_t i;
  for (i = 0; i < r->n; ++i) {
    const float *v = s->value + i * s->stride;
    fprintf(prediction_file, "%s\t%d\t%d\t%.9g\t", t->task.name, set + 1, r->line[i], (double)r->label[i]);
    if (t->task.kind == MOE_KIND_REGRESSION) fprintf(prediction_file, "%.9g\t", (double)v[0]);
    else fprintf(prediction_file, "%d\t", (int)predicted[i]);
    for (c = 0; c < t->task.classes; ++c) fprintf(prediction_file, "%s%.9g", c ? " " : "", (double)v[c]);
    fprintf(prediction_file, "\n");
  }
  free(predicted);
}

/* Mean of the metric over n_sets sets of rows; *defined may be NULL. */
static double evaluate(moe_context *context, const moe_model *model, const rows *r, int n_sets, int32_t model_task, int task_shown, int *defined) {
  double sum = 0;
  int d, ok = 1;
  for (d = 0; d < n_sets; ++d) {
    scores s;
    score_rows(&s, context, model, &r[d], model_task, task_shown);
    sum += metric(&tasks[task_shown].task, &r[d], &s, &ok);
    if (prediction_file) write_predictions(&tasks[task_shown], d, &r[d], &s);
    free(s.value);
  }
  if (defined) *defined = ok;
  return sum / n_sets;
}

/* What the most frequent class (or the mean) scores, and the standard error of such a score: a table's yardstick. */
static double majority(const task_data *t, double *error) {
  int64_t count[MOE_MAX_CLASSES], i, best = 0;
  const rows *r = &t->dev[0];
  double share;
  if (t->task.kind == MOE_KIND_REGRESSION || !strncmp(t->task.metrics, "matthews", 8)) {
    *error = 1 / sqrt((double)(r->n > 1 ? r->n - 1 : 1));
    return 0;
  }
  memset(count, 0, sizeof count);
  for (i = 0; i < r->n; ++i) ++count[(int)r->label[i]];
  for (i = 0; i < t->task.classes; ++i)
    if (count[i] > count[best]) best = i;
  share = (double)count[best] / (double)r->n;
  *error = sqrt(share * (1 - share) / (double)r->n);
  return share;
}

/* ---- training ---- */

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

typedef struct result {
  int system, seed;
  double *value; /* (T) */
  int *defined;  /* (T) 0: the metric has no value, and counts as 0 */
  double small, all, seconds, tokens;
  size_t parameters;
  int64_t steps;
  int64_t *routes; /* (T, L, N) or NULL */
} result;

static result *results;
static int n_results, n_runs, given_argc;
static char **given_argv;

/* FILE-SUFFIX with the ending kept. */
static void with_suffix(char *out, size_t size, const char *file, const char *suffix) {
  const char *dot = strrchr(file, '.'), *slash = strrchr(file, '/');
  int stem = (int)(dot && (!slash || dot > slash) ? dot - file : (long)strlen(file)), n;
  n = snprintf(out, size, "%.*s-%s%s", stem, file, suffix, file + stem);
  if (n < 0 || (size_t)n >= size) die("the name %s is too long", file);
}

/* FILE, or with several runs FILE-SYSTEM-SEED with the ending kept; Single-Task adds the task. */
static void run_path(char *out, size_t size, const char *file, int system, int seed, const char *task) {
  const char *dot = strrchr(file, '.'), *slash = strrchr(file, '/');
  int stem = (int)(dot && (!slash || dot > slash) ? dot - file : (long)strlen(file)), n;
  if (n_runs == 1 && (!task || n_tasks == 1)) n = snprintf(out, size, "%s", file);
  else if (task) n = snprintf(out, size, "%.*s-%s-%d-%s%s", stem, file, system_name[system], seed, task, file + stem);
  else n = snprintf(out, size, "%.*s-%s-%d%s", stem, file, system_name[system], seed, file + stem);
  if (n < 0 || (size_t)n >= size) die("the name %s is too long", file);
}

typedef struct progress {
  char title[96];
  double began, last, tokens;
  int64_t first, steps;
  float loss;
  int moving;
} progress;

static void show_progress(progress *p, int64_t step, int end) {
  double t = now(), seconds = t - p->began;
  int64_t left = (int64_t)(seconds / (double)(step - p->first + (step == p->first)) * (double)(p->steps - step));
  if (!end && p->moving && t - p->last < 0.2) return;
  if (!end && !p->moving && t - p->last < 30) return;
  p->last = t;
  fprintf(stderr, "%s%-34s step %lld/%lld  loss %.4f  %.0f tokens/s  %lld:%02lld left %s", p->moving ? "\r" : "", p->title, (long long)step,
          (long long)p->steps, (double)p->loss, p->tokens / (seconds > 0 ? seconds : 1), (long long)(left / 60), (long long)(left % 60),
          p->moving && !end ? "  " : "\n");
}

static void make_note(char *note, size_t size, int system, int seed, int64_t steps, const int *which, int n) {
  int i, at;
  at = snprintf(note, size, "system=%s seed=%d steps=%lld batch=%d lr=%.9g warmup=%.9g decay=%.9g clip=%.9g dropout=%.9g sampling=%s order=%s balance=%.9g "
                "z_loss=%.9g jitter=%.9g max_len=%d hold_out=%.9g gate_lr=%.9g tasks=", system_name[system], seed, (long long)steps, opt.batch, opt.rate, opt.warmup,
                opt.decay, opt.clip, opt.dropout, opt.sampling, opt.order, opt.balance, opt.z_loss, opt.jitter, config.max_len, opt.hold_out, opt.gate_rate);
  for (i = 0; i < n && at > 0 && (size_t)at < size; ++i)
    at += snprintf(note + at, size - (size_t)at, "%s:%lld,", tasks[which[i]].task.name, (long long)tasks[which[i]].train.n);
}

/* Goes on from a checkpoint, if there is one for this run: 1, or 0 where there is none. */
static int resume_run(moe_trainer *trainer, moe_sampler *sampler, const char *note, const char *path) {
  char old[65536];
  void *data;
  size_t bytes, length;
  FILE *f = fopen(path, "rb");
  if (!f) {
    if (n_runs == 1) die("cannot open %s: %s", path, strerror(errno));
    return 0; /* of several runs some have not begun */
  }
  fclose(f);
  need(moe_file_read(&data, &bytes, path, &env));
  about = path;
  need(moe_checkpoint_note(old, sizeof old, &length, data, bytes, &env));
  if (strcmp(old, note)) die("%s was made with other options:\n  there %s\n  here  %s", path, old, note);
  need(moe_checkpoint_read(trainer, sampler, data, bytes, &env));
  about = NULL;
  moe_free(data);
  fprintf(stderr, "going on from %s at step %lld\n", path, (long long)moe_trainer_step(trainer));
  return 1;
}

/* One argument as a shell reads it again. */
static void print_argument(FILE *f, const char *s) {
  if (*s && strspn(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-+=:,./@%") == strlen(s)) {
    fprintf(f, " %s", s);
    return;
  }
  fputs(" '", f);
  for (; *s; ++s) {
    if (*s == '\'') fputs("'\\''", f);
    else fputc(*s, f);
  }
  fputc('\'', f);
}

/* After Ctrl-C: says where the state is and how to go on. */
static void stop_here(const moe_trainer *trainer, const char *path) {
  int i;
  fprintf(stderr, "\ninterrupted after step %lld; the state is in %s. To go on:\n ", (long long)moe_trainer_step(trainer), path);
  for (i = 0; i < given_argc; ++i) {
    if (!strcmp(given_argv[i], "--resume")) { ++i; continue; }
    print_argument(stderr, given_argv[i]);
  }
  fputs(" --resume", stderr);
  print_argument(stderr, opt.checkpoint ? opt.checkpoint : "checkpoint.safetensors");
  fputc('\n', stderr);
  exit(130);
}

static void set_sampling(moe_sampler_config *c, int seed, int64_t draws) {
  memset(c, 0, sizeof *c);
  c->seed = (uint64_t)seed;
  c->draws = draws;
  c->tau = 1;
  c->in_order = !strcmp(opt.order, "file");
  if (!strcmp(opt.sampling, "natural")) c->sampling = MOE_SAMPLING_NATURAL;
  else if (!strcmp(opt.sampling, "uniform")) c->sampling = MOE_SAMPLING_UNIFORM;
  else if (!strcmp(opt.sampling, "uniform-natural")) c->sampling = MOE_SAMPLING_UNIFORM_NATURAL;
  else if (!strncmp(opt.sampling, "temperature:", 12)) {
    c->sampling = MOE_SAMPLING_TEMPERATURE;
    c->tau = (float)number("--sampling temperature:T", opt.sampling + 12, 1e-3, 1e6);
  } else die("--sampling is natural, uniform, temperature:T or uniform-natural, not \"%s\"", opt.sampling);
}

static void set_training(moe_train_config *tc, int seed, int64_t steps, double rate, double warmup) {
  static moe_group gates[2] = {{".gate.", 1, 1}, {"tasks.vectors", 1, 1}};
  moe_train_config_init(tc);
  tc->rate = (float)rate;
  tc->warmup = (float)warmup;
  tc->steps = steps;
  tc->decay = (float)opt.decay;
  tc->clip = (float)opt.clip;
  tc->dropout = (float)opt.dropout;
  tc->balance = (float)opt.balance;
  tc->z_loss = (float)opt.z_loss;
  tc->jitter = (float)opt.jitter;
  tc->seed = (uint64_t)seed;
  gates[0].rate = gates[1].rate = (float)opt.gate_rate;
  tc->groups = gates;
  tc->n_groups = opt.gate_rate < 1 || opt.gate_rate > 1 ? 2 : 0;
}

static moe_model *make_model(int system, int seed, const int *which, int n) {
  moe_task *list = (moe_task *)take((size_t)n, sizeof *list);
  moe_import_options import;
  moe_config c = config;
  moe_model *model;
  int i;
  for (i = 0; i < n; ++i) list[i] = tasks[which[i]].task;
  if (system >= SWITCH) {
    c.router = system == TAG ? MOE_ROUTER_TASK : system == EMBED ? MOE_ROUTER_EMBEDDING : MOE_ROUTER_SHARED;
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

/* One optimizer step: draws a super-batch of `size` sequences and runs it in micro-batches. */
static float train_step(moe_trainer *trainer, moe_sampler *sampler, batch_buffer *b, const int *which, int size, int32_t room, double *tokens) {
  float sum = 0, loss;
  int i;
  batch_clear(b);
  for (i = 0; i <= size; ++i) {
    int32_t task = 0;
    int64_t row = 0, length = 0;
    const rows *r = NULL;
    if (i < size) {
      moe_sample(sampler, &task, &row);
      r = &tasks[which[task]].train;
      length = r->start[row + 1] - r->start[row];
    }
    if (b->batch.S && (i == size || b->tokens + length > room)) {
      moe_status status = moe_accumulate(trainer, &b->batch, size, &loss, NULL, &env);
      if (status != MOE_OK) die("training stopped in step %lld (%s); try a smaller --lr", (long long)moe_trainer_step(trainer) + 1, moe_status_text(status));
      sum += loss;
      *tokens += b->tokens;
      batch_clear(b);
    }
    if (r) batch_add(b, r, row, task, i);
  }
  return sum;
}

/* --hold-out: the weights of the epoch that scores best on rows held out of train. A run that goes on must know them: they are kept beside
   the checkpoint, written before it. Killed between the two, that file is ahead: the steps between then come again, with the same score. */
typedef struct best_epoch {
  float *weights; /* NULL: no epoch has ended */
  double score;
  int unsaved;
} best_epoch;

/* Mean of the tasks' metrics on the rows held out of train. */
static double held_out_score(moe_context *context, const moe_model *model, const int *which, int n) {
  double sum = 0;
  int i;
  for (i = 0; i < n; ++i) sum += evaluate(context, model, &tasks[which[i]].held, 1, i, which[i], NULL);
  return sum / n;
}

static void best_path(char *path, size_t size, const char *checkpoint) { snprintf(path, size, "%s.best", checkpoint); }

/* Takes the weights if they score better than what is kept. */
static void best_offer(best_epoch *best, moe_context *context, moe_model *model, const int *which, int n) {
  double score = held_out_score(context, model, which, n);
  size_t count = moe_model_parameters(model);
  if (best->weights && !(score > best->score)) return;
  if (!best->weights) best->weights = (float *)take(count, sizeof(float));
  memcpy(best->weights, moe_model_weights(model), count * sizeof(float));
  best->score = score;
  best->unsaved = 1;
}

static void best_load(best_epoch *best, const char *checkpoint, const moe_model *model, const int *which, int n) {
  char path[1056];
  moe_limits limits = {EVAL_TOKENS, EVAL_ROWS, 0};
  moe_context *context;
  moe_model *old;
  FILE *f;
  best_path(path, sizeof path, checkpoint);
  f = fopen(path, "rb");
  if (!f) return; /* no epoch had ended */
  fclose(f);
  need(moe_model_load(&old, path, &env));
  if (moe_model_parameters(old) != moe_model_parameters(model) || moe_model_tasks(old) != n)
    die("%s: %zu parameters, %d tasks; expected %zu, %d", path, moe_model_parameters(old), (int)moe_model_tasks(old), moe_model_parameters(model), n);
  if (limits.tokens < config.max_len) limits.tokens = config.max_len;
  need(moe_context_create(&context, old, &limits, &env));
  best_offer(best, context, old, which, n);
  moe_context_free(context);
  moe_model_free(old);
}

/* Writes them to the file beside the checkpoint. */
static void best_save(best_epoch *best, const char *checkpoint, moe_model *model) {
  char path[1056];
  size_t count = moe_model_parameters(model), i;
  float *now_there = moe_model_weights(model);
  int pass;
  best_path(path, sizeof path, checkpoint);
  if (!best->weights) remove(path); /* of another run */
  if (!best->unsaved) return;
  for (pass = 0; pass < 2; ++pass) {
    for (i = 0; i < count; ++i) {
      float w = now_there[i];
      now_there[i] = best->weights[i];
      best->weights[i] = w;
    }
    if (!pass) need(moe_model_save(model, path, &env));
  }
  best->unsaved = 0;
}

static char prediction_path[1024];

static void open_predictions(int system, int seed, const char *suffix) {
  if (!opt.predictions) return;
  run_path(prediction_path, sizeof prediction_path, opt.predictions, system, seed, suffix);
  prediction_file = fopen(prediction_path, "wb");
  if (!prediction_file) die("cannot write %s: %s", prediction_path, strerror(errno));
  fprintf(prediction_file, "task\tset\tline\tlabel\tprediction\tscores\n");
}

static void close_predictions(void) {
  int bad;
  if (!prediction_file) return;
  bad = ferror(prediction_file);
  if (fclose(prediction_file) || bad) die("writing %s failed", prediction_path);
  prediction_file = NULL;
}

static moe_model *first_stage; /* what --fine-tune goes on from */

/* The vectors that MT-Embed has learned, a line for each task. */
static void print_vectors(moe_model *model, int seed) {
  moe_tensor t;
  int i, j;
  moe_model_tensor(model, moe_model_find_tensor(model, "tasks.vectors"), &t);
  printf("\nTask vectors of MT-Embed (seed %d)\n", seed);
  for (i = 0; i < t.shape[0]; ++i) {
    printf("%-15.15s", moe_model_task(model, i)->name);
    for (j = 0; j < t.shape[1]; ++j) printf(" %8.4f", (double)moe_model_weights(model)[t.offset + (size_t)(i * t.shape[1] + j)]);
    printf("\n");
  }
}

/* Trains one model on n tasks; fills the results of those tasks. */
static void train_model(result *res, int system, int seed, const int *which, int n, int64_t steps, const char *suffix) {
  moe_model *model = make_model(system, seed, which, n);
  moe_train_config tc;
  moe_trainer *trainer;
  moe_context *context;
  moe_limits limits, eval_limits = {EVAL_TOKENS, EVAL_ROWS, 0};
  moe_sampler_config sc;
  moe_sampler sampler;
  batch_buffer b;
  progress p;
  char path[1024], note[65536];
  int64_t *n_rows = (int64_t *)take((size_t)n, sizeof *n_rows), *used = (int64_t *)take((size_t)n, sizeof *used), total = 0, epoch;
  best_epoch best = {NULL, 0, 0};
  int i;
  int32_t room = opt.micro_batch > config.max_len ? opt.micro_batch : config.max_len;
  if ((int64_t)opt.batch * config.max_len < room) room = opt.batch * config.max_len;
  for (i = 0; i < n; ++i) total += n_rows[i] = tasks[which[i]].train.n;
  epoch = (total + opt.batch - 1) / opt.batch;
  limits.tokens = room;
  limits.sequences = opt.batch;
  limits.training = 1;
  if (eval_limits.tokens < config.max_len) eval_limits.tokens = config.max_len;
  set_training(&tc, seed, steps, opt.rate, opt.warmup);
  need(moe_trainer_create(&trainer, model, &limits, &tc, &env));
  need(moe_context_create(&context, model, &eval_limits, &env));
  set_sampling(&sc, seed, steps * opt.batch);
  need(moe_sampler_init(&sampler, &sc, n_rows, used, n, &env));
  make_note(note, sizeof note, system, seed, steps, which, n);
  if (opt.resume) {
    run_path(path, sizeof path, opt.resume, system, seed, suffix);
    if (resume_run(trainer, &sampler, note, path) && opt.hold_out > 0) best_load(&best, path, model, which, n);
  }
  run_path(path, sizeof path, opt.checkpoint ? opt.checkpoint : "checkpoint.safetensors", system, seed, suffix);
  batch_make(&b, room, opt.batch);
  memset(&p, 0, sizeof p);
  snprintf(p.title, sizeof p.title, "%s%s%.40s seed %d", system_title[system], suffix ? " " : "", suffix ? suffix : "", seed);
  p.began = p.last = now();
  p.first = moe_trainer_step(trainer);
  p.steps = steps;
  p.moving = isatty(fileno(stderr));
  while (moe_trainer_step(trainer) < steps) {
    int64_t step;
    p.loss = train_step(trainer, &sampler, &b, which, opt.batch, room, &p.tokens);
    if (moe_update(trainer, NULL, &env) != MOE_OK) die("training stopped in step %lld; try a smaller --lr", (long long)moe_trainer_step(trainer) + 1);
    step = moe_trainer_step(trainer);
    show_progress(&p, step, step == steps);
    if (opt.hold_out > 0 && (step % epoch == 0 || step == steps)) best_offer(&best, context, model, which, n);
    if (interrupted || (opt.checkpoint && (step % opt.every == 0 || step == steps))) {
      if (opt.hold_out > 0) best_save(&best, path, model);
      need(moe_checkpoint_save(trainer, &sampler, note, path, &env));
    }
    if (interrupted) stop_here(trainer, path);
  }
  res->seconds += now() - p.began;
  res->tokens += p.tokens;
  res->steps += steps;
  res->parameters += moe_model_parameters(model);
  moe_trainer_free(trainer);
  if (best.weights) {
    memcpy(moe_model_weights(model), best.weights, moe_model_parameters(model) * sizeof(float));
    need(moe_model_pack(model, NULL, &env));
    free(best.weights);
  }
  route_count = res->routes;
  open_predictions(system, seed, suffix);
  for (i = 0; i < n; ++i)
    res->value[which[i]] = evaluate(context, model, tasks[which[i]].dev, tasks[which[i]].n_dev, i, which[i], &res->defined[which[i]]);
  close_predictions();
  route_count = NULL;
  if (opt.save) {
    run_path(path, sizeof path, opt.save, system, seed, suffix);
    need(moe_model_save(model, path, &env));
  }
  moe_context_free(context);
  batch_free(&b);
  free(n_rows);
  free(used);
  if (system == EMBED) print_vectors(model, seed);
  if (opt.fine_tune && system != SINGLE) first_stage = model;
  else moe_model_free(model);
}

static void average(result *res) {
  double small = 0, all = 0;
  int t, n_small = 0;
  for (t = 0; t < n_tasks; ++t) {
    all += res->value[t];
    if (tasks[t].official <= 10000) small += res->value[t], ++n_small;
  }
  res->all = all / n_tasks;
  res->small = n_small ? small / n_small : 0;
}

/* ---- the second stage ---- */

/* One fine-tuning of one task: `score` chose the epoch (held-out rows, or dev), `value` is the metric on dev. */
typedef struct tuned {
  double score, value, tokens;
  int defined;
  int64_t steps;
  moe_model *model;
} tuned;

/* Trains a copy of a model of one task on that task's rows; keeps the best epoch, ends after --patience epochs that are no better [TaG] 4.3. */
static tuned tune_once(const moe_model *start, int t, int seed, double rate, double warmup, progress *p) {
  static const int32_t alone;
  tuned out;
  const task_data *data = &tasks[t];
  moe_train_config tc;
  moe_trainer *trainer;
  moe_context *context;
  moe_limits limits, eval_limits = {EVAL_TOKENS, EVAL_ROWS, 0};
  moe_sampler_config sc;
  moe_sampler sampler;
  batch_buffer b;
  int64_t n_rows = data->train.n, used = 0, epoch = (n_rows + opt.fine_batch - 1) / opt.fine_batch;
  float *best = NULL;
  size_t count;
  int worse = 0;
  int32_t room = opt.micro_batch > config.max_len ? opt.micro_batch : config.max_len;
  if ((int64_t)opt.fine_batch * config.max_len < room) room = opt.fine_batch * config.max_len;
  memset(&out, 0, sizeof out);
  need(moe_model_extract(&out.model, start, &alone, 1, NULL, &env));
  count = moe_model_parameters(out.model);
  best = (float *)take(count, sizeof *best);
  limits.tokens = room;
  limits.sequences = opt.fine_batch;
  limits.training = 1;
  if (eval_limits.tokens < config.max_len) eval_limits.tokens = config.max_len;
  set_training(&tc, seed, epoch * opt.fine_tune, rate, warmup);
  need(moe_trainer_create(&trainer, out.model, &limits, &tc, &env));
  need(moe_context_create(&context, out.model, &eval_limits, &env));
  set_sampling(&sc, seed, tc.steps * opt.fine_batch);
  need(moe_sampler_init(&sampler, &sc, &n_rows, &used, 1, &env));
  batch_make(&b, room, opt.fine_batch);
  p->first = 0;
  p->steps = tc.steps;
  p->began = now();
  p->tokens = 0;
  while (moe_trainer_step(trainer) < tc.steps && worse < opt.patience) {
    int64_t step;
    double score;
    p->loss = train_step(trainer, &sampler, &b, &t, opt.fine_batch, room, &p->tokens);
    if (moe_update(trainer, NULL, &env) != MOE_OK) die("training stopped in step %lld; try a smaller --lr", (long long)moe_trainer_step(trainer) + 1);
    if (interrupted) die("interrupted while %s was fine-tuned; what was finished before is kept", data->task.name);
    step = moe_trainer_step(trainer);
    show_progress(p, step, 0);
    if (step % epoch) continue;
    score = evaluate(context, out.model, opt.hold_out > 0 ? &data->held : data->dev, opt.hold_out > 0 ? 1 : data->n_dev, 0, t, NULL);
    ++worse;
    if (step > epoch && !(score > out.score)) continue;
    worse = 0;
    out.score = score;
    out.steps = step;
    memcpy(best, moe_model_weights(out.model), count * sizeof *best);
  }
  show_progress(p, moe_trainer_step(trainer), 1);
  out.tokens = p->tokens;
  moe_trainer_free(trainer);
  memcpy(moe_model_weights(out.model), best, count * sizeof *best);
  need(moe_model_pack(out.model, NULL, &env));
  out.value = evaluate(context, out.model, data->dev, data->n_dev, 0, t, &out.defined);
  moe_context_free(context);
  batch_free(&b);
  free(best);
  return out;
}

/* Every pair of --grid, or --lr and --warmup alone; the best by its score. */
static tuned tune(const moe_model *start, int t, int seed, const char *title) {
  char *half[2], *rate[64], *warmup[64];
  int rates = 1, warmups = 1, i, j;
  tuned best;
  progress p;
  memset(&best, 0, sizeof best);
  memset(&p, 0, sizeof p);
  p.moving = isatty(fileno(stderr));
  p.last = now();
  snprintf(p.title, sizeof p.title, "%s", title);
  half[1] = NULL;
  if (opt.grid) {
    if (split(copy_text(opt.grid), ':', half, 2) > 2) die("--grid is RATES or RATES:WARMUPS, not \"%s\"", opt.grid);
    rates = split(half[0], ',', rate, 64);
    if (half[1]) warmups = split(half[1], ',', warmup, 64);
    if (rates > 64 || warmups > 64) die("--grid: more than 64 values");
  }
  for (i = 0; i < rates; ++i)
    for (j = 0; j < warmups; ++j) {
      tuned one = tune_once(start, t, seed, opt.grid ? number("--grid", rate[i], 1e-12, 1e6) : opt.rate,
                            half[1] ? number("--grid", warmup[j], 0, 1) : opt.warmup, &p);
      if (opt.grid)
        printf("%s: rate %s, warm-up %s: %.4f to choose by, %.4f on dev\n", title, rate[i], half[1] ? warmup[j] : "as given", one.score, one.value);
      one.tokens += best.tokens;
      if (best.model && !(one.score > best.score)) {
        moe_model_free(one.model);
        best.tokens = one.tokens;
        continue;
      }
      moe_model_free(best.model);
      best = one;
    }
  return best;
}

/* Fine-tunes every task of the table from `model`, each by itself. */
static void run_tuned(result *res, const moe_model *model) {
  char path[1024], title[96];
  int t;
  res->value = (double *)take((size_t)n_tasks, sizeof *res->value);
  res->defined = (int *)take((size_t)n_tasks, sizeof *res->defined);
  for (t = 0; t < n_tasks; ++t) {
    int32_t at = moe_model_find_task(model, tasks[t].task.name);
    double began = now();
    moe_model *alone;
    tuned one;
    snprintf(title, sizeof title, "%s %.40s seed %d", system_title[res->system], tasks[t].task.name, res->seed);
    need(moe_model_extract(&alone, model, &at, 1, NULL, &env));
    one = tune(alone, t, res->seed, title);
    moe_model_free(alone);
    res->value[t] = one.value;
    res->defined[t] = one.defined;
    res->seconds += now() - began;
    res->tokens += one.tokens;
    res->steps += one.steps;
    res->parameters += moe_model_parameters(one.model);
    if (opt.save) {
      run_path(path, sizeof path, opt.save, res->system, res->seed, tasks[t].task.name);
      need(moe_model_save(one.model, path, &env));
    }
    moe_model_free(one.model);
  }
  average(res);
}

static int64_t steps_for(int64_t n_rows, int64_t of_rows) {
  int64_t steps = opt.epochs ? (n_rows * opt.epochs + opt.batch - 1) / opt.batch : (opt.steps * n_rows + of_rows - 1) / of_rows;
  return steps < 1 ? 1 : steps;
}

static void run_system(result *res) {
  int *which = (int *)take((size_t)n_tasks, sizeof *which), t;
  int64_t total = 0;
  res->value = (double *)take((size_t)n_tasks, sizeof *res->value);
  res->defined = (int *)take((size_t)n_tasks, sizeof *res->defined);
  for (t = 0; t < n_tasks; ++t) total += tasks[t].train.n;
  if (res->system >= SWITCH)
    res->routes = (int64_t *)take((size_t)n_tasks * (size_t)config.layers * (size_t)opt.experts, sizeof *res->routes);
  if (res->system == SINGLE)
    for (t = 0; t < n_tasks; ++t) train_model(res, SINGLE, res->seed, &t, 1, steps_for(tasks[t].train.n, total), tasks[t].task.name);
  else {
    for (t = 0; t < n_tasks; ++t) which[t] = t;
    train_model(res, res->system, res->seed, which, n_tasks, steps_for(total, total), NULL);
  }
  average(res);
  free(which);
}

/* ---- what is shown ---- */

static double mean_of(int system, int t, double *deviation, int *n) {
  double sum = 0, square = 0;
  int i;
  *n = 0;
  for (i = 0; i < n_results; ++i)
    if (results[i].system == system) {
      double v = t == -1 ? results[i].small : t == -2 ? results[i].all : results[i].value[t];
      sum += v;
      square += v * v;
      ++*n;
    }
  sum /= *n;
  square = square / *n - sum * sum;
  *deviation = *n > 1 && square > 0 ? sqrt(square * *n / (*n - 1)) : 0;
  return sum;
}

static void print_cell(double v, double deviation, int n, int undefined, int width) {
  char text[64];
  if (n > 1) snprintf(text, sizeof text, "%.1f+-%.1f", 100 * v, 100 * deviation);
  else snprintf(text, sizeof text, "%.1f", 100 * v);
  printf(" %*s%s", width - undefined, text, undefined ? "?" : "");
}

/* Of the seeds, as the paper reports. */
static void print_maximum(int system, int width) {
  int t, i;
  printf("%-13s", "  maximum");
  for (t = 0; t < n_tasks + 2; ++t) {
    double best = -2;
    for (i = 0; i < n_results; ++i) {
      double v = results[i].system != system ? -2 : t < n_tasks ? results[i].value[t] : t == n_tasks ? results[i].small : results[i].all;
      if (v > best) best = v;
    }
    if (t == n_tasks) printf(" |");
    print_cell(best, 0, 1, 0, width);
  }
  printf(" |\n");
}

static void print_table(void) {
  int s, t, i, width = 10, n, several = 0, bad, any_bad = 0;
  for (s = 0; s < LINES; ++s) {
    double d;
    mean_of(s, -2, &d, &n);
    several |= n > 1;
  }
  printf("\n%-13s", "");
  for (t = 0; t < n_tasks; ++t) printf(" %*.*s%s", width - tasks[t].hard, width - 1, tasks[t].task.name, tasks[t].hard ? "*" : "");
  printf(" | %*s %*s | %11s %8s\n%-13s", width, "small", width, "all", "parameters", "seconds", "metric x 100");
  for (t = 0; t < n_tasks; ++t) {
    char name[MOE_NAME_BYTES];
    metric_name(name, &tasks[t].task);
    printf(" %*.*s", width, width - 1, name);
  }
  printf(" |\n%-13s", "train/dev rows");
  for (t = 0; t < n_tasks; ++t) {
    char text[48];
    snprintf(text, sizeof text, "%lld/%lld", (long long)tasks[t].train.n, (long long)tasks[t].dev[0].n);
    printf(" %*s", width - (t == 0), text);
  }
  printf(" |\n%-13s", "chance + 2 se");
  for (t = 0; t < n_tasks; ++t) {
    double error, v = majority(&tasks[t], &error);
    print_cell(v + 2 * error, 0, 1, 0, width);
  }
  printf(" |\n");
  for (s = 0; s < LINES; ++s) {
    double d, v, seconds = 0;
    size_t parameters = 0;
    mean_of(s, -2, &d, &n);
    if (!n) continue;
    printf("%-13s", system_title[s]);
    for (t = 0; t < n_tasks; ++t) {
      v = mean_of(s, t, &d, &n);
      for (i = bad = 0; i < n_results; ++i) bad |= results[i].system == s && !results[i].defined[t];
      any_bad |= bad;
      print_cell(v, d, n, bad, width);
    }
    printf(" |");
    v = mean_of(s, -1, &d, &n), print_cell(v, d, n, 0, width);
    v = mean_of(s, -2, &d, &n), print_cell(v, d, n, 0, width);
    for (i = 0; i < n_results; ++i)
      if (results[i].system == s) seconds += results[i].seconds, parameters = results[i].parameters;
    printf(" | %11zu %8.1f\n", parameters, seconds / n);
    if (s >= TUNED && n > 1) print_maximum(s, width);
  }
  printf("small: mean over tasks with at most 10,000 training rows; all: over all tasks%s.\n", several ? "; mean+-standard deviation over the seeds" : "");
  printf("chance + 2 se: the most frequent class (Spearman, Matthews: 0) plus two standard errors of the dev set");
  for (t = 0; t < n_tasks; ++t)
    if (tasks[t].hard) {
      printf("; *: declared hard");
      break;
    }
  printf(".\n");
  if (any_bad) printf("?: the metric has no value (one class is all that is right or predicted, or the values are constant) and counts as 0.\n");
}

/* Shares of the experts, as whole percents, a row for each task and a group of columns for each layer. */
static void print_routes(const result *r) {
  int t, l, e;
  printf("\nExperts chosen by %s (seed %d), %% of each task's dev tokens, by layer\n%-15s", system_title[r->system], r->seed, "");
  for (l = 0; l < config.layers; ++l) printf("  %-*d", 4 * opt.experts, l + 1);
  printf("\n");
  for (t = 0; t < n_tasks; ++t) {
    printf("%-15.15s", tasks[t].task.name);
    for (l = 0; l < config.layers; ++l) {
      const int64_t *c = r->routes + ((int64_t)t * config.layers + l) * opt.experts;
      int64_t sum = 0;
      for (e = 0; e < opt.experts; ++e) sum += c[e];
      printf(" ");
      for (e = 0; e < opt.experts; ++e) printf(" %3d", sum ? (int)((100 * c[e] + sum / 2) / sum) : 0);
      printf(" ");
    }
    printf("\n");
  }
}

static void json_text(FILE *f, const char *s) {
  fputc('"', f);
  for (; *s; ++s) {
    if (*s == '"' || *s == '\\') fprintf(f, "\\%c", *s);
    else if ((unsigned char)*s < 32) fprintf(f, "\\u%04x", (unsigned)(unsigned char)*s);
    else fputc(*s, f);
  }
  fputc('"', f);
}

/* A file of bytes: what print_json has written into a temporary one. */
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

static void print_json(FILE *f) {
  int i, t, d;
  fprintf(f, "{\"options\": [");
  for (i = 1; i < given_argc; ++i) {
    if (i > 1) fprintf(f, ", ");
    json_text(f, given_argv[i]);
  }
  fprintf(f, "],\n \"isa\": \"%s\", \"threads\": %d,\n \"runs\": [", moe_isa_name(env.isa), (int)env.threads);
  for (i = 0; i < n_results; ++i) {
    const result *r = &results[i];
    fprintf(f, "%s\n  {\"system\": \"%s\", \"seed\": %d, \"parameters\": %zu, \"seconds\": %.3f, \"tokens_per_second\": %.1f, \"steps\": %lld,\n",
            i ? "," : "", system_name[r->system], r->seed, r->parameters, r->seconds, r->tokens / (r->seconds > 0 ? r->seconds : 1),
            (long long)r->steps);
    fprintf(f, "   \"tasks\": [");
    for (t = 0; t < n_tasks; ++t) {
      char name[MOE_NAME_BYTES];
      int64_t n = 0;
      metric_name(name, &tasks[t].task);
      for (d = 0; d < tasks[t].n_dev; ++d) n += tasks[t].dev[d].n;
      fprintf(f, "%s\n    {\"name\": ", t ? "," : "");
      json_text(f, tasks[t].task.name);
      fprintf(f, ", \"metric\": \"%s\", \"value\": %.9g, \"n\": %lld%s}", name, r->value[t], (long long)n,
              r->defined[t] ? "" : ", \"defined\": false");
    }
    fprintf(f, "],\n   \"small\": %.9g, \"all\": %.9g}", r->small, r->all);
  }
  fprintf(f, "\n ]}\n");
}

static void write_json(void) {
  FILE *f = tmpfile();
  if (!f) die("cannot write a temporary file: %s", strerror(errno));
  print_json(f);
  if (fflush(f) || ferror(f)) die("cannot write a temporary file: %s", strerror(errno));
  need(moe_file_replace(opt.json, copy_file, f, &env));
  fclose(f);
}

/* A name that cannot be written is better known before the training than after it. */
static void check_writable(const char *option, const char *path) {
  char temporary[1056];
  FILE *f = path ? fopen(path, "rb+") : NULL;
  if (!path) return;
  if (!f) { /* a new file, most likely: moe_file_replace will begin with this name */
    int folder = errno == EISDIR;
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    f = folder ? NULL : fopen(temporary, "wb");
    if (!f) die("%s: %s cannot be written: %s", option, path, strerror(errno));
    remove(temporary);
  }
  fclose(f);
}

/* ---- --from: fine-tuning and new tasks ---- */

/* What --gate-from names: a task of the model, or one of moe_model_adapt's words. */
static int32_t gate_number(const char *name) {
  int32_t t = moe_model_find_task(from_model, name);
  if (t >= 0) return t;
  if (!strcmp(name, "random")) return MOE_GATE_RANDOM;
  if (!strcmp(name, "mean")) return MOE_GATE_MEAN;
  die("--gate-from: \"%s\" is neither random nor mean nor a task of %s", name, opt.from);
  return 0;
}

/* "100" or "10%" of n rows. */
static int64_t few_rows(const char *text, int64_t n) {
  char *end;
  double v = strtod(text, &end);
  if (end != text && !strcmp(end, "%")) v = ceil(v / 100 * (double)n);
  else if (*end || end == text) v = 0;
  if (!(v >= 1 && v <= (double)n)) die("--rows: \"%s\" is neither a number from 1 to %lld nor a share such as 10%%", text, (long long)n);
  return (int64_t)v;
}

/* The training rows of a few-shot run: `wanted` of them, drawn by the seed; a ranking's questions stay whole. */
static rows draw_rows(const rows *all, int64_t wanted, int seed, int ranking) {
  rows drawn = *all;
  unsigned char *keep = (unsigned char *)take((size_t)all->n, 1);
  int64_t i, j, kept = 0;
  for (i = 0; i < all->n && kept < wanted; ++i) {
    int64_t row = (int64_t)moe__permute(moe_key((uint64_t)seed, 0, 0, 0, 78), (uint64_t)i, (uint64_t)all->n);
    for (j = ranking ? 0 : row; j < (ranking ? all->n : row + 1); ++j)
      if (!keep[j] && (!ranking || all->group[j] == all->group[row])) keep[j] = 1, ++kept;
  }
  part_rows(&drawn, NULL, keep);
  free(keep);
  return drawn;
}

/* A line of the table, and of --json. */
static void adapt_line(const char *gate, int64_t n, const result *r, int seeds, FILE *json, int first) {
  double sum = 0, square = 0, best = -2, deviation, seconds = 0;
  char text[64];
  int i;
  for (i = 0; i < seeds; ++i) {
    sum += r[i].value[0];
    square += r[i].value[0] * r[i].value[0];
    if (r[i].value[0] > best) best = r[i].value[0];
    seconds += r[i].seconds;
  }
  square = square - sum * sum / seeds;
  deviation = seeds > 1 && square > 0 ? sqrt(square / (seeds - 1)) : 0;
  snprintf(text, sizeof text, "%.1f+-%.1f", 100 * sum / seeds, 100 * deviation);
  printf("%-16.16s %8lld %8.1f %12s %8.1f\n", gate, (long long)n, 100 * best, text, seconds / seeds);
  fflush(stdout);
  if (!json) return;
  fprintf(json, "%s\n  {\"gate\": ", first ? "" : ",");
  json_text(json, gate);
  fprintf(json, ", \"rows\": %lld, \"maximum\": %.9g, \"mean\": %.9g, \"deviation\": %.9g, \"seeds\": [", (long long)n, best, sum / seeds, deviation);
  for (i = 0; i < seeds; ++i) fprintf(json, "%s{\"seed\": %d, \"value\": %.9g, \"steps\": %lld}", i ? ", " : "", r[i].seed, r[i].value[0], (long long)r[i].steps);
  fprintf(json, "]}");
}

/* --adapt: a task that the model does not know, from each gate, on each number of rows, with each seed [TaG] Tables 2 and 6. */
static void run_adapt(char **seed_list, int n_seeds) {
  char *gate[64], *few[64], title[96], path[1056], suffix[96];
  int gates = split(copy_text(opt.gate_from), ',', gate, 64), sizes = 1, i, j, k;
  rows all = tasks[0].train;
  result *r = (result *)take((size_t)n_seeds, sizeof *r);
  FILE *json = opt.json ? tmpfile() : NULL;
  few[0] = copy_text("100%");
  if (opt.few) sizes = split(copy_text(opt.few), ',', few, 64);
  if (gates > 64 || sizes > 64) die("--gate-from and --rows: more than 64");
  for (i = 0; i < gates; ++i) gate_number(gate[i]); /* what is wrong is better known before the first run */
  for (i = 0; i < sizes; ++i) few_rows(few[i], all.n);
  if (json) fprintf(json, "{\"adapt\": \"%s\", \"runs\": [", tasks[0].task.name);
  printf("\n%-16s %8s %8s %12s %8s\n", "gates from", "rows", "maximum", "mean", "seconds");
  for (i = 0; i < sizes; ++i)
    for (j = 0; j < gates; ++j) {
      int64_t wanted = few_rows(few[i], all.n);
      for (k = 0; k < n_seeds; ++k) {
        moe_model *more, *alone;
        int32_t last = moe_model_tasks(from_model);
        double began = now();
        tuned one;
        r[k].seed = (int)whole("--seeds", seed_list[k], 0, 2147483647);
        tasks[0].train = wanted < all.n ? draw_rows(&all, wanted, r[k].seed, tasks[0].task.kind == MOE_KIND_RANKING) : all;
        need(moe_model_adapt(&more, from_model, &tasks[0].task, gate_number(gate[j]), (uint64_t)r[k].seed, &env));
        need(moe_model_extract(&alone, more, &last, 1, NULL, &env));
        moe_model_free(more);
        snprintf(title, sizeof title, "%.30s, %lld rows, seed %d", gate[j], (long long)wanted, r[k].seed);
        one = tune(alone, 0, r[k].seed, title);
        moe_model_free(alone);
        if (!r[k].value) r[k].value = (double *)take(1, sizeof *r[k].value);
        r[k].value[0] = one.value;
        r[k].steps = one.steps;
        r[k].seconds = now() - began;
        if (opt.save) {
          snprintf(suffix, sizeof suffix, "%.40s-%lld-%d", gate[j], (long long)wanted, r[k].seed);
          if (sizes * gates * n_seeds == 1) snprintf(path, sizeof path, "%s", opt.save);
          else with_suffix(path, sizeof path, opt.save, suffix);
          need(moe_model_save(one.model, path, &env));
        }
        moe_model_free(one.model);
      }
      adapt_line(gate[j], wanted, r, n_seeds, json, i == 0 && j == 0);
    }
  if (!json) return;
  fprintf(json, "\n ]}\n");
  fflush(json);
  need(moe_file_replace(opt.json, copy_file, json, &env));
  fclose(json);
}

/* The second stage of a model that is there already. */
static void run_from(char **seed_list, int n_seeds) {
  static const int system_of[] = {DENSE, SWITCH, TAG, DENSE, EMBED};
  int i;
  if (opt.adapt) {
    run_adapt(seed_list, n_seeds);
    return;
  }
  if (moe_model_config(from_model)->unit == MOE_UNIT_BLOCK) die("%s has blocks as experts, which the second stage does not know", opt.from);
  for (i = 0; i < n_seeds; ++i) {
    result *r = &results[i];
    memset(r, 0, sizeof *r);
    r->system = TUNED + system_of[config.router];
    r->seed = (int)whole("--seeds", seed_list[i], 0, 2147483647);
  }
  n_runs = n_seeds;
  for (n_results = 1; n_results <= n_seeds; ++n_results) {
    run_tuned(&results[n_results - 1], from_model);
    if (opt.json) write_json();
  }
  n_results = n_seeds;
  print_table();
}

int main(int argc, char **argv) {
  char *list[SYSTEMS + 1], *seed_list[1000], *system_text, *seed_text;
  int n_systems, n_seeds, i, j, k, all;
  moe_pool *pool = NULL;
  moe_isa isa;
  given_argc = argc;
  given_argv = argv;
  read_options(argc, argv);
  isa = moe_isa_from_name(opt.isa);
  if (isa == MOE_ISA_COUNT) die("--isa is auto, avx512, avx2, neon or scalar, not \"%s\"", opt.isa);
  if (moe_env_init(&env, isa) != MOE_OK) die("this machine or this build has no %s; --isa auto takes the best there is", opt.isa);
  env.log = show;
  need(moe_pool_create(&pool, opt.threads ? opt.threads : moe_processors(), &env));
  system_text = copy_text(opt.systems);
  seed_text = copy_text(opt.seeds);
  n_systems = split(system_text, ',', list, SYSTEMS);
  n_seeds = split(seed_text, ',', seed_list, 1000);
  if (n_systems > SYSTEMS || n_seeds > 1000) die("too many systems or seeds");
  n_runs = n_systems * n_seeds;
  results = (result *)take(2 * (size_t)n_runs, sizeof *results); /* each with a second stage, perhaps */
  for (i = 0; i < n_systems; ++i)
    for (j = 0; j < n_seeds; ++j) {
      result *r = &results[n_results++];
      for (r->system = 0; r->system < SYSTEMS && strcmp(system_name[r->system], list[i]); ++r->system) continue;
      if (r->system == SYSTEMS) die("--systems: \"%s\" is none of single, dense, switch, tag, embed", list[i]);
      r->seed = (int)whole("--seeds", seed_list[j], 0, 2147483647);
      for (k = 0; k < n_results - 1; ++k)
        if (results[k].system == r->system && results[k].seed == r->seed) die("%s with seed %d stands there twice", list[i], r->seed);
      if (opt.fine_tune && r->system != SINGLE) {
        results[n_results] = *r;
        results[n_results++].system += TUNED;
      }
    }
  n_runs = n_results; /* of one run --save FILE has that very name */
  check_writable("--save", opt.save);
  check_writable("--checkpoint", opt.checkpoint);
  check_writable("--json", opt.json);
  read_tasks();
  make_config();
  read_data();
  printf("%d task%s, %d layers x %d, %s, %d threads, %s\n", n_tasks, n_tasks == 1 ? "" : "s", (int)config.layers, (int)config.hidden,
         opt.from ? opt.from : opt.init ? opt.init : "from scratch", (int)env.threads, moe_isa_name(env.isa));
  fflush(stdout);
  signal(SIGINT, on_interrupt);
  signal(SIGTERM, on_interrupt);
  if (opt.from) {
    run_from(seed_list, n_seeds);
    free(system_text);
    free(seed_text);
    moe_pool_free(pool);
    return 0;
  }
  all = n_results;
  for (n_results = 1; n_results <= all; ++n_results) {
    result *r = &results[n_results - 1];
    if (r->system < TUNED) run_system(r);
    else {
      run_tuned(r, first_stage);
      moe_model_free(first_stage);
    }
    if (opt.json) write_json(); /* what is finished is kept, whatever happens to the rest */
  }
  n_results = all;
  print_table();
  for (i = n_results - 1; i >= 0; --i)
    if (results[i].routes && results[i].seed == results[0].seed) {
      print_routes(&results[i]);
      break;
    }
  free(system_text);
  free(seed_text);
  moe_pool_free(pool);
  return 0;
}
