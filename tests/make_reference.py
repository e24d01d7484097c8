"""Compute the reference files in ``tests/data/reference`` with transformers.

Run from the root of the repository, in an environment with torch and transformers::

    python -m tests.make_reference              # all cases
    python -m tests.make_reference llama2 qwen3  # some of them

The reference of a case holds the logits of one forward pass over a fixed sequence, and tokens generated greedily one
by one with a KV cache. Everything is computed in float32 with eager attention, whatever the type of the weights.

Checks make sure that a reference is worth comparing with:

* no greedy step is decided by less than ``MIN_MARGIN``, so that rounding cannot change the tokens,
* the greedy tokens are also those of one uncached forward pass (except with dynamic rope scaling, see below),
* where a case is about a certain setting, its logits differ by ``MIN_EFFECT`` or more without it.

Of models with experts also: no expert is chosen by less than ``MIN_ROUTER_MARGIN``, and all are chosen by some token.

Dynamic rope scaling (``llama_dynamic``)
    The model has one rotary embedding for all layers, whose state is ``inv_freq`` and ``max_seq_len_cached``, at first
    the unscaled frequencies and ``max_position_embeddings``. Every forward call takes ``seq_len``, the largest
    position id *of that call* plus one, and then

    1. if ``seq_len > max_seq_len_cached``: recomputes ``inv_freq`` for ``seq_len`` and sets
       ``max_seq_len_cached = seq_len``,
    2. if ``seq_len < max_position_embeddings < max_seq_len_cached``: goes back to the unscaled frequencies and sets
       ``max_seq_len_cached = max_position_embeddings``.

    So the frequencies only grow, until a call stays below ``max_position_embeddings`` (not merely at it). One forward
    pass over 48 tokens uses the frequencies for 48 at all positions. In the cached loop the prompt of 40 tokens uses
    those for 40; the call for the token at position 40 uses those for 41, and so on up to 63 for the last one. Keys
    stay in the cache as they were rotated by their own call, so they are compared with queries of other frequencies:
    the cached logits are not those of one forward pass over the same tokens. The state outlives a sequence; each of
    the two references is made with a freshly loaded model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from tests.all_cases import ALL_CASES
from tests.router_margin import routing
from tests.sparse_tensors import filled
from tests.tiny_dense import DENSE_ABLATIONS
from tests.tiny_models.case import Case, Config
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model
from tests.tiny_models.references import GREEDY_TOKENS, REFERENCE_FOLDER, fingerprint, reference_path
from tests.tiny_models.tensors import text_config
from tests.tiny_sparse import FILLED, SPARSE_ABLATIONS
from tests.tiny_state import STATE_ABLATIONS, STATE_FILLED

MIN_MARGIN = 0.02
"""Least difference between the best and the second logit of a greedy step."""
MIN_DISTINCT = 10
"""Least number of different tokens among the generated ones: a constant sequence would show little."""
MIN_EFFECT = 0.1
"""Least effect on a logit of the setting which a case is about."""
MIN_ROUTER_MARGIN = 0.002
"""Least difference between the last expert chosen and the next one."""
TOKENS_SEED = 20

ABLATIONS: dict[str, list[Config]] = {
    # Changes to the config of a case, each of which has to change its logits.
    "llama2": [{"rope_theta": 500000.0}],
    "llama3_gqa": [{"rope_theta": 10000.0}],
    "llama31": [{"rope_scaling": None}],
    "llama32_tied": [{"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}],
    "llama_bias": [{"attention_bias": False}, {"mlp_bias": False}],
    "llama_linear": [{"rope_scaling": None}],
    "llama_dynamic": [{"rope_scaling": None}],
    "llama_yarn": [
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.0,
            }
        },
    ],
    "llama_yarn_full": [
        {"rope_parameters": CASES["llama_yarn_full"].config["rope_parameters"] | change}
        for change in ({"truncate": True}, {"beta_fast": 32}, {"beta_slow": 1}, {"mscale": 0}, {"mscale_all_dim": 0})
    ],
    "llama_yarn_attention_factor": [
        {"rope_scaling": CASES["llama_yarn_attention_factor"].config["rope_scaling"] | {"attention_factor": None}}
    ],
    "mistral": [{"sliding_window": None}, {"sliding_window": 15}, {"sliding_window": 17}],
    "mistral_head_dim": [{"sliding_window": 16}],
    "qwen2": [{"use_sliding_window": True}, {"rope_theta": 10000.0}],
    "qwen2_sliding": [
        {"use_sliding_window": False},
        {"max_window_layers": 0},
        {"max_window_layers": 2},
        {"sliding_window": 15},
        {"sliding_window": 17},
    ],
    "deepseek_distill_like": [{"use_sliding_window": True}, {"rope_theta": 1000000.0}],
}
ABLATIONS |= DENSE_ABLATIONS | SPARSE_ABLATIONS | STATE_ABLATIONS


def load(folder: Path) -> Any:
    """Load the model in ``folder`` in float32, dequantised, with eager attention and experts."""
    config = json.loads((folder / "config.json").read_text())
    auto = transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    quantised = "quantization_config" in config
    model, report = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        **({"quantization_config": transformers.Mxfp4Config(dequantize=True)} if quantised else {}),
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise AssertionError(f"the checkpoint does not fit the model: {report}")
    return model.eval()


def forward(folder: Path, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the logits (n, vocab) of one forward pass of a freshly loaded model over ``tokens`` (n,)."""
    with torch.inference_mode():
        logits = load(folder)(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    return np.asarray(logits.numpy(), dtype=np.float32)


def generate(folder: Path, prompt: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Continue ``prompt`` greedily with a KV cache, regardless of EOS.

    Returns:
        The generated tokens, int64 (24,), and the logits each was chosen from, float32 (24, vocab).
    """
    model = load(folder)
    tokens, logits = [], []
    with torch.inference_mode():
        output = model(torch.from_numpy(prompt)[None], use_cache=True)
        for _ in range(GREEDY_TOKENS):
            last = output.logits[0, -1].numpy()
            tokens.append(int(last.argmax()))
            logits.append(last)
            if len(tokens) < GREEDY_TOKENS:
                next_token = torch.tensor([[tokens[-1]]])
                output = model(next_token, past_key_values=output.past_key_values, use_cache=True)
    return np.array(tokens, dtype=np.int64), np.stack(logits)


def margin(logits: npt.NDArray[np.float32]) -> float:
    """Return the least difference between the best and the second logit of each row of ``logits`` (n, vocab)."""
    best = np.sort(logits, axis=1)[:, -2:]
    return float((best[:, 1] - best[:, 0]).min())


def sequence(case: Case) -> npt.NDArray[np.int64]:
    """Return the fixed token sequence of a case, int64 (length,)."""
    vocab = text_config(case.config)["vocab_size"]
    return np.random.RandomState(TOKENS_SEED).randint(0, vocab, size=case.length).astype(np.int64)


def check_effects(case: Case, tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> list[float]:
    """Check that each of the settings which the case is about matters; return their effects on the logits."""
    effects = []
    for change in ABLATIONS.get(case.name, []):
        with tempfile.TemporaryDirectory() as name:
            folder = write_model(case, Path(name))
            (folder / "config.json").write_text(json.dumps(case.config | change))
            effect = float(np.abs(forward(folder, tokens) - logits).max())
        if effect < MIN_EFFECT:
            raise AssertionError(f"{case.name}: {change} changes the logits by {effect:.4f} only")
        effects.append(effect)
    for end, value in (FILLED | STATE_FILLED).get(case.name, []):
        with tempfile.TemporaryDirectory() as name:
            effect = float(np.abs(forward(write_model(filled(case, end, value), Path(name)), tokens) - logits).max())
        if effect < MIN_EFFECT:
            raise AssertionError(f"{case.name}: {end} filled with {value} changes the logits by {effect:.4f} only")
        effects.append(effect)
    return effects


def check_routers(case: Case, folder: Path, sequences: list[npt.NDArray[np.int64]]) -> float:
    """Check that no router's choice over the sequences is close and that it uses every expert; return its margin."""
    found = [routing(load(folder), tokens) for tokens in sequences]
    least = min(margin for margin, _ in found)
    if least < MIN_ROUTER_MARGIN:
        raise AssertionError(f"{case.name}: a router's margin is {least:.5f} only, take another seed")
    if found[0].unused:
        raise AssertionError(f"{case.name}: {found[0].unused} experts are never chosen")
    return least


def make(case: Case) -> None:
    """Compute, check and save the reference of one case."""
    tokens = sequence(case)
    prompt = tokens[: case.prompt]
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(case, Path(name))
        logits = forward(folder, tokens)
        greedy, steps = generate(folder, prompt)
        if margin(steps) < MIN_MARGIN:
            raise AssertionError(f"{case.name}: a greedy margin is {margin(steps):.4f} only, take another seed")
        different = len(set(greedy.tolist()))
        if different < MIN_DISTINCT:
            raise AssertionError(f"{case.name}: only {different} different tokens, take another seed")
        routed = check_routers(case, folder, [tokens, np.concatenate([prompt, greedy])])
        uncached = forward(folder, np.concatenate([prompt, greedy[:-1]]))[len(prompt) - 1 :]
        deviation = float(np.abs(uncached - steps).max())
        if (deviation < 1e-4) == (case.name == "llama_dynamic"):
            raise AssertionError(f"{case.name}: cached and uncached logits differ by {deviation}")
    effects = check_effects(case, tokens, logits)
    REFERENCE_FOLDER.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        reference_path(case),
        tokens=tokens,
        logits=logits,
        greedy_prompt=prompt,
        greedy=greedy,
        fingerprint=np.array(fingerprint(case)),
    )
    shown = " ".join(f"{effect:.2f}" for effect in effects) or "-"
    print(
        f"{case.name:28} spread {logits.std():.2f}  margin {margin(steps):.3f}  routers {routed:.4f}  "
        f"different tokens {different:2}  cached-uncached {deviation:.1e}  effects {shown}"
    )


def main() -> None:
    """Make the references named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Compute the reference logits of the tiny models with transformers.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="name of a case (default: all)")
    names = parser.parse_args().cases or list(ALL_CASES)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = f"torch {torch.__version__.split('+')[0]}\ntransformers {transformers.__version__}\n"
    print(versions, end="")
    for name in names:
        make(ALL_CASES[name])
    (REFERENCE_FOLDER / "VERSIONS.txt").write_text(versions)


if __name__ == "__main__":
    main()
