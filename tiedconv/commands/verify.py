"""The command `verify`: does a file reproduce the model it records?"""

from __future__ import annotations

import copy
import math
from pathlib import Path

from torch import Tensor, nn

from tiedconv.commands._reference import TOLERANCE, images_for, outputs_differ_by, outputs_of
from tiedconv.commands.evaluate import open_teacher
from tiedconv.commands.verify_export import Check, compare
from tiedconv.commands.verify_original import compare_with_original
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import Loader
from tiedconv.errors import CheckpointError, SourceError, UserError, VerifyError
from tiedconv.io.checkpoint_reader import Checkpoint, read
from tiedconv.io.install import install
from tiedconv.runtime.tie import freeze, state_of, untie
from tiedconv.sources.models import skeleton_of, source_of, widened


def verify(
    file: str | Path,
    *,
    against: str | Path | None = None,
    images: str | Path | None = None,
    original: str | nn.Module | None = None,
    count: int = 16,
    trust_code: bool = False,
) -> list[Check]:
    """Check a compact file from its bytes to its outputs.

    Args:
        file: a compact file.
        against: an exported file of the same model: `.onnx`, `.pt2`, `.xml`, a compact file, or a
            dense state dict; its tensors, bytes and logits are compared.
        images: a folder of images to compare on, besides random ones.
        original: the model that the file was made from, to compare each block with: a model, its
            weights, a module, or `auto` for the source that the file names.
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
    if original is not None:
        plain = _original(original, model, trust_code=trust_code)
        for name, x in shown.items():
            checks += compare_with_original(model, plain, name, x)
    if against is not None:
        checks += compare(Path(against), model, shown)
    return checks


def _original(
    original: str | nn.Module, model: nn.Module, *, trust_code: bool
) -> nn.Module:  # fmt: skip
    if isinstance(original, nn.Module):
        return original.eval()
    source = source_of(state_of(model).source)
    found, _ = open_teacher(original, source, trust_code=trust_code)
    if found is None:
        raise UserError(
            "The original's weights were random, and no file holds them",
            "There is nothing to compare with",
            "Leave --original out",
            code="original-unavailable",
        )
    return found.eval()


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
    plan = state_of(model).plan
    expected = plan.stored
    held = sum(
        math.prod(plan.codes[n].shape) if n in plan.codes else p.numel()
        for n, p in model.named_parameters()
    )
    if len(storages) != stored or held != expected:
        raise VerifyError(
            f"{checkpoint.path} records {expected:,} parameters and the model holds {held:,}",
            "A tie was lost",
            "Report this as a bug, with the file",
            code="tie-lost",
        )
    return Check("ties", f"{held:,} parameters in {stored} tensors, each with its own storage")


def _outputs(model: nn.Module, name: str, images: Tensor) -> Check:
    """The tied, the frozen and the dense form must give the same outputs."""
    try:
        tied = outputs_of(model, images)
    except UserError as error:
        if error.code not in ("images-rejected", "no-tensors-returned"):
            raise
        return Check.not_run("outputs", error.what)
    frozen = outputs_of(freeze(copy.deepcopy(model)), images)
    dense = outputs_of(untie(copy.deepcopy(model)), images)
    differences = [outputs_differ_by(form, dense) for form in (tied, frozen)]
    if not all(off <= TOLERANCE for off in differences):
        worst = max(differences) if all(d == d for d in differences) else math.nan
        raise VerifyError(
            f"Tied and dense outputs differ by {worst:.2g} of the largest (at most "
            f"{TOLERANCE:.2g})",
            "The file does not reproduce the model it records",
            "Report this as a bug, with the file",
            code="outputs-differ",
        )
    forms = f"tied, frozen and dense {' and '.join(dense)} agree to {max(differences):.1e}"
    return Check("outputs", f"{forms} on {len(images)} {name} images")
