r"""Teach the projector your own photos: a folder, a CSV or JSONL list, or tar shards.

python -m minigpt4_jax.train --config configs/finetune.py --workdir WORK/own \
    --config.checkpoint=demo --config.init=demo --config.data.own.path=PHOTOS

A folder has a KEY.txt or KEY.json beside each photo; a list has columns, or keys, image
and caption; `python -m minigpt4_jax.data check PHOTOS` says what is read and left out.
Minutes on any machine that can talk with the model: photos pass the frozen towers once.
Not measured: how long to train depends on how much there is to learn from.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.checkpoint = "minigpt4-7b"  # a folder of `convert model`, or "demo"
    cfg.init = ""  # what to go on from, as config.checkpoint itself; required
    cfg.trainable = (r"projector/.*",)  # all else is frozen
    cfg.loss = "descriptions"  # words | captions | dialogues | descriptions
    cfg.data = dict(own=dict(path="", weight=1))  # folder, list or shards
    cfg.val = ""  # data set whose loss is logged; empty: none
    cfg.text = dict(
        clean="",  # as written; blip would clean as in stage 1
        limit=0,  # tokens of an answer, its end included; 0: as many as the row has
        captions="all",  # of an image, as branches that share it | one: drawn
        words_least=10,  # of the demo's warm start only
        one_sentence=0.75,  # of the demo's dialogues only
    )
    cfg.batch_size = 8  # examples a step, over all hosts
    cfg.row = dict(
        tokens=219,  # most of an example: BOS, prompt, image, answer but its last token
        answers=160,  # of them to be predicted
        packed=512,  # most tokens of a row that several examples share; 0: a row each
    )
    # What is frozen before the projector, made once; empty folder: in the workdir.
    cfg.cache = dict(dtype="float16", folder="")
    cfg.optim = dict(
        schedule="cosine",  # from the end of the warmup
        peak_lr=1e-4,
        end_lr=1e-5,
        warmup_lr=0.0,
        warmup_steps=20,
        epoch_steps=0,  # of the reference's schedules only
        total_steps=400,
        decay_rate=1.0,  # of linear_warmup_step_lr only
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,  # kernels alone
        clip_norm=1.0,
        accumulate=1,  # parts of a batch that are computed one after another
    )
    cfg.dtype = ""  # float32 | bfloat16; empty: float32 on CPU, else bfloat16
    cfg.quantize = ""  # int8: the frozen decoder in a byte a weight, for memory
    cfg.remat = "none"  # block: recompute activations, for memory | none
    cfg.loader = dict(workers=2, prefetch=2, limit_s=120, budget=0.01)
    cfg.keep = dict(last=2, every=0)  # checkpoints: the newest, and every so many
    cfg.guard = dict(skipped=10)  # steps in a row that are not finite: stop
    cfg.watchdog = dict(  # seconds after which a run that stands still ends, code 75
        limit_s=300,  # without the end of a step, or ten median steps if that is longer
        other_s=3600,  # in a part of the start, the first step, an evaluation or a save
        start_s=600,  # until all processes have come
    )
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 0
    cfg.log_every = 10  # steps
    cfg.save_every = 100  # steps
    cfg.eval_every = 100  # steps: sample answers, and the loss on val
    return cfg
