"""The checkpoint from which an interrupted calibration resumes.

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

from torch import Tensor, nn

from tiedconv.calibration.config import CalibConfig
from tiedconv.core.plan import Plan
from tiedconv.io.run_dir import CALIBRATION
from tiedconv.io.run_state import (
    foreign,
    prepare_folder,
    read_state,
    require_same,
    tensor_digest,
    weights_digest,
    write_state,
)
from tiedconv.runtime.tensors import state_tensors

KIND = "calibration"

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
    """What must be the same for a calibration to be resumed.

    The errors of the fits are not: their last digits depend on the number of threads.
    """
    groups = [dataclasses.replace(group, error=None) for group in plan.groups]
    text = json.dumps(dataclasses.replace(plan, groups=tuple(groups)).to_json(), sort_keys=True)
    return {
        **settings_of(config),
        "plan": hashlib.sha256(text.encode()).hexdigest()[:12],
        "weights": weights_digest(teacher),
        "number of images": len(images),
        "images": tensor_digest(images),
    }


def settings_of(config: CalibConfig) -> dict[str, Any]:
    """The options that change what is computed."""
    return {name: value for name, value in asdict(config).items() if name not in _FREE_TO_CHANGE}


def save_state(
    path: Path,
    model: nn.Module,
    identity: dict[str, Any],
    progress: dict[str, Any],
    others: Mapping[str, Tensor],
) -> None:
    """Writes the model's tensors, others and the progress atomically.

    Raises:
        OutputError: the disk is full or not writable; the previous file is unchanged.
    """
    tensors = {name: tensor.detach() for name, tensor in state_tensors(model).items()}
    write_state(
        path,
        KIND,
        {"identity": identity, "progress": progress, "model": tensors, "others": dict(others)},
    )


def load_state(
    path: Path, model: nn.Module, identity: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Loads the model's tensors; returns the progress, and the other tensors by name.

    Raises:
        CheckpointError: a damaged file, or not of such a calibration.
        UserError: it was made with other options, another model or other images.
    """
    state = read_state(path, KIND)
    try:
        require_same(path, state["identity"], identity, KIND)
        model.load_state_dict(state["model"])
        return dict(state["progress"]), dict(state["others"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise foreign(path, KIND) from error
