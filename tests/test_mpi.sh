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
finish
