"""Run by every rank: convert a model to q40 in files of at most 15 kB, so that a tiny one fills several.

usage: convert_job.py SOURCE DESTINATION [HOW], a disturbance of rank 1: "elsewhere" (it writes where others do not),
"other source", "full disk" (no file may grow past 10 kB), "fault" (of the program)
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dllama_mpi.model.recipe import WeightRecipe, whole_parts
from dllama_mpi.parallel.group import connect
from dllama_mpi.startup.opening import open_model
from dllama_mpi.weights import convert as module
from dllama_mpi.weights import files, partial


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Let no file grow past 10 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail(*args: Any) -> None:
    """Raise what nobody expects."""
    raise RuntimeError("injected")


def main() -> None:
    source, destination, group = Path(sys.argv[1]), Path(sys.argv[2]), connect()
    how = sys.argv[3] if len(sys.argv) > 3 and group.rank == 1 else ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(module, "_FILE_BYTES", 15_000))
        if how == "elsewhere":
            stack.enter_context(patch.object(partial, "_SECONDS_TO_APPEAR", 0.2))
            destination = destination / "not" / "shared"
        if how == "other source":
            source = source.with_name("other")
        if how == "fault":
            stack.enter_context(patch.object(files, "load_matrix", fail))
        if how == "full disk":
            stack.enter_context(small_disk())
        opened = open_model(str(source), check=False)
        formats = WeightRecipe.parse("q40").formats(opened.config)
        module.convert(module.Conversion(opened.whole, formats, whole_parts(opened.config), True), destination, group)
    assert destination.is_dir()


if __name__ == "__main__":
    main()
