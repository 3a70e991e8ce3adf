"""The state from which an interrupted run resumes: one safetensors file of hashed tensors.

A state is plain data (None, booleans, numbers, texts, lists, tuples and dicts of any keys) with
tensors at any depth. Tensors are stored as such, the rest as JSON in the metadata; what is read is
equal to the bit to what was written. Nothing in a file can name code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.errors import CheckpointError, OutputError, UserError
from tiedconv.io.atomic import replacing
from tiedconv.io.checkpoint_reader import tensor_hash
from tiedconv.io.json_text import strict_json
from tiedconv.io.raw import bytes_of
from tiedconv.io.safetensors_file import FOREIGN, SafetensorsFile, save_tensors
from tiedconv.runtime.tensors import state_tensors

FORMAT = "tiedconv-state-1"
_LAYOUTS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
RESTART = "Use --force without --resume to start again"


def write_state(path: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write a state atomically; a previous file of that name is replaced.

    Args:
        path: of the file.
        kind: of the run, such as `training`.
        state: plain data and tensors.

    Raises:
        OutputError: the disk is full or not writable; the previous file is unchanged.
        TypeError: the state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    data = _encode(state, tensors, {})
    hashes = {name: tensor_hash(tensor.cpu()) for name, tensor in tensors.items()}
    text = json.dumps({"kind": kind, "state": data, "sha256": hashes})
    metadata = {"state": text, "digest": _digest(text), "tiedconv-state": FORMAT}
    with replacing(path, force=True) as temp:
        save_tensors(tensors, temp, metadata)


def read_state(path: Path, kind: str) -> dict[str, Any]:
    """The state that `write_state` wrote; its tensors are on the CPU.

    Raises:
        CheckpointError: the file is damaged, or not a state of this kind.
    """
    try:
        file = SafetensorsFile(path, FOREIGN)
        try:
            text = file.metadata["state"]
            if (file.metadata["tiedconv-state"], file.metadata["digest"]) != (
                FORMAT,
                _digest(text),
            ):
                raise foreign(path, kind)
            record = strict_json(text, FOREIGN.values)
            tensors = {name: file.tensor(name) for name in file.shapes}
        finally:
            file.close()
        if record["kind"] != kind or record["sha256"] != {
            name: tensor_hash(tensor) for name, tensor in tensors.items()
        }:
            raise foreign(path, kind)
        return dict(_decode(record["state"], tensors))
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise foreign(path, kind) from error


def foreign(path: Path, kind: str) -> CheckpointError:
    """The error for a file that is not a sound state of a run of this kind."""
    return CheckpointError(
        f"{path} is damaged, or not a {kind} checkpoint of this model",
        f"The {kind} can't resume from it",
        RESTART,
        code="state-damaged",
    )


def require_same(
    path: Path, saved: Mapping[str, Any], identity: Mapping[str, Any], kind: str = "run"
) -> None:
    """Raises UserError where a state is of another run; it names what differs."""
    names = [name for name in {**saved, **identity} if saved.get(name) != identity.get(name)]
    if names:
        changes = ", ".join(f"{name} {saved.get(name)} -> {identity.get(name)}" for name in names)
        raise UserError(
            f"The checkpoint {path} is of a different {kind}: {changes}",
            "Resuming would mix the two",
            f"Use the same model, options and images, or start again. {RESTART}",
            code="state-of-other-run",
        )


def prepare_folder(folder: Path) -> None:
    """Make a folder to write into.

    Raises:
        OutputError: it can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise OutputError(
            f"The checkpoint folder {folder} can't be written to",
            hint="Choose another folder or change its permissions",
            code="folder-not-writable",
        )


def weights_digest(model: nn.Module | None) -> str:
    """A digest of all bytes of a model's tensors, and of their names, dtypes and shapes."""
    if model is None:
        return "none"
    digest = hashlib.sha256()
    for name, tensor in state_tensors(model).items():
        digest.update(f"{name} {tensor_hash(tensor.detach().cpu())} ".encode())
    return digest.hexdigest()[:12]


def tensor_digest(tensor: Tensor) -> str:
    """A digest of all bytes of a tensor."""
    return hashlib.sha256(bytes_of(tensor.cpu())).hexdigest()[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> Any:
    """As JSON, in which ["kind", ...] stands for what JSON does not have."""
    if isinstance(value, Tensor):
        value = value.detach()
        # Tensors that are views of the same memory are stored once.
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() == 0 or key not in names:
            names[key] = str(len(tensors))
            tensors[names[key]] = value
        # Memory layout decides the order of sums, and so the bits of what is computed.
        return ["tensor", names[key], _layout_of(value)]
    if isinstance(value, Mapping):
        return ["dict", [[_encode(k, tensors, names), _encode(v, tensors, names)]
                         for k, v in value.items()]]  # fmt: skip
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_encode(item, tensors, names) for item in value]]
    if isinstance(value, float):
        return ["float", value.hex()]  # exact, infinities and NaN included
    if type(value) is int:
        return ["int", str(value)]  # of any size
    if value is None or isinstance(value, bool | str):
        return value
    raise TypeError(f"a {type(value).__name__} can't be part of a run's state")


def _layout_of(tensor: Tensor) -> str | None:
    """The name of a tensor's memory layout, None if its axes lie in their own order."""
    name = {4: "channels_last", 5: "channels_last_3d"}.get(tensor.dim(), "")
    if name not in _LAYOUTS or not tensor.is_contiguous(memory_format=_LAYOUTS[name]):
        return None
    return name if tensor.stride() != torch.empty(tensor.shape, device="meta").stride() else None


def _decode(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    match data:
        case ["tensor", str(name), None]:
            return tensors[name]
        case ["tensor", str(name), str(layout)]:
            tensor = tensors[name]
            format_ = _LAYOUTS[layout]
            return torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=format_).copy_(
                tensor
            )
        case ["dict", [*items]]:
            return {_decode(key, tensors): _decode(value, tensors) for key, value in items}
        case ["list", [*items]]:
            return [_decode(item, tensors) for item in items]
        case ["tuple", [*items]]:
            return tuple(_decode(item, tensors) for item in items)
        case ["float", str(text)]:
            return float.fromhex(text)
        case ["int", str(text)]:
            return int(text)
        case None | bool() | str():
            return data
    raise ValueError("the state is malformed")
