/* An interpreter of PTX, for tests (C++17): it runs what NVRTC or nvcc made of the kernels of
   moe_cuda.h, warp by warp, with memory of this process as global memory.

     ptx::Module module;
     module.read(text);
     module.allow(p, bytes);                                   memory that kernels may touch
     module.launch("moe_k_name", gx, gy, threads, arguments);  as cuLaunchKernel takes them

   Lanes that have parted run lowest address first and join where they meet. Found, with a sentence
   and abort(): memory out of bounds, misaligned, or touched by two threads without a barrier
   between them where one of them writes (shared and global memory, also between blocks, so that
   results cannot depend on an order); barriers, shuffles and mma that not all lanes reach; more
   threads than .maxntid; floating-point atomics; copies of cp.async that nobody waited for. Shared
   memory starts as NaN, registers as nonsense. Copies arrive when they are waited for, at once, or
   by chance: Module::arrival. An instruction that is not known here is an error, never a guess. */
#ifndef PTX_H
#define PTX_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

constexpr unsigned LANES = 32;
constexpr uint32_t ALL = 0xffffffffu;
/* Generic addresses of shared and local memory and of parameters; global ones are pointers. */
constexpr uint64_t SHARED = 1ull << 60, LOCAL = 2ull << 60, PARAM = 3ull << 60;

enum Order { FORWARD, REVERSE, RANDOM };
enum Arrival { LATE, EARLY, ANY };
enum Space { GENERIC, GLOBAL_SPACE, SHARED_SPACE, LOCAL_SPACE, PARAM_SPACE };
enum Kind { PLAIN, BRANCH, EXIT, BARRIER, COLLECTIVE };
enum Modifier : uint32_t { /* what the parts of an opcode say */
                           WIDE = 1,
                           HIGH = 2,
                           AND = 4,
                           OR = 8,
                           XOR = 16,
                           CLAMP = 32,
                           SATURATE = 64,
                           SIGNED = 128,
                           TRANSPOSED = 256,
                           WRITES = 512,
                           ALL_OF = 1024,
                           ANY_OF = 2048,
                           UNCHECKED = 4096
};

struct Warp;
struct Instruction;
typedef void Handler(Warp &w, const Instruction &i, uint32_t mask);

struct Instruction {
  Handler *run = nullptr;
  Kind kind = PLAIN;
  int predicate = -1;  /* slot; -1: always */
  bool unless = false; /* the predicate is negated */
  int out[4] = {-1, -1, -1, -1};
  int also = -1; /* the second output of setp and shfl: d|p */
  int in[10] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  uint32_t negated = 0; /* bit n: in[n] is a negated predicate */
  int outs = 0, ins = 0;
  int64_t offset[2] = {0, 0}; /* of the addresses in[0] (and in[1], cp.async) */
  Space space = GENERIC;
  unsigned bytes = 4, count = 1; /* of an access: of each element, elements */
  uint32_t flags = 0;            /* Modifier */
  int compare = 0, rounding = 0; /* see compare_of, rounding_of */
  char from = 0, to = 0;         /* cvt: see type_code */
  int member = -1;               /* collectives: the slot that holds the mask; -1: all lanes */
  int target = -1;               /* branches */
  std::string text, label;
};

/* Who touched a piece of memory: the clock when it was, and the thread. Of reads the last two by
   different threads. */
struct Shadow {
  uint64_t written = 0, read = 0, read_before = 0;
  uint32_t writer = 0, reader = 0, reader_before = 0;
};

struct Range { /* memory that kernels may touch */
  uint64_t base = 0, bytes = 0;
  std::vector<Shadow> shadow;
};

struct Copy { /* cp.async */
  uint32_t to;
  uint64_t from;
  unsigned bytes, read;
};

struct Fragment { /* lanes of a warp at the same place */
  int at;
  uint32_t mask;
  Kind waits; /* PLAIN: it runs; BARRIER; COLLECTIVE */
};

struct Kernel {
  std::vector<Instruction> code;
  std::map<std::string, int> slots, labels;
  std::vector<std::pair<int, uint64_t>> constants; /* slots that hold the same in all lanes */
  std::vector<std::pair<int, std::string>> specials;
  std::map<std::string, uint64_t> symbols; /* addresses in shared, local, parameter memory */
  std::vector<unsigned> parameter_bytes, parameter_at;
  unsigned parameters = 0, shared = 0, local = 0, most_threads = 1024;
  unsigned shared_granule = 4, global_granule = 4; /* the smallest piece that is written */
};

class Module;

struct Warp {
  Module *module;
  const Kernel *kernel;
  unsigned index;
  std::vector<uint64_t> file; /* (slots, 32) */
  std::vector<Fragment> fragments;
  std::vector<std::vector<uint8_t>> local; /* (32) */
  std::vector<std::vector<Copy>> copies[LANES];
  uint32_t exited;
  uint64_t since; /* the clock at its last barrier */
  uint64_t *slot(int s) { return file.data() + (size_t)s * LANES; }
};

class Module {
public:
  Order order = FORWARD;
  Arrival arrival = LATE;
  bool races = true; /* look for them */
  std::mt19937 random{1};
  std::map<std::string, Kernel> kernels;
  uint64_t executed = 0; /* instructions of warps */

  void read(const char *text);
  void allow(const void *p, size_t bytes);
  void forbid(const void *p);
  bool has(const char *name) const { return kernels.count(name) != 0; }
  void launch(const char *name, unsigned gx, unsigned gy, unsigned threads, void **arguments);

  [[noreturn]] void fail(const std::string &what) const;
  uint8_t *access(Warp &w, const Instruction &i, unsigned lane, uint64_t address, Space space,
                  unsigned bytes, bool write);
  void arrive(Warp &w, unsigned lane, const Copy &copy, const Instruction &i);
  uint64_t special(const Warp &w, const std::string &name, unsigned lane) const;

private:
  friend struct Reader;
  std::map<uint64_t, Range> ranges; /* by base */
  Range *latest = nullptr;          /* the one found last */
  std::map<std::string, uint64_t> symbols;
  std::map<std::string, std::vector<uint8_t>> variables;
  std::vector<std::string> shared_texts; /* declarations outside kernels */
  std::vector<uint8_t> shared, parameters;
  std::vector<Shadow> shared_shadow;
  std::vector<Warp> warps;
  unsigned grid[2] = {1, 1}, at[2] = {0, 0}, threads = 0, granule = 0;
  const Kernel *kernel = nullptr;
  std::string name;
  const Instruction *instruction = nullptr;
  uint64_t clock = 1, block_since = 1, launch_since = 1;

  std::vector<unsigned> turns(unsigned n);
  void touch(Warp &w, unsigned lane, Shadow *shadow, unsigned granules, bool write);
  bool ordered(const Warp &w, uint32_t me, uint64_t stamp, uint32_t other) const;
  Range *range_of(uint64_t address, unsigned bytes);
  void start(Warp &w, unsigned index);
  void run_block();
  bool run_warp(Warp &w);
  void run_fragment(Warp &w, Fragment f);
  bool ready(Warp &w, const Instruction &i, uint32_t mask);
  void wait(Warp &w, const Fragment &f, Kind kind);
  bool release(Warp &w);
  bool release_block();
  void end(Warp &w, uint32_t mask);
};

/* ---- lanes ---- */
template <class F> inline void each(uint32_t mask, F f) {
  if (mask == ALL)
    for (unsigned l = 0; l < LANES; ++l) f(l);
  else
    for (; mask; mask &= mask - 1) f((unsigned)__builtin_ctz(mask));
}

template <class T> inline T get(const uint64_t *slot, unsigned lane) {
  T x;
  memcpy(&x, slot + lane, sizeof x);
  return x;
}

template <class T> inline void set(uint64_t *slot, unsigned lane, T x) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  slot[lane] = bits;
}

/* d = f(a), f(a, b), f(a, b, c) in type T, d in type D */
template <class D, class T, class F> void unary(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t *d = w.slot(i.out[0]);
  const uint64_t *a = w.slot(i.in[0]);
  each(mask, [&](unsigned l) { set<D>(d, l, F::f(get<T>(a, l))); });
}

template <class D, class T, class F> void binary(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t *d = w.slot(i.out[0]);
  const uint64_t *a = w.slot(i.in[0]), *b = w.slot(i.in[1]);
  each(mask, [&](unsigned l) { set<D>(d, l, F::f(get<T>(a, l), get<T>(b, l))); });
}

template <class D, class T, class F> void ternary(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t *d = w.slot(i.out[0]);
  const uint64_t *a = w.slot(i.in[0]), *b = w.slot(i.in[1]), *c = w.slot(i.in[2]);
  each(mask, [&](unsigned l) { set<D>(d, l, F::f(get<T>(a, l), get<T>(b, l), get<D>(c, l))); });
}

/* ---- arithmetic; integers are unsigned here where the sign does not matter ---- */
#define PTX_UNARY(name, expression)                                                                \
  struct name {                                                                                    \
    template <class T> static T f(T a) { return (T)(expression); }                                 \
  };
#define PTX_BINARY(name, expression)                                                               \
  struct name {                                                                                    \
    template <class T> static T f(T a, T b) { return (T)(expression); }                            \
  };
PTX_BINARY(Add, a + b)
PTX_BINARY(Sub, a - b)
PTX_BINARY(Mul, a *b)
PTX_BINARY(Div, a / b)
PTX_BINARY(Min, b < a ? b : a)
PTX_BINARY(Max, a < b ? b : a)
PTX_BINARY(BitAnd, a &b)
PTX_BINARY(BitOr, a | b)
PTX_BINARY(BitXor, a ^ b)
PTX_UNARY(Move, a)
PTX_UNARY(Neg, -a)
PTX_UNARY(Not, ~a)
PTX_UNARY(NotPredicate, !(a & 1))
PTX_UNARY(AbsFloat, a < 0 || (a == 0 && signbit(a)) ? -a : a)
PTX_UNARY(AbsInt, a < 0 ? (T)0 - a : a)
PTX_UNARY(Reciprocal, (T)1 / a)
PTX_UNARY(Sqrt, sqrt(a))
PTX_UNARY(RSqrt, (T)1 / sqrt(a))
PTX_UNARY(Exp2, exp2(a))
PTX_UNARY(Log2, log2(a))
PTX_UNARY(Sin, sin(a))
PTX_UNARY(Cos, cos(a))
PTX_UNARY(Tanh, tanh(a))
#undef PTX_UNARY
#undef PTX_BINARY

struct Quotient { /* of integers: by zero all bits are 1, as the hardware does */
  template <class T> static T f(T a, T b) {
    if (b == 0) return (T) ~(T)0;
    if (b == (T)-1 && (T)-1 < 0) return (T)(0 - (uint64_t)a);
    return (T)(a / b);
  }
};
struct Remainder {
  template <class T> static T f(T a, T b) {
    if (b == 0) return a;
    if (b == (T)-1 && (T)-1 < 0) return 0;
    return (T)(a % b);
  }
};
struct MinFloat {
  template <class T> static T f(T a, T b) { return fmin(a, b); }
};
struct MaxFloat {
  template <class T> static T f(T a, T b) { return fmax(a, b); }
};
struct CopySign { /* the sign of a, the rest of b */
  template <class T> static T f(T a, T b) { return copysign(b, a); }
};
struct Fma {
  static float f(float a, float b, float c) { return fmaf(a, b, c); }
  static double f(double a, double b, double c) { return fma(a, b, c); }
};
struct MulAdd {
  template <class T> static T f(T a, T b, T c) { return (T)(a * b + c); }
};
/* Full products: of 32 bits to 64, and the upper halves. */
struct MulWide {
  static uint64_t f(uint32_t a, uint32_t b) { return (uint64_t)a * b; }
  static int64_t f(int32_t a, int32_t b) { return (int64_t)a * b; }
  static uint32_t f(uint16_t a, uint16_t b) { return (uint32_t)a * b; }
  static int32_t f(int16_t a, int16_t b) { return a * b; }
};
struct MulAddWide {
  static uint64_t f(uint32_t a, uint32_t b, uint64_t c) { return (uint64_t)a * b + c; }
  static int64_t f(int32_t a, int32_t b, int64_t c) {
    return (int64_t)((uint64_t)((int64_t)a * b) + (uint64_t)c);
  }
};
struct MulHigh {
  static uint32_t f(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
  static int32_t f(int32_t a, int32_t b) { return (int32_t)((int64_t)a * b >> 32); }
  static uint64_t f(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
  static int64_t f(int64_t a, int64_t b) { return (int64_t)((__int128)a * b >> 64); }
};

/* Shifts by an amount of 32 bits; amounts beyond the width count as the width. */
template <class T, bool left> void shift(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t *d = w.slot(i.out[0]);
  const uint64_t *a = w.slot(i.in[0]), *b = w.slot(i.in[1]);
  constexpr uint32_t width = sizeof(T) * 8;
  each(mask, [&](unsigned l) {
    T x = get<T>(a, l);
    uint32_t by = get<uint32_t>(b, l);
    if (left)
      x = by < width ? (T)(x << by) : 0;
    else
      x = by < width ? (T)(x >> by) : x < 0 ? (T)-1 : 0;
    set<T>(d, l, x);
  });
}

/* shf: 32 bits out of b:a */
template <bool left> void funnel(Warp &w, const Instruction &i, uint32_t mask) {
  each(mask, [&](unsigned l) {
    uint64_t both =
        (uint64_t)get<uint32_t>(w.slot(i.in[1]), l) << 32 | get<uint32_t>(w.slot(i.in[0]), l);
    uint32_t by = get<uint32_t>(w.slot(i.in[2]), l);
    by = i.flags & CLAMP ? std::min(by, 32u) : by % 32;
    set<uint32_t>(w.slot(i.out[0]), l, (uint32_t)(left ? both << by >> 32 : both >> by));
  });
}

inline void permute_bytes(Warp &w, const Instruction &i, uint32_t mask) { /* prmt */
  each(mask, [&](unsigned l) {
    uint64_t both =
        (uint64_t)get<uint32_t>(w.slot(i.in[1]), l) << 32 | get<uint32_t>(w.slot(i.in[0]), l);
    uint32_t select = get<uint32_t>(w.slot(i.in[2]), l), d = 0;
    for (unsigned n = 0; n < 4; ++n) {
      uint32_t s = select >> 4 * n & 15, byte = (uint32_t)(both >> 8 * (s & 7)) & 255;
      if (s & 8) byte = byte & 128 ? 255 : 0;
      d |= byte << 8 * n;
    }
    set<uint32_t>(w.slot(i.out[0]), l, d);
  });
}

inline void logic3(Warp &w, const Instruction &i, uint32_t mask) { /* lop3 */
  each(mask, [&](unsigned l) {
    uint32_t a = get<uint32_t>(w.slot(i.in[0]), l), b = get<uint32_t>(w.slot(i.in[1]), l);
    uint32_t c = get<uint32_t>(w.slot(i.in[2]), l), table = get<uint32_t>(w.slot(i.in[3]), l);
    uint32_t d = 0;
    for (unsigned n = 0; n < 8; ++n)
      if (table >> n & 1) d |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
    set<uint32_t>(w.slot(i.out[0]), l, d);
  });
}

template <class T> void extract_bits(Warp &w, const Instruction &i, uint32_t mask) { /* bfe */
  constexpr uint32_t width = sizeof(T) * 8;
  each(mask, [&](unsigned l) {
    uint64_t a = (uint64_t)(int64_t)get<T>(w.slot(i.in[0]), l);
    uint32_t at = get<uint32_t>(w.slot(i.in[1]), l) & 255;
    uint32_t n = get<uint32_t>(w.slot(i.in[2]), l) & 255;
    bool is_signed = (T)-1 < 0;
    uint64_t sign = is_signed && n ? a >> std::min(at + n - 1, width - 1) & 1 : 0, d = 0;
    for (uint32_t k = 0; k < width; ++k)
      d |= (k < n && at + k < width ? a >> (at + k) & 1 : sign) << k;
    set<T>(w.slot(i.out[0]), l, (T)d);
  });
}

template <class T> void insert_bits(Warp &w, const Instruction &i, uint32_t mask) { /* bfi */
  constexpr uint32_t width = sizeof(T) * 8;
  each(mask, [&](unsigned l) {
    T a = get<T>(w.slot(i.in[0]), l), d = get<T>(w.slot(i.in[1]), l);
    uint32_t at = get<uint32_t>(w.slot(i.in[2]), l) & 255;
    uint32_t n = get<uint32_t>(w.slot(i.in[3]), l) & 255;
    for (uint32_t k = 0; k < n && at + k < width; ++k)
      d = (T)((d & ~((T)1 << (at + k))) | (a >> k & 1) << (at + k));
    set<T>(w.slot(i.out[0]), l, d);
  });
}

struct CountOnes {
  static uint32_t f(uint32_t a) { return (uint32_t)__builtin_popcount(a); }
  static uint32_t f(uint64_t a) { return (uint32_t)__builtin_popcountll(a); }
};
struct LeadingZeros {
  static uint32_t f(uint32_t a) { return a ? (uint32_t)__builtin_clz(a) : 32; }
  static uint32_t f(uint64_t a) { return a ? (uint32_t)__builtin_clzll(a) : 64; }
};
struct ReverseBits {
  static uint32_t f(uint32_t a) {
    uint32_t d = 0;
    for (unsigned k = 0; k < 32; ++k) d |= (a >> k & 1) << (31 - k);
    return d;
  }
};
struct HighestBit { /* bfind */
  static uint32_t f(uint32_t a) { return a ? 31 - (uint32_t)__builtin_clz(a) : ALL; }
  static uint32_t f(uint64_t a) { return a ? 63 - (uint32_t)__builtin_clzll(a) : ALL; }
};

/* ---- predicates ---- */
enum { EQ, NE, LT, LE, GT, GE, NUM, NAN_ };
/* A comparison as a number; + 8: also true where one is NaN. -1: unknown. */
inline int compare_of(const std::string &name) {
  static const std::map<std::string, int> table = {
      {"eq", EQ},      {"ne", NE},      {"lt", LT},      {"le", LE},      {"gt", GT},
      {"ge", GE},      {"lo", LT},      {"ls", LE},      {"hi", GT},      {"hs", GE},
      {"equ", EQ + 8}, {"neu", NE + 8}, {"ltu", LT + 8}, {"leu", LE + 8}, {"gtu", GT + 8},
      {"geu", GE + 8}, {"num", NUM},    {"nan", NAN_}};
  auto found = table.find(name);
  return found == table.end() ? -1 : found->second;
}

template <class T> inline bool compares(int how, T a, T b) {
  bool unordered = a != a || b != b;
  if (how == NUM) return !unordered;
  if (how == NAN_) return unordered;
  if (unordered) return how >= 8;
  switch (how & 7) {
    case EQ: return a == b;
    case NE: return a != b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    default: return a >= b;
  }
}

template <class T> void compare(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t *d = w.slot(i.out[0]);
  const uint64_t *a = w.slot(i.in[0]), *b = w.slot(i.in[1]);
  each(mask, [&](unsigned l) {
    bool p = compares(i.compare, get<T>(a, l), get<T>(b, l)), q = !p;
    if (i.ins == 3) {
      bool c = (w.slot(i.in[2])[l] & 1) != (i.negated >> 2 & 1);
      p = i.flags & AND ? p && c : i.flags & OR ? p || c : p != c;
      q = i.flags & AND ? q && c : i.flags & OR ? q || c : q != c;
    }
    d[l] = p;
    if (i.also >= 0) w.slot(i.also)[l] = q;
  });
}

inline void select(Warp &w, const Instruction &i, uint32_t mask) { /* selp */
  uint64_t *d = w.slot(i.out[0]);
  const uint64_t *a = w.slot(i.in[0]), *b = w.slot(i.in[1]), *p = w.slot(i.in[2]);
  each(mask, [&](unsigned l) { d[l] = p[l] & 1 ? a[l] : b[l]; });
}

/* ---- moves ---- */
inline void move(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t *d = w.slot(i.out[0]);
  const uint64_t *a = w.slot(i.in[0]);
  each(mask, [&](unsigned l) { d[l] = a[l]; });
}

/* mov.b64 {a, b}, c and mov.b64 c, {a, b}; i.bytes: of c */
inline void unpack(Warp &w, const Instruction &i, uint32_t mask) {
  unsigned bits = i.bytes * 8 / (unsigned)i.outs;
  each(mask, [&](unsigned l) {
    uint64_t c = w.slot(i.in[0])[l];
    for (int n = 0; n < i.outs; ++n)
      if (i.out[n] >= 0) w.slot(i.out[n])[l] = c >> bits * (unsigned)n & ((1ull << bits) - 1);
  });
}

inline void pack(Warp &w, const Instruction &i, uint32_t mask) {
  unsigned bits = i.bytes * 8 / (unsigned)i.ins;
  each(mask, [&](unsigned l) {
    uint64_t c = 0;
    for (int n = 0; n < i.ins; ++n)
      c |= (w.slot(i.in[n])[l] & ((1ull << bits) - 1)) << bits * (unsigned)n;
    w.slot(i.out[0])[l] = c;
  });
}

/* cvta: i.space is the space, SIGNED that the generic address is the input (cvta.to) */
inline void convert_address(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t window = i.space == SHARED_SPACE  ? SHARED
                    : i.space == LOCAL_SPACE ? LOCAL
                    : i.space == PARAM_SPACE ? PARAM
                                             : 0;
  each(mask, [&](unsigned l) {
    uint64_t a = w.slot(i.in[0])[l];
    w.slot(i.out[0])[l] = i.flags & SIGNED ? a - window : a + window;
  });
}

/* ---- conversions ---- */
enum { NEAREST, TO_ZERO, DOWN, UP };

/* Letters for types: u s for integers with 8 16 32 64 bits as bBhHwWlL..., see the table. */
inline char type_code(const std::string &type) {
  static const std::map<std::string, char> table = {
      {"u8", 'b'},   {"s8", 'B'},     {"u16", 'h'},  {"s16", 'H'}, {"u32", 'w'},
      {"s32", 'W'},  {"u64", 'l'},    {"s64", 'L'},  {"f32", 'f'}, {"f64", 'd'},
      {"bf16", 'q'}, {"b16", 'h'},    {"b32", 'w'},  {"b64", 'l'}, {"b8", 'b'},
      {"f16", 'x'},  {"bf16x2", 'Q'}, {"pred", 'p'}, {"tf32", 't'}};
  auto found = table.find(type);
  return found == table.end() ? 0 : found->second;
}

inline bool is_float(char type) { return type == 'f' || type == 'd' || type == 'q'; }

inline float from_bf16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

inline uint16_t to_bf16(float x) { /* to the nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t to_tf32(uint32_t bits) { /* to the nearest, ties away from zero */
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

inline double rounded(double x, int rounding) {
  return rounding == TO_ZERO ? trunc(x)
         : rounding == DOWN  ? floor(x)
         : rounding == UP    ? ceil(x)
                             : nearbyint(x);
}

/* A number clamped to an integer type, as cvt does; NaN becomes 0. */
inline uint64_t to_integer(double x, char to) {
  static const std::map<char, std::pair<double, double>> limits = {
      {'b', {0, 255}},        {'B', {-128, 127}},       {'h', {0, 65535}},
      {'H', {-32768, 32767}}, {'w', {0, 4294967295.0}}, {'W', {-2147483648.0, 2147483647.0}}};
  if (x != x) return 0;
  if (to == 'l') return x <= 0 ? 0 : x >= 18446744073709551616.0 ? ~0ull : (uint64_t)x;
  if (to == 'L') {
    if (x >= 9223372036854775808.0) return INT64_MAX;
    return x <= -9223372036854775808.0 ? (uint64_t)INT64_MIN : (uint64_t)(int64_t)x;
  }
  auto limit = limits.at(to);
  return (uint64_t)(int64_t)std::min(std::max(x, limit.first), limit.second);
}

inline uint64_t extended(uint64_t bits, char type) { /* an integer of that type in 64 bits */
  switch (type) {
    case 'b': return (uint8_t)bits;
    case 'B': return (uint64_t)(int8_t)bits;
    case 'h': return (uint16_t)bits;
    case 'H': return (uint64_t)(int16_t)bits;
    case 'w': return (uint32_t)bits;
    case 'W': return (uint64_t)(int32_t)bits;
    default: return bits;
  }
}

inline uint64_t float_bits(double x, char to) {
  uint64_t bits = 0;
  float single = (float)x;
  if (to == 'd') return memcpy(&bits, &x, sizeof x), bits;
  if (to == 'q') return to_bf16(single);
  return memcpy(&bits, &single, sizeof single), bits;
}

inline uint64_t converted(uint64_t a, const Instruction &i) {
  if (is_float(i.from)) {
    double x = i.from == 'd'   ? get<double>(&a, 0)
               : i.from == 'q' ? (double)from_bf16((uint16_t)a)
                               : (double)get<float>(&a, 0);
    if (!is_float(i.to)) return to_integer(rounded(x, i.rounding), i.to);
    if (i.rounding >= 8) x = rounded(x, i.rounding & 7);
    if (i.flags & SATURATE) x = x > 0 ? std::min(x, 1.0) : 0;
    return float_bits(x, i.to);
  }
  a = extended(a, i.from);
  if (!is_float(i.to)) return extended(a, i.to);
  bool is_signed = i.from >= 'A' && i.from <= 'Z';
  if (i.to == 'f') { /* one rounding only */
    float x = is_signed ? (float)(int64_t)a : (float)a;
    uint64_t bits = 0;
    return memcpy(&bits, &x, sizeof x), bits;
  }
  return float_bits(is_signed ? (double)(int64_t)a : (double)a, i.to);
}

inline void convert(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t *d = w.slot(i.out[0]);
  const uint64_t *a = w.slot(i.in[0]);
  each(mask, [&](unsigned l) { d[l] = converted(a[l], i); });
}

inline void convert_tf32(Warp &w, const Instruction &i, uint32_t mask) {
  each(mask, [&](unsigned l) {
    set<uint32_t>(w.slot(i.out[0]), l, to_tf32(get<uint32_t>(w.slot(i.in[0]), l)));
  });
}

inline void convert_bf16x2(Warp &w, const Instruction &i, uint32_t mask) { /* d = a : b */
  each(mask, [&](unsigned l) {
    uint32_t high = to_bf16(get<float>(w.slot(i.in[0]), l));
    uint32_t low = to_bf16(get<float>(w.slot(i.in[1]), l));
    set<uint32_t>(w.slot(i.out[0]), l, high << 16 | low);
  });
}

/* ---- memory ---- */
inline void load(Warp &w, const Instruction &i, uint32_t mask) {
  const uint64_t *a = w.slot(i.in[0]);
  each(mask, [&](unsigned l) {
    const uint8_t *p =
        w.module->access(w, i, l, a[l] + (uint64_t)i.offset[0], i.space, i.bytes * i.count, false);
    for (unsigned n = 0; n < i.count; ++n) {
      uint64_t x = 0;
      memcpy(&x, p + n * i.bytes, i.bytes);
      if (i.flags & SIGNED && i.bytes < 8 && x >> (i.bytes * 8 - 1)) x |= ~0ull << i.bytes * 8;
      if (i.out[n] >= 0) w.slot(i.out[n])[l] = x;
    }
  });
}

inline void store(Warp &w, const Instruction &i, uint32_t mask) {
  const uint64_t *a = w.slot(i.in[0]);
  each(mask, [&](unsigned l) {
    uint8_t *p =
        w.module->access(w, i, l, a[l] + (uint64_t)i.offset[0], i.space, i.bytes * i.count, true);
    for (unsigned n = 0; n < i.count; ++n)
      memcpy(p + n * i.bytes, w.slot(i.in[1 + n]) + l, i.bytes);
  });
}

/* atom and red on integers; in: address, operand */
template <class T, class F> void atomic(Warp &w, const Instruction &i, uint32_t mask) {
  each(mask, [&](unsigned l) {
    uint64_t address = w.slot(i.in[0])[l] + (uint64_t)i.offset[0];
    uint8_t *p = w.module->access(w, i, l, address, i.space, sizeof(T), false);
    T old;
    memcpy(&old, p, sizeof old);
    T next = F::f(old, get<T>(w.slot(i.in[1]), l));
    memcpy(p, &next, sizeof next);
    if (i.outs) set<T>(w.slot(i.out[0]), l, old);
  });
}

/* ---- cp.async ---- */
inline void copy_async(Warp &w, const Instruction &i, uint32_t mask) {
  Module &m = *w.module;
  each(mask, [&](unsigned l) {
    Copy copy = {(uint32_t)w.slot(i.in[0])[l] + (uint32_t)i.offset[0],
                 w.slot(i.in[1])[l] + (uint64_t)i.offset[1], i.bytes, i.bytes};
    if (i.ins > 3) copy.read = get<uint32_t>(w.slot(i.in[3]), l);
    if (copy.read > copy.bytes) m.fail("cp.async reads more than it writes");
    if (copy.from % copy.bytes) m.fail("the source of cp.async is misaligned");
    m.access(w, i, l, copy.to, SHARED_SPACE, copy.bytes, true);
    if (m.arrival == EARLY || (m.arrival == ANY && m.random() % 2)) {
      m.arrive(w, l, copy, i);
      copy.bytes = 0;
    }
    if (w.copies[l].empty()) w.copies[l].emplace_back();
    w.copies[l].back().push_back(copy);
  });
}

inline void copy_commit(Warp &w, const Instruction &, uint32_t mask) {
  each(mask, [&](unsigned l) {
    if (w.copies[l].empty()) w.copies[l].emplace_back();
    w.copies[l].emplace_back();
  });
}

/* wait_group n: in[0]; wait_all: none */
inline void copy_wait(Warp &w, const Instruction &i, uint32_t mask) {
  each(mask, [&](unsigned l) {
    size_t keep = i.ins ? (size_t)w.slot(i.in[0])[l] + 1 : 0;
    while (w.copies[l].size() > keep) {
      for (const Copy &copy : w.copies[l].front())
        if (copy.bytes) w.module->arrive(w, l, copy, i);
      w.copies[l].erase(w.copies[l].begin());
    }
  });
}

/* ---- what a warp does together ---- */
inline void nothing(Warp &, const Instruction &, uint32_t) {}

enum { BY_INDEX, BY_XOR, BY_UP, BY_DOWN };
template <int how> void shuffle(Warp &w, const Instruction &i, uint32_t mask) {
  uint64_t value[LANES];
  memcpy(value, w.slot(i.in[0]), sizeof value);
  each(mask, [&](unsigned l) {
    uint32_t b = get<uint32_t>(w.slot(i.in[1]), l) & 31, c = get<uint32_t>(w.slot(i.in[2]), l);
    uint32_t segment = c >> 8 & 31, member = get<uint32_t>(w.slot(i.in[3]), l);
    uint32_t last = (l & segment) | (c & 31 & ~segment);
    int from = how == BY_INDEX ? (int)((l & segment) | (b & ~segment))
               : how == BY_XOR ? (int)(l ^ b)
               : how == BY_UP  ? (int)l - (int)b
                               : (int)(l + b);
    bool inside = how == BY_UP ? from >= (int)last : from <= (int)last;
    if (!inside) from = (int)l;
    if (!(member >> from & 1)) w.module->fail("shfl.sync reads a lane outside its mask");
    set<uint32_t>(w.slot(i.out[0]), l, (uint32_t)value[from]);
    if (i.also >= 0) w.slot(i.also)[l] = inside;
  });
}

inline void vote(Warp &w, const Instruction &i, uint32_t mask) {
  uint32_t votes = 0;
  each(mask,
       [&](unsigned l) { votes |= (uint32_t)((w.slot(i.in[0])[l] & 1) != (i.negated & 1)) << l; });
  uint64_t d = i.flags & ALL_OF ? votes == mask : i.flags & ANY_OF ? votes != 0 : votes;
  each(mask, [&](unsigned l) { w.slot(i.out[0])[l] = d; });
}

/* d (16, 8) = a (16, depth) b (depth, 8) + c, spread over the lanes as the PTX ISA says; in: 4
   registers of a, 2 of b, 4 of c */
inline void add_product(Warp &w, const Instruction &i, const float (*a)[16], const float (*b)[8],
                        unsigned depth) {
  for (unsigned l = 0; l < LANES; ++l)
    for (unsigned q = 0; q < 4; ++q) {
      unsigned row = l / 4 + q / 2 * 8, column = l % 4 * 2 + q % 2;
      float sum = get<float>(w.slot(i.in[6 + q]), l);
      for (unsigned k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      set<float>(w.slot(i.out[q]), l, sum);
    }
}

inline void mma_tf32(Warp &w, const Instruction &i, uint32_t) { /* m16n8k8 */
  float a[16][16], b[16][8];
  auto operand = [&](int slot, unsigned l) {
    uint64_t bits = w.slot(slot)[l] & 0xffffe000u;
    return get<float>(&bits, 0);
  };
  for (unsigned l = 0; l < LANES; ++l) {
    for (unsigned q = 0; q < 4; ++q) a[l / 4 + q % 2 * 8][l % 4 + q / 2 * 4] = operand(i.in[q], l);
    for (unsigned q = 0; q < 2; ++q) b[l % 4 + q * 4][l / 4] = operand(i.in[4 + q], l);
  }
  add_product(w, i, a, b, 8);
}

inline void mma_bf16(Warp &w, const Instruction &i, uint32_t) { /* m16n8k16 */
  float a[16][16], b[16][8];
  for (unsigned l = 0; l < LANES; ++l)
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned q = 0; q < 4; ++q)
        a[l / 4 + q % 2 * 8][l % 4 * 2 + half + q / 2 * 8] =
            from_bf16((uint16_t)(w.slot(i.in[q])[l] >> 16 * half));
      for (unsigned q = 0; q < 2; ++q)
        b[l % 4 * 2 + half + q * 8][l / 4] =
            from_bf16((uint16_t)(w.slot(i.in[4 + q])[l] >> 16 * half));
    }
  add_product(w, i, a, b, 16);
}

/* ldmatrix: i.count matrices of 8 x 8 elements of 16 bits; lane 8 n + r has the address of row r of
   matrix n */
inline void load_matrix(Warp &w, const Instruction &i, uint32_t) {
  for (unsigned n = 0; n < i.count; ++n) {
    uint16_t x[8][8];
    for (unsigned r = 0; r < 8; ++r) {
      uint64_t address = (uint32_t)w.slot(i.in[0])[n * 8 + r] + (uint64_t)i.offset[0];
      memcpy(x[r], w.module->access(w, i, n * 8 + r, address, SHARED_SPACE, 16, false), 16);
    }
    for (unsigned l = 0; l < LANES; ++l) {
      unsigned r = l / 4, c = l % 4 * 2;
      uint32_t low = i.flags & TRANSPOSED ? x[c][r] : x[r][c];
      uint32_t high = i.flags & TRANSPOSED ? x[c + 1][r] : x[r][c + 1];
      set<uint32_t>(w.slot(i.out[n]), l, high << 16 | low);
    }
  }
}

} // namespace ptx
#include "ptx_read.h"
#include "ptx_run.h"
#endif
