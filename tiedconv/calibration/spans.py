"""Units: the modules that are fitted to their originals; spans: units that share parameters.

The unit of a converted weight is its residual block, found by names and confirmed by the probe:

1. Its *home* is the numbered block around it (`core.block_names`): `layer1.0` for
   `layer1.0.conv1`, `encoder_layer_3` for `encoder_layer_3.mlp.0`.
2. Outside of all blocks it is the largest module around the weight that holds no block: a
   downsampling between blocks is a unit of its own, a model without blocks is one unit.
3. A home that is never called (a `ModuleList`) yields to the largest module inside that is; one
   that is called twice, or whose call can't be made again, to the nearest module around it that
   can, at last to the whole model.
4. A unit inside another is part of it.
5. A weight of a module that holds blocks, such as a table of positions, has no unit, unless there
   is no other: it is fitted with the whole model alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tiedconv.calibration.probing import Probe
from tiedconv.core.block_names import block_names
from tiedconv.core.plan import Plan
from tiedconv.errors import UserError

Link = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Consecutive units that are fitted together.

    Attributes:
        units: names of modules, in order of execution; "" is the whole model.
        links: between each and the next, see `Probe.link`; None where something lies between.
        entry: likewise, between the last unit of the span before and the first of this.
        around: of a span that is not chained, the smallest module that holds all units and whose
            call can be made again; "" where there is none but the whole model.
        replayed: whether it may be run on what reached it. Where samples differ in shape, what
            reaches it does too, and so do the constants of its call.
    """

    units: tuple[str, ...]
    links: tuple[Link | None, ...] = ()
    entry: Link | None = None
    around: str = ""
    replayed: bool = True

    @property
    def chained(self) -> bool:
        """Whether each unit reads what the one before it gives."""
        return all(link is not None for link in self.links)

    @property
    def from_images(self) -> bool:
        """Whether it is run as part of the whole model: it is that, or nothing less will do."""
        alone = self.chained or bool(self.around)
        return self.units == ("",) or not (self.replayed and alone)


def find_spans(model: nn.Module, plan: Plan, probe: Probe) -> list[Span]:
    """The spans of a model, in order of execution.

    Units that share a stored parameter are fitted jointly, with all units between them.

    Args:
        model: the original.
        plan: of the tied model.
        probe: of the original.

    Raises:
        UserError: the model is not the one that the plan is for.
    """
    units = find_units(model, plan, probe)
    owners = _owners(model, plan, units)
    spans: list[Span] = []
    for start, stop in _intervals(len(units), list(owners.values())):
        names = tuple(units[start:stop])
        links = tuple(probe.link(a, b) for a, b in itertools.pairwise(names))
        # A span that is run from the images leaves no stream to continue from.
        chained = bool(spans) and spans[-1].chained and None not in links
        entry = probe.link(units[start - 1], units[start]) if chained else None
        around = "" if None not in links else _around(names, probe)
        spans.append(Span(names, links, entry, around))
    return spans


def _around(names: Sequence[str], probe: Probe) -> str:
    """The smallest module around all of these that can be called again; "" if there is none.

    So a detector's decoder, whose layers move boxes between them, is run without its backbone.
    """
    outer = (name for name in _upwards(names[0]) if all(inside(n, name) for n in names))
    return next((name for name in outer if name in probe.calls), "")


def find_units(model: nn.Module, plan: Plan, probe: Probe) -> list[str]:
    """Names of the units in order of execution; at least one, no one inside another."""
    for name in plan.weights:
        _require(model, name.rpartition(".")[0])
    owners = {name: name.rpartition(".")[0] for name in plan.weights}
    blocks, block_of = _blocks(model)
    within = {n: o for n, o in owners.items() if not any(inside(b, o) and b != o for b in blocks)}
    owners = within or owners
    homes = _homes(owners, blocks, block_of)
    chosen = {_callable(home, owners[weight], probe) for weight, home in homes.items()}
    outer = [u for u in chosen if not any(v != u and inside(u, v) for v in chosen)]
    order = {name: n for n, name in enumerate(probe.calls)}
    return sorted(outer, key=lambda name: order.get(name, 0))


def _blocks(model: nn.Module) -> tuple[set[str], Callable[[str], str | None]]:
    """The numbered blocks of a model, and which of them a tensor is of."""
    matrices = [n for n, p in model.named_parameters() if p.ndim > 1 and p.numel() > max(p.shape)]
    block_of = block_names(matrices, least=2)
    return {block for name in matrices if (block := block_of(name)) is not None}, block_of


def _homes(
    owners: Mapping[str, str], blocks: Collection[str], block_of: Callable[[str], str | None]
) -> dict[str, str]:
    """Rules 1 and 2: for each weight the module that is fitted with it."""

    def outside(owner: str) -> str:
        around = ["", *list(_upwards(owner))[::-1]]
        return next((n for n in around if not any(inside(b, n) for b in blocks)), owner)

    return {weight: block_of(weight) or outside(owner) for weight, owner in owners.items()}


def _callable(home: str, owner: str, probe: Probe) -> str:
    """Rule 3."""
    if home in probe.calls:
        return home
    if home not in probe.called:
        for name in _downwards(home, owner):
            if name in probe.calls:
                return name
    return next((name for name in _upwards(home) if name in probe.calls), "")


def _owners(model: nn.Module, plan: Plan, units: Sequence[str]) -> dict[object, set[int]]:
    """Each parameter (a factor's name, a parameter's id) to the units that read it."""
    found: dict[object, set[int]] = {}
    first = {**{n: n for n in plan.weights}, **plan.aliases}
    for n, unit in enumerate(units):
        for name, weight in first.items():
            if weight in plan.weights and inside(name, unit):
                for ref in plan.weights[weight].refs:
                    found.setdefault(ref, set()).add(n)
        for parameter in model.get_submodule(unit).parameters():
            found.setdefault(id(parameter), set()).add(n)
    return found


def _intervals(count: int, groups: Sequence[set[int]]) -> list[tuple[int, int]]:
    """The finest division of `range(count)` in which each group lies within one interval."""
    reach = list(range(count))
    for group in groups:
        reach[min(group)] = max(reach[min(group)], *group)
    found: list[tuple[int, int]] = []
    start = end = 0
    for n in range(count):
        end = max(end, reach[n])
        if n == end:
            found.append((start, n + 1))
            start = end = n + 1
    return found


def inside(name: str, outer: str) -> bool:
    """Whether a module or tensor is `outer` or lies in it."""
    return not outer or name == outer or name.startswith(outer + ".")


def _upwards(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _downwards(outer: str, name: str) -> list[str]:
    """From the largest module inside `outer` to the one of this name."""
    return [n for n in _upwards(name) if n != outer and inside(n, outer)][::-1]


def _require(model: nn.Module, name: str) -> None:
    try:
        model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"The teacher has no module {name}",
            "It is not the original of this model",
            "Give the model that was converted",
            code="teacher-differs",
        ) from None
