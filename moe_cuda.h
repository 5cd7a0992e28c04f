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
   WHAT     A backend of kind DEVICE (moe.h, >>api_backend): weights, gradients, moments and
            activations stay on the card. A pass uploads ids and downloads scores or losses.
   BITS     Not the CPU's, but the same ones in each run on the same card with the same maker: one
            writer of each output, a fixed order of sums. Random numbers are the CPU's.
   THREADS  As in moe.h: a context belongs to one thread at a time.
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
  int32_t arch;                /* compute capability: 90 for 9.0 */
  int32_t allocations, queues; /* at present */
  int64_t bytes;               /* of the GPU's memory, at present */
  int64_t launches;            /* of kernels, since moe_cuda_open */
  int64_t own, cublas;         /* products of linear layers, by maker */
} moe_cuda_counts;
MOE_API void moe_cuda_count(const moe_backend *backend, moe_cuda_counts *counts);

#ifdef __cplusplus
}
#endif
#endif

#if defined(MOE_CUDA_IMPLEMENTATION) && !defined(MOE_CUDA_IMPLEMENTED)
#define MOE_CUDA_IMPLEMENTED
#include <math.h>
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
#include <unistd.h>
#endif

/* ---- opening libcuda and NVRTC at run time; errors as sentences ---- >>cuda_driver */

typedef unsigned long long moe__cuptr;          /* CUdeviceptr */
typedef struct moe__cuda moe__cuda;             /* moe_backend.user */
typedef struct moe__cuda_queue moe__cuda_queue; /* env.stream */

/* The functions of the driver, of NVRTC and of cuBLAS, X(name, arguments): all return an int, 0
   where they succeed. Where a function has versions, the symbol of the present one ends in _v2. */
// clang-format off
#define MOE__CUDA_DRIVER(X)                                                                        \
  X(cuInit, (unsigned flags)) X(cuDriverGetVersion, (int *version))                                \
  X(cuGetErrorName, (int error, const char **name)) X(cuDeviceGetCount, (int *count))              \
  X(cuDeviceGet, (int *device, int index)) X(cuDeviceGetName, (char *name, int room, int device))  \
  X(cuDeviceGetAttribute, (int *value, int attribute, int device))                                 \
  X(cuDevicePrimaryCtxRetain, (void **context, int device))                                        \
  X(cuDevicePrimaryCtxRelease_v2, (int device)) X(cuCtxPushCurrent_v2, (void *context))            \
  X(cuCtxPopCurrent_v2, (void **context)) X(cuMemGetInfo_v2, (size_t *left, size_t *total))        \
  X(cuMemAlloc_v2, (moe__cuptr *p, size_t bytes)) X(cuMemFree_v2, (moe__cuptr p))                  \
  X(cuMemAllocHost_v2, (void **p, size_t bytes)) X(cuMemFreeHost, (void *p))                       \
  X(cuMemcpyHtoDAsync_v2, (moe__cuptr to, const void *from, size_t bytes, void *stream))           \
  X(cuMemcpyDtoH_v2, (void *to, moe__cuptr from, size_t bytes))                                    \
  X(cuMemsetD8Async, (moe__cuptr p, unsigned char value, size_t bytes, void *stream))              \
  X(cuStreamCreate, (void **stream, unsigned flags)) X(cuStreamDestroy_v2, (void *stream))         \
  X(cuStreamSynchronize, (void *stream)) X(cuEventCreate, (void **event, unsigned flags))          \
  X(cuEventDestroy_v2, (void *event)) X(cuEventRecord, (void *event, void *stream))                \
  X(cuEventSynchronize, (void *event)) X(cuEventElapsedTime, (float *ms, void *from, void *to))    \
  X(cuModuleLoadData, (void **module, const void *image)) X(cuModuleUnload, (void *module))        \
  X(cuModuleGetFunction, (void **function, void *module, const char *name))                        \
  X(cuLaunchKernel, (void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,           \
                     unsigned by, unsigned bz, unsigned shared, void *stream, void **arguments,    \
                     void **extra))
#define MOE__CUDA_NVRTC(X)                                                                         \
  X(nvrtcVersion, (int *major, int *minor)) X(nvrtcGetNumSupportedArchs, (int *count))             \
  X(nvrtcGetSupportedArchs, (int *archs))                                                          \
  X(nvrtcCreateProgram, (void **program, const char *source, const char *name, int headers,        \
                         const char *const *header, const char *const *include))                   \
  X(nvrtcDestroyProgram, (void **program))                                                         \
  X(nvrtcCompileProgram, (void *program, int count, const char *const *option))                    \
  X(nvrtcGetProgramLogSize, (void *program, size_t *bytes))                                        \
  X(nvrtcGetProgramLog, (void *program, char *log))                                                \
  X(nvrtcGetPTXSize, (void *program, size_t *bytes)) X(nvrtcGetPTX, (void *program, char *ptx))    \
  X(nvrtcGetCUBINSize, (void *program, size_t *bytes))                                             \
  X(nvrtcGetCUBIN, (void *program, char *cubin))
#define MOE__CUDA_CUBLAS(X)                                                                        \
  X(cublasCreate_v2, (void **handle)) X(cublasDestroy_v2, (void *handle))                          \
  X(cublasSetStream_v2, (void *handle, void *stream))                                              \
  X(cublasSetMathMode, (void *handle, int mode))                                                   \
  X(cublasGemmEx, (void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha, \
                   const void *a, int a_type, int a_row, const void *b, int b_type, int b_row,     \
                   const void *beta, void *c, int c_type, int c_row, int compute, int how))
// clang-format on

#ifdef _WIN32
#define MOE__CUDA_CALL __stdcall
#else
#define MOE__CUDA_CALL
#endif
#define MOE__CUDA_MEMBER(name, arguments) int(MOE__CUDA_CALL * name) arguments;
#define MOE__CUDA_NAME(name, arguments) #name,
#define MOE__CUDA_LIBRARY(name, functions)                                                         \
  typedef struct moe__cuda_##name {                                                                \
    functions(MOE__CUDA_MEMBER)                                                                    \
  } moe__cuda_##name;                                                                              \
  static const char *const moe__cuda_##name##_names[] = {functions(MOE__CUDA_NAME) NULL};
// clang-format off
MOE__CUDA_LIBRARY(driver, MOE__CUDA_DRIVER)
MOE__CUDA_LIBRARY(nvrtc, MOE__CUDA_NVRTC)
MOE__CUDA_LIBRARY(cublas, MOE__CUDA_CUBLAS)
// clang-format on

/* Where the libraries are, the newest first; %d of NVRTC and cuBLAS is the major version. */
#ifdef _WIN32
static const char *const moe__cuda_driver_paths[] = {"nvcuda.dll", NULL};
static const char *const moe__cuda_nvrtc_paths[] = {"nvrtc64_%d0_0.dll", "nvrtc64_%d2_0.dll", NULL};
static const char *const moe__cuda_cublas_paths[] = {"cublas64_%d.dll", NULL};
#else
// clang-format off
static const char *const moe__cuda_driver_paths[] = {
    "libcuda.so.1", "libcuda.so", "/usr/lib/wsl/lib/libcuda.so.1", NULL};
static const char *const moe__cuda_nvrtc_paths[] = {"libnvrtc.so.%d", "libnvrtc.so.%d.2",
    "/usr/local/cuda-%d/lib64/libnvrtc.so", "/usr/local/cuda/lib64/libnvrtc.so.%d", NULL};
static const char *const moe__cuda_cublas_paths[] = {"libcublas.so.%d",
    "/usr/local/cuda-%d/lib64/libcublas.so", "/usr/local/cuda/lib64/libcublas.so.%d", NULL};
// clang-format on
#endif
enum { MOE__CUDA_OLDEST = 11, MOE__CUDA_NEWEST = 14 }; /* major versions that are looked for */

/* Reports a failure: the sentence goes to env.log. */
static moe_status moe__cuda_fail(const moe_env *env, moe_status status, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 3, 4)))
#endif
    ;
static moe_status moe__cuda_fail(const moe_env *env, moe_status status, const char *format, ...) {
  char text[1024];
  va_list list;
  if (!env->log) return status;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  env->log(env->log_user, status, text);
  return status;
}

#ifdef _WIN32
#define MOE__CUDA_DLOPEN(path) ((void *)LoadLibraryA(path))
#define MOE__CUDA_DLCLOSE(library) FreeLibrary((HMODULE)(library))
#define MOE__CUDA_DLSYM(library, name) GetProcAddress((HMODULE)(library), name)
typedef FARPROC moe__cuda_symbol;
#else
#define MOE__CUDA_DLOPEN(path) dlopen(path, RTLD_NOW | RTLD_LOCAL)
#define MOE__CUDA_DLCLOSE(library) dlclose(library)
#define MOE__CUDA_DLSYM(library, name) dlsym(library, name)
typedef void *moe__cuda_symbol;
#endif

/* Fills a table of functions, which is an array of pointers. Returns the first name that the
   library lacks, or NULL. */
static const char *moe__cuda_symbols(void *library, const char *const *names, void *table) {
  size_t i;
  for (i = 0; names[i]; ++i) {
    moe__cuda_symbol symbol = MOE__CUDA_DLSYM(library, names[i]);
    if (!symbol) return names[i];
    memcpy((char *)table + i * sizeof symbol, &symbol, sizeof symbol);
  }
  return NULL;
}

/* What to do about an error of the driver; the last row is for those that people do not meet. */
static const struct {
  int error;
  moe_status status;
  const char *advice;
} moe__cuda_advice[] = {
    {2, MOE_E_MEMORY, "the GPU's memory is full: use smaller micro-batches, or end other programs"},
    {34, MOE_E_UNSUPPORTED, "this libcuda.so is the toolkit's stub: install the NVIDIA driver"},
    {46, MOE_E_IO, "another program has the GPU for itself: see nvidia-smi"},
    {100, MOE_E_UNSUPPORTED, "no GPU is visible: see nvidia-smi, CUDA_VISIBLE_DEVICES, MIG"},
    {200, MOE_E_IO, "the compiled kernels are damaged: delete the cache file"},
    {209, MOE_E_IO, "the kernels were compiled for another GPU: delete the cache file"},
    {214, MOE_E_IO, "the GPU's memory has an error: reset the GPU, see dmesg"},
    {218, MOE_E_UNSUPPORTED, "the driver does not know this PTX: update it, or use an older NVRTC"},
    {222, MOE_E_UNSUPPORTED, "NVRTC is newer than the driver: update it, or use an older NVRTC"},
    {700, MOE_E_IO, "a kernel left its memory, which is a mistake in moe_cuda.h"},
    {702, MOE_E_IO, "a kernel ran into the watchdog of the display: use a GPU without one"},
    {716, MOE_E_IO, "an address was misaligned, which is a mistake in moe_cuda.h"},
    {719, MOE_E_IO, "a kernel failed: the GPU may be lost, see dmesg"},
    {802, MOE_E_IO, "the system is not ready: start nvidia-fabricmanager"},
    {803, MOE_E_UNSUPPORTED, "driver and libcuda.so differ: reboot, or install them together"},
    {0, MOE_E_IO, "see nvidia-smi and dmesg: the GPU may be lost"},
};

/* Reports that call `what` of the driver failed. */
static moe_status moe__cuda_driver_fail(const moe__cuda_driver *cu, const moe_env *env, int index,
                                        const char *what, int error) {
  const char *name = NULL;
  int i = 0;
  while (moe__cuda_advice[i].error && moe__cuda_advice[i].error != error) ++i;
  if (cu->cuGetErrorName(error, &name) || !name) name = "unknown error";
  return moe__cuda_fail(env, moe__cuda_advice[i].status, "cuda:%d: %s: %s (%d): %s", index, what,
                        name, error, moe__cuda_advice[i].advice);
}

/* ---- source strings, tables of kernels; CUBIN or PTX; the cache file ---- >>cuda_compile */

/* A chunk of device code, under 4,095 characters and without preprocessor directives. It is a
   string for NVRTC; where MOE__CUDA_CODE is defined (nvcc, the emulator of tests/cuda), it is the
   code itself. A chunk is left out for GPUs below min_arch. */
typedef struct moe__cuda_chunk {
  int min_arch;
  const char *text;
} moe__cuda_chunk;
#ifdef MOE__CUDA_CODE
#define MOE_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define MOE__CUDA_SOURCE(name, min_arch, ...) __VA_ARGS__
#define MOE__CUDA_SHARED(name, ...) __VA_ARGS__
#define MOE__CUDA_CHUNK(name)
#else
#define MOE__CUDA_SOURCE(name, min_arch, ...)                                                      \
  static const moe__cuda_chunk moe__cuda_src_##name = {min_arch, #__VA_ARGS__ "\n"};
/* A struct that the host fills and a kernel takes: string and code. */
#define MOE__CUDA_SHARED(name, ...)                                                                \
  MOE__CUDA_SOURCE(name, 0, __VA_ARGS__)                                                           \
  __VA_ARGS__
#define MOE__CUDA_CHUNK(name) &moe__cuda_src_##name,
#endif

// clang-format off
/* The chunks in the order in which they are compiled. */
#define MOE__CUDA_CHUNKS(X) X(prim) X(wide) X(sums) X(product) X(tile) X(load) X(step) X(step_mma) \
  X(finish) X(products) X(products_mma) X(pieces) X(experts) X(attention_args) X(attention_base)   \
  X(attention) X(attention_back) X(rows_args) X(norm) X(sort_args) X(sort) X(embed_args) X(embed)  \
  X(route_args) X(route_base) X(route) X(route_gates) X(route_loss) X(heads_args) X(heads)         \
  X(heads_back) X(span_args) X(adam)

/* The kernels, X(name, min_arch) for moe_k_name: the enum MOE__K_name. First those of products. */
#define MOE__CUDA_KERNELS_PRODUCTS(X) X(f32_nt, 0) X(f32_nn, 0) X(f32_tn, 0) X(tf32_nt, 80)        \
  X(tf32_nn, 80) X(tf32_tn, 80) X(bf16_nt, 80) X(bf16_nn, 80) X(bf16_tn, 80) X(pieces, 0)          \
  X(to_bf16, 0) X(bias, 0) X(place, 0) X(combine, 0) X(dweight, 0)
#define MOE__CUDA_KERNELS(X) MOE__CUDA_KERNELS_PRODUCTS(X) X(attention_32, 0) X(attention_64, 0)   \
  X(attention_128, 0) X(attention_dq_32, 0) X(attention_dq_64, 0) X(attention_dq_128, 0)           \
  X(attention_dkv_32, 0) X(attention_dkv_64, 0) X(attention_dkv_128, 0) X(norm, 0) X(norm_back, 0) \
  X(norm_columns, 0) X(dropout, 0) X(sort, 0) X(embed, 0) X(embed_words, 0) X(embed_positions, 0)  \
  X(embed_segments, 0) X(route, 0) X(route_back, 0) X(route_dx, 0) X(route_dgates, 0)              \
  X(route_parts, 0) X(route_loss, 0) X(heads_feature, 0) X(heads_scores, 0) X(heads_loss, 0)       \
  X(heads_dw, 0) X(heads_dhidden, 0) X(norm_squares, 0) X(norm_root, 0) X(adam, 0)
// clang-format on
#define MOE__CUDA_ENUM(name, min_arch) MOE__K_##name,
typedef enum moe__cuda_kernel { MOE__CUDA_KERNELS(MOE__CUDA_ENUM) MOE__K_COUNT } moe__cuda_kernel;
#define MOE__CUDA_ROW(name, min_arch) {"moe_k_" #name, min_arch},
static const struct {
  const char *name;
  int min_arch;
} moe__cuda_kernel_list[] = {MOE__CUDA_KERNELS(MOE__CUDA_ROW){NULL, 0}};

/* State of a backend. What several threads may change is behind `mutex`; `driver`, `kernel` and so
   on are constant after moe_cuda_open. */
#ifdef _WIN32
typedef CRITICAL_SECTION moe__cuda_mutex;
#define MOE__CUDA_MUTEX_INIT(m) InitializeCriticalSection(m)
#define MOE__CUDA_MUTEX_FREE(m) DeleteCriticalSection(m)
#define MOE__CUDA_LOCK(m) EnterCriticalSection(m)
#define MOE__CUDA_UNLOCK(m) LeaveCriticalSection(m)
#define MOE__CUDA_PROCESS() GetCurrentProcessId()
#define MOE__CUDA_RENAME(from, to) MoveFileExA(from, to, MOVEFILE_REPLACE_EXISTING)
#else
typedef pthread_mutex_t moe__cuda_mutex;
#define MOE__CUDA_MUTEX_INIT(m) pthread_mutex_init(m, NULL)
#define MOE__CUDA_MUTEX_FREE(m) pthread_mutex_destroy(m)
#define MOE__CUDA_LOCK(m) pthread_mutex_lock(m)
#define MOE__CUDA_UNLOCK(m) pthread_mutex_unlock(m)
#define MOE__CUDA_PROCESS() getpid()
#define MOE__CUDA_RENAME(from, to) (!rename(from, to))
#endif

/* Which maker is faster for one kind of product: see moe__cuda_blas_serves. */
enum { MOE__CUDA_CHOICES = 64 };
typedef struct moe__cuda_choice {
  int32_t form, bf16, m, n, k, blas; /* m tokens, n outputs, k inputs */
} moe__cuda_choice;

typedef struct moe__cuda_block { /* memory of the card */
  moe__cuptr p;
  size_t bytes, used;
  struct moe__cuda_block *next;
} moe__cuda_block;

struct moe__cuda {
  moe_cuda_options options;
  moe__cuda_driver driver;
  moe__cuda_cublas cublas;
  void *driver_library, *cublas_library; /* cublas_library NULL: cuBLAS is not used */
  int device, primary, driver_version;
  int card_arch, arch; /* of the GPU; of the kernels: the same, or lower */
  void *context, *module, *kernel[MOE__K_COUNT + 1];
  char card[96], name[256];
  moe__cuda_mutex mutex;
  int lost;                /* an error of the driver after which no call can succeed, or 0 */
  moe__cuda_block *blocks; /* those of moe_backend.alloc, a list */
  int32_t choices;
  moe__cuda_choice choice[MOE__CUDA_CHOICES];
  moe__cuda_queue *queues, *own; /* a list; the queue of env.stream NULL */
  moe_cuda_counts counts;
};

/* What NVRTC made: CUBIN, or PTX with its ending zero. In the cache file the bytes of `data` follow
   all that is before it here. key: what it was made of. */
typedef struct moe__cuda_image {
  char magic[8];
  uint64_t key, arch, bytes, hash;
  char *data;
} moe__cuda_image;

static char *moe__cuda_source(int arch); /* >>cuda_table */

/* Calls a function of a library unless one before it has failed. */
#define MOE__CUDA_TRY(library, name, arguments)                                                    \
  if (!error) what = #name, error = (library)->name arguments

/* FNV-1a. */
static uint64_t moe__cuda_hash(uint64_t hash, const void *data, size_t bytes) {
  const unsigned char *p = (const unsigned char *)data;
  size_t i;
  for (i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 0x100000001b3u;
  return hash;
}

/* Reads the cache file; 0: there is none of this key, or it is damaged. */
static int moe__cuda_cache_read(const char *path, moe__cuda_image *image) {
  moe__cuda_image head;
  FILE *file = fopen(path, "rb");
  int good = file && fread(&head, offsetof(moe__cuda_image, data), 1, file) == 1 &&
             !memcmp(&head, image, offsetof(moe__cuda_image, arch)) &&
             head.bytes < (uint64_t)1 << 30;
  head.data = good ? (char *)calloc((size_t)head.bytes + 1, 1) : NULL;
  good = head.data && fread(head.data, (size_t)head.bytes, 1, file) == 1 && fgetc(file) == EOF &&
         moe__cuda_hash(head.key ^ head.arch, head.data, (size_t)head.bytes) == head.hash;
  if (file) fclose(file);
  if (good)
    *image = head;
  else
    free(head.data);
  return good;
}

/* Writes the cache file beside its place and moves it there, so that nobody reads half of one. A
   failure is only reported: the kernels are there. */
static void moe__cuda_cache_write(const moe__cuda *cuda, moe__cuda_image *image,
                                  const moe_env *env) {
  const char *path = cuda->options.cache;
  char temporary[1024];
  int length = snprintf(temporary, sizeof temporary, "%s.%lx.%llx", path,
                        (unsigned long)MOE__CUDA_PROCESS(), (unsigned long long)(uintptr_t)cuda);
  FILE *file = length < (int)sizeof temporary ? fopen(temporary, "wb") : NULL;
  int good;
  image->hash = moe__cuda_hash(image->key ^ image->arch, image->data, (size_t)image->bytes);
  good = file && fwrite(image, offsetof(moe__cuda_image, data), 1, file) == 1 &&
         fwrite(image->data, (size_t)image->bytes, 1, file) == 1;
  if (file) good = !fclose(file) && good && MOE__CUDA_RENAME(temporary, path);
  if (!good && file) remove(temporary);
  if (!good)
    moe__cuda_fail(env, MOE_E_IO,
                   "cuda:%d: the cache file %s cannot be written; the next start compiles again",
                   (int)cuda->options.device, path);
}

/* The architecture to compile for: the card's, or the highest below it that this NVRTC knows, as
   PTX. 0: none. */
static int moe__cuda_target(const moe__cuda_nvrtc *rtc, int card, int *ptx) {
  int count = 0, best = 0, i, *arch;
  if (rtc->nvrtcGetNumSupportedArchs(&count)) return 0;
  arch = (int *)malloc((size_t)count * sizeof *arch);
  if (arch && !rtc->nvrtcGetSupportedArchs(arch))
    for (i = 0; i < count; ++i)
      if (arch[i] <= card && arch[i] > best) best = arch[i];
  free(arch);
  if (best < card) *ptx = 1;
  return best >= 70 ? best : 0;
}

/* Compiles the source for image->arch: image->data is to be freed. Says what NVRTC's log says. */
static moe_status moe__cuda_compile(const moe__cuda_nvrtc *rtc, int ptx, moe__cuda_image *image,
                                    const moe_env *env) {
  char *source = moe__cuda_source((int)image->arch), option[48];
  const char *options[2] = {option, "--std=c++11"}, *what = NULL;
  char *log = NULL;
  void *program = NULL;
  size_t bytes = 0;
  moe_status status = MOE_OK;
  int error = 0;
  if (!source) return moe__cuda_fail(env, MOE_E_MEMORY, "cuda: no memory for the source");
  snprintf(option, sizeof option, "--gpu-architecture=%s_%d", ptx ? "compute" : "sm",
           (int)image->arch);
  MOE__CUDA_TRY(rtc, nvrtcCreateProgram, (&program, source, "moe_cuda.cu", 0, NULL, NULL));
  MOE__CUDA_TRY(rtc, nvrtcCompileProgram, (program, 2, options));
  free(source);
  if (!error) what = "taking the compiled kernels";
  if (!error) error = (ptx ? rtc->nvrtcGetPTXSize : rtc->nvrtcGetCUBINSize)(program, &bytes);
  if (!error) image->data = (char *)calloc(bytes + 1, 1);
  if (!error && !image->data) error = 1;
  if (!error) error = (ptx ? rtc->nvrtcGetPTX : rtc->nvrtcGetCUBIN)(program, image->data);
  image->bytes = bytes;
  if (error && program && !rtc->nvrtcGetProgramLogSize(program, &bytes))
    log = (char *)calloc(bytes + 1, 1);
  if (log) rtc->nvrtcGetProgramLog(program, log);
  if (program) rtc->nvrtcDestroyProgram(&program);
  if (error)
    status = moe__cuda_fail(env, error == 1 ? MOE_E_MEMORY : MOE_E_UNSUPPORTED,
                            "NVRTC: %s returned %d: install another version of it%s%.600s", what,
                            error, log && log[0] ? ": " : "", log ? log : "");
  free(log);
  return status;
}

/* Gives the image to the driver and looks up its kernels. */
static moe_status moe__cuda_module(moe__cuda *cuda, const moe__cuda_image *image,
                                   const moe_env *env) {
  const moe__cuda_driver *cu = &cuda->driver;
  const char *what = NULL;
  int error = 0, i;
  MOE__CUDA_TRY(cu, cuModuleLoadData, (&cuda->module, image->data));
  if (error) cuda->module = NULL;
  for (i = 0; !error && i < MOE__K_COUNT; ++i) {
    what = moe__cuda_kernel_list[i].name;
    cuda->kernel[i] = NULL;
    if (moe__cuda_kernel_list[i].min_arch <= (int)image->arch)
      error = cu->cuModuleGetFunction(&cuda->kernel[i], cuda->module, what);
  }
  cuda->arch = (int)image->arch;
  if (!error) return MOE_OK;
  if (cuda->module) cu->cuModuleUnload(cuda->module);
  cuda->module = NULL;
  return moe__cuda_driver_fail(cu, env, cuda->options.device, what, error);
}

/* Compiles with one library and loads the result. */
static moe_status moe__cuda_build_with(moe__cuda *cuda, void *library, const char *path,
                                       moe__cuda_image *image, const moe_env *env) {
  moe__cuda_nvrtc rtc;
  int ptx = cuda->options.ptx != 0, major = 0, minor = 0;
  const char *lacks = moe__cuda_symbols(library, moe__cuda_nvrtc_names, &rtc);
  moe_status status;
  if (lacks || rtc.nvrtcVersion(&major, &minor))
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "%s: %s fails or is missing: install NVRTC of CUDA 11.2 or later", path,
                          lacks ? lacks : "nvrtcVersion");
  image->arch = (uint64_t)moe__cuda_target(&rtc, cuda->card_arch, &ptx);
  if (!image->arch)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "%s: NVRTC %d.%d does not compile for this GPU (sm_%d): install another "
                          "version of it",
                          path, major, minor, cuda->card_arch);
  status = moe__cuda_compile(&rtc, ptx, image, env);
  return status ? status : moe__cuda_module(cuda, image, env);
}

/* Opens the given library or, where it is NULL, the next one of a list of paths: of the driver's
   major version, then older ones, then newer ones. *at says where to go on; path (512) is its path.
   NULL: no more. */
static void *moe__cuda_find(const char *const *paths, const char *given, const moe__cuda *cuda,
                            int *at, char *path) {
  int count = 0, own = cuda->driver_version / 1000, newest = MOE__CUDA_NEWEST;
  void *library = NULL;
  own = own > newest ? newest : own < MOE__CUDA_OLDEST ? MOE__CUDA_OLDEST : own;
  snprintf(path, 512, "%s", given ? given : "");
  if (given) return (*at)++ ? NULL : MOE__CUDA_DLOPEN(given);
  while (paths[count]) ++count;
  for (; !library && *at < count * (newest - MOE__CUDA_OLDEST + 1); ++*at) {
    int turn = *at / count, older = own - MOE__CUDA_OLDEST;
    snprintf(path, 512, paths[*at % count], turn <= older ? own - turn : own + turn - older);
    library = MOE__CUDA_DLOPEN(path);
  }
  return library;
}

/* Makes the kernels with the first NVRTC that can. */
static moe_status moe__cuda_build(moe__cuda *cuda, moe__cuda_image *image, const moe_env *env) {
  const char *given = cuda->options.nvrtc;
  char path[512];
  int at = 0;
  void *library = moe__cuda_find(moe__cuda_nvrtc_paths, given, cuda, &at, path);
  moe_status status = MOE_E_UNSUPPORTED;
  if (!library)
    moe__cuda_fail(env, status,
                   "cuda:%d: %s is not found: install NVRTC (pip install nvidia-cuda-nvrtc-cu12, "
                   "or CUDA's toolkit) and name it in moe_cuda_options.nvrtc or LD_LIBRARY_PATH",
                   (int)cuda->options.device, given ? given : "libnvrtc.so");
  while (status && library) {
    free(image->data);
    image->data = NULL;
    status = moe__cuda_build_with(cuda, library, path, image, env);
    MOE__CUDA_DLCLOSE(library);
    if (status) library = moe__cuda_find(moe__cuda_nvrtc_paths, given, cuda, &at, path);
  }
  return status;
}

/* The kernels for this card: from the cache file, or compiled. */
static moe_status moe__cuda_kernels(moe__cuda *cuda, const moe_env *env) {
  char *source = moe__cuda_source(cuda->card_arch);
  const char *cache = cuda->options.cache;
  moe__cuda_image image;
  moe_env silent = *env;
  moe_status status = MOE_E_IO;
  if (!source) return moe__cuda_fail(env, MOE_E_MEMORY, "cuda: no memory for the source");
  memset(&image, 0, sizeof image);
  memcpy(image.magic, "MOECUDA1", 8);
  image.key = moe__cuda_hash(0xcbf29ce484222325u, source, strlen(source));
  image.key = moe__cuda_hash(image.key, &cuda->card_arch, sizeof cuda->card_arch);
  image.key = moe__cuda_hash(image.key, &cuda->options.ptx, sizeof cuda->options.ptx);
  image.key = moe__cuda_hash(image.key, cuda->card, sizeof cuda->card);
  free(source);
  silent.log = NULL;
  if (cache && moe__cuda_cache_read(cache, &image))
    status = moe__cuda_module(cuda, &image, &silent);
  if (status) {
    status = moe__cuda_build(cuda, &image, env);
    if (!status && cache) moe__cuda_cache_write(cuda, &image, env);
  }
  free(image.data);
  return status;
}

/* ---- queues, memory of the card, copies, scratch, launches ---- >>cuda_memory
   The first failure of a queue stays: later calls do nothing and return it, so that a slot needs
   only the status of its last call. */

enum { MOE__CUDA_ALIGN = 256, MOE__CUDA_STAGING = 1 << 20, MOE__CUDA_SCRATCH = 1 << 20 };

/* A queue: a stream, and the memory that its slots use. */
struct moe__cuda_queue {
  moe__cuda *cuda;
  moe__cuda_queue *next;
  moe__cuda_mutex mutex;
  void *stream, *blas; /* blas: cuBLAS's handle, or NULL */
  int owns_stream, scratch_blocks;
  int force;                   /* while makers are measured: 0 own kernels, 1 cuBLAS; else -1 */
  moe_status status;           /* the first failure */
  moe_env env;                 /* of the present call: log, precision, profile */
  moe__cuda_block scratch[32]; /* of MOE__CUDA_SCRATCH bytes at least */
  char *staging;               /* MOE__CUDA_STAGING bytes of pinned memory: uploads wait here */
  size_t staging_used;
};

/* The queue of env.stream; NULL stream: the backend's own. */
static moe__cuda_queue *moe__cuda_queue_of(const moe_backend *b, const moe_env *env) {
  return env->stream ? (moe__cuda_queue *)env->stream : ((moe__cuda *)b->user)->own;
}

/* 1: float32 products in TF32. */
static int moe__cuda_tf32(const moe__cuda_queue *q) {
  return q->cuda->options.tf32 && q->cuda->arch >= 80;
}

/* Counts in moe_cuda_counts. */
static void moe__cuda_tally(moe__cuda *cuda, int64_t *number) {
  MOE__CUDA_LOCK(&cuda->mutex);
  ++*number;
  MOE__CUDA_UNLOCK(&cuda->mutex);
}

/* The error with which the GPU was lost, so that no later call can succeed, or 0; error: a new one,
   or 0. */
static int moe__cuda_lost(moe__cuda *cuda, int error) {
  int lost =
      error == 4 || error == 201 || error == 214 || (error >= 700 && error <= 720) || error == 999;
  MOE__CUDA_LOCK(&cuda->mutex);
  if (lost && !cuda->lost) cuda->lost = error;
  lost = cuda->lost;
  MOE__CUDA_UNLOCK(&cuda->mutex);
  return lost;
}

/* Notes the result of a call of the driver; returns the status of the queue. */
static moe_status moe__cuda_note(moe__cuda_queue *q, const char *what, int error) {
  if (!error) return q->status;
  moe__cuda_lost(q->cuda, error);
  if (!q->status)
    q->status =
        moe__cuda_driver_fail(&q->cuda->driver, &q->env, q->cuda->options.device, what, error);
  return q->status;
}

/* Calls the driver, unless the queue has failed. Arguments that are memory of the card: its address
   as the driver has it. */
#define MOE__CUDA_DO(q, name, arguments)                                                           \
  moe__cuda_note(q, #name, (q)->status ? 0 : (q)->cuda->driver.name arguments)
static moe__cuptr moe__cuda_at(const void *p) { return (moe__cuptr)(uintptr_t)p; }

/* Waits for all work of the queue; its staging buffer is then free. */
static moe_status moe__cuda_wait(moe__cuda_queue *q) {
  q->staging_used = 0;
  return MOE__CUDA_DO(q, cuStreamSynchronize, (q->stream));
}

/* A block of scratch, or NULL. */
static moe__cuda_block *moe__cuda_take(moe__cuda_queue *q, size_t bytes) {
  moe__cuda_block *block = &q->scratch[q->scratch_blocks];
  if (q->scratch_blocks == sizeof q->scratch / sizeof *q->scratch)
    moe__cuda_note(q, "too many blocks of scratch", 2);
  if (MOE__CUDA_DO(q, cuMemAlloc_v2, (&block->p, bytes))) return NULL;
  block->bytes = bytes, block->used = 0;
  ++q->scratch_blocks;
  return block;
}

static void moe__cuda_scratch_free(moe__cuda_queue *q) {
  while (q->scratch_blocks) q->cuda->driver.cuMemFree_v2(q->scratch[--q->scratch_blocks].p);
}

/* Work that was queued may still use the scratch, but what comes next is queued behind it. Several
   blocks are joined into one, so that a queue soon has a single one that is large enough. */
static void moe__cuda_scratch_reset(moe__cuda_queue *q) {
  size_t total = 0;
  int i;
  for (i = 0; i < q->scratch_blocks; ++i) total += q->scratch[i].bytes, q->scratch[i].used = 0;
  if (q->scratch_blocks < 2 || moe__cuda_wait(q)) return;
  moe__cuda_scratch_free(q);
  moe__cuda_take(q, total);
}

/* Memory of the card until the slot returns (kernels launched so far may still use it), aligned to
   256 bytes. 0 bytes: a valid pointer all the same. NULL: the queue has failed. */
static void *moe__cuda_scratch(moe__cuda_queue *q, size_t bytes) {
  size_t need = (bytes / MOE__CUDA_ALIGN + 1) * MOE__CUDA_ALIGN;
  moe__cuda_block *block = q->scratch_blocks ? &q->scratch[q->scratch_blocks - 1] : NULL;
  if (!block || block->bytes - block->used < need)
    block = moe__cuda_take(q, need > MOE__CUDA_SCRATCH ? need : (size_t)MOE__CUDA_SCRATCH);
  if (!block) return NULL;
  block->used += need;
  return (void *)(uintptr_t)(block->p + block->used - need);
}

/* Copies to the card, by way of pinned memory where there is some and it is large enough; `host`
   may change afterwards. */
static moe_status moe__cuda_send(moe__cuda_queue *q, void *to, const void *host, size_t bytes) {
  size_t room = (bytes + 63) / 64 * 64; /* the size of the buffer is a multiple, too */
  void *made = NULL;
  int stage = bytes <= MOE__CUDA_STAGING;
  if (!bytes || q->status) return q->status;
  if (stage && !q->staging && !q->cuda->driver.cuMemAllocHost_v2(&made, MOE__CUDA_STAGING))
    q->staging = (char *)made;
  if (!q->staging) stage = 0;
  if (stage && MOE__CUDA_STAGING - q->staging_used < bytes) moe__cuda_wait(q);
  if (stage) host = memcpy(q->staging + q->staging_used, host, bytes), q->staging_used += room;
  MOE__CUDA_DO(q, cuMemcpyHtoDAsync_v2, (moe__cuda_at(to), host, bytes, q->stream));
  return stage ? q->status : moe__cuda_wait(q);
}

/* Copies an array of the host to scratch. */
static void *moe__cuda_upload_args(moe__cuda_queue *q, const void *host, size_t bytes) {
  void *to = moe__cuda_scratch(q, bytes);
  moe__cuda_send(q, to, host, bytes);
  return to;
}

/* Copies from the card and waits. `host` receives all or nothing, so that a failure leaves what is
   there whole. */
static moe_status moe__cuda_receive(moe__cuda_queue *q, void *host, const void *from,
                                    size_t bytes) {
  void *copy = malloc(bytes + 1);
  if (!copy)
    return moe__cuda_fail(&q->env, MOE_E_MEMORY,
                          "cuda:%d: the host has no memory for a download of %llu bytes",
                          (int)q->cuda->options.device, (unsigned long long)bytes);
  if (!moe__cuda_wait(q) && bytes)
    MOE__CUDA_DO(q, cuMemcpyDtoH_v2, (copy, moe__cuda_at(from), bytes));
  if (!q->status) memcpy(host, copy, bytes);
  free(copy);
  return q->status;
}

/* Zeros, in order with the kernels. */
static moe_status moe__cuda_zero(moe__cuda_queue *q, void *p, size_t bytes) {
  if (!bytes) return q->status;
  return MOE__CUDA_DO(q, cuMemsetD8Async, (moe__cuda_at(p), 0, bytes, q->stream));
}

/* Launches kernel MOE__K_name; gx up to 2^31 - 1, gy up to 65,535; args point to the arguments. gx
   or gy 0: nothing to do. */
static moe_status moe__cuda_launch(moe__cuda_queue *q, int kernel, uint32_t gx, uint32_t gy,
                                   uint32_t threads, void **args) {
  moe__cuda *cuda = q->cuda;
  if (q->status || !gx || !gy) return q->status;
  moe__cuda_tally(cuda, &cuda->counts.launches);
  return moe__cuda_note(q, moe__cuda_kernel_list[kernel].name,
                        cuda->driver.cuLaunchKernel(cuda->kernel[kernel], gx, gy, 1, threads, 1, 1,
                                                    0, q->stream, args, NULL));
}

/* One with a struct as its argument. */
static moe_status moe__cuda_run(moe__cuda_queue *q, int kernel, uint32_t gx, uint32_t gy,
                                uint32_t threads, void *args) {
  return moe__cuda_launch(q, kernel, gx, gy, threads, &args);
}

/* Blocks of `each` for n items; 0 for none. */
static uint32_t moe__cuda_blocks(size_t n, size_t each) {
  return (uint32_t)((n + each - 1) / each);
}

/* Threshold and scale of dropout, as moe.h has them. */
static unsigned moe__cuda_drop(float *scale, float p, const void *keys) {
  *scale = 1.0f;
  if (!keys || !(p > 0)) return 0;
  *scale = 1.0f / (1.0f - p);
  return (unsigned)((double)p * 4294967296.0);
}

/* The sizes and the dropout of an op of rows. */
static moe_status moe__cuda_rows_check(const char *op, int32_t S, int32_t M, int32_t H,
                                       float dropout, const moe_env *env) {
  if (S < 0 || M < 0 || H < 0)
    return moe__cuda_fail(env, MOE_E_ARGUMENT, "%s: S is %d, M is %d, H is %d, expected 0 or more",
                          op, (int)S, (int)M, (int)H);
  if (!(dropout >= 0 && dropout < 1))
    return moe__cuda_fail(env, MOE_E_ARGUMENT, "%s: dropout is %g, expected 0 to below 1", op,
                          (double)dropout);
  return MOE_OK;
}

/* Unlocks a queue. A failure of a context's queue stays; the backend's own queue goes on unless the
   GPU is lost. */
static void moe__cuda_leave(moe__cuda_queue *q) {
  if (q == q->cuda->own && !moe__cuda_lost(q->cuda, 0)) q->status = MOE_OK;
  MOE__CUDA_UNLOCK(&q->mutex);
}

/* Begins a call of moe.h: locks the queue and makes the context current. Where it fails, nothing is
   to be ended. A call that waits says again that the queue has failed. */
static moe_status moe__cuda_begin(moe__cuda_queue *q, const moe_env *env, int waits) {
  moe_status status;
  MOE__CUDA_LOCK(&q->mutex);
  q->env = *env;
  if (q->status && waits)
    moe__cuda_fail(env, q->status,
                   "cuda:%d: an earlier call of this context failed: it can only be freed",
                   (int)q->cuda->options.device);
  moe__cuda_note(q, "a call after the GPU was lost", moe__cuda_lost(q->cuda, 0));
  status = MOE__CUDA_DO(q, cuCtxPushCurrent_v2, (q->cuda->context));
  if (status) moe__cuda_leave(q);
  return status;
}

/* Ends it, with the status of the queue or, where that is good, of the call. */
static moe_status moe__cuda_end(moe__cuda_queue *q, moe_status status) {
  void *context = NULL;
  q->cuda->driver.cuCtxPopCurrent_v2(&context);
  if (q->status) status = q->status;
  moe__cuda_leave(q);
  return status;
}

/* A slot: what it does with the queue q, when the context is current and the scratch empty. */
#define MOE__CUDA_SLOT(name, waits, parameters, call)                                              \
  static moe_status moe__cuda_slot_##name parameters {                                             \
    moe__cuda_queue *q = moe__cuda_queue_of(b, env);                                               \
    moe_status status = moe__cuda_begin(q, env, waits);                                            \
    if (status) return status;                                                                     \
    moe__cuda_scratch_reset(q);                                                                    \
    return moe__cuda_end(q, call);                                                                 \
  }
// clang-format off
MOE__CUDA_SLOT(upload, 0, (const moe_backend *b, const moe_env *env, void *to, const void *host,
                           size_t bytes), moe__cuda_send(q, to, host, bytes))
MOE__CUDA_SLOT(download, 1, (const moe_backend *b, const moe_env *env, void *host,
                             const void *from, size_t bytes),
               moe__cuda_receive(q, host, from, bytes))
MOE__CUDA_SLOT(clear, 0, (const moe_backend *b, const moe_env *env, void *p, size_t bytes),
               moe__cuda_zero(q, p, bytes))
MOE__CUDA_SLOT(sync, 1, (const moe_backend *b, const moe_env *env), moe__cuda_wait(q))
// clang-format on

static moe_status moe__cuda_alloc(const moe_backend *b, const moe_env *env, void **out,
                                  size_t bytes) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe__cuda *cuda = q->cuda;
  moe__cuda_block *block;
  size_t left = 0, total = 0;
  int error;
  moe_status status = moe__cuda_begin(q, env, 1);
  if (status) return status;
  block = (moe__cuda_block *)calloc(1, sizeof *block);
  error = block ? cuda->driver.cuMemAlloc_v2(&block->p, bytes ? bytes : 1) : 2;
  if (!error) {
    *out = (void *)(uintptr_t)block->p;
    block->bytes = bytes;
    MOE__CUDA_LOCK(&cuda->mutex);
    block->next = cuda->blocks;
    cuda->blocks = block;
    ++cuda->counts.allocations, cuda->counts.bytes += (int64_t)bytes;
    MOE__CUDA_UNLOCK(&cuda->mutex);
    return moe__cuda_end(q, MOE_OK);
  }
  free(block);
  if (error != 2) return moe__cuda_end(q, moe__cuda_note(q, "cuMemAlloc_v2", error));
  if (cuda->driver.cuMemGetInfo_v2(&left, &total)) left = total = 0;
  status = moe__cuda_fail(env, MOE_E_MEMORY,
                          "cuda:%d: no memory for %llu bytes, %llu of %llu are free: use smaller "
                          "micro-batches or a smaller model",
                          (int)cuda->options.device, (unsigned long long)bytes,
                          (unsigned long long)left, (unsigned long long)total);
  return moe__cuda_end(q, status);
}

static void moe__cuda_release(const moe_backend *b, void *p) {
  moe__cuda *cuda = (moe__cuda *)b->user;
  moe__cuda_block **at, *block;
  void *context = NULL;
  MOE__CUDA_LOCK(&cuda->mutex);
  for (at = &cuda->blocks; *at && (*at)->p != moe__cuda_at(p);) at = &(*at)->next;
  block = *at;
  if (block) {
    *at = block->next;
    --cuda->counts.allocations, cuda->counts.bytes -= (int64_t)block->bytes;
  }
  MOE__CUDA_UNLOCK(&cuda->mutex);
  if (!block) return;                                     /* NULL, or released before */
  if (!cuda->driver.cuCtxPushCurrent_v2(cuda->context)) { /* else lost with the context */
    cuda->driver.cuMemFree_v2(block->p);                  /* waits for the work that uses it */
    cuda->driver.cuCtxPopCurrent_v2(&context);
  }
  free(block);
}

static moe_status moe__cuda_blas_open(moe__cuda_queue *q); /* >>cuda_products */

/* Where the context cannot be made current, it takes along what is in it. */
static void moe__cuda_close_queue(const moe_backend *b, void *stream) {
  moe__cuda_queue **at, *q = (moe__cuda_queue *)stream;
  moe__cuda *cuda = q->cuda;
  void *context = NULL;
  (void)b;
  MOE__CUDA_LOCK(&cuda->mutex);
  for (at = &cuda->queues; *at && *at != q;) at = &(*at)->next;
  if (*at) *at = q->next, --cuda->counts.queues;
  MOE__CUDA_UNLOCK(&cuda->mutex);
  if (!cuda->driver.cuCtxPushCurrent_v2(cuda->context)) {
    if (q->stream) cuda->driver.cuStreamSynchronize(q->stream); /* what it uses is free then */
    if (q->blas) cuda->cublas.cublasDestroy_v2(q->blas);
    moe__cuda_scratch_free(q);
    if (q->staging) cuda->driver.cuMemFreeHost(q->staging);
    if (q->owns_stream) cuda->driver.cuStreamDestroy_v2(q->stream);
    cuda->driver.cuCtxPopCurrent_v2(&context);
  }
  MOE__CUDA_MUTEX_FREE(&q->mutex);
  free(q);
}

/* A queue on a stream of its own, or the caller's. */
static moe_status moe__cuda_open_queue(const moe_backend *b, const moe_env *env, void **stream) {
  moe__cuda *cuda = (moe__cuda *)b->user;
  moe__cuda_queue *q = (moe__cuda_queue *)calloc(1, sizeof *q);
  moe_status status;
  if (!q) return moe__cuda_fail(env, MOE_E_MEMORY, "cuda: no memory for a queue");
  MOE__CUDA_MUTEX_INIT(&q->mutex);
  q->cuda = cuda;
  q->force = -1;
  q->stream = cuda->options.stream;
  status = moe__cuda_begin(q, env, 1);
  if (!status) {
    q->owns_stream = !q->stream; /* 1: it is not ordered with the legacy stream */
    if (q->owns_stream && MOE__CUDA_DO(q, cuStreamCreate, (&q->stream, 1)))
      q->owns_stream = 0, q->stream = NULL;
    status = moe__cuda_end(q, q->status ? q->status : moe__cuda_blas_open(q));
  }
  if (status) {
    moe__cuda_close_queue(b, q);
    return status;
  }
  MOE__CUDA_LOCK(&cuda->mutex);
  q->next = cuda->queues;
  cuda->queues = q;
  ++cuda->counts.queues;
  MOE__CUDA_UNLOCK(&cuda->mutex);
  *stream = q;
  return MOE_OK;
}

/* ---- device code that all kernels share ---- >>cuda_base */

/* What plain CUDA C does not have, as PTX. The emulator of tests/cuda brings its own: it defines
   MOE__CUDA_PRIMITIVES. */
#ifndef MOE__CUDA_PRIMITIVES
MOE__CUDA_SOURCE(
    prim, 0,
    /* A float as TF32, rounded to nearest; a pair of floats as bf16, the first in the low half. */
    __device__ static inline unsigned moe__d_tf32(float x) {
      unsigned r;
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
      return r;
    } __device__ static inline unsigned moe__d_bf16x2(float low, float high) {
      unsigned r;
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
      return r;
    }
    /* c (16, 8) += a (16, 8) b (8, 8) of a warp, with the registers of mma.m16n8k8. */
    __device__ static inline void moe__d_mma_tf32(float *c, const unsigned *a, const unsigned *b) {
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    /* c (16, 8) += a (16, 16) b (16, 8) of a warp, with the registers of mma.m16n8k16. */
    __device__ static inline void moe__d_mma_bf16(float *c, const unsigned *a, const unsigned *b) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    /* Copies 16 or 4 bytes to shared memory in the background: `bytes` of them, then zeros. */
    __device__ static inline void moe__d_copy16(float *to, const float *from, int bytes) {
      unsigned at = (unsigned)__cvta_generic_to_shared(to);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                   :
                   : "r"(at), "l"(from), "r"(bytes)
                   : "memory");
    } __device__ static inline void moe__d_copy4(float *to, const float *from, int bytes) {
      unsigned at = (unsigned)__cvta_generic_to_shared(to);
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                   :
                   : "r"(at), "l"(from), "r"(bytes)
                   : "memory");
    }
    /* Closes a group of copies; waits for all groups but the last one. */
    __device__ static inline void moe__d_copy_commit(void) {
      asm volatile("cp.async.commit_group;" ::: "memory");
    } __device__ static inline void moe__d_copy_wait1(void) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    })
#endif

MOE__CUDA_SOURCE(
    wide, 0, typedef struct __align__(8) moe__d_float2 { float v[2]; } moe__d_float2;
    typedef struct __align__(16) moe__d_float4 { float v[4]; } moe__d_float4;

    /* v = p[0 .. 3], with zeros from p[count] on. wide: p is aligned to 16 bytes and count is above
       3 or below 1. */
    __device__ static inline moe__d_float4 moe__d_load4(const float *p, int count, int wide) {
      moe__d_float4 x = {{0.0f, 0.0f, 0.0f, 0.0f}};
      if (wide) {
        if (count > 0) x = *(const moe__d_float4 *)(const void *)p;
        return x;
      }
      MOE_UNROLL for (int i = 0; i < 4; ++i) if (i < count) x.v[i] = p[i];
      return x;
    }

    /* moe.h's moe__bf16_round: to nearest, ties to even, denormals become zero. */
    __device__ static inline float moe__d_bf16(float x) {
      unsigned u = __float_as_uint(x);
      if ((u & 0x7fffffffu) > 0x7f800000u)
        u |= 0x00400000u;
      else if (!(u & 0x7f800000u))
        u &= 0x80000000u;
      else
        u += 0x7fffu + (u >> 16 & 1u);
      return __uint_as_float(u & 0xffff0000u);
    }

    /* moe.h's moe__geluf: GELU(x) and its slope by the upper tail of the normal distribution. */
    __device__ static inline float moe__d_gelu(float x, float *slope) {
      float t = 12.0f < fabsf(x) ? 12.0f : fabsf(x), e = exp2f(-0.721347511f * t * t), r, lower;
      r = fmaf(fmaf(-3.245913263e-07f, t, 7.894786904e-06f), t, -8.640217857e-05f);
      r = fmaf(fmaf(r, t, 5.716482410e-04f), t, -2.614206634e-03f);
      r = fmaf(fmaf(r, t, 9.050293826e-03f), t, -2.552919649e-02f);
      r = fmaf(fmaf(r, t, 6.196843088e-02f), t, -1.328263581e-01f);
      r = fmaf(fmaf(r, t, 2.499777079e-01f), t, -3.989411592e-01f);
      r = fmaf(r, t, 0.5f);
      lower = e * fmaf(-t, 0.398942292f, r);
      *slope = x < 0.0f ? lower : 1.0f - lower;
      return fmaf(-t, e * r, 0.0f > x ? 0.0f : x);
    })

MOE__CUDA_SOURCE(
    sums, 0,
    /* The CPU's random bits (>>random in moe.h). */
    __device__ static inline unsigned moe__d_hash32(unsigned long long key, unsigned position) {
      unsigned x = position * 0x9e3779b1u + (unsigned)key;
      x = (x ^ x >> 16) * 0x85ebca6bu;
      x ^= (unsigned)(key >> 32);
      x = (x ^ x >> 13) * 0xc2b2ae35u;
      return x ^ x >> 16;
    }

    /* The 16 threads of a row are a half of a warp. */
    __device__ static inline unsigned moe__d_half(void) { return 0xffffu << (threadIdx.x & 16u); }

    __device__ static inline float moe__d_exp(float x) { return exp2f(1.44269502f * x); }

    /* Sum of a row's threads, as a butterfly. */
    __device__ static inline float moe__d_sum16(float v) {
      for (int o = 8; o > 0; o >>= 1) v += __shfl_xor_sync(moe__d_half(), v, o);
      return v;
    }

    /* For each of 32 columns, the sum of the 8 warps of a block, in their order. */
    __device__ static inline float moe__d_sum8(float v) {
      __shared__ float part[8][32];
      MOE_SYNC();
      part[threadIdx.x >> 5][threadIdx.x & 31u] = v;
      MOE_SYNC();
      v = 0.0f;
      for (int i = 0; i < 8; ++i) v += part[i][threadIdx.x & 31u];
      return v;
    }

    /* The last i < n with at[i * stride] <= x, or 0. Of seq_start: the sequence that holds x. */
    __device__ static inline int moe__d_last(const int *at, int stride, int n, int x) {
      int low = 0;
      for (int half = n / 2; n > 1; n -= half, half = n / 2)
        if (at[(size_t)(low + half) * (size_t)stride] <= x) low += half;
      return low;
    }

    /* v after dropout, at a position of a key. */
    __device__ static inline float moe__d_drop(float v, unsigned threshold, float scale,
                                               unsigned long long key, size_t position) {
      return moe__d_hash32(key, (unsigned)position) < threshold ? 0.0f : v * scale;
    })

/* ---- linear layers; cuBLAS, the choice of the maker ---- >>cuda_products */

MOE__CUDA_SHARED(
    product,
    /* Forms of a product: NT y = a w^T, NN y = a w, TN dw += a^T b. */
    enum {MOE__CUDA_NT, MOE__CUDA_NN, MOE__CUDA_TN};

    /* Weights w and bias of a linear layer or of one expert, and their gradients; NULL: none. */
    typedef struct moe__cuda_group {
      const float *w, *bias;
      float *dw, *db;
    } moe__cuda_group;

    /* A product of rows and weights, of one group or of many. Rows are sorted by group. */
    typedef struct moe__cuda_product {
      const float *a;     /* rows (., k), or (., m) for the gradient of weights */
      const float *b;     /* rows (., n), for the gradient of weights; NULL: db alone, n 1 */
      const int *a_order; /* row r of a group is a's row a_order[r] / top_k; NULL: r */
      const int *b_order;
      const int *start;             /* (groups + 1) rows of each group; NULL: `one` has all rows */
      const moe__cuda_group *group; /* (groups), with start */
      moe__cuda_group one;
      const int *order;    /* slot of a row; its token is slot / top_k. NULL: the row */
      const float *weight; /* of a slot; NULL: 1 */
      const float *pre;    /* (rows, n) input of GELU, on the way back through it */
      float *y;            /* (rows, n) */
      float *act;          /* (rows, n) */
      float *out;          /* (tokens, n) */
      float *part;         /* (pieces, groups, m n + m) where the rows are cut in pieces */
      int *place;          /* of experts: row of a slot */
      int rows, groups, top_k, m, n, k;
      int accumulate; /* out: 1 adds */
      int round;      /* f32 kernels: 1 rounds the operands to bf16 */
      int wide_a;     /* 1: rows of a, of b or w begin at multiples of 16 bytes */
      int wide_b, pieces;
    } moe__cuda_product;)

MOE__CUDA_SOURCE(
    tile, 0,
    /* Rows of an operand: `width` floats each, [0, end). */
    typedef struct moe__d_rows {
      const float *at;
      const int *order;
      int top_k, end, width, wide;
    } moe__d_rows;

    /* Where a block works: rows [i, i_end) and columns from j on of the output of group e, sums
       over [k, k_end) of a and b. line: the thread's rows where they run along k, two of a and one
       of b. */
    typedef struct moe__d_tile {
      moe__cuda_group group;
      int e, i, i_end, j, k, k_end;
      moe__d_rows a, b;
      const float *line[3];
    } moe__d_tile;

    /* Row r; NULL beyond the end. */
    __device__ static inline const float *moe__d_row(const moe__d_rows *x, int r) {
      int row = r;
      if (r >= x->end) return (const float *)0;
      if (x->order) row = x->top_k > 1 ? x->order[r] / x->top_k : x->order[r]; /* it is slow */
      return x->at + (size_t)row * (size_t)x->width;
    }

    /* Tiles of 128 rows, group by group, without a list: the tiles of group e begin with number
       start[e] / 128 + e. A few numbers stay unused: 0. */
    __device__ static inline int moe__d_tile_rows(const moe__cuda_product *p, moe__d_tile *t) {
      int tile = (int)blockIdx.x, high = p->groups - 1;
      t->j = (int)blockIdx.y * 64;
      t->k_end = p->k;
      t->i = tile * 128;
      t->i_end = p->rows;
      if (p->start) {
        while (t->e < high) {
          int middle = (t->e + high + 1) / 2;
          if (p->start[middle] / 128 + middle <= tile)
            t->e = middle;
          else
            high = middle - 1;
        }
        t->i = p->start[t->e] + (tile - p->start[t->e] / 128 - t->e) * 128;
        t->i_end = p->start[t->e + 1];
      }
      return t->i < t->i_end;
    }

    /* For the gradient of weights: group and piece from blockIdx.y, tile from blockIdx.x. */
    __device__ static inline int moe__d_tile_weights(const moe__cuda_product *p, moe__d_tile *t) {
      int across = (p->n + 63) / 64, first = 0, last = p->rows, each;
      t->e = (int)blockIdx.y / p->pieces;
      if (p->start) first = p->start[t->e], last = p->start[t->e + 1];
      t->i = (int)blockIdx.x / across * 128;
      t->i_end = p->m;
      t->j = (int)blockIdx.x % across * 64;
      each = ((last - first + p->pieces - 1) / p->pieces + 15) / 16 * 16;
      t->k = first + (int)blockIdx.y % p->pieces * each;
      t->k_end = t->k + each < last ? t->k + each : last;
      return last > first;
    }

    /* Finds the work of a block; 0: there is none. */
    template <int form>
    __device__ static inline int moe__d_find(const moe__cuda_product *p, moe__d_tile *t) {
      int row = (int)threadIdx.x >> 1, work;
      t->e = t->k = 0;
      work = form == MOE__CUDA_TN ? moe__d_tile_weights(p, t) : moe__d_tile_rows(p, t);
      t->group = p->start ? p->group[t->e] : p->one;
      t->a = {p->a, p->a_order, p->top_k, t->i_end, p->k, p->wide_a};
      t->b = {t->group.w, (const int *)0, 1, p->n, p->k, p->wide_b};
      if (form == MOE__CUDA_NN) t->b.end = p->k, t->b.width = p->n;
      if (form == MOE__CUDA_TN) {
        t->a.end = t->k_end, t->a.width = p->m;
        t->b = {p->b ? p->b : p->a, p->b_order, p->top_k, t->k_end, p->n, p->wide_b};
        if (p->part) {
          size_t piece = blockIdx.y % (unsigned)p->pieces * (size_t)p->groups + (size_t)t->e;
          float *part = p->part + piece * (size_t)p->m * (size_t)(p->n + 1);
          if (t->group.dw) t->group.dw = part;
          if (t->group.db) t->group.db = part + (size_t)p->m * (size_t)p->n;
        }
      } else {
        t->line[0] = moe__d_row(&t->a, t->i + row);
        t->line[1] = moe__d_row(&t->a, t->i + 64 + row);
      }
      if (form == MOE__CUDA_NT) t->line[2] = moe__d_row(&t->b, t->j + row);
      return work;
    })

MOE__CUDA_SOURCE(
    load, 0,
    /* Shared memory of a step: 16 k of 128 rows of the output, then of 64 columns. Operands whose
       rows run along k have two planes (R, 8), the others are (16, R). Column c of row r is at c ^
       moe__d_turn, so that the rows of one load do not meet in a bank. */
    __device__ static inline int moe__d_turn(int across, int r) {
      return across ? (r >> 1 & 3) << 3 : r & 4;
    }

    /* Brings a side (R 128 or 64, from row or column `first` on) of the step from k on, zeros
       beyond its ends. kind 0: through registers, x, loaded before the present step and stored
       after it (`store` 1). Else by cp.async, in the background. */
    template <int kind, int across, int R>
    __device__ static inline void moe__d_load_side(float *s, moe__d_float4 *x, int store, int round,
                                                   const moe__d_rows *from,
                                                   const float *const *line, int first, int k) {
      MOE_UNROLL for (int i = 0; i < R / 32; ++i) {
        int at = (int)threadIdx.x + i * 128, c = across ? at % (R / 4) * 4 : (at & 1) * 4;
        int row = across ? at / (R / 4) : i % (R / 64) * 64 + ((int)threadIdx.x >> 1);
        int plane = across ? 0 : i / (R / 64), column = across ? first + c : k + plane * 8 + c;
        float *to = s + (across ? row * R : (plane * R + row) * 8) + (c ^ moe__d_turn(across, row));
        if (store) {
          MOE_UNROLL for (int j = 0; j < 4 && round; ++j) x[i].v[j] = moe__d_bf16(x[i].v[j]);
          *(moe__d_float4 *)(void *)to = x[i];
        } else {
          const float *p = across ? moe__d_row(from, k + row) : line[i % (R / 64)];
          int count = p ? from->width - column : 0;
          p = p ? p + column : from->at;
          if (!kind)
            x[i] = moe__d_load4(p, count, from->wide);
          else if (from->wide)
            moe__d_copy16(to, count > 0 ? p : from->at, count > 0 ? 16 : 0);
          else
            MOE_UNROLL for (int j = 0; j < 4; ++j)
                moe__d_copy4(to + j, j < count ? p + j : from->at, j < count ? 4 : 0);
        }
      }
    }

    template <int form, int kind>
    __device__ static inline void moe__d_load(const moe__cuda_product *p, const moe__d_tile *t,
                                              float *s, int k, moe__d_float4 *x, int store) {
      if (k < t->k_end) {
        moe__d_load_side<kind, form == MOE__CUDA_TN, 128>(s, x, store, p->round, &t->a, t->line,
                                                          t->i, k);
        moe__d_load_side<kind, form != MOE__CUDA_NT, 64>(s + 2048, x + 4, store, p->round, &t->b,
                                                         t->line + 2, t->j, k);
      }
      if (kind) moe__d_copy_commit();
    })

MOE__CUDA_SOURCE(
    step, 0,
    /* Element (i, j) of the 8 rows and 8 columns that a thread sums up: what mma.m16n8 wants. */
    __device__ static inline int moe__d_element(int i, int j) {
      return ((i >> 1) * 4 + (j >> 1)) * 4 + (i & 1) * 2 + (j & 1);
    }

    /* Row (R 128) or column (R 64) of the tile that is the thread's number i. */
    __device__ static inline int moe__d_place(int kind, int across, int R, int i) {
      int tid = (int)threadIdx.x, t = R == 128 ? tid >> 3 : tid & 7;
      if (kind && R == 128) return (tid & 32) * 2 + (tid >> 2 & 7) + (i & 1) * 8 + (i >> 1) * 16;
      if (kind) return (tid >> 6) * 32 + (tid & 3) * 2 + (i & 1) + (i >> 1) * 8;
      return across ? t * 4 + (i & 3) + (i >> 2) * (R / 2) : t + i * (R / 8);
    }

    /* K k's of a side, for FMAs: x[i] has 4 for number i or, across, x[2 e + h] has numbers 4 h to
       4 h + 3 of k + e. */
    template <int across, int R, int K>
    __device__ static inline void moe__d_take4(moe__d_float4 *x, const float *s, int k) {
      MOE_UNROLL for (int i = 0; i < (across ? 2 * K : 8); ++i) {
        int e = k + (i >> 1), row = moe__d_place(0, across, R, across ? (i & 1) * 4 : i);
        int at = across ? e * R + (row ^ moe__d_turn(1, e))
                        : ((k >> 3) * R + row) * 8 + ((k & 4) ^ moe__d_turn(0, row));
        x[i] = *(const moe__d_float4 *)(const void *)(s + at);
      }
    }

    /* sum += 16 k's, with FMAs. */
    template <int form>
    __device__ static inline void moe__d_step_f32(float *sum, const float *s) {
      enum { K = form == MOE__CUDA_TN ? 2 : 4 };
      MOE_ROLL for (int k = 0; k < 16; k += K) {
        moe__d_float4 a[8], b[8];
        moe__d_take4<form == MOE__CUDA_TN, 128, K>(a, s, k);
        moe__d_take4<form != MOE__CUDA_NT, 64, K>(b, s + 2048, k);
        MOE_UNROLL for (int n = 0; n < 64 * K; ++n) {
          int e = n >> 6, i = n >> 3 & 7, j = n & 7, at = moe__d_element(i, j);
          float x = form == MOE__CUDA_TN ? a[2 * e + (i >> 2)].v[i & 3] : a[i].v[e];
          float y = form != MOE__CUDA_NT ? b[2 * e + (j >> 2)].v[j & 3] : b[j].v[e];
          sum[at] = fmaf(x, y, sum[at]);
        }
      }
    }

    /* Elements 2 q and 2 q + 1 of plane h of row (column) i of a side: the k's that a lane feeds.
       The sum over k may take them in any order, if both sides do the same. */
    template <int across, int R>
    __device__ static inline moe__d_float2 moe__d_take2(const float *s, int h, int i, int q) {
      moe__d_float2 x;
      if (!across)
        return *(const moe__d_float2 *)(const void *)(s + (h * R + i) * 8 +
                                                      (q * 2 ^ moe__d_turn(0, i)));
      x.v[0] = s[(h * 8 + q * 2) * R + (i ^ moe__d_turn(1, q * 2))];
      x.v[1] = s[(h * 8 + q * 2 + 1) * R + (i ^ moe__d_turn(1, q * 2))];
      return x;
    })

MOE__CUDA_SOURCE(
    step_mma, 0,
    /* sum += 16 k's of a warp (64, 32) on tensor cores: 4 tiles of 16 rows from row `wm`, 4 of 8
       columns from column `wn` on. In TF32 these are two products of 8 k's. */
    template <int form, int bf16>
    __device__ static inline void moe__d_step_mma(float *sum, const float *s) {
      int tid = (int)threadIdx.x, g = tid >> 2 & 7, q = tid & 3, wm = (tid & 32) * 2,
          wn = (tid >> 6) * 32;
      unsigned a[8], b[4][4];
      MOE_UNROLL for (int j = 0; j < 4; ++j) MOE_UNROLL for (int h = 0; h < 2; ++h) {
        moe__d_float2 x = moe__d_take2<form != MOE__CUDA_NT, 64>(s + 2048, h, wn + j * 8 + g, q);
        b[j][bf16 ? h : 2 * h] = bf16 ? moe__d_bf16x2(x.v[0], x.v[1]) : moe__d_tf32(x.v[0]);
        if (!bf16) b[j][2 * h + 1] = moe__d_tf32(x.v[1]);
      }
      MOE_UNROLL for (int i = 0; i < 4; ++i) {
        MOE_UNROLL for (int n = 0; n < 4; ++n) {
          int h = n >> 1, r = n & 1;
          moe__d_float2 x =
              moe__d_take2<form == MOE__CUDA_TN, 128>(s, h, wm + i * 16 + r * 8 + g, q);
          a[bf16 ? n : 4 * h + r] = bf16 ? moe__d_bf16x2(x.v[0], x.v[1]) : moe__d_tf32(x.v[0]);
          if (!bf16) a[4 * h + 2 + r] = moe__d_tf32(x.v[1]);
        }
        MOE_UNROLL for (int j = 0; j < 4; ++j) {
          float *c = sum + (i * 4 + j) * 4;
          if (bf16) {
            moe__d_mma_bf16(c, a, b[j]);
          } else {
            moe__d_mma_tf32(c, a, b[j]);
            moe__d_mma_tf32(c, a + 4, b[j] + 2);
          }
        }
      }
    })

MOE__CUDA_SOURCE(
    finish, 0,
    /* Element `at` of the rows, `to` of the tokens, from the sum v of column j. Forward: y = v +
       bias, act = GELU(y), out = weight y. Back through GELU: y = weight v GELU'(pre), act = weight
       GELU(pre). */
    __device__ static inline void moe__d_finish(const moe__cuda_product *p, const moe__d_tile *t,
                                                size_t at, size_t to, float weight, int j,
                                                float v) {
      float slope;
      if (t->group.bias) v += t->group.bias[j];
      if (p->pre) {
        float act = moe__d_gelu(p->pre[at], &slope);
        v *= weight * slope;
        p->act[at] = weight * act;
      } else if (p->act)
        p->act[at] = moe__d_gelu(v, &slope);
      if (p->y) p->y[at] = v;
      if (p->out) p->out[to] = p->accumulate ? fmaf(weight, v, p->out[to]) : weight * v;
    }

    /* Writes a tile. */
    template <int form, int kind>
    __device__ static inline void moe__d_write(const moe__cuda_product *p, const moe__d_tile *t,
                                               const float *sum) {
      size_t n = (size_t)p->n;
      MOE_UNROLL for (int i = 0; i < 8; ++i) {
        int row = t->i + moe__d_place(kind, form == MOE__CUDA_TN, 128, i), slot = row;
        float weight = 1.0f;
        if (row >= t->i_end) continue;
        if (form != MOE__CUDA_TN && p->order) slot = p->order[row];
        if (form != MOE__CUDA_TN && p->weight) weight = p->weight[slot];
        MOE_UNROLL for (int j = 0; j < 8; ++j) {
          int column = t->j + moe__d_place(kind, form != MOE__CUDA_NT, 64, j);
          size_t at = (size_t)row * n + (size_t)column;
          float v = sum[moe__d_element(i, j)];
          if (column >= p->n) continue;
          if (form != MOE__CUDA_TN)
            moe__d_finish(p, t, at, (size_t)(slot / p->top_k) * n + (size_t)column, weight, column,
                          v);
          else if (t->group.dw)
            t->group.dw[at] = p->part ? v : t->group.dw[at] + v;
        }
      }
    })

MOE__CUDA_SOURCE(
    products, 0,
    /* Shared memory: AHEAD + 1 steps. Not in the template, where g++ would not see its section. */
    __device__ static inline float *moe__d_stages(int mma) {
      __shared__ __align__(16) float two[2 * 3072];
      __shared__ __align__(16) float three[3 * 3072];
      return mma ? three : two;
    }

    /* A tile (128, 64) of a form by 128 threads. kind 0: FMAs, a step ahead in registers; 1 TF32,
       2 bf16: mma, two steps ahead by cp.async. */
    template <int form, int kind>
    __device__ static inline void moe__d_product(const moe__cuda_product *p) {
      enum { AHEAD = kind ? 2 : 1 };
      float *s = moe__d_stages(kind);
      moe__d_tile t;
      moe__d_float4 x[6];
      float sum[64], db = 0.0f;
      int tid = (int)threadIdx.x, now = 0;
      if (!moe__d_find<form>(p, &t)) return;
      MOE_UNROLL for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
      MOE_UNROLL for (int i = 0; i < AHEAD; ++i) {
        moe__d_load<form, kind>(p, &t, s + 3072 * i, t.k + 16 * i, x, 0);
        if (!kind) moe__d_load<form, kind>(p, &t, s, t.k, x, 1);
      }
      for (int k = t.k; k < t.k_end; k += 16) {
        float *next = s + 3072 * (now ? now - 1 : (int)AHEAD);
        if (kind) moe__d_copy_wait1();
        MOE_SYNC();
        moe__d_load<form, kind>(p, &t, next, k + 16 * AHEAD, x, 0);
        if (kind)
          moe__d_step_mma<form, kind == 2>(sum, s + 3072 * now);
        else
          moe__d_step_f32<form>(sum, s + 3072 * now);
        if (form == MOE__CUDA_TN && t.j == 0 && t.group.db)
          for (int i = 0; i < 16 && k + i < t.k_end; ++i)
            db = fmaf(s[now * 3072 + i * 128 + (tid ^ moe__d_turn(1, i))],
                      p->weight ? p->weight[p->order ? p->order[k + i] : k + i] : 1.0f, db);
        if (!kind) moe__d_load<form, kind>(p, &t, next, k + 16, x, 1);
        now = now == AHEAD ? 0 : now + 1;
      }
      moe__d_write<form, kind>(p, &t, sum);
      if (form == MOE__CUDA_TN && t.j == 0 && t.group.db && t.i + tid < p->m)
        t.group.db[t.i + tid] = p->part ? db : t.group.db[t.i + tid] + db;
    }

    /* y = x w^T, dx = dy w, dw += dy^T x. */
    MOE_KERNEL(128, 3) moe_k_f32_nt(moe__cuda_product p) {
      moe__d_product<MOE__CUDA_NT, 0>(&p);
    } MOE_KERNEL(128, 3) moe_k_f32_nn(moe__cuda_product p) {
      moe__d_product<MOE__CUDA_NN, 0>(&p);
    } MOE_KERNEL(128, 3) moe_k_f32_tn(moe__cuda_product p) { moe__d_product<MOE__CUDA_TN, 0>(&p); })

MOE__CUDA_SOURCE(
    products_mma, 80,
    /* The same in TF32 and in bf16. */
    MOE_KERNEL(128) moe_k_tf32_nt(moe__cuda_product p) {
      moe__d_product<MOE__CUDA_NT, 1>(&p);
    } MOE_KERNEL(128) moe_k_tf32_nn(moe__cuda_product p) {
      moe__d_product<MOE__CUDA_NN, 1>(&p);
    } MOE_KERNEL(128) moe_k_tf32_tn(moe__cuda_product p) {
      moe__d_product<MOE__CUDA_TN, 1>(&p);
    } MOE_KERNEL(128, 3) moe_k_bf16_nt(moe__cuda_product p) {
      moe__d_product<MOE__CUDA_NT, 2>(&p);
    } MOE_KERNEL(128) moe_k_bf16_nn(moe__cuda_product p) {
      moe__d_product<MOE__CUDA_NN, 2>(&p);
    } MOE_KERNEL(128) moe_k_bf16_tn(moe__cuda_product p) { moe__d_product<MOE__CUDA_TN, 2>(&p); })

MOE__CUDA_SOURCE(
    pieces, 0,
    /* Gradients of weights whose rows were cut: dw (m, n) and db (m) += the pieces, in order. */
    MOE_KERNEL(256) moe_k_pieces(moe__cuda_product p) {
      size_t weights = (size_t)p.m * (size_t)p.n, floats = weights + (size_t)p.m,
             i = (size_t)blockIdx.x * 256 + threadIdx.x, e = blockIdx.y;
      moe__cuda_group group = p.start ? p.group[e] : p.one;
      float sum = 0.0f, *to = i >= weights ? group.db : group.dw;
      if (i >= floats || !to || (p.start && p.start[e] == p.start[e + 1])) return;
      for (int piece = 0; piece < p.pieces; ++piece)
        sum += p.part[((size_t)piece * (size_t)p.groups + e) * floats + i];
      to[i < weights ? i : i - weights] += sum;
    }

    /* Copies n floats as bf16: cuBLAS takes no others. */
    MOE_KERNEL(256) moe_k_to_bf16(unsigned short *to, const float *from, unsigned long long n) {
      unsigned long long i = (unsigned long long)blockIdx.x * 256 + threadIdx.x;
      if (i < n) to[i] = (unsigned short)(__float_as_uint(moe__d_bf16(from[i])) >> 16);
    }

    /* After cuBLAS: y += bias (n), act = GELU(y) of row blockIdx.x. y NULL: act holds it so far. */
    MOE_KERNEL(256) moe_k_bias(moe__cuda_product p) {
      int j = (int)(blockIdx.y * 256 + threadIdx.x);
      size_t at = (size_t)blockIdx.x * (size_t)p.n + (size_t)j;
      float slope, v;
      if (j >= p.n) return;
      v = (p.y ? p.y : p.act)[at] + (p.one.bias ? p.one.bias[j] : 0.0f);
      if (p.act) p.act[at] = moe__d_gelu(v, &slope);
      if (p.y) p.y[at] = v;
    })

/* 1: rows of `width` floats from p on begin at multiples of 16 bytes. */
static int moe__cuda_wide(const void *p, int32_t width) {
  return width % 4 == 0 && ((uintptr_t)p & 15) == 0;
}

/* Runs a product with our own kernels: on tensor cores in bf16 or, where it is asked for, in TF32;
   else with FMAs, whose operands are rounded to bf16 where the card has no units for it. All fields
   but round, wide_a, pieces and part are filled in; wide_b is that of the weights' addresses. */
static moe_status moe__cuda_product_run(moe__cuda_queue *q, int form, moe__cuda_product *p) {
  int bf16 = q->env.precision == MOE_TYPE_BF16, tensor = q->cuda->arch >= 80,
      tn = form == MOE__CUDA_TN, kernel = moe__cuda_tf32(q) ? MOE__K_tf32_nt : MOE__K_f32_nt;
  uint32_t columns = moe__cuda_blocks((size_t)p->n, 64), tiles, groups = (uint32_t)p->groups;
  size_t sums = (size_t)p->m * ((size_t)p->n + 1);
  if (tensor && bf16) kernel = MOE__K_bf16_nt;
  p->round = bf16 && !tensor;
  p->pieces = 1;
  p->wide_a = moe__cuda_wide(p->a, tn ? p->m : p->k);
  if (!tn) {
    p->wide_b = p->wide_b && (form == MOE__CUDA_NT ? p->k : p->n) % 4 == 0;
    tiles = (uint32_t)p->rows / 128 + groups;
    return moe__cuda_run(q, kernel + form, tiles, columns, 128, p);
  }
  p->wide_b = p->b && moe__cuda_wide(p->b, p->n);
  tiles = moe__cuda_blocks((size_t)p->m, 128) * columns;
  /* few tiles and long sums: up to 8 pieces, so that a large card has 256 blocks at most, with 256
     rows of an average group in each at least */
  while (p->pieces < 8 && tiles * groups * (uint32_t)(p->pieces + 1) <= 256 &&
         p->rows / p->groups / 256 > p->pieces)
    ++p->pieces;
  if (p->pieces > 1)
    p->part = (float *)moe__cuda_scratch(q, (size_t)p->pieces * groups * sums * sizeof(float));
  moe__cuda_run(q, kernel + form, tiles, groups * (uint32_t)p->pieces, 128, p);
  if (p->pieces == 1) return q->status;
  return moe__cuda_run(q, MOE__K_pieces, moe__cuda_blocks(sums, 256), groups, 256, p);
}

static moe_status moe__cuda_blas_fail(moe__cuda_queue *q, const char *what, int error) {
  if (q->status) return q->status;
  q->status = error == 3 ? MOE_E_MEMORY : MOE_E_IO; /* CUBLAS_STATUS_ALLOC_FAILED */
  return moe__cuda_fail(&q->env, q->status,
                        "cuda:%d: %s returned %d: use MOE_CUDA_MAKER_OWN, or another cuBLAS",
                        (int)q->cuda->options.device, what, error);
}

/* cuBLAS's handle of a queue: default math modes, so that float32 is float32 unless TF32 is
   wanted. Where the maker is free to choose, a failure leaves everything to our own kernels. */
static moe_status moe__cuda_blas_open(moe__cuda_queue *q) {
  const moe__cuda_cublas *blas = &q->cuda->cublas;
  const char *what = NULL;
  int error = 0;
  if (!q->cuda->cublas_library) return MOE_OK;
  MOE__CUDA_TRY(blas, cublasCreate_v2, (&q->blas));
  if (error) q->blas = NULL;
  MOE__CUDA_TRY(blas, cublasSetStream_v2, (q->blas, q->stream));
  /* CUBLAS_TF32_TENSOR_OP_MATH, CUBLAS_DEFAULT_MATH */
  MOE__CUDA_TRY(blas, cublasSetMathMode, (q->blas, moe__cuda_tf32(q) ? 3 : 0));
  if (!error) return MOE_OK;
  if (q->blas) blas->cublasDestroy_v2(q->blas);
  q->blas = NULL;
  return q->cuda->options.maker == MOE_CUDA_MAKER_AUTO ? MOE_OK
                                                       : moe__cuda_blas_fail(q, what, error);
}

/* n floats as bf16, in scratch. */
static const void *moe__cuda_to_bf16(moe__cuda_queue *q, const float *from, size_t n) {
  unsigned long long count = n;
  void *to = moe__cuda_scratch(q, n * 2), *args[3];
  args[0] = &to, args[1] = (void *)&from, args[2] = &count;
  moe__cuda_launch(q, MOE__K_to_bf16, moe__cuda_blocks(n, 256), 1, 256, args);
  return to;
}

/* The product of a linear layer by cuBLAS, which counts columns first and so computes the
   transposed one, with operands rounded to bf16 where env.precision says so. */
static moe_status moe__cuda_product_blas(moe__cuda_queue *q, int form, moe__cuda_product *p) {
  int tn = form == MOE__CUDA_TN, nt = form == MOE__CUDA_NT, error;
  int bf16 = q->env.precision == MOE_TYPE_BF16, type = bf16 ? 14 : 0; /* CUDA_R_16BF, CUDA_R_32F */
  int compute = !bf16 && moe__cuda_tf32(q) ? 77 : 68; /* CUBLAS_COMPUTE_32F_FAST_TF32, _32F */
  int m = tn ? p->m : p->rows, k = tn ? p->rows : p->k, a_row = tn ? m : k, b_row = nt ? k : p->n;
  const float one = 1, beta = tn || p->accumulate ? 1.0f : 0.0f;
  const void *a = p->a, *b = tn ? p->b : p->one.w;
  float *c = tn ? p->one.dw : !nt ? p->out : p->y ? p->y : p->act;
  if (bf16) {
    a = moe__cuda_to_bf16(q, p->a, (size_t)m * (size_t)k);
    b = moe__cuda_to_bf16(q, (const float *)b, (size_t)k * (size_t)p->n);
  }
  if (q->status) return q->status;
  error = q->cuda->cublas.cublasGemmEx(q->blas, nt, tn, p->n, m, k, &one, b, type, b_row, a, type,
                                       a_row, &beta, c, 0, p->n, compute, -1);
  if (error) return moe__cuda_blas_fail(q, "cublasGemmEx", error);
  if (!nt || (!p->one.bias && !p->act)) return MOE_OK;
  return moe__cuda_run(q, MOE__K_bias, (uint32_t)m, moe__cuda_blocks((size_t)p->n, 256), 256, p);
}

/* Sets want->blas by what was measured for the same layer and the nearest number of tokens, by
   ratio, which is returned: 0 nothing was measured, 1 the very number. n 0: any layer. */
static double moe__cuda_choose(moe__cuda *cuda, moe__cuda_choice *want) {
  double nearest = 0;
  int i;
  MOE__CUDA_LOCK(&cuda->mutex);
  for (i = 0; i < cuda->choices; ++i) {
    const moe__cuda_choice *c = &cuda->choice[i];
    double ratio = c->m < want->m ? (double)c->m / want->m : (double)want->m / c->m;
    if (c->form != want->form || (want->n && c->n != want->n) || c->k != want->k ||
        c->bf16 != want->bf16 || ratio <= nearest)
      continue;
    nearest = ratio;
    want->blas = c->blas;
  }
  MOE__CUDA_UNLOCK(&cuda->mutex);
  return nearest;
}

/* 1: cuBLAS is to compute y, dx or dw (by form) of m tokens, n outputs and k inputs. */
static int moe__cuda_blas_serves(moe__cuda_queue *q, int form, int32_t m, int32_t n, int32_t k) {
  moe__cuda *cuda = q->cuda;
  moe__cuda_choice c = {0, 0, 0, 0, 0, 0};
  if (q->blas && q->force >= 0) return q->force;
  c.form = form, c.m = m, c.n = n, c.k = k, c.bf16 = q->env.precision == MOE_TYPE_BF16;
  if (q->blas && cuda->options.maker == MOE_CUDA_MAKER_AUTO) moe__cuda_choose(cuda, &c);
  if (q->blas && cuda->options.maker == MOE_CUDA_MAKER_CUBLAS) c.blas = 1;
  moe__cuda_tally(cuda, c.blas ? &cuda->counts.cublas : &cuda->counts.own);
  return c.blas;
}

/* One of the three products of a linear layer: y, dx, or dw and db. */
static moe_status moe__cuda_linear_part(moe__cuda_queue *q, const moe_linear_op *op, int form) {
  int32_t rows = op->w.rows, cols = op->w.cols;
  moe__cuda_product p;
  memset(&p, 0, sizeof p);
  p.groups = p.top_k = 1;
  p.rows = op->M;
  p.one.w = (const float *)op->w.data;
  p.wide_b = moe__cuda_wide(p.one.w, 4);
  p.a = form == MOE__CUDA_NT ? op->x : op->dy;
  p.n = form == MOE__CUDA_NT ? rows : cols;
  p.k = form == MOE__CUDA_NT ? cols : rows;
  if (form == MOE__CUDA_NT) p.one.bias = op->b, p.y = op->y, p.act = op->act;
  if (form == MOE__CUDA_NN) p.out = op->dx, p.accumulate = !op->overwrite;
  if (form == MOE__CUDA_TN) p.m = rows, p.b = op->x, p.one.dw = op->dw, p.one.db = op->db;
  if ((form != MOE__CUDA_TN || op->dw) && moe__cuda_blas_serves(q, form, op->M, rows, cols)) {
    moe__cuda_product_blas(q, form, &p);
    if (!p.one.db) return q->status;
    p.one.dw = NULL;
  }
  if (!p.one.dw) p.b = NULL, p.n = form == MOE__CUDA_TN ? 1 : p.n;
  return moe__cuda_product_run(q, form, &p);
}

/* Slot: y = x W^T + b, act = GELU(y); dx += dy W, dw += dy^T x, db += sums of dy. */
static moe_status moe__cuda_linear(const moe_backend *b, const moe_env *env,
                                   const moe_linear_op *op, int back) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  if (op->M < 0 || op->w.rows < 1 || op->w.cols < 1)
    return moe__cuda_fail(env, MOE_E_ARGUMENT,
                          "cuda: linear: M is %d, w is (%d, %d), expected sizes of 1 or more",
                          (int)op->M, (int)op->w.rows, (int)op->w.cols);
  if (op->w.type != MOE_TYPE_F32 || op->w.layout != MOE_LAYOUT_ROWS)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "cuda: linear: w is int8, bf16 or packed, expected float weights in rows "
                          "layout");
  if (op->M == 0) return MOE_OK;
  if (!back) return moe__cuda_linear_part(q, op, MOE__CUDA_NT);
  if (op->dx) moe__cuda_linear_part(q, op, MOE__CUDA_NN);
  if (op->dw || op->db) moe__cuda_linear_part(q, op, MOE__CUDA_TN);
  return q->status;
}

/* ---- expert feed-forward networks, grouped ---- >>cuda_experts */

MOE__CUDA_SOURCE(
    experts, 0,
    /* place[slot] = row, for order[row] = slot. */
    MOE_KERNEL(256) moe_k_place(moe__cuda_product p) {
      int row = (int)(blockIdx.x * 256 + threadIdx.x);
      if (row < p.rows) p.place[p.order[row]] = row;
    }

    /* Token blockIdx.x of out (M, n) is, or with accumulate +=, the sum over its choices, in order,
       of weight times the choice's row of a [TaG] Eq. 2, 6. */
    MOE_KERNEL(128) moe_k_combine(moe__cuda_product p) {
      size_t slot = (size_t)blockIdx.x * (size_t)p.top_k, n = (size_t)p.n,
             j = (size_t)blockIdx.y * 128 + threadIdx.x;
      float *to = p.out + (size_t)blockIdx.x * n + j, sum;
      if (j >= n) return;
      sum = p.accumulate ? *to : 0.0f;
      for (int choice = 0; choice < p.top_k; ++choice, ++slot)
        sum = fmaf(p.weight ? p.weight[slot] : 1.0f, p.a[(size_t)p.place[slot] * n + j], sum);
      *to = sum;
    }

    /* dweight of a slot, in out, = dy of its token, in b, . its row of a; a warp a row. Where all
       weights of an only expert are 1 they are constant, and dweight is 0. */
    MOE_KERNEL(128) moe_k_dweight(moe__cuda_product p) {
      int lane = (int)threadIdx.x & 31, row = (int)blockIdx.x * 4 + ((int)threadIdx.x >> 5), slot,
          constant = p.groups == 1;
      size_t n = (size_t)p.n;
      float sum = 0.0f;
      if (row >= p.rows) return;
      for (int i = lane; constant && i < p.rows; i += 32)
        constant = p.weight[i] >= 1.0f && p.weight[i] <= 1.0f;
      constant = __all_sync(0xffffffffu, constant);
      slot = p.order[row];
      for (size_t j = (size_t)lane; j < n; j += 32)
        sum = fmaf(p.b[(size_t)(slot / p.top_k) * n + j], p.a[(size_t)row * n + j], sum);
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0) p.out[slot] = constant ? 0.0f : sum;
    })

/* An op, and what its products share. Scratch of R = M k rows, sorted by expert: a (R, F) output of
   GELU, d (R, F) gradient of its input in backward, e (R, H) of each choice, place (R). */
typedef struct moe__cuda_experts_job {
  const moe_experts_op *op;
  moe__cuda_queue *q;
  moe_routes r; /* of the op; without routes its arrays are NULL */
  int32_t rows;
  float *a, *d, *e;
  int *place;
  int wide;                                  /* all weights begin at multiples of 16 bytes */
  moe__cuda_group layer[2][MOE_MAX_EXPERTS]; /* in, out */
  void *there[2];                            /* on the card; NULL: no routes */
} moe__cuda_experts_job;

/* The tables of weights and, in backward, of gradients. */
static moe_status moe__cuda_experts_tables(moe__cuda_experts_job *job, int back) {
  const moe_experts_op *op = job->op;
  const moe_mat *in_out[2] = {op->in, op->out};
  const float *const *w[2] = {op->w_in, op->w_out}, *const * bias[2] = {op->b_in, op->b_out};
  float *const *dw[2] = {op->d_in, op->d_out}, *const * db[2] = {op->d_b_in, op->d_b_out};
  int32_t i;
  for (i = 0; i < 2 * op->N; ++i) {
    int l = i % 2, e = i / 2;
    moe__cuda_group *group = &job->layer[l][e];
    const moe_mat *mat = &in_out[l][e];
    if (mat->data && (mat->type != MOE_TYPE_F32 || mat->layout != MOE_LAYOUT_ROWS))
      return moe__cuda_fail(&job->q->env, MOE_E_UNSUPPORTED,
                            "cuda: experts: weights of expert %d are int8, bf16 or packed, "
                            "expected float weights in rows layout",
                            e);
    group->w = back && w[l] ? w[l][e] : (const float *)mat->data;
    job->wide = job->wide && moe__cuda_wide(group->w, 4);
    if (!back && bias[l]) group->bias = bias[l][e];
    if (back && dw[l]) group->dw = dw[l][e];
    if (back && db[l]) group->db = db[l][e];
  }
  for (i = 0; i < 2 && job->r.start; ++i)
    job->there[i] =
        moe__cuda_upload_args(job->q, job->layer[i], (size_t)op->N * sizeof(moe__cuda_group));
  return job->q->status;
}

static moe_status moe__cuda_experts_begin(moe__cuda_experts_job *job, moe__cuda_queue *q,
                                          const moe_experts_op *op, int back) {
  size_t rows;
  memset(job, 0, sizeof *job);
  job->q = q;
  job->r.M = op->M, job->r.N = job->r.k = 1;
  if (op->routes) job->r = *op->routes;
  job->op = op;
  job->wide = 1;
  if (op->N < 1 || op->N > MOE_MAX_EXPERTS || job->r.N != op->N || job->r.k < 1 || job->r.M < 0 ||
      job->r.M > INT32_MAX / job->r.k || op->H < 1 || op->F < 1)
    return moe__cuda_fail(&job->q->env, MOE_E_ARGUMENT,
                          "cuda: experts: M is %d, k %d, N %d, H %d and F %d, expected the N of "
                          "the routes, 1 to %d, and sizes of 1 or more",
                          (int)job->r.M, (int)job->r.k, (int)op->N, (int)op->H, (int)op->F,
                          MOE_MAX_EXPERTS);
  if (back && job->r.M > 0 && (!op->pre || (!op->e && op->dweight && op->N > 1)))
    return moe__cuda_fail(&job->q->env, MOE_E_ARGUMENT,
                          "cuda: experts: pre or e is NULL, expected those of forward");
  job->rows = job->r.M * job->r.k;
  rows = (size_t)job->rows;
  job->a = op->scratch;
  job->d = job->a + rows * (size_t)op->F;
  job->e = back ? job->d + rows * (size_t)op->F : job->d;
  job->place = (int *)(void *)(job->e + rows * (size_t)op->H);
  return moe__cuda_experts_tables(job, back);
}

/* A product of layer 0, in, or 1, out, whose rows have the routes' weights. */
static moe__cuda_product moe__cuda_experts_product(const moe__cuda_experts_job *job, int layer,
                                                   int form) {
  int outputs = layer ? job->op->H : job->op->F, inputs = layer ? job->op->F : job->op->H;
  moe__cuda_product p;
  memset(&p, 0, sizeof p);
  p.rows = job->rows, p.groups = job->op->N, p.top_k = job->r.k;
  p.start = job->r.start, p.order = job->r.order;
  p.group = (const moe__cuda_group *)job->there[layer];
  p.one = job->layer[layer][0];
  if (layer) p.weight = job->r.weight;
  p.m = outputs;
  p.n = form == MOE__CUDA_NT ? outputs : inputs;
  p.k = form == MOE__CUDA_NT ? inputs : outputs;
  p.wide_b = job->wide;
  return p;
}

/* The last product of a pass, y or dx: with one choice of each token it writes `to` itself, else
   the choices' rows e, which are then summed up. */
static moe_status moe__cuda_experts_last(const moe__cuda_experts_job *job, int form,
                                         moe__cuda_product *p, float *to, float *e) {
  p->accumulate = form == MOE__CUDA_NN;
  if (p->top_k == 1) p->out = to;
  if (p->top_k > 1) p->y = e;
  moe__cuda_product_run(job->q, form, p);
  if (p->top_k == 1) return job->q->status;
  p->out = to, p->a = e, p->place = job->place;
  moe__cuda_run(job->q, MOE__K_place, moe__cuda_blocks((size_t)p->rows, 256), 1, 256, p);
  return moe__cuda_run(job->q, MOE__K_combine, (uint32_t)job->r.M,
                       moe__cuda_blocks((size_t)p->n, 128), 128, p);
}

/* a = GELU(W_in x + b_in), e = W_out a + b_out, y = the sum of weight e. */
static moe_status moe__cuda_experts_forward(const moe__cuda_experts_job *job) {
  const moe_experts_op *op = job->op;
  moe__cuda_product p = moe__cuda_experts_product(job, 0, MOE__CUDA_NT);
  p.a = op->x, p.a_order = p.order;
  p.y = op->pre, p.act = job->a;
  moe__cuda_product_run(job->q, MOE__CUDA_NT, &p);
  p = moe__cuda_experts_product(job, 1, MOE__CUDA_NT);
  p.a = job->a, p.y = op->e;
  return moe__cuda_experts_last(job, MOE__CUDA_NT, &p, op->y, op->e ? op->e : job->e);
}

/* dweight = dy . e; 0 where the only expert has the constant weight 1. */
static void moe__cuda_experts_dweight(const moe__cuda_experts_job *job) {
  moe__cuda_product p = moe__cuda_experts_product(job, 1, MOE__CUDA_NT);
  p.out = job->op->dweight, p.a = job->op->e, p.b = job->op->dy;
  if (p.order && p.a)
    moe__cuda_run(job->q, MOE__K_dweight, moe__cuda_blocks((size_t)p.rows, 4), 1, 128, &p);
  else
    moe__cuda_zero(job->q, p.out, (size_t)p.rows * sizeof(float));
}

/* dw and db of a layer: d^T x, or (weight dy)^T a, whose a holds the weight already. */
static void moe__cuda_experts_weights(const moe__cuda_experts_job *job, int layer) {
  const moe_experts_op *op = job->op;
  moe__cuda_product p = moe__cuda_experts_product(job, layer, MOE__CUDA_TN);
  p.a = layer ? op->dy : job->d;
  p.b = layer ? job->a : op->x;
  *(layer ? &p.a_order : &p.b_order) = p.order;
  if (layer ? op->d_out || op->d_b_out : op->d_in || op->d_b_in)
    moe__cuda_product_run(job->q, MOE__CUDA_TN, &p);
}

/* d = weight dy W_out GELU'(pre), a = weight GELU(pre), gradients of the weights, dx += d W_in. */
static moe_status moe__cuda_experts_backward(const moe__cuda_experts_job *job) {
  const moe_experts_op *op = job->op;
  moe__cuda_product p = moe__cuda_experts_product(job, 1, MOE__CUDA_NN);
  if (op->dweight) moe__cuda_experts_dweight(job);
  p.a = op->dy, p.a_order = p.order, p.pre = op->pre;
  p.y = job->d, p.act = job->a;
  moe__cuda_product_run(job->q, MOE__CUDA_NN, &p);
  moe__cuda_experts_weights(job, 1);
  moe__cuda_experts_weights(job, 0);
  if (!op->dx) return job->q->status;
  p = moe__cuda_experts_product(job, 0, MOE__CUDA_NN);
  p.a = job->d;
  return moe__cuda_experts_last(job, MOE__CUDA_NN, &p, op->dx, job->e);
}

/* Slot: all experts of a layer, a launch for each product. */
static moe_status moe__cuda_experts(const moe_backend *b, const moe_env *env,
                                    const moe_experts_op *op, int back) {
  moe__cuda_experts_job job;
  moe_status status = moe__cuda_experts_begin(&job, moe__cuda_queue_of(b, env), op, back);
  if (status || job.rows == 0) return status;
  return back ? moe__cuda_experts_backward(&job) : moe__cuda_experts_forward(&job);
}

/* ---- self-attention over packed sequences ---- >>cuda_attention
   Blocks of 64 rows of a head of a sequence; their number is that of the longest sequence for each.
   No array of length^2, and one writer of each output: dq has a kernel, dk and dv have one. */

MOE__CUDA_SHARED(
    attention_args,
    /* moe_attention_op on the card. */
    typedef struct moe__attention_args {
      float *y, *dqkv;
      float *stats; /* (M, A, 2); NULL: not kept */
      float *delta; /* (M, A) dy . y of each head: the kernel of dq writes it for that of dk, dv */
      const float *qkv, *dy;
      const unsigned long long *keys;
      const int *seq_start;
      int H, A, D, overwrite;
      int tiles; /* of 64 rows, of the longest sequence */
      int wide;  /* 1: heads begin at multiples of 16 bytes */
      unsigned threshold;
      float keep, scale, exponent; /* 1 / (1 - dropout), 1 / sqrt D, and that to base 2 */
    } moe__attention_args;)

MOE__CUDA_SOURCE(
    attention_base, 0,
    /* What a block works on: 64 rows, from `row` on, of head a of a sequence. A thread has rows r +
       16 i and, of each 32 columns, c + 8 j (probabilities) or 4 c + j (numbers of a head). */
    typedef struct moe__d_head {
      const moe__attention_args *p;
      int begin, length, row, a, r, c;
      unsigned long long key;
    } moe__d_head;
    enum {MOE__D_Q, MOE__D_K, MOE__D_V, MOE__D_Y}; /* matrices of a sequence; dy is like y */

    __device__ static inline float *moe__d_head_shared(int which) {
      __shared__ __align__(16) float sa[64 * 36];
      __shared__ __align__(16) float sb[32 * 36];
      __shared__ __align__(16) float sp[64 * 36];
      return which == 0 ? sa : which == 1 ? sb : sp;
    }

    /* 0: the sequence has no such rows. */
    __device__ static inline int moe__d_head_find(const moe__attention_args *p, moe__d_head *h) {
      int s = (int)blockIdx.x / p->tiles;
      h->p = p;
      h->begin = p->seq_start[s];
      h->length = p->seq_start[s + 1] - h->begin;
      h->row = (int)blockIdx.x % p->tiles * 64;
      h->a = (int)blockIdx.y;
      h->r = (int)threadIdx.x >> 3;
      h->c = (int)threadIdx.x & 7;
      h->key = p->threshold ? p->keys[s] : 0;
      return h->row < h->length;
    }

    /* Number d of the head in a row of q, k or v in qkv, or of y. */
    __device__ static inline size_t moe__d_head_at(const moe__d_head *h, int matrix, int row,
                                                   int d) {
      size_t at = (size_t)(h->begin + row) * (size_t)h->p->H;
      if (matrix != MOE__D_Y) at = at * 3 + (size_t)matrix * (size_t)h->p->H;
      return at + (size_t)(h->a * h->p->D + d);
    }

    /* A row of the head in stats and delta. */
    __device__ static inline size_t moe__d_head_stat(const moe__d_head *h, int row) {
      return (size_t)(h->begin + row) * (size_t)h->p->A + (size_t)h->a;
    }

    /* Whether dropout takes the probability of a query and a key. */
    __device__ static inline int moe__d_head_falls(const moe__d_head *h, int query, int key) {
      unsigned n = (unsigned)h->length, at = ((unsigned)h->a * n + (unsigned)query) * n;
      return h->p->threshold && moe__d_hash32(h->key, at + (unsigned)key) < h->p->threshold;
    }

    /* The sum over the 8 threads of a row. */
    __device__ static inline float moe__d_sum_row(float v) {
      MOE_UNROLL for (int step = 4; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
      return v;
    }

    /* to (R, 32), 36 floats apart = numbers from d on of rows from `row` on of a matrix, with zeros
       beyond its end. */
    __device__ static inline void moe__d_head_load(float *to, int R, const moe__d_head *h,
                                                   int matrix, int row, int d) {
      const float *from = matrix == MOE__D_Y ? h->p->dy : h->p->qkv;
      MOE_UNROLL for (int i = 0; i < R; i += 16) {
        int line = row + h->r + i, count = line < h->length ? h->p->D - d - h->c * 4 : 0;
        *(moe__d_float4 *)(void *)(to + (h->r + i) * 36 + h->c * 4) =
            moe__d_load4(from + moe__d_head_at(h, matrix, line, d + h->c * 4), count, h->p->wide);
      }
    }

    /* s (64, 32) = the block's rows of matrix a times rows of matrix b from `row` on. */
    __device__ static inline void moe__d_head_dot(float *s, float *sa, float *sb,
                                                  const moe__d_head *h, int a, int b, int row) {
      MOE_UNROLL for (int i = 0; i < 16; ++i) s[i] = 0.0f;
      for (int d = 0; d < h->p->D; d += 32) {
        MOE_SYNC();
        moe__d_head_load(sa, 64, h, a, h->row, d);
        moe__d_head_load(sb, 32, h, b, row, d);
        MOE_SYNC();
        MOE_ROLL for (int k = 0; k < 32; k += 4) {
          moe__d_float4 x[4];
          MOE_UNROLL for (int i = 0; i < 4; ++i) x[i] =
              *(const moe__d_float4 *)(const void *)(sa + (h->r + 16 * i) * 36 + k);
          MOE_UNROLL for (int j = 0; j < 4; ++j) {
            moe__d_float4 y = *(const moe__d_float4 *)(const void *)(sb + (h->c + 8 * j) * 36 + k);
            MOE_UNROLL for (int i = 0; i < 16; ++i) s[(i >> 2) * 4 + j] =
                fmaf(x[i >> 2].v[i & 3], y.v[i & 3], s[(i >> 2) * 4 + j]);
          }
        }
      }
    }

    /* sum (64, D) += sp (64, 32) times rows of matrix b from `row` on; D up to 32 `chunks`. */
    __device__ static inline void moe__d_head_add(float *sum, int chunks, const float *sp,
                                                  float *sb, const moe__d_head *h, int b, int row) {
      MOE_UNROLL for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk * 32 >= h->p->D) continue;
        MOE_SYNC();
        moe__d_head_load(sb, 32, h, b, row, chunk * 32);
        MOE_SYNC();
        MOE_ROLL for (int k = 0; k < 32; k += 4) {
          moe__d_float4 x[4];
          MOE_UNROLL for (int i = 0; i < 4; ++i) x[i] =
              *(const moe__d_float4 *)(const void *)(sp + (h->r + 16 * i) * 36 + k);
          MOE_UNROLL for (int n = 0; n < 4; ++n) {
            moe__d_float4 y = *(const moe__d_float4 *)(const void *)(sb + (k + n) * 36 + h->c * 4);
            MOE_UNROLL for (int i = 0; i < 16; ++i) sum[chunk * 16 + i] =
                fmaf(x[i >> 2].v[n], y.v[i & 3], sum[chunk * 16 + i]);
          }
        }
      }
    }

    /* The block's rows of a matrix = or += factor sum. */
    __device__ static inline void moe__d_head_write(float *to, const moe__d_head *h, int matrix,
                                                    const float *sum, int chunks,
                                                    const float *factor, int overwrite) {
      MOE_UNROLL for (int i = 0; i < chunks * 16; ++i) {
        int row = h->row + h->r + 16 * (i >> 2 & 3), d = (i >> 4) * 32 + h->c * 4 + (i & 3);
        float v = sum[i] * factor[i >> 2 & 3], *at = to + moe__d_head_at(h, matrix, row, d);
        if (row < h->length && d < h->p->D) *at = overwrite ? v : *at + v;
      }
    })

MOE__CUDA_SOURCE(
    attention, 0,
    /* y = dropout(softmax(q k^T / sqrt D)) v: 32 keys at a time; when a larger score comes, what
       was summed up is made smaller. Stats: the largest exponent (to base 2), 1 / sum. */
    template <int chunks>
    __device__ static __forceinline__ void moe__d_attention(const moe__attention_args *p) {
      float *sa = moe__d_head_shared(0), *sb = moe__d_head_shared(1), *sp = moe__d_head_shared(2);
      moe__d_head h;
      float sum[chunks * 16], s[16], top[4], total[4];
      if (!moe__d_head_find(p, &h)) return;
      MOE_UNROLL for (int i = 0; i < 4; ++i) top[i] = __uint_as_float(0xff800000u), total[i] = 0.0f;
      MOE_UNROLL for (int i = 0; i < chunks * 16; ++i) sum[i] = 0.0f;
      for (int key = 0; key < h.length; key += 32) {
        moe__d_head_dot(s, sa, sb, &h, MOE__D_Q, MOE__D_K, key);
        MOE_UNROLL for (int i = 0; i < 4; ++i) {
          float most = top[i], smaller;
          MOE_UNROLL for (int j = 0; j < 4; ++j) if (key + h.c + 8 * j < h.length) most =
              fmaxf(most, s[i * 4 + j] * p->exponent);
          MOE_UNROLL for (int step = 4; step > 0; step /= 2) most =
              fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
          smaller = exp2f(top[i] - most);
          top[i] = most;
          total[i] *= smaller;
          MOE_UNROLL for (int j = 0; j < 4; ++j) {
            int k = key + h.c + 8 * j, row = h.r + 16 * i;
            float e = k < h.length ? exp2f(fmaf(s[i * 4 + j], p->exponent, -most)) : 0.0f;
            total[i] += e;
            sp[row * 36 + h.c + 8 * j] = moe__d_head_falls(&h, h.row + row, k) ? 0.0f : e;
          }
          MOE_UNROLL for (int j = 0; j < chunks * 4; ++j) sum[(j >> 2) * 16 + i * 4 + (j & 3)] *=
              smaller;
        }
        moe__d_head_add(sum, chunks, sp, sb, &h, MOE__D_V, key);
      }
      MOE_UNROLL for (int i = 0; i < 4; ++i) {
        int row = h.row + h.r + 16 * i;
        size_t stat = moe__d_head_stat(&h, row) * 2;
        total[i] = 1.0f / moe__d_sum_row(total[i]);
        if (p->stats && row < h.length && h.c == 0)
          p->stats[stat] = top[i], p->stats[stat + 1] = total[i];
        total[i] *= p->keep;
      }
      moe__d_head_write(p->y, &h, MOE__D_Y, sum, chunks, total, 1);
    }

    /* Heads of up to 32, 64 and 128 numbers. */
    MOE_KERNEL(128)
        moe_k_attention_32(moe__attention_args p) { moe__d_attention<1>(&p); } MOE_KERNEL(128)
            moe_k_attention_64(moe__attention_args p) { moe__d_attention<2>(&p); } MOE_KERNEL(128)
                moe_k_attention_128(moe__attention_args p) { moe__d_attention<4>(&p); })

MOE__CUDA_SOURCE(
    attention_back, 0,
    /* dS = P (dropout(dy v^T) - delta) / sqrt D, delta = dy . y, P from the stats. keys 0: the
       block's rows are queries, and dq += dS k. keys 1: they are keys, queries come 32 at a time,
       and dk += dS^T q, dv += dropout(P)^T dy. */
    template <int chunks, int keys>
    __device__ static __forceinline__ void moe__d_dqkv(const moe__attention_args *p) {
      float *sa = moe__d_head_shared(0), *sb = moe__d_head_shared(1), *sp = moe__d_head_shared(2);
      const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      moe__d_head h;
      float sum[chunks * 16], dv[chunks * 16], s[16], dp[16], top[4], inverse[4], delta[4];
      if (!moe__d_head_find(p, &h)) return;
      MOE_UNROLL for (int i = 0; i < chunks * 16; ++i) sum[i] = dv[i] = 0.0f;
      if (!keys) MOE_UNROLL for (int i = 0; i < 4; ++i) {
          int row = h.row + h.r + 16 * i;
          size_t at = moe__d_head_at(&h, MOE__D_Y, row, 0);
          delta[i] = 0.0f;
          for (int d = h.c; d < p->D && row < h.length; d += 8)
            delta[i] = fmaf(p->dy[at + (size_t)d], p->y[at + (size_t)d], delta[i]);
          delta[i] = moe__d_sum_row(delta[i]);
          if (row < h.length && h.c == 0) p->delta[moe__d_head_stat(&h, row)] = delta[i];
        }
      for (int first = 0; first < h.length; first += 32) {
        moe__d_head_dot(s, sa, sb, &h, keys ? MOE__D_K : MOE__D_Q, keys ? MOE__D_Q : MOE__D_K,
                        first);
        moe__d_head_dot(dp, sa, sb, &h, keys ? MOE__D_V : MOE__D_Y, keys ? MOE__D_Y : MOE__D_V,
                        first);
        if (keys || first == 0) MOE_UNROLL for (int i = 0; i < 4; ++i) {
            int query = keys ? first + h.c + 8 * i : h.row + h.r + 16 * i, here = query < h.length;
            size_t stat = moe__d_head_stat(&h, query);
            top[i] = here ? p->stats[stat * 2] : 0.0f;
            inverse[i] = here ? p->stats[stat * 2 + 1] : 0.0f;
            if (keys) delta[i] = here ? p->delta[stat] : 0.0f;
          }
        MOE_UNROLL for (int i = 0; i < 16; ++i) {
          int q = keys ? i & 3 : i >> 2, row = h.row + h.r + 16 * (i >> 2),
              column = first + h.c + 8 * (i & 3), query = keys ? column : row,
              key = keys ? row : column, falls = moe__d_head_falls(&h, query, key);
          float e = key < h.length ? exp2f(fmaf(s[i], p->exponent, -top[q])) * inverse[q] : 0.0f;
          s[i] = e * p->scale * (falls ? -delta[q] : fmaf(dp[i], p->keep, -delta[q]));
          dp[i] = falls ? 0.0f : e * p->keep;
        }
        if (keys) {
          MOE_UNROLL for (int i = 0; i < 16; ++i)
              sp[(h.r + 16 * (i >> 2)) * 36 + h.c + 8 * (i & 3)] = dp[i];
          moe__d_head_add(dv, chunks, sp, sb, &h, MOE__D_Y, first);
          MOE_SYNC();
        }
        MOE_UNROLL for (int i = 0; i < 16; ++i) sp[(h.r + 16 * (i >> 2)) * 36 + h.c + 8 * (i & 3)] =
            s[i];
        moe__d_head_add(sum, chunks, sp, sb, &h, keys ? MOE__D_Q : MOE__D_K, first);
      }
      moe__d_head_write(p->dqkv, &h, keys ? MOE__D_K : MOE__D_Q, sum, chunks, one, p->overwrite);
      if (keys) moe__d_head_write(p->dqkv, &h, MOE__D_V, dv, chunks, one, p->overwrite);
    }

    MOE_KERNEL(128) moe_k_attention_dq_32(moe__attention_args p) {
      moe__d_dqkv<1, 0>(&p);
    } MOE_KERNEL(128, 3) moe_k_attention_dq_64(moe__attention_args p) {
      moe__d_dqkv<2, 0>(&p);
    } MOE_KERNEL(128) moe_k_attention_dq_128(moe__attention_args p) {
      moe__d_dqkv<4, 0>(&p);
    } MOE_KERNEL(128)
        moe_k_attention_dkv_32(moe__attention_args p) { moe__d_dqkv<1, 1>(&p); } MOE_KERNEL(128)
            moe_k_attention_dkv_64(moe__attention_args p) { moe__d_dqkv<2, 1>(&p); } MOE_KERNEL(128)
                moe_k_attention_dkv_128(moe__attention_args p) { moe__d_dqkv<4, 1>(&p); })

/* Slot. */
static moe_status moe__cuda_attention(const moe_backend *b, const moe_env *env,
                                      const moe_attention_op *op, int back) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe_status status = moe__cuda_rows_check("attention", op->S, op->M, op->H, op->dropout, env);
  int32_t longest = op->longest > 0 ? op->longest : op->M;
  moe__attention_args p;
  uint64_t blocks;
  int width;
  if (status || op->M == 0 || op->H == 0 || op->S == 0) return status;
  if (op->A < 1 || op->H % op->A)
    return moe__cuda_fail(env, MOE_E_ARGUMENT, "attention: A is %d, expected a divisor of H, %d",
                          (int)op->A, (int)op->H);
  if (op->H / op->A > 128)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "attention: heads have %d numbers, expected 1 to 128",
                          (int)(op->H / op->A));
  if (back && !op->stats)
    return moe__cuda_fail(env, MOE_E_ARGUMENT,
                          "attention: stats is NULL, expected that of forward");
  p.y = op->y, p.stats = op->stats, p.qkv = op->qkv, p.dqkv = op->dqkv, p.dy = op->dy;
  p.delta = NULL, p.seq_start = op->seq_start;
  p.H = op->H, p.A = op->A, p.D = op->H / op->A;
  p.tiles = (longest - 1) / 64 + 1;
  p.overwrite = op->overwrite;
  p.wide = p.D % 4 == 0 && moe__cuda_wide(op->qkv, 4) && (!back || moe__cuda_wide(op->dy, 4));
  p.keys = (const unsigned long long *)(const void *)op->keys;
  p.threshold = moe__cuda_drop(&p.keep, op->dropout, op->keys);
  p.scale = 1.0f / sqrtf((float)p.D);
  p.exponent = p.scale * 1.44269502f; /* log2(e) */
  blocks = (uint64_t)op->S * (uint64_t)p.tiles;
  if (blocks > INT32_MAX || p.A > 65535)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "attention: %d sequences of up to %d tokens with %d heads need too many "
                          "blocks",
                          (int)op->S, (int)longest, (int)op->A);
  width = p.D <= 32 ? 0 : p.D <= 64 ? 1 : 2;
  if (!back)
    return moe__cuda_run(q, MOE__K_attention_32 + width, (uint32_t)blocks, (uint32_t)p.A, 128, &p);
  p.delta = (float *)moe__cuda_scratch(q, (size_t)op->M * (size_t)op->A * sizeof(float));
  moe__cuda_run(q, MOE__K_attention_dq_32 + width, (uint32_t)blocks, (uint32_t)p.A, 128, &p);
  return moe__cuda_run(q, MOE__K_attention_dkv_32 + width, (uint32_t)blocks, (uint32_t)p.A, 128,
                       &p);
}

/* ---- LayerNorm, dropout, embeddings ---- >>cuda_rows
   Sums over a row have the CPU's order: 16 threads are its 16 lanes (>>simd in moe.h), the tree is
   a butterfly. Sums over tokens are cut into parts of fixed sizes, or run in the order of the
   tokens; every element has one writer. */

MOE__CUDA_SHARED(
    rows_args, typedef struct moe__rows_args {
      float *y, *sum, *mean, *rstd; /* as in moe_layernorm_op and moe_dropout_op */
      const float *x, *delta, *gamma, *beta;
      const unsigned long long *keys;
      const int *seq_start;
      float *dx, *ddelta;
      const float *dy;
      float *parts; /* (n_parts, 2, H) sums for gamma and beta over n_parts parts of the rows */
      float eps, scale;
      unsigned threshold; /* of dropout; 0: none */
      int S, M, H, overwrite, n_parts;
    } moe__rows_args;)

MOE__CUDA_SOURCE(
    norm, 0,
    /* The key of a row's dropout, and the position of its first element. */
    __device__ static unsigned long long moe__d_row_key(const moe__rows_args &a, int row,
                                                        unsigned *place) {
      int s = a.threshold ? moe__d_last(a.seq_start, 1, a.S, row) : 0;
      *place = a.threshold ? (unsigned)(row - a.seq_start[s]) * (unsigned)a.H : 0;
      return a.threshold ? a.keys[s] : 0;
    }

    /* sum = x + dropout(delta), y = (sum - mean) rstd gamma + beta [TaG] 2. 16 threads a row. */
    MOE_KERNEL(128) moe_k_norm(moe__rows_args a) {
      size_t lane = threadIdx.x & 15u, row = blockIdx.x * 8u + (threadIdx.x >> 4);
      size_t H = (size_t)a.H, at = row * H;
      float *keep = a.sum ? a.sum : a.delta ? a.y : (float *)0;
      const float *v = a.delta ? keep : a.x;
      float sum = 0, square = 0, mean, rstd;
      unsigned long long key;
      unsigned place;
      if (row >= (size_t)a.M) return;
      key = moe__d_row_key(a, (int)row, &place);
      for (size_t c = lane; c < H; c += 16) {
        float e = a.x[at + c];
        if (a.delta) e += moe__d_drop(a.delta[at + c], a.threshold, a.scale, key, place + c);
        if (keep) keep[at + c] = e;
        sum += e;
      }
      mean = moe__d_sum16(sum) / (float)a.H;
      for (size_t c = lane; c < H; c += 16) {
        float e = v[at + c] - mean;
        square = fmaf(e, e, square);
      }
      rstd = 1.0f / sqrtf(moe__d_sum16(square) / (float)a.H + a.eps);
      for (size_t c = lane; c < H; c += 16)
        a.y[at + c] = fmaf((v[at + c] - mean) * rstd, a.gamma[c], a.beta[c]);
      if (!a.mean || lane > 0) return;
      a.mean[row] = mean;
      a.rstd[row] = rstd;
    }

    /* d = rstd (g - mean of g - h (mean of g h)), dx = or += d, ddelta = dropout(d), with g = dy
       gamma and h = (sum - mean) rstd. dx may be dy, and ddelta dx: a thread reads an element
       before it writes it, and no other thread does either. */
    MOE_KERNEL(128) moe_k_norm_back(moe__rows_args a) {
      size_t lane = threadIdx.x & 15u, row = blockIdx.x * 8u + (threadIdx.x >> 4);
      size_t H = (size_t)a.H, at = row * H;
      float mean, rstd, sum = 0, product = 0;
      unsigned long long key;
      unsigned place;
      if (row >= (size_t)a.M) return;
      key = moe__d_row_key(a, (int)row, &place);
      mean = a.mean[row], rstd = a.rstd[row];
      for (size_t c = lane; c < H; c += 16) {
        float g = a.dy[at + c] * a.gamma[c];
        sum += g;
        product = fmaf(g, (a.sum[at + c] - mean) * rstd, product);
      }
      sum = moe__d_sum16(sum) / (float)a.H;
      product = moe__d_sum16(product) / (float)a.H;
      for (size_t c = lane; c < H; c += 16) {
        float g = a.dy[at + c] * a.gamma[c];
        float d = fmaf(-product, (a.sum[at + c] - mean) * rstd, g - sum) * rstd;
        if (a.dx) a.dx[at + c] = a.overwrite ? d : a.dx[at + c] + d;
        if (a.ddelta) a.ddelta[at + c] = moe__d_drop(d, a.threshold, a.scale, key, place + c);
      }
    }

    /* dgamma += sum of dy h, dbeta += sum of dy, over the rows: 32 columns x 8 rows at a time give
       the sums of a part. moe_k_pieces adds the parts. */
    MOE_KERNEL(256) moe_k_norm_columns(moe__rows_args a) {
      size_t lane = threadIdx.x >> 5, H = (size_t)a.H;
      size_t c = (size_t)blockIdx.x * 32 + (threadIdx.x & 31u);
      int rows = (a.M + a.n_parts - 1) / a.n_parts, first = (int)blockIdx.y * rows;
      int end = a.M - first < rows ? a.M : first + rows;
      float gamma = 0, beta = 0;
      for (int r = first + (int)lane; c < H && r < end; r += 8) {
        size_t i = (size_t)r * H + c;
        gamma = fmaf(a.dy[i], (a.sum[i] - a.mean[r]) * a.rstd[r], gamma);
        beta += a.dy[i];
      }
      gamma = moe__d_sum8(gamma);
      beta = moe__d_sum8(beta);
      if (lane < 2 && c < H) a.parts[(blockIdx.y * 2 + lane) * H + c] = lane ? beta : gamma;
    }

    /* y = dropout(x), forward and backward. 16 threads a row. */
    MOE_KERNEL(128) moe_k_dropout(moe__rows_args a) {
      size_t row = blockIdx.x * 8u + (threadIdx.x >> 4), H = (size_t)a.H;
      unsigned long long key;
      unsigned place;
      if (row >= (size_t)a.M) return;
      key = moe__d_row_key(a, (int)row, &place);
      for (size_t c = threadIdx.x & 15u; c < H; c += 16)
        a.y[row * H + c] = moe__d_drop(a.x[row * H + c], a.threshold, a.scale, key, place + c);
    })

/* Sorting n elements by 8 bits of a key, stable: the gates' dispatch sorts by expert, the gradients
   of embeddings by word or segment. */
MOE__CUDA_SHARED(
    sort_args, typedef struct moe__sort_args {
      const int *keys;            /* (n); the lowest 8 bits count */
      const unsigned char *bytes; /* (n) keys that are bytes, or NULL */
      int *to;                    /* (n) the elements 0, 1, ... sorted */
      int *start;                 /* (buckets + 1) where the elements of a key begin */
      int n, buckets;
    } moe__sort_args;)

MOE__CUDA_SOURCE(
    sort, 0,
    /* A block for each key. A thread takes n / 256 neighbours: it counts those with a smaller key
       and those with the block's, and places the latter behind those of the threads before it. */
    MOE_KERNEL(256) moe_k_sort(moe__sort_args a) {
      __shared__ int smaller[256], equal[256];
      int b = (int)blockIdx.x, t = (int)threadIdx.x, each = (a.n - 1) / 256 + 1, place = 0;
      int first = a.n / each < t ? a.n : t * each, end = a.n - first < each ? a.n : first + each;
      smaller[t] = equal[t] = 0;
      for (int i = first; i < end; ++i) {
        int key = a.bytes ? (int)a.bytes[i] : a.keys[i] & 255;
        smaller[t] += key < b;
        equal[t] += key == b;
      }
      MOE_SYNC();
      for (int i = 0; i < 256; ++i) place += smaller[i] + (i < t ? equal[i] : 0);
      if (t == 0) a.start[b] = place;
      if (t == 0 && b == a.buckets - 1) a.start[b + 1] = a.n;
      for (int i = first; i < end; ++i)
        if ((a.bytes ? (int)a.bytes[i] : a.keys[i] & 255) == b) a.to[place++] = i;
    })

MOE__CUDA_SHARED(
    embed_args, typedef struct moe__embed_args {
      float *x; /* as in moe_embed_op */
      const int *ids;
      const unsigned char *segments;
      const float *word, *position, *segment;
      const int *seq_start;
      float *dword, *dposition, *dsegment;
      const float *dx;
      const int *order; /* (M) backward: tokens sorted by word or segment */
      const int *start; /* (257) where the tokens of a key begin in order */
      int S, M, H;
    } moe__embed_args;)

MOE__CUDA_SOURCE(
    embed, 0,
    /* x = word[id] + position[place] + segment[segment id]; 16 threads a row. */
    MOE_KERNEL(128) moe_k_embed(moe__embed_args a) {
      size_t row = blockIdx.x * 8u + (threadIdx.x >> 4), H = (size_t)a.H, place = 0, kind = 0;
      const float *word;
      float *x = a.x + row * H;
      if (row >= (size_t)a.M) return;
      word = a.word ? a.word + (size_t)a.ids[row] * H : x;
      if (a.position) place = row - (size_t)a.seq_start[moe__d_last(a.seq_start, 1, a.S, (int)row)];
      if (a.segment && a.segments) kind = a.segments[row];
      for (size_t c = threadIdx.x & 15u; c < H; c += 16) {
        float v = word[c];
        if (a.position) v += a.position[place * H + c];
        if (a.segment) v += a.segment[kind * H + c];
        x[c] = v;
      }
    }

    /* dword: the first of the tokens with a word adds all of them, in their order; they are among
       those whose ids have the same 8 bits. */
    MOE_KERNEL(128) moe_k_embed_words(moe__embed_args a) {
      int first = (int)blockIdx.x, id = a.ids[a.order[first]];
      const int *start = a.start + (id & 255);
      size_t H = (size_t)a.H;
      for (int i = start[0]; i < first; ++i)
        if (a.ids[a.order[i]] == id) return;
      for (size_t c = threadIdx.x; c < H; c += 128) {
        float sum = a.dword[(size_t)id * H + c];
        for (int i = first; i < start[1]; ++i)
          if (a.ids[a.order[i]] == id) sum += a.dx[(size_t)a.order[i] * H + c];
        a.dword[(size_t)id * H + c] = sum;
      }
    }

    /* dposition: a block for each place adds the sequences that reach it, in their order. */
    MOE_KERNEL(128) moe_k_embed_positions(moe__embed_args a) {
      size_t place = blockIdx.x, H = (size_t)a.H;
      for (size_t c = threadIdx.x; c < H; c += 128)
        for (int s = 0; s < a.S; ++s)
          if (a.seq_start[s + 1] - a.seq_start[s] > (int)place)
            a.dposition[place * H + c] += a.dx[((size_t)a.seq_start[s] + place) * H + c];
    }

    /* dsegment: 32 columns of a segment, whose tokens are dealt to 8 lanes. */
    MOE_KERNEL(256) moe_k_embed_segments(moe__embed_args a) {
      int lane = (int)(threadIdx.x >> 5), kind = (int)blockIdx.y;
      int first = a.segments ? a.start[kind] : 0, end = a.segments ? a.start[kind + 1] : a.M;
      size_t H = (size_t)a.H, c = (size_t)blockIdx.x * 32 + (threadIdx.x & 31u);
      float sum = 0;
      if (first == end) return;
      for (int i = first + lane; c < H && i < end; i += 8)
        sum += a.dx[(size_t)(a.segments ? a.order[i] : i) * H + c];
      sum = moe__d_sum8(sum);
      if (lane == 0 && c < H) a.dsegment[(size_t)kind * H + c] += sum;
    })

/* A kernel with 16 threads for each of M rows. */
static moe_status moe__cuda_rows(moe__cuda_queue *q, int kernel, int32_t M, void *args) {
  return moe__cuda_run(q, kernel, moe__cuda_blocks((size_t)M, 8), 1, 128, args);
}

static moe_status moe__cuda_layernorm(const moe_backend *b, const moe_env *env,
                                      const moe_layernorm_op *op, int back) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe_status status = moe__cuda_rows_check("layernorm", op->S, op->M, op->H, op->dropout, env);
  size_t floats = 2 * (size_t)op->H;
  moe__cuda_product sums;
  moe__rows_args a;
  if (status) return status;
  if (!(op->eps > 0))
    return moe__cuda_fail(env, MOE_E_ARGUMENT, "layernorm: eps is %g, expected more than 0",
                          (double)op->eps);
  if (!op->mean != !op->rstd || (back && !op->mean && op->M > 0))
    return moe__cuda_fail(env, MOE_E_ARGUMENT, "layernorm: mean or rstd is NULL, expected %s",
                          back ? "those of forward" : "both or neither");
  if (op->H == 0) return MOE_OK;
  a.y = op->y, a.sum = op->sum, a.mean = op->mean, a.rstd = op->rstd;
  a.x = op->x, a.delta = op->delta, a.gamma = op->gamma, a.beta = op->beta;
  a.keys = (const unsigned long long *)(const void *)op->keys, a.seq_start = op->seq_start;
  a.threshold = moe__cuda_drop(&a.scale, op->dropout, op->keys);
  a.dx = op->dx, a.ddelta = op->ddelta, a.dy = op->dy;
  a.eps = op->eps, a.S = op->S, a.M = op->M, a.H = op->H, a.overwrite = op->overwrite;
  if (!back) return moe__cuda_rows(q, MOE__K_norm, a.M, &a);
  if (!a.sum) a.sum = (float *)op->x; /* only read */
  if (op->dgamma || op->dbeta) {      /* first, since dx may be dy */
    a.n_parts = a.M < 64 * 128 ? (a.M + 63) / 64 : 128;
    a.parts = (float *)moe__cuda_scratch(q, (size_t)a.n_parts * floats * sizeof(float));
    memset(&sums, 0, sizeof sums);
    sums.one.dw = op->dgamma, sums.one.db = op->dbeta, sums.b = sums.part = a.parts;
    sums.groups = sums.n = 1, sums.m = a.H, sums.pieces = a.n_parts;
    moe__cuda_run(q, MOE__K_norm_columns, moe__cuda_blocks(floats, 64), (uint32_t)a.n_parts, 256,
                  &a);
    moe__cuda_run(q, MOE__K_pieces, moe__cuda_blocks(floats, 256), 1, 256, &sums);
  }
  return a.dx || a.ddelta ? moe__cuda_rows(q, MOE__K_norm_back, a.M, &a) : q->status;
}

static moe_status moe__cuda_dropout(const moe_backend *b, const moe_env *env,
                                    const moe_dropout_op *op) {
  moe_status status = moe__cuda_rows_check("dropout", op->S, op->M, op->H, op->dropout, env);
  moe__rows_args a;
  if (status) return status;
  memset(&a, 0, sizeof a);
  a.y = op->y, a.x = op->x, a.S = op->S, a.M = op->M, a.H = op->H;
  a.keys = (const unsigned long long *)(const void *)op->keys, a.seq_start = op->seq_start;
  a.threshold = moe__cuda_drop(&a.scale, op->dropout, op->keys);
  return moe__cuda_rows(moe__cuda_queue_of(b, env), MOE__K_dropout, op->M, &a);
}

static moe_status moe__cuda_embed(const moe_backend *b, const moe_env *env, const moe_embed_op *op,
                                  int back) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe_status status = moe__cuda_rows_check("embed", op->S, op->M, op->H, 0, env);
  uint32_t M = (uint32_t)op->M, columns = moe__cuda_blocks((size_t)op->H, 32);
  moe__sort_args sort = {op->ids, NULL, NULL, NULL, op->M, 256};
  moe__embed_args a;
  if (status) return status;
  a.x = op->x, a.ids = op->ids, a.segments = op->segments, a.seq_start = op->seq_start;
  a.word = op->word, a.position = op->position, a.segment = op->segment;
  a.dword = op->dword, a.dposition = op->dposition, a.dsegment = op->dsegment, a.dx = op->dx;
  a.S = op->S, a.M = op->M, a.H = op->H;
  if (!back) return moe__cuda_rows(q, MOE__K_embed, a.M, &a);
  a.order = sort.to = (int *)moe__cuda_scratch(q, (size_t)M * sizeof(int));
  a.start = sort.start = (int *)moe__cuda_scratch(q, 257 * sizeof(int));
  if (a.dword) {
    moe__cuda_run(q, MOE__K_sort, 256, 1, 256, &sort);
    moe__cuda_run(q, MOE__K_embed_words, M, 1, 128, &a);
  }
  if (a.dposition) moe__cuda_run(q, MOE__K_embed_positions, M, 1, 128, &a);
  if (!a.dsegment) return q->status;
  sort.bytes = a.segments;
  if (a.segments) moe__cuda_run(q, MOE__K_sort, 256, 1, 256, &sort);
  return moe__cuda_run(q, MOE__K_embed_segments, columns, a.segments ? 256 : 1, 256, &a);
}

/* ---- gates, softmax, top-k, dispatch ---- >>cuda_route */

MOE__CUDA_SHARED(
    route_args, typedef struct moe__route_args {
      int *expert; /* as in moe_routes, moe_route_op and moe_route_options */
      float *weight, *prob;
      const int *start;
      float *logits, *loss;
      const float *x, *gates;
      const int *gate_of, *seq_start;
      const unsigned long long *keys; /* NULL: no jitter */
      const int *forced;
      const unsigned char *masked, *pruned; /* NULL where experts are forced */
      float *dx, *dgates, *dlogits;
      const float *dweight;
      double *parts; /* (n_parts, N + 1) sums of prob and of z^2 over parts of the tokens */
      float scale, balance, z_loss, jitter, loss_scale; /* the losses: 0 or more */
      int renormalize, S, H, M, N, k, n_parts;
    } moe__route_args;)

/* 16 threads hold a token: thread l has experts l, l + 16, ..., and the lanes of a dot product. */
MOE__CUDA_SOURCE(
    route_base, 0,
    /* Jitter's factor for column c of a token. */
    __device__ static float moe__d_noise(const moe__route_args &a, int s, int token, int c) {
      unsigned place = (unsigned)(token - a.seq_start[s]) * (unsigned)a.H + (unsigned)c;
      float u = (float)(moe__d_hash32(a.keys[s], place) >> 8) * (2.0f / 16777216.0f) - 1.0f;
      return 1.0f + a.jitter * u;
    }

    /* Share of the choices that went to expert i. */
    __device__ static float moe__d_share(const moe__route_args &a, int i) {
      return (float)(a.start[i + 1] - a.start[i]) / ((float)a.M * (float)a.k);
    }

    /* log of the sum of exp(logits), from the most probable expert. */
    __device__ static float moe__d_log_sum(const float *logits, const float *prob, int N) {
      int best = 0;
      for (int i = 1; i < N; ++i)
        if (prob[i] > prob[best]) best = i;
      return logits[best] - logf(prob[best]);
    }

    /* Logits x W_g^T of a token [TaG] Eq. 3, four experts at a time. */
    __device__ static void moe__d_logits(const moe__route_args &a, float *logits, int token) {
      int lane = (int)(threadIdx.x & 15u), s = moe__d_last(a.seq_start, 1, a.S, token);
      const float *gate = a.gates + (size_t)a.gate_of[s] * (size_t)a.N * (size_t)a.H;
      const float *x = a.x + (size_t)token * (size_t)a.H;
      for (int i = 0; i < a.N; i += 4, gate += 4 * (size_t)a.H) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        int n = a.N - i < 4 ? a.N - i : 4;
        for (int c = lane; c < a.H; c += 16) {
          float v = a.keys ? x[c] * moe__d_noise(a, s, token, c) : x[c];
          for (int q = 0; q < n; ++q)
            sum[q] = fmaf(v, gate[(size_t)q * (size_t)a.H + (size_t)c], sum[q]);
        }
        for (int q = 0; q < n; ++q) {
          float total = moe__d_sum16(sum[q]);
          if ((i + q) % 16 == lane) logits[i + q] = a.masked && a.masked[i + q] ? -3.4e38f : total;
        }
      }
    }

    /* prob = softmax(logits) of a token's n experts [TaG] Eq. 4. */
    __device__ static void moe__d_softmax(float *prob, const float *logits, int n) {
      int lane = (int)(threadIdx.x & 15u);
      float most = __uint_as_float(0xff800000u), sum = 0;
      for (int i = lane; i < n; i += 16) most = most > logits[i] ? most : logits[i];
      for (int o = 8; o > 0; o >>= 1) {
        float other = __shfl_xor_sync(moe__d_half(), most, o);
        most = most > other ? most : other;
      }
      for (int i = lane; i < n; i += 16) {
        prob[i] = moe__d_exp(logits[i] - most);
        sum += prob[i];
      }
      sum = moe__d_sum16(sum);
      for (int i = lane; i < n; i += 16) prob[i] /= sum;
    })

MOE__CUDA_SOURCE(
    route, 0,
    /* The next expert of a token: the largest logit among those not taken, of equal ones the
       lowest. NaN comes last. Below 0: nothing is left. */
    __device__ static int moe__d_next(const float *logits, unsigned taken, int n) {
      unsigned long long best = 0; /* the order of logits as bits, then that of indices */
      for (int i = (int)(threadIdx.x & 15u); i < n; i += 16) {
        unsigned u = __float_as_uint(logits[i] + 0.0f); /* -0 becomes 0 */
        unsigned long long rank;
        u = u & 0x80000000u ? ~u : u | 0x80000000u;
        if (!(logits[i] <= __uint_as_float(0x7f800000u))) u = 0;
        rank = (unsigned long long)u << 32 | (0xffffffffu - (unsigned)i);
        if (!(taken >> (i / 16) & 1u) && rank > best) best = rank;
      }
      for (int o = 8; o > 0; o >>= 1) {
        unsigned long long other = __shfl_xor_sync(moe__d_half(), best, o);
        best = other > best ? other : best;
      }
      return (int)(0xffffffffu - (unsigned)best);
    }

    /* Eq. 3, 4 and 5. Indices stay in range whatever the logits and the forced experts are. */
    MOE_KERNEL(128) moe_k_route(moe__route_args a) {
      int lane = (int)(threadIdx.x & 15u);
      size_t token = blockIdx.x * 8u + (threadIdx.x >> 4);
      float *logits = a.logits + token * (size_t)a.N, *prob = a.prob + token * (size_t)a.N, sum = 0;
      float *weight = a.weight + token * (size_t)a.k;
      unsigned taken = 0;
      if (token >= (size_t)a.M) return;
      if (a.N > 1) {
        moe__d_logits(a, logits, (int)token);
        moe__d_softmax(prob, logits, a.N);
      } else if (lane == 0)
        prob[0] = 1.0f;
      for (int i = lane; i < a.N; i += 16)
        if ((a.masked && a.masked[i]) || (a.pruned && a.pruned[i])) taken |= 1u << (i / 16);
      for (int j = 0; j < a.k; ++j) {
        size_t choice = token * (size_t)a.k + (size_t)j;
        int expert = a.forced ? a.forced[choice] : a.N > 1 ? moe__d_next(logits, taken, a.N) : 0;
        float p;
        if (expert < 0 || expert >= a.N) expert = 0;
        if (expert % 16 == lane) taken |= 1u << (expert / 16);
        p = moe__d_sum16(expert % 16 == lane ? prob[expert] : 0.0f);
        sum += p;
        if (j % 16 == lane) a.expert[choice] = expert;
        if (j % 16 == lane) weight[j] = p;
      }
      for (int j = lane; j < a.k; j += 16)
        weight[j] = !a.renormalize ? a.scale * weight[j]
                    : sum <= 0     ? 1.0f / (float)a.k
                                   : weight[j] / sum;
    }

    /* dlogits of a token. The weight w of a choice is scale prob, or prob over the sum of the
       choices' where renormalize is 1:
         dlogit_i = prob_i (b_i - sum_j prob_j b_j + z - r) + w_i (dw_i - s)
       with b_i = balance N f_i / M, z = 2 z_loss log sum / M, w_i 0 where i was not chosen, and
       (r, s) = (q, 0) or, renormalized, (0, q), q = sum_j w_j dw_j. A thread touches its own
       experts only. */
    MOE_KERNEL(128) moe_k_route_back(moe__route_args a) {
      int lane = (int)(threadIdx.x & 15u);
      size_t token = blockIdx.x * 8u + (threadIdx.x >> 4), at = token * (size_t)a.N;
      const int *expert = a.expert + token * (size_t)a.k;
      const float *prob = a.prob + at, *weight = a.weight + token * (size_t)a.k;
      const float *dweight = a.dweight + token * (size_t)a.k;
      float *dlogits = a.dlogits + at, balance = a.loss_scale * a.balance * (float)a.N / (float)a.M;
      float sum = 0, weighted = 0, mean = 0, z = 2 * a.loss_scale * a.z_loss / (float)a.M;
      if (token >= (size_t)a.M) return;
      for (int j = 0; j < a.k; ++j) {
        sum += prob[expert[j]];
        weighted = fmaf(weight[j], dweight[j], weighted);
      }
      for (int i = lane; i < a.N; i += 16) mean += prob[i] * balance * moe__d_share(a, i);
      mean = moe__d_sum16(mean) + (a.renormalize ? 0.0f : weighted);
      if (a.z_loss > 0) mean -= z * moe__d_log_sum(a.logits + at, prob, a.N);
      for (int i = lane; i < a.N; i += 16)
        dlogits[i] = prob[i] * (balance * moe__d_share(a, i) - mean);
      for (int j = 0; j < a.k; ++j)
        if (expert[j] % 16 == lane && !(a.renormalize && sum <= 0))
          dlogits[expert[j]] += weight[j] * (dweight[j] - (a.renormalize ? weighted : 0.0f));
    })

MOE__CUDA_SOURCE(
    route_gates, 0,
    /* dx += dlogits W_g, times the jitter. 16 threads a token. */
    MOE_KERNEL(128) moe_k_route_dx(moe__route_args a) {
      size_t token = blockIdx.x * 8u + (threadIdx.x >> 4), H = (size_t)a.H;
      const float *gate, *dlogits = a.dlogits + token * (size_t)a.N;
      int s;
      if (token >= (size_t)a.M) return;
      s = moe__d_last(a.seq_start, 1, a.S, (int)token);
      gate = a.gates + (size_t)a.gate_of[s] * (size_t)a.N * H;
      for (size_t c = threadIdx.x & 15u; c < H; c += 16) {
        float sum = 0;
        for (int i = 0; i < a.N; ++i) sum = fmaf(dlogits[i], gate[(size_t)i * H + c], sum);
        if (a.keys) sum *= moe__d_noise(a, s, (int)token, (int)c);
        a.dx[token * H + c] += sum;
      }
    }

    /* dW_g += dlogits^T x over the tokens of the gate's sequences: 32 columns of 8 experts of a
       gate, the tokens of a sequence dealt to 8 lanes. */
    MOE_KERNEL(256) moe_k_route_dgates(moe__route_args a) {
      int lane = (int)(threadIdx.x >> 5), tiles = (a.H + 31) / 32;
      int c = (int)(blockIdx.x % (unsigned)tiles) * 32 + (int)(threadIdx.x & 31u);
      int first = (int)(blockIdx.x / (unsigned)tiles) * 8, n = a.N - first < 8 ? a.N - first : 8;
      float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
      float *dgates = a.dgates + ((size_t)blockIdx.y * (size_t)a.N + (size_t)first) * (size_t)a.H;
      for (int s = 0; s < a.S && c < a.H; ++s) {
        if (a.gate_of[s] != (int)blockIdx.y) continue;
        for (int t = a.seq_start[s] + lane; t < a.seq_start[s + 1]; t += 8) {
          const float *dlogits = a.dlogits + (size_t)t * (size_t)a.N + first;
          float x = a.x[(size_t)t * (size_t)a.H + (size_t)c];
          if (a.keys) x *= moe__d_noise(a, s, t, c);
          for (int q = 0; q < n; ++q) sum[q] = fmaf(dlogits[q], x, sum[q]);
        }
      }
      for (int q = 0; q < n; ++q) {
        float total = moe__d_sum8(sum[q]);
        if (lane == q && c < a.H) dgates[(size_t)q * (size_t)a.H + (size_t)c] += total;
      }
    })

/* loss = balance N sum_i f_i P_i + z_loss mean(log sum^2): sums over the 128 tokens of a part, then
   over the parts, in double. */
MOE__CUDA_SOURCE(
    route_loss, 0,
    MOE_KERNEL(128) moe_k_route_parts(moe__route_args a) {
      __shared__ double square[128];
      size_t N = (size_t)a.N, first = (size_t)blockIdx.x * 128, thread = threadIdx.x;
      size_t count = (size_t)a.M - first < 128 ? (size_t)a.M - first : 128;
      const float *prob = a.prob + first * N, *logits = a.logits + first * N;
      if (thread < count) {
        double z = (double)moe__d_log_sum(logits + thread * N, prob + thread * N, a.N);
        square[thread] = z * z;
      }
      MOE_SYNC();
      for (size_t i = thread; i <= N; i += 128) {
        double sum = 0;
        for (size_t t = 0; t < count; ++t) sum += i < N ? (double)prob[t * N + i] : square[t];
        a.parts[blockIdx.x * (N + 1) + i] = sum;
      }
    }

    MOE_KERNEL(256) moe_k_route_loss(moe__route_args a) {
      __shared__ double total[257];
      double balance = 0;
      for (int i = (int)threadIdx.x; i <= a.N; i += 256) {
        double sum = 0;
        for (int p = 0; p < a.n_parts; ++p)
          sum += a.parts[(size_t)p * ((size_t)a.N + 1) + (size_t)i];
        total[i] = i < a.N ? (double)moe__d_share(a, i) * sum / a.M : sum;
      }
      MOE_SYNC();
      if (threadIdx.x > 0) return;
      for (int i = 0; i < a.N; ++i) balance += total[i];
      *a.loss = (float)((double)a.balance * a.N * balance + (double)a.z_loss * total[a.N] / a.M);
    })

static moe__route_args moe__cuda_route_args(const moe_route_op *op) {
  const moe_routes *r = op->routes;
  const moe_route_options *o = &op->options;
  moe__route_args a;
  memset(&a, 0, sizeof a);
  a.expert = r->expert, a.weight = r->weight, a.prob = r->prob, a.start = r->start;
  a.logits = op->logits, a.loss = op->loss;
  a.x = op->x, a.gates = op->gates, a.gate_of = op->gate_of, a.seq_start = op->seq_start;
  if (o->jitter > 0) a.keys = (const unsigned long long *)(const void *)o->keys;
  a.forced = o->forced;
  if (!o->forced) a.masked = o->masked, a.pruned = o->pruned;
  a.dx = op->dx, a.dgates = op->dgates, a.dlogits = op->dlogits, a.dweight = op->dweight;
  a.scale = o->scale, a.jitter = o->jitter, a.renormalize = o->renormalize;
  a.balance = o->balance > 0 ? o->balance : 0, a.z_loss = o->z_loss > 0 ? o->z_loss : 0;
  a.loss_scale = op->loss_scale;
  a.S = op->S, a.H = op->H, a.M = r->M, a.N = r->N, a.k = r->k;
  return a;
}

static moe_status moe__cuda_route_check(const moe_route_op *op, const moe_env *env) {
  const moe_routes *r = op->routes;
  if (r->N < 1 || r->N > MOE_MAX_EXPERTS || r->k < 1 || r->k > r->N || r->M > INT32_MAX / r->k)
    return moe__cuda_fail(env, MOE_E_ARGUMENT,
                          "route: M is %d, N %d and k %d, expected 1 <= k <= N <= %d and M k below "
                          "2^31",
                          (int)r->M, (int)r->N, (int)r->k, MOE_MAX_EXPERTS);
  if (!op->options.renormalize && !(op->options.scale > 0))
    return moe__cuda_fail(env, MOE_E_ARGUMENT,
                          "route: scale is %g, expected more than 0 (moe_route_op_init sets 1)",
                          (double)op->options.scale);
  return moe__cuda_rows_check("route", op->S, r->M, op->H, 0, env);
}

static moe_status moe__cuda_route(const moe_backend *b, const moe_env *env, const moe_route_op *op,
                                  int back) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  const moe_routes *r = op->routes;
  moe__route_args a = moe__cuda_route_args(op);
  uint32_t tiles = moe__cuda_blocks((size_t)a.H, 32) * moe__cuda_blocks((size_t)a.N, 8);
  moe_status status = moe__cuda_route_check(op, env);
  if (status || (back && a.N == 1)) return status;
  if (back) {
    moe__cuda_rows(q, MOE__K_route_back, a.M, &a);
    if (a.dx) moe__cuda_rows(q, MOE__K_route_dx, a.M, &a);
    if (a.dgates) moe__cuda_run(q, MOE__K_route_dgates, tiles, (uint32_t)op->G, 256, &a);
    return q->status;
  }
  moe__sort_args sort = {r->expert, NULL, r->order, r->start, a.M * a.k, a.N};
  moe__cuda_rows(q, MOE__K_route, a.M, &a);
  moe__cuda_run(q, MOE__K_sort, (uint32_t)a.N, 1, 256, &sort);
  if (!a.loss) return q->status;
  if (a.N == 1 || a.M == 0 || !(a.balance > 0 || a.z_loss > 0))
    return moe__cuda_zero(q, a.loss, sizeof *a.loss);
  a.n_parts = (a.M - 1) / 128 + 1;
  a.parts = (double *)moe__cuda_scratch(q, (size_t)a.n_parts * ((size_t)a.N + 1) * sizeof(double));
  moe__cuda_run(q, MOE__K_route_parts, (uint32_t)a.n_parts, 1, 128, &a);
  return moe__cuda_run(q, MOE__K_route_loss, 1, 1, 256, &a);
}

/* ---- heads and losses ---- >>cuda_heads */

MOE__CUDA_SHARED(
    heads_args,
    typedef struct moe__head {
      unsigned long long at; /* of its weights */
      int classes, squared;  /* squared 1: (score - label)^2, else the cross-entropy / log C */
      int spans;             /* 0 or 2 */
      float loss, gradient;  /* factors: 1 / log C, and that or 2 over the size of the batch */
    } moe__head;
    typedef struct moe__heads_args {
      float *scores, *losses; /* as in moe_heads_op */
      const float *hidden, *w;
      const moe__head *head; /* (T) */
      const int *task;
      const float *label, *weight;
      const int *span, *seq_start;
      const unsigned long long *keys;
      float *dhidden, *dw;
      float *feature; /* (S, 3H) what the heads read, after dropout */
      float *dscore;  /* (S, max_classes) */
      float scale;
      unsigned threshold;
      int S, M, H, max_classes, overwrite;
    } moe__heads_args;)

MOE__CUDA_SOURCE(
    heads, 0,
    /* A head reads [CLS] or [CLS; span 1; span 2], spans as means of their tokens. The width. */
    __device__ static int moe__d_width(const moe__heads_args &a, int s) {
      return a.H * (1 + a.head[a.task[s]].spans);
    }

    /* The first token of such a part, 0 to 2, and how many there are. */
    __device__ static int moe__d_part(const moe__heads_args &a, int s, int part, int *first) {
      const int *span = a.span + (part ? 4 * s + 2 * part - 2 : 0);
      *first = part ? span[0] : 0;
      return part ? span[1] - span[0] : 1;
    }

    /* feature: what the head of a sequence reads, after dropout. A block for a sequence. */
    MOE_KERNEL(128) moe_k_heads_feature(moe__heads_args a) {
      int s = (int)blockIdx.x, width = moe__d_width(a, s);
      const float *rows = a.hidden + (size_t)a.seq_start[s] * (size_t)a.H;
      for (int c = (int)threadIdx.x; c < width; c += 128) {
        int first, n = moe__d_part(a, s, c / a.H, &first);
        float v = 0;
        for (int i = first; i < first + n; ++i)
          v += rows[(size_t)i * (size_t)a.H + (size_t)(c % a.H)];
        v *= 1.0f / (float)n;
        if (a.threshold) v = moe__d_drop(v, a.threshold, a.scale, a.keys[s], (size_t)c);
        a.feature[(size_t)s * 3 * (size_t)a.H + (size_t)c] = v;
      }
    }

    /* scores = W feature + b [TaG] Eq. 7 and 8, then zeros. 16 threads a score. */
    MOE_KERNEL(128) moe_k_heads_scores(moe__heads_args a) {
      size_t lane = threadIdx.x & 15u, at = blockIdx.x * 8u + (threadIdx.x >> 4), width;
      int s = (int)(at / (size_t)a.max_classes), j = (int)(at % (size_t)a.max_classes);
      const float *w, *feature = a.feature + (size_t)s * 3 * (size_t)a.H;
      const moe__head *head;
      float sum = 0;
      if (s >= a.S) return;
      head = a.head + a.task[s];
      width = (size_t)moe__d_width(a, s);
      w = a.w + head->at + (size_t)j * width;
      for (size_t c = lane; j < head->classes && c < width; c += 16)
        sum = fmaf(feature[c], w[c], sum);
      sum = moe__d_sum16(sum);
      if (lane > 0) return;
      if (j < head->classes) sum += a.w[head->at + (size_t)head->classes * width + (size_t)j];
      a.scores[at] = sum;
    }

    /* Losses [TaG] Eq. 9 and 10, and the gradients of the scores; either may be NULL. 16 threads a
       sequence. */
    MOE_KERNEL(128) moe_k_heads_loss(moe__heads_args a) {
      int lane = (int)(threadIdx.x & 15u), s = (int)(blockIdx.x * 8u + (threadIdx.x >> 4));
      const float *score = a.scores + (size_t)s * (size_t)a.max_classes;
      float *dscore = a.dscore + (size_t)s * (size_t)a.max_classes, most, sum = 0, label, loss;
      float weight;
      const moe__head *head;
      if (s >= a.S) return;
      head = a.head + a.task[s];
      label = a.label[s];
      weight = a.weight ? a.weight[s] : 1;
      most = score[0];
      for (int i = 1; i < head->classes; ++i) most = most > score[i] ? most : score[i];
      for (int i = lane; i < head->classes; i += 16) sum += moe__d_exp(score[i] - most);
      sum = moe__d_sum16(sum);
      loss = head->squared ? (score[0] - label) * (score[0] - label)
                           : head->loss * (logf(sum) - (score[(int)label] - most));
      if (a.losses && lane == 0) a.losses[s] = weight * loss;
      for (int i = lane; a.dscore && i < head->classes; i += 16) {
        float prob = moe__d_exp(score[i] - most) * (1.0f / sum);
        dscore[i] = weight * head->gradient *
                    (head->squared ? score[0] - label : prob - (i == (int)label ? 1.0f : 0.0f));
      }
    })

MOE__CUDA_SOURCE(
    heads_back, 0,
    /* dW += dscore feature^T and db += dscore over the sequences of a task, in their order: the
       first of them has the block that writes a row. */
    MOE_KERNEL(128) moe_k_heads_dw(moe__heads_args a) {
      int first = (int)(blockIdx.x / (unsigned)a.max_classes), task = a.task[first];
      int j = (int)(blockIdx.x % (unsigned)a.max_classes), classes = a.head[task].classes;
      int width = moe__d_width(a, first), c = (int)(blockIdx.y * 128u + threadIdx.x);
      float *dw = a.dw + a.head[task].at, sum;
      if (j >= classes || c > width) return;
      for (int s = 0; s < first; ++s)
        if (a.task[s] == task) return;
      dw += c < width ? (size_t)j * (size_t)width + (size_t)c
                      : (size_t)classes * (size_t)width + (size_t)j;
      sum = *dw;
      for (int s = first; s < a.S; ++s)
        if (a.task[s] == task) {
          float d = a.dscore[(size_t)s * (size_t)a.max_classes + (size_t)j];
          sum = fmaf(d, c < width ? a.feature[(size_t)s * 3 * (size_t)a.H + (size_t)c] : 1.0f, sum);
        }
      *dw = sum;
    }

    /* dhidden = or += the gradients of [CLS] and of the means of spans, each a share of dfeature =
       dropout(dscore W). 16 threads a row. */
    MOE_KERNEL(128) moe_k_heads_dhidden(moe__heads_args a) {
      size_t row = blockIdx.x * 8u + (threadIdx.x >> 4), H = (size_t)a.H, width;
      int s, token;
      const float *w, *dscore;
      const moe__head *head;
      if (row >= (size_t)a.M) return;
      s = moe__d_last(a.seq_start, 1, a.S, (int)row);
      token = (int)row - a.seq_start[s];
      head = a.head + a.task[s];
      width = (size_t)moe__d_width(a, s);
      w = a.w + head->at, dscore = a.dscore + (size_t)s * (size_t)a.max_classes;
      for (size_t c = threadIdx.x & 15u; c < H; c += 16) {
        float sum = a.overwrite ? 0.0f : a.dhidden[row * H + c];
        for (int part = 0; part <= head->spans; ++part) {
          int first, n = moe__d_part(a, s, part, &first);
          size_t at = (size_t)part * H + c;
          float d = 0;
          if (token < first || token >= first + n) continue;
          for (int j = 0; j < head->classes; ++j) d = fmaf(dscore[j], w[(size_t)j * width + at], d);
          if (a.threshold) d = moe__d_drop(d, a.threshold, a.scale, a.keys[s], at);
          sum = fmaf(1.0f / (float)n, d, sum);
        }
        a.dhidden[row * H + c] = sum;
      }
    })

/* The heads of all tasks, for the kernels: the table of kinds in moe.h (>>kinds). */
static moe_status moe__cuda_heads_table(moe__cuda_queue *q, const moe_heads_op *op,
                                        const moe_env *env, moe__heads_args *a) {
  moe__head *table = (moe__head *)calloc((size_t)op->T + 1, sizeof *table);
  double batch = op->batch_size; /* 0 in forward, which has no gradients */
  int32_t t;
  if (!table) return moe__cuda_fail(env, MOE_E_MEMORY, "heads: no memory for %d tasks", (int)op->T);
  for (t = 0; t < op->T; ++t) {
    const moe_task *task = &op->tasks[t];
    double share = task->classes > 1 ? 1 / log((double)task->classes) : 1;
    table[t].at = op->head[t];
    table[t].classes = task->classes;
    table[t].squared = task->kind == MOE_KIND_REGRESSION;
    table[t].spans = task->kind == MOE_KIND_SPAN ? 2 : 0;
    table[t].loss = (float)share;
    table[t].gradient = (float)(table[t].squared ? 2 / batch : share / batch);
  }
  a->head = (const moe__head *)moe__cuda_upload_args(q, table, (size_t)op->T * sizeof *table);
  free(table);
  return q->status;
}

static moe_status moe__cuda_heads(const moe_backend *b, const moe_env *env, const moe_heads_op *op,
                                  int back) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  size_t S = (size_t)op->S, H = (size_t)op->H, scores = S * (size_t)op->max_classes;
  moe__heads_args a;
  moe_status status = moe__cuda_rows_check("heads", op->S, op->M, op->H, op->dropout, env);
  if (status || op->S == 0) return status;
  memset(&a, 0, sizeof a);
  a.scores = op->scores, a.losses = back ? NULL : op->losses;
  a.hidden = op->hidden, a.w = op->w, a.seq_start = op->seq_start;
  a.task = op->task, a.label = op->label, a.span = op->span, a.weight = op->weight;
  a.keys = (const unsigned long long *)(const void *)op->keys;
  a.threshold = moe__cuda_drop(&a.scale, op->dropout, op->keys);
  a.dhidden = op->dhidden, a.dw = op->dw;
  a.S = op->S, a.M = op->M, a.H = op->H;
  a.max_classes = op->max_classes, a.overwrite = op->overwrite;
  status = moe__cuda_heads_table(q, op, env, &a);
  if (status) return status;
  a.feature = (float *)moe__cuda_scratch(q, S * 3 * H * sizeof(float));
  if (back) a.dscore = (float *)moe__cuda_scratch(q, scores * sizeof(float));
  moe__cuda_run(q, MOE__K_heads_feature, (uint32_t)S, 1, 128, &a);
  if (!back) moe__cuda_run(q, MOE__K_heads_scores, moe__cuda_blocks(scores, 8), 1, 128, &a);
  if (back || a.losses) moe__cuda_rows(q, MOE__K_heads_loss, op->S, &a);
  if (back && a.dw)
    moe__cuda_run(q, MOE__K_heads_dw, (uint32_t)scores, moe__cuda_blocks(3 * H + 1, 128), 128, &a);
  if (back && a.dhidden) moe__cuda_rows(q, MOE__K_heads_dhidden, op->M, &a);
  return q->status;
}

/* ---- norm of the gradients, Adam ---- >>cuda_adam
   Spans of weights are cut into tiles of 4096 elements, which are numbered through all spans; a
   block takes a tile. */

MOE__CUDA_SHARED(
    span_args,
    typedef struct moe__cuda_span {
      float *w, *g, *m, *v;
      unsigned long long count;
      int tile, frozen; /* number of its first tile; 1: g is cleared, and that is all */
      float factor, keep, one_beta1, beta2, one_beta2, step, root, eps; /* moe__adam in moe.h */
    } moe__cuda_span;
    typedef struct moe__spans_args {
      const moe__cuda_span *spans; /* (n) */
      double *parts;               /* (tiles + 1) sums of squares, and the root of all */
      int n, tiles;
    } moe__spans_args;)

MOE__CUDA_SOURCE(
    adam, 0,
    /* The span of a block's tile, and the elements [*i, *end) of it that are for a thread: each
       256th from *i on. */
    __device__ static const moe__cuda_span *moe__d_span(const moe__spans_args &a, size_t *i,
                                                        size_t *end) {
      int tile = (int)blockIdx.x;
      const moe__cuda_span *span =
          a.spans + moe__d_last(&a.spans->tile, (int)(sizeof *span / sizeof(int)), a.n, tile);
      size_t first = (size_t)(tile - span->tile) * 4096;
      *i = first + threadIdx.x;
      *end = span->count - first < 4096 ? span->count : first + 4096;
      return span;
    }

    /* Adds 256 numbers as a tree; thread 0 has the sum. */
    __device__ static double moe__d_sum256(double v) {
      __shared__ double sum[256];
      sum[threadIdx.x] = v;
      for (unsigned half = 128; half > 0; half /= 2) {
        MOE_SYNC();
        if (threadIdx.x < half) sum[threadIdx.x] += sum[threadIdx.x + half];
      }
      return sum[threadIdx.x];
    }

    /* Sum of the squares of a tile, 0 where it is frozen: 16 elements of a thread in float, so that
       a gradient above 1e19 is infinite as on the CPU, the rest in double. */
    MOE_KERNEL(256) moe_k_norm_squares(moe__spans_args a) {
      size_t i, end;
      const moe__cuda_span *span = moe__d_span(a, &i, &end);
      float sum = 0;
      double all;
      for (; !span->frozen && i < end; i += 256) sum = fmaf(span->g[i], span->g[i], sum);
      all = moe__d_sum256((double)sum);
      if (threadIdx.x == 0) a.parts[blockIdx.x] = all;
    }

    /* One block: the tiles' sums, and the root. */
    MOE_KERNEL(256) moe_k_norm_root(moe__spans_args a) {
      double sum = 0;
      for (int t = (int)threadIdx.x; t < a.tiles; t += 256) sum += a.parts[t];
      sum = moe__d_sum256(sum);
      if (threadIdx.x == 0) a.parts[a.tiles] = sqrt(sum);
    }

    /* A step of Adam on a tile, in the order of PyTorch's AdamW (see moe.h, >>optimizer): moments
       that change no weight become 0. */
    MOE_KERNEL(256) moe_k_adam(moe__spans_args a) {
      size_t i, end;
      const moe__cuda_span s = *moe__d_span(a, &i, &end);
      for (; i < end; i += 256) {
        if (!s.frozen) {
          float d = s.factor * s.g[i], m = fmaf(s.one_beta1, d - s.m[i], s.m[i]);
          float v = fmaf(s.one_beta2, d * d, s.beta2 * s.v[i]);
          m = fabsf(m) < 1e-30f ? 0.0f : m;
          v = v < 1e-37f ? 0.0f : v;
          s.m[i] = m;
          s.v[i] = v;
          s.w[i] = fmaf(-s.step, m / fmaf(sqrtf(v), s.root, s.eps), s.keep * s.w[i]);
        }
        s.g[i] = 0.0f;
      }
    })

#ifndef MOE_NO_TRAIN
/* The decimal literal that a beta was rounded from, to seven digits. */
static double moe__cuda_decimal(float x) { return floor((double)x * 1e7 + 0.5) / 1e7; }

/* The table of spans on the card. */
static moe_status moe__cuda_spans(moe__cuda_queue *q, const moe_adam_op *op, int32_t n,
                                  const moe_env *env, moe__spans_args *a) {
  moe__cuda_span *table = (moe__cuda_span *)calloc((size_t)n + 1, sizeof *table), *span = table;
  memset(a, 0, sizeof *a);
  if (!table) return moe__cuda_fail(env, MOE_E_MEMORY, "optimizer: no memory for %d spans", (int)n);
  for (; n > 0; --n, ++op) {
    double b1 = moe__cuda_decimal(op->beta1), b2 = moe__cuda_decimal(op->beta2);
    double rate = (double)op->lr * (double)op->lr_scale;
    if (op->count == 0) continue;
    span->w = op->w, span->g = op->g, span->m = op->m, span->v = op->v;
    span->count = op->count, span->tile = a->tiles, span->frozen = !(op->lr_scale > 0);
    span->factor = op->factor;
    span->keep = (float)(1 - rate * (double)op->weight_decay);
    span->one_beta1 = (float)(1 - b1);
    span->beta2 = (float)b2;
    span->one_beta2 = (float)(1 - b2);
    span->step = (float)(rate / (1 - pow(b1, (double)op->t)));
    span->root = (float)(1 / sqrt(1 - pow(b2, (double)op->t)));
    span->eps = op->eps;
    a->tiles += (int)((span++->count + 4095) / 4096);
  }
  a->n = (int)(span - table);
  a->spans = (const moe__cuda_span *)moe__cuda_upload_args(q, table, (size_t)a->n * sizeof *table);
  free(table);
  return q->status;
}

static moe_status moe__cuda_grad_norm(const moe_backend *b, const moe_env *env, double *norm,
                                      const moe_adam_op *spans, int32_t n) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe__spans_args a;
  moe_status status = moe__cuda_spans(q, spans, n, env, &a);
  if (status) return status;
  a.parts = (double *)moe__cuda_scratch(q, ((size_t)a.tiles + 1) * sizeof(double));
  moe__cuda_run(q, MOE__K_norm_squares, (uint32_t)a.tiles, 1, 256, &a);
  if (moe__cuda_run(q, MOE__K_norm_root, 1, 1, 256, &a)) return q->status;
  return moe__cuda_receive(q, norm, a.parts + a.tiles, sizeof *norm);
}

static moe_status moe__cuda_adam(const moe_backend *b, const moe_env *env, const moe_adam_op *spans,
                                 int32_t n) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe__spans_args a;
  moe_status status;
  int32_t i;
  for (i = 0; i < n; ++i)
    if (spans[i].t < 1 || !(spans[i].beta1 >= 0 && spans[i].beta1 <= 0.9999999f) ||
        !(spans[i].beta2 >= 0 && spans[i].beta2 <= 0.9999999f))
      return moe__cuda_fail(
          env, MOE_E_ARGUMENT,
          "Adam: t is %ld, beta1 %g, beta2 %g, expected 1 or more, and 0 to below 1",
          (long)spans[i].t, (double)spans[i].beta1, (double)spans[i].beta2);
  status = moe__cuda_spans(q, spans, n, env, &a);
  return status ? status : moe__cuda_run(q, MOE__K_adam, (uint32_t)a.tiles, 1, 256, &a);
}
#endif

/* ---- what is supported, the table of slots, open and close ---- >>cuda_table */

/* The program for one architecture, a string that the caller frees. NULL: no memory. */
static char *moe__cuda_source(int arch) {
  static const moe__cuda_chunk *const chunk[] = {MOE__CUDA_CHUNKS(MOE__CUDA_CHUNK) NULL};
  size_t bytes = 512, i;
  char *text;
  for (i = 0; chunk[i]; ++i) bytes += strlen(chunk[i]->text);
  text = (char *)malloc(bytes);
  if (!text) return NULL;
  snprintf(text, bytes,
           "#define MOE_SYNC() __syncthreads()\n"
           "#define MOE_UNROLL _Pragma(\"unroll\")\n"
           "#define MOE_ROLL _Pragma(\"unroll 1\")\n"
           "#define MOE_KERNEL(...) extern \"C\" __global__ void __launch_bounds__(__VA_ARGS__)\n");
  for (i = 0; chunk[i]; ++i)
    if (chunk[i]->min_arch <= arch) strcat(text, chunk[i]->text);
  return text;
}

/* Measures both makers for one kind of product of a layer: the best of four calls. */
static void moe__cuda_measure_one(const moe_backend *b, moe__cuda_queue *q, moe__cuda_choice c) {
  moe__cuda *cuda = q->cuda;
  size_t x = (size_t)c.m * (size_t)c.k, w = (size_t)c.n * (size_t)c.k;
  size_t bytes = (x + w + (size_t)c.m * (size_t)c.n) * sizeof(float);
  float best[2] = {INFINITY, INFINITY}, ms = 0, *f;
  void *from = NULL, *to = NULL;
  moe_linear_op op;
  moe__cuptr p = 0;
  int i;
  MOE__CUDA_DO(q, cuMemAlloc_v2, (&p, bytes));
  /* 0x3c3c3c3c is 0.0115: with zeros a GPU is faster than it will be */
  MOE__CUDA_DO(q, cuMemsetD8Async, (p, 0x3c, bytes, q->stream));
  MOE__CUDA_DO(q, cuEventCreate, (&from, 0));
  MOE__CUDA_DO(q, cuEventCreate, (&to, 0));
  f = (float *)(uintptr_t)p;
  memset(&op, 0, sizeof op);
  op.M = c.m, op.w = moe_mat_rows(f + x, c.n, c.k), op.overwrite = 1;
  op.x = f, op.y = f + x + w, op.dy = op.y;
  if (c.form == MOE__CUDA_NN) op.dx = f;
  if (c.form == MOE__CUDA_TN) op.dw = f + x;
  for (i = 0; i < 8; ++i) {
    q->force = i / 4;
    moe__cuda_scratch_reset(q);
    MOE__CUDA_DO(q, cuEventRecord, (from, q->stream));
    moe__cuda_linear(b, &q->env, &op, c.form != MOE__CUDA_NT);
    MOE__CUDA_DO(q, cuEventRecord, (to, q->stream));
    MOE__CUDA_DO(q, cuEventSynchronize, (to));
    MOE__CUDA_DO(q, cuEventElapsedTime, (&ms, from, to));
    if (ms < best[i / 4]) best[i / 4] = ms;
  }
  c.blas = best[1] < best[0];
  if (from) cuda->driver.cuEventDestroy_v2(from);
  if (to) cuda->driver.cuEventDestroy_v2(to);
  if (p) cuda->driver.cuMemFree_v2(p);
  MOE__CUDA_LOCK(&cuda->mutex);
  if (!q->status && cuda->choices < MOE__CUDA_CHOICES) cuda->choice[cuda->choices++] = c;
  MOE__CUDA_UNLOCK(&cuda->mutex);
}

/* Measures the linear layers of a model for full, quarter and sixteenth batches, unless that was
   done: on a queue of its own, so that a failure only leaves the choice to our own kernels. */
static void moe__cuda_measure(const moe_backend *b, const moe_env *env, const moe_config *config,
                              const moe_limits *limits) {
  moe__cuda *cuda = (moe__cuda *)b->user;
  moe_env silent = *env;
  moe__cuda_queue *q;
  moe__cuda_choice c;
  int i;
  memset(&c, 0, sizeof c);
  c.m = limits->tokens, c.k = config->hidden, c.bf16 = env->precision == MOE_TYPE_BF16;
  silent.log = NULL;
  if (!cuda->own->blas || cuda->options.maker != MOE_CUDA_MAKER_AUTO ||
      moe__cuda_choose(cuda, &c) == 1 || moe__cuda_open_queue(b, &silent, &silent.stream))
    return;
  q = moe__cuda_queue_of(b, &silent);
  if (!moe__cuda_begin(q, &silent, 0)) {
    for (i = 0; i < 18 && c.m > 0; ++i) { /* 3 batches, 3 forms, 2 layers */
      c.form = i / 2 % 3, c.n = i % 2 ? c.k : 3 * c.k;
      if (c.form == MOE__CUDA_NT || limits->training) moe__cuda_measure_one(b, q, c);
      if (i % 6 == 5) c.m /= 4;
    }
    moe__cuda_end(q, MOE_OK);
  }
  moe__cuda_close_queue(b, q);
}

static int32_t moe__cuda_supports(const moe_backend *b, const moe_env *env,
                                  const moe_config *config, const moe_limits *limits) {
  const moe__cuda *cuda = (const moe__cuda *)b->user;
  int32_t width = config->heads > 0 ? config->hidden / config->heads : 0;
  const char *why = NULL;
  if (config->unit != MOE_UNIT_FFN) why = "blocks as experts are computed on the CPU only";
  if (config->router != MOE_ROUTER_DENSE && config->router != MOE_ROUTER_SHARED &&
      config->router != MOE_ROUTER_TASK)
    why = "of the routers it has dense, shared and task gates";
  if (width < 16 || width > 128) why = "a head of attention must have 16 to 128 numbers";
  if (env->precision != MOE_TYPE_F32 && env->precision != MOE_TYPE_BF16)
    why = "env.precision must be float32 or bf16";
  if (why) {
    moe__cuda_fail(env, MOE_E_UNSUPPORTED, "%s: %s", cuda->name, why);
    return 0;
  }
  moe__cuda_measure(b, env, config, limits);
  return 1;
}

/* Ends an op. Passes do not look at its status, so that the queue keeps it. With a profile it is
   waited for, and its time is its own. */
static moe_status moe__cuda_done(moe__cuda_queue *q, moe_status status) {
  if (!q->status) q->status = status;
  return q->env.profile ? moe__cuda_wait(q) : q->status;
}

// clang-format off
#define MOE__CUDA_OP(name)                                                                         \
  MOE__CUDA_SLOT(name, 0, (const moe_backend *b, const moe_env *env,                               \
                           const struct moe_##name##_op *op, int back),                            \
                 moe__cuda_done(q, moe__cuda_##name(b, env, op, back)))
#ifndef MOE_NO_TRAIN
MOE__CUDA_SLOT(grad_norm, 1, (const moe_backend *b, const moe_env *env, double *norm,
                              const moe_adam_op *spans, int32_t n),
               moe__cuda_done(q, moe__cuda_grad_norm(b, env, norm, spans, n)))
MOE__CUDA_SLOT(adam, 0, (const moe_backend *b, const moe_env *env, const moe_adam_op *spans,
                         int32_t n), moe__cuda_done(q, moe__cuda_adam(b, env, spans, n)))
#endif
#define MOE__CUDA_OPS(X) X(linear) X(experts) X(attention) X(layernorm) X(embed) X(route) X(heads)
MOE__CUDA_OPS(MOE__CUDA_OP)
MOE__CUDA_SLOT(dropout, 0, (const moe_backend *b, const moe_env *env, const moe_dropout_op *op),
               moe__cuda_done(q, moe__cuda_dropout(b, env, op)))
// clang-format on

/* Opens the driver's library. */
static moe_status moe__cuda_open_driver(moe__cuda *cuda, const moe_env *env) {
  const char *given = cuda->options.driver, *lacks;
  char path[512];
  int at = 0;
  cuda->driver_library = moe__cuda_find(moe__cuda_driver_paths, given, cuda, &at, path);
  if (!cuda->driver_library)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "cuda: %s is not found: install the NVIDIA driver",
                          given ? given : moe__cuda_driver_paths[0]);
  lacks = moe__cuda_symbols(cuda->driver_library, moe__cuda_driver_names, &cuda->driver);
  if (!lacks) return MOE_OK;
  return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                        "cuda: the driver has no %s: install one of CUDA 11 or later", lacks);
}

/* Finds the GPU and makes a context in it current. */
static moe_status moe__cuda_open_device(moe__cuda *cuda, const moe_env *env) {
  const moe__cuda_driver *cu = &cuda->driver;
  const char *what = NULL;
  int count = 0, major = 0, minor = 0, error = 0, index = cuda->options.device;
  MOE__CUDA_TRY(cu, cuInit, (0));
  MOE__CUDA_TRY(cu, cuDriverGetVersion, (&cuda->driver_version));
  MOE__CUDA_TRY(cu, cuDeviceGetCount, (&count));
  if (!error && count < 1) error = 100;
  if (!error && (index < 0 || index >= count))
    return moe__cuda_fail(env, MOE_E_ARGUMENT,
                          "cuda:%d: there are GPUs 0 to %d (CUDA_VISIBLE_DEVICES can hide some; a "
                          "MIG instance counts as a GPU)",
                          index, count - 1);
  MOE__CUDA_TRY(cu, cuDeviceGet, (&cuda->device, index));
  MOE__CUDA_TRY(cu, cuDeviceGetName, (cuda->card, (int)sizeof cuda->card - 1, cuda->device));
  MOE__CUDA_TRY(cu, cuDeviceGetAttribute, (&major, 75, cuda->device)); /* compute capability */
  MOE__CUDA_TRY(cu, cuDeviceGetAttribute, (&minor, 76, cuda->device));
  cuda->card_arch = 10 * major + minor;
  if (!error && cuda->card_arch < 70)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "cuda:%d: %s has compute capability %d.%d, at least 7.0 is needed", index,
                          cuda->card, major, minor);
  cuda->context = cuda->options.context;
  if (!cuda->context) {
    MOE__CUDA_TRY(cu, cuDevicePrimaryCtxRetain, (&cuda->context, cuda->device));
    cuda->primary = !error;
  }
  MOE__CUDA_TRY(cu, cuCtxPushCurrent_v2, (cuda->context));
  return error ? moe__cuda_driver_fail(cu, env, index, what, error) : MOE_OK;
}

/* Opens cuBLAS, where it is wanted and found. */
static moe_status moe__cuda_open_blas(moe__cuda *cuda, const moe_env *env) {
  const char *given = cuda->options.cublas;
  int must = cuda->options.maker == MOE_CUDA_MAKER_CUBLAS, at = 0;
  char path[512];
  void *library;
  if (cuda->options.maker == MOE_CUDA_MAKER_OWN || (given && !*given && !must)) return MOE_OK;
  while ((library = moe__cuda_find(moe__cuda_cublas_paths, given, cuda, &at, path)) != NULL) {
    if (!moe__cuda_symbols(library, moe__cuda_cublas_names, &cuda->cublas)) {
      cuda->cublas_library = library;
      return MOE_OK;
    }
    MOE__CUDA_DLCLOSE(library);
  }
  if (!must) return MOE_OK;
  return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                        "cuda: %s is not found or too old: install cuBLAS 11 or later (pip install "
                        "nvidia-cublas-cu12), or use MOE_CUDA_MAKER_OWN",
                        given ? given : "libcublas.so");
}

/* Releases everything that was opened so far. */
static void moe__cuda_free(const moe_backend *b) {
  moe__cuda *cuda = (moe__cuda *)b->user;
  const moe__cuda_driver *cu = &cuda->driver;
  void *context = NULL;
  int pushed;
  while (cuda->queues) moe__cuda_close_queue(b, cuda->queues);
  while (cuda->blocks) moe__cuda_release(b, (void *)(uintptr_t)cuda->blocks->p);
  pushed = cuda->context && !cu->cuCtxPushCurrent_v2(cuda->context);
  if (pushed && cuda->module) cu->cuModuleUnload(cuda->module);
  if (pushed) cu->cuCtxPopCurrent_v2(&context);
  if (cuda->primary) cu->cuDevicePrimaryCtxRelease_v2(cuda->device);
  if (cuda->cublas_library) MOE__CUDA_DLCLOSE(cuda->cublas_library);
  if (cuda->driver_library) MOE__CUDA_DLCLOSE(cuda->driver_library);
  MOE__CUDA_MUTEX_FREE(&cuda->mutex);
  free(cuda);
}

/* Everything but the table. */
static moe_status moe__cuda_make(const moe_backend *b, moe__cuda *cuda, const moe_env *env) {
  static const char *const makers[] = {"by cuBLAS or our own kernels, as measured",
                                       "by our own kernels", "by cuBLAS"};
  void *context = NULL, *own = NULL;
  moe_status status = moe__cuda_open_driver(cuda, env);
  if (!status) status = moe__cuda_open_device(cuda, env);
  if (status) return status;
  status = moe__cuda_open_blas(cuda, env);
  if (!status) status = moe__cuda_kernels(cuda, env);
  if (!status) status = moe__cuda_open_queue(b, env, &own);
  cuda->own = (moe__cuda_queue *)own;
  cuda->counts.queues = 0; /* those of contexts are counted */
  cuda->driver.cuCtxPopCurrent_v2(&context);
  snprintf(cuda->name, sizeof cuda->name, "cuda:%d (%s, sm_%d%s; linear layers %s)",
           (int)cuda->options.device, cuda->card, cuda->card_arch,
           cuda->options.tf32 && cuda->arch >= 80 ? ", TF32" : "",
           makers[cuda->own && cuda->own->blas ? cuda->options.maker : MOE_CUDA_MAKER_OWN]);
  return status;
}

MOE_API void moe_cuda_options_init(moe_cuda_options *options) {
  memset(options, 0, sizeof *options);
}

MOE_API moe_status moe_cuda_open(moe_backend *backend, const moe_cuda_options *options,
                                 const moe_env *env) {
  moe_backend b;
  moe__cuda *cuda;
  moe_status status;
  if (options && (options->maker < MOE_CUDA_MAKER_AUTO || options->maker > MOE_CUDA_MAKER_CUBLAS ||
                  options->mirror < 0))
    return moe__cuda_fail(env, MOE_E_ARGUMENT, "moe_cuda_options: maker is %d, mirror is %d",
                          (int)options->maker, (int)options->mirror);
  if (sizeof(void *) < 8)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED, "cuda: this is not a 64-bit program");
  cuda = (moe__cuda *)calloc(1, sizeof *cuda);
  if (!cuda) return moe__cuda_fail(env, MOE_E_MEMORY, "cuda: no memory");
  MOE__CUDA_MUTEX_INIT(&cuda->mutex);
  if (options) cuda->options = *options;
  moe_backend_init(&b);
  b.memory = MOE_MEMORY_DEVICE, b.name = cuda->name, b.user = cuda;
  status = moe__cuda_make(&b, cuda, env);
  if (status) {
    moe__cuda_free(&b);
    return status;
  }
  b.mirror = cuda->options.mirror;
  b.supports = moe__cuda_supports;
  b.open = moe__cuda_open_queue, b.close = moe__cuda_close_queue;
  b.alloc = moe__cuda_alloc, b.release = moe__cuda_release;
  b.upload = moe__cuda_slot_upload, b.download = moe__cuda_slot_download;
  b.clear = moe__cuda_slot_clear, b.sync = moe__cuda_slot_sync;
#define MOE__CUDA_SET(name) b.name = moe__cuda_slot_##name;
  MOE__CUDA_OPS(MOE__CUDA_SET)
  b.dropout = moe__cuda_slot_dropout;
#ifndef MOE_NO_TRAIN
  b.grad_norm = moe__cuda_slot_grad_norm, b.adam = moe__cuda_slot_adam;
#endif
  *backend = b;
  return MOE_OK;
}

MOE_API int32_t moe_cuda_close(moe_backend *backend) {
  moe__cuda *cuda = (moe__cuda *)backend->user;
  int32_t left;
  if (!cuda) return 0;
  left = cuda->counts.allocations + cuda->counts.queues;
  moe__cuda_free(backend);
  memset(backend, 0, sizeof *backend);
  return left;
}

MOE_API void moe_cuda_count(const moe_backend *backend, moe_cuda_counts *counts) {
  moe__cuda *cuda = (moe__cuda *)backend->user;
  MOE__CUDA_LOCK(&cuda->mutex);
  *counts = cuda->counts;
  MOE__CUDA_UNLOCK(&cuda->mutex);
  counts->arch = cuda->arch;
}

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
