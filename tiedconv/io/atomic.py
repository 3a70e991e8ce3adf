"""Writing files atomically: readers see the complete old file or the complete new one.

A file is written under a temporary name beside its place, synced to disk and renamed; then the
folder is synced, so that the new name survives a power failure too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath

from tiedconv.errors import OutputError


def check_output(path: Path, *, force: bool = False, option: str = "-o") -> None:
    """Raise OutputError, before any work, if `path` can't be written.

    Args:
        path: of the output file.
        force: an existing file may be replaced.
        option: of the command, which sets the output.
    """
    _check_place(path, force, option)
    try:
        handle, probe = tempfile.mkstemp(dir=path.parent, prefix=_hidden(path))
    except OSError as error:
        raise OutputError(
            f"{path.parent} can't be written to ({error.strerror})",
            "Nothing was written",
            f"Choose another folder with {option}, or change its permissions",
            code="folder-not-writable",
        ) from None
    try:
        os.close(handle)
    finally:
        os.unlink(probe)


@contextlib.contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that is moved there if the block ends without error.

    Several writers at once have a temporary file each: the last to end wins, and without `force`
    the first.

    Raises:
        OutputError: `path` can't be written; the disk is full. A previous file is unchanged.
    """
    _check_place(path, force)
    # The name is known before the file exists, so that an interrupt at any time removes it.
    temp = path.with_name(f"{_hidden(path)}{secrets.token_hex(8)}.part")
    _temp_files.add((os.getpid(), temp))
    try:
        # Not by mkstemp, whose files only their owner may read; results are ordinary files.
        os.close(os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temp
        sync_file(temp)
        _move(temp, path, force)
        sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        temp.unlink(missing_ok=True)
        _temp_files.discard((os.getpid(), temp))


@contextlib.contextmanager
def replacing_files(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder whose files are moved beside `output` if the block ends without error.

    The file with the name of `output` is moved last, so that it never exists without the others.

    Raises:
        OutputError: the files can't be written.
    """
    check_output(output, force=force)
    try:
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        try:
            yield folder
            for file in sorted(folder.iterdir(), key=lambda f: f.name == output.name):
                if file.name != output.name:
                    check_output(output.parent / file.name, force=force)
                sync_file(file)
                os.replace(file, output.parent / file.name)
            sync_folder(output.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise _not_written(output, error) from None


def sync_file(path: Path) -> None:
    """Have the system write a file's bytes to disk now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the system write a folder's names to disk now, where folders can be synced."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError:  # Windows does not open folders
        return
    try:
        with contextlib.suppress(OSError):  # some file systems do not sync folders
            os.fsync(folder)
    finally:
        os.close(folder)


def stale_temp_files(folder: Path, pattern: str) -> Iterator[Path]:
    """Temporary files of writers of files of such names, which still run or were killed."""
    files = PurePath(pattern)
    return folder.glob(str(files.with_name(f"{_hidden(files)}*.part")))


# Removed at exit: an interrupt may come at the moment when Python enters or leaves the block.
_temp_files: set[tuple[int, Path]] = set()


@atexit.register
def _remove_temp_files() -> None:
    for process, temp in _temp_files:
        if process == os.getpid():  # a forked process ends while its parent still writes
            temp.unlink(missing_ok=True)


def _check_place(path: Path, force: bool, option: str = "-o") -> None:
    parent = path.parent
    require_file_name(path, option)
    if path.is_dir():
        raise OutputError(
            f"{path} is a folder",
            hint="Name a file, such as model.safetensors",
            code="output-is-folder",
        )
    if not parent.is_dir():
        raise OutputError(
            f"The folder {parent} does not exist",
            "Nothing can be written there",
            f"Create it, or choose another with {option}",
            code="output-folder-missing",
        )
    if path.exists() and not force:
        raise _exists(path)


def require_file_name(path: Path, option: str = "-o") -> None:
    """Refuse `.`, `/` and the like.

    Raises:
        OutputError: the path has no last part (`output-is-folder`).
    """
    if not path.name:
        raise OutputError(
            f"{str(path)!r} is not the name of a file",
            "Nothing can be written there",
            f"Name a file, such as {option} model.safetensors",
            code="output-is-folder",
        )


def _move(temp: Path, path: Path, force: bool) -> None:
    if not force:
        try:
            os.link(temp, path)  # unlike a rename, it fails if another writer was faster
        except FileExistsError:
            raise _exists(path) from None
        except OSError:  # a file system without links
            if path.exists():
                raise _exists(path) from None
        else:
            return
    os.replace(temp, path)


def _hidden(path: PurePath) -> str:
    return f".{path.name[:100]}."


def _exists(path: Path) -> OutputError:
    return OutputError(
        f"{path} exists already",
        "It was left unchanged",
        "Pass --force to replace it",
        code="output-exists",
    )


def _not_written(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} can't be written ({error.strerror or error})",
        "A previous file of that name is unchanged",
        "Free some space, or choose another place with -o",
        code="output-not-written",
    )
