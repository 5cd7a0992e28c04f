/* table.h - files of rows with named columns, as people have them

     table f;
     int label, text;
     open_table(&f, "train.csv", 0);
     label = column(&f, "label", 1);
     text = column(&f, "question + passage", 1);
     while (next_row(&f)) use(field(&f, label), field(&f, text));
     close_table(&f);

   By the ending of the name: .csv (RFC 4180, commas or semicolons), .jsonl (an object a line), all
   others TSV (tabs, no quoting). UTF-8, or UTF-16 with its byte order mark. The first line names
   the columns. What a caller may ask for as a column:
     NAME                 the column, or the member of a JSON object, of that name
     @3                   the third field of a file without a line of names
     A + B                both, with a blank between them
     A | B                alternatives: a row of the file is a row for each (alternatives)
     a.b, a[].b           JSON: a member of a member; of each element of an array, a row for each
   What is not such a file ends the program with a sentence that says what it is. Reading UTF-8 and
   JSON is moe.h's, which cli.h includes whole. */
#ifndef TOOLS_TABLE_H
#define TOOLS_TABLE_H
#include "cli.h"

enum { MOST_COLUMNS = 24, MOST_PARTS = 4, MOST_DEPTH = 4, MOST_MEMBERS = 64 };

typedef enum table_kind { TABLE_TSV, TABLE_CSV, TABLE_JSONL } table_kind;

/* A value of a line of JSON, and where it stands in the arrays around it. */
typedef struct json_value {
  char *at, *end;
  int place[MOST_DEPTH];
} json_value;

/* One name that a column is made of: a field of TSV and CSV; a path in JSON and what a line has
   there. */
typedef struct table_part {
  const char *name;
  int at, depth; /* field, or the value that belongs to this row; arrays around it */
  json_value *value;
  int n, room;
} table_part;

typedef struct table_column {
  const char *name;
  table_part part[MOST_PARTS];
  int n, choose; /* choose 1: alternatives */
  text joined;
} table_column;

typedef struct table {
  const char *path, *hint; /* hint: behind the sentence about a column that is not there */
  table_kind kind;
  char *data, *at, *end, mark; /* the whole file; mark: between fields */
  char **field;                /* of the record that was read last */
  int fields, room;
  list name;           /* of the columns */
  int line, next_line; /* of that record, from 1 */
  int nameless, waits; /* 1: no line of names; the first record is still to come as a row */
  int skip_empty;      /* 1: empty lines are passed over, else at the end only */
  table_part *widest;  /* JSON: the part that makes rows */
  int of;              /* the row of this line */
  text members;        /* of this line's object, for sentences */
  table_column column[MOST_COLUMNS];
  int columns;
} table;

/* ---- opening: what kind of file it is ---- */

/* Bytes that other kinds of file begin with, and what to do. */
static inline void check_magic(const char *data, size_t bytes) {
  static const struct {
    const char *magic, *advice;
  } known[] = {{"\x1f\x8b", "is compressed with gzip: unpack it first (gunzip FILE)"},
               {"BZh", "is compressed with bzip2: unpack it first (bunzip2 FILE)"},
               {"\xfd"
                "7zXZ",
                "is compressed with xz: unpack it first (unxz FILE)"},
               {"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first (unzstd FILE)"},
               {"PK\x03\x04", "is a zip archive or a spreadsheet: unpack it, or save it as CSV in "
                              "UTF-8"},
               {"\xd0\xcf\x11\xe0", "is an old spreadsheet (xls): save it as CSV in UTF-8"},
               {"PAR1", "is Parquet: convert it, for example with pandas: read_parquet(FILE)"
                        ".to_json(FILE.jsonl, orient='records', lines=True)"},
               {"ARROW1", "is Arrow: convert it to CSV or JSONL"}};
  size_t i;
  for (i = 0; i < sizeof known / sizeof *known; ++i) {
    size_t n = strlen(known[i].magic);
    if (bytes >= n && !memcmp(data, known[i].magic, n)) die("the file %s", known[i].advice);
  }
}

/* UTF-16 to UTF-8; what is half a pair becomes U+FFFD. */
static inline char *from_utf16(const char *data, size_t *bytes) {
  const unsigned char *s = (const unsigned char *)data;
  int big = s[0] == 0xfe;
  size_t n = *bytes / 2, i;
  char *out = (char *)take(3 * n + 1, 1), *to = out;
  if (*bytes % 2) die("UTF-16 of an odd number of bytes: the file is cut short");
  for (i = 1; i < n; ++i) {
    uint32_t c =
        big ? (uint32_t)s[2 * i] << 8 | s[2 * i + 1] : (uint32_t)s[2 * i + 1] << 8 | s[2 * i];
    if (c >= 0xd800 && c < 0xdc00 && i + 1 < n) {
      uint32_t low = big ? (uint32_t)s[2 * i + 2] << 8 | s[2 * i + 3]
                         : (uint32_t)s[2 * i + 3] << 8 | s[2 * i + 2];
      if (low >= 0xdc00 && low < 0xe000) c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00), ++i;
    }
    to += moe__utf8_put((unsigned char *)to, c >= 0xd800 && c < 0xe000 ? 0xfffd : c);
  }
  *bytes = (size_t)(to - out);
  return out;
}

/* Ends the program where the text is not UTF-8. */
static inline void check_utf8(const table *f) {
  const unsigned char *s = (const unsigned char *)f->at, *end = (const unsigned char *)f->end;
  int line = 1;
  while (s < end) {
    int n = moe__utf8_bytes(s, end);
    line += *s == '\n';
    if (!*s) read_from(f->path, line), die("a zero byte: text in UTF-8 has none");
    if (!n) {
      read_from(f->path, line);
      die("byte 0x%02x is not UTF-8. If the file is Latin-1 or Windows-1252, convert it first: "
          "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
          *s);
    }
    s += n;
  }
}

/* All of a file ("-": standard input) into f->data. 0: it is optional and not there. */
static inline int read_whole(table *f, const char *path, int optional) {
  text all = {NULL, 0, 0};
  char block[16384];
  size_t n;
  FILE *stream = strcmp(path, "-") ? fopen(path, "rb") : stdin;
  if (!stream && optional && errno == ENOENT) return 0;
  if (!stream) die("cannot open %s: %s", path, strerror(errno));
#ifdef _WIN32
  if (stream == stdin) _setmode(_fileno(stdin), _O_BINARY); /* else the byte 0x1a would end it */
#endif
  read_from(f->path, 0);
  put_bytes(&all, "", 0);
  while ((n = fread(block, 1, sizeof block, stream)) > 0) put_bytes(&all, block, n);
  if (ferror(stream)) die("cannot be read: %s", strerror(errno));
  if (stream != stdin) fclose(stream);
  f->data = all.data;
  f->end = all.data + all.bytes;
  return 1;
}

static inline int ends_with(const char *path, const char *ending) {
  size_t n = strlen(path), m = strlen(ending);
  return n > m && !strcmp(path + n - m, ending);
}

/* ---- records of TSV and CSV: a line cut into f->field, in place ---- */

static inline void put_field(table *f, char *at) {
  if (f->fields == f->room)
    f->field = (char **)grow(f->field, (size_t)(f->room = 2 * f->room + 16), sizeof *f->field);
  f->field[f->fields++] = at;
}

/* A quoted field from its quote on; `to` is behind it then. Returns what follows it. */
static inline char *read_quoted(table *f, char *s, char **to) {
  for (++s;; *(*to)++ = *s++) {
    if (s == f->end) die("a quoted field that begins here has no closing quote");
    f->next_line += *s == '\n';
    if (*s == '"' && (++s == f->end || *s != '"')) return s;
  }
}

/* The next record; its number of fields, 0 at the end of the file. */
static inline int read_record(table *f) {
  char *s = f->at, *to, c = f->mark;
  read_from(f->path, f->line = f->next_line++);
  if (s == f->end) return 0;
  for (f->fields = 0; c == f->mark; *to = 0) {
    put_field(f, to = s);
    if (f->kind == TABLE_CSV && s < f->end && *s == '"') {
      s = read_quoted(f, s, &to);
      if (s < f->end && *s == '\r' && s + 1 < f->end && s[1] == '\n') ++s;
      if (s < f->end && *s != f->mark && *s != '\n')
        die("field %d: a quote inside a quoted field is written twice", f->fields);
    } else {
      while (s < f->end && *s != f->mark && *s != '\n') ++s;
      to = s;
      if (to > f->field[f->fields - 1] && to[-1] == '\r' && (s == f->end || *s == '\n')) --to;
    }
    c = s < f->end ? *s++ : '\n';
  }
  f->at = s;
  return f->fields;
}

static inline int is_empty_record(const table *f) { return f->fields == 1 && !*f->field[0]; }

/* 1: nothing but blanks and ends of lines from here on. */
static inline int only_blanks(const char *s, const char *end) {
  while (s < end && strchr(" \t\r\n", *s)) ++s;
  return s == end;
}

/* ---- lines of JSON ---- */

static inline json_value *put_value(table_part *p, const int *place) {
  json_value *v;
  if (p->n == p->room)
    p->value = (json_value *)grow(p->value, (size_t)(p->room = 2 * p->room + 8), sizeof *v);
  v = &p->value[p->n];
  memcpy(v->place, place, sizeof v->place);
  if (p->n++ && !memcmp(v->place, v[-1].place, sizeof v->place))
    die("two members are called \"%s\"", p->name);
  return v;
}

/* A value that is text, a number, true (1) or false (0) for the parts that want it; null is as if
   it were not there. */
static inline void read_scalar(moe__json *j, table_part *const *part, int n, const int *place) {
  moe__json_text string;
  int kind = moe__json_kind(j), i;
  char *at = (char *)j->at, *end;
  if (kind == '"') {
    if (!moe__json_string(j, &string)) return;
    if (moe__json_has_zero(&string)) die("a zero byte in a string");
    at = (char *)string.begin.at;
    end = at + moe__json_copy(at, (size_t)(string.end - at) + 1, &string);
  } else {
    if (!moe__json_skip(j)) return;
    end = (char *)j->at;
    if (kind == 't' || kind == 'f') *at = kind == 't' ? '1' : '0', end = at + 1;
  }
  for (i = 0; i < n && kind != 'n'; ++i) {
    json_value *v = put_value(part[i], place);
    v->at = at;
    v->end = end;
  }
}

/* Whether the path goes on with this member; *rest is what follows its name. */
static inline int path_goes_on(const char **rest, const char *member) {
  const char *s = *rest + (**rest == '.');
  size_t n = strlen(member);
  if (strncmp(s, member, n) || !strchr(".[", s[n])) return 0; /* or the end */
  *rest = s + n;
  return 1;
}

/* A value, for n parts whose paths go on with rest[] from here: nothing, "[]..." or ".name...". */
static inline void read_value(table *f, moe__json *j, table_part *const *part, const char **rest,
                              int n, const int *place, int depth) {
  int kind = moe__json_kind(j), begins = kind == '[' || kind == '{' ? kind : 0, i, m = 0,
      at[MOST_DEPTH];
  table_part *some[MOST_COLUMNS * MOST_PARTS];
  const char *behind[MOST_COLUMNS * MOST_PARTS];
  memcpy(at, place, sizeof at);
  if (!begins) {
    for (i = 0; i < n; ++i)
      if (!*rest[i]) some[m++] = part[i];
    read_scalar(j, some, m, at);
    return;
  }
  if (!moe__json_enter(j, kind)) return;
  for (; moe__json_more(j, kind == '[' ? ']' : '}'); at[depth] += kind == '[') {
    char member[256] = "";
    moe__json_text name;
    if (kind == '{' && !moe__json_key(j, &name)) return;
    if (kind == '{') moe__json_copy(member, sizeof member, &name);
    if (kind == '{' && n && rest[0] == part[0]->name) put(&f->members, ", %s", member);
    for (i = m = 0; i < n; ++i) {
      behind[m] = rest[i];
      if (kind == '{' ? path_goes_on(&behind[m], member) : !strncmp(rest[i], "[]", 2))
        behind[m] += kind == '[' ? 2 : 0, some[m++] = part[i];
    }
    if (m)
      read_value(f, j, some, behind, m, at, depth + (kind == '['));
    else
      moe__json_skip(j);
    if (j->error) return;
  }
}

/* Reads an object of one line. 0: the file has ended. */
static inline int read_object(table *f) {
  static const int first[MOST_DEPTH] = {0};
  table_part *part[MOST_COLUMNS * MOST_PARTS];
  const char *rest[MOST_COLUMNS * MOST_PARTS];
  char *end;
  moe__json j;
  int n = 0, c, i, k;
  if (only_blanks(f->at, f->end)) return 0;
  for (;; f->at = end + 1) {
    end = (char *)memchr(f->at, '\n', (size_t)(f->end - f->at));
    if (!end) end = f->end;
    read_from(f->path, f->line = f->next_line++);
    if (!only_blanks(f->at, end)) break;
  }
  for (f->widest = NULL, c = 0; c < f->columns; ++c)
    for (i = 0; i < f->column[c].n; ++i, ++n) {
      part[n] = &f->column[c].part[i];
      rest[n] = part[n]->name;
      part[n]->n = part[n]->at = 0;
      if (!f->widest || part[n]->depth > f->widest->depth) f->widest = part[n];
    }
  f->members.bytes = 0;
  put(&f->members, "%s", "");
  moe__json_init(&j, f->at, (size_t)(end - f->at), 0);
  if (moe__json_kind(&j) == '[')
    die("a JSON array; expected an object a line (jq -c '.[]' FILE.json > FILE.jsonl)");
  if (moe__json_kind(&j) != '{') die("expected a JSON object { } a line");
  read_value(f, &j, part, rest, n, first, 0);
  if (!moe__json_finish(&j)) die("%s (byte %d of the line)", j.error, (int)(j.at - f->at) + 1);
  for (i = 0; i < n; ++i)
    for (k = 0; k < part[i]->n; ++k) *part[i]->value[k].end = 0;
  f->at = end < f->end ? end + 1 : end;
  f->of = 0;
  return 1;
}

/* Finds the values that belong to row f->of of this line's object. 0: it has no more rows. */
static inline int next_object_row(table *f) {
  const json_value *row;
  int c, i;
  if (!f->widest || f->of >= f->widest->n) {
    if (f->widest && !f->widest->depth && !f->widest->n)
      die("there is no \"%s\" here, but%s", f->widest->name,
          f->members.data + (f->members.bytes > 0));
    return 0;
  }
  row = &f->widest->value[f->of++];
  for (c = 0; c < f->columns; ++c)
    for (i = 0; i < f->column[c].n; ++i) {
      table_part *p = &f->column[c].part[i];
      int k = 0;
      for (; p->at < p->n; ++p->at) {
        const int *place = p->value[p->at].place;
        for (k = 0; k < p->depth && place[k] == row->place[k]; ++k) continue;
        if (k == p->depth || place[k] > row->place[k]) break;
      }
      if (p->at == p->n || k < p->depth)
        die("there is no \"%s\" here, but%s", p->name, f->members.data + (f->members.bytes > 0));
    }
  return 1;
}

/* ---- the table ---- */

static inline int next_row(table *f) {
  if (f->kind == TABLE_JSONL) {
    if (f->line && next_object_row(f)) return 1;
    while (read_object(f))
      if (next_object_row(f)) return 1;
    return 0;
  }
  if (f->waits) return !(f->waits = 0);
  do {
    if (!read_record(f)) return 0;
    if (is_empty_record(f) && (f->name.n > 1 || f->skip_empty) && only_blanks(f->at, f->end))
      return 0;
  } while (f->skip_empty && is_empty_record(f));
  if (f->fields > f->name.n) die("more than the %d columns of the first line", f->name.n);
  if (f->fields < f->name.n)
    die("%d column%s, expected %d", f->fields, f->fields == 1 ? "" : "s", f->name.n);
  return 1;
}

/* A copy without blanks at its ends, lasting. */
static inline char *trimmed(const char *s) {
  size_t n = strlen(s += strspn(s, " "));
  while (n && s[n - 1] == ' ') --n;
  return printed("%.*s", (int)n, s);
}

/* Opens a file ("-": standard input) of that kind and reads the names of its columns. 0: it is
   optional and not there. Until close_table sentences begin with file and line. */
static inline int open_table_of(table *f, const char *path, table_kind kind, int optional) {
  size_t bytes;
  int i;
  memset(f, 0, sizeof *f);
  f->path = strcmp(path, "-") ? path : "stdin";
  f->kind = kind;
  f->mark = kind == TABLE_CSV ? ',' : '\t';
  f->next_line = 1;
  if (!read_whole(f, path, optional)) return 0;
  bytes = (size_t)(f->end - f->data);
  check_magic(f->data, bytes);
  if (bytes > 1 && (!memcmp(f->data, "\xff\xfe", 2) || !memcmp(f->data, "\xfe\xff", 2))) {
    char *utf8 = from_utf16(f->data, &bytes);
    free(f->data);
    f->data = utf8;
    f->end = utf8 + bytes;
  }
  f->at = f->data;
  if (bytes > 2 && !memcmp(f->at, "\xef\xbb\xbf", 3)) f->at += 3; /* some editors put it there */
  check_utf8(f);
  if (kind == TABLE_JSONL) {
    if (only_blanks(f->at, f->end)) die("the file is empty; expected a JSON object a line");
    return 1;
  }
  if (kind == TABLE_CSV) { /* the one that comes first outside quotes */
    const char *s = f->at;
    int quoted = 0;
    for (; s < f->end && *s != '\n' && (quoted || (*s != ',' && *s != ';')); ++s)
      quoted ^= *s == '"';
    if (s < f->end && *s == ';') f->mark = ';';
  }
  if (f->at == f->end) die("the file is empty; its first line should name the columns");
  read_record(f);
  f->name.n = f->fields;
  f->name.at = (char **)lasting((size_t)f->fields, sizeof *f->name.at);
  for (i = 0; i < f->fields; ++i) f->name.at[i] = trimmed(f->field[i]);
  return 1;
}

/* By the ending of the name. */
static inline int open_table(table *f, const char *path, int optional) {
  table_kind kind =
      ends_with(path, ".csv") ? TABLE_CSV
      : ends_with(path, ".jsonl") || ends_with(path, ".json") || ends_with(path, ".ndjson")
          ? TABLE_JSONL
          : TABLE_TSV;
  return open_table_of(f, path, kind, optional);
}

static inline void close_table(table *f) {
  int c, i;
  for (c = 0; c < f->columns; ++c) {
    for (i = 0; i < f->column[c].n; ++i) free(f->column[c].part[i].value);
    free(f->column[c].joined.data);
  }
  free(f->members.data);
  free(f->data);
  free(f->field);
  read_from(NULL, 0);
}

/* The field of a name, or of "@N"; -1: there is none. */
static inline int find_field(table *f, const char *name) {
  int i, at = -1, number = *name == '@' && name[1] >= '0' && name[1] <= '9';
  if (!f->columns) f->nameless = f->waits = number;
  if (number != f->nameless)
    die("columns are called by their names or, in a file that does not name them, by numbers "
        "(@1), not both: \"%s\"",
        name);
  if (number) {
    at = whole("the number of a column", name + 1, 1, 1e6);
    if (at > f->name.n) read_from(f->path, 1), die("there is no column %d, but %d", at, f->name.n);
    return at - 1;
  }
  for (i = f->name.n; i-- > 0;) {
    if (strcmp(f->name.at[i], name)) continue;
    if (at >= 0) read_from(f->path, 1), die("two columns are called \"%s\"", name);
    at = i;
  }
  return at;
}

TOOLS_DIES static inline void die_of_column(const table *f, const char *name) {
  text names = {NULL, 0, 0};
  int i;
  for (i = 0; i < f->name.n && i < 40; ++i)
    put(&names, "%s %s", i ? "," : "", *f->name.at[i] ? f->name.at[i] : "\"\"");
  read_from(f->path, 1);
  if (f->kind == TABLE_TSV && f->name.n == 1 && strpbrk(f->name.at[0], ",;"))
    die("there is no tab in the first line; the name of a file with commas should end with .csv");
  die("there is no column \"%s\", but%s%s%s", name, names.data, f->name.n > 40 ? ", ..." : "",
      f->hint ? f->hint : "");
}

/* A column for `field`, before the first row; -1: there is none. */
static inline int column(table *f, const char *name, int must) {
  table_column *c = f->column;
  char *s, *next;
  int whole_name, members = 0;
  for (; c < f->column + f->columns; ++c)
    if (!strcmp(c->name, name)) return (int)(c - f->column);
  whole_name = f->kind != TABLE_JSONL && find_field(f, name) >= 0;
  if (f->columns == MOST_COLUMNS) die("more than %d columns are asked for", MOST_COLUMNS);
  memset(c, 0, sizeof *c);
  c->name = s = printed("%s", name);
  if (!whole_name) s = printed("%s", name); /* to be cut */
  for (; s; s = next) {
    table_part *p = &c->part[c->n];
    char *plus = whole_name ? NULL : strstr(s, " + "), *bar = whole_name ? NULL : strstr(s, " | ");
    next = plus && (!bar || plus < bar) ? plus : bar;
    if (next && c->n && c->choose != (next == bar)) die("\"%s\" has both + and |", name);
    if (next) c->choose = next == bar, *next = 0, next += 3;
    if (c->n++ == MOST_PARTS) die("\"%s\" has more than %d parts", name, MOST_PARTS);
    p->name = s;
    for (plus = s; (plus = strstr(plus, "[]")) != NULL; plus += 2) ++p->depth;
    for (plus = s; (plus = strchr(plus, '.')) != NULL; ++plus) ++members; /* as deep as the stack */
    if (members > MOST_MEMBERS) die("\"%.40s...\" has more than %d dots", name, MOST_MEMBERS);
    if (p->depth > MOST_DEPTH) die("\"%s\" has more than %d arrays", name, MOST_DEPTH);
    if (f->kind == TABLE_JSONL) continue;
    p->at = find_field(f, s);
    if (p->at < 0 && must) die_of_column(f, s);
    if (p->at < 0) return -1;
  }
  return f->columns++;
}

/* Choices of a column "A | B"; 1 of others. */
static inline int alternatives(const table *f, int column) {
  return f->column[column].choose ? f->column[column].n : 1;
}

static inline const char *part_of_row(const table *f, const table_part *p) {
  return f->kind == TABLE_JSONL ? p->value[p->at].at : f->field[p->at];
}

/* What the row has in a column, of alternatives number k. Until the next row. */
static inline const char *alternative(table *f, int column, int k) {
  table_column *c = &f->column[column];
  int i;
  if (c->n == 1 || c->choose) return part_of_row(f, &c->part[k]);
  c->joined.bytes = 0;
  for (i = 0; i < c->n; ++i) put(&c->joined, "%s%s", i ? " " : "", part_of_row(f, &c->part[i]));
  return c->joined.data;
}

static inline const char *field(table *f, int column) { return alternative(f, column, 0); }
#endif
