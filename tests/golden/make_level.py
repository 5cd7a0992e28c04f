#!/usr/bin/env python3
"""Writes level.h: task-level mixture of experts [TL] in double by PyTorch, one pass of training
for each selection and router."""
import os
import random

import torch
import torch.nn.functional as F
from torch import nn

import reference as ref
from emit import Header

torch.set_default_dtype(torch.float64)
HERE = os.path.dirname(os.path.abspath(__file__))
TASKS = [ref.Task("two", 2), ref.Task("three", 3), ref.Task("real", 0)]
L, M, WIDTH, HIDDEN, TAU, TAU_OUTSIDE, SEED = 2, 3, 8, 64, 0.7, 0.3, 5
SITE = 8            # MOE__SITE_GUMBEL
MASK = (1 << 64) - 1
h = Header(os.path.join(HERE, "level.h"), "GOLDEN_LEVEL_H_INCLUDED", """
level.h - blocks as experts and the task-level router, in double by PyTorch (reference.py).
Written by make_level.py; do not edit.

Sizes and tasks of tiny.h; 3 blocks a layer, task vectors of 8. Weights: golden_fill(p, count,
NAME, scale), NAME as in model files (encoder.layer.0.blocks.2.output.dense.weight,
router.1.0.weight, tasks.vectors, ...), scales as in tiny.h but for router.*.weight and
tasks.vectors: 1. Temperature 0.7 in training and 0.3 outside; Gumbel noise as moe.h draws it
with seed 5 in step 0. For each selection: loss of every sequence in training, scores outside
training (three a sequence, zeros behind), and for every tensor the norm of its gradient and the
sum of gradient times golden_fill(NAME, 1).""")


def mix64(x):
    x = (x + 0x9e3779b97f4a7c15) & MASK
    x = ((x ^ x >> 30) * 0xbf58476d1ce4e5b9) & MASK
    x = ((x ^ x >> 27) * 0x94d049bb133111eb) & MASK
    return x ^ x >> 31


def uniform(step, sequence, layer, position):
    key = mix64(SEED)
    for part in (step, sequence, layer << 32 | SITE):
        key = mix64(key ^ part)
    return ((mix64(key ^ mix64(position)) >> 11) + 0.5) / (1 << 53)


class Level(nn.Module):
    """The dense model of reference.py, with M blocks a layer and a router from task vectors."""

    def __init__(self, selection):
        super().__init__()
        c = ref.Config(TASKS, "dense", layers=L, hidden=16, heads=2, ffn=32, vocab=50, positions=12)
        self.selection, dense = selection, ref.Model(c)
        self.embeddings, self.heads = dense.embeddings, dense.heads
        self.encoder = nn.ModuleDict(
            {
                "layer": nn.ModuleList(
                    [
                        nn.ModuleDict({"blocks": nn.ModuleList([ref.Layer(c) for _ in range(M)])})
                        for _ in range(L)
                    ]
                )
            }
        )
        self.tasks = nn.ParameterDict({"vectors": nn.Parameter(torch.zeros(len(TASKS), WIDTH))})
        self.router = nn.ModuleList(
            [nn.ModuleList([nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, M)]) for _ in range(L)]
        )

    def weights(self, z, layer, batch):
        """(S,M) of the blocks' outputs, from the scores (T,M) of the tasks."""
        z = z[torch.tensor(batch.tasks)]
        if not self.training:
            return (
                (z / TAU_OUTSIDE).softmax(1)
                if self.selection == "softmax"
                else F.one_hot(z.argmax(1), M).double()
            )
        if self.selection == "softmax":
            return (z / TAU).softmax(1)
        u = torch.tensor(
            [[uniform(0, s, layer, i) for i in range(M)] for s in range(len(batch.tasks))]
        )
        p = ((z - (-u.log()).log()) / TAU).softmax(1)
        if self.selection == "gumbel":
            return p
        return F.one_hot(p.argmax(1), M).double() + p - p.detach()

    def forward(self, batch):
        e = self.embeddings
        x = e["LayerNorm"](
            e["word_embeddings"](batch.ids)
            + e["position_embeddings"](batch.positions)
            + e["token_type_embeddings"](batch.segments)
        )
        lengths = torch.tensor(batch.starts[1:]) - torch.tensor(batch.starts[:-1])
        for l, (layer, router) in enumerate(zip(self.encoder["layer"], self.router)):
            z = router[1](F.gelu(router[0](self.tasks["vectors"])))
            w = self.weights(z, l, batch).repeat_interleave(lengths, 0)
            x = sum(w[:, i:i + 1] * b(x, batch) for i, b in enumerate(layer["blocks"]))
        return [self.heads[TASKS[t].name](x[s]) for s, t in zip(batch.starts, batch.tasks)]


def fill(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                p.copy_(1 + ref.lcg_tensor(name, p.shape, 0.25))
            elif name.endswith(".bias"):
                p.copy_(ref.lcg_tensor(name, p.shape, 0.25))
            else:
                one = "embeddings" in name or name.startswith(("router.", "tasks."))
                p.copy_(ref.lcg_tensor(name, p.shape, 1.0 if one else 0.5))


random.seed(1)
tasks = [0, 1, 2, 1, 0, 2, 2]
lengths = [5, 1, 12, 7, 3, 4, 9]
ids = [[random.randrange(50) for _ in range(n)] for n in lengths]
segments = [[int(2 * i >= n) for i in range(n)] for n in lengths]
labels = [1, 2, 0.5, 0, 0, -1.25, 2]
batch = ref.Batch(ids, segments, tasks, labels)
h.ints("level_starts", batch.starts)
h.ints("level_ids", batch.ids.tolist())
h.ints("level_segments", batch.segments.tolist())
h.ints("level_task", batch.tasks)
h.values("level_label", torch.tensor([float(x) for x in labels]))
for selection in ("softmax", "gumbel", "straight"):
    model = Level(selection)
    fill(model)
    model.eval()
    scores = [F.pad(y, (0, 3 - len(y))) for y in model(batch)]
    model.train()
    losses = torch.stack(
        [ref.sequence_loss(y, TASKS[t], l) for y, t, l in zip(model(batch), tasks, labels)]
    )
    losses.mean().backward()
    h.comment(f"selection {selection}")
    h.values(f"level_{selection}_scores", torch.stack(scores))
    h.values(f"level_{selection}_losses", losses)
    named = [
        (n, p.grad if p.grad is not None else torch.zeros_like(p))
        for n, p in model.named_parameters()
    ]
    h.numbers(f"level_{selection}_norms", [(n, g.norm()) for n, g in named])
    h.numbers(
        f"level_{selection}_probes",
        [(n, (g * ref.lcg_tensor(n, g.shape, 1.0)).sum()) for n, g in named],
    )
h.save()
