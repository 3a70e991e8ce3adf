"""Bottlenecks whose norms stand elsewhere, or that do more between their 1x1 convolutions.

Pre-activation ResNets (BiT), RegNets, NFNets, Res2Net, ResNeSt, and timm's nets of configurable
blocks. As no batch norm follows each convolution here, a pair's scales can't go into one: the 1x1
convolutions are a pair like a feed-forward's, whose scales are stored.
"""

from tiedconv.families._patterns import IN_LAYER, FeedForward, Linear, pattern_family

_NAMES = (
    ("conv1.weight", "conv3.weight"),  # timm's ResNetV2, NFNet, Res2Net, ResNeSt; BiT
    ("conv1.conv.weight", "conv3.conv.weight"),  # timm's RegNet
    ("conv1_1x1.conv.weight", "conv3_1x1.conv.weight"),  # timm's ByobNet
    ("f.a.0.weight", "f.c.0.weight"),  # torchvision's RegNet
    ("layer.0.convolution.weight", "layer.3.convolution.weight"),  # transformers' RegNet (Y)
    ("layer.0.convolution.weight", "layer.2.convolution.weight"),  # transformers' RegNet (X)
)
_MIDDLE = ("conv2", "conv2b", "conv2.conv", "conv2_kxk.conv", "f.b.0", "layer.1.convolution")

FAMILY = pattern_family(
    "resnet-variants",
    "stages.0.blocks.0.conv1.weight and .conv3.weight, without batch norms after them",
    *(FeedForward(IN_LAYER, up=up, down=down) for up, down in _NAMES),
    Linear(IN_LAYER, {name: f"{name}.weight" for name in _MIDDLE}),
)
