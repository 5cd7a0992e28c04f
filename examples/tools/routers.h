/* routers.h - two more routers for blocks as experts [TL] 4, beside the MLP that moe.h has: an LSTM
   and a Transformer over the layers A model with MOE_UNIT_BLOCK takes its scores from outside and
   gives back their gradients (moe_context_task_router); here they come from.
     #include "moe.h"
     #include "routers.h"
     task_router *r = router_create(ROUTER_LSTM, T, L, m, 64, seed, &env);
     moe_task_router level = {NULL, r->scores, r->dscores, NULL};
     moe_context_task_router(moe_trainer_context(trainer), &level, &env);
     in each step:  router_forward(r, &env);  moe_trainer_accumulate(...);  router_backward(r,
   &env);  router_update(r, ...);  moe_trainer_step(...); In both the sequence has one element for
   each of the L layers, x_l = vector of the task + vector of the layer, both learned, and an output
   y_l of E = 64 numbers; the scores of the layer's m blocks are z_l = W y_l + b. In the LSTM the
   choice of a layer knows the layers below, in the Transformer all others. Letters as in moe.h: T
   tasks, L layers, m blocks; V width of a task's vector, E inner width, F that of the feed-forward
   network. */
#ifndef ROUTERS_H_INCLUDED
#define ROUTERS_H_INCLUDED
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROUTER_E = 64, ROUTER_F = 256, ROUTER_HEADS = 4, ROUTER_TENSORS = 18 };

typedef enum router_kind { ROUTER_LSTM, ROUTER_TRANSFORMER } router_kind;

/* Places in task_router.tensor: the first four are of both kinds. */
enum { R_VECTORS, R_LAYERS, R_OUT_W, R_OUT_B };
enum { R_IH = 4, R_HH, R_BIAS, ROUTER_LSTM_TENSORS };
enum {
  R_IN_W = 4,
  R_IN_B,
  R_QKV_W,
  R_QKV_B,
  R_ATTENTION_W,
  R_ATTENTION_B,
  R_NORM1_W,
  R_NORM1_B,
  R_UP_W,
  R_UP_B,
  R_DOWN_W,
  R_DOWN_B,
  R_NORM2_W,
  R_NORM2_B
};

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
  float *w, *dw, *moment1, *moment2; /* (n) */
  int64_t step;                      /* updates so far */
  float *scores,
      *dscores;       /* (T, L, m) what moe_context_task_router takes; backward clears dscores */
  float *y;           /* (L, T, E) in an LSTM, (T, L, E) in a Transformer */
  float *kept, *work; /* activations that backward needs; gradients on their way */
  size_t kept_floats, work_floats;
  int32_t *start; /* (T+1) the sequences of a Transformer, L elements each */
} task_router;

static void router_add_tensor(task_router *r, const char *name, int32_t rows, int32_t cols) {
  router_tensor *t = &r->tensor[r->n_tensors++];
  t->name = name;
  t->rows = rows;
  t->cols = cols;
  t->offset = r->n;
  t->count = (size_t)rows * (size_t)(cols ? cols : 1);
  r->n += t->count;
}

static void router_make_table(task_router *r) {
  int32_t E = ROUTER_E, F = ROUTER_F;
  router_add_tensor(r, "vectors", r->T, r->V);
  router_add_tensor(r, "layers", r->L, r->V);
  router_add_tensor(r, "out.weight", r->m, E);
  router_add_tensor(r, "out.bias", r->m, 0);
  if (r->kind == ROUTER_LSTM) {
    router_add_tensor(r, "lstm.input.weight", 4 * E,
                      r->V); /* input, forget, cell and output gate, as in PyTorch */
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
  if (!r) return;
  free(r->w), free(r->scores), free(r->kept), free(r->work), free(r->start);
  free(r);
}

/* Matrices are uniform within 1 / sqrt(columns), as PyTorch's; vectors have deviation 1, LayerNorms
   1, biases 0. NULL: out of memory. */
static task_router *router_create(router_kind kind, int32_t T, int32_t L, int32_t m, int32_t V,
                                  uint64_t seed, const moe_env *env) {
  task_router *r = (task_router *)calloc(1, sizeof *r);
  size_t M = (size_t)T * (size_t)L, choices = M * (size_t)m, E = ROUTER_E, F = ROUTER_F, i;
  int32_t k;
  if (!r) return NULL;
  r->kind = kind, r->T = T, r->L = L, r->m = m, r->V = V;
  router_make_table(r);
  if (kind == ROUTER_LSTM) {
    r->kept_floats =
        (size_t)T * (size_t)V + M * 4 * E +
        2 * (M + (size_t)T) * E; /* x, gates, cells and outputs with those before the first */
    r->work_floats = (size_t)T * (4 * E + 2 * E + (size_t)V);
  } else {
    r->kept_floats = M * ((size_t)V + E + 3 * E + E + 2 * ROUTER_HEADS + 2 * (E + 2) + E + 2 * F);
    r->work_floats = M * (5 * E + 3 * E + 2 * F + (size_t)V) +
                     moe_attention_scratch(L, ROUTER_E, ROUTER_HEADS, 1, env);
  }
  r->w = (float *)calloc(4 * r->n, sizeof(float));
  r->scores = (float *)calloc(2 * choices + (M + (size_t)T) * E, sizeof(float));
  r->kept = (float *)calloc(r->kept_floats, sizeof(float));
  r->work = (float *)calloc(r->work_floats, sizeof(float));
  r->start = (int32_t *)calloc((size_t)T + 1, sizeof *r->start);
  if (!r->w || !r->scores || !r->kept || !r->work || !r->start) {
    router_free(r);
    return NULL;
  }
  r->dw = r->w + r->n, r->moment1 = r->dw + r->n, r->moment2 = r->moment1 + r->n;
  r->dscores = r->scores + choices, r->y = r->dscores + choices;
  for (k = 0; k < T; ++k) r->start[k + 1] = r->start[k] + L;
  for (k = 0; k < r->n_tensors; ++k) {
    const router_tensor *t = &r->tensor[k];
    double width = k <= R_LAYERS ? 1.7320508
                                 : 1 / sqrt((double)(k == R_IH ? ROUTER_E
                                                     : t->cols ? t->cols
                                                               : 1));
    int norm = kind == ROUTER_TRANSFORMER && (k == R_NORM1_W || k == R_NORM2_W);
    for (i = 0; i < t->count; ++i)
      if (t->cols)
        r->w[t->offset + i] =
            (float)(width *
                    ((double)(moe_key(seed, i, (uint64_t)k, 0, 99) >> 11) / 4503599627370496.0 -
                     1));
      else
        r->w[t->offset + i] = norm ? 1.0f : 0.0f;
  }
  return r;
}

/* The linear layer of matrix k; bias: the number of that tensor, or -1. */
static moe_linear_op router_linear_op(const task_router *r, int k, int bias) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.w = moe_mat_rows(r->w + r->tensor[k].offset, r->tensor[k].rows, r->tensor[k].cols);
  op.dw = r->dw + r->tensor[k].offset;
  op.b = bias < 0 ? NULL : r->w + r->tensor[bias].offset;
  op.db = bias < 0 ? NULL : r->dw + r->tensor[bias].offset;
  return op;
}

/* y (M, rows) = x W^T + b, with tensor k and the bias behind it. */
static void router_linear(const task_router *r, float *y, const float *x, int k, int32_t M,
                          const moe_env *env) {
  moe_linear_op op = router_linear_op(r, k, k + 1);
  op.y = y;
  op.x = x;
  op.M = M;
  moe_linear_forward(&op, env);
}

static void router_linear_backward(task_router *r, float *dx, const float *dy, const float *x,
                                   int k, int32_t M, const moe_env *env) {
  moe_linear_op op = router_linear_op(r, k, k + 1);
  op.x = x;
  op.M = M;
  op.dx = dx;
  op.dy = dy;
  moe_linear_backward(&op, env);
}

/* ---- the LSTM ---- */

static float router_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* Where the kept activations of a layer lie: all tasks side by side. */
static float *lstm_gates(const task_router *r, int32_t l) {
  return r->kept + (size_t)l * (size_t)r->T * 4 * ROUTER_E;
} /* (T, 4E) */
static float *lstm_cells(const task_router *r,
                         int32_t l) { /* (T, E) behind layer l - 1; those of l = 0 are zeros */
  return r->kept + (size_t)r->L * (size_t)r->T * 4 * ROUTER_E + (size_t)l * (size_t)r->T * ROUTER_E;
}
static float *lstm_outputs(const task_router *r, int32_t l) {
  return r->y + (size_t)l * (size_t)r->T * ROUTER_E;
} /* alike */
static float *lstm_inputs(const task_router *r) { return lstm_cells(r, r->L + 1); } /* (T, V) */

/* x (T, V): the vectors of the tasks plus that of the layer. */
static void lstm_make_inputs(const task_router *r, int32_t l) {
  const float *layer = r->w + r->tensor[R_LAYERS].offset + (size_t)l * (size_t)r->V;
  float *x = lstm_inputs(r);
  int32_t t, j;
  for (t = 0; t < r->T; ++t)
    for (j = 0; j < r->V; ++j) x[t * r->V + j] = r->w[t * r->V + j] + layer[j];
}

/* i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of W x + U h + b;  c = f c' + i g;  h = o tanh c;  z
   = W h + b. */
static void lstm_forward(task_router *r, const moe_env *env) {
  moe_linear_op in = router_linear_op(r, R_IH, R_BIAS), hidden = router_linear_op(r, R_HH, -1);
  float *from_hidden = r->work;
  int32_t l, t, j, E = ROUTER_E;
  for (l = 0; l < r->L; ++l) {
    const float *before = lstm_cells(r, l);
    float *cell = lstm_cells(r, l + 1), *out = lstm_outputs(r, l + 1);
    lstm_make_inputs(r, l);
    in.y = lstm_gates(r, l), in.x = lstm_inputs(r), in.M = r->T;
    hidden.y = from_hidden, hidden.x = lstm_outputs(r, l), hidden.M = r->T;
    moe_linear_forward(&in, env);
    moe_linear_forward(&hidden, env);
    for (t = 0; t < r->T; ++t) {
      float *g = lstm_gates(r, l) + t * 4 * E;
      for (j = 0; j < 4 * E; ++j) {
        float a = g[j] + from_hidden[t * 4 * E + j];
        g[j] = j / E == 2 ? tanhf(a) : router_sigmoid(a);
      }
      for (j = 0; j < E; ++j) {
        cell[t * E + j] = g[E + j] * before[t * E + j] + g[j] * g[2 * E + j];
        out[t * E + j] = g[3 * E + j] * tanhf(cell[t * E + j]);
      }
    }
    for (t = 0; t < r->T; ++t)
      router_linear(r, r->scores + ((size_t)t * (size_t)r->L + (size_t)l) * (size_t)r->m,
                    out + t * E, R_OUT_W, 1, env);
  }
}

/* From the last layer to the first; dh and dc come from the layer above. */
static void lstm_backward(task_router *r, const moe_env *env) {
  moe_linear_op in = router_linear_op(r, R_IH, R_BIAS), hidden = router_linear_op(r, R_HH, -1);
  int32_t l, t, j, E = ROUTER_E, T = r->T;
  float *dgates = r->work, *dh = dgates + T * 4 * E, *dc = dh + T * E, *dx = dc + T * E;
  memset(dh, 0, (size_t)(2 * T * E) * sizeof *dh);
  for (l = r->L - 1; l >= 0; --l) {
    const float *before = lstm_cells(r, l), *cell = lstm_cells(r, l + 1),
                *out = lstm_outputs(r, l + 1);
    float *dlayer = r->dw + r->tensor[R_LAYERS].offset + (size_t)l * (size_t)r->V;
    for (t = 0; t < T; ++t) {
      const float *g = lstm_gates(r, l) + t * 4 * E;
      float *d = dgates + t * 4 * E;
      router_linear_backward(r, dh + t * E,
                             r->dscores + ((size_t)t * (size_t)r->L + (size_t)l) * (size_t)r->m,
                             out + t * E, R_OUT_W, 1, env);
      for (j = 0; j < E; ++j) {
        float i = g[j], f = g[E + j], c = g[2 * E + j], o = g[3 * E + j],
              tc = tanhf(cell[t * E + j]);
        float dcell = dc[t * E + j] + dh[t * E + j] * o * (1 - tc * tc);
        d[j] = dcell * c * i * (1 - i);
        d[E + j] = dcell * before[t * E + j] * f * (1 - f);
        d[2 * E + j] = dcell * i * (1 - c * c);
        d[3 * E + j] = dh[t * E + j] * tc * o * (1 - o);
        dc[t * E + j] = dcell * f;
      }
    }
    memset(dx, 0, (size_t)(T * r->V) * sizeof *dx);
    memset(dh, 0, (size_t)(T * E) * sizeof *dh);
    lstm_make_inputs(r, l);
    in.dx = dx, in.dy = dgates, in.x = lstm_inputs(r), in.M = T;
    hidden.dx = dh, hidden.dy = dgates, hidden.x = lstm_outputs(r, l), hidden.M = T;
    moe_linear_backward(&in, env);
    moe_linear_backward(&hidden, env);
    for (t = 0; t < T; ++t)
      for (j = 0; j < r->V; ++j) {
        r->dw[t * r->V + j] += dx[t * r->V + j];
        dlayer[j] += dx[t * r->V + j];
      }
  }
}

/* ---- the Transformer ---- */

/* Its activations, all (M = T L, ...). */
typedef struct router_pass {
  float *x, *in, *qkv, *mixed, *stats, *sum1, *mean1, *rstd1, *one, *pre, *act, *sum2, *mean2,
      *rstd2;
} router_pass;

static router_pass transformer_pass(const task_router *r) {
  size_t M = (size_t)r->T * (size_t)r->L, E = ROUTER_E;
  router_pass p;
  p.x = r->kept;
  p.in = p.x + M * (size_t)r->V;
  p.qkv = p.in + M * E;
  p.mixed = p.qkv + M * 3 * E;
  p.stats = p.mixed + M * E;
  p.sum1 = p.stats + M * 2 * ROUTER_HEADS;
  p.mean1 = p.sum1 + M * E;
  p.rstd1 = p.mean1 + M;
  p.one = p.rstd1 + M;
  p.pre = p.one + M * E;
  p.act = p.pre + M * ROUTER_F;
  p.sum2 = p.act + M * ROUTER_F;
  p.mean2 = p.sum2 + M * E;
  p.rstd2 = p.mean2 + M;
  return p;
}

static const float *router_at(const task_router *r, int k) { return r->w + r->tensor[k].offset; }

static moe_attention_op transformer_attention(const task_router *r, const router_pass *p) {
  moe_attention_op op;
  moe_attention_op_init(&op);
  op.y = p->mixed;
  op.stats = p->stats;
  op.qkv = p->qkv;
  op.seq_start = r->start;
  op.S = r->T;
  op.M = r->T * r->L;
  op.H = ROUTER_E;
  op.A = ROUTER_HEADS;
  return op;
}

/* The LayerNorm of tensors k and k + 1; its input is what backward reads, too. */
static moe_layernorm_op transformer_norm(const task_router *r, int k, float *mean, float *rstd,
                                         const float *x) {
  moe_layernorm_op op;
  moe_layernorm_op_init(&op);
  op.mean = mean;
  op.rstd = rstd;
  op.x = x;
  op.gamma = router_at(r, k);
  op.beta = router_at(r, k + 1);
  op.eps = 1e-5f;
  op.M = r->T * r->L;
  op.H = ROUTER_E;
  op.dgamma = r->dw + r->tensor[k].offset;
  op.dbeta = r->dw + r->tensor[k + 1].offset;
  return op;
}

/* e = W x + b;  s = LayerNorm(e + W attention(e) + b);  y = LayerNorm(s + W GELU(W s + b) + b);  z
   = W y + b: one block as in BERT. */
static void transformer_forward(task_router *r, const moe_env *env) {
  router_pass p = transformer_pass(r);
  moe_attention_op attention = transformer_attention(r, &p);
  moe_layernorm_op norm1 = transformer_norm(r, R_NORM1_W, p.mean1, p.rstd1, p.sum1),
                   norm2 = transformer_norm(r, R_NORM2_W, p.mean2, p.rstd2, p.sum2);
  const float *layers = router_at(r, R_LAYERS);
  int32_t M = r->T * r->L, E = ROUTER_E, F = ROUTER_F, t, l, j;
  size_t i, n = (size_t)(M * E);
  for (t = 0; t < r->T; ++t)
    for (l = 0; l < r->L; ++l)
      for (j = 0; j < r->V; ++j)
        p.x[(t * r->L + l) * r->V + j] = r->w[t * r->V + j] + layers[l * r->V + j];
  router_linear(r, p.in, p.x, R_IN_W, M, env);
  router_linear(r, p.qkv, p.in, R_QKV_W, M, env);
  attention.scratch = r->work;
  moe_attention_forward(&attention, env);
  router_linear(r, p.sum1, p.mixed, R_ATTENTION_W, M, env);
  for (i = 0; i < n; ++i) p.sum1[i] += p.in[i];
  norm1.y = p.one;
  moe_layernorm_forward(&norm1, env);
  router_linear(r, p.pre, p.one, R_UP_W, M, env);
  moe_gelu_forward(p.act, p.pre, (size_t)(M * F), env);
  router_linear(r, p.sum2, p.act, R_DOWN_W, M, env);
  for (i = 0; i < n; ++i) p.sum2[i] += p.one[i];
  norm2.y = r->y;
  moe_layernorm_forward(&norm2, env);
  router_linear(r, r->scores, r->y, R_OUT_W, M, env);
}

static void transformer_backward(task_router *r, const moe_env *env) {
  router_pass p = transformer_pass(r);
  moe_attention_op attention = transformer_attention(r, &p);
  moe_layernorm_op norm1 = transformer_norm(r, R_NORM1_W, p.mean1, p.rstd1, p.sum1),
                   norm2 = transformer_norm(r, R_NORM2_W, p.mean2, p.rstd2, p.sum2);
  int32_t M = r->T * r->L, E = ROUTER_E, F = ROUTER_F, t, l, j;
  size_t i, n = (size_t)(M * E);
  float *dy = r->work, *dsum2 = dy + n, *done = dsum2 + n, *dsum1 = done + n, *din = dsum1 + n,
        *dqkv = din + n, *dact = dqkv + 3 * n;
  float *dpre = dact + M * F, *dx = dpre + M * F, *scratch = dx + M * r->V,
        *dmixed = dy; /* dy is no longer needed then */
  float *dlayers = r->dw + r->tensor[R_LAYERS].offset;
  memset(r->work, 0, (size_t)(scratch - r->work) * sizeof *r->work);
  router_linear_backward(r, dy, r->dscores, r->y, R_OUT_W, M, env);
  norm2.dx = dsum2;
  norm2.dy = dy;
  moe_layernorm_backward(&norm2, env);
  memcpy(done, dsum2, n * sizeof *done);
  router_linear_backward(r, dact, dsum2, p.act, R_DOWN_W, M, env);
  moe_gelu_backward(dpre, dact, p.pre, (size_t)(M * F), env);
  router_linear_backward(r, done, dpre, p.one, R_UP_W, M, env);
  norm1.dx = dsum1;
  norm1.dy = done;
  moe_layernorm_backward(&norm1, env);
  memcpy(din, dsum1, n * sizeof *din);
  memset(dmixed, 0, n * sizeof *dmixed);
  router_linear_backward(r, dmixed, dsum1, p.mixed, R_ATTENTION_W, M, env);
  attention.scratch = scratch;
  attention.dqkv = dqkv;
  attention.dy = dmixed;
  moe_attention_backward(&attention, env);
  router_linear_backward(r, din, dqkv, p.in, R_QKV_W, M, env);
  router_linear_backward(r, dx, din, p.x, R_IN_W, M, env);
  for (t = 0; t < r->T; ++t)
    for (l = 0; l < r->L; ++l)
      for (j = 0; j < r->V; ++j) {
        i = (size_t)((t * r->L + l) * r->V + j);
        r->dw[t * r->V + j] += dx[i];
        dlayers[l * r->V + j] += dx[i];
      }
}

/* ---- both ---- */

/* Fills the scores of all tasks. */
static void router_forward(task_router *r, const moe_env *env) {
  if (r->kind == ROUTER_LSTM)
    lstm_forward(r, env);
  else
    transformer_forward(r, env);
}

/* The gradients of the parameters += what dscores asks for; dscores is zero then. To be called
   after router_forward, which leaves what it needs. */
static void router_backward(task_router *r, const moe_env *env) {
  if (r->kind == ROUTER_LSTM)
    lstm_backward(r, env);
  else
    transformer_backward(r, env);
  memset(r->dscores, 0, (size_t)r->T * (size_t)r->L * (size_t)r->m * sizeof *r->dscores);
}

/* One step of moe.h's Adam, with decoupled decay of matrices, the gradient's norm clipped (0: not).
   rate is of the task vectors and of all else; 0 freezes. Returns 0, or -1 where a gradient is no
   finite number: nothing is changed then but the gradients, which are zero. */
static int router_update(task_router *r, float vector_rate, float rate, float decay, float clip,
                         const moe_env *env) {
  size_t vectors = r->tensor[R_VECTORS].count;
  double norm;
  float factor;
  moe_adam_op op;
  int32_t k;
  moe_adam_op_init(&op);
  if (vector_rate <= 0) memset(r->dw, 0, vectors * sizeof *r->dw);
  if (rate <= 0) memset(r->dw + vectors, 0, (r->n - vectors) * sizeof *r->dw);
  norm = moe_gradient_norm(r->dw, r->n, env);
  if (!(norm < 1e30)) {
    memset(r->dw, 0, r->n * sizeof *r->dw);
    return -1;
  }
  factor = clip > 0 && norm + 1e-6 > (double)clip ? (float)((double)clip / (norm + 1e-6)) : 1.0f;
  ++r->step;
  for (k = 0; k < r->n_tensors; ++k) {
    const router_tensor *t = &r->tensor[k];
    float own = k == R_VECTORS ? vector_rate : rate;
    op.w = r->w + t->offset;
    op.g = r->dw + t->offset;
    op.m = r->moment1 + t->offset;
    op.v = r->moment2 + t->offset;
    op.count = t->count;
    op.t = r->step;
    op.lr = own;
    op.weight_decay = t->cols ? decay : 0;
    op.factor = factor;
    if (own > 0) (void)moe_adam_step(&op, env);
  }
  return 0;
}
#endif
