"""Run by every rank: a model's greedy tokens alone, in company, from the cache and with few pages; rank 0 prints JSON.

usage: company_job.py FOLDER, the directory of a model that tests.tiny_models has written
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from dllama_mpi import LLM, SamplingParams

COUNT, LENGTH, STEPS = 5, 240, 40


def main() -> None:
    folder = sys.argv[1]
    # What is sent as float32 adds up alike however many tokens a message holds, and so does what is not quantised.
    options: dict[str, Any] = {
        "weights": "f32",
        "kv_type": "f32",
        "buffer_float_type": "f32",
        "nthreads": 1,
        "max_seq_len": 512,
    }
    rng = np.random.default_rng(1)
    size = LLM(folder, **options).config.vocab_size
    beginning = rng.integers(0, size, LENGTH).tolist()
    prompts = [[*beginning[: LENGTH - 30 * i], *rng.integers(0, size, 30 * i + 1).tolist()] for i in range(COUNT)]
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)

    def tokens(found: Any) -> Any:
        return None if found is None else [each.token_ids for each in found]

    alone = LLM(folder, **options)
    reference = []
    for prompt in prompts:
        found = alone.generate(prompt, params)
        if alone.is_root:
            alone.engine.scheduler.forget()
            assert found is not None
            assert found.usage.cached_tokens == 0
            reference.append(found.token_ids)
    together = LLM(folder, max_batch=COUNT, prefill_chunk=50, **options)
    ways = {
        "together": tokens(together.generate(prompts, params)),
        "cached": tokens(together.generate(prompts, params)),
    }
    if not together.config.has_state:
        drafted = LLM(folder, max_batch=COUNT, speculate="lookup", **options)
        ways["drafted"] = tokens(drafted.generate(prompts, params))
    need = together.memory.need(together.shards[together.group.rank])
    few = max(together.group.allgather(3.5 * 256 * (need.per_position + need.per_window_position) / 1e9))
    tight = LLM(folder, max_batch=COUNT, kv_memory=few, **options)
    ways["preempted"] = tokens(tight.generate(prompts, params))
    if tight.is_root:
        preemptions = tight.engine.snapshot().preemptions
        print(json.dumps({"reference": reference, "ways": ways, "preemptions": preemptions, "pages": tight.pages}))


if __name__ == "__main__":
    main()
