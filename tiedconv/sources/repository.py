"""Compact files in repositories of the Hugging Face hub: `hub:USER/NAME`, or with `@REVISION`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tiedconv.errors import CheckpointError, MissingExtra, OutputError, first_line

PREFIX = "hub:"
FILE = "tiedconv.safetensors"
"""The compact file's name in a repository."""

_FORM = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_repository(what: object) -> bool:
    """Whether a user's words name a repository."""
    return isinstance(what, str) and what.startswith(PREFIX)


def local(what: str | Path) -> str | Path:
    """A file of this machine: that of a repository, fetched, or what was named."""
    return fetched(str(what)) if is_repository(what) else what


def fetched(what: str) -> Path:
    """The compact file of a repository, fetched or from the local cache.

    Args:
        what: `hub:USER/NAME`, or `hub:USER/NAME@REVISION`.

    Raises:
        CheckpointError: there is no such repository or file, or it can't be reached.
        MissingExtra: huggingface_hub is not installed.
    """
    found = _FORM.fullmatch(what)
    if found is None:
        raise CheckpointError(
            f"{what} is no repository", hint="Write it as hub:USER/NAME", code="repository-invalid"
        )
    hub = _hub()
    try:
        path = hub.hf_hub_download(found[1], FILE, revision=found[2])
    except Exception as error:  # the client raises errors of many libraries
        raise CheckpointError(
            f"{what} can't be fetched ({type(error).__name__}: {first_line(error)})",
            "There is no file to read",
            f"Check the name, that it holds {FILE}, and the connection",
            code="repository-unreadable",
        ) from error
    return Path(path)


def push(file: Path, repository: str, card: str, *, private: bool = False) -> str:
    """Upload a compact file and its card in one commit; the repository is made if it is new.

    Args:
        file: the compact file.
        repository: `USER/NAME`.
        card: in Markdown.
        private: of a new repository.

    Returns:
        the address of the commit.

    Raises:
        OutputError: the hub refuses it, or can't be reached (`push-failed`).
        MissingExtra: huggingface_hub is not installed.
    """
    hub = _hub()
    operations = [
        hub.CommitOperationAdd(FILE, str(file)),
        hub.CommitOperationAdd("README.md", card.encode()),
    ]
    try:
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message="Upload with tiedconv")
    except Exception as error:  # the client raises errors of many libraries
        raise OutputError(
            f"{repository} can't be written ({type(error).__name__}: {first_line(error)})",
            "Nothing was uploaded, or not all of it",
            "Log in with `hf auth login`, check the name and the connection",
            code="push-failed",
        ) from error
    return str(getattr(done, "commit_url", done))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtra.of("huggingface_hub", "hf", "The hub") from error
    return huggingface_hub
