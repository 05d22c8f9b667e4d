"""What `minigpt4-jax data` does: looks at a data set, gets one, writes one."""

import shlex
import sys
from pathlib import Path

from absl import flags

from minigpt4_jax import cli, errors, locate
from minigpt4_jax.data import check, urls
from minigpt4_jax.data.sources import BUDGET, open_data
from minigpt4_jax.data.tokens import load_tokenizer


def check_data(argv: list[str]) -> None:
    """`data check`: the report first, then what training would refuse."""
    args, path = flags.FLAGS, _path(argv)
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


def list_urls(argv: list[str]) -> None:
    """`data urls`: what was written as comments, and the command to run."""
    annotations, out = Path(_path(argv)), Path(_out())
    count, left_out = urls.convert(annotations, out)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
    print(f"# {count:,} rows in {out / 'urls'}; left out: {reasons or 'nothing'}")
    for line in urls.NOTES.splitlines():
        print(f"# {line}")
    print(shlex.join(urls.command(out)))


def build_records(argv: list[str]) -> None:
    """`data build`: which of the two builders, by what the folder holds."""
    from minigpt4_jax.data import builders  # it needs the data extra, others do not

    path = _path(argv)
    second = (Path(path) / "filter_cap.json").is_file()
    kind = builders.CcSbuAlign if second else builders.CaptionedImages
    out = Path(_out())
    builders.check_out(out)  # before hours of scanning
    written = builders.build(open_data(path), out, kind)
    print(f"{len(written):,} examples in {out}; train on it as on any data set")


def main() -> None:
    """The commands of `minigpt4-jax data`."""
    cli.main(["data", *sys.argv[1:]])


def _path(argv: list[str]) -> str:
    command, *paths = argv
    if len(paths) != 1:
        raise errors.InputError(f"{command} takes one path, got {len(paths)}")
    return paths[0]


def _out() -> str:
    if not flags.FLAGS.out:
        raise errors.InputError("--out DIR is missing: where to write")
    return flags.FLAGS.out


if __name__ == "__main__":
    main()
