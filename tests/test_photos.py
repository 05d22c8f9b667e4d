"""Photos as the model and the page see them, and the examples."""

import io
import os

import numpy as np
import PIL.Image
import pytest
import tiny

from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.errors import InputError
from minigpt4_jax.serving import photos
from minigpt4_jax.serving.photos import Album, examples

RULES = tiny.CONFIG.vit


@pytest.fixture
def album(tmp_path):
    return Album(RULES, tmp_path)


def saved(path, image_HWC, **how):
    PIL.Image.fromarray(image_HWC).save(path, **how)
    return path


def test_the_model_sees_exactly_the_pixels_of_the_original(album, tmp_path):
    path = saved(tmp_path / "a.png", tiny.image(3).repeat(100, axis=0))
    squashed = album.read(path).squashed_HWC
    np.testing.assert_array_equal(
        preprocess(squashed, RULES), preprocess(read_image(path), RULES)
    )


def test_the_page_gets_a_small_jpeg_without_where_it_was_taken(album, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0110] = "a camera of mine"
    path = saved(
        tmp_path / "a.jpg", np.zeros((900, 1600, 3), np.uint8), exif=exif.tobytes()
    )
    assert b"a camera of mine" in path.read_bytes()
    with PIL.Image.open(album.read(path).shown) as shown:
        assert shown.size == (768, 432) and shown.format == "JPEG"
        assert not shown.getexif()


def test_equal_files_are_one_photo_and_others_are_not(album, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, seed in zip(paths, (0, 0, 1)):
        saved(path, tiny.image(seed))
    a, b, c = map(album.read, paths)
    assert (a.key, a.shown) == (b.key, b.shown)
    assert c.key != a.key and c.shown != a.shown


def test_a_broken_file_is_named_as_an_image_and_not_by_its_path(album, tmp_path):
    path = tmp_path / "secret-name.jpg"
    path.write_bytes(b"no image at all")
    with pytest.raises(InputError, match="^image: not an image, or damaged") as error:
        album.read(path)
    assert str(tmp_path) not in str(error.value)


def test_a_photo_that_has_gone_is_told_without_its_path(album, tmp_path):
    with pytest.raises(InputError, match="^The photo is not there any more") as error:
        album.read(tmp_path / "gone.png")
    assert str(tmp_path) not in str(error.value)


def test_a_copy_is_whole_or_absent_and_young_when_it_is_used(
    album, tmp_path, monkeypatch
):
    path = saved(tmp_path / "a.png", tiny.image(0))
    save = PIL.Image.Image.save

    def broken(image, file, *form, **how):
        save(image, file, *form, **how)
        raise OSError("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(PIL.Image.Image, "save", broken)
        with pytest.raises(OSError):
            album.read(path)
    assert not list(tmp_path.glob("*.jpg"))
    shown = album.read(path).shown
    os.utime(shown, (1, 1))
    assert album.read(path).shown == shown and os.stat(shown).st_mtime > 1


def test_a_photo_of_too_many_pixels_is_refused_from_its_header(album, tmp_path):
    file = io.BytesIO()
    PIL.Image.new("1", (9000, 9000)).save(file, "PNG")
    path = tmp_path / "huge.png"
    path.write_bytes(file.getvalue())
    with pytest.raises(InputError, match="want at most 50,000,000"):
        album.read(path)


def test_each_example_has_a_question_an_author_and_a_licence():
    found = examples()
    assert {e.name + ".jpg" for e in found} == {
        path.name for path in photos.FOLDER.glob("*.jpg")
    }
    for example in found:
        assert example.question.endswith(("?", "."))
        assert "CC" in example.credit and ("Flickr" in example.credit) == (
            example.name != "cat"
        )
