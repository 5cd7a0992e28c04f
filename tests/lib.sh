# For the test scripts: ok NAME, fail NAME WHY, skip NAME WHY, finish. To be sourced.
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); echo "  ok    $1"; }
fail() {
  failed=$((failed + 1))
  echo "  FAIL  $1"
  shift
  [ $# -eq 0 ] || printf '        %s\n' "$*"
}
skip() { skipped=$((skipped + 1)); echo "  skip  $1"; shift; printf '        skipped: %s\n' "$*"; }
have() { command -v "$1" >/dev/null 2>&1; }
finish() { echo "$passed passed, $failed failed, $skipped skipped"; [ "$failed" -eq 0 ]; exit; }
# program NAME: examples/NAME.c or examples/tools/NAME.c as $tmp/NAME, built once for all scripts
program() {
  if "${MAKE:-make}" -s "${BUILD:-build}/$1" > "$tmp/log" 2>&1 &&
      cp "${BUILD:-build}/$1" "$tmp/$1"; then
    return 0
  fi
  head -n 5 "$tmp/log"
  return 1
}

# join PROGRAM:PART,... ...: one program of parts of several, since most of the time of a build goes
# into moe.h; -PART: only for what other parts take from it
join() {
  for each in "$@"; do sed '/^#define MOE_IMPLEMENTATION/,$d' "${each%%:*}.c"; done
  for each in "$@"; do
    sed -n "/^#define MOE_IMPLEMENTATION/,/^#include \"${each%%:*}\//p" "${each%%:*}.c" |
      sed '$d'
  done
  for each in "$@"; do
    for part in $(echo "${each#*:}" | tr ',' ' '); do
      [ "$part" = race ] || echo "#include \"${each%%:*}/${part#-}.c\"" # it is in threads.c
    done
  done
  echo 'int main(int argc, char **argv) {'
  echo '  test_begin(argc, argv);'
  for each in "$@"; do
    for part in $(echo "${each#*:}" | tr ',' ' '); do
      case $part in -*) ;; race) echo '  if (test_is_argument("race")) PART(race);' ;;
        *) echo "  PART($part);" ;;
      esac
    done
  done
  printf '  return test_end();\n}\n'
}
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
