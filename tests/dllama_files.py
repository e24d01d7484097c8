"""Tiny models and tokenizers as files of Distributed Llama, .m and .t."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers

from dllama_mpi.text.token_bytes import BYTE_OF
from tests.gguf_files import Floats, head_dim, permuted
from tests.naive_model import read_tensors
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model

MAGIC, OLD_MAGIC = 0xA00ABCD, 0xABCD00
ARCHITECTURES = {"llama": 0xABCD00, "qwen3": 0xABCD01, "qwen3_moe": 0xABCD02}
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 3}
FEED = ("gate_proj", "down_proj", "up_proj")


def header_of(config: Mapping[str, Any], kind: str) -> dict[int, int]:
    """Return the header's values by key, as the converter writes them."""
    c = config
    scaling = c.get("rope_scaling") or {}
    found = {
        0: 0, 1: ARCHITECTURES[c["model_type"]], 11: 1, 2: c["hidden_size"], 3: c["intermediate_size"],
        4: c["num_hidden_layers"], 5: c["num_attention_heads"], 6: c["num_key_value_heads"], 13: TYPES[kind],
        10: c["max_position_embeddings"], 9: c["vocab_size"], 7: c.get("num_experts", 0),
        8: c.get("num_experts_per_tok", 0) if "num_experts" in c else 0,
    }  # fmt: skip
    if "rope_theta" in c:
        found[12] = int(c["rope_theta"])
    if scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        found |= {14 + i: int(scaling[name]) for i, name in enumerate(names)} | {18: 2}
    if "head_dim" in c:
        found[19] = c["head_dim"]
    found[20] = {1e-5: 5, 1e-6: 6}[c["rms_norm_eps"]]
    if "moe_intermediate_size" in c:
        found[21] = c["moe_intermediate_size"]
    return found


def header_bytes(values: Mapping[int, int], size: int | None = None) -> bytes:
    """Return a header; size: what it says of its own."""
    data = b"".join(struct.pack("<ii", key, value) for key, value in values.items())
    return struct.pack("<ii", MAGIC, 8 + len(data) if size is None else size) + data


def old_header_bytes(config: Mapping[str, Any]) -> bytes:
    """Return a header as files had it before there were keys."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return struct.pack(
        "<10i", OLD_MAGIC, *(config[name] for name in names), 0, 0, config["vocab_size"],
        config["max_position_embeddings"],
    )  # fmt: skip


def tensor_bytes(values: Floats, kind: str) -> bytes:
    """Return a tensor of a type."""
    if kind in ("F32", "F16"):
        return values.astype({"F32": "<f4", "F16": "<f2"}[kind]).tobytes()
    return bytes(gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind]).tobytes())


def _tensors(every: Mapping[str, Floats], c: Mapping[str, Any], kind: str) -> list[bytes]:
    is_llama, heads, groups = c["model_type"] == "llama", c["num_attention_heads"], c["num_key_value_heads"]
    assert head_dim(c) % 2 == 0
    found = [tensor_bytes(every["model.embed_tokens.weight"], "F32")]
    for layer in range(c["num_hidden_layers"]):
        own = {name: v for name, v in every.items() if name.startswith(f"model.layers.{layer}.")}

        def of(name: str, own: Mapping[str, Floats] = own, layer: int = layer) -> Floats:
            return own[f"model.layers.{layer}.{name}.weight"]

        q, k = of("self_attn.q_proj"), of("self_attn.k_proj")
        found += [tensor_bytes(permuted(v, n) if is_llama else v, kind) for v, n in ((q, heads), (k, groups))]
        found += [tensor_bytes(of(f"self_attn.{name}_proj"), kind) for name in "vo"]
        if c.get("num_experts"):
            found.append(tensor_bytes(of("mlp.gate"), "F32"))
            experts = [f"mlp.experts.{e}.{part}" for e in range(c["num_experts"]) for part in FEED]
            found += [tensor_bytes(of(name), kind) for name in experts]
        else:
            found += [tensor_bytes(of(f"mlp.{part}"), kind) for part in FEED]
        norms = [] if is_llama else ["self_attn.q_norm", "self_attn.k_norm"]
        found += [tensor_bytes(of(name), "F32") for name in [*norms, "input_layernorm", "post_attention_layernorm"]]
    head = every.get("lm_head.weight", every["model.embed_tokens.weight"])
    return [*found, tensor_bytes(every["model.norm.weight"], "F32"), tensor_bytes(head, kind)]


def write_m(case: Case, folder: Path, kind: str = "F32", old: bool = False) -> tuple[Path, Path]:
    """Write a case as a Hugging Face directory and as a .m file; return both. kind: of the matrices."""
    hf, path = write_model(case, folder / "hf"), folder / "model.m"
    header = old_header_bytes(case.config) if old else header_bytes(header_of(case.config, kind))
    path.write_bytes(header + b"".join(_tensors(read_tensors(hf), case.config, kind)))
    return hf, path


# ---- tokenizers


def tokens_of(backend: tokenizers.Tokenizer) -> list[bytes]:
    """Return the bytes of each token as the converter of byte-level vocabularies takes them."""
    found = []
    for token_id in range(backend.get_vocab_size()):
        text = str(backend.id_to_token(token_id))
        found.append(b"".join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in text))
    return found


def tokenizer_bytes(
    tokens: Sequence[bytes],
    bos: int | None,
    eos: Sequence[int],
    *,
    add_bos: bool = True,
    template: str = "",
    scores: Sequence[float] | None = None,
    changes: Mapping[int, int | None] | None = None,
) -> bytes:
    """Return a .t file; changes: other values of the header, by key; None: without it."""
    said: dict[int, int | None] = {
        3: bos,
        0: 1,
        1: len(tokens),
        2: max(map(len, tokens)),
        9: len(eos),
        10: int(add_bos),
    }
    if template:
        said[7] = len(template.encode())
    said |= changes or {}
    data = b"".join(struct.pack("<ii", key, value) for key, value in said.items() if value is not None)
    parts = [struct.pack("<ii", 0x567124, 8 + len(data)), data, template.encode(), struct.pack(f"<{len(eos)}i", *eos)]
    return b"".join(parts) + vocabulary_bytes(tokens, scores)


def vocabulary_bytes(tokens: Sequence[bytes], scores: Sequence[float] | None = None) -> bytes:
    """Return tokens with scores, by default those of the converter."""
    given = [-float(token_id) for token_id in range(len(tokens))] if scores is None else scores
    return b"".join(struct.pack("<fi", score, len(token)) + token for score, token in zip(given, tokens, strict=True))


def old_tokenizer_bytes(tokens: Sequence[bytes], bos: int, eos: int, scores: Sequence[float] | None = None) -> bytes:
    """Return a .t file as they were before there were keys."""
    head = struct.pack("<6i", 0x567123, len(tokens), max(map(len, tokens)), bos, eos, -1)
    return head + vocabulary_bytes(tokens, scores)


def greedy(tokens: Sequence[bytes], bos: int, text: str) -> list[int]:
    """Return a text's ids, slowly, by Distributed Llama's rule for vocabularies whose special tokens begin with BOS.

    First special tokens and the shortest tokens that the next bytes are; then the two neighbours whose union has the
    best score, here the lowest id, are joined, over and over.
    """
    regular = {token: token_id for token_id, token in reversed(list(enumerate(tokens[:bos])))}
    data, found, at, start = text.encode(), list[int](), 0, 0
    while at < len(data):
        special = next((n for n in range(bos, len(tokens)) if data.startswith(tokens[n], at)), None)
        if special is not None:
            found.append(special)
            at = start = at + len(tokens[special])
            continue
        at += 1
        if data[start:at] in regular:
            found.append(regular[data[start:at]])
            start = at
    while True:
        unions = [regular.get(tokens[a] + tokens[b]) for a, b in itertools.pairwise(found)]
        known = [union for union in unions if union is not None]
        if not known:
            return found
        at = unions.index(min(known))
        found[at : at + 2] = [min(known)]
