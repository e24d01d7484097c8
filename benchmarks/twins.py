"""One model of random weights as a GGUF file and as a converted q40 directory: the same weights, bit for bit.

Every matrix holds blocks of Q4_0: 32 weights, an fp16 scale and 4-bit codes with offset 8 (ggml-quants), which a q40
tile holds too in another order (kernels.layout). The embedding table is F16 in both, the lm_head a matrix of its own.
GGUF's Llama architecture wants the rows of q and k in the order of interleaved rotary pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS, TileFormat
from dllama_mpi.model.config import ModelConfig
from dllama_mpi.model.names import matrix_shapes, vector_shapes
from dllama_mpi.model.shapes import shape_config
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.weights.checkpoint import Checkpoint, Tensor
from dllama_mpi.weights.convert import TABLE, convert

POSITIONS = 8192
STD = 0.02
BLOCK_BYTES = 18  # an fp16 scale and 32 codes of 4 bits
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
    """A matrix of Q4_0 blocks (rows, cols / 32, 18) uint8; `data` has its shape alone."""

    blocks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    def make_tiles(self, rows: tuple[int, int], cols: tuple[int, int], fmt: TileFormat) -> np.ndarray | None:
        """Return q40 tiles with the very codes and scales of the blocks."""
        if fmt.name != "q40":
            return None
        part = self.blocks[rows[0] : rows[1], cols[0] // BLOCK : cols[1] // BLOCK]
        down, across = part.shape[0] // ROWS, part.shape[1]
        part = part.reshape(down, ROWS, across, BLOCK_BYTES)
        scales = part[..., :2].transpose(0, 2, 1, 3).reshape(down, across, 2 * ROWS)
        codes = part[..., 2:].reshape(down, ROWS, across, 4, 4).transpose(0, 2, 3, 1, 4).reshape(down, across, -1)
        return np.concatenate([scales, codes], axis=2)


class Twin(Checkpoint):
    """The random model, as a source for `convert`."""

    def __init__(self, folder: Path, config: ModelConfig, seed: int) -> None:
        """Make all weights in memory. folder: where config.json lies."""
        self.folder, self.format_name = folder, None
        rng = np.random.default_rng(seed)
        pool = block_pool(rng)
        self.tensors: dict[str, Tensor] = {}
        for name, (rows, cols) in matrix_shapes(config).items():
            chosen = rng.integers(len(pool), size=rows * cols // BLOCK, dtype=np.int32)
            blocks = pool[chosen].reshape(rows, cols // BLOCK, BLOCK_BYTES)
            self.tensors[name] = BlockTensor(name, "F32", np.broadcast_to(np.float32(0), (rows, cols)), blocks)
        for name, size in vector_shapes(config).items():
            values = np.ones(size, np.float32)
            if name.endswith(".bias"):
                values = rng.standard_normal(size, np.float32) * np.float32(STD)
            self.tensors[name] = Tensor(name, "F32", values)
        shape = (config.vocab_size, config.hidden_size)
        table = (rng.standard_normal(shape, np.float32) * np.float32(STD)).astype(np.float16)
        self.tensors[TABLE] = Tensor(TABLE, "F16", table.view(np.uint16))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.tensors[name]

    def fingerprint(self) -> str:
        """Return a digest of the names."""
        return hashlib.sha256(repr(list(self.tensors)).encode()).hexdigest()


def make(shape: str, folder: Path, seed: int = 0) -> None:
    """Write folder/model.gguf and folder/q40."""
    given = {k: v for k, v in shape_config(shape).items() if k not in ("rope_scaling", "sliding_window")}
    given |= {"tie_word_embeddings": False, "max_position_embeddings": POSITIONS}
    if given["model_type"] == "mistral":
        given["model_type"] = "llama"  # what GGUF calls it too
    config = ModelConfig.from_hf(given)
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "config.json").write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
    twin = Twin(source, config, seed)
    write_gguf(twin, config, folder / "model.gguf")
    matrices, vectors = matrix_shapes(config), vector_shapes(config)
    convert(twin, folder / "q40", FORMATS["q40"], matrices, vectors, False, TensorParallelGroup(None), True)


def gguf_tensors(twin: Twin, config: ModelConfig) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Yield (name, data, whether it is Q4_0 bytes) as GGUF wants them."""
    for name, tensor in twin.tensors.items():
        heads = {"q_proj.weight": config.num_heads, "k_proj.weight": config.num_kv_heads}
        if not isinstance(tensor, BlockTensor):
            yield gguf_name(name), tensor.data.view(np.float16) if tensor.dtype == "F16" else tensor.data, False
            continue
        data = tensor.blocks.reshape(len(tensor.blocks), -1)
        count = heads.get(".".join(name.split(".")[-2:]))
        if count and config.model_type == "llama":
            data = data.reshape(count, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(data.shape)
        yield gguf_name(name), data, True


def write_gguf(twin: Twin, config: ModelConfig, path: Path) -> None:
    """Write the GGUF file, without a vocabulary: token ids alone are fed.

    Raises:
        SystemExit: the gguf package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise SystemExit("error: --make needs the gguf package; pip install 'dllama-mpi[bench]'") from None
    out: Any = gguf.GGUFWriter(str(path), config.model_type)
    out.add_block_count(config.num_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_heads)
    out.add_head_count_kv(config.num_kv_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope.theta)
    out.add_vocab_size(config.vocab_size)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    out.add_tokenizer_model("no_vocab")
    for name, data, is_blocks in gguf_tensors(twin, config):
        out.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_0 if is_blocks else None)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
