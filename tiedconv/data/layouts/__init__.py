"""The ways in which images may be stored.

Each file of this folder that does not begin with an underscore holds one `LAYOUT`. A new way is
one new file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from tiedconv.data.layouts._base import VAL_NAMES, Layout, Parts

__all__ = ["VAL_NAMES", "Layout", "Parts", "all_layouts", "layout_of"]


@functools.cache
def all_layouts() -> dict[str, Layout]:
    """Every layout of the folder, by name; the one that takes all the rest comes last."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}").LAYOUT for name in names]
    return {made.name: made for made in sorted(found, key=lambda layout: layout.last)}


def layout_of(spec: str) -> Layout:
    """The layout that a user's words mean."""
    return next(layout for layout in all_layouts().values() if layout.takes(spec))
