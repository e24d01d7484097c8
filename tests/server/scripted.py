"""An engine that says what it is told, so that routes can be tried without a model.

A prompt that holds `<<text>>` is answered with that text, then a stop token; any other with the letters of the
alphabet, on and on. `{{N ms}}` in the prompt has each token take that long. An answer ends, with "length", before a
token that its constraint forbids. Marks of reasoning, calls and channels are tokens, as models have them.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers

import dllama_mpi
from dllama_mpi.engine.request import Output, Request, RequestStats, SamplingParams, TokenLogprobs
from dllama_mpi.errors import QueueFull
from dllama_mpi.text.chat_template import ChatTemplate
from dllama_mpi.text.tokenizer import Tokenizer

DEMO = Path(dllama_mpi.__file__).parent / "demo"
CONTEXT = 4096
MOST_WAITING = 64
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SPECIAL_MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
ENDLESS = "abcdefghijklmnopqrstuvwxyz "


@dataclass
class _Task:
    id: int
    request: Request
    script: deque[int]
    is_endless: bool
    seconds: float
    queued: float = field(default_factory=time.perf_counter)
    first: float | None = None
    told: int = 0


class ScriptedEngine:
    """Has the interface of `engine.engine.Engine`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._end = tokenizer, tokenizer.added_tokens["<|return|>"]
        self._lock = threading.Condition()
        self._tasks: dict[int, _Task] = {}
        self._cancelled: set[int] = set()
        self._next = 0
        self.most = 0

    @property
    def is_idle(self) -> bool:
        return not self._tasks

    def wait(self, timeout: float) -> None:
        with self._lock:
            self._lock.wait_for(lambda: bool(self._tasks), timeout)

    def add(self, request: Request) -> int:
        text = self._tokenizer.decode(request.token_ids, skip_special_tokens=False)
        found, slow = re.findall(r"<<(.*?)>>(?!>)", text, re.DOTALL), re.findall(r"\{\{(\d+) ms\}\}", text)
        script = deque(self._tokenizer.encode(found[-1] if found else ENDLESS, add_special_tokens=False))
        with self._lock:
            if len(self._tasks) >= MOST_WAITING:
                raise QueueFull(f"{MOST_WAITING} requests wait already; try again")
            self._next += 1
            seconds = int(slow[-1]) / 1e3 if slow else 0.0
            self._tasks[self._next] = _Task(self._next, request, script, not found, seconds)
            self.most = max(self.most, len(self._tasks))
            self._lock.notify()
            return self._next

    def cancel(self, id: int) -> None:
        with self._lock:
            self._cancelled.add(id)

    def step(self) -> list[Output]:
        with self._lock:
            tasks, cancelled, self._cancelled = list(self._tasks.values()), self._cancelled, set()
        time.sleep(max((task.seconds for task in tasks), default=0.0))
        outputs = [self._cancel(task) if task.id in cancelled else self._advance(task) for task in tasks]
        with self._lock:
            for output in outputs:
                if output.finish_reason is not None:
                    del self._tasks[output.id]
        return outputs

    def _cancel(self, task: _Task) -> Output:
        return Output(task.id, (), None, "abort", None, self._usage(task))

    def _advance(self, task: _Task) -> Output:
        task.first = task.first or time.perf_counter()
        params = task.request.params
        room = CONTEXT - len(task.request.token_ids)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        if not task.is_endless and not self._is_allowed(task):
            return Output(task.id, (), None, "length", None, self._usage(task))
        if not task.script and not task.is_endless:
            return Output(task.id, (), None, "stop", self._end, self._usage(task))
        if limit == 0:
            return Output(task.id, (), None, "length", None, self._usage(task))
        token = task.script.popleft()
        if task.is_endless:
            task.script.append(token)
        task.told += 1
        logprobs = None
        if params.logprobs is not None:
            top = tuple((token + i, -0.5 - i) for i in range(params.logprobs))
            logprobs = (TokenLogprobs(-0.5, top),)
        done = task.told >= limit
        return Output(
            task.id, (token,), logprobs, "length" if done else None, None, self._usage(task) if done else None
        )

    def _is_allowed(self, task: _Task) -> bool:
        constraint = task.request.constraint
        if constraint is None:
            return True
        token, mask = task.script[0] if task.script else self._end, constraint.mask()
        is_allowed = bool(mask[token // 32] >> np.uint32(token % 32) & 1)
        if is_allowed and task.script:
            constraint.accept(token)
        return is_allowed

    def _usage(self, task: _Task) -> RequestStats:
        now = time.perf_counter()
        count = len(task.request.token_ids)
        return RequestStats(count, count // 2, task.told, 0, 0, 0, task.queued, task.first, now)

    def snapshot(self) -> dict[str, int]:
        return {"running": len(self._tasks), "waiting": 0, "most_running": self.most}


def load_tokenizer() -> Tokenizer:
    """Return the demo's tokenizer with marks as tokens."""
    backend, own = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")), Tokenizer.load(DEMO)
    backend.add_tokens(list(MARKS))
    backend.add_special_tokens(list(SPECIAL_MARKS))
    found = Tokenizer(backend, own.special_tokens, None, own.eos_ids, own.folders)
    found.stop_ids -= {found.added_tokens["<|end|>"]}  # of a message in a channel, not of a turn as in the demo
    return found


def main() -> None:
    """Serve scripted answers on a free port, which is printed, until a signal; argv: style of tools, then API keys."""
    from dllama_mpi.server.gate import GateOptions, known_hosts
    from dllama_mpi.server.grammar import Grammars
    from dllama_mpi.server.run import HttpServer, ServeOptions
    from dllama_mpi.server.served import Served

    style, *keys = sys.argv[1:]
    tokenizer = load_tokenizer()
    gate = GateOptions(keys=tuple(keys), hosts=known_hosts((), "here"), body_bytes=1_000_000, body_seconds=2)
    server = HttpServer(ServeOptions(port=0, gate=gate, header_timeout=2, send_timeout=4, drain_timeout=5))
    server.start()
    served = Served(
        ("demo", "other"),
        tokenizer,
        ChatTemplate.load(tokenizer),
        tokenizer.vocab_size,
        CONTEXT,
        SamplingParams(),
        tool_style=style,
        thinks=True,
        grammars=Grammars(tokenizer, tokenizer.vocab_size),
    )
    print(server.port, flush=True)
    server.serve(ScriptedEngine(tokenizer), served)
    server.close()


if __name__ == "__main__":
    main()
