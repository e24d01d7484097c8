"""A tokenizer, rebuilt from a file of Distributed Llama.

Such a file has tokens and scores, not how the model's own tokenizer cuts texts. Distributed Llama begins with single
bytes and joins the two neighbours whose union has the best score, over a whole text. So it is done here, but where the
file's BOS tells whose vocabulary it is: those of Llama 3 and Qwen are cut into words first, as by their own tokenizers
(Distributed Llama joins digits and spaces in other ways than those), and those of sentencepiece begin with characters.
"""

from __future__ import annotations

# ruff: noqa: RUF001 - DeepSeek's tokens are written with full-width bars
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dllama_mpi.errors import ModelError

from .chat_template import sources_in
from .dllama_vocabulary import DllamaVocabulary
from .gguf_tokenizer import Type, gguf_tokenizer
from .pretokenizers import PRE_TOKENIZERS, PreTokenizer
from .score_merges import score_merges
from .token_bytes import BYTE_OF, SPACE_MARK
from .tokenizer import Tokenizer

_CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
_FIRST_BYTE, _BYTES = 3, 256  # where sentencepiece vocabularies have the bytes
# BOS in the vocabularies whose way to cut words is known, by the names of GGUF files.
_KNOWN = {
    "<|begin_of_text|>": "llama-bpe",
    "<｜begin▁of▁sentence｜>": "llama-bpe",  # DeepSeek-R1-Distill-Llama
    "<|endoftext|>": "qwen2",
}
_QWEN = "<|im_start|>"  # comes with Qwen's BOS, which others have, too


def dllama_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.

    Raises:
        ModelError: it cannot be read, or something in it cannot be.
    """
    v = DllamaVocabulary(path)
    if _is_sentencepiece(v):
        return _sentencepiece(v)
    first = _first_special(v)
    specials = range(first, len(v.tokens)) if first is not None else sorted({*_ids(v.bos_id), *v.eos_ids})
    texts = _entries(v, specials)
    try:
        backend = _backend(v, texts, frozenset(specials), _kind(v, texts))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: tokens that cannot be used: {str(error)[:200]}; get it again") from None
    ends = {*_ids(v.bos_id), *v.eos_ids}
    backend.add_tokens(
        [AddedToken(texts[n], special=n in ends or _is_mark(texts[n]), normalized=False) for n in specials]
    )
    return _tokenizer(v, backend, texts)


def _tokenizer(v: DllamaVocabulary, backend: Backend, texts: list[str]) -> Tokenizer:
    special = {"bos_token": _ids(v.bos_id), "eos_token": list(v.eos_ids)}
    named = {name: texts[ids[0]] for name, ids in special.items() if ids}
    templates = {"default": v.template} if v.template else {}
    return Tokenizer(backend, named, v.add_bos, v.eos_ids, templates=templates, origin=str(v.path))


def _ids(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]


def _is_mark(text: str) -> bool:
    """Return whether a special token is not to be shown: "<|...|>" is not, "<think>" is."""
    return text[:2] in ("<|", "<｜") and text[-2:] in ("|>", "｜>")


def _first_special(v: DllamaVocabulary) -> int | None:
    """Return the id from which on tokens are special: BOS, unless it comes before the vocabulary."""
    if v.bos_id is None or any(len(token) == 1 for token in v.tokens[v.bos_id :]):
        return None
    return v.bos_id


def _entries(v: DllamaVocabulary, specials: Iterable[int]) -> list[str]:
    """Return tokens as a vocabulary has them: bytes as characters, special tokens as they are; each once."""
    are_special, found = frozenset(specials), dict[str, int]()
    for token_id, token in enumerate(v.tokens):
        text = ""
        if token_id in are_special:
            text = token.decode("utf-8", "replace")
        text = text if text and "\ufffd" not in text else "".join(_CHARACTER_OF[byte] for byte in token)
        found[text if text not in found else f"{text}#{token_id}"] = token_id
    if len(found) < len(v.tokens):
        raise ModelError(f"{v.path}: has {len(v.tokens) - len(found)} tokens twice; get it again")
    return list(found)


def _kind(v: DllamaVocabulary, texts: list[str]) -> PreTokenizer | None:
    """Return how words are cut, where the vocabulary is known."""
    name = _KNOWN.get(texts[v.bos_id]) if v.bos_id is not None else None
    if name is None or (name == "qwen2" and _QWEN not in texts):
        return None
    return PRE_TOKENIZERS[name]


def _backend(v: DllamaVocabulary, texts: list[str], specials: frozenset[int], kind: PreTokenizer | None) -> Backend:
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    regular = [text for token_id, text in enumerate(texts) if token_id not in specials]
    closed = frozenset(texts[token_id] for token_id in specials)
    merges = score_merges(vocab, regular, np.array(v.scores, np.float32), closed)
    backend = Backend(models.BPE(vocab, merges, ignore_merges=kind is not None and kind.ignore_merges))
    if kind is not None and (normalizer := kind.normalizer()) is not None:
        backend.normalizer = normalizer
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = whole if kind is None else kind.build()
    backend.decoder = decoders.ByteLevel()
    return backend


# ---- sentencepiece


def _is_sentencepiece(v: DllamaVocabulary) -> bool:
    """Return whether ids 3 to 258 are the bytes, as themselves or written as <0x00> to <0xFF>, BOS before them."""
    after = v.tokens[_FIRST_BYTE : _FIRST_BYTE + _BYTES]
    return (
        v.bos_id in range(_FIRST_BYTE)
        and len(after) == _BYTES
        and all(token in (bytes([byte]), b"<0x%02X>" % byte) for byte, token in enumerate(after))
    )


def _sentencepiece(v: DllamaVocabulary) -> Tokenizer:
    """Build the tokenizer that a GGUF file with the same vocabulary has."""
    texts, types = dict[str, int](), np.full(len(v.tokens), Type.NORMAL)
    types[_FIRST_BYTE : _FIRST_BYTE + _BYTES] = Type.BYTE
    for token_id, token in enumerate(v.tokens):
        text = _characters(token)
        if types[token_id] == Type.BYTE:
            text = f"<0x{token_id - _FIRST_BYTE:02X}>"
        elif token_id < _FIRST_BYTE or token_id in v.eos_ids:
            types[token_id] = Type.UNKNOWN if token_id == 0 else Type.CONTROL
        else:
            text = text.replace(" ", SPACE_MARK)
        texts[text if text not in texts else f"{text}#{token_id}"] = token_id
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(texts),
        "tokenizer.ggml.scores": np.array(v.scores, np.float32),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": v.bos_id,
        "tokenizer.ggml.add_bos_token": v.add_bos,
    }
    if v.eos_ids:
        metadata["tokenizer.ggml.eos_token_id"] = v.eos_ids[0]
    if v.template:
        metadata["tokenizer.chat_template"] = v.template
    made = gguf_tokenizer(metadata, str(v.path))
    made.eos_ids = tuple(dict.fromkeys([*made.eos_ids, *v.eos_ids]))
    made.stop_ids |= frozenset(v.eos_ids)
    return made


def _characters(token: bytes) -> str:
    """Return a token's text. What is no UTF-8 is a character that a converter took for a byte-level vocabulary's."""
    text = token.decode("utf-8", "surrogateescape")
    return "".join(_CHARACTER_OF[ord(c) - 0xDC00] if "\udc80" <= c <= "\udcff" else c for c in text)


# ---- as files


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return a tokenizer as the files of a Hugging Face model directory."""
    settings: dict[str, Any] = {**tokenizer.special_tokens, "add_bos_token": tokenizer.adds_bos}
    sources = tokenizer.templates or next(filter(None, map(sources_in, tokenizer.folders)), {})
    if sources:
        named = [{"name": name, "template": source} for name, source in sources.items()]
        settings["chat_template"] = sources["default"] if list(sources) == ["default"] else named
    ends = {"eos_token_id": list(tokenizer.eos_ids)}
    found = {"tokenizer_config.json": settings, "generation_config.json": ends if tokenizer.eos_ids else {}}
    return {
        "tokenizer.json": tokenizer.to_json().encode(),
        **{name: (json.dumps(content, indent=2) + "\n").encode() for name, content in found.items() if content},
    }
