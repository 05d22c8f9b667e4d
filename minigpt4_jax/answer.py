"""One answer as it grows: tokens in, pieces of text out.

A piece is whole characters, without what may yet turn out to be the start of a stop
string or white space at the end. Joined pieces are the answer.
"""

from collections.abc import Callable, Sequence

from minigpt4_jax.data.tokens import TextStream, Tokenizer
from minigpt4_jax.request import FAILURES


class Answer:
    """Text and state of one row.

    Args:
        stop: strings that end the answer; it is cut before the first of them.
        starts: False when the tokens continue words that are given; then white space
            at the start is part of the answer.
        sequences: of tokens that end the answer, and are part of its text.
        whole: what becomes of the text when the answer ends; no piece comes before.

    Attributes:
        text: all that was generated, up to a stop string.
        finish_reason: "stop", "length" or "error" at the end, else None.
        error: why, in one sentence, when that is "error".
        count: tokens that were taken, end token included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        starts: bool = True,
        sequences: Sequence[tuple[int, ...]] = (),
        whole: Callable[[str], str] | None = None,
    ):
        self._stream = TextStream(tokenizer, starts)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._starts = starts
        self._sequences = tuple(sequences)
        self._kept = max(map(len, self._sequences), default=0)
        self._whole = whole
        self._last: tuple[int, ...] = ()
        self._sent = 0
        self.text = ""
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.count = 0

    def push(self, ids: Sequence[int], end_ids: Sequence[int], limit: int) -> int:
        """Take tokens until the answer ends; returns how many were taken."""
        for taken, token in enumerate(ids):
            if self.finish_reason:
                return taken
            if token in FAILURES:
                self.error = FAILURES[token]
                self._finish("error")
                return taken
            self.count += 1
            if token in end_ids:
                self._finish("stop")
            else:
                self._append(self._stream.push([token]))
                if not self.finish_reason and self._ends_sequence(token):
                    self._finish("stop")
                elif not self.finish_reason and self.count >= limit:
                    self._finish("length")
        return len(ids)

    def piece(self) -> str:
        """The text that became certain since the last call."""
        text = self.text
        if self._whole and not self.finish_reason:
            return ""
        if not self.finish_reason:
            text = text[: len(text) - self._doubtful()]
        text = text.rstrip()
        if self._sent == 0 and self._starts:
            self._sent = len(text) - len(text.lstrip())
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece

    def _append(self, new: str) -> None:
        begin = max(0, len(self.text) - self._longest)
        self.text += new
        found = [i for s in self._stop if (i := self.text.find(s, begin)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = "stop"

    def _finish(self, reason: str) -> None:
        self._append(self._stream.flush())
        self.finish_reason = self.finish_reason or reason
        if self._whole:
            self.text = self._whole(self.text)

    def _ends_sequence(self, token: int) -> bool:
        """Whether the tokens up to this one end in one of the sequences."""
        if not self._kept:
            return False
        self._last = (*self._last, token)[-self._kept :]
        return any(self._last[-len(s) :] == s for s in self._sequences)

    def _doubtful(self) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            if self.text.endswith(
                tuple(s[:length] for s in self._stop if len(s) > length)
            ):
                return length
        return 0
