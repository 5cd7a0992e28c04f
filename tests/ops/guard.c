/* Every array of the exact size that the header says, between pages that nobody may touch: an op
   that reads or writes one element too many, before or behind, ends the program. What is left of
   the first and the last page must keep its bytes. With every instruction set, at odd sizes; the
   sanitizers run it as well. */
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define HAVE_GUARD 1
#endif

#ifdef HAVE_GUARD
enum { GUARD_MOST = 160, GUARD_BYTE = 0xa5 };
static struct {
  unsigned char *map, *p;
  size_t bytes, inner, whole;
} guard_block[GUARD_MOST];
static int guards, guard_at_end;
static uint64_t guard_state;

static void *guard_take(size_t bytes) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (bytes + page) / page * page;
  void *block = NULL;
  unsigned char *map;
  if (guards == GUARD_MOST || posix_memalign(&block, page, inner + 2 * page)) abort();
  map = (unsigned char *)block;
  memset(map + page, GUARD_BYTE, inner);
  mprotect(map, page, PROT_NONE);
  mprotect(map + page + inner, page, PROT_NONE);
  guard_block[guards].map = map;
  guard_block[guards].p = guard_at_end ? map + page + inner - bytes : map + page;
  guard_block[guards].bytes = bytes;
  guard_block[guards].inner = inner;
  guard_block[guards].whole = inner + 2 * page;
  return guard_block[guards++].p;
}

static float *guard_floats(size_t n) {
  float *x = (float *)guard_take(n * sizeof *x);
  size_t i;
  for (i = 0; i < n; ++i) x[i] = test_random(&guard_state);
  return x;
}

/* Frees all blocks; 0 if something was written beside one. */
static int guard_end_all(void) {
  int intact = 1;
  while (guards) {
    size_t page, i;
    --guards;
    page = (guard_block[guards].whole - guard_block[guards].inner) / 2;
    for (i = 0; i < guard_block[guards].inner; ++i) {
      unsigned char *at = guard_block[guards].map + page + i;
      if (at < guard_block[guards].p || at >= guard_block[guards].p + guard_block[guards].bytes)
        intact &= *at == GUARD_BYTE;
    }
    mprotect(guard_block[guards].map, guard_block[guards].whole, PROT_READ | PROT_WRITE);
    free(guard_block[guards].map);
  }
  return intact;
}

/* Weights (rows, cols) in one of the layouts; packed where the layout asks for it. */
enum { GUARD_ROWS, GUARD_PANELS, GUARD_INT8, GUARD_INT8_PANELS, GUARD_BF16, GUARD_VIEWS };
static moe_mat guard_weights(int view, int32_t rows, int32_t cols, const moe_env *env) {
  size_t n = (size_t)rows * (size_t)cols;
  const float *w = guard_floats(n);
  float *scale;
  int8_t *q;
  void *panels;
  if (view == GUARD_ROWS) return moe_mat_rows(w, rows, cols);
  if (view == GUARD_PANELS) {
    float *to = guard_floats(moe_pack_floats(rows, cols));
    moe_pack(to, w, rows, cols, env);
    return moe_mat_panels(to, rows, cols);
  }
  if (view == GUARD_BF16) {
    panels = guard_take(moe_pack_bf16_bytes(rows, cols));
    moe_pack_bf16(panels, w, rows, cols, env);
    return moe_mat_panels_bf16(panels, rows, cols);
  }
  q = (int8_t *)guard_take(n);
  scale = guard_floats((size_t)rows);
  moe_quantize(q, scale, w, rows, cols, env);
  if (view == GUARD_INT8) return moe_mat_rows_int8(q, scale, rows, cols);
  panels = guard_take(moe_pack_int8_bytes(rows, cols));
  moe_pack_int8(panels, q, rows, cols, env);
  return moe_mat_panels_int8(panels, scale, rows, cols);
}

static const int32_t guard_shape[][2] = {{1, 1},   {2, 5},   {15, 7},  {16, 16},   {17, 33},
                                         {33, 20}, {48, 64}, {50, 67}, {100, 129}, {300, 31}};
static const int32_t guard_tokens[] = {1, 2, 3, 5, 16, 17, 33, 70};

/* Every shape, both places; body(M, rows, cols, env). */
static void guard_each(void (*body)(int32_t M, int32_t rows, int32_t cols, const moe_env *env)) {
  size_t isa, i, m;
  for (isa = 0; isa < ISAS; ++isa)
    for (i = 0; i < sizeof guard_shape / sizeof *guard_shape; ++i)
      for (m = 0; m < sizeof guard_tokens / sizeof *guard_tokens; ++m)
        for (guard_at_end = 0; guard_at_end < 2; ++guard_at_end) {
          moe_env env;
          if (moe_env_init(&env, isas[isa])) continue;
          guard_state = 17 * m + i;
          body(guard_tokens[m], guard_shape[i][0], guard_shape[i][1], &env);
          CHECK_STATE();
        }
}

static void guard_forward(int32_t M, int32_t rows, int32_t cols, const moe_env *env) {
  int view, with;
  for (view = 0; view < GUARD_VIEWS; ++view)
    for (with = 0; with < 3; ++with) { /* y and a bias; act alone; both */
      moe_linear_op op;
      moe_linear_op_init(&op);
      op.w = guard_weights(view, rows, cols, env);
      op.x = guard_floats((size_t)(M * cols));
      op.M = M;
      if (with != 1) op.y = guard_floats((size_t)(M * rows));
      if (with != 0) op.act = guard_floats((size_t)(M * rows));
      if (with != 2) op.b = guard_floats((size_t)rows);
      CHECK(!moe_linear_forward(&op, env), "view %d", view);
      CHECK(guard_end_all(), "view %d, M %d, %d x %d, %s: something beside an array is written",
            view, (int)M, (int)rows, (int)cols, moe_isa_name(env->isa));
    }
}

static void guard_backward(int32_t M, int32_t rows, int32_t cols, const moe_env *env) {
  moe_env bf16 = *env;
  int round;
  bf16.precision = MOE_TYPE_BF16;
  for (round = 0; round < 4; ++round) {
    moe_linear_op op;
    moe_linear_op_init(&op);
    op.w = guard_weights(GUARD_ROWS, rows, cols, env);
    op.x = guard_floats((size_t)(M * cols));
    op.dy = guard_floats((size_t)(M * rows));
    op.M = M;
    if (round != 1) op.dx = guard_floats((size_t)(M * cols));
    if (round != 2) op.dw = guard_floats((size_t)(rows * cols));
    if (round != 2) op.db = guard_floats((size_t)rows);
    op.overwrite = round == 2;
    CHECK(!moe_linear_backward(&op, round == 3 ? &bf16 : env), "round %d", round);
    CHECK(guard_end_all(), "round %d, M %d, %d x %d, %s: something beside an array is written",
          round, (int)M, (int)rows, (int)cols, moe_isa_name(env->isa));
  }
}

static void test_guard_linear_forward_of_every_view(void) { guard_each(guard_forward); }
static void test_guard_linear_backward(void) { guard_each(guard_backward); }

/* Sequences of these lengths, one after another. */
static const int32_t guard_lengths[] = {1, 2, 7, 16, 17, 40, 65};
enum { GUARD_S = sizeof guard_lengths / sizeof *guard_lengths };

static int32_t *guard_starts(int32_t *M) {
  int32_t *start = (int32_t *)guard_take((GUARD_S + 1) * sizeof *start), s;
  start[0] = 0;
  for (s = 0; s < GUARD_S; ++s) start[s + 1] = start[s] + guard_lengths[s];
  *M = start[GUARD_S];
  return start;
}

static uint64_t *guard_keys(void) {
  uint64_t *key = (uint64_t *)guard_take(GUARD_S * sizeof *key);
  int32_t s;
  for (s = 0; s < GUARD_S; ++s) key[s] = moe_key(1, 2, (uint64_t)s, 3, 4);
  return key;
}

static void guard_attention(int32_t H, int32_t A, const moe_env *env) {
  int round;
  for (round = 0; round < 4; ++round) { /* inference, training, dropout, overwriting */
    moe_attention_op op;
    int32_t M, longest = guard_lengths[GUARD_S - 1];
    moe_attention_op_init(&op);
    op.seq_start = guard_starts(&M);
    op.S = GUARD_S, op.M = M, op.H = H, op.A = A;
    op.y = guard_floats((size_t)(M * H));
    op.qkv = guard_floats((size_t)(3 * M * H));
    op.scratch = guard_floats(moe_attention_scratch(longest, H, A, round > 0, env));
    if (round) op.stats = guard_floats((size_t)(2 * M * A));
    if (round == 2) op.dropout = 0.25f, op.keys = guard_keys();
    CHECK(!moe_attention_forward(&op, env), "forward");
    if (round) {
      op.dqkv = guard_floats((size_t)(3 * M * H));
      op.dy = guard_floats((size_t)(M * H));
      op.overwrite = round == 3;
      CHECK(!moe_attention_backward(&op, env), "backward");
    }
    CHECK(guard_end_all(), "round %d, H %d, A %d, %s: something beside an array is written", round,
          (int)H, (int)A, moe_isa_name(env->isa));
  }
}

static void guard_rows(int32_t H, const moe_env *env) {
  int round;
  for (round = 0; round < 3; ++round) { /* plain, with a branch, with dropout */
    moe_layernorm_op op;
    int32_t M;
    moe_layernorm_op_init(&op);
    op.seq_start = guard_starts(&M);
    op.S = GUARD_S, op.M = M, op.H = H;
    op.y = guard_floats((size_t)(M * H));
    op.sum = guard_floats((size_t)(M * H));
    op.mean = guard_floats((size_t)M), op.rstd = guard_floats((size_t)M);
    op.x = guard_floats((size_t)(M * H));
    op.gamma = guard_floats((size_t)H), op.beta = guard_floats((size_t)H);
    if (round) op.delta = guard_floats((size_t)(M * H));
    if (round == 2) op.dropout = 0.5f, op.keys = guard_keys();
    CHECK(!moe_layernorm_forward(&op, env), "forward");
    op.dx = guard_floats((size_t)(M * H));
    if (round) op.ddelta = guard_floats((size_t)(M * H));
    op.dgamma = guard_floats((size_t)H), op.dbeta = guard_floats((size_t)H);
    op.dy = guard_floats((size_t)(M * H));
    CHECK(!moe_layernorm_backward(&op, env), "backward");
    CHECK(guard_end_all(), "round %d, H %d, %s: something beside an array is written", round,
          (int)H, moe_isa_name(env->isa));
  }
}

static void test_guard_attention_and_norms(void) {
  static const int32_t sizes[][2] = {{1, 1}, {6, 2}, {20, 4}, {33, 3}, {48, 3}, {64, 1}, {96, 2}};
  size_t isa, i;
  for (isa = 0; isa < ISAS; ++isa)
    for (i = 0; i < sizeof sizes / sizeof *sizes; ++i)
      for (guard_at_end = 0; guard_at_end < 2; ++guard_at_end) {
        moe_env env;
        if (moe_env_init(&env, isas[isa])) continue;
        guard_attention(sizes[i][0], sizes[i][1], &env);
        CHECK_STATE();
        guard_rows(sizes[i][0], &env);
        CHECK_STATE();
      }
}

/* Arrays of the routes of M tokens. */
static void guard_routes(moe_routes *r, int32_t M, int32_t N, int32_t k) {
  size_t slots = (size_t)(M * k);
  r->M = M, r->N = N, r->k = k;
  r->expert = (int32_t *)guard_take(slots * sizeof(int32_t));
  r->weight = guard_floats(slots);
  r->prob = guard_floats((size_t)(M * N));
  r->order = (int32_t *)guard_take(slots * sizeof(int32_t));
  r->start = (int32_t *)guard_take((size_t)(N + 1) * sizeof(int32_t));
}

static void guard_gate(moe_route_op *op, moe_routes *r, int32_t H, int32_t N, int32_t k) {
  int32_t M, s, *gate_of = (int32_t *)guard_take(GUARD_S * sizeof *gate_of);
  moe_route_op_init(op);
  op->seq_start = guard_starts(&M);
  for (s = 0; s < GUARD_S; ++s) gate_of[s] = s % 2;
  guard_routes(r, M, N, k);
  op->routes = r;
  op->gate_of = gate_of;
  op->S = GUARD_S, op->H = H, op->G = 2;
  op->logits = guard_floats((size_t)(M * N));
  op->loss = guard_floats(1);
  op->x = guard_floats((size_t)(M * H));
  op->gates = guard_floats((size_t)(2 * N * H));
  op->options.balance = 0.1f, op->options.z_loss = 0.1f, op->options.jitter = 0.1f;
  op->options.keys = guard_keys();
}

enum { GUARD_N = 4 };
static void guard_experts(int32_t H, int32_t F, int32_t k, int view, const moe_env *env) {
  moe_mat in[GUARD_N], out[GUARD_N];
  const float *b_in[GUARD_N], *b_out[GUARD_N];
  float *d_in[GUARD_N], *d_b_in[GUARD_N], *d_out[GUARD_N], *d_b_out[GUARD_N];
  moe_routes r;
  moe_route_op gate;
  moe_experts_op op;
  int32_t i, M;
  size_t slots;
  guard_gate(&gate, &r, H, GUARD_N, k);
  CHECK(!moe_route_forward(&gate, env), "gate");
  M = r.M, slots = (size_t)(M * k);
  for (i = 0; i < GUARD_N; ++i) {
    in[i] = guard_weights(view, F, H, env), out[i] = guard_weights(view, H, F, env);
    b_in[i] = guard_floats((size_t)F), b_out[i] = guard_floats((size_t)H);
    d_in[i] = guard_floats((size_t)(F * H)), d_out[i] = guard_floats((size_t)(F * H));
    d_b_in[i] = guard_floats((size_t)F), d_b_out[i] = guard_floats((size_t)H);
  }
  moe_experts_op_init(&op);
  op.y = guard_floats((size_t)(M * H));
  op.x = gate.x, op.routes = &r;
  op.in = in, op.out = out, op.b_in = b_in, op.b_out = b_out;
  op.N = GUARD_N, op.H = H, op.F = F;
  op.scratch = guard_floats(moe_experts_scratch(M, k, H, F, view == GUARD_ROWS));
  if (view == GUARD_ROWS) op.pre = guard_floats(slots * (size_t)F);
  if (view == GUARD_ROWS) op.e = guard_floats(slots * (size_t)H);
  CHECK(!moe_experts_forward(&op, env), "forward");
  if (view == GUARD_ROWS) {
    op.dx = guard_floats((size_t)(M * H));
    op.dweight = guard_floats(slots);
    op.d_in = d_in, op.d_b_in = d_b_in, op.d_out = d_out, op.d_b_out = d_b_out;
    op.dy = guard_floats((size_t)(M * H));
    CHECK(!moe_experts_backward(&op, env), "backward");
    gate.dx = op.dx, gate.dweight = op.dweight;
    gate.dgates = guard_floats((size_t)(2 * GUARD_N * H));
    gate.dlogits = guard_floats((size_t)(M * GUARD_N));
    CHECK(!moe_route_backward(&gate, env), "gate, backward");
  }
  CHECK(guard_end_all(), "view %d, k %d, H %d, F %d, %s: something beside an array is written",
        view, (int)k, (int)H, (int)F, moe_isa_name(env->isa));
}

static void test_guard_gates_and_experts(void) {
  static const int32_t sizes[][2] = {{1, 1}, {7, 5}, {20, 37}, {33, 64}, {64, 50}};
  size_t isa, i;
  int32_t k;
  int view;
  for (isa = 0; isa < ISAS; ++isa)
    for (i = 0; i < sizeof sizes / sizeof *sizes; ++i)
      for (view = 0; view < GUARD_VIEWS; ++view)
        for (k = 1; k < 4; k += 2)
          for (guard_at_end = 0; guard_at_end < 2; ++guard_at_end) {
            moe_env env;
            if (moe_env_init(&env, isas[isa])) continue;
            guard_experts(sizes[i][0], sizes[i][1], k, view, &env);
            CHECK_STATE();
          }
}

static void run_guard(void) {
  RUN(test_guard_linear_forward_of_every_view);
  RUN(test_guard_linear_backward);
  RUN(test_guard_attention_and_norms);
  RUN(test_guard_gates_and_experts);
}
#else
static void test_guard_needs_pages(void) { SKIP("no pages to protect here"); }
static void run_guard(void) { RUN(test_guard_needs_pages); }
#endif
