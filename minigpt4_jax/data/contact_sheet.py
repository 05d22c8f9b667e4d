"""A contact sheet: photos in a grid, a few words under each.

Only pictures and text in, one picture out; what to show is the caller's choice.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 6
SIDE = 220  # the square that a photo is fitted into
GAP = 14
LINES = 3
TEXT, LEADING = 15, 19  # height of the letters, from line to line
PAPER, FRAME, INK = (250, 250, 248), (228, 228, 224), (30, 30, 30)

# Pillow's own font has little beside ASCII.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf")
FONTS += ("Arial.ttf", "arial.ttf", "Helvetica.ttc")


def contact_sheet(photos: Sequence[tuple[np.ndarray | None, str]]) -> Image.Image:
    """The photos (uint8 image_HWC; None: could not be read) over their captions."""
    rows = -(-len(photos) // COLUMNS)
    width, height = SIDE + GAP, SIDE + GAP + LINES * LEADING
    size = (min(COLUMNS, len(photos)) * width + GAP, rows * height + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (image_HWC, caption) in enumerate(photos):
        row, column = divmod(number, COLUMNS)
        x, y = GAP + column * width, GAP + row * height
        _place(sheet, image_HWC, x, y)
        for line, text in enumerate(wrap(caption)):
            at = (x, y + SIDE + 3 + line * LEADING)
            draw.text(at, text, INK, _font())
    return sheet


def wrap(text: str, width: int = SIDE, lines: int = LINES) -> list[str]:
    """The text in at most so many lines of so many pixels; an ellipsis where it is cut.

    Letters that the font lacks lose their accents, or become question marks.
    """
    found = [""]
    for word in drawable(" ".join(text.split())).split(" "):
        longer = f"{found[-1]} {word}".strip()
        if _fits(longer, width):
            found[-1] = longer
            continue
        if found[-1]:
            found.append("")
        while not _fits(word, width):
            cut = next(n for n in range(len(word), 0, -1) if _fits(word[:n], width))
            found[-1:] = [word[:cut], ""]
            word = word[cut:]
        found[-1] = word
    if len(found) > lines:
        last = found[lines - 1]
        while not _fits(last + "…", width):
            last = last[:-1]
        found = [*found[: lines - 1], last.rstrip(" ,.") + "…"]
    return found


def drawable(text: str) -> str:
    """The text in letters that the font has."""
    whole = text.encode("utf-8", "replace").decode()  # half a surrogate pair is none
    return "".join(map(_letter, unicodedata.normalize("NFC", whole)))


def _place(sheet: Image.Image, image_HWC: np.ndarray | None, x: int, y: int) -> None:
    """Fit a photo into its square, in the middle of a frame."""
    sheet.paste(FRAME, (x, y, x + SIDE, y + SIDE))
    if image_HWC is None:
        draw = ImageDraw.Draw(sheet)
        middle = (x + SIDE // 2, y + SIDE // 2)
        draw.text(middle, "not readable", INK, _font(), anchor="mm")
        return
    photo = Image.fromarray(image_HWC)
    scale = SIDE / max(photo.size)
    size = [max(1, round(side * scale)) for side in photo.size]
    photo = photo.resize(size, Image.Resampling.BICUBIC)
    sheet.paste(photo, (x + (SIDE - size[0]) // 2, y + (SIDE - size[1]) // 2))


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, TEXT)
        except OSError:
            continue
    return ImageFont.load_default(TEXT)


def _fits(text: str, width: int) -> bool:
    return _font().getlength(text) <= width


@cache
def _letter(character: str) -> str:
    base = unicodedata.normalize("NFKD", character)[0]
    for letter in (character, base):
        if letter == " " or _has(letter):
            return letter
    return "?"


def _has(letter: str) -> bool:
    """Whether the font has the letter: what it lacks all looks alike."""
    return _mask(letter) != _mask("\uffff") or letter == "\uffff"


def _mask(letter: str) -> tuple[object, bytes]:
    mask = _font().getmask(letter)
    return mask.size, bytes(mask)
