"""Comparing a compact model with its original, block by block.

A file can't show that its conversion was exact: it only knows itself. With the original at hand,
each block of both is run on the inputs that the original's block receives, and the distance of the
outputs is held against the error of the fit, which the file reports.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tiedconv.commands._reference import outputs_of
from tiedconv.commands.verify_export import Check
from tiedconv.conversion.captured_inputs import captured_inputs
from tiedconv.core.block_names import block_names
from tiedconv.errors import UserError, VerifyError
from tiedconv.runtime.call_hooks import hooked, text_hooks
from tiedconv.runtime.example_inputs import evaluation
from tiedconv.runtime.tie import dense_state_dict, state_of

FACTOR = 10.0
"""How many times the error of its weights the outputs of a block may be off. An error of random
direction gives outputs that are off by about as much; attention and norms make more of it."""
FLOAT_BITS = 10
"""What a matrix of floats is taken for: bfloat16 rounds within 2^-9 of a number."""
ROUNDING = 1e-3
"""What an exact conversion may be off by: float32 in another order, normalised."""


def compare_with_original(
    model: nn.Module, original: nn.Module, name: str, images: Tensor
) -> list[Check]:
    """Check that each block is as far from the original's as the file says, and no farther.

    Args:
        model: tied, in evaluation mode.
        original: plain, of the same class, in evaluation mode.
        name: of the images, to report them under.
        images: `(n, C, H, W)`.

    Raises:
        VerifyError: a block is much farther from the original's than its fit (`block-differs`).
        UserError: it is not the original of this model (`original-differs`).
    """
    state = state_of(model)
    promised = _promised(model, original)
    try:
        with hooked(original, text_hooks(original)):
            shown = captured_inputs(original, list(promised), images)[:1]
        blocks = {n: model.get_submodule(n) for n in promised}
    except AttributeError as error:
        raise UserError(
            f"It is not the original of this model ({error})",
            "There is nothing to compare",
            "Name the model, or the weights, that the file was made from",
            code="original-differs",
        ) from error
    found = {
        block: _distance(blocks[block], original.get_submodule(block), *arguments)
        for run in shown
        for block, arguments in run.items()
    }
    checks = [_as_promised(found, promised, _was_trained(state.history), name)]
    if missing := [block for block in promised if block not in found]:
        reason = f"{len(missing)} blocks were not called on {name} images, such as {missing[0]}"
        checks.append(Check.not_run("blocks", reason))
    return [*checks, _whole(model, original, name, images)]


def _as_promised(
    found: dict[str, float], promised: dict[str, float | None], trained: bool, name: str
) -> Check:
    if not promised:
        return Check.not_run("blocks", "the file stores every matrix as it was")
    if not found:
        return Check.not_run("blocks", f"the original can't be run on {name} images")
    worst = max(found, key=lambda block: found[block])
    text = f"{len(found)} blocks on {name} images, at most {found[worst]:.2g} off ({worst}"
    if trained:
        return Check("blocks", f"{text}); trained since, so that fits promise nothing")
    over = {b: d for b, d in found.items() if not d <= _allowed(promised[b])}
    if over:
        block = max(over, key=lambda b: over[b] / _allowed(promised[b]))
        raise VerifyError(
            f"The outputs of {block} are {over[block]:.2g} off the original's, where its weights "
            f"are {promised[block] or 0.0:.2g} off",
            "The conversion changed more than it reports, or the original is another model",
            "Check that this is the original; if it is, report this as a bug, with the model",
            code="block-differs",
        )
    return Check("blocks", f"{text}, its weights {promised[worst] or 0.0:.2g})")


def _allowed(error: float | None) -> float:
    return max(ROUNDING, FACTOR * (error or 0.0))


def _promised(model: nn.Module, original: nn.Module) -> dict[str, float | None]:
    """Each block with a stored matrix, and the largest error of the weights in it.

    The file records the error of a fit. Of matrices that were rounded and no more, or stored as
    they were, it records none: it is measured, and counts as far as rounding to so many bits, or
    to the stored type, can explain it.
    """
    plan = state_of(model).plan
    names = [*plan.weights, *plan.kept]
    shapes = {**plan.kept, **{n: e.shape for n, e in plan.weights.items()}}
    home = block_names([n for n in names if len(shapes[n]) > 1])
    errors: dict[str, float | None] = defaultdict(float)
    for group in plan.groups:
        for member in group.members:
            tensor = member.slot.tensor
            block = home(tensor) or tensor.rpartition(".")[0]
            errors[block] = max(errors[block] or 0.0, group.error or 0.0)
    fitted = {member.slot.tensor for group in plan.groups for member in group.members}
    rounded = [n for n in names if n not in fitted and len(shapes[n]) > 1]
    found, known = dense_state_dict(model) if rounded else {}, original.state_dict()
    for name in (n for n in rounded if n in known and known[n].shape == found[n].shape):
        block = home(name) or name.rpartition(".")[0]
        if not block:
            continue  # a table of the whole model, such as positions
        size = float(known[name].double().norm()) or 1.0
        off = float((found[name].double() - known[name].double()).norm()) / size
        refs = plan.weights[name].refs if name in plan.weights else (name,)
        bits = min((plan.codes[ref].bits for ref in refs if ref in plan.codes), default=FLOAT_BITS)
        errors[block] = max(errors[block] or 0.0, min(off, 4.0 * 2.0**-bits))
    return dict(errors)


def _was_trained(history: tuple[Any, ...]) -> bool:
    return any(step.get("step") == "finetune" or step.get("calibration") for step in history)


def _distance(
    block: nn.Module, original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float:
    """The distance of two blocks' outputs, relative to what the original's block changes."""
    with evaluation(original):
        expected = list(_tensors(original(*args, **kwargs)))
    with evaluation(block):
        found = list(_tensors(block(*args, **kwargs)))
    given = next(_tensors((args, kwargs)), None)
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if not other.is_floating_point() or not other.numel():
            continue
        change = other
        if given is not None and given.shape == other.shape:
            change = min(other - given, other, key=lambda t: float(t.norm()))
        size = float(change.double().norm()) or 1.0
        worst = max(worst, float((one.double() - other.double()).norm()) / size)
    return worst


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


@torch.no_grad()
def _whole(model: nn.Module, original: nn.Module, name: str, images: Tensor) -> Check:
    """How far the whole model's outputs are from the original's; reported, without a limit."""
    try:
        found, expected = outputs_of(model, images), outputs_of(original, images)
    except UserError as error:
        return Check.not_run("original", error.what)
    key = next(iter(expected))
    if key not in found or found[key].shape != expected[key].shape:
        return Check.not_run("original", f"its outputs have another form than {key} here")
    one, other = found[key].double(), expected[key].double()
    off = float((one - other).norm() / other.norm().clamp(min=1e-30))
    text = f"{key} on {len(images)} {name} images are {off:.2g} of their size off"
    if other.ndim == 2 and other.shape[1] > 1:
        same = int((one.argmax(1) == other.argmax(1)).sum())
        text += f"; {same} of {len(other)} have the same largest"
    return Check("original", text)
