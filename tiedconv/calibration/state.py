"""The file from which an interrupted calibration goes on: tensors, and plain data as metadata.

All randomness is derived from (seed, pass, span), so no generator's state needs to be kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tiedconv.calibration.config import CalibConfig
from tiedconv.errors import CheckpointError, UserError
from tiedconv.files import replacing, save_tensors
from tiedconv.plan import Plan
from tiedconv.run_folder import CALIBRATION
from tiedconv.training.state import prepare_folder

FORMAT = "tiedconv-calibration-1"

# This changes where things are kept, not what is computed.
_FREE_TO_CHANGE = ("cache_bytes",)


def checkpoint_path(folder: Path) -> Path:
    """The checkpoint in a folder, which is made.

    Raises:
        OutputError: it can't be made or written to.
    """
    prepare_folder(folder)
    return folder / CALIBRATION


def identity_of(config: CalibConfig, plan: Plan, images: int) -> dict[str, Any]:
    """What must be the same for a calibration to be continued."""
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE_TO_CHANGE}
    text = json.dumps(plan.to_json(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**fields, "plan": digest, "images": images}


def save_state(
    path: Path, model: nn.Module, identity: dict[str, Any], progress: dict[str, Any]
) -> None:
    """Writes the model's tensors and the progress; the file is replaced as a whole.

    Raises:
        OutputError: the disk is full or not writable; the previous file stays.
    """
    # Each a copy: safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    text = json.dumps({"identity": identity, "progress": progress})
    with replacing(path, force=True) as part:
        save_tensors(tensors, part, {"format": FORMAT, "state": text})


def load_state(path: Path, model: nn.Module, identity: dict[str, Any]) -> dict[str, Any]:
    """Loads the model's tensors and returns the progress.

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
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise foreign(path) from error
    if metadata.get("format") != FORMAT:
        raise foreign(path)
    names = [name for name in {**saved, **identity} if saved.get(name) != identity.get(name)]
    if names:
        changes = ", ".join(f"{name} {saved.get(name)} -> {identity.get(name)}" for name in names)
        raise UserError(
            f"The checkpoint {path} is of a different calibration: {changes}",
            "Going on would mix the two",
            "Use the same model, options and images, or start anew without resume",
        )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise foreign(path) from error
    return progress


def foreign(path: Path) -> CheckpointError:
    """The error for a file that is no such checkpoint."""
    return CheckpointError(
        f"{path} is damaged, or not a calibration checkpoint of this model",
        "The calibration can't go on from it",
        "Start anew without resume",
    )
