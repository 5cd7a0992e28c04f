/* What tools/shards.h reads: an index, a byte of value 1, a safetensors file that it has for each
   of its first two parts. What comes out is a safetensors file, or an end with a sentence. */
static void fuzz_shards(const uint8_t *d, size_t n) {
  size_t before = fuzz_live, bytes = 0;
  unsigned char *weights;
  fuzz_part file[2];
  env = fuzz_env();
  env.log = log_sentence;
  fuzz_tools_begin();
  fuzz_cut(file, 2, d, n);
  weights = fuzz_file((const uint8_t *)file[1].data, file[1].bytes, &bytes);
  if (!setjmp(fuzz_end)) {
    shards s = begin_shards();
    moe__st st;
    text whole;
    int i;
    read_index(&s, file[0].data, file[0].bytes);
    for (i = 0; i < s.files.n && i < 2; ++i) add_shard(&s, i, weights, bytes);
    whole = end_shards(&s);
    if (i == 1) OUGHT(!moe__st_open(&st, whole.data, whole.bytes, &env));
  }
  free(weights);
  fuzz_drop(file, 2);
  fuzz_tools_end(before);
}
