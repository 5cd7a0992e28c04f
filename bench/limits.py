"""What the machine can do at most, probed by bench_ops before and after each section, and the bounds that follow."""
import json
import os
import statistics
import subprocess

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "build", "bench_ops")
MOVED = 0.05    # a peak that differs by more before and after a section means that something else took part of the cores


class Limits:
    """Of all probes of the run the best counts: a disturbance only lowers one."""

    def __init__(self):
        self.best = {}      # threads: {"peak_gflops": ..., "read_gbytes": ..., "copy_gbytes": ...}
        self.isa = ""

    def probe(self, threads):
        """{threads: peak GFLOP/s} of now."""
        text = subprocess.run([PROGRAM, "--probe", ",".join(map(str, threads))], capture_output=True, text=True, check=True).stdout
        seen = json.loads(text)
        self.isa = seen.pop("isa")
        for t, figures in seen.items():
            best = self.best.setdefault(int(t), figures)
            self.best[int(t)] = {name: max(value, best[name]) for name, value in figures.items()}
        return {int(t): figures["peak_gflops"] for t, figures in seen.items()}

    def bound(self, peer, count, threads):
        """How many times as fast as a peer with such seconds a program would be that does nothing but the counted operations at the peak, or
        reads the counted bytes once, whichever takes longer. count: [operations, bytes, ...] of one call."""
        here = self.best[threads]
        return statistics.median(peer) / max(count[0] / here["peak_gflops"], count[1] / here["read_gbytes"]) * 1e9

    def words(self):
        return "; ".join(f"{t} thread{'s' if t > 1 else ''}: {x['peak_gflops']:.0f} GFLOP/s, reading {x['read_gbytes']:.1f} GB/s, copying {x['copy_gbytes']:.1f} GB/s"
                         for t, x in sorted(self.best.items()))


def moved(before, after):
    """Which of two probes differ too much, in words; empty: none."""
    return ", ".join(f"{before[t]:.0f} and {after[t]:.0f} GFLOP/s with {t} thread{'s' if t > 1 else ''}" for t in before
                     if abs(before[t] - after[t]) > MOVED * max(before[t], after[t]))


LIMITS = Limits()
