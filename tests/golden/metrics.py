#!/usr/bin/env python3
"""Makes metrics.h, what scikit-learn and scipy give for the cases of text/metrics.c: python3
metrics.py metrics.h

Needs `pip install scikit-learn scipy` (1.9.1 and 1.17.1 when metrics.h was made). The inputs are
made by the same generator here and in the test; floats are multiples of 1/64, so that both sides
have the same.
"""
import math
import sys
import warnings
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

warnings.simplefilter("ignore")


class Random:
    def __init__(self, seed):
        self.state = seed

    def __call__(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n


def classes_case(seed, n, classes, agree):
    """Labels uneven (low classes are frequent); a prediction is the label `agree` times in 8."""
    rnd, p, t = Random(seed), [], []
    for _ in range(n):
        t.append(rnd(1 + rnd(classes)))
        p.append(t[-1] if rnd(8) < agree else rnd(classes))
    return np.array(p), np.array(t)


def values_case(seed, n, levels, noise):
    """Few levels give many ties."""
    rnd, p, t = Random(seed), [], []
    for _ in range(n):
        t.append(rnd(levels) / 64 - 1)
        p.append((t[-1] * 64 + rnd(noise)) / 64 + 1000)
    return np.array(p), np.array(t)


def number(x):
    return repr(float(x)) if math.isfinite(x) else "(double)NAN"


CLASSES = [
    (s, n, c, a)
    for s, (n, c, a) in enumerate(
        [
            (1, 2, 0), (2, 2, 4), (7, 2, 6), (277, 2, 5), (408, 2, 7), (1043, 2, 4), (1043, 2, 8),
            (100, 2, 0), (56, 3, 6), (7702, 3, 6), (1000, 4, 3), (333, 7, 5), (1000, 10, 7),
            (50, 40, 2), (64, 1, 8),
        ]
    )
]
VALUES = [
    (s, n, v, z)
    for s, (n, v, z) in enumerate(
        [
            (2, 64, 64), (3, 3, 2), (10, 64, 1), (100, 5, 3), (1500, 320, 200), (1500, 21, 40),
            (5000, 100000, 200000), (1000, 2, 2), (777, 9, 1), (64, 1, 9), (257, 1000, 100000),
        ]
    )
]


def main():
    out = "/* Made by metrics.py: what scikit-learn and scipy give. NAN: undefined. */\n"
    out += (
        "static const struct {\n  int seed, n, classes, agree;\n"
        "  double accuracy, f1, macro_f1, matthews;\n} golden_classes[] = {\n"
    )
    for seed, n, c, a in CLASSES:
        p, t = classes_case(seed, n, c, a)
        f1 = f1_score(t, p, labels=[1], average="micro", zero_division=math.nan)
        one = len(set(p)) == 1 or len(set(t)) == 1  # scikit-learn gives 0 there
        out += "  {%d, %d, %d, %d, %s},\n" % (
            seed, n, c, a,
            ", ".join(
                number(x)
                for x in (
                    accuracy_score(t, p),
                    f1,
                    f1_score(t, p, average="macro"),
                    math.nan if one else matthews_corrcoef(t, p),
                )
            ),
        )
    out += (
        "};\nstatic const struct {\n  int seed, n, levels, noise;\n  double pearson, spearman;\n"
        "} golden_values[] = {\n"
    )
    for seed, n, v, z in VALUES:
        p, t = values_case(seed, n, v, z)
        out += "  {%d, %d, %d, %d, %s, %s},\n" % (
            seed, n, v, z,
            number(pearsonr(p, t)[0]),
            number(spearmanr(p, t)[0]),
        )
    with open(sys.argv[1], "w", encoding="ascii", newline="\n") as f:
        f.write(out + "};\n")


if __name__ == "__main__":
    main()
