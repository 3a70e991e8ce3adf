"""Inverted bottlenecks: an expanding and a projecting 1x1 convolution around a depthwise one.

EfficientNet (V2, Lite), MobileNetV2 to V4, MnasNet, RexNet and MaxViT's convolutions, in the names
of timm, torchvision and transformers. The two are a pair where a block keeps its width. What lies
between them is known by its size: batch norms, a depthwise kernel, squeeze-and-excitation.

    conv_pw (m, d)  ->  conv_dw (m, 1, k, k)  ->  se, if any: (r, m), (m, r)  ->  conv_pwl (d, m)

A fused one has a k x k kernel in place of the first two: conv_exp (m, d, k, k) -> se -> conv_pwl.
"""

from tiedconv.families._patterns import IN_LAYER, FeedForward, pattern_family

_NAMES = (
    ("conv_pw", "conv_pwl"),  # timm
    ("conv_exp.conv", "conv_pwl.conv"),  # timm's RexNet
    ("conv_exp", "conv_pwl"),  # timm, fused
    ("pw_exp.conv", "pw_proj.conv"),  # timm's MobileNetV4
    ("expansion.expand_conv", "projection.project_conv"),  # transformers' EfficientNet
    ("expand_1x1.convolution", "reduce_1x1.convolution"),  # transformers' MobileNetV2
    ("block.0.0", "block.3.0"),  # torchvision, with squeeze-and-excitation
    ("block.0.0", "block.2.0"),  # torchvision's MobileNetV3 without it
    ("block.0.0", "block.1.0"),  # torchvision's EfficientNetV2, fused
    ("conv.0.0", "conv.2"),  # torchvision's MobileNetV2
    ("layers.0", "layers.6"),  # torchvision's MnasNet
    ("conv.conv1_1x1", "conv.conv3_1x1"),  # timm's MaxViT and CoAtNet
    ("layers.MBconv.layers.conv_a.0", "layers.MBconv.layers.conv_c"),  # torchvision's MaxViT
)

FAMILY = pattern_family(
    "mbconv",
    "blocks.1.0.conv_pw.weight and .conv_pwl.weight",
    *(
        FeedForward(IN_LAYER, up=f"{up}.weight", down=f"{down}.weight", inverted=True)
        for up, down in _NAMES
    ),
)
