"""Predict memory and speed at 1..n ranks, from this cluster as measured or from one described in a file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..log import say, warn
from ..progress import progress
from .options import add_model_options, add_random_option, model_of, number, table

if TYPE_CHECKING:
    from ..planning.plan import Question

PROMPT, GENERATED = 512, 128
_TOLD = 4  # disturbances


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--hosts",
        metavar="FILE",
        help="a cluster described in TOML, instead of the one that this job runs on; needs no MPI",
    )
    group.add_argument("-o", "--output", choices=("text", "json"), default="text", help="(default: text)")
    lengths: tuple[tuple[tuple[str, ...], int, int, str], ...] = (
        (("-p", "--n-prompt"), 1, PROMPT, "prompt tokens that speed is predicted for"),
        (("-n", "--n-gen"), 1, GENERATED, "generated tokens that speed is predicted for"),
        (("-d", "--depth"), 0, 0, "tokens in the KV cache before them"),
    )
    for names, low, default, text in lengths:
        group.add_argument(
            *names, type=number(int, low), default=default, metavar="N", help=f"{text} (default: {default})"
        )
    add_model_options(parser)
    add_random_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan on stdout."""
    from ..parallel.launch import is_root_process

    if args.hosts is None:
        return _measured(args)
    if is_root_process():
        from ..planning.cluster_file import read_cluster
        from ..planning.plan import plan

        cluster, question = read_cluster(args.hosts), _question(args)
        _print(args, {**_about(args, question), "source": args.hosts, **plan(question, cluster)})
    return 0


def _measured(args: argparse.Namespace) -> int:
    from ..parallel.group import connect

    group = connect(args.timeout)
    from ..kernels import runtime
    from ..parallel.partition import AUTO, parse_split
    from ..parallel.stream import together_at_rest
    from ..planning.plan import plan
    from ..planning.sample import Job
    from ..planning.survey import survey
    from ..startup.shares import shards_of
    from ..startup.threads import place_threads

    args = group.broadcast(args)
    cores = group.allgather((group.host, runtime.usable_cores()))
    with together_at_rest(group):  # a file may have to be downloaded
        question = _question(args) if group.is_root else None
        parse_split(None if args.split == AUTO else args.split, group.size)
        threads = place_threads(group, cores, args.nthreads, args.bind)
    question = group.broadcast(question)
    with group.together():
        shards_of(question.config, [1.0] * group.size)  # there may be too many ranks
    if group.is_root and runtime.is_cold():
        say(f"compiling kernels for {runtime.describe()}; this takes about 20 seconds and is done once")
    job = Job(question.config, question.kept, args.sync, threads, question.chunk)
    cluster = survey(group, job, lambda stages: progress(stages, "measuring", group.is_root))
    if group.is_root:
        _print(args, {**_about(args, question), "source": "measured", **plan(question, cluster)})
    return 0


def _question(args: argparse.Namespace) -> Question:
    from ..planning.plan import Question
    from ..startup.finding import find_alone
    from ..startup.opening import open_shape
    from ..startup.options import Kept, check_payload

    files = open_shape(str(find_alone(model_of(args), shape_alone=True)))
    check_payload(args.buffer_float_type, files.config)
    return Question(
        config=files.config,
        kept=Kept.of(files.formats(args.weights), args.kv_type, args.buffer_float_type, args.sync),
        chunk=args.prefill_chunk,
        max_seq_len=args.max_seq_len,
        split=args.split,
        prompt=args.n_prompt,
        generated=args.n_gen,
        depth=args.depth,
    )


def _about(args: argparse.Namespace, question: Question) -> dict[str, Any]:
    from ..model.recipe import bits_per_weight, bytes_per_token, parameters
    from ..startup.shares import shards_of

    config, kept = question.config, question.kept
    (whole,) = shards_of(config, [1.0])
    return {
        "model": model_of(args),
        "n_params": parameters(config),
        "weights": kept.weights(config),
        "bits_per_weight": bits_per_weight(config, kept.formats),
        "bytes_per_token": bytes_per_token(config, whole, kept.formats),
        "kv_type": kept.kv_type,
        "buffer_float_type": kept.payload,
        "prefill_chunk": question.chunk,
        "split": question.split,
        "n_prompt": question.prompt,
        "n_gen": question.generated,
        "n_depth": question.depth,
    }


def _print(args: argparse.Namespace, report: dict[str, Any]) -> None:
    if report["disturbances"]:
        first, more = report["disturbances"][:_TOLD], len(report["disturbances"]) - _TOLD
        why = "; ".join([*first, *([f"and {more} more, see -o json"] if more > 0 else [])])
        warn(f"the machine was busy while this was measured, so that speeds may be far off: {why}; try when it is idle")
    print(json.dumps(report, indent=2) if args.output == "json" else _text(report), flush=True)


# ---- how a plan is printed for people


def _text(report: dict[str, Any]) -> str:
    parts = [
        f"{report['model']}, {report['n_params'] / 1e9:.2f} B weights in {report['weights']}, KV cache in"
        f" {report['kv_type']}, messages in {report['buffer_float_type']}; cluster: {report['source']}",
        _hosts(report),
        *([_links(report)] if report["links"] else []),
        _ranks(report),
        _phase(report, "decode", f"decode, {report['n_gen']} tokens (ms a token)"),
        _phase(report, "prefill", f"prefill of {report['n_prompt']} tokens (ms in all)"),
        _conclusions(report),
    ]
    return "\n\n".join(parts)


def _hosts(report: dict[str, Any]) -> str:
    head = ["host", "ranks", "cores", "instruction set", "free GB", "reads GB/s"]
    rows = [
        [
            host["name"],
            str(host["ranks"]),
            str(host["cores"]),
            host["instruction_set"] or "-",
            _number(host["free_bytes"], 1e9, 2),
            _number(host["read_gb_per_s"]),
        ]
        for host in report["hosts"]
    ]
    return table(head, rows)


def _links(report: dict[str, Any]) -> str:
    rows = [
        [" - ".join(link["hosts"]), _number(link["latency_us"]), _number(link["mbit_per_s"], 1, 0)]
        for link in report["links"]
    ]
    return table(["link", "latency us", "Mbit/s"], rows)


def _ranks(report: dict[str, Any]) -> str:
    last = report["counts"][-1]
    head = ["rank", "host", "threads", "share", "decode GB/s", "prefill GMAC/s", "layer us", "needs GB"]
    rows = [
        [
            str(rank["rank"]),
            rank["host"],
            str(rank["threads"]),
            f"{share:.0%}",
            _number(rank["decode_gb_per_s"]),
            _number(rank["prefill_gmac_per_s"]),
            _number(rank["layer_us"]),
            _number(memory["total_bytes"], 1e9, 2),
        ]
        for rank, share, memory in zip(report["ranks"], last["shares"], last["memory"], strict=False)
    ]
    return table(head, rows)


def _phase(report: dict[str, Any], phase: str, title: str) -> str:
    head = ["ranks", "GB a rank", "max-seq-len", "tokens/s", "ms", "weights", "attention", "synchronisation", "other"]
    rows = []
    for count in report["counts"]:
        cost = count[phase]
        keys = ("tokens_per_second", "ms", "weights_ms", "attention_ms", "synchronisation_ms", "overhead_ms")
        figures = ["-"] * len(keys) if cost is None else [_number(cost[key], 1, 2) for key in keys]
        largest = max(memory["total_bytes"] for memory in count["memory"])
        length = str(count["max_seq_len"] or "does not fit")
        rows.append([str(count["ranks"]), _number(largest, 1e9, 2), length, *figures])
    return f"{title}:\n{table(head, rows)}"


def _conclusions(report: dict[str, Any]) -> str:
    best = report["best_ranks"]
    lines = [
        f"best for {phase}: {best[phase]} rank{'s' * (best[phase] > 1)}" for phase in best if best[phase] is not None
    ]
    if not lines:
        lines = ["it fits at no number of ranks" if any(c["problem"] for c in report["counts"]) else "no best"]
    return "\n".join([*lines, *report["advice"]])


def _number(value: float | None, unit: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
