"""Packing steps: prefill in chunks, many sequences in few slots, what a slot's cache may be reused for."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi.engine.request import SamplingParams, Sequence
from dllama_mpi.engine.scheduler import Plan, Scheduler
from dllama_mpi.engine.step import ROW, Step, Want
from dllama_mpi.model.batch import Batch


def sequence(prompt: list[int], limit: int = 1000, stop: int = -1) -> Sequence:
    """Return a sequence that ends at `limit` tokens or at token `stop`."""
    return Sequence(list(prompt), SamplingParams(), limit, None, np.random.default_rng(0), frozenset([stop]))


class Machine:
    """Stands in for the model: keeps a KV cache of token ids and checks every plan against it.

    The token after a sequence is the sum of its tokens modulo 50, so that what is generated does not depend on how the
    steps are packed.
    """

    def __init__(self, slots: int, chunk: int, reuse: bool = False, rewinds: bool = True) -> None:
        self.scheduler = Scheduler(slots, chunk, rewinds)
        self.scheduler.reuse = reuse
        self.slots, self.chunk, self.rewinds = slots, chunk, rewinds
        self.stands = [0] * slots  # how many tokens each slot's state has taken
        self.cache: dict[tuple[int, int], int] = {}
        self.fed = 0

    def check(self, plan: Plan) -> None:
        """Check that a plan's columns fit together and that all a token attends to is in the cache."""
        batch = plan.batch
        columns = (batch.token_ids, batch.positions, batch.slots, batch.lengths)
        assert all(column.dtype == np.int32 and column.shape == (batch.tokens,) for column in columns)
        assert 0 < batch.tokens <= self.chunk + self.slots
        assert len(batch.logit_rows) == len(plan.sequences)
        plan.commit()
        for token, position, slot in zip(batch.token_ids, batch.positions, batch.slots, strict=True):
            assert 0 <= slot < self.slots
            assert self.rewinds or position in (0, self.stands[slot])
            self.stands[slot] = int(position) + 1
            self.cache[int(slot), int(position)] = int(token)
            seen = [(int(s), p) in self.cache for s, p in ((slot, p) for p in range(position))]
            assert all(seen)
        for row, wanted in zip(batch.logit_rows, plan.sequences, strict=True):
            assert batch.slots[row] == wanted.slot
            assert batch.positions[row] == len(wanted.tokens) - 1
            held = [self.cache[wanted.slot, p] for p in range(len(wanted.tokens))]
            assert held == wanted.tokens
            assert wanted.computed == len(wanted.tokens)
        self.fed += batch.tokens

    def step(self) -> Plan | None:
        """Take and check one plan, and give every wanted sequence its next token."""
        plan = self.scheduler.next_plan()
        if plan is not None:
            self.check(plan)
            for wanted in plan.sequences:
                wanted.append(sum(wanted.tokens) % 50)
        return plan

    def run(self, *sequences: Sequence) -> list[Plan]:
        """Add sequences and step until nothing is left; return the plans."""
        for each in sequences:
            self.scheduler.add(each)
        plans: list[Plan] = []
        while (plan := self.step()) is not None:
            plans.append(plan)
            assert len(plans) < 1000, "the scheduler comes to no end"
        return plans


def expected(prompt: list[int], limit: int) -> list[int]:
    """Return what a sequence must end as."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(sum(tokens) % 50)
    return tokens


# --------------------------------------------------------------------------------------------------------------------
# One sequence
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "chunk", "parts"),
    [(1, 4, [1]), (4, 4, [4]), (5, 4, [4, 1]), (12, 4, [4, 4, 4]), (3, 1, [1, 1, 1]), (7, 100, [7])],
)
def test_a_prompt_is_fed_in_chunks(length: int, chunk: int, parts: list[int]) -> None:
    one = sequence(list(range(length)), length + 3)
    plans = Machine(1, chunk).run(one)
    assert [p.batch.tokens for p in plans] == [*parts, 1, 1]
    assert [p.is_prefill for p in plans] == [True] * len(parts) + [False] * 2
    assert [len(p.sequences) for p in plans] == [0] * (len(parts) - 1) + [1] * 3
    assert np.concatenate([p.batch.positions for p in plans]).tolist() == list(range(length + 2))
    assert one.tokens == expected(list(range(length)), length + 3)
    assert one.finish_reason == "length"


def test_lengths_are_the_prompts_and_then_each_tokens_own() -> None:
    plans = Machine(1, 3).run(sequence([5, 6, 7, 8], 7))
    assert [p.batch.lengths.tolist() for p in plans] == [[4, 4, 4], [4], [5], [6]]


def test_a_sequence_ends_at_a_stop_token() -> None:
    one = sequence([1, 2], 100, stop=3)
    assert len(Machine(1, 4).run(one)) == 1
    assert (one.tokens, one.output_ids, one.finish_reason) == ([1, 2], [], "stop")


def test_a_prompt_that_fills_its_limit_is_never_fed() -> None:
    one = sequence([1, 2, 3], 3)
    assert one.finish_reason == "length"
    assert Machine(1, 4).run(one) == []


def test_nothing_to_do() -> None:
    assert Machine(2, 4).run() == []


# --------------------------------------------------------------------------------------------------------------------
# Several
# --------------------------------------------------------------------------------------------------------------------


def test_prompts_share_a_step_and_tokens_ride_along() -> None:
    first, second, third = sequence([1, 2, 3], 6), sequence([4, 5, 6, 7], 8), sequence([8] * 9, 11)
    plans = Machine(3, 5).run(first, second, third)
    assert plans[0].batch.tokens == 5  # 3 of the first, 2 of the second
    assert plans[0].sequences == [first]
    assert plans[1].batch.tokens == 1 + 5  # a token of the first, 2 of the second's prompt, 3 of the third's
    assert plans[1].sequences == [first, second]
    assert plans[1].is_prefill
    assert len({first.slot, second.slot, third.slot}) == 3


def test_sequences_wait_for_a_slot_in_order() -> None:
    machine, many = Machine(2, 8), [sequence([n], n + 3) for n in range(6)]
    order: list[int] = []
    for plan in machine.run(*many):
        assert len(set(plan.batch.slots.tolist())) <= 2
        order += [many.index(s) for s in plan.sequences if many.index(s) not in order]
    assert order == list(range(6))
    assert all(s.tokens == expected([n], n + 3) for n, s in enumerate(many))


@pytest.mark.parametrize(("reuse", "rewinds"), [(False, True), (True, True), (True, False)])
def test_any_packing_gives_the_same_tokens(reuse: bool, rewinds: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        machine = Machine(int(rng.integers(1, 5)), int(rng.integers(1, 12)), reuse, rewinds)
        prompts: list[list[int]] = [rng.integers(0, 3, rng.integers(1, 20)).tolist() for _ in range(8)]
        limits = [len(prompt) + int(rng.integers(1, 10)) for prompt in prompts]
        sequences = [sequence(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
        machine.run(*sequences[:5])
        machine.run(*sequences[5:])
        for prompt, limit, one in zip(prompts, limits, sequences, strict=True):
            assert one.tokens == expected(prompt, limit)
        if not reuse:
            assert machine.fed == sum(limits) - len(limits)  # the last token of each is not fed


def test_the_chunk_bounds_prompt_tokens_only() -> None:
    machine, many = Machine(4, 2), [sequence([n, n], 30) for n in range(4)]
    plans = machine.run(*many)
    assert max(p.batch.tokens for p in plans) == 2 + 3
    for plan in plans:
        fed = plan.batch.positions < 2
        assert fed.sum() <= 2
        assert plan.is_prefill is bool(fed.any())


# --------------------------------------------------------------------------------------------------------------------
# Ended from outside
# --------------------------------------------------------------------------------------------------------------------


def test_an_aborted_sequence_frees_its_slot() -> None:
    machine = Machine(1, 4)
    first, second = sequence([1, 2], 50), sequence([3], 4)
    machine.scheduler.add(first)
    machine.scheduler.add(second)
    machine.step()
    first.finish_reason = "abort"
    plan = machine.step()
    assert plan is not None
    assert plan.sequences == [second]
    machine.run()
    assert second.tokens == expected([3], 4)
    assert len(first.tokens) == 3


def test_an_aborted_sequence_that_waits_is_never_fed() -> None:
    machine, waiting = Machine(1, 4), sequence([7, 7], 9)
    machine.scheduler.add(sequence([1], 4))
    machine.scheduler.add(waiting)
    machine.step()
    waiting.finish_reason = "abort"
    machine.run()
    assert waiting.computed == 0
    assert 7 not in machine.cache.values()


def test_cancel_ends_the_running_and_the_waiting() -> None:
    machine, three = Machine(1, 4), [sequence([n], 9) for n in range(3)]
    for each in three:
        machine.scheduler.add(each)
    three[2].finish_reason = "stop"
    machine.step()
    machine.scheduler.cancel()
    assert machine.step() is None
    assert [s.finish_reason for s in three] == ["abort", "abort", "stop"]


def test_clear_drops_everything_and_frees_the_slots() -> None:
    machine = Machine(2, 4)
    for n in range(4):
        machine.scheduler.add(sequence([n], 9))
    machine.step()
    machine.scheduler.clear()
    assert machine.step() is None
    one, two = sequence([5], 7), sequence([6], 7)
    plans = machine.run(one, two)
    assert plans[0].sequences == [one, two]


# --------------------------------------------------------------------------------------------------------------------
# Reuse
# --------------------------------------------------------------------------------------------------------------------


def fed(plans: list[Plan]) -> int:
    """Return how many tokens plans feed."""
    return sum(plan.batch.tokens for plan in plans)


def test_a_prompt_starts_from_what_its_slot_holds() -> None:
    machine, prompt = Machine(1, 100, reuse=True), list(range(20))
    first = sequence(prompt, 23)
    machine.run(first)
    longer = sequence([*first.tokens, 9, 9], 26)
    # 22 of the 23 tokens were fed: the last was generated and never needed.
    plans = machine.run(longer)
    assert plans[0].batch.positions.tolist() == [22, 23, 24]
    assert plans[0].batch.lengths.tolist() == [25] * 3
    assert longer.tokens == expected([*first.tokens, 9, 9], 26)


def test_the_same_prompt_again_feeds_its_last_token() -> None:
    machine = Machine(1, 100, reuse=True)
    machine.run(sequence([1, 2, 3, 4], 6))
    plans = machine.run(sequence([1, 2, 3, 4], 6))
    assert plans[0].batch.positions.tolist() == [3]
    assert plans[0].sequences


def test_a_prompt_that_turns_off_earlier_keeps_the_common_part_only() -> None:
    machine = Machine(1, 100, reuse=True)
    machine.run(sequence([1, 2, 3, 4, 5], 7))
    assert machine.run(sequence([1, 2, 9, 4, 5], 6))[0].batch.positions.tolist() == [2, 3, 4]
    assert machine.run(sequence([1, 2, 3, 4, 5], 6))[0].batch.positions.tolist() == [2, 3, 4]
    assert machine.run(sequence([8], 3))[0].batch.positions.tolist() == [0]


def test_the_slot_with_the_longest_common_part_is_taken() -> None:
    machine = Machine(3, 100, reuse=True)
    held = [sequence([n, *range(10)], 13) for n in range(3)]
    machine.run(*held)
    for n in (1, 0, 2):
        again = sequence([n, *range(10), 30], 13)
        assert machine.run(again)[0].batch.tokens == 1
        assert again.slot == held[n].slot


def test_a_state_serves_what_begins_with_all_that_it_has_taken() -> None:
    machine = Machine(1, 100, reuse=True, rewinds=False)
    first = sequence([1, 2, 3, 4], 7)
    machine.run(first)  # 6 of its 7 tokens were fed
    again = sequence([*first.tokens, 9], 10)
    assert machine.run(again)[0].batch.positions.tolist() == [6, 7]
    assert again.tokens == expected([*first.tokens, 9], 10)


@pytest.mark.parametrize("prompt", [[1, 2, 3, 4], [1, 2, 3, 4, 0], [1, 2, 9, 4, 5, 6, 7, 8]])
def test_a_state_does_not_go_back(prompt: list[int]) -> None:
    """Neither by one token, for the logits of a prompt's last, nor to where another prompt turns off."""
    machine = Machine(1, 100, reuse=True, rewinds=False)
    machine.run(sequence([1, 2, 3, 4], 7))
    assert machine.run(sequence(prompt, len(prompt) + 1))[0].batch.positions.tolist() == list(range(len(prompt)))


def test_among_states_the_one_that_serves_is_taken() -> None:
    machine = Machine(3, 100, reuse=True, rewinds=False)
    held = [sequence([n, *range(10 + n)], 13 + n) for n in range(3)]
    machine.run(*held)
    for n in (1, 0, 2):
        again = sequence([*held[n].tokens, 30], len(held[n].tokens) + 2)
        assert machine.run(again)[0].batch.tokens == 2
        assert again.slot == held[n].slot


def test_without_reuse_everything_is_fed() -> None:
    machine = Machine(1, 100)
    for _ in range(2):
        assert fed(machine.run(sequence([1, 2, 3, 4], 6))) == 5


def test_a_forgotten_slot_is_fed_anew() -> None:
    machine = Machine(1, 100, reuse=True)
    machine.run(sequence([1, 2, 3, 4], 6))
    machine.scheduler.forget(0)
    assert fed(machine.run(sequence([1, 2, 3, 4], 6))) == 5


def test_an_aborted_prompt_leaves_what_was_fed() -> None:
    machine, prompt = Machine(1, 3, reuse=True), list(range(10))
    one = sequence(prompt, 12)
    machine.scheduler.add(one)
    machine.step()
    one.finish_reason = "abort"
    machine.run()
    assert machine.run(sequence(prompt, 11))[0].batch.positions.tolist() == [3, 4, 5]


# --------------------------------------------------------------------------------------------------------------------
# On the way to the workers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("want", list(Want))
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (17, 3), (5, 0), (0, 0)])
def test_a_step_survives_its_bytes(want: Want, tokens: int, rows: int) -> None:
    rng = np.random.default_rng(tokens)
    columns = rng.integers(0, 2**31 - 1, (4, tokens), dtype=np.int32)
    table = np.zeros(rows, ROW)
    for name in ROW.names or ():
        table[name] = rng.integers(0, 100, rows)
    ids, positions, slots, lengths = columns
    step = Step(Batch(ids, positions, slots, lengths, rng.integers(0, 9, rows, dtype=np.int32)), table, want)
    got = Step.from_bytes(step.to_bytes())
    assert got.want is want
    np.testing.assert_array_equal(got.rows, table)
    for name in ("token_ids", "positions", "slots", "lengths", "logit_rows"):
        np.testing.assert_array_equal(getattr(got.batch, name), getattr(step.batch, name))
