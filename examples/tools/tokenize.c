/* tokenize.c - BERT's WordPiece ids of each line of the input, with nothing but moe.h.

     cc -O2 -o tokenize examples/tools/tokenize.c -lm -pthread
     ./tokenize VOCAB [--cased] [--max-len N] [--truncate longest|right] [--words] < lines

   Prints a line for each line: the ids of [CLS] a [SEP], or, where a TAB stands in the line, of
   [CLS] a [SEP] b [SEP]. Exit status 1 and a sentence when something is wrong. */
#define MOE_IMPLEMENTATION
#include "../../moe.h"

static void complain(void *user, moe_status status, const char *sentence) {
  (void)user;
  (void)status;
  fprintf(stderr, "tokenize: %s\n", sentence);
}

static int fail(const char *sentence, const char *detail) {
  fprintf(stderr, "tokenize: %s%s\n", sentence, detail);
  return 1;
}

static int usage(FILE *to) {
  fprintf(to, "usage: tokenize VOCAB [options] < lines\n"
              "  VOCAB                     WordPiece vocabulary, one word a line\n"
              "  --cased                   keep capitals and accents\n"
              "  --max-len N               at most N tokens a line           (no limit)\n"
              "  --truncate longest|right  how a pair is cut to N            (longest)\n"
              "  --words                   print words instead of ids\n"
              "A TAB in a line makes a pair of texts.\n");
  return to == stderr;
}

/* A whole line of any length, without its line feed; zero bytes may stand in it. 1, or 0 at the end
   of the input, or -1. */
static int read_line(char **line, size_t *bytes, size_t *capacity) {
  int c;
  *bytes = 0;
  while ((c = getchar()) != EOF) {
    if (c == '\n') return 1;
    if (*bytes == *capacity) {
      size_t wanted = 2 * *capacity + 256;
      char *more = (char *)realloc(*line, wanted);
      if (!more) return -1;
      *line = more;
      *capacity = wanted;
    }
    (*line)[(*bytes)++] = (char)c;
  }
  return *bytes > 0;
}

/* The lines of the vocabulary, to print words: where each begins, and one more for the end. */
static size_t *line_starts(const char *text, size_t bytes, int32_t lines) {
  size_t *start = (size_t *)malloc(((size_t)lines + 1) * sizeof *start), i;
  int32_t n = 0;
  if (!start) return NULL;
  start[n++] = 0;
  for (i = 0; i < bytes && n < lines; ++i)
    if (text[i] == '\n') start[n++] = i + 1;
  start[lines] = bytes + (bytes && text[bytes - 1] != '\n');
  return start;
}

static void print_tokens(const moe_tokens *tokens, const char *vocab, const size_t *start) {
  int32_t i;
  for (i = 0; i < tokens->count; ++i) {
    const char *blank = i ? " " : "";
    int32_t id = tokens->ids[i];
    if (!start)
      printf("%s%ld", blank, (long)id);
    else
      printf("%s%.*s", blank, (int)(start[id + 1] - 1 - start[id]), vocab + start[id]);
  }
  printf("\n");
}

/* Tokenizes the standard input. A token comes from one byte at least, so the length of a line
   bounds their number. */
static int run(const moe_tokenizer *tokenizer, long max_len, moe_truncate how, const char *vocab,
               const size_t *start, const moe_env *env) {
  char *line = NULL, *tab;
  size_t bytes = 0, capacity = 0;
  long number = 0;
  int more, failed = 0;
  moe_status status;
  moe_text text;
  moe_tokens out;
  memset(&out, 0, sizeof out);
  while (!failed && (more = read_line(&line, &bytes, &capacity)) > 0) {
    size_t most = max_len && (size_t)max_len < bytes + 3 ? (size_t)max_len : bytes + 3;
    ++number;
    if (most > INT32_MAX) failed = fail("a line is too long", "");
    if (!failed && (size_t)out.capacity < most) {
      free(out.ids);
      out.ids = (int32_t *)malloc(most * sizeof *out.ids);
      out.capacity = (int32_t)most;
      if (!out.ids) failed = fail("out of memory", "");
    }
    if (failed) break;
    tab = bytes ? (char *)memchr(line, '\t', bytes) : NULL;
    text.a = line;
    text.a_bytes = tab ? (size_t)(tab - line) : bytes;
    text.b = tab ? tab + 1 : NULL;
    text.b_bytes = tab ? (size_t)(line + bytes - tab - 1) : 0;
    status = moe_encode(tokenizer, &out, &text, (int32_t)most, how, env);
    if (status)
      failed = fprintf(stderr, "tokenize: line %ld could not be tokenized\n", number) != 0;
    else
      print_tokens(&out, vocab, start);
  }
  if (!failed && more < 0) failed = fail("out of memory", "");
  if (!failed && ferror(stdin)) failed = fail("reading the input failed", "");
  if (fflush(stdout) || ferror(stdout)) failed = fail("writing failed", "");
  free(out.ids);
  free(line);
  return failed != 0;
}

int main(int argc, char **argv) {
  const char *path = NULL;
  int cased = 0, words = 0, i, failed;
  long max_len = 0;
  moe_truncate how = MOE_TRUNCATE_LONGEST;
  moe_env env;
  moe_tokenizer *tokenizer;
  void *vocab, *raw;
  size_t vocab_bytes, bytes, *start = NULL;
  for (i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--help")) return usage(stdout);
    if (!strcmp(argv[i], "--cased"))
      cased = 1;
    else if (!strcmp(argv[i], "--words"))
      words = 1;
    else if (!strcmp(argv[i], "--max-len")) {
      char *end = NULL;
      if (++i < argc) max_len = strtol(argv[i], &end, 10);
      if (!end || end == argv[i] || *end || max_len < 2 || max_len > INT32_MAX)
        return fail("--max-len wants a whole number from 2 on, not ",
                    i < argc ? argv[i] : "nothing");
    } else if (!strcmp(argv[i], "--truncate")) {
      if (++i < argc && !strcmp(argv[i], "right"))
        how = MOE_TRUNCATE_RIGHT;
      else if (i >= argc || strcmp(argv[i], "longest"))
        return fail("--truncate wants longest or right, not ", i < argc ? argv[i] : "nothing");
    } else if (argv[i][0] == '-')
      return fail("unknown option ", argv[i]);
    else if (path)
      return fail("one vocabulary is enough: ", argv[i]);
    else
      path = argv[i];
  }
  if (!path) return usage(stderr);
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = complain;
  if (moe_file_read(&vocab, &vocab_bytes, path, &env)) return 1;
  if (moe_tokenizer_size((const char *)vocab, vocab_bytes, &bytes, &env))
    return fail("no vocabulary: ", path);
  raw = malloc(bytes + 64);
  if (!raw) return fail("out of memory", "");
  if (moe_tokenizer_init(&tokenizer, (char *)raw + (64 - (uintptr_t)raw % 64), bytes,
                         (const char *)vocab, vocab_bytes, cased, &env))
    return fail("no vocabulary: ", path);
  if (words) start = line_starts((const char *)vocab, vocab_bytes, moe_tokenizer_words(tokenizer));
  if (words && !start) return fail("out of memory", "");
  failed = run(tokenizer, max_len, how, (const char *)vocab, start, &env);
  free(start);
  free(raw);
  moe_free(vocab);
  return failed;
}
