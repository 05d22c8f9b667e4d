"""A run that stands still or lost a process ends, says who lags, and can be started again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt4_jax import alive, cluster, locate, watchdog
from minigpt4_jax.errors import DataError
from minigpt4_jax.watchdog import Pace, Peer, judge
from tests import dying, training, whole_runs

ROOT = Path(__file__).parent.parent
LIMIT, OTHER = 5.0, 60.0
SLACK_S = 6  # to notice and to write stacks, beside whatever else this machine does


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pace(clock):
    """After a first step of 50 s, and some of a tenth."""
    pace = Pace(LIMIT, OTHER, clock)
    steps(pace, clock, [50.0, 0.1, 0.1, 0.1])
    return pace


def steps(pace: Pace, clock: Clock, seconds: list[float]) -> None:
    begin = pace.status()["step"]
    pace.begin(begin)
    for done, passed in enumerate(seconds, begin + 1):
        pace.ended(done - 1)  # as the loop does, before the first has ended
        clock.now += passed
        pace.ended(done)


def late(pace: Pace, clock: Clock, seconds: float) -> str:
    clock.now += seconds
    return pace.status()["late"]


def test_a_step_may_take_the_limit(pace, clock):
    assert pace.status()["step"] == 4
    assert not late(pace, clock, LIMIT - 0.1)
    said = late(pace, clock, 0.2)
    assert "no step has ended for 5 s" in said and "limit_s=5" in said


def test_ten_median_steps_are_allowed_where_that_is_more(clock):
    pace = Pace(LIMIT, OTHER, clock)
    steps(pace, clock, [50.0, 2.0, 2.0, 2.0, 40.0])
    assert not late(pace, clock, 19.9)
    assert late(pace, clock, 0.2)


def test_the_first_step_has_more_time(clock):
    pace = Pace(LIMIT, OTHER, clock)
    pace.begin(7)
    pace.ended(7)  # the loop has not waited for any
    assert not late(pace, clock, OTHER - 0.1)
    said = late(pace, clock, 0.2)
    assert "its first step has not ended for 60 s" in said and "other_s=60" in said


def test_each_part_of_what_comes_before_has_that_time_from_its_last_sign_of_life(clock):
    pace = Pace(LIMIT, OTHER, clock)
    for part in ("opening the data", "loading the model"):
        pace.before(part)
        assert not late(pace, clock, OTHER - 0.1)
    for _ in range(3):  # longer than that, with signs of life
        alive.sign()
        assert not late(pace, clock, 0)  # the watchdog looks
        assert not late(pace, clock, OTHER - 0.1)
    said = late(pace, clock, 0.2)
    assert said == (
        "before its first step, loading the model: no sign of life for 60 s "
        "(config.watchdog.other_s=60)"
    )
    alive.sign()
    assert not late(pace, clock, 0)
    pace.begin(0)
    clock.now += OTHER - 0.1
    alive.sign()
    assert late(pace, clock, 0.2)  # the first step, which has none


def test_what_is_no_step_has_its_own_limit_and_is_in_no_step(pace, clock):
    clock.now += LIMIT - 1
    with pace.other("save"):
        assert not late(pace, clock, OTHER - 0.1)
        assert "its save has not ended" in late(pace, clock, 0.2)
    assert not late(pace, clock, 0.9)
    assert late(pace, clock, 0.2)
    pace.end()
    assert not late(pace, clock, OTHER - 0.1)
    assert late(pace, clock, 0.2)


def test_a_process_that_was_stopped_as_a_whole_goes_on(clock, tmp_path, monkeypatch):
    """By Ctrl-Z, or by a scheduler that suspends jobs."""
    codes = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    watch = watchdog.Watchdog(tmp_path, LIMIT, OTHER, clock=clock)
    steps(watch.pace, clock, [0.1, 0.1])
    clock.now += 1000
    watch._look()
    assert not codes and watch.pace.status()["seconds"] < 1
    while not codes:
        clock.now += 0.5
        watch._look()
    assert codes == [75]
    assert "no step has ended for 5 s" in (tmp_path / "0.txt").read_text()


def peers(*where: tuple[int, str, str], silent: float = 0.0) -> dict[int, Peer]:
    """Processes by (step, phase, late); the last one was heard of so long ago."""
    found = {
        i: Peer(f"process {i}", dict(step=s, phase=p, late=why, seconds=9.0), 100.0)
        for i, (s, p, why) in enumerate(where)
    }
    found[len(where) - 1].heard -= silent
    return found


STEPS, WAITS, SAVES = (42, "step", ""), (42, "step", "no step"), (42, "save", "")


def test_a_run_that_goes_on_is_let_alone():
    assert judge(peers(STEPS, (41, "step", ""), silent=4.9), 100, LIMIT) is None


def test_those_that_lag_are_named_and_the_others_counted_together():
    verdict = judge(peers(WAITS, STEPS, (41, "step", ""), STEPS), 100, LIMIT)
    assert verdict.code == 75 and verdict.of is None
    assert verdict.text == (
        "process 0: no step; process 2 is after step 41 for 9 s; "
        "the others are after step 42"
    )
    text = judge(peers(WAITS, (41, "step", "")), 100, LIMIT).text
    assert text.endswith(
        "process 1 is after step 41 for 9 s; the others are after step 42"
    )
    assert judge(peers(WAITS, STEPS), 100, LIMIT).text.endswith("all are after step 42")
    many = judge(peers(WAITS, *((i, "step", "") for i in range(40))), 100, LIMIT).text
    assert "process 8 is" in many and "process 9 is" not in many and "32 more" in many


def test_a_process_that_is_silent_or_gone_ends_the_run_whatever_the_others_do():
    text = judge(peers(SAVES, STEPS, (41, "step", ""), silent=5.1), 100, LIMIT).text
    assert "process 2 has not answered for 5 s, last heard of after step 41" in text
    found = peers(STEPS, SAVES)
    found[1].gone = True
    assert "process 1 is gone, last heard of after step 42 in its save" in (
        judge(found, 100, LIMIT).text
    )
    found[1].done = True
    assert judge(found, 100, LIMIT) is None


def test_a_step_may_wait_for_another_process_that_is_allowed_what_it_does():
    assert judge(peers(WAITS, SAVES), 100, LIMIT) is None
    assert judge(peers(WAITS, (42, "save", "its save")), 100, LIMIT) is not None


def test_who_stands_still_before_the_first_step_is_named():
    stuck = "before its first step, restoring"
    found = peers((7, "first step", ""), (0, stuck, f"{stuck}: no sign of life"))
    assert judge(found, 100, LIMIT) is None  # the first one may go on with its own
    found[0].status |= {"late": "its first step has not ended"}
    assert judge(found, 100, LIMIT).text == (
        "process 0: its first step has not ended; process 1 is before its first step, "
        "restoring for 9 s; the others are after step 7 in its first step"
    )


def test_an_error_is_another_process_s_until_that_one_was_heard_of_since():
    failed = dict(code=5, text="DataError: damaged")
    found = peers(STEPS, STEPS, STEPS, silent=1.0)
    found[0].failed, found[0].failed_at = failed, 99.5
    assert judge(found, 100, LIMIT) is None
    found[2].gone = True
    verdict = judge(found, 100, LIMIT)
    assert (verdict.code, verdict.of) == (75, None)
    assert "process 2 is gone" in verdict.text and "DataError: damaged" in verdict.text
    found[2].gone, found[2].heard = False, 99.9
    assert judge(found, 100, LIMIT) == judge(found, 101, LIMIT)
    verdict = judge(found, 100, LIMIT)
    assert (verdict.code, verdict.of) == (5, 0)
    assert verdict.text == "process 0: DataError: damaged"


def test_an_error_that_another_s_has_caused_ends_with_the_code_of_that_one(
    tmp_path, monkeypatch
):
    """As of a process whose sum failed since the one that had the error is gone."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    watched = watchdog.Watchdog(tmp_path, 5, 5)
    watched._fails(0, {"code": 1, "text": "XlaRuntimeError: connection closed"})
    with pytest.raises(SystemExit) as left:
        watched._carry_out(watchdog.Verdict(5, "process 1: DataError: damaged", 1))
    assert left.value.code == 5 and not watched._over.is_set()
    watched._carry_out(watchdog.Verdict(1, "process 0: its own", 0))
    assert watched._over.is_set()


# Two real processes, whose steps only wait for each other, and limits of two seconds.


def ends(tmp_path: Path, victim: int, how: str, when: int | str = 3):
    """Exit codes, what each said, and seconds since one was hurt."""
    port = dying.free_port()
    calls = [
        (dying.stepping, (port, i, tmp_path, victim, how, when), {}) for i in (0, 1)
    ]
    codes = dying.in_processes(*calls, stopped=victim if how == "stopped" else None)
    passed = time.monotonic() - float((tmp_path / "hurt").read_text())
    return codes, [(tmp_path / f"{i}.log").read_text() for i in (0, 1)], passed


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    "how, words",
    [
        ("killed", "process {} ({}) is gone"),
        ("stopped", "process {} ({}) has not answered for 2 s"),
    ],
)
def test_the_other_process_names_one_that_is_lost(tmp_path, victim, how, words):
    codes, said, passed = ends(tmp_path, victim, how)
    other = 1 - victim
    assert codes[other] == 75 and passed < 2 + SLACK_S
    host = dying.socket.gethostname()
    assert words.format(victim, host) in said[other]
    stacks = (tmp_path / "stacks" / f"{other}.txt").read_text()
    assert "dying.py" in stacks and stacks.splitlines()[-1] in said[other]


def test_both_processes_end_when_one_is_stuck(tmp_path):
    codes, said, passed = ends(tmp_path, 1, "stuck")
    assert codes == [75, 75] and 2 < passed < 2 + SLACK_S
    for words in said:
        assert "no step has ended for 2 s" in words
        assert "is after step 2 for 2 s; the others are after step 3" in words
    stacks = [(tmp_path / "stacks" / f"{i}.txt").read_text() for i in (0, 1)]
    assert "in hurt" in stacks[1] and "in hurt" not in stacks[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_in_one_process_ends_the_other_with_its_code(tmp_path, victim):
    codes, said, passed = ends(tmp_path, victim, "fails")
    assert codes == [5, 5] and passed < SLACK_S
    assert "DataError: a shard is damaged\n" in said[victim]
    assert f"ended by another process: process {victim}" in said[1 - victim]
    assert not (tmp_path / "stacks").exists()


def test_a_bug_in_one_process_ends_the_other_and_has_a_traceback(tmp_path):
    codes, said, _ = ends(tmp_path, 1, "has a bug")
    assert codes == [1, 1]
    assert "Traceback" in said[1] and "RuntimeError: a bug" in said[0]


def test_both_processes_end_when_one_is_stuck_before_its_first_step(tmp_path):
    codes, said, passed = ends(tmp_path, 1, "stuck", "before")
    assert codes == [75, 75] and 4 < passed < 4 + SLACK_S
    host = dying.socket.gethostname()
    for words in said:
        assert (
            f"process 1 ({host}) is before its first step, loading the model" in words
        )
        assert "the others are after step 0 in its first step" in words
    assert "in hurt" in (tmp_path / "stacks" / "1.txt").read_text()


@pytest.mark.parametrize("when", [0, "save"])
def test_a_slow_compile_or_save_of_one_process_ends_nothing(tmp_path, when):
    assert ends(tmp_path, 1, "takes its time", when)[0] == [0, 0]


# Trainings, with limits of three seconds.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    training.write_frozen(folder / "frozen")
    training.write_photos(folder / "data", train=7, val=2)
    return folder


def train(
    path: Path, folder: Path, *hurt, of: int = 2
) -> tuple[list, list[str], float]:
    port = dying.free_port()
    calls = [
        (whole_runs.watched, (i, port, path, folder, hurt or None, of), {})
        for i in range(of)
    ]
    stopped = hurt[0] if "stopped" in hurt else None
    codes = dying.in_processes(*calls, stopped=stopped)
    said = [path.with_name(f"{path.name}-{i}.log").read_text() for i in range(of)]
    at = path.with_name(f"{path.name}-hurt")
    return codes, said, time.monotonic() - float(at.read_text()) if hurt else 0.0


def goes_on(path: Path, folder: Path, of: int) -> None:
    """The same command ends the run, from its last checkpoint."""
    step = max(locate.kept_steps(path))
    codes, said, _ = train(path, folder, of=of)
    assert codes == [0] * of and f"resumed at step {step}" in said[0]
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == list(
        range(1, whole_runs.TOTAL + 1)
    )


@pytest.mark.parametrize(
    "again", [False, pytest.param(True, marks=pytest.mark.slow, id="and goes on")]
)
def test_a_training_that_lost_a_process_ends(folder, tmp_path, again):
    path = tmp_path / "run"
    codes, said, passed = train(path, folder, 1, "killed", 4)
    assert codes == [75, -9] and passed < 3 + SLACK_S
    assert "process 1 (" in said[0] and "is gone" in said[0]
    if again:
        goes_on(path, folder, of=2)


@pytest.mark.slow  # two light processes above are stopped too
@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_with_a_stopped_process_ends_and_names_it(folder, tmp_path, victim):
    codes, said, passed = train(tmp_path / "run", folder, victim, "stopped", 4)
    other = 1 - victim
    assert codes[other] == 75 and passed < 3 + SLACK_S
    assert f"process {victim} (" in said[other] and "has not answered" in said[other]
    assert "train.py" in (tmp_path / "run" / "stacks" / f"{other}.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how, code", [("stuck", 75), ("fails", 5), ("has a bug", 1)])
def test_a_training_ends_with_a_process_that_does_not_go_on(
    folder, tmp_path, how, code
):
    codes, said, passed = train(tmp_path / "run", folder, 1, how, 4)
    assert codes == [code] * 2 and passed < 3 + SLACK_S
    if how == "stuck":
        assert "process 1 (" in said[0] and "; the others are after step" in said[0]


@pytest.mark.slow
def test_a_training_of_one_process_that_is_stuck_ends_and_goes_on(folder, tmp_path):
    path = tmp_path / "run"
    (code,), (said,), passed = train(path, folder, 0, "stuck", 4, of=1)
    assert code == 75 and 3 < passed < 3 + SLACK_S
    assert "no step has ended for 3 s" in said and "it is after step 3" in said
    assert "in looks" in (path / "stacks" / "0.txt").read_text()
    goes_on(path, folder, of=1)


@pytest.mark.slow  # the light processes above stand still there too
def test_a_training_that_stands_still_before_its_first_step_ends(folder, tmp_path):
    path = tmp_path / "run"
    (code,), (said,), passed = train(path, folder, 0, "stuck", "load", of=1)
    assert code == 75 and 4 < passed < 4 + SLACK_S
    assert "before its first step, loading the model: no sign of life for 4 s" in said
    assert "in load" in (path / "stacks" / "0.txt").read_text()


# The command itself, which JAX's way out of Python belongs to.


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_two_commands_end_together_also_when_one_is_wrong(folder, tmp_path, wrong):
    (tmp_path / "config.py").write_text(
        "from tests import training\n"
        f"get_config = lambda: training.config({str(folder / 'frozen')!r}, "
        "loss='words', cache__dtype='', optim__total_steps=4, eval_every=4)\n"
    )
    port, processes = dying.free_port(), []
    for i in range(2):
        command = [sys.executable, "-m", "minigpt4_jax.train"]
        command += [
            f"--config={tmp_path / 'config.py'}",
            f"--workdir={tmp_path / 'run'}",
        ]
        if wrong and i:
            command += ["--config.data.photos.path=nowhere"]
        values = {
            cluster.COORDINATOR: f"localhost:{port}",
            cluster.PROCESSES: "2",
            cluster.PROCESS: str(i),
        }
        with open(tmp_path / f"{i}.log", "w") as log:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=os.environ | values, stderr=log)
            )
    codes = [process.wait(120) for process in processes]
    said = [(tmp_path / f"{i}.log").read_text() for i in range(2)]
    assert codes == ([DataError.exit_code] * 2 if wrong else [0, 0]), said
    if wrong:
        assert "nowhere" in said[1].splitlines()[-1]
        assert "ended by another process: process 1" in said[0]
    else:
        assert "step 4 " in said[0] and "step 4 " not in said[1]
