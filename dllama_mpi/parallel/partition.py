"""Who holds what: pure arithmetic over contiguous ranges, no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError

Range = tuple[int, int]


def cut(units: int, shares: Sequence[float], least: int = 0) -> list[Range]:
    """Cut range(units) into contiguous ranges in proportion to `shares`, each of at least `least` units.

    Every rank gets the whole part of its share; units left over go to the largest remainders (largest-remainder
    method), lower ranks first on ties.

    Raises:
        UsageError: `least` units for everybody are more than there are.
    """
    if least * len(shares) > units:
        raise UsageError(f"{units} units cannot be cut into {len(shares)} parts of at least {least}")
    total, free = sum(shares), units - least * len(shares)
    ideal = [max(0.0, units * s / total - least) for s in shares]
    scale = free / sum(ideal) if sum(ideal) > 0 else 0.0
    exact = [i * scale for i in ideal]
    sizes = [int(e + 1e-9) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda r: (sizes[r] - exact[r], r))
    for rank in by_remainder[: free - sum(sizes)]:
        sizes[rank] += 1
    ranges, start = [], 0
    for size in sizes:
        ranges.append((start, start + least + size))
        start += least + size
    return ranges


@dataclass(frozen=True)
class Shard:
    """One rank's part of every layer, as ranges of the whole model.

    Attributes:
        heads: query heads.
        kv_heads: the KV heads those query heads read; a KV head cut between two ranks lives on both.
        intermediate: MLP columns, from a multiple of 32; the last rank's may end short of one.
        vocab: rows of the lm_head, from a multiple of 16.
    """

    heads: Range
    kv_heads: Range
    intermediate: Range
    vocab: Range


def shards(
    num_heads: int, num_kv_heads: int, intermediate_size: int, vocab_size: int, shares: Sequence[float]
) -> list[Shard]:
    """Return every rank's shard.

    Heads are cut in units of one, so that every rank has one; MLP columns in units of 32 (a quantised block);
    the vocabulary in units of 16 rows (a tile). A rank may hold no MLP column or no vocabulary row at all.

    Raises:
        UsageError: more ranks than query heads.
    """
    if len(shares) > num_heads:
        raise UsageError(f"num_attention_heads is {num_heads}; {len(shares)} ranks asked for; use at most {num_heads}")
    group = num_heads // num_kv_heads
    heads = cut(num_heads, shares, least=1)
    columns = cut(-(-intermediate_size // 32), shares)
    rows = cut(-(-vocab_size // 16), shares)
    return [
        Shard(
            heads=h,
            kv_heads=(h[0] // group, -(-h[1] // group)),
            intermediate=(min(c[0] * 32, intermediate_size), min(c[1] * 32, intermediate_size)),
            vocab=(min(v[0] * 16, vocab_size), min(v[1] * 16, vocab_size)),
        )
        for h, c, v in zip(heads, columns, rows, strict=True)
    ]


AUTO = "auto"  # as --split: shares by measured speed


def parse_split(text: str | None, size: int) -> list[float]:
    """Return the ranks' shares from `--split 3,1,1` (None: equal shares).

    Raises:
        UsageError: not positive numbers, or not one for each rank.
    """
    if text is None:
        return [1.0] * size
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < s < float("inf") for s in shares):
        raise UsageError(f"--split {text}: give positive numbers separated by commas, for example 3,1,1, or auto")
    if len(shares) != size:
        raise UsageError(f"--split {text} has {len(shares)} shares; the job has {size} ranks; give {size}")
    return shares
