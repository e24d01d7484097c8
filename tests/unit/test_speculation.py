"""Tokens from drafts are the tokens without: the same text from the same numbers, the same distribution from others."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine.completion import Completion, Generation
from dllama_mpi.engine.engine import Engine
from dllama_mpi.engine.llm import LLM
from dllama_mpi.engine.lookup import MOST_DRAFTS, DraftCost, Lookup
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.engine.stats import Stats
from dllama_mpi.errors import UsageError
from dllama_mpi.parallel.group import TensorParallelGroup
from tests import naive_sampling
from tests.tiers import all_but
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model

REPEATS = "   If the string is not found, the string is returned.\n\n" * 6
SAMPLERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "repeat_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temperature": 0.4, "seed": 3},
    {"temperature": 0.9, "top_p": 0.9, "seed": 4},
    {"temperature": 1.5, "seed": 5},  # now and then more than the candidates is needed
    {"temperature": 1.0, "top_k": 4, "min_p": 0.05, "seed": 6, "repeat_penalty": 1.1, "frequency_penalty": 0.1},
)


class Scripted(Lookup):
    """Drafts a known continuation, of lengths and with mistakes at places that differ from call to call."""

    def __init__(self, known: list[int], vocabulary: int, seed: int, mistakes: float = 0.2) -> None:
        super().__init__()
        self.known, self.vocabulary, self.mistakes = known, vocabulary, mistakes
        self.rng = np.random.default_rng(seed)

    def propose(self, tokens: list[int], most: int, cost: float) -> list[int]:
        count = min(most, int(self.rng.integers(0, MOST_DRAFTS + 1)))
        drafts = (self.known[len(tokens) :] + [0] * count)[:count]
        wrong = self.rng.random(count) < self.mistakes
        return [(t + 1) % self.vocabulary if bad else t for t, bad in zip(drafts, wrong, strict=True)]


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cost of a draft at its first guess, so that how much is drafted does not hang on times."""
    monkeypatch.setattr(DraftCost, "observe", lambda self, drafted, seconds: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else write_model(CASES[name], root / name)


def load(model: str | Path, **options: Any) -> LLM:
    """Load a model on one rank and one thread."""
    return LLM(model, group=TensorParallelGroup(None), **{"nthreads": 1} | options)


def generate(llm: LLM, prompt: Any, **params: Any) -> Generation:
    """Return what a prompt gives."""
    result = llm.generate(prompt, SamplingParams(**params))
    assert isinstance(result, Generation)
    return result


def scripted(
    llm: LLM, prompts: list[list[int]], known: list[list[int]], seeds: Sequence[int] | None = None, **params: Any
) -> tuple[list[Completion], Stats]:
    """Return what prompts get that run together, with drafts of known continuations, and the figures."""
    texts = [[*prompt, *output] for prompt, output in zip(prompts, known, strict=True)]
    mistakes = params.pop("mistakes", 0.2)
    drafters = iter([Scripted(text, llm.config.vocab_size, i, mistakes) for i, text in enumerate(texts)])
    engine = Engine(llm._runner, llm.group, llm.engine.context, llm.engine.scheduler.limits, lambda: next(drafters))
    stats = Stats(speculates=True)
    asked = [params if seeds is None else params | {"seed": seed} for seed in seeds or range(len(prompts))]
    completions = {}
    for prompt, each in zip(prompts, asked, strict=True):
        request, text = llm.request(prompt, SamplingParams(**each))
        request_id = engine.add(request)
        completions[request_id] = Completion(request_id, text)
    while not engine.is_idle:
        for output in engine.step():
            completions[output.id].take(output)
        if engine.last_step is not None:
            stats.take(engine.last_step)
    return list(completions.values()), stats


# --------------------------------------------------------------------------------------------------------------------
# The same text
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_text_is_the_same_with_and_without(sampler: dict[str, Any]) -> None:
    params = {"max_tokens": 80, "ignore_eos": True} | sampler
    plain = generate(load("demo"), REPEATS, **params)
    drafted = generate(load("demo", speculate="lookup"), REPEATS, **params)
    assert (drafted.token_ids, drafted.text) == (plain.token_ids, plain.text)
    assert drafted.stats.output_tokens == plain.stats.output_tokens == 80
    if sampler == {"temperature": 0}:
        assert drafted.stats.speculation()["accepted"] > 20
        assert len(drafted.stats.decode) < 60


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("name", ["llama_dynamic", "mistral"])
def test_right_and_wrong_drafts_of_several_sequences(name: str, sampler: dict[str, Any], folder: Any) -> None:
    """With prompts in chunks beside them, positions beyond the model's context, and a window where it has one."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, CASES[name].config["vocab_size"], n).tolist() for n in (3, 30, 9, 1, 17)]
    options: dict[str, Any] = {"weights": "f32", "max_seq_len": 64, "max_batch": 3, "prefill_chunk": 7}
    params = {"max_tokens": 30, "ignore_eos": True} | sampler
    alone = [generate(load(folder(name), **options), prompt, **params).token_ids for prompt in prompts]
    found, stats = scripted(load(folder(name), **options, speculate="lookup"), prompts, alone, **params)
    assert [each.token_ids for each in found] == alone
    figures = stats.speculation()
    assert 0 < figures["accepted"] < figures["drafted"]
    used = [each.usage for each in found if each.usage is not None]
    assert (sum(u.drafted for u in used), sum(u.accepted for u in used)) == (figures["drafted"], figures["accepted"])
    assert sum(s.tokens for s in stats.prefill + stats.decode) == sum(map(len, prompts)) + 5 * 30 - 5
    assert sum(s.drafted for s in stats.prefill) > 0
    assert (stats.full_gathers > 0) == ("top_k" not in sampler and sampler["temperature"] > 0.5)


def test_a_session_keeps_only_what_is_right(folder: Any) -> None:
    """After rejected drafts, the next prompt finds the tokens of the text in the cache, and nothing else."""
    rng = np.random.default_rng(8)
    options: dict[str, Any] = {"weights": "f32", "max_seq_len": 128}
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    llm = load(folder("llama2"), **options, speculate="lookup")
    prompt = rng.integers(0, CASES["llama2"].config["vocab_size"], 10).tolist()
    whole = generate(load(folder("llama2"), **options), prompt, **params | {"max_tokens": 80}).token_ids
    drafter = Scripted([*prompt, *whole], llm.config.vocab_size, 0)
    llm.engine = Engine(llm._runner, llm.group, llm.engine.context, llm.engine.scheduler.limits, lambda: drafter)
    for turn in range(4):
        got = generate(llm, [*prompt, *whole[: 20 * turn]], **params)
        assert got.token_ids == whole[20 * turn : 20 * turn + 20]
    assert got.stats.prefill[0].tokens < 20  # of 70: the rest was there


# --------------------------------------------------------------------------------------------------------------------
# Where it ends
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, " found", "string is ret", "\n\n"])
@pytest.mark.parametrize("limit", [1, 2, 3, 17, 40])
def test_the_end_is_met_within_accepted_drafts(stop: str | None, limit: int) -> None:
    params: dict[str, Any] = {"temperature": 0, "max_tokens": limit, "ignore_eos": True, "stop": stop or ()}
    plain = generate(load("demo", max_seq_len=140), REPEATS, **params)
    llm = load("demo", max_seq_len=140, speculate="lookup")
    for drafted in (generate(llm, REPEATS, **params), generate(llm, REPEATS, **params)):
        assert (drafted.token_ids, drafted.text) == (plain.token_ids, plain.text)
        assert drafted.finish_reason == plain.finish_reason
        assert drafted.stats.output_tokens == plain.stats.output_tokens
    assert "".join(llm.stream(REPEATS, SamplingParams(**params))) == plain.text


def test_a_drafted_stop_token_ends_the_text(folder: Any, tmp_path: Path) -> None:
    prompt = [5, 6, 7]
    model = write_model(CASES["llama2"], tmp_path / "model")
    (model / "generation_config.json").write_text("{}")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    whole = generate(load(model, weights="f32", max_seq_len=64), prompt, temperature=0, max_tokens=30).token_ids
    stop = whole[12]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    llm = load(model, weights="f32", max_seq_len=64, speculate="lookup")
    found, stats = scripted(llm, [prompt] * 5, [whole] * 5, temperature=0, max_tokens=30, mistakes=0.0)
    assert stats.speculation()["accepted"] > 0
    for each in found:
        assert (each.token_ids, each.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_cancelled_amid_a_step(folder: Any) -> None:
    """Tokens that were taken are all given out, then nothing more."""
    llm, params = load(folder("llama2"), weights="f32", max_seq_len=64, speculate="lookup"), SamplingParams(0.0)
    known = generate(llm, [5, 6, 7], temperature=0, ignore_eos=True, max_tokens=40).token_ids
    drafter = Scripted([5, 6, 7, *known], llm.config.vocab_size, 1, mistakes=0)
    engine = Engine(llm._runner, llm.group, llm.engine.context, llm.engine.scheduler.limits, lambda: drafter)
    request, _ = llm.request([5, 6, 7], SamplingParams(temperature=params.temperature, ignore_eos=True))
    request_id, taken, reasons = engine.add(request), list[int](), list[str | None]()
    while not engine.is_idle:
        for output in engine.step():
            taken += output.token_ids
            reasons.append(output.finish_reason)
        if len(taken) >= 4:
            engine.cancel(request_id)
            reasons += [output.finish_reason for output in engine.step()]
    assert taken == known[: len(taken)]
    assert 4 <= len(taken) <= 4 + 1 + MOST_DRAFTS
    assert reasons[-1] == "abort"


# --------------------------------------------------------------------------------------------------------------------
# The same distribution
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistakes", all_but([0.3], [0.0, 0.3, 1.0]))
def test_sampled_texts_have_the_models_distribution(mistakes: float, folder: Any) -> None:
    """Chi-square of texts of four tokens against the product of the model's own probabilities.

    The likeliest text is drafted each time, whole or with mistakes; whatever is drafted must not show.
    """
    filters: dict[str, Any] = {"temperature": 1.3, "top_k": 3}
    llm = load(folder("llama2"), weights="f32", max_seq_len=64, max_batch=8, speculate="lookup")
    prompt, draws = [5, 6, 7], 1500
    expected = exact(llm, prompt, 4, filters)
    likeliest = max((chance, list(text)) for text, chance in expected.items())[1]
    params = filters | {"max_tokens": 4, "ignore_eos": True, "mistakes": mistakes}
    found, stats = scripted(llm, [prompt] * draws, [likeliest] * draws, range(draws), **params)
    figures = stats.speculation()
    assert figures["drafted"] > draws
    assert (figures["accepted"] > draws / 8) == (mistakes < 1)
    assert chi_square(Counter(tuple(each.token_ids) for each in found), expected, draws) < 4


def exact(llm: LLM, prompt: list[int], length: int, filters: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Return every text of a few tokens with its probability."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, p in texts.items():
            logits = llm.logits([*prompt, *text])
            assert logits is not None
            for token, q in naive_sampling.distribution(logits[-1], **filters):
                longer[(*text, token)] = p * q
        texts = longer
    return texts


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], draws: int) -> float:
    """Return by how many standard deviations chi-square is above its mean; rare texts count together."""
    assert set(counts) <= set(expected)
    order = sorted(expected, key=lambda text: expected[text])
    groups = [[text] for text in order if expected[text] * draws >= 8]
    rare = [text for text in order if expected[text] * draws < 8]
    cells = [g for g in [rare, *groups] if g]
    wanted = [draws * sum(expected[text] for text in cell) for cell in cells]
    found = [sum(counts[text] for text in cell) for cell in cells]
    value = sum((f - w) ** 2 / w for f, w in zip(found, wanted, strict=True))
    degrees = len(cells) - 1
    assert degrees > 10
    return (value - degrees) / math.sqrt(2 * degrees)


def test_the_chi_square_sees_a_draft_that_is_taken_unchecked(folder: Any) -> None:
    """The measure of the test above is sharp: a tenth of the texts taken from the draft alone would show."""
    llm = load(folder("llama2"), weights="f32", max_seq_len=64)
    expected = exact(llm, [5, 6, 7], 4, {"temperature": 1.3, "top_k": 3})
    texts, rng = list(expected), np.random.default_rng(9)
    drawn = rng.choice(len(texts), 4000, p=np.array(list(expected.values())) / sum(expected.values()))
    fair = [texts[i] for i in drawn]
    likeliest = max(expected, key=lambda text: expected[text])
    assert chi_square(Counter(fair), expected, 4000) < 4
    assert chi_square(Counter([*fair[400:], *itertools.repeat(likeliest, 400)]), expected, 4000) > 10


# --------------------------------------------------------------------------------------------------------------------
# Figures and options
# --------------------------------------------------------------------------------------------------------------------


def test_figures_are_shown_where_tokens_are_drafted() -> None:
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    plain = generate(load("demo"), REPEATS, **params).stats
    assert "speculation" not in plain.to_dict()
    assert "drafted" not in "\n".join(plain.summary_lines() + plain.step_lines())
    for off in (None, "off"):
        assert not generate(load("demo", speculate=off), REPEATS, **params).stats.speculates
    stats = generate(load("demo", speculate="lookup"), REPEATS, **params).stats
    report = stats.to_dict()
    assert report["output_tokens"] == 30
    assert report["decode"]["tokens"] == 29
    figures = report["speculation"]
    assert figures["acceptance_rate"] == figures["accepted"] / figures["drafted"]
    assert figures["tokens_per_decode_step"] == 29 / len(stats.decode) > 1
    assert f"drafted {figures['drafted']} tokens, accepted {figures['accepted']}" in "\n".join(stats.summary_lines())
    assert all("drafted" in line for line in stats.step_lines())
    json.dumps(report)


def test_a_text_too_short_for_drafts_has_figures_too() -> None:
    stats = generate(load("demo", speculate="lookup"), REPEATS, temperature=0, max_tokens=1, ignore_eos=True).stats
    assert stats.speculation() == {
        "drafted": 0,
        "accepted": 0,
        "acceptance_rate": None,
        "tokens_per_decode_step": None,
    }
    assert "drafted 0 tokens, accepted 0" in stats.summary_lines()


def test_an_unknown_way_to_speculate() -> None:
    with pytest.raises(UsageError, match=r"^speculate is 'guess'; it must be one of off, lookup$"):
        load("demo", speculate="guess")
