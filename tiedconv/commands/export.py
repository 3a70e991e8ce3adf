"""The verb `export`: a compact file in a form that needs no tiedconv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.errors import UserError, VerifyError
from tiedconv.exporters import DTYPES, LOWERINGS, Format, Job, Written, choose_format
from tiedconv.exporters._format import random_images, stored_bytes
from tiedconv.io.atomic import check_output, replacing_files
from tiedconv.runtime.tie import state_of
from tiedconv.sources import Preprocess, Source
from tiedconv.sources.load import load
from tiedconv.training import logits_of

TOLERANCE = 1e-4
"""Of the largest logit: how far float32 logits of an exported file may be off."""

WIDE_TOLERANCE = 0.1
"""The same where weights are stored as less than float32."""

GROWTH = 1.02
"""How many times the stored bytes the tensors of a compact format may take."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        path: the main file.
        format: its name.
        size: of all files, in bytes.
        tensors: how many it holds.
        parameters: numbers in it, buffers included.
        weight_bytes: bytes of its tensors.
        stored_bytes: bytes of the compact file's tensors, in the kind asked for.
        difference: largest difference of its logits on random images, as a share of the largest
            logit; None where the file could not be run here.
        facts: more that the format tells.
    """

    path: Path
    format: str
    size: int
    tensors: int
    parameters: int
    weight_bytes: int
    stored_bytes: int
    difference: float | None
    facts: Mapping[str, Any] = field(default_factory=dict)


def export(
    file: str | Path,
    output: str | Path,
    to: str | None = None,
    *,
    dtype: str = "float32",
    lower: str = "auto",
    opset: int | None = None,
    force: bool = False,
    trust_code: bool = False,
) -> Exported:
    """Write a compact model in another form, check its size, and run it once against torch.

    Args:
        file: a compact file.
        output: the file to write.
        to: the format: `compact`, `dense`, `onnx`, `openvino` or `pt2`; None for the one that the
            output's ending says.
        dtype: how matrices and kernels are stored: `float32`, `float16`, `bfloat16` or `int8`.
        lower: for ONNX, where factors are applied one by one rather than joined to weights as the
            runtime loads the file: `auto` (where it is as fast), `always` (least memory), `never`.
        opset: of ONNX, None to choose.
        force: replace an existing output.
        trust_code: allow the file to name a function that builds the model.

    Raises:
        UserError: unknown format, unreadable file, a model that can't be exported, or an output
            that can't be written.
        VerifyError: what was written is too large or gives other logits. It is removed.
    """
    output = Path(output)
    _check_choices(dtype, lower)
    form = choose_format(to, output, dtype)
    form.check()
    check_output(output, force=force)
    model = load(file, trust_code=trust_code)
    stored = stored_bytes(model, dtype)
    images = images_for(model)
    expected = _logits(model, images)
    with replacing_files(output, force=force) as folder:
        job = Job(model, images, folder, output.name, dtype, lower, opset)
        written = form.write(job)
        _check_size(form, written, stored, output)
        difference = None
        if expected is not None:
            difference = _check_logits(form, job, expected, output)
        size = sum(f.stat().st_size for f in folder.iterdir())
    return Exported(
        output, form.name, size, written.tensors, written.parameters, written.weight_bytes,
        stored, difference, written.facts,
    )  # fmt: skip


def images_for(model: nn.Module) -> Tensor:
    """Random images of the size that a tied model's source says, `(2, C, H, W)`."""
    record = state_of(model).source
    preprocess = (Source.from_json(record).preprocess if record else None) or Preprocess(224)
    return random_images(len(preprocess.mean), preprocess.size)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two sets of logits, as a share of the largest logit or of 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _check_choices(dtype: str, lower: str) -> None:
    for name, value, known in (("--dtype", dtype, DTYPES), ("--lower", lower, LOWERINGS)):
        if value not in known:
            raise UserError(f"{name} {value} is unknown", hint=f"Use one of: {', '.join(known)}")


def _logits(model: nn.Module, images: Tensor) -> Tensor | None:
    """What the model gives; None if it takes no images, or other ones."""
    try:
        with torch.no_grad():
            return logits_of(model(images))
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return None


def _check_size(form: Format, written: Written, stored: int, output: Path) -> None:
    if form.compact and written.weight_bytes > GROWTH * stored:
        raise VerifyError(
            f"{output} would hold {written.weight_bytes:,} bytes of tensors for {stored:,} stored",
            "A tie was lost on the way, and nothing was written",
            "Report this as a bug, with the model and scheme",
        )


def _check_logits(form: Format, job: Job, expected: Tensor, output: Path) -> float | None:
    found = form.run(job.path, job.images)
    if found is None:
        return None
    difference = apart(found, expected)
    if not difference <= (TOLERANCE if job.dtype == "float32" else WIDE_TOLERANCE):
        raise VerifyError(
            f"{output} would give logits that differ by {difference:.2g} of the largest",
            "It was not written",
            "Report this as a bug, with the model and scheme",
        )
    return difference
