"""Distributed Llama's tokenizers against the ones that they were made from, and against its own rule, done slowly."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from dllama_mpi.errors import ModelError
from dllama_mpi.text.chat_template import ChatTemplate
from dllama_mpi.text.dllama_tokenizer import dllama_tokenizer
from dllama_mpi.text.pretokenizers import PRE_TOKENIZERS
from dllama_mpi.text.tokenizer import Tokenizer
from tests.dllama_files import greedy, old_tokenizer_bytes, tokenizer_bytes, tokens_of

from .tiny_tokenizers import HARD_TEXTS, SENTENCES, byte_level, byte_level_after, sentencepiece

TEXTS = [*SENTENCES, *HARD_TEXTS, "1984 12345 in 2024", "a  b   c    d", "<|start|>Once<|end|>", "don't we'll I'M"]


def read(folder: Path, content: bytes) -> Tokenizer:
    """Return the tokenizer of a file."""
    path = folder / "x.t"
    path.write_bytes(content)
    return dllama_tokenizer(path)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def original(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    found: list[int] = backend.encode(text, add_special_tokens=False).ids
    return found


def test_ids_are_those_of_its_own_rule(tmp_path: Path) -> None:
    backend = byte_level_after()
    tokens = tokens_of(backend)
    first = tokens.index(b"<|begin|>")
    tokenizer = read(tmp_path, tokenizer_bytes(tokens, first, [first + 1]))
    same = 0
    for text in TEXTS:
        expected = greedy(tokens, first, text)
        assert ids(tokenizer, text) == expected
        same += expected == original(backend, text)
        assert tokenizer.decode(expected, skip_special_tokens=False) == text
    assert len(TEXTS) > same > len(TEXTS) // 2  # words are not cut there, which seldom matters
    assert tokenizer.encode("dog") == [first, *ids(tokenizer, "dog")]


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start|>", "<|end|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<|start|>", "<|end|>")


@pytest.mark.parametrize(("name", "specials"), [("llama-bpe", LLAMA3), ("qwen2", QWEN)])
def test_ids_are_those_of_known_models(name: str, specials: tuple[str, ...], tmp_path: Path) -> None:
    """Of Llama 3 and Qwen, which BOS tells, texts are cut as there; by Distributed Llama's rule numbers differ."""
    kind = PRE_TOKENIZERS[name]
    backend = byte_level_after(kind.build(), specials)
    backend.normalizer = kind.normalizer()
    tokens = tokens_of(backend)
    first = tokens.index(specials[0].encode())
    tokenizer = read(tmp_path, tokenizer_bytes(tokens, first, [first + 2], add_bos=name != "qwen2"))
    for text in TEXTS:
        assert ids(tokenizer, text) == original(backend, text)
    assert any(greedy(tokens, first, text) != original(backend, text) for text in TEXTS)
    assert tokenizer.encode("dog")[:1] == ([first] if name != "qwen2" else ids(tokenizer, "dog")[:1])
    if name == "qwen2":
        assert tokenizer.decode([first + 1, first + 3]) == "<think>"


def test_special_tokens_before_the_words(tmp_path: Path) -> None:
    """Distributed Llama takes all of such a vocabulary for special tokens; here BOS and what ends a text are."""
    backend = byte_level()
    tokens = tokens_of(backend)
    tokenizer = read(tmp_path, tokenizer_bytes(tokens, 0, [1, 2]))
    same = sum(ids(tokenizer, text) == original(backend, text) for text in TEXTS)
    assert same > len(TEXTS) // 2
    assert ids(tokenizer, "<|begin|>dog<|eot_id|>") == [0, *ids(tokenizer, "dog"), 2]


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_sentencepiece(literal: bool, old: bool, tmp_path: Path) -> None:
    backend = sentencepiece()
    tokens, scores, first = [], [], 3 + 256
    for token_id in range(backend.get_vocab_size()):
        text = str(backend.id_to_token(token_id)).replace("▁", " ")
        is_byte = 3 <= token_id < first and not literal
        tokens.append(bytes([token_id - 3]) if is_byte else text.encode())
        scores.append(-float(token_id - first) if token_id >= first else 0.0)
    if old:
        tokenizer = read(tmp_path, old_tokenizer_bytes(tokens, 1, 2, scores))
    else:
        tokenizer = read(tmp_path, tokenizer_bytes(tokens, 1, [2], scores=scores))
    for text in TEXTS:
        assert ids(tokenizer, text) == original(backend, text)
        assert tokenizer.encode(text) == [1, *ids(tokenizer, text)]
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert tokenizer.stop_ids == {2}


def test_sentencepiece_through_the_converter_of_byte_level(tmp_path: Path) -> None:
    """It writes "ö" as one byte, and leaves the marks of spaces."""
    backend = sentencepiece()
    tokenizer = read(tmp_path, tokenizer_bytes(tokens_of(backend), 1, [2]))
    for text in TEXTS:
        assert ids(tokenizer, text) == original(backend, text)


def test_ends_template_and_old_keys(tmp_path: Path) -> None:
    tokens = tokens_of(byte_level_after())
    first = tokens.index(b"<|begin|>")
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = read(tmp_path, tokenizer_bytes(tokens, first, [first + 2], template=template, changes={4: first + 1}))
    assert tokenizer.stop_ids == {first + 1, first + 2}
    assert tokenizer.eos_ids == (first + 1, first + 2)
    text = ChatTemplate.load(tokenizer).render([{"role": "user", "content": "hi"}])
    assert text == "<|begin|>hi<|end|>"
    # The text at which answers once ended comes behind the template, and is of no use.
    with_stop = tokenizer_bytes(
        tokens, first, [], template=template + "STOP", changes={8: 4, 7: len(template), 9: None}
    )
    tokenizer = read(tmp_path, with_stop)
    assert tokenizer.templates == {"default": template}
    assert ids(tokenizer, "dog") == greedy(tokens, first, "dog")
    tokenizer = read(tmp_path, old_tokenizer_bytes(tokens, first, first + 2))
    assert tokenizer.stop_ids == {first + 2}
    assert not tokenizer.templates
    assert tokenizer.encode("dog") == [first, *greedy(tokens, first, "dog")]
    without = read(tmp_path, tokenizer_bytes(tokens, None, [first + 1]))
    assert (without.bos_id, without.encode("dog")) == (None, greedy(tokens, first, "dog"))


TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab", b"<|begin|>", b"<|end|>"]
HEAD = 8 + 8 * 6
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not a tokenizer of Distributed Llama"),
    "text": (lambda: b"tokens", "not a tokenizer of Distributed Llama"),
    "half a header": (lambda: good()[:20], "ends within its header, at byte 20"),
    "a long header": (lambda: struct.pack("<ii", 0x567124, 1 << 30) + good(), "tells of a header of 1073741824 bytes"),
    "half an old header": (lambda: struct.pack("<ii", 0x567123, 5), "ends within its header, at byte 8"),
    "half a vocabulary": (lambda: good()[:600], "tells of 259 tokens"),
    "the last token": (lambda: good()[:-3], "token 258 has 7 bytes"),
    "the last score": (lambda: good()[:-12], "ends at token 258 of 259"),
    "no tokens": (lambda: good({1: 0}), "tells of 0 tokens"),
    "many tokens": (lambda: good({1: 1 << 30}), "tells of 1073741824 tokens"),
    "fewer than none": (lambda: good({1: -1}), "tells of -1 tokens"),
    "a version": (lambda: good({0: 2}), "a tokenizer of version 2; version 1 can be read"),
    "a key": (lambda: good({50: 1}), r"the header has key 50 \(value 1\), known are 0 to 10"),
    "BOS": (lambda: good({3: 259}), "bos_id is 259, and there are 259 tokens"),
    "an end": (lambda: tokenizer_bytes(TOKENS, 257, [1000]), "eos_id is 1000, and there are 259 tokens"),
    "many ends": (lambda: good({9: 1 << 20}), "n_eos_tokens is 1048576"),
    "a long template": (lambda: good({7: 1 << 30}), "the chat template has 1073741824 bytes"),
    "a negative template": (lambda: good({7: -5}), "the chat template has -5 bytes"),
    "a template that is no text": (
        lambda: good({7: 1}).replace(struct.pack("<i", 258), b"\xff\0\0\0", 1),
        "not UTF-8",
    ),
    "an empty token": (lambda: tokenizer_bytes([*TOKENS[:5], b""], 3, []), "token 5 has 0 bytes"),
    "a long token": (lambda: tokenizer_bytes([*TOKENS, b"x" * 2000], 257, []), "token 259 has 2000 bytes"),
    "a score": (lambda: tokenizer_bytes(TOKENS, 257, [], scores=[float("nan")] * 259), "token 0 has the score nan"),
}


def good(changes: Mapping[int, int | None] | None = None) -> bytes:
    """Return a file, with other values in its header."""
    return tokenizer_bytes(TOKENS, 257, [258], changes=changes)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, make())
    assert "\n" not in str(caught.value)
    assert "x.t: " in str(caught.value)


def test_any_file_is_read_or_refused(tmp_path: Path) -> None:
    rng, data, refused = np.random.default_rng(3), good(), 0
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            changed[rng.integers(4, len(changed) if rng.random() < 0.5 else HEAD)] = rng.integers(0, 256)
        try:
            read(tmp_path, bytes(changed)).encode("abab <|end|>")
        except ModelError:
            refused += 1
    assert refused > 50


def test_tokens_that_are_there_twice(tmp_path: Path) -> None:
    tokens = [*TOKENS[:257], b"ab", *TOKENS[257:]]
    tokenizer = read(tmp_path, tokenizer_bytes(tokens, 258, [259]))
    assert ids(tokenizer, "abab") == [256, 256]
    assert tokenizer.vocab_size == 260
