"""What a person types at a prompt: one turn, of one line or several, with a history.

A line that ends in a backslash goes on in the next one; three double quotes begin and
end a text of several lines. Lines are edited by readline, where Python has it.
"""

import contextlib
import os
import sys
from pathlib import Path

try:
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

FENCE = '"""'
LONGEST = 1000  # lines of the history


class Typed:
    """Turns from the terminal, and their lines in a file that only the user can read.

    Args:
        history: the file; a line that begins with a blank does not go there.
    """

    def __init__(self, history: Path):
        self.history = history
        if readline is None:
            return
        with contextlib.suppress(OSError):  # no history, but a conversation
            history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history, os.O_CREAT | os.O_RDONLY, 0o600))
            readline.read_history_file(history)
        readline.set_history_length(LONGEST)
        readline.set_auto_history(False)
        readline.set_completer_delims(" \t\n\"'")
        of_libedit = "libedit" in (readline.__doc__ or "")  # macOS has it instead
        tab = "bind ^I rl_complete" if of_libedit else "tab: complete"
        readline.parse_and_bind(tab)  # names of files

    def turn(self) -> str:
        """What is typed next; raises EOFError and KeyboardInterrupt as `input` does."""
        line = self._line("> ")
        if line.lstrip().startswith(FENCE):
            text = line.lstrip()[len(FENCE) :]
            while not text.rstrip().endswith(FENCE):
                text += "\n" + self._line(". ")
            return text.rstrip().removesuffix(FENCE).strip()
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._line(". ")
        return line.strip()

    def _line(self, prompt: str) -> str:
        if not sys.stdout.isatty():  # which gets the answers alone
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        line = input(prompt)
        if line.strip() and not line[0].isspace():
            self._keep(line)
        return line

    def _keep(self, line: str) -> None:
        if readline is None:
            return
        last = readline.get_current_history_length()
        if last and readline.get_history_item(last) == line:
            return
        readline.add_history(line)
        with contextlib.suppress(OSError):
            # At once, and by adding: several chats may run, and any may be killed.
            if hasattr(readline, "append_history_file"):  # libedit has it not always
                readline.append_history_file(1, self.history)
            else:
                readline.write_history_file(self.history)
