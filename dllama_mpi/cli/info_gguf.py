"""What `info` shows of a GGUF file: metadata, tensors by type, special tokens, the chat template's first line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..weights.gguf import GgufModel

_LONGEST = 60  # characters of a value


def gguf_report(model: GgufModel) -> dict[str, Any]:
    """Return the description of a file, or of all files of a set, JSON-ready."""
    said = {key: _short(model, key) for key in model.metadata if not key.endswith(".chat_template")}
    by_type: dict[str, list[int]] = {}
    for info in model.tensors.values():
        counts = by_type.setdefault(info.type.name, [0, 0, 0])
        for i, value in enumerate((1, math.prod(info.shape), info.size)):
            counts[i] += value
    matrices = [info for info in model.tensors.values() if len(info.shape) > 1]
    weights = sum(math.prod(info.shape) for info in matrices)
    template = model.metadata.get("tokenizer.chat_template")
    return {
        "files": [str(file.path) for file in model.files],
        "bytes": model.size,
        "file_bits_per_weight": 8 * sum(info.size for info in matrices) / max(1, weights),
        "metadata": said,
        "tensor_types": [
            {"type": name, "tensors": count, "weights": size, "bytes": stored}
            for name, (count, size, stored) in sorted(by_type.items(), key=lambda each: -each[1][2])
        ],
        "special_tokens": _special(model),
        "chat_template": next(iter(str(template).splitlines()), "") if template is not None else None,
    }


def _short(model: GgufModel, key: str) -> Any:
    """Return a value as it is shown: of a list, how long it is."""
    count = model.metadata.count(key)
    if count is not None:
        return f"{count} values"
    value = model.metadata[key]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if not isinstance(value, str) or len(value) <= _LONGEST else value[: _LONGEST - 3] + "..."


def _special(model: GgufModel) -> dict[str, str]:
    """Return the tokens that the metadata name by id: the id and the text of each."""
    found = {}
    ids = {
        key: model.metadata[key] for key in model.metadata if key.startswith("tokenizer.ggml.") and key.endswith("_id")
    }
    texts = model.metadata["tokenizer.ggml.tokens"] if ids and model.metadata.count("tokenizer.ggml.tokens") else []
    for key, number in ids.items():
        name = key.removeprefix("tokenizer.ggml.").removesuffix("_token_id")
        known = isinstance(number, int) and 0 <= number < len(texts) and isinstance(texts[number], str)
        found[name] = f"{number} {texts[number][:_LONGEST]!r}" if known else str(number)[:_LONGEST]
    return found


def gguf_lines(report: dict[str, Any]) -> list[str]:
    """Return a report's lines for people."""
    types = [
        f"{each['type']:<8} {each['tensors']:>5} tensors {each['weights'] / 1e6:>10,.1f} M weights"
        f" {each['bytes'] / 1e6:>10,.1f} MB"
        for each in report["tensor_types"]
    ]
    head = f"{len(report['files'])} file{'s' * (len(report['files']) > 1)}, {report['bytes'] / 1e6:,.1f} MB"
    return [
        f"{head}, {report['file_bits_per_weight']:.2f} bits a weight of its matrices",
        *types,
        "",
        *(f"{key} = {_printable(value)}" for key, value in report["metadata"].items()),
        "",
        *(f"token {name:<19} {text}" for name, text in report["special_tokens"].items()),
        f"chat template             {_printable(report['chat_template'] or 'none')[:_LONGEST]}",
    ]


def _printable(value: Any) -> str:
    return "".join(c if c.isprintable() else " " for c in str(value))
