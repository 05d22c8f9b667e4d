"""Parts that all towers share: linear, attention and its mask, norms, stacks of blocks.

Weights and activations in, activations out. Dimensions beyond style.md's key: G is the
key/value head of grouped-query attention, M any width.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models import quantised

BRANCHES = 256  # a segment id is example * BRANCHES + branch
KINDS = {  # of the fields of a preset, as someone who writes JSON calls them
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
}


def check_kinds(name: str, cfg) -> None:
    """Raise ConfigError for a field of a preset that is not of its type.

    Fields that hold other presets are not looked at.
    """
    for field in dataclasses.fields(cfg):
        value, kind = getattr(cfg, field.name), field.type
        if typing.get_origin(kind) is tuple:
            kind, *rest = typing.get_args(kind)
            length = "" if ... in rest else f" of {1 + len(rest)}"
            fits = isinstance(value, tuple) and all(_is(v, kind) for v in value)
            fits = fits and (not length or len(value) == 1 + len(rest))
            wanted = f"a list{length}, each {KINDS[kind]}"
        elif kind in KINDS:
            fits, wanted = _is(value, kind), KINDS[kind]
        else:
            continue
        if not fits:
            raise ConfigError(f"{name}.{field.name}: got {value!r}, want {wanted}")


def _is(value, kind: type) -> bool:
    """Whether JSON gave what was wanted: true is no number, infinity neither."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def check_sizes(name: str, cfg, *divides: tuple[str, str]) -> None:
    """Raise ConfigError unless a module of these sizes can be built.

    Args:
        cfg: a dataclass; all fields must be of their types, and numbers above 0.
        divides: pairs of fields, of which the first must divide the second.
    """
    check_kinds(name, cfg)
    for field in dataclasses.fields(cfg):
        size = getattr(cfg, field.name)
        if field.type in (int, float) and size <= 0:
            raise ConfigError(
                f"{name}.{field.name}: got {size}, want {KINDS[field.type]} above 0"
            )
    for part, whole in divides:
        parts, size = getattr(cfg, part), getattr(cfg, whole)
        if size % parts:
            raise ConfigError(
                f"{name}: {part}={parts} does not divide {whole}={size}; change one"
            )


@dataclasses.dataclass(frozen=True)
class DTypes:
    """Number formats of a module: stored weights, matrix products, and what it returns.

    Norm statistics, softmax, rotary angles, the ViT's residual stream and logits are
    float32 whatever is asked here.
    """

    param: str = "float32"
    compute: str = "float32"
    output: str = "float32"


class Capture:
    """Asks a forward pass to keep named intermediate values, in `values`.

    Names: "vit/hidden" (L B P D), "qformer/hidden" (L B Q D),
    "qformer/cross_attention" (L B N Q P), "llama/hidden" (L B T D); entry l of a hidden
    state is what block l returned. Nothing else is kept, and without a Capture nothing
    is computed for it. Make it inside the function that is jitted and return `values`.
    """

    NAMES = ("vit/hidden", "qformer/hidden", "qformer/cross_attention", "llama/hidden")

    def __init__(self, *names: str):
        unknown = set(names) - set(self.NAMES)
        if unknown:
            raise ValueError(
                f"capture: got {sorted(unknown)}, want some of {self.NAMES}"
            )
        self.names = names
        self.values: dict[str, jax.Array] = {}


def wants(capture: Capture | None, name: str) -> bool:
    """Whether `name` was asked for."""
    return capture is not None and name in capture.names


PRODUCT = "product"  # checkpoint name of what `linear` multiplied


def linear(
    x,
    kernel,
    bias=None,
    *,
    dtypes: DTypes,
    axes: int = 1,
    outs=None,
    out_dtype=None,
    scale=None,
):
    """Multiply the last `axes` dimensions of x by a kernel's first, and add the bias.

    Every product of a weight and an activation goes through here: adapters and
    quantised weights have one place to slot in.

    Args:
        x: [..., in], `axes` trailing input dimensions.
        kernel: [in, out], any number of output dimensions. With `outs`, also the tiles
            of that matrix, row by row: [tiles, 1, 8, 128], as sharding.held wants it.
        bias: [out] or None.
        outs: the output dimensions; None: those of the kernel.
        out_dtype: dtype of the result, which sums keep anyway (None: compute).
        scale: of a kernel of whole numbers, as models/quantised.py made both.
    """
    compute = jnp.dtype(dtypes.compute)
    rest, ins = x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :])
    outs = kernel.shape[axes:] if outs is None else outs
    columns = math.prod(outs)
    x = x.astype(compute).reshape(*rest, ins)

    def multiply(x, kernel):
        if kernel.ndim > axes + len(outs):
            kernel = untiled(kernel, columns)
        # As matrices: a TPU's compiler makes convolutions of products over two
        # dimensions, and of one over heads and their features a slow one.
        return jax.lax.dot_general(
            x,
            kernel.astype(compute).reshape(x.shape[-1], columns),
            (((len(rest),), (0,)), ((), ())),
            preferred_element_type=out_dtype,
        )

    if scale is None:
        y = multiply(x, kernel)
    else:
        y = quantised.product(multiply, x, kernel, scale)
    y = checkpoint_name(y, PRODUCT)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(-1)
    return y.reshape(*rest, *outs)


def untiled(tiles, columns: int):
    """The matrix of tiles [tiles, 1, rows, columns], which lie row by row.

    A TPU keeps matrices in such tiles, so that nothing is copied there.
    """
    *_, high, wide = tiles.shape
    x = tiles.reshape(-1, columns // wide, high, wide)
    return x.swapaxes(1, 2).reshape(-1, columns)


class Linear(nnx.Module):
    """Weights of `linear`: kernel [in, out], normal, and a zero bias.

    `std` is that of a fresh kernel; None: 1/sqrt(fan in), which keeps a signal's size.
    """

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        out_shape: int | tuple[int, ...],
        *,
        use_bias: bool = True,
        std: float | None = None,
        dtypes: DTypes,
        rngs: nnx.Rngs,
    ):
        ins = (in_shape,) if isinstance(in_shape, int) else in_shape
        outs = (out_shape,) if isinstance(out_shape, int) else out_shape
        self.axes = len(ins)
        self.ins = math.prod(ins)
        self.outs = outs
        self.dtypes = dtypes
        std = 1 / math.sqrt(math.prod(ins)) if std is None else std
        kernel = std * jax.random.normal(rngs.params(), ins + outs, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(dtypes.param))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(outs, dtypes.param))
        self.use_bias = use_bias
        self.quantised = False

    def quantise(self, kind: str) -> None:
        """Store the kernel as `kind`, int8 or int4."""
        make = functools.partial(getattr(quantised, kind), axes=self.axes)
        kernel = self.kernel[...]
        # A stack's kernels have a leading L.
        stacked = kernel.ndim > self.axes + len(self.outs)
        kernel, scale = (jax.vmap(make) if stacked else make)(kernel)
        self.kernel = nnx.Param(kernel)
        self.kernel_scale = nnx.Param(scale)
        self.quantised = True

    def __call__(self, x, out_dtype=None):
        bias = self.bias[...] if self.use_bias else None
        return linear(
            x,
            self.kernel[...],
            bias,
            dtypes=self.dtypes,
            axes=self.axes,
            outs=self.outs,
            out_dtype=out_dtype,
            scale=self.kernel_scale[...] if self.quantised else None,
        )


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension: float32 inside, `output` dtype out."""

    def __init__(self, width: int, eps: float, *, dtypes: DTypes):
        self.eps = eps
        self.dtypes = dtypes
        self.scale = nnx.Param(jnp.ones(width, dtypes.param))
        self.bias = nnx.Param(jnp.zeros(width, dtypes.param))

    def __call__(self, x):
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        x = x * self.scale[...].astype(jnp.float32)
        x = x + self.bias[...].astype(jnp.float32)
        return x.astype(self.dtypes.output)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation: float32 statistics, `output` dtype out.

    Source: modeling_llama.py casts back to the input's dtype before it multiplies by the
    weight; here the product is float32 too, which differs only in 16-bit rounding.
    """

    def __init__(self, width: int, eps: float, *, dtypes: DTypes):
        self.eps = eps
        self.dtypes = dtypes
        self.scale = nnx.Param(jnp.ones(width, dtypes.param))

    def __call__(self, x):
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtypes.output)


def gelu(x):
    """The exact (erf) GELU that every tower of the reference uses."""
    return jax.nn.gelu(x, approximate=False)


class MLP(nnx.Module):
    """Two linear layers with GELU between them (ViT and Q-Former)."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        std: float | None = None,
        dtypes: DTypes,
        rngs: nnx.Rngs,
    ):
        self.up = Linear(width, mlp_width, std=std, dtypes=dtypes, rngs=rngs)
        self.down = Linear(mlp_width, width, std=std, dtypes=dtypes, rngs=rngs)

    def __call__(self, x):
        # Else a TPU's compiler may compute erf in the tiles of the first product, beside
        # what it gathers meanwhile, in four times the time.
        return self.down(gelu(jax.lax.optimization_barrier(self.up(x))))


def attention_mask(segments_BT, positions_BT, segments_BS, positions_BS):
    """Which positions S each position T may attend to: bool, [B T S].

    Both must belong to one example, S must not come later, and S must lie in the part
    that the example's branches share or in T's own branch. This one rule gives causal
    text, several examples packed in a row, and captions that share an image prefix.

    Args:
        segments_BT: int32; 0 is padding, else example * BRANCHES + branch with examples
            from 1; branch 0 is seen by all branches of its example.
        positions_BT: int32; a branch counts on from the end of the shared part.
    """
    t, s = segments_BT[:, :, None], segments_BS[:, None, :]
    same_example = t // BRANCHES == s // BRANCHES
    visible = (s % BRANCHES == 0) | (s == t)
    past = positions_BS[:, None, :] <= positions_BT[:, :, None]
    return same_example & visible & past & (s > 0)


def attend(q_BTNK, k_BSGK, v_BSGK, mask_BTS=None):
    """Softmax attention, scaled by 1/sqrt(K), softmax in float32; N is a multiple of G."""
    mask_B1TS = None if mask_BTS is None else mask_BTS[:, None]
    return jax.nn.dot_product_attention(q_BTNK, k_BSGK, v_BSGK, mask=mask_B1TS)


def attention_map(q_BTNK, k_BSNK):
    """The probabilities that `attend` uses, float32 [B N T S]; for looking at."""
    logits_BNTS = jnp.einsum(
        "BTNK,BSNK->BNTS", q_BTNK, k_BSNK, preferred_element_type=jnp.float32
    )
    return jax.nn.softmax(logits_BNTS / math.sqrt(q_BTNK.shape[-1]), axis=-1)


def make_stack(
    make_block: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs
):
    """One block whose weights have a leading L: `length` blocks, each drawn apart."""

    @nnx.split_rngs(splits=length)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return make_block(rngs)

    return make(rngs)


def unstack(blocks: nnx.Module) -> nnx.List:
    """The same blocks as a list, each with weights of its own.

    XLA:CPU copies a layer's slice out of the stack at every step of a scan, so a list
    decodes faster there; it compiles once for each block, so training keeps the stack.
    The `blocks` of ViT and Llama may be replaced by such a list; the Q-Former's two
    stacks are applied in groups and stay stacked.
    """
    graphdef, state = nnx.split(blocks)
    length = jax.tree.leaves(state)[0].shape[0]
    return nnx.List(nnx.merge(graphdef, layer(state, i)) for i in range(length))


def layer(tree, i: int):
    """Entry i of every array of a stacked pytree."""
    return jax.tree.map(lambda x_L: x_L[i], tree)


def apply_stack(
    blocks,
    step: Callable,
    carry,
    xs=None,
    *,
    remat: bool = False,
    gather: Callable | None = None,
):
    """Run `carry, y = step(block, carry, x)` over blocks; returns carry and all ys.

    Args:
        blocks: a stacked block (one compiled body, by scan) or a list from `unstack`.
        xs: one entry a block (None: no input). For a stacked block a pytree with
            leading L, and so are the ys; for a list a sequence, and the ys are a list:
            a cache is then never stacked or copied.
        remat: a gradient keeps only what goes from block to block, and computes the
            products inside a block a second time.
        gather: a block's state, of which this device holds a part -> the whole of it,
            made anew for the gradient.
    """
    if isinstance(blocks, nnx.List):
        assert not remat, "a list is for decoding"
        ys = []
        for block, x in zip(blocks, [None] * len(blocks) if xs is None else xs):
            carry, y = step(block, carry, x)
            ys.append(y)
        return carry, ys

    graphdef, state = nnx.split(blocks)

    def body(carry, inputs):
        block_state, x = inputs
        if gather is not None:
            block_state = gather(block_state)
        return step(nnx.merge(graphdef, block_state), carry, x)

    return scan_blocks(body, carry, (state, xs), remat=remat)


def scan_blocks(body: Callable, carry, inputs, *, remat: bool):
    """jax.lax.scan over blocks; `remat` as in `apply_stack`.

    Without it a gradient keeps what weights were multiplied into, and computes the rest
    (norms, activations, attention) again. That takes half the memory, nothing that grows
    with the square of a row, and on a CPU it is faster than writing and reading it.
    """
    kept = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    # A scan's body is compiled for forward and for backward apart, so that there is no
    # common part whose sharing would have to be prevented.
    body = jax.checkpoint(body, prevent_cse=False, policy=None if remat else kept)
    return jax.lax.scan(body, carry, inputs)


def stacked(values):
    """Arrays that `apply_stack` returned for its blocks, with a leading L either way."""
    return jnp.stack(values) if isinstance(values, list | tuple) else values
