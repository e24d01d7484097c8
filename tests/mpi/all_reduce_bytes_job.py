"""Run by mpiexec: the bytes that all-reduces allocate, as Python's allocator saw them, beside the predicted ones."""

from __future__ import annotations

import json
import tracemalloc

from mpi4py import MPI

from dllama_mpi.parallel.collective.all_reduce import AllReduce
from dllama_mpi.parallel.collective.memory import all_reduce_bytes
from dllama_mpi.parallel.collective.table import PAYLOADS

ROWS, WIDTH = 256, 1024


def allocated(homes: list[str], payload: str) -> int:
    """Return the bytes that making an all-reduce left behind, the host's shared memory in equal parts."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    reduce = AllReduce(MPI.COMM_WORLD, homes, ROWS, WIDTH, payload, "direct")
    found = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    shared = reduce.transport.buffers.shared
    return found + (0 if shared is None else shared.nbytes // homes.count(homes[MPI.COMM_WORLD.rank]))


def main() -> None:
    comm = MPI.COMM_WORLD
    together, apart = ["a"] * comm.size, [f"h{rank}" for rank in range(comm.size)]
    mixed = [f"h{rank // 2}" for rank in range(comm.size)]
    AllReduce(comm, together, 1, 32, "q80", "direct")  # modules and compiled code are loaded
    for homes in {tuple(h): h for h in (together, apart, mixed)}.values():
        for payload in PAYLOADS:
            here, hosts = homes.count(homes[comm.rank]), len(set(homes))
            predicted = all_reduce_bytes(comm.size, here, hosts, ROWS, WIDTH, payload)
            found = comm.gather((allocated(homes, payload), predicted))
            if comm.rank == 0:
                print(json.dumps({"homes": homes, "payload": payload, "bytes": found}), flush=True)


if __name__ == "__main__":
    main()
