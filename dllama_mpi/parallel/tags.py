"""The tags of all point-to-point messages, so that no two kinds can be taken for each other."""

from __future__ import annotations

from enum import IntEnum


class Tag(IntEnum):
    """What a message carries. `EXCHANGE` travels on a communicator of its own, all others on the job's."""

    EXCHANGE = 70  # payloads of an all-reduce: collective/messages.py
    PIECE = 71  # bytes of weights, from the root to a worker: stream.py
    STOP = 72  # a worker's wish to get no more of them: stream.py
    LINK = 73  # ping-pong between two hosts: network.py
    STAR = 74  # ping-pong between the root and one rank: star.py
