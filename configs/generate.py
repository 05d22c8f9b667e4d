r"""Answering about many photos; greedy, so that a rerun gives the same words.

python -m minigpt4_jax.generate --checkpoint demo --images FOLDER --out answers.jsonl \
    --config configs/generate.py --config.max_tokens=200
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.temperature = 0.0  # 0: greedy, whatever the next two say
    cfg.top_k = 0  # 0: all tokens
    cfg.top_p = 1.0  # 1: all tokens
    cfg.repetition_penalty = 1.0  # over generated tokens only; 1: none
    cfg.max_tokens = 128  # of an answer; decoding costs more memory the larger it is
    cfg.stop = ()  # strings that end an answer, besides the template's own
    cfg.seed = 0  # of every photo's answer; no effect when greedy
    cfg.batch_size = 16  # answers decoded together
    cfg.chunk = 8  # tokens between two looks of the host
    cfg.dtype = ""  # float32 | bfloat16; empty: float32 on CPU, else bfloat16
    return cfg
