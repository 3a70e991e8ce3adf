"""The verb `verify`: does a file give what it promises?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tiedconv.binding import freeze, state_of, untie
from tiedconv.checkpoint import Checkpoint, install, read
from tiedconv.errors import CheckpointError, SourceError, VerifyError
from tiedconv.loading import skeleton_of, source_of
from tiedconv.sources import Preprocess
from tiedconv.training import logits_of

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what.
        detail: what was found.
        passed: None if it could not be done here; `detail` says why.
    """

    name: str
    detail: str
    passed: bool | None = True


def verify(file: str | Path, *, trust_code: bool = False) -> list[Check]:
    """Check a compact file from its bytes to its outputs.

    Args:
        file: a compact file.
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
        model = install(checkpoint, skeleton_of(checkpoint, trust_code=trust_code))
    except (SourceError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and checkpoint.source is not None:
            raise
        checks.append(Check("model", str(error), passed=None))
        return checks
    checks.append(Check("model", f"builds as {type(model).__name__}, names and shapes agree"))
    checks.append(_ties(model, checkpoint))
    checks.append(_outputs(model, checkpoint))
    return checks


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


def _outputs(model: nn.Module, checkpoint: Checkpoint) -> Check:
    """The tied, the frozen and the dense form must give one answer."""
    preprocess = source_of(checkpoint.source).preprocess or Preprocess(224)
    generator = torch.Generator().manual_seed(0)
    channels = len(preprocess.mean)
    image = torch.randn(2, channels, preprocess.size, preprocess.size, generator=generator)
    with torch.no_grad():
        try:
            tied = logits_of(model(image))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Check("outputs", f"not compared: the model takes no image ({reason})", None)
        frozen = logits_of(freeze(copy.deepcopy(model))(image))
        dense = logits_of(untie(model)(image))
    scale = float(dense.abs().max().clamp(min=1.0))
    apart = max(float((tied - dense).abs().max()), float((frozen - dense).abs().max())) / scale
    if not apart <= TOLERANCE:
        raise VerifyError(
            f"{checkpoint.path}: tied and dense outputs differ by {apart:.2g} of the largest",
            "The file does not give what it promises",
            "Report this as a bug, with the file",
        )
    return Check("outputs", f"tied, frozen and dense logits agree to {apart:.1e}")
