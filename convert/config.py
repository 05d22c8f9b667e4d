"""python -m convert config FILE.yaml [--options a.b=c ...] > configs/mine.py

A train or eval config of the PyTorch reference -> one of ours on stdout, numbers kept.
What our config cannot say, and what it need not, is listed in its header with reasons.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from convert import config_keys, yaml_files
from convert.config_keys import COSINE, LATER, Target
from convert.yaml_files import number, truth, whole
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
SCHEDULES = (COSINE, "linear_warmup_step_lr")

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

# Tokens around the slots of the longest prompt of stage 2, template and question, by
# LLaMA's tokenizer; the longest of ALIGNMENT_QUESTIONS is the second.
PROMPT_TOKENS = {"vicuna_v0": 7 + 20, "llama2": 6 + 20}

FRESH = "no model.ckpt: convert with --no-projector, so that one is drawn"

TRAIN_HELP = "python -m minigpt4_jax.train --config THIS --data DIR --workdir DIR"
EVAL_HELP = (
    "python -m minigpt4_jax.generate --checkpoint {} --images FOLDER \\\n"
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
    t = target(values, chosen) if trains else _eval_target(values, chosen)
    listed = config_keys.notes(rows, given, values, t)
    if trains and not given.get("model.ckpt"):
        listed.insert(0, FRESH)
    if count := sum(line.startswith(LATER) for line in listed):
        logger.warning("%d values are %s; the header lists them", count, LATER)
    if trains:
        knobs, comments = train_knobs(values, t)
        run_config.check(ConfigDict(knobs))
        stage = {"captions": "Stage 1", "dialogues": "Stage 2"}[t.loss]
        title = f"{stage} of {chosen.name}", TRAIN_HELP
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
    number(values, "run.warmup_lr")
    peak, end = number(values, "run.init_lr"), number(values, "run.min_lr")
    warmup, epoch = (
        whole(values, "run.warmup_steps"),
        whole(values, "run.iters_per_epoch"),
    )
    total = max(1, whole(values, "run.max_epoch") * epoch)
    return Target(
        preset=chosen,
        template=find_template(chosen.template),
        loss="dialogues" if values["model.prompt_path"] else "captions",
        datasets=_datasets(values),
        cosine=schedule == COSINE,
        warmup=warmup,
        epoch=epoch,
        jump=end + (peak - end) / 2 * (1 + math.cos(math.pi * warmup / total)),
    )


def _eval_target(values: Mapping[str, Any], chosen: MiniGPT4Config) -> Target:
    return Target(chosen, find_template(chosen.template), "", _datasets(values))


def _datasets(values: Mapping[str, Any]) -> int:
    return len({key.split(".")[1] for key in values if key.startswith("datasets.")})


def train_knobs(values: Mapping[str, Any], t: Target) -> tuple[dict, dict]:
    """The knobs of run_config.py, and what to say beside each."""
    epoch, answers = t.epoch, whole(values, "model.max_txt_len")
    per_gpu, world = batch_size(values), whole(values, "run.world_size")
    around = PROMPT_TOKENS[t.template.name] if t.loss == "dialogues" else 0
    prompt = 1 + t.preset.num_slots + around
    knobs = dict(
        checkpoint=t.preset.name,
        init="",
        trainable=trainable(values, t),
        loss=t.loss,
        batch_size=per_gpu * world,
        row=dict(tokens=prompt + answers - 1, answers=answers),
        words=dict(least=10),
        dialogues=dict(one_sentence=0.0),
        optim=dict(
            peak_lr=number(values, "run.init_lr"),
            end_lr=number(values, "run.min_lr"),
            warmup_steps=t.warmup,
            total_steps=whole(values, "run.max_epoch") * epoch,
            b1=0.9,
            b2=number(values, "run.beta2"),
            weight_decay=number(values, "run.weight_decay"),
            clip_norm=0.0,
        ),
        mesh=dict(data=0, fsdp=1, tensor=1),
        seed=whole(values, "run.seed"),
        log_every=whole(values, "run.log_freq"),
        save_every=epoch,
        eval_every=epoch,
    )
    comments = {
        "checkpoint": "a folder of `convert model`",
        "init": "work directory of the stage before; empty: `checkpoint`",
        "loss": "captions: stage 1 | dialogues: with model.prompt_path",
        "batch_size": f"{per_gpu} a GPU x run.world_size {world}; torchrun overrides it",
        "row": f"T: {prompt} + A - 1, A: max_txt_len",
        "words": "warm start only",
        "dialogues": "stage 2; the reference asks for detail",
        "optim.peak_lr": "run.init_lr",
        "optim.end_lr": "run.min_lr",
        "optim.total_steps": f"run.max_epoch x run.iters_per_epoch {epoch}",
        "optim.b2": "run.beta2",
        "optim.clip_norm": "0: none, as the reference",
        "mesh": "0: all devices that are left",
        "log_every": "steps",
        "save_every": "steps: the reference saves after each epoch",
        "eval_every": "steps",
    }
    return knobs, comments


def batch_size(values: Mapping[str, Any]) -> int:
    """Examples of a GPU: each iteration of the reference draws one data set."""
    keys = [k for k in values if re.fullmatch(r"datasets\.[^.]+\.batch_size", k)]
    keys += ["run.batch_size_train"] if "run.batch_size_train" in values else []
    sizes = {key: whole(values, key) for key in keys}
    if len(set(sizes.values())) != 1:
        listed = ", ".join(f"{key}={size}" for key, size in sizes.items())
        raise ConfigError(
            f"batch sizes: got {listed or 'none'}; want one, for instance by --options "
            f"{keys[0] if keys else 'run.batch_size_train'}=64"
        )
    return next(iter(sizes.values()))


def trainable(values: Mapping[str, Any], t: Target) -> tuple[str, ...]:
    """Patterns of what the reference does not freeze."""
    patterns = [] if truth(values, "model.freeze_vit") else ["vit/.*", "ln_vision/.*"]
    if not truth(values, "model.freeze_qformer") and t.preset.qformer is not None:
        patterns.append("qformer/.*")
    return (*patterns, "projector/.*")


def eval_knobs(values: Mapping[str, Any]) -> tuple[dict, dict]:
    """The knobs of configs/generate.py: those of the reference's demo, or, with
    evaluation_datasets, of its greedy `generate`."""
    sets = {key.split(".")[1] for key in values if key.startswith("evaluation_data")}
    lengths = {
        whole({key: 20, **values}, key)
        for key in (f"evaluation_datasets.{name}.max_new_tokens" for name in sets)
    }
    batches = [
        whole(values, key)
        for key in (f"evaluation_datasets.{name}.batch_size" for name in sets)
        if key in values
    ]
    if len(lengths) > 1:
        raise ConfigError(
            f"evaluation_datasets: max_new_tokens of {sorted(lengths)}; a config here "
            "has one; remove sets, or make them equal with --options"
        )
    knobs = dict(
        temperature=0.0 if sets else 1.0,
        top_k=0 if sets else 50,
        top_p=1.0 if sets else 0.9,
        repetition_penalty=1.0 if sets else 1.05,
        max_tokens=lengths.pop() if sets else 300,
        stop=(),
        seed=0,
        batch_size=min(batches, default=16),
        chunk=8,
        dtype="",
    )
    comments = {
        "temperature": "0: greedy"
        if sets
        else "of the reference's demo, as what follows",
        "top_k": "0: all tokens" if sets else "the demo inherits it from Hugging Face",
        "max_tokens": "of an answer",
        "stop": "strings that end an answer, besides the template's own",
        "batch_size": "answers decoded together; they do not depend on it",
        "chunk": "tokens between two looks of the host",
        "dtype": "float32 | bfloat16; empty: float32 on CPU, else bfloat16",
    }
    return knobs, comments


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
        if isinstance(value, dict) and len(value) > 3:
            lines.append(f"    cfg.{name} = dict(")
            for key, inner in value.items():
                comment = comments.get(f"{name}.{key}")
                lines.append(f"        {key}={_code(inner)},{_comment(comment)}")
            lines.append("    )")
        else:
            comment = _comment(comments.get(name))
            lines.append(f"    cfg.{name} = {_code(value)}{comment}")
    return "\n".join([*lines, "    return cfg", ""])


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
