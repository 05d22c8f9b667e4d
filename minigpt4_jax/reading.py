"""Prompts into caches: images encoded once, prefixes kept, long prompts in pieces.

The pieces of a prompt are a function of the prompt alone: neither what else runs nor
what is kept from earlier questions changes a sum.
"""

import dataclasses
import functools
import hashlib
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np

from minigpt4_jax import decoding, sampling
from minigpt4_jax.decoding import Decoding, Programs
from minigpt4_jax.endings import Endings
from minigpt4_jax.lru import LRU
from minigpt4_jax.models.llama import Cache
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.pool import LEAST_PLACES, Empty, Shapes, bucket, fitted
from minigpt4_jax.request import Request

PIECES = (16, 32, 64, 128)  # tokens that are read at a time, padded
IMAGES_AT_ONCE = 8  # larger batches of images are split
EMBEDDING_BYTES = 64 << 20
PREFIX_BYTES = 64 << 20  # of caches kept of prompts' beginnings, at least


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

    @functools.cached_property
    def image_keys(self) -> tuple[bytes, ...]:
        """A hash of each image as the model sees it: content and preprocessing."""
        return tuple(hashlib.sha256(image_HWC).digest() for image_HWC in self.pixels)


@dataclasses.dataclass
class Reading:
    """A prompt on its way into a cache of one row.

    cuts: where a prefix ends that other questions may share.
    pieces: (begin, tokens) of what is left to read.
    """

    prepared: Prepared
    cuts: tuple[int, ...]
    pieces: deque[tuple[int, int]]
    cache: Cache
    places: int


class Reader:
    """Reads prompts for one model, whose weights do not change.

    Attributes:
        embeddings: image_QD by image, those seen last.
        prefixes: caches of one row by the prefix they hold, those used last.
    """

    def __init__(
        self,
        programs: Programs,
        weights,
        cfg: MiniGPT4Config,
        shapes: Shapes,
        empty: Empty,
        *,
        prefix_bytes: int,
    ):
        self.programs = programs
        self.weights = weights
        self.cfg = cfg
        self.shapes = shapes
        self.empty = empty
        self.embeddings: LRU[np.ndarray] = LRU(EMBEDDING_BYTES)
        self.prefixes: LRU[Cache] = LRU(prefix_bytes)
        # A batch of images takes a CPU as long as one after another.
        alone = shapes.places is not None or jax.default_backend() == "cpu"
        self.images_at_once = 1 if alone else IMAGES_AT_ONCE

    def embed(self, prompts: Sequence[Prepared]) -> None:
        """Encode the images together that will be asked for."""
        needed = [p for p in prompts if self._known(p) < max(self.cuts(p), default=0)]
        self.embed_images(
            [image for p in needed for image in p.pixels],
            [key for p in needed for key in p.image_keys],
        )

    def embed_images(
        self, pixels: Sequence[np.ndarray], keys: Sequence[bytes]
    ) -> list[np.ndarray]:
        """image_QD of each image; those seen lately are not encoded again."""
        found = {key: self.embeddings.get(key) for key in keys}
        missing = {k: image for k, image in zip(keys, pixels) if found[k] is None}
        todo = list(missing.items())
        for i in range(0, len(todo), self.images_at_once):
            group = todo[i : i + self.images_at_once]
            pixels_BHWC = np.stack([image_HWC for _, image_HWC in group])
            spare = bucket(len(group)) - len(group)
            pixels_BHWC = np.pad(pixels_BHWC, [(0, spare), (0, 0), (0, 0), (0, 0)])
            image_BQD = np.asarray(self.programs.encode(self.weights, pixels_BHWC))
            for (key, _), image_QD in zip(group, image_BQD):
                found[key] = image_QD = image_QD.copy()
                self.embeddings.put(key, image_QD, image_QD.nbytes)
        return [found[key] for key in keys]

    def cuts(self, prepared: Prepared) -> tuple[int, ...]:
        """Where a prefix ends that another question may share: behind each image.

        Samples of one request share all that is read before the first token.
        """
        last, Q = len(prepared.ids) - 1, self.cfg.num_slots
        slots = np.flatnonzero(prepared.slots)
        # Counted from the end: the first image may have lost slots (compat.py).
        ends = {min(int(slot) + 1, last) for slot in slots[::-1][::Q]}
        if prepared.request.n > 1:
            ends.add(last)
        return tuple(sorted(ends - {0}))

    def _prefix_key(self, prepared: Prepared, cut: int) -> bytes:
        """A hash of the first `cut` ids and of the images that begin before."""
        begun = -(-self._slot(prepared, cut) // self.cfg.num_slots)
        texts = (prepared.ids[:cut].tobytes(), prepared.slots[:cut].tobytes())
        return hashlib.sha256(b"".join((*texts, *prepared.image_keys[:begun]))).digest()

    def _slot(self, prepared: Prepared, position: int) -> int:
        """Image embeddings of the request's images that lie before a position."""
        behind = int(prepared.slots[position:].sum())
        return len(prepared.pixels) * self.cfg.num_slots - behind

    def begin(self, prepared: Prepared) -> Reading:
        """What is left to read of a prompt, behind the longest prefix that is kept."""
        last, cuts = len(prepared.ids) - 1, self.cuts(prepared)
        # The same number of places whatever is kept: it is part of the sums' shape.
        ends = [begin + padded(count) for begin, count in pieces(0, cuts, last)]
        places = self.shapes.room(max(last + 1, *ends, 0))
        known = self._known(prepared)
        key = self._prefix_key(prepared, known)
        cache = self.prefixes.get(key) if known else None
        if cache is None:
            known, cache = 0, self.blank(places)
        todo = deque(pieces(known, cuts, last))
        return Reading(prepared, cuts, todo, cache, places)

    def _known(self, prepared: Prepared) -> int:
        """Length of the longest prefix that is kept."""
        for cut in reversed(self.cuts(prepared)):
            if self._prefix_key(prepared, cut) in self.prefixes:
                return cut
        return 0

    def advance(self, reading: Reading) -> int:
        """Read one piece; returns how many tokens that were, padding included."""
        begin, count = reading.pieces.popleft()
        prepared, T = reading.prepared, padded(count)
        ids_1T = np.zeros((1, T), np.int32)
        slots_1T = np.zeros((1, T), bool)
        ids_1T[0, :count] = prepared.ids[begin : begin + count]
        slots_1T[0, :count] = prepared.slots[begin : begin + count]
        image_1QD = self._images(prepared, begin, int(slots_1T.sum()))[None]
        used_1 = np.array([count], np.int32)
        reading.cache = self.programs.read(
            self.weights,
            self._roomy(reading.cache, reading.places),
            *(ids_1T, slots_1T, used_1, image_1QD),
        )
        if begin + count in reading.cuts:
            # In no more places than it needs, however long this question goes on.
            kept = self._roomy(reading.cache, self.shapes.room(begin + count))
            size = sum(x.nbytes for x in jax.tree.leaves(kept))
            self.prefixes.put(self._prefix_key(prepared, begin + count), kept, size)
        return T

    def finish(self, reading: Reading, endings: Endings, index: int) -> Decoding:
        """The row of sample `index`, ready to be decoded."""
        prepared, request = reading.prepared, reading.prepared.request
        last = len(prepared.ids) - 1
        tokens_1S = np.zeros((1, reading.places), np.int32)
        tokens_1S[0, : last + 1] = np.where(prepared.slots, -1, prepared.ids)
        end_ids_1E = np.full((1, self.empty.ends), -1, np.int32)
        end_ids = endings.ids(request)
        end_ids_1E[0, : len(end_ids)] = end_ids
        first_id = endings.first_id(request)
        return decoding.start(
            self._roomy(reading.cache, reading.places),
            tokens_1S,
            self._images(prepared, last, int(prepared.slots[last]))[:1],
            end_ids_1E,
            np.array([request.sampling.max_tokens], np.int32),
            sampling.controls(
                [(request.sampling, request.seed, index)],
                1,
                self.empty.vocabulary,
                [] if first_id is None else [first_id],
            ),
        )

    def whole(self, prepared: Prepared) -> Cache:
        """A cache of one row with the prompt but for its last token."""
        reading = self.begin(prepared)
        while reading.pieces:
            self.advance(reading)
        return self.joined([reading], 1)

    def joined(self, rows: Sequence[Reading], batch: int) -> Cache:
        """A cache of `batch` rows with prompts that are read, spare ones behind."""
        places = max(reading.places for reading in rows)
        caches = [self._roomy(reading.cache, places) for reading in rows]
        if batch == 1:
            return caches[0]
        state = self.empty(batch, places)
        for b, cache in enumerate(caches):
            state = self.programs.insert(state, self.row_of(cache), b)
        return state.cache

    def _images(self, prepared: Prepared, begin: int, count: int) -> np.ndarray:
        """The `count` image embeddings from position `begin` on, zeros behind: Q D."""
        Q, D = self.cfg.num_slots, self.cfg.llama.width
        image_QD = np.zeros((Q, D), np.float32)
        if count:
            images = self.embed_images(prepared.pixels, prepared.image_keys)
            first = self._slot(prepared, begin)
            image_QD[:count] = np.concatenate(images)[first : first + count]
        return image_QD

    def _roomy(self, cache: Cache, places: int) -> Cache:
        """The cache in so many places; a kept one may have another number."""
        has = cache.segments_BS.shape[1]
        if has == places:
            return cache
        return fitted(self.programs, self.row_of(cache), places).cache

    def row_of(self, cache: Cache) -> Decoding:
        """A cache of one row as a row, of which nothing else is used."""
        return self.empty(1, cache.segments_BS.shape[1], cache)

    def blank(self, places: int) -> Cache:
        """An empty cache of one row."""
        return self.programs.new_cache(self.weights, batch=1, places=places)


def prefix_bytes(place: int, slots: int) -> int:
    """Bytes for kept prefixes, unless a caller says: an image's for each slot, one more.

    Args:
        place: bytes of a cache of one row, a place.
    """
    return max(PREFIX_BYTES, (slots + 1) * LEAST_PLACES * place)


def padded(count: int) -> int:
    """The size of a piece that holds `count` tokens."""
    return next(size for size in PIECES if size >= count)


def pieces(begin: int, cuts: Sequence[int], last: int) -> list[tuple[int, int]]:
    """(begin, tokens) of what is read from `begin` on, up to the prompt's last token."""
    found = []
    for end in (*cuts, last):
        while begin < end:
            count = min(end - begin, PIECES[-1])
            found.append((begin, count))
            begin += count
    return found
