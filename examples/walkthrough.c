/* Copy moe.h and this file. cc -O2 -I. -o walkthrough examples/walkthrough.c -lm -pthread
   ./walkthrough
   One token's way through one task-aware mixture-of-experts layer, forward and backward, with
   numbers that fit on paper. It follows section 3 of [TaG], equation by equation. Each number that
   moe.h computes is compared with the one worked out by hand (in the code: as a formula of ln 3, ln
   6, Phi(1) and phi(1)); one that differs is marked, and the exit status is 1. */
#include <math.h>
#include <stdio.h>
#define MOE_IMPLEMENTATION
#include "moe.h"

/* the paper's d, inner size of an expert; experts, tasks, tokens of the batch */
enum { H = 2, F = 2, N = 3, T = 2, M = 2 };

static int wrong;

/* Prints n numbers of moe.h after their name, and compares them with those worked out by hand. */
static void show(const char *name, const float *got, int n, const double *hand) {
  int i, bad = 0;
  printf("    %-24s", name);
  for (i = 0; i < n; ++i) {
    printf(" %8.4f", (double)got[i]);
    bad |= !(fabs((double)got[i] - hand[i]) <= 1e-6);
  }
  if (bad) {
    printf("   WRONG, by hand:");
    for (i = 0; i < n; ++i) printf(" %.4f", hand[i]);
    wrong = 1;
  }
  printf("\n");
}

/* The layer. Weights are (out, in), row-major; there are no biases, as in the paper's Eq. 1. */
static const float x[M][H] = {{1, 2}, {1, 2}}; /* one token, in a sentence of task A and of B */
static const float w_in[N][F][H] = {
    {{1, 0}, {0, -0.5f}}, {{0, 0.5f}, {1, -0.5f}}, {{2, -1}, {-1, 0}}};
static const float w_out[N][H][F] = {{{1, -1}, {1, 1}}, {{0, 1}, {1, 0}}, {{1, 1}, {1, -1}}};
static float gates[T][N][H]; /* W_{g,A} = (ln 6, 0; ln 3, 0; 0, 0), W_{g,B} its rows in reverse */
static const int32_t gate_of[M] = {0, 1}, seq_start[M + 1] = {0, 1, 2};

/* What forward leaves for backward. */
static int32_t expert[M * N], order[M * N], start[N + 1];
static float weight[M * N], prob[M][N], logits[M][N], pre[M * N][F], e[M * N][H], h[M][H];
static float scratch[256];

static moe_routes routes;
static moe_route_op gate;
static moe_experts_op layer;

/* Routes and mixture with the k most probable experts. */
static void forward(int32_t k, const moe_env *env) {
  static moe_mat in[N], out[N];
  int i;
  routes.M = M, routes.N = N, routes.k = k;
  routes.expert = expert, routes.weight = weight, routes.prob = prob[0];
  routes.order = order, routes.start = start;
  moe_route_op_init(&gate); /* a weight is the paper's g*, as it is */
  gate.routes = &routes;
  gate.logits = logits[0];
  gate.x = x[0];
  gate.gates = gates[0][0];
  gate.gate_of = gate_of, gate.seq_start = seq_start;
  gate.S = M; /* two sentences of one token */
  gate.H = H, gate.G = T;
  for (i = 0; i < N; ++i) {
    in[i] = moe_mat_rows(w_in[i][0], F, H);
    out[i] = moe_mat_rows(w_out[i][0], H, F);
  }
  moe_experts_op_init(&layer);
  layer.y = h[0];
  layer.pre = pre[0], layer.e = e[0];
  layer.x = x[0];
  layer.routes = &routes;
  layer.in = in, layer.out = out;
  layer.N = N, layer.H = H, layer.F = F;
  layer.scratch = scratch;
  wrong |= moe_route_forward(&gate, env) || moe_experts_forward(&layer, env);
}

static double ln3, ln6;
static double Phi, phi; /* of the normal distribution, at 1 */

static void experts_seen(const moe_env *env) {
  const double E1[] = {1, 2 * Phi - 1}, E2[] = {0, Phi}, E3[] = {Phi - 1, 1 - Phi};
  const double pre1[] = {1, -1}, mixture[] = {0.6 * E1[0] + 0.3 * E2[0] + 0.1 * E3[0],
                                              0.6 * E1[1] + 0.3 * E2[1] + 0.1 * E3[1]};
  printf("One token, x = (1, 2), in a sentence of task A and in one of task B; N = 3 experts, one "
         "gate for each task.\n\nTHE EXPERTS\n"
         "  Each is a feed-forward network of its own. Eq. 1:  E_i(x) = w_out GELU(w_in x)\n");
  forward(N, env); /* all three; for either task its most probable expert comes first */
  show("w_in x, expert 1", pre[start[0]], F, pre1);
  printf("  GELU(1) = Phi(1) = 0.8413 and GELU(-1) = -(1 - Phi(1)) = -0.1587, so that\n");
  show("E_1(x)", e[start[0]], H, E1);
  show("E_2(x)", e[start[1]], H, E2);
  show("E_3(x)", e[start[2]], H, E3);
  printf("  All of them, weighed by the gate below, are Eq. 2:  h = sum_i G_i(x) E_i(x)\n");
  show("h, full mixture, A", h[0], H, mixture);
}

/* The routes are those of top-1. */
static void gates_seen(const moe_env *env) {
  const double logits_a[] = {ln6, ln3, 0}, logits_b[] = {0, ln3, ln6};
  const double g_a[] = {0.6, 0.3, 0.1}, g_b[] = {0.1, 0.3, 0.6};
  const double h_a[] = {0.6, 0.6 * (2 * Phi - 1)}, h_b[] = {0.6 * (Phi - 1), 0.6 * (1 - Phi)};
  forward(1, env);
  printf("\nTHE GATE OF THE TASK\n  Eq. 3:  logits = x W_{g,t}, t being the sentence's task\n");
  show("logits, A: ln 6, ln 3, 0", logits[0], N, logits_a);
  show("logits, B: 0, ln 3, ln 6", logits[1], N, logits_b);
  printf("  Eq. 4:  G(x) = softmax(logits): 6, 3 and 1 of 10\n");
  show("G, A", prob[0], N, g_a);
  show("G, B", prob[1], N, g_b);
  printf("  Eq. 5:  the most probable expert and its probability, E*, g* = top-1 of G\n"
         "    A goes to expert %d with g* = %.1f, B to expert %d with g* = %.1f: same token, other "
         "task, other expert.\n",
         (int)expert[0] + 1, (double)weight[0], (int)expert[1] + 1, (double)weight[1]);
  wrong |= expert[0] != 0 || expert[1] != 2;
  show("g*, A", weight, 1, g_a);
  show("g*, B", weight + 1, 1, g_a);
  printf("  The tokens are sorted by expert: expert 1 multiplies %d, expert 2 %d, expert 3 %d.\n",
         (int)(start[1] - start[0]), (int)(start[2] - start[1]), (int)(start[3] - start[2]));
  wrong |= start[1] != 1 || start[2] != 1 || start[3] != 2;
  printf("\nWHAT COMES OUT\n  Eq. 6:  h = g* E*(x)\n");
  show("h, A", h[0], H, h_a);
  show("h, B", h[1], H, h_b);
}

static float dx[M][H], dweight[M];

static void experts_back(const moe_env *env) {
  /* GELU'(1) and GELU'(-1): GELU'(z) = Phi(z) + z phi(z) */
  const double up = Phi + phi, down = 1 - Phi - phi, none[] = {0, 0, 0, 0};
  const double dg[] = {1, Phi - 1}, dout[] = {0.6 * Phi, 0.6 * (Phi - 1), 0, 0};
  const double din[] = {0.6 * up, 1.2 * up, -0.6 * down, -1.2 * down},
               dx_a[] = {din[0], 0.3 * down};
  static float d_in[N][F][H], d_out[N][H][F];
  static const float dh[M][H] = {{1, 0}, {1, 0}};
  float *p_in[N], *p_out[N];
  int i;
  for (i = 0; i < N; ++i) p_in[i] = d_in[i][0], p_out[i] = d_out[i][0];
  layer.dx = dx[0], layer.dweight = dweight;
  layer.d_in = p_in, layer.d_out = p_out;
  layer.dy = dh[0];
  wrong |= moe_experts_backward(&layer, env) != MOE_OK;
  printf("\nTHE WAY BACK (3.3)\n  Let the loss rise with the first number of h, for either token: "
         "dL/dh = (1, 0).\n"
         "  h is a product, so the loss pulls at both factors. At the weight:  dg* = dL/dh . "
         "E*(x)\n");
  show("dg*, A and B", dweight, M, dg);
  printf("  At the expert of A, dE = g* dL/dh = (0.6, 0), and on through Eq. 1, with GELU'(1) = "
         "%.4f, GELU'(-1) = %.4f:\n",
         up, down);
  show("dw_out = dE GELU(.)^T", d_out[0][0], H * F, dout);
  show("dw_in", d_in[0][0], F * H, din);
  show("dx, A, by the expert", dx[0], H, dx_a);
  printf("  Expert 2 had no token; nothing reaches it:\n");
  show("dw_in of expert 2", d_in[1][0], F * H, none);
}

static void gates_back(const moe_env *env) {
  const double b = 0.6 * (Phi - 1); /* g* dg* of task B */
  const double dlogits_a[] = {0.24, -0.18, -0.06}, dlogits_b[] = {-0.1 * b, -0.3 * b, 0.4 * b};
  const double dgate_a[] = {0.24, 0.48, -0.18, -0.36, -0.06, -0.12};
  const double dgate_b[] = {-0.1 * b, -0.2 * b, -0.3 * b, -0.6 * b, 0.4 * b, 0.8 * b};
  const double dx_a[] = {0.6 * (Phi + phi) + 0.24 * ln6 - 0.18 * ln3, 0.3 * (1 - Phi - phi)};
  static float dgates[T][N][H], dlogits[M][N];
  gate.dx = dx[0]; /* added to what came by the experts */
  gate.dgates = dgates[0][0];
  gate.dlogits = dlogits[0], gate.dweight = dweight;
  wrong |= moe_route_backward(&gate, env) != MOE_OK;
  printf("  Through the softmax g* depends on every logit:  dlogit_i = dg* g* ([i is chosen] - "
         "G_i)\n");
  show("dlogits, A", dlogits[0], N, dlogits_a);
  show("dlogits, B", dlogits[1], N, dlogits_b);
  printf("  They sum to 0: what one expert gains the others lose, although only one was computed.\n"
         "  A gate learns from the tokens of its own task alone:  dW_{g,t} = dlogits^T x\n");
  show("dW_{g,A}", dgates[0][0], N * H, dgate_a);
  show("dW_{g,B}", dgates[1][0], N * H, dgate_b);
  printf("  and the token's own gradient is the sum of both ways, expert and gate:\n");
  show("dx, A", dx[0], H, dx_a);
}

int main(void) {
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  ln3 = log(3.0);
  ln6 = log(6.0);
  Phi = (1 + erf(sqrt(0.5))) / 2;
  phi = exp(-0.5) / sqrt(2 * 3.14159265358979323846);
  gates[0][0][0] = gates[1][2][0] = (float)ln6;
  gates[0][1][0] = gates[1][1][0] = (float)ln3;
  experts_seen(&env);
  gates_seen(&env);
  experts_back(&env);
  gates_back(&env);
  printf("\n%s\n", wrong ? "Not all numbers are those worked out by hand."
                         : "Every number is the one worked out by hand.");
  return wrong || fflush(stdout) || ferror(stdout);
}
