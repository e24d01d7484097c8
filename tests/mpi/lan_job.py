"""Run by mpiexec: generate with the demo model; rank 0 prints a JSON object with the text and what each rank sent.

usage: lan_job.py [OPTION=VALUE...], options of `LLM`
"""

from __future__ import annotations

import json
import sys
from typing import Any

from dllama_mpi import LLM, SamplingParams


def main() -> None:
    options: dict[str, Any] = dict(argument.split("=", 1) for argument in sys.argv[1:])
    llm = LLM("demo", nthreads=1, max_seq_len=256, **options)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate("This module provides", params)
    llm.group.reset_traffic()
    sent = {}
    for tokens in (8, 40):  # what 32 more decode steps cost
        result = llm.generate("This module provides", SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        sent[tokens] = llm.group.allgather(llm.group.traffic.sent)
        llm.group.reset_traffic()
    if result is not None:
        print(
            json.dumps(
                {
                    "text": result.text,
                    "hosts": llm.group.hosts,
                    "algorithms": [choice.algorithm for choice in llm.group.choices],
                    "layers": llm.config.num_layers,
                    "hidden": llm.config.hidden_size,
                    "sent_per_token": [(b - a) / 32 for a, b in zip(sent[8], sent[40], strict=True)],
                }
            )
        )


if __name__ == "__main__":
    main()
