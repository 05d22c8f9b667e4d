r"""Decoding speed of the demo's decoder beside transformers with the same dense weights.

    python -m benchmarks.generate [--checkpoint demo|random] [--tokens 64] [--repeats 5]

One text prompt, the same ids for all, greedy, batch 1, a fixed number of tokens. The
contenders take turns, so that a busy machine slows all of them; medians are printed, the
least in brackets, and the ratio to transformers in float32. Ours goes through
`Generator.submit`, text and all, in pieces of 8 tokens as a caller gets them by default;
"unstreamed" is one piece, so the two show what streaming costs. `random` needs no
converted model.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
import torch
import transformers
from absl import flags
from flax import nnx

from minigpt4_jax import errors
from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.llama import Llama
from minigpt4_jax.models.minigpt4 import DEMO, MiniGPT4
from minigpt4_jax.models.quantised import KINDS
from minigpt4_jax.request import GREEDY, Request, user

QUESTION = (
    "Tell me what a lighthouse is, who keeps it, and why it stands where it does. "
)

Timing = tuple[float, float]  # seconds to the first token, seconds to the last


class Spelled(Tokenizer):
    """One token a character, for random weights."""

    bos_id, eos_ids, pad_id, size = 1, (2,), 0, DEMO.llama.vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def special_id(self, name: str) -> int:
        return 3 + len(name)

    def token_bytes(self, token: int) -> bytes:
        return chr(97 + token % 26).encode()


def ours(name: str, dtype: str, chunk: int = 8, quantize: str = "") -> Generator:
    """A generator that never meets an end token."""
    if name != "random":
        generator = Generator.load(
            name, dtype=dtype, quantize=quantize, batch_size=1, chunk=chunk
        )
    else:
        dtypes = DTypes(dtype, dtype, dtype)
        tiny = dict(num_layers=1, mlp_width=8)
        cfg = dataclasses.replace(
            DEMO,
            vit=dataclasses.replace(DEMO.vit, **tiny),
            qformer=dataclasses.replace(DEMO.qformer, **tiny),
        )
        # Drawn in float32, so that both dtypes get the same weights.
        llama = Llama(cfg.llama, rngs=nnx.Rngs(0))
        graphdef = nnx.graphdef(
            nnx.eval_shape(lambda: Llama(cfg.llama, dtypes=dtypes, rngs=nnx.Rngs(0)))
        )
        weights = jax.tree.map(lambda w: w.astype(dtype), nnx.state(llama))
        llama = nnx.merge(graphdef, weights)
        model = MiniGPT4(cfg, dtypes=dtypes, rngs=nnx.Rngs(0), llama=llama)
        generator = Generator(model, Spelled(), batch_size=1, chunk=chunk)
    generator.tokenizer.eos_ids = (-1,)
    return generator


def theirs(generator: Generator) -> transformers.LlamaForCausalLM:
    """Hugging Face's model with the weights of a generator in float32."""
    cfg = generator.model.cfg.llama
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_size,
        rms_norm_eps=cfg.eps,
        rope_theta=cfg.rope_theta,
        max_position_embeddings=cfg.max_positions,
        tie_word_embeddings=cfg.tie_embeddings,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(dict(_their_weights(generator.model.llama)), strict=False)
    model.tie_weights()
    return model


def _their_weights(llama: Llama) -> Iterable[tuple[str, torch.Tensor]]:
    def rows(kernel, ins):  # our [in, out] -> their [out, in]
        kernel = np.asarray(kernel[...], np.float32)
        return torch.tensor(kernel.reshape(ins, -1).T.copy())

    def vector(scale):
        return torch.tensor(np.asarray(scale[...], np.float32))

    cfg = llama.cfg
    yield "model.embed_tokens.weight", vector(llama.embed.embedding)
    yield "model.norm.weight", vector(llama.norm.scale)
    if not cfg.tie_embeddings:
        yield "lm_head.weight", rows(llama.head.kernel, cfg.width)
    for i, block in enumerate(llama.blocks):
        name, attn, mlp = f"model.layers.{i}", block.attn, block.mlp
        yield f"{name}.input_layernorm.weight", vector(block.attn_norm.scale)
        yield f"{name}.post_attention_layernorm.weight", vector(block.mlp_norm.scale)
        for key, part in (("q", attn.q), ("k", attn.k), ("v", attn.v)):
            yield f"{name}.self_attn.{key}_proj.weight", rows(part.kernel, cfg.width)
        heads = cfg.num_heads * cfg.head_size
        yield f"{name}.self_attn.o_proj.weight", rows(attn.out.kernel, heads)
        for key, part in (("gate", mlp.gate), ("up", mlp.up)):
            yield f"{name}.mlp.{key}_proj.weight", rows(part.kernel, cfg.width)
        yield f"{name}.mlp.down_proj.weight", rows(mlp.down.kernel, cfg.mlp_width)


def time_ours(generator: Generator, tokens: int) -> tuple[Timing, list[int]]:
    sampling = dataclasses.replace(GREEDY, max_tokens=tokens)
    ids: list[int] = []
    for event in generator.submit([Request([user(QUESTION)], sampling=sampling)]):
        ids += event.ids
    return (event.usage.seconds_to_first_token, event.usage.seconds), ids


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when each token comes."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def time_theirs(model, prompt: list[int], tokens: int) -> tuple[Timing, list[int]]:
    clock, began = Clock(), time.perf_counter()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    times = clock.times[1:]  # the first call puts the prompt
    return (times[0] - began, times[-1] - began), out[0, len(prompt) :].tolist()


def weights_of(generator: Generator) -> int:
    """How many the decoder has."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(generator.model.llama)))


def main(argv: list[str]) -> None:
    """Read the flags, time the contenders in turns, print the table."""
    args = flags.FLAGS
    torch.set_num_threads(os.cpu_count() or 1)
    tokens = args.tokens
    contenders: dict[str, Callable[[], tuple[Timing, list[int]]]] = {}
    bytes_of: dict[str, float] = {"float32": 4, "bfloat16": 2}
    first = ours(args.checkpoint, "float32")
    prompt = first.prepare(Request([user(QUESTION)])).ids.tolist()
    for dtype in tuple(bytes_of):
        generator = first if dtype == "float32" else ours(args.checkpoint, dtype)
        model = theirs(first).to(getattr(torch, dtype))
        contenders[f"ours {dtype}"] = lambda g=generator: time_ours(g, tokens)
        contenders[f"transformers {dtype}"] = lambda m=model: time_theirs(
            m, prompt, tokens
        )
    if args.checkpoint != "random":  # which has no file to round while it is read
        for kind in KINDS:
            few = ours(args.checkpoint, "float32", quantize=kind)
            held = jax.tree.leaves(nnx.state(few.model.llama))
            size = sum(x.nbytes for x in held)
            bytes_of[kind] = round(size / weights_of(first), 2)
            contenders[f"ours {kind}"] = lambda g=few: time_ours(g, tokens)
    unstreamed = ours(args.checkpoint, "float32", chunk=tokens)
    contenders["ours float32, unstreamed"] = lambda: time_ours(unstreamed, tokens)
    answers = {name: run()[1] for name, run in contenders.items()}  # warm-up
    timings: dict[str, list[Timing]] = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, run in contenders.items():
            timings[name].append(run()[0])

    # Over the whole answer: unstreamed, its first token comes with the last.
    rates = {
        name: [tokens / last for _, last in times] for name, times in timings.items()
    }
    base = statistics.median(rates["transformers float32"])
    load = os.getloadavg()[0]
    print(
        f"{args.checkpoint}: {len(prompt)} prompt tokens, {tokens} answer tokens, batch "
        f"1, {args.repeats} turns, {os.cpu_count()} cores, load {load:.1f}, "
        f"jax {jax.__version__} on {jax.default_backend()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print("| | bytes a weight | tokens/s (most) | ratio | s to first token (least) |")
    print("|---|---|---|---|---|")
    for name in contenders:
        firsts = [first for first, _ in timings[name]]
        rate = statistics.median(rates[name])
        print(
            f"| {name} | {bytes_of[name.split()[1].rstrip(',')]} "
            f"| {rate:.1f} ({max(rates[name]):.1f}) | {rate / base:.2f} "
            f"| {statistics.median(firsts):.3f} ({min(firsts):.3f}) |"
        )
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), tokens)
        for x, y in [[answers[f"{who} float32"] for who in ("ours", "transformers")]]
    ][0]
    print(f"float32: the first {same} of {tokens} greedy tokens are identical")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "demo", "a converted model, or random")
    flags.DEFINE_integer("tokens", 64, "tokens of the answer")
    flags.DEFINE_integer("repeats", 5, "timed turns of each contender")
    errors.run(main)
