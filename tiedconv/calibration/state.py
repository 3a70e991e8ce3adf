"""The file from which an interrupted calibration goes on: tensors, and plain data as metadata.

All randomness is derived from (seed, pass, span), so no generator's state needs to be kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tiedconv.calibration.config import CalibConfig
from tiedconv.core.plan import Plan
from tiedconv.errors import CheckpointError
from tiedconv.io.atomic import replacing
from tiedconv.io.checkpoint import tensor_hash
from tiedconv.io.run_dir import CALIBRATION
from tiedconv.io.safetensors_file import save_tensors
from tiedconv.training.state import prepare_folder, require_same, weights_digest

FORMAT = "tiedconv-calibration-3"

_PIXELS = 64  # of each image, at least, by which images are told apart

_OTHERS = "midway/"  # no module has a slash in its name but those of factors: tied/

# This changes where things are kept, not what is computed.
_FREE_TO_CHANGE = ("cache_bytes",)


def checkpoint_path(folder: Path) -> Path:
    """The checkpoint in a folder, which is made.

    Raises:
        OutputError: it can't be made or written to.
    """
    prepare_folder(folder)
    return folder / CALIBRATION


def identity_of(
    config: CalibConfig, plan: Plan, teacher: nn.Module, images: Tensor
) -> dict[str, Any]:
    """What must be the same for a calibration to be continued.

    The errors of the fits are not: their last digits depend on the number of threads.
    """
    groups = [dataclasses.replace(group, error=None) for group in plan.groups]
    text = json.dumps(dataclasses.replace(plan, groups=tuple(groups)).to_json(), sort_keys=True)
    return {
        **settings_of(config),
        "plan": _short(text.encode()),
        "weights": weights_digest(teacher),
        "number of images": len(images),
        "images": digest_of(images),
    }


def settings_of(config: CalibConfig) -> dict[str, Any]:
    """The options that change what is computed."""
    return {name: value for name, value in asdict(config).items() if name not in _FREE_TO_CHANGE}


def digest_of(images: Tensor) -> str:
    """Of a few numbers of each image: it tells sets of images apart, and takes no time."""
    pixels = images.flatten(1)
    some = pixels[:, :: max(1, pixels.shape[1] // _PIXELS)].contiguous()
    return _short(some.cpu().numpy().tobytes())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def save_state(
    path: Path,
    model: nn.Module,
    identity: dict[str, Any],
    progress: dict[str, Any],
    others: Mapping[str, Tensor],
) -> None:
    """Writes the model's tensors, others and the progress; the file is replaced as a whole.

    Raises:
        OutputError: the disk is full or not writable; the previous file stays.
    """
    # Each a copy: safetensors refuses tensors that share memory.
    found = {**model.state_dict(), **{_OTHERS + name: tensor for name, tensor in others.items()}}
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in found.items()
        if isinstance(tensor, Tensor)
    }
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"identity": identity, "progress": progress, "sha256": hashes})
    with replacing(path, force=True) as part:
        save_tensors(
            tensors, part, {"format": FORMAT, "state": text, "digest": _short(text.encode())}
        )


def load_state(
    path: Path, model: nn.Module, identity: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Loads the model's tensors; returns the progress, and the other tensors by name.

    Raises:
        CheckpointError: a damaged file, or one of something else.
        UserError: it was made with other options, another model or other images.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(metadata["state"])
        saved, progress = dict(state["identity"]), dict(state["progress"])
        whole = metadata["digest"] == _short(metadata["state"].encode()) and state["sha256"] == {
            name: tensor_hash(tensor) for name, tensor in tensors.items()
        }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise foreign(path) from error
    if metadata.get("format") != FORMAT or not whole:
        raise foreign(path)
    require_same(path, saved, identity, "calibration")
    others = [name for name in tensors if name.startswith(_OTHERS)]
    found = {name.removeprefix(_OTHERS): tensors.pop(name) for name in others}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise foreign(path) from error
    return progress, found


def foreign(path: Path) -> CheckpointError:
    """The error for a file that is no such checkpoint."""
    return CheckpointError(
        f"{path} is damaged, or not a calibration checkpoint of this model",
        "The calibration can't go on from it",
        "Begin anew: --force, without --resume",
    )
