"""Continue a prompt (the default command)."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .interrupt import on_interrupt
from .options import (
    add_model_options,
    add_sampling_options,
    add_speculation_option,
    add_stats_option,
    load,
    read_text,
    sampling,
)
from .screen import Screen, find_streams

if TYPE_CHECKING:
    from ..engine.completion import Generation
    from ..engine.llm import LLM
    from ..engine.stats import Stats

DEFAULT_STEPS = 256
_SHOWN = 2000  # characters of a prompt
_NEXT = "this was the small demo model; `python -m dllama_mpi download` lists real ones, which --model takes by name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prompt", metavar="TEXT", help="text to continue")
    group.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue; - for standard input")
    add_stats_option(parser)
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
    """Generate; stream the text to stdout, or print one JSON object. A terminal shows the prompt and the speed, too."""
    from ..parallel.group import connect

    group = connect(args.timeout)
    from ..engine.stats import Stats

    with group.together():
        prompt = _prompt(args) if group.is_root else ""  # rank 0 alone reads files and the terminal
    llm = load(args, group)
    with group.together():
        params = sampling(args, llm.folder, DEFAULT_STEPS) if group.is_root else None
    stats, interrupted = Stats(), False
    measure = args.stats is not None

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        llm.cancel()

    with Screen(find_streams() if llm.is_root else None) as screen, on_interrupt(stop):
        if args.json:
            result = llm.generate(prompt, params, measure_links=measure)
            if result is not None:
                stats = result.stats
                print(json.dumps(_report(args, llm, result), ensure_ascii=False), flush=True)
        else:
            if screen.shows_text:
                screen.draw(screen.bold(prompt if len(prompt) <= _SHOWN else f"...{prompt[-_SHOWN:]}"))
            for piece in llm.stream(prompt, params, stats, measure_links=measure):
                screen.write_text(piece)
            if llm.is_root:
                screen.write_text("\n")
        if llm.is_root:
            for line in _closing(args, stats, screen):
                screen.say(line)
    return 130 if interrupted else 0


def _closing(args: argparse.Namespace, stats: Stats, screen: Screen) -> list[str]:
    """Return the lines after the text."""
    if args.stats is not None:
        return [*(stats.step_lines() if args.stats == "steps" else []), *stats.summary_lines()]
    if args.json or not (screen.shows_text or screen.shows_lines):
        return []
    lines = [stats.speed_line()]
    if args.model == "demo" and screen.shows_text:
        lines.append(_NEXT)
    return lines


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
