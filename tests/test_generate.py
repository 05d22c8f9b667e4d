"""The batch command: a line for every input, and a rerun that skips what is answered."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import tiny
from ml_collections import ConfigDict

from minigpt4_jax import generate
from minigpt4_jax.data.images import read_image
from minigpt4_jax.data.sources import list_images
from minigpt4_jax.errors import InputError
from minigpt4_jax.evaluation.captions import read_pairs
from minigpt4_jax.generator import Generator
from minigpt4_jax.request import Event, Usage

ROOT = Path(__file__).parent.parent
CFG = ConfigDict(
    dict(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        no_repeat_ngram=0,
        min_tokens=0,
        max_tokens=8,
        num_beams=1,
        length_penalty=1.0,
        early_stopping=False,
        banned_ids=(),
        stop_ids=(),
        stop=(),
        seed=0,
        compat="",
        batch_size=2,
        chunk=3,
        dtype="",
    )
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three photos and one file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        PIL.Image.fromarray(tiny.image(i)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"not a photo")
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_input_gets_a_line_with_its_answer_or_error(photos):
    gen = Generator(tiny.model(), tiny.tokenizer(), batch_size=2, chunk=3)
    tasks = [(record, "Hm?") for record in list_images(photos)]
    lines = {line["image"]: (line, n) for line, n in generate.answers(gen, tasks, CFG)}
    assert sorted(lines) == ["0.png", "1.png", "2.png", "broken.jpg"]
    assert set(lines["0.png"][0]) == {"image", "prompt", "answer", "finish_reason"}
    assert 0 < lines["0.png"][1] <= 8
    assert set(lines["broken.jpg"][0]) == {"image", "prompt", "error"}
    assert "broken.jpg" in lines["broken.jpg"][0]["error"]


def test_a_rerun_answers_what_has_no_answer_yet(photos, tmp_path, capfd, caplog):
    caplog.set_level("INFO")
    model, out = tiny.save(tmp_path / "tiny"), tmp_path / "new/answers.jsonl"
    generate.generate(str(model), str(photos), "Hm?", out, CFG)
    assert "3 answers, 1 errors" in caplog.text
    printed = capfd.readouterr()
    assert printed.out == "" and "4/4" in printed.err
    first = read(out)
    assert len(first) == 4
    answers = {line["image"]: line.get("answer") for line in first}
    assert answers["broken.jpg"] is None

    # One answer lost in the middle of its line; the broken photo repaired meanwhile.
    kept = [json.dumps(line) for line in first if line["image"] != "1.png"]
    lost = json.dumps({"image": "1.png", "prompt": "Hm?"})[:9]
    out.write_text("\n".join([*kept, lost]))
    repaired = tmp_path / "repaired"
    shutil.copytree(photos, repaired)
    PIL.Image.fromarray(tiny.image(7)).save(repaired / "broken.jpg", "PNG")
    generate.generate(str(model), str(repaired), "Hm?", out, CFG)
    assert "4 images, 2 answered before" in caplog.text
    second = {line["image"]: line["answer"] for line in read(out)}
    assert len(read(out)) == 4
    assert second.pop("broken.jpg")
    assert second == {name: answers[name] for name in second}

    generate.generate("no such model", str(repaired), "Hm?", out, CFG)  # nothing to do
    assert len(read(out)) == 4


class Parrot:
    """Answers about images that it can read, without a model."""

    def submit(self, requests):
        for request in requests:
            read_image(*request.messages[0].images)
            usage = Usage(prompt_tokens=1, answer_tokens=2)
            yield Event(request.id, piece="A é.", finish_reason="stop", usage=usage)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 there")
def test_a_photo_whose_name_is_not_utf_8_is_answered_once_and_scored(
    photos, tmp_path, monkeypatch
):
    folder, out = tmp_path / "photos", tmp_path / "answers.jsonl"
    folder.mkdir()
    odd = os.fsdecode(b"caf\xe9.png")
    for name in (odd, "café.png"):
        shutil.copy(photos / "0.png", folder / name)
    monkeypatch.setattr(Generator, "load", lambda *_, **__: Parrot())
    generate.generate("tiny", str(folder), "Hm?", out, CFG)
    assert {line["image"]: line["answer"] for line in read(out)} == {
        odd: "A é.",
        "café.png": "A é.",
    }
    monkeypatch.setattr(Generator, "load", None)  # not reached: nothing to do
    generate.generate("tiny", str(folder), "Hm?", out, CFG)
    references = tmp_path / "captions.jsonl"
    lines = [{"image": name, "captions": ["A."]} for name in (odd, "café.png")]
    references.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_pairs(out, references) == (["A é.", "A é."], [["A."], ["A."]])


def test_neither_prompts_nor_images_are_logged(photos, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG", "minigpt4_jax")
    model, images = tiny.save(tmp_path / "tiny"), tmp_path / "list.jsonl"
    lines = [{"image": str(photos / name)} for name in ("0.png", "broken.jpg")]
    lines[1]["prompt"] = "WHY?"
    images.write_text("".join(json.dumps(line) + "\n" for line in lines))
    generate.generate(str(model), str(images), "WHO?", tmp_path / "out.jsonl", CFG)
    said = caplog.text + "".join(capfd.readouterr())
    assert "1 answers, 1 errors" in said
    for word in ("WHO?", "WHY?", "0.png", "broken.jpg"):
        assert word not in said


def command(*arguments: str):
    return subprocess.run(
        [sys.executable, "-m", "minigpt4_jax.generate", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--images=.", "--out=x", "--config.temperatur=1"], 3, "temperatur"),
        (["--images=nowhere", "--out=x"], 2, "nowhere"),
        (["--out=x"], 2, "--images"),
    ],
)
def test_wrong_flags_are_one_sentence_and_an_exit_code(arguments, code, word):
    result = command(*arguments)
    assert result.returncode == code, result.stderr
    assert word in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_knobs_of_a_beam_search_reach_every_request(photos):
    asked = []

    class Recorder:
        def submit(self, requests):
            asked.extend(requests)
            return iter(())

    searched = dict(num_beams=4, length_penalty=0.5, early_stopping=True)
    cfg = ConfigDict({**CFG, **searched})
    tasks = [(record, "Hm?") for record in list_images(photos)]
    assert list(generate.answers(Recorder(), tasks, cfg)) == []
    assert len(asked) == 4
    for request in asked:
        assert {name: getattr(request.sampling, name) for name in searched} == searched


def test_an_input_listed_twice_gets_two_lines(tmp_path):
    out = tmp_path / "answers.jsonl"
    line = {"image": "a.png", "prompt": "Hm?", "answer": "x", "finish_reason": "stop"}
    out.write_text(json.dumps(line) + "\n")
    answered = generate.keep_answered(out)
    key = ("a.png", "Hm?")
    assert [generate._take(answered, key) for _ in range(3)] == [True, False, False]
    assert not generate._take(answered, ("a.png", "Why?"))


@pytest.mark.parametrize(
    "text, line",
    [
        ("my notes\nmore\n", 1),
        ('{"my": "config"}', 1),
        ('{"image": "a.png", "prompt": "Hm?"}', 1),
        ('{"image": "a.png", "prompt": "Hm?"}\n{"image": "b.png"}\n', 1),
        ('{"image": "a.png", "prompt": "Hm?", "error": ""}\n{"image": "b.png", "w', 2),
        ('{"image": 7, "prompt": "Hm?", "answer": ""}\n', 1),
        ("[" * 100_000, 1),
    ],
)
def test_a_file_of_the_users_is_not_overwritten(tmp_path, text, line):
    out = tmp_path / "mine.jsonl"
    out.write_text(text)
    with pytest.raises(InputError, match=rf"mine.jsonl, line {line}: .* --out"):
        generate.keep_answered(out)
    assert out.read_text() == text


def test_the_list_of_images_is_no_place_for_the_answers(tmp_path):
    images = tmp_path / "list.jsonl"
    text = json.dumps({"image": "a.png", "prompt": "Hm?", "answer": "A cat."}) + "\n"
    images.write_text(text)
    (tmp_path / "link.jsonl").symlink_to(images)
    with pytest.raises(InputError, match="--out and --images are one file"):
        generate.generate("no", str(images), "", tmp_path / "link.jsonl", CFG)
    assert images.read_text() == text


@pytest.mark.parametrize("last", ["answer", "error"])
def test_a_line_cut_short_anywhere_is_dropped_and_nothing_else(tmp_path, last):
    line = {"image": 'a "b": "c.png', "prompt": "two\\\nlines é", last: "so"}
    line |= {"finish_reason": "stop"} if last == "answer" else {}
    whole = json.dumps(line, ensure_ascii=False).encode()
    first = json.dumps({"image": "z", "prompt": "", "answer": ""}) + "\n"
    out = tmp_path / "answers.jsonl"
    for end in range(len(whole)):
        out.write_bytes(first.encode() + whole[:end])
        assert generate.keep_answered(out) == {("z", ""): 1}
        assert out.read_text() == first
