"""timm's VisionTransformer and its kin (DeiT, Swin's blocks): a fused `attn.qkv`."""

from tiedconv.families._patterns import Attention, FeedForward, pattern_family

_BLOCK = r"(?:.*\.)?blocks\.(?P<n>\d+)"

FAMILY = pattern_family(
    "timm-vit",
    "blocks.0.attn.qkv.weight",
    Attention(
        _BLOCK + r"\.attn",
        qkv="qkv.weight",
        o="proj.weight",
        ignored=("relative_position",),
        norm="norm1",
    ),
    FeedForward(_BLOCK + r"\.mlp", up="fc1.weight", down="fc2.weight", norm="norm2"),
)
