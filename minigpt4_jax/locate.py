"""Which directory a model's name means; needs no weights and imports no jax.

The demo's directory is called after a fingerprint of all that it is made from, so that
a changed source, connector, preset or rule of the converter is another directory.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import CheckpointError, unknown

FORMAT = 1  # of every JSON and safetensors file that we write
INDEX = "model.safetensors.index.json"
TRAINABLES = "trainables.safetensors"
CHECKPOINTS = "checkpoints"  # folder in a work directory; in it a folder for each step
RUN_ADVICE = "restore it from a copy, or begin in a new --workdir"
ASSETS = Path(__file__).parent / "assets/demo"
DEMO, FROZEN = "demo", "demo-frozen"
COMMANDS = {
    DEMO: "`make demo`, or `python -m convert demo` in a clone",
    FROZEN: "`python -m convert demo --no-connector` in a clone",
}


def resolve(name_or_path: str | Path) -> Path:
    """The directory of "demo", "demo-frozen" (without connector), or of a path.

    "WORKDIR@STEP" is the checkpoint of that step, while the run keeps it.

    Raises CheckpointError, with the command to run, when it does not exist.
    """
    name = str(name_or_path)
    if name in COMMANDS:
        directory = demo_directory(ASSETS if name == DEMO else None)
        if not directory.is_dir():
            raise CheckpointError(
                f"the model {name!r} is not at {directory}; {COMMANDS[name]} makes it"
            )
        return directory
    path = Path(name_or_path)
    if not path.exists():
        if found := _checkpoint(name):
            return found
        hint = "" if os.sep in name else unknown("model", name, COMMANDS) + "; "
        raise CheckpointError(
            f"{hint}no directory at {path}; want one made by `python -m convert`, or a "
            "training work directory"
        )
    return path


def base_directory(path: str | Path) -> Path:
    """The converted directory itself, or the one of a work directory or checkpoint."""
    path = Path(path)
    if is_checkpoint(path):
        path = path.parent.parent
    if not path.is_dir():
        raise CheckpointError(
            f"no model directory at {path}; `python -m convert` makes one, training "
            "makes another"
        )
    if not (path / "preset.json").exists() and (path / "config.json").exists():
        run = read_json(path / "config.json", RUN_ADVICE)
        if "checkpoint" in run:
            return base_directory(_found_again(Path(str(run["checkpoint"])), path))
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether it is a folder WORKDIR/checkpoints/STEP."""
    workdir = path.parent.parent
    return path.parent.name == CHECKPOINTS and (workdir / "config.json").exists()


def kept_steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints a run keeps, oldest first."""
    folder = workdir / CHECKPOINTS
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def _checkpoint(name: str) -> Path | None:
    """WORKDIR/checkpoints/STEP of "WORKDIR@STEP"; None for all other names."""
    before, at, step = name.rpartition("@")
    workdir = Path(before)
    if not at or not (workdir / "config.json").exists():
        return None
    kept = kept_steps(workdir)
    if not step.isdecimal() or int(step) not in kept:
        raise CheckpointError(
            f"{workdir} keeps no step {step!r}; kept: "
            f"{', '.join(map(str, kept)) or 'none'} (config.keep says which)"
        )
    return workdir / CHECKPOINTS / str(int(step))


def _found_again(base: Path, workdir: Path) -> Path:
    """The model that a run names, or its namesake in the cache folder of today."""
    if base.is_dir():
        return base
    # A name with a fingerprint means the same model wherever it lies; no other does.
    cached = cache_root() / base.name
    if re.fullmatch(r".+-[0-9a-f]{16}", base.name) and cached.is_dir():
        return cached
    made = {demo_directory(ASSETS): DEMO, demo_directory(None): FROZEN}.get(cached)
    advice = f"{COMMANDS[made]} makes it" if made else "put it back or convert it there"
    raise CheckpointError(
        f"{workdir} was trained with the model {base}, which is no directory; {advice}"
    )


def trainable_files(path: Path) -> list[Path]:
    """The .safetensors files of a file, a work directory, one of its checkpoints or a
    folder of a connector."""
    if path.is_file():
        return [path]
    if (path / TRAINABLES).exists():
        return [path / TRAINABLES]
    files = sorted(path.glob("connector*.safetensors"))
    if not files:
        raise CheckpointError(
            f"no {TRAINABLES} and no connector*.safetensors in {path}; train first, or "
            "name the file"
        )
    return files


def demo_directory(connector: Path | None) -> Path:
    """Where the demo with this connector (file or folder; None: none) is kept."""
    name = FROZEN if connector is None else DEMO
    return cache_root() / f"{name}-{demo_fingerprint(connector)}"


def demo_fingerprint(connector: Path | None) -> str:
    """16 hex digits of all that the converted demo depends on."""
    pins = demo_pins()
    parts = {
        "format": FORMAT,
        "sources": [source["sha256"] for source in pins["sources"]],
        "preset": pins["preset"],
        "rules": pins["rules"],
        "connector": connector and [sha256(f) for f in trainable_files(connector)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def demo_pins() -> dict[str, Any]:
    """assets/demo/demo.json: the demo's sources and terms, digests of preset and rules."""
    return read_json(ASSETS / "demo.json")


def cache_root() -> Path:
    """$MINIGPT4_JAX_CACHE, or `minigpt4_jax` in the user's cache folder."""
    if own := os.environ.get("MINIGPT4_JAX_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        folder = Path.home() / "Library/Caches"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"))
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "minigpt4_jax"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, advice: str = "convert it again") -> dict[str, Any]:
    """A JSON object of the format we know, without its `format` key.

    Raises CheckpointError, which says what to do (`advice`) where it is damaged.
    """
    try:
        values = json.loads(path.read_text())
        found = values.pop("format")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is not complete: {path.name} is absent; {advice}"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); {advice}") from error
    check_format(path, found)
    return values


def check_format(path: Path, found: object) -> None:
    """Raise CheckpointError for a file of another format, as a later version writes."""
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: got format {found!r}, this version reads {FORMAT}; update "
            "minigpt4_jax, or convert the model again with this version"
        )
