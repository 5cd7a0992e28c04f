#!/usr/bin/env python3
"""Times a training step of MT-TaG in PyTorch: the peer of bench/'s training step.

MiniLM size (6 x 384, 12 heads, ffn 1536), N = 4 experts, T = 8 tasks, 32 sequences of up to 128
tokens, dropout 0.1, fused
Adam, scaled_dot_product_attention, clipping, one product per expert. Each variant runs in a process
of its own, so that
its peak memory is its own. Lengths: `full` is 32 x 128; `real` is 8 + floor(120 u^2) with u from
the generator of
tests/golden/golden.h under the name "bench.lengths"; `sorted` the same sorted by length,
attention in 4 groups of 8.
Prints JSON. Needs torch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from serve import peak_mb, repeat, serve

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "tests", "golden"))
TASKS = 8
# glibc gives freed blocks back to the system and faults them in again at each step unless told
# otherwise; about 5 % for PyTorch
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


def lengths(kind, sequences, longest):
    import reference as ref

    if kind == "full":
        return [longest] * sequences
    u = [(v + 1) / 2 for v in ref.lcg("bench.lengths", sequences, 1.0)]
    n = [8 + int((longest - 8) * x * x) for x in u]
    return sorted(n) if kind == "sorted" else n


def batch(kind, sequences=32, longest=128):
    import reference as ref

    n = lengths(kind, sequences, longest)
    ids = [
        [int((v + 1) / 2 * 30521) for v in ref.lcg(f"bench.ids.{i}", m, 1.0)]
        for i, m in enumerate(n)
    ]
    groups = 4 if kind == "sorted" else 1
    return ref.Batch(
        ids,
        [[0] * m for m in n],
        [i % TASKS for i in range(sequences)],
        [i % 2 for i in range(sequences)],
        groups,
    )


def model(system, dropout):
    import torch
    import reference as ref

    torch.manual_seed(1)
    m = ref.Model(
        ref.Config([ref.Task(f"task{t}", 2) for t in range(TASKS)], system, dropout=dropout)
    )
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.dim() == 2:
                p.normal_(0, 0.02)
    return m


def measure(a):
    import torch
    import reference as ref

    torch.set_num_threads(a.threads)
    net = model(a.system, a.dropout).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5, fused=True)
    b = batch(a.lengths)

    def once(_word="", threads=a.threads):
        if int(threads) != torch.get_num_threads():
            torch.set_num_threads(int(threads))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=a.precision == "bf16"):
            loss = net.loss(b)
        loss.backward()
        ref.clip(net.parameters(), 1.0)
        optimizer.step()
        loss.item()

    record = {
        "peer": f"PyTorch {torch.__version__}",
        "what": "training step",
        "system": a.system,
        "precision": a.precision,
        "lengths": a.lengths,
        "tokens": b.starts[-1],
        "threads": a.threads,
        "dropout": a.dropout,
    }
    if a.serve:
        return serve(once, record, a.warm)
    for _ in range(a.warm):
        once()
    seconds = [repeat(once, 0)[0] for _ in range(a.steps)]
    median = statistics.median(seconds)
    print(
        json.dumps(
            dict(
                record,
                median_s=median,
                min_s=min(seconds),
                tokens_per_second=b.starts[-1] / median,
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
    p.add_argument("--systems", default="tag")
    p.add_argument("--precisions", default="fp32,bf16")
    p.add_argument("--lengths-of", default="full,real,sorted")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--warm", type=int, default=2)
    p.add_argument("--steps", type=int, default=7)
    p.add_argument("--variant", help="SYSTEM,PRECISION,LENGTHS: one variant in this process")
    p.add_argument(
        "--serve",
        action="store_true",
        help="with --variant: answer the lines of standard input (serve.py)",
    )
    a = p.parse_args()
    if a.variant:
        a.system, a.precision, a.lengths = a.variant.split(",")
        return measure(a)
    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads), **MALLOC)
    for system in a.systems.split(","):
        for precision in a.precisions.split(","):
            for kind in a.lengths_of.split(","):
                subprocess.run(
                    [
                        sys.executable,
                        os.path.abspath(__file__),
                        "--variant",
                        f"{system},{precision},{kind}",
                        "--threads",
                        str(a.threads),
                        "--dropout",
                        str(a.dropout),
                        "--warm",
                        str(a.warm),
                        "--steps",
                        str(a.steps),
                    ],
                    env=env,
                    check=True,
                )
    return None


if __name__ == "__main__":
    main()
