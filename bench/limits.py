"""What the machine can do at most, probed by bench_ops before and after each section and, for a
millisecond, before every round of a program; and the bounds that
follow. Where other guests share the cores the peak of a moment can be two thirds of the best one,
and changes within a second.
"""

import json
import os
import statistics
import subprocess
import time

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "build", "bench_ops")
# of the fastest reading of the first-level cache: below it something else uses the same core
ALONE = 0.9
# a peak that differs by more before and after a section means that something else took part of the
# cores
MOVED = 0.05


class Limits:
    """Of all probes of the run the best counts: a disturbance only lowers one."""

    def __init__(self):
        self.best = {}  # threads: {"peak_gflops": ..., "read_gbytes": ..., "copy_gbytes": ...}
        self.isa = ""
        self.server = None
        self.moments = {}  # threads: [GFLOP/s of each round of the section]
        self.cache = (
            {}
        )  # threads: GB/s at which the slowest of them read its first-level cache, at best
        self.alone = True  # whether the cores were ours alone when `now` was last called
        self.company = 0  # rounds of the section for which they were not

    def probe(self, threads):
        """{threads: peak GFLOP/s} of now."""
        text = subprocess.run(
            [PROGRAM, "--probe", ",".join(map(str, threads))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        seen = json.loads(text)
        self.isa = seen.pop("isa")
        for t, figures in seen.items():
            best = self.best.setdefault(int(t), figures)
            self.best[int(t)] = {name: max(value, best[name]) for name, value in figures.items()}
        return {int(t): figures["peak_gflops"] for t, figures in seen.items()}

    def now(self, threads):
        """GFLOP/s that the processor gives at this moment, to no more threads than it has cores."""
        threads = min(threads, len(os.sched_getaffinity(0)))
        if self.server is None:
            self.server = subprocess.Popen(
                [PROGRAM, "--now"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self.server.stdin.write(f"{threads}\n")
        self.server.stdin.flush()
        peak, read = map(float, self.server.stdout.readline().split())
        self.cache[threads] = max(read, self.cache.get(threads, 0))
        self.alone = read >= ALONE * self.cache[threads]
        return peak

    def round(self, threads, until):
        """`now`, of a moment in which the cores are ours alone, for which it waits until then at
        most; kept for what `shared` tells."""
        peak = self.now(threads)
        while not self.alone and time.monotonic() < until:
            time.sleep(0.01)
            peak = self.now(threads)
        self.moments.setdefault(threads, []).append(peak)
        self.company += not self.alone
        return peak

    def bound(self, peer, count, threads):
        """How many times as fast as a peer, of these rounds (turns.Rounds), a program would be that
        does nothing but the counted operations at the peak of the round, or
        reads the counted bytes once, whichever takes longer. count: [operations, bytes, ...] of one
        call.
        """
        read = count[1] / self.best[threads]["read_gbytes"]
        return statistics.median(
            1e9 * s / max(count[0] / p, read) for s, p in zip(peer, peer.peaks)
        )

    def shared(self):
        """How much of the best peak the rounds of the section had, in words; what it has counted so
        far is forgotten."""
        moments, self.moments = self.moments, {}
        company, self.company = self.company, 0
        if not moments:
            return ""
        return (
            "Before each round the processor gave, in the median: "
            + ", ".join(
                f"{statistics.median(m):.0f} GFLOP/s with {t} thread{'s' if t > 1 else ''}"
                + (f" ({self.best[t]['peak_gflops']:.0f} at best)" if t in self.best else "")
                for t, m in sorted(moments.items())
            )
            + (
                f". A core was shared with something else before {company} of"
                f" {sum(map(len, moments.values()))} rounds, as reading its first-level cache told."
                if company
                else "."
            )
        )

    def words(self):
        return "; ".join(
            f"{t} thread{'s' if t > 1 else ''}: {x['peak_gflops']:.0f} GFLOP/s, reading"
            f" {x['read_gbytes']:.1f} GB/s, copying {x['copy_gbytes']:.1f} GB/s"
            for t, x in sorted(self.best.items())
        )


def moved(before, after):
    """Which of two probes differ too much, in words; empty: none."""
    return ", ".join(
        f"{before[t]:.0f} and {after[t]:.0f} GFLOP/s with {t} thread{'s' if t > 1 else ''}"
        for t in before
        if abs(before[t] - after[t]) > MOVED * max(before[t], after[t])
    )


LIMITS = Limits()
