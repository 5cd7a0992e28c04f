/* WordPiece against Hugging Face `tokenizers` (golden/text.py), its statuses, and random bytes. */
#include <time.h>
#include "golden/text.h"

/* ---- the vocabulary and the random cases of golden/text.py ---- */
#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))
enum { CAPACITY = 8192 };

static const char *const words[] = {"hello",
                                    "un",
                                    "##want",
                                    "##ed",
                                    "runn",
                                    "##ing",
                                    "##able",
                                    "fi",
                                    "##fi",
                                    "don",
                                    "\317\203\316\261\317\202",
                                    "a##b",
                                    "##\314\201x",
                                    "CASE"};
static const char *const specials[] = {"[CLS]", "[SEP]",    "[MASK]", "[PAD]",     "[UNK]", "[cls]",
                                       "[MASK", "[[MASK]]", "##ing",  "[unused1]", "MASK]"};
static const int32_t repeated[] = {0x61, 0xe9, 0x4e00, 0x301, 0x1f600, 0x130};
static const int32_t pools[][2] = {
    {0x20, 0x7f},       {0x00, 0x100},      {0x41, 0x250},      {0x300, 0x370},
    {0x370, 0x600},     {0x600, 0x700},     {0x900, 0xe80},     {0x1b00, 0x1c00},
    {0x1d00, 0x2000},   {0x2000, 0x2100},   {0x2190, 0x2300},   {0x3000, 0x3100},
    {0x4e00, 0xa000},   {0xa640, 0xa9e0},   {0xac00, 0xd7b0},   {0xe000, 0xfb00},
    {0xfb00, 0x10000},  {0x10000, 0x10400}, {0x10400, 0x12000}, {0x16f00, 0x17000},
    {0x1d100, 0x1d200}, {0x1e000, 0x1e960}, {0x1f300, 0x1fb00}, {0x2a600, 0x2cf00},
    {0x2f700, 0x2fb00}, {0xe0000, 0xe0200}, {0x302e, 0x3030},   {0x8d0, 0x8e4},
    {0x1d15e, 0x1d174}, {0x0, 0x110000}};

typedef struct text_buffer {
  char *s;
  size_t n, capacity;
} text_buffer;

static void put_text(text_buffer *t, const char *s, size_t n) {
  if (t->n + n > t->capacity) {
    t->capacity = 2 * (t->n + n) + 64;
    t->s = (char *)realloc(t->s, t->capacity);
    if (!t->s) exit(1);
  }
  if (n) memcpy(t->s + t->n, s, n);
  t->n += n;
}

static void put_point(text_buffer *t, int32_t c) {
  unsigned char s[4];
  put_text(t, (const char *)s, moe__utf8_write(s, c));
}

static int32_t text_draw(uint64_t *state, int32_t n) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (int32_t)((*state >> 33) % (uint32_t)n);
}

static void nasty(text_buffer *t, uint64_t *state) {
  int32_t parts = 1 + text_draw(state, 5), part, i;
  t->n = 0;
  for (part = 0; part < parts; ++part) {
    int32_t kind = text_draw(state, 12), n = text_draw(state, 24);
    if (kind == 0) {
      const char *s = specials[text_draw(state, COUNT(specials))];
      put_text(t, s, strlen(s));
    } else if (kind == 1) {
      int32_t c = repeated[text_draw(state, COUNT(repeated))];
      for (i = 0; i < 90 + n; ++i) put_point(t, c);
    } else if (kind == 2) {
      for (i = 0; i < n; ++i) {
        char byte = (char)text_draw(state, 256);
        put_text(t, &byte, 1);
      }
    } else if (kind == 3) {
      const char *s = words[text_draw(state, COUNT(words))];
      put_text(t, s, strlen(s));
      s = words[text_draw(state, COUNT(words))];
      while (*s == '#') ++s;
      put_text(t, s, strlen(s));
    } else {
      const int32_t *pool = pools[text_draw(state, COUNT(pools))], *other = pool;
      if (text_draw(state, 3) == 0) other = pools[text_draw(state, COUNT(pools))];
      for (i = 0; i < n; ++i) {
        const int32_t *from = text_draw(state, 4) == 0 ? other : pool;
        int32_t c = from[0] + text_draw(state, from[1] - from[0]);
        put_point(t, c >= 0xd800 && c < 0xe000 ? 0xfffd : c);
      }
    }
    if (text_draw(state, 4) == 0) put_text(t, " ", 1);
  }
}

static void put_points(text_buffer *t, int32_t first, int32_t end) {
  for (; first < end; ++first) {
    put_point(t, first);
    put_text(t, "\n##", 3);
    put_point(t, first);
    put_text(t, "\n", 1);
  }
}

static void make_vocabulary(text_buffer *t) {
  static const char head[] = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n";
  int i;
  put_text(t, head, sizeof head - 1);
  for (i = 0; i < COUNT(words); ++i) {
    put_text(t, words[i], strlen(words[i]));
    put_text(t, "\n", 1);
  }
  put_points(t, 0x21, 0x7f);
  put_points(t, 0xa1, 0xd800);
  put_points(t, 0xe000, 0x32000);
}

/* ---- helpers ---- */
typedef struct fixture {
  text_buffer vocab;
  void *block;
  moe_tokenizer *t;
} fixture;

static moe_env logging_env(void) {
  moe_env env; /* not by moe_env_init: asking the processor takes long on virtual machines, and
                  there are millions of calls */
  memset(&env, 0, sizeof env);
  env.isa = MOE_ISA_SCALAR;
  env.threads = 1;
  env.log = models_log;
  said[0] = 0;
  return env;
}

/* 64-byte aligned, with nothing usable behind it, so that a sanitizer sees a size that is too
   small. */
static void *block_of(size_t bytes, void **raw) {
  *raw = malloc(bytes + 63);
  if (!*raw) exit(1);
  return (char *)*raw + (64 - (uintptr_t)*raw % 64) % 64;
}

static moe_status make(fixture *f, int cased, const moe_env *env) {
  size_t bytes;
  moe_status status = moe_tokenizer_size(f->vocab.s, f->vocab.n, &bytes, env);
  f->block = NULL;
  if (status) return status;
  return moe_tokenizer_init(&f->t, block_of(bytes, &f->block), bytes, f->vocab.s, f->vocab.n, cased,
                            env);
}

static void release(fixture *f) {
  free(f->block);
  free(f->vocab.s);
}

typedef struct result {
  int32_t ids[CAPACITY], begin[CAPACITY], end[CAPACITY];
  uint8_t segments[CAPACITY];
  moe_tokens tokens;
} result;
static result found;

static moe_status encode(const moe_tokenizer *t, const char *a, size_t na, const char *b, size_t nb,
                         int32_t max_len, moe_truncate how) {
  moe_env env = logging_env();
  moe_text in;
  found.tokens.ids = found.ids;
  found.tokens.segments = found.segments;
  found.tokens.begin = found.begin;
  found.tokens.end = found.end;
  found.tokens.capacity = CAPACITY;
  in.a = a, in.a_bytes = na, in.b = b, in.b_bytes = nb;
  return moe_encode(t, &found.tokens, &in, max_len, how, &env);
}

static uint64_t mix(uint64_t h, int32_t v) { return (h ^ (uint32_t)v) * 1099511628211u; }

/* Hash of what was found: count, ids, and, if wanted, segments and offsets, as in golden/text.py.
 */
static uint64_t hash_found(uint64_t h, int with_segments, int with_offsets) {
  int32_t i, n = found.tokens.count;
  h = mix(h, n);
  for (i = 0; i < n; ++i) h = mix(h, found.ids[i]);
  for (i = 0; with_segments && i < n; ++i) h = mix(h, found.segments[i]);
  for (i = 0; with_offsets && i < n; ++i) h = mix(mix(h, found.begin[i]), found.end[i]);
  return h;
}
static const uint64_t hash_start = 14695981039346656037u;

/* The pieces found, as words with blanks between. */
static void pieces_found(const moe_tokenizer *t, text_buffer *out, text_buffer *offsets) {
  int32_t i;
  out->n = offsets->n = 0;
  for (i = 0; i < found.tokens.count; ++i) {
    char range[64];
    if (i) put_text(out, " ", 1);
    put_text(out, t->vocab + t->start[found.ids[i]], t->length[found.ids[i]]);
    if (found.begin[i] < 0) continue;
    snprintf(range, sizeof range, "%s%d-%d", offsets->n ? " " : "", (int)found.begin[i],
             (int)found.end[i]);
    put_text(offsets, range, strlen(range));
  }
  put_text(out, "", 1);
  put_text(offsets, "", 1);
}

/* ---- the same as Hugging Face ---- */
static fixture both[2];

static void test_text_gives_the_pieces_of_readable_cases(void) {
  text_buffer pieces = {NULL, 0, 0}, offsets = {NULL, 0, 0};
  int i;
  for (i = 0; i < COUNT(golden_readable); ++i) {
    const moe_tokenizer *t = both[golden_readable[i].cased].t;
    const char *expected = golden_readable[i].pieces, *places = golden_readable[i].offsets,
               *s = golden_readable[i].text;
    CHECK(!encode(t, s, golden_readable[i].bytes, NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST), "%s",
          said);
    pieces_found(t, &pieces, &offsets);
    CHECK(!strcmp(pieces.s, expected), "case %d: %s instead of %s", i, pieces.s, expected);
    CHECK(!places || !strcmp(offsets.s, places), "case %d: %s instead of %s", i, offsets.s, places);
  }
  free(pieces.s);
  free(offsets.s);
}

static void test_text_knows_every_code_point(void) {
  int cased, block;
  for (cased = 0; cased < 2; ++cased)
    for (block = 0; block < COUNT(golden_points[0]); ++block) {
      uint64_t h = hash_start;
      int32_t c;
      for (c = block * 0x2000; c < (block + 1) * 0x2000; ++c) {
        unsigned char s[6] = {'a'};
        size_t n;
        if (c >= 0xd800 && c < 0xe000) continue;
        n = moe__utf8_write(s + 1, c);
        s[1 + n] = 'b';
        encode(both[cased].t, (const char *)s + 1, n, NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST);
        h = hash_found(h, 0, 1);
        encode(both[cased].t, (const char *)s, n + 2, NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST);
        h = hash_found(h, 0, 1);
      }
      CHECK(h == golden_points[cased][block], "cased %d, a code point from %x on differs", cased,
            (unsigned)block * 0x2000);
    }
}

static void test_text_agrees_on_nasty_pairs_and_both_truncations(void) {
  text_buffer a = {NULL, 0, 0}, b = {NULL, 0, 0};
  int cased, group, i;
  for (cased = 0; cased < 2; ++cased)
    for (group = 0; group < GOLDEN_GROUPS; ++group) {
      uint64_t state = 1000 + (uint64_t)group, h = hash_start;
      const moe_tokenizer *t = both[cased].t;
      for (i = 0; i < GOLDEN_CASES; ++i) {
        int32_t n;
        nasty(&a, &state);
        nasty(&b, &state);
        n = 3 + text_draw(&state, 1 << (1 + text_draw(&state, 8)));
        encode(t, a.s, a.n, NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST);
        h = hash_found(h, 1, 0);
        encode(t, a.s, a.n, b.s, b.n, CAPACITY, MOE_TRUNCATE_LONGEST);
        h = hash_found(h, 1, 0);
        encode(t, a.s, a.n, b.s, b.n, n, MOE_TRUNCATE_LONGEST);
        h = hash_found(h, 1, 0);
        encode(t, a.s, a.n, b.s, b.n, n, MOE_TRUNCATE_RIGHT);
        h = hash_found(h, 1, 0);
      }
      CHECK(h == golden_nasty[cased][group], "cased %d, group %d differs", cased, group);
    }
  free(a.s);
  free(b.s);
}

static int read_all(text_buffer *t, const char *path) {
  char buffer[65536];
  size_t n;
  FILE *f = fopen(path, "rb");
  if (!f) return 0;
  t->n = 0;
  while ((n = fread(buffer, 1, sizeof buffer, f)) > 0) put_text(t, buffer, n);
  fclose(f);
  return 1;
}

static uint64_t hash_of_row(uint64_t h, const moe_tokenizer *t, const char *line, const char *end,
                            int pair) {
  const char *a = (const char *)memchr(line, '\t', (size_t)(end - line)) + 1, *a_end, *b = NULL,
             *b_end = end;
  a_end = (const char *)memchr(a, '\t', (size_t)(end - a));
  if (!a_end) a_end = end;
  if (pair) {
    b = a_end + 1;
    b_end = (const char *)memchr(b, '\t', (size_t)(end - b));
    if (!b_end) b_end = end;
  }
  encode(t, a, (size_t)(a_end - a), b, b ? (size_t)(b_end - b) : 0, CAPACITY, MOE_TRUNCATE_LONGEST);
  h = hash_found(h, 1, 1);
  encode(t, a, (size_t)(a_end - a), b, b ? (size_t)(b_end - b) : 0, 48, MOE_TRUNCATE_LONGEST);
  h = hash_found(h, 1, 1);
  if (!pair) return h;
  encode(t, a, (size_t)(a_end - a), b, (size_t)(b_end - b), 48, MOE_TRUNCATE_RIGHT);
  return hash_found(h, 1, 1);
}

/* Compares all rows of the files, which end with a NULL or after `count`. `shared`: they stand in
   the working data. */
static void check_files(const golden_file *files, int count, const char *vocab, int shared) {
  fixture f;
  text_buffer file = {NULL, 0, 0};
  char path[512];
  int i, rows, total = 0;
  memset(&f, 0, sizeof f);
  CHECK(read_all(&f.vocab, vocab), "cannot read %s", vocab);
  CHECK(!make(&f, 0, NULL), "%s is refused", vocab);
  for (i = 0; i < count && files[i].file; ++i) {
    const char *line, *end, *stop, *where = NULL;
    uint64_t h = hash_start;
    int pair;
    snprintf(path, sizeof path, "../examples/data/%s", files[i].file);
    where = shared ? test_shared(files[i].file) : path;
    CHECK(where && read_all(&file, where), "cannot read %s", files[i].file);
    stop = file.s + file.n;
    end = (const char *)memchr(file.s, '\n', file.n);
    pair = end - file.s >= 25 && !memcmp(file.s, "label\tsentence1\tsentence2", 25);
    for (rows = 0, line = end + 1; line < stop; line = end + 1, ++rows) {
      end = (const char *)memchr(line, '\n', (size_t)(stop - line));
      if (!end) end = stop;
      h = hash_of_row(h, f.t, line, end, pair);
    }
    CHECK(rows == files[i].rows, "%s: %d rows", files[i].file, rows);
    CHECK(h == files[i].hash, "%s differs", files[i].file);
    total += rows;
  }
  printf("        %d rows of %d files\n", total, i);
  free(file.s);
  release(&f);
}

static void test_text_agrees_on_every_sentence_of_the_dev_sets(void) {
  const char *vocab = test_shared("data/vocab/bert-base-uncased-vocab.txt");
  char copy[1024];
  check_files(golden_bundled, COUNT(golden_bundled), "../examples/data/vocab.txt", 0);
  CHECK_STATE();
  if (vocab) {
    snprintf(copy, sizeof copy, "%s", vocab);
    check_files(golden_working, COUNT(golden_working), copy, 1);
  } else {
    printf("        no working data (GLUE) beside the project: the bundled files alone\n");
  }
}

/* ---- what is promised besides ---- */
static void test_text_keeps_its_promises_on_random_bytes(void) {
  uint64_t state = 7;
  int round;
  text_buffer a = {NULL, 0, 0};
  for (round = 0; round < 20000; ++round) {
    int32_t n = text_draw(&state, 200), i, max_len = 3 + text_draw(&state, 60), points = 0;
    moe_truncate how = text_draw(&state, 2) ? MOE_TRUNCATE_RIGHT : MOE_TRUNCATE_LONGEST;
    size_t cut, at;
    char *exact;
    a.n = 0;
    for (i = 0; i < n; ++i) {
      char byte = (char)text_draw(&state, text_draw(&state, 4) ? 256 : 128);
      put_text(&a, &byte, 1);
    }
    cut = (size_t)text_draw(&state, n + 1);
    exact = (char *)malloc(a.n ? a.n : 1); /* so that a sanitizer sees a byte read too far */
    if (!exact) exit(1);
    if (a.n) memcpy(exact, a.s, a.n);
    CHECK(!encode(both[round & 1].t, exact, cut, exact + cut, a.n - cut, max_len, how), "%s", said);
    for (at = cut; at < a.n; ++points) {
      int32_t c;
      at += moe__utf8_read(&c, (const unsigned char *)exact + at, a.n - at);
    }
    CHECK(found.tokens.count >= 3 && found.tokens.count <= max_len, "%d tokens",
          (int)found.tokens.count);
    for (i = 0; i < found.tokens.count; ++i) {
      CHECK(found.ids[i] >= 0 && found.ids[i] < moe_tokenizer_words(both[0].t), "id %d",
            (int)found.ids[i]);
      CHECK(i == 0 || found.segments[i] >= found.segments[i - 1], "segments fall");
      CHECK(found.begin[i] < 0 ? found.end[i] < 0 : found.begin[i] < found.end[i], "%d-%d",
            (int)found.begin[i], (int)found.end[i]);
      CHECK(found.segments[i] == 0 || found.end[i] <= points, "end %d of %d", (int)found.end[i],
            (int)points);
    }
    CHECK(found.ids[0] == 2 && found.ids[found.tokens.count - 1] == 3, "special tokens");
    free(exact);
  }
  free(a.s);
}

static void test_text_reads_long_texts_in_linear_time_without_memory(void) {
  size_t n = 3000000, i;
  char *s = (char *)malloc(n);
  int before = allocations;
  if (!s) exit(1);
  memset(s, 'x', n); /* one word */
  CHECK(!encode(both[0].t, s, n, s, n, 16, MOE_TRUNCATE_LONGEST) && found.tokens.count == 5 &&
            found.ids[1] == 1,
        "one long word");
  CHECK(found.begin[1] == 0 && found.end[1] == (int32_t)n, "0-%d", (int)found.end[1]);
  for (i = 0; i + 3 <= n; i += 3)
    memcpy(s + i, i % 2 ? "\343\200\256" : "\341\255\204", 3); /* one run of marks to be sorted */
  CHECK(!encode(both[0].t, s, n, s, n, 16, MOE_TRUNCATE_LONGEST) && found.tokens.count == 5,
        "one long run of marks");
  memset(s, '[', n);
  CHECK(!encode(both[0].t, s, n, s, n, 16, MOE_TRUNCATE_LONGEST) && found.tokens.count == 16,
        "many tokens");
  memset(s, 0, n);
  CHECK(!encode(both[0].t, s, n, s, n, 16, MOE_TRUNCATE_RIGHT) && found.tokens.count == 3,
        "nothing but control characters");
  CHECK(allocations == before, "%d allocations", allocations - before);
  free(s);
}

static void check_vocabulary(const char *vocab, size_t bytes, const char *sentence) {
  fixture f;
  moe_env env = logging_env();
  memset(&f, 0, sizeof f);
  put_text(&f.vocab, vocab, bytes);
  CHECK(make(&f, 0, &env) == MOE_E_FORMAT, "accepted; expected: %s", sentence);
  CHECK(!strcmp(said, sentence), "%s", said);
  CHECK(f.t == NULL, "the result was touched");
  release(&f);
}

static void test_text_refuses_damaged_vocabularies(void) {
  check_vocabulary("", 0, "vocabulary: none of its 0 lines is [UNK]");
  CHECK_STATE();
  check_vocabulary("[UNK]\n[SEP]\na", 13, "vocabulary: none of its 3 lines is [CLS]");
  CHECK_STATE();
  check_vocabulary("[UNK]\n[CLS]\n[sep]\n", 18, "vocabulary: none of its 3 lines is [SEP]");
  CHECK_STATE();
  check_vocabulary("[UNK]\n[CLS]\n[SEP]\na\377\n", 21, "vocabulary: line 4 is not UTF-8");
  CHECK_STATE();
  check_vocabulary("[UNK]\n[CLS]\n\342\202\n[SEP]\n", 21, "vocabulary: line 3 is not UTF-8");
}

/* A line longer than any word has a length that 16 bits cannot hold: it matches nothing, not even a
   text of the length that is left of it. */
static void test_text_lines_of_64_kib_match_nothing(void) {
  static char vocab[65600];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_tokenizer *tokenizer = NULL;
  int32_t ids[8];
  moe_tokens out;
  moe_text in = moe_text_of("b bb bbb", NULL);
  int n, length;
  for (n = 1; n < 4; ++n) {
    length = sprintf(vocab, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n");
    memset(vocab + length, 'b', (size_t)65536 + (size_t)n);
    length += 65536 + n;
    vocab[length++] = '\n';
    CHECK(!moe_tokenizer_create(&tokenizer, vocab, (size_t)length, 0, &env), "%s", said);
    memset(&out, 0, sizeof out);
    out.ids = ids;
    out.capacity = 8;
    CHECK(!moe_encode(tokenizer, &out, &in, 8, MOE_TRUNCATE_RIGHT, &env), "%s", said);
    CHECK(out.count == 5 && ids[1] == 1 && ids[2] == 1 && ids[3] == 1, "%d: %d %d %d", n,
          (int)ids[1], (int)ids[2], (int)ids[3]);
    moe_tokenizer_free(tokenizer);
  }
}

/* Words have up to 100 characters, of up to 4 bytes each. */
static void test_text_finds_words_of_400_bytes(void) {
  static const int32_t smile = 0x1f600;
  text_buffer text = {NULL, 0, 0};
  moe_env env = logging_env();
  fixture f;
  int i, n;
  memset(&f, 0, sizeof f);
  put_text(&f.vocab, "[UNK]\n[CLS]\n[SEP]\n", 18);
  for (i = 0; i < 100; ++i) put_point(&f.vocab, smile);
  put_text(&f.vocab, "\na\n##", 5);
  for (i = 0; i < 99; ++i) put_point(&f.vocab, smile);
  CHECK(!make(&f, 0, &env), "%s", said);
  for (n = 99; n <= 101; ++n) { /* unknown, word 3, too long */
    for (text.n = 0, i = 0; i < n; ++i) put_point(&text, smile);
    CHECK(!encode(f.t, text.s, text.n, NULL, 0, 64, MOE_TRUNCATE_LONGEST), "%s", said);
    CHECK(found.tokens.count == 3 && found.ids[1] == (n == 100 ? 3 : 0), "%d characters: %d", n,
          (int)found.ids[1]);
  }
  text.n = 0;
  put_text(&text, "a", 1);
  for (i = 0; i < 99; ++i) put_point(&text, smile);
  CHECK(!encode(f.t, text.s, text.n, NULL, 0, 64, MOE_TRUNCATE_LONGEST), "%s", said);
  CHECK(found.tokens.count == 4 && found.ids[1] == 4 && found.ids[2] == 5, "a word and its end");
  release(&f);
  free(text.s);
}

/* Marks are sorted by their class; the range of a word in the text, known or not, still covers all
   of its code points. */
static void test_text_words_of_sorted_marks_have_all_their_code_points(void) {
  static const char vocab[] = "[UNK]\n[CLS]\n[SEP]\nq\360\235\205\245\360\235\205\255\n";
  static const char input[] = "q\360\235\205\255\360\235\205\245 z\360\235\205\255\360\235\205\245";
  fixture f;
  memset(&f, 0, sizeof f);
  put_text(&f.vocab, vocab, sizeof vocab - 1);
  CHECK(!make(&f, 0, NULL), "refused");
  CHECK(!encode(f.t, input, sizeof input - 1, NULL, 0, 64, MOE_TRUNCATE_LONGEST), "%s", said);
  CHECK(found.tokens.count == 4 && found.ids[1] == 3 && found.ids[2] == 0, "ids %d and %d",
        (int)found.ids[1], (int)found.ids[2]);
  CHECK(found.begin[1] == 0 && found.end[1] == 3 && found.begin[2] == 4 && found.end[2] == 7,
        "%d to %d, %d to %d", (int)found.begin[1], (int)found.end[1], (int)found.begin[2],
        (int)found.end[2]);
  release(&f);
}

/* ---- words of one hash ---- */

enum { FLOOD_BITS = 15, FLOOD_BLOCK = 6, FLOOD_TRIES = 1 << 18 };
typedef struct candidate {
  uint32_t hash;
  char block[FLOOD_BLOCK];
} candidate;

static int by_hash(const void *a, const void *b) {
  uint32_t x = ((const candidate *)a)->hash, y = ((const candidate *)b)->hash;
  return x < y ? -1 : x > y;
}

/* Two blocks of letters that take FNV-1a from state *h to one and the same state, the new *h. */
static int collide(char pair_[2][FLOOD_BLOCK], uint32_t *h, uint64_t *state) {
  candidate *c = (candidate *)malloc(FLOOD_TRIES * sizeof *c);
  int i, k, found_one = 0;
  if (!c) exit(1);
  for (i = 0; i < FLOOD_TRIES; ++i) {
    for (k = 0; k < FLOOD_BLOCK; ++k) c[i].block[k] = (char)('a' + text_draw(state, 26));
    c[i].hash = moe__piece_hash(*h, (const unsigned char *)c[i].block, FLOOD_BLOCK);
  }
  qsort(c, FLOOD_TRIES, sizeof *c, by_hash);
  for (i = 1; i < FLOOD_TRIES && !found_one; ++i) {
    if (c[i].hash != c[i - 1].hash || !memcmp(c[i].block, c[i - 1].block, FLOOD_BLOCK)) continue;
    memcpy(pair_[0], c[i].block, FLOOD_BLOCK);
    memcpy(pair_[1], c[i - 1].block, FLOOD_BLOCK);
    *h = c[i].hash;
    found_one = 1;
  }
  free(c);
  return found_one;
}

static char flood_blocks[FLOOD_BITS][2][FLOOD_BLOCK];

/* Word number i: all have one hash (flood), or random letters. */
static void flood_word(char *word, uint32_t i, int flood, uint64_t *state) {
  int k;
  for (k = 0; k < FLOOD_BITS; ++k) memcpy(word + k * FLOOD_BLOCK, flood_blocks[k][i >> k & 1], 6);
  for (k = 0; k < FLOOD_BITS * FLOOD_BLOCK && !flood; ++k)
    word[k] = (char)('a' + text_draw(state, 26));
}

/* A tokenizer of 2^15 such words, and the seconds that it took. */
static double flood_make(fixture *f, int flood, uint64_t *state) {
  char word[FLOOD_BITS * FLOOD_BLOCK + 1];
  uint32_t i;
  clock_t begin;
  memset(f, 0, sizeof *f);
  put_text(&f->vocab, "[UNK]\n[CLS]\n[SEP]\n", 18);
  word[sizeof word - 1] = '\n';
  for (i = 0; i < 1u << FLOOD_BITS; ++i) {
    flood_word(word, i, flood, state);
    put_text(&f->vocab, word, sizeof word);
  }
  put_text(&f->vocab, f->vocab.s + 18, sizeof word); /* the first once more: the last line counts */
  begin = clock();
  if (make(f, 0, NULL)) return -1;
  return (double)(clock() - begin) / CLOCKS_PER_SEC;
}

static void test_text_is_not_slow_with_words_of_one_hash(void) {
  fixture flood, plain;
  uint64_t state = 21;
  uint32_t h = moe__hash_seed, i;
  char word[FLOOD_BITS * FLOOD_BLOCK];
  double slow, usual;
  int k;
  for (k = 0; k < FLOOD_BITS; ++k) CHECK(collide(flood_blocks[k], &h, &state), "block %d", k);
  slow = flood_make(&flood, 1, &state);
  usual = flood_make(&plain, 0, &state);
  CHECK(slow >= 0 && usual >= 0, "%s", said);
  for (i = 0; i < 1u << FLOOD_BITS; i += 331) {
    flood_word(word, i, 1, &state);
    CHECK(moe__piece_hash(moe__hash_seed, (const unsigned char *)word, sizeof word) == h, "hash");
    CHECK(!encode(flood.t, word, sizeof word, NULL, 0, 8, MOE_TRUNCATE_LONGEST) &&
              found.tokens.count == 3 &&
              found.ids[1] == (i ? (int32_t)i + 3 : (1 << FLOOD_BITS) + 3),
          "word %d is %d", (int)i, (int)found.ids[1]);
  }
  word[3] = (char)(word[3] == 'z' ? 'a' : word[3] + 1);
  CHECK(!encode(flood.t, word, sizeof word, NULL, 0, 8, MOE_TRUNCATE_LONGEST) && found.ids[1] == 0,
        "not a word");
  printf("        2^%d words of one hash take %.0f ms, others %.0f\n", FLOOD_BITS, 1e3 * slow,
         1e3 * usual);
  CHECK(slow < 20 * usual + 0.1, "%g s against %g", slow, usual);
  release(&flood);
  release(&plain);
}

static void test_text_survives_any_vocabulary(void) {
  static const char head[] = "[UNK]\n[CLS]\n[SEP]\n";
  uint64_t state = 11;
  int round, taken = 0;
  text_buffer a = {NULL, 0, 0};
  for (round = 0; round < 3000; ++round) {
    fixture f;
    int32_t n = text_draw(&state, 300), i;
    memset(&f, 0, sizeof f);
    put_text(&f.vocab, head, sizeof head - 1);
    for (i = 0; i < n; ++i) {
      char byte = "ab#\n\n\r [C\303\251\377"[text_draw(&state, text_draw(&state, 50) ? 11 : 12)];
      put_text(&f.vocab, &byte, 1);
    }
    if (text_draw(&state, 20) == 0) f.vocab.n = (size_t)text_draw(&state, (int32_t)f.vocab.n + 1);
    if (!make(&f, text_draw(&state, 2), NULL)) {
      ++taken;
      nasty(&a, &state);
      CHECK(!encode(f.t, a.s, a.n, f.vocab.s, f.vocab.n, 512, MOE_TRUNCATE_LONGEST), "%s", said);
      for (i = 0; i < found.tokens.count; ++i)
        CHECK(found.ids[i] < moe_tokenizer_words(f.t), "id %d", (int)found.ids[i]);
    }
    release(&f);
  }
  CHECK(taken > 20, "only %d were read", taken);
  free(a.s);
}

static void test_text_reads_a_vocabulary_as_hugging_face_does(void) {
  /* line ends of Windows, blanks at the end, an empty line, a word twice (the last counts), U+FFFD,
     no line feed at the end */
  static const char vocab[] =
      "[UNK]\r\n[CLS]\r\n[SEP]\r\nfoo \r\nbar\342\200\203\nfoo\n\n\357\277\275\n##x";
  static const char input[] = "foo barx [MASK] [SEP]";
  static const int32_t expected[] = {1, 5, 4, 8, 0, 0, 0, 2, 2};
  fixture f;
  int i;
  memset(&f, 0, sizeof f);
  put_text(&f.vocab, vocab, sizeof vocab - 1);
  CHECK(!make(&f, 0, NULL), "refused");
  CHECK(moe_tokenizer_words(f.t) == 9, "%d words", (int)moe_tokenizer_words(f.t));
  CHECK(!encode(f.t, input, sizeof input - 1, NULL, 0, 64, MOE_TRUNCATE_LONGEST), "%s", said);
  CHECK(found.tokens.count == COUNT(expected), "%d tokens", (int)found.tokens.count);
  for (i = 0; i < COUNT(expected); ++i)
    CHECK(found.ids[i] == expected[i], "token %d is %d", i, (int)found.ids[i]);
  release(&f);
}

static void test_text_refuses_wrong_arguments(void) {
  const moe_tokenizer *t = both[0].t;
  moe_tokenizer *none = NULL;
  moe_env env = logging_env();
  fixture f;
  size_t bytes;
  char *block;
  memset(&f, 0, sizeof f);
  found.tokens.count = 77;
  CHECK(encode(t, "a", 1, NULL, 0, 1, MOE_TRUNCATE_LONGEST) == MOE_E_ARGUMENT, "one token");
  CHECK(!strcmp(said, "moe_encode: max_len is 1, expected at least 2 for the special tokens"), "%s",
        said);
  CHECK(encode(t, "a", 1, "b", 1, 2, MOE_TRUNCATE_LONGEST) == MOE_E_ARGUMENT,
        "a pair in two tokens");
  CHECK(encode(t, "a", 1, NULL, 0, CAPACITY + 1, MOE_TRUNCATE_LONGEST) == MOE_E_ARGUMENT,
        "more than the room");
  CHECK(!strcmp(said, "moe_encode: capacity is 8192, expected at least max_len, 8193"), "%s", said);
  CHECK(encode(t, NULL, 1, NULL, 0, 8, MOE_TRUNCATE_LONGEST) == MOE_E_ARGUMENT, "no text");
  CHECK(encode(NULL, "a", 1, NULL, 0, 8, MOE_TRUNCATE_LONGEST) == MOE_E_ARGUMENT, "no tokenizer");
  CHECK(encode(t, "a", 1, NULL, 0, 8, (moe_truncate)2) == MOE_E_ARGUMENT, "unknown truncation");
  CHECK(found.tokens.count == 77, "the result was touched");
  CHECK(!encode(t, NULL, 0, "", 0, 3, MOE_TRUNCATE_LONGEST) && found.tokens.count == 3,
        "an empty pair");
  put_text(&f.vocab, "[UNK]\n[CLS]\n[SEP]\n", 18);
  CHECK(!moe_tokenizer_size(f.vocab.s, f.vocab.n, &bytes, &env), "%s", said);
  block = (char *)block_of(bytes + 64, &f.block);
  CHECK(moe_tokenizer_init(&none, block, bytes - 1, f.vocab.s, f.vocab.n, 0, &env) == MOE_E_MEMORY,
        "a byte short");
  CHECK(moe_tokenizer_init(&none, block + 1, bytes, f.vocab.s, f.vocab.n, 0, &env) ==
            MOE_E_ARGUMENT,
        "not aligned");
  CHECK(moe_tokenizer_init(&none, NULL, bytes, f.vocab.s, f.vocab.n, 0, &env) == MOE_E_ARGUMENT,
        "no block");
  CHECK(moe_tokenizer_size(NULL, 5, &bytes, &env) == MOE_E_ARGUMENT, "no vocabulary");
  CHECK(none == NULL, "the result was touched");
  CHECK(!moe_tokenizer_init(&none, block, bytes, f.vocab.s, f.vocab.n, 0, &env) && none != NULL,
        "%s", said);
  release(&f);
}

static void test_text_makes_a_tokenizer_on_the_heap(void) {
  static const char vocab[] = "[UNK]\n[CLS]\n[SEP]\nhello\n";
  moe_env env = logging_env();
  moe_tokenizer *t = NULL;
  moe_tokenizer_free(NULL);
  CHECK(moe_tokenizer_create(&t, vocab, 6, 0, &env) == MOE_E_FORMAT && !t, "without [CLS]");
  CHECK(!moe_tokenizer_create(&t, vocab, sizeof vocab - 1, 0, &env), "%s", said);
  CHECK(moe_tokenizer_words(t) == 4, "%d words", (int)moe_tokenizer_words(t));
  CHECK(!encode(t, "Hello", 5, NULL, 0, 8, MOE_TRUNCATE_LONGEST) && found.ids[1] == 3, "%s", said);
  moe_tokenizer_free(t);
  moe_tokenizer_free(both[0].t); /* in a block of the test's: nothing happens */
}

static void test_text_needs_no_segments_and_offsets(void) {
  moe_text in = moe_text_of("hello hello", "unwanted");
  moe_tokens out;
  int32_t ids[8];
  memset(&out, 0, sizeof out);
  out.ids = ids;
  out.capacity = 8;
  CHECK(!moe_encode(both[0].t, &out, &in, 8, MOE_TRUNCATE_LONGEST, NULL), "failed");
  CHECK(out.count == 8 && ids[1] == ids[2] && ids[3] == 3 && ids[7] == 3, "%d tokens",
        (int)out.count);
}

static void run_text(void) {
  int cased;
  for (cased = 0; cased < 2; ++cased) {
    make_vocabulary(&both[cased].vocab);
    if (make(&both[cased], cased, NULL)) {
      ++test_failures, printf("  FAIL  the vocabulary of the test is refused\n");
      return;
    }
  }
  RUN(test_text_gives_the_pieces_of_readable_cases);
  RUN(test_text_knows_every_code_point);
  RUN(test_text_agrees_on_nasty_pairs_and_both_truncations);
  RUN(test_text_agrees_on_every_sentence_of_the_dev_sets);
  RUN(test_text_keeps_its_promises_on_random_bytes);
  RUN(test_text_reads_long_texts_in_linear_time_without_memory);
  RUN(test_text_refuses_damaged_vocabularies);
  RUN(test_text_finds_words_of_400_bytes);
  RUN(test_text_words_of_sorted_marks_have_all_their_code_points);
  RUN(test_text_lines_of_64_kib_match_nothing);
  RUN(test_text_is_not_slow_with_words_of_one_hash);
  RUN(test_text_survives_any_vocabulary);
  RUN(test_text_reads_a_vocabulary_as_hugging_face_does);
  RUN(test_text_refuses_wrong_arguments);
  RUN(test_text_makes_a_tokenizer_on_the_heap);
  RUN(test_text_needs_no_segments_and_offsets);
  for (cased = 0; cased < 2; ++cased) release(&both[cased]);
}
