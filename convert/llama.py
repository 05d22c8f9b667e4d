"""Rule tables for the decoder: Hugging Face LLaMA and llama.cpp's GGUF names."""

from convert.rules import (
    JOIN_HEADS,
    KEEP,
    SPLIT_HEADS,
    TRANSPOSE,
    Drop,
    Rule,
    half_rotated,
    must_equal,
)

_L = r"model\.layers\.(\d+)\."
_BLOCKS = "llama/blocks/"

HF = (
    Drop(
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        "rotary angles are computed from rope_theta",
    ),
    Rule(r"model\.embed_tokens\.weight", "llama/embed/embedding", KEEP),
    Rule(_L + r"input_layernorm\.weight", _BLOCKS + "attn_norm/scale", KEEP),
    Rule(_L + r"self_attn\.q_proj\.weight", _BLOCKS + "attn/q/kernel", SPLIT_HEADS),
    Rule(_L + r"self_attn\.k_proj\.weight", _BLOCKS + "attn/k/kernel", SPLIT_HEADS),
    Rule(_L + r"self_attn\.v_proj\.weight", _BLOCKS + "attn/v/kernel", SPLIT_HEADS),
    Rule(_L + r"self_attn\.o_proj\.weight", _BLOCKS + "attn/out/kernel", JOIN_HEADS),
    Rule(_L + r"post_attention_layernorm\.weight", _BLOCKS + "mlp_norm/scale", KEEP),
    Rule(_L + r"mlp\.gate_proj\.weight", _BLOCKS + "mlp/gate/kernel", TRANSPOSE),
    Rule(_L + r"mlp\.up_proj\.weight", _BLOCKS + "mlp/up/kernel", TRANSPOSE),
    Rule(_L + r"mlp\.down_proj\.weight", _BLOCKS + "mlp/down/kernel", TRANSPOSE),
    Rule(r"model\.norm\.weight", "llama/norm/scale", KEEP),
    Rule(
        r"lm_head\.weight",
        "llama/head/kernel",
        TRANSPOSE,
        otherwise=must_equal("model.embed_tokens.weight"),
    ),
)

_B = r"blk\.(\d+)\."

GGUF = (
    Drop(r"rope_freqs\.weight", "rotary angles are computed from rope_theta"),
    Rule(r"token_embd\.weight", "llama/embed/embedding", KEEP),
    Rule(_B + r"attn_norm\.weight", _BLOCKS + "attn_norm/scale", KEEP),
    Rule(_B + r"attn_q\.weight", _BLOCKS + "attn/q/kernel", half_rotated(SPLIT_HEADS)),
    Rule(_B + r"attn_k\.weight", _BLOCKS + "attn/k/kernel", half_rotated(SPLIT_HEADS)),
    Rule(_B + r"attn_v\.weight", _BLOCKS + "attn/v/kernel", SPLIT_HEADS),
    Rule(_B + r"attn_output\.weight", _BLOCKS + "attn/out/kernel", JOIN_HEADS),
    Rule(_B + r"ffn_norm\.weight", _BLOCKS + "mlp_norm/scale", KEEP),
    Rule(_B + r"ffn_gate\.weight", _BLOCKS + "mlp/gate/kernel", TRANSPOSE),
    Rule(_B + r"ffn_up\.weight", _BLOCKS + "mlp/up/kernel", TRANSPOSE),
    Rule(_B + r"ffn_down\.weight", _BLOCKS + "mlp/down/kernel", TRANSPOSE),
    Rule(r"output_norm\.weight", "llama/norm/scale", KEEP),
    Rule(
        r"output\.weight",
        "llama/head/kernel",
        TRANSPOSE,
        otherwise=must_equal("token_embd.weight"),
    ),
)
