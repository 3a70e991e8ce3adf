"""Imports what readers of images need, once, in the process that they are forked from.

Only the fork server imports this module. It works at import time on purpose: forking after these
imports saves each reader about two seconds. A failure is left for the reader to report.
"""

from __future__ import annotations

import contextlib

import tiedconv.data  # noqa: F401  (with torch and numpy)

with contextlib.suppress(Exception):
    import PIL.Image  # noqa: F401

    from tiedconv.sources.torchvision_compat import import_torchvision

    import_torchvision()
    import torchvision.transforms.v2  # noqa: F401
