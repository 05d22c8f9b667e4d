"""A photo as text for a terminal: uint8 H W C -> escape sequences (terminal.pictures)."""

import base64
import io

import numpy as np
from PIL import Image

from minigpt4_jax.terminal import ITERM, KITTY, TRUE_COLOUR

MOST_COLUMNS, MOST_LINES = 72, 20
LARGEST = 640  # pixels of a side that are sent
CHUNK = 4096  # characters of one sequence, as kitty's protocol wants
UPPER_HALF = "\u2580"
# The levels of xterm's colour cube, numbers 16 to 231; its greys are 232 to 255.
LEVELS = np.array([0, 95, 135, 175, 215, 255])
GREYS = np.arange(8, 248, 10)


def draw(image_HWC: np.ndarray, kind: str, columns: int, lines: int) -> str:
    """The photo, with a line break at its end.

    Args:
        columns: and `lines`: of the terminal; the photo takes half of its lines at most.
    """
    photo = Image.fromarray(image_HWC)
    columns, lines = fitted(photo.size, columns, lines)
    if kind == KITTY:
        return f"{_kitty(photo, columns, lines)}\n"
    if kind == ITERM:
        return f"{_iterm(photo, columns, lines)}\n"
    return _half_blocks(photo, kind, columns, lines)


def fitted(size: tuple[int, int], columns: int, lines: int) -> tuple[int, int]:
    """Columns and lines for a photo; a cell is taken to be twice as high as wide."""
    width, height = size
    most = min(columns, MOST_COLUMNS), min(max(lines // 2, 1), MOST_LINES)
    scale = min(most[0] / width, 2 * most[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale / 2))


def _kitty(photo: Image.Image, columns: int, lines: int) -> str:
    data = _encoded(photo, "PNG")
    chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    # a=T: show at once; f=100: PNG; q=2: without a reply; c, r: cells.
    keys = f"a=T,f=100,q=2,c={columns},r={lines},"
    parts = []
    for chunk in chunks:
        more = int(len(parts) < len(chunks) - 1)
        parts.append(f"\x1b_G{keys}m={more};{chunk}\x1b\\")
        keys = "q=2,"
    return "".join(parts)


def _iterm(photo: Image.Image, columns: int, lines: int) -> str:
    data = _encoded(photo, "JPEG")
    return f"\x1b]1337;File=inline=1;width={columns};height={lines}:{data}\a"


def _encoded(photo: Image.Image, form: str) -> str:
    photo = photo.copy()
    photo.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    photo.save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def _half_blocks(photo: Image.Image, kind: str, columns: int, lines: int) -> str:
    """Two pixels a cell: the block's colour above, the ground's below."""
    pixels_HWC = np.asarray(photo.resize((columns, 2 * lines), Image.Resampling.BOX))
    if kind == TRUE_COLOUR:
        names = [[f"2;{r};{g};{b}" for r, g, b in row] for row in pixels_HWC]
    else:
        names = [[f"5;{i}" for i in row] for row in palette(pixels_HWC)]
    rows = []
    for above, below in zip(names[::2], names[1::2]):
        row, before = "", None
        for colours in zip(above, below):
            if colours != before:
                row += f"\x1b[38;{colours[0]};48;{colours[1]}m"
            row, before = row + UPPER_HALF, colours
        rows.append(f"{row}\x1b[0m\n")
    return "".join(rows)


def palette(pixels_HWC: np.ndarray) -> np.ndarray:
    """The nearest of xterm's colours, of its cube or its greys: numbers H W."""
    r, g, b = np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij")
    cube = np.stack([r, g, b], axis=-1).reshape(-1, 3)
    colours = np.concatenate([cube, np.repeat(GREYS[:, None], 3, axis=1)])
    away = pixels_HWC[..., None, :].astype(int) - colours
    return 16 + np.argmin((away**2).sum(-1), axis=-1)
