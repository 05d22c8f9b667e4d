"""What becomes of each key of the reference's configs: the tables of `convert config`.

The first row that matches a key counts. A key that no row matches is unknown.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from minigpt4_jax.data.prompts import CAPTION_END, Template
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models.minigpt4 import MiniGPT4Config

STEPS = "linear_warmup_step_lr"
CLEANER = "blip_caption"
PROCESSORS = ("blip2_image_train", "blip2_image_eval")  # one thing at the HEAD


@dataclass(frozen=True)
class Target:
    """What a config is turned into, as far as the fate of other keys depends on it.

    Args:
        loss: "captions", "descriptions", or "" for a config of the demo.
        clean: whether captions are cleaned: "blip", or "".
    """

    preset: MiniGPT4Config
    template: Template
    loss: str
    clean: str = ""

    @property
    def end(self) -> str:
        return self.template.end if self.loss == "descriptions" else CAPTION_END


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
    dropped("model.use_grad_checkpoint", "memory of the ViT; of all, cfg.remat"),
    dropped("model.vit_precision", "`convert model --dtype` decides how it is stored"),
    later(
        "model.low_resource", "8-bit weights are a knob: config.quantize", equals(False)
    ),
    dropped("model.device_8bit", "read with low_resource alone"),
    dropped("model.prompt", "the reference reads it nowhere"),
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
    later(
        "model.ckpt",
        "cfg.init takes a .pth, a work directory or a folder of `convert model`",
        lambda t, v: not v or bool(torch_file(v)),
        knob="init",
    ),
    mapped("model.max_txt_len", "text.limit"),
    mapped("model.freeze_vit", "trainable"),
    mapped("model.freeze_qformer", "trainable"),
    later(
        "model.prompt_path",
        "questions are the four of the reference's prompts/alignment.txt",
        lambda t, v: not v or PurePosixPath(str(v)).name == "alignment.txt",
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
    mapped("datasets.*.sample_ratio", "data"),
    later("datasets.*", "want keys below it", equals(None), knob="data"),
    dropped("datasets.*.type", "chooses a file of defaults; cfg.data has all"),
    later("datasets.*.data_type", "images with texts are read", equals("images")),
    later(
        "datasets.*.build_info.storage",
        "want a folder, a .tar, or FOLDER/{{00000..00009}}.tar",
        lambda t, v: bool(data_path(v)),
        knob="data",
    ),
    later("datasets.*.build_info.**", "the path of a data set says all"),
    dropped(
        "datasets.cc_sbu_align.text_processor.**",
        "the reference does not apply it to this data set",
    ),
    later(
        "datasets.*.text_processor.train.name",
        "captions of all data sets are cleaned by blip_caption, or none",
        lambda t, v: v == CLEANER and t.clean == "blip",
        knob="text.clean",
    ),
    later("datasets.*.text_processor.train.max_words", "50 words", equals(50)),
    later("datasets.*.text_processor.train.prompt", "nothing is added", equals("")),
    dropped("datasets.*.text_processor.eval.**", "of evaluation"),
)

TRAIN_RUN = (
    later(
        "run.task", "training is on captions of images", equals("image_text_pretrain")
    ),
    mapped("run.lr_sched", "optim.schedule"),
    mapped("run.lr_decay_rate", "optim.decay_rate"),
    mapped("run.init_lr", "optim.peak_lr"),
    mapped("run.min_lr", "optim.end_lr"),
    mapped("run.warmup_lr", "optim.warmup_lr"),
    mapped("run.warmup_steps", "optim.warmup_steps"),
    mapped("run.weight_decay", "optim.weight_decay"),
    mapped("run.beta2", "optim.b2"),
    mapped("run.max_epoch", "optim.total_steps"),
    mapped("run.iters_per_epoch", "optim.epoch_steps"),
    mapped("run.batch_size_train", "batch_size"),
    mapped("run.world_size", "batch_size"),
    mapped("run.seed", "seed"),
    mapped("run.log_freq", "log_every"),
    mapped("run.num_workers", "loader.workers"),
    later(
        "run.accum_grad_iters",
        "there gradients add up, and the rate is the last batch's; here it is their "
        "mean, and the first's",
        equals(1),
        knob="optim.accumulate",
    ),
    later(
        "run.amp",
        "float16 with a loss scaler; here bfloat16, which needs none, and float32 on CPU",
        equals(False),
    ),
    later("run.evaluate", "this config trains", equals(False)),
    later("run.train_splits", "a data set is trained on as a whole", equals(["train"])),
    later("run.valid_splits", "cfg.val names a data set of its own", equals([], None)),
    later("run.test_splits", "training has no test split", equals([], None)),
    dropped("run.batch_size_eval", "val is read in batches of batch_size"),
    dropped("run.output_dir", "--workdir"),
    dropped("run.resume_ckpt_path", "the same command with its --workdir resumes"),
    dropped("run.job_name", "names a page of wandb"),
    dropped(
        "run.wandb_log", "WANDB_PROJECT or WANDB_MODE in the environment asks for it"
    ),
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
    dropped("model.ckpt", "`convert model --projector` puts it into a model's folder"),
    *IMAGES,
    *(dropped(r.key, "of training") for r in (*TRAIN_MODEL, *TRAIN_DATA, *TRAIN_RUN)),
    mapped("evaluation_datasets.*.max_new_tokens", "max_tokens"),
    mapped("evaluation_datasets.*.batch_size", "batch_size"),
    later("evaluation_datasets.*.eval_file_path", "no benchmark files of questions"),
    later("evaluation_datasets.*.img_path", "--images names the folder"),
    mapped("run.num_beams", "num_beams"),
    mapped("run.length_penalty", "length_penalty"),
    mapped("run.min_length", "min_tokens"),
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


# Paths: they become text of a Python file, so odd ones are left to their owner.
PLAIN = re.compile(r"[\w./~ ,+@=:-]+", re.ASCII)
SHARDS = re.compile(r"(.*/)?\{\d+\.\.\d+\}\.tar")  # as webdataset numbers them


def data_path(value: Any) -> str:
    """Where a data set of the reference lies, as data/sources.py opens it; or ""."""
    if not isinstance(value, str):
        return ""
    if found := SHARDS.fullmatch(value):
        value = (found[1] or "./").rstrip("/") or "/"
    return value if PLAIN.fullmatch(value) else ""


def torch_file(value: Any) -> str:
    """A checkpoint of the reference as `config.init` takes it; or ""."""
    ends = (".pth", ".pt", ".bin")
    plain = isinstance(value, str) and PLAIN.fullmatch(value)
    return str(value) if plain and value.endswith(ends) else ""


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*\*", r".+").replace(r"\*", r"[^.]+")


def _like(pattern: str, key: str) -> str:
    """The pattern with the names that a key has in the places of its stars."""
    parts = key.split(".")
    return ".".join(
        parts[i] if "*" in part and i < len(parts) else part
        for i, part in enumerate(pattern.split("."))
    )
