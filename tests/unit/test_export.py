"""Models as GGUF files: what is read back is what was written, or one line says why it cannot be written."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers

from dllama_mpi.architectures.gguf_check import check_config
from dllama_mpi.errors import ModelError, UsageError
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.config import ModelConfig
from dllama_mpi.model.recipe import WeightRecipe, whole_parts
from dllama_mpi.model.tensors import TABLE, Kind, TensorSpec, tensors
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.startup.exporting import Export
from dllama_mpi.startup.model_files import METADATA
from dllama_mpi.startup.opening import DEMO, load_tokenizer, open_model
from dllama_mpi.text.gguf_tokenizer import PRE, TEMPLATE, gguf_tokenizer
from dllama_mpi.text.gguf_vocabulary import vocabulary_keys
from dllama_mpi.text.pretokenizers import PRE_TOKENIZERS
from dllama_mpi.text.tokenizer import Tokenizer
from dllama_mpi.weights.convert import Conversion, convert
from dllama_mpi.weights.gguf import GgufFile
from dllama_mpi.weights.source import WeightSource
from dllama_mpi.weights.tiles import load_matrix, load_vector, read_rows
from tests.all_cases import ALL_CASES
from tests.gguf_files import write_gguf
from tests.one_rank import OneRank
from tests.tiers import all_but
from tests.tiny_models.files import write_model
from tests.unit.conversions import run as convert_to
from tests.unit.test_gguf_models import CHANGES, changed
from tests.unit.test_gguf_models import NAMES as FAMILIES

from .gguf_metadata import byte_level_metadata, sentencepiece_metadata
from .tiny_tokenizers import HARD_TEXTS, SENTENCES, byte_level, sentencepiece, write_model_dir

NAMES = (*FAMILIES, "llama_yarn", "llama_bias", "mistral3", "granite_bias", "glm4_moe_groups", "qwen3_5", "qwen3_5_moe")
QUICK = ("llama31", "gemma3_text", "phi4_mini")


def export(model: Path | str, path: Path, kind: str | None = None, with_tokenizer: bool = True) -> Path:
    """Write a file and return it."""
    Export(open_model(str(model)), kind, with_tokenizer).write(path, True)
    return path


def values_of(source: WeightSource, config: ModelConfig, spec: TensorSpec) -> np.ndarray:
    """Return all of a tensor as float32."""
    tensor = source[spec.name if spec.name in source else TABLE]
    if spec.kind is Kind.VECTOR:
        return load_vector(tensor, spec.shape, tuple((0, size) for size in spec.shape))
    rows, cols = spec.shape[-2:]
    out = np.zeros((spec.experts, rows, cols), np.float32)
    for expert in range(spec.experts):
        read_rows(tensor, expert, (0, rows), (0, cols), out[expert])
    return out.reshape(spec.shape)


def pairs(one: Path, other: Path) -> Iterator[tuple[TensorSpec, np.ndarray, np.ndarray]]:
    """Yield every tensor of two models of one shape."""
    first, second = open_model(str(one)), open_model(str(other))
    for spec in tensors(first.config):
        yield spec, values_of(first.whole, first.config, spec), values_of(second.whole, second.config, spec)


# ---- what is read back


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_the_directory(name: str, tmp_path: Path) -> None:
    source = write_model(changed(name), tmp_path / "hf")
    file = export(source, tmp_path / "m.gguf")
    for spec, own, read in pairs(source, file):
        exact = spec.kind is Kind.VECTOR and not spec.name.endswith("A_log")
        np.testing.assert_allclose(read, own, rtol=0 if exact else 2**-11, atol=0 if exact else 1e-6, err_msg=spec.name)
    assert check_config(open_model(str(source)).config, open_model(str(file)).config) == ""


@pytest.mark.parametrize("name", all_but(QUICK, NAMES))
def test_logits_are_those_of_the_directory(name: str, tmp_path: Path) -> None:
    case = changed(name)
    source = write_model(case, tmp_path / "hf")
    ids = np.random.default_rng(1).integers(0, 90, 24).tolist()
    options: dict[str, Any] = {"weights": "f16", "nthreads": 1, "max_seq_len": 64, "quiet": True}
    found = [OneRank(path, **options).logits(ids) for path in (source, export(source, tmp_path / "m.gguf"))]
    assert np.abs(found[0]).max() > 1
    off = np.abs(found[1] - found[0])  # float16 has 11 bits
    assert off.mean() < 0.02
    assert off.max() < 0.3


def test_names_are_those_that_the_converter_writes(tmp_path: Path) -> None:
    for name in ("llama31", "phi3_longrope", "gpt_oss_bf16", "qwen3_5_moe_text", "lfm2", "glm4_moe", "qwen3_next"):
        source, theirs = write_gguf(changed(name), tmp_path / name)
        ours = GgufFile(export(source, tmp_path / f"{name}.gguf"))
        expected = GgufFile(theirs)
        shapes = [
            {each.name.removesuffix(".weight"): each.shape for each in f.tensors.values()} for f in (ours, expected)
        ]
        assert shapes[0] == shapes[1], name
        assert {key for key in expected.metadata if not key.endswith("rope.scaling.type")} <= set(ours.metadata), name


@pytest.mark.parametrize(("weights", "kind"), [("q40", "Q4_0"), ("q80", "Q8_0"), ("iq4nl", "IQ4_NL")])
def test_codes_of_a_converted_model_are_kept(weights: str, kind: str, tmp_path: Path) -> None:
    converted = convert_to(DEMO, tmp_path / "converted", weights)
    file = export(converted, tmp_path / "m.gguf")
    one, other = open_model(str(converted)), open_model(str(file))
    assert GgufFile(file).tensors["blk.0.attn_q.weight"].type.name == kind
    assert GgufFile(file).tensors["token_embd.weight"].type.name == "Q8_0"
    fmt = FORMATS[weights]
    for spec in tensors(one.config):
        if spec.kind is Kind.MATRIX and spec.role != "lm_head":
            whole = tuple((0, size) for size in spec.shape)
            tiles = [load_matrix(each.whole[spec.name], spec.shape, whole, fmt).tiles for each in (one, other)]
            assert tiles[0].tobytes() == tiles[1].tobytes(), spec.name
    assert export(file, tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_published_mxfp4_is_kept(tmp_path: Path) -> None:
    case = ALL_CASES["gpt_oss"]
    case = replace(case, config=case.config | CHANGES["gpt_oss_bf16"])
    source = write_model(case, tmp_path / "hf")
    for kind in (None, "q4_0"):
        file = export(source, tmp_path / f"{kind}.gguf", kind)
        assert GgufFile(file).tensors["blk.0.ffn_up_exps.weight"].type.name == "MXFP4"
        for spec, own, read in pairs(source, file):
            if "experts" in spec.name and spec.kind is Kind.MATRIX:
                np.testing.assert_array_equal(read, own, err_msg=spec.name)


def test_formats_that_gguf_has_not_become_eight_bits(tmp_path: Path) -> None:
    made = Export(open_model(str(convert_to(DEMO, tmp_path / "q4m", "q4m"))))
    assert made.requantised().startswith("q4m: no type that is written here has these codes; Q8_0 holds their values")
    made.write(tmp_path / "m.gguf", False)
    for spec, own, read in pairs(tmp_path / "q4m", tmp_path / "m.gguf"):
        if spec.kind is Kind.MATRIX and spec.role != "lm_head":
            assert np.square(read - own).mean() < 1e-4 * np.square(own).mean(), spec.name


@pytest.mark.parametrize(("kind", "name", "bits"), [("q4_0", "Q4_0", 5.1), ("q8_0", "Q8_0", 8.5), ("f16", "F16", 16)])
def test_types(kind: str, name: str, bits: float, tmp_path: Path) -> None:
    made = Export(open_model("demo"), kind)
    size = made.write(tmp_path / "m.gguf", False)
    assert size == (tmp_path / "m.gguf").stat().st_size
    assert made.bits == pytest.approx(bits, abs=0.01)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")  # by another hand
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.4.ffn_down.weight"] == name
    assert kinds["blk.4.ffn_norm.weight"] == "F32"
    assert "output.weight" not in kinds
    values = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for spec, _, read in pairs(DEMO, tmp_path / "m.gguf"):
        if spec.name == "model.layers.1.mlp.up_proj.weight":
            np.testing.assert_array_equal(read, values["blk.1.ffn_up.weight"])


# ---- metadata


def test_metadata_of_gguf_files_are_copied(tmp_path: Path) -> None:
    _, file = write_gguf(changed("llama31"), tmp_path)
    metadata = {"tokenizer.ggml.model": "none", "general.license": "mit", "general.tags": ["a", "b"]}
    source = tmp_path / "with.gguf"
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(source, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for key, value in metadata.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    writer.add_uint64("general.odd", 1 << 40)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    direct = GgufFile(export(source, tmp_path / "direct.gguf", "q8_0"))
    folder, opened = tmp_path / "folder", open_model(str(source))
    formats = WeightRecipe.parse("q80").formats(opened.config)
    conversion = Conversion(opened.whole, formats, whole_parts(opened.config), False, opened.small_files())
    convert(conversion, folder, TensorParallelGroup(None))
    assert (folder / METADATA).is_file()
    through = GgufFile(export(folder, tmp_path / "through.gguf"))
    old = GgufFile(source).metadata
    for new in (direct, through):
        for key in old:
            if not key.startswith("general.file_type"):
                assert np.array_equal(new.metadata[key], old[key]), key
                assert new.metadata.kind(key) == old.kind(key), key
        assert new.metadata["general.file_type"] == 7
        assert "rope_freqs.weight" in new.tensors


# ---- tokenizers


def same_tokens(folder: Path, file: Path) -> None:
    one, other = load_tokenizer(folder), load_tokenizer(file)
    assert one is not None
    assert other is not None
    for text in (*HARD_TEXTS, *SENTENCES, "x<|end|>y", "a</s> b"):
        assert other.encode(text) == one.encode(text), text
        assert other.decode(one.encode(text)) == one.decode(one.encode(text)), text
    assert (other.bos_id, other.eos_ids[0]) == (one.bos_id, one.eos_ids[0])
    assert other.stop_ids >= one.stop_ids


@pytest.mark.parametrize("kind", ["bytes", "marks"])
def test_tokenizer_is_read_back(kind: str, tmp_path: Path) -> None:
    backend = byte_level() if kind == "bytes" else sentencepiece()
    case = ALL_CASES["llama2"]
    folder = write_model(replace(case, config=case.config | {"vocab_size": 400}), tmp_path / "hf")
    settings = {
        "bos_token": "<|begin|>" if kind == "bytes" else "<s>",
        "add_bos_token": True,
        "chat_template": "{{ 1 }}",
    }
    settings["eos_token"] = "<|end|>" if kind == "bytes" else "</s>"
    write_model_dir(folder, backend, tokenizer_config=settings)
    file = export(folder, tmp_path / "m.gguf")
    same_tokens(folder, file)
    metadata = GgufFile(file).metadata
    assert metadata[TEMPLATE] == "{{ 1 }}"
    assert len(metadata["tokenizer.ggml.tokens"]) == 400
    assert metadata["tokenizer.ggml.token_type"][399] == 5
    assert "tokenizer.ggml.tokens" not in GgufFile(export(folder, tmp_path / "n.gguf", None, False)).metadata


def test_tokenizer_of_the_demo_is_read_back(tmp_path: Path) -> None:
    same_tokens(DEMO, export("demo", tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_names_of_ways_to_cut_words(name: str) -> None:
    metadata = byte_level_metadata(name, ("the", " the"))
    metadata["tokenizer.ggml.tokens"] += ["[gMASK]", "<sop>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    keys, said = vocabulary_keys(gguf_tokenizer(metadata, "here"), 400, "llama")
    found, expected = PRE_TOKENIZERS[keys[PRE]], PRE_TOKENIZERS[name]
    assert replace(found, add_bos=False) == replace(expected, add_bos=False)
    assert said == ""


@pytest.mark.parametrize("prefixed", [True, False])
def test_scores_join_what_merges_join(prefixed: bool) -> None:
    made = gguf_tokenizer(sentencepiece_metadata(add_space_prefix=prefixed), "here")
    keys, _ = vocabulary_keys(made, 272, "llama")
    again = gguf_tokenizer(keys, "there")
    for text in (*HARD_TEXTS, "abc a ab  bc", "a<table>b<end_of_turn>c"):
        assert again.encode(text) == made.encode(text)


def test_spaces_beside_special_tokens_are_told() -> None:
    said = vocabulary_keys(Tokenizer(sentencepiece(metaspace=True), {"bos_token": "<s>"}), 400, "llama")[1]
    assert said.startswith("spaces at the beginning of texts and beside special tokens will be read in another way")


def _other_words() -> tokenizers.Tokenizer:
    backend = byte_level()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[a-z]+"), "isolated")
    last = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, last])
    return backend


def _lower() -> tokenizers.Tokenizer:
    backend = sentencepiece()
    backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), backend.normalizer])
    return backend


@pytest.mark.parametrize(
    ("backend", "size", "message"),
    [
        (_other_words, 400, "cuts words in a way that GGUF has no name for; --without-tokenizer"),
        (_lower, 400, "treats spaces in a way that GGUF has no words for"),
        (lambda: tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")), 9, "is a WordLevel, not a BPE"),
        (byte_level, 300, "has 330 tokens, and the model's table 300 rows"),
    ],
)
def test_tokenizers_that_are_refused(backend: Any, size: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        vocabulary_keys(Tokenizer(backend()), size, "llama")


# ---- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama_dynamic", "rope scaling 'dynamic' cannot be exported"),
        ("llama_yarn_attention_factor", "has no words for layers.0.mixer.rope of type yarn with its parameters"),
        ("gemma3", "has no words for layers.0.mixer.scale 0.0625"),
        ("olmo2_bias", "self_attn.o_proj.bias has no place among the tensors of GGUF's olmo2"),
        ("lfm2_bias", "conv.b_proj.bias has no place among the tensors of GGUF's lfm2"),
        ("qwen2_moe_mixed", "mlp.gate_proj.weight has no place among the tensors of GGUF's qwen2moe"),
        ("olmoe_clip", "has no words for layers.0.feed.normalised True; it would be read as False"),
    ],
)
def test_models_that_are_refused(name: str, message: str, tmp_path: Path) -> None:
    source = write_model(ALL_CASES[name], tmp_path / "hf")
    with pytest.raises(ModelError, match=message) as raised:
        export(source, tmp_path / "m.gguf")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_unknown_family() -> None:
    opened = open_model("demo")
    with pytest.raises(ModelError, match=r"mamba cannot be exported; can be: ernie4_5, gemma2, .*qwen3"):
        Export(replace(opened, config=replace(opened.config, model_type="mamba"))).keys()


def test_package_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="written with the package gguf: pip install"):
        Export(open_model("demo")).keys()


@pytest.mark.parametrize(("name", "arch"), [("mistral", "llama"), ("qwen2_sliding", "qwen2"), ("phi3", "phi3")])
def test_windows_that_llama_cpp_has_not_are_told(
    name: str, arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(write_model(ALL_CASES[name], tmp_path / "hf"), tmp_path / "m.gguf")
    assert capsys.readouterr().err.startswith(f"llama.cpp's {arch} has no windows: from position 1")


def refused(path: Path, message: str) -> None:
    before = {each.name for each in path.parent.iterdir()}
    with pytest.raises(UsageError, match=message):
        export("demo", path)
    assert {each.name for each in path.parent.iterdir()} == before


def test_destinations_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.gguf").write_text("mine")
    refused(tmp_path / "there.gguf", "exists; remove it or give another file")
    (tmp_path / "other.gguf.partial").write_text("mine")
    refused(tmp_path / "other.gguf", "is in the way and no export's leftover")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("dllama_mpi.weights.gguf_write.shutil.disk_usage", lambda _: usage(10**9, 10**9, 20_000))
    refused(tmp_path / "full.gguf", r"needs 0\.01 GB, and 0\.00 GB are free in .*; free space")


def test_what_fails_leaves_nothing_and_a_leftover_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Iterator[np.ndarray]:
        yield np.zeros(4, np.uint8)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dllama_mpi.startup.exporting.pieces", fail)
        with pytest.raises(KeyboardInterrupt):
            export("demo", tmp_path / "m.gguf")
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "m.gguf.partial").write_bytes(b"GGUF of a run that was killed")
    export("demo", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_values_that_float16_has_not(tmp_path: Path) -> None:
    source = write_model(ALL_CASES["llama2"], tmp_path / "hf")
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0]
    data[start : start + 4] = np.float32(70000).tobytes()
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"up_proj.weight has values above 65504, which F16 cannot hold; give --type"):
        export(source, tmp_path / "m.gguf")
