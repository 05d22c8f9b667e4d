"""What is done to a caption before it is learned; nothing else, because token counts on
disk are keyed by this file (data/token_counts.py)."""

import re
from collections.abc import Callable

from minigpt4_jax.data.prompts import CAPTION_END

Clean = Callable[[str], str]


def as_written(text: str) -> str:
    return text


def blip_caption(text: str) -> str:
    """A caption as the reference cleans those of stage 1 (its `BlipCaptionProcessor`)."""
    text = re.sub(r'[.!"()*#:;~]', " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:50])


def written_with_end(text: str) -> str:
    return text + CAPTION_END


def blip_with_end(text: str) -> str:
    return blip_caption(text) + CAPTION_END


CLEAN: dict[str, Clean] = {"": as_written, "blip": blip_caption}  # config.text.clean
WITH_END: dict[str, Clean] = {"": written_with_end, "blip": blip_with_end}
