"""How clearly the routers of a transformers model choose their experts (needs torch)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class Routing(NamedTuple):
    """What the routers of a model did in one pass.

    Attributes:
        margin: Least difference between the last expert (or group) chosen and the best one that was not.
        unused: Number of experts, over all layers, which no token went to.
    """

    margin: float
    unused: int


def _gap(scores: torch.Tensor, count: int) -> float:
    """Return the least difference between the count-th and the next of each row of scores (tokens, n)."""
    best = scores.sort(dim=1, descending=True).values
    return float((best[:, count - 1] - best[:, count]).min()) if count < scores.shape[1] else float("inf")


def _router_margin(router: Any, logits: torch.Tensor) -> float:
    """Return the margin of a router's decisions from its logits (tokens, experts)."""
    if not hasattr(router, "e_score_correction_bias"):
        return _gap(logits, router.top_k)
    scores = (logits.sigmoid() + router.e_score_correction_bias).view(len(logits), router.num_group, -1)
    groups = scores.topk(2, dim=2).values.sum(dim=2)
    kept = groups.topk(router.topk_group, dim=1).indices
    chosen = torch.gather(scores, 1, kept[:, :, None].expand(-1, -1, scores.shape[2])).flatten(1)
    return min(_gap(groups, router.topk_group), _gap(chosen, router.top_k))


def routing(model: Any, tokens: npt.NDArray[np.int64]) -> Routing:
    """Run a model over tokens (n,) and return how its routers chose; the margin of a dense model is infinite."""
    margins, unused = [float("inf")], 0

    def hook(router: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        nonlocal unused
        logits, _, chosen = output
        margins.append(_router_margin(router, logits))
        unused += router.num_experts - len(set(chosen.flatten().tolist()))

    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(hook)
    with torch.inference_mode():
        model(torch.from_numpy(tokens)[None], use_cache=False)
    return Routing(min(margins), unused)
