"""Slots of a running batch, and the shapes it may have."""

import numpy as np
import pytest
import tiny

from minigpt4_jax.engine import Engine
from minigpt4_jax.pool import Shapes, bucket, fitted


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.model(), tiny.tokenizer(), slots=4, chunk=3)


def test_buckets_are_powers_of_two_that_hold_their_size():
    assert [bucket(n) for n in (0, 1, 2, 3, 9, 128, 129)] == [1, 1, 2, 4, 16, 128, 256]
    assert bucket(3, least=128) == 128


def test_shapes_are_few():
    shapes = Shapes(slots=24, chunk=8)
    assert shapes.widths == (1, 4, 16, 24)
    assert [shapes.width(n) for n in (1, 2, 4, 5, 17)] == [1, 4, 4, 16, 24]
    assert shapes.rooms(500) == [128, 256, 512]
    assert Shapes(slots=4, chunk=8).widths == (1, 4)
    assert Shapes(slots=1, chunk=8).widths == (1,)


def test_fixed_places_leave_one_shape():
    shapes = Shapes(slots=8, chunk=8, drafts=2, places=300)
    assert shapes.widths == (8,)
    assert shapes.rooms(9) == shapes.rooms(300) == [shapes.room(1)]
    assert shapes.room(1) >= 300 + 128 + 2


def test_rows_keep_their_arrays_when_the_batch_changes_its_shape(engine):
    pool = engine.schedule().pool
    blank = engine.reader.row_of(engine.reader.blank(128))
    pool.fit(1, 128)
    rng = np.random.default_rng(0)

    def row(name):
        tokens_1S = rng.integers(0, 99, (1, 128)).astype(np.int32)
        arrays = {**blank.__dict__, "tokens_BS": tokens_1S}
        return name, type(blank)(**arrays), tokens_1S

    rows = [row(name) for name in "abc"]
    pool.add(*rows[0][:2])
    pool.fit(4, 256)
    for name, arrays, _ in rows[1:]:
        pool.add(name, arrays)
    assert pool.rows == ["a", "b", "c", None]
    pool.rows[1] = None
    pool.fit(4, 128)
    assert pool.rows == ["a", "c", None, None]
    for b, (_, _, tokens_1S) in enumerate((rows[0], rows[2])):
        assert (pool.take(b).tokens_BS == tokens_1S).all()
    assert pool.state.done_B.tolist() == [True] * 4


def test_a_row_is_fitted_in_steps_of_two(engine):
    row = engine.reader.row_of(engine.reader.blank(128))
    assert fitted(engine.programs, row, 512).tokens_BS.shape == (1, 512)
    grown = fitted(engine.programs, row, 512)
    back = fitted(engine.programs, grown, 128)
    assert back.cache.segments_BS.shape == (1, 128)
