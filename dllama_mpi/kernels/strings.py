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


@entry
def join_strings(data, at, count, out):
    """Write so many strings that begin at a place of data (n,) uint8 to out, a zero after each.

    Returns the bytes written; -1 where a string holds a zero. They must have been skipped before: nothing is checked.
    """
    end = np.int64(0)
    for _ in range(count):
        length = np.int64(0)
        for i in range(8):
            length |= np.int64(data[at + i]) << np.int64(8 * i)
        at += 8
        for i in range(length):
            if data[at + i] == 0:
                return np.int64(-1)
            out[end + i] = data[at + i]
        at += length
        out[end + length] = 0
        end += length + 1
    return end
