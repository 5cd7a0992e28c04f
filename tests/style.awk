# awk -f style.awk FILES: the functions of C files, "length parameters file:line name", a line each.
# A length includes the first and the last line; declarations have length 0. Functions that a macro
# stands for are listed as well. A brace at the start of a line ends a function, whatever braces the
# branches of an #if have left open.
function begin_file() { depth = parens = comment = macro = 0; head = "" }

# found_name, found_count: the name before the last list of parameters in a text, and how many
function signature(text, i, c, level, end, count, name) {
  sub(/[ \t]+$/, "", text)
  while (1) {
    if (substr(text, length(text)) != ")") return 0
    level = count = 0
    end = length(text)
    for (i = end; i > 0; --i) {
      c = substr(text, i, 1)
      if (c == ")") ++level
      if (c == "(" && !--level) break
      if (c == "," && level == 1) ++count
    }
    name = substr(text, 1, i - 1)
    sub(/[ \t]+$/, "", name)
    if (name !~ /(__attribute__|noexcept)$/) break
    text = name
    sub(/(__attribute__|noexcept)$/, "", text)
    sub(/[ \t]+$/, "", text)
  }
  if (substr(text, i + 1, end - i - 1) !~ /^[ \t]*(void)?[ \t]*$/) ++count
  match(name, /[A-Za-z_0-9#]*$|[A-Z_0-9]+\([^()]*\)$/) # a name, or a macro that makes one
  if (RLENGTH < 1) return 0
  found_name = substr(name, RSTART)
  if (found_name ~ /^(if|for|while|switch|return|sizeof|do|else)$/) return 0
  found_count = count
  return 1
}

# code(LINE): a line without comments, strings and directives
function code(line, i, c, n) {
  n = length(line)
  while (n > 0 && match(line, /[(){};]/)) {
    c = substr(line, RSTART, 1)
    if (depth == 0) {
      if (head ~ /^[ \t]*$/) first = FNR
      head = head substr(line, 1, RSTART - 1)
    }
    if (c == "(" || c == ")") {
      if (depth == 0) head = head c
      parens += c == "(" ? 1 : -1
    } else if (c == "{") {
      if (depth == 0 && parens == 0) {
        if (head ~ /extern ""[ \t]*$/ || head ~ /^[ \t]*namespace/) {
          head = ""
          line = substr(line, RSTART + 1)
          continue
        }
        inside = head !~ /=|^[ \t]*(typedef|struct|enum|union)[^(]*$/ && signature(head)
        inside_name = found_name; inside_count = found_count; inside_first = first
      }
      ++depth
    } else if (c == "}") {
      if (depth > 0 && !--depth) {
        if (inside)
          print FNR - inside_first + 1, inside_count, FILENAME ":" inside_first, inside_name
        inside = 0
        head = ""
      }
    } else if (depth == 0 && parens == 0) {
      if (head !~ /=/ && head !~ /^[ \t]*typedef/ && signature(head) &&
          head ~ /[A-Za-z_0-9][ \t*]+[A-Za-z_0-9]+[ \t]*\(/)
        print 0, found_count, FILENAME ":" first, found_name
      head = ""
    }
    line = substr(line, RSTART + 1)
    n = length(line)
  }
  if (depth == 0) {
    if (head ~ /^[ \t]*$/ && line !~ /^[ \t]*$/) first = FNR
    head = head line " "
    if (head ~ /^[ \t]*[A-Z_0-9]+\([^()]*\)[ \t]*$/) head = "" # a macro that stands alone
  }
}

FNR == 1 { begin_file() }
{
  line = $0
  out = ""
  while (1) { # takes comments and the insides of strings out
    if (comment) {
      i = index(line, "*/")
      if (!i) { line = ""; break }
      line = substr(line, i + 2)
      comment = 0
    }
    if (!match(line, /"([^"\\]|\\.)*"|'([^'\\]|\\.)*'|\/\*|\/\//)) break
    token = substr(line, RSTART, RLENGTH)
    out = out substr(line, 1, RSTART - 1)
    line = substr(line, RSTART + RLENGTH)
    if (token == "/*") comment = 1
    else if (token == "//") { line = ""; break }
    else out = out (token ~ /^"/ ? "\"\"" : "0")
  }
  line = out line
  continued = line ~ /\\[ \t]*$/
  if (line ~ /^[ \t]*#/ && !macro) { # a directive: what a macro stands for is code of its own
    if (line ~ /^[ \t]*#[ \t]*define/) {
      sub(/^[ \t]*#[ \t]*define[ \t]+[A-Za-z_0-9]+(\([^)]*\))?/, "", line)
      kept_depth = depth; kept_parens = parens; kept_head = head; kept_first = first
      kept_inside = inside; kept_name = inside_name; kept_count = inside_count
      kept_at = inside_first
      depth = parens = inside = 0
      head = ""
      macro = 1
    } else { skipping = continued; next }
  } else if (skipping) { skipping = continued; next }
  sub(/\\[ \t]*$/, "", line)
  if (line ~ /^}/ && !macro && depth) { depth = 1; parens = 0 }
  if (line ~ /^(static|typedef|MOE_API|struct|enum) / && !macro) {
    depth = parens = inside = 0
    head = ""
  }
  code(line)
  if (macro && !continued) {
    depth = kept_depth; parens = kept_parens; head = kept_head; first = kept_first
    inside = kept_inside; inside_name = kept_name; inside_count = kept_count
    inside_first = kept_at
    macro = 0
  }
}
