"""Run by mpiexec: every all-reduce algorithm x payload x size against numpy; rank 0 prints a JSON object a case.

Sums one by one, and three of different sizes after another, as in a layer: with and without another thread.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from dllama_mpi.errors import UsageError
from dllama_mpi.parallel.collective.all_reduce import AllReduce
from dllama_mpi.parallel.collective.calls import can_use_threads
from dllama_mpi.parallel.collective.exchange import Ahead, finish_exchange, start_exchange
from dllama_mpi.parallel.collective.link import EXACT, LAST, TERMS
from dllama_mpi.parallel.collective.overlap import Overlap
from dllama_mpi.parallel.collective.payload import sum_blocks
from dllama_mpi.parallel.collective.table import COARSE_ROWS, PAYLOADS, SYNCS
from tests import naive_payloads

ROWS, WIDTH = 70, 96
EXACT_SIZES = (2, 33, ROWS * 32)  # sent as float32
PARTS = ((0, 35), (35, ROWS))  # rows
LAYER = ((100, TERMS), (30, EXACT), (2, TERMS), (100, TERMS), (100, LAST))  # blocks, how they are sent
FACTORS = (1, -2, 3, -1)  # of the values, exchange by exchange
STEPS = 3 * len(LAYER) + 1
SIZES = (1, 31, 32, 33, 96, 1000, 96 * 69 + 5, ROWS * WIDTH)


def terms(size: int, ranks: int) -> list[np.ndarray]:
    """Return every rank's values: normal ones, with blocks of zeros and of large values."""
    rng = np.random.default_rng(size)
    values = rng.standard_normal((ranks, size)).astype(np.float32)
    values[:, 64:96] = 0
    values[:, 96:128] *= 1000
    return list(values)


def expected(
    values: list[np.ndarray],
    algorithm: str,
    payload: str,
    homes: list[str],
    how: int = TERMS,
    rests: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Return the sum as the algorithm rounds it; rests: (blocks, 32) of every rank, changed where q40 is used."""
    size = values[0].size
    blocks = [np.append(v, np.zeros(-size % 32, np.float32)).reshape(-1, 32) for v in values]
    is_coarse = payload == "q40" and len(blocks[0]) >= COARSE_ROWS * WIDTH // 32 and how != EXACT
    sent = "f32" if how == EXACT else payload
    if payload == "q40" and how != EXACT and not (is_coarse and how == TERMS):
        sent = "q80"
    if is_coarse and rests is None:
        rests = [np.zeros_like(block) for block in blocks]
    left = [rest[: len(blocks[0])] for rest in rests] if rests is not None and is_coarse else None
    return naive_payloads.all_reduce(blocks, algorithm, sent, homes, left).ravel()[:size]


def check(reduce: AllReduce, algorithm: str, payload: str, homes: list[str], comm: Any) -> dict[str, Any]:
    """Return whether all ranks have the same bits, and the right ones, for every size."""
    wrong = []
    for size, exact in [(size, False) for size in SIZES] + [(size, True) for size in EXACT_SIZES]:
        how = EXACT if exact else TERMS
        values = terms(size, comm.size)
        for _ in range(3):  # buffers are used again
            got = values[comm.rank].copy()
            reduce(got, exact)
            everywhere = comm.allgather(got.tobytes())
            if len(set(everywhere)) > 1:
                wrong.append(f"{size}, {how}: ranks differ")
        if not is_right(got, expected(values, algorithm, payload, homes, how), algorithm):
            wrong.append(f"{size}, {how}: wrong sum")
    wrong += check_layers(reduce, algorithm, payload, homes, comm)
    return {"algorithm": algorithm, "payload": payload, "homes": homes, "wrong": comm.allgather(wrong)}


def is_right(got: np.ndarray, good: np.ndarray, algorithm: str) -> bool:
    """Return whether a sum is what it should be: to the bit, but for the library's."""
    return np.allclose(got, good, rtol=1e-5, atol=1e-3) if algorithm == "mpi" else bool((got == good).all())


def check_layers(reduce: AllReduce, algorithm: str, payload: str, homes: list[str], comm: Any) -> list[str]:
    """Return what is wrong in exchanges that only their own waiting keeps in order, in two parts and both halves."""
    terms_of = {blocks: terms(32 * blocks, comm.size) for blocks, _ in LAYER}
    good, rests = [], [np.zeros((ROWS * WIDTH // 32, 32), np.float32) for _ in range(comm.size)]
    for step in range(STEPS):
        blocks, how = LAYER[step % len(LAYER)]
        values = [v * FACTORS[step % len(FACTORS)] for v in terms_of[blocks]]
        good.append(expected(values, algorithm, payload, homes, how, rests))
    transport, wrong, everything = reduce.transport, [], []
    overlaps = algorithm not in ("mpi", "shared") and transport.setting.is_compiled and can_use_threads()
    for overlap in [None, Overlap(transport.link, transport.buffers.links[1], 20)] if overlaps else [None]:
        sources = np.zeros((len(PARTS), 4), np.int64)
        transport.buffers.rests[:] = 0
        with overlap.working() if overlap else contextlib.nullcontext():
            for step in range(STEPS):
                for part, (first, last) in enumerate(PARTS):
                    source = sources[part]
                    finish_exchange(reduce.link, source)
                    if step > 0:
                        time.sleep(0.002 * ((step + comm.rank) % 4 == 0))  # others are ahead by then
                        blocks = LAYER[(step - 1) % len(LAYER)][0]
                        total = np.empty(32 * blocks, np.float32)
                        sum_blocks(total.ctypes.data, source[0], source[1], source[2], blocks, source[3])
                        everything.append(total)
                        if not is_right(total, good[step - 1], algorithm):
                            wrong.append(f"exchange {step}, part {part}: wrong sum, {overlap}")
                    blocks, how = LAYER[step % len(LAYER)]
                    x = reduce.values[step % 2, first:last].reshape(-1)[: 32 * blocks]
                    x[:] = terms_of[blocks][comm.rank] * FACTORS[step % len(FACTORS)]
                    start_exchange(reduce.link, x.ctypes.data, blocks, part, how, source, Ahead(x.ctypes.data, 4096))
    if len(set(comm.allgather(np.concatenate(everything).tobytes()))) > 1:
        wrong.append("in layers: ranks differ")
    return wrong


def main() -> None:
    comm = MPI.COMM_WORLD
    together, apart = ["a"] * comm.size, [f"h{rank}" for rank in range(comm.size)]
    mixed = [f"h{rank // 2}" for rank in range(comm.size)]
    crossed = [f"h{rank % 2}" for rank in range(comm.size)]
    for homes in {tuple(h): h for h in (together, apart, mixed, crossed)}.values():
        for payload in PAYLOADS:
            for algorithm in SYNCS[1:]:
                try:
                    reduce = AllReduce(comm, homes, ROWS, WIDTH, payload, algorithm)
                except UsageError as error:
                    found = {"algorithm": algorithm, "payload": payload, "homes": homes, "refused": str(error)}
                else:
                    found = check(reduce, algorithm, payload, homes, comm)
                if comm.rank == 0:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
