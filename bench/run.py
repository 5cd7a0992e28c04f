#!/usr/bin/env python3
"""Measures moe.h beside what a user would take instead, and writes bench/results/speed.json and
bench/results.md. Run by `make -C bench`.

  run.py [--sections train,infer,...] [--threads 1,2] [--quick | --dry] [--out FILE]
         [--models A,B --data DIR]

Every program stays alive for the whole table and they take turns (A B A B ...) on the same cores; a
ratio is the median of the ratios of the
rounds, a figure the median of the rounds, and behind it stands half the distance between the
quartiles in per cent. Each program has at least three
rounds, short ones where it is slow, and five where they are not long. Rounds before which something
else used a core count only where too few others remain. A row whose rounds were disturbed gets more
of them, and a section before and after which the
processor's peak differs is measured again; the tables say where that did not help.
--sections measures some anew and keeps the others of the file; --quick: fewer shapes, into
build/quick.md; --dry: one call of everything, into
build/dry.md, to see that all works. Section accuracy needs trained models (accuracy.py). Peers that
cannot be had are named and left out. Standard
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
from limits import LIMITS, moved
from pytorch_step import MALLOC
from report import Report
from turns import (
    DISTURBED,
    PACE,
    Program,
    Unavailable,
    by_threads,
    finish,
    in_threads,
    left_out,
    rate,
    ratio,
    spread,
    start,
    take_turns,
    tell_disturbed,
)

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(HERE, "build")
VENV = os.environ.get("BENCH_VENV") or os.path.join(HERE, "venv")
PYTHON = os.path.join(VENV, "bin", "python")
PACKAGES = [
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "transformers",
    "blis",
]
DEBIAN = ["libblis4-openmp"]  # installed where this may: as root, with apt-get
# Where the tests run what a machine lacks. Nothing here is a claim about speed.
TESTED = {
    "scalar": (
        "kernels/simd.c, kernels/gemm.c, test_machines.sh (also 32-bit ARM, RISC-V and, big-"
        "endian, s390x, by qemu)"
    ),
    "AVX2 + FMA": "kernels/simd.c, kernels/gemm.c",
    "AVX-512": "kernels/simd.c, kernels/gemm.c",
    "NEON": "test_machines.sh",
    "AVX-VNNI": "kernels/lowp.c",
    "AVX512-VNNI": "kernels/lowp.c",
    "NEON dot product": "test_machines.sh (kernels/lowp.c)",
    "AVX512-BF16": "kernels/bf16.c",
    "AMX-BF16": "kernels/bf16.c",
    "AMX-INT8": "kernels/lowp.c",
}
EMULATED = {
    "NEON": "qemu-aarch64",
    "NEON dot product": "qemu-aarch64",
    "AMX-BF16": "its instructions one by one in C (tests/amx.h)",
    "AMX-INT8": "its instructions one by one in C (tests/amx.h)",
}
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
        if (
            shutil.which("apt-get")
            and os.geteuid() == 0
            and "install ok" not in output(["dpkg-query", "-W", "-f", "${Status}", package])
        ):
            print(f"apt-get install {package}", flush=True)
            output(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package])
    return versions()


def versions():
    code = (
        "import importlib.metadata as m, json, sys\nout = {}\nfor p in sys.argv[1:]:\n"
        "  try: out[p] = m.version(p)\n  except Exception: pass\nprint(json.dumps(out))"
    )
    text = output([PYTHON, "-c", code, *PACKAGES])
    return json.loads(text) if text else {}


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            text = f.read()
    except OSError:
        return platform.processor() or platform.machine(), ""
    field = {
        k: (re.findall(rf"^{k}\s*: (.*)$", text, re.M) or ["?"])[0]
        for k in ("model name", "cpu family", "model", "stepping", "flags")
    }
    units = [
        u
        for u in (
            "avx2",
            "fma",
            "avx512f",
            "avx512_bf16",
            "avx512_vnni",
            "avx_vnni",
            "amx_tile",
            "amx_bf16",
            "amx_int8",
        )
        if u in field["flags"].split()
    ]
    return (
        (
            f"{field['model name']} (family {field['cpu family']}, model {field['model']}, stepping"
            f" {field['stepping']})"
        ),
        " ".join(units),
    )


def compiler():
    lines = output([os.environ.get("CC", "cc"), "--version"]).splitlines()
    return lines[0] if lines else "cc"


def stamp():
    commit = output(["git", "-C", HERE, "rev-parse", "--short", "HEAD"])
    return (
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, commit"
        f" {commit or 'unknown'}"
    )


def heading(report, have, threads):
    name, flags = cpu_name()
    before = report.machine()
    report.begin_heading()
    report.text(
        "# Results of `make -C bench`",
        "",
        f"- CPU: {name}, {len(os.sched_getaffinity(0))} cores used of {os.cpu_count()}; {flags}",
        f"- last written: {stamp()}; all tables are in `results/speed.json`, each section with its"
        " date",
        f"- compiler: {compiler()}, `-O2`; system: {platform.system()} {platform.release()}, Python"
        f" {platform.python_version()}",
        "- peers: " + (", ".join(f"{p} {v}" for p, v in have.items()) or "none"),
        *(
            [
                "- left out (could not be installed):"
                f" {', '.join(p for p in PACKAGES if p not in have)}"
            ]
            if len(have) < len(PACKAGES)
            else []
        ),
        f"- threads: {', '.join(map(str, threads))}. The programs of a table take turns on the same"
        " cores. A figure is the median of the rounds, behind it half the distance between the"
        " quartiles; a ratio is the median of the ratios of the rounds, above 1 where moe.h is"
        " faster. Three rounds at least; those before which something else used a core are left"
        " out where three others remain. A row is called disturbed where the median of the rounds"
        f" of a program is more than {100 * DISTURBED - 100:.0f} % above the fastest.",
        "",
    )
    if before and before != report.machine():
        print("another machine than the file's: its sections go", flush=True)
        kept = SECTIONS["accuracy"][0]  # is not a matter of the machine
        report.sections, report.figures = {
            t: s for t, s in report.sections.items() if t == kept
        }, {}


def own_step(*options):
    """The command of bench_step, served; in a dry run of a smaller model and batch."""
    return [
        os.path.join(BUILD, "bench_step"),
        *options,
        "--serve",
        *(["--layers", "1", "--batch", "2", "--length", "16"] if PACE.dry else []),
    ]


def train_programs(a, kind, missing):
    """moe.h in fp32 and, where there are units, in bf16; PyTorch in both, real lengths in the order
    of the data and sorted."""
    step = own_step("train", *(["--real"] if kind == "real" else []))
    wanted = [("moe.h fp32", step, a.threads)]
    if has_bf16():
        wanted.append(("moe.h bf16", [*step, "--precision", "bf16"], a.threads))
    for precision in ("fp32", "bf16"):
        for v in (
            ("full",)
            if kind == "full"
            else ("sorted",) if a.quick or precision == "bf16" else ("real", "sorted")
        ):
            wanted.append(
                (
                    f"PyTorch {precision}" + (f", {v}" if v != "full" else ""),
                    [
                        PYTHON,
                        os.path.join(HERE, "pytorch_step.py"),
                        "--variant",
                        f"tag,{precision},{v}",
                        "--serve",
                        "--warm",
                        "0",
                    ],
                    a.threads,
                    MALLOC,
                )
            )
    return start(missing, *wanted)


KINDS = {"full": "32 x 128", "real": "real lengths"}


def train_figures(report, threads, kind, times, count):
    """The summary: speed against PyTorch's best."""
    peers = [n for n in times if n.startswith("PyTorch")]
    if not peers or "moe.h fp32" not in times:
        return
    best = min(peers, key=lambda n: statistics.median(times[n]))
    what = f"{KINDS[kind]}, {in_threads(threads)}"
    seen = ratio(times["moe.h fp32"], times[best])
    asked = 1.6 if kind == "full" else 2
    report.figure(
        f"training step fp32, {what}, / PyTorch's best",
        f"{asked}",
        f"{seen:.2f} ({best})",
        round(seen, 2) >= asked,
        f"{LIMITS.bound(times[best], count, threads):.2f}",
    )
    if "moe.h bf16" in times:
        seen, own = ratio(times["moe.h bf16"], times[best]), ratio(
            times["moe.h bf16"], times["moe.h fp32"]
        )
        amx = units().get("AMX-BF16")
        asked = 4 if amx else 2.5
        report.figure(
            f"training step bf16, {what}, / PyTorch's best",
            "4 with AMX" if amx else "2.5 where bf16 beats fp32",
            f"{seen:.2f} ({best})",
            (
                seen >= asked
                if amx or own > 1.05
                else f"not asked: no AMX, and moe.h in bf16 has {own:.2f} of its speed in fp32 here"
            ),
        )


def warm_up(programs, word, threads):
    """Steps that do not count: PyTorch's allocator needs two or three until it has all the memory
    that it wants, and they take twice as long as those
    that follow. The C programs see to it themselves."""
    begin = time.perf_counter()
    for p in programs:
        for _ in range(0 if PACE.dry else 2):
            p.call(0, word, threads)
    Program.clock["starting"] += time.perf_counter() - begin


def train_section(report, a):
    """MiniLM's size, N = 4, T = 8, 32 sequences, dropout 0.1, against PyTorch's fp32 and its bf16
    autocast."""
    report.text(
        "6 x 384, N = 4, T = 8, 32 sequences, dropout 0.1, clipping, Adam; tokens per second."
        " PyTorch: one product per expert, fused Adam, `scaled_dot_product_attention`, an allocator"
        " that keeps its memory, bf16 by autocast. Real lengths: 8 + 120 u², the same for all;"
        " PyTorch pads inside attention only, `sorted` = sorted by length in 4 groups.",
        "",
    )
    if not has_bf16():
        report.text(
            "moe.h in bf16: this processor has no units for it, and training goes on in fp32.", ""
        )
    missing, rows = [], {t: [] for t in a.threads}
    PACE.expect(2 * len(a.threads))
    for kind, what in KINDS.items():
        programs = train_programs(a, kind, missing)
        tokens = programs[0].ready["tokens"]
        word, most, times, peak = "2x16" if PACE.dry else "32x128", max(a.threads), {}, None
        warm_up([p for p in programs if not p.own], word, most)
        for threads in sorted(a.threads, reverse=True):
            times[threads] = take_turns(
                f"{what}, {in_threads(threads)}", programs, 3, 0, (word, threads)
            )
            peak = peak or {
                p.name: p.peak() for p in programs
            }  # later a process holds what it had for other numbers of threads as well
        for threads in a.threads:
            train_figures(report, threads, kind, times[threads], programs[0].count)
            rows[threads] += [
                [
                    f"{tokens} tokens, {what}",
                    p.name,
                    rate(tokens, times[threads][p.name]),
                    *(
                        (
                            ""
                            if p.own or mine not in times[threads]
                            else f"{ratio(times[threads][mine], times[threads][p.name]):.2f}"
                        )
                        for mine in ("moe.h fp32", "moe.h bf16")
                    ),
                ]
                for p in programs
            ]
        finish({0: programs})
        report.memory.update(
            {(f"training step, {tokens} tokens, {what}", n): mb for n, mb in peak.items()}
        )
        peers = [mb for n, mb in peak.items() if n.startswith("PyTorch")]
        if peers:
            seen = peak["moe.h fp32"] / min(peers)
            report.figure(
                f"peak memory of training, {what}, / PyTorch's least",
                "at most 0.8",
                f"{seen:.2f}",
                seen <= 0.8,
            )
    for threads in a.threads:
        report.text(f"{in_threads(threads)}:", "")
        report.table(
            ["batch", "program", "tokens/s", "moe.h fp32 is faster by", "moe.h bf16 is faster by"],
            rows[threads],
        )
    tell_disturbed(report)
    left_out(report, missing)


GRAPHS = os.path.join(BUILD, "graphs")


def prepare_graphs(have):
    """The files of ONNX Runtime and OpenVINO, made once for the versions that are there."""
    version = os.path.join(GRAPHS, "versions.json")
    if not os.path.exists(version) or open(version, encoding="utf-8").read() != json.dumps(have):
        print("exporting the graphs of ONNX Runtime and OpenVINO", flush=True)
        shutil.rmtree(GRAPHS, ignore_errors=True)
        os.makedirs(GRAPHS)
        done = subprocess.run(
            [PYTHON, os.path.join(HERE, "graph_peers.py"), "--prepare", GRAPHS],
            capture_output=True,
            text=True,
            check=False,
        )
        with open(os.path.join(GRAPHS, "fusions.txt"), "w", encoding="utf-8") as f:
            f.writelines(
                line + "\n"
                for line in done.stderr.splitlines()
                if line.startswith(("fusions", "graph_peers.py"))
            )
        if done.returncode == 0:
            with open(version, "w", encoding="utf-8") as f:
                f.write(json.dumps(have))


def infer_programs(a, own, peers, missing):
    """{threads: programs}. own: [(name, options of bench_step)], peers: [(name, script,
    arguments)]. All of them take BATCHxLENGTH as their word. ONNX
    Runtime and OpenVINO have a process for each number of threads, since a second session would add
    to its memory.
    """
    wanted = [
        (name, own_step("infer", *options, "--batch", "1", "--length", "8"), a.threads)
        for name, options in own
    ]
    for name, script, arguments in peers:
        if script == "graph_peers.py":
            wanted += [
                (
                    name,
                    [
                        PYTHON,
                        os.path.join(HERE, script),
                        *arguments,
                        "--dir",
                        GRAPHS,
                        "--threads",
                        str(t),
                    ],
                    t,
                )
                for t in a.threads
            ]
        else:
            wanted.append(
                (
                    name,
                    [PYTHON, os.path.join(HERE, script), *arguments, "--serve"],
                    a.threads,
                    MALLOC,
                )
            )
    return by_threads(a, start(missing, *wanted))


def tokens_of(shape):
    batch, length = shape.split("x")
    return int(batch) * int(length)


def infer_table(report, a, own, peers, comparisons):
    """Tokens per second by batch x length. comparisons: [(one of own, its rivals, what they are
    called, what is asked by shape or None)]; of several
    rivals the best counts. What is asked may be a pair: and words that say why it is not asked
    here.
    """
    missing = []
    shapes = SHAPES[:2] if PACE.dry else QUICK_SHAPES if a.quick else SHAPES
    PACE.expect(len(shapes) * len(a.threads))
    everyone = infer_programs(a, own, peers, missing)
    for threads, programs in everyone.items():
        names = [p.name for p in programs]
        table, count = {}, {}
        for s in shapes:
            table[s] = take_turns(f"{s}, {in_threads(threads)}", programs, 5, 0.1, (s, threads))
            count[s] = {p.name: p.count for p in programs}
        if threads == a.threads[0]:
            report.memory.update(
                {
                    (f"inference, {label_of(report)}, up to {shapes[-1]}", p.name): p.peak()
                    for p in programs
                }
            )
        rows = [[name] + [rate(tokens_of(s), table[s][name]) for s in shapes] for name in names]
        for mine, rivals, label, asked in comparisons:
            there = [r for r in rivals if r in names]
            if mine not in names or not there:
                continue
            best = {
                s: min(there, key=lambda r, s=s: statistics.median(table[s][r])) for s in shapes
            }
            seen = {s: ratio(table[s][mine], table[s][best[s]]) for s in shapes}
            rows.append(
                [
                    f"{mine} / {label}",
                    *(
                        f"{seen[s]:.2f}"
                        + (f" ({best[s].split(',')[0]})" if len(rivals) > 1 else "")
                        for s in shapes
                    ),
                ]
            )
            if asked is None:
                continue
            asked, unless = asked if isinstance(asked, tuple) else (asked, "")
            short = [s for s in shapes if round(seen[s], 2) < asked[s]]
            probed = (
                "--precision" not in dict(own)[mine]
            )  # the peak of other units than those of fp32 is not
            report.figure(
                f"inference, {mine} / {label}, {in_threads(threads)}: " + " / ".join(shapes),
                " / ".join(f"{asked[s]:g}" for s in shapes),
                " / ".join(f"{seen[s]:.2f}" for s in shapes),
                unless
                or (
                    not short
                    if len(short) in (0, len(shapes))
                    else "**short** at " + ", ".join(short)
                ),
                (
                    " / ".join(
                        f"{LIMITS.bound(table[s][best[s]], count[s][mine], threads):.2f}"
                        for s in shapes
                    )
                    if probed
                    else ""
                ),
            )
        report.text(f"{in_threads(threads)}:", "")
        report.table(["tokens/s", *shapes], rows)
    tell_disturbed(report)
    finish(everyone)
    left_out(report, missing)


def label_of(report):
    return "fp32" if report.title == "Inference" else report.title.split(", ")[-1]


ASKED_FP32 = {s: {"1x8": 1.8, "1x32": 1.6}.get(s, 1.2) for s in SHAPES}
ASKED_BF16 = {s: {"1x8": 1.5}.get(s, 1.2) for s in SHAPES}
ASKED_INT8 = {s: 1.3 for s in SHAPES}


def infer_section(report, a):
    report.text(
        "fp32, 6 x 384, tokens per second by batch x length (all sequences of one length, so that"
        " nobody pads). Dense peers: transformers' BertModel with `scaled_dot_product_attention`,"
        " ONNX Runtime with its BERT fusions, OpenVINO with fixed shapes. MT-TaG: N = 4, T = 8,"
        " top-1, in moe.h and in PyTorch.",
        "",
    )
    if os.path.exists(os.path.join(GRAPHS, "fusions.txt")):
        report.text(
            *open(os.path.join(GRAPHS, "fusions.txt"), encoding="utf-8").read().splitlines(), ""
        )
    dense = ["PyTorch, transformers", "ONNX Runtime", "OpenVINO"]
    infer_table(
        report,
        a,
        [("moe.h dense", ["--system", "dense"]), ("moe.h TaG", ["--system", "tag"])],
        [
            (dense[0], "pytorch_infer.py", ["--variant", "transformers,fp32"]),
            ("PyTorch MT-TaG", "pytorch_infer.py", ["--variant", "tag,fp32"]),
            (dense[1], "graph_peers.py", ["--serve", "ort"]),
            (dense[2], "graph_peers.py", ["--serve", "openvino"]),
        ],
        [
            ("moe.h dense", dense, "best dense peer", ASKED_FP32),
            ("moe.h TaG", dense, "best dense peer", ASKED_FP32),
            ("moe.h TaG", ["PyTorch MT-TaG"], "PyTorch MT-TaG", ASKED_FP32),
        ],
    )


def int8_section(report, a):
    report.text(
        "Weights of 8 bits with a scale for each output; activations quantised by row in moe.h, by"
        " tensor in ONNX Runtime (`quantize_dynamic` of the fused graph, per channel). Sizes and"
        " shapes as above; moe.h in fp32 for comparison.",
        "",
    )
    infer_table(
        report,
        a,
        [
            ("moe.h int8 dense", ["--system", "dense", "--precision", "int8"]),
            ("moe.h int8 TaG", ["--system", "tag", "--precision", "int8"]),
            ("moe.h fp32 dense", ["--system", "dense"]),
        ],
        [("ONNX Runtime int8", "graph_peers.py", ["--serve", "ort", "--precision", "int8"])],
        [
            ("moe.h int8 dense", ["ONNX Runtime int8"], "ONNX Runtime int8", ASKED_INT8),
            ("moe.h int8 TaG", ["ONNX Runtime int8"], "ONNX Runtime int8", None),
            ("moe.h int8 dense", ["moe.h fp32 dense"], "moe.h fp32 dense", None),
        ],
    )


def bf16_section(report, a):
    report.text(
        "Operands in bf16, sums in fp32, where the processor has units for it (AMX, AVX512-BF16)."
        " OpenVINO is asked for bf16.",
        "",
    )
    if not has_bf16():
        report.text("This processor has no units for bf16: nothing to measure.", "")
        report.figure(
            "inference, bf16 / OpenVINO bf16", "1.5 / 1.2", "", "not asked: no units for bf16"
        )
        return
    asked = (ASKED_BF16, "" if units().get("AMX-BF16") else "not asked: no AMX")
    infer_table(
        report,
        a,
        [
            ("moe.h bf16 dense", ["--system", "dense", "--precision", "bf16"]),
            ("moe.h bf16 TaG", ["--system", "tag", "--precision", "bf16"]),
            ("moe.h fp32 dense", ["--system", "dense"]),
        ],
        [("OpenVINO bf16", "graph_peers.py", ["--serve", "openvino", "--precision", "bf16"])],
        [
            ("moe.h bf16 dense", ["OpenVINO bf16"], "OpenVINO bf16", asked),
            ("moe.h bf16 TaG", ["OpenVINO bf16"], "OpenVINO bf16", None),
            ("moe.h bf16 dense", ["moe.h fp32 dense"], "moe.h fp32 dense", None),
        ],
    )


def units():
    """{instruction set or unit: 1 or 0}, as moe.h finds them on this machine."""
    text = output([os.path.join(BUILD, "bench_ops"), "--units"])
    return json.loads(text) if text.startswith("{") else {}


def has_bf16():
    return bool(units().get("AMX-BF16") or units().get("AVX512-BF16"))


def unit_section(report, _):
    report.text(
        "What this machine can run, by its own CPUID, and where the tests run the rest: they force"
        " each kernel that a processor has (`moe_env.isa`, `moe_env.cpu_flags`).",
        "",
    )
    report.table(
        ["kernels", "ran", "tests"],
        [
            [
                name,
                (
                    "on this hardware"
                    if there
                    else f"under emulation: {EMULATED[name]}" if name in EMULATED else "never"
                ),
                TESTED.get(name, ""),
            ]
            for name, there in units().items()
        ],
    )


def op_programs(a, missing, have_blas=True):
    """{threads: programs}: moe.h, PyTorch and the BLAS, which have the number of threads from their
    environment."""
    script = [PYTHON, os.path.join(HERE, "op_peers.py")]
    libraries = (
        (
            ("OpenBLAS (NumPy)", "openblas"),
            ("BLIS (PyPI)", "blis"),
            ("BLIS (Debian)", "libblis"),
            ("AOCL-BLIS", "aocl"),
        )
        if have_blas
        else ()
    )
    wanted = [
        ("moe.h", [os.path.join(BUILD, "bench_ops")], a.threads),
        ("oneDNN (PyTorch)", [*script, "torch"], a.threads, MALLOC),
    ]
    wanted += [
        (
            name,
            [*script, library],
            threads,
            {
                "OPENBLAS_NUM_THREADS": str(threads),
                "OPENBLAS_THREAD_TIMEOUT": "20",
                "BLIS_NUM_THREADS": str(threads),
            },
        )
        for threads in a.threads
        for name, library in libraries
    ]
    return by_threads(a, start(missing, *wanted))


def worst(report, name, asked, seen, text, bound=None):
    """A line of the summary for the least of {row: ratio}; `text` says how a ratio is written,
    `bound` is {row: bound}."""
    if not seen:
        return
    least = min(seen, key=seen.get)
    below = sum(round(v, 2) < asked for v in seen.values())
    report.figure(
        name,
        text(asked),
        f"{text(seen[least])} ({least})" + (f"; {below} of {len(seen)} below" if below else ""),
        not below,
        text(bound[least]) if bound else "",
    )


def two_digits(x):
    return f"{x:.2f}"


def per_cent(x):
    return f"{100 * x:.0f} %"


def product_figures(report, threads, share, against, bound):
    """share, against, bound: {(kind, n, k, m): ratio} to the peak and to the best peer."""

    def named(chosen):
        return {f"{n} x {k}, m = {m}": v for (_, n, k, m), v in chosen.items()}

    def of(kind, least, figures):
        return named({key: v for key, v in figures.items() if key[0] == kind and key[3] >= least})

    long = {
        key: v for key, v in share.items() if key[0] == "packed" and key[2] == 384 and key[3] >= 32
    }
    rest = {
        key: v for key, v in share.items() if key[0] == "packed" and key[3] >= 8 and key not in long
    }
    worst(
        report,
        f"fp32 product, k = 384, m = 32 .. 512, {in_threads(threads)}: share of the peak",
        0.85,
        named(long),
        per_cent,
    )
    worst(
        report,
        f"fp32 product elsewhere, m >= 8, {in_threads(threads)}: share of the peak",
        0.75,
        named(rest),
        per_cent,
    )
    worst(
        report,
        f"fp32 product, m >= 4, {in_threads(threads)}, / best peer",
        1.0,
        of("packed", 4, against),
        two_digits,
        of("packed", 4, bound),
    )
    worst(
        report,
        f"weight gradient, 32 .. 4096 tokens, {in_threads(threads)}, / best peer",
        0.97,
        of("dw", 32, against),
        two_digits,
        of("dw", 32, bound),
    )


def product_section(report, a):
    report.text(
        "fp32, y (m, n) = x (m, k) Wᵀ + b, weights packed beforehand (oneDNN: reordered, or the"
        " plain call where that is faster; the BLAS: transposed, without b), and the weight"
        " gradient of m tokens. GFLOP/s, share of the peak probed right before each round, ratio to"
        " the best peer. PyTorch's calls carry about 2 us of Python and dispatch, those of the BLAS"
        " about 1 us.",
        "",
    )
    missing = []
    small = a.quick or PACE.dry
    shapes = (
        ((1536, 384), (500, 333))[PACE.dry :]
        if small
        else ((1536, 384), (384, 1536), (384, 384), (3072, 768), (768, 3072), (500, 333))
    )
    plan = [
        (kind, n, k, m)
        for kind, sizes in (("packed", (1, 4, 8, 32, 128, 512)), ("dw", (32, 128, 512, 4096)))
        for n, k in shapes
        for m in (sizes[1::2] if small else sizes)
    ]
    PACE.expect(len(plan) * len(a.threads))
    everyone = op_programs(a, missing)
    for threads, programs in everyone.items():
        report.text(
            f"{in_threads(threads)}, {LIMITS.isa}, probed peak at best"
            f" {LIMITS.best[threads]['peak_gflops']:.0f} GFLOP/s:",
            "",
        )
        rows, share, against, bound = [], {}, {}, {}
        for kind, n, k, m in plan:
            times = take_turns(
                f"{kind} {n} x {k}, m = {m}", programs, 5, 0.01, (f"{kind}:{n}:{k}:{m}", threads)
            )
            operations = 2 * n * k * m
            figure = {p: 1e-9 * operations / statistics.median(t) for p, t in times.items()}
            best = max((p for p in figure if p != "moe.h"), key=figure.get, default=None)
            share[kind, n, k, m] = times["moe.h"].share(operations)
            if best:
                against[kind, n, k, m] = ratio(times["moe.h"], times[best])
                bound[kind, n, k, m] = LIMITS.bound(times[best], (operations, 0), threads)
            rows.append(
                [
                    kind,
                    n,
                    k,
                    m,
                    f"{figure['moe.h']:.0f} ±{spread(times['moe.h']):.0f} %",
                    per_cent(share[kind, n, k, m]),
                    *(f"{figure[p.name]:.0f}" for p in programs[1:]),
                    f"{against[kind, n, k, m]:.2f}" if best else "",
                ]
            )
        report.table(
            [
                "kind",
                "n",
                "k",
                "m",
                "moe.h",
                "of peak",
                *(p.name for p in programs[1:]),
                "moe.h / best",
            ],
            rows,
        )
        tell_disturbed(report)
        product_figures(report, threads, share, against, bound)
    finish(everyone)
    left_out(report, missing)


# name, bytes moved at least, floating-point operations (of products), for 32 sequences of 128
# tokens
M, H, F, PARAMETERS = 4096, 384, 1536, 10000000
LAYERS = [
    ("gelu", 8 * M * F, 0),
    ("gelu_back", 16 * M * F, 0),
    ("norm", 8 * M * H, 0),
    ("norm_back", 16 * M * H, 0),
    ("dropout", 8 * M * H, 0),
    ("embed", 8 * M * H, 0),
    ("embed_back", 12 * M * H, 0),
    ("attention", 16 * M * H, 4 * M * 128 * H),
    ("attention_back", 48 * M * H, 10 * M * 128 * H),
    ("route", 4 * M * H, 8 * M * H),
    ("route_back", 12 * M * H, 16 * M * H),
    ("experts", 0, 4 * M * H * F),
    ("experts_back", 0, 8 * M * H * F),
    ("adam", 32 * PARAMETERS, 0),
]


def layer_section(report, a):
    report.text(
        "One call for 32 x 128 tokens, H = 384, F = 1536, 12 heads, N = 4 (adam: 10 M weights),"
        " microseconds. The limit is the larger of bytes / bandwidth of copying an array of 4096 x"
        " 1536 and operations / peak, both probed in the same run; bytes are those of the arrays of"
        " the call, each once. Arrays that fit the second-level cache can go under it. PyTorch's"
        " embed adds no positions; its backward clears the whole table.",
        "",
    )
    missing = []
    PACE.expect(len(LAYERS) * len(a.threads))
    everyone = op_programs(a, missing, have_blas=False)
    for threads, programs in everyone.items():
        peak, copy = LIMITS.best[threads]["peak_gflops"], LIMITS.best[threads]["copy_gbytes"]
        rows = []
        for name, bytes_, flops in LAYERS:
            with_peer = programs if not name.startswith("route") else programs[:1]
            times = take_turns(name, with_peer, 5, 0.03, (name, threads))
            limit = max(bytes_ / copy, flops / peak) * 1e-3
            mine, peer = times["moe.h"], times.get("oneDNN (PyTorch)")
            rows.append(
                [
                    name,
                    f"{1e6 * statistics.median(mine):.0f} ±{spread(mine):.0f} %",
                    f"{limit:.0f}",
                    f"{100 * limit / (1e6 * statistics.median(mine)):.0f} %",
                    f"{1e6 * statistics.median(peer):.0f}" if peer else "",
                    f"{ratio(mine, peer):.2f}" if peer else "",
                ]
            )
        report.text(f"{in_threads(threads)}, peak {peak:.0f} GFLOP/s, copy {copy:.1f} GB/s:", "")
        report.table(
            ["op", "moe.h, us", "limit, us", "of limit", "PyTorch, us", "moe.h is faster by"], rows
        )
        tell_disturbed(report)
    finish(everyone)
    left_out(report, missing)


def process_cost(command, environment=None):
    """Wall seconds and peak MB of a process from its start to its end. PermissionError, OSError or
    a status that is not 0: Unavailable."""
    begin = time.perf_counter()
    try:
        p = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=dict(os.environ, OMP_NUM_THREADS="1", **(environment or {})),
        )
    except OSError as e:
        raise Unavailable(str(e)) from e
    error = p.stderr.read()
    _, status, usage = os.wait4(p.pid, 0)
    seconds = time.perf_counter() - begin
    p.returncode = os.waitstatus_to_exitcode(status)
    if p.returncode != 0:
        raise Unavailable(
            error.decode(errors="replace").strip().splitlines()[-1]
            if error.strip()
            else f"status {p.returncode}"
        )
    return seconds, usage.ru_maxrss / 1024


def start_commands():
    models = {system: os.path.join(BUILD, f"{system}.safetensors") for system in ("dense", "tag")}
    for system, path in models.items():
        subprocess.run([os.path.join(BUILD, "bench_start"), "--write", system, path], check=True)
    library = output(
        [
            PYTHON,
            "-c",
            (
                "import glob, onnxruntime, os;"
                " print((glob.glob(os.path.dirname(onnxruntime.__file__) +"
                " '/capi/libonnxruntime.so*') or [''])[0])"
            ),
        ]
    )
    graph = os.path.join(GRAPHS, "fused.onnx")
    return {
        "moe.h, mapped file": [os.path.join(BUILD, "bench_start"), models["dense"]],
        "moe.h TaG (N = 4), mapped file": [os.path.join(BUILD, "bench_start"), models["tag"]],
        "C on ONNX Runtime, no further optimization": [
            os.path.join(BUILD, "bench_start_ort"),
            library,
            graph,
            "0",
        ],
        "C on ONNX Runtime, all optimizations": [
            os.path.join(BUILD, "bench_start_ort"),
            library,
            graph,
            "99",
        ],
        "Python, ONNX Runtime": [
            PYTHON,
            os.path.join(HERE, "graph_peers.py"),
            "--first",
            "ort",
            "--dir",
            GRAPHS,
        ],
        "Python, OpenVINO": [
            PYTHON,
            os.path.join(HERE, "graph_peers.py"),
            "--first",
            "openvino",
            "--dir",
            GRAPHS,
        ],
        "Python, PyTorch and transformers": [
            PYTHON,
            os.path.join(HERE, "pytorch_infer.py"),
            "--first",
        ],
    }


def start_section(report, _):
    report.text(
        "A process from its start to its end with one answer for 16 tokens, one thread, dense"
        " MiniLM in fp32, files in the page cache. The program on ONNX Runtime is written in C and"
        " loads the library of the pip wheel and the fused graph.",
        "",
    )
    commands = start_commands()
    seconds, peak = {n: [] for n in commands}, {}
    for round_ in range(2 if PACE.dry else 6):
        for name, command in list(commands.items()):
            if (
                round_ > 3
                and "Python" in name
                or round_ > 2
                and statistics.median(seconds[name]) > 2
            ):
                continue
            try:
                s, peak[name] = process_cost(command)
            except Unavailable as e:
                report.text(f"Left out: {name}: {e}", "")
                del commands[name]
                continue
            if round_ > 0 or s > 2:
                seconds[name].append(
                    s
                )  # the first round fills the page cache; what takes so long has three in all
    median = {n: statistics.median(seconds[n]) for n in commands}
    own, peers = "moe.h, mapped file", [n for n in commands if not n.startswith("moe.h")]
    report.table(
        ["program", "ms", "moe.h is sooner by", "peak memory, MB"],
        [
            [
                n,
                f"{1e3 * median[n]:.0f} ±{spread(seconds[n]):.0f} %",
                f"{median[n] / median[own]:.1f}",
                f"{peak[n]:.0f}",
            ]
            for n in commands
        ],
    )
    report.memory.update({("first answer, 16 tokens", n): peak[n] for n in commands})
    for kind, asked in (("C on", True), ("Python", False)):
        there = [n for n in peers if n.startswith(kind)]
        if there:
            soonest = min(there, key=median.get)
            seen = median[soonest] / median[own]
            report.figure(
                f"first answer of a cold process, sooner than {soonest}",
                "5" if asked else "told",
                f"{seen:.1f}",
                seen >= 5 if asked else "",
            )


def memory_section(report, _):
    """No run of its own: the peaks of the processes of other sections."""
    report.text(
        "Largest resident set of the processes of the tables before, with one thread, in training"
        " with the most, in MB, PyTorch's and the Python peers' interpreter included; the ratio is"
        " moe.h's first row of a group to the row.",
        "",
    )
    rows, groups = [], {}
    for (what, name), mb in report.memory.items():
        groups.setdefault(what, []).append((name, mb))
    for what, members in groups.items():
        rows += [
            [
                what,
                name,
                f"{mb:.0f}",
                "" if name.startswith("moe.h") else f"{members[0][1] / mb:.2f}",
            ]
            for name, mb in members
        ]
        peers = [mb for name, mb in members if not name.startswith("moe.h")]
        if peers and what.startswith(("inference, fp32", "first answer")):
            seen = members[0][1] / min(peers)
            report.figure(
                f"peak memory, {what}, dense, / leanest peer",
                "at most 0.5",
                f"{seen:.2f}",
                seen <= 0.5,
            )
    report.table(["what", "process", "MB", "moe.h / it"], rows)


def own_word(mode, batch, length):
    return f"{mode}:2x16" if PACE.dry else f"{mode}:{batch}x{length}"


def scaling_rows(report, a, text, head, cases):
    """A table of moe.h's own figures, in tokens/s and as ratio to a reference: cases is [(label,
    measured, reference)], both (options, word, threads).
    One process serves all rows with the same options. Returns ({label: (tokens, ratio)}, {label:
    bound of it}, {process: peak MB}).
    """
    if text:
        report.text(text, "")
    rows, seen, bound, missing = [], {}, {}, []
    wanted = {(role, c[i][0]): None for c in cases for i, role in ((2, "reference"), (1, "moe.h"))}
    most = sorted({c[i][2] for c in cases for i in (1, 2)} | set(a.threads))
    programs = {
        p.name: p
        for p in start(
            missing,
            *(
                (
                    f"{role} {' '.join(options)}",
                    own_step("infer", "--batch", "1", "--length", "8", *options),
                    most,
                )
                for role, options in wanted
            ),
        )
    }
    for label, measured, reference in cases:
        two = [
            programs.get(f"{role} {' '.join(options)}")
            for role, (options, _, _) in (("reference", reference), ("moe.h", measured))
        ]
        if None in two:
            PACE.done += 1
            continue
        one, other = two
        times = take_turns(", ".join(map(str, label)), two, 5, 0.1, reference[1:], measured[1:])
        tokens = one.count[2], other.count[2]
        relative = statistics.median(
            t1 / tokens[0] / (t2 / tokens[1]) for t1, t2 in zip(times[one.name], times[other.name])
        )
        rows.append(
            [*label, int(tokens[1]), rate(tokens[1], times[other.name]), two_digits(relative)]
        )
        seen[tuple(label)] = int(tokens[1]), relative
        if measured[2] in LIMITS.best:
            bound[tuple(label)] = (
                LIMITS.bound(times[one.name], other.count, measured[2]) * tokens[1] / tokens[0]
            )
    peak = {name: p.peak() for name, p in programs.items()}
    finish({0: programs.values()})
    report.table([*head, "tokens", "tokens/s", "against the reference"], rows)
    tell_disturbed(report)
    left_out(report, missing)
    return seen, bound, peak


def thread_section(report, a):
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        report.text("One core: nothing to measure.", "")
        return
    cases = []
    work = (
        ("infer", "dense", 1, 8),
        ("infer", "dense", 1, 32),
        ("infer", "tag", 8, 32),
        ("infer", "dense", 8, 32),
        ("infer", "dense", 32, 128),
        ("train", "tag", 32, 32),
    )
    for mode, system, batch, length in work[1:2] if a.quick else work:
        options, word = ("--system", system), own_word(mode, batch, length)
        cases += [
            ([f"{mode} {system} {batch} x {length}", t], (options, word, t), (options, word, 1))
            for t in sorted({2, cores, 2 * cores})
        ]
    PACE.expect(len(cases))
    seen, bound, _ = scaling_rows(
        report,
        a,
        f"Reference: one thread. This machine has {cores} cores; the last row of each asks for"
        " twice as many threads, of which a pool gives as many as there are cores.",
        ["what", "threads"],
        cases,
    )
    worst(
        report,
        "two threads / one, from 32 tokens on",
        1.8,
        {what: r for (what, t), (tokens, r) in seen.items() if t == 2 and tokens >= 32},
        two_digits,
        {what: b for (what, t), b in bound.items() if t == 2},
    )
    full = {what: r for (what, t), (_, r) in seen.items() if t == cores}
    worst(
        report,
        "twice as many threads as cores / as many as cores",
        0.97,
        {
            what: r / full[what]
            for (what, t), (_, r) in seen.items()
            if t == 2 * cores and what in full
        },
        two_digits,
    )


def token_section(report, a):
    report.text(
        "TaG (N = 4, top-1) against the dense model with the same operations per token (the"
        " reference), optimizer apart.",
        "",
    )
    work = [
        ("infer", 1, 8),
        ("infer", 1, 64),
        ("infer", 4, 128),
        ("infer", 16, 128),
        ("infer", 32, 128),
        ("pass", 1, 64),
        ("pass", 4, 128),
        ("pass", 16, 128),
    ]
    names = {"infer": "infer TaG", "pass": "forward and backward TaG"}
    plan = [
        (t, w)
        for t in a.threads
        for w in work
        if t == a.threads[0] or w[1] * w[2] in (512, 4096) or w == work[-1]
    ]
    PACE.expect(len(plan))
    cases = [
        (
            [f"{names[mode]} {batch} x {length}", threads],
            (("--system", "tag"), own_word(mode, batch, length), threads),
            (("--system", "dense"), own_word(mode, batch, length), threads),
        )
        for threads, (mode, batch, length) in plan
    ]
    seen, bound, _ = scaling_rows(report, a, "", ["what", "threads"], cases)
    for threads in a.threads:
        for mode, asked in (("pass", 0.9), ("infer", 0.95)):
            here = {
                what: r
                for (what, t), (tokens, r) in seen.items()
                if t == threads and what.startswith(names[mode]) and tokens >= 512
            }
            worst(
                report,
                "TaG / dense of the same operations,"
                f" {'training' if mode == 'pass' else 'inference'}, >= 512 tokens,"
                f" {in_threads(threads)}",
                asked,
                here,
                two_digits,
                {what: b for (what, t), b in bound.items() if t == threads},
            )


def expert_section(report, a):
    def served(mode, n):
        return ("--layers", "2", "--experts", str(n)), own_word(mode, 16, 128), 1

    cases = [
        ([f"{what}, N = {n}"], served(mode, n), served(mode, 1))
        for what, mode in (("infer", "infer"), ("forward and backward", "pass"))
        for n in (1, 4, 16, 64)
    ]
    PACE.expect(len(cases))
    _, _, peak = scaling_rows(
        report,
        a,
        "2 layers, 16 x 128, top-1, so that the operations stay and the weights grow. Reference: N"
        " = 1. One thread.",
        ["what"],
        cases,
    )
    report.memory.update(
        {
            ("inference and training, 2 layers, 16 x 128", f"moe.h, N = {name.split()[-1]}"): mb
            for name, mb in peak.items()
            if name.startswith("moe.h")
        }
    )


def task_section(report, a):
    report.text(
        "2 layers, TaG, N = 4, 32 x 64; every sequence of the batch belongs to another task where"
        " there are enough. Reference: T = 8, optimizer apart. The row T = 8 shows what two equal"
        " runs differ by.",
        "",
    )

    def served(mode, tasks, threads):
        return ("--layers", "2", "--tasks", str(tasks)), own_word(mode, 32, 64), threads

    cases = [
        ([f"{what}, T = {tasks}", t], served(mode, tasks, t), served(mode, 8, t))
        for t in a.threads
        for what, mode in (("infer", "infer"), ("forward and backward", "pass"))
        for tasks in ((1, 8, 100, 1000) if t == a.threads[0] else (1000,))
    ]
    PACE.expect(len(cases))
    seen, _, _ = scaling_rows(report, a, "", ["what", "threads"], cases)
    for threads in a.threads:
        worst(
            report,
            f"1000 tasks / 8 tasks, {in_threads(threads)}",
            0.97,
            {
                what: r
                for (what, t), (_, r) in seen.items()
                if t == threads and what.endswith("1000")
            },
            two_digits,
        )


def accuracy_section(report, a):
    if not a.models or not a.data:
        sys.exit(
            "run.py: section accuracy needs --models FILE,FILE... and --data DIR (trained by"
            " examples/train.c)"
        )
    report.text(
        "Trained models (`./train --systems dense,tag --save NAME`, a file for each system and"
        " seed) on the dev sets of their tasks, x 100: mean and deviation over the models, in"
        " brackets the change from fp32. int8 by `./convert IN OUT --int8`, bf16 by `./predict"
        " --precision bf16`. Measured by `run.py --sections accuracy --models FILE,FILE... --data"
        " DIR`.",
        "",
    )
    head, rows, missing = accuracy.table(
        a.models.split(","),
        a.data,
        a.tasks.split(","),
        ["fp32"] if PACE.dry else ["fp32", "bf16", "int8"],
    )
    report.table(head, rows)
    left_out(report, missing)


# What a section is called, what measures it, and the seconds that it is to take on two cores of a
# Xeon with AVX-512: 500 in all.
SECTIONS = {
    "units": ("Instruction sets", unit_section, 1),
    "products": ("Products", product_section, 75),
    "layers": ("Layers", layer_section, 18),
    "train": ("Training step", train_section, 185),
    "infer": ("Inference", infer_section, 75),
    "int8": ("Inference, int8", int8_section, 32),
    "bf16": ("Inference, bf16", bf16_section, 40),
    "start": ("Start and memory of a first answer", start_section, 22),
    "threads": ("Threads", thread_section, 25),
    "tokens": ("Tokens, and the cost of mixture of experts", token_section, 30),
    "experts": ("Experts", expert_section, 22),
    "tasks": ("Tasks", task_section, 20),
    "memory": ("Memory", memory_section, 1),
    "accuracy": ("Accuracy of the precisions", accuracy_section, 900),
}
ALL = [n for n in SECTIONS if n != "accuracy"]


def arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="training step and inference unless --sections names others; fewer shapes and peers",
    )
    p.add_argument(
        "--dry",
        action="store_true",
        help="one call of everything, few shapes: to see that all works",
    )
    p.add_argument("--sections", help="some of: " + ", ".join(SECTIONS))
    p.add_argument("--threads", default="1,2" if len(os.sched_getaffinity(0)) > 1 else "1")
    p.add_argument(
        "--minutes",
        type=float,
        default=9.5,
        help="what all sections together may take, a sixth of it for what has to be measured again",
    )
    p.add_argument(
        "--out",
        help=(
            "all tables as text; default: results/speed.json and the page results.md,"
            " build/quick.md of --quick, build/dry.md of --dry"
        ),
    )
    p.add_argument("--models", help="section accuracy: files of trained models")
    p.add_argument("--data", help="section accuracy: a folder with TASK/dev.tsv")
    p.add_argument("--tasks", default="RTE,MRPC,STS-B", help="section accuracy")
    a = p.parse_args()
    a.threads = [int(t) for t in a.threads.split(",")]
    a.names = (
        a.sections.split(",") if a.sections else ["units", "train", "infer"] if a.quick else ALL
    )
    a.page = None if a.out or a.dry or a.quick else os.path.join(HERE, "results.md")
    a.out = a.out or (
        os.path.join(HERE, "results", "speed.json")
        if a.page
        else os.path.join(BUILD, "dry.md" if a.dry else "quick.md")
    )
    unknown = [n for n in a.names if n not in SECTIONS]
    if unknown:
        sys.exit(f"run.py: no section {unknown[0]}; there are: {', '.join(SECTIONS)}")
    return a


def run_section(report, a, name, planned, peaks):
    """Measures a section between two probes of the peak, of which `peaks` is the first. Returns the
    second, and in words how they differ."""
    title, measure, _ = SECTIONS[name]
    PACE.start(planned, a.dry)
    report.begin(title)
    measure(report, a)
    took = time.monotonic() - PACE.begin
    after = LIMITS.probe(a.threads)
    report.limits, changed = LIMITS.words(), moved(peaks, after)
    said = [
        LIMITS.shared(),
        f"Disturbed: the peak before and after was {changed}." if changed else "",
    ]
    report.end(
        changed,
        f"Measured {stamp()}, in {took:.0f} s"
        + (f", threads {','.join(map(str, a.threads))}" if a.threads != [1, 2] else "")
        + ".",
        "",
        *(line for words in said if words for line in (words, "")),
    )
    clock = Program.clock
    print(
        f"{name}: {took:.0f} s, planned {planned:.0f}; starting {clock['starting']:.0f}, measuring"
        f" {clock['measured']:.0f}, warming up and waiting {clock['asked'] - clock['measured']:.0f}"
        + (f"; the peak before and after was {changed}" if changed else ""),
        flush=True,
    )
    return after, changed


def main():
    a = arguments()
    if subprocess.run(["make", "-s", "-C", HERE, "programs"], check=False).returncode != 0:
        sys.exit("run.py: the programs do not compile")
    begin = time.monotonic()
    have = prepare_peers()
    if {"infer", "int8", "bf16", "start"} & set(a.names):
        prepare_graphs(have)
    prepared = time.monotonic()
    report = Report(
        a.out, [title for title, _, _ in SECTIONS.values()], keep=a.page is not None, page=a.page
    )
    heading(report, have, a.threads)
    planned = {
        n: a.minutes * 50 * SECTIONS[n][2] / sum(SECTIONS[n][2] for n in ALL)
        for n in SECTIONS
        if n in a.names
    }
    print("planned seconds: " + ", ".join(f"{n} {s:.0f}" for n, s in planned.items()), flush=True)
    peaks = LIMITS.probe(a.threads)
    for i, name in enumerate(planned):
        if name == "memory" and not report.memory:
            continue  # nothing that it could tell has run
        left = (
            a.minutes * 60 - 10 - (time.monotonic() - prepared)
        )  # on a machine that is slow today the later sections get less
        share = min(planned[name], left * planned[name] / sum(list(planned.values())[i:]))
        peaks, changed = run_section(report, a, name, share, peaks)
        if (
            changed
            and not a.dry
            and time.monotonic() - prepared + 1.2 * sum(list(planned.values())[i:]) < a.minutes * 60
        ):
            peaks, _ = run_section(report, a, name, planned[name], peaks)
    print(
        f"All in {time.monotonic() - prepared:.0f} s, after {prepared - begin:.0f} s of preparing"
        f" the peers: {a.out}",
        flush=True,
    )


if __name__ == "__main__":
    main()
