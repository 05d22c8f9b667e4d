"""What every test gets: eight virtual devices, no hub, a cache folder of its own."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers when it is imported

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # before the first array


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> Path:
    """$MINIGPT4_JAX_CACHE of the test run, its commands included: never the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MINIGPT4_JAX_CACHE"] = str(folder)
    return folder
