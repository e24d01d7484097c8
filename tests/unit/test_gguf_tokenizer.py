"""Tokenizers from metadata: the ids that follow from a vocabulary, special tokens, and one line for what is wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.text.chat_template import ChatTemplate
from dllama_mpi.text.gguf_tokenizer import gguf_templates, gguf_tokenizer
from dllama_mpi.text.tokenizer import Tokenizer
from tests.tiers import slow

from .gguf_metadata import CONTROL, NORMAL, TEMPLATE, UNKNOWN, byte_level_metadata, sentencepiece_metadata
from .tiny_tokenizers import HARD_TEXTS, SENTENCES


def byte_level(pre: str = "gpt-2", words: tuple[str, ...] = (), **more: Any) -> Tokenizer:
    return gguf_tokenizer(byte_level_metadata(pre, words, **more), "tiny.gguf")


def sentencepiece(**more: Any) -> Tokenizer:
    return gguf_tokenizer(sentencepiece_metadata(**more), "tiny.gguf")


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# --- byte-level vocabularies ---


def test_bytes_and_merges() -> None:
    tokenizer = byte_level(words=(" the", "the"))  # 256 " t", 257 " th", 258 " the", 259 "th", 260 "the"
    assert ids(tokenizer, "the the") == [260, 258]
    assert ids(tokenizer, "thé") == [259, 0xC3, 0xA9]
    assert ids(tokenizer, "好") == list("好".encode())
    assert tokenizer.vocab_size == 264


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "gpt-4o", "deepseek-v3", "tekken", "default"])
@pytest.mark.parametrize("text", HARD_TEXTS + SENTENCES)
def test_byte_level_round_trip(pre: str, text: str) -> None:
    tokenizer = byte_level(pre, ("the", " the", "Once"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_stay_within_words() -> None:
    assert ids(byte_level("qwen2", ("12",)), "12") == [ord("1"), ord("2")]
    assert ids(byte_level("llama-bpe", ("12",), add_bos_token=False), "12") == [256]


def test_a_word_that_is_a_token_needs_no_merges() -> None:
    for pre, expected in (("llama-bpe", [256]), ("dbrx", [ord("a"), ord("b")])):
        metadata = byte_level_metadata(pre, ("ab",), merges=[])
        assert ids(gguf_tokenizer(metadata, "tiny.gguf"), "ab") == expected


def test_characters_are_composed_where_the_model_has_it_so() -> None:
    assert ids(byte_level("qwen2"), "e\u0301") == list("é".encode())
    assert ids(byte_level("gpt-2"), "e\u0301") == list("e\u0301".encode())


def test_text_of_added_tokens() -> None:
    tokenizer = byte_level()  # 256 and 257 are control tokens, 258 is none
    assert ids(tokenizer, "a<|im_start|>b<tool_call>") == [ord("a"), 256, ord("b"), 258]
    assert tokenizer.decode([256, ord("b"), 258]) == "b<tool_call>"
    assert tokenizer.is_special(256)
    assert not tokenizer.is_special(258)


@pytest.mark.parametrize("pre", ["superbpe", "tiny_aya"])
def test_groups_of_digits_are_counted_from_the_end(pre: str) -> None:
    """Up to 600 digits; a longer number takes time in proportion to its length, not to its square."""
    tokenizer = byte_level(pre, ("1", "11", "111"))
    one, two, three = (ids(tokenizer, "1" * count)[0] for count in (1, 2, 3))
    assert ids(tokenizer, "1" * 600) == [three] * 200
    assert ids(tokenizer, "1" * 599) == [two, *[three] * 199]
    assert ids(tokenizer, "1" * 598) == [one, *[three] * 199]
    assert tokenizer.decode(ids(tokenizer, "1" * 30_000)) == "1" * 30_000


def test_half_characters() -> None:
    assert byte_level().decode([0xE5, ord("a"), 0xFF]) == "\ufffda\ufffd"


@pytest.mark.parametrize(
    ("pre", "more", "expected"),
    [
        ("gpt-2", {"bos_token_id": 256}, []),
        ("gpt-2", {"bos_token_id": 256, "add_bos_token": True}, [256]),
        ("llama-bpe", {"bos_token_id": 256}, [256]),
        ("llama-bpe", {"bos_token_id": 256, "add_bos_token": False}, []),
        ("llama-bpe", {}, []),  # there is none
        ("tekken", {"bos_token_id": 0xFFFFFFFF}, []),
    ],
)
def test_beginning_of_text(pre: str, more: dict[str, Any], expected: list[int]) -> None:
    assert byte_level(pre, **more).encode("a") == [*expected, ord("a")]


def test_glm_begins_with_two_tokens() -> None:
    metadata = byte_level_metadata("glm4")
    metadata["tokenizer.ggml.tokens"] += ["[gMASK]", "<sop>"]
    metadata["tokenizer.ggml.token_type"] += [CONTROL, CONTROL]
    assert gguf_tokenizer(metadata, "tiny.gguf").encode("a") == [259, 260, ord("a")]


# --- sentencepiece ---


def test_merges_follow_scores() -> None:
    tokenizer = sentencepiece()
    # "▁a" is joined first; then "▁ab" is better than "bc".
    assert ids(tokenizer, "abc") == [261, 267]
    # Without a mark before it, "ab" comes first, and "abc" from it.
    assert ids(sentencepiece(add_space_prefix=False), "abc") == [263]


def test_spaces() -> None:
    tokenizer = sentencepiece(add_space_prefix=False)
    assert ids(tokenizer, " a") == [259]
    assert ids(tokenizer, "  a") == [268, 265]  # two spaces are the vocabulary's own, before anything else
    assert tokenizer.decode([268, 265]) == "  a"
    prefixed = sentencepiece()
    assert ids(prefixed, "a a") == [259, 259]
    assert prefixed.decode([259, 259]) == "a a"


def test_bytes_of_unknown_characters() -> None:
    tokenizer = sentencepiece(add_space_prefix=False)
    assert ids(tokenizer, "a好\n") == [265, *(3 + byte for byte in "好\n".encode())]
    assert tokenizer.decode([3 + 0xE5, 265, 3 + 0xFF]) == "\ufffda\ufffd"


def test_sentencepiece_tokens_in_texts() -> None:
    tokenizer = sentencepiece()
    assert tokenizer.encode("a") == [1, 259]
    assert ids(tokenizer, "a<end_of_turn>a<table></s>") == [259, 270, 259, 269, 2]
    assert tokenizer.decode([270, 269]) == "<table>"
    assert 271 not in ids(tokenizer, "[PAD271]")


@pytest.mark.parametrize("text", HARD_TEXTS + SENTENCES)
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_round_trip(text: str, prefix: bool) -> None:
    tokenizer = sentencepiece(add_space_prefix=prefix)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_listed_merges_with_marked_spaces() -> None:
    metadata = sentencepiece_metadata(model="gemma4", merges=["a b", "▁ ab"])
    assert ids(gguf_tokenizer(metadata, "tiny.gguf"), " abc") == [261, 267]


def test_phi3_takes_white_space_after_a_turns_token() -> None:
    metadata = sentencepiece_metadata()
    assert ids(gguf_tokenizer(metadata, "tiny.gguf"), "<end_of_turn>\na") == [270, 264, 3 + 10, 265]
    metadata["general.architecture"] = "phi3"
    assert ids(gguf_tokenizer(metadata, "tiny.gguf"), "<end_of_turn>\na") == [270, 259]


# --- special tokens ---


def test_special_tokens_by_name() -> None:
    found = byte_level(bos_token_id=256, eos_token_id=np.uint32(257), padding_token_id=258)
    assert found.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<tool_call>"}
    assert found.eos_ids == (257,)
    assert sentencepiece().special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_ends_by_key_and_by_name() -> None:
    assert byte_level().stop_ids == {257}
    assert byte_level(eos_token_id=65, eot_token_id=66, eom_token_id=67, fim_sep_token_id=68).stop_ids == {
        65, 66, 67, 68, 257,
    }  # fmt: skip
    assert sentencepiece().stop_ids == {2, 270}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<|end|>"], ["<|end|>"]),
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|flush|>", "<|calls|>"], ["<|flush|>", "<|calls|>"]),
        (["<|file_sep|>", "<|fim_pad|>", "<|fim_middle|>"], ["<|file_sep|>", "<|fim_pad|>"]),
    ],
)
def test_well_known_ends(tokens: list[str], expected: list[str]) -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] += tokens
    metadata["tokenizer.ggml.token_type"] += [CONTROL] * len(tokens)
    found = gguf_tokenizer(metadata, "tiny.gguf")
    assert {found.token_text(token_id) for token_id in found.stop_ids} == {"<|im_end|>", *expected}


def test_an_end_that_was_not_marked() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.token_type"][257] = NORMAL
    tokenizer = gguf_tokenizer(metadata, "tiny.gguf")
    assert ids(tokenizer, "<|im_end|>") == [257]
    assert tokenizer.is_special(257)


def test_padding_of_older_files_is_no_token() -> None:
    for kind in (4, UNKNOWN):
        metadata = byte_level_metadata()
        metadata["tokenizer.ggml.tokens"].append("[PAD259]")
        metadata["tokenizer.ggml.token_type"].append(kind)
        assert 259 not in ids(gguf_tokenizer(metadata, "tiny.gguf"), "[PAD259]")


# --- chat templates ---


def test_chat_templates() -> None:
    metadata = byte_level_metadata() | {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_templates": ["x"]}
    assert gguf_templates(metadata, "tiny.gguf") == {"default": TEMPLATE, "tool_use": "tools"}
    template = ChatTemplate.load(gguf_tokenizer(metadata, "tiny.gguf"))
    chat = [{"role": "user", "content": "hi"}]
    assert template.render(chat) == "<|im_start|>user\nhi<|im_end|>\n"
    assert template.render(chat, tools=[{"name": "f"}]) == "tools"


def test_no_chat_template() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        ChatTemplate.load(sentencepiece())


# --- what is wrong ---


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, r"model is missing; known are gpt2, llama and gemma4; .*--tokenizer"),
        ("model", "bert", r"model is 'bert'; known are"),
        ("model", 7, r"model is '7'; it must be a string"),
        ("pre", "klingon", r"pre is 'klingon', a way to cut words that is not known; .*--tokenizer"),
        ("tokens", [], r"tokens is missing or empty"),
        ("tokens", None, r"tokens is missing or empty"),
        ("tokens", "abc", r"tokens is 'abc'; it must be a list of strings"),
        ("tokens", ["a", 1], r"tokens is a list of int, str; it must be a list of strings"),
        ("tokens", ["a", "b", "a"], r"tokens has 'a' twice"),
        ("tokens", ["a" * 2000], r"tokens is too long"),
        ("tokens", ["a\ud800"], r"tokens has '\\ud800', which is no character"),
        ("token_type", [1, 2], r"token_type has 2 entries, but there are 259 tokens"),
        ("token_type", ["a"] * 259, r"token_type is a list of str; it must be a list of numbers"),
        ("token_type", [[1], [1, 2]], r"token_type is a list of list"),
        ("merges", None, r"merges is missing"),
        ("merges", [1], r"merges is a list of int"),
        ("merges", ["a"], r"merges has 'a' as entry 0; it must be two tokens and a space"),
        ("merges", ["a b c"], r"merges has 'a b c' as entry 0"),
        ("merges", ["a nothing"], r"merges does not go with the tokens: .*nothing"),
        ("merges", ["a b"], r"merges does not go with the tokens: .*ab"),
        ("bos_token_id", 2**63, r"bos_token_id is 9223372036854775808; it must be at most 258"),
        ("eos_token_id", -5, r"eos_token_id is -5; it must be at most 258"),
        ("eot_token_id", 259, r"eot_token_id is 259; it must be at most 258"),
        ("eos_token_id", True, r"eos_token_id is 'True'; it must be a token's id"),
        ("add_bos_token", 1, r"add_bos_token is '1'; it must be a boolean"),
    ],
)
def test_broken_metadata(key: str, value: Any, message: str) -> None:
    metadata = byte_level_metadata(**{key: value})
    with pytest.raises(ModelError, match=rf"^tiny\.gguf: tokenizer\.ggml\.{message}"):
        gguf_tokenizer(metadata, "tiny.gguf")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "scores is missing"),
        ([0.0], "scores has 1 entries, but there are 272 tokens"),
        ([float("nan")] * 272, "scores has a score that is not a finite number"),
        ("high", "scores is 'high'; it must be a list of numbers"),
    ],
)
def test_broken_scores(scores: Any, message: str) -> None:
    with pytest.raises(ModelError, match=f"tokenizer.ggml.{message}"):
        sentencepiece(scores=scores)


def test_a_template_that_is_no_string() -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.chat_template\.rag is '3'; it must be a string"):
        gguf_templates({"tokenizer.chat_template.rag": 3}, "tiny.gguf")


@pytest.mark.parametrize("count", [100, slow(400)])
def test_any_metadata_is_read_or_refused_in_one_line(count: int) -> None:
    rng = random.Random(5)
    odd: list[Any] = [
        None, -1, 0, 2**63, -(2**70), 1.5, float("nan"), "", "a b", "\ud800", True, b"ab", [], [1], ["a"], [["a"]],
        {}, np.zeros(3), np.array([1, 2], np.uint64), [None], ["a  b"], ["", ""],
    ]  # fmt: skip
    refused = []
    for _ in range(count):
        metadata = byte_level_metadata("qwen2", ("the",)) if rng.random() < 0.5 else sentencepiece_metadata()
        key = rng.choice([*metadata, "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_space_prefix"])
        value = metadata.get(key)
        if isinstance(value, list) and rng.random() < 0.7:
            at = rng.randrange(len(value)) if value else 0
            value[at : at + rng.randrange(2)] = [rng.choice([rng.choice(odd), *value[:1]])]
        else:
            metadata[key] = rng.choice(odd)
        try:
            tokenizer = gguf_tokenizer(metadata, "tiny.gguf")
            tokenizer.decode(tokenizer.encode("the wörld  <s> abc\n"))
        except ModelError as error:
            refused.append(str(error))
    assert count // 4 < len(refused) < count
    assert all("tokenizer." in line and "\n" not in line for line in refused)


def test_as_the_gguf_package_writes_and_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    metadata = sentencepiece_metadata(add_space_prefix=False)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_scores(metadata["tokenizer.ggml.scores"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_chat_template([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    found = gguf_tokenizer({key: field.contents() for key, field in fields.items()}, "tiny.gguf")
    expected = gguf_tokenizer(metadata, "tiny.gguf")
    assert found.to_json() == expected.to_json()
    assert found.templates == {"default": "a", "tool_use": "b"}
    assert found.stop_ids == expected.stop_ids
