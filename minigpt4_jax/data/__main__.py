"""python -m minigpt4_jax.data COMMAND: look at a data set, get one, write one.

check PATH [--sheet FILE.jpg] [--decode] [--checkpoint MODEL]
    what is there: counts, sizes, captions, what was left out; a contact sheet. --decode
    tries every image, not a sample; --checkpoint counts tokens as that model does
urls ANNOTATIONS.json --out DIR
    a published list of {"url", "caption"} as img2dataset's input, and its command
build PATH --out DIR
    a data set as ArrayRecord, by the builders for tensorflow-datasets (data extra)

PATH is whatever training takes: tars, cc_sbu_align, a .csv, .tsv or .jsonl, a folder.
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from minigpt4_jax import errors, locate
from minigpt4_jax.data import check, urls
from minigpt4_jax.data.sources import BUDGET, open_data
from minigpt4_jax.data.tokens import load_tokenizer


def check_data(path: str) -> None:
    """`data check`: the report first, then what training would refuse."""
    args = flags.FLAGS
    if args.sheet:
        check.check_sheet(Path(args.sheet))  # before hours of scanning
    examples = open_data(path, budget=1)
    tokenizer = None
    if args.checkpoint:
        directory = locate.base_directory(locate.resolve(args.checkpoint))
        preset = locate.read_json(directory / "preset.json")
        ends = {name: preset[name] for name in ("bos_id", "eos_ids")}
        tokenizer = load_tokenizer(directory, **ends)
    if args.sheet:
        check.draw(examples, Path(args.sheet))
    for line in check.told(examples, check.look(examples, args.decode), tokenizer):
        print(line)
    if args.sheet:
        print(f"sheet       {args.sheet}")
    examples.check(BUDGET)


def list_urls(annotations: str) -> None:
    """`data urls`: what was written as comments, and the command to run."""
    out = Path(_out())
    count, left_out = urls.convert(Path(annotations), out)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
    print(f"# {count:,} rows in {out / 'urls'}; left out: {reasons or 'nothing'}")
    for line in urls.NOTES.splitlines():
        print(f"# {line}")
    print(shlex.join(urls.command(out)))


def build_records(path: str) -> None:
    """`data build`: which of the two builders, by what the folder holds."""
    from minigpt4_jax.data import builders  # it needs the data extra, others do not

    second = (Path(path) / "filter_cap.json").is_file()
    kind = builders.CcSbuAlign if second else builders.CaptionedImages
    out = Path(_out())
    builders.check_out(out)  # before hours of scanning
    written = builders.build(open_data(path), out, kind)
    print(f"{len(written):,} examples in {out}; train on it as on any data set")


COMMANDS = {"build": build_records, "check": check_data, "urls": list_urls}


def main() -> None:
    """Run the command that the first argument names."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("", "help", "--help", "-h"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        print(errors.unknown("command", name, COMMANDS), file=sys.stderr)
        sys.exit(errors.InputError.exit_code)

    def run(argv: list[str]) -> None:
        if len(argv) != 2:
            raise errors.InputError(f"data {name} takes one path, got {len(argv) - 1}")
        COMMANDS[name](argv[1])

    errors.run(run, [sys.argv[0], *rest], lambda: define_flags(name))


def define_flags(name: str) -> None:
    """The flags of one command."""
    if name == "check":
        flags.DEFINE_string("sheet", None, "a contact sheet: .jpg, .png or .webp")
        flags.DEFINE_bool("decode", False, "try every image, not a sample")
        flags.DEFINE_string("checkpoint", None, "count tokens as this model does")
    else:
        flags.DEFINE_string("out", None, "a folder to write; it must not exist yet")


def _out() -> str:
    if not flags.FLAGS.out:
        raise errors.InputError("--out DIR is missing: where to write")
    return flags.FLAGS.out


if __name__ == "__main__":
    main()
