"""Every kind of image file a user may have, made here, and the reference's pixels."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4_jax.data.images import MAX_PIXELS, preprocess, read_image
from minigpt4_jax.errors import ConfigError, InputError


@dataclass(frozen=True)
class Rules:
    image_size: int = 28
    resize: str = "bicubic"
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


def smooth_photo(height=24, width=40) -> np.ndarray:
    """Three different slopes: JPEG keeps it within 3 levels, every rotation differs."""
    y_HW, x_HW = np.mgrid[:height, :width]
    slopes = (6 * x_HW, 10 * y_HW, 120 + 3 * x_HW - 4 * y_HW)
    return np.stack(slopes, axis=-1).clip(0, 255).astype(np.uint8)


def noise(height=24, width=40, channels=3, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose pixels are missing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + end

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"nothing"))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


# What can be read


def test_path_bytes_pil_and_array_give_the_same_image(tmp_path):
    image_HWC = noise()
    path = tmp_path / "photo.png"
    Image.fromarray(image_HWC).save(path)
    for source in (
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        Image.fromarray(image_HWC),
        image_HWC,
    ):
        got_HWC = read_image(source)
        assert got_HWC.dtype == np.uint8 and got_HWC.flags.writeable
        np.testing.assert_array_equal(got_HWC, image_HWC)


def test_an_array_is_copied_and_a_pil_image_is_left_as_it_was():
    image_HWC = noise(channels=4)
    opened = Image.fromarray(image_HWC)
    read_image(opened)
    assert opened.mode == "RGBA" and opened.size == (40, 24)
    rgb_HWC = noise()
    read_image(rgb_HWC)[:] = 0
    np.testing.assert_array_equal(rgb_HWC, noise())


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_the_common_formats_are_read(kind):
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encoded(Image.fromarray(smooth_photo()), kind, **options)
    off_HWC = read_image(data).astype(int) - smooth_photo()
    assert np.abs(off_HWC).mean() < 4  # chroma subsampling; the other formats keep all


def test_alpha_is_laid_on_white():
    image_HWC = noise(channels=4)
    image_HWC[0, 0] = (10, 20, 30, 0)
    image_HWC[0, 1] = (10, 20, 30, 255)
    image_HWC[0, 2] = (0, 100, 200, 51)  # a fifth
    got_HWC = read_image(encoded(Image.fromarray(image_HWC), "PNG"))
    assert got_HWC[0, :3].tolist() == [[255, 255, 255], [10, 20, 30], [204, 224, 244]]
    weight_HW1 = image_HWC[..., 3:] / 255
    want_HWC = image_HWC[..., :3] * weight_HW1 + 255 * (1 - weight_HW1)
    assert np.abs(got_HWC - want_HWC).max() < 1


def test_grey_with_alpha_is_laid_on_white():
    image_HWC = noise(channels=2)
    image_HWC[0, :2] = [[10, 0], [10, 255]]
    for source in (image_HWC, encoded(Image.fromarray(image_HWC), "PNG")):
        got_HWC = read_image(source)
        assert got_HWC.shape == (24, 40, 3)
        assert got_HWC[0, :2].tolist() == [[255] * 3, [10] * 3]


def test_grey_becomes_rgb():
    grey_HW = noise()[..., 0]
    for source in (
        grey_HW,
        grey_HW[..., None],
        encoded(Image.fromarray(grey_HW), "PNG"),
    ):
        np.testing.assert_array_equal(read_image(source), np.stack([grey_HW] * 3, -1))


def test_black_and_white_becomes_0_and_255():
    bits = Image.fromarray(smooth_photo()).convert("1")
    got_HWC = read_image(encoded(bits, "PNG"))
    np.testing.assert_array_equal(got_HWC[..., 1] > 0, np.asarray(bits))
    assert set(np.unique(got_HWC)) == {0, 255}


def test_cmyk_becomes_rgb():
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # full cyan
    got_HWC = read_image(encoded(ink, "JPEG", quality=95))
    assert np.abs(got_HWC.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8_bit(kind):
    values_HW = np.array([[0, 128, 129, 257, 32768], [65535, 65407, 65406, 514, 256]])
    data = encoded(Image.fromarray(values_HW.astype(np.uint16)), kind)
    got_HWC = read_image(data)
    assert got_HWC[..., 0].tolist() == [[0, 0, 1, 1, 128], [255, 255, 254, 2, 1]]
    np.testing.assert_array_equal(got_HWC, read_image(values_HW.astype(np.uint16)))


def test_16_bit_grey_in_a_pgm_is_scaled_to_8_bit():
    values_HW = np.array([[0, 257, 32768, 65535]])
    data = b"P5 4 1 65535\n" + values_HW.astype(">u2").tobytes()
    assert read_image(data)[..., 2].tolist() == [[0, 1, 128, 255]]


def test_a_palette_is_looked_up():
    palette = Image.fromarray(noise()).quantize(17)
    got_HWC = read_image(encoded(palette, "PNG"))
    np.testing.assert_array_equal(got_HWC, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(kind):
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
    palette.putdata([0, 1, 2])
    got_HWC = read_image(encoded(palette, kind, transparency=1))
    assert got_HWC.tolist() == [[[10, 20, 30], [255, 255, 255], [7, 8, 9]]]


def test_a_transparent_colour_of_an_rgb_png_becomes_white():
    image_HWC = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    data = encoded(Image.fromarray(image_HWC), "PNG", transparency=(4, 5, 6))
    assert read_image(data).tolist() == [[[1, 2, 3], [255, 255, 255]]]


# EXIF orientation: where the camera put row 0 and column 0 (EXIF 2.32, tag 0x0112).
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),  # held upright, stored a quarter turn to the left
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied_once(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](smooth_photo())))
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    got_HWC = read_image(encoded(stored, kind, exif=exif, **options))
    assert got_HWC.shape == smooth_photo().shape
    assert np.abs(got_HWC.astype(int) - smooth_photo()).max() <= (6 if options else 0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL notes the damage
def test_damaged_exif_does_not_refuse_the_photo():
    photo = Image.fromarray(smooth_photo())
    want_HWC = read_image(encoded(photo, "JPEG"))
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0"):
        got_HWC = read_image(encoded(photo, "JPEG", exif=exif))
        np.testing.assert_array_equal(got_HWC, want_HWC)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    red, *rest = (Image.new("RGB", (8, 6), name) for name in ("red", "lime", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(red, kind, save_all=True, append_images=rest, duration=90, **options)
    assert Image.open(BytesIO(data)).n_frames == 3
    assert np.unique(read_image(data).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_an_image_of_one_pixel_is_read_and_preprocessed():
    image_HWC = read_image(encoded(Image.new("RGB", (1, 1), (255, 0, 51)), "PNG"))
    assert image_HWC.tolist() == [[[255, 0, 51]]]
    pixels_HWC = preprocess(image_HWC, Rules(mean=(0, 0, 0), std=(1, 1, 1)))
    assert pixels_HWC.shape == (28, 28, 3)
    assert np.unique(pixels_HWC.reshape(-1, 3), axis=0).tolist() == [
        [1, 0, np.float32(0.2)]
    ]


# What is refused, and with which words


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jpg: no such file"):
        read_image(tmp_path / "absent.jpg")


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)


def test_a_device_is_not_waited_for():
    with pytest.raises(InputError, match="not a regular file"):
        read_image("/dev/zero")


def test_an_impossible_path_is_an_input_error():
    with pytest.raises(InputError, match="cannot be read"):
        read_image("a\0b.jpg")


def test_text_named_jpg_is_refused_without_showing_it(tmp_path):
    path = tmp_path / "letter.jpg"
    path.write_text("my secret letter")
    with pytest.raises(InputError, match=r"letter\.jpg: not an image.*JPEG") as caught:
        read_image(path)
    assert "secret" not in str(caught.value)


def test_zero_bytes_are_refused(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InputError, match=r"empty\.jpg: the file is empty"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(InputError, match="got 0 bytes"):
        read_image(b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.9])
def test_a_truncated_file_is_refused(tmp_path, kind, kept):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / "half"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match="half: .*(truncated|damaged)"):
        read_image(path)


def test_a_truncated_progressive_jpeg_is_refused():
    data = encoded(Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    with pytest.raises(InputError, match="truncated"):
        read_image(data[: len(data) * 9 // 10])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_raise_nothing_but_input_error():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "JPEG2000"):
        whole = encoded(Image.fromarray(noise(16, 16)), kind)
        for _ in range(40):
            damaged = bytearray(whole)
            for at in rng.integers(8, min(len(whole), 200), 6):
                damaged[at] = rng.integers(256)
            try:
                image_HWC = read_image(bytes(damaged), max_pixels=1 << 16)
            except InputError:
                continue
            assert image_HWC.dtype == np.uint8 and image_HWC.shape[2] == 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(9_500, 9_500), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_from_its_header(width, height):
    assert width * height > MAX_PIXELS
    # Decoding it would say "damaged": the pixels are not there.
    with pytest.raises(InputError, match="too large|at most 89,478,485"):
        read_image(png_claiming(width, height))


def test_a_side_that_would_blow_up_the_resize_is_refused():
    with pytest.raises(InputError, match="got 1 x 80000000 pixels.*65,535 a side"):
        read_image(png_claiming(1, 80_000_000))


def test_the_pixel_limit_is_a_parameter_and_leaves_pil_alone():
    before = Image.MAX_IMAGE_PIXELS
    image_HWC = noise(30, 40)
    data = encoded(Image.fromarray(image_HWC), "PNG")

    def refused(limit):
        try:
            return read_image(data, max_pixels=limit) is None
        except InputError as error:
            assert "got 40 x 30 pixels" in str(error)
            return True

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(refused, [1199, 1200] * 50))
    assert answers == [True, False] * 50
    assert before == Image.MAX_IMAGE_PIXELS
    for source in (image_HWC, Image.fromarray(image_HWC)):
        with pytest.raises(InputError, match="at most 1,199"):
            read_image(source, max_pixels=1199)


def test_postscript_is_never_handed_to_ghostscript(tmp_path):
    path = tmp_path / "program.eps"
    Image.fromarray(noise()).save(path, "EPS")
    with pytest.raises(InputError, match="not an image"):
        read_image(path)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((4, 4, 3), np.float32), "got float32; want uint8"),
        (np.zeros((4, 4, 5), np.uint8), r"got shape \[4, 4, 5\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got shape \[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got shape \[0, 4, 3\]"),
    ],
)
def test_an_array_that_is_no_image_is_refused(array, words):
    with pytest.raises(InputError, match=words):
        read_image(array)


def test_floating_point_and_32_bit_files_are_refused():
    floats = encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF")
    with pytest.raises(InputError, match="floating-point"):
        read_image(floats)
    large = encoded(Image.fromarray(np.full((3, 3), 70_000, np.int32)), "TIFF")
    with pytest.raises(InputError, match=r"outside 0\.\.65535"):
        read_image(large)


def test_another_type_is_refused():
    with pytest.raises(InputError, match="got list; want a path"):
        read_image([1, 2, 3])


# Preprocessing


def test_pixels_are_exactly_those_of_the_reference():
    """torchvision's Resize (on PIL), ToTensor and Normalize, written out in torch.

    The reference ran on a Pillow older than 13, which resized the width first.
    """
    rules = Rules()
    for height, width in ((50, 31), (28, 28), (9, 90), (300, 200)):
        image_HWC = noise(height, width)
        narrow = Image.fromarray(image_HWC).resize((28, height), Image.BICUBIC)
        resized = narrow.resize((28, 28), Image.BICUBIC)
        x_CHW = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        x_CHW = x_CHW.contiguous().to(torch.float32).div(255)
        mean_C11, std_C11 = (
            torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1)
            for values in (rules.mean, rules.std)
        )
        theirs_CHW = x_CHW.clone().sub_(mean_C11).div_(std_C11)
        ours_HWC = preprocess(image_HWC, rules)
        assert ours_HWC.dtype == np.float32
        np.testing.assert_array_equal(ours_HWC, theirs_CHW.permute(1, 2, 0).numpy())


def test_every_level_is_normalised_as_by_torch():
    levels_HWC = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    rules = Rules(image_size=16)
    x_HWC = torch.from_numpy(levels_HWC).to(torch.float32).div(255)
    theirs_HWC = x_HWC.sub(torch.tensor(rules.mean)).div(torch.tensor(rules.std))
    np.testing.assert_array_equal(preprocess(levels_HWC, rules), theirs_HWC.numpy())


def bicubic_weights(size_in: int, size_out: int) -> np.ndarray:
    """[out, in] weights of the cubic with a = -0.5, widened when shrinking."""
    scale = size_in / size_out
    centre_O1 = (np.arange(size_out)[:, None] + 0.5) * scale
    t_OI = np.abs(np.arange(size_in) + 0.5 - centre_O1) / max(scale, 1)
    near_OI = 1.5 * t_OI**3 - 2.5 * t_OI**2 + 1
    far_OI = -0.5 * t_OI**3 + 2.5 * t_OI**2 - 4 * t_OI + 2
    weights_OI = np.where(t_OI < 1, near_OI, np.where(t_OI < 2, far_OI, 0))
    return weights_OI / weights_OI.sum(axis=1, keepdims=True)


def test_the_resize_is_an_antialiased_cubic_rounded_after_each_pass_width_first():
    rules = Rules(mean=(0, 0, 0), std=(1, 1, 1))
    for height, width in ((75, 43), (190, 29), (11, 90), (13, 17)):
        image_HWC = noise(height, width)
        levels_HWC = np.rint(preprocess(image_HWC, rules) * 255)
        across_HWC = np.einsum("xw,hwc->hxc", bicubic_weights(width, 28), image_HWC)
        across_HWC = np.floor(across_HWC.clip(0, 255) + 0.5)
        want_HWC = np.einsum("yh,hxc->yxc", bicubic_weights(height, 28), across_HWC)
        off_HWC = np.abs(levels_HWC - np.floor(want_HWC.clip(0, 255) + 0.5))
        assert off_HWC.max() <= 1  # PIL's weights have 22 bits
        assert (off_HWC > 0).mean() < 0.01


def test_an_image_is_squashed_and_nothing_is_cropped():
    image_HWC = np.zeros((20, 200, 3), np.uint8)
    image_HWC[:, :50] = 255  # a left quarter stays a quarter
    pixels_HWC = preprocess(image_HWC, Rules(mean=(0, 0, 0), std=(1, 1, 1)))
    assert pixels_HWC[:, :6].min() == 1 and pixels_HWC[:, 8:].max() == 0


def test_an_unknown_resize_rule_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown resize rule 'bicubik'.*bicubic"):
        preprocess(noise(), Rules(resize="bicubik"))
