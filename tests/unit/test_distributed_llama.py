"""Distributed Llama's models against the directories and GGUF files with the same weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.cli import main
from dllama_mpi.errors import ModelError, UsageError
from dllama_mpi.model.tensors import Kind, tensors
from dllama_mpi.startup.opening import has_weights, load_tokenizer, model_config, open_model
from dllama_mpi.weights.tiles import load_matrix
from tests.all_cases import ALL_CASES
from tests.dllama_files import (
    greedy,
    header_bytes,
    header_of,
    old_header_bytes,
    tokenizer_bytes,
    tokens_of,
    write_m,
)
from tests.gguf_files import Floats, write_gguf
from tests.one_rank import OneRank
from tests.tiers import all_but

from .tiny_tokenizers import byte_level_after

LLAMA = ALL_CASES["llama31"]
IDS = np.random.default_rng(1).integers(0, 100, 40).tolist()


def logits(path: Path, **options: Any) -> np.ndarray:
    """Return a model's logits."""
    return OneRank(path, nthreads=1, max_seq_len=64, quiet=True, **options).logits(IDS)


@pytest.mark.parametrize(
    ("name", "old"),
    all_but(
        [("llama31", False), ("qwen3_moe", False)],
        [(name, False) for name in ("llama2", "llama31", "llama32_tied", "qwen3", "qwen3_moe")] + [("llama2", True)],
    ),
)
def test_logits_are_those_of_the_directory(name: str, old: bool, tmp_path: Path) -> None:
    case = ALL_CASES[name]
    if "rope_parameters" in case.config:  # as the converter wants it
        scaling = dict(case.config["rope_parameters"])
        more = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
        case = replace(case, config={k: v for k, v in case.config.items() if k != "rope_parameters"} | more)
    hf, path = write_m(case, tmp_path, old=old)
    other = write_gguf(case, tmp_path)[1]
    found = logits(path, weights="f32")
    assert np.abs(found).max() > 1
    np.testing.assert_allclose(found, logits(hf, weights="f32"), atol=2e-5)
    np.testing.assert_allclose(found, logits(other, weights="f32"), atol=1e-4)


def is_plain(name: str) -> bool:
    """Return whether a tensor is F32 whatever the type of the matrices."""
    return "ffn_gate_inp" in name or "token_embd" in name


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("name", ["llama31", "qwen3_moe"])
def test_blocks_are_kept(name: str, kind: str, tmp_path: Path) -> None:
    def of(name: str, values: Floats) -> str:
        return "F32" if is_plain(name) else kind

    path, other = write_m(ALL_CASES[name], tmp_path, kind)[1], write_gguf(ALL_CASES[name], tmp_path, of)[1]
    opened, theirs = open_model(str(path)), open_model(str(other))
    formats = opened.formats(None if kind != "F16" else "f16")
    expected = {"Q4_0": "q40", "Q8_0": "q80", "F16": "f16"}[kind]
    for spec in tensors(opened.config):
        if spec.kind is not Kind.MATRIX:
            continue
        assert formats[spec.name].name == ("f16" if spec.role == "router" else expected)
        whole = tuple((0, n) for n in spec.shape)
        made = [load_matrix(each.whole[spec.name], spec.shape, whole, formats[spec.name]) for each in (opened, theirs)]
        np.testing.assert_array_equal(made[0].tiles, made[1].tiles)
        assert made[0].tiles.any()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q8_0"])
def test_old_headers_have_the_type_that_fits(kind: str, tmp_path: Path) -> None:
    old, new = (write_m(ALL_CASES["llama2"], tmp_path / str(old), kind, old)[1] for old in (True, False))
    opened = [open_model(str(path)) for path in (old, new)]
    assert opened[0].config == opened[1].config
    assert opened[0].formats(None) == opened[1].formats(None)


def test_a_folder_with_one_is_a_model(tmp_path: Path) -> None:
    path = write_m(LLAMA, tmp_path / "x", "Q4_0")[1]
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "notes.m").write_text("% a program of another kind")
    assert not (tmp_path / "empty").exists()
    path.rename(folder / "a.m")
    assert has_weights(folder)
    assert open_model(str(folder)).folder == folder / "a.m"
    assert model_config(str(folder / "a.m")) == open_model(str(folder)).config
    (folder / "b.m").write_bytes((folder / "a.m").read_bytes())
    with pytest.raises(ModelError, match=r"holds 2 models of Distributed Llama; name one: a\.m, b\.m"):
        open_model(str(folder))


def changed(data: bytes, kind: str = "Q4_0", **values: int | None) -> bytes:
    """Return a file whose header has other values, by key as k3=5, or lacks one."""
    head = header_of(LLAMA.config, kind)
    given = {int(key[1:]): value for key, value in values.items()}
    kept = {key: value for key, value in {**head, **given}.items() if value is not None}
    return header_bytes(kept) + data[len(header_bytes(head)) :]


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", "ends within its header, at byte 0"),
    "three bytes": (lambda data: data[:3], "ends within its header, at byte 3"),
    "text": (lambda data: b"function y = f(x)", r"not a model of Distributed Llama \(it begins with 0x636e7566\)"),
    "half a header": (lambda data: data[:60], "ends within its header, at byte 60"),
    "a long header": (lambda data: header_bytes({}, 1 << 30) + data, "tells of a header of 1073741824 bytes"),
    "an odd header": (lambda data: header_bytes({}, 13) + data, "tells of a header of 13 bytes"),
    "a negative header": (lambda data: header_bytes({}, -8) + data, "tells of a header of -8 bytes"),
    "no keys": (lambda data: header_bytes({}), "the header has no dim"),
    "one byte less": (lambda data: data[:-1], "bytes, and its header implies [0-9]+ with Q4_0 weights"),
    "one byte more": (lambda data: data + b"x", "bytes, and its header implies [0-9]+ with Q4_0 weights"),
    "half": (lambda data: data[: len(data) // 2], "bytes, and its header implies [0-9]+ with Q4_0 weights"),
    "another type": (lambda data: changed(data, k13=3), "bytes, and its header implies [0-9]+ with Q8_0 weights"),
    "no known type": (lambda data: changed(data, k13=7), "weights_float_type is 7; known are 0 to 3"),
    "a key": (lambda data: changed(data, k77=1), r"the header has key 77 \(value 1\), known are 0 to 21"),
    "layers": (lambda data: changed(data, k4=1 << 30), "n_layers is 1073741824; it must be from 1 to 1000"),
    "more layers": (lambda data: changed(data, k4=999), "its header implies"),
    "no layers": (lambda data: changed(data, k4=0), "n_layers is 0"),
    "a negative size": (lambda data: changed(data, k2=-64), "dim is -64"),
    "another size": (lambda data: changed(data, k3=192), "its header implies"),
    "no whole blocks": (lambda data: changed(data, k3=150), "hidden_dim has 150 columns, no whole blocks of 32"),
    "no vocabulary": (lambda data: changed(data, k9=None), "the header has no vocab_size"),
    "heads": (lambda data: changed(data, k5=5), "dim is 64, which 5 heads do not divide"),
    "an architecture": (lambda data: changed(data, k1=77), "arch_type is 0x4d, which is not supported"),
    "Grok": (lambda data: changed(data, k1=0xABCD01, k7=8), "Grok-1, which is not supported"),
    "old Grok": (lambda data: struct.pack("<i", 0xABCD01) + data, "Grok-1, which is not supported"),
    "Mixtral": (lambda data: changed(data, k1=0xABCD02, k7=8, k8=2), "Mixtral .*which is not supported"),
    "Llama with experts": (lambda data: changed(data, k7=8), "Llama with 8 experts, which is not supported"),
    "no experts": (lambda data: changed(data, k1=0xABCD02, k7=0, k21=32), "n_experts is 0; it must be from 1"),
    "GELU": (lambda data: changed(data, k11=0), r"hidden_act is 0 \(GELU\); supported: 1"),
    "a rope": (lambda data: changed(data, k18=9), "rope_type is 9; supported: 0, 1, 2"),
    "half a scaling": (lambda data: changed(data, k15=None), "a scaled rope and no rope_scaling_low_freq_factor"),
    "an epsilon": (lambda data: changed(data, k20=12), "norm_epsilon is 12; supported: 5, 6"),
    "a version": (lambda data: changed(data, k0=3), "version is 3; supported: 0"),
    "an old header": (
        lambda data: old_header_bytes(LLAMA.config),
        "implies [0-9]+ with F32 weights or .* Q8_0 weights",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    path = write_m(LLAMA, tmp_path, "Q4_0")[1]
    path.write_bytes(make(path.read_bytes()))
    with pytest.raises(ModelError, match=message) as caught:
        open_model(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_header_takes_no_memory(tmp_path: Path) -> None:
    """Four million experts' tensors are counted, not listed."""
    head = header_of(ALL_CASES["qwen3_moe"].config, "Q4_0") | {4: 1000, 7: 4096}
    path = tmp_path / "x.m"
    path.write_bytes(header_bytes(head) + bytes(1000))
    with pytest.raises(ModelError, match="its header implies"):
        open_model(str(path))


def test_any_header_is_read_or_refused(tmp_path: Path) -> None:
    path, rng = write_m(LLAMA, tmp_path, "Q4_0")[1], np.random.default_rng(2)
    data, refused = path.read_bytes(), 0
    for _ in range(150):
        changes = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            changes[rng.integers(0, len(header_bytes(header_of(LLAMA.config, "Q4_0"))))] = rng.integers(0, 256)
        path.write_bytes(changes)
        try:
            open_model(str(path))
        except ModelError:
            refused += 1
    assert refused > 100


# ---- with a tokenizer


def write_pair(folder: Path, kind: str = "Q4_0") -> tuple[Path, list[bytes]]:
    """Write a Qwen3 of a tokenizer's size and that tokenizer; return the .m file and the tokens."""
    backend = byte_level_after()
    size = backend.get_vocab_size()
    case = ALL_CASES["qwen3"]
    path = write_m(replace(case, config={**case.config, "vocab_size": size + 8}), folder, kind)[1]
    tokens = tokens_of(backend)
    first = tokens.index(b"<|begin|>")
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}<|start|>"
    (folder / "model.t").write_bytes(tokenizer_bytes(tokens, first, [first + 1, first + 2], template=template))
    return path, tokens


def test_the_tokenizer_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, tokens = write_pair(tmp_path)
    first = tokens.index(b"<|begin|>")
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    assert tokenizer.encode("Once upon") == [first, *greedy(tokens, first, "Once upon")]
    assert tokenizer.stop_ids >= {first + 1, first + 2}
    (tmp_path / "other.t").write_bytes((tmp_path / "model.t").read_bytes())
    with pytest.raises(
        ModelError, match=r"2 tokenizers of Distributed Llama; give one by --tokenizer: model\.t, other"
    ):
        load_tokenizer(path)
    assert load_tokenizer(path, str(tmp_path / "other.t")) is not None
    for name in ("model.t", "other.t"):
        (tmp_path / name).unlink()
    assert load_tokenizer(path) is None
    small = write_m(ALL_CASES["qwen3"], tmp_path / "small")[1]
    (tmp_path / "small" / "x.t").write_bytes(tokenizer_bytes(tokens, first, [first + 1]))
    with pytest.raises(ModelError, match=rf"x\.t has {len(tokens)} tokens, and the model 186; give the tokenizer that"):
        load_tokenizer(small)
    assert main(["generate", "--model", str(small), "--prompt", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_a_converted_model_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = write_pair(tmp_path)
    assert main(["convert", str(path), str(tmp_path / "made")]) == 0
    (tmp_path / "alone.t").write_bytes((tmp_path / "model.t").read_bytes())
    (tmp_path / "model.t").unlink()
    assert main(["convert", str(path), str(tmp_path / "given"), "--tokenizer", str(tmp_path / "alone.t")]) == 0
    (tmp_path / "alone.t").rename(tmp_path / "away")
    assert main(["convert", str(path), str(tmp_path / "without")]) == 0
    assert "has no tokenizer beside it" in capsys.readouterr().err
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    expected, own = logits(path), load_tokenizer(path, str(tmp_path / "away"))
    assert own is not None
    path.unlink()
    for name in ("made", "given", "without"):
        np.testing.assert_array_equal(logits(tmp_path / name), expected)
    for name in ("made", "given"):
        made = load_tokenizer(tmp_path / name)
        assert made is not None
        for text in ("Once upon a time", "<|start|>über 12"):
            assert made.encode(text) == own.encode(text)
        assert (made.stop_ids, made.bos_id, made.eos_ids) == (own.stop_ids, own.bos_id, own.eos_ids)
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["chat_template"] == own.templates["default"]
    with pytest.raises(UsageError, match="is a folder, whose own tokenizer is copied"):
        open_model(str(tmp_path / "made")).small_files(str(tmp_path / "away"))


def test_info_shows_header_and_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, tokens = write_pair(tmp_path)
    assert main(["info", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    own, first = report["distributed_llama"], tokens.index(b"<|begin|>")
    assert report["stored_as"] == "Distributed Llama"
    assert own["metadata"]["arch_type"] == "0xabcd01 (qwen3)"
    assert own["metadata"]["head_dim"] == 32
    assert {each["type"]: each["tensors"] for each in own["tensor_types"]} == {"F32": 10, "Q4_0": 15}
    assert own["special_tokens"]["bos"] == f"{first} '<|begin|>'"
    assert own["special_tokens"]["eos1"].startswith(f"{first + 2} ")
    assert own["chat_template"].startswith("{{ bos_token }}")
    (tmp_path / "model.t").rename(tmp_path / "elsewhere")
    assert main(["info", str(path), "--tokenizer", str(tmp_path / "elsewhere")]) == 0
    shown = capsys.readouterr().out
    assert "rope_theta = 1000000" in shown
    assert "<|begin|>" in shown
