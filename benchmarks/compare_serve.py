"""Compare the server with the Python API, and with llama.cpp's server, turn by turn; medians and ratios.

python benchmarks/compare_serve.py DIR [--threads 2] [--llama-server PROGRAM FILE.gguf]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from report import finish
from serve import Load, run

from dllama_mpi import LLM, SamplingParams
from dllama_mpi.cli.options import number, table

START_SECONDS = 300
PAUSE = 0.4  # seconds between turns: the other program's threads stop spinning
Measure = Callable[[Load, int], float]


def api_worker(folder: str, threads: int, batch: int) -> None:
    """Answer requests for generations through the Python API until the input ends."""
    llm = LLM(folder, nthreads=threads, max_batch=batch, max_seq_len=8192)
    llm.warm_up()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
        started = time.perf_counter()
        results = llm.generate(asked["prompts"], params)
        assert results is not None
        tokens = sum(len(each.token_ids) for each in results)
        print(json.dumps({"rate": tokens / (time.perf_counter() - started)}), flush=True)


@contextlib.contextmanager
def api(args: argparse.Namespace) -> Iterator[Measure]:
    """Run the Python API in a process of its own."""
    command = [sys.executable, __file__, args.folder, "--threads", str(args.threads), "--api-worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()

    def measure(load: Load, clients: int) -> float:
        prompts = [load.prompt(i) for i in range(clients)]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"prompts": prompts, "tokens": load.tokens}) + "\n")
        process.stdin.flush()
        return float(json.loads(process.stdout.readline())["rate"])

    try:
        yield measure
    finally:
        process.kill()


def over_http(url: str) -> Measure:
    """Return what measures a server."""

    def measure(load: Load, clients: int) -> float:
        results, seconds = run(replace(load, url=url), clients, clients, None)
        failed = [r.error for r in results if r.error]
        if failed:
            raise SystemExit(f"{url}: a request has failed: {failed[0]}")
        return sum(r.tokens for r in results) / seconds

    return measure


@contextlib.contextmanager
def own_server(args: argparse.Namespace) -> Iterator[Measure]:
    """Run this program's server."""
    command = [
        *args.launcher.split(),
        sys.executable,
        "-m",
        "dllama_mpi",
        "serve",
        "--model",
        args.folder,
        "--port",
        "0",
    ]
    command += ["--nthreads", str(args.threads), "--max-seq-len", "8192"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://\S+", line):
            break
    else:
        raise SystemExit("the server does not start")
    try:
        yield over_http(found[0])
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def llama_server(args: argparse.Namespace) -> Iterator[Measure]:
    """Run llama.cpp's server, with a slot for each client."""
    program, model = args.llama_server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", model, "--port", str(port), "-np", str(args.clients), "-t", str(args.threads)]
    command += ["-tb", str(args.threads), "-c", str(1024 * args.clients)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    measure, end = over_http(f"http://127.0.0.1:{port}"), time.monotonic() + START_SECONDS
    probe = Load("", None, None, 4, 0, 1, 1)
    while True:
        with contextlib.suppress(SystemExit):
            measure(probe, 1)
            break
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit("llama.cpp's server does not start")
        time.sleep(0.5)
    try:
        yield measure
    finally:
        process.kill()


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", metavar="DIR", help="model directory")
    parser.add_argument("--threads", type=number(int, 1), default=2, metavar="N")
    parser.add_argument("--launcher", default="", help="of this program's server, such as 'mpiexec -n 2'")
    parser.add_argument("--llama-server", nargs=2, metavar=("PROGRAM", "GGUF"), help="llama.cpp's, and its model")
    parser.add_argument("--clients", type=number(int, 1), default=8, metavar="N", help="at once (default: 8)")
    parser.add_argument("--words", type=number(int, 1), default=128, metavar="N", help="of a prompt (default: 128)")
    parser.add_argument("--tokens", type=number(int, 1), default=64, metavar="N", help="of an answer (default: 64)")
    parser.add_argument("--turns", type=number(int, 1), default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    parser.add_argument("--api-worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.api_worker:
        api_worker(args.folder, args.threads, 16)
        return
    programs = {"Python API": api, "this server": own_server}
    if args.llama_server:
        programs["llama.cpp's server"] = llama_server
    found: dict[str, dict[int, list[float]]] = {name: {1: [], args.clients: []} for name in programs}
    with contextlib.ExitStack() as stack:
        measures = {name: stack.enter_context(make(args)) for name, make in programs.items()}
        for turn in range(args.turns + 1):  # the first warms up
            for clients in (1, args.clients):
                load = Load("", None, None, args.words, 0, args.tokens, 100 * turn + clients)
                for name, measure in measures.items():
                    time.sleep(PAUSE)
                    rate = measure(load, clients)
                    if turn:
                        found[name][clients].append(rate)
    medians = {name: {n: statistics.median(values) for n, values in each.items()} for name, each in found.items()}
    own = medians["this server"]
    rows: list[list[str]] = []
    for name, each in medians.items():
        one, several = each[1], each[args.clients]
        pairs = [
            statistics.median(a / b for a, b in zip(found["this server"][n], found[name][n], strict=True)) for n in each
        ]
        rows.append([name, f"{one:.1f}", f"{several:.1f}", f"{several / one:.2f}", *(f"{p:.3f}" for p in pairs)])
    many = f"{args.clients} clients"
    print(table(["tokens/s", "1 client", many, "ratio", "this server's: 1", many], rows))
    result: dict[str, Any] = {"medians": medians, "readings": found, "own": own}
    finish(result | {"options": vars(args)}, args.json)


if __name__ == "__main__":
    main()
