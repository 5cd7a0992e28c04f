/* data.h - tasks and rows for all programs: tasks.tsv, TASK/train.tsv and TASK/dev.tsv, the encoder
   and tokenizer that they are read for, tokenised rows, batches

   tasks.tsv has the columns name input kind labels metric, and may have rows, max_len, hard and
   description. A file of rows has the columns label and sentence1, a pair sentence2, a ranking
   group, a span start1 end1 start2 end2 (code points). Other columns are ignored. */
#ifndef TOOLS_DATA_H
#define TOOLS_DATA_H
#include "cli.h"

/* ---- tables: files of rows with named columns ---- */

typedef struct table {
  const char *path;
  char *file, *next, *end;
  char **name, **field;      /* (columns) names; fields of the row that was read last */
  int columns, line, blanks; /* blanks: 1 where empty lines are passed over */
} table;

/* The line at f->next, cut at its end; NULL: there is none. */
static inline char *table_line(table *f) {
  char *line = f->next, *end;
  if (line >= f->end) return NULL;
  end = (char *)memchr(line, '\n', (size_t)(f->end - line));
  if (!end) end = f->end;
  f->next = end + 1;
  if (end > line && end[-1] == '\r') --end;
  *end = 0;
  read_from(f->path, ++f->line);
  if (strlen(line) != (size_t)(end - line)) die("a zero byte");
  return line;
}

/* Cuts a line into fields, at most f->columns + 1 of them; returns their number. This is where other
   formats than TSV begin. */
static inline int table_cut(table *f, char *line) {
  int n = 0;
  for (;;) {
    char *tab = strchr(line, '\t');
    if (n > f->columns) return n;
    f->field[n++] = line;
    if (!tab) return n;
    *tab = 0;
    line = tab + 1;
  }
}

/* Reads a file and its first line, which names the columns; "-": standard input. 0: an optional file
   that is not there. Until table_close sentences begin with file and line. */
static inline int table_open(table *f, const char *path, int optional) {
  FILE *probe = strcmp(path, "-") ? fopen(path, "rb") : stdin;
  size_t bytes;
  void *data;
  char *line, *s;
  memset(f, 0, sizeof *f);
  if (!probe && optional && errno == ENOENT) return 0;
  if (!probe) die("cannot open %s: %s", path, strerror(errno));
  if (probe != stdin) {
    fclose(probe);
    need(moe_file_read(&data, &bytes, path, &env));
    f->file = (char *)data;
  } else {
    text all = {NULL, 0, 0, 0};
    char block[4096];
    while ((bytes = fread(block, 1, sizeof block, stdin)) > 0) put_bytes(&all, block, bytes);
    put_bytes(&all, "", 0);
    f->file = all.data, bytes = all.bytes, path = "stdin";
  }
  f->path = path;
  f->next = f->file;
  f->end = f->file + bytes;
  if (!strncmp(f->next, "\xef\xbb\xbf", 3)) f->next += 3; /* some editors put it before UTF-8 */
  line = table_line(f);
  if (!line) die("%s is empty; its first line should name the columns", path);
  for (f->columns = 1, s = line; (s = strchr(s, '\t')) != NULL; ++s) ++f->columns;
  f->field = (char **)take(2 * (size_t)f->columns + 2, sizeof *f->field);
  f->name = f->field + f->columns + 1;
  table_cut(f, line);
  memcpy(f->name, f->field, (size_t)f->columns * sizeof *f->name);
  return 1;
}

static inline void table_close(table *f) {
  if (strcmp(f->path, "stdin"))
    moe_free(f->file);
  else
    free(f->file);
  free(f->field);
  read_from(NULL, 0);
}

/* The next row into f->field; 0: there is none. */
static inline int table_next(table *f) {
  char *line = table_line(f);
  int n;
  while (line && !*line && f->blanks) line = table_line(f);
  if (!line) return 0;
  n = table_cut(f, line);
  if (n > f->columns) die("more than the %d columns of the first line", f->columns);
  if (n < f->columns) die("%d column%s, expected %d", n, n == 1 ? "" : "s", f->columns);
  return 1;
}

/* Number of the column; -1: there is none. To be asked for before the first row. */
static inline int table_column(const table *f, const char *name, int must) {
  int i, at = -1;
  for (i = f->columns; i-- > 0;)
    if (!strcmp(f->name[i], name)) {
      if (at >= 0) die("two columns are called \"%s\"", name);
      at = i;
    }
  if (at < 0 && must) die("there is no column \"%s\"", name);
  return at;
}

static inline double field_number(const char *what, const char *field) {
  char *end;
  double v = strtod(field, &end);
  if (end == field || *end || !(v > -1e30 && v < 1e30))
    die("%s \"%s\" is not a number", what, field);
  return v;
}

static inline int field_whole(const char *what, const char *field) {
  double v = field_number(what, field);
  if (!(v >= -1e9 && v <= 1e9) || v < (int)v || v > (int)v)
    die("%s \"%s\" is not a whole number", what, field);
  return (int)v;
}

/* ---- rows ---- */

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
  struct row *row; /* (n+1) */
  int32_t *ids;
  uint8_t *segments;
} rows;

static inline void free_rows(rows *r) {
  free(r->row);
  free(r->ids);
  free(r->segments);
  memset(r, 0, sizeof *r);
}

/* Appends a row; its start is set here. */
static inline void append_row(rows *r, const row *what, const int32_t *ids, const uint8_t *segments,
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
  r->row[r->n].start = r->tokens += length;
}

static inline int64_t row_length(const rows *r, int64_t i) {
  return r->row[i + 1].start - r->row[i].start;
}

/* Rows with keep[i] != 0 stay in r, the others go to `rest`, or away (NULL). */
static inline void part_rows(rows *r, rows *rest, const unsigned char *keep) {
  rows all = *r, away;
  int64_t i;
  memset(r, 0, sizeof *r);
  memset(&away, 0, sizeof away);
  for (i = 0; i < all.n; ++i) {
    const row *x = &all.row[i];
    append_row(keep[i] ? r : &away, x, all.ids + x->start, all.segments + x->start,
               row_length(&all, i));
  }
  free_rows(&all);
  if (rest)
    *rest = away;
  else
    free_rows(&away);
}

static const rows *sorted_rows;

static inline int by_group(const void *a, const void *b) {
  int64_t i = *(const int64_t *)a, j = *(const int64_t *)b;
  uint64_t x = sorted_rows->row[i].group, y = sorted_rows->row[j].group;
  return x < y ? -1 : x > y ? 1 : i < j ? -1 : i > j;
}

/* Rows in groups: the choices of a question in a ranking; in other tasks each row is one. */
typedef struct groups {
  int64_t n;
  int64_t *row;   /* rows so that those of a group follow each other, in the order of the file */
  int64_t *begin; /* (n+1) where each group begins in `row` */
} groups;

static inline groups group_rows(const rows *r, const moe_task *t) {
  groups g;
  int64_t i;
  int ranking = t->kind == MOE_KIND_RANKING;
  g.row = (int64_t *)take(2 * (size_t)r->n + 2, sizeof *g.row);
  g.begin = g.row + r->n + 1;
  g.n = 0;
  for (i = 0; i < r->n; ++i) g.row[i] = i;
  sorted_rows = r;
  if (ranking) qsort(g.row, (size_t)r->n, sizeof *g.row, by_group);
  for (i = 0; i < r->n; ++i)
    if (!i || !ranking || r->row[g.row[i]].group != r->row[g.row[i - 1]].group) g.begin[g.n++] = i;
  g.begin[g.n] = r->n;
  return g;
}

/* Of the choices of a question exactly one is right. */
static inline void check_groups(const rows *r, const moe_task *t, const char *path) {
  groups q = group_rows(r, t);
  int64_t g, i;
  for (g = 0; g < q.n && t->kind == MOE_KIND_RANKING; ++g) {
    int right = 0;
    for (i = q.begin[g]; i < q.begin[g + 1]; ++i) right += r->row[q.row[i]].label > 0;
    read_from(path, r->row[q.row[q.begin[g]]].line);
    if (right != 1)
      die("the group that begins here has %d choices with label 1, expected exactly one", right);
    if (q.begin[g + 1] == q.begin[g] + 1) die("the group of this row has no other choice");
  }
  free(q.row);
}

/* ---- the encoder ---- */

/* What rows are tokenised for. */
typedef struct encoder {
  moe_config config;
  const char *vocab;
  size_t vocab_bytes, file_bytes;
  moe_tokenizer *tokenizer;
  void *file; /* of --init, or NULL */
} encoder;

/* Its options; a program adds --layers, --hidden and --ffn with defaults of its own. */
static struct {
  const char *init, *vocab;
  int heads, cased, max_len, layers, hidden, ffn;
  double eps;
} source;

static const option encoder_options[] = {
    OPTION_GROUP("encoder"),
    OPTION_TEXT("--init", "FILE", source.init, NULL,
                "start from a published BERT-like encoder (safetensors); config.json beside it is "
                "read [from scratch]"),
    OPTION_TEXT("--vocab", "FILE", source.vocab, NULL,
                "its WordPiece vocabulary [vocab.txt of --data]"),
    OPTION_SWITCH("--cased", source.cased,
                  "do not lower-case the text [tokenizer_config.json decides]"),
    OPTION_NUMBER("--heads", source.heads, 1, 1024, NULL,
                  "attention heads, where there is no config.json [4]"),
    OPTION_REAL("--eps", "E", source.eps, 1e-30, 1, NULL, "LayerNorm epsilon, likewise [1e-12]"),
    OPTION_END};

static inline void make_tokenizer(encoder *e, const char *path) {
  size_t bytes;
  read_from(path, 0);
  need(moe_tokenizer_size(e->vocab, e->vocab_bytes, &bytes, &env));
  need(moe_tokenizer_init(&e->tokenizer, lasting(bytes, 1), bytes, e->vocab, e->vocab_bytes,
                          e->config.cased, &env));
  read_from(NULL, 0);
}

/* A file beside `path` that may be missing: then NULL. */
static inline char *file_beside(const char *path, const char *name, size_t *bytes) {
  const char *beside = path_beside(path, name);
  void *data;
  if (!exists(beside)) return NULL;
  need(moe_file_read(&data, bytes, beside, &env));
  return (char *)data;
}

static inline void encoder_import(encoder *e) {
  size_t bytes;
  char *json = file_beside(source.init, "config.json", &bytes), *lower;
  need(moe_file_read(&e->file, &e->file_bytes, source.init, &env));
  read_from(source.init, 0);
  if (json) /* first: it knows best what kind of encoder that is */
    need(moe_import_config_json(&e->config, json, bytes, &env));
  need(moe_import_sizes(&e->config, e->file, e->file_bytes, &env));
  if (!json && !source.heads)
    die("there is no config.json beside it: give --heads (and --eps, 1e-12 in BERT)");
  read_from(NULL, 0);
  moe_free(json);
  json = file_beside(source.init, "tokenizer_config.json", &bytes);
  lower = json ? strstr(json, "\"do_lower_case\"") : NULL;
  if (lower) e->config.cased = !strncmp(lower + 15 + strspn(lower + 15, " :\r\n\t"), "false", 5);
  moe_free(json);
}

/* The encoder of the options, and its tokenizer; `folder` may hold the vocabulary. */
static inline void encoder_open(encoder *e, const char *folder) {
  const char *path = source.vocab ? source.vocab : printed("%s/vocab.txt", folder);
  moe_config *c = &e->config;
  void *data;
  memset(e, 0, sizeof *e);
  moe_config_init(c);
  if (source.init)
    encoder_import(e);
  else {
    c->layers = source.layers;
    c->hidden = source.hidden;
    c->ffn = source.ffn;
    c->heads = 4;
    c->positions = source.max_len > 128 ? source.max_len : 128;
    c->segments = 2;
  }
  if (source.heads) c->heads = source.heads;
  if (source.eps > 0) c->eps = (float)source.eps;
  if (source.cased) c->cased = 1;
  c->max_len = source.max_len ? source.max_len : c->positions < 128 ? c->positions : 128;
  if (c->max_len > c->positions)
    die("--max-len %d is more than the %d positions of the encoder", c->max_len, c->positions);
  if (source.init && !source.vocab)
    die("--init needs --vocab, the vocabulary that the encoder was trained with");
  need(moe_file_read(&data, &e->vocab_bytes, path, &env));
  e->vocab = (char *)memcpy(lasting(e->vocab_bytes + 1, 1), data, e->vocab_bytes);
  moe_free(data);
  make_tokenizer(e, path);
  if (!source.init)
    c->vocab = moe_tokenizer_words(e->tokenizer);
  else if (moe_tokenizer_words(e->tokenizer) > c->vocab)
    die("%s has %d words, but %s has room for %d", path, (int)moe_tokenizer_words(e->tokenizer),
        source.init, (int)c->vocab);
}

/* The encoder and vocabulary of a trained model, which must outlive it, and nothing else. */
static inline void encoder_of_model(encoder *e, const moe_model *model, const char *path) {
  memset(e, 0, sizeof *e);
  e->config = *moe_model_config(model);
  e->vocab = moe_model_vocab(model, &e->vocab_bytes);
  if (!e->vocab) die("%s holds no vocabulary", path);
  if (source.max_len > e->config.positions)
    die("--max-len %d is more than the %d positions of the encoder", source.max_len,
        e->config.positions);
  if (source.max_len) e->config.max_len = source.max_len;
  make_tokenizer(e, path);
}

/* ---- rows of a file ---- */

/* Letters and digits alone, in lower case: two texts with the same hash are the same text for
   --dedup. Other than ASCII counts as it is. */
static inline uint64_t text_hash(const char *a, const char *b) {
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

/* A name, every byte of it: "a-1" and "a1" are two questions. */
static inline uint64_t name_hash(const char *s) {
  uint64_t h = 0xcbf29ce484222325u;
  for (; *s; ++s) h = (h ^ (unsigned char)*s) * 0x100000001b3u;
  return h;
}

/* The tokens that overlap code points [from, to) of sentence 1 or 2 (`which` 0 or 1): a word may
   begin or end inside a token. */
static inline void find_span(int32_t *span, const moe_tokens *tokens, int which,
                             const char *sentence, const char *from_field, const char *to_field) {
  int from = field_whole("start", from_field), to = field_whole("end", to_field), length = 0;
  moe_env quiet = env;
  for (; *sentence; ++sentence) length += ((unsigned char)*sentence & 0xc0) != 0x80;
  quiet.log = NULL;
  if (from < 0 || to > length || from >= to)
    die("characters %d to %d of sentence%d, which has %d characters, are not a word", from, to,
        which + 1, length);
  if (moe_tokens_span(span, tokens, which, from, to, &quiet) != MOE_OK)
    die("the word at characters %d to %d of sentence%d was cut off with the end of the text; try "
        "a larger --max-len",
        from, to, which + 1);
}

static inline float read_label(const moe_task *t, const char *field) {
  double label = field_number("label", field);
  if (t->kind == MOE_KIND_REGRESSION && (label < (double)t->low || label > (double)t->high))
    die("label %s is outside %g..%g", field, (double)t->low, (double)t->high);
  if (t->kind != MOE_KIND_REGRESSION &&
      (label < 0 || label >= t->classes || label > (double)(int)label))
    die("label %s is not one of 0 .. %d", field, t->classes - 1);
  return (float)label;
}

/* Longest input of a task, in tokens. */
static inline int32_t longest_of(const moe_config *c, const moe_task *t) {
  return t->max_len && t->max_len < c->max_len ? t->max_len : c->max_len;
}

/* Room for the tokens of an input, lasting. */
static inline moe_tokens make_tokens(int32_t max_len) {
  moe_tokens out;
  size_t n = (size_t)max_len;
  out.capacity = max_len;
  out.count = 0;
  out.ids = (int32_t *)lasting(3 * n, sizeof *out.ids);
  out.begin = out.ids + n;
  out.end = out.begin + n;
  out.segments = (uint8_t *)lasting(n, 1);
  return out;
}

/* Reads and tokenises a file, of at most `most` rows (0: all). 0: an optional file is not there. */
static inline int read_rows(rows *r, const moe_task *t, const encoder *e, const char *path,
                            int optional, int64_t most) {
  static const char *const span_name[4] = {"start1", "end1", "start2", "end2"};
  int32_t max_len = longest_of(&e->config, t);
  int label_at, a_at, b_at = -1, group_at = -1, span_at[4], i, spans = t->kind == MOE_KIND_SPAN;
  moe_tokens out;
  table f;
  memset(r, 0, sizeof *r);
  if (!table_open(&f, path, optional)) return 0;
  label_at = table_column(&f, "label", 1);
  a_at = table_column(&f, "sentence1", 1);
  if (t->pair) b_at = table_column(&f, "sentence2", 1);
  if (t->kind == MOE_KIND_RANKING) group_at = table_column(&f, "group", 1);
  for (i = 0; i < 4 && spans; ++i) span_at[i] = table_column(&f, span_name[i], 1);
  out = make_tokens(e->config.max_len);
  while ((!most || r->n < most) && table_next(&f)) {
    const char *a = f.field[a_at], *b = b_at < 0 ? NULL : f.field[b_at];
    moe_text text = moe_text_of(a, b);
    row x;
    memset(&x, 0, sizeof x);
    x.label = read_label(t, f.field[label_at]);
    x.hash = text_hash(a, b);
    x.group = group_at < 0 ? 0 : name_hash(f.field[group_at]);
    x.line = f.line;
    need(moe_encode(e->tokenizer, &out, &text, max_len, e->config.truncate, &env));
    for (i = 0; i < 2 && spans; ++i)
      find_span(x.span + 2 * i, &out, b ? i : 0, i && b ? b : a, f.field[span_at[2 * i]],
                f.field[span_at[2 * i + 1]]);
    append_row(r, &x, out.ids, out.segments, out.count);
  }
  if (!r->n) read_from(NULL, 0), die("%s holds no rows", f.path);
  check_groups(r, t, f.path);
  table_close(&f);
  return 1;
}

/* ---- tasks ---- */

typedef struct task_data {
  moe_task task;
  const char *labels, *description; /* as tasks.tsv has them; description may be NULL */
  int64_t official;                 /* column `rows`, else the training rows: decides "small" */
  int hard, n_dev;
  rows train, held, dev[2];
} task_data;

static struct { const char *folder, *names; } data;
static task_data *tasks; /* those that were asked for */
static int n_tasks;

static const option data_options[] = {
    OPTION_GROUP("data"),
    OPTION_TEXT("--data", "DIR", data.folder, "examples/data",
                "folder with tasks.tsv and TASK/train.tsv, TASK/dev.tsv; a second dev set, "
                "dev_2.tsv or dev_mm.tsv, makes the metric the mean of both"),
    OPTION_TEXT("--tasks", "A,B,C", data.names, NULL,
                "these tasks, in this order [all of tasks.tsv]"),
    OPTION_NUMBER("--max-len", source.max_len, 3, 1 << 20, NULL,
                  "longest input in tokens [128, or what the positions allow]"),
    OPTION_END};

/* labels: "0=no,1=yes" or "0..5" */
static inline void read_labels(moe_task *t, const char *field) {
  list part = split(field, ',');
  const char **names = (const char **)lasting((size_t)part.n, sizeof *names);
  const char *dots = strstr(field, "..");
  int i;
  if (t->kind == MOE_KIND_REGRESSION) {
    if (!dots) die("labels of a regression are a range such as 0..5, not \"%s\"", field);
    t->low = (float)field_number("lowest label", printed("%.*s", (int)(dots - field), field));
    t->high = (float)field_number("highest label", dots + 2);
    t->classes = 1;
    return;
  }
  if (part.n > MOE_MAX_CLASSES) die("more than %d labels", MOE_MAX_CLASSES);
  if (part.n < 2) die("a task needs at least two labels, \"%s\" names %d", field, part.n);
  for (i = 0; i < part.n; ++i) {
    const char *first = printed("%d=", i);
    size_t n = strlen(first);
    if (strncmp(part.at[i], first, n) || !part.at[i][n])
      die("label %d should read %d=NAME, not \"%s\"", i, i, part.at[i]);
    names[i] = part.at[i] + n;
  }
  t->classes = part.n;
  t->label = names;
}

/* A cell of a column that may be missing, or empty: then NULL. */
static inline const char *optional_cell(const table *f, const char *name) {
  int at = table_column(f, name, 0);
  return at >= 0 && *f->field[at] ? f->field[at] : NULL;
}

static inline void read_task(const table *f, task_data *t) {
  static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
                                "-_+";
  static const char *const kinds[] = {"classification", "regression", "ranking", "span"};
  const char *name = f->field[table_column(f, "name", 1)], *cell;
  const char *kind = f->field[table_column(f, "kind", 1)];
  const char *input = f->field[table_column(f, "input", 1)];
  const char *metric = f->field[table_column(f, "metric", 1)];
  int k;
  memset(t, 0, sizeof *t);
  if (strlen(name) >= sizeof t->task.name || !*name) die("a task's name has 1 to 63 bytes");
  if (name[strspn(name, letters)]) /* it names a folder, files and tensors */
    die("task \"%s\": a name has letters, digits, -, _ and + only", name);
  strcpy(t->task.name, name);
  for (k = 0; k < 4 && strcmp(kind, kinds[k]); ++k) continue;
  if (k == 4) die("kind \"%s\" is not one of classification, regression, ranking, span", kind);
  t->task.kind = (moe_kind)k;
  t->task.pair = !strcmp(input, "pair");
  if (!t->task.pair && strcmp(input, "single"))
    die("input \"%s\" is neither single nor pair", input);
  if (!*metric || strlen(metric) >= sizeof t->task.metrics)
    die("metrics have 1 to %d bytes", MOE_NAME_BYTES - 1);
  strcpy(t->task.metrics, metric);
  t->labels = printed("%s", f->field[table_column(f, "labels", 1)]);
  read_labels(&t->task, t->labels);
  if ((cell = optional_cell(f, "rows")) != NULL) t->official = field_whole("rows", cell);
  if (t->official < 0) die("rows is %s, expected at least 0", cell);
  if ((cell = optional_cell(f, "max_len")) != NULL) t->task.max_len = field_whole("max_len", cell);
  if (t->task.max_len && t->task.max_len < 2 + t->task.pair)
    die("max_len is %s, the special tokens alone are %d", cell, 2 + (int)t->task.pair);
  if ((cell = optional_cell(f, "hard")) != NULL) t->hard = field_whole("hard", cell);
  if ((cell = optional_cell(f, "description")) != NULL) t->description = printed("%s", cell);
}

static inline int find_task(const task_data *of, int n, const char *name) {
  int i;
  for (i = 0; i < n; ++i)
    if (!strcmp(of[i].task.name, name)) return i;
  return -1;
}

/* The tasks named in tasks.tsv, all of them or those of the list "A,B". */
static inline void read_tasks(const char *names) {
  const char *path = printed("%s/tasks.tsv", data.folder);
  task_data *all = NULL;
  list wanted = split(names ? names : "", ',');
  int n = 0, i, at;
  table f;
  table_open(&f, path, 0);
  f.blanks = 1;
  while (table_next(&f)) {
    all = (task_data *)grow(all, (size_t)n + 1, sizeof *all);
    read_task(&f, &all[n]);
    if (find_task(all, n, all[n].task.name) >= 0) die("task %s is listed twice", all[n].task.name);
    ++n;
  }
  table_close(&f);
  if (!n) die("%s names no task", path);
  n_tasks = names ? 0 : n;
  tasks = (task_data *)lasting((size_t)(names ? wanted.n : n), sizeof *tasks);
  if (!names) memcpy(tasks, all, (size_t)n * sizeof *tasks);
  for (i = 0; i < wanted.n && names; ++i) {
    if (find_task(tasks, n_tasks, wanted.at[i]) >= 0) die("--tasks names %s twice", wanted.at[i]);
    at = find_task(all, n, wanted.at[i]);
    if (at < 0) die("there is no task \"%s\" in %s", wanted.at[i], path);
    tasks[n_tasks++] = all[at];
  }
  free(all);
}

/* FILE.tsv of a task; 0: an optional one is not there. */
static inline int read_part(rows *r, const task_data *d, const encoder *e, const char *file,
                            int optional, int64_t most) {
  const char *path = printed("%s/%s/%s.tsv", data.folder, d->task.name, file);
  return read_rows(r, &d->task, e, path, optional, most);
}

/* The rows of a task, `most` of train (0: all). */
static inline void read_task_rows(task_data *d, const encoder *e, int64_t most) {
  read_part(&d->train, d, e, "train", 0, most);
  read_part(&d->dev[0], d, e, "dev", 0, 0);
  d->n_dev = 1 + (read_part(&d->dev[1], d, e, "dev_2", 1, 0) ||
                  read_part(&d->dev[1], d, e, "dev_mm", 1, 0));
  if (!d->official) d->official = d->train.n;
}

static inline int64_t dev_rows(const task_data *t) { return t->dev[0].n + t->dev[1].n; }

/* ---- rows left out, held out, drawn ---- */

static inline int by_hash(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

/* Clears keep[i] of the rows whose text occurs in `dev`. */
static inline void mark_overlaps(unsigned char *keep, const rows *r, const rows *dev) {
  uint64_t *set = (uint64_t *)take((size_t)dev->n, sizeof *set);
  int64_t i;
  for (i = 0; i < dev->n; ++i) set[i] = dev->row[i].hash;
  qsort(set, (size_t)dev->n, sizeof *set, by_hash);
  for (i = 0; i < r->n; ++i)
    if (bsearch(&r->row[i].hash, set, (size_t)dev->n, sizeof *set, by_hash)) keep[i] = 0;
  free(set);
}

/* A training row that occurs in another task's dev set would make that task's score dishonest: it
   goes. A question that loses one choice loses all. */
static inline void remove_overlaps(void) {
  int t, o, d;
  int64_t i, g, n;
  for (t = 0; t < n_tasks; ++t) {
    rows *r = &tasks[t].train;
    groups q = group_rows(r, &tasks[t].task);
    unsigned char *keep = (unsigned char *)take((size_t)r->n, 1);
    memset(keep, 1, (size_t)r->n);
    for (o = 0; o < n_tasks; ++o)
      for (d = 0; d < tasks[o].n_dev && o != t; ++d) mark_overlaps(keep, r, &tasks[o].dev[d]);
    for (g = 0; g < q.n; ++g) {
      unsigned char all = 1;
      for (i = q.begin[g]; i < q.begin[g + 1]; ++i) all &= keep[q.row[i]];
      for (i = q.begin[g]; i < q.begin[g + 1]; ++i) keep[q.row[i]] = all;
    }
    n = r->n;
    part_rows(r, NULL, keep);
    free(keep);
    free(q.row);
    if (r->n < n)
      printf("%s: %lld training rows occur in another task's dev set and are left out\n",
             tasks[t].task.name, (long long)(n - r->n));
    if (!r->n) die("%s has no training row left", tasks[t].task.name);
  }
}

/* A share of every task's training rows, about `most` of them (0: no limit), goes to `held`. The
   rows of a ranking's group stay together. */
static inline void hold_out_rows(double share, int most) {
  int t;
  int64_t i;
  for (t = 0; t < n_tasks; ++t) {
    task_data *d = &tasks[t];
    unsigned char *keep = (unsigned char *)take((size_t)d->train.n, 1);
    double n = (double)d->train.n, part = most && share * n > most ? most / n : share;
    for (i = 0; i < d->train.n; ++i) {
      uint64_t of = d->task.kind == MOE_KIND_RANKING ? d->train.row[i].group : (uint64_t)i;
      keep[i] = (double)(moe_key(1, 0, of, (uint32_t)t, 77) >> 11) / 9007199254740992.0 >= part;
    }
    part_rows(&d->train, &d->held, keep);
    free(keep);
    if (!d->train.n || !d->held.n)
      die("--hold-out %g leaves task %s without rows on one side", share, d->task.name);
  }
}

/* `wanted` rows of r drawn by the seed; a ranking's questions stay whole. The groups are shuffled
   (Fisher and Yates), then taken from the front. */
static inline rows draw_rows(const rows *r, const moe_task *t, int64_t wanted, int seed) {
  unsigned char *keep = (unsigned char *)take((size_t)r->n, 1);
  groups q = group_rows(r, t);
  int64_t *turn = (int64_t *)take((size_t)q.n, sizeof *turn), i, j, kept = 0;
  rows out;
  memset(&out, 0, sizeof out);
  for (i = 0; i < q.n; ++i) turn[i] = i;
  for (i = 0; i < q.n && kept < wanted; ++i) {
    uint64_t random = moe_key((uint64_t)seed, 0, (uint64_t)i, 0, 78) % (uint64_t)(q.n - i);
    int64_t other = i + (int64_t)random, g = turn[other];
    turn[other] = turn[i];
    for (j = q.begin[g]; j < q.begin[g + 1]; ++j) keep[q.row[j]] = 1, ++kept;
  }
  for (i = 0; i < r->n; ++i)
    if (keep[i])
      append_row(&out, &r->row[i], r->ids + r->row[i].start, r->segments + r->row[i].start,
                 row_length(r, i));
  free(q.row);
  free(turn);
  free(keep);
  return out;
}

/* ---- batches ---- */

/* Rows of one or several tasks as a batch. */
typedef struct batch_buffer {
  moe_batch batch;
  int32_t *ids, *start, *task, *span;
  uint8_t *segments;
  float *label;
  int64_t *index;
  int32_t tokens;
} batch_buffer;

/* Lasting. */
static inline batch_buffer make_batch(int32_t tokens, int32_t sequences) {
  size_t M = (size_t)tokens, S = (size_t)sequences;
  batch_buffer b;
  memset(&b, 0, sizeof b);
  b.batch.ids = b.ids = (int32_t *)lasting(M, sizeof *b.ids);
  b.batch.segments = b.segments = (uint8_t *)lasting(M, 1);
  b.batch.seq_start = b.start = (int32_t *)lasting(S + 1, sizeof *b.start);
  b.batch.task = b.task = (int32_t *)lasting(S, sizeof *b.task);
  b.batch.span = b.span = (int32_t *)lasting(S * 4, sizeof *b.span);
  b.batch.label = b.label = (float *)lasting(S, sizeof *b.label);
  b.batch.index = b.index = (int64_t *)lasting(S, sizeof *b.index);
  return b;
}

static inline void clear_batch(batch_buffer *b) { b->batch.S = b->tokens = 0; }

static inline void add_row(batch_buffer *b, const rows *r, int64_t i, int32_t task, int64_t index) {
  const row *x = &r->row[i];
  int32_t length = (int32_t)row_length(r, i), s = b->batch.S++;
  memcpy(b->ids + b->tokens, r->ids + x->start, (size_t)length * sizeof *b->ids);
  memcpy(b->segments + b->tokens, r->segments + x->start, (size_t)length);
  memcpy(b->span + 4 * s, x->span, sizeof x->span);
  b->tokens += length;
  b->task[s] = task;
  b->label[s] = x->label;
  b->index[s] = index;
  b->start[s + 1] = b->tokens;
}
#endif
