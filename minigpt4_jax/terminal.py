"""What a terminal can show: colours, and which kind of picture; by its environment.

Nothing is asked of the terminal itself: its reply would arrive among what is typed.
"""

import os
from collections.abc import Mapping
from typing import TextIO

KITTY, ITERM, TRUE_COLOUR, PALETTE = "kitty", "iterm", "true colour", "palette"


def has_colours(stream: TextIO, env: Mapping[str, str] = os.environ) -> bool:
    """Whether it is a terminal that obeys escapes, and the user has no objection."""
    wanted = not env.get("NO_COLOR") and env.get("TERM", "dumb") != "dumb"
    return wanted and stream.isatty()


def dim(text: str, stream: TextIO) -> str:
    """The text in a fainter colour, where the stream has colours."""
    return f"\x1b[2m{text}\x1b[0m" if has_colours(stream) else text


def pictures(stream: TextIO, env: Mapping[str, str] = os.environ) -> str | None:
    """The best kind of picture that the stream shows, or None.

    KITTY: its graphics protocol. ITERM: iTerm2's inline images. TRUE_COLOUR and
    PALETTE: half blocks, in any colours or in the 256 of xterm.
    """
    if not has_colours(stream, env):
        return None
    term, program = env["TERM"], env.get("TERM_PROGRAM", "")
    # A multiplexer draws the screen itself, and passes no picture on.
    if not (env.get("TMUX") or env.get("STY") or term.startswith(("tmux", "screen"))):
        if term in ("xterm-kitty", "xterm-ghostty") or env.get("KITTY_WINDOW_ID"):
            return KITTY
        if program in ("iTerm.app", "WezTerm", "mintty"):
            return ITERM
        if env.get("LC_TERMINAL") == "iTerm2":  # as ssh hands it on
            return ITERM
    if not (stream.encoding or "").lower().startswith("utf"):
        return None
    if env.get("COLORTERM") in ("truecolor", "24bit"):
        return TRUE_COLOUR
    return PALETTE if term.endswith("256color") else None


def printable(text: str) -> str:
    """Without what a terminal would obey, as escape sequences."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
