"""The command `verify`: does a file reproduce the model it records?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.commands._reference import TOLERANCE, images_for, relative_difference
from tiedconv.commands.verify_export import Check, compare
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import Loader
from tiedconv.detection import tensor_in
from tiedconv.errors import CheckpointError, SourceError, UserError, VerifyError
from tiedconv.io.checkpoint import Checkpoint, install, read
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.runtime.tie import freeze, state_of, untie
from tiedconv.sources.models import skeleton_of, source_of, widened
from tiedconv.training import logits_of


def verify(
    file: str | Path,
    *,
    against: str | Path | None = None,
    images: str | Path | None = None,
    count: int = 16,
    trust_code: bool = False,
) -> list[Check]:
    """Check a compact file from its bytes to its outputs.

    Args:
        file: a compact file.
        against: an exported file of the same model: `.onnx`, `.pt2`, `.xml`, or a dense state dict;
            its tensors, bytes and logits are compared.
        images: a folder of images to compare on, besides random ones.
        count: how many of these images are used, at least 2.
        trust_code: allow the file to name a function that builds the model.

    Returns:
        the checks, in order. Each has passed, or could not be run and gives the reason
        (`passed` is None).

    Raises:
        CheckpointError: the file is missing or damaged.
        VerifyError: a check failed.
    """
    checkpoint = read(file)
    plan = checkpoint.plan
    checks = [
        Check("plan", f"{len(plan.weights)} weights over {len(plan.factors)} factors, well-formed"),
        Check("tensors", f"{len(checkpoint.shapes)} stored, each used, shapes agree"),
    ]
    hashed = sum(1 for _ in checkpoint.tensors())
    checks.append(Check("bytes", f"SHA-256 of {hashed} tensors and of the plan agree"))
    try:
        skeleton = skeleton_of(checkpoint, trust_code=trust_code)
        model = widened(install(checkpoint, skeleton), checkpoint)
    except (SourceError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and checkpoint.source is not None:
            raise
        if against is not None:
            raise
        checks.append(Check.not_run("model", f"neither are ties and outputs. {error}"))
        return checks
    checks.append(Check("model", f"builds as {type(model).__name__}, names and shapes agree"))
    checks.append(_ties(model, checkpoint))
    shown = {"random": images_for(model)}
    if images is not None:
        shown["given"] = _given(images, model, count)
    checks += [_outputs(model, name, x) for name, x in shown.items()]
    if against is not None:
        checks += compare(Path(against), model, shown)
    return checks


def _given(folder: str | Path, model: nn.Module, count: int) -> Tensor:
    """`count` images of a folder, or fewer if it has no more, preprocessed: `(n, C, H, W)`."""
    source = source_of(state_of(model).source)
    data = Calibration(folder, images=max(2, count)).open(source)
    loader = Loader(data, max(2, count), shuffle=False, workers=0)
    try:
        batch = next(iter(loader.epoch()))
    finally:
        loader.close()
    return batch.images


def _ties(model: nn.Module, checkpoint: Checkpoint) -> Check:
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored = len(list(model.parameters()))
    expected = state_of(model).plan.stored
    held = sum(p.numel() for p in model.parameters())
    if len(storages) != stored or held != expected:
        raise VerifyError(
            f"{checkpoint.path} records {expected:,} parameters and the model holds {held:,}",
            "A tie was lost",
            "Report this as a bug, with the file",
            code="tie-lost",
        )
    return Check("ties", f"{held:,} parameters in {stored} tensors, each with its own storage")


@torch.no_grad()
def _outputs(model: nn.Module, name: str, images: Tensor) -> Check:
    """The tied, the frozen and the dense form must give the same outputs."""
    try:
        tied = _outputs_of(checked_forward(model, images))
    except UserError as error:
        if error.code != "images-rejected":
            raise
        return Check.not_run("outputs", error.what)
    frozen = _outputs_of(freeze(copy.deepcopy(model))(images))
    dense = _outputs_of(untie(copy.deepcopy(model))(images))
    off = max(relative_difference(o[part], dense[part]) for o in (tied, frozen) for part in dense)
    if not off <= TOLERANCE:
        raise VerifyError(
            f"Tied and dense outputs differ by {off:.2g} of the largest (at most {TOLERANCE:.2g})",
            "The file does not reproduce the model it records",
            "Report this as a bug, with the file",
            code="outputs-differ",
        )
    forms = f"tied, frozen and dense {' and '.join(dense)} agree to {off:.1e}"
    return Check("outputs", f"{forms} on {len(images)} {name} images")


def _outputs_of(output: Any) -> dict[str, Tensor]:
    """The logits, and also the boxes of a detector."""
    boxes = tensor_in(output, "pred_boxes")
    return {"logits": logits_of(output)} | ({} if boxes is None else {"boxes": boxes.float()})
