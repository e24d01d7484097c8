"""What llama.cpp makes of an exported file, where its package is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dllama_mpi.startup.opening import DEMO, load_tokenizer
from tests.one_rank import OneRank
from tests.unit.test_export import export

from .tiny_tokenizers import HARD_TEXTS, SENTENCES


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_llama_cpp_agrees(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="no llama.cpp: pip install 'dllama-mpi[bench]'")
    file = export("demo", tmp_path / "m.gguf", kind)
    other = llama_cpp.Llama(str(file), logits_all=True, n_ctx=512, verbose=False)
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    for text in (*HARD_TEXTS[1:], *SENTENCES):
        assert other.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text)
    ids = tokenizer.encode((DEMO / "heldout.txt").read_text(encoding="utf-8")[:600])
    other.eval(ids)
    theirs = np.array(other.scores[: len(ids)])
    ours = OneRank(file, weights="f16" if kind == "f16" else None, max_seq_len=512, quiet=True).logits(ids)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.95
    assert np.abs(ours - theirs).mean() < (0.01 if kind == "f16" else 0.2)
