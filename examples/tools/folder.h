/* folder.h - a model file as a folder that transformers opens, for convert */
#ifndef TOOLS_FOLDER_H
#define TOOLS_FOLDER_H
#include "tokenizer.h"
#ifdef _WIN32
#include <direct.h>
#define mkdir(path, mode) _mkdir(path)
#else
#include <sys/stat.h>
#endif

static inline void write_to_folder(const char *folder, const char *name, text *what) {
  save_text(what, printed("%s/%s", folder, name));
}

/* The value of a string in the file's metadata: JSON in quotes, as it stands there. */
static inline char *metadata(const char *file, const char *name) {
  const char *at = strstr(file + 8, printed("\"%s\":\"", name)), *end;
  char *out, *to;
  if (!at) die("there is no %s in its header", name);
  at += strlen(name) + 4;
  for (end = at; *end && *end != '"'; ++end) end += *end == '\\' && end[1];
  out = to = (char *)lasting((size_t)(end - at) + 1, 1);
  for (; at < end; ++at) { /* quotes and backslashes of the JSON within are escaped once more */
    at += *at == '\\' && (at[1] == '"' || at[1] == '\\');
    *to++ = *at;
  }
  return out;
}

/* The lines of a vocabulary with marks (moe_text_flags): words to `words`, added tokens to
   `config`. */
static inline void put_added_tokens(text *config, text *words, const char *vocab) {
  static const char mark[] = "lnrso";
  static const char *const said[] = {"lstrip", "normalized", "rstrip", "special", "single_word"};
  list line = split(vocab, '\n');
  int i, k, n = 0;
  put_json(config, "  'added_tokens_decoder': {");
  for (i = 0; i < line.n; ++i) {
    char *marks = strstr(line.at[i], "\t+");
    if (marks) *marks = 0;
    if (marks ? strchr(marks + 2, 'w') != NULL : i + 1 < line.n || *line.at[i])
      put(words, "%s\n", line.at[i]);
    if (!marks) continue;
    put_json(config, "%s\n    '%d': {'content': ", n++ ? "," : "", i);
    put_quoted(config, line.at[i]);
    for (k = 0; mark[k]; ++k)
      put_json(config, ", '%s': %s", said[k], strchr(marks + 2, mark[k]) ? "true" : "false");
    put_json(config, "}");
  }
  put_json(config, "\n  },\n");
}

/* The names and shapes of all tensors, from which mttag.py makes its modules. */
static inline void put_shapes(text *to, const moe_model *model) {
  moe_tensor t;
  int i, k;
  for (i = 0; !moe_model_tensor(model, i, &t); ++i) {
    put(to, "%s\n    \"%s\": [", i ? "," : ",\n  \"shapes\": {", t.name);
    for (k = 0; k < t.dims; ++k) put(to, k ? ", %d" : "%d", (int)t.shape[k]);
    put(to, "]");
  }
  put(to, "\n  }");
}

static inline void put_config(text *to, const moe_model *model, int dense, const char *file) {
  const moe_config *c = moe_model_config(model);
  put(to, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n",
      dense ? "BertModel" : "MTTaGModel", dense ? "bert" : "mttag");
  put(to, "  \"hidden_size\": %d,\n  \"num_hidden_layers\": %d,\n  \"num_attention_heads\": %d,\n",
      (int)c->hidden, (int)c->layers, (int)c->heads);
  put(to, "  \"intermediate_size\": %d,\n  \"vocab_size\": %d,\n", (int)c->ffn, (int)c->vocab);
  put(to, "  \"max_position_embeddings\": %d,\n  \"type_vocab_size\": %d,\n", (int)c->positions,
      (int)c->segments);
  put(to, "  \"hidden_act\": \"gelu\",\n  \"layer_norm_eps\": %.9g,\n", (double)c->eps);
  put(to, "  \"position_embedding_type\": \"absolute\",\n  \"torch_dtype\": \"float32\"");
  if (!dense) {
    put(to, ",\n  \"auto_map\": {\"AutoConfig\": \"mttag.MTTaGConfig\", "
            "\"AutoModel\": \"mttag.MTTaGModel\"}");
    put(to, ",\n  \"moe\": %s,\n  \"tasks\": %s", metadata(file, "moe.config"),
        metadata(file, "moe.tasks"));
    put_shapes(to, model);
  }
  put(to, "\n}\n");
}

/* vocab.txt and tokenizer_config.json. */
static inline void write_tokenizer(const char *folder, const moe_config *c, const char *vocab,
                                   size_t bytes) {
  text words = {NULL, 0, 0}, all = {NULL, 0, 0}, config = {NULL, 0, 0};
  int lower = !(c->cased & MOE_TEXT_CASED), accents = (c->cased & MOE_TEXT_ACCENTS) != 0;
  put_json(&config, "{\n  'tokenizer_class': 'BertTokenizer',\n  'do_lower_case': %s,\n",
           lower ? "true" : "false");
  if (accents) put_json(&config, "  'strip_accents': %s,\n", lower ? "false" : "true");
  if (c->cased & MOE_TEXT_WHOLE_IDEOGRAPHS)
    put_json(&config, "  'tokenize_chinese_chars': false,\n");
  put_bytes(&all, vocab, bytes);
  if (c->cased & MOE_TEXT_ADDED)
    put_added_tokens(&config, &words, all.data);
  else
    put_bytes(&words, vocab, bytes);
  put_json(&config, "  'model_max_length': %d\n}\n", (int)c->max_len);
  write_to_folder(folder, "vocab.txt", &words);
  write_to_folder(folder, "tokenizer_config.json", &config);
  free(all.data);
}

/* mttag: the file mttag.py, which a folder of a model that is not dense needs. */
static inline void write_folder(const char *folder, const moe_model *model, const char *mttag) {
  const moe_config *c = moe_model_config(model);
  int dense = c->router == MOE_ROUTER_DENSE && c->unit == MOE_UNIT_FFN && !c->feature_dim;
  text whole = {NULL, 0, 0}, other = {NULL, 0, 0};
  moe_writer writer;
  void *code = NULL;
  size_t bytes, code_bytes = 0;
  const char *vocab;
  if (moe_model_type(model) == MOE_TYPE_I8)
    die("an int8 model, which transformers cannot open: take the float model");
  if (!dense) need(moe_file_read(&code, &code_bytes, mttag, &env));
  if (mkdir(folder, 0777) && errno != EEXIST)
    die("cannot make the folder %s: %s", folder, strerror(errno));
  writer.write = write_to_text, writer.user = &whole;
  need(moe_model_write(model, &writer, &env));
  put_config(&other, model, dense, whole.data);
  write_to_folder(folder, "config.json", &other);
  write_to_folder(folder, "model.safetensors", &whole);
  vocab = moe_model_vocab(model, &bytes);
  if (vocab) write_tokenizer(folder, c, vocab, bytes);
  if (code) {
    write_to_text(&other, code, code_bytes);
    write_to_folder(folder, "mttag.py", &other);
  }
  printf("%s: %s\n", folder,
         dense ? "AutoModel.from_pretrained opens it, a BERT without a pooler"
               : "AutoModel.from_pretrained(DIR, trust_remote_code=True) opens it");
}
#endif
