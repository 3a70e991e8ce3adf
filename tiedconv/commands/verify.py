"""The verb `verify`: does a file give what it promises?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.commands.export import TOLERANCE, apart, images_for
from tiedconv.commands.verify_export import Check, compare
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import Loader
from tiedconv.detection import tensor_in
from tiedconv.errors import CheckpointError, SourceError, VerifyError
from tiedconv.io.checkpoint import Checkpoint, install, read
from tiedconv.runtime.tie import freeze, state_of, untie
from tiedconv.sources.load import skeleton_of, source_of, widened
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
        against: an exported file that should be the same model: `.onnx`, `.pt2`, `.xml`, or a
            dense state dict; its tensors, bytes and logits are compared.
        images: a folder of images to compare with, besides random ones.
        count: how many of them.
        trust_code: allow the file to name a function that builds the model.

    Returns:
        what was checked, in order. All have passed, or could not be done and say why.

    Raises:
        CheckpointError: the file is missing or damaged.
        VerifyError: it loads, but does not do what it promises.
    """
    checkpoint = read(file)
    plan = checkpoint.plan
    checks = [
        Check("plan", f"{len(plan.weights)} weights over {len(plan.factors)} factors, well-formed"),
        Check("tensors", f"{len(checkpoint.shapes)} stored, each used, shapes agree"),
    ]
    count = sum(1 for _ in checkpoint.tensors())
    checks.append(Check("bytes", f"SHA-256 of {count} tensors and of the plan agree"))
    try:
        skeleton = skeleton_of(checkpoint, trust_code=trust_code)
        model = widened(install(checkpoint, skeleton), checkpoint)
    except (SourceError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and checkpoint.source is not None:
            raise
        if against is not None:
            raise
        checks.append(Check("model", str(error), passed=None))
        return checks
    checks.append(Check("model", f"builds as {type(model).__name__}, names and shapes agree"))
    checks.append(_ties(model, checkpoint))
    shown = {"random": images_for(model)}
    if images is not None:
        shown["given"] = _given(images, model, count)
    checks += [_outputs(model, x) for x in shown.values()]
    if against is not None:
        checks += compare(Path(against), model, shown)
    return checks


def _given(folder: str | Path, model: nn.Module, count: int) -> Tensor:
    """Some images of a folder, prepared as the file says, `(n, C, H, W)`."""
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
            f"{checkpoint.path} promises {expected:,} parameters and the model holds {held:,}",
            "A tie was lost",
            "Report this as a bug, with the file",
        )
    return Check("ties", f"{held:,} parameters in {stored} tensors, each one storage")


def _outputs(model: nn.Module, images: Tensor) -> Check:
    """The tied, the frozen and the dense form must give one answer."""
    with torch.no_grad():
        try:
            tied = _answers(model(images))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Check("outputs", f"not compared: the model takes no image ({reason})", None)
        frozen = _answers(freeze(copy.deepcopy(model))(images))
        dense = _answers(untie(copy.deepcopy(model))(images))
    off = max(apart(form[part], dense[part]) for form in (tied, frozen) for part in dense)
    if not off <= TOLERANCE:
        raise VerifyError(
            f"Tied and dense outputs differ by {off:.2g} of the largest",
            "The file does not give what it promises",
            "Report this as a bug, with the file",
        )
    return Check("outputs", f"tied, frozen and dense {' and '.join(dense)} agree to {off:.1e}")


def _answers(output: Any) -> dict[str, Tensor]:
    """The logits, and a detector's boxes beside them."""
    boxes = tensor_in(output, "pred_boxes")
    return {"logits": logits_of(output)} | ({} if boxes is None else {"boxes": boxes.float()})
