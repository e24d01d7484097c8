"""How a model is loaded and run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import UsageError
from ..kernels.layout import TileFormat
from ..model.buffers import KV_TYPES
from ..model.config import ModelConfig
from ..model.recipe import WeightRecipe, default_kv_type, described
from ..parallel.collective.table import MPI, PAYLOADS, SYNCS
from ..parallel.watchdog import LEAST_TIMEOUT, LONGEST_TIMEOUT, TIMEOUT, is_timeout
from ..progress import MODES

MAX_STEP_MS = 250.0
SPECULATIONS = ("off", "lookup")


@dataclass(frozen=True)
class Options:
    """How a model is loaded and run; the root's values count on every rank.

    Attributes:
        model: a model directory, "demo" for the one that comes with the package, "random:SHAPE" for random weights of
            a shape in `model.shapes`, or a name, see `startup.finding`.
        weights: a recipe, see `model.recipe`; None: what a converted directory holds, else the default.
        buffer_float_type: what activations are sent as between hosts: "f32", "f16", "q80" or "q40"; None: q80, which
            loses nothing that can be measured. q40: in steps of 32 tokens or more, see `parallel.collective.payload`.
        sync: how all-reduces are done, one of `SYNCS`; "auto": the fastest by measurement.
        nthreads: threads a rank; None: the cores it may use, divided by the ranks that share them.
        max_seq_len: positions of the KV cache; None: the model's, or what fits in memory.
        max_batch: sequences that run at once. max_queue: most that wait, or None for any number.
        prefill_chunk: most prompt tokens a step.
        responsive: whether somebody waits for each token: steps are kept short while prompts are read.
        max_step_ms: milliseconds that a step should take at most then, whatever part of a prompt fits; beside running
            sequences it holds without `responsive`, too. None: 250 if responsive, else no limit.
        kv_memory: GB of the KV cache of each rank; None: what so many sequences can need, or what is free.
        kv_type: "f16", "f32" or "q80"; None: f32 with f32 weights, else f16.
        split: the ranks' shares, such as "3,1,1", or "auto" for shares by measured speed and free memory; None: equal.
        tokenizer: a tokenizer.json or a folder with one; None: the model's.
        speculate: "lookup" drafts tokens from earlier occurrences of the last ones and checks several in a step; the
            text stays what it is. None or "off": one token a step.
        cache_dir: where a host keeps weights it received from rank 0; None: ~/.cache/dllama_mpi/weights,
            "none": nowhere. cache_limit: the most to keep there, GB; None: 20, or half of what the disk has free.
        bind: keep each rank on cores of its own, and each of its threads on one.
        timeout: seconds of silence after which a rank counts as lost and the job ends; 0: only a rank that died does.
        quiet: print nothing on stderr. progress: how the root, unless quiet, shows there how far it is: "bar", "lines",
            "auto" (a bar if stderr ends at a terminal) or "off"; None: what DLLAMA_MPI_PROGRESS says, else auto.
    """

    model: str
    weights: str | None = None
    buffer_float_type: str | None = None
    sync: str = "auto"
    nthreads: int | None = None
    max_seq_len: int | None = None
    max_batch: int = 1
    max_queue: int | None = None
    prefill_chunk: int = 256
    responsive: bool = False
    max_step_ms: float | None = None
    kv_memory: float | None = None
    kv_type: str | None = None
    split: str | None = None
    tokenizer: str | None = None
    speculate: str | None = None
    cache_dir: str | None = None
    cache_limit: float | None = None
    bind: bool = False
    timeout: float = TIMEOUT
    quiet: bool = True
    progress: str | None = None

    @property
    def step_limit(self) -> float:
        """The milliseconds that a step should take at most while prompts are read; infinity for no limit."""
        return self.max_step_ms or (MAX_STEP_MS if self.responsive else math.inf)

    def check(self) -> None:
        """Raise a UsageError that names the first value that cannot be."""
        choices: tuple[tuple[str, Collection[str]], ...] = (
            ("buffer_float_type", PAYLOADS),
            ("kv_type", KV_TYPES),
            ("sync", SYNCS),
            ("speculate", SPECULATIONS),
            ("progress", MODES),
        )
        for name, allowed in choices:
            value = getattr(self, name)
            if value not in allowed and not (value is None and name != "sync"):
                raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if self.weights is not None:
            WeightRecipe.parse(self.weights)
        for name in ("cache_limit", "kv_memory", "max_step_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}; it must be above 0")
        for name in ("nthreads", "max_seq_len", "max_batch", "max_queue", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if not is_timeout(self.timeout):
            limits = f"from {LEAST_TIMEOUT:g} to {LONGEST_TIMEOUT:g} seconds"
            raise UsageError(f"timeout is {self.timeout:g}; it must be {limits}, or 0 for none")

    def check_for(self, config: ModelConfig) -> None:
        """Raise a UsageError if the model cannot be run in this way."""
        if self.speculate == "lookup" and config.has_state:
            raise UsageError(
                f"speculate lookup: {config.model_type} has layers whose state cannot go back behind a draft that was"
                " wrong; leave --speculate off"
            )
        check_payload(self.buffer_float_type, config)


def check_payload(payload: str | None, config: ModelConfig) -> None:
    """Raise a UsageError if activations cannot be sent in 4 bits: what they leave out must be made up for later."""
    if payload == "q40" and not config.has_plain_residual:
        raise UsageError(
            f"buffer_float_type q40: {config.model_type} normalises or scales what each layer adds, so that 4 bits"
            " would cost it several percent of perplexity; use q80"
        )


@dataclass(frozen=True)
class Kept:
    """In which types a model is kept and sent, nothing left open.

    Attributes:
        formats: of every matrix. kv_type: of the KV cache. payload: of all-reduces between hosts.
    """

    formats: Mapping[str, TileFormat]
    kv_type: str
    payload: str

    @classmethod
    def of(
        cls,
        formats: Mapping[str, TileFormat],
        kv_type: str | None = None,
        buffer_float_type: str | None = None,
        sync: str = "auto",
    ) -> Kept:
        """Fill in what the user left open; the arguments are fields of `Options`, formats `ModelFiles.formats`."""
        payload = buffer_float_type or ("f32" if sync == MPI.name else "q80")
        return cls(formats, kv_type or default_kv_type(formats), payload)

    def weights(self, config: ModelConfig) -> str:
        """Return the formats as a recipe, for people."""
        return described(config, self.formats)
