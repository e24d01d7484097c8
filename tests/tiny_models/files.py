"""The tiny models' files: safetensors, and Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tests.tiny_models.case import Case, Config
from tests.tiny_models.tensors import stored_tensors


def write_safetensors(path: Path, values: Mapping[str, npt.NDArray[Any]], dtype: str | Mapping[str, str]) -> None:
    """Write ``values`` (bfloat16 as uint16 bits) as one safetensors file; ``dtype`` is the type of all, or by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    order = sorted(values, key=lambda name: (-values[name].itemsize, name))  # so that everything is aligned
    for name in order:
        end = offset + values[name].nbytes
        kind = dtype if isinstance(dtype, str) else dtype[name]
        header[name] = {"dtype": kind, "shape": list(values[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(values[name].tobytes())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as Hugging Face writes it: sorted keys, two spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _generation_config(case: Case) -> Config:
    """Return the contents of ``generation_config.json``."""
    if case.generation is not None:
        return case.generation
    keys = ("bos_token_id", "eos_token_id", "transformers_version")
    return {"_from_model_config": True} | {key: case.config[key] for key in keys if key in case.config}


def _split(values: Mapping[str, npt.NDArray[Any]], shards: int) -> list[dict[str, npt.NDArray[Any]]]:
    """Split tensors, in their order, into ``shards`` parts of about the same number of bytes; none is empty."""
    total = sum(value.nbytes for value in values.values())
    parts: list[dict[str, npt.NDArray[Any]]] = [{} for _ in range(shards)]
    before = 0
    for name, value in values.items():
        parts[min(before * shards // total, shards - 1)][name] = value
        before += value.nbytes
    if not all(parts):
        raise ValueError(f"{shards} shards are too many for these tensors")
    return parts


def write_model(case: Case, folder: Path) -> Path:
    """Write a case as a Hugging Face directory and return ``folder``, which is created where missing.

    Written are ``config.json``, ``generation_config.json``, and either ``model.safetensors`` or the numbered shards
    with ``model.safetensors.index.json``. There is no tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", case.config)
    _write_json(folder / "generation_config.json", _generation_config(case))
    stored = list(stored_tensors(case))
    values = {name: value for name, _, value in stored}
    dtypes = {name: dtype for name, dtype, _ in stored}
    if case.shards == 1:
        write_safetensors(folder / "model.safetensors", values, dtypes)
        return folder
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_split(values, case.shards), start=1):
        file_name = f"model-{number:05d}-of-{case.shards:05d}.safetensors"
        write_safetensors(folder / file_name, part, dtypes)
        weight_map |= dict.fromkeys(part, file_name)
    total_size = sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return folder
