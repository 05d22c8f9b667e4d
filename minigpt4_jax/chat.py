"""Talk about a photo in a terminal: python -m minigpt4_jax.chat --image photo.jpg.

With --prompt, or when stdin is no terminal: one answer. Else a first answer about the
photo, then a conversation, with /image FILE, /reset, /quit. Words go to stdout, all else
to stderr. Knobs: configs/chat.py; the first answer and that to --prompt are greedy.
"""

import dataclasses
import logging
import os
import sys
import time
from pathlib import Path

from absl import flags

from minigpt4_jax import errors
from minigpt4_jax.conversation import Chat
from minigpt4_jax.data.images import read_image
from minigpt4_jax.generate import SAMPLING, define_config, given_config
from minigpt4_jax.generator import Generator
from minigpt4_jax.request import Sampling, Usage

logger = logging.getLogger(__name__)

PHOTO = Path(__file__).parent / "assets/photos/skateboard.jpg"
PROMPT = "Describe this image in one sentence."
HELP = "/image FILE shows another photo, /reset forgets all, /quit ends."


def main(argv: list[str]) -> None:
    """Read the flags and talk."""
    args = flags.FLAGS
    if argv[1:]:
        raise errors.InputError(f"chat takes flags only, got {argv[1]!r}")
    source = os.path.expanduser(args.image or PHOTO)
    image = read_image(source)  # before the model: a wrong name should not cost a load
    cfg = given_config("chat")
    sampling = Sampling(**{name: cfg[name] for name in SAMPLING})
    began = time.perf_counter()
    generator = Generator.load(
        args.checkpoint, dtype=cfg.dtype or None, batch_size=1, chunk=cfg.chunk
    )
    logger.info("Model ready after %.1f s.", time.perf_counter() - began)
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
    logger.info("About %s:", source)
    say(chat, prompt, image)
    if args.prompt is None and sys.stdin.isatty():
        chat.sampling = sampling
        converse(chat, image)


def converse(chat: Chat, image) -> None:
    """Turns until /quit or the end of input; what fails is said and changes nothing.

    Args:
        image: the photo already shown; shown again after /reset.
    """
    try:
        import readline  # noqa: F401 (gives input() its editing and history)
    except ImportError:
        pass
    logger.info(HELP)
    show = None  # the image that goes with the next question
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = text.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/reset":
                chat.reset()
                show = image
                logger.info("Forgotten; the photo is shown again.")
            elif command == "/image":
                file = os.path.expanduser(argument.strip().strip("'\""))
                show = image = read_image(file)
                logger.info("Shown with your next question.")
            elif command.startswith("/"):
                logger.info(HELP)
            elif text:
                say(chat, text, show)
                show = None
        except errors.InputError as error:
            logger.info("%s", error)


def say(chat: Chat, text: str, image=None) -> None:
    """Print an answer as it comes, then how long it took; Ctrl-C cuts it short."""
    usage = None
    try:
        for event in chat.events(text, image):
            if event.error is not None:
                raise errors.InputError(event.error)
            print(_printable(event.piece), end="", flush=True)
            usage = event.usage
    except KeyboardInterrupt:
        pass
    print(flush=True)
    if usage:
        logger.info(speed(usage))
    if usage and usage.dropped_turns:
        logger.info("The oldest %d turns did not fit any more.", usage.dropped_turns)


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


def _printable(text: str) -> str:
    """Without what a terminal would obey, as escape sequences."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def define_flags() -> None:
    """Flags of this command; not at import, where two commands' names would collide."""
    flags.DEFINE_string("checkpoint", "demo", "a converted model or a training run")
    flags.DEFINE_string("image", None, "the photo (default: one that is bundled)")
    flags.DEFINE_string("prompt", None, "ask only this")
    define_config("chat")


if __name__ == "__main__":
    errors.run(main, define=define_flags)
