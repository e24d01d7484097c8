"""Layers with a window: their pages are given back behind it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine.engine import Engine
from dllama_mpi.engine.llm import Prompt
from dllama_mpi.engine.request import Request, SamplingParams
from dllama_mpi.engine.scheduler import Limits
from dllama_mpi.kernels.layout import pages_over
from dllama_mpi.startup.shares import MemoryPlan
from tests import naive_model
from tests.all_cases import ALL_CASES
from tests.fake_model import Guesser, alone, ask, engine_of, run, tokens_of
from tests.one_rank import OneRank
from tests.tiers import slow
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model

KINDS = ["mistral", "gemma3_text", "gpt_oss"]  # all layers have windows; most; every other
WINDOWS = [20, 300]  # within a page; over several
POSITIONS = 4096
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

# --------------------------------------------------------------------------------------------------------------------
# Real models
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Return what gives the directory of a case with another window."""
    root = tmp_path_factory.mktemp("windows")

    def folder(name: str, window: int) -> Path:
        case = ALL_CASES[name]
        changed = case.config | {"sliding_window": window}
        own = Case(f"{name}_{window}", changed, case.dtype, case.seed, checkpoint=case.checkpoint)
        return root / own.name if (root / own.name).exists() else write_model(own, root / own.name)

    return folder


def load(folder: Path, **options: Any) -> OneRank:
    """Return a model on one thread with a context of several pages."""
    return OneRank(folder, **({"weights": "f32", "nthreads": 1, "max_seq_len": POSITIONS, "max_batch": 3} | options))


@pytest.fixture
def one_kind(monkeypatch: pytest.MonkeyPatch) -> Callable[..., OneRank]:
    """Return what loads a model whose layers have all pages alike."""

    def loaded(folder: Path, **options: Any) -> OneRank:
        with monkeypatch.context() as patch:
            patch.setattr(MemoryPlan, "window_pages", 0)
            llm = load(folder, **options)
        assert llm.window_pages == 0
        return llm

    return loaded


def text_of(length: int, seed: int = 0) -> list[int]:
    """Return random tokens."""
    return np.random.default_rng(seed).integers(0, 100, length).tolist()


def check(llm: OneRank) -> None:
    """Check the books of a model that has come to rest."""
    scheduler = llm.engine.scheduler
    scheduler.cache.check(scheduler.running)
    assert scheduler.cache.near.used == 0


@pytest.mark.parametrize("chunk", [64, 256, 600])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", KINDS)
def test_windows_change_no_bit(
    name: str, window: int, chunk: int, folders: Callable[[str, int], Path], one_kind: Callable[..., OneRank]
) -> None:
    """Whole texts, alone, in a batch, and going on behind others' beginnings, at the end of pages and within."""
    folder, text = folders(name, window), text_of(900)
    before, llm = one_kind(folder, prefill_chunk=chunk), load(folder, prefill_chunk=chunk)
    assert 0 < llm.window_pages < llm.pages
    np.testing.assert_array_equal(llm.logits(text), before.logits(text))
    np.testing.assert_array_equal(llm.log_probabilities(text), before.log_probabilities(text))
    asked: list[Prompt] = [[*text[:n], 1, 2] for n in (900, 768, 700, 20)]
    alone = [load(folder, prefill_chunk=chunk).generate(prompt, GREEDY).token_ids for prompt in asked]
    assert [before.generate(prompt, GREEDY).token_ids for prompt in asked] == alone
    assert [each.token_ids for each in llm.generate(asked, GREEDY)] == alone
    again = llm.generate([*text, 1, 2], GREEDY)
    assert (again.token_ids, again.usage.cached_tokens) == (alone[0], 901)
    check(llm)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["mistral", slow("qwen2_sliding")])
def test_logits_are_the_twins(name: str, window: int, folders: Callable[[str, int], Path]) -> None:
    folder, text = folders(name, window), text_of(700)
    llm = load(folder)
    assert 0 < llm.window_pages < llm.pages
    ref = naive_model.Model(folder, "f32").logits(np.array(text))
    np.testing.assert_allclose(llm.logits(text), ref, rtol=0, atol=5e-4)  # 1.5e-4 is measured: rounding


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", KINDS)
def test_few_pages_of_windows(name: str, window: int, folders: Callable[[str, int], Path]) -> None:
    """Sequences that cannot all stay give way and come back, with the text they have alone."""
    folder, prompts = folders(name, window), [text_of(500, seed) for seed in range(3)]
    llm = load(folder)
    params = replace(GREEDY, max_tokens=30)
    ref = [llm.generate(prompt, params).token_ids for prompt in prompts]
    need = llm.memory.need(llm.shards[0])
    tight = load(folder, kv_memory=1.2 * need.cache(POSITIONS) / 1e9)
    assert tight.window_pages < 3 * need.window_pages
    assert [each.token_ids for each in tight.generate(list(prompts), params)] == ref
    check(tight)


@pytest.mark.parametrize("name", KINDS)
def test_penalties_see_what_is_behind_the_window(
    name: str, folders: Callable[[str, int], Path], one_kind: Callable[..., OneRank]
) -> None:
    folder, text = folders(name, WINDOWS[0]), text_of(700)
    params = replace(GREEDY, repeat_penalty=1.3, presence_penalty=0.5)
    assert load(folder).generate(text, params).token_ids == one_kind(folder).generate(text, params).token_ids


def test_drafts_change_nothing(folders: Callable[[str, int], Path]) -> None:
    folder, text = folders("gemma3_text", WINDOWS[1]), text_of(40) * 16
    params = replace(GREEDY, max_tokens=60)
    assert (
        load(folder, speculate="lookup").generate(text, params).token_ids
        == load(folder).generate(text, params).token_ids
    )


# --------------------------------------------------------------------------------------------------------------------
# The engine over a fake model, which checks that all that a window sees is there
# --------------------------------------------------------------------------------------------------------------------


def limits(**changes: Any) -> Limits:
    """Return limits with pages of 4 positions, and a window of 6."""
    given = {"sequences": 4, "pages": 60, "chunk": 7, "page": 4, "window": 6, "window_pages": 40}
    return Limits(**given | changes)


def fed(engine: Engine, runner: Any, request: Request) -> int:
    """Return how many tokens are fed for a request, which gets what it gets alone."""
    before, request_id = runner.fed, engine.add(request)
    assert tokens_of(run(engine)[request_id]) == alone(request, 120)[0]
    return int(runner.fed - before)


@pytest.mark.parametrize("kind", ["plain", "drafts", "apart"])
@pytest.mark.parametrize("window", [1, 3, 4, 5, 6, 17])
def test_a_long_text_holds_few_pages(window: int, kind: str) -> None:
    engine, _ = engine_of(
        limits(window=window, shares=kind != "apart", drafts=20 * (kind == "drafts")),
        context=120,
        drafter=Guesser if kind == "drafts" else None,
    )
    engine.add(ask([i % 5 for i in range(60)], max_tokens=60))
    near = engine.scheduler.cache.near
    most = 0
    while not engine.is_idle:
        engine.step()
        most = max(most, near.used)
    assert 0 < most <= pages_over(window + 7, 4)


def test_few_pages_are_enough_for_a_long_text() -> None:
    for window in (1, 3, 4, 6, 17):
        engine, runner = engine_of(limits(window=window, window_pages=pages_over(window + 6, 4)), context=120)
        assert fed(engine, runner, ask([i % 5 for i in range(70)], max_tokens=50)) == 119


def test_a_beginning_is_shared_as_far_as_its_window_is_there() -> None:
    engine, runner = engine_of(limits(), context=120)
    text = [i * i % 11 for i in range(80)]
    assert fed(engine, runner, ask(text, max_tokens=1)) == 80
    assert fed(engine, runner, ask([*text[:40], 11, 11], max_tokens=1)) == 2
    engine.scheduler.cache.near.forget()
    assert fed(engine, runner, ask([*text[:40], 11, 10], max_tokens=1)) == 42
    # By now the pages before position 40 are there again, those behind are not.
    assert fed(engine, runner, ask([*text[:44], 11, 9], max_tokens=1)) == 6


def test_pages_of_windows_that_were_used_longest_ago_go_first() -> None:
    engine, runner = engine_of(limits(window_pages=8, chunk=4), context=120)
    texts = [[i] * 40 for i in range(3)]
    for text in texts:
        fed(engine, runner, ask(text, max_tokens=1))
    assert fed(engine, runner, ask([*texts[2], 9], max_tokens=1)) == 1
    assert fed(engine, runner, ask([*texts[0], 9], max_tokens=1)) == 41
    assert engine.scheduler.cache.pages.cached > 20


def test_the_ends_of_texts_are_remembered_longest() -> None:
    """Of a long text's pages those that it passes go first, and those of other texts' ends stay."""
    engine, runner = engine_of(limits(pages=120, window_pages=16), context=120)
    texts = [[i] * 32 for i in range(2)]
    for text in texts:
        fed(engine, runner, ask(text, max_tokens=1))
    long = [i % 7 for i in range(100)]
    fed(engine, runner, ask(long, max_tokens=15))
    assert [fed(engine, runner, ask([*text, 9], max_tokens=1)) for text in texts] == [1, 1]
    assert fed(engine, runner, ask([*long[:96], 9], max_tokens=1)) == 1  # near the end of its prompt


def test_where_texts_turn_off_is_remembered() -> None:
    engine, runner = engine_of(limits(pages=200, window_pages=12), context=120)
    beginning = [i * i % 11 for i in range(40)]
    counts = [fed(engine, runner, ask([*beginning, *[i] * 50], max_tokens=1)) for i in range(4)]
    assert counts == [90, 90, 50, 50]


def test_who_cannot_get_pages_of_windows_waits() -> None:
    engine, _ = engine_of(limits(window_pages=6, shares=False), context=120)
    ids = [engine.add(ask([i] * 30, max_tokens=2)) for i in range(2)]
    engine.step()
    assert [s.id for s in engine.scheduler.running] == ids[:1]
    assert list(run(engine)) == ids


def test_a_text_by_itself_needs_few_pages_of_windows() -> None:
    engine, _ = engine_of(limits(window_pages=5))
    cache = engine.scheduler.cache
    seen = 0
    for batch in engine.scheduler.batches([3] * 100):
        first, pages = batch.window_of(int(batch.slots[0]))
        assert first == max(0, int(batch.positions[0]) - 5) // 4
        assert first + len(pages) == int(batch.positions[-1]) // 4 + 1
        seen += batch.tokens
    assert seen == 100
    cache.check([])
    assert (cache.near.used, cache.near.cached, cache.pages.cached) == (0, 0, 0)


def test_a_step_is_small_however_long_the_text() -> None:
    engine, runner = engine_of(limits(pages=600, chunk=100, window_pages=60), context=2000)
    engine.add(ask([i % 7 for i in range(1900)], max_tokens=3))
    run(engine)
    assert len(runner.steps[-1].batch.window_pages) <= 3
    assert len(runner.steps[-1].to_bytes()) < 250


def pools(engine: Engine) -> Iterator[int]:
    """Yield how many pages of each kind are free or remembered."""
    yield engine.scheduler.cache.pages.available
    yield engine.scheduler.cache.near.available


def test_cancelling_gives_all_back() -> None:
    engine, _ = engine_of(limits(), context=120)
    ids = [engine.add(ask([i] * 50, max_tokens=40)) for i in range(3)]
    for _ in range(12):
        engine.step()
    for request_id in ids:
        engine.cancel(request_id)
    run(engine)
    assert list(pools(engine)) == [60, 40]
    engine.scheduler.forget()
    assert engine.scheduler.cache.near.cached == 0
