r"""Mixed requests through one running batch, and the same one after another.

    python -m benchmarks.engine [--checkpoint demo] [--requests 32] [--slots 8]

Requests differ in prompt, length, images (none, one, two; every image another crop of a
bundled photo), sampling and limit. What is kept of images and prefixes is cleared before
each turn; turns alternate and medians count. Then the same photo is asked twice: the
second question skips vision and prefix. Then prompt look-up: the same greedy answers
with drafts and without, one at a time. Programs are compiled before anything is timed.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

import minigpt4_jax
from minigpt4_jax import compilations, decoding, errors
from minigpt4_jax.data.images import read_image
from minigpt4_jax.generator import Generator
from minigpt4_jax.pool import bucket
from minigpt4_jax.request import GREEDY, Request, Sampling, user

PHOTOS = Path(minigpt4_jax.__file__).parent / "assets/photos"
QUESTIONS = (
    "Describe this image in one sentence.",
    "What is in the background, and what does that say about where it was taken?",
    "What can you see?",
    "Write a short story about this picture. Say who is in it, what they want, what "
    "stands in their way, and how it ends. Use simple words and short sentences.",
)
TEXTS = (
    "Name three animals.",
    "Tell me what a lighthouse is, who keeps it, and why it stands where it does.",
)
REPEATING = (  # an answer that copies from its prompt
    "Repeat this text: The skateboard rolled down the long hill, past the old church, "
    "past the long row of red houses, and stopped at the old bridge over the river.",
    "List the colours in this sentence, then repeat the sentence: The red boat and the "
    "blue boat lie beside the green boat and the white boat.",
)


def crop(number: int) -> np.ndarray:
    """Another part of a bundled photo for each number."""
    files = sorted(PHOTOS.glob("*.jpg"))
    photo_HWC = read_image(files[number % len(files)])
    cut = 1 + number // len(files)
    return photo_HWC[cut:, cut:]


def mixed(count: int) -> list[Request]:
    """Requests of all kinds, the same in each run."""
    found = []
    for i in range(count):
        images = [crop(10 * i + j) for j in range((1, 1, 2, 0)[i % 4])]
        texts = QUESTIONS if images else TEXTS
        limit = (24, 64, 40, 96)[i // 4 % 4]
        sampling = Sampling(max_tokens=limit) if i % 3 == 2 else GREEDY
        sampling = dataclasses.replace(sampling, max_tokens=limit)
        text = texts[(i // 4) % len(texts)]
        found.append(
            Request([user(text, *images)], sampling=sampling, seed=i, id=str(i))
        )
    return found


Answers = dict[str, tuple[int, ...]]


def collect(events, answers: Answers) -> Answers:
    for event in events:
        assert event.error is None, event.error
        answers[event.request_id] = answers.get(event.request_id, ()) + event.ids
    return answers


def together(generator: Generator, requests: Sequence[Request]) -> Answers:
    return collect(generator.submit(requests), {})


def in_turn(generator: Generator, requests: Sequence[Request]) -> Answers:
    answers: Answers = {}
    for request in requests:
        collect(generator.submit([request]), answers)
    return answers


def forget(generator: Generator) -> None:
    generator.engine.reader.embeddings.clear()
    generator.engine.reader.prefixes.clear()


def timed(
    generator: Generator,
    run: Callable[[Generator, Sequence[Request]], Answers],
    requests: Sequence[Request],
) -> tuple[float, Answers]:
    forget(generator)
    began = time.perf_counter()
    answers = run(generator, requests)
    return time.perf_counter() - began, answers


def first_token(generator: Generator, question: str) -> float:
    sampling = dataclasses.replace(GREEDY, max_tokens=2)
    *_, last = generator.submit([Request([user(question, crop(0))], sampling)])
    return last.usage.seconds_to_first_token


def throughput(generator: Generator, requests: Sequence[Request], repeats: int) -> None:
    """Print the seconds of both ways and their ratio."""
    seconds: dict[str, list[float]] = {"together": [], "in turn": []}
    answers: dict[str, Answers] = {}
    for _ in range(repeats):
        for name, run in (("together", together), ("in turn", in_turn)):
            took, answers[name] = timed(generator, run, requests)
            seconds[name].append(took)
    tokens = sum(map(len, answers["in turn"].values()))
    print("| | s | answer tokens/s | ratio |\n|---|---|---|---|")
    base = statistics.median(seconds["in turn"])
    for name, times in seconds.items():
        took = statistics.median(times)
        print(f"| {name} | {took:.2f} | {tokens / took:.1f} | {base / took:.2f} |")
    ratios = [b / a for a, b in zip(*seconds.values())]
    same = sum(answers["together"][r.id] == answers["in turn"][r.id] for r in requests)
    print(f"ratio by turns: {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"{same} of {len(requests)} answers have the same tokens")


def second_question(generator: Generator, repeats: int) -> None:
    """Print what a second question about a photo saves."""
    firsts, seconds = [], []
    for _ in range(repeats):
        forget(generator)
        firsts.append(first_token(generator, QUESTIONS[0]))
        seconds.append(first_token(generator, QUESTIONS[2]))
    first, second = statistics.median(firsts), statistics.median(seconds)
    print(
        f"first token: {1e3 * first:.0f} ms for the first question about a photo, "
        f"{1e3 * second:.0f} ms for the second: ratio {first / second:.2f}"
    )


def look_up(plain: Generator, guessing: Generator, repeats: int) -> None:
    """Print what prompt look-up gains for answers that copy and for others."""
    kinds = {"copying": REPEATING, "captions": QUESTIONS[:3], "other": TEXTS}
    drafts = guessing.engine.shapes.drafts
    for kind, questions in kinds.items():
        sampling = dataclasses.replace(GREEDY, max_tokens=64)
        images = [crop(0)] if kind == "captions" else []
        requests = [
            Request([user(question, *images)], sampling, id=str(i))
            for i, question in enumerate(questions)
        ]
        ratios = []
        for _ in range(repeats):
            slow, wanted = timed(plain, in_turn, requests)
            fast, found = timed(guessing, in_turn, requests)
            ratios.append(slow / fast)
        tokens = sum(map(len, wanted.values()))
        counts = [replay(plain, r, wanted[r.id], drafts) for r in requests]
        passes, guessed, right = map(sum, zip(*counts))
        print(
            f"prompt look-up, {kind}: {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f}); {tokens} tokens in {passes} "
            f"passes, {right} of {guessed} guesses right; the same: {found == wanted}"
        )


def replay(
    generator: Generator, request: Request, answer: Sequence[int], drafts: int
) -> tuple[int, int, int]:
    """Forward passes, guesses and right guesses on the way to a known answer."""
    prepared = generator.prepare(request)
    prompt = np.where(prepared.slots, -1, prepared.ids).tolist()
    tokens_1S = np.zeros((1, bucket(len(prompt) + len(answer))), np.int32)
    tokens_1S[0, : len(prompt) + len(answer)] = [*prompt, *answer]
    done = passes = guessed = right = 0
    while done < len(answer):
        length_1 = np.array([len(prompt) + done - 1])
        draft = decoding.look_up(tokens_1S, length_1, drafts)[0].tolist()
        draft = draft[: draft.index(-1)] if -1 in draft else draft
        draft = draft[: len(answer) - done - 1]
        same = [a == b for a, b in zip(draft, answer[done:])]
        taken = same.index(False) if False in same else len(same)
        passes, guessed, right = passes + 1, guessed + len(draft), right + taken
        done += taken + 1
    return passes, guessed, right


def main(argv: list[str]) -> None:
    """Read the flags, warm up, measure."""
    args = flags.FLAGS
    generator = Generator.load(args.checkpoint, batch_size=args.slots)
    guessing = Generator(
        generator.model, generator.tokenizer, batch_size=args.slots, drafts=args.drafts
    )
    requests = mixed(args.requests)
    began, programs = time.perf_counter(), generator.warm_up(256)
    load = os.getloadavg()[0]
    print(
        f"{args.checkpoint}: {args.requests} requests, {args.slots} slots, "
        f"{os.cpu_count()} cores, load {load:.1f}, jax {jax.__version__} on "
        f"{jax.default_backend()}; warm-up: {programs} programs in "
        f"{time.perf_counter() - began:.0f} s"
    )
    before = compilations.count()
    throughput(generator, requests, args.repeats)
    second_question(generator, args.repeats)
    print(f"compiled after the warm-up: {compilations.count() - before}")
    guessing.warm_up(256)
    look_up(generator, guessing, args.repeats)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "demo", "a converted model")
    flags.DEFINE_integer("requests", 32, "how many are asked")
    flags.DEFINE_integer("slots", 8, "rows decoded together")
    flags.DEFINE_integer("drafts", 4, "tokens guessed at each step")
    flags.DEFINE_integer("repeats", 3, "turns of each")
    errors.run(main)
