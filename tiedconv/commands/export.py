"""The command `export`: a compact file in a format that runs without tiedconv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tiedconv.commands._reference import (
    Reference,
    images_for,
    outputs_differ_by,
    outputs_of,
    reference,
)
from tiedconv.core.pad import has_pads
from tiedconv.errors import TiedconvError, UserError, VerifyError, first_line
from tiedconv.exporters import DTYPES, LOWERINGS, Format, Job, Written, choose_format
from tiedconv.exporters._format import TEXT, constant_bytes, stored_bytes
from tiedconv.io.atomic import check_output, replacing_files
from tiedconv.runtime.dequantize import Integers, dequantized
from tiedconv.runtime.forward_check import further_inputs
from tiedconv.runtime.narrow_layers import narrow_layers
from tiedconv.runtime.outputs import ONLY, chosen
from tiedconv.runtime.tie import state_of
from tiedconv.sources import Source
from tiedconv.sources.class_names import class_names_of
from tiedconv.sources.models import load

GROWTH = 1.02
"""How many times the stored bytes the tensors of a compact format may take up."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        path: the main file.
        format: name of the format.
        size: bytes of all files.
        tensors: number of tensors in the file.
        parameters: values in them, buffers included.
        weight_bytes: bytes of the tensors.
        stored_bytes: bytes of the compact file's tensors in this dtype.
        difference: largest difference of the file's logits from the compact model's on random
            images, relative to the largest logit; None if the file was not run.
        not_checked: why the file was not run; None if it was.
        facts: further figures of the format.
        outputs: names of the outputs in the file; empty for a format without a graph.
    """

    path: Path
    format: str
    size: int
    tensors: int
    parameters: int
    weight_bytes: int
    stored_bytes: int
    difference: float | None
    not_checked: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


def export(
    file: str | Path,
    output: str | Path,
    to: str | None = None,
    *,
    dtype: str = "float32",
    lower: str = "auto",
    opset: int | None = None,
    outputs: Sequence[str] = (),
    force: bool = False,
    trust_code: bool = False,
) -> Exported:
    """Write a compact model in another format, check its size, and compare its logits.

    Args:
        file: a compact file.
        output: the file to write.
        to: the format: `compact`, `coreml`, `dense`, `executorch`, `onnx`, `openvino` or `pt2`;
            None to choose by the output's extension.
        dtype: how matrices and kernels are stored: `float32`, `float16`, `bfloat16` or `int8`.
        lower: for ONNX, where factors are applied one by one instead of materialising weights as
            the runtime loads the file: `auto` (where it is as fast), `always` (least memory),
            `never`. ExecuTorch and Core ML apply them wherever possible unless `never`.
        opset: ONNX opset, None to choose.
        outputs: names of the outputs that the file is to have, such as `logits`; all without any.
        force: replace an existing output.
        trust_code: allow the file to name a function that builds the model.

    Integers stay integers in ONNX and OpenVINO (INT4 where they fit, else INT8); in other formats
    with a graph they become floats, which `dtype` narrows again.

    Returns:
        the figures of the file; `not_checked` gives the reason if its logits were not compared.

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
    integers: dict[str, Integers] = {}
    quantised = bool(state_of(model).plan.codes) and form.has_graph
    if quantised:
        model, integers = dequantized(model)
    images = images_for(model)
    text = further_inputs(model, images).get("input_ids") if form.has_graph else None
    widths = _narrow(form, model, images, text)
    stored = stored_bytes(model, dtype)
    names = _output_names(form, model, images, outputs)
    expected, not_checked = _reference(form, model, images, dtype, names)
    difference = None
    with replacing_files(output, force=force) as folder:
        job = Job(
            model, images, folder, output.name, names, dtype, lower, opset, integers, text,
            _about(model),
        )  # fmt: skip
        written = form.write(job)
        _check_size(form, written, stored, constant_bytes(model), output)
        if expected is not None:
            difference = _check_outputs(form, job, expected, output)
        size = sum(f.stat().st_size for f in folder.iterdir())
    as_floats = quantised and not written.facts.get("packed")
    return Exported(
        output, form.name, size, written.tensors, written.parameters, written.weight_bytes,
        stored, difference, not_checked,
        {**written.facts, **widths, "integers_as_floats": as_floats}, names,
    )  # fmt: skip


def _narrow(form: Format, model: nn.Module, images: Tensor, text: Tensor | None) -> dict[str, Any]:
    """Make the layers of a graph as narrow as what is stored; what the figures say of it."""
    padded = [n for n, e in state_of(model).plan.weights.items() if has_pads([e])]
    if not padded or (form.compact and not form.has_graph):
        return {}
    if not form.has_graph:
        return {"padded": padded}
    example = images if text is None else {"pixel_values": images, TEXT: text}
    found = narrow_layers(model, example)
    return {"narrow": list(found.narrow), "padded": list(found.left), "why_padded": found.reason}


def _about(model: nn.Module) -> dict[str, Any]:
    """How images are prepared, and the first name of each class, where these are known."""
    state = state_of(model)
    if state.source is None:
        return {}
    source = Source.from_json(state.source)
    found: dict[str, Any] = {}
    if source.preprocess is not None:
        found["preprocess"] = source.preprocess.to_json()
    names = class_names_of(source, model, state.history)
    if names is not None:
        found["class_names"] = [each[0] for each in names]
    return found


def _check_choices(dtype: str, lower: str) -> None:
    for name, value, known in (("--dtype", dtype, DTYPES), ("--lower", lower, LOWERINGS)):
        if value not in known:
            raise UserError(
                f"Invalid {name} {value!r}", hint=f"Use one of: {', '.join(known)}",
                code=f"unknown-{name[2:]}",
            )  # fmt: skip


def _reference(
    form: Format, model: nn.Module, images: Tensor, dtype: str, names: Sequence[str]
) -> tuple[Reference | None, str | None]:  # fmt: skip
    """The outputs to compare with, or why there is nothing to compare."""
    reason = form.why_not_run()
    if reason is not None:
        return None, reason
    try:
        return reference(model, images, dtype, names), None
    except UserError as error:
        if error.code != "images-rejected":
            raise
        return None, error.what


def _output_names(
    form: Format, model: nn.Module, images: Tensor, wanted: Sequence[str]
) -> tuple[str, ...]:
    """The names of the outputs to write, all of the model's unless others are wanted."""
    if not form.has_graph:
        return ()
    try:
        return tuple(chosen(outputs_of(model, images), wanted))
    except UserError as error:
        if error.code != "images-rejected":
            raise
        return tuple(wanted) or (ONLY,)  # the exporter says what is wrong


def _check_size(
    form: Format, written: Written, stored: int, constants: int, output: Path
) -> None:  # fmt: skip
    if form.compact and written.weight_bytes > GROWTH * stored + constants:
        raise VerifyError(
            f"{output} would hold {written.weight_bytes:,} bytes of tensors for {stored:,} stored",
            "A tie was lost in the export, and nothing was written",
            "Report this as a bug, with the model and scheme",
            code="tie-lost",
        )


def _check_outputs(form: Format, job: Job, expected: Reference, output: Path) -> float:
    """The difference from the exact outputs, which rounding may explain."""
    try:
        found = form.run(job.path, job.images, job.text)
    except TiedconvError:
        raise
    except Exception as error:  # a runtime fails with errors of its own
        raise VerifyError(
            f"{output} would not run: {type(error).__name__}: {first_line(error)}",
            "It was not written",
            "Report this as a bug, with the model and scheme",
            code="export-does-not-run",
        ) from error
    difference = outputs_differ_by(found, expected.rounded)
    if not difference <= expected.tolerance:
        raise VerifyError(
            f"{output} would give outputs that differ by {difference:.2g} of the largest "
            f"(at most {expected.tolerance:.2g})",
            "It was not written",
            "Report this as a bug, with the model and scheme",
            code="outputs-differ",
        )
    return outputs_differ_by(found, expected.exact)
