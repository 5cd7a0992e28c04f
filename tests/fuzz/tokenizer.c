/* What tools/tokenizer.h reads: a byte that says whether the vocabulary is a tokenizer.json, the
   vocabulary, 1, tokenizer_config.json, 1, added_tokens.json. What it makes of them, the library
   takes. */
static void fuzz_tokenizer(const uint8_t *d, size_t n) {
  size_t before = fuzz_live;
  fuzz_part file[3];
  env = fuzz_env();
  env.log = log_sentence;
  fuzz_tools_begin();
  fuzz_cut(file, 3, d + (n > 0), n - (n > 0));
  if (!setjmp(fuzz_end)) {
    tokenizer_settings s = new_settings("vocab.txt");
    moe_tokenizer *t = NULL;
    text vocab;
    if (file[1].bytes) read_tokenizer_config(&s, file[1].data, file[1].bytes);
    if (file[2].bytes) read_added_tokens(&s, file[2].data, file[2].bytes);
    vocab = make_vocabulary(&s, file[0].data, file[0].bytes, n && d[0] % 2);
    if (!moe_tokenizer_create(&t, vocab.data, vocab.bytes, text_flags(&s), &env))
      OUGHT(moe_tokenizer_words(t) > 2);
    moe_tokenizer_free(t);
  }
  fuzz_drop(file, 3);
  fuzz_tools_end(before);
}
