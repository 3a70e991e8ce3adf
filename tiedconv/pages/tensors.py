"""Each tensor of the original model: its bytes before and after, its ranks and bits."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from tiedconv.commands.report import sizes_of
from tiedconv.core.plan import Plan
from tiedconv.io.checkpoint_reader import Checkpoint

_RESIDUAL = re.compile(r"/B\d+(/codes)?$")


@dataclass(frozen=True)
class TensorFigures:
    """A tensor of the original model.

    Args:
        name: of the tensor.
        parameters: its values.
        original: bytes in the original's type.
        stored: bytes in the file. A stored tensor that several weights read is divided among them
            by their parameters, so that the sum over all is that of the stored tensors.
        converted: whether an expression gives it; else it is kept as it was.
        ranks: of its low-rank parts, each once.
        bits: widths of the integers that it is read from, each once; empty for floats.
    """

    name: str
    parameters: int
    original: int
    stored: float
    converted: bool = False
    ranks: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """The name of the module that has it; its own, if it lies at the root."""
        return self.name.rpartition(".")[0] or self.name


def tensor_figures(checkpoint: Checkpoint, itemsize: int) -> tuple[TensorFigures, ...]:
    """Figures of each tensor, in the order of the plan.

    Args:
        checkpoint: the header of the file.
        itemsize: bytes of a value of the original.
    """
    plan, sizes = checkpoint.plan, sizes_of(checkpoint)
    kept = [
        TensorFigures(name, math.prod(shape), itemsize * math.prod(shape), sizes[name])
        for name, shape in plan.kept.items()
    ]
    return (*_computed(plan, sizes, itemsize), *kept)


def _computed(plan: Plan, sizes: Mapping[str, int], itemsize: int) -> list[TensorFigures]:
    readers: dict[str, int] = defaultdict(int)
    for expr in plan.weights.values():
        for ref in expr.refs:
            readers[ref] += math.prod(expr.shape)
    found = []
    for name, expr in plan.weights.items():
        count = math.prod(expr.shape)
        found.append(
            TensorFigures(
                name,
                count,
                itemsize * count,
                sum(sizes[ref] * count / max(1, readers[ref]) for ref in expr.refs),
                True,
                tuple(sorted({_rank(plan, r) for r in expr.refs if _RESIDUAL.search(r)})),
                tuple(sorted({plan.codes[r].bits for r in expr.refs if r in plan.codes})),
            )
        )
    return found


def _rank(plan: Plan, ref: str) -> int:
    """The inner dimension of a product `B A`, from the name of B or of its integers."""
    shape = plan.codes[ref].shape if ref in plan.codes else plan.factors[ref]
    return shape[-1]
