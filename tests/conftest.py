"""What every test gets: eight virtual devices, no hub, a cache folder of its own."""

import fcntl
import gc
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


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """What all workers of this run of tests share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def cache_folder(run_folder) -> Path:
    """$MINIGPT4_JAX_CACHE of the test run, its commands included: never the user's."""
    folder = run_folder / "cache"
    os.environ["MINIGPT4_JAX_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled_once(run_folder) -> None:
    """What one test compiles, no other of this run need, its commands included."""
    knobs = {
        "jax_compilation_cache_dir": str(run_folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_enable_xla_caches": "none",  # else names hold the path
    }
    for name, value in knobs.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def small_process():
    """What a file traced and compiled goes with it: gigabytes, and slow to collect."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def demo_directory(cache_folder, run_folder) -> Path:
    """The demo model, converted once a test run, without network, as a user's is."""
    from convert import demo
    from minigpt4_jax import locate

    def refuse(*_):
        raise RuntimeError("the network is not to be used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        with open(run_folder / "lock", "w") as lock:  # for the other workers
            fcntl.flock(lock, fcntl.LOCK_EX)
            return demo.convert(locate.ASSETS)
