/* data.h - tasks and rows for all programs: tasks.tsv, the files of its tasks, the encoder and
   tokenizer that they are read for, tokenised rows, batches

   tasks.tsv has the columns name input kind labels metric, and may have rows, max_len, hard,
   description, class_weights, and what columns are called in the files of a task (table.h):
   label_column, sentence1_column, sentence2_column, group_column. A file of rows has the columns
   label and sentence1, a pair sentence2, a ranking group, a span start1 end1 start2 end2 (code
   points). Other columns are ignored. A task's files are TASK/train and TASK/dev (or val,
   validation, dev_matched), a second dev set is dev_2 (or dev_mm, dev_mismatched,
   validation_mismatched), each with the ending .tsv, .csv or .jsonl; TASK.tsv, TASK.csv,
   TASK.jsonl are for --split. */
#ifndef TOOLS_DATA_H
#define TOOLS_DATA_H
#include "encoder.h"
#include "learn.h"
#include "table.h"

/* ---- fields ---- */

static inline double field_number(const char *what, const char *field) {
  char *end;
  double v = strtod(field, &end);
  end += strspn(end, " ");
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

TOOLS_DIES static inline void die_of_label(const moe_task *t, const char *field) {
  text names = {NULL, 0, 0};
  int c;
  for (c = 0; c < t->classes && c < 20; ++c) put(&names, "%s %d=%s", c ? "," : "", c, t->label[c]);
  die("label \"%s\" is none of%s%s (the names come from the column labels of tasks.tsv)", field,
      names.data, c < t->classes ? ", ..." : "");
}

/* A number, or the name of a label. */
static inline float read_label(const moe_task *t, const char *field) {
  size_t n = strlen(field += strspn(field, " "));
  char *end;
  float label;
  int c;
  while (n && field[n - 1] == ' ') --n;
  (void)strtod(field, &end);
  for (c = 0; end != field + n && t->label && c < t->classes; ++c)
    if (strlen(t->label[c]) == n && !strncmp(t->label[c], field, n)) return (float)c;
  if (end != field + n && t->label) die_of_label(t, field);
  label = (float)field_number("label", field);
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

/* What the columns of a task's files are called (see table.h). */
typedef struct columns {
  const char *label, *sentence1, *sentence2, *group;
} columns;
static const columns usual_columns = {"label", "sentence1", "sentence2", "group"};

/* Where a row's fields are; -1: the task has none. */
typedef struct row_reader {
  const moe_task *task;
  const encoder *from;
  table file;
  moe_tokens tokens;
  int32_t max_len;
  int label, a, b, group, span[4];
} row_reader;

/* 0: the file is optional and not there. */
static inline int open_rows(row_reader *r, const columns *as, const char *path, int optional) {
  static const char *const span_name[4] = {"start1", "end1", "start2", "end2"};
  const moe_task *t = r->task;
  const moe_config *c = &r->from->config;
  int i;
  if (!open_table(&r->file, path, optional)) return 0;
  r->file.hint = "; tasks.tsv may say what they are called: label_column, sentence1_column, "
                 "sentence2_column, group_column (@2: the second field of a file that names none)";
  r->max_len = t->max_len && t->max_len < c->max_len ? t->max_len : c->max_len;
  r->tokens = make_tokens(c->max_len);
  r->label = column(&r->file, as->label, 1);
  r->a = column(&r->file, as->sentence1, 1);
  r->b = t->pair ? column(&r->file, as->sentence2, 1) : -1;
  r->group = -1;
  if (t->kind == MOE_KIND_RANKING && (r->b < 0 || alternatives(&r->file, r->b) == 1))
    r->group = column(&r->file, as->group, 1);
  for (i = 0; i < 4 && t->kind == MOE_KIND_SPAN; ++i)
    r->span[i] = column(&r->file, span_name[i], 1);
  return 1;
}

/* Appends the row of the file that was read last, with choice k of `choices` for sentence 2: its
   label says which of them is right. */
static inline void read_row(rows *to, row_reader *r, int k, int choices) {
  const moe_task *t = r->task;
  const char *a = field(&r->file, r->a), *b = r->b < 0 ? NULL : alternative(&r->file, r->b, k);
  moe_text words = moe_text_of(a, b);
  row x;
  int i;
  memset(&x, 0, sizeof x);
  x.label = choices > 1 ? (float)(field_whole("label", field(&r->file, r->label)) == k)
                        : read_label(t, field(&r->file, r->label));
  x.hash = text_hash((text_hash(0xcbf29ce484222325u, a, 1) ^ 1) * 0x100000001b3u, b ? b : "", 1);
  x.name = choices > 1    ? (uint64_t)r->file.line
           : r->group < 0 ? (uint64_t)to->n
                          : text_hash(0xcbf29ce484222325u, field(&r->file, r->group), 0);
  x.line = r->file.line;
  need(moe_encode(r->from->tokenizer, &r->tokens, &words, r->max_len, r->from->config.truncate,
                  &env));
  for (i = 0; i < 2 && t->kind == MOE_KIND_SPAN; ++i)
    find_span(x.span + 2 * i, &r->tokens, b ? i : 0, i && b ? b : a,
              field_whole("start", field(&r->file, r->span[2 * i])),
              field_whole("end", field(&r->file, r->span[2 * i + 1])));
  append_row(to, &x, r->tokens.ids, r->tokens.segments, r->tokens.count);
}

/* Reads and tokenises a file, of at most `most` rows (0: all). 0: an optional one is not there. */
static inline int read_rows(rows *to, const moe_task *t, const columns *as, const encoder *e,
                            const char *path, int optional, int64_t most) {
  row_reader r;
  int k, choices;
  memset(to, 0, sizeof *to);
  r.task = t;
  r.from = e;
  if (!open_rows(&r, as ? as : &usual_columns, path, optional)) return 0;
  choices = r.b < 0 ? 1 : alternatives(&r.file, r.b);
  if (choices > 1 && t->kind != MOE_KIND_RANKING)
    die("alternatives (A | B) are for tasks of kind ranking");
  while ((!most || to->n < most) && next_row(&r.file))
    for (k = 0; k < choices; ++k) read_row(to, &r, k, choices);
  read_from(r.file.path, 0);
  if (!to->n) die("there are no rows");
  number_groups(to);
  if (t->kind == MOE_KIND_RANKING) check_ranking(to, r.file.path);
  close_table(&r.file);
  return 1;
}

/* ---- tasks ---- */

typedef struct task_data {
  moe_task task;
  const char *labels, *description; /* as tasks.tsv has them; description may be NULL */
  columns as;
  const char *weights; /* column class_weights, or NULL */
  float *class_weight; /* (classes) of the training rows' losses, or NULL: 1 */
  int64_t official;    /* column `rows`, else the training rows: decides "small" */
  int hard, n_dev;
  rows train, held, dev[2];
} task_data;

static struct {
  const char *folder, *list, *names;
  double split;
  int split_seed;
} data;
static task_data *tasks; /* those that were asked for */
static int n_tasks;

static const option data_options[] = {
    GROUP("data"),
    STRING("--data", "DIR", data.folder, "examples/data",
           "folder with tasks.tsv and TASK/train.tsv, TASK/dev.tsv (or .csv, .jsonl); a second dev "
           "set, dev_2 or dev_mm, makes the metric the mean of both"),
    STRING("--task-list", "FILE", data.list, NULL,
           "in place of tasks.tsv in that folder: examples/data/glue.tsv and superglue.tsv fit "
           "these benchmarks as they are downloaded"),
    STRING("--tasks", "A,B,C", data.names, NULL, "these tasks, in this order [all of tasks.tsv]"),
    REAL("--split", "SHARE", data.split, 0, 0.9, "0",
         "tasks without a dev file take this share of their training rows as dev, of each class as "
         "much"),
    WHOLE("--split-seed", data.split_seed, 0, 2147483647, "1", "which rows those are"),
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
static inline const char *field_or_null(table *f, const char *name) {
  int at = column(f, name, 0);
  return at >= 0 && *field(f, at) ? field(f, at) : NULL;
}

/* What tasks.tsv says a column is called. */
static inline const char *column_name(table *f, const char *name, const char *usual) {
  const char *said = field_or_null(f, name);
  return said ? printed("%s", said) : usual;
}

/* class_weights: "1,2.5", a factor of the loss for each label, or "balanced". */
static inline void read_class_weights(task_data *t, const char *said) {
  list part = split(said, ',');
  int i;
  if (t->task.kind == MOE_KIND_REGRESSION)
    die("class_weights are for tasks with classes, %s is a regression", t->task.name);
  t->weights = printed("%s", said);
  t->class_weight = (float *)lasting((size_t)t->task.classes, sizeof *t->class_weight);
  if (!strcmp(said, "balanced")) return; /* the training rows are not known yet */
  if (part.n != t->task.classes)
    die("class_weights \"%s\" has %d numbers for %d labels (or is \"balanced\")", said, part.n,
        t->task.classes);
  for (i = 0; i < part.n; ++i) {
    double v = field_number("class weight", part.at[i]);
    if (!(v >= 0)) die("class weight %s is below 0", part.at[i]);
    t->class_weight[i] = (float)v;
  }
}

/* "balanced": rows / (classes * rows of the class), as scikit-learn has it. */
static inline void balance_classes(task_data *t) {
  int64_t count[MOE_MAX_CLASSES] = {0}, i;
  int c;
  if (!t->weights || strcmp(t->weights, "balanced")) return;
  for (i = 0; i < t->train.n; ++i) ++count[(int)t->train.row[i].label];
  for (c = 0; c < t->task.classes; ++c)
    t->class_weight[c] =
        count[c] ? (float)((double)t->train.n / t->task.classes / (double)count[c]) : 1;
}

static inline void read_task(table *f, task_data *t) {
  const char *name = field(f, column(f, "name", 1)), *kind = field(f, column(f, "kind", 1));
  const char *input = field(f, column(f, "input", 1)), *rest;
  const char *metric = field(f, column(f, "metric", 1));
  moe_env sentences = env;
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
  t->labels = printed("%s", field(f, column(f, "labels", 1)));
  read_labels(&t->task, t->labels);
  sentences.log = log_sentence;
  need(moe__check_task_metrics(&t->task, &sentences)); /* better known here than when it trains */
  if ((rest = field_or_null(f, "rows")) != NULL) t->official = field_whole("rows", rest);
  if (t->official < 0) die("rows is %s, expected at least 0", rest);
  if ((rest = field_or_null(f, "max_len")) != NULL) t->task.max_len = field_whole("max_len", rest);
  if (rest && t->task.max_len && t->task.max_len < 2 + t->task.pair)
    die("max_len is %s, the special tokens alone are %d", rest, 2 + (int)t->task.pair);
  if ((rest = field_or_null(f, "hard")) != NULL) t->hard = field_whole("hard", rest);
  if ((rest = field_or_null(f, "class_weights")) != NULL) read_class_weights(t, rest);
  if ((rest = field_or_null(f, "description")) != NULL) t->description = printed("%s", rest);
  t->as.label = column_name(f, "label_column", usual_columns.label);
  t->as.sentence1 = column_name(f, "sentence1_column", usual_columns.sentence1);
  t->as.sentence2 = column_name(f, "sentence2_column", usual_columns.sentence2);
  t->as.group = column_name(f, "group_column", usual_columns.group);
}

static inline int find_task(const task_data *of, int n, const char *name) {
  while (n-- > 0 && strcmp(of[n].task.name, name)) continue;
  return n;
}

/* The tasks named in tasks.tsv, all of them (names NULL) or those of the list "A,B". */
static inline void read_tasks(const char *names) {
  const char *path = data.list ? data.list : printed("%s/tasks.tsv", data.folder);
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

/* The file of a task of one of the names ("dev|val"), or NULL. */
static inline const char *find_file(const char *task, const char *names) {
  static const char *const endings[] = {"tsv", "csv", "jsonl", "ndjson"};
  list name = split(names, '|');
  const char *found = NULL, *path;
  int i, k;
  for (i = 0; i < name.n; ++i)
    for (k = 0; k < 4; ++k) {
      path = printed("%s/%s%s%s.%s", data.folder, task, *name.at[i] ? "/" : "", name.at[i],
                     endings[k]);
      if (!exists(path)) continue;
      if (found) die("task %s: both %s and %s are there; keep one", task, found, path);
      found = path;
    }
  return found;
}

#define DEV_FILES "dev|val|valid|validation|dev_matched|validation_matched"
#define DEV_2_FILES "dev_2|dev_mm|dev_mismatched|validation_mismatched"

/* The order of rows in which --split takes them: class by class, drawn by the seed. */
typedef struct split_key {
  float class_of;
  uint64_t random;
  int32_t group;
} split_key;

static inline int by_class(const void *a, const void *b) {
  const split_key *x = (const split_key *)a, *y = (const split_key *)b;
  if (x->class_of < y->class_of || x->class_of > y->class_of)
    return x->class_of < y->class_of ? -1 : 1;
  return x->random < y->random ? -1 : x->random > y->random;
}

/* --split: of each class its share goes to dev, at least one row where a class has two; a
   regression is one class, and the choices of a ranking stay together. */
static inline void split_rows(task_data *d) {
  rows all = d->train;
  split_key *key = (split_key *)take((size_t)all.groups, sizeof *key);
  unsigned char *keep = (unsigned char *)take((size_t)all.groups, 1);
  int64_t i, n, end, g;
  for (i = 0; i < all.n; ++i) {
    split_key *k = &key[g = all.row[i].group];
    k->group = (int32_t)g;
    k->random = moe_key((uint64_t)data.split_seed, 0, (uint64_t)g, 0, 80);
    if (d->task.kind == MOE_KIND_CLASSIFICATION || d->task.kind == MOE_KIND_SPAN)
      k->class_of = all.row[i].label;
  }
  qsort(key, (size_t)all.groups, sizeof *key, by_class);
  memset(keep, 1, (size_t)all.groups);
  for (i = 0; i < all.groups; i = end) {
    for (end = i; end < all.groups && !(key[end].class_of > key[i].class_of);) ++end;
    n = (int64_t)(data.split * (double)(end - i) + 0.5);
    for (n = n < 1 && end - i > 1 ? 1 : n; n > 0; --n) keep[key[i + n - 1].group] = 0;
  }
  d->train = copy_rows(&all, keep, 1);
  d->dev[0] = copy_rows(&all, keep, 0);
  free(key), free(keep);
  free_rows(&all);
  if (!d->train.n || !d->dev[0].n)
    die("--split %g leaves task %s without rows on one side", data.split, d->task.name);
}

/* The rows of a task, at most `most` of train (0: all). */
static inline void read_task_rows(task_data *d, const encoder *e, int64_t most) {
  const char *name = d->task.name, *train = find_file(name, "train"),
             *dev = find_file(name, DEV_FILES), *second = find_file(name, DEV_2_FILES);
  if (d->task.pair && e->config.segments < 2)
    die("task %s takes pairs of texts, but the encoder knows one kind of segment "
        "(type_vocab_size 1): a pair needs two",
        name);
  if (!train && !dev) train = find_file(name, "");
  if (!train && exists(printed("%s/%s/train.json", data.folder, name)))
    die("task %s: %s/%s/train.json is there: make it an object a line, train.jsonl (jq -c '.[]' "
        "train.json > train.jsonl)",
        name, data.folder, name);
  if (!train) die("task %s has no file %s/%s/train.tsv (or .csv, .jsonl)", name, data.folder, name);
  read_rows(&d->train, &d->task, &d->as, e, train, 0, dev ? most : 0);
  d->n_dev = 1;
  if (dev)
    read_rows(&d->dev[0], &d->task, &d->as, e, dev, 0, 0);
  else if (data.split > 0)
    split_rows(d);
  else
    die("task %s has no file %s/%s/dev.tsv (or .csv, .jsonl); --split 0.1 takes a tenth of the "
        "training rows",
        name, data.folder, name);
  if (second) d->n_dev += read_rows(&d->dev[1], &d->task, &d->as, e, second, 0, 0);
  if (!d->official) d->official = d->train.n;
}

enum { LEARNED_WORDS = 4000 };

/* The texts of a task's training file. */
static inline void learn_task(learner *l, const task_data *d) {
  const char *name = d->task.name, *path = find_file(name, "train");
  int a, b, k;
  table f;
  if (!path) path = find_file(name, "");
  if (!path) return; /* read_task_rows says so */
  open_table(&f, path, 0);
  a = column(&f, d->as.sentence1, 1);
  b = d->task.pair ? column(&f, d->as.sentence2, 1) : -1;
  while (next_row(&f)) {
    const char *s = field(&f, a);
    learn_text(l, s, strlen(s));
    for (k = 0; b >= 0 && k < alternatives(&f, b); ++k) {
      s = alternative(&f, b, k);
      learn_text(l, s, strlen(s));
    }
  }
  close_table(&f);
}

/* The encoder of the options for the tasks. Where there is no vocabulary at all, one is learned
   from the texts that are trained on. */
static inline void open_task_encoder(encoder *e) {
  learner l;
  text words;
  int t;
  if (source.init || source.vocab || exists(printed("%s/vocab.txt", data.folder))) {
    open_encoder(e, data.folder, NULL);
    return;
  }
  begin_learning(&l, source.cased);
  for (t = 0; t < n_tasks; ++t) learn_task(&l, &tasks[t]);
  if (!l.words.n) die("the training texts have no words");
  words = learn_vocab(&l, LEARNED_WORDS);
  open_encoder(e, data.folder, &words);
  printf("There is no %s/vocab.txt: a vocabulary of %d words was learned from the training texts\n",
         data.folder, (int)e->config.vocab);
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
  float *label, *weight;
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
  b.weight = (float *)lasting(S, sizeof *b.weight); /* in the batch where it is wanted */
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
