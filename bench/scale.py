#!/usr/bin/env python3
"""Training on more than one machine: what is measured here, and what a model of costs makes of it.
Writes bench/scale.md.

    python3 scale.py                  all, a quarter of an hour on two idle cores
    python3 scale.py --rounds 1 --seconds 2 --out FILE     quick

Measured: bench_scale (its first lines) with 1 and 2 ranks and with 2 threads, PyTorch's DDP beside
it, and 2 to 4 ranks in network namespaces joined by links of 1 Gbit/s, also with a delay (MPICH,
root and `ip` needed; left out where they are missing). The rounds take turns; medians are
reported."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
GBIT = 1e9 / 8
OVERHEAD = 1 + 78 / 1448  # Ethernet, IP and TCP around 1,448 bytes
MACHINES = (1, 2, 8, 64, 256, 1000)
NETS = (1, 25, 200)
TOKENS = 4096  # a rank and step
MEMORY = 64  # GB of a machine
MODELS = {  # layers, hidden, ffn, words, positions
    "MiniLM": (6, 384, 1536, 30522, 512),
    "BERT-base": (12, 768, 3072, 30522, 512),
    "BERT-large": (24, 1024, 4096, 30522, 512),
}


# ---- measuring ----


def run(command, env=None):
    """The JSON line of a program; None: it could not be run."""
    try:
        out = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env={**os.environ, **(env or {})}
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        print(f"left out: {e}", file=sys.stderr)
        return None
    lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
    if out.returncode or not lines:
        print(f"left out: {' '.join(command)}: {out.stderr[-300:]}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


def build(name, mpicc, source="bench_scale.c"):
    os.makedirs(os.path.join(HERE, "build"), exist_ok=True)
    path = os.path.join(HERE, "build", name)
    source = os.path.join(HERE, source)
    subprocess.run([mpicc, "-O2", "-o", path, source, "-lm", "-pthread"], check=True)
    return path


class Namespaces:
    """Network namespaces on a bridge, or on the switch of delay.c, which delivers frames after
    `delay` seconds; what each sends is limited to `rate`."""

    def __init__(self, n, rate, delay=0.0):
        self.n, self.rate, self.delay, self.switch = n, rate, delay, None

    def join(self):
        spaces = [f"moe{i}" for i in range(self.n)]
        for space in spaces:
            self.ip(f"netns add {space}")
        if self.delay:
            command = [build("delay", "cc", "delay.c"), f"{1e6 * self.delay:.0f}", *spaces]
            self.switch = subprocess.Popen(command, stdout=subprocess.PIPE)
            self.switch.stdout.readline()
            for space in spaces:
                self.ip(f"-n {space} link set eth0 mtu 9000")
            return
        self.ip("link add moebridge type bridge")
        self.ip("link set moebridge up")
        for i, space in enumerate(spaces):
            self.ip(f"link add moelink{i} type veth peer name eth0 netns {space}")
            self.ip(f"link set moelink{i} master moebridge up")

    def __enter__(self):
        self.__exit__()
        self.join()
        for i in range(self.n):
            self.ip(f"-n moe{i} addr add 10.77.0.{i + 1}/24 dev eth0")
            self.ip(f"-n moe{i} link set eth0 up")
            self.ip(f"-n moe{i} link set lo up")
            limit = f"qdisc add dev eth0 root tbf rate {self.rate} burst 256k latency 20ms"
            subprocess.run(["tc", "-n", f"moe{i}", *limit.split()], check=True)
        return self

    def __exit__(self, *_):
        if self.switch:
            self.switch.kill()
            self.switch.communicate()
        for i in range(4):
            self.ip(f"netns del moe{i}", check=False)
            self.ip(f"link del moelink{i}", check=False)
        self.ip("link del moebridge", check=False)

    def ip(self, words, check=True):
        subprocess.run(["ip", *words.split()], check=check, capture_output=True)


def over_links(program, mpiexec, ranks, options):
    command = [mpiexec]
    for i in range(ranks):
        command += ([":"] if i else []) + ["-n", "1", "ip", "netns", "exec", f"moe{i}", program]
        command += options
    own = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
    return run(command, {**own, "FI_TCP_IFACE": "eth0"})


def measure(a):
    """Name -> list of records."""
    program = build("bench_scale", "mpicc")
    mpirun = ["mpirun", "--bind-to", "core", "--allow-run-as-root", "--oversubscribe", "-n"]
    time = ["--seconds", str(a.seconds)]
    threads = ["mpirun", "--bind-to", "none", "--allow-run-as-root", "-n", "1", program]
    jobs = {
        "1 rank, 1 thread": lambda: run(mpirun + ["1", program] + time),
        "1 rank, 2 threads": lambda: run(threads + ["--threads", "2"] + time),
        "2 ranks": lambda: run(mpirun + ["2", program] + time),
        "2 ranks, --shard": lambda: run(mpirun + ["2", program, "--shard", "1"] + time),
        "2 ranks, --overlap": lambda: run(mpirun + ["2", program, "--overlap", "1"] + time),
    }
    if a.torch:
        ddp = [a.torch, os.path.join(HERE, "pytorch_ddp.py"), *time, "--ranks"]
        jobs["PyTorch, 1 process, 2 threads"] = lambda: run(ddp + ["1", "--threads", "2"])
        jobs["PyTorch DDP, 2 processes"] = lambda: run(ddp + ["2"])
    links = a.mpich and os.path.exists(f"{a.mpich}/bin/mpicc") and shutil.which("ip")
    if links and os.geteuid() == 0:
        mpich = build("bench_scale_mpich", f"{a.mpich}/bin/mpicc")
        for ranks in (2, 3, 4):
            for how in ("", "--shard", "--overlap") if ranks == 2 else ("",):

                def over(ranks=ranks, how=how):
                    with Namespaces(ranks, "1gbit"):
                        options = ([how, "1"] if how else []) + time
                        return over_links(mpich, f"{a.mpich}/bin/mpiexec", ranks, options)

                jobs[f"{ranks} ranks, 1 Gbit/s{', ' if how else ''}{how}"] = over
        for delay in (1e-4, 1e-3):

            def late(delay=delay):
                with Namespaces(2, "1gbit", delay):
                    return over_links(mpich, f"{a.mpich}/bin/mpiexec", 2, time)

            jobs[f"2 ranks, 1 Gbit/s, {1e3 * delay:g} ms"] = late
    records = {name: [] for name in jobs}
    for _ in range(a.rounds):
        for name, job in jobs.items():
            record = job()
            if record:
                records[name].append(record)
            print(name, record, file=sys.stderr, flush=True)
    return records


def of(records, name, key):
    values = [r[key] for r in records.get(name, []) if key in r]
    return statistics.median(values) if values else None


# ---- the model ----


def parameters(model, experts):
    """Weights of the encoder with `experts` FFNs in a layer, and of gates for 8 tasks."""
    layers, h, f, words, positions = MODELS[model]
    ffn = 2 * h * f + h + f
    layer = 4 * h * h + 4 * h + 4 * h + experts * ffn + 8 * experts * h
    return (words + positions + 2) * h + 2 * h + layers * layer


def operations(model):
    """Of forward and backward, a token: six for each weight that it meets (top-1: one expert)."""
    layers, h, f, _, _ = MODELS[model]
    return 6 * layers * (4 * h * h + 2 * h * f)


def exchange(n, ranks, rate, latency):
    """A ring all-reduce of n floats, or reduce-scatter and all-gather: the same bytes."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) / ranks * 4 * n * OVERHEAD / rate + 2 * (ranks - 1) * latency


def step(model, experts, ranks, gbit, shard, speed, update):
    """Seconds of a step in which each rank has TOKENS tokens: passes, exchange, update."""
    n = parameters(model, experts)
    passes = TOKENS * operations(model) / speed
    return (
        passes,
        exchange(n, ranks, gbit * GBIT, 20e-6),
        update * n / (ranks if shard else 1),
    )


def hidden(model, experts, ranks, gbit, speed, update):
    """What --overlap can save of a step at best: the exchange of all layers but the first, which
    backward computes last, as far as backward (two thirds of the passes) still has work."""
    layers, h, _, words, positions = MODELS[model]
    n = parameters(model, experts)
    layer = (n - (words + positions + 4) * h) / layers
    passes, sent, rest = step(model, experts, ranks, gbit, 0, speed, update)
    saved = min(sent * layer * (layers - 1) / n, passes * 2 / 3 * (layers - 1) / layers)
    return saved / (passes + sent + rest)


def memory(model, experts, ranks, shard):
    """GB of a rank: weights, gradients, two moments."""
    n = parameters(model, experts)
    return 4 * n * (2 + 2 / (ranks if shard else 1)) / 1e9


# ---- the page ----


def cell(v, digits=3):
    return "-" if v is None else f"{v:.{digits}f}"


def measured_table(records):
    yield "| | step, s | forward and backward | exchange | update | against 1 rank, 1 thread |"
    yield "|---|---|---|---|---|---|"
    one = of(records, "1 rank, 1 thread", "step")
    for name in records:
        v = [of(records, name, k) for k in ("step", "passes", "exchange", "update")]
        gain = "-" if not one or not v[0] else f"{one / v[0]:.2f}"
        yield f"| {name} | {' | '.join(cell(x) for x in v)} | {gain} |"


def check_table(records, n, memory_rate):
    """The model beside what was measured."""
    yield "| ranks | link | exchange measured, s | of the model | ratio |"
    yield "|---|---|---|---|---|"
    for name in records:
        if "ranks" not in name or "--" in name:
            continue
        ranks, link = int(name.split()[0]), name.partition(", ")[2] or "memory"
        seen = of(records, name, "exchange")
        rate = GBIT if link != "memory" else memory_rate
        late = float(link.split()[-2]) / 1e3 if link.endswith(" ms") else 0
        wanted = exchange(n, ranks, rate, 20e-6 + late)
        ratio = "-" if not seen else f"{seen / wanted:.2f}"
        yield f"| {ranks} | {link} | {cell(seen)} | {cell(wanted)} | {ratio} |"


def curve_table(shard, speed, update):
    heads = " | ".join(f"{p} at {g} Gbit/s" for g in NETS for p in (8, 64, 1000))
    yield f"| model, N | weights, millions | {heads} |"
    yield "|---|---|" + "---|" * (3 * len(NETS))
    for model in MODELS:
        for experts in (4, 64):
            cells = []
            for gbit in NETS:
                for p in (8, 64, 1000):
                    alone = sum(step(model, experts, 1, gbit, 0, speed, update))
                    together = sum(step(model, experts, p, gbit, shard, speed, update))
                    cells.append(f"{100 * alone / together:.0f} %")
            millions = parameters(model, experts) / 1e6
            yield f"| {model}, {experts} | {millions:.0f} | {' | '.join(cells)} |"


def overlap_table(speed, update):
    yield f"| model, N | {' | '.join(f'{gbit} Gbit/s' for gbit in NETS)} |"
    yield "|---|" + "---|" * len(NETS)
    for model in MODELS:
        for experts in (4, 64):
            saved = [hidden(model, experts, 8, gbit, speed, update) for gbit in NETS]
            yield f"| {model}, {experts} | {' | '.join(f'{100 * s:.1f} %' for s in saved)} |"


def memory_table():
    yield "| model, N | 1 rank | 2 | 8 | 1000 | experts to be spread |"
    yield "|---|---|---|---|---|---|"
    for model in MODELS:
        for experts in (4, 64, 256):
            gb = [memory(model, experts, p, 1) for p in (1, 2, 8, 1000)]
            fits = [p for p in MACHINES if memory(model, experts, p, 1) < MEMORY]
            spread = "yes" if not fits else "no" if fits[0] == 1 else f"no, from {fits[0]} ranks"
            sizes = " | ".join(f"{x:.1f}" for x in gb)
            yield f"| {model}, {experts} | {sizes} | {spread} |"


PAGE = """# More than one machine

`make -C bench scale`, {rounds} rounds in turns of {seconds:g} s each, medians. A step of MiniLM's
size (6 x 384, N = 4, {millions:.1f} million weights), 32 sequences of 128 tokens in all, dropout
0.1, fp32. Ranks have a core each.

## Measured

{measured}

Ranks on one machine exchange gradients through its memory. The links of 1 Gbit/s are network
namespaces whose senders are held to that rate (tbf). The kernel here cannot delay packets; where a
delay is told, a program does (delay.c: a switch between TAP devices, frames of 9,000 bytes), which
takes some of the two cores as well. Where 3 and 4 ranks share two cores, only the exchange is of
use, and it waits for the slowest rank; why 3 take longer than 4 was not
looked into (MPI may take another all-reduce where the number of ranks is no power of two).

## The model of costs

A step of P ranks takes forward and backward (as measured, by the operations of a token), a ring
all-reduce of n floats (2 (P-1)/P 4n bytes, {headers:.0f} % for headers, 20 us a round), and the
update (as measured, by weight; with --shard a P-th of it), one after the other. For memory the
rate is what 2 ranks measured ({memory_rate:.1f} GB/s), so that line is no test; those of 1 Gbit/s
are.

{check}

Efficiency when each rank has {tokens} tokens a step on a processor as fast as one core here
({gflops:.0f} GFLOP/s): the time of one rank by that of P. A faster processor needs a faster network
in proportion. An expectation, not a measurement. More than 100 % with
--shard: each rank updates a P-th of the weights, one rank alone all of them.

Without --shard:

{plain}

With --shard:

{shard}

What --overlap can save of a step of 8 ranks at best: a layer's gradients travel while backward
computes the layers before it; the embeddings, whose gradients come last, and the first layer do
not. The table takes an MPI that moves messages while the processor computes; most do so only within
their own calls, of which there is one after each op.

{overlap}

## Where experts would have to be spread

GB of a rank for weights, gradients and moments, with --shard; {gb} GB are taken as a machine's.
Experts kept on ranks of their own (all-to-all of tokens) pay from where weights and gradients alone
no longer fit, or where the exchange of the gradients of N experts is the larger part of a step.

{memory}
"""


def page(records, a):
    one = "1 rank, 1 thread"
    n = (records[one] or [{}])[0].get("parameters") or parameters("MiniLM", 4)
    passes, update = of(records, one, "passes"), of(records, one, "update")
    speed = TOKENS * operations("MiniLM") / passes
    two = of(records, "2 ranks", "exchange")
    memory_rate = 4 * n * OVERHEAD / two if two else 1e10
    return PAGE.format(
        rounds=a.rounds,
        seconds=a.seconds,
        millions=n / 1e6,
        measured="\n".join(measured_table(records)),
        headers=100 * (OVERHEAD - 1),
        memory_rate=memory_rate / 1e9,
        check="\n".join(check_table(records, n, memory_rate)),
        tokens=TOKENS,
        gflops=speed / 1e9,
        plain="\n".join(curve_table(0, speed, update / n)),
        shard="\n".join(curve_table(1, speed, update / n)),
        overlap="\n".join(overlap_table(speed, update / n)),
        gb=MEMORY,
        memory="\n".join(memory_table()),
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=8)
    p.add_argument("--torch", help="a Python that has PyTorch")
    p.add_argument("--mpich", help="a folder with MPICH's bin (of a venv: pip install mpich)")
    p.add_argument("--records", help="take (or keep) the measurements in this JSON file")
    p.add_argument("--out", default=os.path.join(HERE, "scale.md"))
    a = p.parse_args()
    if a.records and os.path.exists(a.records):
        with open(a.records, encoding="utf-8") as f:
            records = json.load(f)
    else:
        records = measure(a)
        if a.records:
            with open(a.records, "w", encoding="utf-8") as f:
                json.dump(records, f, indent=1)
    with open(a.out, "w", encoding="utf-8") as f:
        f.write(page(records, a))


if __name__ == "__main__":
    main()
