"""Memory that the ranks of one host share: a file that has no name any more."""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_FOLDERS = ("/dev/shm", tempfile.gettempdir())
_HEADER = 64  # bytes before what is shared: a cache line


def share(comm: Any, hosts: list[str], size: int) -> np.ndarray | None:
    """Return `size` zero bytes that all ranks with this rank's host name share, or None where that does not work.

    Collective over all ranks. A host's ranks all get the memory or none of them does: hosts of the same name, ranks in
    different containers and full file systems are told apart by a word that the first rank writes. Alone, a rank
    gets None.
    """
    host, first = hosts[comm.rank], hosts.index(hosts[comm.rank])
    path, word, memory = None, secrets.token_bytes(16), None
    if comm.rank == first and hosts.count(host) > 1:
        path, memory = _create(size, word)
    path, word = comm.allgather((path, word))[first]
    if comm.rank != first and path is not None:
        memory = _open(path, size, word)
    fine = comm.allgather(memory is not None)
    if comm.rank == first and path is not None:
        Path(path).unlink(missing_ok=True)
    if memory is None or not all(ok for ok, name in zip(fine, hosts, strict=True) if name == host):
        return None
    return memory[_HEADER:]


def _create(size: int, word: bytes) -> tuple[str | None, np.ndarray | None]:
    for folder in _FOLDERS:
        path = os.path.join(folder, f"dllama_mpi-{os.getpid()}-{secrets.token_hex(8)}")
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            continue
        try:
            os.ftruncate(file, size + _HEADER)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size + _HEADER)  # a full file system says so now, not by a signal later
            os.pwrite(file, word, 0)
            return path, np.frombuffer(mmap.mmap(file, size + _HEADER), np.uint8)
        except OSError:
            os.unlink(path)
        finally:
            os.close(file)
    return None, None


def _open(path: str, size: int, word: bytes) -> np.ndarray | None:
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if os.pread(file, 16, 0) != word:
            return None
        return np.frombuffer(mmap.mmap(file, size + _HEADER), np.uint8)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
