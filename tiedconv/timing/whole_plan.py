"""The time of a whole model that a plan makes of another.

A search takes the layers that seem to gain most, and some only seem to: their times were measured
too short. So a plan takes longer than the sum over its layers says. One run of it tells.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from tiedconv.core.plan import Plan
from tiedconv.runtime.example_inputs import Arguments, evaluation
from tiedconv.runtime.stopwatch import ratio_in_turn
from tiedconv.runtime.tie import tie
from tiedconv.timing.inputs import batch_of
from tiedconv.timing.runtimes import choose_runtime

ROUNDS = 21
SPREAD = 0.02
"""Of the random factors: a model of small weights takes as long as any other."""


def time_of_plan(
    model: nn.Module,
    plan: Plan,
    arguments: Arguments,
    runtime: str,
    batch_size: int = 1,
    threads: int = 1,
) -> float | None:
    """The time of a model tied by a plan, with random factors, over the model's own.

    Args:
        model: plain, in memory, on the CPU.
        plan: of it, with floats alone.
        arguments: of the model, one input or more.
        runtime, batch_size, threads: see `timing.measure_times`.

    Returns:
        the median over rounds in turn; None where one of the two doesn't run.
    """
    chosen, batch = choose_runtime(runtime), batch_of(arguments, batch_size)
    with tempfile.TemporaryDirectory() as folder, evaluation(model):
        try:
            whole = chosen.model(model, batch, Path(folder), threads)
            run = chosen.tied(_tied(model, plan), batch, Path(folder), threads)
            run()
        except Exception:  # models and runtimes fail with any error
            return None
        return ratio_in_turn(run, whole, ROUNDS)


def _tied(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy, tied by random factors."""
    found = copy.deepcopy(model)
    tie(found, plan, {n: SPREAD * torch.randn(shape) for n, shape in plan.factors.items()})
    return found.eval()
