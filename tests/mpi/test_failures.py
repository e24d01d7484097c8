"""Ranks fail together: one clear line, exit status 2, nothing hung, at one rank and at three."""

from __future__ import annotations

import json
import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mpi.launch import ROOT, Done, mpiexec, run
from tests.mpi.pool import pool
from tests.tiers import slow
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model

GOOD = "llama3_gqa"


def _model(folder: Path, change: Callable[[Path], object] = lambda folder: None) -> Path:
    folder.mkdir()
    write_model(CASES[GOOD], folder)
    change(folder)
    return folder


def _edit_config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:60] = b"\x00" * 40
    path.write_bytes(data)


def _assert_one_line(done: Done, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in lines[0]


MISTAKES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "not a model": (lambda folder: (folder / "config.json").unlink(), ("no config.json",)),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("no model.safetensors",)),
    "truncated": (_truncate, ("model.safetensors", "truncated or corrupt")),
    "corrupt": (_corrupt, ("model.safetensors", "truncated or corrupt")),
    "shape": (_edit_config(intermediate_size=192), ("mlp", "shape", "config.json implies")),
    "missing tensor": (_edit_config(num_hidden_layers=9), ("tensor", "is missing")),
    "architecture": (_edit_config(model_type="mamba"), ("mamba", "supported are")),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "JSON")),
    "no tokenizer": (lambda folder: None, ("no tokenizer.json", "--tokenizer")),
}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_model(mistake: str, ranks: int, tmp_path: Path) -> None:
    change, words = MISTAKES[mistake]
    model = _model(tmp_path / "model", change)
    args = ["-m", "dllama_mpi", "--model", str(model), "--prompt", "x"]
    _assert_one_line(pool(ranks).run(args, check=False), *words)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "no/such/place", "--prompt", "x"], ("no/such/place", "no such model directory")),
        (["--prompt", "x", "--nthreads", "4000"], ("4000", "nthreads")),
        (["--prompt", "x", "--split", "1,0"], ("--split 1,0", "positive")),
        (["--prompt", "x", "--split", "1,2,3,4,5"], ("5 shares", "ranks")),
        (["--prompt", "x", "--max-seq-len", "2000000000"], ("GB", "--max-seq-len")),
        (["--prompt", "word " * 2000], ("tokens", "--max-seq-len")),
        (["--prompt-file", "no/such/file"], ("no/such/file",)),
        (["--prompt", "x", "--tokenizer", "no/such/file"], ("no/such/file",)),
        (["--prompt", "x", "--temperature", "-1"], ("--temperature", "-1")),
        (["--prompt", "x", "--timeout", "0.5"], ("timeout is 0.5", "from 1 to 86400 seconds")),
        (["--prompt", "x", "--timeout", "soon"], ("--timeout", "not a number")),
        (["--prompt", "x", "--cache-limit", "inf"], ("--cache-limit", "inf is out of range")),
        (["--prompt-file", "/dev/zero"], ("/dev/zero", "more than 100 million characters")),
        (["--prompt", "x", "--no-such-option"], ("--no-such-option",)),
        ([], ("--prompt",)),
        (["perplexity", "--file", "no/such/file"], ("no/such/file",)),
        (["chat", "--chat-template", "no-such-template"], ("no-such-template",)),
        (["convert", "no/such/place", "somewhere"], ("no/such/place",)),
    ],
)
def test_bad_arguments(options: list[str], words: tuple[str, ...], ranks: int) -> None:
    _assert_one_line(pool(ranks).run(["-m", "dllama_mpi", *options], check=False), *words)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--no-such-option"], "--no-such-option"),  # before MPI is started
        (["--prompt", "x", "--split", "1,2"], "2 shares"),  # after it
    ],
)
def test_a_job_of_its_own(options: list[str], word: str) -> None:
    _assert_one_line(mpiexec(3, ["-m", "dllama_mpi", *options], check=False), word)


@pytest.mark.slow
def test_too_many_ranks() -> None:
    _assert_one_line(
        mpiexec(9, ["-m", "dllama_mpi", "--prompt", "x"], check=False), "num_attention_heads is 8", "use at most 8"
    )


def _script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("call", ["logits([1, 5000])", "logits([-1])", "generate([5] * 200)", "generate([])"])
def test_bad_token_ids(call: str, ranks: int, tmp_path: Path) -> None:
    model = _model(tmp_path / "model")
    script = _script(tmp_path, f"from dllama_mpi import LLM\nLLM({str(model)!r}, nthreads=1).{call}\n")
    _assert_one_line(pool(ranks).run([script], check=False))


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        (["--sync", "mpi", "--buffer-float-type", "q80"], "", ("--sync mpi", "q80", "give f32")),
        (["--sync", "doubling"], "python", ("--sync doubling", "use direct")),
    ],
)
def test_all_reduce_that_does_not_suit(options: list[str], env: str, words: tuple[str, ...]) -> None:
    command = ["-m", "dllama_mpi", "--prompt", "x", *options]
    _assert_one_line(pool(3).run(command, env={"DLLAMA_MPI_CALLS": env}, check=False), *words)


@pytest.mark.parametrize("failing", [slow(0), 1, slow(2)])
def test_unexpected_exception(failing: int, tmp_path: Path) -> None:
    """An exception on one rank, in the middle of a generation, ends the job and names rank and host.

    With a timeout of 0 nothing else would end it.
    """
    model = _model(tmp_path / "model")
    script = _script(
        tmp_path,
        f"""
        from dllama_mpi import LLM, SamplingParams
        from dllama_mpi.model.transformer import Transformer
        llm = LLM({str(model)!r}, nthreads=1, timeout=0)
        llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        if llm.group.rank == {failing}:
            def broken(*args):
                raise RuntimeError("a fault of the program")
            Transformer.forward = broken
        llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        """,
    )
    done = mpiexec(3, [script], check=False)
    assert done.returncode not in (0, 2)
    assert f"rank {failing} on {socket.gethostname().split('.')[0]} failed" in done.stderr
    assert "a fault of the program" in done.stderr


@pytest.mark.parametrize("variables", [{"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"},
                                       {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"}])  # fmt: skip
def test_singletons(variables: dict[str, str]) -> None:
    """A launcher that does not fit the MPI library starts programs of one rank each: that is said."""
    done = run([sys.executable, "-m", "dllama_mpi", "--prompt", "x"], env=variables)
    _assert_one_line(done, "3 ranks", "each sees itself alone", "use ")


def test_help_needs_no_mpi(tmp_path: Path) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('no MPI here')\n")
    hidden = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for args in (["--help"], ["chat", "--help"], ["--version"]):
        done = run([sys.executable, "-m", "dllama_mpi", *args], env=hidden)
        assert done.returncode == 0
        assert "dllama_mpi" in done.stdout
    _assert_one_line(run([sys.executable, "-m", "dllama_mpi", "--steps", "x"], env=hidden), "--steps")
    alone = run(
        [sys.executable, "-m", "dllama_mpi", "--prompt", "Return", "--steps", "3", "--nthreads", "1"], env=hidden
    )
    assert alone.returncode == 0  # one process needs no MPI
    launched = {**hidden, "PMI_SIZE": "2", "PMI_RANK": "0"}
    _assert_one_line(run([sys.executable, "-m", "dllama_mpi", "--prompt", "x"], env=launched), "MPI cannot be loaded")
