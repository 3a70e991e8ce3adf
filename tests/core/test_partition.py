"""Partitions of a stack."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiedconv.core.partition import partition
from tiedconv.errors import SchemeError

SPECS = st.sampled_from(["all", "each"]) | st.tuples(
    st.sampled_from(["adjacent", "cycle"]), st.integers(1, 9)
).map(lambda pair: f"{pair[0]}:{pair[1]}")


@given(st.integers(0, 20), SPECS)
def test_every_layer_is_in_exactly_one_group_in_rising_order(length: int, spec: str) -> None:
    groups = partition(length, spec)
    assert sorted(i for group in groups for i in group) == list(range(length))
    assert all(group == sorted(group) and group for group in groups)


@pytest.mark.parametrize(
    ("length", "spec", "groups"),
    [
        (0, "all", []),
        (3, "all", [[0, 1, 2]]),
        (3, "each", [[0], [1], [2]]),
        (5, "adjacent:2", [[0, 1], [2, 3], [4]]),
        (5, "cycle:2", [[0, 2, 4], [1, 3]]),
        (2, "cycle:3", [[0], [1]]),
        (2, "adjacent:9", [[0, 1]]),
        (6, "cycle:3", [[0, 3], [1, 4], [2, 5]]),
    ],
)
def test_named_partitions(length: int, spec: str, groups: list[list[int]]) -> None:
    assert partition(length, spec) == groups


@given(st.integers(1, 20))
def test_extremes_meet(length: int) -> None:
    assert partition(length, "adjacent:1") == partition(length, "each")
    assert partition(length, f"cycle:{length}") == partition(length, "each")
    assert partition(length, f"adjacent:{length}") == partition(length, "all")
    assert partition(length, "cycle:1") == partition(length, "all")


@pytest.mark.parametrize(
    "spec",
    ["", "every", "adjacent", "adjacent:", "adjacent:0", "cycle:-1", "cycle:1.5", "all:2", "each:1",
     "adjacent:2:3", "Adjacent:2", "cycle:²"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_forms_that_exist(spec: str) -> None:
    with pytest.raises(SchemeError) as caught:
        partition(4, spec)
    assert caught.value.code == "invalid-groups"
