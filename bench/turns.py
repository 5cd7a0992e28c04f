"""Programs that take turns on the same cores, and what is made of their times: the tools of
run.py."""

import json
import os
import statistics
import subprocess
import time

from limits import LIMITS

SLOWER = 1.25  # a peer that takes so many times as long as the best one gets shorter rounds
DISTURBED = (
    1.15  # the median of the rounds over the fastest one: above it half of them were disturbed
)
FEWEST = 3  # rounds
CORES = len(os.sched_getaffinity(0))
# seconds to wait before a program's turn, where there is time, for cores that nothing else uses
SETTLE = 0.3
LONG = 0.7  # seconds of the longest calls of a round: then three rounds will do


class Unavailable(Exception):
    """A peer that cannot be had."""


class Program:
    """A served program: bench.h and serve.py tell the protocol."""

    last = None  # the one that was asked last
    clock = {"starting": 0.0, "asked": 0.0, "measured": 0.0}  # seconds of the section

    def __init__(self, name, command, threads, environment=None):
        """threads: the number, or a list of numbers of which one is told with each word."""
        self.name = name
        self.own = os.path.basename(command[0]).startswith("bench_")
        self.threads, self.told = threads, isinstance(threads, list)
        most = max(threads) if self.told else threads
        env = dict(os.environ, OMP_NUM_THREADS=str(most), **(environment or {}))
        if most > 1:
            env.setdefault(
                "OMP_PROC_BIND", "true"
            )  # two OpenMP threads on one core wait for each other a whole time slice
        for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
            env.pop(variable, None)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.ready = self.count = None
        self.cores = CORES

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

    def peak(self):
        """MB of its largest resident set so far."""
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM"))

    def spins(self):
        """Whether a thread of it runs."""
        tasks = f"/proc/{self.process.pid}/task"
        try:
            for task in os.listdir(tasks):
                with open(f"{tasks}/{task}/stat", encoding="utf-8", errors="replace") as f:
                    if f.read().rpartition(")")[2].split()[0] == "R":
                        return True
        except OSError:  # no such folder, or a thread that has ended
            pass
        return False

    def seconds(self, budget, word, threads):
        """Median seconds of a call, repeated for `budget` seconds, the peak of the processor right
        before, and whether the cores were then ours alone,
        for which it waits a little where there is time. Idle threads of some libraries go on
        spinning for a while after a call and would take a core
        from the next program, which waits until they sleep."""
        begin = time.perf_counter()
        if Program.last not in (None, self):
            while Program.last.spins() and time.perf_counter() - begin < 0.3:
                time.sleep(0.001)
        Program.last = self
        peak = LIMITS.round(
            threads if self.told else self.threads,
            time.monotonic() + (SETTLE if not PACE.dry and PACE.late() < 1 else 0),
        )
        alone = LIMITS.alone
        median, calls = self.call(budget, word, threads)
        Program.clock["asked"] += time.perf_counter() - begin
        Program.clock["measured"] += median * calls
        return median, peak, alone

    def call(self, budget, word, threads):
        """Median seconds of a call, repeated for `budget` seconds, and the number of calls."""
        self.keep_on(1 if not self.own and (threads if self.told else self.threads) == 1 else CORES)
        self.process.stdin.write(f"{budget} {word}" + (f" {threads}" if self.told else "") + "\n")
        self.process.stdin.flush()
        median, _, calls, *self.count = (float(x) for x in self.read().split())
        return median, calls

    def keep_on(self, count):
        """Lets its threads use so many cores; one is the first, to which the C programs of bench/
        keep themselves."""
        if count == self.cores:
            return
        self.cores = count
        allowed = sorted(os.sched_getaffinity(0))[:count]
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            try:
                os.sched_setaffinity(int(task), allowed)
            except OSError:  # it has ended
                pass

    def finish(self):
        """Ends it. Returns its last record."""
        if Program.last is self:
            Program.last = None
        self.process.stdin.close()
        last = self.read_json()
        self.process.wait()
        return last


def start(missing, *wanted):
    """The programs of [(name, command, threads[, environment])] that can be had; the others go to
    `missing`."""
    made, out, begin = [], [], time.perf_counter()
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
    Program.clock["starting"] += time.perf_counter() - begin
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
    """What the sections are to take, so that all of them together stay under ten minutes: rounds
    beyond the third are left out where one falls
    behind."""

    def __init__(self):
        self.start(1e9, False)

    def start(self, seconds, dry):
        """Of a section that is to take so long; dry: one call of everything."""
        self.begin, self.seconds, self.dry = time.monotonic(), seconds, dry
        self.rows, self.done = 1, 0
        self.disturbed = []  # in words, since the last table
        Program.clock.update(starting=0.0, asked=0.0, measured=0.0)

    def expect(self, rows):
        """How many times the section will call take_turns."""
        self.rows = rows

    def late(self):
        """How many times as long as planned the rows have taken so far, what the programs need to
        start apart."""
        starting = Program.clock["starting"]
        return (time.monotonic() - self.begin - starting) / (
            max(self.seconds - starting, 1) * (self.done + 1) / self.rows
        )

    def enough(self, rounds, seconds):
        """Whether so many rounds of this row will do, each of which takes so long."""
        return self.dry or (rounds >= FEWEST and (self.late() > 1 or seconds > LONG))


PACE = Pace()


class Rounds(list):
    """Seconds of the rounds of a program. peaks: GFLOP/s that the processor gave right before each;
    alone: whether nothing else used the cores then."""

    def __init__(self, rounds=()):
        super().__init__()
        self.peaks, self.alone = [], []
        for r in rounds:
            self.add(*r)

    def add(self, seconds, peak, alone):
        self.append(seconds)
        self.peaks.append(peak)
        self.alone.append(alone)

    def each(self):
        return zip(self, self.peaks, self.alone)

    def share(self, operations):
        """Of the peak of the moment, the median over the rounds."""
        return statistics.median(1e-9 * operations / s / p for s, p in zip(self, self.peaks))


def ask(programs, rounds, budget, words):
    """{name: Rounds}, the programs in turn in each round."""
    times = {p.name: Rounds() for p in programs}
    for done in range(rounds):
        if done and PACE.enough(done, sum(max(t) for t in times.values())):
            break
        best = min((times[p.name][0] for p in programs), default=0) if done else 0
        for p, word in zip(programs, words):
            slow = done and times[p.name][0] > SLOWER * best
            times[p.name].add(*p.seconds(0 if PACE.dry else budget / 3 if slow else budget, *word))
    return times


def unrest(seconds):
    """How much of its rounds a disturbance may have taken: their median over the fastest."""
    return statistics.median(seconds) / min(seconds)


def undisturbed(times):
    """The rounds before which each of the programs had the cores for itself, or all of them where
    those are fewer than FEWEST; and whether these look
    like a disturbance."""
    alone = [
        i
        for i, all_alone in enumerate(map(all, zip(*(t.alone for t in times.values()))))
        if all_alone
    ]
    if len(alone) < FEWEST:
        return times, True
    kept = {
        name: Rounds(r for i, r in enumerate(t.each()) if i in alone) for name, t in times.items()
    }
    return kept, max(map(unrest, kept.values())) > DISTURBED


def take_turns(label, programs, rounds, budget, *words):
    """{name: Rounds} of a row: at least three rounds, `rounds` where time allows, less those that
    something else disturbed. words: (word, threads)
    for all programs, or one for each. A row with a disturbed program gets as many rounds again
    unless the section is far behind its plan; where
    that does not help PACE.disturbed says so, with the label."""
    words = words * len(programs) if len(words) == 1 else words
    asked = ask(programs, rounds, budget, words)
    times, disturbed = undisturbed(asked)
    if disturbed and not PACE.dry:
        if PACE.late() < 1.25:
            again = ask(programs, rounds, budget, words)
            times, _ = undisturbed(
                {name: Rounds([*t.each(), *again[name].each()]) for name, t in asked.items()}
            )
        PACE.disturbed += [
            f"{name} at {label} ({100 * unrest(s) - 100:.0f} %)"
            for name, s in times.items()
            if unrest(s) > DISTURBED
        ]
    PACE.done += 1
    return times


def tell_disturbed(report):
    """Below a table."""
    shown = PACE.disturbed[:12]
    if shown:
        report.text(
            "Disturbed (in brackets by how much the median of the rounds is above the fastest), and"
            " no better when measured again where there was time for it: "
            + ", ".join(shown)
            + (
                f", and {len(PACE.disturbed) - len(shown)} more"
                if len(shown) < len(PACE.disturbed)
                else ""
            )
            + ".",
            "",
        )
    PACE.disturbed = []


def ratio(ours, theirs):
    """How many times longer the peer takes: the median over the rounds that both had."""
    return statistics.median(b / a for a, b in zip(ours, theirs))


def by_threads(a, programs):
    """{threads: those that are told the number, or were started with it}"""
    return {
        threads: [p for p in programs if p.told or p.threads == threads] for threads in a.threads
    }


def finish(everyone):
    """Ends {threads: programs}."""
    for p in dict.fromkeys(p for programs in everyone.values() for p in programs):
        p.finish()


def rate(tokens, seconds):
    return f"{tokens / statistics.median(seconds):.0f}" + (
        f" ±{spread(seconds):.0f} %" if len(seconds) > 1 else ""
    )


def in_threads(threads):
    return f"{threads} thread{'s' if threads > 1 else ''}"
