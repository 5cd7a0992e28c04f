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
    """Warms up, prints the record `ready`, and answers the lines of standard input until it ends."""
    for _ in range(warm):
        once()
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print("%.9f %.9f %d" % repeat(once, float(line)), flush=True)
    print(json.dumps({"peak_mb": round(peak_mb(), 1)}), flush=True)
