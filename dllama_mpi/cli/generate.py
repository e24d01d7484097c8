"""Continue a prompt (the default command)."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..log import say
from .interrupt import on_interrupt
from .options import (
    add_model_options,
    add_sampling_options,
    add_speculation_option,
    load,
    read_text,
    sampling,
)

if TYPE_CHECKING:
    from ..engine.completion import Generation
    from ..engine.llm import LLM

DEFAULT_STEPS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prompt", metavar="TEXT", help="text to continue")
    group.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue; - for standard input")
    parser.add_argument(
        "--stats", action="store_true", help="show times and bytes for the prompt and each token on stderr"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    add_speculation_option(parser)
    add_model_options(parser)
    add_sampling_options(parser)


def _prompt(args: argparse.Namespace) -> str:
    text: str | None = args.prompt
    if args.prompt_file is not None:
        text = read_text(args.prompt_file, "--prompt-file")
    if not text:
        raise UsageError("no prompt: give --prompt TEXT or --prompt-file FILE")
    return text


def run(args: argparse.Namespace) -> int:
    """Generate; stream the text to stdout, or print one JSON object."""
    from ..parallel.group import connect

    group = connect(args.timeout)
    from ..engine.stats import Stats

    with group.together():
        prompt = _prompt(args) if group.is_root else ""  # rank 0 alone reads files and the terminal
    llm = load(args, group)
    with group.together():
        params = sampling(args, llm.folder, DEFAULT_STEPS) if group.is_root else None
    stats, interrupted = Stats(), False

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        llm.cancel()

    with on_interrupt(stop):
        if args.json:
            result = llm.generate(prompt, params, measure_links=args.stats)
            if result is not None:
                stats = result.stats
                print(json.dumps(_report(args, llm, result), ensure_ascii=False))
        else:
            for piece in llm.stream(prompt, params, stats, measure_links=args.stats):
                print(piece, end="", flush=True)
            if llm.is_root:
                print(flush=True)
    if llm.is_root and args.stats:
        for line in [*stats.step_lines(), *stats.summary_lines()]:
            say(line)
    return 130 if interrupted else 0


def _report(args: argparse.Namespace, llm: LLM, result: Generation) -> dict[str, Any]:
    return {
        "model": args.model,
        "ranks": llm.group.size,
        "nthreads": llm.threads,
        "weights": llm.weights,
        "buffer_float_type": args.buffer_float_type,
        "speculate": args.speculate,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "stats": result.stats.to_dict(),
    }
