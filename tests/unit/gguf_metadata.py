"""Metadata as GGUF files have it, of vocabularies small enough to be read: ids 0 to 255 are the bytes."""

from __future__ import annotations

from typing import Any

from dllama_mpi.text.token_bytes import BYTE_OF

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def as_entry(text: str) -> str:
    """Write a text as an entry of a byte-level vocabulary."""
    return "".join(CHAR_OF[byte] for byte in text.encode())


def byte_level_metadata(pre: str = "gpt-2", words: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """Return a byte-level vocabulary: the bytes, then what builds `words`, <|im_start|>, <|im_end|>, a tool's mark.

    A word is built from the left, a byte at a time; each longer beginning is an entry.

    Args:
        more: further keys, without "tokenizer.ggml.".
    """
    tokens = [CHAR_OF[byte] for byte in range(256)]
    merges = []
    for entry in map(as_entry, words):
        for size in range(2, len(entry) + 1):
            if entry[:size] not in tokens:
                tokens.append(entry[:size])
                merges.append(f"{entry[: size - 1]} {entry[size - 1]}")
    types = [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER_DEFINED]
    tokens += ["<|im_start|>", "<|im_end|>", "<tool_call>"]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges} | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": TEMPLATE}


SENTENCEPIECE = [
    ("<unk>", 0.0, UNKNOWN),
    ("<s>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    ("▁a", -1.0, NORMAL),  # 259
    ("ab", -2.0, NORMAL),
    ("▁ab", -3.0, NORMAL),  # 261
    ("bc", -4.0, NORMAL),
    ("abc", -5.0, NORMAL),  # 263
    ("▁", -6.0, NORMAL),  # 264
    ("a", -7.0, NORMAL),
    ("b", -8.0, NORMAL),
    ("c", -9.0, NORMAL),  # 267
    ("  ", -1000.0, USER_DEFINED),  # 268
    ("<table>", -1000.0, USER_DEFINED),
    ("<end_of_turn>", -1000.0, CONTROL),  # 270
    ("[PAD271]", -10000.0, UNUSED),
]


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """Return a sentencepiece vocabulary: ids 0 to 2 special, 3 to 258 the bytes, then `SENTENCEPIECE`'s."""
    tokens, scores, types = (list(column) for column in zip(*SENTENCEPIECE, strict=True))
    keys = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types} | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
