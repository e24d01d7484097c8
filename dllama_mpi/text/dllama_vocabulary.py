"""The container of Distributed Llama's tokenizers (.t): every number in it checked before it is used.

The format: github.com/b4rtaz/distributed-llama, converter/tokenizer-writer.py and src/tokenizer.cpp. A header, the chat
template, the ids that end a text, then a score and the bytes of each token.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

from dllama_mpi.errors import ModelError

MAGIC, OLD_MAGIC = 0x567124, 0x567123
_KEYS = (
    "version", "vocab_size", "max_token_length", "bos_id", "eos_id", "pad_id", "chat_eos_id", "chat_template",
    "chat_stop", "n_eos_tokens", "add_bos",
)  # fmt: skip
_MOST_HEADER = 8 + 8 * 256
_MOST_TOKENS = 1 << 22
_MOST_ENDS = 1 << 10
_LONGEST_TOKEN = 1024  # bytes
_MOST_TEMPLATE = 1 << 20  # bytes
_WRONG = "truncated, corrupt or no tokenizer of Distributed Llama: get it again, or give another by --tokenizer"


class DllamaVocabulary:
    """What a file says.

    Attributes:
        tokens: bytes of each. scores: one each. bos_id: None if there is none. eos_ids: what ends a text, without
            repetition. add_bos: whether texts begin with BOS. template: the chat template; "" if there is none.
    """

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            ModelError: it cannot be read, or something in it cannot be.
        """
        self.path = path
        self.eos_ids: tuple[int, ...] = ()
        self.bos_id: int | None = None
        try:
            self._data = path.read_bytes() if begins(path) else b""
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error}") from None
        if not self._data:
            raise ModelError(f"{path}: not a tokenizer of Distributed Llama (it does not begin as one)")
        self._at = 4
        count = self._read_old_header() if self._data[:4] == OLD_MAGIC.to_bytes(4, "little") else self._read_header()
        self.tokens, self.scores = self._read_tokens(count)
        for name, ids in (("bos_id", [self.bos_id]), ("eos_id", self.eos_ids)):
            wrong = next((each for each in ids if each is not None and not 0 <= each < count), None)
            if wrong is not None:
                raise self._error(f"{name} is {wrong}, and there are {count} tokens")

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}; {_WRONG}")

    def _ints(self, count: int) -> tuple[int, ...]:
        if self._at + 4 * count > len(self._data):
            raise self._error(f"ends within its header, at byte {len(self._data)}")
        found = struct.unpack_from(f"<{count}i", self._data, self._at)
        self._at += 4 * count
        return found

    def _bytes(self, what: str, size: int, most: int) -> bytes:
        if not 0 <= size <= min(most, len(self._data) - self._at):
            raise self._error(f"{what} has {size} bytes")
        self._at += size
        return self._data[self._at - size : self._at]

    def _read_old_header(self) -> int:
        """Return the number of tokens."""
        count, _, bos, eos, _ = self._ints(5)
        self.bos_id = bos if bos >= 0 else None
        self.eos_ids = (eos,) if eos >= 0 else ()
        self.add_bos, self.template = True, ""
        return self._count(count)

    def _read_header(self) -> int:
        """Return the number of tokens."""
        (size,) = self._ints(1)
        if not 8 <= size <= _MOST_HEADER or size % 8:
            raise self._error(f"tells of a header of {size} bytes")
        values, said, ends = self._ints((size - 8) // 4), dict[str, int](), list[int]()
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not 0 <= key < len(_KEYS):
                raise self._error(f"the header has key {key} (value {value}), known are 0 to {len(_KEYS) - 1}")
            if _KEYS[key] in ("eos_id", "chat_eos_id"):
                ends += [value] if value >= 0 else []
            elif _KEYS[key] in said:
                raise self._error(f"the header has {_KEYS[key]} twice")
            else:
                said[_KEYS[key]] = value
        if said.get("version") != 1:
            raise ModelError(f"{self.path}: a tokenizer of version {said.get('version')}; version 1 can be read")
        template = self._bytes("the chat template", said.get("chat_template", 0), _MOST_TEMPLATE)
        self._bytes("chat_stop", said.get("chat_stop", 0), _MOST_TEMPLATE)
        count = said.get("n_eos_tokens", 0)
        if not 0 <= count <= _MOST_ENDS:
            raise self._error(f"n_eos_tokens is {count}")
        ends += self._ints(count)
        self.eos_ids = tuple(dict.fromkeys(ends))
        bos = said.get("bos_id", -1)
        self.bos_id = bos if bos >= 0 else None
        self.add_bos = said.get("add_bos", 1) == 1
        try:
            self.template = template.removesuffix(b"\0").decode()
        except UnicodeDecodeError:
            raise self._error("the chat template is not UTF-8") from None
        return self._count(said.get("vocab_size", 0))

    def _count(self, count: int) -> int:
        if not 0 < count <= min(_MOST_TOKENS, (len(self._data) - self._at) // 8):
            raise self._error(f"tells of {count} tokens")
        return count

    def _read_tokens(self, count: int) -> tuple[list[bytes], list[float]]:
        tokens, scores = [], []
        for token_id in range(count):
            if self._at + 8 > len(self._data):
                raise self._error(f"ends at token {token_id} of {count}")
            score, size = struct.unpack_from("<fi", self._data, self._at)
            self._at += 8
            if not math.isfinite(score):
                raise self._error(f"token {token_id} has the score {score}")
            if size < 1:
                raise self._error(f"token {token_id} has {size} bytes")
            tokens.append(self._bytes(f"token {token_id}", size, _LONGEST_TOKEN))
            scores.append(score)
        return tokens, scores


def begins(path: Path) -> bool:
    """Return whether a file begins as a tokenizer does."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(4), "little") in (MAGIC, OLD_MAGIC)


def dllama_tokenizer_in(path: Path) -> Path | None:
    """Return the .t file that a path names: itself, or the only one in a folder; None if there is none.

    Raises:
        ModelError: there are several, or it cannot be read.
    """
    try:
        if path.is_file():
            return path if path.suffix == ".t" or begins(path) else None
        if not path.is_dir():
            return None
        files = [each for each in sorted(path.glob("*.t")) if each.is_file() and begins(each)]
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if len(files) > 1:
        names = ", ".join(each.name for each in files[:3])
        raise ModelError(f"{path} holds {len(files)} tokenizers of Distributed Llama; give one by --tokenizer: {names}")
    return files[0] if files else None
