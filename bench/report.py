"""bench/results.md: sections that can be measured anew one by one, and a summary of what was asked and what was seen."""
import os

SUMMARY = "Asked and seen"
BOUND = ("Bound: what the ratio to the same peer would be if moe.h did nothing but the multiplications and additions of the model at the peak of the processor that was probed right "
         "before each round, or nothing but read the weights once at the best probed bandwidth, whichever takes longer; counted and probed in the run.")
SUMMARY_HEAD = ["figure", "asked", "seen", "bound", "", "section"]


def table_lines(head, rows):
    cells = [head] + [["" if c is None else str(c) for c in r] for r in rows]
    width = [max(len(r[i]) for r in cells) for i in range(len(head))]

    def line(r):
        return "| " + " | ".join(c.ljust(w) for c, w in zip(r, width)) + " |"
    return [line(cells[0]), "|" + "|".join("-" * (w + 2) for w in width) + "|", *(line(r) for r in cells[1:]), ""]


class Report:
    """A heading, the summary, and the sections in the order of `titles`. What a file at `path` holds stays until it is replaced."""

    def __init__(self, path, titles, keep=True):
        self.path, self.titles = path, titles
        self.heading, self.sections, self.figures = [], {}, {}
        self.memory = {}            # (what, process): MB, for the section of that name
        self.limits = ""            # what the bounds follow from, in words
        self.here = self.heading    # what text() adds to
        self.title = None
        if keep and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                self.parse(f.read().splitlines())

    def parse(self, lines):
        title, part = None, []
        for line in lines + ["## "]:
            if not line.startswith("## "):
                part.append(line)
                continue
            if title == SUMMARY:
                for row in part:
                    cells = [c.strip() for c in row.strip("|").split(" | ")]
                    if row.startswith("| ") and len(cells) == len(SUMMARY_HEAD) and cells != SUMMARY_HEAD:
                        self.figures.setdefault(cells[-1], []).append(cells[:-1])
            elif title in self.titles:
                self.sections[title] = part
            elif title is None:
                self.heading = part
            title, part = line[3:].strip(), []

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
        """Takes the section over, with `lines` above it. One that could not be measured leaves what was there. disturbed: its figures say so."""
        for row in self.figures[self.title] if disturbed else ():
            row[-1] += ", disturbed"
        self.sections[self.title] = ["", *lines, *self.here]
        self.save()

    def text(self, *lines):
        for line in lines:
            self.here.append(line)
            print(line, flush=True)

    def table(self, head, rows):
        self.text(*table_lines(head, rows))

    def figure(self, name, asked, seen, verdict, bound=""):
        """A line of the summary. verdict: True, False, or words where nothing is asked of this machine."""
        self.figures[self.title].append([name, asked, seen, bound, verdict if isinstance(verdict, str) else "pass" if verdict else "**short**"])

    def save(self):
        rows = [row + [title] for title in self.titles for row in self.figures.get(title, [])]
        lines = list(self.heading)
        if rows:
            lines += [f"## {SUMMARY}", "", *table_lines(SUMMARY_HEAD, rows), BOUND + (f" Probed: {self.limits}." if self.limits else ""), ""]
        for title in self.titles:
            if title in self.sections:
                lines += [f"## {title}", *self.sections[title]]
        text = "\n".join(lines).rstrip()
        while "\n\n\n" in text:
            text = text.replace("\n\n\n", "\n\n")
        with open(self.path, "w", encoding="utf-8") as f:
            f.write(text + "\n")
