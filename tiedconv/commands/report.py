"""The command `report`: the parameters and bytes of a file or tied model, by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tiedconv.core.plan import Group, Plan
from tiedconv.io.checkpoint_reader import Checkpoint, read
from tiedconv.io.safetensors_file import DTYPES
from tiedconv.runtime.flops import apply_flops
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of


@dataclass(frozen=True)
class GroupReport:
    """The figures of one group.

    Args:
        name, scheme: name and scheme of the group.
        rank: ranks of its residuals, such as `64` or `8-64`, empty without any.
        matrices: number of matrices in it.
        original, stored: parameters of the original and stored ones.
        size: bytes on disk.
        error: relative Frobenius error of the fit, None if not fitted.
        views: weights that are views of stored tensors and need no arithmetic.
        computed: weights that need arithmetic (cached by `freeze` for inference).
    """

    name: str
    scheme: str
    rank: str
    matrices: int
    original: int
    stored: int
    size: int
    error: float | None
    views: int
    computed: int

    @property
    def ratio(self) -> float:
        """Stored over original parameters."""
        return self.stored / self.original


@dataclass(frozen=True)
class Report:
    """The figures of a file or model.

    Args:
        name: file name, or name of the model's class.
        model: the spec it was made from.
        groups: figures of each group.
        original, stored: total parameters.
        kept: parameters stored unchanged (included in both figures).
        tensor_bytes: bytes of all stored tensors, buffers included.
        original_bytes: bytes of the original's tensors, in the type that they were published in.
        original_dtype: that type.
        file_bytes: size of the file, 0 for a model in memory.
        history: entries of the steps, oldest first.
        source: the recorded source.
        factored_flops: multiplications of the converted layers with factors applied one by one
            (see `apply_factors`), as a ratio to those with their weights.
    """

    name: str
    model: str
    groups: tuple[GroupReport, ...]
    original: int
    stored: int
    kept: int
    tensor_bytes: int
    original_bytes: int
    original_dtype: str
    file_bytes: int
    history: tuple[Mapping[str, Any], ...]
    source: Mapping[str, Any] | None
    factored_flops: float

    @property
    def ratio(self) -> float:
        """Stored over original parameters."""
        return self.stored / self.original

    @property
    def top1(self) -> float | None:
        """The last measured top-1 accuracy, 0 to 1; None if the last metric is another."""
        return self._last("top1")

    @property
    def agreement(self) -> float | None:
        """Likewise the agreement with the teacher, for fine-tuning on images without labels."""
        return self._last("agreement")

    @property
    def ap(self) -> float | None:
        """Likewise the average precision of a detector, 0 to 1."""
        return self._last("ap")

    def _last(self, figure: str) -> float | None:
        # An older figure is of a model that was fine-tuned further since.
        measured = [e for e in self.history if _measured(e)]
        value = measured[-1].get(figure) if measured else None
        return None if value is None else float(value)


def report(what: str | Path | nn.Module) -> Report:
    """Figures of a compact file (its header alone is read) or of a tied model.

    Raises:
        CheckpointError: the file is missing, damaged or not tiedconv's.
        UserError: the model is not tied.
    """
    if isinstance(what, nn.Module):
        state = state_of(what)
        sizes = {n: t.element_size() for n, t in state_tensors(what).items()}
        return _report(
            type(what).__name__, state.plan, sizes, state.source, state.history, file_bytes=0
        )
    checkpoint = read(what)
    return report_of(checkpoint)


def report_of(checkpoint: Checkpoint) -> Report:
    """Figures of a file whose header was read."""
    sizes = {n: DTYPES[d].itemsize for n, d in checkpoint.dtypes.items()}
    return _report(
        checkpoint.path.name,
        checkpoint.plan,
        sizes,
        checkpoint.source,
        checkpoint.history,
        checkpoint.size,
    )


def plan_report(plan: Plan, name: str) -> Report:
    """Figures of a plan before the conversion, at 4 bytes per parameter."""
    sizes = dict.fromkeys([*plan.kept, *plan.factors], 4)
    return _report(name, plan, sizes, {"spec": name}, (), file_bytes=0)


def _report(
    name: str,
    plan: Plan,
    sizes: Mapping[str, int],
    source: Mapping[str, Any] | None,
    history: tuple[Mapping[str, Any], ...],
    file_bytes: int,
) -> Report:
    views = {weight: expr.is_view for weight, expr in plan.weights.items()}
    stored = {**plan.kept, **plan.factors}
    dtype = str((source or {}).get("weights_dtype") or _own_dtype(stored, sizes, history))
    kept = sum(math.prod(s) for n, s in plan.kept.items() if n not in plan.buffers)
    return Report(
        name=name,
        model=str((source or {}).get("spec") or "a model in memory"),
        groups=tuple(_group(g, views, sizes) for g in plan.groups),
        original=plan.original,
        stored=plan.stored,
        kept=kept,
        original_bytes=_numbers(plan) * (4 if dtype == "float32" else 2),
        original_dtype=dtype,
        tensor_bytes=sum(math.prod(s) * sizes[n] for n, s in stored.items()),
        file_bytes=file_bytes,
        history=history,
        source=source,
        factored_flops=_factored_flops(plan),
    )


def _own_dtype(
    stored: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """The original's type, where its source does not say: a model in memory keeps its own."""
    halved = all(sizes[name] == 2 for name, shape in stored.items() if len(shape) > 1)
    exported = any("computes_in" in step for step in history)
    return "half precision" if halved and not exported else "float32"


def _numbers(plan: Plan) -> int:
    """The numbers of the original's tensors, buffers included."""
    shapes = [*plan.kept.values(), *(expr.shape for expr in plan.weights.values())]
    return sum(map(math.prod, shapes))


def _measured(entry: Mapping[str, Any]) -> bool:
    return any(entry.get(figure) is not None for figure in ("top1", "agreement", "ap"))


def _factored_flops(plan: Plan) -> float:
    dense = {name: math.prod(expr.shape) for name, expr in plan.weights.items()}
    factored = sum(apply_flops(e) or dense[name] for name, e in plan.weights.items())
    return factored / max(1, sum(dense.values()))


def _group(group: Group, views: Mapping[str, bool], sizes: Mapping[str, int]) -> GroupReport:
    ranks = [s[1] for n, s in group.factors.items() if n.startswith("B") and n[1:].isdecimal()]
    spread = f"{min(ranks)}-{max(ranks)}" if ranks and min(ranks) < max(ranks) else ""
    seen = sum(views[m.slot.tensor] for m in group.members)
    return GroupReport(
        name=group.name,
        scheme=group.scheme,
        rank=spread or (str(ranks[0]) if ranks else ""),
        matrices=len(group.members),
        original=group.original,
        stored=group.stored,
        size=sum(
            math.prod(s) * sizes[group.stored_name(n)] for n, s in group.factors.items()
        ),
        error=group.error,
        views=seen,
        computed=len(group.members) - seen,
    )  # fmt: skip
