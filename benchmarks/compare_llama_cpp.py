"""Compare this program with llama.cpp on the same weights, turn by turn; medians and ratios.

python benchmarks/compare_llama_cpp.py --make llama3.2-1b DIR            # writes DIR/model.gguf and DIR/q40
python benchmarks/compare_llama_cpp.py --make qwen3-30b-a3b:12 DIR       # the first 12 layers: 340 MB each
python benchmarks/compare_llama_cpp.py DIR [--llama-python PYTHON]       # PYTHON has llama-cpp-python
python benchmarks/compare_llama_cpp.py FILE.gguf                         # both read this file
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import twins
from report import CALM, Disturbance, ceilings, finish, say_ceilings, say_table

from dllama_mpi.errors import DllamaError
from dllama_mpi.kernels import runtime
from dllama_mpi.kernels.probe import ReadProbe
from dllama_mpi.model.shapes import SHAPES
from dllama_mpi.planning.costs import Work, work_of
from dllama_mpi.startup.opening import ModelFiles, open_model
from dllama_mpi.startup.shares import shards_of

LEAST_POSITIONS = 64  # for the comparison of logits
HERE = Path(__file__).resolve().parent
READ_BYTES, READINGS = 512 << 20, 3  # before each turn of a decode
PAUSE = 0.4  # seconds between turns: the other program's threads stop spinning


@dataclass(frozen=True)
class Row:
    """One comparison: lengths as in `engine.bench.Test`, and threads."""

    name: str
    prompt: int
    generated: int
    depth: int
    batch: int
    threads: int

    @property
    def tokens(self) -> int:
        """Tokens that one turn feeds."""
        return self.batch * (self.prompt + self.generated)

    def request(self) -> dict[str, Any]:
        """Return what a worker is asked."""
        lengths = {"prompt": self.prompt, "generated": self.generated, "depth": self.depth, "batch": self.batch}
        return {"op": "run", **lengths, "threads": self.threads}


def rows(most: int, depth: int) -> list[Row]:
    """Return the comparisons: at all threads and at one."""
    table = []
    for threads in dict.fromkeys((most, 1)):
        table.append(Row("decode at 100", 0, 64, 100, 1, threads))
        table.append(Row("prefill 512", 512, 0, 0, 1, threads))
    table.append(Row("decode x8 at 100", 0, 32, 100, 8, most))
    table.append(Row(f"decode at {depth}", 0, 64, depth, 1, most))
    return table


class Worker:
    """A process that measures one program."""

    def __init__(self, command: list[str]) -> None:
        """Start it and read what it says of itself."""
        self.command = command
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: {' '.join(self.command)} ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def wait_for_calm(until: float) -> None:
    """Pause, and go on pausing while other programs are busy, to a time of the monotonic clock."""
    while True:
        noise = Disturbance()
        time.sleep(PAUSE)
        if noise.share() <= CALM or time.monotonic() > until:
            return


@dataclass(frozen=True)
class Programs:
    """The workers of both programs: llama.cpp takes any number of threads, this program one a worker."""

    theirs: Worker
    ours: dict[int, Worker]

    @staticmethod
    def start(model: tuple[Path, Path], python: str, todo: list[Row], threads: int) -> Programs:
        """Start the workers that the comparisons need, and one of this many threads; model: theirs and ours."""
        theirs = Worker([python, str(HERE / "llama_cpp_worker.py"), str(model[0])])
        ours = {}
        for count in {threads, *(row.threads for row in todo)}:
            own = [row for row in todo if row.threads == count]
            positions = max((row.depth + row.prompt + row.generated + 1 for row in own), default=0)
            slots = sum(max(row.batch for row in own if row.depth == d) for d in {row.depth for row in own})
            sizes = (count, max(LEAST_POSITIONS, positions), slots + 1)
            ours[count] = Worker([sys.executable, str(HERE / "own_worker.py"), str(model[1]), *map(str, sizes)])
        return Programs(theirs, ours)

    def turn(self, row: Row, is_ours: bool, patience: float) -> tuple[float, float]:
        """Return the seconds of one turn of one program, and the share of the processors that others took meanwhile.

        Waits for others to be calm, and takes the turn again if they were not, for `patience` seconds in all.
        """
        worker = self.ours[row.threads] if is_ours else self.theirs
        until = time.monotonic() + patience
        best = (float("inf"), float("inf"))
        while True:
            wait_for_calm(until)
            noise = Disturbance(os.getpid(), worker.process.pid)
            seconds = float(worker.ask(row.request())["seconds"])
            best = min(best, (noise.share(), seconds))
            if best[0] <= CALM or time.monotonic() > until:
                return best[1], best[0]

    def close(self) -> None:
        """End all workers."""
        for worker in (self.theirs, *self.ours.values()):
            worker.close()


def agreement(programs: Programs, threads: int, vocabulary: int) -> dict[str, Any]:
    """Compare the logits of both after the same tokens: the weights must be the same."""
    tokens = np.random.default_rng(1).integers(vocabulary, size=48).tolist()
    request = {"op": "logits", "tokens": tokens, "threads": threads}
    ours, theirs = (np.array(w.ask(request)["logits"]) for w in (programs.ours[threads], programs.theirs))
    return {
        "largest_difference_over_std": float(np.abs(ours - theirs).max() / theirs.std()),
        "correlation": float(np.corrcoef(ours, theirs)[0, 1]),
        "same_best_token": bool(ours.argmax() == theirs.argmax()),
    }


class Memory:
    """Readings of the memory's rate with a comparison's threads, in turns with both programs."""

    def __init__(self, todo: list[Row]) -> None:
        """Take memory to read."""
        self._probes = {row.threads: ReadProbe(READ_BYTES, row.threads) for row in todo}
        self.rates: dict[Row, list[float]] = {row: [] for row in todo}

    def read(self, row: Row) -> None:
        """Add some readings, in GB/s, to a comparison's, if it is of decode alone."""
        if row.prompt:
            return
        probe = self._probes[row.threads]
        runtime.set_threads(row.threads)
        self.rates[row] += [probe.size / probe.seconds() / 1e9 for _ in range(READINGS)]


def compare(programs: Programs, todo: list[Row], turns: int, patience: float) -> list[dict[str, Any]]:
    """Return the speeds of both and the memory's, taken in turns, who begins changing too."""
    samples: dict[tuple[Row, bool], list[float]] = {(row, who): [] for row in todo for who in (False, True)}
    disturbed: dict[tuple[Row, bool], list[float]] = {key: [] for key in samples}
    memory = Memory(todo)
    for turn in range(turns + 1):
        for row in todo:
            memory.read(row)
            for is_ours in (False, True) if turn % 2 else (True, False):
                seconds, taken = programs.turn(row, is_ours, patience if turn else 0.0)
                if turn > 0:  # the first is the warm-up
                    samples[row, is_ours].append(row.tokens / seconds)
                    disturbed[row, is_ours].append(taken)
            memory.read(row)
        print(f"turn {turn} of {turns} done", file=sys.stderr, flush=True)
    report = []
    for row in todo:
        ours, theirs = samples[row, True], samples[row, False]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        report.append(
            {
                "test": row.name,
                "threads": row.threads,
                "n_prompt": row.prompt,
                "n_gen": row.generated,
                "n_depth": row.depth,
                "n_batch": row.batch,
                "ours_tokens_per_s": statistics.median(ours),
                "llama_cpp_tokens_per_s": statistics.median(theirs),
                "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
                "median_of_ratios": ratio,
                "read_gb_per_s": statistics.median(memory.rates[row]) if memory.rates[row] else None,
                "readings_gb_per_s": memory.rates[row],
                "ours_samples_tokens_per_s": ours,
                "llama_cpp_samples_tokens_per_s": theirs,
                "ours_others_cpu_shares": disturbed[row, True],
                "llama_cpp_others_cpu_shares": disturbed[row, False],
            }
        )
    return report


def work_of_model(opened: ModelFiles) -> Work:
    """Return what a token asks of a model on one rank."""
    (whole,) = shards_of(opened.config, [1.0])
    return work_of(opened.config, whole, opened.formats(None), "f16")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, metavar="DIR|FILE.gguf", help="what --make wrote, or a file")
    parser.add_argument(
        "--make",
        nargs=2,
        metavar=("SHAPE", "DIR"),
        help=f"write the twins; SHAPE: {', '.join(SHAPES)}, or its first N layers as SHAPE:N",
    )
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON", help="(default: this one)")
    parser.add_argument("--turns", type=int, default=7, metavar="N", help="of each program and test (default: 7)")
    parser.add_argument(
        "--patience",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help=f"most that a turn waits, and is taken again, while other programs use more than {CALM:.0%}%"
        " of the processors (default: 30)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(default: all cores)")
    parser.add_argument("--depth", type=int, default=4000, metavar="N", help="of the long context (default: 4000)")
    parser.add_argument("--tests", metavar="TEXT", help="only those whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args()
    if (args.model is None) == (args.make is None):
        parser.error("give DIR, FILE.gguf or --make SHAPE DIR")
    return args


def main() -> None:
    """Print the ceilings, a table and a line of JSON."""
    args = options()
    if args.make is not None:
        try:
            twins.make(args.make[0], Path(args.make[1]))
        except DllamaError as error:
            sys.exit(f"error: {error}")
        return
    most = args.threads or runtime.most_threads()
    limits = [ceilings(threads) for threads in dict.fromkeys((most, 1))]
    for limit in limits:
        say_ceilings(limit)
    todo = [row for row in rows(most, args.depth) if args.tests is None or args.tests in row.name]
    model = (args.model, args.model) if args.model.is_file() else (args.model / "model.gguf", args.model / "q40")
    try:
        opened = open_model(str(model[1]))
    except DllamaError as error:
        sys.exit(f"error: {error}")
    programs = Programs.start(model, args.llama_python, todo, most)
    same = agreement(programs, most, opened.config.vocab_size)
    print(
        f"the same weights: logits correlate to {same['correlation']:.5f}, largest difference"
        f" {same['largest_difference_over_std']:.3f} standard deviations",
        flush=True,
    )
    found = compare(programs, todo, args.turns, args.patience)
    work = work_of_model(opened)
    about = {"ours": programs.ours[most].about, "llama_cpp": programs.theirs.about}
    programs.close()
    cells = []
    for f in found:
        reads, step = f["read_gb_per_s"], work.read(f["n_batch"]) + work.head_size
        share = "-" if reads is None else f"{f['ours_tokens_per_s'] / f['n_batch'] * step / 1e9 / reads:.0%}"
        speeds = (f"{f[key]:.1f}" for key in ("ours_tokens_per_s", "llama_cpp_tokens_per_s"))
        noise = statistics.median(f["ours_others_cpu_shares"] + f["llama_cpp_others_cpu_shares"])
        cells.append([f["test"], str(f["threads"]), *speeds, f"{f['median_of_ratios']:.2f}", share, f"{noise:.0%}"])
    head = ["test", "threads", "ours t/s", "llama.cpp t/s", "ratio", "ours, of memory limit", "others' CPU"]
    say_table(head, cells)
    finish({"benchmark": "compare_llama_cpp", "about": about, "ceilings": limits, "agreement": same,
            "turns": args.turns, "results": found,
            "bytes_per_token": work.read() + work.head_size}, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
