"""The original's generation, exactly: `Request(compat="reference")`.

What its `Chat` and Hugging Face's generate (4.28, inputs_embeds) do where we do not:

- A dummy first id, which is no part of the answer, counts for the repetition penalty,
  n-grams and the minimum length, so that a minimum of 1 is none (sampling.py, first_B).
- The end ids are those of the decoder's generation_config: `<s>` for Vicuna v0.
- The chat's stops are sequences of ids, so another spelling of `###` goes on.
- A prompt that does not fit 2,000 tokens with its answer is cut from the left, with BOS,
  system text and images.
- The text is what stands before the first `###` and after the last `Assistant:`, known
  when the answer ends and sent then.
- Beams (beam.py): the dummy counts in lengths, no beam ends by itself but at an end id,
  all of them end when each ends in one of the chat's stops, and with a temperature the
  scores so far are divided by it at each token.

Its stop wants all rows of a batch to end alike; a chat has one row. Its defaults, the
hidden top-k of 50 among them, are those of `Sampling`. Texts of users are still no
markup, and draws come from our keys.
"""

from dataclasses import dataclass

from minigpt4_jax.data.prompts import Template
from minigpt4_jax.errors import InputError

MAX_LENGTH = 2_000  # of prompt and answer, an argument of the original's Chat


@dataclass(frozen=True)
class Rules:
    """Ids of the original for one template's decoder.

    Args:
        first_id: the dummy, bos of its generation_config.
        end_ids: eos of its generation_config.
        stops: sequences of ids that end an answer of the chat.
    """

    first_id: int
    end_ids: tuple[int, ...]
    stops: tuple[tuple[int, ...], ...]


RULES = {
    "vicuna_v0": Rules(first_id=0, end_ids=(1,), stops=((835,), (2277, 29937))),
    "llama2": Rules(first_id=1, end_ids=(2,), stops=((2,),)),
    # Not one of the original's models: as its code would treat SmolLM2.
    "chatml": Rules(first_id=1, end_ids=(2,), stops=((2,),)),
}


def find_rules(template: Template) -> Rules:
    if template.name not in RULES:
        raise InputError(
            f"compat 'reference': the original has no template {template.name!r}, but "
            f"{', '.join(RULES)}; leave compat out"
        )
    return RULES[template.name]


def cut(
    ids: list[int], slots: list[bool], answer: int, context: int
) -> tuple[list[int], list[bool]]:
    """Ids and slots without what stands too far left for an answer of that many tokens.

    A place of an image can lose its first slots.
    """
    fit = min(MAX_LENGTH, context) - answer
    if fit < 1:
        raise InputError(
            f"max_tokens: {answer} leaves no room for a prompt in the "
            f"{min(MAX_LENGTH, context)} tokens that the original keeps; lower max_tokens"
        )
    begin = max(0, len(ids) - fit)
    return ids[begin:], slots[begin:]


def said(text: str) -> str:
    """The answer in all that was generated."""
    return text.split("###")[0].split("Assistant:")[-1].strip()
