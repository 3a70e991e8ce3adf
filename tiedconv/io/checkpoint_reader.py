"""The checked header of a compact file, and its tensors on demand (see `checkpoint`).

Everything is checked before a tensor is used: the plan is small and well-formed, every reference
exists, every stored tensor is used, shapes agree, bytes are those that were written. The hashes
show that a file is complete, not that it is honest: docs/format.md has all checks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tiedconv.core.expr import Shape
from tiedconv.core.pad import has_pads
from tiedconv.core.plan import Plan
from tiedconv.errors import CheckpointError, PlanError
from tiedconv.io.deflated import PREFIX, inflated, inflated_text
from tiedconv.io.joined import JOINED, Part, parts_of
from tiedconv.io.json_text import strict_json
from tiedconv.io.raw import bytes_of
from tiedconv.io.safetensors_file import SafetensorsFile
from tiedconv.io.validation import check_plan, checked_history, checked_source

FORMAT = 3
"""The newest: files with padded weights. Files are written as the oldest version that has all they
need, which older releases read: 2 with codes, 1 without."""
WITH_CODES = 2
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
        hashes: name of a tensor of the file to SHA-256.
        shapes: tensor name to shape, as it is stored: codes may be deflated.
        dtypes: tensor name to safetensors' name of its dtype.
        size: of the file, in bytes.
        file: the open file. If another replaces it, tensors are still read from this one.
        deflated: codes that the file holds deflated, and how many bytes each has then.
        parts: small tensors that the file holds as one.
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
    deflated: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor, its bytes checked against the hash.

        Raises:
            CheckpointError: a tensor's bytes are not those that were written.
        """
        small = self._stored(JOINED) if self.parts else None
        for name in self.shapes:
            part = self.parts.get(name)
            tensor = self._stored(name) if small is None or part is None else part.of(small)
            if name in self.deflated:
                try:
                    tensor = inflated(tensor, *self.plan.factors[name])
                except ValueError as error:
                    raise self._damaged(name, f"is of no use: {error}") from None
            yield name, tensor

    def _stored(self, name: str) -> Tensor:
        tensor = self.file.tensor(name)
        if tensor_hash(tensor) != self.hashes.get(name):
            raise self._damaged(name, "is not what was written (SHA-256 differs)")
        return tensor

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
    if metadata.get("digest") != digest_of(metadata):
        raise CheckpointError(
            f"{path}: the plan is not what was written (SHA-256 differs)",
            "The file is damaged and was not used",
            _AGAIN,
            code="plan-damaged",
        )
    try:
        text = metadata["tiedconv"]
        record = strict_json(inflated_text(text) if text.startswith(PREFIX) else text)
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
            version in range(1, FORMAT + 1)
            and version is not True
            and rest.keys() == ({"deflated", "small"} if version > 1 else set())
        ):
            plan = Plan.from_json(data)
        case _:
            raise ValueError("its metadata lacks a part")
    check_plan(plan)
    history = checked_history(entries)
    expected = plan.tensors
    if plan.codes and version < WITH_CODES:
        raise ValueError(f"a file of version {version} has no codes")
    if has_pads(plan.weights.values()) and version < FORMAT:
        raise ValueError(f"a file of version {version} has no padded weights")
    if hashes.keys() != shapes.keys():
        raise ValueError("its hashes are not those of its tensors")
    shorter = _checked_deflated(rest.get("deflated", {}), plan)
    expected |= {name: (length,) for name, length in shorter.items()}
    dtypes = dict(file.dtypes)
    parts = parts_of(rest.get("small", []), expected)
    if parts:
        end = max(part.stop for part in parts.values())
        if shapes.pop(JOINED, None) != (end,) or dtypes.pop(JOINED) != "U8":
            raise ValueError(f"the tensor {JOINED} does not hold the small tensors")
        shapes |= {name: part.shape for name, part in parts.items()}
        dtypes |= {name: part.dtype for name, part in parts.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            got, want = shapes.get(name, "missing"), expected.get(name, "not used")
            raise ValueError(f"the tensor {name} is {got}, and by the plan {want}")
    mixed = any(step.get("computes_in") == "float32" for step in history)
    _check_dtypes(plan, dtypes, mixed)
    return Checkpoint(
        file.path,
        plan,
        checked_source(source),
        history,
        hashes,
        shapes,
        dtypes,
        file.size,
        file,
        shorter,
        parts,
    )


def _checked_deflated(lengths: object, plan: Plan) -> dict[str, int]:
    """The bytes of deflated codes: fewer than they inflate to."""
    if not isinstance(lengths, dict):
        raise ValueError("its list of deflated codes is malformed")
    for name, length in lengths.items():
        if name not in plan.codes or type(length) is not int:
            raise ValueError(f"{name[:200]} is no codes that were deflated")
        if not 0 < length < math.prod(plan.factors[name]):
            raise ValueError(f"{name[:200]} would be deflated to {length:,} bytes")
    return lengths


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


def digest_of(metadata: Mapping[str, str]) -> str:
    """SHA-256 of the record and the source, as texts."""
    text = f"{metadata.get('tiedconv')}\n{metadata.get('source')}"
    return hashlib.sha256(text.encode()).hexdigest()
