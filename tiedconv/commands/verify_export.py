"""Comparing an exported file with the compact model that it was made from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tiedconv.commands._bench_worker import BenchTarget, Process
from tiedconv.commands.export import GROWTH, TOLERANCE, WIDE_TOLERANCE, apart
from tiedconv.errors import CheckpointError, VerifyError
from tiedconv.exporters import Format, choose_format
from tiedconv.exporters._format import stored_bytes
from tiedconv.runtime.tie import dense_state_dict
from tiedconv.training import logits_of


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


def compare(path: Path, model: nn.Module, shown: Mapping[str, Tensor]) -> list[Check]:
    """Whether an exported file is the same model, as small, and gives the same logits.

    Args:
        path: of the file; its ending tells the format.
        model: tied, in evaluation mode.
        shown: images to run it on, by what to call them.

    Raises:
        CheckpointError: the file is missing or can't be read.
        VerifyError: it is another model, holds tensors twice, or gives other logits.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}", hint="Check the path, or export it")
    form = choose_format(None, path, "float32")
    if form.name == "dense":
        return [_dense(path, form, model)]
    tensors = form.tensors(path)
    dtype = _dtype(tensors)
    checks = [_size(path, tensors, stored_bytes(model, dtype))]
    checks += [_logits(path, form, model, name, x, dtype) for name, x in shown.items()]
    if form.name in ("onnx", "pt2") and checks[-1].passed:
        checks.append(_memory(path, form, next(iter(shown.values()))))
    return checks


def _dtype(tensors: Mapping[str, Tensor] | None) -> str:
    kinds = {t.dtype for t in (tensors or {}).values()}
    return "int8" if torch.int8 in kinds else "float16" if torch.float16 in kinds else "float32"


def _dense(path: Path, form: Format, model: nn.Module) -> Check:
    expected = dense_state_dict(model)
    found = form.tensors(path) or {}
    missing, unused = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unused:
        names = [f"{n} is missing" for n in missing] + [f"{n} is not the model's" for n in unused]
        raise VerifyError(
            f"{path} has other tensors: {'; '.join(names[:3])}",
            "It is of another model",
            "Export it again",
        )
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape or not torch.equal(other, tensor):
            raise VerifyError(
                f"{path}: the tensor {name} is not the compact file's",
                "It is of another model, or it was changed",
                "Export it again",
            )
    return Check("against", f"{path.name}: {len(found)} tensors, each bit the same")


def _size(path: Path, tensors: Mapping[str, Tensor] | None, stored: int) -> Check:
    if tensors is None:
        size = path.with_suffix(".bin").stat().st_size
        return Check("size", f"{path.name}: {size:,} bytes for {stored:,} stored")
    held = sum(t.nbytes for t in tensors.values())
    contents: dict[bytes, str] = {}
    for name, tensor in tensors.items():
        # A transpose is the same numbers too, but only of a matrix that is large does it matter.
        if tensor.numel() < 4096:
            continue
        for form in (tensor, tensor.mT) if tensor.ndim == 2 else (tensor,):
            key = form.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            twin = contents.setdefault(key, name)
            if twin != name and bool(tensor.any()):
                raise VerifyError(
                    f"{path} holds the same numbers twice, as {twin} and {name}",
                    "A tie was lost",
                    "Export it again with tiedconv export",
                )
    if held > GROWTH * stored:
        raise VerifyError(
            f"{path} holds {held:,} bytes of tensors for {stored:,} stored",
            "A tie was lost, or it is of another model",
            "Export it again with tiedconv export",
        )
    return Check("size", f"{path.name}: {len(tensors)} tensors, {held / stored:.3f} x stored bytes")


def _logits(
    path: Path, form: Format, model: nn.Module, name: str, images: Tensor, dtype: str
) -> Check:  # fmt: skip
    with torch.no_grad():
        expected = logits_of(copy.deepcopy(model)(images))
    found = form.run(path, images)
    if found is None:
        return Check("logits", f"not compared: nothing here runs {form.name}", None)
    off = apart(found, expected) if found.shape == expected.shape else float("nan")
    limit = TOLERANCE if dtype == "float32" else WIDE_TOLERANCE
    if not off <= limit:
        raise VerifyError(
            f"{path}: logits on {name} images differ by {off:.2g} of the largest",
            "It is of another model, or it was changed",
            "Export it again",
        )
    return Check("logits", f"{len(images)} {name} images: they agree to {off:.1e}")


def _memory(path: Path, form: Format, images: Tensor) -> Check:
    """What the loaded file takes in its runtime, in a process of its own."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    contender = BenchTarget(str(path), form.name, shape=shape)
    found = []
    for one_copy in (False, True) if form.name == "onnx" else (False,):
        process = Process(dataclasses.replace(contender, one_copy=one_copy))
        try:
            found.append(process.load()[1])
        finally:
            process.close()
    text = f"{found[0]:,} bytes held by {'ONNX Runtime' if form.name == 'onnx' else 'torch'}"
    if len(found) > 1:
        text += f"; {found[1]:,} with session.disable_prepacking"
    return Check("memory", text)
