#!/bin/sh
# WebAssembly in node: plain C, simd128 and relaxed simd give the bits of plain C here, and fused
# sums of vectors are exact on hostile operands, here too. CLANG: a compiler for it.
. ./lib.sh
if ${CC:-cc} -std=c99 -O1 -w -DMOE_STATIC -I.. -o "$tmp/fma" small/fma.c -lm -pthread \
    > "$tmp/log" 2>&1 && "$tmp/fma" > "$tmp/log"; then ok test_wasm_fused_sums_here_are_exact
else fail test_wasm_fused_sums_here_are_exact "$(tail -n 4 "$tmp/log")"; fi
names=
for build in plain simd128 relaxed; do
  names="$names ${build}_trains ${build}_forward ${build}_int8"
  [ $build = plain ] || names="$names ${build}_fused_sums ${build}_says_its_name"
done
missing=
for w in "${CLANG:-clang}" wasm-ld node; do have "$w" || missing="there is no $w here"; done
if [ "$missing" ]; then
  for n in $names; do skip test_wasm_$n "$missing"; done
  finish
fi
${CC:-cc} -std=c99 -O1 -w -I.. -o "$tmp/here" small/wasm.c -lm -pthread > "$tmp/log" 2>&1 &&
  set -- $("$tmp/here")
if [ $# -ne 3 ] || [ "$3" -lt 10 ]; then fail test_wasm_here "$(head -n 4 "$tmp/log")"; finish; fi
cat > "$tmp/run.js" << 'END'
const bytes = require('fs').readFileSync(process.argv[2])
if (!WebAssembly.validate(bytes)) { console.log('invalid'); process.exit(1) }
const run = new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports.run
const isa = +process.argv[3], bits = what => run(isa, what) >>> 0
let name = ''
for (let i = 0; run(i, 4); ++i) name += String.fromCharCode(run(i, 4))
console.log(bits(0), bits(1), bits(2), bits(3), name)
END
# compile CLANG FLAGS: run.wasm
compile() {
  clang=$1
  shift
  "$clang" --target=wasm32 -nostdlib -O1 -mbulk-memory -fno-math-errno -fno-builtin-memcmp \
    -fno-builtin-strlen "$@" -w -I../examples/web/libc -I.. -DMOE_NO_STDIO -DMOE_NO_THREADS \
    -DMOE_NO_TEXT -DMOE_NO_BF16 -Wl,--no-entry -Wl,-z,stack-size=1048576 -o "$tmp/run.wasm" \
    small/wasm.c ../examples/web/libc/libc.c > "$tmp/log" 2>&1
}
# check BUILD TRAINED FORWARD INT8 NAME: what node has said, against what was said here
check() {
  build=$1 here="$2 $3 $4" named=$5
  read -r trained forward int8 wrong name < "$tmp/found"
  [ "$trained" = "$2" ] && ok test_wasm_${build}_trains ||
    fail test_wasm_${build}_trains "$trained" "$here" "$(head -n 4 "$tmp/log")"
  [ "$forward" = "$3" ] && ok test_wasm_${build}_forward ||
    fail test_wasm_${build}_forward "$forward" "$here"
  [ "$int8" = "$4" ] && ok test_wasm_${build}_int8 || fail test_wasm_${build}_int8 "$int8" "$here"
  [ $build = plain ] && return
  [ "$wrong" = 0 ] && ok test_wasm_${build}_fused_sums ||
    fail test_wasm_${build}_fused_sums "$wrong lanes"
  [ "$name" = "$named" ] && ok test_wasm_${build}_says_its_name ||
    fail test_wasm_${build}_says_its_name "$name"
}
compile "${CLANG:-clang}" && node "$tmp/run.js" "$tmp/run.wasm" 1 > "$tmp/found" 2> "$tmp/log"
check plain "$@"
compile "${CLANG:-clang}" -msimd128 &&
  node "$tmp/run.js" "$tmp/run.wasm" 2 > "$tmp/found" 2> "$tmp/log"
check simd128 "$@" simd128
# relaxed simd: numbers of instructions as clang 16 has them, an engine that knows them
relaxed=
for c in "${CLANG:-clang}" clang-22 clang-19 clang-16; do
  for o in "" --experimental-wasm-relaxed-simd; do
    [ "$relaxed" ] && break
    option=$o
    have "$c" && compile "$c" -msimd128 -mrelaxed-simd &&
      node $o "$tmp/run.js" "$tmp/run.wasm" 2 > "$tmp/found" 2> "$tmp/log" && relaxed=1
  done
done
if [ "$relaxed" ]; then
  check relaxed "$@" "simd128, relaxed"
  node $option --no-enable-fma3 "$tmp/run.js" "$tmp/run.wasm" 2 > "$tmp/found" 2>&1 # refused: 1
  node $option --no-enable-fma3 "$tmp/run.js" "$tmp/run.wasm" 0 >> "$tmp/found" 2>&1
  if [ "$(cut -d' ' -f1-3 "$tmp/found" | tr '\n' ' ')" = "1 1 1 $* " ] ||
      [ "$(uname -m)" != x86_64 ]; then
    ok test_wasm_relaxed_is_refused_where_it_rounds_twice
  else fail test_wasm_relaxed_is_refused_where_it_rounds_twice "$(cat "$tmp/found")"; fi
else
  skip test_wasm_relaxed_is_refused_where_it_rounds_twice "no clang or node with relaxed simd"
  for n in trains forward int8 fused_sums says_its_name; do
    skip test_wasm_relaxed_$n "no clang or node with relaxed simd"
  done
fi
finish
