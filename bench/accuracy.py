#!/usr/bin/env python3
"""What a precision costs in accuracy and saves in bytes: trained models in fp32, bf16 and int8 on
the dev sets of their tasks.

  accuracy.py --data DIR [--tasks RTE,MRPC] [--precisions fp32,bf16,int8] MODEL...

Each MODEL was saved by examples/train.c, as NAME-SYSTEM-SEED.EXTENSION; DIR holds TASK/dev.tsv. The
programs are examples/tools/convert.c (--int8) and
examples/tools/predict.c (--score, --precision); a task is judged by its first metric. Prints a
table: mean and deviation over the models of a
system, and how far the mean moves from fp32, in points. bench/run.py takes it in with `--sections
accuracy --models ... --data DIR`. Standard library only.
"""

import argparse
import glob
import os
import re
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(HERE, "build")


def program(name):
    """Compiles an example where it is missing or older than its sources; returns its path."""
    tools = os.path.join(HERE, "..", "examples", "tools")
    source, path = os.path.join(tools, f"{name}.c"), os.path.join(BUILD, name)
    sources = [source, os.path.join(HERE, "..", "moe.h"), *glob.glob(os.path.join(tools, "*.h"))]
    if not os.path.exists(path) or os.path.getmtime(path) < max(map(os.path.getmtime, sources)):
        os.makedirs(BUILD, exist_ok=True)
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O2", "-o", path, source, "-lm", "-pthread"], check=True
        )
    return path


def score(model, task, data, precision):
    """(metric, value x 100) of a task's dev set; a ValueError with the program's words where that
    fails or the precision is not to be had."""
    with open(os.path.join(data, task, "dev.tsv"), encoding="utf-8") as dev:
        done = subprocess.run(
            [
                program("predict"),
                model,
                task,
                "--score",
                "--precision",
                "bf16" if precision == "bf16" else "fp32",
            ],
            stdin=dev,
            capture_output=True,
            text=True,
            check=False,
        )
    words = done.stdout.split()
    if (
        done.returncode != 0 or len(words) < 2 or done.stderr.strip()
    ):  # a machine without units for bf16 says so and goes on in fp32
        raise ValueError(done.stderr.strip() or f"predict ended with {done.returncode}")
    return words[0], 100 * float(words[1])


def system_of(path):
    """NAME-SYSTEM-SEED.EXTENSION -> SYSTEM; another name is a system of its own."""
    name = os.path.splitext(os.path.basename(path))[0]
    found = re.fullmatch(r".*-([a-z]+)-\d+", name)
    return found.group(1) if found else name


def measure(models, data, tasks, precisions, say=print):
    """{(system, precision): {"bytes": [...], task: [...]}}, {task: metric}, [what was left out]."""
    out, metric, missing = {}, {}, []
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            for precision in precisions:
                path = model
                if precision == "int8":
                    path = os.path.join(folder, "int8.model")
                    subprocess.run(
                        [program("convert"), model, path, "--int8"],
                        check=True,
                        stdout=subprocess.DEVNULL,
                    )
                try:
                    values = {t: score(path, t, data, precision) for t in tasks}
                except ValueError as e:
                    missing.append(f"{precision}: {e}")
                    continue
                row = out.setdefault((system_of(model), precision), {"bytes": []})
                row["bytes"].append(os.path.getsize(path))
                for t, (name, value) in values.items():
                    metric[t] = name
                    row.setdefault(t, []).append(value)
                say(
                    f"  {os.path.basename(model)} {precision}: "
                    + ", ".join(f"{t} {v:.2f}" for t, (_, v) in values.items()),
                    flush=True,
                )
    return out, metric, list(dict.fromkeys(missing))


def table(models, data, tasks, precisions, say=print):
    """The head and the rows of the table, and what was left out."""
    out, metric, missing = measure(models, data, tasks, precisions, say)
    rows = []
    for (system, precision), row in out.items():
        base = out.get((system, "fp32"))
        cells = []
        for t in tasks:
            v = row[t]
            text = f"{statistics.mean(v):.2f}" + (
                f" ± {statistics.stdev(v):.2f}" if len(v) > 1 else ""
            )
            if base and precision != "fp32":
                text += f" ({statistics.mean(v) - statistics.mean(base[t]):+.2f})"
            cells.append(text)
        rows.append(
            [
                system,
                precision,
                *cells,
                f"{statistics.mean(row['bytes']) / 1e6:.1f}",
                len(row["bytes"]),
            ]
        )
    return (
        [
            "system",
            "precision",
            *(f"{t}, {metric[t]}" for t in tasks if t in metric),
            "MB",
            "models",
        ],
        rows,
        missing,
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("models", nargs="+", metavar="MODEL")
    p.add_argument("--data", required=True)
    p.add_argument("--tasks", default="RTE,MRPC,STS-B")
    p.add_argument("--precisions", default="fp32,bf16,int8")
    a = p.parse_args()
    head, rows, missing = table(
        a.models,
        a.data,
        a.tasks.split(","),
        a.precisions.split(","),
        lambda *w, **k: print(*w, file=sys.stderr, **k),
    )
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for r in rows:
        print("| " + " | ".join(map(str, r)) + " |")
    for m in missing:
        print(f"left out: {m}", file=sys.stderr)


if __name__ == "__main__":
    main()
