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
#include <unistd.h>
#endif

/* ---- opening libcuda and NVRTC at run time; errors as sentences ---- >>cuda_driver */

typedef unsigned long long moe__cuptr;          /* CUdeviceptr */
typedef struct moe__cuda moe__cuda;             /* moe_backend.user */
typedef struct moe__cuda_queue moe__cuda_queue; /* env.stream */

/* The functions of the driver, of NVRTC and of cuBLAS, X(name, arguments): all return an int, 0
   where they succeed. Where a function has versions, the symbol of the present one ends in _v2. */
#define MOE__CUDA_DRIVER(X)                                                                        \
  X(cuInit, (unsigned flags))                                                                      \
  X(cuDriverGetVersion, (int *version))                                                            \
  X(cuGetErrorName, (int error, const char **name))                                                \
  X(cuDeviceGetCount, (int *count))                                                                \
  X(cuDeviceGet, (int *device, int index))                                                         \
  X(cuDeviceGetName, (char *name, int capacity, int device))                                       \
  X(cuDeviceGetAttribute, (int *value, int attribute, int device))                                 \
  X(cuDevicePrimaryCtxRetain, (void **context, int device))                                        \
  X(cuDevicePrimaryCtxRelease_v2, (int device))                                                    \
  X(cuCtxPushCurrent_v2, (void *context))                                                          \
  X(cuCtxPopCurrent_v2, (void **context))                                                          \
  X(cuMemGetInfo_v2, (size_t * free, size_t * total))                                              \
  X(cuMemAlloc_v2, (moe__cuptr * p, size_t bytes))                                                 \
  X(cuMemFree_v2, (moe__cuptr p))                                                                  \
  X(cuMemAllocHost_v2, (void **p, size_t bytes))                                                   \
  X(cuMemFreeHost, (void *p))                                                                      \
  X(cuMemcpyHtoDAsync_v2, (moe__cuptr to, const void *from, size_t bytes, void *stream))           \
  X(cuMemcpyDtoHAsync_v2, (void *to, moe__cuptr from, size_t bytes, void *stream))                 \
  X(cuMemsetD8Async, (moe__cuptr p, unsigned char value, size_t bytes, void *stream))              \
  X(cuStreamCreate, (void **stream, unsigned flags))                                               \
  X(cuStreamDestroy_v2, (void *stream))                                                            \
  X(cuStreamSynchronize, (void *stream))                                                           \
  X(cuEventCreate, (void **event, unsigned flags))                                                 \
  X(cuEventDestroy_v2, (void *event))                                                              \
  X(cuEventRecord, (void *event, void *stream))                                                    \
  X(cuEventSynchronize, (void *event))                                                             \
  X(cuEventElapsedTime, (float *milliseconds, void *from, void *to))                               \
  X(cuModuleLoadData, (void **module, const void *image))                                          \
  X(cuModuleUnload, (void *module))                                                                \
  X(cuModuleGetFunction, (void **function, void *module, const char *name))                        \
  X(cuLaunchKernel,                                                                                \
    (void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, \
     unsigned shared, void *stream, void **arguments, void **extra))
#define MOE__CUDA_NVRTC(X)                                                                         \
  X(nvrtcVersion, (int *major, int *minor))                                                        \
  X(nvrtcGetNumSupportedArchs, (int *count))                                                       \
  X(nvrtcGetSupportedArchs, (int *archs))                                                          \
  X(nvrtcCreateProgram, (void **program, const char *source, const char *name, int headers,        \
                         const char *const *header, const char *const *include))                   \
  X(nvrtcDestroyProgram, (void **program))                                                         \
  X(nvrtcCompileProgram, (void *program, int count, const char *const *option))                    \
  X(nvrtcGetProgramLogSize, (void *program, size_t *bytes))                                        \
  X(nvrtcGetProgramLog, (void *program, char *log))                                                \
  X(nvrtcGetPTXSize, (void *program, size_t *bytes))                                               \
  X(nvrtcGetPTX, (void *program, char *ptx))                                                       \
  X(nvrtcGetCUBINSize, (void *program, size_t *bytes))                                             \
  X(nvrtcGetCUBIN, (void *program, char *cubin))
#define MOE__CUDA_CUBLAS(X)                                                                        \
  X(cublasCreate_v2, (void **handle))                                                              \
  X(cublasDestroy_v2, (void *handle))                                                              \
  X(cublasSetStream_v2, (void *handle, void *stream))                                              \
  X(cublasSetMathMode, (void *handle, int mode))                                                   \
  X(cublasGemmEx, (void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha, \
                   const void *a, int a_type, int a_row, const void *b, int b_type, int b_row,     \
                   const void *beta, void *c, int c_type, int c_row, int compute, int algorithm))

#ifdef _WIN32
#define MOE__CUDA_CALL __stdcall
#else
#define MOE__CUDA_CALL
#endif
#define MOE__CUDA_MEMBER(name, arguments) int(MOE__CUDA_CALL * name) arguments;
#define MOE__CUDA_NAME(name, arguments) #name,
typedef struct moe__cuda_driver {
  MOE__CUDA_DRIVER(MOE__CUDA_MEMBER)
} moe__cuda_driver;
typedef struct moe__cuda_nvrtc {
  MOE__CUDA_NVRTC(MOE__CUDA_MEMBER)
} moe__cuda_nvrtc;
typedef struct moe__cuda_cublas {
  MOE__CUDA_CUBLAS(MOE__CUDA_MEMBER)
} moe__cuda_cublas;
static const char *const moe__cuda_driver_names[] = {MOE__CUDA_DRIVER(MOE__CUDA_NAME) NULL};
static const char *const moe__cuda_nvrtc_names[] = {MOE__CUDA_NVRTC(MOE__CUDA_NAME) NULL};
static const char *const moe__cuda_cublas_names[] = {MOE__CUDA_CUBLAS(MOE__CUDA_NAME) NULL};
#undef MOE__CUDA_MEMBER
#undef MOE__CUDA_NAME

/* Where the libraries are, the newest first; %d of NVRTC and cuBLAS is the major version. */
#ifdef _WIN32
static const char *const moe__cuda_driver_paths[] = {"nvcuda.dll", NULL};
static const char *const moe__cuda_nvrtc_paths[] = {"nvrtc64_%d0_0.dll", "nvrtc64_%d2_0.dll", NULL};
static const char *const moe__cuda_cublas_paths[] = {"cublas64_%d.dll", NULL};
#else
static const char *const moe__cuda_driver_paths[] = {"libcuda.so.1", "libcuda.so",
                                                     "/usr/lib/wsl/lib/libcuda.so.1", NULL};
static const char *const moe__cuda_nvrtc_paths[] = {"libnvrtc.so.%d", "libnvrtc.so.%d.2",
                                                    "/usr/local/cuda-%d/lib64/libnvrtc.so",
                                                    "/usr/local/cuda/lib64/libnvrtc.so.%d", NULL};
static const char *const moe__cuda_cublas_paths[] = {"libcublas.so.%d",
                                                     "/usr/local/cuda-%d/lib64/libcublas.so",
                                                     "/usr/local/cuda/lib64/libcublas.so.%d", NULL};
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

static void *moe__cuda_dlopen(const char *path) {
#ifdef _WIN32
  return (void *)LoadLibraryA(path);
#else
  return dlopen(path, RTLD_NOW | RTLD_LOCAL);
#endif
}

static void moe__cuda_dlclose(void *library) {
  if (!library) return;
#ifdef _WIN32
  FreeLibrary((HMODULE)library);
#else
  dlclose(library);
#endif
}

/* Fills a table of functions, which is an array of pointers. Returns the first name that the
   library lacks, or NULL. */
static const char *moe__cuda_symbols(void *library, const char *const *names, void *table) {
  size_t i;
  for (i = 0; names[i]; ++i) {
#ifdef _WIN32
    FARPROC symbol = GetProcAddress((HMODULE)library, names[i]);
#else
    void *symbol = dlsym(library, names[i]);
#endif
    if (!symbol) return names[i];
    memcpy((char *)table + i * sizeof symbol, &symbol, sizeof symbol);
  }
  return NULL;
}

/* What to do about an error of the driver: a table of those that people meet. */
static const struct {
  int error;
  const char *advice;
} moe__cuda_advice[] = {
    {2, "the GPU has no memory left: use smaller micro-batches, or free it from other programs"},
    {34, "this libcuda.so is the toolkit's stub: install the NVIDIA driver"},
    {36, "the driver is older than this libcuda.so: install them together"},
    {46, "another program has the GPU for itself (nvidia-smi shows which, and the compute mode)"},
    {100, "no GPU is visible: see nvidia-smi, CUDA_VISIBLE_DEVICES and, with MIG, its instances"},
    {101, "see nvidia-smi and CUDA_VISIBLE_DEVICES for the GPUs that there are"},
    {200, "the compiled kernels are damaged: delete the cache file"},
    {201, "the CUDA context is no longer valid: open the GPU again"},
    {209, "the kernels were compiled for another GPU: delete the cache file"},
    {214, "the GPU's memory has an error that cannot be corrected: reset the GPU, see dmesg"},
    {218, "the driver does not understand this PTX: update it, or install an older NVRTC"},
    {222, "NVRTC is newer than the driver: update the driver, or install an older NVRTC"},
    {700, "a kernel read or wrote outside its memory, which is a mistake in moe_cuda.h"},
    {702, "a kernel ran into the watchdog of the display: use a GPU without one"},
    {709, "the CUDA context was destroyed: open the GPU again"},
    {716, "a kernel read or wrote a misaligned address, which is a mistake in moe_cuda.h"},
    {719, "a kernel failed: the GPU may be lost, see dmesg"},
    {802, "the system is not ready: start nvidia-fabricmanager"},
    {803, "driver and libcuda.so have different versions: reboot, or install them together"},
    {999, "the GPU may be lost: see nvidia-smi and dmesg, then reload the driver or reboot"},
};

static const char *moe__cuda_advise(int error) {
  size_t i;
  for (i = 0; i < sizeof moe__cuda_advice / sizeof *moe__cuda_advice; ++i)
    if (moe__cuda_advice[i].error == error) return moe__cuda_advice[i].advice;
  return "see nvidia-smi and dmesg";
}

/* The status that fits an error of the driver. */
static moe_status moe__cuda_status(int error) {
  if (error == 0) return MOE_OK;
  if (error == 2) return MOE_E_MEMORY;
  return error == 34 || error == 100 || error == 218 || error == 222 || error == 803
             ? MOE_E_UNSUPPORTED
             : MOE_E_IO;
}

/* Whether the whole CUDA context is lost: no later call in it can succeed. */
static int moe__cuda_is_loss(int error) {
  return error == 201 || error == 214 || error == 709 || (error >= 700 && error <= 720) ||
         error == 999 || error == 4;
}

/* Reports that call `what` of the driver failed. */
static moe_status moe__cuda_driver_fail(const moe__cuda_driver *cu, const moe_env *env, int index,
                                        const char *what, int error) {
  const char *name = NULL;
  if (cu->cuGetErrorName(error, &name) || !name) name = "unknown error";
  return moe__cuda_fail(env, moe__cuda_status(error), "cuda:%d: %s: %s (%d): %s", index, what, name,
                        error, moe__cuda_advise(error));
}

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

/* State of a backend. What several threads may change is behind `mutex`; `driver`, `kernel` and so
   on are constant after moe_cuda_open. */
#ifdef _WIN32
typedef CRITICAL_SECTION moe__cuda_mutex;
#define MOE__CUDA_LOCK(m) EnterCriticalSection(m)
#define MOE__CUDA_UNLOCK(m) LeaveCriticalSection(m)
#else
typedef pthread_mutex_t moe__cuda_mutex;
#define MOE__CUDA_LOCK(m) pthread_mutex_lock(m)
#define MOE__CUDA_UNLOCK(m) pthread_mutex_unlock(m)
#endif

enum { MOE__CUDA_CHOICES = 64 };
/* Which maker is faster for one kind of product: see moe__cuda_blas_serves. */
typedef struct moe__cuda_choice {
  int kind, bf16;
  int32_t m, n, k;
  int blas;
  float own_ms, blas_ms;
} moe__cuda_choice;

/* Memory of the card. */
typedef struct moe__cuda_block {
  moe__cuptr p;
  size_t bytes;
} moe__cuda_block;

struct moe__cuda {
  moe_cuda_options options;
  moe__cuda_driver driver;
  moe__cuda_cublas cublas;
  void *driver_library, *cublas_library;     /* cublas_library NULL: cuBLAS is not used */
  int device, primary, arch, driver_version; /* arch: of the kernels, the GPU's or a lower one */
  int card_arch;
  void *context, *module;
  void *kernel[MOE__K_COUNT + 1];
  char card[96], name[256];
  moe__cuda_mutex mutex;
  int lost;                    /* an error of the driver after which no call can succeed, or 0 */
  moe__cuda_block *allocation; /* those of moe_backend.alloc: counts.allocations of them */
  int32_t allocation_room;
  moe__cuda_queue *queues, *own; /* a list; the queue of env.stream NULL */
  moe_cuda_counts counts;
  moe__cuda_choice choice[MOE__CUDA_CHOICES];
  int choices;
};

/* What NVRTC made: CUBIN, or PTX with its ending zero. */
typedef struct moe__cuda_image {
  int arch;
  size_t bytes;
  char *data;
} moe__cuda_image;

static const moe__cuda_chunk *const *moe__cuda_chunks(void); /* >>cuda_table */

/* The program for one architecture, a string that the caller frees. NULL: no memory. */
static char *moe__cuda_source(int arch) {
  const moe__cuda_chunk *const *chunk = moe__cuda_chunks();
  size_t bytes = 128, i;
  char *text;
  for (i = 0; chunk[i]; ++i) bytes += strlen(chunk[i]->text);
  text = (char *)malloc(bytes);
  if (!text) return NULL;
  snprintf(text, bytes, "#define MOE_ARCH %d\n#define MOE_SYNC() __syncthreads()\n", arch);
  for (i = 0; chunk[i]; ++i)
    if (chunk[i]->min_arch <= arch) strcat(text, chunk[i]->text);
  return text;
}

/* FNV-1a. */
static uint64_t moe__cuda_hash(uint64_t hash, const void *data, size_t bytes) {
  const unsigned char *p = (const unsigned char *)data;
  size_t i;
  for (i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 0x100000001b3u;
  return hash;
}

/* What the image in a cache file must have been made of. */
static uint64_t moe__cuda_key(const moe__cuda *cuda, const char *source) {
  uint64_t hash = moe__cuda_hash(0xcbf29ce484222325u, source, strlen(source));
  hash = moe__cuda_hash(hash, &cuda->card_arch, sizeof cuda->card_arch);
  hash = moe__cuda_hash(hash, &cuda->options.ptx, sizeof cuda->options.ptx);
  return moe__cuda_hash(hash, cuda->card, strlen(cuda->card));
}

/* The cache file: this head, then the image. */
typedef struct moe__cuda_cached {
  char magic[8];
  uint64_t key, arch, bytes, hash;
} moe__cuda_cached;
static const char moe__cuda_magic[8] = {'M', 'O', 'E', 'C', 'U', 'D', 'A', '1'};

/* Reads the cache file; 0: there is none of this key, or it is damaged. */
static int moe__cuda_cache_read(const char *path, uint64_t key, moe__cuda_image *image) {
  moe__cuda_cached head;
  FILE *file = fopen(path, "rb");
  int good;
  if (!file) return 0;
  good = fread(&head, sizeof head, 1, file) == 1 && !memcmp(head.magic, moe__cuda_magic, 8) &&
         head.key == key && head.bytes > 0 && head.bytes < (uint64_t)1 << 30;
  image->data = good ? (char *)malloc((size_t)head.bytes + 1) : NULL;
  good = image->data && fread(image->data, (size_t)head.bytes, 1, file) == 1 &&
         fgetc(file) == EOF && moe__cuda_hash(key, image->data, (size_t)head.bytes) == head.hash;
  fclose(file);
  if (!good) {
    free(image->data);
    image->data = NULL;
    return 0;
  }
  image->bytes = (size_t)head.bytes;
  image->arch = (int)head.arch;
  image->data[image->bytes] = 0;
  return 1;
}

/* Writes the cache file beside its place and moves it there, so that nobody reads half of one. A
   failure is only reported: the kernels are there. */
static void moe__cuda_cache_write(const moe__cuda *cuda, uint64_t key, const moe__cuda_image *image,
                                  const moe_env *env) {
  moe__cuda_cached head;
  const char *path = cuda->options.cache;
  size_t room = strlen(path) + 64;
  char *temporary = (char *)malloc(room);
  FILE *file = NULL;
  int good = 0;
  memset(&head, 0, sizeof head);
  memcpy(head.magic, moe__cuda_magic, 8);
  head.key = key, head.arch = (uint64_t)image->arch, head.bytes = image->bytes;
  head.hash = moe__cuda_hash(key, image->data, image->bytes);
  if (temporary) {
#ifdef _WIN32
    unsigned long process = GetCurrentProcessId();
#else
    unsigned long process = (unsigned long)getpid();
#endif
    snprintf(temporary, room, "%s.%lx.%llx", path, process, (unsigned long long)(uintptr_t)cuda);
    file = fopen(temporary, "wb");
  }
  if (file) {
    good =
        fwrite(&head, sizeof head, 1, file) == 1 && fwrite(image->data, image->bytes, 1, file) == 1;
    good = !fclose(file) && good;
#ifdef _WIN32
    good = good && MoveFileExA(temporary, path, MOVEFILE_REPLACE_EXISTING);
#else
    good = good && !rename(temporary, path);
#endif
    if (!good) remove(temporary);
  }
  if (!good)
    moe__cuda_fail(env, MOE_E_IO,
                   "cuda:%d: the cache file %s cannot be written; the next start compiles again",
                   (int)cuda->options.device, path);
  free(temporary);
}

/* The architecture to compile for: the card's, or the highest below it that this NVRTC knows, as
   PTX. 0: none. */
static int moe__cuda_target(const moe__cuda_nvrtc *rtc, int card, int *ptx) {
  int count = 0, best = 0, i, *arch;
  if (rtc->nvrtcGetNumSupportedArchs(&count) || count < 1) return 0;
  arch = (int *)malloc((size_t)count * sizeof *arch);
  if (arch && !rtc->nvrtcGetSupportedArchs(arch))
    for (i = 0; i < count; ++i)
      if (arch[i] <= card && arch[i] > best) best = arch[i];
  free(arch);
  if (best < card) *ptx = 1;
  return best >= 70 ? best : 0;
}

/* Reports why NVRTC does not compile: its log. */
static moe_status moe__cuda_compile_fail(const moe__cuda_nvrtc *rtc, void *program, int error,
                                         const char *what, const moe_env *env) {
  size_t bytes = 0;
  char *log = NULL;
  if (program && !rtc->nvrtcGetProgramLogSize(program, &bytes) && bytes)
    log = (char *)calloc(bytes + 1, 1);
  if (log && rtc->nvrtcGetProgramLog(program, log)) log[0] = 0;
  moe__cuda_fail(env, error == 1 ? MOE_E_MEMORY : MOE_E_UNSUPPORTED,
                 "NVRTC: %s returned %d: install another version of it%s%.600s", what, error,
                 log && log[0] ? ": " : "", log ? log : "");
  free(log);
  return error == 1 ? MOE_E_MEMORY : MOE_E_UNSUPPORTED;
}

/* Compiles the program: image->arch is set, image->data is to be freed. */
static moe_status moe__cuda_compile(const moe__cuda_nvrtc *rtc, int ptx, moe__cuda_image *image,
                                    const moe_env *env) {
  char *source = moe__cuda_source(image->arch), option[48];
  const char *options[2] = {option, "--std=c++11"};
  void *program = NULL;
  const char *what = "nvrtcCreateProgram";
  int error;
  if (!source) return moe__cuda_fail(env, MOE_E_MEMORY, "cuda: no memory for the source");
  snprintf(option, sizeof option, "--gpu-architecture=%s_%d", ptx ? "compute" : "sm", image->arch);
  error = rtc->nvrtcCreateProgram(&program, source, "moe_cuda.cu", 0, NULL, NULL);
  free(source);
  if (!error) what = "nvrtcCompileProgram", error = rtc->nvrtcCompileProgram(program, 2, options);
  if (!error)
    what = "the size of the compiled kernels",
    error = ptx ? rtc->nvrtcGetPTXSize(program, &image->bytes)
                : rtc->nvrtcGetCUBINSize(program, &image->bytes);
  if (!error) {
    what = "copying the compiled kernels";
    image->data = (char *)calloc(image->bytes + 1, 1);
    error = !image->data ? 1
            : ptx        ? rtc->nvrtcGetPTX(program, image->data)
                         : rtc->nvrtcGetCUBIN(program, image->data);
  }
  if (error) {
    free(image->data);
    image->data = NULL;
    moe__cuda_compile_fail(rtc, program, error, what, env);
  }
  if (program) rtc->nvrtcDestroyProgram(&program);
  return !error ? MOE_OK : error == 1 ? MOE_E_MEMORY : MOE_E_UNSUPPORTED;
}

/* Gives the image to the driver and looks up its kernels. */
static moe_status moe__cuda_module(moe__cuda *cuda, const moe__cuda_image *image,
                                   const moe_env *env) {
#define MOE__CUDA_ROW(name, min_arch) {"moe_k_" #name, min_arch},
  static const struct {
    const char *name;
    int min_arch;
  } kernel[] = {MOE__CUDA_KERNELS(MOE__CUDA_ROW){NULL, 0}};
#undef MOE__CUDA_ROW
  const moe__cuda_driver *cu = &cuda->driver;
  const char *what = "cuModuleLoadData";
  int error = cu->cuModuleLoadData(&cuda->module, image->data), i;
  if (error) cuda->module = NULL;
  for (i = 0; !error && kernel[i].name; ++i) {
    what = kernel[i].name;
    cuda->kernel[i] = NULL;
    if (kernel[i].min_arch <= image->arch)
      error = cu->cuModuleGetFunction(&cuda->kernel[i], cuda->module, what);
  }
  cuda->arch = image->arch;
  if (!error) return MOE_OK;
  moe__cuda_driver_fail(cu, env, cuda->options.device, what, error);
  if (cuda->module) cu->cuModuleUnload(cuda->module);
  cuda->module = NULL;
  return moe__cuda_status(error);
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
  image->arch = moe__cuda_target(&rtc, cuda->card_arch, &ptx);
  if (!image->arch)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "%s: NVRTC %d.%d does not compile for this GPU (sm_%d): install another "
                          "version of it",
                          path, major, minor, cuda->card_arch);
  status = moe__cuda_compile(&rtc, ptx, image, env);
  return status ? status : moe__cuda_module(cuda, image, env);
}

/* Opens the next library of a list of paths with %d: of the driver's major version, then older
   ones, then newer ones. *at says where to go on. NULL: no more. */
static void *moe__cuda_find(const char *const *paths, int driver_major, int *at, char *path,
                            size_t room) {
  int count = 0, majors = MOE__CUDA_NEWEST - MOE__CUDA_OLDEST + 1, own = driver_major;
  while (paths[count]) ++count;
  if (own > MOE__CUDA_NEWEST) own = MOE__CUDA_NEWEST;
  if (own < MOE__CUDA_OLDEST) own = MOE__CUDA_OLDEST;
  for (; *at < count * majors; ++*at) {
    int turn = *at / count, older = own - MOE__CUDA_OLDEST;
    int major = turn <= older ? own - turn : own + turn - older;
    const char *form = paths[*at % count], *mark = strstr(form, "%d");
    void *library;
    snprintf(path, room, "%.*s%d%s", (int)(mark - form), form, major, mark + 2);
    library = moe__cuda_dlopen(path);
    if (library) return ++*at, library;
  }
  return NULL;
}

/* Makes the kernels with the first NVRTC that can. */
static moe_status moe__cuda_build(moe__cuda *cuda, moe__cuda_image *image, const moe_env *env) {
  const char *given = cuda->options.nvrtc;
  char path[512];
  int at = 0, found = 0;
  moe_status status = MOE_E_UNSUPPORTED;
  for (;;) {
    void *library = given ? moe__cuda_dlopen(given)
                          : moe__cuda_find(moe__cuda_nvrtc_paths, cuda->driver_version / 1000, &at,
                                           path, sizeof path);
    if (!library) break;
    found = 1;
    status = moe__cuda_build_with(cuda, library, given ? given : path, image, env);
    moe__cuda_dlclose(library);
    if (!status || given) return status;
    free(image->data);
    image->data = NULL;
  }
  if (!found)
    moe__cuda_fail(env, status,
                   "cuda:%d: %s is not found: install NVRTC (pip install nvidia-cuda-nvrtc-cu12, "
                   "or CUDA's toolkit) and name it in moe_cuda_options.nvrtc or LD_LIBRARY_PATH",
                   (int)cuda->options.device, given ? given : "libnvrtc.so");
  return status;
}

/* The kernels for this card: from the cache file, or compiled. */
static moe_status moe__cuda_kernels(moe__cuda *cuda, const moe_env *env) {
  moe__cuda_image image = {0, 0, NULL};
  moe_env silent = *env;
  char *source = moe__cuda_source(cuda->card_arch);
  uint64_t key;
  moe_status status = MOE_E_IO;
  if (!source) return moe__cuda_fail(env, MOE_E_MEMORY, "cuda: no memory for the source");
  key = moe__cuda_key(cuda, source);
  free(source);
  silent.log = NULL;
  if (cuda->options.cache && moe__cuda_cache_read(cuda->options.cache, key, &image))
    status = moe__cuda_module(cuda, &image, &silent);
  if (status) {
    free(image.data);
    image.data = NULL;
    status = moe__cuda_build(cuda, &image, env);
    if (!status && cuda->options.cache) moe__cuda_cache_write(cuda, key, &image, env);
  }
  free(image.data);
  return status;
}

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
static int moe__cuda_arch(const moe__cuda_queue *q); /* 70, 75, 80, ... */
static int moe__cuda_tf32(const moe__cuda_queue *q); /* 1: float32 products in TF32 */

enum {
  MOE__CUDA_ALIGN = 256,
  MOE__CUDA_STAGING = 1 << 20, /* bytes of a queue's pinned buffer */
  MOE__CUDA_SCRATCH = 1 << 20, /* least bytes of a block of scratch */
  MOE__CUDA_KEPT = 1 << 18,    /* bytes of arguments that stay on the card */
  MOE__CUDA_KEEP = 64          /* arrays among them */
};

/* A queue: a stream, and the memory that its slots use. */
struct moe__cuda_queue {
  moe__cuda *cuda;
  moe__cuda_queue *next;
  moe__cuda_mutex mutex;
  void *stream;
  int owns_stream;
  moe_status status; /* the first failure, which every later call returns */
  moe_env env;       /* of the present call: log, precision, profile */
  struct {
    moe__cuptr p;
    size_t bytes, used;
  } scratch[32];
  int scratch_blocks;
  char *staging; /* pinned memory of the host: copies to the card wait here */
  size_t staging_used;
  moe__cuptr kept;
  size_t kept_used;
  struct {
    uint64_t hash;
    size_t at, bytes;
    void *copy; /* NULL: seen once */
  } keep[MOE__CUDA_KEEP];
  int keeps;
  void *blas; /* cuBLAS's handle */
  int force;  /* while makers are measured: 0 own kernels, 1 cuBLAS; else -1 */
};

static moe__cuda_queue *moe__cuda_queue_of(const moe_backend *b, const moe_env *env) {
  moe__cuda *cuda = (moe__cuda *)b->user;
  return env->stream ? (moe__cuda_queue *)env->stream : cuda->own;
}

static int moe__cuda_arch(const moe__cuda_queue *q) { return q->cuda->arch; }

static int moe__cuda_tf32(const moe__cuda_queue *q) {
  return q->cuda->options.tf32 && q->cuda->arch >= 80;
}

/* Notes the result of a call of the driver. The first failure stays. */
static moe_status moe__cuda_note(moe__cuda_queue *q, const char *what, int error) {
  moe__cuda *cuda = q->cuda;
  if (!error) return MOE_OK;
  if (moe__cuda_is_loss(error)) {
    MOE__CUDA_LOCK(&cuda->mutex);
    if (!cuda->lost) cuda->lost = error;
    MOE__CUDA_UNLOCK(&cuda->mutex);
  }
  if (!q->status) {
    q->status = moe__cuda_status(error);
    moe__cuda_driver_fail(&cuda->driver, &q->env, cuda->options.device, what, error);
  }
  return q->status;
}

/* Waits for all work of the queue; its staging buffer is then free. */
static moe_status moe__cuda_wait(moe__cuda_queue *q) {
  if (q->status) return q->status;
  if (moe__cuda_note(q, "cuStreamSynchronize", q->cuda->driver.cuStreamSynchronize(q->stream)))
    return q->status;
  q->staging_used = 0;
  return MOE_OK;
}

/* The error with which the GPU was lost, or 0. */
static int moe__cuda_lost(moe__cuda *cuda) {
  int lost;
  MOE__CUDA_LOCK(&cuda->mutex);
  lost = cuda->lost;
  MOE__CUDA_UNLOCK(&cuda->mutex);
  return lost;
}

/* Begins a call of moe.h: locks the queue and makes the context current. Where it fails, nothing is
   to be ended. A call that waits says again that the queue has failed. */
static moe_status moe__cuda_begin(moe__cuda_queue *q, const moe_env *env, int waits) {
  moe__cuda *cuda = q->cuda;
  int lost = moe__cuda_lost(cuda);
  moe_status status;
  MOE__CUDA_LOCK(&q->mutex);
  q->env = *env;
  if (q->status && waits)
    moe__cuda_fail(env, q->status,
                   "cuda:%d: an earlier call of this context failed: it can only be freed",
                   (int)cuda->options.device);
  if (lost) moe__cuda_note(q, "a call after the GPU was lost", lost);
  if (!q->status)
    moe__cuda_note(q, "cuCtxPushCurrent", cuda->driver.cuCtxPushCurrent_v2(cuda->context));
  status = q->status;
  if (status && q == cuda->own && !moe__cuda_lost(cuda)) q->status = MOE_OK;
  if (status) MOE__CUDA_UNLOCK(&q->mutex);
  return status;
}

/* Ends it, with the status of the call, or of the queue. A failure of a context's queue stays; the
   backend's own queue goes on unless the GPU is lost. */
static moe_status moe__cuda_end(moe__cuda_queue *q, moe_status status) {
  void *context = NULL;
  q->cuda->driver.cuCtxPopCurrent_v2(&context);
  if (q->status) status = q->status;
  if (q == q->cuda->own && !moe__cuda_lost(q->cuda)) q->status = MOE_OK;
  MOE__CUDA_UNLOCK(&q->mutex);
  return status;
}

/* Adds to a number of moe_cuda_counts. */
static void moe__cuda_tally(moe__cuda *cuda, int64_t *number, int64_t add) {
  MOE__CUDA_LOCK(&cuda->mutex);
  *number += add;
  MOE__CUDA_UNLOCK(&cuda->mutex);
}

/* Memory of the card for this file's own use; the context is current. */
static moe_status moe__cuda_take(moe__cuda_queue *q, size_t bytes, moe__cuptr *p) {
  moe__cuda *cuda = q->cuda;
  int error = cuda->driver.cuMemAlloc_v2(p, bytes ? bytes : 1);
  if (error) {
    *p = 0;
    return moe__cuda_note(q, "cuMemAlloc of scratch", error);
  }
  moe__cuda_tally(cuda, &cuda->counts.bytes, (int64_t)bytes);
  return MOE_OK;
}

static void moe__cuda_give(moe__cuda *cuda, moe__cuptr p, size_t bytes) {
  if (!p) return;
  cuda->driver.cuMemFree_v2(p);
  moe__cuda_tally(cuda, &cuda->counts.bytes, -(int64_t)bytes);
}

static void moe__cuda_scratch_free(moe__cuda_queue *q) {
  int i;
  for (i = 0; i < q->scratch_blocks; ++i)
    moe__cuda_give(q->cuda, q->scratch[i].p, q->scratch[i].bytes);
  q->scratch_blocks = 0;
}

/* Work that was queued may still use the scratch, but what comes next is queued behind it. Several
   blocks are joined into one, so that a queue soon has a single one that is large enough. */
static void moe__cuda_scratch_reset(moe__cuda_queue *q) {
  size_t total = 0;
  int i;
  for (i = 0; i < q->scratch_blocks; ++i) {
    total += q->scratch[i].bytes;
    q->scratch[i].used = 0;
  }
  if (q->scratch_blocks < 2 || moe__cuda_wait(q)) return;
  moe__cuda_scratch_free(q);
  if (moe__cuda_take(q, total, &q->scratch[0].p)) return;
  q->scratch[0].bytes = total, q->scratch[0].used = 0;
  q->scratch_blocks = 1;
}

static moe_status moe__cuda_scratch(moe__cuda_queue *q, size_t bytes, void **out) {
  size_t need, most = (size_t)-1 - MOE__CUDA_ALIGN;
  int i = q->scratch_blocks - 1;
  if (q->status) return q->status;
  if (bytes > most) return moe__cuda_note(q, "scratch beyond the address space", 2);
  need = (bytes / MOE__CUDA_ALIGN + 1) * MOE__CUDA_ALIGN;
  if (i < 0 || q->scratch[i].bytes - q->scratch[i].used < need) {
    size_t block = need > MOE__CUDA_SCRATCH ? need : MOE__CUDA_SCRATCH;
    if (++i == (int)(sizeof q->scratch / sizeof *q->scratch))
      return moe__cuda_note(q, "too many blocks of scratch", 2);
    if (moe__cuda_take(q, block, &q->scratch[i].p)) return q->status;
    q->scratch[i].bytes = block, q->scratch[i].used = 0;
    q->scratch_blocks = i + 1;
  }
  *out = (void *)(uintptr_t)(q->scratch[i].p + q->scratch[i].used);
  q->scratch[i].used += need;
  return MOE_OK;
}

/* `bytes` of the pinned buffer, or NULL: too large, or there is no pinned memory. */
static char *moe__cuda_stage(moe__cuda_queue *q, size_t bytes) {
  char *p;
  if (bytes > MOE__CUDA_STAGING) return NULL;
  if (!q->staging) {
    void *made = NULL;
    if (q->cuda->driver.cuMemAllocHost_v2(&made, MOE__CUDA_STAGING)) return NULL;
    q->staging = (char *)made;
  }
  if (MOE__CUDA_STAGING - q->staging_used < bytes && moe__cuda_wait(q)) return NULL;
  p = q->staging + q->staging_used;
  bytes = (bytes + 63) / 64 * 64;
  q->staging_used += bytes;
  if (q->staging_used > MOE__CUDA_STAGING) q->staging_used = MOE__CUDA_STAGING;
  return p;
}

/* To the card; `host` may change afterwards. */
static moe_status moe__cuda_send(moe__cuda_queue *q, moe__cuptr to, const void *host,
                                 size_t bytes) {
  char *staged;
  int error;
  if (q->status || !bytes) return q->status;
  staged = moe__cuda_stage(q, bytes);
  if (q->status) return q->status;
  if (staged) memcpy(staged, host, bytes);
  error = q->cuda->driver.cuMemcpyHtoDAsync_v2(to, staged ? staged : (const char *)host, bytes,
                                               q->stream);
  if (error) return moe__cuda_note(q, "cuMemcpyHtoDAsync", error);
  return staged ? MOE_OK : moe__cuda_wait(q);
}

/* From the card. `host` receives all or nothing, so that a failure leaves what is there whole. */
static moe_status moe__cuda_receive(moe__cuda_queue *q, void *host, moe__cuptr from, size_t bytes) {
  char *staged, *copy = NULL;
  if (q->status || !bytes) return q->status ? q->status : moe__cuda_wait(q);
  staged = moe__cuda_stage(q, bytes);
  if (!staged && !q->status) {
    staged = copy = (char *)malloc(bytes);
    if (!copy)
      return moe__cuda_fail(&q->env, MOE_E_MEMORY,
                            "cuda:%d: the host has no memory for a download of %llu bytes",
                            (int)q->cuda->options.device, (unsigned long long)bytes);
  }
  if (!q->status)
    moe__cuda_note(q, "cuMemcpyDtoHAsync",
                   q->cuda->driver.cuMemcpyDtoHAsync_v2(staged, from, bytes, q->stream));
  if (!moe__cuda_wait(q)) memcpy(host, staged, bytes);
  free(copy);
  return q->status;
}

static moe_status moe__cuda_peek(moe__cuda_queue *q, void *host, const void *from, size_t bytes) {
  return moe__cuda_receive(q, host, (moe__cuptr)(uintptr_t)from, bytes);
}

static moe_status moe__cuda_zero(moe__cuda_queue *q, void *p, size_t bytes) {
  if (q->status || !bytes) return q->status;
  return moe__cuda_note(
      q, "cuMemsetD8Async",
      q->cuda->driver.cuMemsetD8Async((moe__cuptr)(uintptr_t)p, 0, bytes, q->stream));
}

/* The place of an array among those that stay on the card; -1: it is not there. An array that comes
   for the second time is put there, as long as there is room. */
static int moe__cuda_keep(moe__cuda_queue *q, const void *host, size_t bytes) {
  uint64_t hash = moe__cuda_hash(bytes, host, bytes);
  int i;
  for (i = 0; i < q->keeps; ++i)
    if (q->keep[i].hash == hash && q->keep[i].bytes == bytes) break;
  if (i < q->keeps && q->keep[i].copy) return memcmp(q->keep[i].copy, host, bytes) ? -1 : i;
  if (i == MOE__CUDA_KEEP || MOE__CUDA_KEPT - q->kept_used < bytes) return -1;
  q->keep[i].hash = hash, q->keep[i].bytes = bytes;
  if (i == q->keeps) {
    q->keep[i].copy = NULL;
    ++q->keeps;
    return -1;
  }
  if (!q->kept && moe__cuda_take(q, MOE__CUDA_KEPT, &q->kept)) return -1;
  if (moe__cuda_send(q, q->kept + q->kept_used, host, bytes)) return -1;
  q->keep[i].copy = malloc(bytes);
  if (!q->keep[i].copy) return -1;
  memcpy(q->keep[i].copy, host, bytes);
  q->keep[i].at = q->kept_used;
  q->kept_used += (bytes + MOE__CUDA_ALIGN - 1) / MOE__CUDA_ALIGN * MOE__CUDA_ALIGN;
  if (q->kept_used > MOE__CUDA_KEPT) q->kept_used = MOE__CUDA_KEPT;
  return i;
}

static moe_status moe__cuda_upload_args(moe__cuda_queue *q, const void *host, size_t bytes,
                                        void **out) {
  int at;
  if (q->status) return q->status;
  at = bytes && bytes <= MOE__CUDA_KEPT / 4 ? moe__cuda_keep(q, host, bytes) : -1;
  if (at >= 0) {
    *out = (void *)(uintptr_t)(q->kept + q->keep[at].at);
    return MOE_OK;
  }
  if (moe__cuda_scratch(q, bytes, out)) return q->status;
  return moe__cuda_send(q, (moe__cuptr)(uintptr_t)*out, host, bytes);
}

static moe_status moe__cuda_launch(moe__cuda_queue *q, int kernel, uint32_t gx, uint32_t gy,
                                   uint32_t threads, void **args) {
#define MOE__CUDA_TEXT(name, min_arch) "moe_k_" #name,
  static const char *const name[] = {MOE__CUDA_KERNELS(MOE__CUDA_TEXT) NULL};
#undef MOE__CUDA_TEXT
  moe__cuda *cuda = q->cuda;
  if (q->status || !gx || !gy) return q->status;
  if (gx > 0x7fffffffu || gy > 65535u || !cuda->kernel[kernel])
    return moe__cuda_note(q, name[kernel], !cuda->kernel[kernel] ? 209 : 1);
  moe__cuda_tally(cuda, &cuda->counts.launches, 1);
  return moe__cuda_note(q, name[kernel],
                        cuda->driver.cuLaunchKernel(cuda->kernel[kernel], gx, gy, 1, threads, 1, 1,
                                                    0, q->stream, args, NULL));
}

static void moe__cuda_mutex_init(moe__cuda_mutex *mutex) {
#ifdef _WIN32
  InitializeCriticalSection(mutex);
#else
  pthread_mutex_init(mutex, NULL);
#endif
}

static void moe__cuda_mutex_destroy(moe__cuda_mutex *mutex) {
#ifdef _WIN32
  DeleteCriticalSection(mutex);
#else
  pthread_mutex_destroy(mutex);
#endif
}

static moe_status moe__cuda_blas_open(moe__cuda_queue *q); /* >>cuda_products */

/* Releases a queue that is in no list; the context is current. */
static void moe__cuda_queue_free(moe__cuda_queue *q) {
  moe__cuda *cuda = q->cuda;
  int i;
  if (q->stream) cuda->driver.cuStreamSynchronize(q->stream); /* what it uses is free then */
  if (q->blas) cuda->cublas.cublasDestroy_v2(q->blas);
  moe__cuda_scratch_free(q);
  moe__cuda_give(cuda, q->kept, MOE__CUDA_KEPT);
  for (i = 0; i < q->keeps; ++i) free(q->keep[i].copy);
  if (q->staging) cuda->driver.cuMemFreeHost(q->staging);
  if (q->owns_stream) cuda->driver.cuStreamDestroy_v2(q->stream);
  moe__cuda_mutex_destroy(&q->mutex);
  free(q);
}

/* A queue on a stream of its own, or the caller's; the context is current. */
static moe_status moe__cuda_queue_make(moe__cuda *cuda, moe__cuda_queue **out, const moe_env *env) {
  moe__cuda_queue *q = (moe__cuda_queue *)calloc(1, sizeof *q);
  int error = 0;
  if (!q) return moe__cuda_fail(env, MOE_E_MEMORY, "cuda: no memory for a queue");
  moe__cuda_mutex_init(&q->mutex);
  q->cuda = cuda;
  q->env = *env;
  q->force = -1;
  q->stream = cuda->options.stream;
  if (!q->stream) {
    error = cuda->driver.cuStreamCreate(&q->stream, 1); /* not ordered with the legacy stream */
    if (error) q->stream = NULL;
    q->owns_stream = !error;
  }
  if (moe__cuda_note(q, "cuStreamCreate", error) || moe__cuda_blas_open(q)) {
    moe_status status = q->status;
    moe__cuda_queue_free(q);
    return status;
  }
  *out = q;
  return MOE_OK;
}

/* The slots that move memory. */

static moe_status moe__cuda_open_queue(const moe_backend *b, const moe_env *env, void **stream) {
  moe__cuda *cuda = (moe__cuda *)b->user;
  moe__cuda_queue *q = NULL;
  moe_status status = moe__cuda_begin(cuda->own, env, 1);
  if (status) return status;
  status = moe__cuda_queue_make(cuda, &q, env);
  status = moe__cuda_end(cuda->own, status);
  if (status) return status;
  MOE__CUDA_LOCK(&cuda->mutex);
  q->next = cuda->queues;
  cuda->queues = q;
  ++cuda->counts.queues;
  MOE__CUDA_UNLOCK(&cuda->mutex);
  *stream = q;
  return MOE_OK;
}

static void moe__cuda_close_queue(const moe_backend *b, void *stream) {
  moe__cuda *cuda = (moe__cuda *)b->user;
  moe__cuda_queue **at, *q = (moe__cuda_queue *)stream;
  void *context = NULL;
  int pushed;
  MOE__CUDA_LOCK(&cuda->mutex);
  for (at = &cuda->queues; *at && *at != q;) at = &(*at)->next;
  if (*at) *at = q->next, --cuda->counts.queues;
  MOE__CUDA_UNLOCK(&cuda->mutex);
  pushed = !cuda->driver.cuCtxPushCurrent_v2(cuda->context);
  moe__cuda_queue_free(q);
  if (pushed) cuda->driver.cuCtxPopCurrent_v2(&context);
}

/* Notes an allocation, so that moe_cuda_close can release it. 0: no memory for the note. */
static int moe__cuda_enlist(moe__cuda *cuda, moe__cuptr p, size_t bytes) {
  int good = 1;
  MOE__CUDA_LOCK(&cuda->mutex);
  if (cuda->counts.allocations == cuda->allocation_room) {
    size_t room = 2 * (size_t)cuda->allocation_room + 16;
    void *grown = realloc(cuda->allocation, room * sizeof *cuda->allocation);
    good = grown != NULL;
    if (good) cuda->allocation = (moe__cuda_block *)grown, cuda->allocation_room = (int32_t)room;
  }
  if (good) {
    cuda->allocation[cuda->counts.allocations].p = p;
    cuda->allocation[cuda->counts.allocations++].bytes = bytes;
    cuda->counts.bytes += (int64_t)bytes;
  }
  MOE__CUDA_UNLOCK(&cuda->mutex);
  return good;
}

static moe_status moe__cuda_alloc(const moe_backend *b, const moe_env *env, void **out,
                                  size_t bytes) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe__cuda *cuda = q->cuda;
  moe__cuptr p = 0;
  size_t available = 0, total = 0;
  int error;
  moe_status status = moe__cuda_begin(q, env, 1);
  if (status) return status;
  error = cuda->driver.cuMemAlloc_v2(&p, bytes ? bytes : 1);
  if (error == 2) {
    if (cuda->driver.cuMemGetInfo_v2(&available, &total)) available = total = 0;
    status = moe__cuda_fail(env, MOE_E_MEMORY,
                            "cuda:%d: no memory for %llu bytes, %llu of %llu are free: use smaller "
                            "micro-batches or a smaller model",
                            (int)cuda->options.device, (unsigned long long)bytes,
                            (unsigned long long)available, (unsigned long long)total);
  } else if (error)
    status = moe__cuda_note(q, "cuMemAlloc", error);
  else if (!moe__cuda_enlist(cuda, p, bytes)) {
    cuda->driver.cuMemFree_v2(p);
    status = moe__cuda_fail(env, MOE_E_MEMORY, "cuda: the host has no memory left");
  }
  status = moe__cuda_end(q, status);
  if (!status) *out = (void *)(uintptr_t)p;
  return status;
}

static void moe__cuda_release(const moe_backend *b, void *p) {
  moe__cuda *cuda = (moe__cuda *)b->user;
  moe__cuptr address = (moe__cuptr)(uintptr_t)p;
  void *context = NULL;
  int32_t i, last;
  int pushed;
  if (!p) return;
  MOE__CUDA_LOCK(&cuda->mutex);
  last = cuda->counts.allocations - 1;
  for (i = 0; i <= last && cuda->allocation[i].p != address;) ++i;
  if (i <= last) {
    cuda->counts.bytes -= (int64_t)cuda->allocation[i].bytes;
    cuda->allocation[i] = cuda->allocation[last];
    cuda->counts.allocations = last;
  }
  MOE__CUDA_UNLOCK(&cuda->mutex);
  if (i > last) return; /* not allocated here, or released before */
  pushed = !cuda->driver.cuCtxPushCurrent_v2(cuda->context);
  cuda->driver.cuMemFree_v2(address); /* waits for the work that uses it */
  if (pushed) cuda->driver.cuCtxPopCurrent_v2(&context);
}

static moe_status moe__cuda_upload(const moe_backend *b, const moe_env *env, void *to,
                                   const void *host, size_t bytes) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe_status status = moe__cuda_begin(q, env, 0);
  if (status) return status;
  moe__cuda_tally(q->cuda, &q->cuda->counts.uploads, 1);
  moe__cuda_tally(q->cuda, &q->cuda->counts.uploaded, (int64_t)bytes);
  return moe__cuda_end(q, moe__cuda_send(q, (moe__cuptr)(uintptr_t)to, host, bytes));
}

static moe_status moe__cuda_download(const moe_backend *b, const moe_env *env, void *host,
                                     const void *from, size_t bytes) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe_status status = moe__cuda_begin(q, env, 1);
  if (status) return status;
  moe__cuda_tally(q->cuda, &q->cuda->counts.downloads, 1);
  moe__cuda_tally(q->cuda, &q->cuda->counts.downloaded, (int64_t)bytes);
  return moe__cuda_end(q, moe__cuda_receive(q, host, (moe__cuptr)(uintptr_t)from, bytes));
}

static moe_status moe__cuda_clear(const moe_backend *b, const moe_env *env, void *p, size_t bytes) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe_status status = moe__cuda_begin(q, env, 0);
  return status ? status : moe__cuda_end(q, moe__cuda_zero(q, p, bytes));
}

static moe_status moe__cuda_sync(const moe_backend *b, const moe_env *env) {
  moe__cuda_queue *q = moe__cuda_queue_of(b, env);
  moe_status status = moe__cuda_begin(q, env, 1);
  return status ? status : moe__cuda_end(q, moe__cuda_wait(q));
}

/* ---- device code that all kernels share ---- >>cuda_base */

/* The CPU's random bits, exp and log (>>random and >>simd in moe.h): the same operations in the
   same order. */
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

static moe_status moe__cuda_blas_fail(moe__cuda_queue *q, const char *what, int error) {
  if (q->status) return q->status;
  q->status = error == 3 ? MOE_E_MEMORY : MOE_E_IO; /* CUBLAS_STATUS_ALLOC_FAILED */
  return moe__cuda_fail(&q->env, q->status,
                        "cuda:%d: %s returned %d: use MOE_CUDA_MAKER_OWN, or another cuBLAS",
                        (int)q->cuda->options.device, what, error);
}

/* cuBLAS's handle of a queue: default math modes, so that float32 is float32 unless TF32 is
   wanted. */
static moe_status moe__cuda_blas_open(moe__cuda_queue *q) {
  const moe__cuda_cublas *blas = &q->cuda->cublas;
  const char *what = "cublasCreate";
  int error;
  if (!q->cuda->cublas_library) return MOE_OK;
  error = blas->cublasCreate_v2(&q->blas);
  if (error) q->blas = NULL;
  if (!error) what = "cublasSetStream", error = blas->cublasSetStream_v2(q->blas, q->stream);
  if (!error) /* CUBLAS_TF32_TENSOR_OP_MATH, CUBLAS_DEFAULT_MATH */
    what = "cublasSetMathMode", error = blas->cublasSetMathMode(q->blas, moe__cuda_tf32(q) ? 3 : 0);
  return error ? moe__cuda_blas_fail(q, what, error) : MOE_OK;
}

/* cuBLAS counts columns first: it computes C^T = op(B)^T op(A)^T. */
static moe_status moe__cuda_blas_gemm(moe__cuda_queue *q, const moe__cuda_gemm *g) {
  const float one = 1, beta = g->accumulate ? 1.0f : 0.0f;
  int type = g->bf16 ? 14 : 0;                           /* CUDA_R_16BF, CUDA_R_32F */
  int compute = !g->bf16 && moe__cuda_tf32(q) ? 77 : 68; /* CUBLAS_COMPUTE_32F_FAST_TF32, _32F */
  int error;
  if (q->status || !g->m || !g->n || !g->k) return q->status;
  if (!q->blas) return moe__cuda_blas_fail(q, "cublasGemmEx without cuBLAS", 1);
  error = q->cuda->cublas.cublasGemmEx(q->blas, g->b_trans, g->a_trans, g->n, g->m, g->k, &one,
                                       g->b, type, (int)g->b_row, g->a, type, (int)g->a_row, &beta,
                                       g->c, 0, (int)g->c_row, compute, -1);
  return error ? moe__cuda_blas_fail(q, "cublasGemmEx", error) : MOE_OK;
}

/* The measured choice for the same layer whose number of tokens is nearest, by ratio. */
static int moe__cuda_choose(moe__cuda *cuda, int bf16, int kind, int32_t m, int32_t n, int32_t k) {
  double nearest = 0;
  int blas = 0, i;
  MOE__CUDA_LOCK(&cuda->mutex);
  for (i = 0; i < cuda->choices; ++i) {
    const moe__cuda_choice *c = &cuda->choice[i];
    double ratio = c->m < m ? (double)c->m / m : (double)m / c->m;
    if (c->kind != kind || c->n != n || c->k != k || c->bf16 != bf16 || ratio <= nearest) continue;
    nearest = ratio;
    blas = c->blas;
  }
  MOE__CUDA_UNLOCK(&cuda->mutex);
  return blas;
}

static int moe__cuda_blas_serves(moe__cuda_queue *q, int kind, int32_t m, int32_t n, int32_t k) {
  moe__cuda *cuda = q->cuda;
  int blas;
  if (!q->blas || !m || !n || !k)
    blas = 0;
  else if (q->force >= 0)
    return q->force;
  else if (cuda->options.maker != MOE_CUDA_MAKER_AUTO)
    blas = cuda->options.maker == MOE_CUDA_MAKER_CUBLAS;
  else
    blas = moe__cuda_choose(cuda, q->env.precision == MOE_TYPE_BF16, kind, m, n, k);
  moe__cuda_tally(cuda, blas ? &cuda->counts.cublas : &cuda->counts.own, 1);
  return blas;
}

/* ---- expert feed-forward networks, grouped ---- >>cuda_experts */

/* ---- self-attention over packed sequences ---- >>cuda_attention */

/* ---- LayerNorm, dropout, embeddings ---- >>cuda_rows */

/* ---- gates, softmax, top-k, dispatch ---- >>cuda_route */

/* ---- heads and losses ---- >>cuda_heads */

/* ---- norm of the gradients, Adam ---- >>cuda_adam */

/* ---- what is supported, the table of slots, open and close ---- >>cuda_table */

static const moe__cuda_chunk *const *moe__cuda_chunks(void) {
#ifdef MOE__CUDA_CODE
  static const moe__cuda_chunk *const chunks[] = {NULL};
#else
#define MOE__CUDA_CHUNK(name) &moe__cuda_src_##name,
  static const moe__cuda_chunk *const chunks[] = {MOE__CUDA_CHUNKS(MOE__CUDA_CHUNK) NULL};
#undef MOE__CUDA_CHUNK
#endif
  return chunks;
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
  if (env->precision == MOE_TYPE_BF16 && cuda->arch < 80)
    why = "bf16 products need a GPU of compute capability 8.0 or higher";
  if (why) {
    moe__cuda_fail(env, MOE_E_UNSUPPORTED, "%s: %s", cuda->name, why);
    return 0;
  }
  (void)limits;
  return 1;
}

/* Begins an op: its scratch is empty. */
static moe_status moe__cuda_op_begin(moe__cuda_queue *q, const moe_env *env, int waits) {
  moe_status status = moe__cuda_begin(q, env, waits);
  if (status) return status;
  moe__cuda_scratch_reset(q);
  return q->status ? moe__cuda_end(q, MOE_OK) : MOE_OK;
}

/* Ends it. Passes do not look at the status of an op, so that the queue keeps it. With a profile
   the op is waited for, and its time is its own. */
static moe_status moe__cuda_op_end(moe__cuda_queue *q, moe_status status) {
  if (status && !q->status) q->status = status;
  if (q->env.profile) moe__cuda_wait(q);
  return moe__cuda_end(q, status);
}

#define MOE__CUDA_SLOT(name)                                                                       \
  static moe_status moe__cuda_slot_##name(const moe_backend *b, const moe_env *env,                \
                                          const struct moe_##name##_op *op, int back) {            \
    moe__cuda_queue *q = moe__cuda_queue_of(b, env);                                               \
    moe_status status = moe__cuda_op_begin(q, env, 0);                                             \
    return status ? status : moe__cuda_op_end(q, moe__cuda_##name(b, env, op, back));              \
  }
#undef MOE__CUDA_SLOT

/* Opens the driver's library. */
static moe_status moe__cuda_open_driver(moe__cuda *cuda, const moe_env *env) {
  const char *given = cuda->options.driver, *lacks;
  int i;
  for (i = 0; !cuda->driver_library && moe__cuda_driver_paths[i]; ++i)
    if (!given || i == 0)
      cuda->driver_library = moe__cuda_dlopen(given ? given : moe__cuda_driver_paths[i]);
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
  const char *what = "cuInit";
  int32_t index = cuda->options.device;
  int count = 0, major = 0, minor = 0, error = cu->cuInit(0);
  if (!error) what = "cuDriverGetVersion", error = cu->cuDriverGetVersion(&cuda->driver_version);
  if (!error) what = "cuDeviceGetCount", error = cu->cuDeviceGetCount(&count);
  if (!error && count < 1) error = 100;
  if (!error && (index < 0 || index >= count))
    return moe__cuda_fail(env, MOE_E_ARGUMENT,
                          "cuda:%d: there are GPUs 0 to %d (CUDA_VISIBLE_DEVICES can hide some; a "
                          "MIG instance counts as a GPU)",
                          (int)index, count - 1);
  if (!error) what = "cuDeviceGet", error = cu->cuDeviceGet(&cuda->device, index);
  if (!error)
    what = "cuDeviceGetName",
    error = cu->cuDeviceGetName(cuda->card, (int)sizeof cuda->card - 1, cuda->device);
  if (!error) /* of the compute capability: major, minor */
    what = "cuDeviceGetAttribute", error = cu->cuDeviceGetAttribute(&major, 75, cuda->device);
  if (!error) error = cu->cuDeviceGetAttribute(&minor, 76, cuda->device);
  cuda->card_arch = 10 * major + minor;
  if (!error && cuda->card_arch < 70)
    return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                          "cuda:%d: %s has compute capability %d.%d, at least 7.0 is needed",
                          (int)index, cuda->card, major, minor);
  cuda->context = cuda->options.context;
  if (!error && !cuda->context) {
    what = "cuDevicePrimaryCtxRetain";
    error = cu->cuDevicePrimaryCtxRetain(&cuda->context, cuda->device);
    cuda->primary = !error;
  }
  if (!error) what = "cuCtxPushCurrent", error = cu->cuCtxPushCurrent_v2(cuda->context);
  return error ? moe__cuda_driver_fail(cu, env, (int)index, what, error) : MOE_OK;
}

/* Opens cuBLAS, where it is wanted and found. */
static moe_status moe__cuda_open_blas(moe__cuda *cuda, const moe_env *env) {
  const char *given = cuda->options.cublas;
  int must = cuda->options.maker == MOE_CUDA_MAKER_CUBLAS, at = 0;
  char path[512];
  if (cuda->options.maker == MOE_CUDA_MAKER_OWN || (given && !*given && !must)) return MOE_OK;
  for (;;) {
    void *library = given ? moe__cuda_dlopen(given)
                          : moe__cuda_find(moe__cuda_cublas_paths, cuda->driver_version / 1000, &at,
                                           path, sizeof path);
    if (!library) break;
    if (!moe__cuda_symbols(library, moe__cuda_cublas_names, &cuda->cublas)) {
      cuda->cublas_library = library;
      return MOE_OK;
    }
    moe__cuda_dlclose(library);
    if (given) break;
  }
  if (!must) return MOE_OK;
  return moe__cuda_fail(env, MOE_E_UNSUPPORTED,
                        "cuda: %s is not found or too old: install cuBLAS 11 or later (pip install "
                        "nvidia-cublas-cu12), or use MOE_CUDA_MAKER_OWN",
                        given ? given : "libcublas.so");
}

/* Releases everything that was opened so far. */
static void moe__cuda_free(moe__cuda *cuda) {
  const moe__cuda_driver *cu = &cuda->driver;
  void *context = NULL;
  int pushed = cuda->context && !cu->cuCtxPushCurrent_v2(cuda->context);
  while (cuda->queues) {
    moe__cuda_queue *next = cuda->queues->next;
    moe__cuda_queue_free(cuda->queues);
    cuda->queues = next;
  }
  if (cuda->own) moe__cuda_queue_free(cuda->own);
  while (cuda->counts.allocations > 0)
    cu->cuMemFree_v2(cuda->allocation[--cuda->counts.allocations].p);
  free(cuda->allocation);
  if (cuda->module) cu->cuModuleUnload(cuda->module);
  if (pushed) cu->cuCtxPopCurrent_v2(&context);
  if (cuda->primary) cu->cuDevicePrimaryCtxRelease_v2(cuda->device);
  moe__cuda_dlclose(cuda->cublas_library);
  moe__cuda_dlclose(cuda->driver_library);
  moe__cuda_mutex_destroy(&cuda->mutex);
  free(cuda);
}

/* Everything but the table. */
static moe_status moe__cuda_make(moe__cuda *cuda, const moe_env *env) {
  static const char *const makers[] = {"by cuBLAS or our own kernels, as measured",
                                       "by our own kernels", "by cuBLAS"};
  void *context = NULL;
  moe_status status = moe__cuda_open_driver(cuda, env);
  if (status) return status;
  status = moe__cuda_open_device(cuda, env);
  if (status) return status;
  status = moe__cuda_open_blas(cuda, env);
  if (!status) status = moe__cuda_kernels(cuda, env);
  if (!status) status = moe__cuda_queue_make(cuda, &cuda->own, env);
  cuda->driver.cuCtxPopCurrent_v2(&context);
  snprintf(cuda->name, sizeof cuda->name, "cuda:%d (%s, sm_%d%s; linear layers %s)",
           (int)cuda->options.device, cuda->card, cuda->card_arch,
           cuda->options.tf32 && cuda->arch >= 80 ? ", TF32" : "",
           makers[cuda->cublas_library ? cuda->options.maker : MOE_CUDA_MAKER_OWN]);
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
  moe__cuda_mutex_init(&cuda->mutex);
  if (options) cuda->options = *options;
  status = moe__cuda_make(cuda, env);
  if (status) {
    moe__cuda_free(cuda);
    return status;
  }
  moe_backend_init(&b);
  b.memory = MOE_MEMORY_DEVICE;
  b.name = cuda->name;
  b.user = cuda;
  b.mirror = cuda->options.mirror;
  b.supports = moe__cuda_supports;
  b.open = moe__cuda_open_queue;
  b.close = moe__cuda_close_queue;
  b.alloc = moe__cuda_alloc;
  b.release = moe__cuda_release;
  b.upload = moe__cuda_upload;
  b.download = moe__cuda_download;
  b.clear = moe__cuda_clear;
  b.sync = moe__cuda_sync;
  *backend = b;
  return MOE_OK;
}

MOE_API int32_t moe_cuda_close(moe_backend *backend) {
  moe__cuda *cuda = (moe__cuda *)backend->user;
  int32_t left;
  if (!cuda) return 0;
  left = cuda->counts.allocations + cuda->counts.queues;
  moe__cuda_free(cuda);
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
