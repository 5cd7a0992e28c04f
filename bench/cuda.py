#!/usr/bin/env python3
"""moe.h on an NVIDIA GPU beside PyTorch, cuBLAS and the roofline: bench/results/cuda-CARD.md.

    python3 bench/cuda.py build/bench_cuda [--tiny] [--out FOLDER]

The peers are measured if PyTorch is there and sees a GPU: expert FFNs one expert after the other
(looped) and with torch._grouped_mm (grouped, bf16, where this PyTorch has it), the same products
as one dense product (cuBLAS), and a training step of an encoder of the same sizes. Whatever fails
is said on the page, and the rest goes on. --tiny only shows that everything works.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# dense TFLOP/s of fp32, tf32, bf16 and GB/s of memory, as published
PEAKS = {
    "V100": (15.7, 0, 0, 900),
    "T4": (8.1, 0, 0, 320),
    "A100": (19.5, 156, 312, 2039),
    "A10": (31.2, 62.5, 125, 600),
    "L4": (30.3, 60, 121, 300),
    "L40": (91.6, 91.6, 183, 864),
    "H100": (67, 494, 989, 3350),
    "H200": (67, 494, 989, 4800),
    "3090": (35.6, 35.6, 71, 936),
    "4090": (82.6, 82.6, 165, 1008),
}
EXPERTS, TASKS = 4, 8


def best_of(call, sync, rounds=5):
    """Seconds of a call: the best round of about 50 ms, after warm-up."""
    calls, best = 1, 1e9
    for i in range(-2, rounds):
        sync()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        sync()
        seconds = (time.perf_counter() - began) / calls
        if i < 0:
            calls = 1 + int(0.05 / max(seconds, 1e-6))
        else:
            best = min(best, seconds)
    return best


def peer_experts(torch, device, precision, m, h, f):
    """(who, backward, seconds): tokens lie sorted by expert, as after dispatch."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    options = {"device": device, "dtype": kind, "requires_grad": True}
    x = torch.randn(m, h, **options)
    w1, w2 = torch.randn(EXPERTS, h, f, **options), torch.randn(EXPERTS, f, h, **options)
    b1, b2 = torch.zeros(EXPERTS, 1, f, **options), torch.zeros(EXPERTS, 1, h, **options)
    dy = torch.randn(m, h, device=device, dtype=kind)
    gelu, each = torch.nn.functional.gelu, m // EXPERTS

    def looped():
        parts = x.split(each)
        return torch.cat(
            [gelu(p @ w1[e] + b1[e]) @ w2[e] + b2[e] for e, p in enumerate(parts)]
        )

    ends = torch.arange(each, m + 1, each, device=device, dtype=torch.int32)

    def grouped():
        y = gelu(torch._grouped_mm(x, w1, offs=ends))
        return torch._grouped_mm(y, w2, offs=ends)

    def dense():
        return gelu(x @ w1[0]) @ w2[0]

    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    for who, forward in (("looped", looped), ("grouped", grouped), ("one dense product", dense)):
        if who == "grouped" and (kind != torch.bfloat16 or not hasattr(torch, "_grouped_mm")):
            continue
        try:
            with torch.no_grad():
                yield who, 0, best_of(forward, sync)
            yield who, 1, best_of(lambda: forward().backward(dy), sync)
        except RuntimeError as error:
            yield who + ": " + str(error).splitlines()[0], 0, float("nan")


def peer_encoder(torch, layers, h):
    """MT-TaG in PyTorch, one task a sequence: the gate of its task, one product per expert."""
    nn, functional = torch.nn, torch.nn.functional

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h)
            self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
            self.gate = nn.Parameter(torch.randn(TASKS, EXPERTS, h) * 0.02)
            self.up = nn.ModuleList(nn.Linear(h, 4 * h) for _ in range(EXPERTS))
            self.down = nn.ModuleList(nn.Linear(4 * h, h) for _ in range(EXPERTS))

        def forward(self, x, task):
            s, n, _ = x.shape
            q, k, v = self.qkv(x).view(s, n, 3, -1, 64 if h > 384 else 32).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
            y = self.out(y.transpose(1, 2).reshape(s, n, h))
            x = self.norm1(x + functional.dropout(y, 0.1))
            p = torch.einsum("snh,seh->sne", x, self.gate[task].to(x.dtype)).softmax(-1)
            weight, which = p.max(-1)
            flat, y = x.reshape(-1, h), torch.zeros_like(x).reshape(-1, h)
            for e in range(EXPERTS):
                at = (which.reshape(-1) == e).nonzero().squeeze(1)
                part = self.down[e](functional.gelu(self.up[e](flat[at])))
                y = y.index_copy(0, at, part.to(y.dtype))
            y = y * weight.reshape(-1, 1).to(y.dtype)
            return self.norm2(x + functional.dropout(y.view(s, n, h), 0.1))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(30522, h)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.head = nn.Linear(h, 2)

        def forward(self, ids, task):
            x = self.words(ids)
            for layer in self.layers:
                x = layer(x, task)
            return self.head(x[:, 0])

    return Encoder()


def peer_step(torch, device, precision, layers, h, sequences=32, length=128):
    """Seconds of a training step and of inference."""
    net = peer_encoder(torch, layers, h).to(device)
    adam = torch.optim.Adam(net.parameters(), lr=1e-5, fused=True)
    ids = torch.arange(sequences * length, device=device).view(sequences, length) % 30522
    task = torch.arange(sequences, device=device) % TASKS
    label = torch.arange(sequences, device=device) % 2
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run(training):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            out = net(ids, task)
        if training:
            adam.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(out.float(), label).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            adam.step()

    step = best_of(lambda: run(True), sync, 3)
    net.eval()
    with torch.no_grad():
        return step, best_of(lambda: run(False), sync, 3)


def measure_peers(tiny, say):
    """Lines like those of bench_cuda, with `peer`."""
    try:
        import torch
    except ImportError:
        say("PyTorch is not installed: there are no peers.")
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        say("This PyTorch sees no GPU: there are no peers.")
        return []
    say(f"Peers: PyTorch {torch.__version__}, CUDA {torch.version.cuda}.")
    sizes = [(64, 32, 64)] if tiny else [(4096, 384, 1536), (4096, 768, 3072), (4096, 1024, 4096)]
    models = [("tiny", 1, 64)] if tiny else [("MiniLM", 6, 384), ("BERT base", 12, 768)]
    lines = []
    for precision in ("fp32", "tf32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        for m, h, f in sizes:
            for who, back, seconds in peer_experts(torch, device, precision, m, h, f):
                lines.append({"what": "experts", "peer": who, "precision": precision, "M": m,
                              "H": h, "F": f, "backward": back, "seconds": seconds,
                              "tflops": (3 if back else 1) * 4e-12 * m * h * f / seconds})
        for name, layers, h in models:
            try:
                both = peer_step(torch, device, precision, layers, h, *((4, 8) if tiny else ()))
            except (RuntimeError, ValueError) as error:
                say(f"PyTorch, {name}, {precision}: {str(error).splitlines()[0]}")
                continue
            tokens = 32 if tiny else 4096
            for what, seconds in zip(("training step", "inference"), both):
                lines.append({"what": what, "peer": "PyTorch", "model": name,
                              "precision": precision, "tokens": tokens, "seconds": seconds,
                              "tokens_per_second": tokens / seconds})
    return lines


def table_experts(lines, peak):
    out = ["| M, H, F | precision | pass | who | ms | TFLOP/s | of the peak |",
           "|---|---|---|---|---|---|---|"]
    order = {"fp32": 0, "tf32": 1, "bf16": 2}
    for d in sorted((d for d in lines if d["what"] == "experts"),
                    key=lambda d: (d["H"], order[d["precision"]], d["backward"], "peer" in d)):
        most = peak[order[d["precision"]]] if peak else 0
        share = f"{100 * d['tflops'] / most:.0f} %" if most else "-"
        who = "PyTorch, " + d["peer"] if "peer" in d else "**moe.h**"
        out.append(f"| {d['M']}, {d['H']}, {d['F']} | {d['precision']} | "
                   f"{'forward and backward' if d['backward'] else 'forward'} | {who} | "
                   f"{1e3 * d['seconds']:.3f} | {d['tflops']:.2f} | {share} |")
    return out


def table_models(lines):
    out = ["| model | what | precision | who | ms | tokens/s |", "|---|---|---|---|---|---|"]
    for d in lines:
        if "model" in d:
            out.append(f"| {d['model']} | {d['what']} | {d['precision']} | "
                       f"{d.get('peer', '**moe.h**')} | {1e3 * d['seconds']:.2f} | "
                       f"{d['tokens_per_second']:,.0f} |")
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("program")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--out", default=os.path.join(HERE, "results"))
    a = p.parse_args()
    command = [a.program, os.path.abspath(a.program) + ".kernels"] + ["--tiny"] * a.tiny
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    devices = [d["name"] for d in lines if d["what"] == "device"]
    if not devices:
        sys.exit(run.stderr.strip() or f"{a.program} ended with {run.returncode}")
    card = re.sub(r"^cuda:\d+ \(|,.*$", "", devices[0])
    peak = next((v for k, v in PEAKS.items() if re.search(rf"\b{k}", card)), None)
    notes = [f"Measured on {card} on {time.strftime('%Y-%m-%d')}, `make -C bench cuda`."]
    if run.returncode:
        notes.append(f"bench_cuda ended with {run.returncode}: {run.stderr.strip()}")
    notes += [f"{d['precision']}: {d['own']} products of linear layers by our own kernels, "
              f"{d['cublas']} by cuBLAS." for d in lines if d["what"] == "makers"]
    lines += measure_peers(a.tiny, notes.append)
    if peak:
        notes.append(f"Peak: {peak[0]} TFLOP/s fp32, {peak[1] or '-'} TF32, {peak[2] or '-'} bf16, "
                     f"{peak[3]} GB/s, as published.")
    page = [f"# moe.h on {card}", "", *[f"- {n}" for n in notes], "",
            "## Expert FFNs, four experts", "", *table_experts(lines, peak), "",
            "## MT-TaG, batches of 32 x 128 tokens", "", *table_models(lines), ""]
    os.makedirs(a.out, exist_ok=True)
    path = os.path.join(a.out, "cuda-" + re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-") + ".md")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(page))
    print("\n".join(page))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
