"""What a host keeps of received weights: found by key, within a limit, oldest use first out, never what is in use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from dllama_mpi.errors import ModelError, UsageError
from dllama_mpi.weights import cache as module
from dllama_mpi.weights.cache import NoRoom, WeightCache, default_folder, folder_of
from dllama_mpi.weights.slices import SliceReader
from tests.unit.test_slices import Made

LARGE = 1 << 40


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Return a small model."""
    return Made(tmp_path)


def fill(cache: WeightCache, made: Made, key: str) -> Path:
    """Keep a slice, as if it had another key."""
    writer = cache.create(made.file, key, "name")
    reader = SliceReader(made.source, made.file)
    for index in range(len(made.file.entries)):
        for entry, start, data in reader.read(index):
            writer.write(entry, start, data)
    found = writer.finish()
    path = found.path  # type: ignore[attr-defined]
    assert path.name == f"name-{key}.safetensors"
    return Path(path)


def age(path: Path, seconds: float) -> None:
    """Make a file look as if it had not been used for so long."""
    used = path.stat().st_mtime - seconds
    os.utime(path, (used, used))


def names(cache: WeightCache) -> list[str]:
    """Return the keys that are kept."""
    return sorted(entry.path.stem.removeprefix("name-") for entry in cache.entries())


def test_what_is_kept_is_found_by_its_key(made: Made, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "deep" / "cache", LARGE)
    key = made.manifest.key(made.parts)
    assert cache.find(key) is None
    assert cache.entries() == []
    path = fill(cache, made, key)
    age(path, 1000)
    before = path.stat().st_mtime
    found = cache.find(key)
    assert found is not None
    assert found.path == path
    assert path.stat().st_mtime > before + 900  # used now
    assert cache.find("0" * 16) is None
    (entry,) = cache.entries()
    assert (entry.model, entry.weights, entry.about) == ("model", "q40", "rank 1 of 3")
    assert (entry.size, entry.in_use) == (made.file.size, True)
    del found
    assert not cache.entries()[0].in_use


def test_a_name_alone_does_not_make_a_key(made: Made, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", LARGE)
    fill(cache, made, "0" * 16)
    assert cache.find("0" * 16) is None


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_a_damaged_file_is_removed(damage: str, made: Made, tmp_path: Path) -> None:
    cache, key = WeightCache(tmp_path / "cache", LARGE), made.manifest.key(made.parts)
    path = fill(cache, made, key)
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-1], "header": data.replace(b"rank 1", b"rank 2", 1), "empty": b""}[damage])
    with pytest.raises(ModelError):
        cache.find(key)
    assert not path.exists()
    assert cache.find(key) is None


def test_those_not_used_for_longest_go_first(made: Made, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", 3 * made.file.size)
    for i, seconds in enumerate((100, 300, 200)):
        age(fill(cache, made, f"{i}"), seconds)
    fill(cache, made, "3")
    assert names(cache) == ["0", "2", "3"]
    fill(WeightCache(cache.folder, 2 * made.file.size), made, "4")
    assert names(cache) == ["3", "4"]


def test_what_is_in_use_stays(made: Made, tmp_path: Path) -> None:
    cache, key = WeightCache(tmp_path / "cache", 2 * made.file.size), made.manifest.key(made.parts)
    age(fill(cache, made, key), 500)
    age(fill(cache, made, "1"), 100)
    used = cache.find(key)
    assert used is not None
    age(used.path, 500)
    fill(cache, made, "2")
    assert names(cache) == ["2", key]
    with pytest.raises(NoRoom, match=r"0\.00 GB needed, the limit is 0\.00 GB"):
        WeightCache(cache.folder, made.file.size).create(made.file, "3", "name")
    assert names(cache) == ["2", key]  # nothing is removed in vain
    gone, kept = cache.clear()
    assert [entry.path.stem for entry in gone] == ["name-2"]
    assert [entry.path for entry in kept] == [used.path]
    assert used.path.exists()


def test_full_disk(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WeightCache(tmp_path / "cache")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "dllama_mpi.weights.cache.shutil.disk_usage", lambda _: usage(10**9, 10**9 - 50_000_000, 50_000_000)
    )
    with pytest.raises(NoRoom, match=r"0\.05 GB of the disk are free"):
        cache.create(made.file, "0", "name")
    assert cache.entries() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NoRoom, match="file"):
        WeightCache(tmp_path / "file" / "cache").create(made.file, "0", "name")


def test_default_limit_is_half_of_the_disk_or_20_gb(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = made.file.size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module, "_MARGIN", 0)
    cache = WeightCache(tmp_path / "cache")
    age(fill(cache, made, "0"), 100)
    monkeypatch.setattr("dllama_mpi.weights.cache.shutil.disk_usage", lambda _: usage(9 * size, 7 * size, 2 * size))
    fill(cache, made, "1")  # half of 2 free and 1 taken: room for one
    assert names(cache) == ["1"]
    monkeypatch.setattr("dllama_mpi.weights.cache.shutil.disk_usage", lambda _: usage(10**15, 0, 10**15))
    monkeypatch.setattr(module, "DEFAULT_LIMIT", 2 * size)
    fill(cache, made, "2")
    age(cache.folder / "name-1.safetensors", 100)
    fill(cache, made, "3")
    assert names(cache) == ["2", "3"]


def test_nothing_half_written_is_found(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, key = WeightCache(tmp_path / "cache", LARGE), made.manifest.key(made.parts)
    writer = cache.create(made.file, key, "name")
    assert cache.find(key) is None
    (entry,) = cache.entries()
    assert (entry.size, entry.in_use, entry.model) == (made.file.size, True, "")  # its room is taken at once
    writer.discard()
    assert cache.entries() == []


def test_what_a_killed_job_left_is_removed(made: Made, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", LARGE)
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.test_slices import Made\n"
        "from dllama_mpi.weights.cache import WeightCache\n"
        "made = Made(Path(sys.argv[1])); WeightCache(Path(sys.argv[2]), 1 << 40).create(made.file, 'a', 'name')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "other"), str(cache.folder)], cwd=root, check=False)
    (left,) = cache.entries()
    assert (left.path.suffix, left.in_use) == (".partial", False)
    fill(cache, made, "1")
    assert left.path.exists()  # it is young: where there are no locks somebody may be writing it
    age(left.path, 3600)
    fill(cache, made, "2")
    assert not left.path.exists()
    assert names(cache) == ["1", "2"]


def test_two_jobs_may_write_the_same_slice(made: Made, tmp_path: Path) -> None:
    cache, key = WeightCache(tmp_path / "cache", LARGE), made.manifest.key(made.parts)
    writer = cache.create(made.file, key, "name")
    path = fill(cache, made, key)
    content = path.read_bytes()
    reader = SliceReader(made.source, made.file)
    for index in range(len(made.file.entries)):
        for entry, start, data in reader.read(index):
            writer.write(entry, start, data)
    writer.finish()
    assert [entry.path for entry in cache.entries()] == [path]
    assert path.read_bytes() == content


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == folder_of(None) == tmp_path / "dllama_mpi" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "dllama_mpi" / "weights"
    assert folder_of("none") is None
    assert folder_of("~/mine") == tmp_path / "mine"


def test_a_folder_that_cannot_be_written(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WeightCache(tmp_path / "cache", LARGE)
    fill(cache, made, "1")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UsageError, match=r"--cache-dir .*: Permission denied; give one of your own"):
        cache.clear()
