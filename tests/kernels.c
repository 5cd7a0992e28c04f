/* What everything else is built on: the base, instruction sets, products of matrices in fp32, bf16
   and int8, a backend for them, the profile. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_setaffinity; the registers of a signal's context */
#endif
#include <limits.h>
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "models.h"
#include "ops.h"
#include "amx.h"

#include "kernels/base.c"
#include "kernels/simd.c"
#include "kernels/gemm.c"
#include "kernels/lowp.c"
#include "kernels/bf16.c"
#include "kernels/profile.c"
#include "kernels/backend.c"

int main(int argc, char **argv) {
#ifdef MOE_USE_BLIS
  if (argc == 2 && backend_asked(argv[1])) return 0;
#endif
  test_begin(argc, argv);
  PART(base);
  PART(simd);
  PART(gemm);
  PART(lowp);
  PART(bf16);
  PART(profile);
  PART(backend);
  return test_end();
}
