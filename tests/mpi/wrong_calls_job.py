"""Run by every rank: give a model wrong things; rank 0 prints what every rank was told, as JSON.

usage: wrong_calls_job.py FOLDER, the directory of a model that tests.tiny_models has written
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dllama_mpi import LLM, SamplingParams
from dllama_mpi.errors import DllamaError

PROMPTS: dict[str, Any] = {
    "None": None,
    "int": 7,
    "float": 1.5,
    "bool": True,
    "bytes": b"abc",
    "set": {1, 2},
    "dict": {1: 2},
    "object": object(),
    "empty": [],
    "floats": [1.5],
    "None among ids": [1, None],
    "bools": [True],
    "text among ids": [1, "a"],
    "negative": [-1],
    "too large": [10**30],
    "nested": [[1, [2]]],
    "mixed": [[1], 3],
    "empty within": [[1], []],
    "array of floats": np.array([1.0, 2.0]),
    "array of nan": np.array([np.nan]),
    "array of objects": np.array([None, 1]),
    "array of three dimensions": np.zeros((1, 2, 3), np.int64),
    "scalar array": np.array(3),
    "empty array": np.zeros(0, int),
    "array of texts": np.array(["a"]),
    "too long": [1] * 1000,
    "surrogate": "\ud800",
}  # fmt: skip
PARAMS: dict[str, Any] = {"int": 5, "dict": {"temperature": 0}, "class": SamplingParams, "text": "greedy"}


def told(call: Callable[[], Any]) -> str:
    """Return what a call raises."""
    try:
        call()
    except DllamaError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def streamed(llm: LLM, prompt: Any, params: Any) -> list[str]:
    """Return the pieces of a stream."""
    return list(llm.stream(prompt, params))


def main() -> None:
    llm = LLM(sys.argv[1], nthreads=1, max_seq_len=64)
    good = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    first = llm.generate([1, 2], good)
    calls: dict[str, Callable[[], Any]] = {}
    for name, prompt in PROMPTS.items():
        calls[f"generate, {name}"] = partial(llm.generate, prompt, good)
        calls[f"stream, {name}"] = partial(streamed, llm, prompt, good)
        calls[f"logits, {name}"] = partial(llm.logits, prompt)
        calls[f"log_probabilities, {name}"] = partial(llm.log_probabilities, prompt)
    for name, params in PARAMS.items():
        calls[f"generate, params: {name}"] = partial(llm.generate, [1], params)
        calls[f"stream, params: {name}"] = partial(streamed, llm, [1], params)
    for name, call in calls.items():
        everybody = llm.group.allgather(told(call))
        again = llm.generate([1, 2], good)
        if llm.is_root:
            assert first is not None
            assert again is not None
            works = again.token_ids == first.token_ids
            print(json.dumps({"call": name, "told": everybody, "works": works}), flush=True)


if __name__ == "__main__":
    main()
