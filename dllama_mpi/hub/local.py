"""What of the hub lies on this host's disk, in the folders that all of the hub's tools share."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from .choice import INDEX, Choice, RepoFile, choose, quantisation_of
from .names import Name

_FOLDER = "models--"
PARTIAL = ".incomplete"  # ends the names of files that have not come whole


def hub_folder() -> Path:
    """Return the folder of downloads: HF_HUB_CACHE, else `hub` in HF_HOME, else in ~/.cache/huggingface."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class Stored:
    """A repository on this disk: its folder, which has blobs, snapshots that link to them, and refs."""

    repo: str
    folder: Path

    @classmethod
    def of(cls, repo: str) -> Stored:
        """Return where a repository is stored, or would be."""
        return cls(repo, hub_folder() / (_FOLDER + repo.replace("/", "--")))

    @property
    def blobs(self) -> Path:
        """The folder of contents, each by its digest."""
        return self.folder / "blobs"

    def snapshot(self, commit: str) -> Path:
        """Return the folder of a commit's files."""
        return self.folder / "snapshots" / commit

    def commit(self) -> str | None:
        """Return the commit that was downloaded last; None if none was to its end."""
        try:
            return (self.folder / "refs" / "main").read_text(encoding="ascii").strip() or None
        except (OSError, ValueError):
            return None

    def keep(self, commit: str) -> None:
        """Make a commit the one that the name stands for."""
        refs = self.folder / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        fresh = refs / f"main.{os.getpid()}"
        fresh.write_text(commit, encoding="ascii")
        fresh.replace(refs / "main")

    def snapshots(self) -> list[Path]:
        """Return the folders of all commits, the latest first."""
        with contextlib.suppress(OSError):
            return sorted((self.folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        return []


def files_in(snapshot: Path) -> list[RepoFile]:
    """Return a snapshot's files that are really there, links to missing contents left out."""
    return [
        RepoFile(path.relative_to(snapshot).as_posix(), path.stat().st_size)
        for path in sorted(snapshot.rglob("*"))
        if path.is_file()
    ]


def index_of(path: Path) -> list[str]:
    """Return the files that an index of safetensors names.

    Raises:
        ModelError: it cannot be read as one.
    """
    try:
        names = list(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not an index of safetensors ({type(error).__name__}); download it again") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{path}: not an index of safetensors; download it again")
    return names


def find(name: Name) -> tuple[str, Choice] | None:
    """Return (commit, choice) of a model that is here whole, None if it is not; nothing is asked of the hub."""
    stored = Stored.of(name.repo)
    commit = stored.commit()
    if commit is None:
        return None
    snapshot = stored.snapshot(commit)
    try:
        return commit, choose(name.repo, files_in(snapshot), name.what, lambda: index_of(snapshot / INDEX))
    except ModelError:
        return None


# ---- listing


@dataclass(frozen=True)
class Held:
    """A model on this disk: its name, its bytes, where it lies, and whether files are missing."""

    name: str
    size: int
    path: Path
    is_whole: bool


def held() -> list[Held]:
    """Return what is on this disk of models, by name: a GGUF file each, other repositories as one."""
    found: list[Held] = []
    with contextlib.suppress(OSError):
        for folder in sorted(hub_folder().iterdir()):
            if folder.name.startswith(_FOLDER) and folder.is_dir():
                found += _held(Stored(folder.name.removeprefix(_FOLDER).replace("--", "/", 1), folder))
    return found


def _held(stored: Stored) -> Iterator[Held]:
    commit = stored.commit()
    snapshots = [stored.snapshot(commit)] if commit is not None else stored.snapshots()[:1]
    files = files_in(snapshots[0]) if snapshots else []
    ggufs = sorted({what for file in files if file.path.endswith(".gguf") and (what := quantisation_of(file.path))})
    for what in ggufs:
        name = Name(stored.repo, what)
        chosen = find(name)
        if chosen is not None:
            yield Held(str(name), chosen[1].size, stored.snapshot(chosen[0]) / chosen[1].model, True)
    unfinished = sum(path.stat().st_size for path in _partials(stored))
    if unfinished or not ggufs:
        is_whole = not unfinished and find(Name(stored.repo)) is not None
        size = unfinished if ggufs else unfinished + sum(file.size or 0 for file in files)
        yield Held(stored.repo, size, snapshots[0] if snapshots and not ggufs else stored.folder, is_whole)


def _partials(stored: Stored) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in stored.blobs.iterdir() if path.name.endswith(PARTIAL)]
    return []


# ---- removing


def remove(name: Name) -> int:
    """Remove a model from this disk: the whole repository, or the files of a quantisation; return the bytes freed.

    Raises:
        ModelError: it is not here, or may not be removed.
    """
    stored = Stored.of(name.repo)
    if not stored.folder.is_dir():
        raise ModelError(f"{name}: not on this disk ({stored.folder} is not there); see download --list-local")
    try:
        return _remove_all(stored) if name.what is None else _remove_files(stored, name)
    except OSError as error:
        raise ModelError(f"{error.filename or stored.folder}: {error.strerror or error}; not removed") from None


def _remove_all(stored: Stored) -> int:
    size = sum(path.stat().st_size for path in stored.folder.rglob("*") if path.is_file() and not path.is_symlink())
    shutil.rmtree(stored.folder)
    shutil.rmtree(hub_folder() / ".locks" / stored.folder.name, ignore_errors=True)
    return size


def _remove_files(stored: Stored, name: Name) -> int:
    size, any_left = 0, False
    for snapshot in stored.snapshots():
        files = files_in(snapshot)
        gone = _chosen(name, files)
        any_left |= len(gone) < len(files)
        for path in gone:
            link = snapshot / path
            blob = link.resolve()
            size += blob.stat().st_size
            link.unlink()
            if blob != link:
                blob.unlink(missing_ok=True)
    if not size:
        raise ModelError(f"{name}: not on this disk; see download --list-local")
    return size if any_left else size + _remove_all(stored)


def _chosen(name: Name, files: Sequence[RepoFile]) -> list[str]:
    try:
        return [file.path for file in choose(name.repo, files, name.what, list).files]
    except ModelError:
        return []
