"""Blocks of shared memory: filled by one, read by another, then filled again."""

import errno
import gc

import numpy as np
import pytest

from minigpt4_jax.data import blocks
from minigpt4_jax.errors import DataError


def test_a_block_is_filled_again_once_nothing_refers_to_it(tmp_path):
    pool, reader = blocks.Pool(tmp_path), blocks.Reader()
    name, written = pool.take(100)
    written[:100] = np.arange(100)
    read = reader.open(name)
    np.testing.assert_array_equal(read[:100], np.arange(100))
    part = read[8:40].view(np.int64).reshape(2, 2)
    del read
    gc.collect()
    other, _ = pool.take(100)
    assert other != name  # a view of the first is still there
    assert part[0, 0] == int.from_bytes(bytes(range(8, 16)), "little")
    del part
    assert pool.take(100)[0] == name
    assert pool.take(100)[0] not in (name, other)


def test_a_block_serves_what_is_smaller_and_not_what_is_larger(tmp_path):
    pool, reader = blocks.Pool(tmp_path), blocks.Reader()
    name, _ = pool.take(100)
    reader.open(name)
    assert pool.take(101)[0] != name
    assert pool.take(64)[0] == name


def test_a_block_starts_where_arrays_are_aligned(tmp_path):
    name, written = blocks.Pool(tmp_path).take(100)
    assert written.ctypes.data % 64 == 0
    assert blocks.Reader().open(name).ctypes.data % 64 == 0


def test_what_was_read_once_leaves_no_file(tmp_path):
    pool, reader = blocks.Pool(tmp_path), blocks.Reader()
    name, written = pool.take(100)
    assert len(list(tmp_path.iterdir())) == 1
    read = reader.open(name)
    assert not list(tmp_path.iterdir())
    written[5] = 17
    assert read[5] == 17
    del read
    assert reader.open(pool.take(100)[0])[5] == 17  # by name, without a file


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blocks.os, "posix_fallocate", full)
    with pytest.raises(DataError, match="no room for a batch of 3 MB.*shm-size"):
        blocks.Pool(tmp_path).take(3_000_000)


def test_blocks_of_a_killed_program_are_taken_away_by_the_next(tmp_path):
    used, lock = blocks.make_folder(tmp_path)
    left, other = blocks.make_folder(tmp_path)
    blocks.Pool(left).take(100)
    other.close()  # as the system does for a process that ends
    third, _ = blocks.make_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([used, third])
    lock.close()
