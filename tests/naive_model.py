"""The whole forward pass of a dense decoder, and its tensors, without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.naive_layers import attention, rms_norm, rms_norm_in_order, rope_angles, rotate, silu_mul
from tests.naive_numbers import Floats, Ints, half
from tests.naive_products import matmul


def read_tensors(folder: Path) -> dict[str, Floats]:
    """Return every tensor of a model directory as float32."""
    found: dict[str, Floats] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}[entry["dtype"]]
            values = np.frombuffer(content[start:stop], kind).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            found[name] = values.astype(np.float32)
    return found


class Model:
    """A dense decoder from a Hugging Face directory, computed token by token, head by head.

    weights: "q40", "q80", "f16" or "f32"; activations are quantised to Q80 for the first two. The embedding, norms
    and biases stay float32; keys and values are float16 unless the weights are f32.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors, self.weights = read_tensors(folder), weights
        c = self.config
        self.heads = c["num_attention_heads"]
        self.kv_heads = c.get("num_key_value_heads", self.heads)
        self.dim = self.tensors["model.layers.0.self_attn.q_proj.weight"].shape[0] // self.heads

    def logits(self, tokens: Ints) -> Floats:
        """Return the logits (n, vocab) of one forward pass over n tokens."""
        head = "lm_head.weight" if "lm_head.weight" in self.tensors else "model.embed_tokens.weight"
        return matmul(self.tensors[head], self.weights, self.hidden(tokens))

    def hidden(self, tokens: Ints) -> Floats:
        """Return the final hidden states (n, hidden) of one forward pass over n tokens, behind the last norm."""
        residual = self.tensors["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            residual = residual + self._attention(self._norm(residual, f"{prefix}.input_layernorm"), layer)
            residual = residual + self._mlp(self._norm(residual, f"{prefix}.post_attention_layernorm"), f"{prefix}.mlp")
        return self._norm(residual, "model.norm")

    def _norm(self, x: Floats, name: str) -> Floats:
        weight, eps = self.tensors[f"{name}.weight"], self.config["rms_norm_eps"]
        if x.ndim > 2:  # of heads, which one rank alone looks at
            return rms_norm(x, weight, eps)
        return np.stack([rms_norm_in_order(row, weight, eps) for row in x])

    def _linear(self, x: Floats, name: str) -> Floats:
        y = matmul(self.tensors[f"{name}.weight"], self.weights, x)
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def _mlp(self, x: Floats, name: str) -> Floats:
        inner = silu_mul(self._linear(x, f"{name}.gate_proj"), self._linear(x, f"{name}.up_proj"))
        return self._linear(inner, f"{name}.down_proj")

    def _attention(self, x: Floats, layer: int) -> Floats:
        n, name = len(x), f"model.layers.{layer}.self_attn"
        positions = np.arange(n)
        angles, factor = rope_angles(self.config, self.dim, positions, n)
        q = self._linear(x, f"{name}.q_proj").reshape(n, self.heads, self.dim)
        k, v = (self._linear(x, f"{name}.{part}_proj").reshape(n, self.kv_heads, self.dim) for part in "kv")
        if f"{name}.q_norm.weight" in self.tensors:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        q, k = rotate(q, angles, factor), rotate(k, angles, factor)
        if self.weights != "f32":
            k, v = half(k).astype(np.float32), half(v).astype(np.float32)
        heads = attention(q, k.swapaxes(0, 1), v.swapaxes(0, 1), positions, self._window(layer))
        return self._linear(heads.reshape(n, -1), f"{name}.o_proj")

    def _window(self, layer: int) -> int:
        c = self.config
        window = c.get("sliding_window") or 0
        if c["model_type"].startswith("qwen"):
            return window if c.get("use_sliding_window") and layer >= c["max_window_layers"] else 0
        return window if c["model_type"] == "mistral" else 0
