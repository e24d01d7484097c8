"""How the names in tokenizer.ggml.pre cut a text."""

from __future__ import annotations

import pytest

from dllama_mpi.text.pretokenizers import PRE_TOKENIZERS

TEXT = "I'LL we've pay12345.6 你好カタカナX e\u0301té CamelCASEword's f(x);//\n\n\t y  z  "
CL100K = "I|'LL| we|'ve| pay|123|45|.|6| 你好カタカナX| e|\u0301té| CamelCASEword|'s| f|(x|);//\n\n|\t| y| | z|  "
QWEN2 = CL100K.replace("123|45", "1|2|3|4|5")
GPT2 = "I|'|LL| we|'ve| pay|12345|.|6| 你好カタカナX| e|\u0301|té| CamelCASEword|'s| f|(|x|);//|\n\n\t| y| | z|  "
STARCODER = GPT2.replace("12345", "1|2|3|4|5")
O200K = "I'LL| we've| pay|123|45|.|6| 你好カタカナ|X| e\u0301té| Camel|CASEword's| f|(x|);//\n\n|\t| y| | z|  "
DEEPSEEK3 = CL100K.replace(" 你好カタカナX| e|\u0301té", " |你好カタカナ|X| e\u0301té")
EXPECTED = {
    "default": GPT2.replace("12345", "123|45").replace("'ve", "'|ve").replace("'s", "'|s"),
    "llama-bpe": CL100K,
    "lfm2": CL100K,
    "dbrx": CL100K,
    "glm4": CL100K,
    "minicpm5": CL100K,
    "jais-2": CL100K,
    "qwen2": QWEN2,
    "hunyuan": QWEN2,
    "bailingmoe": QWEN2,
    "qwen35": QWEN2.replace("e|\u0301té", "e\u0301té"),
    "seed-coder": QWEN2.replace("//\n", "//|\n"),
    "gpt-4o": O200K,
    "minimax-m2": O200K,
    "tekken": O200K.replace("123|45", "1|2|3|4|5").replace("I'LL| we've", "I|'LL| we|'ve").replace("'s", "|'s"),
    "tiny_aya": O200K.replace("123|45", "12|345"),
    "youtu": O200K.replace("123|45", "1|2|3|4|5").replace(" 你", " |你"),
    "kimi-k2": O200K.replace(" 你好", " |你好|"),
    "deepseek-v3": DEEPSEEK3,
    "hunyuan-dense": DEEPSEEK3,
    "deepseek-llm": "I|'|LL| we|'|ve| pay|1|2|3|4|5|.|6| |你好カタカナ|X| e|\u0301|t|é| CamelCASEword|'|s| f|(|x|);//"
    "|\n|\n|\t| y| | z|  ",
    "starcoder": STARCODER,
    "refact": STARCODER,
    "smollm": STARCODER,
    "command-r": STARCODER,
    "gpt-2": GPT2,
    "olmo": GPT2,
    "bloom": "I'LL| we've| pay12345|.|6| 你好カタカナX| e\u0301té| CamelCASEword's| f|(|x|)|;//|\n\n\t| y| | z|  ",
    "superbpe": TEXT.replace("12345.6", "|12|345|.|6|"),
}


def words(name: str, text: str) -> list[str]:
    return [text[first:last] for _, (first, last) in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)]


@pytest.mark.parametrize("name", EXPECTED)
def test_words(name: str) -> None:
    assert "|".join(words(name, TEXT)) == EXPECTED[name]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_nothing_is_lost(name: str) -> None:
    kind = PRE_TOKENIZERS[name]
    for text in (TEXT, "a" * 1000, " " * 100 + "\r\n\t", "👩\u200d👩\u200d👧 ١٢٣ ½", "\u1fbe\u2126\u212a"):
        pieces = [piece for piece, _ in kind.build().pre_tokenize_str(text)]
        assert len("".join(pieces)) == len(text.encode())  # a character for each byte


def test_what_else_a_name_says() -> None:
    assert {name for name, kind in PRE_TOKENIZERS.items() if kind.nfc} >= {"qwen2", "qwen35", "olmo", "command-r"}
    assert {name for name, kind in PRE_TOKENIZERS.items() if kind.ignore_merges} >= {"llama-bpe", "tekken", "glm4"}
    assert not PRE_TOKENIZERS["dbrx"].ignore_merges
    assert PRE_TOKENIZERS["gpt-4o"].normalizer() is None
    assert PRE_TOKENIZERS["llama-bpe"].add_bos
    assert not PRE_TOKENIZERS["qwen2"].add_bos
