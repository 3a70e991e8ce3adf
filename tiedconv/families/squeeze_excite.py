"""Squeeze-and-excitation: two 1x1 convolutions that give each channel a factor.

The first reads the mean of all pixels and narrows it, the second widens it again, so they are a
pair like a feed-forward's, the narrow one first. Names of timm, torchvision and transformers.
Hu et al., "Squeeze-and-Excitation Networks" (arXiv 1709.01507).
"""

from tiedconv.families._patterns import IN_LAYER, FeedForward, pattern_family

_NAMES = (
    ("conv_reduce", "conv_expand"),  # timm's EfficientNets
    ("reduce", "expand"),  # transformers' EfficientNet
    ("fc1", "fc2"),  # timm's ResNets and RegNets; torchvision
    ("attention.0", "attention.2"),  # transformers' RegNet
)
_AT = (
    r"\.(?:se|conv\.se|squeeze_excite|layers\.MBconv\.layers\.squeeze_excitation"
    r"|block\.[12]|attn|attn_last|f\.se|layer\.2)"
)

FAMILY = pattern_family(
    "squeeze-excite",
    "blocks.1.0.se.conv_reduce.weight and .conv_expand.weight",
    *(
        FeedForward(IN_LAYER + _AT, up=f"{up}.weight", down=f"{down}.weight")
        for up, down in _NAMES
    ),
)  # fmt: skip
