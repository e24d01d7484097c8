"""Where the dense families' tensors are: every one is used, others are refused, and converted files hold the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dllama_mpi.architectures.registry import architecture_of, read_model_config
from dllama_mpi.errors import ModelError
from dllama_mpi.model.recipe import whole_parts
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.startup.opening import open_model
from dllama_mpi.weights.convert import Conversion, convert
from tests.one_rank import OneRank
from tests.tiny_dense import DENSE_CASES
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model
from tests.tiny_models.references import load_reference
from tests.tiny_models.tensors import tensor_specs

every_case = pytest.mark.parametrize("case", DENSE_CASES.values(), ids=DENSE_CASES)


def logits(folder: Path, weights: str | None, tokens: list[int]) -> np.ndarray:
    """Return the logits after each token on one rank."""
    return OneRank(folder, weights=weights, nthreads=1, max_seq_len=64).logits(tokens)


@pytest.mark.parametrize("name", ["gemma3", "phi4_mini", "ernie4_5_bias", "olmo2"])
def test_logits_after_conversion_are_those_of_quantising_while_loading(name: str, tmp_path: Path) -> None:
    """What is shifted, fused or in another order in the files is as the table has it in converted ones."""
    case = DENSE_CASES[name]
    folder, tokens = write_model(case, tmp_path / "source"), load_reference(case).tokens[:12].tolist()
    found = open_model(str(folder))
    conversion = Conversion(found.whole, found.formats("q80"), whole_parts(found.config), False)
    convert(conversion, tmp_path / "new", TensorParallelGroup(None))
    np.testing.assert_array_equal(logits(tmp_path / "new", None, tokens), logits(folder, "q80", tokens))


@every_case
def test_every_tensor_has_its_place(case: Case) -> None:
    """Nothing of the decoder is left over, nothing is missing but the lm_head of tied models."""
    config, names = read_model_config(case.config), set(tensor_specs(case.config))
    places = architecture_of(case.config).places(config, names)
    used = {name for place in places.values() for name in place.names}
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in names - used)
    heads = ("lm_head.weight", "language_model.lm_head.weight")
    assert len(used - names) == int(config.tie_word_embeddings)
    assert all(name in heads for name in used - names)


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
