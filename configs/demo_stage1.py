r"""Stage 1 of the demo's connector: align on captions, no prompt.

python -m minigpt4_jax.train --config configs/demo_stage1.py --data DIR \
    --workdir WORK/stage1 --features WORK/features --config.init WORK/warmup

Two cores of a server CPU, 24 minutes beside other work: 2.720 nats a token on val.
The losses were still falling: this is the run that ships, not the best there is.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.checkpoint = "demo-frozen"  # `python -m convert demo --no-connector` makes it
    cfg.init = ""  # work directory of the warm start; empty: random trainables
    cfg.trainable = (r"qformer/.*", r"projector/.*")
    cfg.loss = "captions"  # words: warm start | captions: stage 1 | dialogues: stage 2
    cfg.batch_size = 4  # photos a step, each with three or four of its captions
    cfg.row = dict(tokens=80, answers=48)  # T and A of a photo's row
    cfg.words = dict(least=10)  # captions a word must be in, warm start only
    cfg.dialogues = dict(one_sentence=0.6)  # share of rows, stage 2 only
    cfg.optim = dict(
        peak_lr=3e-4,
        end_lr=1e-4,
        warmup_steps=80,
        total_steps=1800,
        b1=0.9,
        b2=0.98,  # few steps: the second moment must not lag behind
        weight_decay=0.05,
        clip_norm=1.0,
    )
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 0
    cfg.log_every = 10  # steps
    cfg.save_every = 150  # steps
    cfg.eval_every = 450  # steps: loss on 64 photos of val, and sample captions
    return cfg
