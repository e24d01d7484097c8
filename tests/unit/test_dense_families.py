"""The dense families on one rank, at f32, against transformers: logits and greedy tokens, however prompts are fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.architectures.registry import architecture_of, read_model_config
from dllama_mpi.engine.llm import LLM
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.errors import ModelError, UsageError
from dllama_mpi.model.recipe import whole_parts
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.startup.opening import open_model
from dllama_mpi.weights.convert import Conversion, convert
from tests.tiny_dense import DENSE_CASES
from tests.tiny_models import GREEDY_TOKENS, Case, load_reference, tensor_specs, write_model

TOLERANCE = 1e-4
"""Largest difference from transformers' float32 logits, which spread over about 10; 4e-5 is measured."""
GREEDY = SamplingParams(temperature=0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
every_case = pytest.mark.parametrize("case", DENSE_CASES.values(), ids=DENSE_CASES)


def load(folder: Path, **options: Any) -> LLM:
    """Load a model on one rank, at f32, with room for three sequences."""
    given = {"weights": "f32", "nthreads": 1, "max_seq_len": 64, "max_batch": 3} | options
    return LLM(folder, group=TensorParallelGroup(None), **given)


@every_case
def test_logits_and_greedy_tokens_are_the_references(case: Case, tmp_path: Path) -> None:
    reference, folder = load_reference(case), write_model(case, tmp_path)
    tokens, prompt = reference.tokens.tolist(), reference.greedy_prompt.tolist()
    found = []
    for chunk in (256, 7):
        llm = load(folder, prefill_chunk=chunk)
        logits = llm.logits(tokens)
        assert logits is not None
        found.append(logits)
        np.testing.assert_allclose(logits, reference.logits, rtol=0, atol=TOLERANCE)
        assert llm.generate(prompt, GREEDY).token_ids == reference.greedy.tolist()
        # The same prompt among others: longer, shorter, and one that waits for a slot.
        others = llm.generate([tokens[:5], prompt, tokens[3:40], tokens[:1]], GREEDY)
        assert others[1].token_ids == reference.greedy.tolist()
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(("name", "weights"), [("gemma2", "q40"), ("olmo2", "f32"), ("hunyuan", "f32")])
def test_chunks_and_threads_change_no_bit(name: str, weights: str, tmp_path: Path) -> None:
    case = DENSE_CASES[name]
    folder, tokens = write_model(case, tmp_path), load_reference(case).tokens.tolist()
    whole = load(folder, weights=weights).logits(tokens)
    for chunk in (1, 7):
        np.testing.assert_array_equal(load(folder, weights=weights, prefill_chunk=chunk).logits(tokens), whole)
    try:
        two = load(folder, weights=weights, nthreads=2)
    except UsageError:
        pytest.skip("this process may use one core")
    np.testing.assert_array_equal(two.logits(tokens), whole)


@pytest.mark.parametrize("name", ["gemma3", "phi4_mini", "ernie4_5_bias", "olmo2"])
def test_logits_after_conversion_are_those_of_quantising_while_loading(name: str, tmp_path: Path) -> None:
    """What is shifted, fused or in another order in the files is as the table has it in converted ones."""
    case = DENSE_CASES[name]
    folder, tokens = write_model(case, tmp_path / "source"), load_reference(case).tokens[:12].tolist()
    found = open_model(str(folder))
    conversion = Conversion(found.whole, found.formats("q80"), whole_parts(found.config), False)
    convert(conversion, tmp_path / "new", TensorParallelGroup(None))
    np.testing.assert_array_equal(
        load(tmp_path / "new", weights=None).logits(tokens), load(folder, weights="q80").logits(tokens)
    )


# ---- where tensors are


@every_case
def test_every_tensor_has_its_place(case: Case) -> None:
    """Nothing of the decoder is left over, nothing is missing but the lm_head of tied models."""
    config, names = read_model_config(case.config), set(tensor_specs(case.config))
    places = architecture_of(case.config).places(config, names)
    used = {name for place in places.values() for name in place.names}
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in names - used)
    missing = used - names
    assert not missing if not config.tie_word_embeddings else {name.split(".")[-2] for name in missing} == {"lm_head"}


@pytest.mark.parametrize("name", ["gemma3", "gemma3_renamed", "mistral3"])
def test_an_unknown_tensor_beside_the_decoder_is_refused(name: str, tmp_path: Path) -> None:
    folder = write_model(DENSE_CASES[name], tmp_path)
    open_model(str(folder))  # vision tensors are known
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"vision_tower", b"vision_power"))
    for path in folder.glob("*.index.json"):
        path.write_text(path.read_text().replace("vision_tower", "vision_power"))
    with pytest.raises(ModelError, match=r"has no use for tensors .*vision_power"):
        open_model(str(folder))
