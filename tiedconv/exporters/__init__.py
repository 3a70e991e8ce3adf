"""Formats that a compact model can be exported to.

Each file of this folder whose name does not begin with an underscore holds one `FORMAT`. A new
format is one new file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path

from tiedconv.errors import UserError
from tiedconv.exporters._format import DTYPES, LOWERINGS, Format, Job, Written

__all__ = ["DTYPES", "LOWERINGS", "Format", "Job", "Written", "all_formats", "choose_format"]


_LITERT = (
    ". LiteRT's converter computes the transpose of a tied matrix ahead of time and stores both, "
    "so the file would not be compact; executorch runs on the same devices (docs/edge.md)"
)
_TENSORRT = ". TensorRT builds its engine from an ONNX file: export to onnx (docs/edge.md)"
INSTEAD = {
    **dict.fromkeys(("tflite", "litert"), _LITERT),
    **dict.fromkeys(("tensorrt", "trt"), _TENSORRT),
    **dict.fromkeys(("mlmodel", "mlpackage", "core-ml"), ". Core ML's packages are coreml here"),
    "torchscript": ". torch replaced it by exported programs: pt2",
}
"""Why a format that users ask for is not among `all_formats`, and what to do instead."""


@functools.cache
def all_formats() -> dict[str, Format]:
    """Every format of the folder, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    formats = [importlib.import_module(f"{__name__}.{name}").FORMAT for name in names]
    return {one.name: one for one in formats}


def choose_format(name: str | None, output: Path, dtype: str) -> Format:
    """The format of this name, or the one of the output's extension.

    Raises:
        UserError: unknown format, or one without this extension or dtype.
    """
    formats = all_formats()
    if name is not None and name not in formats:
        raise UserError(
            f"Unknown export format {name!r}{INSTEAD.get(name.lower(), '')}",
            hint=f"Use one of: {', '.join(formats)}",
            code="unknown-format",
        )
    fitting = [f for f in formats.values() if output.suffix in f.endings]
    if name is None and not fitting:
        endings = sorted({ending for f in formats.values() for ending in f.endings})
        raise UserError(
            f"{output.name} has no extension of a known format",
            hint=f"Name the format with --to, or end the file name in one of: {', '.join(endings)}",
            code="format-not-named",
        )
    # `dense` shares its extension with `compact`, which must be named.
    found = formats[name] if name else next((f for f in fitting if f.name == "dense"), fitting[0])
    if output.suffix not in found.endings:
        raise UserError(
            f"{output.name} does not have the extension of the format {found.name}",
            hint=f"End it in {' or '.join(found.endings)}",
            code="extension-mismatch",
        )
    if dtype not in found.dtypes:
        raise UserError(
            f"The format {found.name} does not store {dtype}",
            hint=f"It stores {', '.join(found.dtypes)}",
            code="dtype-unsupported",
        )
    return found
