"""A model's tokenizer, from the files of a Hugging Face model directory."""

# ruff: noqa: RUF001 - HunYuan's tokens are written with full-width bars

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from dllama_mpi.errors import DllamaError, ModelError, RequestError

from .files import read_json
from .token_bytes import ByteRules

# Tokens that end a turn or a text in known chat formats. Checkpoints often name only one of them in their files
# (a base model's eos with an instruct model's weights), and generation would run on into an invented next turn.
# gpt-oss answers to <|return|>, or <|call|> to call a tool; GLM's turns end where the user's or a tool's begin.
END_TOKENS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<seed:eos>",
    "<|end_of_sentence|>", "<｜hy_place▁holder▁no▁2｜>", "<|return|>", "<|call|>", "<|user|>", "<|observation|>",
)  # fmt: skip
# "</s>" is an end token only where it is marked special: elsewhere (Gemma) it is HTML's end of struck-out text.
END_TOKENS_IF_SPECIAL = ("</s>",)
# An end token only beside another: "<|end|>" ends Phi's turns, but in gpt-oss (which has no "<|assistant|>") a message,
# after which the answer goes on.
END_TOKENS_BESIDE = {"<|end|>": "<|assistant|>"}

_LONG = 1 << 14  # characters of a text that other threads need not wait for
_HUGE = 1 << 18  # characters of texts that wait for each other: such a one takes a hundred times its size in memory


class Tokenizer:
    """Encode and decode text; know the special tokens.

    Args:
        backend: the `tokenizers` library's object; truncation and padding, which some files set, are switched off.
        special_tokens: text by name, such as {"bos_token": "<s>"}; chat templates see them as variables.
        add_bos: whether encoding starts with BOS; None leaves it to the backend's post-processor.
        eos_ids: the end tokens that the model's files declare.
        folders: where the tokenizer came from, first to last; a chat template is looked for in the same places.
        end_ids: more tokens that end a text.
        templates: chat templates by name that came with the tokenizer itself, asked for before the folders'.
        origin: where these came from, for messages.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_id: the token that begins a text, or None.
        eos_ids: the declared end tokens, without repetition, the tokenizer's own first.
        stop_ids: `eos_ids`, `end_ids` and the well-known end-of-turn tokens the vocabulary has; generation ends at any.
        added_tokens: id by text of the tokens beyond the trained vocabulary, special or not.
        leading_spaces: how many spaces decoding drops at the start of a text (1 for Llama 2, 0 for byte-level).
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        add_bos: bool | None = None,
        eos_ids: Iterable[int] = (),
        folders: Sequence[Path] = (),
        end_ids: Iterable[int] = (),
        templates: Mapping[str, str] | None = None,
        origin: str = "the tokenizer",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._rules = ByteRules.of(backend)
        self._bytes: dict[int, bytes] = {}
        self._huge = threading.Lock()
        self.folders = tuple(folders)
        self.templates, self.origin = dict(templates or {}), origin
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # get_vocab_size counts entries; ids with gaps between them reach further.
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=True), *(token_id + 1 for token_id in added)])
        self.leading_spaces = self._rules.leading_spaces
        self.bos_id = self.token_id(self.special_tokens.get("bos_token"))
        own_eos = self.token_id(self.special_tokens.get("eos_token"))
        declared = [*([] if own_eos is None else [own_eos]), *eos_ids]
        self.eos_ids = tuple(dict.fromkeys(token_id for token_id in declared if 0 <= token_id < self.vocab_size))
        self.stop_ids = frozenset([*self.eos_ids, *end_ids]) | self._well_known_ends()
        self._prefix = self._prefix_ids(add_bos)

    @classmethod
    def load(cls, model_dir: Path, tokenizer_path: Path | None = None) -> Tokenizer:
        """Read a tokenizer from a model directory, or from `tokenizer_path` (a directory or a tokenizer.json).

        The tokenizer's own directory is asked first for tokenizer_config.json and special_tokens_map.json, the
        model's directory next; generation_config.json and config.json belong to the model.

        Raises:
            ModelError: tokenizer.json is missing or unreadable, or another file is not JSON.
        """
        file = _find_tokenizer_json(tokenizer_path or model_dir)
        model_folder = model_dir if model_dir.is_dir() else model_dir.parent
        folders = tuple(dict.fromkeys([file.parent, model_folder]))
        try:
            with _panics(f"{file} cannot be read", ModelError):
                backend = Backend.from_file(str(file))
        except ModelError:
            raise
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise ModelError(f"{file} cannot be read: {error}; download it again, or give one by --tokenizer") from None
        settings = _first(folders, "tokenizer_config.json")
        token_map = _first(folders, "special_tokens_map.json")
        configs = [read_json(model_folder / name) for name in ("generation_config.json", "config.json")]
        special_tokens = _token_texts(token_map) | _token_texts(settings)
        if "bos_token" not in token_map | settings:  # absent, not null: null says that there is none
            _add_by_id(special_tokens, "bos_token", configs, backend)
        if "eos_token" not in special_tokens:
            _add_by_id(special_tokens, "eos_token", configs, backend)
        add_bos = settings.get("add_bos_token")
        eos_ids = [token_id for config in configs for token_id in declared_ids(config, "eos_token_id")]
        return cls(backend, special_tokens, add_bos if isinstance(add_bos, bool) else None, eos_ids, folders)

    @property
    def adds_bos(self) -> bool:
        """Whether encoding starts a text with BOS."""
        return self.bos_id is not None and self.bos_id in self._prefix

    def to_json(self) -> str:
        """Return the tokenizer as the text of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids; the text of a special token becomes that token.

        Args:
            text: any text; the prompt a chat template rendered is encoded with `add_special_tokens=False`.
            add_special_tokens: start with BOS if the model wants it and the text does not begin with it already.
                No end token is ever added: there would be nothing to continue.

        Raises:
            RequestError: the text is not valid Unicode, or the tokenizer's expressions take too long on it.
        """
        try:
            text.encode()  # JSON and argv can smuggle in half a surrogate pair, and the library may guess at it
        except UnicodeEncodeError as error:
            raise RequestError(
                f"character {error.start} of the text is {text[error.start]!a}, half a surrogate pair; send valid UTF-8"
            ) from None
        with _panics(f"the tokenizer of {self.origin} gives up on this text", RequestError):
            if len(text) > _LONG:
                with self._huge if len(text) > _HUGE else contextlib.nullcontext():
                    encoding = self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
            else:
                encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not add_special_tokens or ids[: len(self._prefix)] == self._prefix:
            return ids
        return self._prefix + ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        This is what a `TextStream` gives in pieces. It equals the library's own decoding, but for one thing:
        of a run of byte tokens that is not valid as a whole the library shows nothing but U+FFFD, while here the
        valid characters in it stay (as in sentencepiece), since a stream has long shown them.
        """
        of = self.visible_bytes if skip_special_tokens else self.token_bytes
        text = b"".join(of(token_id) for token_id in ids).decode("utf-8", errors="replace")
        for _ in range(self.leading_spaces):
            text = text.removeprefix(" ")
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, perhaps a part of a character; b"" for an id outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            entry = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            found = self._bytes[token_id] = b"" if entry is None else self._rules.to_bytes(entry)
        return found

    def visible_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token adds to the text people see: none for a special token."""
        return b"" if token_id in self._special_ids else self.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """Return one token as text to show, special or not; parts of a character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Tell whether a token is a control token, not shown in the text."""
        return token_id in self._special_ids

    def token_id(self, token: str | None) -> int | None:
        """Return the id of an entry or an added token; None if there is none, or none is asked for."""
        found: int | None = None if token is None else self._backend.token_to_id(token)
        return found

    def _well_known_ends(self) -> frozenset[int]:
        ends = {self.added_tokens[token] for token in END_TOKENS if token in self.added_tokens}
        marked = {self.added_tokens[token] for token in END_TOKENS_IF_SPECIAL if token in self.added_tokens}
        beside = {
            self.added_tokens[token]
            for token, other in END_TOKENS_BESIDE.items()
            if token in self.added_tokens and other in self.added_tokens
        }
        return frozenset(ends | (marked & self._special_ids) | beside)

    def _prefix_ids(self, add_bos: bool | None) -> list[int]:
        """Return what encoding puts before a text: usually BOS or nothing, two tokens in GLM.

        `add_bos_token` in tokenizer_config.json overrules the post-processor, as it does in transformers:
        DeepSeek's tokenizer.json leaves BOS to it.
        """
        with _panics(f"{self.origin} cannot be used", ModelError):
            sample = self._backend.encode("a", add_special_tokens=True)
        before = len(list(takewhile(bool, sample.special_tokens_mask)))
        prefix: list[int] = sample.ids[:before]
        if before == len(sample.ids):  # a vocabulary without "a": what follows the text is counted too
            prefix = [token_id for token_id in prefix[:1] if token_id == self.bos_id]
        if add_bos is False:
            return [token_id for token_id in prefix if token_id != self.bos_id]
        if add_bos and self.bos_id is not None and self.bos_id not in prefix:
            return [self.bos_id, *prefix]
        return prefix


@contextlib.contextmanager
def _panics(what: str, kind: type[DllamaError]) -> Iterator[None]:
    """Turn a panic of the library into an error: of an expression whose matches take too long, or of a broken file."""
    try:
        yield
    except BaseException as error:  # pyo3's is none of Exception, and has no name to import it by
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {str(error)[:200]}") from None


def _find_tokenizer_json(path: Path) -> Path:
    """Find tokenizer.json at `path`: the file itself, in the directory, or beside a file of weights."""
    if path.is_file() and path.suffix == ".json":
        return path
    folder = path.parent if path.is_file() else path
    file = folder / "tokenizer.json"
    if file.is_file():
        return file
    if not folder.is_dir():
        raise ModelError(f"{folder} does not exist; give a tokenizer.json, or a directory that has it, by --tokenizer")
    if (folder / "tokenizer.model").is_file():
        raise ModelError(
            f"{file} is missing, and the tokenizer.model beside it (sentencepiece) is not read; "
            f"give the model's tokenizer.json, or a directory that has it, by --tokenizer"
        )
    raise ModelError(f"{file} is missing; download it with the model, or give one by --tokenizer")


def _first(folders: Iterable[Path], name: str) -> dict[str, Any]:
    """Read a JSON file from the first folder that has it; {} if none does."""
    return next((read_json(folder / name) for folder in folders if (folder / name).is_file()), {})


def _token_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Pick the `..._token` entries: a string, or a dict with the string as its "content"."""
    texts = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            texts[name] = content
    return texts


def _add_by_id(special_tokens: dict[str, str], name: str, configs: Iterable[dict[str, Any]], backend: Backend) -> None:
    """Name a special token by the first id that the model's configs give for it, if any."""
    for config in configs:
        for token_id in declared_ids(config, f"{name}_id"):
            text = backend.id_to_token(token_id)
            if text is not None:
                special_tokens[name] = text
                return


def declared_ids(config: Mapping[str, Any], key: str) -> list[int]:
    """Read one id or a list of ids, also from the `text_config` of a multimodal model."""
    value = config.get(key)
    nested = config.get("text_config")
    ids = value if isinstance(value, list) else [value]
    found = [token_id for token_id in ids if type(token_id) is int and token_id >= 0]
    return found + (declared_ids(nested, key) if isinstance(nested, dict) else [])
