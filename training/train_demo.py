"""Train the small demo model that is bundled with dllama_mpi.

The model is a Llama of 3.5 million parameters.  Its only training text is what every Python installation carries: the
docstrings and comments of the standard library, the docstrings of the modules written in C, and the help topics of
``pydoc``.  The result is a Hugging Face model directory, with the held-out text on which it was measured.

    pip install '.[train]'
    python training/train_demo.py --out dllama_mpi/demo --minutes 45

The learning rate follows the elapsed time (or the step count, with --steps), so the run ends when the budget is spent.
In its last part half of the steps see the weights as Q4_0 rounds them (the gradient passes straight through), so that
the quantised model stays close to the full one.  Every eight minutes a checkpoint is kept and the model is exported;
the same command, given again, resumes from the checkpoint.  On a shared machine OMP_WAIT_POLICY=PASSIVE is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import BEGIN, END, SPECIAL, Unit, collect, digest, documents, heldout_text, log
from demo_model import EPSILON, HEAD_DIM, HEADS, INNER, KV_HEADS, LAYERS, LENGTH, THETA, VOCAB, WIDTH, Llama, perplexity
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

BATCH, PEAK_RATE, WARM_UP = 8, 3e-3, 0.02  # sequences of LENGTH tokens; part of the run
LONG_FROM, ROUND_FROM = 0.6, 0.7  # parts of the run: whole sequences (halves before), Q4_0 rounding
SAVE_SECONDS = 480
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = [(BEGIN, tokenizer.token_to_id(BEGIN))]
    pair = f"{BEGIN} $A {BEGIN} $B:1"
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", pair=pair, special_tokens=begin)
    return tokenizer


def batches(units: list[Unit], tokenizer: Tokenizer, seed: int) -> Iterator[Tensor]:
    """Endless batches of shape (BATCH, LENGTH + 1), in a new order and a new form each epoch."""
    rng = random.Random(seed)
    while True:
        encoded = tokenizer.encode_batch(documents(units, rng), add_special_tokens=False)
        stream = torch.tensor([i for item in encoded for i in item.ids])[rng.randrange(LENGTH) :]
        windows = stream[: len(stream) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
        log(f"epoch of {len(stream)} tokens")
        yield from windows[rng.sample(range(len(windows)), len(windows) // BATCH * BATCH)].split(BATCH)


@torch.no_grad()
def sample(model: Llama, tokenizer: Tokenizer, prompt: str, count: int = 60, temperature: float = 0.6) -> str:
    generator = torch.Generator().manual_seed(1)
    ids = tokenizer.encode(prompt).ids
    while len(ids) < count and ids[-1] != tokenizer.token_to_id(END):
        weights = (model(torch.tensor([ids]))[0, -1] / temperature).softmax(-1)
        ids.append(int(torch.multinomial(weights, 1, generator=generator)))
    return tokenizer.decode(ids)


def export(out: Path, model: Llama, tokenizer: Tokenizer, heldout: str, training: str) -> Llama:
    """Write the Hugging Face directory; each file appears whole.  Returns the model as it was stored, in bfloat16."""
    state = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    stored = Llama().eval()
    stored.load_state_dict(state)
    ids = torch.tensor(tokenizer.encode(heldout).ids)
    ppl = {kind: perplexity(stored, ids, kind) for kind in ("f32", "q80", "q40")}
    log("perplexity " + ", ".join(f"{k} {v:.3f} ({100 * (v / ppl['f32'] - 1):+.2f} %)" for k, v in ppl.items()))
    special = {"bos_token_id": tokenizer.token_to_id(BEGIN), "eos_token_id": tokenizer.token_to_id(END)}
    config = (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
        | {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
        | {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rope_theta": THETA}
        | {"max_position_embeddings": LENGTH, "rms_norm_eps": EPSILON, "hidden_act": "silu", "rope_scaling": None}
        | {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, **special}
    )
    names: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    names |= {"model_max_length": LENGTH, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    card = f"""\
        # The demo model of dllama_mpi

        A Llama of {sum(p.numel() for p in state.values()):,} parameters ({LAYERS} layers of width {WIDTH},
        {HEADS} heads, {KV_HEADS} key/value heads, {VOCAB} tokens, {LENGTH} positions) that continues text in the
        manner of Python's documentation. What it says is not to be relied on.

        Data: the docstrings, comments and help topics of the standard library of CPython {platform.python_version()}
        (PSF licence). `heldout.txt` is from sources that were not trained on.
        The weights are under the MIT licence.

        Training: `training/train_demo.py`, {training}.

        Perplexity on `heldout.txt` (windows of {LENGTH}, stride {LENGTH // 2}): {ppl["f32"]:.2f} in float32; with Q8_0
        activations {ppl["q80"]:.2f} for Q8_0 weights and {ppl["q40"]:.2f} for Q4_0 weights.
        """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".demo-") as name:
        new = Path(name)
        save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(new / "tokenizer.json"))
        for file, content in {"config": config, "tokenizer_config": names, "generation_config": special}.items():
            (new / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(textwrap.dedent(card), encoding="utf-8")
        (new / "heldout.txt").write_text(heldout, encoding="utf-8")
        for path in new.iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model of dllama_mpi.")
    parser.add_argument("--out", type=Path, default=Path("dllama_mpi/demo"), help="model directory to write")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/demo-checkpoint"), help="folder to resume from")
    parser.add_argument("--minutes", type=float, default=45, help="time to train, over all resumed runs")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    units = collect()
    training = [unit for unit in units if digest(unit.source)[0] % 20 != 7]  # the others, one in twenty, are held out
    heldout = heldout_text([unit for unit in units if digest(unit.source)[0] % 20 == 7])
    log(f"{len(training)} texts to train on, {len(units) - len(training)} held out")
    tokenizer = train_tokenizer([unit.render() for unit in training])
    model = Llama()
    vectors, matrices = ([p for p in model.parameters() if p.dim() == dim] for dim in (1, 2))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    step, elapsed, mean = 0, 0.0, 0.0
    args.checkpoint.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoint / "state.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, elapsed, tokenizer = saved["step"], saved["elapsed"], Tokenizer.from_str(saved["tokenizer"])
        log(f"resumed at step {step}, {elapsed / 60:.1f} minutes")

    def save() -> Llama:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "elapsed": elapsed}
        torch.save({**state, "tokenizer": tokenizer.to_str()}, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)
        note = f"{step} steps of {BATCH * LENGTH} tokens, {elapsed / 60:.0f} minutes on a CPU"
        return export(args.out, model, tokenizer, heldout, note)

    clock, saved_at = time.monotonic(), elapsed
    rng = random.Random(args.seed + step)
    for batch in batches(training, tokenizer, args.seed + step):
        progress = step / args.steps if args.steps else elapsed / 60 / args.minutes
        if progress >= 1:
            break
        rate = PEAK_RATE * max(min(progress / WARM_UP, 0.02 + 0.49 * (1 + math.cos(math.pi * progress))), 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        kind = "q40" if progress > ROUND_FROM and rng.random() < 0.5 else "f32"
        length = LENGTH if progress > LONG_FROM else LENGTH // 2
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1].reshape(-1, length), kind)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, now = step + 1, time.monotonic()
        elapsed, clock = elapsed + now - clock, now
        mean = loss.item() if not mean else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            log(f"step {step}  {elapsed / 60:.1f} min  loss {mean:.3f}  rate {rate:.2e}")
        if elapsed - saved_at > SAVE_SECONDS:
            save()
            saved_at, clock = elapsed, time.monotonic()
    stored = save()
    for prompt in ("Return the", "def open(", "This module provides"):
        print(f"--- {sample(stored, tokenizer, prompt)}")
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{sum(p.numel() for p in stored.parameters())} parameters, {size} bytes")


if __name__ == "__main__":
    main()
