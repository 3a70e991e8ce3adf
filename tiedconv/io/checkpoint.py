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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tiedconv.core.pad import has_pads
from tiedconv.core.plan import Plan
from tiedconv.errors import CheckpointError, PlanError, UserError
from tiedconv.io.atomic import replacing
from tiedconv.io.checkpoint_reader import (
    FORMAT,
    WITH_CODES,
    Checkpoint,
    digest_of,
    read,
    tensor_hash,
)
from tiedconv.io.deflated import deflated, deflated_text
from tiedconv.io.joined import JOINED, joined, list_of, small_names
from tiedconv.io.json_text import compact_json
from tiedconv.io.narrowing import narrowed, stored_as
from tiedconv.io.safetensors_file import (
    Form,
    size_of_tensors,
    write_tensors,
)
from tiedconv.io.validation import check_plan
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of


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
    if state.wide is not None:
        raise UserError(
            "The layers of this model were made narrow",
            "A compact file is of the original's layers, and would not fit",
            "Save it before narrow_layers is called on it, or export it",
            code="layers-narrowed",
        )
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


def size_of_model(model: nn.Module) -> int:
    """The bytes that `save` would write."""
    state, own = state_of(model), state_tensors(model)
    return file_size(state.plan, state.source, state.history, lambda name: own[name].detach().cpu())


def _same_as_planned(own: Mapping[str, Tensor], plan: Plan) -> None:
    """Refuse a model to which something was done that its plan does not know.

    Raises:
        UserError: tensors are missing, are new, or have another shape (`model-changed`).
    """
    expected = plan.tensors
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
    content = _content(plan, source, history, tensor)
    with replacing(path, force=force) as temp:
        write_tensors(temp, content.forms, content.tensor, content.metadata)
        return _read_back(temp, path)


def file_size(
    plan: Plan,
    source: Mapping[str, Any] | None,
    history: Iterable[Mapping[str, Any]],
    tensor: Callable[[str], Tensor],
) -> int:
    """The bytes that `write_compact` would write, given the same."""
    content = _content(plan, source, history, tensor)
    return size_of_tensors(content.forms, content.metadata)


@dataclass(frozen=True)
class _Content:
    """What a file will hold: its metadata, and its tensors as they are stored."""

    forms: Mapping[str, Form]
    metadata: Mapping[str, str]
    tensor: Callable[[str], Tensor]


def _content(
    plan: Plan,
    source: Mapping[str, Any] | None,
    history: Iterable[Mapping[str, Any]],
    tensor: Callable[[str], Tensor],
) -> _Content:
    history = tuple(history)
    half = stored_as(history)

    def stored(name: str) -> Tensor:
        value = tensor(name)
        if name in plan.codes:
            smaller = deflated(value)
            return value if smaller is None else smaller
        return narrowed(value, half, closely=bool(plan.codes))

    forms: dict[str, Form] = {}
    hashes: dict[str, str] = {}
    for name in plan.tensors:
        value = stored(name)
        forms[name], hashes[name] = (value.dtype, tuple(value.shape)), tensor_hash(value)
    record = {"format": 1, "plan": plan.to_json(), "sha256": hashes, "history": list(history)}
    if has_pads(plan.weights.values()):
        record |= {"format": FORMAT, "deflated": {}, "small": []}
    if not plan.codes:
        return _Content(forms, _metadata(compact_json(record), source), stored)
    small = small_names(forms)
    record["format"] = FORMAT if has_pads(plan.weights.values()) else WITH_CODES
    record["deflated"] = {n: forms[n][1][0] for n in plan.codes if forms[n][1] != plan.factors[n]}
    record["small"] = list_of(small, forms)
    joint = joined(small, stored)
    for name in small:
        del forms[name], hashes[name]
    forms[JOINED], hashes[JOINED] = (joint.dtype, tuple(joint.shape)), tensor_hash(joint)

    def in_file(name: str) -> Tensor:
        return joint if name == JOINED else stored(name)

    return _Content(forms, _metadata(deflated_text(compact_json(record)), source), in_file)


def _metadata(record: str, source: Mapping[str, Any] | None) -> dict[str, str]:
    metadata = {"tiedconv": record, "source": compact_json(source)}
    return {**metadata, "digest": digest_of(metadata)}


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
