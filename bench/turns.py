"""Programs that take turns on the same cores, and what is made of their times: the tools of run.py."""
import json
import os
import statistics
import subprocess
import time

SLOWER = 1.25   # a peer that takes so many times as long as the best one is not asked again


class Unavailable(Exception):
    """A peer that cannot be had."""


class Program:
    """A served program: bench.h and serve.py tell the protocol."""

    def __init__(self, name, command, threads, environment=None):
        self.name = name
        self.own = os.path.basename(command[0]).startswith("bench_")
        self.pause = 0.04 if threads > 1 else 0
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), **(environment or {}))
        if threads > 1:
            env.setdefault("OMP_PROC_BIND", "true")     # two OpenMP threads on one core wait for each other a whole time slice
        for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
            env.pop(variable, None)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self.ready = None

    def wait(self):
        """Until it is ready: several are started at once, since that takes some of them seconds."""
        self.ready = self.read_json()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            why = self.process.stderr.read().strip().splitlines()
            raise Unavailable(f"{self.name}: {why[-1] if why else 'it ended'}")
        return line

    def read_json(self):
        while True:
            line = self.read()
            if line.startswith("{"):
                return json.loads(line)

    def seconds(self, budget, *words):
        """Median seconds of a call, repeated for `budget` seconds. Idle threads of OpenBLAS and others go on spinning for up to 30 ms after a
        call and would take a core from the next program: hence the pause."""
        time.sleep(self.pause)
        self.process.stdin.write(" ".join([str(budget), *words]) + "\n")
        self.process.stdin.flush()
        return float(self.read().split()[0])

    def finish(self):
        self.process.stdin.close()
        last = self.read_json()
        self.process.wait()
        return last


def start(missing, *wanted):
    """The programs of [(name, command, threads[, environment])] that can be had; the others go to `missing`."""
    made, out = [], []
    for name, command, threads, *environment in wanted:
        try:
            made.append(Program(name, command, threads, *environment))
        except OSError as e:
            missing.append(f"{name}: {e}")
    for p in made:
        try:
            p.wait()
            out.append(p)
        except Unavailable as e:
            missing.append(str(e))
    for m in missing:
        print(f"  left out: {m}", flush=True)
    return out


def left_out(report, missing):
    for m in dict.fromkeys(missing):
        report.text(f"Left out: {m}", "")


def spread(values):
    """Half the distance between the quartiles, in per cent of the median."""
    if len(values) < 2:
        return 0
    if len(values) < 3:
        return 100 * (max(values) - min(values)) / 2 / statistics.median(values)
    q = statistics.quantiles(values, n=4, method="inclusive")
    return 100 * (q[2] - q[0]) / 2 / q[1]


class Pace:
    """What the sections are to take, so that all of them together stay under ten minutes: rounds are left out where one falls behind."""

    def __init__(self):
        self.start(1e9, False)

    def start(self, seconds, dry):
        """Of a section that is to take so long; dry: one call of everything."""
        self.begin, self.seconds, self.dry = time.monotonic(), seconds, dry
        self.rows, self.done = 1, 0

    def expect(self, rows):
        """How many times the section will call take_turns."""
        self.rows = rows

    def enough(self, rounds):
        """Whether so many rounds of this row will do."""
        late = (time.monotonic() - self.begin) / (self.seconds * (self.done + 1) / self.rows)
        return self.dry or (rounds >= 2 and late > 1) or late > 1.3


PACE = Pace()


def take_turns(programs, rounds, budget, *words, always=()):
    """{name: [seconds of each round]}. Peers that are slow in the first round are not asked again, but those named in `always`."""
    times = {p.name: [] for p in programs}
    asked = programs
    for done in range(rounds):
        if done and PACE.enough(done):
            break
        for p in asked:
            times[p.name].append(p.seconds(0 if PACE.dry else budget, *words))
        best = min((times[p.name][0] for p in programs if not p.own), default=0)
        asked = [p for p in programs if p.own or p.name in always or times[p.name][0] <= SLOWER * best]
    PACE.done += 1
    return times


def ratio(ours, theirs):
    """How many times longer the peer takes: the median over the rounds that both had."""
    return statistics.median(b / a for a, b in zip(ours, theirs))


def finish(programs):
    for p in programs:
        p.finish()


def rate(tokens, seconds):
    return f"{tokens / statistics.median(seconds):.0f}" + (f" ±{spread(seconds):.0f} %" if len(seconds) > 1 else "")


def in_threads(threads):
    return f"{threads} thread{'s' if threads > 1 else ''}"
