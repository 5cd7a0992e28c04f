/* tokenizer.h - tokenizers as they are published: vocab.txt or tokenizer.json, and beside weights
   tokenizer_config.json, special_tokens_map.json and added_tokens.json

     tokenizer_settings s = new_settings(path);
     read_settings_beside(&s, "folder/model.safetensors");
     vocab = read_vocabulary(&s, path);
     moe_tokenizer_create(&t, vocab.data, vocab.bytes, text_flags(&s), &env);

   They give the ids of transformers: case, accents, ideographs, and tokens that stay whole (added
   tokens), which become marked lines of the vocabulary (MOE_TEXT_ADDED). What moe.h's tokenizer
   does not do is refused by name. Reading JSON is moe.h's, which cli.h includes whole. */
#ifndef TOOLS_TOKENIZER_H
#define TOOLS_TOKENIZER_H
#include "cli.h"

/* The path of a file beside another. */
static inline char *beside(const char *file, const char *name) {
  return printed("%.*s%s", (int)(file_name(file) - file), file, name);
}

/* Its bytes; NULL: it is not there. */
static inline char *file_beside(const char *file, const char *name, size_t *bytes) {
  void *out;
  if (!exists(beside(file, name))) return NULL;
  need(moe_file_read(&out, bytes, beside(file, name), &env));
  return (char *)out;
}

enum { ADDED_MOST = 4096 }; /* added tokens: each is compared with those before it */

/* A token that stays whole. */
typedef struct added_token {
  char *content;
  int64_t id;                                           /* -1: not said */
  int lstrip, normalized, rstrip, special, single_word; /* normalized -1: not said */
  int found;                                            /* a word of the vocabulary */
} added_token;

/* What the files say; -1: nothing. */
typedef struct tokenizer_settings {
  const char *path; /* of the vocabulary */
  const char *from; /* the file of these settings, for sentences */
  char kind[64];    /* tokenizer_class */
  int lower, accents, ideographs;
  added_token *added;
  int n_added, room;
} tokenizer_settings;

static inline tokenizer_settings new_settings(const char *path) {
  tokenizer_settings s;
  memset(&s, 0, sizeof s);
  s.path = s.from = path;
  s.lower = s.accents = s.ideographs = -1;
  return s;
}

/* ---- values of JSON ---- */

/* true or false into *out; null: nothing is said. */
static inline void read_flag(moe__json *j, int *out) {
  int kind = moe__json_kind(j);
  if (kind == 't' || kind == 'f') *out = kind == 't';
  moe__json_skip(j);
}

/* The same for a setting that another file may have said already. */
static inline void read_setting(moe__json *j, const tokenizer_settings *s, const char *name,
                                int *out) {
  int said = *out;
  read_flag(j, out);
  if (said >= 0 && said != *out)
    die("%s is %s, but %s in %s: are these two files of one tokenizer?", name,
        *out ? "true" : "false", said ? "true" : "false", s->from);
}

/* A string, cut to n bytes with its zero; other values are skipped. */
static inline void read_word(moe__json *j, char *out, size_t n) {
  moe__json_text s;
  if (moe__json_kind(j) != '"')
    moe__json_skip(j);
  else if (moe__json_string(j, &s))
    moe__json_copy(out, n, &s);
}

/* The next member of an object; 0: its end. */
static inline int next_member(moe__json *j, char *name, size_t n) {
  moe__json_text key;
  if (!moe__json_more(j, '}') || !moe__json_key(j, &key)) return 0;
  moe__json_copy(name, n, &key);
  return 1;
}

static inline void check_json(const moe__json *j, const char *begin) {
  if (j->error) die("byte %lld: %s", (long long)(j->at - begin) + 1, j->error);
}

/* ---- added tokens ---- */

/* Notes a token. One that was noted before stays as it is, but for what was not said then. */
static inline void note_added(tokenizer_settings *s, const added_token *token) {
  added_token *t;
  int i = 0;
  if (!*token->content || strchr(token->content, '\n'))
    die("the added token \"%s\" is not a line", token->content);
  while (i < s->n_added && strcmp(s->added[i].content, token->content)) ++i;
  if (i < s->n_added) {
    if (s->added[i].id < 0) s->added[i].id = token->id;
    return;
  }
  if (s->n_added == ADDED_MOST) die("more than %d added tokens", ADDED_MOST);
  if (s->n_added == s->room)
    s->added =
        (added_token *)grow(s->added, (size_t)(s->room = 2 * s->room + 64), sizeof *s->added);
  t = s->added + s->n_added++;
  *t = *token;
  if (t->normalized < 0) t->normalized = !t->special;
}

/* A string with all of its bytes, lasting. */
static inline char *read_content(moe__json *j) {
  moe__json_text s;
  char *out;
  size_t n;
  if (!moe__json_string(j, &s)) return NULL;
  if (moe__json_has_zero(&s)) die("a zero byte in a token");
  n = moe__json_copy(NULL, 0, &s) + 1;
  out = (char *)lasting(n, 1);
  moe__json_copy(out, n, &s);
  return out;
}

/* A token: a string, or an object with its settings. Its content is NULL where there is none. */
static inline added_token read_added(moe__json *j, int64_t id, int special) {
  added_token t = {NULL, -1, 0, -1, 0, 0, 0, 0};
  char name[64];
  t.id = id;
  t.special = special;
  if (moe__json_kind(j) == '"')
    t.content = read_content(j);
  else if (moe__json_kind(j) != '{')
    moe__json_skip(j);
  else {
    moe__json_enter(j, '{');
    while (next_member(j, name, sizeof name))
      if (!strcmp(name, "content"))
        t.content = read_content(j);
      else if (!strcmp(name, "id"))
        moe__json_integer(j, 0, 1 << 24, &t.id);
      else if (!strcmp(name, "lstrip"))
        read_flag(j, &t.lstrip);
      else if (!strcmp(name, "normalized"))
        read_flag(j, &t.normalized);
      else if (!strcmp(name, "rstrip"))
        read_flag(j, &t.rstrip);
      else if (!strcmp(name, "special"))
        read_flag(j, &t.special);
      else if (!strcmp(name, "single_word"))
        read_flag(j, &t.single_word);
      else
        moe__json_skip(j);
  }
  return t;
}

/* A list, or an object with names that do not matter (number 0) or are ids (number 1). */
static inline void read_added_list(tokenizer_settings *s, moe__json *j, int number, int special) {
  char name[512];
  int kind = moe__json_kind(j);
  if (kind != '[' && kind != '{') {
    moe__json_skip(j);
    return;
  }
  moe__json_enter(j, kind);
  while (kind == '[' ? moe__json_more(j, ']') : next_member(j, name, sizeof name)) {
    added_token t = read_added(j, number ? (int64_t)atoll(name) : -1, special);
    if (t.content && !j->error) note_added(s, &t);
  }
}

/* The names of the special tokens are those of BERT. */
static inline int read_special(tokenizer_settings *s, moe__json *j, const char *member) {
  static const char *const usual[][2] = {{"unk_token", "[UNK]"},
                                         {"sep_token", "[SEP]"},
                                         {"pad_token", "[PAD]"},
                                         {"cls_token", "[CLS]"},
                                         {"mask_token", "[MASK]"}};
  added_token t;
  int i;
  for (i = 0; i < 5 && strcmp(usual[i][0], member); ++i) continue;
  if (i == 5) return 0;
  t = read_added(j, -1, 1);
  t.special = 1;
  if (!t.content || j->error) return 1;
  if (strcmp(t.content, usual[i][1]))
    die("%s is \"%s\", expected %s", member, t.content, usual[i][1]);
  note_added(s, &t);
  return 1;
}

/* ---- the files beside weights ---- */

/* tokenizer_config.json, special_tokens_map.json. */
static inline void read_tokenizer_config(tokenizer_settings *s, const char *json, size_t bytes) {
  char name[256];
  moe__json j;
  moe__json_init(&j, json, bytes, 0);
  moe__json_enter(&j, '{');
  while (next_member(&j, name, sizeof name)) {
    if (!strcmp(name, "do_lower_case"))
      read_setting(&j, s, name, &s->lower);
    else if (!strcmp(name, "strip_accents"))
      read_setting(&j, s, name, &s->accents);
    else if (!strcmp(name, "tokenize_chinese_chars"))
      read_setting(&j, s, name, &s->ideographs);
    else if (!strcmp(name, "tokenizer_class"))
      read_word(&j, s->kind, sizeof s->kind);
    else if (!strcmp(name, "added_tokens_decoder"))
      read_added_list(s, &j, 1, 0);
    else if (!strcmp(name, "additional_special_tokens") || !strcmp(name, "extra_special_tokens"))
      read_added_list(s, &j, 0, 1);
    else if (!read_special(s, &j, name))
      moe__json_skip(&j);
  }
  moe__json_finish(&j);
  check_json(&j, json);
}

/* added_tokens.json: {"token": id}. */
static inline void read_added_tokens(tokenizer_settings *s, const char *json, size_t bytes) {
  char name[512];
  moe__json j;
  moe__json_init(&j, json, bytes, 0);
  moe__json_enter(&j, '{');
  while (next_member(&j, name, sizeof name)) {
    added_token t = {NULL, -1, 0, -1, 0, 0, 0, 0};
    t.content = printed("%s", name);
    if (moe__json_integer(&j, 0, 1 << 24, &t.id)) note_added(s, &t);
  }
  moe__json_finish(&j);
  check_json(&j, json);
}

/* What the files beside `file` say. */
static inline void read_settings_beside(tokenizer_settings *s, const char *file) {
  static const char *const names[] = {"tokenizer_config.json", "special_tokens_map.json",
                                      "added_tokens.json"};
  size_t bytes;
  int i;
  for (i = 0; i < 3; ++i) {
    char *json = file_beside(file, names[i], &bytes);
    if (!json) continue;
    read_from(beside(file, names[i]), 0);
    if (i < 2)
      read_tokenizer_config(s, json, bytes);
    else
      read_added_tokens(s, json, bytes);
    if (!i) s->from = reading.file;
    moe_free(json);
    read_from(NULL, 0);
  }
}

/* ---- tokenizer.json ---- */

/* Its vocabulary: words by their numbers. */
typedef struct word_list {
  char **word;
  int64_t n, room;
} word_list;

static inline void put_word(word_list *w, int64_t id, const char *word) {
  if (strchr(word, '\n') || !*word) die("word %lld of the vocabulary is not a line", (long long)id);
  while (w->room <= id) {
    int64_t more = 2 * w->room + 1024;
    w->word = (char **)grow(w->word, (size_t)more, sizeof *w->word);
    memset(w->word + w->room, 0, (size_t)(more - w->room) * sizeof *w->word);
    w->room = more;
  }
  if (id >= w->n) w->n = id + 1;
  if (!w->word[id]) w->word[id] = printed("%s", word);
}

/* The member "model"; numbers of words are below `most`. */
static inline void read_word_piece(moe__json *j, word_list *words, int64_t most) {
  char name[512], kind[64] = "WordPiece", prefix[16] = "##", unknown[64] = "[UNK]";
  int64_t id, longest = 100;
  moe__json_enter(j, '{');
  while (next_member(j, name, sizeof name))
    if (!strcmp(name, "type"))
      read_word(j, kind, sizeof kind);
    else if (!strcmp(name, "continuing_subword_prefix"))
      read_word(j, prefix, sizeof prefix);
    else if (!strcmp(name, "unk_token"))
      read_word(j, unknown, sizeof unknown);
    else if (!strcmp(name, "max_input_chars_per_word"))
      moe__json_integer(j, 0, INT64_MAX, &longest);
    else if (!strcmp(name, "vocab") && moe__json_kind(j) == '{' && moe__json_enter(j, '{'))
      while (next_member(j, name, sizeof name) && moe__json_integer(j, 0, most, &id))
        put_word(words, id, name);
    else
      moe__json_skip(j);
  if (strcmp(kind, "WordPiece")) die("the tokenizer is of kind %s, expected WordPiece", kind);
  if (strcmp(prefix, "##") || strcmp(unknown, "[UNK]"))
    die("a WordPiece with \"%s\" and \"%s\", expected ## and [UNK]", prefix, unknown);
  if (longest != 100) die("max_input_chars_per_word is %lld, expected 100", (long long)longest);
}

/* The members "normalizer" and "pre_tokenizer": those of BERT. */
static inline void read_part(moe__json *j, tokenizer_settings *s, const char *part,
                             const char *expected) {
  char name[64], kind[64] = "";
  int clean = 1;
  if (moe__json_kind(j) != '{') die("there is no %s", expected);
  moe__json_enter(j, '{');
  while (next_member(j, name, sizeof name))
    if (!strcmp(name, "lowercase"))
      read_setting(j, s, "do_lower_case (lowercase)", &s->lower);
    else if (!strcmp(name, "strip_accents"))
      read_setting(j, s, name, &s->accents);
    else if (!strcmp(name, "handle_chinese_chars"))
      read_setting(j, s, "tokenize_chinese_chars (handle_chinese_chars)", &s->ideographs);
    else if (!strcmp(name, "clean_text"))
      read_flag(j, &clean);
    else if (!strcmp(name, "type"))
      read_word(j, kind, sizeof kind);
    else
      moe__json_skip(j);
  if (strcmp(kind, expected)) die("the %s is %s, expected %s", part, kind, expected);
  if (!clean) die("clean_text is false: moe.h always drops control characters");
}

/* Its settings, and its vocabulary as the lines of a vocab.txt. */
static inline text read_tokenizer_json(tokenizer_settings *s, const char *json, size_t bytes) {
  word_list words = {NULL, 0, 0};
  text out = {NULL, 0, 0};
  char name[64];
  int64_t id;
  moe__json j;
  moe__json_init(&j, json, bytes, 0);
  moe__json_enter(&j, '{');
  while (next_member(&j, name, sizeof name))
    if (!strcmp(name, "model"))
      read_word_piece(&j, &words, bytes < 1 << 24 ? (int64_t)bytes : 1 << 24);
    else if (!strcmp(name, "normalizer"))
      read_part(&j, s, name, "BertNormalizer");
    else if (!strcmp(name, "pre_tokenizer"))
      read_part(&j, s, name, "BertPreTokenizer");
    else if (!strcmp(name, "added_tokens"))
      read_added_list(s, &j, 0, 0);
    else
      moe__json_skip(&j);
  moe__json_finish(&j);
  check_json(&j, json);
  for (id = 0; id < words.n; ++id) /* a number that no word has matches nothing */
    if (words.word[id])
      put(&out, "%s\n", words.word[id]);
    else
      put(&out, "[gap %lld]\n", (long long)id);
  if (!words.n) die("there is no vocabulary");
  free(words.word);
  return out;
}

/* ---- vocabulary and added tokens together ---- */

static inline int is_usual_token(const added_token *t) {
  static const char *const usual[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
  int i;
  for (i = 0; i < 5 && strcmp(t->content, usual[i]); ++i) continue;
  return i < 5;
}

/* Those without a number come last. */
static inline int by_id(const void *a, const void *b) {
  uint64_t x = (uint64_t)((const added_token *)a)->id, y = (uint64_t)((const added_token *)b)->id;
  return x < y ? -1 : x > y;
}

/* A line and its number. */
typedef struct numbered_line {
  const char *line;
  int number;
} numbered_line;

static inline int by_line(const void *a, const void *b) {
  const numbered_line *x = (const numbered_line *)a, *y = (const numbered_line *)b;
  int c = strcmp(x->line, y->line);
  return c ? c : x->number < y->number ? -1 : x->number > y->number;
}

/* The number of a line, of equal ones the last; -1: there is none. */
static inline int find_line(const numbered_line *sorted, int n, const char *line) {
  int low = 0, high = n;
  while (low < high) { /* the first that is behind it */
    int middle = low + (high - low) / 2;
    if (strcmp(sorted[middle].line, line) > 0)
      high = middle;
    else
      low = middle + 1;
  }
  return low && !strcmp(sorted[low - 1].line, line) ? sorted[low - 1].number : -1;
}

/* Gives each token its number: that of its line, or the next one. */
static inline void number_added(tokenizer_settings *s, const list *line) {
  numbered_line *sorted = (numbered_line *)take((size_t)line->n + 1, sizeof *sorted);
  int64_t next = line->n;
  int i, k;
  for (i = 0; i < line->n; ++i) sorted[i].line = line->at[i], sorted[i].number = i;
  qsort(sorted, (size_t)line->n, sizeof *sorted, by_line);
  if (s->n_added) qsort(s->added, (size_t)s->n_added, sizeof *s->added, by_id);
  for (i = 0; i < s->n_added; ++i) {
    added_token *t = &s->added[i];
    k = find_line(sorted, line->n, t->content);
    t->found = k >= 0;
    if (t->found && (t->id < 0 || t->id == k))
      t->id = k;
    else if (!t->found && (t->id < 0 || t->id == next))
      t->id = next++;
    else if (t->id < line->n)
      die("the added token \"%s\" has number %lld, but word %lld of %s is \"%s\"", t->content,
          (long long)t->id, (long long)t->id, s->path, line->at[t->id]);
    else
      die("the added token \"%s\" has number %lld, but the next one is %lld", t->content,
          (long long)t->id, (long long)(t->found ? k : next));
  }
  free(sorted);
}

static inline int needs_marks(const added_token *t) {
  return !is_usual_token(t) || t->normalized || t->single_word;
}

/* A line for a token, with its marks (moe_text_flags). */
static inline void put_added(text *to, const added_token *t) {
  put(to, "%s", t->content);
  if (needs_marks(t))
    put(to, "\t+%s%s%s%s%s%s", t->lstrip ? "l" : "", t->normalized ? "n" : "",
        t->single_word ? "o" : "", t->rstrip ? "r" : "", t->special ? "s" : "",
        t->found ? "w" : "");
  put(to, "\n");
}

/* 1: some token is more than those that every vocabulary has. */
static inline int has_marks(const tokenizer_settings *s) {
  int i;
  for (i = 0; i < s->n_added; ++i)
    if (needs_marks(&s->added[i])) return 1;
  return 0;
}

/* Marks the added tokens in the vocabulary. */
static inline void mark_added(tokenizer_settings *s, text *vocab) {
  list line;
  text out = {NULL, 0, 0};
  int64_t i, more = 0;
  int k;
  if (strlen(vocab->data) != vocab->bytes) die("a zero byte in the vocabulary");
  line = split(vocab->data, '\n');
  if (!*line.at[line.n - 1]) --line.n;
  for (k = 0; k < line.n; ++k) {
    size_t n = strlen(line.at[k]);
    while (n && strchr(" \r\t", line.at[k][n - 1])) line.at[k][--n] = 0;
    if (strstr(line.at[k], "\t+")) die("word %d has a tab, as only added tokens may", k);
  }
  number_added(s, &line);
  qsort(s->added, (size_t)s->n_added, sizeof *s->added, by_id);
  for (k = 0; k < s->n_added; ++k) more += !s->added[k].found;
  if (!more && !has_marks(s)) return;
  for (i = k = 0; i < line.n || k < s->n_added; ++i)
    if (k < s->n_added && s->added[k].id == i)
      put_added(&out, &s->added[k++]);
    else
      put(&out, "%s\n", line.at[i]);
  free(vocab->data);
  *vocab = out;
}

/* Refuses what moe.h's tokenizer does not do, rather than cut texts otherwise than in training. */
static inline void check_kind(const tokenizer_settings *s, int is_word_piece) {
  static const char *const known[] = {"Bert",     "DistilBert",         "MobileBert",
                                      "Electra",  "DPRQuestionEncoder", "DPRContextEncoder",
                                      "Splinter", "DPRReader"};
  int i;
  for (i = 0; i < 8; ++i)
    if (!strcmp(s->kind, printed("%sTokenizer", known[i])) ||
        !strcmp(s->kind, printed("%sTokenizerFast", known[i])))
      break;
  read_from(s->from, 0);
  if (*s->kind && i == 8 && !is_word_piece)
    die("tokenizer_class is %s, expected BertTokenizer or one that does the same; if there is a "
        "tokenizer.json of kind WordPiece, give it as --vocab",
        s->kind);
  read_from(NULL, 0);
}

/* The vocabulary in the bytes of a vocab.txt or, piece 1, tokenizer.json, with the added tokens of
   both it and `s`. */
static inline text make_vocabulary(tokenizer_settings *s, const char *file, size_t bytes,
                                   int piece) {
  text out = {NULL, 0, 0};
  read_from(s->path, 0);
  if (piece)
    out = read_tokenizer_json(s, file, bytes);
  else
    put_bytes(&out, file, bytes);
  check_kind(s, piece);
  read_from(s->path, 0);
  if (s->n_added) mark_added(s, &out);
  read_from(NULL, 0);
  return out;
}

/* The same of a file. */
static inline text read_vocabulary(tokenizer_settings *s, const char *path) {
  size_t bytes, n = strlen(path);
  void *file;
  text out;
  need(moe_file_read(&file, &bytes, path, &env));
  out = make_vocabulary(s, (char *)file, bytes, n > 5 && !strcmp(path + n - 5, ".json"));
  moe_free(file);
  return out;
}

/* The settings as moe_config.cased and moe_tokenizer_create take them. */
static inline int text_flags(const tokenizer_settings *s) {
  int lower = s->lower != 0, flags = lower ? 0 : MOE_TEXT_CASED;
  if (s->accents >= 0 && s->accents != lower) flags |= MOE_TEXT_ACCENTS;
  if (!s->ideographs) flags |= MOE_TEXT_WHOLE_IDEOGRAPHS;
  return has_marks(s) ? flags | MOE_TEXT_ADDED : flags;
}
#endif
