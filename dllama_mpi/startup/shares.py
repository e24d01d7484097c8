"""Shares of the model for unlike machines: in proportion to their speeds, as far as their memory goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..kernels.layout import BLOCK, PAGE, ceil_to, pages_over
from ..model.buffers import Buffers, Sizes, memory_bytes, position_bytes
from ..model.config import ModelConfig
from ..model.recipe import weight_bytes
from ..model.tensors import axes
from ..parallel.collective.memory import all_reduce_bytes
from ..parallel.partition import Shard, shards
from .memory import LEAST_POSITIONS, Need, Wish, usable_bytes
from .options import Kept

CHECKPOINTS = 4  # places for states besides those of running sequences, so that texts that begin alike share them
_ROUNDS = 400  # of fitting; each makes some host's share at least a hundredth smaller
_STEP = 0.99
_SPEED_STEP = 1.1
_GOOD_POSITIONS = 4096  # for which memory is kept free if the user names no number, where there is enough


def shards_of(config: ModelConfig, shares: Sequence[float]) -> list[Shard]:
    """Return every rank's shard of a model.

    Raises:
        UsageError: more ranks than heads.
    """
    return shards(axes(config), shares)


def most_ranks(config: ModelConfig) -> int:
    """Return the most ranks that a model can be cut for."""
    return min((axis.units // axis.least for axis, _ in axes(config) if axis.least), default=config.vocab_size)


@dataclass(frozen=True)
class MemoryPlan:
    """What decides how much memory ranks need.

    Attributes:
        tokens: most in a step. sequences: at once. max_seq_len: positions that the user insists on, or None.
        kv_bytes: of each rank's KV cache, or None for what the sequences can need.
    """

    config: ModelConfig
    kept: Kept
    tokens: int
    sequences: int = 1
    max_seq_len: int | None = None
    kv_bytes: int | None = None

    @property
    def wanted(self) -> int:
        """Positions that the context should have."""
        return self.max_seq_len or self.config.max_position_embeddings

    @property
    def wish(self) -> Wish:
        """What the KV cache should hold."""
        return Wish(self.wanted, self.max_seq_len is not None, self.sequences, self.kv_bytes)

    @property
    def slots(self) -> int:
        """Places for states: of sequences at once, and checkpoints."""
        return self.sequences + CHECKPOINTS * self.config.has_state

    @property
    def window_pages(self) -> int:
        """Pages of layers with a window that a sequence keeps at most; 0: no layer has one."""
        window = self.config.window
        return pages_over(window - 1 + self.tokens) if window else 0

    def needs(self, parts: Sequence[Shard], hosts: Sequence[tuple[str, int]]) -> list[Need]:
        """Return every rank's need, given its shard, its host's name and the bytes that host has free."""
        names = [host for host, _ in hosts]
        return [
            self.need(part, host, self.fixed(part, names), free)
            for part, (host, free) in zip(parts, hosts, strict=True)
        ]

    def need(self, part: Shard, host: str = "", fixed: int = 0, free: int = 0) -> Need:
        """Return a rank's need of KV cache, and of what else is given."""
        each, near = position_bytes(self.config, part, self.kept.kv_type)
        return Need(host, fixed, each, free, near, self.window_pages)

    def fixed(self, part: Shard, hosts: Sequence[str]) -> int:
        """Return the bytes of a rank's weights, buffers and states; hosts: of each rank."""
        return sum(self.parts(part, hosts, 0).values())

    def parts(self, part: Shard, hosts: Sequence[str], positions: int) -> dict[str, int]:
        """Return the bytes of what a rank holds, with pages for so many positions of a text; hosts: of each rank."""
        once, _ = memory_bytes(self.config, part, self.kept.kv_type)
        return {
            "weights": weight_bytes(self.config, part, self.kept.formats),
            "kv_cache": self.need(part).cache(ceil_to(positions, PAGE)),
            "states": once * self.slots,
            "buffers": self.buffers(part, hosts),
        }

    def buffers(self, part: Shard, hosts: Sequence[str]) -> int:
        """Return the bytes of a rank's buffers; hosts: of each rank."""
        kept, width = self.kept, ceil_to(self.config.hidden_size, BLOCK)
        own = Buffers(self.config, part, kept.formats, Sizes(self.tokens, self.slots, 0, kept.kv_type)).scratch_bytes()
        here = list(hosts).count(hosts[part.rank])
        return own + all_reduce_bytes(len(hosts), here, len(set(hosts)), self.tokens, width, kept.payload)

    def shares(self, speeds: Sequence[float], hosts: Sequence[tuple[str, int]]) -> tuple[list[float], set[str]]:
        """Return shares by the ranks' speeds that fit into their hosts' memory; see `fitting_shares`."""
        lengths = [self.max_seq_len] if self.max_seq_len else [_GOOD_POSITIONS, LEAST_POSITIONS]
        positions = [ceil_to(min(self.wanted, length), PAGE) for length in lengths]
        return fitting_shares(speeds, positions, lambda shares: self.needs(shards_of(self.config, shares), hosts))


def steady(speeds: Sequence[float]) -> list[float]:
    """Return speeds rounded to steps of a tenth below the fastest, so that a little noise changes no share.

    Equal machines get equal shares then, and weights that were cut for a rank once fit again.
    """
    fastest = max(speeds)
    return [fastest * _SPEED_STEP ** round(math.log(speed / fastest, _SPEED_STEP)) for speed in speeds]


def split_line(hosts: Sequence[str], speeds: Sequence[float], shares: Sequence[float], bound: set[str]) -> str:
    """Return one line that says what was measured of each rank and which share it got."""
    each = [
        f"rank {rank} on {host} {speed / 1e9:.1f} GB/s: {share:.0%}" + (" (all its memory holds)" * (host in bound))
        for rank, (host, speed, share) in enumerate(zip(hosts, speeds, shares, strict=True))
    ]
    return f"split auto: {', '.join(each)}"


def fitting_shares(
    speeds: Sequence[float], positions: Sequence[int], needs_of: Callable[[list[float]], list[Need]]
) -> tuple[list[float], set[str]]:
    """Return the ranks' shares, which sum to 1, and the hosts that got less than their speed's for want of memory.

    Shares are proportional to speeds; a host whose ranks then need more memory than it has gets as much as fits, and
    the others take the rest in proportion. The same result wherever it is computed. Where nothing fits the shares are
    the proportional ones, for the memory check to refuse.

    speeds: of each rank, above 0. positions: lengths of the context to make fit, the first that can be. needs_of: every
    rank's need for given shares.
    """
    for length in positions:
        found = _fitted(speeds, length, needs_of)
        if found is not None:
            return found
    return _limited(speeds, {}, [""] * len(speeds)), set()


def _fitted(
    speeds: Sequence[float], positions: int, needs_of: Callable[[list[float]], list[Need]]
) -> tuple[list[float], set[str]] | None:
    limits: dict[str, float] = {}
    hosts = [need.host for need in needs_of([1 / len(speeds)] * len(speeds))]
    for _ in range(_ROUNDS):
        shares = _limited(speeds, limits, hosts)
        needs, is_over = needs_of(shares), False
        for host in dict.fromkeys(hosts):
            own = [need for need in needs if need.host == host]
            needed, room = sum(n.fixed + n.cache(positions) for n in own), usable_bytes(own)
            if needed > room:
                is_over = True
                held = sum(share for share, name in zip(shares, hosts, strict=True) if name == host)
                limits[host] = held * min(_STEP, max(0.5, room / needed))
        if not is_over:
            return shares, set(limits)
        if len(limits) == len(set(hosts)) and sum(limits.values()) < 1:
            return None
    return None


def _limited(speeds: Sequence[float], limits: dict[str, float], hosts: Sequence[str]) -> list[float]:
    """Return shares in proportion to speeds, but for hosts with limits, whose ranks share that."""
    by_host: dict[str, float] = {}
    for speed, host in zip(speeds, hosts, strict=True):
        by_host[host] = by_host.get(host, 0.0) + speed
    bound: dict[str, float] = {}
    while True:
        left, rate = 1 - sum(bound.values()), sum(s for host, s in by_host.items() if host not in bound)
        over = [h for h in limits if h not in bound and rate > 0 and left * by_host[h] / rate > limits[h]]
        if not over:
            break
        bound.update({host: limits[host] for host in over})
    given = {host: bound.get(host, left * speed / rate if rate > 0 else 0.0) for host, speed in by_host.items()}
    total = sum(given.values())
    return [given[host] / total * speed / by_host[host] for speed, host in zip(speeds, hosts, strict=True)]
