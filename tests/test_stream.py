"""Batches on their devices one step ahead, with what a meter counts of them."""

import numpy as np

from minigpt4_jax.flops import Costs
from minigpt4_jax.stream import Stream
from tests.training import one_device


class Fake:
    """A loader of batches whose ids tell their number; counts how far it was read."""

    def __init__(self, stop: int):
        self.step, self.stop, self.closed = 0, stop, False

    def __iter__(self):
        return self

    def __next__(self):
        if self.step == self.stop:
            raise StopIteration
        self.step += 1
        return {
            "ids_RT": np.full((2, 3), self.step),
            "positions_RT": np.array([[0, 1, 0], [0, 1, 2]]),
            "segments_RT": np.array([[256, 257, 0], [256, 256, 257]]),
            "loss_mask_RA": np.array([[1.0, 0.0], [1.0, 1.0]]),
            "ok_B": np.ones(2),
        }

    def get_state(self):
        return {"step": self.step, "bad": {"shard": self.step // 2}}

    def close(self):
        self.closed = True


def test_a_step_has_so_many_batches_and_their_counts():
    costs = Costs(image=1000, token=100, pair=10, answer=1)
    stream = Stream(Fake(4), one_device(), accumulate=2, costs=costs)
    batches, counts = stream.step()
    assert [int(batch["ids_RT"][0, 0]) for batch in batches] == [1, 2]
    assert counts.pop("waited") >= 0
    assert counts.pop("flops") == 4 * 1000 + 10 * 100 + 2 * (3 + 6) * 10 + 6
    assert counts == {"examples": 4, "answer_tokens": 6, "tokens": 10}
    assert stream.bad == 1


def test_the_position_is_that_of_the_step_given_out_not_of_what_was_read_ahead():
    loader = Fake(3)
    stream = Stream(loader, one_device(), accumulate=1)
    assert stream.position["step"] == 0
    stream.step()
    stream.prepare()
    assert loader.step == 2 and stream.position["step"] == 1
    stream.step()
    assert stream.position["step"] == 2


def test_after_the_last_step_nothing_is_prepared_and_closing_ends_the_loader():
    loader = Fake(1)
    stream = Stream(loader, one_device(), accumulate=1)
    stream.step()
    stream.prepare()
    assert stream.position["step"] == 1
    stream.close()
    assert loader.closed


def test_batches_without_answers_are_counted_by_their_examples():
    loader = Fake(1)
    loader.__class__ = type("Words", (Fake,), {"__next__": words})
    _, counts = Stream(loader, one_device(), accumulate=1).step()
    assert counts["examples"] == 5 and counts["tokens"] == 0


def words(self):
    self.step += 1
    return {"target_BV": np.zeros((5, 4)), "ok_B": np.ones(5)}
