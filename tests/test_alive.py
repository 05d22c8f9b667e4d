"""Signs of life before a run's first step."""

import fcntl
import os
import threading

from minigpt4_jax import alive


def test_a_lock_that_another_holds_is_waited_for_with_signs_of_life(tmp_path):
    path = tmp_path / "lock"
    handles = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2)]
    try:
        fcntl.flock(handles[0], fcntl.LOCK_EX)
        before, done = alive.signs(), threading.Event()

        def waits():
            alive.lock(handles[1])
            done.set()

        threading.Thread(target=waits, daemon=True).start()
        assert not done.wait(2.5 * alive.EVERY_S)
        assert alive.signs() >= before + 2
        fcntl.flock(handles[0], fcntl.LOCK_UN)
        assert done.wait(60)
    finally:
        for handle in handles:
            os.close(handle)


def test_a_lock_that_is_free_is_taken_at_once(tmp_path):
    handles = [os.open(tmp_path, os.O_RDONLY) for _ in range(2)]
    before = alive.signs()
    alive.lock(handles[0])
    assert alive.signs() == before
    os.close(handles[0])  # which ends it
    fcntl.flock(handles[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handles[1])
