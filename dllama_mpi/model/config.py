"""The shape of a model: one frozen `ModelConfig`, in which each layer says what it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from .rope import RopeConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
        window: positions a token sees, itself included, or 0 for all. scale: of the scores.
        softcap: s: scores become s * tanh(score / s); 0 for none. sinks: whether each head has a logit of its own.
        qk_norm: "" for none, "head" for an RMSNorm of each head's queries and keys, "whole" for one of all heads.
        clip: what queries, keys and values are limited to in size before the rotation; 0 for no limit.
        norm_last: whether it comes after the rotation. gate: whether outputs are multiplied by a projection's sigmoids.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    scale: float
    window: int = 0
    softcap: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = ""
    norm_last: bool = False
    clip: float = 0.0
    sinks: bool = False
    gate: bool = False


@dataclass(frozen=True)
class DeltaNetConfig:
    """Gated delta net (arXiv:2412.06464): a state of (key_dim, value_dim) for each value head.

    Attributes:
        kernel: size of the causal convolution over queries, keys and values.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int


@dataclass(frozen=True)
class ShortConvConfig:
    """Gated short convolution: out(c * conv(b * x)), b, c and x projections of the input.

    Attributes:
        kernel: size of the causal convolution. bias: whether projections and convolution have biases.
    """

    kernel: int
    bias: bool = False


@dataclass(frozen=True)
class MLPConfig:
    """Gated feed-forward layer; activation: a key of `kernels.activation.ACTIVATIONS`; limit, alpha: see there."""

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False
    limit: float = 0.0
    alpha: float = 1.0


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts.

    Attributes:
        expert: each of them. top_k: how many a token uses. scoring: "softmax" or "sigmoid".
        normalised: whether the weights of the chosen sum to 1, before they are multiplied with `scale`.
        router_bias: whether logits have a bias. correction: whether scores have one where experts are compared.
        groups, best_groups: only experts of the best groups may be chosen.
        shared: an expert that all tokens use. shared_gate: whether it is multiplied by the sigmoid of a projection.
        published: the format in which their publisher gives the experts' matrices; "" where it is none of ours.
    """

    expert: MLPConfig
    num_experts: int
    top_k: int
    scoring: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    router_bias: bool = False
    correction: bool = False
    groups: int = 1
    best_groups: int = 1
    shared: MLPConfig | None = None
    shared_gate: bool = False
    published: str = ""


Mixer = AttentionConfig | DeltaNetConfig | ShortConvConfig


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: a mixer and a feed-forward, each with norms before it, after it, or both.

    Attributes:
        norm_before, norm_after: whether inputs and outputs of both halves are normalised.
        residual_scale: what outputs are multiplied with before they are added to the residual.
    """

    mixer: Mixer
    feed: MLPConfig | ExpertsConfig
    norm_before: bool = True
    norm_after: bool = False
    residual_scale: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer.

    Attributes:
        model_type: the architecture's name in config.json. norm_eps: of RMSNorms.
        embedding_scale, logit_scale: what embeddings and logits are multiplied with. logit_softcap: s: logits become
            s * tanh(logit / s); 0 for none.
        query_scaling: (beta, n): queries at position p are multiplied with 1 + beta * log(1 + p // n).
        later_layers: layers that the files may have after the decoder's, to predict further tokens; not used here.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool
    layers: tuple[LayerConfig, ...]
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    query_scaling: tuple[float, int] | None = None
    later_layers: int = 0

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def attentions(self) -> list[AttentionConfig]:
        """The layers with attention."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, AttentionConfig)]

    @property
    def window(self) -> int:
        """The most positions that a layer with a window sees; 0: no layer has one."""
        return max((attention.window for attention in self.attentions), default=0)

    @property
    def ropes(self) -> list[RopeConfig]:
        """The different rotations, in the order of their first layers."""
        return list(dict.fromkeys(attention.rope for attention in self.attentions))

    @property
    def has_state(self) -> bool:
        """Whether layers remember a state that cannot go back, not positions one by one."""
        return len(self.attentions) < self.num_layers

    @property
    def has_plain_residual(self) -> bool:
        """Whether the outputs of all layers are added to the residual alike, none normalised before."""
        return len({layer.residual_scale for layer in self.layers}) == 1 and not any(
            layer.norm_after for layer in self.layers
        )

    @property
    def can_reuse(self) -> bool:
        """Whether what is remembered of a text serves another text that begins alike."""
        return all(rope.kind not in ("dynamic", "longrope") for rope in self.ropes)
