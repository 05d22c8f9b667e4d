"""SmolLM2's tokenizer out of a GGUF file's metadata: `tokenizer.json`, without torch."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from convert.gguf_files import GGUFFile
from minigpt4_jax.errors import CheckpointError

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def smollm2_tokenizer_files(gguf: GGUFFile | str | Path) -> dict[str, bytes]:
    """Tokenizer files of a converted directory, by name."""
    gguf = gguf if isinstance(gguf, GGUFFile) else GGUFFile(Path(gguf))
    metadata = gguf.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    ends = {
        f"{end}_token": tokens[metadata[f"tokenizer.ggml.{end}_token_id"]]
        for end in ("bos", "eos")
    }
    return {
        "tokenizer.json": smollm2_tokenizer_json(gguf),
        "tokenizer_config.json": (json.dumps(ends, indent=2) + "\n").encode(),
    }


def smollm2_tokenizer_json(gguf: GGUFFile | str | Path) -> bytes:
    """A byte-level BPE `tokenizer.json` with the vocabulary and merges of a GGUF file.

    Ids are those of transformers on the same file. SmolLM2's own tokenizer.json splits
    off each digit before anything else, which differs in two rare cases: of several
    spaces or newlines before a digit the last stays apart here (`\\n\\n1` is `\\n` `\\n`
    `1`, not `\\n\\n` `1`), and a numeral like `²` can share a token with the space before
    it. No two ASCII digits share a token in either. The vocabulary has no piece for 21
    bytes (control characters, and those that UTF-8 hardly or never has); they encode to
    nothing.
    """
    gguf = gguf if isinstance(gguf, GGUFFile) else GGUFFile(Path(gguf))
    metadata = gguf.metadata
    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"GGUF file: tokenizer {kind}, want ('gpt2', 'smollm'); "
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
