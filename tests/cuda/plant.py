"""Plants faults in moe_cuda.h: copies it with hundreds of them, each behind a switch, so that one
build serves all (plant.h). The programs of tests/cuda/ then run with MOE_PLANT=number, or with all
of them one by one (kernels plants). SECTION: products, experts, ...; none: all.

    python3 plant.py ../../moe_cuda.h OUT.h [COUNT] [SEED] [SECTION...]

Faults: an operator becomes its neighbour (< <=, == !=, + -, * +, << >>, & |), an integer grows by
one, a float by a quarter, a condition turns round, a barrier or a wait is left out, an assignment
is left out, a sum is subtracted. They are drawn evenly from the sections of the file and from the
kinds of faults. OUT.h.txt lists them: number, section, kernel or host, line, kind, what it changes,
the line. OUT.h.without, if it is there, lists lines to leave alone: a fault there did not compile.
"""

import os
import random
import re
import sys

SECTIONS = ("cuda_base cuda_products cuda_experts cuda_attention cuda_rows cuda_route cuda_heads"
            " cuda_adam cuda_driver cuda_memory cuda_compile cuda_table").split()
OPERATORS = re.compile(r"(?<=[\w)\]]) (<=|>=|==|!=|<<|>>|[-+*/%<>&|]) (?=[\w(*&!-])(?!NULL)")
INTEGER = re.compile(r"(?<![\w.\"'])(\d+)(u?)(?![\w.\"'])")
FLOAT = re.compile(r"(?<![\w.\"'])(\d+\.\d*(?:e[-+]?\d+)?f)(?![\w.])")
BARRIER = re.compile(r"\b(MOE_SYNC\(\)|moe__d_copy_wait1\(\));")
CONDITION = re.compile(r"\b(if|while) \(")
SUM = re.compile(r"^(\s*)([\w\[\]().>*-]+(?: ?[-+*/] ?[\w()]+)*\]*) \+= ([^;]*);(.*)$")
ASSIGNMENT = re.compile(r"^(\s*)((?:[\w.>-]+|\*\w+)(?:\[[^=]*\])?(?:\.\w+)*) = ([^;{}]*);$")
# no fault can be planted where a constant is needed, or where the text is not code
SKIP = re.compile(
    r"__shared__|__device__|__global__|__attribute__|__launch_bounds__|^\s*#|\benum\b|\bcase\b"
    r"|\bstatic const\b|typedef|static struct|^\s+\w+, \d+,|MOE_KERNEL|\bX\(|\basm\b|\"|goto"
    r"|MOE__CUDA_(SOURCE|SHARED|KERNELS|CHUNKS)|\btemplate\b|\w<[\w ,=!]*>\(")
TYPED = re.compile(r"\s*(const |unsigned )*(float|int|unsigned|char|double|size_t|u?int\d+_t"
                   r"|moe__?\w+|void) [^=]*$")
POINTER = re.compile(r"\)\[$|\*\)$|\? [\w.>-]+ : $|(, ?|\*) ?\w+\[$")
DECLARED_ARRAY = re.compile(r"^\s*(?:const )?(?:float|int|unsigned|char|double|void|moe__?\w+"
                            r"|size_t|uint\d+_t|int\d+_t)\b[^=;(]*\[[^;]*")


def masked(line):
    """The line with comments as blanks."""
    line = re.sub(r"/\*.*?\*/", lambda m: " " * len(m.group()), line)
    return re.sub(r"//.*", lambda m: " " * len(m.group()), line)


def closing(text, at):
    """Where the bracket at `at` closes, or -1."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    return -1


def faults_of(line):
    """(kind, start, end, text with @ for the number) of one line."""
    out = []
    for m in OPERATORS.finditer(line):
        op = m.group(1)
        out.append(("operator " + op, m.start(1), m.end(1), "%s PLANT(@) %s" % (op, op)))
    for m in INTEGER.finditer(line):
        before = line[:m.start()]
        declared = TYPED.match(before) and before.count("[") > before.count("]")
        if not declared and not POINTER.search(before):
            out.append(("integer", m.start(), m.end(), "PLANT_INT(@, %s)" % m.group()))
    for m in FLOAT.finditer(line):
        out.append(("float", m.start(), m.end(), "PLANT_FLOAT(@, %s)" % m.group()))
    for m in BARRIER.finditer(line):
        out.append(("barrier", m.start(), m.end(), "PLANT_SKIP(@, %s);" % m.group(1)))
    for m in CONDITION.finditer(line):
        end = closing(line, m.end() - 1)
        if end > 0:
            out.append(("condition", m.end(), end, "PLANT_NOT(@, (%s))" % line[m.end():end]))
    m = SUM.match(line)
    if m and m.group(3).count("(") == m.group(3).count(")"):
        out.append(("sum", m.end(2), m.end(3), " += PLANT_SIGN(@) * (%s)" % m.group(3)))
    m = ASSIGNMENT.match(line)
    if m and not re.match(r"\s*(return|const|else|float|int|unsigned)\b", line):
        out.append(("assignment", m.start(2), m.end(3),
                    "PLANT_SKIP(@, %s)" % line[m.start(2):m.end(3)]))
    return out


def candidates(lines, sections):
    section = None
    comment = False
    for number, line in enumerate(lines):
        m = re.match(r"/\* ---- .* ---- >>(\w+)", line)
        if m:
            section = m.group(1)
        if line.startswith("/* LICENCE"):
            return
        text = line if not comment else ""
        if comment and "*/" in line:
            comment = False
            text = ""
        elif not comment and "/*" in re.sub(r"/\*.*?\*/", "", line):
            comment = True
            text = ""
        if section not in sections or line.endswith("\\") or not text.startswith("  "):
            continue
        code = masked(text)
        if SKIP.search(code) or (DECLARED_ARRAY.match(code) and "=" not in code):
            continue
        in_kernel = text.startswith("      ") and kernel_at(lines, number)
        for kind, start, end, new in faults_of(code):
            yield section, "kernel" if in_kernel else "host", number, kind, start, end, new


def kernel_at(lines, number):
    """Whether the line is inside MOE__CUDA_SOURCE(...)."""
    while number >= 0 and not re.match(r"\S", lines[number]):
        number -= 1
    return lines[number].startswith("MOE__CUDA_S")


def choose(every, count, seed, without):
    """The same number from each section and kind, as far as there are any; one in a place."""
    groups = {}
    draw = random.Random(seed)
    every = [c for c in every if c[2] + 1 not in without]
    for c in every:
        groups.setdefault((c[0], c[1], c[3].split()[0]), []).append(c)
    for group in groups.values():
        draw.shuffle(group)
    chosen, lines = [], set()
    while len(chosen) < count and any(groups.values()):
        for key in sorted(groups):
            while groups[key]:
                c = groups[key].pop()
                if (c[2], c[3] == "sum") not in lines and c[2] not in lines:
                    chosen.append(c)
                    lines.add(c[2])
                    break
    return sorted(chosen[:count], key=lambda c: c[2])


def main():
    source, out = sys.argv[1:3]
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 400
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    sections = ["cuda_" + s for s in sys.argv[5:]] or SECTIONS
    without = set() # lines where a fault does not compile
    if os.path.exists(out + ".without"):
        with open(out + ".without", encoding="utf-8") as f:
            without = {int(line) for line in f}
    with open(source, encoding="utf-8") as f:
        lines = f.read().split("\n")
    chosen = choose(list(candidates(lines, sections)), count, seed, without)
    with open(out + ".txt", "w", encoding="utf-8") as table:
        for number, (section, where, line, kind, start, end, new) in enumerate(chosen, 1):
            text = lines[line]
            before = text[start:end].strip()
            lines[line] = text[:start] + new.replace("@", str(number)) + text[end:]
            print("\t".join((str(number), section, where, str(line + 1), kind, before,
                             text.strip())), file=table)
    with open(out, "w", encoding="utf-8") as f:
        f.write("#include \"plant.h\"\n" + "\n".join(lines).replace(
            '#include "moe.h"', '#include "../../../moe.h"').replace(
                "MOE__CUDA_SCRATCH = 1 << 20", "MOE__CUDA_SCRATCH = 1").replace(
                    "MOE__CUDA_ALIGN = 256", "MOE__CUDA_ALIGN = 16"))
    print(len(chosen), "faults")


main()
