"""Talk to a model from Python: load it, ask about an image, stream, chat.

    gen = Generator.load("demo")
    gen("Describe this image.", image="photo.jpg")

Everything here is thin over `submit`: requests in, events out (request.py).
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from minigpt4_jax import checkpoint, locate, memory
from minigpt4_jax.conversation import Chat, Images, images, pieces
from minigpt4_jax.data.tokens import Tokenizer, load_tokenizer
from minigpt4_jax.engine import Engine
from minigpt4_jax.errors import ConfigError, unknown
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import MiniGPT4
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.reading import Prepared
from minigpt4_jax.request import GREEDY, Event, Request, Sampling, user
from minigpt4_jax.score import Score, score
from minigpt4_jax.score import warm_up as score_warm_up

logger = logging.getLogger(__name__)

FLOATS = ("float32", "bfloat16", "float16")


class Generator:
    """A model and its tokenizer, ready to answer.

    Args:
        batch_size: answers decoded together, at most.
        chunk: tokens decoded between two looks of the host, thus between two pieces.
        drafts: tokens guessed at each step from what was said before, and checked in
            one pass (prompt look-up). Answers are those without; 0 guesses nothing.
        places: a number of tokens of prompt and answer. Then every answer is computed
            in the same shapes, so that its bits are the same alone and in any batch
            (beam searches excepted; not with drafts). None: in shapes that follow the
            batch, which are faster but differ in the last bit of their sums.
        prefix_bytes: memory for what was read up to an image, for other questions
            about that image; 0 keeps nothing. None: for an image of each answer that
            is decoded and one more, or 64 MiB if that is more.

    Attributes:
        engine: what answers; `Server` runs it for many threads.
        model: the plain NNX module; on CPU its decoder's blocks are a list.
        need: the memory that was told when it was loaded.
        tokenizer: text to ids and back.
    """

    def __init__(
        self,
        model: MiniGPT4,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        chunk: int = 8,
        drafts: int = 0,
        places: int | None = None,
        prefix_bytes: int | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.need: memory.Needs | None = None
        self.engine = Engine(
            model,
            tokenizer,
            slots=batch_size,
            chunk=chunk,
            drafts=drafts,
            places=places,
            prefix_bytes=prefix_bytes,
        )

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "demo",
        *,
        dtype: str | None = None,
        quantize: str = "",
        vision: str = "",
        kv: str = "",
        **options: Any,
    ) -> "Generator":
        """The converted model "demo", another converted directory, or a training run.

        Compiled programs are kept in $MINIGPT4_JAX_CACHE/compiled unless JAX has been
        told another place.

        Args:
            name_or_path: a training work directory gives the model it trains with its
                newest trainables; "WORKDIR@1000" with those of a step that it keeps.
            dtype: of weights and products; default float32 on CPU, else bfloat16.
            quantize: "int8" or "int4" rounds the decoder's weights while they are read;
                vision="int8" does it to the ViT's, and kv="int8" to keys and values.
                What was converted with --quantize is so without a word.
            options: batch_size, chunk, drafts, places, prefix_bytes, as above.

        Raises:
            ConfigError: another dtype or quantisation, an option below what it can be,
                or no room for the weights.
            CheckpointError: not there, damaged or of a newer format; says what to do.
        """
        _keep_compiled_programs()
        dtypes = default_dtypes(dtype)
        path = checkpoint.resolve(name_or_path)
        quantisation = checkpoint.settle(path, Quantisation(quantize, vision, kv))
        batch, tokens = options.get("batch_size", 8), options.get("places")
        need = memory.needs(
            checkpoint.read_config(path),
            dtypes,
            quantisation,
            batch=batch,
            tokens=tokens or memory.TOKENS,
            prefix_bytes=options.get("prefix_bytes"),
        )
        logger.info("memory: %s", need)
        with memory.told(need):
            model = checkpoint.load_model(path, dtypes, quantisation=quantisation)
        tokenizer = load_tokenizer(
            checkpoint.base_directory(path),
            bos_id=model.cfg.bos_id,
            eos_ids=model.cfg.eos_ids,
        )
        generator = cls(model, tokenizer, **options)
        generator.need = need
        return generator

    def __call__(
        self,
        prompt: str,
        image: Images = None,
        *,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """The answer to one question, about an image, several or none; greedy by default.

        Raises:
            InputError: an image cannot be read, or the prompt does not fit.
        """
        return "".join(
            self.stream(prompt, image, sampling=sampling, stop=stop, seed=seed)
        )

    def stream(
        self,
        prompt: str,
        image: Images = None,
        *,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """The answer in pieces of whole characters, as they are decoded."""
        request = Request(
            [user(prompt, *images(image))], sampling=sampling, stop=stop, seed=seed
        )
        return pieces(self.submit([request]))

    def score(
        self,
        image: Images,
        prompt: str,
        answers: Sequence[str],
        *,
        end: bool = True,
    ) -> list[Score]:
        """How likely each of the answers is; the image and the prompt are read once.

        Args:
            answers: of any number and length.
            end: whether an answer's end is scored with it, as the last of its tokens:
                the likelihood of this answer and no more. False: of any answer that
                begins so, as where answers are choices such as "A" and "B".

        Raises:
            InputError: an image cannot be read, an answer does not fit, or has no token.
        """
        messages = [user(prompt, *images(image))]
        with memory.told(self.need):
            return score(self.engine, messages, answers, end=end)

    def chat(
        self,
        *,
        system: str | None = None,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        seed: int = 0,
        overflow: str = "error",
        compat: str | None = None,
    ) -> Chat:
        """A conversation; its defaults are the reference's (temperature 1, top-p 0.9).

        `Request` tells what `overflow` and `compat` do.
        """
        return Chat(
            self,
            system=system,
            sampling=sampling,
            stop=stop,
            seed=seed,
            overflow=overflow,
            compat=compat,
        )

    def submit(self, requests: Iterable[Request | Prepared]) -> Iterator[Event]:
        """Events of all requests as they come; a request's own are in order.

        Requests are read as room becomes free, so an endless iterator is fine. One that
        cannot be answered gives an event with finish_reason "error".
        """
        with memory.told(self.need):
            yield from self.engine.submit(requests)

    def cancel(self, request_id: str) -> None:
        """End a request that was submitted, within a chunk; from any thread."""
        self.engine.cancel(request_id)

    def warm_up(
        self, tokens: int = 512, *, beams: Sequence[int] = (), scores: bool = False
    ) -> int:
        """Compile all programs for prompts and answers of up to `tokens` together.

        Returns how many there are; nothing is compiled afterwards for conversations that
        fit, nor for what else is named here.

        Args:
            beams: beam searches of these numbers of beams, as long as they have no stop
                strings and ids of their own, no top_logprobs and no compat.
            scores: `score`, of answers that fit as well.
        """
        compiled = self.engine.warm_up(tokens, beams)
        return compiled + (score_warm_up(self.engine, tokens) if scores else 0)

    def prepare(self, request: Request) -> Prepared:
        """A request checked and ready for `submit`: raises InputError now, not then."""
        return self.engine.prepare(request)


def default_dtypes(dtype: str | None) -> DTypes:
    """One dtype for weights and products; None: float32 on CPU, else bfloat16.

    On a CPU, XLA's bfloat16 products are the slower ones.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in FLOATS:
        raise ConfigError(unknown("dtype", dtype, FLOATS))
    return DTypes(param=dtype, compute=dtype, output=dtype)


def _keep_compiled_programs() -> None:
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = locate.cache_root() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
