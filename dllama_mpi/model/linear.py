"""Linear layers Y = X A^T in compiled code: how their matrices are cut, and which of them are multiplied together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import overload

from ..kernels.compiled import entry, inner
from ..kernels.layout import ROWS
from ..kernels.matrix import FIELDS, TILE_ROWS, multiply_rows
from ..kernels.parallel import run_parallel
from ..kernels.simd import address

NO_FIELDS = np.zeros((0, FIELDS), np.int64)


class NoMatrix(NamedTuple):
    """Stands where a layer has no such matrix."""

    fields: np.ndarray = NO_FIELDS


class SideBySide(NamedTuple):
    """Column-parallel matrices, Y_r = X A_r^T, whose outputs stand side by side, each padded to 16 columns.

    Each rank holds rows of every A; X is whole. No communication. Each may have a format of its own, or be absent
    (`NoMatrix`); fields: (layers, FIELDS) each.
    """

    first: tuple
    second: tuple
    third: tuple
    fourth: tuple = NoMatrix()
    fifth: tuple = NoMatrix()
    sixth: tuple = NoMatrix()


def _share_of(matrix, layer, x, out, column, tokens, thread, threads):
    """Do a thread's part of one matrix's product, from a column of `out` on; return the column after it."""
    raise NotImplementedError  # compiled code only


@overload(_share_of)
def _choose_share_of(matrix, layer, x, out, column, tokens, thread, threads):
    if matrix.instance_class is NoMatrix:
        return lambda matrix, layer, x, out, column, tokens, thread, threads: column

    def share(matrix, layer, x, out, column, tokens, thread, threads):
        m = matrix.fields[layer]
        rows = m[TILE_ROWS]
        first, last = rows * thread // threads, rows * (thread + 1) // threads
        if first < last:
            y = address(out) + 4 * column
            multiply_rows(m, first, last, x, np.int64(0), tokens, y, 4 * out.shape[1])
        return column + ROWS * rows

    return share


@inner
def _project_share(w, layer, x, out, tokens, thread, threads):
    column = _share_of(w.first, layer, x, out, np.int64(0), tokens, thread, threads)
    column = _share_of(w.second, layer, x, out, column, tokens, thread, threads)
    column = _share_of(w.third, layer, x, out, column, tokens, thread, threads)
    column = _share_of(w.fourth, layer, x, out, column, tokens, thread, threads)
    column = _share_of(w.fifth, layer, x, out, column, tokens, thread, threads)
    _share_of(w.sixth, layer, x, out, column, tokens, thread, threads)


@inner
def project(w, layer, x, out, tokens, threads):
    """Multiply the first `tokens` rows of `Activations` x with a layer's matrices of a `SideBySide`.

    out: (>= tokens, >= all outputs) float32, contiguous.
    """
    run_parallel(_project_share, (w, layer, x, out, tokens), threads)


@inner
def _multiply_share(matrix, layer, x, out, tokens, thread, threads):
    _share_of(matrix, layer, x, out, np.int64(0), tokens, thread, threads)


@entry
def multiply(matrix, layer, x, out, tokens, threads):
    """Multiply the first `tokens` rows of `Activations` x with a layer's matrix.

    For a row-parallel matrix, Y = sum over ranks of X_r A_r^T, out gets this rank's term: one all-reduce.
    out: (>= tokens, >= rows to 16s) float32, contiguous.
    """
    run_parallel(_multiply_share, (matrix, layer, x, out, tokens), threads)
