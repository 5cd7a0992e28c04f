/* A double of libcuda, NVRTC and cuBLAS, one shared object (double.cpp) that moe_cuda.h opens as it
   opens the real ones. Its kernels are moe_cuda.h's, run by the emulator; its memory of the card
   faults when the host touches it; its streams do nothing before somebody waits; and it fails when
   it is told to. What a test and the double say to each other. */
#ifndef DOUBLE_H
#define DOUBLE_H
#include <stddef.h>

enum { DOUBLE_NAMES = 64 };

typedef struct double_control {
  /* What the machine is; set by double_reset. */
  int devices, arch, driver; /* one GPU of arch 80, driver 12080 */
  int nvrtc, nvrtc_newest;   /* version 1208; it knows architectures up to 120 */
  size_t memory;             /* bytes of the card: 1 GB */
  int pinned;                /* 1: there is pinned memory */
  /* What fails: the call number fail_at (from 1) of all, or of the function `name`, with `error`.
     late: a launch seems to succeed, and the next call that waits fails. From 700 on every later
     call fails as well. */
  long fail_at;
  char name[48];
  int error, late;
  /* What was seen. */
  long calls, launches, refused; /* refused: calls with wrong arguments, each said on stderr */
  size_t used, most;             /* bytes of the card, at present and at most */
  long allocations, pinned_blocks, streams, events, modules, contexts, programs, handles;
  long depth; /* contexts pushed and not popped */
  int names;  /* functions that were called, and how often */
  char called[DOUBLE_NAMES][48];
  long times[DOUBLE_NAMES];
} double_control;

/* dlsym(library, "double_get") and "double_reset". */
typedef double_control *double_get_fn(void);
typedef void double_reset_fn(void);
#endif
