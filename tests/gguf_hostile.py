"""What strangers may write into a GGUF file: every key and tensor of a good one, turned into what it should not be."""

from __future__ import annotations

import copy
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.gguf_edit import LIST, STRING, Document, Entry, Value, edit, number, numbers, text, texts
from tests.gguf_files import write_gguf
from tests.tiny_models.case import Case

Change = Callable[[Document], object]
ODD = (
    number("U32", 0), number("I32", -1), number("U32", 1), number("U32", 3), number("U32", 2**31),
    number("U32", 2**32 - 1), number("U64", 2**40), number("U64", 2**63), number("U64", 2**64 - 1),
    number("I64", -(2**63)), number("F32", math.nan), number("F32", math.inf), number("F32", -0.0),
    number("F32", 1e-40), number("F64", 1.7e308), number("F64", 0.5), number("BOOL", True), number("BOOL", False),
    text(""), text("x"), text(b"\xff\xfe\n\x00"), text("x" * 100_000), numbers("U32", []), texts([]),
    numbers("I32", [0]), numbers("I32", [-1, 2**31 - 1]), numbers("U32", [2**32 - 1] * 1000),
    numbers("U64", [2**63] * 2), numbers("F32", [math.nan] * 3), numbers("F64", [math.inf, -math.inf]),
    numbers("BOOL", [True, False]), numbers("U8", [1] * 5000), texts(["a", "a", ""]), texts([b"\xff\n", "é"]),
)  # fmt: skip
"""Values that a key may have instead of its own, of every type."""
NAMES = (b"", b"x", b"\xff", b"a\nb", b"blk.0.attn_q.weight", b"blk.99999.attn_q.weight", b"x" * 5000)
TYPES = (0, 1, 2, 3, 4, 8, 12, 14, 16, 24, 28, 30, 39, 40, 99, 2**31, 2**32 - 1)
SIZES = (0, 1, 2, 7, 32, 33, 256, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
MERGES, TOKENS = b"tokenizer.ggml.merges", b"tokenizer.ggml.tokens"


def with_vocabulary(path: Path, kind: str, size: int) -> Document:
    """Return a file taken apart, with a vocabulary of so many tokens: "gpt2" or "llama"."""
    letters = [chr(c) for c in range(33, 127)]
    special = ["<s>", "</s>", "<unk>"]
    words = ["Ġa", "ab", "Ġab"] if kind == "gpt2" else ["▁", "▁a", "ab", "▁ab"]
    tokens = [*special, *(["Ġ"] if kind == "gpt2" else []), *letters, *words]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    types = [3, 3, 2] + [1] * (len(tokens) - 3)
    more = {
        "model": text(kind), "pre": text("default"), "tokens": texts(tokens[:size]),
        "token_type": numbers("I32", types[:size]), "bos_token_id": number("U32", 0), "eos_token_id": number("U32", 1),
        "unknown_token_id": number("U32", 2), "add_bos_token": number("BOOL", True),
        "add_space_prefix": number("BOOL", False),
    }  # fmt: skip
    if kind == "gpt2":
        more["merges"] = texts(["Ġ a", "a b", "Ġ ab"])
    else:
        more["scores"] = numbers("F32", [-float(i) for i in range(size)])
    document = edit(path, **{f"tokenizer__ggml__{key}": value for key, value in more.items()})
    document.keys[b"tokenizer.chat_template"] = text("{{ messages[0].content }}")
    return document


def written(case: Case, folder: Path, kind: str = "gpt2", tensors: str = "F32") -> Document:
    """Return a tiny model's file taken apart; tensors: the type of its matrices."""
    folder.mkdir(parents=True, exist_ok=True)
    _, path = write_gguf(case, folder, lambda name, values: tensors)
    return with_vocabulary(path, kind, case.config["vocab_size"])


def _set(key: bytes, value: Value | None) -> Change:
    def change(document: Document) -> None:
        document.keys.pop(key, None)
        if value is not None:
            document.keys[key] = value

    return change


def _nearby(value: Value) -> Iterator[Value]:
    """Yield values like the one that is there."""
    if value.kind == STRING:
        yield from (text(value.value[:-1]), text(value.value + b"\n"), text(value.value * 3))
    elif value.kind == LIST:
        for found in (value.value[:-1], value.value * 2, list(reversed(value.value)), value.value[:1]):
            yield Value(LIST, found, value.element)
    elif value.kind not in (7,):
        for found in (value.value + 1, value.value * 2, max(0, value.value - 1), value.value * 1024):
            try:
                struct.pack("<Q" if value.kind not in (6, 12) else "<d", found)
                yield Value(10 if value.kind not in (6, 12) else 12, found)
            except struct.error:
                continue


def changes_of_keys(document: Document) -> Iterator[tuple[str, Change]]:
    """Yield every key removed, and with every odd value, under names for messages."""
    for key, value in document.keys.items():
        shown = key.decode()
        yield f"{shown} removed", _set(key, None)
        for i, odd in enumerate([*ODD, *_nearby(value)]):
            yield f"{shown} = {i}: {str(odd)[:60]}", _set(key, odd)
    architecture = bytes(document.keys[b"general.architecture"].value).decode()
    for more in (
        "nextn_predict_layers", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast", "rope.scale_linear", "attention.sliding_window", "attention.value_length",
        "attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "logit_scale", "expert_count",
        "expert_used_count", "rope.scaling.attn_factor", "attention.temperature_scale", "expert_group_count",
        "attention.sliding_window_pattern", "leading_dense_block_count", "expert_weights_scale", "split.no",
        "split.count", "split.tensors.count", "general.alignment",
    ):  # fmt: skip
        key = (more if more.startswith(("split.", "general.")) else f"{architecture}.{more}").encode()
        if key not in document.keys:
            for i, odd in enumerate([*ODD, text("yarn"), text("linear"), text("longrope"), text("divided")]):
                yield f"{more} added = {i}: {str(odd)[:60]}", _set(key, odd)


def changes_of_words(document: Document) -> Iterator[tuple[str, Change]]:
    """Yield broken vocabularies and merges."""
    tokens = document.keys[TOKENS].value
    lists = {
        "twice": [*tokens[:-1], tokens[5]], "no UTF-8": [b"\xff\xfe", *tokens[1:]],
        "two of no UTF-8": [b"\xff", b"\xfe", *tokens[2:]], "half a character": [b"\xe5", *tokens[1:]],
        "long": [b"x" * 100_000, *tokens[1:]], "empty": [b"", *tokens[1:]], "two empty": [b"", b"", *tokens[2:]],
        "all alike": [b"a"] * len(tokens), "surrogate": [b"\xed\xa0\x80", *tokens[1:]], "nul": [b"\0", *tokens[1:]],
        "more": [*tokens, *(f"more{i}".encode() for i in range(5000))], "few": tokens[:9], "one": tokens[:1],
        "line": [b"a\nb", *tokens[1:]],
    }  # fmt: skip
    for name, found in lists.items():
        yield f"tokens {name}", _set(TOKENS, texts(found))
    merges = {
        "cycle": ["a b", "b a", "ab a", "a ab"], "twice": ["a b", "a b"], "unknown": ["zz yy"], "no space": ["ab"],
        "three": ["a b c"], "empty": [""], "space": [" "], "no UTF-8": [b"\xff a"], "many": ["a b"] * 20_000,
        "long": ["a " + "b" * 50_000], "of itself": ["a a"], "line": ["a\n b"], "special": ["<s> a"],
    }  # fmt: skip
    for name, pairs in merges.items():
        yield f"merges {name}", _set(MERGES, texts(pairs))
    for kind in (0, 2, 3, 4, 5, 6, 7, -1, 2**31 - 1):
        yield f"types {kind}", _set(b"tokenizer.ggml.token_type", numbers("I32", [kind] * len(tokens)))
    for score in (math.nan, math.inf, 0.0, -1e38):
        yield f"scores {score}", _set(b"tokenizer.ggml.scores", numbers("F32", [score] * len(tokens)))
    for model in ("llama", "gpt2", "bert", "t5", "rwkv", "gemma4", "none", "no_vocab", "plamo2"):
        yield f"model {model}", _set(b"tokenizer.ggml.model", text(model))
    for template in ("{{", "{% for %}", "{{ 1/0 }}", "x" * 1_000_000, "{% include 'x' %}", "\x00", "{{ x.y.z }}"):
        yield f"template {template[:20]!r}", _set(b"tokenizer.chat_template", text(template))


def _put(index: int, attribute: str, value: object) -> Change:
    return lambda document: setattr(document.tensors[index], attribute, value)


def _leave_out(index: int) -> Change:
    return lambda document: document.tensors.pop(index)


def changes_of_tensors(document: Document) -> Iterator[tuple[str, Change]]:
    """Yield every tensor missing, renamed, of other types and shapes, and at other places."""
    for i, entry in enumerate(document.tensors):
        shown = entry.name.decode()
        yield f"{shown} missing", _leave_out(i)
        for name in NAMES:
            yield f"{shown} named {name[:30]!r}", _put(i, "name", name)
        for kind in TYPES:
            yield f"{shown} of type {kind}", _put(i, "kind", kind)
        for size in SIZES:
            for axis in range(len(entry.dims)):
                dims = [*entry.dims[:axis], size, *entry.dims[axis + 1 :]]
                yield f"{shown} dim {axis} is {size}", _put(i, "dims", dims)
        n = math.prod(entry.dims)
        for dims in ([n], [n, 1], [1, n], [1, 1, 1, n], entry.dims[::-1], [*entry.dims, 1], [], [1] * 5, [2**32] * 4):
            yield f"{shown} dims {dims}", _put(i, "dims", dims)
        for start in (0, 1, 32, 2**31, 2**63, 2**64 - 32, 2**64 - 1):
            yield f"{shown} at {start}", _put(i, "start", start)
        for fill in (b"\xff", b"\x00\x7c", b"\x00"):
            yield f"{shown} full of {fill!r}", _put(i, "data", (fill * len(entry.data))[: len(entry.data)])
    shuffled = list(range(len(document.tensors)))
    random.Random(0).shuffle(shuffled)
    yield "shuffled", lambda d: setattr(d, "tensors", [d.tensors[i] for i in shuffled])
    yield "no tensors", lambda d: d.tensors.clear()
    yield "more tensors", lambda d: d.tensors.append(Entry(b"more", [4], 0, bytes(16)))


def changed(document: Document, change: Change) -> Document:
    """Return a copy with a change made."""
    found = copy.deepcopy(document)
    change(found)
    return found
