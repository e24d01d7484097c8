"""Download a model by name, or list models, those that can be downloaded or those on this disk.

NAME is one of the list's, or ORG/NAME of the Hugging Face hub; after a colon a quantisation or a file of it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..log import say
from .options import add_progress_option, number, table

if TYPE_CHECKING:
    from ..hub.names import Model, Name
    from ..hub.remote import Download
    from ..planning.fit import Fit

_MEMORIES = (4e9, 8e9, 16e9)
_UNITS = {"": 1e9, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def memory(text: str) -> int:
    """Return bytes from 8G, 7.5GB, 512M, or a number of GB."""
    plain = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = plain[-1:] if plain[-1:] in "kmgt" else ""
    try:
        value = float(plain.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e18:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory, such as 8G or 512M")
    return int(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="what to download: NAME, ORG/NAME, or either with :QUANTISATION or :FILE",
    )
    add_progress_option(parser)
    group = parser.add_argument_group("lists")
    group.add_argument("--ranks", type=number(int, 1), metavar="N", help="show how models fit on so many hosts")
    group.add_argument(
        "--memory", type=memory, metavar="SIZE", help="memory that each host has free, such as 8G (default: 8G)"
    )
    group.add_argument("--list-local", action="store_true", help="list the models on this disk, with sizes and places")
    group.add_argument("--remove", metavar="NAME", help="remove a model from this disk, as the command remove does")
    group.add_argument("--json", action="store_true", help="print lists as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it on rank 0; lists and the command to run next go to stdout, what happens to stderr."""
    from ..parallel.launch import ranks_launched

    if ranks_launched() == 1:
        _run(args, 1)
        return 0
    from ..parallel.group import connect
    from ..parallel.stream import together_at_rest

    group = connect()
    with together_at_rest(group):
        if group.is_root:
            _run(args, group.size)
    return 0


def _run(args: argparse.Namespace, ranks: int) -> None:
    if [args.name is not None, args.list_local, args.remove is not None].count(True) > 1:
        raise UsageError("NAME, --list-local and --remove: give one of them")
    if args.remove is not None:
        remove(args.remove)
    elif args.list_local:
        print(_local(args.json), flush=True)
    elif args.name is not None:
        print(_fetch(args.name, ranks), flush=True)
    else:
        print(_models(args), flush=True)


# ---- downloading


def named(text: str) -> Name:
    """Return the model of the hub that a name stands for.

    Raises:
        UsageError: none.
    """
    from ..hub.names import parse_name
    from ..startup.finding import nearest_name

    name = parse_name(text)
    if name is None:
        near = nearest_name(text)
        hint = f" (did you mean {near}?)" if near else ""
        raise UsageError(f"{text}: not a name that download lists, nor ORG/NAME of the hub{hint}")
    return name


def _fetch(text: str, ranks: int) -> str:
    """Download and check a model; return the command to run next."""
    from ..startup.finding import download_model

    download = download_model(named(text))
    if download.repository.licence:
        say(f"licence: {download.repository.licence}")
    before = download.check()
    if before:
        say(f"{before} file{'s' * (before > 1)} of it {'were' if before > 1 else 'was'} here, and not damaged")
    return _command(text, download, ranks)


def _command(text: str, download: Download, ranks: int) -> str:
    """Return the command that runs a model, on as many hosts like this one as it needs."""
    model, path = text, download.model
    words = [Path(sys.executable).name, "-m", "dllama_mpi"]
    if path.suffix == ".m":
        model = str(path)
    elif ":" not in text and "/" in text and download.choice.model:
        model = f"{text}:{download.choice.what}"
    words += ["chat", "--model", model] if _has_template(path) else ["--model", model, "--prompt", "Once upon a time"]
    if path.suffix == ".m":
        words += ["--tokenizer", str(next(path.parent.glob("*.t")))]
    needed = _hosts_needed(text, path) if ranks == 1 else None
    if ranks > 1:
        words = ["mpiexec", "-n", str(ranks), *words]
    elif needed is not None and needed > 1:
        say(f"it needs {needed} hosts with as much free memory as this one; hosts is a file with their names")
        words = ["mpiexec", "-f", "hosts", "-n", str(needed), *words]
    return shlex.join(words)


def _has_template(path: Path) -> bool:
    """Return whether a model says how a chat is written; a file of weights has to be opened to be sure."""
    if not path.is_dir():
        return True
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    try:
        return "chat_template" in json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _hosts_needed(text: str, path: Path) -> int | None:
    """Return how many hosts like this one a model needs; None if its shape is not known, or no number will do."""
    from ..hub.names import table_model
    from ..planning.fit import Fitting, fitting_of_folder
    from ..startup.memory import available_bytes

    model = table_model(text)
    if path.is_dir():
        fitting = fitting_of_folder(path)
    elif model is not None and ":" not in text:
        fitting = Fitting.of(model)
    else:
        return None
    found = fitting.least(available_bytes())
    return None if found is None else found.ranks


# ---- lists


def remove(text: str) -> None:
    """Remove a model from this disk, and say what that freed."""
    from ..hub.local import remove as remove_files
    from ..progress import in_bytes

    name = named(text)
    say(f"{name}: removed, {in_bytes(remove_files(name))} freed")


def _local(as_json: bool) -> str:
    from ..hub.local import held, hub_folder
    from ..progress import in_bytes

    found = held()
    if as_json:
        return json.dumps(
            {
                "folder": str(hub_folder()),
                "models": [
                    {"name": each.name, "bytes": each.size, "path": str(each.path), "whole": each.is_whole}
                    for each in found
                ],
            }
        )
    if not found:
        return f"no models in {hub_folder()}"
    rows = [[each.name, in_bytes(each.size), "whole" if each.is_whole else "not whole"] for each in found]
    lines = table(["model", "size", "state"], rows).splitlines()
    places = ["where", "-----", *(str(each.path) for each in found)]
    text = "\n".join(f"{line.ljust(max(map(len, lines)))}  {place}" for line, place in zip(lines, places, strict=True))
    return f"{text}\n{len(found)} in {hub_folder()}, {in_bytes(sum(each.size for each in found))}"


def _models(args: argparse.Namespace) -> str:
    """Return the table of models: sizes, licences, and the hosts they fit on."""
    from ..hub.names import models

    sizes = [args.memory] if args.memory or args.ranks else list(_MEMORIES)
    memories = [int(size or 8e9) for size in sizes]
    rows = [_row(model, memories, args.ranks) for model in models().values()]
    if args.json:
        return json.dumps({"models": rows})
    return "\n".join([_text(rows, memories, args.ranks), *_notes(rows)])


def _row(model: Model, memories: list[int], ranks: int | None) -> dict[str, Any]:
    from ..model.recipe import parameters
    from ..planning.fit import Fitting

    fitting = Fitting.of(model)
    found: list[Fit | None] = [fitting.least(size) for size in memories]
    asked = None if ranks is None else fitting.on(ranks, memories[0])
    return {
        "name": model.name,
        "aliases": list(model.aliases),
        "repository": str(model.on_hub(None)),
        "original": model.repo,
        "gated": model.gated and not model.gguf,
        "parameters": parameters(fitting.config),
        "bytes": int(model.gigabytes * 1e9),
        "licence": model.licence,
        "hosts": [
            {"free_bytes": size, "least": fit.ranks if fit else None, "rank_bytes": fit.needed if fit else None}
            for size, fit in zip(memories, found, strict=True)
        ],
        "ranks": ranks,
        "rank_bytes": asked.needed if asked else None,
        "max_seq_len": asked.positions if asked else None,
        "most_ranks": fitting.most,
    }


def _text(rows: list[dict[str, Any]], memories: list[int], ranks: int | None) -> str:
    head = ["name", "licence", "weights", "download"]
    head += [f"hosts of {size / 1e9:g} GB" for size in memories]
    head += [] if ranks is None else ["GB a rank", f"on {ranks} of them"]
    shown = []
    for row in rows:
        cells = [row["name"], row["licence"], f"{row['parameters'] / 1e9:.1f} B", f"{row['bytes'] / 1e9:.2f} GB"]
        cells += [str(host["least"] or "-") for host in row["hosts"]]
        if ranks is not None:
            cells += ["-" if row["rank_bytes"] is None else f"{row['rank_bytes'] / 1e9:.2f}", _on(row)]
        shown.append(cells)
    widest = max(len(row[1]) for row in [head, *shown])
    head, *shown = ([row[0], row[1].ljust(widest), *row[2:]] for row in [head, *shown])
    return table(head, shown)


def _on(row: dict[str, Any]) -> str:
    if row["rank_bytes"] is None:
        return f"at most {row['most_ranks']} ranks"
    return "does not fit" if row["max_seq_len"] is None else f"context {row['max_seq_len']}"


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    from ..planning.fit import CONTEXT

    gated = ", ".join(row["name"] for row in rows if row["gated"])
    aliases = ", ".join(alias for row in rows for alias in row["aliases"])
    return [
        "",
        f"Hosts: the fewest with so much memory free, one rank each, for a context of {CONTEXT}.",
        "NAME stands for a GGUF file in Q4_K_M where there is one; NAME:Q8_0 for another, NAME:safetensors for the"
        " makers' own.",
        *([f"Gated, their conditions have to be accepted first: {gated}."] if gated else []),
        f"Distributed Llama's names are understood: {aliases}.",
        "Any other model: download ORG/NAME.",
    ]
