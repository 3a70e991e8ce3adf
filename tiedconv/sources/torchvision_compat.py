"""Imports torchvision where its compiled operators can't be loaded.

The torchvision wheel on PyPI is built for CUDA. Beside a CPU-only torch its C++ extension does
not load; torchvision survives that, until it registers Python code for the operators
`torchvision::nms` and `torchvision::qnms`, which the extension would have declared. The import
then fails with "operator torchvision::nms does not exist", although no classifier needs either.
Declaring the two operators, without an implementation, is all that is missing.

timm and transformers import torchvision themselves, so call `import_torchvision` before them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from tiedconv.errors import SourceError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# A library takes its definitions back when it is collected, so it lives as long as the process.
_declared: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """The module torchvision, with the operators that its import needs declared if necessary.

    Raises:
        SourceError: torchvision is missing or does not work with the installed torch.
    """
    try:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            # Only after a plain import has failed: where the extension loads, it declares the
            # operators in C++, and a second declaration would break a sound installation.
            if "torchvision::nms does not exist" not in str(error):
                raise
            _forget_half_imported()
            _declare_operators()
            return importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        raise SourceError(
            f"torchvision can't be imported ({error})",
            "Models can't be built without it",
            f"Install the torchvision release that matches torch {torch.__version__}",
            code="torchvision-not-imported",
        ) from error


def _forget_half_imported() -> None:
    # The failed import leaves submodules behind. A second import would find them, and then not
    # set them as attributes of the new parent module.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]


def _declare_operators() -> None:
    global _declared
    if _declared is None:
        _declared = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            _declared.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
