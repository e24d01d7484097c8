"""Quantised safetensors that cannot be read, or that do not fit: one line with the value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.cli import main
from dllama_mpi.errors import ModelError
from tests.all_cases import ALL_CASES
from tests.quantised_files import VARIETIES, change_config, read_raw, write_quantised, write_raw
from tests.tiny_models.cases import CASES

Q = "model.layers.0.self_attn.q_proj"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def compressed(kind: str = "pack-quantized", weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors."""
    groups = {"group_0": {"targets": ["Linear"], "weights": INT4 | (weights or {})}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups} | more


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
ROTATED = {"config_groups": {"R1": {"type": "hadamard"}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"bits": 3}, "weights of 3 bits cannot be read; get a model in AWQ, GPTQ"),
        (GPTQ | {"bits": 2}, "weights of 2 bits cannot be read"),
        (GPTQ | {"bits": "four"}, "bits is 'four'; it must be a number"),
        (GPTQ | {"group_size": 0.5}, "group_size is 0.5; it must be a whole number"),
        (GPTQ | {"group_size": -7}, "group_size is -7; it must be a whole number"),
        (GPTQ | {"sym": "yes"}, "sym is 'yes'; it must be true or false"),
        (GPTQ | {"is_marlin_format": True}, "GPTQ weights stored as 'marlin' cannot be read"),
        (GPTQ | {"checkpoint_format": "marlin"}, "GPTQ weights stored as 'marlin' cannot be read"),
        (GPTQ | {"checkpoint_format": "bitblas"}, "GPTQ weights stored as 'bitblas' cannot be read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "AWQ weights stored as 'gemv_fast' cannot be"),
        ({"quant_method": "awq", "bits": 8}, "weights of 8 bits cannot be read"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is [128]; it must be two whole"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size is [128, 0]; it must be two"),
        (compressed("marlin-24"), "compressed-tensors weights in format 'marlin-24' cannot be read"),
        (compressed("nvfp4-pack-quantized"), "weights in format 'nvfp4-pack-quantized' cannot be read"),
        (compressed(weights={"num_bits": 3}), "config_groups.group_0: weights: weights of 3 bits of type 'int'"),
        (compressed(weights={"type": "float"}), "weights of 4 bits of type 'float' cannot be read"),
        (compressed(weights={"strategy": "tensor_group"}), "scales by 'tensor_group' cannot be read"),
        (compressed(transform_config=ROTATED), "weights that are transformed (transform_config), by rotations"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "(sparsity_config 'sparse-24-bitmask')"),
        (compressed(config_groups=[1]), "config_groups is [1]; it must be an object"),
        (compressed(config_groups={"group_0": None}), "weights is None; it must be an object"),
        *(
            ({"quant_method": method}, f"weights quantised by '{method}' cannot be read, but those by awq, compressed")
            for method in ("bitsandbytes", "hqq", "aqlm", "torchao", "quark", "mxfp4")
        ),
        ([], "weights quantised by '[]' cannot be read"),
    ],
    ids=str,
)
def test_what_cannot_be_read(config: Any, message: str) -> None:
    with pytest.raises(ModelError) as refused:
        read_model_config(CASES["llama31"].config | {"quantization_config": config}, "here")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "more",
    [
        {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        {"sparsity_config": {}},
        {"transform_config": {}},
        {"quantization_status": "compressed", "global_compression_ratio": 1.5, "version": "0.9"},
    ],
    ids=str,
)
def test_what_changes_nothing_here(more: dict[str, Any]) -> None:
    config = CASES["llama31"].config
    assert read_model_config(config | {"quantization_config": compressed(**more)}) == read_model_config(config)


Parts = dict[str, tuple[str, np.ndarray]]
Change = Callable[[Parts], None]


def without(end: str) -> Change:
    """Return what takes a part away."""
    return lambda parts: parts.pop(Q + end) and None


def shorter(end: str, axis: int = 0) -> Change:
    """Return what takes the last of a part's lines away."""

    def change(parts: Parts) -> None:
        dtype, data = parts[Q + end]
        parts[Q + end] = dtype, np.ascontiguousarray(np.delete(data, -1, axis))

    return change


def with_value(end: str, value: Any) -> Change:
    """Return what changes the first of a part's values."""

    def change(parts: Parts) -> None:
        parts[Q + end][1].reshape(-1)[0] = value

    return change


def of_type(end: str, dtype: str) -> Change:
    """Return what calls a part's elements something else."""

    def change(parts: Parts) -> None:
        parts[Q + end] = dtype, parts[Q + end][1]

    return change


INF = 0x7C00  # float16's bits


@pytest.mark.parametrize(
    ("variety", "change", "message"),
    [
        ("gptq", without(".scales"), f"tensor {Q}.scales is missing beside the codes of its matrix; get it again"),
        ("awq", without(".qzeros"), f"tensor {Q}.qzeros is missing beside the codes"),
        ("int8", without(".weight_scale"), f"tensor {Q}.weight_scale is missing beside the codes"),
        ("packed-4", without(".weight_shape"), f"tensor {Q}.weight_shape is missing beside the codes"),
        ("gptq", shorter(".qzeros", 1), f"tensor {Q}.qzeros has 7 words for 64 rows, which is 3.5 bits; 4 and 8 bits"),
        ("gptq", shorter(".qzeros"), f"tensors {Q}.qzeros [1, 8] and {Q}.scales [2, 64] do not fit together"),
        ("gptq", shorter(".qweight", 1), f"tensors {Q}.qweight [8, 63] and {Q}.scales [2, 64] do not fit together"),
        ("gptq", shorter(".scales"), "scales of 1 groups"),
        ("awq", shorter(".qweight", 1), f"tensors {Q}.qweight [64, 7] and {Q}.scales [2, 64] do not fit together"),
        ("awq-gemv", shorter(".scales", 0), f"tensors {Q}.qweight [64, 8] and {Q}.scales [63, 32] do not fit together"),
        ("gptq-act-order", with_value(".g_idx", 2), f"tensor {Q}.g_idx has 64 groups from 0 to 2; 64 columns need 64"),
        ("gptq-act-order", with_value(".g_idx", -1), f"tensor {Q}.g_idx has 64 groups from -1 to 1"),
        ("gptq-act-order", shorter(".g_idx"), f"tensor {Q}.g_idx has 63 groups from 0 to 1"),
        ("gptq", with_value(".scales", INF), f"tensor {Q}.qweight has 1 scales that are NaN or infinite; get it again"),
        ("gptq-act-order", with_value(".scales", INF), f"tensor {Q}.qweight has 1 scales that are NaN or infinite"),
        ("gptq", with_value(".qzeros", 0), f"tensor {Q}.qweight has a zero-point of 1, but the config says that it is"),
        ("awq", of_type(".qzeros", "F32"), f"tensor {Q}.qzeros is F32 of shape [2, 8]; it must be I32 in 2 dimensions"),
        ("gptq", of_type(".qweight", "F32"), f"tensor {Q}.qweight is F32 of shape [8, 64]; it must be I32 in 2"),
        ("packed-4", with_value(".weight_shape", 65), f"{Q}.weight_packed [64, 8] and {Q}.weight_shape [2] do not"),
        ("packed-4", shorter(".weight_scale", 1), "scales of 1 groups"),
        ("packed-4-zeros", shorter(".weight_zero_point", 1), f"{Q}.weight_zero_point [8, 1] and {Q}.weight_scale"),
        ("int8", shorter(".weight_scale"), f"tensors {Q}.weight_scale [63, 1] and codes of [64, 64] do not fit"),
        ("fp8-block", shorter(".weight_scale_inv"), f"tensors {Q}.weight_scale_inv [1, 2] and codes"),
        ("fp8-block", with_value(".weight", 127), f"tensor {Q}.weight has 1 values that are NaN or infinite; get"),
        ("fp8-tensor", with_value(".weight_scale", np.nan), f"tensor {Q}.weight has 64 scales that are NaN or"),
        ("gptq", shorter(".qweight"), f"tensor {Q}.g_idx has 64 groups from 0 to 1; 56 columns need 56 from 0 to 1"),
        ("awq", shorter(".qweight"), f"tensor {Q}.weight has shape [64, 63], but config.json implies [64, 64]"),
        ("awq-gemv", shorter(".qweight"), f"tensors {Q}.qzeros [64, 4] and {Q}.scales [64, 32] do not fit"),
    ],
)
def test_parts_that_do_not_fit(
    variety: str, change: Change, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = write_quantised(ALL_CASES["llama31"], VARIETIES[variety], tmp_path)
    parts = read_raw(folder)
    change(parts)
    write_raw(folder, parts)
    assert main(["convert", str(folder), str(tmp_path / "made")]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "Traceback" not in err


def test_zeros_that_are_not_in_the_middle_may_be_told(tmp_path: Path) -> None:
    """The remedy that the refusal names works."""
    folder, _ = write_quantised(ALL_CASES["llama31"], VARIETIES["gptq"], tmp_path)
    parts = read_raw(folder)
    with_value(".qzeros", 0)(parts)
    write_raw(folder, parts)
    change_config(folder, quantization_config={**VARIETIES["gptq"].config, "sym": False})
    assert main(["convert", str(folder), str(tmp_path / "made")]) == 0


def test_biases_that_are_zero_and_scales_of_activations_are_of_no_use(tmp_path: Path) -> None:
    folder, _ = write_quantised(ALL_CASES["llama31"], VARIETIES["gptq"], tmp_path)
    parts = read_raw(folder)
    parts |= {f"{Q}.bias": ("F16", np.zeros(64, np.uint16)), f"{Q}.input_scale": ("F32", np.ones(1, np.float32))}
    parts["model.layers.0.self_attn.k_scale"] = "F32", np.ones(1, np.float32)
    write_raw(folder, parts)
    assert main(["convert", str(folder), str(tmp_path / "made")]) == 0
    parts[f"{Q}.bias"][1][3] = 1
    write_raw(folder, parts)
    assert main(["convert", str(folder), str(tmp_path / "again")]) == 2


def test_a_quantised_table_of_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = write_quantised(ALL_CASES["llama31"], VARIETIES["int8"], tmp_path)
    parts, name = read_raw(folder), "model.embed_tokens.weight"
    parts[name] = "I8", np.zeros(parts[name][1].shape, np.int8)
    parts[f"{name}_scale"] = "F32", np.ones((len(parts[name][1]), 1), np.float32)
    write_raw(folder, parts)
    assert main(["info", str(folder)]) == 2
    assert f"tensor {name} is quantised, but a table of embeddings must be plain" in capsys.readouterr().err
