"""Show a model's shapes, parameters and the memory a rank needs; under mpiexec also how its ranks would exchange."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import WEIGHTS, number, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--model", metavar="DIR", default="demo", help="model directory (default: the bundled demo)")
    parser.add_argument("--weights", choices=WEIGHTS, help="(default: what a converted directory holds, else q40)")
    parser.add_argument("--max-seq-len", type=number(int, 1), metavar="N", help="positions (default: the model's)")
    parser.add_argument("--kv-type", choices=("f16", "f32", "q80"), help="(default: f16; f32 with f32 weights)")
    parser.add_argument("--ranks", type=number(int, 1), metavar="N", help="show 1 to N ranks (default: up to 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the description on stdout; under a launcher only rank 0 does."""
    from ..kernels import runtime
    from ..kernels.layout import FORMATS
    from ..model.config import ModelConfig
    from ..model.names import check_files
    from ..parallel.launch import is_root_process, ranks_launched
    from ..startup.opening import model_folder
    from ..weights.checkpoint import Checkpoint

    folder = model_folder(args.model)
    config = ModelConfig.load(folder)
    source = Checkpoint(folder)
    check_files(source, config)
    sync = _measured(config) if ranks_launched() > 1 else []
    if not is_root_process():
        return 0
    fmt = FORMATS[args.weights or source.format_name or "q40"]
    kv_type = args.kv_type or ("f32" if fmt.name == "f32" else "f16")
    positions = args.max_seq_len or config.max_position_embeddings
    report: dict[str, Any] = {
        "model": args.model,
        "model_type": config.model_type,
        "parameters": config.parameters,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope": config.rope.kind,
        "tied_embeddings": config.tie_word_embeddings,
        "stored_as": source.format_name or "safetensors",
        "weights": fmt.name,
        "kv_type": kv_type,
        "max_seq_len": positions,
        "instruction_set": runtime.ISA,
        "processor": runtime.describe(),
        "max_ranks": config.num_heads,
    }
    counts = range(1, min(args.ranks or 8, config.num_heads) + 1)
    report["memory"] = [_memory(config, fmt, kv_type, positions, n) for n in counts]
    report["sync"] = [choice.to_dict() for choice in sync]
    print(json.dumps(report) if args.json else "\n".join([_text(report), *_sync_lines(sync)]))
    return 0


def _measured(config: Any) -> list[Any]:
    """Return how this job's ranks would do all-reduces of the model's activations. Collective."""
    from ..kernels.layout import BLOCK, ceil_to
    from ..parallel.group import connect

    group = connect()
    group.prepare_all_reduce(64, ceil_to(config.hidden_size, BLOCK), None, "auto")
    return group.choices


def _sync_lines(sync: list[Any]) -> list[str]:
    return ["", *(choice.describe() for choice in sync)] if sync else []


def _memory(config: Any, fmt: Any, kv_type: str, positions: int, ranks: int) -> dict[str, Any]:
    """Return the largest rank's need at a rank count, bytes."""
    from ..model.size import buffer_bytes, cache_bytes, weight_bytes
    from ..parallel.partition import shards

    sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
    parts = shards(*sizes, [1.0] * ranks)
    weights = [weight_bytes(config, part, fmt) for part in parts]
    caches = [cache_bytes(config, part, kv_type) * positions for part in parts]
    buffers = [buffer_bytes(config, part, 257, ranks) for part in parts]
    totals = [sum(each) for each in zip(weights, caches, buffers, strict=True)]
    worst = totals.index(max(totals))
    return {
        "ranks": ranks,
        "weights_bytes": weights[worst],
        "kv_cache_bytes": caches[worst],
        "buffers_bytes": buffers[worst],
        "total_bytes": totals[worst],
    }


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"{key.replace('_', ' '):<24} {value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{key.replace('_', ' '):<24} {value}"
        for key, value in report.items()
        if key not in ("memory", "sync")
    ]
    names = ("weights_bytes", "kv_cache_bytes", "buffers_bytes", "total_bytes")
    rows = [[str(m["ranks"]), *(f"{m[name] / 1e6:,.1f}" for name in names)] for m in report["memory"]]
    head = ["ranks", "weights MB", "KV cache MB", "buffers MB", "total MB"]
    return "\n".join([*lines, "", "memory of the largest rank:", table(head, rows)])
