#!/bin/sh
# examples/train_mpi.c and train.c compiled with -DTRAIN_MPI, with Open MPI and with MPICH (of PyPI:
# beside MOE_PYTHON): the losses and, for one number of ranks, the bits that they promise.
. ./lib.sh
# Most of the time of a build goes into moe.h: train_mpi.c gets it from one object for both.
moe_h() {
  [ -e "$tmp/moe.o" ] || printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' |
    ${CC:-cc} -std=c99 -D_POSIX_C_SOURCE=200809L -O1 -g0 -I.. -x c -c -o "$tmp/moe.o" -
  sed '/^#define MOE_IMPLEMENTATION/d' ../examples/train_mpi.c > "$tmp/train_mpi.c"
}
vocab=$PWD/../examples/data/vocab.txt
small="--data $PWD/../examples/data --systems tag --from-scratch --hidden 32 --ffn 64 --layers 1"
small="$small --threads 1 --tasks snips_intents,sentence_polarity,query_wellformedness"

run() { # RANKS VOCABULARY: in $tmp, where the model goes
  (cd "$tmp" && "$bin"mpirun $options -n "$1" ./train_mpi "$2" > out 2> err)
}
train() { # RANKS OPTIONS...: in $tmp
  ranks=$1; shift
  (cd "$tmp" && "$bin"mpirun $options -n "$ranks" ./train $small "$@" > out 2> err)
}

# The library whose programs are in the folder bin (with its /; empty: found by PATH).
one_library() {
if moe_h && "$bin"mpicc -std=c99 -fsyntax-only -Wall -Wextra -I.. ../examples/train_mpi.c \
    2> "$tmp/log" && "$bin"mpicc -std=c99 -O1 -I.. -o "$tmp/train_mpi" "$tmp/train_mpi.c" \
    "$tmp/moe.o" -lm -pthread 2> "$tmp/log"; then ok test_${kind}_compiles
else
  fail test_${kind}_compiles "$(head -n 5 "$tmp/log")"
  return
fi
run 1 "$vocab" && grep '^step' "$tmp/out" > "$tmp/one"
for n in $numbers; do
  if run $n "$vocab" && grep '^step' "$tmp/out" | paste "$tmp/one" - | awk '
      { d = $4 - $8; if (d * d > 1e-10 * $4 * $4 || NF != 8) bad = 1 }
      END { exit bad || NR != 3 }'; then ok test_${kind}_losses_of_${n}_ranks_are_those_of_one
  else fail test_${kind}_losses_of_${n}_ranks_are_those_of_one "$(cat "$tmp/out" "$tmp/err")"; fi
done
run $many "$vocab" && cp "$tmp/two_tasks.safetensors" "$tmp/before"
if run $many "$vocab" && cmp -s "$tmp/two_tasks.safetensors" "$tmp/before"; then
  ok test_${kind}_same_ranks_give_the_same_bits
else fail test_${kind}_same_ranks_give_the_same_bits "$(cat "$tmp/err")"; fi
if [ "$(grep -c 'a boring phone: negative' "$tmp/out")" = 1 ]; then ok test_${kind}_one_rank_answers
else fail test_${kind}_one_rank_answers "$(cat "$tmp/out")"; fi
rm "$tmp/two_tasks.safetensors"
if run 2 "$tmp/none"; then fail test_${kind}_a_rank_that_cannot_go_on_ends_all "it did not fail"
elif grep -q 'rank [01]: .*none: cannot be opened' "$tmp/err" &&
    [ ! -e "$tmp/two_tasks.safetensors" ]; then ok test_${kind}_a_rank_that_cannot_go_on_ends_all
else fail test_${kind}_a_rank_that_cannot_go_on_ends_all "$(cat "$tmp/err")"; fi

# examples/train.c: ranks share batches and evaluations; rank 0 writes and speaks
if "$bin"mpicc -std=c99 -DTRAIN_MPI -O1 -g0 -Wall -Wextra -o "$tmp/train" ../examples/train.c -lm \
    -pthread 2> "$tmp/log"; then ok test_${kind}_train_compiles
else
  fail test_${kind}_train_compiles "$(head -n 5 "$tmp/log")"
  return
fi
for n in 1 $numbers; do
  rm -f "$tmp/log$n.csv"
  train $n --steps 100 --log log$n.csv --save model$n || fail "$(cat "$tmp/err")"
  cut -d, -f3 "$tmp/log$n.csv" > "$tmp/losses$n"
  [ $n = 1 ] && continue
  if paste "$tmp/losses1" "$tmp/losses$n" | awk '
      NR > 1 { d = $1 - $2; if (d < 0) d = -d; if (d > 2e-4 * $1) bad = 1 }
      END { exit bad || NR != 101 }'; then ok test_${kind}_100_steps_of_${n}_ranks_as_of_one
  else fail test_${kind}_100_steps_of_${n}_ranks_as_of_one "$(cat "$tmp/err")"; fi
done
train $many --shard --steps 100 --log shard.csv
if cut -d, -f3 "$tmp/shard.csv" | paste "$tmp/losses$many" - | awk '
    NR > 1 { d = $1 - $2; if (d < 0) d = -d; if (d > 2e-4 * $1) bad = 1 }
    END { exit bad || NR != 101 }'; then ok test_${kind}_ranks_that_divide_the_moments_train_alike
else fail test_${kind}_ranks_that_divide_the_moments_train_alike "$(cat "$tmp/err")"; fi
# the sums of two numbers do not depend on who adds them up, and when
if train 2 --steps 100 --overlap --log overlap.csv --save overlap &&
    cmp -s "$tmp/model2" "$tmp/overlap"; then ok test_${kind}_overlap_changes_no_bit_of_two_ranks
else fail test_${kind}_overlap_changes_no_bit_of_two_ranks "$(cat "$tmp/err")"; fi
# fewer rows than ranks
if train $many --steps 40 --batch $((many - 1)) --overlap --save overlap &&
    cp "$tmp/overlap" "$tmp/before" &&
    train $many --steps 40 --batch $((many - 1)) --overlap --save overlap &&
    cmp -s "$tmp/overlap" "$tmp/before"; then ok test_${kind}_overlap_gives_the_same_bits_twice
else fail test_${kind}_overlap_gives_the_same_bits_twice "$(cat "$tmp/err")"; fi
cp "$tmp/model$many" "$tmp/before"
if train $many --steps 100 --log again.csv --save model$many &&
    cmp -s "$tmp/model$many" "$tmp/before"; then
  ok test_${kind}_training_twice_gives_the_same_bits
else fail test_${kind}_training_twice_gives_the_same_bits "$(cat "$tmp/err")"; fi
if [ "$(wc -l < "$tmp/again.csv")" = 101 ] &&
    [ "$(grep -c '^small=all: mean' "$tmp/out")" = 1 ]; then
  ok test_${kind}_only_rank_0_writes_and_speaks
else fail test_${kind}_only_rank_0_writes_and_speaks "$(cat "$tmp/out")"; fi

# One of several ranks that divide the moments is killed; others that do not go on from the
# checkpoint, with the losses of one that never stopped.
steps="--steps 600 --checkpoint ck --every 10"
rm -f "$tmp"/ck* "$tmp/ids"
train 1 --steps 600 --log whole.csv
(cd "$tmp" && exec "$bin"mpirun $options -n $many sh -c 'echo $$ >> ids; exec ./train "$@"' train \
  $small $steps --shard > out 2> err) &
run=$!
turns=0
while [ ! -e "$tmp/ck" ] && [ $turns -lt 200 ]; do
  sleep 0.05
  turns=$((turns + 1))
done
kill -KILL "$(tail -n 1 "$tmp/ids")"
wait $run; status=$?
if [ $status -ne 0 ] && cat "$tmp/out" "$tmp/err" | grep -qi 'signal[: ]*9\|killed'; then
  ok test_${kind}_a_rank_that_is_killed_ends_the_run
else
  fail test_${kind}_a_rank_that_is_killed_ends_the_run "$status: $(cat "$tmp/out" "$tmp/err")"
fi
if train $less $steps --resume ck --log rest.csv && awk -F, '
    FNR == NR { loss[$2] = $3; next }
    FNR > 1 && FNR < 42 { d = loss[$2] - $3; n++; if (d * d > 1e-6 * $3 * $3) bad = 1 }
    END { exit bad || !n }' "$tmp/whole.csv" "$tmp/rest.csv"; then
  ok test_${kind}_other_ranks_go_on_from_a_checkpoint
else fail test_${kind}_other_ranks_go_on_from_a_checkpoint "$(cat "$tmp/err")"; fi
if train $many --data nowhere; then
  fail test_${kind}_train_says_once_what_is_wrong "it did not fail"
elif [ "$(grep -c 'nowhere/tasks.tsv' "$tmp/err")" = 1 ]; then
  ok test_${kind}_train_says_once_what_is_wrong
else fail test_${kind}_train_says_once_what_is_wrong "$(cat "$tmp/err")"; fi
}


# Open MPI alone knows (and needs) these
if have mpicc && have mpirun; then
  bin= options=
  mpirun --version 2>&1 | grep -q 'Open MPI' && options='--oversubscribe --allow-run-as-root'
  kind=mpi numbers='2 3 4' many=3 less=2
  one_library
else skip test_mpi "there is no mpicc and mpirun here"; fi
bin=$(dirname "$(command -v "${MOE_PYTHON:-python3}")")/
if [ -x "${bin}mpicc" ] && "${bin}mpirun" --version 2>&1 | grep -q HYDRA; then
  # ranks that add up in shared memory never give their processor away while they wait: with fewer
  # processors a step takes seconds. What MPICH has for several machines does
  for call in ALLREDUCE BARRIER BCAST REDUCE; do
    export MPIR_CVAR_${call}_POSIX_INTRA_ALGORITHM=mpir
  done
  options= kind=mpich numbers=2 many=2 less=1
  one_library
else skip test_mpich "there is no MPICH beside ${MOE_PYTHON:-python3} (pip install mpich)"; fi
finish
