"""What is said of a start that has come to nothing, and how the ranks of a host are found."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dllama_mpi.parallel.launch import Launched
from dllama_mpi.parallel.roll_call import is_moving, ranks_in_words, verdict
from dllama_mpi.parallel.siblings import Sibling, siblings

NAME = "mpiexec (PMI)"


def _sibling(rank: int, waits: bool = True, is_stopped: bool = False, spent: tuple[int, int] = (0, 0)) -> Sibling:
    return Sibling(rank, "python", is_stopped, waits, spent)


def _verdict(monkeypatch: pytest.MonkeyPatch, ranks: int, local: str, *seen: Sibling) -> str:
    monkeypatch.setenv("MPI_LOCALNRANKS", local)
    return verdict(Launched(NAME, ranks, 0), {each.rank: each for each in seen}, 30.0, "pi0")


WITHIN = "within 30 s (--timeout)"
UNSEEN = "cannot be seen: look at what other hosts have said"


@pytest.mark.parametrize(
    ("ranks", "local", "seen", "said"),
    [
        (2, "2", [_sibling(0)], f"1 of 2 ranks came {WITHIN}; missing: rank 1 (not running)"),
        (
            3,
            "3",
            [_sibling(0), _sibling(1, is_stopped=True), _sibling(2, waits=False)],
            f"1 of 3 ranks came {WITHIN}; missing: rank 1 (stopped), rank 2 (python, which has not started MPI)",
        ),
        (2, "2", [_sibling(0), _sibling(1)], f"all 2 ranks came, but MPI has not connected them {WITHIN}"),
        (
            4,
            "2",
            [_sibling(0), _sibling(1)],
            f"MPI has not started {WITHIN}: of 4 ranks 2 came on pi0; from here ranks 2 and 3 {UNSEEN}",
        ),
        (
            4,
            "2",
            [_sibling(0), _sibling(1, is_stopped=True)],
            f"MPI has not started {WITHIN}: of 4 ranks 1 came on pi0; missing: rank 1 (stopped);"
            f" from here ranks 2 and 3 {UNSEEN}",
        ),
        (
            4,
            "2",
            [_sibling(0)],
            f"MPI has not started {WITHIN}: of 4 ranks 1 came on pi0; 1 more of pi0 not running;"
            f" from here ranks 1 to 3 {UNSEEN}",
        ),
        # A system without /proc.
        (2, "", [], f"MPI has not started {WITHIN}: of 2 ranks 1 came on pi0; from here rank 1 {UNSEEN}"),
    ],
)
def test_verdict(ranks: int, local: str, seen: list[Sibling], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _verdict(monkeypatch, ranks, local, *seen) == said


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "rank 3"), ([2, 1], "ranks 1 and 2"), ([1, 2, 3, 4], "ranks 1 to 4"), ([1, 2, 5], "ranks 1, 2 and 5")],
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert ranks_in_words(ranks) == words


def test_work_shows_in_processor_time_or_bytes() -> None:
    before = _sibling(1, spent=(5, 100))
    assert not before.has_worked_since(before)
    assert _sibling(1, spent=(6, 100)).has_worked_since(before)
    assert _sibling(1, spent=(5, 101)).has_worked_since(before)


@pytest.mark.parametrize(
    ("before", "seen", "moves"),
    [
        ([], [_sibling(0), _sibling(1, waits=False)], False),  # the first look
        ([_sibling(0)], [_sibling(0), _sibling(1, waits=False)], True),  # a rank has been started
        ([_sibling(0), _sibling(1, waits=False)], [_sibling(0), _sibling(1)], True),  # it has come
        ([_sibling(0), _sibling(1, waits=False)], [_sibling(0), _sibling(1, waits=False, spent=(1, 0))], True),
        ([_sibling(0), _sibling(1, waits=False)], [_sibling(0, spent=(1, 0)), _sibling(1, waits=False)], False),
        (
            [_sibling(0), _sibling(1, waits=False)],
            [_sibling(0), _sibling(1, waits=False, is_stopped=True, spent=(1, 0))],
            False,
        ),
        ([_sibling(0), _sibling(1)], [_sibling(0), _sibling(1, spent=(1, 0))], True),  # MPI connects them
        ([_sibling(0), _sibling(1)], [_sibling(0), _sibling(1)], False),
    ],
)
def test_is_moving(before: list[Sibling], seen: list[Sibling], moves: bool) -> None:
    assert is_moving(2, {each.rank: each for each in before}, {each.rank: each for each in seen}) is moves


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")
def test_siblings_are_found_among_processes() -> None:
    variable = f"ROLL_CALL_TEST_{os.getpid()}"
    children = [subprocess.Popen(["sleep", "1000"], env={**os.environ, variable: str(rank)}) for rank in (4, 7)]
    try:
        os.kill(children[1].pid, signal.SIGSTOP)
        while Path(f"/proc/{children[0].pid}/comm").read_text() != "sleep\n" or not siblings(variable)[7].is_stopped:
            time.sleep(0.01)
        found = siblings(variable)
        assert {rank: (each.command, each.is_stopped, each.waits) for rank, each in found.items()} == {
            4: ("sleep", False, False),
            7: ("sleep", True, False),
        }
        children[0].kill()
        while 4 in siblings(variable):  # as a zombie it is gone
            time.sleep(0.01)
    finally:
        for child in children:
            child.kill()
            child.wait()
