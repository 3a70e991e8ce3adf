"""Hugging Face's bottleneck ResNet."""

from tiedconv.families._patterns import Bottleneck, pattern_family

FAMILY = pattern_family(
    "hf-resnet",
    "resnet.encoder.stages.0.layers.0.layer.2.convolution.weight",
    Bottleneck(
        r"(?:.*\.)?stages\.\d+\.layers\.(?P<n>\d+)",
        convs=tuple(f"layer.{i}.convolution.weight" for i in range(3)),  # type: ignore[arg-type]
        norms=tuple(f"layer.{i}.normalization" for i in range(3)),  # type: ignore[arg-type]
        acts=("layer.0.activation", "layer.1.activation"),
        # RT-DETR's backbone (ResNet-D) has a pooling before some of them.
        shortcuts=("shortcut.convolution.weight", "shortcut.1.convolution.weight"),
    ),
)
