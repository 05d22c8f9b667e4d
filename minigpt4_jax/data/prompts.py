"""Templates of conversations: messages -> segments, the text between image slots.

A segment is text to be encoded as one string, a `Special` token or `IMAGE`. Only a
template makes the latter two; text of a message is text whatever it looks like. The
reference encodes each stretch between images as one string, template and question
together, and SentencePiece gives other ids for a string than for its halves, so
neighbouring texts are joined here.
"""

import bisect
import enum
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from minigpt4_jax.errors import ConfigError, InputError, unknown
from minigpt4_jax.request import Message


class Mark(enum.Enum):
    """What stands between texts besides tokens."""

    IMAGE = "<ImageHere>"


IMAGE = Mark.IMAGE


@dataclass(frozen=True)
class Special:
    """A token that no text can spell, by its name in the tokenizer."""

    name: str


Segment = str | Special | Mark


@dataclass(frozen=True)
class Template:
    """The text around messages. `specials` and `<ImageHere>` in it are structure.

    Args:
        system: default system text; None for no system turn unless a message asks.
        image, joiner: what an image becomes, and what follows each one of a message.
        stop: strings that end an answer besides the model's end tokens.
        fragile: what a message may not spell; broken up by spaces before encoding.
        training: a question of stage 2, `{}` being the question with its image.
        end: follows an answer of stage 2, and is learned with it.
    """

    name: str
    system: str | None
    system_turn: str
    user_turn: str
    assistant_turn: str
    image: str
    joiner: str
    specials: tuple[str, ...]
    stop: tuple[str, ...]
    fragile: tuple[str, ...]
    training: str
    end: str


REFERENCE_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the "
    "image once I provide it to you. Please answer my questions."
)
VICUNA_V0 = Template(
    name="vicuna_v0",
    system=REFERENCE_SYSTEM,
    system_turn="{}###",
    user_turn="Human: {}###",
    assistant_turn="Assistant: {}###",
    image="<Img><ImageHere></Img>",
    joiner=" ",
    specials=("<s>", "</s>", "<unk>"),
    stop=("###",),
    fragile=("###",),
    training="###Human: {} ###Assistant: ",  # here with a space before the second ###
    end="###",
)
LLAMA2 = Template(
    name="llama2",
    system=REFERENCE_SYSTEM,
    system_turn="{}",
    user_turn="<s>[INST] {}",
    assistant_turn=" [/INST] {}",  # nothing ends an answer in the reference's history
    image="<Img><ImageHere></Img>",
    joiner=" ",
    specials=("<s>", "</s>", "<unk>"),
    stop=(),
    fragile=("[INST]", "[/INST]"),
    training="[INST] {} [/INST] ",
    end="</s>",
)
CHATML = Template(
    name="chatml",
    system=None,  # SmolLM2's own names the model and says nothing of images
    system_turn="<|im_start|>system\n{}<|im_end|>\n",
    user_turn="<|im_start|>user\n{}<|im_end|>\n",
    assistant_turn="<|im_start|>assistant\n{}<|im_end|>\n",
    image="<ImageHere>",
    joiner="\n",
    specials=("<|im_start|>", "<|im_end|>"),
    stop=(),
    fragile=(),
    training="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
)
TEMPLATES = {t.name: t for t in (VICUNA_V0, LLAMA2, CHATML)}

ALIGNMENT_QUESTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
CAPTION_END = "\n"  # follows a caption of stage 1


def find_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConfigError(unknown("template", name, TEMPLATES))
    return TEMPLATES[name]


def render(template: Template, messages: Sequence[Message]) -> list[Segment]:
    """A conversation up to where the assistant is to speak, or to speak on.

    A last message of the assistant stays open: the answer continues it. Images of a
    message come before its text; the reference makes a message of each image, which
    two messages do here as well.
    """
    if not messages:
        raise InputError("no messages to answer; want at least one")
    if messages[0].role != "system" and template.system is not None:
        messages = [Message("system", template.system), *messages]
    pieces: list[Segment] = []
    for i, message in enumerate(messages):
        before, after = getattr(template, f"{message.role}_turn").split("{}")
        if message.role == "assistant" and i == len(messages) - 1:
            after = ""
        pieces += _structure(template, before)
        pieces += _content(template, message.text, len(message.images), after)
        pieces += _structure(template, after)
    if messages[-1].role != "assistant":
        pieces += _structure(template, template.assistant_turn.split("{}")[0])
    return _joined(pieces)


def without_oldest(
    messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]
) -> list[Message]:
    """A conversation without its oldest questions and their answers, so that it fits.

    As few as possible are left out; where nothing fits, all that may be. The system
    message, all that show an image and the last one stay.
    """
    exchanges: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not exchanges or exchanges[-1][0].role == "system":
            exchanges.append([])
        exchanges[-1].append(message)
    may_go = [
        i
        for i, exchange in enumerate(exchanges[:-1])
        if not any(m.role == "system" or m.images for m in exchange)
    ]

    def without(count: int) -> list[Message]:
        gone = may_go[:count]
        return [m for i, e in enumerate(exchanges) if i not in gone for m in e]

    counts = range(len(may_go))
    return without(bisect.bisect_left(counts, True, key=lambda n: fits(without(n))))


def caption_prompt() -> list[Segment]:
    """The prompt of stage 1: an image and nothing else, not even `<Img>`."""
    return [IMAGE]


def training_prompt(
    template: Template, question: str, num_images: int = 1
) -> list[Segment]:
    """The prompt of stage 2: one question about an image, no system text."""
    before, after = template.training.split("{}")
    return _joined(
        [
            *_structure(template, before),
            *_content(template, question, num_images, after),
            *_structure(template, after),
        ]
    )


def training_answer(
    template: Template, answer: str, *, end: bool = True
) -> list[Segment]:
    """An answer of stage 2, usually with its end, encoded apart from the prompt."""
    after = template.end if end else ""
    return _joined(
        [*_content(template, answer, 0, after), *_structure(template, after)]
    )


def caption_answer(caption: str) -> list[Segment]:
    """A caption of stage 1 with its end."""
    return [caption + CAPTION_END]


def parse_specials(text: str, names: Iterable[str]) -> list[Segment]:
    """Split text of our own at literal special tokens, as the slow tokenizer does."""
    names = tuple(names)
    if not names:
        return [text]
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return [Special(p) if p in names else p for p in parts if p]


def _structure(template: Template, text: str) -> list[Segment]:
    """Segments of a template's own text."""
    pieces: list[Segment] = []
    for i, part in enumerate(text.split(IMAGE.value)):
        pieces += [IMAGE] if i else []
        pieces += parse_specials(part, template.specials)
    return pieces


def _content(
    template: Template, text: str, num_images: int, after: str
) -> list[Segment]:
    """Segments of a message: its images and, joined to them, its text."""
    images = [template.image] * num_images
    markup = template.joiner.join([*images, ""] if text else images)
    return [*_structure(template, markup), _unspell(text, template.fragile, after)]


def _unspell(text: str, fragile: Iterable[str], after: str) -> str:
    """`text` with all that is fragile broken up by spaces; other text is unchanged."""
    for string in fragile:
        while string in text:
            text = text.replace(string, f"{string[0]} {string[1:]}")
        if text.endswith(string[0]) and after.startswith(string):
            text += " "  # `C#` and `###` would be read as `C` and `####`
    return text


def _joined(pieces: Iterable[Segment]) -> list[Segment]:
    """The same with neighbouring texts made one, and no empty ones."""
    segments: list[Segment] = []
    for piece in pieces:
        if piece == "":
            continue
        if isinstance(piece, str) and segments and isinstance(segments[-1], str):
            segments[-1] += piece
        else:
            segments.append(piece)
    return segments
