#!/bin/sh
# experiments.sh - the experiments of the two papers, each with one command, in a size that fits a
# laptop.
#
#   examples/tools/experiments.sh --list
#   examples/tools/experiments.sh table1                   the bundled tasks, from scratch, minutes
#   examples/tools/experiments.sh table1 --data glue --init MiniLM/model.safetensors \
#     --vocab MiniLM/vocab.txt --budget 4h
#
# What is finished is kept in --out and not run again; what was killed goes on from its checkpoint:
# give the same command again. The table at the end is made of what is there. [TaG] is MT-TaG, [TL]
# the poster on task-level mixtures of experts; README.md names both.
set -u
here=$(dirname "$0") examples=$(dirname "$(dirname "$0")")

usage() {
  cat << 'END'
usage: experiments.sh NAME [options] [-- options for train or tasklevel]
       experiments.sh --list
  --budget B       length of a first stage: 2000 (steps) or 3Mtokens; or minutes or hours for the
                   whole experiment, 90min or 4h, by the speed of this machine
                   [1500 steps with --init, else 300]
  --data DIR       folder of tasks [examples/data]
  --tasks A,B,C    the tasks that are trained together [those of the paper]
  --init FILE      published encoder to start from; table4: several, FILE,FILE,... [from scratch]
  --vocab FILE     its vocabulary [vocab.txt of --data]
  --rows N,M       rows of an unseen task, two or more sizes [about 1 % and 10 % of SciTail,
                   235,2400, or what there is]
  --seeds 1,2,3    [1,2,3]
  --out DIR        where everything is kept [experiments]
  --part I/N       only every N-th piece of the work, from the I-th: for several machines or
                   processors that share --out, or whose --out is put together afterwards (with a
                   budget in steps: minutes differ between machines)
  --threads N      [all processors]
  --report         run nothing, show what is finished
  --dry-run        print the commands
MOE_BIN names a folder with train, tasklevel and routes, compiled; else they are compiled into --out
(CC, CFLAGS).
END
}

list() {
  cat << 'END'
table1     [TaG] Table 1: Single-Task, MT-Dense, MT-Switch and MT-TaG, both stages
table2     [TaG] Table 2: unseen related tasks on few rows, four systems
table3     [TaG] Table 3: with and without the tasks that are unlike the rest, averages
table4     [TaG] Table 4: Single-Task and MT-TaG with encoders of several sizes, averages
table5     [TaG] Table 5: all tasks that there are, Single-Task and MT-TaG
table6     [TaG] Table 6: an unseen task with the gates of related, unrelated and random ones
table7     [TaG] Table 7: sampling of tasks: uniform, natural, first one and then the other (A.4)
table8     [TaG] Table 8: 2, 4 and 6 experts
table10    [TaG] Table 10: table3 task by task
table11    [TaG] Table 11: table4 task by task
section4   [TL] 4: selection x batching x learning rates x stages; router and task vectors
section5   [TL] 5: a task never seen, on few rows, beside multi-task and random and average routes
section6   [TL] 6: what the routes have learned: features, blocks disabled, routes over training
END
}

die() { echo "experiments.sh: $*" >&2; exit 1; }
say() { echo "$*"; }
words() { echo "$1" | tr ',' ' '; }
commas() { echo "$*" | tr ' ' ','; }

# ---- options ----

name= budget= data=$examples/data tasks= init= vocab= rows= seeds=1,2,3 out=experiments part=1/1
threads= report= dry=
[ $# -gt 0 ] || { usage; exit 1; }
while [ $# -gt 0 ]; do
  case $1 in
    --list) list; exit 0 ;;
    --help | -h) usage; exit 0 ;;
    --report) report=1; shift; continue ;;
    --dry-run) dry=1; shift; continue ;;
    --) shift; break ;;
    --budget | --data | --tasks | --init | --vocab | --rows | --seeds | --out | --part | --threads)
      [ $# -gt 1 ] || die "$1 needs a value"
      eval "${1#--}=\$2"
      shift 2 ;;
    -*) die "unknown option $1; --help lists them" ;;
    *) [ -z "$name" ] || die "two names, $name and $1; options for train go behind --"
      name=$1
      shift ;;
  esac
done
[ -n "$name" ] && list | grep -q "^$name " ||
  die "there is no experiment \"$name\"; --list shows them all"
echo "$part" | grep -q '^[1-9][0-9]*/[1-9][0-9]*$' && [ "${part%/*}" -le "${part#*/}" ] ||
  die "--part is I/N, 1/2 say, not \"$part\""
echo "$seeds" | grep -q '^[0-9][0-9]*\(,[0-9][0-9]*\)*$' ||
  die "--seeds is a list of numbers, not \"$seeds\""
echo "${budget:-1}" | grep -Eq '^[0-9]+(\.[0-9]+)?(steps|tokens|Mtokens|m|min|h)?$' ||
  die "--budget is a number of steps, or 3Mtokens, 90min, 4h, not \"$budget\""
[ -e "$data/tasks.tsv" ] || die "there is no $data/tasks.tsv"
case $name,$init in
  table4,* | table11,*) ;;
  *,*,*) die "only table4 and table11 take several files with --init" ;;
esac
for f in $(words "$init"); do [ -e "$f" ] || die "--init: there is no $f"; done
[ -z "$init" ] || [ -n "$vocab" ] || vocab=$data/vocab.txt
seed_list=$(words "$seeds")
n_seeds=$(echo "$seed_list" | wc -w)

# ---- pieces of work ----

case $name in table10) work=table3 ;; table11) work=table4 ;; *) work=$name ;; esac
dir=$out/$work
mkdir -p "$dir" || exit 1
piece=0 left=0
[ -n "$dry" ] || : > "$dir/summary.table"

# PROGRAM: sets binary, which is compiled if need be
program() {
  binary=${MOE_BIN:-$out}/$1
  if [ -n "${MOE_BIN:-}" ]; then
    [ -x "$binary" ] || die "MOE_BIN: there is no $binary"
    return
  fi
  source=$here/$1.c
  [ -e "$source" ] || source=$examples/$1.c
  [ -x "$binary" ] &&
    [ -z "$(find "$source" "$here"/*.h "$examples/../moe.h" -newer "$binary")" ] && return
  # shellcheck disable=SC2086
  ${CC:-cc} ${CFLAGS:--O3} -o "$binary.new.$$" "$source" -lm -pthread >&2 ||
    die "$source does not compile"
  mv "$binary.new.$$" "$binary"
}

quoted() { # the command as a shell reads it again
  for a; do
    case $a in *[!A-Za-z0-9_.,:=/%+-]* | '') a="'$(echo "$a" | sed "s/'/'\\\\''/g")'" ;; esac
    printf '%s ' "$a"
  done
}

begun() { ls "$p"/state*.ckpt* > /dev/null 2>&1; }

# STEM PROGRAM OPTIONS...: one piece, in a folder of its own: the command, the state, what was
# printed, result.json; `finished` at the end. Returns 0 when it is finished, 1 when it is left to
# another part. A killed one goes on.
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
  if [ -n "$report" ] || [ $(((piece - 1) % ${part#*/} + 1)) -ne "${part%/*}" ]; then
    left=$((left + 1))
    return 1
  fi
  program "$what"
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
  rm -f "$p"/*.ckpt "$p"/*.ckpt.best "$p"/*.tmp*
  : > "$p/finished"
}

# STEM "SYSTEMS" OPTIONS...: train with both stages, a piece for each system and seed; then one
# table of all, with the systems compared
variant() {
  v=$1 systems=$2 parts=
  shift 2
  for system in $systems; do
    for seed in $seed_list; do
      piece "$v-$system-$seed" train --systems "$system" --seeds "$seed" --tidy "$@"
      parts="$parts $p/state.ckpt.results"
    done
  done
  [ -z "$dry" ] || return 0
  # shellcheck disable=SC2086
  cat $parts 2> /dev/null > "$dir/$v.ckpt.results"
  [ -s "$dir/$v.ckpt.results" ] || { say "$v: nothing is finished yet"; return 0; }
  program train
  "$binary" --systems "$(commas $systems)" --seeds "$seeds" "$@" --resume "$dir/$v.ckpt" --report \
    --json "$dir/$v.json" > "$dir/$v.table" 2> "$dir/$v.log" ||
    { cat "$dir/$v.log" >&2; die "$v: no table"; }
}

# ---- results ----

# LABEL FILE...: lines "row TAB column TAB value" of what is there. Tasks give the columns small and
# all of each tuned system; LABEL is a prefix, or stands for the names in the file: SYSTEM, TITLE,
# GATE. "TASKS" in only: of these alone.
values() {
  as=$1
  shift
  for f; do [ ! -e "$f" ] || cat "$f"; done | awk -v label="$as" -v only="${only:-}" '
    function text(key) {
      if (!match($0, "\"" key "\": \"[^\"]*")) return ""
      return substr($0, RSTART + length(key) + 5, RLENGTH - length(key) - 5)
    }
    function value(key) {
      if (!match($0, "\"" key "\": [-0-9.e]+")) return ""
      return substr($0, RSTART + length(key) + 4, RLENGTH - length(key) - 4)
    }
    function row() {
      return label == "TITLE" ? title : label == "SYSTEM" ? title : label
    }
    BEGIN {
      n = split(only, t, " ")
      for (i = 1; i <= n; ++i) wanted[t[i]] = 1
      named["single"] = "Single-Task"; named["dense"] = "MT-Dense"
      named["switch"] = "MT-Switch"; named["tag"] = "MT-TaG"
    }
    /"system":/ { system_name = text("system"); count = sum = few = few_sum = 0 }
    /"name":/ && /"n":.*"rows":/ && (!n || text("name") in wanted) {
      ++count; sum += value("value")
      if (value("rows") <= 10000) { ++few; few_sum += value("value") }
    }
    /"small":/ { # the end of the tasks of a run
      all = value("all")
      if (sub(/-tuned$/, "", system_name) && count) {
        r = (label == "" ? "" : label " ") named[system_name]
        if (few) print r "\tsmall\t" few_sum / few
        print r "\tall\t" sum / count
      }
    }
    /"title":/ { title = text("title"); print row() "\tall seen\t" all } # of tasklevel
    /"rows":.*"metric":/ { print row() "\t" value("rows") " rows\t" value("value") }
    /"gate":/ {
      print (label == "GATE" ? text("gate") : label) "\t" value("rows") " rows\t" value("value")
    }'
}

# TITLE: lines "row TAB column TAB value" as a table of 100 x mean+-deviation
table() {
  awk -F '\t' -v title="$1" '
    {
      if (!($1 in row)) { row[$1] = ++rows; name[rows] = $1 }
      if (!($2 in column)) { column[$2] = ++columns; head[columns] = $2 }
      k = row[$1] SUBSEP column[$2]; n[k]++; s[k] += $3; q[k] += $3 * $3
    }
    END {
      if (!rows) exit
      printf "\n%s\n%-44s", title, ""
      for (j = 1; j <= columns; ++j) printf " %18s", head[j]
      for (i = 1; i <= rows; ++i) {
        printf "\n%-44s", name[i]
        for (j = 1; j <= columns; ++j) {
          k = i SUBSEP j
          if (!n[k]) { printf " %18s", "-"; continue }
          m = s[k] / n[k]; v = (q[k] / n[k] - m * m) * n[k]
          cell = sprintf("%.1f", 100 * m)
          if (n[k] > 1) cell = cell sprintf("+-%.1f", 100 * sqrt(v > 0 ? v / (n[k] - 1) : 0))
          printf " %18s", cell
        }
      }
      printf "\n"
    }' | tee -a "$dir/summary.table"
}

show() { # VARIANT [TITLE]
  [ -z "$dry" ] && [ -e "$dir/$1.table" ] || return 0
  [ $# -lt 2 ] || printf '\n%s\n' "$2"
  cat "$dir/$1.table"
}

# STEM: result.json of its pieces, one for each seed
results() { for seed in $seed_list; do echo "$dir/$1-$seed/result.json"; done; }

# ---- tasks: those of the paper where --data has them, stand-ins where not ----

names=$(cut -f 1 "$data/tasks.tsv" | tr -d '\r' | sed 1d)
has() { echo "$names" | grep -qx -e "$1"; }
in_list() { case " $2 " in *" $1 "*) ;; *) return 1 ;; esac; }
these() { # NAMES...: those that there are
  found=
  for t; do ! has "$t" || found="$found $t"; done
  echo "${found# }"
}
but() { # "LIST" "NAMES": the list without them
  kept=
  for t in $1; do in_list "$t" "$2" || kept="$kept $t"; done
  echo "${kept# }"
}
train_rows() { echo $(($(wc -l < "$data/$1/train.tsv") - 1)); }

glue=$(these RTE MRPC STS-B CoLA SST-2 QNLI QQP MNLI)
if [ -n "$tasks" ]; then
  mixture=$(words "$tasks")
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
  [ "$(echo "$mixture" | wc -w)" -eq 8 ] && [ "$mixture" = "$glue" ] ||
    say "stand-in: the tasks of $data ($mixture) for the eight of GLUE"
  [ -n "$init" ] ||
    say "stand-in: an encoder from scratch for the published one; --init FILE takes one"
}
unseen_stand_in() { # TASK PAPER KIND
  [ "$1" = "$2" ] || say "stand-in: ${1:-nothing} for $2, the unseen task of $3"
}

# ---- the budget, as steps of a first stage ----

# COMMAND ARGUMENTS...: runs it with the options that go to every train behind the others. Rows held
# out of train choose the epoch, and no row of train is in another task's dev set.
base() {
  set -- "$@" --hold-out 0.1 --hold-most 1000 --dedup
  [ -n "$init" ] || set -- "$@" --from-scratch
  common "$@"
}
common() {
  set -- "$@" --data "$data"
  in_list --from "$*" || [ -z "$init" ] || set -- "$@" --init "$init" --vocab "$vocab"
  [ -z "$threads" ] || set -- "$@" --threads "$threads"
  "$@"
}

calibrate() { # UNITS OPTIONS...: five steps, then the steps that the budget buys, kept for later
  units=$1
  shift
  program train
  base "$binary" --systems tag --steps 5 --resamples 0 --json "$dir/calibration.json" "$@" \
    > /dev/null 2> "$dir/calibration.log" ||
    { cat "$dir/calibration.log" >&2; die "a first try of train failed"; }
  awk -v budget="$budget" -v units="$units" '
    match($0, /"tokens": [0-9.]+/) { step = substr($0, RSTART + 10, RLENGTH - 10) / 5 }
    match($0, /_per_second": [0-9.]+/) { speed = substr($0, RSTART + 14, RLENGTH - 14); exit }
    END {
      n = budget + 0
      if (budget ~ /Mtokens$/) n = n * 1e6 / step
      else if (budget ~ /tokens$/) n = n / step
      else n = n * (budget ~ /h$/ ? 3600 : 60) * speed * 0.75 / (units * step) # rest: evaluation
      printf "%d\n", n < 1 ? 1 : n
    }' "$dir/calibration.json" > "$dir/steps.new" && mv "$dir/steps.new" "$dir/steps"
}

# UNITS "TASKS" OPTIONS...: sets steps; units is how many first stages the whole experiment is worth
budgeted() {
  units=$(($1 * n_seeds)) of=$(commas $2)
  shift 2
  case $budget in
    '') if [ -n "$init" ]; then steps=1500; else steps=300; fi; return ;;
    *tokens | *m | *min | *h) ;;
    *) steps=${budget%steps}; steps=${steps%.*}; return ;;
  esac
  if [ ! -s "$dir/steps" ] || [ "$(cat "$dir/budget" 2> /dev/null)" != "$budget" ]; then
    if [ -n "$dry" ]; then steps="<$budget>"; return; fi
    calibrate "$units" --tasks "$of" "$@"
    echo "$budget" > "$dir/budget"
  fi
  steps=$(cat "$dir/steps")
  say "$budget: first stages of $steps steps"
}

# COMMAND TASKS ARGUMENTS...: runs it with the length of both stages: the second, unless the options
# behind -- say otherwise, is about as long as the first, four epochs at most
long() {
  run=$1 of=$2 e=1
  shift 2
  [ "${steps#<}" != "$steps" ] || e=$((steps / (4 * $(echo "$of" | wc -w))))
  [ $e -gt 0 ] || e=1
  in_list --fine-tune "$*" || set -- "$@" --fine-tune 4
  in_list --fine-epoch "$*" || set -- "$@" --fine-epoch $e
  base "$run" "$@" --tasks "$(commas $of)" --steps "$steps"
}

# ---- the experiments; "$@" are the options behind -- ----

# One variant with a table of its own
single_table() { # UNITS "TASKS" "SYSTEMS" OPTIONS...
  units=$1 all=$2 systems=$3
  shift 3
  budgeted "$units" "$all" "$@"
  long variant "$all" "$name" "$systems" "$@"
  show "$name"
}

table1() {
  stand_ins
  single_table 7 "$mixture" "single dense switch tag" "$@"
}

# A first stage of each system, which unseen tasks join: pieces base-SYSTEM-SEED with a model each
bases() { # "SYSTEMS" OPTIONS...
  systems=$1
  shift
  for system in $systems; do
    for seed in $seed_list; do
      base piece "base-$system-$seed" train --systems "$system" --seeds "$seed" \
        --tasks "$(commas $seen)" --steps "$steps" --tidy \
        --save "$dir/base-$system-$seed/model.safetensors" "$@"
    done
  done
}

# Rows of an unseen task as in the paper, 235 and 2400, or what there is of them
few() {
  n=$(($(train_rows "$1") * 8 / 10))
  if [ -n "$rows" ]; then echo "$rows"
  elif [ $n -ge 2400 ]; then echo 235,2400
  elif [ $n -ge 470 ]; then echo 47,235
  else echo $((n / 10 + 4)),$((n / 2)); fi
}

joins() { # SYSTEM UNSEEN GATES OPTIONS...: pieces join-UNSEEN-SYSTEM-SEED
  system=$1 unseen=$2 gates=$3
  shift 3
  set -- --adapt "$unseen" --rows "$(few "$unseen")" "$@"
  [ -n "$init" ] || set -- --lr 1e-3 "$@"
  for seed in $seed_list; do
    stem=join-$unseen-$system-$seed first=$dir/base-$system-$seed
    if [ "$system" = single ]; then base piece "$stem" train "$@" --seeds "$seed"
    elif [ -n "$dry" ] || [ -e "$first/finished" ]; then
      base piece "$stem" train --from "$first/model.safetensors" "$@" --seeds "$seed" \
        --gate-from "$gates"
    else left=$((left + 1)); fi
  done
}

table2() {
  stand_ins
  unseen_stand_in "$nli" SciTail inference
  unseen_stand_in "$sentiment" IMDB sentiment
  seen=$(but "$mixture" "$nli $sentiment")
  budgeted 4 "$seen" "$@"
  bases "dense switch tag" "$@"
  for u in $nli $sentiment; do
    best=random
    for t in $(related "$u"); do
      if in_list "$t" "$seen" && [ $best = random ]; then best=$t; fi
    done
    for system in single dense switch; do joins $system "$u" random "$@"; done
    joins tag "$u" "$best" "$@"
    [ -n "$dry" ] || {
      values Single-Task $(results "join-$u-single")
      values MT-Dense $(results "join-$u-dense")
      values MT-Switch $(results "join-$u-switch")
      values MT-TaG $(results "join-$u-tag")
    } | table "$u, never seen, joins (MT-TaG with the gates of $best)"
  done
}

table3() {
  stand_ins
  odd=
  for t in CoLA SST-2; do ! in_list $t "$mixture" || odd="$odd $t"; done
  [ -n "$glue" ] || odd=$(these comparative_sentences query_wellformedness)
  odd=${odd# }
  clean=$(but "$mixture" "$odd")
  [ -n "$odd" ] && [ -n "$clean" ] ||
    die "table3 needs tasks that are unlike the rest: CoLA and SST-2"
  budgeted 12 "$mixture" "$@"
  long variant "$mixture" all "dense switch tag" "$@"
  long variant "$clean" clean "dense switch tag" "$@"
  if [ "$name" = table10 ]; then
    show clean "without $odd"
    show all "with all tasks"
  fi
  only=$clean
  [ -n "$dry" ] || {
    values without: "$dir/clean.json"
    values "with all:" "$dir/all.json"
  } | table "Averages of $clean, trained without $odd and with all tasks"
}

table4() {
  stand_ins
  sizes=$(words "${init:-1x64,2x128,4x256}") inits=$init i=0
  [ -n "$init" ] || say "stand-in: encoders of $sizes (layers x hidden) from scratch for" \
    "MiniLM, BERT-base and BERT-large"
  init=${inits%%,*}
  budgeted $((3 * $(echo "$sizes" | wc -w))) "$mixture" "$@"
  for size in $sizes; do
    i=$((i + 1)) label=$size
    if [ -n "$inits" ]; then
      init=$size label=$(basename "$(dirname "./$size")")
      long variant "$mixture" "size$i" "single tag" "$@"
    else
      long variant "$mixture" "size$i" "single tag" --layers "${size%x*}" \
        --hidden "${size#*x}" --ffn $((4 * ${size#*x})) "$@"
    fi
    [ "$name" != table11 ] || show "size$i" "$size"
    [ -n "$dry" ] || values "$label:" "$dir/size$i.json" >> "$dir/sizes.new"
  done
  [ -n "$dry" ] || { table "Encoders of several sizes" < "$dir/sizes.new" && rm "$dir/sizes.new"; }
}

table5() {
  stand_ins
  everything=$(echo $names)
  has IMDB || say "stand-in: none for IMDB, the sixteenth task of GLUE++; here are" \
    "$(echo "$everything" | wc -w) tasks"
  single_table 3 "$everything" "single tag" "$@"
}

table6() {
  stand_ins
  unseen_stand_in "$nli" SciTail inference
  [ -n "$nli" ] || die "table6 needs an unseen task: SciTail, snli_sample, CB or clinc_domains"
  seen=$(but "$mixture" "$nli") gates=random,mean
  for t in $(unrelated "$nli") $(related "$nli"); do ! in_list "$t" "$seen" || gates=$gates,$t; done
  budgeted 2 "$seen" "$@"
  bases tag "$@"
  joins tag "$nli" "$gates" "$@"
  [ -n "$dry" ] || values GATE $(results "join-$nli-tag") |
    table "$nli, never seen, with the gates of"
}

# MT-TaG in several variants: OPTION "VALUES" LABEL OPTIONS...; % in LABEL is the value
variants_of() {
  option=$1 list=$2 label=$3
  shift 3
  stand_ins
  budgeted 6 "$mixture" "$@"
  for value in $list; do
    long variant "$mixture" "${option#--}-$value" tag "$option" "$value" "$@"
    show "${option#--}-$value" "$(echo "$label" | sed "s/%/$value/")"
  done
  [ -n "$dry" ] || for value in $list; do
    values "$(echo "$label" | sed "s/%/$value/")" "$dir/${option#--}-$value.json"
  done | table "MT-TaG with other ${option#--}"
}
table7() { variants_of --sampling "uniform natural uniform-natural" % "$@"; }
table8() { variants_of --experts "2 4 6" "% experts" "$@"; }

poster_stand_ins() {
  say "stand-in: the tasks of $data for CrossFit and P3, an encoder for BART"
}

level() { # STEM "TASKS" OPTIONS...: a piece of tasklevel for each seed
  stem=$1 of=$(commas $2)
  shift 2
  for seed in $seed_list; do
    common piece "$stem-$seed" tasklevel --tasks "$of" --seeds "$seed" --steps "$steps" "$@"
  done
}

section4() {
  poster_stand_ins
  budgeted 80 "$mixture" "$@"
  for s in softmax gumbel straight; do
    level grid-$s "$mixture" --systems $s --grid 1,10 --two-stage "$@"
  done
  set -- --systems straight "$@"
  level lstm "$mixture" --router lstm "$@"
  level transformer "$mixture" --router transformer "$@"
  level text "$mixture" --vectors text "$@"
  level fisher "$mixture" --vectors fisher "$@"
  level freeze "$mixture" --freeze "$@"
  [ -z "$dry" ] || return 0
  for s in softmax gumbel straight; do values TITLE $(results grid-$s); done |
    table "Selection, batching, router rate, stages"
  {
    values TITLE $(results grid-straight) |
      sed -n 's/^straight, any tasks, x10, stage 1	/MLP router, random vectors, learned	/p'
    for o in lstm transformer text fisher freeze; do values "instead: $o" $(results $o); done
  } | table "Router and task vectors (straight, any tasks, x10)"
}

section5() {
  poster_stand_ins
  u=${nli:-$sentiment}
  [ -n "$u" ] || die "section5 needs a task to leave out: SciTail, snli_sample, CB," \
    "clinc_domains, IMDB, YelpPolarity or sentence_polarity"
  seen=$(but "$mixture" "$u") shots=16,64
  [ "$(train_rows "$u")" -ge 64 ] || shots=4,16
  budgeted 16 "$seen" "$@"
  systems="multi random1 random2 average softmax gumbel straight"
  for s in $systems; do level unseen-$s "$seen" --systems $s --unseen "$u" --shots $shots "$@"; done
  [ -n "$dry" ] || for s in $systems; do values SYSTEM $(results unseen-$s); done |
    table "$u, never seen, joins"
}

section6() {
  poster_stand_ins
  seed_list=${seed_list%% *}
  p=$dir/routes-$seed_list m=$p/model.safetensors
  budgeted 4 "$mixture" "$@"
  level routes "$mixture" --systems straight --save "$m" --csv "$dir/history.csv" "$@"
  [ -z "$dry" ] && [ -e "$p/finished" ] || return 0
  program routes
  "$binary" "$m" --data "$data" --history "$dir/history.csv" --text --csv "$dir/routes.csv" \
    --html "$dir/routes.html" > "$dir/summary.table" || die "no report of the routes"
  cat "$dir/summary.table"
  say "the same with colours: $dir/routes.html; as numbers: $dir/routes.csv, $dir/history.csv"
}

$work "$@"
[ -n "$dry" ] || [ $left -eq 0 ] || say "
$left pieces of the work are not finished: other parts, or --report"
exit 0
