"""python -m convert config FILE.yaml [--options a.b=c ...] > configs/mine.py

A train or eval config of the PyTorch reference -> one of ours on stdout, numbers kept.
What our config cannot say, and what it need not, is listed in its header with reasons.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from convert import config_keys, yaml_files
from convert.config_keys import CLEANER, LATER, STEPS, Target
from convert.config_knobs import eval_knobs, set_names, train_knobs
from minigpt4_jax import run_config
from minigpt4_jax.data.prompts import find_template
from minigpt4_jax.errors import ConfigError, InputError, unknown
from minigpt4_jax.models.minigpt4 import MiniGPT4Config, preset

logger = logging.getLogger(__name__)

# arch/model_type: presets by billions of parameters; the first where nothing tells.
PRESETS = {
    "minigpt4/pretrain_vicuna0": {
        "7": "minigpt4_vicuna_7b",
        "13": "minigpt4_vicuna_13b",
    },
    "minigpt4/pretrain_llama2": {"7": "minigpt4_llama2_7b"},
}
SIZE = r"(?i)(?:^|[^0-9a-z]|vicuna|llama)(\d+)b(?![0-9a-z])"
SCHEDULES = ("linear_warmup_cosine_lr", STEPS)

# What the reference takes where a file says nothing.
DEFAULTS = {
    "model.max_txt_len": 32,
    "model.prompt_path": "",
    "model.prompt_template": "",
    "model.end_sym": "\n",
    "model.freeze_vit": True,
    "model.freeze_qformer": True,
    "run.warmup_steps": 0,
    "run.warmup_lr": -1,
    "run.beta2": 0.999,
    "run.accum_grad_iters": 1,
    "run.amp": False,
    "run.world_size": 1,
    "run.log_freq": 50,
}
REQUIRED = (
    "run.lr_sched",
    "run.init_lr",
    "run.min_lr",
    "run.weight_decay",
    "run.max_epoch",
    "run.iters_per_epoch",
    "run.seed",
)

WIDTH = 88  # of a line
FRESH = {
    "captions": "no model.ckpt: convert with --no-projector, so that one is drawn",
    "descriptions": "no model.ckpt: here stage 2 wants a projector from --config.init",
}

TRAIN_HELP = "minigpt4-jax train --config THIS --workdir DIR"
EVAL_HELP = (
    "minigpt4-jax generate --checkpoint {} --images FOLDER \\\n"
    "    --out answers.jsonl --config THIS"
)


def define_flags() -> None:
    """The flags of `convert config`."""
    flags.DEFINE_multi_string(
        "options", [], "a.b=c overrides the file; again, or a.b=c d.e=f, for more."
    )


def main(argv: list[str]) -> None:
    """Read the flags and print a config."""
    # The reference takes several after one --options; absl leaves them here.
    is_option = [bool(re.match(yaml_files.OPTION, word)) for word in argv[1:]]
    files = [word for word, yes in zip(argv[1:], is_option) if not yes]
    options = [word for word, yes in zip(argv[1:], is_option) if yes]
    if len(files) != 1:
        raise InputError(
            f"convert config wants one FILE.yaml, got {' '.join(files) or 'none'}"
        )
    flagged = flags.FLAGS.options
    if options and len(flagged) > 1:  # in which order is lost, and the last wins
        raise InputError("--options: want all after one --options, or one after each")
    print(convert(Path(files[0]), [*flagged, *options]), end="")


def convert(path: Path, options: list[str]) -> str:
    """The text of our config that does what a config of the reference does."""
    given = yaml_files.read(path, options)
    for section in ("model", "datasets", "run"):
        if section in given or not any(key.startswith(f"{section}.") for key in given):
            got = given.get(section, "nothing")
            raise ConfigError(f"{path}: got {section}: {got!r:.60}, want keys below it")
    trains = any(key in given for key in REQUIRED[1:6])
    rows = config_keys.TRAIN if trains else config_keys.EVAL
    chosen = choose_preset(given)
    config_keys.check_known(rows, list(given))
    values = {**DEFAULTS, **given} if trains else given
    t = target(values, chosen) if trains else _eval_target(chosen)
    listed = config_keys.notes(rows, given, values, t)
    if trains and not given.get("model.ckpt"):
        listed.insert(0, FRESH[t.loss])
    if count := sum(line.startswith(LATER) for line in listed):
        logger.warning("%d of the values: %s; the header lists them", count, LATER)
    if trains:
        knobs, comments = train_knobs(values, t)
        run_config.check(ConfigDict(knobs))
        stage = {"captions": "Stage 1", "descriptions": "Stage 2"}[t.loss]
        title = f"{stage} of {chosen.name}", train_command(knobs)
    else:
        knobs, comments = eval_knobs(values)
        title = f"Answers of {chosen.name}", EVAL_HELP.format(chosen.name)
    return render(*title, listed, knobs, comments)


def choose_preset(given: Mapping[str, Any]) -> MiniGPT4Config:
    """The preset that model.arch, model_type and the name of the LLaMA mean."""
    kind = f"{given.get('model.arch')}/{given.get('model.model_type')}"
    if kind not in PRESETS:
        raise ConfigError(unknown("model.arch/model.model_type", kind, PRESETS))
    sizes = PRESETS[kind]
    named = re.findall(SIZE, str(given.get("model.llama_model", "")))
    size = named[-1] if named else next(iter(sizes))
    if size not in sizes:
        raise ConfigError(
            f"model.llama_model: got {given['model.llama_model']!r}, of {size}B; the "
            f"presets of {kind} have {' and '.join(sizes)}B"
        )
    if not named and len(sizes) > 1:
        logger.warning(
            "model.llama_model does not tell the size; %s it is, for another say "
            "--options model.llama_model=13b",
            sizes[size],
        )
    return preset(sizes[size])


def target(values: Mapping[str, Any], chosen: MiniGPT4Config) -> Target:
    """What a train config becomes; also checks what the knobs do not."""
    if absent := [key for key in REQUIRED if values.get(key) is None]:
        raise ConfigError(f"{', '.join(absent)} absent; the reference needs them too")
    if (schedule := values["run.lr_sched"]) not in SCHEDULES:
        raise ConfigError(unknown("run.lr_sched", schedule, SCHEDULES))
    return Target(
        preset=chosen,
        template=find_template(chosen.template),
        loss="descriptions" if values["model.prompt_path"] else "captions",
        clean=_clean(values),
    )


def _eval_target(chosen: MiniGPT4Config) -> Target:
    return Target(chosen, find_template(chosen.template), "")


def _clean(values: Mapping[str, Any]) -> str:
    """text.clean: "blip" where the captions of all data sets are cleaned."""
    names = {
        name != "cc_sbu_align"  # its text_processor is never called
        and values.get(f"datasets.{name}.text_processor.train.name")
        for name in set_names(values)
    }
    return "blip" if names == {CLEANER} else ""


def train_command(knobs: Mapping[str, Any]) -> str:
    """How to train, with what the config leaves open."""
    open_ = [
        f"--config.data.{name}.path=..."
        for name, source in knobs["data"].items()
        if not source["path"]
    ]
    if knobs["loss"] == "descriptions" and not knobs["init"]:
        open_.append("--config.init=...")
    return " \\\n    ".join([TRAIN_HELP, *open_])


def render(
    title: str, command: str, notes: list[str], knobs: Mapping, comments: Mapping
) -> str:
    """A config file; `notes` become comments, a line each."""
    lines = [
        f'r"""{title}, from a config of the PyTorch reference; not measured.\n',
        f'{command}\n"""\n',
        *(f"# {note}" for note in notes),
        *([""] if notes else []),
        "from ml_collections import ConfigDict\n\n",
        "def get_config() -> ConfigDict:",
        "    cfg = ConfigDict()",
    ]
    for name, value in knobs.items():
        lines += _lines(f"    cfg.{name} = ", value, "", name, comments)
    return "\n".join([*lines, "    return cfg", ""])


def _lines(start: str, value: Any, end: str, name: str, comments: Mapping) -> list[str]:
    """Source of a knob, a line for each inner one where ruff would have it so."""
    comment = _comment(comments.get(name))
    line = f"{start}{_code(value)}{end}{comment}"
    long = len(line) > WIDTH or any(key.startswith(f"{name}.") for key in comments)
    if not isinstance(value, dict) or not value or not long:
        return [line]
    indent = " " * (len(start) - len(start.lstrip()))
    inner = (
        line
        for key, v in value.items()
        for line in _lines(f"{indent}    {key}=", v, ",", f"{name}.{key}", comments)
    )
    return [f"{start}dict({comment}", *inner, f"{indent}){end}"]


def _comment(text: str | None) -> str:
    return f"  # {text}" if text else ""


def _code(value: Any) -> str:
    """Source of a value as ruff would write it."""
    if isinstance(value, dict):
        return f"dict({', '.join(f'{k}={_code(v)}' for k, v in value.items())})"
    if isinstance(value, tuple):
        inner = ", ".join(map(_code, value))
        return f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, str):
        assert not {'"', "\\", "\n"} & set(value), value
        return f'r"{value}"' if "*" in value else f'"{value}"'
    return repr(value)
