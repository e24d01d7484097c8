"""Strong scaling over test hosts and link rates on one machine, beside what the cost model predicts.

python benchmarks/lan_scaling.py --random llama3.2-1b            # needs root; prints the table
python benchmarks/lan_scaling.py --write benchmarks              # RESULTS.md's part, results/lan_scaling.json and .png

Hosts are network namespaces with a core each (see lan.py). Every figure is the median of rounds, in each of which all
numbers of hosts and all links have their turn as a job of `bench`. More hosts than cores say nothing about speed: of
them, what is sent is told alone. Predictions come from lan_survey.py, before the rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import marked
import psutil
from lan import GOODPUT, Lan, lan
from report import CALM, COLOURS, add_output_options, figure, finish, least_kb, pyplot, save, whole_numbers

from dllama_mpi.errors import DllamaError
from dllama_mpi.kernels.runtime import usable_cores
from dllama_mpi.progress import progress

SURVEY = Path(__file__).resolve().with_name("lan_survey.py")
RESULTS = Path("results/lan_scaling.json")
PHASES = ("decode", "prefill")


def link_rates(text: str) -> list[int | None]:
    """Read rates in Mbit/s separated by commas; none: no limit."""
    return [None if part == "none" else int(part) for part in text.split(",")]


def options() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here goes to `bench` and the survey."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Other options, such as --weights q80, go to bench."
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--random", default="llama3.2-1b", metavar="SHAPE", help="as of bench (default: llama3.2-1b)")
    model.add_argument("--model", metavar="MODEL", help="instead: as of bench")
    parser.add_argument("--ranks", type=whole_numbers, default=[1, 2, 4], metavar="N,...", help="(default: 1,2,4)")
    parser.add_argument(
        "--links",
        type=link_rates,
        default=[100, 1000, 2500, None],
        metavar="MBIT,...",
        help="rates of the hosts' links, none: no limit (default: 100,1000,2500,none)",
    )
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N")
    parser.add_argument("-n", "--n-gen", type=int, default=64, metavar="N")
    parser.add_argument("-r", "--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--write", metavar="FOLDER", help="also replace the table in RESULTS.md there, and results/")
    add_output_options(parser)
    return parser.parse_known_args()


# ---- measuring


def name(mbit: int | None) -> str:
    """Return how a link is called in figures."""
    return "none" if mbit is None else str(mbit)


def jobs(ranks: list[int], links: list[int | None], cores: int) -> list[tuple[int, int | None]]:
    """Return the jobs of a round: one host needs no link, more hosts than cores are tried on one link alone."""
    found: list[tuple[int, int | None]] = []
    for count in ranks:
        some = [None] if count == 1 else links if count <= cores else [1000 if 1000 in links else links[0]]
        found += [(count, mbit) for mbit in some]
    return found


def bench(hosts: Lan, ranks: int, lengths: list[str], rest: list[str]) -> dict[str, dict[str, Any]]:
    """Run `bench` once; return its records of decode and of prefill."""
    line = ["-m", "dllama_mpi", "bench", *lengths, "-r", "1", "-o", "json", "--nthreads", "1", *rest]
    prefill, decode = json.loads(hosts.run(ranks, line))
    return {"decode": decode, "prefill": prefill}


def busy() -> float:
    """Return the share of the processors that other programs take just now."""
    return float(psutil.cpu_percent(1.0)) / 100


def measure(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Return all figures, JSON-ready."""
    cores = len(usable_cores())
    todo = jobs(args.ranks, args.links, cores)
    lengths = ["-p", str(args.n_prompt), "-n", str(args.n_gen)]
    rest = [*(["--model", args.model] if args.model else ["--random", args.random]), *rest]
    rates = ",".join(name(mbit) for mbit in args.links if mbit is not None)
    runs: dict[tuple[int, int | None], list[dict[str, dict[str, Any]]]] = {job: [] for job in todo}
    others: list[float] = []
    with lan(max(args.ranks)) as hosts:
        surveys, links = {}, {}
        for count in progress(sorted({count for count, _ in todo if count <= cores}), "surveys", True):
            line = [str(SURVEY), *lengths, "--nthreads", "1", *rest, *(["--mbit", rates] if rates else [])]
            surveys[count] = json.loads(hosts.run(count, line))
        for mbit in dict.fromkeys(mbit for count, mbit in todo if count > 1):
            hosts.shape(mbit)
            links[name(mbit)] = json.loads(hosts.run(2, [str(SURVEY), "--link-only"]))["link"]
        for number in progress(range(args.rounds), "rounds", True):
            for count, mbit in todo:
                if count > cores and number:
                    continue  # what is sent is the same each time
                others.append(busy())
                hosts.shape(mbit)
                runs[count, mbit].append(bench(hosts, count, lengths, rest))
    last = runs[todo[-1]][0]["decode"]
    return {
        "benchmark": "lan_scaling",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": cores,
        "others_cpu_share": max(others),
        "rounds": args.rounds,
        "n_prompt": args.n_prompt,
        "n_gen": args.n_gen,
        **{key: last[key] for key in ("model_filename", "instruction_set", "weights", "buffer_float_type")},
        "links": links,
        "surveys": {str(count): survey["speeds"] for count, survey in surveys.items()},
        "records": [record(job, runs[job], surveys.get(job[0]), cores) for job in todo],
    }


def processor() -> str:
    """Return the processor's name as the system has it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def record(
    job: tuple[int, int | None], rounds: list[dict[str, dict[str, Any]]], survey: dict[str, Any] | None, cores: int
) -> dict[str, Any]:
    """Return the figures of one number of hosts and one link; no speeds without a core for each host."""
    ranks, mbit = job
    found: dict[str, Any] = {"hosts": ranks, "link_mbit": mbit}
    if survey is not None and ranks <= cores:
        speeds = {
            "decode": [1e9 / each["decode"]["median_step_ns"] for each in rounds],
            "prefill": [each["prefill"]["avg_ts"] for each in rounds],
        }
        for phase in PHASES:
            found[phase] = {
                "tokens_per_second": statistics.median(speeds[phase]),
                "least": min(speeds[phase]),
                "most": max(speeds[phase]),
                "predicted": survey["predicted"][name(mbit)][phase]["tokens_per_second"],
                "sync_share": statistics.median(each[phase]["sync_share"] for each in rounds),
            }
    if ranks > 1:
        last = rounds[-1]
        for phase in PHASES:
            sent = last[phase]["sent_bytes_per_token"] / 1e3
            found[f"{phase}_sent_kb_per_token"] = sent
            found[f"{phase}_wire_ms_per_token"] = None if mbit is None else sent / (0.125 * mbit * GOODPUT)
        found["algorithm"] = last["decode"]["sync"][0]["algorithm"]
        found["least_kb_per_token"] = least_kb(last["decode"], ranks)
    return found


# ---- telling


def report(found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    head = ["hosts", "link"]
    for phase in PHASES:
        head += [phase, "predicted", "ratio"]
    head += ["kB a token", "on the wire"]
    rows = [[str(r["hosts"]), link_name(r), *speed_cells(r), *byte_cells(r)] for r in found["records"]]
    shape = found["model_filename"].removeprefix("random:")
    model = shape if shape == found["model_filename"] else f"{shape} with random weights"
    note = (
        f"{found['date']}, {found['cores']} cores of {found['processor']} ({found['instruction_set']}), one for each"
        f" host; {model} in {found['weights']}, messages in {found['buffer_float_type']}."
        f" tokens/s of {found['n_gen']} tokens generated and of a prompt of {found['n_prompt']}: medians of"
        f" {found['rounds']} round{'s' * (found['rounds'] > 1)} (least to most). Between jobs other programs took up to"
        f" {found['others_cpu_share']:.0%} of the processors."
    )
    if found["others_cpu_share"] > CALM:
        note += " **That is too much: these figures say nothing. Measure again when it is calm.**"
    return f"{note}\n\n{marked.markdown(head, rows, left=2)}\n{links_line(found)}\n"


def link_name(r: dict[str, Any]) -> str:
    """Return what a link is called in the table."""
    if r["hosts"] == 1:
        return "-"
    return "no limit" if r["link_mbit"] is None else f"{r['link_mbit']} Mbit/s"


def speed_cells(r: dict[str, Any]) -> list[str]:
    """Return the cells of both phases: measured, predicted, and their ratio."""
    cells = []
    for phase in PHASES:
        if phase not in r:
            cells += ["-"] * 3
            continue
        got = r[phase]
        cells += [
            f"{got['tokens_per_second']:.1f} ({got['least']:.1f} to {got['most']:.1f})",
            f"{got['predicted']:.1f}",
            f"{got['tokens_per_second'] / got['predicted']:.2f}",
        ]
    return cells


def byte_cells(r: dict[str, Any]) -> list[str]:
    """Return the cells of what a rank sends for a token of decode."""
    if r["hosts"] == 1:
        return ["-", "-"]
    few = "" if r["least_kb_per_token"] is None else f" (all-reduces: {r['least_kb_per_token']:.1f})"
    wire = r["decode_wire_ms_per_token"]
    return [f"{r['decode_sent_kb_per_token']:.1f}{few}", "-" if wire is None else f"{wire:.2f} ms"]


def links_line(found: dict[str, Any]) -> str:
    """Return a line on the links as a ping-pong of two ranks saw them."""
    told = []
    for rate, points in found["links"].items():
        (_, soon), (small, early), *_, (large, late) = points
        reached = 8e-6 * (large - small) / max(late - early, 1e-9)
        called = "no limit" if rate == "none" else f"{rate} Mbit/s"
        told.append(f"{called}: {1e6 * soon:.0f} us and {reached:.0f} Mbit/s")
    return f"Links as messages between two ranks saw them, latency and rate: {'; '.join(told)}." if told else ""


def draw(found: dict[str, Any], path: str) -> None:
    """Draw what was measured, with its spread, beside what was predicted."""
    drawn, axes = figure(10, 4.5, columns=2)
    timed = [r for r in found["records"] if "decode" in r]
    places = range(len(timed))
    labels = ["1 host" if r["hosts"] == 1 else f"{r['hosts']} hosts\n{link_name(r)}" for r in timed]
    for axis, phase in zip(axes, PHASES, strict=True):
        got = [r[phase] for r in timed]
        middle = [each["tokens_per_second"] for each in got]
        spread = [[m - each["least"] for m, each in zip(middle, got, strict=True)],
                  [each["most"] - m for m, each in zip(middle, got, strict=True)]]  # fmt: skip
        axis.bar(places, middle, 0.6, yerr=spread, capsize=4, color=COLOURS[0], alpha=0.8, label="measured")
        axis.plot(places, [each["predicted"] for each in got], "D", color=COLOURS[1], label="predicted")
        axis.set(xticks=places, xticklabels=labels, ylabel="tokens/s", title=phase)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.25, axis="y")
        axis.legend()
    save(drawn, path)


def main() -> None:
    """Print the table and a line of JSON; draw and write what is asked for."""
    args, rest = options()
    folder = None if args.write is None else Path(args.write)
    if folder is not None or args.plot:
        pyplot()  # what is missing is told before all is measured
    if folder is not None:
        marked.part((folder / "RESULTS.md").read_text(encoding="utf-8"), "measured")
    try:
        found = measure(args, rest)
    except DllamaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    text = report(found)
    print(text, flush=True)
    if args.plot:
        draw(found, args.plot)
    if folder is not None:
        (folder / RESULTS).parent.mkdir(exist_ok=True)
        draw(found, str((folder / RESULTS).with_suffix(".png")))
        (folder / RESULTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        marked.write(folder / "RESULTS.md", "measured", text)
    finish(found, args.json)


if __name__ == "__main__":
    main()
