"""How much of prompts is read in a step, so that what runs beside does not stall."""

from __future__ import annotations

import math

LEAST = 8  # prompt tokens in a step: reading always goes on
_FIRST = 32  # beside running sequences, before any step has been timed
_NEW = 0.3  # weight of the newest step
_MARGIN = 0.9  # part of the time that is planned for
_OUTLIER = 4.0  # times what was expected: more than that something else is to blame for


class Budget:
    """Prompt tokens a step: all that fit, or what takes no longer than a step may.

    A step's time is that of a step without prompts, and an equal part for each prompt token; both are measured.
    """

    def __init__(self, most: int, seconds: float, always: bool = False) -> None:
        """Limit steps to `most` tokens and to `seconds`: those with running sequences, or all of them."""
        self.most, self.seconds, self.always = most, seconds, always
        self._base = 0.0  # seconds of a step without prompt tokens
        self._each: float | None = None  # seconds of a prompt token

    def tokens(self, running: int) -> int:
        """Return how many prompt tokens the next step may hold, beside so many sequences that generate."""
        if self.seconds == math.inf or not (running or self.always):
            return self.most
        if self._each is None:
            return min(self.most, _FIRST)
        room = _MARGIN * self.seconds - (self._base if running else 0.0)
        return min(self.most, max(LEAST, int(room / self._each) // LEAST * LEAST))

    def observe(self, prompt: int, running: int, seconds: float) -> None:
        """Take the time of a step with so many prompt tokens and sequences that generate."""
        if not prompt:
            self._base = self._mixed(self._base or None, seconds)
        elif prompt >= LEAST:
            base = self._base if running else 0.0
            self._each = self._mixed(self._each, max(0.1 * seconds, seconds - base) / prompt)

    @staticmethod
    def _mixed(old: float | None, new: float) -> float:
        return new if old is None else old + _NEW * (min(new, _OUTLIER * old) - old)
