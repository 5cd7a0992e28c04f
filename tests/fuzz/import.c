/* A published encoder: config.json, a byte of value 1, the safetensors file. */

static void import_into(const moe_config *from, const unsigned char *file, size_t bytes,
                        int experts, const moe_env *env) {
  moe_config c = *from;
  moe_task task;
  moe_model *m = NULL;
  size_t size = 0, i;
  memset(&task, 0, sizeof task);
  strcpy(task.name, "a");
  task.classes = 2;
  if (c.hidden % c.heads) c.heads = 1;
  c.max_len = c.positions < 16 ? c.positions : 16;
  c.router = experts > 1 ? MOE_ROUTER_TASK : MOE_ROUTER_DENSE;
  c.experts = experts;
  c.top_k = 1;
  if (TRY(moe_model_size(&c, &task, 1, &size, env)) || size > FUZZ_MOST / 2) return;
  if (TRY(moe_model_create(&m, &c, &task, 1, 1, env))) return;
  fuzz_sentences = 0; /* of a file that does not fit there may be 16 */
  if (moe_model_import(m, file, bytes, NULL, env))
    OUGHT(fuzz_sentences > 0);
  else
    OUGHT(!fuzz_sentences);
  for (i = 0; i < moe_model_parameters(m); ++i)
    OUGHT(moe_model_weights(m)[i] - moe_model_weights(m)[i] == 0);
  moe_model_free(m);
}

static void fuzz_import(const uint8_t *d, size_t n) {
  moe_env env = fuzz_env();
  moe_config c, before;
  fuzz_part part[2];
  unsigned char *file;
  size_t bytes;
  fuzz_cut(part, 2, d, n);
  file = fuzz_file((const uint8_t *)part[1].data, part[1].bytes, &bytes);
  moe_config_init(&c);
  c.heads = 2;
  before = c;
  if (TRY(moe_import_config_json(&c, part[0].data, part[0].bytes, &env)))
    OUGHT(!memcmp(&c, &before, sizeof c));
  before = c;
  if (TRY(moe_import_encoder(&c, file, bytes, part[0].data, part[0].bytes, &env)))
    OUGHT(!memcmp(&c, &before, sizeof c));
  before = c;
  if (TRY(moe_import_sizes(&c, file, bytes, &env)))
    OUGHT(!memcmp(&c, &before, sizeof c));
  else {
    import_into(&c, file, bytes, 1, &env);
    import_into(&c, file, bytes, 2, &env);
  }
  free(file);
  fuzz_drop(part, 2);
}
