/* The seeds, small inputs that the targets take: found, read, and written again from the library
   itself, golden/v01 and examples/data (./test_fuzz --seeds). */
#include <dirent.h>

/* The path of seed number i of a target, in any order; 0: there are fewer. */
static int fuzz_seed_name(char *path, size_t capacity, const char *target, int i) {
  DIR *folder;
  struct dirent *entry;
  int found = 0;
  snprintf(path, capacity, "fuzz/seeds/%s", target);
  if (!(folder = opendir(path))) return 0;
  while (!found && (entry = readdir(folder)) != NULL)
    if (entry->d_name[0] != '.' && !i--) {
      snprintf(path, capacity, "fuzz/seeds/%s/%s", target, entry->d_name);
      found = 1;
    }
  closedir(folder);
  return found;
}

static uint8_t *fuzz_seed(const char *path, size_t *n) {
  uint8_t *d = NULL;
  FILE *f = fopen(path, "rb");
  if (!f) return NULL;
  for (*n = 0;; *n += fread(d + *n, 1, 1 << 16, f)) {
    d = (uint8_t *)realloc(d, *n + (1 << 16));
    if (*n && (feof(f) || ferror(f))) break;
  }
  fclose(f);
  return d;
}

static int seed_failures;

static void seed(const char *target, const char *name, const void *d, size_t n) {
  char path[512];
  FILE *f;
  snprintf(path, sizeof path, "fuzz/seeds/%s/%s", target, name);
  f = fopen(path, "wb");
  if (!f || fwrite(d, 1, n, f) != n || fclose(f)) {
    printf("%s cannot be written\n", path);
    seed_failures = 1;
  }
}

static void seed_text(const char *target, const char *name, const char *s) {
  seed(target, name, s, strlen(s));
}

typedef struct seed_bytes {
  uint8_t at[1 << 17];
  size_t n;
} seed_bytes;
static seed_bytes seed_file;

static int seed_write(void *user, const void *d, size_t n) {
  seed_bytes *to = (seed_bytes *)user;
  if (to->n + n > sizeof to->at) return 1;
  memcpy(to->at + to->n, d, n);
  to->n += n;
  return 0;
}

/* Only the header of a file, with `before` in front. */
static void seed_header(const char *target, const char *name, const char *before,
                        const uint8_t *file) {
  size_t n = (size_t)file[0] | (size_t)file[1] << 8 | (size_t)file[2] << 16, b = strlen(before);
  uint8_t *d = (uint8_t *)malloc(b + n);
  memcpy(d, before, b);
  memcpy(d + b, file + 8, n);
  seed(target, name, d, b + n);
  free(d);
}

static void seed_models(const moe_env *e) {
  static const char *const old[] = {"blocks",   "dense", "embed",  "extracted",
                                    "features", "int8",  "switch", "tag"};
  static const char config[] = "{\"model_type\":\"bert\",\"hidden_act\":\"gelu\",\"num_attention_"
                               "heads\":2,\"layer_norm_eps\":1e-12}\1";
  moe_writer writer = {seed_write, &seed_file};
  moe_task task[FUZZ_TASKS];
  moe_config c = fuzz_config(task);
  moe_model *m;
  char path[512];
  size_t n;
  int i;
  for (i = 0; i < 8; ++i) {
    uint8_t *d;
    snprintf(path, sizeof path, "golden/v01/%s.model", old[i]);
    d = fuzz_seed(path, &n);
    if (d) seed_header("model", old[i], "", d);
    if (d && i == 1) seed_header("import", "dense", config, d);
    free(d);
  }
  checkpoint_begin(e);
  seed_file.n = 0;
  seed_failures |= moe_model_write(checkpoint.model, &writer, e) != MOE_OK;
  seed("model", "whole", seed_file.at, seed_file.n);
  seed_file.n = 0;
  seed_failures |= moe_checkpoint_write(checkpoint.trainer, &checkpoint.sampler, "a note\nof 2",
                                        &writer, e) != MOE_OK;
  seed("checkpoint", "whole", seed_file.at, seed_file.n);
  seed_header("checkpoint", "header", "", seed_file.at);
  c.router = MOE_ROUTER_DENSE, c.experts = c.top_k = 1;
  seed_failures |= moe_model_create(&m, &c, NULL, 0, 1, e) != MOE_OK;
  seed_failures |= moe_model_set_vocab(m, "[UNK]\n[CLS]\n[SEP]\na", 19, e) != MOE_OK;
  seed_file.n = 0;
  seed_failures |= moe_model_write(m, &writer, e) != MOE_OK;
  moe_model_free(m);
  seed("model", "no_tasks", seed_file.at, seed_file.n);
  seed_failures |= moe_model_create(&m, &c, task, 1, 1, e) != MOE_OK;
  seed_file.n = 0;
  seed_failures |= moe_model_write(m, &writer, e) != MOE_OK;
  moe_model_free(m);
  seed_header("import", "small", config, seed_file.at);
  seed_header("import", "sizes",
              "{\"model_type\":\"bert\",\"num_attention_heads\":2,\"layer_norm_eps\":1e-12,"
              "\"num_hidden_layers\":1,\"hidden_size\":4,\"intermediate_size\":4,"
              "\"vocab_size\":12,\"max_position_embeddings\":8,\"type_vocab_size\":2}\1",
              seed_file.at);
  seed_header("json", "header", "", seed_file.at);
}

/* Plain batches, most numbers in range; and without a plan. */
static void seed_batches(void) {
  uint64_t state = 7;
  uint8_t d[400];
  char name[16];
  size_t k, i;
  for (k = 0; k < 16; ++k) {
    for (i = 0; i < sizeof d; ++i)
      d[i] = (uint8_t)(k < 8 ? 12 + fuzz_next(&state) % 240 : fuzz_next(&state));
    d[0] = (uint8_t)(k % 8);
    d[1] = k < 8 ? 60 : (uint8_t)(fuzz_next(&state) & 127);
    snprintf(name, sizeof name, "batch%d", (int)k);
    seed("batch", name, d, sizeof d);
  }
}

/* The first lines of a file of examples/data. */
static void seed_lines(text *to, const char *path, int lines_of) {
  FILE *f = fopen(path, "rb");
  int c = 0;
  seed_failures |= !f;
  while (f && lines_of > 0 && (c = getc(f)) != EOF) {
    char byte = (char)c;
    put_bytes(to, &byte, 1);
    lines_of -= c == '\n';
  }
  if (f) fclose(f);
}

/* Data as people have it. */
static void seed_formats(void) {
  static const char csv[] =
      "cname\tinput\tkind\tlabels\tmetric\tsentence1_column\n"
      "c\tsingle\tclassification\t0=no,1=yes\taccuracy\ttitle + text\n\1"
      "label,title,text\r\nyes,\"the \"\"a\"\", is\",\"two\nlines\"\r\n0,a,\n\1"
      "label,title,text\n1,,the\n";
  static const char jsonl[] =
      "jname\tinput\tkind\tlabels\tmetric\tlabel_column\tsentence1_column\tsentence2_column\n"
      "j\tpair\tclassification\t0=no,1=yes\taccuracy\tq[].a[].y\tp.t\tq[].a[].s\n\1"
      "{\"p\":{\"t\":\"the \\u00e9\"},\"q\":[{\"a\":[{\"s\":\"a\",\"y\":1},{\"s\":\"is\",\"y\":"
      "false}]},{\"a\":[]}]}\n{\"p\":{\"t\":\"a\"},\"q\":[{\"a\":[{\"s\":\"\",\"y\":\"no\"}]}]}\n\1"
      "{\"p\":{\"t\":\"is\"},\"q\":[{\"a\":[{\"y\":0,\"s\":\"the\"}]}]}\n";
  static const char mapped[] =
      "tname\tinput\tkind\tlabels\tmetric\tlabel_column\tsentence1_column\tsentence2_column\n"
      "m\tpair\tclassification\t0=no,1=yes\taccuracy\ty\ta | d\tb + c\n\1a\tb\ty\tc\td\n"
      "the\ta\tyes\tis\t.\na\tis\t0 \tthe\t\nis\tis\tno\tis\ta\n\1"
      "a\tb\ty\tc\td\n.\ta\t1\tis\t\nthe\ta\tno\tis\ta\n";
  static const char numbered[] =
      "tname\tinput\tkind\tlabels\tmetric\tlabel_column\tsentence1_column\tsentence2_column\n"
      "m\tpair\tregression\t0..5\tpearson\t@4\t@1\t@2\n\1"
      "the\ta\tis\t2.5\na\tis\t.\t0\n\1.\ta\tthe\t5\nis\tis\tis\t1e0\n";
  static const char utf16[] =
      "cname\tinput\tkind\tlabels\tmetric\nu\tsingle\tclassification\t0=no,1=yes\taccuracy\n\1"
      "\xff\xfel\0a\0b\0e\0l\0;\0s\0e\0n\0t\0e\0n\0c\0e\0"
      "1\0\n\0"
      "1\0;\0a\0\n\0"
      "0\0;\0\x3d\xd8\0\xde\n\0"
      "1\0;\0\"\0i\0s\0\n\0a\0\"\0\n\0\1sentence1,label\n\"the \"\"is\"\"\",0\na,1\n";
  seed_text("data", "csv", csv);
  seed_text("data", "jsonl", jsonl);
  seed_text("data", "mapped", mapped);
  seed_text("data", "numbered", numbered);
  seed("data", "utf16", utf16, sizeof utf16 - 1);
}

static void seed_data(void) {
  static const char kinds[] =
      "tname\tinput\tkind\tlabels\tmetric\trows\tmax_len\thard\n"
      "a\tpair\tregression\t0..5\tspearman,pearson\t\t7\t1\n\1"
      "label\tsentence1\tsentence2\n2.5\tthe a\tis\n0\ta\tthe\n5\tit\tis\n\1"
      "label\tsentence1\tsentence2\n1e-3\tthe\ta\n";
  static const char span[] = "t\xef\xbb\xbfname\tinput\tkind\tlabels\tmetric\r\n"
                             "s\tsingle\tspan\t0=no,1=yes\taccuracy,f1\r\n\1"
                             "label\tsentence1\tstart1\tend1\tstart2\tend2\r\n"
                             "1\tthe a is\t0\t3\t4\t5\r\n0\ta the\t0\t1\t2\t5\r\n\1"
                             "label\tsentence1\tstart1\tend1\tstart2\tend2\n0\ta a\t0\t1\t2\t3\n";
  static const char ranking[] = "tname\tinput\tkind\tlabels\tmetric\n"
                                "r\tpair\tranking\t0=no,1=yes\taccuracy\n\1"
                                "label\tgroup\tsentence1\tsentence2\n"
                                "1\tx\tthe\ta\n0\tx\tthe\tis\n0\ty\ta\ta\n1\ty\ta\tis\n\1"
                                "label\tgroup\tsentence1\tsentence2\n1\tq\tis\ta\n0\tq\tis\tis\n";
  text t = {NULL, 0, 0};
  seed_text("data", "regression", kinds);
  seed_text("data", "span", span);
  seed_text("data", "ranking", ranking);
  put(&t, "tname\tinput\tkind\tlabels\tmetric\nm\tpair\tclassification\t0=a,1=b\taccuracy\n\1");
  seed_lines(&t, "../examples/data/intent_match/train.tsv", 5);
  put(&t, "\1");
  seed_lines(&t, "../examples/data/intent_match/dev.tsv", 3);
  seed("data", "match", t.data, t.bytes);
  t.bytes = 0;
  put(&t, "%c%c\n[UNK]\n[CLS]\n[SEP]\n", 2, 30);
  seed_lines(&t, "../examples/data/vocab.txt", 60);
  put(&t, "\1");
  seed_lines(&t, "../examples/data/pros_cons/dev.tsv", 3);
  put(&t, "\1the caf\xc3\xa9 is [MASK] \xe4\xb8\xad\xe5\x9b\xbd");
  seed("text", "pair", t.data, t.bytes);
  fuzz_free(t.data);
  seed_text("text", "base", "\x0a\x0c\1the theb\xc3\xa9ing. A\xcc\x81\1is [SEP] ##b");
  seed_text("text", "added",
            "\x7a\x14<e>\t+\nNew York\t+nw\n\xcc\x81z\t+lrs\n\xe4\xb8\xad\t+n\n"
            "\1<e>new\tYORK a\xcc\x81z\1\xe4\xb8\xad<e><");
  seed_text("text", "cased", "\x09\x14the\nTHE\n##\xc2\xa0x\n\1THE th\xc3\x89\xff\xe2\x80\x8d");
}

/* Files of published tokenizers, and an encoder with its config.json. */
static void seed_published(void) {
  static const char vocab[] = "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n##\xc3\xa9\n";
  text t = {NULL, 0, 0};
  put(&t,
      "0%s\1{\"do_lower_case\":true,\"strip_accents\":null,\"tokenize_chinese_chars\":true,"
      "\"tokenizer_class\":\"BertTokenizerFast\",\"added_tokens_decoder\":{\"0\":{\"content\":"
      "\"[PAD]\",\"special\":true},\"6\":{\"content\":\"[E1]\",\"lstrip\":true}}}\1"
      "{\"[E1]\":6,\"the\":4}",
      vocab);
  seed("tokenizer", "config", t.data, t.bytes);
  t.bytes = 0;
  put(&t, "0%s\1{\"tokenizer_class\":\"PreTrainedTokenizer\"}", vocab);
  seed("tokenizer", "other", t.data, t.bytes);
  t.bytes = 0;
  put(&t, "0%s\1{\"do_lower_case\":true,\"strip_accents\":false}", vocab);
  seed("tokenizer", "accents", t.data, t.bytes);
  fuzz_free(t.data);
  seed_text("tokenizer", "whole",
            "1{\"added_tokens\":[{\"id\":6,\"content\":\"[E1]\"}],\"normalizer\":{\"type\":"
            "\"BertNormalizer\",\"lowercase\":true,\"strip_accents\":null,"
            "\"handle_chinese_chars\":true},\"model\":{\"type\":\"WordPiece\",\"unk_token\":"
            "\"[UNK]\",\"continuing_subword_prefix\":\"##\",\"vocab\":{\"[PAD]\":0,\"[UNK]\":"
            "1,\"[CLS]\":2,\"[SEP]\":3,\"##\\u00e9\":5,\"the\":4}}}\1{}\1{}");
  seed_text("tokenizer", "far", "1{\"model\":{\"vocab\":{\"a\":16777215,\"b\":1}}}");
}

static void seed_tables(void) {
  static const char *const settings =
      "\1{\"do_lower_case\": true, \"strip_accents\": false, \"cls_token\": \"[CLS]\", "
      "\"added_tokens_decoder\": {\"6\": {\"content\": \"[E1]\", \"lstrip\": false, "
      "\"normalized\": false, \"special\": true}}, \"tokenizer_class\": \"BertTokenizer\", "
      "\"additional_special_tokens\": [\"[E2]\"]}\1{\"[E3]\": 7}";
  text t = {NULL, 0, 0};
  put(&t, "2[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n##s\n%s", settings);
  seed("tokenizer", "words", t.data, t.bytes);
  t.bytes = 0;
  put(&t,
      "1{\"added_tokens\": [{\"id\": 0, \"content\": \"[UNK]\", \"special\": true}], "
      "\"normalizer\": {\"type\": \"BertNormalizer\", \"clean_text\": true, \"lowercase\": "
      "true}, \"pre_tokenizer\": {\"type\": \"BertPreTokenizer\"}, \"model\": {\"type\": "
      "\"WordPiece\", \"max_input_chars_per_word\": 100, \"vocab\": {\"[UNK]\": 0, "
      "\"[CLS]\": 1, \"[SEP]\": 2, \"the\": 3, \"##s\": 5}}}%s",
      settings);
  seed("tokenizer", "json", t.data, t.bytes);
  fuzz_free(t.data);
  seed_text("shards", "one",
            "{\"metadata\": {}, \"weight_map\": {\"a\": \"x\", \"b\": \"x\"}}\1"
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
            "\"b\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[8,10]}}");
  seed_text("results", "two",
            "options\tlr=0.001 steps=10 tasks=two:4,\n"
            "tag.1.t0\t0\t0.5\t0.5\t1\t1200\t1.5\t10\t5000\t1 2 3 4 5 6\t0 1\t\n"
            "tag.1.t1\t1\t0.25\t0.5\t0\t0\t0\t0\t0\t\t2 0 1\tmore\n");
  seed_text("results", "joined",
            "options\tlr=0.001 steps=10 tasks=two:4,\n"
            "a\t2\t0.5\t0.5\t1\t1200\t1.5\t10\t5000\t\t0.5 1e-3 -2.25 7\t\n"
            "options\tlr=0.001 steps=10 tasks=two:4,\nb\t0\t1\t1\t1\t0\t0\t0\t0\t\t1 1\t\n");
  seed_text("routes", "looks",
            "0run,step,temperature,task,layer,block,probability\n1,0,2,t0,1,1,0.5\n1,0,2,t0,1,2,"
            "0.25\n1,0,2,t0,1,3,0.25\n1,0,2,t0,2,1,1\n1,0,2,t0,2,2,0\n1,0,2,t0,2,3,0\n"
            "1,0,2,t1,1,1,0.5\n1,0,2,t1,1,2,0.5\n1,0,2,t1,1,3,0\n1,0,2,t1,2,1,0.125\n"
            "1,0,2,t1,2,2,0.875\n1,0,2,t1,2,3,0\n");
  seed_text("routes", "runs",
            "1run,step,temperature,task,layer,block,probability\n2,0,2,t0,1,1,0.5\n1,10,0.1,t1,1,1,"
            "1\n");
  seed_text("json", "escapes",
            "\"\\u00e9\\ud83d\\ude00 \\udc80 \\\"{\\\\\\\"a\\\\\\\":1}\\\" \\n\"");
  seed_text("json", "number", "-12.5e-3");
  seed_text("json", "long", "179769313486231570000000000000000000000000000000.000001E+260");
  seed_text("json", "nested", "{\"a\":[1,{\"b\":[true,false,null,\"x\"]},-0.5e+3],\"c\":{}}");
}

static int fuzz_write_seeds(void) {
  moe_env e = fuzz_env();
  seed_models(&e);
  seed_batches();
  seed_formats();
  seed_data();
  seed_published();
  seed_tables();
  return seed_failures;
}
