"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from tiedconv.errors import OutputError


def check_output(path: Path, *, force: bool = False) -> None:
    """Raise OutputError, before any work, if `path` can't be written.

    Args:
        path: the file to be.
        force: an existing file may be replaced.
    """
    parent = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder", remedy="Name a file, such as model.safetensors")
    if not parent.is_dir():
        raise OutputError(
            f"The folder {parent} does not exist",
            "Nothing can be written there",
            "Create it, or choose another with -o",
        )
    if path.exists() and not force:
        raise OutputError(
            f"{path} exists already", "It was left as it is", "Pass --force to replace it"
        )
    try:
        handle, probe = tempfile.mkstemp(dir=parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(
            f"{parent} can't be written to ({error.strerror})",
            "Nothing was written",
            "Choose another folder with -o, or change its permissions",
        ) from None
    os.close(handle)
    os.unlink(probe)


@contextlib.contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends without error.

    Raises:
        OutputError: `path` can't be written; the disk is full. What stood there stays.
    """
    check_output(path, force=force)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # mkstemp's files are private; results are ordinary files
        os.replace(part, path)
    except (OSError, SafetensorError) as error:  # safetensors tells a full disk in its own way
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"{path} can't be written ({reason})",
            "What stood there before is untouched",
            "Free some space, or choose another place with -o",
        ) from None
    finally:
        part.unlink(missing_ok=True)
