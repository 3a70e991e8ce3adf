"""The block of a tensor, from names alone."""

from __future__ import annotations

import pytest

from tiedconv.core.block_names import block_names


def _names(pattern: str, *numbers: int) -> list[str]:
    return [pattern.format(i) for i in numbers]


VIT = ["patch_embed.proj.weight", "head.weight"]
for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
    VIT += _names("blocks.{}." + part + ".weight", 0, 1, 2)

RESNET = ["conv1.weight", "fc.weight", "layer2.0.downsample.0.weight"]
for part in ("conv1", "conv2", "conv3"):
    RESNET += _names("layer1.{}." + part + ".weight", 0, 1)
    RESNET += _names("layer2.{}." + part + ".weight", 0, 1)

# Two convolutions of a block lie in a numbered part of it: that is no block of its own.
SQUEEZE = ["stem.weight"]
for i in range(3):
    SQUEEZE += [f"features.{i}.{name}.weight" for name in ("expand", "depth", "project", "last")]
    SQUEEZE += [f"features.{i}.gate.0.{name}.weight" for name in ("fc1", "fc2")]

DENSE = []
for name in ("conv1", "conv2"):
    DENSE += _names("features.denseblock1.denselayer{}." + name + ".weight", 1, 2, 3)


@pytest.mark.parametrize(
    ("names", "tensor", "block"),
    [
        (VIT, "blocks.1.mlp.fc2.weight", "blocks.1"),
        (VIT, "blocks.1.norm1.weight", "blocks.1"),
        (VIT, "patch_embed.proj.weight", None),
        (RESNET, "layer2.0.conv2.weight", "layer2.0"),
        (RESNET, "layer2.0.downsample.0.weight", "layer2.0"),
        (RESNET, "fc.weight", None),
        (SQUEEZE, "features.2.gate.0.fc1.weight", "features.2"),
        (
            DENSE,
            "features.denseblock1.denselayer2.conv2.weight",
            "features.denseblock1.denselayer2",
        ),
        (["features.0.weight", "features.3.weight"], "features.3.weight", "features.3"),
        (["a.weight", "b.weight"], "a.weight", None),
    ],
)
def test_a_tensor_lies_in_the_block_of_its_layer(
    names: list[str], tensor: str, block: str | None
) -> None:
    assert block_names(names)(tensor) == block
