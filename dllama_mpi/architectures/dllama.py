"""What the header of a Distributed Llama model says, as the config.json that the same architecture has elsewhere."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from ..model.config import ModelConfig
from ..weights.dllama import LLAMA, QWEN3_MOE, DllamaFile
from ..weights.gguf_tensors import FileTensors
from ..weights.mapped import MappedSource
from .base import held_formats
from .gguf_places import places
from .registry import read_model_config

DllamaTensors = FileTensors[DllamaFile]
_EPSILONS = {5: 1e-5, 6: 1e-6}
_SILU = 1
_ROPE_HALVES, _ROPE_LLAMA31 = 1, 2  # 0: neighbours, unscaled; 2: neighbours, scaled; 1: halves of a head
_ROPES = (0, _ROPE_HALVES, _ROPE_LLAMA31)
_SCALING = {
    "rope_scaling_factor": "factor",
    "rope_scaling_low_freq_factor": "low_freq_factor",
    "rope_scaling_high_freq_factor": "high_freq_factor",
    "rope_scaling_orig_max_seq_len": "original_max_position_embeddings",
}


def _known(file: DllamaFile, key: str, value: int, known: tuple[int, ...], about: str = "") -> int:
    if value not in known:
        told = ", ".join(map(str, known))
        raise ModelError(f"{file.path}: {key} is {value}{about}; supported: {told}")
    return value


def _scaling(file: DllamaFile) -> dict[str, Any] | None:
    """Return the rope's scaling. A factor alone counts as well, as in Distributed Llama.

    Raises:
        ModelError: a part of it is missing, or the architecture has none.
    """
    wanted = file.get("rope_type") == _ROPE_LLAMA31 or file.get("rope_scaling_factor", 1) != 1
    if not wanted:
        return None
    if file.architecture != LLAMA or file.get("rope_type") == _ROPE_HALVES:
        raise ModelError(
            f"{file.path}: a scaled rope, which is not supported with {file.architecture} and this rope_type"
        )
    missing = next((key for key in _SCALING if key not in file.said), None)
    if missing is not None:
        raise ModelError(f"{file.path}: the header has a scaled rope and no {missing}; get it again")
    return {"rope_type": "llama3", **{theirs: file.get(ours) for ours, theirs in _SCALING.items()}}


def dllama_json(file: DllamaFile) -> dict[str, Any]:
    """Return what a file's header says of a model as a config.json.

    Raises:
        ModelError: something that is not supported.
    """
    _known(file, "version", file.get("version"), (0,))
    _known(
        file, "hidden_act", file.get("hidden_act", _SILU), (_SILU,), " (GELU)" if not file.get("hidden_act", 1) else ""
    )
    _known(file, "rope_type", file.get("rope_type"), _ROPES)
    made: dict[str, Any] = {
        "model_type": file.architecture,
        "vocab_size": file.get("vocab_size"),
        "hidden_size": file.get("dim"),
        "intermediate_size": file.get("hidden_dim"),
        "num_hidden_layers": file.get("n_layers"),
        "num_attention_heads": file.get("n_heads"),
        "num_key_value_heads": file.get("n_kv_heads"),
        "head_dim": file.head_dim,
        "max_position_embeddings": file.get("max_seq_len"),
        "rms_norm_eps": _EPSILONS[_known(file, "norm_epsilon", file.get("norm_epsilon", 5), tuple(_EPSILONS))],
        "rope_theta": float(file.get("rope_theta", 10000)),
        "rope_scaling": _scaling(file),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,  # the table is F32, and the lm_head there beside it
    }
    if file.architecture == LLAMA:
        made["mlp_bias"] = False
    if file.architecture == QWEN3_MOE:
        made |= {
            "num_experts": file.get("n_experts"),
            "num_experts_per_tok": file.get("n_active_experts"),
            "moe_intermediate_size": file.get("moe_hidden_dim"),
            "norm_topk_prob": True,
        }
    return made


def dllama_config(file: DllamaFile) -> ModelConfig:
    """Return the same, read.

    Raises:
        ModelError: as there, or a value that cannot be.
    """
    return read_model_config(dllama_json(file), str(file.path))


def dllama_source(source: DllamaTensors, config: ModelConfig) -> MappedSource:
    """Return a file's tensors under the table's names, each matrix in the format that keeps what is there."""
    file = source.model
    neighbours = file.architecture == LLAMA and file.get("rope_type") != _ROPE_HALVES
    found = places(config, set(source.names()), permuted=neighbours)
    return MappedSource(source, found, (), held_formats(config, found, source.format_of))
