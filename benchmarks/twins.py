"""One model of random weights as a GGUF file and as a converted q40 directory: the same weights, bit for bit.

Every matrix holds blocks of Q4_0: 32 weights, an fp16 scale and 4-bit codes with offset 8 (ggml-quants), which a q40
tile holds too in another order (kernels.layout). The embedding table is F16 in both, the lm_head a matrix of its own,
a router has values that F32 and F16 hold alike. GGUF's Llama architecture wants the rows of q and k in the order of
interleaved rotary pairs. Matrices are made one at a time, whenever they are read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.errors import UsageError
from dllama_mpi.kernels.layout import BLOCK, ROWS, TileFormat
from dllama_mpi.model.config import AttentionConfig, ExpertsConfig, ModelConfig
from dllama_mpi.model.recipe import WeightRecipe, whole_parts
from dllama_mpi.model.shapes import shape_config
from dllama_mpi.model.tensors import Kind, TensorSpec, tensors
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.weights.convert import Conversion, convert
from dllama_mpi.weights.source import Range, Tensor

POSITIONS = 8192
STD = 0.02
BLOCK_BYTES = 18  # an fp16 scale and 32 codes of 4 bits
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}  # GGUF's names
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {"lm_head": "output", "model.norm": "output_norm", "model.embed_tokens": "token_embd"}


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def block_pool(rng: np.random.Generator, count: int = 1 << 16) -> np.ndarray:
    """Return blocks (count, 18) uint8 of normally distributed weights: the largest in size has code 0."""
    w = rng.standard_normal((count, BLOCK), np.float32)
    scale = (w[np.arange(count), np.abs(w).argmax(axis=1)] / -8).astype(np.float16)
    codes = np.clip(w / scale.astype(np.float32)[:, None] + 8.5, 0, 15).astype(np.uint8)
    small = (scale.astype(np.float32) * STD).astype(np.float16)
    return np.concatenate([small.view(np.uint8).reshape(count, 2), codes[:, :16] | (codes[:, 16:] << 4)], axis=1)


@dataclass(frozen=True)
class BlockTensor(Tensor):
    """A matrix, or one of each expert, of Q4_0 blocks; `data` has its shape alone.

    Attributes:
        make: returns the blocks ([experts,] rows, cols / 32, 18) uint8.
    """

    make: Callable[[], np.ndarray] = field(kw_only=True)

    def make_tiles(self, ranges: tuple[Range, ...], fmt: TileFormat) -> tuple[np.ndarray, np.ndarray]:
        """Return q40 tiles with the very codes and scales of the blocks.

        Raises:
            UsageError: another format is wanted.
        """
        if fmt.name != "q40":
            raise UsageError(f"{self.name} consists of Q4_0 blocks, of which {fmt.name} cannot be made")
        *experts, rows, cols = ranges
        part = self.make()[tuple(slice(*r) for r in experts)]
        part = part[..., slice(*rows), cols[0] // BLOCK : cols[1] // BLOCK, :]
        down, across = part.shape[-3] // ROWS, part.shape[-2]
        part = part.reshape(-1, down, ROWS, across, BLOCK_BYTES)
        scales = part[..., :2].transpose(0, 1, 3, 2, 4).reshape(-1, down, across, 2 * ROWS)
        codes = part[..., 2:].reshape(-1, down, ROWS, across, 4, 4).transpose(0, 1, 3, 4, 2, 5)
        tiles = np.concatenate([scales, codes.reshape(*scales.shape[:3], -1)], axis=3)
        return np.ascontiguousarray(tiles), np.zeros((len(tiles), 0), np.float32)


class Twin:
    """The random model, as a `WeightSource` for `convert`."""

    is_whole = True

    def __init__(self, folder: Path, config: ModelConfig, seed: int) -> None:
        """Take a config. folder: where its config.json lies."""
        self.folder, self.formats = folder, dict[str, TileFormat]()
        self._seed, self._specs = seed, {spec.name: spec for spec in tensors(config)}
        self._pool = block_pool(np.random.default_rng(seed))
        self._blocks = functools.lru_cache(maxsize=1)(self._make_blocks)  # it is read piece by piece

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng((self._seed, zlib.crc32(name.encode())))

    def _make_blocks(self, name: str) -> np.ndarray:
        *rows, cols = self._specs[name].shape
        shape = (*rows, cols // BLOCK, BLOCK_BYTES)
        chosen = self._rng(name).integers(len(self._pool), size=int(np.prod(shape[:-1])), dtype=np.int32)
        return self._pool[chosen].reshape(shape)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor."""
        spec = self._specs[name]
        if is_blocks(spec):
            data = np.broadcast_to(np.float32(0), spec.shape)
            return BlockTensor(name, "F32", data, make=functools.partial(self._blocks, name))
        if spec.kind is Kind.VECTOR and not name.endswith(".bias"):
            return Tensor(name, "F32", np.ones(spec.shape, np.float32))
        values = (self._rng(name).standard_normal(spec.shape, np.float32) * np.float32(STD)).astype(np.float16)
        if spec.kind is Kind.TABLE:
            return Tensor(name, "F16", values.view(np.uint16))
        return Tensor(name, "F32", values.astype(np.float32))

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return nothing: it was made from the table of tensors."""
        return []

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return a digest of the seed, names and shapes."""
        said = repr([self._seed, *((name, spec.shape) for name, spec in self._specs.items())])
        return hashlib.sha256(said.encode()).hexdigest()

    def let_go(self) -> None:
        """Do nothing: nothing was read from a file."""


def is_blocks(spec: TensorSpec) -> bool:
    """Return whether a tensor consists of Q4_0 blocks."""
    return spec.kind is Kind.MATRIX and spec.role != "router"


def make(shape: str, folder: Path, seed: int = 0) -> None:
    """Write folder/model.gguf and folder/q40; shape: of `SHAPES`, or its first N layers as SHAPE:N.

    Raises:
        UsageError: no such shape, or not one of GGUF's architectures that are written here.
    """
    given = {k: v for k, v in shape_config(shape).items() if k not in ("rope_scaling", "sliding_window")}
    given |= {"tie_word_embeddings": False, "max_position_embeddings": POSITIONS}
    if given["model_type"] == "mistral":
        given["model_type"] = "llama"  # what GGUF calls it too
    if given["model_type"] not in ARCHITECTURES:
        raise UsageError(
            f"--make {shape}: {given['model_type']} is not written as GGUF; {', '.join(ARCHITECTURES)} are"
        )
    config = read_model_config(given, shape)
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "config.json").write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
    twin = Twin(source, config, seed)
    write_gguf(twin, config, folder / "model.gguf")
    formats = WeightRecipe.parse("q40").formats(config)
    convert(Conversion(twin, formats, whole_parts(config), True), folder / "q40", TensorParallelGroup(None))


def gguf_data(twin: Twin, spec: TensorSpec, config: ModelConfig) -> np.ndarray:
    """Return a tensor as GGUF wants it: float32, float16, or rows of Q4_0 blocks as uint8."""
    tensor = twin[spec.name]
    if not isinstance(tensor, BlockTensor):
        return tensor.data.view(np.float16) if tensor.dtype == "F16" else tensor.data
    blocks = tensor.make()
    data = blocks.reshape(*blocks.shape[:-2], -1)
    if spec.role in ("q", "k") and config.model_type == "llama":
        mixer = config.attentions[0]
        count = mixer.num_heads if spec.role == "q" else mixer.num_kv_heads
        data = data.reshape(count, 2, mixer.head_dim // 2, -1).swapaxes(1, 2).reshape(data.shape)
    return data


def write_gguf(twin: Twin, config: ModelConfig, path: Path) -> None:
    """Write the GGUF file, without a vocabulary: token ids alone are fed.

    Raises:
        SystemExit: the gguf package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise SystemExit("error: --make needs the gguf package; pip install 'dllama-mpi[bench]'") from None
    out: Any = gguf.GGUFWriter(str(path), ARCHITECTURES[config.model_type])
    _write_keys(out, config)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for spec in tensors(config):
        raw = gguf.GGMLQuantizationType.Q4_0 if is_blocks(spec) else None
        kind = np.uint8 if is_blocks(spec) else np.float16 if spec.kind is Kind.TABLE else np.float32
        shape = spec.shape if raw is None else (*spec.shape[:-1], spec.shape[-1] // BLOCK * BLOCK_BYTES)
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        out.add_tensor_info(gguf_name(spec.name), shape, np.dtype(kind), size, raw_dtype=raw)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for spec in tensors(config):
        out.write_tensor_data(np.ascontiguousarray(gguf_data(twin, spec, config)))
    out.close()


def _write_keys(out: Any, config: ModelConfig) -> None:
    mixer, feeds = config.attentions[0], [layer.feed for layer in config.layers]
    assert isinstance(mixer, AttentionConfig)
    out.add_block_count(config.num_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_head_count(mixer.num_heads)
    out.add_head_count_kv(mixer.num_kv_heads)
    out.add_key_length(mixer.head_dim)
    out.add_value_length(mixer.head_dim)
    out.add_rope_dimension_count(mixer.rope.dim)
    out.add_layer_norm_rms_eps(config.norm_eps)
    out.add_rope_freq_base(mixer.rope.theta)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("no_vocab")
    for feed in dict.fromkeys(feeds):
        if isinstance(feed, ExpertsConfig):
            out.add_expert_count(feed.num_experts)
            out.add_expert_used_count(feed.top_k)
            out.add_expert_feed_forward_length(feed.expert.intermediate_size)
        else:
            out.add_feed_forward_length(feed.intermediate_size)
    sparse = [feed for feed in feeds if isinstance(feed, ExpertsConfig)]
    if len(sparse) == len(feeds):
        out.add_feed_forward_length(sparse[0].expert.intermediate_size)  # which must be said
