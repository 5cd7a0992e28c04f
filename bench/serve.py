"""The Python side of the protocol of bench/run.py (see bench.h): one JSON line when ready, then a median for each line of input."""
import json
import resource
import statistics
import sys
import time


def repeat(once, seconds):
    """Calls once() at least one time and for that many seconds. Returns median, minimum and number of calls."""
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
    """Warms up, prints the record `ready`, and answers the lines of standard input until it ends. Words after the seconds are arguments of
    once(); what was not called with them before is called twice first, or once if
    that takes long."""
    for _ in range(warm):
        once()
    print(json.dumps(ready), flush=True)
    seen = {()}
    for line in sys.stdin:
        seconds, *words = line.split()
        if tuple(words) not in seen:
            seen.add(tuple(words))
            begin = time.perf_counter()
            once(*words)
            if time.perf_counter() - begin < 0.5:
                once(*words)
        print("%.9f %.9f %d" % repeat(lambda: once(*words), float(seconds)), flush=True)
    print(json.dumps({"peak_mb": round(peak_mb(), 1)}), flush=True)
