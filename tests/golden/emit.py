"""Writes golden values as C headers: plain arrays of double, or of int."""
import textwrap


class Header:
    def __init__(self, path, guard, comment):
        self.path, self.guard = path, guard
        self.out = [
            "/* "
            + "\n".join(("   " + s).rstrip() for s in comment.strip().split("\n"))[3:]
            + " */",
            f"#ifndef {guard}",
            f"#define {guard}",
            '#include "golden.h"',
        ]

    def text(self, line=""):
        self.out.append(line)

    def comment(self, text):
        self.out += ["", "/* " + "\n   ".join(textwrap.wrap(" ".join(text.split()), 116)) + " */"]

    def values(self, name, tensor, digits=9):
        v = tensor.detach().double().reshape(-1).tolist()
        self.array("double", name, [f"{x:.{digits}g}" for x in v])

    def numbers(self, name, pairs):
        """A table of (name, value)."""
        self.out.append(f"static const golden_number {name}[{len(pairs)}] = {{")
        self.out += [f'  {{"{n}", {float(x):.9g}}},' for n, x in pairs]
        self.out.append("};")

    def ints(self, name, numbers):
        self.array("int", name, [str(int(x)) for x in numbers])

    def array(self, kind, name, items):
        self.out.append(f"static const {kind} {name}[{len(items)}] = {{")
        self.out += pack(items)
        self.out.append("};")

    def save(self):
        with open(self.path, "w", encoding="ascii", newline="\n") as f:
            f.write("\n".join(self.out + ["#endif", ""]))


def pack(items, width=118):
    """Items joined by commas into lines of at most width characters."""
    lines, line = [], ""
    for i, s in enumerate(items):
        s += "," if i + 1 < len(items) else ""
        if len(line) + len(s) > width:
            lines.append(line)
            line = ""
        line += s
    return lines + [line]
