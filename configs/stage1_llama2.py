r"""Stage 1 of MiniGPT-4 with Llama-2 7B: align on captions, no prompt.

python -m minigpt4_jax.train --config configs/stage1_llama2.py --workdir WORK/stage1 \
    --config.data.laion.path=DIR/laion_dataset \
    --config.data.cc_sbu.path=DIR/cc_sbu_dataset

4 A100 of 80 GB, about 10 hours: the reference's figure, not measured here.
The numbers are those of train_configs/minigpt4_llama2_stage1_pretrain.yaml.
`python -m convert model --preset minigpt4_llama2_7b --no-projector` makes the model.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.checkpoint = "minigpt4_llama2_7b"  # folder of `convert model`
    cfg.init = ""  # nothing comes before: a projector is drawn from the seed
    cfg.trainable = (r"projector/.*",)  # all else is frozen
    cfg.loss = "captions"  # words | captions | dialogues | descriptions
    cfg.data = dict(
        laion=dict(path="", weight=115),  # of 129 examples, in each such block
        cc_sbu=dict(path="", weight=14),
    )
    cfg.val = ""  # data set whose loss is logged; empty: none
    cfg.text = dict(
        clean="blip",  # lower case, most punctuation off, 50 words
        limit=32,  # tokens of a caption with its end; a longer one loses the end
        captions="one",  # of an image that has several, drawn
        words_least=10,  # of loss "words" only
        one_sentence=0.75,  # of loss "dialogues" only
    )
    cfg.batch_size = 256  # examples a step: 64 on each of 4 GPUs
    cfg.row = dict(
        tokens=96,  # most of an example: BOS, 64 slots, 31 of its answer's 32
        answers=32,  # most of an example: text.limit
        packed=512,  # tokens of a row that examples share; changes no content
    )
    cfg.cache = dict(
        dtype="",  # bfloat16 if few images are seen often; these would be terabytes
        folder="",  # empty: in the work directory
    )
    cfg.optim = dict(
        schedule="linear_warmup_cosine_lr",  # its cosine spans the run: a jump at 5000
        peak_lr=1e-4,
        end_lr=8e-5,
        warmup_lr=1e-6,  # of the first step
        warmup_steps=5000,
        epoch_steps=5000,  # the warmup counts within an epoch
        total_steps=20_000,  # 4 epochs
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
    cfg.keep = dict(last=2, every=5000)  # checkpoints; the reference keeps each epoch's
    cfg.guard = dict(skipped=10)  # steps in a row that are not finite: stop
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 42
    cfg.log_every = 50  # steps
    cfg.save_every = 500  # steps
    cfg.eval_every = 1000  # steps: loss on 64 examples of val, and sample answers
    return cfg
