"""python -m convert COMMAND: writes model directories; `--help` after a command.

model       a MiniGPT-4 from published files
vicuna      base LLaMA + delta as a Hugging Face folder
demo        the demo model, from two installed packages and the shipped connector
export      the reference's own files, from a converted directory or a training run
trainables  what a checkpoint of the reference trained, for a run here to begin with
config      a train or eval config of the reference, as one of ours
doctor      what files are, what fits with what, whether a directory behaves
connector   the files that ship, from a work directory
"""

import importlib
import sys

from absl import flags

from minigpt4_jax import errors

COMMANDS = tuple("config connector demo doctor export model trainables vicuna".split())


def main() -> None:
    """Run the command that the first argument names."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("", "help", "--help", "-h"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        print(errors.unknown("command", name, COMMANDS), file=sys.stderr)
        sys.exit(errors.InputError.exit_code)
    module = importlib.import_module(f"convert.{name}")
    module.define_flags()
    flags.adopt_module_key_flags(module)  # for --help
    errors.run(module.main, [sys.argv[0], *map(underscored, rest)])


def underscored(argument: str) -> str:
    """`--no-connector=x-y` as absl wants it: `--no_connector=x-y`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


if __name__ == "__main__":
    main()
