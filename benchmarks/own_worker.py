"""Measures this program when told to, with the requests and answers of llama_cpp_worker.py. One process, no ranks."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dllama_mpi import LLM, __version__
from dllama_mpi.kernels import runtime
from dllama_mpi.planning.bench import Bench, Test


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="model directory")
    parser.add_argument("threads", type=int, metavar="THREADS")
    parser.add_argument("positions", type=int, metavar="POSITIONS", help="of the KV cache")
    parser.add_argument(
        "slots",
        type=int,
        metavar="SLOTS",
        help="of the KV cache: with one for every sequence that the requests fill to a depth, and one more, each is"
        " filled once",
    )
    return parser.parse_args()


def main() -> None:
    """Answer requests until the input ends."""
    args = options()
    llm = LLM(args.folder, nthreads=args.threads, max_seq_len=args.positions, max_batch=args.slots)
    bench = Bench(llm)
    print(json.dumps({"version": __version__, "features": runtime.ISA}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "run":
            test = Test(request["prompt"], request["generated"], request["depth"], request["batch"])
            result = bench.run(test, 1, warm_up=False, readings=0)
            answer: dict[str, Any] = {"seconds": None if result is None else result.samples[0].seconds}
        else:
            rows = llm.logits(request["tokens"])
            answer = {"logits": [] if rows is None else rows[-1].tolist()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
