"""The file from which interrupted training goes on: plain tensors, numbers and strings.

It is replaced as a whole after each epoch, so an interruption leaves the last one intact. All
randomness is derived from (seed, epoch), so no generator's state needs to be kept.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tiedconv.errors import CheckpointError, OutputError, UserError
from tiedconv.training.config import TrainConfig

FILE_NAME = "last.pt"
FORMAT = "tiedconv-training-1"

# These change how fast the run is or how much it tells, not what it computes.
_FREE_TO_CHANGE = ("workers",)


def prepare_folder(folder: Path) -> Path:
    """Makes the checkpoint folder and returns the file's path.

    Raises:
        OutputError: it can't be made or written to; told before the work, not after.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise OutputError(
            f"The checkpoint folder {folder} can't be written to",
            remedy="Choose another folder or change its permissions",
        )
    return folder / FILE_NAME


def identity_of(config: TrainConfig, images: int, val_images: int, teacher: bool) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE_TO_CHANGE}
    return {
        **fields,
        "training images": images,
        "validation images": val_images,
        "teacher": teacher,
    }


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes the state beside `path` and then renames it into place.

    Raises:
        OutputError: the disk is full or not writable; the previous file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save({"format": FORMAT, **state}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as RuntimeError
        raise OutputError(
            f"The checkpoint {path} can't be written: {str(error).splitlines()[0]}",
            "The previous one is kept",
            "Free some space or choose another folder, then resume",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Reads a state and checks that it belongs to this run. No code in the file is run.

    Raises:
        CheckpointError: a damaged file, or one of something else.
        UserError: it was made with other options or data; the message names them.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _foreign(path) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _foreign(path)
    saved: dict[str, Any] = state["identity"]
    names = [name for name in {**saved, **identity} if saved.get(name) != identity.get(name)]
    if names:
        changes = ", ".join(f"{name} {saved.get(name)} -> {identity.get(name)}" for name in names)
        raise UserError(
            f"The checkpoint {path} is of a different run: {changes}",
            "Going on would mix the two",
            "Use the same options and data, or start anew without --resume",
        )
    return state


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, or not a training checkpoint",
        "Training can't go on from it",
        "Start anew without --resume",
    )
