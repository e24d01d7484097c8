"""Drafts from earlier occurrences: which match is followed, when it is worth while, what a draft costs."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi.engine.lookup import DraftCost, Lookup

FREE = 0.0  # a cost at which everything is drafted that can be


def naive_source(tokens: list[int]) -> int | None:
    """Return where the longest of the latest matches of 2 to 8 last tokens ends; None for none."""
    best, found = 1, None
    for end in range(len(tokens) - 1, 1, -1):
        matched = 0
        while matched < min(end, 8) and tokens[end - 1 - matched] == tokens[-1 - matched]:
            matched += 1
        if matched > best:
            best, found = matched, end
    return found


def naive_copy(tokens: list[int], source: int, count: int) -> list[int]:
    """Return the tokens that follow when the text goes on as it did from `source` on."""
    longer = list(tokens)
    for i in range(count):
        longer.append(longer[source + i])
    return longer[len(tokens) :]


# --------------------------------------------------------------------------------------------------------------------
# What is drafted
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 30])
def test_the_longest_latest_match_is_followed(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    found = 0
    for length in range(1, 60):
        tokens = rng.integers(0, vocabulary, length).tolist()
        source = naive_source(tokens)
        expected = [] if source is None else naive_copy(tokens, source, 7)
        assert Lookup().propose(tokens, 7, FREE) == expected
        found += source is not None
    assert found > 0


def test_a_copy_may_run_into_itself() -> None:
    assert Lookup().propose([9, 1, 2, 3, 1, 2], 8, FREE) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert Lookup().propose([5, 5, 5], 4, FREE) == [5, 5, 5, 5]


def test_a_match_is_followed_while_it_holds() -> None:
    text = list(range(20))
    tokens, lookup = [*text, 50, 3, 4], Lookup()
    for at in range(5, 15):
        assert lookup.propose(tokens, 2, FREE) == text[at : at + 2]
        tokens.append(text[at])
    tokens.append(99)  # not what was expected, and never seen before
    assert lookup.propose(tokens, 2, FREE) == []
    tokens += [7, 8]
    assert lookup.propose(tokens, 2, FREE) == [9, 10]


def test_many_tokens_between_two_calls_are_as_one_by_one() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 3, 200).tolist()
    slow = Lookup()
    for n in range(1, 201):
        slow.propose(tokens[:n], 4, FREE)
    fast = Lookup()
    fast.propose(tokens[:1], 4, FREE)
    # Both know the same occurrences; the last tokens are made new to both, so that both search anew.
    ending = [*tokens, 7, 8, *tokens[50:53], 9, *tokens[50:53]]
    assert slow.propose(ending, 1, FREE) == fast.propose(ending, 1, FREE) == [9]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_nothing_repeats(tokens: list[int]) -> None:
    assert Lookup().propose(tokens, 8, FREE) == []


@pytest.mark.parametrize("most", [0, 1, 5])
def test_no_more_than_asked_for(most: int) -> None:
    assert len(Lookup().propose([1, 2] * 10, most, FREE)) == most


# --------------------------------------------------------------------------------------------------------------------
# When it is worth while
# --------------------------------------------------------------------------------------------------------------------


def test_success_lengthens_drafts_and_failure_ends_them() -> None:
    rng = np.random.default_rng(4)
    tokens, lookup = [1, 2, 3, 4] * 3, Lookup()
    lengths = []
    for _ in range(60):
        lengths.append(len(lookup.propose(tokens, 15, 0.2)))
        tokens.append(tokens[-4])
    assert 0 < lengths[0] < lengths[-1] == 15
    for _ in range(300):  # pairs recur, but say nothing of what follows
        tokens.append(int(rng.integers(10, 18)))
        lookup.propose(tokens, 15, 0.2)
    drafted = 0
    for _ in range(100):
        tokens.append(int(rng.integers(10, 18)))
        drafted += len(lookup.propose(tokens, 15, 0.2))
    assert drafted < 50  # of 1500
    for _ in range(60):  # it learns anew though nothing was drafted
        tokens.append(tokens[-4])
        drafts = lookup.propose(tokens, 15, 0.2)
    assert len(drafts) == 15


def test_dear_drafts_need_better_chances() -> None:
    lengths = [len(Lookup().propose([*range(8), 9, 9, *range(6)], 15, cost)) for cost in (0, 0.1, 0.3, 0.6, 1)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 15
    assert lengths[-1] == 0


# --------------------------------------------------------------------------------------------------------------------
# What a draft costs
# --------------------------------------------------------------------------------------------------------------------


def observed(share: float, drafts: list[int], noise: float = 0.0) -> DraftCost:
    """Return what is learnt from steps of 3 ms and `share` of that a draft."""
    rng, cost = np.random.default_rng(5), DraftCost()
    for n in drafts:
        cost.observe(n, 3e-3 * (1 + share * n) * (1 + noise * float(rng.random())))
    return cost


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.9])
def test_the_cost_is_found(share: float) -> None:
    assert observed(share, [0, 15, 3, 0, 7, 15] * 10).share == pytest.approx(share, abs=0.02)
    assert observed(share, [0, 15, 3, 0, 7, 15] * 20, noise=0.2).share == pytest.approx(share, abs=0.1)


def test_a_few_steps_out_of_line_do_not_count_much() -> None:
    cost = observed(0.1, [0, 8] * 30)
    cost.observe(8, 10.0)
    cost.observe(0, 3e-3)
    assert 0 <= cost.share < 0.4


def test_shares_stay_within_bounds() -> None:
    assert observed(5.0, [0, 4] * 50).share <= 1
    cost = DraftCost()
    for n in (0, 8) * 50:
        cost.observe(n, 1e-3 if n else 9e-3)  # drafts seem to make steps shorter
    assert cost.share >= 0


def test_a_guess_before_there_are_drafts_and_long_after_them() -> None:
    guess = DraftCost().share
    assert 0 < guess < 1
    assert observed(0.0, [0] * 50).share == pytest.approx(guess)
    dear = observed(0.9, [0, 4] * 10)
    assert dear.share > 0.7
    for _ in range(1000):
        dear.observe(0, 3e-3)
    assert dear.share == pytest.approx(guess, abs=0.05)
