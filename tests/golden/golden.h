/* golden.h - the generator of golden inputs, and the records of golden tensors and numbers. See
   README.md. The same generator is `lcg` in reference.py. */
#ifndef GOLDEN_H_INCLUDED
#define GOLDEN_H_INCLUDED
#include <stddef.h>
#include <stdint.h>

typedef struct golden_tensor {
  const char *name;
  size_t count;
  const double *values;
} golden_tensor;

typedef struct golden_number {
  const char *name;
  double value;
} golden_number;

/* Fills out (count) with the values that belong to a name, in [-scale, scale): FNV-1a of the name
   seeds a 64-bit LCG, whose top 16 bits give a value. Exact in float as long as scale is a power of
   two. */
static inline void golden_fill(float *out, size_t count, const char *name, float scale) {
  uint64_t state = 0xcbf29ce484222325u;
  size_t i;
  for (i = 0; name[i] != 0; i++) {
    state = (state ^ (uint64_t)(unsigned char)name[i]) * 0x100000001b3u;
  }
  for (i = 0; i < count; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    out[i] = (float)((int)(state >> 48) - 32768) * (1.0f / 32768.0f) * scale;
  }
}
#endif
