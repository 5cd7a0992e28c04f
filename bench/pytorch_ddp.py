#!/usr/bin/env python3
"""Times the training step of bench/pytorch_step.py in PyTorch's DistributedDataParallel: two
processes with gloo, each half of the batch. The peer of bench_scale.c.

    python3 pytorch_ddp.py --ranks 2 --threads 1 --seconds 10

Rank 0 prints a JSON line. Needs torch."""

import argparse
import json
import os
import statistics
import time

from pytorch_step import batch, model


def rank_of_the_run(rank, a):
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(a.port))
    torch.set_num_threads(a.threads)
    dist.init_process_group("gloo", rank=rank, world_size=a.ranks)
    import reference as ref

    class Loss(torch.nn.Module):
        """DDP adds up the gradients of what goes through forward()."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, b):
            return self.net.loss(b)

    net = model("tag", 0.1).train()
    whole = Loss(net)
    if a.ranks > 1:
        whole = DistributedDataParallel(whole)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5, fused=True)
    b = batch("full", 32 // a.ranks)
    times = []
    began = time.perf_counter()
    while True:
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = whole(b)
        loss.backward()
        ref.clip(net.parameters(), 1.0)
        optimizer.step()
        loss.item()
        end = time.perf_counter()
        times.append(end - begin)
        stop = torch.tensor(float(end - began > a.seconds and len(times) > 3))
        if a.ranks > 1:
            dist.all_reduce(stop)
        if stop > 0:
            break
    if rank == 0:
        print(
            json.dumps(
                {
                    "peer": f"PyTorch {torch.__version__}, DDP, gloo",
                    "ranks": a.ranks,
                    "threads": a.threads,
                    "step": statistics.median(times[2:]),
                    "steps": len(times) - 2,
                }
            ),
            flush=True,
        )
    dist.destroy_process_group()


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seconds", type=float, default=10)
    p.add_argument("--port", type=int, default=29533)
    a = p.parse_args()
    import torch.multiprocessing as mp

    mp.spawn(rank_of_the_run, args=(a,), nprocs=a.ranks)


if __name__ == "__main__":
    main()
