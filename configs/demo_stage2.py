r"""Stage 2 of the demo's connector: answer questions in the chat's own words.

python -m minigpt4_jax.train --config configs/demo_stage2.py --data DIR \
    --workdir WORK/stage2 --features WORK/features --config.init WORK/stage1

Two cores of a server CPU, 42 minutes beside other work: 2.620 nats a token on val.
Scores are in minigpt4_jax/assets/demo/README.md.
The losses were still falling: this is the run that ships, not the best there is.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.checkpoint = "demo-frozen"  # `python -m convert demo --no-connector` makes it
    cfg.init = ""  # work directory of stage 1
    cfg.trainable = (r"qformer/.*", r"projector/.*")
    cfg.loss = "dialogues"  # words: warm start | captions: stage 1 | dialogues: stage 2
    cfg.batch_size = 4  # photos a step, each with several questions or captions
    cfg.row = dict(tokens=96, answers=60)  # T and A of a photo's row
    cfg.words = dict(least=10)  # captions a word must be in, warm start only
    cfg.dialogues = dict(one_sentence=0.75)  # share of rows that only describe
    cfg.optim = dict(
        peak_lr=2e-4,
        end_lr=1e-5,
        warmup_steps=80,
        total_steps=2600,
        b1=0.9,
        b2=0.98,  # few steps: the second moment must not lag behind
        weight_decay=0.05,
        clip_norm=1.0,
    )
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 1  # not stage 1's: its order would show the photos of stage 1 again
    cfg.log_every = 10  # steps
    cfg.save_every = 130  # steps
    cfg.eval_every = 650  # steps: loss on 64 photos of val, and sample captions
    return cfg
