/* AMX on a processor that lacks it. Its instructions trap there, and amx_install catches the
   signal: the handler reads the instruction as it was assembled, does what Intel's manual says of
   it (palette 1; shapes, strides, the order of sums, denormals as zeros; sums of bytes in 32 bits)
   and goes on behind it. What the manual forbids ends the program with a sentence. So the kernels
   that are tested are the ones that a processor with AMX runs, byte by byte; with the sanitizers
   on, every byte that a tile is loaded from or stored to is checked as well.

   Include it after moe.h and test.h. amx_install() is 0 where it cannot work: not Linux on x86-64,
   or the build has no AMX kernels. amx_refuse() has the system refuse AMX to this process from now
   on: a filter of system calls answers arch_prctl's request with EPERM. */
#ifndef AMX_H
#define AMX_H

#ifdef MOE__AMX
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

typedef struct amx_state {
  int configured, rows[8], bytes[8];
  unsigned char tile[8][16][64];
} amx_state;
static __thread amx_state amx;
static __thread int amx_count; /* instructions of this thread so far */

/* a b + c, with denormals as zeros */
static float amx_flush(float a) {
  return moe__bits(a) & 0x7f800000u ? a : moe__floats(moe__bits(a) & 0x80000000u);
}
static float amx_fma(float a, float b, float c) {
  return moe__bf16_fma(amx_flush(a), amx_flush(b), c);
}

static void amx_require(int condition, const char *what) {
  if (condition) return;
  printf("        AMX: %s\n", what);
  fflush(stdout);
  _exit(1);
}

static void amx_config(const unsigned char *p) {
  int t, i;
  amx_require(p[0] == 1 && p[1] == 0, "palette or start row");
  for (i = 2; i < 16; ++i) amx_require(p[i] == 0, "a reserved byte is set");
  for (i = 32; i < 48; ++i) amx_require(p[i] == 0, "bytes of a tile that is not there");
  for (i = 56; i < 64; ++i) amx_require(p[i] == 0, "rows of a tile that is not there");
  for (t = 0; t < 8; ++t) {
    amx.bytes[t] = p[16 + 2 * t] | p[17 + 2 * t] << 8;
    amx.rows[t] = p[48 + t];
    amx_require(amx.bytes[t] >= 1 && amx.bytes[t] <= 64 && amx.bytes[t] % 4 == 0 &&
                    amx.rows[t] >= 1 && amx.rows[t] <= 16,
                "shape of a tile");
  }
  memset(amx.tile, 0, sizeof amx.tile);
  amx.configured = 1;
}

static void amx_fit(int c, int a, int b) {
  amx_require(c != a && c != b && a != b, "the same tile twice");
  amx_require(amx.rows[c] == amx.rows[a] && amx.bytes[a] / 4 == amx.rows[b] &&
                  amx.bytes[c] == amx.bytes[b],
              "shapes do not fit");
}

/* tdpbf16ps */
static void amx_dot_bf16(int c, int a, int b) {
  int m, n, k;
  amx_fit(c, a, b);
  for (m = 0; m < amx.rows[c]; ++m)
    for (n = 0; n < amx.bytes[c] / 4; ++n) {
      float first = 0, second = 0, sum;
      uint32_t x, w;
      for (k = 0; k < amx.bytes[a] / 4; ++k) {
        memcpy(&x, &amx.tile[a][m][4 * k], 4);
        memcpy(&w, &amx.tile[b][k][4 * n], 4);
        first = amx_fma(moe__floats(x << 16), moe__floats(w << 16), first);
        second = amx_fma(moe__floats(x & 0xffff0000u), moe__floats(w & 0xffff0000u), second);
      }
      memcpy(&sum, &amx.tile[c][m][4 * n], 4);
      sum = amx_fma(1, amx_fma(1, first, second), sum);
      memcpy(&amx.tile[c][m][4 * n], &sum, 4);
    }
}

/* tdpbssd, tdpbsud, tdpbusd, tdpbuud: 4 bytes of a row times 4 of a column, signed or not; a sum
   wraps and never saturates */
static void amx_dot_int8(int c, int a, int b, int a_signed, int b_signed) {
  int m, n, k;
  amx_fit(c, a, b);
  for (m = 0; m < amx.rows[c]; ++m)
    for (n = 0; n < amx.bytes[c] / 4; ++n) {
      uint32_t sum;
      memcpy(&sum, &amx.tile[c][m][4 * n], 4);
      for (k = 0; k < amx.bytes[a]; ++k) {
        int x = amx.tile[a][m][k], w = amx.tile[b][k / 4][4 * n + k % 4];
        if (a_signed && x > 127) x -= 256;
        if (b_signed && w > 127) w -= 256;
        sum += (uint32_t)(x * w);
      }
      memcpy(&amx.tile[c][m][4 * n], &sum, 4);
    }
}

/* The value of a general register by its number in an instruction. */
static size_t amx_register(const ucontext_t *u, int number) {
  static const int at[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                             REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                             REG_R12, REG_R13, REG_R14, REG_R15};
  return (size_t)u->uc_mcontext.gregs[at[number]];
}

/* Decodes and does one instruction; *length its bytes. */
static void amx_do(const ucontext_t *u, const unsigned char *p, int *length) {
  int extra_reg = p[1] & 0x80 ? 0 : 8, extra_index = p[1] & 0x40 ? 0 : 8,
      extra_base = p[1] & 0x20 ? 0 : 8;
  int prefix = p[2] & 3, third = ~(p[2] >> 3) & 15, op = p[3], mod = p[4] >> 6,
      reg = (p[4] >> 3 & 7) | extra_reg, rm = p[4] & 7, r;
  size_t base = 0, stride = 0;
  amx_require(p[0] == 0xc4 && (p[1] & 31) == 2 && !(p[2] & 0x84), "no instruction of AMX");
  *length = 5;
  if (mod != 3) { /* an address */
    int number = rm;
    if (rm == 4) {
      int index = (p[5] >> 3 & 7) | extra_index;
      number = p[5] & 7;
      if (index != 4) stride = amx_register(u, index) << (p[5] >> 6);
      *length = 6;
    }
    amx_require(mod != 0 || number != 5, "an address without a base");
    base = amx_register(u, number | extra_base);
    if (mod == 1) base += (size_t)(ptrdiff_t)(signed char)p[*length], *length += 1;
    if (mod == 2) {
      int32_t offset;
      memcpy(&offset, p + *length, 4);
      base += (size_t)(ptrdiff_t)offset;
      *length += 4;
    }
  }
  if (op == 0x49 && prefix == 0 && mod != 3)
    amx_config((const unsigned char *)base);
  else if (op == 0x49 && prefix == 0 && p[4] == 0xc0)
    memset(&amx, 0, sizeof amx);
  else {
    amx_require(amx.configured && reg < 8, "tiles are not set up");
    if (op == 0x4b && (prefix == 3 || prefix == 2) && mod != 3 &&
        rm == 4) { /* tileloadd, tilestored */
      for (r = 0; r < amx.rows[reg]; ++r) {
        unsigned char *at = (unsigned char *)(base + (size_t)r * stride);
        if (prefix == 3)
          memcpy(amx.tile[reg][r], at, (size_t)amx.bytes[reg]);
        else
          memcpy(at, amx.tile[reg][r], (size_t)amx.bytes[reg]);
      }
    } else if (op == 0x49 && prefix == 3 && (p[4] & 0xc7) == 0xc0)
      memset(amx.tile[reg], 0, sizeof amx.tile[reg]); /* tilezero */
    else if (op == 0x5c && prefix == 2 && mod == 3)
      amx_dot_bf16(reg, rm | extra_base, third);
    else if (op == 0x5e && mod == 3)
      amx_dot_int8(reg, rm | extra_base, third, prefix >= 2, prefix % 2);
    else
      amx_require(0, "an instruction that this file does not know");
  }
}

static void amx_trap(int number, siginfo_t *info, void *context) {
  ucontext_t *u = (ucontext_t *)context;
  int length = 0;
  (void)number, (void)info;
  amx_do(u, (const unsigned char *)(size_t)u->uc_mcontext.gregs[REG_RIP], &length);
  u->uc_mcontext.gregs[REG_RIP] += length;
  ++amx_count;
}

/* Catches the traps from now on. The kernels' other instructions are AVX-512: those must be there.
 */
static int amx_install(void) {
  struct sigaction action;
  if (!moe_isa_available(MOE_ISA_AVX512)) return 0;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = amx_trap;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, NULL) == 0;
}

static int amx_refuse(void) {
  static struct sock_filter code[] = {
      {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, nr)},
      {BPF_JMP | BPF_JEQ | BPF_K, 0, 3, 158}, /* arch_prctl */
      {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, args[0])},
      {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0x1023}, /* ARCH_REQ_XCOMP_PERM */
      {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | 1},
      {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW}};
  struct sock_fprog filter;
  filter.len = (unsigned short)(sizeof code / sizeof *code);
  filter.filter = code;
  return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
         !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0);
}
#else
static int amx_count;
static int amx_install(void) { return 0; }
#endif
#endif
