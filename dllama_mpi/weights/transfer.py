"""Slices on their way: the root reads, quantises and sends them; a rank that has none writes down what comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from ..errors import ClusterError
from ..parallel.group import TensorParallelGroup
from ..parallel.stream import Inbox, Outbox
from ..progress import progress_bytes
from .files import Entry, File
from .slices import CHECKSUMS, STREAM_BYTES, Checksums, SliceReader
from .source import WeightSource


class Sink(Protocol):
    """Where a received slice goes: `cache.SliceWriter` or `slices.SliceInMemory`."""

    def write(self, entry: Entry, start: int, data: np.ndarray) -> None:
        """Take the next bytes (n,) uint8 of an entry."""

    def finish(self) -> WeightSource:
        """Return the slice as it is loaded from, now that it is whole."""

    def discard(self) -> None:
        """Remove what has come."""


def send_slices(
    source: WeightSource, files: Mapping[int, File], group: TensorParallelGroup, show_progress: bool
) -> bool:
    """Send each rank in `files` its slice; return whether all of them took it. Root only.

    Tensor by tensor, so that each is read from the disk once; a few MB are held at a time.

    Raises:
        ModelError: the source cannot be read; the receivers are told.
    """
    readers = {rank: SliceReader(source, file) for rank, file in files.items()}
    outbox, done = Outbox(group, files), False

    def work() -> Iterator[int]:
        for index in range(len(next(iter(files.values())).entries)):
            for rank, reader in readers.items():
                for _, _, data in reader.read(index):
                    outbox.send(rank, data)
                    yield len(data)
            if outbox.stopped() is not None:
                return
        nonlocal done
        done = True

    names = ", ".join(str(rank) for rank in files)
    what = f"weights to rank{'s' if len(files) > 1 else ''} {names}"
    total = sum(file.size - len(file.header) for file in files.values())
    try:
        for _ in progress_bytes(work(), what, show_progress, total):
            pass
    finally:
        outbox.close(failed=not done)
    return done


def receive_slice(file: File, sink: Sink, group: TensorParallelGroup) -> WeightSource | None:
    """Take this rank's slice from the root; None if the root could not send all of it. Not on the root.

    Raises:
        ModelError: the sink takes no more. ClusterError: other bytes came than were sent.
    """
    inbox, sums = Inbox(group), Checksums(file)
    places = [(entry, piece.start, piece.size) for entry in file.entries for piece in entry.pieces(STREAM_BYTES)]
    came, refused = 0, None
    sent = np.zeros(0, np.uint32)
    for (entry, start, size), data in zip(places, inbox.pieces(size for _, _, size in places), strict=False):
        came += size
        if refused is not None:
            continue
        if entry.name == CHECKSUMS:
            sent = np.append(sent, data.view(np.uint32))
        else:
            sums.add(entry, start, data)
        try:
            sink.write(entry, start, data)
        except Exception as error:
            refused = error
            inbox.stop()
    if refused is not None:
        raise refused
    if came < sum(size for _, _, size in places):
        return None
    if not np.array_equal(sent, sums.values):
        raise ClusterError(f"rank {group.rank} on {group.host} received other bytes than were sent; start again")
    return sink.finish()
