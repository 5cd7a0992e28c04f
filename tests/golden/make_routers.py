#!/usr/bin/env python3
"""Writes routers.h: the LSTM and the Transformer router of examples/tools/routers.h in double,
by PyTorch's own LSTM and TransformerEncoderLayer."""
import os

import torch
from torch import nn

import reference as ref
from emit import Header

torch.set_default_dtype(torch.float64)
HERE = os.path.dirname(os.path.abspath(__file__))
T, L, M, V, E, F = 3, 4, 3, 8, 64, 256
h = Header(os.path.join(HERE, "routers.h"), "GOLDEN_ROUTERS_H_INCLUDED", """
routers.h - the routers of examples/tools/routers.h, in double by PyTorch. Written by
make_routers.py; do not edit.

3 tasks, 4 layers, 3 blocks, vectors of 8. Weights: golden_fill(p, count, NAME, scale), NAME as
in routers.h, scale 1 for vectors and layers, 0.25 for all else, plus 1 for norm1.weight and
norm2.weight. For each kind: the scores, and for every tensor the norm of the gradient of sum of
scores times golden_fill("probe", 1), and the sum of that gradient times golden_fill(NAME,
1).""")


def tensor(name, *shape):
    w = ref.lcg_tensor(name, shape, 1.0 if name in ("vectors", "layers") else 0.25)
    return nn.Parameter(w + 1 if name in ("norm1.weight", "norm2.weight") else w)


def finish(kind, named, scores):
    (scores * ref.lcg_tensor("probe", scores.shape, 1.0)).sum().backward()
    h.comment(kind)
    h.values(f"routers_{kind}_scores", scores)
    h.numbers(f"routers_{kind}_norms", [(n, p.grad.norm()) for n, p in named])
    h.numbers(
        f"routers_{kind}_probes",
        [(n, (p.grad * ref.lcg_tensor(n, p.shape, 1.0)).sum()) for n, p in named],
    )


def common():
    return [
        ("vectors", tensor("vectors", T, V)),
        ("layers", tensor("layers", L, V)),
        ("out.weight", tensor("out.weight", M, E)),
        ("out.bias", tensor("out.bias", M)),
    ]


def inputs(named):
    w = dict(named)
    return w["vectors"][:, None, :] + w["layers"][None, :, :]


named = common()
lstm = nn.LSTM(V, E, batch_first=True)
lstm.weight_ih_l0 = tensor("lstm.input.weight", 4 * E, V)
lstm.weight_hh_l0 = tensor("lstm.hidden.weight", 4 * E, E)
lstm.bias_ih_l0 = tensor("lstm.bias", 4 * E)
nn.init.zeros_(lstm.bias_hh_l0)
named += [
    ("lstm.input.weight", lstm.weight_ih_l0),
    ("lstm.hidden.weight", lstm.weight_hh_l0),
    ("lstm.bias", lstm.bias_ih_l0),
]
y, _ = lstm(inputs(named))
finish("lstm", named, y @ named[2][1].T + named[3][1])

named = common()
block = nn.TransformerEncoderLayer(E, 4, F, dropout=0.0, activation="gelu", batch_first=True)
first = nn.Linear(V, E)
first.weight, first.bias = tensor("in.weight", E, V), tensor("in.bias", E)
block.self_attn.in_proj_weight, block.self_attn.in_proj_bias = tensor(
    "qkv.weight", 3 * E, E
), tensor("qkv.bias", 3 * E)
named += [
    ("in.weight", first.weight),
    ("in.bias", first.bias),
    ("qkv.weight", block.self_attn.in_proj_weight),
    ("qkv.bias", block.self_attn.in_proj_bias),
]
for name, module, shape in (
    ("attention", block.self_attn.out_proj, (E, E)),
    ("norm1", block.norm1, (E,)),
    ("up", block.linear1, (F, E)),
    ("down", block.linear2, (E, F)),
    ("norm2", block.norm2, (E,)),
):
    module.weight, module.bias = tensor(name + ".weight", *shape), tensor(name + ".bias", shape[0])
    named += [(name + ".weight", module.weight), (name + ".bias", module.bias)]
finish("transformer", named, block(first(inputs(named))) @ named[2][1].T + named[3][1])
h.save()
