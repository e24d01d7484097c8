"""Slow numpy twins of routers, experts and whole mixture-of-experts models, in float64.

Formulas after transformers' modeling files of the families; nothing here shares code with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests import naive_layers, naive_model, naive_numbers, naive_products
from tests.naive_numbers import Doubles, Floats, Ints

Activation = Callable[[Doubles, Doubles], Doubles]
Product = Callable[[Floats, Floats], Floats]
"""Of a matrix (rows, cols) and activations (tokens, cols): their products (tokens, rows)."""

# --------------------------------------------------------------------------------------------------------------------
# Routers
# --------------------------------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """Chosen experts, best first, and their weights, both (tokens, k)."""

    experts: Ints
    weights: Doubles


def best(scores: npt.ArrayLike, count: int) -> Ints:
    """Return the indices (tokens, count) of the largest of each row of scores, best first, ties by lower index."""
    order = np.argsort(-np.asarray(scores, np.float64), axis=1, kind="stable")
    return order[:, :count].astype(np.int64)


def softmax(values: npt.ArrayLike) -> Doubles:
    """Return the softmax over the last axis."""
    exact = np.asarray(values, np.float64)
    weights = np.exp(exact - exact.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def sigmoid(values: npt.ArrayLike) -> Doubles:
    """Return 1 / (1 + exp(-values))."""
    return 1 / (1 + np.exp(-np.asarray(values, np.float64)))


def softmax_then_best(logits: npt.ArrayLike, count: int, renormalise: bool) -> Routing:
    """Route by the probabilities of all experts, of which the chosen ones' may be made to sum to 1.

    Qwen2-MoE, Qwen3-MoE and OLMoE (``norm_topk_prob``), and Mixtral (always renormalised).
    """
    probabilities = softmax(logits)
    experts = best(logits, count)
    weights = np.take_along_axis(probabilities, experts, axis=1)
    return Routing(experts, weights / weights.sum(axis=1, keepdims=True) if renormalise else weights)


def best_then_softmax(logits: npt.ArrayLike, count: int) -> Routing:
    """Route by the largest logits, weighted by the softmax of these alone (Granite-MoE, gpt-oss)."""
    experts = best(logits, count)
    return Routing(experts, softmax(np.take_along_axis(np.asarray(logits, np.float64), experts, axis=1)))


class Groups(NamedTuple):
    """Groups of neighbouring experts: their number, and how many of them a token may choose from."""

    number: int
    chosen: int


def grouped_sigmoid(
    logits: npt.ArrayLike, correction: npt.ArrayLike, count: int, groups: Groups, renormalise: bool, scale: float
) -> Routing:
    """Route by sigmoids plus a correction that chooses only, within the groups of the two best sums (GLM-4.5)."""
    scores = sigmoid(logits)
    choice = scores + np.asarray(correction, np.float64)
    tokens, experts_number = choice.shape
    size = experts_number // groups.number
    kept = np.full_like(choice, -np.inf)
    for t in range(tokens):
        sums = [np.sort(choice[t, g * size : (g + 1) * size])[-2:].sum() for g in range(groups.number)]
        for g in best([sums], groups.chosen)[0]:
            kept[t, g * size : (g + 1) * size] = choice[t, g * size : (g + 1) * size]
    experts = best(kept, count)
    weights = np.take_along_axis(scores, experts, axis=1)
    if renormalise:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(experts, weights * scale)


# --------------------------------------------------------------------------------------------------------------------
# Experts
# --------------------------------------------------------------------------------------------------------------------


def silu_mul(gate: npt.ArrayLike, up: npt.ArrayLike) -> Doubles:
    """Return silu(gate) * up."""
    g = np.asarray(gate, np.float64)
    return g * sigmoid(g) * np.asarray(up, np.float64)


def clamped_swiglu(gate: npt.ArrayLike, up: npt.ArrayLike, alpha: float, limit: float) -> Doubles:
    """Return g * sigmoid(alpha * g) * (u + 1), g clamped from above and u from both sides (gpt-oss)."""
    g = np.minimum(np.asarray(gate, np.float64), limit)
    u = np.clip(np.asarray(up, np.float64), -limit, limit)
    return g * sigmoid(alpha * g) * (u + 1)


class Expert(NamedTuple):
    """One gated MLP: gate and up (inner, hidden), down (hidden, inner), and biases (inner,), (inner,), (hidden,)."""

    gate: Floats
    up: Floats
    down: Floats
    gate_bias: Floats | float = 0.0
    up_bias: Floats | float = 0.0
    down_bias: Floats | float = 0.0


def exact_product(matrix: Floats, x: Floats) -> Floats:
    """Return x @ matrix^T (tokens, rows), summed in float64."""
    return (x.astype(np.float64) @ matrix.astype(np.float64).T).astype(np.float32)


def gated_mlp(x: Floats, expert: Expert, activation: Activation, product: Product = exact_product) -> Doubles:
    """Return what one expert makes of activations (tokens, hidden)."""
    gate = product(expert.gate, x).astype(np.float64) + expert.gate_bias
    up = product(expert.up, x).astype(np.float64) + expert.up_bias
    inner = activation(gate, up).astype(np.float32)
    return product(expert.down, inner).astype(np.float64) + expert.down_bias


def mixture(
    x: Floats, routing: Routing, experts: list[Expert], activation: Activation, product: Product = exact_product
) -> Doubles:
    """Return the weighted sum (tokens, hidden) of what the chosen experts make of activations (tokens, hidden)."""
    weights = np.zeros((len(x), len(experts)))
    for t, (chosen, weight) in enumerate(zip(*routing, strict=True)):
        weights[t, chosen] = weight
    out = np.zeros(x.shape, np.float64)
    for number, expert in enumerate(experts):
        out += weights[:, number : number + 1] * gated_mlp(x, expert, activation, product)
    return out


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 4-bit codes (OCP Microscaling Formats 1.0, 5.3.3): sign, two bits of exponent, one of mantissa."""


def mxfp4_dequantise(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> Floats:
    """Return the values (..., 32 n) of MXFP4 blocks (..., n, 16), low halves of the bytes first, and scales (..., n).

    A scale byte is an exponent of two plus 127 (E8M0).
    """
    values = np.zeros((*scales.shape, 32), np.float32)
    for j in range(16):
        for half, codes in enumerate((blocks[..., j] & 15, blocks[..., j] >> 4)):
            values[..., 2 * j + half] = np.take(np.array(E2M1), codes) * 2.0 ** (scales.astype(np.float64) - 127)
    return values.reshape(*scales.shape[:-1], -1)


# --------------------------------------------------------------------------------------------------------------------
# Whole models
# --------------------------------------------------------------------------------------------------------------------


class SparseModel(naive_model.Model):
    """A mixture-of-experts decoder from a Hugging Face directory, otherwise as ``naive_model.Model``.

    Routers are float32 matrices whatever the weights; so is the gate of the shared expert.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        super().__init__(folder, weights)
        self.family: str = self.config["model_type"]

    def logits(self, tokens: Ints) -> Floats:
        """Return the logits (n, vocab) of one forward pass over n tokens."""
        c = self.config
        residual = self.tensors["model.embed_tokens.weight"][tokens] * np.float32(c.get("embedding_multiplier", 1))
        scale = np.float32(c.get("residual_multiplier", 1))
        for layer in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            residual = residual + scale * self._attention(self._norm(residual, f"{prefix}.input_layernorm"), layer)
            x = self._norm(residual, f"{prefix}.post_attention_layernorm")
            residual = residual + scale * self._feed_forward(x, prefix)
        head = "lm_head.weight" if "lm_head.weight" in self.tensors else "model.embed_tokens.weight"
        logits = self._product(self.tensors[head], self._norm(residual, "model.norm"))
        return logits / np.float32(c.get("logits_scaling", 1))

    def _product(self, matrix: Floats, x: Floats) -> Floats:
        return exact_product(matrix, x) if self.weights == "f32" else naive_products.matmul(matrix, self.weights, x)

    def _linear(self, x: Floats, name: str) -> Floats:
        return self._product(self.tensors[f"{name}.weight"], x) + self.tensors.get(f"{name}.bias", np.float32(0))

    # Attention ------------------------------------------------------------------------------------------------------

    def _attention(self, x: Floats, layer: int) -> Floats:
        n, name, c = len(x), f"model.layers.{layer}.self_attn", self.config
        q, k, v = (self._linear(x, f"{name}.{part}_proj") for part in "qkv")
        q, k = self._query_key_norms(q, k, name)
        if c.get("clip_qkv"):
            q, k, v = (np.clip(part, -c["clip_qkv"], c["clip_qkv"]) for part in (q, k, v))
        q = q.reshape(n, self.heads, self.dim)
        k, v = (part.reshape(n, self.kv_heads, self.dim) for part in (k, v))
        turned = int(self.dim * c.get("partial_rotary_factor", 1.0))
        angles, factor = naive_layers.rope_angles(c, turned, np.arange(n), n)
        q, k = (
            np.concatenate([naive_layers.rotate(part[:, :, :turned], angles, factor), part[:, :, turned:]], axis=2)
            for part in (q, k)
        )
        if self.weights != "f32":
            k, v = (naive_numbers.half(part).astype(np.float32) for part in (k, v))
        scale = c.get("attention_multiplier", self.dim**-0.5)
        out = sink_attention(q, k, v, scale, self._window(layer), self.tensors.get(f"{name}.sinks"))
        return self._linear(out.reshape(n, -1), f"{name}.o_proj")

    def _query_key_norms(self, q: Floats, k: Floats, name: str) -> tuple[Floats, Floats]:
        if f"{name}.q_norm.weight" not in self.tensors:
            return q, k
        width = {part: len(self.tensors[f"{name}.{part}_norm.weight"]) for part in "qk"}  # a head, or all of them
        return (
            self._norm(q.reshape(len(q), -1, width["q"]), f"{name}.q_norm").reshape(q.shape),
            self._norm(k.reshape(len(k), -1, width["k"]), f"{name}.k_norm").reshape(k.shape),
        )

    def _window(self, layer: int) -> int:
        c = self.config
        window = c.get("sliding_window") or 0
        if self.family == "gpt_oss":
            return window if c["layer_types"][layer] == "sliding_attention" else 0
        if c.get("use_sliding_window"):
            raise NotImplementedError("no case slides in the manner of Qwen")
        return window if self.family == "mixtral" else 0

    # Feed-forward ---------------------------------------------------------------------------------------------------

    def _feed_forward(self, x: Floats, prefix: str) -> Floats:
        name = f"{prefix}.{'block_sparse_moe' if self.family in ('mixtral', 'granitemoe') else 'mlp'}"
        if f"{name}.gate_proj.weight" in self.tensors:
            return self._mlp(x, name)
        out = mixture(x, self._route(x, name), self._experts(name), self._activation, self._product)
        if self.family == "qwen2_moe":
            gate = sigmoid(exact_product(self.tensors[f"{name}.shared_expert_gate.weight"], x))
            out += gate * self._mlp(x, f"{name}.shared_expert")
        if self.family == "glm4_moe":
            out += self._mlp(x, f"{name}.shared_experts")
        return out.astype(np.float32)

    def _activation(self, gate: Doubles, up: Doubles) -> Doubles:
        if self.family != "gpt_oss":
            return silu_mul(gate, up)
        return clamped_swiglu(gate, up, self.config.get("swiglu_alpha", 1.702), self.config.get("swiglu_limit", 7.0))

    def _route(self, x: Floats, name: str) -> Routing:
        c, count = self.config, self.config["num_experts_per_tok"]
        router = {"granitemoe": "router.layer", "gpt_oss": "router"}.get(self.family, "gate")
        logits = exact_product(self.tensors[f"{name}.{router}.weight"], x)
        if self.family == "glm4_moe":
            groups = Groups(c["n_group"], c["topk_group"])
            correction = self.tensors[f"{name}.gate.e_score_correction_bias"]
            return grouped_sigmoid(logits, correction, count, groups, c["norm_topk_prob"], c["routed_scaling_factor"])
        if self.family == "gpt_oss":
            logits = logits + self.tensors[f"{name}.router.bias"]
        if self.family in ("gpt_oss", "granitemoe"):
            return best_then_softmax(logits, count)
        return softmax_then_best(logits, count, c.get("norm_topk_prob", self.family == "mixtral"))

    def _experts(self, name: str) -> list[Expert]:
        if self.family == "granitemoe":
            gates, ups = np.split(self.tensors[f"{name}.input_linear.weight"], 2, axis=1)
            return [
                Expert(*parts) for parts in zip(gates, ups, self.tensors[f"{name}.output_linear.weight"], strict=True)
            ]
        if self.family == "gpt_oss":
            return self._gpt_oss_experts(f"{name}.experts")
        parts = ("w1", "w3", "w2") if self.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        found: list[Expert] = []
        while f"{name}.experts.{len(found)}.{parts[0]}.weight" in self.tensors:
            found.append(Expert(*(self.tensors[f"{name}.experts.{len(found)}.{part}.weight"] for part in parts)))
        return found

    def _gpt_oss_experts(self, name: str) -> list[Expert]:
        both, down = (self._gpt_oss_matrices(f"{name}.{part}_proj") for part in ("gate_up", "down"))
        biases = (self.tensors[f"{name}.{part}_proj_bias"] for part in ("gate_up", "down"))
        return [
            Expert(rows[::2], rows[1::2], columns, row_bias[::2], row_bias[1::2], bias)
            for rows, columns, row_bias, bias in zip(both, down, *biases, strict=True)
        ]

    def _gpt_oss_matrices(self, name: str) -> Floats:
        """Return the matrices (experts, outputs, inputs), which are stored quantised, or else transposed."""
        if name in self.tensors:
            return self.tensors[name].swapaxes(1, 2)
        blocks, scales = (self.tensors[f"{name}_{part}"].astype(np.uint8) for part in ("blocks", "scales"))
        return mxfp4_dequantise(blocks, scales)


def sink_attention(q: Floats, k: Floats, v: Floats, scale: float, window: int, sinks: Floats | None) -> Floats:
    """Return the attention (n, heads, dim) of one sequence from its start.

    q: (n, heads, dim); k, v: (n, kv_heads, dim); window: positions a token sees, itself included, or 0 for all before
    it; sinks: (heads,) or None, logits which take part in the softmax and have no value.
    """
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros((n, heads, dim), np.float32)
    for t in range(n):
        start = max(0, t + 1 - window) if window else 0
        for h in range(heads):
            keys, values = (a[start : t + 1, h // group].astype(np.float64) for a in (k, v))
            scores = list(scale * (keys @ q[t, h].astype(np.float64)))
            weights = softmax(scores if sinks is None else [*scores, float(sinks[h])])
            out[t, h] = weights[: len(scores)] @ values
    return out
