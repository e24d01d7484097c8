"""Types and roundings of the naive twins, whose modules are called ``tests.naive_*``.

The twins are slow, obviously right numpy versions of every kernel, of the sampler and of the whole forward pass.
Nothing in them shares code with the package but the layout's two numbers, 16 rows and 32 columns a tile. What the
program computes in a fixed order is computed bit for bit the same (quantisation, payloads, matrix products); the rest
in float64, rounded to float32 where the program stores it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

F = np.float32


def fma(x: npt.ArrayLike, y: npt.ArrayLike, z: npt.ArrayLike) -> Floats:
    """Return x * y + z of float32 values, rounded once.

    The product is exact in float64; the sum is rounded to odd there, so that rounding it again to float32 is right.
    """
    product = np.asarray(x, np.float64) * np.asarray(y, np.float64)
    z = np.broadcast_to(np.asarray(z, np.float64), product.shape)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    inexact = (error != 0) & (total.view(np.int64) & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def half(values: npt.ArrayLike) -> npt.NDArray[np.float16]:
    """Round to float16, beyond its range to infinity."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(np.float16)


def reciprocal(values: Floats, numerator: float = 1.0) -> Floats:
    """Return numerator / values as float32, 0 where a value is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(values == 0, F(0), F(numerator) / values).astype(np.float32)
