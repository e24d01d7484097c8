"""Tokenizers: every text survives a round trip, BOS comes once, every end token is known, errors name the remedy."""

# ruff: noqa: RUF001 - DeepSeek's tokens are written with full-width bars

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from dllama_mpi.errors import DllamaError, RequestError
from dllama_mpi.text.tokenizer import Tokenizer

from .tiny_tokenizers import HARD_TEXTS, SENTENCES, byte_level, sentencepiece, write_model_dir

BACKENDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": functools.partial(sentencepiece, metaspace=True),
}


@pytest.fixture(params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(BACKENDS[request.param]())


# --- text to tokens and back ---


@pytest.mark.parametrize("text", HARD_TEXTS + SENTENCES)
def test_round_trip(text: str) -> None:
    for backend in (byte_level(), sentencepiece()):
        tokenizer = Tokenizer(backend)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", HARD_TEXTS + SENTENCES)
def test_decodes_as_the_library(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for skip in (True, False):
        ours, theirs = tokenizer.decode(ids, skip), tokenizer._backend.decode(ids, skip_special_tokens=skip)
        if tokenizer.leading_spaces:  # the library's Metaspace drops all spaces of the first token, sentencepiece one
            ours, theirs = ours.lstrip(" "), theirs.lstrip(" ")
        assert ours == theirs


def test_byte_level_decodes_any_ids_as_the_library() -> None:
    backend = byte_level()
    tokenizer = Tokenizer(backend)
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(30))]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


def test_valid_characters_survive_beside_a_broken_byte() -> None:
    ids = [3 + byte for byte in "好".encode()] + [3 + 0xFF]
    assert Tokenizer(sentencepiece()).decode(ids) == "好\ufffd"


def test_leading_space_is_the_tokenizers_own_only_at_the_start() -> None:
    tokenizer = Tokenizer(sentencepiece())
    once, a = tokenizer.encode("Once a", add_special_tokens=False)
    assert [tokenizer.token_text(token) for token in (once, a)] == [" Once", " a"]
    assert tokenizer.decode([once, a]) == "Once a"
    assert tokenizer.decode([1, once]) == "Once"
    assert tokenizer.decode([1, once], skip_special_tokens=False) == "<s> Once"


def test_gemma_keeps_its_leading_space() -> None:
    backend = sentencepiece()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode(" the dog")) == " the dog"


def test_word_level_without_decoder_joins_by_spaces() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert Tokenizer(backend).decode([0, 1, 1]) == backend.decode([0, 1, 1]) == "a b b"


def test_added_token_outside_the_byte_alphabet_is_shown_as_written() -> None:
    backend = byte_level()
    backend.add_tokens(["<｜User｜>", "a b"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("x<｜User｜>a b")) == "x<｜User｜>a b"
    assert tokenizer.added_tokens["<｜User｜>"] == tokenizer.vocab_size - 2


def test_ids_outside_the_vocabulary_add_nothing() -> None:
    tokenizer = Tokenizer(byte_level())
    padded = [tokenizer.vocab_size + 5, *tokenizer.encode("dog"), -1]
    assert tokenizer.decode(padded) == "dog"


def test_half_a_surrogate_pair_is_a_users_error() -> None:
    with pytest.raises(DllamaError, match=r"character 2 .*\\ud83d.*UTF-8"):
        Tokenizer(byte_level()).encode("ab\ud83d")


@pytest.mark.parametrize("expression", ["(a|aa)+$", "(a+)+$"])
def test_an_expression_that_takes_too_long(expression: str, tmp_path: Path) -> None:
    """The library gives up by a panic, which is no Exception: a stranger's expression must not end the program."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "!": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    backend.decoder = decoders.Fuse()
    write_model_dir(tmp_path, backend)
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(RequestError, match="gives up on this text"):
        tokenizer.encode("a" * 50 + "!")
    assert tokenizer.encode("a!") == [0, 1]


def test_unknown_decoder_is_refused() -> None:
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(DllamaError, match=r"WordPiece.*--tokenizer"):
        Tokenizer(backend)


def test_truncation_and_padding_of_the_file_are_off() -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]
    assert tokenizer.encode("dog") == Tokenizer(byte_level()).encode("dog")


def test_an_entry_that_only_looks_like_a_byte_is_text() -> None:
    backend = sentencepiece()
    backend.add_tokens([AddedToken("<0xZZ>", normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_text(tokenizer.vocab_size - 1) == "<0xZZ>"


# --- BOS ---


def test_bos_by_post_processor(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path, sentencepiece(), tokenizer_config={"bos_token": "<s>"})
    tokenizer = Tokenizer.load(folder)
    plain = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.bos_id == 1
    assert 1 not in plain
    assert tokenizer.encode("the dog") == [1, *plain]
    assert tokenizer.encode("") == [1]


def test_bos_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_model_dir(tmp_path, sentencepiece(), tokenizer_config={"bos_token": "<s>"}))
    assert tokenizer.encode("<s>the dog").count(1) == 1
    assert tokenizer.encode("<s>the dog", add_special_tokens=False).count(1) == 1


@pytest.mark.parametrize(("add_bos", "expected"), [(True, True), (False, False), (None, False)])
def test_add_bos_token_where_the_post_processor_is_silent(tmp_path: Path, add_bos: bool | None, expected: bool) -> None:
    settings = {"bos_token": {"content": "<|begin|>"}, "add_bos_token": add_bos}
    tokenizer = Tokenizer.load(write_model_dir(tmp_path, byte_level(), tokenizer_config=settings))
    assert (tokenizer.encode("dog")[0] == tokenizer.bos_id) is expected


def test_add_bos_token_false_overrules_the_post_processor(tmp_path: Path) -> None:
    settings = {"bos_token": "<s>", "add_bos_token": False}
    tokenizer = Tokenizer.load(write_model_dir(tmp_path, sentencepiece(), tokenizer_config=settings))
    assert 1 not in tokenizer.encode("dog")


def test_no_end_token_is_added() -> None:
    backend = sentencepiece()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = Tokenizer(backend, {"bos_token": "<s>"}).encode("dog")
    assert ids[0] == 1
    assert 2 not in ids


def test_bos_with_a_vocabulary_that_lacks_the_probing_letter() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "x": 2}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert Tokenizer(backend, {"bos_token": "<s>"}).encode("xx") == [0, 2, 2]


def test_prefix_of_two_tokens() -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> <|end|> $A", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("dog")[:2] == [0, 1]
    assert tokenizer.encode("<|begin|><|end|>dog").count(0) == 1


def test_null_bos_means_none_but_a_missing_one_is_taken_from_config(tmp_path: Path) -> None:
    config = {"bos_token_id": 0}
    null = write_model_dir(tmp_path / "null", byte_level(), tokenizer_config={"bos_token": None}, config=config)
    missing = write_model_dir(tmp_path / "missing", byte_level(), config=config)
    assert Tokenizer.load(null).bos_id is None
    assert Tokenizer.load(missing).bos_id == 0
    assert Tokenizer.load(missing).special_tokens == {"bos_token": "<|begin|>"}


def test_special_tokens_are_the_named_ones_only(tmp_path: Path) -> None:
    settings = {"eos_token": "<|end|>", "add_bos_token": False, "padding_side": "left", "pad_token": None}
    tokenizer = Tokenizer.load(write_model_dir(tmp_path, byte_level(), tokenizer_config=settings))
    assert tokenizer.special_tokens == {"eos_token": "<|end|>"}


# --- end tokens ---


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": 5}}, (5,)),
        ({"generation_config": {"eos_token_id": [5, 6, 5]}}, (5, 6)),
        ({"config": {"eos_token_id": 7}}, (7,)),
        ({"config": {"text_config": {"eos_token_id": [7, 8]}}}, (7, 8)),
        ({"tokenizer_config": {"eos_token": "<|end|>"}, "config": {"eos_token_id": 7}}, (1, 7)),
        ({"tokenizer_config": {"eos_token": {"content": "<|end|>", "special": True}}}, (1,)),
        ({"special_tokens_map": {"eos_token": {"content": "<|end|>"}}}, (1,)),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [-1, 10**6, True]}}, ()),
        ({}, ()),
    ],
)
def test_declared_end_tokens(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    tokenizer = Tokenizer.load(write_model_dir(tmp_path, byte_level(), **files))
    assert tokenizer.eos_ids == expected
    assert tokenizer.stop_ids == {2, *expected}  # 2 is <|eot_id|>, well known


def test_well_known_end_tokens_must_be_added_tokens() -> None:
    backend = byte_level()
    backend.add_tokens(["<|im_end|>", "</s>"])  # not special: "</s>" is HTML in Gemma's vocabulary
    tokenizer = Tokenizer(backend)
    assert tokenizer.stop_ids == {2, tokenizer.added_tokens["<|im_end|>"]}
    assert Tokenizer(sentencepiece()).stop_ids == {2}


@pytest.mark.parametrize(
    ("family", "ends", "others"),
    [
        ("gpt-oss", ("<|return|>", "<|call|>"), ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")),
        ("GLM-4.5", ("<|user|>", "<|observation|>"), ("[gMASK]", "<sop>", "<|system|>")),
    ],
)
def test_end_tokens_of_a_family(family: str, ends: tuple[str, ...], others: tuple[str, ...]) -> None:
    """A checkpoint whose files name but one end token ends at all; at what only ends a part of an answer it goes on."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken(text, special=True) for text in (*ends, *others)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.stop_ids == {2, *(tokenizer.added_tokens[text] for text in ends)}
    assert all(text in tokenizer.added_tokens for text in others)


@pytest.mark.parametrize("token", ["<seed:eos>", "<|end_of_sentence|>", "<｜hy_place▁holder▁no▁2｜>", "<end_of_turn>"])
def test_well_known_end_tokens_of_families(token: str) -> None:
    backend = byte_level()
    backend.add_special_tokens([token])
    tokenizer = Tokenizer(backend)
    assert tokenizer.stop_ids == {2, tokenizer.added_tokens[token]}


def test_end_ends_turns_of_phi_and_messages_of_gpt_oss() -> None:
    for other, ends in (("<|assistant|>", True), ("<|channel|>", False)):
        backend = byte_level()  # its token 1 is <|end|>
        backend.add_special_tokens([other])
        assert Tokenizer(backend).stop_ids == ({1, 2} if ends else {2})


def test_special_tokens_are_hidden_and_named() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = [0, *tokenizer.encode("dog"), 2]
    assert tokenizer.decode(ids) == "dog"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin|>dog<|eot_id|>"
    assert tokenizer.token_text(2) == "<|eot_id|>"
    assert tokenizer.is_special(2)
    assert not tokenizer.is_special(50)


def test_vocab_size_reaches_past_a_gap_of_ids() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<x>": 9}, unk_token="a"))
    backend.add_special_tokens([AddedToken("<x>", special=True)])
    assert Tokenizer(backend).vocab_size == 10


# --- files ---


def test_tokenizer_path_may_be_file_or_folder(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path / "t", byte_level(), tokenizer_config={"eos_token": "<|end|>"})
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"eos_token_id": 9}')
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = Tokenizer.load(model, path)
        assert tokenizer.eos_ids == (1, 9)
        assert tokenizer.folders == (folder, model)


def test_settings_fall_back_to_the_models_folder(tmp_path: Path) -> None:
    lone = write_model_dir(tmp_path / "lone", byte_level())
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    assert Tokenizer.load(model, lone / "tokenizer.json").eos_ids == (1,)


def test_a_weights_file_stands_for_its_folder(tmp_path: Path) -> None:
    write_model_dir(tmp_path, byte_level())
    (tmp_path / "model.gguf").write_bytes(b"")
    assert Tokenizer.load(tmp_path / "model.gguf").encode("dog")


def test_missing_tokenizer_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(DllamaError, match=r"tokenizer\.json is missing.*--tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DllamaError, match=r"tokenizer\.model.*is not read.*--tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DllamaError, match=r"nowhere does not exist.*--tokenizer"):
        Tokenizer.load(tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "{}", "[]", "\x00"])
def test_broken_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DllamaError, match=r"tokenizer\.json cannot be read.*--tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["tokenizer_config", "generation_config", "config", "special_tokens_map"])
def test_broken_settings(tmp_path: Path, name: str, content: bytes) -> None:
    write_model_dir(tmp_path, byte_level())
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(DllamaError, match=rf"{name}\.json .*download it again") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
