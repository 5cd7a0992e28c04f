/* Part of ptx.h: from text to instructions. */
#ifndef PTX_READ_H
#define PTX_READ_H
namespace ptx {

inline std::string trimmed(const std::string &s) {
  size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

/* Cuts at commas that no bracket encloses. */
inline std::vector<std::string> at_commas(const std::string &s) {
  std::vector<std::string> list;
  std::string part;
  int depth = 0;
  for (char c : s + ",") {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c != ',' || depth) {
      part += c;
      continue;
    }
    if (!trimmed(part).empty()) list.push_back(trimmed(part));
    part.clear();
  }
  return list;
}

inline unsigned bytes_of(const std::string &type) {
  if (type.find("64") != std::string::npos) return 8;
  if (type.find("x2") != std::string::npos || type.find("32") != std::string::npos) return 4;
  if (type.find("16") != std::string::npos) return 2;
  return type.find('8') != std::string::npos ? 1 : 0;
}

/* The handlers by opcode and type: "add.f32". */
typedef std::map<std::string, Handler *> Handlers;

#define PTX_TYPES(table, kind, name, F, U, S, D) /* integers: U and S as given */                  \
  table[name ".u16"] = kind<U##16_t, U##16_t, F>, table[name ".u32"] = kind<U##32_t, U##32_t, F>,  \
             table[name ".u64"] = kind<U##64_t, U##64_t, F>,                                       \
             table[name ".s16"] = kind<S##16_t, S##16_t, F>,                                       \
             table[name ".s32"] = kind<S##32_t, S##32_t, F>,                                       \
             table[name ".s64"] = kind<S##64_t, S##64_t, F>
#define PTX_BITS(table, kind, name, F)                                                             \
  table[name ".b16"] = kind<uint16_t, uint16_t, F>,                                                \
             table[name ".b32"] = kind<uint32_t, uint32_t, F>,                                     \
             table[name ".b64"] = kind<uint64_t, uint64_t, F>,                                     \
             table[name ".pred"] = kind<uint64_t, uint64_t, F>
#define PTX_FLOATS(table, kind, name, F)                                                           \
  table[name ".f32"] = kind<float, float, F>, table[name ".f64"] = kind<double, double, F>

inline void add_integers(Handlers &t) {
  PTX_TYPES(t, binary, "add", Add, uint, uint, );
  PTX_TYPES(t, binary, "sub", Sub, uint, uint, );
  PTX_TYPES(t, binary, "mul.lo", Mul, uint, uint, );
  PTX_TYPES(t, ternary, "mad.lo", MulAdd, uint, uint, );
  PTX_TYPES(t, binary, "div", Quotient, uint, int, );
  PTX_TYPES(t, binary, "rem", Remainder, uint, int, );
  PTX_TYPES(t, binary, "min", Min, uint, int, );
  PTX_TYPES(t, binary, "max", Max, uint, int, );
  PTX_TYPES(t, unary, "neg", Neg, uint, uint, );
  PTX_TYPES(t, unary, "abs", AbsInt, int, int, );
  PTX_BITS(t, binary, "and", BitAnd);
  PTX_BITS(t, binary, "or", BitOr);
  PTX_BITS(t, binary, "xor", BitXor);
  PTX_BITS(t, unary, "not", Not);
  t["not.pred"] = unary<uint64_t, uint64_t, NotPredicate>;
  t["mul.wide.u32"] = binary<uint64_t, uint32_t, MulWide>;
  t["mul.wide.s32"] = binary<int64_t, int32_t, MulWide>;
  t["mul.wide.u16"] = binary<uint32_t, uint16_t, MulWide>;
  t["mul.wide.s16"] = binary<int32_t, int16_t, MulWide>;
  t["mad.wide.u32"] = ternary<uint64_t, uint32_t, MulAddWide>;
  t["mad.wide.s32"] = ternary<int64_t, int32_t, MulAddWide>;
  t["mul.hi.u32"] = binary<uint32_t, uint32_t, MulHigh>;
  t["mul.hi.s32"] = binary<int32_t, int32_t, MulHigh>;
  t["mul.hi.u64"] = binary<uint64_t, uint64_t, MulHigh>;
  t["mul.hi.s64"] = binary<int64_t, int64_t, MulHigh>;
  t["popc.b32"] = unary<uint32_t, uint32_t, CountOnes>;
  t["popc.b64"] = unary<uint32_t, uint64_t, CountOnes>;
  t["clz.b32"] = unary<uint32_t, uint32_t, LeadingZeros>;
  t["clz.b64"] = unary<uint32_t, uint64_t, LeadingZeros>;
  t["brev.b32"] = unary<uint32_t, uint32_t, ReverseBits>;
  t["bfind.u32"] = unary<uint32_t, uint32_t, HighestBit>;
  t["bfind.u64"] = unary<uint32_t, uint64_t, HighestBit>;
  t["prmt.b32"] = permute_bytes;
  t["lop3.b32"] = logic3;
  t["shf.l.b32"] = funnel<true>;
  t["shf.r.b32"] = funnel<false>;
  t["bfe.u32"] = extract_bits<uint32_t>;
  t["bfe.s32"] = extract_bits<int32_t>;
  t["bfe.u64"] = extract_bits<uint64_t>;
  t["bfe.s64"] = extract_bits<int64_t>;
  t["bfi.b32"] = insert_bits<uint32_t>;
  t["bfi.b64"] = insert_bits<uint64_t>;
}

#define PTX_SHIFTS(table, bits)                                                                    \
  table["shl.b" #bits] = shift<uint##bits##_t, true>,                                              \
                table["shr.b" #bits] = table["shr.u" #bits] = shift<uint##bits##_t, false>,        \
                table["shr.s" #bits] = shift<int##bits##_t, false>
#define PTX_COMPARE(table, bits)                                                                   \
  table["setp.u" #bits] = table["setp.b" #bits] = compare<uint##bits##_t>,                         \
                 table["setp.s" #bits] = compare<int##bits##_t>

inline void add_others(Handlers &t) {
  PTX_SHIFTS(t, 16);
  PTX_SHIFTS(t, 32);
  PTX_SHIFTS(t, 64);
  PTX_COMPARE(t, 16);
  PTX_COMPARE(t, 32);
  PTX_COMPARE(t, 64);
  t["setp.f32"] = compare<float>;
  t["setp.f64"] = compare<double>;
  PTX_FLOATS(t, binary, "add", Add);
  PTX_FLOATS(t, binary, "sub", Sub);
  PTX_FLOATS(t, binary, "mul", Mul);
  PTX_FLOATS(t, binary, "div", Div);
  PTX_FLOATS(t, binary, "min", MinFloat);
  PTX_FLOATS(t, binary, "max", MaxFloat);
  PTX_FLOATS(t, binary, "copysign", CopySign);
  PTX_FLOATS(t, unary, "neg", Neg);
  PTX_FLOATS(t, unary, "abs", AbsFloat);
  PTX_FLOATS(t, unary, "rcp", Reciprocal);
  PTX_FLOATS(t, unary, "sqrt", Sqrt);
  PTX_FLOATS(t, unary, "rsqrt", RSqrt);
  t["ex2.f32"] = unary<float, float, Exp2>;
  t["lg2.f32"] = unary<float, float, Log2>;
  t["sin.f32"] = unary<float, float, Sin>;
  t["cos.f32"] = unary<float, float, Cos>;
  t["tanh.f32"] = unary<float, float, Tanh>;
  t["fma.f32"] = ternary<float, float, Fma>;
  t["fma.f64"] = ternary<double, double, Fma>;
  t["mad.f32"] = ternary<float, float, Fma>;
  t["shfl.idx.b32"] = shuffle<BY_INDEX>;
  t["shfl.bfly.b32"] = shuffle<BY_XOR>;
  t["shfl.up.b32"] = shuffle<BY_UP>;
  t["shfl.down.b32"] = shuffle<BY_DOWN>;
}

#define PTX_ATOMIC(table, type, T)                                                                 \
  table["atom.add." type] = table["red.add." type] = atomic<T, Add>,                               \
                    table["atom.min." type] = table["red.min." type] = atomic<T, Min>,             \
                    table["atom.max." type] = table["red.max." type] = atomic<T, Max>
#define PTX_ATOMIC_BITS(table, type, T)                                                            \
  table["atom.and." type] = table["red.and." type] = atomic<T, BitAnd>,                            \
                    table["atom.or." type] = table["red.or." type] = atomic<T, BitOr>

inline const Handlers &handlers() {
  static const Handlers table = [] {
    Handlers t;
    add_integers(t);
    add_others(t);
    PTX_ATOMIC(t, "u32", uint32_t);
    PTX_ATOMIC(t, "s32", int32_t);
    PTX_ATOMIC(t, "u64", uint64_t);
    PTX_ATOMIC_BITS(t, "b32", uint32_t);
    return t;
  }();
  return table;
}

/* ---- one kernel ---- */
struct Reader {
  Module &module;
  Kernel &kernel;
  std::map<std::string, bool> registers; /* declared ones; with a number: by prefix */

  [[noreturn]] void fail(const std::string &text) const { module.fail("unknown PTX: " + text); }

  int slot(const std::string &name) {
    auto it = kernel.slots.find(name);
    if (it != kernel.slots.end()) return it->second;
    int n = (int)kernel.slots.size();
    return kernel.slots[name] = n;
  }

  int constant(uint64_t value, const std::string &name) {
    bool known = kernel.slots.count(name) != 0;
    int s = slot(name);
    if (!known) kernel.constants.emplace_back(s, value);
    return s;
  }

  bool is_register(const std::string &name) const {
    size_t digits = name.find_last_not_of("0123456789");
    return registers.count(name) || registers.count(name.substr(0, digits + 1) + "<");
  }

  /* The slot of an operand: a register, a number, a special register or a symbol's address. */
  int operand(std::string s, Instruction &i, int at) {
    s = trimmed(s);
    if (s == "_") return -1;
    if (s[0] == '!') {
      i.negated |= 1u << at;
      s = trimmed(s.substr(1));
    }
    if (is_register(s)) return slot(s);
    if (s[0] == '%') {
      bool known = kernel.slots.count(s) != 0;
      int n = slot(s);
      if (!known) kernel.specials.emplace_back(n, s);
      return n;
    }
    if (s[0] == '0' && s.size() > 2 && strchr("fFdD", s[1]))
      return constant(strtoull(s.c_str() + 2, nullptr, 16), s);
    if (isdigit((unsigned char)s[0])) return constant(strtoull(s.c_str(), nullptr, 0), s);
    if (s[0] == '-' && s.find('.') == std::string::npos)
      return constant((uint64_t)strtoll(s.c_str(), nullptr, 0), s);
    auto own = kernel.symbols.find(s);
    if (own != kernel.symbols.end()) return constant(own->second, "&" + s);
    auto global = module.symbols.find(s);
    if (global != module.symbols.end()) return constant(global->second, "&" + s);
    fail(s + " in " + i.text);
  }

  void input(Instruction &i, const std::string &s) {
    if (i.ins == 10) fail(i.text);
    i.in[i.ins] = operand(s, i, i.ins);
    ++i.ins;
  }

  /* {a, b} or a */
  void inputs(Instruction &i, const std::string &s) {
    if (s[0] != '{') return input(i, s);
    for (const std::string &part : at_commas(s.substr(1, s.size() - 2))) input(i, part);
  }

  void outputs(Instruction &i, std::string s) {
    size_t bar = s.find('|');
    if (bar != std::string::npos) {
      i.also = operand(s.substr(bar + 1), i, 9);
      s = s.substr(0, bar);
    }
    std::vector<std::string> list = {s};
    if (s[0] == '{') list = at_commas(s.substr(1, s.size() - 2));
    if (list.size() > 4) fail(i.text);
    for (const std::string &part : list) i.out[i.outs++] = operand(part, i, 9);
  }

  /* [a + offset] */
  void address(Instruction &i, std::string s, int which) {
    s = trimmed(s.substr(1, s.size() - 2));
    size_t plus = s.find('+');
    if (plus != std::string::npos) {
      i.offset[which] = strtoll(s.c_str() + plus + 1, nullptr, 0);
      s = s.substr(0, plus);
    }
    input(i, s);
  }

  void statement(const std::string &text);
  void body(const std::string &text);
  void declare(const std::string &text);
  void parameters_of(const std::string &text);
  bool memory(Instruction &i, const std::vector<std::string> &op,
              const std::vector<std::string> &args);
  bool collective(Instruction &i, const std::vector<std::string> &op,
                  const std::vector<std::string> &args);
  bool control(Instruction &i, const std::vector<std::string> &op,
               const std::vector<std::string> &args);
  bool moves(Instruction &i, const std::vector<std::string> &op,
             const std::vector<std::string> &args);
  bool asynchronous(Instruction &i, const std::vector<std::string> &op,
                    const std::vector<std::string> &args);
  void arithmetic(Instruction &i, const std::vector<std::string> &op,
                  const std::vector<std::string> &args);
};

inline bool has(const std::vector<std::string> &op, const char *part) {
  return std::find(op.begin(), op.end(), part) != op.end();
}

/* .reg .f32 %f<12>; .shared .align 4 .b8 name[128]; .local ... */
inline void Reader::declare(const std::string &text) {
  if (!text.compare(0, 4, ".reg")) {
    size_t type = text.find('.', 4), names = text.find_first_of(" \t", type);
    for (const std::string &name : at_commas(text.substr(names))) {
      size_t count = name.find('<');
      registers[count == std::string::npos ? name : name.substr(0, count) + "<"] = true;
    }
    return;
  }
  bool is_shared = !text.compare(0, 7, ".shared");
  if (!is_shared && text.compare(0, 6, ".local")) return; /* .pragma, .loc and so on */
  size_t align = text.find(".align"), bracket = text.find('[');
  unsigned to = align == std::string::npos ? 8 : (unsigned)atoi(text.c_str() + align + 6);
  unsigned bytes = bracket == std::string::npos ? 8 : (unsigned)atoi(text.c_str() + bracket + 1);
  std::string name = trimmed(text.substr(0, bracket));
  name = name.substr(name.find_last_of(" \t") + 1);
  size_t type = text.find(".b", align == std::string::npos ? 0 : align);
  if (type != std::string::npos && bracket != std::string::npos)
    bytes *= std::max(1u, bytes_of(text.substr(type + 1, 3)));
  unsigned &end = is_shared ? kernel.shared : kernel.local;
  end = (end + to - 1) / to * to;
  kernel.symbols[name] = end;
  end += bytes;
}

inline void Reader::parameters_of(const std::string &text) {
  for (const std::string &one : at_commas(text)) {
    size_t bracket = one.find('['), align = one.find(".align");
    std::string name = trimmed(one.substr(0, bracket));
    name = name.substr(name.find_last_of(" \t") + 1);
    unsigned to = 8, bytes = 0;
    if (bracket != std::string::npos) {
      bytes = (unsigned)atoi(one.c_str() + bracket + 1);
      to = (unsigned)atoi(one.c_str() + align + 6);
    } else {
      size_t type = one.find('.', one.find(".param") + 6);
      to = bytes = bytes_of(one.substr(type + 1, 3));
    }
    kernel.parameters = (kernel.parameters + to - 1) / to * to;
    kernel.symbols[name] = kernel.parameters;
    kernel.parameter_at.push_back(kernel.parameters);
    kernel.parameter_bytes.push_back(bytes);
    kernel.parameters += bytes;
  }
}

/* ld, st, atom, red, ldmatrix */
inline bool Reader::memory(Instruction &i, const std::vector<std::string> &op,
                           const std::vector<std::string> &args) {
  bool atomic = op[0] == "atom" || op[0] == "red";
  if (op[0] != "ld" && op[0] != "st" && op[0] != "ldmatrix" && op[0] != "ldu" && !atomic)
    return false;
  i.space = has(op, "global") || has(op, "const")         ? GLOBAL_SPACE
            : has(op, "shared") || has(op, "shared::cta") ? SHARED_SPACE
            : has(op, "local")                            ? LOCAL_SPACE
            : has(op, "param") || has(op, "param::entry") ? PARAM_SPACE
                                                          : GENERIC;
  i.bytes = bytes_of(op.back());
  i.count = has(op, "v4") || has(op, "x4") ? 4 : has(op, "v2") || has(op, "x2") ? 2 : 1;
  if (op.back()[0] == 's' && op[0] != "ldmatrix") i.flags |= SIGNED;
  if (op[0] == "ldmatrix") {
    i.kind = COLLECTIVE, i.run = load_matrix;
    if (has(op, "trans")) i.flags |= TRANSPOSED;
  }
  if (op[0] != "st" && op[0] != "red") outputs(i, args[0]);
  if (op[0] == "st") {
    address(i, args[0], 0);
    inputs(i, args[1]);
    i.run = store;
    if (i.space != SHARED_SPACE) kernel.global_granule = std::min(kernel.global_granule, i.bytes);
    if (i.space != GLOBAL_SPACE) kernel.shared_granule = std::min(kernel.shared_granule, i.bytes);
    return true;
  }
  address(i, args[op[0] == "red" ? 0 : 1], 0);
  if (!atomic) {
    if (!i.run) i.run = load;
    return true;
  }
  std::string name = op[0] +
                     (has(op, "add")   ? ".add."
                      : has(op, "min") ? ".min."
                      : has(op, "max") ? ".max."
                      : has(op, "and") ? ".and."
                                       : ".or.") +
                     op.back();
  if (!handlers().count(name)) fail(i.text + " (atomic sums of floats depend on their order)");
  i.run = handlers().at(name);
  i.flags |= UNCHECKED;
  input(i, args[op[0] == "red" ? 1 : 2]);
  return true;
}

inline bool Reader::asynchronous(Instruction &i, const std::vector<std::string> &op,
                                 const std::vector<std::string> &args) {
  if (op[0] != "cp" || op.size() < 3 || op[1] != "async") return false;
  if (op[2] == "commit_group") return i.run = copy_commit, true;
  if (op[2] == "wait_group" || op[2] == "wait_all") {
    if (op[2] == "wait_group") input(i, args[0]);
    return i.run = copy_wait, true;
  }
  if ((op[2] != "ca" && op[2] != "cg") || args.size() < 3 || args.size() > 4) fail(i.text);
  address(i, args[0], 0);
  address(i, args[1], 1);
  input(i, args[2]);
  if (args.size() > 3) input(i, args[3]);
  i.bytes = (unsigned)atoi(args[2].c_str());
  i.run = copy_async;
  return true;
}

/* shfl, vote, mma, bar.warp, activemask */
inline bool Reader::collective(Instruction &i, const std::vector<std::string> &op,
                               const std::vector<std::string> &args) {
  bool warp_barrier = op[0] == "bar" && op[1] == "warp";
  if (op[0] != "shfl" && op[0] != "vote" && op[0] != "mma" && !warp_barrier) return false;
  i.kind = COLLECTIVE;
  if (warp_barrier) {
    input(i, args[0]);
    i.member = i.in[0], i.run = nothing;
    return true;
  }
  outputs(i, args[0]);
  for (size_t n = 1; n < args.size(); ++n) inputs(i, args[n]);
  if (op[0] == "shfl") {
    i.run = handlers().at("shfl." + op[2] + ".b32");
    i.member = i.in[3];
  } else if (op[0] == "vote") {
    i.run = vote, i.member = i.in[1];
    i.flags |= has(op, "all") ? 0u + ALL_OF : has(op, "any") ? 0u + ANY_OF : 0u;
    if (has(op, "uni")) fail(i.text);
  } else if (has(op, "m16n8k8") && has(op, "tf32") && i.ins == 10)
    i.run = mma_tf32;
  else if (has(op, "m16n8k16") && has(op, "bf16") && i.ins == 10)
    i.run = mma_bf16;
  else
    fail(i.text);
  if (op[0] == "mma" && (!has(op, "row") || !has(op, "col"))) fail(i.text);
  return true;
}

inline bool Reader::control(Instruction &i, const std::vector<std::string> &op,
                            const std::vector<std::string> &args) {
  if (op[0] == "bra") {
    i.kind = BRANCH, i.label = args[0];
    return true;
  }
  if (op[0] == "ret" || op[0] == "exit") return i.kind = EXIT, true;
  if (op[0] == "trap")
    return i.run = [](Warp &w, const Instruction &, uint32_t) { w.module->fail("trap"); }, true;
  if (op[0] == "membar" || op[0] == "fence" || op[0] == "prefetch") return i.run = nothing, true;
  if (op[0] == "bar" || op[0] == "barrier") {
    if (op[1] == "warp") return false;
    if (!has(op, "sync") || args.size() != 1 || args[0] != "0") fail(i.text);
    return i.kind = BARRIER, true;
  }
  return false;
}

/* mov, cvta, selp, cvt */
inline bool Reader::moves(Instruction &i, const std::vector<std::string> &op,
                          const std::vector<std::string> &args) {
  if (op[0] != "mov" && op[0] != "cvta" && op[0] != "selp" && op[0] != "cvt") return false;
  outputs(i, args[0]);
  for (size_t n = 1; n < args.size(); ++n) inputs(i, args[n]);
  i.bytes = bytes_of(op.back());
  if (op[0] == "selp") return i.run = select, true;
  if (op[0] == "mov") return i.run = i.outs > 1 ? unpack : i.ins > 1 ? pack : move, true;
  if (op[0] == "cvta") {
    i.space = has(op, "shared") || has(op, "shared::cta") ? SHARED_SPACE
              : has(op, "local")                          ? LOCAL_SPACE
              : has(op, "param")                          ? PARAM_SPACE
                                                          : GLOBAL_SPACE;
    if (has(op, "to")) i.flags |= SIGNED;
    return i.run = convert_address, true;
  }
  i.to = type_code(op[op.size() - 2]), i.from = type_code(op.back());
  if (i.to == 't') return i.run = has(op, "rna") ? convert_tf32 : (fail(i.text), nullptr), true;
  if (i.to == 'Q') return i.run = has(op, "rn") ? convert_bf16x2 : (fail(i.text), nullptr), true;
  if (!i.to || !i.from || i.to == 'x' || i.from == 'x' || i.to == 'p') fail(i.text);
  i.rounding = has(op, "rzi") || has(op, "rz")   ? TO_ZERO
               : has(op, "rmi") || has(op, "rm") ? DOWN
               : has(op, "rpi") || has(op, "rp") ? UP
                                                 : NEAREST;
  if (has(op, "rni") || has(op, "rzi") || has(op, "rmi") || has(op, "rpi")) i.rounding |= 8;
  if (!is_float(i.to) || !is_float(i.from)) i.rounding &= 7;
  if (has(op, "sat")) i.flags |= SATURATE;
  if (is_float(i.to) && i.rounding && i.rounding < 8) fail(i.text);
  i.run = convert;
  return true;
}

inline void Reader::arithmetic(Instruction &i, const std::vector<std::string> &op,
                               const std::vector<std::string> &args) {
  outputs(i, args[0]);
  for (size_t n = 1; n < args.size(); ++n) inputs(i, args[n]);
  std::string name = op[0];
  bool is_float = op.back()[0] == 'f';
  if ((name == "mul" || name == "mad") && !is_float)
    name += has(op, "wide") ? ".wide" : has(op, "hi") ? ".hi" : ".lo";
  if (name == "shf")
    name += has(op, "l") ? ".l" : ".r", i.flags |= has(op, "clamp") ? 0u + CLAMP : 0u;
  name += "." + op.back();
  if (op[0] == "setp") {
    i.compare = compare_of(op[1]);
    if (i.compare < 0) fail(i.text);
    i.flags |= has(op, "and") ? 0u + AND : has(op, "or") ? 0u + OR : has(op, "xor") ? 0u + XOR : 0u;
  } else if (i.negated)
    fail(i.text);
  if (has(op, "sat") || has(op, "cc") || has(op, "rz") || has(op, "rm") || has(op, "rp"))
    fail(i.text);
  auto it = handlers().find(name);
  if (it == handlers().end()) fail(i.text);
  i.run = it->second;
}

inline void Reader::statement(const std::string &text) {
  Instruction i;
  std::string rest = text;
  i.text = text;
  if (text[0] == '.') return declare(text);
  if (rest[0] == '@') {
    size_t end = rest.find_first_of(" \t");
    i.unless = rest[1] == '!';
    i.predicate = slot(rest.substr(1 + i.unless, end - 1 - i.unless));
    rest = trimmed(rest.substr(end));
  }
  size_t end = rest.find_first_of(" \t");
  std::vector<std::string> op, args;
  std::string part;
  for (char c : rest.substr(0, end) + ".") {
    if (c != '.') part += c;
    if (c == '.') op.push_back(part), part.clear();
  }
  if (end != std::string::npos) args = at_commas(rest.substr(end));
  if (!control(i, op, args) && !memory(i, op, args) && !asynchronous(i, op, args) &&
      !collective(i, op, args) && !moves(i, op, args))
    arithmetic(i, op, args);
  kernel.code.push_back(i);
}

inline void Reader::body(const std::string &text) {
  std::string current;
  int vector = 0;
  for (char c : text) {
    if (c == '{') {
      if (trimmed(current).empty()) continue; /* a scope, not a vector */
      ++vector;
    }
    if (c == '}') {
      if (!vector) continue;
      --vector;
    }
    if (c == ':' && trimmed(current).find_first_of(" \t") == std::string::npos) {
      kernel.labels[trimmed(current)] = (int)kernel.code.size();
      current.clear();
    } else if (c == ';') {
      if (!trimmed(current).empty()) statement(trimmed(current));
      current.clear();
    } else
      current += c == '\n' || c == '\t' ? ' ' : c;
  }
  for (Instruction &i : kernel.code) {
    if (i.kind != BRANCH) continue;
    auto it = kernel.labels.find(i.label);
    if (it == kernel.labels.end()) fail(i.text);
    i.target = it->second;
  }
}

/* ---- a module ---- */
/* .global .align 4 .b8 name[24] = {1, 2}: a table of the compiler's */
inline void read_variable(std::map<std::string, std::vector<uint8_t>> &variables,
                          const std::string &text) {
  size_t bracket = text.find('['), equals = text.find('=');
  std::string name = trimmed(text.substr(0, std::min(bracket, equals)));
  size_t space = name.find_last_of(" \t");
  std::string type = trimmed(name.substr(0, space));
  unsigned bytes = bytes_of(type.substr(type.find_last_of('.')));
  unsigned count = bracket < equals ? (unsigned)atoi(text.c_str() + bracket + 1) : 1;
  std::vector<uint8_t> &data = variables[name.substr(space + 1)];
  data.assign((size_t)bytes * count + 16, 0);
  if (equals == std::string::npos) return;
  std::string values = trimmed(text.substr(equals + 1));
  if (values[0] == '{') values = values.substr(1, values.size() - 2);
  size_t at = 0;
  for (const std::string &value : at_commas(values)) {
    bool hex = value.size() > 2 && value[0] == '0' && strchr("fFdD", value[1]);
    uint64_t x = hex ? strtoull(value.c_str() + 2, nullptr, 16)
                     : (uint64_t)strtoll(value.c_str(), nullptr, 0);
    memcpy(&data[at], &x, bytes);
    at += bytes;
  }
}

inline std::string without_comments(const char *text) {
  std::string out;
  for (const char *p = text; *p; ++p) {
    if (p[0] == '/' && p[1] == '/') p += strcspn(p, "\n");
    if (p[0] == '/' && p[1] == '*') {
      const char *end = strstr(p + 2, "*/");
      p = end ? end + 1 : p + strlen(p) - 1;
      continue;
    }
    if (!*p) break;
    out += *p;
  }
  return out;
}

inline void Module::read(const char *text) {
  std::string s = without_comments(text);
  size_t p = 0;
  while (p < s.size()) {
    size_t end = s.find_first_of(";{", p), line = s.find('\n', p);
    std::string head = trimmed(s.substr(p, std::min(end, line) - p));
    if (head.empty() || !head.compare(0, 8, ".version") || !head.compare(0, 7, ".target") ||
        !head.compare(0, 13, ".address_size")) {
      if (line == std::string::npos) return;
      p = line + 1;
      continue;
    }
    if (end == std::string::npos) return;
    head = trimmed(s.substr(p, end - p));
    size_t entry = head.find(".entry");
    if (entry == std::string::npos && head.find(".func") == std::string::npos) {
      end = s.find(';', p);
      if (!head.compare(0, 7, ".shared")) /* of all kernels */
        shared_texts.push_back(trimmed(s.substr(p, end - p)));
      else
        read_variable(variables, s.substr(p, end - p));
      p = end + 1;
      continue;
    }
    size_t close = end + 1;
    if (s[end] == '{')
      for (int depth = 1; depth && close < s.size(); ++close)
        depth += s[close] == '{' ? 1 : s[close] == '}' ? -1 : 0;
    p = close;
    if (entry == std::string::npos) continue; /* a call to it would be unknown */
    size_t open = head.find('('), shut = head.find(')');
    std::string called = trimmed(head.substr(entry + 6, open - entry - 6));
    size_t most = head.find(".maxntid");
    name = called;
    Kernel &k = kernels[called];
    if (most != std::string::npos) k.most_threads = (unsigned)atoi(head.c_str() + most + 8);
    for (auto &variable : variables) {
      symbols[variable.first] = (uint64_t)(uintptr_t)variable.second.data();
      allow(variable.second.data(), variable.second.size());
    }
    Reader reader = {*this, k, {}};
    for (const std::string &text_ : shared_texts) reader.declare(text_);
    if (open != std::string::npos) reader.parameters_of(head.substr(open + 1, shut - open - 1));
    reader.body(s.substr(end + 1, close - end - 2));
  }
}

} // namespace ptx
#endif
