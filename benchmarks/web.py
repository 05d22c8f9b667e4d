"""Many chats at once through the page's own protocol, and how soon a stop frees the model.

    python -m benchmarks.web [--checkpoint=demo] [--chats=16]

Each chat uploads a photo, asks twice, and must get what the model says to it alone. An
answer that differs in a near tie (the batch's shape decides the last bit of a sum) is
counted apart from one that belongs to another chat.
"""

import io
import json
import statistics
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from absl import flags
from gradio_client.utils import apply_diff
from PIL import Image

from minigpt4_jax import compilations, errors
from minigpt4_jax.generator import Generator
from minigpt4_jax.request import Sampling
from minigpt4_jax.serving import site
from minigpt4_jax.serving.photos import FOLDER, Album
from minigpt4_jax.serving.turns import Conversation

API = "/gradio_api"
QUESTIONS = ("What is in this photo?", "What is in front of it?")
KNOBS = dict(beams=1, temperature=0.7, max_tokens=40, top_p=0.9, penalty=1.05, seed=0)


class Tab:
    """A browser's tab without its browser: the same requests in the same order."""

    def __init__(self, url: str, auth: tuple[str, str] | None = None):
        self.http = httpx.Client(base_url=url, timeout=300)
        if auth:
            form = {"username": auth[0], "password": auth[1]}
            self.http.post("/login", data=form).raise_for_status()
        self.session = uuid.uuid4().hex[:10]
        config = self.http.get("/config").raise_for_status().json()
        self.functions = {d["api_name"]: d["id"] for d in config["dependencies"]}
        self.photo: dict | None = None

    def upload(self, data: bytes, name: str = "photo.jpg") -> dict:
        """Put a photo where the page has it; what the server calls it."""
        sent = self.http.post(f"{API}/upload", files={"files": (name, data)})
        (path,) = sent.raise_for_status().json()
        meta = {"_type": "gradio.FileData"}
        self.photo = {"path": path, "orig_name": name, "meta": meta}
        return self.photo

    def ask(self, question: str, **knobs) -> Iterator[list[tuple[str, str]]]:
        """(role, text) of the messages as the page shows them, again and again."""
        settings = list((KNOBS | knobs).values())
        return self.press("ask", [None, question, self.photo, *settings])

    def press(
        self, name: str, data: list, event_data: object = None
    ) -> Iterator[list[tuple[str, str]]]:
        """Call a handler that streams."""
        for values in self.values(name, data, event_data):
            yield shown(values[0])

    def join(self, name: str, data: list, event_data: object = None) -> str:
        """Put a call into the line; its id."""
        call = dict(fn_index=self.functions[name], data=data, event_data=event_data)
        call |= dict(session_hash=self.session, trigger_id=None)
        answer = self.http.post(f"{API}/queue/join", json=call)
        return answer.raise_for_status().json()["event_id"]

    def values(self, name: str, data: list, event_data: object = None) -> Iterator:
        """All that a handler gives, as it comes; RuntimeError with what it warned of."""
        mine = self.join(name, data, event_data)
        values, warned = None, []
        query = {"session_hash": self.session}
        with self.http.stream("GET", f"{API}/queue/data", params=query) as stream:
            for line in stream.iter_lines():
                event = json.loads(line[6:]) if line.startswith("data: ") else {}
                kind, output = event.get("msg"), event.get("output") or {}
                if kind == "log":  # of any call of this tab
                    warned.append(event["log"])
                elif kind in ("unexpected_error", "close_stream"):
                    break
                elif event.get("event_id") != mine:
                    continue
                elif kind == "process_generating":
                    known, new = values is not None, output["data"]
                    values = [*map(apply_diff, values, new)] if known else new
                    yield values
                elif kind == "process_completed":
                    if not event["success"]:
                        raise RuntimeError(output.get("error"))
                    if values is None:
                        yield output["data"]
                    break
        if warned:
            raise RuntimeError(warned[-1])

    def stop(self) -> None:
        """Press the stop button."""
        self.call("stop", [])

    def call(self, name: str, data: list) -> list:
        """Call a handler that does not wait in the line."""
        body = dict(fn_index=self.functions[name], data=data, session_hash=self.session)
        answer = self.http.post(f"{API}/run/predict", json=body)
        return answer.raise_for_status().json()["data"]


def shown(messages: list[dict]) -> list[tuple[str, str]]:
    """(role, text) of each message; of a photo "<photo>"."""
    return [
        (m["role"], part.get("text", "<photo>"))
        for m in messages
        for part in m["content"]
    ]


def wanted(generator: Generator, photo, seed: int) -> list[str]:
    """Both answers that a chat should get, from the model alone."""
    conversation = Conversation()
    sampling = Sampling(
        temperature=KNOBS["temperature"],
        max_tokens=KNOBS["max_tokens"],
        top_p=KNOBS["top_p"],
        repetition_penalty=KNOBS["penalty"],
    )
    for question in QUESTIONS:
        turn = conversation.ask(question, photo)
        events = generator.submit([conversation.request(sampling, seed)])
        turn.answer = "".join(event.piece for event in events)
    return [turn.answer for turn in conversation.turns]


def answers(messages: list[tuple[str, str]]) -> list[str]:
    """What was said to each question; the last thing after a question is its note."""
    found: list[list[str]] = []
    for role, text in messages:
        if role == "user" and text != "<photo>":
            found.append([])
        elif role == "assistant":
            found[-1].append(text)
    return ["".join(texts[:-1]) for texts in found]


def chat(url: str, data: bytes, seed: int) -> tuple[list[str], list[float]]:
    """The answers of one chat, and the seconds until each of them began to show."""
    tab = Tab(url)
    tab.upload(data)
    firsts, messages = [], []
    for question in QUESTIONS:
        began, first = time.perf_counter(), None
        for messages in tab.ask(question, seed=seed):
            if first is None and messages[-1][0] == "assistant":
                first = time.perf_counter() - began
        firsts.append(first or time.perf_counter() - began)
    return answers(messages), firsts


def photos(count: int) -> list[bytes]:
    """Files of different photos: the bundled ones, and crops of them."""
    files = sorted(FOLDER.glob("*.jpg"))
    found = []
    for number in range(count):
        with Image.open(files[number % len(files)]) as photo:
            cut = 8 * (number // len(files))
            file = io.BytesIO()
            photo.crop((cut, cut, *photo.size)).save(file, "PNG")
            found.append(file.getvalue())
    return found


def together(url: str, files: list[bytes]) -> tuple[dict, list[float]]:
    """Chats at once: number -> answers of those that came to an end, and all firsts."""
    found, firsts = {}, []

    def run(number: int) -> None:
        found[number], mine = chat(url, files[number], seed=100 * number)
        firsts.extend(mine)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, firsts


def judged(found: dict, alone: dict) -> Counter:
    """How many answers are equal to those alone, belong to another, differ, are lost."""
    counts = Counter(lost=0, mixed=0, differing=0, equal=0)
    for number, wants in alone.items():
        gets = found.get(number, [])
        others = {a for i, texts in alone.items() if i != number for a in texts}
        for turn, want in enumerate(wants):
            if turn >= len(gets):
                counts["lost"] += 1
            elif gets[turn] == want:
                counts["equal"] += 1
            elif gets[turn] in others:
                counts["mixed"] += 1
            else:
                counts["differing"] += 1
    return counts


def seconds_to_free(
    opened: site.Site, data: bytes, end: Callable[["Tab"], None]
) -> float:
    """From `end(tab)` in the middle of a long answer until the model is idle."""
    tab = Tab(opened.url)
    tab.upload(data)
    stream = tab.ask("Describe this image in detail.", max_tokens=300, penalty=1.0)
    heard = (m for m in stream if m[-1][0] == "assistant")
    next(heard)
    reader = threading.Thread(target=list, args=(heard,), daemon=True)
    reader.start()
    began = time.perf_counter()
    end(tab)
    while opened.server.busy:
        time.sleep(0.005)
    took = time.perf_counter() - began
    reader.join(timeout=30)
    return took


def main(argv: list[str]) -> None:
    """Print the counts and the seconds."""
    args = flags.FLAGS
    generator = Generator.load(args.checkpoint, chunk=site.CHUNK)
    site.warm_up(generator)
    files = photos(args.chats)
    with (
        tempfile.TemporaryDirectory() as folder,
        site.Site(generator, checkpoint=args.checkpoint, port=0) as opened,
    ):
        album = Album(generator.model.cfg.vit, Path(folder))
        alone = {}
        for number, data in enumerate(files):
            path = Path(folder, f"{number}.png")
            path.write_bytes(data)
            alone[number] = wanted(generator, album.read(path), seed=100 * number)
        before = compilations.count()
        began = time.perf_counter()
        found, firsts = together(opened.url, files)
        took = time.perf_counter() - began
        counts = judged(found, alone)
        print(f"{args.chats} chats at once, two questions each, {took:.1f} s:")
        print("  " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        print(
            f"  first words after {statistics.median(firsts):.2f} s (median), "
            f"{max(firsts):.2f} s (longest)"
        )
        stops = [seconds_to_free(opened, files[0], Tab.stop) for _ in range(args.stops)]
        print(
            f"a stop frees the model after {statistics.median(stops):.3f} s (median of "
            f"{args.stops}), {max(stops):.3f} s (longest)"
        )
        print(f"compiled meanwhile: {compilations.count() - before}")


def define_flags() -> None:
    """Flags of this command."""
    flags.DEFINE_string("checkpoint", "demo", "a converted model or a training run")
    flags.DEFINE_integer("chats", 16, "chats at once", 1)
    flags.DEFINE_integer("stops", 9, "answers that are stopped", 1)


if __name__ == "__main__":
    errors.run(main, define=define_flags)
