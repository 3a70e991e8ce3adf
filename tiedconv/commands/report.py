"""The command `report`: the parameters and bytes of a file or tied model, by group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tiedconv.commands.measured import measured
from tiedconv.core.expr import Shape
from tiedconv.core.plan import Group, Plan
from tiedconv.core.storage import PARTS
from tiedconv.core.tables import Table, Tabular, alike
from tiedconv.io.checkpoint_reader import Checkpoint, read
from tiedconv.io.safetensors_file import DTYPES
from tiedconv.runtime.flops import apply_flops
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of

ROUNDED = "rounded"
"""In place of a scheme: weights that are stored as integers and share nothing."""


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

    @property
    def bits(self) -> float:
        """Bits for each stored parameter, scales included."""
        return 8 * self.size / self.stored


@dataclass(frozen=True)
class Report(Tabular):
    """The figures of a file or model.

    Args:
        name: file name, or name of the model's class.
        model: the spec it was made from.
        groups: figures of each group.
        original, stored: total parameters.
        kept: parameters stored unchanged (included in both figures).
        tensor_bytes: bytes of all stored tensors, buffers included.
        integers: parameters that are stored as integers.
        original_bytes: bytes of the original's tensors, in the type that they were published in.
        original_dtype: that type.
        memory_bytes: of the tensors of a loaded model: integers packed, all else float32.
        frozen_bytes: likewise once `tiedconv.freeze` has computed every weight.
        file_bytes: size of the file, 0 for a model in memory.
        history: entries of the steps, oldest first.
        source: the recorded source.
        factored_flops: multiplications of the converted layers with factors applied one by one
            (see `apply_factors`), as a ratio to those with their weights.
        macs: multiply-adds of a forward pass: `original`, `converted` (each layer in the form that
            takes fewest, as `apply_factors(cache=True)` runs it), and the shapes of its `inputs`;
            None where they were not counted.
    """

    name: str
    model: str
    groups: tuple[GroupReport, ...]
    original: int
    stored: int
    kept: int
    tensor_bytes: int
    integers: int
    original_bytes: int
    original_dtype: str
    memory_bytes: int
    frozen_bytes: int
    file_bytes: int
    history: tuple[Mapping[str, Any], ...]
    source: Mapping[str, Any] | None
    factored_flops: float
    macs: Mapping[str, Any] | None = None

    @property
    def ratio(self) -> float:
        """Stored over original parameters."""
        return self.stored / self.original

    def merged(self, *, each: bool = False) -> list[tuple[str, str, list[GroupReport]]]:
        """(name, scheme, groups): those that differ in a layer's number alone are one."""
        return alike(self.groups, each=each)

    def table(self) -> Table:
        """What `print` shows: parameters and bytes of its groups."""
        rows = [
            _line(name, scheme, *(sum(getattr(g, size) for g in groups) for size in _SIZES))
            for name, scheme, groups in self.merged()
        ]
        rows.append(_line("kept as it was", "", self.kept, self.kept, None))
        rows.append(_line("whole model", "", self.original, self.stored, self.tensor_bytes))
        title = f"{self.name}: {self.model}, {self.original:,} parameters became {self.stored:,}"
        if self.file_bytes:
            share = 100 * self.file_bytes / self.original_bytes
            title += f", {self.file_bytes:,} bytes ({share:.1f} % of the original's)"
        columns = ("group", "scheme", "original", "stored", "ratio", "bytes")
        found = measured(self.history)
        return Table(title, columns, tuple(rows), below=found[-1].sentence if found else "")

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


_SIZES = ("original", "stored", "size")


def _line(name: str, scheme: str, before: int, after: int, size: int | None) -> tuple[str, ...]:
    ratio = f"{100 * after / before:.1f} %" if before else ""
    return name, scheme, f"{before:,}", f"{after:,}", ratio, "" if size is None else f"{size:,}"


def report(what: str | Path | nn.Module) -> Report:
    """Figures of a compact file (its header alone is read) or of a tied model.

    Of a model whose layers were made narrow (`optimize`), they are those of what was converted.

    Raises:
        CheckpointError: the file is missing, damaged or not tiedconv's.
        UserError: the model is not tied.
    """
    if isinstance(what, nn.Module):
        state = state_of(what)
        plan, held = state.wide or state.plan, state_tensors(what)
        sizes = {n: t.nbytes for n, t in held.items()}
        if state.wide is not None:  # what was converted, not what its layers were cut to
            whole = {n: math.prod(shape) for n, shape in plan.tensors.items()}
            sizes |= {n: held[n].element_size() * count for n, count in whole.items()}
        return _report(type(what).__name__, plan, sizes, state.source, state.history, file_bytes=0)
    checkpoint = read(what)
    return report_of(checkpoint)


def report_of(checkpoint: Checkpoint) -> Report:
    """Figures of a file whose header was read."""
    return _report(
        checkpoint.path.name,
        checkpoint.plan,
        sizes_of(checkpoint),
        checkpoint.source,
        checkpoint.history,
        checkpoint.size,
    )


def sizes_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each stored tensor of a file, as it is stored."""
    return {
        name: DTYPES[dtype].itemsize * math.prod(checkpoint.shapes[name])
        for name, dtype in checkpoint.dtypes.items()
    }


def plan_report(plan: Plan, name: str, macs: Mapping[str, Any] | None = None) -> Report:
    """Figures of a plan before the conversion, at 4 bytes per parameter."""
    sizes = {n: 4 * math.prod(s) for n, s in plan.tensors.items()}
    found = _report(name, plan, sizes, {"spec": name}, (), file_bytes=0)
    return dataclasses.replace(found, macs=macs)


def _report(
    name: str,
    plan: Plan,
    sizes: Mapping[str, int],
    source: Mapping[str, Any] | None,
    history: tuple[Mapping[str, Any], ...],
    file_bytes: int,
) -> Report:
    views = {weight: expr.is_view for weight, expr in plan.weights.items()}
    stored = plan.tensors
    dtype = str((source or {}).get("weights_dtype") or _own_dtype(stored, sizes, history))
    kept = sum(math.prod(s) for n, s in plan.kept.items() if n not in plan.buffers)
    alone = _alone(plan, sizes)
    computed = [expr for expr in plan.weights.values() if not expr.is_view]
    return Report(
        name=name,
        model=str((source or {}).get("spec") or "a model in memory"),
        groups=(*(_group(g, views, sizes) for g in plan.groups), *alone),
        original=plan.original,
        stored=plan.stored,
        kept=kept,
        original_bytes=_numbers(plan) * (4 if dtype == "float32" else 2),
        original_dtype=dtype,
        tensor_bytes=sum(sizes[name] for name in stored),
        integers=sum(math.prod(node.shape) for node in plan.codes.values()),
        memory_bytes=_memory(plan, stored),
        frozen_bytes=_memory(plan, stored) + 4 * sum(math.prod(e.shape) for e in computed),
        file_bytes=file_bytes,
        history=history,
        source=source,
        factored_flops=_factored_flops(plan),
        macs=next(
            (step["macs"] for step in history if isinstance(step.get("macs"), Mapping)), None
        ),
    )


def _memory(plan: Plan, stored: Mapping[str, Shape]) -> int:
    return sum(math.prod(s) * (1 if name in plan.codes else 4) for name, s in stored.items())


def _own_dtype(
    stored: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """The original's type, where its source does not say: a model in memory keeps its own."""
    halved = all(sizes[n] == 2 * math.prod(s) for n, s in stored.items() if len(s) > 1)
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
        size=sum(_bytes_of(group.stored_name(n), sizes) for n in group.factors),
        error=group.error,
        views=seen,
        computed=len(group.members) - seen,
    )  # fmt: skip


def _bytes_of(name: str, sizes: Mapping[str, int]) -> int:
    """Bytes of a factor, or of the integers and scales that stand for it."""
    return sum(sizes.get(n, 0) for n in (name, *(f"{name}/{part}" for part in PARTS)))


def _alone(plan: Plan, sizes: Mapping[str, int]) -> list[GroupReport]:
    """The weights that no scheme governs and that are stored as integers, as one row."""
    grouped = {m.slot.tensor for group in plan.groups for m in group.members}
    exprs = [expr for name, expr in plan.weights.items() if name not in grouped]
    if not exprs:
        return []
    refs = {name: shape for expr in exprs for name, shape in expr.refs.items()}
    numbers = {n: plan.codes[n].shape if n in plan.codes else s for n, s in refs.items()}
    return [
        GroupReport(
            name="other weights",
            scheme=ROUNDED,
            rank="",
            matrices=len(exprs),
            original=sum(math.prod(expr.shape) for expr in exprs),
            stored=sum(map(math.prod, numbers.values())),
            size=sum(sizes[name] for name in refs),
            error=None,
            views=0,
            computed=len(exprs),
        )
    ]
