"""Generate from Python on any number of ranks: mpiexec -n 2 python examples/generate.py [MODEL_DIR]

Every rank runs this script and makes the same calls; rank 0 gets the results, the others None.
"""

import sys

from dllama_mpi import LLM, SamplingParams


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "demo", weights="q80", max_batch=2)

    # Text as it comes: every rank iterates, rank 0 gets the pieces.
    for piece in llm.stream("This module provides", SamplingParams(temperature=0.7, seed=1, max_tokens=40)):
        print(piece, end="", flush=True)
    if llm.is_root:
        print("\n---")

    # Several prompts at once.
    results = llm.generate(["Return the", "Raise an"], SamplingParams(temperature=0, max_tokens=16))
    for result in results or []:
        print(repr(result.text), result.finish_reason)

    # Logits of every position, (n, vocab) float32 on rank 0.
    logits = llm.logits([1, 2, 3])
    if logits is not None:
        print("---\nlogits", logits.shape)


if __name__ == "__main__":
    main()
