"""What lies between the two 1x1 convolutions of an inverted bottleneck, distinguished by sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Slot, Span
from tiedconv.core.units import area_of, is_depthwise


def add_inner(
    slots: dict[str, Slot],
    vectors: dict[str, Span],
    prefix: str,
    known: Collection[str],
    shapes: Mapping[str, Shape],
) -> bool:
    """Add what lies between `up` and `down` of an inverted bottleneck, by sizes.

    Vectors of as many entries as there are units are theirs, and so are a kernel for each of them
    and the two matrices of squeeze-and-excitation, which take the roles `depthwise`, `reduce` and
    `expand`. Vectors of the width that the block reads or writes are of norms outside.

    Returns:
        whether there is nothing else.
    """
    up, down = slots["up"], slots["down"]
    units, outside = up.rows, {up.columns // area_of(up), down.rows}
    if units in outside:
        return False  # sizes do not tell them apart
    inner: dict[str, Slot] = {}
    entries: dict[str, Span] = {}
    below = [n for n in shapes if n.startswith(f"{prefix}.") and n not in known]
    for name in below:
        shape = shapes[name]
        if shape == (units,):
            entries[f"up.{name[len(prefix) + 1 :]}"] = Span(name, 0, units)
        elif len(shape) > 1:
            slot = Slot.whole(name, shape)
            role = _inner_role(slot, units)
            if role in inner or (not role and not (is_depthwise(slot) and slot.rows in outside)):
                return False
            inner |= {role: slot} if role else {}
    if ("reduce" in inner) != ("expand" in inner):
        return False
    squeezed = inner["reduce"].rows if "reduce" in inner else 0
    for name in below:
        if shapes[name] == (squeezed,) and squeezed not in outside:
            entries[f"reduce.{name[len(prefix) + 1 :]}"] = Span(name, 0, squeezed)
        elif len(shapes[name]) == 1 and shapes[name][0] not in {units, *outside}:
            return False
    slots |= inner
    vectors |= entries
    return True


def _inner_role(slot: Slot, units: int) -> str:
    """The role of a tensor inside an inverted bottleneck, empty for an unknown one."""
    if is_depthwise(slot) and slot.rows == units:
        return "depthwise"
    if area_of(slot) > 1:
        return ""
    if slot.columns == units and slot.rows < units:
        return "reduce"
    return "expand" if slot.rows == units and slot.columns < units else ""
