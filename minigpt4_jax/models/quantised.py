"""Weights in 8 or 4 bits: float matrices -> whole numbers and scales, and back.

int8 has one scale for each output, so it is applied to sums. int4 has a scale and an
offset for each group of inputs of an output, float16, and two numbers in a byte. Numbers
are rounded once, when weights are loaded; activations stay floats.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.errors import ConfigError, unknown

KINDS = ("int8", "int4")
# In wide models 128 weights share a scale (4.25 bits a weight), as in GPTQ and AWQ. Narrow
# ones lose more by rounding and have little to save: 32, as in GGUF's Q4_1, whose weights
# so come back unchanged (5 bits).
WIDE = 4096
CUTS = (0, 0.06, 0.12)  # of a group's range at either end; the pair with least error
FITS = 4  # times that scale and offset are fitted to what the numbers then are


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """What is stored in few bits; "" is what DTypes says.

    decoder: "int8" or "int4" for its kernels; embeddings and head are then int8.
    vision: "int8" for the kernels of the ViT's blocks.
    kv: "int8" for the keys and values that decoding keeps, a scale for each head.
    """

    decoder: str = ""
    vision: str = ""
    kv: str = ""

    def __post_init__(self):
        for name, known in (
            ("decoder", KINDS),
            ("vision", KINDS[:1]),
            ("kv", KINDS[:1]),
        ):
            value = getattr(self, name)
            if value and value not in known:
                # The decoder's is called as the argument of Generator.load.
                name = "quantize" if name == "decoder" else name
                raise ConfigError(unknown(name, value, known))

    def kind(self, path: str, ins: int) -> str:
        """How the parameter at `path` with `ins` inputs is stored."""
        tower, *_, leaf = path.split("/")
        if leaf not in ("kernel", "embedding"):
            return ""
        if tower == "vit":
            return self.vision if "/blocks/" in path else ""
        if tower != "llama":
            return ""
        whole = "/blocks/" not in path or not group_size(ins)
        return "int8" if self.decoder and whole else self.decoder


def group_size(ins: int) -> int:
    """Inputs that share a scale in int4; 0 where an odd number cannot be paired."""
    most = 128 if ins >= WIDE else 32
    return next(
        (g for g in (128, 64, 32, 16, 8, 4, 2) if g <= most and not ins % (2 * g)), 0
    )


@functools.partial(jax.jit, static_argnames="axes")
def int8(kernel, axes: int = 1):
    """[in, out] -> (int8 of that shape, float32 scale [out]); `axes` are of `in`.

    A weight is off by at most half its output's scale, largest / 127.
    """
    whole, scale = _whole(kernel, tuple(range(axes)))
    return whole, scale.reshape(kernel.shape[axes:])


def _whole(x, axis):
    """Floats -> int8, and a float32 scale over `axis`, which it keeps as 1."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


@functools.partial(jax.jit, static_argnames=("axes", "group"))
def int4(kernel, axes: int = 1, group: int = 0):
    """[in, out] -> (uint8 [in/2, out], float16 scale and offset [in/group, 2, out]).

    All input dimensions become one, so do those of the output. A byte has inputs i and
    i + group, of two neighbouring groups. Scale and offset are those of least squared
    error that a few cuts of the range and fits by least squares find.

    Args:
        group: inputs that share a scale; 0: `group_size`.
    """
    ins = math.prod(kernel.shape[:axes])
    group = group or group_size(ins)
    x_GIO = kernel.astype(jnp.float32).reshape(ins // group, group, -1)
    low_G1O, high_G1O = x_GIO.min(1, keepdims=True), x_GIO.max(1, keepdims=True)
    middle_G1O, range_G1O = (low_G1O + high_G1O) / 2, high_G1O - low_G1O
    cuts = jnp.array([(low, high) for low in CUTS for high in CUTS], jnp.float32)
    error_G1O = jnp.full_like(low_G1O, jnp.inf)
    none = jnp.zeros_like(low_G1O, jnp.float16)

    def better(best, step, start):
        """The better one of what was found and this scale and offset."""
        step, start = step.astype(jnp.float16), start.astype(jnp.float16)
        whole_GIO = _nearest(x_GIO, step, start)
        off_GIO = whole_GIO * step + start - x_GIO
        new = (off_GIO**2).sum(1, keepdims=True), step, start
        # Not `new < best`: what is not a number would then be left out, and stand as 0.
        kept = new[0] >= best[0]
        return tuple(jnp.where(kept, old, n) for n, old in zip(new, best))

    def cut(i, best):
        low, high = cuts[i]
        step = (range_G1O * (1 - low - high) / 15).astype(jnp.float16)
        start = low_G1O + low * range_G1O
        return better(best, step, jnp.where(step == 0, middle_G1O, start))

    def fit(_, best):
        whole_GIO = _nearest(x_GIO, *best[1:])
        mean_G1O, middle = (
            whole_GIO.mean(1, keepdims=True),
            x_GIO.mean(1, keepdims=True),
        )
        from_mean_GIO = whole_GIO - mean_G1O
        spread_G1O = (from_mean_GIO**2).sum(1, keepdims=True)
        shared_G1O = (from_mean_GIO * x_GIO).sum(1, keepdims=True)
        step = shared_G1O / jnp.where(spread_G1O == 0, 1, spread_G1O)
        return better(best, step, middle - step * mean_G1O)

    # Loops, so that a kernel is read as often as there are candidates, and not kept so
    # often.
    best = jax.lax.fori_loop(0, len(cuts), cut, (error_G1O, none, none))
    _, step, start = jax.lax.fori_loop(0, FITS, fit, best)
    whole = _nearest(x_GIO, step, start)
    pairs = whole.astype(jnp.uint8).reshape(-1, 2, *whole.shape[1:])
    packed = pairs[:, 0] | (pairs[:, 1] << 4)
    return packed.reshape(ins // 2, -1), jnp.concatenate([step, start], axis=1)


def _nearest(x_GIO, step_G1O, start_G1O):
    """The whole numbers that stand for x best."""
    step = jnp.where(step_G1O == 0, 1, step_G1O).astype(jnp.float32)
    return jnp.clip(jnp.round((x_GIO - start_G1O) / step), 0, 15)


def rounded(path: str, floats, like, scale):
    """A parameter, or one layer of a stack -> its whole numbers and their scales.

    Args:
        path: of the parameter.
        like, scale: shape and dtype of both for the whole parameter, as
            MiniGPT4.quantise gives them.
    """
    floats = jnp.asarray(floats)
    if path.endswith("embedding"):
        whole, made = int8(floats.T)
        return whole.T, made
    if like.dtype == jnp.uint8:
        return int4(floats.reshape(2 * like.shape[-2], -1))
    ins = math.prod(like.shape) // math.prod(scale.shape)
    return int8(floats.reshape(ins, -1))


def unpacked(kernel, scale, dtype):
    """What `int4` made -> [in, out] in `dtype`."""
    outs, groups = kernel.shape[-1], scale.shape[0]
    pairs = kernel.reshape(groups // 2, 1, -1, outs)
    shift = jnp.array([0, 4], jnp.uint8).reshape(1, 2, 1, 1)
    whole = ((pairs >> shift) & 15).reshape(groups, -1, outs)
    # float32: whole * step + offset rounds once, at the end.
    step, start = scale[:, :1].astype(jnp.float32), scale[:, 1:].astype(jnp.float32)
    return (whole.astype(jnp.float32) * step + start).astype(dtype).reshape(-1, outs)


FEW = 16  # rows that read an int4 kernel; more are worth writing it as floats at once
PIECE = 12e6  # bytes of floats that a CPU's caches hold
DIGITS = 3  # of a float as int8; each is 254 times finer, so that three hold 24 bits
MANY = 272  # rows in digits at most: an image's, or a prompt's piece; they take memory


def product(multiply: Callable, x, kernel, scale):
    """x [..., in] times a kernel of whole numbers.

    XLA:CPU would write a kernel out as floats, which takes longer than most products. So
    int8 is multiplied as it is, by x in digits. int4, and int8 in training, become
    floats; as that does not depend on x, XLA would do it at the start of a program: all
    kernels, into memory of their own. So a kernel waits for its x, and a large one in
    int4 is converted and multiplied piece by piece; the pieces follow one another
    through memory that stays in the caches.

    Args:
        multiply: (x, kernel of floats or int8) -> their product.
    """
    rows, ins = math.prod(x.shape[:-1]), x.shape[-1]

    def whole(x, kernel, scale):
        if kernel.dtype == jnp.uint8:
            return multiply(x, unpacked(kernel, scale, x.dtype))
        y = multiply(x, kernel)
        return (y * scale.reshape(-1)).astype(y.dtype)

    def waiting(x, kernel, scale):
        never = jax.lax.stop_gradient(x).ravel()[0] > 1e30
        return whole(x, kernel ^ never.astype(kernel.dtype), scale)

    def in_digits(x, kernel, scale):
        return digits_product(whole, 0, x, kernel.reshape(ins, -1), scale)

    cpu: Callable = waiting
    packed = kernel.dtype == jnp.uint8
    if packed and rows <= FEW:
        pieces = _pieces(kernel, scale, x.dtype.itemsize)
        cpu = functools.partial(_in_pieces, whole, pieces) if pieces > 1 else waiting
    # Not in tiles (sharding.held), which only training has.
    elif not packed and rows <= MANY and kernel.ndim < 4:
        cpu = in_digits
    return jax.lax.platform_dependent(x, kernel, scale, cpu=cpu, default=whole)


def product_of_rows(multiply: Callable, x, kernel_OI, scale_O):
    """The same for int8 that has an output a row, as embeddings that are the head too.

    Args:
        multiply: (x, some rows of the kernel, their scales) -> their product.
    """
    cpu = multiply
    if math.prod(x.shape[:-1]) <= MANY:
        cpu = functools.partial(digits_product, multiply, 1)
    return jax.lax.platform_dependent(x, kernel_OI, scale_O, cpu=cpu, default=multiply)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def digits_product(whole: Callable, axis: int, x, kernel, scale):
    """What `whole(x, kernel, scale)` is, from sums of whole numbers, which are exact.

    Args:
        axis: of the inputs in an int8 kernel of two dimensions.
    """
    like = jax.eval_shape(whole, x, kernel, scale)
    x_RI = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    largest_R1 = jnp.abs(x_RI).max(-1, keepdims=True)
    step_R1 = jnp.where(largest_R1 == 0, 1, largest_R1) / 127
    rest_RI, digits = x_RI / step_R1, []
    for _ in range(DIGITS):
        digit_RI = jnp.round(rest_RI)
        digits.append(digit_RI.astype(jnp.int8))
        rest_RI = (rest_RI - digit_RI) * 254
    sums_RO = jax.lax.dot_general(
        jnp.concatenate(digits),
        kernel,
        (((1,), (axis,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    parts = jnp.split(sums_RO.astype(jnp.float32), DIGITS)
    y_RO = sum(part / 254.0**i for i, part in reversed(list(enumerate(parts))))
    return (y_RO * step_R1 * scale.reshape(-1)).astype(like.dtype).reshape(like.shape)


def _digits_forward(whole, axis, x, kernel, scale):
    return digits_product(whole, axis, x, kernel, scale), (x, kernel, scale)


def _digits_backward(whole, axis, kept, cotangent):
    x, kernel, scale = kept
    _, backward = jax.vjp(lambda x, scale: whole(x, kernel, scale), x, scale)
    x, scale = backward(cotangent)
    return x, np.zeros(kernel.shape, jax.dtypes.float0), scale


digits_product.defvjp(_digits_forward, _digits_backward)


def _pieces(kernel, scale, size: int) -> int:
    """Into how many pieces along its inputs int4 goes, each at most PIECE bytes."""
    pairs = scale.shape[0] // 2  # of groups; not to be cut
    least = math.ceil(2 * kernel.size * size / PIECE)
    return next((n for n in range(least, pairs + 1) if pairs % n == 0), 1)


def _in_pieces(whole: Callable, pieces: int, x, kernel, scale):
    ins = x.shape[-1]
    kernels = kernel.reshape(pieces, ins // pieces // 2, -1)
    scales = scale.reshape(pieces, -1, *scale.shape[1:])

    def step(total, inputs):
        i, kernel, scale = inputs
        part = jax.lax.dynamic_slice_in_dim(x, i * (ins // pieces), ins // pieces, -1)
        return total + whole(part, kernel, scale), None

    like = jax.eval_shape(whole, x, kernel, scale)
    total = jnp.zeros(like.shape, like.dtype)
    return jax.lax.scan(step, total, (jnp.arange(pieces), kernels, scales))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """Keys or values of a cache: int8 [..., K] and a float32 scale [..., 1] a head."""

    values: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, x) -> "Int8":
        return cls(*_whole(x, -1))

    def floats(self, dtype):
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)
