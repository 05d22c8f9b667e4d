r"""Warm start of the demo's connector: name the words of the captions, no decoder.

python -m minigpt4_jax.train --config configs/demo_warmup.py --data DIR \
    --workdir WORK/warmup --features WORK/features

Two cores of a server CPU as two devices (JAX_NUM_CPU_DEVICES=2), 7 minutes: 43.06 nats
a photo on val. This is the run that ships.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.checkpoint = "demo-frozen"  # `python -m convert demo --no-connector` makes it
    cfg.init = ""  # nothing comes before: random trainables
    cfg.trainable = (r"qformer/.*", r"projector/.*")
    cfg.loss = "words"  # words: warm start | captions: stage 1 | dialogues: stage 2
    cfg.batch_size = 16  # photos a step, each with the words of all its captions
    cfg.row = dict(tokens=104, answers=80)  # of the other stages
    cfg.words = dict(least=10)  # captions a word must be in to be asked for
    cfg.dialogues = dict(one_sentence=0.6)  # share of rows, stage 2 only
    cfg.optim = dict(
        peak_lr=2e-4,
        end_lr=2e-5,
        warmup_steps=60,
        total_steps=1500,
        b1=0.9,
        b2=0.98,  # few steps: the second moment must not lag behind
        weight_decay=0.05,
        clip_norm=1.0,
    )
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 0
    cfg.log_every = 10  # steps
    cfg.save_every = 100  # steps
    cfg.eval_every = 250  # steps: loss on 64 photos of val
    return cfg
