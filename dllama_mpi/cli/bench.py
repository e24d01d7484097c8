"""Measure speed: tokens a second of prompts and of generation, and how near they come to the memory's limit."""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import UsageError
from ..log import say
from ..progress import Progress, progress
from .options import add_model_options, add_random_option, load, model_of, number, numbers

PROMPT, GENERATED = 512, 128


def _pair(text: str) -> tuple[int, int]:
    values = numbers(1)(text)
    if len(values) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, such as 512,128")
    return values[0], values[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    group = parser.add_argument_group("tests", "N may be several numbers, 128,512: then each is measured")
    lists: list[tuple[tuple[str, ...], int, str]] = [
        (("-p", "--n-prompt"), 0, f"prompt tokens, 0 for no such test (default: {PROMPT})"),
        (("-n", "--n-gen"), 0, f"tokens generated, 0 for no such test (default: {GENERATED})"),
        (("-b", "--batch"), 1, "sequences at once (default: 1)"),
        (("-d", "--depth"), 0, "tokens in the KV cache before the measuring begins (default: 0)"),
    ]
    for names, low, text in lists:
        group.add_argument(*names, type=numbers(low), action="extend", metavar="N", help=text)
    group.add_argument(
        "-pg", type=_pair, action="append", default=[], metavar="P,N", help="a prompt and generation after it"
    )
    group.add_argument(
        "-r", "--repetitions", type=number(int, 1), default=5, metavar="N", help="of each test (default: 5)"
    )
    group.add_argument(
        "-o", "--output", choices=tuple(_FORMATS), default="md", help="a Markdown table, CSV or JSON (default: md)"
    )
    group.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of the token ids (default: 0)")
    add_model_options(parser)
    add_random_option(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the result on stdout."""
    from ..parallel.group import connect

    group = connect(args.timeout)
    from ..planning.bench import Bench, combine

    args = group.broadcast(args)
    with group.together():
        lengths = (args.n_prompt or [PROMPT], args.n_gen or [GENERATED], args.pg)
        todo = combine(*lengths, args.depth or [0], args.batch or [1])
        args.model = model_of(args)
        needed = max(test.positions for test in todo)
        if args.max_seq_len is None:
            args.max_seq_len = needed
        if args.max_seq_len < needed:
            raise UsageError(f"--max-seq-len {args.max_seq_len}: the tests need {needed} positions; give that or none")
    llm = load(args, group, max(test.batch for test in todo))
    bench, started, records = Bench(llm, args.seed), time.perf_counter(), []
    with Progress("bench", len(todo), "tests", show=llm.is_root) as shown:
        for test in todo:
            result = bench.run(test, args.repetitions, partial(progress, what=test.name, show=llm.is_root))
            shown.add(1)
            if result is not None:
                records.append(bench.record(result))
    if records:
        print(_FORMATS[args.output](records), flush=True)
        what = f"{_some(len(todo), 'test')} of {_some(args.repetitions, 'repetition')}"
        say(f"bench: {what} on {_some(group.size, 'rank')}, {time.perf_counter() - started:.1f} s")
    return 0


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


# ---- how results are printed


def _markdown(records: list[dict[str, Any]]) -> str:
    head = ["model", "size", "params", "ranks", "threads", "isa", "weights", "buffer", "test"]
    head += ["t/s", "GB/s", "limit", "of limit", "sync"]
    if any(record["joules"] is not None for record in records):
        head.append("J/t")
    rows = [_cells(record)[: len(head)] for record in records]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    left = [name in ("model", "isa", "weights", "buffer") for name in head]
    rule = [("-" * (w + 1) if is_left else "-" * w + ":") for w, is_left in zip(widths, left, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True)]
        return f"| {' | '.join(padded)} |"

    return "\n".join([*_about_memory(records), line(head), f"| {'| '.join(rule)}|", *map(line, rows)])


def _about_memory(records: list[dict[str, Any]]) -> list[str]:
    """Return a paragraph on the memory's rate, or nothing if no test needed it."""
    measured = [record for record in records if record["read_limit_gb_per_s"] is not None]
    if not measured:
        return []
    limits = [record["read_limit_gb_per_s"] for record in measured]
    best = max(record["best_reading_gb_per_s"] for record in measured)
    span = f"{min(limits):.1f}" + f" to {max(limits):.1f}" * (len(limits) > 1)
    return [
        f"Memory reads {span} GB/s, at best {best:.1f} (all ranks' threads together). GB/s, of weights and KV cache,"
        " and limit are medians, measured in turns.",
        "",
    ]


def _cells(record: dict[str, Any]) -> list[str]:
    rates = [record[key] for key in ("median_read_gb_per_s", "read_limit_gb_per_s")]
    share = record["share_of_limit"]
    return [
        record["model_type"] if record["model_filename"] == "demo" else record["model_filename"],
        _scaled(record["model_size"], "GB", "MB"),
        _scaled(record["model_n_params"], "B", "M"),
        str(record["n_ranks"]),
        str(record["n_threads"]),
        record["instruction_set"],
        record["weights"],
        record["buffer_float_type"],
        record["test"],
        f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}",
        *("-" if rate is None else f"{rate:.1f}" for rate in rates),
        "-" if share is None else f"{share:.0%}",
        f"{record['sync_share']:.1%}",
        "-" if record["joules_per_token"] is None else f"{record['joules_per_token']:.3g}",
    ]


def _scaled(value: int, large: str, small: str) -> str:
    return f"{value / 1e9:.2f} {large}" if value >= 1e9 else f"{value / 1e6:.2f} {small}"


def _csv(records: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in records)
    return out.getvalue().rstrip("\n")


def _json(records: list[dict[str, Any]]) -> str:
    return json.dumps(records, indent=2)


_FORMATS: dict[str, Callable[[list[dict[str, Any]]], str]] = {"md": _markdown, "csv": _csv, "json": _json}
