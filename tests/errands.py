"""What the tests send into processes of their own, which import this and no test."""

import os
import sys
import time

from minigpt4_jax.errors import DataError


def slow_square(i: int) -> int:
    time.sleep(0.02 * (i % 3))
    return i * i


def die(parent: int, i: int) -> int:
    if os.getpid() != parent and i == 1:
        os._exit(9)
    return -i


def refuse(i: int) -> int:
    print("what a function prints is no answer")
    if i == 2:
        raise DataError(f"item {i}")
    return i


def modules(_: int) -> set[str]:
    return set(sys.modules)


def shout(text: str) -> str:
    return text.upper() + "!!"


def mumble(text: str) -> str:
    return text.lower()
