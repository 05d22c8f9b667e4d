"""The one-way import rules (ARCHITECTURE.md), and what `import minigpt4_jax` costs."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import minigpt4_jax

ROOT = Path(__file__).parent.parent
FOLDERS = ("minigpt4_jax", "convert", "configs", "benchmarks", "examples")
OURS = {*FOLDERS, "tests"}
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for name in FOLDERS
    for path in ROOT.glob(f"{name}/**/*.py")
)

NET = {"jax", "flax"}
ERRORS = r"minigpt4_jax\.errors"
REQUEST = r"minigpt4_jax\.request"
MODELS = r"minigpt4_jax\.models\.\w+"
DATA = r"minigpt4_jax\.data\.\w+"
SERVING = r"minigpt4_jax\.serving(\.\w+)?"
PACKAGE = r"minigpt4_jax\.[\w.]+"

# File, packages it may import, modules of ours it may import; the first match wins. A
# file that matches no row needs a room: a row here and a line in ARCHITECTURE.md.
ROOMS = (
    (
        r"minigpt4_jax/__init__",
        set(),
        PACKAGE,
    ),  # names for type checkers; lazy at run time
    (r".*/__init__", set(), r""),
    (r"minigpt4_jax/errors", {"absl"}, r""),
    (r"minigpt4_jax/alive", set(), r""),
    (r"minigpt4_jax/request", set(), rf"{ERRORS}"),
    (r"minigpt4_jax/pages", {"absl", "ml_collections"}, ERRORS),
    (r"minigpt4_jax/cli", set(), rf"{ERRORS}|minigpt4_jax|minigpt4_jax\.pages"),
    (r"minigpt4_jax/(terminal|typed)", set(), r""),
    (r"minigpt4_jax/picture", {"PIL", "numpy"}, r"minigpt4_jax\.terminal"),
    (r"minigpt4_jax/__main__", set(), r"minigpt4_jax\.cli"),
    (r"minigpt4_jax/models/quantised", {"jax", "numpy"}, ERRORS),
    (
        r"minigpt4_jax/models/layers",
        NET,
        rf"{ERRORS}|minigpt4_jax\.models(\.quantised)?",
    ),
    (
        r"minigpt4_jax/models/vit",
        {*NET, "numpy"},
        rf"{ERRORS}|minigpt4_jax\.models\.layers",
    ),
    (
        r"minigpt4_jax/models/(qformer|llama)",
        NET,
        rf"{ERRORS}|minigpt4_jax\.models(\.(layers|quantised))?",
    ),
    (r"minigpt4_jax/models/minigpt4", NET, rf"{ERRORS}|{MODELS}"),
    (r"minigpt4_jax/data/images", {"numpy", "PIL"}, rf"{ERRORS}"),
    (r"minigpt4_jax/data/tokens", {"tokenizers", "sentencepiece"}, rf"{ERRORS}|{DATA}"),
    (
        r"minigpt4_jax/data/(plan|loader\w*|read_ahead)",
        {"absl", "grain", "numpy"},
        rf"{ERRORS}|{DATA}",
    ),
    (
        r"minigpt4_jax/data/__main__",  # a command
        {"absl"},
        rf"{ERRORS}|{DATA}|minigpt4_jax(\.(cli|locate))?",
    ),
    (
        r"minigpt4_jax/data/records",
        {"array_record", "tensorflow_datasets"},
        rf"{ERRORS}|{DATA}",
    ),
    (r"minigpt4_jax/data/(contact_sheet|scan)", {"PIL", "numpy"}, rf"{ERRORS}|{DATA}"),
    (
        r"minigpt4_jax/data/(build|check|pipeline|token_counts)",  # with a bar
        {"numpy", "tqdm"},
        rf"{ERRORS}|{DATA}|minigpt4_jax(\.(alive|locate))?",
    ),
    (
        r"minigpt4_jax/data/\w+",
        {"numpy"},
        rf"{ERRORS}|{REQUEST}|{DATA}",
    ),
    (r"minigpt4_jax/locate", set(), ERRORS),
    (r"minigpt4_jax/sharding", {*NET, "numpy"}, ERRORS),
    (r"minigpt4_jax/optim", {"jax", "optax"}, ERRORS),
    (r"minigpt4_jax/sampling", {"jax", "numpy"}, rf"{ERRORS}|{REQUEST}"),
    (
        r"minigpt4_jax/storage",
        {"numpy", "tqdm"},
        rf"{ERRORS}|{MODELS}|minigpt4_jax\.locate",
    ),
    (
        r"minigpt4_jax/checkpoint",
        {*NET, "numpy", "safetensors"},
        rf"{ERRORS}|{MODELS}|minigpt4_jax|"
        r"minigpt4_jax\.(models|sharding|locate|storage|kept)",
    ),
    (
        r"minigpt4_jax/features",
        {*NET, "numpy", "tqdm"},
        rf"{ERRORS}|{MODELS}|{DATA}|minigpt4_jax|"
        r"minigpt4_jax\.(alive|checkpoint|sharding|storage)",
    ),
    (
        r"minigpt4_jax/step",
        {*NET, "optax"},
        rf"{ERRORS}|{MODELS}|minigpt4_jax\.(optim|sharding)",
    ),
    (r"minigpt4_jax/answer", set(), rf"{ERRORS}|{REQUEST}|{DATA}"),
    (r"minigpt4_jax/compat", set(), rf"{ERRORS}|{DATA}"),
    (
        r"minigpt4_jax/endings",
        set(),
        rf"{REQUEST}|{DATA}|minigpt4_jax|minigpt4_jax\.(answer|compat)",
    ),
    (
        r"minigpt4_jax/decoding",
        {*NET, "numpy"},
        rf"{ERRORS}|{REQUEST}|{MODELS}|minigpt4_jax\.sampling",
    ),
    (r"minigpt4_jax/hypotheses", {"jax"}, r"minigpt4_jax|minigpt4_jax\.sampling"),
    (
        r"minigpt4_jax/beam",
        NET,
        rf"{REQUEST}|{MODELS}|minigpt4_jax\.data\.stops|"
        r"minigpt4_jax|minigpt4_jax\.(decoding|hypotheses|sampling)",
    ),
    (
        r"minigpt4_jax/searches",
        {*NET, "numpy"},
        rf"{REQUEST}|{MODELS}|{DATA}|minigpt4_jax|"
        r"minigpt4_jax\.(answer|beam|compat|hypotheses|pool|reading|sampling)",
    ),
    (
        r"minigpt4_jax/score",
        {*NET, "numpy"},
        rf"{ERRORS}|{REQUEST}|{MODELS}|{DATA}|minigpt4_jax|"
        r"minigpt4_jax\.(compilations|decoding|engine|pool|reading)",
    ),
    (r"minigpt4_jax/lru", set(), r""),
    (r"minigpt4_jax/compilations", {"jax"}, r""),
    (
        r"minigpt4_jax/pool",
        {"jax", "numpy"},
        rf"{MODELS}|minigpt4_jax\.(decoding|sampling)",
    ),
    (
        r"minigpt4_jax/reading",
        {"jax", "numpy"},
        rf"{REQUEST}|{MODELS}|minigpt4_jax\.(decoding|endings|lru|pool|sampling)",
    ),
    (
        r"minigpt4_jax/schedule",
        set(),
        rf"{REQUEST}|minigpt4_jax\.(answer|endings|pool|reading|searches)",
    ),
    (
        r"minigpt4_jax/engine",
        {*NET, "numpy"},
        rf"{ERRORS}|{REQUEST}|{MODELS}|{DATA}|minigpt4_jax|minigpt4_jax\."
        r"(compat|compilations|decoding|endings|pool|reading|schedule|searches)",
    ),
    (r"minigpt4_jax/conversation", set(), rf"{ERRORS}|{REQUEST}|{DATA}"),
    (
        r"minigpt4_jax/generator",
        {"jax"},
        rf"{ERRORS}|{REQUEST}|{MODELS}|{DATA}|"
        r"minigpt4_jax\.(checkpoint|conversation|engine|locate|memory|reading|score)",
    ),
    (
        r"minigpt4_jax/gaze",
        {*NET, "numpy", "PIL"},
        rf"{ERRORS}|{MODELS}|{DATA}",
    ),
    (
        r"minigpt4_jax/loop",
        set(),
        rf"{ERRORS}|{REQUEST}|minigpt4_jax|minigpt4_jax\.(generator|memory|reading)",
    ),
    (
        r"minigpt4_jax/memory",
        {"jax"},
        rf"{ERRORS}|{MODELS}|minigpt4_jax|minigpt4_jax\.(checkpoint|reading)",
    ),
    (r"minigpt4_jax/run_config", set(), ERRORS),
    (
        r"minigpt4_jax/workdir",
        {"jax", "ml_collections", "numpy", "orbax"},
        rf"{ERRORS}|minigpt4_jax|"
        r"minigpt4_jax\.(kept|lines|locate|run_config|sharding|storage)",
    ),
    (r"minigpt4_jax/lines", set(), r"minigpt4_jax|minigpt4_jax\.storage"),
    (
        r"minigpt4_jax/kept",
        set(),
        rf"{ERRORS}|minigpt4_jax|minigpt4_jax\.(locate|storage)",
    ),
    (r"minigpt4_jax/initial", {"jax"}, rf"{ERRORS}|minigpt4_jax\.checkpoint"),
    (r"minigpt4_jax/hlo", {"numpy"}, r""),
    (r"minigpt4_jax/roofline", {"jax"}, r"minigpt4_jax|minigpt4_jax\.hlo"),
    (r"minigpt4_jax/chips", {"jax"}, rf"{ERRORS}|minigpt4_jax\.(flops|hlo)"),
    (
        r"minigpt4_jax/formula",
        {"numpy"},
        rf"{MODELS}|minigpt4_jax|"
        r"minigpt4_jax\.(checkpoint|chips|projection|sharding)",
    ),
    (
        r"minigpt4_jax/projection",
        NET,
        rf"{ERRORS}|{MODELS}|minigpt4_jax|"
        r"minigpt4_jax\.(checkpoint|chips|features|flops|hlo|optim|sharding|step)",
    ),
    (r"minigpt4_jax/flops", {"numpy"}, rf"{MODELS}|minigpt4_jax\.checkpoint"),
    (r"minigpt4_jax/guard", {"jax", "numpy"}, ERRORS),
    (r"minigpt4_jax/cluster", {"jax"}, ERRORS),
    (
        r"minigpt4_jax/watchdog",
        set(),
        rf"{ERRORS}|minigpt4_jax|minigpt4_jax\.(alive|cluster)",
    ),
    (r"minigpt4_jax/(diagnosis|curves)", set(), r""),
    (
        r"minigpt4_jax/progress",  # tensorboardX and wandb only where they are used
        {"PIL", "tensorboardX", "tqdm", "wandb"},
        rf"{ERRORS}|{DATA}",
    ),
    (
        r"minigpt4_jax/stream",
        set(),
        rf"{DATA}|minigpt4_jax\.(flops|sharding)",
    ),
    (
        r"minigpt4_jax/task",
        {"jax", "numpy"},
        rf"{ERRORS}|{REQUEST}|{MODELS}|{DATA}|"
        r"minigpt4_jax\.(step|reading|generator|features|sharding)",
    ),
    (
        r"minigpt4_jax/looks",
        {"jax", "numpy"},
        r"minigpt4_jax\.(diagnosis|progress|sharding|step|task)",
    ),
    (r"minigpt4_jax/serving/gate", set(), r""),
    (
        r"minigpt4_jax/serving/photos",
        {"numpy", "PIL"},
        rf"{ERRORS}|minigpt4_jax\.data\.images",
    ),
    (r"minigpt4_jax/serving/turns", set(), rf"{ERRORS}|{REQUEST}|{SERVING}"),
    (
        r"minigpt4_jax/serving/talks",
        set(),
        rf"{ERRORS}|{REQUEST}|minigpt4_jax\.loop",
    ),
    (
        r"minigpt4_jax/serving/(desk|layout|site)",  # the only ones that know Gradio
        {"gradio", "numpy", "starlette", "uvicorn"},
        rf"{ERRORS}|{REQUEST}|{SERVING}|minigpt4_jax\.data\.images|"
        r"minigpt4_jax\.(gaze|generator|loop)",
    ),
    (r"minigpt4_jax/evaluation/\w+", {"numpy", "absl"}, rf"{ERRORS}|{REQUEST}|{DATA}"),
    (
        r"minigpt4_jax/(train|plan|generate|chat|report|web)",  # commands: anything of ours
        {"jax", "absl", "ml_collections", "tqdm"},
        PACKAGE,
    ),
    (
        r"convert/torch_files",  # the one file of the converter that may
        {"numpy", "ml_dtypes", "torch"},
        rf"{ERRORS}|convert\.tensors",
    ),
    (r"convert/yaml_files", {"yaml"}, ERRORS),
    (
        r"convert/config",
        {"absl", "ml_collections"},
        rf"convert\.\w+|minigpt4_jax|{PACKAGE}",
    ),
    (
        r"convert/\w+",
        {
            *("numpy", "ml_dtypes", "jax", "absl"),
            *("safetensors", "tokenizers", "gguf", "onnx", "google"),
        },
        rf"convert(\.\w+)?|minigpt4_jax|{PACKAGE}",
    ),
    (r"configs/\w+", {"ml_collections"}, r""),
    (
        r"benchmarks/\w+",
        {
            *NET,
            "PIL",
            "numpy",
            "scipy",
            "torch",
            "transformers",
            "llama_cpp",
            "webdataset",
            "gradio_client",
            "httpx",
            "absl",
            "ml_collections",
        },
        rf"benchmarks\.\w+|configs\.\w+|convert\.\w+|tests\.(parity|published)|minigpt4_jax|{PACKAGE}",
    ),
    (r"examples/\w+", {*NET, "numpy", "PIL"}, rf"minigpt4_jax|{PACKAGE}"),
)


def offences(source: str, text: str) -> list[str]:
    """The imports of a file that its room does not allow, or the lack of a room."""
    room = room_of(source)
    if room is None:
        return [f"{source}: no room in ROOMS"]
    _, packages, ours = room
    found = []
    for line, module in imports(text):
        package = module.partition(".")[0]
        if package in OURS:
            allowed = re.fullmatch(ours, module)
        else:
            allowed = package in packages or package in sys.stdlib_module_names
        if not allowed:
            found.append(f"{source}:{line} imports {module}")
    return found


def room_of(source: str) -> tuple | None:
    return next((r for r in ROOMS if re.fullmatch(rf"{r[0]}\.py", source)), None)


def imports(text: str) -> list[tuple[int, str]]:
    """Line and full name of every module imported, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (
                node.module or ""
            )  # a relative one matches no rule
            found += [(node.lineno, _module(base, alias.name)) for alias in node.names]
    return found


def _module(base: str, name: str) -> str:
    """`from base import name` reaches the module base.name where there is one."""
    inner = ROOT / base.replace(".", "/") / name
    is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
    return f"{base}.{name}" if is_module else base


def run_python(code: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_imports_only_what_its_room_may(source):
    assert offences(source, (ROOT / source).read_text()) == []


@pytest.mark.parametrize(
    "source, text",
    [
        ("minigpt4_jax/models/vit.py", "import torch"),
        ("minigpt4_jax/models/vit.py", "from minigpt4_jax.models import llama"),
        ("minigpt4_jax/models/vit.py", "from . import layers"),
        ("minigpt4_jax/models/layers.py", "from minigpt4_jax.sharding import place"),
        ("minigpt4_jax/data/images.py", "def f():\n    import jax.numpy"),
        ("minigpt4_jax/generator.py", "from convert import demo"),
        ("minigpt4_jax/generator.py", "from minigpt4_jax import Request"),
        ("minigpt4_jax/train.py", "import transformers"),
        ("convert/llama.py", "from torch import nn"),
        ("configs/demo_stage1.py", "from minigpt4_jax import optim"),
        ("minigpt4_jax/newcomer/file.py", ""),
    ],
)
def test_an_import_against_the_rules_is_found(source, text):
    assert offences(source, text) != []


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room[0])
def test_a_room_is_no_laxer_than_its_files_need(room):
    files = [s for s in SOURCES if room_of(s) is room]
    found = [module for s in files for _, module in imports((ROOT / s).read_text())]
    assert files and room[1] <= {module.partition(".")[0] for module in found}


def test_only_commands_import_commands():
    commands = {
        source.removesuffix(".py").replace("/", "."): source
        for source in SOURCES
        if re.search(r"^def main\(", (ROOT / source).read_text(), re.MULTILINE)
    }
    assert "minigpt4_jax.train" in commands
    importers = [
        f"{source}:{line} imports {module}"
        for source in SOURCES
        for line, module in imports((ROOT / source).read_text())
        if module in commands
        and source not in commands.values()
        and not source.endswith("/__main__.py")
    ]
    assert importers == []


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent for path in (ROOT / "minigpt4_jax").glob("**/*.py")}
    assert [f for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_import_is_quick_and_starts_no_jax():
    code = """
import json, sys, time
start = time.perf_counter()
import minigpt4_jax
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""
    runs = [run_python(code) for _ in range(3)]
    assert min(run["seconds"] for run in runs) < 0.5
    assert {"jax", "flax", "numpy"}.isdisjoint(runs[0]["modules"])


def test_the_generator_is_imported_within_three_seconds():
    """JAX included, in seconds of CPU: what else the machine does is not counted."""
    code = """
import json, time
from minigpt4_jax import Generator
print(json.dumps(time.process_time()))
"""
    assert min(run_python(code) for _ in range(3)) < 3


def test_the_whole_package_imports_without_network_torch_or_output():
    code = """
import json, pkgutil, socket, sys

def refuse(*args, **kwargs):
    raise RuntimeError("network at import")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse

import minigpt4_jax
names = [m.name for m in pkgutil.walk_packages(minigpt4_jax.__path__, "minigpt4_jax.")]
for name in names:
    __import__(name)
print(json.dumps({"names": names, "modules": sorted(sys.modules)}))
"""
    result = run_python(code)  # anything printed besides would not be JSON
    assert "minigpt4_jax.models.llama" in result["names"]
    heavy = {"torch", "transformers", "tensorflow", "onnx", "gguf", "convert"}
    assert heavy.isdisjoint(result["modules"])


def test_the_package_and_the_converter_can_be_imported_in_one_process():
    """No two of their modules define the same flag."""
    modules = [s.removesuffix(".py").replace("/", ".") for s in SOURCES]
    names = [m for m in modules if re.match(r"(minigpt4_jax|convert)\..*[^_]$", m)]
    code = f"import importlib, json; names = {names}; "
    code += (
        "[importlib.import_module(name) for name in names]; print(json.dumps(names))"
    )
    assert run_python(code) == names
    assert {"convert.connector", "minigpt4_jax.train"} <= set(names)


def test_every_public_name_is_there():
    assert sorted(minigpt4_jax.__all__) == list(minigpt4_jax.__all__)
    assert set(minigpt4_jax.__all__) <= set(dir(minigpt4_jax))
    assert [n for n in minigpt4_jax.__all__ if not hasattr(minigpt4_jax, n)] == []
    with pytest.raises(AttributeError, match="Generatr"):
        _ = minigpt4_jax.Generatr


def test_type_checkers_see_the_public_names():
    text = (ROOT / "minigpt4_jax/__init__.py").read_text()
    checked = [
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("minigpt4_jax")
        for alias in node.names
    ]
    assert sorted(checked) == minigpt4_jax.__all__
    assert (ROOT / "minigpt4_jax/py.typed").exists()


@pytest.mark.parametrize("name", minigpt4_jax.__all__)
def test_the_public_api_is_typed(name):
    for method in public_methods(getattr(minigpt4_jax, name)):
        signature = inspect.signature(method)
        bare = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty
            and parameter.name != "self"
            # The suffix of an array's name says more than an annotation would.
            and not re.search(r"_[A-Z]+$", parameter.name)
        ]
        assert bare == [], f"{method.__qualname__}: {bare}"
        if method.__name__ != "__init__":
            returns = signature.return_annotation
            assert returns is not signature.empty, (
                f"{method.__qualname__}: no return type"
            )


def public_methods(cls: type) -> list:
    """Functions of our own that a caller of a class may call, properties included."""
    members = [(n, getattr(m, "fget", m)) for n, m in inspect.getmembers(cls)]
    return [
        inspect.unwrap(member)
        for name, member in members
        if (not name.startswith("_") or name in ("__init__", "__call__"))
        and inspect.getmodule(inspect.unwrap(member)) is not None
        and inspect.isroutine(member)
        and (inspect.getmodule(member).__name__ or "").startswith("minigpt4_jax")
    ]


def test_architecture_says_what_became_of_every_trap():
    """Forty rows; what is kept, fixed or optional is held by a test that exists."""
    defined = {
        node.name
        for path in ROOT.glob("tests/**/test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert set(re.findall(r"`(test_\w+)`", text)) <= defined
    rows = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 41))
    for number, _, fate, tests in rows:
        word = re.match(r" (kept|fixed|option|not yet)\b", fate)
        assert word, f"trap {number}: {fate}"
        assert "`test_" in tests or word.group(1) == "not yet", (
            f"trap {number}: no test"
        )
