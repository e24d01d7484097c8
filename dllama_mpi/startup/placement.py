"""Where each rank's weights come from: files that its host has, its host's cache, or the root."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ..errors import ModelError
from ..kernels.layout import FORMATS
from ..log import say, warn
from ..model.config import ModelConfig
from ..model.names import check_files, slice_parts, vector_shapes
from ..parallel.group import TensorParallelGroup
from ..parallel.partition import Shard
from ..parallel.stream import together_at_rest
from ..weights.cache import NoRoom, SliceWriter, WeightCache, remove
from ..weights.checkpoint import Checkpoint
from ..weights.files import TABLE
from ..weights.slices import DamagedSlice, Recipe, SliceCheckpoint, SliceInMemory, slices_in
from ..weights.transfer import receive_slice, send_slices

T = TypeVar("T")
READ, SLICE, CACHE, RECEIVED = "read", "slice", "cache", "received"


@dataclass(frozen=True)
class Origin:
    """Where a rank's weights come from.

    Attributes:
        how: "read" (a whole model's files), "slice" (its own slice's), "cache" or "received" (from the root).
        received: bytes that were sent. in_memory: of them, bytes of the embedding table that no file holds.
    """

    how: str
    received: int = 0
    in_memory: int = 0


def open_folder(folder: Path) -> Checkpoint | list[SliceCheckpoint]:
    """Open a model directory: a whole model's files, or slices of one.

    Raises:
        ModelError: there is neither, or a file is damaged.
    """
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return Checkpoint(folder)
    return slices_in(folder) or Checkpoint(folder)


def recipe_of(
    opened: Checkpoint | list[SliceCheckpoint], config: ModelConfig, weights: str | None, ranks: int
) -> Recipe:
    """Return what slices of the root's model are made of.

    Raises:
        ModelError: the root has slices alone, and they are of another format than is wanted.
    """
    if isinstance(opened, Checkpoint):
        fmt = FORMATS[weights or opened.format_name or "q40"]
        if ranks == 1:
            return Recipe(opened.folder.name, fmt, "", None)  # nobody to compare with
        return Recipe.of(opened, fmt, vector_shapes(config))
    first = opened[0]
    if weights is not None and weights != first.format_name:
        raise ModelError(
            f"{first.path} holds {first.format_name}; {weights} weights are asked for; leave out --weights, or give"
            " the whole model"
        )
    fmt = FORMATS[first.format_name or ""]
    return Recipe(first.model, fmt, first.lineage(fmt), None)


class Placement:
    """This rank's weights: found or to be received. A context manager, which cleans up after an error.

    Attributes:
        origins: every rank's, once shared. source: what this rank loads from; None while it is to be received.
    """

    def __init__(
        self,
        group: TensorParallelGroup,
        folder: Path,
        opened: Checkpoint | list[SliceCheckpoint] | None,
        config: ModelConfig,
        recipe: Recipe,
        shards: Sequence[Shard],
        split: str | None,
        cache: WeightCache | None,
        quiet: bool,
    ) -> None:
        """Look for this rank's weights. Collective.

        Args:
            folder: where a model may lie on this host. opened: what is in it, on the root.
            split: as the user gave it. cache: None to keep what is received in memory.

        Raises:
            ModelError: some rank has no weights, and the root cannot send them.
        """
        self._group, self._folder, self._config, self._recipe = group, folder, config, recipe
        self._parts = [slice_parts(config, shard) for shard in shards]
        self._split, self._cache, self._quiet = split, cache, quiet
        self._key = recipe.key(self._parts[group.rank])
        self._sink: SliceWriter | SliceInMemory | None = None
        self.source: Checkpoint | None = None
        self.origin = Origin(READ)
        self.origins: list[Origin] = []
        self._notes: list[str] = []
        with group.together():
            self._look(opened)
        self._share(self.origin)

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            self._sink.discard()
            self._sink = None

    def _share(self, origin: Origin) -> None:
        """Tell all ranks where this one's weights come from, and the root what is to be said of it. Collective."""
        seen = self._group.allgather((origin, self._notes))
        self._notes = []
        self.origins = [each for each, _ in seen]
        if self._group.is_root and not self._quiet:
            for rank, (_, notes) in enumerate(seen):
                for note in notes:
                    warn(f"rank {rank} on {self._group.hosts[rank]}: {note}")

    # ---- looking

    def _about(self, rank: int) -> str:
        return slice_owner(rank, self._group.size, self._split)

    def _look(self, opened: Checkpoint | list[SliceCheckpoint] | None) -> None:
        if isinstance(opened, Checkpoint):
            self.source = opened
        elif opened is not None:
            self.source = self._own(opened)
            self.origin = Origin(SLICE)
            if self.source is None:
                raise ModelError(self._of_others(opened))
        else:
            self._look_on_worker()

    def _own(self, slices: list[SliceCheckpoint]) -> SliceCheckpoint | None:
        return next((s for s in slices if s.key == self._key), None)

    def _of_others(self, slices: list[SliceCheckpoint]) -> str:
        held = "; ".join(s.about for s in slices)
        return (
            f"{self._folder} holds no weights for {self._about(self._group.rank)}, but the slice of {held}; run with"
            " that number of ranks and that --split, or give the whole model"
        )

    def _look_on_worker(self) -> None:
        problem = ""
        try:
            found = open_folder(self._folder)
            if isinstance(found, Checkpoint):
                check_files(found, self._config)
                if found.lineage(self._recipe.format) == self._recipe.lineage:
                    self.source = found
                    return
                problem = f"{self._folder} holds other files than rank 0's"
            elif own := self._own(found):
                self.source, self.origin = own, Origin(SLICE)
                return
            else:
                problem = self._of_others(found)
        except ModelError as error:
            if any(self._folder.glob("*.safetensors")):
                problem = str(error)
        self._look_in_cache(problem)

    def _look_in_cache(self, problem: str) -> None:
        if self._cache is not None:
            try:
                self.source = self._cache.find(self._key)
            except ModelError as error:
                self._notes.append(f"{error}; it is received anew")
        if self.source is not None:
            self.origin = Origin(CACHE)
        elif self._recipe.dtypes is not None:
            self._ask()
            if problem:
                self._notes.append(f"{problem}; the weights are received from rank 0")
        else:
            raise ModelError(
                problem
                or f"no weights in {self._folder}, and rank 0 has but its own slice to read; give this host the slice"
                f" of {self._about(self._group.rank)} (convert --only), or rank 0 the whole model"
            )

    def _ask(self) -> None:
        """Make ready to receive: into the cache if that has room, else into memory."""
        file = self._recipe.file(self._parts[self._group.rank], self._about(self._group.rank))
        if self._cache is not None:
            label = f"{self._recipe.model}-{self._recipe.format.name}-{self._group.rank}of{self._group.size}"
            try:
                self._sink = self._cache.create(file, self._key, label)
                self.origin = Origin(RECEIVED, file.size)
                return
            except NoRoom as error:
                self._notes.append(f"no room in the cache ({error}); the weights are kept in memory alone")
        self._sink = SliceInMemory(file, self._recipe)
        table = next(entry.size for entry in file.entries if entry.name == TABLE)
        self.origin = Origin(RECEIVED, file.size, table)

    # ---- fetching

    def load(self, build: Callable[[Checkpoint], T]) -> T:
        """Receive what is missing, build on it and return that. Collective.

        A slice that turns out to be damaged is received anew, if the root has the whole model.

        Raises:
            ModelError: what the root or this rank reads cannot be read, or not written. MemoryError.
        """
        built: T | None = None
        started = time.perf_counter()
        for attempt in range(2):
            with together_at_rest(self._group):
                if self._fetch() and built is None and self.source is not None:
                    try:
                        built = build(self.source)
                    except DamagedSlice as error:
                        self._replace(error, attempt)
            if all(self._group.allgather(built is not None)):
                break
            self._share(self.origin if built is None else replace(self.origin, received=0))
        assert built is not None
        self._tell(time.perf_counter() - started)
        return built

    def _fetch(self) -> bool:
        """Send or receive; return whether it was done to the end."""
        rank = self._group.rank
        if self._group.is_root:
            asking = [r for r, origin in enumerate(self.origins) if origin.received]
            if not asking:
                return True
            assert isinstance(self.source, Checkpoint)
            files = {r: self._recipe.file(self._parts[r], self._about(r)) for r in asking}
            return send_slices(self.source, self._recipe.format, files, self._group, not self._quiet)
        if self._sink is not None:
            file = self._recipe.file(self._parts[rank], self._about(rank))
            self.source = receive_slice(file, self._sink, self._group)
            if self.source is None:
                return False
            self._sink = None
        return True

    def _replace(self, error: DamagedSlice, attempt: int) -> None:
        """Give up a damaged slice and ask for another, or raise the error if that cannot help."""
        if attempt or self._group.is_root or self._recipe.dtypes is None:
            raise error
        self._notes.append(f"{error}; it is received anew")
        if self.origin.how != SLICE and isinstance(self.source, SliceCheckpoint):
            remove(self.source.path)
        self.source = None
        self._ask()

    # ---- telling

    def _tell(self, seconds: float) -> None:
        """Say in one line where the weights came from, unless all ranks read the same files."""
        if self._quiet or not self._group.is_root or all(origin.how == READ for origin in self.origins):
            return
        say(f"weights: {', '.join(told(self.origins, self._group.hosts, self._folder))} ({seconds:.1f} s)")


def slice_owner(rank: int, ranks: int, split: str | None) -> str:
    """Return whose slice it is, for people."""
    return f"rank {rank} of {ranks}" + (f" with --split {split}" if split is not None else "")


def told(origins: Sequence[Origin], hosts: Sequence[str], folder: Path) -> list[str]:
    """Return where the weights of the ranks came from; neighbours of whom the same is to be said share a phrase."""

    def kind(rank: int) -> tuple[str, str, bool]:
        origin = origins[rank]
        return origin.how, "" if origin.how == READ else hosts[rank], origin.in_memory > 0

    phrases = []
    for (how, host, in_memory), group in itertools.groupby(range(len(origins)), kind):
        ranks = list(group)
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        who += f" on {host}" if host else ""
        size = sum(origins[rank].received for rank in ranks)
        received = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
        phrases.append({
            READ: f"{who} read {folder}",
            SLICE: f"{who} read {'its slice' if len(ranks) == 1 else 'their slices'} in {folder}",
            CACHE: f"{who} from {'its' if len(ranks) == 1 else 'their'} cache",
            RECEIVED: f"{who} received {received} from rank 0" + (", kept in memory" if in_memory else ""),
        }[how])  # fmt: skip
    return phrases
