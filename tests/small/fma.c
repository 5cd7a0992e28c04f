/* moe__fmaf against the C library's fmaf, and fused sums of vectors against moe__fmaf, on hostile
   operands: any bits; short mantissas; results near the subnormals; sums that cancel; zeros,
   infinities and NaN among them; and sums that a double cannot tell from half-way. Part of wasm.c
   too. */
#define MOE_IMPLEMENTATION
#include "moe.h"
#ifndef __wasm__
#include <stdio.h>
#endif
static uint64_t seed = 88172645463325252u;
static uint32_t next(void) {
  seed ^= seed << 13;
  seed ^= seed >> 7;
  seed ^= seed << 17;
  return (uint32_t)(seed >> 16);
}
static uint32_t special(void) {
  static const uint32_t list[] = {0,           0x80000000u, 1,           0x807fffffu,
                                  0x00800000u, 0x7f7fffffu, 0xff7fffffu, 0x7f800000u,
                                  0xff800000u, 0x7fc00000u, 0x3f800000u, 0xbf800000u};
  return list[next() % 12];
}
static void operands(int mode, float *x) {
  uint32_t u = next(), v = next(), w = next(), k, e;
  switch (mode) {
    case 1:
      u = (u & 0x807ff000u) | 0x3f000000u, v = (v & 0x807ff000u) | 0x3f800000u;
      w = (w & 0x80ffffffu) | 0x3e000000u;
      break;
    case 2:
      u = (u & 0x80ffffffu) | 0x10000000u, v = (v & 0x80ffffffu) | 0x30000000u;
      w &= 0x80ffffffu;
      break;
    case 3:
      u = (u & 0x807fffffu) | 0x3f800000u, v = (v & 0x807f0000u) | 0x3f800000u;
      w = (w & 0x80ffffffu) | 0x34000000u;
      break;
    case 4:
      w = (w & 0x80000000u) | 0x3f800000u, u = (u & 0x80000fffu) | 0x3f800000u;
      v = (v & 0x80000fffu) | (next() & 1 ? 0x3f800000u : 0x33800000u);
      break;
    case 5:
      if (next() & 1) u = special();
      if (next() & 1) v = special();
      if (next() & 1) w = special();
      break;
    case 6: /* products just below half a unit of the sum's last place: normal, subnormal, most */
      k = 1 + (next() & 127);
      e = next() % 3;
      w = (w & 0x807fffffu) | 0x4b800000u;
      if (e == 1) w = (w & 0x80000000u) | (next() % 3 ? w & 0x7fffffu : 0x7ffffdu + (w & 7));
      if (e == 2) w |= 0x7f7fffffu;
      u = (u & 0x80000000u) + ((uint32_t[]){127, 52, 178}[e] << 23) + k;
      v = (v & 0x80000000u) + ((uint32_t[]){127, 52, 179}[e] << 23) - 2 * k;
      break;
    case 7: /* nothing special */
      u = (u & 0x807fffffu) | 0x3f800000u, v = (v & 0x807fffffu) | 0x3f000000u;
      w = (w & 0x807fffffu) | 0x3e800000u;
      break;
    default: break;
  }
  memcpy(x, &u, 4), memcpy(x + 1, &v, 4), memcpy(x + 2, &w, 4);
}
static int same(float a, float b) { return moe__bits(a) == moe__bits(b) || (a != a && b != b); }
/* Vectors that a machine without the instruction sums in double; how many lanes are wrong. Of every
   third vector one lane is hostile, so that it alone must be noticed. */
static int wrong_lanes(void) {
  int bad = 0;
#ifdef MOE__SIMD
  float x[16], y[16], z[16], a[3], got[3][16];
  int mode, i, j;
  for (mode = 0; mode < 7; ++mode)
    for (i = 0; i < 30000; ++i) {
      moe__v128_f u, v, w;
      for (j = 0; j < 16; ++j) {
        operands(i % 3 || j == i % 16 ? mode : 7, a);
        x[j] = a[0], y[j] = a[1], z[j] = a[2];
      }
      u = moe__v128_load(x), v = moe__v128_load(y), w = moe__v128_load(z);
      moe__v128_store(got[0], moe__v128_fma(u, v, w));
      moe__v128_store(got[1], moe__v128_chain(u, v, w));
      moe__v128_store(got[2], moe__v128_fnma(u, v, w));
      for (j = 0; j < 16; ++j) {
        float want = moe__fmaf(x[j], y[j], z[j]);
        bad += !same(got[0][j], want) + !same(got[1][j], want);
        bad += !same(got[2][j], moe__fmaf(-x[j], y[j], z[j]));
      }
    }
#endif
  return bad;
}
#ifndef __wasm__
int main(void) {
  long bad = 0, n = 0, each = 400000, i;
  int mode, lanes = wrong_lanes();
  for (mode = 0; mode < 7; ++mode)
    for (i = 0; i < each; ++i, ++n) {
      float x[3], want, got;
      operands(mode, x);
      want = fmaf(x[0], x[1], x[2]);
      got = moe__fmaf(x[0], x[1], x[2]);
      if (same(want, got)) continue;
      if (bad++ < 5)
        printf("%a %a %a: %a expected, %a\n", (double)x[0], (double)x[1], (double)x[2],
               (double)want, (double)got);
    }
  printf("%ld of %ld wrong, %d lanes\n", bad, n, lanes);
  return bad + lanes != 0;
}
#endif
