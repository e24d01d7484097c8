"""Measures this program when told to, with the requests and answers of llama_cpp_worker.py. One process, no ranks."""

from __future__ import annotations

import json
import sys

from dllama_mpi import LLM, __version__
from dllama_mpi.kernels import runtime
from dllama_mpi.planning.bench import Bench, Test


def main() -> None:
    """Answer requests until the input ends. Arguments: model directory, threads, positions and slots of the KV cache.

    With a slot for every sequence that the requests fill to a depth, and one more, each is filled once.
    """
    folder, (threads, positions, slots) = sys.argv[1], map(int, sys.argv[2:])
    llm = LLM(folder, nthreads=threads, max_seq_len=positions, max_batch=slots)
    bench = Bench(llm)
    print(json.dumps({"version": __version__, "features": runtime.ISA}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "run":
            test = Test(request["prompt"], request["generated"], request["depth"], request["batch"])
            result = bench.run(test, 1, warm_up=False, readings=0)
            answer = {"seconds": None if result is None else result.samples[0].seconds}
        else:
            rows = llm.logits(request["tokens"])
            answer = {"logits": [] if rows is None else rows[-1].tolist()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
