"""What callers ask and what they hear: `Request` in, `Event`s out.

Calls, streams, chats and batches are thin over these dataclasses. They hold plain
values, are checked when made, and know neither arrays nor templates.
"""

import math
import numbers
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt4_jax.errors import InputError, unknown

ROLES = ("system", "user", "assistant")
FINISH_REASONS = ("stop", "length", "error", "cancelled")


@dataclass(frozen=True)
class Message:
    """One turn: its images, then its text, as a user would show and ask.

    Args:
        role: "user" or "assistant"; "system" only as the first message, where it
            replaces the template's own system text.
        text: plain text; nothing in it is markup, whatever it looks like.
        images: path, bytes, PIL image or uint8 array each; only a user shows images.
    """

    role: str
    text: str
    images: Sequence[Any] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(unknown("role", self.role, ROLES))
        if not isinstance(self.text, str):
            raise InputError(
                f"text of a message: got {type(self.text).__name__}, want str"
            )
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text of a message: character {error.start} is half of a surrogate "
                "pair; want text that UTF-8 can hold"
            ) from error
        if isinstance(self.images, str | bytes) or not isinstance(
            self.images, list | tuple
        ):
            raise InputError(
                f"images of a message: got {type(self.images).__name__}, want a list "
                "or tuple of images"
            )
        if self.images and self.role != "user":
            raise InputError(f"a message of role {self.role!r} cannot show images")
        object.__setattr__(self, "images", tuple(self.images))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are those of the reference's chat.

    Args:
        temperature: 0 is greedy: the largest logit, whatever top_k and top_p say.
        top_k: keep the k likeliest tokens; 0 keeps all. The reference never sets it
            and inherits 50 from Hugging Face.
        top_p: keep the likeliest tokens whose probabilities sum to p; 1 keeps all.
        repetition_penalty: divides (negative: multiplies) logits of generated tokens,
            never of the prompt's; 1 is off.
        max_tokens: an answer of this many tokens ends with "length".
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.05
    max_tokens: int = 300

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "at least 0", lambda x: x >= 0)
        _check_whole("top_k", self.top_k, least=0)
        _check_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        _check_number(
            "repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0
        )
        _check_whole("max_tokens", self.max_tokens, least=1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """A conversation that wants an answer.

    Args:
        messages: the last one is the user's, or an assistant's to be continued.
        sampling: how tokens are drawn.
        stop: strings (one or several) that end the answer besides the template's own;
            cut off, with all that follows.
        seed: of the request's random key; token t is drawn from fold_in(key, t).
        n: answers wanted; Event.index tells them apart.
        id: comes back in each Event; made up when absent.
    """

    messages: Sequence[Message]
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    seed: int = 0
    n: int = 1
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        _check_messages(self.messages)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for string in stop:
            if not isinstance(string, str) or not string:
                raise InputError(f"stop: got {string!r}, want strings that are not ''")
        if not isinstance(self.sampling, Sampling):
            raise InputError(
                f"sampling: got {type(self.sampling).__name__}, want Sampling"
            )
        _check_whole("seed", self.seed, least=0, below=2**32)
        _check_whole("n", self.n, least=1)
        if not isinstance(self.id, str) or not self.id:
            raise InputError(f"id: got {self.id!r}, want a string that is not ''")
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "stop", stop)


@dataclass(frozen=True)
class Usage:
    """What an answer took; `prompt_tokens` counts image slots too."""

    prompt_tokens: int
    answer_tokens: int
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Event:
    """A piece of an answer; the last one of an answer has a finish_reason and usage.

    Args:
        request_id: `Request.id`.
        index: which of the request's n answers.
        piece: whole characters; joined pieces are the answer. Can be empty.
        ids: tokens behind this piece. A piece held back comes with a later event.
        logprobs: of `ids`, one each, before penalties and temperature, or none.
        finish_reason: "stop" (end token or stop string), "length", "error", "cancelled",
            or None while the answer goes on.
        error: one sentence when finish_reason is "error".
    """

    request_id: str
    index: int = 0
    piece: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        assert self.finish_reason in (None, *FINISH_REASONS), self.finish_reason
        assert len(self.logprobs) in (0, len(self.ids))


def user(text: str, *images: Any) -> Message:
    """A user's message: images first, then the text."""
    return Message("user", text, images)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("messages: want at least one Message, the last a user's")
    for i, message in enumerate(messages):
        if not isinstance(message, Message):
            raise InputError(
                f"messages[{i}]: got {type(message).__name__}, want Message"
            )
        if message.role == "system" and i > 0:
            raise InputError(f"messages[{i}]: a system message can only come first")
    if messages[-1].role == "system":
        raise InputError("messages: the last one has to be a user's or an assistant's")


def _check_number(
    name: str, value: Any, wanted: str, holds: Callable[[Any], bool]
) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not holds(value):
        raise InputError(f"{name}: got {value!r}, want a number {wanted}")


def _check_whole(
    name: str, value: Any, *, least: int, below: int | None = None
) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least or (below is not None and value >= below):
        wanted = f"at least {least}" + (f" and below {below}" if below else "")
        raise InputError(f"{name}: got {value!r}, want a whole number {wanted}")


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
