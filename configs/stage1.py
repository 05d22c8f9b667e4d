r"""Stage 1 of MiniGPT-4: align the projector on captions, no prompt.

python -m minigpt4_jax.train --config configs/stage1.py --workdir WORK/stage1 \
    --config.data.laion.path=LAION --config.data.cc_sbu.path=CC_SBU

The numbers of the reference's train_configs/minigpt4{,_llama2}_stage1_pretrain.yaml,
its schedule, seed and decay kept, quirks included. Its time, not measured here: about
10 hours on four A100 of 80 GB.

Vicuna 7B; configs/stage1.py:13b is for Vicuna 13B, configs/stage1.py:llama2 for Llama-2.
"""

from ml_collections import ConfigDict

# Folders of `convert model --no-projector`, and what differs with the decoder.
MODELS = {
    "7b": dict(checkpoint="minigpt4-7b", tokens=64, remat="none"),
    "13b": dict(checkpoint="minigpt4-13b", tokens=64, remat="block"),
    "llama2": dict(checkpoint="minigpt4-llama2-7b", tokens=96, remat="none"),
}


def get_config(model: str = "7b") -> ConfigDict:
    chosen = MODELS[model]
    cfg = ConfigDict()
    cfg.checkpoint = chosen["checkpoint"]
    cfg.init = ""  # empty: a projector drawn at random
    cfg.trainable = (r"projector/.*",)  # all else is frozen
    cfg.loss = "captions"  # words | captions | dialogues | descriptions
    cfg.data = dict(  # weight: examples of a source beside those of the others
        laion=dict(path="", weight=115),
        cc_sbu=dict(path="", weight=14),
    )
    cfg.val = ""  # data set whose loss is logged; empty: none, as the reference
    cfg.text = dict(
        clean="blip",  # lower case, little punctuation, 50 words: blip_caption
        limit=32,  # tokens of an answer, its end included: max_txt_len
        captions="one",  # of an image, where it has several | all: as branches
        words_least=10,  # of the demo's warm start only
        one_sentence=0.75,  # of the demo's dialogues only
    )
    cfg.batch_size = 256  # examples a step, over all hosts: 64 on each of four GPUs
    cfg.row = dict(
        tokens=chosen[
            "tokens"
        ],  # most of an example: BOS, image, caption but its last token
        answers=32,  # of them to be predicted
        packed=512,  # most tokens of a row that several examples share; 0: a row each
    )
    # float16 keeps the Q-Former's outputs on disk, 49 kB an image; for Llama-2 the
    # ViT's patches, 724 kB.
    cfg.cache = dict(dtype="", folder="")
    cfg.optim = dict(
        schedule="linear_warmup_cosine_lr",  # its cosine counts from step 0
        peak_lr=1e-4,
        end_lr=8e-5,
        warmup_lr=1e-6,
        warmup_steps=5000,
        epoch_steps=5000,  # the warmup counts inside an epoch
        total_steps=20_000,  # 4 epochs of 5,000
        decay_rate=1.0,  # of linear_warmup_step_lr only
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,  # kernels alone
        clip_norm=0.0,  # none
        accumulate=1,  # parts of a batch that are computed one after another
    )
    cfg.dtype = ""  # float32 | bfloat16; empty: float32 on CPU, else bfloat16
    cfg.quantize = ""  # int8: the frozen decoder in a byte a weight, for memory
    cfg.remat = chosen["remat"]  # block: recompute activations, for memory | none
    cfg.loader = dict(workers=4, prefetch=2, limit_s=120, budget=0.01)
    cfg.keep = dict(last=2, every=5000)  # checkpoints: the newest, and every so many
    cfg.guard = dict(skipped=10)  # steps in a row that are not finite: stop
    cfg.watchdog = dict(  # seconds after which a run that stands still ends, code 75
        limit_s=300,  # without the end of a step, or ten median steps if that is longer
        other_s=3600,  # in a part of the start, the first step, an evaluation or a save
        start_s=600,  # until all processes have come
    )
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 42
    cfg.log_every = 50  # steps
    cfg.save_every = 500  # steps
    cfg.eval_every = 5000  # steps: sample answers, and the loss on val
    return cfg
