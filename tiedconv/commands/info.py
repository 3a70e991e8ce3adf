"""The verb `info`: versions, optional packages and devices, as a bug report needs them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from tiedconv.version import __version__

NAME = "tiedconv"


@dataclass(frozen=True)
class Info:
    """What is installed here.

    Args:
        versions: of tiedconv, Python and the packages that it needs, by name.
        extras: for each extra of tiedconv the versions of its packages; None for one that is
            missing.
        system: the operating system and processor.
        threads: that torch computes with.
        devices: names of the accelerators, empty without any.
    """

    versions: dict[str, str]
    extras: dict[str, dict[str, str | None]]
    system: str
    threads: int
    devices: tuple[str, ...]


def info() -> Info:
    """Versions, optional packages and devices."""
    needed, extras = _requirements()
    versions = {NAME: __version__, "python": platform.python_version()}
    versions |= {name: _version(name) or "missing" for name in needed}
    return Info(
        versions,
        {extra: {name: _version(name) for name in names} for extra, names in extras.items()},
        f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs",
        torch.get_num_threads(),
        _devices(),
    )


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Names of the packages needed, and of those of each extra, as the installed package says."""
    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    try:
        lines = importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:  # used from a checkout, not installed
        lines = ["torch", "torchvision"]
    for line in lines:
        spec, _, condition = line.partition(";")
        name = spec.split("[")[0].strip()
        for sign in "<>=!~ ":
            name = name.split(sign)[0]
        extra = condition.partition("extra ==")[2].strip(" \"'")
        if not extra:
            needed.append(name)
        elif name != NAME and extra != "dev":
            extras.setdefault(extra, []).append(name)
    return needed, extras


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[str, ...]:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return tuple(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count))
    return ("mps",) if torch.backends.mps.is_available() else ()
