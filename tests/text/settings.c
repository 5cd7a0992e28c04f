/* Each setting of the tokenizer, without and with added tokens, against Hugging Face `tokenizers`
   (golden/settings.py); and what it says to marks that cannot be. */
#include "golden/settings.h"

/* The vocabulary of golden/settings.py, with marked lines where `added`. */
static void make_settings_vocabulary(text_buffer *t, int added) {
  text_buffer plain = {NULL, 0, 0};
  size_t at = 0, n;
  int i;
  make_vocabulary(&plain);
  t->n = 0;
  for (; at < plain.n; at += n + 1) {
    const char *line = plain.s + at, *end = (const char *)memchr(line, '\n', plain.n - at);
    n = (size_t)(end - line);
    put_text(t, line, n);
    for (i = 0; i < COUNT(golden_marked) && added; ++i)
      if (!strncmp(golden_marked[i], line, n) && golden_marked[i][n] == '\t')
        put_text(t, golden_marked[i] + n, strlen(golden_marked[i] + n));
    put_text(t, "\n", 1);
  }
  for (i = 0; i < COUNT(golden_added) && added; ++i) {
    put_text(t, golden_added[i], strlen(golden_added[i]));
    put_text(t, "\n", 1);
  }
  free(plain.s);
}

static void make_setting(fixture *f, int flags, int added) {
  moe_env env = logging_env();
  memset(f, 0, sizeof *f);
  make_settings_vocabulary(&f->vocab, added);
  CHECK(!make(f, flags | (added ? MOE_TEXT_ADDED : 0), &env), "%s", said);
}

static void strange(text_buffer *t, text_buffer *part, uint64_t *state) {
  int32_t parts = 1 + text_draw(state, 3), k, i;
  t->n = 0;
  for (k = 0; k < parts; ++k) {
    nasty(part, state);
    put_text(t, part->s, (size_t)text_draw(state, (int32_t)part->n + 1));
    for (i = text_draw(state, 3); i > 0; --i) {
      const char *s = golden_pieces[text_draw(state, COUNT(golden_pieces))];
      put_text(t, s, strlen(s));
      if (text_draw(state, 2)) put_text(t, " ", 1);
    }
  }
}

static void test_settings_give_the_ids_of_tokenizers(void) {
  text_buffer text = {NULL, 0, 0}, part = {NULL, 0, 0};
  int flags, added, i;
  for (flags = 0; flags < GOLDEN_SETTINGS; ++flags)
    for (added = 0; added < 2; ++added) {
      uint64_t state = 7, h = hash_start;
      fixture f;
      make_setting(&f, flags, added);
      for (i = 0; i < GOLDEN_TEXTS; ++i) {
        strange(&text, &part, &state);
        CHECK(!encode(f.t, text.s, text.n, NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST), "%s", said);
        h = hash_found(h, 0, 0);
      }
      CHECK(h == golden_settings[2 * flags + added], "flags %d, added %d differ", flags, added);
      release(&f);
    }
  free(text.s), free(part.s);
}

static void test_settings_give_the_ids_of_readable_texts(void) {
  text_buffer ids = {NULL, 0, 0};
  int i, k;
  for (i = 0; i < COUNT(golden_settled); ++i) {
    const char *text = golden_settled[i].text;
    fixture f;
    make_setting(&f, golden_settled[i].flags, golden_settled[i].added);
    CHECK(!encode(f.t, text, strlen(text), NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST), "%s", said);
    for (ids.n = 0, k = 0; k < found.tokens.count; ++k) {
      char id[16];
      snprintf(id, sizeof id, "%s%d", k ? " " : "", (int)found.ids[k]);
      put_text(&ids, id, strlen(id));
    }
    put_text(&ids, "", 1);
    CHECK(!strcmp(ids.s, golden_settled[i].ids), "%s: %s instead of %s", text, ids.s,
          golden_settled[i].ids);
    release(&f);
  }
  free(ids.s);
}

/* Where an added token is: the code points that it stands for. */
static void test_settings_tell_where_added_tokens_are(void) {
  static const char vocab[] = "[UNK]\n[CLS]\n[SEP]\nb\n<e>\t+\nnew york\t+n\n<\303\251>\t+\n";
  fixture f;
  moe_env env = logging_env();
  memset(&f, 0, sizeof f);
  put_text(&f.vocab, vocab, sizeof vocab - 1);
  CHECK(!make(&f, MOE_TEXT_ADDED, &env), "%s", said);
  encode(f.t, "\303\251b <e>New\tYork", 16, NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST);
  CHECK(found.tokens.count == 5 && found.ids[2] == 4 && found.ids[3] == 5, "ids");
  CHECK(found.begin[1] == 0 && found.end[1] == 2 && found.begin[2] == 3 && found.end[2] == 6 &&
            found.begin[3] == 6 && found.end[3] == 14,
        "places");
  encode(f.t, "<\303\251> b", 6, NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST);
  CHECK(found.tokens.count == 4 && found.ids[1] == 6 && found.begin[1] == 0 && found.end[1] == 3 &&
            found.ids[2] == 3 && found.begin[2] == 4 && found.end[2] == 5,
        "places are counted in code points");
  release(&f);
  memset(&f, 0, sizeof f); /* without the flag a mark is a part of the word */
  put_text(&f.vocab, vocab, sizeof vocab - 1);
  CHECK(!make(&f, 0, &env), "%s", said);
  encode(f.t, "<e>", 3, NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST);
  CHECK(found.tokens.count == 5 && found.ids[1] == 0, "an added token without MOE_TEXT_ADDED");
  release(&f);
}

/* A syllable of Hangul is three times as long when normalised; the token is found nevertheless. */
static void test_settings_find_added_tokens_that_grow(void) {
  static const char syllable[] = "\352\260\201";
  char text[64] = "";
  fixture f;
  moe_env env = logging_env();
  int i;
  for (i = 0; i < 16; ++i) strcat(text, syllable);
  memset(&f, 0, sizeof f);
  put_text(&f.vocab, "[UNK]\n[CLS]\n[SEP]\n", 18);
  put_text(&f.vocab, text, strlen(text));
  put_text(&f.vocab, "\t+n\n", 4);
  CHECK(!make(&f, MOE_TEXT_ADDED, &env), "%s", said);
  encode(f.t, text, strlen(text), NULL, 0, CAPACITY, MOE_TRUNCATE_LONGEST);
  CHECK(found.tokens.count == 3 && found.ids[1] == 3 && found.begin[1] == 0 && found.end[1] == 16,
        "%d tokens, the first is %d", (int)found.tokens.count, (int)found.ids[1]);
  release(&f);
}

static void test_settings_refuse_marks_that_cannot_be(void) {
  static const struct {
    const char *line, *sentence;
  } bad[] = {{"<e>\t+q", "line 4 has an unknown mark behind its tab"},
             {"\t+n", "line 4 is an added token of 0 bytes, expected 1 to 402"},
             {" x\t+n", "line 4 is an added token that is empty when normalised, or begins"},
             {"x \t+n", "line 4 is an added token that is empty when normalised, or begins"},
             {"\314\201\t+n", "line 4 is an added token that is empty when normalised"}};
  moe_env env = logging_env();
  char longest[500];
  fixture f;
  int i;
  for (i = 0; i <= COUNT(bad); ++i) {
    memset(&f, 0, sizeof f);
    memset(longest, 'x', sizeof longest);
    strcpy(longest + 403, "\t+n");
    put_text(&f.vocab, "[UNK]\n[CLS]\n[SEP]\n", 18);
    put_text(&f.vocab, i < COUNT(bad) ? bad[i].line : longest,
             strlen(i < COUNT(bad) ? bad[i].line : longest));
    CHECK(make(&f, MOE_TEXT_ADDED, &env) == MOE_E_FORMAT, "mark %d is taken", i);
    CHECK(strstr(said, i < COUNT(bad) ? bad[i].sentence : "an added token of 403 bytes"),
          "mark %d: %s", i, said);
    release(&f);
  }
  memset(&f, 0, sizeof f);
  put_text(&f.vocab, "[UNK]\n[CLS]\n[SEP]\n", 18);
  CHECK(make(&f, 16, &env) == MOE_E_ARGUMENT, "flags 16");
  CHECK(strstr(said, "flags are 16, expected 0 to 15"), "%s", said);
  release(&f);
}

static void run_settings(void) {
  RUN(test_settings_give_the_ids_of_tokenizers);
  RUN(test_settings_give_the_ids_of_readable_texts);
  RUN(test_settings_tell_where_added_tokens_are);
  RUN(test_settings_find_added_tokens_that_grow);
  RUN(test_settings_refuse_marks_that_cannot_be);
}
