"""Small tokenizers of the two kinds that Llama-style models use, trained or built in milliseconds."""

# ruff: noqa: RUF001 - texts of many scripts are what a tokenizer is tested with

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "Once upon a time there was a little girl who liked to play in the garden.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Über den Wolken muss die Freiheit wohl grenzenlos sein.",
    "你好，世界！今天天气很好。",
    "Stop here. STOP there. END of the story. 😀 👩\u200d👩\u200d👧 e\u0301",
]
# What a tokenizer is apt to get wrong: characters of 1 to 4 bytes, joined and combining sequences, odd spaces.
HARD_TEXTS = [
    "",
    " ",
    "  two spaces before",
    "trailing space ",
    "Once upon a time",
    "naïve café, Ωμέγα",
    "你好，世界！",
    "😀👍🏽 and 👩\u200d👩\u200d👧\u200d👦 family",
    "e\u0301 and a\u0308\u0323 combining",
    "tabs\tand\nnew\r\nlines\n\n",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🇩🇪",
    "real U+FFFD: \ufffd!",
]
BYTE_LEVEL_SPECIALS = ["<|begin|>", "<|end|>", "<|eot_id|>"]


def byte_level() -> tokenizers.Tokenizer:
    """Train a byte-level BPE as Llama 3 and Qwen have, so small that most characters are split over tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        special_tokens=BYTE_LEVEL_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def byte_level_after(
    cut: pre_tokenizers.PreTokenizer | None = None, specials: tuple[str, ...] = ("<|begin|>", "<|end|>", "<|start|>")
) -> tokenizers.Tokenizer:
    """Train a byte-level BPE whose special tokens come after its words; cut: into words, by default by GPT-2's rule."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    numbers = " ".join(str(number) for number in range(100, 400))
    backend.train_from_iterator([*SENTENCES, numbers, "def f():\n    if x:\n        return  1\n" * 9], trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return backend


def sentencepiece(metaspace: bool = False) -> tokenizers.Tokenizer:
    """Build a BPE with byte fallback as Llama 2 and Mistral have: ids 0 to 2 special, 3 to 258 the bytes.

    Args:
        metaspace: the spaces by Metaspace, as in newer conversions, not by a Prepend normalizer.
    """
    words = ["▁Once", "▁upon", "▁a", "▁time", "▁the", "▁dog", "▁", "▁▁", "is", "o", "n", "."]
    vocab = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges: list[tuple[str, str]] = []
    letters = ["▁", *map(chr, range(ord("A"), ord("Z") + 1)), *map(chr, range(ord("a"), ord("z") + 1)), ".", "ö"]
    for token in [*letters, *words]:
        for size in range(1, len(token) + 1):  # each prefix of a word is an entry, so that merges can build the word
            if token[:size] not in vocab:
                vocab[token[:size]] = len(vocab)
                merges.append((token[: size - 1], token[size - 1])) if size > 1 else None
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        spaces = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), spaces])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(parts)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def write_model_dir(folder: Path, backend: tokenizers.Tokenizer, **files: dict[str, Any]) -> Path:
    """Write tokenizer.json and, by name without suffix, other JSON files; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
