"""Measures llama.cpp when told to: one JSON object a line on standard input, one answer a line on standard output.

Runs under any Python with llama-cpp-python and numpy; started by compare_llama_cpp.py. All requests go to llama.cpp's
own interface: no tokenizer, no text, greedy choice.

{"op": "run", "prompt": P, "generated": N, "depth": D, "batch": B, "threads": T} -> {"seconds": ...}
{"op": "logits", "tokens": [...], "threads": T} -> {"logits": [...]}, those after the last token
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from typing import Any

import numpy as np

try:
    import llama_cpp as ll
except ImportError:  # --help needs none
    ll = None

POSITIONS = 640  # room for prompt and generation beyond the depth
CHUNK = 512  # tokens a call of llama_decode: llama.cpp's default


class Session:
    """A llama.cpp context with its KV cache filled to a depth."""

    def __init__(self, model: Any, depth: int, batch: int, seed: int) -> None:
        """Make the context and feed `depth` random tokens to each of `batch` sequences."""
        self.model, self.depth, self.batch = model, depth, batch
        params = ll.llama_context_default_params()
        params.n_ctx = batch * -(-(depth + POSITIONS) // 256) * 256
        params.n_batch, params.n_ubatch, params.n_seq_max = CHUNK, CHUNK, batch
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        params.no_perf = True
        self.context = ll.llama_init_from_model(model, params)
        if not self.context:
            sys.exit("llama.cpp made no context")
        self.memory = ll.llama_get_memory(self.context)
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
        self.slots = ll.llama_batch_init(CHUNK, 0, 1)
        self.rng = np.random.default_rng(seed)
        self._feed([self.rng.integers(self.vocabulary, size=depth).tolist() for _ in range(batch)], 0)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Feed (token, position, sequence, whether its logits are wanted)."""
        slots = self.slots
        slots.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            slots.token[i], slots.pos[i], slots.n_seq_id[i] = token, position, 1
            slots.seq_id[i][0], slots.logits[i] = sequence, wanted
        status = ll.llama_decode(self.context, slots)
        if status != 0:
            sys.exit(f"llama_decode failed with {status}")

    def _feed(self, prompts: list[list[int]], start: int) -> list[int]:
        """Feed a prompt to each sequence from position `start` on; return the best next tokens."""
        best = []
        for sequence, tokens in enumerate(prompts):
            for first in range(0, len(tokens), CHUNK):
                part = tokens[first : first + CHUNK]
                rows = [
                    (token, start + first + i, sequence, first + i == len(tokens) - 1) for i, token in enumerate(part)
                ]
                self._decode(rows)
            best.append(self._best(len(rows) - 1) if tokens else 0)
        return best

    def _row(self, index: int) -> np.ndarray:
        pointer = ll.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))

    def _best(self, index: int) -> int:
        return int(self._row(index).argmax())

    def run(self, prompt: int, generated: int, threads: int) -> float:
        """Return the seconds that a prompt and greedy generation take at the depth, and restore the cache."""
        ll.llama_set_n_threads(self.context, threads, threads)
        prompts = [self.rng.integers(self.vocabulary, size=prompt).tolist() for _ in range(self.batch)]
        tokens = self.rng.integers(self.vocabulary, size=self.batch).tolist()
        started = time.perf_counter()
        if prompt:
            tokens = self._feed(prompts, self.depth)
        for step in range(generated):
            at = self.depth + prompt + step
            self._decode([(token, at, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [self._best(i) for i in range(self.batch)]
        seconds = time.perf_counter() - started
        for sequence in range(self.batch):
            ll.llama_memory_seq_rm(self.memory, sequence, self.depth, -1)
        return seconds

    def logits(self, tokens: list[int], threads: int) -> np.ndarray:
        """Return the logits (vocabulary,) after the last of some tokens, fed from the depth on."""
        ll.llama_set_n_threads(self.context, threads, threads)
        self._feed([tokens], self.depth)
        found = self._row((len(tokens) - 1) % CHUNK).copy()
        ll.llama_memory_seq_rm(self.memory, 0, self.depth, -1)
        return found


def main() -> None:
    """Load the GGUF file given as the argument and answer requests until the input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="GGUF", help="the model file")
    path = parser.parse_args().model
    if ll is None:
        sys.exit("error: llama_cpp cannot be imported; pip install llama-cpp-python")
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, None)
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    print(json.dumps({"version": ll.__version__, "features": features()}), flush=True)
    sessions: dict[tuple[int, int], Session] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = (request.get("depth", 0), request.get("batch", 1))
        if key not in sessions:
            sessions[key] = Session(model, *key, seed=len(sessions))
        session, answer = sessions[key], {}
        if request["op"] == "run":
            answer["seconds"] = session.run(request["prompt"], request["generated"], request["threads"])
        else:
            answer["logits"] = session.logits(request["tokens"], request["threads"]).tolist()
        print(json.dumps(answer), flush=True)


def features() -> str:
    """Return what llama.cpp was built for, such as "CPU : AVX2 = 1 | AVX512 = 1"."""
    return str(ll.llama_print_system_info().decode())


if __name__ == "__main__":
    main()
