"""SmolLM2's tokenizer out of a GGUF file's metadata: `tokenizer.json`, without torch."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from convert.gguf_files import GGUFFile
from minigpt4_jax.errors import CheckpointError

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def smollm2_tokenizer_files(gguf_path: str | Path) -> dict[str, bytes]:
    """Tokenizer files of a converted directory, by name."""
    metadata = GGUFFile(Path(gguf_path)).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    ends = {
        f"{end}_token": tokens[metadata[f"tokenizer.ggml.{end}_token_id"]]
        for end in ("bos", "eos")
    }
    return {
        "tokenizer.json": smollm2_tokenizer_json(gguf_path),
        "tokenizer_config.json": (json.dumps(ends, indent=2) + "\n").encode(),
    }


def smollm2_tokenizer_json(gguf_path: str | Path) -> bytes:
    """A byte-level BPE `tokenizer.json` with the vocabulary and merges of a GGUF file.

    Ids are those of transformers on the same file. They differ from those of SmolLM2's
    own tokenizer.json, which splits off each digit before anything else, in one place:
    of several spaces or newlines before a digit the last stays apart (`\\n\\n1` is
    `\\n` `\\n` `1`, not `\\n\\n` `1`). No two ASCII digits share a token in either.
    """
    metadata = GGUFFile(Path(gguf_path)).metadata
    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"{gguf_path}: tokenizer {kind}, want ('gpt2', 'smollm'); "
            "only SmolLM2's is converted from GGUF"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, metadata["tokenizer.ggml.token_type"]))
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, k in kinds
            if k == CONTROL
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in kinds if k == USER_DEFINED]
    )
    return tokenizer.to_str().encode()
