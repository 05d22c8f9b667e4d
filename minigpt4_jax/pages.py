"""Flags and help of every command, as data: what is shown without importing a command.

A command's flags are defined from its page, and its help is written from it.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from absl import flags

from minigpt4_jax import errors

WIDTH = 80  # columns of a help page


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag: its name, what the help calls its value ("" of a switch), what it does."""

    name: str
    value: str
    about: str
    default: object = None
    kind: Callable = flags.DEFINE_string

    def define(self) -> None:
        self.kind(self.name, self.default, help=self.about)


@dataclasses.dataclass(frozen=True)
class Page:
    """A command, or a group of them (`parts`).

    Attributes:
        name: what is typed: "minigpt4-jax data check".
        about: one sentence.
        usage: what follows the name.
        target: "module:function"; gets the name and the positional arguments.
        body: paragraphs, wrapped anew; those of a group come last.
        extra: of setup.py, where the command needs more than a plain install has.
    """

    name: str
    about: str
    usage: str
    target: str = ""
    body: str = ""
    takes: tuple[Flag, ...] = ()
    parts: "tuple[Page, ...]" = ()
    examples: tuple[str, ...] = ()
    extra: str = ""

    def run(
        self,
        main: Callable[[list[str]], int | None],
        argv: Sequence[str] | None = None,
    ) -> NoReturn:
        """`errors.run` with these flags, and with this page for --help."""
        errors.run(main, argv, self.define, self.text())

    def define(self) -> None:
        """Define the flags; not at import, where two commands' names would collide."""
        for flag in self.takes:
            flag.define()

    def text(self) -> str:
        """The help page."""
        rows = [(page.name.split()[-1], page.summary) for page in self.parts]
        rows += [(f"--{f.name} {f.value}", f.about) for f in self.takes]
        if self.target:
            rows.append(("--debug", "print the traceback of an error"))
        paragraphs = [
            textwrap.fill(" ".join(part.split()), WIDTH, break_on_hyphens=False)
            for part in self.body.split("\n\n")
        ]
        above, below = ([], paragraphs) if self.parts else (paragraphs, [])
        examples = "\n  ".join(["Examples:", *self.examples])
        usage = f"Usage: {self.name} {self.usage}"
        return "\n\n".join([self.about, usage, *above, _table(rows), examples, *below])

    @property
    def summary(self) -> str:
        """Its sentence as a row of a list."""
        return self.about[0].lower() + self.about[1:].rstrip(".")


def _table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, the second one wrapped."""
    indent = 4 + max(len(left.rstrip()) for left, _ in rows)
    lines = []
    for left, right in rows:
        lines += textwrap.wrap(
            right,
            WIDTH,
            initial_indent=f"  {left}".ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _define_config(name: str, default: str | None, help: str) -> None:
    from ml_collections import config_flags  # a tenth of a second that help can spare

    config_flags.DEFINE_config_file(name, default, help_string=help)


def _knobs(command: str, example: str) -> Flag:
    """--config of a command whose default is the clone's configs/COMMAND.py."""
    clone = Path(__file__).parent.parent / "configs" / f"{command}.py"
    return Flag(
        "config",
        "FILE",
        f"knobs (default: those of configs/{command}.py); --config.{example} and the "
        "like change one",
        str(clone) if clone.exists() else None,
        _define_config,
    )


PROMPT = "Describe this image in one sentence."
CHECKPOINT = Flag(
    "checkpoint",
    "MODEL",
    "demo (the default), a converted directory, or the work directory of a training",
    "demo",
)
RUN = Flag(
    "config",
    "FILE",
    "what the run does, as configs/stage1.py; --config.batch_size=64 and the like "
    "change a knob",
    kind=_define_config,
)
OUT = Flag("out", "DIR", "a folder to write, which must not exist yet")

CHAT = Page(
    name="minigpt4-jax chat",
    about="Talk about a photo in this terminal.",
    usage="[--image FILE] [--prompt TEXT] [--checkpoint MODEL]",
    target="minigpt4_jax.chat:main",
    body="""
        A first answer says what is in the photo, then you ask; /help tells what else may
        be typed. With --prompt, or where stdin is no terminal, there is one answer. The
        first answer, and that to --prompt, are greedy.

        Answers go to stdout, all else to stderr. Colours, and the photo itself, are for
        terminals that can show them, and left out where NO_COLOR is set.
    """,
    takes=(
        Flag("image", "FILE", "the photo (default: one that is bundled)"),
        Flag("prompt", "TEXT", "ask only this"),
        CHECKPOINT,
        _knobs("chat", "temperature=0.2"),
    ),
    examples=(
        "minigpt4-jax chat --image photo.jpg",
        'minigpt4-jax chat --image photo.jpg --prompt "What is the dog doing?"',
        "minigpt4-jax chat --checkpoint WORK/stage2 --config.num_beams=5",
    ),
)
GENERATE = Page(
    name="minigpt4-jax generate",
    about="Answer about many photos, one JSON object a line.",
    usage="--images PATH --out FILE [--prompt TEXT] [...]",
    target="minigpt4_jax.generate:main",
    body="""
        A line has "image", "prompt", "answer" and "finish_reason"; for a photo that
        cannot be read "image", "prompt" and "error". The same command again answers what
        has no answer yet, errors included.
    """,
    takes=(
        Flag("images", "PATH", "a folder, one photo, or a LIST.jsonl"),
        Flag("out", "FILE", "where the answers go, as they are ready"),
        Flag(
            "prompt",
            "TEXT",
            f'what to ask (default: "{PROMPT}"); a line of LIST.jsonl may ask '
            "something else",
            PROMPT,
        ),
        CHECKPOINT,
        _knobs("generate", "batch_size=32"),
    ),
    examples=(
        "minigpt4-jax generate --images PHOTOS --out answers.jsonl",
        "minigpt4-jax generate --images LIST.jsonl --out answers.jsonl \\",
        '    --prompt "How many people are there?" --config.max_tokens=20',
    ),
)
WEB = Page(
    name="minigpt4-jax web",
    about="Talk about photos in a browser.",
    usage="[--checkpoint MODEL] [--auth USER:PASS] [...]",
    target="minigpt4_jax.web:main",
    body="""
        Listens on this machine alone, at http://127.0.0.1:7860, unless --host or --share
        say otherwise; Ctrl-C ends it. Needs the extra `serve`.
    """,
    takes=(
        CHECKPOINT,
        Flag(
            "host",
            "HOST",
            "where it listens (default: 127.0.0.1); 0.0.0.0 is everywhere",
            "127.0.0.1",
        ),
        Flag(
            "port",
            "N",
            "of the address (default: 7860); 0 is any that is free",
            7860,
            partial(flags.DEFINE_integer, lower_bound=0, upper_bound=65535),
        ),
        Flag("auth", "USER:PASS", "asked of whoever opens the page"),
        Flag(
            "share",
            "",
            "also open a public address of Gradio's",
            default=False,
            kind=flags.DEFINE_bool,
        ),
    ),
    examples=(
        "minigpt4-jax web",
        "minigpt4-jax web --checkpoint WORK/stage2 --host 0.0.0.0 --auth me:secret",
    ),
    extra="serve",
)
TRAIN = Page(
    name="minigpt4-jax train",
    about="Train the connector, or go on where a run stopped.",
    usage="--config FILE --workdir DIR",
    target="minigpt4_jax.train:main",
    body="""
        The same command, or --workdir alone, goes on with a run that was stopped. SIGTERM
        saves first and exits with code 143. A run that stands still, or has lost one of
        its processes, exits with code 75: start it again.
    """,
    takes=(RUN, Flag("workdir", "DIR", "where checkpoints, logs and samples go")),
    examples=(
        "minigpt4-jax train --config configs/finetune.py --workdir WORK/own \\",
        "    --config.checkpoint=demo --config.init=demo --config.data.own.path=PHOTOS",
        "minigpt4-jax train --workdir WORK/own",
    ),
    extra="train",
)
PLAN = Page(
    name="minigpt4-jax plan",
    about="Tell what a training needs and costs on TPUs before it is started.",
    usage="--config FILE [--topology SLICE] [--mesh SIZES] [...]",
    target="minigpt4_jax.plan:main",
    body="""
        Needs neither weights nor data, and no TPU: the real step is compiled for one that
        is not there (extra `tpu`). The exit code is 1 where it does not fit.
    """,
    takes=(
        RUN,
        Flag(
            "topology",
            "SLICE",
            "compile for v5e:16x16, 2*v5p:4x4x4 or the like, or for local, the devices "
            "at hand (default: a table of slices by formula)",
        ),
        Flag("mesh", "SIZES", "as fsdp=16,tensor=16 (default: the config's)"),
        Flag(
            "compile",
            "N",
            "compile the N best of the table",
            default=0,
            kind=flags.DEFINE_integer,
        ),
        Flag(
            "mode",
            "train|generate",
            "plan a step (default), or a token of answers",
            "train",
            partial(flags.DEFINE_enum, enum_values=["train", "generate"]),
        ),
        Flag("preset", "NAME", "the model, where the checkpoint's name is no hint"),
        Flag("price", "X", "of a chip and hour, for the cost", kind=flags.DEFINE_float),
        Flag(
            "prompt_tokens",
            "N",
            "mean of an example, image included",
            kind=flags.DEFINE_integer,
        ),
        Flag("answer_tokens", "N", "mean of its answer", kind=flags.DEFINE_integer),
        Flag("json", "", "print JSON", default=False, kind=flags.DEFINE_bool),
    ),
    examples=(
        "minigpt4-jax plan --config configs/stage1.py:13b --compile 3",
        "minigpt4-jax plan --config configs/stage1.py:13b --topology v5e:4x4 \\",
        "    --mesh fsdp=8,tensor=2 --config.remat=none --price 1.2",
    ),
)
A_SET = """PATH is whatever training takes: a folder of tar shards, cc_sbu_align, a .csv,
    .tsv or .jsonl list, a folder of photos with texts, or ArrayRecord."""
DATA_CHECK = Page(
    name="minigpt4-jax data check",
    about="Say what is in a data set, and what training would leave out.",
    usage="PATH [--sheet FILE] [--decode] [...]",
    target="minigpt4_jax.data.__main__:check_data",
    body=f"{A_SET} The exit code is 5 where training would refuse it.",
    takes=(
        Flag("sheet", "FILE", "draw a contact sheet: .jpg, .png or .webp"),
        Flag(
            "decode",
            "",
            "try every photo, not a sample",
            default=False,
            kind=flags.DEFINE_bool,
        ),
        Flag("checkpoint", "MODEL", "count tokens as this model does"),
    ),
    examples=("minigpt4-jax data check PHOTOS --sheet sheet.jpg",),
)
DATA_URLS = Page(
    name="minigpt4-jax data urls",
    about="Write a published list of addresses as img2dataset reads it.",
    usage="ANNOTATIONS.json --out DIR",
    target="minigpt4_jax.data.__main__:list_urls",
    body="""
        The list is one JSON array of {"url": ..., "caption": ...}, of any size. Prints
        the command that downloads what it names.
    """,
    takes=(OUT,),
    examples=(
        "minigpt4-jax data urls laion_synthetic_filtered_large.json --out LAION",
    ),
)
DATA_BUILD = Page(
    name="minigpt4-jax data build",
    about="Write a data set as ArrayRecord.",
    usage="PATH --out DIR",
    target="minigpt4_jax.data.__main__:build_records",
    body=f"{A_SET} Training and tensorflow-datasets read what is written.",
    takes=(OUT,),
    examples=("minigpt4-jax data build PHOTOS --out RECORDS",),
    extra="data",
)
DATA = Page(
    name="minigpt4-jax data",
    about="Look at a data set, get one, write one.",
    usage="COMMAND PATH [--FLAG=VALUE ...]",
    body="`minigpt4-jax data COMMAND --help` tells a command's flags.",
    parts=(DATA_CHECK, DATA_URLS, DATA_BUILD),
    examples=(
        *DATA_CHECK.examples,
        "minigpt4-jax data urls ANNOTATIONS.json --out DIR",
        *DATA_BUILD.examples,
    ),
)
REPORT = Page(
    name="minigpt4-jax report",
    about="Write curves, samples and settings of a training as one HTML page.",
    usage="WORKDIR [--out FILE]",
    target="minigpt4_jax.report:main",
    body="""
        The page loads nothing from elsewhere. Works on runs in progress; the same command
        again takes in what is new.
    """,
    takes=(Flag("out", "FILE", "the page (default: WORKDIR/report.html)"),),
    examples=("minigpt4-jax report WORK/stage1",),
)
TOP = Page(
    name="minigpt4-jax",
    about="A vision-language model that talks about a photo: use it, train it.",
    usage="COMMAND [--FLAG=VALUE ...]",
    body="""
        `minigpt4-jax COMMAND --help` tells a command's flags. `python -m convert`, in a
        clone, makes models of published weights.

        Exit codes: 0 done; 1 the system refused, a bug, or a plan that does not fit; 2
        wrong input; 3 wrong config; 4 a model that cannot be used; 5 a data set that
        cannot be used; 75 a training stands still or lost a process: start it again; 130
        interrupted; 143 a training ended by SIGTERM, saved and ready to go on.
    """,
    parts=(CHAT, GENERATE, WEB, TRAIN, PLAN, DATA, REPORT),
    examples=(
        "minigpt4-jax chat --image photo.jpg",
        "minigpt4-jax generate --images PHOTOS --out answers.jsonl",
        "minigpt4-jax data check PHOTOS --sheet sheet.jpg",
    ),
)
