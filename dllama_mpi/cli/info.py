"""Show a model's shapes, parameters and the memory a rank needs; under mpiexec also how its ranks would exchange.

With --architectures: which models can be run.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from .info_file import file_lines, file_report
from .options import add_kv_type_option, add_random_option, add_weights_option, model_of, number, table

if TYPE_CHECKING:
    from ..model.config import ExpertsConfig, LayerConfig, Mixer, MLPConfig, ModelConfig
    from ..startup.opening import ModelFiles
    from ..startup.options import Kept

_TOKENS = 257  # in a step, as memory is told: a chunk of a prompt by default, and a token of another sequence
_MOST_RANKS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    where = "model directory, .gguf or .m file, or name (default: the bundled demo)"
    parser.add_argument("file", metavar="FILE", nargs="?", help="the same as --model FILE")
    parser.add_argument("--model", metavar="MODEL", default="demo", help=where)
    parser.add_argument("--tokenizer", metavar="PATH", help="the .t file of a .m file (default: the one beside it)")
    add_random_option(parser)
    add_weights_option(parser)
    parser.add_argument("--max-seq-len", type=number(int, 1), metavar="N", help="positions (default: the model's)")
    add_kv_type_option(parser)
    parser.add_argument("--ranks", type=number(int, 1), metavar="N", help=f"show 1 to N ranks (default: {_MOST_RANKS})")
    parser.add_argument("--architectures", action="store_true", help="list the architectures that can be run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the description on stdout; under a launcher only rank 0 does."""
    from ..parallel.group import connect
    from ..parallel.launch import is_root_process, ranks_launched
    from ..startup.finding import find_alone, find_model, is_named
    from ..startup.opening import open_model
    from ..startup.options import Kept

    if args.architectures:
        if is_root_process():
            print(_architectures(args.json), flush=True)
        return 0
    if args.file is not None:
        args.model = args.file
    model = model_of(args)
    is_shared = ranks_launched() > 1 and is_named(model)
    folder = find_model(model, connect()) if is_shared else find_alone(model)
    files = open_model(str(folder))
    kept = Kept.of(files.formats(args.weights), args.kv_type)
    sync = _measured(files.config) if ranks_launched() > 1 else []
    if not is_root_process():
        return 0
    own = None if files.file is None else file_report(files.file, args.tokenizer)
    named = {} if files.file is None else {files.file.kind.lower().replace(" ", "_"): own}
    report = {**_about(files, kept, args), **named, "sync": [choice.to_dict() for choice in sync]}
    more = [] if own is None else ["", *file_lines(own)]
    print(json.dumps(report) if args.json else "\n".join([_text(report), *more, *_sync_lines(sync)]))
    return 0


def _architectures(as_json: bool) -> str:
    """Return a table of all architectures, or their list as JSON."""
    from ..architectures.registry import ARCHITECTURES

    found = [{"model_type": name, "about": each.about} for name, each in sorted(ARCHITECTURES.items())]
    if as_json:
        return json.dumps({"architectures": found})
    return _left_table(["model_type", "models"], [[each["model_type"], each["about"]] for each in found])


def _measured(config: ModelConfig) -> list[Any]:
    """Return how this job's ranks would do all-reduces of the model's activations. Collective."""
    from ..kernels.layout import BLOCK, ceil_to
    from ..parallel.group import connect

    group = connect()
    group.prepare_all_reduce(64, ceil_to(config.hidden_size, BLOCK), None, "auto")
    return group.choices


def _sync_lines(sync: list[Any]) -> list[str]:
    return ["", *(choice.describe() for choice in sync)] if sync else []


# ---- what is reported


def _about(files: ModelFiles, kept: Kept, args: argparse.Namespace) -> dict[str, Any]:
    """Return all of the report that needs no other rank, JSON-ready."""
    from ..kernels import runtime
    from ..model.recipe import active_parameters, bits_per_weight, bytes_per_token, parameters
    from ..startup.shares import most_ranks, shards_of

    c, most = files.config, most_ranks(files.config)
    positions = args.max_seq_len or c.max_position_embeddings
    (whole,) = shards_of(c, [1.0])
    return {
        "model": model_of(args),
        "model_type": c.model_type,
        "parameters": parameters(c),
        "active_parameters": active_parameters(c),
        "layers": c.num_layers,
        "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "tied_embeddings": c.tie_word_embeddings,
        "stored_as": _stored(files),
        "weights": kept.weights(c),
        "bits_per_weight": bits_per_weight(c, kept.formats),
        "bytes_per_token": bytes_per_token(c, whole, kept.formats),
        "kv_type": kept.kv_type,
        "max_seq_len": positions,
        "instruction_set": runtime.ISA,
        "processor": runtime.describe(),
        "max_ranks": most,
        "layer_kinds": _kinds(c),
        "formats": _formats(c, kept),
        "memory": [_memory(c, kept, positions, n) for n in range(1, min(args.ranks or _MOST_RANKS, most) + 1)],
    }


def _stored(files: ModelFiles) -> str:
    """Return what the files hold, for people."""
    from ..model.recipe import described

    if files.source is None:
        return f"slices of {described(files.config, files.formats(None))}"
    if str(files.folder).startswith("random:"):
        return "nothing: random weights"
    held = files.source.formats
    if files.quantised:
        return files.quantised
    if set(files.formats(None)) <= set(held):
        return described(files.config, files.formats(None))
    return ", ".join(["safetensors", *sorted({fmt.name for fmt in held.values()})])


def _kinds(config: ModelConfig) -> list[dict[str, Any]]:
    """Return each kind of layers: how many there are, and what they are made of."""
    return [{"layers": count, **_layer(layer)} for layer, count in Counter(config.layers).items()]


def _layer(layer: LayerConfig) -> dict[str, Any]:
    return {"mixer": _mixer(layer.mixer), "feed_forward": _feed(layer.feed)}


def _mixer(mixer: Mixer) -> dict[str, Any]:
    from ..model.config import AttentionConfig, DeltaNetConfig

    if isinstance(mixer, AttentionConfig):
        return {
            "kind": "attention",
            "attention_heads": mixer.num_heads,
            "kv_heads": mixer.num_kv_heads,
            "head_dim": mixer.head_dim,
            "window": mixer.window or None,
            "rope": mixer.rope.kind,
        }
    if isinstance(mixer, DeltaNetConfig):
        return {
            "kind": "gated delta net",
            "key_heads": mixer.num_key_heads,
            "value_heads": mixer.num_value_heads,
            "key_dim": mixer.key_dim,
            "value_dim": mixer.value_dim,
        }
    return {"kind": "short convolution", "kernel": mixer.kernel}


def _feed(feed: MLPConfig | ExpertsConfig) -> dict[str, Any]:
    from ..model.config import MLPConfig

    if isinstance(feed, MLPConfig):
        return {"kind": "dense", "intermediate_size": feed.intermediate_size, "activation": feed.activation}
    return {
        "kind": "experts",
        "experts": feed.num_experts,
        "experts_per_token": feed.top_k,
        "intermediate_size": feed.expert.intermediate_size,
        "shared_intermediate_size": None if feed.shared is None else feed.shared.intermediate_size,
        "activation": feed.expert.activation,
    }


def _formats(config: ModelConfig, kept: Kept) -> dict[str, str]:
    """Return the formats of the matrices of each role, in the order of the table."""
    from ..model.tensors import Kind, tensors

    found: dict[str, set[str]] = {}
    for spec in tensors(config):
        if spec.kind is Kind.MATRIX:
            found.setdefault(spec.role, set()).add(kept.formats[spec.name].name)
    return {role: ", ".join(sorted(names)) for role, names in found.items()}


def _memory(config: ModelConfig, kept: Kept, positions: int, ranks: int) -> dict[str, Any]:
    """Return the largest rank's need at a rank count, bytes, each rank on a host of its own."""
    from ..planning.plan import memory_told
    from ..startup.shares import MemoryPlan, shards_of

    plan, hosts = MemoryPlan(config, kept, _TOKENS), [str(rank) for rank in range(ranks)]
    needs = [memory_told(plan.parts(part, hosts, positions)) for part in shards_of(config, [1.0] * ranks)]
    return {"ranks": ranks, **max(needs, key=lambda need: need["total_bytes"])}


# ---- how it is printed for people


def _text(report: dict[str, Any]) -> str:
    plain = {key: value for key, value in report.items() if not isinstance(value, (list, dict))}
    lines = [f"{key.replace('_', ' '):<24} {_value(value)}" for key, value in plain.items()]
    kinds = [
        [f"{each['layers']} x", _said(each["mixer"]), _said(each["feed_forward"])] for each in report["layer_kinds"]
    ]
    by_format: dict[str, list[str]] = {}
    for role, name in report["formats"].items():
        by_format.setdefault(name, []).append(role)
    names = ("weights_bytes", "kv_cache_bytes", "states_bytes", "buffers_bytes", "total_bytes")
    rows = [[str(m["ranks"]), *(f"{m[name] / 1e6:,.1f}" for name in names)] for m in report["memory"]]
    head = ["ranks", "weights MB", "KV cache MB", "states MB", "buffers MB", "total MB"]
    return "\n".join(
        [
            *lines,
            "",
            _left_table(["layers", "mixer", "feed-forward"], kinds),
            "",
            _left_table(["format", "matrices"], [[name, ", ".join(roles)] for name, roles in by_format.items()]),
            "",
            "memory of the largest rank:",
            table(head, rows),
        ]
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else str(value)


def _said(kind: dict[str, Any]) -> str:
    """Return a mixer or feed-forward in words: its kind, then names and values."""
    rest = (f"{key.replace('_', ' ')} {value}" for key, value in kind.items() if key != "kind" and value is not None)
    return ", ".join([kind["kind"], *rest])


def _left_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a text table whose columns begin at the left."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
