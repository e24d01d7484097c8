"""The tensors that llama.cpp wants of a model, each made of the table's: what `gguf_places` reads, turned round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ModelError
from ..kernels.layout import BLOCK, ROWS, TileFormat
from ..model.config import DeltaNetConfig, ModelConfig, ShortConvConfig
from ..model.tensors import HEAD, TABLE, Kind, TensorSpec, tensors
from ..weights.gguf_pack import FORMAT_OF, RowReader, as_bytes
from ..weights.gguf_types import BY_NAME, BlockType
from ..weights.mapped import Ref
from ..weights.source import Tensor, WeightSource
from ..weights.tiles import check_shape, load_vector
from .gguf import FAMILIES
from .gguf_places import places

# Of several names that an architecture has for the same, those that llama.cpp asks for.
_FUSED = {"phi3": ("attn_q", "attn_k", "attn_v"), "qwen3next": ("ssm_in", "ffn_gate_up_exps")}
# Of biases that models of few architectures have: those in which llama.cpp looks for them.
_BIASED = {
    "attn_output.bias": ("llama", "mistral3", "granite", "granitemoe", "ernie4_5", "gpt-oss"),
    **{f"ffn_{part}.bias": ("llama", "mistral3", "granite") for part in ("gate", "up", "down")},
}
_PLAIN_ROLES = ("router", "shared_gate")  # float32 in every file
_PIECE_WEIGHTS = 1 << 22  # values of a matrix that are made at once: 16 MB of float32
_TYPE_OF = {name: BY_NAME[kind] for kind, name in FORMAT_OF.items()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write.

    Attributes:
        shape: rows before columns, experts before both. kind: its type.
        specs: the table's tensors that it is made of. owner, row: of each row, which of them has it, and where.
        columns: for a matrix, which column of `specs` each column is; None: as they lie.
        exponents: whether a vector's values become -exp of them.
    """

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    specs: tuple[TensorSpec, ...]
    owner: np.ndarray = field(repr=False)
    row: np.ndarray = field(repr=False)
    columns: np.ndarray | None = None
    exponents: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; of a vector, of all of it."""
        return self.shape[-1] // self.kind.columns * self.kind.size

    @property
    def size(self) -> int:
        """Bytes in the file, without padding."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * self.row_bytes


def names_of(arch: str, layers: int) -> set[str]:
    """Return the names of all tensors that a model of an architecture may have.

    Raises:
        ImportError: the package gguf is not installed.
    """
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    found: set[str] = set()
    for which in gguf.MODEL_TENSORS[number]:
        stem = gguf.TENSOR_NAMES[which]
        if stem.rpartition(".")[2] in _FUSED.get(arch, ()):
            continue
        for layer in range(layers) if "{bid}" in stem else (0,):
            found.update(stem.format(bid=layer) + leaf for leaf in (".weight", ".bias", ""))
    return {name for name in found if arch in _BIASED.get(name.split(".", 2)[-1], (arch,))}


def layout(config: ModelConfig, arch: str, formats: Mapping[str, TileFormat], table: BlockType) -> list[GgufTensor]:
    """Return the tensors of a file, the table of embeddings first.

    formats: of the matrices; a type holds the same codes, or float16. table: the type of the table.

    Raises:
        ModelError: the architecture has no tensor for one that the model has.
    """
    names = names_of(arch, config.num_layers)
    found = places(config, names, FAMILIES[arch].permuted)
    made: dict[str, list[tuple[TensorSpec, Ref]]] = {}
    for spec in tensors(config):
        if spec.name == HEAD and config.tie_word_embeddings:
            continue
        place = found[spec.name]
        parts = made.setdefault(place.names[0], [])
        is_new = place.names[0] not in names and spec.name != HEAD
        if not isinstance(place, Ref) or is_new or any(other.kind is not spec.kind for other, _ in parts):
            raise ModelError(
                f"this model cannot be exported: {spec.name} has no place among the tensors of GGUF's {arch}"
            )
        parts.append((spec, place))
    return [_tensor(config, name, parts, formats, table) for name, parts in made.items()]


def _tensor(
    config: ModelConfig,
    name: str,
    parts: list[tuple[TensorSpec, Ref]],
    formats: Mapping[str, TileFormat],
    table: BlockType,
) -> GgufTensor:
    (spec, ref), specs = parts[0], tuple(spec for spec, _ in parts)
    kernel = _kernel(config, spec) if ref.flat else 1
    is_vector = spec.kind is Kind.VECTOR
    counts = [s.shape[-1] // kernel if is_vector else s.shape[-2] for s in specs]
    total = sum(counts)
    owner, row = np.full(total, -1, np.int32), np.zeros(total, np.int64)
    for which, ((_, place), count) in enumerate(zip(parts, counts, strict=True)):
        rows = np.arange(total)
        if place.rows is not None:
            rows = rows[place.rows] if isinstance(place.rows, slice) else np.asarray(place.rows, np.int64)
        owner[rows], row[rows] = which, np.arange(count)
    if (owner < 0).any():
        raise ModelError(f"tensor {name} would have rows that nothing in the model is for")
    columns = None
    if ref.columns is not None:
        columns = np.empty(spec.shape[-1], np.int64)
        columns[np.asarray(ref.columns, np.int64)] = np.arange(spec.shape[-1])
    if is_vector:
        shape = (total, kernel) if ref.flat else (*spec.shape[:-1], total)
    else:
        shape = spec.shape[-1:] if ref.single else (*spec.shape[:-2], total, spec.shape[-1])
    return GgufTensor(
        name, shape, _kind(specs, formats, table, columns), specs, owner, row, columns, exponents=ref.exponents
    )


def _kernel(config: ModelConfig, spec: TensorSpec) -> int:
    """Return the taps of a convolution."""
    mixer = config.layers[int(spec.name.split(".")[2])].mixer
    assert isinstance(mixer, DeltaNetConfig | ShortConvConfig)
    return mixer.kernel


def _kind(
    specs: tuple[TensorSpec, ...], formats: Mapping[str, TileFormat], table: BlockType, columns: np.ndarray | None
) -> BlockType:
    """Return the type of a tensor: of one made of several, that of most bits; float16 where blocks do not fit."""
    if specs[0].kind is Kind.VECTOR or specs[0].role in _PLAIN_ROLES:
        return BY_NAME["F32"]
    if specs[0].kind is Kind.TABLE:
        wanted = table
    else:
        wanted = max((_TYPE_OF.get(formats[spec.name].name, BY_NAME["F16"]) for spec in specs), key=lambda k: k.bits)
    whole = columns is None or (len(columns) % BLOCK == 0 and not (columns.reshape(-1, BLOCK)[:, 0] % BLOCK).any())
    return wanted if specs[0].shape[-1] % wanted.columns == 0 and whole else BY_NAME["F16"]


def pieces(source: WeightSource, tensor: GgufTensor) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes in order, uint8, some megabytes at a time.

    Raises:
        ModelError: one of the source's is missing, of another shape, or has a value that cannot be written.
    """
    opened = [source[_origin(source, spec)] for spec in tensor.specs]
    if tensor.specs[0].kind is Kind.VECTOR:
        yield _vector(opened, tensor)
    else:
        for each, spec in zip(opened, tensor.specs, strict=True):
            check_shape(each, spec.shape)
        readers = [RowReader(e, s.shape, tensor.kind) for e, s in zip(opened, tensor.specs, strict=True)]
        step = max(1, _PIECE_WEIGHTS // tensor.shape[-1] // ROWS) * ROWS
        for expert in range(tensor.specs[0].experts):
            for start in range(0, len(tensor.owner), step):
                yield _rows(readers, tensor, expert, slice(start, start + step)).reshape(-1)
    for each in opened:
        each.release()


def _origin(source: WeightSource, spec: TensorSpec) -> str:
    return TABLE if spec.name == HEAD and HEAD not in source else spec.name


def _vector(opened: Sequence[Tensor], tensor: GgufTensor) -> np.ndarray:
    spec, flat = tensor.specs[0], len(tensor.specs[0].shape) == 1 and len(tensor.shape) == 2
    found = []
    for each, s in zip(opened, tensor.specs, strict=True):
        values = load_vector(each, s.shape, tuple((0, size) for size in s.shape))
        found.append(values.reshape(-1, tensor.shape[-1]) if flat else values)
    rows = np.concatenate(found, axis=0 if flat else -1)
    starts = np.cumsum([0, *(each.shape[0 if flat else -1] for each in found)])
    rows = np.take(rows, starts[tensor.owner] + tensor.row, axis=0 if flat else len(spec.shape) - 1)
    if tensor.exponents:
        rows = -np.exp(rows)
    return as_bytes(rows, tensor.kind, tensor.name).reshape(-1)


def _rows(readers: Sequence[RowReader], tensor: GgufTensor, expert: int, rows: slice) -> np.ndarray:
    owner, row = tensor.owner[rows], tensor.row[rows]
    out = np.empty((len(owner), tensor.row_bytes), np.uint8)
    for which in np.unique(owner):
        own = owner == which
        out[own] = readers[which].read(expert, row[own])
    if tensor.columns is None:
        return out
    kind, wanted = tensor.kind, tensor.columns[:: tensor.kind.columns] // tensor.kind.columns
    return out.reshape(len(out), -1, kind.size)[:, wanted]


def bits_of(made: list[GgufTensor]) -> float:
    """Return the mean bits of the weights of matrices, the table included where it is the lm_head."""
    has_head = any(spec.name == HEAD for tensor in made for spec in tensor.specs)
    kinds = (Kind.MATRIX,) if has_head else (Kind.MATRIX, Kind.TABLE)
    matrices = [tensor for tensor in made if tensor.specs[0].kind in kinds]
    weights = sum(spec.size for tensor in matrices for spec in tensor.specs)
    return 8 * sum(tensor.size for tensor in matrices) / weights


def types_of(made: list[GgufTensor]) -> Iterator[tuple[BlockType, int]]:
    """Yield the type and the bytes of each matrix."""
    for tensor in made:
        if tensor.specs[0].kind is not Kind.VECTOR:
            yield tensor.kind, tensor.size
