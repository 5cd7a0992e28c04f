/* JSON, plain and within a string of JSON. Numbers against the C library's. */

static int json_takes(const char *text, size_t n, int nested) {
  moe__json j;
  int ok;
  moe__json_init(&j, text, n, nested);
  moe__json_skip(&j);
  ok = moe__json_finish(&j);
  OUGHT(!ok == !!j.error);
  return ok;
}

/* A string: copied whole and cut, and what is inside, read in place and from the copy. */
static void json_text(const char *text, size_t n) {
  moe__json j;
  moe__json_text s;
  char *all, cut[40];
  size_t full;
  moe__json_init(&j, text, n, 0);
  if (!moe__json_string(&j, &s)) return;
  full = moe__json_copy(NULL, 0, &s);
  all = (char *)malloc(full + 1);
  OUGHT(moe__json_copy(all, full + 1, &s) == full && !all[full]);
  OUGHT(moe__json_copy(cut, sizeof cut, &s) == full && memchr(cut, 0, sizeof cut));
  if (!moe__json_has_zero(&s)) {
    OUGHT(strlen(all) == full && moe__json_is(&s, all));
    OUGHT(json_takes(s.begin.at, (size_t)(s.end - s.begin.at), 1) == json_takes(all, full, 0));
  }
  free(all);
}

static void json_number(const char *text, size_t n) {
  moe__json j;
  moe__json_number x;
  char number[300];
  double right;
  float f;
  moe__json_init(&j, text, n, 0);
  if (n >= sizeof number || !moe__json_read_number(&j, &x) || !moe__json_finish(&j)) return;
  memcpy(number, text, n);
  number[n] = 0;
  right = strtod(number, NULL);
  OUGHT(fabs(x.value - right) <= 1e-15 * fabs(right) + 1e-320);
  moe__json_init(&j, text, n, 0);
  if (!moe__json_float(&j, &f)) return;
  OUGHT(f == strtof(number, NULL) || nextafterf(f, strtof(number, NULL)) == strtof(number, NULL));
}

static void fuzz_json(const uint8_t *d, size_t n) {
  char *text = (char *)fuzz_copy(d, n);
  json_takes(text, n, 0);
  json_takes(text, n, 1);
  json_text(text, n);
  json_number(text, n);
  free(text);
}
