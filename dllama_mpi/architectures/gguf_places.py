"""Where GGUF files have the tensors of the table: names of llama.cpp, rows in the order of its rotation."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence

from ..model.config import AttentionConfig, DeltaNetConfig, ExpertsConfig, MLPConfig, ModelConfig
from ..model.tensors import HEAD, TABLE, tensors
from ..weights.mapped import Place, Ref, Stack
from .qwen_next import interleaved

# Of a model's tensors that nothing is multiplied with: rotations, which the config tells of; and later layers.
SKIPPED = (r"^rope_(freqs|factors_long|factors_short)\.weight$", r"\.attn_rot_embd", r"\.rope_freqs\.weight$")

_WHOLE = {
    TABLE: ("token_embd.weight",),
    HEAD: ("output.weight",),
    "model.norm.weight": ("output_norm.weight", "token_embd_norm.weight"),
}
_LAYER = {
    "input_layernorm.weight": ("attn_norm.weight",),
    # Before the feed-forward; some call it after what comes before it.
    "post_attention_layernorm.weight": ("ffn_norm.weight", "post_attention_norm.weight"),
    "mixer_output_norm.weight": ("post_attention_norm.weight",),
    "mlp_output_norm.weight": ("post_ffw_norm.weight",),
    "self_attn.o_proj": ("attn_output",),
    "self_attn.q_norm": ("attn_q_norm",),
    "self_attn.k_norm": ("attn_k_norm",),
    "self_attn.sinks": ("attn_sinks.weight", "attn_sinks"),
    "mlp.router.correction": ("exp_probs_b.bias", "exp_probs_b"),
    "mlp.router": ("ffn_gate_inp",),
    "conv.out_proj": ("shortconv.out_proj",),
}
_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@functools.lru_cache(maxsize=4)
def halves(heads: int, dim: int) -> tuple[int, ...]:
    """Return the rows of heads whose pairs of neighbours become pairs of their two halves: how queries are rotated."""
    order = [*range(0, dim, 2), *range(1, dim, 2)]
    return tuple(head * dim + row for head in range(heads) for row in order)


def places(config: ModelConfig, names: Collection[str], permuted: bool) -> dict[str, Place]:
    """Return where each tensor of a model is.

    names: of the files' tensors. permuted: whether the pairs of dimensions that are rotated are neighbours there.
    """
    found: dict[str, Place] = {}
    for spec in tensors(config):
        first: Place | None = None
        for place in _candidates(config, spec.name, permuted, names):
            first = first or place
            if all(each in names for each in place.names):
                first = place
                break
        assert first is not None
        found[spec.name] = first
    return found


def _candidates(config: ModelConfig, name: str, permuted: bool, names: Collection[str]) -> Iterator[Place]:
    """Yield where a tensor may be, the place that is most likely first."""
    if name in _WHOLE:
        yield from map(Ref, _WHOLE[name])
        return
    number, rest = name.removeprefix("model.layers.").split(".", 1)
    blk, layer = f"blk.{number}.", config.layers[int(number)]
    known = next((each for each in _LAYER if rest == each or rest.startswith(each + ".")), None)
    if known is not None:
        for theirs in _LAYER[known]:
            yield Ref(blk + theirs + rest.removeprefix(known))
    elif rest.startswith("self_attn."):
        assert isinstance(layer.mixer, AttentionConfig)
        yield from _attention(layer.mixer, blk, rest.removeprefix("self_attn."), permuted)
    elif rest.startswith("linear_attn."):
        assert isinstance(layer.mixer, DeltaNetConfig)
        yield from _delta_net(config, layer.mixer, blk, rest.removeprefix("linear_attn."))
    elif rest.startswith("conv."):
        yield _short_conv(config, blk, rest.removeprefix("conv."))
    else:
        yield from _feed(layer.feed, blk, rest.removeprefix("mlp."), names)


def _attention(c: AttentionConfig, blk: str, rest: str, permuted: bool) -> Iterator[Place]:
    part, leaf = rest.split(".")
    which = part[0]
    heads, groups, dim = c.num_heads, c.num_kv_heads, c.head_dim
    if c.gate and which in "qg":  # a head's queries and its gate, one after the other
        start = dim * (which == "g")
        rows: Sequence[int] = [2 * dim * head + start + i for head in range(heads) for i in range(dim)]
        yield Ref(f"{blk}attn_q.{leaf}", rows=rows)
        return
    order = halves(heads if which == "q" else groups, dim) if permuted and which in "qk" else None
    yield Ref(f"{blk}attn_{which}.{leaf}", rows=order, all_rows=order is not None)
    sizes = {"q": heads * dim, "k": groups * dim, "v": groups * dim}
    start = sum(list(sizes.values())[: "qkv".index(which)])
    fused = [start + row for row in order] if order else slice(start, start + sizes[which])
    yield Ref(f"{blk}attn_qkv.{leaf}", rows=fused)


def _feed(c: MLPConfig | ExpertsConfig, blk: str, rest: str, names: Collection[str]) -> Iterator[Place]:
    if isinstance(c, MLPConfig):
        part, leaf = rest.split(".")
        if part != "down_proj" and f"{blk}ffn_gate.weight" not in names and f"{blk}ffn_up.weight" in names:
            inner = c.intermediate_size  # fused: the gate comes first
            yield Ref(f"{blk}ffn_up.{leaf}", rows=slice(0, inner) if part == "gate_proj" else slice(inner, 2 * inner))
        yield Ref(f"{blk}ffn_{_PARTS[part]}.{leaf}")
        return
    if rest == "shared_gate.weight":
        yield Ref(f"{blk}ffn_gate_inp_shexp.weight", single=True)
        return
    kind, part, leaf = rest.split(".")
    if kind == "shared":
        yield Ref(f"{blk}ffn_{_PARTS[part]}_shexp.{leaf}")
        return
    yield Ref(f"{blk}ffn_{_PARTS[part]}_exps.{leaf}")
    if part != "down_proj":
        inner = c.expert.intermediate_size
        rows = slice(0, inner) if part == "gate_proj" else slice(inner, 2 * inner)
        yield Ref(f"{blk}ffn_gate_up_exps.{leaf}", rows=rows, stacked=True)
    if f"{blk}ffn_{_PARTS[part]}.0.{leaf}" in names:  # older files have the experts one by one
        yield Stack(tuple(Ref(f"{blk}ffn_{_PARTS[part]}.{e}.{leaf}") for e in range(c.num_experts)))


def _short_conv(config: ModelConfig, blk: str, rest: str) -> Place:
    if rest == "taps":
        return Ref(f"{blk}shortconv.conv.weight", flat=True)
    part, size = "bcx".index(rest[0]), config.hidden_size
    return Ref(f"{blk}shortconv.in_proj.weight", rows=slice(part * size, (part + 1) * size))


def _heads(c: DeltaNetConfig, is_tiled: bool, size: int) -> list[int] | None:
    """Return which rows value heads of `size` rows are, one key head's after the other's; None: as they lie.

    is_tiled: each key head's first value heads come first there, then each one's second, ...
    """
    ratio = c.num_value_heads // c.num_key_heads
    if not is_tiled or ratio == 1:
        return None
    order = [v * c.num_key_heads + k for k in range(c.num_key_heads) for v in range(ratio)]
    return [size * head + i for head in order for i in range(size)]


def _delta_net(config: ModelConfig, c: DeltaNetConfig, blk: str, rest: str) -> Iterator[Place]:
    is_tiled = not config.model_type.startswith("qwen3_next")
    key, value = c.num_key_heads * c.key_dim, c.num_value_heads * c.value_dim
    values = _heads(c, is_tiled, c.value_dim)
    spans: dict[str, slice | Sequence[int]] = {"q": slice(0, key), "k": slice(key, 2 * key)}
    spans["v"] = slice(2 * key, 2 * key + value) if values is None else [2 * key + row for row in values]
    which = rest[0]
    if rest.startswith("conv_"):
        yield Ref(f"{blk}ssm_conv1d.weight", rows=spans[rest[-1]], flat=True)
    elif rest == "A_log":
        yield Ref(f"{blk}ssm_a", rows=_heads(c, is_tiled, 1), exponents=True)
    elif rest == "dt_bias":
        yield Ref(f"{blk}ssm_dt.bias", rows=_heads(c, is_tiled, 1))
        yield Ref(f"{blk}ssm_dt", rows=_heads(c, is_tiled, 1))
    elif rest == "norm.weight":
        yield Ref(f"{blk}ssm_norm.weight")
    elif rest == "out_proj.weight":
        columns = _heads(c, is_tiled, c.value_dim)
        yield Ref(f"{blk}ssm_out.weight", columns=columns)
    elif which in spans:
        yield Ref(f"{blk}attn_qkv.weight", rows=spans[which])
        yield Ref(f"{blk}ssm_in.weight", rows=interleaved(c, which))
    elif which == "z":
        yield Ref(f"{blk}attn_gate.weight", rows=values)
        yield Ref(f"{blk}ssm_in.weight", rows=interleaved(c, which))
    else:
        yield Ref(f"{blk}ssm_{'beta' if which == 'b' else 'alpha'}.weight", rows=_heads(c, is_tiled, 1))
        yield Ref(f"{blk}ssm_ba.weight", rows=interleaved(c, which))
