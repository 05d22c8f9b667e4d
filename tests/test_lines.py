"""Lines that are logged are there whole, whatever came between."""

import json

import pytest

from minigpt4_jax.lines import Lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def test_lines_of_later_steps_and_broken_ones_are_dropped(path):
    log = Lines(path)
    log.drop_after(0)  # nothing is there yet
    said = [{"step": n, "says": "eine Straße\u2028mit Hund"} for n in (1, 2, 2, 3)]
    for record in said:
        log.append(record)
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "lo\n[]\n{"step": 4, "\xc3')  # a crash, then a kill
    log.drop_after(2)
    assert read(path) == said[:3]
    before = path.stat().st_ino
    log.drop_after(5)
    assert path.stat().st_ino == before  # nothing to drop: not written again
    log.append(said[3])
    assert read(path) == said


def test_a_line_without_room_waits_and_leaves_no_part_of_itself(path, caplog):
    """A limit on sizes cuts a line in the middle."""
    import resource

    log = Lines(path)
    log.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        log.append({"step": 2, "loss": 0.5})
        assert read(path) == [{"step": 1}]
        log.append({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "lines wait" in caplog.text
    log.flush()
    assert read(path) == [{"step": 1}, {"step": 2, "loss": 0.5}, {"step": 3}]
    log.flush()
    assert len(read(path)) == 3
