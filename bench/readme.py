#!/usr/bin/env python3
"""Writes the section Speed of README.md from bench/results/speed.json, so that both show the same run. Run by `make -C bench readme`."""
import os
import re
import sys

import run
from report import Report

README = os.path.join(run.HERE, "..", "README.md")
INTRODUCTION = """`make -C bench` measures against PyTorch, ONNX Runtime and OpenVINO on the same cores in one run and writes `bench/results.md`, with a summary of what was
asked and what was seen; `make -C bench SECTIONS=int8` measures some sections anew, `make -C bench quick` is the training step and inference alone. What stands
here is taken from that file by `make -C bench readme`. A ratio is the median over rounds of the programs' turns, so that a disturbance of the machine
hits both sides. Other machines have other ratios."""


def tables(report, title):
    """[(the last line of text before it, [cells of the head and of each row])] of a section."""
    out, text = [], ""
    for item in report.sections.get(title, []):
        if isinstance(item, str):
            text = item
        else:
            out.append((text, [item["head"], *item["rows"]]))
    return out


def measured(report, title):
    """Date and commit of a section."""
    found = re.search(r"Measured (\S+) \S+ UTC, commit (\w+)",
                      "\n".join(i for i in report.sections.get(title, []) if isinstance(i, str)))
    return f"{found[1]}, commit {found[2]}" if found else "?"


def heading(report, name):
    return next((line[len(name) + 4:] for line in report.heading if line.startswith(f"- {name}: ")), "?")


def number(cell):
    return float(cell.split()[0])


def training(report):
    """Rows of the table: batch and threads, moe.h, the fastest PyTorch, ratio."""
    memory = {(what, process): mb for _, rows in tables(report, "Memory") for what, process, mb, *_ in rows}
    out = []
    for text, rows in tables(report, "Training step"):
        for batch in dict.fromkeys(r[0] for r in rows[1:]):
            speed = {r[1]: r[2] for r in rows[1:] if r[0] == batch}
            best = max((n for n in speed if n.startswith("PyTorch")), key=lambda n: number(speed[n]))
            cells = [f"{speed[n]}, {memory['training step, ' + batch, n]} MB" for n in ("moe.h fp32", best)]
            faster = next(r[3] for r in rows[1:] if r[:2] == [batch, best])
            out.append(f"| {batch}, {text.rstrip(':')} | {cells[0]} | {cells[1]} ({best.replace('PyTorch ', '')}) | {faster} |")
    return out


def ratios(report, title, row):
    """{threads in words: [ratio by shape]} of a row of a table of inference."""
    return {text.rstrip(":"): [c.split()[0] for c in r[1:]] for text, rows in tables(report, title) for r in rows if r[0] == row}


def section(report):
    shapes = next(rows[0][1:] for _, rows in tables(report, "Inference"))
    lines = ["## Speed", "", INTRODUCTION, "",
             f"CPU: {heading(report, 'CPU').split(';')[0]}; {heading(report, 'compiler').split(';')[0]}; {heading(report, 'peers')}.", "",
             "A training step of MiniLM's size (6 x 384, N = 4, T = 8, 32 sequences, fp32), tokens per second and peak memory of the process, against the fastest of our variants "
             f"of it in PyTorch ({measured(report, 'Training step')}):", "", "| | moe.h | PyTorch | times |", "|---|---|---|---|", *training(report), "",
             f"Inference in fp32 against the fastest of PyTorch, ONNX Runtime and OpenVINO (dense), by batch x length, times as fast ({measured(report, 'Inference')}):", "",
             "| | " + " | ".join(shapes) + " |", "|" + "---|" * (len(shapes) + 1)]
    for name, row in (("dense", "moe.h dense / best dense peer"), ("MT-TaG", "moe.h TaG / best dense peer"), ("MT-TaG, against MT-TaG in PyTorch", "moe.h TaG / PyTorch MT-TaG")):
        lines += [f"| {name}, {threads} | " + " | ".join(cells) + " |" for threads, cells in ratios(report, "Inference", row).items()]
    int8 = [float(c) for cells in ratios(report, "Inference, int8", "moe.h int8 dense / ONNX Runtime int8").values() for c in cells]
    start = [float(r[2]) for _, rows in tables(report, "Start and memory of a first answer") for r in rows[1:] if r[0].startswith("C on ONNX Runtime")]
    lines += ["", "A mixture of four experts reads up to four times the weights, which is what few tokens wait for."]
    if int8:
        lines.append(f"With int8 moe.h is {min(int8):.1f} to {max(int8):.1f} times as fast as ONNX Runtime's dynamic int8 (dense; {measured(report, 'Inference, int8')}).")
    if start:
        lines.append(f"A cold process with a mapped model file answers {min(start):.0f} times sooner than a C program on ONNX Runtime "
                     f"({measured(report, 'Start and memory of a first answer')}).")
    return lines + ["The command: `make -C bench`; all tables: `bench/results.md`; what falls short of what we asked for, and what limits it: `bench/limits.md`.", ""]


def main():
    report = Report(os.path.join(run.HERE, "results", "speed.json"), [title for title, _, _ in run.SECTIONS.values()])
    with open(README, encoding="utf-8") as f:
        before, _, rest = f.read().partition("## Speed\n")
    if not rest:
        sys.exit("readme.py: README.md has no section Speed")
    after = rest[rest.index("\n## ") + 1:]
    with open(README, "w", encoding="utf-8") as f:
        f.write(before + "\n".join(section(report)) + "\n" + after)


if __name__ == "__main__":
    main()
