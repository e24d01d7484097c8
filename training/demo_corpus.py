"""The demo model's texts: what the running interpreter's standard library says of itself, as documents to train on."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import inspect
import io
import random
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BEGIN, END, USER, ASSISTANT = SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
HELDOUT_BYTES = 50_000
EXCLUDED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "turtledemo", "pydoc_data"}


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Unit(NamedTuple):
    """One docstring, comment block or help topic: its source, its full name, the line above it and its text."""

    source: str
    name: str
    head: str
    text: str

    def render(self) -> str:
        if not self.head.endswith(":"):
            return f"{self.head}\n\n{self.text}" if self.head else self.text
        closing = "\n    " if "\n" in self.text else ""
        return f'{self.head}\n{textwrap.indent(chr(34) * 3 + self.text, "    ")}{closing}"""'


def clean(text: str) -> str:
    """Normalise white space; drop rules, revision marks and lines with mail addresses; '' if it is not prose."""
    lines = [line.rstrip() for line in inspect.cleandoc(text.expandtabs()).splitlines()]
    text = "\n".join(line for line in lines if not re.search(r"\S@\S+\.\w|\$Id|[-=#*_~]{12,}", line))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    solid = re.sub(r"\s", "", text)
    letters = sum(c.isascii() and c.isalpha() for c in solid)
    unwanted = re.search(r"copyright|all rights reserved|licensed to|-\*-|type: ignore|noqa", text, re.IGNORECASE)
    return "" if len(text) < 24 or letters < 0.6 * len(solid) or unwanted else text


def source_units(path: Path, name: str) -> list[Unit]:
    """The docstrings and the comment blocks of one source file, in their order."""
    code = path.read_text(encoding="utf-8", errors="replace")
    tree = ast.parse(code)
    found = [(0, Unit(name, name, f"Module {name}", ast.get_docstring(tree) or ""))]

    def visit(node: ast.AST, prefix: str) -> None:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            prefix = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, node.bases))
                head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
            else:
                result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                head = f"def {node.name}({ast.unparse(node.args)}){result}:"
            found.append((node.lineno, Unit(name, prefix, head, ast.get_docstring(node) or "")))
        for child in ast.iter_child_nodes(node):
            visit(child, prefix)

    visit(tree, name)
    blocks: dict[int, list[str]] = {}  # by their last lines
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            line = token.start[0]
            blocks[line] = [*blocks.pop(line - 1, []), token.string.lstrip("#").removeprefix(" ")]
    found += [(line, Unit(name, "", "", "\n".join(block))) for line, block in blocks.items()]
    return [unit for _, unit in sorted(found, key=lambda item: item[0])]


def extension_units(name: str) -> Iterator[Unit]:
    """The docstrings of a module written in C, of its classes and of their methods."""
    module = importlib.import_module(name)
    yield Unit(name, name, f"Module {name}", module.__doc__ or "")
    members = [(name, key, value) for key, value in sorted(vars(module).items())]
    for _, key, value in list(members):
        if isinstance(value, type) and value.__module__ in (name, "builtins"):
            members += [(f"{name}.{key}", k, v) for k, v in vars(value).items() if not k.startswith("__")]
    for owner, key, value in members:
        if isinstance(value, type) or callable(value):
            signature = (getattr(value, "__text_signature__", None) or "(...)")[1:-1]
            signature = re.sub(r"[$](module|type)(, )?|[$]|, /|^/", "", signature)
            head = f"class {key}:" if isinstance(value, type) else f"def {key}({signature}):"
            doc = getattr(value, "__doc__", None)
            yield Unit(name, f"{owner}.{key}", head, doc if isinstance(doc, str) else "")


def collect() -> list[Unit]:
    """All the text of the running interpreter's standard library, cleaned, without repetitions."""
    root = Path(sysconfig.get_path("stdlib"))
    units: list[Unit] = []
    extensions = set(sys.builtin_module_names)
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        if parts[0] == "lib-dynload" and path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
            extensions.add(path.name.split(".")[0])
        elif path.suffix == ".py" and not EXCLUDED.intersection(parts) and "sysconfigdata" not in name:
            try:
                units += source_units(path, name)
            except (SyntaxError, tokenize.TokenError):
                log(f"skipped {name}")
    for name in sorted(extensions):
        if not name.startswith(("_test", "_xx", "xx", "_ctypes_test")):
            try:
                units += extension_units(name)
            except ImportError:
                log(f"skipped {name}")
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    units += [Unit(f"topic {key}", "", "", text) for key, text in topics.items()]
    kept: dict[str, Unit] = {}
    for unit in units:
        if text := clean(unit.text):
            kept.setdefault(re.sub(r"\W+", "", text).lower(), unit._replace(text=text))
    return list(kept.values())


def by_source(units: list[Unit]) -> dict[str, list[Unit]]:
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.source, []).append(unit)
    return groups


def heldout_text(units: list[Unit]) -> str:
    """The held-out sources in the order of their hashes, up to 5000 characters of each, HELDOUT_BYTES in all."""
    groups = sorted(by_source(units).items(), key=lambda item: digest(item[0]))
    text = "\n\n".join("\n\n".join(u.render() for u in group)[:5000].rsplit("\n\n", 1)[0] for _, group in groups)
    return text.encode()[:HELDOUT_BYTES].decode(errors="ignore").rsplit("\n\n", 1)[0] + "\n"


def documents(units: list[Unit], rng: random.Random) -> list[str]:
    """One epoch: some sources whole, the others as single units (in full, bare, or as a question and its answer)."""
    texts = []
    for group in by_source(units).values():
        if rng.random() < 0.5:
            texts.append(BEGIN + "\n\n".join(unit.render() for unit in group) + END)
            continue
        for unit in group:
            kind = rng.random()
            if unit.name and kind < 0.15 and len(unit.text) < 1200:
                question = rng.choice(("What does {} do?", "What is {}?", "Explain {}.", "Describe {}."))
                name = unit.name if rng.random() < 0.5 else unit.name.rsplit(".", 1)[-1]
                texts.append(f"{BEGIN}{USER}{question.format(name)}{END}{ASSISTANT}{unit.text}{END}")
            else:
                texts.append(BEGIN + (unit.text if kind < 0.5 else unit.render()) + END)
    rng.shuffle(texts)
    return texts
