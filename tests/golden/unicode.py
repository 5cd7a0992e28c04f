#!/usr/bin/env python3
"""Makes the character tables of moe.h (section >>text): python3 tests/golden/unicode.py moe.h

The tables are not read from the Unicode database but asked, code point by code point, from the
Hugging Face `tokenizers` package (0.23.3 when the tables were made), whose Rust code mixes the
data of several Unicode versions: that is the only way to give its very ids. Needs `pip install
tokenizers`. With `--check` nothing is written, and the exit status tells whether moe.h holds the
tables that this script makes.

The format is described in moe.h. In short: numbers are VLQs of base-64 digits (5 bits each, 32 =
more follow, least significant first; signed ones zigzag), and every list is sorted by its first
code point.
"""
import sys
import unicodedata
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+-"
# MARK + r: a mark that stays, of rank r
LETTER, DROP, BLANK, PUNCT, CJK, STRIP, STRIP_STARTER, MARK = range(8)
CONST, SLOPE, PAIRS, LIST = range(4)
HANGUL = range(0xAC00, 0xD7A4)
POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def bert(clean=False, cjk=False, strip=False, lower=False):
    n = normalizers.BertNormalizer(
        clean_text=clean, handle_chinese_chars=cjk, strip_accents=strip, lowercase=lower
    )
    return n.normalize_str


def nonstarters(nfd, points):
    """The combining classes as the normaliser sees them, found by the swaps that it makes; {code
    point: (above, below)}."""
    pivots = {}
    for c in points:
        pivots.setdefault(unicodedata.combining(chr(c)), chr(c))
    del pivots[0]
    classes = {}
    for c in points:
        ch = chr(c)
        if nfd(ch) != ch or (
            nfd("a" + ch + "\u0334") == "a" + ch + "\u0334"
            and nfd("a\u0345" + ch) == "a\u0345" + ch
        ):
            continue
        above = max([k for k, p in pivots.items() if nfd("a" + ch + p) != "a" + ch + p], default=0)
        below = min(
            [k for k, p in pivots.items() if nfd("a" + p + ch) != "a" + p + ch], default=256
        )
        classes[c] = (above, below)
    return classes


def observe():
    """Returns ({code point: class}, {code point: what strip_accents makes of it}, {code point: its
    lower case}), all that is not itself or a plain letter."""
    clean, cjk, nfd = bert(clean=True), bert(cjk=True), normalizers.NFD().normalize_str
    strip, lower, both = bert(strip=True), bert(lower=True), bert(strip=True, lower=True)
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    marks = nonstarters(nfd, [c for c in POINTS if clean(chr(c)) and c not in HANGUL])
    kept = sorted({v for c, v in marks.items() if strip(chr(c))})
    kind, stripped, lowered = {}, {}, {}
    for c in POINTS:
        ch = chr(c)
        found = []
        if clean(ch) != ch:
            found.append({"": DROP, " ": BLANK}[clean(ch)])
        else:
            words = [w for w, _ in split("a" + ch + "b")]
            if words == ["a", ch, "b"]:
                found.append(PUNCT)
            else:
                assert words == ["a" + ch + "b"] or ch == " ", hex(c)
            if ch == " ":
                found.append(BLANK)
            if cjk(ch) != ch:
                assert cjk(ch) == " " + ch + " "
                found.append(CJK)
            if strip(ch) == "":
                first = ord(nfd(ch)[0])
                found.append(STRIP if first in marks else STRIP_STARTER)
            elif c in marks:
                found.append(MARK + kept.index(marks[c]))
            if c not in HANGUL and strip(ch) not in ("", ch):
                stripped[c] = strip(ch)
            if lower(ch) != ch:
                lowered[c] = lower(ch)
            small = "".join(lower(x) for x in strip(ch))
            # the header lower-cases what is left of a character, each into one, or a whole one
            assert both(ch) == small and len(small) == len(strip(ch)), hex(c)
        assert len(found) < 2, hex(c)
        if found:
            kind[c] = found[0]
    for c, text in stripped.items():  # what the header's walk over a run of marks relies on
        for text in (text, lower(text)):
            tail = [ord(x) in marks for x in text]
            assert tail == sorted(tail) and (not tail[0] or c in marks), hex(c)
            assert len(text) <= 3
    assert all(len(text) <= 3 for text in lowered.values())
    for c in HANGUL:
        i = c - 0xAC00
        jamo = [0x1100 + i // 588, 0x1161 + i % 588 // 28] + ([0x11A7 + i % 28] if i % 28 else [])
        assert [ord(x) for x in both(chr(c))] == [ord(x) for x in strip(chr(c))] == jamo
        assert lower(chr(c)) == chr(c)
    return kind, stripped, lowered, len(kept)


def observe_words():
    """The bounds of the runs of characters that single_word takes for those of a word."""
    t = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    t.add_tokens([AddedToken("XYZ", single_word=True, normalized=False)])
    bounds = []
    for c in POINTS:
        word = t.token_to_id("XYZ") not in t.encode("XYZ" + chr(c)).ids
        assert word == (t.token_to_id("XYZ") not in t.encode(chr(c) + "XYZ").ids), hex(c)
        if word != len(bounds) % 2:
            bounds.append(c)
    return bounds


def vlq(n):
    out = ""
    while n >= 32:
        out += DIGITS[32 + n % 32]
        n //= 32
    return out + DIGITS[n]


def zigzag(n):
    return vlq(2 * n if n >= 0 else -2 * n - 1)


def class_runs(kind):
    runs = []
    for c in sorted(kind):
        if runs and runs[-1][2] == kind[c] and runs[-1][0] + runs[-1][1] == c:
            runs[-1][1] += 1
        else:
            runs.append([c, 1, kind[c]])
    return runs


def fold_runs(kind, folded):
    """Longest run first at each point. A code point with several results has as many runs of
    length 1, in their order."""
    runs, targets, done = [], [], -1
    single = {c: ord(t) for c, t in folded.items() if len(t) == 1}
    ideographs = {c for c in single if kind.get(c) == CJK}

    def length(step, fits):
        n = 1
        while fits(n):
            n += step
        return n

    for c in sorted(folded):
        if c <= done:
            continue
        if c not in single:
            runs += [[c, 1, CONST, ord(x)] for x in folded[c]]
            done = c
            continue
        t = single[c]
        if c in ideographs:
            n = length(1, lambda i: c + i in ideographs)
            best = (n, LIST, 0)
            targets += [single[c + i] for i in range(n)]
        else:
            pairs = 0
            while single.get(c + pairs) == c + pairs + 1 and c + pairs + 1 not in folded:
                pairs += 2
            best = max(
                (length(1, lambda i: single.get(c + i) == t), CONST, t),
                (length(1, lambda i: single.get(c + i) == t + i), SLOPE, t),
                (pairs - 1, PAIRS, 0),
            )
        runs.append([c, *best])
        done = c + best[0] - 1
    return runs, targets


def encode_runs(runs):
    text, last = "", 0
    for start, n, k, target in runs:
        text += (
            vlq(start - last)
            + vlq((n - 1) * 4 + k)
            + (zigzag(target - start) if k in (CONST, SLOPE) else "")
        )
        last = start
    return text


def encode(kind, stripped, lowered, ranks):
    classes, (strips, targets) = class_runs(kind), fold_runs(kind, stripped)
    lowers, none = fold_runs(kind, lowered)
    assert not none
    kinds = MARK + ranks
    text, last = "", 0
    for start, n, k in classes:
        text += vlq(start - last) + vlq((n - 1) * kinds + k)
        last = start
    cjk_text = "".join(DIGITS[t >> 12] + DIGITS[t >> 6 & 63] + DIGITS[t & 63] for t in targets)
    # boundaries after decoding: a run that no other follows at once is closed by a plain letter
    bounds = len(classes) + sum(1 for i, (s, n, _) in enumerate(classes)
                                if i + 1 == len(classes) or classes[i + 1][0] != s + n)
    sizes = kinds, bounds, len(strips), len(lowers)
    return sizes, text, encode_runs(strips), encode_runs(lowers), cjk_text


def literal(name, text, width=94):
    rows = ['  "%s"' % text[i:i + width] for i in range(0, len(text), width)]
    return "static const char %s[] =\n%s;\n" % (name, "\n".join(rows))


def block():
    sizes, *texts = encode(*observe())
    out = "/* tables made by tests/golden/unicode.py: do not edit */\n/* clang-format off */\n"
    out += "enum { MOE__TEXT_KINDS = %d };\nenum { MOE__TEXT_BOUNDS = %d, " % sizes[:2]
    out += "MOE__TEXT_STRIPS = %d, MOE__TEXT_LOWERS = %d };\n" % sizes[2:]
    bounds = observe_words()
    texts.append("".join(vlq(b - a) for a, b in zip([0] + bounds, bounds)))
    for name, text in zip(("classes", "strips", "lowers", "ideographs", "words"), texts):
        out += literal("moe__text_" + name, text)
    out += "/* clang-format on */\n/* end of the tables */\n"
    assert max(map(len, texts)) < 4095  # the longest literal that C99 promises
    sys.stderr.write(" + ".join("%d" % len(text) for text in texts) + " digits\n")
    return out


def main():
    check, path = "--check" in sys.argv, sys.argv[-1]
    with open(path, encoding="utf-8") as f:
        source = f.read()
    begin, end = source.index("/* tables made by"), source.index("/* end of the tables */\n") + 24
    made = source[:begin] + block() + source[end:]
    if check:
        sys.exit(0 if made == source else "%s: the tables differ" % path)
    with open(path, "w", encoding="utf-8") as f:
        f.write(made)


if __name__ == "__main__":
    main()
