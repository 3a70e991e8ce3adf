"""Runtimes in which layers are timed. Each file of this folder holds one `RUNTIME`."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from tiedconv.errors import UserError
from tiedconv.timing.runtimes._base import Run, Runtime

__all__ = ["Run", "Runtime", "all_runtimes", "choose_runtime"]


@functools.cache
def all_runtimes() -> dict[str, Runtime]:
    """Every runtime of the folder, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}").RUNTIME for name in names]
    return {one.name: one for one in found}


def choose_runtime(name: str) -> Runtime:
    """The runtime of this name, ready to run.

    Raises:
        UserError: there is none (`unknown-runtime`).
        MissingExtra: its package is not installed.
    """
    known = all_runtimes()
    if name not in known:
        raise UserError(
            f"Unknown runtime {name!r}",
            "No time was measured",
            f"Use one of: {', '.join(known)}",
            code="unknown-runtime",
        )
    known[name].check()
    return known[name]
