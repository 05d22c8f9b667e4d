"""Errors a user can act on, and the wrapper that turns them into one sentence.

Exit codes of every command:

    0    done
    1    the system refused (file not writable, disk full), a plan does not fit, or a bug,
         with its traceback
    2    InputError: a flag, an image or a prompt is wrong
    3    ConfigError: a preset or a knob of a config is wrong
    4    CheckpointError: a model directory or a checkpoint cannot be used
    5    DataError: a data set cannot be used
    75   ClusterError: a training stands still, or lost one of its processes: start it again
    130  interrupted
    143  training ended by SIGTERM, saved and ready to go on
"""

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn


class MiniGPT4Error(Exception):
    """Base of all errors below: the message says what came, what was wanted, what to do."""

    exit_code = 1


class InputError(MiniGPT4Error, ValueError):
    """A flag, image, prompt or request cannot be used as given."""

    exit_code = 2


class ConfigError(MiniGPT4Error, ValueError):
    """A preset or a config names something unknown or contradicts itself."""

    exit_code = 3


class CheckpointError(MiniGPT4Error, RuntimeError):
    """A converted directory or a training checkpoint is absent, damaged or not ours."""

    exit_code = 4


class DataError(MiniGPT4Error, RuntimeError):
    """A training or evaluation set is damaged or empty."""

    exit_code = 5


class ClusterError(MiniGPT4Error, RuntimeError):
    """A process of a run did not come, is gone or stands still; a new start may help."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a list: nearest name first, then all."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(names) or 'none'}"


def run(
    main: Callable[[list[str]], int | None],
    argv: Sequence[str] | None = None,
    define: Callable[[], None] | None = None,
    page: str = "",
) -> NoReturn:
    """Parse absl flags, call `main` with what is left of argv, and exit.

    Errors of this file, wrong flags and refusals of the system become one sentence on
    stderr and an exit code; `--debug` adds the traceback. Other exceptions are bugs and
    pass through. Logs of this project go to stderr from level INFO, others from WARNING.

    Args:
        main: gets the program's name and the positional arguments; may return a code.
        argv: program name and arguments; default `sys.argv`.
        define: defines the flags; for a config with a default file, which reads argv
            as soon as it is defined.
        page: what --help prints; without it, absl's list of flags.
    """
    argv = list(sys.argv if argv is None else argv)
    _log_to_stderr()
    try:
        if page and _asks_for_help(argv):
            print(page)
            code = 0
        else:
            code = main(_parse(argv, define)) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the flush at exit complains
        code = 0
    except (KeyboardInterrupt, MiniGPT4Error, OSError) as error:
        code = say(error, argv)
    sys.exit(code)


def say(error: BaseException, argv: Sequence[str]) -> int:
    """Print an error to stderr as `run` does, a bug's traceback; return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        sentence, code = "interrupted", 130
    elif isinstance(error, MiniGPT4Error):
        sentence, code = f"{type(error).__name__}: {error}", error.exit_code
    else:
        sentence, code = str(error) if isinstance(error, OSError) else "", 1
    if not sentence or "--debug" in argv:
        traceback.print_exception(error)
    if sentence:
        print(sentence, file=sys.stderr)
    return code


def _asks_for_help(argv: list[str]) -> bool:
    words = argv[1 : argv.index("--") if "--" in argv else None]
    return any(word in ("--help", "-help", "-h") for word in words)


def _parse(argv: list[str], define: Callable[[], None] | None) -> list[str]:
    """Parse flags, those of ml_collections included; return the positional arguments."""
    from absl import app, flags  # here: a library user needs no flags

    app.define_help_flags()
    if "debug" not in flags.FLAGS:
        flags.DEFINE_bool("debug", False, "Print the traceback of an error.")
    others = set(flags.FLAGS) if define else set()
    before, sys.argv = sys.argv, argv  # config_flags looks for --config.x in sys.argv
    try:
        if define is not None:
            define()
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:  # a config file that did not load raises when touched
            getattr(flags.FLAGS[name].value, "lock", None)
        return rest
    except flags.UnrecognizedFlagError as error:
        name = error.flagname.partition(".")[0]  # of --confg.batch_size
        known = [f"--{flag}" for flag in set(flags.FLAGS) - others | {"debug"}]
        sentence = unknown("flag", f"--{name}", known)
        raise InputError(f"{sentence} (--help tells what they do)") from error
    except flags.Error as error:
        raise InputError(f"{error} (--help lists the flags)") from error
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # What ml_collections raises for a knob or a file that is not there: several
        # lines, and quoted twice.
        text = str(error).strip("'").replace("\\'", "'").replace("\\n", "; ")
        raise ConfigError(f"config: {' '.join(text.split())}") from error
    finally:
        sys.argv = before


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("minigpt4_jax", "convert", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
