"""Gradients of convolutions by image, against one backward pass for each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tiedconv.calibration import conv_statistics
from tiedconv.calibration.conv_statistics import ConvGeometry, gradient_energy, patches, patches_at

CONVOLUTIONS = {
    "3x3": nn.Conv2d(6, 8, 3, padding=1),
    "1x1": nn.Conv2d(6, 8, 1),
    "1x1 padded": nn.Conv2d(6, 8, 1, padding=1),
    "stride": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "1x1 stride": nn.Conv2d(6, 8, 1, stride=2),
    "oblong": nn.Conv2d(6, 8, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "groups": nn.Conv2d(6, 8, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6, padding=1),
    "wide": nn.Conv2d(64, 64, 3, padding=1),
}


def geometry(conv: nn.Conv2d) -> ConvGeometry:
    padding = [int(p) for p in conv.padding]
    return ConvGeometry(conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("places", [2, 4, 7])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_energy_is_that_of_the_gradients_of_single_images(
    name: str, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    backward = conv_statistics._backward
    monkeypatch.setattr(
        conv_statistics, "_backward", lambda *args: calls.append(None) or backward(*args)
    )
    conv, x = CONVOLUTIONS[name], torch.randn(5, CONVOLUTIONS[name].in_channels, places, places)
    expected = 0.0
    gradients = torch.randn_like(conv(x))
    for image, gradient in zip(x, gradients, strict=True):
        (found,) = torch.autograd.grad(conv(image[None]), conv.weight, gradient[None])
        expected += float(found.double().square().sum())
    energy = gradient_energy(gradients, x, geometry(conv))
    assert float(energy) == pytest.approx(expected, rel=1e-6)
    if name in ("wide", "depthwise"):  # each of the two ways is taken
        assert bool(calls) == (name == "depthwise")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_some_patches_are_those_of_all(name: str) -> None:
    conv = CONVOLUTIONS[name]
    x, how = torch.randn(2, conv.in_channels, 6, 7), geometry(conv)
    every = patches(x, how)  # (images * groups, columns, places)
    every = every.reshape(2, conv.groups, *every.shape[1:]).permute(0, 3, 1, 2).flatten(1, 2)
    which = torch.tensor([0, 1, every.shape[1] // 2, every.shape[1] - 1])
    width = conv(x).shape[3]
    assert torch.equal(patches_at(x, how, which, width), every[:, which].flatten(0, 1))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_the_product_with_its_patches(name: str) -> None:
    conv = CONVOLUTIONS[name]
    x = torch.randn(2, conv.in_channels, 5, 5)
    read = patches(x, geometry(conv))
    weight = conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
    product = weight.repeat(len(x), 1, 1) @ read
    expected = nn.functional.conv2d(
        x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    assert torch.allclose(product.reshape(expected.shape), expected, atol=1e-5)
