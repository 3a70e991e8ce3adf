"""torchvision's VisionTransformer: `vit_b_16`, `vit_l_16`, `vit_h_14`, ..."""

from tiedconv.families._patterns import Attention, FeedForward, pattern_family

_LAYER = r"(?:.*\.)?encoder_layer_(?P<n>\d+)"

FAMILY = pattern_family(
    "torchvision-vit",
    "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
    Attention(_LAYER + r"\.self_attention", qkv="in_proj_weight", o="out_proj.weight", norm="ln_1"),
    # mlp.0 and mlp.3 since torchvision 0.13; linear_1 and linear_2 in older files.
    FeedForward(_LAYER + r"\.mlp", up="0.weight", down="3.weight", act="1", norm="ln_2"),
    FeedForward(_LAYER + r"\.mlp", up="linear_1.weight", down="linear_2.weight", act="act"),
)
