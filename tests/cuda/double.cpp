// c++ -std=c++17 -O1 -fPIC -shared -fvisibility=hidden: see double.h
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <tuple>
#include <unistd.h>
#include "double.h"
#define MOE__CUDA_CODE
#include "emulator.h"
#if __has_include("primitives.h")
#include "primitives.h"
#endif
#define MOE_CUDA_IMPLEMENTATION
#include "../../moe_cuda.h"

/* What the host part of moe_cuda.h, unused here, takes from moe.h. */
extern "C" void moe_backend_init(moe_backend *) {}
extern "C" moe_mat moe_mat_rows(const float *, int32_t, int32_t) { return moe_mat(); }

namespace {

typedef unsigned long long Address;
enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, INVALID_CONTEXT = 201 };
enum { NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, SKIPPED = 600 };

struct Stream {
  std::deque<std::function<void()>> work;
};
struct Event {
  double time = -1; /* launches before it, on its stream */
};
struct Module {
  int arch;
};
struct Program {
  std::string source, image;
  int arch = 0;
};
struct Handle { /* cuBLAS's */
  void *stream = nullptr;
  bool tf32 = false;
};
struct Block {
  size_t bytes, mapped;
};

double_control control;
std::recursive_mutex mutex;
std::map<Address, Block> memory;
std::map<void *, size_t> pinned;
std::map<void *, int> pinned_reads; /* copies that are queued and read it */
std::set<void *> streams, events, modules, programs, handles;
int push_failed;
int lost, doomed; /* an error that every call returns; that the next call which waits returns */
double clock_now;
char context_of_all;
thread_local long depth;

/* ---- failures ---- */
int refuse(const char *what, int error) {
  ++control.refused;
  fprintf(stderr, "double: %s\n", what);
  return error;
}

/* Begins a call: 0, or the error that it returns. `context`: it needs one to be current. */
int enter(const char *name, bool context) {
  int i = 0;
  for (; i < control.names && strcmp(control.called[i], name);) ++i;
  if (i == control.names && i < DOUBLE_NAMES)
    snprintf(control.called[control.names++], 48, "%s", name);
  if (i < DOUBLE_NAMES) ++control.times[i];
  ++control.calls;
  if (context && !depth)
    return refuse((std::string(name) + " without a context").c_str(), INVALID_CONTEXT);
  if (control.fail_at > 0 && (!control.name[0] || !strcmp(control.name, name)) &&
      --control.fail_at == 0) {
    if (control.late && !strcmp(name, "cuLaunchKernel")) {
      doomed = control.error;
      return 0;
    }
    if (control.error >= 700 && !strncmp(name, "cu", 2) && strncmp(name, "cublas", 6))
      lost = control.error;
    return control.error;
  }
  return lost && !strncmp(name, "cu", 2) && strncmp(name, "cublas", 6) ? lost : 0;
}
#define ENTER(context)                                                                             \
  std::lock_guard<std::recursive_mutex> guard(mutex);                                              \
  if (int error_ = enter(__func__, context)) return error_;
/* Calls that release: what they release is gone even where they fail. */
#define ENTER_RELEASE(context)                                                                     \
  std::lock_guard<std::recursive_mutex> guard(mutex);                                              \
  int error_ = enter(__func__, context);

/* ---- memory of the card: pages that fault outside of launches and copies ---- */
void protect(int how) {
  for (auto &m : memory) mprotect((void *)(uintptr_t)m.first, m.second.mapped, how);
}

/* Where bytes of the card are; NULL where they are not in one allocation. */
void *within(Address p, size_t bytes) {
  auto it = memory.upper_bound(p);
  if (it == memory.begin()) return nullptr;
  --it;
  return p - it->first <= it->second.bytes && bytes <= it->second.bytes - (p - it->first)
             ? (void *)(uintptr_t)p
             : nullptr;
}

void release(std::map<Address, Block>::iterator it) {
  control.used -= it->second.bytes;
  --control.allocations;
  munmap((void *)(uintptr_t)it->first, it->second.mapped + (size_t)sysconf(_SC_PAGESIZE));
  memory.erase(it);
}

/* ---- streams ---- */
int post(void *stream, std::function<void()> work) {
  if (!streams.count(stream)) return refuse("not a stream", INVALID_HANDLE);
  ((Stream *)stream)->work.push_back(std::move(work));
  return 0;
}

int drain(void *stream) {
  if (!streams.count(stream)) return refuse("not a stream", INVALID_HANDLE);
  auto &work = ((Stream *)stream)->work;
  if (doomed) {
    work.clear();
    return lost = doomed;
  }
  protect(PROT_READ | PROT_WRITE);
  while (!work.empty()) {
    auto one = std::move(work.front());
    work.pop_front();
    one();
  }
  protect(PROT_NONE);
  return 0;
}

/* ---- kernels: their arguments are copied when they are launched ---- */
typedef std::function<std::function<void(dim3, unsigned)>(const char *, void **)> Kernel;

template <class... A, size_t... I>
Kernel kernel_of(void (*kernel)(A...), std::index_sequence<I...>) {
  return [kernel](const char *name, void **given) -> std::function<void(dim3, unsigned)> {
    typedef std::tuple<std::remove_const_t<A>...> Values;
    auto values = std::make_shared<Values>(*(std::remove_const_t<A> *)given[I]...);
    return [kernel, name, values](dim3 grid, unsigned threads) {
      void *arguments[] = {(void *)&std::get<I>(*values)...};
      emulator::launch(name, kernel, grid, threads, arguments);
    };
  };
}
template <class... A> Kernel kernel_of(void (*kernel)(A...)) {
  return kernel_of(kernel, std::index_sequence_for<A...>());
}
struct Entry {
  const char *name;
  int min_arch;
  Kernel kernel;
};
#define ENTRY(name, min_arch) {"moe_k_" #name, min_arch, kernel_of(moe_k_##name)},
std::vector<Entry> &entries() {
  static std::vector<Entry> list = {MOE__CUDA_KERNELS(ENTRY)};
  return list;
}

/* ---- images: what the NVRTC of this double makes ---- */
std::string image_of(const char *kind, int arch, const std::string &source) {
  char text[96];
  snprintf(text, sizeof text, "double %s %d %zx ", kind, arch, std::hash<std::string>()(source));
  return text + std::string(1000, 'k') + '.';
}

/* The architecture of an image that this card can load, else an error below 0. */
int image_arch(const char *image) {
  char kind[16];
  int arch = 0;
  size_t hash;
  if (sscanf(image, "double %15s %d %zx ", kind, &arch, &hash) != 3 || strlen(image) < 1000 ||
      image[strlen(image) - 1] != '.')
    return -INVALID_IMAGE;
  if (!strcmp(kind, "cubin")) return arch == control.arch ? arch : -NO_BINARY;
  return arch <= control.arch ? arch : -NO_BINARY;
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define EXPORT extern "C" __attribute__((visibility("default")))

/* Releases everything. */
static void clear_all() {
  while (!memory.empty()) release(memory.begin());
  for (auto &p : pinned) free(p.first);
  pinned.clear(), pinned_reads.clear();
  for (void *s : streams) delete (Stream *)s;
  for (void *e : events) delete (Event *)e;
  for (void *m : modules) delete (Module *)m;
  for (void *p : programs) delete (Program *)p;
  for (void *h : handles) delete (Handle *)h;
  streams.clear(), events.clear(), modules.clear(), programs.clear(), handles.clear();
  control.used = 0;
  control.allocations = control.pinned_blocks = control.streams = control.events = 0;
  control.modules = control.programs = control.handles = 0;
}

EXPORT double_control *double_get(void) { return &control; }
EXPORT void double_reset(void) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  clear_all();
  memset(&control, 0, sizeof control);
  control.devices = 1, control.arch = 80, control.driver = 12080;
  control.nvrtc = 1208, control.nvrtc_newest = 120;
  control.memory = (size_t)1 << 30;
  control.pinned = 1;
  lost = doomed = push_failed = 0;
  depth = 0;
}

static struct Begin {
  Begin() { double_reset(); }
} begin;

/* ---- the driver ---- */
API cuInit(unsigned flags) {
  ENTER(false)
  return flags ? refuse("flags of cuInit", INVALID_VALUE) : 0;
}
API cuDriverGetVersion(int *version) {
  ENTER(false)
  *version = control.driver;
  return 0;
}
API cuGetErrorName(int error, const char **name) {
  *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_DOUBLE";
  return 0;
}
API cuDeviceGetCount(int *count) {
  ENTER(false)
  *count = control.devices;
  return 0;
}
API cuDeviceGet(int *device, int index) {
  ENTER(false)
  if (index < 0 || index >= control.devices) return 101;
  *device = index;
  return 0;
}
API cuDeviceGetName(char *name, int capacity, int device) {
  ENTER(false)
  snprintf(name, (size_t)capacity, "Double %d", device);
  return 0;
}
API cuDeviceGetAttribute(int *value, int attribute, int) {
  ENTER(false)
  if (attribute != 75 && attribute != 76) return refuse("an attribute", INVALID_VALUE);
  *value = attribute == 75 ? control.arch / 10 : control.arch % 10;
  return 0;
}
API cuDevicePrimaryCtxRetain(void **context, int) {
  ENTER(false)
  ++control.contexts;
  *context = &context_of_all;
  return 0;
}
API cuDevicePrimaryCtxRelease_v2(int) {
  ENTER_RELEASE(false)
  if (control.contexts-- < 1) refuse("a context is released twice", 0);
  if (push_failed) clear_all(); /* nobody could release what was in it */
  return error_;
}
API cuCtxPushCurrent_v2(void *context) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  if (int error = enter(__func__, false)) return ++push_failed, error;
  if (context != &context_of_all || !control.contexts)
    return refuse("not a context", INVALID_CONTEXT);
  ++depth, ++control.depth;
  return 0;
}
API cuCtxPopCurrent_v2(void **context) {
  ENTER_RELEASE(true)
  if (depth > 0) --depth, --control.depth;
  *context = nullptr;
  return error_;
}
API cuMemGetInfo_v2(size_t *available, size_t *total) {
  ENTER(true)
  *available = control.memory - control.used, *total = control.memory;
  return 0;
}
API cuMemAlloc_v2(Address *p, size_t bytes) {
  ENTER(true)
  size_t page = (size_t)sysconf(_SC_PAGESIZE), mapped = (bytes + page - 1) / page * page;
  if (!bytes) return refuse("an allocation of 0 bytes", INVALID_VALUE);
  if (bytes > control.memory - control.used) return OUT_OF_MEMORY;
  void *made =
      mmap(nullptr, mapped + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) return OUT_OF_MEMORY;
  memset(made, 0xff, mapped); /* NaN: nothing may count on zeros */
  mprotect(made, mapped + page, PROT_NONE);
  memory[(Address)(uintptr_t)made] = {bytes, mapped};
  *p = (Address)(uintptr_t)made;
  control.used += bytes, ++control.allocations;
  if (control.used > control.most) control.most = control.used;
  return 0;
}
API cuMemFree_v2(Address p) {
  ENTER_RELEASE(true)
  auto it = memory.find(p);
  if (it == memory.end()) return refuse("memory is freed that is not allocated", INVALID_VALUE);
  if (!lost) /* it waits for everything */
    for (void *s : streams) drain(s);
  release(it);
  return error_;
}
API cuMemAllocHost_v2(void **p, size_t bytes) {
  ENTER(true)
  if (!control.pinned) return OUT_OF_MEMORY;
  *p = malloc(bytes);
  pinned[*p] = bytes;
  ++control.pinned_blocks;
  return 0;
}
API cuMemFreeHost(void *p) {
  ENTER_RELEASE(true)
  if (!pinned.erase(p))
    return refuse("pinned memory is freed that is not allocated", INVALID_VALUE);
  if (pinned_reads[p] && !control.error) /* else a failure may be why */
    return refuse("pinned memory is freed that a copy will read", INVALID_VALUE);
  pinned_reads.erase(p);
  free(p);
  --control.pinned_blocks;
  return error_;
}
API cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *stream) {
  ENTER(true)
  void *p = within(to, bytes);
  auto it = pinned.upper_bound((void *)(uintptr_t)from);
  bool waits = it != pinned.begin() &&
               (const char *)from < (const char *)std::prev(it)->first + std::prev(it)->second;
  if (!p || !bytes) return refuse("an upload beyond an allocation", INVALID_VALUE);
  if (within((Address)(uintptr_t)from, 1)) return refuse("an upload from the card", INVALID_VALUE);
  if (waits) { /* pinned memory is read when the copy runs */
    int *reads = &pinned_reads[std::prev(it)->first];
    ++*reads;
    return post(stream, [=] { memcpy(p, from, bytes), --*reads; });
  }
  std::string copy((const char *)from, bytes);
  return post(stream, [=] { memcpy(p, copy.data(), bytes); });
}
API cuMemcpyDtoH_v2(void *to, Address from, size_t bytes) {
  ENTER(true)
  void *p = within(from, bytes);
  if (!p || !bytes) return refuse("a download beyond an allocation", INVALID_VALUE);
  if (within((Address)(uintptr_t)to, 1)) return refuse("a download to the card", INVALID_VALUE);
  protect(PROT_READ);
  memcpy(to, p, bytes);
  protect(PROT_NONE);
  return 0;
}
API cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void *stream) {
  ENTER(true)
  void *p = within(to, bytes);
  if (!p || !bytes) return refuse("zeros beyond an allocation", INVALID_VALUE);
  return post(stream, [=] { memset(p, value, bytes); });
}
API cuStreamCreate(void **stream, unsigned flags) {
  ENTER(true)
  if (flags > 1) return refuse("flags of a stream", INVALID_VALUE);
  streams.insert(*stream = new Stream);
  ++control.streams;
  return 0;
}
API cuStreamDestroy_v2(void *stream) {
  ENTER_RELEASE(true)
  if (!streams.erase(stream)) return refuse("not a stream", INVALID_HANDLE);
  delete (Stream *)stream;
  --control.streams;
  return error_;
}
API cuStreamSynchronize(void *stream) {
  ENTER(true)
  return drain(stream);
}
API cuEventCreate(void **event, unsigned) {
  ENTER(true)
  events.insert(*event = new Event);
  ++control.events;
  return 0;
}
API cuEventDestroy_v2(void *event) {
  ENTER_RELEASE(true)
  if (!events.erase(event)) return refuse("not an event", INVALID_HANDLE);
  if (!lost) /* a stream may still record it */
    for (void *s : streams) drain(s);
  delete (Event *)event;
  --control.events;
  return error_;
}
API cuEventRecord(void *event, void *stream) {
  ENTER(true)
  if (!events.count(event)) return refuse("not an event", INVALID_HANDLE);
  return post(stream, [=] { ((Event *)event)->time = clock_now; });
}
API cuEventSynchronize(void *event) {
  ENTER(true)
  if (!events.count(event)) return refuse("not an event", INVALID_HANDLE);
  for (void *s : streams)
    if (int error = drain(s)) return error;
  return 0;
}
API cuEventElapsedTime(float *milliseconds, void *from, void *to) {
  ENTER(true)
  if (!events.count(from) || !events.count(to)) return refuse("not an event", INVALID_HANDLE);
  if (((Event *)from)->time < 0 || ((Event *)to)->time < 0) return SKIPPED;
  *milliseconds = (float)(((Event *)to)->time - ((Event *)from)->time);
  return 0;
}
API cuModuleLoadData(void **module, const void *image) {
  ENTER(true)
  int arch = image_arch((const char *)image);
  if (arch < 0) return -arch;
  Module *made = new Module;
  made->arch = arch;
  modules.insert(*module = made);
  ++control.modules;
  return 0;
}
API cuModuleUnload(void *module) {
  ENTER_RELEASE(true)
  if (!modules.erase(module)) return refuse("not a module", INVALID_HANDLE);
  delete (Module *)module;
  --control.modules;
  return error_;
}
API cuModuleGetFunction(void **function, void *module, const char *name) {
  ENTER(true)
  if (!modules.count(module)) return refuse("not a module", INVALID_HANDLE);
  for (Entry &e : entries())
    if (!strcmp(e.name, name) && e.min_arch <= ((Module *)module)->arch) return *function = &e, 0;
  return NOT_FOUND;
}
API cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **arguments, void **extra) {
  ENTER(true)
  Entry *e = nullptr;
  for (Entry &one : entries())
    if (&one == function) e = &one;
  if (!e || modules.empty()) return refuse("not a kernel", INVALID_HANDLE);
  if (!gx || gx > 0x7fffffffu || !gy || gy > 65535 || gz != 1 || !bx || bx > 1024 || by != 1 ||
      bz != 1 || shared || extra)
    return refuse("a launch of unknown form", INVALID_VALUE);
  ++control.launches;
  auto run = e->kernel(e->name, arguments);
  return post(stream, [=] {
    run(dim3(gx, gy), bx);
    ++clock_now;
  });
}

/* ---- NVRTC ---- */
API nvrtcVersion(int *major, int *minor) {
  ENTER(false)
  *major = control.nvrtc / 100, *minor = control.nvrtc % 100;
  return 0;
}
static const int archs_known[] = {120, 100, 90, 89, 86, 80, 75, 70, 60, 52};
API nvrtcGetNumSupportedArchs(int *count) {
  ENTER(false)
  *count = 0;
  for (int a : archs_known) *count += a <= control.nvrtc_newest;
  return 0;
}
API nvrtcGetSupportedArchs(int *archs) {
  ENTER(false)
  for (int a : archs_known)
    if (a <= control.nvrtc_newest) *archs++ = a;
  return 0;
}
API nvrtcCreateProgram(void **program, const char *source, const char *, int headers,
                       const char *const *, const char *const *) {
  ENTER(false)
  if (headers) return refuse("headers", INVALID_VALUE);
  Program *made = new Program;
  made->source = source;
  programs.insert(*program = made);
  ++control.programs;
  return 0;
}
API nvrtcDestroyProgram(void **program) {
  ENTER_RELEASE(false)
  if (!programs.erase(*program)) return refuse("not a program", INVALID_HANDLE);
  delete (Program *)*program;
  --control.programs;
  *program = nullptr;
  return error_;
}
API nvrtcCompileProgram(void *program, int count, const char *const *option) {
  ENTER(false)
  Program *p = (Program *)program;
  char kind[16];
  if (!programs.count(program)) return refuse("not a program", INVALID_HANDLE);
  for (int i = 0; i < count; ++i)
    if (sscanf(option[i], "--gpu-architecture=%15[a-z]_%d", kind, &p->arch) == 2)
      p->image = image_of(!strcmp(kind, "sm") ? "cubin" : "ptx", p->arch, p->source);
  if (p->image.empty()) return refuse("no architecture", INVALID_VALUE);
  for (Entry &e : entries())
    if (e.min_arch <= p->arch && p->source.find(std::string(e.name) + "(") == std::string::npos)
      return refuse((std::string("the source lacks ") + e.name).c_str(), 6);
  return 0;
}
API nvrtcGetProgramLogSize(void *, size_t *bytes) {
  ENTER(false)
  *bytes = sizeof "line 1: a mistake";
  return 0;
}
API nvrtcGetProgramLog(void *, char *log) {
  ENTER(false)
  strcpy(log, "line 1: a mistake");
  return 0;
}
static int image_size(void *program, size_t *bytes) {
  *bytes = ((Program *)program)->image.size() + 1;
  return 0;
}
static int image_copy(void *program, char *image) {
  strcpy(image, ((Program *)program)->image.c_str());
  return 0;
}
API nvrtcGetPTXSize(void *program, size_t *bytes) {
  ENTER(false)
  return image_size(program, bytes);
}
API nvrtcGetPTX(void *program, char *image) {
  ENTER(false)
  return image_copy(program, image);
}
API nvrtcGetCUBINSize(void *program, size_t *bytes) {
  ENTER(false)
  return image_size(program, bytes);
}
API nvrtcGetCUBIN(void *program, char *image) {
  ENTER(false)
  return image_copy(program, image);
}

/* ---- cuBLAS ---- */
API cublasCreate_v2(void **handle) {
  ENTER(true)
  handles.insert(*handle = new Handle);
  ++control.handles;
  return 0;
}
API cublasDestroy_v2(void *handle) {
  ENTER_RELEASE(true)
  if (!handles.erase(handle)) return refuse("not a handle", 1);
  delete (Handle *)handle;
  --control.handles;
  return error_;
}
API cublasSetStream_v2(void *handle, void *stream) {
  ENTER(true)
  if (!handles.count(handle)) return refuse("not a handle", 1);
  ((Handle *)handle)->stream = stream;
  return 0;
}
API cublasSetMathMode(void *handle, int mode) {
  ENTER(true)
  if (!handles.count(handle) || (mode != 0 && mode != 3)) return refuse("a math mode", 7);
  ((Handle *)handle)->tf32 = mode == 3;
  return 0;
}

static float element(const void *p, bool bf16, size_t i) {
  if (!bf16) return ((const float *)p)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* Columns first: (i, j) is at i + j row. */
API cublasGemmEx(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha,
                 const void *a, int a_type, int a_row, const void *b, int b_type, int b_row,
                 const void *beta, void *c, int c_type, int c_row, int compute, int algorithm) {
  ENTER(true)
  Handle *h = (Handle *)handle;
  bool bf16 = a_type == 14;
  float one = *(const float *)alpha, add = *(const float *)beta;
  size_t size = bf16 ? 2 : 4;
  auto span = [](int rows, int columns, int row) {
    return (size_t)row * (size_t)(columns - 1) + (size_t)rows;
  };
  if (!handles.count(handle) || m < 1 || n < 1 || k < 1 || (unsigned)trans_a > 1 ||
      (unsigned)trans_b > 1 || a_type != b_type || (a_type && a_type != 14) || c_type ||
      algorithm != -1 || a_row < (trans_a ? k : m) || b_row < (trans_b ? n : k) || c_row < m ||
      one < 1 || one > 1 || compute != (h->tf32 && !bf16 ? 77 : 68))
    return refuse("arguments of cublasGemmEx", 7);
  if (!within((Address)(uintptr_t)a, size * span(trans_a ? k : m, trans_a ? m : k, a_row)) ||
      !within((Address)(uintptr_t)b, size * span(trans_b ? n : k, trans_b ? k : n, b_row)) ||
      !within((Address)(uintptr_t)c, 4 * span(m, n, c_row)))
    return refuse("cublasGemmEx beyond an allocation", 7);
  return post(h->stream, [=] {
    for (int j = 0; j < n; ++j)
      for (int i = 0; i < m; ++i) {
        float sum = 0, *to = (float *)c + i + (size_t)j * (size_t)c_row;
        for (int p = 0; p < k; ++p)
          sum += element(a, bf16,
                         trans_a ? p + (size_t)i * (size_t)a_row : i + (size_t)p * (size_t)a_row) *
                 element(b, bf16,
                         trans_b ? j + (size_t)p * (size_t)b_row : p + (size_t)j * (size_t)b_row);
        *to = sum + (add > 0 ? add * *to : 0);
      }
    clock_now += 0.5;
  });
}
