#!/bin/sh
# sh examples/web/build.sh [PAGE]: builds the page (default: examples/web/page.html), one HTML file
# that holds everything, from the sources beside this script, moe.h and examples/data. It needs
# clang and lld (wasm-ld) and no library; CLANG and WASM_FLAGS can be set.
set -eu
cd "$(dirname "$0")"
page=${1:-page.html}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${CLANG:-clang}" --target=wasm32 -nostdlib -O2 -mbulk-memory ${WASM_FLAGS--msimd128} -Ilibc \
  -I../.. -DMOE_NO_STDIO -DMOE_NO_THREADS -DMOE_NO_BF16 -fno-math-errno -fno-builtin-memcmp \
  -fno-builtin-strlen -fvisibility=hidden -Wall -Werror \
  -Wl,--no-entry,--strip-all,-z,stack-size=1048576,--export-dynamic -o "$tmp/engine.wasm" \
  engine.c libc/libc.c
# the data as one text: of each file a line "FILE path lines", then the file
for f in tasks.tsv vocab.txt '*/train.tsv' '*/dev.tsv'; do
  for path in ../data/$f; do
    name=${path#../data/}
    echo "FILE $name $(($(wc -l < "$path")))"
    cat "$path"
  done
done > "$tmp/data"
for f in engine.wasm data; do gzip -9nc "$tmp/$f" | base64 | tr -d '\n' > "$tmp/$f.64"; done

# a line "/* include NAME */" of page.in.html becomes that file
awk -v tmp="$tmp" '
  function copy(file, line) {
    while ((getline line < file) > 0) print line
    close(file)
  }
  /\/\* include [a-z.0-9]* \*\// {
    match($0, /include [a-z.0-9]*/)
    name = substr($0, RSTART + 8, RLENGTH - 8)
    copy(name ~ /64$/ ? tmp "/" name : name)
    next
  }
  { print }' page.in.html > "$tmp/page.html"
mv "$tmp/page.html" "$page"
echo "$page: $(($(wc -c < "$page") / 1024)) KB"
