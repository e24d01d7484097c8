"""A tokenizer as the metadata of a GGUF file: what `gguf_tokenizer` reads, written, and read again to compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ModelError
from .chat_template import template_sources
from .gguf_tokenizer import (
    ADD_BOS,
    MERGES,
    MODEL,
    MORE_END_TOKENS,
    PRE,
    SCORES,
    SPACE_PREFIX,
    SPECIAL_KEYS,
    TEMPLATE,
    TOKENS,
    TYPES,
    Type,
    gguf_tokenizer,
)
from .pretokenizers import GPT2_EXPRESSION, PRE_TOKENIZERS, PreTokenizer
from .token_bytes import SPACE_MARK
from .tokenizer import END_TOKENS, Tokenizer

Json = dict[str, Any]
WITHOUT = "--without-tokenizer leaves it out: token ids alone can be used then"
_END_KEYS = ("eot_token_id", "eom_token_id")  # for further tokens that end a text
_REST = r"\s+(?!\S)|\s+"  # ends expressions that leave nothing of a text uncut
_SAMPLES = 4000  # entries of the vocabulary that are tried
# What a tokenizer is apt to get wrong: scripts, numbers, runs of spaces and lines, contractions, marks that combine.
_TEXTS = (
    "Hello, world! It's 1234567 o'clock; we'll see, they'Re late.",
    "  two spaces\tand tabs\t\t, trailing  \n\n new   lines\r\n\r\n\n   indented",
    "def f(x):\n    return {'a': [1, 2.5e-10], \"b\": x**2}  # comment\n\n\nclass A:\n\tpass\n",
    "na\u00efve caf\u00e9 \u03a9\u03bc\u03ad\u03b3\u03b1 \u043f\u0440\u0438\u0432\u0435\u0442 \u05e9\u05dc\u05d5\u05dd",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u65e5\u306f\u3044\u3044\u5929\u6c17 \ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f469\u200d\U0001f467 a\u0308\u0323e\u0301 \U0001d518 \ufffd",
    "CamelCaseWords HTTPServer snake_case_name x=-1 3.14159 1,000,000 2024-01-31 ... --- === <<>> #!$%",
)  # fmt: skip


def vocabulary_keys(tokenizer: Tokenizer, size: int, arch: str) -> tuple[Json, str]:
    """Return the metadata of a tokenizer, and what is to be said to people, "" if nothing.

    size: rows of the table of embeddings. arch: the model's architecture, as GGUF calls it.

    Raises:
        ModelError: GGUF has no words for what the tokenizer does, or it has more tokens than the table rows.
    """
    data = json.loads(tokenizer.to_json())
    model = data["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused(f"is a {model.get('type')}, not a BPE as files of GGUF have")
    if tokenizer.vocab_size > size:
        raise ModelError(f"the tokenizer has {tokenizer.vocab_size} tokens, and the model's table {size} rows")
    texts, types = _tokens(tokenizer, data, size)
    prefix = _prefix(tokenizer)
    starts = bool(prefix) and prefix == [tokenizer.bos_id]
    special = {name: tokenizer.token_id(text) for name, text in tokenizer.special_tokens.items()}
    keys: Json = {}
    if _is_byte_level(data):
        keys |= {
            MODEL: "gpt2",
            PRE: _name_of(data, [] if starts else [texts[token_id] for token_id in prefix]),
            MERGES: _merges(data),
        }
    else:
        keys |= {MODEL: "llama", PRE: "default", SPACE_PREFIX: _space_prefix(data)}
        keys[SCORES] = _scores(data, texts)
        types = _sentencepiece_types(texts, types, special.get("unk_token"))
    keys |= {
        TOKENS: texts,
        TYPES: [int(kind) for kind in types],
        ADD_BOS: bool(prefix) and prefix == [tokenizer.bos_id],
    }
    if tokenizer.eos_ids:
        special["eos_token"] = tokenizer.eos_ids[0]
    for name, key in SPECIAL_KEYS.items():
        token_id = special.get(name)
        if token_id is not None:
            keys[f"tokenizer.ggml.{key}"] = token_id
    known = {*END_TOKENS, *MORE_END_TOKENS}
    more = [token_id for token_id in tokenizer.eos_ids[1:] if texts[token_id] not in known]
    keys |= {f"tokenizer.ggml.{key}": token_id for key, token_id in zip(_END_KEYS, more, strict=False)}
    keys |= _templates(tokenizer)
    return keys, _check(tokenizer, keys, arch, data)


def _refused(what: str) -> ModelError:
    return ModelError(f"the tokenizer {what}; {WITHOUT}")


def _tokens(tokenizer: Tokenizer, data: Json, size: int) -> tuple[list[str], list[Type]]:
    """Return the text and the type of each id; ids that no token has are unused."""
    texts, types = [f"[PAD{token_id}]" for token_id in range(size)], [Type.UNUSED] * size
    for text, token_id in data["model"]["vocab"].items():
        texts[token_id], types[token_id] = text, Type.NORMAL
    for text, token_id in tokenizer.added_tokens.items():
        kind = Type.CONTROL if tokenizer.is_special(token_id) else Type.USER_DEFINED
        texts[token_id], types[token_id] = text, kind
    return texts, types


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that every text begins with."""
    whole, own = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return whole[: len(whole) - len(own)]


def _templates(tokenizer: Tokenizer) -> Json:
    sources = template_sources(tokenizer)[0]
    found: Json = {f"{TEMPLATE}.{name}": source for name, source in sources.items() if name != "default"}
    if found:
        found["tokenizer.chat_templates"] = [key.removeprefix(f"{TEMPLATE}.") for key in found]
    if "default" in sources:
        found[TEMPLATE] = sources["default"]
    return found


# --------------------------------------------------------------------------------------------------------------------
# Byte-level vocabularies
# --------------------------------------------------------------------------------------------------------------------


def _parts(step: Json | None, inner: str) -> Iterator[Json]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder one by one."""
    if step is None:
        return
    if step.get("type") == "Sequence":
        for each in step[inner]:
            yield from _parts(each, inner)
    else:
        yield step


def _is_byte_level(data: Json) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(data.get("decoder"), "decoders"))


def _cuts(step: Json | None) -> list[Json]:
    """Return what a pre-tokenizer does, written in one way of several that do the same."""
    found: list[Json] = []
    for part in _parts(step, "pretokenizers"):
        if part["type"] == "ByteLevel":
            if part.get("use_regex", True):
                found.append(_isolated({"Regex": GPT2_EXPRESSION}))
            found.append({"type": "ByteLevel", "add_prefix_space": part["add_prefix_space"]})
        elif part["type"] == "Split" and _keeps_matches(part):
            found.append(_isolated(part["pattern"]))
        else:
            found.append(part)
    return found


def _isolated(pattern: Json) -> Json:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _keeps_matches(part: Json) -> bool:
    """Return whether what lies between matches is dropped where nothing does."""
    covers = str(part["pattern"].get("Regex", "")).endswith(_REST)
    return part["behavior"] == "Removed" and part["invert"] is True and covers


def _name_of(data: Json, prefix: Sequence[str]) -> str:
    """Return the name of a way to cut words.

    Raises:
        ModelError: there is none.
    """
    cuts, ignores = _cuts(data.get("pre_tokenizer")), bool(data["model"].get("ignore_merges"))
    changes = [part["type"] for part in _parts(data.get("normalizer"), "normalizers")]

    def fits(kind: PreTokenizer) -> bool:
        begins = [*kind.prefix] == [*prefix]
        does = kind.ignore_merges == ignores and (["NFC"] if kind.nfc else []) == changes
        return begins and does and _cuts(json.loads(kind.build().__getstate__())) == cuts

    for name, kind in PRE_TOKENIZERS.items():
        if fits(kind):
            return name
    raise _refused("cuts words in a way that GGUF has no name for")


def _merges(data: Json) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]


# --------------------------------------------------------------------------------------------------------------------
# Sentencepiece's
# --------------------------------------------------------------------------------------------------------------------

_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
_PREPENDED = {"type": "Prepend", "prepend": SPACE_MARK}


def _space_prefix(data: Json) -> bool:
    """Return whether a text begins with a space that is not its own.

    Raises:
        ModelError: spaces are not written as sentencepiece writes them.
    """
    changes = [*_parts(data.get("normalizer"), "normalizers")]
    cuts = [*_parts(data.get("pre_tokenizer"), "pretokenizers")]
    if changes in ([_PREPENDED, _REPLACED], [_REPLACED]):
        if all(cut["type"] == "Split" and cut["pattern"] == {"String": " "} for cut in cuts):  # nothing is left to cut
            return len(changes) == 2
    elif not changes and len(cuts) == 1 and cuts[0]["type"] == "Metaspace" and cuts[0]["replacement"] == SPACE_MARK:
        return bool(cuts[0].get("prepend_scheme", "always") != "never")
    raise _refused("treats spaces in a way that GGUF has no words for")


def _scores(data: Json, texts: Sequence[str]) -> list[float]:
    """Return a score an entry: the sooner merges make it, the better."""
    ids = {text: token_id for token_id, text in enumerate(texts)}
    order: dict[int, int] = {}
    for merge in data["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made = ids.get(left + right)
        if made is not None:
            order.setdefault(made, len(order))
    return [-float(order.get(token_id, len(order))) for token_id in range(len(texts))]


def _sentencepiece_types(texts: Sequence[str], types: Sequence[Type], unknown: int | None) -> list[Type]:
    of_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
    found = [
        Type.BYTE if text in of_bytes and kind == Type.NORMAL else kind for text, kind in zip(texts, types, strict=True)
    ]
    if unknown is not None:
        found[unknown] = Type.UNKNOWN
    return found


# --------------------------------------------------------------------------------------------------------------------
# Reading it again
# --------------------------------------------------------------------------------------------------------------------


def _check(tokenizer: Tokenizer, keys: Mapping[str, Any], arch: str, data: Json) -> str:
    """Compare a tokenizer with what is read from its metadata; return what differs beside special tokens, else "".

    Raises:
        ModelError: texts become other tokens.
    """
    made = gguf_tokenizer({**keys, "general.architecture": arch}, "the new file")
    # A Metaspace puts no space before a text that has one, which llama.cpp does as sentencepiece did.
    marks = any(cut["type"] == "Metaspace" for cut in _parts(data.get("pre_tokenizer"), "pretokenizers"))
    texts = keys[TOKENS]
    some = [tokenizer.token_text(token_id) for token_id in range(0, len(texts), max(1, len(texts) // _SAMPLES))]
    for text in (*_TEXTS, " ".join(some), "".join(some), "\n".join(some)):
        for added in tokenizer.added_tokens:
            text = text.replace(added, "") if len(added) > 1 and added in text else text
        text = text.lstrip(" ") if marks else text
        if made.encode(text) != tokenizer.encode(text):
            raise _refused("cannot be written as GGUF has it: texts would become other tokens")
    text = "".join(f"x{token}y {token} z" for token in [*tokenizer.added_tokens][:_SAMPLES])
    if all(made.encode(each) == tokenizer.encode(each) for each in (text, "  x")):
        return ""
    if marks or any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in data["added_tokens"]):
        return (
            "spaces at the beginning of texts and beside special tokens will be read in another way: GGUF has no words"
            " for what this tokenizer does"
        )
    raise _refused("cannot be written as GGUF has it: special tokens in texts would be read in another way")
