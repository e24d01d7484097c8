"""Measures this program when told to, with the requests and answers of llama_cpp_worker.py. One process, no MPI ranks.

The number of threads is an argument, as a model is built for one.
"""

from __future__ import annotations

import contextlib
import json
import sys

from dllama_mpi import LLM, __version__
from dllama_mpi.engine.bench import Bench, Test
from dllama_mpi.kernels import runtime

POSITIONS = 640  # room for prompt and generation beyond the depth


def main() -> None:
    """Answer requests for the model and threads given as arguments until the input ends."""
    folder, threads = sys.argv[1], int(sys.argv[2])
    benches: dict[tuple[int, int], Bench] = {}
    print(json.dumps({"version": __version__, "features": runtime.ISA}), flush=True)
    with contextlib.ExitStack() as stack:
        for line in sys.stdin:
            request = json.loads(line)
            key = (request.get("depth", 0), request.get("batch", 1))
            if key not in benches:  # each has its KV cache; the mapped weights are shared
                llm = LLM(folder, nthreads=threads, max_seq_len=key[0] + POSITIONS, max_batch=key[1])
                stack.enter_context(llm.session())
                benches[key] = Bench(llm)
            bench = benches[key]
            if request["op"] == "run":
                test = Test(request["prompt"], request["generated"], *key)
                answer = {"seconds": bench.run(test, 1, warm_up=False).samples[0].seconds}
            else:
                rows = bench.llm.logits(request["tokens"])
                answer = {"logits": [] if rows is None else rows[-1].tolist()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
