#!/bin/sh
# examples/train_mpi.c with Open MPI or MPICH: the losses and, for one number of ranks, the bits
# that it promises.
. ./lib.sh
if ! have mpicc || ! have mpirun; then
  skip test_mpi "there is no mpicc and mpirun here"
  finish
fi
if mpicc -std=c99 -O1 -Wall -Wextra -I.. -o "$tmp/train_mpi" ../examples/train_mpi.c -lm -pthread \
    2> "$tmp/log"; then ok test_mpi_compiles
else
  fail test_mpi_compiles "$(head -n 5 "$tmp/log")"
  finish
fi
# Open MPI alone knows (and needs) these
options=
mpirun --version 2>&1 | grep -q 'Open MPI' && options='--oversubscribe --allow-run-as-root'
vocab=$PWD/../examples/data/vocab.txt
run() { # RANKS VOCABULARY: in $tmp, where the model goes
  (cd "$tmp" && mpirun $options -n "$1" ./train_mpi "$2" > out 2> err)
}
run 1 "$vocab" && grep '^step' "$tmp/out" > "$tmp/one"
for n in 2 3 4; do
  if run $n "$vocab" && grep '^step' "$tmp/out" | paste "$tmp/one" - | awk '
      { d = $4 - $8; if (d * d > 1e-10 * $4 * $4 || NF != 8) bad = 1 }
      END { exit bad || NR != 3 }'; then ok test_mpi_losses_of_${n}_ranks_are_those_of_one
  else fail test_mpi_losses_of_${n}_ranks_are_those_of_one "$(cat "$tmp/out" "$tmp/err")"; fi
done
run 3 "$vocab" && cp "$tmp/two_tasks.safetensors" "$tmp/before"
if run 3 "$vocab" && cmp -s "$tmp/two_tasks.safetensors" "$tmp/before"; then
  ok test_mpi_same_ranks_give_the_same_bits
else fail test_mpi_same_ranks_give_the_same_bits "$(cat "$tmp/err")"; fi
if [ "$(grep -c 'a boring phone: negative' "$tmp/out")" = 1 ]; then ok test_mpi_one_rank_answers
else fail test_mpi_one_rank_answers "$(cat "$tmp/out")"; fi
rm "$tmp/two_tasks.safetensors"
if run 2 "$tmp/none"; then fail test_mpi_a_rank_that_cannot_go_on_ends_all "it did not fail"
elif grep -q 'rank [01]: .*none: cannot be opened' "$tmp/err" &&
    [ ! -e "$tmp/two_tasks.safetensors" ]; then ok test_mpi_a_rank_that_cannot_go_on_ends_all
else fail test_mpi_a_rank_that_cannot_go_on_ends_all "$(cat "$tmp/err")"; fi

# examples/train.c: ranks share batches and evaluations; rank 0 writes and speaks
if mpicc -std=c99 -DTRAIN_MPI -O1 -Wall -Wextra -o "$tmp/train" ../examples/train.c -lm -pthread \
    2> "$tmp/log"; then ok test_mpi_train_compiles
else
  fail test_mpi_train_compiles "$(head -n 5 "$tmp/log")"
  finish
fi
small="--data $PWD/../examples/data --systems tag --from-scratch --hidden 32 --ffn 64 --layers 1"
small="$small --threads 1 --tasks snips_intents,sentence_polarity,query_wellformedness"
train() { # RANKS OPTIONS...: in $tmp
  ranks=$1; shift
  (cd "$tmp" && mpirun $options -n "$ranks" ./train $small "$@" > out 2> err)
}
for n in 1 2 3 4; do
  rm -f "$tmp/log$n.csv"
  train $n --steps 100 --log log$n.csv --save model$n || fail "$(cat "$tmp/err")"
  cut -d, -f3 "$tmp/log$n.csv" > "$tmp/losses$n"
  [ $n = 1 ] && continue
  if paste "$tmp/losses1" "$tmp/losses$n" | awk '
      NR > 1 { d = $1 - $2; if (d < 0) d = -d; if (d > 2e-4 * $1) bad = 1 }
      END { exit bad || NR != 101 }'; then ok test_mpi_100_steps_of_${n}_ranks_as_of_one
  else fail test_mpi_100_steps_of_${n}_ranks_as_of_one "$(cat "$tmp/err")"; fi
done
train 3 --shard --steps 100 --log shard.csv
if cut -d, -f3 "$tmp/shard.csv" | paste "$tmp/losses3" - | awk '
    NR > 1 { d = $1 - $2; if (d < 0) d = -d; if (d > 2e-4 * $1) bad = 1 }
    END { exit bad || NR != 101 }'; then ok test_mpi_ranks_that_divide_the_moments_train_alike
else fail test_mpi_ranks_that_divide_the_moments_train_alike "$(cat "$tmp/err")"; fi
cp "$tmp/model3" "$tmp/before"
if train 3 --steps 100 --log again.csv --save model3 && cmp -s "$tmp/model3" "$tmp/before"; then
  ok test_mpi_training_twice_gives_the_same_bits
else fail test_mpi_training_twice_gives_the_same_bits "$(cat "$tmp/err")"; fi
if [ "$(wc -l < "$tmp/again.csv")" = 101 ] && [ "$(grep -c '^small=all: mean' "$tmp/out")" = 1 ]; then
  ok test_mpi_only_rank_0_writes_and_speaks
else fail test_mpi_only_rank_0_writes_and_speaks "$(cat "$tmp/out")"; fi

# One of 3 ranks that divide the moments is killed; 2 that do not go on from the checkpoint, with
# the losses of one that never stopped.
steps="--steps 1500 --checkpoint ck --every 20"
rm -f "$tmp"/ck*
train 1 --steps 1500 --log whole.csv
(cd "$tmp" && exec mpirun $options -n 3 ./train $small $steps --shard > out 2> err) &
run=$!
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  [ -e "$tmp/ck" ] || sleep 0.3
done
for process in /proc/[0-9]*; do
  if cat "$process/cmdline" 2> /dev/null | tr "\\0" " " | grep -q "^./train $small"; then
    one=${process#/proc/}
  fi
done
kill -KILL "$one"
wait $run; status=$?
if [ $status -ne 0 ] && grep -qi 'signal[: ]*9\|killed' "$tmp/err"; then
  ok test_mpi_a_rank_that_is_killed_ends_the_run
else fail test_mpi_a_rank_that_is_killed_ends_the_run "$status: $(cat "$tmp/err")"; fi
if train 2 $steps --resume ck --log rest.csv && awk -F, '
    FNR == NR { loss[$2] = $3; next }
    FNR > 1 && FNR < 42 { d = loss[$2] - $3; n++; if (d * d > 1e-6 * $3 * $3) bad = 1 }
    END { exit bad || !n }' "$tmp/whole.csv" "$tmp/rest.csv"; then
  ok test_mpi_other_ranks_go_on_from_a_checkpoint
else fail test_mpi_other_ranks_go_on_from_a_checkpoint "$(cat "$tmp/err")"; fi
if train 3 --data nowhere; then fail test_mpi_train_says_once_what_is_wrong "it did not fail"
elif [ "$(grep -c 'nowhere/tasks.tsv' "$tmp/err")" = 1 ]; then
  ok test_mpi_train_says_once_what_is_wrong
else fail test_mpi_train_says_once_what_is_wrong "$(cat "$tmp/err")"; fi
finish
