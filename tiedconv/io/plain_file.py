"""Reading small text files that somebody names: bounded, and never a pipe or a device."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import Any


def require_plain_file(path: Path) -> None:
    """Refuse what is no ordinary file: reading a pipe or a device may never end.

    Raises:
        OSError: there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, "Is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(22, "Is no ordinary file but a pipe, a socket or a device", str(path))


def read_text(path: Path, most: int) -> str:
    """The text of a file in UTF-8.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: it can't be read, is no ordinary file, or is larger.
        UnicodeDecodeError: it is not UTF-8.
    """
    require_plain_file(path)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(27, f"Is larger than {most:,} bytes", str(path))
    return data.decode("utf-8")


def read_toml(path: Path, most: int) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        OSError: as `read_text`.
        ValueError: it is not UTF-8, or not TOML.
    """
    return tomllib.loads(read_text(path, most))
