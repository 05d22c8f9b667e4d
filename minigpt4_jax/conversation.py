"""A conversation that remembers its turns; `Generator.chat` begins one."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from minigpt4_jax.data.images import ImageSource, read_image
from minigpt4_jax.errors import InputError
from minigpt4_jax.request import Event, Message, Request, Sampling, user

Images = ImageSource | list[ImageSource] | tuple[ImageSource, ...] | None


class Chat:
    """A conversation that remembers its turns and images.

    Attributes:
        messages: the turns so far.
        sampling: how the next answers are drawn.
    """

    def __init__(
        self,
        generator: Any,
        *,
        system: str | None = None,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        seed: int = 0,
        overflow: str = "error",
        compat: str | None = None,
    ):
        self.generator = generator
        self.sampling = sampling
        self._stop = tuple(stop)
        self._seed = seed
        self._overflow = overflow
        self._compat = compat
        self._system = [] if system is None else [Message("system", system)]
        self.messages: list[Message] = []
        self._under_way = ""
        self.reset()

    def ask(self, text: str, image: Images = None) -> str:
        """The whole answer to the next turn; an image stays in the conversation."""
        return "".join(self.stream(text, image))

    def stream(self, text: str, image: Images = None) -> Iterator[str]:
        """The answer in pieces."""
        return pieces(self.events(text, image))

    def events(self, text: str, image: Images = None) -> Iterator[Event]:
        """The answer as events; what was said when the caller stops is remembered.

        A turn that fails, or is stopped before its first word, leaves the conversation
        as it was.
        """
        seen = [read_image(source) for source in images(image)]
        turn = user(text, *seen)
        request = Request(
            [*self.messages, turn],
            sampling=self.sampling,
            stop=self._stop,
            seed=(self._seed + len(self.messages)) % 2**32,
            overflow=self._overflow,
            compat=self._compat,
        )
        said: list[str] = []
        ended = False
        turns = self.messages
        self._under_way = request.id
        try:
            for event in self.generator.submit([request]):
                said = [] if event.error else [*said, event.piece]
                ended = event.finish_reason not in (None, "cancelled", "error")
                yield event
        finally:
            self._under_way = ""
            # Not after a reset meanwhile, which has begun another list.
            if (any(said) or ended) and self.messages is turns:
                self.messages += [turn, Message("assistant", "".join(said))]

    def stop(self) -> None:
        """End the answer under way, within a chunk; its last event says "cancelled".

        From any thread, or a signal handler.
        """
        self.generator.cancel(self._under_way)

    def reset(self) -> None:
        """Forget all turns and images, but not the system message."""
        self.messages = list(self._system)


def images(image: Images) -> list[ImageSource]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def pieces(events: Iterable[Event]) -> Iterator[str]:
    for event in events:
        if event.error is not None:
            raise InputError(event.error)
        if event.piece:
            yield event.piece
