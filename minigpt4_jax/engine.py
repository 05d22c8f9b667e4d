"""Requests in, events out: a model, its compiled programs and what it keeps.

Prompts are checked here, read by a Reader (reading.py) and answered by the rows of a
Schedule (schedule.py) in the slots of a Pool (pool.py).
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from minigpt4_jax import compat, compilations, decoding, reading
from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.data.prompts import find_template, render, without_oldest
from minigpt4_jax.data.tokens import Tokenizer, lay_out
from minigpt4_jax.endings import Endings
from minigpt4_jax.errors import ConfigError, InputError
from minigpt4_jax.models.layers import unstack
from minigpt4_jax.models.llama import Llama
from minigpt4_jax.models.minigpt4 import MiniGPT4
from minigpt4_jax.pool import LEAST_PLACES, Empty, Pool, Shapes, bucket, fitted
from minigpt4_jax.reading import PIECES, Prepared, Reader
from minigpt4_jax.request import Event, Message, Request, Sampling
from minigpt4_jax.schedule import Schedule
from minigpt4_jax.searches import LEAST_BUDGET, Kind, Searcher

logger = logging.getLogger(__name__)


class Engine:
    """Holds a model and answers requests with it.

    Args:
        model: a Llama's blocks are unstacked in place where that decodes faster.
        slots: rows decoded together, at most.
        chunk: forward passes between two looks of the host; pieces come that often.
        drafts: tokens guessed from the text so far and checked in each forward pass.
        places: None: shapes follow the rows. A number: all rows are computed in one
            shape, which holds so many tokens of prompt and answer (pool.py).
        prefix_bytes: of caches kept of prompts' beginnings; None: reading.prefix_bytes.

    Attributes:
        reader: what is kept of images and prefixes; it assumes that the weights stay.
    """

    def __init__(
        self,
        model: MiniGPT4,
        tokenizer: Tokenizer,
        *,
        slots: int = 8,
        chunk: int = 8,
        drafts: int = 0,
        places: int | None = None,
        prefix_bytes: int | None = None,
    ):
        least = (("batch_size", slots, 1), ("chunk", chunk, 1), ("drafts", drafts, 0))
        for name, value, wanted in (*least, ("places", places or 1, 1)):
            if value < wanted:
                raise ConfigError(f"{name}: got {value}, want at least {wanted}")
        if places and drafts:
            raise ConfigError(
                "places and drafts: whether a pass reads drafts depends on all rows, so "
                "that the bits of an answer would too; give one of them"
            )
        # Another decoder keeps its layers as it likes; ours has a stack or a list.
        ours = isinstance(model.llama, Llama)
        if ours and not isinstance(model.llama.blocks, nnx.List):
            if jax.default_backend() == "cpu":
                # A scan copies each layer's weights at every token there.
                model.llama.blocks = unstack(model.llama.blocks)
        self.model = model
        self.cfg = model.cfg
        self.tokenizer = tokenizer
        self.template = find_template(model.cfg.template)
        self.shapes = Shapes(slots, chunk, drafts, places)
        graphdef, self.weights = nnx.split(model)
        self.programs = decoding.programs(graphdef)
        self.endings = Endings(tokenizer, self.template)
        sizes = (self.cfg.llama.width, self.cfg.llama.vocab_size)
        self.searcher = Searcher(graphdef, self.weights, tokenizer, sizes[1])
        self.empty = Empty(self.programs, self.weights, self.endings.most_ids, *sizes)
        if prefix_bytes is None:
            one = jax.eval_shape(
                lambda: self.programs.new_cache(
                    self.weights, batch=1, places=LEAST_PLACES
                )
            )
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
            prefix_bytes = reading.prefix_bytes(-(-size // LEAST_PLACES), slots)
        self.reader = Reader(
            self.programs,
            self.weights,
            self.cfg,
            self.shapes,
            self.empty,
            prefix_bytes=prefix_bytes,
        )
        self._lock = threading.Lock()
        self._schedules: set[Schedule] = set()

    def prepare(self, request: Request) -> Prepared:
        """Read a request's images and lay out its prompt; raises InputError."""
        _check_ids(request.sampling, self.cfg.llama.vocab_size)
        images = [image for message in request.messages for image in message.images]
        pixels = tuple(preprocess(read_image(i), self.cfg.vit) for i in images)
        ids, slots, dropped = self._lay_out(request, len(images))
        return Prepared(
            request, np.array(ids, np.int32), np.array(slots), pixels, dropped
        )

    def _lay_out(self, request: Request, num_images: int) -> tuple[list, list, int]:
        """Ids, slots, and the number of messages left out for want of places."""
        answer, context = request.sampling.max_tokens, self.cfg.llama.max_positions
        context = min(context, self.shapes.places or context)

        def laid_out(messages):
            segments, slots = render(self.template, messages), self.cfg.num_slots
            return lay_out(segments, self.tokenizer, slots, num_images=num_images)

        def fits(messages):
            return len(laid_out(messages)[0]) + answer <= context

        messages: Sequence[Message] = request.messages
        if request.overflow == "drop_oldest" and not fits(messages):
            messages = without_oldest(messages, fits)
        ids, slots = laid_out(messages)
        if request.compat:
            ids, slots = compat.cut(ids, slots, answer, context)
        if len(ids) + answer > context:
            raise InputError(
                f"the prompt has {len(ids)} tokens ({sum(slots)} of them for "
                f"{num_images} images) and the answer may have {answer}, which makes "
                f"{len(ids) + answer}; {self._reads(context)}: shorten the conversation "
                "or lower max_tokens"
            )
        return ids, slots, len(request.messages) - len(messages)

    def _reads(self, context: int) -> str:
        if context < self.cfg.llama.max_positions:
            return f"there are places={context}, of which you can give more"
        return f"the model reads {context}"

    def schedule(self) -> Schedule:
        """A batch to be run, step by step."""
        pool = Pool(self.programs, self.weights, self.shapes, self.empty)
        return Schedule(self.reader, pool, self.searcher, self.endings)

    def submit(self, requests: Iterable[Request | Prepared]) -> Iterator[Event]:
        """Events of all requests as they come; a request's own are in order.

        `requests` is read as slots become free. A request that cannot be answered gives
        one event with finish_reason "error" and stops nothing. Closing the iterator ends
        all of its requests.
        """
        schedule = self.schedule()
        with self._lock:
            self._schedules.add(schedule)
        try:
            source, more = iter(requests), True
            while more or schedule.busy:
                while more and len(schedule.waiting) < self.shapes.slots:
                    request = next(source, None)
                    more = request is not None
                    if request is not None:
                        yield from self._add(schedule, request)
                yield from schedule.step()
        finally:
            with self._lock:
                self._schedules.discard(schedule)

    def _add(self, schedule: Schedule, request: Request | Prepared) -> Iterator[Event]:
        began = time.perf_counter()
        try:
            if isinstance(request, Request):
                request = self.prepare(request)
        except InputError as error:
            yield Event(request.id, finish_reason="error", error=str(error))
        else:
            schedule.add(request, began)

    def cancel(self, request_id: str) -> None:
        """End a request that `submit` took, before the next chunk; from any thread.

        Its rows give a last event with finish_reason "cancelled". An unknown id, or one
        that has ended, is ignored.
        """
        with self._lock:
            for schedule in self._schedules:
                schedule.cancel(request_id)

    def warm_up(self, tokens: int, beams: Sequence[int] = ()) -> int:
        """Compile what conversations of up to `tokens` tokens need, answers included.

        Returns how many programs that were, those read from the disk included.

        Args:
            beams: numbers of beams of searches, with the template's own ends.
        """
        began, before = time.perf_counter(), compilations.count()
        self._warm_vision()
        pool = self.schedule().pool
        rooms = self.shapes.rooms(tokens + 1 + self.shapes.drafts)
        # Prompts of at most `tokens` end in a padded piece.
        for places in self.shapes.rooms(tokens + PIECES[-1]):
            row = self._warm_reading(places)
            for width in self.shapes.widths if places in rooms else ():
                pool.rows, pool.state = [None] * width, pool.empty(width, places)
                pool.add(row, row)
                pool.rows = [None] * width  # so that decoding has nothing to do
                pool.decode(1)
                pool.take(0)
                pool.look(tops=True)
            for number in beams:
                self._warm_searches(number, row, tokens)
        compiled = compilations.count() - before
        seconds = time.perf_counter() - began
        logger.info("Warm-up: %d programs in %.1f s", compiled, seconds)
        return compiled

    def _warm_searches(self, beams: int, row: decoding.Decoding, tokens: int) -> None:
        """Searches whose longest prompt fits the places of `row`."""
        places = row.tokens_BS.shape[1]
        least = places // 2 if places > self.shapes.room(1) else 0  # of the prompt
        kind = Kind(beams, len(self.tokenizer.eos_ids), tuple(self.template.stop))
        budgets = [LEAST_BUDGET]
        while budgets[-1] < tokens - least:
            budgets.append(2 * budgets[-1])
        batch = 1
        while batch <= bucket(self.shapes.searches(beams)):
            state = self.empty(batch, places)
            if batch > 1:
                state = self.programs.insert(state, row, 0)
            for budget in budgets:
                self.searcher.warm_up(kind, state.cache, budget)
            batch *= 2

    def _warm_vision(self) -> None:
        size = self.cfg.vit.image_size
        batch = 1
        while batch <= self.reader.images_at_once:
            pixels_BHWC = np.zeros((batch, size, size, 3), np.float32)
            jax.block_until_ready(self.programs.encode(self.weights, pixels_BHWC))
            batch *= 2

    def _warm_reading(self, places: int) -> decoding.Decoding:
        """A row of so many places, after a piece of each size was read."""
        reader = self.reader
        image_1QD = np.zeros((1, self.cfg.num_slots, self.cfg.llama.width), np.float32)
        cache = reader.blank(places)
        for T in PIECES:
            ids_1T = np.zeros((1, T), np.int32)
            used_1 = np.zeros(1, np.int32)
            self.programs.read(
                self.weights, cache, ids_1T, ids_1T > 0, used_1, image_1QD
            )
        row = reader.row_of(cache)
        if places > self.shapes.room(1):
            fitted(self.programs, fitted(self.programs, row, places // 2), places)
        return row


def _check_ids(sampling: Sampling, vocabulary: int) -> None:
    for name in ("banned_ids", "stop_ids"):
        wrong = [token for token in getattr(sampling, name) if token >= vocabulary]
        if wrong:
            raise InputError(f"{name}: got {wrong[0]}, want ids below {vocabulary}")
