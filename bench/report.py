"""bench/results/speed.json holds what was measured, section by section, and bench/results.md is the
page in front of it: the machine, and what was asked and seen."""

import json
import os

BOUND = (
    "Bound: what the ratio to the same peer would be if moe.h did nothing but the multiplications "
    "and additions of the model at the peak of the processor that was probed right before each "
    "round, or nothing but read the weights once at the best probed bandwidth, whichever takes "
    "longer; counted and probed in the run."
)
SUMMARY_HEAD = ["figure", "asked", "seen", "bound", "verdict"]


def table_lines(head, rows):
    return [
        "| " + " | ".join(str("" if c is None else c) for c in r) + " |"
        for r in [head, ["---"] * len(head), *rows]
    ] + [""]


class Report:
    """A heading, and the sections in the order of `titles`: each a list of lines of text and of
    tables
    {"head": [...], "rows": [[...]]}. The data at `path` stays until it is replaced; page: the
    file of
    the readable page, or None for all of it as text in `path` itself."""

    def __init__(self, path, titles, keep=True, page=None):
        self.path, self.titles, self.page = path, titles, page
        self.heading, self.sections, self.figures = [], {}, {}
        self.memory = {}  # (what, process): MB, for the section of that name
        self.limits = ""  # what the bounds follow from, in words
        self.here = self.heading  # what text() adds to
        self.title = None
        if keep and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                data = json.load(f)
            self.heading, self.limits = data["heading"], data["probed"]
            self.sections, self.figures = data["sections"], data["figures"]

    def machine(self):
        """The lines of the heading that say where it was measured."""
        return [line for line in self.heading if line.startswith("- CPU:")]

    def begin_heading(self):
        self.heading = self.here = []

    def begin(self, title):
        self.title = title
        self.here = []
        self.figures[title] = []
        print(f"\n## {title}\n", flush=True)

    def end(self, disturbed, *lines):
        """Takes the section over, with `lines` above it. One that could not be measured leaves what
        was
        there. disturbed: its figures say so."""
        for row in self.figures[self.title] if disturbed else ():
            row[-1] += ", disturbed"
        self.sections[self.title] = [line for line in [*lines, *self.here] if line != ""]
        self.save()

    def text(self, *lines):
        for line in lines:
            self.here.append(line)
            print(line, flush=True)

    def table(self, head, rows):
        rows = [["" if c is None else str(c) for c in r] for r in rows]
        self.here.append({"head": head, "rows": rows})
        print("\n".join(table_lines(head, rows)), flush=True)

    def figure(self, name, asked, seen, verdict, bound=""):
        """A line of the summary. verdict: True, False, or words where nothing is asked of this
        machine."""
        words = verdict if isinstance(verdict, str) else "pass" if verdict else "**short**"
        self.figures[self.title].append([name, asked, seen, bound, words])

    def summary(self):
        """The page: the heading, then the figures of each section."""
        lines = list(self.heading)
        for title in self.titles:
            if self.figures.get(title):
                lines += [f"## {title}", "", *table_lines(SUMMARY_HEAD, self.figures[title])]
        return lines + [BOUND + (f" Probed: {self.limits}." if self.limits else ""), ""]

    def whole(self):
        """Every section with its tables, as text."""
        lines = self.summary()
        for title in self.titles:
            for item in (
                [f"# {title}", *self.sections.get(title, [])] if title in self.sections else []
            ):
                lines += (
                    [item, ""] if isinstance(item, str) else table_lines(item["head"], item["rows"])
                )
        return lines

    def save(self):
        if self.page:
            data = {
                "heading": self.heading,
                "probed": self.limits,
                "sections": {t: self.sections[t] for t in self.titles if t in self.sections},
                "figures": {t: self.figures[t] for t in self.titles if self.figures.get(t)},
            }
            with open(self.path, "w", encoding="utf-8") as f:
                json.dump(data, f, indent=1, ensure_ascii=False)
                f.write("\n")
        with open(self.page or self.path, "w", encoding="utf-8") as f:
            f.write("\n".join(self.summary() if self.page else self.whole()).rstrip() + "\n")
