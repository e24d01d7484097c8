"""How far long work is: on a terminal, through a launcher, in a file, and in which words."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllama_mpi import log, progress
from dllama_mpi.engine.llm import LLM
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.errors import UsageError
from dllama_mpi.progress import Progress, show_progress
from tests.mpi.launch import ROOT, environment
from tests.mpi.typist import Typist

WORK = """
    import sys
    from dllama_mpi import log, progress
    progress.QUIET_SECONDS, progress._DRAW_SECONDS, progress._AFTER_LINE_SECONDS = 0.0, 0.01, 0.0
    progress.show_progress(sys.argv[1])
    with progress.Progress("converting", 4_000_000_000, "bytes") as shown:
        shown.add(1_000_000_000)
        log.say("a line beside it")
        sys.stdin.readline()
    print("done")
"""
"""A program that works until a line comes."""

LAUNCHER = """
    import shutil, subprocess, sys
    with subprocess.Popen([sys.executable, *sys.argv[1:]], stderr=subprocess.PIPE) as child:
        while some := child.stderr.read1():
            sys.stderr.buffer.write(some)
            sys.stderr.buffer.flush()
    sys.exit(child.returncode)
"""
"""A program that starts another one and passes on what that says, as mpiexec does."""


@pytest.fixture
def programs(tmp_path: Path) -> list[str]:
    """Return the paths of both programs."""
    found = []
    for name, text in (("work", WORK), ("launcher", LAUNCHER)):
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        found.append(str(path))
    return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Show progress at once, in lines."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_DRAW_SECONDS", 0.001)
    show_progress("lines")
    yield
    show_progress("off")


def until_told(shown: Progress) -> None:
    """Wait until a line of progress has been printed."""
    told = threading.Event()
    log.before_line.append(told.set)
    try:
        assert told.wait(60), shown.line()
    finally:
        log.before_line.remove(told.set)


@pytest.mark.parametrize("launched", [False, True])
def test_a_bar_on_the_users_terminal(programs: list[str], launched: bool) -> None:
    work, launcher = programs
    with_launcher = [launcher] if launched else []
    typist = Typist([sys.executable, *with_launcher, work, "auto"], {"TERM": "xterm"})
    typist.until("converting [####", 60)
    assert "25%, 1.00 GB of 4.00 GB" in typist.until(" left\x1b[K\r", 60)
    typist.type("\n")
    assert typist.status(60) == 0
    assert "\r\x1b[K" in typist.seen  # the bar went away
    assert "a line beside it\r\n" in typist.seen
    assert typist.seen.rstrip().endswith("done")


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("mode", ["auto", "lines"])
def test_lines_in_a_file(programs: list[str], tmp_path: Path, launched: bool, mode: str) -> None:
    work, launcher = programs
    path = tmp_path / "log"
    with path.open("wb") as file:
        command = [sys.executable, *([launcher] if launched else []), work, mode]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, cwd=ROOT, env=environment()
        ) as process:
            for _ in until(lambda: b"left\n" in path.read_bytes()):
                assert process.poll() is None, path.read_text()
            out, _ = process.communicate(b"\n")
    said = path.read_text()
    assert out.split() == [b"done"]
    assert "\r" not in said
    assert "\x1b" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("converting")]  # the next would come seconds later
    assert line.startswith("converting: 25%, 1.00 GB of 4.00 GB, ")


def until(is_so: object) -> Iterator[None]:
    """Yield now and then until something is so."""
    event = threading.Event()
    while not is_so():  # type: ignore[operator]
        yield
        event.wait(0.01)


def test_off_is_silent_and_a_bar_may_be_forced(programs: list[str]) -> None:
    work, _ = programs
    for mode, expected in (("off", False), ("bar", True)):
        with subprocess.Popen(
            [sys.executable, work, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
        ) as process:
            assert process.stderr is not None
            seen = process.stderr.readline()
            if expected:
                while b"] 25%" not in seen:
                    seen += process.stderr.read1(100)  # type: ignore[attr-defined]
            _, rest = process.communicate(b"\n")
        assert (b"\r" in seen + rest) is expected


def test_work_within_work(at_once: None, capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("outer", 20) as outer:
        until_told(outer)
        for each in progress.progress(range(20), "inner", True):
            if each == 10:
                until_told(outer)
        until_told(outer)
    names = [line.partition(":")[0] for line in capfd.readouterr().err.splitlines()]
    assert names[0] == names[-1] == "outer"
    assert "inner" in names


def test_short_work_is_not_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_DRAW_SECONDS", 0.001)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 1e9)
    show_progress("lines")
    try:
        with Progress("short", 3) as shown:
            threading.Event().wait(0.05)
            shown.add(1)
    finally:
        show_progress("off")
    assert capfd.readouterr().err == ""


def test_what_is_not_to_be_told(at_once: None, capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("quiet", 3, show=False):
        threading.Event().wait(0.05)
    assert sum(progress.progress_bytes([1, 2, 3], "quiet", False, 6)) == 6
    assert capfd.readouterr().err == ""


def test_stderr_that_is_no_file_has_lines(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = io.StringIO()
    monkeypatch.setattr(sys, "stderr", taken)
    show_progress("auto")
    with Progress("loading", 100) as shown:
        until_told(shown)
        for _ in until(lambda: "loading: 0%, 0 of 100, 0 s\n" in taken.getvalue()):
            assert shown.done == 0


def line(shown: Progress, seconds: float) -> str:
    """Return a line as it is after so many seconds."""
    shown.started -= seconds
    return shown.line()


def test_words() -> None:
    shown = Progress("x", 1000, "tokens", done=100)
    shown.add(200)
    assert line(shown, 10) == "x: 30%, 300 of 1,000 tokens, 35 s left"  # of 20 a second now, not of what was there
    assert line(Progress("x", 5), 10) == "x: 0%, 0 of 5, 10 s"
    assert line(Progress("x", unit="functions", done=3), 100) == "x: 3 functions, 2 min"
    assert line(Progress("x"), 6000) == "x: 1.7 h"
    shown = Progress("x", 4_000_000, "bytes")
    shown.add(1_000_000)
    shown.note = "told"
    assert line(shown, 10) == "x: 25%, 1.0 MB of 4.0 MB, 99.9 kB/s, told, 30 s left".replace("99.9", "100.0")
    shown.add(9_000_000)
    assert shown.line().startswith("x: 100%, ")


@pytest.mark.parametrize("columns", [10, 40, 60, 200])
def test_a_bar_keeps_to_its_columns(columns: int) -> None:
    shown = Progress("reading the prompt", 1000, "tokens")
    shown.add(500)
    shown.started -= 10
    drawn = shown.drawn(columns)
    assert len(drawn) <= columns
    assert ("[############............]" in drawn) is (columns == 200)


def test_a_prompt_is_told_while_it_is_read(at_once: None, capfd: pytest.CaptureFixture[str]) -> None:
    llm = LLM("demo", quiet=False, progress="lines", prefill_chunk=4, max_seq_len=512)
    prompts = [list(range(100, 300)), list(range(200, 400))]
    params = SamplingParams(temperature=0, max_tokens=2)
    capfd.readouterr()
    told: list[str] = []
    step = llm.engine.step

    def slow_step() -> object:
        outputs = step()
        if llm.engine.snapshot().output_tokens == 0:
            until_told(Progress("a step"))
        else:
            told.append("generated")
        return outputs

    llm.engine.step = slow_step  # type: ignore[assignment,method-assign]
    assert llm.generate(prompts[0], params) is not None
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("reading the prompt: 50%, 100 of 200 tokens") for line in lines)
    assert told


def test_a_text_that_is_scored_is_told_by_steps() -> None:
    llm = LLM("demo", prefill_chunk=4, max_seq_len=64)
    read: list[int] = []
    scores = llm.log_probabilities(list(range(100, 111)), read.append)
    assert scores is not None
    assert read == [4, 4, 2]


def test_the_environment_may_say_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.VARIABLE)
    assert progress.chosen(None) == "auto"
    monkeypatch.setenv(progress.VARIABLE, "lines")
    assert (progress.chosen(None), progress.chosen("bar")) == ("lines", "bar")
    monkeypatch.setenv(progress.VARIABLE, "loud")
    with pytest.raises(UsageError, match="DLLAMA_MPI_PROGRESS=loud: must be one of auto, bar, lines, off"):
        progress.chosen(None)
    assert progress.chosen("off") == "off"


COLD = """
    import numpy as np
    from dllama_mpi import progress
    progress.QUIET_SECONDS = progress.LINE_SECONDS = 0.0
    progress._DRAW_SECONDS = 0.001
    progress.show_progress("lines")
    from dllama_mpi.kernels.sampling import log_sum_exp
    print(log_sum_exp(np.zeros(1, np.float32), 1.0))
    progress.QUIET_SECONDS = 1e9
    progress.show_progress("off")
"""
"""A program that wants a kernel which no cache has."""


@pytest.mark.slow  # it compiles
def test_compiling_is_told(tmp_path: Path) -> None:
    env = environment({"NUMBA_CACHE_DIR": str(tmp_path)})
    said = []
    for _ in range(2):
        command = [sys.executable, "-c", textwrap.dedent(COLD)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
        assert float(done.stdout) == 0
        said.append(done.stderr)
    assert "compiling kernels (sampling): " in said[0]
    assert said[1] == ""
