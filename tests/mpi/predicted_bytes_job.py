"""Run by mpiexec: what each rank of an `LLM` was predicted to need, beside what it has allocated.

usage: predicted_bytes_job.py MODEL WEIGHTS POSITIONS
"""

from __future__ import annotations

import json
import sys

from dllama_mpi import LLM
from dllama_mpi.kernels.layout import PAGE
from tests.allocated import group_bytes, transformer_bytes


def main() -> None:
    model, weights, positions = sys.argv[1:]
    llm = LLM(model, weights=weights, max_seq_len=int(positions), nthreads=1, prefill_chunk=64)
    needs = llm.memory.needs(llm.shards, [(host, 0) for host in llm.group.hosts])
    own = transformer_bytes(llm._model) + group_bytes(llm.group)
    found = llm.group.allgather(own)
    if llm.is_root:
        near = PAGE * (llm.window_pages or llm.pages)
        predicted = [n.fixed + PAGE * llm.pages * n.per_position + near * n.per_window_position for n in needs]
        print(json.dumps({"predicted": predicted, "allocated": found}), flush=True)


if __name__ == "__main__":
    main()
