"""Formats that a compact model can be exported to.

Each file of this folder that does not begin with an underscore holds one `FORMAT`. A new format is
one new file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path

from tiedconv.errors import UserError
from tiedconv.exporters._format import DTYPES, LOWERINGS, Format, Job, Written

__all__ = ["DTYPES", "LOWERINGS", "Format", "Job", "Written", "all_formats", "choose_format"]


@functools.cache
def all_formats() -> dict[str, Format]:
    """Every format of the folder, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}").FORMAT for name in names]
    return {made.name: made for made in found}


def choose_format(name: str | None, output: Path, dtype: str) -> Format:
    """The format asked for, or the one that the output's ending says.

    Raises:
        UserError: unknown format, or one that has no such ending or numbers.
    """
    formats = all_formats()
    if name is not None and name not in formats:
        raise UserError(
            f"{name!r} is no format to export to", hint=f"Use one of: {', '.join(formats)}"
        )
    fitting = [f for f in formats.values() if output.suffix in f.endings]
    if name is None and not fitting:
        endings = sorted({ending for f in formats.values() for ending in f.endings})
        raise UserError(
            f"{output.name} has no ending that says how to write it",
            hint=f"Name the format with --to, or the file with one of: {', '.join(endings)}",
        )
    # `dense` shares its ending with `compact`, which has to be asked for.
    made = formats[name] if name else next((f for f in fitting if f.name == "dense"), fitting[0])
    if output.suffix not in made.endings:
        raise UserError(
            f"{output.name} does not end as a file of the format {made.name}",
            hint=f"End it in {' or '.join(made.endings)}",
        )
    if dtype not in made.dtypes:
        raise UserError(
            f"The format {made.name} does not store {dtype}",
            hint=f"It stores {', '.join(made.dtypes)}",
        )
    return made
