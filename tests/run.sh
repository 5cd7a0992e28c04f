#!/bin/sh
# Runs the given test programs and scripts and adds up their last lines, "N passed, N failed, N skipped". Exit status 1 if any failed. Says
# which took longest.
passed=0 failed=0 skipped=0
log=$(mktemp) && times=$(mktemp) || exit 1
trap 'rm -f "$log" "$times"' EXIT
for t in "$@"; do
  echo "$t"
  began=$(date +%s)
  case $t in
    *.sh) sh "./$t" > "$log" 2>&1 ;;
    *) "./$t" > "$log" 2>&1 ;;
  esac
  status=$?
  echo "$(($(date +%s) - began)) s $t" >> "$times"
  grep -v '^[0-9]* passed, [0-9]* failed' "$log"
  line=$(grep '^[0-9]* passed, [0-9]* failed, [0-9]* skipped$' "$log" | tail -n 1)
  if [ -z "$line" ]; then
    echo "  FAIL  $t ended with status $status before its summary"
    failed=$((failed + 1))
    continue
  fi
  set_p=${line%% *}; rest=${line#*, }; set_f=${rest%% *}; rest=${rest#*, }; set_s=${rest%% *}
  passed=$((passed + set_p)); failed=$((failed + set_f)); skipped=$((skipped + set_s))
  if [ "$status" -ne 0 ] && [ "$set_f" -eq 0 ]; then
    echo "  FAIL  $t ended with status $status"
    failed=$((failed + 1))
  fi
done
[ $# -lt 3 ] || echo "longest: $(sort -rn "$times" | head -n 8 | paste -s -d, | sed 's/,/, /g')"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
