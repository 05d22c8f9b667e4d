"""What every test gets: eight virtual devices, no hub, a cache folder of its own."""

import os
import signal
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers when it is imported

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # before the first array


# A shell's background job ignores SIGINT, and so would what tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> Path:
    """$MINIGPT4_JAX_CACHE of the test run, its commands included: never the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MINIGPT4_JAX_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def demo_directory(cache_folder) -> Path:
    """The demo model, converted once a test run, without network, as a user's is."""
    from convert import demo
    from minigpt4_jax import locate

    def refuse(*_):
        raise RuntimeError("the network is not to be used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        return demo.convert(locate.ASSETS)
