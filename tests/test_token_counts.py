"""Lengths of captions: right, kept, and never those of another tokenizer or cleaning."""

import numpy as np
import pytest

from minigpt4_jax.data import token_counts, workers
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.data.tokens import ByteLevelTokenizer
from tests import tiny
from tests.errands import mumble, shout
from tests.shards import photo, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def examples(tmp_path):
    members = photo("0", "A dog.", "A brown dog runs.") + photo("1", "Cats!")
    members += photo("2", "<|im_end|> is text here.", "B.", "C c c.")
    write_tar(tmp_path / "data/a.tar", members)
    return open_data(tmp_path / "data")


def tokenizer(ending: str = "") -> ByteLevelTokenizer:
    """The tiny one; a file with another ending is another file."""
    return ByteLevelTokenizer(tiny.tokenizer_json() + ending, bos_id=0, eos_ids=[2])


def test_every_caption_is_counted_at_its_place(examples):
    starts, counts = examples.token_counts(tokenizer())
    assert (starts.dtype, counts.dtype) == (np.int64, np.int32)
    assert starts.tolist() == [0, 2, 3, 6]
    assert counts.tolist() == [
        len(tokenizer().encode(text))
        for example in examples
        for text in example.captions
    ]
    _, cleaned = examples.token_counts(tokenizer(), shout)
    assert cleaned.tolist() == [
        len(tokenizer().encode(shout(text)))
        for example in examples
        for text in example.captions
    ]
    assert cleaned.tolist() != counts.tolist()


def test_counts_are_kept_by_tokenizer_and_cleaning(examples, tmp_path, monkeypatch):
    first = (
        examples.token_counts(tokenizer()),
        examples.token_counts(tokenizer(), shout),
    )

    def fail(*_):
        raise AssertionError("counted again")

    monkeypatch.setattr(token_counts, "_count", fail)
    again = open_data(tmp_path / "data")
    for clean, want in zip((None, shout), first):
        for got, expected in zip(again.token_counts(tokenizer(), clean), want):
            np.testing.assert_array_equal(got, expected)
    with pytest.raises(AssertionError, match="counted again"):
        again.token_counts(tokenizer("\n"))
    with pytest.raises(AssertionError, match="counted again"):
        again.token_counts(tokenizer(), mumble)


def test_a_damaged_file_of_counts_is_counted_anew(examples):
    want = examples.token_counts(tokenizer())[1].tolist()
    (path,) = examples._index.folder.glob("*.counts.npy")
    path.write_bytes(path.read_bytes()[:-4])
    assert examples.token_counts(tokenizer())[1].tolist() == want
    path.unlink()
    assert examples.token_counts(tokenizer())[1].tolist() == want


def test_counts_of_a_read_only_index_are_kept_in_the_cache(examples, monkeypatch):
    write, refused = token_counts._write, []

    def write_elsewhere(place, *rest):
        if place == examples._index.folder:
            refused.append(place)
            raise PermissionError(place)
        write(place, *rest)

    monkeypatch.setattr(token_counts, "_write", write_elsewhere)
    want = examples.token_counts(tokenizer())[1].tolist()
    monkeypatch.setattr(token_counts, "_count", None)
    assert examples.token_counts(tokenizer())[1].tolist() == want
    assert len(refused) == 1 and not list(examples._index.folder.glob("*.npy"))


def test_several_processes_count_the_same(examples, monkeypatch):
    want = [values.tolist() for values in examples.token_counts(tokenizer(), shout)]
    monkeypatch.setattr(workers, "available", lambda: 2)
    monkeypatch.setattr(token_counts, "MANY", 0)
    monkeypatch.setattr(token_counts, "AT_ONCE", 2)
    found = token_counts._count(examples._index, tokenizer(), shout)
    assert [values.tolist() for values in found] == want
