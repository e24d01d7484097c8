"""What a generation cost: times and bytes a step, speeds, the ranks' waiting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..parallel.collective.choose import Choice
from .rank_report import RankReport, table_lines


@dataclass(frozen=True)
class StepStats:
    """One step on the root.

    Attributes:
        tokens: fed, rejected drafts left out. sync_seconds: the part of the seconds that went into synchronisation.
        sent, received: bytes. drafted: tokens fed on the chance that they come; accepted: those that did.
        prompt: prompt tokens among the tokens. full_gathers: see `Stats`.
    """

    tokens: int
    seconds: float
    sync_seconds: float
    sent: int
    received: int
    drafted: int = 0
    accepted: int = 0
    prompt: int = 0
    full_gathers: int = 0


@dataclass(frozen=True)
class SequenceStats:
    """One request in the engine: tokens of its prompt, those that are computed, those generated; whether it runs."""

    id: int
    slot: int
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    is_running: bool


@dataclass(frozen=True)
class EngineStats:
    """The engine after a step.

    Attributes:
        running, waiting: requests. pages_total, pages_used: of the KV cache; pages_cached: not used, but remembered.
        window_pages_total, window_pages_used, window_pages_cached: the same of layers with a window, where these have
            pages of their own.
        prompt_tokens, cached_tokens, output_tokens: of all requests so far; of the prompts' tokens the cached ones need
            not be computed. preemptions: how many times a request gave up its memory to others.
        sequences: the requests.
    """

    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    window_pages_total: int = 0
    window_pages_used: int = 0
    window_pages_cached: int = 0
    sequences: tuple[SequenceStats, ...] = ()


@dataclass
class Stats:
    """Figures of one call.

    Attributes:
        prefill, decode: the steps of each phase; a step that feeds any prompt token counts as prefill.
        prompt_tokens, output_tokens: of all sequences.
        first_token_seconds: from the call to the first token.
        ranks: what each rank did, the slowest with a remark.
        full_gathers: rows whose candidates did not cover what the sampler needed.
        payload, sync: what all-reduces send between hosts, and how they are done, by size.
        speculates: whether tokens were drafted where that seemed to pay.
    """

    prefill: list[StepStats] = field(default_factory=list)
    decode: list[StepStats] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_seconds: float | None = None
    ranks: list[RankReport] = field(default_factory=list)
    full_gathers: int = 0
    payload: str = "f32"
    sync: list[Choice] = field(default_factory=list)
    speculates: bool = False

    def take(self, step: StepStats) -> None:
        """Count a step."""
        (self.prefill if step.prompt else self.decode).append(step)
        self.full_gathers += step.full_gathers

    def _joules(self, phase: str) -> float | None:
        each = [getattr(report.times, f"{phase}_joules") for report in self.ranks]
        told = [joules for joules in each if joules is not None]
        return sum(told) if told else None

    @property
    def prefill_joules(self) -> float | None:
        """Energy of the hosts that can tell theirs, in steps that feed prompt tokens; None if none can."""
        return self._joules("prefill")

    @property
    def decode_joules(self) -> float | None:
        """Energy of the hosts that can tell theirs, in all other steps; None if none can."""
        return self._joules("decode")

    @property
    def metered_hosts(self) -> int:
        """How many hosts can tell their energy."""
        return sum(report.times.decode_joules is not None for report in self.ranks)

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

    def speculation(self) -> dict[str, Any]:
        """Return what drafts came to; rates are None where nothing was drafted or decoded."""
        steps = [*self.prefill, *self.decode]
        drafted, accepted = (sum(getattr(s, name) for s in steps) for name in ("drafted", "accepted"))
        return {
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_rate": accepted / drafted if drafted else None,
            "tokens_per_decode_step": sum(s.tokens for s in self.decode) / len(self.decode) if self.decode else None,
        }

    @property
    def slowest_rank(self) -> int | None:
        """The rank that the others waited for most; None with one rank."""
        return next((report.rank for report in self.ranks if report.remark), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values, units in the keys."""

        def phase(steps: list[StepStats], joules: float | None) -> dict[str, Any]:
            total, sync = sum(s.seconds for s in steps), sum(s.sync_seconds for s in steps)
            tokens = sum(s.tokens for s in steps)
            return {
                "steps": len(steps),
                "tokens": tokens,
                "seconds": total,
                "compute_ms": 1e3 * (total - sync),
                "sync_ms": 1e3 * sync,
                "sent_kb": sum(s.sent for s in steps) / 1e3,
                "received_kb": sum(s.received for s in steps) / 1e3,
                "tokens_per_second": self._rate(steps),
                "joules": joules,
                "joules_per_token": each_token(joules, tokens),
            }

        return {
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "time_to_first_token_seconds": self.first_token_seconds,
            "prefill": phase(self.prefill, self.prefill_joules),
            "decode": phase(self.decode, self.decode_joules),
            "metered_hosts": self.metered_hosts,
            "ranks": [report.to_dict() for report in self.ranks],
            "slowest_rank": self.slowest_rank,
            "full_gathers": self.full_gathers,
            "buffer_float_type": self.payload,
            "sync": [choice.to_dict() for choice in self.sync],
            **({"speculation": self.speculation()} if self.speculates else {}),
        }

    def step_lines(self) -> list[str]:
        """Return a line for the prompt and for each decode step, as `--stats=steps` shows them."""
        lines = []
        for name, steps in (("prompt", self.prefill), ("token", self.decode)):
            for s in steps:
                compute = 1e3 * (s.seconds - s.sync_seconds)
                drafts = f"  drafted {s.drafted:2}, accepted {s.accepted:2}" if self.speculates else ""
                lines.append(
                    f"{name:>6} x{s.tokens:<4} compute {compute:8.2f} ms  sync {1e3 * s.sync_seconds:7.2f} ms"
                    f"  sent {s.sent / 1e3:8.1f} kB  received {s.received / 1e3:8.1f} kB{drafts}"
                )
        return lines

    def speed_line(self) -> str:
        """Return what a call came to, in a line."""
        rate = self.decode_tokens_per_second
        first = self.first_token_seconds
        return f"{self.output_tokens} tokens" + "".join(
            [
                "" if rate is None else f", {rate:.1f} tokens/s",
                "" if first is None else f"; the first after {first:.2f} s",
            ]
        )

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
        lines += self._energy_lines()
        lines += [choice.describe() for choice in self.sync]
        if self.speculates:
            s = self.speculation()
            rate, each = s["acceptance_rate"], s["tokens_per_decode_step"]
            share = "" if rate is None else f" ({rate:.0%})"
            lines.append(
                f"drafted {s['drafted']} tokens, accepted {s['accepted']}{share}"
                + ("" if each is None else f"; {each:.2f} tokens a decode step")
            )
        return lines + (table_lines(self.ranks) if self.ranks else [])

    def _energy_lines(self) -> list[str]:
        """Return a line on the energy, if any host can tell."""

        def told(joules: float | None, steps: list[StepStats]) -> str:
            each = each_token(joules, sum(s.tokens for s in steps))
            return "-" if joules is None or each is None else f"{joules:.1f} J, {each:.3g} J a token"

        hosts = len({report.host for report in self.ranks})
        if not self.metered_hosts:
            return []
        of = "" if self.metered_hosts == hosts else f" ({self.metered_hosts} of {hosts} hosts can tell)"
        return [
            f"energy: prompt {told(self.prefill_joules, self.prefill)};"
            f" output {told(self.decode_joules, self.decode)}{of}"
        ]


def each_token(joules: float | None, tokens: int) -> float | None:
    """Return a token's part of some energy; None if it is not known or there are no tokens."""
    return None if joules is None or not tokens else joules / tokens
