/* Part of ptx.h: memory, warps and blocks. */
#ifndef PTX_RUN_H
#define PTX_RUN_H
namespace ptx {

inline void Module::fail(const std::string &what) const {
  fprintf(stderr, "ptx: %s, block (%u, %u): %s%s%s\n", name.c_str(), at[0], at[1], what.c_str(),
          instruction ? ": " : "", instruction ? instruction->text.c_str() : "");
  abort();
}

inline std::vector<unsigned> Module::turns(unsigned n) {
  std::vector<unsigned> list(n);
  for (unsigned i = 0; i < n; ++i) list[i] = i;
  if (order == REVERSE) std::reverse(list.begin(), list.end());
  if (order == RANDOM) std::shuffle(list.begin(), list.end(), random);
  return list;
}

/* ---- memory ---- */
inline void Module::allow(const void *p, size_t bytes) {
  Range &range = ranges[(uint64_t)(uintptr_t)p];
  range = Range();
  range.base = (uint64_t)(uintptr_t)p, range.bytes = bytes;
}

inline void Module::forbid(const void *p) {
  ranges.erase((uint64_t)(uintptr_t)p);
  latest = nullptr;
}

inline Range *Module::range_of(uint64_t address, unsigned bytes) {
  if (!latest || address - latest->base >= latest->bytes) {
    auto it = ranges.upper_bound(address);
    if (it == ranges.begin()) return nullptr;
    latest = &(--it)->second;
  }
  return address - latest->base + bytes <= latest->bytes ? latest : nullptr;
}

/* Whether what another thread did at `stamp` is ordered before what this one does now. */
inline bool Module::ordered(const Warp &w, uint32_t me, uint64_t stamp, uint32_t other) const {
  if (stamp < launch_since || other == me) return true;
  if (other / 1024 != me / 1024) return false;
  if (other / LANES == me / LANES) return stamp < w.since;
  return stamp < block_since;
}

inline void Module::touch(Warp &w, unsigned lane, Shadow *shadow, unsigned granules, bool write) {
  uint32_t me = (at[1] * grid[0] + at[0]) * 1024 + w.index * LANES + lane;
  for (Shadow *s = shadow; s < shadow + granules; ++s) {
    if (!ordered(w, me, s->written, s->writer))
      fail(write ? "two threads write here without a barrier between them"
                 : "reads what another thread has written without a barrier between them");
    if (write) {
      if (!ordered(w, me, s->read, s->reader) || !ordered(w, me, s->read_before, s->reader_before))
        fail("writes what another thread has read without a barrier between them");
      s->written = clock, s->writer = me;
    } else {
      if (s->reader != me) s->read_before = s->read, s->reader_before = s->reader;
      s->read = clock, s->reader = me;
    }
  }
}

inline uint8_t *Module::access(Warp &w, const Instruction &i, unsigned lane, uint64_t address,
                               Space space, unsigned bytes, bool write) {
  if (space == GENERIC) {
    uint64_t window = address & 7ull << 60;
    space = window == SHARED  ? SHARED_SPACE
            : window == LOCAL ? LOCAL_SPACE
            : window == PARAM ? PARAM_SPACE
                              : GLOBAL_SPACE;
    address &= ~(7ull << 60);
  }
  if (address % bytes) fail("a misaligned access");
  if (space == GLOBAL_SPACE) {
    Range *range = range_of(address, bytes);
    if (!range) fail("global memory out of bounds");
    if (races && !(i.flags & UNCHECKED)) {
      unsigned g = kernel->global_granule;
      if (range->shadow.empty() || granule != g) range->shadow.resize(range->bytes / g + 1);
      uint64_t first = (address - range->base) / g;
      touch(w, lane, &range->shadow[first], std::max(1u, bytes / g), write);
    }
    return (uint8_t *)(uintptr_t)address;
  }
  if (space == SHARED_SPACE) {
    address = (uint32_t)address;
    if (address + bytes > shared.size()) fail("shared memory out of bounds");
    unsigned g = kernel->shared_granule;
    if (races && !(i.flags & UNCHECKED))
      touch(w, lane, &shared_shadow[address / g], std::max(1u, bytes / g), write);
    return &shared[address];
  }
  std::vector<uint8_t> &memory = space == LOCAL_SPACE ? w.local[lane] : parameters;
  if (space == PARAM_SPACE && write) fail("writes into parameters");
  if (address + bytes > memory.size()) fail("local memory out of bounds");
  return &memory[address];
}

inline void Module::arrive(Warp &w, unsigned lane, const Copy &copy, const Instruction &i) {
  uint8_t *to = access(w, i, lane, copy.to, SHARED_SPACE, copy.bytes, true);
  for (unsigned n = 0; n < copy.read; n += 4)
    memcpy(to + n, access(w, i, lane, copy.from + n, GLOBAL_SPACE, 4, false), 4);
  memset(to + copy.read, 0, copy.bytes - copy.read);
}

/* ---- warps ---- */
inline uint64_t Module::special(const Warp &w, const std::string &what, unsigned lane) const {
  if (what == "%tid.x") return w.index * LANES + lane;
  if (what == "%ctaid.x") return at[0];
  if (what == "%ctaid.y") return at[1];
  if (what == "%ntid.x") return threads;
  if (what == "%nctaid.x") return grid[0];
  if (what == "%nctaid.y") return grid[1];
  if (what == "%laneid") return lane;
  if (what == "%lanemask_lt") return (1u << lane) - 1;
  if (what == "%tid.y" || what == "%tid.z" || what == "%ctaid.z") return 0;
  if (what == "%ntid.y" || what == "%ntid.z" || what == "%nctaid.z") return 1;
  fail("unknown special register " + what);
}

inline void Module::start(Warp &w, unsigned index) {
  unsigned n = std::min(LANES, threads - index * LANES);
  w.module = this, w.kernel = kernel, w.index = index;
  w.file.assign(kernel->slots.size() * LANES, 0xdeadbeefcafef00dull);
  for (auto &constant : kernel->constants)
    std::fill_n(w.slot(constant.first), LANES, constant.second);
  for (auto &s : kernel->specials)
    for (unsigned l = 0; l < LANES; ++l) w.slot(s.first)[l] = special(w, s.second, l);
  w.fragments.assign(1, Fragment{0, n == LANES ? ALL : (1u << n) - 1, PLAIN});
  w.exited = ~w.fragments[0].mask;
  w.since = clock;
  w.local.assign(LANES, std::vector<uint8_t>(kernel->local, 0xff));
  for (auto &copies : w.copies) copies.clear();
}

inline void Module::end(Warp &w, uint32_t mask) {
  w.exited |= mask;
  each(mask, [&](unsigned l) {
    for (auto &group : w.copies[l])
      for (const Copy &copy : group)
        if (copy.bytes) fail("a thread ends before its cp.async arrived");
  });
}

/* Whether all lanes that a collective names are here. */
inline bool Module::ready(Warp &w, const Instruction &i, uint32_t mask) {
  uint32_t members = ~w.exited;
  if (i.member >= 0) members = get<uint32_t>(w.slot(i.member), (unsigned)__builtin_ctz(mask));
  if (members & w.exited) fail("waits for lanes that have ended");
  return (mask & members) == members;
}

inline void Module::wait(Warp &w, const Fragment &f, Kind kind) {
  for (Fragment &other : w.fragments)
    if (other.at == f.at && other.waits == kind) {
      other.mask |= f.mask;
      return;
    }
  w.fragments.push_back(Fragment{f.at, f.mask, kind});
}

/* Runs lanes that are at the same place, until they end, wait or meet others. */
inline void Module::run_fragment(Warp &w, Fragment f) {
  int meet = INT32_MAX;
  for (const Fragment &other : w.fragments)
    if (other.waits == PLAIN) meet = std::min(meet, other.at);
  while (f.mask && f.at < meet) {
    const Instruction &i = kernel->code[(size_t)f.at];
    uint32_t mask = f.mask;
    instruction = &i;
    ++executed;
    if (i.predicate >= 0) {
      const uint64_t *p = w.slot(i.predicate);
      uint32_t holds = 0;
      for (unsigned l = 0; l < LANES; ++l) holds |= (uint32_t)(p[l] & 1) << l;
      mask &= i.unless ? ~holds : holds;
    }
    if (i.kind == BRANCH && mask) {
      if (mask != f.mask) {
        w.fragments.push_back(Fragment{f.at + 1, f.mask & ~mask, PLAIN});
        meet = std::min(meet, f.at + 1);
      }
      f.mask = mask;
      f.at = i.target;
      if (f.at > meet) break;
      continue;
    }
    if (i.kind == EXIT && mask) end(w, mask), f.mask &= ~mask;
    if (i.kind == BARRIER && mask) {
      if (mask != f.mask) fail("a barrier that not all threads reach");
      return wait(w, f, BARRIER);
    }
    if (i.kind == COLLECTIVE && mask) {
      if (!ready(w, i, mask)) return wait(w, f, COLLECTIVE);
      if (i.run == nothing) w.since = ++clock; /* bar.warp.sync */
    }
    if (mask && i.run) i.run(w, i, mask);
    ++f.at;
  }
  if (f.mask) w.fragments.push_back(f);
}

/* Lets a collective go on whose lanes have all come. */
inline bool Module::release(Warp &w) {
  for (Fragment &f : w.fragments)
    if (f.waits == COLLECTIVE && ready(w, kernel->code[(size_t)f.at], f.mask)) {
      f.waits = PLAIN;
      return true;
    }
  return false;
}

/* Runs a warp until all its lanes wait for others or have ended. */
inline bool Module::run_warp(Warp &w) {
  for (bool any = false;;) {
    Fragment f = {INT32_MAX, 0, PLAIN};
    for (const Fragment &other : w.fragments)
      if (other.waits == PLAIN) f.at = std::min(f.at, other.at);
    if (f.at == INT32_MAX) {
      if (!release(w)) return any;
      continue;
    }
    for (size_t n = w.fragments.size(); n-- > 0;)
      if (w.fragments[n].waits == PLAIN && w.fragments[n].at == f.at) {
        f.mask |= w.fragments[n].mask;
        w.fragments.erase(w.fragments.begin() + (long)n);
      }
    run_fragment(w, f);
    any = true;
  }
}

/* ---- blocks ---- */
/* All threads wait at barriers: they go on. */
inline bool Module::release_block() {
  bool some = false;
  for (const Warp &w : warps)
    for (const Fragment &f : w.fragments) {
      if (f.waits != BARRIER) return false;
      some = true;
    }
  if (!some) return false;
  block_since = ++clock;
  for (Warp &w : warps) {
    if (w.fragments.empty() || (w.exited && w.index + 1 < warps.size()))
      fail("a barrier after some threads have ended");
    for (Fragment &f : w.fragments) f.waits = PLAIN, ++f.at;
    w.since = clock;
  }
  return true;
}

inline void Module::run_block() {
  shared.assign(kernel->shared, 0xff);
  shared_shadow.assign(kernel->shared / kernel->shared_granule + 1, Shadow());
  block_since = ++clock;
  warps.resize((threads + LANES - 1) / LANES);
  for (unsigned n = 0; n < warps.size(); ++n) start(warps[n], n);
  for (;;) {
    bool any = false, left = false;
    for (unsigned n : turns((unsigned)warps.size())) any |= run_warp(warps[n]);
    any |= release_block();
    for (const Warp &w : warps) left |= !w.fragments.empty();
    if (!left) return;
    if (!any) fail("deadlock: not all threads reach a barrier or a shuffle");
  }
}

inline void Module::launch(const char *name_, unsigned gx, unsigned gy, unsigned threads_,
                           void **arguments) {
  auto it = kernels.find(name_);
  name = name_, instruction = nullptr;
  if (it == kernels.end()) fail("there is no such kernel");
  kernel = &it->second;
  grid[0] = gx, grid[1] = gy, threads = threads_;
  if (threads < 1 || threads > kernel->most_threads) fail("more threads than .maxntid");
  if (gx < 1 || gy < 1 || gy > 65535 || (uint64_t)gx * gy > UINT32_MAX / 1024)
    fail("the grid is out of range");
  parameters.assign(kernel->parameters, 0);
  for (size_t n = 0; n < kernel->parameter_at.size(); ++n)
    memcpy(&parameters[kernel->parameter_at[n]], arguments[n], kernel->parameter_bytes[n]);
  if (granule != kernel->global_granule)
    for (auto &range : ranges) range.second.shadow.clear();
  granule = kernel->global_granule;
  launch_since = ++clock;
  for (unsigned n : turns(gx * gy)) {
    at[0] = n % gx, at[1] = n / gx;
    run_block();
  }
  instruction = nullptr;
}

} // namespace ptx
#endif
