"""Tied models in other libraries, registered when these are imported."""

from __future__ import annotations

import sys

from torch import nn


def let_others_save(model: nn.Module) -> None:
    """Let the library that a tied model's class comes from save it by its own methods.

    Args:
        model: tied. Where its library has no such way, it stays as it is.
    """
    if "transformers" in sys.modules:
        from tiedconv.integrations.hf_quantizer import attach

        attach(model)
