"""All architectures by their model_type, and reading a config.json of any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..model.config import ModelConfig
from . import (
    ernie,
    gemma2,
    gemma3,
    glm4_moe,
    gpt_oss,
    granite,
    granitemoe,
    hunyuan,
    lfm2,
    llama,
    mistral3,
    mixtral,
    olmo,
    olmoe,
    phi3,
    qwen_moe,
    qwen_next,
    seed_oss,
    smollm3,
)
from .base import Architecture
from .keys import Json, Keys
from .quantisation import METHODS, kept_beside, method_of, quantisation_of, read_scheme

ARCHITECTURES: dict[str, Architecture] = {
    **llama.FAMILIES,
    **gemma2.FAMILIES,
    **gemma3.FAMILIES,
    **phi3.FAMILIES,
    **granite.FAMILIES,
    **smollm3.FAMILIES,
    **olmo.FAMILIES,
    **mistral3.FAMILIES,
    **seed_oss.FAMILIES,
    **ernie.FAMILIES,
    **hunyuan.FAMILIES,
    **qwen_next.FAMILIES,
    **lfm2.FAMILIES,
    **qwen_moe.FAMILIES,
    **mixtral.FAMILIES,
    **olmoe.FAMILIES,
    **granitemoe.FAMILIES,
    **gpt_oss.FAMILIES,
    **glm4_moe.FAMILIES,
}


def architecture_of(config: Json, where: str = "config.json") -> Architecture:
    """Return the architecture of a parsed config.json.

    Raises:
        ModelError: an unknown one.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"{where}: model_type {kind!r} is not supported; supported are {known}")
    return ARCHITECTURES[kind]


def read_model_config(config: Json, where: str = "config.json") -> ModelConfig:
    """Return what a parsed config.json says; `where` names it in errors.

    Raises:
        ModelError: an unknown architecture, a missing key, a value that cannot be, or a key that is not known.
    """
    architecture = architecture_of(config, where)
    method = method_of(config)
    if method and method not in METHODS and method not in architecture.quantised:
        known = ", ".join(sorted({*METHODS, *architecture.quantised}))
        raise ModelError(
            f"{where}: weights quantised by {method[:60]!r} cannot be read, but those by {known}; get such a model, a"
            " GGUF file, or the BF16, F16 or F32 model"
        )
    read_scheme(config, where)
    keys = Keys(config, where)
    keys.ignore("quantization_config", "compression_config")
    made = architecture.read(keys)
    keys.finish()
    if len({rope.dim for rope in made.ropes}) > 1:
        raise ModelError(f"{where}: layers rotate different numbers of dimensions, which is not supported")
    return made


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a model directory.

    Raises:
        ModelError: no such directory, no config.json in it, or not JSON.
    """
    path = folder / "config.json"
    if not folder.exists():
        raise ModelError(f"{folder}: no such model directory; give --model a folder with config.json and *.safetensors")
    if not path.is_file():
        raise ModelError(f"{folder}: not a model directory (no config.json); give a folder as Hugging Face lays it out")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{path}: cannot be read as JSON: {what}") from None
    if not isinstance(parsed, dict):
        raise ModelError(f"{path}: not a JSON object")
    if quantisation_of(parsed) is None and (beside := kept_beside(folder)):
        parsed["quantization_config"] = beside
    return parsed
