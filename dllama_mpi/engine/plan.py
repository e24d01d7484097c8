"""A step as the scheduler plans it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..model.batch import Batch
from .sequence import Sequence


@dataclass(frozen=True)
class Plan:
    """A step's batch, and the sequences whose logits it wants, one a logit row.

    Attributes:
        fed: how many tokens of which sequence the batch holds, drafts left out.
        drafts: for each logit row the token drafted to follow, which the next row's token is; -1 for none.
        prompt: prompt tokens in the batch. generating: sequences in it that are past their prompts.
        scored, pooled: whose the next logit rows are: some that score the prompt's next token, then some of which the
            hidden state is wanted.
    """

    batch: Batch
    sequences: list[Sequence]
    fed: tuple[tuple[Sequence, int], ...] = ()
    drafts: tuple[int, ...] = ()
    prompt: int = 0
    generating: int = 0
    scored: tuple[Sequence, ...] = ()
    pooled: tuple[Sequence, ...] = ()

    @property
    def is_prefill(self) -> bool:
        """Whether it feeds prompts."""
        return self.prompt > 0

    def commit(self) -> None:
        """Count the batch's tokens as computed, once the step has been carried out; drafts are not counted yet."""
        for sequence, count in self.fed:
            sequence.computed += count


@dataclass
class Packing:
    """A step that is being put together."""

    columns: tuple[list[int], ...] = field(default_factory=lambda: ([], [], [], []))
    rows: list[int] = field(default_factory=list)
    wanted: list[Sequence] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    fed: list[tuple[Sequence, int]] = field(default_factory=list)
    granted: set[Sequence] = field(default_factory=set)
    prompt: int = 0
    generating: int = 0
    scored: list[tuple[int, Sequence]] = field(default_factory=list)  # with their rows
    pooled: list[tuple[int, Sequence]] = field(default_factory=list)

    def add(self, s: Sequence, count: int, drafts: list[int]) -> None:
        """Feed `count` tokens of a sequence, and drafts if those are all that is left."""
        positions = range(s.computed, s.computed + count + len(drafts))
        ids, where, slots, lengths = self.columns
        ids += [*s.tokens[positions.start : positions.start + count], *drafts]
        where += positions
        slots += [s.slot] * len(positions)
        lengths += [max(s.prompt_length, p + 1) for p in positions]
        self.fed.append((s, count))
        self.granted.add(s)
        s.drafted += len(drafts)
        if s.is_reading:
            self.prompt += count
        else:
            self.generating += 1
        told = s.wanted_of(positions)
        kind = self.pooled if s.request.pooling is not None else self.scored
        kind += [(len(ids) - len(positions) + p - positions.start, s) for p in told]
        if count == s.left and s.generates:
            self.rows += range(len(ids) - 1 - len(drafts), len(ids))
            self.wanted += [s] * (1 + len(drafts))
            self.drafts += [*drafts, -1]
