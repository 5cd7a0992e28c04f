/* The primitives of moe_cuda.h (chunk `prim`), for the emulator. Include it after emulator.h. */
#ifndef PRIMITIVES_H
#define PRIMITIVES_H
#include "emulator.h"
#define MOE__CUDA_PRIMITIVES

/* To nearest, halves away from zero. */
static inline unsigned moe__d_tf32(float x) {
  unsigned bits = emulator::bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0xffffe000u;
  return (bits + 0x1000u) & 0xffffe000u;
}

/* To nearest, ties to even. */
static inline unsigned moe__d_bf16x2(float low, float high) {
  float x[2] = {low, high};
  unsigned word = 0;
  for (int i = 0; i < 2; ++i) {
    unsigned bits = emulator::bits_of(x[i]);
    bits = x[i] != x[i] ? 0x7fff0000u : bits + 0x7fffu + (bits >> 16 & 1u);
    word |= bits >> 16 << 16 * i;
  }
  return word;
}

static inline void moe__d_mma_tf32(float *c, const unsigned *a, const unsigned *b) {
  emulator::mma("tf32", emulator::apply_mma_tf32, c, a, b);
}

static inline void moe__d_mma_bf16(float *c, const unsigned *a, const unsigned *b) {
  emulator::mma("bf16", emulator::apply_mma_bf16, c, a, b);
}

static inline void moe__d_copy16(float *to, const float *from, int bytes) {
  emulator::copy_async(to, from, 16, (unsigned)bytes);
}

static inline void moe__d_copy4(float *to, const float *from, int bytes) {
  emulator::copy_async(to, from, 4, (unsigned)bytes);
}

static inline void moe__d_copy_commit(void) { emulator::copy_commit(); }
static inline void moe__d_copy_wait1(void) { emulator::copy_wait(1); }
#endif
