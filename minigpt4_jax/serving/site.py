"""The page of a model, open on an address until it is closed."""

import os
import socket
import tempfile
import threading
from pathlib import Path

import gradio as gr
import numpy as np
from gradio import processing_utils
from starlette.middleware import Middleware
from uvicorn.config import LOGGING_CONFIG

from minigpt4_jax.errors import InputError
from minigpt4_jax.gaze import Gaze
from minigpt4_jax.generator import Generator
from minigpt4_jax.loop import Server
from minigpt4_jax.request import Request, Sampling, user
from minigpt4_jax.serving import layout
from minigpt4_jax.serving.desk import Desk
from minigpt4_jax.serving.gate import Gate
from minigpt4_jax.serving.photos import FOLDER, Album
from minigpt4_jax.serving.talks import Talks

UPLOAD = 20 * 2**20  # bytes of a photo
CONCURRENCY = 32  # answers streamed at once; the model decodes some and the rest wait
CONTEXT = 2048  # tokens of a conversation that is ready when the page opens
CHUNK = 4  # tokens between two pieces on the page
SESSIONS = 1000  # kept in memory, those used last


class Site:
    """Closed by `close` or by leaving `with`.

    Args:
        checkpoint: the name the model was loaded by, which tells its card.
        host, port: where it listens; port 0 takes a free one.
        auth: (user, password), or None: whoever reaches the address may ask.
        share: a public address of Gradio's, which leads here.

    Attributes:
        url: its address.
        public_url: that of `share`, else None.
        folder: where photos lie until it is closed.
        server: what answers.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        checkpoint: str = "demo",
        host: str = "127.0.0.1",
        port: int = 7860,
        auth: tuple[str, str] | None = None,
        share: bool = False,
    ):
        _fetch_nothing()
        gaze = None if generator.model.qformer is None else Gaze(generator.model)
        # A folder for nobody else: uploads of other programs that use Gradio lie in one
        # that all of them would serve.
        self._folder = tempfile.TemporaryDirectory(prefix="minigpt4_jax_web_")
        self.folder = self._folder.name
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
            os.environ[name] = self.folder
        self.server = Server(generator, waiting=2 * CONCURRENCY)
        album = Album(generator.model.cfg.vit, Path(self.folder))
        self.talks = Talks(self.server)
        context = generator.model.cfg.llama.max_positions
        self.page = layout.page(
            Desk(self.talks, album, gaze),
            card=layout.card_of(generator, checkpoint),
            concurrency=CONCURRENCY,
            max_tokens=min(1024, context // 2),
        )
        try:
            _, self.url, self.public_url = self._launch(host, port, auth, share)
        except OSError as error:
            self.close()
            raise InputError(
                f"--host={host} --port={port}: the page cannot listen there ({error}); "
                "another program may use the port"
            ) from error

    def _launch(self, host, port, auth, share):
        # Its own set-up closes all handlers that are there, absl's with their stream.
        levels = {name: {"level": "INFO"} for name in LOGGING_CONFIG["loggers"]}
        empty: dict = dict(formatters={}, handlers={}, loggers=levels)
        LOGGING_CONFIG.update(incremental=True, **empty)
        return self.page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            auth=auth,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            theme=layout.THEME,
            css_paths=layout.CSS,
            max_file_size=UPLOAD,
            max_threads=2 * CONCURRENCY,
            state_session_capacity=SESSIONS,
            # Given, so that no variable of the environment opens more than this.
            allowed_paths=[str(FOLDER)],
            root_path=os.environ.get("GRADIO_ROOT_PATH", ""),
            app_kwargs={"middleware": [Middleware(Gate)]},
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            num_workers=0,
            inbrowser=False,
            show_error=True,
        )

    def wait(self) -> None:
        """Until the program is interrupted."""
        threading.Event().wait()

    def close(self) -> None:
        """Stop listening and answering; what was uploaded is deleted."""
        if self.page.is_running:
            self.page.close(verbose=False)
        self.server.close()
        self._folder.cleanup()

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def warm_up(generator: Generator, tokens: int = CONTEXT) -> None:
    """Compile what chats of up to `tokens` tokens need, before anybody asks."""
    generator.warm_up(min(tokens, generator.model.cfg.llama.max_positions))
    if generator.model.qformer is not None:
        size = generator.model.cfg.vit.image_size
        Gaze(generator.model).layers(np.zeros((size, size, 3), np.uint8))


def warm_searches(generator: Generator, ended: threading.Event) -> None:
    """Compile beam searches about one photo with the page's first settings, each width.

    In a thread beside the server, whose own would stand still meanwhile, until `ended`.
    """
    size = generator.model.cfg.vit.image_size
    message = user("What is in this photo?", np.zeros((size, size, 3), np.uint8))
    # As many tokens as the page asks for: fewer would compile other shapes.
    requests = [
        Request([message], Sampling(num_beams=beams))
        for beams in range(2, 1 + layout.MOST_BEAMS)
    ]
    done = threading.Event()

    def watch() -> None:
        """A search has no event before its last, so it is ended from beside it."""
        while not done.wait(0.1):
            if ended.is_set():
                for request in requests:
                    generator.cancel(request.id)

    threading.Thread(target=watch, daemon=True).start()
    try:
        for request in requests:
            if ended.is_set():
                return
            list(generator.submit([request]))
    finally:
        done.set()


def _fetch_nothing() -> None:
    """Keep Gradio from downloading the address that a visitor gives for a file.

    It would take any public one, of any size, from this machine.
    """

    def refuse(url: str, cache_dir: str) -> str:
        sentence = "Upload the file: addresses are not fetched."
        raise gr.Error(sentence, print_exception=False)

    async def refuse_later(url: str, cache_dir: str) -> str:
        return refuse(url, cache_dir)

    processing_utils.async_ssrf_protected_download = refuse_later
    processing_utils.ssrf_protected_download = refuse
    processing_utils.save_url_to_cache = refuse


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
