#!/usr/bin/env python3
"""Every setting of a tokenizer against Hugging Face `tokenizers`: lower case yes or no, accents
stripped yes, no or as case says, ideographs apart or not, without and with added tokens; 1,000
strange texts each.

python3 settings.py OUT.h               what tokenizers gives, for text/settings.c
python3 settings.py --live TOKENIZE     what the program gives, beside it: with tokenizer.json of
                                        each setting

Needs `pip install tokenizers` (0.23.3 when settings.h was made). The vocabulary and the texts are
made by the same rules here and in the test (text.py).
"""
import os
import subprocess
import sys
import tempfile
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from text import Hash, Random, literal, nasty, rows, vocabulary

TEXTS = 1000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# content, marks as in moe_text_flags without w
ADDED = [
    ("[E1]", "s"), ("<ent>", ""), ("hello", "n"), ("\u00c9t\u00e9", "n"), ("New York", "n"),
    ("\u4e2d\u6587", "n"), ("\ud55c\uae00", "n"), ("qa", "n"), ("qab", "n"), ("\u0301z", ""),
    ("\u0300w", "n"), ("x[MASK]y", ""), ("<l>", "lr"), ("\u0130d", "n"), ("\u1b44k", "n"),
    ("un", ""), ("\u302eq", "n"), ("a  b", ""), ("!?", "n"),
    ("lone", "no"), ("Solo", "o"), ("qabc", "no"), ("<ent>s", "o"), ("\u0301l", "o"), ("_o_", "o"),
    ("\u4e2d-", "no"), ("-\u0301-", "no"), ("bc", "n"), ("olo", ""), ("x\u302e\u0327", "o"),
    ("\u0302l", "o"), ("\u0327", ""),
]
PIECES = [
    "[E1]", "[e1]", "<ent>", " <l> ", "Hello", "hello", "\u00e9t\u00c9", "ete", "e\u0301te\u0301",
    "new york", "NEW  YORK", "new york", "\u4e2d\u6587", "\u4e2d", "qa", "qab", "QAB", "\u0301z",
    "\u0300W", "w", "x[MASK]y", "\u0130d", "i\u0307D", "id", "\u1b44K", "\ud55c\uae00",
    "\u1112\u1161\u11ab\u1100\u1173\u11af", "un", "unwanted", "a\u0301\u0301z", "\u302e\u0301Q",
    "\u302e", "q\u302e\u0301zq", "a  b", "a b", "!?", "\u00c5\u00dc\u1e9e\u0391\u0342", "\uf900",
    "lone", "LONE", "alone", "lones", "Solo", "Solo1", "_Solo", "Solo", "\u0660", "\u00b2",
    "\u0301", "\u200d", "\u200b", "\u20ac", "\u24b6", "_", "qabc", "qabcd", "<ent>s", "<ent>st",
    "\u0301l", "\u0301\u0327l", "\u0327\u0301lo", "_o_", "_o_o_", "\u4e2d-", "-\u0301-",
    "\u302f\u0301l",
]
# text, flags, added
READABLE = [
    ("\u00c9t\u00e9 H\u00c9LLO", 2, 0), ("\u00c9t\u00e9 H\u00c9LLO", 3, 0),
    ("\u00c9t\u00e9 H\u00c9LLO", 1, 0), ("\u00c9t\u00e9 H\u00c9LLO", 0, 1),
    ("\u00c9t\u00e9 \u00c9T\u00c9 ete", 1, 1), ("\u00c9t\u00e9 \u00c9T\u00c9 ete", 2, 1),
    ("\u00c9t\u00e9 \u00c9T\u00c9 ete", 3, 1), ("\u4e2d\u6587x", 4, 0), ("\u4e2d\u6587x", 5, 0),
    ("\u4e2d\u6587x", 0, 1), ("\u4e2d\u6587x", 4, 1), ("\uf900\U0002f800", 6, 0),
    ("\u0130d I\u0307D id", 0, 0), ("\u0130d I\u0307D id", 2, 0), ("\u0130d I\u0307D id", 2, 1),
    ("\u0130d I\u0307D id", 3, 1), ("qabqac QA", 0, 1), ("new\tYork New  York", 0, 1),
    ("new\tYork New York", 1, 1), ("[E1][e1]<ent>[MASK]", 0, 1), ("x[MASK]y[MASK]", 1, 1),
    ("unwanted un", 0, 1), ("\ud55c\uae00\uae00", 0, 1), ("\ud55c\uae00\uae00", 2, 1),
    ("a\u0301z a\u0300w", 0, 1), ("a\u0301z a\u0300w", 2, 1), ("q\u302e\u0301zq\u302eq", 0, 1),
    ("q\u302e\u0301zq\u302eq", 3, 1), ("\u03a3\u0391\u03a3 \u1f08 \u1fbc", 2, 0),
    ("\u03a3\u0391\u03a3 \u1f08 \u1fbc", 3, 0), ("a  b a b!?!?", 7, 1),
    ("Lone alone lone1 lone- -lone", 0, 1), ("Solo solo _Solo Solo\u20ac [E1]Solo", 0, 1),
    ("\u4e2dlone\u4e2d [E1]lone[E1]", 0, 1), ("\u4e2dlone\u4e2d \u4e2dSolo", 4, 1),
    ("qabc qabcd xqabc bcd", 0, 1), ("<ent>s <ent>st a<ent>s", 1, 1),
    ("lone_ _lone lone\u203f lone\u203e", 0, 1), ("Solox xSolo olox", 1, 1),
    ("x\u302e\u0327\u0302lm", 0, 1), ("x\u302e\u0327 x\u302e\u0327\u0302lm \u0327", 3, 1),
]


def strange(rnd):
    out = b""
    for _ in range(1 + rnd(3)):
        part = nasty(rnd)
        out += part[: rnd(len(part) + 1)]
        for _ in range(rnd(3)):
            out += PIECES[rnd(len(PIECES))].encode() + b" " * rnd(2)
    return out


def texts():
    rnd = Random(7)
    return [strange(rnd) for _ in range(TEXTS)]


def tokenizer(words, lower, strip, apart, added):
    t = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=apart, strip_accents=strip, lowercase=lower
    )
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    t.add_special_tokens(SPECIAL)
    t.add_tokens(
        [
            AddedToken(content, lstrip="l" in marks, rstrip="r" in marks,
                       normalized="n" in marks, special="s" in marks,
                       single_word="o" in marks)
            for content, marks in (ADDED if added else [])
        ]
    )
    return t


def of_flags(words, flags, added):
    lower = not flags & 1
    return tokenizer(words, lower, lower != bool(flags & 2), not flags & 4, added)


def numbers():
    return {w: i for i, w in enumerate(vocabulary().split("\n")[:-1])}


def array(name, values):
    return "static const char *const %s[] = {\n%s};\n" % (
        name, ",\n".join("  " + literal(v) for v in values),
    )


def write(path):
    words, all_texts = numbers(), [t.decode("utf-8", "replace") for t in texts()]
    out = "/* Made by settings.py: what Hugging Face `tokenizers` gives for each setting. */\n"
    out += "enum { GOLDEN_SETTINGS = 8, GOLDEN_TEXTS = %d };\n" % TEXTS
    out += array("golden_pieces", [p.encode() for p in PIECES])
    lines = ["%s\t+%s%s" % (c, m, "w" if c in words else "") for c, m in ADDED if c not in words]
    out += "/* lines behind the vocabulary; of two tokens it has the lines itself */\n"
    out += array("golden_added", [x.encode() for x in lines])
    lines = ["%s\t+%sw" % (c, m) for c, m in ADDED if c in words]
    out += array("golden_marked", [x.encode() for x in lines])
    values = []
    for flags in range(8):
        for added in (0, 1):
            h = Hash()
            for e in of_flags(words, flags, added).encode_batch(all_texts):
                h.add([len(e.ids)] + e.ids)
            values.append(h.h)
    out += "/* of each setting without and with added tokens: the ids of all texts */\n"
    out += "static const uint64_t golden_settings[GOLDEN_SETTINGS * 2] = {\n"
    out += rows(values, 4) + "};\n"
    out += "static const struct {\n  const char *text;\n  int flags, added;\n  const char *ids;\n"
    out += "} golden_settled[] = {\n"
    for text, flags, added in READABLE:
        ids = " ".join(map(str, of_flags(words, flags, added).encode(text).ids))
        out += "  {%s, %d, %d,\n   \"%s\"},\n" % (literal(text.encode()), flags, added, ids)
    with open(path, "w", encoding="ascii", newline="\n") as f:
        f.write(out + "};\n")


def live(program):
    """Prints the number of texts whose ids differ, for each setting."""
    words, different = numbers(), 0
    # a line each, without tabs, which stand between the texts of a pair
    lines = [bytes(32 if c in b"\t\r\n" else c for c in t) for t in texts()]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokenizer.json")
        for lower in (True, False):
            for strip in (None, True, False):
                for apart in (True, False):
                    for added in (0, 1):
                        t = tokenizer(words, lower, strip, apart, added)
                        t.save(path)
                        said = subprocess.run(
                            [program, path], input=b"\n".join(lines) + b"\n", check=True,
                            stdout=subprocess.PIPE,
                        ).stdout.decode().split("\n")[:-1]
                        want = [
                            " ".join(map(str, e.ids))
                            for e in t.encode_batch([x.decode("utf-8", "replace") for x in lines])
                        ]
                        assert len(said) == len(want)
                        n = sum(a != b for a, b in zip(said, want))
                        different += n
                        print("lower %-5s strip %-5s apart %-5s added %d: %d of %d differ"
                              % (lower, strip, apart, added, n, len(want)))
    sys.exit(different > 0)


if __name__ == "__main__":
    if sys.argv[1] == "--live":
        live(sys.argv[2])
    else:
        write(sys.argv[1])
