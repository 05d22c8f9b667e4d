"""What becomes of each key of the reference's configs: the tables of `convert config`.

The first row that matches a key counts. A key that no row matches is unknown.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minigpt4_jax.data.prompts import CAPTION_END, Template
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models.minigpt4 import MiniGPT4Config

COSINE = "linear_warmup_cosine_lr"
PROCESSORS = ("blip2_image_train", "blip2_image_eval")  # one thing at the HEAD


@dataclass(frozen=True)
class Target:
    """What a config is turned into, as far as the fate of other keys depends on it.

    Args:
        loss: "captions", "dialogues", or "" for a config of the demo.
        datasets: how many the file names.
        warmup, epoch: steps.
        jump: learning rate of the reference right after its warmup.
    """

    preset: MiniGPT4Config
    template: Template
    loss: str
    datasets: int
    cosine: bool = True
    warmup: int = 0
    epoch: int = 0
    jump: float = 0.0

    @property
    def end(self) -> str:
        return self.template.end if self.loss == "dialogues" else CAPTION_END


Same = Callable[[Target, Any], bool]


@dataclass(frozen=True)
class Row:
    """A key (`*`: any name, a last `**`: all below), and what becomes of it.

    Args:
        knob: what takes its value; "" when nothing does.
        fate: what its line in the header says; "" for no line.
        why: the reason, with fields of `t`, the Target.
        same: whether what the trainer does anyway is what the value asks for; then the
            line says so.
    """

    key: str
    knob: str = ""
    fate: str = ""
    why: str = ""
    same: Same = lambda t, value: False


LATER, DROPPED = "not expressible yet", "dropped"


def mapped(key: str, knob: str) -> Row:
    return Row(key, knob)


def dropped(key: str, why: str) -> Row:
    return Row(key, fate=DROPPED, why=why)


def later(key: str, why: str, same: Same | None = None, *, knob: str = "") -> Row:
    return Row(key, knob, LATER, why, same or Row.same)


def equals(*wanted: Any) -> Same:
    return lambda t, value: value in wanted


def _sized(t: Target, value: Any) -> bool:
    return value == t.preset.vit.image_size


MODEL = (
    mapped("model.arch", "checkpoint"),
    mapped("model.model_type", "checkpoint"),
    mapped("model.llama_model", "checkpoint"),
    later("model.vit_model", "{t.preset.name} sees with another", equals("eva_clip_g")),
    dropped("model.q_former_model", "`convert model --qformer` takes the file"),
    later("model.image_size", "{t.preset.name} has one size", _sized),
    later(
        "model.num_query_token",
        "{t.preset.name} has {t.preset.num_slots} image embeddings",
        lambda t, v: t.preset.qformer is None or v == t.preset.num_slots,
    ),
    later(
        "model.has_qformer",
        "{t.preset.name} decides",
        lambda t, v: v == (t.preset.qformer is not None),
    ),
    later("model.drop_path_rate", "the ViT is frozen and drops nothing", equals(0)),
    dropped("model.use_grad_checkpoint", "memory of the ViT, which is frozen"),
    dropped("model.vit_precision", "`convert model --dtype` decides how it is stored"),
    later("model.low_resource", "no 8-bit weights", equals(False)),
    dropped("model.device_8bit", "read with low_resource alone"),
    dropped("model.prompt", "the reference reads it nowhere"),
    dropped(
        "model.ckpt",
        "`convert model --projector` puts it into `checkpoint`; of a run of ours, --config.init",
    ),
)

IMAGES = (
    later(
        "datasets.*.vis_processor.*.name",
        "images are resized to a square, nothing else",
        equals(*PROCESSORS),
    ),
    later("datasets.*.vis_processor.*.image_size", "{t.preset.name} has one", _sized),
    dropped("datasets.*.vis_processor.*.min_scale", "the reference no longer uses it"),
    dropped("datasets.*.vis_processor.*.max_scale", "the reference no longer uses it"),
    later("datasets.*.vis_processor.*.mean", "the preset has its own", equals(None)),
    later("datasets.*.vis_processor.*.std", "the preset has its own", equals(None)),
)

TRAIN_MODEL = (
    mapped("model.max_txt_len", "row"),
    later(
        "model.freeze_vit",
        "training reads features that the ViT made once; it will refuse the pattern",
        equals(True),
        knob="trainable",
    ),
    mapped("model.freeze_qformer", "trainable"),
    later(
        "model.prompt_path",
        "questions come from data/demo_texts.py, the reference's four among them",
        equals(None, ""),
        knob="loss",
    ),
    later(
        "model.prompt_template",
        "{t.preset.name} has the template {t.template.training!r}",
        lambda t, v: t.loss == "captions" or v == t.template.training,
    ),
    later(
        "model.end_sym",
        "answers here end in {t.end!r}",
        lambda t, v: v == t.end,
    ),
)

TRAIN_DATA = (
    mapped("datasets.*.batch_size", "batch_size"),
    later(
        "datasets.*.sample_ratio",
        "--data is one data set; mix with numbers of shards",
        lambda t, v: t.datasets == 1,
    ),
    later("datasets.*", "--data is the data set"),
    dropped("datasets.*.type", "chooses a file of defaults for a data set; see --data"),
    later("datasets.*.data_type", "--data has images", equals("images")),
    later("datasets.*.build_info.**", "--data is the folder of shards"),
    dropped(
        "datasets.cc_sbu_align.text_processor.**",
        "the reference does not apply it to this data set",
    ),
    later("datasets.*.text_processor.**", "captions are read as they are, not cleaned"),
)

TRAIN_RUN = (
    later(
        "run.task", "training is on captions of images", equals("image_text_pretrain")
    ),
    later(
        "run.lr_sched",
        "the cosine here starts after the warmup, at its peak; there it spans the run "
        "and jumps to {t.jump:.6e} at step {t.warmup}",
    ),
    later(
        "run.lr_decay_rate",
        "no schedule but a cosine",
        lambda t, v: t.cosine or v is None,
    ),
    mapped("run.init_lr", "optim.peak_lr"),
    mapped("run.min_lr", "optim.end_lr"),
    later("run.warmup_lr", "the warmup here starts from 0", equals(0)),
    later(
        "run.warmup_steps",
        "there the warmup starts again every {t.epoch} steps, here it does not",
        lambda t, v: t.warmup <= t.epoch,
        knob="optim.warmup_steps",
    ),
    mapped("run.weight_decay", "optim.weight_decay"),
    mapped("run.beta2", "optim.b2"),
    mapped("run.max_epoch", "optim.total_steps"),
    mapped("run.iters_per_epoch", "optim.total_steps"),
    mapped("run.batch_size_train", "batch_size"),
    mapped("run.world_size", "batch_size"),
    mapped("run.seed", "seed"),
    mapped("run.log_freq", "log_every"),
    later("run.accum_grad_iters", "every batch is a step", equals(1)),
    later("run.amp", "no float16 autocast, no loss scaler: float32", equals(False)),
    later("run.evaluate", "this config trains", equals(False)),
    later("run.train_splits", "train/ of --data is trained on", equals(["train"])),
    later("run.valid_splits", "val/ of --data is looked at", equals([], None, ["val"])),
    later("run.test_splits", "training has no test split", equals([], None)),
    dropped("run.batch_size_eval", "val is read in batches of batch_size"),
    dropped("run.num_workers", "images become features once, before the first step"),
    dropped("run.output_dir", "--workdir"),
    dropped("run.resume_ckpt_path", "the same command with its --workdir resumes"),
    dropped("run.job_name", "names a page of wandb"),
    dropped("run.wandb_log", "metrics go to metrics.jsonl in --workdir"),
    dropped("run.device", "JAX finds the devices"),
    *(
        dropped(f"run.{name}", "cfg.mesh covers all devices")
        for name in ("distributed", "dist_url", "dist_backend", "gpu", "rank")
    ),
    dropped("run.use_dist_eval_sampler", "cfg.mesh covers all devices"),
)

TRAIN = (*MODEL, *TRAIN_MODEL, *IMAGES, *TRAIN_DATA, *TRAIN_RUN)

EVAL = (
    *MODEL,
    *IMAGES,
    *(dropped(r.key, "of training") for r in (*TRAIN_MODEL, *TRAIN_DATA, *TRAIN_RUN)),
    mapped("evaluation_datasets.*.max_new_tokens", "max_tokens"),
    mapped("evaluation_datasets.*.batch_size", "batch_size"),
    later("evaluation_datasets.*.eval_file_path", "no benchmark files of questions"),
    later("evaluation_datasets.*.img_path", "--images names the folder"),
    later("run.num_beams", "no beam search", equals(1)),
    later("run.length_penalty", "of beam search", equals(1)),
    later("run.min_length", "an answer ends where the model ends it", equals(0, 1)),
    dropped("run.name", "names the output; see --out"),
    dropped("run.save_path", "--out"),
)


def find(rows: Sequence[Row], key: str) -> Row | None:
    """The row of a key; None when it is unknown."""
    return next((row for row in rows if re.fullmatch(_regex(row.key), key)), None)


def check_known(rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Raise one ConfigError that names every unknown key and the nearest known one."""
    lines = []
    for key in keys:
        if find(rows, key) is None:
            near = difflib.get_close_matches(key, [_like(r.key, key) for r in rows], 1)
            lines.append(
                f"{key} ({f'did you mean {near[0]}?' if near else 'none near'})"
            )
    if lines:
        raise ConfigError(
            f"{len(lines)} unknown keys: {', '.join(lines)}; remove them, or write them "
            "as the reference does"
        )


def notes(
    rows: Sequence[Row], given: Mapping[str, Any], values: Mapping[str, Any], t: Target
) -> list[str]:
    """`FATE: KEY = VALUE (why)` for each key that no knob, or not all of it, takes.

    Args:
        given: what the file holds.
        values: that and the defaults of the reference, which are listed only where
            nothing here does what they ask for.
    """
    found = []
    for key, value in values.items():
        row = find(rows, key)
        why, fate = row.why.format(t=t), row.fate
        if fate == LATER and row.same(t, value):
            fate, why = ("" if row.knob else "same here"), ""
        if fate and (key in given or fate == LATER):
            default = "" if key in given else ", its default"
            text = ascii(value)  # one line, whatever a file holds
            found.append(f"{fate}: {key} = {text}{default}{f' ({why})' if why else ''}")
    order = (LATER, DROPPED, "same here")
    return sorted(found, key=lambda line: order.index(line.partition(":")[0]))


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*\*", r".+").replace(r"\*", r"[^.]+")


def _like(pattern: str, key: str) -> str:
    """The pattern with the names that a key has in the places of its stars."""
    parts = key.split(".")
    return ".".join(
        parts[i] if "*" in part and i < len(parts) else part
        for i, part in enumerate(pattern.split("."))
    )
