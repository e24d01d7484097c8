"""What answers must keep to: JSON, a schema, a grammar, a tool call; llguidance turns it into masks of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..engine.request import Constraint
from ..text.tokenizer import Tokenizer
from .call_grammar import JSON, call_grammar
from .errors import ApiError
from .schema import ResponseFormat, Tool

_TAIL = 200  # characters in which the end of reasoning is looked for
LARGEST = 200_000  # characters of a schema or grammar
MakeConstraint = Callable[[], Constraint]


class Grammars:
    """Makes constraints for one tokenizer.

    Raises:
        ImportError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        self._tokenizer = tokenizer
        self._stops = sorted(tokenizer.stop_ids)
        self._llguidance = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=self._stops)
        self._matcher = LLMatcher
        self._limits = LLParserLimits(max_grammar_size=100_000, step_lexer_fuel=2_000_000, step_max_items=100_000)
        self._words = (vocab_size + 31) // 32

    def behind(self, make: MakeConstraint, end: re.Pattern[str], first: int | None = None) -> MakeConstraint:
        """Return what makes constraints that begin behind reasoning, see `_Behind`."""
        tokenizer, words = self._tokenizer, self._words
        free = np.zeros(32 * words, np.uint8)
        free[: tokenizer.vocab_size] = 1
        free[self._stops] = 0
        mask = np.packbits(free, bitorder="little").view("<u4").astype(np.uint32)
        return lambda: _Behind(make(), mask, lambda token: tokenizer.token_text(token), end, first)

    def of_format(self, wanted: ResponseFormat, field: str) -> MakeConstraint:
        """Return what makes constraints for a response format that is not "text".

        Raises:
            ApiError: the schema cannot be used.
        """
        schema: Any = {"type": "object"}
        if wanted.type == "json_schema":
            schema = wanted.wanted
            if schema is None:
                raise ApiError(400, f"{field}: json_schema needs a schema", param=field)
        return self._of_schema(schema, field)

    def _of_schema(self, schema: Any, field: str) -> MakeConstraint:
        try:
            text = json.dumps(schema)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{field}: the schema cannot be used: {error}", param=field) from None
        _check_size(text, field)
        return self._checked(self._matcher.grammar_from_json_schema(text, overrides=JSON), field)

    def of_grammar(self, text: str, field: str = "grammar") -> MakeConstraint:
        """Return what makes constraints for a grammar, llama.cpp's GBNF or Lark.

        Raises:
            ApiError: the grammar cannot be used.
        """
        from llguidance.gbnf_to_lark import any_to_lark

        _check_size(text, field)
        try:
            lark = any_to_lark(text)
        except Exception as error:  # of several classes, by what is wrong
            raise ApiError(400, f"{field}: {error}", param=field) from None
        return self._checked(self._matcher.grammar_from_lark(lark), field)

    def of_tools(self, tools: Sequence[Tool], style: str, field: str = "tools") -> MakeConstraint:
        """Return what makes constraints for one call of one of these tools, written in a style of `parsing.STYLES`.

        Raises:
            ApiError: the style is "none", or a tool's schema cannot be used.
        """
        if style == "none":
            raise ApiError(400, "tool_choice: the model's chat template knows of no tools", param="tool_choice")
        try:
            grammar = call_grammar(tools, style, self._mark)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None
        _check_size(grammar, field)
        return self._checked(self._matcher.grammar_from_lark(grammar), field)

    def _mark(self, text: str) -> str:
        """Return a mark as Lark has it: a special token by its id."""
        if not text:
            return ""
        token = self._tokenizer.added_tokens.get(text)
        return json.dumps(text) if token is None else f"<[{token}]>"

    def _checked(self, grammar: str, field: str) -> MakeConstraint:
        made: list[Any] = [self._make(grammar)]
        if made[0].is_error():
            said = str(made[0].get_error()).strip().splitlines()
            raise ApiError(400, f"{field} cannot be used: {' '.join(said)[:500]}", param=field)

        def make() -> Constraint:
            matcher = made.pop() if made else self._make(grammar)
            return _Matching(matcher, self._words, self._stops)

        return make

    def _make(self, grammar: str) -> Any:
        return self._matcher(self._llguidance, grammar, log_level=0, limits=self._limits)


class _Matching:
    """A constraint that follows one answer."""

    def __init__(self, matcher: Any, words: int, stops: Sequence[int]) -> None:
        self._matcher, self._mask = matcher, np.zeros(words, np.uint32)
        self._end = np.zeros(words, np.uint32)
        for token in stops:
            self._end[token // 32] |= np.uint32(1 << token % 32)

    def mask(self) -> np.ndarray:
        """Return which tokens may come next; the end alone, if the grammar is at its own or beyond its limits."""
        if self._matcher.is_stopped() or self._matcher.is_error():
            return self._end
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        return self._mask.copy() if self._mask.any() else self._end

    def accept(self, token: int) -> None:
        """Take the token that came."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class _Behind:
    """A constraint that begins where reasoning ends; the answer cannot end before.

    Args:
        free: the mask of what may come in reasoning. end: what its text ends with.
        first: the token that begins it, where it is the model's choice; None: it has begun.
    """

    def __init__(
        self,
        inner: Constraint,
        free: np.ndarray,
        text_of: Callable[[int], str],
        end: re.Pattern[str],
        first: int | None = None,
    ) -> None:
        self._inner, self._free, self._text_of, self._end, self._first = inner, free, text_of, end, first
        self._is_behind, self._tail = False, ""

    def mask(self) -> np.ndarray:
        """Return which tokens may come next."""
        if not self._is_behind and self._first is None:
            return self._free
        mask = self._inner.mask()
        if not self._is_behind and self._first is not None:
            mask = mask.copy()
            mask[self._first // 32] |= np.uint32(1 << self._first % 32)
        return mask

    def accept(self, token: int) -> None:
        """Take the token that came."""
        if self._is_behind:
            self._inner.accept(token)
        elif self._first is None:
            self._tail = (self._tail + self._text_of(token))[-_TAIL:]
            self._is_behind = self._end.search(self._tail) is not None
        elif token == self._first:
            self._first = None
        else:
            self._is_behind = True
            self._inner.accept(token)


def _check_size(text: str, field: str) -> None:
    if len(text) > LARGEST:
        raise ApiError(400, f"{field} has {len(text)} characters; it may have {LARGEST}", param=field)
