/* A GPU inside the test program, for the tests of kernels: the functions of libcuda and NVRTC that
   moe_cuda.h calls, which it finds by dlopen("") since the program is linked with -rdynamic. Memory
   of the card is memory of this process, every launch runs at once, by the emulator or by the
   interpreter of PTX. Include it after moe_cuda.h. */
#ifndef DEVICE_H
#define DEVICE_H
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include "ptx.h"

typedef void device_runner(const char *name, dim3 grid, unsigned threads, void **arguments);
struct device_kernel {
  const char *name;
  device_runner *emulate;
};

static struct device_state {
  int arch = 70;           /* compute capability */
  bool interprets = false; /* PTX */
  std::string ptx;         /* its text; empty: the emulator */
  ptx::Module *module = nullptr;
  std::map<unsigned long long, size_t> memory;
  std::map<std::string, long> launches; /* of each kernel */
} device;

enum { DEVICE_GUARD = 4096 }; /* bytes behind each allocation that nobody may change */

[[noreturn]] static void device_fail(const char *what) {
  fprintf(stderr, "device: %s\n", what);
  abort();
}

/* The kernels by name. */
template <class... A>
static void device_emulate(void (*kernel)(A...), const char *name, dim3 grid, unsigned threads,
                           void **arguments) {
  emulator::launch(name, kernel, grid, threads, arguments);
}
#define DEVICE_KERNEL(kernel, min_arch)                                                            \
  {"moe_k_" #kernel, [](const char *name, dim3 grid, unsigned threads, void **arguments) {         \
     device_emulate(moe_k_##kernel, name, grid, threads, arguments);                               \
   }},
static const device_kernel device_kernels[] = {MOE__CUDA_KERNELS(DEVICE_KERNEL){nullptr, nullptr}};

static void device_order(int order, unsigned seed) {
  emulator::machine.order = (emulator::Order)(order % 3);
  emulator::machine.arrival = (emulator::Arrival)(order % 3);
  emulator::machine.random.seed(seed);
  if (!device.module) return;
  device.module->order = (ptx::Order)(order % 3);
  device.module->arrival = (ptx::Arrival)(order % 3);
  device.module->random.seed(seed);
}

/* Whether the bytes lie in one allocation. */
static void *device_bytes(unsigned long long p, size_t bytes) {
  auto it = device.memory.upper_bound(p);
  if (it == device.memory.begin()) device_fail("a copy outside the card's memory");
  --it;
  if (p + bytes > it->first + it->second) device_fail("a copy beyond an allocation");
  return (void *)(uintptr_t)p;
}

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 12090, 0; }
int cuGetErrorName(int, const char **name) { return *name = "CUDA_ERROR", 0; }
int cuGetErrorString(int, const char **text) { return *text = "an error", 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *d, int index) { return *d = index, index ? 101 : 0; }
int cuDeviceGetName(char *name, int capacity, int) {
  return snprintf(name, (size_t)capacity, "test"), 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
  *value = attribute == 75 ? device.arch / 10 : attribute == 76 ? device.arch % 10 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &device, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxPushCurrent_v2(void *) { return 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = nullptr, 0; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { return *left = *total = (size_t)1 << 32, 0; }
int cuMemAlloc_v2(unsigned long long *p, size_t bytes) {
  void *memory = nullptr;
  if (!bytes || posix_memalign(&memory, 256, bytes + DEVICE_GUARD)) return 2;
  memset(memory, 0xff, bytes);
  memset((char *)memory + bytes, 0xa5, DEVICE_GUARD);
  *p = (unsigned long long)(uintptr_t)memory;
  device.memory[*p] = bytes;
  if (device.module) device.module->allow(memory, bytes);
  return 0;
}
int cuMemFree_v2(unsigned long long p) {
  auto it = device.memory.find(p);
  if (it == device.memory.end()) device_fail("memory is freed that is not allocated");
  for (int i = 0; i < DEVICE_GUARD; ++i)
    if (((unsigned char *)(uintptr_t)p)[it->second + (size_t)i] != 0xa5)
      device_fail("a kernel wrote beyond an allocation");
  device.memory.erase(it);
  if (device.module) device.module->forbid((void *)(uintptr_t)p);
  free((void *)(uintptr_t)p);
  return 0;
}
int cuMemAllocHost_v2(void **p, size_t bytes) { return *p = malloc(bytes), *p ? 0 : 2; }
int cuMemFreeHost(void *p) { return free(p), 0; }
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *) {
  return memcpy(device_bytes(to, bytes), from, bytes), 0;
}
int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t bytes) {
  return memcpy(to, device_bytes(from, bytes), bytes), 0;
}
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void *) {
  return memcpy(device_bytes(to, bytes), device_bytes(from, bytes), bytes), 0;
}
int cuMemsetD8Async(unsigned long long p, unsigned char value, size_t bytes, void *) {
  return memset(device_bytes(p, bytes), value, bytes), 0;
}
int cuStreamCreate(void **stream, unsigned) { return *stream = &device, 0; }
int cuStreamDestroy_v2(void *) { return 0; }
int cuStreamSynchronize(void *) { return 0; }
int cuEventCreate(void **event, unsigned) { return *event = &device, 0; }
int cuEventDestroy_v2(void *) { return 0; }
int cuEventRecord(void *, void *) { return 0; }
int cuEventSynchronize(void *) { return 0; }
int cuEventElapsedTime(float *milliseconds, void *, void *) { return *milliseconds = 1, 0; }

int cuModuleLoadData(void **module, const void *) {
  *module = &device;
  if (!device.interprets) return 0;
  delete device.module;
  device.module = new ptx::Module;
  device.module->read(device.ptx.c_str());
  for (auto &one : device.memory) device.module->allow((void *)(uintptr_t)one.first, one.second);
  return 0;
}
int cuModuleUnload(void *) {
  delete device.module;
  device.module = nullptr;
  return 0;
}
int cuModuleGetFunction(void **function, void *, const char *name) {
  for (const device_kernel *k = device_kernels; k->name; ++k)
    if (!strcmp(k->name, name)) {
      *function = (void *)(uintptr_t)k;
      return device.module && !device.module->has(name) ? 500 : 0;
    }
  return 500;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *, void **arguments, void **) {
  const device_kernel *k = (const device_kernel *)function;
  if (!k || gz != 1 || by != 1 || bz != 1 || shared) device_fail("a launch of unknown form");
  ++device.launches[k->name];
  if (device.module)
    device.module->launch(k->name, gx, gy, bx, arguments);
  else
    k->emulate(k->name, dim3(gx, gy), bx, arguments);
  return 0;
}

int nvrtcVersion(int *major, int *minor) { return *major = 12, *minor = 9, 0; }
int nvrtcGetNumSupportedArchs(int *count) { return *count = 1, 0; }
int nvrtcGetSupportedArchs(int *archs) { return *archs = device.arch, 0; }
int nvrtcCreateProgram(void **program, const char *, const char *, int, const char *const *,
                       const char *const *) {
  return *program = &device, 0;
}
int nvrtcDestroyProgram(void **) { return 0; }
int nvrtcCompileProgram(void *, int, const char *const *) { return 0; }
int nvrtcGetProgramLogSize(void *, size_t *bytes) { return *bytes = 1, 0; }
int nvrtcGetProgramLog(void *, char *log) { return *log = 0, 0; }
int nvrtcGetPTXSize(void *, size_t *bytes) { return *bytes = 1, 0; }
int nvrtcGetPTX(void *, char *ptx) { return *ptx = 0, 0; }
int nvrtcGetCUBINSize(void *, size_t *bytes) { return *bytes = 1, 0; }
int nvrtcGetCUBIN(void *, char *cubin) { return *cubin = 0, 0; }

int cublasCreate_v2(void **handle) { return *handle = &device, 0; }
int cublasDestroy_v2(void *) { return 0; }
int cublasSetStream_v2(void *, void *) { return 0; }
int cublasSetMathMode(void *, int) { return 0; }
static float device_element(const void *p, int type, size_t i) {
  if (!type) return ((const float *)p)[i];
  return emulator::float_of((uint32_t)((const uint16_t *)p)[i] << 16);
}
/* Columns first: element (i, j) is at i + j row. */
int cublasGemmEx(void *, int trans_a, int trans_b, int m, int n, int k, const void *alpha,
                 const void *a, int a_type, int a_row, const void *b, int b_type, int b_row,
                 const void *beta, void *c, int c_type, int c_row, int compute, int) {
  if ((a_type && a_type != 14) || b_type != a_type || c_type || compute != 68) return 7;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      float sum = 0, *to = (float *)c + i + (size_t)j * (size_t)c_row;
      for (int p = 0; p < k; ++p)
        sum += device_element(a, a_type, (size_t)(trans_a ? p + i * a_row : i + p * a_row)) *
               device_element(b, b_type, (size_t)(trans_b ? j + p * b_row : p + j * b_row));
      sum *= *(const float *)alpha;
      *to = *(const float *)beta > 0 ? sum + *to : sum;
    }
  return 0;
}
}
#endif
