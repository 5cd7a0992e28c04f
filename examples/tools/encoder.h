/* encoder.h - the encoder that rows are tokenised for: its options, published weights with their
   config.json, published tokenizers (vocab.txt, tokenizer_config.json, tokenizer.json). Reading
   JSON is moe.h's, which cli.h includes whole. */
#ifndef TOOLS_ENCODER_H
#define TOOLS_ENCODER_H
#include "cli.h"

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
    STRING("--vocab", "FILE", source.vocab, NULL,
           "its WordPiece vocabulary, or tokenizer.json [beside --init, else vocab.txt of --data]"),
    FLAG("--cased", source.cased, "do not lower-case the text [tokenizer_config.json decides]"),
    WHOLE("--heads", source.heads, 1, 1024, NULL, "attention heads without config.json [4]"),
    REAL("--eps", "E", source.eps, 1e-30, 1, NULL, "LayerNorm epsilon, likewise [1e-12]"),
    END_OF_OPTIONS};

static inline void make_tokenizer(encoder *e, const char *path) {
  read_from(path, 0);
  need(moe_tokenizer_create(&e->tokenizer, e->vocab, e->vocab_bytes, e->config.cased, &env));
  read_from(NULL, 0);
}

/* The path of a file beside --init. */
static inline char *beside(const char *name) {
  return printed("%.*s%s", (int)(file_name(source.init) - source.init), source.init, name);
}

/* Its bytes; NULL: it is not there. */
static inline char *file_beside(const char *name, size_t *bytes) {
  void *file;
  if (!exists(beside(name))) return NULL;
  need(moe_file_read(&file, bytes, beside(name), &env));
  return (char *)file;
}

/* ---- tokenizers as they are published ---- */

/* What their files say; -1: nothing. */
typedef struct tokenizer_settings {
  const char *from; /* the file, for sentences */
  char kind[64];    /* tokenizer_class */
  int lower, accents, ideographs;
} tokenizer_settings;

/* true or false into *out; null: nothing is said. */
static inline void read_flag(moe__json *j, int *out) {
  int kind = moe__json_kind(j);
  if (kind == 't' || kind == 'f') *out = kind == 't';
  moe__json_skip(j);
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

/* A token that stays whole in a text, beyond those that BERT has. */
static inline void note_added_token(const char *content) {
  static const char *const usual[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
  int i;
  for (i = 0; i < 5 && strcmp(content, usual[i]); ++i) continue;
  if (i == 5 && strncmp(content, "[unused", 7))
    say(printed("the added token \"%s\" is cut like any other text here", content));
}

/* tokenizer_config.json. */
static inline void read_tokenizer_config(tokenizer_settings *to, const char *json, size_t bytes) {
  char name[256], inner[64], content[256];
  moe__json j;
  moe__json_init(&j, json, bytes, 0);
  moe__json_enter(&j, '{');
  while (next_member(&j, name, sizeof name)) {
    if (!strcmp(name, "do_lower_case"))
      read_flag(&j, &to->lower);
    else if (!strcmp(name, "strip_accents"))
      read_flag(&j, &to->accents);
    else if (!strcmp(name, "tokenize_chinese_chars"))
      read_flag(&j, &to->ideographs);
    else if (!strcmp(name, "tokenizer_class"))
      read_word(&j, to->kind, sizeof to->kind);
    else if (!strcmp(name, "added_tokens_decoder") && moe__json_enter(&j, '{'))
      while (next_member(&j, name, sizeof name) && moe__json_enter(&j, '{'))
        while (next_member(&j, inner, sizeof inner))
          if (strcmp(inner, "content"))
            moe__json_skip(&j);
          else
            read_word(&j, content, sizeof content), note_added_token(content);
    else
      moe__json_skip(&j);
  }
  moe__json_finish(&j);
  check_json(&j, json);
}

/* The vocabulary of tokenizer.json: words by their numbers. */
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

/* The member "model" of tokenizer.json. */
static inline void read_word_piece(moe__json *j, word_list *words) {
  char name[512], kind[64] = "WordPiece", prefix[16] = "##", unknown[64] = "[UNK]";
  int64_t id;
  moe__json_enter(j, '{');
  while (next_member(j, name, sizeof name))
    if (!strcmp(name, "type"))
      read_word(j, kind, sizeof kind);
    else if (!strcmp(name, "continuing_subword_prefix"))
      read_word(j, prefix, sizeof prefix);
    else if (!strcmp(name, "unk_token"))
      read_word(j, unknown, sizeof unknown);
    else if (!strcmp(name, "vocab") && moe__json_kind(j) == '{' && moe__json_enter(j, '{'))
      while (next_member(j, name, sizeof name) && moe__json_integer(j, 0, 1 << 24, &id))
        put_word(words, id, name);
    else
      moe__json_skip(j);
  if (strcmp(kind, "WordPiece")) die("the tokenizer is of kind %s, expected WordPiece", kind);
  if (strcmp(prefix, "##") || strcmp(unknown, "[UNK]"))
    die("a WordPiece with \"%s\" and \"%s\", expected ## and [UNK]", prefix, unknown);
}

static inline void read_normalizer(moe__json *j, tokenizer_settings *to) {
  char name[64], kind[64] = "";
  if (moe__json_kind(j) != '{') die("there is no BertNormalizer");
  moe__json_enter(j, '{');
  while (next_member(j, name, sizeof name))
    if (!strcmp(name, "lowercase"))
      read_flag(j, &to->lower);
    else if (!strcmp(name, "strip_accents"))
      read_flag(j, &to->accents);
    else if (!strcmp(name, "handle_chinese_chars"))
      read_flag(j, &to->ideographs);
    else if (!strcmp(name, "type"))
      read_word(j, kind, sizeof kind);
    else
      moe__json_skip(j);
  if (strcmp(kind, "BertNormalizer")) die("the normalizer is %s, expected BertNormalizer", kind);
}

/* tokenizer.json: its settings, and its vocabulary as the lines of a vocab.txt. */
static inline char *read_tokenizer_json(tokenizer_settings *to, const char *json, size_t bytes,
                                        size_t *out_bytes) {
  word_list words = {NULL, 0, 0};
  text out = {NULL, 0, 0};
  char name[64], content[512] = "";
  int64_t id = -1;
  moe__json j;
  moe__json_init(&j, json, bytes, 0);
  moe__json_enter(&j, '{');
  while (next_member(&j, name, sizeof name))
    if (!strcmp(name, "model"))
      read_word_piece(&j, &words);
    else if (!strcmp(name, "normalizer"))
      read_normalizer(&j, to);
    else if (!strcmp(name, "added_tokens") && moe__json_enter(&j, '['))
      while (moe__json_more(&j, ']') && moe__json_enter(&j, '{')) {
        while (next_member(&j, name, sizeof name))
          if (!strcmp(name, "id"))
            moe__json_integer(&j, 0, 1 << 24, &id);
          else if (!strcmp(name, "content"))
            read_word(&j, content, sizeof content);
          else
            moe__json_skip(&j);
        if (id >= 0) put_word(&words, id, content), note_added_token(content);
      }
    else
      moe__json_skip(&j);
  moe__json_finish(&j);
  check_json(&j, json);
  for (id = 0; id < words.n; ++id) /* a number that no word has matches nothing */
    put(&out, "%s\n", words.word[id] ? words.word[id] : printed("[gap %lld]", (long long)id));
  if (!words.n) die("there is no vocabulary");
  free(words.word);
  *out_bytes = out.bytes;
  return out.data;
}

/* Refuses what moe.h's tokenizer does not do, rather than cut texts otherwise than in training. */
static inline void check_settings(const tokenizer_settings *s, int is_word_piece) {
  static const char *const known[] = {"Bert",     "DistilBert",         "MobileBert",
                                      "Electra",  "DPRQuestionEncoder", "DPRContextEncoder",
                                      "Splinter", "DPRReader"};
  int i;
  read_from(s->from, 0);
  for (i = 0; i < 8; ++i)
    if (!strcmp(s->kind, printed("%sTokenizer", known[i])) ||
        !strcmp(s->kind, printed("%sTokenizerFast", known[i])))
      break;
  if (*s->kind && i == 8 && !is_word_piece)
    die("tokenizer_class is %s, expected BertTokenizer or one that does the same; if there is a "
        "tokenizer.json of kind WordPiece, give it as --vocab",
        s->kind);
  if (s->lower >= 0 && s->accents >= 0 && s->lower != s->accents)
    die("strip_accents is %s where text is %slower-cased: moe.h does both or neither",
        s->accents ? "true" : "false", s->lower ? "" : "not ");
  if (s->ideographs == 0)
    die("tokenize_chinese_chars is false: moe.h always puts blanks around ideographs");
  read_from(NULL, 0);
}

/* The vocabulary and the settings beside the weights, or in --vocab. */
static inline void read_vocab(encoder *e, const char *path) {
  tokenizer_settings s = {NULL, "", -1, -1, -1};
  size_t bytes, n = strlen(path);
  int piece = n > 5 && !strcmp(path + n - 5, ".json");
  char *json = source.init ? file_beside("tokenizer_config.json", &bytes) : NULL;
  void *file;
  s.from = json ? beside("tokenizer_config.json") : path;
  read_from(s.from, 0);
  if (json) read_tokenizer_config(&s, json, bytes);
  moe_free(json);
  read_from(NULL, 0);
  need(moe_file_read(&file, &e->vocab_bytes, path, &env));
  read_from(path, 0);
  e->vocab = (char *)file;
  if (piece) {
    e->vocab = read_tokenizer_json(&s, (char *)file, e->vocab_bytes, &e->vocab_bytes);
    moe_free(file);
  }
  read_from(NULL, 0);
  check_settings(&s, piece);
  if (s.lower >= 0) e->config.cased = !s.lower;
}

/* ---- the encoder ---- */

static inline void import_encoder(encoder *e) {
  size_t bytes;
  char *json = file_beside("config.json", &bytes);
  need(moe_file_read(&e->file, &e->file_bytes, source.init, &env));
  read_from(source.init, 0);
  if (json)
    need(moe_import_encoder(&e->config, e->file, e->file_bytes, json, bytes, &env));
  else
    need(moe_import_sizes(&e->config, e->file, e->file_bytes, &env));
  if (!json && !source.heads)
    die("there is no config.json beside it: give --heads (and --eps, 1e-12 in BERT)");
  read_from(NULL, 0);
  moe_free(json);
}

static inline void set_max_len(moe_config *c) {
  if (source.max_len > c->positions)
    die("--max-len %d is more than the %d positions of the encoder", source.max_len, c->positions);
  if (source.max_len) c->max_len = source.max_len;
}

/* The encoder of the options and its tokenizer; the vocabulary is `learned`, or may be in `folder`.
   */
static inline void open_encoder(encoder *e, const char *folder, const text *learned) {
  const char *path = source.vocab ? source.vocab : printed("%s/vocab.txt", folder);
  moe_config *c = &e->config;
  if (source.init && !source.vocab) {
    path = exists(beside("vocab.txt")) ? beside("vocab.txt") : beside("tokenizer.json");
    if (!exists(path))
      die("--init needs --vocab, the vocabulary that the encoder was trained with: there is no "
          "vocab.txt and no tokenizer.json beside it");
  }
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
  if (learned) {
    e->vocab = learned->data;
    e->vocab_bytes = learned->bytes;
    path = "the learned vocabulary";
  } else
    read_vocab(e, path);
  if (source.heads) c->heads = source.heads;
  if (source.eps > 0) c->eps = (float)source.eps;
  if (source.cased) c->cased = 1;
  c->max_len = c->positions < 128 ? c->positions : 128;
  set_max_len(c);
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
#endif
