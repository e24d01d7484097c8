"""Making steps for a call, and showing how much of its prompts has been read."""

from __future__ import annotations

from collections.abc import Iterator

from ..progress import Progress
from .engine import Engine
from .request import Output


def steps(engine: Engine, prompts: int, show: bool) -> Iterator[list[Output]]:
    """Make steps until nothing runs or waits; yield what each gave. show: tell how far the prompts are read."""
    what = "reading the prompt" if prompts == 1 else f"reading {prompts} prompts"
    with Progress(what, unit="tokens", show=show) as shown:
        while show and not engine.is_idle:
            outputs = engine.step()
            sequences = engine.snapshot().sequences
            unread = sum(max(0, s.prompt_tokens - s.computed_tokens) for s in sequences)
            shown.total = shown.total or sum(s.prompt_tokens for s in sequences)
            shown.done = shown.total - unread
            if not unread:
                shown.end()  # before the text that may come now
                show = False
            yield outputs
    while not engine.is_idle:
        yield engine.step()
