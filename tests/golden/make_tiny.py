#!/usr/bin/env python3
"""Writes tiny.h: a whole small model in double. Scores, losses, routes, every gradient, and 20
steps of Adam."""
import os
import random

import torch

import reference as ref
from emit import Header

torch.set_default_dtype(torch.float64)
HERE = os.path.dirname(os.path.abspath(__file__))
TASKS = [ref.Task("two", 2), ref.Task("three", 3), ref.Task("real", 0)]
SEED = 4            # chosen so that no choice of an expert is near a tie: see the asserts
STEPS = 20
h = Header(os.path.join(HERE, "tiny.h"), "GOLDEN_TINY_H_INCLUDED", """
tiny.h - a whole small model, computed in double by PyTorch (reference.py). Written by
make_tiny.py; do not edit.

2 layers, hidden 16, 2 heads, ffn 32, vocabulary 50, 12 positions, 2 segments, epsilon 1e-12,
GELU, no dropout. Three tasks in this order: "two" (2 classes), "three" (3 classes), "real"
(regression). Systems: tag (3 experts, a gate for each task, top-1, weight g*), switch (3
experts, one gate), dense (no gate, the plain feed-forward layer).

Weights: golden_fill(p, count, NAME, scale) for every tensor, NAME as in model files
(encoder.layer.0.experts.2.output.dense.weight, encoder.layer.1.gate.three.weight,
encoder.layer.0.gate.weight when shared, heads.real.bias, ...), with this scale:
  NAME ends in LayerNorm.weight   1 + fill 0.25
  NAME ends in .bias              0.25
  NAME has gate or embeddings     1
  else                            0.5

A batch: starts (S+1), ids and segments (N), task and label of each sequence. Loss: the mean over
the sequences of cross-entropy / log C and of squared errors. The second part is a run of 20
steps over 20 batches of 4 sequences, all in one list (sequences 4 i .. 4 i + 3 are batch i):
Adam (0.9, 0.999, 1e-8), lr 1e-3, warm-up 0.1 (step t of 20 uses t/2 up to 2, then (21 - t)/18),
gradients times min(1, 1 / (norm + 1e-6)). losses are those before each update, norms those
before clipping, final_norms the L2 norm of every tensor after the last update. Key biases are
left out: their gradient is zero in exact arithmetic, so Adam lets them drift at random, without
effect on a score.""")


def fill(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                p.copy_(1 + ref.lcg_tensor(name, p.shape, 0.25))
            elif name.endswith(".bias"):
                p.copy_(ref.lcg_tensor(name, p.shape, 0.25))
            else:
                p.copy_(
                    ref.lcg_tensor(
                        name, p.shape, 1.0 if "gate" in name or "embeddings" in name else 0.5
                    )
                )


def build(system, **more):
    c = ref.Config(
        TASKS,
        system,
        layers=2,
        hidden=16,
        heads=2,
        ffn=32,
        vocab=50,
        positions=12,
        experts=3,
        **more,
    )
    model = ref.Model(c)
    fill(model)
    return model


def margin(model, k=1):
    """Smallest difference between a chosen probability and the next one, over tokens and layers
    of the last pass."""
    worst = 1.0
    for layer in model.encoder["layer"]:
        p = layer.routes[1].sort(1, descending=True).values
        worst = min(worst, (p[:, :k] - p[:, 1:k + 1]).min().item())
    return worst


def sequence(rng, task, length):
    """(ids, segments, task, label); from 4 tokens on, the second part is segment 1."""
    first = length if length < 4 or rng.random() < 0.4 else rng.randint(2, length - 1)
    label = rng.randrange(TASKS[task].classes) if TASKS[task].classes else rng.randrange(0, 41) / 8
    return (
        [rng.randrange(50) for _ in range(length)],
        [0] * first + [1] * (length - first),
        task,
        label,
    )


def batch_of(rows):
    return ref.Batch(*zip(*rows))


def emit_batch(name, rows):
    b = batch_of(rows)
    h.ints(f"{name}_starts", b.starts)
    h.ints(f"{name}_ids", b.ids.tolist())
    h.ints(f"{name}_segments", b.segments.tolist())
    h.ints(f"{name}_task", b.tasks)
    h.values(f"{name}_label", torch.tensor([float(x) for x in b.labels]))


def tensors(name, named):
    """An array of values for each tensor, and a table of all of them."""
    for i, (_, t) in enumerate(named):
        h.values(f"{name}_{i}", t, 8)
    h.text(f"static const golden_tensor {name}[{len(named)}] = {{")
    for i, (key, t) in enumerate(named):
        h.text(f'  {{"{key}", {t.numel()}, {name}_{i}}},')
    h.text("};")


def one_batch(rows):
    h.comment(
        "One batch of 6 sequences. scores: those of the sequences one after another (2, 3 or 1 "
        "numbers each)."
    )
    emit_batch("tiny_batch", rows)
    for system in ("tag", "switch", "dense"):
        model = build(system)
        batch = batch_of(rows)
        scores = model.scores(batch)
        loss = model.loss(batch)
        loss.backward()
        note = ""
        if system != "dense":
            worst = margin(model)
            assert worst > 1e-3, worst
            note = f"Smallest margin of a choice {worst:.4f}. experts: (layer, token)."
        h.comment(f"{system}: scores, loss of each sequence, loss of the batch, gradients. {note}")
        h.values(f"tiny_{system}_scores", torch.cat(scores))
        h.values(f"tiny_{system}_losses", torch.stack(model.losses(batch)))
        h.values(f"tiny_{system}_loss", loss)
        if system != "dense":
            h.ints(
                f"tiny_{system}_experts",
                [i for l in model.encoder["layer"] for i in l.routes[2].reshape(-1).tolist()],
            )
        grads = [
            (n, torch.zeros_like(p) if p.grad is None else p.grad)
            for n, p in model.named_parameters()
        ]
        if system == "tag":
            h.values("tiny_tag_hidden", model.hidden(batch))
            tensors("tiny_tag_grads", grads)
        else:   # the norm of each gradient is enough
            h.numbers(
                f"tiny_{system}_grad_norms",
                [(n, g.norm()) for n, g in grads if not n.endswith("key.bias")],
            )


def curve(name, about, rows, decay=0.0, **more):
    model = build(more.pop("system"), **more)
    optimizer = ref.Adam(model.parameters(), decay=decay)
    losses, norms, worst = [], [], 1.0
    for step in range(1, STEPS + 1):
        for p in optimizer.p:
            p.grad = None
        batch = batch_of(rows[4 * (step - 1):4 * step])
        loss = model.loss(batch)
        loss.backward()
        if model.c.system != "dense":
            worst = min(worst, margin(model, model.c.top_k))
        losses.append(loss.detach())
        norms.append(ref.clip(model.parameters(), 1.0))
        optimizer.step(ref.learning_rate(step, STEPS, 1e-3, 0.1))
    assert worst > 2e-4, (name, worst)
    h.comment(
        f"{name}: {about}"
        + ("" if model.c.system == "dense" else f" Smallest margin of a choice {worst:.5f}.")
    )
    h.values(f"tiny_{name}_losses", torch.stack(losses))
    h.values(f"tiny_{name}_norms", torch.stack(norms))
    if name == "steps_tag":
        h.numbers(
            "tiny_steps_tag_final_norms",
            [
                (n, p.detach().norm())
                for n, p in model.named_parameters()
                if not n.endswith("key.bias")
            ],
        )


def main():
    rng = random.Random(SEED)
    rows = [sequence(rng, t, n) for t, n in [(0, 5), (1, 1), (2, 12), (2, 3), (0, 8), (1, 7)]]
    one_batch(rows)
    rows = [sequence(rng, rng.randrange(3), rng.randint(1, 7)) for _ in range(4 * STEPS)]
    h.comment("20 batches of 4 sequences.")
    emit_batch("tiny_steps", rows)
    curve("steps_tag", "20 steps of tag.", rows, system="tag")
    curve(
        "steps_tag_decay",
        "the same with decoupled weight decay 0.1 on every tensor: p = p (1 - lr decay) before "
        "the Adam update.",
        rows,
        system="tag",
        decay=0.1,
    )
    curve(
        "steps_tag_n",
        "the same without decay, gate scale N / k.",
        rows,
        system="tag",
        gate_scale="n",
    )
    curve(
        "steps_tag_top2",
        "top-2, not renormalised, with 0.1 balance + 0.01 z added to the loss (summed over the "
        "layers).",
        rows,
        system="tag",
        top_k=2,
        balance=0.1,
        z_loss=0.01,
    )
    curve("steps_switch", "20 steps of switch.", rows, system="switch")
    curve("steps_dense", "20 steps of dense.", rows, system="dense")
    h.save()


main()
