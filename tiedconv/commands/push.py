"""The verb `push`: a compact file and its card to a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from tiedconv.commands.card import card
from tiedconv.sources import repository as hub


def push(file: str | Path, repository: str, *, license: str = "", private: bool = False) -> str:
    """Upload a compact file, with a model card written from what it records.

    `tiedconv.load("hub:USER/NAME")` loads it from there.

    Args:
        file: a compact file.
        repository: `USER/NAME`; made if it is new.
        license: of the original, as the hub names it, such as `apache-2.0`.
        private: of a new repository.

    Returns:
        the address of the commit.

    Raises:
        CheckpointError: the file is missing, damaged or not tiedconv's; nothing is uploaded.
        OutputError: the hub refuses it, or can't be reached.
    """
    text = card(file, repository=repository, license=license)
    return hub.push(Path(file), repository, text, private=private)
