r"""Decoding speed of the demo's decoder beside transformers and llama.cpp, on its weights.

    python -m benchmarks.generate [--checkpoint demo|random] [--tokens 64] [--repeats 5]

Three tables, greedy, a fixed number of tokens: one prompt; eight of different lengths at
once; a prompt of 256 tokens, of which only the next token is asked for. The contenders
take turns, so that a busy machine slows all of them; medians are printed, the best in
brackets, and the ratio to transformers in float32, all of the same prompts. Ours goes
through `Generator.submit`, text and all, in pieces of 8 tokens as a caller gets them by
default; "unstreamed" is one piece, so the two show what streaming costs. `random` needs
no converted model.

The share of bandwidth: bytes of the decoder's weights, times the tokens a second after
the first, over what a plain read by all threads gives in the same turns, of 2 GiB, more
than any cache holds. Weights that fit into a cache can be read faster than that.

llama.cpp decodes beside them where it is installed (`pip install llama-cpp-python`
builds it): the demo's own GGUF file, and that as its own quantize makes 8 bits and
float32 of it.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import torch
import transformers
from absl import flags

from benchmarks.contenders import (
    Answers,
    Contender,
    Task,
    ask_ours,
    ask_theirs,
    llama_cpp,
    ours,
    theirs,
    weights_of,
)
from convert.demo import package_file
from minigpt4_jax import errors, locate
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.quantised import KINDS
from minigpt4_jax.request import GREEDY, Request, user

QUESTION = (
    "Tell me what a lighthouse is, who keeps it, and why it stands where it does. "
)
MORE = (
    "What do sailors see of it at night? ",
    "Say it in two sentences that a child can understand. ",
    "Who was the first to build one, of what, and how tall was it? ",
    "Then name three that are still lit today, and say on which coast each stands. ",
)
BASE = "transformers float32"
LONG = 256  # tokens of the long prompt
READ = 2 << 30  # bytes


def main(argv: list[str]) -> None:
    """Read the flags, time the contenders in turns, print the tables."""
    args = flags.FLAGS
    torch.set_num_threads(os.cpu_count() or 1)
    plain = ours(args.checkpoint, "float32")
    with tempfile.TemporaryDirectory() as folder:
        contenders = field(plain, args.checkpoint, args.tokens)
        if args.checkpoint == "demo" and importlib.util.find_spec("llama_cpp"):
            gguf = package_file(locate.demo_pins()["sources"][1])
            contenders += llama_cpp(gguf, Path(folder))
        measure(plain, contenders, args.tokens, args.repeats)


def field(plain: Generator, name: str, tokens: int) -> list[Contender]:
    """Ours and transformers', from the weights of `plain`."""
    count, size = weights_of(plain)
    generators = {"float32": plain, "bfloat16": ours(name, "bfloat16")}
    if name != "random":  # which has no file to round while it is read
        generators |= {kind: ours(name, "float32", quantize=kind) for kind in KINDS}
    found = [
        Contender(f"ours {kind}", weights_of(g)[1], functools.partial(ask_ours, g))
        for kind, g in generators.items()
    ]
    whole = Generator(plain.model, plain.tokenizer, chunk=tokens)
    ask = functools.partial(ask_ours, whole)
    found.append(Contender("ours float32, unstreamed", size, ask, rows=1))
    for dtype in (torch.float32, torch.bfloat16):
        model = theirs(plain).to(dtype)
        name = f"transformers {str(dtype).removeprefix('torch.')}"
        ask = functools.partial(ask_theirs, model)
        found.append(Contender(name, count * dtype.itemsize, ask))
    return found


def tasks(generator: Generator, tokens: int) -> dict[str, Task]:
    """What is asked, by the heading of its table."""

    def task(texts: Sequence[str], tokens: int) -> Task:
        few = dataclasses.replace(GREEDY, max_tokens=tokens)
        asked = [Request([user(text)], sampling=few) for text in texts]
        return Task(texts, [generator.prepare(a).ids.tolist() for a in asked], tokens)

    eight = [QUESTION + "".join(MORE[: i % 4]) + MORE[i // 4] for i in range(8)]
    long = QUESTION
    while len(task([longer := f"{long} also"], 1).prompts[0]) <= LONG:
        long = longer
    return {
        "one prompt": task([QUESTION], tokens),
        "eight prompts at once": task(eight, tokens),
        "a long prompt": task([long], 1),
    }


def measure(
    generator: Generator, contenders: Sequence[Contender], tokens: int, repeats: int
) -> None:
    asked = tasks(generator, tokens)
    turns = [
        (heading, contender)
        for heading, task in asked.items()
        for contender in contenders
        if len(task.prompts) <= contender.rows
    ]
    for heading, contender in turns:  # compiles
        contender.ask(asked[heading])
    answers: dict[tuple[str, str], list[Answers]] = {}
    array = torch.ones(READ // 4)
    reads = []
    read(array)
    for _ in range(repeats):
        for heading, contender in turns:
            found = contender.ask(asked[heading])
            answers.setdefault((heading, contender.name), []).append(found)
            reads.append(read(array))
    bandwidth = statistics.median(reads)
    print(
        f"{repeats} turns, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, jax "
        f"{jax.__version__} on {jax.default_backend()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, llama.cpp {llama_cpp_version()}; "
        f"memory is read at {bandwidth / 1e9:.1f} GB/s (most: {max(reads) / 1e9:.1f})"
    )
    for heading, task in asked.items():
        here = [c for h, c in turns if h == heading]
        of = {c.name: answers[heading, c.name] for c in here}
        print_table(heading, task, here, of, weights_of(generator)[0], bandwidth)


def read(array: torch.Tensor) -> float:
    """Bytes a second of a sum over the array by all threads."""
    began = time.perf_counter()
    array.sum()
    return array.nbytes / (time.perf_counter() - began)


def print_table(
    heading: str,
    task: Task,
    contenders: Sequence[Contender],
    answers: dict[str, list[Answers]],
    weights: int,
    bandwidth: float,
) -> None:
    """Rates of a heading's contenders: of answers, or of a prompt that has none."""
    lengths = [len(prompt) for prompt in task.prompts]
    per = "prompt tokens" if task.tokens == 1 else "tokens"
    count = sum(lengths) if task.tokens == 1 else task.tokens * len(lengths)
    # Over the whole answer: unstreamed, its first token comes with the last.
    rates = {name: [count / a.last for a in found] for name, found in answers.items()}
    base = statistics.median(rates[BASE])
    print(
        f"\n{heading}: {min(lengths)} to {max(lengths)} prompt tokens, {task.tokens} "
        "answer tokens each\n"
        f"| | bytes a weight | {per}/s (most) | ratio | % of bandwidth "
        "| s to first token (least) | same tokens |\n|---|---|---|---|---|---|---|"
    )
    for who in contenders:
        found, rate = answers[who.name], statistics.median(rates[who.name])
        firsts = [answer.first for answer in found]
        print(
            f"| {who.name} | {who.held / weights:.2f} "
            f"| {rate:.1f} ({max(rates[who.name]):.1f}) | {rate / base:.2f} "
            f"| {share(task, who.held, found, bandwidth)} "
            f"| {statistics.median(firsts):.3f} ({min(firsts):.3f}) "
            f"| {same(found[0].ids, answers[BASE][0].ids)} |"
        )


def share(task: Task, held: int, found: Sequence[Answers], bandwidth: float) -> str:
    """% of the bandwidth that reads weights, where one row gives token after token."""
    seconds = statistics.median(answer.last - answer.first for answer in found)
    if len(task.prompts) > 1 or task.tokens == 1 or not seconds:
        return ""
    return f"{100 * held * (task.tokens - 1) / seconds / bandwidth:.0f}"


def same(ids: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    """How many tokens agree before the first that does not, in all rows together."""
    count = 0
    for some, more in zip(ids, others):
        pairs = [a == b for a, b in zip(some, more)]
        count += pairs.index(False) if False in pairs else len(pairs)
    return count


def llama_cpp_version() -> str:
    try:
        return importlib.metadata.version("llama-cpp-python") + " (its Python package)"
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install llama-cpp-python)"


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "demo", "a converted model, or random")
    flags.DEFINE_integer("tokens", 64, "tokens of the answer")
    flags.DEFINE_integer("repeats", 5, "timed turns of each contender")
    errors.run(main)
