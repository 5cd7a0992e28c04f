/* The JSON of model files and the safetensors container, below the models: private functions, so
   this file holds the library itself. */

static int accepts(const char *text, size_t bytes) {
  moe__json j;
  moe__json_init(&j, text, bytes, 0);
  moe__json_skip(&j);
  return moe__json_finish(&j);
}

static void test_json_takes_what_the_standard_takes(void) {
  /* clang-format off */
  static const char *const good[] = {
      "0", "-0", "1e5", "1E+5", "1.5e-3", "\"\"", "[]", "{}", " [ 1 , 2 ] ", "true", "false",
      "null", "[[[]]]", "{\"a\":{\"b\":[1,{}]}}", "\"\\u00e9\\ud83d\\ude00\"",
      "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "{\"a\":1,\"a\":2}", "\t\r\n 1"};
  static const char *const bad[] = {
      "", " ", "01", "-", "+1", ".5", "1.", "1e", "1e+", "[1,]", "[,1]", "{,}", "{\"a\"}",
      "{\"a\":}", "{a:1}", "[1 2]", "[1", "{\"a\":1", "\"a", "\"\\x\"", "\"\\u12g4\"",
      "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "\"\t\"", "tru", "nul", "truefalse",
      "1 2", "]", "'a'", "1e999", "NaN", "Infinity", "{\"a\":1,}", "[1}", "{\"a\":1]", "\\"};
  /* clang-format on */
  size_t i;
  for (i = 0; i < sizeof good / sizeof *good; ++i)
    CHECK(accepts(good[i], strlen(good[i])), "%s", good[i]);
  for (i = 0; i < sizeof bad / sizeof *bad; ++i)
    CHECK(!accepts(bad[i], strlen(bad[i])), "%s", bad[i]);
}

static void test_json_tells_a_zero_from_the_end(void) {
  moe__json j;
  moe__json_text text;
  moe__json_init(&j, "\"a\0b\"", 5, 0);
  CHECK(!moe__json_string(&j, &text) && strstr(j.error, "control character"), "a zero: %s",
        j.error);
  moe__json_init(&j, "\"ab", 3, 0);
  CHECK(!moe__json_string(&j, &text) && strstr(j.error, "closing quote"), "the end: %s", j.error);
}

static void test_json_is_bounded_in_depth(void) {
  char text[2000];
  memset(text, '[', 1000);
  memset(text + 1000, ']', 1000);
  CHECK(!accepts(text, 2000), "1000 levels");
  CHECK(accepts(text + 1000 - MOE__JSON_DEPTH, 2 * MOE__JSON_DEPTH), "%d levels", MOE__JSON_DEPTH);
  CHECK(!accepts(text, 1000), "without end");
}

static void test_json_survives_every_cut_and_byte(void) {
  static const char whole[] =
      "{\"a\\u00e9\":[1.5e3,-2,true,null,\"\\ud83d\\ude00x\"],\"b\":{\"c\":false}}";
  char text[sizeof whole];
  size_t n = sizeof whole - 1, i;
  int c;
  for (i = 0; i < n; ++i) {
    char *copy =
        (char *)malloc(i + 1); /* of that very size, so that a sanitizer sees a byte too many */
    memcpy(copy, whole, i);
    CHECK(!accepts(copy, i), "cut at %zu", i);
    free(copy);
  }
  for (i = 0; i < n; ++i)
    for (c = 0; c < 256; ++c) {
      memcpy(text, whole, n);
      text[i] = (char)c;
      accepts(text, n);
    }
  CHECK(accepts(whole, n), "whole");
}

static void test_json_strings_come_back_byte_for_byte(void) {
  uint64_t state = 5;
  int round, nested;
  for (round = 0; round < 2000; ++round)
    for (nested = 0; nested < 2; ++nested) {
      char in[40], back[41];
      size_t n = (size_t)round % 40, i, length;
      models_file s;
      moe_writer writer = models_writer(&s);
      moe__out out;
      moe__json j;
      moe__json_text text;
      for (i = 0; i < n; ++i) {
        float r = test_random(&state);
        in[i] = round % 3 ? (char)(int)(r * 127.9f)
                          : "\"\\\xc3\xa9\xf0\x9f\x98\x80\n/\x7f"[(int)((r + 1) * 5.5f)];
        if (!in[i]) in[i] = 'x';
      }
      moe__out_init(&out, &writer);
      out.nested = nested;
      moe__out_string(&out, in, n);
      moe__out_flush(&out);
      CHECK(out.total == s.used, "%d of %zu", (int)out.total, s.used);
      for (i = 0; i < s.used;) {
        int k = moe__utf8_bytes(s.data + i, s.data + s.used);
        CHECK(k > 0, "what is written is UTF-8");
        i += (size_t)k;
      }
      moe__json_init(&j, (char *)s.data, s.used, nested);
      CHECK(moe__json_string(&j, &text) && moe__json_finish(&j), "round %d: %s", round, j.error);
      length = moe__json_copy(back, sizeof back, &text);
      CHECK(length == n && !memcmp(in, back, n), "round %d, nested %d: %zu bytes of %zu", round,
            nested, length, n);
      CHECK(moe__json_copy(back, 5, &text) == n && strlen(back) <= 4, "cut");
      in[n < 40 ? n : 39] = 0;
      if (n < 40) CHECK(moe__json_is(&text, in), "round %d", round);
      if (n < 39) {
        in[n] = 'q', in[n + 1] = 0;
        CHECK(!moe__json_is(&text, in), "longer");
      }
      if (n) {
        in[n - 1] = 0;
        CHECK(!moe__json_is(&text, in), "shorter");
      }
      free(s.data);
    }
}

static void test_json_floats_come_back_bit_for_bit(void) {
  static const float some[] = {0.0f,          1.0f,           -1.0f, 0.1f,          2.5f,
                               1e-12f,        1e-5f,          5.0f,  3.4028235e38f, 1.17549435e-38f,
                               1.4e-45f,      16777216.0f,    1e9f,  1e10f,         123456.789f,
                               0.3333333433f, 9.99999975e-05f};
  uint64_t state = 11;
  int i;
  for (i = 0; i < 200000; ++i) {
    float f, back;
    uint32_t bits;
    models_file s;
    moe_writer writer = models_writer(&s);
    moe__out out;
    moe__json j;
    char text[64];
    float parsed;
    test_random(&state);
    bits = (uint32_t)(state >> 32);
    memcpy(&f, &bits, sizeof f);
    if (i < (int)(sizeof some / sizeof *some)) f = some[i];
    if (!(fabsf(f) <= 3.4028235e38f)) continue;
    moe__out_init(&out, &writer);
    moe__out_float(&out, f);
    memcpy(text, out.buffer, out.used);
    text[out.used] = 0;
    moe__json_init(&j, text, out.used, 0);
    CHECK(moe__json_float(&j, &back) && moe__json_finish(&j), "%s: %s", text, j.error);
    parsed = strtof(text, NULL);
    CHECK(!memcmp(&f, &back, sizeof f) || f == 0, "%.9g came back as %.9g from %s", (double)f,
          (double)back, text);
    CHECK(!memcmp(&f, &parsed, sizeof f) || f == 0, "strtof reads %s as %.9g", text,
          (double)parsed);
    CHECK(out.used <= 16, "%s", text);
  }
}

static void test_json_numbers_are_exact_integers_or_refused(void) {
  static const struct {
    const char *text;
    int ok;
    int64_t value;
  } some[] = {{"9223372036854775807", 1, INT64_MAX},
              {"-9223372036854775807", 1, -INT64_MAX},
              {"9223372036854775808", 0, 0},
              {"1.0", 0, 0},
              {"1e2", 0, 0},
              {"99999999999999999999999", 0, 0},
              {"-0", 1, 0}};
  size_t i;
  moe__json j;
  moe__json_number number;
  for (i = 0; i < sizeof some / sizeof *some; ++i) {
    int64_t v = 0;
    moe__json_init(&j, some[i].text, strlen(some[i].text), 0);
    CHECK(moe__json_integer(&j, INT64_MIN, INT64_MAX, &v) == some[i].ok && v == some[i].value, "%s",
          some[i].text);
  }
  moe__json_init(&j, "18446744073709551615", 20, 0);
  CHECK(moe__json_read_number(&j, &number) && number.integer && number.magnitude == UINT64_MAX,
        "the largest");
  moe__json_init(&j, "18446744073709551616", 20, 0);
  CHECK(moe__json_read_number(&j, &number) && !number.integer, "one more");
}

/* A container from its header and a number of bytes behind it. */
static void *container(const char *header, size_t body, size_t *bytes) {
  size_t n = strlen(header), i;
  unsigned char *file = (unsigned char *)malloc(8 + n + body);
  for (i = 0; i < 8; ++i) file[i] = (unsigned char)((uint64_t)n >> (8 * i));
  memcpy(file + 8, header, n);
  for (i = 0; i < body; ++i) file[8 + n + i] = (unsigned char)(i * 7);
  *bytes = 8 + n + body;
  return file;
}

#define A "\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}"
#define B "\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[16,19]}"

static void test_safetensors_accepts_sound_headers(void) {
  static const struct {
    const char *header;
    size_t body, tensors;
  } some[] = {{"{}", 0, 0},
              {"{" A "}", 16, 1},
              {"{" A "," B "}", 19, 2},
              {"{" B "," A "}   \n", 19, 2},
              {"{\"__metadata__\":{\"x\":\"y\"}," B "," A "}", 19, 2},
              {"{" B ",\"__metadata__\":{}," A "}", 19, 2},
              {"{\"e\":{\"shape\":[0,9999999999],\"dtype\":\"F32\",\"data_offsets\":[16,16]}," A
               "}",
               16, 2},
              {"{\"s\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]}}", 8, 1}};
  size_t i;
  moe_env env = models_env(MOE_ISA_SCALAR);
  for (i = 0; i < sizeof some / sizeof *some; ++i) {
    size_t bytes, n = 0;
    void *file = container(some[i].header, some[i].body, &bytes);
    moe__st st;
    moe__st_tensor t;
    moe__json j;
    CHECK(moe__st_open(&st, file, bytes, &env) == MOE_OK, "%s: %s", some[i].header, said);
    CHECK(st.tensors == some[i].tensors, "%zu tensors", st.tensors);
    moe__st_begin(&st, &j);
    while (moe__st_next(&st, &j, &t)) ++n;
    CHECK(n == st.tensors, "%zu tensors found of %zu", n, st.tensors);
    memset(&j, 0, sizeof j);
    if (n > 1) {
      int round;
      for (round = 0; round < 3; ++round)
        CHECK(moe__st_find(&st, &j, "", "a", &t) && t.begin == 0 && t.count == 4, "a in %s",
              some[i].header);
      CHECK(!moe__st_find(&st, &j, "", "c", &t), "c");
      CHECK(moe__st_find(&st, &j, "", "a", &t), "a again");
    }
    free(file);
  }
}

/* Headers, bytes of data behind them, and what is said. */
static const struct {
  const char *header;
  size_t body;
  const char *says;
} wrong_headers[] = {
    {"[]", 0, "begin with {"},
    {"{" A "}", 15, "tensor a: bytes 0 to 16, the file has 15"},
    {"{" A "}", 17, "end at byte 16 of the data, which has 17"},
    {"{" A "," B "}", 20, "end at byte 19 of the data, which has 20"},
    {"{" B "}", 19, "tensor b begins at byte 16"},
    {"{\"c\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[20,24]}," A "}", 24,
     "tensor c begins at byte 20 of the data, expected 16: a gap or an overlap"},
    {"{" B "," A "}", 24, "end at byte 19 of the data, which has 24"},
    {"{" B "," A "," A "}", 19,
     "tensor a begins at byte 0 of the data, expected 16: a gap or an overlap"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,16]}}", 16,
     "tensor a: F32 of (2, 3) needs 24 bytes, its range has 16"},
    {"{\"a\":{\"dtype\":\"F33\",\"shape\":[2,2],\"data_offsets\":[0,17]}}", 16,
     "tensor a: bytes 0 to 17, the file has 16"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[16,0]}}", 16, "tensor a"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4294967296],\"data_offsets\":[0,"
     "16]}}",
     16, "exceeds the address space"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,16]}}", 16, "expected a size"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,16]}}", 16, "a size"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]}}", 16,
     "too many"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4]}}", 16, "once each"},
    {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", 16,
     "once each"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0]}}", 16, "two numbers"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "twice"},
    {"{\"__metadata__\":{\"x\":1}}", 0, "expected a string"},
    {"{\"a\":7}", 0, "tensor a: expected an object"},
    {"{" A "} x", 16, "text after the end"},
    {"{" A ",", 16, "expected a string"},
    {"{\"\xff\":1}", 0, "not UTF-8"},
    {"{\"\xc1\xbf\":1}", 0, "not UTF-8"}, /* the first that is too long, too short, too high ... */
    {"{\"\xe0\x9f\xbf\":1}", 0, "not UTF-8"},
    {"{\"\xed\xa0\x80\":1}", 0, "not UTF-8"},
    {"{\"\xf0\x8f\xbf\xbf\":1}", 0, "not UTF-8"},
    {"{\"\xf4\x90\x80\x80\":1}", 0, "not UTF-8"},
    {"{\"\xe0\xa0\x80\xed\x9f\xbf\":1}", 0, "expected an object"}, /* ... and what is not */
    {"{\"\xf0\x90\x80\x80\xf4\x8f\xbf\xbf\":1}", 0, "expected an object"},
    {"{\"a", 0, "byte 3 of 3: a string has no closing quote"},
    {"{\"a\\", 0, "byte 4 of 4: unknown escape in a string"},
    {"{", 0, "byte 1 of 1: unexpected end of the text"},
    {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}", 16,
     "tensor a...: a zero byte (\\u0000) in its name"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\","
     "\"shape\":[2],\"data_offsets\":[2,10]}}",
     10, "tensor b begins at byte 2"},
};

static void test_safetensors_names_what_is_wrong(void) {
  moe_env env = models_env(MOE_ISA_SCALAR);
  size_t i, bytes;
  moe__st st;
  unsigned char eight[8] = {255, 255, 255, 255, 255, 255, 255, 127};
  for (i = 0; i < sizeof wrong_headers / sizeof *wrong_headers; ++i) {
    void *file = container(wrong_headers[i].header, wrong_headers[i].body, &bytes);
    said[0] = 0;
    CHECK(moe__st_open(&st, file, bytes, &env) == MOE_E_FORMAT &&
              strstr(said, wrong_headers[i].says),
          "%s: said '%s'", wrong_headers[i].header, said);
    free(file);
  }
  CHECK(moe__st_open(&st, eight, 8, &env) == MOE_E_FORMAT && strstr(said, "give a header"), "%s",
        said);
  CHECK(moe__st_open(&st, eight, 7, &env) == MOE_E_FORMAT && strstr(said, "7 bytes"), "%s", said);
  CHECK(moe__st_open(&st, NULL, 0, &env) == MOE_E_FORMAT && strstr(said, "0 bytes"), "%s", said);
}
#undef A
#undef B

static void test_safetensors_halves_become_floats_exactly(void) {
  uint32_t h;
  for (h = 0; h < 65536; ++h) {
    unsigned char in[2];
    float got, want;
    int exponent = (int)(h >> 10 & 31);
    in[0] = (unsigned char)(h & 255);
    in[1] = (unsigned char)(h >> 8);
    moe__st_floats(&got, in, 1, MOE__F16);
    want = exponent == 31 ? (h & 1023 ? NAN : INFINITY)
           : exponent     ? ldexpf((float)(1024 + (h & 1023)), exponent - 25)
                          : ldexpf((float)(h & 1023), -24);
    if (h & 0x8000) want = -want;
    CHECK(isnan(want) ? isnan(got) : !memcmp(&got, &want, 4), "half %x: %.9g, not %.9g",
          (unsigned)h, (double)got, (double)want);
    CHECK((moe__st_finite(in, 1, MOE__F16) == 1) == (exponent != 31), "half %x", (unsigned)h);
    moe__st_floats(&got, in, 1, MOE__BF16);
    CHECK((moe__st_finite(in, 1, MOE__BF16) == 1) == (isfinite(got) != 0), "bfloat %x",
          (unsigned)h);
  }
}

#ifdef HAVE_POSIX
/* The values of a tensor end with the file and with the last page that may be read. */
static void test_safetensors_values_are_read_to_their_end(void) {
  static const moe__dtype dtype[] = {MOE__F32, MOE__F16, MOE__BF16, MOE__F64};
  size_t page = (size_t)sysconf(_SC_PAGESIZE), d, n;
  void *raw;
  unsigned char *end;
  float out[9];
  CHECK(!posix_memalign(&raw, page, 2 * page), "no memory");
  memset(raw, 0, 2 * page);
  end = (unsigned char *)raw + page;
  CHECK(!mprotect(end, page, PROT_NONE), "mprotect");
  for (d = 0; d < 4; ++d)
    for (n = 0; n < 9; ++n) {
      const unsigned char *in = end - n * moe__dtype_bytes[dtype[d]];
      out[n] = 7;
      moe__st_floats(out, in, n, dtype[d]);
      CHECK(moe__st_finite(in, n, dtype[d]) == n && out[n] == 7 && (!n || out[n - 1] == 0),
            "type %d, %d values", (int)d, (int)n);
      CHECK(d || moe__st_positive(in, n) == n, "%d values", (int)n);
    }
  mprotect(end, page, PROT_READ | PROT_WRITE);
  free(raw);
}
#endif

static void run_json(void) {
  RUN(test_json_takes_what_the_standard_takes);
  RUN(test_json_tells_a_zero_from_the_end);
  RUN(test_json_is_bounded_in_depth);
  RUN(test_json_survives_every_cut_and_byte);
  RUN(test_json_strings_come_back_byte_for_byte);
  RUN(test_json_floats_come_back_bit_for_bit);
  RUN(test_json_numbers_are_exact_integers_or_refused);
  RUN(test_safetensors_accepts_sound_headers);
  RUN(test_safetensors_names_what_is_wrong);
  RUN(test_safetensors_halves_become_floats_exactly);
#ifdef HAVE_POSIX
  RUN(test_safetensors_values_are_read_to_their_end);
#endif
}
