"""Where to start LORS from a trained decoder: fitted residuals, or none.

The paper trains from scratch and starts with B = 0: every stage has the shared weight. From a
trained decoder, that start is the mean of its stages. tiedconv fits base and residuals instead:
truncated SVD for the static part, a Tucker-2 decomposition for the adaptive one. Both starts store
the same numbers; only their values differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tiedconv
from adamixer.conversion import reset_lors
from adamixer.photos import Photo, average_precision
from tiedconv import Recipe

SHARED = ("projection", "channel_generator.linear", "spatial_generator.linear")


def fitted(stock: nn.Module, recipe: Recipe) -> nn.Module:
    """Base and residuals, fitted to the trained weights."""
    return tiedconv.convert(stock, recipe=recipe)


def zero_residual(stock: nn.Module, recipe: Recipe) -> nn.Module:
    """The mean of the trained weights as base, and the paper's initial residual.

    The recipe is to have the paper's start, `recipe_for(..., scratch=True)`, or fits in vain.
    """
    model = tiedconv.convert(stock, recipe=recipe)
    reset_lors(model)
    for part in SHARED:
        named = stock.named_parameters()
        weights = [p.detach() for n, p in named if n.endswith(f"{part}.weight")]
        (base,) = (
            p for n, p in model.named_parameters()
            if n.endswith("/base") and part.replace(".", "/") in n
        )  # fmt: skip
        with torch.no_grad():
            base.copy_(torch.stack(weights).mean(0))
    return model


@dataclass(frozen=True)
class Trace:
    """What went into each stage of a head, and the content and logits that came out."""

    maps: list[Tensor]
    inputs: list[tuple[Tensor, Tensor]]
    contents: list[Tensor]
    logits: list[Tensor]


@torch.no_grad()
def trace(head: Any, maps: list[Tensor]) -> Trace:
    """A head's run over maps of the backbone, stage by stage."""
    batch, _, height, width = maps[0].shape
    stride = head.setting.strides[0]
    mapped = [layer(x) for layer, x in zip(head.mappings, maps, strict=True)]
    content, xyzr = head.queries(batch, height * stride, width * stride)
    found = Trace(mapped, [], [], [])
    for stage in head.decoder.stages:
        found.inputs.append((content, xyzr))
        logits, content, xyzr = stage(mapped, content, xyzr)
        found.contents.append(content)
        found.logits.append(logits)
    return found


@torch.no_grad()
def stage_errors(head: Any, reference: Trace) -> list[float]:
    """Relative error of each stage's content, all stages given the reference's own inputs."""
    errors = []
    for i, stage in enumerate(head.decoder.stages):
        _, content, _ = stage(reference.maps, *reference.inputs[i])
        errors.append(relative_error(content, reference.contents[i]))
    return errors


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, in units of the norm of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def judged(
    model: nn.Module, reference: Trace, maps: list[Tensor], photos: list[Photo]
) -> dict[str, Any]:  # fmt: skip
    """A start against the trained decoder: errors of its stages and answers, and its AP."""
    logits, boxes = model(maps)
    ap, ap50 = average_precision(photos, logits[-1], boxes[-1])
    return {
        "stages": stage_errors(model, reference),
        "logits": relative_error(logits, torch.stack(reference.logits)),
        "ap": ap, "ap50": ap50,
    }  # fmt: skip
