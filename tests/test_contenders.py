"""Contenders of benchmarks.generate answer the same question, and its tables say how."""

import functools

import pytest
import torch

from benchmarks import generate
from benchmarks.contenders import Answers, Contender, Task, ask_ours, ask_theirs
from benchmarks.contenders import theirs as made_theirs
from minigpt4_jax.generator import Generator
from tests import tiny


@pytest.fixture(scope="module")
def generator():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_ids = (-1,)
    return Generator(tiny.model(), tokenizer)


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    """A byte is a token here."""
    monkeypatch.setattr(generate, "QUESTION", "Why? ")
    monkeypatch.setattr(generate, "MORE", ("When? ", "Who says that? ", "Where", "So"))
    monkeypatch.setattr(generate, "LONG", 120)
    monkeypatch.setattr(generate, "READ", 1 << 16)


@pytest.fixture(scope="module")
def theirs(generator):
    return made_theirs(generator)


def test_transformers_gives_our_tokens_for_prompts_of_many_lengths(generator, theirs):
    task = generate.tasks(generator, 5)["eight prompts at once"]
    assert len({len(prompt) for prompt in task.prompts}) == 8
    mine, other = ask_ours(generator, task), ask_theirs(theirs, task)
    assert mine.ids == other.ids and {len(ids) for ids in mine.ids} == {5}
    for answers in (mine, other):
        assert 0 < answers.first < answers.last


def test_the_tables_have_a_row_for_each_that_takes_the_prompts(
    generator, theirs, capsys
):
    ask = functools.partial(ask_ours, generator)
    contenders = [
        Contender("ours", 4, ask),
        Contender("ours alone", 4, ask, rows=1),
        Contender(generate.BASE, 4, functools.partial(ask_theirs, theirs)),
    ]
    generate.measure(generator, contenders, tokens=3, repeats=2)
    one, eight, long = capsys.readouterr().out.split("\n\n")[1:]
    assert [line.count("\n| ours") for line in (one, eight, long)] == [2, 1, 2]
    assert "\n| ours alone" not in eight
    assert " prompt tokens, 1 answer" in long
    rows = [[cell.strip() for cell in row.split("|")] for row in one.splitlines()]
    assert [row[-2] for row in rows[3:]] == ["3"] * 3  # all tokens are the same
    assert rows[-1][4] == "1.00" and rows[-1][5].isdigit()


def test_the_share_of_bandwidth_counts_the_tokens_after_the_first():
    task = Task(["a"], [[1]], tokens=11)
    found = [Answers(first, first + 2.0, [[0] * 11]) for first in (0.5, 1.0, 9.0)]
    assert generate.share(task, 30, found, 300.0) == "50"  # 30 bytes, 5 a second
    whole = [Answers(2.0, 2.0, [[0] * 11])]
    assert generate.share(task, 30, whole, 300.0) == ""


def test_a_read_of_memory_takes_time():
    assert generate.read(torch.ones(1 << 10)) > 0
