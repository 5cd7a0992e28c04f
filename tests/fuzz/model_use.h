/* Whatever can be done with a model that was accepted: a pass, answers, other models of it. */

static int model_count(void *user, const void *data, size_t bytes) {
  (void)data;
  *(size_t *)user += bytes;
  return 0;
}

static void model_pass(const moe_model *m, const moe_env *env) {
  const moe_config *c = moe_model_config(m);
  int32_t T = moe_model_tasks(m), C = moe_model_max_classes(m), length = c->positions < 5 ? 1 : 5;
  int32_t S = T && T < 8 ? T : 8, M = S * length, i, start[9], task[8], span[32];
  moe_limits limits = {M, S, 0, 0};
  moe_context *context = NULL;
  moe_batch b;
  float *scores = (float *)malloc((size_t)(S * C) * sizeof *scores + 1);
  float *features = (float *)calloc((size_t)(M * c->feature_dim) + 1, sizeof *features);
  int32_t *ids = (int32_t *)malloc((size_t)M * sizeof *ids);
  memset(&b, 0, sizeof b);
  for (i = 0; i <= S; ++i) start[i] = i * length;
  for (i = 0; i < 4 * S; ++i) span[i] = i & 1;
  for (i = 0; i < S && T; ++i) task[i] = T - 1 - i % T;
  for (i = 0; i < M; ++i) ids[i] = c->vocab ? i * 7 % c->vocab : 0;
  b.S = S, b.seq_start = start, b.task = T ? task : NULL, b.span = span;
  if (c->feature_dim)
    b.features = features;
  else
    b.ids = ids;
  if (!TRY(moe_context_create(&context, m, &limits, env))) {
    OUGHT(!TRY(moe_batch_check(m, &b, 0, env)));
    TRY(moe_forward(context, scores, &b, env));
  }
  moe_context_free(context);
  free(scores), free(features), free(ids);
}

static void model_ask(const moe_model *m, const moe_env *env) {
  const char *a[] = {"the \xff caf\xc3\xa9 is [MASK] \xe4\xb8\xad hot"}, *b[] = {"it is"};
  int32_t chars[4] = {0, 3, 0, 2}, t;
  float scores[MOE_MAX_CLASSES], *state;
  moe_predictor *p = NULL;
  int best;
  if (!moe_model_vocab(m, NULL) || moe_model_config(m)->max_len > 4096) return;
  if (TRY(moe_predictor_create(&p, m, 2, env))) return;
  for (t = 0; t < moe_model_tasks(m) && t < 5; ++t) {
    const moe_task *of = moe_model_task(m, t);
    const char *const *second = of->pair ? b : NULL;
    if (of->kind == MOE_KIND_SPAN)
      TRY(moe_predict_spans(p, t, a, second, chars, 1, scores, &best));
    else if (!TRY(moe_predict_texts(p, t, a, second, 1, scores, &best)))
      OUGHT(best >= 0 && best < of->classes);
  }
  state = (float *)malloc((size_t)moe_model_config(m)->hidden * sizeof *state);
  TRY(moe_embed_text(p, 0, MOE_POOLING_MEAN, a[0], NULL, state));
  free(state);
  moe_predictor_free(p);
}

/* Other models of this one, and its file, which must be read again as the same. */
static void model_derive(const moe_model *m, const moe_env *env) {
  int32_t last = moe_model_tasks(m) - 1;
  moe_task more = {"", MOE_KIND_CLASSIFICATION, 0, 2, 0, 0, "", 0, NULL};
  moe_model *out = NULL;
  size_t bytes = 0, again = 0;
  moe_writer count = {model_count, &bytes};
  if (!TRY(moe_model_quantize(&out, m, env))) moe_model_free(out);
  if (!TRY(moe_model_extract(&out, m, &last, last >= 0, NULL, env))) moe_model_free(out);
  if (last >= 0) more = *moe_model_task(m, 0);
  strcpy(more.name, "one-more");
  if (!TRY(moe_model_adapt(&out, m, &more, last < 0 ? MOE_GATE_RANDOM : MOE_GATE_MEAN, 1, env))) {
    count.user = &again;
    TRY(moe_model_write(out, &count, env));
    OUGHT(again > 0);
    moe_model_free(out);
  }
  count.user = &bytes;
  TRY(moe_model_write(m, &count, env));
}
