"""Few pairs that stand for all: what the fast tests run of a product of two lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import pytest

Pair = tuple[str, str]


def covering(pairs: Iterable[Pair], per_first: int, per_second: int) -> frozenset[Pair]:
    """Pairs in which each first name occurs `per_first` times, each second name `per_second` times.

    A name that has fewer pairs keeps them all. The choice is greedy and depends on nothing but the
    list: it takes the pair whose two names lack most, of equals the one whose names were taken
    least, and of these the first.

    Args:
        pairs: all that there are.
        per_first: how often each first name is wanted.
        per_second: how often each second name is wanted.
    """
    left = list(dict.fromkeys(pairs))
    firsts, seconds = Counter(a for a, _ in left), Counter(b for _, b in left)
    need_first = {a: min(n, per_first) for a, n in firsts.items()}
    need_second = {b: min(n, per_second) for b, n in seconds.items()}
    taken: set[Pair] = set()

    def gain(pair: Pair) -> tuple[int, int]:
        a, b = pair
        lacking = max(need_first[a], 0), max(need_second[b], 0)
        return sum(n > 0 for n in lacking), need_first[a] + need_second[b]

    while left:
        best = max(left, key=gain)
        if gain(best)[0] == 0:
            break
        left.remove(best)
        taken.add(best)
        need_first[best[0]] -= 1
        need_second[best[1]] -= 1
    return frozenset(taken)


def slow_unless(cases: Iterable[object], fast: Collection[object]) -> list[object]:
    """The cases as parameters of a test; those not in `fast` are marked `slow`."""
    return [
        case
        if case in fast
        else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for case in cases
    ]
