"""A photo as escape sequences, read back as a terminal would read them."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from minigpt4_jax import picture
from minigpt4_jax.data.images import read_image
from minigpt4_jax.terminal import ITERM, KITTY, PALETTE, TRUE_COLOUR

COLOUR = r"(2;\d+;\d+;\d+|5;\d+)"
CELL = re.compile(rf"(?:\x1b\[38;{COLOUR};48;{COLOUR}m)?▀")
PHOTO = Path(__file__).parent.parent / "minigpt4_jax/assets/photos/skateboard.jpg"


def blocks(text: str) -> tuple[list, list]:
    """Rows of (above, below) colours, each as in its sequence."""
    rows = []
    for line in text.splitlines():
        assert line.endswith("\x1b[0m")
        row, colours = [], None
        for found in CELL.finditer(line):
            colours = found.groups() if found.group(1) else colours
            row.append(colours)
        assert "".join(m.group() for m in CELL.finditer(line)) + "\x1b[0m" == line
        rows.append(row)
    return rows


def photo(width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def test_half_blocks_show_each_pixel_of_a_small_photo():
    image_HWC = photo(7, 6)
    rows = blocks(picture.draw(image_HWC, TRUE_COLOUR, columns=7, lines=6))
    assert [len(row) for row in rows] == [7, 7, 7]
    for y, row in enumerate(rows):
        for x, (above, below) in enumerate(row):
            wanted = image_HWC[2 * y, x], image_HWC[2 * y + 1, x]
            got = [tuple(map(int, c.split(";")[1:])) for c in (above, below)]
            assert got == [tuple(map(int, pixel)) for pixel in wanted]


def test_one_colour_is_named_once_a_line():
    grey_HWC = np.full((6, 7, 3), 100, np.uint8)
    text = picture.draw(grey_HWC, TRUE_COLOUR, columns=7, lines=6)
    assert text.count("38;2;100;100;100") == text.count("\n") == 3


def test_the_palette_has_the_nearest_colour():
    pixels_HWC = np.array(
        [[[0, 0, 0], [255, 255, 255], [95, 135, 175], [120, 121, 119], [254, 1, 2]]]
    )
    # 16 and 231 begin and end the cube; 16 + 36 r + 6 g + b; greys 8, 18, ... from 232.
    assert picture.palette(pixels_HWC).tolist() == [
        [16, 231, 16 + 36 * 1 + 6 * 2 + 3, 232 + 11, 16 + 36 * 5]
    ]
    rows = blocks(picture.draw(photo(7, 6), PALETTE, columns=7, lines=6))
    numbers = picture.palette(photo(7, 6))
    assert [[above for above, _ in row] for row in rows] == [
        [f"5;{n}" for n in row] for row in numbers[::2]
    ]


def test_kitty_gets_a_png_in_pieces_and_asks_for_no_reply():
    image_HWC = photo(90, 60)
    text = picture.draw(image_HWC, KITTY, columns=60, lines=40)
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in parts) + "\n" == text
    assert len(parts) > 2 and all(len(data) <= 4096 for _, data in parts)
    assert [re.search(r"m=(\d)", keys)[1] for keys, _ in parts] == [
        *("1" for _ in parts[1:]),
        "0",
    ]
    assert parts[0][0].startswith("a=T,f=100,q=2,c=60,r=20,")
    assert all("q=2" in keys for keys, _ in parts)
    data = base64.b64decode("".join(data for _, data in parts))
    assert (np.asarray(PIL.Image.open(io.BytesIO(data))) == image_HWC).all()


def test_iterm_gets_a_file_inline():
    text = picture.draw(photo(90, 60), ITERM, columns=60, lines=40)
    found = re.fullmatch(
        r"\x1b\]1337;File=inline=1;width=60;height=20:([^\a]*)\a\n", text
    )
    assert PIL.Image.open(io.BytesIO(base64.b64decode(found[1]))).size == (90, 60)


def test_a_large_photo_is_sent_small():
    text = picture.draw(photo(2000, 1500), ITERM, columns=80, lines=24)
    data = base64.b64decode(text.partition(":")[2].rstrip("\a\n"))
    assert PIL.Image.open(io.BytesIO(data)).size == (640, 480)


@pytest.mark.parametrize(
    "size, room, cells",
    [
        ((640, 480), (80, 24), (32, 12)),  # half of the lines
        ((640, 480), (20, 24), (20, 8)),  # all columns
        ((640, 480), (300, 100), (53, 20)),  # no more than 72 and 20
        ((4000, 10), (80, 24), (72, 1)),
        ((10, 4000), (80, 24), (1, 12)),
        ((640, 480), (80, 1), (3, 1)),
    ],
)
def test_a_photo_keeps_its_shape_and_leaves_room(size, room, cells):
    assert picture.fitted(size, *room) == cells


def test_a_bundled_photo_is_drawn_in_its_colours():
    image_HWC = read_image(PHOTO)
    rows = blocks(picture.draw(image_HWC, TRUE_COLOUR, columns=80, lines=24))
    got = [
        [[int(v) for v in c.split(";")[1:]] for c in cell]
        for row in rows
        for cell in row
    ]
    assert np.abs(np.mean(got, axis=(0, 1)) - image_HWC.mean(axis=(0, 1))).max() < 2
