#!/bin/sh
# examples/python/mttag.py, the model in PyTorch, and the folders of `convert --hf` in transformers,
# against moe.h through examples/python/moe.py. MOE_PYTHON: a python with numpy, torch, safetensors
# and transformers.
. ./lib.sh
python=${MOE_PYTHON:-python3}
if ! "$python" -c 'import numpy, torch, safetensors' 2> /dev/null; then
  for t in task_gates shared_gate dense task_vectors blocks fixed_blocks mean_of_blocks; do
    skip test_torch_scores_$t "$python with numpy, torch and safetensors is not here"
  done
  skip test_torch_transformers_open_folders "$python with torch is not here"
  finish
fi
cp ../moe.h ../examples/python/moe.py ../examples/python/mttag.py "$tmp"
cp ../examples/data/vocab.txt "$tmp"
cat > "$tmp/scores.py" << 'END'
import sys
import numpy as np, torch, mttag
from moe import Model
vocab = open("vocab.txt", "rb").read()
texts = ["soup with cheese", "a train to rome", "the film was boring, and long"]
kinds = dict(task_gates={}, shared_gate=dict(router=1, top_k=2, gate_scale_n=1),
             dense=dict(router=0, experts=1), task_vectors=dict(router=4),
             blocks=dict(unit=1, router=3, experts=3),
             fixed_blocks=dict(unit=1, router=3, experts=3, selection=2),
             mean_of_blocks=dict(unit=1, router=0, experts=2))
for name, of in kinds.items():
    m = Model.create(dict(layers=2, hidden=32, ffn=64, heads=4, positions=32, max_len=32, **of),
                     {"topic": ["food", "travel"], "rating": (0.0, 5.0)}, vocab=vocab)
    rows = [("topic", texts[0], "food"), ("topic", texts[1], 1)]
    rows += [("rating", x, y) for x, y in zip(texts, [4, 3, 0])]
    m.train([rows] * 20, lr=5e-3)
    m.save(name)
    ids = [m.tokens(x, "topic")[0] for x in texts]
    batch, mask = (torch.zeros(3, max(map(len, ids)), dtype=torch.long) for _ in range(2))
    for i, x in enumerate(ids):
        batch[i, :len(x)], mask[i, :len(x)] = torch.tensor(x), 1
    with torch.no_grad(): # all texts in one padded batch, both tasks
        t = mttag.load(name)
        rating = t(batch, "rating", mask=mask)[:, 0].numpy()
        topic = t(batch, torch.zeros(3, dtype=torch.long), mask=mask).softmax(-1)
        topic = topic.max(-1)[0].numpy()
        mean = [h[:len(x)].mean(0).numpy() for h, x in zip(t.encode(batch, mask=mask), ids)]
    worst = max(np.abs(rating - m.predict("rating", texts)).max(),
                np.abs(topic - [p for _, p in m.predict("topic", texts)]).max(),
                np.abs(mean - m.embed(texts)).max())
    print("ok" if worst < 1e-5 else "FAIL", name, f"largest difference {worst:.1e}")
END
if ! (cd "$tmp" && "$python" scores.py > scores 2> log); then
  fail test_torch_scores "$(tail -n 3 "$tmp/log")"
fi
while read -r verdict name rest; do
  if [ "$verdict" = ok ]; then ok "test_torch_scores_$name"; echo "        $rest"
  else fail "test_torch_scores_$name" "$rest"; fi
done < "$tmp/scores"

if ! "$python" -c 'import transformers' 2> /dev/null; then
  skip test_torch_transformers_open_folders "$python with transformers is not here"
  finish
fi
program convert || fail test_torch_convert "convert does not compile"
"$tmp/convert" "$tmp/dense" --hf "$tmp/hf_dense" > "$tmp/log" 2>&1
"$tmp/convert" "$tmp/task_gates" --hf "$tmp/hf_task_gates" --mttag "$tmp/mttag.py" \
  >> "$tmp/log" 2>&1
cat > "$tmp/folders.py" << 'END'
import torch
from transformers import AutoModel, AutoTokenizer
from moe import Model
texts = ["soup with cheese", "a train to rome"]
for name in ("dense", "task_gates"):
    m, folder = Model.load(name), "hf_" + name
    h, about = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert all("pooler" in key for key in about["missing_keys"]), about
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for x in texts:
        e = tokenizer(x, return_tensors="pt")
        assert e["input_ids"][0].tolist() == m.tokens(x, "topic")[0].tolist(), x
        with torch.no_grad():
            if name == "dense":
                far = h.eval()(**e).last_hidden_state[0].mean(0).numpy() - m.embed([x])[0]
            else:
                far = h.eval()(**e, task="rating")[0, 0].numpy() - m.predict("rating", [x])[0]
        assert abs(far).max() < 1e-5, (name, x, far)
END
if (cd "$tmp" && HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" "$python" folders.py > log 2>&1); then
  ok test_torch_transformers_open_folders
else fail test_torch_transformers_open_folders "$(tail -n 3 "$tmp/log")"; fi
if "$tmp/convert" "$tmp/dense" "$tmp/out" --hf "$tmp/hf_2" > "$tmp/log" 2>&1 ||
    ! grep -q 'without OUT' "$tmp/log"; then
  fail test_torch_convert_wants_one_way "$(cat "$tmp/log")"
else ok test_torch_convert_wants_one_way; fi
if "$tmp/convert" "$tmp/task_gates" --hf "$tmp/hf_3" --mttag "$tmp/none" > "$tmp/log" 2>&1 ||
    ! grep -q "$tmp/none" "$tmp/log"; then fail test_torch_convert_misses_mttag "$(cat "$tmp/log")"
else ok test_torch_convert_misses_mttag; fi
finish
