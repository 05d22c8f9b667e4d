"""Requests in, events out: slots, images, prompts and answers around the programs.

Rows (one for each sample of a request) wait in line, are read in groups into free slots
of a running decode loop, and leave when they end. Shapes come from buckets, so that few
programs are compiled.
"""

import dataclasses
import functools
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from minigpt4_jax import compat, decoding, sampling
from minigpt4_jax.answer import Answer
from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.data.prompts import find_template, render, without_oldest
from minigpt4_jax.data.tokens import Tokenizer, lay_out
from minigpt4_jax.errors import ConfigError, InputError
from minigpt4_jax.models.layers import unstack
from minigpt4_jax.models.llama import Cache, Llama
from minigpt4_jax.models.minigpt4 import MiniGPT4
from minigpt4_jax.request import STOP_IDS, Event, Message, Request, Sampling, Usage
from minigpt4_jax.searches import Job, Searcher

IMAGES_AT_ONCE = 8  # larger batches of images are split
IMAGES_KEPT = 64  # embeddings of the images seen last


def bucket(size: int) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ... that holds `size`."""
    whole = 1 << max(size - 1, 0).bit_length()
    three_quarters = whole * 3 // 4
    return three_quarters if size <= three_quarters and whole >= 32 else whole


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that was checked: its prompt as ids, its images as pixels.

    Slots that are fewer than the images have are those of the last ones (compat.cut).
    """

    request: Request
    ids: np.ndarray
    slots: np.ndarray
    pixels: tuple[np.ndarray, ...]
    dropped_turns: int = 0


@dataclasses.dataclass(eq=False)
class Row:
    """One answer on its way."""

    prepared: Prepared
    index: int
    answer: Answer
    began: float
    first_token: float | None = None

    @property
    def limit(self) -> int:
        return self.prepared.request.sampling.max_tokens

    @property
    def searched(self) -> bool:
        return self.prepared.request.sampling.num_beams > 1

    @property
    def places(self) -> int:
        """Of the cache; the last token chosen is never read."""
        return len(self.prepared.ids) + self.limit - 1


class Engine:
    """Holds a model and answers requests with it.

    Args:
        model: a Llama's blocks are unstacked in place where that decodes faster.
        slots: rows decoded together, at most.
        chunk: tokens a row between two looks of the host; pieces come that often.
    """

    def __init__(
        self, model: MiniGPT4, tokenizer: Tokenizer, *, slots: int = 8, chunk: int = 8
    ):
        for name, value in (("batch_size", slots), ("chunk", chunk)):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, want at least 1")
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
        self.slots = slots
        self.chunk = chunk
        graphdef, self.weights = nnx.split(model)
        self.programs = decoding.programs(graphdef)
        vocabulary = self.cfg.llama.vocab_size
        self.searcher = Searcher(graphdef, self.weights, tokenizer, vocabulary)
        self._embeddings: OrderedDict[bytes, np.ndarray] = OrderedDict()

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
                f"{len(ids) + answer}; the model reads {context}: shorten the "
                "conversation or lower max_tokens"
            )
        return ids, slots, len(request.messages) - len(messages)

    def end_ids(self, request: Request) -> tuple[int, ...]:
        """Tokens that end its answers."""
        if request.compat:
            return compat.find_rules(self.template).end_ids
        return (*self.tokenizer.eos_ids, *request.sampling.stop_ids)

    def answer(self, request: Request) -> Answer:
        """The text of one of its answers, empty yet."""
        if request.compat:
            stops = compat.find_rules(self.template).stops
            return Answer(self.tokenizer, sequences=stops, whole=compat.said)
        stop = (*request.stop, *self.template.stop)
        starts = request.messages[-1].role == "user"
        return Answer(self.tokenizer, stop=stop, starts=starts)

    def submit(self, requests: Iterable[Request | Prepared]) -> Iterator[Event]:
        """Events of all requests as they come; a request's own are in order.

        `requests` is read as slots become free. A request that cannot be answered gives
        one event with finish_reason "error" and stops nothing.
        """
        return _Run(self, requests).events()

    def embed_images(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """image_QD of each image; those seen lately are not encoded again."""
        keys = [hashlib.sha256(image_HWC).digest() for image_HWC in pixels]
        found = {key: self._embeddings[key] for key in keys if key in self._embeddings}
        missing = {k: image for k, image in zip(keys, pixels) if k not in found}
        todo = list(missing.items())
        for i in range(0, len(todo), IMAGES_AT_ONCE):
            group = todo[i : i + IMAGES_AT_ONCE]
            pixels_BHWC = np.stack([image_HWC for _, image_HWC in group])
            spare = bucket(len(group)) - len(group)
            pixels_BHWC = np.pad(pixels_BHWC, [(0, spare), (0, 0), (0, 0), (0, 0)])
            image_BQD = np.asarray(self.programs.encode(self.weights, pixels_BHWC))
            found |= {key: image_QD for (key, _), image_QD in zip(group, image_BQD)}
        for key in keys:
            self._embeddings[key] = found[key]
            self._embeddings.move_to_end(key)
        while len(self._embeddings) > IMAGES_KEPT:
            self._embeddings.popitem(last=False)
        return [found[key] for key in keys]

    def read(self, prompts: Sequence[Prepared], batch: int) -> Cache:
        """A cache of `batch` rows with the prompts but for their last tokens.

        It has places left for them.
        """
        places = bucket(max(len(prepared.ids) for prepared in prompts))
        ids_BT = np.zeros((batch, places), np.int32)
        slots_BT = np.zeros((batch, places), bool)
        used_B = np.zeros(batch, np.int32)
        for b, prepared in enumerate(prompts):
            used_B[b] = used = len(prepared.ids) - 1
            ids_BT[b, :used] = prepared.ids[:used]
            slots_BT[b, :used] = prepared.slots[:used]
        cache = self.programs.new_cache(self.weights, batch=batch, places=places)
        image_BQD = self._image_embeddings(prompts, batch)
        return self.programs.read(
            self.weights, cache, ids_BT, slots_BT, used_B, image_BQD
        )

    def prefill(
        self, rows: Sequence[Row], batch: int, places: int, budget: int
    ) -> decoding.Decoding:
        """Read the prompts of `rows` into a batch of `batch`, each row's first token."""
        length = bucket(max(len(row.prepared.ids) for row in rows))
        ids_BT = np.zeros((batch, length), np.int32)
        slots_BT = np.zeros((batch, length), bool)
        length_B = np.zeros(batch, np.int32)
        limit_B = np.ones(batch, np.int32)
        for b, row in enumerate(rows):
            length_B[b] = count = len(row.prepared.ids)
            ids_BT[b, :count] = row.prepared.ids
            slots_BT[b, :count] = row.prepared.slots
            limit_B[b] = row.limit
        requests = [row.prepared.request for row in rows]
        ends_BE = np.full((batch, len(self.tokenizer.eos_ids) + STOP_IDS), -1, np.int32)
        first_B = np.full(batch, sampling.NONE, np.int32)
        for b, request in enumerate(requests):
            end_ids = self.end_ids(request)
            ends_BE[b, : len(end_ids)] = end_ids
            if request.compat:
                first_B[b] = compat.find_rules(self.template).first_id
        prompts = decoding.Prompts(
            ids_BT=ids_BT,
            slots_BT=slots_BT,
            length_B=length_B,
            end_ids_BE=ends_BE,
            limit_B=limit_B,
            controls=sampling.controls(
                [(r.sampling, r.seed, row.index) for r, row in zip(requests, rows)],
                batch,
                self.cfg.llama.vocab_size,
                first_B,
            ),
        )
        return self.programs.prefill(
            self.weights,
            prompts,
            self._image_embeddings([row.prepared for row in rows], batch),
            places=places,
            budget=budget,
        )

    def _image_embeddings(
        self, prompts: Sequence[Prepared], batch: int
    ) -> np.ndarray | None:
        """Embeddings of each one's images in order, zeros behind; None without images."""
        most = max(len(prepared.pixels) for prepared in prompts)
        if most == 0:
            return None
        pixels = [image for prepared in prompts for image in prepared.pixels]
        embedded = iter(self.embed_images(pixels))
        Q = self.cfg.num_slots
        shape = (batch, bucket(most) * Q, self.cfg.llama.width)
        image_BQD = np.zeros(shape, np.float32)
        for b, prepared in enumerate(prompts):
            cut = len(prepared.pixels) * Q - prepared.slots.sum()
            for i in range(len(prepared.pixels)):
                image_BQD[b, i * Q : (i + 1) * Q] = next(embedded)
            if cut:
                image_BQD[b] = np.roll(image_BQD[b], -cut, axis=0)
        return image_BQD


class _Run:
    """One call of `submit`: the line of rows that wait, and the slots."""

    def __init__(self, engine: Engine, requests: Iterable[Request | Prepared]):
        self.engine = engine
        self.requests = iter(requests)
        self.waiting: deque[Row] = deque()
        self.slots: list[Row | None] = []
        self.decoding: decoding.Decoding | None = None
        self.places = self.budget = 0

    def events(self) -> Iterator[Event]:
        while True:
            yield from self._pull()
            if self.waiting and not any(self.slots):
                if self.waiting[0].searched:
                    yield from self._search()
                    continue
                self._open()
            yield from self._join()
            if any(self.slots):
                yield from self._decode()
            elif not self.waiting:
                return

    def _pull(self) -> Iterator[Event]:
        """Fill the line from the requests; a bad one becomes an event."""
        while len(self.waiting) < self.engine.slots:
            request = next(self.requests, None)
            if request is None:
                return
            began = time.perf_counter()
            try:
                if isinstance(request, Request):
                    request = self.engine.prepare(request)
            except InputError as error:
                yield Event(request.id, finish_reason="error", error=str(error))
                continue
            # One row for all answers of a beam search.
            searched = request.request.sampling.num_beams > 1
            for index in range(1 if searched else request.request.n):
                self.waiting.append(self._row(request, index, began))

    def _row(self, prepared: Prepared, index: int, began: float) -> Row:
        return Row(prepared, index, self.engine.answer(prepared.request), began)

    def _open(self) -> None:
        """Choose the shapes for the rows that wait; no row is running."""
        rows = [row for row in self.waiting if not row.searched][: self.engine.slots]
        self.slots = [None] * min(bucket(len(rows)), self.engine.slots)
        self.budget = bucket(max(row.limit for row in rows))
        longest = max(len(row.prepared.ids) for row in rows)
        self.places = bucket(longest) + self.budget
        self.decoding = None

    def _join(self) -> Iterator[Event]:
        """Read prompts into free slots, once half of the slots are free.

        Whole batches and halves only: each size of a group is a program to compile.
        """
        free = [b for b, row in enumerate(self.slots) if row is None]
        batch = len(self.slots)
        if self.decoding is not None:
            batch = max(1, batch // 2)
            free = free[:batch]
        if not self.waiting or len(free) < batch:
            return
        group = []
        while self.waiting and len(group) < batch and self._fits(self.waiting[0]):
            group.append(self.waiting.popleft())
        if not group:
            return
        new = self.engine.prefill(group, batch, self.places, self.budget)
        if self.decoding is None:
            self.decoding = new
        else:
            row_B = np.array(free[: len(group)] + [len(self.slots)] * batch)[:batch]
            self.decoding = self.engine.programs.insert(self.decoding, new, row_B)
        for b, row in zip(free, group):
            self.slots[b] = row
        yield from self._look(self.decoding)

    def _search(self) -> Iterator[Event]:
        """Beam searches of the first row in line and of others like it.

        As many as fill the slots with beams. Rows behind wait until they end.
        """
        jobs = [(row, self._job(row)) for row in self.waiting if row.searched]
        kind = jobs[0][1].kind
        most = max(1, self.engine.slots // kind[0])
        group = [(row, job) for row, job in jobs if job.kind == kind][:most]
        for row, _ in group:
            self.waiting.remove(row)
        cache = self.engine.read([row.prepared for row, _ in group], bucket(len(group)))
        for events in self.engine.searcher.run(
            [job for _, job in group],
            cache,
            budget=bucket(max(row.limit for row, _ in group)),
            chunk=self.engine.chunk,
        ):
            yield from events

    def _job(self, row: Row) -> Job:
        prepared, request, engine = row.prepared, row.prepared.request, self.engine
        return Job(
            request,
            prepared.ids,
            engine.end_ids(request),
            (*request.stop, *engine.template.stop),
            tuple(engine.answer(request) for _ in range(request.n)),
            row.began,
            prepared.dropped_turns,
        )

    def _fits(self, row: Row) -> bool:
        if row.searched:
            return False
        places = max(row.places, bucket(len(row.prepared.ids)))
        return row.limit <= self.budget and places <= self.places

    def _decode(self) -> Iterator[Event]:
        """Let the running rows grow by a chunk."""
        ended_B = np.array([row is None for row in self.slots])
        self.decoding = self.engine.programs.decode(
            self.engine.weights, self.decoding, ended_B, steps=self.engine.chunk
        )
        yield from self._look(self.decoding)

    def _look(self, state: decoding.Decoding) -> Iterator[Event]:
        """Events of the tokens that are new; rows that ended give up their slots."""
        parts = [state.ids_BA, state.logprobs_BA, state.count_B]
        if any(
            row and row.prepared.request.sampling.top_logprobs for row in self.slots
        ):
            parts += [state.top_ids_BAU, state.top_logprobs_BAU]
        ids_BA, logprobs_BA, count_B, *tops = jax.device_get(parts)
        now = time.perf_counter()
        for b, row in enumerate(self.slots):
            if row is None or count_B[b] == row.answer.count:
                continue
            if row.first_token is None:
                row.first_token = now
            new = slice(row.answer.count, int(count_B[b]))
            new_tops = [top_BAU[b, new] for top_BAU in tops]
            yield self._event(row, ids_BA[b, new], logprobs_BA[b, new], new_tops, now)
            if row.answer.finish_reason:
                self.slots[b] = None

    def _event(self, row: Row, ids_A, logprobs_A, tops: Sequence, now: float) -> Event:
        """What its new tokens tell; `tops` is empty, or ids and logprobs of the likeliest."""
        answer, request = row.answer, row.prepared.request
        ids = ids_A.tolist()
        taken = answer.push(ids, self.engine.end_ids(request), row.limit)
        event = functools.partial(
            Event,
            request_id=request.id,
            index=row.index,
            piece=answer.piece(),
            ids=tuple(ids[:taken]),
            logprobs=tuple(logprobs_A[:taken].tolist()),
        )
        if k := request.sampling.top_logprobs:
            ids_AU, logprobs_AU = (top_AU[:taken, :k].tolist() for top_AU in tops)
            pairs = [tuple(zip(*likeliest)) for likeliest in zip(ids_AU, logprobs_AU)]
            event = functools.partial(event, top_logprobs=tuple(pairs))
        if not answer.finish_reason:
            return event()
        usage = Usage(
            prompt_tokens=len(row.prepared.ids),
            answer_tokens=answer.count,
            seconds_to_first_token=row.first_token - row.began,
            seconds=now - row.began,
            dropped_turns=row.prepared.dropped_turns,
        )
        return event(
            finish_reason=answer.finish_reason, usage=usage, error=answer.error
        )


def _check_ids(sampling: Sampling, vocabulary: int) -> None:
    for name in ("banned_ids", "stop_ids"):
        wrong = [token for token in getattr(sampling, name) if token >= vocabulary]
        if wrong:
            raise InputError(f"{name}: got {wrong[0]}, want ids below {vocabulary}")
