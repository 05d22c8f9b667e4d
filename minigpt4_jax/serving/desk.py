"""What happens when people press something on the page; layout.py says where.

A handler gets values and gives (messages, box, conversation) for the page: `gr.Chatbot`,
`gr.Textbox` and the session's `Conversation`, which it changes in place.
"""

import logging
import uuid
from collections.abc import Iterator

import gradio as gr
import numpy as np

from minigpt4_jax.data.images import read_image
from minigpt4_jax.errors import InputError
from minigpt4_jax.gaze import Gaze, light
from minigpt4_jax.loop import BusyError, ClosedError
from minigpt4_jax.request import Sampling
from minigpt4_jax.serving.photos import Album, Photo, examples
from minigpt4_jax.serving.talks import Talks
from minigpt4_jax.serving.turns import Conversation, Turn, note

logger = logging.getLogger(__name__)

# What the text box shows beside the text; all else of it stays as it is.
READY = dict(submit_btn=True, stop_btn=False)
GOING = dict(submit_btn=False, stop_btn=True)

Shown = tuple[object, object, Conversation]


class Desk:
    """The handlers of one page for all of its sessions.

    Args:
        gaze: None: the model has no queries to show.
    """

    def __init__(self, talks: Talks, album: Album, gaze: Gaze | None):
        self.talks = talks
        self.album = album
        self.gaze = gaze
        self.samples = examples()

    def ask(
        self,
        conversation: Conversation,
        question: str,
        path: str | None,
        beams: int,
        temperature: float,
        max_tokens: int,
        top_p: float,
        penalty: float,
        seed: int,
        request: gr.Request,
    ) -> Iterator[Shown]:
        """A question about the photo in the file `path`, if any; streams the answer."""
        knobs = (beams, temperature, max_tokens, top_p, penalty, seed)
        yield from self._asked(conversation, question, path, knobs, request)

    def retry(
        self,
        conversation: Conversation,
        beams: int,
        temperature: float,
        max_tokens: int,
        top_p: float,
        penalty: float,
        seed: int,
        event: gr.RetryData,
        request: gr.Request,
    ) -> Iterator[Shown]:
        """Another answer to a question; what came after it is forgotten."""
        knobs = (beams, temperature, max_tokens, top_p, penalty, seed)
        yield from self._again(conversation, event.index, None, knobs, request)

    def edit(
        self,
        conversation: Conversation,
        beams: int,
        temperature: float,
        max_tokens: int,
        top_p: float,
        penalty: float,
        seed: int,
        event: gr.EditData,
        request: gr.Request,
    ) -> Iterator[Shown]:
        """The question in other words; what came after it is forgotten."""
        knobs = (beams, temperature, max_tokens, top_p, penalty, seed)
        text = _text(event.value)
        yield from self._again(conversation, event.index, text, knobs, request)

    def undo(self, conversation: Conversation, event: gr.UndoData) -> Shown:
        """The last question back into the box."""
        try:
            turn = conversation.take_back(_turn(conversation, event.index))
        except InputError as error:
            gr.Warning(str(error))
            return self._show(conversation, gr.skip())
        return self._show(conversation, gr.update(value=turn.question))

    def stop(self, request: gr.Request) -> None:
        """End this session's answer; the page hears of it from who streams it."""
        self.talks.stop(_session(request))

    def reset(self, conversation: Conversation, request: gr.Request) -> Shown:
        """Forget all; an answer on its way ends unseen."""
        conversation.clear()  # first, so that it shows no more of them
        self.talks.stop(_session(request))
        return self._show(conversation, gr.update(value="", **READY))

    def example(
        self, conversation: Conversation, event: gr.SelectData, request: gr.Request
    ) -> tuple[object, ...]:
        """A new conversation about a sample photo: the photo, its credit, what is shown."""
        sample = self.samples[event.index]
        chat, _, _ = self.reset(conversation, request)
        box = gr.update(value=sample.question, **READY)
        return sample.path, f"Photo: {sample.credit}", chat, box, conversation

    def look(self, path: str | None) -> tuple[np.ndarray | None, object]:
        """Where the queries look in the photo, and whether that picture is to be seen."""
        try:
            if path is None:
                raise InputError("Show a photo first.")
            assert self.gaze is not None
            photo = self.album.read(path)
            grid_LYX, _ = self.gaze.layers(photo.squashed_HWC)
            shown_HWC = read_image(photo.shown)
            size = shown_HWC.shape[1::-1]
            return light(shown_HWC, grid_LYX.mean(0), size), gr.update(visible=True)
        except InputError as error:
            gr.Warning(_sentence(error))
            return None, gr.update(visible=False)

    def _asked(self, conversation, question, path, knobs, request) -> Iterator[Shown]:
        try:
            photo = None if path is None else self.album.read(path)
        except InputError as error:
            gr.Warning(_sentence(error))
            yield self._show(conversation, gr.skip())
            return
        yield from self._answer(conversation, question, photo, knobs, request)

    def _again(self, conversation, index, text, knobs, request) -> Iterator[Shown]:
        try:
            if text is not None and not text.strip():
                raise InputError("Type a question first.")
            old = conversation.at(_turn(conversation, index))
        except InputError as error:
            gr.Warning(_sentence(error))
            yield self._show(conversation, gr.skip())
            return
        question = old.question if text is None else text
        yield from self._answer(conversation, question, old.photo, knobs, request, old)

    def _answer(
        self,
        conversation: Conversation,
        question: str,
        photo: Photo | None,
        knobs: tuple,
        request: gr.Request,
        old: Turn | None = None,
    ) -> Iterator[Shown]:
        """Asks and streams; a turn of which nothing comes leaves all as it was.

        Args:
            old: the turn in whose place this one comes; it goes with all after it.
        """
        before = turn = None
        try:
            with self.talks.turn(_session(request)) as events_of:
                before = conversation.turns[:], conversation.asked
                sampling, seed = _sampling(*knobs), int(knobs[-1] or 0)
                if old is not None:
                    here = old in conversation.turns
                    conversation.take_back(
                        conversation.turns.index(old) if here else -1
                    )
                turn = conversation.ask(question, photo)
                yield self._show(conversation, gr.update(value="", **GOING))
                for event in events_of(conversation.request(sampling, seed)):
                    if event.error is not None:
                        raise InputError(event.error)
                    if turn not in conversation.turns:  # reset meanwhile
                        break
                    turn.answer += event.piece
                    if event.finish_reason == "cancelled" and not turn.answer:
                        conversation.restore(*before)
                        yield self._show(
                            conversation, gr.update(value=question, **READY)
                        )
                        return
                    if event.finish_reason:
                        turn.note = note(event.usage, event.finish_reason)
                    yield self._show(conversation, gr.skip())
            # Also after a reset: the page shows again what a handler gave last.
            yield self._show(conversation, gr.update(**READY))
        except (InputError, BusyError, ClosedError) as error:
            if isinstance(error, ClosedError):
                logger.error("%s", error)
            gr.Warning(_sentence(error))
            if (
                before is None
            ):  # another answer is on its way, which can still be stopped
                box = gr.update(value=question) if old is None else gr.skip()
                yield self._show(conversation, box)
                return
            if turn is None or turn in conversation.turns:  # not reset meanwhile
                conversation.restore(*before)
            yield self._show(conversation, gr.update(value=question, **READY))

    def _show(self, conversation: Conversation, box: object) -> Shown:
        return conversation.shown()[0], box, conversation


def _sampling(beams, temperature, max_tokens, top_p, penalty, _) -> Sampling:
    return Sampling(
        num_beams=beams,
        temperature=temperature,
        max_tokens=max_tokens,
        top_p=top_p,
        repetition_penalty=penalty,
    )


def _session(request: gr.Request) -> str:
    return request.session_hash or uuid.uuid4().hex


def _turn(conversation: Conversation, index: int | tuple | list) -> int:
    """The turn of a message that the page numbers."""
    if isinstance(index, tuple | list):
        index = index[0]
    turns = conversation.shown()[1]
    return turns[index] if 0 <= index < len(turns) else -1


def _text(value: object) -> str:
    """What was typed, as it is or in the parts of a message."""
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    if isinstance(value, dict):
        return str(value.get("text", ""))
    return str(value)


def _sentence(error: Exception) -> str:
    """What a person reads; files of this machine have no names here."""
    text = str(error)
    if isinstance(error, BusyError):
        return "Many people are asking just now. Please try again in a moment."
    if isinstance(error, ClosedError):
        return "The model has stopped. Whoever runs this page has to start it again."
    return text[:1].upper() + text[1:]
