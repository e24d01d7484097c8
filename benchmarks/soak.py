"""Hours of mixed load on a server and on batches beside it: python benchmarks/soak.py --minutes 60

Requests of all kinds, good, bad and broken off, and batches that are killed and go on. Status 1: an answer is not what
had to come, the log has an error, memory grows (after the first tenth of the time, faster than --most-slope and by more
than --most-growth), threads or open files do, or something is left in the end. Other options go to serve.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import secrets
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from report import finish, say_table
from soak_requests import KINDS, Ask, Server, UnexpectedAnswer, everything, text

from dllama_mpi.cli.options import number

_MARK = "DLLAMA_MPI_SOAK"  # in the environment of all that a soak starts
_START, _END = 600.0, 120.0  # seconds in which a server starts, and ends
_SAMPLES = 240
_BATCH_LINES = 24
_MORE_FILES = _MORE_THREADS = 24  # of a rank between a tenth of the time and the end; clients at once come and go
_TROUBLE = re.compile(r"Traceback|^error:|Exception|failed:|has been silent", re.MULTILINE)
_LISTENS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@dataclass
class Sample:
    """A moment: seconds since the start, output tokens till then, and of each rank bytes, open files and threads."""

    seconds: float
    tokens: float
    memory: list[int]
    files: list[int]
    threads: list[int]


@dataclass
class Tally:
    """What has come of it.

    Attributes:
        asked: requests by kind. trouble: what was not right, by how often it came.
    """

    asked: Counter[str] = field(default_factory=Counter)
    trouble: Counter[str] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrong(self, what: str) -> None:
        """Note something that is not right."""
        with self.lock:
            self.trouble[what] += 1


class Job:
    """Processes that have one mark in their environment.

    Attributes:
        process: the first of them.
    """

    def __init__(self, command: Sequence[str], mark: str, log: Path, **env: str) -> None:
        self._mark = mark
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, env={**os.environ, **env, _MARK: mark}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def living(self) -> list[psutil.Process]:
        """Return its processes that live, in the order of their starts."""
        found = []
        for each in psutil.process_iter():
            try:
                if each.environ().get(_MARK) == self._mark and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
            except psutil.Error:
                continue
        return sorted(found, key=lambda each: (each.create_time(), each.pid))

    def kill(self) -> None:
        """Kill all of them."""
        while left := self.living():
            for each in left:
                with_no_error(each.kill)
            time.sleep(0.05)
        self.process.wait()


def with_no_error(act: Any) -> None:
    """Do something to a process that may have ended."""
    try:
        act()
    except psutil.Error:
        return


# ---- load


def ask_one(name: str, ask: Ask, server: Server, rng: random.Random, tally: Tally) -> None:
    """Send a request, and note what comes of it."""
    try:
        ask(server, rng)
    except UnexpectedAnswer as error:
        tally.wrong(f"{name}: {error}")
    except Exception as error:  # whatever it is, it is told at the end
        tally.wrong(f"{name}: {error!r}"[:400])
    with tally.lock:
        tally.asked[name] += 1


def ask_all(server: Server, tally: Tally, seed: int) -> None:
    """Be a client that asks everything once: buffers have then been as large as they will be."""
    rng = random.Random(seed)
    for name, ask in everything():
        ask_one(name, ask, server, rng, tally)


def ask_until(end: float, server: Server, tally: Tally, seed: int) -> None:
    """Be a client until it is time."""
    rng = random.Random(seed)
    names, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
    while time.monotonic() < end:
        (name,) = rng.choices(names, weights)
        ask_one(name, KINDS[name][1], server, rng, tally)


def batches_until(end: float, command: Sequence[str], folder: Path, mark: str, tally: Tally, seed: int) -> None:
    """Answer one batch after another, each killed now and then, until it is time."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        work = Path(tempfile.mkdtemp(dir=folder))
        lines = [{"custom_id": str(i), "prompt": text(rng, 20), "max_tokens": 6} for i in range(_BATCH_LINES)]
        (work / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
        one = [*command, "--input", str(work / "in"), "--output", str(work / "out")]
        while True:
            job = Job(one, f"{mark}/batch", work / "log")
            try:
                is_spared = rng.random() < 0.4 or time.monotonic() > end
                status = job.process.wait(_START if is_spared else rng.uniform(0.5, 8))
            except subprocess.TimeoutExpired:
                job.kill()
                tally.batches["killed"] += 1
                continue
            if status != 0:
                tally.wrong(f"a batch ended with status {status}: {(work / 'log').read_text()[-300:]}")
            break
        answers = [json.loads(line) for line in (work / "out").read_bytes().splitlines()]
        if sorted(each["custom_id"] for each in answers) != sorted(str(i) for i in range(_BATCH_LINES)):
            tally.wrong(f"a batch has {len(answers)} answers of {len(lines)}, or answers twice")
        if failed := [each for each in answers if each["error"] or each["response"]["status_code"] != 200]:
            tally.wrong(f"a batch's line: {failed[0]}"[:400])
        look(work / "log", "a batch", tally)
        tally.batches["whole"] += 1
        shutil.rmtree(work)


def look(log: Path, whose: str, tally: Tally) -> None:
    """Look for errors in a log."""
    said = log.read_text(errors="replace")
    if found := _TROUBLE.search(said):
        tally.wrong(f"the log of {whose}: {said[max(0, found.start() - 200) : found.end() + 600]}")


# ---- what is seen


def figure(server: Server, name: str) -> float:
    """Return a figure of /metrics."""
    _, data = server.send("GET", "/metrics")
    found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", data.decode(), re.MULTILINE)
    return sum(map(float, found))


def sample(server: Server, ranks: Sequence[psutil.Process], seconds: float) -> Sample:
    """Look at the ranks."""
    tokens = figure(server, "dllama_output_tokens_total")
    memory = [each.memory_info().rss for each in ranks]
    return Sample(seconds, tokens, memory, [e.num_fds() for e in ranks], [e.num_threads() for e in ranks])


def slope(seconds: Sequence[float], values: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs of points (Theil and Sen): single peaks move it little."""
    pairs = ((a, b) for b in range(len(values)) for a in range(b) if seconds[b] > seconds[a])
    return statistics.median((values[b] - values[a]) / (seconds[b] - seconds[a]) for a, b in pairs)


def growth(samples: Sequence[Sample], rank: int) -> dict[str, float]:
    """Return a rank's memory in MB at the start, a tenth, the middle and the end; its slope after the first tenth."""
    last = samples[-1].seconds
    late = [each for each in samples if each.seconds >= last / 10]
    memory = [each.memory[rank] / 1e6 for each in late]
    rate = 3600 * slope([each.seconds for each in late], memory)
    middle = min(samples, key=lambda each: abs(each.seconds - last / 2)).memory[rank] / 1e6
    rise = rate * (late[-1].seconds - late[0].seconds) / 3600
    return {
        "start_mb": samples[0].memory[rank] / 1e6, "tenth_mb": memory[0], "middle_mb": middle, "end_mb": memory[-1],
        "slope_mb_per_hour": rate, "growth_percent": 100 * rise / memory[0],
        "more_files": late[-1].files[rank] - late[0].files[rank],
        "more_threads": late[-1].threads[rank] - late[0].threads[rank],
    }  # fmt: skip


def verdict(found: Sequence[dict[str, float]], args: argparse.Namespace, tally: Tally) -> None:
    """Note what grows."""
    for rank, each in enumerate(found):
        if each["slope_mb_per_hour"] > args.most_slope and each["growth_percent"] > args.most_growth:
            tally.wrong(f"rank {rank}'s memory grows by {each['slope_mb_per_hour']:.1f} MB an hour")
        if each["more_files"] > _MORE_FILES or each["more_threads"] > _MORE_THREADS:
            tally.wrong(f"rank {rank} has {each['more_files']:+g} open files, {each['more_threads']:+g} threads")


# ---- the whole


def begin(command: Sequence[str], mark: str, folder: Path) -> tuple[Job, Server, list[psutil.Process]]:
    """Start the server; return it, where it listens, and the processes of its ranks, in order.

    Raises:
        SystemExit: it does not start.
    """
    (folder / "tmp").mkdir()
    job, log = Job(command, f"{mark}/server", folder / "log", TMPDIR=str(folder / "tmp")), folder / "log"
    end = time.monotonic() + _START
    while (match := _LISTENS.search(log.read_text())) is None:
        if job.process.poll() is not None or time.monotonic() > end:
            job.kill()
            sys.exit(f"error: the server does not start: {log.read_text()[-1000:]}")
        time.sleep(0.1)
    server = Server(int(match[1]), 0)
    props = json.loads(server.send("GET", "/props")[1])
    server = Server(server.port, props["default_generation_settings"]["n_ctx"])
    ranks = [p for p in job.living() if "serve" in p.cmdline() and p.cmdline()[0] == sys.executable]
    return job, server, ranks


def finish_server(job: Job, server: Server, folder: Path, tally: Tally) -> None:
    """Wait until the server is idle, end it, and look at what is left."""
    end = time.monotonic() + _END
    names = ("dllama_engine_running", "dllama_engine_waiting", "dllama_engine_pages_used")
    while (left := [figure(server, name) for name in names]) != [0, 0, 0]:
        if time.monotonic() > end:
            tally.wrong(f"running, waiting, pages in use when all clients are gone: {left}")
            break
        time.sleep(0.2)
    job.process.terminate()
    try:
        status = job.process.wait(_END)
    except subprocess.TimeoutExpired:
        tally.wrong("the server does not end at SIGTERM")
        return
    if status != 0:
        tally.wrong(f"the server ended with status {status}")
    look(folder / "log", "the server", tally)
    if files := sorted(str(each.relative_to(folder)) for each in (folder / "tmp").rglob("*")):
        tally.wrong(f"files are left: {files[:5]}")


def load(server: Server, ranks: Sequence[psutil.Process], batch: Sequence[str], where: tuple[Path, str],
         args: argparse.Namespace, tally: Tally) -> None:  # fmt: skip
    """Load the server for the time given, and look at it now and then."""
    first = [threading.Thread(target=ask_all, args=(server, tally, args.seed + i)) for i in range(args.clients)]
    for thread in first:
        thread.start()
    for thread in first:
        thread.join()
    started = time.monotonic()
    end = started + 60 * args.minutes
    threads = [
        threading.Thread(target=ask_until, args=(end, server, tally, args.seed * 1000 + i)) for i in range(args.clients)
    ]
    if not args.no_batches:
        threads.append(threading.Thread(target=batches_until, args=(end, batch, *where, tally, args.seed)))
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        try:
            tally.samples.append(sample(server, ranks, time.monotonic() - started))
        except (psutil.Error, OSError) as error:
            tally.wrong(f"a rank or the server is gone: {error!r}")
            break
        time.sleep(max(0.5, 60 * args.minutes / _SAMPLES))
    for thread in threads:
        thread.join()


def rates(samples: Sequence[Sample]) -> list[float]:
    """Return the output tokens a second in each tenth of the time."""
    last, found = samples[-1].seconds, []
    marks = [min(samples, key=lambda each, at=at: abs(each.seconds - at * last / 10)) for at in range(11)]  # type: ignore[misc]
    for a, b in itertools.pairwise(marks):
        found.append((b.tokens - a.tokens) / (b.seconds - a.seconds) if b.seconds > a.seconds else 0.0)
    return found


def show(tally: Tally, ranks: Sequence[dict[str, float]]) -> None:
    """Print tables."""
    wrong: Counter[str] = Counter()
    for what, count in tally.trouble.items():
        wrong[what.partition(":")[0]] += count
    say_table(["requests", "", "not right"], [[n, str(tally.asked[n]), str(wrong[n])] for n in KINDS])
    say_table(["tenth", "tokens/s"], [[str(i + 1), f"{r:.0f}"] for i, r in enumerate(rates(tally.samples))])
    head = ["rank", "MB at the start", "a tenth", "the middle", "the end", "MB/h", "growth", "files", "threads"]
    rows = []
    for rank, each in enumerate(ranks):
        *sizes, rate, percent, files, threads = each.values()
        changes = [f"{rate:+.1f}", f"{percent:+.1f} %", f"{files:+g}", f"{threads:+g}"]
        rows.append([str(rank), *(f"{size:.1f}" for size in sizes), *changes])
    say_table(head, rows)
    print(f"{sum(tally.asked.values())} requests; {tally.batches['whole']} batches, {tally.batches['killed']} kills")
    for what, count in tally.trouble.items():
        print(f"not right, {count} times: {what}")


def options() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here goes to serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], epilog="Other options go to serve.")
    one, above = number(int, 1), number(float, 0, above=True)
    parser.add_argument("--minutes", type=above, default=60.0, metavar="N", help="(default: 60)")
    parser.add_argument("--ranks", type=one, default=3, metavar="N", help="of the server (default: 3)")
    parser.add_argument("--clients", type=one, default=8, metavar="N", help="at once (default: 8)")
    parser.add_argument("--launcher", metavar="COMMAND", help="before -n N (default: the mpiexec of this environment)")
    parser.add_argument("--model", default="demo", help="of the server and the batches (default: demo)")
    parser.add_argument("--no-batches", action="store_true", help="leave the batches out")
    parser.add_argument("--most-slope", type=above, default=20.0, metavar="MB", help="an hour and rank (default: 20)")
    parser.add_argument("--most-growth", type=above, default=3.0, metavar="PERCENT", help="of a rank (default: 3)")
    parser.add_argument("--seed", type=number(int, 0), default=1, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    return parser.parse_known_args()


def main() -> None:
    """Run it; print tables and a line of JSON."""
    args, rest = options()
    beside = Path(sys.executable).with_name("mpiexec")
    launcher = shlex.split(args.launcher or str(beside if beside.exists() else shutil.which("mpiexec")))
    program, common = [sys.executable, "-m", "dllama_mpi"], ["--model", args.model, "--nthreads", "1"]
    tools = ["--tool-parser", "hermes"] if args.model == "demo" else []  # its chat template knows of no tools
    serve = [*launcher, "-n", str(args.ranks), *program, "serve", *common, *tools, "--port", "0", *rest]
    batch = [*program, "batch", *common, "--max-seq-len", "256"]
    tally, mark = Tally(), secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        job, server, ranks = begin(serve, mark, folder)
        try:
            if len(ranks) != args.ranks:
                tally.wrong(f"{len(ranks)} of {args.ranks} ranks are seen; is the server's first host this one alone?")
            load(server, ranks, batch, (folder, mark), args, tally)
            finish_server(job, server, folder, tally)
        finally:
            if left := job.living():
                tally.wrong(f"processes are left: {[each.pid for each in left]}")
                job.kill()
    seen = [growth(tally.samples, rank) for rank in range(len(ranks))]
    verdict(seen, args, tally)
    show(tally, seen)
    figures = {"asked": tally.asked, "batches": tally.batches, "trouble": tally.trouble, "ranks": seen}
    report: dict[str, Any] = {"benchmark": "soak", "options": {**vars(args), "serve": rest}, **figures}
    finish(report | {"rates": rates(tally.samples), "samples": [asdict(each) for each in tally.samples]}, args.json)
    sys.exit(int(bool(tally.trouble)))


if __name__ == "__main__":
    main()
