"""The file: one safetensors file that holds each stored tensor once, and says what it is.

Kept tensors stand under their original names, factors as `tied/...`. The metadata holds

- `tiedconv`: format version, plan, SHA-256 of every tensor, history;
- `source`: how to build the model's class;
- `digest`: SHA-256 of the two above.

Everything is checked before a tensor is used: every reference exists, every stored tensor is
used, shapes agree, bytes are those that were written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tiedconv.anatomy import examine
from tiedconv.binding import state_of, tie
from tiedconv.errors import CheckpointError, PlanError
from tiedconv.expr import Shape
from tiedconv.files import replacing
from tiedconv.plan import Plan

FORMAT = 1
MAX_METADATA = 32 * 2**20
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
    """

    path: Path
    plan: Plan
    source: Mapping[str, Any] | None
    history: tuple[Mapping[str, Any], ...]
    hashes: Mapping[str, str]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    size: int

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor, its bytes checked against the hash.

        Raises:
            CheckpointError: a tensor's bytes are not those that were written.
        """
        with _opened(self.path) as file:
            for name in self.shapes:
                tensor = file.get_tensor(name)
                if _hash(tensor) != self.hashes.get(name):
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
    """
    state = state_of(model)
    names = [*state.plan.kept, *state.plan.factors]
    own = model.state_dict()
    tensors = {name: own[name].detach().cpu().contiguous() for name in names}
    record = {
        "format": FORMAT,
        "plan": state.plan.to_json(),
        "sha256": {name: _hash(t) for name, t in tensors.items()},
        "history": list(state.history),
    }
    metadata = {"tiedconv": _dump(record), "source": _dump(state.source)}
    metadata["digest"] = _digest(metadata)
    with replacing(Path(path), force=force) as part:
        try:
            save_file(tensors, part, {"format": "pt", **metadata})
        except SafetensorError as error:  # a full disk, which `replacing` tells of
            raise OSError(str(error)) from None
        _sort_metadata(part)
        return part.stat().st_size


def read(path: str | Path) -> Checkpoint:
    """The head of a file, checked; no tensor is read.

    Raises:
        CheckpointError: missing, damaged, not one of ours, or of a newer format.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        dtypes = {name: str(s.get_dtype()) for name, s in slices.items()}
    if "tiedconv" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of tiedconv's",
            remedy="Pass it as weights: tiedconv convert MODEL --weights FILE",
        )
    if metadata.get("digest") != _digest(metadata):
        raise CheckpointError(
            f"{path}: the plan is not what was written (SHA-256 differs)",
            "The file is damaged and was not used",
            _AGAIN,
        )
    try:
        record, source = _parse(metadata["tiedconv"]), _parse(metadata.get("source", "null"))
        checkpoint = _checked(path, record, source, shapes, dtypes)
    except (PlanError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be used: {error}", remedy=_AGAIN) from None
    return checkpoint


def install(checkpoint: Checkpoint, skeleton: nn.Module) -> nn.Module:
    """Put a file's tensors and ties into a model of the original class; returns it, in eval mode.

    Raises:
        CheckpointError: the model has other tensors than the file, or a tensor is damaged.
    """
    _same_names(checkpoint, skeleton)
    factors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors():
        if name in checkpoint.plan.kept:
            _put(skeleton, name, tensor)
        else:
            factors[name] = tensor
    for alias, name in checkpoint.plan.aliases.items():
        if name in checkpoint.plan.kept:
            _alias(skeleton, alias, name)
    tie(
        skeleton,
        checkpoint.plan,
        factors,
        source=checkpoint.source,
        history=checkpoint.history,
    )
    return skeleton.eval()


def _same_names(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    anatomy = examine(skeleton)
    plan = checkpoint.plan
    expected = {**plan.kept, **{n: e.shape for n, e in plan.weights.items()}}
    if dict(anatomy.shapes) == expected and dict(anatomy.aliases) == dict(plan.aliases):
        return
    differing = [
        f"{n} is {expected.get(n, 'missing')} in the file, {anatomy.shapes.get(n, 'missing')} in "
        f"the model"
        for n in sorted(expected.keys() | anatomy.shapes.keys())
        if expected.get(n) != anatomy.shapes.get(n)
    ] or ["they share other tensors"]
    raise CheckpointError(
        f"{checkpoint.path} is for another model: {'; '.join(differing[:3])}",
        "It was not loaded",
        "Use the library versions that the file names (tiedconv report FILE), or the right model",
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
    path: Path, record: Any, source: Any, shapes: dict[str, Shape], dtypes: dict[str, str]
) -> Checkpoint:
    match record:
        case {"format": int(version)} if version > FORMAT:
            raise ValueError(f"it is of format {version}, newer than this tiedconv reads")
        case {"format": 1, "plan": plan_data, "sha256": dict(hashes), "history": [*history]}:
            plan = Plan.from_json(plan_data)
        case _:
            raise ValueError("its metadata lacks a part")
    if not all(isinstance(e, dict) and _is_number(e.get("top1")) for e in history):
        raise ValueError("its history is malformed")
    if not (source is None or isinstance(source, dict)):
        raise ValueError("its source is malformed")
    expected = {**plan.kept, **plan.factors}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            got, want = shapes.get(name, "missing"), expected.get(name, "not used")
            raise ValueError(f"the tensor {name} is {got}, and by the plan {want}")
    if hashes.keys() != shapes.keys():
        raise ValueError("its list of hashes does not name its tensors")
    return Checkpoint(
        path, plan, source, tuple(history), hashes, shapes, dtypes, path.stat().st_size
    )


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(
            f"There is no file {path}", remedy="Check the path, or make it with tiedconv convert"
        )
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{path} is no whole safetensors file ({reason})",
            "It was not used",
            _AGAIN,
        ) from None


def _hash(tensor: Tensor) -> str:
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


def _parse(text: str) -> Any:
    if len(text) > MAX_METADATA:
        raise ValueError("its metadata is too large to be a plan")
    return json.loads(text)
