#!/bin/sh
# Calls of the system and of the allocator that fail, and kills, in every program: faults.c says
# what must hold, shim.c makes them fail. A sample: MOST of each kind, STOPS kills of a kind,
# MOMENTS random ones; `make faults` takes every call, a kill at each of them and 100 random ones.
# FAULTS="train predict": these jobs alone; CALLS="write read": these calls. FAULT_JOBS at a time.
. ./lib.sh
case $(uname -s) in Linux) ;; *) skip test_faults "the shim is for Linux"; finish ;; esac
if ! ${CC:-cc} -O1 -shared -fPIC -o "$tmp/shim.so" shim.c -ldl > "$tmp/log" 2>&1 ||
    ! LD_PRELOAD=$tmp/shim.so SHIM_COUNT=$tmp/counts sh -c : > "$tmp/log" 2>&1; then
  skip test_faults "shim.c needs glibc: $(head -n 1 "$tmp/log")"; finish
fi
${CC:-cc} -std=gnu99 -O1 -Wall -Wextra -Werror -o "$tmp/faults" faults.c > "$tmp/log" 2>&1 || {
  fail test_faults_compiles "$(head -n 5 "$tmp/log")"; finish
}
for p in train predict tokenize convert routes tasklevel; do
  program $p || { fail test_faults_compiles; finish; }
done
# one rank of MPI, as far as train_mpi.c needs it
mkdir "$tmp/mpi"
cat > "$tmp/mpi/mpi.h" << 'END'
#include <stdlib.h>
enum { MPI_COMM_WORLD, MPI_FLOAT, MPI_SUM };
#define MPI_IN_PLACE NULL
#define MPI_Init(argc, argv) ((void)(argc), (void)(argv))
#define MPI_Comm_rank(world, to) (*(to) = 0)
#define MPI_Comm_size(world, to) (*(to) = 1)
#define MPI_Allreduce(from, to, n, type, op, world) ((void)(to), (void)(n))
#define MPI_Abort(world, status) exit(status)
#define MPI_Finalize() (void)0
END
for e in train_mpi ask; do
  ${CC:-cc} -std=gnu99 -O1 -I"$tmp/mpi" -I.. -o "$tmp/$e" ../examples/$e.c -lm -pthread \
    > "$tmp/log" 2>&1 || { fail test_faults_compiles "$(head -n 5 "$tmp/log")"; finish; }
done
words=$PWD/../examples/data/vocab.txt mttag=$PWD/../examples/python/mttag.py
cd "$tmp" || exit 1

# two tiny tasks, an older state of every file, a model, its checkpoints
mkdir data data/good data/score older hf hf/hf plain level events
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
# the same tasks as they are downloaded: by a list, as CSV in UTF-16 and as JSONL
mkdir other other/good other/score
cp data/vocab.txt other
head='name\tinput\tkind\tlabels\tmetric\tlabel_column\tsentence1_column\tsentence2_column'
printf '%b\n' "$head" \
  'good\tsingle\tclassification\t0=no,1=yes\taccuracy\tverdict\tsaid\t' \
  'score\tpair\tregression\t0..5\tpearson\tq.y\tq.a\tq.b' > other/list.tsv
{
  printf '\377\376'
  { printf 'verdict,said\n'; sed '1d; s/^0/no/; s/^1/yes/; s/\t/,/' data/good/train.tsv; } |
    sed 's/./&\x00/g; s/$/\r/' | tr '\r\n' '\n\000'
} > other/good/train.csv
cp other/good/train.csv other/good/dev.csv
sed '1d; s/\(.*\)\t\(.*\)\t\(.*\)/{"q": {"y": \1, "a": "\2", "b": "\\u0061 \3"}}/' \
  data/score/train.tsv | tee other/score/train.jsonl > other/score/dev.jsonl
small="--max-len 12 --batch 4 --seeds 1 --heads 2 --layers 1 --hidden 8 --every 2"
small="$small --ffn 12 --experts 2 --threads 1 --resamples 5 --systems tag"
train="--data ../data $small --steps 6 --checkpoint ck --save m.st --json r.json"
train="$train --predictions p.tsv"
tune="--data ../data $small --steps 4 --hold-out 0.3 --fine-tune 1 --fine-epoch 2"
tune="$tune --checkpoint ck --json r.json"
adapt="--data ../data $small --fine-tune 1 --adapt good --rows 2,4 --json r.json"
watch="--data ../other --task-list ../other/list.tsv $small --steps 6 --watch"
watch="$watch --log log.csv --checkpoint ck --save m.st"
level="--data ../data --max-len 12 --batch 4 --seeds 1 --heads 2 --layers 1 --hidden 8"
level="$level --every 2 --blocks 2 --steps 4 --systems random1,straight --looks 2"
level="$level --threads 1 --checkpoint ck --save m.st --json r.json"
level="$level --csv l.csv"
if ! (cd older && ../train $train && mv m.st ../model.st && mv ck ../old.st && rm ck* &&
    ../train $train --lr 1e-2 && rm ck* && cp m.st r.json ../level &&
    cp m.st ../plain/two_tasks.safetensors) > log 2>&1; then
  fail test_faults_trains "$(tail -n 3 log)"; finish
fi
(cd plain && ../train --data ../data $small --steps 2 --systems dense --save ../dense.st) \
  > log 2>&1 || fail test_faults_trains "$(tail -n 3 log)"
printf 'older\n' | tee level/l.csv level/m-random1-1.st > level/m-straight-1.st
for f in config.json model.safetensors mttag.py tokenizer_config.json vocab.txt; do
  echo older > hf/hf/$f
done
printf 'older\n' | tee plain/a.csv plain/a.html > plain/log.csv

every="malloc malloc+ write write+ short read open close fsync rename stat flock unlink mmap"
every="$every thread"
every=${CALLS-$every}
# job NAME SETTINGS... -- PROGRAM ARGUMENTS: in the list of what runs
rm -f jobs
job() {
  case " ${FAULTS:-$1} " in *" $1 "*) ;; *) return ;; esac
  name=$1
  shift
  echo "$name" >> jobs
  {
    printf './faults %s most=%s stops=%s ' "$name" "${MOST:-8}" "${STOPS:-8}"
    for word in "$@"; do printf "'%s' " "$word"; done
    echo "> $name.log 2>&1"
  } > "$name.job"
}
# long ones first
job tasklevel older=level calls="$every" kills="9 15" resume=1 \
  out="m-random1-1.st m-straight-1.st r.json l.csv ck.results ck-straight-1" -- \
  ../tasklevel $level
job tune calls="$every" kills=9 resume=1 moments="${MOMENTS:-8}" out="r.json ck.results" -- \
  ../train $tune
job train calls="$every" kills="9 15 2" resume=1 moments="${MOMENTS:-8}" \
  out="m.st r.json p.tsv ck ck.results" -- ../train $train
job threads calls="thread open" kills=9 moments="${MOMENTS:-8}" resume=1 \
  out="m.st r.json p.tsv ck ck.results" -- ../train $train --threads 2
job watch older=plain calls="$every" kills="9 15" resume=1 moments="${MOMENTS:-8}" \
  out="m.st log.csv" -- ../train $watch
job events older=plain calls="$every" kills=9 -- ../train $watch --tensorboard events
job adapt calls="$every" out=r.json -- ../train $adapt
job routes older=plain calls="$every" kills=9 out="a.csv a.html" -- ../routes ../model.st \
  --data ../data --csv a.csv --html a.html --checkpoints ../old.st
job predict in=../lines calls="$every" kills=15 -- ../predict ../model.st good --threads 2
job piped in=../lines pipe=1 calls="$every" kills="13 15" -- ../predict ../model.st good --json
job top in=../lines calls="$every" -- ../predict ../model.st good --top 2
job scores in=../lines calls="$every" -- ../predict ../model.st good --scores --json
job embed in=../lines calls="$every" -- ../predict ../model.st good --embed mean
job score in=../data/score/dev.tsv calls="$every" -- ../predict ../model.st score --score
job report in=../data/good/dev.tsv calls="$every" -- ../predict ../model.st good --report
job tokenize in=../lines calls="$every" kills=15 -- ../tokenize ../data/vocab.txt --words
job learn in=../data/good/train.tsv calls="$every" kills=15 -- ../tokenize --learn 30
job look calls="$every" -- ../convert ../model.st --tensors
job int8 calls="$every" kills=9 out=m.st -- ../convert ../model.st m.st --int8
job extract calls="$every" out=m.st -- ../convert ../model.st m.st --task good \
  --rows ../data/good/train.tsv --drop-below 0.4 --score ../data/good/dev.tsv
job hf older=hf calls="$every" kills=9 out="hf/config.json hf/model.safetensors hf/vocab.txt" -- \
  ../convert ../dense.st --hf hf
job mttag older=hf calls="$every" kills=9 \
  out="hf/config.json hf/model.safetensors hf/vocab.txt hf/mttag.py" -- \
  ../convert ../model.st --hf hf --mttag $mttag
job array calls="$every" -- ../convert ../model.st --c-array model
job mpi older=plain calls="$every" kills=9 says="rank 0: " out=two_tasks.safetensors -- \
  ../train_mpi $words
job ask calls="$every" says="" -- ../ask ../model.st good "a fine film"
# of a routing history, which tasklevel writes
if (cp -r level history && cd history && ../tasklevel $level) \
    > log 2>&1; then
  cp history/l.csv history/m-straight-1.st .
  job history older=plain calls="$every" out=a.csv -- ../routes ../m-straight-1.st \
    --data ../data --csv a.csv --history ../l.csv --run 2
else fail test_faults_tasklevel "$(tail -n 3 log)"; fi

lane() {
  while read -r name; do
    mkdir "taken-$name" 2> /dev/null && sh "$name.job"
  done < jobs
}
i=1
while [ $i -lt "${FAULT_JOBS:-1}" ]; do
  lane &
  i=$((i + 1))
done
lane
wait
while read -r name; do
  grep -v '^[0-9]* passed, [0-9]* failed' "$name.log"
  line=$(grep '^[0-9]* passed, [0-9]* failed, [0-9]* skipped$' "$name.log" | tail -n 1)
  if [ -z "$line" ]; then fail "test_faults_$name" "it ended before its summary"; continue; fi
  passed=$((passed + ${line%% *})) line=${line#*, }
  failed=$((failed + ${line%% *}))
done < jobs
[ -z "$FAULT_COUNTS" ] || { mkdir -p "$FAULT_COUNTS"; cp ./*.counts "$FAULT_COUNTS"; }
cat ./*.log | awk '/ calls failed, / { c += $2; k += $5 }
  END { print "        " c " calls failed, " k " kills" }'
finish
