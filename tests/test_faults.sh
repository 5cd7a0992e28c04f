#!/bin/sh
# Calls of the system and of the allocator that fail, and kills, in every program (shim.c). A
# program must end with status 0 and complete output, the same as without the failure, or with
# status 1, a sentence, and every older file as it was or whole and new. After a kill at any moment
# the same command with --resume ends with the same bits. A sample: MOST of each kind, at most;
# `make faults` takes all of them.
. ./lib.sh
MOST=${MOST:-4} KILLS=${KILLS:-8}
case $(uname -s) in Linux) ;; *) skip test_faults "the shim is for Linux"; finish ;; esac
if ! ${CC:-cc} -O1 -shared -fPIC -o "$tmp/shim.so" shim.c -ldl > "$tmp/log" 2>&1 ||
    ! LD_PRELOAD=$tmp/shim.so SHIM_COUNT=$tmp/counts sh -c : > "$tmp/log" 2>&1; then
  skip test_faults "shim.c needs glibc: $(head -n 1 "$tmp/log")"; finish
fi
for p in train predict tokenize convert routes tasklevel; do
  program $p || { fail test_faults_compiles; finish; }
done
cd "$tmp" || exit 1

# two tiny tasks, an older state of every file, a model, its checkpoints
mkdir data data/good data/score older
printf '[PAD]\n[UNK]\n[CLS]\n[SEP]\nfine\nbad\nfilm\na\n' > data/vocab.txt
printf '%b\n' 'name\tinput\tkind\tlabels\tmetric\trows\tmax_len' \
  'good\tsingle\tclassification\t0=no,1=yes\taccuracy\t8\t' \
  'score\tpair\tregression\t0..5\tpearson\t8\t' > data/tasks.tsv
{
  printf 'label\tsentence1\n'
  for w in fine bad film a; do printf '0\ta bad %s\n1\ta fine %s\n' $w $w; done
} | tee data/good/train.tsv > data/good/dev.tsv
{
  printf 'label\tsentence1\tsentence2\n'
  for w in fine bad film; do printf '0.5\ta film\t%s\n4\ta %s\ta film\n' $w $w; done
} | tee data/score/train.tsv > data/score/dev.tsv
printf 'a bad film\nfine\n\na film\n' > lines
data="--data ../data --max-len 12 --batch 4 --seeds 1 --heads 2 --layers 1 --hidden 8 --every 2"
small="$data --ffn 12 --experts 2 --threads 2 --resamples 5 --systems tag"
train="$small --steps 6 --checkpoint ck --save m.st --json r.json --predictions p.tsv"
tune="$small --steps 4 --hold-out 0.3 --fine-tune 1 --fine-epoch 2 --checkpoint ck --json r.json"
adapt="$small --fine-tune 1 --adapt good --rows 2,4 --json r.json"
level="$data --blocks 2 --steps 4 --systems random1,straight --router lstm --looks 2 --threads 2"
level="$level --checkpoint ck --save m.st --json r.json --csv l.csv"
if ! (cd older && ../train $train && mv m.st ../model.st && mv ck ../old.st && rm ck* &&
    ../train $train --lr 1e-2 && rm ck*) > log 2>&1; then
  fail test_faults_trains "$(tail -n 3 log)"; finish
fi

# same FILE FILE: the same but for seconds and --resume
same() {
  cmp -s "$1" "$2" && return
  for f in "$1" "$2"; do
    [ -e "$f" ] || return 1
    sed -E -e 's/"(seconds|tokens_per_second)": [0-9.e+-]+//g' -e 's/, "--resume", "ck"//' \
      -e 's/ +[0-9]+\.[0-9]$//' -e 's/^(([^\t]+\t){6})[0-9.]+/\1/' "$f" > "$f.same"
  done
  cmp -s "$1.same" "$2.same"
  s=$?
  rm -f "$1.same" "$2.same"
  return $s
}

# job NAME PROGRAM OLDER INPUT "OUTPUTS" ARGUMENTS: runs it once, and counts its calls
job() {
  job=$1 program=$2 older=$3 input=$4 outputs=$5
  shift 5
  arguments=$* resume=
  rm -rf good
  cp -r "$older" good
  began=$(date +%s%N)
  (cd good && LD_PRELOAD=$tmp/shim.so SHIM_COUNT=$tmp/counts ../$program $arguments < $input \
    > out 2> err) || fail test_faults_$job "$(tail -n 3 good/err)"
  microseconds=$((($(date +%s%N) - began) / 1000))
  for o in $outputs; do
    same "good/$o" "$older/$o" && fail test_faults_$job "$o is as before"
  done
}

# run SETTING: the job in a copy of its folder; sets status
run() {
  rm -rf run
  cp -r "$older" run
  (cd run && exec env LD_PRELOAD=$tmp/shim.so $1 ../$program $arguments < $input > out 2> err)
  status=$?
} 2> /dev/null

# whole FILE: an output is the older one, or complete
whole() {
  same "run/$1" "$older/$1" || same "run/$1" "good/$1" && return
  case $1 in
    ck*.results) [ ! -e run/$1 ] || awk -F '\t' 'NR > 1 && NF != 12 { exit 1 }' run/$1 ;;
    ck*) [ ! -e run/$1 ] || ./convert run/$1 > log 2>&1 ;;
    *.json) [ "$(head -c 1 run/$1)" = "{" ] && [ "$(tail -c 3 run/$1)" = "]}" ] ;;
    l.csv) awk -F , 'NF != 11 { exit 1 }' run/$1 ;;
    *) return 1 ;;
  esac
}

# wrong CALL: why the run is not as it should be, or nothing
wrong() {
  case $status in
    0) for o in out $outputs; do
         same "run/$o" "good/$o" || echo "status 0, but $o differs from a good run"
       done ;;
    1) [ -s run/err ] && grep -q "^$program: " run/err || echo "status 1 without a sentence" ;;
    *) echo "status $status: $(tail -n 2 run/err)" ;;
  esac
  for o in $outputs; do
    whole $o || echo "status $status: $o is neither the older one nor complete"
  done
  [ $1 = unlink ] || [ -z "$(find run -name '*.tmp*')" ] || echo "left: $(ls run)"
}

# again: the same command (with --resume where a checkpoint is there) ends as if nothing had been
again() {
  from=
  [ -z "$resume" ] || [ -z "$(find run -name 'ck*' ! -name '*.tmp*' ! -name '*.lock')" ] ||
    from="--resume ck"
  (cd run && ../$program $arguments $from < $input > out 2> err) ||
    echo "afterwards status $?: $(tail -n 2 run/err)"
  for o in $outputs; do same "run/$o" "good/$o" || echo "afterwards $o differs"; done
  [ -z "$(find run -name '*.tmp*')" ] || echo "afterwards left: $(ls run)"
}

# calls CALL MODE...: fails each of them in turn, or MOST of them; MODE +: it and all that follow
failed=0 runs=0 kills=0
calls() {
  for call in "$@"; do
    mode=${call#"${call%+}"} call=${call%+} why= i=0
    n=$(sed -n "s/^$call //p" counts)
    of=$n most=$MOST
    [ $call != rename ] || most=40 # the moment when one of two files is new
    [ "$n" -le "$most" ] || of=$most
    while [ $i -lt "$of" ] && [ -z "$why" ]; do
      at=$((1 + i * n / of)) i=$((i + 1)) runs=$((runs + 1))
      run SHIM_FAIL=$call:$at$mode
      why=$(wrong $call)
      [ -n "$why" ] || [ $status -eq 0 ] || why=$(again)
      [ -z "$why" ] || why="$call $at of $n$mode: $why"
    done
    name=test_faults_${job}_$call
    [ -z "$mode" ] || name=${name}_on
    [ "$n" -eq 0 ] || if [ -z "$why" ]; then ok $name; else fail $name "$why"; fi
  done
}
every="malloc malloc+ write write+ short read open close fsync rename stat flock unlink thread"

# stops NAME SETTING EXPECTED: the job is killed, or ends by itself in time; then it goes on
stopped() {
  run "$2"
  kills=$((kills + 1))
  why=
  [ $status -eq $3 ] || [ $status -eq 0 -a "$1" = moment ] || why="status $status, expected $3"
  for o in $outputs; do whole $o || why="$why; $o is neither the older one nor complete"; done
  why="$why$(again)"
  [ -z "$why" ] || why="$2: $why"
}

# at every call of the system, or MOST of them: kills SIGNAL STATUS
kills() {
  n=$(sed -n 's/^kill //p' counts) i=0 why=
  of=$n
  [ "$n" -le "$KILLS" ] || of=$KILLS
  while [ $i -lt "$of" ] && [ -z "$why" ]; do
    at=$((1 + i * n / of)) i=$((i + 1))
    stopped call "SHIM_FAIL=kill:$at SHIM_SIGNAL=$1" $2
  done
  if [ -z "$why" ]; then ok test_faults_${job}_signal_$1_at_any_call
  else fail test_faults_${job}_signal_$1_at_any_call "$why"; fi
}

# at random moments
moments() {
  i=0 why= state=${SEED:-1}
  while [ $i -lt "$KILLS" ] && [ -z "$why" ]; do
    i=$((i + 1)) state=$(((state * 1103515245 + 12345) % 2147483648))
    stopped moment "SHIM_AFTER=$((1 + state / 65536 * microseconds / 32768))" 137
  done
  if [ -z "$why" ]; then ok test_faults_${job}_killed_at_any_moment
  else fail test_faults_${job}_killed_at_any_moment "$why"; fi
}

all="m.st r.json p.tsv ck ck.results"
job train train older /dev/null "$all" $train
resume=1
calls $every
kills 9 137
kills 15 143
kills 2 130
moments
job predict predict older ../lines "" ../model.st good --threads 2
calls $every
kills 15 143
job score predict older ../data/score/dev.tsv "" ../model.st score --score
calls $every
job tokenize tokenize older ../lines "" ../data/vocab.txt --words
calls $every
kills 15 143
job look convert older /dev/null "" ../model.st --tensors
calls $every
job int8 convert older /dev/null "m.st" ../model.st m.st --int8
calls $every
kills 9 137
job extract convert older /dev/null "m.st" ../model.st m.st --task good \
  --rows ../data/good/train.tsv --drop-below 0.4 --score ../data/good/dev.tsv
calls $every
printf 'older\n' | tee older/a.csv > older/a.html
job routes routes older /dev/null "a.csv a.html" ../model.st --data ../data --csv a.csv \
  --html a.html --checkpoints ../old.st
calls $every
kills 9 137
job tune train older /dev/null "r.json ck.results" $tune
resume=1
calls $every
kills 9 137
moments
job adapt train older /dev/null "r.json" $adapt
calls $every
mkdir level
cp older/r.json level
for f in l.csv m-random1-1.st m-straight-1.st; do echo older > level/$f; done
job tasklevel tasklevel level /dev/null \
  "m-random1-1.st m-straight-1.st r.json l.csv ck.results ck-straight-1" $level
resume=1
calls $every
kills 9 137
kills 15 143
cp good/l.csv good/m-straight-1.st .
job history routes older /dev/null "a.csv" ../m-straight-1.st --data ../data --csv a.csv \
  --history ../l.csv --run 2
calls $every
echo "        $runs calls failed, $kills kills"
finish
