"""Load an OpenAI-compatible server, ours or another's: python benchmarks/serve.py --url http://127.0.0.1:9990

Requests come at a rate (--rate, Poisson) or as fast as --concurrency allows. Told are tokens a second, the time to the
first token, the time between tokens and the whole time, as percentiles.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from report import finish

from dllama_mpi.cli.options import number, table

TEXT = "the of a file list name value object string return module class path key type line number default text set"
WORDS = TEXT.split(" ")
PERCENTILES = (50, 90, 99)


@dataclass
class Result:
    """One request: when it was sent, when each piece of text came (perf_counter seconds), tokens, or what failed."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""
    error: str = ""


@dataclass(frozen=True)
class Load:
    """What is asked of which server."""

    url: str
    model: str | None
    key: str | None
    words: int
    shared: int
    tokens: int
    seed: int

    def prompt(self, number: int) -> str:
        """Return the prompt of a request: a beginning that all share, then words of its own."""
        common, own = random.Random(self.seed), random.Random(self.seed * 7919 + number + 1)
        words = [common.choice(WORDS) for _ in range(self.shared)]
        return " ".join(words + [own.choice(WORDS) for _ in range(self.words)])

    def body(self, prompt: str) -> bytes:
        """Return the body of a request."""
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body | ({"model": self.model} if self.model else {})).encode()

    def ask(self, number: int) -> Result:
        """Send a request and read its answer."""
        return self.ask_prompt(self.prompt(number))

    def ask_prompt(self, prompt: str) -> Result:
        """Send a request with a prompt and read its answer."""
        result = Result(time.perf_counter())
        try:
            self._read(prompt, result)
        except (OSError, ValueError, http.client.HTTPException) as error:
            result.error = repr(error)
        result.ended = time.perf_counter()
        return result

    def _read(self, prompt: str, result: Result) -> None:
        parts = urlsplit(self.url)
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = make(parts.hostname or "127.0.0.1", parts.port, timeout=600)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/v1/completions", self.body(prompt), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"{answer.status} {answer.read(300)!r}")
            for line in answer:
                if line.startswith(b"data: {"):
                    take(json.loads(line[6:]), result)
        finally:
            connection.close()


def take(chunk: dict[str, Any], result: Result) -> None:
    """Note a chunk of a stream."""
    if "error" in chunk:
        raise ValueError(str(chunk["error"]))
    text = "".join(choice.get("text") or "" for choice in chunk["choices"])
    if text:
        result.pieces.append(time.perf_counter())
        result.text += text
    if usage := chunk.get("usage"):
        result.tokens, result.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        result.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def run(load: Load, requests: int, concurrency: int, rate: float | None) -> tuple[list[Result], float]:
    """Send requests; return what came of each, and the seconds from the first to the end of the last."""
    results: list[Result] = []
    numbers = iter(range(requests))
    lock, chance = threading.Lock(), random.Random(load.seed)
    started = time.perf_counter()
    due = started

    def worker() -> None:
        nonlocal due
        while True:
            with lock:
                number = next(numbers, None)
                if number is None:
                    return
                at, due = due, due + (chance.expovariate(rate) if rate else 0.0)
            time.sleep(max(0.0, at - time.perf_counter()))
            results.append(load.ask(number))

    threads = [threading.Thread(target=worker) for _ in range(min(concurrency, requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, time.perf_counter() - started


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and percentiles of values in milliseconds."""
    if not values:
        return {}
    ordered = sorted(1e3 * value for value in values)
    found = {f"p{p}": ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))] for p in PERCENTILES}
    return {"mean": statistics.fmean(ordered), **found, "max": ordered[-1]}


def summary(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Return the figures of a run."""
    good = [r for r in results if not r.error and r.pieces]
    gaps = [b - a for r in good for a, b in zip(r.pieces, r.pieces[1:], strict=False)]
    return {
        "requests": len(results),
        "failed": len(results) - len(good),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "prompt_tokens": sum(r.prompt_tokens for r in good),
        "cached_tokens": sum(r.cached_tokens for r in good),
        "output_tokens": sum(r.tokens for r in good),
        "output_tokens_per_second": sum(r.tokens for r in good) / seconds,
        "first_token_ms": percentiles([r.pieces[0] - r.sent for r in good]),
        "between_tokens_ms": percentiles(gaps),
        "whole_ms": percentiles([r.ended - r.sent for r in good]),
        "errors": sorted({r.error for r in results if r.error}),
    }


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    for name in ("requests", "failed", "seconds", "prompt_tokens", "cached_tokens", "output_tokens"):
        print(f"{name.replace('_', ' ')}: {found[name]:.6g}")
    print(f"{found['output_tokens_per_second']:.1f} tokens/s, {found['requests_per_second']:.2f} requests/s")
    rows = []
    for name in ("first_token_ms", "between_tokens_ms", "whole_ms"):
        values = found[name]
        rows.append([name.removesuffix("_ms").replace("_", " "), *(f"{value:.1f}" for value in values.values())])
    print(table(["ms", "mean", *(f"p{p}" for p in PERCENTILES), "max"], [row for row in rows if len(row) > 1]))
    for error in found["errors"]:
        print(f"failed: {error}")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add what tells which server is loaded."""
    parser.add_argument("--url", default="http://127.0.0.1:9990", help="without /v1 (default: http://127.0.0.1:9990)")
    parser.add_argument("--model", help="the model's name, for servers that want one")
    parser.add_argument("--api-key", metavar="KEY")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_server_options(parser)
    parser.add_argument("--requests", type=number(int, 1), default=32, metavar="N")
    parser.add_argument(
        "--concurrency", type=number(int, 1), default=8, metavar="N", help="clients at once (default: 8)"
    )
    parser.add_argument("--rate", type=number(float, 0, above=True), metavar="R", help="requests a second, on average")
    parser.add_argument(
        "--words", type=number(int, 1), default=100, metavar="N", help="words of a prompt (default: 100)"
    )
    parser.add_argument(
        "--shared", type=number(int, 0), default=0, metavar="N", help="words that all prompts begin with"
    )
    parser.add_argument(
        "--tokens", type=number(int, 1), default=64, metavar="N", help="tokens of an answer (default: 64)"
    )
    parser.add_argument("--seed", type=number(int, 0), default=1, metavar="N")
    parser.add_argument("--warm-up", type=number(int, 0), default=2, metavar="N", help="requests before (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    load = Load(args.url, args.model, args.api_key, args.words, args.shared, args.tokens, args.seed)
    for each in range(args.warm_up):
        load.ask(10**9 + each)
    results, seconds = run(load, args.requests, args.concurrency, args.rate)
    found = summary(results, seconds)
    show(found)
    finish(found | {"options": vars(args)}, args.json)


if __name__ == "__main__":
    main()
