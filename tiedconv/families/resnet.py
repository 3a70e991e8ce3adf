"""Bottleneck ResNets of torchvision and timm: resnet50 to 152, ResNeXt, Wide ResNet."""

from tiedconv.families._patterns import Bottleneck, pattern_family

FAMILY = pattern_family(
    "resnet",
    "layer1.0.conv1.weight, .conv2.weight and .conv3.weight with bn1, bn2, bn3",
    Bottleneck(
        r"(?:.*\.)?layer\d+\.(?P<n>\d+)",
        convs=("conv1.weight", "conv2.weight", "conv3.weight"),
        norms=("bn1", "bn2", "bn3"),
    ),
)
