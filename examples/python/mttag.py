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
import torch.nn as nn
import torch.nn.functional as F

class MTTaG(nn.Module):
    def __init__(self, config, tasks, shapes):  # shapes: of each tensor of the file, by name
        super().__init__()
        self.c, self.names = config, [t["name"] for t in tasks]
        self.classes = [len(t.get("labels") or [0]) for t in tasks]
        for name, shape in shapes.items():
            at, (*path, last) = self, name.split(".")
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at._modules[part]
            at.register_parameter(last, nn.Parameter(torch.zeros(shape)))

    def w(self, name):
        return self.get_parameter(name)

    def linear(self, name, x):
        return F.linear(x, self.w(name + ".weight"), self.w(name + ".bias"))

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.w(name + ".weight"), self.w(name + ".bias"),
                            self.c["eps"])

    def attention(self, at, x, mask):
        S, n, H = x.shape
        q, k, v = (self.linear(f"{at}attention.self.{name}", x).view(S, n, self.c["heads"], -1)
                   .transpose(1, 2) for name in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        y = self.linear(at + "attention.output.dense", y.transpose(1, 2).reshape(S, n, H))
        return self.norm(at + "attention.output.LayerNorm", x + y)

    def expert(self, at, x):  # Eq. 1
        return self.linear(at + "output.dense", F.gelu(self.linear(at + "intermediate.dense", x)))

    def gates(self, l, task):  # (S, N, H): W_{g,t} of each sequence
        at, router = f"encoder.layer.{l}.gate.", self.c["router"]
        if router == "shared":
            return self.w(at + "weight").expand(len(task), -1, -1)
        if router == "embedding":
            return torch.einsum("sr,rnh->snh", self.w("tasks.vectors")[task], self.w(at + "basis"))
        return torch.stack([self.w(f"{at}{name}.weight") for name in self.names])[task]

    def experts(self, l, x, task):  # Eq. 3 to 6
        at, c = f"encoder.layer.{l}.", self.c
        if c["router"] == "dense":
            return self.expert(at, x)
        prob = torch.einsum("smh,snh->smn", x, self.gates(l, task)).softmax(-1)
        N, k = c["experts"], c["top_k"]
        prob = prob.index_fill(2, torch.tensor((c.get("absent") or [[]] * (l + 1))[l],
                                               dtype=torch.long, device=x.device), -1)
        weight, chosen = prob.topk(k)
        if c["renormalize"]:
            weight = weight / weight.sum(-1, keepdim=True)
        elif c["gate_scale_n"]:
            weight = weight * N / k
        y = torch.zeros_like(x)
        for i in range(N):
            s, m, slot = torch.where(chosen == i)
            if len(s):
                y = y.index_put((s, m), weight[s, m, slot, None] * self.expert(
                    f"{at}experts.{i}.", x[s, m]), accumulate=True)
        return y

    def block(self, at, x, mask, experts):
        x = self.attention(at, x, mask)
        return self.norm(at + "output.LayerNorm", x + experts(x))

    def blocks(self, l, x, mask, task):  # [TL]: a mixture of whole blocks, by task
        N, c = self.c["experts"], self.c
        if c["router"] == "dense":
            weight = x.new_full((len(x), N), 1 / N)
        else:
            z = self.linear(f"router.{l}.1", F.gelu(self.linear(f"router.{l}.0",
                                                                self.w("tasks.vectors")[task])))
            soft = (z / c["temperature"]).softmax(-1)
            hard = F.one_hot(z.argmax(-1), N).to(z)
            weight = soft if c["selection"] == "softmax" else hard
        return sum(weight[:, i, None, None] * self.block(
            f"encoder.layer.{l}.blocks.{i}.", x, mask,
            lambda y, i=i: self.expert(f"encoder.layer.{l}.blocks.{i}.", y)) for i in range(N))

    def task_ids(self, task, n, device):
        if isinstance(task, str):
            task = self.names.index(task)
        return torch.as_tensor(task, device=device).expand(n)

    def encode(self, ids, task=0, segments=None, mask=None):
        S, n = ids.shape[:2]
        task = self.task_ids(task, S, ids.device)
        mask = torch.ones(S, n, device=ids.device) if mask is None else mask
        x = self.linear("embeddings.features", ids) if self.c.get("features") else \
            self.w("embeddings.word_embeddings.weight")[ids]
        x = x + self.w("embeddings.position_embeddings.weight")[:n]
        kinds = self.w("embeddings.token_type_embeddings.weight")
        x = x + (kinds[0] if segments is None else kinds[segments])
        x = self.norm("embeddings.LayerNorm", x)
        for l in range(self.c["layers"]):
            if self.c.get("unit") == "block":
                x = self.blocks(l, x, mask.bool(), task)
            else:
                x = self.block(f"encoder.layer.{l}.", x, mask.bool(),
                               lambda y, l=l: self.experts(l, y, task))
        return x

    def forward(self, ids, task=0, segments=None, mask=None):
        """Scores (S, most classes) of each sequence's task, zeros behind them; Eq. 7 and 8."""
        cls = self.encode(ids, task, segments, mask)[:, 0]
        task, rows = self.task_ids(task, len(cls), cls.device), []
        for x, t in zip(cls, task.tolist()):
            y = self.linear("heads." + self.names[t], x)
            rows.append(F.pad(y, (0, max(self.classes) - len(y))))
        return torch.stack(rows)

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

    class MTTaGModel(PreTrainedModel):
        config_class, base_model_prefix = MTTaGConfig, "mttag"
        _keys_to_ignore_on_load_unexpected = [r"tokenizer\.vocab"]

        def __init__(self, config):
            super().__init__(config)
            inner = MTTaG(config.moe, config.tasks, config.shapes)
            for name, module in inner.named_children():
                self.add_module(name, module)
            object.__setattr__(self, "inner", inner)  # the same parameters, under the file's names
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, input_ids, task=0, token_type_ids=None, attention_mask=None):
            return self.inner(input_ids, task, token_type_ids, attention_mask)
