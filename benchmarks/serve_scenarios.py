"""What people notice of a server: python benchmarks/serve_scenarios.py --url http://127.0.0.1:9990

Speed for one client and for several; how long others wait while a long prompt is read; a second turn; many
clients with one long beginning. For any OpenAI-compatible server; lengths are in words, which are about tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from report import finish
from serve import Load, Result, add_server_options, run

from dllama_mpi.cli.options import number, table


def rate(load: Load, requests: int, clients: int) -> float:
    """Return the tokens a second of some requests."""
    results, seconds = run(load, requests, clients, None)
    failed = [r.error for r in results if r.error]
    if failed:
        raise SystemExit(f"a request has failed: {failed[0]}")
    return sum(r.tokens for r in results) / seconds


def clients(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """Compare several clients with one, in turns."""
    found: dict[str, list[float]] = {"one": [], "several": []}
    for turn in range(args.turns):
        fresh = replace(load, words=args.words, tokens=args.tokens, seed=load.seed + 10 * turn)
        found["one"].append(rate(fresh, 2, 1))
        found["several"].append(rate(replace(fresh, seed=fresh.seed + 1), 2 * args.clients, args.clients))
    one, several = (statistics.median(found[name]) for name in ("one", "several"))
    return {
        "1 client, tokens/s": one,
        f"{args.clients} clients, tokens/s": several,
        "ratio": several / one,
        "readings": found,
    }


def beside_a_long_prompt(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """Send a short request while a long prompt is read and another answer runs."""
    firsts, gaps, whole = [], [], []
    for turn in range(args.turns):
        base = replace(load, seed=load.seed + 1000 + 10 * turn)
        running = replace(base, words=8, tokens=args.tokens * 4)
        long = replace(base, words=args.long, tokens=1, seed=base.seed + 1)
        short = replace(base, words=20, tokens=4, seed=base.seed + 2)
        results: dict[str, Result] = {}

        def ask(name: str, each: Load, results: dict[str, Result] = results) -> threading.Thread:
            thread = threading.Thread(target=lambda: results.__setitem__(name, each.ask(0)))
            thread.start()
            return thread

        threads = [ask("running", running)]
        time.sleep(args.lead)
        threads.append(ask("long", long))
        time.sleep(args.lead)
        threads.append(ask("short", short))
        for thread in threads:
            thread.join()
        for name, result in results.items():
            if result.error or not result.pieces:
                raise SystemExit(f"the {name} request has failed: {result.error or 'no text'}")
        read = results["long"]
        firsts.append(results["short"].pieces[0] - results["short"].sent)
        whole.append(read.pieces[0] - read.sent)
        pieces = [p for p in results["running"].pieces if read.sent <= p <= read.pieces[0]]
        gaps.append(max((b - a for a, b in itertools.pairwise(pieces)), default=0.0))
    return {
        "long prompt read, ms": 1e3 * statistics.median(whole),
        "first token of a short request meanwhile, ms": 1e3 * statistics.median(firsts),
        "longest gap of a running answer meanwhile, ms": 1e3 * statistics.median(gaps),
        "readings": {"first": firsts, "gap": gaps},
    }


def second_turn(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """Go on with a conversation: all of the first turn, its answer included, and a new message."""
    ratios, firsts = [], []
    for turn in range(args.turns):
        base = replace(load, words=1000, tokens=16, seed=load.seed + 5000 + turn)
        first = base.ask(0)
        more = f"{base.prompt(0)} {first.text} {replace(base, words=20).prompt(1)}"
        second = base.ask_prompt(more)
        for result in (first, second):
            if result.error or not result.pieces:
                raise SystemExit(f"a turn has failed: {result.error or 'no text'}")
        firsts.append(first.pieces[0] - first.sent)
        ratios.append((second.pieces[0] - second.sent) / firsts[-1])
    return {
        "first turn's first token, ms": 1e3 * statistics.median(firsts),
        "second turn's, part of that": statistics.median(ratios),
    }


def one_beginning(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """Have many clients begin with the same words, all at once."""
    shared = replace(load, words=20, shared=1000, tokens=8, seed=load.seed + 9000)
    results, seconds = run(shared, 32, 32, None)
    failed = [r.error for r in results if r.error]
    if failed:
        raise SystemExit(f"a request has failed: {failed[0]}")
    prompts, cached = (sum(getattr(r, name) for r in results) for name in ("prompt_tokens", "cached_tokens"))
    return {
        "clients": 32,
        "seconds": seconds,
        "prompt tokens": prompts,
        "of them computed": prompts - cached,
        "one prompt": prompts // 32,
    }


SCENARIOS: dict[str, Callable[[Load, argparse.Namespace], dict[str, Any]]] = {
    "clients": clients,
    "long-prompt": beside_a_long_prompt,
    "second-turn": second_turn,
    "one-beginning": one_beginning,
}


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_server_options(parser)
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--turns", type=number(int, 1), default=3, metavar="N", help="of each (default: 3)")
    parser.add_argument("--clients", type=number(int, 1), default=8, metavar="N", help="at once (default: 8)")
    parser.add_argument("--words", type=number(int, 1), default=128, metavar="N", help="of a prompt (default: 128)")
    parser.add_argument("--tokens", type=number(int, 1), default=64, metavar="N", help="of an answer (default: 64)")
    parser.add_argument(
        "--long", type=number(int, 1), default=4000, metavar="N", help="words of a long prompt (default: 4000)"
    )
    parser.add_argument(
        "--lead", type=number(float, 0), default=1.0, metavar="SECONDS", help="between requests there (default: 1)"
    )
    parser.add_argument("--seed", type=number(int, 0), default=1, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    load = Load(args.url, args.model, args.api_key, 16, 0, 4, args.seed)
    load.ask(10**9)
    found = {name: SCENARIOS[name](load, args) for name in args.only or SCENARIOS}
    for name, figures in found.items():
        print(table([name, ""], [[what, f"{value:.4g}"] for what, value in figures.items() if what != "readings"]))
    finish(found | {"options": vars(args)}, args.json)


if __name__ == "__main__":
    main()
