#!/bin/sh
# moe.h as a shared library (MOE_SHARED): what it exports, what a program gets from it, moe_abi and
# moe_env_create, on this system and as a DLL. CC; the DLL needs gcc-mingw-w64-x86-64, and wine64.
. ./lib.sh
printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' > "$tmp/library.c"
cat > "$tmp/program.c" << 'END'
#include <stdio.h>
#include <string.h>
#include "moe.h"
static char said[400];
static void keep(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  strncpy(said, sentence, sizeof said - 1);
}
static int differs(const char *what, size_t is, size_t expected) {
  if (is != expected) printf("%s: %d, not %d\n", what, (int)is, (int)expected);
  return is != expected;
}
#define SAME(type) differs(#type, moe_abi(#type), sizeof(type))
int main(void) {
  moe_env *env = NULL;
  moe_config config;
  moe_model *model;
  if (SAME(moe_env) || SAME(moe_config) || SAME(moe_task) || SAME(moe_batch) || SAME(moe_limits) ||
      SAME(moe_train_config) || SAME(moe_tensor) || SAME(moe_routes) || SAME(moe_tokens) ||
      differs("version", moe_abi(NULL), MOE_VERSION) || differs("none", moe_abi("moe_no"), 0))
    return 1;
  if (moe_env_create(&env, MOE_ISA_AUTO, 0, keep, NULL) != MOE_E_ARGUMENT || env ||
      !strstr(said, "0 threads, expected 1 to 256"))
    return 2;
  if (moe_env_create(&env, (moe_isa)99, 1, keep, NULL) != MOE_E_UNSUPPORTED || env) return 3;
  if (moe_env_create(&env, MOE_ISA_AUTO, 2, keep, NULL) || env->threads < 1 || env->log != keep)
    return 4;
  moe_config_init(&config);
  config.layers = 1, config.hidden = 8, config.ffn = 8, config.heads = 3; /* 3 does not divide 8 */
  said[0] = 0;
  if (!moe_model_create(&model, &config, NULL, 0, 1, env) || !said[0]) return 5;
  moe_env_free(env);
  moe_env_free(NULL);
  printf("%s\n", said);
  return 0;
}
END
flags="-std=c99 -D_POSIX_C_SOURCE=200809L -O0 -I.. -DMOE_SHARED"
cc=${CC:-cc}
if ! $cc $flags -shared -fPIC -fvisibility=hidden -o "$tmp/libmoe.so" "$tmp/library.c" -lm \
    -pthread > "$tmp/log" 2>&1; then
  fail test_shared_builds "$(head -n 5 "$tmp/log")"
  finish
fi
ok test_shared_builds
nm -D --defined-only "$tmp/libmoe.so" | awk '{ print $NF }' |
    sort > "$tmp/exported"
if ! grep -v '^moe_[a-z]' "$tmp/exported" > "$tmp/log" && grep -qx moe_forward "$tmp/exported"; then
  ok test_shared_exports_only_the_interface
else fail test_shared_exports_only_the_interface "$(head -n 5 "$tmp/log")"; fi
$cc $flags -E "$tmp/program.c" | tr '\n' ' ' | tr ';{}' '\n\n\n' |
  sed -n 's/^.*visibility("default")))  *[^(]*[ *]\(moe_[a-z0-9_]*\)(.*$/\1/p' |
  sort -u > "$tmp/declared"
missing=$(comm -23 "$tmp/declared" "$tmp/exported" | tr '\n' ' ')
if [ -s "$tmp/declared" ] && [ -z "$missing" ]; then ok test_shared_exports_what_is_declared
else fail test_shared_exports_what_is_declared "${missing:-nothing is declared}"; fi
if $cc $flags -o "$tmp/program" "$tmp/program.c" -L"$tmp" -lmoe -Wl,-rpath,"$tmp" \
    > "$tmp/log" 2>&1 && "$tmp/program" >> "$tmp/log" 2>&1; then ok test_shared_runs
else fail test_shared_runs "status $?: $(head -n 5 "$tmp/log")"; fi

# ---- a DLL ----
mingw=x86_64-w64-mingw32-gcc wine=wine64
[ ! -x /usr/lib/wine/wine64 ] || wine=/usr/lib/wine/wine64 # Debian keeps it there
if ! have $mingw; then
  skip test_shared_dll_builds "there is no $mingw here"
  skip test_shared_dll_runs "there is no $mingw here"
  finish
fi
if $mingw $flags -shared -o "$tmp/moe.dll" "$tmp/library.c" -static \
    -Wl,--out-implib,"$tmp/moe.lib" > "$tmp/log" 2>&1 &&
    $mingw $flags -o "$tmp/program.exe" "$tmp/program.c" "$tmp/moe.lib" >> "$tmp/log" 2>&1; then
  ok test_shared_dll_builds
else fail test_shared_dll_builds "$(head -n 5 "$tmp/log")"; fi
x86_64-w64-mingw32-objdump -p "$tmp/moe.dll" | tr -d '\r' |
  awk '/Ordinal\/Name Pointer/ { on = 1 } on && /^\t\[ *[0-9]+\]/ { print $NF }' |
    sort > "$tmp/exported"
missing=$(comm -3 "$tmp/declared" "$tmp/exported" | head -n 5 | tr '\n' ' ')
if [ -z "$missing" ]; then ok test_shared_dll_exports_the_interface
else fail test_shared_dll_exports_the_interface "$missing"; fi
if ! have "$wine"; then
  skip test_shared_dll_runs "there is no wine64 here"
  finish
fi
export WINEDEBUG=-all WINEPREFIX="$tmp/wine"
if (cd "$tmp" && "$wine" program.exe > log 2>&1); then ok test_shared_dll_runs
else fail test_shared_dll_runs "status $?: $(head -n 5 "$tmp/log")"; fi
for s in wineserver /usr/lib/wine/wineserver; do # that of our own prefix, which still writes there
  if have $s; then $s -k; $s -w; fi 2> /dev/null
done
finish
