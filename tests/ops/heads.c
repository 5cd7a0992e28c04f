/* Heads and losses of every kind of task: against their formulas in double, and differences of
   those. */

enum { HEADS_S = 11, HEADS_H = 6, HEADS_M = 50, HEADS_T = 4, HEADS_CLASSES = 3 };

typedef struct heads_fixture {
  moe_task tasks[HEADS_T];
  size_t head[HEADS_T], weights;
  int32_t start[HEADS_S + 1], task[HEADS_S], span[4 * HEADS_S];
  float label[HEADS_S], hidden[HEADS_M * HEADS_H], w[200];
  float scores[HEADS_S * HEADS_CLASSES], losses[HEADS_S], dhidden[HEADS_M * HEADS_H], dw[200];
  float scratch[6 * HEADS_H];
  uint64_t keys[HEADS_S];
  float mask[HEADS_S][3 * HEADS_H]; /* of dropout: what 1 becomes */
  moe_heads_op op;
  moe_env env;
} heads_fixture;

static void heads_make(heads_fixture *f, float dropout) {
  static const moe_kind kind[HEADS_T] = {MOE_KIND_CLASSIFICATION, MOE_KIND_REGRESSION,
                                         MOE_KIND_RANKING, MOE_KIND_SPAN};
  uint64_t state = 3;
  int32_t s, t, i;
  memset(f, 0, sizeof *f);
  f->env = models_env(MOE_ISA_AUTO);
  for (t = 0; t < HEADS_T; ++t) {
    f->tasks[t].kind = kind[t];
    f->tasks[t].classes = t == 0 ? 3 : t == 1 ? 1 : 2;
    f->head[t] = f->weights;
    f->weights += (size_t)(f->tasks[t].classes * (HEADS_H * (t == 3 ? 3 : 1) + 1));
  }
  for (i = 0; i < (int32_t)f->weights; ++i) f->w[i] = test_random(&state);
  for (i = 0; i < HEADS_M * HEADS_H; ++i) f->hidden[i] = test_random(&state);
  for (s = 0; s < HEADS_S; ++s) {
    int32_t length = 1 + s % 5;
    f->start[s + 1] = f->start[s] + length;
    f->task[s] = s % HEADS_T;
    f->label[s] = f->task[s] == 1 ? 0.7f : (float)(s / HEADS_T % f->tasks[f->task[s]].classes);
    f->span[4 * s] = 0, f->span[4 * s + 1] = (length + 1) / 2;
    f->span[4 * s + 2] = length / 2, f->span[4 * s + 3] = length;
    f->keys[s] = moe_key(1, 2, (uint64_t)s, 3, 4);
    for (i = 0; i < 3 * HEADS_H; ++i) f->mask[s][i] = 1;
    moe_dropout(f->mask[s], f->mask[s], 3 * HEADS_H, dropout, f->keys[s], &f->env);
  }
  moe_heads_op_init(&f->op);
  f->op.scores = f->scores, f->op.losses = f->losses, f->op.hidden = f->hidden, f->op.w = f->w;
  f->op.head = f->head, f->op.tasks = f->tasks, f->op.task = f->task, f->op.label = f->label;
  f->op.span = f->span, f->op.seq_start = f->start, f->op.keys = f->keys;
  f->op.dropout = dropout, f->op.S = HEADS_S, f->op.M = f->start[HEADS_S], f->op.H = HEADS_H;
  f->op.T = HEADS_T, f->op.max_classes = HEADS_CLASSES, f->op.scratch = f->scratch;
  f->op.dhidden = f->dhidden, f->op.dw = f->dw, f->op.batch_size = HEADS_S + 3;
}

/* Scores (C) and loss of sequence s, in double. */
static double heads_reference(const heads_fixture *f, int32_t s, double *scores) {
  const moe_task *task = &f->tasks[f->task[s]];
  const float *x = f->hidden + f->start[s] * HEADS_H;
  int width = HEADS_H * (task->kind == MOE_KIND_SPAN ? 3 : 1), C = task->classes, c, j, i;
  const float *w = f->w + f->head[f->task[s]];
  double sum = 0;
  for (c = 0; c < C; ++c) {
    scores[c] = (double)w[C * width + c];
    for (j = 0; j < width; ++j) {
      const int32_t *span = f->span + 4 * s + 2 * (j / HEADS_H - 1);
      double feature = 0;
      if (j < HEADS_H)
        feature = (double)x[j];
      else
        for (i = span[0]; i < span[1]; ++i)
          feature += (double)x[i * HEADS_H + j % HEADS_H] / (span[1] - span[0]);
      scores[c] += (double)w[c * width + j] * feature * (double)f->mask[s][j];
    }
  }
  if (task->kind == MOE_KIND_REGRESSION)
    return (scores[0] - (double)f->label[s]) * (scores[0] - (double)f->label[s]);
  for (c = 0; c < C; ++c) sum += exp(scores[c]);
  return (log(sum) - scores[(int)f->label[s]]) / log(C);
}

static double heads_sum(const heads_fixture *f) {
  double scores[HEADS_CLASSES], sum = 0;
  int32_t s;
  for (s = 0; s < HEADS_S; ++s) sum += heads_reference(f, s, scores);
  return sum / f->op.batch_size;
}

/* Slope of the summed losses along one number. */
static double heads_slope(const heads_fixture *f, float *x) {
  float old = *x, h = 1.0f / 64;
  double above, below;
  *x = old + h, above = heads_sum(f);
  *x = old - h, below = heads_sum(f);
  *x = old;
  return (above - below) / (2 * (double)h);
}

static void test_heads_equal_their_formulas_and_differences(void) {
  static heads_fixture f;
  int with_dropout;
  int32_t s, c;
  size_t i;
  for (with_dropout = 0; with_dropout < 2; ++with_dropout) {
    heads_make(&f, with_dropout ? 0.25f : 0);
    memset(f.scores, 0x7f, sizeof f.scores);
    CHECK(!moe_heads_forward(&f.op, &f.env), "%s", said);
    for (s = 0; s < HEADS_S; ++s) {
      double want[HEADS_CLASSES] = {0, 0, 0}, loss = heads_reference(&f, s, want);
      for (c = 0; c < HEADS_CLASSES; ++c)
        CHECK_NEAR(f.scores[s * HEADS_CLASSES + c], want[c], 1e-5);
      CHECK_NEAR(f.losses[s], loss, 2e-5 * (1 + loss));
    }
    CHECK(!moe_heads_backward(&f.op, &f.env), "%s", said);
    for (i = 0; i < f.weights; ++i) CHECK_NEAR(f.dw[i], heads_slope(&f, &f.w[i]), 3e-4);
    for (i = 0; i < (size_t)f.start[HEADS_S] * HEADS_H; ++i)
      CHECK_NEAR(f.dhidden[i], heads_slope(&f, &f.hidden[i]), 3e-4);
  }
}

/* Without losses labels are not read; gradients that are not wanted may be NULL, and the others are
   added to what is there. */
static void test_heads_leave_out_what_is_not_wanted(void) {
  static heads_fixture f, g;
  size_t i;
  heads_make(&f, 0), heads_make(&g, 0);
  g.op.losses = NULL, g.op.label = NULL;
  CHECK(!moe_heads_forward(&f.op, &f.env) && !moe_heads_forward(&g.op, &g.env), "%s", said);
  CHECK(!memcmp(f.scores, g.scores, sizeof f.scores), "scores without losses");
  CHECK(!moe_heads_backward(&f.op, &f.env), "%s", said);
  g.op.label = g.label, g.op.dhidden = NULL;
  CHECK(!moe_heads_backward(&g.op, &g.env), "%s", said);
  CHECK(!memcmp(f.dw, g.dw, sizeof f.dw), "dw without dhidden");
  g.op.dhidden = g.dhidden, g.op.dw = NULL;
  for (i = 0; i < HEADS_M * HEADS_H; ++i) g.dhidden[i] = 1;
  CHECK(!moe_heads_backward(&g.op, &g.env), "%s", said);
  for (i = 0; i < (size_t)f.start[HEADS_S] * HEADS_H; ++i)
    CHECK_NEAR(g.dhidden[i], 1 + f.dhidden[i], 1e-6);
  g.op.overwrite = 1;
  CHECK(!moe_heads_backward(&g.op, &g.env), "%s", said);
  CHECK(!memcmp(f.dhidden, g.dhidden, (size_t)f.start[HEADS_S] * HEADS_H * sizeof(float)),
        "dhidden is overwritten");
  g.op.S = 0;
  CHECK(!moe_heads_forward(&g.op, &g.env) && !moe_heads_backward(&g.op, &g.env), "no sequences");
}

static void run_heads(void) {
  RUN(test_heads_equal_their_formulas_and_differences);
  RUN(test_heads_leave_out_what_is_not_wanted);
}
