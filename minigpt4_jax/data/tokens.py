"""Tokenizers and the layout of a prompt: segments -> ids and slots.

LLaMA-family `tokenizer.model` files are read by the rules of Hugging Face's slow
LlamaTokenizer, with which the reference was trained; byte-level `tokenizer.json` files
(SmolLM2) by the `tokenizers` library. Text is always encoded as plain pieces; special
tokens come from `Special` segments alone (prompts.py).
"""

import abc
import codecs
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece
import tokenizers

from minigpt4_jax.data.prompts import IMAGE, Segment, Special
from minigpt4_jax.errors import CheckpointError, InputError

SPACE = "\u2581"  # SentencePiece's visible space


class Tokenizer(abc.ABC):
    """Text to ids and back; `bos_id`, `eos_ids`, `pad_id` are attributes.

    digest: hex sha256 of the file that it was read from.
    """

    digest: str
    bos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    size: int

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of one segment, no BOS; what looks like a special token is plain text."""

    @abc.abstractmethod
    def special_id(self, name: str) -> int:
        """The id of a special token; a name that is none raises CheckpointError."""

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 a token stands for, b"" for special and unknown ids.

        Bytes, because one character can take several tokens.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer: special tokens left out, broken UTF-8 as U+FFFD."""
        stream = TextStream(self)
        return stream.push(ids) + stream.flush()


class SentencePieceTokenizer(Tokenizer):
    """A LLaMA-family `tokenizer.model`.

    SentencePiece puts a space before every segment; the reference encodes segment by
    segment, so we do. `</s>` is the end. The pad token is the ordinary piece "$$", of
    which the reference only uses the id (v0: the end token, as here when there is no
    "$$"); unlike the reference we show it when a model says it.
    """

    def __init__(self, model: bytes, *, bos_id=None, eos_ids=None):
        self.digest = hashlib.sha256(model).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(model)
        self.size = self._model.get_piece_size()
        self.bos_id = self._model.bos_id() if bos_id is None else bos_id
        self.eos_ids = (self._model.eos_id(),) if eos_ids is None else tuple(eos_ids)
        pad = self._model.piece_to_id("$$")
        self.pad_id = self.eos_ids[0] if self._model.is_unknown(pad) else pad

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def special_id(self, name: str) -> int:
        token = self._model.piece_to_id(name)
        if self._model.id_to_piece(token) != name or not self._is_special(token):
            raise _no_special(name, "tokenizer.model")
        return token

    def token_bytes(self, token: int) -> bytes:
        if token >= self.size or self._is_special(token):  # Vicuna v0 has a row more
            return b""
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace(SPACE, " ").encode()

    def _is_special(self, token: int) -> bool:
        return self._model.is_control(token) or self._model.is_unknown(token)


class ByteLevelTokenizer(Tokenizer):
    """A byte-level BPE `tokenizer.json`, as GPT-2's and SmolLM2's."""

    def __init__(self, tokenizer_json: str, *, bos_id: int, eos_ids: Sequence[int]):
        kind = (json.loads(tokenizer_json).get("decoder") or {}).get("type")
        if kind != "ByteLevel":
            raise CheckpointError(
                f"tokenizer.json: got decoder {kind}, want ByteLevel; a LLaMA model "
                "needs its tokenizer.model instead"
            )
        self.digest = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        self._model = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._model.encode_special_tokens = True  # as plain text, that is
        self._special = {
            token: added.content
            for token, added in self._model.get_added_tokens_decoder().items()
            if added.special
        }
        self.size = self._model.get_vocab_size()
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.pad_id = self.eos_ids[0]

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._model.encode_special_tokens = True  # pickling forgets it

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def special_id(self, name: str) -> int:
        token = self._model.token_to_id(name)
        if token not in self._special:
            raise _no_special(name, "tokenizer.json")
        return token

    def token_bytes(self, token: int) -> bytes:
        piece = self._model.id_to_token(token)
        if piece is None or token in self._special:
            return b""
        if not set(piece) <= self._bytes.keys():  # an added token in plain spelling
            return piece.encode()
        return bytes(self._bytes[character] for character in piece)

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """Byte of each character of the vocabulary's spelling.

        Printable Latin-1 characters are themselves, the other 68 bytes follow from
        U+0100 on (GPT-2's table).
        """
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        table = {chr(byte): byte for byte in printable}
        return table | {chr(256 + i): byte for i, byte in enumerate(others)}


class TextStream:
    """Decodes an answer as it comes, in whole characters.

    Joined pieces equal `decode` of all ids.

    Args:
        starts: the answer starts here, so a LLaMA tokenizer's dummy space is dropped;
            False when it continues given words.
    """

    def __init__(self, tokenizer: Tokenizer, starts: bool = True):
        self._tokenizer = tokenizer
        self._dummy_space = starts and isinstance(tokenizer, SentencePieceTokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The characters these ids complete; a part of one waits for more."""
        return self._utf8.decode(b"".join(self._bytes(int(i)) for i in ids))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a part of a character, or nothing."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        data = self._tokenizer.token_bytes(token)
        if data and self._dummy_space:
            self._dummy_space = False
            return data.removeprefix(b" ")
        return data


def load_tokenizer(
    directory: str | Path, *, bos_id: int | None = None, eos_ids: Sequence[int] = ()
) -> Tokenizer:
    """The tokenizer of a model's directory.

    `tokenizer.model` wins over `tokenizer.json`: LLaMA directories have both, and the
    latter follows other rules. `bos_id` and `eos_ids` (of the preset) win over the
    files, whose names of them cannot be trusted: FastChat's Vicuna calls `</s>` BOS.
    """
    directory = Path(directory)
    model, fast = directory / "tokenizer.model", directory / "tokenizer.json"
    if not model.is_file() and not fast.is_file():
        raise CheckpointError(
            f"{directory}: no tokenizer.model and no tokenizer.json; is this a "
            "converted directory, and complete?"
        )
    try:
        if model.is_file():
            data = model.read_bytes()
            return SentencePieceTokenizer(data, bos_id=bos_id, eos_ids=eos_ids or None)
        if bos_id is None or not eos_ids:
            names = _names_of_ends(directory)
            vocabulary = tokenizers.Tokenizer.from_file(str(fast))
            bos_id, *eos_ids = (vocabulary.token_to_id(name) for name in names)
        text = fast.read_text(encoding="utf-8")
        return ByteLevelTokenizer(text, bos_id=bos_id, eos_ids=eos_ids)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    except Exception as error:  # both libraries raise bare Exception and RuntimeError
        path = model if model.is_file() else fast
        raise CheckpointError(f"{path} is damaged: {error}") from error


def lay_out(
    segments: Sequence[Segment],
    tokenizer: Tokenizer,
    num_slots: int,
    *,
    bos: bool = True,
    num_images: int | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids of a prompt, and which of them are slots for image embeddings.

    Exactly one BOS comes first, whether the template spells it or not. Ids at slots are
    pad ids, which nothing reads.

    Args:
        segments: each text in it is encoded apart, as the reference does.
        num_slots: image embeddings of one image.
        bos: False for an answer, which follows a prompt.
        num_images: images at hand; when given, another count of IMAGE raises.
    """
    found = sum(segment is IMAGE for segment in segments)
    if num_images is not None and found != num_images:
        raise InputError(
            f"got {num_images} images for a prompt with places for {found}; each image "
            "needs one place"
        )
    ids: list[int] = []
    slots: list[bool] = []
    for segment in segments:
        if segment is IMAGE:
            new = [tokenizer.pad_id] * num_slots
        elif isinstance(segment, Special):
            new = [tokenizer.special_id(segment.name)]
        else:
            new = tokenizer.encode(segment)
        ids += new
        slots += [segment is IMAGE] * len(new)
    if bos and (ids[:1] != [tokenizer.bos_id] or slots[0]):
        ids, slots = [tokenizer.bos_id, *ids], [False, *slots]
    return ids, slots


def _no_special(name: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has no special token {name!r}, which the prompt's template needs; "
        "do the preset's template and tokenizer belong together?"
    )


def _names_of_ends(directory: Path) -> tuple[str, str]:
    """BOS and EOS as tokenizer_config.json names them."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        raise CheckpointError(
            "tokenizer.json does not tell which tokens begin and end text; want "
            "bos_id and eos_ids, or a tokenizer_config.json"
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    names = []
    for key in ("bos_token", "eos_token"):
        value = values.get(key)
        names.append(value["content"] if isinstance(value, dict) else value)
    return names[0], names[1]
