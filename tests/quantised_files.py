"""Tiny models as directories of quantised safetensors, and the same values as plain ones; packers in plain numpy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.naive_model import read_tensors
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model, write_safetensors

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Parts = dict[str, tuple[str, Array]]  # by the ends of names: the type and the values
LINEAR = re.compile(r"_proj\.weight$|gate_up_proj$|experts\.down_proj$")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of eight columns of a word, which one each nibble is, from the lowest


def words(codes: Array, bits: int) -> Array:
    """Return codes (n, k) as int32 words (n, ceil(k * bits / 32)), the first one lowest."""
    each = 32 // bits
    padded = np.pad(codes.astype(np.uint64), ((0, 0), (0, -codes.shape[1] % each)))
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    return (padded.reshape(len(codes), -1, each) << shifts).sum(axis=2).astype(np.uint32).view(np.int32)


def to_float16(values: Array) -> Floats:
    """Return values rounded to float16."""
    return values.astype(np.float16).astype(np.float32)


def bits16(values: Array) -> Array:
    """Return the bits of float16."""
    return values.astype(np.float16).view(np.uint16)


@dataclass(frozen=True)
class Rounded:
    """Codes of a matrix, with steps and zeros of groups of columns.

    Attributes:
        codes, groups: (rows, cols), and (cols,): each column's group. steps, zeros: (rows, groups).
    """

    codes: Array
    groups: Array
    steps: Floats
    zeros: Array

    @property
    def values(self) -> Floats:
        """What is stored."""
        return (self.codes - self.zeros[:, self.groups]).astype(np.float32) * self.steps[:, self.groups]


def rounded(weight: Floats, groups: Array, bits: int, symmetric: bool, least: int = 0) -> Rounded:
    """Return a matrix rounded to nearest, its codes from 0 to 2 ** bits - 1; least: the smallest zero."""
    count, most = int(groups.max()) + 1, (1 << bits) - 1
    low, high = (
        np.stack([pick(weight[:, groups == g], axis=1) for g in range(count)], axis=1) for pick in (np.min, np.max)
    )
    if symmetric:
        steps = to_float16(np.maximum(-low, high) * 2 / most + 1e-6)
        zeros = np.full(steps.shape, 1 << bits - 1)
    else:
        steps = to_float16((np.maximum(high, 0) - np.minimum(low, 0)) / most + 1e-6)
        zeros = np.clip(np.rint(-np.minimum(low, 0) / steps), least, most).astype(np.int64)
    codes = np.clip(np.rint(weight / steps[:, groups]) + zeros[:, groups], 0, most).astype(np.int64)
    return Rounded(codes, groups, steps, zeros)


def in_groups(cols: int, group: int) -> Array:
    """Return each column's group; group: columns of one, -1 for all."""
    return np.arange(cols) // (cols if group < 0 else group)


@dataclass(frozen=True)
class Variety:
    """A way to store quantised matrices.

    Attributes:
        config: quantization_config. pack: a matrix -> its parts, and the values that they stand for.
        kept: the format in which its matrices are kept. exact: whether their values are those stored.
    """

    config: Mapping[str, Any]
    pack: Callable[[Floats], tuple[Parts, Floats]] = field(repr=False)
    kept: str
    exact: bool = False


def gptq(
    bits: int = 4, group: int = 32, symmetric: bool = True, old: bool = True, order: str = "", kept: str = ""
) -> Variety:
    """Return GPTQ; old: whether zeros are stored less one. order: "", "shuffled" or "same" (with desc_act set)."""

    def pack(weight: Floats) -> tuple[Parts, Floats]:
        groups = in_groups(weight.shape[1], group)
        if order == "shuffled":
            groups = np.random.default_rng(1).permutation(groups)
        r = rounded(weight, groups, bits, symmetric, least=int(old))
        parts = {
            ".qweight": ("I32", np.ascontiguousarray(words(r.codes, bits).T)),
            ".qzeros": ("I32", words((r.zeros - int(old)).T, bits)),
            ".scales": ("F16", bits16(r.steps.T)),
            ".g_idx": ("I32", groups.astype(np.int32)),
        }
        return parts, r.values

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": order != ""}
    if not old:
        config["checkpoint_format"] = "gptq_v2"
    usual = "q40" if symmetric else "q4m"
    kept = kept or (usual if bits == 4 and order != "shuffled" else "q80")
    return Variety(config, pack, kept, kept == "q40" or (bits == 8 and symmetric and not order))


def awq(version: str = "gemm", group: int = 32) -> Variety:
    """Return AWQ, with zero-points."""

    def pack(weight: Floats) -> tuple[Parts, Floats]:
        r = rounded(weight, in_groups(weight.shape[1], group), 4, symmetric=False)

        def interleaved(codes: Array) -> Array:
            return words(codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(codes.shape), 4)

        if version == "gemm":
            parts = {
                ".qweight": ("I32", interleaved(r.codes.T)),
                ".qzeros": ("I32", interleaved(r.zeros.T)),
                ".scales": ("F16", bits16(r.steps.T)),
            }
            return parts, r.values
        multiple = {32: 4, 64: 2}.get(group, 1)
        width = (r.steps.shape[1] + 8 * multiple - 1) // (8 * multiple) * multiple
        zeros, steps = (np.pad(each, ((0, 0), (0, 8 * width - each.shape[1]))) for each in (r.zeros, r.steps))
        parts = {
            ".qweight": ("I32", words(r.codes, 4)),
            ".qzeros": ("I32", words(zeros, 4)),
            ".scales": ("F16", bits16(steps)),
        }
        return parts, r.values

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version, "zero_point": True}
    return Variety(config, pack, "q4m")


def _compressed(kind: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def packed_int(bits: int = 4, group: int = 32, symmetric: bool = True) -> Variety:
    """Return pack-quantized integers of compressed-tensors; group -1: a scale a row."""

    def pack(weight: Floats) -> tuple[Parts, Floats]:
        r = rounded(weight, in_groups(weight.shape[1], group), bits, symmetric)
        parts: Parts = {
            ".weight_packed": ("I32", words(r.codes, bits)),
            ".weight_scale": ("F16", bits16(r.steps)),
            ".weight_shape": ("I64", np.array(weight.shape)),
        }
        if not symmetric:
            parts[".weight_zero_point"] = "I32", np.ascontiguousarray(words(r.zeros.T, bits).T)
        return parts, r.values

    strategy = "channel" if group < 0 else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    weights["group_size"] = None if group < 0 else group
    kept = "q80" if bits == 8 else "q40" if symmetric else "q4m"
    return Variety(_compressed("pack-quantized", weights), pack, kept, symmetric)


def int8(symmetric: bool = True, kind: str = "int-quantized") -> Variety:
    """Return int8 of compressed-tensors, a scale a row."""

    def pack(weight: Floats) -> tuple[Parts, Floats]:
        r = rounded(weight, in_groups(weight.shape[1], -1), 8, symmetric)
        parts: Parts = {
            ".weight": ("I8", (r.codes - 128).astype(np.int8)),
            ".weight_scale": ("F16", bits16(r.steps)),
        }
        if not symmetric:
            parts[".weight_zero_point"] = "I8", (r.zeros - 128).astype(np.int8)
        return parts, r.values

    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    return Variety(_compressed(kind, weights), pack, "q80", symmetric)


def float8_values(dtype: str) -> Floats:
    """Return what the 256 codes of float8 stand for, by the definition of its fields."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if dtype == "F8_E4M3" else (5, 2, 15)
    found = []
    for code in range(256):
        exponent, mantissa = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (1 << mantissa_bits) - 1
        fraction = mantissa / 2**mantissa_bits
        size = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        if dtype == "F8_E4M3" and code & 127 == 127:
            size = np.nan
        if dtype == "F8_E5M2" and exponent == 31:
            size = np.nan if mantissa else np.inf
        found.append(-size if code > 127 else size)
    return np.array(found, np.float32)


def to_float8(values: Array, dtype: str) -> Array:
    """Return the codes of the nearest float8."""
    table = float8_values(dtype)
    codes = np.flatnonzero(np.isfinite(table))
    codes = codes[np.argsort(table[codes], kind="stable")]
    middles = (table[codes][1:] + table[codes][:-1]) / 2
    return codes[np.searchsorted(middles, values)].astype(np.uint8)


def fp8(how: str = "block", dtype: str = "F8_E4M3", scales: str = "F32", block: int = 32) -> Variety:
    """Return FP8; how: "block" (weight_scale_inv, also of fused experts), "tensor" or "channel" (weight_scale)."""
    most = 448.0 if dtype == "F8_E4M3" else 57344.0

    def pack(weight: Floats) -> tuple[Parts, Floats]:
        *experts, rows, cols = weight.shape
        down, across = {"block": (block, block), "tensor": (rows, cols), "channel": (1, cols)}[how]
        height, width = -(-rows // down), -(-cols // across)
        whole = np.zeros((*experts, height * down, width * across), np.float32)
        whole[..., :rows, :cols] = weight
        sizes = np.abs(whole).reshape(*experts, height, down, width, across).max(axis=(-3, -1))
        steps = np.maximum(sizes / np.float32(most), 1e-9).astype(np.float32)
        stored: Array = steps
        if scales == "F8_E8M0":
            stored = np.ceil(np.log2(steps)).astype(np.int64) + 127
            steps, stored = np.exp2(stored - 127).astype(np.float32), stored.astype(np.uint8)
        if scales == "BF16":
            stored = (steps.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
            steps = (stored.astype(np.uint32) << 16).view(np.float32)
        each = steps.repeat(down, axis=-2).repeat(across, axis=-1)[..., :rows, :cols]
        codes = to_float8(weight / each, dtype)
        dot = "_" if experts else ".weight_"
        name = f"{dot}scale_inv" if how == "block" else f"{dot}scale"
        if how == "tensor":
            stored = stored.reshape(())
        return {"" if experts else ".weight": (dtype, codes), name: (scales, stored)}, float8_values(dtype)[
            codes
        ] * each

    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if how == "block":
        config["weight_block_size"] = [block, block]
    if how == "channel":
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": how}
        config = _compressed("float-quantized", weights)
    return Variety(config, pack, "q80")


VARIETIES: dict[str, Variety] = {
    "gptq": gptq(),
    "gptq-groups-of-64": gptq(group=64),
    "gptq-one-group": gptq(group=-1),
    "gptq-zeros": gptq(symmetric=False),
    "gptq-zeros-v2": gptq(symmetric=False, old=False),
    "gptq-v2": gptq(old=False),
    "gptq-act-order": gptq(order="shuffled"),
    "gptq-act-order-zeros": gptq(order="shuffled", symmetric=False),
    "gptq-static-groups": gptq(order="same"),
    "gptq-groups-of-16": gptq(group=16, kept="q80"),
    "gptq-8": gptq(bits=8),
    "gptq-8-zeros": gptq(bits=8, symmetric=False),
    "awq": awq(),
    "awq-gemv": awq("gemv"),
    "awq-gemv-64": awq("gemv", 64),
    "packed-4": packed_int(),
    "packed-4-zeros": packed_int(symmetric=False),
    "packed-4-channel": packed_int(group=-1),
    "packed-8": packed_int(bits=8),
    "packed-8-zeros": packed_int(bits=8, symmetric=False),
    "int8": int8(),
    "int8-zeros": int8(symmetric=False),
    "int8-naive": int8(kind="naive-quantized"),
    "fp8-block": fp8(),
    "fp8-block-48": fp8(block=48, scales="BF16"),
    "fp8-block-powers": fp8(scales="F8_E8M0"),
    "fp8-tensor": fp8("tensor"),
    "fp8-e5m2": fp8("tensor", "F8_E5M2"),
    "fp8-channel": fp8("channel"),
}


def read_raw(folder: Path) -> dict[str, tuple[str, Array]]:
    """Return every tensor of a directory with one file as it lies, with its type."""
    content = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    found = {}
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            kind = {"F32": "<f4", "F16": "<u2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "I8": "i1"}
            data = np.frombuffer(content[start:stop], kind.get(entry["dtype"], "u1"))
            found[name] = entry["dtype"], data.reshape(entry["shape"]).copy()
    return found


def write_raw(folder: Path, values: Mapping[str, tuple[str, Array]]) -> None:
    """Write tensors as the one file of a directory."""
    types = {name: dtype for name, (dtype, _) in values.items()}
    write_safetensors(folder / "model.safetensors", {name: data for name, (_, data) in values.items()}, types)


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of a directory's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_quantised(case: Case, variety: Variety, folder: Path) -> tuple[Path, Path]:
    """Write a case quantised, and with the values that this stands for as float32; return both directories."""
    plain, quantised = write_model(case, folder / "plain"), folder / "quantised"
    tensors = read_tensors(plain)
    (plain / "model.safetensors.index.json").unlink(missing_ok=True)
    for path in plain.glob("model-*.safetensors"):
        path.unlink()
    stored: dict[str, tuple[str, Array]] = {}
    for name, values in tensors.items():
        if LINEAR.search(name):
            parts, tensors[name] = variety.pack(values)
            base = name.removesuffix(".weight")
            stored |= {base + end: part for end, part in parts.items()}
        else:
            stored[name] = "F32", values
    write_raw(plain, {name: ("F32", values) for name, values in tensors.items()})
    quantised.mkdir(parents=True)
    (quantised / "config.json").write_text((plain / "config.json").read_text())
    change_config(quantised, quantization_config=variety.config)
    write_raw(quantised, stored)
    return quantised, plain
