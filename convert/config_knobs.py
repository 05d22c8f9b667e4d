"""Knobs of ours from the values of a reference's config: the arithmetic of `convert config`."""

import keyword
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from convert.config_keys import STEPS, Target, data_path, torch_file
from convert.yaml_files import number, truth, whole
from minigpt4_jax.errors import ConfigError

# Tokens around the slots of the longest prompt of stage 2, template and question, by
# LLaMA's tokenizer; the longest of ALIGNMENT_QUESTIONS is the second.
PROMPT_TOKENS = {"vicuna_v0": 7 + 20, "llama2": 6 + 20}

FOLDERS = {  # that README.md has `convert model` write
    "minigpt4_vicuna_7b": "minigpt4-7b",
    "minigpt4_vicuna_13b": "minigpt4-13b",
    "minigpt4_llama2_7b": "minigpt4-llama2-7b",
}
LARGE = ("minigpt4_vicuna_13b",)  # leaves less of 80 GB to activations
PACKED = 512  # tokens of a row that examples share


def train_knobs(values: Mapping[str, Any], t: Target) -> tuple[dict, dict]:
    """The knobs of run_config.py, and what to say beside each."""
    answers = positive(values, "model.max_txt_len")
    per_gpu, world = batch_size(values), positive(values, "run.world_size")
    parts = positive(values, "run.accum_grad_iters")
    around = PROMPT_TOKENS[t.template.name] if t.loss == "descriptions" else 0
    prompt = 1 + t.preset.num_slots + around
    tokens = prompt + answers - 1
    packed = PACKED if tokens <= PACKED else 0
    epoch = steps(values, "run.iters_per_epoch", parts)
    knobs = dict(
        checkpoint=FOLDERS[t.preset.name],
        init=torch_file(values.get("model.ckpt")),
        trainable=trainable(values, t),
        loss=t.loss,
        data=sources(values),
        val="",
        text=dict(
            clean=t.clean,
            limit=answers,
            captions="one",
            words_least=10,
            one_sentence=0.75,
        ),
        batch_size=per_gpu * world * parts,
        row=dict(tokens=tokens, answers=answers, packed=packed),
        cache=dict(dtype="", folder=""),
        optim=optimizer(values, parts),
        dtype="",
        quantize="",
        remat="block" if t.preset.name in LARGE else "none",
        loader=dict(
            workers=whole({"run.num_workers": 2, **values}, "run.num_workers"),
            prefetch=2,
            limit_s=120,
            budget=0.01,
        ),
        keep=dict(last=2, every=epoch),
        guard=dict(skipped=10),
        watchdog=dict(limit_s=300, other_s=3600, start_s=600),
        mesh=dict(data=0, fsdp=1, tensor=1),
        seed=whole(values, "run.seed"),
        log_every=whole(values, "run.log_freq"),
        save_every=epoch,
        eval_every=epoch,
    )
    accumulated = f" x run.accum_grad_iters {parts}" if parts > 1 else ""
    comments = {
        "checkpoint": "a folder of `convert model`",
        "init": "stage 1: its work directory, a folder, or a .pth"
        if t.loss == "descriptions"
        else "nothing comes before",
        "loss": "captions: no prompt | descriptions: model.prompt_path",
        "data": "weights: sample_ratio; of a folder of shards, all",
        "val": "data set whose loss is logged; empty: none",
        "text.clean": "blip: blip_caption",
        "text.limit": "model.max_txt_len: tokens of an answer with its end",
        "text.captions": "of an image that has several, drawn",
        "text.words_least": 'of loss "words" only',
        "text.one_sentence": 'of loss "dialogues" only',
        "batch_size": f"{per_gpu} a GPU x run.world_size {world}{accumulated}",
        "row": f"of an example: {prompt} + answers - 1",
        "cache": "float32: what is frozen is made once",
        "optim.schedule": "run.lr_sched",
        "optim.peak_lr": "run.init_lr",
        "optim.end_lr": "run.min_lr",
        "optim.epoch_steps": "run.iters_per_epoch",
        "optim.total_steps": "run.max_epoch x run.iters_per_epoch",
        "optim.decay_rate": f"run.lr_decay_rate, of {STEPS} only",
        "optim.b2": "run.beta2",
        "optim.clip_norm": "none, as in the reference",
        "dtype": "float32 | bfloat16; empty: float32 on CPU, else bfloat16",
        "quantize": "int8: the frozen decoder in a byte a weight, for memory",
        "remat": "block: recompute activations, for memory",
        "loader.workers": "run.num_workers, here of a host",
        "loader.limit_s": "seconds that a batch may take",
        "loader.budget": "share of examples that may be unreadable",
        "keep": "checkpoints; the reference keeps each epoch's",
        "guard": "steps in a row that are not finite: stop",
        "watchdog": "seconds; then code 75",
        "mesh": "0: all devices that are left",
        "log_every": "steps",
        "save_every": "steps",
        "eval_every": "steps",
    }
    return knobs, comments


def sources(values: Mapping[str, Any]) -> dict[str, dict]:
    """cfg.data: weights in the proportion of sample_ratio, in whole numbers."""
    names = set_names(values)
    keys = {name: f"datasets.{name}.sample_ratio" for name in names}
    given = [name for name in names if values.get(keys[name]) is not None]
    if given and given != names:
        absent = next(name for name in names if name not in given)
        raise ConfigError(
            f"{keys[absent]} absent beside {keys[given[0]]}; want one of each data set, "
            "or none"
        )
    shares = [Fraction(str(number(values, keys[name]))) for name in given]
    if any(share <= 0 for share in shares):
        listed = ", ".join(f"{keys[name]}={values[keys[name]]}" for name in given)
        raise ConfigError(f"{listed}; want ratios above 0, or the data set left out")
    scale = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares] or [1] * len(names)
    return {
        name: dict(
            path=data_path(values.get(f"datasets.{name}.build_info.storage")),
            weight=weight,
        )
        for name, weight in zip(names, weights, strict=True)
    }


def optimizer(values: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """cfg.optim: `parts` batches of the reference are a step."""
    peak, start = number(values, "run.init_lr"), number(values, "run.warmup_lr")
    decay = 1.0
    if values["run.lr_sched"] == STEPS:
        if values.get("run.lr_decay_rate") is None:
            raise ConfigError(f"run.lr_decay_rate absent; {STEPS} needs it")
        decay = number(values, "run.lr_decay_rate")
    epoch = steps(values, "run.iters_per_epoch", parts)
    return dict(
        schedule=values["run.lr_sched"],
        peak_lr=peak,
        end_lr=number(values, "run.min_lr"),
        warmup_lr=min(start, peak) if start >= 0 else peak,
        warmup_steps=steps(values, "run.warmup_steps", parts),
        epoch_steps=epoch,
        total_steps=whole(values, "run.max_epoch") * epoch,
        decay_rate=decay,
        b1=0.9,
        b2=number(values, "run.beta2"),
        eps=1e-8,
        weight_decay=number(values, "run.weight_decay"),
        clip_norm=0.0,
        accumulate=parts,
    )


def steps(values: Mapping[str, Any], key: str, parts: int) -> int:
    """A number of the reference's iterations as steps, of which each has `parts`."""
    count = whole(values, key)
    if count % parts:
        raise ConfigError(
            f"{key}={count}, run.accum_grad_iters={parts}; want a multiple, so that "
            "steps end where the reference's epochs do"
        )
    return count // parts


def positive(values: Mapping[str, Any], key: str) -> int:
    """A whole number from 1."""
    value = whole(values, key)
    if value < 1:
        raise ConfigError(f"{key}: got {value}, want at least 1")
    return value


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
    searched = {"run.min_length": 1, "run.num_beams": 1, "run.length_penalty": 1.0}
    values = {**searched, **values}
    least = whole(values, "run.min_length")
    if len(lengths) > 1:
        raise ConfigError(
            f"evaluation_datasets: max_new_tokens of {sorted(lengths)}; a config here "
            "has one; remove sets, or make them equal with --options"
        )
    knobs = dict(
        temperature=0.0 if sets else 1.0,
        top_k=0 if sets else 50,
        top_p=1.0 if sets else 0.9,
        min_p=0.0,
        repetition_penalty=1.0 if sets else 1.05,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        no_repeat_ngram=0,
        min_tokens=max(0, least - 1),
        max_tokens=lengths.pop() if sets else 300,
        num_beams=positive(values, "run.num_beams"),
        length_penalty=number(values, "run.length_penalty"),
        early_stopping=False,
        banned_ids=(),
        stop_ids=(),
        stop=(),
        seed=0,
        compat="",
        batch_size=min(batches, default=16),
        chunk=8,
        dtype="",
    )
    comments = {
        "temperature": "0: greedy"
        if sets
        else "of the reference's demo, as what follows",
        "top_k": "0: all tokens" if sets else "the demo inherits it from Hugging Face",
        "min_tokens": "of the reference's minimum its dummy first id is one",
        "max_tokens": "of an answer",
        "stop": "strings that end an answer, besides the template's own",
        "batch_size": "answers decoded together; they do not depend on it",
        "chunk": "tokens between two looks of the host",
        "dtype": "float32 | bfloat16; empty: float32 on CPU, else bfloat16",
    }
    return knobs, comments


def set_names(values: Mapping[str, Any]) -> list[str]:
    """Names of the data sets, in the order of the file."""
    keys = (key.split(".") for key in values)
    names = list(dict.fromkeys(key[1] for key in keys if key[0] == "datasets"))
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ConfigError(
                f"datasets.{name}: it becomes a knob; want a name of letters, digits, _"
            )
    return names
