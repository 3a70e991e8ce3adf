"""The folder beside an output where an interrupted run keeps what it can go on from.

Each file is written beside its place and then renamed, so it is whole or not there; what a process
that was killed was writing then goes with the rest.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from tiedconv.errors import UserError
from tiedconv.io.atomic import stale_temp_files

STATES = "step-*.pt"
"""Names of the states of a training."""
FIT = "fit.safetensors"
"""Name of the compact file that a calibration begins with, here or in a numbered folder for each
of several."""
CALIBRATION = "calibration.safetensors"
"""Name of what a calibration has fitted of it, beside it."""
CURVE = "curve.json"
"""What those who watch a training keep beside its states."""

_KEPT = (STATES, FIT, f"*/{FIT}", CALIBRATION, f"*/{CALIBRATION}")


@dataclass(frozen=True)
class RunDir:
    """Such a folder, be it there or not; files of others in it are never touched."""

    path: Path

    @classmethod
    def beside(cls, output: Path) -> RunDir:
        """The one of the run that makes this file."""
        return cls(output.with_name(output.name + ".run"))

    def kept(self) -> list[Path]:
        """What a run can go on from, oldest state first."""
        return sorted(file for pattern in _KEPT for file in self.path.glob(pattern))

    def require_new(self) -> None:
        """Raises UserError where a run has left something: what is kept of two must not mix."""
        if kept := self.kept():
            raise UserError(
                f"{self.path} holds an interrupted run ({kept[-1].relative_to(self.path)})",
                "A new one would take its place",
                "Go on with it by --resume, or begin anew with --force",
            )

    def part(self, index: int, count: int) -> Path:
        """Where one of several fits has its files; a single one has them here."""
        return self.path if count == 1 else self.path / str(index)

    def require_fits(self, count: int) -> None:
        """Raises UserError where what is kept is not of a calibration of so many fits."""
        parts = [self.part(i, count) for i in range(count)]
        wanted = {part / name for part in parts for name in (FIT, CALIBRATION)}
        if odd := [file for file in self.kept() if file not in wanted]:
            raise UserError(
                f"{odd[0]} is of a different calibration, of other schemes or options",
                "Going on would leave it behind",
                "Use the same model, options and images, or begin anew: --force, without --resume",
            )

    def tidy(self) -> None:
        """Remove what processes that were killed were writing; no other may run by now."""
        for pattern in (*_KEPT, CURVE):
            for file in stale_temp_files(self.path, pattern):
                file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what runs keep, and the folder if nothing else is in it."""
        for file in [*self.kept(), self.path / CURVE]:
            file.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Remove the folder if nothing is in it, as where nothing was worth keeping yet."""
        self.tidy()
        with contextlib.suppress(OSError):  # not empty
            for folder in self.path.glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            self.path.rmdir()
