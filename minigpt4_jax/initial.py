"""What a run's trainables begin with: exactly those of `config.init`.

A work directory of train.py (or WORKDIR@STEP), a converted directory, a folder of a
connector, or a .pth of the reference, which `python -m convert trainables` reads (in a
clone, with torch).
"""

import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from minigpt4_jax import checkpoint
from minigpt4_jax.errors import CheckpointError

logger = logging.getLogger(__name__)

PICKLES = (".pth", ".pt", ".bin")


def begin(
    params: Mapping[str, jax.Array], init: str, directory: Path
) -> dict[str, jax.Array]:
    """The trainables of `init`, no more and no fewer than `params`, in their places.

    More would be lost: a work directory keeps its trainables alone, so with others under
    them in training `Generator.load` would put together another model than was trained.

    Args:
        directory: the converted directory with what is frozen.

    Raises:
        CheckpointError: it cannot be read, or lists what is absent, unknown or misshapen.
    """
    wanted = {name: x.shape for name, x in params.items()}
    try:
        found = _read(init, wanted, directory)
    except CheckpointError as error:
        raise CheckpointError(
            f"config.init: want exactly what config.trainable names. {error}"
        ) from error
    logger.info("%d trainables from %s", len(found), init)
    return {
        name: jax.device_put(found[name].astype(x.dtype), x.sharding)
        for name, x in params.items()
    }


def _read(init: str, wanted: Mapping[str, tuple[int, ...]], directory: Path):
    path = Path(init).expanduser()
    if path.suffix not in PICKLES:
        return checkpoint.read_arrays(checkpoint.resolve(init), wanted)
    with tempfile.TemporaryDirectory() as folder:  # each process has its own
        out = Path(folder) / "init.safetensors"
        _convert(path, directory, out)
        return checkpoint.read_arrays(out, wanted)


def _convert(path: Path, directory: Path, out: Path) -> None:
    # A process of its own: the package neither imports the converter nor needs torch.
    command = [sys.executable, "-m", "convert", "trainables", str(path.absolute())]
    command += [f"--checkpoint={directory.absolute()}", f"--out={out}"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        said = re.split(r"\w+Error: ", done.stderr.strip())[-1] or "no message"
        raise CheckpointError(
            f"{path} cannot be read; .pth files need a clone of the repository and its "
            f"`convert` extra. The converter says: {said}"
        )
