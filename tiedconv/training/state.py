"""The files from which interrupted training goes on: plain tensors, numbers and strings.

Each is whole or not there at all; the newest few are kept. All randomness is
derived from (seed, step), so no generator's state needs to be kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiedconv.errors import CheckpointError, OutputError, UserError
from tiedconv.io.atomic import replacing
from tiedconv.io.run_dir import STATES, RunDir
from tiedconv.training.config import TrainConfig

FORMAT = "tiedconv-training-4"

FREE_TO_CHANGE = ("workers", "checkpoint_minutes", "keep")
"""Options that change how fast a run is, or how much it keeps, not what it computes."""


@dataclass(frozen=True)
class StateFolder:
    """A folder of checkpoints.

    Args:
        path: of the folder.
        keep: how many of them stay.
    """

    path: Path
    keep: int = 2

    def prepare(self, *, resume: bool) -> None:
        """Make the folder.

        Raises:
            OutputError: it can't be made or written to; told before the work, not after.
            UserError: it has states of a run that isn't to be gone on with.
        """
        prepare_folder(self.path)
        folder = RunDir(self.path)
        if not resume:
            folder.require_new()
        folder.tidy()

    def files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.path.glob(STATES))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after so many steps; the oldest beyond `keep` go.

        Raises:
            OutputError: the disk is full or not writable; the files of before stay.
        """
        path = self.path / f"step-{step:09d}.pt"
        try:
            with replacing(path, force=True) as part:
                _write({"format": FORMAT, **state}, part)
        except OutputError as error:
            kept = self.files()
            raise OutputError(
                f"The checkpoint {error.what}",
                f"The last one is whole: {kept[-1]}" if kept else "There is none before it",
                "Free some space, then go on with --resume",
            ) from None
        for old in self.files()[: -self.keep]:
            with contextlib.suppress(OSError):
                old.unlink()
        return path

    def batch_size(self) -> int | None:
        """That of the newest state that is whole; None where there is none."""
        for path in reversed(self.files()):
            with contextlib.suppress(CheckpointError):
                return int(_read(path)["identity"]["batch_size"])
        return None

    def load(self, identity: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """The newest state that is whole, and its file; None where there is no file.

        Raises:
            CheckpointError: none of the files is whole.
            UserError: it was made with other options or data; the message names them.
        """
        files = self.files()
        for path in reversed(files):
            try:
                state = _read(path)
            except CheckpointError:
                if path == files[0]:
                    raise
                continue
            require_same(path, state["identity"], identity)
            return path, state
        return None


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
        )


def identity_of(
    config: TrainConfig,
    images: int,
    val_images: int,
    teacher: bool,
    labelled: bool,
    made_of: Mapping[str, str],
) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    fields = {name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE}
    return {
        **fields,
        "training images": images,
        "validation images": val_images,
        "teacher": teacher,
        "labels": labelled,
        **made_of,
    }


def _write(state: dict[str, Any], path: Path) -> None:
    """Raises OSError for a full disk, which torch tells in its own way."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error


def _read(path: Path) -> dict[str, Any]:
    """A state. No code in the file is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _foreign(path) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _foreign(path)
    return state


def weights_digest(model: nn.Module | None) -> str:
    """Of the first few numbers of each tensor: it tells models apart, and takes no time."""
    if model is None:
        return "none"
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        some = tensor.detach().flatten()[:64].double().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:12]


def require_same(
    path: Path, saved: Mapping[str, Any], identity: Mapping[str, Any], what: str = "run"
) -> None:
    """Raises UserError where a state is of something else; says what differs."""
    names = [name for name in {**saved, **identity} if saved.get(name) != identity.get(name)]
    if names:
        changes = ", ".join(f"{name} {saved.get(name)} -> {identity.get(name)}" for name in names)
        raise UserError(
            f"The checkpoint {path} is of a different {what}: {changes}",
            "Going on would mix the two",
            "Use the same model, options and images, or begin anew: --force, without --resume",
        )


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, or not a training checkpoint",
        "Training can't go on from it",
        "Begin anew: --force, without --resume",
    )
