"""References: what transformers computes for the tiny models, stored in ``tests/data/reference``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.tiny_models.case import Case
from tests.tiny_models.tensors import stored_tensors

REFERENCE_FOLDER = Path(__file__).parents[1] / "data" / "reference"
GREEDY_TOKENS = 24
"""Tokens generated for each case."""


@dataclass(frozen=True)
class Reference:
    """What transformers computes for a case in float32.

    Attributes:
        tokens: The sequence, int64 of shape (n,).
        logits: Logits of every position of one forward pass over ``tokens``, float32 of shape (n, vocab).
        greedy_prompt: The leading part of ``tokens`` which the generation starts from, int64 of shape (prompt,).
        greedy: Tokens generated greedily, one by one with a KV cache and regardless of EOS, int64 of shape (24,).
        fingerprint: ``fingerprint`` of the case the reference was made from.
    """

    tokens: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    greedy_prompt: npt.NDArray[np.int64]
    greedy: npt.NDArray[np.int64]
    fingerprint: str


def fingerprint(case: Case) -> str:
    """Return a digest of the configuration and the stored weights of a case."""
    digest = hashlib.sha256(json.dumps(case.config, sort_keys=True).encode())
    for name, dtype, values in stored_tensors(case):
        digest.update(f"{name}:{dtype}:{values.shape}:".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def reference_path(case: Case) -> Path:
    """Return the path of the reference file of a case."""
    return REFERENCE_FOLDER / f"{case.name}.npz"


def load_reference(case: Case) -> Reference:
    """Load the reference of a case."""
    with np.load(reference_path(case), allow_pickle=False) as data:
        return Reference(
            tokens=data["tokens"],
            logits=data["logits"],
            greedy_prompt=data["greedy_prompt"],
            greedy=data["greedy"],
            fingerprint=str(data["fingerprint"]),
        )
