"""A log of JSON lines, each with the step it is of: appended to, and cut back to a step."""

import json
import logging
from pathlib import Path

from minigpt4_jax import storage

logger = logging.getLogger(__name__)


class Lines:
    """A file that a full disk does not stop: what cannot be written waits for room."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting = ""

    def append(self, record: dict) -> None:
        """One more line."""
        self._waiting += json.dumps(record, ensure_ascii=False) + "\n"
        self.flush()

    def flush(self) -> None:
        """Write what waits, if it can be written."""
        if not self._waiting:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:
                whole = file.tell()
                text = self._waiting.encode()
                try:
                    if file.write(text) < len(text):
                        raise OSError("no room for the whole line")
                except OSError:
                    file.truncate(whole)
                    raise
        except OSError as error:
            logger.warning("%s cannot be written (%s); lines wait", self.path, error)
        else:
            self._waiting = ""

    def drop_after(self, step: int) -> None:
        """Remove the lines of later steps, and those that a kill cut short."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        # By "\n" alone: a caption may hold other ends of lines, such as U+2028.
        whole = [line + "\n" for line in text.split("\n")[:-1]]
        keep = "".join(line for line in whole if _step(line) <= step)
        if keep != text:
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text(keep, encoding="utf-8")
            storage.replace(part, self.path)


def _step(line: str) -> float:
    """The step of a line; beyond all for a broken one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
