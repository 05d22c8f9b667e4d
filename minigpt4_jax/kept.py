"""The checkpoints that a run keeps: each a folder that is whole, or named as damaged.

checkpoints/STEP/
    state/                  Orbax: trainables, optimizer, step
    position.json           where the data stood, and the seed
    trainables.safetensors  the trainables once more, as Generator.load reads them
    sha256.json             size and hash of every file above

A folder gets its number as its name when all of this is on disk. Names that begin with
a dot are of saves and removals that were cut short.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minigpt4_jax import storage
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.locate import CHECKPOINTS, FORMAT, check_format, kept_steps, sha256

HASHES = "sha256.json"
POSITION = "position.json"


def part(workdir: Path, step: int) -> Path:
    """Where the checkpoint of a step is made."""
    return workdir / CHECKPOINTS / f".{step}.part"


def seal(part: Path) -> None:
    """Write down size and hash of every file in a folder."""
    files = {
        file.relative_to(part).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256(file),
        }
        for file in sorted(part.rglob("*"))
        if file.is_file()
    }
    write_json(part / HASHES, {"files": files})


def commit(part: Path, folder: Path) -> None:
    """Give a sealed folder the number of its step as a name."""
    if folder.exists():  # of a save that one process committed and another gave up
        _remove(folder)
    storage.replace(part, folder)


def check(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raise CheckpointError unless these files (default: all) are as they were written.

    The error lists them and offers the checkpoint before.
    """
    try:
        listed = json.loads((folder / HASHES).read_text())
        check_format(folder / HASHES, listed["format"])
        wanted = {
            name: listed["files"][name]
            for name in (listed["files"] if names is None else names)
        }
        found = [_damage(folder, name, about) for name, about in wanted.items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = [f"{HASHES}: absent or damaged ({error!r})"]
    if damaged := [text for text in found if text]:
        listing = "\n  ".join(damaged)
        raise CheckpointError(f"{folder} is damaged; {way_on(folder)}:\n  {listing}")


def way_on(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    step = int(folder.name)
    others = [s for s in kept_steps(folder.parent.parent) if s != step]
    if before := [s for s in others if s < step]:
        return f"delete it to go on from step {before[-1]}"
    if others:
        return f"delete it; steps {', '.join(map(str, others))} are kept too"
    return "there is no other: delete it to begin again at step 0"


def read_position(folder: Path) -> Any:
    """The `position` that was saved with a checkpoint."""
    check(folder, [POSITION])
    return json.loads((folder / POSITION).read_text())["position"]


def prune(workdir: Path, last: int, every: int) -> None:
    """Remove all checkpoints but the newest `last`, and multiples of `every` (0: none)."""
    for step in kept_steps(workdir)[:-last]:
        if not every or step % every:
            _remove(workdir / CHECKPOINTS / str(step))


def clean(workdir: Path) -> None:
    """Remove what was left by saves and removals that were cut short."""
    for path in (workdir / CHECKPOINTS).glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file of our format, there as a whole or as it was before."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps({"format": FORMAT, **values}, indent=1) + "\n")
    storage.replace(unfinished, path)


def _damage(folder: Path, name: str, about: dict[str, Any]) -> str:
    """What is wrong with a file, or ""."""
    file = folder / name
    if not file.is_file():
        return f"{name}: absent"
    if (size := file.stat().st_size) != about["bytes"]:
        return f"{name}: {size} bytes, want {about['bytes']}"
    if (found := sha256(file)) != about["sha256"]:
        return f"{name}: sha256 is {found[:16]}..., want {about['sha256'][:16]}..."
    return ""


def _remove(folder: Path) -> None:
    # Renamed first: a kill in the middle of this must not leave half a checkpoint.
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden)
