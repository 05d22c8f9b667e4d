r"""Warm start of the demo's connector: name the words of the captions, no decoder.

python -m minigpt4_jax.train --config configs/demo_warmup.py --workdir WORK/warmup \
    --config.data.photos.path=DIR/train --config.val=DIR/val

Two cores of a server CPU as two devices (JAX_NUM_CPU_DEVICES=2), 7 minutes: 43.06 nats
a photo on val. This is the run that ships.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.checkpoint = "demo-frozen"  # `python -m convert demo --no-connector` makes it
    cfg.init = ""  # nothing comes before: random trainables
    cfg.trainable = (r"qformer/.*", r"projector/.*")
    cfg.loss = "words"  # words | captions | dialogues | descriptions
    cfg.data = dict(photos=dict(path="", weight=1))
    cfg.val = ""  # data set whose loss is logged; empty: none
    cfg.text = dict(
        clean="",  # blip: as the reference cleans captions of stage 1
        limit=0,  # tokens of an answer; 0: as many as the row has
        captions="all",  # of a photo, as branches that share its image | one: drawn
        words_least=10,  # captions a word must be in to be asked for, warm start only
        one_sentence=0.6,  # share of photos only described, dialogues only
    )
    cfg.batch_size = 16  # photos a step, each with the words of all its captions
    cfg.row = dict(
        tokens=80,  # most that a photo and its texts may take
        answers=48,  # of them to be predicted
        packed=0,  # tokens of a row that several photos share; 0: a row each
    )
    cfg.cache = dict(dtype="float16", folder="")  # the ViT's patches; empty: in workdir
    cfg.optim = dict(
        schedule="cosine",  # from the end of the warmup
        peak_lr=2e-4,
        end_lr=2e-5,
        warmup_lr=0.0,
        warmup_steps=60,
        epoch_steps=0,  # of the reference's schedules only
        total_steps=1500,
        decay_rate=1.0,  # of linear_warmup_step_lr only
        b1=0.9,
        b2=0.98,  # few steps: the second moment must not lag behind
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
        accumulate=1,
    )
    cfg.dtype = ""  # float32 | bfloat16; empty: float32 on CPU, else bfloat16
    cfg.quantize = ""  # int8: the frozen decoder in a byte a weight, for memory
    cfg.remat = "none"  # block: recompute activations, for memory
    cfg.loader = dict(workers=0, prefetch=2, limit_s=120, budget=0.01)
    cfg.keep = dict(last=2, every=0)  # checkpoints: the newest, and every so many steps
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
    cfg.eval_every = 250  # steps: loss on 64 photos of val
    return cfg
