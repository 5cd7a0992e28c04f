/* tokenize.c - WordPiece ids of each line of the input
     cc -O2 -o tokenize examples/tools/tokenize.c -lm -pthread
     ./tokenize VOCAB [options] < lines
     ./tokenize --learn 4000 < texts > vocab.txt */
#define MOE_IMPLEMENTATION
#include "learn.h"
#include "tokenizer.h"

static struct {
  const char *vocab, *truncate;
  int cased, max_len, words, learn;
} opt;

static const option tokenize_options[] = {
    PLACE("VOCAB", opt.vocab,
          "WordPiece vocabulary, one word a line, or tokenizer.json; tokenizer_config.json and the "
          "like beside it are read"),
    FLAG("--cased", opt.cased, "keep capitals and accents"),
    WHOLE("--max-len", opt.max_len, 2, 2147483647, NULL, "at most N tokens a line [no limit]"),
    STRING("--truncate", "longest|right", opt.truncate, "longest", "how a pair is cut to that"),
    FLAG("--words", opt.words, "print words instead of ids"),
    WHOLE("--learn", opt.learn, 16, 1 << 24, NULL,
          "without VOCAB: print a vocabulary of at most N words that is learned from the lines"),
    END_OF_OPTIONS};
static const option *const all_options[] = {tokenize_options, NULL};

/* A token comes from one byte at least, so the length of a line bounds their number. */
static void tokenize(const moe_tokenizer *tokenizer, moe_tokens *out, const text *line,
                     const char *const *words) {
  const char *tab = (const char *)memchr(line->data, '\t', line->bytes);
  size_t room = line->bytes + 3;
  moe_truncate how = MOE_TRUNCATE_LONGEST;
  moe_text input;
  int i;

  if (opt.max_len && room > (size_t)opt.max_len) room = (size_t)opt.max_len;
  if (room > INT32_MAX) die("the line is too long");
  if ((size_t)out->capacity < room) {
    out->ids = (int32_t *)grow(out->ids, room, sizeof *out->ids);
    out->capacity = (int32_t)room;
  }
  input.a = line->data;
  input.a_bytes = tab ? (size_t)(tab - line->data) : line->bytes;
  input.b = tab ? tab + 1 : NULL;
  input.b_bytes = tab ? line->bytes - input.a_bytes - 1 : 0;
  moe_truncate_from_name(&how, opt.truncate);
  need(moe_encode(tokenizer, out, &input, (int32_t)room, how, &env));
  for (i = 0; i < out->count; ++i)
    if (opt.words)
      printf("%s%s", i ? " " : "", words[out->ids[i]]);
    else
      printf("%s%d", i ? " " : "", (int)out->ids[i]);
  printf("\n");
}

static void learn(void) {
  learner l;
  text line = {NULL, 0, 0}, vocab;
  begin_learning(&l, opt.cased);
  while (read_line(&line, 1)) learn_text(&l, line.data, line.bytes);
  if (!l.words.n) die("standard input has no words");
  vocab = learn_vocab(&l, opt.learn);
  fwrite(vocab.data, 1, vocab.bytes, stdout);
  free(vocab.data), free(line.data);
}

int main(int argc, char **argv) {
  moe_tokenizer *tokenizer;
  moe_tokens out;
  text line = {NULL, 0, 0};
  tokenizer_settings settings;
  text vocab;
  list words;
  int n;
  begin_program("tokenize", argc, argv);
  read_options("VOCAB [options] < lines\nPrints a line for each line: the ids of [CLS] a [SEP] or, "
               "with a tab in it, of [CLS] a [SEP] b [SEP]. For example:\n"
               "echo 'what a film' | ./tokenize vocab.txt --words\n"
               "./tokenize --learn 8000 < texts > vocab.txt",
               all_options);
  if (!opt.vocab == !opt.learn)
    die("usage: tokenize VOCAB [options] < lines, or tokenize --learn N < texts; --help lists the "
        "options");
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = log_sentence;
  if (opt.learn) {
    learn();
    return end_program(stderr);
  }
  settings = new_settings(opt.vocab);
  read_settings_beside(&settings, opt.vocab);
  vocab = read_vocabulary(&settings, opt.vocab);
  if (opt.cased) settings.lower = 0;
  read_from(opt.vocab, 0);
  need(moe_tokenizer_create(&tokenizer, vocab.data, vocab.bytes, text_flags(&settings), &env));
  words = split(vocab.data, '\n');
  for (n = 0; n < words.n; ++n)
    if (strstr(words.at[n], "\t+")) *strstr(words.at[n], "\t+") = 0;
  memset(&out, 0, sizeof out);
  for (n = 1; read_line(&line, 0) || (!fflush(stdout) && read_line(&line, 1)); ++n) {
    read_from("stdin", n);
    tokenize(tokenizer, &out, &line, (const char *const *)words.at);
    read_from(NULL, 0);
  }
  moe_tokenizer_free(tokenizer);
  free(vocab.data), free(out.ids), free(line.data);
  read_from(NULL, 0);
  return end_program(stderr);
}
