"""PyTorch's own `nn.TransformerEncoder` and `nn.TransformerDecoder`."""

from tiedconv.families._patterns import Attention, FeedForward, pattern_family

_LAYER = r"(?:.*\.)?layers\.(?P<n>\d+)"

FAMILY = pattern_family(
    "torch-transformer",
    "encoder.layers.0.self_attn.in_proj_weight",
    Attention(_LAYER + r"\.self_attn", qkv="in_proj_weight", o="out_proj.weight"),
    Attention(_LAYER + r"\.multihead_attn", qkv="in_proj_weight", o="out_proj.weight"),
    FeedForward(
        _LAYER, up="linear1.weight", down="linear2.weight", act="activation", alone=False
    ),
)  # fmt: skip
