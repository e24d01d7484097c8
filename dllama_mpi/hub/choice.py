"""Which files of a repository make up a model: what is needed, and nothing twice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import ModelError

USUAL = "Q4_K_M"  # the quantisation that is taken when nobody names one
INDEX = "model.safetensors.index.json"
_BESIDE = re.compile(r"[^/]+\.(json|jinja)|merges\.txt|vocab\.txt|[^/]*tokenizer[^/]*\.model|[^/]+\.tiktoken")
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_KIND = r"(?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|BF16|F16|F32|FP16|MXFP4(?:_MOE)?)"
_QUANTISATION = re.compile(rf"(?:^|[-._])({_KIND})(?=$|[-._])", re.IGNORECASE)
_SHOWN = 24  # choices named in an error


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository: bytes, and the digests that the hub tells of its content.

    Attributes:
        size: None where the hub does not tell. sha256: of a large file. blob: git's sha1 of a small one.
    """

    path: str
    size: int | None = None
    sha256: str | None = None
    blob: str | None = None


@dataclass(frozen=True)
class Choice:
    """The files of a model, the small ones first.

    Attributes:
        model: what `--model` is given below the repository's folder: "" for the folder itself, or a file.
        what: the quantisation or file that was chosen, None for a folder.
    """

    files: tuple[RepoFile, ...]
    model: str
    what: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files, as far as the hub tells."""
        return sum(file.size or 0 for file in self.files)


def choose(name: str, files: Iterable[RepoFile], what: str | None, read_index: Callable[[], Sequence[str]]) -> Choice:
    """Return the files to download of a repository.

    name: of it, for errors. what: a file, a quantisation or None. read_index: returns the files that its
    model.safetensors.index.json names.

    Raises:
        ModelError: nothing in it can be run, or there are several things and none is named.
    """
    found = {file.path: file for file in files}
    ggufs = _gguf_sets(found)
    if what is not None:
        return _named(name, found, ggufs, what)
    if INDEX in found or "model.safetensors" in found:
        return _folder(name, found, read_index)
    if ggufs:
        return _usual(name, ggufs)
    return _distributed_llama(name, found)


def _folder(name: str, found: Mapping[str, RepoFile], read_index: Callable[[], Sequence[str]]) -> Choice:
    if "config.json" not in found:
        raise ModelError(f"{name} has safetensors, but no config.json; it is not a model that can be run")
    weights = sorted(set(read_index())) if INDEX in found else ["model.safetensors"]
    missing = [path for path in weights if path not in found]
    if missing:
        raise ModelError(f"{name}: its {INDEX} names {missing[0]}, which is not there; the upload is not complete")
    beside = [path for path in found if _BESIDE.fullmatch(path)]
    small = [path for path in sorted(beside) if path == INDEX or not path.endswith(".index.json")]
    return Choice(tuple(found[path] for path in [*small, *weights]), "")


# ---- GGUF


def quantisation_of(path: str) -> str | None:
    """Return the quantisation that a .gguf file's name tells, in capitals; None if it tells none."""
    stem = _PART.sub("", PurePosixPath(path).stem)
    found = _QUANTISATION.findall(stem)
    return found[-1].upper() if found else None


def _gguf_sets(found: Mapping[str, RepoFile]) -> dict[str, list[RepoFile]]:
    """Return models in GGUF: their files, in order, by the path without part numbers and suffix."""
    sets: dict[str, list[RepoFile]] = {}
    for path in sorted(found):
        lower = PurePosixPath(path).name.lower()
        if lower.endswith(".gguf") and not lower.startswith("mmproj") and "imatrix" not in lower:
            sets.setdefault(_PART.sub("", path[: -len(".gguf")]), []).append(found[path])
    return sets


def _gguf(name: str, files: list[RepoFile]) -> Choice:
    part = _PART.search(PurePosixPath(files[0].path).stem)
    if part is not None and len(files) != int(part[2]):
        raise ModelError(f"{name}: {files[0].path} is of a set of {int(part[2])} files, and {len(files)} are there")
    return Choice(tuple(files), files[0].path, quantisation_of(files[0].path) or files[0].path)


def _usual(name: str, sets: Mapping[str, list[RepoFile]]) -> Choice:
    """Return the only model, or the one in the usual quantisation."""
    fitting = _with(sets, USUAL) or _with(sets, f"UD-{USUAL}")
    if len(fitting) != 1:
        fitting = list(sets) if len(sets) == 1 else []
    if not fitting:
        raise ModelError(f"{name} has no single {USUAL} file; choose one: {_listed(name, sets)}")
    return _gguf(name, sets[fitting[0]])


def _with(sets: Mapping[str, list[RepoFile]], quantisation: str) -> list[str]:
    return [stem for stem, files in sets.items() if quantisation_of(files[0].path) == quantisation.upper()]


def _named(name: str, found: Mapping[str, RepoFile], sets: Mapping[str, list[RepoFile]], what: str) -> Choice:
    lower = what.lower()
    if lower.endswith((".gguf", ".m")):
        paths = [path for path in found if lower in (path.lower(), PurePosixPath(path).name.lower())]
        if len(paths) == 1 and lower.endswith(".m"):
            return _distributed_llama(name, found, paths[0])
        stems = [stem for stem, files in sets.items() if any(file.path in paths for file in files)]
    else:
        stems = _with(sets, what) or _with(sets, f"UD-{what}")
    if len(stems) == 1:
        return _gguf(name, sets[stems[0]])
    if stems:
        raise ModelError(f"{name} has several files for {what}; choose one: {_by_file(name, sets, stems)}")
    if not sets:
        raise ModelError(f"{name} has no GGUF files to choose {what!r} from; leave out :{what}")
    known = {(quantisation_of(files[0].path) or files[0].path).lower(): files[0].path for files in sets.values()}
    near = difflib.get_close_matches(lower, known, 1)
    hint = f" (nearest: {(quantisation_of(known[near[0]]) or known[near[0]])})" if near else ""
    raise ModelError(f"{name} has no {what}{hint}; choose one: {_listed(name, sets)}")


def _told(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _listed(name: str, sets: Mapping[str, list[RepoFile]]) -> str:
    """Return the choices by quantisation, or by file where that does not tell them apart."""
    labels = [quantisation_of(files[0].path) for files in sets.values()]
    if None in labels or len(set(labels)) < len(labels):
        return _by_file(name, sets, list(sets))
    each = sorted(
        (sum(file.size or 0 for file in files), str(quantisation_of(files[0].path))) for files in sets.values()
    )
    return _cut([f"{label} ({_told(size)})" for size, label in each])


def _by_file(name: str, sets: Mapping[str, list[RepoFile]], stems: Sequence[str]) -> str:
    return _cut([f"{sets[stem][0].path} ({_told(sum(file.size or 0 for file in sets[stem]))})" for stem in stems])


def _cut(shown: list[str]) -> str:
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


# ---- Distributed Llama, and what cannot be run


def _distributed_llama(name: str, found: Mapping[str, RepoFile], model: str | None = None) -> Choice:
    """Return a .m file and the tokenizer beside it; else say what the repository has instead."""
    weights = [path for path in found if path.endswith(".m")] if model is None else [model]
    tokenizers = [path for path in sorted(found) if path.endswith(".t")]
    if len(weights) == 1 and tokenizers:
        return Choice((*(found[path] for path in tokenizers), found[weights[0]]), weights[0], weights[0])
    if tokenizers:
        raise ModelError(f"{name} has Distributed Llama's model in pieces, which are not joined here; use a GGUF of it")
    reasons = {
        ("adapter_config.json",): "an adapter (LoRA) alone; give the model that it was merged into",
        (".bin", ".pth", ".pt", ".ckpt"): "weights as PyTorch pickles alone; look for an upload as safetensors or GGUF",
        (".onnx",): "ONNX alone; look for an upload as safetensors or GGUF",
        (".safetensors",): "safetensors, but no model.safetensors or index of one; it is not a language model's upload",
    }
    for ends, reason in reasons.items():
        if any(path.endswith(ends) for path in found):
            raise ModelError(f"{name} has {reason}")
    raise ModelError(f"{name} has no model: neither safetensors nor GGUF")
