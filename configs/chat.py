r"""Talking about a photo; the sampling is that of the reference's chat.

python -m minigpt4_jax.chat --checkpoint demo --image photo.jpg \
    --config configs/chat.py --config.temperature=0.2
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.temperature = 1.0  # 0: greedy, whatever the next two say
    cfg.top_k = 50  # the reference inherits it from Hugging Face's generate
    cfg.top_p = 0.9  # of the probability that top_k left
    cfg.repetition_penalty = 1.05  # over generated tokens only
    cfg.max_tokens = 300  # of an answer
    cfg.stop = ()  # strings that end an answer, besides the template's own
    cfg.seed = 0  # of the conversation
    cfg.chunk = 4  # tokens between two pieces on the screen
    cfg.dtype = ""  # float32 | bfloat16; empty: float32 on CPU, else bfloat16
    return cfg
