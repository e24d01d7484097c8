"""Measure decode and prefill by context length and by sequences at once, and types of the KV cache beside each other.

python benchmarks/sweep.py --random llama3.2-1b --depths 0,512,1024,2048,4096 --batches 1,2,4,8,16 --plot sweep.png
python benchmarks/sweep.py --random llama3.2-1b --kv-types f16,q80
mpiexec -n 2 python benchmarks/sweep.py --model DIR        # any number of ranks
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from report import COLOURS, add_output_options, figure, finish, save, say_table, whole_numbers

from dllama_mpi.cli.options import add_model_options, add_random_option, load, model_of
from dllama_mpi.errors import DllamaError
from dllama_mpi.parallel.group import connect
from dllama_mpi.parallel.launch import leave
from dllama_mpi.planning.bench import Bench, Test
from dllama_mpi.progress import progress


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_random_option(parser)
    parser.add_argument("--depths", type=whole_numbers, default=[0, 512, 1024, 2048, 4096], metavar="N,...")
    parser.add_argument("--batches", type=whole_numbers, default=[1, 2, 4, 8, 16], metavar="N,...")
    parser.add_argument("--batch-depth", type=int, default=128, metavar="N", help="context of the batches")
    parser.add_argument("--prompt", type=int, default=256, metavar="N", help="prompt tokens of a prefill")
    parser.add_argument("--generated", type=int, default=32, metavar="N", help="steps of a decode")
    parser.add_argument("--kv-types", metavar="TYPE,...", help="types of the KV cache to compare (default: --kv-type)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N")
    add_model_options(parser)
    add_output_options(parser)
    return parser.parse_args()


def plan(args: argparse.Namespace) -> dict[str, list[Test]]:
    """Return the tests of each line of the picture."""
    return {
        "decode by depth": [Test(0, args.generated, depth) for depth in args.depths],
        "prefill by depth": [Test(args.prompt, 0, depth) for depth in args.depths],
        "decode by batch": [Test(0, args.generated, args.batch_depth, batch) for batch in args.batches],
    }


def main() -> None:
    """Print tables and a line of JSON, and draw a picture if asked."""
    args = options()
    todo = plan(args)
    every = [test for tests in todo.values() for test in tests]
    args.max_seq_len = max(test.positions for test in every)
    try:
        group = connect()
        args.model = model_of(args)
        benches = []
        for kv_type in args.kv_types.split(",") if args.kv_types else [args.kv_type]:
            args.kv_type = kv_type
            benches.append(Bench(load(args, group, max(test.batch for test in every))))
        lines = measure(todo, benches, args.repetitions)
    except DllamaError as error:
        raise SystemExit(leave(error)) from None
    if not group.is_root:
        return
    for name, records in lines.items():
        show(name, records)
    if args.plot is not None:
        draw(lines, benches[0], args.plot)
    finish({"benchmark": "sweep", **benches[0].about(), "lines": lines}, args.json)


def measure(todo: dict[str, list[Test]], benches: list[Bench], repetitions: int) -> dict[str, list[dict[str, Any]]]:
    """Return the records of each line and type of the KV cache, on the root; the types take turns. Collective."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, tests in todo.items():
        for test in progress(tests, name, benches[0].llm.is_root):
            for bench in benches:
                result = bench.run(test, repetitions)
                if result is not None:
                    lines.setdefault(f"{name}, {bench.llm.kv_type}", []).append(bench.record(result))
    return lines


def show(name: str, records: list[dict[str, Any]]) -> None:
    """Print one line of the picture as a table."""
    print(f"\n{name}")
    rows = []
    for record in records:
        share = record["share_of_limit"]
        rows.append(
            [
                record["test"],
                f"{statistics.median(record['samples_ts']):.2f}",
                f"{record['stddev_ts']:.2f}",
                "-" if share is None else f"{record['weights_read_gb_per_s']:.1f}",
                "-" if share is None else f"{record['kv_read_gb_per_s']:.1f}",
                "-" if share is None else f"{record['read_limit_gb_per_s']:.1f}",
                "-" if share is None else f"{share:.0%}",
                f"{record['sync_share']:.1%}",
            ]
        )
    say_table(["test", "t/s (median)", "±", "weights GB/s", "KV GB/s", "limit GB/s", "of limit", "sync"], rows)


def draw(lines: dict[str, list[dict[str, Any]]], bench: Bench, path: str) -> None:
    """Draw tokens a second, and for decode what the memory would allow; types of the KV cache in one panel."""
    import numpy as np

    names = list(dict.fromkeys(line.rsplit(", ", 1)[0] for line in lines))
    drawn, _ = figure(13, 4.5)
    drawn.clear()
    for axes, name in zip(np.atleast_1d(drawn.subplots(1, len(names))), names, strict=True):
        chosen = {line: records for line, records in lines.items() if line.startswith(name)}
        key = "n_batch" if name.endswith("batch") else "n_depth"
        for (line, records), colour in zip(chosen.items(), COLOURS, strict=False):
            x, kind = [record[key] for record in records], line.rsplit(", ", 1)[1]
            axes.plot(x, [statistics.median(r["samples_ts"]) for r in records], "o-", color=colour, label=kind)
            if name.startswith("decode"):
                limits = [1e9 * r["n_batch"] / r["median_step_ns"] / r["share_of_limit"] for r in records]
                axes.plot(x, limits, "--", color=colour, alpha=0.5, label=f"{kind}, limit of the memory")
        axes.set(title=name, ylabel="tokens/s", ylim=(0, None))
        axes.set_xlabel("sequences at once" if key == "n_batch" else "tokens in the KV cache")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    about = bench.about()
    drawn.suptitle(f"{about['model_filename']}, {about['weights']}, {about['n_ranks']} x {about['n_threads']} threads")
    save(drawn, path)


if __name__ == "__main__":
    main()
