"""Where a model lies: at a path, or by a name of the hub, from which the root downloads it once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..hub.local import Stored, find
from ..hub.names import Name, parse_name, table_names
from ..log import say
from ..parallel.group import TensorParallelGroup
from ..parallel.stream import together_at_rest
from .opening import DEMO, RANDOM, SUFFIXES, model_config, model_folder

if TYPE_CHECKING:
    from ..hub.remote import Download

_UNDERSTOOD = (
    "give a folder with config.json and *.safetensors, a .gguf file, a .m file of Distributed Llama, or a model of the"
    " hub as ORG/NAME"
)
_NEAR = 0.6  # how alike two names must be for one to be offered for the other


@dataclass(frozen=True)
class Place:
    """Where a model lies, said so that every host can look for it: a path, or a file below a commit of a repository."""

    path: str
    repo: str = ""
    commit: str = ""

    def here(self) -> Path:
        """Return the path on this host, whatever is there."""
        return Path(self.path) if not self.repo else Stored.of(self.repo).snapshot(self.commit) / self.path


def is_named(model: str) -> bool:
    """Return whether a model may be one by name; the same on every host, whatever lies on its disk."""
    return not model.startswith(RANDOM) and model != "demo" and parse_name(model) is not None


def find_model(model: str, group: TensorParallelGroup, quiet: bool = False, shape_alone: bool = False) -> Path:
    """Return where a model lies, by path, "demo" or name, on this rank's host. Collective.

    The root downloads what it does not have; other hosts need not have it, then there is nothing at the path returned.

    shape_alone: be content with the config.json of a model that is a folder.

    Raises:
        ModelError: neither a path that exists nor a name, with what was meant perhaps; or it cannot be downloaded.
    """
    if not is_named(model):
        with group.together():
            if group.is_root:
                check_path(model)
        return model_folder(model)
    place: Place | None = None
    with together_at_rest(group):
        if group.is_root:
            place = _on_root(model, quiet, shape_alone)
    found: Place = group.broadcast(place)
    return found.here()


def find_alone(model: str, quiet: bool = False, shape_alone: bool = False) -> Path:
    """Do as `find_model`, in one process; not collective."""
    if is_named(model):
        return _on_root(model, quiet, shape_alone).here()
    check_path(model)
    return model_folder(model)


def _on_root(model: str, quiet: bool, shape_alone: bool) -> Place:
    folder = model_folder(model)
    if folder.exists():
        return Place(str(folder))
    name = parse_name(model)
    assert name is not None
    known = find(name)
    if known is None:
        return _downloaded(model, name, quiet, shape_alone)
    commit, choice = known
    if choice.model and not name.what and not quiet:
        say(f"{model}: {choice.model}, which is here")
    return Place(choice.model, name.repo, commit)


def download_model(name: Name, quiet: bool = False, shape_alone: bool = False) -> Download:
    """Download a model, after a look at whether its architecture can be run.

    shape_alone: be content with the config.json of a model that is a folder.

    Raises:
        ModelError: it cannot be run, or not be downloaded.
    """
    from ..hub.remote import Download

    download = Download(name, quiet)
    if not download.choice.model:
        model_config(str(download.config_alone()))
    if download.choice.model or not shape_alone:
        download.run()
    return download


def _downloaded(model: str, name: Name, quiet: bool, shape_alone: bool) -> Place:
    try:
        download = download_model(name, quiet, shape_alone)
    except ModelError as error:
        raise ModelError(f"{error}{_also(model)}") from None
    return Place(download.choice.model, name.repo, download.repository.commit)


def _also(model: str) -> str:
    """Return what else is to be said when a name cannot be downloaded: that it is no path either, and what is near."""
    if "/" not in model:
        return ""
    near = nearest(model)
    return f"; there is no folder or file {model} here either" + (f", the nearest is {near}" if near else "")


def check_path(model: str) -> None:
    """Check that a model's path exists, where it is one.

    Raises:
        ModelError: it does not; the message says what would be understood, and what is near.
    """
    folder = model_folder(model)
    if model.startswith(RANDOM) or folder == DEMO or folder.exists():
        return
    near = nearest(model)
    raise ModelError(
        f"{model}: no such model directory or file; {_UNDERSTOOD}" + (f" (did you mean {near}?)" if near else "")
    )


def nearest_name(text: str) -> str | None:
    """Return the name in the program's table most like a text."""
    found = difflib.get_close_matches(text.lower().replace("-", "_"), table_names(), 1, _NEAR)
    return found[0] if found else None


def nearest(model: str) -> str | None:
    """Return the name most like a model's that is there: beside where it should be, or in the program's table."""
    path = Path(model).expanduser()
    beside = {}
    try:
        beside = {each.name: str(each) for each in path.parent.iterdir() if _is_model(each)}
    except OSError:
        beside = {}
    known = {**{name: name for name in ("demo", *table_names())}, **beside}
    found = difflib.get_close_matches(path.name, known, 1, _NEAR)
    if not found:
        lower = {name.lower(): name for name in known}
        found = [lower[each] for each in difflib.get_close_matches(path.name.lower(), lower, 1, _NEAR)]
    return known[found[0]] if found else None


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or path.suffix.lower() in SUFFIXES[1:]
