"""One decoder and one preprocessing for all images: file or bytes -> image -> pixels.

`read_image` gives uint8 RGB as a person sees the photo; `preprocess` gives what a vision
tower expects. Everything that takes an image from outside comes through here.
"""

import stat
import struct
from io import BytesIO
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from minigpt4_jax.errors import ConfigError, InputError, unknown

ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray

# Only decoders that run inside this process and whose header tells the size: PIL would
# hand EPS to Ghostscript, and an ICO may hold a PNG larger than it says.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2".split()
)

# PIL warns above this size: what passes here passes without a warning.
MAX_PIXELS = 89_478_485
# JPEG's own limit. A PNG of 1 x 89,000,000 would cost gigabytes in its first resize pass.
MAX_SIDE = 65_535

RESIZES = {"bicubic": Image.Resampling.BICUBIC}

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PixelRules(Protocol):
    """The part of a ViT preset that belongs to the image."""

    @property
    def image_size(self) -> int: ...
    @property
    def resize(self) -> str: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


def read_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image to uint8 `image_HWC`, RGB, upright, transparency on white.

    The first frame of an animation; of an opened PIL image the frame it stands at. 16-bit
    grey is scaled to 8 bit; colour profiles are ignored, as the reference does.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array: uint8 or uint16,
            [H W] grey or [H W C] with C = 1 (grey), 2 (grey, alpha), 3 or 4 (RGB, alpha).
        max_pixels: larger images are refused from their header, before decoding, as are
            sides over MAX_SIDE. PIL's own limit, twice the default, holds beside it.

    Raises:
        InputError: names the file (never its content) and what is wrong with it.
    """
    if isinstance(source, str | Path):
        return _read_file(Path(source), max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        if not source:
            raise InputError("image: got 0 bytes; want the content of an image file")
        with _open(BytesIO(source), "image") as opened:
            return _decode(opened, "image", max_pixels)
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source), "array", max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, "image", max_pixels)
    raise InputError(
        f"image: got {type(source).__name__}; want a path, bytes, a PIL image or an array"
    )


def preprocess(image_HWC: np.ndarray, cfg: PixelRules) -> np.ndarray:
    """Return float32 `pixels_HWC` of exactly `cfg.image_size` squared, normalised.

    `squash`, then / 255, - mean, / std in float32: the exact pixels of the reference's
    `blip2_image_eval`. Raises ConfigError for an unknown `cfg.resize`.
    """
    pixels_HWC = squash(image_HWC, cfg).astype(np.float32) / np.float32(255)
    return (pixels_HWC - np.array(cfg.mean, np.float32)) / np.array(cfg.std, np.float32)


def squash(image_HWC: np.ndarray, cfg: PixelRules) -> np.ndarray:
    """The image as uint8 of exactly `cfg.image_size` squared.

    Resized by PIL, aspect ratio not kept and nothing cropped (torch's and JAX's own cubic
    kernels differ). Raises ConfigError for an unknown `cfg.resize`.
    """
    if cfg.resize not in RESIZES:
        raise ConfigError(unknown("resize rule", cfg.resize, RESIZES))
    assert image_HWC.dtype == np.uint8 and image_HWC.shape[2:] == (3,), image_HWC.shape
    size, kernel = cfg.image_size, RESIZES[cfg.resize]
    if image_HWC.shape[:2] == (size, size):
        return image_HWC  # what PIL returns as well
    # Two calls, width first, as Pillow did inside one until version 13 began to choose
    # the cheaper order: each pass rounds to uint8, so the order shows (up to 16 levels).
    narrow = Image.fromarray(image_HWC).resize((size, len(image_HWC)), kernel)
    return np.asarray(narrow.resize((size, size), kernel))


def _read_file(path: Path, max_pixels: int) -> np.ndarray:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: is a folder; want an image file")
        if not stat.S_ISREG(status.st_mode):  # a device or a pipe may never end
            raise InputError(f"{path}: is not a regular file; want an image file")
        if status.st_size == 0:
            raise InputError(f"{path}: the file is empty")
        with path.open("rb") as file, _open(file, str(path)) as opened:
            return _decode(opened, str(path), max_pixels)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from error


def _open(file, name: str) -> Image.Image:
    """Read the header."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        known = ", ".join(formats)
        raise InputError(f"{name}: not an image, or damaged; want {known}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: refused as too large ({error})") from None
    except Exception as error:
        # Damaged headers raise anything: struct.error, zlib.error, OverflowError, ...
        raise InputError(f"{name}: damaged image ({error})") from error


def _decode(opened: Image.Image, name: str, max_pixels: int) -> np.ndarray:
    width, height = opened.size
    if width * height > max_pixels:
        raise InputError(
            f"{name}: got {width} x {height} pixels; want at most {max_pixels:,} in all; "
            "scale it down first"
        )
    if max(width, height) > MAX_SIDE:
        raise InputError(
            f"{name}: got {width} x {height} pixels; want at most {MAX_SIDE:,} a side"
        )
    if not width * height:
        raise InputError(f"{name}: got {width} x {height} pixels; want at least 1 x 1")
    try:
        opened.load()
        upright = _UPRIGHT.get(_orientation(opened))
        rgb = _to_rgb(opened, name)
        return np.array(rgb if upright is None else rgb.transpose(upright))
    except InputError:
        raise
    except Exception as error:  # see _open
        raise InputError(f"{name}: damaged or truncated image ({error})") from error


def _orientation(loaded: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none.

    Not ImageOps.exif_transpose: it writes the EXIF again, which fails on odd entries.
    """
    try:
        return loaded.getexif().get(_ORIENTATION_TAG, 1)
    except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError):
        return 1  # damaged EXIF is no reason to refuse a photo
    except struct.error:
        return 1


def _to_rgb(loaded: Image.Image, name: str) -> Image.Image:
    if loaded.mode == "F":
        raise InputError(
            f"{name}: got floating-point values; want 8 or 16 bit integers"
        )
    if loaded.mode == "I" or loaded.mode.startswith("I;16"):
        grey_HW = np.asarray(loaded)
        if grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise InputError(f"{name}: got values outside 0..65535; want 8 or 16 bit")
        return Image.fromarray(_to_8_bit(grey_HW)).convert("RGB")
    if loaded.mode.endswith(("A", "a")) or "transparency" in loaded.info:
        rgba = loaded.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return loaded.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale 0..65535 to 0..255, rounded (65535 = 257 * 255)."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"array: got {array.dtype}; want uint8 in 0..255 (or uint16 in 0..65535)"
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or not array.size:
        raise InputError(
            f"array: got shape {list(array.shape)}; want [H W] or [H W C], C in 1..4"
        )
    if array.dtype == np.uint16:
        array = _to_8_bit(array)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
