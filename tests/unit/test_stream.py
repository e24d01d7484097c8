"""Streams: pieces joined equal the whole text cut at its first stop string, and no piece is premature."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from dllama_mpi.errors import DllamaError
from dllama_mpi.text.stream import TextStream
from dllama_mpi.text.tokenizer import Tokenizer

from .tiny_tokenizers import HARD_TEXTS, SENTENCES, byte_level, sentencepiece

TOKENIZERS = {
    "byte-level": Tokenizer(byte_level()),
    "sentencepiece": Tokenizer(sentencepiece()),
    "metaspace": Tokenizer(sentencepiece(metaspace=True)),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def run(stream: TextStream, ids: Sequence[int]) -> list[str]:
    """Push all tokens and finish; return the pieces."""
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def cut(text: str, stop: Sequence[str]) -> str:
    """Cut a text where its first complete stop string starts, looking at ever longer beginnings of it."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Spell bytes by tokens of one byte each."""
    by_byte = {
        tokenizer.token_bytes(n): n for n in reversed(range(tokenizer.vocab_size)) if not tokenizer.is_special(n)
    }
    return [by_byte[bytes([byte])] for byte in data]


# --- the invariant ---


@pytest.mark.parametrize("text", HARD_TEXTS + SENTENCES)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(run(TextStream(tokenizer), ids)) == tokenizer.decode(ids)
    spelled = byte_ids(tokenizer, text.encode())
    assert "".join(run(TextStream(tokenizer), spelled)) == tokenizer.decode(spelled)


def test_random_tokens_and_stops(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    stopped = 0
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(25))]
        if rng.random() < 0.5:  # bytes of real text, which often make whole characters
            ids += byte_ids(tokenizer, rng.choice(SENTENCES).encode()[rng.randrange(5) :])
        prompt = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(4))]
        prompt += tokenizer.encode("dog.", add_special_tokens=False) if rng.random() < 0.5 else []
        while tokenizer.decode(prompt).endswith("\ufffd"):
            prompt.pop()  # the decoded prompt would not be a beginning of the decoded whole
        whole = tokenizer.decode([*prompt, *ids]).removeprefix(tokenizer.decode(prompt))
        stop = [s for s in (whole[at : at + rng.randrange(1, 6)] for at in rng.sample(range(60), 2)) if s]
        stream = TextStream(tokenizer, prompt, stop)
        pieces = run(stream, ids)
        assert "".join(pieces) == cut(whole, stop)
        assert stream.stopped == any(s in whole for s in stop)
        stopped += stream.stopped
    assert stopped > 100


def test_stop_strings_do_not_depend_on_the_tokens() -> None:
    backend = byte_level()
    backend.add_tokens(["".join(letters) for size in (2, 3, 4) for letters in itertools.product("abc", repeat=size)])
    tokenizer = Tokenizer(backend)
    rng = random.Random(3)
    for _ in range(500):
        text = "".join(rng.choice("abc") for _ in range(20))
        stop = ["".join(rng.choice("abc") for _ in range(rng.randrange(1, 6))) for _ in range(3)]
        at = [0, *sorted(rng.sample(range(1, 20), 9)), 20]
        chunks = [tokenizer.encode(text[start:end]) for start, end in itertools.pairwise(at)]
        for ids in (byte_ids(tokenizer, text.encode()), list(itertools.chain(*chunks)), tokenizer.encode(text)):
            assert "".join(run(TextStream(tokenizer, stop=stop), ids)) == cut(text, stop)


# --- whole characters ---


@pytest.mark.parametrize("char", ["é", "好", "😀", "\u0301", "\u200d", "\ufffd"])
def test_a_split_character_waits(tokenizer: Tokenizer, char: str) -> None:
    ids = byte_ids(tokenizer, char.encode())
    assert run(TextStream(tokenizer), ids) == [*[""] * (len(ids) - 1), char, ""]


def test_characters_come_as_soon_as_they_are_whole(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in byte_ids(tokenizer, "a好b".encode())] == ["a", "", "", "好", "b"]


def test_a_broken_off_character_becomes_one_replacement(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "a😀".encode()[:-1])
    assert run(TextStream(tokenizer), ids) == ["a", "", "", "", "\ufffd"]


def test_a_stray_byte_does_not_block_the_stream(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in byte_ids(tokenizer, b"\xff\xe5ab")]
    assert pieces == ["\ufffd", "", "\ufffda", "b"]


def test_a_prompt_may_end_within_a_character(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "dog 好!".encode())
    assert run(TextStream(tokenizer, ids[:-2]), ids[-2:]) == ["好", "!", ""]


# --- special tokens and leading spaces ---


def test_special_tokens_are_not_shown() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    d, o, g = byte_ids(tokenizer, b"dog")
    assert run(TextStream(tokenizer), [0, d, 1, o, g, 2]) == ["", "d", "", "o", "g", "", ""]


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace"])
def test_leading_space(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    once, upon, a = tokenizer.encode("Once upon a", add_special_tokens=False)
    assert run(TextStream(tokenizer), [once, upon, a]) == ["Once", " upon", " a", ""]
    assert run(TextStream(tokenizer, [1]), [once, upon]) == ["Once", " upon", ""]
    assert run(TextStream(tokenizer, [1, once]), [upon, a]) == [" upon", " a", ""]
    assert run(TextStream(tokenizer), [1, once, 2, upon]) == ["", "Once", "", " upon", ""]


def test_only_one_leading_space_is_dropped() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    space = tokenizer.encode("", add_special_tokens=False) or byte_ids(tokenizer, b" ")
    assert "".join(run(TextStream(tokenizer), [*space, *space, *byte_ids(tokenizer, b"a")])) == " a"


# --- stop strings ---


def test_a_possible_stop_string_is_held_and_dropped() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer, stop=["END"])
    pieces = [stream.push(token_id) for token_id in byte_ids(tokenizer, b"aENbEND")]
    assert pieces == ["a", "", "", "ENb", "", "", ""]
    assert stream.stopped
    assert stream.push(byte_ids(tokenizer, b"x")[0]) == ""
    assert stream.finish() == ""


def test_a_held_partial_stop_string_comes_out_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer, stop=["ENDE"])
    assert run(stream, byte_ids(tokenizer, b"aEND")) == ["a", "", "", "", "END"]
    assert not stream.stopped
    assert stream.finish() == ""


def test_overlapping_partial_matches() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer, stop=["aab"])
    assert run(stream, byte_ids(tokenizer, b"aaab")) == ["", "", "a", "", ""]
    assert stream.stopped


def test_a_stop_string_inside_one_token_cuts_the_token() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    (once,) = tokenizer.encode("Once", add_special_tokens=False)
    stream = TextStream(tokenizer, stop=["nc"])
    assert stream.push(once) == "O"
    assert stream.stopped


def test_the_first_complete_stop_string_counts_and_of_two_the_longer() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    assert "".join(run(TextStream(tokenizer, stop=["cd", "b"]), byte_ids(tokenizer, b"abcd"))) == "a"
    assert "".join(run(TextStream(tokenizer, stop=["c", "bc"]), byte_ids(tokenizer, b"abcd"))) == "a"


def test_a_stop_string_may_be_split_within_a_character(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=["好。"])
    assert "".join(run(stream, byte_ids(tokenizer, "你好好。x".encode()))) == "你好"
    assert stream.stopped


def test_text_before_the_prompts_end_starts_no_stop_string() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    prompt, rest = byte_ids(tokenizer, b"EN"), byte_ids(tokenizer, b"D!")
    assert "".join(run(TextStream(tokenizer, prompt, ["END"]), rest)) == "D!"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(DllamaError, match="stop string is empty"):
        TextStream(TOKENIZERS["byte-level"], stop=["a", ""])


# --- cost ---


def test_nothing_is_kept_of_what_was_said(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=["never"])
    broken = byte_ids(tokenizer, b"\x80\xe5")
    for _ in range(1000):
        for token_id in broken:  # never a whole character: a decoder that waits for one would grow
            stream.push(token_id)
        assert len(stream._held) < len("never")
        assert len(stream._utf8.getstate()[0]) < 4
