"""A tokenizer and its chat templates, rebuilt from the metadata of a GGUF file."""

# ruff: noqa: RUF001 - DeepSeek's tokens are written with full-width bars

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from .gguf_fields import Fields
from .pretokenizers import PRE_TOKENIZERS, PreTokenizer
from .score_merges import score_merges
from .token_bytes import SPACE_MARK
from .tokenizer import END_TOKENS, Tokenizer

MODEL, PRE, TOKENS, TYPES = (f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type"))
SCORES, MERGES, SPACE_PREFIX = (f"tokenizer.ggml.{name}" for name in ("scores", "merges", "add_space_prefix"))
ADD_BOS = "tokenizer.ggml.add_bos_token"
TEMPLATE = "tokenizer.chat_template"
LONGEST_TOKEN = 1024  # characters
MOST_CHARACTERS = 8_000_000  # of all tokens
ANOTHER = "give a tokenizer that is known by --tokenizer"

# Keys of special tokens; chat templates know them by the names of Hugging Face.
SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the key is spelled so
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
# What sentencepiece models have where a file does not say.
SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
# More tokens that end a text, beside those that are known of any model: of chats, and of code completed in the middle.
MORE_END_TOKENS = (
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<end_of_utterance>", "<turn|>", "<|tool_response>", "<|flush|>",
    "<|calls|>", "<｜end▁of▁sentence｜>", "[e~[", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>",
    "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
# "<|end|>" ends a turn, but where these pairs are it ends a message, after which the answer goes on.
END, MESSAGE_ENDS = "<|end|>", (("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>"), ("<|flush|>", "<|call|>"))
# Names in `PRE` of vocabularies that have merges but write spaces as sentencepiece does.
SPACES_MARKED = ("gemma4", "sarvam-moe")


class Type(IntEnum):
    """The entries of `TYPES`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary:
    """The tokens of a file.

    Attributes:
        ids: id by entry.
        types: a `Type` each.
    """

    def __init__(self, fields: Fields) -> None:
        found = fields.texts(TOKENS)
        if not found:
            raise fields.error(TOKENS, "is missing or empty: there is no vocabulary", ANOTHER)
        if max(map(len, found)) > LONGEST_TOKEN or sum(map(len, found)) > MOST_CHARACTERS:
            raise fields.error(
                TOKENS, f"is too long: a token may have {LONGEST_TOKEN} characters, all {MOST_CHARACTERS}"
            )
        self.texts = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(found)]
        self.ids = {text: token_id for token_id, text in enumerate(self.texts)}
        if len(self.ids) != len(self.texts):
            twice = next(text for token_id, text in enumerate(self.texts) if self.ids[text] != token_id)
            raise fields.error(TOKENS, f"has {twice[:40]!r} twice")
        types = fields.numbers(TYPES, len(found), "iu")
        self.types = np.full(len(found), Type.NORMAL) if types is None else types.copy()
        padding = [token_id for token_id in self.of(Type.USER_DEFINED) if self.texts[token_id] == f"[PAD{token_id}]"]
        self.types[padding] = Type.UNUSED  # as converters have it today: rows of the embedding that no text has

    def of(self, *types: Type) -> list[int]:
        """Return the ids of these types, in order."""
        found: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return found

    def rename(self, token_id: int, text: str) -> None:
        """Write an entry in another way, unless there is one that is written so."""
        if text not in self.ids:
            del self.ids[self.texts[token_id]]
            self.ids[text] = token_id
            self.texts[token_id] = text


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Return whether a file has a vocabulary, if a broken one; some say that they have none."""
    model = metadata.get(MODEL, "none")
    return TOKENS in metadata or not isinstance(model, str) or model not in ("none", "no_vocab")


def gguf_tokenizer(metadata: Mapping[str, Any], origin: str) -> Tokenizer:
    """Rebuild a model's tokenizer.

    Args:
        metadata: of a GGUF file: numbers, strings, booleans, and lists or numpy arrays of these, by key.
        origin: the file's name, for messages.

    Raises:
        ModelError: a key is missing or not what it must be, or the kind of tokenizer is not known.
    """
    fields = Fields(metadata, origin)
    vocabulary = Vocabulary(fields)
    model, pre = fields.text(MODEL), fields.text(PRE) or "default"
    special = {
        name: fields.token_id(f"tokenizer.ggml.{key}", len(vocabulary.texts)) for name, key in SPECIAL_KEYS.items()
    }
    kind = None
    if model == "llama":
        for name, token_id in SENTENCEPIECE_IDS.items():
            if f"tokenizer.ggml.{SPECIAL_KEYS[name]}" not in metadata and token_id < len(vocabulary.texts):
                special[name] = token_id
    elif model == "gpt2" and pre not in SPACES_MARKED:
        kind = PRE_TOKENIZERS.get(pre)
        if kind is None:
            raise fields.error(PRE, f"is {pre[:40]!r}, a way to cut words that is not known", ANOTHER)
    elif model not in ("gpt2", "gemma4"):
        known = "known are gpt2, llama and gemma4"
        raise fields.error(MODEL, f"is {'missing' if model is None else repr(model[:40])}; {known}", ANOTHER)
    ends = _mark_ends(vocabulary, fields)
    try:
        backend = _byte_level(fields, vocabulary, kind) if kind else _sentencepiece(fields, vocabulary, special)
        _add_tokens(fields, backend, vocabulary, special["unk_token"])
    except ValueError as error:
        raise fields.error(TOKENS, f"cannot be used: {error}") from None
    add_bos = fields.flag(ADD_BOS)
    if add_bos is None:
        add_bos = kind.add_bos if kind else True
    prefix = [token for token in kind.prefix if token in vocabulary.ids] if kind else []
    if prefix:
        backend.post_processor = _beginning(prefix, vocabulary)
    texts = {name: vocabulary.texts[token_id] for name, token_id in special.items() if token_id is not None}
    return Tokenizer(
        backend, texts, add_bos and not prefix, end_ids=ends, templates=gguf_templates(metadata, origin), origin=origin
    )


def gguf_templates(metadata: Mapping[str, Any], origin: str) -> dict[str, str]:
    """Return the chat templates of a GGUF file by name; {} if it has none.

    Raises:
        ModelError: one is not a string.
    """
    fields = Fields(metadata, origin)
    found = {"default": fields.text(TEMPLATE)}
    for key in fields.keys_under(f"{TEMPLATE}."):
        found[key.removeprefix(f"{TEMPLATE}.")] = fields.text(key)
    return {name: source for name, source in found.items() if source is not None}


def _mark_ends(vocabulary: Vocabulary, fields: Fields) -> set[int]:
    """Return the ids that end a text; tokens that are known to by their names become control tokens."""
    ids = vocabulary.ids
    message = any(one in ids and other in ids for one, other in MESSAGE_ENDS)
    names = {*END_TOKENS, *MORE_END_TOKENS, *([] if message else [END])} - {"<|user|>", "<|observation|>"}
    found = {ids[name] for name in names if name in ids}
    if found:
        vocabulary.types[list(found)] = Type.CONTROL
    declared = {fields.token_id(f"tokenizer.ggml.{key}", len(ids)) for key in END_KEYS}
    return found | {token_id for token_id in declared if token_id is not None}


def _byte_level(fields: Fields, vocabulary: Vocabulary, kind: PreTokenizer) -> Backend:
    """Build a BPE over bytes that are written as characters."""
    merges = _merges(fields)
    backend = Backend(_bpe(fields, vocab=vocabulary.ids, merges=merges, ignore_merges=kind.ignore_merges))
    normalizer = kind.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = kind.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, vocabulary: Vocabulary, special: Mapping[str, int | None]) -> Backend:
    """Build a BPE over characters, with spaces as marks, and bytes where a character is not in the vocabulary."""
    for token_id in vocabulary.of(Type.USER_DEFINED):  # runs of spaces are merged, not looked for in the text
        text = vocabulary.texts[token_id]
        if not text.strip(" "):
            vocabulary.rename(token_id, text.replace(" ", SPACE_MARK))
    merges = _merges(fields) if fields.text(MODEL) != "llama" else _merges_by_score(fields, vocabulary)
    unknown = special["unk_token"]
    backend = Backend(
        _bpe(
            fields,
            vocab=vocabulary.ids,
            merges=merges,
            unk_token=None if unknown is None else vocabulary.texts[unknown],
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256)),
        )
    )
    marked = normalizers.Replace(" ", SPACE_MARK)
    unmarked = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefixed = fields.flag(SPACE_PREFIX)
    if fields.text(MODEL) == "llama" and prefixed is not False:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), marked])
        backend.decoder = decoders.Sequence([*unmarked, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = marked
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.decoder = decoders.Sequence(unmarked)
    return backend


def _merges(fields: Fields) -> list[tuple[str, str]]:
    """Return the merges that a file lists."""
    found = fields.texts(MERGES)
    if found is None:
        raise fields.error(MERGES, "is missing")
    merges = [tuple(merge.split(" ")) for merge in found]
    broken = next((n for n, merge in enumerate(merges) if len(merge) != 2), None)
    if broken is not None:
        raise fields.error(MERGES, f"has {found[broken][:40]!r} as entry {broken}; it must be two tokens and a space")
    return merges  # type: ignore[return-value]  # pairs, as has been seen


def _merges_by_score(fields: Fields, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the merges of a vocabulary that has scores."""
    found = fields.numbers(SCORES, len(vocabulary.texts), "fiu")
    if found is None:
        raise fields.error(SCORES, "is missing")
    scores: NDArray[np.floating] = found.astype(np.float32)
    if not np.isfinite(scores).all():
        raise fields.error(SCORES, "has a score that is not a finite number")
    scores[vocabulary.of(Type.USER_DEFINED)] = 0.0  # as sentencepiece has them, which joins these first of all
    texts = vocabulary.texts
    mergeable = [texts[token_id] for token_id in vocabulary.of(Type.NORMAL, Type.USER_DEFINED)]
    closed = vocabulary.of(Type.UNKNOWN, Type.CONTROL, Type.UNUSED, Type.BYTE)
    return score_merges(vocabulary.ids, mergeable, scores, frozenset(texts[token_id] for token_id in closed))


def _bpe(fields: Fields, **parts: Any) -> models.BPE:
    """Return the library's model.

    Raises:
        ModelError: a merge is of tokens that are not in the vocabulary, or makes one that is not.
    """
    try:
        return models.BPE(**parts)
    except Exception as error:  # the library raises bare Exception
        raise fields.error(MERGES, f"does not go with the tokens: {str(error)[:200]}") from None


def _add_tokens(fields: Fields, backend: Backend, vocabulary: Vocabulary, unknown: int | None) -> None:
    """Have the tokens found in texts that are no words: control tokens, and those that were added to a vocabulary."""
    strips = fields.text("general.architecture") == "phi3" and fields.text(MODEL) == "llama"
    added = []
    for token_id in vocabulary.of(Type.CONTROL, Type.USER_DEFINED, Type.UNKNOWN):
        kind, text = vocabulary.types[token_id], vocabulary.texts[token_id]
        if kind == Type.UNKNOWN and token_id != unknown:
            continue
        if kind == Type.USER_DEFINED and not text.strip(SPACE_MARK):
            continue
        # Phi-3's tokens of turns take the white space behind them away.
        rstrip = strips and text not in ("<unk>", "<s>", "<|endoftext|>")
        added.append(AddedToken(text, special=kind != Type.USER_DEFINED, normalized=False, rstrip=rstrip))
    backend.add_tokens(added)


def _beginning(prefix: list[str], vocabulary: Vocabulary) -> processors.PostProcessor:
    """Return what puts tokens before every text."""
    tokens = " ".join(prefix)
    ids = [(token, vocabulary.ids[token]) for token in prefix]
    return processors.TemplateProcessing(single=f"{tokens} $A", pair=f"{tokens} $A $B:1", special_tokens=ids)
