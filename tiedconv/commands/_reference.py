"""The outputs that a written file must give, and how far they may be off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiedconv.errors import UserError
from tiedconv.exporters._format import is_weight, random_images
from tiedconv.runtime.call_hooks import LONGEST, random_text, takes_text_too
from tiedconv.runtime.example_inputs import video_shapes
from tiedconv.runtime.forward_check import checked_forward, further_inputs, takes_text
from tiedconv.runtime.outputs import chosen, named_outputs
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of
from tiedconv.sources import Preprocess, Source

TOLERANCE = 1e-4
"""How far float32 outputs may be off, relative to the largest: another order of sums."""

INT8_MARGIN = 3.0
"""How many times the effect of rounding to int8, as measured in torch, the outputs may be off."""


Outputs = Mapping[str, Tensor]
"""What a model returns, by name."""


@dataclass(frozen=True)
class Reference:
    """The outputs of a compact model on some images, by name.

    Args:
        exact: with the weights as they are.
        rounded: with the weights rounded as the file stores them.
        tolerance: how far a file's outputs may be from `rounded`, see `outputs_differ_by`.
    """

    exact: Outputs
    rounded: Outputs
    tolerance: float


def reference(model: nn.Module, images: Tensor, dtype: str, names: Sequence[str] = ()) -> Reference:
    """What a file with weights of this dtype must give.

    Rounding to float16 or bfloat16 does not depend on a tensor's layout: the file must agree with
    the rounded model as closely as in float32. int8 has a scale for each row, and a file may store
    a factor transposed: the effect of both is measured, and bounds the difference from the exact
    outputs.

    Args:
        model: tied, in evaluation mode.
        images: `(n, C, H, W)`.
        dtype: one of `exporters.DTYPES`.
        names: of the outputs; all without any.

    Raises:
        UserError: the model rejects such images (code `images-rejected`).
    """

    def outputs(of: nn.Module) -> Outputs:
        return chosen(outputs_of(of, images), names)

    exact = outputs(model)
    if dtype == "float32":
        return Reference(exact, exact, TOLERANCE)
    if dtype == "int8":
        off = max(
            outputs_differ_by(outputs(_rounded(model, _int8_along(dim))), exact) for dim in (0, 1)
        )
        return Reference(exact, exact, TOLERANCE + INT8_MARGIN * off)
    kind: torch.dtype = getattr(torch, dtype)
    rounded = outputs(_rounded(model, lambda t: t.to(kind).to(t.dtype)))
    return Reference(exact, rounded, TOLERANCE)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest expected value or to 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def outputs_differ_by(found: Outputs, expected: Outputs) -> float:
    """The largest `relative_difference` of the outputs; NaN if one is missing or has other sides.

    Outputs of integers or truth values differ by infinity if they differ at all.
    """
    if found.keys() != expected.keys():
        return math.nan
    worst = 0.0
    for name, value in expected.items():
        other = found[name]
        if other.shape != value.shape:
            return math.nan
        if not value.is_floating_point():
            off = 0.0 if torch.equal(other.to(value.dtype), value) else math.inf
        else:
            off = relative_difference(other.float(), value.float()) if value.numel() else 0.0
        worst = off if off != off else max(worst, off)
        if worst != worst:
            return worst
    return worst


def images_for(model: nn.Module) -> Tensor:
    """Random images of the size that a tied model's source records, `(2, C, H, W)`.

    For a model of videos these, `(2, frames, C, H, W)` or `(2, C, frames, H, W)` as it takes them;
    for a model of text alone random token ids, `(2, tokens)`.
    """
    if takes_text(model) and not takes_text_too(model):
        return random_text(model, random_images(1, 1, 1), LONGEST)
    record = state_of(model).source
    preprocess = (Source.from_json(record).preprocess if record else None) or Preprocess(224)
    channels, size = len(preprocess.mean), (preprocess.size, preprocess.size)
    videos = (random_images(*shape) for shape in video_shapes(model, channels, size))
    return next((x for x in videos if _is_taken(model, x)), random_images(channels, *size))


def _is_taken(model: nn.Module, images: Tensor) -> bool:
    try:
        outputs_of(model, images)
    except UserError as error:
        return error.code != "images-rejected"
    return True


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> Outputs:
    """Every output of a model, by name. What is random in it is drawn alike in each call.

    A model that takes text as well is given random text.

    Args:
        model: in evaluation mode.
        images: `(n, C, H, W)`.

    Raises:
        UserError: the model rejects such images (`images-rejected`), or returns no tensors.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return named_outputs(checked_forward(model, images, **further_inputs(model, images)))


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
