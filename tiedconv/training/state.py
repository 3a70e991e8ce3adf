"""The checkpoints from which interrupted training resumes; the newest few are kept.

All randomness is derived from (seed, step), so no generator's state needs to be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiedconv.errors import CheckpointError, OutputError
from tiedconv.io.run_dir import STATES, RunDir
from tiedconv.io.run_state import prepare_folder, read_state, require_same, write_state
from tiedconv.training.config import TrainConfig

KIND = "training"

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
            OutputError: it can't be made or written to; raised before the work, not after.
            UserError: it has states of a run that is not resumed, or of an older version.
        """
        prepare_folder(self.path)
        folder = RunDir(self.path)
        if not resume:
            folder.require_new()
        folder.require_readable()
        folder.tidy()

    def files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.path.glob(STATES))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after a number of steps; the oldest beyond `keep` are deleted.

        Raises:
            OutputError: the disk is full or not writable; earlier files stay.
        """
        path = self.path / STATES.replace("*", f"{step:09d}")
        try:
            write_state(path, KIND, state)
        except OutputError as error:
            kept = self.files()
            raise OutputError(
                f"The checkpoint {error.what}",
                f"The last complete one is {kept[-1]}" if kept else "There is none before it",
                "Free some space, then continue with --resume",
                code=error.code,
            ) from None
        for old in self.files()[: -self.keep]:
            with contextlib.suppress(OSError):
                old.unlink()
        return path

    def batch_size(self) -> int | None:
        """That of the newest sound state; None where there is none."""
        for path in reversed(self.files()):
            with contextlib.suppress(CheckpointError):
                return int(read_state(path, KIND)["identity"]["batch_size"])
        return None

    def load(self, identity: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """The newest sound state and its file; None where there is no file.

        Raises:
            CheckpointError: all files are damaged.
            UserError: it was made with other options or data; the message names them.
        """
        files = self.files()
        for path in reversed(files):
            try:
                state = read_state(path, KIND)
            except CheckpointError:
                if path == files[0]:
                    raise
                continue
            require_same(path, state["identity"], identity)
            return path, state
        return None


def identity_of(
    config: TrainConfig,
    images: int,
    val_images: int,
    teacher: bool,
    labelled: bool,
    made_of: Mapping[str, str],
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    fields = {name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE}
    return {
        **fields,
        "training images": images,
        "validation images": val_images,
        "teacher": teacher,
        "labels": labelled,
        **made_of,
    }
