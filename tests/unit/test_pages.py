"""Pages and slots: who has which, what they hold, which goes first."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dllama_mpi.engine.pages import ROOT, Pages, chain, common
from dllama_mpi.engine.states import Checkpoint, Slots

TEXT = st.lists(st.integers(0, 2), max_size=30)


@given(TEXT, TEXT)
def test_the_common_beginning(first: list[int], second: list[int]) -> None:
    n = common(first, second)
    assert first[:n] == second[:n]
    assert n == min(len(first), len(second)) or first[n] != second[n]


def test_a_key_tells_all_that_was_before() -> None:
    keys = [chain(chain(ROOT, first), second) for first in ([1, 2], [1, 3]) for second in ([4, 5], [4, 6])]
    assert len(set(keys)) == 4
    assert chain(ROOT, [1, 2]) != chain(chain(ROOT, [1]), [2])


def fill(pages: Pages, tokens: list[int]) -> list[int]:
    """Return the pages of a text that is computed whole."""
    held, key = [], ROOT
    for start in range(0, len(tokens), pages.size):
        part = tokens[start : start + pages.size]
        held.append(pages.record(pages.take(key), part))
        key = chain(key, part)
    return held


def test_a_page_is_found_by_its_key_while_it_is_used_and_after() -> None:
    pages = Pages(4, size=2)
    held = fill(pages, [1, 2, 3, 4])
    key = chain(chain(ROOT, [1, 2]), [3, 4])
    assert pages.full(key) == held[1]
    pages.release(held)
    assert pages.full(key) == held[1]
    assert (pages.used, pages.cached, pages.available) == (0, 2, 4)


def test_the_same_text_is_held_once() -> None:
    pages = Pages(4, size=2)
    first, second = fill(pages, [1, 2, 3]), fill(pages, [1, 2, 3])
    assert first[0] == second[0]
    assert first[1] != second[1]  # not full: each goes on in its own
    assert pages.used == 3
    pages.release(first)
    pages.release(second)
    pages.check()


def test_the_end_of_a_text_goes_before_its_beginning_and_old_before_new() -> None:
    pages = Pages(4, size=2)
    first, second = fill(pages, [1, 2, 3, 4]), fill(pages, [5, 6, 7, 8])
    pages.release(first)
    pages.release(second)
    assert [pages.take(b"new") for _ in range(4)] == [first[1], first[0], second[1], second[0]]


def test_the_best_part_of_a_page() -> None:
    pages = Pages(6, size=4)
    fill(pages, [1, 2])
    longer = fill(pages, [1, 2, 3])[0]
    fill(pages, [7, 2, 3])
    assert pages.best(ROOT, [1, 2, 3, 4]) == (longer, 3)
    assert pages.best(ROOT, [9]) == (-1, 0)
    assert pages.best(b"elsewhere", [1, 2]) == (-1, 0)


@given(st.lists(st.tuples(st.integers(0, 3), TEXT), max_size=40), st.integers(8, 12), st.booleans())
def test_the_books_balance(events: list[tuple[int, list[int]]], count: int, shares: bool) -> None:
    """Against a plain model: which pages are used, and that what is found holds what it should."""
    pages, running, content = Pages(count, shares, 4), list[list[int]](), dict[int, list[int]]()
    for kind, tokens in events:
        if kind and running:
            pages.release(running.pop(kind % len(running)))
        elif pages.available >= pages.needed(len(tokens)):
            held = fill(pages, tokens)
            content |= {page: tokens[: 4 * i + 4] for i, page in enumerate(held)}
            running.append(held)
        pages.check()
        assert pages.used == len({page for held in running for page in held})
        key = ROOT
        for start in range(0, len(tokens) // 4 * 4, 4):
            key = chain(key, tokens[start : start + 4])
            page = pages.full(key)
            assert page is None or content[page] == tokens[: start + 4]


def test_slots_keep_the_newest_checkpoints() -> None:
    slots = Slots(3)
    for i in range(4):
        slots.keep(slots.take(), Checkpoint(ROOT, (i,)))
    assert [slots.has(Checkpoint(ROOT, (i,))) for i in range(4)] == [False, True, True, True]
    assert slots.best(ROOT, [1, 5])[1] == 1  # which makes it the newest
    slots.take()
    assert [slots.has(Checkpoint(ROOT, (i,))) for i in range(4)] == [False, True, False, True]


def test_the_longest_checkpoint_serves() -> None:
    slots = Slots(5)
    for rest in ((), (1,), (1, 2), (1, 3)):
        slots.keep(slots.take(), Checkpoint(b"key", rest))
    assert [slots.best(b"key", tokens)[1] for tokens in ([1, 2, 3], [1], [2], [1, 3])] == [2, 1, 0, 2]
    assert slots.best(ROOT, [1]) == (-1, -1)
    slot, _ = slots.best(b"key", [1, 2])
    assert slots.take_over(slot) == slot
    assert not slots.has(Checkpoint(b"key", (1, 2)))


def test_one_checkpoint_of_each_state() -> None:
    slots = Slots(3)
    for _ in range(3):
        slots.keep(slots.take(), Checkpoint(ROOT, (1,)))
    assert slots.has_free
    assert slots.available == 3
    slots.forget()
    assert sorted(slots.take() for _ in range(3)) == np.arange(3).tolist()
