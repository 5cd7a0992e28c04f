#!/usr/bin/env python3
"""Writes bert.h: hidden states of the published MiniLM by Hugging Face transformers. Also checks
reference.py against them.

    python make_bert.py MODEL_FOLDER VOCAB.txt        (config.json and model.safetensors of
    all-MiniLM-L6-v2; BERT uncased)
"""
import os
import sys

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertModel

import reference as ref
from emit import Header

HERE = os.path.dirname(os.path.abspath(__file__))
TEXTS = [
    ("a single sentence", "The quick brown fox jumps over the lazy dog .", None),
    (
        "a pair",
        "Is the earth round?",
        "Na\u00efve caf\u00e9-goers' views: 42% say \u201cno\u201d, unbelievably!",
    ),
    (
        "128 tokens, a pair",
        "In the beginning the router knew nothing and sent every token to the first expert . " * 4,
        "Then the gradients came, and each task learned to find its own way through the layers . "
        * 5,
    ),
    ("[CLS] alone", None, None),
    ("[CLS] a [SEP]", "a", None),
]
STRIDE, SAMPLES = 997, 64
h = Header(os.path.join(HERE, "bert.h"), "GOLDEN_BERT_H_INCLUDED", f"""
bert.h - last hidden states of sentence-transformers/all-MiniLM-L6-v2 (6 layers, 384, 12 heads,
epsilon 1e-12), each sequence alone, by Hugging Face transformers in fp32. Written by
make_bert.py; do not edit.

For sequence I: bert_I_ids, bert_I_segments; bert_I_cls (384), the row of the first token;
bert_I_last (384), the row of the last token (where stored); bert_I_samples: elements (k *
{STRIDE}) mod (tokens * 384) of the whole (tokens, 384), k = 0 .. {SAMPLES - 1}.""")


def main():
    folder, vocab = sys.argv[1:3]
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    mine = ref.Model(ref.Config([], "dense")).eval()
    ref.load_bert(mine, os.path.join(folder, "model.safetensors"))
    tokenizer = BertWordPieceTokenizer(vocab, lowercase=True)
    batch, rows = [], []
    for i, (about, a, b) in enumerate(TEXTS):
        parts = [tokenizer.encode(t, add_special_tokens=False).ids for t in (a, b) if t]
        ids, segments = [101], [0]
        for s, part in enumerate(parts):
            if i == 2:
                part = part[:64] if s == 0 else part[:61]
            ids += part + [102]
            segments += [s] * (len(part) + 1)
        assert i != 2 or len(ids) == 128, len(ids)
        with torch.no_grad():
            y = model(
                torch.tensor([ids]), token_type_ids=torch.tensor([segments])
            ).last_hidden_state[0]
        batch.append((ids, segments))
        rows.append(y)
        h.comment(f"{i}: {about}, {len(ids)} tokens")
        h.ints(f"bert_{i}_ids", ids)
        h.ints(f"bert_{i}_segments", segments)
        h.values(f"bert_{i}_cls", y[0], 7)
        if i in (1, 2):
            h.values(f"bert_{i}_last", y[-1], 7)
        flat = y.reshape(-1)
        h.values(f"bert_{i}_samples", flat[torch.arange(SAMPLES) * STRIDE % flat.numel()], 7)
    with torch.no_grad():
        packed = mine.hidden(
            ref.Batch(
                [b[0] for b in batch], [b[1] for b in batch], [0] * len(batch), [0] * len(batch)
            )
        )
    worst = (packed - torch.cat(rows)).abs().max().item()
    print(f"reference.py, all sequences in one packed batch, against transformers: {worst:.2e}")
    assert worst < 1e-5
    h.save()


main()
