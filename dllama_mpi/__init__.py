"""Large language models on the computers you already have: tensor-parallel inference over MPI.

Importing this package starts no MPI and compiles nothing; building an `LLM` does.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own would take a moment to import, before `__main__` handles Ctrl-C
if TYPE_CHECKING:
    from typing import Any

    from .engine.llm import LLM
    from .engine.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from .engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from .engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
