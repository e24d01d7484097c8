"""What loading a GGUF file takes beside a rank's weights: pages that were read are given back."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.gguf_blocks import blocks
from tests.mpi.launch import ROOT, mpiexec

LAYERS, HIDDEN, INNER, WORDS = 8, 2048, 8192, 32000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of random blocks, 0.35 GB."""
    path = tmp_path_factory.mktemp("large") / "model.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(4096)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(INNER)
    w.add_head_count(32)
    w.add_head_count_kv(8)
    w.add_layer_norm_rms_eps(1e-5)
    names = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (512, HIDDEN),
        "attn_v": (512, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
    }
    names |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    kind, ones = gguf.GGMLQuantizationType.Q4_K, np.ones(HIDDEN, np.float32)
    for name in ("token_embd", "output"):
        w.add_tensor(f"{name}.weight", blocks("Q4_K", WORDS, HIDDEN), raw_dtype=kind)
    made = {name: blocks("Q4_K", *shape, seed=1) for name, shape in names.items()}
    for layer in range(LAYERS):
        for name, raw in made.items():
            w.add_tensor(f"blk.{layer}.{name}.weight", raw, raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{layer}.{name}.weight", ones)
    w.add_tensor("output_norm.weight", ones)
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_loading_takes(ranks: int, large: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is told apart on Linux only")
    found = json.loads(mpiexec(ranks, [str(ROOT / "tests/mpi/memory_job.py"), str(large)]).stdout)
    size = large.stat().st_size >> 20
    print(f"{ranks} ranks, a file of {size} MB: {found}")
    assert abs(sum(each["weights"] for each in found) - size) < size // 4
    assert max(each["anonymous"] for each in found) < 100
    assert max(each["mapped"] for each in found) < size // 3
