"""Run by mpiexec: every all-reduce algorithm x payload x size against numpy; rank 0 prints a JSON object a case."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from mpi4py import MPI

from dllama_mpi.errors import UsageError
from dllama_mpi.parallel.collective.all_reduce import SYNCS, AllReduce
from dllama_mpi.parallel.collective.payload import PAYLOADS
from tests import naive

ROWS, WIDTH = 70, 96
SIZES = (1, 31, 32, 33, 96, 1000, 96 * 69 + 5, ROWS * WIDTH)


def terms(size: int, ranks: int) -> list[np.ndarray]:
    """Return every rank's values: normal ones, with blocks of zeros and of large values."""
    rng = np.random.default_rng(size)
    values = rng.standard_normal((ranks, size)).astype(np.float32)
    values[:, 64:96] = 0
    values[:, 96:128] *= 1000
    return list(values)


def expected(values: list[np.ndarray], way: str, payload: str, homes: list[str]) -> np.ndarray:
    """Return the sum as the algorithm rounds it."""
    size = values[0].size
    blocks = [np.append(v, np.zeros(-size % 32, np.float32)).reshape(-1, 32) for v in values]
    return naive.all_reduce(blocks, way, payload, homes).ravel()[:size]


def check(reduce: AllReduce, way: str, payload: str, homes: list[str], comm: Any) -> dict[str, Any]:
    """Return whether all ranks have the same bits, and the right ones, for every size."""
    wrong = []
    for size in SIZES:
        values = terms(size, comm.size)
        for _ in range(3):  # buffers are used again
            got = values[comm.rank].copy()
            reduce(got)
            everywhere = comm.allgather(got.tobytes())
            if len(set(everywhere)) > 1:
                wrong.append(f"{size}: ranks differ")
        if way == "mpi":
            good = np.allclose(got, np.sum(values, axis=0), rtol=1e-5, atol=1e-3)
        else:
            good = bool((got == expected(values, way, payload, homes)).all())
        if not good:
            wrong.append(f"{size}: wrong sum")
    return {"way": way, "payload": payload, "homes": homes, "wrong": comm.allgather(wrong)}


def main() -> None:
    comm = MPI.COMM_WORLD
    together, apart = ["a"] * comm.size, [f"h{rank}" for rank in range(comm.size)]
    mixed = [f"h{rank // 2}" for rank in range(comm.size)]
    crossed = [f"h{rank % 2}" for rank in range(comm.size)]
    for homes in {tuple(h): h for h in (together, apart, mixed, crossed)}.values():
        for payload in PAYLOADS:
            for way in SYNCS[1:]:
                try:
                    reduce = AllReduce(comm, homes, ROWS, WIDTH, payload, way)
                except UsageError as error:
                    found = {"way": way, "payload": payload, "homes": homes, "refused": str(error)}
                else:
                    found = check(reduce, way, payload, homes, comm)
                if comm.rank == 0:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
