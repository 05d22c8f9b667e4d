"""MiniGPT-4 in JAX: a vision-language model that talks about a photo.

`__all__` is the public API. Names are imported on first use (PEP 562), so that
`import minigpt4_jax` costs no JAX start-up.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4_jax.conversation import Chat
    from minigpt4_jax.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        InputError,
        MiniGPT4Error,
    )
    from minigpt4_jax.generator import Generator
    from minigpt4_jax.loop import Server
    from minigpt4_jax.models.layers import Capture, DTypes
    from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config
    from minigpt4_jax.request import Event, Message, Request, Sampling, Usage
    from minigpt4_jax.score import Score

__version__ = "0.1.0"

__all__ = [
    "Capture",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "DTypes",
    "DataError",
    "Event",
    "Generator",
    "InputError",
    "Message",
    "MiniGPT4",
    "MiniGPT4Config",
    "MiniGPT4Error",
    "Request",
    "Sampling",
    "Score",
    "Server",
    "Usage",
]

_HOMES = {
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "InputError",
        "MiniGPT4Error",
    ),
    "conversation": ("Chat",),
    "generator": ("Generator",),
    "loop": ("Server",),
    "models.layers": ("Capture", "DTypes"),
    "models.minigpt4": ("MiniGPT4", "MiniGPT4Config"),
    "request": ("Event", "Message", "Request", "Sampling", "Usage"),
    "score": ("Score",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
