"""The folder beside an output from which an interrupted run can resume.

Each file is written atomically; temporary files of killed processes are removed with the rest.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiedconv.errors import OutputError, UserError
from tiedconv.io.atomic import require_file_name, stale_temp_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"
STATES = "step-*.safetensors"
"""Names of the states of a training."""
OLD_STATES = "step-*.pt"
"""Names of the states of older versions, which are pickles and are not read."""
FIT = "fit.safetensors"
"""Name of the compact file that a calibration starts from, here or in a numbered folder for each
of several."""
CALIBRATION = "calibration.safetensors"
"""Name of the state of that calibration, beside it."""
CURVE = "curve.json"
"""Name of the points of the training's plot, beside its states."""

_KEPT = (STATES, OLD_STATES, FIT, f"*/{FIT}", CALIBRATION, f"*/{CALIBRATION}")


@dataclass(frozen=True)
class RunDir:
    """Such a folder, whether it exists or not; other files in it are never touched."""

    path: Path

    @classmethod
    def beside(cls, output: Path) -> RunDir:
        """The folder of the run that writes this file.

        Raises:
            OutputError: the output is not the name of a file.
        """
        require_file_name(output)
        return cls(output.with_name(output.name + ".run"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, no other process may work in this folder; a killed one leaves no lock.

        Raises:
            UserError: another process does (`run-in-progress`).
            OutputError: the folder can't be made.
        """
        if fcntl is None:  # Windows
            yield
            return
        path = self.path / _LOCK
        try:
            self.path.mkdir(exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise OutputError(
                f"The folder {self.path} can't be written to ({error.strerror})",
                hint="Choose another output, or change its permissions",
                code="folder-not-writable",
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise _in_progress(self.path, file.read(200)) from None
            except OSError:  # a file system without locks
                pass
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    self.path.rmdir()

    def kept(self) -> list[Path]:
        """The files that a run can resume from, oldest state first."""
        return sorted(file for pattern in _KEPT for file in self.path.glob(pattern))

    def require_new(self) -> None:
        """Raises UserError where an interrupted run left files: two runs must not mix."""
        if kept := self.kept():
            raise UserError(
                f"{self.path} holds an interrupted run ({kept[-1].relative_to(self.path)})",
                "A new run would overwrite it",
                "Pass --resume to continue or --force to restart",
                code="run-interrupted",
            )

    def require_readable(self) -> None:
        """Raises UserError for states of an older version: they are pickles, which are not read."""
        if old := sorted(self.path.glob(OLD_STATES)):
            raise UserError(
                f"{old[-1]} was written by an older tiedconv",
                "It can't be resumed from, and states of two versions must not mix",
                "Start again with --force, or resume with the version that wrote it",
                code="state-of-older-version",
            )

    def part(self, index: int, count: int) -> Path:
        """The folder of one of several fits; that of a single one is this folder."""
        return self.path if count == 1 else self.path / str(index)

    def require_fits(self, count: int) -> None:
        """Raises UserError where the files are not of a calibration of this number of fits."""
        parts = [self.part(i, count) for i in range(count)]
        wanted = {part / name for part in parts for name in (FIT, CALIBRATION)}
        if odd := [file for file in self.kept() if file not in wanted]:
            raise UserError(
                f"{odd[0]} is of a different calibration, of other schemes or options",
                "Resuming would leave it behind",
                "Use the same model, options and images, or restart by --force without --resume",
                code="state-of-other-run",
            )

    def tidy(self) -> None:
        """Remove temporary files of killed processes; no other may be running."""
        for pattern in (*_KEPT, CURVE):
            for file in stale_temp_files(self.path, pattern):
                file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the files of runs, and the folder if nothing else is in it."""
        for file in [*self.kept(), self.path / CURVE]:
            file.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Remove the folder if it is empty, as before the first state."""
        self.tidy()
        with contextlib.suppress(OSError):  # not empty
            for folder in self.path.glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            self.path.rmdir()


def _in_progress(folder: Path, who: str) -> UserError:
    return UserError(
        f"Another run is running in {folder} ({who.strip() or 'its process is not known'})",
        "Two runs would overwrite each other's states and results",
        "Wait until it has ended, stop it, or choose another output",
        code="run-in-progress",
    )
