"""The benchmark of the demo: files that fit together, and answers of one model alone."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import demo_scores
from minigpt4_jax import locate, storage
from minigpt4_jax.data.sources import list_images
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.evaluation.captions import read_pairs
from tests import training


def test_each_model_has_its_own_file_of_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path))
    demo = locate.demo_directory(locate.ASSETS)
    demo.mkdir()
    assert demo_scores.answers_name("demo") == f"answers-{demo.name}.jsonl"
    run = tmp_path / "stage2"
    run.mkdir()
    monkeypatch.chdir(run)
    found = set()
    for value in (1, 2):
        storage.save_trainables(run, {"projector/bias": np.full(3, value, np.float32)})
        name = demo_scores.answers_name(".")
        digest = locate.sha256(run / locate.TRAINABLES)[:16]
        assert name == f"answers-stage2-{digest}.jsonl"
        found.add(name)
    assert len(found) == 2
    with pytest.raises(CheckpointError, match="did you mean 'demo'"):
        demo_scores.answers_name("demmo")


def test_a_folder_that_is_kept_never_gives_one_model_the_answers_of_another(
    tmp_path, monkeypatch, capsys
):
    training.write_shard(tmp_path / "data/test/0.tar", range(2))
    says = {"one": "A dog runs on grass.", "two": "One man outside."}
    flags = dict(data=str(tmp_path / "data"), split="test", limit=None, prompt="Hm?")

    def answer(command):
        given = dict(zip(command[3::2], command[4::2]))
        text = says[Path(given["--checkpoint"]).name]
        with open(given["--out"], "x") as file:
            for photo in sorted(Path(given["--images"]).iterdir()):
                file.write(json.dumps({"image": photo.name, "answer": text}) + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo_scores.subprocess, "run", answer)
    tables = []
    for name in says:
        (tmp_path / name).mkdir()
        given = dict(flags, checkpoint=str(tmp_path / name), out=str(tmp_path / "out"))
        stub = SimpleNamespace(FLAGS=SimpleNamespace(**given))
        monkeypatch.setattr(demo_scores, "flags", stub)
        assert demo_scores.main(["demo_scores"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] != tables[1]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 there")
def test_a_photo_whose_key_is_not_utf_8_meets_its_captions(tmp_path):
    key = os.fsdecode(b"caf\xe9")
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        fields = json.dumps({"captions": ["A."]}).encode()
        for suffix, content in ((".jpg", training.jpeg(0)), (".json", fields)):
            info = tarfile.TarInfo(key + suffix)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    photos, captions = demo_scores.unpack(tmp_path, tmp_path / "out", None)
    (record,) = list_images(photos)
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"image": record.name, "answer": "B."}))
    assert record.name == f"00000-{key}.jpg"
    assert read_pairs(answers, captions) == (["B."], [["A."]])
