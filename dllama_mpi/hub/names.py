"""Names of models: of the table that comes with the program, or of a repository of the hub."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ORIGINAL = "safetensors"  # after a table's name: the weights as their makers published them
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(:(?P<what>[^:]+))?", re.ASCII)


@dataclass(frozen=True)
class Name:
    """A model on the hub.

    Attributes:
        repo: ORG/NAME. what: a file of it, or a quantisation such as Q4_K_M; None for what it holds, or the usual one.
    """

    repo: str
    what: str | None = None

    def __str__(self) -> str:
        return self.repo if self.what is None else f"{self.repo}:{self.what}"


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        repo: where its makers publish it. gguf: a repository with GGUF files of it, or "". gigabytes: what is
            downloaded, in 10^9 bytes. shape: of `model.shapes.SHAPES`; changes: its config.json's other values.
        aliases: other names, among them Distributed Llama's. gated: whether `repo` asks to accept its conditions.
    """

    name: str
    repo: str
    licence: str
    gigabytes: float
    shape: str
    gguf: str = ""
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    gated: bool = False

    def on_hub(self, what: str | None) -> Name:
        """Return what is downloaded for this name, or for NAME:what."""
        if not self.gguf or what == ORIGINAL:
            return Name(self.repo, None if what == ORIGINAL else what)
        return Name(self.gguf, what or "Q4_K_M")


@functools.cache
def models() -> dict[str, Model]:
    """Return the table, by name."""
    text = Path(__file__).with_name("models.toml").read_text(encoding="utf-8")
    found = tomllib.loads(text)
    return {name: Model(name, **{**row, "aliases": tuple(row.get("aliases", ()))}) for name, row in found.items()}


def table_names() -> dict[str, Model]:
    """Return the table's models by all their names."""
    return {name: model for model in models().values() for name in (model.name, *model.aliases)}


def parse_name(text: str) -> Name | None:
    """Return what a name of the table, or ORG/NAME[:WHAT], stands for; None if it can be a path alone."""
    name, _, what = text.partition(":")
    if "/" not in name:
        model = table_model(name)
        return None if model is None else model.on_hub(what or None)
    match = _NAME.fullmatch(text)
    return None if match is None else Name(match["repo"], match["what"])


def table_model(text: str) -> Model | None:
    """Return the table's model for NAME or NAME:WHAT, whatever its case and dashes; None if it has none."""
    plain = _plain(text.partition(":")[0])
    return next((model for name, model in table_names().items() if _plain(name) == plain), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
