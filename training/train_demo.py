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
import ast
import hashlib
import importlib
import importlib.machinery
import inspect
import io
import json
import math
import os
import platform
import random
import re
import sys
import sysconfig
import tempfile
import textwrap
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

BEGIN, END, USER, ASSISTANT = SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
VOCAB, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 2048, 256, 512, 5, 8, 4, 32, 512
EPSILON, THETA, DROPOUT = 1e-5, 10000.0, 0.1
BATCH, PEAK_RATE, WARM_UP = 8, 3e-3, 0.02  # sequences of LENGTH tokens; part of the run
LONG_FROM, ROUND_FROM = 0.6, 0.7  # parts of the run: whole sequences (halves before), Q4_0 rounding
SAVE_SECONDS, HELDOUT_BYTES = 480, 50_000
EXCLUDED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "turtledemo", "pydoc_data"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Unit(NamedTuple):
    """One docstring, comment block or help topic: its source, its full name, the line above it and its text."""

    source: str
    name: str
    head: str
    text: str

    def render(self) -> str:
        if not self.head.endswith(":"):
            return f"{self.head}\n\n{self.text}" if self.head else self.text
        closing = "\n    " if "\n" in self.text else ""
        return f'{self.head}\n{textwrap.indent(chr(34) * 3 + self.text, "    ")}{closing}"""'


def clean(text: str) -> str:
    """Normalise white space; drop rules, revision marks and lines with mail addresses; '' if it is not prose."""
    lines = [line.rstrip() for line in inspect.cleandoc(text.expandtabs()).splitlines()]
    text = "\n".join(line for line in lines if not re.search(r"\S@\S+\.\w|\$Id|[-=#*_~]{12,}", line))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    solid = re.sub(r"\s", "", text)
    letters = sum(c.isascii() and c.isalpha() for c in solid)
    unwanted = re.search(r"copyright|all rights reserved|licensed to|-\*-|type: ignore|noqa", text, re.IGNORECASE)
    return "" if len(text) < 24 or letters < 0.6 * len(solid) or unwanted else text


def source_units(path: Path, name: str) -> list[Unit]:
    """The docstrings and the comment blocks of one source file, in their order."""
    code = path.read_text(encoding="utf-8", errors="replace")
    tree = ast.parse(code)
    found = [(0, Unit(name, name, f"Module {name}", ast.get_docstring(tree) or ""))]

    def visit(node: ast.AST, prefix: str) -> None:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            prefix = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, node.bases))
                head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
            else:
                result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                head = f"def {node.name}({ast.unparse(node.args)}){result}:"
            found.append((node.lineno, Unit(name, prefix, head, ast.get_docstring(node) or "")))
        for child in ast.iter_child_nodes(node):
            visit(child, prefix)

    visit(tree, name)
    blocks: dict[int, list[str]] = {}  # by their last lines
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            line = token.start[0]
            blocks[line] = [*blocks.pop(line - 1, []), token.string.lstrip("#").removeprefix(" ")]
    found += [(line, Unit(name, "", "", "\n".join(block))) for line, block in blocks.items()]
    return [unit for _, unit in sorted(found, key=lambda item: item[0])]


def extension_units(name: str) -> Iterator[Unit]:
    """The docstrings of a module written in C, of its classes and of their methods."""
    module = importlib.import_module(name)
    yield Unit(name, name, f"Module {name}", module.__doc__ or "")
    members = [(name, key, value) for key, value in sorted(vars(module).items())]
    for _, key, value in list(members):
        if isinstance(value, type) and value.__module__ in (name, "builtins"):
            members += [(f"{name}.{key}", k, v) for k, v in vars(value).items() if not k.startswith("__")]
    for owner, key, value in members:
        if isinstance(value, type) or callable(value):
            signature = (getattr(value, "__text_signature__", None) or "(...)")[1:-1]
            signature = re.sub(r"[$](module|type)(, )?|[$]|, /|^/", "", signature)
            head = f"class {key}:" if isinstance(value, type) else f"def {key}({signature}):"
            doc = getattr(value, "__doc__", None)
            yield Unit(name, f"{owner}.{key}", head, doc if isinstance(doc, str) else "")


def collect() -> list[Unit]:
    """All the text of the running interpreter's standard library, cleaned, without repetitions."""
    root = Path(sysconfig.get_path("stdlib"))
    units: list[Unit] = []
    extensions = set(sys.builtin_module_names)
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        if parts[0] == "lib-dynload" and path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
            extensions.add(path.name.split(".")[0])
        elif path.suffix == ".py" and not EXCLUDED.intersection(parts) and "sysconfigdata" not in name:
            try:
                units += source_units(path, name)
            except (SyntaxError, tokenize.TokenError):
                log(f"skipped {name}")
    for name in sorted(extensions):
        if not name.startswith(("_test", "_xx", "xx", "_ctypes_test")):
            try:
                units += extension_units(name)
            except ImportError:
                log(f"skipped {name}")
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    units += [Unit(f"topic {key}", "", "", text) for key, text in topics.items()]
    kept: dict[str, Unit] = {}
    for unit in units:
        if text := clean(unit.text):
            kept.setdefault(re.sub(r"\W+", "", text).lower(), unit._replace(text=text))
    return list(kept.values())


def by_source(units: list[Unit]) -> dict[str, list[Unit]]:
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.source, []).append(unit)
    return groups


def heldout_text(units: list[Unit]) -> str:
    """The held-out sources in the order of their hashes, up to 5000 characters of each, HELDOUT_BYTES in all."""
    groups = sorted(by_source(units).items(), key=lambda item: digest(item[0]))
    text = "\n\n".join("\n\n".join(u.render() for u in group)[:5000].rsplit("\n\n", 1)[0] for _, group in groups)
    return text.encode()[:HELDOUT_BYTES].decode(errors="ignore").rsplit("\n\n", 1)[0] + "\n"


def documents(units: list[Unit], rng: random.Random) -> list[str]:
    """One epoch: some sources whole, the others as single units (in full, bare, or as a question and its answer)."""
    texts = []
    for group in by_source(units).values():
        if rng.random() < 0.5:
            texts.append(BEGIN + "\n\n".join(unit.render() for unit in group) + END)
            continue
        for unit in group:
            kind = rng.random()
            if unit.name and kind < 0.15 and len(unit.text) < 1200:
                question = rng.choice(("What does {} do?", "What is {}?", "Explain {}.", "Describe {}."))
                name = unit.name if rng.random() < 0.5 else unit.name.rsplit(".", 1)[-1]
                texts.append(f"{BEGIN}{USER}{question.format(name)}{END}{ASSISTANT}{unit.text}{END}")
            else:
                texts.append(BEGIN + (unit.text if kind < 0.5 else unit.render()) + END)
    rng.shuffle(texts)
    return texts


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


def quantised(x: Tensor, kind: str) -> Tensor:
    """x as Q8_0 or Q4_0 stores it: blocks of 32 on the last axis, one fp16 scale each (Q4_0 codes the extreme as 0)."""
    blocks = x.float().unflatten(-1, (-1, 32))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    d = (extreme.abs() / 127 if kind == "q80" else extreme / -8).half().float()
    scaled = torch.where(d != 0, blocks / torch.where(d != 0, d, 1), 0)
    codes = scaled.round().clamp(-127, 127) if kind == "q80" else (scaled + 8.5).trunc().clamp(0, 15) - 8
    return (codes * d).flatten(-2)


def linear(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """x times the weight, computed in "f32", or with the rounding of "q80" or "q40"."""
    if kind == "f32":
        return F.linear(x, weight)
    with torch.no_grad():
        error = quantised(weight.bfloat16(), kind) - weight
    return F.linear(x if torch.is_grad_enabled() else quantised(x, "q80"), weight + error)


def linears(**shapes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({f"{name}_proj": nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        query, pair = (WIDTH, HEADS * HEAD_DIM), (WIDTH, KV_HEADS * HEAD_DIM)
        self.input_layernorm = nn.RMSNorm(WIDTH, EPSILON)
        self.self_attn = linears(q=query, k=pair, v=pair, o=query[::-1])
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, EPSILON)
        self.mlp = linears(gate=(WIDTH, INNER), up=(WIDTH, INNER), down=(INNER, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
        attn, mlp = ({n[:-5]: m.weight for n, m in part.items()} for part in (self.self_attn, self.mlp))
        mask = self.dropout(torch.ones(2, len(x), 1, WIDTH))  # of whole channels, which costs little time
        h = self.input_layernorm(x)
        q, k, v = (linear(h, attn[n], kind).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).float() for n in "qkv")
        half = HEAD_DIM // 2
        q, k = (t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        with torch.autocast("cpu", enabled=False):
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mask[0] * linear(h.transpose(1, 2).flatten(2), attn["o"], kind)
        h = self.post_attention_layernorm(x)
        h = F.silu(linear(h, mlp["gate"], kind)) * linear(h, mlp["up"], kind)
        return x + mask[1] * linear(h, mlp["down"], kind)


class Llama(nn.Module):
    """The decoder; its parameters have the names of LlamaForCausalLM."""

    def __init__(self) -> None:
        super().__init__()
        parts = {"embed_tokens": nn.Embedding(VOCAB, WIDTH), "layers": nn.ModuleList(Layer() for _ in range(LAYERS))}
        self.model = nn.ModuleDict({**parts, "norm": nn.RMSNorm(WIDTH, EPSILON)})
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = (2 * LAYERS) ** -0.5 if "o_proj" in name or "down_proj" in name else 1
                nn.init.normal_(p, std=0.02 if "embed" in name else residual / math.sqrt(p.shape[1]))
        frequency = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(LENGTH), frequency).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, ids: Tensor, kind: str = "f32") -> Tensor:
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]], kind)
        return linear(self.model["norm"](x), self.model["embed_tokens"].weight, kind)


@torch.no_grad()
def perplexity(model: Llama, ids: Tensor, kind: str) -> float:
    """Windows of LENGTH tokens with a stride of half of that; each token is scored once."""
    loss, scored = 0.0, 1
    for start in range(0, len(ids), LENGTH // 2):
        part = ids[start : start + LENGTH]
        if (new := start + len(part) - scored) > 0:
            loss += F.cross_entropy(model(part[None, :-1], kind)[0, -new:], part[-new:], reduction="sum").item()
            scored += new
    return math.exp(loss / (scored - 1))


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
