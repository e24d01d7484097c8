"""The shell of the batch scripts, read and not run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPTS

FILES = sorted(str(path) for path in SCRIPTS.iterdir() if path.suffix in (".sbatch", ".sh"))


def test_scripts_are_bash() -> None:
    assert len(FILES) == 7
    for file in FILES:
        done = subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: apt-get install shellcheck")
    done = subprocess.run(
        ["shellcheck", "-x", "-P", str(SCRIPTS.parent), *FILES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_scripts_begin_alike() -> None:
    """How a script finds the others is the same in all of them: nothing can be sourced before."""
    heads = set()
    for file in FILES:
        if file.endswith(".sbatch"):
            _, mark, rest = Path(file).read_text(encoding="utf-8").partition("# sbatch runs a copy")
            assert mark
            heads.add(rest.partition('. "$here/common.sh"\n')[0])
    assert len(heads) == 1
