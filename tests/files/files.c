/* Model files and checkpoints: what goes in comes out bit for bit, and whatever happens to a file
   ends in a status and a sentence. */

static const char files_vocab[] = "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n\xc3\xa9\n";

/* A small model with every kind of task and names that want escapes. */
static moe_model *small_model(moe_router router, const moe_env *env) {
  static const char *const nasty[] = {"\"quoted\"",        "back\\slash",
                                      "tab\tline\nbell\a", "\xc3\xa9\xf0\x9f\x98\x80",
                                      "no \xff\xfe utf-8", "{}[]:,"};
  moe_config config;
  moe_task task[4];
  moe_model *model = NULL;
  moe_config_init(&config);
  config.layers = 2;
  config.hidden = 8;
  config.ffn = 12;
  config.heads = 2;
  config.vocab = 7;
  config.positions = 16;
  config.max_len = 16;
  config.eps = 1e-5f;
  config.router = router;
  config.experts = router == MOE_ROUTER_DENSE ? 1 : 3;
  config.top_k = router == MOE_ROUTER_DENSE ? 1 : 2;
  config.truncate = MOE_TRUNCATE_RIGHT;
  config.cased = 1;
  memset(task, 0, sizeof task);
  snprintf(task[0].name, sizeof task[0].name, "nasty_labels");
  task[0].classes = 6;
  task[0].label = nasty;
  snprintf(task[0].metrics, sizeof task[0].metrics, "accuracy,macro_f1");
  snprintf(task[1].name, sizeof task[1].name, "a-b+C_9");
  task[1].kind = MOE_KIND_REGRESSION;
  task[1].pair = 1;
  task[1].classes = 1;
  task[1].low = -0.1f;
  task[1].high = 5;
  task[1].max_len = 11;
  snprintf(task[2].name, sizeof task[2].name, "rank");
  task[2].kind = MOE_KIND_RANKING;
  task[2].classes = 2;
  snprintf(task[3].name, sizeof task[3].name, "span");
  task[3].kind = MOE_KIND_SPAN;
  task[3].classes = 3;
  if (moe_model_create(&model, &config, task, 4, 7, env)) return NULL;
  if (moe_model_set_vocab(model, files_vocab, sizeof files_vocab - 1, env))
    return moe_model_free(model), (moe_model *)NULL;
  return model;
}

static void exists(const char *path, int *yes) {
  FILE *f = fopen(path, "rb");
  *yes = f != NULL;
  if (f) fclose(f);
}

static int same_tasks(const moe_model *a, const moe_model *b) {
  int32_t t, i;
  if (moe_model_tasks(a) != moe_model_tasks(b)) return 0;
  for (t = 0; t < moe_model_tasks(a); ++t) {
    const moe_task *x = moe_model_task(a, t), *y = moe_model_task(b, t);
    if (strcmp(x->name, y->name) || x->kind != y->kind || x->pair != y->pair ||
        x->classes != y->classes || strcmp(x->metrics, y->metrics))
      return 0;
    if (x->max_len != y->max_len || memcmp(&x->low, &y->low, 4) || memcmp(&x->high, &y->high, 4))
      return 0;
    for (i = 0; i < x->classes && x->kind != MOE_KIND_REGRESSION; ++i)
      if (strcmp(x->label[i], y->label[i])) return 0;
  }
  return 1;
}

static int same_models(const moe_model *a, const float *weights, const moe_model *b) {
  size_t n = 0, m = 0;
  const char *v = moe_model_vocab(a, &n), *w = moe_model_vocab(b, &m);
  if (memcmp(moe_model_config(a), moe_model_config(b), sizeof(moe_config)) || !same_tasks(a, b))
    return 0;
  if (n != m || (n && memcmp(v, w, n))) return 0;
  return !weights || !memcmp(moe_model_weights((moe_model *)(uintptr_t)a), weights,
                             moe_model_parameters(a) * sizeof(float));
}

static void test_files_round_trip_is_bit_exact(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  int router;
  for (router = MOE_ROUTER_DENSE; router <= MOE_ROUTER_TASK; ++router) {
    moe_model *model = small_model((moe_router)router, &env), *back = NULL;
    models_file s, again;
    moe_writer writer = models_writer(&s);
    CHECK(model, "%s", said);
    CHECK(moe_model_write(model, &writer, &env) == MOE_OK, "%s", said);
    CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_OK, "%s", said);
    CHECK(same_models(model, moe_model_weights(back), back), "router %d", router);
    writer = models_writer(&again);
    CHECK(moe_model_write(back, &writer, &env) == MOE_OK, "%s", said);
    CHECK(again.used == s.used && !memcmp(again.data, s.data, s.used),
          "written again it is the same file");
    CHECK((((size_t)s.data[0] | (size_t)s.data[1] << 8 | (size_t)s.data[2] << 16) + 8) % 64 == 0,
          "the data are aligned");
    moe_model_free(model);
    moe_model_free(back);
    free(s.data);
    free(again.data);
  }
  CHECK(sentences == 0, "%s", said);
}

/* A copy at a multiple of 64 plus `shift`. */
static unsigned char *aligned_copy(const models_file *s, size_t shift, void **base) {
  unsigned char *p = (unsigned char *)malloc(s->used + 192);
  *base = p;
  p += (64 - (uintptr_t)p % 64) % 64 + shift;
  memcpy(p, s->data, s->used);
  return p;
}

static int high_byte_first(void) {
  const uint16_t one = 1;
  unsigned char first;
  memcpy(&first, &one, 1);
  return !first;
}

/* A task more, and only some of the tasks: from weights in a file's bytes as from those in memory.
 */
static void same_offspring(moe_model *model, const moe_model *opened, const moe_env *env) {
  static const int32_t keep[] = {3, 0};
  moe_task task = *moe_model_task(model, 2);
  moe_model *a = NULL, *b = NULL;
  int i;
  snprintf(task.name, sizeof task.name, "one_more");
  for (i = 0; i < 2; ++i) {
    CHECK((i ? moe_model_extract(&a, model, keep, 2, NULL, env)
             : moe_model_adapt(&a, model, &task, 1, 9, env)) == MOE_OK,
          "%s", said);
    CHECK((i ? moe_model_extract(&b, opened, keep, 2, NULL, env)
             : moe_model_adapt(&b, opened, &task, 1, 9, env)) == MOE_OK,
          "%s", said);
    CHECK(same_models(a, moe_model_weights(b), b), "round %d", i);
    moe_model_free(a);
    moe_model_free(b);
  }
}

static void test_files_open_in_place(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *opened = NULL;
  models_file s, again;
  moe_writer writer = models_writer(&s);
  void *base, *block_base;
  unsigned char *file, *block;
  size_t bytes = 0;
  CHECK(model && moe_model_write(model, &writer, &env) == MOE_OK, "%s", said);
  file = aligned_copy(&s, 0, &base);
  CHECK(moe_model_open_size(file, s.used, &bytes, &env) == MOE_OK, "%s", said);
  CHECK(bytes < 16384, "%zu bytes hold no weights", bytes);
  if (high_byte_first()) { /* nothing can be used as it lies there */
    block = (unsigned char *)malloc(bytes + 64);
    CHECK(moe_model_open(&opened, file, s.used, block + (64 - (uintptr_t)block % 64) % 64, bytes,
                         &env) == MOE_E_UNSUPPORTED &&
              !opened && strstr(said, "moe_model_read"),
          "%s", said);
    free(block);
    free(base);
    free(s.data);
    moe_model_free(model);
    return;
  }
  block_base = malloc(bytes + 64);
  block = (unsigned char *)block_base + (64 - (uintptr_t)block_base % 64) % 64;
  CHECK(moe_model_open(&opened, file, s.used, block, bytes - 1, &env) == MOE_E_MEMORY && !opened,
        "a byte less");
  CHECK(moe_model_open(&opened, file, s.used, block + 4, bytes, &env) == MOE_E_ARGUMENT && !opened,
        "not aligned");
  CHECK(moe_model_open(&opened, file, s.used, block, bytes, &env) == MOE_OK, "%s", said);
  CHECK(same_models(model, NULL, opened), "configuration, tasks, vocabulary");
  CHECK(moe_model_weights(opened) == NULL, "the weights are not for writing");
  CHECK((const unsigned char *)moe_model_vocab(opened, NULL) > file,
        "the vocabulary stays in the file");
  writer = models_writer(&again);
  CHECK(moe_model_write(opened, &writer, &env) == MOE_OK && again.used == s.used &&
            !memcmp(again.data, s.data, s.used),
        "written again");
  same_offspring(model, opened, &env);
  moe_model_free(opened);
  free(base);
  file = aligned_copy(&s, 2, &base);
  CHECK(moe_model_open(&opened, file, s.used, block, bytes, &env) == MOE_E_ARGUMENT &&
            strstr(said, "multiple of 64"),
        "%s", said);
  CHECK(moe_model_read(&opened, file, s.used, &env) == MOE_OK, "any alignment will do for a copy");
  moe_model_free(opened);
  free(base);
  free(block_base);
  free(s.data);
  free(again.data);
  moe_model_free(model);
}

/* Reads and opens damaged bytes, in a block of exactly that size so that a sanitizer sees a byte
   too many. */
static void try_bytes(const unsigned char *data, size_t n, int *accepted, int *refused) {
  moe_env env = models_env(MOE_ISA_AUTO);
  unsigned char *copy = (unsigned char *)malloc(n ? n : 1), *block_base, *block;
  moe_model *model = NULL;
  size_t bytes = 0;
  moe_status status;
  if (n) memcpy(copy, data, n);
  status = moe_model_read(&model, copy, n, &env);
  if (status) {
    ++*refused;
    CHECK(!model && status == MOE_E_FORMAT && sentences == 1 && strlen(said) > 10,
          "status %d, %d sentences: '%s'", (int)status, sentences, said);
  } else {
    ++*accepted;
    CHECK(sentences == 0 && model, "%s", said);
  }
  moe_model_free(model);
  model = NULL;
  if (!moe_model_open_size(copy, n, &bytes, &env)) {
    block_base = (unsigned char *)malloc(bytes + 64);
    block = block_base + (64 - (uintptr_t)block_base % 64) % 64;
    said[0] = 0;
    status = moe_model_open(&model, copy, n, block, bytes, &env);
    CHECK(!status == !said[0], "status %d: '%s'", (int)status, said);
    moe_model_free(model);
    free(block_base);
  }
  free(copy);
}

static void test_files_truncated_are_refused(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env);
  models_file s;
  moe_writer writer = models_writer(&s);
  int accepted = 0, refused = 0;
  size_t data, i;
  int32_t t;
  CHECK(model && moe_model_write(model, &writer, &env) == MOE_OK, "%s", said);
  data = 8 + ((size_t)s.data[0] | (size_t)s.data[1] << 8 | (size_t)s.data[2] << 16);
  for (t = 0; t < moe_model_tensors(model); ++t) {
    moe_tensor tensor;
    moe_model_tensor(model, t, &tensor);
    try_bytes(s.data, data + tensor.offset * sizeof(float), &accepted, &refused);
    CHECK_STATE();
    CHECK(strstr(said, "damaged or truncated"), "cut before tensor %d: %s", (int)t, said);
  }
  for (i = 0; i < data; i += i < 80 ? 1 : 37) try_bytes(s.data, i, &accepted, &refused);
  for (i = s.used - 1; i > s.used - 64; --i) try_bytes(s.data, i, &accepted, &refused);
  CHECK_STATE();
  CHECK(accepted == 0, "%d of %d were accepted", accepted, accepted + refused);
  printf("        %d truncated files refused\n", refused);
  moe_model_free(model);
  free(s.data);
}

static void test_files_damaged_are_refused_or_read(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_SHARED, &env);
  models_file s;
  moe_writer writer = models_writer(&s);
  int accepted = 0, refused = 0, round;
  uint64_t state = 1;
  size_t header;
  CHECK(model && moe_model_write(model, &writer, &env) == MOE_OK, "%s", said);
  header = 8 + ((size_t)s.data[0] | (size_t)s.data[1] << 8 | (size_t)s.data[2] << 16);
  for (round = 0; round < 4000; ++round) {
    unsigned char *copy = (unsigned char *)malloc(s.used + 8);
    size_t n = s.used, at;
    int flips = 1 + round % 3, f;
    memcpy(copy, s.data, s.used);
    for (f = 0; f < flips; ++f) {
      size_t range = round % 5 == 0 ? 12 : round % 5 == 4 ? n : header;
      test_random(&state);
      at = (size_t)(state >> 33) % range;
      test_random(&state);
      if (round % 2)
        copy[at] = (unsigned char)(state >> 40);
      else if (copy[at] >= '0' && copy[at] <= '9')
        copy[at] = (unsigned char)('0' + (state >> 40) % 10);
      else
        copy[at] ^= (unsigned char)(1u << (state >> 40) % 8);
    }
    if (round % 11 == 0) n -= (size_t)(state >> 50) % n;
    try_bytes(copy, n, &accepted, &refused);
    free(copy);
    CHECK_STATE();
  }
  printf("        %d damaged files: %d refused, %d still sound\n", round, refused, accepted);
  CHECK(refused > 2000, "%d", refused);
  moe_model_free(model);
  free(s.data);
}

/* Replaces the first `from` in the header by `to` of the same length. */
static void swap_text(models_file *s, const char *from, const char *to) {
  size_t n = strlen(from), i;
  for (i = 8; i + n < s->used; ++i)
    if (!memcmp(s->data + i, from, n)) {
      memcpy(s->data + i, to, n);
      return;
    }
}

/* Adds an empty tensor of the vocabulary's name to a header that ends at byte `end`, in a longer
   header. */
static int repeat_vocab(models_file *s, size_t end) {
  char more[120];
  size_t n = (size_t)snprintf(
             more, sizeof more,
             ",\"tokenizer.vocab\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"),
         length = 0, i;
  unsigned char *longer = (unsigned char *)malloc(s->used + n);
  if (!longer || s->data[end - 1] != '}') return 0;
  for (i = 8; i-- > 0;) length = length << 8 | s->data[i];
  memcpy(longer, s->data, end - 1);
  memcpy(longer + end - 1, more, n);
  memcpy(longer + end - 1 + n, s->data + end, s->used - end);
  for (i = 0; i < 8; ++i) longer[i] = (unsigned char)((uint64_t)(length + n - 1) >> (8 * i));
  s->used += n - 1;
  free(s->data);
  s->data = longer;
  return 1;
}

static void test_files_sentences_name_the_cause(void) {
  static const struct {
    const char *from, *to, *says;
  } some[] = {
      {"moe.version", "moe.versiom", "not a model of moe.h"},
      {"moe.version\":\"1", "moe.version\":\"2", "moe.version is 2, this moe.h reads up to 1"},
      {"\\\"layers\\\":2", "\\\"layers\\\":3", "the configuration needs"},
      {"\\\"layers\\\":2", "\\\"layers\\\":0", "configuration: layers is 0"},
      {"\\\"layers\\\":2", "\\\"lagers\\\":2", "moe.config: unknown member"},
      {"\\\"hidden\\\":8", "\\\"hidden\\\":7", "hidden is 7, expected a multiple of heads"},
      {"\\\"heads\\\":2", "\\\"heads\\\":x", "moe.config: expected a number"},
      {"\\\"heads\\\":2", "\\\"vocab\\\":2", "moe.config: a member is listed twice"},
      {"\\\"truncate\\\":\\\"right", "\\\"router\\\":   \\\"task",
       "moe.config: a member is listed twice"},
      {"\\\"task\\\"", "\\\"tusk\\\"", "moe.config: unknown name"},
      {"\\\"kind\\\":\\\"span", "\\\"kind\\\":\\\"spam", "moe.tasks, task 3: unknown kind"},
      {"\\\"low\\\":-0.1", "\\\"low\\\":   9", "low is 9 and high 5"},
      {"\\\"rank\\\"", "\\\"span\\\"", "task 'span' is listed twice"},
      {"\\\"rank\\\"", "\\\"r.nk\\\"", "letters, digits"},
      {"tokenizer.vocab\":{\"dtype\":\"U8", "tokenizer.vocab\":{\"dtype\":\"I8",
       "tensor tokenizer.vocab: expected U8 of one dimension"},
      {"heads.rank.weight", "heads.rink.weight", "heads.rink.weight does not belong"},
      {"embeddings.LayerNorm.weight\":{\"dtype\":\"F32\",\"shape\":[8]",
       "embeddings.LayerNorm.weight\":{\"dtype\":\"I32\",\"shape\":[8]",
       "tensor embeddings.LayerNorm.weight: expected F32 of (8), found I32 of (8)"},
      {"encoder.layer.0.experts.1.output.dense.bias", "encoder.layer.0.experts.0.output.dense.bias",
       "tensor encoder.layer.0.experts.0.output.dense.bias is listed twice"},
      {"\"shape\":[7,8]", "\"shape\":[8,7]",
       "tensor embeddings.word_embeddings.weight: expected F32 of (7, 8), found F32 of (8, 7)"},
  };
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  size_t i;
  models_file s;
  moe_writer writer;
  CHECK(model, "%s", said);
  for (i = 0; i < sizeof some / sizeof *some; ++i) {
    writer = models_writer(&s);
    CHECK(moe_model_write(model, &writer, &env) == MOE_OK, "%s", said);
    swap_text(&s, some[i].from, some[i].to);
    CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_E_FORMAT && strstr(said, some[i].says),
          "%s: said '%s'", some[i].to, said);
    free(s.data);
  }
  CHECK(!back, "untouched");
  moe_model_free(model);
}

/* Replaces a text by another of the same length, wherever it is in the header. */
static int files_rename_all(models_file *s, const char *from, const char *to) {
  size_t n = strlen(from), i;
  int found = 0;
  for (i = 8; i + n < s->used; ++i)
    if (!memcmp(s->data + i, from, n)) memcpy(s->data + i, to, n), ++found;
  return found;
}

/* Each tensor in turn is missing: the sentence has its name. Its member gets a name that files may
   have without being read, that of a moment. */
static void test_files_every_missing_tensor_is_named(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  models_file s = models_written(model, &env);
  int32_t i;
  CHECK(s.used, "%s", said);
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    char was[140], now[140], says[160];
    moe_model_tensor(model, i, &t);
    snprintf(was, sizeof was, "\"%s\":", t.name);
    snprintf(now, sizeof now, "%s", was);
    memcpy(now + 1, "adam.", 5);
    snprintf(says, sizeof says, "tensor %s is missing", t.name);
    CHECK(files_rename_all(&s, was, now) == 1, "%s", t.name);
    CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_E_FORMAT && strstr(said, says),
          "%s: '%s'", t.name, said);
    files_rename_all(&s, now, was);
  }
  CHECK(!moe_model_read(&back, s.data, s.used, &env), "%s", said);
  free(s.data);
  moe_model_free(back);
  moe_model_free(model);
}

static void test_files_second_vocabularies_and_nan_are_found(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  size_t i;
  models_file s;
  moe_writer writer = models_writer(&s); /* a second vocabulary: which one would count? */
  CHECK(moe_model_write(model, &writer, &env) == MOE_OK, "%s", said);
  for (i = 8; memcmp(s.data + i, "  ", 2); ++i) continue; /* the blanks behind the header */
  CHECK(repeat_vocab(&s, i), "no room for a second vocabulary");
  CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_E_FORMAT &&
            strstr(said, "tensor tokenizer.vocab is listed twice"),
        "said '%s'", said);
  free(s.data);
  writer = models_writer(&s);
  CHECK(moe_model_write(model, &writer, &env) == MOE_OK, "%s", said);
  i = 8 + ((size_t)s.data[0] | (size_t)s.data[1] << 8 | (size_t)s.data[2] << 16);
  memcpy(s.data + i + 60 * sizeof(float), "\0\0\xc0\x7f", 4); /* element 4 of the second tensor */
  CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_E_FORMAT &&
            strstr(said, "element 4 is not a finite"),
        "%s", said);
  CHECK(!back, "untouched");
  free(s.data);
  moe_model_free(model);
}

static void test_files_weights_that_cannot_be_read_are_not_written(void) {
  static const char *const names[] = {"embeddings.LayerNorm.bias",
                                      "encoder.layer.1.gate.span.weight", "heads.span.bias"};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  const char *path = "build/files_nan";
  size_t i;
  int there;
  CHECK(model && moe_model_save(model, path, &env) == MOE_OK, "%s", said);
  for (i = 0; i < sizeof names / sizeof *names; ++i) {
    moe_tensor t;
    char says[160];
    float *last, kept;
    models_file s;
    moe_writer writer = models_writer(&s);
    CHECK(moe_model_tensor(model, moe_model_find_tensor(model, names[i]), &t) == MOE_OK, "%s",
          names[i]);
    last = moe_model_weights(model) + t.offset + t.count - 1;
    kept = *last;
    *last = i == 1 ? -INFINITY : NAN;
    snprintf(says, sizeof says, "tensor %s: element %u is ", names[i], (unsigned)(t.count - 1));
    said[0] = 0;
    CHECK(moe_model_write(model, &writer, &env) == MOE_E_NONFINITE && strstr(said, says) && !s.used,
          "%zu bytes, said '%s'", s.used, said);
    sentences = 0;
    CHECK(moe_model_save(model, path, &env) == MOE_E_NONFINITE && strstr(said, says) &&
              sentences == 1,
          "%d: '%s'", sentences, said);
    exists("build/files_nan.tmp", &there);
    CHECK(!there, "nothing is left over");
    *last = kept;
    CHECK(moe_model_load(&back, path, &env) == MOE_OK &&
              same_models(model, moe_model_weights(back), back),
          "the old file: %s", said);
    moe_model_free(back);
  }
  remove(path);
  moe_model_free(model);
}

static void test_files_failing_writer_is_reported(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env);
  models_file s;
  moe_writer writer = models_writer(&s);
  size_t whole, limit;
  CHECK(model && moe_model_write(model, &writer, &env) == MOE_OK, "%s", said);
  whole = s.used;
  free(s.data);
  for (limit = 0; limit < whole; limit += limit < 5000 ? 97 : 1009) {
    writer = models_writer(&s);
    s.limit = limit;
    said[0] = 0;
    CHECK(moe_model_write(model, &writer, &env) == MOE_E_IO && said[0], "limit %zu", limit);
    free(s.data);
  }
  moe_model_free(model);
}

static moe_status half_written(void *user, const moe_writer *writer, const moe_env *env) {
  (void)env;
  if (writer->write(writer->user, "half", 4)) return MOE_E_IO;
  return *(moe_status *)user;
}

static void test_files_old_file_survives_a_failure(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  const char *path = "build/files_replace";
  moe_status answer = MOE_OK;
  void *data;
  size_t bytes;
  int there;
  CHECK(moe_file_replace(path, half_written, &answer, &env) == MOE_OK, "%s", said);
  answer = MOE_E_IO;
  CHECK(moe_file_replace("build/files_never", half_written, &answer, &env) == MOE_E_IO,
        "the status of the writer");
  exists("build/files_never", &there);
  CHECK(!there, "a new file is not begun");
  exists("build/files_never.tmp", &there);
  CHECK(!there, "and nothing is left over");
  answer = MOE_E_FORMAT;
  CHECK(moe_file_replace(path, half_written, &answer, &env) == MOE_E_FORMAT,
        "the status of the writer");
  CHECK(moe_file_read(&data, &bytes, path, &env) == MOE_OK && bytes == 4 &&
            !memcmp(data, "half", 5),
        "the old file is there, zero behind it");
  moe_free(data);
  CHECK(moe_file_replace("build/no/such/folder", half_written, &answer, &env) == MOE_E_IO &&
            strstr(said, "build/no/such/folder.tmp"),
        "%s", said);
  CHECK(moe_file_replace("build", half_written, &answer, &env) == MOE_E_IO &&
            strstr(said, "folder"),
        "%s", said);
  remove(path);
}

static void test_files_failed_save_keeps_the_old_file(void) {
#ifdef HAVE_POSIX
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  struct rlimit limit;
  rlim_t before;
  size_t bytes = 0;
  rlim_t most;
  void *old = NULL;
  int there;
  CHECK(model && moe_model_save(model, "build/files_limit", &env) == MOE_OK, "%s", said);
  CHECK(moe_file_read(&old, &bytes, "build/files_limit", &env) == MOE_OK, "%s", said);
  moe_free(old);
  CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0, "getrlimit");
  before = limit.rlim_cur;
  signal(SIGXFSZ, SIG_IGN);
  for (most = 0; most < (rlim_t)bytes;
       most += (rlim_t)bytes / 7) { /* a limit of the size of files acts like a disk that is full */
    moe_status status;
    limit.rlim_cur = most;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0, "setrlimit");
    said[0] = 0;
    status = moe_model_save(model, "build/files_limit", &env);
    limit.rlim_cur = before;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0, "setrlimit");
    CHECK(status == MOE_E_IO && strstr(said, "build/files_limit.tmp: writing failed after"),
          "status %d: %s", (int)status, said);
    exists("build/files_limit.tmp", &there);
    CHECK(!there, "nothing is left over");
    CHECK(moe_model_load(&back, "build/files_limit", &env) == MOE_OK, "%s", said);
    CHECK(same_models(model, moe_model_weights(back), back), "the old file");
    moe_model_free(back);
  }
  signal(SIGXFSZ, SIG_DFL);
  remove("build/files_limit");
  moe_model_free(model);
#else
  SKIP("no limit of the size of files here");
#endif
}

static void test_files_disk_full_is_reported(void) {
#ifdef __linux__
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model;
  int there;
  exists("/dev/full", &there);
  if (!there) SKIP("no /dev/full here");
  model = small_model(MOE_ROUTER_DENSE, &env);
  CHECK(model, "%s", said);
  CHECK(moe_model_save(model, "/dev/full", &env) == MOE_E_IO &&
            strstr(said, "/dev/full: writing failed after 0 bytes"),
        "%s", said);
  CHECK(sentences == 1, "%d sentences", sentences);
  exists("/dev/full.tmp", &there);
  CHECK(!there, "no file beside a device");
  moe_model_free(model);
#else
  SKIP("/dev/full is a thing of Linux");
#endif
}

static void test_files_paths_are_named(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = NULL;
  void *data = NULL;
  size_t bytes = 0;
  FILE *f;
  CHECK(moe_model_load(&model, "build/none.safetensors", &env) == MOE_E_IO &&
            strstr(said, "build/none.safetensors: "),
        "%s", said);
  CHECK(moe_model_load(&model, "build", &env) == MOE_E_IO && strstr(said, "a folder"), "%s", said);
  f = fopen("build/files_empty", "wb");
  CHECK(f, "build/files_empty");
  fclose(f);
  CHECK(moe_model_load(&model, "build/files_empty", &env) == MOE_E_FORMAT &&
            strstr(said, "build/files_empty: not a safetensors file: 0 bytes"),
        "%s", said);
  CHECK(moe_file_read(&data, &bytes, "build/files_empty", &env) == MOE_OK && bytes == 0 &&
            !*(char *)data,
        "an empty file can be read");
  moe_free(data);
  f = fopen("build/files_text", "wb");
  CHECK(f && fputs("/* no model: a text */\n", f) >= 0, "build/files_text");
  fclose(f);
  CHECK(moe_model_load(&model, "build/files_text", &env) == MOE_E_FORMAT &&
            strstr(said, "build/files_text: the first 8 bytes"),
        "%s", said);
  CHECK(!model, "untouched");
  remove("build/files_text");
  remove("build/files_empty");
}

/* What a killed program left over: a file that cannot be written to, a link to somebody's file, a
   pipe that nobody reads. */
static void test_files_leftovers_are_no_obstacle(void) {
#ifdef HAVE_POSIX
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_status answer = MOE_OK;
  void *data;
  size_t bytes;
  struct stat info;
  FILE *f = fopen("build/files_victim", "wb");
  int round;
  CHECK(f, "build/files_victim");
  fputs("mine", f);
  fclose(f);
  unlink("build/files_b.tmp");
  for (round = 0; round < 3; ++round) {
    if (round == 0) CHECK(symlink("files_victim", "build/files_b.tmp") == 0, "symlink");
    if (round == 1) CHECK(mkfifo("build/files_b.tmp", 0600) == 0, "mkfifo");
    if (round == 2) {
      f = fopen("build/files_b.tmp", "wb");
      CHECK(f && !fclose(f) && !chmod("build/files_b.tmp", 0400),
            "a file that only root can write to");
    }
    CHECK(moe_file_replace("build/files_b", half_written, &answer, &env) == MOE_OK, "round %d: %s",
          round, said);
    CHECK(lstat("build/files_b", &info) == 0 && S_ISREG(info.st_mode) && info.st_size == 4,
          "round %d", round);
    CHECK(lstat("build/files_b.tmp", &info) != 0, "nothing is left over");
  }
  CHECK(moe_file_read(&data, &bytes, "build/files_victim", &env) == MOE_OK &&
            !strcmp((char *)data, "mine"),
        "somebody's file");
  moe_free(data);
  unlink("build/files_victim");
  unlink("build/files_b");
#else
  SKIP("no links here");
#endif
}

/* A path without a folder is a file of the current folder. */
static void test_files_in_the_current_folder(void) {
#ifdef HAVE_POSIX
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  moe_status status;
  int yes, here = open(".", O_RDONLY);
  CHECK(model && here >= 0 && !chdir("build"), "build");
  status = moe_model_save(model, "files_bare", &env);
  if (!status) status = moe_model_load(&back, "files_bare", &env);
  unlink("files_bare");
  CHECK(!fchdir(here) && !close(here), "back");
  CHECK(!status && same_models(model, NULL, back), "%s", said);
  exists("files_bare", &yes);
  CHECK(!yes, "written elsewhere");
  moe_model_free(back);
  moe_model_free(model);
#else
  SKIP("no chdir here");
#endif
}

/* With standard output in a file, /dev/stdout leads to a file, and must not become one. */
static void test_files_open_files_are_written_to(void) {
#ifdef __linux__
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_status answer = MOE_OK;
  char path[40];
  struct stat info;
  FILE *f = fopen("build/files_open", "wb");
  CHECK(f, "build/files_open");
  snprintf(path, sizeof path, "/dev/fd/%d", fileno(f));
  if (lstat(path, &info)) SKIP("no /dev/fd here");
  CHECK(moe_file_replace(path, half_written, &answer, &env) == MOE_OK, "%s", said);
  CHECK(lstat(path, &info) == 0 && S_ISLNK(info.st_mode), "still a link");
  CHECK(stat("build/files_open", &info) == 0 && info.st_size == 4, "the file behind it");
  fclose(f);
  unlink("build/files_open");
#else
  SKIP("/dev/fd is a thing of Linux");
#endif
}

static void test_files_pipes_and_links(void) {
#ifdef HAVE_POSIX
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  struct stat info;
  FILE *f;
  CHECK(model && moe_model_save(model, "build/files_a", &env) == MOE_OK, "%s", said);
  CHECK(chmod("build/files_a", 0600) == 0, "chmod");
  CHECK(moe_model_save(model, "build/files_a", &env) == MOE_OK, "%s", said);
  CHECK(stat("build/files_a", &info) == 0 && (info.st_mode & 0777) == 0600,
        "the mode of the old file is kept");
  unlink("build/files_fifo");
  CHECK(mkfifo("build/files_fifo", 0600) == 0, "mkfifo");
  f = popen("cat build/files_a > build/files_fifo", "w");
  CHECK(f, "popen");
  CHECK(moe_model_load(&back, "build/files_fifo", &env) == MOE_OK, "%s", said);
  pclose(f);
  CHECK(same_models(model, moe_model_weights(back), back), "through a pipe");
  moe_model_free(back);
  moe_model_free(model);
  CHECK(moe_model_load(&back, "/dev/zero", &env) == MOE_E_IO && strstr(said, "a device"), "%s",
        said);
  unlink("build/files_fifo");
  unlink("build/files_a");
#else
  SKIP("no pipes here");
#endif
}

/* The members of a header in the other order, but for its metadata; the data stay. */
static void files_reverse_header(models_file *s) {
  size_t bytes = (size_t)s->data[0] | (size_t)s->data[1] << 8 | (size_t)s->data[2] << 16, n = 0;
  char *old = (char *)malloc(bytes + 1), *at, *to = (char *)s->data + 8, *member[200];
  memcpy(old, to, bytes);
  old[bytes] = 0;
  while (old[bytes - 1] == ' ') --bytes;
  old[bytes - 1] = 0; /* its closing brace */
  at = strstr(old, ",\"embeddings.");
  to += at - old;
  for (; at && n < 200; at = strstr(at + 1, ",\"")) /* also those within a member */
    if (at[-1] == '}') member[n++] = at;
  while (n-- > 0) {
    size_t length = strlen(member[n]);
    memcpy(to, member[n], length);
    to += length;
    *member[n] = 0;
  }
  free(old);
}

static void test_files_read_tensors_in_any_order(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *small, *back = NULL;
  models_file s = models_written(model, &env), again;
  size_t bytes;
  int round;
  CHECK(s.used, "%s", said);
  files_reverse_header(&s);
  CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_OK, "%s", said);
  CHECK(same_models(model, moe_model_weights(model), back), "the model");
  again = models_written(back, &env);
  CHECK(again.used == s.used && memcmp(again.data, s.data, s.used), "it has its own order again");
  CHECK(moe_model_open_size(s.data, s.used, &bytes, &env) == MOE_E_FORMAT &&
            strstr(said, "not listed in the order of their data"),
        "%s", said);
  free(s.data);
  free(again.data);
  moe_model_free(back);
  moe_model_free(model);
  for (round = 0; round < 2; ++round) { /* quantised, dense */
    small = small_model(MOE_ROUTER_DENSE, &env);
    if (round == 0) CHECK(!moe_model_quantize(&model, small, &env), "%s", said);
    if (round == 0) moe_model_free(small);
    if (round == 1) model = small;
    s = models_written(model, &env);
    again = models_written(model, &env);
    files_reverse_header(&s);
    back = NULL;
    CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_OK, "%s", said);
    free(s.data);
    s = models_written(back, &env);
    CHECK(s.used == again.used && !memcmp(s.data, again.data, s.used), "round %d", round);
    free(s.data);
    free(again.data);
    moe_model_free(back);
    moe_model_free(model);
  }
}

#ifdef HAVE_FSYNC
/* Writes a file of 40 MB in one piece. */
static moe_status files_large(void *user, const moe_writer *writer, const moe_env *env) {
  (void)env;
  return writer->write(writer->user, user, 40000000) ? MOE_E_IO : MOE_OK;
}
#endif

/* Hosts that refuse much at once get requests of 16 MB. */
static void test_files_are_read_in_pieces(void) {
#ifdef HAVE_FSYNC
  moe_env env = models_env(MOE_ISA_AUTO);
  const char *path = "build/files_large";
  char *data = (char *)malloc(40000000);
  void *back;
  size_t bytes = 0, i;
  CHECK(data, "no memory");
  for (i = 0; i < 40000000; ++i) data[i] = (char)(i * i >> 8);
  io_largest = 0;
  CHECK(!moe_file_replace(path, files_large, data, &env), "%s", said);
  CHECK(io_largest == 16777216, "a write of %zu bytes", io_largest);
  io_largest = 0;
  CHECK(!moe_file_read(&back, &bytes, path, &env), "%s", said);
  CHECK(io_largest == 16777216, "a read of %zu bytes", io_largest);
  CHECK(bytes == 40000000 && !memcmp(back, data, bytes), "%zu bytes", bytes);
  moe_free(back);
  free(data);
  unlink(path);
#else
  SKIP("no read and write of our own here");
#endif
}

/* The logits of the first task for three tokens. */
static int files_scores(float scores[6], const moe_model *model, const moe_env *env) {
  static const int32_t start[] = {0, 3}, ids[] = {2, 4, 3}, task[] = {0};
  moe_limits limits = {3, 1, 0, 0};
  moe_context *context;
  moe_batch batch;
  int good;
  memset(&batch, 0, sizeof batch);
  batch.S = 1, batch.seq_start = start, batch.ids = ids, batch.task = task;
  if (moe_context_create(&context, model, &limits, env)) return 0;
  good = !moe_forward(context, scores, &batch, env);
  moe_context_free(context);
  return good;
}

/* Loading takes the file, the packed weights and little else, and the model can be trained; what
   must be copied gives the same model. */
static void test_files_load_takes_weights_and_panels(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_TASK, 4, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model = NULL, *small = NULL, *back = NULL;
  const char *path = "build/files_load";
  moe_tensor t;
  models_file s;
  size_t before, panels;
  FILE *f;
  models_tasks(tasks);
  config.hidden = 64, config.ffn = 256, config.vocab = 3000;
  CHECK((model = models_create(&config, tasks, MODELS_TASKS, &env)) != NULL, "%s", said);
  CHECK(!moe_model_quantize(&small, model, &env), "%s", said);
  s = models_written(model, &env);
  CHECK(s.used && !moe_model_save(model, path, &env), "%s", said);
  panels = moe_model_pack_size(model);
  bytes_most = before = bytes_in_use;
  CHECK(!moe_model_load(&back, path, &env), "%s", said);
  if (!high_byte_first())
    CHECK(bytes_most - before < s.used + panels + 20000, "%zu bytes for a file of %zu and %zu",
          bytes_most - before, s.used, panels);
  CHECK(same_models(model, moe_model_weights(back), back), "another model");
  moe_model_weights(back)[0] = 1;
  moe_model_free(back);
  CHECK(bytes_in_use == before, "%zu bytes left", bytes_in_use - before);
  files_reverse_header(&s);
  f = fopen(path, "wb");
  CHECK(f && fwrite(s.data, 1, s.used, f) == s.used && !fclose(f), "no file");
  CHECK(!moe_model_load(&back, path, &env), "%s", said);
  CHECK(same_models(model, moe_model_weights(back), back), "in another order");
  moe_model_free(back);
  CHECK(!moe_model_save(small, path, &env) && !moe_model_load(&back, path, &env), "%s", said);
  CHECK(!moe_model_weights(back) && moe_model_type(back) == MOE_TYPE_I8 &&
            same_models(small, NULL, back),
        "int8");
  moe_model_free(back);
  free(s.data);
  t = models_tensor(model, "heads.two.bias");
  s = models_written(model, &env);
  memset(s.data + s.used - (moe_model_parameters(model) - t.offset) * sizeof(float), 0xff, 4);
  f = fopen(path, "wb");
  CHECK(f && fwrite(s.data, 1, s.used, f) == s.used && !fclose(f), "no file");
  CHECK(moe_model_load(&back, path, &env) == MOE_E_FORMAT &&
            strstr(said, "build/files_load: tensor heads.two.bias: element 0 is not a finite"),
        "%s", said);
  CHECK(bytes_in_use == before, "%zu bytes left", bytes_in_use - before);
  free(s.data);
  moe_model_free(small);
  moe_model_free(model);
  remove(path);
}

/* A mapped file has the bits of a loaded one and takes no memory. */
static void test_files_map_gives_the_same_answers(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env),
            *other = small_model(MOE_ROUTER_SHARED, &env), *mapped = NULL;
  const char *path = "build/files_map";
  moe_limits limits = {9, 3, 1, 0};
  moe_train_config train;
  moe_trainer *trainer = NULL;
  float want[6], got[6];
  size_t before = bytes_in_use;
  CHECK(model && other && !moe_model_save(model, path, &env), "%s", said);
  CHECK(!moe_model_map(&mapped, path, &env), "%s", said);
#if defined(HAVE_POSIX) || defined(_WIN32)
  CHECK(high_byte_first() || !moe_model_weights(mapped), "not in place");
  CHECK(high_byte_first() || bytes_in_use - before < 16384, "%zu bytes", bytes_in_use - before);
#endif
  CHECK(same_models(model, NULL, mapped), "another model");
  CHECK(files_scores(want, model, &env) && files_scores(got, mapped, &env), "%s", said);
  CHECK(!memcmp(want, got, sizeof got), "other bits");
#ifdef HAVE_POSIX
  CHECK(!moe_model_save(other, path, &env), "the file can be replaced: %s", said);
  CHECK(files_scores(got, mapped, &env) && !memcmp(want, got, sizeof got), "the old content stays");
  CHECK(!moe_model_save(model, path, &env), "%s", said);
#endif
  moe_train_config_init(&train);
  train.steps = 1;
  if (!moe_model_weights(mapped))
    CHECK(moe_trainer_create(&trainer, mapped, &limits, &train, &env) == MOE_E_ARGUMENT &&
              strstr(said, "opened in place cannot be trained"),
          "%s", said);
  if (!moe_model_weights(mapped))
    CHECK(moe_model_import(mapped, "", 0, NULL, &env) == MOE_E_ARGUMENT &&
              strstr(said, "cannot import into a model opened in place"),
          "%s", said);
  CHECK(!moe_model_pack(mapped, NULL, &env) && files_scores(got, mapped, &env) &&
            !memcmp(want, got, sizeof got),
        "packed");
  moe_model_free(mapped);
  CHECK(bytes_in_use == before, "%zu bytes left", bytes_in_use - before);
  moe_model_free(other);
  moe_model_free(model);
  remove(path);
}

/* An int8 model in place; what cannot be mapped is loaded, or refused with a sentence. */
static void test_files_map_takes_what_it_gets(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *mapped = NULL, *small = NULL;
  const char *path = "build/files_map";
  float want[6], got[6];
  models_file s;
  FILE *f;
  CHECK(!moe_model_quantize(&small, model, &env) && !moe_model_save(small, path, &env) &&
            !moe_model_map(&mapped, path, &env),
        "%s", said);
  CHECK(files_scores(want, small, &env) && files_scores(got, mapped, &env) &&
            !memcmp(want, got, sizeof got),
        "int8");
  moe_model_free(mapped);
  s = models_written(model, &env);
  files_reverse_header(&s);
  f = fopen(path, "wb");
  CHECK(f && fwrite(s.data, 1, s.used, f) == s.used && !fclose(f), "no file");
  CHECK(!moe_model_map(&mapped, path, &env) && moe_model_weights(mapped), "loaded: %s", said);
  CHECK(same_models(model, moe_model_weights(mapped), mapped), "in another order");
  moe_model_free(mapped);
  mapped = NULL;
  f = fopen(path, "wb");
  CHECK(f && fwrite(s.data, 1, s.used / 2, f) == s.used / 2 && !fclose(f), "no file");
  CHECK(moe_model_map(&mapped, path, &env) == MOE_E_FORMAT && !mapped &&
            strstr(said, "build/files_map: "),
        "%s", said);
  CHECK(moe_model_map(&mapped, "build/none", &env) == MOE_E_IO && strstr(said, "build/none"), "%s",
        said);
  CHECK(moe_model_map(&mapped, "build", &env) == MOE_E_IO && strstr(said, "a folder"), "%s", said);
  f = fopen(path, "wb");
  CHECK(f && !fclose(f) && moe_model_map(&mapped, path, &env) == MOE_E_FORMAT && !mapped,
        "an empty file: %s", said);
  free(s.data);
  moe_model_free(small);
  moe_model_free(model);
  remove(path);
}

/* Each allocation of loading and mapping fails in turn: a model by another way, or a sentence. */
static void test_files_load_survives_every_failing_allocation(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env);
  const char *path = "build/files_allocations";
  int map, i, last;
  CHECK(model && !moe_model_save(model, path, &env), "%s", said);
  for (map = 0; map < 2; ++map)
    for (i = 0, last = 0; !last && i < 50; ++i) {
      size_t before = bytes_in_use;
      moe_model *back = NULL;
      moe_status status;
      said[0] = 0;
      allocations = 0, fail_at = i;
      status = map ? moe_model_map(&back, path, &env) : moe_model_load(&back, path, &env);
      last = allocations <= i;
      fail_at = -1;
      CHECK(status == MOE_OK || (status == MOE_E_MEMORY && !back && strlen(said) > 20),
            "allocation %d: status %d, '%s'", i, (int)status, said);
      if (!status) CHECK(same_models(model, moe_model_weights(back), back), "allocation %d", i);
      moe_model_free(back);
      CHECK(bytes_in_use == before, "allocation %d: %zu bytes left", i, bytes_in_use - before);
    }
  CHECK(last, "it never ends");
  moe_model_free(model);
  remove(path);
}

/* The length of the header in the other byte order, as of a tool that swaps bytes. */
static void test_files_of_the_other_byte_order_are_refused(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  models_file s = models_written(model, &env);
  size_t bytes, i;
  for (i = 0; i < 4; ++i) {
    unsigned char c = s.data[i];
    s.data[i] = s.data[7 - i], s.data[7 - i] = c;
  }
  CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_E_FORMAT && strlen(said) > 20, "%s",
        said);
  CHECK(moe_model_open_size(s.data, s.used, &bytes, &env) == MOE_E_FORMAT &&
            strstr(said, "not a safetensors file"),
        "%s", said);
  free(s.data);
  moe_model_free(model);
}

/* Two tensors of one shape change their names: the header is in the order of the bytes, but not in
   the model's. Reading puts both where they belong; a model in place would take one for the
   other. */
static void test_files_tensors_in_each_others_place(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  models_file s = models_written(model, &env);
  moe_tensor a, b;
  const uint16_t one = 1;
  size_t bytes;
  void *raw, *block;
  CHECK(s.used, "%s", said);
  CHECK(files_rename_all(&s, "0.experts.1.i", "0.experts.#.i") == 2 &&
            files_rename_all(&s, "0.experts.2.i", "0.experts.1.i") == 2 &&
            files_rename_all(&s, "0.experts.#.i", "0.experts.2.i") == 2,
        "the names");
  CHECK(moe_model_read(&back, s.data, s.used, &env) == MOE_OK, "%s", said);
  a = models_tensor(model, "encoder.layer.0.experts.1.intermediate.dense.weight");
  b = models_tensor(model, "encoder.layer.0.experts.2.intermediate.dense.weight");
  CHECK(!memcmp(moe_model_weights(model) + a.offset, moe_model_weights(back) + b.offset,
                a.count * sizeof(float)) &&
            !memcmp(moe_model_weights(model) + b.offset, moe_model_weights(back) + a.offset,
                    a.count * sizeof(float)),
        "each has the other's values");
  CHECK(moe_model_open_size(s.data, s.used, &bytes, &env) == MOE_OK, "%s", said);
  block = models_block(&raw, bytes);
  if (*(const unsigned char *)&one == 1) /* a big-endian machine uses no file in place */
    CHECK(
        moe_model_open(&back, s.data, s.used, block, bytes, &env) == MOE_E_FORMAT &&
            strstr(said, "tensor encoder.layer.0.experts.2.intermediate.dense.weight begins at") &&
            strstr(said, "load the file with moe_model_load and save it again"),
        "%s", said);
  free(raw);
  free(s.data);
  moe_model_free(back);
  moe_model_free(model);
}

/* A header's metadata: a text by a name that is there, and each of them twice. */
static void test_files_metadata_twice_is_refused(void) {
  static const char *const key[] = {"moe.version", "moe.config", "moe.tasks", "__metadata__"};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  models_file s = models_written(model, &env);
  int i;
  CHECK(s.used, "%s", said);
  for (i = 0; i < 4; ++i) {
    char member[64], *header, *at;
    size_t length = 0, n, k;
    unsigned char *file;
    n = (size_t)snprintf(member, sizeof member, i < 3 ? "\"%s\":\"1\"," : "\"%s\":{},", key[i]);
    for (k = 8; k-- > 0;) length = length << 8 | s.data[k];
    file = (unsigned char *)malloc(s.used + n);
    header = (char *)s.data + 8;
    at = i < 3 ? strstr(header, ":{") + 2 : strchr(header, '{') + 1;
    k = (size_t)(at - (char *)s.data);
    memcpy(file, s.data, k);
    memcpy(file + k, member, n);
    memcpy(file + k + n, s.data + k, s.used - k);
    for (k = 0; k < 8; ++k) file[k] = (unsigned char)((uint64_t)(length + n) >> (8 * k));
    said[0] = 0;
    CHECK(moe_model_read(&back, file, s.used + n, &env) == MOE_E_FORMAT && strstr(said, key[i]),
          "%s: '%s'", key[i], said);
    free(file);
  }
  CHECK(!back, "untouched");
  free(s.data);
  moe_model_free(model);
}

/* Escapes in the labels of a file, which is JSON in JSON, by value: one to four bytes of UTF-8. */
static void test_files_labels_with_escapes(void) {
  static const struct {
    const char *escape, *bytes;
  } some[] = {{"\\\\u00e9\\\\u07ff", "\xc3\xa9\xdf\xbf"},
              {"\\\\u0080\\\\u007f", "\xc2\x80\x7f"},
              {"\\\\u0800\\\\u20AC", "\xe0\xa0\x80\xe2\x82\xac"},
              {"\\\\uFFFF\\\\u0001", "\xef\xbf\xbf\x01"},
              {"\\\\ud83d\\\\ude00", "\xf0\x9f\x98\x80"},
              {"\\\\uDBFF\\\\uDFFF", "\xf4\x8f\xbf\xbf"},
              {"\\u00e9\\u07ff..", "\xc3\xa9\xdf\xbf.."}, /* resolved by the outer JSON */
              {"\\\\t\\\\n\\\\/.....", "\t\n/....."}};
  static const char was[] = "fourteen bytes";
  const char *label[] = {was, "other"};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config config = models_config(MOE_ROUTER_DENSE, 1, 1);
  moe_task task;
  moe_model *model = NULL;
  size_t i;
  memset(&task, 0, sizeof task);
  strcpy(task.name, "escaped");
  task.classes = 2;
  task.label = label;
  CHECK(!moe_model_create(&model, &config, &task, 1, 7, &env), "%s", said);
  for (i = 0; i < sizeof some / sizeof *some; ++i) {
    moe_model *back = NULL;
    models_file s = models_written(model, &env);
    CHECK(s.used && strlen(some[i].escape) == 14, "%s", said);
    CHECK(files_rename_all(&s, was, some[i].escape) == 1, "the label");
    CHECK(!moe_model_read(&back, s.data, s.used, &env), "%zu: %s", i, said);
    CHECK(!strcmp(moe_model_task(back, 0)->label[0], some[i].bytes), "%zu: '%s'", i,
          moe_model_task(back, 0)->label[0]);
    free(s.data);
    moe_model_free(back);
  }
  moe_model_free(model);
}

#ifdef HAVE_POSIX
enum { FILES_WRITERS = 4, FILES_ROUNDS = 30, FILES_BYTES = 40000 };

/* One letter, many times. */
static moe_status files_write_letter(void *user, const moe_writer *writer, const moe_env *env) {
  char text[1000];
  int i;
  (void)env;
  memset(text, *(const char *)user, sizeof text);
  for (i = 0; i < FILES_BYTES / 1000; ++i)
    if (writer->write(writer->user, text, sizeof text)) return MOE_E_IO;
  return MOE_OK;
}

/* Whether the file is one writer's from end to end. */
static int files_one_letter(const char *path, const moe_env *env) {
  void *data;
  size_t bytes, i;
  int good;
  if (moe_file_read(&data, &bytes, path, env)) return 0;
  good = bytes == FILES_BYTES;
  for (i = 1; i < bytes; ++i) good &= ((char *)data)[i] == ((char *)data)[0];
  moe_free(data);
  return good;
}

static void *files_writer(void *letter) {
  moe_env env;
  int i;
  moe_env_init(&env, MOE_ISA_SCALAR);
  for (i = 0; i < FILES_ROUNDS; ++i)
    if (moe_file_replace("build/files_shared", files_write_letter, letter, &env) ||
        !files_one_letter("build/files_shared", &env))
      return letter;
  return NULL;
}

/* Writes half of a file and is killed. */
static moe_status files_killed(void *user, const moe_writer *writer, const moe_env *env) {
  (void)user, (void)env;
  writer->write(writer->user, "half", 4);
  raise(SIGKILL);
  return MOE_OK;
}
#endif

static void test_files_writers_do_not_share_a_temporary(void) {
#ifdef HAVE_POSIX
  static char letter[FILES_WRITERS] = {'a', 'b', 'c', 'd'};
  pthread_t thread[FILES_WRITERS];
  moe_env env = models_env(MOE_ISA_AUTO);
  void *failed = NULL, *any = NULL;
  int i, there, status;
  pid_t child;
  for (i = 0; i < FILES_WRITERS; ++i)
    CHECK(!pthread_create(&thread[i], NULL, files_writer, &letter[i]), "thread %d", i);
  for (i = 0; i < FILES_WRITERS; ++i) {
    pthread_join(thread[i], &failed);
    if (failed) any = failed;
  }
  CHECK(!any, "writer %c", *(char *)any);
  for (i = 0; i < FILES_WRITERS; ++i) {
    char name[64];
    snprintf(name, sizeof name, i ? "build/files_shared.tmp%d" : "build/files_shared.tmp", i);
    exists(name, &there);
    CHECK(!there, "%s is left over", name);
  }
  child = fork();
  if (child == 0) {
    moe_file_replace("build/files_shared", files_killed, NULL, NULL);
    _exit(0);
  }
  CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status), "a child");
  exists("build/files_shared.tmp", &there);
  CHECK(there && files_one_letter("build/files_shared", &env), "what it leaves");
  CHECK(!moe_file_replace("build/files_shared", files_write_letter, letter, &env), "%s", said);
  exists("build/files_shared.tmp", &there);
  CHECK(!there && files_one_letter("build/files_shared", &env), "the next writer takes it away");
  unlink("build/files_shared");
#else
  SKIP("no processes to kill here");
#endif
}

static void test_files_temporary_of_a_living_writer_stays(void) {
#if defined(HAVE_POSIX) && defined(LOCK_EX)
  static const char *const stale[] = {"build/files_alive.tmp1", "build/files_alive.tmp15"};
  char letter = 'x';
  moe_env env = models_env(MOE_ISA_AUTO);
  int fd = open("build/files_alive.tmp", O_CREAT | O_RDWR, 0600), i, there;
  CHECK(fd >= 0 && !flock(fd, LOCK_EX), "build/files_alive.tmp");
  for (i = 0; i < 2; ++i) fclose(fopen(stale[i], "wb"));
  CHECK(!moe_file_replace("build/files_alive", files_write_letter, &letter, &env), "%s", said);
  CHECK(files_one_letter("build/files_alive", &env), "the file");
  for (i = 0; i < 2; ++i) {
    exists(stale[i], &there);
    CHECK(!there, "%s is left over", stale[i]);
  }
  exists("build/files_alive.tmp", &there);
  CHECK(there, "the living one's");
  close(fd);
  CHECK(!moe_file_replace("build/files_alive", files_write_letter, &letter, &env), "%s", said);
  exists("build/files_alive.tmp", &there);
  CHECK(!there, "its writer is gone");
  unlink("build/files_alive");
#else
  SKIP("no locks here");
#endif
}

static void test_files_locks_keep_a_second_one_out(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_lock *lock = NULL, *second = NULL, *other = NULL;
  const char *path = "build/files_locked";
  int there;
  FILE *f;
  remove("build/files_locked.lock");
  CHECK(!moe_file_lock(&lock, path, &env) && lock, "%s", said);
  CHECK(moe_file_lock(&second, path, &env) == MOE_E_IO && !second &&
            strstr(said, "build/files_locked: another program works on it") &&
            strstr(said, "remove build/files_locked.lock"),
        "%s", said);
  CHECK(!moe_file_lock(&other, "build/files_locked2", &env), "another path: %s", said);
  moe_file_unlock(other);
  moe_file_unlock(lock);
  exists("build/files_locked.lock", &there);
  CHECK(!there, "the lock is given back");
  CHECK(!moe_file_lock(&lock, path, &env), "%s", said);
  moe_file_unlock(lock);
  moe_file_unlock(NULL);
  f = fopen("build/files_locked.lock", "wb"); /* somebody's file of that name */
  CHECK(f && fputs("mine", f) >= 0 && !fclose(f), "a file");
  CHECK(moe_file_lock(&lock, path, &env) == MOE_E_IO, "%s", said);
  exists("build/files_locked.lock", &there);
  CHECK(there, "it is not ours to remove");
  remove("build/files_locked.lock");
  CHECK(moe_file_lock(&lock, "build", &env) == MOE_E_IO && strstr(said, "a folder"), "%s", said);
  CHECK(moe_file_lock(&lock, "build/none/file", &env) == MOE_E_IO &&
            strstr(said, "build/none/file.lock: cannot be written"),
        "%s", said);
}

static void test_files_locks_of_killed_holders_are_taken(void) {
#ifdef HAVE_POSIX
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_lock *lock = NULL;
  const char *path = "build/files_held";
  int status, there, to_parent[2];
  char byte;
  pid_t child;
  CHECK(!pipe(to_parent), "pipe");
  child = fork();
  if (child == 0) {
    if (moe_file_lock(&lock, path, NULL)) _exit(1);
    if (write(to_parent[1], "x", 1) == 1)
      for (;;) pause();
    _exit(2);
  }
  CHECK(child > 0 && read(to_parent[0], &byte, 1) == 1, "a child");
#ifdef LOCK_EX
  CHECK(moe_file_lock(&lock, path, &env) == MOE_E_IO, "a living holder keeps it");
#endif
  CHECK(!kill(child, SIGKILL) && waitpid(child, &status, 0) == child && WIFSIGNALED(status),
        "kill");
  exists("build/files_held.lock", &there);
  CHECK(there, "what it leaves");
  CHECK(!moe_file_lock(&lock, path, &env), "%s", said);
  moe_file_unlock(lock);
  exists("build/files_held.lock", &there);
  CHECK(!there, "it is given back");
  CHECK(!moe_file_lock(&lock, "/dev/null", &env), "a device has none: %s", said);
  moe_file_unlock(lock);
  close(to_parent[0]), close(to_parent[1]);
#else
  SKIP("no processes to kill here");
#endif
}

/* The disk says at the end that it has lost what it took. */
static void test_files_fsync_that_fails_is_reported(void) {
#ifdef HAVE_FSYNC
  static const int harmless[] = {EINVAL, EROFS}; /* what cannot be flushed: pipes and the like */
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env);
  const char *path = "build/files_fsync";
  void *before, *after;
  size_t bytes, bytes_after;
  int i, there;
  CHECK(model && !moe_model_save(model, path, &env), "%s", said);
  CHECK(!moe_file_read(&before, &bytes, path, &env), "%s", said);
  CHECK(fsync_calls >= 1, "a file is flushed");
  moe_model_weights(model)[0] += 1;
  fsync_fails = EIO;
  said[0] = 0;
  CHECK(moe_model_save(model, path, &env) == MOE_E_IO, "a failed flush is a success");
  fsync_fails = 0;
  CHECK(strstr(said, "writing failed after") && strstr(said, strerror(EIO)), "%s", said);
  CHECK(!moe_file_read(&after, &bytes_after, path, &env), "%s", said);
  CHECK(bytes == bytes_after && !memcmp(before, after, bytes), "the old file is whole");
  exists("build/files_fsync.tmp", &there);
  CHECK(!there, "the new one is gone");
  for (i = 0; i < 2; ++i) {
    fsync_fails = harmless[i];
    CHECK(!moe_model_save(model, path, &env), "%s", said);
    fsync_fails = 0;
  }
  moe_free(before);
  moe_free(after);
  moe_model_free(model);
  unlink(path);
#else
  SKIP("no fsync of our own here");
#endif
}

/* The system takes and gives a few bytes at a time, and every third call is interrupted. */
static void test_files_are_whole_after_short_writes_and_reads(void) {
#ifdef HAVE_FSYNC
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_model *model = small_model(MOE_ROUTER_TASK, &env), *back = NULL;
  models_file whole = models_written(model, &env);
  const char *path = "build/files_short";
  void *data;
  size_t bytes;
  moe_status status;
  CHECK(whole.used, "%s", said);
  io_most = 7;
  status = moe_model_save(model, path, &env);
  io_most = 0;
  CHECK(!status, "%s", said);
  CHECK(!moe_file_read(&data, &bytes, path, &env), "%s", said);
  CHECK(bytes == whole.used && !memcmp(data, whole.data, bytes), "written");
  moe_free(data);
  io_most = 13;
  status = moe_model_load(&back, path, &env);
  io_most = 0;
  CHECK(!status, "%s", said);
  CHECK(same_models(model, moe_model_weights(back), back), "read");
  io_fails = EIO; /* in the middle */
  io_most = 1000;
  status = moe_model_load(&back, path, &env);
  CHECK(status == MOE_E_IO && strstr(said, "build/files_short: reading failed after"), "%s", said);
  io_fails = ENOSPC;
  status = moe_model_save(model, path, &env);
  io_most = 0;
  io_fails = 0;
  CHECK(status == MOE_E_IO && strstr(said, "build/files_short.tmp: writing failed after") &&
            strstr(said, strerror(ENOSPC)),
        "%s", said);
  CHECK(!moe_file_read(&data, &bytes, path, &env), "%s", said);
  CHECK(bytes == whole.used && !memcmp(data, whole.data, bytes), "the old file is whole");
  moe_free(data);
  free(whole.data);
  moe_model_free(back);
  moe_model_free(model);
  unlink(path);
#else
  SKIP("no read and write of our own here");
#endif
}

static void run_files(void) {
  RUN(test_files_round_trip_is_bit_exact);
  RUN(test_files_open_in_place);
  RUN(test_files_truncated_are_refused);
  RUN(test_files_damaged_are_refused_or_read);
  RUN(test_files_sentences_name_the_cause);
  RUN(test_files_every_missing_tensor_is_named);
  RUN(test_files_second_vocabularies_and_nan_are_found);
  RUN(test_files_weights_that_cannot_be_read_are_not_written);
  RUN(test_files_failing_writer_is_reported);
  RUN(test_files_old_file_survives_a_failure);
  RUN(test_files_failed_save_keeps_the_old_file);
  RUN(test_files_disk_full_is_reported);
  RUN(test_files_paths_are_named);
  RUN(test_files_in_the_current_folder);
  RUN(test_files_leftovers_are_no_obstacle);
  RUN(test_files_open_files_are_written_to);
  RUN(test_files_pipes_and_links);
  RUN(test_files_read_tensors_in_any_order);
  RUN(test_files_are_read_in_pieces);
  RUN(test_files_load_takes_weights_and_panels);
  RUN(test_files_map_gives_the_same_answers);
  RUN(test_files_map_takes_what_it_gets);
  RUN(test_files_load_survives_every_failing_allocation);
  RUN(test_files_of_the_other_byte_order_are_refused);
  RUN(test_files_writers_do_not_share_a_temporary);
  RUN(test_files_temporary_of_a_living_writer_stays);
  RUN(test_files_tensors_in_each_others_place);
  RUN(test_files_metadata_twice_is_refused);
  RUN(test_files_labels_with_escapes);
  RUN(test_files_locks_keep_a_second_one_out);
  RUN(test_files_locks_of_killed_holders_are_taken);
  RUN(test_files_fsync_that_fails_is_reported);
  RUN(test_files_are_whole_after_short_writes_and_reads);
}
