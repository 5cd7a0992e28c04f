/* The part of CUDA that the kernels of moe_cuda.h use, on the CPU: C++17, for tests. Include it
   before moe_cuda.h and define MOE__CUDA_CODE, which turns the strings of kernels into code.

   One block runs at a time, and each of its threads is a fiber: it runs until it waits, so a run is
   deterministic. emulator::machine says in which order blocks and threads take turns, and when a
   copy of cp.async arrives: a kernel must give the same result whatever the order. With
   EMULATOR_THREADS each CUDA thread is a thread of the system, for -fsanitize=thread.

   Found, with a sentence and abort(): barriers that not all threads of a block reach, or reach at
   different places; shuffles and products of matrices that not all lanes of their mask reach;
   deadlocks; misaligned cp.async, copies never waited for, operands not rounded to TF32. Shared
   memory holds NaN (bits 0xff) when a block starts. Bounds are left to -fsanitize=address; shared
   arrays need -fsanitize-sections=cuda_shared as well. */
#ifndef EMULATOR_H
#define EMULATOR_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef EMULATOR_THREADS
#include <pthread.h>
#elif !defined(__x86_64__)
#define EMULATOR_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

/* ---- state ---- */
enum Order { FORWARD, REVERSE, RANDOM };
enum Arrival { LATE, EARLY, ANY }; /* of a copy: when it is waited for, at once, or one of both */
enum State { RUNS, AT_BARRIER, AT_COLLECTIVE, ENDED };

struct Copy {
  unsigned char *to;
  const unsigned char *from;
  unsigned bytes, read; /* the rest is zero */
};

struct Thread;
/* What a warp does together: computes the results of the lanes in mask. */
typedef void Collective(Thread *const *lanes, uint32_t mask);

struct Thread {
  dim3 index;
  unsigned lane, warp;
  State state;
  const void *site; /* where it waits */
  uint32_t mask;    /* with which lanes */
  Collective *collective;
  unsigned source; /* shuffles: the lane to read from */
  uint64_t value, result;
  float *c; /* products of matrices: the lane's registers */
  const uint32_t *a, *b;
  std::vector<std::vector<Copy>> copies; /* cp.async: groups, the last one open */
#ifdef EMULATOR_UCONTEXT
  ucontext_t context;
#endif
  void *stack_pointer = nullptr, *fake_stack = nullptr;
  char *stack = nullptr;
};

inline struct Machine {
  Order order = FORWARD;
  Arrival arrival = LATE;
  std::mt19937 random{1};
  const char *kernel = "none"; /* the launch that runs */
  dim3 grid, block, at;
  std::vector<Thread> threads;
  void (*body)(void *) = nullptr;
  void *argument = nullptr;
  long blocks = 0, barriers = 0, collectives = 0; /* counted */
  ~Machine() {
    for (Thread &t : threads) free(t.stack);
  }
} machine;
inline thread_local Thread *current;

[[noreturn]] inline void fail(const char *what) {
  fprintf(stderr, "emulator: %s, block (%u, %u), thread %u: %s\n", machine.kernel, machine.at.x,
          machine.at.y, current ? current->index.x : 0, what);
  abort();
}

/* Indices 0 .. n-1 in the order of this run. */
inline std::vector<unsigned> turns(unsigned n) {
  std::vector<unsigned> list(n);
  for (unsigned i = 0; i < n; ++i) list[i] = i;
  if (machine.order == REVERSE) std::reverse(list.begin(), list.end());
  if (machine.order == RANDOM) std::shuffle(list.begin(), list.end(), machine.random);
  return list;
}

/* ---- shared memory: one section of the program ---- */
extern "C" __attribute__((weak)) unsigned char __start_cuda_shared[], __stop_cuda_shared[];

__attribute__((no_sanitize("address"))) inline void poison_shared() {
  for (volatile unsigned char *p = __start_cuda_shared; p < __stop_cuda_shared; ++p) *p = 0xff;
}

/* ---- asynchronous copies ---- */
inline void arrive(const Copy &copy) {
  memcpy(copy.to, copy.from, copy.read);
  memset(copy.to + copy.read, 0, copy.bytes - copy.read);
}

inline void copy_async(void *to, const void *from, unsigned bytes, unsigned read) {
  Copy copy = {(unsigned char *)to, (const unsigned char *)from, bytes, read};
  if (((uintptr_t)to | (uintptr_t)from) % bytes) fail("cp.async is misaligned");
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async copies 4, 8 or 16 bytes");
  if (read > bytes) fail("cp.async reads more than it writes");
#ifndef EMULATOR_THREADS
  if (machine.arrival == EARLY || (machine.arrival == ANY && machine.random() % 2)) {
    arrive(copy);
    copy.bytes = copy.read = 0;
  }
#endif
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.back().push_back(copy);
}

inline void copy_commit() {
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.emplace_back();
}

/* Waits until at most `groups` of the committed groups are under way. */
inline void copy_wait(unsigned groups) {
  std::vector<std::vector<Copy>> &list = current->copies;
  while (list.size() > groups + 1) {
    for (const Copy &copy : list.front()) arrive(copy);
    list.erase(list.begin());
  }
}

/* ---- what a warp does together ---- */
inline void apply_nothing(Thread *const *, uint32_t) {}

inline void apply_shuffle(Thread *const *lanes, uint32_t mask) {
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (!(mask >> lanes[l]->source & 1)) fail("a shuffle reads a lane outside its mask");
    lanes[l]->result = lanes[lanes[l]->source]->value;
  }
}

inline void apply_ballot(Thread *const *lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1) votes |= (uint32_t)(lanes[l]->value != 0) << l;
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1) lanes[l]->result = votes;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

/* C (16, 8) += A (16, depth) B (depth, 8); C lies in the lanes as the PTX ISA says for m16n8. */
inline void add_product(Thread *const *lanes, const float (*a)[16], const float (*b)[8],
                        unsigned depth) {
  for (unsigned l = 0; l < 32; ++l)
    for (unsigned q = 0; q < 4; ++q) {
      unsigned row = l / 4 + q / 2 * 8, column = l % 4 * 2 + q % 2;
      float sum = lanes[l]->c[q];
      for (unsigned k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      lanes[l]->c[q] = sum;
    }
}

/* mma.m16n8k8, TF32 */
inline void apply_mma_tf32(Thread *const *lanes, uint32_t) {
  float a[16][16], b[16][8];
  for (unsigned l = 0; l < 32; ++l) {
    for (unsigned q = 0; q < 4; ++q) {
      if (lanes[l]->a[q] & 0x1fff) fail("an operand of mma is not rounded to TF32");
      a[l / 4 + q % 2 * 8][l % 4 + q / 2 * 4] = float_of(lanes[l]->a[q]);
    }
    for (unsigned q = 0; q < 2; ++q) {
      if (lanes[l]->b[q] & 0x1fff) fail("an operand of mma is not rounded to TF32");
      b[l % 4 + q * 4][l / 4] = float_of(lanes[l]->b[q]);
    }
  }
  add_product(lanes, a, b, 8);
}

/* mma.m16n8k16, bf16: two elements in a register, the one with the smaller k below */
inline void apply_mma_bf16(Thread *const *lanes, uint32_t) {
  float a[16][16], b[16][8];
  for (unsigned l = 0; l < 32; ++l)
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned q = 0; q < 4; ++q)
        a[l / 4 + q % 2 * 8][l % 4 * 2 + half + q / 2 * 8] =
            float_of(lanes[l]->a[q] >> 16 * half << 16);
      for (unsigned q = 0; q < 2; ++q)
        b[l % 4 * 2 + half + q * 8][l / 4] = float_of(lanes[l]->b[q] >> 16 * half << 16);
    }
  add_product(lanes, a, b, 16);
}

void wait(State state, const void *site, uint32_t mask, Collective *collective);

inline void barrier(const void *site) { wait(AT_BARRIER, site, 0, nullptr); }

inline void together(const void *site, uint32_t mask, Collective *collective) {
  if (!(mask >> current->lane & 1)) fail("a lane is not in its own mask");
  wait(AT_COLLECTIVE, site, mask, collective);
}

inline void mma(const void *site, Collective *collective, float *c, const uint32_t *a,
                const uint32_t *b) {
  current->c = c, current->a = a, current->b = b;
  together(site, 0xffffffffu, collective);
}

template <class T> T shuffle(const void *site, uint32_t mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  memcpy(&current->value, &value, sizeof value);
  current->source = source;
  together(site, mask, apply_shuffle);
  memcpy(&value, &current->result, sizeof value);
  return value;
}

/* The four kinds; the warp is cut into groups of `width` lanes. */
template <class T>
T shuffle_index(const void *site, uint32_t mask, T value, int from, int w_ = 32) {
  unsigned w = (unsigned)w_;
  return shuffle(site, mask, value, (current->lane & ~(w - 1)) | ((unsigned)from & (w - 1)));
}

template <class T>
T shuffle_xor(const void *site, uint32_t mask, T value, int with, int width = 32) {
  unsigned from = current->lane ^ (unsigned)with;
  if (from >= (current->lane & ~((unsigned)width - 1)) + (unsigned)width) from = current->lane;
  return shuffle(site, mask, value, from);
}

template <class T>
T shuffle_down(const void *site, uint32_t mask, T value, int by, int width = 32) {
  unsigned from = current->lane + (unsigned)by;
  if (from >= (current->lane & ~((unsigned)width - 1)) + (unsigned)width) from = current->lane;
  return shuffle(site, mask, value, from);
}

template <class T> T shuffle_up(const void *site, uint32_t mask, T value, int by, int width = 32) {
  unsigned first = current->lane & ~((unsigned)width - 1);
  unsigned from = current->lane < first + (unsigned)by ? current->lane : current->lane - by;
  return shuffle(site, mask, value, from);
}

struct SyncWarp {
  const void *site;
  void operator()(uint32_t mask = 0xffffffffu) const { together(site, mask, apply_nothing); }
};

inline uint32_t ballot(const void *site, uint32_t mask, int vote) {
  current->value = vote != 0;
  together(site, mask, apply_ballot);
  return (uint32_t)current->result;
}

/* ---- threads ---- */
inline void prepare(unsigned n) {
  if (machine.threads.size() < n) machine.threads.resize(n);
  for (unsigned i = 0; i < n; ++i) {
    Thread &t = machine.threads[i];
    t.index = dim3(i, 0, 0);
    t.lane = i % 32, t.warp = i / 32;
    t.state = RUNS;
    t.copies.clear();
  }
}

inline void run_body() {
  machine.body(machine.argument);
  for (const std::vector<Copy> &group : current->copies)
    for (const Copy &copy : group)
      if (copy.bytes) fail("a thread ends before its cp.async arrived");
}

#ifdef EMULATOR_THREADS
/* Only the lanes of a warp share a lock, so that no order is made up between warps. */
struct Warp {
  pthread_mutex_t lock;
  pthread_cond_t changed;
};
inline std::vector<Warp> warps;
inline pthread_barrier_t block_barrier;

inline bool arrived(const Thread &t, Thread **lanes) {
  for (unsigned l = 0; l < 32; ++l) {
    if (!(t.mask >> l & 1)) continue;
    if (lanes[l]->state != AT_COLLECTIVE) return false;
    if (lanes[l]->mask != t.mask || lanes[l]->site != t.site)
      fail("lanes wait at different places");
  }
  return true;
}

inline void wait(State state, const void *site, uint32_t mask, Collective *collective) {
  Thread &t = *current;
  if (state == AT_BARRIER) {
    pthread_barrier_wait(&block_barrier);
    return;
  }
  Warp &w = warps[t.warp];
  Thread *lanes[32] = {};
  for (unsigned l = 0; l < 32 && t.warp * 32 + l < machine.block.x; ++l)
    lanes[l] = &machine.threads[t.warp * 32 + l];
  pthread_mutex_lock(&w.lock);
  t.state = state, t.site = site, t.mask = mask;
  if (arrived(t, lanes)) {
    collective(lanes, mask);
    for (unsigned l = 0; l < 32; ++l)
      if (mask >> l & 1) lanes[l]->state = RUNS;
    pthread_cond_broadcast(&w.changed);
  } else
    while (t.state != RUNS) pthread_cond_wait(&w.changed, &w.lock);
  pthread_mutex_unlock(&w.lock);
}

inline void *thread_entry(void *thread) {
  current = (Thread *)thread;
  run_body();
  return nullptr;
}

inline void run_block() {
  unsigned n = machine.block.x;
  std::vector<pthread_t> handles(n);
  prepare(n);
  warps.resize((n + 31) / 32);
  for (Warp &w : warps)
    pthread_mutex_init(&w.lock, nullptr), pthread_cond_init(&w.changed, nullptr);
  pthread_barrier_init(&block_barrier, nullptr, n);
  for (unsigned i : turns(n))
    if (pthread_create(&handles[i], nullptr, thread_entry, &machine.threads[i]))
      fail("the system starts no thread");
  for (pthread_t handle : handles) pthread_join(handle, nullptr);
  pthread_barrier_destroy(&block_barrier);
}
#else
/* ---- fibers ---- */
constexpr size_t STACK = 128 << 10;
inline Thread host; /* the scheduler */

#ifdef EMULATOR_UCONTEXT
inline void exchange(Thread *from, Thread *to) { swapcontext(&from->context, &to->context); }
#else
extern "C" void emulator_exchange(void **from, void *to);
__asm__(".text\n.weak emulator_exchange\n.type emulator_exchange,@function\nemulator_exchange:\n"
        " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
        " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
        ".size emulator_exchange,.-emulator_exchange\n");
inline void exchange(Thread *from, Thread *to) {
  emulator_exchange(&from->stack_pointer, to->stack_pointer);
}
#endif

#ifdef __SANITIZE_ADDRESS__
inline const void *host_stack;
inline size_t host_bytes;
inline void change(Thread *from, Thread *to, bool ends) {
  __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake_stack,
                                 to == &host ? host_stack : to->stack,
                                 to == &host ? host_bytes : STACK);
  exchange(from, to);
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
}
#else
inline void change(Thread *from, Thread *to, bool) { exchange(from, to); }
#endif

inline void fiber_entry() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_bytes);
#endif
  run_body();
  current->state = ENDED;
  change(current, &host, true);
  abort();
}

inline void wait(State state, const void *site, uint32_t mask, Collective *collective) {
  Thread *t = current;
  t->state = state, t->site = site, t->mask = mask, t->collective = collective;
  change(t, &host, false);
}

inline void prepare_fiber(Thread &t) {
  if (!t.stack) t.stack = (char *)aligned_alloc(4096, STACK);
#ifdef EMULATOR_UCONTEXT
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack, t.context.uc_stack.ss_size = STACK;
  t.context.uc_link = nullptr;
  makecontext(&t.context, fiber_entry, 0);
#else
  void **top = (void **)(t.stack + STACK) - 2;
  *top = (void *)fiber_entry;
  top -= 6;
  memset(top, 0, 6 * sizeof *top);
  t.stack_pointer = top;
#endif
}

/* Lets those collectives of a warp happen that all their lanes have reached. */
inline bool release_collectives(unsigned warp) {
  Thread *lanes[32] = {};
  uint32_t waiting = 0;
  bool any = false;
  for (unsigned l = 0; l < 32 && warp * 32 + l < machine.block.x; ++l) {
    lanes[l] = &machine.threads[warp * 32 + l];
    waiting |= (uint32_t)(lanes[l]->state == AT_COLLECTIVE) << l;
  }
  for (unsigned first = 0; first < 32; ++first) {
    if (!(waiting >> first & 1)) continue;
    uint32_t mask = lanes[first]->mask;
    if ((waiting & mask) != mask) continue;
    for (unsigned l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      current = lanes[l];
      if (lanes[l]->mask != mask || lanes[l]->site != lanes[first]->site)
        fail("lanes of a warp wait at different places");
      lanes[l]->state = RUNS;
    }
    lanes[first]->collective(lanes, mask);
    waiting &= ~mask;
    any = true;
    ++machine.collectives;
  }
  return any;
}

/* Runs a warp until each of its lanes waits for others or has ended. */
inline bool run_warp(unsigned warp) {
  unsigned n = std::min(32u, machine.block.x - warp * 32);
  bool any = false, again = true;
  while (again) {
    again = false;
    for (unsigned l : turns(n)) {
      current = &machine.threads[warp * 32 + l];
      if (current->state != RUNS) continue;
      again = true;
      change(&host, current, false);
    }
    again |= release_collectives(warp);
    any |= again;
  }
  return any;
}

inline void run_block() {
  unsigned n = machine.block.x, ended = 0;
  prepare(n);
  for (unsigned i = 0; i < n; ++i) prepare_fiber(machine.threads[i]);
  while (ended < n) {
    bool any = false;
    unsigned waiting = 0;
    for (unsigned warp : turns((n + 31) / 32)) any |= run_warp(warp);
    ended = 0;
    for (unsigned i = 0; i < n; ++i) {
      ended += machine.threads[i].state == ENDED;
      waiting += machine.threads[i].state == AT_BARRIER;
    }
    if (waiting && waiting + ended == n && ended) fail("a barrier after some threads have ended");
    for (unsigned i = 0; i < n && waiting == n; ++i) {
      current = &machine.threads[i];
      if (current->site != machine.threads[0].site) fail("threads wait at different barriers");
      current->state = RUNS;
      any = true;
    }
    machine.barriers += waiting == n;
    if (!any && ended < n) fail("deadlock: not all threads reach a barrier or a shuffle");
  }
  current = nullptr;
}
#endif

/* ---- launches ---- */
inline void launch(const char *kernel, dim3 grid, unsigned threads, void (*body)(void *),
                   void *argument) {
  machine.kernel = kernel;
  machine.grid = grid, machine.block = dim3(threads);
  machine.body = body, machine.argument = argument;
  if (threads < 1 || threads > 1024 || threads % 32) fail("a block is not 1 to 32 whole warps");
  if (grid.x < 1 || grid.y < 1 || grid.y > 65535 || grid.z != 1) fail("the grid is out of range");
  for (unsigned i : turns(grid.x * grid.y)) {
    machine.at = dim3(i % grid.x, i / grid.x, 0);
    poison_shared();
    run_block();
    ++machine.blocks;
  }
}

/* A kernel and what cuLaunchKernel takes for its parameters. */
template <class... A> struct Call {
  void (*kernel)(A...);
  void **arguments;
  template <size_t... I> void go(std::index_sequence<I...>) const {
    kernel(*(std::remove_const_t<A> *)arguments[I]...);
  }
  static void body(void *call) { ((Call *)call)->go(std::index_sequence_for<A...>()); }
};

template <class... A>
void launch(const char *name, void (*kernel)(A...), dim3 grid, unsigned threads, void **arguments) {
  Call<A...> call = {kernel, arguments};
  launch(name, grid, threads, Call<A...>::body, &call);
}

template <class T> T atomic_add(T *p, T x) {
  static_assert(std::is_integral<T>::value, "sums of floats by atomics depend on their order");
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}

} // namespace emulator

/* ---- CUDA's names ---- */
#define __global__
#define __device__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("cuda_shared")))
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::machine.at)
#define blockDim (emulator::machine.block)
#define gridDim (emulator::machine.grid)
#define MOE_SYNC() __syncthreads() /* as moe_cuda.h defines it for NVRTC */
#define EMULATOR_SITE                                                                              \
  ([] {                                                                                            \
    static char site;                                                                              \
    return (const void *)&site;                                                                    \
  }())
#define __syncthreads() emulator::barrier(EMULATOR_SITE)
#define __syncwarp(...) emulator::SyncWarp{EMULATOR_SITE}(__VA_ARGS__)
#define __shfl_sync(mask, ...) emulator::shuffle_index(EMULATOR_SITE, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) emulator::shuffle_xor(EMULATOR_SITE, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) emulator::shuffle_down(EMULATOR_SITE, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) emulator::shuffle_up(EMULATOR_SITE, mask, __VA_ARGS__)
#define __ballot_sync(mask, vote) emulator::ballot(EMULATOR_SITE, mask, vote)
#define __any_sync(mask, vote) (emulator::ballot(EMULATOR_SITE, mask, vote) != 0)
#define __all_sync(mask, vote) (emulator::ballot(EMULATOR_SITE, mask, !(vote)) == 0)
#define __trap() emulator::fail("__trap")
#define __uint_as_float(bits) emulator::float_of(bits)
#define __float_as_uint(x) emulator::bits_of(x)
#define __int_as_float(bits) emulator::float_of((uint32_t)(bits))
#define __float_as_int(x) ((int)emulator::bits_of(x))
#define __ldg(p) (*(p))
#define __fmaf_rn(a, b, c) fmaf(a, b, c)
#define __umulhi(a, b) ((unsigned)((uint64_t)(a) * (uint64_t)(b) >> 32))
#define __umul64hi(a, b) ((uint64_t)((unsigned __int128)(a) * (b) >> 64))
#define __popc(x) __builtin_popcount(x)
#define __ffs(x) __builtin_ffs(x)
#define __clz(x) ((x) ? __builtin_clz((unsigned)(x)) : 32)
#define atomicAdd(p, x) emulator::atomic_add(p, x)
/* Products and sums that the compiler must not fuse */
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

#define EMULATOR_VECTOR(name, type)                                                                \
  struct __align__(8) name##2 {                                                                    \
    type x, y;                                                                                     \
  };                                                                                               \
  struct __align__(16) name##4 {                                                                   \
    type x, y, z, w;                                                                               \
  };                                                                                               \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTOR(float, float)
EMULATOR_VECTOR(int, int)
EMULATOR_VECTOR(uint, unsigned)

/* ---- in place of the PTX in moe_cuda.h, >>cuda_base ---- */
#define MOE__CUDA_PRIMITIVES
#define MOE_UNROLL
#define MOE_ROLL
inline uint32_t moe__d_tf32(float x) { /* to the nearest, ties away from zero */
  uint32_t bits = emulator::bits_of(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}
inline uint32_t moe__d_bf16x2(float low, float high) { /* to the nearest, ties to even */
  uint32_t a = emulator::bits_of(low), b = emulator::bits_of(high);
  a = low != low ? 0x7fff : (a + 0x7fff + (a >> 16 & 1)) >> 16;
  b = high != high ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return a | b << 16;
}
#define moe__d_mma_tf32(c, a, b) emulator::mma(EMULATOR_SITE, emulator::apply_mma_tf32, c, a, b)
#define moe__d_mma_bf16(c, a, b) emulator::mma(EMULATOR_SITE, emulator::apply_mma_bf16, c, a, b)
#define moe__d_copy16(to, from, bytes) emulator::copy_async(to, from, 16, (unsigned)(bytes))
#define moe__d_copy4(to, from, bytes) emulator::copy_async(to, from, 4, (unsigned)(bytes))
#define moe__d_copy_commit() emulator::copy_commit()
#define moe__d_copy_wait1() emulator::copy_wait(1)
#endif
