"""Every command of the documents: its options are known, and it is run, or is listed here with the reason why not.

Run are this program's commands alone, and few others that are written down here: never what a document happens to say.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.documents.commands import (
    DOCUMENTS,
    LANGUAGES,
    PI_PAGE,
    Command,
    blocks,
    check,
    commands,
    is_of_the_program,
    spans,
    strange_options,
)
from tests.mpi import guard
from tests.mpi.launch import ROOT, Done, has_open_mpi, launcher, run, run_mark, start

COMMANDS = [command for path in DOCUMENTS for command in commands(path)]

NOT_RUN = {
    r"python3 -m venv .*|\. \.venv/bin/activate|pip install .*|python -m pytest": ".ci/run does",
    r"python -m dllama_mpi download ORG/NAME": "needs a hub: tests/hub",
    r"sbatch .*|\. \./dllama-serve-JOB\.connection|curl .*\$DLLAMA_URL.*": "needs Slurm: tests/slurm",
    r"DLLAMA_(VENV|PYTHON)=.*": "settings, no commands",
    r"python benchmarks/compare_llama_cpp\.py .*": "needs llama.cpp and gigabytes",
    r"python benchmarks/lan_scaling\.py": "takes minutes: tests/mpi/test_lan_scaling.py",
    r".* open-webui serve": "another program",
    r"sudo .*|printf .*/etc/hosts|echo .*/etc/dllama_mpi|journalctl .*": "needs root on a Pi",
    r"ssh-keygen .*|.* ssh-copy-id .*": "needs a password; the hosts of the tests have keys",
    r".*; do (scp|ssh \$host 'python3 -m venv) .*": "needs the package index; the hosts of the tests have it",
    r"python -m dllama_mpi download qwen3-8b": "needs a hub and gigabytes: tests/hub",
}
"""Patterns of whole commands that are not run, and why."""

MINE = re.compile(
    r"([A-Z_]+=\S+ )?((mpiexec|mpirun)( --?[\w-]+ [\w:.]+)+ )?"
    r"python (-m dllama_mpi|benchmarks/\w+\.py)( [^;&|<>`$\n]*)?"
)
"""A command of this program, from its beginning to its end: nothing for the shell stands in it."""

ON_PIS = (
    r"for host in pi0 pi1 pi2 pi3; do ssh \$host hostname; done",
    r"\. ~/dllama/bin/activate",
    r"printf '%s:1\\n' pi0 pi1 pi2 pi3 > hosts",
    r"curl http://pi0:9990/health",
    r"cat > pis\.toml <<EOF\n[^$`]*\nEOF",
)
"""Other commands that test_raspberry_pi runs."""

SUBSTITUTES = {
    "pi0,pi1,pi2,pi3": "localhost:2",
    "pi0,pi1 ": "localhost:2 ",
    "--port 9990": "--port 0",
    "--host 0.0.0.0": "--host 127.0.0.1",
    "serve --model DIR$": "serve --model DIR --port 0",
    "--api-key SECRET$": "--api-key SECRET --port 0",
    "-p 512 -n 128 -r 5": "-p 64 -n 8 -r 1",
    "--random llama3.1-8b -n 64": "--random tiny -p 8 -n 4 -r 1",
    "--ranks 1,2,4 --model DIR": "--ranks 1,2 --model DIR -p 8 -n 4 -r 1",
    "all_reduce.py": "all_reduce.py --tokens 1 --payloads q80 -r 2",
    "speculate.py": "speculate.py --steps 8 -r 1 --nthreads 1",
    " -n 4 ": " -n 2 ",
    " -n 3 ": " -n 2 ",
    " -np 4 ": " -np 2 ",
}
"""What is put in the place of what this machine has not, or what takes long. Files that commands name are made."""


def reason(command: Command) -> str | None:
    """Return why a command is not run; None if it may be."""
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command.text)), None)


def may_run(command: Command) -> bool:
    """Return whether a command is one of those that are run, and no reason is against it."""
    is_safe = MINE.fullmatch(command.text) or (
        command.file == PI_PAGE and any(re.fullmatch(pattern, command.text) for pattern in ON_PIS)
    )
    return bool(is_safe) and reason(command) is None


RUN = [command for command in COMMANDS if may_run(command) and command.file != PI_PAGE]


# ---- quick: what can be seen without running anything


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS])
def test_options_are_known(path: Path) -> None:
    for block in blocks(path):
        assert block.language in LANGUAGES, f"{path}:{block.line}: give the fence one of {', '.join(LANGUAGES)}"
    for command in commands(path):
        check(command.text)
    for span in spans(path):
        if is_of_the_program(span):
            check(span)
        assert not strange_options(span), f"{path}: `{span}`"


def test_commands_are_run_or_have_a_reason() -> None:
    for command in COMMANDS:
        assert may_run(command) or reason(command), f"{command} is neither run nor in NOT_RUN"


@pytest.mark.parametrize(
    "text",
    [
        "sudo reboot",
        "python -m dllama_mpi info; rm x",
        "python -m dllama_mpi info $(rm x)",
        "rm x; mpiexec -n 2 python -m dllama_mpi",
        "cat > pis.toml <<EOF\nx\nEOF",
    ],
)
def test_other_commands_are_never_run(text: str) -> None:
    assert not may_run(Command(ROOT / "README.md", 1, text))


def test_tables_are_of_commands() -> None:
    for pattern in (*NOT_RUN, *ON_PIS):
        assert any(re.fullmatch(pattern, command.text) for command in COMMANDS), pattern
    for text in SUBSTITUTES:
        assert any(re.search(_pattern(text), command.text) for command in COMMANDS), text


@pytest.mark.parametrize(
    "text",
    [
        "python -m dllama_mpi info --no-such-option",
        "mpiexec -n 2 python -m dllama_mpi --model DIR --kv-type q81",
        "mpiexec -hostz a python -m dllama_mpi info",
        "python -m dllama_mpi launch -n 2 -- serve --no-such-option",
        "python benchmarks/no_such_script.py",
        "sbatch --nodes=4 slurm/serve.sbatch DIR --prompt x",
    ],
)
def test_what_is_not_there_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        check(text)


# ---- slow: running them


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the commands name, in which they run one after another."""
    if has_open_mpi():
        pytest.skip("most of the commands are MPICH's")
    folder = tmp_path_factory.mktemp("documents")
    demo = ROOT / "dllama_mpi" / "demo"
    for name in ("DIR", "ORG/NAME"):
        shutil.copytree(demo, folder / name)
    for name in ("benchmarks", "slurm", "examples"):  # not the package: kernels are kept by its path
        (folder / name).symlink_to(ROOT / name)
    (folder / "TEXT").write_text((demo / "heldout.txt").read_text()[:1500])
    (folder / "hosts").write_text("localhost:4\n")
    toml = [block.text for block in blocks(ROOT / "README.md") if block.language == "toml"]
    (folder / "cluster.toml").write_text(toml[0])
    return folder


def _pattern(text: str) -> str:
    return re.escape(text).replace(r"\$", "$")


def substituted(text: str) -> str:
    """Return a command as it can be run here."""
    for old, new in SUBSTITUTES.items():
        text = re.sub(_pattern(old), new, text)
    return text


def settings(folder: Path) -> dict[str, str]:
    """Return the environment of a command: this Python's programs first, and no hub."""
    path = f"{Path(sys.executable).parent}:{Path(launcher()).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
    return {"PATH": path, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}


def served(folder: Path, text: str) -> str:
    """Run a command that serves until it listens, end it, and return what it said."""
    mark, log = f"{run_mark()}/document", folder / "served"
    with log.open("w") as out:
        whole = ["bash", "-c", f"cd {folder} && exec {text}"]
        process = start(whole, {**settings(folder), guard.VARIABLE: mark}, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 300
        while not re.search(r"https?://[^ ]+:\d+", log.read_text()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        guard.end_marked(mark)
        process.wait()
    assert process.returncode == 0, log.read_text()
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", [pytest.param(command, id=command.name) for command in RUN])
def test_command(command: Command, work: Path) -> None:
    text = substituted(command.text)
    if re.search(r" serve( |$)", text):
        said = served(work, text)
    else:
        done: Done = run(["bash", "-c", f"cd {work} && {text}"], 300, settings(work), stdin="Hello\n")
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{command}\n{said}"
    assert "Traceback" not in said, f"{command}\n{said}"
