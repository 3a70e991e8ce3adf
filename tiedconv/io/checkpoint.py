"""The file: one safetensors file that holds each stored tensor once, and says what it is.

Kept tensors stand under their original names, factors as `tied/...`. The metadata holds

- `tiedconv`: format version, plan, SHA-256 of every tensor, history;
- `source`: how to build the model's class;
- `digest`: SHA-256 of the two above.

Everything is checked before a tensor is used: the plan is small and well-formed, every reference
exists, every stored tensor is used, shapes agree, bytes are those that were written. The hashes
say that a file is whole; that it is honest, nobody can know, so it is believed in nothing that
could hurt its reader. docs/format.md has all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Plan
from tiedconv.errors import CheckpointError, PlanError
from tiedconv.families.inspect import inspect_model
from tiedconv.io.safetensors_file import (
    DTYPES,
    SafetensorsFile,
    replacing,
    save_tensors,
    strict_json,
)
from tiedconv.io.validation import check_plan, checked_history, checked_source
from tiedconv.runtime.tie import state_of, tie

FORMAT = 1
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_AGAIN = "Copy it again from where it came, or convert the model again"


@dataclass(frozen=True)
class Checkpoint:
    """The head of a file, checked; tensors are read when asked for.

    Args:
        path: the file.
        plan: of the conversion.
        source: how to build the model, plain data.
        history: what was done with the model, oldest first.
        hashes: tensor name to SHA-256.
        shapes: tensor name to shape.
        dtypes: tensor name to safetensors' name of its dtype.
        size: of the file, in bytes.
        file: the open file. Whatever takes its place later, tensors are read from this one.
    """

    path: Path
    plan: Plan
    source: Mapping[str, Any] | None
    history: tuple[Mapping[str, Any], ...]
    hashes: Mapping[str, str]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    size: int
    file: SafetensorsFile = field(repr=False, compare=False)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor, its bytes checked against the hash.

        Raises:
            CheckpointError: a tensor's bytes are not those that were written.
        """
        for name in self.shapes:
            tensor = self.file.tensor(name)
            if tensor_hash(tensor) != self.hashes.get(name):
                raise CheckpointError(
                    f"{self.path}: the tensor {name} is not what was written (SHA-256 differs)",
                    "The file is damaged and was not used",
                    _AGAIN,
                )
            yield name, tensor


def save(model: nn.Module, path: str | Path, *, force: bool = False) -> int:
    """Write a tied model to a file, whole or not at all.

    Args:
        model: tied.
        path: of the file, which must not exist unless `force`.

    Returns:
        the file's size in bytes.

    Raises:
        OutputError: the file can't be written.
        PlanError: the file would be beyond the limits of what is read again.
    """
    state = state_of(model)
    check_plan(state.plan)
    names = [*state.plan.kept, *state.plan.factors]
    own = model.state_dict()
    tensors = {name: own[name].detach().cpu().contiguous() for name in names}
    record = {
        "format": FORMAT,
        "plan": state.plan.to_json(),
        "sha256": {name: tensor_hash(t) for name, t in tensors.items()},
        "history": list(state.history),
    }
    metadata = {"tiedconv": _dump(record), "source": _dump(state.source)}
    metadata["digest"] = _digest(metadata)
    with replacing(Path(path), force=force) as part:
        save_tensors(tensors, part, metadata)
        _sort_metadata(part)
        try:
            written = read(part)  # what is written can be read
        except CheckpointError as error:
            raise PlanError(
                f"{path} could not be read again: {error.what.removeprefix(f'{part} ')}",
                "It was not written",
                "Report this as a bug, with the model and recipe",
            ) from None
        written.file.close()
        return written.size


def read(path: str | Path) -> Checkpoint:
    """The head of a file, checked; no tensor is read.

    Raises:
        CheckpointError: missing, damaged, not one of ours, or of a newer format.
    """
    file = SafetensorsFile(Path(path))
    metadata, shapes = file.metadata, file.shapes  # first of all, it is a whole file
    if "tiedconv" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of tiedconv's",
            hint="Pass it as weights: tiedconv convert MODEL --weights FILE",
        )
    if metadata.get("digest") != _digest(metadata):
        raise CheckpointError(
            f"{path}: the plan is not what was written (SHA-256 differs)",
            "The file is damaged and was not used",
            _AGAIN,
        )
    try:
        record = strict_json(metadata["tiedconv"])
        return _checked(file, shapes, record, strict_json(metadata.get("source", "null")))
    except (PlanError, ValueError) as error:
        what = error.what if isinstance(error, PlanError) else error
        raise CheckpointError(f"{path} can't be used: {what}", hint=_AGAIN) from None


def install(checkpoint: Checkpoint, skeleton: nn.Module) -> nn.Module:
    """Put a file's tensors and ties into a model of the original class; returns it, in eval mode.

    Raises:
        CheckpointError: the model has other tensors than the file, or a tensor is damaged.
    """
    _same_names(checkpoint, skeleton)
    # All of them are read and checked before the first is put in: a model that the caller gave
    # is not left half changed.
    tensors = dict(checkpoint.tensors())
    for name in checkpoint.plan.kept:
        _put(skeleton, name, tensors.pop(name))
    for alias, name in checkpoint.plan.aliases.items():
        if name in checkpoint.plan.kept:
            _alias(skeleton, alias, name)
    tie(
        skeleton,
        checkpoint.plan,
        tensors,
        source=checkpoint.source,
        history=checkpoint.history,
    )
    return skeleton.eval()


def _same_names(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    info = inspect_model(skeleton)
    plan = checkpoint.plan
    expected = {**plan.kept, **{n: e.shape for n, e in plan.weights.items()}}
    if dict(info.shapes) == expected and dict(info.aliases) == dict(plan.aliases):
        _same_kinds(checkpoint, skeleton)
        return
    differing = [
        f"{n} is {expected.get(n, 'missing')} in the file, {info.shapes.get(n, 'missing')} in "
        f"the model"
        for n in sorted(expected.keys() | info.shapes.keys())
        if expected.get(n) != info.shapes.get(n)
    ] or ["they share other tensors"]
    raise CheckpointError(
        f"{checkpoint.path} is for another model: {'; '.join(differing[:3])}",
        "It was not loaded",
        "Use the library versions that the file names (tiedconv report FILE), or the right model",
    )


def _same_kinds(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    """Refuse whole numbers where the model has fractions, and the reverse."""
    own = skeleton.state_dict()
    for name in checkpoint.plan.kept:
        here, there = own[name].dtype, DTYPES[checkpoint.dtypes[name]]
        if here != there and not (here.is_floating_point and there.is_floating_point):
            raise CheckpointError(
                f"{checkpoint.path} is for another model: {name} is {there} in the file, {here} "
                "in the model",
                "It was not loaded",
                "Use the right model, or convert it again",
            )
    buffers = {name for name, _ in skeleton.named_buffers(remove_duplicate=False)}
    if computed := sorted(buffers & checkpoint.plan.weights.keys()):
        raise CheckpointError(
            f"{checkpoint.path} is for another model: it computes {computed[0]}, which is no "
            "parameter of the model",
            "It was not loaded",
            "Use the right model, or convert it again",
        )


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by the file's tensor, keeping sharing among modules."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters.get(attribute)
    if old is not None:
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[attribute] = tensor


def _alias(model: nn.Module, alias: str, name: str) -> None:
    path, _, attribute = alias.rpartition(".")
    source_path, _, source_attribute = name.rpartition(".")
    module, source = model.get_submodule(path), model.get_submodule(source_path)
    for table, other in (
        (module._parameters, source._parameters),
        (module._buffers, source._buffers),
    ):
        if attribute in table and source_attribute in other:
            table[attribute] = other[source_attribute]  # type: ignore[assignment]


def _checked(
    file: SafetensorsFile, shapes: dict[str, Shape], record: Any, source: Any
) -> Checkpoint:
    match record:
        case {"format": int(version)} if version > FORMAT:
            raise CheckpointError(
                f"{file.path} is of format {version}, newer than this tiedconv reads",
                "It was not used",
                "Install a newer tiedconv",
            )
        case {
            "format": int(version),
            "plan": data,
            "sha256": dict(hashes),
            "history": [*entries],
        } if version == FORMAT and version is not True:
            plan = Plan.from_json(data)
        case _:
            raise ValueError("its metadata lacks a part")
    check_plan(plan)
    history = checked_history(entries)
    expected = {**plan.kept, **plan.factors}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            got, want = shapes.get(name, "missing"), expected.get(name, "not used")
            raise ValueError(f"the tensor {name} is {got}, and by the plan {want}")
    if hashes.keys() != shapes.keys():
        raise ValueError("its list of hashes does not name its tensors")
    mixed = any(step.get("computes_in") == "float32" for step in history)
    _check_dtypes(plan, file.dtypes, mixed)
    return Checkpoint(
        file.path,
        plan,
        checked_source(source),
        history,
        hashes,
        shapes,
        file.dtypes,
        file.size,
        file,
    )


def _check_dtypes(plan: Plan, dtypes: Mapping[str, str], mixed: bool) -> None:
    """Only floats of one kind can be multiplied, unless all of them are widened first."""
    for name, expr in plan.weights.items():
        kinds = {dtypes[ref] for ref in expr.refs}
        if not kinds <= _FLOATS or (len(kinds) > 1 and not mixed):
            raise ValueError(f"{name} would be computed from {' and '.join(sorted(kinds))}")


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def _digest(metadata: Mapping[str, str]) -> str:
    text = f"{metadata.get('tiedconv')}\n{metadata.get('source')}"
    return hashlib.sha256(text.encode()).hexdigest()


def _dump(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sort_metadata(path: Path) -> None:
    """Put a header's metadata in order, in place: safetensors writes it in a random one.

    The same model then gives the same bytes. Only keys change places, so the length stays.
    """
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
