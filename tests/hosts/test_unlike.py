"""Ranks of one job on unlike hosts: other sources, instruction sets, numbers of cores, and memory."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.jobs import HERE, job, offered, text
from tests.mpi.launch import ROOT

GROUPS = Path("/sys/fs/cgroup")


def test_other_sources_are_refused(tmp_path: Path) -> None:
    """The second rank runs in a folder with a copy of the package, where a comment is new."""
    shutil.copytree(ROOT / "dllama_mpi", tmp_path / "dllama_mpi", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    with (tmp_path / "dllama_mpi" / "log.py").open("a") as file:
        file.write("# new\n")
    done = job([HERE, ("-wdir", str(tmp_path), *HERE)], ["-m", "dllama_mpi", "cache", "list"])
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: hosts run different versions of dllama_mpi: 0.1.0 (sources ")
    assert " for rank 0 on " in line
    assert " for rank 1 on " in line


def older() -> tuple[str, ...]:
    """Return how a rank is started as on an older processor with one core."""
    isa = next(isa for isa in offered()[1:] or ["generic"] if isa in ("avx2", "neon", "generic"))
    settings = [f"DLLAMA_MPI_ISA={isa}"]
    if platform.machine() == "x86_64":
        settings += ["NUMBA_CPU_NAME=haswell", "NUMBA_CPU_FEATURES="]
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    bound = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
    return ("env", *settings, *bound, *HERE)


@pytest.mark.long  # kernels are compiled anew
@pytest.mark.parametrize(
    "options",
    [(), pytest.param(("--weights", "f32", "--buffer-float-type", "f32"), marks=pytest.mark.long)],
    ids=["q4m", "f32"],
)
def test_instruction_sets_and_cores_of_one_job(options: tuple[str, ...]) -> None:
    alike = text([HERE, HERE], *options)
    assert text([HERE, older()], *options) == alike
    assert text([older(), HERE], *options) == alike


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """Make a control group that may use so many bytes of memory, or skip the test where that cannot be done."""
    old = GROUPS / "memory" if (GROUPS / "memory").is_dir() else None
    folder = (old or GROUPS) / f"dllama-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit), encoding="ascii")
        yield folder
    except FileNotFoundError as error:
        pytest.skip(f"control groups here do not limit memory: {error}")
    finally:
        folder.rmdir()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_host_with_little_memory_is_told() -> None:
    with control_group(600 << 20) as group:
        enter = f'hostname small; echo $$ > {group}/cgroup.procs; exec "$@"'
        small = ("unshare", "--uts", "sh", "-c", enter, "-", *HERE)
        model = ["--model", "random:llama3.2-3b", "--prompt", "x", "--max-seq-len", "1024"]
        done = job([HERE, small], ["-m", "dllama_mpi", *model])
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: rank 1 needs 1.")
    assert "small has 0." in line
    assert line.endswith("use more hosts, smaller --weights or another --split")
