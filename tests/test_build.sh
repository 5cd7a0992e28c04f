#!/bin/sh
# The header as other people's compilers see it: dialects, warnings, macros, symbols, several units,
# C++, the table of contents.
. ./lib.sh
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wdouble-promotion -Werror"
printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' > "$tmp/one.c"
cp "$tmp/one.c" "$tmp/one.cpp"

build() { # NAME COMPILER ARGUMENTS...
  name=$1 compiler=$2
  shift 2
  if ! have "$compiler"; then skip "$name" "there is no $compiler here"; return; fi
  if "$compiler" -I.. $warn -c -o "$tmp/one.o" "$@" > "$tmp/log" 2>&1; then ok "$name"
  else fail "$name" "$(head -n 5 "$tmp/log")"; fi
}

# one optimised build for each kind of language, since some warnings need the optimiser; the other
# dialects are parsed
build test_build_gcc_c99 gcc -std=c99 -O2 "$tmp/one.c"
build test_build_clang_c99 clang -std=c99 -O1 "$tmp/one.c"
build test_build_g++_c++11 g++ -std=c++11 -O1 "$tmp/one.cpp"
for std in c11 gnu99 gnu17; do
  build "test_build_gcc_$std" gcc -std=$std -fsyntax-only "$tmp/one.c"
  build "test_build_clang_$std" clang -std=$std -fsyntax-only "$tmp/one.c"
done
build test_build_clang++_c++11 clang++ -std=c++11 -fsyntax-only "$tmp/one.cpp"
for std in c++17 c++20; do
  build "test_build_g++_$std" g++ -std=$std -fsyntax-only "$tmp/one.cpp"
  build "test_build_clang++_$std" clang++ -std=$std -fsyntax-only "$tmp/one.cpp"
done
# gcc tells of unused functions when it compiles, clang when it parses, which is ten times faster
parser="gcc -O0"
have clang && parser="clang -fsyntax-only"
for macro in MOE_STATIC MOE_NO_STDIO MOE_NO_THREADS MOE_NO_TRAIN MOE_NO_TEXT MOE_NO_BF16 \
  MOE_NO_INT8 MOE_NO_TASK_ROUTER MOE_NO_SENTENCES MOE_SMALL "MOE_SMALL -DMOE_NO_TRAIN" \
  MOE_NO_SIMD "MOE_NO_STDIO -DMOE_NO_THREADS -DMOE_NO_TRAIN -DMOE_NO_TEXT -DMOE_NO_BF16 \
-DMOE_NO_SIMD"; do
  build "test_build_with_$(echo "$macro" | tr -d ' ' | sed 's/-D/_/g')" $parser -std=c99 -D$macro \
    "$tmp/one.c"
done

# names that a program may have as macros: the header compiles in C and C++, and the macros are
# there again behind it
letters="A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"
with_macros() { # NAMES: a program that has them as macros
  for name in $1; do echo "#define $name 10"; done
  printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\nint there['
  for name in $1; do printf '%s - 10 + ' $name; done
  echo '1];'
}
with_macros "$letters begin end small near far min max" > "$tmp/names.c"
# C++ libraries take min and max away themselves
with_macros "$letters begin end small near far" > "$tmp/names.cpp"
build test_build_after_macros_of_common_names $parser -std=c99 "$tmp/names.c"
build test_build_after_macros_of_common_names_c++ g++ -std=c++11 -fsyntax-only "$tmp/names.cpp"
printf '%s\n' '#include <tgmath.h>' '#define MOE_IMPLEMENTATION' '#include "moe.h"' \
  'float x(float y) { return log(y) + exp(y); }' > "$tmp/tgmath.c"
build test_build_after_tgmath gcc -std=c99 -O0 "$tmp/tgmath.c"

# Windows: whatever comes behind the header finds what it would have found before it
cat > "$tmp/windows.c" << 'END'
#define MOE_IMPLEMENTATION
#include "moe.h"
#include <winsock2.h>
#include <windows.h>
OPENFILENAMEW dialog;
WSADATA sockets;
static int max(int a, int b) { return a > b ? a : b; }
int main(void) {
  int near = 1, far = 2;
  return max(near, far);
}
END
build test_build_before_windows_h x86_64-w64-mingw32-gcc -std=c99 -fsyntax-only "$tmp/windows.c"
printf '%s\n' '#include <winsock2.h>' '#include <windows.h>' '#define MOE_IMPLEMENTATION' \
  '#include "moe.h"' 'OPENFILENAMEW far *dialog;' 'int one(void) { return max(0, 1); }' \
  > "$tmp/windows.c"
build test_build_after_windows_h x86_64-w64-mingw32-gcc -std=c99 -fsyntax-only "$tmp/windows.c"

# a compiler without atomic operations
cat > "$tmp/tcc.c" << 'END'
#define MOE_IMPLEMENTATION
#include "moe.h"
static void backwards(void *user, int32_t count, void (*body)(void *arg, int32_t index),
                      void *arg) {
  (void)user;
  while (count-- > 0) body(arg, count);
}
int main(void) { /* 9 rows on 3 threads that are none */
  static float x[9 * 64], w[300 * 64], y[2][9 * 300], sum;
  moe_linear_op op;
  moe_env env;
  int i;
  moe_env_init(&env, MOE_ISA_AUTO);
  for (i = 0; i < 9 * 64; ++i) x[i] = (float)(i % 7) - 3;
  for (i = 0; i < 300 * 64; ++i) w[i] = (float)(i % 11) / 8;
  moe_linear_op_init(&op);
  op.y = y[0];
  op.x = x;
  op.w = moe_mat_rows(w, 300, 64);
  op.M = 9;
  if (moe_linear_forward(&op, &env)) return 1;
  env.threads = 3;
  env.parallel_for = backwards;
  op.y = y[1];
  if (moe_linear_forward(&op, &env)) return 1;
  for (i = 0; i < 64; ++i) sum += x[8 * 64 + i] * w[299 * 64 + i]; /* exact */
  return memcmp(y[0], y[1], sizeof y[0]) != 0 || y[0][9 * 300 - 1] != sum;
}
END
if ! have tcc; then skip test_build_tcc "there is no tcc here"
elif tcc -I.. -DMOE_NO_THREADS -o "$tmp/tcc" "$tmp/tcc.c" -lm > "$tmp/log" 2>&1 &&
    "$tmp/tcc"; then ok test_build_tcc
else fail test_build_tcc "$(head -n 5 "$tmp/log")"; fi

# nvcc, whose front end has warnings of its own
printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' > "$tmp/one.cu"
if ! have nvcc; then skip test_build_nvcc "there is no nvcc here"
elif nvcc -Xcompiler -Wall,-Wextra -Werror all-warnings -I.. -c -o "$tmp/one.o" "$tmp/one.cu" \
    > "$tmp/log" 2>&1; then ok test_build_nvcc
else fail test_build_nvcc "$(head -n 5 "$tmp/log" | cut -c 1-200)"; fi

# a compiler that fuses products and sums on its own is found out
cat > "$tmp/fuse.c" <<'END'
#define MOE_IMPLEMENTATION
#include "moe.h"
int main(void) {
  moe_env env;
  moe_env_init(&env, MOE_ISA_AUTO);
  if (env.cpu_flags & MOE_CPU_CONTRACTED) return 10;
  return moe_isa_available(MOE_ISA_SCALAR + 1) || moe_isa_available(MOE_ISA_AVX2) ? 11 : 12;
}
END
fuses() { # COMPILER OPTIONS: 10 yes, 11 no, 12 a processor without such an instruction
  if ! have "$1"; then echo 12; return; fi
  "$@" -DMOE_STATIC -w -I.. -o "$tmp/fuse" "$tmp/fuse.c" -lm -pthread 2> "$tmp/log" && "$tmp/fuse"
  echo $?
}
case "$(fuses gcc -O1) $(fuses gcc -O1 -ffp-contract=fast) $(fuses clang -O1)" in *10*) fail \
  test_build_does_not_fuse ;; *) ok test_build_does_not_fuse ;; esac
case $(fuses clang -O1 -ffp-contract=fast) in
  10) ok test_build_tells_where_clang_fuses ;;
  12) skip test_build_tells_where_clang_fuses "there is no clang here, or no processor with FMA" ;;
  *) fail test_build_tells_where_clang_fuses "$(head -n 5 "$tmp/log")" ;;
esac

# -ffast-math breaks the guards against NaN: the header refuses it
if gcc -I.. -ffast-math -c -o "$tmp/one.o" "$tmp/one.c" > /dev/null 2>&1; then
  fail test_build_refuses_fast_math
else
  ok test_build_refuses_fast_math
fi
if gcc -I.. -ffinite-math-only -c -o "$tmp/one.o" "$tmp/one.c" > /dev/null 2>&1; then
  fail test_build_refuses_finite_math
else
  ok test_build_refuses_finite_math
fi

# MOE_MALLOC without MOE_FREE is an error
if gcc -I.. -DMOE_MALLOC=malloc -c -o "$tmp/one.o" "$tmp/one.c" > /dev/null 2>&1; then
  fail test_build_refuses_half_an_allocator
else
  ok test_build_refuses_half_an_allocator
fi

# nothing but moe_ leaves the unit, and MOE_STATIC leaves nothing at all
cc -std=c99 -I.. -c -o "$tmp/one.o" "$tmp/one.c"
leaks=$(nm -g --defined-only "$tmp/one.o" | awk 'NF == 3 && $3 !~ /^_?moe_[a-z]/ {print $3}')
[ -z "$leaks" ] && ok test_build_exports_only_moe_ || fail test_build_exports_only_moe_ $leaks
cc -std=c99 -I.. -DMOE_STATIC -c -o "$tmp/static.o" "$tmp/one.c" 2> /dev/null
leaks=$(nm -g --defined-only "$tmp/static.o" | awk 'NF == 3 {print $3}')
if [ -z "$leaks" ]; then ok test_build_static_exports_nothing
else fail test_build_static_exports_nothing $leaks; fi
writable=$(size -A "$tmp/one.o" |
  awk '/^\.(data|bss|tdata|tbss)/ && $1 !~ /^\.data\.rel\.ro/ && $2 > 0 {print $1 ":" $2}')
[ -z "$writable" ] && ok test_build_has_no_globals || fail test_build_has_no_globals $writable

# what the interface declares is there, whatever is left out
printf '#include "moe.h"\n' > "$tmp/api.c"
bad=
for macro in MOE_NO_STDIO MOE_NO_THREADS MOE_NO_TRAIN MOE_NO_TEXT MOE_NO_BF16 MOE_NO_INT8 \
  MOE_NO_TASK_ROUTER MOE_SMALL; do
  cc -I.. -D$macro -E "$tmp/api.c" | tr '\n' ' ' | tr ';{}' '\n\n\n' |
    sed -n 's/^.*extern [^(]*[ *]\(moe_[a-z0-9_]*\)(.*$/\1/p' | sort -u > "$tmp/declared"
  cc -std=c99 -I.. -D$macro -c -o "$tmp/one.o" "$tmp/one.c"
  nm -g --defined-only "$tmp/one.o" | awk 'NF == 3 {sub(/^_/, "", $3); print $3}' |
    sort -u > "$tmp/defined"
  bad="$bad$(comm -23 "$tmp/declared" "$tmp/defined" | sed "s/\$/ with $macro; /" | tr -d '\n')"
done
[ -s "$tmp/declared" ] || bad="nothing was declared"
if [ -z "$bad" ]; then ok test_build_defines_what_it_declares
else fail test_build_defines_what_it_declares "$bad"; fi

# the macros that the interface leaves behind, and those of the implementation
printf '#include "moe.h"\n' > "$tmp/api.c"
printf '#include <stddef.h>\n#include <stdint.h>\n' > "$tmp/none.c"
cc -I.. -dM -E "$tmp/api.c" | sort > "$tmp/with"
cc -I.. -dM -E "$tmp/none.c" | sort > "$tmp/without"
leaks=$(comm -23 "$tmp/with" "$tmp/without" | awk '$2 !~ /^MOE_/ {print $2}')
if [ -z "$leaks" ]; then ok test_build_interface_defines_only_MOE_
else fail test_build_interface_defines_only_MOE_ $leaks; fi
leaks=$(sed -n 's/^ *# *define  *\([A-Za-z0-9_]*\).*/\1/p' ../moe.h | grep -v '^MOE_' |
  grep -v -x -e NOMINMAX -e _WINSOCKAPI_ -e NEAR -e FAR -e moe__fail | sort -u)
[ -z "$leaks" ] && ok test_build_defines_only_MOE_ || fail test_build_defines_only_MOE_ $leaks

# two units, one with the implementation; the header twice in a unit
cat > "$tmp/main.c" << 'END'
#include "moe.h"
#include "moe.h"
int main(void) {
  moe_env env;
  return moe_env_init(&env, MOE_ISA_AUTO) != MOE_OK || !moe_status_text(MOE_E_IO);
}
END
printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n#include "moe.h"\n' > "$tmp/two.c"
if cc -std=c99 -I.. -o "$tmp/two" "$tmp/main.c" "$tmp/two.c" -lm -pthread && "$tmp/two"; then
  ok test_build_two_units
else
  fail test_build_two_units
fi

# CONTENTS lists the tags in the order of the file
sed -n '/CONTENTS (search/,/^$/p' ../moe.h | grep -o '>>[a-z_]*' | grep -v '^>>tag$' > "$tmp/listed"
grep -o '^/\* ---- .* ---- >>[a-z_]*' ../moe.h | grep -o '>>[a-z_]*$' > "$tmp/found"
if cmp -s "$tmp/listed" "$tmp/found"; then ok test_build_contents_match_the_sections
else fail test_build_contents_match_the_sections "$(diff "$tmp/listed" "$tmp/found")"; fi
finish
