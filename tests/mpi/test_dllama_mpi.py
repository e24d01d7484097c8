"""A .m file on real ranks: each reads its own part, those without the file receive theirs."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.mpi.launch import launcher, launcher_options, mpiexec, run
from tests.unit.test_distributed_llama import write_pair

GENERATE = ["--prompt", "Once upon a", "--steps", "12", "--temperature", "0", "--cache-dir", "none"]


def test_two_ranks_generate_and_convert(tmp_path: Path) -> None:
    write_pair(tmp_path)
    model = str(tmp_path / "model.m")
    alone = run([sys.executable, "-m", "dllama_mpi", "--model", model, *GENERATE])
    assert alone.returncode == 0, alone.stderr
    both = mpiexec(2, ["-m", "dllama_mpi", "--model", model, *GENERATE])
    assert both.stdout == alone.stdout
    assert both.stdout.strip()
    assert "received" not in both.stderr
    mpiexec(2, ["-m", "dllama_mpi", "convert", model, str(tmp_path / "made")])
    made = mpiexec(2, ["-m", "dllama_mpi", "--model", str(tmp_path / "made"), *GENERATE])
    assert made.stdout == alone.stdout
    # The second rank's host has neither file.
    folders = [tmp_path, tmp_path / "other"]
    folders[1].mkdir()
    command = [launcher(), *launcher_options()]
    for i, folder in enumerate(folders):
        command += [":"] * (i > 0) + ["-n", "1", "-wdir", str(folder), sys.executable, "-m", "dllama_mpi"]
        command += ["--model", "model.m", *GENERATE]
    apart = run(command)
    assert apart.returncode == 0, apart.stderr
    assert apart.stdout == alone.stdout
    assert "received" in apart.stderr


def test_a_truncated_file_ends_every_rank(tmp_path: Path) -> None:
    path, _ = write_pair(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    done = mpiexec(2, ["-m", "dllama_mpi", "--model", str(path), *GENERATE], check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert f"{path}: has 5000 bytes, and its header implies " in line
