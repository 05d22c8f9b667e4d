"""How many programs JAX has compiled, or read from its cache on disk, in this process."""

import functools

import jax

EVENT = "/jax/core/compile/backend_compile_duration"  # also when the disk had it


def count() -> int:
    """Programs since the first call, in all threads; the first call returns 0."""
    return len(_listen())


@functools.cache
def _listen() -> list[float]:
    """The seconds of each, in a list that grows."""
    seconds: list[float] = []

    def hear(event: str, duration: float, **_) -> None:
        if event == EVENT:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(hear)
    return seconds
