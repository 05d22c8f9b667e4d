"""What a run's trainables begin with: exactly those of `config.init`.

A work directory of train.py (or WORKDIR@STEP), a converted directory, a folder of a
connector, or a .pth of the reference, which `python -m convert trainables` reads (in a
clone, with torch).
"""

import logging
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from minigpt4_jax import checkpoint
from minigpt4_jax.errors import CheckpointError

logger = logging.getLogger(__name__)

PICKLES = (".pth", ".pt", ".bin")


def begin(
    params: Mapping[str, jax.Array], init: str, directory: Path, workdir: Path
) -> dict[str, jax.Array]:
    """The trainables of `init`, no more and no fewer than `params`, in their places.

    More would be lost: a work directory keeps its trainables alone, so with others under
    them in training `Generator.load` would put together another model than was trained.

    Args:
        directory: the converted directory with what is frozen.
        workdir: where what a .pth holds is written.

    Raises:
        CheckpointError: it cannot be read, or lists what is absent, unknown or misshapen.
    """
    path = Path(init).expanduser()
    if path.suffix in PICKLES:
        path = _converted(path, directory, workdir)
    else:
        path = checkpoint.resolve(init)
    try:
        found = checkpoint.read_arrays(path, {k: x.shape for k, x in params.items()})
    except CheckpointError as error:
        raise CheckpointError(
            f"config.init: want exactly what config.trainable names. {error}"
        ) from error
    logger.info("%d trainables from %s", len(found), init)
    return {
        name: jax.device_put(found[name].astype(x.dtype), x.sharding)
        for name, x in params.items()
    }


def _converted(path: Path, directory: Path, workdir: Path) -> Path:
    out = workdir / "init.safetensors"
    out.unlink(missing_ok=True)  # of a start that did not come far
    # A process of its own: the package neither imports the converter nor needs torch.
    command = [sys.executable, "-m", "convert", "trainables", str(path.absolute())]
    command += [f"--checkpoint={directory.absolute()}", f"--out={out}"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        said = re.split(r"\w+Error: ", done.stderr.strip())[-1] or "no message"
        raise CheckpointError(
            f"config.init: {path} cannot be read; .pth files need a clone of the "
            f"repository and its `convert` extra. The converter says: {said}"
        )
    return out
