"""What each token adds to the text, as bytes: the same bytes wherever the token stands.

The `tokenizers` library decodes whole lists only. A stream needs each token's own share, and a token may hold
a part of a character, so that share is bytes, not text. `ByteRules` reads the library's decoder description
(the "decoder" entry of tokenizer.json) once and then turns one token into bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from dllama_mpi.errors import ModelError

SPACE_MARK = "\u2581"  # "▁", how sentencepiece writes a space


def _byte_level_alphabet() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to its byte (`bytes_to_unicode` in GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    # Bytes that print badly are written as the characters from U+0100 on, in order.
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _byte_level_alphabet()


@dataclass(frozen=True)
class ByteRules:
    """How a vocabulary entry becomes bytes.

    Attributes:
        byte_level: each character of an entry stands for one byte (GPT-2, Llama 3, Qwen, DeepSeek).
        byte_fallback: entries `<0x00>` to `<0xFF>` are single bytes (Llama 2, Mistral, Gemma).
        replacements: (old, new) applied to every entry in order, such as ("▁", " ").
        prefix: put before every entry; " " for a word-level tokenizer without a decoder.
        leading_spaces: how many spaces are dropped at the start of a text, since encoding put them there.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    leading_spaces: int = 0

    @classmethod
    def of(cls, backend: Backend) -> ByteRules:
        """Read the rules from a tokenizer's decoder.

        Raises:
            ModelError: the decoder has a part whose output depends on more than one token at a time.
        """
        if backend.decoder is None:
            return cls(prefix=" ", leading_spaces=1)
        byte_level = byte_fallback = False
        replacements: list[tuple[str, str]] = []
        leading_spaces = 0
        for part in _parts(json.loads(backend.decoder.__getstate__())):
            match part:
                case {"type": "ByteLevel"}:
                    byte_level = True
                case {"type": "ByteFallback"}:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    pass  # joining the entries is what a stream does anyway
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    replacements.append((old, new))
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                    leading_spaces = start
                case {"type": "Metaspace", "replacement": str(mark)}:
                    replacements.append((mark, " "))
                    leading_spaces = int(_metaspace_prepends(part))
                case _:
                    raise ModelError(
                        f"tokenizer.json has the decoder {json.dumps(part)}; known are byte-level and sentencepiece "
                        f"decoders; give such a tokenizer by --tokenizer"
                    )
        return cls(byte_level, byte_fallback, tuple(replacements), leading_spaces=leading_spaces)

    def to_bytes(self, entry: str) -> bytes:
        """Turn a vocabulary entry into the bytes it adds to a text."""
        if self.byte_fallback and len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
            try:
                return bytes.fromhex(entry[3:5])
            except ValueError:
                pass  # "<0xZZ>" is an ordinary entry
        for old, new in self.replacements:
            entry = entry.replace(old, new)
        if self.byte_level:
            try:
                return bytes([BYTE_OF[char] for char in entry])
            except KeyError:
                pass  # an added token is written as it is, outside the byte alphabet
        return (self.prefix + entry).encode()


def _parts(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Walk through a decoder, opening its sequences."""
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _parts(inner)]


def _metaspace_prepends(part: dict[str, Any]) -> bool:
    """Tell whether a Metaspace put a space before the text; files of before 2024 say `add_prefix_space`."""
    scheme = part.get("prepend_scheme", "always")
    return bool(part.get("add_prefix_space", True)) and scheme != "never"
