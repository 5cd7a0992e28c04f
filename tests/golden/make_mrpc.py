#!/usr/bin/env python3
"""Writes mrpc.h: the losses of 60 steps of fine-tuning MiniLM on MRPC, in fp32 and in double.

    python make_mrpc.py GLUE_FOLDER MODEL_FOLDER VOCAB.txt
"""
import os
import sys

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "bench"))
import pytorch_finetune as finetune  # noqa: E402
import reference as ref  # noqa: E402
from emit import Header  # noqa: E402

STEPS, BATCH, LR = 60, 32, 5e-5
h = Header(os.path.join(HERE, "mrpc.h"), "GOLDEN_MRPC_H_INCLUDED", f"""
mrpc.h - {STEPS} steps of fine-tuning MT-Dense on MRPC from all-MiniLM-L6-v2, by PyTorch. Written
by make_mrpc.py; do not edit.

train.tsv in the order of the file, step t (from 1) takes rows {BATCH} (t - 1) .. {BATCH} t - 1;
at most 128 tokens; dropout 0; Adam (0.9, 0.999, 1e-8), no weight decay, lr 5e-5, warm-up 0.1 of
{STEPS} steps (step t uses t/6 up to 6, then (61 - t)/54), gradients times min(1, 1 / (norm +
1e-6)). The head: golden_fill(w, 768, "heads.MRPC.weight", 0.03125f), bias 0. Losses are means
over the batch of cross-entropy / log 2, before each update. mrpc_tokens: tokens of each batch,
to tell a difference of text from one of sums.""")


def run(rows, folder, dtype):
    torch.manual_seed(0)
    model = ref.Model(ref.Config([ref.Task("MRPC", 2)], "dense"))
    ref.load_bert(model, os.path.join(folder, "model.safetensors"))
    model.to(dtype)
    head = model.heads["MRPC"]
    with torch.no_grad():
        head.weight.copy_(ref.lcg_tensor("heads.MRPC.weight", (2, 384), 0.03125))
        head.bias.zero_()
    optimizer = ref.Adam(model.parameters())
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        for p in optimizer.p:
            p.grad = None
        loss = model.loss(finetune.batch_of(rows[BATCH * (step - 1):BATCH * step]))
        loss.backward()
        losses.append(loss.detach())
        norms.append(ref.clip(model.parameters(), 1.0))
        optimizer.step(ref.learning_rate(step, STEPS, LR, 0.1))
        print(
            f"{dtype} step {step} loss {losses[-1].item():.9g} norm {norms[-1].item():.6g}",
            flush=True,
        )
    return torch.stack(losses).double(), torch.stack(norms).double()


def main():
    data, folder, vocab = sys.argv[1:4]
    table = {r["name"]: r for r in finetune.read_tsv(os.path.join(data, "tasks.tsv"))}
    _, parts, _ = finetune.read_task(data, table["MRPC"], 0, finetune.Encoder(vocab), 128)
    rows = parts["train"][:STEPS * BATCH]
    h.ints(
        "mrpc_tokens",
        [sum(len(r[0]) for r in rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)],
    )
    single, norms = run(rows, folder, torch.float32)
    double, _ = run(rows, folder, torch.float64)
    h.comment("fp32, then the same in double. Largest difference between the two: "
              f"{(single - double).abs().max().item():.2e}.")
    h.values("mrpc_losses", single)
    h.values("mrpc_losses_double", double)
    h.values("mrpc_norms", norms, 7)
    h.save()


main()
