#!/usr/bin/env python3
"""Plants faults in moe.h and tells which of them the C tests find. (moe_cuda.h: cuda/plant.sh)

  make -C tests mutate N=50 SEED=3       50 faults, spread over all sections
  python3 mutate.py --number 400 --list  which faults these are
  python3 mutate.py --only json,out --number 200

All faults of a run are compiled into one build of the test programs: (MUT(17) ? a - b : a + b).
The environment's MOE_MUTANT says which of them is real. First each test runs alone without a fault,
which tells its time and the faults that it reaches. Then each fault runs the tests that reach it,
the quick ones first, until one fails, crashes or takes too long. A seed chooses faults by a hash of
their lines: it plants the same ones again where the header has changed elsewhere. mutants.tsv lists
the faults that no test can find, with reasons: "equivalent", or on other machines: "elsewhere".
Results are added to build/mutate.tsv: a fault that is there is not hunted again (--again: but for
those that survived). Needs gcc or clang, and a system with mmap."""
import argparse
import bisect
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
PROGRAMS = ("kernels", "ops", "model", "files", "text", "train")
FLAGS = ["-std=c99", "-D_POSIX_C_SOURCE=200809L", "-O1", "-w", "-I."]
# Where the compiler has them: a variable that a fault leaves unset is not 0 by chance, and a write
# past an array on the stack is seen
GUARDS = ["-ftrivial-auto-var-init=pattern", "-fstack-protector-strong"]
# Text that ends an expression on its left or right, in the same pair of parentheses
ASSIGN = {"=", "+=", "-=", "*=", "/=", "%=", "|=", "&=", "^=", "<<=", ">>="}
OPERATORS = {"<=": ["<"], ">=": [">"], "<": ["<=", ">="], ">": [">=", "<="], "==": ["!="],
             "!=": ["=="], "&&": ["||"], "||": ["&&"], "+": ["-"], "-": ["+"], "*": ["+"],
             "/": ["*"], "%": ["/"], "&": ["|"], "|": ["&"], "<<": [">>"], ">>": ["<<"],
             "+=": ["-=", "="], "-=": ["+="], "*=": ["+="], "|=": ["=", "&="], "&=": ["|="]}
TOKEN = re.compile(r"""[A-Za-z_]\w*|0[xX][0-9a-fA-F]+[uUlL]*|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?
    [fFuUlL]*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|<<=|>>=|\.\.\.|->|\+\+|--|&&|\|\||
    [-+*/%&|^<>=!]=|<<|>>|[^\s]""", re.X)
TYPES = {"const", "static", "unsigned", "signed", "struct", "enum", "union", "int", "char", "short",
         "long", "float", "double", "void", "size_t", "extern", "typedef", "volatile", "register"}
PROLOGUE = """
/* What mutate.py plants asks here. */
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
static unsigned char moe__mutants_none[%(n)d];
static volatile unsigned char *moe__mutants = moe__mutants_none;
static int moe__mutant = -1;
__attribute__((constructor)) static void moe__mutant_begin(void) {
  const char *which = getenv("MOE_MUTANT"), *map = getenv("MOE_MUTANTS");
  int fd = map ? open(map, O_RDWR) : -1;
  if (which) moe__mutant = atoi(which);
  if (fd < 0) return;
  moe__mutants = (volatile unsigned char *)mmap(0, %(n)d, PROT_READ | PROT_WRITE, MAP_SHARED,
                                                fd, 0);
  close(fd);
}
#define MUT(k) (moe__mutants[k] = 1, moe__mutant == (k))
"""


class Token:
    __slots__ = ("text", "at", "end", "depth")

    def __init__(self, text, at):
        self.text, self.at, self.end, self.depth = text, at, at + len(text), 0


def blank(match):
    return re.sub(r"[^\n]", " ", match.group())


def tokens_of(source, active):
    """The tokens of the lines that this machine compiles, without comments and directives."""
    code = re.sub(r"/\*.*?\*/", blank, source, flags=re.S)
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, code, flags=re.M)
    lines, depth = code.split("\n"), 0
    for i, line in enumerate(lines):
        # arguments of a macro count as one line for the preprocessor
        if not active(i + 1) and depth <= 0:
            lines[i] = " " * len(line)
        else:
            depth += lines[i].count("(") - lines[i].count(")")
    return [Token(m.group(), m.start()) for m in TOKEN.finditer("\n".join(lines))]


def close_of(t, i):
    """The index of the bracket that closes the one at i."""
    depth = 0
    for j in range(i, len(t)):
        if t[j].text in "([{":
            depth += 1
        elif t[j].text in ")]}":
            depth -= 1
            if not depth:
                return j
    raise ValueError("a bracket is not closed")


def is_declaration(t, i, end):
    a, b = t[i].text, t[i + 1].text if i + 1 < end else ""
    if a in TYPES or a == "enum":
        return True
    if not re.match(r"[A-Za-z_]", a):
        return False
    if re.match(r"[A-Za-z_]", b):
        return True
    return b == "*" and i + 3 <= end and (t[i + 3].text in "=;,[" or
                                          t[i + 2].text in ("*", "const"))


class Parser:
    """Splits the body of a function into pieces: conditions, returned values, statements."""

    def __init__(self, t):
        self.t, self.pieces = t, []

    def piece(self, kind, begin, end):
        if end > begin:
            self.pieces.append((kind, begin, end))

    def simple_end(self, i):
        while self.t[i].text != ";":
            i = close_of(self.t, i) + 1 if self.t[i].text in "([{" else i + 1
        return i

    def statement(self, i):
        """Reads the statement at i; returns the index behind it."""
        t, word = self.t, self.t[i].text
        if word == "{":
            end = close_of(t, i)
            i += 1
            while i < end:
                i = self.statement(i)
            return end + 1
        if word in ("if", "while", "switch", "for"):
            end = close_of(t, i + 1)
            if word == "for":
                first = self.simple_end(i + 2)
                second = self.simple_end(first + 1)
                self.piece("init", i + 2, first)
                self.piece("for", first + 1, second)
                self.piece("step", second + 1, end)
            else:
                self.piece(word, i + 2, end)
            i = self.statement(end + 1)
            if word == "if" and i < len(t) and t[i].text == "else":
                i = self.statement(i + 1)
            return i
        if word == "do":
            i = self.statement(i + 1)
            return self.simple_end(i) + 1
        if word in ("case", "default"):
            while t[i].text != ":":
                i += 1
            return i + 1
        end = self.simple_end(i)
        if word == "return":
            self.piece("return", i + 1, end)
        elif is_declaration(t, i, end):
            self.piece("declaration", i, end)
        elif word not in ("break", "continue", "goto", "typedef", ";", "else"):
            self.piece("statement", i, end)
        return end + 1


def span(t, begin, end, at, operator):
    """The tokens around the one at `at` that are an expression of their own."""
    before = {",", ";", "?", ":", "return"} | (set() if operator in ASSIGN else ASSIGN)
    if operator not in ("&&", "||"):
        before |= {"&&", "||"}
    after = {",", ";"} if operator in ASSIGN else before
    low, depth = at, 0
    while low > begin:
        text = t[low - 1].text
        if depth == 0 and (text in before or text in "([{"):
            break
        depth += (text in ")]}") - (text in "([{")
        low -= 1
    high, depth = at + 1, 0
    while high < end:
        text = t[high].text
        if depth == 0 and (text in after or text in ")]}"):
            break
        depth += (text in "([{") - (text in ")]}")
        high += 1
    return low, high


class Planter:
    def __init__(self, path):
        self.path = path
        with open(path, encoding="utf-8") as f:
            self.source = f.read()
        self.mutants = []
        self.starts = [0] + [m.end() for m in re.finditer("\n", self.source)]
        self.tags = [(m.start(), m.group(1)) for m in
                     re.finditer(r"^/\* ---- [^\n]*? ---- >>([a-z0-9_]+)", self.source, re.M)]

    def add(self, kind, a, b, new):
        """A fault in the text from a to b; `new` replaces it where the fault is real. Its line is
        shown with {{ }} around the text."""
        tag = [name for at, name in self.tags if at <= a]
        if not tag or tag[-1].startswith("api_"):
            return
        line = bisect.bisect_right(self.starts, a)
        end = self.source.index("\n", b)
        shown = (self.source[self.starts[line - 1]:a] + "{{" + self.source[a:b] + "}}" +
                 self.source[b:end])
        self.mutants.append({"section": tag[-1], "kind": kind, "at": a, "end": b, "new": new,
                             "line": line, "shown": " ".join(shown.split()),
                             "change": " ".join(new.split())})

    def replaced(self, a, b, at, end, text):
        return self.source[a:at] + text + self.source[end:b]

    def expression(self, t, begin, end, declared):
        for i in range(begin, end):
            text, before = t[i].text, t[i - 1].text
            binary = self.source[t[i].at - 1] in " \n" and self.source[t[i].end] in " \n"
            if text in OPERATORS and binary and not (declared and before in TYPES):
                low, high = span(t, begin, end, i, text)
                a, b = t[low].at, t[high - 1].end
                for other in OPERATORS[text]:
                    if {text, other} in ({"<", "<="}, {">", ">="}) and self.least(t, low, i, high):
                        continue
                    self.add(text + " to " + other, a, b,
                             self.replaced(a, b, t[i].at, t[i].end, other))
            elif text == "!" and i + 1 < end:
                low, high = span(t, begin, end, i, "!")
                a, b = t[low].at, t[high - 1].end
                self.add("no !", a, b, self.replaced(a, b, t[i].at, t[i].end, " "))
            elif re.fullmatch(r"\d+[uU]?", text) and before not in ("case", "["):
                if self.is_immediate(t, begin, i):
                    continue
                number = int(text.rstrip("uU"))
                other = "0" if number == 1 else str(number + 1)
                self.add("%s to %s" % (text, other), t[i].at, t[i].end, other)
            elif re.fullmatch(r"\d+\.\d*f?", text) and float(text.rstrip("f")):
                self.add("twice", t[i].at, t[i].end, "2 * " + text)
            elif text in ("++", "--") and re.match(r"[A-Za-z_]", t[i + 1].text):
                low, high = span(t, begin, end, i, "=")
                a, b = t[low].at, t[high - 1].end
                self.add(text, a, b, self.replaced(a, b, t[i].at, t[i].end,
                                                   "--" if text == "++" else "++"))
            elif text == "(" and re.match(r"[A-Za-z_]", before):
                self.swap(t, i)

    def is_immediate(self, t, begin, i):
        """Whether a constant is an argument of an intrinsic: part of an instruction."""
        depth = 0
        while i > begin:
            i -= 1
            depth += (t[i].text in ")]") - (t[i].text in "([")
            if depth < 0:
                return t[i].text == "(" and t[i - 1].text.startswith(("_mm", "MOE__Q_LANE"))
        return False

    def least(self, t, low, i, high):
        """Whether a < b ? a : b or the like: no matter which of two equals it is."""
        words = [x.text for x in t[low:high + 2 + 2 * (high - low)]]
        a, b, n = words[:i - low], words[i - low + 1:high - low], high - low
        return words[n:n + 1] == ["?"] and words[n + 1:n + 1 + len(a)] in (a, b) and (
            words[n + 1:n + 1 + len(a) + 1 + len(b)] == a + [":"] + b or
            words[n + 1:n + 1 + len(b) + 1 + len(a)] == b + [":"] + a)

    def swap(self, t, i):
        """Exchanges the first two arguments of a call, where both are simple."""
        m = re.match(r"\((\w+(?:\[\w+\]|->\w+|\.\w+)*),\s+(\w+(?:\[\w+\]|->\w+|\.\w+)*)(?=[,)])",
                     self.source[t[i].at:t[i].at + 120])
        if (m and m.group(1) != m.group(2) and not t[i - 1].text.isupper() and
                not re.fullmatch(r"strn?cmp|memcmp|moe__(min|max|mul|add)", t[i - 1].text)):
            end = close_of(t, i)
            a, b, at = t[i - 1].at, t[end].end, t[i].at
            self.add("swap", a, b, self.replaced(a, b, at + m.start(1), at + m.end(2),
                                                 m.group(2) + ", " + m.group(1)))

    def piece(self, t, kind, begin, end):
        a, b = t[begin].at, t[end - 1].end
        text = self.source[a:b]
        told = "moe__fail(" in text  # messages are not mutated, only whether they come
        if text.startswith("MOE_ASSERT("):  # nothing, if nobody defines it
            return
        if kind in ("if", "while", "for"):
            for value in "01" if kind == "if" else "0":
                self.add("%s (%s)" % (kind, value), a, b, value)
        if kind == "return" and told and "?" not in text:
            self.add("return MOE_OK", a, b, "MOE_OK")
        if kind == "statement" and not told and not re.match(r"[A-Z_]+\(|\(void\)", text):
            self.add("nothing", a, b + 1, "")
        if not told:
            self.expression(t, begin, end, kind == "declaration")

    def plant(self, active):
        t = tokens_of(self.source, active)
        i = depth = 0
        while i < len(t):
            if t[i].text == "{" and not depth and t[i - 1].text == ")":
                end = close_of(t, i)
                parser = Parser(t)
                parser.statement(i)
                for kind, low, high in parser.pieces:
                    self.piece(t, kind, low, high)
                i = end + 1
                continue
            depth += (t[i].text == "{") - (t[i].text == "}")
            i += 1


def active_lines(path, compiler):
    """Which lines of a header this compiler sees, with the implementation."""
    out = subprocess.run([compiler] + FLAGS + ["-E", "-DMOE_IMPLEMENTATION", "-x", "c", path],
                         stdout=subprocess.PIPE, check=True).stdout.decode("utf-8", "replace")
    seen, line, here = set(), 0, False
    for text in out.split("\n"):
        m = re.match(r'# (\d+) "([^"]*)"', text)
        if m:
            line, here = int(m.group(1)), m.group(2) == path
            continue
        if here and text.strip():
            seen.add(line)
        line += 1
    return lambda n: n in seen


def identity(m):
    """What a fault is, wherever its line has gone."""
    return m["section"], m["shown"], m["change"]


def choose(mutants, number, seed, only, chosen):
    """Takes from the sections in turn, the smaller ones first; no two faults overlap, nor one of
    those that are chosen already."""
    sections = {}
    for m in mutants:
        if not only or m["section"] in only:
            sections.setdefault(m["section"], []).append(m)
    for section in sections.values():
        section.sort(key=lambda m: hashlib.sha256(repr((seed, identity(m))).encode()).digest())
    taken, number = [(m["at"], m["end"]) for m in chosen], number + len(chosen)
    free = lambda m: all(m["end"] <= a or m["at"] >= b for a, b in taken)
    size = {name: len(section) for name, section in sections.items()}
    picked = dict.fromkeys(sections, 0)
    while sections and len(chosen) < number:
        # as many as the square root of what could be planted there asks for
        name = min(sections, key=lambda s: ((picked[s] + 1) / size[s] ** 0.5, s))
        while sections[name]:
            m = sections[name].pop()
            if free(m):
                taken.append((m["at"], m["end"]))
                chosen.append(m)
                picked[name] += 1
                break
        else:
            del sections[name]
    return chosen


def choose_listed(mutants, path):
    """The faults of a file of results that survived, as far as they are still there."""
    wanted = {key for key, (verdict, _) in read_results(path).items() if verdict == "survived"}
    taken, chosen = [], []
    for m in mutants:
        if identity(m) in wanted and all(m["end"] <= a or m["at"] >= b for a, b in taken):
            wanted.discard(identity(m))
            taken.append((m["at"], m["end"]))
            chosen.append(m)
    return chosen


def read_results(path):
    """section, line, change: verdict, what found it or why nothing does."""
    results = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for line in f:
                part = line.rstrip("\n").split("\t")
                if len(part) == 5:
                    results[tuple(part[2:])] = (part[0], part[1])
    return results


def planted(source, chosen):
    """The source with the faults; the lines keep their numbers."""
    out, at = [], 0
    for m in sorted(chosen, key=lambda m: m["at"]):
        old = source[m["at"]:m["end"]]
        new = re.sub(r"\s*\n\s*", " ", m["new"])
        out.append(source[at:m["at"]])
        if m["kind"] == "nothing":
            out.append("{ if (!MUT(%d)) { %s } }" % (m["id"], old))
        elif m["kind"] == "return MOE_OK":
            out.append("(moe_status)(MUT(%d) ? MOE_OK : (%s))" % (m["id"], old))
        else:
            out.append("(MUT(%d) ? (%s) : (%s))" % (m["id"], new, old))
        at = m["end"]
    return "".join(out) + source[at:]


class Build:
    def __init__(self, folder, compiler):
        self.folder, self.compiler = folder, compiler
        self.tests = os.path.join(folder, "tests")
        self.flags = FLAGS + [x for x in GUARDS if self.accepts(x)]

    def accepts(self, option):
        return not subprocess.run([self.compiler, option, "-fsyntax-only", "-x", "c", os.devnull],
                                  stderr=subprocess.DEVNULL).returncode

    def make_tree(self):
        """A copy of the project made of links; folders are real, or ../ would leave the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in ("tests", "examples", "bench"):
            for at, folders, files in os.walk(os.path.join(ROOT, folder)):
                folders[:] = [f for f in folders if f not in ("build", "venv", "__pycache__")]
                to = os.path.join(self.folder, os.path.relpath(at, ROOT))
                os.makedirs(to)
                for name in files:
                    os.symlink(os.path.join(at, name), os.path.join(to, name))
        os.makedirs(os.path.join(self.tests, "build"))

    def write(self, source, chosen):
        text = planted(source, chosen)
        mark = re.search("^#define MOE_IMPLEMENTATION_DONE.*$", text, re.M)
        if not mark:
            sys.exit("mutate: moe.h has no MOE_IMPLEMENTATION_DONE")
        text = text[:mark.end()] + ' /* */\n#include "mutants.h"\n#line %d "moe.h"\n' % (
            text.count("\n", 0, mark.end()) + 2) + text[mark.end() + 1:]
        with open(os.path.join(self.folder, "moe.h"), "w", encoding="utf-8") as f:
            f.write(text)
        with open(os.path.join(self.folder, "mutants.h"), "w", encoding="utf-8") as f:
            f.write(PROLOGUE % {"n": len(chosen) + 1})

    def compile(self, options, program):
        run = subprocess.run([self.compiler] + self.flags + options + [program + ".c"] +
                             ([] if "-fsyntax-only" in options else ["-ldl", "-lm", "-pthread"]),
                             cwd=self.tests, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return run.stdout.decode("utf-8", "replace") if run.returncode else ""

    def drop_what_does_not_compile(self, planter, chosen):
        """Faults that are no C; repeats until the compiler accepts all others."""
        while True:
            for k, m in enumerate(chosen):
                m["id"] = k
            self.write(planter.source, chosen)
            said = self.compile(["-fsyntax-only"], PROGRAMS[-1])
            if not said:
                return chosen
            bad = {int(n) for n in re.findall(r"^(?:\S*/)?moe\.h:(\d+):\d*:? "
                                              r"(?:fatal )?error",
                                              said, re.M)}
            covers = lambda m: any(m["line"] <= n <= m["line"] +
                                   planter.source.count("\n", m["at"], m["end"]) for n in bad)
            kept = [m for m in chosen if not covers(m)]
            if len(kept) == len(chosen):
                sys.exit("mutate: the planted header does not compile:\n" + said[:2000])
            chosen = kept

    def make(self):
        for name in PROGRAMS:
            said = self.compile(["-o", self.binary(name)], name)
            if said:
                sys.exit("mutate: %s does not compile:\n%s" % (name, said[:2000]))

    @staticmethod
    def binary(name):
        return "build/test_" + name


class Tests:
    def __init__(self, build, faults):
        self.build, self.faults = build, faults
        self.map = os.path.join(build.folder, "reached")

    def run(self, program, names, mutant, limit):
        """'' where all pass, else how it ended: at the first failure the rest does not run. `limit`
        is in seconds of the processor; one that sleeps has ten times as long."""
        env = dict(os.environ, MOE_MUTANT=str(mutant), MOE_MUTANTS=self.map)
        env.setdefault("MOE_SHARED", os.path.join(os.path.dirname(ROOT), "shared"))
        p = subprocess.Popen(["timeout", "-k", "1", str(20 + 10 * limit)] +
                             [self.build.binary(program)] + names,
                             cwd=self.build.tests, env=env, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU,
                                                                   (int(limit), int(limit) + 1)))
        failed = ""
        for line in p.stdout:
            text = line.decode("utf-8", "replace")
            if text.startswith("  FAIL"):
                failed = text.split()[1]
                p.kill()
                break
        p.stdout.close()
        status = p.wait()
        if failed or not status:
            return failed
        slow = status in (124, 137, 128 + signal.SIGXCPU)
        return "takes too long" if slow else "ends with status %d" % status

    @staticmethod
    def processor_time():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def measure(self, slowest):
        """Each test alone, without a fault: its seconds and the faults that it reaches."""
        tests = []
        for program in PROGRAMS:
            names = []
            folder = os.path.join(HERE, program)
            for name in sorted(os.listdir(folder)):
                if name.endswith(".c"):
                    with open(os.path.join(folder, name), encoding="utf-8") as f:
                        names += re.findall(r"\bRUN\((test_\w+)\)", f.read())
            for name in sorted(set(names)):
                with open(self.map, "wb") as f:
                    f.write(bytes(self.faults + 1))
                began = self.processor_time()
                ended = self.run(program, [name], -1, slowest)
                with open(self.map, "rb") as f:
                    reached = f.read()
                if ended:
                    print("mutate: without a fault, %s: %s; it is left out" % (name, ended))
                else:
                    tests.append((self.processor_time() - began, program, name, reached))
        return sorted(tests, key=lambda x: x[0])

    def hunt(self, mutant, tests, most):
        """Runs the tests that reach a fault, for about `most` seconds; the first that fails, or ''.
        None where no test reaches it."""
        todo = [x for x in tests if x[3][mutant]]
        if not todo:
            return None
        budget = 1.0
        while todo and most > 0:
            portion, spent = [], 0
            while todo and (not portion or spent + todo[0][0] < min(budget, most)):
                spent += todo[0][0]
                portion.append(todo.pop(0))
            for program in PROGRAMS:
                names = [x[2] for x in portion if x[1] == program]
                base = sum(x[0] for x in portion if x[1] == program)
                ended = self.run(program, names, mutant, round(5 + 5 * base)) if names else ""
                if ended:
                    return ended if ended.startswith("test_") else program + " " + ended
            most -= spent
            budget *= 4
        return ""


def report(mutants, results):
    """A line for each section; whether 95 % of the faults that could be found are caught."""
    verdicts = ("caught", "equivalent", "elsewhere", "survived")
    count = {}
    for m in mutants:
        n = count.setdefault(m["section"], dict.fromkeys(verdicts, 0))
        n[results[identity(m)][0]] += 1
    total = {v: sum(n[v] for n in count.values()) for v in verdicts}
    print("%-16s %8s" % ("section", "planted") + "".join(" %10s" % v for v in verdicts))
    for name, n in sorted(count.items()) + [("all", total)]:
        print("%-16s %8d" % (name, sum(n.values())) + "".join(" %10d" % n[v] for v in verdicts))
    found, real = total["caught"], total["caught"] + total["survived"]
    print("%d of %d faults that change something here are caught: %.1f %%" %
          (found, real, 100.0 * found / max(real, 1)))
    return found >= 0.95 * real


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--number", type=int, default=50)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--only", default="", help="sections, with commas")
    p.add_argument("--survivors", metavar="FILE", help="those that survived in a file of results")
    p.add_argument("--build", default=os.path.join(HERE, "build", "mutate"))
    p.add_argument("--time", type=float, default=1e9, help="seconds, then stop")
    p.add_argument("--slowest", type=float, default=20, help="tests that take longer are left out")
    p.add_argument("--most", type=float, default=60, help="seconds of tests for one fault")
    p.add_argument("--again", action="store_true", help="hunt those that survived once more")
    p.add_argument("--list", action="store_true", help="only say what would be planted")
    return p.parse_args()


def main():
    options, compiler = parse_arguments(), os.environ.get("CC", "cc")
    path = os.path.join(ROOT, "moe.h")
    planter = Planter(path)
    planter.plant(active_lines(path, compiler))
    only = set(options.only.split(",")) - {""}
    chosen = choose_listed(planter.mutants, options.survivors) if options.survivors else []
    choose(planter.mutants, options.number, options.seed, only, chosen)
    print("mutate: %d faults in %d sections, of %d possible ones" %
          (len(chosen), len({m["section"] for m in chosen}), len(planter.mutants)), flush=True)
    if options.list:
        for m in chosen:
            print("%s:%d: %s => %s" % (m["section"], m["line"], m["shown"], m["change"]))
        return 0
    os.nice(10)
    build = Build(options.build, compiler)
    build.make_tree()
    chosen = build.drop_what_does_not_compile(planter, chosen)
    print("mutate: %d of them compile" % len(chosen), flush=True)
    return hunt_all(build, chosen, options)


def hunt_all(build, chosen, options):
    saved = options.build + ".tsv"
    known = read_results(os.path.join(HERE, "mutants.tsv"))
    results = {key: value for key, value in read_results(saved).items()
               if value[0] == "caught" or not options.again}
    results.update(known)
    began, tests, measured = time.time(), None, []
    with open(saved, "a", encoding="utf-8") as log:
        for m in chosen:
            if identity(m) in results:
                continue
            if not tests:
                build.make()
                tests = Tests(build, len(chosen))
                measured = tests.measure(options.slowest)
                print("mutate: %d tests, %.0f s without a fault; built and measured in %.0f s" %
                      (len(measured), sum(x[0] for x in measured), time.time() - began), flush=True)
            if time.time() - began > options.time:
                break
            found = tests.hunt(m["id"], measured, options.most)
            results[identity(m)] = ("caught" if found else "survived",
                                    "not reached" if found is None else found)
            if not found:
                print("survived%s: moe.h:%d >>%s: %s => %s" %
                      (" unreached" if found is None else "", m["line"], m["section"],
                       m["shown"], m["change"]), flush=True)
            log.write("\t".join(results[identity(m)] + identity(m)) + "\n")
            log.flush()
    return 0 if report([m for m in chosen if identity(m) in results], results) else 1


if __name__ == "__main__":
    sys.exit(main())
