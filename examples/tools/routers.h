/* routers.h - two more routers for blocks as experts [TL] 4, beside the MLP that moe.h has: an LSTM
   and a Transformer over the layers. A model with MOE_UNIT_BLOCK takes its scores from outside and
   gives back their gradients (moe_context_task_router); here they come from.
     #include "moe.h"
     #include "routers.h"
     task_router *r = router_create(ROUTER_LSTM, T, L, m, 64, seed, &env);
     moe_task_router level = {NULL, r->scores, r->dscores, NULL};
     moe_context_task_router(moe_trainer_context(trainer), &level, &env);
     in each step:  router_forward(r, &env);  moe_trainer_accumulate(...);
                    router_backward(r, &env);  router_update(r, ...);  moe_trainer_step(...);
   In both the sequence has one element for each of the L layers, x_l = vector of the task + vector
   of the layer, both learned, and an output y_l of E = 64 numbers; the scores of the layer's m
   blocks are z_l = W y_l + b. In the LSTM the choice of a layer knows the layers below, in the
   Transformer all others. Letters as in moe.h: T tasks, L layers, m blocks; V width of a task's
   vector, E inner width, F that of the feed-forward network. */
#ifndef ROUTERS_H_INCLUDED
#define ROUTERS_H_INCLUDED
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROUTER_E = 64, ROUTER_F = 256, ROUTER_HEADS = 4 };
enum { ROUTER_LSTM_TENSORS = 7, ROUTER_TENSORS = 18 };

typedef enum router_kind { ROUTER_LSTM, ROUTER_TRANSFORMER } router_kind;

/* Places in task_router.tensor: the first four are of both kinds, each bias behind its matrix. */
enum { R_VECTORS, R_LAYERS, R_OUT, R_IH = 4, R_HH, R_BIAS };
enum { R_IN = 4, R_QKV = 6, R_ATTENTION = 8, R_NORM1 = 10, R_UP = 12, R_DOWN = 14, R_NORM2 = 16 };

typedef struct router_tensor {
  const char *name;
  size_t offset, count;
  int32_t rows, cols; /* cols 0: a vector */
} router_tensor;

typedef struct task_router {
  router_kind kind;
  int32_t T, L, m, V, n_tensors;
  router_tensor tensor[ROUTER_TENSORS];
  size_t n;                          /* parameters; those of the vectors come first */
  float *w, *dw, *moment1, *moment2; /* (n) one block */
  int64_t step;                      /* updates so far */
  float *scores, *dscores;           /* (T, L, m) for moe_context_task_router; backward clears
                                        dscores */
  float *y;       /* (L + 1, T, E) in an LSTM, from layer 1 on; (T, L, E) in a Transformer */
  float *kept;    /* activations that backward needs */
  float *work;    /* gradients on their way */
  int32_t *start; /* (T+1) the sequences of a Transformer, L elements each */
} task_router;

static void router_add_tensor(task_router *r, const char *name, int32_t rows_of, int32_t cols) {
  router_tensor *t = &r->tensor[r->n_tensors++];
  t->name = name;
  t->rows = rows_of;
  t->cols = cols;
  t->offset = r->n;
  t->count = (size_t)rows_of * (size_t)(cols ? cols : 1);
  r->n += t->count;
}

static void router_make_table(task_router *r) {
  int32_t E = ROUTER_E, F = ROUTER_F;
  router_add_tensor(r, "vectors", r->T, r->V);
  router_add_tensor(r, "layers", r->L, r->V);
  router_add_tensor(r, "out.weight", r->m, E);
  router_add_tensor(r, "out.bias", r->m, 0);
  if (r->kind == ROUTER_LSTM) { /* input, forget, cell and output gate, as in PyTorch */
    router_add_tensor(r, "lstm.input.weight", 4 * E, r->V);
    router_add_tensor(r, "lstm.hidden.weight", 4 * E, E);
    router_add_tensor(r, "lstm.bias", 4 * E, 0);
    return;
  }
  router_add_tensor(r, "in.weight", E, r->V);
  router_add_tensor(r, "in.bias", E, 0);
  router_add_tensor(r, "qkv.weight", 3 * E, E);
  router_add_tensor(r, "qkv.bias", 3 * E, 0);
  router_add_tensor(r, "attention.weight", E, E);
  router_add_tensor(r, "attention.bias", E, 0);
  router_add_tensor(r, "norm1.weight", E, 0);
  router_add_tensor(r, "norm1.bias", E, 0);
  router_add_tensor(r, "up.weight", F, E);
  router_add_tensor(r, "up.bias", F, 0);
  router_add_tensor(r, "down.weight", E, F);
  router_add_tensor(r, "down.bias", E, 0);
  router_add_tensor(r, "norm2.weight", E, 0);
  router_add_tensor(r, "norm2.bias", E, 0);
}

static void router_free(task_router *r) {
  if (r) free(r->w), free(r->scores), free(r->kept), free(r->work), free(r->start);
  free(r);
}

/* Matrices are uniform within 1 / sqrt(columns), as PyTorch's; vectors have deviation 1, LayerNorms
   1, biases 0. */
static void router_set_weights(task_router *r, uint64_t seed) {
  size_t i;
  int32_t k;
  for (k = 0; k < r->n_tensors; ++k) {
    const router_tensor *t = &r->tensor[k];
    int norm = r->kind == ROUTER_TRANSFORMER && (k == R_NORM1 || k == R_NORM2);
    double width = k <= R_LAYERS ? 1.7320508 : 1 / sqrt(k == R_IH ? ROUTER_E : (double)t->cols);
    for (i = 0; i < t->count; ++i) {
      uint64_t key = moe_key(seed, i, (uint64_t)k, 0, 99);
      r->w[t->offset + i] =
          t->cols ? (float)(width * ((double)(key >> 11) / 4503599627370496.0 - 1)) : (float)norm;
    }
  }
}

/* NULL: out of memory. */
static task_router *router_create(router_kind kind, int32_t T, int32_t L, int32_t m, int32_t V,
                                  uint64_t seed, const moe_env *e) {
  task_router *r = (task_router *)calloc(1, sizeof *r);
  size_t M = (size_t)T * (size_t)L, choices = M * (size_t)m, E = ROUTER_E, F = ROUTER_F;
  size_t kept = (size_t)(T * V) + M * 4 * E + (M + (size_t)T) * E;
  size_t work = (size_t)T * (4 * E + 2 * E + (size_t)V);
  int32_t t;
  if (!r) return NULL;
  r->kind = kind, r->T = T, r->L = L, r->m = m, r->V = V;
  router_make_table(r);
  if (kind == ROUTER_TRANSFORMER) {
    kept = M * ((size_t)V + E + 3 * E + E + 2 * ROUTER_HEADS + 2 * (E + 2) + E + 2 * F);
    work = M * (5 * E + 3 * E + 2 * F + (size_t)V) +
           moe_attention_scratch(L, ROUTER_E, ROUTER_HEADS, 1, e);
  }
  r->w = (float *)calloc(4 * r->n, sizeof(float));
  r->scores = (float *)calloc(2 * choices + (M + (size_t)T) * E, sizeof(float));
  r->kept = (float *)calloc(kept, sizeof(float));
  r->work = (float *)calloc(work, sizeof(float));
  r->start = (int32_t *)calloc((size_t)T + 1, sizeof *r->start);
  if (!r->w || !r->scores || !r->kept || !r->work || !r->start) {
    router_free(r);
    return NULL;
  }
  r->dw = r->w + r->n, r->moment1 = r->dw + r->n, r->moment2 = r->moment1 + r->n;
  r->dscores = r->scores + choices, r->y = r->dscores + choices;
  for (t = 0; t < T; ++t) r->start[t + 1] = r->start[t] + L;
  router_set_weights(r, seed);
  return r;
}

static float *router_at(const task_router *r, int k) { return r->w + r->tensor[k].offset; }
static float *router_dat(const task_router *r, int k) { return r->dw + r->tensor[k].offset; }

/* The linear layer of matrix k on x (M, cols); bias: the number of that tensor, or -1. */
static moe_linear_op router_linear_op(const task_router *r, const float *x, int k, int bias,
                                      int32_t M) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.w = moe_mat_rows(router_at(r, k), r->tensor[k].rows, r->tensor[k].cols);
  op.dw = router_dat(r, k);
  op.b = bias < 0 ? NULL : router_at(r, bias);
  op.db = bias < 0 ? NULL : router_dat(r, bias);
  op.x = x, op.M = M;
  return op;
}

static void router_linear(const task_router *r, float *y, const float *x, int k, int32_t M,
                          const moe_env *e) {
  moe_linear_op op = router_linear_op(r, x, k, k + 1, M);
  op.y = y;
  moe_linear_forward(&op, e);
}

static void router_linear_backward(task_router *r, float *dx, const float *dy, const float *x,
                                   int k, int32_t M, const moe_env *e) {
  moe_linear_op op = router_linear_op(r, x, k, k + 1, M);
  op.dx = dx, op.dy = dy;
  moe_linear_backward(&op, e);
}

/* x (V): the vector of a task plus that of a layer, and back. */
static void router_input(const task_router *r, float *x, int32_t t, int32_t l) {
  const float *task = router_at(r, R_VECTORS) + t * r->V;
  const float *layer = router_at(r, R_LAYERS) + l * r->V;
  int32_t j;
  for (j = 0; j < r->V; ++j) x[j] = task[j] + layer[j];
}

static void router_input_backward(task_router *r, const float *dx, int32_t t, int32_t l) {
  float *task = router_dat(r, R_VECTORS) + t * r->V, *layer = router_dat(r, R_LAYERS) + l * r->V;
  int32_t j;
  for (j = 0; j < r->V; ++j) task[j] += dx[j], layer[j] += dx[j];
}

/* ---- the LSTM ---- */

static float router_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* Kept activations of a layer, all tasks side by side. Cells and outputs of layer l are those
   behind layer l - 1, for l = 0 zeros. */
static float *lstm_gates(const task_router *r, int32_t l) {
  return r->kept + l * r->T * 4 * ROUTER_E; /* (T, 4E) */
}
static float *lstm_cells(const task_router *r, int32_t l) {
  return lstm_gates(r, r->L) + l * r->T * ROUTER_E; /* (T, E) */
}
static float *lstm_outputs(const task_router *r, int32_t l) { return r->y + l * r->T * ROUTER_E; }
static float *lstm_inputs(const task_router *r) { return lstm_cells(r, r->L + 1); } /* (T, V) */

/* i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of W x + U h + b;  c = f c' + i g;  h = o tanh c;
   z = W h + b. */
static void lstm_forward(task_router *r, const moe_env *e) {
  int32_t l, t, j, E = ROUTER_E;
  for (l = 0; l < r->L; ++l) {
    moe_linear_op in = router_linear_op(r, lstm_inputs(r), R_IH, R_BIAS, r->T);
    moe_linear_op hidden = router_linear_op(r, lstm_outputs(r, l), R_HH, -1, r->T);
    const float *before = lstm_cells(r, l);
    float *cell = lstm_cells(r, l + 1), *out = lstm_outputs(r, l + 1);
    for (t = 0; t < r->T; ++t) router_input(r, lstm_inputs(r) + t * r->V, t, l);
    in.y = lstm_gates(r, l), hidden.y = r->work;
    moe_linear_forward(&in, e);
    moe_linear_forward(&hidden, e);
    for (t = 0; t < r->T; ++t) {
      float *g = in.y + t * 4 * E;
      for (j = 0; j < 4 * E; ++j) {
        float a = g[j] + hidden.y[t * 4 * E + j];
        g[j] = j / E == 2 ? tanhf(a) : router_sigmoid(a);
      }
      for (j = 0; j < E; ++j) {
        cell[t * E + j] = g[E + j] * before[t * E + j] + g[j] * g[2 * E + j];
        out[t * E + j] = g[3 * E + j] * tanhf(cell[t * E + j]);
      }
      router_linear(r, r->scores + (t * r->L + l) * r->m, out + t * E, R_OUT, 1, e);
    }
  }
}

/* From the last layer to the first; dh and dc come from the layer above. */
static void lstm_backward(task_router *r, const moe_env *e) {
  int32_t l, t, j, E = ROUTER_E, T = r->T;
  float *dgates = r->work, *dh = dgates + T * 4 * E, *dc = dh + T * E, *dx = dc + T * E;
  memset(dh, 0, (size_t)(2 * T * E) * sizeof *dh);
  for (l = r->L - 1; l >= 0; --l) {
    moe_linear_op in = router_linear_op(r, lstm_inputs(r), R_IH, R_BIAS, T);
    moe_linear_op hidden = router_linear_op(r, lstm_outputs(r, l), R_HH, -1, T);
    const float *before = lstm_cells(r, l), *cell = lstm_cells(r, l + 1);
    for (t = 0; t < T; ++t) {
      const float *g = lstm_gates(r, l) + t * 4 * E;
      float *d = dgates + t * 4 * E;
      router_linear_backward(r, dh + t * E, r->dscores + (t * r->L + l) * r->m,
                             lstm_outputs(r, l + 1) + t * E, R_OUT, 1, e);
      for (j = 0; j < E; ++j) {
        float i = g[j], f = g[E + j], c = g[2 * E + j], o = g[3 * E + j];
        float tc = tanhf(cell[t * E + j]);
        float dcell = dc[t * E + j] + dh[t * E + j] * o * (1 - tc * tc);
        d[j] = dcell * c * i * (1 - i);
        d[E + j] = dcell * before[t * E + j] * f * (1 - f);
        d[2 * E + j] = dcell * i * (1 - c * c);
        d[3 * E + j] = dh[t * E + j] * tc * o * (1 - o);
        dc[t * E + j] = dcell * f;
      }
      router_input(r, lstm_inputs(r) + t * r->V, t, l);
    }
    memset(dx, 0, (size_t)(T * r->V) * sizeof *dx);
    memset(dh, 0, (size_t)(T * E) * sizeof *dh);
    in.dx = dx, hidden.dx = dh;
    in.dy = hidden.dy = dgates;
    moe_linear_backward(&in, e);
    moe_linear_backward(&hidden, e);
    for (t = 0; t < T; ++t) router_input_backward(r, dx + t * r->V, t, l);
  }
}

/* ---- the Transformer ---- */

/* Its activations, all (M = T L, ...), and its ops. */
typedef struct router_pass {
  float *x, *in, *qkv, *mixed, *sum1, *one, *pre, *act, *sum2;
  moe_attention_op attention;
  moe_layernorm_op norm1, norm2;
} router_pass;

/* The LayerNorm of tensors k and k + 1 on x; mean and rstd are behind x. */
static void router_set_norm(moe_layernorm_op *op, const task_router *r, int k, float *x) {
  moe_layernorm_op_init(op);
  op->M = r->T * r->L, op->H = ROUTER_E;
  op->mean = x + op->M * ROUTER_E, op->rstd = op->mean + op->M;
  op->x = x; /* which backward reads, too */
  op->gamma = router_at(r, k), op->beta = router_at(r, k + 1);
  op->dgamma = router_dat(r, k), op->dbeta = router_dat(r, k + 1);
  op->eps = 1e-5f;
}

static void router_set_pass(router_pass *p, const task_router *r) {
  int32_t M = r->T * r->L, E = ROUTER_E;
  p->x = r->kept;
  p->in = p->x + M * r->V;
  p->qkv = p->in + M * E;
  p->mixed = p->qkv + M * 3 * E;
  p->sum1 = p->mixed + M * E;
  p->one = p->sum1 + M * (E + 2);
  p->pre = p->one + M * E;
  p->act = p->pre + M * ROUTER_F;
  p->sum2 = p->act + M * ROUTER_F;
  moe_attention_op_init(&p->attention);
  p->attention.y = p->mixed, p->attention.qkv = p->qkv;
  p->attention.stats = p->sum2 + M * (E + 2);
  p->attention.seq_start = r->start, p->attention.S = r->T;
  p->attention.M = M, p->attention.H = E, p->attention.A = ROUTER_HEADS;
  router_set_norm(&p->norm1, r, R_NORM1, p->sum1);
  router_set_norm(&p->norm2, r, R_NORM2, p->sum2);
}

static void router_add(float *to, const float *x, int32_t n) {
  int32_t i;
  for (i = 0; i < n; ++i) to[i] += x[i];
}

/* e = W x + b;  s = LayerNorm(e + W attention(e) + b);  y = LayerNorm(s + W GELU(W s + b) + b);
   z = W y + b: one block as in BERT. */
static void transformer_forward(task_router *r, const moe_env *e) {
  int32_t M = r->T * r->L, i;
  router_pass p;
  router_set_pass(&p, r);
  for (i = 0; i < M; ++i) router_input(r, p.x + i * r->V, i / r->L, i % r->L);
  router_linear(r, p.in, p.x, R_IN, M, e);
  router_linear(r, p.qkv, p.in, R_QKV, M, e);
  p.attention.scratch = r->work;
  moe_attention_forward(&p.attention, e);
  router_linear(r, p.sum1, p.mixed, R_ATTENTION, M, e);
  router_add(p.sum1, p.in, M * ROUTER_E);
  p.norm1.y = p.one;
  moe_layernorm_forward(&p.norm1, e);
  router_linear(r, p.pre, p.one, R_UP, M, e);
  moe_gelu_forward(p.act, p.pre, (size_t)(M * ROUTER_F), e);
  router_linear(r, p.sum2, p.act, R_DOWN, M, e);
  router_add(p.sum2, p.one, M * ROUTER_E);
  p.norm2.y = r->y;
  moe_layernorm_forward(&p.norm2, e);
  router_linear(r, r->scores, r->y, R_OUT, M, e);
}

static void transformer_backward(task_router *r, const moe_env *e) {
  int32_t M = r->T * r->L, n = M * ROUTER_E, i;
  float *dy = r->work, *dsum2 = dy + n, *done = dsum2 + n, *dsum1 = done + n, *din = dsum1 + n;
  float *dqkv = din + n, *dact = dqkv + 3 * n, *dpre = dact + M * ROUTER_F;
  float *dx = dpre + M * ROUTER_F, *scratch = dx + M * r->V;
  router_pass p;
  router_set_pass(&p, r);
  memset(r->work, 0, (size_t)(scratch - r->work) * sizeof *r->work);
  router_linear_backward(r, dy, r->dscores, r->y, R_OUT, M, e);
  p.norm2.dx = dsum2, p.norm2.dy = dy;
  moe_layernorm_backward(&p.norm2, e);
  router_add(done, dsum2, n);
  router_linear_backward(r, dact, dsum2, p.act, R_DOWN, M, e);
  moe_gelu_backward(dpre, dact, p.pre, (size_t)(M * ROUTER_F), e);
  router_linear_backward(r, done, dpre, p.one, R_UP, M, e);
  p.norm1.dx = dsum1, p.norm1.dy = done;
  moe_layernorm_backward(&p.norm1, e);
  router_add(din, dsum1, n);
  memset(dy, 0, (size_t)n * sizeof *dy); /* now the gradient of what attention gives */
  router_linear_backward(r, dy, dsum1, p.mixed, R_ATTENTION, M, e);
  p.attention.scratch = scratch;
  p.attention.dqkv = dqkv, p.attention.dy = dy;
  moe_attention_backward(&p.attention, e);
  router_linear_backward(r, din, dqkv, p.in, R_QKV, M, e);
  router_linear_backward(r, dx, din, p.x, R_IN, M, e);
  for (i = 0; i < M; ++i) router_input_backward(r, dx + i * r->V, i / r->L, i % r->L);
}

/* ---- both ---- */

/* Fills the scores of all tasks. */
static void router_forward(task_router *r, const moe_env *e) {
  if (r->kind == ROUTER_LSTM)
    lstm_forward(r, e);
  else
    transformer_forward(r, e);
}

/* The gradients of the parameters += what dscores asks for; dscores is zero then. To be called
   after router_forward, which leaves what it needs. */
static void router_backward(task_router *r, const moe_env *e) {
  if (r->kind == ROUTER_LSTM)
    lstm_backward(r, e);
  else
    transformer_backward(r, e);
  memset(r->dscores, 0, (size_t)(r->T * r->L * r->m) * sizeof *r->dscores);
}

/* One step of moe.h's Adam, with decoupled decay of matrices, the gradient's norm clipped (0: not).
   vector_rate is of the task vectors, rate of all else; 0 freezes. Returns 0, or -1 where a
   gradient is not a finite number: nothing is changed then but the gradients, which are zero. */
static int router_update(task_router *r, float vector_rate, float rate, float decay, float clip,
                         const moe_env *e) {
  size_t vectors = r->tensor[R_VECTORS].count;
  double norm;
  moe_adam_op op;
  int32_t k;
  moe_adam_op_init(&op);
  if (vector_rate <= 0) memset(r->dw, 0, vectors * sizeof *r->dw);
  if (rate <= 0) memset(r->dw + vectors, 0, (r->n - vectors) * sizeof *r->dw);
  norm = moe_gradient_norm(r->dw, r->n, e);
  if (!(norm < 1e30)) {
    memset(r->dw, 0, r->n * sizeof *r->dw);
    return -1;
  }
  if (clip > 0 && norm + 1e-6 > (double)clip) op.factor = (float)((double)clip / (norm + 1e-6));
  op.t = ++r->step;
  for (k = 0; k < r->n_tensors; ++k) {
    const router_tensor *t = &r->tensor[k];
    op.lr = k == R_VECTORS ? vector_rate : rate;
    op.w = router_at(r, k), op.g = router_dat(r, k);
    op.m = r->moment1 + t->offset, op.v = r->moment2 + t->offset;
    op.count = t->count;
    op.weight_decay = t->cols ? decay : 0;
    if (op.lr > 0) (void)moe_adam_step(&op, e);
  }
  return 0;
}
#endif
