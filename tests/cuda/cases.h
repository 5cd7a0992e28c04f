/* What the tests of kernels share: one op on random arrays, by the CPU and by the device, and the
   comparison of every array afterwards. */
#ifndef CASES_H
#define CASES_H
#include <string>
#include <vector>

enum { CPU, GPU, SIDES };
enum cases_kind { SAME, NEAR, ANY_VALUE }; /* afterwards: equal bytes; near by norm; whatever */

struct Case;
/* An array on both sides; NULL on both where it is left out. */
template <class T> struct Array {
  Case *owner = nullptr;
  int index = -1;
  T *at(int side) const;
  T &operator[](size_t i) const { return at(CPU)[i]; } /* before send() */
};

struct Block {
  std::string name;
  cases_kind kind = SAME;
  double tolerance = 0; /* 0: the case's */
  double least = 1e-30; /* a difference that is none, whatever the norm */
  std::vector<char> cpu;
  void *gpu = nullptr;
};

struct Mode { /* what a run is about */
  int arch, tf32;
  moe_type precision;
  double tolerance; /* of products */
  int cublas;       /* linear layers by a double of it */
};

static moe_backend cases_gpu;
static moe_env cases_cpu, cases_env;
static Mode cases_mode;

static void cases_log(void *, moe_status status, const char *sentence) {
  printf("        (%d) %s\n", (int)status, sentence);
}

struct Case {
  uint64_t state;
  int number;
  double tolerance = 1e-5;
  const char *what = "";
  std::string failure;
  std::vector<Block> blocks;

  explicit Case(int number_, uint64_t seed)
      : state(seed + (uint64_t)number_ * 7919), number(number_) {
    for (int i = 0; i < 4; ++i) uniform();
    blocks.reserve(64);
  }
  Case(const Case &) = delete;
  Case &operator=(const Case &) = delete;
  ~Case() {
    for (Block &b : blocks)
      if (b.gpu) cases_gpu.release(&cases_gpu, b.gpu);
  }

  float uniform() { /* -1 .. 1 */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 40) / 8388608.0f - 1.0f;
  }
  int pick(int low, int high) { /* low .. high */
    (void)uniform();
    return low + (int)((state >> 33) % (uint64_t)(high - low + 1));
  }
  bool chance(int percent) { return pick(1, 100) <= percent; }

  template <class T>
  Array<T> array(const char *name, size_t n, cases_kind kind, bool given = true) {
    Array<T> a;
    if (!given) return a;
    a.owner = this, a.index = (int)blocks.size();
    blocks.emplace_back();
    blocks.back().name = name, blocks.back().kind = kind;
    blocks.back().cpu.assign(n * sizeof(T), (char)0xff);
    return a;
  }
  /* Numbers in, which must stay what they are. */
  Array<float> input(const char *name, size_t n, float scale = 1, bool given = true) {
    Array<float> a = array<float>(name, n, SAME, given);
    for (size_t i = 0; i < n && given; ++i) a[i] = scale * uniform();
    return a;
  }
  /* What is overwritten: NaN before. */
  Array<float> output(const char *name, size_t n, bool given = true) {
    return array<float>(name, n, NEAR, given);
  }
  /* What is added to: random numbers before. */
  Array<float> gradient(const char *name, size_t n, bool given = true) {
    Array<float> a = array<float>(name, n, NEAR, given);
    for (size_t i = 0; i < n && given; ++i) a[i] = uniform();
    return a;
  }
  template <class T>
  void expect(const Array<T> &a, cases_kind kind, double tolerance_ = 0, double least = 1e-30) {
    if (a.index < 0) return;
    blocks[(size_t)a.index].kind = kind, blocks[(size_t)a.index].tolerance = tolerance_;
    blocks[(size_t)a.index].least = least;
  }

  void fail(const std::string &why) {
    if (failure.empty()) failure = why;
  }
  void status(moe_status s, int side) {
    if (s)
      fail(std::string(what) + (side == CPU ? ": the CPU" : ": the GPU") + " returns an error");
  }

  /* Copies all arrays to the device. */
  void send() {
    for (Block &b : blocks) {
      if (!b.gpu && b.cpu.size() && cases_gpu.alloc(&cases_gpu, &cases_env, &b.gpu, b.cpu.size()))
        return fail("no memory on the device");
      if (b.cpu.size() &&
          cases_gpu.upload(&cases_gpu, &cases_env, b.gpu, b.cpu.data(), b.cpu.size()))
        return fail("upload fails");
    }
  }

  void compare_floats(const Block &b, const float *gpu) {
    const float *cpu = (const float *)(const void *)b.cpu.data();
    size_t n = b.cpu.size() / sizeof(float), worst = 0;
    double norm = 0, difference = 0, most = -1;
    double limit = b.tolerance > 0 ? b.tolerance : tolerance;
    if (n < 8) limit *= limit > 1e-5 ? 20 : 4; /* a few sums may cancel */
    for (size_t i = 0; i < n; ++i) {
      double d = fabs((double)cpu[i] - (double)gpu[i]);
      if (cpu[i] != cpu[i] || cpu[i] == gpu[i]) d = 0;
      norm += cpu[i] == cpu[i] ? (double)cpu[i] * (double)cpu[i] : 0, difference += d * d;
      if (!(d <= most)) most = d, worst = i;
      if (cpu[i] != cpu[i] && gpu[i] == gpu[i]) most = 1e30, worst = i, difference = INFINITY;
    }
    if (sqrt(difference) <= limit * sqrt(norm) + b.least) return;
    char text[300];
    snprintf(text, sizeof text,
             "%s: %s differs by %.3g of its norm; [%zu of %zu] is %.9g, not %.9g", what,
             b.name.c_str(), sqrt(difference / (norm > 0 ? norm : 1)), worst, n, (double)gpu[worst],
             (double)cpu[worst]);
    fail(text);
  }

  void compare() {
    for (const Block &b : blocks) {
      if (!b.cpu.size() || !failure.empty() || b.kind == ANY_VALUE) continue;
      std::vector<char> gpu(b.cpu.size());
      if (cases_gpu.download(&cases_gpu, &cases_env, gpu.data(), b.gpu, gpu.size()))
        return fail("download fails");
      if (b.kind == SAME && memcmp(gpu.data(), b.cpu.data(), gpu.size()))
        fail(std::string(what) + ": " + b.name + " is not what it must be");
      if (b.kind == NEAR) compare_floats(b, (const float *)(const void *)gpu.data());
    }
  }

  /* Nothing may count on what scratch held before. */
  void dirty_scratch() {
    moe__cuda_queue *q = moe__cuda_queue_of(&cases_gpu, &cases_env);
    moe__cuda_scratch_reset(q);
    if (MOE__CUDA_SCRATCH == 1) moe__cuda_scratch_free(q); /* then each piece has its own block */
    void *context = nullptr;
    q->cuda->driver.cuCtxPushCurrent_v2(q->cuda->context);
    for (int i = 0; i < q->scratch_blocks; ++i)
      q->cuda->driver.cuMemsetD8Async(q->scratch[i].p, 0xff, q->scratch[i].bytes, q->stream);
    q->cuda->driver.cuCtxPopCurrent_v2(&context);
  }
};

template <class T> T *Array<T>::at(int side) const {
  if (index < 0) return nullptr;
  Block &b = owner->blocks[(size_t)index];
  return side == CPU ? (T *)(void *)b.cpu.data() : (T *)b.gpu;
}

/* Packed sequences: S of them with 1 to `longest` tokens, M in all. */
struct Sequences {
  int S = 0, M = 0, longest = 0;
  Array<int32_t> start;
};

static Sequences cases_sequences(Case &c, int most, int longest) {
  Sequences s;
  s.S = c.number % 9 == 1 ? 1 : c.pick(1, most);
  s.start = c.array<int32_t>("seq_start", (size_t)s.S + 1, SAME);
  s.start[0] = 0;
  for (int i = 0; i < s.S; ++i) {
    int n = c.number % 9 == 1 ? 1 : c.pick(1, longest);
    s.M += n, s.longest = n > s.longest ? n : s.longest;
    s.start[(size_t)i + 1] = s.M;
  }
  return s;
}

static Array<uint64_t> cases_keys(Case &c, int S, bool given) {
  Array<uint64_t> keys = c.array<uint64_t>("keys", (size_t)S, SAME, given);
  for (int i = 0; i < S && given; ++i)
    keys[(size_t)i] = moe_key(1, 2, (uint64_t)i, (uint32_t)c.number, 4);
  return keys;
}

/* Runs an op forward or backward on a side. */
#define CASES_RUN(c, side, name, op, back)                                                         \
  ((side) == CPU ? ((back) ? moe_##name##_backward(&(op), &cases_cpu)                              \
                           : moe_##name##_forward(&(op), &cases_cpu))                              \
                 : ((c).dirty_scratch(), cases_gpu.name(&cases_gpu, &cases_env, &(op), back)))
#endif
