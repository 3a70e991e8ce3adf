"""What a type checker knows of the package."""

from __future__ import annotations

import pytest

SCRIPT = """
import tiedconv
from torch import nn

class Own(nn.Module):
    def forward(self, x: int) -> int:
        return x

reveal_type(tiedconv.convert(Own(), "tied", params=0.5))
reveal_type(tiedconv.convert("resnet50"))
tiedconv.convert(Own(), parms=0.5, params=[])
"""


@pytest.mark.slow
def test_convert_returns_the_class_it_was_given() -> None:
    mypy = pytest.importorskip("mypy.api")
    out, _, _ = mypy.run(["--config-file=", "--strict", "--follow-imports=silent", "-c", SCRIPT])
    own, module, wrong = [line for line in out.splitlines() if "possible" not in line.lower()][:3]
    assert own.endswith(('.Own"', '"Own"'))
    assert module.endswith('.Module"')
    assert wrong.endswith("[call-overload]")
