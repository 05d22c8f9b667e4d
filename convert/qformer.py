"""Rule tables for the Q-Former and the projector: LAVIS and Hugging Face names."""

from convert.rules import (
    FLAT,
    JOIN_HEADS,
    KEEP,
    SPLIT_HEADS,
    TRANSPOSE,
    Drop,
    Rule,
    batched,
)

_LAYERS, _CROSS = "qformer/layers/", "qformer/cross/"


def _attention(source: str, inner: str, attn: str, norm: str) -> tuple[Rule, ...]:
    """BERT attention: projections under `inner`, output layer and its norm beside it."""
    projections = tuple(
        rule
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"))
        for rule in (
            Rule(
                rf"{source}\.{inner}\.{theirs}\.weight",
                f"{attn}/{ours}/kernel",
                SPLIT_HEADS,
            ),
            Rule(rf"{source}\.{inner}\.{theirs}\.bias", f"{attn}/{ours}/bias", FLAT),
        )
    )
    return projections + (
        Rule(source + r"\.output\.dense\.weight", attn + "/out/kernel", JOIN_HEADS),
        Rule(source + r"\.output\.dense\.bias", attn + "/out/bias", KEEP),
        Rule(source + r"\.output\.LayerNorm\.weight", norm + "/scale", KEEP),
        Rule(source + r"\.output\.LayerNorm\.bias", norm + "/bias", KEEP),
    )


def _layers(layer: str, inner: str) -> tuple[Rule, ...]:
    """Self-attention, cross-attention and the queries' MLP of every layer."""
    up, down = layer + r"intermediate_query\.dense", layer + r"output_query\.dense"
    norm = layer + r"output_query\.LayerNorm"
    return (
        *_attention(
            layer + "attention", inner, _LAYERS + "attn", _LAYERS + "attn_norm"
        ),
        *_attention(
            layer + "crossattention", inner, _CROSS + "attn", _CROSS + "attn_norm"
        ),
        Rule(up + r"\.weight", _LAYERS + "mlp/up/kernel", TRANSPOSE),
        Rule(up + r"\.bias", _LAYERS + "mlp/up/bias", KEEP),
        Rule(down + r"\.weight", _LAYERS + "mlp/down/kernel", TRANSPOSE),
        Rule(down + r"\.bias", _LAYERS + "mlp/down/bias", KEEP),
        Rule(norm + r"\.weight", _LAYERS + "mlp_norm/scale", KEEP),
        Rule(norm + r"\.bias", _LAYERS + "mlp_norm/bias", KEEP),
    )


_Q = r"(?:Qformer\.)?bert\."
_QL = _Q + r"encoder\.layer\.(\d+)\."

LAVIS = (
    Drop(_Q + r"embeddings\.position_ids", "a buffer; queries have no positions"),
    Drop(
        _Q + r"embeddings\.(word_embeddings|position_embeddings)\.weight",
        "MiniGPT-4 gives the Q-Former no text",
    ),
    Drop(
        _Q + r"encoder\.layer\.\d+\.(intermediate|output)\.(dense|LayerNorm)\..*",
        "the text branch; MiniGPT-4 runs the query path alone",
    ),
    Drop(r"(?:Qformer\.)?cls\..*", "the text head; MiniGPT-4 predicts no text here"),
    Drop(r"(t5|opt)_proj\.(weight|bias)", "BLIP-2's projector to another decoder"),
    Rule(r"ln_vision\.weight", "ln_vision/scale", KEEP),
    Rule(r"ln_vision\.bias", "ln_vision/bias", KEEP),
    Rule(r"query_tokens", "qformer/query_tokens", batched()),
    Rule(_Q + r"embeddings\.LayerNorm\.weight", "qformer/norm/scale", KEEP),
    Rule(_Q + r"embeddings\.LayerNorm\.bias", "qformer/norm/bias", KEEP),
    *_layers(_QL, "self"),
)

_H = r"(?:qformer\.)?"

HF = (
    Drop(
        r"language_projection\.(weight|bias)", "BLIP-2's projector to another decoder"
    ),
    Rule(r"query_tokens", "qformer/query_tokens", batched()),
    Rule(_H + r"layernorm\.weight", "qformer/norm/scale", KEEP),
    Rule(_H + r"layernorm\.bias", "qformer/norm/bias", KEEP),
    *_layers(_H + r"encoder\.layer\.(\d+)\.", "attention"),
)

PROJECTOR = (
    Rule(r"llama_proj\.weight", "projector/kernel", TRANSPOSE),
    Rule(r"llama_proj\.bias", "projector/bias", KEEP),
)
