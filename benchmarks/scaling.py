"""Speed by number of ranks, measured and predicted, and what a token costs in bytes and synchronisation.

python benchmarks/scaling.py --ranks 1,2,4 --random llama3.2-1b --plot scaling.png
python benchmarks/scaling.py --launcher "mpiexec -f hosts" --ranks 1,2,4 --model DIR

`bench` is run at each number of ranks, `plan` once at the largest, each as a job of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import COLOURS, add_output_options, figure, finish, least_kb, save, say_table, whole_numbers


def options() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here goes to `bench` and `plan`."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other options, such as --random SHAPE, go to bench and plan."
    )
    parser.add_argument("--launcher", metavar="COMMAND", help="before -n N (default: the mpiexec of this environment)")
    parser.add_argument("--ranks", type=whole_numbers, default=[1, 2], metavar="N,...", help="(default: 1,2)")
    parser.add_argument("-p", "--n-prompt", default="512", metavar="N")
    parser.add_argument("-n", "--n-gen", default="64", metavar="N")
    parser.add_argument("-r", "--repetitions", default="5", metavar="N")
    add_output_options(parser)
    return parser.parse_known_args()


def job(launcher: list[str], ranks: int, command: list[str]) -> Any:
    """Run a command of the program on so many ranks; return what it printed as JSON."""
    line = [*launcher, "-n", str(ranks), sys.executable, "-m", "dllama_mpi", *command, "-o", "json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {shlex.join(line)} ended with status {done.returncode}")
    return json.loads(done.stdout)


def draw(records: list[dict[str, Any]], path: str) -> None:
    """Draw decode and prefill by ranks, beside what was predicted and what one rank would give times their number."""
    drawn, axes = figure()
    ranks = [r["ranks"] for r in records]
    for i, phase in enumerate(("decode", "prefill")):
        colour, first = COLOURS[i], records[0][f"{phase}_tokens_per_second"] / ranks[0]
        axes.plot(ranks, [r[f"{phase}_tokens_per_second"] for r in records], "o-", color=colour, label=phase)
        predicted = [r[f"predicted_{phase}"] for r in records]
        axes.plot(ranks, predicted, "x--", color=colour, label=f"{phase}, predicted")
        axes.plot(ranks, [first * n for n in ranks], ":", color=colour, alpha=0.5)
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="tokens/s", xticks=ranks, xticklabels=map(str, ranks))
    axes.grid(alpha=0.25)
    axes.legend()
    save(drawn, path)


def main() -> None:
    """Print a table and a line of JSON, and draw a picture if asked."""
    args, rest = options()
    beside = Path(sys.executable).with_name("mpiexec")
    launcher = shlex.split(args.launcher or str(beside if beside.exists() else shutil.which("mpiexec")))
    lengths = ["-p", args.n_prompt, "-n", args.n_gen]
    predicted = {c["ranks"]: c for c in job(launcher, max(args.ranks), ["plan", *lengths, *rest])["counts"]}
    records = []
    for ranks in args.ranks:
        prefill, decode = job(launcher, ranks, ["bench", *lengths, "-r", args.repetitions, *rest])
        records.append(
            {
                "ranks": ranks,
                "decode_tokens_per_second": 1e9 / decode["median_step_ns"],
                "predicted_decode": predicted[ranks]["decode"]["tokens_per_second"],
                "prefill_tokens_per_second": prefill["avg_ts"],
                "predicted_prefill": predicted[ranks]["prefill"]["tokens_per_second"],
                "algorithm": decode["sync"][0]["algorithm"] if decode["sync"] else None,
                "sync_share": decode["sync_share"],
                "sent_kb_per_token": decode["sent_bytes_per_token"] / 1e3,
                "least_kb_per_token": least_kb(decode, ranks),
            }
        )
    head = ["ranks", "decode t/s", "predicted", "prefill t/s", "predicted", "all-reduce", "sync", "kB/token", "least"]
    rows = [
        [str(r["ranks"]), *(f"{r[key]:.1f}" for key in list(r)[1:5]), r["algorithm"] or "-", f"{r['sync_share']:.1%}",
         f"{r['sent_kb_per_token']:.2f}",
         "-" if r["least_kb_per_token"] is None else f"{r['least_kb_per_token']:.2f}"]
        for r in records
    ]  # fmt: skip
    say_table(head, rows)
    if args.plot:
        draw(records, args.plot)
    finish({"benchmark": "scaling", "options": rest, "records": records}, args.json)


if __name__ == "__main__":
    main()
