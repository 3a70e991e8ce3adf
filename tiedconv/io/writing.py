"""Writing a compact file tensor by tensor: the same bytes as `checkpoint.save`, in little memory.

A file's head holds shapes and hashes of all tensors. So each is asked for twice: for its hash,
and to be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Plan
from tiedconv.io.checkpoint import FORMAT, _digest, _dump, tensor_hash
from tiedconv.io.safetensors_file import replacing

Form = tuple[torch.dtype, Shape]


def write_compact(
    path: Path,
    plan: Plan,
    source: Mapping[str, Any],
    history: Iterable[Mapping[str, Any]],
    tensor: Callable[[str], Tensor],
    *,
    force: bool = False,
) -> int:
    """Write a compact file, whole or not at all.

    Args:
        path: of the file, which must not exist unless `force`.
        plan: of the conversion.
        source: how to build the model, plain data.
        history: what was done with the model, oldest first.
        tensor: from the name of a kept tensor or a factor to the tensor; asked twice for each.

    Returns:
        the file's size in bytes.

    Raises:
        OutputError: the file can't be written.
    """
    forms: dict[str, Form] = {}
    hashes: dict[str, str] = {}
    for name in (*plan.kept, *plan.factors):
        value = tensor(name)
        forms[name], hashes[name] = (value.dtype, tuple(value.shape)), tensor_hash(value)
    record = {
        "format": FORMAT,
        "plan": plan.to_json(),
        "sha256": hashes,
        "history": list(history),
    }
    metadata = {"tiedconv": _dump(record), "source": _dump(source)}
    metadata["digest"] = _digest(metadata)
    return write_tensors(path, forms, tensor, {"format": "pt", **metadata}, force=force)


def write_tensors(
    path: Path,
    forms: Mapping[str, Form],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    force: bool = False,
) -> int:
    """Write a safetensors file, whole or not at all, with one tensor in memory at a time.

    Args:
        path: of the file, which must not exist unless `force`.
        forms: name to dtype and shape.
        tensor: from a name to the tensor of that form.
        metadata: of the file, written in the order of its keys.

    Returns:
        the file's size in bytes.

    Raises:
        OutputError: the file can't be written.
    """
    head: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, entry in _entries(forms).items():
        start, end = end, end + torch.Size(forms[name][1]).numel() * forms[name][0].itemsize
        head[name] = {**entry, "shape": list(forms[name][1]), "data_offsets": [start, end]}
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with replacing(path, force=force) as part:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in list(head)[1:]:
                value = tensor(name).detach().contiguous()
                assert (value.dtype, tuple(value.shape)) == forms[name]
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        return part.stat().st_size


def _entries(forms: Mapping[str, Form]) -> dict[str, Any]:
    """What safetensors itself writes of empty tensors: its names of dtypes, in its order."""
    data = serialized({name: torch.empty(0, dtype=dtype) for name, (dtype, _) in forms.items()})
    length = int.from_bytes(data[:8], "little")
    entries: dict[str, Any] = json.loads(data[8 : 8 + length])
    return entries
