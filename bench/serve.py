"""The Python side of the protocol of bench/run.py (see bench.h): one JSON line when ready, then a
median for each line of input."""

import json
import resource
import statistics
import sys
import time


def repeat(once, seconds):
    """Calls once() at least one time and for that many seconds. Returns median, minimum and number
    of calls."""
    times = []
    begin = last = time.perf_counter()
    while not times or last - begin < seconds:
        once()
        t = time.perf_counter()
        times.append(t - last)
        last = t
    return statistics.median(times), min(times), len(times)


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(once, ready, warm=2):
    """Prints the record `ready` and answers the lines of standard input until it ends: "SECONDS
    [WORD [THREADS]]". once() gets what follows the
    seconds; what was not called with that before is called `warm` times first, or fewer if that
    takes long.
    """
    print(json.dumps(ready), flush=True)
    seen = set()
    for line in sys.stdin:
        seconds, *words = line.split()
        begin = time.perf_counter()
        for _ in range(0 if tuple(words) in seen else warm):
            once(*words)
            if time.perf_counter() - begin > 0.1:
                break
        seen.add(tuple(words))
        print("%.9f %.9f %d" % repeat(lambda: once(*words), float(seconds)), flush=True)
    print(json.dumps({"peak_mb": round(peak_mb(), 1)}), flush=True)
