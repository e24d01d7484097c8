"""Parallel equals serial, for every architecture: logits and greedy tokens against transformers at 1 to 4 ranks."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from tests.all_cases import ALL_CASES
from tests.mpi.launch import ROOT
from tests.mpi.pool import pool
from tests.tiers import QUICK_CASES, QUICK_FAMILIES, all_but, slow
from tests.tiny_models.files import write_model
from tests.tiny_models.tensors import text_config

TOLERANCE = 1e-4  # of logits about 1 to 5 in size; the observed error is about 1e-5
LARGER = {"qwen3_5_moe_text": 2e-4}  # 7.4e-5 on one rank, 1.05e-4 on four


def fits(name: str, ranks: int) -> bool:
    """Return whether every rank has a head of each kind at least."""
    config = text_config(ALL_CASES[name].config)
    return all(config.get(key, ranks) >= ranks for key in ("num_attention_heads", "linear_num_value_heads"))


# One rank is tried without MPI, too: tests/unit/test_model.py and test_families.py.
EVERY = [*product((1,), QUICK_CASES), *((n, name) for n, name in product((2, 3, 4), ALL_CASES) if fits(name, n))]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("ranks", "name"),
    all_but([*product((2,), (*QUICK_CASES[:2], *QUICK_FAMILIES)), (4, "llama_heads7")], EVERY),
)
def test_parity(ranks: int, name: str, models: Path) -> None:
    if not (models / name).exists():
        write_model(ALL_CASES[name], models / name)
    done = pool(ranks).run([str(ROOT / "tests/mpi/parity_job.py"), str(models), name])
    result = json.loads(done.stdout)
    assert max(result["errors"].values()) < LARGER.get(name, TOLERANCE), result["errors"]
    for how, tokens in result["greedy"].items():
        assert tokens == result["expected"], how


@pytest.mark.parametrize(
    ("ranks", "name", "weights", "formats"),
    [
        (2, "gpt_oss", "default", ["f16", "mxfp4", "q4m"]),
        slow(2, "gpt_oss", "mxfp4", ["f16", "mxfp4"]),
        slow(4, "gpt_oss", "q40", ["f16", "mxfp4", "q40"]),
        slow(3, "gpt_oss_bf16", "iq4nl,experts=q80", ["f16", "iq4nl", "q80"]),
        slow(4, "glm4_moe_groups", "q4m", ["f16", "q4m"]),
    ],
)
def test_quantised_parity(ranks: int, name: str, weights: str, formats: list[str], models: Path) -> None:
    """Of models whose heads are whole blocks: cuts change no rounding but, now and then, that of an activation."""
    if not (models / name).exists():
        write_model(ALL_CASES[name], models / name)
    done = pool(ranks).run([str(ROOT / "tests/mpi/quantised_job.py"), str(models / name), weights])
    result = json.loads(done.stdout)
    assert result["formats"] == formats
    assert result["size"] > 1
    differences = sorted(result["differences"])
    assert differences[len(differences) // 2] < TOLERANCE
    assert differences[-1] < 0.5


@pytest.mark.parametrize(
    ("ranks", "name"), [(2, "gemma3_text"), slow(2, "mistral"), slow(3, "gpt_oss"), slow(4, "gemma3_text")]
)
def test_windows_on_all_ranks(ranks: int, name: str, models: Path) -> None:
    """Texts of several pages, of which layers with a window keep the last ones alone."""
    if not (models / name).exists():
        write_model(ALL_CASES[name], models / name)
    done = pool(ranks).run([str(ROOT / "tests/mpi/windows_job.py"), str(models / name)])
    result = json.loads(done.stdout)
    assert 0 < result["pages"][1] < result["pages"][0]
    assert result["difference"] < 5 * TOLERANCE  # ranks' sums round differently, and texts are long
    assert result["ids"] == result["expected"]
    assert (result["again"], result["cached"]) == (result["expected"][0], 901)
