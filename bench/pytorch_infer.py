#!/usr/bin/env python3
"""Times inference in PyTorch: dense and MT-TaG of MiniLM size (N = 4, T = 8), and transformers'
BertModel where it is
installed, at several batch x length. Prints JSON, one line each. Needs torch.
"""

import argparse
import json
import os
import subprocess
import sys

from pytorch_step import MALLOC, batch, model
from serve import peak_mb, repeat, serve

SHAPES = "1x8,1x32,1x128,8x32,32x128"


def published(shape, precision):
    """transformers' own BertModel, sequences of equal length and no mask: its fastest path."""
    import torch
    from transformers import BertConfig, BertModel

    c = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    net = BertModel(c, add_pooling_layer=False).eval()
    ids = torch.randint(0, 30521, shape)
    if precision == "bf16":
        net = net.bfloat16()
    return lambda: net(ids).last_hidden_state[:, 0].sum().item()


def own(system, shape, precision):
    net = model(system, 0.0).eval()
    b = batch("full", *shape)
    if precision == "bf16":  # converted once; autocast would convert the weights at every call
        net = net.bfloat16()
        for layer in net.encoder["layer"]:
            if system == "tag":
                layer.gate.float()
    return lambda: sum(s.sum().item() for s in net.scores(b))


def calls(system, precision):
    """once(shape), with a model and a batch that are made when they are first asked for."""
    import torch

    made = {}

    def once(text, threads=None):
        if threads and int(threads) != torch.get_num_threads():
            torch.set_num_threads(int(threads))
        with torch.inference_mode():
            if text not in made:
                shape = tuple(int(n) for n in text.split("x"))
                made[text] = (
                    published(shape, precision)
                    if system == "transformers"
                    else own(system, shape, precision)
                )
            made[text]()

    return once


def measure(a, system, precision):
    import torch

    torch.set_num_threads(a.threads)
    once = calls(system, precision)
    record = {
        "peer": f"PyTorch {torch.__version__}",
        "what": "inference",
        "system": system,
        "precision": precision,
        "threads": a.threads,
    }
    if a.serve:
        return serve(once, record)
    for text in a.shapes.split(","):
        batch_size, length = (int(n) for n in text.split("x"))
        for _ in range(3):
            once(text)
        median, least, runs = repeat(lambda: once(text), a.seconds)
        print(
            json.dumps(
                dict(
                    record,
                    shape=text,
                    median_ms=1e3 * median,
                    min_ms=1e3 * least,
                    runs=runs,
                    tokens_per_second=batch_size * length / median,
                    peak_rss_mb=peak_mb(),
                )
            ),
            flush=True,
        )
    return None


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--systems", default="transformers,dense,tag")
    p.add_argument("--precisions", default="fp32,bf16")
    p.add_argument("--shapes", default=SHAPES)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--seconds", type=float, default=2.0, help="at least this long for each shape")
    p.add_argument("--variant", help="SYSTEM,PRECISION: one variant in this process")
    p.add_argument(
        "--serve",
        action="store_true",
        help="with --variant: answer the lines of standard input (serve.py)",
    )
    p.add_argument(
        "--first",
        action="store_true",
        help="one answer of transformers' BertModel for 16 tokens, from a cold process",
    )
    a = p.parse_args()
    if a.first:
        return calls("transformers", "fp32")("1x16")
    if a.variant:
        return measure(a, *a.variant.split(","))
    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads), **MALLOC)
    for system in a.systems.split(","):
        if system == "transformers":
            try:
                import transformers  # noqa: F401
            except ImportError:
                print("transformers is not installed: its BertModel is left out", file=sys.stderr)
                continue
        for precision in a.precisions.split(","):
            subprocess.run(
                [
                    sys.executable,
                    os.path.abspath(__file__),
                    "--variant",
                    f"{system},{precision}",
                    "--threads",
                    str(a.threads),
                    "--seconds",
                    str(a.seconds),
                    "--shapes",
                    a.shapes,
                ],
                env=env,
                check=True,
            )
    return None


if __name__ == "__main__":
    main()
