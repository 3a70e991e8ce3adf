"""Which errors of a unit's output matter to the model's output, by the gradients that reach it.

A plain distance counts all tokens and channels alike, though a classifier may read one token and
a norm may drown most channels. So errors are weighted by the second statistics of the gradient that
comes back to the output: a weight for each place (token or pixel) and a matrix over channels. With
the class drawn from the model's own prediction this is a Kronecker form of the Fisher matrix there,
as `kfac_statistics` has it for weights, and again no label is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.numerics.linalg import cholesky
from tiedconv.outputs import kind_of
from tiedconv.training.device import Placement
from tiedconv.training.objective import first_tensor

RIDGE = 0.1
"""Fraction of plain distance that stays in each side: gradients are local, errors are not."""


@dataclass(frozen=True)
class OutputMetric:
    """A linear map of a unit's output, after which plain distance is what matters.

    Args:
        places: by their number `(places, 1)`, a factor for each token or pixel.
        channels: `(channels, channels)`.
        first: whether channels are the first dimension after the batch, as in a feature map.
    """

    places: Mapping[int, Tensor]
    channels: Tensor
    first: bool

    def __call__(self, output: Tensor) -> Tensor:
        """The output `(B, ...)` mapped to `(B, places, channels)`."""
        rows = _rows(output.float(), self.first)
        return (rows * self.places[rows.shape[1]]) @ self.channels


def measure_output_metrics(
    model: nn.Module,
    units: Sequence[nn.Module],
    batches: Iterable[Tensor],
    placement: Placement,
    seed: int,
) -> list[OutputMetric | None]:
    """A metric for each unit of the original model; None where no gradient comes back.

    Args:
        model: in evaluation mode, its parameters without gradients.
        units: modules of it, each called once.
        batches: images, on the model's device.
        placement: of the model.
        seed: of the classes drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = [_Gradients() for _ in units]
    first = [_is_map(unit) for unit in units]
    for images in batches:
        outputs: dict[int, Tensor] = {}

        def hook(
            module: nn.Module, args: Any, output: Any, outputs: dict[int, Tensor] = outputs
        ) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.requires_grad:
                outputs[id(module)] = tensor

        handles = [unit.register_forward_hook(hook) for unit in units]
        try:
            with torch.enable_grad(), placement.autocast():
                output = model(forward_with_grad(model, images))
        finally:
            for handle in handles:
                handle.remove()
            model.requires_grad_(False)
        kind = kind_of(output, model)
        if not all(bool(torch.isfinite(value).all()) for value in kind.values(output)):
            return [None] * len(units)  # the fit raises the error
        loss = kind.drawn_loss(output, model, generator)
        known = [i for i, unit in enumerate(units) if id(unit) in outputs]
        if not known:
            continue
        wanted = [outputs[id(units[i])] for i in known]
        for i, gradient in zip(
            known, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True
        ):
            if gradient is not None:
                sums[i].add(_rows(gradient.float(), first[i]))
    return [_output_metric(total, is_map) for total, is_map in zip(sums, first, strict=True)]


@dataclass
class _Gradients:
    """Sums over the gradients of a unit's output: of places by their number, and of channels.

    Maps `(B, H, W, C)` of several sizes have no channels that add up; `agree` is false then.
    """

    places: dict[int, Tensor] = field(default_factory=dict)
    channels: Tensor | None = None
    agree: bool = True

    def add(self, rows: Tensor) -> None:
        """Adds gradients `(B, places, channels)`."""
        count = rows.shape[1]
        of_places, of_channels = rows.square().sum((0, 2)), torch.einsum("btc,btd->cd", rows, rows)
        before = self.places.get(count)
        self.places[count] = of_places if before is None else before + of_places
        if self.channels is None:
            self.channels = of_channels
        elif self.channels.shape == of_channels.shape:
            self.channels = self.channels + of_channels
        else:
            self.agree = False


def forward_with_grad(model: nn.Module, images: Tensor) -> Tensor:
    """The images such that gradients reach all that a model makes of them.

    Token ids can't ask for a gradient; then the model's parameters do.
    """
    if images.is_floating_point():
        return images.detach().requires_grad_().clone()  # a model may write into its input
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return images


def _output_metric(found: _Gradients, first: bool) -> OutputMetric | None:
    channels = found.channels
    if channels is None or not found.agree or not torch.isfinite(channels).all():
        return None
    if not all(float(places.sum()) > 0 for places in found.places.values()):
        return None
    moment = (1 - RIDGE) * channels.cpu().double() / float(channels.diagonal().mean())
    moment.diagonal().add_(RIDGE)
    root = cholesky(moment).to(channels.device, channels.dtype)
    weights = {
        count: ((1 - RIDGE) * places / places.mean() + RIDGE).sqrt().unsqueeze(1)
        for count, places in found.places.items()
    }
    return OutputMetric(weights, root, first)


def _rows(output: Tensor, first: bool) -> Tensor:
    """`(B, places, channels)`."""
    if first and output.ndim > 3:  # tokens of a block with a convolution have channels last
        output = output.movedim(1, -1)
    return output.reshape(len(output), -1, output.shape[-1])


def _is_map(unit: nn.Module) -> bool:
    """Whether a unit gives feature maps `(B, C, H, W)`."""
    return any(isinstance(m, nn.Conv2d) for m in unit.modules())
