"""Who decodes in benchmarks.generate: ours, transformers, llama.cpp, one way to ask each.

All get the same prompts as ids (ours as the texts they come from, as a caller's would)
and give, greedily, a fixed number of tokens for each, whatever they say.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.llama import Llama
from minigpt4_jax.models.minigpt4 import DEMO, MiniGPT4
from minigpt4_jax.request import GREEDY, Request, user


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked: `prompts` are the ids of `texts`, a row each, of any lengths."""

    texts: Sequence[str]
    prompts: Sequence[Sequence[int]]
    tokens: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """Seconds until all rows had their first and their last token, and the ids."""

    first: float
    last: float
    ids: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """`held`: bytes of its decoder's weights; `rows`: how many prompts it takes at once."""

    name: str
    held: int
    ask: Callable[[Task], Answers]
    rows: int = 8


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
        generator = Generator.load(name, dtype=dtype, quantize=quantize, chunk=chunk)
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
        generator = Generator(model, Spelled(), chunk=chunk)
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
        eos_token_id=None,  # so that it goes on, as ours does
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


def weights_of(generator: Generator) -> tuple[int, int]:
    """How many weights the decoder has, and their bytes."""
    held = jax.tree.leaves(nnx.state(generator.model.llama))
    return sum(x.size for x in held), sum(x.nbytes for x in held)


def ask_ours(generator: Generator, task: Task) -> Answers:
    sampling = dataclasses.replace(GREEDY, max_tokens=task.tokens)
    requests = [
        Request([user(text)], sampling=sampling, id=str(i))
        for i, text in enumerate(task.texts)
    ]
    ids: list[list[int]] = [[] for _ in requests]
    first = last = 0.0
    began = time.perf_counter()
    for event in generator.submit(requests):
        row, now = ids[int(event.request_id)], time.perf_counter() - began
        first = first if row else now
        row += event.ids
        last = now
    return Answers(first, last, ids)


def ask_theirs(model: transformers.LlamaForCausalLM, task: Task) -> Answers:
    times, began = [], time.perf_counter()
    most = max(map(len, task.prompts))
    ids_BT = torch.zeros(len(task.prompts), most, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(task.prompts):  # padding in front
        ids_BT[b, most - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, most - len(prompt) :] = 1

    # Asked after each token; a streamer would take one row alone.
    def note(ids_BT, scores, **_):
        times.append(time.perf_counter() - began)
        return torch.zeros(len(ids_BT), dtype=torch.bool)

    with torch.inference_mode():
        out_BT = model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=task.tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[note],
        )
    return Answers(times[0], times[-1], out_BT[:, most:].tolist())


def llama_cpp(gguf: Path, folder: Path) -> Iterable[Contender]:
    """llama.cpp on a GGUF file in Q4_1, and on what its own quantize makes of that.

    Args:
        folder: for those files; they are memory-mapped, so it must stay.
    """
    import llama_cpp as lib

    files = {"Q4_1": gguf}
    kinds = {"Q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "float32": lib.LLAMA_FTYPE_ALL_F32}
    for kind, number in kinds.items():
        files[kind] = folder / f"{kind}.gguf"
        how = lib.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = number, True
        names = (str(path).encode() for path in (files["Q4_1"], files[kind]))
        if lib.llama_model_quantize(*names, how):
            raise OSError(f"llama.cpp could not write {files[kind]}")
    for kind, path in files.items():
        model = lib.Llama(
            str(path), n_ctx=1024, n_threads=os.cpu_count(), verbose=False
        )
        held = lib.llama_model_size(model.model)
        yield Contender(
            f"llama.cpp {kind}", held, functools.partial(ask_llama_cpp, model), rows=1
        )


def ask_llama_cpp(model, task: Task) -> Answers:
    model.reset()  # else it keeps what it read of the same prompt
    (prompt,), began = task.prompts, time.perf_counter()
    ids, times = [], []
    for token in model.generate(prompt, temp=0.0):
        ids.append(token)
        times.append(time.perf_counter() - began)
        if len(ids) == task.tokens:
            break
    return Answers(times[0], times[-1], [ids])
