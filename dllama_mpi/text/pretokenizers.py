"""How byte-level vocabularies cut a text into words, by the names that GGUF files give (tokenizer.ggml.pre).

A file has only the name. What it stands for is the pre-tokenizer, the normalizer and the settings of the model's own
tokenizer.json; a name is shared by models whose tokenizers do the same.
"""

# ruff: noqa: RUF001 - letters and marks of many scripts

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tokenizers import Regex, normalizers, pre_tokenizers

BYTES = "bytes"
"""The step that writes bytes as characters; the last of every kind, if GPT2 is not."""
GPT2 = "gpt2"
"""The same after cutting by GPT-2's expression, which the library has built in."""
DIGITS = "digits"
"""Cut every digit off."""
NUMBERS = "numbers"
"""Cut runs of digits off."""
PUNCTUATION = "punctuation"
"""Cut runs of punctuation off."""
STEPS = frozenset({BYTES, GPT2, DIGITS, NUMBERS, PUNCTUATION})

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"
GPT2_EXPRESSION = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
# OpenAI's cl100k and its descendants: words with one mark before them, then numbers of so many digits.
_CL100K = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_LINES}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_LINES}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    rf"|{_LINES}|{_SPACES}"
)


def _cased(contractions: str, numbers: str, upper: str = _UPPER, lower: str = _LOWER, slash: str = "/") -> str:
    """Return o200k's expression: a word also ends where small letters do."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{slash}]*|{_LINES}|{_SPACES}"


_O200K = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_KIMI = "[\\p{Han}]+|" + _cased(
    f"{_CONTRACTIONS}?", r"\p{N}{1,3}", _UPPER[:-1] + r"&&[^\p{Han}]]", _LOWER[:-1] + r"&&[^\p{Han}]]", slash=""
)
# Escaped where composing characters would change them.
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗ"
    "ὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ"
    "-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-퟿]+"


@dataclass(frozen=True)
class PreTokenizer:
    """What a name in tokenizer.ggml.pre stands for.

    Attributes:
        steps: one after the other: names from STEPS, or expressions whose matches are cut out.
        ignore_merges: a word that is an entry of the vocabulary is that token, whatever the merges make of it.
        add_bos: whether texts begin with BOS if the file does not say.
        nfc: characters are composed first (Unicode's NFC).
        prefix: the tokens that every text begins with instead, if the vocabulary has them.
    """

    steps: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False
    prefix: tuple[str, ...] = ()

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return the library's object."""
        parts = [_step(step) for step in self.steps]
        return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)

    def normalizer(self) -> normalizers.Normalizer | None:
        """Return the library's object, if texts are changed at all."""
        return normalizers.NFC() if self.nfc else None


def _step(step: str) -> pre_tokenizers.PreTokenizer:
    if step in (BYTES, GPT2):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == GPT2)
    if step in (DIGITS, NUMBERS):
        return pre_tokenizers.Digits(individual_digits=step == DIGITS)
    if step == PUNCTUATION:
        return pre_tokenizers.Punctuation(behavior="contiguous")
    return pre_tokenizers.Split(Regex(step), behavior="isolated")


def _split(*expressions: str) -> PreTokenizer:
    return PreTokenizer((*expressions, BYTES))


_GPT2 = PreTokenizer((GPT2,))
_STARCODER = PreTokenizer((DIGITS, GPT2))
_LLAMA3 = replace(_split(_CL100K), ignore_merges=True, add_bos=True)
_GLM = replace(_split(_CL100K), prefix=("[gMASK]", "<sop>"))
_DEEPSEEK3 = _split(
    r"\p{N}{1,3}",
    _HAN_AND_KANA,
    rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*"
    rf"|{_LINES}|{_SPACES}",
)
_BAILING = _split(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|" + _SPACES
)
_BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
# Spaces in pieces of powers of two, the longest first.
_JAIS2_SPACES = "|".join([*(rf"\s{{{1 << n}}}(?!\S)" for n in range(9, 1, -1)), r"\s{1,2}(?!\S)|\s{1}"])
# Groups of three digits that are counted from a number's end: of more, each digit would look at all that follow.
_MOST_GROUPS = 200

# Names of one kind stand together.
_KINDS: dict[str, PreTokenizer] = {
    # What is assumed of files from before there were names.
    "default": _split(r"[\p{P}$+<=>^~|]+", GPT2_EXPRESSION, r"\p{N}+", "[0-9][0-9][0-9]"),
    "llama3 llama-v3 llama-bpe falcon3 pixtral midm-2.0 lfm2": _LLAMA3,
    "dbrx smaug-bpe": _split(_CL100K),
    "chatglm-bpe": _GLM,
    "glm4 glm5": replace(_GLM, ignore_merges=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": replace(_split(_QWEN2), nfc=True),
    "qwen35": replace(_split(_QWEN35), nfc=True),
    "stablelm2 hunyuan solar-open grok-2": _split(_QWEN2),
    "ufakzeka": _split(rf"{_WORD}|\p{{N}}|{_MARKS}|{_LINES}|{_SPACES}"),
    "seed-coder": _split(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}|{_SPACES}"),
    "minicpm5": replace(
        _split(r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_MARKS}|{_LINES}|{_SPACES}"), ignore_merges=True
    ),
    "jais-2": _split(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_LINES}|{_JAIS2_SPACES}"),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _split(_O200K),
    "tekken": replace(_split(_cased("", r"\p{N}")), ignore_merges=True, add_bos=True),
    "tiny_aya cohere2moe": _split(rf"\d{{1,3}}(?=(?:\d{{3}}){{0,{_MOST_GROUPS}}}\b)", _O200K),
    "youtu": replace(
        _split(
            f"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|{_HAN_AND_KANA}", _cased(f"{_CONTRACTIONS}?", r"\p{N}")
        ),
        ignore_merges=True,
    ),
    "kimi-k2": _split(_KIMI),
    "deepseek-llm": PreTokenizer(
        (r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _DEEPSEEK_CJK, DIGITS, BYTES)
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, DIGITS, BYTES)),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _DEEPSEEK3,
    "bailingmoe bailingmoe2 llada-moe": _BAILING,
    "starcoder refact smollm codeshell exaone minerva-7b mellum2": _STARCODER,
    "command-r": replace(_STARCODER, nfc=True),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling": _GPT2,
    "olmo mpt": replace(_GPT2, nfc=True),
    "falcon": PreTokenizer((PUNCTUATION, GPT2, NUMBERS, "[0-9][0-9][0-9]")),
    "bloom gpt3-finnish poro-chat": _split(_BLOOM),
    "viking": PreTokenizer((_BLOOM, DIGITS, BYTES)),
    "superbpe": _split(r"\p{N}+", rf"(?=(\d{{3}}){{1,{_MOST_GROUPS}}}(?!\d))"),
}


def _by_name() -> Iterator[tuple[str, PreTokenizer]]:
    for names, kind in _KINDS.items():
        for name in names.split():
            yield name, kind


PRE_TOKENIZERS: dict[str, PreTokenizer] = dict(_by_name())
"""By the name in tokenizer.ggml.pre."""
