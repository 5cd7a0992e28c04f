#!/bin/sh
# Runs the given test programs and scripts and adds up their last lines, "N passed, N failed, N
# skipped". Exit status 1 if any failed. Says which took longest. JOBS=2: two at a time. A program
# may have arguments: "build/test_kernels gemm".
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
: > "$dir/totals"

# one TEST: runs it, tells what it said, and adds "passed failed skipped seconds test" to the totals
one() {
  t=$1 log=$dir/$(basename "$1" | tr ' ' _).log began=$(date +%s) p=0 f=1 s=0 why=
  case $t in
    *.sh) sh "./$t" > "$log" 2>&1 ;;
    *) ./$t > "$log" 2>&1 ;;
  esac
  status=$?
  line=$(grep '^[0-9]* passed, [0-9]* failed, [0-9]* skipped$' "$log" | tail -n 1)
  if [ -z "$line" ]; then why="ended with status $status before its summary"
  else
    p=${line%% *} rest=${line#*, }
    f=${rest%% *} rest=${rest#*, }
    s=${rest%% *}
    if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then f=1 why="ended with status $status"; fi
  fi
  until mkdir "$dir/telling" 2> /dev/null; do sleep 0.1; done
  echo "$t"
  grep -v '^[0-9]* passed, [0-9]* failed' "$log"
  [ -z "$why" ] || echo "  FAIL  $t $why"
  echo "$p $f $s $(($(date +%s) - began)) $t" >> "$dir/totals"
  rmdir "$dir/telling"
}

# lane TESTS...: those that no other lane has taken
lane() {
  for each in "$@"; do
    mkdir "$dir/taken_$(basename "$each" | tr ' ' _)" 2> /dev/null && one "$each"
  done
}

job=1
while [ $job -lt "${JOBS:-1}" ]; do
  lane "$@" &
  job=$((job + 1))
done
lane "$@"
wait
[ $# -lt 3 ] || echo "longest: $(sort -k 4 -rn "$dir/totals" | head -n 15 |
  awk '{
    seconds = $4
    $1 = $2 = $3 = $4 = ""
    sub(/^ */, "")
    printf "%s%s %s s", sep, $0, seconds
    sep = ", "
  }')"
awk '{ p += $1; f += $2; s += $3 } END {
  print p + 0 " passed, " f + 0 " failed, " s + 0 " skipped"
  exit f > 0
}' "$dir/totals"
