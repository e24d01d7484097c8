"""The merges of a sentencepiece vocabulary, which has scores alone.

Sentencepiece joins the two neighbours whose union has the best score. As a list of merges that is: every way to cut
an entry into two others, those of the best entry first; among the ways to cut one entry, or entries of equal
score, those with the longest left part first. It is the order in which published tokenizer.json files have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


def score_merges(
    vocab: Mapping[str, int], mergeable: Iterable[str], scores: NDArray[np.floating], closed: frozenset[str]
) -> list[tuple[str, str]]:
    """Return the merges, the first to be done first.

    Args:
        vocab: id by entry.
        mergeable: the entries that others may be joined to, in the order of their ids.
        scores: one an id.
        closed: entries that are never a part of another: bytes, control tokens.
    """
    wholes: list[str] = []
    lefts: list[int] = []
    parts = vocab.keys() - closed
    for entry in mergeable:
        for size in range(1, len(entry)):
            if entry[:size] in parts and entry[size:] in parts:
                wholes.append(entry)
                lefts.append(size)
    left = np.array(lefts, np.int32)
    score = scores[np.fromiter(map(vocab.__getitem__, wholes), np.intp, len(wholes))]
    length = np.fromiter(map(len, wholes), np.int32, len(wholes))
    order = np.lexsort((left - length, -left, -score)).tolist()
    return [(wholes[n][: lefts[n]], wholes[n][lefts[n] :]) for n in order]
