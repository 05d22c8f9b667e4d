r"""Stage 2 of MiniGPT-4: describe in detail, in the chat's own words.

python -m minigpt4_jax.train --config configs/stage2.py --workdir WORK/stage2 \
    --config.data.cc_sbu_align.path=CC_SBU_ALIGN --config.init=WORK/stage1

The numbers of the reference's train_configs/minigpt4{,_llama2}_stage2_finetune.yaml,
its schedule, seed and decay kept, quirks included. Its time, not measured here: about
7 minutes for 400 steps on one A100 of 80 GB. 400 is what the paper says, the config has
1,000 (5 epochs of 200); WORK/stage2@400 is kept. Which one was
published is not known.

Vicuna 7B; configs/stage2.py:13b is for Vicuna 13B, configs/stage2.py:llama2 for Llama-2.
"""

from ml_collections import ConfigDict

# Folders of `convert model --no-projector`, and what differs with the decoder.
MODELS = {
    "7b": dict(checkpoint="minigpt4-7b", tokens=219, remat="none"),
    "13b": dict(checkpoint="minigpt4-13b", tokens=219, remat="block"),
    "llama2": dict(checkpoint="minigpt4-llama2-7b", tokens=250, remat="none"),
}


def get_config(model: str = "7b") -> ConfigDict:
    chosen = MODELS[model]
    cfg = ConfigDict()
    cfg.checkpoint = chosen["checkpoint"]
    cfg.init = ""  # stage 1: a work directory, a converted model, or a .pth; required
    cfg.trainable = (r"projector/.*",)  # all else is frozen
    cfg.loss = "descriptions"  # words | captions | dialogues | descriptions
    cfg.data = dict(  # weight: examples of a source beside those of the others
        cc_sbu_align=dict(path="", weight=1),
    )
    cfg.val = ""  # data set whose loss is logged; empty: none, as the reference
    cfg.text = dict(
        clean="",  # as written; blip would clean as in stage 1
        limit=160,  # tokens of an answer, its end included: max_txt_len
        captions="one",  # of an image, where it has several | all: as branches
        words_least=10,  # of the demo's warm start only
        one_sentence=0.75,  # of the demo's dialogues only
    )
    cfg.batch_size = 12  # examples a step, over all hosts
    cfg.row = dict(
        tokens=chosen[
            "tokens"
        ],  # most of an example: BOS, prompt, image, answer but its last token
        answers=160,  # of them to be predicted
        packed=512,  # most tokens of a row that several examples share; 0: a row each
    )
    # float16 keeps the Q-Former's outputs on disk, 49 kB an image; for Llama-2 the
    # ViT's patches, 724 kB.
    cfg.cache = dict(dtype="", folder="")
    cfg.optim = dict(
        schedule="linear_warmup_cosine_lr",  # its cosine counts from step 0
        peak_lr=3e-5,
        end_lr=1e-5,
        warmup_lr=1e-6,
        warmup_steps=200,
        epoch_steps=200,  # the warmup counts inside an epoch
        total_steps=1000,  # 5 epochs of 200
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
    cfg.keep = dict(last=2, every=200)  # checkpoints: the newest, and every so many
    cfg.guard = dict(skipped=10)  # steps in a row that are not finite: stop
    cfg.watchdog = dict(  # seconds after which a run that stands still ends, code 75
        limit_s=300,  # without the end of a step, or ten median steps if that is longer
        other_s=3600,  # in a part of the start, the first step, an evaluation or a save
        start_s=600,  # until all processes have come
    )
    cfg.mesh = dict(data=0, fsdp=1, tensor=1)  # 0: all devices that are left
    cfg.seed = 42
    cfg.log_every = 50  # steps
    cfg.save_every = 200  # steps
    cfg.eval_every = 200  # steps: sample answers, and the loss on val
    return cfg
