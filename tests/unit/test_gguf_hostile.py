"""Whole models whose metadata and tensors are what a stranger may have made of them: they run, or one line says why."""

from __future__ import annotations

import random
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi import SamplingParams
from dllama_mpi.errors import ModelError, UsageError
from dllama_mpi.startup.opening import declared_stop_ids, load_tokenizer, open_model
from tests.gguf_edit import Document, build, number, text
from tests.gguf_hostile import (
    Change,
    changed,
    changes_of_keys,
    changes_of_tensors,
    changes_of_words,
    written,
)
from tests.one_rank import OneRank
from tests.tiers import slow
from tests.unit.test_gguf_models import changed as case_of

MOST_MEMORY = 100_000  # kilobytes, of a process that reads files of 1 MB


def run(path: Path) -> None:
    """Load a model, and have it compute and write."""
    model = OneRank(path, nthreads=1, max_seq_len=32, quiet=True)
    assert model.logits([3, 4, 5]).shape[0] == 3
    model.generate([3, 4], SamplingParams(temperature=0.8, min_p=0.1, max_tokens=2, seed=1))


def open_all(path: Path) -> None:
    """Open a model."""
    open_model(str(path))


def outcomes(document: Document, changes: list[tuple[str, Change]], path: Path, *steps: Callable[[Path], Any]) -> int:
    """Try files; return how many were refused. A ModelError or UsageError in one line is all that may come of one."""
    refused: dict[str, str] = {}
    count = 0
    for name, change in changes:
        path.write_bytes(build(changed(document, change)))
        for step in steps:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", RuntimeWarning)
                    step(path)
            except (ModelError, UsageError) as error:
                refused[name], count = str(error), count + 1
            except Exception as error:
                raise AssertionError(f"{name}: {error!r}") from error
    assert not {name: said for name, said in refused.items() if not said.isprintable() or len(said) > 1000}
    return count


def some(changes: list[tuple[str, Change]], count: int, seed: int) -> list[tuple[str, Change]]:
    """Return so many of the changes."""
    return random.Random(seed).sample(changes, min(count, len(changes)))


@pytest.mark.parametrize(
    ("case", "kind", "count"),
    [("llama31", "gpt2", 250), ("qwen3_moe", "llama", 150), *(
        slow(name, kind, 300) for name, kind in (
            ("llama31", "llama"), ("qwen3_next", "gpt2"), ("gemma3_text", "llama"), ("phi3_longrope", "gpt2"),
            ("gpt_oss_bf16", "gpt2"), ("glm4_moe", "gpt2"), ("lfm2", "gpt2"), ("qwen3_5_moe_text", "gpt2"),
            ("ministral3", "gpt2"),
        )
    )],
)  # fmt: skip
def test_opened_or_refused(case: str, kind: str, count: int, tmp_path: Path) -> None:
    document = written(case_of(case), tmp_path / "made", kind)
    every = [*changes_of_keys(document), *changes_of_words(document), *changes_of_tensors(document)]
    path = tmp_path / "model.gguf"
    path.write_bytes(build(document))
    for step in (open_all, load_tokenizer, declared_stop_ids):
        step(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = some(every, count, count)
    refused = outcomes(document, tried, path, open_all, load_tokenizer, declared_stop_ids)
    assert len(tried) // 4 < refused < 3 * len(tried)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


@pytest.mark.parametrize(
    ("case", "count"),
    [("llama31", 40), slow("llama31", 400), slow("qwen3_moe", 250), slow("qwen3_next", 200), slow("lfm2", 200)],
)
def test_run_or_refused(case: str, count: int, tmp_path: Path) -> None:
    """One in three of these files can be loaded; other types of tensors are left out: each has kernels to compile."""
    document = written(case_of(case), tmp_path / "made")
    every = [*changes_of_keys(document), *changes_of_tensors(document)]
    tried = some([each for each in every if " of type " not in each[0]], count, count)
    assert 0 < outcomes(document, tried, tmp_path / "model.gguf", run) < len(tried)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("qwen2", {"attention.head_count": 2**14, "attention.head_count_kv": 2**14, "attention.key_length": 2**12,
                   "attention.value_length": 2**12, "rope.dimension_count": 2**12}),
        ("qwen3_next", {"ssm.inner_size": 2**26}),
        ("qwen3_next", {"ssm.time_step_rank": 2**20, "ssm.inner_size": 2**30, "ssm.group_count": 2**20}),
        ("qwen3_moe", {"expert_count": 2**12}),
    ],
)  # fmt: skip
def test_sizes_that_no_tensor_has(case: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """Nothing of the size that metadata imply is made before it is compared with the file."""
    document = written(case_of(case), tmp_path / "made")
    architecture = document.keys[b"general.architecture"].value.decode()
    for key, size in sizes.items():
        document.keys[f"{architecture}.{key}".encode()] = number("U64", size)
    path, before = tmp_path / "model.gguf", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.write_bytes(build(document))
    with pytest.raises(ModelError, match="and all tensors have"):
        open_model(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


@pytest.mark.parametrize("name", ["output_norm.weight", "output.weight", ""])
def test_values_that_overflow(name: str, tmp_path: Path) -> None:
    """Finite weights, or parameters near 0, may give logits that are no numbers: tokens are chosen still."""
    document = written(case_of("llama31"), tmp_path / "made")
    if name:
        entry = document.tensor(name)
        entry.data = b"\xff\xff\x7f\x7f" * (len(entry.data) // 4)
    path = tmp_path / "model.gguf"
    path.write_bytes(build(document))
    model = OneRank(path, nthreads=1, max_seq_len=32, quiet=True)
    assert np.isfinite(model.logits([3, 4])).all() == (not name)
    near_0 = {"temperature": 1e-320, "min_p": 0.1}, {"repeat_penalty": 1e-50, "min_p": 0.1}
    for more in ({"temperature": 0}, {"min_p": 0.1}, {"top_p": 0.5}, {"top_k": 3}, {"logprobs": 2}, *near_0):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found = model.generate([3, 4], SamplingParams(max_tokens=3, ignore_eos=True, **more))
        assert len(found.token_ids) == 3


@pytest.mark.parametrize("model", [None, "none", "no_vocab"])
def test_without_a_vocabulary(model: str | None, tmp_path: Path) -> None:
    document = written(case_of("llama31"), tmp_path / "made")
    for key in [key for key in document.keys if key.startswith(b"tokenizer.")]:
        del document.keys[key]
    if model is not None:
        document.keys[b"tokenizer.ggml.model"] = text(model)
    path = tmp_path / "model.gguf"
    path.write_bytes(build(document))
    assert load_tokenizer(path) is None
    document.keys[b"tokenizer.ggml.model"] = text("gpt2")
    path.write_bytes(build(document))
    with pytest.raises(ModelError, match="no vocabulary"):
        load_tokenizer(path)
