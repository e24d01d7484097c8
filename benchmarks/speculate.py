"""Measure decode with and without prompt-lookup speculation, in turns, on a text that repeats its prompt and on others.

python benchmarks/speculate.py
mpiexec -n 2 python benchmarks/speculate.py --buffer-float-type q80      # any number of ranks
mpiexec -n 2 python benchmarks/speculate.py --model DIR --prompt-file notes.txt
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from report import add_output_options, finish, say_table

from dllama_mpi.cli.options import add_model_options, load, number, read_text
from dllama_mpi.engine.engine import Engine
from dllama_mpi.engine.llm import LLM
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.engine.stats import Stats
from dllama_mpi.errors import DllamaError
from dllama_mpi.parallel.group import connect
from dllama_mpi.parallel.launch import leave

REPEATS = "   If the string is not found, the string is returned.\n\n" * 6  # which the demo model then goes on to say
HELDOUT = Path(__file__).resolve().parent.parent / "dllama_mpi/demo/heldout.txt"


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-file", metavar="FILE", help="measure this prompt alone (default: two of its own)")
    parser.add_argument("--steps", type=number(int, 2), default=256, metavar="N", help="tokens generated")
    parser.add_argument("-r", "--repetitions", type=number(int, 1), default=5, metavar="N")
    add_model_options(parser)
    add_output_options(parser)
    parser.set_defaults(speculate="lookup")
    return parser.parse_args()


def prompts(args: argparse.Namespace) -> dict[str, str]:
    """Return the texts to continue, by name."""
    if args.prompt_file is not None:
        return {args.prompt_file: read_text(args.prompt_file, "--prompt-file")}
    return {"repeats its prompt": REPEATS, "does not": HELDOUT.read_text(encoding="utf-8")[:800]}


def generate(llm: LLM, prompt: str, params: SamplingParams, speculate: bool) -> tuple[list[int], dict[str, Any]]:
    """Return the tokens of one generation, and its figures."""
    engine = llm.engine
    if not speculate:
        engine = Engine(engine.runner, llm.group, engine.context, engine.scheduler.limits)
    stats, (request, _), tokens = Stats(), llm.request(prompt, params), list[int]()
    engine.scheduler.forget()
    before = llm.group.traffic.sent
    engine.add(request)
    while not engine.is_idle:
        tokens += (token for output in engine.step() for token in output.token_ids)
        if engine.last_step is not None:
            stats.take(engine.last_step)
    decode = stats.to_dict()["decode"]
    drafts = stats.speculation()
    return tokens, {
        "tokens_per_second": decode["tokens_per_second"],
        "tokens_per_step": decode["tokens"] / decode["steps"],
        "acceptance_rate": drafts["acceptance_rate"],
        "sync_share": decode["sync_ms"] / (decode["sync_ms"] + decode["compute_ms"]),
        "sent_kb_per_token": (llm.group.traffic.sent - before) / 1e3 / len(tokens),
    }


def measure(llm: LLM, prompt: str, params: SamplingParams, repetitions: int) -> dict[str, Any]:
    """Return the median run of each kind, and what speculation gains by the medians; the kinds take turns."""
    runs: dict[str, list[dict[str, Any]]] = {"off": [], "lookup": []}
    texts = []
    for turn in range(repetitions + 1):
        for kind, found in runs.items():
            tokens, figures = generate(llm, prompt, params, kind == "lookup")
            texts.append(tokens)
            if turn:  # the first warms up
                found.append(figures)
    middle = {}
    for kind, found in runs.items():
        found.sort(key=lambda figures: figures["tokens_per_second"])
        samples = [figures["tokens_per_second"] for figures in found]
        middle[kind] = {**found[len(found) // 2], "samples_tokens_per_second": samples}
    speeds = {kind: statistics.median(one["samples_tokens_per_second"]) for kind, one in middle.items()}
    same = all(tokens == texts[0] for tokens in texts)
    return {**middle, "speedup": speeds["lookup"] / speeds["off"], "same_text": same}


def main() -> None:
    """Print a table and a line of JSON."""
    args = options()
    try:
        llm = load(args, connect())
    except DllamaError as error:
        raise SystemExit(leave(error)) from None
    found: dict[str, dict[str, Any]] = {}
    params = SamplingParams(temperature=0, max_tokens=args.steps, ignore_eos=True)
    with llm.session() as leads:
        if leads:
            found = {name: measure(llm, text, params, args.repetitions) for name, text in prompts(args).items()}
    if not found:
        return
    rows = []
    for name, result in found.items():
        for kind in ("off", "lookup"):
            figures = result[kind]
            rate = figures["acceptance_rate"]
            rows.append(
                [
                    f"{name}, {kind}",
                    f"{figures['tokens_per_second']:.1f}",
                    f"{figures['tokens_per_step']:.2f}",
                    "-" if rate is None else f"{rate:.0%}",
                    f"{figures['sync_share']:.0%}",
                    f"{figures['sent_kb_per_token']:.2f}",
                    "-" if kind == "off" else f"{result['speedup']:.2f}",
                ]
            )
    say_table(["greedy text", "tokens/s", "tokens/step", "accepted", "sync", "kB sent/token", "x"], rows)
    about = {"model": args.model, "ranks": llm.group.size, "buffer_float_type": args.buffer_float_type}
    finish({"benchmark": "speculate", **about, "threads": llm.threads, "texts": found}, args.json)


if __name__ == "__main__":
    main()
