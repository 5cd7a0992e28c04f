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
  FILE *stream;
  text line_text;
  list name;            /* of the columns */
  char **field;         /* of the row that was read last */
  int line, skip_empty; /* its number, from 1; 1: empty lines are passed over */
} table;

/* The next line, or NULL. */
static inline char *table_line(table *f) {
  int more = read_line(&f->line_text, f->stream);
  if (ferror(f->stream)) die("cannot be read: %s", strerror(errno));
  if (!more) return NULL;
  read_from(f->path, ++f->line);
  if (strlen(f->line_text.data) != f->line_text.bytes) die("a zero byte");
  return f->line_text.data;
}

/* Cuts a line into fields, at most `most` + 1; returns their number. Formats other than TSV would
   begin here. */
static inline int cut_line(char **field, int most, char *line) {
  int n = 0;
  for (; line && n <= most; line = strchr(line, '\t'), line = line ? (*line = 0, line + 1) : NULL)
    field[n++] = line;
  return n;
}

/* Opens a file ("-": standard input) and reads its first line, which names the columns. 0: it is
   optional and not there. Until table_close sentences begin with file and line. */
static inline int open_table(table *f, const char *path, int optional) {
  char *line;
  memset(f, 0, sizeof *f);
  f->path = strcmp(path, "-") ? path : "stdin";
  f->stream = f->path == path ? fopen(path, "rb") : stdin;
  if (!f->stream && optional && errno == ENOENT) return 0;
  if (!f->stream) die("cannot open %s: %s", path, strerror(errno));
  read_from(f->path, 0);
  line = table_line(f);
  if (!line) die("the file is empty; its first line should name the columns");
  if (!strncmp(line, "\xef\xbb\xbf", 3)) line += 3; /* some editors put it before UTF-8 */
  f->name = split(line, '\t');
  f->field = (char **)take((size_t)f->name.n + 1, sizeof *f->field);
  return 1;
}

static inline void close_table(table *f) {
  if (f->stream != stdin) fclose(f->stream);
  free(f->line_text.data);
  free(f->field);
  read_from(NULL, 0);
}

/* The next row into f->field; 0: there is none. */
static inline int next_row(table *f) {
  char *line = table_line(f);
  int n;
  while (line && !*line && f->skip_empty) line = table_line(f);
  if (!line) return 0;
  n = cut_line(f->field, f->name.n, line);
  if (n > f->name.n) die("more than the %d columns of the first line", f->name.n);
  if (n < f->name.n) die("%d column%s, expected %d", n, n == 1 ? "" : "s", f->name.n);
  return 1;
}

/* Number of a column, -1: there is none. */
static inline int column(const table *f, const char *name, int must) {
  int i, at = -1;
  for (i = f->name.n; i-- > 0;) {
    if (strcmp(f->name.at[i], name)) continue;
    if (at >= 0) read_from(f->path, 1), die("two columns are called \"%s\"", name);
    at = i;
  }
  if (at < 0 && must) read_from(f->path, 1), die("there is no column \"%s\"", name);
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
  if (!(v >= -1e9 && v <= 1e9) || v != floor(v))
    die("%s \"%s\" is not a whole number", what, field);
  return (int)v;
}

/* ---- rows ---- */

typedef struct row {
  int64_t start; /* of its tokens, which end where those of the next row start */
  uint64_t hash; /* of the letters and digits of the text */
  uint64_t name; /* of its question: hash in a ranking, else the number of the row */
  int32_t group; /* number of its question, in the order of `name` */
  int32_t line;  /* in the file, from 1 */
  int32_t span[4];
  float label;
} row;

typedef struct rows {
  int64_t n, groups, tokens, room, token_room;
  struct row *row; /* (n+1) */
  int32_t *ids;
  uint8_t *segments;
} rows;

static inline void free_rows(rows *r) {
  free(r->row), free(r->ids), free(r->segments);
  memset(r, 0, sizeof *r);
}

/* Appends a row; its start is set here. */
static inline void append_row(rows *r, const row *what, const int32_t *ids, const uint8_t *segments,
                              int64_t length) {
  if (r->n + 1 >= r->room)
    r->row = (row *)grow(r->row, (size_t)(r->room = 2 * r->room + 256), sizeof *r->row);
  if (r->tokens + length > r->token_room) {
    r->token_room = 2 * r->token_room + 8192 + length;
    r->ids = (int32_t *)grow(r->ids, (size_t)r->token_room, sizeof *r->ids);
    r->segments = (uint8_t *)grow(r->segments, (size_t)r->token_room, 1);
  }
  memcpy(r->ids + r->tokens, ids, (size_t)length * sizeof *ids);
  memcpy(r->segments + r->tokens, segments, (size_t)length);
  r->row[r->n] = *what;
  r->row[r->n++].start = r->tokens;
  r->row[r->n].start = r->tokens += length;
}

static inline int64_t row_length(const rows *r, int64_t i) {
  return r->row[i + 1].start - r->row[i].start;
}

static inline int by_number(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

/* Numbers the groups: the choices of a question in a ranking; in other tasks each row is one. */
static inline void number_groups(rows *r) {
  uint64_t *name = (uint64_t *)take((size_t)r->n, sizeof *name), *at;
  int64_t i;
  for (i = 0; i < r->n; ++i) name[i] = r->row[i].name;
  qsort(name, (size_t)r->n, sizeof *name, by_number);
  for (r->groups = i = 0; i < r->n; ++i)
    if (!i || name[i] != name[r->groups - 1]) name[r->groups++] = name[i];
  for (i = 0; i < r->n; ++i) {
    at = (uint64_t *)bsearch(&r->row[i].name, name, (size_t)r->groups, sizeof *name, by_number);
    r->row[i].group = (int32_t)(at - name);
  }
  free(name);
}

/* The rows of the groups with keep[group] == value. */
static inline rows copy_rows(const rows *r, const unsigned char *keep, int value) {
  rows out;
  int64_t i;
  memset(&out, 0, sizeof out);
  for (i = 0; i < r->n; ++i)
    if (keep[r->row[i].group] == value)
      append_row(&out, &r->row[i], r->ids + r->row[i].start, r->segments + r->row[i].start,
                 row_length(r, i));
  number_groups(&out);
  return out;
}

/* Rows group by group: group g has row[begin[g]] .. row[begin[g + 1] - 1], in the order of the
   file. One block with begin, which is to be freed. */
typedef struct groups {
  int64_t n, *begin, *row;
} groups;

static inline groups group_rows(const rows *r) {
  groups q;
  int64_t i;
  q.n = r->groups;
  q.begin = (int64_t *)take((size_t)(q.n + 2 + r->n), sizeof *q.begin);
  q.row = q.begin + q.n + 2;
  for (i = 0; i < r->n; ++i) ++q.begin[r->row[i].group + 2];
  for (i = 2; i <= q.n; ++i) q.begin[i] += q.begin[i - 1];
  for (i = 0; i < r->n; ++i) q.row[q.begin[r->row[i].group + 1]++] = i;
  return q;
}

/* Of the choices of a question exactly one is right. */
static inline void check_ranking(const rows *r, const char *path) {
  groups q = group_rows(r);
  int64_t g, i;
  for (g = 0; g < q.n; ++g) {
    int right = 0;
    for (i = q.begin[g]; i < q.begin[g + 1]; ++i) right += r->row[q.row[i]].label > 0;
    read_from(path, r->row[q.row[q.begin[g]]].line);
    if (right != 1)
      die("the group that begins here has %d choices with label 1, expected exactly one", right);
    if (q.begin[g + 1] == q.begin[g] + 1) die("the group of this row has no other choice");
  }
  free(q.begin);
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
    GROUP("encoder"),
    STRING("--init", "FILE", source.init, NULL,
           "start from a published BERT-like encoder (safetensors); config.json beside it is read "
           "[from scratch]"),
    STRING("--vocab", "FILE", source.vocab, NULL, "its WordPiece vocabulary [vocab.txt of --data]"),
    FLAG("--cased", source.cased, "do not lower-case the text [tokenizer_config.json decides]"),
    WHOLE("--heads", source.heads, 1, 1024, NULL, "attention heads without config.json [4]"),
    REAL("--eps", "E", source.eps, 1e-30, 1, NULL, "LayerNorm epsilon, likewise [1e-12]"),
    END_OF_OPTIONS};

static inline void make_tokenizer(encoder *e, const char *path) {
  read_from(path, 0);
  need(moe_tokenizer_create(&e->tokenizer, e->vocab, e->vocab_bytes, e->config.cased, &env));
  read_from(NULL, 0);
}

/* A file beside --init; NULL: it is not there. */
static inline char *file_beside(const char *name, size_t *bytes) {
  const char *path =
      printed("%.*s%s", (int)(file_name(source.init) - source.init), source.init, name);
  void *file;
  if (!exists(path)) return NULL;
  need(moe_file_read(&file, bytes, path, &env));
  return (char *)file;
}

static inline void import_encoder(encoder *e) {
  size_t bytes;
  char *json = file_beside("config.json", &bytes), *lower;
  need(moe_file_read(&e->file, &e->file_bytes, source.init, &env));
  read_from(source.init, 0);
  if (json) /* first: it knows best what kind of encoder that is */
    need(moe_import_config_json(&e->config, json, bytes, &env));
  need(moe_import_sizes(&e->config, e->file, e->file_bytes, &env));
  if (!json && !source.heads)
    die("there is no config.json beside it: give --heads (and --eps, 1e-12 in BERT)");
  read_from(NULL, 0);
  moe_free(json);
  json = file_beside("tokenizer_config.json", &bytes);
  lower = json ? strstr(json, "\"do_lower_case\"") : NULL;
  if (lower) e->config.cased = !strncmp(lower + 15 + strspn(lower + 15, " :\r\n\t"), "false", 5);
  moe_free(json);
}

static inline void set_max_len(moe_config *c) {
  if (source.max_len > c->positions)
    die("--max-len %d is more than the %d positions of the encoder", source.max_len, c->positions);
  if (source.max_len) c->max_len = source.max_len;
}

/* The encoder of the options and its tokenizer; `folder` may hold the vocabulary. */
static inline void open_encoder(encoder *e, const char *folder) {
  const char *path = source.vocab ? source.vocab : printed("%s/vocab.txt", folder);
  moe_config *c = &e->config;
  void *file;
  if (source.init && !source.vocab)
    die("--init needs --vocab, the vocabulary that the encoder was trained with");
  memset(e, 0, sizeof *e);
  moe_config_init(c);
  if (source.init)
    import_encoder(e);
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
  c->max_len = c->positions < 128 ? c->positions : 128;
  set_max_len(c);

  need(moe_file_read(&file, &e->vocab_bytes, path, &env));
  e->vocab = (char *)file;
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
  set_max_len(&e->config);
  make_tokenizer(e, path);
  if (moe_tokenizer_words(e->tokenizer) > e->config.vocab)
    die("%s: the vocabulary has %d words, the model has %d embeddings", path,
        (int)moe_tokenizer_words(e->tokenizer), (int)e->config.vocab);
}

/* ---- rows of a file ---- */

/* FNV-1a of a text, h to begin with; plain: of its letters and digits in lower case alone (what is
   not ASCII counts as it is). */
static inline uint64_t text_hash(uint64_t h, const char *s, int plain) {
  for (; *s; ++s) {
    unsigned c = (unsigned char)*s;
    if (plain && c >= 'A' && c <= 'Z') c += 32;
    if (!plain || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c >= 128)
      h = (h ^ c) * 0x100000001b3u;
  }
  return h;
}

/* The tokens that overlap code points [from, to) of sentence 1 or 2 (`which` 0 or 1): a word may
   begin or end inside a token. */
static inline void find_span(int32_t *span, const moe_tokens *tokens, int which,
                             const char *sentence, int from, int to) {
  moe_env quiet = env;
  int length = 0;
  for (; *sentence; ++sentence) length += ((unsigned char)*sentence & 0xc0) != 0x80;
  quiet.log = NULL;
  if (from < 0 || to > length || from >= to)
    die("characters %d to %d of sentence%d, which has %d characters, are not a word", from, to,
        which + 1, length);
  if (moe_tokens_span(span, tokens, which, from, to, &quiet))
    die("the word at characters %d to %d of sentence%d was cut off with the end of the text; try "
        "a larger --max-len",
        from, to, which + 1);
}

static inline float read_label(const moe_task *t, const char *field) {
  float label = (float)field_number("label", field);
  if (t->kind == MOE_KIND_REGRESSION && (label < t->low || label > t->high))
    die("label %s is outside %g..%g", field, (double)t->low, (double)t->high);
  if (t->kind != MOE_KIND_REGRESSION &&
      (!(label >= 0 && label < (float)t->classes) || label > (float)(int)label))
    die("label %s is not one of 0 .. %d", field, t->classes - 1);
  return label;
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

/* Reads and tokenises a file, of at most `most` rows (0: all). 0: an optional one is not there. */
static inline int read_rows(rows *r, const moe_task *t, const encoder *e, const char *path,
                            int optional, int64_t most) {
  static const char *const span_name[4] = {"start1", "end1", "start2", "end2"};
  const moe_config *c = &e->config;
  int32_t max_len = t->max_len && t->max_len < c->max_len ? t->max_len : c->max_len;
  int label_at, a_at, b_at, group_at = -1, span_at[4], i, spans = t->kind == MOE_KIND_SPAN;
  moe_tokens out;
  table f;
  memset(r, 0, sizeof *r);
  if (!open_table(&f, path, optional)) return 0;
  label_at = column(&f, "label", 1);
  a_at = column(&f, "sentence1", 1);
  b_at = t->pair ? column(&f, "sentence2", 1) : -1;
  if (t->kind == MOE_KIND_RANKING) group_at = column(&f, "group", 1);
  for (i = 0; i < 4 && spans; ++i) span_at[i] = column(&f, span_name[i], 1);
  out = make_tokens(c->max_len);
  while ((!most || r->n < most) && next_row(&f)) {
    const char *a = f.field[a_at], *b = b_at < 0 ? NULL : f.field[b_at];
    moe_text words;
    row x;
    memset(&x, 0, sizeof x);
    x.label = read_label(t, f.field[label_at]);
    x.hash = text_hash((text_hash(0xcbf29ce484222325u, a, 1) ^ 1) * 0x100000001b3u, b ? b : "", 1);
    x.name = group_at < 0 ? (uint64_t)r->n : text_hash(0xcbf29ce484222325u, f.field[group_at], 0);
    x.line = f.line;
    words = moe_text_of(a, b);
    need(moe_encode(e->tokenizer, &out, &words, max_len, c->truncate, &env));
    for (i = 0; i < 2 && spans; ++i)
      find_span(x.span + 2 * i, &out, b ? i : 0, i && b ? b : a,
                field_whole("start", f.field[span_at[2 * i]]),
                field_whole("end", f.field[span_at[2 * i + 1]]));
    append_row(r, &x, out.ids, out.segments, out.count);
  }
  read_from(f.path, 0);
  if (!r->n) die("there are no rows");
  number_groups(r);
  if (group_at >= 0) check_ranking(r, f.path);
  close_table(&f);
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
    GROUP("data"),
    STRING("--data", "DIR", data.folder, "examples/data",
           "folder with tasks.tsv and TASK/train.tsv, TASK/dev.tsv; a second dev set, dev_2.tsv or "
           "dev_mm.tsv, makes the metric the mean of both"),
    STRING("--tasks", "A,B,C", data.names, NULL, "these tasks, in this order [all of tasks.tsv]"),
    WHOLE("--max-len", source.max_len, 3, 1 << 20, NULL,
          "longest input in tokens [128, or what the positions allow]"),
    END_OF_OPTIONS};

/* labels: "0=no,1=yes" or "0..5" */
static inline void read_labels(moe_task *t, const char *field) {
  list part = split(field, ',');
  const char **name = (const char **)lasting((size_t)part.n, sizeof *name);
  const char *dots = strstr(field, "..");
  int i;
  if (t->kind == MOE_KIND_REGRESSION) {
    if (!dots) die("labels of a regression are a range such as 0..5, not \"%s\"", field);
    t->low = (float)field_number("lowest label", printed("%.*s", (int)(dots - field), field));
    t->high = (float)field_number("highest label", dots + 2);
    if (!(t->low < t->high)) die("the range of labels \"%s\" is empty", field);

    t->classes = 1;
    return;
  }
  if (part.n > MOE_MAX_CLASSES) die("more than %d labels", MOE_MAX_CLASSES);
  if (part.n < 2) die("a task needs at least two labels, \"%s\" names %d", field, part.n);
  for (i = 0; i < part.n; ++i) {
    const char *first = printed("%d=", i);
    name[i] = part.at[i] + strlen(first);
    if (strncmp(part.at[i], first, strlen(first)) || !*name[i])
      die("label %d should read %d=NAME, not \"%s\"", i, i, part.at[i]);
  }
  t->classes = part.n;
  t->label = name;
}

/* The field of a column that may be missing or empty: then NULL. */
static inline const char *field_or_null(const table *f, const char *name) {
  int at = column(f, name, 0);
  return at >= 0 && *f->field[at] ? f->field[at] : NULL;
}

static inline void read_task(const table *f, task_data *t) {
  const char *name = f->field[column(f, "name", 1)], *kind = f->field[column(f, "kind", 1)];
  const char *input = f->field[column(f, "input", 1)], *rest;
  const char *metric = f->field[column(f, "metric", 1)];
  memset(t, 0, sizeof *t);
  if (strlen(name) >= sizeof t->task.name || !*name) die("a task's name has 1 to 63 bytes");
  for (rest = name; *rest; ++rest) /* it names a folder, files and tensors */
    if (!strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+", *rest))
      die("task \"%s\": a name has letters, digits, -, _ and + only", name);
  strcpy(t->task.name, name);
  if (!moe_kind_from_name(&t->task.kind, kind))
    die("kind \"%s\" is not one of classification, regression, ranking, span", kind);
  t->task.pair = !strcmp(input, "pair");
  if (!t->task.pair && strcmp(input, "single"))
    die("input \"%s\" is neither single nor pair", input);
  if (!*metric || strlen(metric) >= sizeof t->task.metrics)
    die("metrics have 1 to %d bytes", MOE_NAME_BYTES - 1);
  strcpy(t->task.metrics, metric);
  t->labels = printed("%s", f->field[column(f, "labels", 1)]);
  read_labels(&t->task, t->labels);
  if ((rest = field_or_null(f, "rows")) != NULL) t->official = field_whole("rows", rest);
  if (t->official < 0) die("rows is %s, expected at least 0", rest);
  if ((rest = field_or_null(f, "max_len")) != NULL) t->task.max_len = field_whole("max_len", rest);
  if (rest && t->task.max_len && t->task.max_len < 2 + t->task.pair)
    die("max_len is %s, the special tokens alone are %d", rest, 2 + (int)t->task.pair);
  if ((rest = field_or_null(f, "hard")) != NULL) t->hard = field_whole("hard", rest);
  if ((rest = field_or_null(f, "description")) != NULL) t->description = printed("%s", rest);
}

static inline int find_task(const task_data *of, int n, const char *name) {
  while (n-- > 0 && strcmp(of[n].task.name, name)) continue;
  return n;
}

/* The tasks named in tasks.tsv, all of them (names NULL) or those of the list "A,B". */
static inline void read_tasks(const char *names) {
  const char *path = printed("%s/tasks.tsv", data.folder);
  list wanted = split(names ? names : "", ',');
  task_data *all = NULL;
  int n = 0, i;
  table f;
  open_table(&f, path, 0);
  f.skip_empty = 1;
  for (; next_row(&f); ++n) {
    if (n == MOE_MAX_TASKS) die("more than %d tasks", MOE_MAX_TASKS);
    all = (task_data *)grow(all, (size_t)n + 1, sizeof *all);
    read_task(&f, &all[n]);
    if (find_task(all, n, all[n].task.name) >= 0) die("task %s is listed twice", all[n].task.name);
  }
  if (!n) read_from(path, 0), die("there are no tasks");
  close_table(&f);
  n_tasks = names ? wanted.n : n;
  tasks = (task_data *)lasting((size_t)n_tasks, sizeof *tasks);
  for (i = 0; i < n_tasks; ++i) {
    int at = names ? find_task(all, n, wanted.at[i]) : i;
    if (at < 0) die("there is no task \"%s\" in %s", wanted.at[i], path);
    if (find_task(tasks, i, all[at].task.name) >= 0) die("--tasks names %s twice", wanted.at[i]);
    tasks[i] = all[at];
  }
  free(all);
}

/* FILE.tsv of a task; 0: an optional one is not there. */
static inline int read_part(rows *r, const task_data *d, const encoder *e, const char *file,
                            int optional, int64_t most) {
  const char *path = printed("%s/%s/%s.tsv", data.folder, d->task.name, file);
  return read_rows(r, &d->task, e, path, optional, most);
}

/* The rows of a task, at most `most` of train (0: all). */
static inline void read_task_rows(task_data *d, const encoder *e, int64_t most) {
  read_part(&d->train, d, e, "train", 0, most);
  read_part(&d->dev[0], d, e, "dev", 0, 0);
  d->n_dev = 1 + (read_part(&d->dev[1], d, e, "dev_2", 1, 0) ||
                  read_part(&d->dev[1], d, e, "dev_mm", 1, 0));
  if (!d->official) d->official = d->train.n;
}

static inline int64_t dev_rows(const task_data *d) { return d->dev[0].n + d->dev[1].n; }

/* ---- rows left out, held out, drawn ---- */

/* Clears keep[group] of the rows whose text occurs in `dev`. */
static inline void mark_overlaps(unsigned char *keep, const rows *r, const rows *dev) {
  uint64_t *set = (uint64_t *)take((size_t)dev->n, sizeof *set);
  int64_t i;
  for (i = 0; i < dev->n; ++i) set[i] = dev->row[i].hash;
  qsort(set, (size_t)dev->n, sizeof *set, by_number);
  for (i = 0; i < r->n; ++i)
    if (bsearch(&r->row[i].hash, set, (size_t)dev->n, sizeof *set, by_number))
      keep[r->row[i].group] = 0;
  free(set);
}

/* --dedup: a training row that occurs in another task's dev set would make that task's score
   dishonest. A question that loses one choice loses all. */
static inline void remove_overlaps(void) {
  int t, o, d;
  for (t = 0; t < n_tasks; ++t) {
    rows all = tasks[t].train, *r = &tasks[t].train;
    unsigned char *keep = (unsigned char *)take((size_t)all.groups, 1);
    memset(keep, 1, (size_t)all.groups);
    for (o = 0; o < n_tasks; ++o)
      for (d = 0; d < tasks[o].n_dev && o != t; ++d) mark_overlaps(keep, &all, &tasks[o].dev[d]);
    *r = copy_rows(&all, keep, 1);
    if (r->n < all.n)
      printf("%s: %lld training rows occur in another task's dev set and are left out\n",
             tasks[t].task.name, (long long)(all.n - r->n));
    if (!r->n) die("%s has no training row left", tasks[t].task.name);
    free(keep);
    free_rows(&all);
  }
}

/* A share of every task's training rows, about `most` of them (0: no limit), goes to `held`. The
   rows of a ranking's group stay together. */
static inline void hold_out_rows(double share, int most) {
  int t;
  int64_t i;
  for (t = 0; t < n_tasks; ++t) {
    task_data *d = &tasks[t];
    rows all = d->train;
    unsigned char *keep = (unsigned char *)take((size_t)all.groups, 1);
    double n = (double)all.n, part = most && share * n > most ? most / n : share;
    for (i = 0; i < all.n; ++i) {
      uint64_t of = d->task.kind == MOE_KIND_RANKING ? all.row[i].name : (uint64_t)i;
      uint64_t random = moe_key(1, 0, of, (uint32_t)t, 77) >> 11;
      keep[all.row[i].group] = (double)random / 9007199254740992.0 >= part;
    }
    d->train = copy_rows(&all, keep, 1);
    d->held = copy_rows(&all, keep, 0);
    free(keep);
    free_rows(&all);
    if (!d->train.n || !d->held.n)
      die("--hold-out %g leaves task %s without rows on one side", share, d->task.name);
  }
}

/* `wanted` rows of r drawn by the seed; a ranking's questions stay whole. The groups are shuffled
   (Fisher and Yates), then taken from the front. */
static inline rows draw_rows(const rows *r, int64_t wanted, int seed) {
  unsigned char *keep = (unsigned char *)take((size_t)r->groups, 1);
  groups q = group_rows(r);
  int64_t *turn = (int64_t *)take((size_t)q.n, sizeof *turn), i, kept = 0;
  rows out;
  for (i = 0; i < q.n; ++i) turn[i] = i;
  for (i = 0; i < q.n && kept < wanted; ++i) {
    uint64_t random = moe_key((uint64_t)seed, 0, (uint64_t)i, 0, 78) % (uint64_t)(q.n - i);
    int64_t g = turn[i + (int64_t)random];
    turn[i + (int64_t)random] = turn[i];
    keep[g] = 1;
    kept += q.begin[g + 1] - q.begin[g];
  }
  out = copy_rows(r, keep, 1);
  free(q.begin), free(turn), free(keep);
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
  b->task[s] = task;
  b->label[s] = x->label;
  b->index[s] = index;
  b->start[s + 1] = b->tokens += length;
}
#endif
