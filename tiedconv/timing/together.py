"""What thin layers save in a model, beside what they save alone.

A layer alone takes its input from memory and writes its output there, in the layout of the graph's
inputs; in a model a runtime keeps the layout of its own from layer to layer, and fuses what
follows. So times of layers alone add up to more than the model's, or what factors save of them is
not what they save of the model: ResNet50 in OpenVINO saves twice as much. One model of thin layers
tells.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from tiedconv.runtime.example_inputs import Arguments
from tiedconv.runtime.stopwatch import ratio_in_turn
from tiedconv.timing.runtimes import Run, Runtime
from tiedconv.timing.sites import RANKS, Site, Sites

LEAST_SAVED = 0.05
"""Of the model's time: where layers save less, noise would decide."""
ROUNDS = 21
BOUNDS = 0.1, 4.0


def saved_together(
    model: nn.Module,
    batch: Arguments,
    found: Sites,
    table: Mapping[Site, Sequence[float]],
    whole: Run,
    total: float,
    runtime: Runtime,
    folder: Path,
    threads: int,
) -> float | None:
    """What thin layers save of a model's time, over the sum of what they save alone.

    Args:
        model: plain, in evaluation mode.
        batch: its arguments.
        found: the products of its layers.
        table: nanoseconds of each: as it is, and with factors of each of its ranks.
        whole: the model, ready to run.
        total: nanoseconds that it takes.
        runtime: that both run in.
        folder: for files.
        threads: of the runtime.

    Returns:
        the ratio, within `BOUNDS`; None where it is unknown: no layers save anything alone, or
        the model doesn't run with two layers in place of one.
    """
    saved = _savings(model, found, table)
    alone = sum(saved.values())
    if alone < LEAST_SAVED * total:
        return None
    try:
        run = runtime.model(_thinned(model, found, saved), batch, folder, threads)
        run()
    except Exception:  # a model may read the weight of a layer, and finds two layers
        return None
    least, most = BOUNDS
    return min(most, max(least, (1 - ratio_in_turn(run, whole, ROUNDS)) * total / alone))


def _savings(
    model: nn.Module, found: Sites, table: Mapping[Site, Sequence[float]]
) -> dict[str, float]:
    """By layer: nanoseconds that its factors of the middle rank save, where they save any."""
    saved: dict[str, float] = {}
    for (name, piece), sites in found.items():
        layer = name.removesuffix(".weight")
        if layer == name or not sites or any(len(site.ranks) != len(RANKS) for site in sites):
            continue
        is_plain = type(model.get_submodule(layer)) in (nn.Linear, nn.Conv2d)
        if is_plain and piece.stop - piece.start == sites[0].rows:
            each = sum(table[site][0] - table[site][2] for site in sites)
            if each > 0:
                saved[layer] = each
    return saved


@torch.no_grad()
def _thinned(model: nn.Module, found: Sites, layers: Mapping[str, float]) -> nn.Module:
    """A copy with two thin layers in place of each of some."""
    thin = copy.deepcopy(model)
    for (name, _), sites in found.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            two = sites[0].layers(sites[0].ranks[1])
            if thin.get_submodule(layer).bias is None:
                two[1].register_parameter("bias", None)
            thin.set_submodule(layer, two)
    return thin.eval()
