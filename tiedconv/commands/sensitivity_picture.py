"""The picture of the verb `sensitivity`: a heat map, layers by roles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiedconv.commands.sensitivity import Sensed, Sensitivity
from tiedconv.utils.plotting import check_picture, new_figure, write_figure

DECADES = 3
"""Costs that the colours of a picture span."""


def draw(found: Sensitivity, path: Path, *, force: bool = False) -> None:
    """A heat map, layers by roles: divergences, and what a megabyte saved costs.

    Args:
        found: from `sensitivity`.
        path: of the picture; its name says the kind: .png, .svg or .pdf.
        force: replace an existing file.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    check_picture(path, force=force)
    panels = {"predicted, nats for each image": [r.predicted for r in found.rows]}
    if any(r.measured is not None for r in found.rows):
        panels["measured, nats for each image"] = [r.measured for r in found.rows]
    panels["nats for each megabyte saved"] = [r.per_megabyte for r in found.rows]
    layers = list(dict.fromkeys(r.layer for r in found.rows))
    roles = list(dict.fromkeys(r.role for r in found.rows))
    width, height = max(2.6, 0.85 * len(roles)), max(2.0, 0.32 * len(layers))
    figure = new_figure(1.8 + len(panels) * width, 2.0 + height)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        _heat(axis, title, _grid(found.rows, values, layers, roles), roles)
    axes[0].set_yticks(range(len(layers)), _short(layers), fontsize=8)
    figure.suptitle(f"{found.model}: one matrix at a time at {found.how}", fontsize=10)
    write_figure(figure, path, force=force)


def _grid(
    rows: Sequence[Sensed], values: Sequence[float | None], layers: list[str], roles: list[str]
) -> Tensor:  # fmt: skip
    grid = torch.full((len(layers), len(roles)), torch.nan, dtype=torch.float64)
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            grid[layers.index(row.layer), roles.index(row.role)] = value
    return grid


def _heat(axis: Any, title: str, grid: Tensor, roles: Sequence[str]) -> None:
    """One panel; colours are logarithmic, as costs differ by orders of magnitude."""
    known = grid[grid > 0].log10()
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    low = max(low, high - DECADES)  # what costs less than that is all alike
    shown = (grid.log10().clamp(min=low) - low) / (high - low or 1.0)
    axis.imshow(shown.numpy(), aspect="auto", cmap="YlOrRd", vmin=0, vmax=1)
    for i, j in (~grid.isnan()).nonzero().tolist():
        colour = "white" if shown[i, j] > 0.65 else "black"
        text = f"{float(grid[i, j]):.2g}"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(roles)), roles, rotation=30, ha="right", fontsize=8)
    axis.tick_params(length=0)


def _short(layers: Sequence[str]) -> list[str]:
    """The names without a start that all share and that is long."""
    start = re.match(r"(.*\.)?", layers[0])
    head = start[0] if start else ""
    return [n.removeprefix(head) for n in layers] if len(head) > 15 else list(layers)
