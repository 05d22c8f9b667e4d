"""The plan's method where figures are published: plain decoder training on TPU slices.

    python -m benchmarks.plan_published [--only=16b]

Compiles training of whole decoders, as MaxText's scripts describe them, with our Llama, our
step and our sharding, and prints the projected TFLOP/s of a chip beside the published ones.
Needs libtpu (extra `tpu`), no TPU. Work is counted as MaxText counts it: 6 a weight and
token, attention not halved. Attention itself is a Pallas kernel (as theirs), of which the
compiler estimates nothing: it counts at KERNEL of the peak. "again too" counts what our
blocks compute a second time: the published runs kept what fitted, but for 16b, which
computed all again as ours do.
"""

import dataclasses
import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import stage1
from minigpt4_jax import chips, errors, optim, projection, sharding
from minigpt4_jax.models import llama as llama_lib
from minigpt4_jax.models.llama import LlamaConfig
from minigpt4_jax.models.minigpt4 import PRESETS, cross_entropy
from minigpt4_jax.step import make_step, new_state, without_values

KERNEL = 0.5  # of the peak, for attention


@dataclass(frozen=True)
class Published:
    """A run of MaxText: README of AI-Hypercomputer/maxtext, its script beside it."""

    topology: str
    decoder: LlamaConfig
    rows: int  # a chip
    tokens: int
    mesh: dict
    remat: bool
    tflops: float  # a second and chip
    script: str


def scaled(width: int, heads: int, mlp: int, layers: int, **other) -> LlamaConfig:
    base = dict(vocab_size=32_000, num_kv_heads=heads, head_size=128, eps=1e-5)
    sizes = dict(width=width, num_heads=heads, mlp_width=mlp, num_layers=layers)
    return LlamaConfig(**base | sizes | dict(max_positions=8192) | other)


RUNS = {
    "16b": Published(
        *("v5e:16x16", scaled(4096, 64, 28_672, 32), 6, 2048),
        *(dict(data=2, fsdp=128, tensor=1), True, 120, "configs/v5e/16b.sh"),
    ),
    "32b": Published(
        *("v5p:4x4x4", scaled(8192, 64, 28_672, 32), 7, 2048),
        *(dict(data=1, fsdp=16, tensor=4), True, 328, "configs/v5p/32b.sh"),
    ),
    "llama3.1-8b": Published(
        "v6e:2x4",
        scaled(4096, 32, 14_336, 32, vocab_size=128_256, num_kv_heads=8),
        *(2, 8192, dict(data=1, fsdp=8, tensor=1), True, 413, "README, v6e-8"),
    ),
}


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise errors.InputError("plan_published takes flags only")
    jax.config.update("jax_platforms", "cpu")
    print(
        f"{'run':14}{'on':>11}{'projected':>11}{'again too':>11}{'published':>11}"
        f"{'ratio':>7}  step"
    )
    for name, run in RUNS.items():
        if flags.FLAGS.only in (None, name):
            print(row(name, run), flush=True)


def row(name: str, run: Published) -> str:
    on = chips.parse(run.topology)
    mesh = sharding.make_mesh(**run.mesh, devices=on.devices())
    began = time.perf_counter()
    compiled = lowered(run, mesh, on.chips).compile()
    took = time.perf_counter() - began
    tokens = run.rows * run.tokens
    cfg = run.decoder
    scores = 12 * cfg.num_layers * cfg.num_heads * cfg.head_size * run.tokens * tokens
    found = projection.read(compiled, on, mesh, batch=tokens, useful_flops=0)
    again = 8 / 6 if run.remat else 1
    attention = again * scores / (KERNEL * on.chip.peak)
    seconds = found.seconds + attention
    work = 6 * weights(cfg) * tokens + scores
    tflops = work / seconds / 1e12
    return (
        f"{name:14}{run.topology:>11}{tflops:11.0f}{again * tflops:11.0f}{run.tflops:11.0f}"
        f"{tflops / run.tflops:7.2f}  {seconds:.2f} s, of it attention {attention:.2f}, "
        f"collectives by themselves {found.collectives:.2f}; {found.peak / 2**30:.1f} GiB; "
        f"compiled in {took:.0f} s"
    )


def weights(cfg: LlamaConfig) -> int:
    heads = 2 * cfg.num_heads + 2 * cfg.num_kv_heads
    block = cfg.width * (heads * cfg.head_size + 3 * cfg.mlp_width)
    return cfg.num_layers * block + cfg.width * cfg.vocab_size


def lowered(run: Published, mesh, devices: int):
    """Training of every weight of the decoder on rows that are full."""
    preset = dataclasses.replace(PRESETS["minigpt4_vicuna_7b"], llama=run.decoder)
    llama_lib.attend = flash
    patterns = (r"llama/.*",)
    found = without_values(preset, patterns, mesh, projection.BFLOAT16, remat=run.remat)
    gather = found.parts.gather
    # Trained weights are float32; the others send them in bfloat16 too.
    found.parts.gather = lambda path, x, skip=0: gather(
        path, x.astype(jnp.bfloat16), skip
    )
    optimizer = optim.make_optimizer(stage1.get_config().optim)
    step = make_step(found, text_loss, optimizer, lambda step: 1e-4)
    state = jax.eval_shape(lambda p: new_state(p, optimizer), found.params)
    places = sharding.places(state, mesh)
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        *(state, places),
    )
    rows = run.rows * devices
    where = NamedSharding(mesh, sharding.BATCH)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    batch = {
        "ids_RT": array((rows, run.tokens), jnp.int32),
        "ok_B": array((rows,), jnp.float32),
    }
    return step.lower(state, found.frozen, (batch,))


def text_loss(model, batch: dict):
    """Next-token cross-entropy of full rows."""
    ids_RT = batch["ids_RT"]
    segments_RT = jnp.ones_like(ids_RT)
    positions_RT = jnp.broadcast_to(jnp.arange(ids_RT.shape[1]), ids_RT.shape)
    x_RTD = model.llama.embed(ids_RT)
    hidden_RTD, _ = model.llama(x_RTD, segments_RT, positions_RT)

    def of_row(ids_T, hidden_TD):  # logits of one row at a time
        return cross_entropy(model.llama.logits(hidden_TD), jnp.roll(ids_T, -1)).sum()

    total = jax.lax.map(
        jax.checkpoint(lambda pair: of_row(*pair)), (ids_RT, hidden_RTD)
    )
    return total.sum(), jnp.float32(math.prod(ids_RT.shape))


def flash(q_BTNK, k_BSGK, v_BSGK, mask_BTS=None):
    """Causal attention by the kernel that comes with JAX; the mask is not read."""
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    groups = q_BTNK.shape[2] // k_BSGK.shape[2]
    k_BSNK, v_BSNK = (jnp.repeat(x, groups, axis=2) for x in (k_BSGK, v_BSGK))
    scale = 1 / math.sqrt(q_BTNK.shape[-1])

    def own(*qkv):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in qkv)
        out = flash_attention(q, k, v, causal=True, sm_scale=scale)
        return out.transpose(0, 2, 1, 3)

    heads = P(None, None, "tensor", None)  # XLA splits no kernel by itself
    over = dict(in_specs=heads, out_specs=heads, axis_names={"tensor"})
    return jax.shard_map(own, check_vma=False, **over)(q_BTNK, k_BSNK, v_BSNK)


if __name__ == "__main__":
    flags.DEFINE_string("only", None, "one of the runs")
    errors.run(main)
