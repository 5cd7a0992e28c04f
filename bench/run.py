#!/usr/bin/env python3
"""Measures moe.h beside what a user would take instead, and writes bench/results.md. Run by `make -C bench`.

  run.py [--sections train,infer,...] [--threads 1,2] [--quick | --dry] [--out bench/results.md] [--models A,B --data DIR]

Every program stays alive for the whole table and they take turns (A B A B ...) on the same cores; a ratio is the median of the ratios of the
rounds, a figure the median of the rounds, and behind it stands half the distance between the quartiles in per cent. A peer that is more than a
quarter slower than the best one in the first round is not asked again; a section that falls behind its plan has fewer rounds, never fewer rows.
--sections measures some anew and keeps the others of the file; --quick: fewer shapes, into build/quick.md; --dry: one call of everything, into
build/dry.md, to see that all works. Section accuracy needs trained models (accuracy.py). Peers that cannot be had are named and left out. Standard
library only; the peers live in bench/venv, or in the folder that BENCH_VENV names.
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

import accuracy
from report import Report
from turns import PACE, Unavailable, finish, in_threads, left_out, rate, ratio, spread, start, take_turns

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(HERE, "build")
VENV = os.environ.get("BENCH_VENV") or os.path.join(HERE, "venv")
PYTHON = os.path.join(VENV, "bin", "python")
PACKAGES = ["torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "transformers", "blis"]
DEBIAN = ["libblis4-openmp"]    # installed where this may: as root, with apt-get
# Where the tests run what a machine lacks. Nothing here is a claim about speed.
TESTED = {"scalar": "test_simd, test_gemm, test_machines.sh (also big-endian, qemu-s390x)", "AVX2 + FMA": "test_simd, test_gemm", "AVX-512": "test_simd, test_gemm",
          "NEON": "test_machines.sh", "AVX-VNNI": "test_lowp", "AVX512-VNNI": "test_lowp", "NEON dot product": "test_machines.sh (test_lowp)",
          "AVX512-BF16": "test_bf16", "AMX-BF16": "test_bf16", "AMX-INT8": "test_lowp"}
EMULATED = {"NEON": "qemu-aarch64", "NEON dot product": "qemu-aarch64", "AMX-BF16": "its instructions one by one in C (tests/amx.h)",
            "AMX-INT8": "its instructions one by one in C (tests/amx.h)"}
# glibc gives freed blocks back to the system and faults them in again at each step unless told otherwise; about 5 % for PyTorch
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "268435456"}
SHAPES = ["1x8", "1x32", "1x128", "8x32", "32x128"]
QUICK_SHAPES = ["1x8", "8x32", "32x128"]


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


def compiler():
    lines = output([os.environ.get("CC", "cc"), "--version"]).splitlines()
    return lines[0] if lines else "cc"


def stamp():
    commit = output(["git", "-C", HERE, "rev-parse", "--short", "HEAD"])
    return f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, commit {commit or 'unknown'}"


def heading(report, have, threads):
    name, flags = cpu_name()
    before = report.machine()
    report.begin_heading()
    report.text("# Results of `make -C bench`", "",
                f"- CPU: {name}, {len(os.sched_getaffinity(0))} cores used of {os.cpu_count()}; {flags}",
                f"- last written: {stamp()}; each section says when it was measured",
                f"- compiler: {compiler()}, `-O2`; system: {platform.system()} {platform.release()}, Python {platform.python_version()}",
                "- peers: " + (", ".join(f"{p} {v}" for p, v in have.items()) or "none"),
                *([f"- left out (could not be installed): {', '.join(p for p in PACKAGES if p not in have)}"] if len(have) < len(PACKAGES) else []),
                f"- threads: {', '.join(map(str, threads))}. The programs of a table take turns on the same cores. A figure is the median of the rounds, behind it half "
                "the distance between the quartiles; a ratio is the median of the ratios of the rounds, above 1 where moe.h is faster. A peer that is more than a quarter "
                "slower than the best one was asked once.", "")
    if before and before != report.machine():
        print("another machine than the file's: its sections go", flush=True)
        kept = SECTIONS["accuracy"][0]      # is not a matter of the machine
        report.sections, report.figures = {t: s for t, s in report.sections.items() if t == kept}, {}


def own_step(*options):
    """The command of bench_step, served; in a dry run of a smaller model and batch."""
    return [os.path.join(BUILD, "bench_step"), *options, "--serve", *(["--layers", "1", "--batch", "2", "--length", "16"] if PACE.dry else [])]


def train_programs(a, kind, threads, missing):
    """moe.h in fp32 and, where there are units, in bf16; PyTorch in both, real lengths in the order of the data and sorted."""
    step = own_step("train", "--threads", str(threads), *(["--real"] if kind == "real" else []))
    wanted = [("moe.h fp32", step, threads)]
    if has_bf16():
        wanted.append(("moe.h bf16", [*step, "--precision", "bf16"], threads))
    for precision in ("fp32", "bf16"):
        for v in ("full",) if kind == "full" else ("sorted",) if a.quick or precision == "bf16" else ("real", "sorted"):
            wanted.append((f"PyTorch {precision}" + (f", {v}" if v != "full" else ""),
                           [PYTHON, os.path.join(HERE, "pytorch_step.py"), "--variant", f"tag,{precision},{v}", "--serve", "--warm", "1", "--threads", str(threads)],
                           threads, MALLOC))
    return start(missing, *wanted)


def train_figures(report, threads, kind, times, peak):
    """The summary: speed against PyTorch's best, and memory against the process of that."""
    peers = [n for n in times if n.startswith("PyTorch")]
    if not peers:
        return
    best = min(peers, key=lambda n: statistics.median(times[n]))
    what = f"{'32 x 128' if kind == 'full' else 'real lengths'}, {in_threads(threads)}"
    seen = ratio(times["moe.h fp32"], times[best])
    asked = 1.6 if kind == "full" else 2
    report.figure(f"training step fp32, {what}, / PyTorch's best", f"{asked}", f"{seen:.2f} ({best})", seen >= asked)
    if "moe.h bf16" in times:
        seen = ratio(times["moe.h bf16"], times[best])
        here = units()
        asked = 4 if here.get("AMX-BF16") else 2.5
        quicker = here.get("AMX-BF16") or ratio(times["moe.h bf16"], times["moe.h fp32"]) > 1.05
        report.figure(f"training step bf16, {what}, / PyTorch's best", f"{asked} with AMX" if asked == 4 else "2.5 where bf16 beats fp32", f"{seen:.2f} ({best})",
                      seen >= asked if quicker else "not asked: bf16 is no faster than fp32 on this processor")
    if kind == "full":
        least = min(peak[n] for n in peers)
        report.figure(f"peak memory of training, {what}, / PyTorch's", "at most 0.8", f"{peak['moe.h fp32'] / least:.2f}", peak["moe.h fp32"] <= 0.8 * least)


def train_section(report, a):
    """MiniLM's size, N = 4, T = 8, 32 sequences, dropout 0.1, against PyTorch's fp32 and its bf16 autocast."""
    report.text("6 x 384, N = 4, T = 8, 32 sequences, dropout 0.1, clipping, Adam; tokens per second. PyTorch: one product per expert, fused Adam, "
                "`scaled_dot_product_attention`, an allocator that keeps its memory, bf16 by autocast. Real lengths: 8 + 120 u², the same for all; PyTorch pads inside attention "
                "only, `sorted` = sorted by length in 4 groups.", "")
    if not has_bf16():
        report.text("moe.h in bf16: this processor has no units for it, and training goes on in fp32.", "")
    missing = []
    PACE.expect(2 * len(a.threads))
    for threads in a.threads:
        rows = []
        for kind in ("full", "real"):
            programs = train_programs(a, kind, threads, missing)
            times = take_turns(programs, 3, 0)
            tokens = programs[0].ready["tokens"]
            peak = {p.name: p.finish()["peak_mb"] for p in programs}
            for p in programs:
                rows.append([f"{tokens} tokens, {'32 x 128' if kind == 'full' else 'real lengths'}", p.name, rate(tokens, times[p.name]),
                             *("" if p.own or mine not in times else f"{ratio(times[mine], times[p.name]):.2f}" for mine in ("moe.h fp32", "moe.h bf16")),
                             f"{peak[p.name]:.0f}"])
            train_figures(report, threads, kind, times, peak)
            report.memory += [(f"training step, {rows[-1][0]}, {in_threads(threads)}", n, mb) for n, mb in peak.items()]
        report.text(f"{in_threads(threads)}:", "")
        report.table(["batch", "program", "tokens/s", "moe.h fp32 is faster by", "moe.h bf16 is faster by", "peak memory, MB"], rows)
    left_out(report, missing)


GRAPHS = os.path.join(BUILD, "graphs")


def prepare_graphs(have):
    """The files of ONNX Runtime and OpenVINO, made once for the versions that are there."""
    version = os.path.join(GRAPHS, "versions.json")
    if not os.path.exists(version) or open(version, encoding="utf-8").read() != json.dumps(have):
        print("exporting the graphs of ONNX Runtime and OpenVINO", flush=True)
        shutil.rmtree(GRAPHS, ignore_errors=True)
        os.makedirs(GRAPHS)
        done = subprocess.run([PYTHON, os.path.join(HERE, "graph_peers.py"), "--prepare", GRAPHS], capture_output=True, text=True, check=False)
        with open(os.path.join(GRAPHS, "fusions.txt"), "w", encoding="utf-8") as f:
            f.writelines(line + "\n" for line in done.stderr.splitlines() if line.startswith(("fusions", "graph_peers.py")))
        if done.returncode == 0:
            with open(version, "w", encoding="utf-8") as f:
                f.write(json.dumps(have))


def infer_programs(threads, own, peers, missing):
    """own: [(name, options of bench_step)], peers: [(name, script, arguments)]. All of them take BATCHxLENGTH as their word."""
    wanted = [(name, own_step("infer", *options, "--batch", "1", "--length", "8", "--threads", str(threads)), threads) for name, options in own]
    for name, script, arguments in peers:
        graph = script == "graph_peers.py"
        wanted.append((name, [PYTHON, os.path.join(HERE, script), *arguments, *(["--dir", GRAPHS] if graph else ["--serve"]), "--threads", str(threads)],
                       threads, None if graph else MALLOC))
    return start(missing, *wanted)


def tokens_of(shape):
    batch, length = shape.split("x")
    return int(batch) * int(length)


def infer_table(report, a, own, peers, comparisons, always=()):
    """Tokens per second by batch x length. comparisons: [(one of own, its rivals, what they are called, what is asked by shape or None)]; of several
    rivals the best counts. What is asked may be a pair: and words that say why it is not asked here."""
    missing = []
    shapes = SHAPES[:2] if PACE.dry else QUICK_SHAPES if a.quick else SHAPES
    PACE.expect(len(shapes) * len(a.threads))
    for threads in a.threads:
        programs = infer_programs(threads, own, peers, missing)
        table = {s: take_turns(programs, 3 if tokens_of(s) >= 4096 else 5, 0.15, s, always=always) for s in shapes}
        names = [p.name for p in programs]
        rows = [[name] + [rate(tokens_of(s), table[s][name]) for s in shapes] for name in names]
        peak = {p.name: p.finish()["peak_mb"] for p in programs}
        for row in rows:
            row.append(f"{peak[row[0]]:.0f}")
        for mine, rivals, label, asked in comparisons:
            there = [r for r in rivals if r in names]
            if mine not in names or not there:
                continue
            best = {s: min(there, key=lambda r, s=s: statistics.median(table[s][r])) for s in shapes}
            seen = {s: ratio(table[s][mine], table[s][best[s]]) for s in shapes}
            rows.append([f"{mine} / {label}", *(f"{seen[s]:.2f}" + (f" ({best[s].split(',')[0]})" if len(rivals) > 1 else "") for s in shapes), ""])
            if asked is None:
                continue
            asked, unless = asked if isinstance(asked, tuple) else (asked, "")
            short = [s for s in shapes if round(seen[s], 2) < asked[s]]
            report.figure(f"inference, {mine} / {label}, {in_threads(threads)}: " + " / ".join(shapes), " / ".join(f"{asked[s]:g}" for s in shapes),
                          " / ".join(f"{seen[s]:.2f}" for s in shapes), unless or (not short if len(short) in (0, len(shapes)) else "**short** at " + ", ".join(short)))
        report.memory += [(f"inference, {label_of(report)}, up to {shapes[-1]}, {in_threads(threads)}", n, mb) for n, mb in peak.items()]
        report.text(f"{in_threads(threads)}:", "")
        report.table(["tokens/s", *shapes, "peak memory, MB"], rows)
    left_out(report, missing)


def label_of(report):
    return "fp32" if report.title == "Inference" else report.title.split(", ")[-1]


ASKED_FP32 = {s: {"1x8": 1.8, "1x32": 1.6}.get(s, 1.2) for s in SHAPES}
ASKED_BF16 = {s: {"1x8": 1.5}.get(s, 1.2) for s in SHAPES}
ASKED_INT8 = {s: 1.3 for s in SHAPES}


def infer_section(report, a):
    report.text("fp32, 6 x 384, tokens per second by batch x length (all sequences of one length, so that nobody pads). Dense peers: transformers' BertModel with "
                "`scaled_dot_product_attention`, ONNX Runtime with its BERT fusions, OpenVINO with fixed shapes. MT-TaG: N = 4, T = 8, top-1, in moe.h and in PyTorch.", "")
    if os.path.exists(os.path.join(GRAPHS, "fusions.txt")):
        report.text(*open(os.path.join(GRAPHS, "fusions.txt"), encoding="utf-8").read().splitlines(), "")
    dense = ["PyTorch, transformers", "ONNX Runtime", "OpenVINO"]
    infer_table(report, a, [("moe.h dense", ["--system", "dense"]), ("moe.h TaG", ["--system", "tag"])],
                [(dense[0], "pytorch_infer.py", ["--variant", "transformers,fp32"]), ("PyTorch MT-TaG", "pytorch_infer.py", ["--variant", "tag,fp32"]),
                 (dense[1], "graph_peers.py", ["--serve", "ort"]), (dense[2], "graph_peers.py", ["--serve", "openvino"])],
                [("moe.h dense", dense, "best dense peer", ASKED_FP32), ("moe.h TaG", dense, "best dense peer", ASKED_FP32),
                 ("moe.h TaG", ["PyTorch MT-TaG"], "PyTorch MT-TaG", ASKED_FP32)], always=("PyTorch MT-TaG",))


def int8_section(report, a):
    report.text("Weights of 8 bits with a scale for each output; activations quantised by row in moe.h, by tensor in ONNX Runtime (`quantize_dynamic` of the fused graph, "
                "per channel). Sizes and shapes as above; moe.h in fp32 for comparison.", "")
    infer_table(report, a, [("moe.h int8 dense", ["--system", "dense", "--precision", "int8"]), ("moe.h int8 TaG", ["--system", "tag", "--precision", "int8"]),
                            ("moe.h fp32 dense", ["--system", "dense"])],
                [("ONNX Runtime int8", "graph_peers.py", ["--serve", "ort", "--precision", "int8"])],
                [("moe.h int8 dense", ["ONNX Runtime int8"], "ONNX Runtime int8", ASKED_INT8), ("moe.h int8 TaG", ["ONNX Runtime int8"], "ONNX Runtime int8", None),
                 ("moe.h int8 dense", ["moe.h fp32 dense"], "moe.h fp32 dense", None)])


def bf16_section(report, a):
    report.text("Operands in bf16, sums in fp32, where the processor has units for it (AMX, AVX512-BF16). OpenVINO is asked for bf16.", "")
    if not has_bf16():
        report.text("This processor has no units for bf16: nothing to measure.", "")
        report.figure("inference, bf16 / OpenVINO bf16", "1.5 / 1.2", "", "not asked: no units for bf16")
        return
    asked = (ASKED_BF16, "" if units().get("AMX-BF16") else "not asked: no AMX")
    infer_table(report, a, [("moe.h bf16 dense", ["--system", "dense", "--precision", "bf16"]), ("moe.h bf16 TaG", ["--system", "tag", "--precision", "bf16"]),
                            ("moe.h fp32 dense", ["--system", "dense"])],
                [("OpenVINO bf16", "graph_peers.py", ["--serve", "openvino", "--precision", "bf16"])],
                [("moe.h bf16 dense", ["OpenVINO bf16"], "OpenVINO bf16", asked), ("moe.h bf16 TaG", ["OpenVINO bf16"], "OpenVINO bf16", None),
                 ("moe.h bf16 dense", ["moe.h fp32 dense"], "moe.h fp32 dense", None)])


def units():
    """{instruction set or unit: 1 or 0}, as moe.h finds them on this machine."""
    text = output([os.path.join(BUILD, "bench_ops"), "--units"])
    return json.loads(text) if text.startswith("{") else {}


def has_bf16():
    return bool(units().get("AMX-BF16") or units().get("AVX512-BF16"))


def unit_section(report, _):
    report.text("What this machine can run, by its own CPUID, and where the tests run the rest: they force each kernel that a processor has (`moe_env.isa`, `moe_env.features`).", "")
    report.table(["kernels", "ran", "tests"], [[name, "on this hardware" if there else f"under emulation: {EMULATED[name]}" if name in EMULATED else "never", TESTED.get(name, "")]
                                               for name, there in units().items()])


def op_programs(threads, missing, have_blas=True):
    script = [PYTHON, os.path.join(HERE, "op_peers.py")]
    wanted = [("moe.h", [os.path.join(BUILD, "bench_ops"), "--threads", str(threads)], threads),
              ("oneDNN (PyTorch)", [*script, "torch", "--threads", str(threads)], threads, MALLOC)]
    first = start(missing, wanted[0])   # alone: it probes the peak
    libraries = (("OpenBLAS (NumPy)", "openblas"), ("BLIS (PyPI)", "blis"), ("BLIS (Debian)", "libblis"), ("AOCL-BLIS", "aocl")) if have_blas else ()
    wanted += [(name, [*script, library, "--threads", str(threads)], threads, {"OPENBLAS_NUM_THREADS": str(threads), "BLIS_NUM_THREADS": str(threads)})
               for name, library in libraries]
    return first + start(missing, *wanted[1:])


def worst(report, name, asked, seen, text, verdict=None):
    """A line of the summary for the least of {row: ratio}; `text` says how a ratio is written."""
    if not seen:
        return
    least = min(seen, key=seen.get)
    below = sum(round(v, 2) < asked for v in seen.values())
    report.figure(name, text(asked), f"{text(seen[least])} ({least})" + (f"; {below} of {len(seen)} below" if below else ""), verdict or not below)


def per_cent(x):
    return f"{100 * x:.0f} %"


def product_figures(report, threads, share, against):
    """share, against: {(kind, n, k, m): ratio} to the peak and to the best peer."""
    def named(chosen):
        return {f"{n} x {k}, m = {m}": v for (_, n, k, m), v in chosen.items()}
    long = {key: v for key, v in share.items() if key[0] == "packed" and key[2] == 384 and key[3] >= 32}
    rest = {key: v for key, v in share.items() if key[0] == "packed" and key[3] >= 8 and key not in long}
    worst(report, f"fp32 product, k = 384, m = 32 .. 512, {in_threads(threads)}: share of the peak", 0.85, named(long), per_cent)
    worst(report, f"fp32 product elsewhere, m >= 8, {in_threads(threads)}: share of the peak", 0.75, named(rest), per_cent)
    worst(report, f"fp32 product, m >= 4, {in_threads(threads)}, / best peer", 1.0, named({k: v for k, v in against.items() if k[0] == "packed" and k[3] >= 4}),
          lambda x: f"{x:.2f}")
    worst(report, f"weight gradient, 32 .. 4096 tokens, {in_threads(threads)}, / best peer", 0.97, named({k: v for k, v in against.items() if k[0] == "dw"}),
          lambda x: f"{x:.2f}")


def product_section(report, a):
    report.text("fp32, y (m, n) = x (m, k) Wᵀ + b, weights packed beforehand (oneDNN: reordered, or the plain call where that is faster; the BLAS: transposed, without b), and the weight gradient of m tokens. "
                "GFLOP/s, share of the peak probed in the same run, ratio to the best peer. PyTorch's calls carry about 2 us of Python and dispatch, those of the BLAS about 1 us.", "")
    missing = []
    small = a.quick or PACE.dry
    shapes = ((1536, 384), (500, 333))[PACE.dry:] if small else ((1536, 384), (384, 1536), (384, 384), (3072, 768), (768, 3072), (500, 333))
    plan = [(kind, n, k, m) for kind, sizes in (("packed", (1, 4, 8, 32, 128, 512)), ("dw", (32, 128, 512, 4096))) for n, k in shapes for m in (sizes[1::2] if small else sizes)]
    PACE.expect(len(plan) * len(a.threads))
    for threads in a.threads:
        programs = op_programs(threads, missing)
        peak = programs[0].ready["peak_gflops"]
        report.text(f"{in_threads(threads)}, {programs[0].ready['isa']}, probed peak {peak:.0f} GFLOP/s:", "")
        rows, share, against = [], {}, {}
        for kind, n, k, m in plan:
            times = take_turns(programs, 3, 0.015, f"{kind}:{n}:{k}:{m}")
            figure = {p: 2e-9 * n * k * m / statistics.median(t) for p, t in times.items()}
            best = max((p for p in figure if p != "moe.h"), key=figure.get, default=None)
            share[kind, n, k, m] = figure["moe.h"] / peak
            if best:
                against[kind, n, k, m] = ratio(times["moe.h"], times[best])
            rows.append([kind, n, k, m, f"{figure['moe.h']:.0f} ±{spread(times['moe.h']):.0f} %", per_cent(figure["moe.h"] / peak),
                         *(f"{figure[p.name]:.0f}" for p in programs[1:]), f"{against[kind, n, k, m]:.2f}" if best else ""])
        report.table(["kind", "n", "k", "m", "moe.h", "of peak", *(p.name for p in programs[1:]), "moe.h / best"], rows)
        product_figures(report, threads, share, against)
        finish(programs)
    left_out(report, missing)


# name, bytes moved at least, floating-point operations (of products), for 32 sequences of 128 tokens
M, H, F, PARAMETERS = 4096, 384, 1536, 10000000
LAYERS = [("gelu", 8 * M * F, 0), ("gelu_back", 16 * M * F, 0), ("norm", 8 * M * H, 0), ("norm_back", 16 * M * H, 0), ("dropout", 8 * M * H, 0),
          ("embed", 8 * M * H, 0), ("embed_back", 12 * M * H, 0), ("attention", 16 * M * H, 4 * M * 128 * H), ("attention_back", 48 * M * H, 10 * M * 128 * H),
          ("route", 4 * M * H, 8 * M * H), ("route_back", 12 * M * H, 16 * M * H), ("experts", 0, 4 * M * H * F), ("experts_back", 0, 8 * M * H * F),
          ("adam", 32 * PARAMETERS, 0)]


def layer_section(report, a):
    report.text("One call for 32 x 128 tokens, H = 384, F = 1536, 12 heads, N = 4 (adam: 10 M weights), microseconds. The limit is the larger of bytes / bandwidth of a copy "
                "and operations / peak, both probed in the same run; bytes are those of the arrays of the call, each once. Arrays that fit a cache can go under it. PyTorch's "
                "embed adds no positions; its backward clears the whole table.", "")
    missing = []
    PACE.expect(len(LAYERS) * len(a.threads))
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
        report.text(f"{in_threads(threads)}, peak {peak:.0f} GFLOP/s, copy {copy:.1f} GB/s:", "")
        report.table(["op", "moe.h, us", "limit, us", "of limit", "PyTorch, us", "moe.h is faster by"], rows)
        finish(programs)
    left_out(report, missing)


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


def start_commands():
    models = {system: os.path.join(BUILD, f"{system}.safetensors") for system in ("dense", "tag")}
    for system, path in models.items():
        subprocess.run([os.path.join(BUILD, "bench_start"), "--write", system, path], check=True)
    library = output([PYTHON, "-c", "import glob, onnxruntime, os; print((glob.glob(os.path.dirname(onnxruntime.__file__) + '/capi/libonnxruntime.so*') or [''])[0])"])
    graph = os.path.join(GRAPHS, "fused.onnx")
    return {"moe.h, mapped file": [os.path.join(BUILD, "bench_start"), models["dense"]],
            "moe.h TaG (N = 4), mapped file": [os.path.join(BUILD, "bench_start"), models["tag"]],
            "C on ONNX Runtime, no further optimization": [os.path.join(BUILD, "bench_start_ort"), library, graph, "0"],
            "C on ONNX Runtime, all optimizations": [os.path.join(BUILD, "bench_start_ort"), library, graph, "99"],
            "Python, ONNX Runtime": [PYTHON, os.path.join(HERE, "graph_peers.py"), "--first", "ort", "--dir", GRAPHS],
            "Python, OpenVINO": [PYTHON, os.path.join(HERE, "graph_peers.py"), "--first", "openvino", "--dir", GRAPHS],
            "Python, PyTorch and transformers": [PYTHON, os.path.join(HERE, "pytorch_infer.py"), "--first"]}


def start_section(report, _):
    report.text("A process from its start to its end with one answer for 16 tokens, one thread, dense MiniLM in fp32, files in the page cache. The program on ONNX Runtime is "
                "written in C and loads the library of the pip wheel and the fused graph.", "")
    commands = start_commands()
    seconds, peak = {n: [] for n in commands}, {}
    for round_ in range(2 if PACE.dry else 6):
        for name, command in list(commands.items()):
            if round_ > 3 and "Python" in name or round_ > 2 and statistics.median(seconds[name]) > 2:
                continue
            try:
                s, peak[name] = process_cost(command)
            except Unavailable as e:
                report.text(f"Left out: {name}: {e}", "")
                del commands[name]
                continue
            if round_ > 0:
                seconds[name].append(s)     # the first round fills the page cache
    median = {n: statistics.median(seconds[n]) for n in commands}
    own, peers = "moe.h, mapped file", [n for n in commands if not n.startswith("moe.h")]
    report.table(["program", "ms", "moe.h is sooner by", "peak memory, MB"],
                 [[n, f"{1e3 * median[n]:.0f} ±{spread(seconds[n]):.0f} %", f"{median[n] / median[own]:.1f}", f"{peak[n]:.0f}"] for n in commands])
    report.memory += [("first answer, 16 tokens", n, peak[n]) for n in commands]
    for kind, asked in (("C on", True), ("Python", False)):
        there = [n for n in peers if n.startswith(kind)]
        if there:
            soonest = min(there, key=median.get)
            seen = median[soonest] / median[own]
            report.figure(f"first answer of a cold process, sooner than {soonest}", "5" if asked else "told", f"{seen:.1f}", seen >= 5 if asked else "")


def memory_section(report, _):
    """No run of its own: the peaks of the processes of train, infer, int8, bf16 and start."""
    report.text("Largest resident set of the processes of the tables before, in MB, PyTorch's and the Python peers' interpreter included; the ratio is moe.h's first row of a group to the row.", "")
    rows, groups = [], {}
    for what, name, mb in report.memory:
        groups.setdefault(what, []).append((name, mb))
    for what, members in groups.items():
        rows += [[what, name, f"{mb:.0f}", "" if name.startswith("moe.h") else f"{members[0][1] / mb:.2f}"] for name, mb in members]
        peers = [mb for name, mb in members if not name.startswith("moe.h")]
        if peers and what.startswith(("inference, fp32", "first answer")):
            seen = members[0][1] / min(peers)
            report.figure(f"peak memory, {what}, dense, / leanest peer", "at most 0.5", f"{seen:.2f}", seen <= 0.5)
    report.table(["what", "process", "MB", "moe.h / it"], rows)


def scaling_rows(report, text, head, cases, threads=1, rounds=3):
    """A table of moe.h's own figures: cases is [(label, options, options of the reference)], rates in tokens/s, and the ratio to the reference.
    Options may be a pair with the number of threads. Returns [(label, tokens, ratio)]."""
    if text:
        report.text(text, "")
    rows, out, missing, alive, served = [], [], [], None, None
    for label, options, reference in cases:
        words, count = reference if isinstance(reference, tuple) else (reference, threads)
        if served != (words, count):    # the reference of the row before may serve this one too
            finish([alive] if alive else [])
            alive, = start(missing, ("one", own_step(*words, "--threads", str(count)), count)) or [None]
            served = (words, count)
        words, count = options if isinstance(options, tuple) else (options, threads)
        other, = start(missing, ("two", own_step(*words, "--threads", str(count)), count)) or [None]
        if not alive or not other:
            PACE.done += 1
            continue
        times = take_turns([alive, other], rounds, 0.15)
        tokens = other.ready["tokens"], alive.ready["tokens"]
        relative = statistics.median(t1 / tokens[1] / (t2 / tokens[0]) for t1, t2 in zip(times["one"], times["two"]))
        rows.append([*label, tokens[0], rate(tokens[0], times["two"]), f"{relative:.2f}", f"{other.finish()['peak_mb']:.0f}"])
        out.append((label, tokens[0], relative))
    finish([alive] if alive else [])
    report.table([*head, "tokens", "tokens/s", "against the reference", "peak memory, MB"], rows)
    left_out(report, missing)
    return out


def thread_section(report, a):
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        report.text("One core: nothing to measure.", "")
        return
    cases = []
    work = (("infer", "dense", 1, 8), ("infer", "dense", 1, 32), ("infer", "tag", 8, 32), ("infer", "dense", 8, 32), ("infer", "dense", 32, 128), ("train", "tag", 32, 32))
    for mode, system, batch, length in work[1:2] if a.quick else work:
        options = [mode, "--system", system, "--batch", str(batch), "--length", str(length)]
        cases += [([f"{mode} {system} {batch} x {length}", t], (options, t), (options, 1)) for t in sorted({2, cores, 2 * cores})]
    PACE.expect(len(cases))
    seen = scaling_rows(report, f"Reference: one thread. This machine has {cores} cores; the last row of each asks for twice as many threads.", ["what", "threads"], cases)
    worst(report, "two threads / one, from 32 tokens on", 1.8, {label[0]: r for label, tokens, r in seen if label[1] == 2 and tokens >= 32}, lambda x: f"{x:.2f}")
    full = {label[0]: r for label, _, r in seen if label[1] == cores}
    worst(report, "twice as many threads as cores / as many as cores", 0.97, {label[0]: r / full[label[0]] for label, _, r in seen if label[1] == 2 * cores and label[0] in full},
          lambda x: f"{x:.2f}")


def token_section(report, a):
    report.text("TaG (N = 4, top-1) against the dense model with the same operations per token (the reference), optimizer apart.", "")
    work = [("infer", 1, 8), ("infer", 1, 64), ("infer", 4, 128), ("infer", 16, 128), ("infer", 32, 128), ("train", 1, 64), ("train", 4, 128), ("train", 16, 128)]
    plan = [(t, w) for t in a.threads for w in work if t == a.threads[0] or w[1] * w[2] in (512, 4096) or w == work[-1]]
    PACE.expect(len(plan))
    for threads in a.threads:
        cases = []
        for mode, batch, length in (w for t, w in plan if t == threads):
            options = [mode, "--batch", str(batch), "--length", str(length), *(["--no-update"] if mode == "train" else [])]
            cases.append(([f"{mode} TaG {batch} x {length}" + (", without update" if mode == "train" else "")], options, [*options, "--system", "dense"]))
        seen = scaling_rows(report, f"{in_threads(threads)}:", ["what"], cases, threads)
        for mode, asked in (("train", 0.9), ("infer", 0.95)):
            worst(report, f"TaG / dense of the same operations, {mode}, >= 512 tokens, {in_threads(threads)}", asked,
                  {label[0]: r for label, tokens, r in seen if label[0].startswith(mode) and tokens >= 512}, lambda x: f"{x:.2f}")


def expert_section(report, _):
    base = ["--layers", "2", "--batch", "16"]
    cases = [([f"{mode}, N = {n}" + (", without update" if update else "")], [mode, *update, "--experts", str(n), *base], [mode, *update, "--experts", "1", *base])
             for mode, update in (("infer", []), ("train", ["--no-update"])) for n in (1, 4, 16, 64)]
    PACE.expect(len(cases))
    scaling_rows(report, "2 layers, 16 x 128, top-1, so that the operations stay and the weights grow. Reference: N = 1. One thread.", ["what"], cases)


def task_section(report, a):
    report.text("2 layers, TaG, N = 4, 32 x 64; every sequence of the batch belongs to another task where there are enough. Reference: T = 8, optimizer apart. The row T = 8 shows "
                "what two equal runs differ by.", "")
    counts = {t: (1, 8, 100, 1000) if t == a.threads[0] else (1000,) for t in a.threads}
    PACE.expect(sum(2 * len(c) for c in counts.values()))
    for threads in a.threads:
        cases = []
        for mode in ("infer", "train"):
            options = [mode, "--layers", "2", "--length", "64", *(["--no-update"] if mode == "train" else [])]
            cases += [([f"{mode}, T = {t}"], [*options, "--tasks", str(t)], [*options, "--tasks", "8"]) for t in counts[threads]]
        seen = scaling_rows(report, f"{in_threads(threads)}:", ["what"], cases, threads, rounds=5)
        worst(report, f"1000 tasks / 8 tasks, {in_threads(threads)}", 0.97, {label[0]: r for label, _, r in seen if "1000" in label[0]}, lambda x: f"{x:.2f}")


def accuracy_section(report, a):
    if not a.models or not a.data:
        sys.exit("run.py: section accuracy needs --models FILE,FILE... and --data DIR (trained by examples/train.c)")
    report.text("Trained models (`./train --systems dense,tag --save NAME`, a file for each system and seed) on the dev sets of their tasks, x 100: mean and deviation over the models, in "
                "brackets the change from fp32. int8 by `./convert IN OUT --int8`, bf16 by `./predict --precision bf16`. Measured by `run.py --sections accuracy --models FILE,FILE... "
                "--data DIR`.", "")
    head, rows, missing = accuracy.table(a.models.split(","), a.data, a.tasks.split(","), ["fp32"] if PACE.dry else ["fp32", "bf16", "int8"])
    report.table(head, rows)
    left_out(report, missing)


# What a section is called, what measures it, and the seconds that it is to take on two cores of a Xeon with AVX-512: 540 in all.
SECTIONS = {"units": ("Instruction sets", unit_section, 1), "products": ("Products", product_section, 100), "layers": ("Layers", layer_section, 35),
            "train": ("Training step", train_section, 125), "infer": ("Inference", infer_section, 80), "int8": ("Inference, int8", int8_section, 35),
            "bf16": ("Inference, bf16", bf16_section, 40), "start": ("Start and memory of a first answer", start_section, 22),
            "memory": ("Memory", memory_section, 1), "threads": ("Threads", thread_section, 28),
            "tokens": ("Tokens, and the cost of mixture of experts", token_section, 35), "experts": ("Experts", expert_section, 20),
            "tasks": ("Tasks", task_section, 18), "accuracy": ("Accuracy of the precisions", accuracy_section, 900)}
ALL = [n for n in SECTIONS if n != "accuracy"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="training step and inference unless --sections names others; fewer shapes and peers")
    p.add_argument("--dry", action="store_true", help="one call of everything, few shapes: to see that all works")
    p.add_argument("--sections", help="some of: " + ", ".join(SECTIONS))
    p.add_argument("--threads", default="1,2" if len(os.sched_getaffinity(0)) > 1 else "1")
    p.add_argument("--minutes", type=float, default=9, help="what all sections together are to take")
    p.add_argument("--out", help="default: results.md; build/quick.md and build/dry.md of --quick and --dry")
    p.add_argument("--models", help="section accuracy: files of trained models")
    p.add_argument("--data", help="section accuracy: a folder with TASK/dev.tsv")
    p.add_argument("--tasks", default="RTE,MRPC,STS-B", help="section accuracy")
    a = p.parse_args()
    a.threads = [int(t) for t in a.threads.split(",")]
    a.names = a.sections.split(",") if a.sections else ["units", "train", "infer"] if a.quick else ALL
    a.out = a.out or os.path.join(*([BUILD, "dry.md"] if a.dry else [BUILD, "quick.md"] if a.quick else [HERE, "results.md"]))
    unknown = [n for n in a.names if n not in SECTIONS]
    if unknown:
        sys.exit(f"run.py: no section {unknown[0]}; there are: {', '.join(SECTIONS)}")
    return a


def main():
    a = arguments()
    if subprocess.run(["make", "-s", "-C", HERE, "programs"], check=False).returncode != 0:
        sys.exit("run.py: the programs do not compile")
    begin = time.monotonic()
    have = prepare_peers()
    if {"infer", "int8", "bf16", "start"} & set(a.names):
        prepare_graphs(have)
    prepared = time.monotonic()
    report = Report(a.out, [title for title, _, _ in SECTIONS.values()], keep=not (a.dry or a.quick))
    heading(report, have, a.threads)
    share = a.minutes * 60 / sum(SECTIONS[n][2] for n in ALL)
    print("planned seconds: " + ", ".join(f"{n} {share * SECTIONS[n][2]:.0f}" for n in SECTIONS if n in a.names), flush=True)
    for name in [n for n in SECTIONS if n in a.names]:
        title, measure, planned = SECTIONS[name]
        if name == "memory" and not report.memory:
            continue    # nothing that it could tell has run
        PACE.start(share * planned, a.dry)
        report.begin(title)
        measure(report, a)
        took = time.monotonic() - PACE.begin
        report.end(f"Measured {stamp()}, in {took:.0f} s" + (f", threads {','.join(map(str, a.threads))}" if a.threads != [1, 2] else "") + ".", "")
        print(f"{name}: {took:.0f} s, planned {share * planned:.0f}", flush=True)
    print(f"All in {time.monotonic() - prepared:.0f} s, after {prepared - begin:.0f} s of preparing the peers: {a.out}", flush=True)


if __name__ == "__main__":
    main()
