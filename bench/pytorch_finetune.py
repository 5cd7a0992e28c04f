#!/usr/bin/env python3
"""The PyTorch counterpart of examples/train.c on real data: the same systems, the same recipe, the
same metrics.

    python bench/pytorch_finetune.py --data ../shared/data/glue --init MODEL.safetensors --vocab
    VOCAB.txt \
        --tasks MRPC --systems dense --epochs 3 --lr 5e-5 --seeds 1,2,3,4,5 --json out.json

Batches are shuffled over all rows of all tasks in each epoch (natural sampling), or taken in the
order of the files.
Needs torch, numpy, scipy, safetensors, tokenizers. The model is tests/golden/reference.py.
"""

import argparse
import csv
import json
import os
import statistics
import sys
import time

import numpy
import torch

sys.path.insert(
    0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "golden")
)
import reference as ref  # noqa: E402


class Encoder:
    """Text to ids as BERT uncased does it; pairs are cut longest first, as BERT's code does it."""

    def __init__(self, vocab, cased=False):
        from tokenizers import BertWordPieceTokenizer

        self.t = BertWordPieceTokenizer(vocab, lowercase=not cased, strip_accents=not cased)
        self.cls, self.sep = self.t.token_to_id("[CLS]"), self.t.token_to_id("[SEP]")

    def __call__(self, texts, max_len):
        parts = [self.t.encode(s, add_special_tokens=False).ids for s in texts]
        room = max_len - 1 - len(parts)
        if len(parts) == 1:
            parts[0] = parts[0][:room]
        else:
            a, b = parts
            while len(a) + len(b) > room:
                (a if len(a) > len(b) else b).pop()
        ids, segments = [self.cls], [0]
        for i, p in enumerate(parts):
            ids += p + [self.sep]
            segments += [i] * (len(p) + 1)
        return ids, segments


def read_tsv(path):
    with open(path, encoding="utf-8", newline="\n") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


def read_task(folder, row, index, encode, max_len):
    """Rows (ids, segments, task, label) of train and dev."""
    texts = ["sentence1", "sentence2"] if row["input"] == "pair" else ["sentence1"]
    parts = {}
    for part in ("train", "dev"):
        rows = read_tsv(os.path.join(folder, row["name"], part + ".tsv"))
        parts[part] = [
            (*encode([r[c] for c in texts], max_len), index, float(r["label"])) for r in rows
        ]
    classes = 0 if row["kind"] == "regression" else len(row["labels"].split(","))
    return ref.Task(row["name"], classes), parts, row["metric"].split(",")


def batch_of(rows):
    return ref.Batch(
        [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows]
    )


def metric_value(name, y, label):
    """y: predicted classes or scores; 0 where the metric is undefined."""
    from scipy import stats

    y, label = numpy.asarray(y), numpy.asarray(label)
    if name == "accuracy":
        return float((y == label).mean())
    if name == "f1":
        both = float(((y == 1) & (label == 1)).sum())
        return 2 * both / max(float((y == 1).sum() + (label == 1).sum()), 1.0)
    if name == "macro_f1":
        f = [
            2 * ((y == c) & (label == c)).sum() / max((y == c).sum() + (label == c).sum(), 1)
            for c in set(label)
        ]
        return float(numpy.mean(f))
    if name in ("matthews", "pearson"):
        return float(numpy.nan_to_num(numpy.corrcoef(y, label)[0, 1]))
    if name == "spearman":
        return float(numpy.nan_to_num(stats.spearmanr(y, label)[0]))
    raise SystemExit(f"unknown metric {name}")


@torch.no_grad()
def evaluate(model, tasks, devs, metrics):
    model.eval()
    result = {}
    for i, task in enumerate(tasks):
        rows = devs[i]
        order = sorted(
            range(len(rows)), key=lambda r: len(rows[r][0])
        )  # sorted by length: little padding
        y = [None] * len(rows)
        for k in range(0, len(order), 64):
            chunk = order[k : k + 64]
            for r, s in zip(chunk, model.scores(batch_of([rows[r] for r in chunk]))):
                y[r] = int(s.argmax()) if task.classes else float(s[0])
        result[task.name] = {m: metric_value(m, y, [r[3] for r in rows]) for m in metrics[i]}
    return result


def run(args, system, seed, tasks, trains, devs, metrics):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    c = ref.Config(
        tasks=tasks,
        system=system,
        experts=args.experts,
        gate_scale=args.gate_scale,
        dropout=args.dropout,
    )
    model = ref.Model(c)
    ref.init_new(model, generator)
    ref.load_bert(model, args.init)
    decay = {"weight_decay": args.decay}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True, **decay
    )
    rows = [r for t in trains for r in t]
    total = args.epochs * -(-len(rows) // args.batch)
    step, tokens, start, history = 0, 0, time.time(), []
    for epoch in range(args.epochs):
        order = list(range(len(rows)))
        if args.order == "shuffle":
            order = torch.randperm(len(rows), generator=generator).tolist()
        model.train()
        for k in range(0, len(order), args.batch):
            step += 1
            # the loss is a mean over sequences, so their order inside a batch is free: sorted by
            # length
            batch = batch_of(
                sorted((rows[r] for r in order[k : k + args.batch]), key=lambda r: len(r[0]))
            )
            for group in optimizer.param_groups:
                group["lr"] = ref.learning_rate(step, total, args.lr, args.warmup)
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(batch)
            loss.backward()
            ref.clip(model.parameters(), args.clip)
            optimizer.step()
            tokens += batch.starts[-1]
            if args.print_losses:
                print(f"step {step} loss {loss.item():.9g}", flush=True)
        seconds = time.time() - start
        history.append(evaluate(model, tasks, devs, metrics))
        print(
            f"{system} {args.gate_scale} seed {seed} epoch {epoch + 1}/{args.epochs} loss"
            f" {loss.item():.4f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s {history[-1]}",
            flush=True,
        )
    return {
        "system": system,
        "gate_scale": args.gate_scale,
        "seed": seed,
        "steps": total,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tasks": history[-1],
        "history": history,
    }


def numbers(text):
    return [int(s) for s in text.split(",")]


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--data", required=True)
    a.add_argument("--init", required=True)
    a.add_argument("--vocab", required=True)
    a.add_argument("--tasks", default="MRPC")
    a.add_argument("--systems", default="dense")
    a.add_argument("--epochs", type=int, default=3)
    a.add_argument("--batch", type=int, default=32)
    a.add_argument("--lr", type=float, default=5e-5)
    a.add_argument("--warmup", type=float, default=0.1)
    a.add_argument("--decay", type=float, default=0.0)
    a.add_argument("--clip", type=float, default=1.0)
    a.add_argument("--dropout", type=float, default=0.1)
    a.add_argument("--max-len", type=int, default=128)
    a.add_argument("--experts", type=int, default=4)
    a.add_argument("--gate-scale", choices=["paper", "n"], default="paper")
    a.add_argument("--order", choices=["shuffle", "file"], default="shuffle")
    a.add_argument("--seeds", type=numbers, default=[1])
    a.add_argument("--threads", type=int, default=0)
    a.add_argument("--print-losses", action="store_true")
    a.add_argument("--json")
    args = a.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    encode = Encoder(args.vocab)
    table = {r["name"]: r for r in read_tsv(os.path.join(args.data, "tasks.tsv"))}
    read = [
        read_task(args.data, table[n], i, encode, args.max_len)
        for i, n in enumerate(args.tasks.split(","))
    ]
    tasks, metrics = [r[0] for r in read], [r[2] for r in read]
    trains, devs = [r[1]["train"] for r in read], [r[1]["dev"] for r in read]
    runs = []
    for seed in args.seeds:
        for system in args.systems.split(","):
            runs.append(run(args, system, seed, tasks, trains, devs, metrics))
            if args.json:
                with open(args.json, "w") as f:
                    json.dump(
                        {"options": vars(args), "torch": torch.__version__, "runs": runs},
                        f,
                        indent=1,
                    )
    for system in args.systems.split(","):
        mine = [r for r in runs if r["system"] == system]
        for task in tasks:
            for m in mine[0]["tasks"][task.name]:
                v = [100 * r["tasks"][task.name][m] for r in mine]
                sd = statistics.stdev(v) if len(v) > 1 else 0.0
                print(
                    f"{system:7} {task.name:8} {m:9} {statistics.mean(v):6.2f} +- {sd:.2f}  "
                    + " ".join(f"{x:.2f}" for x in v)
                )


if __name__ == "__main__":
    main()
