"""Talk about a photo in a terminal: minigpt4-jax chat --image photo.jpg.

With --prompt, or when stdin is no terminal: one answer. Else a first answer about the
photo, then a conversation. Words go to stdout, all else to stderr. Knobs:
configs/chat.py; the first answer and that to --prompt are greedy.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from minigpt4_jax import errors, locate, picture, terminal
from minigpt4_jax.conversation import Chat
from minigpt4_jax.data.images import read_image
from minigpt4_jax.generate import SAMPLING, given_config
from minigpt4_jax.generator import Generator
from minigpt4_jax.pages import CHAT, PROMPT
from minigpt4_jax.request import Sampling, Usage
from minigpt4_jax.typed import Typed

logger = logging.getLogger(__name__)

PHOTO = Path(__file__).parent / "assets/photos/skateboard.jpg"
COMMANDS = ("/image", "/reset", "/help", "/quit")
HINT = (
    "/image FILE shows another photo, /reset forgets all, /help tells more, /quit ends."
)
HELP = '''\
/image FILE   shows another photo, with your next question; tab completes its name
/reset        forgets all that was said, and shows the photo again
/quit         ends, and so does Ctrl-D, or Ctrl-C twice
Ctrl-C        stops an answer; what was said of it stays in the conversation
\\             at the end of a line: the text goes on in the next one
"""           begins and ends a text of several lines
Arrow keys    bring back what you typed, from {history} too;
              a line that begins with a blank is not kept there'''
LEAVE = "Ctrl-C again, Ctrl-D or /quit ends."


def main(argv: list[str]) -> int:
    """Read the flags and talk."""
    args = flags.FLAGS
    if argv[1:]:
        hint = f"; did you mean --image {argv[1]!r}?" if Path(argv[1]).exists() else ""
        raise errors.InputError(f"chat takes flags only, got {argv[1]!r}{hint}")
    source = os.path.expanduser(args.image or PHOTO)
    image = read_image(source)  # before the model: a wrong name should not cost a load
    cfg = given_config("chat")
    sampling = Sampling(**{name: cfg[name] for name in SAMPLING})
    show(image)
    began = time.perf_counter()
    generator = Generator.load(
        args.checkpoint, dtype=cfg.dtype or None, batch_size=1, chunk=cfg.chunk
    )
    note(f"Model ready after {time.perf_counter() - began:.1f} s.")
    greedy = dataclasses.replace(
        sampling, temperature=0.0, repetition_penalty=1.0, top_k=0, top_p=1.0
    )
    chat = generator.chat(
        sampling=greedy,
        stop=cfg.stop,
        seed=cfg.seed,
        overflow="error" if cfg.compat else cfg.overflow,
        compat=cfg.compat or None,
    )
    prompt = args.prompt or PROMPT
    note(f"About {source}:")
    whole = say(chat, prompt, image)
    if args.prompt is None and sys.stdin.isatty():
        chat.sampling = sampling
        converse(chat, image, Typed(locate.cache_root() / "chat_history"))
    elif not whole:
        raise KeyboardInterrupt
    return 0


def converse(chat: Chat, image, typed: Typed) -> None:
    """Turns until /quit or the end of input; what fails is said and changes nothing.

    Args:
        image: the photo of the first turn; shown again after /reset.
    """
    note(HINT)
    new = None if chat.messages else image  # goes with the next question
    interrupted = False
    while True:
        try:
            text = typed.turn()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if interrupted:
                return
            interrupted = True
            note(LEAVE)
            continue
        interrupted = False
        command, _, argument = text.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/reset":
                chat.reset()
                new = image
                note("Forgotten; the photo is shown again.")
            elif command == "/image":
                file = os.path.expanduser(argument.strip().strip("'\""))
                if not file:
                    raise errors.InputError("/image FILE: which file?")
                new = image = read_image(file)
                show(image)
                note("Shown with your next question.")
            elif command == "/help":
                note(HELP.format(history=typed.history))
            elif command.startswith("/"):
                note(errors.unknown("command", command, COMMANDS))
            elif text:
                before = len(chat.messages)
                say(chat, text, new)
                if len(chat.messages) != before:
                    new = None
        except errors.InputError as error:
            note(str(error))


def say(chat: Chat, text: str, image=None) -> bool:
    """Print an answer as it comes, then how long it took; False if Ctrl-C cut it short.

    A second Ctrl-C, where the first has not stopped it yet, is a KeyboardInterrupt.
    """
    usage, stopped = None, False
    with (
        contextlib.closing(chat.events(text, image)) as events,
        interrupts(chat) as pressed,
    ):
        for event in events:
            if pressed:  # perhaps before the request was under way
                chat.stop()
            if event.error is not None:
                raise errors.InputError(event.error)
            print(terminal.printable(event.piece), end="", flush=True)
            usage, stopped = event.usage, event.finish_reason == "cancelled"
    print(flush=True)
    if stopped:
        note("Stopped.")
    elif usage:
        note(speed(usage))
    if usage and usage.dropped_turns:
        note(f"The oldest {usage.dropped_turns} turns did not fit any more.")
    return not stopped


@contextlib.contextmanager
def interrupts(chat: Chat) -> Iterator[list[int]]:
    """Ctrl-C ends the chat's answer, and only a second one the program.

    An exception, which would come out of the middle of a step, could leave it half done.
    """
    pressed: list[int] = []

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed.append(number)
        chat.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def show(image) -> None:
    """Draw the photo, where stdout is a terminal that shows pictures."""
    if kind := terminal.pictures(sys.stdout):
        size = shutil.get_terminal_size()
        print(picture.draw(image, kind, *size), flush=True)


def note(text: str) -> None:
    """Say something that is not the model's."""
    logger.info("%s", terminal.dim(text, sys.stderr))


def speed(usage: Usage) -> str:
    """The sentence with the seconds to the first token and the rate of the others.

    A beam search has all of its tokens at once.
    """
    after = usage.seconds - usage.seconds_to_first_token
    if after <= 0:
        return f"Answer after {usage.seconds:.2f} s ({usage.answer_tokens} tokens)."
    rate = (usage.answer_tokens - 1) / after
    return (
        f"First token after {usage.seconds_to_first_token:.2f} s, "
        f"{rate:.1f} tokens/s ({usage.answer_tokens} tokens)."
    )


if __name__ == "__main__":
    CHAT.run(main)
