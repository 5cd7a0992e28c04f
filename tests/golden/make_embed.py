#!/usr/bin/env python3
"""Writes embed.h: sentence embeddings of the published MiniLM, computed in float64 by NumPy
alone. Checks its hidden states against those of transformers in bert.h.

    python make_embed.py MODEL_FOLDER VOCAB.txt       (config.json and model.safetensors of
    all-MiniLM-L6-v2; BERT uncased)
"""
import json
import math
import os
import re
import struct
import sys

import numpy as np
from tokenizers import BertWordPieceTokenizer

from emit import pack

HERE = os.path.dirname(os.path.abspath(__file__))
TEXTS = [
    ("The quick brown fox jumps over the lazy dog .", None),
    (
        "Is the earth round?",
        "Na\u00efve caf\u00e9-goers' views: 42% say \u201cno\u201d, unbelievably!",
    ),
]
erf = np.vectorize(math.erf)


def weights(path):
    with open(path, "rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
        data = f.read()
    out = {}
    for name, t in header.items():
        if name != "__metadata__" and t["dtype"] == "F32":
            begin, end = t["data_offsets"]
            out[name] = (
                np.frombuffer(data[begin:end], np.float32).astype(np.float64).reshape(t["shape"])
            )
    return out


def norm(x, w, name, eps):
    d = x - x.mean(1, keepdims=True)
    return (
        d / np.sqrt((d * d).mean(1, keepdims=True) + eps) * w[name + ".weight"] + w[name + ".bias"]
    )


def linear(x, w, name):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def hidden(w, config, ids, segments):
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    e = "embeddings."
    x = (w[e + "word_embeddings.weight"][ids] + w[e + "position_embeddings.weight"][:len(ids)]
         + w[e + "token_type_embeddings.weight"][segments])
    x = norm(x, w, e + "LayerNorm", eps)
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}."
        q, k, v = (
            linear(x, w, at + f"attention.self.{n}").reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for n in ("query", "key", "value")
        )
        s = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[2])
        p = np.exp(s - s.max(2, keepdims=True))
        p /= p.sum(2, keepdims=True)
        y = (p @ v).transpose(1, 0, 2).reshape(len(ids), -1)
        x = norm(
            x + linear(y, w, at + "attention.output.dense"),
            w,
            at + "attention.output.LayerNorm",
            eps,
        )
        y = linear(x, w, at + "intermediate.dense")
        y = y * (1 + erf(y / math.sqrt(2))) / 2
        x = norm(x + linear(y, w, at + "output.dense"), w, at + "output.LayerNorm", eps)
    return x


def golden(name):
    with open(os.path.join(HERE, "bert.h"), encoding="ascii") as f:
        text = re.search(r"\b%s\[\d+\] = \{(.*?)\}" % name, f.read(), re.S).group(1)
    return np.array([float(x) for x in text.split(",")])


def main():
    folder, vocab = sys.argv[1:3]
    w = weights(os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    tokenizer = BertWordPieceTokenizer(vocab, lowercase=True)
    out = [
        "/* embed.h - sentence embeddings of all-MiniLM-L6-v2: the mean of the last hidden states "
        "over all tokens, [CLS] and",
        "   [SEP] included, not normalised; float64. Written by make_embed.py; do not edit. */",
        "#ifndef GOLDEN_EMBED_H_INCLUDED",
        "#define GOLDEN_EMBED_H_INCLUDED",
    ]
    for i, (a, b) in enumerate(TEXTS):
        t = tokenizer.encode(a, b)
        assert t.ids == golden(f"bert_{i}_ids").astype(int).tolist()
        x = hidden(w, config, t.ids, t.type_ids)
        worst = np.abs(x[0] - golden(f"bert_{i}_cls")).max()
        print(f"text {i}: [CLS] against transformers {worst:.1e}")
        assert worst < 1e-5
        out += ["", f"/* {i}: {a}{' / ' + b if b else ''} */".encode("ascii", "replace").decode(),
                f"static const double embed_{i}_mean[{x.shape[1]}] = {{"]
        out += pack([f"{v:.8g}" for v in x.mean(0)]) + ["};"]
    with open(os.path.join(HERE, "embed.h"), "w", encoding="ascii", newline="\n") as f:
        f.write("\n".join(out + ["#endif", ""]))


main()
