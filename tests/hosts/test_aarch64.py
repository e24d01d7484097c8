"""On a Raspberry Pi 4's and a Raspberry Pi 5's core, emulated: kernels, parity, and jobs, also with this host's ranks.

The emulated Python is of another minor version than this one, mostly, and then such jobs are of two Pythons as well.
Compiling takes ten times as long there: the slow tier runs one job; `python tests/hosts/emulated.py check` runs all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dllama_mpi.kernels.layout import FORMATS
from tests.hosts import emulated
from tests.hosts.jobs import HERE, job, text
from tests.mpi.launch import ROOT, run
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model

TIMEOUT = 3000.0
BOARDS = tuple(emulated.BOARDS)
F32 = ("--weights", "f32", "--buffer-float-type", "f32")
PARITY = ("llama31",)

NET = "NetCase(key_heads=2, group=2, key_dim=24, value_dim=24, taps=4, bias=False, first=0, last=0)"
BOUND = "test_within_the_bound_of_the_format"
MIXTURES = [("f32", "q4m", "f16"), ("mxfp4", "mxfp4", "q40")]
CONV = "ConvCase(channels=100, taps=4, bias=True)"
ISAS = {"pi4": "neon-cortex-a72", "pi5": "neondot-cortex-a76"}


def kernels(board: str) -> tuple[str, ...]:
    """Return tests of every kernel against its twin, one case or a few of each."""
    return (
        f"test_isa.py::test_dot4[{ISAS[board]}]",
        "test_isa.py::test_description",
        *(f"test_isa.py::test_exp[{ISAS[board]}-{lanes}]" for lanes in (4, 16)),
        *(f"test_isa.py::test_kernel[{ISAS[board]}-{fmt}]" for fmt in FORMATS),
        *(f"test_products.py::test_matmul[{tokens}-{fmt}]" for tokens in (1, 3) for fmt in FORMATS),
        *(f"test_packing.py::test_pack_tiles[(16, 32)-{fmt}]" for fmt in ("q4m", "mxfp4", "f16")),
        *(f"test_gguf_tensors.py::{BOUND}[0-{kind}]" for kind in ("Q4_0", "Q4_K", "Q6_K", "MXFP4")),
        *(f"test_quantised_safetensors.py::test_values_are_those_stored[llama31-{kind}]" for kind in ("gptq", "awq")),
        f"test_state_kernels.py::test_delta_net[{NET}-2-mixed]",
        f"test_state_kernels.py::test_short_conv[{CONV}-2-mixed]",
        *(f"test_experts.py::test_mixtures_of_every_kind[silu-gated-True-{formats}]" for formats in MIXTURES),
        *(f"test_payloads.py::test_encode[7-{payload}]" for payload in ("f16", "q80", "q40")),
        "test_residual.py::test_add_and_normalise[True-3-2-q80]",
        "test_attention.py::test_attention[True-4-2-5]",
        "test_attention.py::test_quantised_cache[1-9-80]",
    )


pytestmark = pytest.mark.long
every_board = pytest.mark.parametrize("board", BOARDS)
takes_long = pytest.mark.skipif(
    not os.environ.get(emulated.WHOLE), reason="takes long: python tests/hosts/emulated.py check"
)


@pytest.fixture(scope="module", autouse=True)
def _emulation() -> None:
    """Have the emulation set up, or skip the tests."""
    try:
        emulated.setup()
    except emulated.UnavailableError as error:
        pytest.skip(str(error))


def on(board: str) -> tuple[str, ...]:
    """Return what a rank is that runs on a board: see `job`."""
    return (str(emulated.python(board)),)


@pytest.fixture(scope="module")
def expected() -> Callable[..., str]:
    """Return what tells the text that this host alone writes with these options."""
    return lambda *options: text([HERE, HERE], *options)


def run_tests(board: str, tests: tuple[str, ...]) -> None:
    """Run tests of tests/unit on a board; none may be missing."""
    command = [*on(board), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", "-m", "slow or not slow"]
    done = run([*command, *(f"tests/unit/{test}" for test in tests)], TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_job_with_this_host(expected: Callable[..., str]) -> None:
    assert text([HERE, on("pi4")], *F32, timeout=TIMEOUT) == expected(*F32)


@takes_long
@every_board
def test_kernels(board: str) -> None:
    run_tests(board, kernels(board))


@takes_long
@every_board
def test_parity(board: str, tmp_path: Path) -> None:
    for name in PARITY:
        write_model(CASES[name], tmp_path / name)
    done = job([on(board)], [str(ROOT / "tests" / "mpi" / "parity_job.py"), str(tmp_path), *PARITY], TIMEOUT)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["case"] for result in results] == list(PARITY), done.stderr
    for result in results:
        assert max(result["errors"].values()) < 1e-4
        assert all(tokens == result["expected"] for tokens in result["greedy"].values())


@takes_long
def test_one_job_of_both_boards_and_this_host(expected: Callable[..., str]) -> None:
    assert text([HERE, on("pi4"), on("pi5")], timeout=TIMEOUT) == expected()


@takes_long
@pytest.mark.parametrize("options", [(), F32], ids=["q4m", "f32"])
@every_board
def test_two_ranks(board: str, options: tuple[str, ...], expected: Callable[..., str]) -> None:
    for ranks in ([on(board), on(board)], [on(board), HERE], [HERE, on(board)]):
        assert text(ranks, *options, timeout=TIMEOUT) == expected(*options)
