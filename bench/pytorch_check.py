#!/usr/bin/env python3
"""Opens a model file that moe.h saved, puts its weights into the PyTorch model, and scores a dev
set.

    python bench/pytorch_check.py MODEL.safetensors --data ../shared/data/glue --task MRPC \\
        [--predictions FILE]

Prints the metrics of the task, as `predict --score` does. With --predictions, the output of
`predict MODEL TASK < texts` for the same rows (label and probability, or the number of a
regression, behind a tab or blank):
prints the largest difference, exit status 1 if it is above 1e-4. Needs torch, safetensors,
tokenizers, scipy.
"""

import argparse
import json
import os
import sys
import tempfile

import torch
from safetensors import safe_open

from pytorch_finetune import Encoder, batch_of, metric_value, read_task, read_tsv, ref


def load(path):
    """(model, tasks as in the file, configuration, vocabulary in bytes)"""
    with safe_open(path, "pt") as f:
        meta = f.metadata()
        config, tasks = json.loads(meta["moe.config"]), json.loads(meta["moe.tasks"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    vocab = bytes(tensors.pop("tokenizer.vocab").tolist())
    c = ref.Config(
        tasks=[ref.Task(t["name"], len(t.get("labels", []))) for t in tasks],
        system={"dense": "dense", "shared": "switch", "task": "tag"}[config["router"]],
        gate_scale="n" if config["gate_scale_n"] else "paper",
        renormalise=bool(config["renormalize"]),
        **{
            k: config[k]
            for k in (
                "layers",
                "hidden",
                "heads",
                "ffn",
                "vocab",
                "positions",
                "segments",
                "eps",
                "experts",
                "top_k",
            )
        },
    )
    model = ref.Model(c).eval()
    own = model.state_dict()
    for name in own:
        if (
            name not in tensors and ".gate." in name and len(tasks) == 1
        ):  # one gate may be written as the shared one
            tensors[name] = tensors.pop(name.replace(f".gate.{tasks[0]['name']}.", ".gate."))
    extra = [k for k in tensors if k not in own and not k.startswith("adam.")]
    assert not extra, f"tensors without a place: {extra[:5]}"
    model.load_state_dict({k: tensors[k] for k in own})
    return model, tasks, config, vocab


@torch.no_grad()
def scores(model, rows):
    order = sorted(range(len(rows)), key=lambda r: len(rows[r][0]))
    y = [None] * len(rows)
    for k in range(0, len(order), 64):
        chunk = order[k : k + 64]
        for r, s in zip(chunk, model.scores(batch_of([rows[r] for r in chunk]))):
            y[r] = s
    return y


def compare(path, task, y):
    """Largest difference of a probability (or of a regression's number) between the file and
    PyTorch; and labels that differ."""
    worst, other = 0.0, 0
    with open(path, encoding="utf-8") as f:
        lines = [line.split() for line in f if line.strip()]
    assert len(lines) == len(y), f"{len(lines)} predictions, {len(y)} rows"
    for line, s in zip(lines, y):
        if "labels" in task:
            p = torch.softmax(s, 0)
            other += line[0] != task["labels"][int(p.argmax())]
            worst = max(worst, abs(float(line[1]) - p.max().item()))
        else:
            worst = max(worst, abs(float(line[0]) - s[0].item()))
    return worst, other


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("model")
    a.add_argument("--data", required=True)
    a.add_argument("--task", required=True)
    a.add_argument("--predictions")
    a.add_argument(
        "--scores", help="write the scores here, a row of numbers for each row of the dev set"
    )
    args = a.parse_args()
    model, tasks, config, vocab = load(args.model)
    index = [t["name"] for t in tasks].index(args.task)
    with tempfile.NamedTemporaryFile(suffix=".txt") as f:
        f.write(vocab)
        f.flush()
        encode = Encoder(f.name, cased=bool(config["cased"]))
    assert config["truncate"] == "longest", "only longest-first truncation is done here"
    row = {r["name"]: r for r in read_tsv(os.path.join(args.data, "tasks.tsv"))}[args.task]
    _, parts, metrics = read_task(
        args.data, row, index, encode, tasks[index]["max_len"] or config["max_len"]
    )
    rows = parts["dev"]
    y = scores(model, rows)
    labels = [r[3] for r in rows]
    predicted = [int(s.argmax()) if "labels" in tasks[index] else float(s[0]) for s in y]
    print(
        args.task,
        len(rows),
        "rows",
        *(f"{m} {metric_value(m, predicted, labels):.6f}" for m in metrics),
    )
    if args.scores:
        with open(args.scores, "w", encoding="ascii") as f:
            f.writelines("\t".join(f"{x:.9g}" for x in s.tolist()) + "\n" for s in y)
    if args.predictions:
        worst, other = compare(args.predictions, tasks[index], y)
        print(
            f"largest difference from {args.predictions}: {worst:.2e}; labels that differ: {other}"
        )
        sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
