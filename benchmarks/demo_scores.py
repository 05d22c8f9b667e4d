"""How well a checkpoint captions the photos of a split: right, exchanged and human scores.

    python -m benchmarks.demo_scores --data=DATA [--split=test] [--checkpoint=demo]

DATA holds a folder of tar shards for each split (`DATA/test/*.tar`). The photos are
answered by `python -m minigpt4_jax.generate`, greedily, as a user's folder would be.
Prints a table on stdout; with --out the photos, captions and answers stay there, and a
rerun goes on where it stopped. Each model has its own file of answers there.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags

from minigpt4_jax import errors, locate
from minigpt4_jax.data.demo_texts import ONE_SENTENCE
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import InputError
from minigpt4_jax.evaluation.captions import human, read_pairs, report


def main(argv: list[str]) -> int:
    args = flags.FLAGS
    if not args.data or len(argv) > 1:
        raise InputError("give --data=FOLDER, which has SPLIT/*.tar, and only flags")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.out or temporary)
        photos, captions = unpack(Path(args.data) / args.split, work, args.limit)
        answers = work / answers_name(args.checkpoint)
        command = [sys.executable, "-m", "minigpt4_jax.generate"]
        command += ["--checkpoint", args.checkpoint, "--images", str(photos)]
        command += ["--prompt", args.prompt, "--out", str(answers)]
        code = subprocess.run(command).returncode
        if code:
            return code
        candidates, references = read_pairs(answers, captions)
    print(table(candidates, references))
    return 0


def answers_name(checkpoint: str) -> str:
    """answers-MODEL.jsonl; a work directory's name goes with a hash of its trainables."""
    directory = locate.resolve(checkpoint).resolve()
    trained = directory / locate.TRAINABLES
    state = f"-{locate.sha256(trained)[:16]}" if trained.exists() else ""
    return f"answers-{directory.name}{state}.jsonl"


def unpack(shards: Path, work: Path, limit: int | None) -> tuple[Path, Path]:
    """Write the photos of a folder of shards as files; (photos, captions.jsonl)."""
    examples = open_data(shards)
    photos, captions = work / "photos", work / "captions.jsonl"
    photos.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(min(len(examples), limit or len(examples))):
        example = examples[i]
        name = f"{i:05d}-{example.key.replace('/', '_')}.jpg"
        (photos / name).write_bytes(example.image)
        lines.append({"image": name, "captions": list(example.captions)})
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return photos, captions


def table(candidates: list[str], references: list[list[str]]) -> str:
    """Model and human side by side, with the 95 % interval over photos."""
    rows = [
        f"{'':8}{'photos':>8}{'CIDEr-D':>9}{'interval':>16}{'exchanged':>11}{'BLEU-4':>8}"
    ]
    for name, scores in (
        ("model", report(candidates, references)),
        ("human", report(*human(references))),
    ):
        low, high = scores["cider_d_interval"]
        rows.append(
            f"{name:8}{scores['n']:8}{scores['cider_d']:9.1f}"
            f"{f'{low:.1f} to {high:.1f}':>16}{scores['cider_d_exchanged']:11.1f}"
            f"{scores['bleu4']:8.1f}"
        )
    return "\n".join(rows)


if __name__ == "__main__":  # flags here: tests import this file beside other commands
    flags.DEFINE_string("data", None, "Folder with a folder of tar shards per split.")
    flags.DEFINE_string("split", "test", "Split to score.")
    flags.DEFINE_string("checkpoint", "demo", "What `minigpt4_jax.generate` takes.")
    flags.DEFINE_string("prompt", ONE_SENTENCE, "What is asked of every photo.")
    flags.DEFINE_string("out", None, "Folder to keep; default: a temporary one.")
    flags.DEFINE_integer("limit", None, "Score only the first photos.", lower_bound=2)
    errors.run(main)
