r"""Talking about a photo; the sampling is that of the reference's chat.

minigpt4-jax chat --checkpoint demo --image photo.jpg \
    --config configs/chat.py --config.temperature=0.2
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    cfg = ConfigDict()
    cfg.temperature = 1.0  # 0: greedy, whatever the next three say
    cfg.top_k = 50  # the reference inherits it from Hugging Face's generate
    cfg.top_p = 0.9  # of the probability that top_k left
    cfg.min_p = 0.0  # least share of the likeliest token's probability; 0: all tokens
    cfg.repetition_penalty = 1.05  # over generated tokens only
    cfg.presence_penalty = 0.0  # taken from the logit of what was generated; 0: none
    cfg.frequency_penalty = 0.0  # the same, for each time it was generated
    cfg.no_repeat_ngram = 0  # no sequence of so many tokens comes twice; 0: any may
    cfg.min_tokens = 0  # before an end token may come
    cfg.max_tokens = 300  # of an answer
    cfg.num_beams = 1  # above 1: beam search, the likeliest answer as a whole, slower
    cfg.length_penalty = 1.0  # of a beam's score: above 0 prefers longer answers
    cfg.early_stopping = False  # True: a search ends with its first num_beams answers
    cfg.banned_ids = ()  # tokens that are never chosen
    cfg.stop_ids = ()  # tokens that end an answer, besides the model's own
    cfg.stop = ()  # strings that end an answer, besides the template's own
    cfg.seed = 0  # of the conversation
    cfg.overflow = "drop_oldest"  # turns without an image; "error": say so and stop
    cfg.compat = ""  # "reference": exactly as the original (minigpt4_jax/compat.py)
    cfg.chunk = 4  # tokens between two pieces on the screen
    cfg.dtype = ""  # float32 | bfloat16; empty: float32 on CPU, else bfloat16
    return cfg
