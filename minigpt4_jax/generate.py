"""Answer about many images: minigpt4-jax generate --images PATH --out FILE.

Writes one JSON object a line, as answers are ready: `image`, `prompt`, `answer`,
`finish_reason`; for an image that cannot be read `image`, `prompt`, `error`. The same
command again answers what has no answer yet, errors included. Knobs: configs/generate.py.
"""

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import tqdm
from absl import flags
from ml_collections import ConfigDict

from minigpt4_jax import errors
from minigpt4_jax.data.sources import ImageRecord, list_images
from minigpt4_jax.generator import Generator
from minigpt4_jax.pages import GENERATE
from minigpt4_jax.request import Request, Sampling, user

logger = logging.getLogger(__name__)

SAMPLING = (  # knobs of both commands that are fields of Sampling
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("no_repeat_ngram", "min_tokens", "max_tokens", "banned_ids", "stop_ids"),
    *("num_beams", "length_penalty", "early_stopping"),
)
LINES = (  # of the output, values left empty
    '{"image": "", "prompt": "", "answer": "", "finish_reason": ""}',
    '{"image": "", "prompt": "", "error": ""}',
)


def main(argv: list[str]) -> None:
    """Read the flags and answer."""
    args = flags.FLAGS
    if argv[1:]:
        raise errors.InputError(f"generate takes flags only, got {argv[1]!r}")
    if not args.images or not args.out:
        raise errors.InputError("generate needs --images and --out")
    cfg = given_config("generate")
    generate(args.checkpoint, args.images, args.prompt, Path(args.out), cfg)


def generate(
    checkpoint: str, images: str, prompt: str, out: Path, cfg: ConfigDict
) -> None:
    """Append to `out` what it lacks of the answers about `images`."""
    tasks = [(record, record.prompt or prompt) for record in list_images(images)]
    if out.exists() and out.samefile(images):
        raise errors.InputError(f"--out and --images are one file, {out}; change --out")
    answered = keep_answered(out)
    todo = [t for t in tasks if not _take(answered, (t[0].name, t[1]))]
    logger.info("%d images, %d answered before", len(tasks), len(tasks) - len(todo))
    if not todo:
        return
    generator = Generator.load(
        checkpoint,
        dtype=cfg.dtype or None,
        batch_size=cfg.batch_size,
        chunk=cfg.chunk,
    )
    bar = tqdm.tqdm(total=len(tasks), initial=len(tasks) - len(todo), unit="image")
    began, tokens, failed = time.monotonic(), 0, 0
    # A name that is not UTF-8 has lone surrogates, which so become JSON's escapes.
    with bar, open(out, "a", encoding="utf-8", errors="backslashreplace") as file:
        for line, count in answers(generator, todo, cfg):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
            tokens += count
            failed += "error" in line
    seconds = time.monotonic() - began
    logger.info(
        "%d answers, %d errors in %.0f s (%.1f images/s, %.0f tokens/s): %s",
        len(todo) - failed,
        failed,
        seconds,
        len(todo) / seconds,
        tokens / seconds,
        out,
    )


def answers(
    generator: Generator, tasks: Iterable[tuple[ImageRecord, str]], cfg: ConfigDict
) -> Iterator[tuple[dict, int]]:
    """A line for each (image, prompt) and the tokens of its answer, as they are ready."""
    sampling = Sampling(**{name: cfg[name] for name in SAMPLING})
    pending: dict[str, dict] = {}
    texts: dict[str, str] = {}

    def requests() -> Iterator[Request]:
        for number, (record, prompt) in enumerate(tasks):
            key = str(number)
            pending[key] = {"image": record.name, "prompt": prompt}
            yield Request(
                [user(prompt, record.path)],
                sampling=sampling,
                stop=cfg.stop,
                seed=cfg.seed,
                compat=cfg.compat or None,
                id=key,
            )

    for event in generator.submit(requests()):
        key = event.request_id
        texts[key] = texts.get(key, "") + event.piece
        if event.finish_reason is None:
            continue
        line, text = pending.pop(key), texts.pop(key)
        if event.error is not None:
            yield line | {"error": event.error}, 0
        else:
            line |= {"answer": text, "finish_reason": event.finish_reason}
            yield line, event.usage.answer_tokens


def keep_answered(path: Path) -> Counter:
    """Drop errors and a half-written last line from earlier output; count its answers.

    Returns how often each (image, prompt) is answered. A file with any other line is
    the user's own: it stays as it is, and raises InputError.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return Counter()
    kept, found = [], Counter()
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        line = _parsed(text)
        if line is None and not (number == len(lines) and _cut_short(text)):
            raise errors.InputError(
                f"{path}, line {number}: not a line of answers; give another --out"
            )
        if line is not None and "answer" in line:
            kept.append(text + "\n")
            found[line["image"], line["prompt"]] += 1
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, path)
    return found


def _parsed(text: str) -> dict | None:
    """The line, if `answers` made it."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not {"answer", "error"} & set(line):
        return None
    strings = all(isinstance(line.get(key), str) for key in ("image", "prompt"))
    return line if strings else None


def _cut_short(text: str) -> bool:
    """Whether a line of the output begins so, whatever its values."""
    emptied = re.sub(r'": "(?:[^"\\]|\\.?)*', '": "', text)
    return any(line.startswith(emptied) for line in LINES)


def _take(counts: Counter, key: tuple[str, str]) -> bool:
    """Whether the key is there; takes one of it away."""
    counts[key] -= 1
    return counts[key] >= 0


def given_config(name: str) -> ConfigDict:
    """--config of a command; an install without its clone has no default."""
    if flags.FLAGS.config is None:
        raise errors.InputError(
            f"{name} needs --config FILE where the package is installed alone; a copy "
            f"of configs/{name}.py of its repository will do"
        )
    return flags.FLAGS.config


if __name__ == "__main__":
    GENERATE.run(main)
