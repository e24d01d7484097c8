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
    pairs: list[tuple[str, str]] = []
    whole: list[int] = []
    parts = vocab.keys() - closed
    for entry in mergeable:
        for size in range(1, len(entry)):
            left = entry[:size]
            if left in parts:
                right = entry[size:]
                if right in parts:
                    pairs.append((left, right))
                    whole.append(vocab[entry])
    lefts = np.fromiter((len(left) for left, _ in pairs), np.int32, len(pairs))
    rights = np.fromiter((len(right) for _, right in pairs), np.int32, len(pairs))
    order = np.lexsort((-rights, -lefts, -scores[whole])) if pairs else np.zeros(0, np.intp)
    return [pairs[n] for n in order.tolist()]
