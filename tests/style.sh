#!/bin/sh
# The measures of readability, each beside v0.1's: columns, functions, parameters, words, lines of
# examples, sections, the licence, clang-format. `make -C tests style`; sh style.sh FOLDER measures
# another copy of the project.
. ./lib.sh
root=${1:-..}

# files SUFFIXES: what people write, without data and what tools have made
files() {
  for suffix in "$@"; do
    find "$root" -name "*.$suffix" ! -path '*/.git/*' ! -path '*/build/*' ! -path '*/venv/*'
  done | awk '!/\/embedded_model\.h$/ && (!/\/tests\/golden\/.*\.h$/ || /\/golden\/golden\.h$/)' |
    sort
}

# measure NAME WHAT FIGURE LIMIT V01 FILE: FIGURE must be LIMIT at most; FILE says where it is not
measure() {
  echo "        $2: $3 (at most $4; v0.1: $5)"
  if [ "$3" -le "$4" ]; then ok "style_$1"
  else fail "style_$1" "$(head -n 10 "${6:-/dev/null}")"; fi
}

# ---- columns ----
files h c cpp sh py awk > "$tmp/files"
echo "$root/.ci/run" >> "$tmp/files"
tr '\n' '\0' < "$tmp/files" | xargs -0 awk 'length($0) > 100 { print FILENAME ":" FNR }' \
  > "$tmp/long"
measure no_line_over_100_columns "lines over 100 columns" $(($(wc -l < "$tmp/long"))) 0 5714 \
  "$tmp/long"

# ---- functions: the lengths of all, the parameters of the library's ----
files h c cpp | tr '\n' '\0' | xargs -0 awk -f style.awk | sort -rn > "$tmp/functions"
awk '$1 > 60 { print $3, $4 ": " $1 " lines" }' "$tmp/functions" > "$tmp/over"
measure no_function_over_60_lines "lines of the longest function" \
  "$(awk '{ print $1; exit }' "$tmp/functions")" 60 72 "$tmp/over"

# parameters LIMIT PATTERN: those of functions in the headers whose names match
parameters() {
  awk -v limit="$1" -v pattern="$2" '$3 ~ /\/moe(_cuda)?\.h:/ && $4 ~ pattern {
    if ($2 > limit) print $3, $4 ": " $2 " parameters" > over
    if ($2 > most) most = $2
  } END { print most + 0 }' over="$tmp/over" "$tmp/functions"
}
: > "$tmp/over"
most=$(parameters 8 '^moe_[a-z0-9]')
measure no_public_function_over_8_parameters "parameters of a public function" "$most" 8 17 \
  "$tmp/over"
: > "$tmp/over"
most=$(parameters 10 '^moe__|##|\\(')
measure no_private_function_over_10_parameters "parameters of a private function" "$most" 10 19 \
  "$tmp/over"

# ---- what a visitor reads first ----
measure readme_has_1600_words "words in README.md" $(($(wc -w < "$root/README.md"))) 1600 5493
: > "$tmp/over"
for f in "$root"/examples/*.c "$root"/examples/*.cpp "$root"/examples/*.py; do
  lines=$(($(cat "$f" 2> /dev/null | wc -l)))
  limit=200
  [ "${f##*/}" = train.c ] && limit=900
  [ "$lines" -le $limit ] || echo "${f##*/}: $lines lines, at most $limit" >> "$tmp/over"
done
measure examples_are_short "files in examples/ over 200 lines (train.c: 900)" \
  $(($(wc -l < "$tmp/over"))) 0 5 "$tmp/over"

# ---- the sections of moe.h; the number of lines is no law ----
awk '/^\/\* ---- .* ---- >>[a-z0-9_]*/ {
  if (tag != "") print NR - at, tag
  at = NR
  match($0, />>[a-z0-9_]*/)
  tag = substr($0, RSTART, RLENGTH)
} END { print NR - at, tag }' "$root/moe.h" | sort -rn > "$tmp/sections"
echo "        sections of moe.h: $(($(wc -l < "$tmp/sections"))) (v0.1: 70); over 400 lines," \
  "kernels of instruction sets apart: $(awk '$1 > 400 && $2 !~ /_(simd|x86|neon)$/ {
    printf "%s%s %d", sep, $2, $1
    sep = ", "
  } END { if (sep == "") printf "none" }' "$tmp/sections") (v0.1: >>safetensors 409)"
sed -n '/CONTENTS (search/,/^$/p' "$root/moe.h" | grep -o '>>[a-z0-9_]*' | grep -v '^>>tag$' \
  > "$tmp/listed"
grep -o '^/\* ---- .* ---- >>[a-z0-9_]*' "$root/moe.h" | grep -o '>>[a-z0-9_]*$' > "$tmp/found"
if cmp -s "$tmp/listed" "$tmp/found"; then ok style_contents_match_the_sections
else fail style_contents_match_the_sections "$(diff "$tmp/listed" "$tmp/found")"; fi

# ---- the licence: every paragraph of LICENSE but those on the project's files, word by word ----
for f in "$root/moe.h" "$root/moe_cuda.h"; do
  [ -f "$f" ] || continue
  name=style_$(basename "$f" .h)_ends_with_the_licence
  missing=$(tail -n 120 "$f" | awk '
    function words(text) {
      gsub(/[ \t\n]+/, " ", text)
      gsub(/^ | $/, "", text)
      return text
    }
    FILENAME == "-" {
      sub(/^ *(\/\*|\*\/|\*|\/\/)/, "")
      sub(/\*\/ *$/, "")
      end = end " " $0
      next
    }
    FNR == 1 { end = " " words(end) " " }
    /^-+$/ { next }
    NF { paragraph = paragraph " " $0; next }
    { check() }
    function check() {
      paragraph = words(paragraph)
      if (paragraph != "" && paragraph !~ /^(moe\.h, |ALTERNATIVE |The data sets )/ &&
          !index(end, paragraph))
        print substr(paragraph, 1, 60) " ..."
      paragraph = ""
    }
    END { check() }' - "$root/LICENSE")
  if [ -z "$missing" ]; then ok "$name"; else fail "$name" "$missing"; fi
done

# ---- clang-format: versions differ, so only with the one that .clang-format was made for ----
if ! have clang-format; then skip style_is_clang_format_s "there is no clang-format here"
elif ! clang-format --version | grep -q 'version 14\.'; then
  skip style_is_clang_format_s "this clang-format is not version 14"
else
  files h c cpp | while read -r f; do
    clang-format --style=file "$f" | cmp -s - "$f" || echo "$f"
  done > "$tmp/over"
  measure is_clang_format_s "files that clang-format changes" $(($(wc -l < "$tmp/over"))) 0 \
    "no format" "$tmp/over"
fi
finish
