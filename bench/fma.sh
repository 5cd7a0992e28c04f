#!/bin/sh
# sh fma.sh, or make -C bench fma: what a fused multiply-add costs where the processor has none. One
# small model (fma.c) by every instruction set of this machine, plain C with and without the
# instruction, other processors under qemu (instructions counted by insn.c) and WebAssembly in node;
# bits against the first row. About two minutes. What is not installed is left out, by name; Debian:
# gcc-riscv64-linux-gnu gcc-powerpc64le-linux-gnu gcc-aarch64-linux-gnu qemu-user clang lld nodejs,
# and clang-19 lld-19 for relaxed simd and RISC-V vectors. Writes build/fma.md.
cd "$(dirname "$0")" || exit 1
mkdir -p build/fma
dir=build/fma
: > $dir/rows
: > $dir/missing
have() { command -v "$1" > /dev/null 2>&1; }
options="-std=c99 -D_POSIX_C_SOURCE=200809L -O2 -w"
lack() { echo "$1: $2" >> $dir/missing; }

# row NAME FORWARD TRAINING SCORES WEIGHTS INSTRUCTIONS
row() { printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$@" >> $dir/rows; }

# counted RUNNER PROGRAM ISA: instructions of a forward pass under qemu
counted() {
  for n in 1 3; do
    $1 -plugin $dir/insn.so "$2" "$3" 0 $n 2>&1 | sed -n 's/.*instructions //p'
  done | awk '{n[NR] = $1} END {print NR == 2 ? sprintf("%.0f", (n[2] - n[1]) / 2e6) : "-"}'
}
${CC:-cc} -shared -fPIC -O1 -o $dir/insn.so insn.c || lack insn.c "does not compile"

# here NAME ISA PROGRAM: this machine; instructions under qemu, which has no AVX-512
here() {
  set -- "$1" "$2" "$3" $("$3" "$2")
  [ "$2" = "$8" ] || [ "$2" = scalar ] || { lack "$1" "not on this machine"; return; }
  count=-
  have qemu-x86_64 && [ "$(uname -m)" = x86_64 ] && [ "$2" != avx512 ] &&
    count=$(counted "qemu-x86_64 -cpu max" "$3" "$2")
  row "$1" "$4" "$5" "$6" "$7" "$count"
}
${CC:-cc} $options -static -o $dir/fma fma.c -lm || exit 1
${CC:-cc} $options -static -DMOE__NO_FMA -DMOE_NO_SIMD -o $dir/fma_exact fma.c -lm
${CC:-cc} $options -static -DMOE_PLAIN_MULTIPLY_ADD -o $dir/fma_plain fma.c -lm
for isa in avx512 avx2 neon sse2; do
  $dir/fma $isa 0 0 > /dev/null && here "$isa" $isa $dir/fma
done
here "plain C, with the instruction" scalar $dir/fma
here "plain C, without" scalar $dir/fma_exact
here "plain C, MOE_PLAIN_MULTIPLY_ADD" scalar $dir/fma_plain

# there NAME COMPILER RUNNER ISA
there() {
  for w in "${2%% *}" "${3%% *}"; do have "$w" || { lack "$1" "there is no $w"; return; }; done
  $2 $options -static -o $dir/there fma.c -lm || { lack "$1" "does not compile"; return; }
  set -- "$1" "$3" "$4" $($3 $dir/there "$4" 3 1)
  row "$1" - - "$4" "$5" "$(counted "$2" $dir/there "$3")"
}
there "riscv64, plain C" riscv64-linux-gnu-gcc qemu-riscv64 scalar
there "riscv64, rvv" \
  "${CLANG_RVV:-clang-19} --target=riscv64-linux-gnu -march=rv64gcv -fuse-ld=lld" \
  "qemu-riscv64 -cpu rv64,v=true,vlen=128,vext_spec=v1.0" rvv
there "ppc64le, plain C" powerpc64le-linux-gnu-gcc qemu-ppc64le scalar
there "aarch64, plain C" aarch64-linux-gnu-gcc qemu-aarch64 scalar
there "aarch64, neon" aarch64-linux-gnu-gcc qemu-aarch64 neon

cat > $dir/run.js << 'END'
const {begin, steps, passes, bits} = new WebAssembly.Instance(new WebAssembly.Module(
  require('fs').readFileSync(process.argv[2]))).exports
if (begin(+process.argv[3])) throw 'there is no such instruction set'
const best = work => {
  const from = performance.now()
  let least = 1e30
  for (let round = 0; round < 5 || performance.now() - from < 1000; ++round) {
    const t = performance.now()
    if (work(1)) throw 'failed'
    least = Math.min(least, performance.now() - t)
  }
  return least.toFixed(3)
}
steps(3), passes(1)
const hex = n => (n >>> 0).toString(16).padStart(8, '0'), found = [hex(bits(0)), hex(bits(1))]
console.log(best(passes), best(steps), ...found)
END
# web NAME ISA CLANG NODE_OPTION FLAGS
web() {
  name=$1 isa=$2 clang=$3 option=$4
  shift 4
  have "$clang" && have node || { lack "$name" "there is no $clang or no node"; return 1; }
  "$clang" --target=wasm32 -nostdlib -O2 -mbulk-memory -fno-math-errno -fno-builtin-memcmp \
    -fno-builtin-strlen "$@" -w -I../examples/web/libc -Wl,--no-entry \
    -Wl,-z,stack-size=1048576 -o $dir/fma.wasm fma.c ../examples/web/libc/libc.c 2> $dir/log &&
    set -- $(node $option $dir/run.js $dir/fma.wasm $isa 2> $dir/log)
  [ $# -eq 4 ] || { lack "$name" "$(head -n 1 $dir/log)"; return 1; }
  row "$name" "$1" "$2" "$3" "$4" -
}
web "wasm, plain C" 1 "${CLANG:-clang}" --no-warnings
web "wasm, simd128" 2 "${CLANG:-clang}" --no-warnings -msimd128
web "wasm, simd128, relaxed" 2 "${CLANG_RELAXED:-clang-19}" \
  --experimental-wasm-relaxed-simd -msimd128 -mrelaxed-simd ||
  web "wasm, simd128, relaxed" 2 "${CLANG_RELAXED:-clang-19}" \
    --no-warnings -msimd128 -mrelaxed-simd

{
  echo "| products and sums by | forward, ms | training step, ms | forward, times plain C with the\
 instruction | million instructions of a forward pass | bits |"
  echo "|---|---|---|---|---|---|"
  awk -F'\t' '
    NR == FNR {if ($1 == "plain C, with the instruction") base = $2; next}
    FNR == 1 {scores = $4; weights = $5}
    {
      printf "| %s | %s | %s | %s | %s | %s |\n", $1, $2, $3,
        $2 == "-" ? "-" : sprintf("%.2f", $2 / base), $6,
        $4 == scores && $5 == weights ? "equal" : "others"
    }' $dir/rows $dir/rows
  sed 's/^/\nNot here: /' $dir/missing
} | tee build/fma.md
