"""Constants that are stored as they are used, because that takes fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tiedconv.exporters._onnx_lower import dense_graph

ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")


class Positions(nn.Module):
    """Patches and a table of positions, resized to their number, as DINOv2 has it."""

    def __init__(self, table: int, *, shared: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 1 + table * table, 4))
        self.side, self.shared = table, shared

    def forward(self, images: Tensor) -> Tensor:
        """Features `(n, 1 + patches, 4)`."""
        x = self.patches(images)
        grid = self.positions[:, 1:].reshape(1, self.side, self.side, 4).permute(0, 3, 1, 2)
        grid = interpolate(grid, size=tuple(x.shape[-2:]), mode="bicubic")
        resized = grid.permute(0, 2, 3, 1).flatten(1, 2)
        first = self.positions[:, :1]
        x = x.flatten(2).transpose(1, 2) + resized
        x = torch.cat([first.expand(x.shape[0], 1, 4), x], 1)
        return x * self.positions.mean() if self.shared else x


def _stored(model: nn.Module) -> tuple[Any, dict[str, np.ndarray]]:
    graph = dense_graph(model.eval(), {"images": torch.randn(2, 3, 16, 16)})
    held = {n: v.const_value for n, v in graph.graph.initializers.items()}
    return graph, {n: t.numpy() for n, t in held.items() if t is not None and t.nbytes > 32}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("table", [9, 2])
def test_a_table_is_stored_as_it_is_used_where_that_is_smaller(
    table: int, shared: bool, tmp_path: Path
) -> None:
    """16 patches: smaller than a table of 9 x 9, larger than one of 2 x 2."""
    torch.manual_seed(0)
    model = Positions(table, shared=shared)
    graph, stored = _stored(model)
    assert ("positions" in stored) == (table == 2)
    sizes = sorted(array.size for name, array in stored.items() if name.startswith("positions"))
    # The mean of the table is one number, and too small to be listed.
    assert sizes == ([4 * (1 + 4)] if table == 2 else [4 * 16])
    ir.save(graph, tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 16, 16)
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images).numpy(), atol=1e-5)


def test_a_table_that_is_also_used_whole_stays() -> None:
    class Both(Positions):
        def forward(self, images: Tensor) -> Tensor:
            x = super().forward(images)
            return x + (self.positions * images.mean()).sum()

    stored = _stored(Both(9))[1]
    assert "positions" in stored


def test_without_onnx_runtime_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiedconv.exporters import _onnx_fold

    monkeypatch.setattr(_onnx_fold.importlib.util, "find_spec", lambda name: None)
    assert "positions" in _stored(Positions(9))[1]
