/* moe_cuda.h - v0.2 - moe.h on an NVIDIA GPU: passes and training steps, the products of experts
   above all

   DO THIS
     #define MOE_IMPLEMENTATION
     #define MOE_CUDA_IMPLEMENTATION
     #include "moe_cuda.h" // it includes moe.h
   in exactly one C or C++ file, and plain #include "moe_cuda.h" in others. Link with -ldl besides
   -lm -pthread. Nothing of CUDA is needed to compile: the driver and NVRTC are opened at run time,
   and the kernels, which are strings in this file, are compiled for the GPU that is found.

   EXAMPLE (a whole program: examples/cuda.c)
     moe_backend cuda;
     if (!moe_cuda_open(&cuda, NULL, &env)) env.backend = &cuda; // else: the CPU, as ever
     ... models, contexts and trainers, as with the CPU; free them, then:
     moe_cuda_close(&cuda);

   NEEDS    an NVIDIA driver (libcuda.so.1, nvcuda.dll) of CUDA 11 or later, a GPU of compute
            capability 7.0 or higher, and NVRTC (libnvrtc.so of CUDA 11.2 or later; `pip install
            nvidia-cuda-nvrtc-cu12` brings it). cuBLAS is used if it is found.
   WHAT IS  A backend of kind DEVICE (moe.h, >>api_backend): weights, gradients, moments and
   DONE     activations stay on the card. A pass uploads ids and downloads scores or losses; a step
            downloads one double.
   PRODUCTS Two makers: cuBLAS, and the kernels of this file, which compute all experts of a layer
            in one launch. Which of them serves linear layers of which shape is measured when a
            context is created; moe_cuda_options.maker fixes it.
   BITS     Results are not the CPU's bits, but the same bits in each run on the same card with the
            same maker: one writer of each output, sums in a fixed order, no float atomics. Dropout
            and jitter use the CPU's random numbers.
   THREADS  As in moe.h: a context belongs to one thread at a time, and several contexts work at
            once. A lock protects what they share.
   ERRORS   A status, and a sentence to env.log that names the call that failed and what to do.
            After a failure of the device every later call of that context fails; the host's weights
            are those of the last download, or of the last mirrored step (moe_backend.mirror).
   LIMITS   Routers: dense, shared, task gates. No blocks as experts, no int8, heads of attention
            of 16 to 128 numbers: moe_backend.supports says so in a sentence.
   MEASURED Nothing: this file was written without a GPU. It was compiled for compute capability 7.0
            to 12.0, and its kernels were run by an emulator and by an interpreter of the compiled
            PTX (tests/cuda/). bench/results/cuda.md says what to expect.

   CONTENTS (search for >>tag)
     >>api_cuda        options, open, close
     >>cuda_driver     opening libcuda and NVRTC at run time; errors as sentences
     >>cuda_compile    source strings, tables of kernels; CUBIN or PTX; the cache file
     >>cuda_memory     queues, memory of the card, copies, scratch, launches
     >>cuda_base       device code that all kernels share
     >>cuda_products   linear layers; cuBLAS, the choice of the maker
     >>cuda_experts    expert feed-forward networks, grouped
     >>cuda_attention  self-attention over packed sequences
     >>cuda_rows       LayerNorm, dropout, embeddings
     >>cuda_route      gates, softmax, top-k, dispatch
     >>cuda_heads      heads and losses
     >>cuda_adam       norm of the gradients, Adam
     >>cuda_table      what is supported, the table of slots, open and close

   This file is in the public domain, or MIT-0: the licence is at its end. */
#ifndef MOE_CUDA_H_INCLUDED
#define MOE_CUDA_H_INCLUDED
#include "moe.h"
#ifdef __cplusplus
extern "C" {
#endif

/* ---- options, open, close ---- >>api_cuda */

/* Who computes the products of linear layers. */
typedef enum moe_cuda_maker {
  MOE_CUDA_MAKER_AUTO,  /* the faster one for each shape, measured when a context is created */
  MOE_CUDA_MAKER_OWN,   /* the kernels of this file */
  MOE_CUDA_MAKER_CUBLAS /* cuBLAS; moe_cuda_open fails where it is not found */
} moe_cuda_maker;

typedef struct moe_cuda_options {
  int32_t device;       /* index among the GPUs that the driver shows (CUDA_VISIBLE_DEVICES): 0 */
  moe_cuda_maker maker; /* AUTO may choose differently in another run, and bits with it */
  int32_t tf32;         /* 1: float32 products round their operands to TF32 (from sm_80 on): 0 */
  int32_t mirror;       /* download the weights after every n-th step of a trainer, so that a lost
                           card costs at most n steps. 0: only when the host reads them */
  int32_t ptx;          /* 1: compile to PTX, which the driver finishes. It also does so by itself
                           where NVRTC does not know the GPU: 0 */
  void *stream;         /* CUstream: all contexts queue on it, one thread at a time. NULL: a stream
                           for each context */
  void *context;        /* CUcontext to work in, of `device`. NULL: the primary context */
  const char *cache;    /* path: compiled kernels are kept in this file, which is replaced where it
                           is damaged or of another GPU or version. NULL: none */
  const char *driver;   /* path of the driver's library. NULL: where the system has it */
  const char *nvrtc;    /* path of NVRTC. NULL: several versions are tried */
  const char *cublas;   /* path of cuBLAS. NULL: several versions are tried. "": no cuBLAS */
} moe_cuda_options;
/* The values named above; NULL or 0 where none is named. */
MOE_API void moe_cuda_options_init(moe_cuda_options *options);

/* Opens a GPU and fills *backend, for env.backend: `*backend` must stay where it is until
   moe_cuda_close. options NULL: the initial ones. Compiling the kernels takes some seconds; with
   options.cache only the first time. On failure *backend is unchanged, and env.log received what is
   missing and how to get it:
     MOE_E_UNSUPPORTED  no driver, no GPU, too old a driver or GPU, no NVRTC, no cuBLAS on request
     MOE_E_ARGUMENT     options: an unknown device or maker
     MOE_E_MEMORY       no memory, of the host or of the GPU
     MOE_E_IO           the driver failed; the GPU may be in use by others, or lost */
MOE_API moe_status moe_cuda_open(moe_backend *backend, const moe_cuda_options *options,
                                 const moe_env *env);
/* Releases everything, after all models, contexts and trainers that used it are freed. Returns the
   number of allocations and queues that were not released before (they are now): 0, or a mistake.
   An empty or closed table: nothing happens, 0. */
MOE_API int32_t moe_cuda_close(moe_backend *backend);

/* What a backend has done and holds, for tests and logs. */
typedef struct moe_cuda_counts {
  int32_t arch;                         /* compute capability: 90 for 9.0 */
  int32_t allocations, queues;          /* at present */
  int64_t bytes;                        /* of the GPU's memory, at present */
  int64_t launches, uploads, downloads; /* since moe_cuda_open */
  int64_t uploaded, downloaded;         /* bytes */
  int64_t own, cublas;                  /* products of linear layers, by maker */
} moe_cuda_counts;
MOE_API void moe_cuda_count(const moe_backend *backend, moe_cuda_counts *counts);

#ifdef __cplusplus
}
#endif
#endif

#if defined(MOE_CUDA_IMPLEMENTATION) && !defined(MOE_CUDA_IMPLEMENTED)
#define MOE_CUDA_IMPLEMENTED
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#endif

/* ---- opening libcuda and NVRTC at run time; errors as sentences ---- >>cuda_driver */

typedef unsigned long long moe__cuptr;          /* CUdeviceptr */
typedef struct moe__cuda moe__cuda;             /* moe_backend.user */
typedef struct moe__cuda_queue moe__cuda_queue; /* env.stream */

/* ---- source strings, tables of kernels; CUBIN or PTX; the cache file ---- >>cuda_compile */

/* A chunk of device code, under 4,095 characters and without preprocessor directives. It is a
   string for NVRTC; where MOE__CUDA_CODE is defined (nvcc, the emulator of tests/cuda), it is the
   code itself. A chunk is left out for GPUs below min_arch. */
typedef struct moe__cuda_chunk {
  const char *name;
  int min_arch;
  const char *text;
} moe__cuda_chunk;
#ifdef MOE__CUDA_CODE
#define MOE__CUDA_SOURCE(name, min_arch, ...) __VA_ARGS__
#define MOE__CUDA_SHARED(name, ...) __VA_ARGS__
#else
#define MOE__CUDA_SOURCE(name, min_arch, ...)                                                      \
  static const moe__cuda_chunk moe__cuda_src_##name = {#name, min_arch, #__VA_ARGS__ "\n"};
/* A struct that the host fills and a kernel takes: string and code. */
#define MOE__CUDA_SHARED(name, ...)                                                                \
  MOE__CUDA_SOURCE(name, 0, __VA_ARGS__)                                                           \
  __VA_ARGS__
#endif

/* The chunks in the order in which they are compiled, by section. */
#define MOE__CUDA_CHUNKS_BASE(X) X(math)
#define MOE__CUDA_CHUNKS_PRODUCTS(X)
#define MOE__CUDA_CHUNKS_EXPERTS(X)
#define MOE__CUDA_CHUNKS_ATTENTION(X)
#define MOE__CUDA_CHUNKS_ROWS(X)
#define MOE__CUDA_CHUNKS_ROUTE(X)
#define MOE__CUDA_CHUNKS_HEADS(X)
#define MOE__CUDA_CHUNKS_ADAM(X)
#define MOE__CUDA_CHUNKS(X)                                                                        \
  MOE__CUDA_CHUNKS_BASE(X)                                                                         \
  MOE__CUDA_CHUNKS_PRODUCTS(X)                                                                     \
  MOE__CUDA_CHUNKS_EXPERTS(X)                                                                      \
  MOE__CUDA_CHUNKS_ATTENTION(X)                                                                    \
  MOE__CUDA_CHUNKS_ROWS(X)                                                                         \
  MOE__CUDA_CHUNKS_ROUTE(X)                                                                        \
  MOE__CUDA_CHUNKS_HEADS(X)                                                                        \
  MOE__CUDA_CHUNKS_ADAM(X)

/* The kernels, X(name, min_arch) for moe_k_name, by section: the enum MOE__K_name. */
#define MOE__CUDA_KERNELS_PRODUCTS(X)
#define MOE__CUDA_KERNELS_EXPERTS(X)
#define MOE__CUDA_KERNELS_ATTENTION(X)
#define MOE__CUDA_KERNELS_ROWS(X)
#define MOE__CUDA_KERNELS_ROUTE(X)
#define MOE__CUDA_KERNELS_HEADS(X)
#define MOE__CUDA_KERNELS_ADAM(X)
#define MOE__CUDA_KERNELS(X)                                                                       \
  MOE__CUDA_KERNELS_PRODUCTS(X)                                                                    \
  MOE__CUDA_KERNELS_EXPERTS(X)                                                                     \
  MOE__CUDA_KERNELS_ATTENTION(X)                                                                   \
  MOE__CUDA_KERNELS_ROWS(X)                                                                        \
  MOE__CUDA_KERNELS_ROUTE(X)                                                                       \
  MOE__CUDA_KERNELS_HEADS(X)                                                                       \
  MOE__CUDA_KERNELS_ADAM(X)
#define MOE__CUDA_ENUM(name, min_arch) MOE__K_##name,
typedef enum moe__cuda_kernel { MOE__CUDA_KERNELS(MOE__CUDA_ENUM) MOE__K_COUNT } moe__cuda_kernel;
#undef MOE__CUDA_ENUM

/* ---- queues, memory of the card, copies, scratch, launches ---- >>cuda_memory */

/* What slots call. The table's slots (>>cuda_table) hold the queue's lock, have made the context
   current and emptied the scratch before they call moe__cuda_linear and so on. */

/* The queue of env.stream; NULL stream: the backend's own. */
static moe__cuda_queue *moe__cuda_queue_of(const moe_backend *b, const moe_env *env);
/* Launches kernel MOE__K_name; gx up to 2^31 - 1, gy up to 65,535; args point to the arguments. gx
   or gy 0: nothing to do. After a failure on this queue: that status again, at once. */
static moe_status moe__cuda_launch(moe__cuda_queue *q, int kernel, uint32_t gx, uint32_t gy,
                                   uint32_t threads, void **args);
/* Memory of the card until the slot returns (kernels launched so far may still use it), aligned to
   256 bytes. 0 bytes: a valid pointer all the same. */
static moe_status moe__cuda_scratch(moe__cuda_queue *q, size_t bytes, void **out);
static void moe__cuda_scratch_reset(moe__cuda_queue *q);
/* Copies a small array of the host to the card, into scratch or, where an equal array was copied
   before, not at all. `host` may change after the call. */
static moe_status moe__cuda_upload_args(moe__cuda_queue *q, const void *host, size_t bytes,
                                        void **out);
/* Copies from the card and waits: for the few slots that need a number on the host. */
static moe_status moe__cuda_peek(moe__cuda_queue *q, void *host, const void *from, size_t bytes);
/* Zeros, in order with the kernels. */
static moe_status moe__cuda_zero(moe__cuda_queue *q, void *p, size_t bytes);
/* Reports an error that a slot detects itself: status and sentence. */
static moe_status moe__cuda_fail(const moe_env *env, moe_status status, const char *format, ...);
static int moe__cuda_arch(const moe__cuda_queue *q); /* 70, 75, 80, ... */
static int moe__cuda_tf32(const moe__cuda_queue *q); /* 1: float32 products in TF32 */

/* ---- device code that all kernels share ---- >>cuda_base */

/* The CPU's random bits, exp and log (>>random and >>simd in moe.h): the same operations in the same
   order. */
MOE__CUDA_SOURCE(
    math, 0,
    __device__ static inline unsigned moe__d_hash32(unsigned long long key, unsigned position) {
      unsigned x = position * 0x9e3779b1u + (unsigned)key;
      x = (x ^ x >> 16) * 0x85ebca6bu;
      x ^= (unsigned)(key >> 32);
      x = (x ^ x >> 13) * 0xc2b2ae35u;
      return x ^ x >> 16;
    }

    __device__ static inline float moe__d_exp(float x) {
      float t, k, r, p;
      unsigned u, half;
      x = x < -104.0f ? -104.0f : x;
      x = x > 89.0f ? 89.0f : x;
      t = fmaf(x, 1.44269502f, 12582912.0f);
      k = t - 12582912.0f;
      r = fmaf(-k, 1.42860677e-6f, fmaf(-k, 0.693145752f, x));
      p = fmaf(fmaf(1.393953804e-03f, r, 8.368821815e-03f), r, 4.166641459e-02f);
      p = fmaf(fmaf(fmaf(p, r, 1.666651964e-01f), r, 0.5f), r, 1.0f);
      p = fmaf(p, r, 1.0f);
      u = __float_as_uint(t) - 0x4b400000u;
      half = (u >> 1) | (u & 0x80000000u);
      p = p * __uint_as_float((half << 23) + 0x3f800000u);
      return p * __uint_as_float(((u - half) << 23) + 0x3f800000u);
    }

    __device__ static inline float moe__d_log(float x) {
      float scaled = x < 1.17549435e-38f ? x * 8388608.0f : x, f, e, s, p;
      unsigned u = __float_as_uint(scaled), above = u - 0x3f3504f3u;
      unsigned k = (above >> 23) | (above & 0x80000000u ? 0xfffffe00u : 0u);
      f = __uint_as_float(u - (k << 23)) - 1.0f;
      e = (float)(int)k + (x < 1.17549435e-38f ? -23.0f : 0.0f);
      s = f * f;
      p = fmaf(fmaf(6.749556214e-02f, f, -1.167019233e-01f), f, 1.188347042e-01f);
      p = fmaf(fmaf(fmaf(p, f, -1.240620762e-01f), f, 1.422036290e-01f), f, -1.666799039e-01f);
      p = fmaf(fmaf(fmaf(p, f, 2.000207156e-01f), f, -2.500000894e-01f), f, 3.333331347e-01f);
      p = fmaf(p, f, -0.5f);
      p = fmaf(p, s, e * 1.42860677e-6f) + f;
      p = fmaf(e, 0.693145752f, p);
      if (!(x < __uint_as_float(0x7f800000u))) p = x;
      if (x <= 0.0f) p = __uint_as_float(x < 0.0f ? 0x7fc00000u : 0xff800000u);
      return p;
    })

/* ---- linear layers; cuBLAS, the choice of the maker ---- >>cuda_products */

/* C (m, n) = op(A) (m, k) op(B) (k, n), or C += ... where accumulate is 1; rows a_row, b_row and
   c_row numbers apart. a_trans 1: A is stored as (k, m); b_trans 1: B is stored as (n, k). */
typedef struct moe__cuda_gemm {
  int32_t m, n, k;
  const void *a, *b; /* float, or bf16 (2 bytes each) where bf16 is 1 */
  size_t a_row, b_row;
  int a_trans, b_trans, bf16, accumulate;
  float *c;
  size_t c_row;
} moe__cuda_gemm;
/* cuBLAS computes it on the queue's stream. m, n or k 0: nothing is done. */
static moe_status moe__cuda_blas_gemm(moe__cuda_queue *q, const moe__cuda_gemm *g);
/* 1: cuBLAS is to compute products of this kind: the option, or what was measured. `kind`: 0 y = x
   w^T, 1 dx = dy w, 2 dw = dy^T x; m tokens, n outputs, k inputs of the layer. */
static int moe__cuda_blas_serves(moe__cuda_queue *q, int kind, int32_t m, int32_t n, int32_t k);

/* ---- expert feed-forward networks, grouped ---- >>cuda_experts */

/* ---- self-attention over packed sequences ---- >>cuda_attention */

/* ---- LayerNorm, dropout, embeddings ---- >>cuda_rows */

/* ---- gates, softmax, top-k, dispatch ---- >>cuda_route */

/* ---- heads and losses ---- >>cuda_heads */

/* ---- norm of the gradients, Adam ---- >>cuda_adam */

/* ---- what is supported, the table of slots, open and close ---- >>cuda_table */

#endif

/* LICENCE

   moe.h, moe_cuda.h and every file of this project that does not say otherwise are
   available under two licences: choose the one you prefer.

   ------------------------------------------------------------------------------
   ALTERNATIVE A - Public Domain (Unlicense, https://unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
   software, either in source code form or as a compiled binary, for any purpose,
   commercial or non-commercial, and by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this
   software dedicate any and all copyright interest in the software to the public
   domain. We make this dedication for the benefit of the public at large and to
   the detriment of our heirs and successors. We intend this dedication to be an
   overt act of relinquishment in perpetuity of all present and future rights to
   this software under copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS
   FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS BE
   LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
   CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
   SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   ------------------------------------------------------------------------------
   ALTERNATIVE B - MIT No Attribution (MIT-0)

   Copyright (c) 2026 the moe.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of
   this software and associated documentation files (the "Software"), to deal in
   the Software without restriction, including without limitation the rights to
   use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
   the Software, and to permit persons to whom the Software is furnished to do so.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS
   FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
   COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
   IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
   CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   The data sets in examples/data have licences of their own: examples/data/README.md names them. */
