"""Predict a job's speed from what each host does alone and from the link's rate; run by lan_scaling.py.

mpiexec -f hosts -n 2 python benchmarks/lan_survey.py --random llama3.2-1b --mbit 100,1000

Every rank times steps of its own, as `plan` does, while the others do the same; no message is sent meanwhile. The
latency of links, and their rate where none is given, come from a ping-pong of two ranks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import combinations
from typing import Any

from lan import GOODPUT
from report import whole_numbers

from dllama_mpi.cli.options import add_model_options, add_random_option, model_of
from dllama_mpi.errors import DllamaError
from dllama_mpi.kernels import runtime
from dllama_mpi.parallel.group import TensorParallelGroup, connect
from dllama_mpi.parallel.launch import leave
from dllama_mpi.parallel.network import LinkCurve, Network, measure_links
from dllama_mpi.planning.costs import AllReduces, Cluster, Host, Speeds
from dllama_mpi.planning.plan import Question, plan
from dllama_mpi.planning.sample import Job
from dllama_mpi.planning.survey import survey
from dllama_mpi.startup.opening import open_shape
from dllama_mpi.startup.options import Kept
from dllama_mpi.startup.threads import place_threads


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_random_option(parser)
    parser.add_argument(
        "--mbit",
        type=whole_numbers,
        default=[],
        metavar="N,...",
        help="rates of the link to predict for, besides its own",
    )
    parser.add_argument("--link-only", action="store_true", help="measure the link between two ranks and nothing else")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N")
    parser.add_argument("-n", "--n-gen", type=int, default=64, metavar="N")
    add_model_options(parser)
    return parser.parse_args()


def question_of(args: argparse.Namespace) -> Question:
    """Return what is predicted for."""
    files = open_shape(model_of(args))
    kept = Kept.of(files.formats(args.weights), args.kv_type, args.buffer_float_type, args.sync)
    lengths = {"prompt": args.n_prompt, "generated": args.n_gen}
    return Question(files.config, kept, args.prefill_chunk, args.n_prompt + args.n_gen + 1, **lengths)


def predicted(question: Question, speeds: list[Speeds], link: LinkCurve | None) -> dict[str, Any]:
    """Return `plan`'s answer for ranks of these speeds on a host each, whose links are all alike."""
    names = [f"host {rank}" for rank in range(len(speeds))]
    links = {} if link is None else dict.fromkeys(combinations(names, 2), link)
    network = Network(tuple(names), links)
    counts = tuple(tuple(speeds[:count]) for count in range(1, len(speeds) + 1))
    hosts = tuple(Host(name, 1, 1, runtime.ISA, 1 << 50, None) for name in names)
    found = plan(question, Cluster(hosts, (1,) * len(speeds), network, counts, AllReduces(network)))["counts"][-1]
    return {phase: found[phase] for phase in ("decode", "prefill")}


def main() -> None:
    """Print the prediction for each rate as JSON."""
    args = options()
    try:
        group = connect()
        curves = measure_links(group.comm, group.hosts)
        link = next(iter(curves.values()), None)
        if args.link_only:
            if group.is_root:
                print(json.dumps({"link": None if link is None else list(link.points)}))
            return
        question = question_of(args)
        cores = [(f"{group.host} {rank}", runtime.usable_cores()) for rank in range(group.size)]
        threads = place_threads(group, cores, args.nthreads, args.bind)
        group.allgather(None)  # all begin together
        alone = survey(
            TensorParallelGroup(None), Job(question.config, question.kept, args.sync, threads, question.chunk)
        )
        speeds = group.allgather(alone.speeds[0][0])
    except DllamaError as error:
        raise SystemExit(leave(error)) from None
    if not group.is_root:
        return
    links: dict[str, LinkCurve | None] = {"none": link}
    if link is not None:
        links |= {str(mbit): LinkCurve.of(link.latency, 125e3 * mbit * GOODPUT) for mbit in args.mbit}
    print(
        json.dumps(
            {
                "ranks": group.size,
                "speeds": [asdict(each) for each in speeds],
                "link": None if link is None else list(link.points),
                "predicted": {name: predicted(question, speeds, each) for name, each in links.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
