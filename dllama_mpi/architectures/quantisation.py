"""Reading quantization_config: how the weights of a published directory are quantised, or why they cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..weights.quantised import Scheme
from .keys import Json, Keys

_OTHER = "get a model in AWQ, GPTQ, compressed-tensors or FP8, a GGUF file, or the BF16 model"
_MOST_COLUMNS = 1 << 24
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
# Files in which quantisers wrote what config.json says now, and what they called it.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_RENAMED = {"w_bit": "bits", "q_group_size": "group_size"}


def quantisation_of(config: Json) -> Any:
    """Return a parsed config.json's quantization_config, wherever it has it; None if there is none."""
    text = config.get("text_config")
    places = [config, text if isinstance(text, Mapping) else {}]
    found = (place.get(key) for key in ("quantization_config", "compression_config") for place in places)
    return next((each for each in found if each is not None), None)


def method_of(config: Json) -> str:
    """Return the name of the method by which weights are quantised; "" if they are not."""
    found = quantisation_of(config)
    if found is None:
        return ""
    return str(found.get("quant_method", "?")) if isinstance(found, Mapping) else str(found)


def kept_beside(folder: Path) -> dict[str, Any]:
    """Return the quantization_config that a file beside config.json is; nothing if there is none."""
    for name, method in _FILES.items():
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError, RecursionError) as error:
                raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
            if isinstance(found, dict):
                return {"quant_method": method} | {_RENAMED.get(str(key), str(key)): found[key] for key in found}
    return {}


def read_scheme(config: Json, where: str) -> Scheme | None:
    """Return what a parsed config.json says of quantised weights; None if they are not, or the architecture knows them.

    Raises:
        ModelError: a method, or a variety of one, that cannot be read.
    """
    method = method_of(config)
    if method not in METHODS:
        return None
    found = quantisation_of(config)
    keys = Keys(found if isinstance(found, Mapping) else {}, f"{where}: quantization_config")
    return METHODS[method](keys)


def _refused(keys: Keys, what: str) -> ModelError:
    return ModelError(f"{keys.where}: {what} cannot be read; {_OTHER}")


def _bits(keys: Keys, known: tuple[int, ...], default: int | None = None) -> int:
    bits = keys.count("bits", default, least=0, most=64)
    if bits not in known:
        raise _refused(keys, f"weights of {bits} bits")
    return bits


def _group(keys: Keys, default: int = 128) -> int:
    """Return the columns of a group; -1 for all."""
    if keys.get("group_size", default) in (-1, 0):
        return -1
    return keys.count("group_size", default, most=_MOST_COLUMNS)


def _format(keys: Keys, default: str) -> str:
    """Return the variety of a method: what its tensors are like."""
    named = next((key for key in ("checkpoint_format", "format") if key in keys), "")
    return str(keys.get(named)).lower() if named else default


def _grouped(group: int) -> str:
    return "one group a row" if group < 0 else f"groups of {group}"


def _symmetric(is_so: bool) -> str:
    return "symmetric" if is_so else "with zero-points"


def _gptq(keys: Keys) -> Scheme:
    kind = "marlin" if keys.get("is_marlin_format") is True else _format(keys, "gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise _refused(keys, f"GPTQ weights stored as {kind[:30]!r}")
    bits, group, symmetric = _bits(keys, (4, 8)), _group(keys), keys.flag("sym", True)
    words = ["GPTQ", f"{bits} bits", _grouped(group), _symmetric(symmetric)]
    if keys.flag("desc_act", False):
        words.append("ordered by activations")
    mixed = isinstance(keys.get("dynamic"), Mapping)
    return Scheme("gptq", ", ".join(words), group, symmetric, old_zeros=kind == "gptq", mixed=mixed)


def _awq(keys: Keys) -> Scheme:
    kind = str(keys.get("version", _format(keys, "gemm"))).lower()
    if kind not in ("gemm", "gemv"):
        raise _refused(keys, f"AWQ weights stored as {kind[:30]!r}")
    bits, group, zeros = _bits(keys, (4,), 4), _group(keys), keys.flag("zero_point", True)
    about = f"AWQ ({kind}), {bits} bits, {_grouped(group)}, {_symmetric(not zeros)}"
    return Scheme("awq" if kind == "gemm" else "gemv", about, group, not zeros)


def _fp8(keys: Keys) -> Scheme:
    block = keys.get("weight_block_size")
    if block is None:
        each = "row" if keys.get("quant_method") == "fbgemm_fp8" else "matrix"
        return Scheme("fp8", f"FP8, a scale a {each}")
    _check_block(keys, "weight_block_size", block)
    return Scheme("fp8", f"FP8, blocks of {block[0]} x {block[1]}", block=(block[0], block[1]))


def _check_block(keys: Keys, key: str, block: Any) -> None:
    good = isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= _MOST_COLUMNS for n in block)
    keys.require(good, key, "two whole numbers, rows and columns")


def _compressed(keys: Keys) -> Scheme:
    kind = str(keys.get("format", "?"))
    if kind not in _FORMATS:
        raise _refused(keys, f"compressed-tensors weights in format {kind[:30]!r}")
    sparsity = keys.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity and sparsity.get("format") not in (None, "dense"):
        raise _refused(keys, f"sparse weights (sparsity_config {str(sparsity['format'])[:30]!r})")
    transforms = keys.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise _refused(keys, "weights that are transformed (transform_config), by rotations for example,")
    groups = keys.get("config_groups", {})
    keys.require(isinstance(groups, Mapping), "config_groups", "an object")
    found = [_weights(keys, name, group) for name, group in groups.items()]
    if not found:
        return Scheme("compressed-tensors", f"compressed-tensors, {kind}")
    blocks = {block for _, _, _, block in found if block}
    if len(blocks) > 1:
        raise _refused(keys, f"weights in blocks of several sizes, {', '.join(map(str, sorted(blocks)))},")
    words = sorted({words for words, _, _, _ in found})
    return Scheme(
        "compressed-tensors",
        f"compressed-tensors, {kind}, {'; '.join(words)}",
        found[0][1],
        all(symmetric for _, _, symmetric, _ in found),
        block=next(iter(blocks), None),
        mixed=len(words) > 1,
    )


def _weights(keys: Keys, name: str, group: Any) -> tuple[str, int, bool, tuple[int, int] | None]:
    """Return what a group of matrices is like: words, columns of a group, whether it is symmetric, blocks."""
    where = f"{keys.where}: config_groups.{str(name)[:30]}"
    one = Keys(group if isinstance(group, Mapping) else {}, where)
    kind = str(one.get("format") or keys.get("format"))
    if kind not in _FORMATS:
        raise _refused(one, f"weights in format {kind[:30]!r}")
    weights = one.section("weights")
    bits, of = weights.count("num_bits", 8, most=64), str(weights.get("type", "int"))
    if (of, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise _refused(weights, f"weights of {bits} bits of type {of[:30]!r}")
    symmetric, size = weights.flag("symmetric", True), weights.get("group_size")
    columns = -1 if size in (None, -1) else weights.count("group_size", most=_MOST_COLUMNS)
    strategy, block = str(weights.get("strategy", "")), None
    said = f"groups of {columns}" if columns > 0 else "a scale a row" if strategy == "channel" else "a scale a matrix"
    if strategy == "block":
        found = weights.get("block_structure")
        _check_block(weights, "block_structure", found)
        block = (found[0], found[1])
        said = f"blocks of {block[0]} x {block[1]}"
    elif strategy not in ("", "group", "channel", "tensor"):
        raise _refused(weights, f"scales by {strategy[:30]!r}")
    return f"{'FP' if of == 'float' else 'int'}{bits}, {said}, {_symmetric(symmetric)}", columns, symmetric, block


METHODS: Mapping[str, Callable[[Keys], Scheme]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
}
"""What quantization_config calls the methods whose weights any architecture may have."""
