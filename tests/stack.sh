#!/bin/sh
# stack.sh: how much stack moe.h takes, for this machine and for Cortex-M, and how large it is with
# each macro. tests/test_stack.sh holds the limits. It needs gcc 10 or later, and for Cortex-M
# arm-none-eabi-gcc with newlib or picolibc (Debian: gcc-arm-none-eabi libnewlib-arm-none-eabi).
#
#   sh stack.sh                      the tables
#   sh stack.sh size                 bytes of code with each macro, and of a linked program that
#                                    opens a model in flash and runs it
#   sh stack.sh chain TARGET BUILD   the deepest chain of calls, function by function. Targets: host
#                                    m4 m7; builds: inference training, and on this machine
#                                    simd-inference simd-training simd-no-bf16 (inference)
#
# Frames and calls are gcc's (-fcallgraph-info=su). Calls through pointers, which gcc does not
# resolve, are taken at their worst:
# - through a table of kernels: the deepest function of all tables of constants, whatever the table;
# - to the body of moe__parallel: from the function that names it, behind the frames of
#   moe__parallel and of the built-in pool;
# - to another function whose address is taken: behind the deepest chain from there to any call
#   through a pointer;
# - to one that an object keeps (a clock): from every call through a pointer.
# Functions that call themselves are listed in `rounds` with how deep; any other adds a line
# "recursion". The caller's own functions (log, parallel_for, clock, backend) are not counted. 128
# bytes are added for the C library (memcpy, sqrt).
cd "$(dirname "$0")" || exit 1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' > "$tmp/moe.c"
library=128
# how often a function may be at work at once: a product that a backend leaves to the built-in
# kernels, JSON in a JSON string, powers of ten below 1e-300
rounds="moe__gemm_run 2 moe__json_get 2 moe__json_peek 2 moe__json_escape 2 moe__scale10 2"

# compiler TARGET: compiler and options
compiler() {
  arm="arm-none-eabi-gcc -std=c99 -Os -mthumb -mfloat-abi=hard"
  case $1 in
    host) echo "${CC:-gcc} -std=c99 -D_POSIX_C_SOURCE=200809L -O2" ;;
    m4) echo "$arm -mcpu=cortex-m4 -mfpu=fpv4-sp-d16" ;;
    m7) echo "$arm -mcpu=cortex-m7 -mfpu=fpv5-d16" ;;
  esac
}
small="-DMOE_NO_SIMD -DMOE_NO_STDIO -DMOE_NO_THREADS -DMOE_NO_TEXT"
# macros BUILD
macros() {
  case $1 in
    inference) echo "$small -DMOE_NO_TRAIN -DMOE_NO_BF16" ;;
    training) echo "$small" ;;
    simd-inference) echo "-DMOE_NO_TRAIN" ;;
    simd-no-bf16) echo "-DMOE_NO_TRAIN -DMOE_NO_BF16" ;;
  esac
}
# roots BUILD: the functions that such a program calls all the time
roots() {
  case $1 in
    *training) echo "moe_trainer_accumulate moe_trainer_step" ;;
    simd-*) echo "moe_forward moe_predict_text" ;;
    *) echo "moe_forward" ;;
  esac
}

# chains BUILD FILE.ci FILE.s: lines "frame BYTES FUNCTION", "chain BYTES FUNCTION CALLED NEXT"
# (NEXT: where the deepest chain goes on)
chains() {
  tr '\n' ' ' < ../moe.h | tr ';' '\n' |
    sed -n 's/^.*moe__parallel(.*, *\(moe__[a-z0-9_]*\), *[^,]*)$/\1/p' | sort -u > "$tmp/bodies"
  awk -v library=$library -v rounds="$rounds" '
    BEGIN { n = split(rounds, list, " "); for (i = 1; i < n; i += 2) round[list[i]] = list[i + 1] }
    function name(s) { sub(/^[^"]*"/, "", s); sub(/".*$/, "", s); sub(/^.*:/, "", s); return s }
    FILENAME ~ /bodies$/ { parallel[$1] = 1; next }
    FILENAME ~ /\.ci$/ {
      if ($1 == "node:" && match($0, /[0-9]+ bytes \([a-z,]*\)/)) {
        f = name($0)
        text = substr($0, RSTART, RLENGTH)
        frame[f] = text + 0
        if (text ~ /dynamic/ && text !~ /bounded/) print "unbounded 0 " f
      } else if ($1 == "edge:") {
        split($0, part, "targetname:")
        from = name(part[1])
        to = name(part[2])
        if (to == "__indirect_call") indirect[from] = 1
        else if (!((from, to) in seen)) { seen[from, to] = 1; calls[from] = calls[from] " " to }
      }
      next
    }
    # assembly: who names a function without calling it, and what constants name functions
    /^[A-Za-z_.$][A-Za-z0-9_.$]*:/ {
      at = $1
      sub(/:.*$/, "", at)
      if (at ~ /^\.?L/) next
      here = at
      next
    }
    /^[ \t]*\./ && !/^[ \t]*\.(word|long|quad)[ \t]/ { next }
    {
      op = $1
      if (op ~ /^(call|bl|b|jmp|blx)$/ || op ~ /^b[a-z]*\.?[nw]?$/ && $2 ~ /^moe/) next
      line = $0
      while (match(line, /moe_[A-Za-z0-9_.]*/)) {
        word = substr(line, RSTART, RLENGTH)
        line = substr(line, RSTART + RLENGTH)
        if (!((here, word) in named)) { named[here, word] = 1; names[here] = names[here] " " word }
      }
    }
    function is_machine(f) {
      return f ~ /^moe__(parallel|tiles_worker|pool_(run|work|loop|main))(\.|$)/
    }
    function depth(f,    n, list, i, d, best, to) { # of the deepest chain that begins with f
      if (f in done) return done[f]
      if (!(f in frame)) return library
      if (f in open) { # the way back to it, once more for each further round
        for (i = open[f]; i <= height; ++i) d += frame[stack[i]]
        if (!(f in round)) print "recursion " d " " f
        else if (d * (round[f] - 1) > again[f]) again[f] = d * (round[f] - 1)
        return 0
      }
      stack[++height] = f
      open[f] = height
      best = 0
      n = split(calls[f], list, " ")
      for (i = 1; i <= n; ++i) {
        d = depth(list[i])
        if (d > best) { best = d; to = list[i] }
      }
      if (f in indirect && !is_machine(f) && pointed > best) { best = pointed; to = pointed_to }
      n = split(names[f], list, " ")
      for (i = 1; i <= n; ++i) {
        if (!(list[i] in frame)) continue
        d = depth(list[i]) + (list[i] in parallel ? machine : before(f) - frame[f])
        if (d > best) { best = d; to = list[i] }
      }
      delete open[f]
      --height
      next_of[f] = to
      return done[f] = frame[f] + best + again[f]
    }
    # depth of the deepest chain of plain calls from f to a call through a pointer
    function before(f,    n, list, i, d, best) {
      if (f in prior) return prior[f]
      prior[f] = 0
      best = f in indirect ? frame[f] : 0
      n = split(calls[f], list, " ")
      for (i = 1; i <= n; ++i) {
        d = before(list[i])
        if (d > 0 && d + frame[f] > best) best = d + frame[f]
      }
      return prior[f] = best
    }
    END {
      for (f in frame) if (is_machine(f)) machine += frame[f]
      for (object in names) if (!(object in frame)) { # a table of constants
        n = split(names[object], list, " ")
        for (i = 1; i <= n; ++i) if (list[i] in frame) table[list[i]] = 1
      }
      for (f in names) if (f ~ /^moe_.*_(init|create|create_exact)$/) {
        n = split(names[f], list, " ")
        for (i = 1; i <= n; ++i) # an object that keeps a pointer
          if (list[i] in frame && !is_machine(list[i]) && !(list[i] in parallel)) table[list[i]] = 1
      }
      for (f in table) {
        d = depth(f)
        if (d > pointed) { pointed = d; pointed_to = f }
      }
      for (f in table) delete done[f] # kernels that call kernels
      for (f in frame) {
        print "frame " frame[f] " " f
        print "chain " depth(f) " " f " " next_of[f]
      }
      print "pointed " pointed " " pointed_to
      print "machine " machine " moe__parallel"
    }' "$tmp/bodies" "$2" "$3"
}

# build TARGET BUILD: $tmp/TARGET-BUILD.chains and .size
build() {
  out=$tmp/$1-$2
  [ -f "$out.chains" ] && return 0
  cc=$(compiler "$1")
  $cc $(macros "$2") -fno-section-anchors -ffunction-sections -fdata-sections -fcallgraph-info=su \
    -I.. -S -o "$out.s" "$tmp/moe.c" > "$tmp/log" 2>&1 || return 1
  $cc -c -o "$out.o" "$out.s" && ${cc%%gcc*}size "$out.o" | awk 'NR == 2 {print $1}' > "$out.size"
  chains "$2" "$out.ci" "$out.s" > "$out.chains"
}
# largest KIND FILE [FUNCTIONS]: bytes and function
largest() {
  awk -v kind="$1" -v only=" $3 " '
    $1 == kind && (only == "  " || index(only, " " $3 " ")) && $2 + 0 >= most + 0 {
      most = $2
      at = $3
    }
    END {print most + 0, at}' "$2"
}

have() { command -v "$1" > /dev/null 2>&1; }
# text OPTIONS: bytes of code and constants of moe.h
text() {
  if $cc "$@" -I.. -c -o "$tmp/size.o" "$tmp/moe.c" > "$tmp/log" 2>&1; then
    ${cc%%gcc*}size "$tmp/size.o" | awk 'NR == 2 {print $1}'
  else
    head -n 3 "$tmp/log" >&2
    echo 0
  fi
}
# linked: of a program that opens a model in flash and runs it
linked() {
  cat > "$tmp/program.c" << 'END'
#define MOE_IMPLEMENTATION
#include "moe.h"
extern const unsigned char flash[];
const unsigned char flash[64] = {1};
static unsigned char room[2][16384];
static int32_t ids[16], seq_start[2], task[1];
static float scores[4];
int main(void) {
  moe_env env;
  moe_model *model;
  moe_context *context;
  moe_limits limits = {16, 1, 0, 0};
  moe_batch batch;
  memset(&batch, 0, sizeof batch);
  batch.S = 1;
  batch.seq_start = seq_start;
  batch.ids = ids;
  batch.task = task;
  moe_env_init(&env, MOE_ISA_AUTO);
  if (moe_model_open(&model, flash, sizeof flash, room[0], sizeof room[0], &env)) return 1;
  if (moe_context_init(&context, room[1], sizeof room[1], model, &limits, &env)) return 1;
  return moe_forward(context, scores, &batch, &env);
}
END
  if $cc $(macros inference) -I.. -ffunction-sections -fdata-sections -Wl,--gc-sections \
    -specs=nano.specs -specs=nosys.specs -o "$tmp/program" "$tmp/program.c" -lm > "$tmp/log" 2>&1
  then arm-none-eabi-size "$tmp/program" | awk 'NR == 2 {print $1}'
  else
    head -n 3 "$tmp/log" >&2
    echo 0
  fi
}

if [ "$1" = size ]; then
  cc=$(compiler m4) base="-DMOE_NO_SIMD -DMOE_NO_STDIO -DMOE_NO_THREADS"
  if have arm-none-eabi-gcc; then
    echo "Cortex-M4, gcc -Os, with $base"
    three="-DMOE_NO_TEXT -DMOE_NO_BF16 -DMOE_NO_TRAIN"
    for macro in "" $three "$three"; do
      printf '%8d  %s\n' "$(text $base $macro)" "${macro:-nothing else}"
    done
    printf '%8d  %s\n' "$(linked)" \
      "linked, with those three: open a model in flash, moe_forward; with the C library"
  else echo "Cortex-M4 skipped: there is no arm-none-eabi-gcc here"; fi
  [ "$2" = m4 ] && exit 0
  cc=$(compiler host)
  echo "this machine, gcc -O2"
  for macro in "" STDIO THREADS TEXT BF16 TRAIN SIMD; do
    printf '%8d  %s\n' "$(text ${macro:+-DMOE_NO_$macro})" "${macro:+without }${macro:-everything}"
  done
  exit 0
fi

if [ "$1" = chain ]; then
  build "$2" "$3" || { cat "$tmp/log"; exit 1; }
  at=${4:-$(largest chain "$tmp/$2-$3.chains" "$(roots "$3")" | cut -d' ' -f2)}
  while [ "$at" ]; do
    awk -v f="$at" '
      $3 == f && $1 == "frame" {frame = $2}
      $3 == f && $1 == "chain" {printf "%7d below, %6d in %s\n", $2, frame, f}
    ' "$tmp/$2-$3.chains"
    at=$(awk -v f="$at" '$3 == f && $1 == "chain" {print $4}' "$tmp/$2-$3.chains")
  done
  exit 0
fi

printf '%-7s %-15s %10s  %-24s %10s  %-24s %10s  %s\n' target build frame of chain of any of
for target in ${TARGETS:-host m4 m7}; do
  cc=$(compiler $target)
  if ! have ${cc%% *}; then echo "$target skipped: there is no ${cc%% *} here"; continue; fi
  builds="inference training"
  [ $target = host ] && builds="inference training simd-no-bf16 simd-inference simd-training"
  for build in $builds; do
    if ! build $target $build; then echo "$target skipped: $(head -n 1 "$tmp/log")"; break; fi
    set -- $(largest frame "$tmp/$target-$build.chains") \
      $(largest chain "$tmp/$target-$build.chains" "$(roots $build)") \
      $(largest chain "$tmp/$target-$build.chains")
    printf '%-7s %-15s %10d  %-24s %10d  %-24s %10d  %s\n' $target $build "$@"
    grep -E '^(recursion|unbounded)' "$tmp/$target-$build.chains" | sort -u | sed 's/^/  /'
  done
done
