"""What is kept by key, up to a number of bytes."""

import threading

from minigpt4_jax.lru import LRU


def test_what_was_not_used_for_longest_goes_first():
    kept = LRU(3)
    for key in "abc":
        kept.put(key, key.upper(), 1)
    assert kept.get("a") == "A"
    kept.put("d", "D", 1)
    assert kept.get("b") is None
    assert [kept.get(key) for key in "acd"] == ["A", "C", "D"]
    assert (kept.bytes, len(kept)) == (3, 3)


def test_a_large_value_pushes_out_several_and_one_that_is_too_large_is_not_kept():
    kept = LRU(10)
    for key in range(5):
        kept.put(key, key, 2)
    kept.put("large", 0, 7)
    assert [key for key in (*range(5), "large") if key in kept] == [4, "large"]
    kept.put("larger", 0, 11)
    assert "larger" not in kept and "large" in kept


def test_a_value_put_again_counts_once():
    kept = LRU(10)
    kept.put("a", 1, 6)
    kept.put("a", 2, 8)
    assert (kept.get("a"), kept.bytes) == (2, 8)
    kept.clear()
    assert (kept.get("a"), kept.bytes) == (None, 0)


def test_several_threads_leave_it_whole():
    kept = LRU(20)

    def use(offset):
        for i in range(2000):
            kept.put((i + offset) % 50, i, 1 + i % 3)
            kept.get(i % 50)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.bytes == sum(size for _, size in kept._values.values()) <= 20
