#!/usr/bin/env python3
"""The lines of bench_gemm.c for PyTorch's matrix products (oneDNN): packed = weights reordered beforehand, plain, dx, dw (both accumulate).

  pytorch_gemm.py [--threads N] [--kind packed|plain|dx|dw] [--m M] [--quick]
"""
import argparse
import time

import torch

SHAPES = [(1152, 384), (384, 384), (1536, 384), (384, 1536), (3072, 768), (768, 3072), (500, 333)]
ROWS = [1, 2, 4, 8, 16, 32, 128, 512, 1024, 4096]


def product(kind, n, k, m):
    """A function without arguments that does one product."""
    x, w, b, y = torch.randn(m, k), torch.randn(n, k), torch.randn(n), torch.randn(m, n)
    dx, dw = torch.zeros(m, k), torch.zeros(n, k)
    if kind == "packed":
        reordered = torch.ops.mkldnn._reorder_linear_weight(w, m)
        return lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, b, "none", [], "")
    if kind == "plain":
        return lambda: torch.nn.functional.linear(x, w, b)
    if kind == "dx":
        return lambda: torch.addmm(dx, y, w, out=dx)
    return lambda: torch.addmm(dw, y.t(), x, out=dw)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kind", choices=["packed", "plain", "dx", "dw"])
    parser.add_argument("--m", type=int)
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    for kind in [a.kind] if a.kind else ["packed", "plain", "dx", "dw"]:
        for n, k in SHAPES[:4] if a.quick else SHAPES:
            for m in [a.m] if a.m else ROWS:
                once = product(kind, n, k, m)
                once()
                begin = time.perf_counter()
                once()
                times = max(1, int(a.seconds / 15 / (time.perf_counter() - begin)))
                rates = []
                for _ in range(15):
                    begin = time.perf_counter()
                    for _ in range(times):
                        once()
                    rates.append(2e-9 * m * n * k * times / (time.perf_counter() - begin))
                rates.sort()
                print(f"{kind:6} {n:5} {k:5} {m:5}  {rates[7]:7.1f}  ({rates[3]:.1f} .. {rates[14]:.1f})", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
