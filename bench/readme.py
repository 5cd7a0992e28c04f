#!/usr/bin/env python3
"""Writes the section Speed of README.md from bench/results/speed.json, so that both show the same
run. Run by `make -C bench readme`."""

import os
import re
import sys

import run
from report import Report

README = os.path.join(run.HERE, "..", "README.md")


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
    found = re.search(
        r"Measured (\S+) \S+ UTC, commit (\w+)",
        "\n".join(i for i in report.sections.get(title, []) if isinstance(i, str)),
    )
    return f"{found[1]}, commit {found[2]}" if found else "?"


def heading(report, name):
    return next(
        (line[len(name) + 4 :] for line in report.heading if line.startswith(f"- {name}: ")), "?"
    )


def ratios(report, title, row):
    """{threads in words: [ratio by shape]} of a row of a table of inference."""
    return {
        text.rstrip(":"): [c.split()[0] for c in r[1:]]
        for text, rows in tables(report, title)
        for r in rows
        if r[0] == row
    }


def span(values):
    """The least and the most of some ratios."""
    return (
        f"{min(values):.2f} to {max(values):.2f}"
        if min(values) < max(values)
        else f"{values[0]:.2f}"
    )


def dense(report, title, row):
    """All ratios of a row, whatever the threads and shapes."""
    return [float(c) for cells in ratios(report, title, row).values() for c in cells]


def figure(report, title, start):
    """What was seen of the first figure of a section whose name begins so."""
    return next(
        (row[2].split()[0] for row in report.figures.get(title, []) if row[0].startswith(start)),
        "?",
    )


def training(report, batch):
    """Ratios of a training step to the fastest PyTorch, for each number of threads."""
    out = []
    for _, rows in tables(report, "Training step"):
        speed = {r[1]: (float(r[2].split()[0]), r[3]) for r in rows[1:] if r[0].endswith(batch)}
        best = max((n for n in speed if n.startswith("PyTorch")), key=lambda n: speed[n][0])
        out.append(float(speed[best][1]))
    return out


def section(report):
    cpu = heading(report, "CPU").split(";")[0]
    peers = ", ".join(
        p
        for p in heading(report, "peers").split(", ")
        if p.split()[0] in ("torch", "onnxruntime", "openvino")
    )
    start = [
        float(r[2])
        for _, rows in tables(report, "Start and memory of a first answer")
        for r in rows[1:]
        if r[0].startswith("C on ONNX Runtime")
    ]
    best, tag = "moe.h dense / best dense peer", "moe.h TaG / PyTorch MT-TaG"
    return [
        "## Speed",
        "",
        (
            "Ratios to the fastest peer beside it in the same run, same threads (1 and 2), MiniLM's"
            " size;"
        ),
        f"{cpu}; {peers}; {measured(report, 'Inference')}.",
        "",
        (
            f"- Training step, fp32, 32 x 128: {span(training(report, '32 x 128'))} times PyTorch,"
            f" in {figure(report, 'Training step', 'peak memory of training, 32 x 128')} of its"
            " memory."
        ),
        (
            f"- Inference, dense, fp32, 1 x 8 to 32 x 128: {span(dense(report, 'Inference', best))}"
            " times the best of PyTorch, ONNX Runtime, OpenVINO."
        ),
        (
            f"- Inference, MT-TaG: {span(dense(report, 'Inference', tag))} times PyTorch's MT-TaG."
            " It reads"
        ),
        (
            "  up to four times a dense model's weights, so with few tokens it is slower than dense"
            " peers."
        ),
        (
            "- int8:"
            f" {span(dense(report, 'Inference, int8', 'moe.h int8 dense / ONNX Runtime int8'))}"
            " times ONNX Runtime's dynamic int8."
        ),
        (
            f"- First answer of a cold process: {min(start):.0f} times sooner than C on ONNX"
            " Runtime."
            if start
            else ""
        ),
        (
            "- The command: `make -C bench`. Figures: [`bench/results.md`](bench/results.md); what"
            " falls short,"
        ),
        "  and why: [`bench/limits.md`](bench/limits.md).",
        "",
    ]


def main():
    report = Report(
        os.path.join(run.HERE, "results", "speed.json"),
        [title for title, _, _ in run.SECTIONS.values()],
    )
    with open(README, encoding="utf-8") as f:
        before, _, rest = f.read().partition("## Speed\n")
    if not rest:
        sys.exit("readme.py: README.md has no section Speed")
    after = rest[rest.index("\n## ") + 1 :]
    with open(README, "w", encoding="utf-8") as f:
        f.write(before + "\n".join(section(report)) + "\n" + after)


if __name__ == "__main__":
    main()
