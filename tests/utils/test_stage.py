"""Stages of a long piece of work: in order, each once, counted; nobody has to listen."""

from __future__ import annotations

import pytest

from tiedconv.utils.stage import Stage, enter, enter_part, listening, stages


def test_stages_are_numbered_and_may_be_passed_over() -> None:
    seen: list[Stage] = []
    with listening(seen.append), stages(("a", "b", "c")):
        enter("a")
        enter_part(1, 2)
        enter("c")
    assert seen == [Stage("a", 1, 3), Stage("a", 1, 3, 1, 2), Stage("c", 3, 3)]


def test_outside_of_stages_nothing_happens() -> None:
    seen: list[Stage] = []
    with listening(seen.append):
        enter("a")
        enter_part(1, 2)
    with stages(("a",)):
        enter("a")
    assert seen == []


def test_a_stage_that_is_over_is_not_entered_again() -> None:
    with stages(("a", "b")):
        enter("b")
        with pytest.raises(ValueError, match=r"."):
            enter("a")
