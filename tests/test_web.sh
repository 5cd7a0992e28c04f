#!/bin/sh
# The page of examples/web, built as its command says and run in headless Chromium: the bits of
# native programs, keyboard, phone, labels, no network. Needs clang with wasm-ld, chromium, python3.
# PICTURES=FOLDER keeps pictures of it. CHROMIUM: the browser.
. ./lib.sh
tests="page_builds page_opens plane_has_the_native_bits text_has_the_bits_of_train"
missing=
for c in clang wasm-ld python3; do have $c || missing="$missing $c"; done
python3 -c 'import browser, sys; sys.exit(not browser.find())' 2> /dev/null ||
  missing="$missing chromium"
if [ -n "$missing" ]; then
  for t in $tests; do skip test_web_$t "not here:$missing"; done
  finish
fi
if sh ../examples/web/build.sh "$tmp/page.html" > "$tmp/log" 2>&1; then ok test_web_page_builds
else fail test_web_page_builds "$(head -n 5 "$tmp/log")"; finish; fi
bytes=$(($(wc -c < "$tmp/page.html")))
if [ $bytes -lt 1000000 ]; then ok test_web_page_is_under_1_MB
else fail test_web_page_is_under_1_MB "$bytes bytes"; fi
${CC:-cc} -std=c99 -O1 -I.. -o "$tmp/native" web.c -lm -pthread || fail test_web_native
program train
(cd .. && "$tmp/train" --from-scratch --systems tag --layers 2 --hidden 32 --ffn 64 --lr 0.002 \
  --steps 4 --tasks snips_intents,intent_match --resamples 0 --predictions "$tmp/predictions") \
  > "$tmp/log" 2>&1 || fail test_web_train "$(tail -n 3 "$tmp/log")"
if ! python3 web.py "$tmp/page.html" "$tmp" > "$tmp/said" 2> "$tmp/log"; then
  fail test_web_runs "$(tail -n 3 "$tmp/log")"
fi
while read -r verdict name rest; do
  case $verdict in
    ok) ok "test_web_$name" ;;
    FAIL) fail "test_web_$name" "$rest" ;;
    *) echo "        $name $rest" ;;
  esac
done < "$tmp/said"
[ -z "${PICTURES:-}" ] || cp "$tmp"/*.png "$PICTURES"
finish
