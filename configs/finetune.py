r"""Fine-tune the projector on your own photos and texts, from a trained one.

python -m minigpt4_jax.train --config configs/finetune.py --workdir WORK/mine \
    --config.data.own.path=FOLDER --config.init=minigpt4_vicuna_7b

FOLDER: photos with a KEY.txt or KEY.json beside each, a .csv or .jsonl with columns
image and caption, a folder of tar shards, or the layout of cc_sbu_align. --config.init:
a converted folder, a work directory, or a .pth of the reference.
`python -m minigpt4_jax.data check FOLDER` says what would be read, and left out.
One GPU of 24 GB should do (16 GB are weights); not measured.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.checkpoint = "minigpt4_vicuna_7b"  # folder of `convert model`; demo: small
    cfg.init = ""  # where the projector begins: a folder, a work directory, or a .pth
    cfg.trainable = (r"projector/.*",)  # all else is frozen
    cfg.loss = "descriptions"  # words | captions | dialogues | descriptions
    cfg.data = dict(own=dict(path="", weight=1))
    cfg.val = ""  # data set that is not trained on, to see when to stop; empty: none
    cfg.text = dict(
        clean="",  # texts are learned as they are
        limit=160,  # tokens of an answer with its end; a longer one loses the end
        captions="one",  # of an image that has several, drawn
        words_least=10,  # of loss "words" only
        one_sentence=0.75,  # of loss "dialogues" only
    )
    cfg.batch_size = 12  # examples a step
    cfg.row = dict(
        tokens=250,  # most of an example: image, question and answer
        answers=160,  # most of an example: text.limit
        packed=0,  # tokens of a row that examples share; 0: a row each
    )
    cfg.cache = dict(
        dtype="float32",  # what is frozen is made once, 98 KB an image; "": every time
        folder="",  # empty: in the work directory
    )
    cfg.optim = dict(
        schedule="cosine",  # from the end of a warmup from 0
        peak_lr=3e-5,  # of the reference's stage 2
        end_lr=3e-6,
        warmup_lr=0.0,  # of the reference's schedules only
        warmup_steps=40,
        epoch_steps=0,  # of them too
        total_steps=400,  # 4800 examples: ten times through 480 photos
        decay_rate=1.0,  # of linear_warmup_step_lr only
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,  # of kernels; biases do not decay
        clip_norm=1.0,  # a few odd examples must not undo the rest
        accumulate=1,  # parts of a batch, one after the other, for memory
    )
    cfg.dtype = ""  # float32 | bfloat16; empty: float32 on CPU, else bfloat16
    cfg.remat = "block"  # recompute activations, for memory | none
    cfg.loader = dict(
        workers=2,  # processes of each host
        prefetch=2,  # batches
        limit_s=120,  # seconds that a batch may take until workers are started anew
        budget=0.01,  # share of examples that may be unreadable
    )
    cfg.keep = dict(last=2, every=100)  # checkpoints: the newest, and each 100 steps'
    cfg.guard = dict(skipped=10)  # steps in a row that are not finite: stop
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 42
    cfg.log_every = 10  # steps
    cfg.save_every = 50  # steps
    cfg.eval_every = 50  # steps: loss on 64 examples of val, and sample answers
    return cfg
