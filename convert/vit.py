"""Rule tables for the vision towers, and their position embeddings at another size."""

import numpy as np

from convert.rules import (
    FLAT,
    JOIN_HEADS,
    KEEP,
    PATCH,
    SPLIT_HEADS,
    TRANSPOSE,
    Drop,
    Rule,
    batched,
    must_be_zero,
    part,
)
from minigpt4_jax.models.vit import resize_position_embedding

_BLOCKS = "vit/blocks/"
_V = r"(?:visual_encoder\.)?"
_E = _V + r"blocks\.(\d+)\."

EVA = (
    Drop(_V + r"blocks\.39\..*", "the reference builds 39 of the 40 blocks"),
    Drop(_V + r"norm\.(weight|bias)", "the reference has no final norm in the tower"),
    Drop(_V + r"head\.(weight|bias)", "the reference has no head on the tower"),
    Rule(_V + r"cls_token", "vit/class_token", batched(2)),
    Rule(_V + r"pos_embed", "vit/position_embedding", batched()),
    Rule(_V + r"patch_embed\.proj\.weight", "vit/patch/kernel", PATCH),
    Rule(_V + r"patch_embed\.proj\.bias", "vit/patch/bias", KEEP),
    Rule(_E + r"norm1\.weight", _BLOCKS + "norm1/scale", KEEP),
    Rule(_E + r"norm1\.bias", _BLOCKS + "norm1/bias", KEEP),
    Rule(_E + r"attn\.qkv\.weight", _BLOCKS + "attn/q/kernel", part(0, 3, SPLIT_HEADS)),
    Rule(_E + r"attn\.qkv\.weight", _BLOCKS + "attn/k/kernel", part(1, 3, SPLIT_HEADS)),
    Rule(_E + r"attn\.qkv\.weight", _BLOCKS + "attn/v/kernel", part(2, 3, SPLIT_HEADS)),
    Rule(_E + r"attn\.q_bias", _BLOCKS + "attn/q/bias", FLAT),
    Rule(_E + r"attn\.v_bias", _BLOCKS + "attn/v/bias", FLAT),
    Rule(_E + r"attn\.proj\.weight", _BLOCKS + "attn/out/kernel", JOIN_HEADS),
    Rule(_E + r"attn\.proj\.bias", _BLOCKS + "attn/out/bias", KEEP),
    Rule(_E + r"norm2\.weight", _BLOCKS + "norm2/scale", KEEP),
    Rule(_E + r"norm2\.bias", _BLOCKS + "norm2/bias", KEEP),
    Rule(_E + r"mlp\.fc1\.weight", _BLOCKS + "mlp/up/kernel", TRANSPOSE),
    Rule(_E + r"mlp\.fc1\.bias", _BLOCKS + "mlp/up/bias", KEEP),
    Rule(_E + r"mlp\.fc2\.weight", _BLOCKS + "mlp/down/kernel", TRANSPOSE),
    Rule(_E + r"mlp\.fc2\.bias", _BLOCKS + "mlp/down/bias", KEEP),
)

_H = r"(?:vision_model\.)?"
_HE = _H + r"embeddings\."
_HL = _H + r"encoder\.layers\.(\d+)\."
_HA = _HL + r"self_attn\."

HF_BLIP2 = (
    Rule(_HE + r"class_embedding", "vit/class_token", batched(2)),
    Rule(_HE + r"position_embedding", "vit/position_embedding", batched()),
    Rule(_HE + r"patch_embedding\.weight", "vit/patch/kernel", PATCH),
    Rule(_HE + r"patch_embedding\.bias", "vit/patch/bias", KEEP),
    Rule(_HL + r"layer_norm1\.weight", _BLOCKS + "norm1/scale", KEEP),
    Rule(_HL + r"layer_norm1\.bias", _BLOCKS + "norm1/bias", KEEP),
    Rule(_HA + r"qkv\.weight", _BLOCKS + "attn/q/kernel", part(0, 3, SPLIT_HEADS)),
    Rule(_HA + r"qkv\.weight", _BLOCKS + "attn/k/kernel", part(1, 3, SPLIT_HEADS)),
    Rule(_HA + r"qkv\.weight", _BLOCKS + "attn/v/kernel", part(2, 3, SPLIT_HEADS)),
    Rule(_HA + r"qkv\.bias", _BLOCKS + "attn/q/bias", part(0, 3, FLAT)),
    Rule(
        _HA + r"qkv\.bias",
        _BLOCKS + "attn/k/bias",
        part(1, 3, FLAT),
        otherwise=lambda array, source: must_be_zero(np.split(array, 3)[1], source),
    ),
    Rule(_HA + r"qkv\.bias", _BLOCKS + "attn/v/bias", part(2, 3, FLAT)),
    Rule(_HA + r"projection\.weight", _BLOCKS + "attn/out/kernel", JOIN_HEADS),
    Rule(_HA + r"projection\.bias", _BLOCKS + "attn/out/bias", KEEP),
    Rule(_HL + r"layer_norm2\.weight", _BLOCKS + "norm2/scale", KEEP),
    Rule(_HL + r"layer_norm2\.bias", _BLOCKS + "norm2/bias", KEEP),
    Rule(_HL + r"mlp\.fc1\.weight", _BLOCKS + "mlp/up/kernel", TRANSPOSE),
    Rule(_HL + r"mlp\.fc1\.bias", _BLOCKS + "mlp/up/bias", KEEP),
    Rule(_HL + r"mlp\.fc2\.weight", _BLOCKS + "mlp/down/kernel", TRANSPOSE),
    Rule(_HL + r"mlp\.fc2\.bias", _BLOCKS + "mlp/down/bias", KEEP),
    Rule(_H + r"post_layernorm\.weight", "ln_vision/scale", KEEP),
    Rule(_H + r"post_layernorm\.bias", "ln_vision/bias", KEEP),
)

_D = r"(?:backbone\.)?"
_DE = _D + r"embeddings\."
_DL = _D + r"encoder\.layer\.(\d+)\."
_DA = _DL + r"attention\."

DINOV2_HF = (
    Drop(_DE + r"mask_token", "only masked pretraining uses it"),
    Rule(_DE + r"cls_token", "vit/class_token", batched(2)),
    Rule(_DE + r"position_embeddings", "vit/position_embedding", batched()),
    Rule(_DE + r"patch_embeddings\.projection\.weight", "vit/patch/kernel", PATCH),
    Rule(_DE + r"patch_embeddings\.projection\.bias", "vit/patch/bias", KEEP),
    Rule(_DL + r"norm1\.weight", _BLOCKS + "norm1/scale", KEEP),
    Rule(_DL + r"norm1\.bias", _BLOCKS + "norm1/bias", KEEP),
    Rule(
        _DA + r"(?:attention\.query|q_proj)\.weight",
        _BLOCKS + "attn/q/kernel",
        SPLIT_HEADS,
    ),
    Rule(_DA + r"(?:attention\.query|q_proj)\.bias", _BLOCKS + "attn/q/bias", FLAT),
    Rule(
        _DA + r"(?:attention\.key|k_proj)\.weight",
        _BLOCKS + "attn/k/kernel",
        SPLIT_HEADS,
    ),
    Rule(_DA + r"(?:attention\.key|k_proj)\.bias", _BLOCKS + "attn/k/bias", FLAT),
    Rule(
        _DA + r"(?:attention\.value|v_proj)\.weight",
        _BLOCKS + "attn/v/kernel",
        SPLIT_HEADS,
    ),
    Rule(_DA + r"(?:attention\.value|v_proj)\.bias", _BLOCKS + "attn/v/bias", FLAT),
    Rule(
        _DA + r"(?:output\.dense|o_proj)\.weight",
        _BLOCKS + "attn/out/kernel",
        JOIN_HEADS,
    ),
    Rule(_DA + r"(?:output\.dense|o_proj)\.bias", _BLOCKS + "attn/out/bias", KEEP),
    Rule(_DL + r"layer_scale1\.lambda1", _BLOCKS + "layer_scale1", KEEP),
    Rule(_DL + r"norm2\.weight", _BLOCKS + "norm2/scale", KEEP),
    Rule(_DL + r"norm2\.bias", _BLOCKS + "norm2/bias", KEEP),
    Rule(_DL + r"mlp\.fc1\.weight", _BLOCKS + "mlp/up/kernel", TRANSPOSE),
    Rule(_DL + r"mlp\.fc1\.bias", _BLOCKS + "mlp/up/bias", KEEP),
    Rule(_DL + r"mlp\.fc2\.weight", _BLOCKS + "mlp/down/kernel", TRANSPOSE),
    Rule(_DL + r"mlp\.fc2\.bias", _BLOCKS + "mlp/down/bias", KEEP),
    Rule(_DL + r"layer_scale2\.lambda1", _BLOCKS + "layer_scale2", KEEP),
    Rule(_D + r"layernorm\.weight", "ln_vision/scale", KEEP),
    Rule(_D + r"layernorm\.bias", "ln_vision/bias", KEEP),
)


def resized(positions_1PD: np.ndarray, grid: int) -> np.ndarray:
    """Position embeddings [1 P D] for a `grid` x `grid` of patches, as torch resizes."""
    return np.asarray(resize_position_embedding(positions_1PD[0], grid))[None]
