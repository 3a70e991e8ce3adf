"""Expressions as nested lists, and back with every limit checked."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping

from tiedconv.core.expr import (
    MAX_ELEMENTS,
    Add,
    Cat,
    Dequantize,
    Expr,
    MatMul,
    Mul,
    Permute,
    Ref,
    Reshape,
    Slice,
    is_name,
    malformed,
)
from tiedconv.core.pad import Pad

# Far above what any scheme builds, far below what could hurt a reader of an untrusted file.
MAX_DEPTH = 24
MAX_NODES = 512
MAX_NODES_IN_ALL = 30_000  # of a plan


def from_json(data: object) -> Expr:
    """The expression of a nested list made by `Expr.to_json`.

    Raises:
        PlanError: unknown tag, wrong arguments, shapes that don't fit, too deep or too large.
    """
    return _parse(data, 0, [MAX_NODES])


def check_size(exprs: Iterable[Expr]) -> None:
    """Raise PlanError if these have more nodes than would be read again."""
    if sum(1 for expr in exprs for _ in expr.walk()) > MAX_NODES_IN_ALL:
        raise malformed(f"the plan has more than {MAX_NODES_IN_ALL:,} nodes", "plan-too-large")


def all_from_json(data: Mapping[str, object]) -> dict[str, Expr]:
    """Named expressions, likewise, of bounded size in all."""
    left, found = MAX_NODES_IN_ALL, {}
    for name, one in data.items():
        budget = [min(MAX_NODES, left)]
        before = budget[0]
        found[name] = _parse(one, 0, budget)
        left -= before - budget[0]
    return found


def _parse(data: object, depth: int, budget: list[int]) -> Expr:
    budget[0] -= 1
    if depth > MAX_DEPTH or budget[0] < 0:
        raise malformed(
            f"more than {MAX_DEPTH} levels, or {MAX_NODES} nodes, or {MAX_NODES_IN_ALL:,} in all",
            "plan-too-large",
        )
    match data:
        case ["ref", str(name), list(shape)] if is_name(name):
            return Ref(name, _ints(shape))
        case ["permute", x, list(dims)]:
            return Permute(_parse(x, depth + 1, budget), _ints(dims))
        case ["reshape", x, list(shape)]:
            return Reshape(_parse(x, depth + 1, budget), _ints(shape))
        case ["slice", x, *bounds] if len(bounds) == 3:
            return Slice(_parse(x, depth + 1, budget), *_ints(bounds))
        case ["pad", x, *sizes] if len(sizes) == 2:
            return Pad(_parse(x, depth + 1, budget), *_ints(sizes))
        case ["cat", list(xs), dim] if 0 < len(xs) <= MAX_NODES:
            return Cat(tuple(_parse(x, depth + 1, budget) for x in xs), _ints([dim])[0])
        case ["dequantize", codes, scales, *sizes] if len(sizes) == 2:
            bits, columns = _ints(sizes)
            stored = _parse(codes, depth + 1, budget)
            return Dequantize(stored, _parse(scales, depth + 1, budget), bits, columns)
        case [("add" | "mul" | "matmul") as tag, a, b]:
            node = {"add": Add, "mul": Mul, "matmul": MatMul}[tag]
            return node(_parse(a, depth + 1, budget), _parse(b, depth + 1, budget))
    raise malformed(f"{reprlib.repr(data)}")


def _ints(values: list[object]) -> tuple[int, ...]:
    if len(values) > 8 or any(type(v) is not int or abs(v) > MAX_ELEMENTS for v in values):
        raise malformed(f"{reprlib.repr(values)} where small whole numbers belong")
    return tuple(v for v in values if isinstance(v, int))
