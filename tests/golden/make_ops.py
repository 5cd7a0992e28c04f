#!/usr/bin/env python3
"""Writes ops.h: each op forward and backward, in double, by PyTorch's own functions and
autograd."""
import math
import os

import torch
import torch.nn.functional as F

import reference as ref
from emit import Header

torch.set_default_dtype(torch.float64)
HERE = os.path.dirname(os.path.abspath(__file__))
MOE = "moe9"      # chosen so that every expert gets tokens and no choice is near a tie
h = Header(os.path.join(HERE, "ops.h"), "GOLDEN_OPS_H_INCLUDED", """
ops.h - each op forward and backward, computed in double by PyTorch. Written by make_ops.py; do
not edit.

Inputs are not stored: `in: linear.x (5,7) * 1` means golden_fill(x, 5 * 7, "linear.x", 1.0f), `1
+ ` before the scale that 1 is then added to each value. Weights are (out, in), row-major. dy is
the gradient that comes in. Outputs: golden_CASE_y, and golden_CASE_dNAME for each input
NAME.""")


class Case:
    """Collects inputs, runs autograd against dy, writes inputs as a comment and results as
    arrays."""

    def __init__(self, name, about):
        self.name, self.about, self.inputs, self.order = name, about, [], {}

    def input(self, name, shape, scale=1.0, plus=0.0, grad=True, key=None):
        key = f"{key or self.name}.{name}"
        t = ref.lcg_tensor(key, shape, scale) + plus
        self.inputs.append(
            f"{key} ({','.join(map(str, shape))}) * {'1 + ' if plus else ''}{scale:g}"
        )
        if grad:
            t.requires_grad_()
            self.order[name] = t
        return t

    def finish(self, y, dy=True, extra=None, ints=None):
        """dy: a fresh input of y's shape, or None when y is a scalar loss. extra: more values to
        store."""
        if dy:
            g = self.input("dy", tuple(y.shape), grad=False)
            total = (y * g).sum()
        else:
            total = y
        if extra and "loss" in extra:
            total = total + extra["loss"]
        total.backward()
        h.comment(f"{self.name}: {self.about} in: {'; '.join(self.inputs)}")
        h.values(f"golden_{self.name}_y", y.reshape(-1))
        for name, t in (extra or {}).items():
            h.values(f"golden_{self.name}_{name}", t.reshape(-1))
        for name, t in (ints or {}).items():
            h.ints(f"golden_{self.name}_{name}", t.reshape(-1).tolist())
        for name, t in self.order.items():
            h.values(f"golden_{self.name}_d{name}", t.grad, 8)


def linear():
    for name, (n, i, o) in {
        "linear": (5, 7, 3),
        "linear_wide": (3, 17, 21),
        "linear_one": (1, 1, 1),
    }.items():
        c = Case(name, "y = x w^T + b.")
        x, w, b = c.input("x", (n, i)), c.input("w", (o, i)), c.input("b", (o,))
        c.finish(F.linear(x, w, b))


def gelu():
    c = Case("gelu", "exact GELU, x (1 + erf(x / sqrt 2)) / 2.")
    c.finish(F.gelu(c.input("x", (64,), 8.0)))
    c = Case("gelu_small", "the same near zero.")
    c.finish(F.gelu(c.input("x", (32,), 0.5)))


def layer_norm():
    for name, (n, d) in {"norm": (4, 19), "norm_wide": (2, 48)}.items():
        c = Case(name, "LayerNorm of each row, epsilon 1e-12.")
        x, w, b = (
            c.input("x", (n, d), 2.0),
            c.input("w", (d,), 0.5, plus=1.0),
            c.input("b", (d,), 0.5),
        )
        c.finish(F.layer_norm(x, (d,), w, b, 1e-12))
    c = Case("norm_eps", "LayerNorm with epsilon 1e-5 and a small variance, where epsilon is felt.")
    x, w, b = (
        c.input("x", (3, 8), 2.0**-7),
        c.input("w", (8,), 0.5, plus=1.0),
        c.input("b", (8,), 0.5),
    )
    c.finish(F.layer_norm(x, (8,), w, b, 1e-5))


def embeddings():
    v, p, s, d = 9, 6, 2, 8
    ids, seg = torch.tensor([3, 0, 8, 3, 7, 1, 8]), torch.tensor([0, 0, 1, 1, 0, 0, 1])
    pos = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    c = Case(
        "embed",
        "two sequences, 4 and 3 tokens; word + position + segment, then LayerNorm (epsilon "
        "1e-12). Vocabulary 9, "
        "6 positions, 2 segments, d = 8. A position starts from 0 in each sequence.",
    )
    word, posw, segw = (
        c.input("word", (v, d)),
        c.input("position", (p, d)),
        c.input("segment", (s, d)),
    )
    w, b = c.input("norm_w", (d,), 0.5, plus=1.0), c.input("norm_b", (d,), 0.5)
    c.finish(
        F.layer_norm(word[ids] + posw[pos] + segw[seg], (d,), w, b, 1e-12),
        ints={"ids": ids, "segments": seg},
    )
    c = Case(
        "features",
        "float-feature input of 5 numbers: linear + position + segment (all 0), then LayerNorm "
        "(epsilon "
        "1e-12); the two sequences of the case before.",
    )
    x, fw, fb = c.input("x", (7, 5)), c.input("weight", (d, 5)), c.input("bias", (d,))
    posw, segw = c.input("position", (p, d)), c.input("segment", (s, d))
    w, b = c.input("norm_w", (d,), 0.5, plus=1.0), c.input("norm_b", (d,), 0.5)
    c.finish(
        F.layer_norm(
            F.linear(x, fw, fb) + posw[pos] + segw[torch.zeros(7, dtype=torch.long)],
            (d,), w, b,
            1e-12,
        )
    )


def attention():
    heads, d, lengths = 3, 12, [4, 1, 5]
    n = sum(lengths)
    c = Case(
        "attention",
        "3 heads of 4, three packed sequences of 4, 1 and 5 tokens: softmax(q k^T / sqrt 4) v "
        "inside each "
        "sequence, no projections.",
    )
    q, k, v = c.input("q", (n, d), 2.0), c.input("k", (n, d), 2.0), c.input("v", (n, d))
    out, at = [], 0
    for m in lengths:
        def part(t):
            return t[at:at + m].view(m, heads, d // heads).transpose(0, 1)
        a = torch.softmax(part(q) @ part(k).transpose(1, 2) / math.sqrt(d // heads), dim=2)
        out.append((a @ part(v)).transpose(0, 1).reshape(m, d))
        at += m
    c.finish(torch.cat(out))
    c = Case(
        "self_attention",
        "the same three sequences through the whole sub-layer: y = Attention(x wq^T + bq, x wk^T "
        "+ bk, "
        "x wv^T + bv) wo^T + bo, 2 heads of 4.",
    )
    heads, d = 2, 8
    x = c.input("x", (n, d))
    wq, bq, wk, bk, wv, bv, wo, bo = [
        c.input(a + b, (d, d) if a == "w" else (d,), 0.5) for b in "qkvo" for a in "wb"
    ]
    q, k, v = F.linear(x, wq, bq), F.linear(x, wk, bk), F.linear(x, wv, bv)
    out, at = [], 0
    for m in lengths:
        def cut(t):
            return t[at:at + m].view(1, m, heads, d // heads).transpose(1, 2)
        out.append(
            F.scaled_dot_product_attention(cut(q), cut(k), cut(v)).transpose(1, 2).reshape(m, d)
        )
        at += m
    c.finish(F.linear(torch.cat(out), wo, bo))


def losses():
    for classes in (2, 3, 5):
        c = Case(
            f"ce{classes}",
            f"cross-entropy / log {classes}, one value for each of 4 rows; label of row r is r mod "
            f"{classes}.",
        )
        y = c.input("scores", (4, classes), 8.0)
        label = torch.arange(4) % classes
        c.finish(F.cross_entropy(y, label, reduction="none") / math.log(classes))
    c = Case(
        "ce_large",
        "the same with scores up to 512, where a careless softmax overflows; labels 0 1 2 0.",
    )
    y = c.input("scores", (4, 3), 512.0)
    c.finish(F.cross_entropy(y, torch.arange(4) % 3, reduction="none") / math.log(3))
    c = Case("mse", "(score - label)^2, one value for each row.")
    y, t = c.input("scores", (4,), 4.0), c.input("labels", (4,), 4.0, grad=False)
    c.finish((y - t).square())


def moe():
    n, d, f, e, tasks = 9, 6, 5, 4, 3
    token_task = torch.tensor([0, 0, 0, 2, 2, 1, 1, 1, 1])
    h.comment(
        f"The MoE layer. {n} tokens, d = {d}, f = {f}, {e} experts. Every case reads the same x "
        f"(9,6), expert weights "
        f"w1 (4,5,6), b1 (4,5), w2 (4,6,5), b2 (4,6) (expert first) and dy (9,6) from the names "
        f"{MOE}.*; the gates (T,4,6) "
        "have T = 1 (shared) or T = 3 (by golden_moe_task, the task of each token). y = sum over "
        "the k chosen experts "
        "of weight * E_i(x). experts (9,k) in falling order of probability, weights (9,k) as used "
        "in the sum. Gradients "
        "are those of sum(y dy) + loss; loss is there in the cases with a balance or z-loss, and "
        "holds them already "
        "multiplied by their coefficients."
    )
    h.ints("golden_moe_task", token_task.tolist())

    def case(
        name,
        about,
        shared=False,
        k=1,
        scale="paper",
        renormalise=False,
        balance=0.0,
        z=0.0,
        empty=False,
        gate=1.0,
    ):
        c = Case(name, about)
        x = c.input("x", (n, d), 2.0, key=MOE, grad=not empty)
        gates = c.input("gate", (1 if shared else tasks, e, d), gate, key=MOE, grad=not empty)
        if empty:
            with torch.no_grad():
                x[:, 0] = 1.0
                gates[:, 2, 0] = -16.0
            c.order["x"], c.order["gate"] = x.requires_grad_(), gates.requires_grad_()
        w1, b1 = c.input("w1", (e, f, d), 0.5, key=MOE), c.input("b1", (e, f), 0.5, key=MOE)
        w2, b2 = c.input("w2", (e, d, f), 0.5, key=MOE), c.input("b2", (e, d), 0.5, key=MOE)
        logits = torch.stack([gates[0 if shared else int(token_task[t])] @ x[t] for t in range(n)])
        probs, experts, weights = ref.route(logits, k, scale, renormalise)
        rows = []
        for t in range(n):      # Eq. 2 as it is written, token by token
            y = 0
            for j in range(k):
                i = int(experts[t, j])
                y = y + weights[t, j] * F.linear(F.gelu(F.linear(x[t], w1[i], b1[i])), w2[i], b2[i])
            rows.append(y)
        ordered = probs.sort(1, descending=True).values
        margin = (ordered[:, :-1] - ordered[:, 1:])[:, :k].min().item()
        assert margin > 1e-3, (name, margin)
        used = sorted(set(experts.reshape(-1).tolist()))
        assert (used == [0, 1, 3]) if empty else len(used) == e, (name, used)
        extra = {"weights": weights}
        if balance or z:
            extra["loss"] = balance * ref.balance_loss(probs, experts) + z * ref.z_loss(logits)
        h_dy = ref.lcg_tensor(MOE + ".dy", (n, d), 1.0)
        y = torch.stack(rows)
        (y * h_dy).sum().backward(retain_graph="loss" in extra)
        if "loss" in extra:
            extra["loss"].backward()
        about += (
            f" T = {1 if shared else tasks}, k = {k}, gates {MOE}.gate * {gate:g}, x {MOE}.x * 2, "
            f"weights {MOE}.w1 ... * 0.5, dy {MOE}.dy * 1. Smallest margin of a choice "
            f"{margin:.3f}."
        )
        h.comment(f"{name}: {about}")
        h.ints(f"golden_{name}_experts", experts.reshape(-1).tolist())
        h.values(f"golden_{name}_y", y)
        for key, t in extra.items():
            h.values(f"golden_{name}_{key}", t.reshape(-1))
        for key, t in c.order.items():
            h.values(f"golden_{name}_d{key}", t.grad, 8)

    case("moe_shared_top1", "one gate for all (Switch).", shared=True)
    case("moe_task_top1", "a gate for each task (TaG), weight g*.")
    case("moe_task_top2", "two experts for each token, weights not renormalised.", k=2)
    case("moe_task_top2_n", "the same, weight g N / k.", k=2, scale="n")
    case(
        "moe_task_top2_renormalised",
        "the same, weights divided by their sum.",
        k=2,
        renormalise=True,
    )
    case("moe_task_all", "all four experts: Eq. 2.", k=4)
    case(
        "moe_shared_top1_losses",
        "with loss = 0.5 balance + 0.25 z; balance = N sum_i f_i P_i over the tokens of the "
        "batch, f_i "
        "the share of the choices that fell on expert i, P_i its mean probability; z = mean of "
        "logsumexp(logits)^2.",
        shared=True,
        balance=0.5,
        z=0.25,
    )
    case(
        "moe_task_top2_losses",
        "the same losses with task gates and k = 2.",
        k=2,
        balance=0.5,
        z=0.25,
    )
    case(
        "moe_task_top1_empty",
        "expert 2 gets no token: after the fill x[t][0] = 1 for every t, and gate[task][2][0] = "
        "-16.",
        empty=True,
    )


linear()
gelu()
layer_norm()
embeddings()
attention()
losses()
moe()
h.save()
