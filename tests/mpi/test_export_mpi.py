"""Exporting with several ranks: the root writes the file alone, and one line says what cannot be."""

from __future__ import annotations

from pathlib import Path

from dllama_mpi.startup.exporting import Export
from dllama_mpi.startup.opening import open_model
from tests.mpi.pool import pool


def test_two_ranks_write_what_one_writes(tmp_path: Path) -> None:
    file = tmp_path / "two.gguf"
    ended = pool(2).run(["-m", "dllama_mpi", "export", "demo", str(file), "--type", "q8_0"])
    lines = ended.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{file}: 3.8 MB, 8.50 bits a weight, ")
    Export(open_model("demo"), "q8_0").write(tmp_path / "one.gguf", False)
    assert file.read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_mistakes_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "file").write_text("")
    for destination, message in (
        ("there.gguf", "exists; remove it or give another file"),
        ("model", "does not end with .gguf; give the name of the file to write"),
        ("file/m.gguf", "mend that, or give another file"),
    ):
        ended = pool(2).run(["-m", "dllama_mpi", "export", "demo", str(tmp_path / destination)], check=False)
        assert ended.returncode == 2
        assert [message in line for line in ended.stderr.splitlines()] == [True], ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there.gguf"]
