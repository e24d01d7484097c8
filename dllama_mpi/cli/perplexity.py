"""Measure a model's perplexity on a text, in sliding windows."""

from __future__ import annotations

import argparse
import json
import math

import numpy as np

from ..errors import RequestError, UsageError
from ..progress import Progress
from .options import add_model_options, load, number, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--file", required=True, metavar="TEXT", help="the text; - for standard input")
    parser.add_argument(
        "--window", type=number(int, 2), metavar="N", help="tokens seen at once (default: the context, at most 2048)"
    )
    parser.add_argument(
        "--stride", type=number(int, 1), metavar="N", help="tokens from one window to the next (default: half a window)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Return (start, stop, first scored token) of windows in which every token but the first is scored once.

    A token of a later window has at least window - stride tokens before it.
    """
    parts, scored = [], 1
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        if stop > scored:
            parts.append((start, stop, scored))
            scored = stop
        if stop == tokens:
            break
    return parts


def run(args: argparse.Namespace) -> int:
    """Print the perplexity on stdout."""
    from ..parallel.group import connect

    group = connect(args.timeout)
    with group.together():
        text = read_text(args.file, "--file") if group.is_root else ""
    llm = load(args, group)
    with group.together():
        window = args.window or min(llm.max_seq_len, 2048)
        stride = args.stride or max(1, window // 2)
        if window > llm.max_seq_len:
            raise UsageError(f"--window {window}: the context holds {llm.max_seq_len}; use at most that")
        if stride >= window:
            raise UsageError(f"--stride {stride}: must be less than the window, {window}")
        tokens = llm.tokenizer.encode(text) if group.is_root else []
        if group.is_root and len(tokens) < 2:
            raise RequestError(f"--file {args.file}: {len(tokens)} tokens; perplexity needs at least 2")
    total, count = 0.0, 0
    with llm.session() as leads:
        if not leads:
            return 0
        parts = windows(len(tokens), window, stride)
        with Progress("perplexity", sum(stop - start - 1 for start, stop, _ in parts), "tokens") as shown:
            for start, stop, first in parts:
                scores = llm.log_probabilities(tokens[start:stop], shown.add)
                assert scores is not None
                new: np.ndarray = scores[first - start - 1 :]
                total, count = total - float(new.sum()), count + len(new)
    result = math.exp(total / count)
    if args.json:
        print(
            json.dumps(
                {
                    "perplexity": result,
                    "tokens": count,
                    "nats_per_token": total / count,
                    "window": window,
                    "stride": stride,
                    "weights": llm.weights,
                    "buffer_float_type": args.buffer_float_type,
                    "ranks": group.size,
                }
            )
        )
    else:
        print(f"perplexity {result:.4f} over {count} tokens (window {window}, stride {stride})")
    return 0
