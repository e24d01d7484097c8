"""Where each rank's weights come from: files that its host has, its host's cache, or the root."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ..errors import ModelError
from ..log import say, warn
from ..model.build import check_files
from ..model.config import ModelConfig
from ..model.recipe import slice_parts
from ..parallel.group import TensorParallelGroup
from ..parallel.partition import Shard
from ..parallel.stream import together_at_rest
from ..progress import Progress
from ..weights.cache import NoRoom, SliceWriter, WeightCache, remove
from ..weights.checkpoint import name_of
from ..weights.slice_tensors import DamagedSlice
from ..weights.slices import Manifest, SliceCheckpoint, SliceInMemory
from ..weights.source import WeightSource
from ..weights.transfer import receive_slice, send_slices
from .opening import ModelFiles, has_weights, open_folder

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


def manifest_of(files: ModelFiles, weights: str | None, shard: Shard, ranks: int) -> Manifest:
    """Return what slices of the root's model are made of; shard: any rank's.

    Raises:
        ModelError: the root has slices alone, and they are of other formats than are wanted.
    """
    formats, source = files.formats(weights), files.source
    if source is None:
        first = files.slices[0]
        return Manifest(first.model, formats, first.lineage(formats), "")
    if ranks == 1:
        return Manifest(source.folder.name, formats, "", "")  # nobody to compare with
    return Manifest.of(source, formats, slice_parts(files.config, shard))


@dataclass(frozen=True)
class Wanted:
    """What is to be placed: a model, in which formats, and each rank's shard of it.

    Attributes:
        folder: where a model may lie on this host. manifest: what slices are made of. split: as the user gave it.
    """

    folder: Path
    config: ModelConfig
    manifest: Manifest
    shards: Sequence[Shard]
    split: str | None


class Placement:
    """This rank's weights: found or to be received. A context manager, which cleans up after an error.

    Attributes:
        origins: every rank's, once shared. source: what this rank loads from; None while it is to be received.
    """

    def __init__(
        self,
        group: TensorParallelGroup,
        wanted: Wanted,
        opened: ModelFiles | None,
        cache: WeightCache | None,
        quiet: bool,
    ) -> None:
        """Look for this rank's weights. Collective.

        Args:
            opened: what is in the folder, on the root. cache: None to keep what is received in memory.

        Raises:
            ModelError: some rank has no weights, and the root cannot send them.
        """
        self._group, self._wanted, self._cache, self._quiet = group, wanted, cache, quiet
        self._folder, self._manifest = wanted.folder, wanted.manifest
        self._parts = [slice_parts(wanted.config, shard) for shard in wanted.shards]
        self._key = self._manifest.key(self._parts[group.rank])
        self._sink: SliceWriter | SliceInMemory | None = None
        self.source: WeightSource | None = None
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
        return slice_owner(rank, self._group.size, self._wanted.split)

    def _look(self, opened: ModelFiles | None) -> None:
        if opened is not None and opened.source is not None:
            self.source = opened.source
        elif opened is not None:
            self.source = self._own(opened.slices)
            self.origin = Origin(SLICE)
            if self.source is None:
                raise ModelError(self._of_others(opened.slices))
        else:
            self._look_on_worker()

    def _own(self, slices: Sequence[SliceCheckpoint]) -> SliceCheckpoint | None:
        return next((s for s in slices if s.key == self._key), None)

    def _of_others(self, slices: Sequence[SliceCheckpoint]) -> str:
        held = "; ".join(s.about for s in slices)
        return (
            f"{self._folder} holds no weights for {self._about(self._group.rank)}, but the slice of {held}; run with"
            " that number of ranks and that --split, or give the whole model"
        )

    def _look_on_worker(self) -> None:
        problem = ""
        try:
            found = open_folder(self._folder, self._wanted.config)
            if found.source is not None:
                check_files(found.source, self._wanted.config)
                if found.source.lineage(self._manifest.formats) == self._manifest.lineage:
                    self.source = found.source
                    return
                problem = f"{self._folder} holds other files than rank 0's"
            elif own := self._own(found.slices):
                self.source, self.origin = own, Origin(SLICE)
                return
            else:
                problem = self._of_others(found.slices)
        except ModelError as error:
            if has_weights(self._folder):
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
        elif self._manifest.table:
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
        file = self._manifest.file(self._parts[self._group.rank], self._about(self._group.rank))
        if self._cache is not None:
            label = f"{self._manifest.model}-{name_of(self._manifest.formats)}-{self._group.rank}of{self._group.size}"
            try:
                self._sink = self._cache.create(file, self._key, label)
                self.origin = Origin(RECEIVED, file.size)
                return
            except NoRoom as error:
                self._notes.append(f"no room in the cache ({error}); the weights are kept in memory alone")
        self._sink = SliceInMemory(file, self._manifest, self._parts[self._group.rank])
        table = next(entry.size for entry in file.entries if not entry.ranges and entry.origin)
        self.origin = Origin(RECEIVED, file.size, table)

    # ---- fetching

    def load(self, build: Callable[[WeightSource], T]) -> T:
        """Receive what is missing, build on it and return that. Collective.

        A slice that turns out to be damaged is received anew, if the root has the whole model.

        Raises:
            ModelError: what the root or this rank reads cannot be read, or not written. MemoryError.
        """
        built: T | None = None
        started, others = time.perf_counter(), self._group.is_root and self._group.size > 1
        with Progress("waiting for the weights of other ranks", show=others and not self._quiet):
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
            assert self.source is not None
            files = {r: self._manifest.file(self._parts[r], self._about(r)) for r in asking}
            return send_slices(self.source, files, self._group, not self._quiet)
        if self._sink is not None:
            file = self._manifest.file(self._parts[rank], self._about(rank))
            self.source = receive_slice(file, self._sink, self._group)
            if self.source is None:
                return False
            self._sink = None
        return True

    def _replace(self, error: DamagedSlice, attempt: int) -> None:
        """Give up a damaged slice and ask for another, or raise the error if that cannot help."""
        if attempt or self._group.is_root or not self._manifest.table:
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
        phrases.append(
            {
                READ: f"{who} read {folder}",
                SLICE: f"{who} read {'its slice' if len(ranks) == 1 else 'their slices'} in {folder}",
                CACHE: f"{who} from {'its' if len(ranks) == 1 else 'their'} cache",
                RECEIVED: f"{who} received {received} from rank 0" + (", kept in memory" if in_memory else ""),
            }[how]
        )
    return phrases
