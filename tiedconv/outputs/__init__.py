"""What the outputs of a model mean, and how those of two models are compared.

Each file of this folder whose name does not begin with an underscore holds one `OUTPUT`. A new kind
of output is one new file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from torch import nn

from tiedconv.outputs._base import OutputKind
from tiedconv.outputs._imitation import Imitated, Imitation

__all__ = ["Imitated", "Imitation", "OutputKind", "all_output_kinds", "kind_of"]


@functools.cache
def all_output_kinds() -> tuple[OutputKind, ...]:
    """Every kind of the folder; the one that takes all the rest comes last."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}").OUTPUT for name in names]
    return tuple(sorted(found, key=lambda kind: kind.last))


def kind_of(output: Any, model: nn.Module) -> OutputKind:
    """The kind of output that a model returns.

    Args:
        output: what it returned.
        model: the model.

    Raises:
        UserError: there is no tensor in it (`no-tensors-returned`).
    """
    return next(kind for kind in all_output_kinds() if kind.matches(output, model))
