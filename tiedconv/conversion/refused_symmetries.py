"""What it costs a fit that some symmetries are not exact on the model at hand.

The groups around one block of each kind are aligned and fitted twice: with the symmetries that are
exact, and as if all were. The second fit is thrown away: it would change the model's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tiedconv.conversion.fit import fit_group
from tiedconv.conversion.tensor_store import Workspace, widened
from tiedconv.core.plan import Block, Group, Plan
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.planning.drafting import KEPT, Task
from tiedconv.planning.planner import Outline

LARGEST = 2**27
"""Numbers in the weights of the groups that are fitted twice; nothing is measured above."""


def cost_of_refused(outlined: Outline, plan: Plan, workspace: Workspace) -> list[dict[str, Any]]:
    """The relative error of some groups as fitted, and if the refused symmetries were exact.

    Errors are plain Frobenius distances, without images, as both fits are of other weights.

    Args:
        outlined: the recipe, whose schemes align.
        plan: with its ranks.
        workspace: its weights aligned by the symmetries that are exact.

    Returns:
        for each kind of block on which one was refused: `block`, the first of them, `groups`,
        `symmetries`, `error` and `error_if_exact`.
    """
    refused = workspace.editor.symmetries["refused"]
    found = []
    for task, block in _first_of_each_kind(outlined.tasks, refused):
        groups = _groups_of(plan, block)
        blocks = _blocks_of(task, groups)
        names = {slot.tensor for b in blocks for slot in b.slots.values()}
        names |= {span.tensor for b in blocks for span in b.vectors.values()}
        tensors = {name: widened(workspace.aligned(name)) for name in sorted(names)}
        if not groups or sum(t.numel() for t in tensors.values()) > LARGEST:
            continue
        exact, every = WeightEditor(tensors), WeightEditor(tensors)
        task.scheme.align(blocks, every)
        task.scheme.arrange(blocks, every, {})
        found.append(
            {
                "block": block.name,
                "groups": [group.name for group in groups],
                "symmetries": [name for name, where in refused.items() if block.name in where],
                "error": _error(groups, exact),
                "error_if_exact": _error(groups, every),
            }
        )
    return found


def _first_of_each_kind(
    tasks: Sequence[Task], refused: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Task, Block]]:
    names = {name for blocks in refused.values() for name in blocks}
    for task in tasks:
        seen: set[str] = set()
        for block in task.blocks:
            if block.name in names and block.kind not in seen:
                seen.add(block.kind)
                yield task, block


def _groups_of(plan: Plan, block: Block) -> list[Group]:
    own = {slot.tensor for slot in block.slots.values()}
    return [
        group
        for group in plan.groups
        if group.scheme != KEPT and any(m.slot.tensor in own for m in group.members)
    ]


def _blocks_of(task: Task, groups: Sequence[Group]) -> list[Block]:
    members = {m.slot.tensor for group in groups for m in group.members}
    return [b for b in task.blocks if any(s.tensor in members for s in b.slots.values())]


def _error(groups: Sequence[Group], editor: WeightEditor) -> float:
    """Relative error of several groups together."""
    wrong = total = 0.0
    for group in groups:
        matrices = [matrix.contiguous() for matrix in editor.matrices(group.members)]
        size = sum(float(m.double().square().sum()) for m in matrices)
        wrong += (fit_group(group, matrices)[0].error or 0.0) ** 2 * size
        total += size
    return math.sqrt(wrong / total) if total > 0 else 0.0
