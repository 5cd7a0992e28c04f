"""MT-TaG in plain PyTorch: the independent reference that moe.h is compared with.

A post-LN BERT encoder whose feed-forward layers are mixtures of experts, routed per token by a
gate that belongs to the task of the sequence ([TaG] Eq. 1-10). Written from the paper and from
the published BERT; nothing is taken from moe.h.

Shapes: N tokens of the batch, S sequences, d hidden, f feed-forward, E experts, T tasks, k
experts per token. Batches are packed: all tokens in one list, `starts` (S+1) says where each
sequence begins. Parameter names are those of the Hugging Face hub for BERT, plus `experts.I`,
`gate.TASK.weight` (or `gate.weight` when shared) and `heads.TASK`.

The module is also the model of bench/pytorch_*.py, so it is written to be fast on a CPU: linear
layers see packed tokens only, attention goes through scaled_dot_product_attention, tokens are
sorted by expert and each expert is one product.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Task:
    name: str
    classes: int            # 0: regression


@dataclass
class Config:
    tasks: list
    # dense (one expert, no gate), switch (one gate for all tasks), tag (a gate per task)
    system: str = "tag"   
    layers: int = 6
    hidden: int = 384
    heads: int = 12
    ffn: int = 1536
    vocab: int = 30522
    positions: int = 512
    segments: int = 2
    eps: float = 1e-12
    experts: int = 4
    top_k: int = 1
    gate_scale: str = "paper"   # paper: weight g*; n: weight g* E / k
    renormalise: bool = False   # top-k weights divided by their sum
    balance: float = 0.0        # coefficient of the load-balance loss, summed over the layers
    z_loss: float = 0.0         # coefficient of the router z-loss, summed over the layers
    dropout: float = 0.0


class Batch:
    """Packed sequences. ids, segments: lists of lists; tasks: task of each sequence; labels: a
    number each. Attention pads each of `groups` runs of sequences to its own longest one: with
    sequences sorted by length, several groups save work."""

    def __init__(self, ids, segments, tasks, labels, groups=1, device="cpu"):
        lengths = [len(s) for s in ids]
        self.tasks = list(tasks)
        self.labels = list(labels)
        self.starts = [0]
        for n in lengths:
            self.starts.append(self.starts[-1] + n)
        self.ids = torch.tensor([i for s in ids for i in s], device=device)
        self.segments = torch.tensor([i for s in segments for i in s], device=device)
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        self.task_of_token = torch.repeat_interleave(
            torch.tensor(self.tasks), torch.tensor(lengths)
        ).to(device)
        size = -(-len(lengths) // groups)
        self.groups = [Group(lengths[i:i + size], device) for i in range(0, len(lengths), size)]


class Group:
    """Sequences that share one padded layout (S, longest). slots: the place of each token in it;
    mask (S,1,1,longest): which keys exist; both None where nothing is padded."""

    def __init__(self, lengths, device):
        self.sequences, self.tokens, self.longest = len(lengths), sum(lengths), max(lengths)
        self.mask = self.slots = None
        if min(lengths) != self.longest:
            exists = torch.arange(self.longest)[None, :] < torch.tensor(lengths)[:, None]
            self.mask = exists[:, None, None, :].to(device)
            self.slots = exists.reshape(-1).nonzero().squeeze(1).to(device)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.query = nn.Linear(c.hidden, c.hidden)
        self.key = nn.Linear(c.hidden, c.hidden)
        self.value = nn.Linear(c.hidden, c.hidden)

    def forward(self, x, batch):
        """x is (N,d). Attention runs inside each sequence; padding exists only inside `attend`."""
        sizes = [g.tokens for g in batch.groups]
        parts = zip(batch.groups, *(m(x).split(sizes) for m in (self.query, self.key, self.value)))
        y = [self.attend(*p) for p in parts]
        return y[0] if len(y) == 1 else torch.cat(y)

    def attend(self, g, q, k, v):
        d = q.shape[1]

        def split(t):       # (tokens,d) -> (S, heads, longest, d/heads)
            if g.slots is not None:
                t = t.new_zeros(g.sequences * g.longest, d).index_copy(0, g.slots, t)
            return t.view(g.sequences, g.longest, self.heads, d // self.heads).transpose(1, 2)

        y = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=g.mask,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(g.sequences * g.longest, d)
        return y if g.slots is None else y.index_select(0, g.slots)


class Expert(nn.Module):
    """E_i(x) = w_out GELU(w_in x + b_in) + b_out  [TaG] Eq. 1"""

    def __init__(self, c):
        super().__init__()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.hidden, c.ffn)})
        self.output = nn.ModuleDict({"dense": nn.Linear(c.ffn, c.hidden)})

    def forward(self, x):
        return self.output["dense"](F.gelu(self.intermediate["dense"](x)))


def gate_logits(x, gates, task_of_token):
    """[TaG] Eq. 3. x is (N,d), gates a list of T matrices (E,d); logits (N,E). One gate: shared
    by all tasks."""
    if len(gates) == 1:
        return F.linear(x, gates[0])
    logits = x.new_zeros(x.shape[0], gates[0].shape[0])
    for t, w in enumerate(gates):
        rows = (task_of_token == t).nonzero().squeeze(1)
        if rows.numel():
            logits = logits.index_copy(
                0, rows, F.linear(x.index_select(0, rows), w).to(logits.dtype)
            )
    return logits


def route(logits, k, gate_scale="paper", renormalise=False):
    """[TaG] Eq. 4-5: softmax over all experts, then the k largest; ties go to the lowest index.
    Returns probs (N,E), experts (N,k), weights (N,k)."""
    probs = torch.softmax(logits, dim=1)
    experts = torch.sort(probs, dim=1, descending=True, stable=True).indices[:, :k]
    weights = probs.gather(1, experts)
    if renormalise:
        weights = weights / weights.sum(1, keepdim=True)
    if gate_scale == "n":
        weights = weights * (logits.shape[1] / k)
    return probs, experts, weights


def balance_loss(probs, experts):
    """Switch: E sum_i f_i P_i over the N tokens; f_i the share of the N k choices that fell on
    i, P_i the mean probability."""
    n, e = probs.shape
    share = torch.bincount(experts.reshape(-1), minlength=e).to(probs.dtype) / experts.numel()
    return e * (share * probs.mean(0)).sum()


def z_loss(logits):
    """Mean over the tokens of logsumexp(logits)^2."""
    return torch.logsumexp(logits, dim=1).square().mean()


def dispatch(x, experts, weights, functions):
    """[TaG] Eq. 6. Tokens sorted by expert, one product per expert that has any, scattered back
    times the weight."""
    k = experts.shape[1]
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    token = order if k == 1 else order // k
    counts = torch.bincount(flat, minlength=len(functions)).tolist()
    parts = x.index_select(0, token).split(counts)
    y = torch.cat([f(p) for f, p in zip(functions, parts) if p.shape[0]])
    y = y * weights.reshape(-1).index_select(0, order)[:, None]
    return (
        torch.zeros(x.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
        .index_add(0, token, y)
        .to(x.dtype)
    )


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.attention = nn.ModuleDict({
            "self": Attention(c),
            "output": nn.ModuleDict({"dense": nn.Linear(c.hidden, c.hidden),
                                     "LayerNorm": nn.LayerNorm(c.hidden, eps=c.eps)})})
        if c.system == "dense":
            self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.hidden, c.ffn)})
            self.output = nn.ModuleDict({"dense": nn.Linear(c.ffn, c.hidden),
                                         "LayerNorm": nn.LayerNorm(c.hidden, eps=c.eps)})
        else:
            self.experts = nn.ModuleList([Expert(c) for _ in range(c.experts)])
            self.output = nn.ModuleDict({"LayerNorm": nn.LayerNorm(c.hidden, eps=c.eps)})
            if c.system == "switch":
                self.gate = nn.Linear(c.hidden, c.experts, bias=False)
            else:
                self.gate = nn.ModuleDict(
                    {t.name: nn.Linear(c.hidden, c.experts, bias=False) for t in c.tasks}
                )
        self.aux = None         # extra loss of the last pass
        self.routes = None      # (logits, probs, experts, weights) of the last pass

    def mixture(self, x, batch):
        c = self.c
        if c.system == "dense":
            return self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        gates = (
            [self.gate.weight]
            if c.system == "switch"
            else [self.gate[t.name].weight for t in c.tasks]
        )
        with torch.autocast(x.device.type, enabled=False):     # gates stay in fp32
            logits = gate_logits(
                x if x.dtype == torch.float64 else x.float(), gates, batch.task_of_token
            )
            probs, experts, weights = route(logits, c.top_k, c.gate_scale, c.renormalise)
        self.routes = (logits, probs, experts, weights)
        self.aux = None
        if c.balance or c.z_loss:
            self.aux = c.balance * balance_loss(probs, experts) + c.z_loss * z_loss(logits)
        return dispatch(x, experts, weights, self.experts)

    def forward(self, x, batch):
        p = self.c.dropout
        a = self.attention["output"]["dense"](self.attention["self"](x, batch))
        x = self.attention["output"]["LayerNorm"](x + F.dropout(a, p, self.training))
        h = self.mixture(x, batch)
        return self.output["LayerNorm"](x + F.dropout(h, p, self.training))


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(c.vocab, c.hidden),
            "position_embeddings": nn.Embedding(c.positions, c.hidden),
            "token_type_embeddings": nn.Embedding(c.segments, c.hidden),
            "LayerNorm": nn.LayerNorm(c.hidden, eps=c.eps)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([Layer(c) for _ in range(c.layers)])})
        self.heads = nn.ModuleDict(
            {t.name: nn.Linear(c.hidden, max(t.classes, 1)) for t in c.tasks}
        )

    def hidden(self, batch):
        e = self.embeddings
        x = e["word_embeddings"](batch.ids) + e["position_embeddings"](batch.positions) \
            + e["token_type_embeddings"](batch.segments)
        x = F.dropout(e["LayerNorm"](x), self.c.dropout, self.training)
        for layer in self.encoder["layer"]:
            x = layer(x, batch)
        return x

    def scores(self, batch):
        """A list over the sequences: (C_t) scores, from the [CLS] vector, without a pooler
        ([TaG] Eq. 7-8)."""
        x = self.hidden(batch)
        first = x.index_select(0, torch.tensor(batch.starts[:-1], device=x.device))
        first = F.dropout(first, self.c.dropout, self.training)
        out = [None] * len(batch.tasks)
        for t, task in enumerate(self.c.tasks):
            rows = [s for s, u in enumerate(batch.tasks) if u == t]
            if rows:
                y = self.heads[task.name](
                    first.index_select(0, torch.tensor(rows, device=x.device))
                )
                for i, s in enumerate(rows):
                    out[s] = y[i]
        return out

    def losses(self, batch):
        """Loss of each sequence: cross-entropy / log C ([TaG] Eq. 9, 3.3) or squared error (Eq.
        10)."""
        return [sequence_loss(y, self.c.tasks[t], label)
                for y, t, label in zip(self.scores(batch), batch.tasks, batch.labels)]

    def loss(self, batch):
        """Mean over the sequences, plus the extra losses of the layers where they are on."""
        total = torch.stack(self.losses(batch)).mean()
        for layer in self.encoder["layer"]:
            if layer.aux is not None:
                total = total + layer.aux
        return total


def sequence_loss(y, task, label):
    if task.classes == 0:
        return (y[0] - label).square()
    return -torch.log_softmax(y.float() if y.dtype == torch.bfloat16 else y, dim=0)[
        int(label)
    ] / math.log(task.classes)


def learning_rate(step, total, peak, warmup):
    """step counts from 1. W = floor(warmup total): step/W up to W, then (total - step +
    1)/(total - W)."""
    w = math.floor(warmup * total)
    return peak * (step / w if step <= w else (total - step + 1) / (total - w))


def clip(parameters, limit):
    """Gradients times min(1, limit / (norm + 1e-6)); returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, limit)


class Adam:
    """Adam as published, with bias correction, epsilon outside the root, and decoupled weight
    decay as an option. Written out, so that the golden curves do not rest on torch.optim (bench/
    uses the fused one)."""

    def __init__(self, parameters, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
        self.p = list(parameters)
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.b1, self.b2, self.eps, self.decay, self.t = betas[0], betas[1], eps, decay, 0

    @torch.no_grad()
    def step(self, lr):
        self.t += 1
        c1, c2 = 1 - self.b1 ** self.t, 1 - self.b2 ** self.t
        for p, m, v in zip(self.p, self.m, self.v):
            g = p.grad if p.grad is not None else torch.zeros_like(p)
            m.mul_(self.b1).add_(g, alpha=1 - self.b1)
            v.mul_(self.b2).addcmul_(g, g, value=1 - self.b2)
            p.mul_(1 - lr * self.decay)
            p.sub_(lr * (m / c1) / ((v / c2).sqrt() + self.eps))


def load_bert(model, path):
    """Weights of a Hugging Face BERT file; every expert is a copy of the feed-forward layer
    (#18). Heads and gates stay."""
    from safetensors.torch import load_file
    weights = {k.removeprefix("bert."): v for k, v in load_file(path).items()}
    own = dict(model.named_parameters())
    for name, p in own.items():
        if name.startswith("heads.") or ".gate." in name:
            continue
        source = name
        # encoder.layer.L.experts.I.output.dense.weight -> encoder.layer.L.output.dense.weight
        if ".experts." in name:   
            part = name.split(".")
            source = ".".join(part[:3] + part[5:])
        with torch.no_grad():
            p.copy_(weights[source])


def init_new(model, generator, gate_std=0.001, head_std=0.02):
    """What no checkpoint brings (#19): gates N(0, 0.001), head weights N(0, 0.02), head biases
    0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".gate." in name:
                p.normal_(0, gate_std, generator=generator)
            elif name.startswith("heads."):
                p.zero_() if name.endswith("bias") else p.normal_(0, head_std, generator=generator)


# The generator of golden inputs, the same as in golden.h: FNV-1a of the name, then a 64-bit LCG,
# its top 16 bits a value in [-scale, scale). Every value is exact in float as long as scale is a
# power of two.
MASK = (1 << 64) - 1


def lcg(name, count, scale):
    state = 0xcbf29ce484222325
    for byte in name.encode():
        state = ((state ^ byte) * 0x100000001b3) & MASK
    out = []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) & MASK
        out.append(((state >> 48) - 32768) / 32768 * scale)
    return out


def lcg_tensor(name, shape, scale, dtype=torch.float64):
    return torch.tensor(lcg(name, math.prod(shape), scale), dtype=dtype).reshape(shape)
