"""The logits that a written file must give, and how far it may be off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiedconv.exporters._format import is_weight, random_images
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of
from tiedconv.sources import Preprocess, Source
from tiedconv.training import logits_of

TOLERANCE = 1e-4
"""How far float32 logits may be off, relative to the largest logit: another order of sums."""

INT8_MARGIN = 3.0
"""How many times the effect of rounding to int8, as measured in torch, the logits may be off."""


@dataclass(frozen=True)
class Reference:
    """The logits of a compact model on some images.

    Args:
        exact: with the weights as they are, `(n, classes)`.
        rounded: with the weights rounded as the file stores them.
        tolerance: how far a file's logits may be from `rounded`, see `relative_difference`.
    """

    exact: Tensor
    rounded: Tensor
    tolerance: float


def reference(model: nn.Module, images: Tensor, dtype: str) -> Reference:
    """What a file with weights of this dtype must give.

    Rounding to float16 or bfloat16 does not depend on a tensor's layout: the file must agree with
    the rounded model as closely as in float32. int8 has a scale for each row, and a file may store
    a factor transposed: the effect of both is measured, and bounds the difference from the exact
    logits.

    Args:
        model: tied, in evaluation mode.
        images: `(n, C, H, W)`.
        dtype: one of `exporters.DTYPES`.

    Raises:
        UserError: the model rejects such images (code `images-rejected`).
    """
    exact = _logits(model, images)
    if dtype == "float32":
        return Reference(exact, exact, TOLERANCE)
    if dtype == "int8":
        off = max(
            relative_difference(_logits(_rounded(model, _int8_along(dim)), images), exact)
            for dim in (0, 1)
        )
        return Reference(exact, exact, TOLERANCE + INT8_MARGIN * off)
    kind: torch.dtype = getattr(torch, dtype)
    rounded = _logits(_rounded(model, lambda t: t.to(kind).to(t.dtype)), images)
    return Reference(exact, rounded, TOLERANCE)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest expected value or to 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def images_for(model: nn.Module) -> Tensor:
    """Random images of the size that a tied model's source records, `(2, C, H, W)`."""
    record = state_of(model).source
    preprocess = (Source.from_json(record).preprocess if record else None) or Preprocess(224)
    return random_images(len(preprocess.mean), preprocess.size)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return logits_of(checked_forward(model, images))


@torch.no_grad()
def _rounded(model: nn.Module, round_: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy whose matrices and kernels, those that a file stores narrower, are rounded."""
    model = copy.deepcopy(model)
    for name, tensor in state_tensors(model).items():
        if is_weight(name, tensor.shape, tensor.is_floating_point()):
            tensor.copy_(round_(tensor))
    return model


def _int8_along(dim: int) -> Callable[[Tensor], Tensor]:
    """Symmetric rounding to 255 steps, with one scale for each index of a dimension."""

    def rounded(tensor: Tensor) -> Tensor:
        others = [d for d in range(tensor.ndim) if d != dim]
        scale = tensor.abs().amax(others, keepdim=True).clamp(min=torch.finfo(tensor.dtype).tiny)
        return (tensor * (127 / scale)).round() * (scale / 127)

    return rounded
