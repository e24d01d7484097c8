"""A model on one rank, as tests call it: every call has its result, and the types say so."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from dllama_mpi.engine.completion import Generation
from dllama_mpi.engine.llm import LLM, Prompt
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.parallel.group import TensorParallelGroup

T = TypeVar("T")


def there(value: T | None) -> T:
    """Return what rank 0 has."""
    assert value is not None
    return value


class OneRank(LLM):
    """A model in this process alone, without MPI."""

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(model, group=TensorParallelGroup(None), **options)

    @overload
    def generate(  # type: ignore[overload-overlap]  # as in LLM
        self, prompt: Prompt, params: SamplingParams | None = None, *, measure_links: bool = False
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, *, measure_links: bool = False
    ) -> list[Generation]: ...
    def generate(self, prompt: Any, params: SamplingParams | None = None, *, measure_links: bool = False) -> Any:
        return there(super().generate(prompt, params, measure_links=measure_links))

    def embed(self, prompts: Sequence[Prompt], pooling: str = "mean") -> np.ndarray:
        return there(super().embed(prompts, pooling))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        return there(super().logits(token_ids))

    def log_probabilities(self, token_ids: Sequence[int], read: Callable[[int], object] = int) -> np.ndarray:
        return there(super().log_probabilities(token_ids, read))
