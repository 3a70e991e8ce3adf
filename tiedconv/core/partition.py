"""Partitions of a stack: which of its layers share one base.

>>> partition(6, "all"), partition(6, "adjacent:2"), partition(6, "cycle:3")
([[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[0, 3], [1, 4], [2, 5]])
"""

from __future__ import annotations

from tiedconv.errors import SchemeError


def partition(length: int, spec: str) -> list[list[int]]:
    """Positions `0 .. length-1` divided into groups, each in rising order.

    Args:
        length: number of layers in the stack.
        spec: `all` (one group), `each` (every layer alone), `adjacent:N` (runs of N
            neighbours) or `cycle:N` (every N-th layer).

    Raises:
        SchemeError: unknown form, or N below 1.
    """
    kind, _, number = spec.partition(":")
    if spec == "all":
        return [list(range(length))] if length else []
    if spec == "each":
        return [[i] for i in range(length)]
    if kind in ("adjacent", "cycle") and number.isdecimal() and int(number) > 0:
        n = int(number)
        if kind == "adjacent":
            return [list(range(i, min(i + n, length))) for i in range(0, length, n)]
        return [list(range(i, length, n)) for i in range(min(n, length))]
    raise SchemeError(
        f"Invalid groups={spec!r}",
        hint="Use all, each, adjacent:N or cycle:N, such as adjacent:2",
        code="invalid-groups",
    )
