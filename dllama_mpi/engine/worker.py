"""What ranks above 0 do during a call: wait for a command, carry it out, repeat."""

from __future__ import annotations

import pickle

import numpy as np

from ..parallel.group import TensorParallelGroup
from ..parallel.star import measure_star
from .runner import Runner
from .step import Command, Step


def serve(runner: Runner, group: TensorParallelGroup) -> None:
    """Carry out the root's commands until it says that the call is over.

    Raises:
        DllamaError: the root found the call's arguments wrong.
    """
    while True:
        kind, payload = group.next_command()
        if kind == Command.STEP:
            runner.step(Step.from_bytes(payload))
        elif kind == Command.FULL_LOGITS:
            runner.full_logits(int(np.frombuffer(payload, np.int32)[0]))
        elif kind == Command.TIMES:
            group.allgather(runner.watch.report())
            if payload[0]:
                measure_star(group.comm, group.hosts)
        elif kind == Command.FAILED:
            error = pickle.loads(payload)
            error.agreed = True
            raise error
        elif kind == Command.DONE:
            return
        else:
            raise RuntimeError(f"unknown command {kind}")
