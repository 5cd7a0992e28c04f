/* bench_start_ort.c - the peer of bench_start.c: a C program on ONNX Runtime, from a cold process
   to the first answer for 16 tokens.
     cc -O2 -o bench_start_ort bench/bench_start_ort.c
     ./bench_start_ort libonnxruntime.so fused.onnx OPTIMIZATION_LEVEL
   The pip wheel brings the library but no headers. Its C interface is a table of functions whose
   places never change (API version 1), so the few that are needed are taken by their place. One
   thread; optimization level 0 (the file is optimized already) or 99 (all). */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 16, API_VERSION = 1, TYPE_INT32 = 6, TYPE_INT64 = 7 };
enum place {
  GET_ERROR_MESSAGE = 2,
  CREATE_ENV = 3,
  CREATE_SESSION = 7,
  RUN = 9,
  CREATE_SESSION_OPTIONS = 10,
  SET_OPTIMIZATION_LEVEL = 23,
  SET_INTRA_OP_THREADS = 24,
  CREATE_TENSOR_WITH_DATA = 49,
  GET_TENSOR_DATA = 51,
  CREATE_CPU_MEMORY_INFO = 69
};

typedef struct api_base {
  void **(*get_api)(uint32_t version);
  const char *(*get_version)(void);
} api_base;

static void **table;

/* Ends the program where a call of ONNX Runtime brought a status. */
static void need(void *status, const char *what) {
  if (status == NULL) return;
  fprintf(stderr, "bench_start_ort: %s: %s\n", what,
          ((const char *(*)(void *))table[GET_ERROR_MESSAGE])(status));
  exit(1);
}

static void *tensor(void *memory, void *data, int type) {
  const int64_t shape[2] = {1, TOKENS};
  size_t bytes = TOKENS * (size_t)(type == TYPE_INT32 ? 4 : 8);
  void *value = NULL;
  need(((void *(*)(void *, void *, size_t, const int64_t *, size_t, int, void **))
            table[CREATE_TENSOR_WITH_DATA])(memory, data, bytes, shape, 2, type, &value),
       "CreateTensorWithDataAsOrtValue");
  return value;
}

int main(int argc, char **argv) {
  static const char *const inputs[] = {"input_ids", "attention_mask", "token_type_ids"},
                           *const outputs[] = {"hidden"};
  static int32_t narrow[3][TOKENS];
  static int64_t wide[3][TOKENS];
  void *library, *env = NULL, *options = NULL, *session = NULL, *memory = NULL, *values[3],
                 *out = NULL, *status, *data = NULL;
  const api_base *(*get_base)(void);
  int i, type;
  if (argc != 4) return fprintf(stderr, "usage: %s LIBRARY MODEL LEVEL\n", argv[0]), 1;
  library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) return fprintf(stderr, "bench_start_ort: %s\n", dlerror()), 1;
  *(void **)&get_base = dlsym(library, "OrtGetApiBase");
  if (get_base == NULL || (table = get_base()->get_api(API_VERSION)) == NULL)
    return fprintf(stderr, "bench_start_ort: no OrtApi\n"), 1;
  need(((void *(*)(int, const char *, void **))table[CREATE_ENV])(3, "bench", &env), "CreateEnv");
  need(((void *(*)(void **))table[CREATE_SESSION_OPTIONS])(&options), "CreateSessionOptions");
  need(((void *(*)(void *, int))table[SET_INTRA_OP_THREADS])(options, 1), "SetIntraOpNumThreads");
  need(((void *(*)(void *, int))table[SET_OPTIMIZATION_LEVEL])(options, atoi(argv[3])),
       "SetSessionGraphOptimizationLevel");
  need(((void *(*)(void *, const char *, void *, void **))table[CREATE_SESSION])(env, argv[2],
                                                                                 options, &session),
       "CreateSession");
  need(((void *(*)(int, int, void **))table[CREATE_CPU_MEMORY_INFO])(1, 0, &memory),
       "CreateCpuMemoryInfo");
  for (i = 0; i < TOKENS; ++i) {
    narrow[0][i] = 1000 + 7 * i;
    narrow[1][i] = 1;
    wide[0][i] = narrow[0][i];
    wide[1][i] = 1;
  }
  for (type = TYPE_INT32; type <= TYPE_INT64; ++type) { /* the fused graph takes one or the other */
    for (i = 0; i < 3; ++i)
      values[i] = tensor(memory, type == TYPE_INT32 ? (void *)narrow[i] : (void *)wide[i], type);
    status = ((void *(*)(void *, void *, const char *const *, void *const *, size_t,
                         const char *const *, size_t, void **))table[RUN])(
        session, NULL, inputs, values, 3, outputs, 1, &out);
    if (status == NULL) break;
    if (type == TYPE_INT64) need(status, "Run");
  }
  need(((void *(*)(void *, void **))table[GET_TENSOR_DATA])(out, &data), "GetTensorMutableData");
  printf("%.6f\n", (double)*(float *)data);
  fflush(stdout);
  _Exit(0); /* as a program would that has its answer: releasing everything costs more time */
}
