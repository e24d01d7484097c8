"""What `info` shows of a file that is a model: what it says, tensors by type, special tokens, the chat template."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..startup.model_files import ModelFile

_LONGEST = 60  # characters of a value


def file_report(file: ModelFile, tokenizer: str | None) -> dict[str, Any]:
    """Return the description of a file, or of all files of a set, JSON-ready; tokenizer: the path of another one."""
    container, about = file.container, file.about(None if tokenizer is None else Path(tokenizer))
    tensors = container.tensors.values()
    by_type: dict[str, list[int]] = {}
    for info in tensors:
        counts = by_type.setdefault(info.type.name, [0, 0, 0])
        for i, value in enumerate((1, math.prod(info.shape), info.size)):
            counts[i] += value
    matrices = [info for info in tensors if len(info.shape) > 1]
    weights = sum(math.prod(info.shape) for info in matrices)
    return {
        "files": [str(each.path) for each in container.files],
        "bytes": sum(each.data.size for each in container.files),
        "file_bits_per_weight": 8 * sum(info.size for info in matrices) / max(1, weights),
        "metadata": {key: _short(value) for key, value in about.said.items()},
        "tensor_types": [
            {"type": name, "tensors": count, "weights": size, "bytes": stored}
            for name, (count, size, stored) in sorted(by_type.items(), key=lambda each: -each[1][2])
        ],
        "special_tokens": dict(about.special),
        "chat_template": None if about.template is None else next(iter(about.template.splitlines()), ""),
    }


def _short(value: Any) -> Any:
    """Return a value as it is shown."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if not isinstance(value, str) or len(value) <= _LONGEST else value[: _LONGEST - 3] + "..."


def file_lines(report: dict[str, Any]) -> list[str]:
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
