#!/bin/sh
# Training that is watched: --watch, --log, --tensorboard, --early-stop; and what a terminal of 80
# columns shows. Two tiny tasks.
. ./lib.sh
program train || { fail test_watch_compiles; finish; }
ok test_watch_compiles
python=${MOE_PYTHON:-python3}
run="--data ../examples/data --tasks snips_intents,pros_cons --layers 1 --hidden 16 --ffn 32"
run="$run --heads 2 --max-len 24 --threads 1 --resamples 0 --lr 3e-3"
train() { "$tmp/train" $run "$@" > "$tmp/out" 2> "$tmp/err"; }

# ---- the same model, the log's numbers are those of the results ----
one="--systems tag --from-scratch --epochs 3"
train $one --save "$tmp/plain.safetensors"
if train $one --save "$tmp/watched.safetensors" --json "$tmp/run.json" --watch \
    --log "$tmp/log.csv" --tensorboard "$tmp/events" &&
    cmp -s "$tmp/plain.safetensors" "$tmp/watched.safetensors"; then
  ok test_watch_changes_no_bit
else fail test_watch_changes_no_bit "$(cat "$tmp/err")"; fi
value() { # TASK: in the results
  tr '{' '\n' < "$tmp/run.json" | sed -n "s/.*\"name\": \"$1\".*\"value\": \([0-9.]*\),.*/\1/p" |
    head -n 1
}
steps=$(sed -n 's/.*"steps": \([0-9]*\),.*/\1/p' "$tmp/run.json" | head -n 1)
said=$(awk -F , -v a="$(value snips_intents)" -v b="$(value pros_cons)" '
  NR == 1 { n = NF; next }
  NF != n || $2 != NR - 1 || $3 <= 0 || $4 < 0 || $5 <= 0 || $6 <= 0 { bad = 1 }
  $9 != "" { ++epochs; x = $9 - a; y = $10 - b }
  $7 != "" && $7 > 0 { ++losses }
  END { print NR - 1, epochs, (losses > 90), (x * x + y * y < 1e-11), bad + 0 }' "$tmp/log.csv")
if [ "$said" = "$steps 3 1 1 0" ]; then ok test_watch_log_has_each_step_and_ends_as_the_results
else fail test_watch_log_has_each_step_and_ends_as_the_results "$said, $steps steps"; fi
if [ "$(grep -c '^MT-TaG seed 1 epoch [123]: loss [0-9.]*, mean [0-9.]*$' "$tmp/err")" = 3 ]; then
  ok test_watch_has_a_line_for_each_epoch
else fail test_watch_has_a_line_for_each_epoch "$(cat "$tmp/err")"; fi

# ---- TensorBoard's own reader ----
if "$python" -c 'import tensorboard' 2> "$tmp/log"; then
  if "$python" - "$tmp/events/tag-1" "$tmp/log.csv" > "$tmp/said" 2>&1 << 'end'
import csv, glob, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
rows = list(csv.DictReader(open(sys.argv[2])))
names = {"train/loss": "loss", "train/lr": "lr", "train/grad_norm": "grad_norm",
         "dev/pros_cons": "dev pros_cons", "loss/snips_intents": "loss snips_intents"}
for tag, column in names.items():
    want = [(int(r["step"]), float(r[column])) for r in rows if r[column]]
    got = [(e.step, e.value) for e in events.Scalars(tag)]
    assert [s for s, _ in want] == [s for s, _ in got], tag
    assert all(abs(a - b) <= 1e-5 * abs(a) + 1e-6 for (_, a), (_, b) in zip(want, got)), tag
end
  then ok test_watch_events_open_in_tensorboard
  else fail test_watch_events_open_in_tensorboard "$(tail -n 3 "$tmp/said")"; fi
else skip test_watch_events_open_in_tensorboard "python3 has no package tensorboard here"; fi

# ---- resumed: the log goes on ----
one="--systems tag --from-scratch"
train $one --steps 30 --checkpoint "$tmp/ck.safetensors" --every 10 --log "$tmp/half.csv"
rows=$(wc -l < "$tmp/half.csv")
printf 'MT-TaG seed 1,31,0.2' >> "$tmp/half.csv" # as a kill leaves it
rm -f "$tmp/ck.safetensors.results"
columns=$(head -n 1 "$tmp/half.csv" | tr -dc , | wc -c)
train $one --steps 30 --resume "$tmp/ck.safetensors" --log "$tmp/half.csv"
if [ "$rows" -eq 31 ] && [ "$(wc -l < "$tmp/half.csv")" -ge 31 ] &&
    awk -F , -v n="$columns" 'NF != n + 1 { exit 1 }' "$tmp/half.csv" &&
    [ "$(grep -c '^run' "$tmp/half.csv")" = 1 ]; then ok test_watch_log_goes_on_after_resume
else fail test_watch_log_goes_on_after_resume "$rows rows, then $(wc -l < "$tmp/half.csv")"; fi

# ---- early stopping ----
train $one --epochs 40 --hold-out 0.2 --early-stop 2 --watch --lr 0.05
last=$(grep -c 'epoch [0-9]*:' "$tmp/err")
best=$(sed -n 's/.*, best [0-9.]* in epoch \([0-9]*\)$/\1/p' "$tmp/err" | tail -n 1)
if [ "$last" -lt 40 ] && [ "$last" = $((best + 2)) ] && grep -q 'the weights of step' "$tmp/err"
then ok test_watch_early_stop_ends_after_epochs_that_are_no_better
else fail test_watch_early_stop_ends_after_epochs_that_are_no_better "$last, $best"; fi
if train $one --early-stop 2; then fail test_watch_early_stop_needs_rows
elif grep -q 'early-stop needs --hold-out' "$tmp/err"; then ok test_watch_early_stop_needs_rows
else fail test_watch_early_stop_needs_rows "$(cat "$tmp/err")"; fi
if train $one --log "$tmp/none/log.csv"; then fail test_watch_log_that_cannot_be_written
elif grep -q 'log.csv cannot be written: No such file' "$tmp/err"; then
  ok test_watch_log_that_cannot_be_written
else fail test_watch_log_that_cannot_be_written "$(cat "$tmp/err")"; fi

# ---- --help of every program: 80 columns, and an example whose options there are ----
for p in train predict tokenize convert routes tasklevel; do
  if ! program $p; then fail test_watch_help_of_$p "it does not compile"; continue; fi
  "$tmp/$p" --help > "$tmp/help"
  wide=$(awk 'length > 80' "$tmp/help")
  example=$(sed -n "/For example:/,/^\$/p" "$tmp/help" | grep "\./$p ")
  unknown=
  for o in $(echo "$example" | grep -o ' --[a-z0-9-]*'); do
    grep -q "^  $o " "$tmp/help" || unknown="$unknown $o"
  done
  if [ "$example" ] && [ -z "$wide$unknown" ]; then ok test_watch_help_of_$p
  else fail test_watch_help_of_$p "example: $example, wide: $wide, unknown: $unknown"; fi
done

# ---- README's main job, shortened, in a terminal of 80 x 24 ----
# terminal.py RECORD PROGRAM... records what a terminal receives. replay.py RECORD plays it to a
# screen of pyte and prints how many lines have scrolled off, how many are wider than 80 columns and
# the first of these; then every line, scrolled off or on the screen.
cat > "$tmp/terminal.py" << 'end'
import fcntl, os, pty, struct, sys, termios
pid, fd = pty.fork()
if pid == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.execv(sys.argv[2], sys.argv[2:])
with open(sys.argv[1], "wb") as record:
    while True:
        try:
            part = os.read(fd, 65536)
        except OSError:
            break
        if not part:
            break
        record.write(part)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
end
cat > "$tmp/replay.py" << 'end'
import sys, pyte
def replay(columns):
    screen = pyte.HistoryScreen(columns, 24, history=100000, ratio=1)
    pyte.ByteStream(screen).feed(open(sys.argv[1], "rb").read())
    left = ["".join(row[x].data for x in range(columns)).rstrip() for row in screen.history.top]
    shown = [row.rstrip() for row in screen.display]
    while shown and not shown[-1]:
        shown.pop()
    return left, shown
left, shown = replay(80)
wide = sum(replay(400), [])
wrapped = [line for line in wide if len(line) > 80]
print(len(left), len(wrapped), *wrapped[:1])
print("\n".join(left + shown))
end
short="--data ../examples/data --layers 1 --hidden 16 --ffn 32 --heads 2 --threads 1"
if have python3 && python3 -c 'import pty' 2> "$tmp/log"; then
  if python3 "$tmp/terminal.py" "$tmp/record" "$tmp/train" $short --steps 40 > "$tmp/said" 2>&1
  then ok test_watch_main_job_runs_in_a_terminal
  else fail test_watch_main_job_runs_in_a_terminal "$(cat "$tmp/said" "$tmp/record")"; fi
else skip test_watch_main_job_runs_in_a_terminal "there is no python3 here"; fi
if [ -s "$tmp/record" ] && "$python" -c 'import pyte' 2> "$tmp/log"; then
  "$python" "$tmp/replay.py" "$tmp/record" > "$tmp/said" 2>&1
  sed 1d "$tmp/said" > "$tmp/lines"
  read -r left wrapped first << end
$(head -n 1 "$tmp/said")
end
  if [ "$wrapped" = 0 ]; then ok test_watch_no_line_is_wider_than_80_columns
  else fail test_watch_no_line_is_wider_than_80_columns "$wrapped lines: $first"; fi
  # a line for each part of the work: nine Single-Task models, the parent, three systems
  if [ "$(grep -c '^[A-Z][^|]* step [0-9]*/[0-9]*  loss .* left$' "$tmp/lines")" = 13 ] &&
      [ "$(grep -c 'step .*step ' "$tmp/lines")" = 0 ]; then ok test_watch_progress_is_one_line
  else fail test_watch_progress_is_one_line "$(cat "$tmp/lines")"; fi
  if [ "$left" -le 80 ]; then ok test_watch_leaves_80_lines_of_scrollback
  else fail test_watch_leaves_80_lines_of_scrollback "$left lines: $(cat "$tmp/lines")"; fi
  # In each block of the first table the titles of its columns, and a row for each system with as
  # many numbers.
  awk '/^  / && !n { wait = 1 }
    /^small/ { exit }
    wait { gsub(/[|*]/, "") }
    wait && /^  / { n = NF; columns += n }
    wait && /^(Single-Task|Dense parent|MT-)/ {
      sub(/Dense parent/, "parent")
      rows++
      if (NF != n + 1) bad = 1
    }
    /^$/ { blocks++ }
    END { exit bad || columns != 12 || rows != 5 * blocks }' "$tmp/lines"
  if [ $? = 0 ]; then ok test_watch_table_is_readable
  else fail test_watch_table_is_readable "$(cat "$tmp/lines")"; fi
else skip test_watch_screen_of_80_columns "$python has no package pyte here"; fi
finish
