#!/bin/sh
# Every file that examples/ has for copying: compiled by the command on its first line, as C++ too,
# and run.
. ./lib.sh
# The commands are run as they are written, in a folder with moe.h and examples/, by compilers that
# leave out the optimiser: that is most of the time, and it is tested elsewhere.
mkdir "$tmp/bin" "$tmp/project"
wrap() { # NAME COMPILER
  have "$2" && printf '#!/bin/sh\nexec %s "$@" -O0\n' "$(command -v "$2")" > "$tmp/bin/$1" &&
    chmod +x "$tmp/bin/$1"
}
wrap cc "${CC:-cc}"
wrap c++ "${CXX:-c++}"
ln -s "$PWD/../moe.h" "$PWD/../moe_cuda.h" "$PWD/../examples" "$tmp/project"
PATH=$tmp/bin:$PATH
here=$PWD
cd "$tmp/project" || exit 1

bad=
for f in examples/*.c examples/*.cpp examples/python/moe.py; do
  [ $f = examples/train.c ] && continue
  most=200
  [ $f = examples/python/moe.py ] && most=250 # of it 40 are the docstring and the structs of moe.h
  [ "$(wc -l < $f)" -le $most ] || bad="$bad $f is long;"
  head -n 1 $f | grep -q 'Copy moe.h' || bad="$bad $f: line 1 does not say what to copy;"
  grep -q "\`${f#examples/}\`" examples/README.md || bad="$bad README.md does not name $f;"
done
[ -z "$bad" ] && ok test_examples_say_what_to_copy || fail test_examples_say_what_to_copy "$bad"

# compiles NAME: with the command on line 1 of NAME.c or NAME.cpp; as C++, C is only parsed
compiles() {
  f=$(ls examples/$1.c examples/$1.cpp 2> /dev/null)
  command=$(sed -n '1s/^.*\. \(c[c+]* .*-pthread\).*$/\1/p' $f)
  if [ -n "$command" ] && eval "$command" 2> "$tmp/log"; then ok test_examples_compile_$1
  else fail test_examples_compile_$1 "$command: $(head -n 5 "$tmp/log")"; fi
  case $f in *.cpp) return ;; esac
  if ! have g++; then skip test_examples_compile_$1_as_cpp "there is no g++ here"
  elif g++ -x c++ -std=c++11 -Wall -Wextra -I. -fsyntax-only \
      $f 2> "$tmp/log"; then ok test_examples_compile_$1_as_cpp
  else fail test_examples_compile_$1_as_cpp "$(head -n 5 "$tmp/log")"; fi
}
# walkthrough and blas have tests of their own
for name in train_text ask sensors layer cuda; do compiles $name; done

prints() { # NAME PATTERN FILE
  if grep -q "$2" "$3"; then ok "$1"; else fail "$1" "$(head -n 5 "$3")"; fi
}
./train_text examples/data/vocab.txt > "$tmp/text" 2>&1
prints test_examples_train_text_learns_feelings '^a boring phone: negative 0\.[89]' "$tmp/text"
prints test_examples_train_text_learns_topics '^wine and cheese on the train: food ' "$tmp/text"
if ./train_text no_such_file 2> "$tmp/log"; then fail test_examples_train_text_says_what_is_missing
else prints test_examples_train_text_says_what_is_missing '^no_such_file: ' "$tmp/log"; fi

./ask two_tasks.safetensors topic 'soup with cheese' > "$tmp/asked"
prints test_examples_ask_answers '^food 0\.[89]' "$tmp/asked"
if ./ask two_tasks.safetensors no_such_task x 2> /dev/null ||
    ./ask no_such_file topic x 2> /dev/null; then
  fail test_examples_ask_ends_with_1
else
  ok test_examples_ask_ends_with_1
fi

./sensors > "$tmp/sensors" 2>&1
prints test_examples_sensors_learn '^fault: 1[4-6] of 16 right; speed: 0\.0' "$tmp/sensors"
./layer > "$tmp/layer" 2>&1
if awk '$1 == "step" { loss[n++] = $4 }
    $1 == "tokens" { for (i = 5; i <= 8; ++i) sum[$4] += $i }
    END {
      exit !(n == 5 && loss[n - 1] < loss[0] / 5 && sum["1:"] == 128 && sum["2:"] == 128)
    }' "$tmp/layer"
then ok test_examples_layer_learns; else fail test_examples_layer_learns "$(cat "$tmp/layer")"; fi

if [ -x "$tmp/bin/c++" ]; then
  compiles cpp
  printf 'soup with cheese\na hotel\n' | ./cpp two_tasks.safetensors topic > "$tmp/cpp"
  prints test_examples_cpp_answers '^food	0\.[89]' "$tmp/cpp"
  if [ "$(cut -f 1 "$tmp/cpp" | tr '\n' ' ')" = 'food travel ' ]; then
    ok test_examples_cpp_answers_in_order
  else
    fail test_examples_cpp_answers_in_order "$(cat "$tmp/cpp")"
  fi
  if ./cpp two_tasks.safetensors no_such_task < /dev/null 2> "$tmp/log"; then
    fail test_examples_cpp_throws
  else
    prints test_examples_cpp_throws 'no task "no_such_task"' "$tmp/log"
  fi
else skip test_examples_cpp "there is no C++ compiler here"; fi

# python/moe.py, copied as it says: with the models that were just saved
python=${MOE_PYTHON:-python3}
if ! "$python" -c 'import numpy' 2> /dev/null; then
  skip test_examples_python "$python with the package numpy is not here"; cd "$here" && finish
fi
mkdir "$tmp/copy"
cp examples/python/moe.py "$tmp/copy"
cat > "$tmp/copy/ask.py" << 'END'
import copy, math, sys, weakref
import numpy as np
from moe import Model
text, sensors = Model.load("two_tasks.safetensors"), Model.load("sensors.safetensors")
assert list(text.tasks) == ["sentiment", "topic"], text.tasks
assert list(text.tasks.values()) == [["negative", "positive"], ["food", "travel"]], text.tasks
assert sensors.tasks == {"fault": ["none", "imbalance", "bearing"], "speed": None}, sensors.tasks
(label, probability), = text.predict("topic", ["soup with cheese"])
print(label, f"{probability:.3f}")
many = text.predict("topic", ["soup with cheese", "a hotel"] * 70)
assert [label for label, _ in many] == ["food", "travel"] * 70 and many[138][1] == probability, many
one, two, other = text.embed(["soup", "soup", "a long way"])
assert len(one) == 64 and (one == two).all() and (one != other).any()
weak, strong = ([[a * math.sin(i), 0.3, 0.02] for i in range(24)] for a in (0.3, 1.0))
faults = [label for label, _ in sensors.predict_features("fault", [weak, strong])]
assert faults == ["none", "imbalance"], faults
assert 0.5 < sensors.predict_features("speed", [weak])[0] < 1.5
text.save("saved.safetensors")
def error(function, *arguments):
    try:
        function(*arguments)
    except Exception as e:
        return str(e)
assert "no_such_file" in error(Model.load, "no_such_file")
assert "takes one text" in error(text.predict, "topic", [("a", "b")])
assert "all inputs are pairs" in error(text.predict, "topic", ["a", ("a", "b")])
assert "all inputs are pairs" in error(text.predict, "topic", [()])
assert "not one text" in error(text.predict, "topic", "soup")
assert "b'soup' is bytes" in error(text.embed, [b"soup"])
assert "expected (-1, 3)" in error(sensors.predict_features, "fault", [[[1, 2]]])
assert "expected float32" in error(sensors.predict_features, "fault", [[["a", "b", "c"]]])
assert "no task no" in error(text.predict, "no", ["a"])
# training through Python: views of weights and gradients
batch = [("topic", "soup with cheese", "travel"), ("topic", "a hotel near the station", 0)]
seen, before = [], text.weights["heads.topic.bias"].copy()
def look(model):
    seen.append(abs(model.gradients["heads.topic.bias"]).sum())
losses = text.train([batch] * 20, look, lr=2e-3, dropout=0)
assert losses[-1] < losses[0] / 2 and len(seen) == 20 and seen[0] > 0, losses
assert (text.weights["heads.topic.bias"] != before).any()
label, = text.predict("topic", ["soup with cheese"])
assert label[0] == "travel", label
assert "no label soup" in error(text.train, [[("topic", "soup", "soup")]])
assert "labels is object" in error(text.train, [[("topic", "soup", None)]])
assert "labels has shape (1, 2)" in error(text.train, [[("topic", "soup", [0, 1])]])
assert "expects a class from 0 to 1" in error(text.train, [[("topic", "soup", 2)]])
assert "no field rate" in error(lambda: text.train([batch], rate=1))
assert "no task no" in error(text.train, [[("no", "soup", 1)]])
for rows in [], [("topic", "soup")], ("topic", "soup", 1):
    assert "a batch is a list of" in error(text.train, [rows]), rows
assert "steps is 0" in error(text.train, [])
text.weights["heads.topic.bias"][:] = [50, 0]
text.pack()
assert text.predict("topic", ["soup with cheese"])[0] == ("food", 1.0)
new = Model.create(dict(layers=1, hidden=8, ffn=8, heads=2, feature_dim=2, positions=4, max_len=4),
                   {"side": ["left", "right"], "far": (0.0, 2.0)})
points = [[[x / 8, y / 8]] for x in range(-8, 8) for y in range(-8, 8)]
sides = [("side", p, "right" if p[0][0] >= 0 else "left") for p in points]
assert new.train([sides] * 60, lr=1e-2)[-1] < 0.1
answers = new.predict_features("side", [[[-0.9, 0]], [[0.9, 0]]])
assert [label for label, _ in answers] == ["left", "right"], answers
assert "an input has shape (1, 1)" in error(new.train, [[("side", [[1]], 0)]])
assert "the model reads features" in error(new.embed, ["a"])
bare = Model.create(dict(layers=1, hidden=8, ffn=8, heads=2, router=0, experts=1, positions=16,
                         max_len=16), {}, vocab=open("examples/data/vocab.txt", "rb").read())
assert bare.tasks == {} and bare.embed(["soup"] * 3).shape == (3, 8)
assert "no field width" in error(Model.create, {"width": 8}, {"a": ["b", "c"]})
# views keep their model, or trainer, until the last of them is gone
kept, copies = [], copy.copy(bare)
text.train([batch], lambda model: kept.append(model.gradients["heads.topic.bias"]))
word, model = bare.weights["embeddings.word_embeddings.weight"], weakref.ref(bare._m)
del bare, copies
assert model() and np.isfinite(word).all() and (kept[0] == 0).all()
del word
assert not model()
END
if "$python" "$tmp/copy/ask.py" 2> "$tmp/log"; then fail test_examples_python_says_what_is_missing
else prints test_examples_python_says_what_is_missing 'copy it there' "$tmp/log"; fi
cp moe.h "$tmp/copy"
if CC=no_such_compiler "$python" "$tmp/copy/ask.py" 2> "$tmp/log"; then
  fail test_examples_python_wants_a_compiler
else
  prints test_examples_python_wants_a_compiler 'no_such_compiler' "$tmp/log"
fi
if printf 'int moe_abi(void) { return 199; }\n' |
    cc -shared -fPIC -x c -o "$tmp/old.so" - &&
    MOE_LIBRARY="$tmp/old.so" "$python" "$tmp/copy/ask.py" 2> "$tmp/log"; then
  fail test_examples_python_refuses_another_version
else
  prints test_examples_python_refuses_another_version 'old.so' "$tmp/log"
fi
if CC=cc "$python" "$tmp/copy/ask.py" > "$tmp/python" 2> "$tmp/log"; then
  ok test_examples_python_runs
else
  fail test_examples_python_runs "$(tail -n 3 "$tmp/log")"
fi
if cmp -s "$tmp/asked" "$tmp/python"; then ok test_examples_python_answers_as_c
else fail test_examples_python_answers_as_c "$(cat "$tmp/asked" "$tmp/python")"; fi
if cmp -s two_tasks.safetensors saved.safetensors; then ok test_examples_python_saves_the_same
else fail test_examples_python_saves_the_same; fi
cd "$here" && finish
