"""Comparing an exported file with the compact model it was exported from."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tiedconv.commands._bench_worker import BenchTarget, Process
from tiedconv.commands._reference import outputs_differ_by, reference
from tiedconv.commands.export import GROWTH
from tiedconv.errors import CheckpointError, UserError, VerifyError
from tiedconv.exporters import Format, choose_format
from tiedconv.exporters._format import constant_bytes, stored_bytes
from tiedconv.runtime.dequantize import dequantize
from tiedconv.runtime.forward_check import further_inputs, token_count
from tiedconv.runtime.tie import dense_state_dict, state_of
from tiedconv.sources.models import is_compact


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: what is checked.
        detail: what was found.
        passed: None if the check could not be run; `detail` is then "not checked: " and the reason.
    """

    name: str
    detail: str
    passed: bool | None = True

    @classmethod
    def not_run(cls, name: str, reason: str) -> Check:
        """A check that could not be run."""
        return cls(name, f"not checked: {reason.rstrip('.')}", None)


def compare(path: Path, model: nn.Module, shown: Mapping[str, Tensor]) -> list[Check]:
    """Check that an exported file is the same model, as small, and gives the same logits.

    Args:
        path: the exported file; its extension gives the format.
        model: tied, in evaluation mode.
        shown: images to run it on, by the name to report them under.

    Raises:
        CheckpointError: the file is missing or can't be read.
        VerifyError: it is another model, holds tensors twice, or gives other logits.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no file {path}", hint="Check the path, or export it", code="file-not-found"
        )
    form = choose_format("compact" if is_compact(path) else None, path, "float32")
    if form.name == "dense":
        return [_dense(path, form, model)]
    tensors = form.tensors(path)
    dtype = _dtype(tensors)
    if form.has_graph and state_of(model).plan.codes:
        model = dequantize(copy.deepcopy(model))
        # Integers in it are the model's own, and nothing that was rounded besides.
        dtype = "float32" if dtype == "int8" else dtype
    checks = [_size(path, tensors, form.held_bytes(path), stored_bytes(model, dtype),
                    constant_bytes(model))]  # fmt: skip
    for name, x in shown.items():
        checks += _outputs(path, form, model, name, x, dtype)
    if form.opens and checks[-1].passed:
        first = next(iter(shown.values()))
        checks.append(_memory(path, form, first, token_count(model, first)))
    return checks


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    kinds = {t.dtype for t in tensors.values()}
    if torch.int8 in kinds:
        return "int8"
    narrow = ("float16", "bfloat16")
    return next((name for name in narrow if getattr(torch, name) in kinds), "float32")


def _dense(path: Path, form: Format, model: nn.Module) -> Check:
    expected = dense_state_dict(model)
    found = form.tensors(path)
    missing, unused = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unused:
        names = [f"{n} is missing" for n in missing] + [f"{n} is not in the model" for n in unused]
        raise VerifyError(
            f"{path} has other tensors: {'; '.join(names[:3])}",
            "It is of another model",
            "Export it again",
            code="tensors-differ",
        )
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape or not torch.equal(other, tensor):
            raise VerifyError(
                f"{path}: the tensor {name} differs from the compact file's",
                "It is of another model, or it was changed",
                "Export it again",
                code="tensors-differ",
            )
    return Check("against", f"{path.name}: {len(found)} tensors, bitwise equal")


def _size(
    path: Path, tensors: Mapping[str, Tensor], held: int, stored: int, constants: int = 0
) -> Check:  # fmt: skip
    contents: dict[bytes, str] = {}
    for name, tensor in tensors.items():
        # A transpose holds the same values too; small tensors may be equal by chance.
        if tensor.numel() < 4096:
            continue
        for layout in (tensor, tensor.mT) if tensor.ndim == 2 else (tensor,):
            same = contents.setdefault(_digest(layout), name)
            if same != name and bool(tensor.any()):
                raise VerifyError(
                    f"{path} holds the same values twice, as {same} and {name}",
                    "A tie was lost",
                    "Export it again with tiedconv export",
                    code="tie-lost",
                )
    if held > GROWTH * stored + constants:
        raise VerifyError(
            f"{path} holds {held:,} bytes of tensors for {stored:,} stored",
            "A tie was lost, or it is of another model",
            "Export it again with tiedconv export",
            code="tie-lost",
        )
    return Check("size", f"{path.name}: {len(tensors)} tensors, {held / stored:.3f} x stored bytes")


def _digest(tensor: Tensor) -> bytes:
    """SHA-256 of the bytes, of which one tensor's at a time are held."""
    values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(values.data).digest()


def _outputs(
    path: Path, form: Format, model: nn.Module, name: str, images: Tensor, dtype: str
) -> list[Check]:  # fmt: skip
    reason = form.why_not_run()
    if reason is not None:
        return [Check.not_run("outputs", reason)]
    try:
        expected = reference(model, images, dtype)
    except UserError as error:
        if error.code != "images-rejected":
            raise
        return [Check.not_run("outputs", error.what)]
    found = form.run(path, images, further_inputs(model, images).get("input_ids"))
    missing = [output for output in expected.rounded if output not in found]
    shared = {n: value for n, value in expected.rounded.items() if n in found}
    off = outputs_differ_by(found, shared) if shared else float("nan")
    if not off <= expected.tolerance:
        raise VerifyError(
            f"{path}: outputs on {name} images differ by {off:.2g} of the largest "
            f"(at most {expected.tolerance:.2g})",
            "It is of another model, or it was changed",
            "Export it again",
            code="outputs-differ",
        )
    what = f"{' and '.join(shared)} on {len(images)} {name} images: they agree to {off:.1e}"
    checks = [Check("outputs", what)]
    if missing:
        reason = f"the file lacks {', '.join(missing)}, which the model gives"
        checks.insert(0, Check.not_run("outputs", reason))
    return checks


def _memory(path: Path, form: Format, images: Tensor, tokens: int) -> Check:
    """The memory that the loaded file takes up in its runtime, measured in its own process."""
    shape = tuple(images.shape[1:]) if images.is_floating_point() else ()
    target = BenchTarget(str(path), form.name, shape=shape, tokens=tokens)
    found = []
    for lean in (False, True) if form.lean else (False,):
        process = Process(dataclasses.replace(target, lean=lean))
        try:
            found.append(process.load()[1])
        finally:
            process.close()
    text = f"{found[0]:,} bytes held by {form.runtime}"
    if len(found) > 1:
        text += f"; {found[1]:,} with {form.lean}"
    return Check("memory", text)
