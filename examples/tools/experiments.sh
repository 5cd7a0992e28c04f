#!/bin/sh
# experiments.sh - the experiments of the two papers, each with one command, in a size that fits a \
  laptop.
#
#   examples/tools/experiments.sh --list
#   examples/tools/experiments.sh table1                                   the bundled tasks, from \
  scratch, some minutes
#   examples/tools/experiments.sh table1 --data glue --init MiniLM/model.safetensors --vocab \
  MiniLM/vocab.txt --budget 4h
#
# What is finished is kept in --out and not run again; what was killed goes on from its \
  checkpoint: give the same command again. The table at
# the end is made of what is there. `[TaG]` is MT-TaG, `[TL]` the poster on task-level mixtures of \
  experts; README.md names both.
set -u
here=$(dirname "$0")

usage() {
  cat << 'END'
usage: experiments.sh NAME [options] [-- options for train or tasklevel]
       experiments.sh --list
  --budget B       length of a first stage: 2000 (steps) or 3Mtokens; or minutes or hours for the \
    whole experiment,
                   90min or 4h, by the speed of this machine   [1500 steps with --init, else 300]
  --data DIR       folder of tasks   [examples/data]
  --tasks A,B,C    the tasks that are trained together   [those of the paper]
  --init FILE      published encoder to start from; table4: several, FILE,FILE,...   [from scratch]
  --vocab FILE     its vocabulary   [vocab.txt of --data]
  --rows N,M       rows of an unseen task, two or more sizes   [about 1 % and 10 % of SciTail, \
    235,2400, or what there is]
  --seeds 1,2,3    [1,2,3]
  --out DIR        where everything is kept   [experiments]
  --part I/N       only every N-th piece of the work, from the I-th: for several machines or \
    processors that share --out,
                   or whose --out is put together afterwards (with a budget in steps: minutes \
                     differ between machines)
  --threads N      [all processors]
  --report         run nothing, show what is finished
  --dry-run        print the commands
MOE_BIN names a folder with train, tasklevel and routes, compiled; otherwise they are compiled \
  into --out (CC, CFLAGS).
END
}

list() {
  cat << 'END'
table1     [TaG] Table 1: Single-Task, MT-Dense, MT-Switch and MT-TaG, both stages
table2     [TaG] Table 2: unseen related tasks on few rows, four systems
table3     [TaG] Table 3: with and without the tasks that are unlike the rest, averages of the \
  tasks in both
table4     [TaG] Table 4: Single-Task and MT-TaG with encoders of several sizes, averages
table5     [TaG] Table 5: all tasks that there are, Single-Task and MT-TaG
table6     [TaG] Table 6: an unseen task with the gates of related and unrelated tasks and random \
  ones
table7     [TaG] Table 7: sampling of tasks, uniform, natural, and first one and then the other \
  (A.4)
table8     [TaG] Table 8: 2, 4 and 6 experts
table10    [TaG] Table 10: table3 task by task
table11    [TaG] Table 11: table4 task by task
section4   [TL] 4: selection x batching x learning rates x stages, and router, task vectors, \
  frozen or not
section5   [TL] 5: a task never seen, on few rows, beside multi-task training and random and \
  average routes
section6   [TL] 6: what the routes have learned: correlation with features, blocks disabled, \
  routes over training
END
}

die() { echo "experiments.sh: $*" >&2; exit 1; }
say() { echo "$*"; }

# ---- options ----

name= budget= data=$here/../data tasks= init= vocab= rows= seeds=1,2,3 out=experiments part=1/1 \
  threads= report= dry=
[ $# -gt 0 ] || { usage; exit 1; }
while [ $# -gt 0 ]; do
  case $1 in
    --list) list; exit 0 ;;
    --help | -h) usage; exit 0 ;;
    --report) report=1; shift; continue ;;
    --dry-run) dry=1; shift; continue ;;
    --) shift; break ;;
    --budget | --data | --tasks | --init | --vocab | --rows | --seeds | --out | --part | \
      --threads) [ $# -gt 1 ] || die "$1 needs a value" ;;
    -*) die "unknown option $1; --help lists them" ;;
    *) [ -z "$name" ] || die "two names, $name and $1; options for train go behind --"; name=$1; \
      shift; continue ;;
  esac
  case $1 in
    --budget) budget=$2 ;; --data) data=$2 ;; --tasks) tasks=$2 ;; --init) init=$2 ;; --vocab) \
      vocab=$2 ;; --rows) rows=$2 ;; --seeds) seeds=$2 ;; --out) out=$2 ;;
    --part) part=$2 ;; --threads) threads=$2 ;;
  esac
  shift 2
done
list | grep -q "^$name " && [ -n "$name" ] || die \
  "there is no experiment \"$name\"; --list shows them all"
echo "$part" | grep -q '^[1-9][0-9]*/[1-9][0-9]*$' && [ "${part%/*}" -le "${part#*/}" ] || die \
  "--part is I/N, 1/2 say, not \"$part\""
echo "$seeds" | grep -q '^[0-9][0-9]*\(,[0-9][0-9]*\)*$' || die \
  "--seeds is a list of numbers, not \"$seeds\""
echo "${budget:-1}" | grep -Eq '^[0-9]+(\.[0-9]+)?(steps|tokens|Mtokens|m|min|h)?$' ||
  die "--budget is a number of steps, or 3Mtokens, 90min, 4h, not \"$budget\""
[ -e "$data/tasks.tsv" ] || die "there is no $data/tasks.tsv"
case $init in *?,?*) [ "$name" = table4 ] || [ "$name" = table11 ] || die \
  "only table4 and table11 take several files with --init" ;; esac
for f in $(echo "$init" | tr ',' ' '); do [ -e "$f" ] || die "--init: there is no $f"; done
[ -z "$init" ] || [ -n "$vocab" ] || vocab=$data/vocab.txt
seed_list=$(echo "$seeds" | tr ',' ' ')
n_seeds=$(echo "$seed_list" | wc -w)

# ---- pieces of work ----

case $name in table10) work=table3 ;; table11) work=table4 ;; *) work=$name ;; esac
dir=$out/$work
mkdir -p "$dir" || exit 1
piece=0 left=0
[ -n "$dry" ] || : > "$dir/summary.table"

# PROGRAM: where it is, compiled if need be
program() {
  if [ -n "${MOE_BIN:-}" ]; then
    [ -x "$MOE_BIN/$1" ] || die "MOE_BIN: there is no $MOE_BIN/$1"
    echo "$MOE_BIN/$1"
    return
  fi
  source=$here/$1.c
  [ -e "$source" ] || source=$here/../$1.c
  if [ ! -x "$out/$1" ] || [ -n \
    "$(find "$source" "$here"/*.h "$here/../../moe.h" -newer "$out/$1")" ]; then
    # shellcheck disable=SC2086
    ${CC:-cc} ${CFLAGS:--O3} -o "$out/$1.new.$$" "$source" -lm -pthread >&2 || die \
      "$source does not compile"
    mv "$out/$1.new.$$" "$out/$1"
  fi
  echo "$out/$1"
}

quoted() { # the command as a shell reads it again
  for a; do
    case $a in *[!A-Za-z0-9_.,:=/%+-]* | '') printf "'%s' " \
      "$(printf %s "$a" | sed "s/'/'\\\\''/g")" ;; *) printf '%s ' "$a" ;; esac
  done
}

begun() { [ -e "$p/state.ckpt" ] || [ -e "$p/state.ckpt.results" ] || ls "$p"/state-*.ckpt > \
  /dev/null 2>&1; }

# STEM PROGRAM OPTIONS...: one piece, in a folder of its own: the command, the state, what was \
  printed, result.json; `finished` at the end.
# Returns 0 when it is finished, 1 when it is left to another part. A killed one goes on.
piece() {
  stem=$1 what=$2 p=$dir/$1
  shift 2
  piece=$((piece + 1))
  command="$what $(quoted "$@")"
  if [ -n "$dry" ]; then echo "$command --json $p/result.json"; return 0; fi
  if [ -e "$p/command" ] && [ "$(cat "$p/command")" != "$command" ]; then
    die "$p was begun with other options; give those again, or another --out
  there $(cat "$p/command")
  here  $command"
  fi
  [ ! -e "$p/finished" ] || return 0
  if [ -n "$report" ] || [ $(((piece - 1) % ${part#*/} + 1)) -ne "${part%/*}" ]; then left=$((left \
    + 1)); return 1; fi
  binary=$(program "$what") || exit 1
  mkdir -p "$p" && echo "$command" > "$p/command.new" && mv "$p/command.new" "$p/command" || exit 1
  set -- "$@" --checkpoint "$p/state.ckpt" --json "$p/result.json"
  if begun; then set -- "$@" --resume "$p/state.ckpt"; fi
  say "$(date '+%H:%M')  $stem"
  "$binary" "$@" > "$p/output"
  status=$?
  if [ $status -ne 0 ]; then
    begun || rm -f "$p/command"
    [ $status -lt 128 ] || { say "stopped in $stem; the same command goes on"; exit $status; }
    die "$stem ended with status $status; the command was
  $binary $(quoted "$@")"
  fi
  rm -f "$p"/*.ckpt "$p"/*.ckpt.best "$p"/*.tmp
  : > "$p/finished"
}

# STEM "SYSTEMS" OPTIONS...: train with both stages, a piece for each system and seed; then one \
  table of all, with the systems compared
variant() {
  v=$1 systems=$2
  shift 2
  for system in $systems; do
    for seed in $seed_list; do piece "$v-$system-$seed" train --systems "$system" --seeds "$seed" \
      --tidy "$@"; done
  done
  [ -z "$dry" ] || return 0
  for system in $systems; do
    for seed in $seed_list; do cat "$dir/$v-$system-$seed/state.ckpt.results" 2> /dev/null; done
  done > "$dir/$v.ckpt.results"
  [ -s "$dir/$v.ckpt.results" ] || { say "$v: nothing is finished yet"; return 0; }
  binary=$(program train) || exit 1
  "$binary" --systems "$(echo "$systems" | tr ' ' ',')" --seeds "$seeds" "$@" --resume \
    "$dir/$v.ckpt" --report --json "$dir/$v.json" > "$dir/$v.table" 2> "$dir/$v.log" ||
    { cat "$dir/$v.log" >&2; die "$v: no table"; }
}

# ---- results ----

# VARIANT: lines "system TAB seed TAB task TAB value TAB rows" of what train has written
values() {
  [ ! -e "$dir/$1.json" ] || awk '
    /"system":/ { split($0, part, \
      "\""); system_name = part[4]; match($0, /"seed": [0-9]+/); seed = substr($0, RSTART + 8, RLENGTH - 8) }
    /"name":/ && /"value":/ { split($0, part, \
      "\""); match($0, /"value": [-0-9.e]+/); v = substr($0, RSTART + 9, RLENGTH - 9)
      match($0, /"rows": [0-9]+/); print system_name "\t" seed "\t" part[4] "\t" v "\t" substr($0, \
        RSTART + 8, RLENGTH - 8) }' "$dir/$1.json"
}

# LABEL "TASKS" (all when empty): from values, lines "LABEL SYSTEM TAB column TAB value" with the \
  columns small and all, for each seed
averages() {
  awk -F '\t' -v label="$1" -v tasks="$2" '
    BEGIN { n = split(tasks, t, " "); for (i = 1; i <= n; ++i) wanted[t[i]] = 1
            title["single"] = "Single-Task"; title["dense"] = "MT-Dense"; title["switch"] = \
              "MT-Switch"; title["tag"] = "MT-TaG" }
    n && !($3 in wanted) { next }
    $1 !~ /-tuned$/ { next }
    { k = $1 SUBSEP $2; if (!(k in count)) { order[++runs] = k; system_of[k] = $1 } count[k]++; \
      sum[k] += $4
      if ($5 <= 10000) { small[k]++; small_sum[k] += $4 } }
    END { for (i = 1; i <= runs; ++i) { k = order[i]; s = system_of[k]; sub(/-tuned$/, "", s)
            if (small[k]) print label " " title[s] "\tsmall\t" small_sum[k] / small[k]
            print label " " title[s] "\tall\t" sum[k] / count[k] } }'
}

# TITLE: lines "row TAB column TAB value" as a table of 100 x mean+-deviation
table() {
  awk -F '\t' -v title="$1" '
    { if (!($1 in row)) { row[$1] = ++rows; name[rows] = $1 } if (!($2 in column)) { column[$2] = \
      ++columns; head[columns] = $2 }
      k = row[$1] SUBSEP column[$2]; n[k]++; s[k] += $3; q[k] += $3 * $3 }
    END { if (!rows) exit
      printf "\n%s\n%-44s", title, ""
      for (j = 1; j <= columns; ++j) printf " %18s", head[j]
      for (i = 1; i <= rows; ++i) { printf "\n%-44s", name[i]
        for (j = 1; j <= columns; ++j) { k = i SUBSEP j; if (!n[k]) { printf " %18s", "-"; \
          continue }
          m = s[k] / n[k]; v = q[k] / n[k] - m * m
          cell = n[k] > 1 ? sprintf("%.1f+-%.1f", 100 * m, 100 * sqrt(v > 0 ? v * n[k] / (n[k] - \
            1) : 0)) : sprintf("%.1f", 100 * m)
          printf " %18s", cell } }
      printf "\n" }' | tee -a "$dir/summary.table"
}

show() { [ -n "$dry" ] || [ ! -e "$dir/$1.table" ] || { [ -z "${2:-}" ] || printf '\n%s\n' "$2"; \
  cat "$dir/$1.table"; }; }

# ---- tasks: those of the paper where --data has them, stand-ins where not ----

names=$(cut -f 1 "$data/tasks.tsv" | tr -d '\r' | sed 1d)
has() { echo "$names" | grep -qx -e "$1"; }
these() { # NAMES...: those that there are
  found=
  for t; do ! has "$t" || found="$found $t"; done
  echo "${found# }"
}
but() { # "LIST" NAMES...: the list without them
  kept=
  for t in $1; do
    case " $2 " in *" $t "*) ;; *) kept="$kept $t" ;; esac
  done
  echo "${kept# }"
}
commas() { echo "$*" | tr ' ' ','; }
train_rows() { echo $(($(wc -l < "$data/$1/train.tsv") - 1)); }

glue=$(these RTE MRPC STS-B CoLA SST-2 QNLI QQP MNLI)
if [ -n "$tasks" ]; then
  mixture=$(echo "$tasks" | tr ',' ' ')
  for t in $mixture; do has "$t" || die "--tasks: $data/tasks.tsv has no $t"; done
elif [ "$(echo "$glue" | wc -w)" -lt 2 ]; then
  glue=
  mixture=$(echo $names)
else mixture=$glue; fi
# an unseen task: the first of the list that there is; what stands for what
nli=$(these SciTail snli_sample CB clinc_domains | cut -d ' ' -f 1)
sentiment=$(these IMDB YelpPolarity sentence_polarity | cut -d ' ' -f 1)
related() { # UNSEEN: the tasks of the mixture whose gates it should be given, the best first
  case $1 in
    SciTail | snli_sample | CB) these MNLI RTE QNLI ;;
    IMDB | YelpPolarity | sentence_polarity) these SST-2 pros_cons subjectivity ;;
    *) these snips_intents intent_match ;;
  esac
}
unrelated() {
  case $1 in
    SciTail | snli_sample | CB) these SST-2 CoLA ;;
    *) these CoLA MNLI query_wellformedness ;;
  esac
}
stand_ins() {
  [ "$(echo "$mixture" | wc -w)" -eq 8 ] && [ "$mixture" = "$glue" ] || say \
    "stand-in: the tasks of $data ($mixture) for the eight of GLUE"
  [ -n "$init" ] || say \
    "stand-in: an encoder from scratch for the published one; --init FILE takes one"
}
unseen_stand_ins() {
  [ "$nli" = SciTail ] || say "stand-in: ${nli:-nothing} for SciTail, the unseen task of inference"
  [ "$sentiment" = IMDB ] || say \
    "stand-in: ${sentiment:-nothing} for IMDB, the unseen task of sentiment"
}

# ---- the budget, as steps of a first stage ----

# COMMAND ARGUMENTS...: runs it with the options that go to every train behind the others. Rows \
  held out of train choose the epoch, and no
# row of train stands in another task's dev set.
base() {
  set -- "$@" --data "$data" --hold-out 0.1 --hold-most 1000 --dedup
  [ -n "$init" ] || set -- "$@" --from-scratch
  [ -z "$init" ] || case " $* " in *' --from '*) ;; *) set -- "$@" --init "$init" --vocab "$vocab" \
    ;; esac
  [ -z "$threads" ] || set -- "$@" --threads "$threads"
  "$@"
}

calibrate() { # UNITS OPTIONS...: five steps, then the steps that the budget buys, kept for the \
  runs to come
  units=$1
  shift
  binary=$(program train) || exit 1
  base "$binary" --systems tag --steps 5 --resamples 0 --json "$dir/calibration.json" "$@" > \
    /dev/null 2> "$dir/calibration.log" ||
    { cat "$dir/calibration.log" >&2; die "a first try of train failed"; }
  awk -v budget="$budget" -v units="$units" '
    match($0, /"tokens": [0-9.]+/) { step = substr($0, RSTART + 10, RLENGTH - 10) / 5 }
    match($0, /"tokens_per_second": [0-9.]+/) { speed = substr($0, RSTART + 21, RLENGTH - 21); \
      exit }
    END { n = budget + 0
      if (budget ~ /Mtokens$/) n = n * 1e6 / step
      else if (budget ~ /tokens$/) n = n / step
      else n = n * (budget ~ /h$/ ? 3600 : 60) * speed * 0.75 / (units * step) # a quarter for \
        evaluation
      printf "%d\n", n < 1 ? 1 : n \
        }' "$dir/calibration.json" > "$dir/steps.new" && mv "$dir/steps.new" "$dir/steps"
}

# UNITS OPTIONS...: sets steps; units is how many first stages the whole experiment is worth
budgeted() {
  case $budget in
    '') if [ -n "$init" ]; then steps=1500; else steps=300; fi; return ;;
    *tokens | *m | *min | *h) ;;
    *) steps=${budget%steps}; steps=${steps%.*}; return ;;
  esac
  if [ ! -s "$dir/steps" ] || [ "$(cat "$dir/budget" 2> /dev/null)" != "$budget" ]; then
    if [ -n "$dry" ]; then steps="<$budget>"; return; fi
    calibrate "$@"
    echo "$budget" > "$dir/budget"
  fi
  steps=$(cat "$dir/steps")
  say "$budget: first stages of $steps steps"
}

# COMMAND TASKS ARGUMENTS...: runs it with the length of both stages: the second, unless the \
  options behind -- say otherwise, is about as
# long as the first, four epochs at most
long() {
  run=$1 tasks=$2
  shift 2
  e=1
  [ "${steps#<}" != "$steps" ] || e=$((steps / (4 * $(echo "$tasks" | wc -w))))
  [ $e -gt 0 ] || e=1
  case " $* " in *' --fine-tune '*) ;; *) set -- "$@" --fine-tune 4 ;; esac
  case " $* " in *' --fine-epoch '*) ;; *) set -- "$@" --fine-epoch $e ;; esac
  base "$run" "$@" --tasks "$(commas $tasks)" --steps "$steps"
}

# ---- the experiments; "$@" are the options behind -- ----

table1() {
  stand_ins
  budgeted $((7 * n_seeds)) --tasks "$(commas $mixture)" "$@"
  long variant "$mixture" table1 "single dense switch tag" "$@"
  show table1
}

# A first stage of each system, which unseen tasks join: pieces base-SYSTEM-SEED with a model each
bases() { # "SYSTEMS" OPTIONS...
  systems=$1
  shift
  for system in $systems; do
    for seed in $seed_list; do
      base piece "base-$system-$seed" train --systems "$system" --seeds "$seed" --tasks \
        "$(commas $seen)" --steps "$steps" --tidy \
        --save "$dir/base-$system-$seed/model.safetensors" "$@"
    done
  done
}

# Rows of an unseen task as in the paper, 235 and 2400, or what there is of them
few() {
  if [ -n "$rows" ]; then echo "$rows"; return; fi
  n=$(($(train_rows "$1") * 8 / 10))
  if [ $n -ge 2400 ]; then echo 235,2400; elif [ $n -ge 470 ]; then echo 47,235; else echo $((n / \
    10 + 4)),$((n / 2)); fi
}

# FILE LABEL: lines "LABEL TAB rows TAB value" of what train --adapt has written; LABEL GATE: the \
  gate's name takes its place
adapted() {
  [ ! -e "$1" ] || awk -v label="$2" '
    /"gate":/ { split($0, part, \
      "\""); match($0, /"rows": [0-9]+/); rows = substr($0, RSTART + 8, RLENGTH - 8)
      match($0, /"value": [-0-9.e]+/); print (label == "GATE" ? part[4] : label) "\t" rows \
        " rows\t" substr($0, RSTART + 9, RLENGTH - 9) }' "$1"
}

joins() { # SYSTEM SEED UNSEEN GATES ROWS OPTIONS...: piece join-UNSEEN-SYSTEM-SEED
  system=$1 seed=$2 unseen=$3 from=$4 some=$5
  shift 5
  [ -n "$init" ] || set -- --lr 1e-3 "$@"
  if [ "$system" = single ]; then base piece "join-$unseen-single-$seed" train --adapt "$unseen" \
    --rows "$some" --seeds "$seed" "$@"
  elif [ -n "$dry" ] || [ -e "$dir/base-$system-$seed/finished" ]; then
    base piece "join-$unseen-$system-$seed" train --from \
      "$dir/base-$system-$seed/model.safetensors" --adapt "$unseen" --rows "$some" --seeds "$seed" \
      --gate-from "$from" "$@"
  else left=$((left + 1)); fi
}

table2() {
  stand_ins
  unseen_stand_ins
  seen=$(but "$mixture" "$nli $sentiment")
  budgeted $((4 * n_seeds)) --tasks "$(commas $seen)" "$@"
  bases "dense switch tag" "$@"
  for u in $nli $sentiment; do
    best=$(for r in $(related $u); do case " $seen " in *" $r "*) echo $r; break ;; esac; done)
    for system in single dense switch tag; do
      gate=random
      [ $system != tag ] || gate=${best:-random}
      for seed in $seed_list; do joins $system $seed $u $gate "$(few $u)" "$@"; done
    done
    [ -n "$dry" ] || for system in single dense switch tag; do
      for seed in $seed_list; do adapted "$dir/join-$u-$system-$seed/result.json" $system; done
    done | sed 's/^single/Single-Task/; s/^dense/MT-Dense/; s/^switch/MT-Switch/; s/^tag/MT-TaG/' |
      table "$u, never seen, joins (MT-TaG with the gates of ${best:-random})"
  done
}

table3() {
  stand_ins
  odd=$(for t in CoLA SST-2; do case " $mixture " in *" $t "*) printf '%s ' $t ;; esac; done)
  odd=${odd% }
  [ -n "$glue" ] || odd=$(these comparative_sentences query_wellformedness)
  clean=$(but "$mixture" "$odd")
  [ -n "$odd" ] && [ -n "$clean" ] || die \
    "table3 needs tasks that are unlike the rest: CoLA and SST-2"
  budgeted $((12 * n_seeds)) --tasks "$(commas $mixture)" "$@"
  long variant "$mixture" all "dense switch tag" "$@"
  long variant "$clean" clean "dense switch tag" "$@"
  if [ "$name" = table10 ]; then
    show clean "without $odd"
    show all "with all tasks"
  fi
  [ -n "$dry" ] || { values clean | averages "without:" "$clean"; values all | averages \
    "with all:" "$clean"; } | table "Averages of $clean, trained without $odd and with all tasks"
}

table4() {
  stand_ins
  if [ -n "$init" ]; then sizes=$(echo "$init" | tr ',' ' '); else sizes="1x64 2x128 4x256"; fi
  [ -n "$init" ] || say \
    "stand-in: encoders of $sizes (layers x hidden) from scratch for MiniLM, BERT-base and BERT-large"
  inits=$init i=0
  init=${inits%%,*}
  budgeted $((3 * n_seeds * $(echo "$sizes" | wc -w))) --tasks "$(commas $mixture)" "$@"
  for size in $sizes; do
    i=$((i + 1))
    if [ -n "$inits" ]; then
      init=$size
      long variant "$mixture" "size$i" "single tag" "$@"
    else long variant "$mixture" "size$i" "single tag" --layers "${size%x*}" --hidden "${size#*x}" \
      --ffn $((4 * ${size#*x})) "$@"; fi
    [ "$name" != table11 ] || show "size$i" "$size"
  done
  i=0
  [ -n "$dry" ] || for size in $sizes; do
    i=$((i + 1))
    values "size$i" | averages "$(basename "$(dirname \
      "./$size")" | sed 's/^\.$//')${inits:-$size}:" ""
  done | table "Encoders of several sizes"
}

table5() {
  stand_ins
  everything=$(echo $names)
  has IMDB || say \
    "stand-in: none for IMDB, the sixteenth task of GLUE++; here are $(echo "$everything" | wc -w) tasks"
  budgeted $((3 * n_seeds)) --tasks "$(commas $everything)" "$@"
  long variant "$everything" table5 "single tag" "$@"
  show table5
}

table6() {
  stand_ins
  u=$nli
  [ "$u" = SciTail ] || say "stand-in: ${u:-nothing} for SciTail, the unseen task"
  [ -n "$u" ] || die "table6 needs an unseen task: SciTail, snli_sample, CB or clinc_domains"
  seen=$(but "$mixture" "$u")
  gates=$(for g in $(unrelated $u) $(related $u); do case " $seen " in *" $g "*) echo $g ;; esac; \
    done)
  budgeted $((2 * n_seeds)) --tasks "$(commas $seen)" "$@"
  bases tag "$@"
  for seed in $seed_list; do joins tag $seed $u "random,mean${gates:+,$(commas $gates)}" \
    "$(few $u)" "$@"; done
  [ -n "$dry" ] || for seed in $seed_list; do adapted "$dir/join-$u-tag-$seed/result.json" GATE; \
    done | table "$u, never seen, with the gates of"
}

table7() {
  stand_ins
  budgeted $((6 * n_seeds)) --tasks "$(commas $mixture)" "$@"
  for how in uniform natural uniform-natural; do
    long variant "$mixture" "$how" tag --sampling $how "$@"
    show "$how" "$how sampling"
  done
  [ -n "$dry" ] || for how in uniform natural uniform-natural; do values "$how" | averages $how \
    ""; done | table "Sampling of tasks"
}

table8() {
  stand_ins
  budgeted $((6 * n_seeds)) --tasks "$(commas $mixture)" "$@"
  for n in 2 4 6; do
    long variant "$mixture" "experts$n" tag --experts $n "$@"
    show experts$n "$n experts"
  done
  [ -n "$dry" ] || for n in 2 4 6; do values experts$n | averages "$n experts" ""; done | table \
    "Number of experts"
}

# Options that go to every tasklevel
level() {
  set -- "$@" --data "$data" --steps "$steps"
  [ -z "$init" ] || set -- "$@" --init "$init" --vocab "$vocab"
  [ -z "$threads" ] || set -- "$@" --threads "$threads"
  "$@"
}

poster_stand_ins() {
  say "stand-in: the tasks of $data for CrossFit and P3, an encoder for BART"
}

# FILE LABEL: lines "LABEL TAB column TAB value" of the runs of tasklevel; the column "all" is the \
  mean over the tasks that were trained
level_values() {
  [ ! -e "$1" ] || awk -v label="$2" '
    function text(key) { return match($0, "\"" key "\": \"[^\"]*") ? substr($0, RSTART + \
      length(key) + 5, RLENGTH - length(key) - 5) : "" }
    function value(key) { return match($0, "\"" key "\": [-0-9.e]+") ? substr($0, RSTART + \
      length(key) + 4, RLENGTH - length(key) - 4) : "" }
    /"system":/ {
      l = label == "GRID" ? text("system") ", " text("batching") ", " value("router_rate") \
        " times, stage " value("stage") : label == "SYSTEM" ? text("system") : label
      if (value("all") != "") print l "\tall seen\t" value("all")
      at = index($0, "\"unseen\":")
      n = at ? split(substr($0, at), part, "{") : 0
      for (i = 2; i <= n; ++i) { $0 = part[i]; if (value("rows") != "") print l "\t" value("rows") \
        " rows\t" value("value") } }' "$1"
}

section4() {
  poster_stand_ins
  budgeted $((80 * n_seeds)) --tasks "$(commas $mixture)" "$@"
  choices="softmax gumbel straight" others="lstm transformer text fisher freeze"
  for seed in $seed_list; do
    for s in $choices; do level piece "grid-$s-$seed" tasklevel --tasks "$(commas $mixture)" \
      --systems $s --grid 1,10 --two-stage --seeds "$seed" "$@"; done
    for o in $others; do
      case $o in lstm | transformer) set -- --router $o "$@" ;; text | fisher) set -- --vectors $o \
        "$@" ;; freeze) set -- --freeze "$@" ;; esac
      level piece "$o-$seed" tasklevel --tasks "$(commas $mixture)" --systems straight --seeds \
        "$seed" "$@"
      shift
      [ $o = freeze ] || shift
    done
  done
  [ -z "$dry" ] || return 0
  for s in $choices; do
    for seed in $seed_list; do level_values "$dir/grid-$s-$seed/result.json" GRID; done
  done | table "Selection, batching, router rate, stages"
  for o in grid-straight $others; do
    for seed in $seed_list; do
      if [ $o = grid-straight ]; then
        level_values "$dir/$o-$seed/result.json" GRID | sed -n \
          's/^straight, heterogeneous, 10 times, stage 1\t/MLP router, random vectors, learned\t/p'
      else level_values "$dir/$o-$seed/result.json" "instead: $o"; fi
    done
  done | table "Router and task vectors (straight, heterogeneous, 10 times)"
}

section5() {
  poster_stand_ins
  u=${nli:-$sentiment}
  [ -n "$u" ] || die \
    "section5 needs a task to leave out: SciTail, snli_sample, CB, clinc_domains, IMDB, YelpPolarity or sentence_polarity"
  seen=$(but "$mixture" "$u") shots=16,64
  [ "$(train_rows "$u")" -ge 64 ] || shots=4,16
  budgeted $((16 * n_seeds)) --tasks "$(commas $seen)" "$@"
  for s in multi random1 random2 average softmax gumbel straight; do
    for seed in $seed_list; do
      level piece "unseen-$s-$seed" tasklevel --tasks "$(commas $seen)" --systems $s --unseen "$u" \
        --shots $shots --seeds "$seed" "$@"
    done
  done
  [ -n "$dry" ] || for s in multi random1 random2 average softmax gumbel straight; do
    for seed in $seed_list; do level_values "$dir/unseen-$s-$seed/result.json" SYSTEM; done
  done | table "$u, never seen, joins"
}

section6() {
  poster_stand_ins
  seed=${seed_list%% *} m=$dir/routes-$seed/model.safetensors
  budgeted 4 --tasks "$(commas $mixture)" "$@"
  level piece "routes-$seed" tasklevel --tasks "$(commas $mixture)" --systems straight --seeds \
    "$seed" --save "$m" --csv "$dir/history.csv" "$@"
  [ -z "$dry" ] && [ -e "$dir/routes-$seed/finished" ] || return 0
  binary=$(program routes) || exit 1
  "$binary" "$m" --data "$data" --history "$dir/history.csv" --text --csv "$dir/routes.csv" --html \
    "$dir/routes.html" > "$dir/summary.table" || die "no report of the routes"
  cat "$dir/summary.table"
  say "the same with pictures: $dir/routes.html; as numbers: $dir/routes.csv, $dir/history.csv"
}

$work "$@"
[ -n "$dry" ] || [ $left -eq 0 ] || say "
$left pieces of the work are not finished: other parts, or --report"
exit 0
