"""Talk about photos in a browser: minigpt4-jax web --checkpoint demo.

Listens on this machine alone (http://127.0.0.1:7860) unless --host or --share say
otherwise; --auth USER:PASS asks for a password. Needs the extra `serve`.
"""

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator

from absl import flags

from minigpt4_jax import errors
from minigpt4_jax.generator import Generator
from minigpt4_jax.pages import WEB

logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM


def main(argv: list[str]) -> None:
    """Read the flags, load the model, open the page until Ctrl-C."""
    args = flags.FLAGS
    if argv[1:]:
        raise errors.InputError(f"web takes flags only, got {argv[1]!r}")
    auth = credentials(args.auth)
    try:
        from minigpt4_jax.serving import site
    except ModuleNotFoundError as error:
        raise errors.InputError(
            f"web needs the extra `serve`, and {error.name} is absent; install it with "
            "pip install 'minigpt4-jax[serve]', or pip install -e '.[serve]' in a clone"
        ) from error
    began = time.perf_counter()
    generator = Generator.load(args.checkpoint, chunk=site.CHUNK)
    site.warm_up(generator)
    logger.info("Model ready after %.1f s.", time.perf_counter() - began)
    if args.host not in ("127.0.0.1", "localhost") and auth is None:
        logger.warning("Anybody who reaches %s may ask; --auth=USER:PASS", args.host)
    with (
        _terminable(),
        site.Site(
            generator,
            checkpoint=args.checkpoint,
            host=args.host,
            port=args.port,
            auth=auth,
            share=args.share,
        ) as opened,
    ):
        print(opened.public_url or opened.url, flush=True)
        logger.info("Ctrl-C ends it.")
        ended = threading.Event()
        searches = threading.Thread(target=site.warm_searches, args=(generator, ended))
        searches.start()
        try:
            opened.wait()
        finally:
            ended.set()
            opened.close()  # first: a program that is being compiled is waited for
            searches.join()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM leaves as Ctrl-C does, so that uploads are deleted; exit code 143."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def credentials(text: str | None) -> tuple[str, str] | None:
    """(user, password) of USER:PASS; the password may have colons."""
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not user or not password:
        raise errors.InputError("--auth: want USER:PASS, neither of them empty")
    return user, password


if __name__ == "__main__":
    WEB.run(main)
