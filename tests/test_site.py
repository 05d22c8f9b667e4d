"""The page over HTTP, as a browser asks it, with a tiny model behind it."""

import io
import json
import os
import stat
import threading
import time
import types
from pathlib import Path

import httpx
import PIL.Image
import pytest
import tiny
from gradio import processing_utils

from benchmarks.web import API, KNOBS, Tab, answers, judged, photos, together, wanted
from minigpt4_jax import compilations
from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.request import Event, Usage
from minigpt4_jax.serving import photos as samples
from minigpt4_jax.serving import site
from minigpt4_jax.serving.desk import Desk
from minigpt4_jax.serving.photos import Album
from minigpt4_jax.serving.talks import Talks
from minigpt4_jax.serving.turns import Conversation

HERE = Path(__file__).resolve()
LONG = 250  # tokens: an answer that does not end by itself while a test looks
SETTINGS = [KNOBS[name] for name in KNOBS]


@pytest.fixture(scope="module")
def generator():
    made = Generator(tiny.model(), tiny.tokenizer(), batch_size=4, chunk=3, places=500)
    site.warm_up(made)
    return made


@pytest.fixture(scope="module")
def opened(generator):
    with site.Site(generator, checkpoint="tiny", port=0) as made:
        yield made


@pytest.fixture
def tab(opened):
    return Tab(opened.url)


def png(seed=0) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(tiny.image(seed)).save(file, "PNG")
    return file.getvalue()


def idle_within(opened, seconds) -> bool:
    return holds_within(lambda: not opened.server.busy, seconds)


def holds_within(holds, seconds=60.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(holds())


# Talking


def test_nothing_is_compiled_in_front_of_anybody(tab):
    before = compilations.count()
    photo = tab.upload(png())
    for question in ("Why?", "And then?"):
        list(tab.ask(question, max_tokens=9))
    list(tab.values("look", [photo]))
    assert compilations.count() == before


def test_words_come_piece_by_piece_and_then_a_note(tab):
    tab.upload(png())
    steps = list(tab.ask("Why?", max_tokens=30))
    texts = [step[2][1] for step in steps if len(step) > 2]
    assert [role for role, _ in steps[-1]] == ["user", "user", "assistant", "assistant"]
    assert steps[0] == [("user", "<photo>"), ("user", "Why?")]
    assert len(set(texts)) > 3  # grows as it is decoded
    assert "30 tokens · " in steps[-1][-1][1] and " tokens/s · " in steps[-1][-1][1]


def test_a_second_turn_knows_the_first_and_shows_the_photo_once(tab, generator, opened):
    tab.upload(png(1))
    for question in ("Why?", "And then?"):
        *_, last = tab.ask(question, max_tokens=9)
    assert [text for role, text in last if role == "user"] == [
        *("<photo>", "Why?", "And then?")
    ]


def test_sixteen_chats_at_once_lose_and_mix_no_answer(opened, generator, monkeypatch):
    monkeypatch.setitem(KNOBS, "max_tokens", 12)
    files = photos(16)
    album = Album(tiny.CONFIG.vit, Path(opened.folder))
    alone = {}
    for number, data in enumerate(files):
        path = Path(opened.folder, f"{number}.png")
        path.write_bytes(data)
        alone[number] = wanted(generator, album.read(path), seed=100 * number)
    assert len({text for texts in alone.values() for text in texts}) == 32
    found, firsts = together(opened.url, files)
    assert judged(found, alone) == {"equal": 32, "lost": 0, "mixed": 0, "differing": 0}
    assert len(firsts) == 32


def test_two_tabs_of_one_browser_do_not_mix(opened):
    one, two = Tab(opened.url), Tab(opened.url)
    *_, first = one.ask("Of the first tab?", max_tokens=3)
    *_, second = two.ask("Of the second tab?", max_tokens=3)
    *_, first = one.ask("Again?", max_tokens=3)
    assert [t for r, t in first if r == "user"] == ["Of the first tab?", "Again?"]
    assert [t for r, t in second if r == "user"] == ["Of the second tab?"]


def test_settings_reach_the_model(tab):
    *_, low = tab.ask("Why?", max_tokens=7)
    assert low[-1][1].startswith("7 tokens")
    *_, beams = Tab(str(tab.http.base_url)).ask("Why?", max_tokens=4, beams=2)
    assert beams[-1][1].startswith("4 tokens · ") and "tokens/s" not in beams[-1][1]
    with pytest.raises(RuntimeError):
        list(tab.ask("Why?", temperature=-3))
    with pytest.raises(RuntimeError):
        list(tab.ask("Why?", top_p="much"))


# Buttons


def test_stop_ends_the_answer_within_a_second_and_keeps_what_was_said(opened, tab):
    last: list = []

    def read():
        for messages in tab.ask("Why?", max_tokens=LONG):
            last[:] = messages

    thread = threading.Thread(target=read)
    thread.start()
    assert holds_within(lambda: len(last) > 1)
    began = time.monotonic()
    Tab.stop(_twin(tab))
    assert idle_within(opened, 1.0) and time.monotonic() - began < 1.0
    thread.join(timeout=30)
    assert "stopped" in last[-1][1] and len(last[1][1]) > 0
    *_, more = tab.ask("And now?", max_tokens=3)
    assert len(answers(more)) == 2


def _twin(tab) -> Tab:
    """The same session over another connection, as a browser opens."""
    twin = Tab(str(tab.http.base_url))
    twin.session = tab.session
    return twin


def test_a_closed_tab_frees_the_model(opened, tab):
    beating = threading.Event()

    def beat(client):
        with client.stream("GET", f"{API}/heartbeat/{tab.session}") as stream:
            for _ in stream.iter_lines():
                beating.set()
                return

    # Beams: no piece of the answer is on its way that could notice that nobody hears.
    list(Tab(opened.url).ask("Why?", max_tokens=LONG, beams=2))  # compiles
    long = tab.ask("Why?", max_tokens=LONG, beams=2)
    next(long)
    assert holds_within(lambda: opened.server.busy)
    beat(httpx.Client(base_url=opened.url, timeout=30))  # comes, and leaves
    assert beating.is_set() and idle_within(opened, 5.0)


def test_retry_edit_and_undo_go_back_to_their_turn(tab):
    tab.upload(png(2))
    for question in ("One?", "Two?"):
        *_, said = tab.ask(question, max_tokens=9)
    *_, again = tab.press("retry", [None, *SETTINGS], {"index": 4, "value": ["Two?"]})
    assert again[:4] == said[:4] and again[4] == ("user", "Two?")
    assert again[5:] != said[5:]  # another seed, another answer
    edit = {"index": 1, "value": " ", "previous_value": "One?"}
    with pytest.raises(RuntimeError, match="Type a question"):
        list(tab.press("edit", [None, *SETTINGS], edit))
    edit = {"index": 1, "value": "Three?", "previous_value": "One?"}
    *_, edited = tab.press("edit", [None, *SETTINGS], edit)
    assert [t for r, t in edited if r == "user"] == ["<photo>", "Three?"]
    ((messages, box, _),) = tab.values("undo", [None], {"index": 1, "value": "Three?"})
    assert messages == [] and box["value"] == "Three?"


def test_reset_forgets_all_also_in_the_middle_of_an_answer(opened, tab):
    steps = tab.ask("Why?", max_tokens=LONG)
    next(steps)
    heard: list = []
    thread = threading.Thread(target=lambda: heard.extend(steps))
    thread.start()
    assert _twin(tab).call("reset", [None])[0] == []
    assert idle_within(opened, 1.0)
    thread.join(timeout=30)
    assert heard[-1] == []  # the last word of who was interrupted
    *_, fresh = tab.ask("Anew?", max_tokens=3)
    assert [t for r, t in fresh if r == "user"] == ["Anew?"]


def test_an_example_begins_a_new_chat_about_its_photo(tab):
    list(tab.ask("Before?", max_tokens=3))
    chosen = {"index": 2, "value": None}
    photo, credit, messages, box, _ = _select(tab, chosen)
    assert messages == [] and box["value"].endswith(("?", "."))
    assert "CC BY 2.0" in str(credit)
    assert tab.http.get(f"{API}/file={photo['path']}").status_code == 200


def _select(tab, event):
    body = dict(fn_index=tab.functions["example"], data=[None], event_data=event)
    body["session_hash"] = tab.session
    return tab.http.post(f"{API}/run/predict", json=body).json()["data"]


def test_where_it_looks_is_a_picture_of_the_photos_shape(tab):
    photo = tab.upload(png(3))
    ((seen, _),) = tab.values("look", [photo])
    data = tab.http.get(f"{API}/file={seen['path']}").content
    with PIL.Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (15, 9)


# What goes wrong


@pytest.mark.parametrize(
    "question, data, warning",
    [
        ("Why?", b"this is no photo", "Image: not an image, or damaged; want JPEG"),
        ("  ", None, "Type a question first"),
        ("x" * 9000, None, "9,000 characters"),
        ("Why? " * 200, None, "the model reads 512|places=500"),
    ],
)
def test_what_cannot_be_answered_is_told_and_changes_nothing(
    tab, question, data, warning
):
    list(tab.ask("Before?", max_tokens=3))
    if data:
        tab.upload(data, "photo.jpg")
    with pytest.raises(RuntimeError, match=warning):
        list(tab.ask(question, max_tokens=3))
    tab.photo = None
    *_, last = tab.ask("After?", max_tokens=3)
    assert [t for r, t in last if r == "user"] == ["Before?", "After?"]


def test_a_second_question_while_an_answer_comes_is_refused(opened, tab):
    steps = tab.ask("Why?", max_tokens=LONG)
    next(steps)
    _twin(tab).join("ask", [None, "Impatient?", None, *SETTINGS])
    heard: list = []
    with pytest.raises(RuntimeError, match="still on its way"):
        heard.extend(steps)
    assert len(answers(heard[-1])) == 1  # the first one goes on


@pytest.fixture
def desk(opened):
    return Desk(Talks(opened.server), Album(tiny.CONFIG.vit, Path(opened.folder)), None)


ME = types.SimpleNamespace(session_hash="me")


def test_a_refused_question_leaves_its_words_and_the_stop_button(desk):
    with desk.talks.turn("me"):
        ((_, box, _),) = desk.ask(Conversation(), "Impatient?", None, *SETTINGS, ME)
    assert box == {"value": "Impatient?", "__type__": "update"}


def test_an_answer_stopped_before_its_first_word_is_taken_back(desk, monkeypatch):
    spent = Usage(9, 0, 0.0, 1.0, 0)
    stopped = [Event("a", finish_reason="cancelled", usage=spent)]
    conversation = Conversation()
    short = list((KNOBS | dict(max_tokens=3)).values())
    list(desk.ask(conversation, "One?", None, *short, ME))
    monkeypatch.setattr(Talks, "_events", lambda *_: iter(stopped))
    *_, (messages, box, _) = desk.ask(conversation, "Two?", None, *SETTINGS, ME)
    assert [turn.question for turn in conversation.turns] == ["One?"]
    assert messages == conversation.shown()[0] and conversation.asked == 1
    assert box["value"] == "Two?" and not box["stop_btn"]


def test_the_warm_up_of_searches_ends_when_the_page_does():
    ended, cancelled, submitted = threading.Event(), threading.Event(), []

    def submit(requests):
        submitted.extend(requests)
        ended.set()  # in the middle of the first search
        assert cancelled.wait(30)
        return iter(())

    def cancel(request_id):
        if request_id == submitted[0].id:
            cancelled.set()

    model = types.SimpleNamespace(cfg=tiny.CONFIG)
    fake = types.SimpleNamespace(model=model, submit=submit, cancel=cancel)
    site.warm_searches(fake, ended)
    assert len(submitted) == 1


def test_a_full_line_is_told_in_friendly_words(opened, tab, monkeypatch):
    monkeypatch.setattr(opened.server, "_waiting", 0)
    # A server without room refuses n > waiting as wrong; as busy only a full line.
    monkeypatch.setattr(opened.server, "submit", _busy)
    with pytest.raises(RuntimeError, match="Many people are asking just now"):
        list(tab.ask("Why?"))


@pytest.mark.parametrize("name", ["retry", "edit"])
def test_a_refused_retry_or_edit_leaves_the_conversation_as_it_was(
    opened, tab, monkeypatch, name
):
    for question in ("One?", "Two?", "Three?"):
        *_, said = tab.ask(question, max_tokens=3)
    event = {"index": 0, "value": "Other?", "previous_value": "One?"}
    with monkeypatch.context() as full:
        full.setattr(opened.server, "submit", _busy)
        with pytest.raises(RuntimeError, match="Many people"):
            list(tab.press(name, [None, *SETTINGS], event))
    too_hot = [*SETTINGS[:1], -3, *SETTINGS[2:]]
    with pytest.raises(RuntimeError):
        list(tab.press(name, [None, *too_hot], event))
    *_, more = tab.ask("Four?", max_tokens=3)
    assert more[: len(said)] == said and len(answers(more)) == 4


def _busy(_):
    from minigpt4_jax.loop import BusyError

    raise BusyError("64 answers wait and 64 may")


def test_a_file_over_the_limit_is_refused(tab):
    too_large = b"\0" * (site.UPLOAD + 1)
    sent = tab.http.post(f"{API}/upload", files={"files": ("a.png", too_large)})
    assert sent.status_code == 413
    sent = tab.http.post(f"{API}/upload", content=iter([b"endless"]))
    assert sent.status_code == 411


# Files of the machine


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """A file that nobody uploaded, and paths of others that every machine has."""
    secret = tmp_path_factory.mktemp("secret") / "key.txt"
    secret.write_text("the secret")
    return [str(secret), "/etc/passwd", "/proc/self/environ", str(HERE), "setup.py"]


DISGUISES = (
    "{path}",
    "/{path}",
    "//{path}",
    "%2F{quoted}",
    "{folder}/../../../../../../../..{path}",
    "{folder}/..%2f..%2f..%2f..%2f..%2f..%2f..{path}",
    "{folder}/....//....//....//....//..{path}",
    "{photo}/../../../../../../..{path}",
    "{samples}/../../..{path}",
    "{samples}/..%2f..%2f..%2f..{path}",
    "%252e%252e%252f%252e%252e{path}",
    "..%5c..%5c..%5c{path}",
    "{path}%00.png",
    "{path}?x=.png",
    "./{path}",
    "~/{path}",
    "file://{path}",
    "http://127.0.0.1{path}",
    "\\\\localhost\\share{path}",
)
PREFIXES = (
    *(f"{API}/file=", f"{API}/file/", "/file=", "/file/"),
    *("/static/", "/static/../", "/assets/", "/assets/../../", "/"),
    *(f"{API}/proxy=", f"{API}/proxy=file://", "/proxy=", "/svelte/", "/theme.css/"),
    *(f"{API}/custom_component/a/client/b/", f"{API}/stream/a/b/c/"),
)


def test_no_path_leads_to_a_file_of_the_machine(opened, secrets):
    tab = Tab(opened.url)
    photo = tab.upload(png())["path"]
    asked = 0
    for path in secrets:
        content = Path(path).read_bytes()[:40]
        for prefix in PREFIXES:
            for disguise in DISGUISES:
                end = disguise.format(
                    path=path,
                    quoted=path.replace("/", "%2F"),
                    folder=opened.folder,
                    photo=photo,
                    samples=samples.FOLDER,
                )
                answer = _raw(opened, prefix + end)
                assert not content or content not in answer, prefix + end
                asked += 1
    assert asked == len(secrets) * len(PREFIXES) * len(DISGUISES)
    # The list would find what is open.
    assert png() in _raw(opened, f"{API}/file={photo}")


def _raw(opened, target: str) -> bytes:
    """The answer to a request line exactly as given: clients would tidy it up."""
    import socket

    host, port = opened.url.split("//")[1].strip("/").split(":")
    line = target.replace(" ", "%20").encode()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"GET " + line + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        found = b""
        while piece := connection.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize("key", ["path", "url", "both", "data"])
def test_no_payload_makes_a_file_of_the_machine_a_photo(opened, tab, tmp_path, key):
    """A photo outside the uploads, so that it would be shown if it could be read."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    meta = {"_type": "gradio.FileData"}
    fake = {
        "path": {"path": str(secret), "meta": meta},
        "url": {"path": "", "url": f"file://{secret}", "meta": meta},
        "both": {
            "path": f"{opened.folder}/../../..{secret}",
            "url": f"{opened.url}gradio_api/file={secret}",
            "orig_name": f"../../..{secret}",
            "meta": meta,
        },
        "data": {"path": None, "url": f"data:text/plain,{secret}", "meta": meta},
    }[key]

    def asked():
        return list(tab.ask("Why?", max_tokens=3))

    def looked():
        return list(tab.values("look", [tab.photo]))

    tab.upload(png())  # what a photo of one's own gives
    assert "<photo>" in json.dumps(asked()) and "file=" in json.dumps(looked())
    tab.call("reset", [None])
    tab.photo = fake
    for call in (asked, looked):
        try:
            found = json.dumps(call())
        except (RuntimeError, httpx.HTTPStatusError):
            continue
        assert "<photo>" not in found and "file=" not in found


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_address_is_fetched_for_anybody(tab, monkeypatch, scheme):
    asked = []

    async def get(url, *_, **__):
        asked.append(url)
        return httpx.Response(200, content=png())

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_get", get)
    meta = {"_type": "gradio.FileData"}
    address = {"path": f"{scheme}://8.8.8.8/a.png", "meta": meta}
    for name, data in (
        ("ask", [None, "Why?", address, *SETTINGS]),
        ("ask", [None, address, None, *SETTINGS]),
        ("look", [address]),
    ):
        with pytest.raises(RuntimeError, match="addresses are not fetched"):
            list(tab.values(name, data))
    assert not asked


def test_an_upload_lands_in_the_sites_own_folder_whatever_it_is_called(opened, tab):
    for name in (
        "../../../../tmp/evil.png",
        "/etc/evil.png",
        "..\\evil.png",
        "a\0b.png",
    ):
        path = Path(tab.upload(png(4), name)["path"]).resolve()
        assert path.is_relative_to(Path(opened.folder).resolve())
    assert not Path("/tmp/evil.png").exists() and not Path("/etc/evil.png").exists()


def test_an_uploaded_page_is_no_page(tab):
    path = tab.upload(b"<script>alert(1)</script>", "a.html")["path"]
    headers = tab.http.get(f"{API}/file={path}").headers
    assert headers["content-disposition"].startswith("attachment")
    assert headers["x-content-type-options"] == "nosniff"


def test_the_folder_is_for_nobody_else_and_goes_with_the_site(generator):
    with site.Site(generator, port=0) as made:
        folder = Path(made.folder)
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert not folder.exists()


# Who may ask


def test_it_listens_on_this_machine_alone(opened):
    assert opened.url.startswith("http://127.0.0.1:")
    assert opened.public_url is None


def test_the_environment_opens_nothing(generator, monkeypatch):
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/etc")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    with site.Site(generator, port=0) as made:
        assert made.url.startswith("http://127.0.0.1:") and made.public_url is None
        assert httpx.get(f"{made.url}gradio_api/file=/etc/hosts").status_code == 403


def test_a_password_is_asked_for_everything(generator):
    with site.Site(generator, port=0, auth=("me", "a:b")) as made:
        for path in (
            "config",
            "gradio_api/info",
            "gradio_api/queue/data?session_hash=a",
        ):
            assert httpx.get(made.url + path).status_code == 401
        nobody = httpx.Client(base_url=made.url)
        assert nobody.post(f"{API}/upload", files={"files": b"x"}).status_code == 401
        call = dict(fn_index=1, data=[], session_hash="a")
        assert nobody.post(f"{API}/queue/join", json=call).status_code == 401
        assert nobody.post(f"{API}/call/ask", json={"data": []}).status_code == 401
        wrong = nobody.post("/login", data={"username": "me", "password": "a"})
        assert wrong.status_code == 400
        *_, said = Tab(made.url, auth=("me", "a:b")).ask("Why?", max_tokens=3)
        assert len(answers(said)) == 1


def test_a_port_in_use_is_one_sentence(generator, opened):
    port = int(opened.url.strip("/").rsplit(":", 1)[1])
    with pytest.raises(InputError, match=f"port={port}.*another program"):
        site.Site(generator, port=port)


# What the page asks of others


def test_the_page_names_no_other_host_to_load_anything_from(tab):
    page = tab.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    for link in ("theme.css", "config"):
        assert "fonts.googleapis" not in tab.http.get(f"/{link}").text
    assert "fonts.googleapis" not in page.text and "cdnjs" not in page.text


def test_only_asking_is_an_api(tab):
    info = tab.http.get(f"{API}/info").json()
    assert list(info["named_endpoints"]) == ["/ask"]
