"""A command at a pseudo-terminal of its own, driven as a person would."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Makes its terminal the controlling one, so that Ctrl-C becomes a signal.
OWN_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a worker of tests may ignore it
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
CTRL_C, CTRL_D, UP, TAB = "\x03", "\x04", "\x1b[A", "\t"


class Terminal:
    """A command at a terminal; `with` ends it."""

    def __init__(self, arguments, lines: int = 24, columns: int = 80, **env: str):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *arguments],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "dumb", "INPUTRC": "/dev/null"} | env,
        )
        os.close(slave)
        self.text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.seen = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What came up to and with the pattern, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} did not come; {self.seen!r} did"
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 4096)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"{pattern!r} did not come before the end; {self.seen!r}"
                self.seen += self.text.decode(data)
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def interrupt(self, pattern: str, seconds: float = 60) -> str:
        """Ctrl-C and what then came; once more where readline did not hear it.

        It does not where the signal comes before it waits for keys: Python then sees
        it with the next key or signal, and raises KeyboardInterrupt once.
        """
        self.press(CTRL_C)
        try:
            return self.wait_for(pattern, seconds=5)
        except AssertionError:
            self.press(CTRL_C)
            return self.wait_for(pattern, seconds)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def type(self, line: str) -> None:
        self.press(line + "\n")

    def ended(self, seconds: float = 60) -> int:
        """The exit code, once it has come."""
        return self.process.wait(seconds)

    def interrupted(self) -> int:
        """The exit code after a Ctrl-C at the prompt; as in `interrupt`."""
        self.press(CTRL_C)
        try:
            return self.ended(5)
        except subprocess.TimeoutExpired:
            self.press(CTRL_C)
            return self.ended()
