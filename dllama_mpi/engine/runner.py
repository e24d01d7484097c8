"""One rank's part of a step: feed the batch, prepare what is wanted of the logits, send it to the root."""

from __future__ import annotations

import time

import numpy as np

from ..kernels.sampling import log_sum_exp
from ..model.buffers import HEAD_ROWS
from ..model.recipe import share_of
from ..model.tensors import vocab_axis
from ..model.transformer import Transformer
from ..parallel.connection import Phase
from ..parallel.group import TensorParallelGroup
from .candidates import local_best, penalise
from .energy import host_meter
from .rank_report import Stopwatch
from .step import Step, Want

FORBIDDEN = np.float32(-1e30)  # a logit whose probability is 0, and with which sums can be made
_NO_PENALTY = {"repeat": 1, "presence": 0, "frequency": 0}


class Runner:
    """Carries out steps on one rank. Methods are collective.

    Attributes:
        pooled: on the root, the final hidden states (n, hidden) float32 that the last step's last rows want.
    """

    def __init__(self, model: Transformer, group: TensorParallelGroup) -> None:
        self.model, self.group = model, group
        shard, c = model.rank.shard, model.config
        self.first_id = shard.elements(vocab_axis(c))[0]
        self._logits = np.zeros((0, 0), np.float32)
        self.pooled = np.zeros((0, 0), np.float32)
        self.watch = Stopwatch(share_of(c, shard), host_meter() if group.rank == group.local_ranks[0] else None)

    def step(self, step: Step) -> list[np.ndarray] | None:
        """Carry out a step; return all ranks' answers on the root, None elsewhere.

        An answer is, by `step.want`: candidates, see `local_best`; logits (rows, the rank's ids) float32; or scores
        (rows, 2) float64, the log-sum-exp and the target's logit (-inf where another rank holds it).
        """
        self.watch.start()
        waited, chosen = self.group.traffic.seconds, step.ends[0]
        is_decode = step.want is Want.CANDIDATES and step.batch.tokens <= chosen
        answers = self._carry_out(step, is_decode)
        self.watch.stop(self.group.traffic.seconds - waited, is_decode)
        return answers

    def _carry_out(self, step: Step, is_decode: bool) -> list[np.ndarray] | None:
        batch = step.batch
        chosen, scored = step.ends
        self.group.watchdog.tell(Phase.DECODE if is_decode else Phase.PREFILL)
        hidden = self.model.forward(batch)
        if not len(hidden):
            return []
        if step.want is not Want.CANDIDATES:
            return self._in_pieces(hidden, step)
        if self.group.is_root:
            self.pooled = self.model.normalised(hidden[scored:])
        if not scored:
            return []
        return self._gather(self._candidates(hidden, step, chosen, scored))

    def _candidates(self, hidden: np.ndarray, step: Step, chosen: int, scored: int) -> np.ndarray:
        """Return this rank's part of the candidates of all rows that want some, see `local_best`."""
        rows, k = step.rows, int(step.rows["k"].max())
        self._logits = self._prepared(hidden[:chosen], step)
        parts = [local_best(self._logits, rows[:chosen], self.first_id, k)]
        for i in range(chosen, scored, HEAD_ROWS):
            piece = slice(i, min(i + HEAD_ROWS, scored))
            parts.append(local_best(self.model.logits(hidden[piece]), rows[piece], self.first_id, k))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _gather(self, x: np.ndarray) -> list[np.ndarray] | None:
        started = time.perf_counter()
        gathered = self.group.gather(x)
        self.watch.gathered(time.perf_counter() - started)
        return gathered

    def full_logits(self, row: int) -> list[np.ndarray] | None:
        """Return all ranks' logits, penalties applied, of one of the last step's rows on the root; None elsewhere."""
        return self.group.gather(self._logits[row])

    def _prepared(self, hidden: np.ndarray, step: Step) -> np.ndarray:
        if not len(hidden):
            return np.zeros((0, 0), np.float32)
        parts = [self.model.logits(hidden[i : i + HEAD_ROWS]) for i in range(0, len(hidden), HEAD_ROWS)]
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        batch = step.batch
        for row, at, own in zip(step.rows, batch.logit_rows, logits, strict=False):
            if any(row[name] != none for name, none in _NO_PENALTY.items()):
                # Every rank sees every token, so that penalties need no history sent.
                penalise(own, row, self.model.history(batch, int(at)), self.first_id)
        for bias in step.biases:
            token = int(bias["token"]) - self.first_id
            if 0 <= token < logits.shape[1]:
                logits[bias["row"], token] += bias["value"]
        for at, mask in zip(step.masked, step.masks, strict=True):
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
            own = allowed[self.first_id : self.first_id + logits.shape[1]]
            logits[at, : own.size][own == 0] = FORBIDDEN
            logits[at, own.size :] = FORBIDDEN
        return logits

    def _in_pieces(self, hidden: np.ndarray, step: Step) -> list[np.ndarray] | None:
        """Gather a few rows at a time: nobody holds more logits than those."""
        gathered = []
        for i in range(0, len(hidden), HEAD_ROWS):
            logits = self.model.logits(hidden[i : i + HEAD_ROWS])
            if step.want is Want.SCORES:
                logits = self._scores(logits, step.rows["target"][i : i + HEAD_ROWS])
            gathered.append(self._gather(logits))
        if not self.group.is_root:
            return None
        return [np.concatenate([piece[rank] for piece in gathered if piece]) for rank in range(self.group.size)]

    def _scores(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        scores = np.full((len(logits), 2), -np.inf)
        for out, own, target in zip(scores, logits, targets - self.first_id, strict=True):
            out[0] = log_sum_exp(own, 1.0)
            if 0 <= target < own.size:
                out[1] = own[target]
        return scores
