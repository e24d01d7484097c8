"""A checkpoint whose matrices are stored quantised: each is presented as the weight that it was made from.

What lies in the files decides: bits and groups follow from shapes, so that a model may mix them. The config says what
shapes cannot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..kernels.layout import BLOCK, FORMATS, TileFormat, ceil_div
from ..kernels.packed import BY_COLUMNS, BY_ROW, INTERLEAVED, Layout
from .checkpoint import Checkpoint, name_of
from .packed import FLOAT8, SIGNED, UNSIGNED, Heads, Packed, PackedTensor
from .source import Tensor

_FLIP = 0x80808080  # makes int8 of four unsigned codes
_PARTS = {
    ".qweight": (".qweight", ".qzeros", ".scales", ".g_idx"),
    ".weight_packed": (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
}
_BESIDE = ("_scale", "_scale_inv", "_zero_point")  # ends of names of what belongs to codes of 8 bits
# Of activations and the KV cache, which this program quantises in its own ways, or not at all.
_UNUSED = re.compile(
    r"(\.|_)(input|output|activation|k|v|q|kv|prob|attn)_(scale|scale_inv|scale_ub|zero_point|global_scale)$"
)
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Scheme:
    """What a config says of quantised weights.

    Attributes:
        method: gptq, awq, gemv (of AWQ), compressed-tensors or fp8. about: for people. group: columns of a group; -1
            for all. symmetric: whether zeros are in the middle. old_zeros: whether zeros are stored less 1. block: rows
            and columns that share a scale, if blocks do. mixed: whether matrices may differ in all that.
    """

    method: str
    about: str
    group: int = -1
    symmetric: bool = True
    old_zeros: bool = False
    block: tuple[int, int] | None = None
    mixed: bool = False


class QuantisedTensors:
    """What `mapped.MappedSource` reads from; see `mapped.Tensors`.

    Attributes:
        folder: the checkpoint's. scheme: what its config says.
    """

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme) -> None:
        """Take an opened checkpoint."""
        self._checkpoint, self.scheme = checkpoint, scheme
        self.folder: Path = checkpoint.folder
        self._found: dict[str, tuple[str, str]] = {}  # a weight's name: how its codes' name ends, and before that
        self._parts: set[str] = set()
        self._packed: dict[str, Packed] = {}
        for name in checkpoint.names():
            self._add(name)

    def _add(self, name: str) -> None:
        for end, parts in _PARTS.items():
            if name.endswith(end):
                module = name.removesuffix(end)
                self._found[f"{module}.weight"] = end, module
                self._parts.update(module + part for part in parts)
        if name.endswith(_BESIDE) or name in self._parts:
            return
        dtype, shape = self._checkpoint.entry(name)
        if (dtype == "I8" or dtype in FLOAT8) and len(shape) > 1:
            self._found[name] = "", name
            self._parts.update(name + end for end in _BESIDE)

    @property
    def is_quantised(self) -> bool:
        """Whether any of the files' matrices is quantised."""
        return bool(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found or (name in self._checkpoint and name not in self._parts)

    def names(self) -> list[str]:
        """Return the names of all tensors, but for those of no use: activations' scales, biases that are all zero."""
        plain = (name for name in self._checkpoint.names() if name not in self._parts and name not in self._found)
        return [*self._found, *(name for name in plain if not _UNUSED.search(name) and not self._is_empty(name))]

    def _is_empty(self, name: str) -> bool:
        """Return whether it is a bias that some quantisers give to every matrix."""
        if not name.endswith(".bias") or name.removesuffix("bias") + "weight" not in self._found:
            return False
        data, _ = self._checkpoint.raw(name)
        return data.ndim == 1 and not data.any()

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            ModelError: no such tensor, of a dtype that cannot be read, or of parts that do not fit.
        """
        if name not in self._found:
            return self._checkpoint[name]
        packed = self.packed(name)
        end, base = self._found[name]
        shape = self._checkpoint.entry(base + end)[1] if len(self._checkpoint.entry(base + end)[1]) > 2 else ()
        index = np.arange(packed.shape[0])[:, None]
        if shape:
            index = index.reshape(shape[0], -1, 1)
        return PackedTensor(name, "packed", index, None, lambda: self._checkpoint.release(base + end), packed=packed)

    def raw(self, name: str) -> tuple[np.ndarray, str]:
        """Return a tensor's elements as they lie in the file, and the name of their type."""
        return self._checkpoint.raw(name)

    def format_of(self, name: str) -> TileFormat | None:
        """Return the format that keeps a matrix best; None for plain numbers."""
        return self.packed(name).format if name in self._found else None

    def let_go(self) -> None:
        """Give back the memory of all pages that were read."""
        self._checkpoint.let_go()

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return what the matrices have been made from; see `Checkpoint.lineage`."""
        s = self.scheme
        return f"{self._checkpoint.fingerprint()}>{s.method},{s.group},{s.old_zeros},{s.block}>{name_of(formats)}"

    # ---- putting parts together

    def packed(self, name: str) -> Packed:
        """Return how a quantised matrix is stored.

        Raises:
            ModelError: a part of it is missing, or they do not fit together.
        """
        if name not in self._packed:
            end, base = self._found[name]
            read = {".qweight": self._by_words, ".weight_packed": self._compressed, "": self._wide}[end]
            self._packed[name] = read(base)
        return self._packed[name]

    def _part(self, name: str, dtypes: tuple[str, ...], dims: int) -> np.ndarray:
        """Return a part.

        Raises:
            ModelError: it is missing, or of another type or number of dimensions.
        """
        if name not in self._checkpoint:
            raise ModelError(f"{self.folder}: tensor {name} is missing beside the codes of its matrix; get it again")
        dtype, shape = self._checkpoint.entry(name)
        if dtype not in dtypes or len(shape) != dims or 0 in shape:
            raise ModelError(
                f"tensor {name} is {dtype} of shape {list(shape)}; it must be {' or '.join(dtypes)} in {dims}"
                " dimensions"
            )
        return self._checkpoint.raw(name)[0]

    def _steps(self, name: str, dims: int = 2) -> tuple[np.ndarray, str]:
        data = self._part(name, (*_FLOATS, *FLOAT8, "F8_E8M0"), dims)
        return data, self._checkpoint.entry(name)[0]

    def _group(self, name: str, cols: int, groups: int) -> int:
        """Return how many columns a group has; name: of its scales."""
        declared = cols if self.scheme.group < 0 else self.scheme.group
        if ceil_div(cols, declared) == groups:
            return declared
        if not self.scheme.mixed or groups > cols or cols % groups:
            raise ModelError(
                f"tensor {name} has scales of {groups} groups, but {cols} columns in groups of {declared} need"
                f" {ceil_div(cols, declared)}; get the model again, or correct group_size in its quantization_config"
            )
        return cols // groups

    def _order(self, name: str, cols: int, group: int, groups: int) -> np.ndarray | None:
        """Return each column's group; None where they are in order."""
        if name not in self._checkpoint:
            return None
        order = self._part(name, ("I32", "I64"), 1)
        if (order == -1).all():
            return None
        if len(order) != cols or order.min() < 0 or order.max() >= groups:
            raise ModelError(
                f"tensor {name} has {len(order)} groups from {order.min()} to {order.max()}; {cols} columns need {cols}"
                f" from 0 to {groups - 1}; get it again"
            )
        return None if (order == np.arange(cols) // group).all() else order.astype(np.int32)

    def _by_words(self, base: str) -> Packed:
        """Return a matrix of GPTQ or AWQ."""
        name, method = f"{base}.qweight", self.scheme.method
        raw = self._part(name, ("I32",), 2)
        steps, dtype = self._steps(f"{base}.scales")
        if method == "gemv":
            rows, cols, bits, kind = len(raw), 8 * raw.shape[1], 4, BY_ROW
            group = cols if self.scheme.group < 0 else self.scheme.group
            groups = ceil_div(cols, group)
        else:
            groups, rows = steps.shape
            bits, kind = 4, INTERLEAVED
            if method == "gptq":
                bits, kind = self._bits(base, rows), BY_COLUMNS
            cols = len(raw) if method == "awq" else len(raw) * 32 // bits
            if raw.shape[1] * (8 if method == "awq" else 1) != rows:
                raise self._misfit(name, f"{base}.scales")
            group = self._group(f"{base}.scales", cols, groups)
        order = self._order(f"{base}.g_idx", cols, group, groups) if method == "gptq" else None
        zeros = self._zeros(base, bits, (rows, groups))
        if method == "gemv" and (len(steps) != rows or steps.shape[1] < groups):
            raise self._misfit(name, f"{base}.scales")
        symmetric = self.scheme.symmetric
        if self.scheme.mixed and isinstance(zeros, Heads) and group % BLOCK == 0:
            symmetric = bool((zeros.of(np.arange(rows), groups) == 1 << bits - 1).all())
        layout = Layout(kind, bits, _FLIP if bits == 8 else 0)
        kept = {(4, True): "q40", (4, False): "q4m", (8, True): "q80"}.get((bits, symmetric))
        heads = Heads(steps, dtype, groups_first=method != "gemv")
        format = FORMATS[kept] if kept else None
        return Packed(name, (rows, cols), layout, _lines(raw), heads, zeros, UNSIGNED, group, order, format)

    def _bits(self, base: str, rows: int) -> int:
        """Return how many bits the codes of GPTQ have: as many as its zeros."""
        name = f"{base}.qzeros"
        words = self._part(name, ("I32",), 2).shape[1]
        bits = next((bits for bits in (4, 8) if words * 32 == rows * bits), 0)
        if not bits:
            raise ModelError(
                f"tensor {name} has {words} words for {rows} rows, which is {32 * words / rows:g} bits; 4 and 8 bits"
                " can be read: get such a model, or the BF16 one"
            )
        return bits

    def _zeros(self, base: str, bits: int, shape: tuple[int, int]) -> Heads | float:
        """Return the zeros of GPTQ or AWQ; shape: (rows, groups)."""
        name, method, (rows, groups) = f"{base}.qzeros", self.scheme.method, shape
        if name not in self._checkpoint and self.scheme.symmetric:
            return float(1 << bits - 1)
        data = self._part(name, ("I32",), 2)
        fits = data.shape == (groups, ceil_div(rows * bits, 32))
        if method == "gemv":
            fits = len(data) == rows and 8 * data.shape[1] >= groups
        if not fits:
            raise self._misfit(name, f"{base}.scales")
        if method == "gemv":
            return Heads(data, "I32", bits=4, along="groups")
        add = (0x11111111 if bits == 4 else 0x01010101) if self.scheme.old_zeros else 0
        return Heads(data, "I32", True, bits=bits, interleaved=method == "awq", add=add)

    def _compressed(self, base: str) -> Packed:
        """Return a matrix of compressed-tensors whose codes are packed into words."""
        name = f"{base}.weight_packed"
        raw = self._part(name, ("I32",), 2)
        rows, cols = len(raw), self._part(f"{base}.weight_shape", ("I64", "I32"), 1)[-1].item()
        bits = next((bits for bits in (4, 8) if cols > 0 and ceil_div(cols * bits, 32) == raw.shape[1]), 0)
        if not bits or (self._checkpoint.raw(f"{base}.weight_shape")[0] != (rows, cols)).any():
            raise self._misfit(name, f"{base}.weight_shape")
        steps, group = self._scales(f"{base}.weight_scale", (rows, cols))
        groups, zeros = ceil_div(cols, group), f"{base}.weight_zero_point"
        order = self._order(f"{base}.weight_g_idx", cols, group, groups)
        middle, kept = float(1 << bits - 1), "q40" if bits == 4 else "q80"
        found: Heads | float = middle
        if zeros in self._checkpoint:
            kept = "q4m" if bits == 4 else ""
            if self._checkpoint.entry(zeros)[0] == "I8":
                found = Heads(self._part(zeros, ("I8",), 2), "I8", rows=steps.rows, offset=middle)
                fits = found.data.shape == steps.data.shape
            else:
                found = Heads(self._part(zeros, ("I32",), 2), "I32", bits=bits)
                fits = found.data.shape == (ceil_div(rows * bits, 32), groups)
            if not fits:
                raise self._misfit(zeros, f"{base}.weight_scale")
        layout, format = Layout(BY_ROW, bits, _FLIP if bits == 8 else 0), FORMATS[kept] if kept else None
        return Packed(name, (rows, cols), layout, _lines(raw), steps, found, UNSIGNED, group, order, format)

    def _wide(self, name: str) -> Packed:
        """Return a matrix, or those of all experts below each other, of int8 or float8."""
        dtype, shape = self._checkpoint.entry(name)
        raw = self._part(name, (dtype,), 3 if len(shape) == 3 else 2)
        scale = next((name + end for end in _BESIDE[:2] if name + end in self._checkpoint), name + _BESIDE[0])
        steps, group = self._scales(scale, shape)
        cols, zeros, zero = shape[-1], name + _BESIDE[2], 0.0
        table, kept = (SIGNED, FORMATS["q80"]) if dtype == "I8" else (FLOAT8[dtype], None)
        found: Heads | float = zero
        if dtype == "I8" and zeros in self._checkpoint:
            data = self._part(zeros, ("I8",), len(self._checkpoint.entry(zeros)[1]))
            found, kept = Heads(data.reshape(-1, steps.data.shape[1]), "I8", rows=steps.rows), None
            if found.data.shape != steps.data.shape:
                raise self._misfit(zeros, scale)
        raw = raw.reshape(-1, cols).view(np.uint8)
        return Packed(name, (len(raw), cols), Layout(BY_ROW, 8), raw, steps, found, table, group, None, kept)

    def _scales(self, name: str, shape: tuple[int, ...]) -> tuple[Heads, int]:
        """Return the steps of compressed-tensors or FP8, and how many columns a group has."""
        if name not in self._checkpoint:
            raise ModelError(f"{self.folder}: tensor {name} is missing beside the codes of its matrix; get it again")
        data, dtype = self._steps(name, len(self._checkpoint.entry(name)[1]))
        *experts, rows, cols = shape
        count = experts[0] if experts else 1
        if data.size in (1, count):
            return Heads(data.reshape(-1, 1), dtype, rows=rows if data.size == count else 0), self._group(name, cols, 1)
        if data.shape in ((rows,), (*experts, rows)):
            return Heads(data.reshape(-1, 1), dtype), self._group(name, cols, 1)
        if data.ndim != len(shape) or data.shape[:-2] != tuple(experts):
            raise self._misfit(name, f"codes of {list(shape)}")
        down, across = data.shape[-2:]
        block = self.scheme.block
        each = 1 if down == rows else 0
        if block is not None and down == ceil_div(rows, block[0]):
            each = min(block[0], rows)
        if not each or (experts and rows % each):
            raise self._misfit(name, f"codes of {list(shape)}")
        if block is not None and across == ceil_div(cols, block[1]):
            group = block[1]
        else:
            group = self._group(name, cols, across)
        return Heads(data.reshape(-1, across), dtype, rows=each), group

    def _misfit(self, name: str, other: str) -> ModelError:
        known = (each for each in (name, other) if each in self._checkpoint)
        sizes = [f"{each} {list(self._checkpoint.entry(each)[1])}" for each in known]
        said = " and ".join(sizes if len(sizes) > 1 else [*sizes, other])
        return ModelError(f"tensors {said} do not fit together; get the model again")


def _lines(words: np.ndarray) -> np.ndarray:
    """Return words (lines, n) as bytes."""
    return words.view(np.uint8)
