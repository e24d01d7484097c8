"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..model.shapes import SHAPES
from ..parallel.collective.table import PAYLOADS, SYNCS
from ..parallel.watchdog import TIMEOUT
from ..progress import MODES

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.request import SamplingParams
    from ..parallel.group import TensorParallelGroup

KV_TYPES = ("f16", "f32", "q80")
_LONGEST_TEXT = 100_000_000  # characters


def number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], Any]:
    """Return an argparse type for an int or float from `low` (or above it) to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'}"
            ) from None
        if not (low < value if above else low <= value) or not value <= high or value == float("inf"):
            limit = f"{'above' if above else 'at least'} {low:g}" + (
                "" if high == float("inf") else f", at most {high:g}"
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limit}")
        return value

    return parse


def numbers(low: int) -> Callable[[str], list[int]]:
    """Return an argparse type for whole numbers separated by commas, each at least `low`."""
    one = number(int, low)
    return lambda text: [one(part) for part in text.split(",")]


def add_weights_option(group: argparse._ActionsContainer) -> None:
    """Add in which formats matrices are kept or written."""
    group.add_argument(
        "--weights",
        metavar="RECIPE",
        help="format of the weights: q4m, q40, iq4nl, mxfp4, q80, f16 or f32, then rules for some of them, such as"
        " q40,lm_head=q80 (default: what a quantised or converted model holds, else q4m)",
    )


def add_kv_type_option(group: argparse._ActionsContainer) -> None:
    """Add the type of the KV cache."""
    group.add_argument("--kv-type", choices=KV_TYPES, help="type of the KV cache (default: f16; f32 with f32 weights)")


def add_random_option(parser: argparse.ArgumentParser) -> None:
    """Add random weights in place of a model's."""
    parser.add_argument(
        "--random",
        metavar="SHAPE",
        help="instead of --model: random weights of a known shape, or of its first N layers as SHAPE:N; known are"
        f" {', '.join(SHAPES)}",
    )


def model_of(args: argparse.Namespace) -> str:
    """Return the model that --model or --random names.

    Raises:
        UsageError: both do.
    """
    if args.random is None:
        return str(args.model)
    if args.model != "demo":
        raise UsageError(f"--random {args.random} and --model {args.model}: give one of them")
    return f"random:{args.random}"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what `LLM` takes."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        default="demo",
        help="model directory as Hugging Face lays it out, or as convert writes it; a .gguf file, or a .m file of"
        " Distributed Llama; ORG/NAME or ORG/NAME:QUANTISATION"
        " of the hub, or a name that download lists: downloaded once; 'demo' (the default) is the small model that"
        " comes with the program",
    )
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a tokenizer.json, a .t file of Distributed Llama, or a folder with one"
        " (default: the model's; of a .m file the one beside it)",
    )
    add_weights_option(group)
    group.add_argument(
        "--max-seq-len",
        type=number(int, 1),
        metavar="N",
        help="positions of the context (default: the model's, or what fits in memory)",
    )
    add_kv_type_option(group)
    group.add_argument(
        "--kv-memory",
        type=number(float, 0, above=True),
        metavar="GB",
        help="memory of each rank's KV cache, which all sequences share (default: what so many sequences of"
        " --max-seq-len can need, or what is free)",
    )
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--buffer-float-type",
        choices=tuple(PAYLOADS),
        help="what activations are sent as between hosts (default: q80; q40 reads prompts faster over a slow network;"
        " ranks of one host share f32 in memory)",
    )
    group.add_argument(
        "--sync",
        choices=SYNCS,
        default="auto",
        help="how activations are summed over ranks (default: auto, the fastest by measurement at the start)",
    )
    group.add_argument(
        "--nthreads",
        type=number(int, 1),
        metavar="N",
        help="threads a rank (default: the cores it may use, divided by the ranks that share them)",
    )
    group.add_argument("--bind", action="store_true", help="keep each rank and thread on cores of its own")
    group.add_argument(
        "--split",
        metavar="A,B,...",
        help="the ranks' shares of the model, for unlike machines: 3,1,1,"
        " or auto: by measured speed and free memory (default: equal)",
    )
    add_cache_option(group)
    group.add_argument(
        "--cache-limit",
        type=number(float, 0, above=True),
        metavar="GB",
        help="the most to keep there (default: 20, or half of what the disk has free)",
    )
    group.add_argument(
        "--timeout",
        type=number(float, 0),
        default=TIMEOUT,
        metavar="SECONDS",
        help="end the job when a rank has been silent for this long: stopped, or cut off; a rank that died is"
        f" noticed at once (default: {TIMEOUT:g}; 0: wait for ever)",
    )
    add_progress_option(group)
    group.add_argument(
        "--prefill-chunk", type=number(int, 1), default=256, metavar="N", help="prompt tokens a step (default: 256)"
    )


def add_progress_option(parser: argparse._ActionsContainer) -> None:
    """Add how long work shows how far it is."""
    parser.add_argument(
        "--progress",
        choices=MODES,
        help="how far long work is, on stderr: a bar, lines every few seconds, off, or auto: a bar where stderr, or"
        " mpiexec's, is a terminal, else lines (default: what DLLAMA_MPI_PROGRESS says, else auto)",
    )


def add_speculation_option(parser: argparse.ArgumentParser) -> None:
    """Add what commands that generate text take besides."""
    parser.add_argument(
        "--speculate",
        choices=("off", "lookup"),
        default="off",
        help="lookup: draft what followed the last tokens when they occurred before, and check several tokens in one"
        " step; the same text in fewer steps where it repeats the prompt or itself (default: off)",
    )


def add_stats_option(parser: argparse.ArgumentParser) -> None:
    """Add whether figures of what was generated are shown."""
    parser.add_argument(
        "--stats",
        nargs="?",
        choices=("summary", "steps"),
        const="summary",
        help="show speeds, times and a table of ranks on stderr afterwards; --stats=steps: times and bytes of the"
        " prompt and of each token besides",
    )


def add_cache_option(parser: argparse._ActionsContainer) -> None:
    """Add where received weights are kept."""
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where each host keeps weights that it received from rank 0, or none for memory alone"
        " (default: ~/.cache/dllama_mpi/weights)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add what `SamplingParams` takes."""
    group = parser.add_argument_group("sampling", "defaults: the model's generation_config.json, else those given here")
    group.add_argument("--steps", type=number(int, 0), metavar="N", help="most tokens to generate")
    group.add_argument("--temperature", type=number(float, 0, 100), metavar="T", help="0 for greedy (default: 0.8)")
    group.add_argument(
        "--topp",
        type=number(float, 0, 1, above=True),
        metavar="P",
        help="sample from the best tokens that together reach this probability (default: 0.9)",
    )
    group.add_argument(
        "--topk", type=number(int, 0), metavar="K", help="sample from this many best tokens (default: 0, all)"
    )
    group.add_argument(
        "--minp",
        type=number(float, 0, 1),
        metavar="P",
        help="leave out tokens less than this share as probable as the best (default: 0)",
    )
    group.add_argument(
        "--repeat-penalty",
        type=number(float, 0, 100, above=True),
        default=1.0,
        metavar="X",
        help="divide the logits of tokens that occurred by this (default: 1, none)",
    )
    group.add_argument(
        "--presence-penalty",
        type=number(float, -100, 100),
        default=0.0,
        metavar="X",
        help="subtract this from the logits of generated tokens (default: 0)",
    )
    group.add_argument(
        "--frequency-penalty",
        type=number(float, -100, 100),
        default=0.0,
        metavar="X",
        help="subtract this for each time a token was generated (default: 0)",
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument(
        "--seed", type=number(int, 0), metavar="N", help="of the random numbers (default: differs each time)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's stop tokens")


def load(args: argparse.Namespace, group: TensorParallelGroup, max_batch: int = 1, **more: Any) -> LLM:
    """Build the model that the options describe; `more` are fields of `Options` that not every command has."""
    from ..engine.llm import LLM

    names = "tokenizer weights max_seq_len kv_type buffer_float_type sync nthreads split prefill_chunk bind timeout"
    names += " cache_dir cache_limit kv_memory progress"
    options = {name: getattr(args, name) for name in names.split()}
    options["speculate"] = getattr(args, "speculate", None)  # not every command generates text
    return LLM(args.model, group=group, quiet=False, max_batch=max_batch, **options, **more)


def sampling(args: argparse.Namespace, folder: Path, steps: int | None) -> SamplingParams:
    """Return the sampling parameters: the options', else the model's own, else the program's; steps as default."""
    from ..engine.request import SamplingParams

    own: dict[str, Any] = {}
    try:
        own = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # without one, or with a broken one, the defaults hold
        own = {}
    if own.get("do_sample") is False and "temperature" not in own:
        own["temperature"] = 0.0

    def first(given: Any, key: str, default: Any) -> Any:
        return given if given is not None else own.get(key) if own.get(key) is not None else default

    return SamplingParams(
        temperature=float(first(args.temperature, "temperature", 0.8)),
        top_k=int(first(args.topk, "top_k", 0)),
        top_p=float(first(args.topp, "top_p", 0.9)),
        min_p=float(first(args.minp, "min_p", 0.0)),
        repeat_penalty=args.repeat_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        max_tokens=args.steps if args.steps is not None else steps,
        stop=tuple(args.stop),
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )


def read_text(path: str, option: str) -> str:
    """Return a file's text, or standard input's for "-".

    Raises:
        UsageError: it cannot be read, is not UTF-8, or is longer than any context could be.
    """
    try:
        if path == "-":
            found = sys.stdin.read(_LONGEST_TEXT + 1)
        else:
            with open(path, encoding="utf-8") as file:
                found = file.read(_LONGEST_TEXT + 1)
        if len(found) > _LONGEST_TEXT:
            raise UsageError(
                f"{option} {path}: more than {_LONGEST_TEXT // 10**6} million characters; give a part of it"
            )
        return found
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a text table, its columns as wide as need be: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])
