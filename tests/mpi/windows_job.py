"""Run by every rank: a tiny model with windows over texts of several pages, on all ranks and on one; rank 0 prints.

usage: windows_job.py FOLDER, the directory of a model that tests.tiny_models has written
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from dllama_mpi import LLM, SamplingParams
from dllama_mpi.engine.llm import Prompt
from dllama_mpi.parallel.group import TensorParallelGroup

TEXT = [int(token) for token in np.random.default_rng(5).integers(0, 110, 900)]
PROMPTS: list[Prompt] = [[*TEXT[:n], 1, 2] for n in (900, 600, 512, 20)]


def main() -> None:
    options: dict[str, Any] = {"weights": "f32", "nthreads": 1, "max_seq_len": 4096, "max_batch": 3}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    together = LLM(sys.argv[1], buffer_float_type="f32", **options)
    got, ids = together.logits(TEXT), together.generate(PROMPTS, params)
    again = together.generate(PROMPTS[:1], params)
    if together.is_root:
        alone = LLM(sys.argv[1], group=TensorParallelGroup(None), **options)
        ref, expected = alone.logits(TEXT), alone.generate(PROMPTS, params)
        assert got is not None
        assert ref is not None
        assert ids is not None
        assert again is not None
        assert expected is not None
        result = {
            "pages": [together.pages, together.window_pages],
            "difference": float(np.abs(got - ref).max()),
            "ids": [each.token_ids for each in ids],
            "expected": [each.token_ids for each in expected],
            "again": again[0].token_ids,
            "cached": again[0].usage.cached_tokens,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
