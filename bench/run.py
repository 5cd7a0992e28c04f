#!/usr/bin/env python3
"""Measures moe.h beside what a user would take instead, and writes bench/results.md. Run by `make -C bench`.

  run.py [--quick] [--sections train,infer,...] [--threads 1,2] [--rounds N] [--out bench/results.md]

Every program stays alive for the whole table and they take turns (A B A B ...) on the same cores; a ratio is the median of the ratios of the
rounds, a figure the median of the rounds, and behind it stands half the distance between the quartiles in per cent. Peers that cannot be
had are named and left out. Standard library only; the peers live in bench/venv, or in the folder that BENCH_VENV names.
"""
import argparse
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(HERE, "build")
VENV = os.environ.get("BENCH_VENV") or os.path.join(HERE, "venv")
PYTHON = os.path.join(VENV, "bin", "python")
PACKAGES = ["torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "transformers", "blis"]
DEBIAN = ["libblis4-openmp"]    # installed where this may: as root, with apt-get
# Where the tests run kernels of units that a machine lacks. Nothing here is a claim about speed.
EMULATED = {"NEON": "qemu-aarch64 (tests/test_machines.sh)", "NEON dot product": "qemu-aarch64 (tests/test_machines.sh)",
            "AMX-BF16": "its instructions one by one in C (tests/test_bf16.c, tests/amx.h)"}
ROUNDS = 0  # --rounds: instead of each section's own number
# glibc gives freed blocks back to the system and faults them in again at each step unless told otherwise; about 5 % for PyTorch
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "268435456"}
SHAPES = ["1x8", "1x32", "1x128", "8x32", "32x128"]
QUICK_SHAPES = ["1x8", "8x32", "32x128"]


class Unavailable(Exception):
    """A peer that cannot be had."""


class Program:
    """A served program: bench.h and serve.py tell the protocol."""

    def __init__(self, name, command, threads, environment=None):
        self.name = name
        self.pause = 0.06 if threads > 1 else 0
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), **(environment or {}))
        if threads > 1:
            env.setdefault("OMP_PROC_BIND", "true")     # two OpenMP threads on one core wait for each other a whole time slice
        for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
            env.pop(variable, None)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self.ready = self.read_json()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            why = self.process.stderr.read().strip().splitlines()
            raise Unavailable(f"{self.name}: {why[-1] if why else 'it ended'}")
        return line

    def read_json(self):
        while True:
            line = self.read()
            if line.startswith("{"):
                return json.loads(line)

    def seconds(self, budget, *words):
        """Median seconds of a call, repeated for `budget` seconds. Idle threads of OpenBLAS and others go on spinning for up to 30 ms after a
        call and would take a core from the next program: hence the pause."""
        time.sleep(self.pause)
        self.process.stdin.write(" ".join([str(budget), *words]) + "\n")
        self.process.stdin.flush()
        return float(self.read().split()[0])

    def finish(self):
        self.process.stdin.close()
        last = self.read_json()
        self.process.wait()
        return last


def start(programs, missing, name, command, threads, environment=None):
    """Adds a program to the list; one that cannot be had goes to `missing`."""
    try:
        programs.append(Program(name, command, threads, environment))
    except (Unavailable, OSError) as e:
        missing.append(str(e))
        print(f"  left out: {e}", flush=True)


def spread(values):
    """Half the distance between the quartiles, in per cent of the median."""
    if len(values) < 3:
        return 100 * (max(values) - min(values)) / 2 / statistics.median(values)
    q = statistics.quantiles(values, n=4, method="inclusive")
    return 100 * (q[2] - q[0]) / 2 / q[1]


def take_turns(programs, rounds, budget, *words):
    """{name: [seconds of each round]}"""
    times = {p.name: [] for p in programs}
    for _ in range(ROUNDS or rounds):
        for p in programs:
            times[p.name].append(p.seconds(budget, *words))
    return times


def ratio(ours, theirs):
    """How many times longer the peer takes: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(ours, theirs))


class Report:
    """results.md, written anew after each section, and echoed to the terminal."""

    def __init__(self, path, append):
        self.path, self.lines = path, []
        if append and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                self.lines = f.read().splitlines() + [""]

    def text(self, *lines):
        for line in lines:
            self.lines.append(line)
            print(line, flush=True)

    def table(self, head, rows):
        cells = [head] + [["" if c is None else str(c) for c in r] for r in rows]
        width = [max(len(r[i]) for r in cells) for i in range(len(head))]
        def line(r):
            return "| " + " | ".join(c.ljust(w) for c, w in zip(r, width)) + " |"
        self.text(line(cells[0]), "|" + "|".join("-" * (w + 2) for w in width) + "|", *(line(r) for r in cells[1:]), "")

    def save(self):
        with open(self.path, "w", encoding="utf-8") as f:
            f.write("\n".join(self.lines).rstrip() + "\n")


def output(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def prepare_peers():
    """Makes the venv and installs what is missing. Returns {package: version} of what is there."""
    if not os.path.exists(PYTHON):
        print(f"making {VENV} (some gigabytes, a few minutes)", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", VENV], check=False).returncode != 0:
            shutil.rmtree(VENV, ignore_errors=True)
            return {}
    for package in [p for p in PACKAGES if p not in versions()]:
        print(f"pip install {package}", flush=True)
        subprocess.run([PYTHON, "-m", "pip", "install", "-q", package], check=False)
    for package in DEBIAN:
        if shutil.which("apt-get") and os.geteuid() == 0 and "install ok" not in output(["dpkg-query", "-W", "-f", "${Status}", package]):
            print(f"apt-get install {package}", flush=True)
            output(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package])
    return versions()


def versions():
    code = ("import importlib.metadata as m, json, sys\nout = {}\nfor p in sys.argv[1:]:\n"
            "  try: out[p] = m.version(p)\n  except Exception: pass\nprint(json.dumps(out))")
    text = output([PYTHON, "-c", code, *PACKAGES])
    return json.loads(text) if text else {}


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            text = f.read()
    except OSError:
        return platform.processor() or platform.machine(), ""
    field = {k: (re.findall(rf"^{k}\s*: (.*)$", text, re.M) or ["?"])[0] for k in ("model name", "cpu family", "model", "stepping", "flags")}
    units = [u for u in ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8") if u in field["flags"].split()]
    return f"{field['model name']} (family {field['cpu family']}, model {field['model']}, stepping {field['stepping']})", " ".join(units)


def heading(report, have, threads):
    name, units = cpu_name()
    compiler = output([os.environ.get("CC", "cc"), "--version"]).splitlines()
    commit = output(["git", "-C", HERE, "rev-parse", "--short", "HEAD"])
    report.text("# Results of `make -C bench`", "",
                f"- date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC; commit {commit or 'unknown'}",
                f"- CPU: {name}, {len(os.sched_getaffinity(0))} cores used of {os.cpu_count()}; {units}",
                f"- compiler: {compiler[0] if compiler else 'cc'}, `-O2`; system: {platform.system()} {platform.release()}, Python {platform.python_version()}",
                "- peers: " + (", ".join(f"{p} {v}" for p, v in have.items()) or "none"),
                *([f"- left out (could not be installed): {', '.join(p for p in PACKAGES if p not in have)}"] if len(have) < len(PACKAGES) else []),
                f"- threads: {', '.join(map(str, threads))}. The programs of a table take turns on the same cores. A figure is the median of the rounds, behind it half "
                "the distance between the quartiles; a ratio is the median of the ratios of the rounds, above 1 where moe.h is faster.", "")


def rate(tokens, seconds):
    return f"{tokens / statistics.median(seconds):.0f} ±{spread(seconds):.0f} %"


def train_section(report, a):
    """MiniLM's size, N = 4, T = 8, 32 sequences, dropout 0.1, fp32 against PyTorch's fp32 and its bf16 autocast."""
    report.text("## Training step", "",
                "6 x 384, N = 4, T = 8, 32 sequences, dropout 0.1, clipping, Adam; tokens per second. PyTorch: one product per expert, fused Adam, "
                "`scaled_dot_product_attention`, an allocator that keeps its memory. Real lengths: 8 + 120 u², the same for all; PyTorch pads inside attention "
                "only, `sorted` = sorted by length in 4 groups. moe.h is fp32 here.", "")
    missing = []
    for threads in a.threads:
        rows = []
        for kind, variants in (("full", ["full"]), ("real", ["real", "sorted"])):
            programs = []
            command = [os.path.join(BUILD, "bench_step"), "train", "--threads", str(threads), "--serve"] + (["--real"] if kind == "real" else [])
            start(programs, missing, "moe.h", command, threads)
            amx = "amx_bf16" in cpu_name()[1]
            for precision in a.precisions if amx or (kind == "full" and not a.quick) else ["fp32"]:    # without AMX autocast is the slower of the two
                for v in variants:
                    if v == "real" and (a.quick or precision == "bf16" or threads != a.threads[0]):
                        continue    # in the order of the data: more padding, slower than sorted
                    start(programs, missing, f"PyTorch {precision}" + (f", {v}" if v != "full" else ""),
                          [PYTHON, os.path.join(HERE, "pytorch_step.py"), "--variant", f"tag,{precision},{v}", "--serve", "--warm", "1", "--threads", str(threads)],
                          threads, MALLOC)
            times = take_turns(programs, 3, 0)
            tokens = programs[0].ready["tokens"]
            for p in programs:
                peak = p.finish()["peak_mb"]
                own = p.name == "moe.h"
                rows.append([f"{tokens} tokens, {'32 x 128' if kind == 'full' else 'real lengths'}", p.name, rate(tokens, times[p.name]),
                             "" if own else f"{ratio(times['moe.h'], times[p.name]):.2f}", f"{peak:.0f}"])
        report.text(f"{threads} thread{'s' if threads > 1 else ''}:", "")
        report.table(["batch", "program", "tokens/s", "moe.h is faster by", "peak memory, MB"], rows)
    for m in missing:
        report.text(f"Left out: {m}", "")


def graph_files(report, a):
    """The folder with the files of ONNX Runtime and OpenVINO, made once."""
    folder = os.path.join(BUILD, "graphs")
    stamp = os.path.join(folder, "versions.json")
    if not os.path.exists(stamp) or open(stamp, encoding="utf-8").read() != json.dumps(a.have):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        done = subprocess.run([PYTHON, os.path.join(HERE, "graph_peers.py"), "--prepare", folder], capture_output=True, text=True, check=False)
        for line in done.stderr.splitlines():
            if line.startswith(("fusions", "graph_peers.py")):
                report.text(line, "")
        if done.returncode == 0:
            with open(stamp, "w", encoding="utf-8") as f:
                f.write(json.dumps(a.have))
    return folder


def infer_peers(threads, folder, missing, chosen):
    """The programs that are alive for all shapes: (name, script, arguments)."""
    programs = []
    for name, script, arguments in chosen:
        graph = script == "graph_peers.py"
        start(programs, missing, name, [PYTHON, os.path.join(HERE, script), *arguments, *(["--dir", folder] if graph else ["--serve"]), "--threads", str(threads)],
              threads, None if graph else MALLOC)
    return programs


def infer_times(a, threads, shape, own, peers, missing):
    """{name: [seconds of each round]} for one shape; own: [(name, options of bench_step)]."""
    batch, length = shape.split("x")
    ours = []
    for name, options in own:
        start(ours, missing, name, [os.path.join(BUILD, "bench_step"), "infer", *options, "--batch", batch, "--length", length, "--threads", str(threads),
                                    "--serve"], threads)
    times = {p.name: [] for p in ours + peers}
    for _ in range(ROUNDS or (3 if a.quick or int(batch) * int(length) >= 4096 else 5)):
        for p in ours:
            times[p.name].append(p.seconds(0.1 if a.quick else 0.2))
        for p in peers:
            times[p.name].append(p.seconds(0.1 if a.quick else 0.2, shape))
    finish(ours)
    return times


def infer_table(report, a, own, chosen, comparisons, threads_of_all_shapes=(1, 2)):
    """Tokens per second by batch x length, fewer shapes where the number of threads is none of the last argument's. comparisons: [(one of own, its rivals, what they are called)]; of several rivals the best counts."""
    missing = []
    folder = graph_files(report, a)
    for threads in a.threads:
        shapes = SHAPES if not a.quick and threads in threads_of_all_shapes else QUICK_SHAPES
        peers = infer_peers(threads, folder, missing, chosen)
        table = {s: infer_times(a, threads, s, own, peers, missing) for s in shapes}
        names = [n for n in table[shapes[0]] if all(n in table[s] for s in shapes)]
        rows = [[name] + [rate(int(s.split("x")[0]) * int(s.split("x")[1]), table[s][name]) for s in shapes] for name in names]
        for mine, rivals, label in comparisons:
            there = [r for r in rivals if r in names]
            if mine not in names or not there:
                continue
            best = [min(there, key=lambda r, s=s: statistics.median(table[s][r])) for s in shapes]
            rows.append([f"{mine} / {label}", *(f"{ratio(table[s][mine], table[s][b]):.2f}" + (f" ({b.split(',')[0]})" if len(rivals) > 1 else "")
                                                for s, b in zip(shapes, best))])
        finish(peers)
        report.text(f"{threads} thread{'s' if threads > 1 else ''}:", "")
        report.table(["tokens/s", *shapes], rows)
    for m in dict.fromkeys(missing):
        report.text(f"Left out: {m}", "")


def infer_section(report, a):
    report.text("## Inference", "",
                "fp32, 6 x 384, tokens per second by batch x length (all sequences of one length, so that nobody pads). Dense peers: transformers' BertModel with "
                "`scaled_dot_product_attention`, ONNX Runtime with its BERT fusions, OpenVINO with fixed shapes. MT-TaG: N = 4, T = 8, top-1, in moe.h and in PyTorch.", "")
    dense = ["PyTorch, transformers", "ONNX Runtime", "OpenVINO"]
    infer_table(report, a, [("moe.h dense", ["--system", "dense"]), ("moe.h TaG", ["--system", "tag"])],
                [(dense[0], "pytorch_infer.py", ["--variant", "transformers,fp32"]), ("PyTorch MT-TaG", "pytorch_infer.py", ["--variant", "tag,fp32"]),
                 (dense[1], "graph_peers.py", ["--serve", "ort"]), (dense[2], "graph_peers.py", ["--serve", "openvino"])],
                [("moe.h dense", dense, "best dense peer"), ("moe.h TaG", dense, "best dense peer"), ("moe.h TaG", ["PyTorch MT-TaG"], "PyTorch MT-TaG")])


def int8_section(report, a):
    report.text("## Inference, int8", "",
                "Weights of 8 bits with a scale for each output; activations quantised by row in moe.h, by tensor in ONNX Runtime (`quantize_dynamic` of the fused graph, "
                "per channel). Sizes and shapes as above; moe.h in fp32 for comparison.", "")
    infer_table(report, a, [("moe.h int8 dense", ["--system", "dense", "--precision", "int8"]), ("moe.h int8 TaG", ["--system", "tag", "--precision", "int8"]),
                            ("moe.h fp32 dense", ["--system", "dense"])],
                [("ONNX Runtime int8", "graph_peers.py", ["--serve", "ort", "--precision", "int8"])],
                [("moe.h int8 dense", ["ONNX Runtime int8"], "ONNX Runtime int8"), ("moe.h int8 TaG", ["ONNX Runtime int8"], "ONNX Runtime int8"),
                 ("moe.h int8 dense", ["moe.h fp32 dense"], "moe.h fp32 dense")], (1,))


def bf16_section(report, a):
    report.text("## Inference, bf16", "", "Operands in bf16, sums in fp32, where the processor has units for it (AMX, AVX512-BF16). OpenVINO is asked for bf16.", "")
    here = units()
    if not here.get("AMX-BF16") and not here.get("AVX512-BF16"):
        report.text("This processor has no units for bf16: nothing to measure.", "")
        return
    infer_table(report, a, [("moe.h bf16 dense", ["--system", "dense", "--precision", "bf16"]), ("moe.h bf16 TaG", ["--system", "tag", "--precision", "bf16"]),
                            ("moe.h fp32 dense", ["--system", "dense"])],
                [("OpenVINO bf16", "graph_peers.py", ["--serve", "openvino", "--precision", "bf16"])],
                [("moe.h bf16 dense", ["OpenVINO bf16"], "OpenVINO bf16"), ("moe.h bf16 TaG", ["OpenVINO bf16"], "OpenVINO bf16"),
                 ("moe.h bf16 dense", ["moe.h fp32 dense"], "moe.h fp32 dense")], (1,))


def units():
    """{instruction set or unit: 1 or 0}, as moe.h finds them on this machine."""
    text = output([os.path.join(BUILD, "bench_ops"), "--units"])
    return json.loads(text) if text.startswith("{") else {}


def unit_section(report, _):
    report.text("## Instruction sets", "", "What this machine can run, by its own CPUID, and where the tests run the rest. The tests force each kernel that a processor has "
                "(`moe_env.isa`, `moe_env.features`).", "")
    report.table(["kernels", "here"], [[name, "run on this hardware" if there else f"under emulation: {EMULATED[name]}" if name in EMULATED else "never"]
                                       for name, there in units().items()])


def serve_own(programs, missing, name, threads, *options):
    start(programs, missing, name, [os.path.join(BUILD, "bench_step"), *options, "--threads", str(threads), "--serve"], threads)


def op_programs(threads, missing, have_blas=True):
    programs = []
    start(programs, missing, "moe.h", [os.path.join(BUILD, "bench_ops"), "--threads", str(threads)], threads)
    start(programs, missing, "oneDNN (PyTorch)", [PYTHON, os.path.join(HERE, "op_peers.py"), "torch", "--threads", str(threads)], threads, MALLOC)
    if have_blas:
        for name, library in (("OpenBLAS (NumPy)", "openblas"), ("BLIS (PyPI)", "blis"), ("BLIS (Debian)", "libblis"), ("AOCL-BLIS", "aocl")):
            start(programs, missing, name, [PYTHON, os.path.join(HERE, "op_peers.py"), library, "--threads", str(threads)], threads,
                  {"OPENBLAS_NUM_THREADS": str(threads), "BLIS_NUM_THREADS": str(threads)})
    return programs


def finish(programs):
    for p in programs:
        p.finish()


def product_section(report, a):
    report.text("## Products", "",
                "fp32, y (m, n) = x (m, k) Wᵀ + b, weights packed beforehand (oneDNN: reordered, or the plain call where that is faster; the BLAS: transposed, without b), and the weight gradient of m tokens. "
                "GFLOP/s, share of the peak probed in the same run, ratio to the best peer. PyTorch's calls carry about 2 us of Python and dispatch, those of the BLAS about 1 us.", "")
    missing = []
    for threads in a.threads:
        programs = op_programs(threads, missing)
        peak = programs[0].ready["peak_gflops"]
        report.text(f"{threads} thread{'s' if threads > 1 else ''}, {programs[0].ready['isa']}, probed peak {peak:.0f} GFLOP/s:", "")
        rows = []
        plan = [("packed", (1, 4, 8, 32, 128, 512)), ("dw", (32, 128, 512, 4096))]
        shapes = ((1536, 384), (500, 333)) if a.quick else ((1536, 384), (384, 1536), (384, 384), (3072, 768), (768, 3072), (500, 333))
        for kind, sizes in plan:
            for n, k in shapes:
                for m in sizes[1::2] if a.quick else sizes:
                    if threads > 1 and ((n, k) not in ((1536, 384), (384, 1536)) or m in (4, 128)):
                        continue
                    times = take_turns(programs, 3, 0.015, f"{kind}:{n}:{k}:{m}")
                    figure = {p: 2e-9 * n * k * m / statistics.median(t) for p, t in times.items()}
                    best = max((f for p, f in figure.items() if p != "moe.h"), default=None)
                    best_name = next((p for p in figure if figure[p] == best and p != "moe.h"), None)
                    rows.append([kind, n, k, m, f"{figure['moe.h']:.0f} ±{spread(times['moe.h']):.0f} %", f"{100 * figure['moe.h'] / peak:.0f} %",
                                 *(f"{figure[p.name]:.0f}" for p in programs[1:]), f"{ratio(times['moe.h'], times[best_name]):.2f}" if best else ""])
        report.table(["kind", "n", "k", "m", "moe.h", "of peak", *(p.name for p in programs[1:]), "moe.h / best"], rows)
        finish(programs)
    for m in missing:
        report.text(f"Left out: {m}", "")


# name, bytes moved at least, floating-point operations (of products), for 32 sequences of 128 tokens
M, H, F, PARAMETERS = 4096, 384, 1536, 10000000
LAYERS = [("gelu", 8 * M * F, 0), ("gelu_back", 16 * M * F, 0), ("norm", 8 * M * H, 0), ("norm_back", 16 * M * H, 0), ("dropout", 8 * M * H, 0),
          ("embed", 8 * M * H, 0), ("embed_back", 12 * M * H, 0), ("attention", 16 * M * H, 4 * M * 128 * H), ("attention_back", 48 * M * H, 10 * M * 128 * H),
          ("route", 4 * M * H, 8 * M * H), ("route_back", 12 * M * H, 16 * M * H), ("experts", 0, 4 * M * H * F), ("experts_back", 0, 8 * M * H * F),
          ("adam", 32 * PARAMETERS, 0)]


def layer_section(report, a):
    report.text("## Layers", "",
                "One call for 32 x 128 tokens, H = 384, F = 1536, 12 heads, N = 4 (adam: 10 M weights), microseconds. The limit is the larger of bytes / bandwidth of a copy "
                "and operations / peak, both probed in the same run; bytes are those of the arrays of the call, each once. Arrays that fit a cache can go under it. PyTorch's "
                "embed adds no positions; its backward clears the whole table.", "")
    missing = []
    for threads in a.threads:
        programs = op_programs(threads, missing, have_blas=False)
        peak, copy = programs[0].ready["peak_gflops"], programs[0].ready["copy_gbytes"]
        rows = []
        for name, bytes_, flops in LAYERS:
            with_peer = programs if not name.startswith("route") else programs[:1]
            times = take_turns(with_peer, 3, 0.05, name)
            limit = max(bytes_ / copy, flops / peak) * 1e-3
            mine, peer = times["moe.h"], times.get("oneDNN (PyTorch)")
            rows.append([name, f"{1e6 * statistics.median(mine):.0f} ±{spread(mine):.0f} %", f"{limit:.0f}", f"{100 * limit / (1e6 * statistics.median(mine)):.0f} %",
                         f"{1e6 * statistics.median(peer):.0f}" if peer else "", f"{ratio(mine, peer):.2f}" if peer else ""])
        report.text(f"{threads} thread{'s' if threads > 1 else ''}, peak {peak:.0f} GFLOP/s, copy {copy:.1f} GB/s:", "")
        report.table(["op", "moe.h, us", "limit, us", "of limit", "PyTorch, us", "moe.h is faster by"], rows)
        finish(programs)
    for m in missing:
        report.text(f"Left out: {m}", "")


def process_cost(command, environment=None):
    """Wall seconds and peak MB of a process from its start to its end. PermissionError, OSError or a status that is not 0: Unavailable."""
    begin = time.perf_counter()
    try:
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1", **(environment or {})))
    except OSError as e:
        raise Unavailable(str(e)) from e
    error = p.stderr.read()
    _, status, usage = os.wait4(p.pid, 0)
    seconds = time.perf_counter() - begin
    p.returncode = os.waitstatus_to_exitcode(status)
    if p.returncode != 0:
        raise Unavailable(error.decode(errors="replace").strip().splitlines()[-1] if error.strip() else f"status {p.returncode}")
    return seconds, usage.ru_maxrss / 1024


def start_section(report, a):
    report.text("## Start and memory of a first answer", "",
                "A process from its start to its end with one answer for 16 tokens, one thread, dense MiniLM in fp32, files in the page cache. The program on ONNX Runtime is "
                "written in C and loads the library of the pip wheel and the fused graph.", "")
    folder = graph_files(report, a)
    models = {}
    for system in ("dense", "tag"):
        models[system] = os.path.join(BUILD, f"{system}.safetensors")
        subprocess.run([os.path.join(BUILD, "bench_start"), "--write", system, models[system]], check=True)
    library = output([PYTHON, "-c", "import glob, onnxruntime, os; print((glob.glob(os.path.dirname(onnxruntime.__file__) + '/capi/libonnxruntime.so*') or [''])[0])"])
    graph = os.path.join(folder, "fused.onnx")
    commands = {"moe.h, mapped file": [os.path.join(BUILD, "bench_start"), models["dense"]],
                "moe.h TaG (N = 4), mapped file": [os.path.join(BUILD, "bench_start"), models["tag"]],
                "C on ONNX Runtime, no further optimization": [os.path.join(BUILD, "bench_start_ort"), library, graph, "0"],
                "C on ONNX Runtime, all optimizations": [os.path.join(BUILD, "bench_start_ort"), library, graph, "99"],
                "Python, ONNX Runtime": [PYTHON, os.path.join(HERE, "graph_peers.py"), "--first", "ort", "--dir", folder],
                "Python, OpenVINO": [PYTHON, os.path.join(HERE, "graph_peers.py"), "--first", "openvino", "--dir", folder],
                "Python, PyTorch and transformers": [PYTHON, os.path.join(HERE, "pytorch_infer.py"), "--first"]}
    seconds, peak = {n: [] for n in commands}, {}
    for round_ in range(6):
        for name, command in list(commands.items()):
            if "Python" in name and round_ > 3:
                continue
            try:
                s, peak[name] = process_cost(command)
            except Unavailable as e:
                report.text(f"Left out: {name}: {e}", "")
                del commands[name]
                continue
            if round_ > 0:
                seconds[name].append(s)     # the first round fills the page cache
    own = seconds["moe.h, mapped file"]
    report.table(["program", "ms", "moe.h is sooner by", "peak memory, MB"],
                 [[n, f"{1e3 * statistics.median(seconds[n]):.0f} ±{spread(seconds[n]):.0f} %", f"{statistics.median(seconds[n]) / statistics.median(own):.1f}",
                   f"{peak[n]:.0f}"] for n in commands])


def scaling_rows(report, a, title, text, head, cases, threads=1, rounds=3):
    """A table of moe.h's own figures: cases is [(label, options, options of the reference)], rates in tokens/s, and the ratio to the reference."""
    report.text(f"## {title}", "", text, "")
    rows, missing, alive = [], [], []
    for label, options, reference in cases:
        words, count = reference if isinstance(reference, tuple) else (reference, threads)
        if not alive or alive[0] != (words, count):     # the reference of the row before may serve this one too
            finish(alive[1:])
            alive = []
            serve_own(alive, missing, "one", count, *words)
            alive.insert(0, (words, count))
        words, count = options if isinstance(options, tuple) else (options, threads)
        programs = [alive[1]]
        serve_own(programs, missing, "two", count, *words)
        times = take_turns(programs, rounds, 0.15)
        tokens = programs[1].ready["tokens"], programs[0].ready["tokens"]
        relative = statistics.median(t1 / tokens[1] / (t2 / tokens[0]) for t1, t2 in zip(times["one"], times["two"]))
        rows.append([*label, tokens[0], rate(tokens[0], times["two"]), f"{relative:.2f}", f"{programs[1].finish()['peak_mb']:.0f}"])
    finish(alive[1:])
    report.table([*head, "tokens", "tokens/s", "against the reference", "peak memory, MB"], rows)


def thread_section(report, a):
    cores = len(os.sched_getaffinity(0))
    cases = []
    all_cases = (("infer", "dense", 1, 8), ("infer", "dense", 1, 32), ("infer", "dense", 8, 32), ("infer", "dense", 32, 128), ("train", "tag", 32, 32))
    for mode, system, batch, length in all_cases[1:2] if a.quick else all_cases:
        options = [mode, "--system", system, "--batch", str(batch), "--length", str(length)]
        for t in sorted({2, cores, 2 * cores}):
            cases.append(([f"{mode} {system} {batch} x {length}", t], (options, t), (options, 1)))
    scaling_rows(report, a, "Threads", f"Reference: one thread. This machine has {cores} cores; the last row of each asks for twice as many threads.", ["what", "threads"], cases)


def token_section(report, a):
    cases = []
    for batch, length in ((1, 8), (1, 64), (4, 128), (16, 128), (32, 128)):
        cases.append(([f"infer TaG {batch} x {length}"], ["infer", "--batch", str(batch), "--length", str(length)], ["infer", "--system", "dense", "--batch", str(batch), "--length", str(length)]))
    for batch, length in ((1, 64), (4, 128), (16, 128)):
        cases.append(([f"train TaG {batch} x {length}, without update"], ["train", "--no-update", "--batch", str(batch), "--length", str(length)],
                      ["train", "--no-update", "--system", "dense", "--batch", str(batch), "--length", str(length)]))
    scaling_rows(report, a, "Tokens, and the cost of mixture of experts", "TaG (N = 4, top-1) against the dense model with the same operations per token (the reference), optimizer apart. One thread.",
                 ["what"], cases)


def expert_section(report, a):
    base = ["--layers", "2", "--batch", "16"]
    cases = [([f"infer, N = {n}"], ["infer", "--experts", str(n), *base], ["infer", "--experts", "1", *base]) for n in (1, 4, 16, 64)]
    cases += [([f"train, N = {n}, without update"], ["train", "--no-update", "--experts", str(n), *base], ["train", "--no-update", "--experts", "1", *base]) for n in (1, 4, 16)]
    scaling_rows(report, a, "Experts", "2 layers, 16 x 128, top-1, so that the operations stay and the weights grow. Reference: N = 1. One thread.", ["what"], cases, rounds=3)


def task_section(report, a):
    cases = []
    for mode in ("infer", "train"):
        options = [mode, "--layers", "2", *(["--no-update"] if mode == "train" else [])]
        cases += [([f"{mode}, T = {t}"], [*options, "--tasks", str(t)], [*options, "--tasks", "8"]) for t in (1, 8, 100, 1000)]
    scaling_rows(report, a, "Tasks", "2 layers, TaG, N = 4, 32 x 128; every sequence of the batch belongs to another task where there are enough. Reference: T = 8. One thread.", ["what"], cases)


SECTIONS = {"units": unit_section, "products": product_section, "layers": layer_section, "train": train_section, "infer": infer_section,
            "int8": int8_section, "bf16": bf16_section, "start": start_section, "threads": thread_section, "tokens": token_section, "experts": expert_section, "tasks": task_section}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="training step and inference unless --sections names others; fewer rounds, shapes and peers")
    p.add_argument("--sections", help="some of: " + ", ".join(SECTIONS))
    cores = len(os.sched_getaffinity(0))
    p.add_argument("--threads", default="1,2" if cores > 1 else "1")
    p.add_argument("--rounds", type=int, default=0, help="of every table, instead of its own number: 1 to see that all works")
    p.add_argument("--precisions", default="fp32,bf16", help="of PyTorch's training step")
    p.add_argument("--out", default=os.path.join(HERE, "results.md"))
    p.add_argument("--append", action="store_true", help="add to the file, with a heading of its own, instead of writing it anew")
    a = p.parse_args()
    global ROUNDS   # pylint: disable=global-statement
    ROUNDS = a.rounds
    a.threads = [int(t) for t in a.threads.split(",")]
    a.precisions = a.precisions.split(",")
    names = a.sections.split(",") if a.sections else ["train", "infer"] if a.quick else list(SECTIONS)
    unknown = [n for n in names if n not in SECTIONS]
    if unknown:
        sys.exit(f"run.py: no section {unknown[0]}; there are: {', '.join(SECTIONS)}")
    if subprocess.run(["make", "-s", "-C", HERE, "programs"], check=False).returncode != 0:
        sys.exit("run.py: the programs do not compile")
    begin = time.monotonic()
    report = Report(a.out, a.append)
    a.have = prepare_peers()
    prepared = time.monotonic()
    heading(report, a.have, a.threads)
    for name in names:
        SECTIONS[name](report, a)
        report.save()
    report.text(f"Measured in {time.monotonic() - prepared:.0f} s, after {prepared - begin:.0f} s of preparing the peers.", "")
    report.save()


if __name__ == "__main__":
    main()
