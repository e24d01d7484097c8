"""Run by every rank: compare tiny models with their references; rank 0 prints a JSON object a case.

usage: parity_job.py FOLDER CASE..., a folder with the models, written by tests.tiny_models
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dllama_mpi import LLM, SamplingParams
from tests.all_cases import ALL_CASES
from tests.tiny_models.case import Case
from tests.tiny_models.references import load_reference


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Return how far logits and greedy tokens are from the reference: whole, in chunks, alone and in a batch."""
    reference = load_reference(case)
    tokens, prompt = reference.tokens.tolist(), reference.greedy_prompt.tolist()
    params = SamplingParams(temperature=0, max_tokens=len(reference.greedy), ignore_eos=True)
    result: dict[str, Any] = {"case": case.name, "errors": {}, "greedy": {}}
    options: dict[str, Any] = {
        "weights": "f32",
        "buffer_float_type": "f32",
        "nthreads": 1,
        "max_seq_len": 128,
        "max_batch": 3,
    }
    for name, chunk in (("whole", 64), ("chunks", 7)):
        llm = LLM(folder, prefill_chunk=chunk, **options)
        logits, alone = llm.logits(tokens), llm.generate(prompt, params)
        # The same prompt among others: longer, shorter, and one that waits for a slot.
        others = llm.generate([tokens[:5], prompt, tokens[3:40], tokens[:1]], params)
        if llm.is_root:
            assert logits is not None
            assert alone is not None
            assert others is not None
            result["errors"][name] = float(np.abs(logits - reference.logits).max())
            result["greedy"][f"{name}, alone"] = alone.token_ids
            result["greedy"][f"{name}, in a batch"] = others[1].token_ids
        else:
            assert logits is None
            assert alone is None
            assert others is None
    result["expected"] = reference.greedy.tolist()
    result["root"] = llm.is_root
    return result


def main() -> None:
    for name in sys.argv[2:]:
        result = compare(ALL_CASES[name], Path(sys.argv[1]) / name)
        if result.pop("root"):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
