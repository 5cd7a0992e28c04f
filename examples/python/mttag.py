"""The model of moe.h in PyTorch: reads its files, gives the same scores. pip: torch, safetensors.

    from mttag import load
    model = load("model.safetensors")              task gates, a shared gate, dense, task vectors,
    scores = model(ids, task="topic", segments=s, mask=m)         blocks chosen by a task [TL]
    hidden = model.encode(ids, task="topic")       (S, length, H)

ids (S, length), segments 0 or 1, mask 1 where there is a token. A model of feature inputs takes
ids (S, length, numbers). It trains as any torch module does; task=tensor (S) for tasks that differ
by sequence. Tasks of kind span are not scored. [TaG], [TL] and the equations: see moe.h. The folder
of `convert MODEL --hf DIR` opens with AutoModel.from_pretrained(DIR, trust_remote_code=True)."""
import json
import torch
from torch.nn import Module, Parameter, functional as F

class MTTaG(Module):
    def __init__(self, config, tasks, shapes, *of_base):  # shapes: of the file's tensors, by name
        super().__init__(*of_base)
        self.c, self.names = config, [t["name"] for t in tasks]
        self.classes = [len(t.get("labels") or [0]) for t in tasks]
        for name, shape in shapes.items():
            at, (*path, last) = self, name.split(".")
            for part in path:
                at = at._modules.setdefault(part, Module())
            at.register_parameter(last, Parameter(torch.zeros(shape)))

    w = Module.get_parameter  # a tensor of the file

    def linear(self, name, x):
        return F.linear(x, self.w(name + ".weight"), self.w(name + ".bias"))

    def norm(self, name, x):
        w, b = self.w(name + ".weight"), self.w(name + ".bias")
        return F.layer_norm(x, x.shape[-1:], w, b, self.c["eps"])

    def expert(self, at, x):  # Eq. 1
        return self.linear(at + "output.dense", F.gelu(self.linear(at + "intermediate.dense", x)))

    def block(self, at, x, mask, experts=None):
        q, k, v = (self.linear(f"{at}attention.self.{name}", x).unflatten(
            -1, (self.c["heads"], -1)).transpose(1, 2) for name in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        y = self.linear(at + "attention.output.dense", y.transpose(1, 2).flatten(2))
        x = self.norm(at + "attention.output.LayerNorm", x + y)
        y = experts(x) if experts else self.expert(at, x)
        return self.norm(at + "output.LayerNorm", x + y)

    def gates(self, l, task):  # (S, N, H): W_{g,t} of each sequence
        at, router = f"encoder.layer.{l}.gate.", self.c["router"]
        if router == "shared":
            return self.w(at + "weight").expand(len(task), -1, -1)
        if router == "embedding":
            return torch.einsum("sr,rnh->snh", self.w("tasks.vectors")[task], self.w(at + "basis"))
        return torch.stack([self.w(f"{at}{name}.weight") for name in self.names])[task]

    def experts(self, l, x, task):  # Eq. 3 to 6
        at, c, y = f"encoder.layer.{l}.", self.c, torch.zeros_like(x)
        if c["router"] == "dense":
            return self.expert(at, x)
        prob = torch.einsum("smh,snh->smn", x, self.gates(l, task)).softmax(-1)
        absent = torch.tensor(c["absent"][l] if c.get("absent") else [], device=x.device)
        weight, chosen = prob.index_fill(2, absent.long(), -1).topk(c["top_k"])
        if c["renormalize"]:
            weight = weight / weight.sum(-1, keepdim=True)
        elif c["gate_scale_n"]:
            weight = weight * c["experts"] / c["top_k"]
        for i in range(c["experts"]):
            s, m, slot = torch.where(chosen == i)
            if len(s):
                z = weight[s, m, slot, None] * self.expert(f"{at}experts.{i}.", x[s, m])
                y = y.index_put((s, m), z, accumulate=True)
        return y

    def blocks(self, l, x, mask, task):  # [TL]: a mixture of whole blocks, by task
        at, c, N = f"encoder.layer.{l}.blocks.", self.c, self.c["experts"]
        weight = x.new_full((len(x), N), 1 / N)
        if c["router"] != "dense":
            z = F.gelu(self.linear(f"router.{l}.0", self.w("tasks.vectors")[task]))
            z = self.linear(f"router.{l}.1", z)
            soft = (z / c["temperature"]).softmax(-1)
            weight = soft if c["selection"] == "softmax" else F.one_hot(z.argmax(-1), N).to(z)
        return sum(weight[:, i, None, None] * self.block(f"{at}{i}.", x, mask) for i in range(N))

    def task_ids(self, task, x):  # of each sequence of x
        if isinstance(task, str):
            task = self.names.index(task)
        return torch.as_tensor(task, device=x.device).expand(len(x))

    def encode(self, ids, task=0, segments=None, mask=None):
        task = self.task_ids(task, ids)
        mask = ids.new_ones(ids.shape[:2]).bool() if mask is None else mask.bool()
        x = self.linear("embeddings.features", ids) if self.c.get("features") else \
            self.w("embeddings.word_embeddings.weight")[ids]
        kinds = self.w("embeddings.token_type_embeddings.weight")
        x = x + self.w("embeddings.position_embeddings.weight")[:ids.shape[1]]
        x = self.norm("embeddings.LayerNorm", x + kinds[0 if segments is None else segments])
        for l in range(self.c["layers"]):
            if self.c.get("unit") == "block":
                x = self.blocks(l, x, mask, task)
            else:
                x = self.block(f"encoder.layer.{l}.", x, mask, lambda y: self.experts(l, y, task))
        return x

    def forward(self, ids, task=0, segments=None, mask=None):
        """Scores (S, most classes) of each sequence's task, zeros behind them; Eq. 7 and 8."""
        cls = self.encode(ids, task, segments, mask)[:, 0]
        names = [self.names[t] for t in self.task_ids(task, cls).tolist()]
        rows = [self.linear("heads." + name, x) for name, x in zip(names, cls)]
        return torch.stack([F.pad(y, (0, max(self.classes) - len(y))) for y in rows])

def load(path):
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        about = f.metadata() or {}
        if "moe.config" not in about:
            raise ValueError(f"{path} is not a model of moe.h: it has no moe.config")
        tensors = {name: f.get_tensor(name) for name in f.keys() if name != "tokenizer.vocab"}
    if any(x.dtype == torch.int8 for x in tensors.values()):
        raise ValueError(f"{path} is an int8 model: mttag.py reads float models")
    model = MTTaG(json.loads(about["moe.config"]), json.loads(about["moe.tasks"]),
                  {name: x.shape for name, x in tensors.items()})
    model.load_state_dict(tensors)
    return model.eval()

try:  # for transformers: the folder of `convert MODEL --hf DIR`
    from transformers import PretrainedConfig, PreTrainedModel
except ImportError:
    pass
else:
    class MTTaGConfig(PretrainedConfig):
        model_type = "mttag"

        def __init__(self, moe=None, tasks=None, shapes=None, **others):
            super().__init__(**others)
            self.moe, self.tasks, self.shapes = moe or {}, tasks or [], shapes or {}

    class MTTaGModel(MTTaG, PreTrainedModel):
        config_class, base_model_prefix = MTTaGConfig, "mttag"
        _keys_to_ignore_on_load_unexpected = [r"tokenizer\.vocab"]

        def __init__(self, config):
            super().__init__(config.moe, config.tasks, config.shapes, config)
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, input_ids, task=0, token_type_ids=None, attention_mask=None):
            return super().forward(input_ids, task, token_type_ids, attention_mask)
