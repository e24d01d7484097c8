"""Downloading a model of the hub: what is needed of its repository, to where all of the hub's tools look."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ModelError
from ..progress import in_bytes
from .choice import INDEX, Choice, RepoFile, choose
from .local import Stored, index_of
from .names import Name
from .progress import Downloading
from .refusals import Refusal, told
from .transfer import fetch, missing_bytes

_MARGIN = 64_000_000  # bytes of the disk that are left free


@dataclass(frozen=True)
class Repository:
    """A repository as the hub describes it: its commit, files and licence ("" where none is told)."""

    name: str
    commit: str
    files: dict[str, RepoFile]
    licence: str


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Keep the hub's library from bars and lines of its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            enable_progress_bars()


def look_up(repo: str) -> Repository:
    """Ask the hub what a repository holds.

    Raises:
        Refusal: what answers is no hub. Others: see `refusals.told`.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name="dllama_mpi")
    try:
        info = api.model_info(repo, files_metadata=True, timeout=constants.DEFAULT_ETAG_TIMEOUT)
        files = {each.rfilename: _file(each) for each in info.siblings or [] if _is_below(each.rfilename)}
        licence = getattr(info.card_data, "license", None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if type(error).__module__.startswith("huggingface_hub"):
            raise
        what = f"{type(error).__name__}: {error}"[:120]
        raise Refusal(f"{constants.ENDPOINT} does not answer as a hub does ({what}); check HF_ENDPOINT") from None
    if _digest(info.sha, 40) is None:
        raise Refusal(f"{constants.ENDPOINT} tells no commit of it; check HF_ENDPOINT")
    return Repository(repo, str(info.sha), files, licence if isinstance(licence, str) else "")


def _digest(text: object, length: int) -> str | None:
    """Return a digest in hexadecimal if it is one: it becomes part of a path."""
    return text if isinstance(text, str) and re.fullmatch(rf"[0-9a-f]{{{length}}}", text) else None


def _file(told: Any) -> RepoFile:
    sha256 = _digest(told.lfs.sha256, 64) if told.lfs else None
    return RepoFile(told.rfilename, told.size, sha256, _digest(told.blob_id, 40))


def _is_below(path: str) -> bool:
    """Return whether a path stays below the folder that it is put in."""
    return ".." not in PurePosixPath(path).parts and not path.startswith("/")


class Download:
    """One model that is being downloaded."""

    def __init__(self, name: Name, quiet: bool = False) -> None:
        """Ask the hub for it, and choose what is needed.

        Raises:
            ModelError: the hub, the network or the disk refuse, in one line; or nothing, or too much, to choose from.
        """
        self._name, self._quiet, self._stored = name, quiet, Stored.of(name.repo)
        self._brought: set[str] = set()
        with self._told(), _calm():
            self.repository = look_up(name.repo)
            self.choice: Choice = choose(name.repo, self.repository.files.values(), name.what, self._index)

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return told(str(self._name), self._stored.folder.parent)

    @property
    def model(self) -> Path:
        """Where the model lies: a folder, or a file."""
        return self._stored.snapshot(self.repository.commit) / self.choice.model

    def config_alone(self) -> Path:
        """Download config.json alone, of a model that is a folder; return that folder. Raises as `run`."""
        with self._told(), _calm():
            return self._whole(self.repository.files["config.json"]).parent

    def run(self) -> Path:
        """Download what is missing, small files first, check all of it, and return where the model lies.

        Raises:
            ModelError: see above; or what came is damaged, and has been removed.
        """
        with self._told(), _calm():
            self._check_room()
            todo = [file for file in self.choice.files if not self._is_here(file)]
            total = sum(file.size or 0 for file in todo)
            here = total - sum(self._missing(file) for file in todo)
            if todo and not self._quiet:
                with Downloading(f"downloading {self._label}", total, here) as progress:
                    progress.say(self._first_line(len(todo), total, here))
                    self._bring(todo, progress)
            else:
                self._bring(todo, Downloading("", total, here, True))
            self._stored.keep(self.repository.commit)
        return self.model

    @property
    def _label(self) -> str:
        return str(Name(self._name.repo, self.choice.what if self.choice.model else None))

    def _first_line(self, count: int, total: int, here: int) -> str:
        before = f", {in_bytes(here)} of them from before" if here else ""
        files = f"{count} file" + "s" * (count != 1)
        return f"downloading {self._label}: {files}, {in_bytes(total)}{before}, to {self._stored.folder}"

    def _bring(self, files: list[RepoFile], progress: Downloading) -> None:
        for file in files:
            self._brought.add(file.path)
            if file.sha256 is not None and file.size is not None:
                self._large(file, progress)
            else:
                self._whole(file)
                progress.add(file.size or 0)

    # ---- single files

    def _link(self, file: RepoFile) -> Path:
        return self._stored.snapshot(self.repository.commit) / file.path

    def _is_here(self, file: RepoFile) -> bool:
        """Return whether a file is in its place; one of another size than the hub's is removed."""
        link = self._link(file)
        if not link.is_file():
            return False
        if file.size is None or link.stat().st_size == file.size:
            return True
        _discard(link)
        return False

    def _missing(self, file: RepoFile) -> int:
        """Return the bytes of a file that have to come: none of one that another commit has, too."""
        if file.sha256 is not None and (self._stored.blobs / file.sha256).is_file():
            return 0
        return missing_bytes(file, self._stored.blobs)

    def _check_room(self) -> None:
        needed = sum(self._missing(file) for file in self.choice.files if not self._is_here(file))
        folder = self._stored.folder
        at = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(at).free
        if needed and needed + _MARGIN > free:
            smaller = ", or name a smaller quantisation" if self.choice.model.endswith(".gguf") else ""
            raise ModelError(
                f"{self._label} needs {in_bytes(needed)} on the disk of {at}, {in_bytes(free)} are free: make room"
                f" (download --list-local, remove NAME), or set HF_HOME to a folder on a larger disk{smaller}"
            )

    def _index(self) -> list[str]:
        return index_of(self._whole(self.repository.files[INDEX]))

    def _whole(self, file: RepoFile) -> Path:
        """Bring a file as the hub's own tools do, and check it; return its place."""
        from huggingface_hub import hf_hub_download

        if not self._is_here(file):
            self._brought.add(file.path)
        path = Path(
            hf_hub_download(self._name.repo, file.path, revision=self.repository.commit, library_name="dllama_mpi")
        )
        problem = _problem(path, file)
        if problem:
            _discard(path)
            raise Refusal(f"{file.path}: {problem}; what came has been removed, download it again")
        return path

    def _large(self, file: RepoFile, progress: Downloading) -> None:
        from huggingface_hub import constants, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        commit, blob = self.repository.commit, self._stored.blobs / str(file.sha256)
        if (file.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:  # the hub does not give so much in one answer
            progress.say(f"{file.path} comes in the hub's own way, which does not go on where it was cut")
            try:
                self._whole(file)
            except ValueError as error:  # without its other transfer the library does not even try
                raise Refusal(f"{file.path}: {str(error).splitlines()[0].strip()}") from None
            progress.add(file.size or 0)
            return
        if not blob.is_file():
            url = hf_hub_url(self._name.repo, file.path, revision=commit)
            fetch(url, build_hf_headers(library_name="dllama_mpi"), file, self._stored.blobs, progress)
        # The content is there under its digest: this puts the link to it in its place, and brings nothing.
        hf_hub_download(self._name.repo, file.path, revision=commit, library_name="dllama_mpi")

    def check(self) -> int:
        """Read the files that were here before, compare their digests with the hub's, and return how many they are.

        Raises:
            ModelError: one is damaged; it has been removed.
        """
        before = [file for file in self.choice.files if file.path not in self._brought]
        for file in before:
            problem = _problem(self._link(file), file)
            if problem:
                _discard(self._link(file))
                raise ModelError(f"{self._label}: {file.path}: {problem}; it has been removed, download it again")
        return len(before)


def _problem(path: Path, file: RepoFile) -> str:
    """Return what is wrong with a file, or "": its size, or its sha256 or git's sha1, as far as the hub tells them."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"it has {size} bytes, the hub's {file.size}"
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    wanted = file.sha256 or file.blob
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return "" if wanted in (None, digest.hexdigest()) else "its digest is not the hub's"


def _discard(link: Path) -> None:
    """Remove a file of a snapshot and the content that it links to."""
    with contextlib.suppress(OSError):
        blob = Path(os.path.realpath(link))
        link.unlink()
        if blob != link:
            blob.unlink()
