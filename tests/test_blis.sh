#!/bin/sh
# MOE_USE_BLIS against Debian's libblis and against the BLIS inside PyPI's package blis: the part
# backend of kernels.c with each, whatever kernels they choose.
. ./lib.sh
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wdouble-promotion -Werror"
cc=${CC:-cc} python=${MOE_PYTHON:-python3}
names="kernels_of_this_machine generic_kernels told_to_use_threads"

checked() { # NAME COMMAND...: runs the tests of the part backend
  name=$1
  shift
  if "$@" > "$tmp/log" 2>&1 && grep -q '^[0-9]* passed, 0 failed, 0 skipped$' "$tmp/log"; then
    ok "$name"
    grep '^ *BLIS' "$tmp/log"
  else fail "$name" "$(grep -v '^  ok' "$tmp/log" | head -n 5)"; fi
}

# What the compiler says, without a library
printf '#define MOE_USE_BLIS\n#define MOE_IMPLEMENTATION\n#include "moe.h"\n' > "$tmp/one.c"
for language in c99 c++11; do
  compiler=gcc x=c
  [ $language = c99 ] || compiler=g++ x=c++
  if ! have $compiler; then
    skip "test_blis_builds_as_$language" "there is no $compiler here"; continue
  fi
  if $compiler -std=$language $warn -I.. -fsyntax-only -x $x "$tmp/one.c" > "$tmp/log" 2>&1; then
    ok "test_blis_builds_as_$language"
  else
    fail "test_blis_builds_as_$language" "$(head -n 5 "$tmp/log")"
  fi
done
printf 'int main(void) { return 0; }\n' > "$tmp/empty.c"
debian= pypi=
$cc -o "$tmp/empty" "$tmp/empty.c" -lblis 2> /dev/null && debian=1
pypi=$("$python" -c 'import blis.cy; print(blis.cy.__file__)' 2> /dev/null)
if [ -n "$debian$pypi" ]; then
  $cc -std=c99 -D_POSIX_C_SOURCE=200809L -O1 -fPIC \
    $warn -I. -DMOE_USE_BLIS -c -o "$tmp/check.o" kernels.c > "$tmp/log" 2>&1 ||
    fail test_blis_compiles "$(head -n 5 "$tmp/log")"
fi

if [ -n "$debian" ]; then
  # beside the header of the library itself, where there is one
  if printf '#include <blis.h>\n' | $cc -E -x c - > /dev/null 2>&1; then
    (echo '#include <blis.h>'; cat "$tmp/one.c") > "$tmp/with.c"
    if $cc -std=gnu11 -I.. -fsyntax-only "$tmp/with.c" > "$tmp/log" 2>&1; then
      ok test_blis_builds_after_its_own_header
    else
      fail test_blis_builds_after_its_own_header "$(head -n 5 "$tmp/log")"
    fi
  else skip test_blis_builds_after_its_own_header "there is no blis.h here"; fi
  $cc -o "$tmp/check" "$tmp/check.o" -lblis -lm -pthread
  checked test_blis_debian_kernels_of_this_machine "$tmp/check" backend
  checked test_blis_debian_told_to_use_threads env BLIS_NUM_THREADS=4 OMP_NUM_THREADS=4 \
    "$tmp/check" backend
  generic=$("$tmp/check" --generic)
  if [ -n "$generic" ] && BLIS_ARCH_TYPE=$generic "$tmp/check" --kernels 2> /dev/null |
      grep -q '^generic$'; then
    checked test_blis_debian_generic_kernels env BLIS_ARCH_TYPE=$generic "$tmp/check" backend
  else skip test_blis_debian_generic_kernels \
    "this BLIS cannot be told to use its generic kernels"; fi
else
  for name in $names; do
    skip "test_blis_debian_$name" "there is no libblis here (Debian: libblis-dev)"
  done
fi

# The shared object of PyPI's package exports BLIS; it needs Python around it, which loads the tests
# as a library.
if [ -n "$pypi" ]; then
  $cc -shared -o "$tmp/check.so" "$tmp/check.o" -lm -pthread
  cat > "$tmp/host.py" << 'END'
import ctypes, os, sys
sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_LAZY)
import blis.cy
threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
os.environ["MOE_TEST_THREADS"] = str(threads)
library = ctypes.CDLL(sys.argv[1])
argv = (ctypes.c_char_p * 3)(b"check", b"backend", None)
status = library.main(2, argv)
ctypes.CDLL(None).fflush(None)
os._exit(status)
END
  checked test_blis_pypi_kernels_of_this_machine "$python" "$tmp/host.py" "$tmp/check.so"
else skip test_blis_pypi_kernels_of_this_machine "$python has no package blis"; fi

# Ten lines for any other library: the example, with the cblas of whatever is there
library=
for l in blis openblas cblas blas; do
  [ -z "$library" ] && $cc -O1 -I.. -o "$tmp/blas" ../examples/blas.c -l$l -lm -pthread \
    2> "$tmp/log" && library=$l
done
if [ -z "$library" ]; then
  if printf '#include <cblas.h>\nint main(void) { return 0; }\n' |
      $cc -x c -fsyntax-only - 2> /dev/null; then fail test_blis_example_blas \
      "$(head -n 5 "$tmp/log")"
  else skip test_blis_example_blas "there is no cblas.h here"; fi
elif OPENBLAS_NUM_THREADS=1 "$tmp/blas" > "$tmp/log" 2>&1; then ok test_blis_example_blas
else fail test_blis_example_blas "$(cat "$tmp/log")"; fi
finish
