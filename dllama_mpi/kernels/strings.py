"""Lists of strings as GGUF files have them: an 8-byte little-endian length, then so many bytes, for each."""

from __future__ import annotations

import numpy as np

from .compiled import entry


@entry
def skip_strings(data, at, count):
    """Return where so many strings end that begin at a place of data (n,) uint8; -1 where they go beyond it."""
    for _ in range(count):
        if data.size - at < 8:
            return np.int64(-1)
        length = np.uint64(0)
        for i in range(8):
            length |= np.uint64(data[at + i]) << np.uint64(8 * i)
        at += 8
        if length > np.uint64(data.size - at):
            return np.int64(-1)
        at += np.int64(length)
    return np.int64(at)
