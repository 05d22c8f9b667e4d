r"""Stage 2 of MiniGPT-4 with Llama-2 7B: describe in detail, in the chat's words.

python -m minigpt4_jax.train --config configs/stage2_llama2.py --workdir WORK/stage2 \
    --config.data.cc_sbu_align.path=DIR/cc_sbu_align --config.init=WORK/stage1

1 A100 of 80 GB, about 7 minutes for 400 steps: the reference's figure, not measured.
The numbers are those of train_configs/minigpt4_llama2_stage2_finetune.yaml, which
has 1000 steps; the paper says 400. Which step was published is not known. Step 400 is
kept: `python -m minigpt4_jax.chat --checkpoint WORK/stage2@400`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.checkpoint = "minigpt4_llama2_7b"  # folder of `convert model`
    cfg.init = ""  # stage 1: its work directory, a converted folder, or a .pth
    cfg.trainable = (r"projector/.*",)  # all else is frozen
    cfg.loss = "descriptions"  # words | captions | dialogues | descriptions
    cfg.data = dict(cc_sbu_align=dict(path="", weight=1))
    cfg.val = ""  # data set whose loss is logged; empty: none
    cfg.text = dict(
        clean="",  # descriptions are learned as they are
        limit=160,  # tokens of an answer with its end; a longer one loses the end
        captions="one",  # of an image that has several, drawn
        words_least=10,  # of loss "words" only
        one_sentence=0.75,  # of loss "dialogues" only
    )
    cfg.batch_size = 12  # examples a step
    cfg.row = dict(
        tokens=250,  # most of an example: BOS, 64 slots, 26 of a prompt, 159 of 160
        answers=160,  # most of an example: text.limit
        packed=0,  # tokens of a row that examples share; 0: a row each
    )
    cfg.cache = dict(
        dtype="",  # float32: keep the ViT's patches, 1.4 MB an image
        folder="",  # empty: in the work directory
    )
    cfg.optim = dict(
        schedule="linear_warmup_cosine_lr",  # its cosine spans the run: a jump at 200
        peak_lr=3e-5,
        end_lr=1e-5,
        warmup_lr=1e-6,  # of the first step
        warmup_steps=200,
        epoch_steps=200,  # the warmup counts within an epoch
        total_steps=1000,  # 5 epochs
        decay_rate=1.0,  # of linear_warmup_step_lr only
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,  # of kernels; biases do not decay
        clip_norm=0.0,  # none, as in the reference
        accumulate=1,  # parts of a batch, one after the other, for memory
    )
    cfg.dtype = ""  # float32 | bfloat16; empty: float32 on CPU, else bfloat16
    cfg.remat = "none"  # block: recompute activations, for memory
    cfg.loader = dict(
        workers=4,  # processes of each host
        prefetch=2,  # batches
        limit_s=120,  # seconds that a batch may take until workers are started anew
        budget=0.01,  # share of examples that may be unreadable
    )
    cfg.keep = dict(last=2, every=200)  # checkpoints; the reference keeps each epoch's
    cfg.guard = dict(skipped=10)  # steps in a row that are not finite: stop
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 42
    cfg.log_every = 50  # steps
    cfg.save_every = 200  # steps
    cfg.eval_every = 200  # steps: loss on 64 examples of val, and sample answers
    return cfg
