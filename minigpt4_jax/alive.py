"""Signs of life from what may take hours before a run's first step.

The watchdog, which knows nothing of data sets and features, asks how many there were.
"""

import fcntl
import time

EVERY_S = 0.5  # between two looks at a lock

_signs = 0


def sign() -> None:
    """A part of something long is done."""
    global _signs
    _signs += 1


def signs() -> int:
    """How many there have been in this process."""
    return _signs


def lock(handle: int) -> None:
    """Wait for a lock that another process may hold for hours: not to stand still."""
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sign()
            time.sleep(EVERY_S)
