"""What groups take: parameters in a file, and the work of a forward pass.

A budget may limit either or both. Work is multiply-adds or nanoseconds, as the workload has it, by
`runtime.macs`: factors where they take less than the weight, one by one, each weight by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiedconv.core.assemble import member_expr
from tiedconv.core.expr import Expr, reshape
from tiedconv.core.plan import Block, Member, Slot
from tiedconv.core.workload import Use, Workload
from tiedconv.runtime.flops import fewest_macs
from tiedconv.runtime.macs import saved_work
from tiedconv.schemes import Draft, RankOption

_UNUSED = Use(0)


@dataclass(frozen=True)
class Resources:
    """Parameters, and multiply-adds or nanoseconds; of a limit, infinity is none."""

    params: float = 0
    work: float = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.params + other.params, self.work + other.work)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.params - other.params, self.work - other.work)

    def times(self, count: float) -> Resources:
        """So many of them."""
        return Resources(self.params * count, self.work * count)

    def within(self, limit: Resources) -> bool:
        """Whether both are at most those of a limit."""
        return self.params <= limit.params and self.work <= limit.work

    def at(self, price: Resources) -> float:
        """What they cost at a price for each."""
        return self.params * price.params + self.work * price.work

    def worth(self, price: Resources) -> float:
        """The same, but never nothing, to divide by."""
        return max(self.at(price), 1e-300)


NOTHING = Resources()


def limits(params: float | None = None, work: float | None = None) -> Resources:
    """What may be taken; None for as much as there is."""
    return Resources(
        math.inf if params is None else params, math.inf if work is None else work
    )  # fmt: skip


def total(parts: Iterable[Resources]) -> Resources:
    """The sum."""
    found = NOTHING
    for part in parts:
        found += part
    return found


def prices(limit: Resources, mix: float) -> Resources:
    """The price of one parameter and of one unit of work, up to a common factor.

    Args:
        limit: what there is of each.
        mix: the share of the price of all that is put on work, 0 to 1, where both are
            limited. What is not limited has no price.
    """
    if math.isinf(limit.work):
        return Resources(1, 0)
    if math.isinf(limit.params):
        return Resources(0, 1)
    return Resources((1 - mix) / max(1.0, limit.params), mix / max(1.0, limit.work))


def is_mixed(limit: Resources) -> bool:
    """Whether both are limited."""
    return not (math.isinf(limit.work) or math.isinf(limit.params))


def of_slot(slot: Slot, workload: Workload | None) -> Resources:
    """Of one that is left as it is."""
    use = _use(slot, workload)
    return Resources(slot.numel, use.work * slot.numel / math.prod(slot.shape))


def of_blocks(blocks: Iterable[Block], workload: Workload | None) -> Resources:
    """Of blocks that are left as they are."""
    return total(of_slot(slot, workload) for block in blocks for slot in block.slots.values())


def of_drafts(
    drafts: Sequence[Draft], blocks: Iterable[Block], workload: Workload | None
) -> Resources:
    """Of the matrices of some blocks, converted or not."""
    whole = of_blocks(blocks, workload)
    kept = total(of_slot(m.slot, workload) for d in drafts for m in d.members)
    return whole - kept + total(of_draft(d, workload) for d in drafts)


def of_draft(d: Draft, workload: Workload | None) -> Resources:
    """Of a group at its ranks."""
    layout = d.scheme.layout(d.shapes)
    params = sum(math.prod(shape) for shape in layout.factors.values())
    if workload is None:
        return Resources(params)
    work = 0.0
    for member, expr in zip(d.members, layout.weights, strict=True):
        whole = of_slot(member.slot, workload).work
        work += whole - saved_work(_as_run(member, expr), _use_of_rows(member.slot, workload))
    return Resources(params, work)


def of_ranks(d: Draft, workload: Workload | None) -> list[Resources | None]:
    """For each rank option of a group at its least ranks, what one rank more takes.

    Work is that of the factors, even at ranks at which the weight itself takes less: no less than
    what is run. A weight that takes less than its factors at their least ranks does
    so at any.
    """
    options = d.scheme.rank_options(d.shapes)
    found: list[Resources | None] = [
        None if option is None else Resources(option.params_per_rank) for option in options
    ]
    if workload is None or not any(_use(m.slot, workload).pieces for m in d.members):
        return found
    ranks = [option.min_rank if option else 0 for option in options]
    least = _exprs(d, ranks)
    for j, option in enumerate(options):
        one = found[j]
        if option is None or one is None or option.break_even_rank <= option.min_rank:
            continue
        more, most = ([*ranks[:j], rank, *ranks[j + 1 :]] for rank in
                      (option.min_rank + 1, option.break_even_rank))  # fmt: skip
        work = 0.0
        forms = zip(d.members, least, _exprs(d, more), _exprs(d, most), strict=True)
        for member, *exprs in forms:
            if fewest_macs(exprs[0])[1]:
                use = _use_of_rows(member.slot, workload)
                work += _of_one_rank([saved_work(expr, use) for expr in exprs], option, use)
        found[j] = dataclasses.replace(one, work=work)
    return found


def _of_one_rank(saved: Sequence[float], option: RankOption, use: Use) -> float:
    """What one rank more takes at most.

    A runtime applies factors up to a share of the weight's multiply-adds, and runs the weight
    itself above it, which may take much longer: a rank pays its part of that.

    Args:
        saved: with the least ranks, with one more, and with all.
        option: the ranks.
        use: of the weight.
    """
    one, all_of_them = saved[0] - saved[1], saved[0] - saved[2]
    times = next((p.times for p in use.pieces if p.times is not None), None)
    if times is None or all_of_them <= one * spread(option):
        return one
    share = 1.0 if times.limit is None else times.limit
    below = math.ceil(share * option.break_even_rank) - option.min_rank
    return max(one, all_of_them / max(1, below))


def spread(option: RankOption) -> int:
    """Ranks that a budget may add."""
    return option.break_even_rank - option.min_rank


def _exprs(d: Draft, ranks: Sequence[int]) -> list[Expr]:
    weights = d.scheme.with_ranks(ranks).layout(d.shapes).weights
    return [_as_run(m, e) for m, e in zip(d.members, weights, strict=True)]


def _as_run(member: Member, expr: Expr) -> Expr:
    """The expression of a slot's rows, in the shape of the tensor: a kernel is one."""
    slot = member.slot
    matrix = member_expr(member, expr)
    return matrix if slot.transposed else reshape(matrix, (slot.rows, *slot.shape[1:]))


def _use_of_rows(slot: Slot, workload: Workload) -> Use:
    """The use of a slot's rows alone."""
    use = _use(slot, workload)
    if slot.transposed:  # such a layer uses all of it
        pieces = [dataclasses.replace(p, start=0, stop=slot.rows) for p in use.pieces]
    else:
        pieces = use.within(slot.start, slot.stop)
    return Use(use.work, tuple(pieces), use.heads)


def _use(slot: Slot, workload: Workload | None) -> Use:
    return _UNUSED if workload is None else workload.uses.get(slot.tensor, _UNUSED)
