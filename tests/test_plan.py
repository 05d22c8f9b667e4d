"""Which example stands where follows from the seed and the index alone."""

from collections import Counter

import numpy as np
import pytest

from minigpt4_jax.data import plan as plan_lib
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.errors import DataError


def every(plan: Plan, steps: int) -> list[tuple[int, int, int]]:
    return [tuple(pick) for step in range(steps) for pick in plan.picks(step).tolist()]


def test_each_source_shows_every_example_once_in_each_of_its_own_epochs():
    plan = Plan(sizes=[14, 5], weights=[2, 3], seed=5, batch_size=4)
    shown = every(plan, 70)  # 112 of the first source, 168 of the second
    for source, size, epochs in ((0, 14, 8), (1, 5, 33)):
        for epoch in range(epochs):
            found = [i for s, e, i in shown if (s, e) == (source, epoch)]
            assert sorted(found) == list(range(size)), (source, epoch)
    epochs = [e for s, e, _ in shown if s == 1]
    assert epochs == sorted(epochs)  # one after the other


def test_every_epoch_has_an_order_of_its_own():
    shown = every(Plan([14], [1], seed=5, batch_size=7), 4)
    first, second = ([i for _, e, i in shown if e == epoch] for epoch in (0, 1))
    assert first != second != list(range(14)) != first
    assert first != [i for _, _, i in every(Plan([14], [1], 6, 7), 2)]
    both = every(Plan([14, 14], [1, 1], 5, 7), 4)
    one, other = ([i for s, _, i in both if s == source] for source in (0, 1))
    assert one != other


@pytest.mark.parametrize("weights", [(115, 14), (230, 28)])
def test_a_mix_is_exact_in_every_block(weights):
    plan = Plan([10_000, 300], weights, seed=1, batch_size=43)
    sources = [source for source, _, _ in every(plan, 3 * 7)]
    for block in range(7):
        part = sources[129 * block : 129 * (block + 1)]
        assert Counter(part) == {0: 115, 1: 14}
    assert sources[:129] != sources[129:258] != sorted(sources[129:258])


def test_a_mix_is_spread_over_its_block():
    """Each place of a block is of the rare source about as often as any other."""
    picks = Plan([10**6, 10**6], [115, 14], 0, 129).examples(0, 2_000 * 129)
    share = (picks[:, 0].reshape(2_000, 129) == 1).mean(axis=0)
    assert abs(share - 14 / 129).max() < 5 * (0.1085 * 0.8915 / 2_000) ** 0.5


def test_the_content_does_not_depend_on_the_batch_size():
    def plan(batch_size):
        return Plan([14, 5], [2, 3], seed=5, batch_size=batch_size)

    one_by_one = every(plan(1), 60)
    for batch_size in (3, 4, 20, 30):
        assert every(plan(batch_size), 60 // batch_size) == one_by_one


def test_any_step_is_found_without_those_before_it():
    plan = Plan([114_000_000, 14_000_000], [115, 14], seed=3, batch_size=16)
    late = plan.picks(10**9)
    np.testing.assert_array_equal(late, Plan(plan.sizes, [115, 14], 3, 16).picks(10**9))
    per_epoch = 114_000_000 * 129 / 115
    assert set(late[late[:, 0] == 0, 1].tolist()) == {int(16 * 10**9 / per_epoch)}


@pytest.mark.parametrize("size", [1, 2, 3, 30, 700])
def test_both_ways_to_shuffle_are_permutations(size, monkeypatch):
    for small in (plan_lib.SMALL, 0):
        monkeypatch.setattr(plan_lib, "SMALL", small)
        shuffled = plan_lib.shuffle(size, (3, 0, 2), np.arange(size))
        assert sorted(shuffled.tolist()) == list(range(size))
        if size > 3:
            other = plan_lib.shuffle(size, (3, 0, 3), np.arange(size))
            assert shuffled.tolist() != other.tolist() != list(range(size))


def test_a_large_source_is_shuffled_without_a_list_of_it():
    picks = Plan([10**9], [1], seed=0, batch_size=2_000).picks(4)
    examples = picks[:, 2]
    assert len(set(examples.tolist())) == 2_000
    assert 0.45e9 < examples.mean() < 0.55e9


def test_a_source_without_examples_is_refused():
    with pytest.raises(DataError, match="no example"):
        Plan([3, 0], [1, 1], seed=0, batch_size=2)
