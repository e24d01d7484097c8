"""What a generation cost: times and bytes a step, speeds, the ranks' waiting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .ranks import RankReport, table_lines


@dataclass(frozen=True)
class StepStats:
    """One step on the root: tokens fed, seconds in all and in synchronisation, bytes sent and received."""

    tokens: int
    seconds: float
    sync_seconds: float
    sent: int
    received: int


@dataclass
class Stats:
    """Figures of one call.

    Attributes:
        prefill, decode: the steps of each phase; a step that feeds any prompt token counts as prefill.
        prompt_tokens, output_tokens: of all sequences.
        first_token_seconds: from the call to the first token.
        ranks: what each rank did, the slowest with a remark.
        full_gathers: rows whose candidates did not cover what the sampler needed.
    """

    prefill: list[StepStats] = field(default_factory=list)
    decode: list[StepStats] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_seconds: float | None = None
    ranks: list[RankReport] = field(default_factory=list)
    full_gathers: int = 0

    @staticmethod
    def _rate(steps: list[StepStats]) -> float | None:
        seconds = sum(s.seconds for s in steps)
        return sum(s.tokens for s in steps) / seconds if seconds > 0 else None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens fed a second."""
        return self._rate(self.prefill)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Generated tokens fed a second, all sequences together."""
        return self._rate(self.decode)

    @property
    def slowest_rank(self) -> int | None:
        """The rank that the others waited for most; None with one rank."""
        return next((report.rank for report in self.ranks if report.remark), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values, units in the keys."""

        def phase(steps: list[StepStats]) -> dict[str, Any]:
            total, sync = sum(s.seconds for s in steps), sum(s.sync_seconds for s in steps)
            return {
                "steps": len(steps),
                "tokens": sum(s.tokens for s in steps),
                "seconds": total,
                "compute_ms": 1e3 * (total - sync),
                "sync_ms": 1e3 * sync,
                "sent_kb": sum(s.sent for s in steps) / 1e3,
                "received_kb": sum(s.received for s in steps) / 1e3,
                "tokens_per_second": self._rate(steps),
            }

        return {
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "time_to_first_token_seconds": self.first_token_seconds,
            "prefill": phase(self.prefill),
            "decode": phase(self.decode),
            "ranks": [report.to_dict() for report in self.ranks],
            "slowest_rank": self.slowest_rank,
            "full_gathers": self.full_gathers,
        }

    def step_lines(self) -> list[str]:
        """Return a line for the prompt and for each decode step, as `--stats` shows them."""
        lines = []
        for name, steps in (("prompt", self.prefill), ("token", self.decode)):
            for s in steps:
                compute = 1e3 * (s.seconds - s.sync_seconds)
                lines.append(
                    f"{name:>6} x{s.tokens:<4} compute {compute:8.2f} ms  sync {1e3 * s.sync_seconds:7.2f} ms"
                    f"  sent {s.sent / 1e3:8.1f} kB  received {s.received / 1e3:8.1f} kB"
                )
        return lines

    def summary_lines(self) -> list[str]:
        """Return the closing lines of `--stats`."""

        def rate(value: float | None) -> str:
            return "-" if value is None else f"{value:.1f} tokens/s"

        lines = [
            f"prompt {self.prompt_tokens} tokens, {rate(self.prefill_tokens_per_second)};"
            f" output {self.output_tokens} tokens, {rate(self.decode_tokens_per_second)}"
        ]
        if self.first_token_seconds is not None:
            lines.append(f"time to first token {self.first_token_seconds:.3f} s")
        return lines + (table_lines(self.ranks) if self.ranks else [])
