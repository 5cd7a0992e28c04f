#!/usr/bin/env python3
"""Makes text.h, what Hugging Face `tokenizers` gives for the cases of text/text.c: python3
text.py text.h EXAMPLES [FOLDER]

Needs `pip install tokenizers` (0.23.3 when text.h was made). EXAMPLES is examples/data; FOLDER
the working data (with data/glue and data/vocab), without which its files are left out. The
vocabulary and the random cases are made by the same rules here and in the test.
"""
import glob
import os
import sys
import tempfile
from tokenizers import BertWordPieceTokenizer

WORDS = [
    "hello", "un", "##want", "##ed", "runn", "##ing", "##able", "fi", "##fi", "don",
    "\u03c3\u03b1\u03c2", "a##b", "##\u0301x", "CASE",
]
SPECIALS = [
    "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[cls]", "[MASK", "[[MASK]]", "##ing",
    "[unused1]", "MASK]",
]
REPEATED = [0x61, 0xE9, 0x4E00, 0x301, 0x1F600, 0x130]
POOLS = [
    (0x20, 0x7F), (0x00, 0x100), (0x41, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x700),
    (0x900, 0xE80), (0x1B00, 0x1C00), (0x1D00, 0x2000), (0x2000, 0x2100), (0x2190, 0x2300),
    (0x3000, 0x3100), (0x4E00, 0xA000), (0xA640, 0xA9E0), (0xAC00, 0xD7B0), (0xE000, 0xFB00),
    (0xFB00, 0x10000), (0x10000, 0x10400), (0x10400, 0x12000), (0x16F00, 0x17000),
    (0x1D100, 0x1D200), (0x1E000, 0x1E960), (0x1F300, 0x1FB00), (0x2A600, 0x2CF00),
    (0x2F700, 0x2FB00), (0xE0000, 0xE0200), (0x302E, 0x3030), (0x8D0, 0x8E4), (0x1D15E, 0x1D174),
    (0x0, 0x110000),
]
GROUPS, CASES = 64, 100


def vocabulary():
    points = [
        c for r in (range(0x21, 0x7F), range(0xA1, 0xD800), range(0xE000, 0x32000)) for c in r
    ]
    return (
        "\n".join(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            + WORDS
            + [p + chr(c) for c in points for p in ("", "##")]
        )
        + "\n"
    )


class Random:
    def __init__(self, seed):
        self.state = seed

    def __call__(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n


def nasty(rnd):
    out = b""
    for _ in range(1 + rnd(5)):
        kind, n = rnd(12), rnd(24)
        if kind == 0:
            out += SPECIALS[rnd(len(SPECIALS))].encode()
        elif kind == 1:
            out += chr(REPEATED[rnd(len(REPEATED))]).encode() * (90 + n)
        elif kind == 2:
            out += bytes(rnd(256) for _ in range(n))
        elif kind == 3:
            out += (WORDS[rnd(len(WORDS))] + WORDS[rnd(len(WORDS))].lstrip("#")).encode()
        else:
            low, high = POOLS[rnd(len(POOLS))]
            other = POOLS[rnd(len(POOLS))] if rnd(3) == 0 else (low, high)
            for _ in range(n):
                a, b = other if rnd(4) == 0 else (low, high)
                c = a + rnd(b - a)
                out += chr(c if not 0xD800 <= c < 0xE000 else 0xFFFD).encode()
        if rnd(4) == 0:
            out += b" "
    return out


class Hash:
    """FNV-1a over numbers of 32 bits."""
    def __init__(self):
        self.h = 14695981039346656037

    def add(self, values):
        h = self.h
        for v in values:
            h = (h ^ (v & 0xFFFFFFFF)) * 1099511628211 & 0xFFFFFFFFFFFFFFFF
        self.h = h


def offsets(e):
    """Begin and end of each token, one after the other; -1 for the tokens put around the texts."""
    return [
        x
        for special, pair in zip(e.special_tokens_mask, e.offsets)
        for x in ((-1, -1) if special else pair)
    ]


def longest(t, a, b, n):
    t.enable_truncation(n, strategy="longest_first")
    e = t.encode(a, b)
    t.no_truncation()
    return e


def right(t, a, b, n):
    """The first n - 3 tokens of a followed by b: Hugging Face's only_second where a fits alone,
    else only_first with b empty."""
    room, first = n - 3, len(t.encode(a, add_special_tokens=False).ids)
    if room == 0:
        return t.encode("", "")
    t.enable_truncation(n, strategy="only_second" if first < room else "only_first")
    e = t.encode(a, b if first < room else "")
    t.no_truncation()
    return e


def literal(data):
    return (
        '"'
        + "".join(chr(x) if 32 <= x < 127 and x not in b'"\\?' else "\\%03o" % x for x in data)
        + '"'
    )


READABLE = [
    ("Hello, UNWANTED running", 0), ("Hello", 1), ("CASE", 1),
    ("h\u00e9llo H\u00c9LLO he\u0301llo", 0), ("h\u00e9llo", 1),
    ("\u00c5ngstr\u00f6m \u1e9e \u00df \u0130\u0131", 0),
    ("\u03a3\u0391\u03a3 \u03c3\u03b1\u03c2", 0), ("[CLS]x [cls] [MASK][MASK", 0),
    ("x[SEP]\u0301y", 0), ("don't", 0), ("a\u200db\u00adc\ufeffd", 0),
    ("tab\tnew\nret\rvt\x0bff\x0cnel\x85nb\u00a0en\u2002ls\u2028id\u3000z", 0),
    ("nul\0in\ufffdside", 0), ("\u4e2d\u6587\u0301x", 0), ("\uf900\U0002f800", 0),
    ("\uf900\U0002f800", 1), ("\ud55c\uae00 \u1112\u1161\u11ab", 0), ("\ud55c\uae00", 1),
    ("\u304c \u304b\u3099 \u30d1", 0), ("\U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea", 0),
    (
        "\u0634\u064f\u0643\u0652\u0631\u064b\u0627 \u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd "
        "\u202eabc\u202c",
        0,
    ),
    ("\u2260 \u2014 \u00ab\u20ac\u00bb $+<=>^`|~", 0), ("\ufb01 \uff21 \u2160 \u01c4 \u01c5", 0),
    ("a" * 100, 0), ("a" * 101 + " b", 0), ("a" * 99 + "\u0301" * 9 + "b", 0),
    ("\ue000\U000f0000\U00030000\U0010ffff", 0), ("a\u302e\u1b44b", 0),
    ("a\u1b44\u034f\u302eb \U0001d15f\u1b44", 0), ("a\u302e\u1b44b", 1), ("", 0), (" \t ", 0),
    (b"bad \xff\xc3 \xe2\x82 \xf0\x9f\x98 \xed\xa0\x80 \xc0\xaf \xf5x", 0),
    (b"\xe2\x28[MASK]\xf0", 0), ("\u00bd\u00b2\u2126\u212b\u1e9b\u0323", 0),
]


def rows(values, per):
    return ",\n".join(
        "  " + ", ".join("0x%016xu" % v for v in values[i : i + per])
        for i in range(0, len(values), per)
    )


FILES_COMMENT = """/* files of examples/data with the vocabulary there, of the working data with
BERT's: every row whole, and cut to 48 tokens */
typedef struct golden_file {
  const char *file;
  uint64_t hash;
  int rows;
} golden_file;
"""


def files(vocab, folder, pattern):
    t, out = BertWordPieceTokenizer(vocab, lowercase=True), ""
    for name in sorted(glob.glob(os.path.join(folder, pattern))):
        h, n = Hash(), 0
        with open(name, encoding="utf-8", newline="\n") as f:
            pair = "sentence2" in next(f).split()
            for line in f:
                field = line.rstrip("\n").split("\t")
                a, b, n = field[1], field[2] if pair else None, n + 1
                for e in [t.encode(a, b), longest(t, a, b, 48)] + (
                    [right(t, a, b, 48)] if pair else []
                ):
                    h.add([len(e.ids)] + e.ids + e.type_ids + offsets(e))
        out += '  {"%s", 0x%016xu, %d},\n' % (os.path.relpath(name, folder), h.h, n)
    return out


def main():
    path, bundled, folder = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="\n", suffix=".txt") as f:
        f.write(vocabulary())
        f.flush()
        tok = [
            BertWordPieceTokenizer(f.name, lowercase=True),
            BertWordPieceTokenizer(f.name, lowercase=False),
        ]
    out = "/* Made by text.py: what Hugging Face `tokenizers` gives. */\n"
    out += (
        "static const struct {\n  const char *text;\n  size_t bytes;\n  int cased;\n"
        "  const char *pieces, *offsets;\n} golden_readable[] = {\n"
    )
    for text, cased in READABLE:
        data = text if isinstance(text, bytes) else text.encode()
        e = tok[cased].encode(data.decode("utf-8", "replace"))
        o = offsets(e)
        pairs = '"%s"' % " ".join("%d-%d" % p for p in zip(o[::2], o[1::2]) if p[0] >= 0)
        # where marks are sorted, moe.h tells the places they come from
        if not cased and b"\xe3\x80\xae" in data:
            pairs = "NULL"
        out += "  {%s, %d, %d,\n   %s,\n   %s},\n" % (literal(data), len(data), cased,
                                                       literal(" ".join(e.tokens).encode()), pairs)
    out += (
        "};\n/* every code point alone and between letters; one number for 8192 of them */\n"
        "static const uint64_t golden_points[2][136] = {{\n"
    )
    for cased in (0, 1):
        values = []
        for start in range(0, 0x110000, 0x2000):
            h = Hash()
            points = [chr(c) for c in range(start, start + 0x2000) if not 0xD800 <= c < 0xE000]
            for e in tok[cased].encode_batch([s for c in points for s in (c, "a%sb" % c)]):
                h.add([len(e.ids)] + e.ids + offsets(e))
            values.append(h.h)
        out += rows(values, 5) + ("\n}, {\n" if not cased else "\n}};\n")
    out += "enum { GOLDEN_GROUPS = %d, GOLDEN_CASES = %d };\n" % (GROUPS, CASES)
    out += (
        "/* random cases, one number for a group of them */\n"
        "static const uint64_t golden_nasty[2][GOLDEN_GROUPS] = {{\n"
    )
    for cased in (0, 1):
        values, t = [], tok[cased]
        for group in range(GROUPS):
            h, rnd = Hash(), Random(1000 + group)
            for _ in range(CASES):
                a, b = (nasty(rnd).decode("utf-8", "replace") for _ in range(2))
                n = 3 + rnd(1 << (1 + rnd(8)))
                for e in (t.encode(a), t.encode(a, b), longest(t, a, b, n), right(t, a, b, n)):
                    h.add([len(e.ids)] + e.ids + e.type_ids)
            values.append(h.h)
        out += rows(values, 5) + ("\n}, {\n" if not cased else "\n}};\n")
    out += FILES_COMMENT + "static const golden_file golden_bundled[] = {\n"
    out += (
        files(os.path.join(bundled, "vocab.txt"), bundled, "*/dev*.tsv")
        + "};\nstatic const golden_file golden_working[] = {\n"
    )
    if folder:
        out += files(
            os.path.join(folder, "data/vocab/bert-base-uncased-vocab.txt"),
            folder,
            "data/*/*/dev*.tsv",
        )
    out += "  {NULL, 0, 0}\n};\n"
    with open(path, "w", encoding="ascii", newline="\n") as f:
        f.write(out)


if __name__ == "__main__":
    main()
