"""The demo model: a Llama in PyTorch, whose weights may be rounded as Q8_0 and Q4_0 round them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 2048, 256, 512, 5, 8, 4, 32, 512
EPSILON, THETA, DROPOUT = 1e-5, 10000.0, 0.1


def quantised(x: Tensor, kind: str) -> Tensor:
    """x as Q8_0 or Q4_0 stores it: blocks of 32 on the last axis, one fp16 scale each (Q4_0 codes the extreme as 0)."""
    blocks = x.float().unflatten(-1, (-1, 32))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    d = (extreme.abs() / 127 if kind == "q80" else extreme / -8).half().float()
    scaled = torch.where(d != 0, blocks / torch.where(d != 0, d, 1), 0)
    codes = scaled.round().clamp(-127, 127) if kind == "q80" else (scaled + 8.5).trunc().clamp(0, 15) - 8
    return (codes * d).flatten(-2)


def linear(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """x times the weight, computed in "f32", or with the rounding of "q80" or "q40"."""
    if kind == "f32":
        return F.linear(x, weight)
    with torch.no_grad():
        error = quantised(weight.bfloat16(), kind) - weight
    return F.linear(x if torch.is_grad_enabled() else quantised(x, "q80"), weight + error)


def linears(**shapes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({f"{name}_proj": nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        query, pair = (WIDTH, HEADS * HEAD_DIM), (WIDTH, KV_HEADS * HEAD_DIM)
        self.input_layernorm = nn.RMSNorm(WIDTH, EPSILON)
        self.self_attn = linears(q=query, k=pair, v=pair, o=query[::-1])
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, EPSILON)
        self.mlp = linears(gate=(WIDTH, INNER), up=(WIDTH, INNER), down=(INNER, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
        attn, mlp = ({n[:-5]: m.weight for n, m in part.items()} for part in (self.self_attn, self.mlp))
        mask = self.dropout(torch.ones(2, len(x), 1, WIDTH))  # of whole channels, which costs little time
        h = self.input_layernorm(x)
        q, k, v = (linear(h, attn[n], kind).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).float() for n in "qkv")
        half = HEAD_DIM // 2
        q, k = (t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        with torch.autocast("cpu", enabled=False):
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mask[0] * linear(h.transpose(1, 2).flatten(2), attn["o"], kind)
        h = self.post_attention_layernorm(x)
        h = F.silu(linear(h, mlp["gate"], kind)) * linear(h, mlp["up"], kind)
        return x + mask[1] * linear(h, mlp["down"], kind)


class Llama(nn.Module):
    """The decoder; its parameters have the names of LlamaForCausalLM."""

    def __init__(self) -> None:
        super().__init__()
        parts = {"embed_tokens": nn.Embedding(VOCAB, WIDTH), "layers": nn.ModuleList(Layer() for _ in range(LAYERS))}
        self.model = nn.ModuleDict({**parts, "norm": nn.RMSNorm(WIDTH, EPSILON)})
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = (2 * LAYERS) ** -0.5 if "o_proj" in name or "down_proj" in name else 1
                nn.init.normal_(p, std=0.02 if "embed" in name else residual / math.sqrt(p.shape[1]))
        frequency = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(LENGTH), frequency).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, ids: Tensor, kind: str = "f32") -> Tensor:
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]], kind)
        return linear(self.model["norm"](x), self.model["embed_tokens"].weight, kind)


@torch.no_grad()
def perplexity(model: Llama, ids: Tensor, kind: str) -> float:
    """Windows of LENGTH tokens with a stride of half of that; each token is scored once."""
    loss, scored = 0.0, 1
    for start in range(0, len(ids), LENGTH // 2):
        part = ids[start : start + LENGTH]
        if (new := start + len(part) - scored) > 0:
            loss += F.cross_entropy(model(part[None, :-1], kind)[0, -new:], part[-new:], reduction="sum").item()
            scored += new
    return math.exp(loss / (scored - 1))
