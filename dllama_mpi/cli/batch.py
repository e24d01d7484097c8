"""Answer a file of requests, many at once; after any end the same command goes on where it stood.

Requests are lines of JSON: OpenAI's batch format, or bodies alone ({"prompt": ...}, {"messages": ...}, {"input": ...}).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..log import say
from .options import add_model_options, add_sampling_options, add_speculation_option, load, number
from .serve import add_answer_options, leave_signals_to_root, serve_extra, served_of

if TYPE_CHECKING:
    from ..batch.answers import Answers
    from ..batch.lines import Line, Requests
    from ..batch.progress import Progress
    from ..batch.run import Batch

UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: told to end before the last line; the same command goes on


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
    return int(found[1]), int(found[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    group = parser.add_argument_group("batch")
    group.add_argument("--input", required=True, metavar="FILE", help="requests, one a line as JSON")
    group.add_argument(
        "--output", required=True, metavar="FILE",
        help="answers, appended as they come; those that it has already are not asked again",
    )  # fmt: skip
    group.add_argument(
        "--ordered", action="store_true", help="answers in the order of the requests (default: as they come)"
    )
    group.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N",
        help="every Nth line alone, from line I + 1 on, for one of N jobs, I from 0; each with an --output of its own",
    )  # fmt: skip
    group.add_argument(
        "--max-batch", type=number(int, 1), default=32, metavar="N", help="sequences that run at once (default: 32)"
    )
    group.add_argument("--log", metavar="FILE", help="also write the lines of progress there, with the time")
    group.add_argument(
        "--drain-timeout", type=number(float, 0), default=30, metavar="SECONDS",
        help="how long running answers may go on after SIGTERM or Ctrl-C (default: 30); the status is then"
        f" {UNFINISHED}, and the same command goes on",
    )  # fmt: skip
    add_answer_options(group)
    add_speculation_option(parser)
    add_model_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answer what has no answer yet; every rank takes part."""
    from ..parallel.group import connect

    group = connect(args.timeout)
    answers: Answers | None = None
    todo: list[Line] = []
    try:
        with group.together():
            if group.is_root:
                requests, answers, todo, progress = _open(args)
        if not group.broadcast(bool(todo)):
            if group.is_root:
                progress.end(Path(args.output))
            return 0
        llm = load(args, group, args.max_batch)
        with group.together():
            args.alias = ["*"]  # lines name the models of other services
            served = served_of(args, llm) if group.is_root else None
        leave_signals_to_root(group)
        batch: Batch | None = None
        with llm.session() as leads:
            if leads:
                from ..batch.run import Batch, BatchOptions

                assert answers is not None
                assert served is not None
                options = BatchOptions(2 * args.max_batch, args.ordered, args.drain_timeout)
                batch = Batch(requests, todo, answers, progress, options)
                batch.run(llm.engine, served)
                progress.end(Path(args.output))
        return int(group.broadcast(UNFINISHED if batch is not None and not batch.is_whole else 0))
    finally:
        if answers is not None:
            answers.close()


def _open(args: argparse.Namespace) -> tuple[Requests, Answers, list[Line], Progress]:
    """Return the requests, the answers that are there, the lines without one, and how far that is.

    Raises:
        UsageError: a file cannot be used, or the extra is not installed.
    """
    with serve_extra("batch"):
        from ..batch.run import unanswered
    from ..batch.answers import Answers
    from ..batch.lines import Requests
    from ..batch.progress import Progress

    source, destination = Path(args.input).expanduser(), Path(args.output).expanduser()
    if source.exists() and destination.exists() and source.samefile(destination):
        raise UsageError(f"--output {destination} is --input, too; give another file")
    requests = Requests(source, args.shard)
    answers = Answers(destination)
    try:
        todo = unanswered(requests, answers)
        total, done = len(requests.lines), len(requests.lines) - len(todo)
        log = None if args.log is None else Path(args.log).expanduser()
        progress = Progress(total, done, answers.errors, log)
    except BaseException:
        answers.close()
        raise
    if done and todo:
        say(f"{destination}: {done:,} of {total:,} are answered already")
    return requests, answers, todo, progress
