/* Copy moe.h and this file. cc -O2 -I. -o layer examples/layer.c -lm -pthread && ./layer
   Only the mixture-of-experts layer, in a program with tensors of its own: a gate for each of two
   tasks sends every token to one of four experts. Gates and experts learn y = x for the tokens of
   the first task and y = -x for those of the second. */
#include <stdio.h>
#include <stdlib.h>
#define MOE_IMPLEMENTATION
#include "moe.h"

/* tokens, sequences, tasks; experts and how many a token takes; width of a token and of an expert
   */
enum { M = 256, S = 2, T = 2, N = 4, K = 1, H = 8, F = 16, STEPS = 1000 };
enum { GATES = T * N * H, EXPERT = F * H + F + H * F + H, WEIGHTS = GATES + N * EXPERT };

/* (T, N, H) gates; then of each expert W_in (F, H), b_in (F), W_out (H, F), b_out (H). */
static float w[WEIGHTS], dw[WEIGHTS], m[WEIGHTS], v[WEIGHTS];

/* What the layer reads and writes: */
static const int32_t seq_start[S + 1] = {0, M / 2, M}, gate_of[S] = {0, 1};
static float x[M * H], y[M * H], dy[M * H];
/* and what its forward keeps for backward. */
static int32_t expert[M * K], order[M * K], start[N + 1];
static float weight[M * K], prob[M * N], logits[M * N], pre[M * K * F], e[M * K * H];
static float dlogits[M * N], dweight[M * K];

static moe_env env;
static moe_routes routes = {M, N, K, expert, weight, prob, order, start};
static moe_route_op gate;
static moe_experts_op experts;

static void need(moe_status status) {
  if (status != MOE_OK) exit(1);
}

static void set_gate(void) {
  moe_route_op_init(&gate);
  gate.routes = &routes;
  gate.logits = logits;
  gate.x = x;
  gate.gates = w;
  gate.gate_of = gate_of;
  gate.seq_start = seq_start;
  gate.S = S, gate.H = H, gate.G = T;
  gate.dgates = dw;
  gate.dlogits = dlogits, gate.dweight = dweight;
}

static void set_experts(void) {
  static moe_mat in[N], out[N];
  static const float *b_in[N], *b_out[N];
  static float *d_in[N], *d_b_in[N], *d_out[N], *d_b_out[N];
  int i;
  for (i = 0; i < N; ++i) {
    const float *at = w + GATES + i * EXPERT;
    in[i] = moe_mat_rows(at, F, H);
    b_in[i] = at + F * H;
    out[i] = moe_mat_rows(b_in[i] + F, H, F);
    b_out[i] = b_in[i] + F + H * F;
    d_in[i] = dw + GATES + i * EXPERT;
    d_b_in[i] = d_in[i] + F * H;
    d_out[i] = d_b_in[i] + F;
    d_b_out[i] = d_out[i] + H * F;
  }
  moe_experts_op_init(&experts);
  experts.y = y;
  experts.pre = pre, experts.e = e;
  experts.x = x;
  experts.routes = &routes;
  experts.in = in, experts.out = out;
  experts.b_in = b_in, experts.b_out = b_out;
  experts.N = N, experts.H = H, experts.F = F;
  experts.scratch = (float *)malloc(moe_experts_scratch(M, K, H, F, 1) * sizeof(float));
  experts.dweight = dweight;
  experts.d_in = d_in, experts.d_b_in = d_b_in;
  experts.d_out = d_out, experts.d_b_out = d_b_out;
  experts.dy = dy;
  if (!experts.scratch) exit(1);
}

static float random_number(uint64_t step, int i) { /* from -1 to 1 */
  return (float)(moe_key(1, step, (uint64_t)i, 0, 0) >> 40) / 8388608.0f - 1;
}

/* Forward, the loss 1/2 (y - wanted)^2 as a mean over the tokens, backward. */
static float step_loss(int step) {
  float loss = 0;
  int i;
  for (i = 0; i < M * H; ++i) x[i] = random_number((uint64_t)step, i);
  need(moe_route_forward(&gate, &env));
  need(moe_experts_forward(&experts, &env));
  for (i = 0; i < M * H; ++i) {
    float wanted = i < M / 2 * H ? x[i] : -x[i];
    dy[i] = (y[i] - wanted) / M;
    loss += 0.5f * dy[i] * (y[i] - wanted);
  }
  need(moe_experts_backward(&experts, &env)); /* dweight, which the gate goes on from */
  need(moe_route_backward(&gate, &env));
  return loss;
}

int main(void) {
  int step, i, t, count[T][N] = {{0}};
  moe_adam_op adam;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (i = 0; i < WEIGHTS; ++i) w[i] = 0.2f * random_number(0, i);
  set_gate();
  set_experts();
  moe_adam_op_init(&adam);
  adam.w = w, adam.g = dw, adam.m = m, adam.v = v;
  adam.count = WEIGHTS;
  adam.lr = 2e-2f;
  for (step = 1; step <= STEPS; ++step) {
    float loss = step_loss(step);
    adam.t = step;
    need(moe_adam_step(&adam, &env)); /* clears dw, too */
    if (step == 1 || step % 250 == 0) printf("step %d  loss %.4f\n", step, (double)loss);
  }
  for (i = 0; i < M; ++i) ++count[i < M / 2 ? 0 : 1][expert[i * K]];
  for (t = 0; t < T; ++t) {
    printf("tokens of task %d:", t + 1);
    for (i = 0; i < N; ++i) printf("  %3d", count[t][i]);
    printf("\n");
  }
  free(experts.scratch);
  return 0;
}
