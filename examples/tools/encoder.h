/* encoder.h - the encoder that rows are tokenised for: its options, published weights with their
   config.json, and its tokenizer */
#ifndef TOOLS_ENCODER_H
#define TOOLS_ENCODER_H
#include "shards.h"
#include "tokenizer.h"

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
           "start from a published BERT-like encoder (safetensors, or the index.json of several); "
           "config.json beside it is read [from scratch]"),
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

/* The vocabulary and the settings beside the weights, or in --vocab. */
static inline void read_vocab(encoder *e, const char *path) {
  tokenizer_settings s = new_settings(path);
  text vocab;
  if (source.init) read_settings_beside(&s, source.init);
  vocab = read_vocabulary(&s, path);
  if (source.cased) s.lower = 0;
  e->vocab = vocab.data;
  e->vocab_bytes = vocab.bytes;
  e->config.cased = text_flags(&s);
}

/* ---- the encoder ---- */

static inline void import_encoder(encoder *e) {
  size_t bytes;
  char *json = file_beside(source.init, "config.json", &bytes);
  size_t n = strlen(source.init);
  if (!exists(source.init) && exists(printed("%s.index.json", source.init)))
    die("there is no %s, but %s.index.json, which names its parts: give that", source.init,
        source.init);
  if (n > 11 && !strcmp(source.init + n - 11, ".index.json")) {
    text whole = read_shards(source.init);
    e->file = whole.data;
    e->file_bytes = whole.bytes;
  } else
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
    path = beside(source.init, "tokenizer.json");
    if (!exists(path)) path = beside(source.init, "vocab.txt");
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
  if (learned) c->cased = source.cased;
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
