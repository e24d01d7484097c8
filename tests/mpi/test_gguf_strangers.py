"""GGUF files that strangers made, on the command line with several ranks: one line, status 2, nobody left."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.all_cases import ALL_CASES
from tests.gguf_edit import Document, Value, build, number, numbers, text, texts
from tests.gguf_files import write_gguf
from tests.gguf_hostile import MERGES, TOKENS, changed, with_vocabulary
from tests.mpi import guard
from tests.mpi.launch import mpiexec, run_mark
from tests.mpi.pool import pool
from tests.mpi.test_failures import _assert_one_line
from tests.tiers import slow

Change = Callable[[Document], object]


def key(name: str, value: Value) -> Change:
    """Return what puts a key in."""
    return lambda document: document.keys.__setitem__(name.encode(), value)


def not_a_number(tensor: str, row: int) -> Change:
    """Return what makes the first scale of a row of a tensor in Q8_0 a NaN."""

    def change(document: Document) -> None:
        entry = document.tensor(tensor)
        rows, size = entry.dims[1], len(entry.data) // entry.dims[1]
        at = row % rows * size
        entry.data = entry.data[:at] + b"\xff\xff" + entry.data[at + 2 :]

    return change


def at_once(name: str, attribute: str, value: object) -> Change:
    """Return what changes one thing of a tensor."""
    return lambda document: setattr(document.tensor(name), attribute, value)


BYTES: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "truncated": (lambda data: data[:-1000], ("truncated, corrupt",)),
    "half a header": (lambda data: data[:500], ("truncated, corrupt",)),
    "count": (lambda data: data[:8] + struct.pack("<QQ", 2**63, 2**63) + data[24:], ("tells of", "tensors")),
    "4 GB": (lambda data: data[:24] + struct.pack("<Q", 1 << 32) + data[32:], ("a key has 4294967296 bytes",)),
}
DOCUMENTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "wrong types": (key("llama.block_count", text("many")), ("llama.block_count is many",)),
    "a list": (key("llama.attention.head_count", numbers("F32", [1.5, 2.5])), ("differs from layer to layer",)),
    "layers": (key("llama.block_count", number("U32", 2**31)), ("llama.block_count is 2147483648",)),
    "heads": (key("llama.attention.head_count", number("U64", 2**63)), ("num_attention_heads is 9223372036854775808",)),
    "large heads": (key("llama.attention.head_count_kv", number("U32", 2**14)), ("num_key_value_heads",)),
    "context": (key("llama.context_length", number("U64", 2**40)), ("max_position_embeddings is 1099511627776",)),
    "merges": (key(MERGES.decode(), texts(["a b", "b a", "ab a"])), ("merges", "does not go with the tokens")),
    "tokens": (key(TOKENS.decode(), texts(["a"] * 172)), ("tokens", "twice")),
    "special": (key("tokenizer.ggml.bos_token_id", number("U32", 2**31)), ("bos_token_id is 2147483648",)),
    "unknown type": (at_once("blk.0.attn_q.weight", "kind", 99), ("is of type 99",)),
    "overlapping": (at_once("blk.0.attn_q.weight", "start", 0), ("overlap",)),
    "beyond": (at_once("blk.0.attn_q.weight", "start", 1 << 40), ("ends at byte",)),
    "shape": (at_once("blk.0.attn_norm.weight", "dims", [64]), ("shape",)),
    "architecture": (key("general.architecture", text("\x1b[2Jmamba")), ("architecture '\\x1b[2Jmamba'",)),
    "scale of one rank": (not_a_number("blk.1.attn_q.weight", -1), ("NaN or infinite",)),
    "scale of all ranks": (not_a_number("blk.1.attn_output.weight", 3), ("NaN or infinite",)),
    "template": (key("tokenizer.chat_template", number("U32", 3)), ("chat_template is '3'; it must be a string",)),
}
WORDS = {what: words for what, (_, words) in [*BYTES.items(), *DOCUMENTS.items()]}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """Return a file with a vocabulary taken apart, its matrices in Q8_0."""
    case, folder = ALL_CASES["llama3_gqa"], tmp_path_factory.mktemp("good")
    case = replace(case, config=case.config | {"num_key_value_heads": 4})
    _, path = write_gguf(case, folder, lambda name, values: "Q8_0")
    return with_vocabulary(path, "gpt2", case.config["vocab_size"])


def written(what: str, good: Document, folder: Path) -> Path:
    """Write one of the files."""
    path = folder / "model.gguf"
    if what in BYTES:
        path.write_bytes(BYTES[what][0](build(good)))
    else:
        path.write_bytes(build(changed(good, DOCUMENTS[what][0])))
    return path


def test_the_good_file_runs(good: Document, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build(good))
    args = [
        "-m",
        "dllama_mpi",
        "--model",
        str(path),
        "--prompt",
        "ab",
        "--steps",
        "3",
        "--temperature",
        "0",
        "--nthreads",
        "1",
    ]
    outputs = [pool(ranks).run(args).stdout for ranks in (1, 3)]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("what", WORDS)
def test_a_bad_file(what: str, ranks: int, good: Document, tmp_path: Path) -> None:
    path = written(what, good, tmp_path)
    args = ["-m", "dllama_mpi", "--model", str(path), "--prompt", "ab", "--nthreads", "1"]
    done = pool(ranks).run(args, check=False)
    _assert_one_line(done, *WORDS[what])
    assert all(line.isprintable() for line in done.stderr.splitlines())
    if what == "scale of one rank" and ranks == 3:
        assert "rank 2 on " in done.stderr


def command_of(pid: int) -> list[str]:
    """Return the arguments of a process, none of one that has ended."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).cmdline()
    return []


@pytest.mark.parametrize("what", [slow("count"), slow("unknown type"), "scale of one rank"])
def test_a_job_of_its_own_leaves_nobody(what: str, good: Document, tmp_path: Path) -> None:
    path = written(what, good, tmp_path)
    args = ["-m", "dllama_mpi", "--model", str(path), "--prompt", "ab", "--nthreads", "1"]
    _assert_one_line(mpiexec(3, args, check=False), *WORDS[what])
    end = time.monotonic() + 60  # the launcher may be gone before the last rank is
    while left := [pid for pid in guard.marked(run_mark()) if str(path) in command_of(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.01)
