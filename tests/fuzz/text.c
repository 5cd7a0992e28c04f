/* A vocabulary and texts: two bytes (how, most tokens), the vocabulary, 1, a, 1, b. */

static void text_ranges(const moe_tokens *o, const fuzz_part *text, int pair, const moe_env *env) {
  int32_t i, q, span[2];
  for (i = 0; i < o->count; ++i) {
    OUGHT(o->segments[i] <= pair);
    if (o->begin[i] < 0)
      OUGHT(o->begin[i] == -1 && o->end[i] == -1);
    else
      OUGHT(o->end[i] >= o->begin[i] && (size_t)o->end[i] <= text[o->segments[i]].bytes);
  }
  for (i = 0; i < 12; ++i) {
    int32_t which = i & pair, from = (o->count * 7 + i * 5) % 40 - 3;
    int32_t to = i == 11 ? INT32_MAX : i == 10 ? INT32_MIN : from + i - 1;
    span[0] = span[1] = -7;
    if (TRY(moe_tokens_span(span, o, which, from, to, env))) {
      OUGHT(span[0] == -7 && span[1] == -7);
      continue;
    }
    OUGHT(span[0] >= 0 && span[0] < span[1] && span[1] <= o->count);
    for (q = span[0]; q < span[1]; ++q) OUGHT(o->segments[q] == which);
  }
}

static void text_encode(const moe_tokenizer *t, const fuzz_part *text, unsigned how, int32_t most,
                        const moe_env *env) {
  size_t n = (size_t)most;
  int32_t *ids = (int32_t *)malloc(4 * n * sizeof *ids), i, pair = how >> 1 & 1;
  moe_tokens o = {ids, (uint8_t *)malloc(n), ids + n, ids + 2 * n, most, 0}, again = o;
  moe_truncate cut = how & 4 ? MOE_TRUNCATE_RIGHT : MOE_TRUNCATE_LONGEST;
  moe_text in = {text[0].data, pair ? text[1].data : NULL, text[0].bytes, text[1].bytes};
  again.ids = ids + 3 * n;
  again.segments = NULL;
  again.begin = again.end = NULL;
  if (TRY(moe_encode(t, &o, &in, most, cut, env)))
    OUGHT(pair && most < 3);
  else {
    OUGHT(o.count >= 2 + pair && o.count <= most);
    for (i = 0; i < o.count; ++i) OUGHT(ids[i] >= 0 && ids[i] < moe_tokenizer_words(t));
    OUGHT(!TRY(moe_encode(t, &again, &in, most, cut, env)) && again.count == o.count);
    OUGHT(!memcmp(again.ids, ids, (size_t)o.count * sizeof *ids));
    text_ranges(&o, text, pair, env);
  }
  free(ids), free(o.segments);
}

static void fuzz_text(const uint8_t *d, size_t n) {
  moe_env env = fuzz_env();
  fuzz_part part[3];
  moe_tokenizer *t = NULL;
  size_t bytes = 0;
  void *block = NULL;
  if (n < 2) return;
  fuzz_cut(part, 3, d + 2, n - 2);
  if (d[0] & 8) { /* behind words that make a vocabulary */
    size_t base = strlen(fuzz_words_of);
    part[0].data = (char *)realloc(part[0].data, base + part[0].bytes);
    memmove(part[0].data + base, part[0].data, part[0].bytes);
    memcpy(part[0].data, fuzz_words_of, base);
    part[0].bytes += base;
  }
  if (!TRY(moe_tokenizer_size(part[0].data, part[0].bytes, &bytes, &env))) {
    OUGHT(bytes <= 64 * (part[0].bytes + 4096) && !posix_memalign(&block, 64, bytes));
    if (!TRY(moe_tokenizer_init(&t, block, bytes, part[0].data, part[0].bytes,
                                (d[0] & 1) | (d[0] >> 3 & 14), &env)))
      text_encode(t, part + 1, d[0], d[1] + 2, &env);
    free(block);
  }
  fuzz_drop(part, 3);
}
