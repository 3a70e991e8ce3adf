"""The compact file: one safetensors file that holds each stored tensor once, with its plan.

Kept tensors have their original names, factors `tied/...`. The metadata holds

- `tiedconv`: format version, plan, SHA-256 of every tensor, history, which codes are deflated;
- `source`: how to build the model's class;
- `digest`: SHA-256 of the two above.

Everything is checked before a tensor is used: the plan is small and well-formed, every reference
exists, every stored tensor is used, shapes agree, bytes are those that were written. The hashes
show that a file is complete, not that it is honest: docs/format.md has all checks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Plan
from tiedconv.errors import CheckpointError, PlanError, UserError
from tiedconv.io.atomic import replacing
from tiedconv.io.deflated import deflated, inflated
from tiedconv.io.json_text import compact_json, strict_json
from tiedconv.io.narrowing import narrowed, stored_as
from tiedconv.io.raw import bytes_of
from tiedconv.io.safetensors_file import Form, SafetensorsFile, write_tensors
from tiedconv.io.validation import check_plan, checked_history, checked_source
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of

FORMAT = 2
"""The newest: files with codes. All others are written as version 1, which older releases read."""
# safetensors' names of dtypes that readers of version 1 need not know.
_LATER_DTYPES = frozenset({"F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_AGAIN = "Copy it again from its origin, or convert the model again"


@dataclass(frozen=True)
class Checkpoint:
    """The checked header of a file; tensors are read on demand.

    Args:
        path: the file.
        plan: of the conversion.
        source: how to build the model, plain data.
        history: what was done with the model, oldest first.
        hashes: tensor name to SHA-256.
        shapes: tensor name to shape, in the file: codes may be deflated.
        dtypes: tensor name to safetensors' name of its dtype.
        size: of the file, in bytes.
        file: the open file. If another replaces it, tensors are still read from this one.
        deflated: names of codes that the file holds deflated.
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
    deflated: frozenset[str] = frozenset()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor, its bytes checked against the hash.

        Raises:
            CheckpointError: a tensor's bytes are not those that were written.
        """
        for name in self.shapes:
            tensor = self.file.tensor(name)
            if tensor_hash(tensor) != self.hashes.get(name):
                raise self._damaged(name, "is not what was written (SHA-256 differs)")
            if name in self.deflated:
                try:
                    tensor = inflated(tensor, *self.plan.factors[name])
                except ValueError as error:
                    raise self._damaged(name, f"is of no use: {error}") from None
            yield name, tensor

    def _damaged(self, name: str, how: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the tensor {name} {how}",
            "The file is damaged and was not used",
            _AGAIN,
            code="tensor-damaged",
        )

    def close(self) -> None:
        """Close the file; no tensor can be read then."""
        self.file.close()


def save(model: nn.Module, path: str | Path, *, force: bool = False) -> int:
    """Write a tied model to a compact file.

    Args:
        model: tied.
        path: of the file, which must not exist unless `force`.

    Returns:
        the file's size in bytes.

    Raises:
        OutputError: the file can't be written.
        PlanError: the file would be beyond the limits of what is read again.
    """
    return write_model(model, Path(path), force=force).size


def write_model(model: nn.Module, path: Path, *, force: bool = False) -> Checkpoint:
    """As `save`; returns the file as it was read back."""
    state = state_of(model)
    own = state_tensors(model)
    _same_as_planned(own, state.plan)
    return write_compact(
        path,
        state.plan,
        state.source,
        state.history,
        lambda name: own[name].detach().cpu(),
        force=force,
    )


def _same_as_planned(own: Mapping[str, Tensor], plan: Plan) -> None:
    """Refuse a model to which something was done that its plan does not know.

    Raises:
        UserError: tensors are missing, are new, or have another shape (`model-changed`).
    """
    expected = {**plan.kept, **plan.factors}
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = [
        f"it lacks {name}" if name not in shapes else f"{name} is {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    found += [f"{n} is new" for n in shapes if n not in expected and n not in plan.aliases]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"The model was changed after its conversion: {', '.join(found[:3])}{more}",
            "The file would not be this model, and nothing was written",
            "Save before the change; or call tiedconv.untie(model) and convert the changed model",
            code="model-changed",
        )


def write_compact(
    path: Path,
    plan: Plan,
    source: Mapping[str, Any] | None,
    history: Iterable[Mapping[str, Any]],
    tensor: Callable[[str], Tensor],
    *,
    force: bool = False,
) -> Checkpoint:
    """Write a compact file atomically, with one tensor in memory at a time.

    Args:
        path: of the file, which must not exist unless `force`.
        plan: of the conversion.
        source: how to build the model, plain data.
        history: what was done with the model, oldest first; `stored_as` in it decides the type
            of the weights.
        tensor: from the name of a kept tensor or a factor to the tensor; called twice for each,
            for its hash, which the header holds, and to write it.

    Returns:
        the file as it was read back, closed.

    Raises:
        OutputError: the file can't be written.
        PlanError: the file would be beyond the limits of what is read again.
    """
    check_plan(plan)
    history = tuple(history)
    half = stored_as(history)

    def stored(name: str) -> Tensor:
        value = tensor(name)
        if name in plan.codes:
            smaller = deflated(value)
            return value if smaller is None else smaller
        return narrowed(value, half)

    forms: dict[str, Form] = {}
    hashes: dict[str, str] = {}
    for name in (*plan.kept, *plan.factors):
        value = stored(name)
        forms[name], hashes[name] = (value.dtype, tuple(value.shape)), tensor_hash(value)
    record = {
        "format": FORMAT if plan.codes else 1,
        "plan": plan.to_json(),
        "sha256": hashes,
        "history": list(history),
    }
    if plan.codes:
        record["deflated"] = [n for n in plan.codes if forms[n][1] != plan.factors[n]]
    metadata = {"tiedconv": compact_json(record), "source": compact_json(source)}
    metadata["digest"] = _digest(metadata)
    with replacing(path, force=force) as temp:
        write_tensors(temp, forms, stored, metadata)
        return _read_back(temp, path)


def _read_back(temp: Path, path: Path) -> Checkpoint:
    """A file that was just written, checked as any other that is read."""
    try:
        with contextlib.closing(read(temp)) as written:
            return dataclasses.replace(written, path=path)
    except CheckpointError as error:
        raise PlanError(
            f"{path} could not be read again: {error.what.removeprefix(f'{temp} ')}",
            "It was not written",
            "Report this as a bug, with the model and recipe",
            code="output-unreadable",
        ) from None


def read(path: str | Path) -> Checkpoint:
    """The checked header of a file; no tensor is read.

    Raises:
        CheckpointError: missing, damaged, not a compact file, or of a newer format.
    """
    file = SafetensorsFile(Path(path))
    metadata, shapes = file.metadata, file.shapes  # first of all, the file is complete
    if "tiedconv" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a compact file of tiedconv",
            hint="Pass it as weights: tiedconv convert MODEL --weights FILE",
            code="not-compact-file",
        )
    if metadata.get("digest") != _digest(metadata):
        raise CheckpointError(
            f"{path}: the plan is not what was written (SHA-256 differs)",
            "The file is damaged and was not used",
            _AGAIN,
            code="plan-damaged",
        )
    try:
        record = strict_json(metadata["tiedconv"])
        return _checked(file, shapes, record, strict_json(metadata.get("source", "null")))
    except PlanError as error:
        raise _unusable(path, error.what, error.code) from None
    except ValueError as error:
        raise _unusable(path, str(error), "metadata-invalid") from None


def _unusable(path: str | Path, what: str, code: str) -> CheckpointError:
    return CheckpointError(f"{path} can't be used: {what}", hint=_AGAIN, code=code)


def _checked(
    file: SafetensorsFile, shapes: dict[str, Shape], record: Any, source: Any
) -> Checkpoint:
    match record:
        case {"format": int(version)} if version > FORMAT:
            raise CheckpointError(
                f"{file.path} is of format {version}, newer than this tiedconv reads",
                "It was not used",
                "Install a newer tiedconv",
                code="format-too-new",
            )
        case {
            "format": int(version),
            "plan": data,
            "sha256": dict(hashes),
            "history": [*entries],
            **rest,
        } if (
            version in (1, FORMAT)
            and version is not True
            and rest.keys() == ({"deflated"} if version > 1 else set())
        ):
            plan = Plan.from_json(data)
        case _:
            raise ValueError("its metadata lacks a part")
    check_plan(plan)
    history = checked_history(entries)
    expected = {**plan.kept, **plan.factors}
    shorter = _checked_deflated(rest.get("deflated", []), plan, shapes)
    if plan.codes and version < FORMAT:
        raise ValueError(f"a file of version {version} has no codes")
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name) and name not in shorter:
            got, want = shapes.get(name, "missing"), expected.get(name, "not used")
            raise ValueError(f"the tensor {name} is {got}, and by the plan {want}")
    if hashes.keys() != shapes.keys():
        raise ValueError("its hashes are not those of its tensors")
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
        shorter,
    )


def _checked_deflated(
    names: object, plan: Plan, shapes: Mapping[str, Shape]
) -> frozenset[str]:  # fmt: skip
    """The names of deflated codes, each of which is shorter than what it inflates to."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its list of deflated codes is malformed")
    for name in names:
        shape = shapes.get(name, ())
        if name not in plan.codes or len(shape) != 1 or shape >= plan.factors[name]:
            raise ValueError(f"{name[:200]} is no codes that were deflated")
    return frozenset(names)


def _check_dtypes(plan: Plan, dtypes: Mapping[str, str], mixed: bool) -> None:
    """Only floats of one kind can be multiplied, unless all of them are widened first."""
    if later := sorted(_LATER_DTYPES & set(dtypes.values())):
        raise ValueError(f"it has a tensor of the type {later[0]}, which the format does not have")
    if wrong := [name for name in plan.codes if dtypes[name] != "U8"]:
        raise ValueError(f"{wrong[0]} holds codes, and is of the type {dtypes[wrong[0]]}")
    for name, expr in plan.weights.items():
        kinds = {dtypes[ref] for ref in expr.refs if ref not in plan.codes}
        if not kinds <= _FLOATS or (len(kinds) > 1 and not mixed):
            raise ValueError(f"{name} would be computed from {' and '.join(sorted(kinds))}")


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _digest(metadata: Mapping[str, str]) -> str:
    text = f"{metadata.get('tiedconv')}\n{metadata.get('source')}"
    return hashlib.sha256(text.encode()).hexdigest()
