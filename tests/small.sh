#!/bin/sh
# small.sh: what moe.h takes on microcontrollers. tests/test_small.sh holds the limits. It needs
# arm-none-eabi-gcc with picolibc, and for the boards qemu-system-arm (Debian: gcc-arm-none-eabi
# picolibc-arm-none-eabi qemu-system-arm).
#
#   sh small.sh boards [m0 m4 m7 m55]
#     a forward pass (2 layers, hidden 32, 4 experts of 64, 3 tasks, 16 tokens of 6 numbers) and 3
#     training steps (1 layer, hidden 16, 4 x 8 tokens) under qemu, beside this machine's bits
#   sh small.sh macros    what each macro saves of a linked program, Cortex-M4F
#   sh small.sh example   examples/embedded.c on each board
cd "$(dirname "$0")" || exit 1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
arm="arm-none-eabi-gcc -std=gnu99 -Os -Wall -Wextra -Werror -mthumb -ffunction-sections"
arm="$arm -fdata-sections -Wl,--gc-sections -I.. --specs=picolibc.specs --oslib=semihost"
arm="$arm --crt0=hosted -DPICOLIBC_INTEGER_PRINTF_SCANF -Wl,--defsym=__stack_size=0x1400"

# board NAME: its processor and qemu's machine. A Cortex-M0+ is a Cortex-M3 that gets no more than
# ARMv6-M instructions and traps words that are not aligned.
board() {
  case $1 in
    m0) cpu="-mcpu=cortex-m0plus" machine=mps2-an385 flash=0 ;;
    m4) cpu="-mcpu=cortex-m4 -mfloat-abi=hard -mfpu=fpv4-sp-d16"
      machine=netduinoplus2 flash=0x08000000 ;;
    m7) cpu="-mcpu=cortex-m7 -mfloat-abi=hard -mfpu=fpv5-d16" machine=mps2-an500 flash=0 ;;
    m55) cpu="-mcpu=cortex-m55 -mfloat-abi=hard" machine=mps3-an547 flash=0 ;;
  esac
}
# link OUT SOURCE FLASH RAM OPTIONS: for the board; the linker refuses what does not fit
link() {
  out=$1 from=$2 limits="-Wl,--defsym=__flash=$flash,--defsym=__flash_size=$3"
  limits="$limits,--defsym=__ram=0x20000000,--defsym=__ram_size=$4"
  shift 4
  $arm $cpu $limits "$@" -o "$out" "$from" -lm > "$tmp/log" 2>&1 && return 0
  head -n 4 "$tmp/log" >&2
  return 1
}
run() { # under qemu: one instruction is a nanosecond
  timeout 100 qemu-system-arm -M $machine -icount shift=0 -nographic -monitor none -serial none \
    -semihosting-config enable=on,target=native -kernel "$1" < /dev/null 2>&1
}
sizes() { # flash and static RAM, without the stack's share
  arm-none-eabi-size "$1" | awk 'NR == 2 {print $1 + $2, $2 + $3 - 0x1400}'
}
native="${CC:-cc} -std=c99 -D_POSIX_C_SOURCE=200809L -O1 -I.. -w"

# models: float.h and int8.h of the example's shape
models() {
  program=$(pwd)/${BUILD:-build}/convert
  [ -x "$program" ] || ${MAKE:-make} -s "${BUILD:-build}/convert" > /dev/null 2>&1
  $native -o "$tmp/model" small/model.c -lm -pthread &&
    "$tmp/model" "$tmp/m.safetensors" 2 32 64 3 16 6 &&
    "$program" "$tmp/m.safetensors" --c-array machine > "$tmp/float.h" &&
    "$program" "$tmp/m.safetensors" --int8 --c-array machine > "$tmp/int8.h"
}

# row BOARD WHAT FLASH RAM OPTIONS: a line of the table
row() {
  b=$1 what=$2 most_flash=$3 most_ram=$4
  shift 4
  [ -x "$tmp/here-$what" ] ||
    $native "$@" -o "$tmp/here-$what" small/board.c -lm -pthread || return
  here=$("$tmp/here-$what" | cut -d' ' -f2)
  board "$b"
  link "$tmp/board" small/board.c "$most_flash" "$most_ram" -DMOE_SMALL "$@" || return
  set -- $(sizes "$tmp/board") $(run "$tmp/board")
  same=other-bits
  [ "${4:-there}" = "$here" ] && same=equal
  # qemu says: bits X stack Y blocks Z thousands N
  printf '%-4s %-9s %8d %8d %7s %8s %10s  %s\n' "$b" "$what" "$1" "$2" "${6:-0}" "${8:-0}" \
    "${10:-0}" $same
}

case $1 in
  boards)
    shift
    models || exit 1
    printf '%-4s %-9s %8s %8s %7s %8s %10s  %s\n' cpu what flash RAM stack blocks \
      thousands bits
    for b in ${*:-m0 m4 m7 m55}; do
      row "$b" fp32 0x40000 0x10000 -DMOE_NO_TRAIN "-DMODEL=\"$tmp/float.h\""
      row "$b" int8 0x40000 0x10000 -DMOE_NO_TRAIN "-DMODEL=\"$tmp/int8.h\""
      row "$b" training 0x40000 0x2ff00 -DTRAIN
    done
    ;;
  macros)
    models || exit 1
    board m4
    all="MOE_NO_SIMD MOE_NO_STDIO MOE_NO_THREADS MOE_NO_TEXT MOE_NO_BF16 MOE_NO_TASK_ROUTER"
    all="$all MOE_NO_SENTENCES MOE_NO_TRAIN MOE_NO_INT8"
    # code: OPTIONS: bytes of code and constants but for the model's
    code() {
      link "$tmp/board" small/board.c 0x80000 0x20000 "-DMODEL=\"$tmp/float.h\"" "$@" || return
      set -- $(sizes "$tmp/board")
      echo $(($1 - $(arm-none-eabi-nm -S "$tmp/board" |
        awk '$4 == "machine_floats" {print "0x" $2}')))
    }
    options=
    for m in $all; do options="$options -D$m"; done
    least=$(code -DMOE_SMALL -DMOE_NO_TRAIN -DMOE_NO_INT8)
    printf '%8d  %s\n' "$least" "MOE_SMALL, MOE_NO_TRAIN, MOE_NO_INT8: code with the C library"
    whole=$(code -DMOE_NO_SIMD -DMOE_NO_STDIO -DMOE_NO_THREADS)
    printf '%8d  %s\n' "$whole" "MOE_NO_SIMD, MOE_NO_STDIO, MOE_NO_THREADS alone"
    for m in MOE_NO_TEXT MOE_NO_BF16 MOE_NO_TASK_ROUTER MOE_NO_SENTENCES MOE_NO_TRAIN MOE_NO_INT8
    do
      now=$(code -DMOE_NO_SIMD -DMOE_NO_STDIO -DMOE_NO_THREADS -D$m)
      saved=$((whole - now))
      why=
      [ $saved -lt 100 ] && why=": nothing here, since the linker drops what is not called"
      printf '%8d  saved by %s alone%s\n' $saved $m "$why"
    done
    ;;
  example)
    $native -o "$tmp/here" ../examples/embedded.c -lm && "$tmp/here" > "$tmp/expected"
    for b in m0 m4 m7 m55; do
      board $b
      link "$tmp/board" ../examples/embedded.c 0x40000 0x10000 || continue
      run "$tmp/board" > "$tmp/found"
      set -- $(sizes "$tmp/board")
      same=differs
      cmp -s "$tmp/expected" "$tmp/found" && same=same
      printf '%-4s flash %d RAM %d %s\n' $b "$1" "$2" $same
    done
    ;;
  *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' small.sh; exit 1 ;;
esac
