/* moe__fmaf against the C library's fmaf on hostile operands: any bits; short mantissas, whose sums
   tie; results near the subnormals; sums that cancel; zeros, infinities and NaN among them. With
   COST: seconds of chains of products and sums, a vector of 16 at a time, and one of its sums. */
#define MOE_IMPLEMENTATION
#include "moe.h"
#include <stdio.h>
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
  uint32_t u = next(), v = next(), w = next();
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
    default: break;
  }
  memcpy(x, &u, 4), memcpy(x + 1, &v, 4), memcpy(x + 2, &w, 4);
}
int main(void) {
  long bad = 0, n = 0, each = 400000, i;
  int mode;
  for (mode = 0; mode < 6; ++mode)
    for (i = 0; i < each; ++i, ++n) {
      float x[3], want, got;
      operands(mode, x);
      want = fmaf(x[0], x[1], x[2]);
      got = moe__fmaf(x[0], x[1], x[2]);
      if (!memcmp(&want, &got, 4) || (want != want && got != got)) continue;
      if (bad++ < 5)
        printf("%a %a %a: %a expected, %a\n", (double)x[0], (double)x[1], (double)x[2],
               (double)want, (double)got);
    }
  printf("%ld of %ld wrong\n", bad, n);
  return bad != 0;
}
