"""One person's conversation: turns with their photos -> requests, and what is shown."""

import dataclasses

from minigpt4_jax.errors import InputError
from minigpt4_jax.request import Message, Request, Sampling, Usage, user
from minigpt4_jax.serving.photos import Photo

MAX_CHARACTERS = 8_000  # of a question; a model reads far fewer


@dataclasses.dataclass(eq=False)
class Turn:
    """A question and what came of it.

    photo: shown with this question, which has one only where it changes.
    note: how long the answer took, in words; empty while it goes on.
    """

    question: str
    photo: Photo | None
    answer: str = ""
    note: str = ""


class Conversation:
    """Turns in order; the last one may be waiting for its answer.

    Attributes:
        asked: questions asked since it was cleared, repeated ones included, so that no
            two answers are drawn from one seed.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.asked = 0

    @property
    def photo(self) -> Photo | None:
        """The photo that was shown last."""
        return next((t.photo for t in reversed(self.turns) if t.photo), None)

    def ask(self, question: str, photo: Photo | None) -> Turn:
        """Begin a turn; a photo that is shown already is not shown again.

        Raises:
            InputError: nothing to ask, or too much.
        """
        question = question.strip()
        if not question:
            raise InputError("Type a question first.")
        if len(question) > MAX_CHARACTERS:
            raise InputError(
                f"The question has {len(question):,} characters; want at most "
                f"{MAX_CHARACTERS:,}."
            )
        if photo and self.photo and photo.key == self.photo.key:
            photo = None
        turn = Turn(question, photo)
        self.turns.append(turn)
        self.asked += 1
        return turn

    def at(self, index: int) -> Turn:
        """The turn of that index; InputError if there is none."""
        if not 0 <= index < len(self.turns):
            raise InputError("That message is not part of this conversation any more.")
        return self.turns[index]

    def take_back(self, index: int) -> Turn:
        """Forget the turn of that index and all after it; InputError if there is none."""
        turn = self.at(index)
        del self.turns[index:]
        return turn

    def restore(self, turns: list[Turn], asked: int) -> None:
        """Be as it was when it had these."""
        self.turns[:] = turns
        self.asked = asked

    def clear(self) -> None:
        """Begin anew, also with the seeds: a new chat can repeat an answer."""
        self.restore([], 0)

    def request(self, sampling: Sampling, seed: int) -> Request:
        """What the model is asked: all turns, the last of which waits for its answer."""
        messages: list[Message] = []
        for turn in self.turns:
            images = [turn.photo.squashed_HWC] if turn.photo else []
            messages.append(user(turn.question, *images))
            messages.append(Message("assistant", turn.answer))
        return Request(
            messages[:-1],
            sampling=sampling,
            seed=(seed + self.asked - 1) % 2**32,
            overflow="drop_oldest",
        )

    def shown(self) -> tuple[list[dict], list[int]]:
        """Messages as a gr.Chatbot takes them, and of which turn each of them is."""
        messages, turns = [], []
        for index, turn in enumerate(self.turns):
            new = []
            if turn.photo:
                alt = "The photo that is talked about"
                new.append(_message("user", {"path": turn.photo.shown}, alt_text=alt))
            new.append(_text("user", turn.question))
            if turn.answer:
                new.append(_text("assistant", turn.answer))
            if turn.note:
                new.append(_text("assistant", turn.note))
            messages += new
            turns += [index] * len(new)
        return messages, turns


def _text(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _message(role: str, content: dict, **more) -> dict:
    return {"role": role, "content": [content | more]}


def note(usage: Usage, reason: str) -> str:
    """What stands under an answer: its tokens, their rate, its time, what is unusual.

    The rate leaves out the first token, which waits for photo and prompt. A beam search
    has all of its tokens at once, and so no rate.
    """
    tokens = usage.answer_tokens
    parts = [f"{tokens} token" + "s" * (tokens != 1)]
    after = usage.seconds - usage.seconds_to_first_token
    if after > 0 and tokens > 1:
        parts.append(f"{(tokens - 1) / after:.1f} tokens/s")
    parts.append(f"{usage.seconds:.1f} s")
    if reason == "cancelled":
        parts.append("stopped")
    if reason == "length":
        parts.append("cut off at the most tokens")
    if usage.dropped_turns:
        parts.append(f"the oldest {usage.dropped_turns} messages were left out")
    return " · ".join(parts)
