/* Published encoders into models: names, number formats and shapes as they occur on the hub. */

/* Keeps all sentences, a line each. */
static void remember(void *user, moe_status status, const char *sentence) {
  size_t used = strlen(said);
  (void)user;
  (void)status;
  snprintf(said + used, sizeof said - used, "%s\n", sentence);
  ++sentences;
}

static moe_env logging(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  env.log = remember;
  return env;
}

enum { LAYERS = 2, HIDDEN = 4, INNER = 6, WORDS = 9, POSITIONS = 8 };

/* A file is built tensor by tensor: a header that grows, and bytes behind it. */
typedef struct builder {
  char header[16384];
  unsigned char body[65536];
  size_t used;
} builder;

static float value_of(const char *name, size_t i) {
  uint64_t h = 99;
  for (; *name; ++name) h = h * 31 + (unsigned char)*name;
  h += i * 7919;
  test_random(&h);
  return (float)((int)(h >> 40 & 255) - 128) / 64; /* exact in every format: 8 bits */
}

static void put(builder *b, const char *name, const char *stored_as, const char *dtype, int rows,
                int cols) {
  size_t n = (size_t)rows * (size_t)(cols ? cols : 1), i, begin = b->used,
         length = strlen(b->header);
  char shape[40];
  for (i = 0; i < n; ++i) {
    float f = value_of(name, i);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (!strcmp(dtype, "F16")) {
      uint32_t e = bits >> 23 & 255;
      bits = f == 0 ? 0 : (bits >> 16 & 0x8000u) | (e - 112) << 10 | (bits >> 13 & 1023);
    }
    if (!strcmp(dtype, "BF16")) bits >>= 16;
    if (!strcmp(dtype, "F64")) {
      double wide = (double)f;
      uint64_t word;
      int k;
      memcpy(&word, &wide, 8);
      for (k = 0; k < 8; ++k) b->body[b->used++] = (unsigned char)(word >> 8 * k & 255);
      continue;
    }
    b->body[b->used++] = (unsigned char)(bits & 255);
    b->body[b->used++] = (unsigned char)(bits >> 8 & 255);
    if (strcmp(dtype, "F32")) continue;
    b->body[b->used++] = (unsigned char)(bits >> 16 & 255);
    b->body[b->used++] = (unsigned char)(bits >> 24);
  }
  if (cols)
    snprintf(shape, sizeof shape, "%d,%d", rows, cols);
  else
    snprintf(shape, sizeof shape, "%d", rows);
  snprintf(b->header + length, sizeof b->header - length,
           ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%u,%u]}", stored_as, dtype,
           shape, (unsigned)begin, (unsigned)b->used);
}

typedef struct flavour {
  const char *prefix, *dtype, *weight, *bias;
  int extras, layers;
  const char *missing, *misshapen; /* names, or NULL */
  const char *foreign;             /* a tensor more, with its prefix, or NULL */
  int positions;
} flavour;

static void put_named(builder *b, const flavour *how, const char *name, int rows, int cols) {
  char stored[256], *dot;
  if (how->missing && !strcmp(how->missing, name)) return;
  if (how->misshapen && !strcmp(how->misshapen, name)) ++rows;
  snprintf(stored, sizeof stored, "%s%s", how->prefix, name);
  dot = strrchr(stored, '.');
  if (strstr(stored, "LayerNorm"))
    snprintf(dot, sizeof stored - (size_t)(dot - stored), ".%s",
             strcmp(dot, ".weight") ? how->bias : how->weight);
  put(b, name, stored, how->dtype, rows, cols);
}

/* The bytes of a small encoder; *n their number. */
static unsigned char *encoder_file(const flavour *how, size_t *n) {
  builder *b = (builder *)calloc(1, sizeof *b);
  unsigned char *file;
  size_t length, i;
  int l, p;
  static const char *const part[] = {"attention.self.query", "attention.self.key",
                                     "attention.self.value", "attention.output.dense"};
  char name[128];
  snprintf(b->header, sizeof b->header, "{\"__metadata__\":{\"format\":\"pt\"}");
  if (how->extras) {
    put(b, "x", "cls.predictions.bias", "F32", WORDS, 0);
    put(b, "x", "embeddings.position_ids", "F16", 1, POSITIONS);
    put(b, "x", "bert.pooler.scale", "F4", 3, 3); /* a dtype of the future */
  }
  put_named(b, how, "embeddings.LayerNorm.weight", HIDDEN, 0);
  put_named(b, how, "embeddings.LayerNorm.bias", HIDDEN, 0);
  put_named(b, how, "embeddings.word_embeddings.weight", WORDS, HIDDEN);
  put_named(b, how, "embeddings.position_embeddings.weight", how->positions, HIDDEN);
  put_named(b, how, "embeddings.token_type_embeddings.weight", 2, HIDDEN);
  for (l = 0; l < how->layers; ++l) {
    for (p = 0; p < 4; ++p) {
      snprintf(name, sizeof name, "encoder.layer.%d.%s.weight", l, part[p]);
      put_named(b, how, name, HIDDEN, HIDDEN);
      snprintf(name, sizeof name, "encoder.layer.%d.%s.bias", l, part[p]);
      put_named(b, how, name, HIDDEN, 0);
    }
    for (p = 0; p < 2; ++p) {
      snprintf(name, sizeof name, "encoder.layer.%d.%soutput.LayerNorm.weight", l,
               p ? "attention." : "");
      put_named(b, how, name, HIDDEN, 0);
      snprintf(name, sizeof name, "encoder.layer.%d.%soutput.LayerNorm.bias", l,
               p ? "attention." : "");
      put_named(b, how, name, HIDDEN, 0);
      snprintf(name, sizeof name, "encoder.layer.%d.%s.dense.weight", l,
               p ? "intermediate" : "output");
      put_named(b, how, name, p ? INNER : HIDDEN, p ? HIDDEN : INNER);
      snprintf(name, sizeof name, "encoder.layer.%d.%s.dense.bias", l,
               p ? "intermediate" : "output");
      put_named(b, how, name, p ? INNER : HIDDEN, 0);
    }
  }
  if (how->extras) put(b, "x", "bert.pooler.dense.weight", "F32", HIDDEN, HIDDEN);
  if (how->foreign) put(b, "x", how->foreign, "F32", 2, 2);
  length = strlen(b->header);
  snprintf(b->header + length, sizeof b->header - length, "}");
  ++length;
  *n = 8 + length + b->used;
  file = (unsigned char *)malloc(*n);
  for (i = 0; i < 8; ++i) file[i] = (unsigned char)((uint64_t)length >> (8 * i));
  memcpy(file + 8, b->header, length);
  memcpy(file + 8 + length, b->body, b->used);
  free(b);
  return file;
}

static flavour plain(void) {
  flavour f;
  memset(&f, 0, sizeof f);
  f.prefix = "";
  f.dtype = "F32";
  f.weight = "weight";
  f.bias = "bias";
  f.layers = LAYERS;
  f.positions = POSITIONS;
  return f;
}

static moe_model *empty_model(moe_router router, int32_t experts, int32_t layers,
                              const moe_env *env) {
  moe_config config;
  moe_task task[2];
  moe_model *model = NULL;
  moe_config_init(&config);
  config.layers = layers;
  config.hidden = HIDDEN;
  config.ffn = INNER;
  config.heads = 2;
  config.vocab = WORDS;
  config.positions = config.max_len = POSITIONS;
  config.router = router;
  config.experts = experts;
  memset(task, 0, sizeof task);
  snprintf(task[0].name, sizeof task[0].name, "a");
  snprintf(task[1].name, sizeof task[1].name, "b");
  task[0].classes = task[1].classes = 2;
  moe_model_create(&model, &config, task, 2, 3, env);
  return model;
}

/* The name in the file of a copied tensor: without experts.NUMBER. */
static void without_expert(char name[128]) {
  char *experts = strstr(name, "experts."), *rest;
  if (!experts) return;
  rest = strchr(experts + strlen("experts."), '.') + 1;
  memmove(experts, rest, strlen(rest) + 1);
}

/* Every tensor but gates and heads holds what the file has under its name; those two what they had.
 */
static void check_values(moe_model *model, moe_model *before) {
  int32_t i;
  size_t k;
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    char name[128];
    float *w;
    moe_model_tensor(model, i, &t);
    w = moe_model_weights(model) + t.offset;
    if (strstr(t.name, ".gate.") || !strncmp(t.name, "heads.", 6)) {
      CHECK(!memcmp(w, moe_model_weights(before) + t.offset, t.count * sizeof(float)),
            "%s was changed", t.name);
      continue;
    }
    memcpy(name, t.name, sizeof name);
    without_expert(name);
    for (k = 0; k < t.count; ++k)
      CHECK(w[k] == value_of(name, k), "%s[%zu] is %g, not %g", t.name, k, (double)w[k],
            (double)value_of(name, k));
  }
}

static void test_import_takes_names_and_formats_of_the_hub(void) {
  static const flavour some[] = {
      {"", "F32", "weight", "bias", 0, LAYERS, NULL, NULL, NULL, POSITIONS},
      {"bert.", "F32", "gamma", "beta", 1, LAYERS, NULL, NULL, NULL, POSITIONS},
      {"model.", "F16", "weight", "bias", 0, LAYERS, NULL, NULL, NULL, POSITIONS},
      {"", "F64", "weight", "beta", 1, LAYERS, NULL, NULL, NULL, POSITIONS},
      {"a.b.encoder0.", "BF16", "gamma", "beta", 1, LAYERS, NULL, NULL, NULL, POSITIONS}};
  size_t i, n;
  moe_env env = logging();
  for (i = 0; i < sizeof some / sizeof *some; ++i) {
    int router;
    unsigned char *file = encoder_file(&some[i], &n);
    moe_config config;
    moe_config_init(&config);
    CHECK(moe_import_sizes(&config, file, n, &env) == MOE_OK, "%s", said);
    CHECK(config.layers == LAYERS && config.hidden == HIDDEN && config.ffn == INNER &&
              config.vocab == WORDS,
          "sizes of flavour %zu", i);
    CHECK(config.positions == POSITIONS && config.segments == 2 && config.max_len == POSITIONS,
          "sizes of flavour %zu", i);
    config.max_len = 3; /* the caller's, which fits */
    CHECK(moe_import_sizes(&config, file, n, &env) == MOE_OK && config.max_len == 3, "max_len %d",
          (int)config.max_len);
    for (router = MOE_ROUTER_DENSE; router <= MOE_ROUTER_TASK; ++router) {
      int32_t experts = router == MOE_ROUTER_DENSE ? 1 : 12;
      moe_model *model = empty_model((moe_router)router, experts, LAYERS, &env),
                *before = empty_model((moe_router)router, experts, LAYERS, &env);
      CHECK(model && before, "%s", said);
      CHECK(moe_model_import(model, file, n, NULL, &env) == MOE_OK, "flavour %zu: %s", i, said);
      check_values(model, before);
      CHECK_STATE();
      moe_model_free(model);
      moe_model_free(before);
    }
    free(file);
  }
  CHECK(!sentences, "%s", said);
}

static void import_refused(const flavour *how, int32_t layers, const char *says, int count) {
  moe_env env = logging();
  size_t n, bytes;
  unsigned char *file = encoder_file(how, &n);
  moe_model *model = empty_model(MOE_ROUTER_SHARED, 2, layers, &env);
  float *before;
  CHECK(model, "%s", said);
  bytes = moe_model_parameters(model) * sizeof(float);
  before = (float *)malloc(bytes);
  memcpy(before, moe_model_weights(model), bytes);
  CHECK(moe_model_import(model, file, n, NULL, &env) == MOE_E_FORMAT && strstr(said, says),
        "said '%s'", said);
  CHECK(!count || sentences == count, "%d sentences: %s", sentences, said);
  CHECK(!memcmp(before, moe_model_weights(model), bytes), "nothing is changed");
  free(before);
  free(file);
  moe_model_free(model);
}

static void test_import_names_every_fault_and_changes_nothing(void) {
  flavour f = plain();
  f.missing = "encoder.layer.1.attention.self.key.bias";
  import_refused(
      &f, LAYERS,
      "tensor encoder.layer.1.attention.self.key.bias is missing: expected F32, F16, BF16 or F64 "
      "of (4)",
      1);
  CHECK_STATE();
  f.misshapen = "encoder.layer.0.output.dense.weight";
  f.prefix = "bert.";
  import_refused(
      &f, LAYERS,
      "tensor bert.encoder.layer.0.output.dense.weight: expected F32, F16, BF16 or F64 of (4, 6), "
      "found F32 of (5, 6)",
      2);
  CHECK_STATE();
  f = plain();
  f.missing = "embeddings.word_embeddings.weight";
  import_refused(&f, LAYERS, "not an encoder like BERT", 1);
  CHECK_STATE();
  f = plain();
  f.missing = "encoder.layer.0.output.LayerNorm.bias";
  import_refused(&f, LAYERS, "encoder.layer.0.output.LayerNorm.bias is missing", 1);
  CHECK_STATE();
  f = plain();
  import_refused(&f, LAYERS + 1, "output.LayerNorm.bias is missing", 16); /* all of a layer */
  CHECK_STATE();
  import_refused(&f, LAYERS + 2, "and 16 more tensors are missing or wrong", 17);
  CHECK_STATE();
  import_refused(&f, LAYERS - 1, "the model has 1 layers, the file has 2", 1);
  CHECK_STATE();
  f.prefix = "roberta.";
  import_refused(&f, LAYERS, "RoBERTa", 1);
}

/* Where sizes come from tensors, each of them is needed. */
static void test_import_sizes_name_what_is_missing(void) {
  static const char *const name[] = {"embeddings.position_embeddings.weight",
                                     "embeddings.token_type_embeddings.weight",
                                     "encoder.layer.0.intermediate.dense.weight"};
  moe_env env = logging();
  int i;
  for (i = 0; i < 3; ++i) {
    flavour f = plain();
    moe_config config, same;
    size_t n;
    unsigned char *file;
    char says[100];
    f.missing = name[i];
    file = encoder_file(&f, &n);
    moe_config_init(&config);
    same = config;
    snprintf(says, sizeof says, "tensor %s is missing", name[i]);
    CHECK(moe_import_sizes(&config, file, n, &env) == MOE_E_FORMAT && strstr(said, says), "%s",
          said);
    CHECK(!memcmp(&config, &same, sizeof config), "the sizes are changed");
    free(file);
  }
}

static void test_import_refuses_other_dtypes_nan_and_damage(void) {
  moe_env env = logging();
  flavour f = plain();
  size_t n, i;
  unsigned char *file = encoder_file(&f, &n), *at;
  moe_model *model = empty_model(MOE_ROUTER_TASK, 2, LAYERS, &env);
  moe_config config;
  uint64_t state = 8;
  int sound = 0;
  CHECK(model, "%s", said);
  CHECK(moe_model_import(model, file, n - 1, NULL, &env) == MOE_E_FORMAT &&
            strstr(said, "truncated"),
        "%s", said);
  for (i = 0; i < n; i += 13) {
    CHECK(moe_model_import(model, file, i, NULL, &env) == MOE_E_FORMAT, "cut at %zu", i);
    moe_config_init(&config);
    CHECK(moe_import_sizes(&config, file, i, &env) == MOE_E_FORMAT && config.layers == 6,
          "cut at %zu", i);
  }
  for (i = 0; i < 2000; ++i) {
    unsigned char *copy = (unsigned char *)malloc(n);
    size_t header = 8 + ((size_t)file[0] | (size_t)file[1] << 8), place;
    memcpy(copy, file, n);
    test_random(&state);
    place = (size_t)(state >> 33) % header;
    copy[place] = (unsigned char)(i % 2 ? copy[place] ^ 1u << (state >> 20) % 8 : state >> 20);
    env = logging();
    if (moe_model_import(model, copy, n, NULL, &env))
      CHECK(said[0], "a sentence");
    else
      ++sound;
    free(copy);
  }
  printf("        %d of %d damaged encoders were still sound\n", sound, (int)i);
  CHECK(sound < 400, "%d", sound);
  at = file + n - 2; /* the last value of the last layer */
  at[0] = 0xc0, at[1] = 0x7f;
  env = logging();
  CHECK(moe_model_import(model, file, n, NULL, &env) == MOE_E_FORMAT &&
            strstr(said, "is not a finite number"),
        "%s", said);
  for (at = file; memcmp(at, "F32", 3); ++at) continue;
  memcpy(at, "I32", 3);
  env = logging();
  CHECK(moe_model_import(model, file, n, NULL, &env) == MOE_E_FORMAT &&
            strstr(said, "found I32 of (4)"),
        "%s", said);
  free(file);
  moe_model_free(model);
}

static void test_import_noise_parts_the_copies(void) {
  moe_env env = logging();
  flavour f = plain();
  size_t n, k, count = 0;
  unsigned char *file = encoder_file(&f, &n);
  moe_model *model = empty_model(MOE_ROUTER_TASK, 4, LAYERS, &env),
            *same = empty_model(MOE_ROUTER_TASK, 4, LAYERS, &env);
  moe_import_options options;
  double sum = 0, squares = 0, own;
  int32_t i;
  options.noise = 0.25f;
  options.seed = 5;
  CHECK(model && same, "%s", said);
  CHECK(!moe_model_import(model, file, n, &options, &env) &&
            !moe_model_import(same, file, n, &options, &env),
        "%s", said);
  CHECK(!memcmp(moe_model_weights(model), moe_model_weights(same),
                moe_model_parameters(model) * sizeof(float)),
        "the same seed, the same bits");
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    char name[128];
    int experts;
    moe_model_tensor(model, i, &t);
    experts = strstr(t.name, "experts.") != NULL;
    memcpy(name, t.name, sizeof name);
    without_expert(name);
    if (strstr(name, "gate") || !strncmp(name, "heads", 5)) continue;
    own = 0;
    for (k = 0; k < t.count; ++k) {
      double d = (double)moe_model_weights(model)[t.offset + k] - (double)value_of(name, k);
      CHECK(experts || d == 0, "%s has noise", t.name);
      CHECK(fabs(d - 0.25 * (double)moe__normal(
                                moe_key(5, 0, moe__name_hash(t.name), 0, MOE__SITE_NOISE), k)) <
                (experts ? 1e-6 : 9),
            "%s[%zu]: noise %g is not that of the seed", t.name, k, d);
      if (experts) sum += d, squares += d * d, own += d * d, ++count;
    }
    CHECK(!experts || own > 0, "%s has no noise", t.name);
  }
  CHECK_NEAR(sum / (double)count, 0, 0.05);
  CHECK_NEAR(sqrt(squares / (double)count), 0.25, 0.05);
  options.noise = -1;
  CHECK(moe_model_import(model, file, n, &options, &env) == MOE_E_ARGUMENT, "negative noise");
  free(file);
  moe_model_free(model);
  moe_model_free(same);
}

static moe_status read_json(const char *json, moe_config *config) {
  moe_env env = logging();
  moe_config_init(config);
  return moe_import_config_json(config, json, strlen(json), &env);
}

static void test_import_reads_config_json(void) {
  moe_config c;
  CHECK(read_json("{\"num_attention_heads\": 16, \"layer_norm_eps\": 1e-05, \"hidden_act\": "
                  "\"gelu\", \"x\": {\"y\": [null, true]}}\n",
                  &c) == MOE_OK,
        "%s", said);
  CHECK(c.heads == 16 && c.eps == 1e-5f, "%d %g", (int)c.heads, (double)c.eps);
  CHECK(read_json("{\"num_attention_heads\":3,\"position_embedding_type\":\"absolute\",\"model_"
                  "type\":\"bert\"}",
                  &c) == MOE_OK &&
            c.eps == 1e-12f,
        "%s", said);
  CHECK(read_json("{\"layer_norm_eps\":1e-12}", &c) == MOE_E_FORMAT &&
            strstr(said, "num_attention_heads is missing"),
        "%s", said);
  CHECK(read_json("{\"num_attention_heads\":12,\"hidden_act\":\"relu\"}", &c) ==
                MOE_E_UNSUPPORTED &&
            strstr(said, "hidden_act is \"relu\""),
        "%s", said);
  CHECK(read_json("{\"num_attention_heads\":12,\"model_type\":\"roberta\"}", &c) ==
                MOE_E_UNSUPPORTED &&
            c.heads == 12,
        "%s", said);
  CHECK(read_json("{\"num_attention_heads\":0}", &c) == MOE_E_FORMAT, "%s", said);
  CHECK(read_json("{\"num_attention_heads\":12.5}", &c) == MOE_E_FORMAT, "%s", said);
  CHECK(read_json("{\"num_attention_heads\":12", &c) == MOE_E_FORMAT &&
            strstr(said, "byte 25 of 25"),
        "%s", said);
  CHECK(read_json("{\"num_attention_heads\":12,\"layer_norm_eps\":-1}", &c) == MOE_E_FORMAT, "%s",
        said);
  CHECK(read_json("{\"num_attention_heads\":3,\"is_decoder\": true}", &c) == MOE_E_UNSUPPORTED &&
            strstr(said, "is_decoder"),
        "%s", said);
  CHECK(read_json("{\"is_decoder\" : false, \"num_attention_heads\":3}", &c) == MOE_OK &&
            c.heads == 3,
        "%s", said);
  CHECK(read_json("", &c) == MOE_E_FORMAT && c.heads == 12, "%s", said);
}

/* What people download beside model.safetensors, or instead of it. */
static void test_import_knows_other_files_of_the_hub(void) {
  static const struct {
    const char *begin, *says;
  } others[] = {{"\x80\2\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.", "pickle"},
                {"GGUF\3aaaaaaaaaaa", "llama.cpp"},
                {"\x89HDF\r\n\x1a\nxxxx", "HDF5"},
                {"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"},
                {"<!DOCTYPE html>", "HTML"},
                {"\x1f\x8b\x8xxxxxxxxxxx", "gzip"}};
  static const char zip[] = "PK\3\4\0\0\10\10\0\0\0\0\0\0archive/data.pkl",
                    list[] = "{\n  \"metadata\": {\"total_size\": 4},\n  \"weight_map\": {}\n}\n";
  moe_env env = logging();
  moe_config c;
  size_t n, i;
  char header[200];
  for (i = 0; i < sizeof others / sizeof *others; ++i) {
    env = logging();
    CHECK(moe_import_sizes(&c, others[i].begin, strlen(others[i].begin), &env) == MOE_E_FORMAT &&
              strstr(said, others[i].says),
          "%s", said);
    CHECK(sentences == 1 && strstr(said, "not a safetensors file (model.safetensors)"), "%s", said);
  }
  moe_config_init(&c);
  CHECK(moe_import_sizes(&c, zip, sizeof zip - 1, &env) == MOE_E_FORMAT && strstr(said, "PyTorch"),
        "%s", said);
  CHECK(moe_import_sizes(&c, list, sizeof list - 1, &env) == MOE_E_FORMAT &&
            strstr(said, "the index of weights in several files"),
        "%s", said);
  /* a header of 123 bytes begins with the byte of a {, and is one nevertheless */
  n = (size_t)snprintf(header, sizeof header, "{%c%c%c%c%c%c%c{}", 0, 0, 0, 0, 0, 0, 0);
  memset(header + n, ' ', 8 + 123 - n);
  CHECK(moe_import_sizes(&c, header, 8 + 123, &env) == MOE_E_FORMAT &&
            strstr(said, "not an encoder like BERT"),
        "%s", said);
}

/* Encoders of other kinds have many of BERT's names: none may be taken for one of them. */
static void test_import_refuses_encoders_that_are_not_bert(void) {
  static const struct {
    const char *tensor, *says;
  } some[] = {
      {"bert.transformer.layer.0.attention.q_lin.weight", "DistilBERT"},
      {"bert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", "ALBERT"},
      {"bert.embeddings_project.weight", "ELECTRA"},
      {"bert.encoder.layers.0.attn.Wqkv.weight", "ModernBERT"},
      {"bert.encoder.rel_embeddings.weight", "DeBERTa"},
      {"bert.encoder.relative_attention_bias.weight", "MPNet"},
      {"bert.encoder.layer.0.attention.self.distance_embedding.weight", "relative positions"},
      {"bert.encoder.layer.0.experts.0.output.dense.weight", "moe_model_load reads those of moe.h"},
      {"bert.encoder.layer.0.blocks.0.output.dense.weight", "moe_model_load reads those of moe.h"},
      {"bert.encoder.layer.0.crossattention.self.query.weight", "BERT has no such tensor"},
      {"bert.encoder.layer.0.attention.self.query.gamma", "BERT has no such tensor"},
      {"bert.encoder.layer.99999.attention.self.query.weight", "BERT has no such tensor"},
      {"bert.encoder.x", "BERT has no such tensor"},
      {"bert.embeddings.x_position_embeddings.weight", "BERT has no such tensor"},
      {"bert.embeddings.word_embeddings.bias", "BERT has no such tensor"},
      {"bert.encoder.layer.0.output.LayerNorm.gamma", "is listed twice"},
      {"bert.encoder.layer.1.intermediate.dense.bias", "is listed twice"},
      {"bert.encoder.layer.3.attention.self.query.weight",
       "the model has 2 layers, the file has 4"}};
  size_t i;
  flavour f = plain();
  f.prefix = "bert.";
  for (i = 0; i < sizeof some / sizeof *some; ++i) {
    f.foreign = some[i].tensor;
    import_refused(&f, LAYERS, some[i].says, 1);
    CHECK_STATE();
  }
}

static void test_import_looks_at_the_encoder_only(void) {
  moe_config config;
  moe_env env;
  size_t i, n;
  unsigned char *file;
  flavour f = plain();
  for (i = 0; i < 2; ++i) { /* outside of the encoder there may be anything */
    f.prefix = i ? "" : "bert.";
    f.foreign = "cls.layers.0.Wqkv.weight";
    file = encoder_file(&f, &n);
    env = logging();
    moe_config_init(&config);
    CHECK(moe_import_sizes(&config, file, n, &env) == MOE_OK && config.layers == LAYERS, "%s",
          said);
    free(file);
  }
  f.foreign = NULL;
  f.missing = "embeddings.word_embeddings.weight"; /* then there is no prefix to go by */
  f.foreign = "model.layers.0.attn.Wqkv.weight";
  import_refused(&f, LAYERS, "ModernBERT", 1);
}

/* A config.json of one head, and its length. */
#define SAYS(members)                                                                              \
  "{\"num_attention_heads\": 1, " members "}",                                                     \
      sizeof "{\"num_attention_heads\": 1, " members "}" - 1

static void test_import_knows_the_positions_of_roberta(void) {
  moe_config config;
  moe_env env;
  size_t n;
  unsigned char *file, *at;
  flavour f = plain();
  f.positions = 66;
  file = encoder_file(&f, &n);
  env = logging();
  CHECK(moe_import_sizes(&config, file, n, &env) == MOE_E_FORMAT && sentences == 1 &&
            strstr(said, "tensor embeddings.position_embeddings.weight: 66 rows, as in RoBERTa"),
        "%s", said);
  moe_config_init(&config);
  CHECK(!moe_import_encoder(&config, file, n, SAYS("\"model_type\": \"bert\""), &env) &&
            config.positions == 66,
        "%s", said);
  CHECK(moe_import_encoder(&config, file, n, SAYS("\"hidden_act\": \"gelu\""), &env) &&
            strstr(said, "RoBERTa"),
        "%s", said);
  free(file);
  f.positions = POSITIONS;
  file = encoder_file(&f, &n);
  for (at = file; memcmp(at, "]}}", 3); ++at) continue;
  at += 3 + sizeof(float) * (2 * HIDDEN + WORDS * HIDDEN + HIDDEN); /* row 1 of the positions */
  memset(at, 0, sizeof(float) * HIDDEN);
  env = logging();
  CHECK(moe_import_sizes(&config, file, n, &env) == MOE_E_FORMAT &&
            strstr(said, "8 rows, as in RoBERTa") && sentences == 1,
        "%s", said);
  free(file);
}

static void encoder_refused(const unsigned char *file, size_t n, const char *json, size_t bytes,
                            const char *says) {
  moe_env env = logging();
  moe_config config, before;
  moe_status status;
  moe_config_init(&config);
  before = config;
  status = moe_import_encoder(&config, file, n, json, bytes, &env);
  CHECK((status == MOE_E_FORMAT || status == MOE_E_UNSUPPORTED) && sentences == 1 &&
            strstr(said, says),
        "%d: '%s', not '%s'", (int)status, said, says);
  CHECK(!memcmp(&config, &before, sizeof config), "nothing is changed");
}

static void test_import_compares_config_json_with_the_weights(void) {
  flavour f = plain();
  size_t n;
  unsigned char *file = encoder_file(&f, &n);
  moe_env env = logging();
  moe_config c;
  moe_config_init(&c);
  CHECK(!moe_import_encoder(&c, file, n,
                            SAYS("\"hidden_size\": 4, \"num_hidden_layers\": 2, "
                                 "\"intermediate_size\": 6, \"max_position_embeddings\": 8, "
                                 "\"type_vocab_size\": 2, \"layer_norm_eps\": 1e-7"),
                            &env) &&
            c.hidden == HIDDEN && c.layers == LAYERS && c.heads == 1 && c.eps == 1e-7f,
        "%s", said);
  encoder_refused(file, n, SAYS("\"num_hidden_layers\": 3"),
                  "num_hidden_layers is 3, but the weig");
  encoder_refused(file, n, SAYS("\"hidden_size\": 8"), "hidden_size is 8, but the weights have 4");
  encoder_refused(file, n, SAYS("\"intermediate_size\": 8"), "intermediate_size is 8, but the wei");
  encoder_refused(file, n, SAYS("\"vocab_size\": 30522"),
                  "vocab_size is 30522, but the weights ha");
  encoder_refused(file, n, SAYS("\"type_vocab_size\": 1"), "type_vocab_size is 1, but the weights");
  encoder_refused(file, n, SAYS("\"max_position_embeddings\": 512"),
                  "max_position_embeddings is 512, but the weights have 8");
  encoder_refused(file, n, SAYS("\"model_type\": \"xlnet\""), "model_type is \"xlnet\"");
  encoder_refused(file, n, SAYS("\"hidden_size\": 4, \"embedding_size\": 2"),
                  "embedding_size is 2 and hidden_size 4");
  encoder_refused(file, n, SAYS("\"layer_norm_eps\": \"1e-12\""),
                  "layer_norm_eps is no number, but a text in quotes");
  encoder_refused(file, n, SAYS("\"vocab_size\": 99999999999"), "vocab_size is out of range");
  free(file);
}

/* ELECTRA, ERNIE, Splinter and DPR compute what BERT does, if their config.json says nothing else;
   a byte order mark is no part of the text. */
static void test_import_takes_encoders_of_other_names(void) {
  static const char *const type[] = {"electra", "ernie", "splinter", "dpr"};
  char json[128];
  moe_config c;
  size_t i;
  for (i = 0; i < 4; ++i) {
    snprintf(json, sizeof json,
             "\xef\xbb\xbf{\"model_type\": \"%s\", \"hidden_size\": 4, \"embedding_size\": 4, "
             "\"num_attention_heads\": 2}",
             type[i]);
    CHECK(read_json(json, &c) == MOE_OK && c.heads == 2, "%s", said);
  }
}

/* A model that comes through a file as it was, and is a BERT file itself. */
static void check_dense_file(moe_model *dense, const moe_config *config, const moe_task *task,
                             const moe_env *env) {
  void *again;
  size_t bytes;
  moe_model *back;
  moe_tensor t;
  CHECK(moe_model_save(dense, "build/import_dense.safetensors", env) == MOE_OK, "%s", said);
  CHECK(moe_file_read(&again, &bytes, "build/import_dense.safetensors", env) == MOE_OK, "%s", said);
  CHECK(moe_model_read(&back, again, bytes, env) == MOE_OK, "%s", said);
  CHECK(!memcmp(moe_model_weights(back), moe_model_weights(dense),
                moe_model_parameters(dense) * sizeof(float)),
        "through a file");
  moe_model_free(back);
  CHECK(!moe_model_create(&back, config, task, 1, 2, env) &&
            !moe_model_import(back, again, bytes, NULL, env),
        "a dense model is a BERT file: %s", said);
  t = models_tensor(dense, "heads.t.weight");
  CHECK(!memcmp(moe_model_weights(back), moe_model_weights(dense), t.offset * sizeof(float)),
        "encoders are equal");
  remove("build/import_dense.safetensors");
  moe_model_free(back);
  moe_free(again);
}

static void test_import_real_minilm(void) {
  moe_env env = logging();
  const char *path = test_shared("models/all-MiniLM-L6-v2/model.safetensors");
  void *file, *json;
  size_t n, json_bytes;
  moe_config config;
  moe_task task;
  moe_model *model, *dense;
  moe_tensor t, e;
  if (!path) SKIP("no ../../shared/models/all-MiniLM-L6-v2");
  CHECK(moe_file_read(&file, &n, path, &env) == MOE_OK, "%s", said);
  CHECK(moe_file_read(&json, &json_bytes, test_shared("models/all-MiniLM-L6-v2/config.json"),
                      &env) == MOE_OK,
        "%s", said);
  moe_config_init(&config);
  CHECK(!moe_import_sizes(&config, file, n, &env) &&
            !moe_import_config_json(&config, (char *)json, json_bytes, &env),
        "%s", said);
  CHECK(config.layers == 6 && config.hidden == 384 && config.ffn == 1536 && config.vocab == 30522 &&
            config.positions == 512,
        "sizes");
  CHECK(config.heads == 12 && config.eps == 1e-12f, "heads and eps");
  memset(&task, 0, sizeof task);
  snprintf(task.name, sizeof task.name, "t");
  task.classes = 2;
  config.router = MOE_ROUTER_TASK;
  CHECK(!moe_model_create(&model, &config, &task, 1, 1, &env) &&
            !moe_model_import(model, file, n, NULL, &env),
        "%s", said);
  config.router = MOE_ROUTER_DENSE;
  config.experts = config.top_k = 1;
  CHECK(!moe_model_create(&dense, &config, &task, 1, 1, &env) &&
            !moe_model_import(dense, file, n, NULL, &env),
        "%s", said);
  e = models_tensor(model, "encoder.layer.5.experts.3.output.dense.weight");
  t = models_tensor(dense, "encoder.layer.5.output.dense.weight");
  CHECK(!memcmp(moe_model_weights(model) + e.offset, moe_model_weights(dense) + t.offset,
                t.count * sizeof(float)),
        "copies of the FFN");
  check_dense_file(dense, &config, &task, &env);
  CHECK_STATE();
  moe_model_free(model);
  moe_model_free(dense);
  moe_free(file);
  moe_free(json);
  CHECK(!sentences, "%s", said);
}

static void run_import(void) {
  RUN(test_import_takes_names_and_formats_of_the_hub);
  RUN(test_import_names_every_fault_and_changes_nothing);
  RUN(test_import_sizes_name_what_is_missing);
  RUN(test_import_refuses_other_dtypes_nan_and_damage);
  RUN(test_import_noise_parts_the_copies);
  RUN(test_import_reads_config_json);
  RUN(test_import_knows_other_files_of_the_hub);
  RUN(test_import_refuses_encoders_that_are_not_bert);
  RUN(test_import_looks_at_the_encoder_only);
  RUN(test_import_knows_the_positions_of_roberta);
  RUN(test_import_compares_config_json_with_the_weights);
  RUN(test_import_takes_encoders_of_other_names);
  RUN(test_import_real_minilm);
}
