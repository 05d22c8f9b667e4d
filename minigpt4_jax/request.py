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
OVERFLOWS = ("error", "drop_oldest")
COMPATS = (None, "reference")
STOP_IDS = 16  # of one request, at most: rows of any batch have room for as many
TOP_LOGPROBS = 20  # of one token, at most
NOT_FINITE, NONE_LEFT = -1, -2
FAILURES = {  # "tokens" of a row that cannot go on, and why
    NOT_FINITE: "the model's logits are not finite (NaN or infinity), so no token can be "
    "chosen; its weights or this image are out of the range of its dtype",
    NONE_LEFT: "every token is banned by the request's own rules; relax banned_ids, "
    "no_repeat_ngram or min_tokens",
}


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

    The rules are Hugging Face's and act in the order listed, on generated tokens alone,
    never on the prompt's.

    Args:
        repetition_penalty: divides (negative: multiplies) logits of generated tokens; 1
            is off.
        frequency_penalty: taken from a token's logit for each time it was generated; 0
            is off, below 0 asks for repetition.
        presence_penalty: taken once from the logit of each token that was generated.
        no_repeat_ngram: no sequence of so many tokens comes twice; 0 is off.
        min_tokens: end tokens are banned before so many others; stop strings are not.
        banned_ids: tokens that are never chosen.
        temperature: 0 is greedy: the largest logit, whatever the next three say.
        top_k: keep the k likeliest tokens; 0 keeps all. The reference never sets it
            and inherits 50 from Hugging Face.
        top_p: keep the likeliest tokens whose probabilities sum to p; 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
        max_tokens: an answer of this many tokens ends with "length".
        stop_ids: tokens that end an answer besides the model's own.
        top_logprobs: how many alternatives an event tells with each token.
        num_beams: above 1: beam search for the answer that is likeliest as a whole; it
            comes in one event at its end, and n answers are the n best. With a
            temperature each step draws its candidates, as the reference's demo does.
        length_penalty: a beam's score is the sum of its tokens' log-probabilities over
            their number to this power: above 0 prefers long answers, below 0 short ones.
        early_stopping: True: a search ends once num_beams answers have ended; False:
            once none in progress would beat them if it ended now; "never": once none can.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.05
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    min_tokens: int = 0
    max_tokens: int = 300
    banned_ids: Sequence[int] = ()
    stop_ids: Sequence[int] = ()
    top_logprobs: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "at least 0", lambda x: x >= 0)
        _check_whole("top_k", self.top_k, least=0)
        _check_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        _check_number("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1)
        _check_number(
            "repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), "that is finite", lambda _: True)
        _check_whole("no_repeat_ngram", self.no_repeat_ngram, least=0, below=2**31)
        _check_whole("max_tokens", self.max_tokens, least=1)
        _check_whole("min_tokens", self.min_tokens, least=0, below=self.max_tokens + 1)
        _check_whole("top_logprobs", self.top_logprobs, least=0, below=TOP_LOGPROBS + 1)
        _check_whole("num_beams", self.num_beams, least=1)
        _check_number(
            "length_penalty", self.length_penalty, "that is finite", lambda _: True
        )
        if not (
            isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        ):
            raise InputError(
                f"early_stopping: got {self.early_stopping!r}, want True, False or 'never'"
            )
        for name in ("banned_ids", "stop_ids"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        if len(self.stop_ids) > STOP_IDS:
            raise InputError(
                f"stop_ids: got {len(self.stop_ids)} tokens, want at most {STOP_IDS}"
            )

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
        n: answers wanted, at most num_beams of a beam search; Event.index tells them
            apart.
        overflow: when prompt and answer do not fit the model's context: "error", or
            "drop_oldest": leave out the oldest questions with their answers, but none
            with an image, nor the system message, nor the last one;
            Usage.dropped_turns counts the messages left out.
        compat: "reference" answers as the original's chat did, but for the random
            numbers of draws (compat.py); the text comes at its end.
        id: comes back in each Event; made up when absent.
    """

    messages: Sequence[Message]
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    seed: int = 0
    n: int = 1
    overflow: str = "error"
    compat: str | None = None
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
        beams = self.sampling.num_beams
        if 1 < beams < self.n:
            raise InputError(
                f"n: got {self.n}, want at most num_beams={beams}; a search keeps as many"
            )
        if self.compat not in COMPATS:
            raise InputError(unknown("compat", self.compat, ["reference"]))
        if self.overflow not in OVERFLOWS:
            raise InputError(unknown("overflow", self.overflow, OVERFLOWS))
        if self.compat and (stop or self.sampling.stop_ids or self.n > 1):
            raise InputError(
                "compat 'reference': the original answers once and has stops of its "
                "own; want n=1 and neither stop nor stop_ids"
            )
        if self.compat and self.overflow != "error":
            raise InputError(
                "compat 'reference' cuts what does not fit from the left as the original "
                "does; leave overflow at 'error'"
            )
        if not isinstance(self.id, str) or not self.id:
            raise InputError(f"id: got {self.id!r}, want a string that is not ''")
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "stop", stop)


@dataclass(frozen=True)
class Usage:
    """What an answer took; `prompt_tokens` counts image slots too.

    dropped_turns: messages that overflow="drop_oldest" left out of the prompt.
    """

    prompt_tokens: int
    answer_tokens: int
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    dropped_turns: int = 0


@dataclass(frozen=True)
class Event:
    """A piece of an answer; the last one of an answer has a finish_reason and usage.

    Args:
        request_id: `Request.id`.
        index: which of the request's n answers.
        piece: whole characters; joined pieces are the answer. Can be empty.
        ids: tokens behind this piece. A piece held back comes with a later event.
        logprobs: of `ids`, one each, before penalties and temperature, or none.
        top_logprobs: for each of `ids` the likeliest tokens at its place as (id,
            logprob), likeliest first; empty unless Sampling.top_logprobs asks.
        score: of a beam search's answer, by which the n best are ordered.
        finish_reason: "stop" (end token, stop id or stop string), "length", "error",
            "cancelled", or None while the answer goes on.
        error: one sentence when finish_reason is "error".
    """

    request_id: str
    index: int = 0
    piece: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    score: float | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        assert self.finish_reason in (None, *FINISH_REASONS), self.finish_reason
        assert len(self.logprobs) in (0, len(self.ids))
        assert len(self.top_logprobs) in (0, len(self.ids))


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


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    """Each id once, checked."""
    if not isinstance(ids, list | tuple):
        raise InputError(
            f"{name}: got {type(ids).__name__}, want a list or tuple of token ids"
        )
    for token in ids:
        _check_whole(name, token, least=0)
    return tuple(dict.fromkeys(map(int, ids)))


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
