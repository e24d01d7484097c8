"""The container of Distributed Llama's models (.m): a header of whole numbers, then tensors in a fixed order.

The format: github.com/b4rtaz/distributed-llama, converter/writer.py and src/llm.cpp. The header is pairs of a key and a
value; in files of before May 2024 nine values in a fixed order, and nothing tells of the type of the weights. No tensor
has a name there: they have llama.cpp's here. Blocks of Q40 and Q80 are GGUF's Q4_0 and Q8_0.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import ModelError
from .gguf_types import BY_NAME, BlockType
from .mapped_file import MappedFile, TensorInfo

MAGIC, OLD_LLAMA, OLD_GROK = 0xA00ABCD, 0xABCD00, 0xABCD01
KEYS = (
    "version", "arch_type", "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "n_experts", "n_active_experts",
    "vocab_size", "max_seq_len", "hidden_act", "rope_theta", "weights_float_type", "rope_scaling_factor",
    "rope_scaling_low_freq_factor", "rope_scaling_high_freq_factor", "rope_scaling_orig_max_seq_len", "rope_type",
    "head_dim", "norm_epsilon", "moe_hidden_dim",
)  # fmt: skip
_OLD_KEYS = (*KEYS[2:9], "vocab_size", "max_seq_len")
_NEEDED = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_MOST = {
    "dim": 1 << 20, "hidden_dim": 1 << 24, "moe_hidden_dim": 1 << 24, "n_layers": 1000, "n_heads": 1 << 14,
    "n_kv_heads": 1 << 14, "vocab_size": 1 << 24, "max_seq_len": 1 << 28, "head_dim": 1 << 12, "n_experts": 1 << 12,
    "n_active_experts": 1 << 12, "rope_theta": 1 << 31, "rope_scaling_factor": 1 << 20,
    "rope_scaling_low_freq_factor": 1 << 20, "rope_scaling_high_freq_factor": 1 << 20,
    "rope_scaling_orig_max_seq_len": 1 << 28,
}  # fmt: skip
_MAY_BE_0 = ("n_experts", "n_active_experts", "moe_hidden_dim")
_MOST_HEADER = 8 + 8 * 256
_FLOAT_TYPES = {0: BY_NAME["F32"], 1: BY_NAME["F16"], 2: BY_NAME["Q4_0"], 3: BY_NAME["Q8_0"]}
_F32 = BY_NAME["F32"]
_BLOCK = 32
LLAMA, QWEN3, QWEN3_MOE = "llama", "qwen3", "qwen3_moe"
_WRONG = "truncated, corrupt or no model of Distributed Llama: get it again"
_Layout = Iterator[tuple[str, tuple[int, ...], BlockType]]


class DllamaFile(MappedFile):
    """One file, which is a model.

    Attributes:
        header: bytes before the tensors' data. said: the header's values by name, as far as it has them.
        architecture: llama, qwen3 or qwen3_moe. weights: the type of the matrices.
    """

    def __init__(self, path: Path) -> None:
        """Map a file and check what it says.

        Raises:
            ModelError: it cannot be read, something in it cannot be, or it is of an architecture that is not supported.
        """
        super().__init__(path)
        self.files = (self,)
        self.said, self.header = self._read_header()
        self.architecture = self._architecture()
        self._check_numbers()
        self.weights = self._float_type()
        self.tensors: Mapping[str, TensorInfo] = self._tensors()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.data.size

    def get(self, key: str, default: int = 0) -> int:
        """Return a value of the header."""
        return self.said.get(key, default)

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.get("head_dim") or self.get("dim") // self.get("n_heads")

    def fingerprint(self) -> str:
        """Return a digest of size, header and samples of all tensors."""
        digest = hashlib.sha256()
        self.sample(digest)
        return digest.hexdigest()

    # ---- the header

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}; {_WRONG}")

    def _ints(self, start: int, count: int) -> tuple[int, ...]:
        if start + 4 * count > self.data.size:
            raise self._error(f"ends within its header, at byte {self.data.size}")
        return struct.unpack_from(f"<{count}i", self.data.data, start)

    def _read_header(self) -> tuple[dict[str, int], int]:
        """Return the values by name, and the bytes that the header takes."""
        (magic,) = self._ints(0, 1)
        if magic == OLD_GROK:
            raise ModelError(f"{self.path}: Grok-1, which is not supported; supported are Llama, Qwen3 and Qwen3-MoE")
        if magic == OLD_LLAMA:
            count = len(_OLD_KEYS)
            return dict(zip(_OLD_KEYS, self._ints(4, count), strict=True)), 4 + 4 * count
        if magic != MAGIC:
            raise ModelError(f"{self.path}: not a model of Distributed Llama (it begins with {magic & 0xFFFFFFFF:#x})")
        (size,) = self._ints(4, 1)
        if not 8 <= size <= _MOST_HEADER or size % 8:
            raise self._error(f"tells of a header of {size} bytes")
        values = self._ints(8, (size - 8) // 4)
        found: dict[str, int] = {}
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not 0 <= key < len(KEYS):
                raise self._error(f"the header has key {key} (value {value}), known are 0 to {len(KEYS) - 1}")
            if KEYS[key] in found:
                raise self._error(f"the header has {KEYS[key]} twice")
            found[KEYS[key]] = value
        return found, size

    def _architecture(self) -> str:
        """Return the architecture; the numbers of Qwen3 and Qwen3-MoE once meant Grok-1 and Mixtral.

        Raises:
            ModelError: it is another one.
        """
        number = self.get("arch_type", OLD_LLAMA)
        experts = self.get("n_experts") > 0
        known = {0xABCD00: LLAMA, 0xABCD01: QWEN3, 0xABCD02: QWEN3_MOE}
        wrong = ""
        if number not in known:
            wrong = f"arch_type is {number & 0xFFFFFFFF:#x}"
        elif number == 0xABCD01 and experts:
            wrong = "Grok-1"
        elif number == 0xABCD02 and not self.get("moe_hidden_dim"):
            wrong = "Mixtral (no moe_hidden_dim, which Qwen3-MoE has)"
        elif number == 0xABCD00 and experts:
            wrong = f"Llama with {self.get('n_experts')} experts"
        if wrong:
            raise ModelError(f"{self.path}: {wrong}, which is not supported; supported are Llama, Qwen3 and Qwen3-MoE")
        return known[number]

    def _check_numbers(self) -> None:
        """Raise a ModelError where a number is missing or cannot be."""
        moe = ("n_experts", "n_active_experts", "moe_hidden_dim") if self.architecture == QWEN3_MOE else ()
        for key in (*_NEEDED, *moe):
            if key not in self.said:
                raise self._error(f"the header has no {key}")
        for key, value in self.said.items():
            least = 0 if key in _MAY_BE_0 and key not in moe else 1
            if key in _MOST and not least <= value <= _MOST[key]:
                raise self._error(f"{key} is {value}; it must be from {least} to {_MOST[key]}")
        if "head_dim" not in self.said and self.get("dim") % self.get("n_heads"):
            raise self._error(f"dim is {self.get('dim')}, which {self.get('n_heads')} heads do not divide")
        if self.get("n_active_experts") > self.get("n_experts"):
            raise self._error(f"n_active_experts is {self.get('n_active_experts')} of {self.get('n_experts')}")

    # ---- tensors

    def _layout(self, weights: BlockType, layers: int, experts: int) -> _Layout:
        """Yield name, shape and type of each tensor of so many layers with so many experts, in the file's order."""
        dim, is_qwen = self.get("dim"), self.architecture != LLAMA
        q, kv = self.get("n_heads") * self.head_dim, self.get("n_kv_heads") * self.head_dim
        inner = self.get("moe_hidden_dim" if self.architecture == QWEN3_MOE else "hidden_dim")
        feed = (("gate", (inner, dim)), ("down", (dim, inner)), ("up", (inner, dim)))
        yield "token_embd.weight", (self.get("vocab_size"), dim), _F32
        for layer in range(layers):
            blk = f"blk.{layer}."
            yield f"{blk}attn_q.weight", (q, dim), weights
            yield f"{blk}attn_k.weight", (kv, dim), weights
            yield f"{blk}attn_v.weight", (kv, dim), weights
            yield f"{blk}attn_output.weight", (dim, q), weights
            if self.architecture == QWEN3_MOE:
                yield f"{blk}ffn_gate_inp.weight", (self.get("n_experts"), dim), _F32
                for expert in range(experts):
                    for part, shape in feed:
                        yield f"{blk}ffn_{part}.{expert}.weight", shape, weights
            else:
                for part, shape in feed:
                    yield f"{blk}ffn_{part}.weight", shape, weights
            if is_qwen:
                yield f"{blk}attn_q_norm.weight", (self.head_dim,), _F32
                yield f"{blk}attn_k_norm.weight", (self.head_dim,), _F32
            yield f"{blk}attn_norm.weight", (dim,), _F32
            yield f"{blk}ffn_norm.weight", (dim,), _F32
        yield "output_norm.weight", (dim,), _F32
        yield "output.weight", (self.get("vocab_size"), dim), weights

    def _expected(self, weights: BlockType) -> int:
        """Return the bytes of the whole file, by arithmetic alone: the header may tell of millions of tensors."""

        def total(layers: int, experts: int) -> int:
            return sum(_bytes(shape, kind) for _, shape, kind in self._layout(weights, layers, experts))

        none, layer, expert = total(0, 0), total(1, 0), total(1, 1)
        return self.header + none + self.get("n_layers") * (layer - none + self.get("n_experts") * (expert - layer))

    def _float_type(self) -> BlockType:
        """Return the type of the weights: what the header says, else the one that fits the file's size.

        Raises:
            ModelError: the file has another size than its header implies.
        """
        number = self.said.get("weights_float_type")
        if number is not None and number not in _FLOAT_TYPES:
            raise self._error(f"weights_float_type is {number}; known are 0 to {len(_FLOAT_TYPES) - 1}")
        kinds = [_FLOAT_TYPES[number]] if number is not None else list(_FLOAT_TYPES.values())
        if kinds != [_F32] and number is not None:
            self._check_blocks()
        sizes = {kind: self._expected(kind) for kind in kinds}
        fitting = [kind for kind, size in sizes.items() if size == self.data.size]
        if not fitting:
            told = " or ".join(f"{size} with {kind.name} weights" for kind, size in sizes.items())
            raise self._error(f"has {self.data.size} bytes, and its header implies {told}")
        if fitting[0] is not _F32:
            self._check_blocks()
        return fitting[0]

    def _check_blocks(self) -> None:
        """Raise a ModelError where rows are not whole blocks: then tensors would not even begin at whole numbers."""
        inner = "moe_hidden_dim" if self.architecture == QWEN3_MOE else "hidden_dim"
        sizes = {"dim": self.get("dim"), inner: self.get(inner), "heads": self.get("n_heads") * self.head_dim}
        wrong = next((f"{key} has {size} columns" for key, size in sizes.items() if size % _BLOCK), None)
        if wrong:
            raise self._error(f"{wrong}, no whole blocks of {_BLOCK}")

    def _tensors(self) -> dict[str, TensorInfo]:
        found, at = {}, self.header
        for name, shape, kind in self._layout(self.weights, self.get("n_layers"), self.get("n_experts")):
            size = _bytes(shape, kind)
            found[name] = TensorInfo(name, kind, shape, at, size)
            at += size
        return found


def _bytes(shape: tuple[int, ...], kind: BlockType) -> int:
    return math.prod(shape) // kind.columns * kind.size


def _begins(path: Path) -> bool:
    """Return whether a file begins as a model does."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    return int.from_bytes(start, "little") in (MAGIC, OLD_LLAMA, OLD_GROK)


def dllama_in(path: Path) -> Path | None:
    """Return the .m file that a path names: itself, or the only one in a folder; None if there is none.

    Raises:
        ModelError: there are several.
    """
    if path.is_file():
        return path if path.suffix == ".m" or _begins(path) else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = [each for each in sorted(path.glob("*.m")) if each.is_file() and _begins(each)]
    if len(files) > 1:
        names = ", ".join(each.name for each in files[:3])
        raise ModelError(f"{path} holds {len(files)} models of Distributed Llama; name one: {names}")
    return files[0] if files else None
